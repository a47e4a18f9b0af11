"""Importance as data: what each neuron, expert or attention head is worth, sets of them, and the plans these make."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from .anatomy import check_model
from .checks import check_seed, check_share, kind_of
from .errors import CoreskipError
from .expert_policies import KeptExperts
from .fingerprint import Fingerprint
from .importance import kept_count
from .plan import LayerPlan, Plan
from .policies import Chooser, Static
from .sealed_folder import SealedFolder

Unit = Literal["neurons", "experts", "heads", "mlps"]
UNITS: tuple[Unit, ...] = get_args(Unit)
Per = Literal["layer", "model"]
Own = TypeVar("Own", bound="_OfLayers")


@dataclass(frozen=True, eq=False)
class _OfLayers:
    """One tensor a layer, of one model.

    Attributes:
        layers: one tensor per decoder layer, ``[units]``; empty where the layer has none.
        model: fingerprint of the model.
        unit: what the entries are: neurons of each layer's MLP (of a mixture, of its shared expert), its ``experts``,
            attention ``heads``, or whole ``mlps`` (one a layer).
        recipe: how it was made: plain JSON values.
        calibration: what texts it was made from: source, tokens, sha256 of the token ids; by name where several.
    """

    layers: tuple[Tensor, ...]
    model: Fingerprint
    unit: Unit = "neurons"
    recipe: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    FOLDER: ClassVar[SealedFolder]

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise CoreskipError(f"unknown unit {self.unit!r}; choose from {', '.join(UNITS)}")
        widths = self.model.intermediate_sizes
        if len(self.layers) != len(widths):
            raise CoreskipError(f"there are {self.unit} of {len(self.layers)} layers, the model has {len(widths)}")
        counts = {"neurons": widths, "experts": self.model.experts or (0,) * len(widths)}.get(str(self.unit))
        for index, layer in enumerate(self.layers):
            if layer.ndim != 1 or (counts is not None and len(layer) != counts[index]):
                expected = "one number each" if counts is None else f"{counts[index]} {self.unit}"
                raise CoreskipError(f"layer {index} has {tuple(layer.shape)} numbers, the model {expected}")

    def __len__(self) -> int:
        return len(self.layers)

    def check(self, model: nn.Module) -> None:
        """Raise `CoreskipError` unless these are of `model`."""
        check_model(model)
        self._require(Fingerprint.of(model))

    def _require(self, other: Fingerprint) -> None:
        self.model.require(other, "the scores were", "make them again for this model")

    def _same(self, other: Any) -> None:
        """Raise unless `other` can be combined with these."""
        if type(other) is not type(self):
            mine, theirs = type(self).__name__, kind_of(other)
            hint = "" if not isinstance(other, Plan) else ": NeuronSet.of(plan) makes a set of a static plan"
            raise CoreskipError(f"a {mine} cannot be combined with {theirs}{hint}")
        if other.unit != self.unit:
            raise CoreskipError(f"{self.unit} cannot be combined with {other.unit}")
        self._require(other.model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder `path`, atomically; see `SealedFolder.write`."""
        self.FOLDER.write(path, *self._document())

    @classmethod
    def load(cls: type[Own], path: str | os.PathLike[str]) -> Own:
        """Read the folder `path`.

        Raises:
            CoreskipError: not such a folder, of a newer format, truncated, edited or inconsistent.
        """
        return cast(Own, cls.FOLDER.read(path, cls._decoded))

    def _document(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        document: dict[str, Any] = {"model": self.model.document(), "unit": self.unit}
        document |= {"recipe": dict(self.recipe), "calibration": dict(self.calibration), "depth": len(self)}
        tensors = {f"layers.{index}": layer for index, layer in enumerate(self.layers)}
        return document, {**tensors, "model.probes": self.model.probes}

    @classmethod
    def _decoded(cls, document: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
        model = Fingerprint.read(document["model"], tensors["model.probes"])
        layers = tuple(tensors[f"layers.{index}"] for index in range(document["depth"]))
        return cls(layers, model, document["unit"], dict(document["recipe"]), dict(document["calibration"]))


@dataclass(frozen=True, eq=False)
class NeuronScores(_OfLayers):
    """What each neuron is worth by one measure, higher is more: fp32 ``[units]`` per layer, see the base class.

    Scores of one model and unit can be added, subtracted and scaled. Measures have scales of their own: `normalised`
    or `ranks` first, where two of them are to count alike.

    Raises:
        CoreskipError: shapes that are not the model's, or numbers that are not finite.
    """

    FOLDER: ClassVar[SealedFolder] = SealedFolder("scores", "scores", 1, "", CoreskipError)

    def __post_init__(self) -> None:
        super().__post_init__()
        for index, layer in enumerate(self.layers):
            if layer.dtype != torch.float32:
                raise CoreskipError(f"the scores of layer {index} are {layer.dtype}, not float32")
            if not bool(torch.isfinite(layer).all()):
                raise CoreskipError(f"the scores of layer {index} hold NaN or infinity: make them again")

    def __add__(self, other: NeuronScores) -> NeuronScores:
        return self._with(other, "+", torch.add)

    def __sub__(self, other: NeuronScores) -> NeuronScores:
        return self._with(other, "-", torch.sub)

    def __mul__(self, factor: float) -> NeuronScores:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor):
            raise CoreskipError(f"scores are scaled by a finite number, not by {factor!r}")
        return self._made({"scaled": self._name, "by": factor}, [layer * factor for layer in self.layers])

    __rmul__ = __mul__

    def __neg__(self) -> NeuronScores:
        return self * -1.0

    def normalised(self) -> NeuronScores:
        """Every layer's scores with mean 0 and standard deviation 1; 0 where all are equal."""
        layers = [
            (layer - layer.mean()) / layer.std(correction=0).clamp_min(torch.finfo(torch.float32).tiny)
            if len(layer)
            else layer
            for layer in self.layers
        ]
        return self._made({"normalised": self._name}, layers)

    def ranks(self) -> NeuronScores:
        """Every layer's scores as ranks from 0, the least, to 1; equal scores share their mean rank."""
        return self._made({"ranks of": self._name}, [_ranks(layer) for layer in self.layers])

    def top(self, share: float, *, per: Per = "layer") -> NeuronSet:
        """The `share` of the units with the highest scores, in (0, 1]: of every layer alike or, per ``model``, of all
        of them together. Equal scores are taken in order."""
        check_share("share", share)
        if per not in get_args(Per):
            raise CoreskipError(f"per is {per!r}; choose from {', '.join(get_args(Per))}")
        parts = self.layers if per == "layer" else (torch.cat(self.layers),)
        chosen = [_best(part, kept_count(len(part), share)) if len(part) else part.bool() for part in parts]
        members = chosen if per == "layer" else chosen[0].split([len(layer) for layer in self.layers])
        return self._set(members, {"top": share, "per": per})

    def bottom(self, share: float, *, per: Per = "layer") -> NeuronSet:
        """The `share` with the lowest scores, see `top`."""
        return replace((-self).top(share, per=per), recipe={"of": self._name, "bottom": share, "per": per})

    def above(self, least: float) -> NeuronSet:
        """All units whose score is above `least`, a finite number."""
        if isinstance(least, bool) or not isinstance(least, (int, float)) or not math.isfinite(least):
            raise CoreskipError(f"a set is of scores above a finite number, not above {least!r}")
        return self._set([layer > least for layer in self.layers], {"above": least})

    @property
    def _name(self) -> Any:
        return self.recipe.get("method") or dict(self.recipe) or "scores"

    def _set(self, members: Sequence[Tensor], recipe: dict[str, Any]) -> NeuronSet:
        return NeuronSet(tuple(members), self.model, self.unit, {"of": self._name, **recipe}, self.calibration)

    def _with(self, other: Any, sign: str, combine: Callable[[Tensor, Tensor], Tensor]) -> NeuronScores:
        self._same(other)
        layers = [combine(mine, theirs) for mine, theirs in zip(self.layers, other.layers, strict=True)]
        made = self._made({"scores": [self._name, sign, other._name]}, layers)
        return replace(made, calibration={"left": dict(self.calibration), "right": dict(other.calibration)})

    def _made(self, recipe: dict[str, Any], layers: Sequence[Tensor]) -> NeuronScores:
        return replace(self, layers=tuple(layers), recipe=recipe)

    def __repr__(self) -> str:
        return f"NeuronScores({self._name}; {sum(map(len, self.layers))} {self.unit} in {len(self)} layers)"


@dataclass(frozen=True, eq=False)
class NeuronSet(_OfLayers):
    """A set of a model's neurons, experts or heads: bool ``[units]`` per layer, see the base class.

    ``a | b``, ``a & b``, ``a - b``, ``a ^ b`` and ``~a`` are sets of the same model.
    """

    FOLDER: ClassVar[SealedFolder] = SealedFolder("set", "a set of neurons", 1, "", CoreskipError)

    def __post_init__(self) -> None:
        super().__post_init__()
        for index, layer in enumerate(self.layers):
            if layer.dtype != torch.bool:
                raise CoreskipError(f"the set of layer {index} is {layer.dtype}, not bool")

    @classmethod
    def of(cls, plan: Plan) -> NeuronSet:
        """The neurons that a plan keeps: those of its static layers, and all of its dense ones.

        Raises:
            CoreskipError: some layer's neurons are chosen while it runs.
        """
        if not isinstance(plan, Plan):
            raise CoreskipError(f"a set is of a coreskip.Plan, not of {kind_of(plan)}: Plan.load reads one")
        if plan.intervenes:
            raise CoreskipError(
                "the plan changes what neurons compute, in place of leaving a fixed set out: it has none"
            )
        members = []
        for index, (layer, width) in enumerate(zip(plan.layers, plan.model.intermediate_sizes, strict=True)):
            policy: Any = layer.neurons
            if policy.chooser not in (Chooser.NOTHING, Chooser.CALIBRATION):
                raise CoreskipError(
                    f"layer {index} of the plan chooses its neurons at run time ({policy.name}): it has no fixed set; "
                    "make a plan with the method static, or scores"
                )
            kept = torch.ones(width, dtype=torch.bool)
            if policy.chooser is Chooser.CALIBRATION:
                kept = torch.zeros(width, dtype=torch.bool).index_fill_(0, policy.indices.cpu(), True)
            members.append(kept & layer.layer.mlp)
        return cls(tuple(members), plan.model, "neurons", {"kept by": dict(plan.recipe)}, dict(plan.calibration))

    @classmethod
    def random(cls, model: nn.Module, share: float, *, seed: int = 0) -> NeuronSet:
        """The `share` of every layer's neurons, drawn by `seed`."""
        check_model(model)
        return cls._drawn(Fingerprint.of(model), share, seed)

    @classmethod
    def _drawn(cls, model: Fingerprint, share: float, seed: int) -> NeuronSet:
        check_share("share", share)
        check_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.rand(width, generator=generator) for width in model.intermediate_sizes]
        members = [_best(layer, kept_count(len(layer), share)) if len(layer) else layer.bool() for layer in drawn]
        return cls(tuple(members), model, "neurons", {"random": share, "seed": seed})

    def __or__(self, other: NeuronSet) -> NeuronSet:
        return self._with(other, "|", torch.logical_or)

    def __and__(self, other: NeuronSet) -> NeuronSet:
        return self._with(other, "&", torch.logical_and)

    def __sub__(self, other: NeuronSet) -> NeuronSet:
        return self._with(other, "-", lambda mine, theirs: mine & ~theirs)

    def __xor__(self, other: NeuronSet) -> NeuronSet:
        return self._with(other, "^", torch.logical_xor)

    def __invert__(self) -> NeuronSet:
        return replace(self, layers=tuple(~layer for layer in self.layers), recipe={"not": self._name})

    @property
    def share(self) -> float:
        """The set's share of all units."""
        total = sum(map(len, self.layers))
        return self.size / total if total else 0.0

    @property
    def shares(self) -> tuple[float, ...]:
        """Of every layer, the set's share of its units; 0 where it has none."""
        return tuple(int(layer.sum()) / len(layer) if len(layer) else 0.0 for layer in self.layers)

    @property
    def size(self) -> int:
        """Units in the set."""
        return sum(int(layer.sum()) for layer in self.layers)

    def indices(self, layer: int) -> Tensor:
        """The set's units of one layer, int64, ascending."""
        return self.layers[layer].nonzero().flatten()

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.indices, range(len(self)))

    def overlap(self, other: NeuronSet) -> float:
        """Units in both as a share of those in either (Jaccard); 0 where both are empty."""
        self._same(other)
        either = (self | other).size
        return (self & other).size / either if either else 0.0

    def plan(self, model: nn.Module, *, off: bool = False, weights: str | None = None) -> Plan:
        """A plan for `model` that keeps the set's neurons, or experts, alone; with `off`, all but these.

        Args:
            weights: in which format decode steps read theirs, see `Plan`.

        Raises:
            CoreskipError: another model's set, one of units that no plan leaves out, or one that leaves some layer
                without any.
        """
        self.check(model)
        return self._plan(off, weights)

    def _plan(self, off: bool, weights: str | None) -> Plan:
        kept = ~self if off else self
        if kept.size == 0:
            raise CoreskipError(f"the set {'holds everything' if off else 'is empty'}: no {self.unit} would be left")
        if self.unit not in ("neurons", "experts"):
            raise CoreskipError(f"plans leave out neurons, experts and layers, and this is a set of {self.unit}")
        build = self._static if self.unit == "neurons" else self._experts
        layers = [build(index, layer) for index, layer in enumerate(kept.layers)]
        recipe = {"method": "set", "off" if off else "set": self._name}
        return Plan(tuple(layers), self.model, recipe, dict(self.calibration), weights=weights)

    def _static(self, index: int, layer: Tensor) -> LayerPlan:
        self._check_left(index, layer)
        return LayerPlan() if bool(layer.all()) else LayerPlan(Static(layer.nonzero().flatten().cpu()))

    def _experts(self, index: int, layer: Tensor) -> LayerPlan:
        self._check_left(index, layer)
        return LayerPlan() if bool(layer.all()) else LayerPlan(experts=KeptExperts(layer.nonzero().flatten().cpu()))

    def _check_left(self, index: int, layer: Tensor) -> None:
        if len(layer) and not bool(layer.any()):
            raise CoreskipError(
                f"the set leaves layer {index} without {self.unit}: take more of them, or a share per layer"
            )

    @property
    def _name(self) -> Any:
        return dict(self.recipe) or "set"

    def _with(self, other: Any, sign: str, combine: Callable[[Tensor, Tensor], Tensor]) -> NeuronSet:
        self._same(other)
        layers = tuple(combine(mine, theirs) for mine, theirs in zip(self.layers, other.layers, strict=True))
        calibration = {"left": dict(self.calibration), "right": dict(other.calibration)}
        recipe = {"set": [self._name, sign, other._name]}
        return replace(self, layers=layers, recipe=recipe, calibration=calibration)

    def __repr__(self) -> str:
        return f"NeuronSet({self.size} {self.unit}, {self.share:.1%}, of {len(self)} layers)"


def _best(scores: Tensor, count: int) -> Tensor:
    """bool, like `scores`: the `count` highest."""
    best = scores.argsort(descending=True, stable=True)[:count]
    return torch.zeros(len(scores), dtype=torch.bool).index_fill_(0, best, True)


def _ranks(scores: Tensor) -> Tensor:
    values, place, counts = scores.unique(return_inverse=True, return_counts=True)
    if len(values) < 2:
        return torch.full_like(scores, 0.5)
    last = counts.cumsum(0) - 1
    mean = last.double() - (counts - 1).double() / 2
    ranks: Tensor = mean[place] / (len(scores) - 1)
    return ranks.float()
