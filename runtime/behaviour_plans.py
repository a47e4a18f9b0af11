"""`switch_off`: a plan without a skill, from texts that show it and texts that show what is to stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..predictors.anatomy import Anatomy, check_model, dissect
from ..predictors.calibration import check_tokenizer
from ..predictors.checks import check_above_zero, check_count, check_share, check_weights
from ..predictors.errors import CoreskipError
from ..predictors.expert_policies import KeptExperts
from ..predictors.expert_scores import check_experts, observe_experts
from ..predictors.interventions import Intervention
from ..predictors.plan import LayerPlan, Plan, default_weights
from ..predictors.policies import Static
from ..predictors.skills import (
    NeuronStats,
    SomeTexts,
    Texts,
    best_key_space,
    check_contrast,
    check_lengths,
    check_prompts,
    checked_layers,
    contrast,
    highest,
    last_keys,
    neuron_adjust,
    neuron_stats,
    observed_length,
    pruned,
)
from .unknown import refuses_unknown
from .wrap import make_way


@dataclass(frozen=True)
class _Method:
    """share: default of what is changed or left out; None: it has none. strong: whether it has a strength."""

    share: float | None
    strong: bool = False


_METHODS = {
    "neuron_adjust": _Method(0.03, strong=True),
    "key_space": _Method(None),
    "pruning": _Method(0.01),
    "static": _Method(0.01),
    "experts": _Method(0.125),
}
RANKINGS = ("difference", "standardised", "distance", "magnitude")
_RANKING = {"neuron_adjust": "difference", "pruning": "magnitude", "static": "magnitude"}


@refuses_unknown
def switch_off(
    model: Any,
    tokenizer: Any,
    *,
    forget: SomeTexts,
    retain: SomeTexts,
    method: str = "neuron_adjust",
    share: float | None = None,
    strength: float | None = None,
    ranking: str | None = None,
    layers: Sequence[int] | None = None,
    weights: str | None = None,
    tokens: int = 16384,
    progress: bool = True,
) -> Plan:
    """Make a Plan under which `model` is without a skill (skill unlearning, without training).

    Args:
        model, tokenizer: from `load`, or any causal LM and its tokenizer; the model must not be wrapped.
        forget: texts that show the skill. retain: texts that show what is to stay. Lists of texts, or of `Path`s of
            UTF-8 files; one of these counts as a list of one.
        method: in prompts and decode steps: ``neuron_adjust`` (values that look like the skill's are mirrored into what
            they are on other texts, see `NeuronAdjust`), ``pruning`` (its neurons are silenced, see `PrunedNeurons`),
            ``key_space`` (nothing is said after a prompt whose last token looks like the skill's, see `KeySpace`; every
            text is one prompt). In decode steps alone, which makes these faster and lets prompts be read with the
            skill: ``static`` (its neurons are left out), ``experts`` (of mixtures, those that tokens of the skill go to
            more often than others do, over all layers, as MoTE finds them, arXiv 2502.11096; the router then chooses
            among the others).
        share: of all MLP neurons, of ``experts`` of all experts, that are changed or left out, in (0, 1]; by default
            0.03 for ``neuron_adjust``, 0.01 for ``pruning`` and ``static``, 0.125 for ``experts``.
        strength: of ``neuron_adjust``: how far values are moved, 1 by default.
        ranking: which neurons these are: see `predictors.skills.contrast`.
        layers: where neurons may be changed or left out, or hypercubes tried; by default all.
        weights: ``int4`` or ``int8``, in which the plan has weights read.
        tokens: at most this many of either kind are observed; ``key_space`` looks at the first 512 of every text.

    Returns:
        a Plan; of ``key_space`` the recipe says what shares of the texts to forget, and to retain, were held that the
        hypercube was not made of.

    Raises:
        CoreskipError: before any work is done where an argument is wrong or belongs to another method, or where texts
            are too short, too few or the same.
    """
    chosen = _method_of(method, share, strength, ranking)
    check_weights(weights)
    check_count("tokens", tokens)
    check_model(model)
    check_tokenizer(tokenizer)
    kinds = Texts.of("forget", forget, tokenizer), Texts.of("retain", retain, tokenizer)
    (check_prompts if method == "key_space" else check_lengths)(*kinds)
    check_contrast(*kinds)
    make_way(model)
    anatomy = dissect(model)
    where = _layers_of(anatomy, layers, experts=method == "experts")
    share = chosen.share if share is None else share
    dense = Plan.dense(model, weights or default_weights(model))
    recipe: dict[str, Any]
    if method == "key_space":
        policies, recipe = _key_space(model, anatomy, kinds, where, progress)
    elif method == "experts":
        policies, recipe = _experts(model, anatomy, kinds, where, float(share or 0), tokens, progress), {"share": share}
    else:
        stats = [neuron_stats(model, anatomy, kind, tokens, progress) for kind in kinds]
        options: dict[str, Any] = {"share": float(share or 0), "ranking": ranking or _RANKING[method]}
        options |= {"strength": 1.0 if strength is None else strength} if chosen.strong else {}
        policies, recipe = of_neurons(method, anatomy, stats, where, **options), options
    made = tuple(policies.get(index, layer) for index, layer in enumerate(dense.layers))
    return replace(dense, layers=made, recipe={"method": method, **recipe}, calibration=_calibration(*kinds))


def _method_of(method: str, share: Any, strength: Any, ranking: Any) -> _Method:
    """
    Raises:
        CoreskipError: there is no such method, or an option is not one of its.
    """
    if not isinstance(method, str) or method not in _METHODS:
        raise CoreskipError(f"method is {method!r}; choose from {', '.join(_METHODS)}")
    chosen = _METHODS[method]
    if share is not None:
        if chosen.share is None:
            raise CoreskipError(f"share is not an option of method {method}: leave it out")
        check_share("share", share)
    if strength is not None:
        if not chosen.strong:
            raise CoreskipError(f"strength is not an option of method {method}: leave it out")
        check_above_zero("strength", strength)
    if ranking is not None:
        if method not in _RANKING:
            raise CoreskipError(f"ranking is not an option of method {method}: leave it out")
        if ranking not in RANKINGS:
            raise CoreskipError(f"ranking is {ranking!r}; choose from {', '.join(RANKINGS)}")
    return chosen


def _layers_of(anatomy: Anatomy, layers: Any, experts: bool) -> list[int]:
    """The layers asked for that have what is changed.

    Raises:
        CoreskipError: there is no such layer, or none has it.
    """
    if experts:
        check_experts(anatomy)
    having = anatomy.experts if experts else anatomy.feed_forwards
    present = [index for index, part in enumerate(having) if part is not None]
    if layers is not None:
        present = [index for index in checked_layers(layers, len(anatomy)) if index in present]
    if not present:
        raise CoreskipError("none of the layers has an MLP that all tokens go through: use method experts")
    return present


def of_neurons(
    method: str,
    anatomy: Anatomy,
    stats: Sequence[NeuronStats],
    where: Sequence[int],
    *,
    share: float,
    ranking: str,
    strength: float = 1.0,
) -> dict[int, LayerPlan]:
    """What becomes of the layers in which a method changes neurons or leaves them out; stats: of the texts to forget,
    and of those to retain; the others: as for `switch_off`."""
    neurons = highest(contrast(stats[0], stats[1], ranking), share, where)
    if method == "static":
        kept = {i: _others(at, anatomy.mlp(i).intermediate_size) for i, at in neurons.items()}
        gone = [index for index, stay in kept.items() if len(stay) == 0]
        if gone:
            raise CoreskipError(f"no neuron of layer {gone[0]} would be left: give a smaller share")
        return {index: LayerPlan(Static(stay)) for index, stay in kept.items()}
    made: Mapping[int, Intervention] = pruned(neurons)
    if method == "neuron_adjust":
        made = neuron_adjust(stats[0], stats[1], neurons, strength)
    return {index: LayerPlan(intervention=found) for index, found in made.items()}


def _others(indices: Tensor, count: int) -> Tensor:
    stay = torch.ones(count, dtype=torch.bool, device="cpu")
    stay[indices] = False
    return stay.nonzero()[:, 0]


def _key_space(
    model: Any, anatomy: Anatomy, kinds: tuple[Texts, Texts], where: Sequence[int], progress: bool
) -> tuple[dict[int, LayerPlan], dict[str, Any]]:
    keys = [last_keys(model, anatomy, kind, progress) for kind in kinds]
    index, cube, separation = best_key_space(keys[0], keys[1], where)
    if separation.gain <= 0:
        raise CoreskipError("no layer's keys tell the texts to forget from those to retain: give more, or other ones")
    found = {"layer": index, "alpha": cube.alpha, **vars(separation)}
    return {index: LayerPlan(intervention=cube)}, found


def _experts(
    model: Any, anatomy: Anatomy, kinds: tuple[Texts, Texts], where: Sequence[int], share: float, tokens: int,
    progress: bool,
) -> dict[int, LayerPlan]:  # fmt: skip
    """All experts but those whose share of their layer's choices grows most from the texts to retain to those to
    forget. In every layer as many as a token goes to stay in any case."""
    forgotten, retained = (_frequencies(model, kind, tokens, progress) for kind in kinds)
    growth = sorted(
        ((float(more), index, expert) for index in where
         for expert, more in enumerate(forgotten[index] - retained[index]) if more > 0),
        reverse=True,
    )  # fmt: skip
    gone: dict[int, list[int]] = {}
    most = max(1, round(share * sum(len(forgotten[index]) for index in where)))
    for _, index, expert in growth:
        experts = anatomy.experts[index]
        assert experts is not None
        if most > 0 and len(gone.get(index, ())) < experts.count - max(1, experts.top_k):
            gone.setdefault(index, []).append(expert)
            most -= 1
    if not gone:
        raise CoreskipError("no expert is asked for more often by the texts to forget: give more, or other ones")
    return {i: LayerPlan(experts=KeptExperts(_others(torch.tensor(e), len(forgotten[i])))) for i, e in gone.items()}


def _frequencies(model: Any, kind: Texts, tokens: int, progress: bool) -> dict[int, Tensor]:
    """By layer with experts, the share of all choices that each of them gets, float64 ``[experts]``."""
    pieces = kind.pieces(observed_length(model), tokens)
    stats = observe_experts(model, pieces, total=len(pieces), progress=progress)
    counts = {index: found.tokens.double() for index, found in enumerate(stats) if found is not None}
    return {index: count / count.sum().clamp(min=1) for index, count in counts.items()}


def _calibration(forget: Texts, retain: Texts) -> dict[str, Any]:
    kinds = {kind.name: kind.fingerprint() for kind in (forget, retain)}
    every = {f"{name}_{key}": value for name, found in kinds.items() for key, value in found.items()}
    return {"source": "texts to forget and to retain", "tokens": forget.tokens + retain.tokens, **every}
