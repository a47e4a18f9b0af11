"""Batches, prompts and what is off the native step, against the unwrapped model: how many times as fast each is.

``python -m coreskip.bench.batches --rows bench/rows/batches.jsonl``
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from coreskip.bench.provenance import provenance, write_rows
from coreskip.bench.settings import scored_text
from coreskip.kernels.cpu import has_bfloat16_tiles
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import CoreNeurons, Sketch, Static
from coreskip.runtime.load import load
from coreskip.runtime.wrap import wrap

Row = dict[str, Any]
PLANS = ("dense", "static", "core", "sketch")
KEEP = 0.5  # of plans that leave neurons out
#: options of `generate` that keep decode steps off the native one, or rearrange its cache between them
FALLBACKS: dict[str, dict[str, Any]] = {
    "hooks": {},
    "static cache": {"cache_implementation": "static"},
    "hidden states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "processors and scores": {"repetition_penalty": 1.1, "output_scores": True, "return_dict_in_generate": True},
    "beams": {"num_beams": 3},
}


def _list(kind: Callable[[str], Any], allowed: Sequence[Any] | None = None) -> Callable[..., list[Any]]:
    """A callback for values joined by commas, none of them in an empty text."""

    def convert(context: click.Context, option: click.Parameter, value: str | None) -> list[Any]:
        try:
            found = [kind(part) for part in (value or "").split(",") if part]
        except ValueError:
            raise click.BadParameter(f"{value!r} is not a list of numbers") from None
        wrong = [each for each in found if allowed is not None and each not in allowed]
        if wrong or any(isinstance(each, int) and each < 1 for each in found):
            of = "positive numbers" if allowed is None else ", ".join(allowed)
            raise click.BadParameter(f"{value!r} is not a list of {of}")
        return found

    return convert


@click.command()
@click.option("--rows", "output", required=True, type=click.Path(path_type=Path), help="JSONL file to write.")
@click.option("--batches", default="1,4,8,9,12,16,32,64", callback=_list(int), show_default=True)
@click.option(
    "--formats", default="loaded,int8,int4", callback=_list(str, ("loaded", "int8", "int4")), show_default=True
)
@click.option("--plans", default=",".join(PLANS), callback=_list(str, PLANS), show_default=True)
@click.option("--fallbacks", default="1,16", callback=_list(int), show_default=True, help="Batches of the dense plan.")
@click.option("--prefill", default="64,512,2048", callback=_list(int), show_default=True, help="Tokens of prompts.")
@click.option("--dtypes", callback=_list(str, ("float32", "bfloat16")), help="Of the unwrapped model; by the CPU.")
@click.option("--prompt", default=16, type=click.IntRange(1), show_default=True, help="Tokens of a batch's prompts.")
@click.option("--tokens", default=9, type=click.IntRange(2), show_default=True, help="Generated after each.")
@click.option("--rounds", default=3, type=click.IntRange(1), show_default=True, help="Of all models in turn.")
def main(output: Path, rounds: int, prompt: int, tokens: int, **asked: Any) -> None:
    """Measure the embedded model: float32 wrapped, against itself unwrapped."""
    asked["dtypes"] = asked["dtypes"] or ["float32"] + ["bfloat16"] * has_bfloat16_tiles()
    words = [f"--{name} {','.join(map(str, value))}" for name, value in asked.items() if value]
    command = f"python -m coreskip.bench.batches --rows bench/rows/{output.name} {' '.join(words)}"
    about = provenance(f"{command} --prompt {prompt} --tokens {tokens} --rounds {rounds}")
    about["model"] = "embedded"
    rows: list[Row] = []
    for row in _measured(Bench(asked["dtypes"], prompt, tokens, rounds), asked):
        rows.append({**row, **about})
        write_rows(output, rows)
        click.echo(row)


def _measured(bench: Bench, asked: dict[str, Any]) -> Iterator[Row]:
    for fmt in asked["formats"]:
        for kind in asked["plans"]:
            with bench.wrapped(kind, fmt):
                yield from (bench.batch(rows) for rows in asked["batches"])
                if kind == "dense":
                    yield from (bench.fallback(case, rows) for case in FALLBACKS for rows in asked["fallbacks"])
                    yield from (bench.prompt_of(length) for length in asked["prefill"])


class Bench:
    """The unwrapped model in some dtypes, and a wrapped one in float32."""

    def __init__(self, dtypes: Sequence[str], prompt: int, tokens: int, rounds: int) -> None:
        self._prompt, self._tokens, self._rounds = prompt, tokens, rounds
        loaded = {dtype: load(device="cpu", dtype=dtype) for dtype in dtypes}
        self._unwrapped = {dtype: model for dtype, (model, _) in loaded.items()}
        tokenizer = loaded[dtypes[0]][1]
        text, _ = scored_text(None)
        self._ids: Tensor = tokenizer(text[:40_000], return_tensors="pt").input_ids[0]
        self._model: Any = None
        self._about: Row = {}

    @contextmanager
    def wrapped(self, kind: str, fmt: str) -> Iterator[None]:
        """For the length of the block under a plan; packed weights alone, where the format is one of packed weights."""
        model: Any = load(device="cpu", dtype="float32")[0]
        weights = None if fmt == "loaded" else fmt
        self._model = wrap(model, _plan(model, kind, weights), keep_originals=None if weights is None else False)
        self._about = {"dtype": "float32", "format": fmt, "plan": kind, "keep": 1.0 if kind == "dense" else KEEP}
        self._generate(model, self._prompts(1))  # proves the native step
        yield
        self._model = None

    def batch(self, rows: int) -> Row:
        """Decode speed of a batch. alone: the share of the first four rows' tokens that each row has alone, too."""
        ids = self._prompts(rows)
        some = [self._generate(self._model, row[None])[0][0] for row in ids[:4]]
        together = self._generate(self._model, ids)[0]
        same = [(a[: len(b)] == b[: len(a)]).float().mean() for a, b in zip(some, together, strict=False)]
        seconds = self._in_turn(lambda model: self._generate(model, ids)[1])
        speeds = {name: round(rows / median(each), 1) for name, each in seconds.items()}
        alone = round(float(sum(same)) / len(same), 3)
        return {**self._row("batch", seconds, rows), "tok_s": speeds, "alone": alone}

    def fallback(self, case: str, rows: int) -> Row:
        """Decode speed of what the native step does not cover, or only partly."""
        ids, options = self._prompts(rows), FALLBACKS[case]
        models = [self._model, *self._unwrapped.values()]
        hooks = [m.model.layers[0].register_forward_hook(_nothing) for m in models if case == "hooks"]
        try:
            seconds = self._in_turn(lambda model: self._generate(model, ids, **options)[1])
        finally:
            for hook in hooks:
                hook.remove()
        return {**self._row("fallback", seconds, rows), "case": case}

    def prompt_of(self, length: int) -> Row:
        """Time to the first token."""
        ids = self._ids[None, :length]
        seconds = self._in_turn(lambda model: _prefill_s(model, ids))
        return {**self._row("prefill", seconds, 1), "prompt_tokens": ids.shape[1]}

    def _in_turn(self, measure: Callable[[Any], float]) -> dict[str, list[float]]:
        """Of each model, seconds in every round; the first round is not counted."""
        models = {"coreskip": self._model, **self._unwrapped}
        rounds = [{name: measure(model) for name, model in models.items()} for _ in range(self._rounds + 1)][1:]
        return {name: [each[name] for each in rounds] for name in models}

    def _row(self, kind: str, seconds: dict[str, list[float]], rows: int) -> Row:
        """ms: medians over rounds. times: how many times as fast as the unwrapped model in its fastest dtype."""
        own, *others = seconds.values()
        times = [min(unwrapped) / mine for mine, *unwrapped in zip(own, *others, strict=True)]
        ms = {name: round(1e3 * median(each), 3) for name, each in seconds.items()}
        return {
            "kind": kind,
            "rows": rows,
            **self._about,
            "rounds": self._rounds,
            "ms": ms,
            "times": round(median(times), 3),
        }

    def _prompts(self, rows: int) -> Tensor:
        """Stretches of the text, all of one length ``[rows, length]``."""
        wanted = rows * self._prompt
        return self._ids.repeat(-(-wanted // len(self._ids)))[:wanted].view(rows, self._prompt)

    def _generate(self, model: Any, ids: Tensor, **options: Any) -> tuple[Tensor, float]:
        """Greedy continuations, and the mean seconds between tokens after the first."""
        clock = _Clock()
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=self._tokens, do_sample=False, eos_token_id=None,
            stopping_criteria=StoppingCriteriaList([clock]), **options,
        )  # fmt: skip
        tokens = found if isinstance(found, Tensor) else found.sequences
        return tokens, (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)


class _Clock(StoppingCriteria):
    """Notes when each token has been chosen, of all rows together; ends nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Any:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def _nothing(*_: Any) -> None:
    """A hook that looks at nothing."""


def _prefill_s(model: Any, ids: Tensor) -> float:
    start = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    return time.perf_counter() - start


def _plan(model: Any, kind: str, weights: str | None) -> Plan:
    """Which neurons a fixed set keeps makes no difference here: every other one."""
    plan = Plan.dense(model, weights)
    policies: dict[str, Callable[[int], Any]] = {
        "static": lambda width: Static(torch.arange(0, width, round(1 / KEEP))),
        "core": lambda width: CoreNeurons(0.4, KEEP, "magnitude"),
        "sketch": lambda width: Sketch(bits=4, keep=KEEP),
    }
    if kind == "dense":
        return plan
    layers = tuple(LayerPlan(policies[kind](width)) for width in plan.model.intermediate_sizes)
    return replace(plan, layers=layers, recipe={"method": kind, "keep": KEEP})


if __name__ == "__main__":
    main()
