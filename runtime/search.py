"""The budget search: the fastest plan that keeps within the quality a user will give up.

Weights in fewer bits come first: where the native step runs the model, they cost no neurons, and what they leave to win
is often nothing. Where plain 4 bits lose too much, weights are rounded with the text, in mixtures of widths
(rounding_search.py). Then every *family* (a method with its options and a weight format) is a line of plans by the
share of neurons, or of layers, that they keep. The most promising family is bisected; each other one has one chance, at
the keep where it would be faster than the best plan so far, and is bisected only if it holds the budget there. What
cannot be faster is not even calibrated. What is fast is predicted from the bytes that a decode step reads (`cost`) and
the measured bandwidth of the memory. The winner must hold the budget, with a margin, on text that the search did not
see; else it gives way.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..predictors.anatomy import canonical_activation, dissect, is_packed
from ..predictors.checks import AS_PACKED, check_share, path_of
from ..predictors.errors import CoreskipError
from ..predictors.files import append_line, check_file, read_text
from ..predictors.four_bits import Form
from ..predictors.plan import Plan
from .attention import can_redirect
from .bundles import known_in_groups, packed_in_four_bits
from .calibrate import Study
from .cost import Cost, cost, read_bandwidth
from .families import DENSE, FAMILIES, FAST, PROXIES, ROUNDED, Family, outline
from .lower_cpu import refusal
from .memory import METHODS as CAPPED_METHODS
from .memory import cost_under
from .options import Budget, check_options, given
from .rounding_search import Roundings
from .step_timing import StepClock, trial

logger = logging.getLogger("coreskip")

_CHECKS = 4  # plans that are measured on the held-out text at most
_SCREEN = 3  # windows on which a plan that is far off shows
_MORE = 3  # times the study's windows, where only the margin of error stands between a plan and the budget
_FAR_OFF = 1.5  # times the budget
_IN_ANY_WEIGHTS = 2  # times the budget, of which the weights' format, where it holds, has used one at most
# Neurons, or layers, that are kept at least, where weights rounded with the text hold the budget: to read fewer bytes
# than those, other ways keep less than a third in 8 bits. Of the fine-tuned model that cost 300 to 900 % of perplexity,
# and eight of a search's twenty minutes.
_KEPT_BESIDE_ROUNDING = 0.5
_CLOSE = 1.25  # times the least bytes: what reads no more is timed
_FASTER = 0.98  # of the time of all neurons that a form must take where it leaves out most
_PRUNE = 4  # times the budget: no allocation of the same method mends that
_FIGURES = ("ppl_increase", "ppl_increase_stderr", "kl", "top1_agreement", "neuron_sparsity", "tokens")


def search(
    study: Study,
    budget: Budget,
    method: str,
    *,
    journal: Journal | str | Path | None = None,
    rounds: bool = True,
) -> Plan:
    """The fastest plan of `method`'s families, or under ``auto`` of all, that holds `budget`; a fast study looks at the
    most promising ones alone.

    Args:
        journal: a file of what was measured, made if it is not there; a search of the same study goes on from it.
        rounds: whether the plan may be one that the model has to be packed for first.
    """
    state = _Search(study, budget, journal if isinstance(journal, Journal) else Journal(journal))
    families = [f for f in state.families() if method in ("auto", f.method)]
    families = families or [f for f in FAMILIES if f.method == method] or [Family(method, {})]
    if method == "auto":
        for weights in state.formats(DENSE):
            state.bisect(replace(DENSE, weights=weights))
        if rounds and state.may_round:
            state.bisect(ROUNDED)
    for family in families:
        for weights in state.formats(family):
            state.bisect(replace(family, weights=weights))
    return state.winner()


def pareto(
    model: Any, tokenizer: Any, *, keeps: Sequence[float] = (0.8, 0.65, 0.5, 0.35), **options: Any
) -> list[Plan]:
    """The plans that nothing found here beats in both predicted time and quality, fastest first.

    Args:
        keeps: shares of neurons, or layers, at which every family is measured, with the weights in their fewest bits.
        options: of `analyze`, without method, keep and budget.

    Returns:
        plans whose ``quality`` was measured on one held-out part of the text. The first entry of each ``frontier`` is
        the plan's own.
    """
    refused = [name for name in ("method", "keep", "budget") if name in options]
    if refused:
        raise CoreskipError(f"pareto looks at all methods, at several shares: leave out {refused[0]}")
    if isinstance(keeps, (str, bytes)) or not isinstance(keeps, Sequence) or not keeps:
        raise CoreskipError(f"keeps is {keeps!r}: give a list of shares, such as [0.8, 0.5]")
    for keep in keeps:
        check_share("keep", keep)
    if options.get("layers") is not None:
        raise CoreskipError("pareto leaves layers out itself: leave out layers")
    own = {name: options.pop(name) for name in ("text", "progress") if name in options}
    check_options(budget="kl<1", **options)  # every family is measured, as a search for a budget does
    journal = Journal(options.pop("resume", None))
    study = Study(model, tokenizer, **own, **given(options))
    state = _Search(study, None, journal)
    for weights in state.formats(DENSE):
        state.measure(replace(DENSE, weights=weights), 1.0)
    for family in state.families():
        for keep in keeps:
            state.measure(replace(family, weights=state.formats(family)[0]), keep)
    return state.front()


class Journal:
    """Measurements by what was measured, on disk where there is a path: one JSON object a line.

    Raises:
        CoreskipError: the path holds something else, or cannot be written to.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._path = None if path is None else path_of(path, "the file of measurements")
        self._known: dict[str, dict[str, Any]] = {}
        if self._path is None:
            return
        check_file(self._path, regular=True)
        if not self._path.exists():
            return
        text = read_text(self._path, "the search so far in")
        # an interruption may have cut the last line: the next one is written over it
        for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = entry["quality"]
            except (ValueError, KeyError, TypeError):
                raise CoreskipError(f"line {number} of {self._path} is no measurement: name another file") from None

    def get(self, key: str) -> dict[str, Any] | None:
        return self._known.get(key)

    def add(self, key: str, quality: dict[str, Any]) -> None:
        self._known[key] = quality
        if self._path is None:
            return
        try:
            append_line(self._path, json.dumps({"key": key, "quality": quality}))
        except OSError as error:  # what was found is worth more than that it could be found again
            logger.warning("cannot write to %s (%s): the search goes on without", self._path, error.strerror or error)
            self._path = None


@dataclass(frozen=True, eq=False)
class _Candidate:
    family: Family
    keep: float
    plan: Plan
    quality: dict[str, Any]
    cost: Cost

    @property
    def name(self) -> str:
        return self.family.label + (f" to {self.keep:g} of int8" if self.family.method == "rounded" else "")

    def row(self, bandwidth: float) -> dict[str, Any]:
        """As the plan's frontier keeps it."""
        return {
            "name": self.name,
            "keep": self.plan.keep if self.family.method == "rounded" else self.keep,
            "megabytes": round(self.cost.moved / 1e6, 2),
            "milliseconds": round(1e3 * self.cost.weighed / bandwidth, 3),
            **{name: self.quality[name] for name in _FIGURES},
            **({"estimated": True} if self.quality.get("estimated") else {}),
        }


class _Search:
    """The state of one search."""

    def __init__(self, study: Study, budget: Budget | None, journal: Journal) -> None:
        self._study, self._budget, self._journal = study, budget, journal
        self._anatomy = dissect(study.model)
        self._dense = Plan.dense(study.model, study.weights)
        self._all = self._cost(self._dense)
        self._found: list[_Candidate] = []
        self._measured: _Candidate | None = None  # the last one
        self._held: list[_Candidate] = []
        self._pruned: set[tuple[Any, ...]] = set()
        self._failed_keeps: dict[str, float] = {}  # by label without weights: the keep that fails in all of them
        self._screened: set[tuple[Any, ...]] = set()
        self._failed_formats: set[str | None] = set()  # formats that break the budget without a neuron left out
        self._about = study.identity()[:16]
        self._refusal = refusal(study.model, self._anatomy)
        self._packed = any(map(is_packed, study.model.modules()))
        self._many = _MORE * study.windows
        self._paying: dict[Form, bool] = {}

    def _cost(self, plan: Plan) -> Cost:
        cap = self._study.memory
        if cap is None:
            return cost(self._study.model, plan, self._anatomy)
        return cost_under(self._study.model, plan, self._anatomy, cap)

    def families(self) -> list[Family]:
        """Those to look at here."""
        layers = can_redirect(self._anatomy)  # else attentions cannot be left out
        every = FAST if self._study.fast else FAMILIES
        neurons = all(mlp is not None for mlp in self._anatomy.feed_forwards)  # else some layers have experts alone
        every = tuple(f for f in every if f.method == "layers" or (self._has_experts if f.of_experts else neurons))
        if self._study.memory is not None:
            every = tuple(f for f in every if f.method in CAPPED_METHODS)
        return [f for f in every if (layers or f.method != "layers") and self.formats(f)]

    def formats(self, family: Family) -> tuple[str | None, ...]:
        """The weight formats in which the family can run here."""
        if self._study.weights is not None or self._packed:  # a packed model's own format
            found: tuple[str | None, ...] = (self._study.weights,)
        else:
            found = family.formats if self._refusal is None else (None,)
        return tuple(w for w in found if replace(family, weights=w).form is None or self._can_choose(family, w))

    @property
    def _has_experts(self) -> bool:
        return any(experts is not None for experts in self._anatomy.experts)

    def _can_choose(self, family: Family, weights: str | None) -> bool:
        """Whether neurons can be chosen in 4-bit groups by this family."""
        mlps = self._anatomy.mlps
        if family.form is Form.GATES and not all(mlp.gated for mlp in mlps):
            return False
        if weights != "int4" and not (weights == AS_PACKED and all(map(packed_in_four_bits, mlps))):
            return False
        return all(known_in_groups(mlp, canonical_activation(mlp.act)) for mlp in mlps)

    @cached_property
    def _roundings(self) -> Roundings:
        return Roundings(self._study, self._journal, self._about)

    @property
    def may_round(self) -> bool:
        """Whether rounding with the text is worth its minutes, and a plan that the model has to be packed for: where
        plain 4 bits break the budget."""
        can = self._refusal is None and self._study.weights is None and not self._packed
        return can and "int4" in self._failed_formats

    @property
    def _best(self) -> _Candidate | None:
        return min(self._held, key=lambda found: found.cost.weighed, default=None)

    @property
    def _weight_to_beat(self) -> float:
        return self._best.cost.weighed if self._best else self._all.weighed

    # ---- candidates

    def measure(self, family: Family, keep: float, windows: int | None = None) -> _Candidate:
        plan = self._make(family, keep)
        quality = self._quality(f"{family.label} at {keep:g}", plan, "searched", windows)
        found = _Candidate(family, keep, plan, quality, self._cost(plan))
        logger.info(
            "%s, keep %g: %.1f MB a token (dense %.1f), perplexity %+.2f %%, KL %.4f%s",
            *(family.label, keep, found.cost.moved / 1e6, self._all.moved / 1e6),
            *(100 * quality["ppl_increase"], quality["kl"], "" if windows is None else f", {windows} windows"),
        )
        # the figures of more windows take the place of a few's
        self._found = [f for f in self._found if (f.family, f.keep) != (family, keep)]
        self._found.append(found)
        self._measured = found
        return found

    def _make(self, family: Family, keep: float) -> Plan:
        if family.method == "dense":
            return replace(self._dense, weights=family.weights)
        if family.method == "rounded":
            return self._roundings.plan(keep)
        made = self._study.calibrator.make(family.method, keep, weights=family.weights, **family.options)
        return replace(made, weights=family.weights)

    def _quality(self, name: str, plan: Plan, part: str, windows: int | None = None) -> dict[str, Any]:
        key = f"{self._about} {part} {name}" + ("" if windows is None else f" in {windows} windows")
        known = self._journal.get(key)
        if known is None:
            measure = self._study.measure if plan.rounding is None else self._roundings.measure
            known = measure(plan, part, windows)
            self._journal.add(key, known)
        return known

    def _within_budget(self, family: Family, keep: float) -> bool:
        """Whether the budget is held on the searched part; what is far off shows on a few windows already."""
        assert self._budget is not None
        if self._study.windows >= 2 * _SCREEN and family.method != "dense":
            screened = self.measure(family, keep, _SCREEN)
            if self._budget.exceeds(screened.quality, _FAR_OFF):
                return False
        found = self.measure(family, keep)
        if family.method in ("dense", "rounded") and self._budget.undecided(found.quality):
            found = self.measure(family, keep, self._many)
        held = self._budget.holds(found.quality)
        if held:
            self._held.append(found)
        return held

    def bisect(self, family: Family) -> None:
        """Find the fewest neurons with which this family holds the budget, if that can win."""
        shares = self._roundings.shares if family.method == "rounded" else family.keeps(len(self._anatomy))
        least = _KEPT_BESIDE_ROUNDING if self._best is not None and self._best.family == ROUNDED else 0.0
        if family.of_experts:
            least = max(least, 1 / max(experts.top_k for experts in filter(None, self._anatomy.experts)))
        keeps = [keep for keep in shares if keep >= least and self._can_win(family, keep)]
        if not keeps or family.weights in self._failed_formats:
            return
        if family.method == "dense":
            if not self._within_budget(family, 1.0):
                self._failed_formats.add(family.weights)
            return
        if family.form is not None and not self._pays(family.form, family.weights):
            return
        tried = self._best is not None
        if tried and (self._is_pruned(family, keeps[0]) or not self._within_budget(family, keeps[0])):
            self._prune(family)
            return
        low, high = (0 if tried else -1), len(keeps)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._within_budget(family, keeps[middle]) else (low, middle)

    def _can_win(self, family: Family, keep: float) -> bool:
        """Whether the family would be faster than the best so far, at this keep."""
        if family.method == "rounded":
            return self._roundings.nbytes(keep) < 0.99 * self._weight_to_beat
        if family.method == "dense":
            plan = self._make(family, keep)
        else:
            plan = replace(self._dense, layers=outline(family, keep, self._anatomy), weights=family.weights)
        return self._cost(plan).weighed < 0.99 * self._weight_to_beat

    @cached_property
    def _clock(self) -> StepClock:
        return StepClock(self._study.model, self._study.searched.windows(min(64, self._study.window), 1))

    def _pays(self, form: Form, weights: str | None) -> bool:
        """Whether leaving neurons out of 4-bit weights by this form can be faster here at all, which bytes do not tell:
        where memory is fast, to look at neurons takes longer than to read them."""
        if form not in self._paying:
            key = f"{self._about} seconds {form.value}"
            known = self._journal.get(key)
            if known is None:
                dense = replace(self._dense, weights=weights)
                tried = trial(dense, self._anatomy.mlps, self._study.calibrator.tokens.samples.hidden, form)
                seconds = self._clock.seconds([dense, tried])
                known = {"dense": seconds[0], form.value: seconds[1]}
                self._journal.add(key, known)
            self._paying[form] = known[form.value] < _FASTER * known["dense"]
            if not self._paying[form]:
                logger.info(
                    "leaving neurons out by %s is not faster here: %.2f ms a token, with all of them %.2f",
                    *(form.value, 1e3 * known[form.value], 1e3 * known["dense"]),
                )
        return self._paying[form]

    def _is_pruned(self, family: Family, keep: float) -> bool:
        """Whether the family's group is far off the budget where it would be fast enough to win."""
        proxy = PROXIES.get(family.method)
        if proxy is not None and (family.group, family.weights) not in self._screened:
            self._screened.add((family.group, family.weights))
            self.measure(replace(proxy, weights=family.weights), keep, _SCREEN)
            self._prune(family)
        return family.group in self._pruned or keep <= self._failed_keeps.get(replace(family, weights=None).label, 0.0)

    def _prune(self, family: Family) -> None:
        """Leave out the family's group where the last measurement was far off, or that measurement's family in any
        weights where it was off by more than a weight format costs."""
        assert self._budget is not None
        assert self._measured is not None
        if self._budget.exceeds(self._measured.quality, _PRUNE):
            self._pruned.add(family.group)
        elif self._budget.exceeds(self._measured.quality, _IN_ANY_WEIGHTS):
            self._failed_keeps[replace(self._measured.family, weights=None).label] = self._measured.keep

    # ---- the end

    def winner(self) -> Plan:
        """The best candidate that also holds the budget on the held-out text."""
        assert self._budget is not None
        budget, candidates = self._budget, list(self._held)
        for _ in range(_CHECKS):
            if not candidates:
                break
            best = self._fastest(candidates)
            candidates.remove(best)
            name = f"{best.family.label} at {best.keep:g}"
            quality = self._quality(name, best.plan, "checked")
            if budget.undecided(quality):
                quality = self._quality(name, best.plan, "checked", self._many)
            if budget.holds(quality):
                return self._finished(best.plan, quality, {"budget": budget.text})
            logger.info("%s does not hold on the held-out text: the next best is checked", name)
            candidates += self._keeping_more(best, quality)
        logger.warning("no plan found within %s is faster than dense: this plan skips nothing", budget.text)
        quality = self._quality("dense", self._dense, "checked")
        return self._finished(self._dense, quality, {"method": "dense", "budget": budget.text})

    def _fastest(self, candidates: Sequence[_Candidate]) -> _Candidate:
        """The one that reads least; of those that read little more, the one that was faster, timed here."""
        least = min(found.cost.weighed for found in candidates)
        close = [found for found in candidates if found.cost.weighed <= _CLOSE * least]
        rounded = any(found.plan.rounding is not None for found in close)  # whose numbers have to be packed first
        if len(close) == 1 or rounded or self._refusal is not None:
            return min(candidates, key=lambda found: found.cost.weighed)
        names = [f"{found.family.label} at {found.keep:g}" for found in close]
        key = f"{self._about} seconds {', '.join(names)}"
        known = self._journal.get(key)
        if known is None:
            known = dict(zip(names, self._clock.seconds([found.plan for found in close]), strict=True))
            self._journal.add(key, known)
        for name in names:
            logger.info("%s: %.2f ms a token", name, 1e3 * known[name])
        return min(close, key=lambda found: known[f"{found.family.label} at {found.keep:g}"])

    def _keeping_more(self, best: _Candidate, quality: dict[str, Any]) -> list[_Candidate]:
        """The same with a little more kept, where that is still faster than dense."""
        more = best.family.keeping_more(best.keep, len(self._anatomy))
        if more is None:
            return []
        plan = self._make(best.family, more)
        found = _Candidate(best.family, more, plan, quality, self._cost(plan))
        return [found] if found.cost.weighed < self._all.weighed else []

    def _finished(self, plan: Plan, quality: dict[str, Any], recipe: dict[str, Any]) -> Plan:
        return replace(
            plan,
            quality=quality,
            recipe={**plan.recipe, **recipe},
            calibration=self._study.provenance(),
            frontier=tuple(found.row(self._bandwidth()) for found in self._best_of_all()),
        )

    def _bandwidth(self) -> float:
        return read_bandwidth(self._study.model.device.type)

    def _best_of_all(self) -> list[_Candidate]:
        """Fastest first; each next one is slower, and has less loss."""
        front: list[_Candidate] = []
        for found in sorted(self._found, key=lambda f: (f.cost.weighed, _loss(f.quality))):
            if not front or _loss(found.quality) < _loss(front[-1].quality):
                front.append(found)
        return front

    def front(self) -> list[Plan]:
        rows = [found.row(self._bandwidth()) for found in self._best_of_all()]
        return [
            replace(
                found.plan,
                quality=found.quality,
                calibration=self._study.provenance(),
                frontier=(row, *(other for other in rows if other is not row)),
            )
            for found, row in zip(self._best_of_all(), rows, strict=True)
        ]


def _loss(quality: dict[str, Any]) -> float:
    return float(quality["kl"])  # less noisy than perplexity, and grows with it
