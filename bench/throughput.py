"""The measuring protocol: every runner in a process of its own, verified before it is timed, then timed in
interleaved rounds with the same prompts, the same number of tokens and the same number of threads.

One prompt given to every runner in turn, with the memory's bandwidth measured before, is a round. Rounds are what
is compared: a busy machine slows all runners of a round alike. A run cut short, by its time limit, by Ctrl-C or by
SIGTERM, keeps its whole rounds.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

import numpy as np
import psutil
import torch

from coreskip.bench.clock import Generation
from coreskip.bench.lifetime import deferred, interruptible
from coreskip.bench.processes import MACHINE, Client, RunnerFailed, Worker
from coreskip.bench.provenance import commit, device_name, model_name
from coreskip.bench.row_schema import FORMAT, Row
from coreskip.bench.runner import Job
from coreskip.bench.runners import missing
from coreskip.bench.settings import WIDTHS, Settings
from coreskip.bench.workloads import threads_available
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.errors import CoreskipError
from coreskip.runtime.quality import WINDOW

logger = logging.getLogger("coreskip")

VERIFIED_TOKENS = 32
FEWEST_TOKENS = 16
NOISY = 0.1
FEWEST_ROUNDS = 3  # to call a spread a spread
_MARGIN = 1.2  # a round may take that much longer than expected


@dataclass
class Contender:
    """A runner that takes part: its process, and what was measured of it."""

    job: Job
    client: Client
    load_s: float = 0.0
    warmup_s: float = 0.0
    verified: str = ""
    #: a short generation once everything is warm, to plan by
    expected: Generation | None = None
    #: by round
    generations: list[Generation] = field(default_factory=list)
    #: traits, weight bytes and memory right after the last round: scoring uses more memory and counts anew
    after: dict[str, Any] = field(default_factory=dict)
    scored: tuple[float, int] | None = None

    def speeds(self) -> list[float]:
        """Tokens per second after the first token, by round."""
        return [g.tok_s for g in self.generations]


@dataclass(frozen=True)
class Outcome:
    """A run's rows, and per runner that has none, why."""

    rows: list[Row]
    left_out: dict[str, str]
    interrupted: bool


# --- the run ----------------------------------------------------------------------------------------------------------


def run(settings: Settings, start: Callable[[Job], Client] = Worker) -> Outcome:
    """Measure every runner; `start` makes the client of a runner.

    Raises:
        CoreskipError: the reference cannot run, or there is not enough memory for all runners at once.
    """
    _check_memory(settings.jobs)
    bench = Bench(settings, start)
    try:
        with interruptible():
            try:
                bench.measure()
            finally:
                with deferred():
                    bench.resources.close()
    except KeyboardInterrupt:
        bench.interrupted = True
    return Outcome(bench.rows, bench.left_out, bench.interrupted)


class Bench:
    """One run, from empty processes to rows."""

    def __init__(self, settings: Settings, start: Callable[[Job], Client]) -> None:
        self.settings, self._start = settings, start
        self.resources = ExitStack()
        self.contenders: list[Contender] = []
        self.left_out: dict[str, str] = {}
        self.bandwidths: list[float] = []
        self.interrupted = False
        self.rows: list[Row] = []
        self._began = time.monotonic()
        self._when = datetime.now(timezone.utc)
        self._ids: list[list[int]] = []
        self._tokens = settings.tokens

    def measure(self) -> None:
        self._busy = psutil.cpu_percent(interval=0.5) / 100
        first = self.settings.jobs[0]
        machine = self._client(Job(MACHINE, "float32", device=first.device, threads=first.threads))
        self._prepare()
        if not self.contenders:
            return
        try:
            self._time(machine)
            self._score()
        except KeyboardInterrupt:
            self.interrupted = True
            logger.warning("interrupted: keeping %d whole rounds", len(self.bandwidths))
        with deferred():  # whoever presses it again wants to leave, not to lose the rows
            self._finish()

    # --- getting ready

    def _client(self, job: Job) -> Client:
        client = self._start(job)
        self.resources.callback(client.close)
        return client

    def _prepare(self) -> None:
        """Load, verify and warm up every runner, unless two thirds of the time are over."""
        reference = self._reference()
        context = max(map(len, self._ids)) + max(self._tokens, VERIFIED_TOKENS)
        for name, command in missing(job.runner for job in self.settings.jobs).items():
            self.left_out[name] = f"not installed: {command}"
        for job in self.settings.jobs:
            if job.runner in self.left_out:
                continue
            if self._time_left() < self._limit() / 3:
                self.left_out[str(job)] = "no time left to load it: give more --minutes"
                continue
            job = replace(job, context=context)
            contender = Contender(job, self._client(job))
            try:
                self._admit(contender, reference)
                self.contenders.append(contender)
            except RunnerFailed as error:
                contender.client.close()
                self.left_out[str(job)] = str(error)
                logger.warning("%s is left out: %s", job, error)
        reference.close()

    def _reference(self) -> Client:
        """transformers, eager, in the widest dtype asked for: what every output is held against."""
        first = self.settings.jobs[0]
        own = [job.dtype for job in self.settings.jobs if job.dtype in WIDTHS]
        dtype = max(own, key=lambda name: WIDTHS[name], default="float32")
        job = Job("hf", dtype, first.model, first.shape, device=first.device, threads=first.threads)
        reference = self._client(job)
        try:
            reference("load")
            self._ids = reference("encode", [prompt.text for prompt in self.settings.prompts])
            if self._scores:
                self._text: TokenText | None = reference("scored_text", *self.settings.text)
        except RunnerFailed as error:
            raise CoreskipError(str(error)) from None
        return reference

    @property
    def _scores(self) -> bool:
        return self.settings.windows > 0 and self.settings.jobs[0].shape is None

    def _admit(self, contender: Contender, reference: Client) -> None:
        logger.info("loading and verifying %s", contender.job)
        contender.load_s = _seconds(lambda: contender.client("load"))
        outputs: list[Generation] = []
        contender.warmup_s = _seconds(lambda: outputs.append(self._generate(contender, 0, VERIFIED_TOKENS)))
        outputs += [self._generate(contender, i, VERIFIED_TOKENS) for i in range(1, len(self._ids))]
        contender.verified = verify(contender, reference, self._ids, outputs)
        contender.expected = self._generate(contender, 0, FEWEST_TOKENS)

    def _generate(self, contender: Contender, prompt: int, tokens: int) -> Generation:
        generation: Generation = contender.client("generate", self._ids[prompt], tokens)
        if len(generation.tokens) != tokens:
            raise RunnerFailed(f"it generated {len(generation.tokens)} tokens, {tokens} were asked for")
        return generation

    # --- timing

    def _time(self, machine: Client) -> None:
        expected = [c.expected for c in self.contenders if c.expected is not None]
        self._shorten(expected)
        self._round_s = sum(g.ttft + sum(g.gaps) / len(g.gaps) * (self._tokens - 1) for g in expected)
        for number, prompt in enumerate(self._order(), 1):
            if self._time_left() < _MARGIN * self._round_s and number > 1:
                logger.warning("the time is over: %d rounds of %d", number - 1, self._planned)
                break
            logger.info("round %d of %d", number, self._planned)
            self._round(machine, prompt)

    def _order(self) -> Iterator[int]:
        for _ in range(self.settings.rounds):
            yield from range(len(self._ids))

    @property
    def _planned(self) -> int:
        return self.settings.rounds * len(self._ids)

    def _shorten(self, expected: Sequence[Generation]) -> None:
        """Fewer tokens for every runner, if otherwise each prompt could not be timed once."""
        first = sum(g.ttft for g in expected) * len(self._ids)
        each = sum(sum(g.gaps) / len(g.gaps) for g in expected) * len(self._ids)
        affordable = (self._time_left() / _MARGIN - first) / each
        if affordable < self._tokens:
            self._tokens = min(self._tokens, max(FEWEST_TOKENS, int(affordable)))
            logger.warning("to keep to the time limit, %d tokens instead of %d", self._tokens, self.settings.tokens)

    def _round(self, machine: Client, prompt: int) -> None:
        """Counts as a whole or not at all; a runner that fails leaves the run, with its earlier rounds."""
        bandwidth = machine("read_gb_s")
        done: list[tuple[Contender, Generation]] = []
        for contender in list(self.contenders):
            try:
                done.append((contender, self._generate(contender, prompt, self._tokens)))
            except RunnerFailed as error:
                self.left_out[str(contender.job)] = f"failed while it was timed: {error}"
                self.contenders.remove(contender)
        self.bandwidths.append(bandwidth)
        for contender, generation in done:
            contender.generations.append(generation)

    # --- quality

    def _score(self) -> None:
        for contender in self.contenders:
            self._note(contender)
        for contender in self.contenders if self._scores else []:
            if self._time_left() < self._scoring_s(contender):
                logger.warning("no time left for the perplexity of %s", contender.job)
                continue
            logger.info("scoring %s", contender.job)
            try:
                contender.scored = contender.client("perplexity", self._text, self.settings.windows)
            except RunnerFailed as error:
                logger.warning("no perplexity of %s: %s", contender.job, error)

    def _scoring_s(self, contender: Contender) -> float:
        """At most, by what was measured: peers score half of each window token by token, others prefill every window
        twice, for the dense model and for the plan."""
        generations = contender.generations
        prefill = _p50([g.ttft / len(ids) for g, ids in zip(generations, self._ids, strict=False)]) * WINDOW
        decode = WINDOW / 2 / _p50(contender.speeds())
        return self.settings.windows * max(2 * prefill, prefill / 2 + decode)

    # --- rows

    def _note(self, contender: Contender) -> None:
        if not contender.after:
            call = contender.client
            contender.after = {
                **call("traits"),
                "weight_bytes_per_token": int(call("weight_bytes")),
                "memory_bytes": int(call("memory")),
            }

    def _finish(self) -> None:
        measured = [c for c in self.contenders if c.generations]
        best = max((c for c in measured if c.job.runner == "hf"), key=lambda c: _p50(c.speeds()), default=None)
        noise = _noise(measured)
        if noise is None:
            logger.warning("too few rounds to tell how noisy the machine was: compare nothing by these rows")
        elif noise > NOISY:
            logger.warning("the machine was noisy: speeds of one runner spread by %.0f %%", 100 * noise)
        for contender in measured:
            try:
                self._note(contender)
                self.rows.append(self._row(contender, best, noise))
            except RunnerFailed as error:
                self.left_out[str(contender.job)] = str(error)

    def _row(self, contender: Contender, best: Contender | None, noise: float | None) -> Row:
        job, generations = contender.job, contender.generations
        speeds, gaps = contender.speeds(), [1e3 * gap for g in generations for gap in g.gaps]
        positions = np.median([g.gaps for g in generations], axis=0) * 1e3
        ratios = [a / b for a, b in zip(speeds, best.speeds(), strict=False)] if best else []
        bandwidth = _p50(self.bandwidths)
        gb_s = contender.after["weight_bytes_per_token"] * _p50(speeds) / 1e9
        ppl, scored = contender.scored or (None, None)
        return Row(
            format=FORMAT,
            run=self._when.strftime("%Y%m%dT%H%M%SZ"),
            runner=job.runner,
            model=model_name(job.model) if job.shape is None else str(job.shape),
            synthetic=job.shape is not None,
            device=device_name(job.device),
            cores=threads_available(),
            threads=job.threads,
            **contender.after,
            workload="+".join(prompt.name for prompt in self.settings.prompts),
            prompt_tokens=max(map(len, self._ids)),
            tokens=self._tokens,
            samples=len(speeds),
            tok_s=_quantiles(speeds),
            tok_s_by_workload=self._by_workload(speeds),
            end_to_end_tok_s=_p50([self._tokens / (g.ttft + sum(g.gaps)) for g in generations]),
            ttft_ms=_quantiles([1e3 * g.ttft for g in generations]),
            latency_ms={**_quantiles(gaps), "p99": float(np.quantile(gaps, 0.99))},
            latency_by_position_ms=[round(float(gap), 3) for gap in positions],
            speedup=_quantiles(ratios) if ratios else None,
            gb_s=gb_s,
            machine_gb_s=bandwidth,
            bandwidth_share=gb_s / bandwidth,
            load_s=contender.load_s,
            warmup_s=contender.warmup_s,
            ppl=ppl,
            ppl_tokens=scored,
            ppl_text=None if ppl is None else self.settings.text[1],
            verified=contender.verified,
            noise=noise,
            busy=self._busy,
            versions=contender.client("versions"),
            commit=commit(),
            time=self._when.isoformat(timespec="seconds"),
            command=self.settings.command,
        )

    def _by_workload(self, speeds: Sequence[float]) -> dict[str, float]:
        names = [self.settings.prompts[i].name for i, _ in zip(self._order(), speeds, strict=False)]
        return {name: _p50([s for n, s in zip(names, speeds, strict=True) if n == name]) for name in names}

    # --- time

    def _limit(self) -> float:
        """Seconds for the whole run."""
        return math.inf if self.settings.minutes is None else 60 * self.settings.minutes

    def _time_left(self) -> float:
        return self._limit() - (time.monotonic() - self._began)


# --- verifying --------------------------------------------------------------------------------------------------------

# The most that a runner's tokens may be worse than the reference's best choice, in nats. Where the weights are the
# reference's own, no token may be, up to rounding: a bf16 logit above 16 is known to 0.125. Where they were
# quantised, tokens may be on average: int4 was seen at 0.26, llama.cpp's Q4_1 at 0.008, the same model decoding from
# a stale KV cache at 2.4 (and 14 at its worst).
WORST = {"float32": 1e-2, "bfloat16": 0.5, "float16": 0.1}
MEAN_OF_QUANTISED = 0.5


def verify(contender: Contender, reference: Client, prompts: Sequence[list[int]], outputs: Sequence[Generation]) -> str:
    """Hold a runner's greedy output against a reference that reads it as a given text; returns what was found.

    A runner under a plan that skips neurons is held against its own plan, carried out by plain torch in one pass over
    all the tokens: what the plan costs is measured as perplexity, what is verified here is that the fast path does
    what the plan says. Every other runner is held against transformers.

    Raises:
        RunnerFailed: the output is wrong.
    """
    job = contender.job
    judge, judged_by = (contender.client, "its own plan in one pass") if job.plan else (reference, "HF eager")
    regrets = [judge("regrets", ids, g.tokens) for ids, g in zip(prompts, outputs, strict=True)]
    each = [regret for of_prompt in regrets for regret in of_prompt]
    exact = job.dtype in WORST
    kind, found = ("worst", max(each)) if exact else ("mean", sum(each) / len(each))
    limit = WORST[job.dtype] if exact else MEAN_OF_QUANTISED
    found_text = f"{kind} token {found:.2g} nats from the best choice of {judged_by}, over {len(each)} tokens"
    if not found <= limit:
        raise RunnerFailed(f"its output is wrong: {found_text}; {limit:g} is the limit")
    return found_text


# --- small things -----------------------------------------------------------------------------------------------------


def _check_memory(jobs: Sequence[Job]) -> None:
    """All runners stay loaded at once. For real models the operating system tells; for shapes we know before."""
    needed = sum(WIDTHS.get(job.dtype, 4) // 8 * job.shape.parameters() for job in jobs if job.shape is not None)
    available = psutil.virtual_memory().available if jobs[0].device == "cpu" else torch.cuda.mem_get_info()[0]
    if needed * 1.15 > available:
        raise CoreskipError(
            f"the runners need {needed * 1.15 / 1e9:.0f} GB together, {available / 1e9:.0f} GB are free: "
            "give fewer --layers, one --dtype, or fewer runners with --against"
        )


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    p20, p50, p80 = (float(q) for q in np.quantile(values, [0.2, 0.5, 0.8]))
    return {"p20": p20, "p50": p50, "p80": p80}


def _p50(values: Sequence[float]) -> float:
    return float(np.median(values))


def _noise(measured: Sequence[Contender]) -> float | None:
    """How far a runner's speed spreads from round to round; None where rounds are too few to say."""
    spreads = [_spread(c.speeds()) for c in measured if len(c.generations) >= FEWEST_ROUNDS]
    return _p50(spreads) if spreads else None


def _spread(values: Sequence[float]) -> float:
    q = _quantiles(values)
    return (q["p80"] - q["p20"]) / q["p50"]
