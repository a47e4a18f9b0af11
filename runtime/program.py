"""What a decode step computes, reads and skips under a plan: a model's bricks times the plan's policies, as data.

Nothing is packed here. The lowerings carry a program out: the native step (lower_cpu.py), steps captured on a GPU
(lower_gpu.py), and the model's own modules, patched (modules.py). What a step costs (cost.py) is read off the program
that runs.

A neuron policy comes in by one builder, registered for its type with `builds`: it turns the policy's numbers into a
`BrickProgram`. A policy without a builder is refused when a program is made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from ..kernels.groups import GROUP
from ..kernels.neuron_groups import Form, PackedNeurons
from ..kernels.packed import EXACT_BYTES, PackedLinear, PackedMLP
from ..kernels.sparse import ExactScores, SignScores, SparseMLP
from ..predictors.anatomy import Anatomy
from ..predictors.checks import AS_PACKED
from ..predictors.errors import PlanError
from ..predictors.expert_policies import CoreExperts
from ..predictors.importance import kept_count
from ..predictors.interventions import Site
from ..predictors.plan import LayerPlan, Plan
from ..predictors.policies import (
    Bricks,
    Cats,
    Chooser,
    CoreNeurons,
    Dense,
    LayerPolicy,
    Learned,
    NeuronPolicy,
    Similar,
    Sketch,
    Static,
    Teal,
    TopK,
    Wina,
)
from .bundles import Bundles, FewerNeurons, packed_in_four_bits, reads_matrices
from .linear_names import native_names
from .program_experts import ExpertsProgram, build_experts
from .slim import slim_down_bytes

# Of neurons chosen in 4-bit groups: by bytes alone. How long they take differs from machine to machine, 1.0 to 1.4
# times that, and the search times them where it is to choose them.
_TIMED = 1.0
FORMAT_BYTES = {"int8": EXACT_BYTES["int8_groups"], "int4": EXACT_BYTES["int4"]}


@dataclass(frozen=True)
class Brick:
    """A run of neurons with gate, up and down rows: a dense model's MLP is one.

    Attributes:
        width, hidden: neurons, and the inputs of each.
        gated: whether there are gate rows.
        loaded: bytes of one weight as it was loaded.
        dense: bytes of one weight as a step reads it that computes every neuron.
        weights: the plan's format; None: as loaded.
        in_groups: whether neurons are read in 4-bit groups.
        down: bytes of one weight of the down projection of some neurons alone, whose groups are made anew; None: as
            many as of the whole one's.
        of_cpu: whether a CPU's kernels read it.
        linears: names of the layer's linears of which a native step can leave inputs out.
    """

    width: int
    hidden: int
    gated: bool
    loaded: float
    dense: float
    weights: str | None = None
    in_groups: bool = False
    linears: frozenset[str] = frozenset()
    down: float | None = None
    of_cpu: bool = True

    @property
    def scoring(self) -> int:
        """Matrices that give the activations."""
        return 2 if self.gated else 1

    @property
    def row(self) -> float:
        """Bytes of one row of a matrix as it was loaded."""
        return self.hidden * self.loaded

    def chosen(self, kept: int) -> float:
        """Bytes that so many neurons read which a prompt has chosen: in matrices of their own, each group of the down
        projection has its ends and, where neurons lie as they come, every eight of them four bytes, and seven more in
        two groups."""
        if not (self.in_groups and self.of_cpu):
            return self.listed(kept)
        groups = -(-self.width // GROUP)
        lines = min(kept / 8 + 7 / 16 * groups, GROUP / 8 * groups, kept)
        down = 4 * (lines + min(groups, kept))
        return self.hidden * (kept * self.scoring * FORMAT_BYTES["int4"] + down)

    def listed(self, kept: int) -> float:
        """Bytes that so many listed neurons read: of 4-bit groups, the ends of all of the down projection's come with
        them."""
        if self.in_groups:
            return self.grouped(self.scoring * kept, kept)
        return kept * (self.scoring + 1) * (self.row if self.weights is None else self.hidden)

    def alone(self, kept: int) -> float:
        """Bytes of so many neurons in matrices of their own."""
        weight = self.dense if self.weights is None else FORMAT_BYTES["int4" if self.in_groups else "int8"]
        return kept * self.hidden * (self.scoring * weight + (weight if self.down is None else self.down))

    def grouped(self, rows: float, kept: float) -> float:
        """Bytes of so many rows of gate and up in 4-bit groups, and of the down rows of those kept."""
        whole = FORMAT_BYTES["int4"]
        return self.hidden * (whole * rows + 0.5 * kept + (whole - 0.5) * self.width)


@dataclass(frozen=True, eq=False)
class BrickProgram:
    """What a decode step does with one brick.

    Attributes:
        policy: of the plan.
        chooser: what decides at run time; nothing does where every neuron is kept.
        kept: neurons computed for a token; where tokens differ, on the calibration text.
        width: all of them.
        nbytes: bytes of weights that a step of one token reads.
        native: whether native steps make the choice.
        in_groups: whether nothing but kernels over 4-bit groups carries it out.
        pack: what the brick becomes once its weights are packed; None where they are read as matrices, or are packed
            for each sequence.
        stays, chosen: bytes of weights that choosing reads, and then of each neuron that is chosen, where these can be
            read from a file by neuron; 0: they cannot.
        rate: how long a byte takes, in bytes that are read in a row; None: what its chooser usually takes.
        thresholds: of linears that leave out small inputs, by name. by_norm: see `InputThresholds`. share: of the
            inputs that stays on the calibration text.
    """

    policy: NeuronPolicy
    chooser: Chooser
    kept: int
    width: int
    nbytes: float
    native: bool = True
    pack: Callable[[Bundles], FewerNeurons] | None = None
    stays: float = 0.0
    chosen: float = 0.0
    rate: float | None = None
    in_groups: bool = False
    thresholds: Mapping[str, float] = field(default_factory=dict)
    by_norm: bool = False
    share: float = 1.0


Builder = Callable[[Any, Brick], BrickProgram]
_BUILDERS: dict[type[NeuronPolicy], Builder] = {}


def builds(*policies: type[NeuronPolicy]) -> Callable[[Builder], Builder]:
    """Registers a function as the builder of these policies."""

    def register(builder: Builder) -> Builder:
        _BUILDERS.update(dict.fromkeys(policies, builder))
        return builder

    return register


def build(policy: NeuronPolicy, brick: Brick) -> BrickProgram:
    """The program of one brick under `policy`.

    Raises:
        PlanError: there is no builder for policies of this type.
    """
    builder = _BUILDERS.get(type(policy))
    if builder is None:
        raise PlanError(f"nothing carries out the policy {policy.name!r}: register a builder for it")
    return builder(policy, brick)


@dataclass(frozen=True, eq=False)
class LayerProgram:
    """What a decode step does with one decoder layer. bricks: its MLP, or its shared expert; experts: None where it has
    none. skips: what its layer policy leaves out. changed: whether something changes its activations, which no kernel
    does."""

    bricks: tuple[BrickProgram, ...]
    skips: LayerPolicy
    experts: ExpertsProgram | None = None
    changed: bool = False

    @property
    def width(self) -> int:
        """Neurons that a token goes through where nothing is left out."""
        experts = 0 if self.experts is None else self.experts.top_k * self.experts.width
        return sum(brick.width for brick in self.bricks) + experts

    @property
    def native(self) -> bool:
        """Whether native steps make every choice."""
        of_experts = self.experts is None or self.experts.native or not self.experts.chooses
        return of_experts and not self.changed and all(brick.native for brick in self.bricks)


@dataclass(frozen=True, eq=False)
class Program:
    """What decode steps do under a plan, by layer. weights: the plan's format."""

    layers: tuple[LayerProgram, ...]
    weights: str | None

    @classmethod
    def of(cls, anatomy: Anatomy, plan: Plan, dense: Callable[[Tensor], float] | None = None) -> Program:
        """dense: bytes of one weight of a matrix as steps read it that compute all of it; by default as loaded, or as
        the plan's format has it."""
        dense = dense or (lambda weight: FORMAT_BYTES.get(str(plan.weights), float(weight.element_size())))
        layers = (_layer(anatomy, index, layer, plan.weights, dense) for index, layer in enumerate(plan.layers))
        found = cls(tuple(layers), plan.weights)
        if plan.weights is not None and any(e.least is not None for e in found.chosen_experts.values()):
            raise PlanError(
                "neurons inside of experts are left out of weights as loaded alone: make the plan without weights"
            )
        return found

    def chosen_by(self, *choosers: Chooser) -> dict[int, BrickProgram]:
        """By layer, the bricks in which one of these decides."""
        return {
            index: brick
            for index, layer in enumerate(self.layers)
            for brick in layer.bricks
            if brick.chooser in choosers
        }

    @cached_property
    def native(self) -> bool:
        """Whether native steps make every choice."""
        return all(layer.native for layer in self.layers)

    @cached_property
    def thins_shared_experts(self) -> bool:
        """Whether it leaves neurons of shared experts out, which a whole native step does not."""
        layers = [layer for layer in self.layers if layer.experts is not None]
        return any(brick.chooser is not Chooser.NOTHING for layer in layers for brick in layer.bricks)

    @cached_property
    def core_experts(self) -> dict[int, CoreExperts]:
        """By layer, what prompts decide of mixtures."""
        found = {index: experts.by_prompt for index, experts in self.chosen_experts.items()}
        return {index: policy for index, policy in found.items() if policy is not None}

    @cached_property
    def chosen_experts(self) -> dict[int, ExpertsProgram]:
        """By layer, the mixtures of which experts are left out."""
        found = ((index, layer.experts) for index, layer in enumerate(self.layers))
        return {index: experts for index, experts in found if experts is not None and experts.chooses}

    @property
    def decodes_otherwise(self) -> bool:
        """Whether decode steps compute anything else than prefill does."""
        chooses = any(brick.chooser is not Chooser.NOTHING for layer in self.layers for brick in layer.bricks)
        skips = any(layer.skips.may_skip_attention or layer.skips.may_skip_mlp for layer in self.layers)
        return chooses or skips or bool(self.chosen_experts) or self.weights is not None


def _layer(
    anatomy: Anatomy, index: int, layer: LayerPlan, weights: str | None, dense: Callable[[Tensor], float]
) -> LayerProgram:
    found, bricks = anatomy.experts[index], tuple[BrickProgram, ...]()
    mlp = anatomy.feed_forwards[index]
    if mlp is not None:  # else the plan chooses no neurons there
        if mlp.norm_name is not None and layer.neurons.chooser not in (Chooser.NOTHING, Chooser.INPUTS):
            raise PlanError(f"layer {index}: {normed(anatomy)}")
        bricks = (build(layer.neurons, brick_of(anatomy, index, weights, dense)),)
    try:
        experts = None if found is None else build_experts(layer.experts, found, dense)
    except PlanError as error:
        raise PlanError(f"layer {index}: {error}") from None
    changed = layer.intervention.site in (Site.PRE_ACTIVATION, Site.ACTIVATION)
    return LayerProgram(bricks, layer.layer, experts, changed)


def normed(anatomy: Anatomy) -> str:
    return (
        f"the MLPs of {anatomy.model_type!r} models norm all activations before the down projection: none can be left "
        "out; leave out inputs (--method threshold), or layers (--method layers)"
    )


def brick_of(
    anatomy: Anatomy, layer: int, weights: str | None = None, dense: Callable[[Tensor], float] | None = None
) -> Brick:
    """A layer's MLP; weights, dense: as for `Program.of`."""
    mlp = anatomy.mlp(layer)
    up = cast(Tensor, mlp.up.weight)
    loaded = float(up.element_size())
    return Brick(
        width=mlp.intermediate_size,
        hidden=mlp.hidden_size,
        gated=mlp.gated,
        loaded=loaded,
        dense=loaded if dense is None else dense(up),
        weights=weights,
        in_groups=weights == "int4" or (weights == AS_PACKED and packed_in_four_bits(mlp)),
        linears=frozenset(native_names(anatomy, layer)),
        down=slim_down_bytes(mlp, weights),
        of_cpu=reads_matrices(mlp),
    )


# ---- one builder a policy ----


@builds(Dense)
def _dense(policy: NeuronPolicy, brick: Brick) -> BrickProgram:
    read = brick.width * (brick.scoring + 1) * brick.hidden * brick.dense
    return BrickProgram(policy, Chooser.NOTHING, brick.width, brick.width, read)


@builds(Static, CoreNeurons, Similar)
def _bundled(policy: NeuronPolicy, brick: Brick) -> BrickProgram:
    kept = policy.kept(brick.width)
    if kept == brick.width:  # which the dense MLP computes to the last bit
        return _dense(policy, brick)
    indices: Tensor | None = getattr(policy, "indices", None)
    read = brick.chosen(kept) if indices is None else brick.alone(kept)
    pack = None if indices is None else lambda bundles: bundles.alone(indices)
    return BrickProgram(policy, policy.chooser, kept, brick.width, read, pack=pack)


@builds(Sketch)
def _sketch(policy: Sketch, brick: Brick) -> BrickProgram:
    kept = policy.kept(brick.width)
    if policy.bits == 3:
        return _planes(policy, brick, kept)
    if policy.bits == 1:
        read = brick.width * brick.hidden + kept * (brick.scoring + 1) * brick.row
        pack = lambda bundles: _scored(policy, bundles, SignScores.of(bundles.scoring_weights()))  # noqa: E731
        return BrickProgram(policy, policy.chooser, kept, brick.width, read, native=False, pack=pack)
    completed = kept if policy.candidates is None else kept_count(brick.width, policy.candidates)
    read = (brick.width + completed) * brick.scoring * brick.hidden / 2 + kept * brick.hidden
    return BrickProgram(
        policy, policy.chooser, kept, brick.width, read, pack=lambda bundles: _nibbles(policy, bundles),
        stays=brick.width * brick.scoring * brick.hidden / 2, chosen=(brick.scoring / 2 + 1) * brick.hidden,
    )  # fmt: skip


def _planes(policy: Sketch, brick: Brick, kept: int) -> BrickProgram:
    """Three of the four bits of gate and up, the last ones of candidates, and the down rows of those that are kept."""
    if not brick.in_groups:
        raise PlanError("a sketch of 3 bits is of weights in 4 bits: the plan's weights must be int4")
    bits = 3 * brick.width + kept_count(brick.width, policy.keep if policy.candidates is None else policy.candidates)
    read = brick.grouped(brick.scoring * brick.width, kept)
    read -= brick.hidden * brick.scoring * (4 * brick.width - bits) / 8

    def pack(bundles: Bundles) -> SparseMLP:
        packed = _in_groups(policy, bundles, "planes", None)
        return SparseMLP(packed, "exact", threshold=policy.threshold, refine=policy.refine or 0.0)

    return BrickProgram(policy, policy.chooser, kept, brick.width, read, pack=pack, rate=_TIMED, in_groups=True)


def _by_gates(policy: TopK, brick: Brick, kept: int) -> BrickProgram:
    """Gates, the up rows of candidates, or of all, and the down rows of those that are kept."""
    candidates = brick.width if policy.candidates is None else kept_count(brick.width, policy.candidates)
    read = brick.grouped(brick.width + (brick.scoring - 1) * candidates, kept)

    def pack(bundles: Bundles) -> SparseMLP:
        packed = _in_groups(policy, bundles, "rows" if policy.gate is None else "gates", policy.reach)
        return SparseMLP(packed, "exact", threshold=policy.gate or 0.0, refine=policy.threshold or 0.0)

    return BrickProgram(policy, policy.chooser, kept, brick.width, read, pack=pack, rate=_TIMED, in_groups=True)


def _in_groups(policy: TopK | Sketch, bundles: Bundles, form: Form, reach: Tensor | None) -> PackedNeurons:
    packed = bundles.groups(form).scored(policy.norm, reach)
    return packed if policy.mean is None else packed.compensated(policy.mean)


def _nibbles(policy: Sketch, bundles: Bundles) -> SparseMLP:
    packed = bundles.every("int8_sliced", policy.smooth)
    packed = bundles.normed(packed, policy.norm)
    packed = packed if policy.mean is None else packed.compensated(policy.mean)
    keep = policy.kept(packed.intermediate_size) if policy.threshold is None else None
    smooth = None if policy.smooth is None else policy.smooth.to(packed.weight.device).reciprocal()
    return SparseMLP(packed, "sketch", keep, policy.threshold, smooth=smooth, refine=policy.refine or 0.0)


@builds(TopK)
def _topk(policy: TopK, brick: Brick) -> BrickProgram:
    kept = policy.kept(brick.width)
    if brick.in_groups and policy.threshold is not None:
        return _by_gates(policy, brick, kept)
    if policy.gate is not None:
        raise PlanError("scores that begin with the gate are of weights in 4 bits: the plan's weights must be int4")
    read = (brick.width * brick.scoring + kept) * brick.row
    return BrickProgram(
        policy, policy.chooser, kept, brick.width, read, native=False, pack=lambda bundles: _exactly(policy, bundles)
    )


def _exactly(policy: TopK, bundles: Bundles) -> SparseMLP:
    return _scored(policy, bundles, exact_scores(bundles, bundles.down_norms() if policy.norm is None else policy.norm))


def exact_scores(bundles: Bundles, norm: Tensor | None) -> ExactScores:
    """|activation| of every neuron, times `norm` where there is one."""
    w = bundles.matrices()
    gate = None if w.gate is None else PackedLinear.pack(w.gate, w.gate_bias)
    up = PackedLinear.pack(w.up, w.up_bias)
    return ExactScores(gate, up, bundles.act, None if norm is None else norm.to(w.up.device))


def _scored(policy: TopK | Sketch, bundles: Bundles, scorer: Callable[[Tensor], Tensor]) -> SparseMLP:
    packed: PackedMLP = bundles.every(None)
    packed = packed if policy.mean is None else packed.compensated(policy.mean)
    keep = policy.kept(packed.intermediate_size) if policy.threshold is None else None
    return SparseMLP(packed, "scored", keep, policy.threshold, scorer=scorer)


@builds(Learned)
def _learned(policy: Learned, brick: Brick) -> BrickProgram:
    kept = policy.kept(brick.width)
    read = policy.rank * (brick.hidden + brick.width) * 4 + kept * (brick.scoring + 1) * brick.row

    def pack(bundles: Bundles) -> SparseMLP:
        packed = bundles.every(None)
        packed = packed if policy.mean is None else packed.compensated(policy.mean)
        keep = kept if policy.threshold is None else None
        reduce, expand, bias = (t.to(packed.weight.device) for t in (policy.reduce, policy.expand, policy.bias))
        predictor = PackedLinear.pack(reduce), PackedLinear.pack(expand, bias)
        return SparseMLP(packed, "learned", keep, policy.threshold, predictor=predictor)

    return BrickProgram(
        policy, policy.chooser, kept, brick.width, read, pack=pack,
        stays=policy.rank * (brick.hidden + brick.width) * 4.0, chosen=(brick.scoring + 1) * brick.row,
    )  # fmt: skip


@builds(Bricks)
def _bricks(policy: Bricks, brick: Brick) -> BrickProgram:
    """A neuron has its brick's score: a learned predictor whose second map hands the scores on."""
    handed_on = torch.nn.functional.one_hot(policy.assignment, policy.count).float()
    bias = policy.bias[policy.assignment]
    scores = Learned(keep=policy.keep, mean=policy.mean, reduce=policy.route, expand=handed_on, bias=bias)
    return replace(_learned(scores, brick), policy=policy)


@builds(Cats)
def _cats(policy: Cats, brick: Brick) -> BrickProgram:
    kept = policy.kept(brick.width)
    if brick.gated:
        read = brick.width * brick.row + kept * 2 * brick.row
        return BrickProgram(
            policy, policy.chooser, kept, brick.width, read,
            pack=lambda bundles: SparseMLP(bundles.every(None), "gate", threshold=policy.threshold),
            stays=brick.width * brick.row, chosen=2 * brick.row,
        )  # fmt: skip
    read = (brick.width + kept) * brick.row
    return BrickProgram(
        policy, policy.chooser, kept, brick.width, read, native=False,
        pack=lambda bundles: SparseMLP(
            bundles.every(None), "scored", threshold=policy.threshold, scorer=exact_scores(bundles, None)
        ),
    )  # fmt: skip


@builds(Teal, Wina)
def _by_inputs(policy: Teal | Wina, brick: Brick) -> BrickProgram:
    kept = policy.kept(brick.width)
    native = policy.thresholds.keys() <= brick.linears
    read = kept * (brick.scoring + 1) * brick.row
    return BrickProgram(
        policy, policy.chooser, kept, brick.width, read, native,
        thresholds=policy.thresholds, by_norm=policy.by_norm, share=policy.keep,
    )  # fmt: skip
