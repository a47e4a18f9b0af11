"""`analyze`: observe a model on text and make a plan. The search for a budget is in search.py."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ..predictors.anatomy import dissect
from ..predictors.calibration import TokenText, most_positions, sample_text, text_of
from ..predictors.checks import Allocation
from ..predictors.core_neurons import SentenceCounter, cluster_sentences, static_set
from ..predictors.errors import CoreskipError
from ..predictors.importance import Score, kept_count
from ..predictors.layers import Leave, block_influence, half_losses, leaving_out, left_out
from ..predictors.learned import RANK
from ..predictors.observe import LayerStats, down_norms, observe
from ..predictors.plan import Clusters, CoreNeurons, Fingerprint, LayerPlan, NeuronPolicy, Plan, Similar, Static
from ..predictors.token_choice import TokenCalibration
from .cost import runs_natively
from .decode import refusal
from .emulation import Emulation
from .options import Budget, check_options, given
from .quality import WINDOW, evaluate_all
from .wrap import make_way

logger = logging.getLogger("coreskip")

DEFAULT_KEEP = 0.6
DEFAULT_KEEP_OF_LAYERS = 0.9
DEFAULT_SCORE: Score = "griffin"
ALPHA = 0.4  # CoreInfer's, section 3
_PER_WINDOW = 2048  # tokens observed, to one window that tells what layers are worth
_SENTENCE = 256  # tokens; CoreInfer finds core neurons stable from 200-300 tokens on


def analyze(
    model: Any,
    tokenizer: Any,
    *,
    method: str = "auto",
    keep: float | None = None,
    budget: str | None = None,
    text: str | os.PathLike[str] | TokenText | None = None,
    score: Score | None = None,
    alpha: float | None = None,
    first_layer: int | None = None,
    rule: str | None = None,
    all_linears: bool | None = None,
    allocation: Allocation | None = None,
    bits: int | None = None,
    refine: bool | None = None,
    rank: int | None = None,
    tokens: int = 16384,
    windows: int = 12,
    seed: int = 0,
    fast: bool = False,
    resume: str | Path | None = None,
    progress: bool = True,
) -> Plan:
    """Make a Plan for `model`.

    An option that belongs to other methods is refused; None stands for its default.

    Args:
        model, tokenizer: from `load`, or any causal LM and its tokenizer; the model must not be wrapped.
        method: by prompt: ``core`` (stability-guided core neurons), ``similar`` (similarity-guided: the set of the
            nearest cluster of calibration sentences); by token: ``sketch`` (the high nibbles of the weights choose),
            ``threshold`` (TEAL, WINA, CATS), ``learned`` (low-rank predictors), ``topk`` (the exact oracle, which
            saves little time); ``static`` (one fixed set); ``layers`` (whole layers are left out; with a budget also
            attentions or MLPs alone); or ``auto``: with a budget the search looks at all that save time, else it is
            ``sketch``.
        keep: share of the MLP neurons to keep, of ``layers`` that of the layers, in (0, 1]; where neither it nor a
            budget is given 0.6, of ``layers`` 0.9.
        budget: ``ppl+1%``, ``kl<0.05`` or ``agreement>0.95`` (or 95%): the fastest plan found that holds it on text
            that the search did not see, with a margin; see `search`. A plan that skips nothing where none does.
        text: calibration text, or the `Path` of a UTF-8 file; None samples some from the model itself. The last part
            is held out to measure on.
        score: how ``core``, ``similar`` and ``static`` rank neurons, see `token_contributions`; by default
            ``griffin``, which measured best on the embedded model (README); CoreInfer's own is ``signed``.
        alpha: share of a token's neurons that count as its core, 0.4 by default (all scores but ``griffin``).
        first_layer: layers before it stay dense, by default none (CoreInfer leaves the first 4).
        rule, all_linears: of ``threshold``: ``teal`` (default), ``wina`` or ``cats``; whether the attention's linears
            leave out small inputs, too.
        allocation: of ``sketch`` and ``topk``: how the share is spread over the layers, see `TokenCalibration`; by
            default ``greedy``.
        bits: of ``sketch``: 4 (default), or 1 for the signs (ReLU models).
        refine: of ``sketch``: whether a second threshold, on exact scores, drops some of what the sketch chose: more is
            left out at the same loss of quality, in more time.
        rank: of ``learned``, 64 by default.
        tokens: at most this many are observed.
        windows: held-out windows of 512 tokens per measurement.
        seed: of sampling, clustering and training.
        fast: with a budget: fewer windows, tokens and candidates; about a third of the time.
        resume: with a budget: a file that keeps what was measured; a search that was stopped goes on from there.

    Returns:
        a Plan whose ``quality`` was measured on held-out text; with a budget, its ``frontier`` holds what was found.

    Raises:
        CoreskipError: before any work is done where an argument is wrong, or belongs to another method.
    """
    from .search import Journal, search

    options: dict[str, Any] = {
        "score": score,
        "alpha": alpha,
        "first_layer": first_layer,
        "rule": rule,
        "all_linears": all_linears,
        "allocation": allocation,
        "bits": bits,
        "refine": refine,
        "rank": rank,
        "tokens": tokens,
        "windows": windows,
        "seed": seed,
        "fast": fast,
    }
    check_options(method=method, keep=keep, budget=budget, resume=resume, **options)
    journal = Journal(resume)  # whether it can be read and written shows before any work
    study = Study(model, tokenizer, text=text, progress=progress, **given(options))
    if budget is not None:
        return search(study, Budget.parse(budget), method, journal=journal)
    default = DEFAULT_KEEP_OF_LAYERS if method == "layers" else DEFAULT_KEEP
    return study.measured(study.workshop.make("sketch" if method == "auto" else method, keep or default))


class Study:
    """A model, the workshop that observes one part of a text, and two more parts to measure plans on: one chooses
    between candidates, one is measured on at the end.

    Args:
        the arguments: as in `analyze`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        text: str | os.PathLike[str] | TokenText | None = None,
        tokens: int = 16384,
        windows: int = 12,
        first_layer: int = 0,
        score: Score | None = None,
        seed: int = 0,
        fast: bool = False,
        progress: bool = True,
        **options: Any,
    ) -> None:
        make_way(model)
        self._anatomy = dissect(model)
        depth = len(self._anatomy)
        if first_layer >= depth:
            raise CoreskipError(f"first_layer is {first_layer}; the model has layers 0..{depth - 1}")
        tokens, windows = (-(-tokens // 2), -(-windows // 2)) if fast else (tokens, windows)
        self.model, self.windows, self.fast, self.progress = model, windows, fast, progress
        self.calibration = _calibration_text(model, tokenizer, text, tokens, seed, progress)
        observed, self.searched, self.checked = self.calibration.split(0.6, 0.2, 0.2)
        self.window = min(WINDOW, _longest(model), len(self.searched.ids), len(self.checked.ids)) // 2 * 2
        if self.window < 16:
            raise CoreskipError(
                f"the text ({self.calibration.source}) has {len(self.calibration.ids)} tokens; at least 100 are "
                "needed, some 10,000 are good"
            )
        self.workshop = Workshop(
            model,
            observed,
            score=score or DEFAULT_SCORE,
            first_layer=first_layer,
            max_tokens=tokens,
            seed=seed,
            progress=progress,
            **options,
        )
        self._about = {**options, "score": score, "first_layer": first_layer, "tokens": tokens, "seed": seed}
        self._covered = refusal(model, self._anatomy) is None
        self._emulations: dict[tuple[str, int], Emulation] = {}

    def identity(self) -> str:
        """What a plan's quality depends on besides the plan: the model, the text, the options."""
        probes = hashlib.sha256(Fingerprint.of(self.model).probes.numpy().tobytes()).hexdigest()
        how = "decoded" if self._covered else "estimated"  # what was measured otherwise is not taken up again
        about = [probes, self.calibration.fingerprint(), self._about, self.windows, self.window, how]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def measure(self, plan: Plan, part: str = "checked", windows: int | None = None) -> dict[str, Any]:
        """`evaluate_all`'s figures on the part ``searched`` or ``checked``; on so many windows, fewer or more than the
        study's own. Of what is searched they are estimated where steps run on the modules."""
        text = self.checked if part == "checked" else self.searched
        options: dict[str, Any] = {"window": self.window, "progress": self.progress}
        if any(isinstance(layer.neurons, (CoreNeurons, Similar)) for layer in plan.layers):
            return evaluate_all(self.model, [plan], text, windows=windows or self.windows, **options)[0]
        prefilled = max(windows or 0, self.windows)
        emulation = self._emulations.get((part, prefilled))
        if emulation is None:
            weights = next((each.weights for each in self._emulations.values()), None)
            emulation = Emulation(self.model, text, windows=prefilled, weights=weights, **options)
            self._emulations[part, prefilled] = emulation
        # on the modules a token takes several times as long as in one pass, natively half as long
        real = part == "checked" or (runs_natively(self._anatomy, plan) and self._covered)
        return emulation.score(plan, windows, token_by_token=real)

    def measured(self, plan: Plan) -> Plan:
        """The plan with its quality on the part held out from everything."""
        return replace(plan, quality=self.measure(plan), calibration=self.calibration.fingerprint())


def _longest(model: Any) -> int:
    return most_positions(model, WINDOW)


def _calibration_text(
    model: Any, tokenizer: Any, text: str | os.PathLike[str] | TokenText | None, tokens: int, seed: int, progress: bool
) -> TokenText:
    if text is not None:
        return text_of(tokenizer, text)
    # half of what a given text would provide: sampling is some ten times slower than observing
    return sample_text(
        model,
        tokenizer,
        tokens=-(-tokens // 2),
        length=WINDOW,
        seed=seed,
        progress=progress,
    )


class Workshop:
    """Makes plans for one model from one observation of it.

    Args:
        text: what is observed; at most `max_tokens` of it, in sentences of 256 tokens.
        the others: as in `analyze`.
    """

    def __init__(
        self,
        model: Any,
        text: TokenText,
        *,
        score: Score = DEFAULT_SCORE,
        alpha: float = ALPHA,
        first_layer: int = 0,
        rule: str = "teal",
        all_linears: bool = False,
        allocation: Allocation = "greedy",
        bits: int = 4,
        refine: bool = False,
        rank: int = RANK,
        max_tokens: int = 16384,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        self._model, self._text, self._progress = model, text, progress
        self._rule, self._all_linears, self._allocation = rule, all_linears, allocation
        self._bits, self._refine, self._rank = bits, refine, rank
        self._score, self._alpha, self._first, self._seed = score, alpha, first_layer, seed
        self._max_tokens = max_tokens
        self._fingerprint = Fingerprint.of(model)
        self._stats: list[LayerStats] | None = None
        self._sentences: list[Tensor] | None = None
        self._made: dict[tuple[Any, ...], Plan] = {}

    def make(self, method: str, keep: float, **options: Any) -> Plan:
        """A plan of this method that keeps this share of the neurons, or layers. `options` replace those given to the
        workshop: ``rule``, ``all_linears``, ``allocation``, ``bits``, ``refine``, ``rank``; of ``layers``, ``leave``
        says what is left out.

        Deterministic; observes the text when a method first needs it. A plan is made once: searches ask for it again
        on more windows, in other formats and for other budgets.
        """
        key = (method, keep, *sorted(options.items()))
        if key not in self._made:
            self._made[key] = getattr(self, f"_{method}")(keep, **options)
        return self._made[key]

    def _layers(self, keep: float, *, leave: Leave = "layers") -> Plan:
        depth = len(self._fingerprint.intermediate_sizes)
        worth = self._worth(leave)
        order = sorted(range(self._first, depth), key=worth.__getitem__)
        policies = leaving_out(leave, order[: left_out(keep, depth)], depth)
        recipe = {"method": "layers", "leave": leave, "keep": keep, "first_layer": self._first, "seed": self._seed}
        layers = tuple(LayerPlan(layer=policy) for policy in policies)
        return Plan(layers, self._fingerprint, recipe, self._text.fingerprint())

    def _worth(self, leave: Leave) -> list[float]:
        """Of each layer, or half of it: by what was measured to choose best, see `half_losses`."""
        if leave == "layers":
            return self._influence
        column = 0 if leave == "attentions" else 1
        return cast("list[float]", self._half_losses[:, column].tolist())

    @cached_property
    def _influence(self) -> list[float]:
        return [each.layer for each in block_influence(self._model, self._few_windows.split(1))]

    @cached_property
    def _half_losses(self) -> Tensor:
        return half_losses(self._model, self._few_windows, seed=self._seed, progress=self._progress)

    @cached_property
    def _few_windows(self) -> Tensor:
        length = min(_SENTENCE, _longest(self._model), len(self._text.ids) + len(self._text.prefix))
        return self._text.windows(length, max(1, self._max_tokens // _PER_WINDOW))

    def _core(self, keep: float) -> Plan:
        policy = CoreNeurons(self._alpha, keep, self._score)
        return self._plan("core", keep, [policy] * len(self._fingerprint.intermediate_sizes))

    def _static(self, keep: float) -> Plan:
        stats = self._observe(sentences=False)
        return self._plan("static", keep, [Static(static_set(s, self._score, keep).cpu()) for s in stats])

    def _similar(self, keep: float) -> Plan:
        self._observe(sentences=True)
        found = cluster_sentences(cast("list[Tensor]", self._sentences), keep, self._seed)
        clusters = Clusters(found.anchor, self._alpha, keep, self._score, found.centroids)
        return self._plan("similar", keep, [Similar(sets) for sets in found.sets], clusters)

    @cached_property
    def tokens(self) -> TokenCalibration:
        length = min(WINDOW, _longest(self._model), len(self._text.ids) + len(self._text.prefix))
        rows = self._text.windows(length, max(1, self._max_tokens // length))
        return TokenCalibration(self._model, rows, seed=self._seed, progress=self._progress)

    def _sketch(
        self, keep: float, *, allocation: Allocation | None = None, bits: int | None = None, refine: bool | None = None
    ) -> Plan:
        allocation, bits = allocation or self._allocation, bits or self._bits
        refine = self._refine if refine is None else refine
        if bits == 1:
            recall = round(self.tokens.sign_recall(keep), 4)
            return self._by_token("sketch", keep, self.tokens.signs(keep), bits=1, recall=recall)
        policies = self.tokens.sketch(keep, allocation, refine=refine)
        return self._by_token("sketch", keep, policies, allocation=allocation, **({"refine": True} if refine else {}))

    def _topk(self, keep: float, *, allocation: Allocation | None = None) -> Plan:
        allocation = allocation or self._allocation
        return self._by_token("topk", keep, self.tokens.topk(keep, allocation), allocation=allocation)

    def _learned(self, keep: float, *, rank: int | None = None) -> Plan:
        policies = self.tokens.learned(keep, rank or self._rank)
        found = sum(policy.recall or 0.0 for policy in policies) / len(policies)
        return self._by_token("learned", keep, policies, rank=rank or self._rank, recall=round(found, 4))

    def _threshold(self, keep: float, *, rule: str | None = None, all_linears: bool | None = None) -> Plan:
        rule, everywhere = rule or self._rule, self._all_linears if all_linears is None else all_linears
        policies = self.tokens.threshold(keep, cast(Any, rule), everywhere=everywhere)
        return self._by_token("threshold", keep, policies, rule=rule, all_linears=everywhere)

    def _by_token(self, method: str, keep: float, policies: Sequence[NeuronPolicy], **recipe: Any) -> Plan:
        plan = self._plan(method, keep, policies)
        recipe = {"method": method, "keep": keep, **recipe, "first_layer": self._first, "seed": self._seed}
        return replace(plan, recipe=recipe)

    def _plan(
        self, method: str, keep: float, policies: Sequence[NeuronPolicy], clusters: Clusters | None = None
    ) -> Plan:
        widths = self._fingerprint.intermediate_sizes
        layers = [
            LayerPlan(policy) if index >= self._first and kept_count(width, keep) < width else LayerPlan()
            for index, (policy, width) in enumerate(zip(policies, widths, strict=True))
        ]
        recipe: dict[str, Any] = {"method": method, "keep": keep, "score": self._score}
        if self._score != "griffin":
            recipe["alpha"] = self._alpha
        recipe |= {"first_layer": self._first, "seed": self._seed}
        return Plan(tuple(layers), self._fingerprint, recipe, self._text.fingerprint(), None, clusters)

    def _observe(self, sentences: bool) -> list[LayerStats]:
        """One pass over the text, with the sentences' own counts where a method needs them."""
        if self._stats is not None and (self._sentences is not None or not sentences):
            return self._stats
        length = min(_SENTENCE, _longest(self._model), len(self._text.ids) + len(self._text.prefix))
        rows = self._text.windows(length, max(1, self._max_tokens // length))
        counter = SentenceCounter(down_norms(dissect(self._model)), self._score, self._alpha) if sentences else None
        self._stats = observe(
            self._model,
            rows.split(1),
            alpha=self._alpha,
            scores=[self._score],
            total=len(rows),
            progress=self._progress,
            tap=counter,
        )
        if counter is not None:
            self._sentences = counter.counts()
        return self._stats
