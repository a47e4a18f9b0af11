"""The Plan: which neurons and layers run, decided once, kept as a folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .anatomy import Anatomy, is_packed
from .checks import AS_PACKED, kind_of
from .drawing import plan_table
from .errors import CoreskipError, PlanError
from .expert_policies import EXPERT_POLICIES, AllExperts, ExpertPolicy
from .fingerprint import Fingerprint
from .interventions import INTERVENTIONS, Intervention, Site, Untouched
from .policies import LAYER_POLICIES, NEURON_POLICIES, Chooser, Clusters, Dense, LayerPolicy, NeuronPolicy, Run
from .rounding_recipe import RoundingRecipe
from .sealed_folder import SealedFolder


@dataclass(frozen=True)
class LayerPlan:
    """What one decoder layer does while decoding; and what is changed about it always, in prompts, too."""

    neurons: NeuronPolicy = field(default_factory=Dense)
    layer: LayerPolicy = field(default_factory=Run)
    experts: ExpertPolicy = field(default_factory=AllExperts)
    intervention: Intervention = field(default_factory=Untouched)

    def kept(self, width: int) -> int:
        """Neurons that a decode step computes of `width`; where that depends on the prompt, as if the layer ran."""
        return self.neurons.kept(width) if self.layer.mlp else 0

    @property
    def by_prompt(self) -> bool:
        """Whether each sequence's prompt decides something of what its decode steps leave out."""
        return self.neurons.chooser is Chooser.PROMPT or self.layer.by_prompt or self.experts.by_prompt


#: where a packed model notes the format that it was packed in
PACKED_AS = "_coreskip_packed_as"


def default_weights(model: nn.Module) -> str | None:
    """In which format a model's weights are decoded with where nobody names one: of a packed model whose matrices were
    rounded its own, with inputs rounded, too."""
    rounded = getattr(model, "__dict__", {}).get(PACKED_AS) is not None and any(map(is_packed, model.modules()))
    return AS_PACKED if rounded else None


WEIGHTS = (None, "int8", "int4", "packed")
OF_PACKED = "plan"  # where a packed model has its plan
#: ``plan.json`` holds the recipe, the fingerprints, each layer's policy and the measured quality; ``plan.safetensors``
#: the indices, centroids, means and predictor weights. Version 2 has interventions.
FOLDER = SealedFolder("plan", "a plan", 2, "coreskip analyze", PlanError, inside=OF_PACKED)


@dataclass(frozen=True, eq=False)
class Plan:
    """Per layer one neuron policy and one layer policy, with where they come from and what they cost.

    Attributes:
        layers: one `LayerPlan` per decoder layer.
        model: fingerprint of the model that the plan was made for.
        recipe: how it was made (method, keep, alpha, seed, ...): plain JSON values.
        calibration: what text it was calibrated on: source, tokens, sha256 of the token ids.
        quality: what `evaluate` measured on held-out text, or None.
        clusters: for similarity-guided plans.
        frontier: what the search for a budget found that nothing beat in both bytes and quality: plain JSON tables.
        weights: in which format the native decode step holds weights: None: as loaded; "int8": one byte each, in
            groups of 32 inputs; "int4": 4-bit groups, and bytes for the LM head; "packed": as a packed model has
            them, with inputs rounded to 8 bits, as for the other two.
        rounding: of weights "packed", how the model is rounded when it is packed for this plan; None: as it may be.
    """

    layers: tuple[LayerPlan, ...]
    model: Fingerprint
    recipe: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    quality: Mapping[str, Any] | None = None
    clusters: Clusters | None = None
    frontier: tuple[Mapping[str, Any], ...] = ()
    weights: str | None = None
    rounding: RoundingRecipe | None = None

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise PlanError(f"weights must be one of {', '.join(map(repr, WEIGHTS))}, not {self.weights!r}")
        if self.rounding is not None and self.weights != AS_PACKED:
            raise PlanError(f"a plan that has its model rounded has weights {AS_PACKED!r}, not {self.weights!r}")
        widths = self.model.intermediate_sizes
        if len(self.layers) != len(widths):
            raise PlanError(f"the plan has {len(self.layers)} layers, its model {len(widths)}")
        for index, (layer, width) in enumerate(zip(self.layers, widths, strict=True)):
            try:
                if width == 0 and layer.neurons.chooser is not Chooser.NOTHING:
                    raise PlanError("it has no MLP to choose neurons of")
                layer.neurons.check(width, self.model.hidden_size)
                layer.layer.check()
                self._check_experts(index, layer.experts)
                self._check_clusters(layer.neurons)
                _check_intervention(layer, width)
            except CoreskipError as error:
                raise PlanError(f"layer {index} of the plan: {error}") from None

    def _check_experts(self, index: int, policy: ExpertPolicy) -> None:
        count = self.model.experts[index] if self.model.experts else 0
        if count == 0 and policy != AllExperts():
            raise PlanError("it has no experts to choose from")
        policy.check(count)

    def _check_clusters(self, policy: NeuronPolicy) -> None:
        if not policy.needs_clusters:
            return
        if self.clusters is None:
            raise PlanError("a similarity-guided layer needs the plan's cluster centroids")
        self.clusters.check(self.model.intermediate_sizes)
        if len(getattr(policy, "clusters", ())) != len(self.clusters.centroids):
            raise PlanError(f"centroids of shape {tuple(self.clusters.centroids.shape)} do not fit the plan's clusters")

    @property
    def intervenes(self) -> bool:
        """Whether it changes what layers compute, or says nothing after some prompts: nothing exact comes of it."""
        return any(layer.intervention.site is not Site.NOWHERE for layer in self.layers)

    @property
    def abstains(self) -> bool:
        """Whether there are prompts after which it says nothing."""
        return any(layer.intervention.site is Site.PROMPT for layer in self.layers)

    @classmethod
    def dense(cls, model: nn.Module, weights: str | None = None) -> Plan:
        """A plan that skips nothing; `weights` as in the class."""
        fingerprint = Fingerprint.of(model)
        return cls(
            layers=tuple(LayerPlan() for _ in fingerprint.intermediate_sizes),
            model=fingerprint,
            recipe={"method": "dense"},
            weights=weights,
        )

    def check(self, model: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Raise `PlanError` unless this plan was made for `model`."""
        self.model.require(Fingerprint.of(model, anatomy))

    @classmethod
    def of(cls, plan: Plan | str | os.PathLike[str] | None, model: nn.Module) -> Plan:
        """What may stand for a plan for `model`: itself, the path of one, or None for the dense plan.

        Raises:
            CoreskipError: none of these.
        """
        if isinstance(plan, Plan):
            # what was planned for the original holds for its packed form
            same = plan.weights is not None and plan.weights == getattr(model, "__dict__", {}).get(PACKED_AS)
            return dataclasses.replace(plan, weights=AS_PACKED) if same else plan
        if plan is None:
            return cls.dense(model, default_weights(model))
        if not isinstance(plan, (str, os.PathLike)):
            raise PlanError(f"a plan is a coreskip.Plan, the path of one, or None (dense), not {kind_of(plan)}")
        return cls.of(cls.load(plan), model)

    @property
    def keep(self) -> float:
        """Planned share of all MLP neurons that a decode step computes."""
        widths = self.model.intermediate_sizes
        kept = sum(layer.kept(width) for layer, width in zip(self.layers, widths, strict=True))
        return kept / sum(widths) if any(widths) else 1.0

    @property
    def experts(self) -> float:
        """Planned share of all experts that tokens may go to; 1 where there are none."""
        counts = self.model.experts
        kept = sum(layer.experts.kept(count) for layer, count in zip(self.layers, counts, strict=False))
        return kept / sum(counts) if counts else 1.0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder `path`. Atomic: an older Plan there survives any failure whole.

        Raises:
            CoreskipError: `path` is something other than a Plan, or cannot be written (no room, no permission).
        """
        # a version that knows of no interventions must not run a plan without them
        FOLDER.write(path, *_encode(self), version=2 if self.intervenes else 1)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read the folder `path`.

        Raises:
            PlanError: not a Plan, of a newer format, truncated, edited or inconsistent.
        """
        return FOLDER.read(path, _decode)

    def __repr__(self) -> str:
        words = [str(self.recipe.get("method", "no method")), f"keep {self.keep:.1%}", self.weights or "as loaded"]
        if self.model.experts:
            words.insert(2, f"{self.experts:.1%} of the experts")
        if self.quality is not None:
            words.append(f"ppl {self.quality['ppl_increase']:+.1%}")
        return f"Plan({', '.join(words)}; {len(self.layers)} layers of {self.model.model_type})"

    def __str__(self) -> str:
        return plan_table(self)


def _check_intervention(layer: LayerPlan, width: int) -> None:
    found = layer.intervention
    if found.site is Site.NOWHERE:
        return
    if width == 0:
        raise PlanError(f"it has no MLP for {found.name} to act in")
    if found.site is not Site.PROMPT and layer.neurons.chooser is not Chooser.NOTHING:
        raise PlanError(f"{found.name} changes neurons of an MLP that computes all of them: leave none out there")
    found.check(width)


# --- as plain JSON values and tensors --------------------------------------------------------------------------------


def _encode(plan: Plan) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {"model.probes": plan.model.probes}
    layers = []
    for index, layer in enumerate(plan.layers):
        values, arrays = _split(layer.neurons)
        tensors |= {f"layers.{index}.{name}": tensor for name, tensor in arrays.items()}
        entry = {
            "neurons": {"policy": layer.neurons.name, **values},
            "layer": {"policy": layer.layer.name, **_split(layer.layer)[0]},
        }
        if plan.model.experts:
            values, arrays = _split(layer.experts)
            tensors |= {f"layers.{index}.experts.{name}": tensor for name, tensor in arrays.items()}
            entry["experts"] = {"policy": layer.experts.name, **values}
        if layer.intervention.site is not Site.NOWHERE:
            values, arrays = _split(layer.intervention)
            tensors |= {f"layers.{index}.intervention.{name}": tensor for name, tensor in arrays.items()}
            entry["intervention"] = {"policy": layer.intervention.name, **values}
        layers.append(entry)
    document: dict[str, Any] = {
        "recipe": dict(plan.recipe),
        "model": plan.model.document(),
        "calibration": dict(plan.calibration),
        "quality": None if plan.quality is None else dict(plan.quality),
        "layers": layers,
        "clusters": None,
        "frontier": [dict(row) for row in plan.frontier],
        "weights": plan.weights,
    }
    if plan.rounding is not None:
        document["rounding"], arrays = _split(plan.rounding)
        tensors |= {f"rounding.{name}": tensor for name, tensor in arrays.items()}
    if plan.clusters is not None:
        document["clusters"], arrays = _split(plan.clusters)
        tensors |= {f"clusters.{name}": tensor for name, tensor in arrays.items()}
    return document, tensors


def _split(value: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A dataclass's plain fields and its tensors."""
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    arrays = {name: item for name, item in fields.items() if isinstance(item, Tensor)}
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items() if name not in arrays}
    plain = {name: dict(v) if isinstance(v, Mapping) else v for name, v in plain.items()}
    return plain, arrays


def _decode(document: dict[str, Any], tensors: dict[str, Tensor]) -> Plan:
    fingerprint = Fingerprint.read(document["model"], tensors["model.probes"])
    layers = []
    for index, entry in enumerate(document["layers"]):
        prefix = f"layers.{index}."
        arrays = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        layer = dict(entry["layer"])
        layer_policy = _known(LAYER_POLICIES, layer.pop("policy"))
        experts = dict(entry.get("experts", {"policy": AllExperts.name}))  # plans of dense models have none
        expert_policy = _known(EXPERT_POLICIES, experts.pop("policy"))
        chosen = _arrays_of(expert_policy, "experts", arrays)
        changes = dict(entry.get("intervention", {"policy": Untouched.name}))
        intervention = _known(INTERVENTIONS, changes.pop("policy"))
        changed = intervention(**changes, **_arrays_of(intervention, "intervention", arrays))
        neurons = _neuron_policy(dict(entry["neurons"]), arrays)
        layers.append(LayerPlan(neurons, layer_policy(**layer), expert_policy(**experts, **chosen), changed))
    clusters = None
    if document["clusters"] is not None:
        clusters = Clusters(**document["clusters"], centroids=tensors["clusters.centroids"])
    for name in ("recipe", "calibration"):
        if not isinstance(document[name], dict):
            raise PlanError(f"{name} is not a table")
    _check_quality(document["quality"])
    return Plan(
        layers=tuple(layers),
        model=fingerprint,
        recipe=document["recipe"],
        calibration=document["calibration"],
        quality=document["quality"],
        clusters=clusters,
        frontier=_frontier(document.get("frontier", [])),
        weights=document.get("weights"),  # the first plans of coreskip 0.1 have none
        rounding=_rounding(document.get("rounding"), tensors),
    )


def _rounding(values: Any, tensors: dict[str, Tensor]) -> RoundingRecipe | None:
    if values is None:
        return None
    if not all(isinstance(values[name], dict) for name in ("widths", "text")):
        raise PlanError("the plan's rounding is not a table")
    return RoundingRecipe(**values, ids=tensors["rounding.ids"])


def _neuron_policy(values: dict[str, Any], arrays: dict[str, Tensor]) -> NeuronPolicy:
    name = values.pop("policy")
    if name == "threshold":  # as coreskip 0.1 saved what are three policies now
        name, thresholds = values.pop("rule"), values.pop("least")
        if name not in ("cats", "teal", "wina"):
            raise PlanError(f"unknown threshold rule {name!r}")
        values |= {"threshold": thresholds["act"]} if name == "cats" else {"thresholds": thresholds}
    policy: NeuronPolicy = _known(NEURON_POLICIES, name)(**values, **arrays)
    return policy


def _arrays_of(policy: type[Any], kind: str, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes a policy's own tensors out of a layer's."""
    names = [each.name for each in dataclasses.fields(policy)]
    return {name: arrays.pop(f"{kind}.{name}") for name in names if f"{kind}.{name}" in arrays}


def _known(registry: dict[str, type[Any]], name: object) -> type[Any]:
    if not isinstance(name, str) or name not in registry:
        raise PlanError(f"the plan uses the policy {name!r}, which this version does not know: upgrade coreskip")
    return registry[name]


def _check_quality(quality: Any) -> None:
    if quality is None:
        return
    figures = [quality["dense"]["ppl"], quality["sparse"]["ppl"], quality["tokens"]]
    figures += [quality[name] for name in ("ppl_increase", "kl", "top1_agreement", "neuron_sparsity")]
    if not all(isinstance(figure, (int, float)) for figure in figures):
        raise PlanError("quality holds something that is not a number")


def _frontier(rows: Any) -> tuple[dict[str, Any], ...]:
    numbers = ("keep", "megabytes", "milliseconds", "ppl_increase", "kl", "top1_agreement", "neuron_sparsity")
    for row in rows:
        if not isinstance(row["name"], str) or not all(isinstance(row[name], (int, float)) for name in numbers):
            raise PlanError("the frontier holds something that is not a measurement")
    return tuple(rows)
