"""`analyze`: observe a model on text, propose plans, measure them, return the one asked for."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from ..predictors.anatomy import dissect
from ..predictors.calibration import TokenText, sample_text, tokenize
from ..predictors.core_neurons import SentenceCounter, cluster_sentences, static_set
from ..predictors.errors import CoreskipError
from ..predictors.importance import Score, check_score, check_share, kept_count
from ..predictors.observe import LayerStats, down_norms, observe
from ..predictors.plan import Clusters, CoreNeurons, Fingerprint, LayerPlan, NeuronPolicy, Plan, Similar, Static
from .quality import WINDOW, evaluate_all
from .wrap import is_wrapped

logger = logging.getLogger("coreskip")

METHODS = ("auto", "core", "similar", "static")
DEFAULT_KEEP = 0.6
DEFAULT_SCORE: Score = "griffin"
ALPHA = 0.4  # CoreInfer's, section 3
_SENTENCE = 256  # tokens; CoreInfer finds core neurons stable from 200-300 tokens on
_GRID = (0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # keeps that the budget search tries


@dataclass(frozen=True)
class Budget:
    """The quality a user will give up: one of ``ppl+1%``, ``kl<0.05``, ``agreement>0.95``."""

    text: str
    measure: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        number = r"(\d+(?:\.\d+)?)"
        for measure, pattern, scale in (
            ("ppl", rf"ppl\+{number}%", 0.01),
            ("kl", rf"kl<{number}", 1.0),
            ("agreement", rf"agreement>{number}", 1.0),
        ):
            match = re.fullmatch(pattern, text.replace(" ", ""))
            if match:
                return cls(text, measure, float(match[1]) * scale)
        raise CoreskipError(f"cannot read the budget {text!r}; write ppl+1%, kl<0.05 or agreement>0.95")

    def holds(self, quality: dict[str, Any]) -> bool:
        """Whether a measurement is within the budget; perplexity with one standard error to spare."""
        if self.measure == "ppl":
            return bool(quality["ppl_increase"] + (quality["ppl_increase_stderr"] or 0.0) <= self.limit)
        if self.measure == "kl":
            return bool(quality["kl"] <= self.limit)
        return bool(quality["top1_agreement"] >= self.limit)


def analyze(
    model: Any,
    tokenizer: Any,
    *,
    method: str = "auto",
    keep: float | None = None,
    budget: str | None = None,
    text: str | TokenText | None = None,
    score: Score | None = None,
    alpha: float = ALPHA,
    first_layer: int = 0,
    tokens: int = 16384,
    windows: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Plan:
    """Make a Plan for `model`.

    Args:
        model, tokenizer: from `load`, or any causal LM and its tokenizer; the model must not be wrapped.
        method: ``core`` (stability-guided core neurons, chosen from each prompt), ``similar`` (similarity-guided:
            the set of the nearest cluster of calibration sentences), ``static`` (one fixed set), or ``auto``: of all
            these, the one with the lowest KL divergence on held-out text.
        keep: share of each layer's MLP neurons to keep, in (0, 1]; 0.6 where neither it nor a budget is given.
        budget: ``ppl+1%``, ``kl<0.05`` or ``agreement>0.95``: the fewest neurons that hold it on text that the search
            did not see. A plan that skips nothing where no candidate does.
        text: calibration text; None samples some from the model itself. The last part is held out to measure on.
        score: how neurons are ranked, see `token_contributions`; by default ``griffin``, which measured best on the
            embedded model (README); CoreInfer's own is ``signed``.
        alpha: share of a token's neurons that count as its core (all scores but ``griffin``).
        first_layer: layers before it stay dense (CoreInfer leaves the first 4).
        tokens: at most this many are observed.
        windows: held-out windows of 512 tokens per measurement.
        seed: of sampling and clustering.

    Returns:
        a Plan whose ``quality`` was measured on held-out text.

    Raises:
        CoreskipError: before any work is done where an argument is wrong.
    """
    check_options(
        method=method, keep=keep, budget=budget, score=score, alpha=alpha, tokens=tokens, first_layer=first_layer
    )
    limit = Budget.parse(budget) if budget is not None else None
    if is_wrapped(model):
        raise CoreskipError("the model is wrapped already: call coreskip.unwrap(model) first")
    depth = len(dissect(model))
    if first_layer >= depth:
        raise CoreskipError(f"first_layer is {first_layer}; the model has layers 0..{depth - 1}")

    calibration = _calibration_text(model, tokenizer, text, tokens, seed, progress)
    # one part is observed, one chooses between candidates, one is measured on once, at the end
    observed, searched, checked = calibration.split(0.6, 0.2, 0.2)
    window = _even(min(WINDOW, len(searched.ids), len(checked.ids)))
    if window < 16:
        raise CoreskipError(
            f"the text ({calibration.source}) has {len(calibration.ids)} tokens; at least 100 are needed, "
            "some 10,000 are good"
        )
    workshop = Workshop(
        model,
        observed,
        score=score or DEFAULT_SCORE,
        alpha=alpha,
        first_layer=first_layer,
        max_tokens=tokens,
        seed=seed,
        progress=progress,
    )
    search = _Search(model, workshop, searched, checked, windows, window, progress)
    names = list(METHODS[1:]) if method == "auto" else [method]
    if limit is not None:
        plan = search.within(limit, names)
    else:
        plan = search.closest(names, DEFAULT_KEEP if keep is None else keep)
    return replace(plan, calibration=calibration.fingerprint())


def check_options(
    *,
    method: str,
    keep: float | None,
    budget: str | None,
    score: str | None,
    alpha: float,
    tokens: int,
    first_layer: int,
    seed: int = 0,
) -> None:
    """Raise `CoreskipError` for what `analyze` would refuse, before a model is loaded."""
    if method not in METHODS:
        raise CoreskipError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    if keep is not None and budget is not None:
        raise CoreskipError("give keep or budget, not both: a budget finds the keep itself")
    if keep is not None:
        check_share("keep", keep)
    check_share("alpha", alpha)
    if score is not None:
        check_score(score)
    if budget is not None:
        Budget.parse(budget)
    if tokens < 1 or first_layer < 0:
        raise CoreskipError(f"tokens is {tokens} and first_layer {first_layer}: give at least 1 and 0")


def _calibration_text(
    model: Any, tokenizer: Any, text: str | TokenText | None, tokens: int, seed: int, progress: bool
) -> TokenText:
    if isinstance(text, TokenText):
        return text
    if text is not None:
        return tokenize(tokenizer, text)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or WINDOW
    # half of what a given text would provide: sampling is some ten times slower than observing
    return sample_text(
        model, tokenizer, tokens=-(-tokens // 2), length=min(WINDOW, longest - 1), seed=seed, progress=progress
    )


class Workshop:
    """Makes plans for one model from one observation of it.

    Args:
        text: what is observed; at most `max_tokens` of it, in sentences of 256 tokens.
        score, alpha, first_layer, seed: as in `analyze`.
    """

    def __init__(
        self,
        model: Any,
        text: TokenText,
        *,
        score: Score,
        alpha: float = ALPHA,
        first_layer: int = 0,
        max_tokens: int = 16384,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        self._model, self._text, self._progress = model, text, progress
        self._score, self._alpha, self._first, self._seed = score, alpha, first_layer, seed
        self._max_tokens = max_tokens
        self._fingerprint = Fingerprint.of(model)
        self._stats: list[LayerStats] | None = None
        self._sentences: list[Tensor] | None = None

    def make(self, method: str, keep: float) -> Plan:
        """A plan of this method (``core``, ``static`` or ``similar``) that keeps this share of each layer's neurons.

        Deterministic; observes the text when a method first needs it.
        """
        return {"core": self._core, "static": self._static, "similar": self._similar}[method](keep)

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
        length = min(_SENTENCE, len(self._text.ids) + len(self._text.prefix))
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


class _Search:
    """Chooses between a workshop's plans by measuring them on text that it did not observe."""

    def __init__(
        self,
        model: Any,
        workshop: Workshop,
        searched: TokenText,
        checked: TokenText,
        windows: int,
        window: int,
        progress: bool,
    ) -> None:
        self._model, self._workshop = model, workshop
        self._searched, self._checked = searched, checked
        self._windows, self._window, self._progress = windows, window, progress

    def closest(self, methods: list[str], keep: float) -> Plan:
        """Of one plan per method, the one with the lowest KL divergence from the dense model."""
        plans = [self._workshop.make(method, keep) for method in methods]
        if len(plans) == 1:
            return self._check(plans[0])
        qualities = self._measure(plans, self._searched)
        for method, quality in zip(methods, qualities, strict=True):
            _report(method, keep, quality)
        best = min(range(len(plans)), key=lambda i: float(qualities[i]["kl"]))
        return self._check(plans[best])

    def within(self, budget: Budget, methods: list[str]) -> Plan:
        """The plan that keeps the fewest neurons and holds `budget` on the text searched and on the text checked."""
        found = [plan for method in methods for plan in self._holding(method, budget)]
        for plan in sorted(found, key=lambda plan: plan.keep):
            checked = self._check(plan)
            if budget.holds(dict(checked.quality or {})):
                return replace(checked, recipe={**checked.recipe, "budget": budget.text})
        logger.warning("no candidate holds the budget %s: the plan skips nothing", budget.text)
        dense = replace(Plan.dense(self._model), recipe={"method": "dense", "budget": budget.text})
        return self._check(dense)

    def _holding(self, method: str, budget: Budget) -> Iterator[Plan]:
        """Plans of one method that hold the budget on the searched text, by bisection over the keep: quality falls
        with it."""
        low, high = 0, len(_GRID)  # the first `low` keeps hold, from `high` on they do not
        while low < high:
            middle = (low + high) // 2
            plan = self._workshop.make(method, _GRID[middle])
            quality = self._measure([plan], self._searched)[0]
            _report(method, _GRID[middle], quality)
            if budget.holds(quality):
                yield plan
                low = middle + 1
            else:
                high = middle

    def _measure(self, plans: list[Plan], text: TokenText) -> list[dict[str, Any]]:
        return evaluate_all(
            self._model, plans, text, windows=self._windows, window=self._window, progress=self._progress
        )

    def _check(self, plan: Plan) -> Plan:
        return replace(plan, quality=self._measure([plan], self._checked)[0])


def _report(name: str, keep: float, quality: dict[str, Any]) -> None:
    logger.info("%s at keep %g: perplexity %+.2f%%, KL %.4f", name, keep, 100 * quality["ppl_increase"], quality["kl"])


def _even(number: int) -> int:
    return number // 2 * 2
