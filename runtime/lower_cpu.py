"""A described model as the native step of a CPU reads it, with the weights where they lie or packed anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import cpu
from ..kernels import step as native
from ..kernels.experts import Expert, PackedExperts, side_by_side
from ..kernels.ops import PackedLinear, available
from ..kernels.packed import DTYPES, finite
from ..kernels.sparse import SlimMLP, SparseLinear, SparseMLP
from ..predictors.anatomy import Anatomy, Experts, rows_of
from ..predictors.checks import AS_PACKED
from .bundles import PackedBefore
from .calls import NotCovered, NotThisCall, positions_of
from .lower_experts import lower_experts, packed_experts
from .packed_experts import HeldExperts
from .packed_layer import PackedLayer, PackedRows, StandIn
from .reading import read_spec
from .rotary_tables import RotaryTables
from .spec import (
    AttentionSpec,
    BeforeHeadSpec,
    BrickSpec,
    ExpertsSpec,
    LatentSpec,
    LayerSpec,
    LinearSpec,
    ModelSpec,
    NormSpec,
    RecurrenceSpec,
    RecurrentSpec,
    SideInputsSpec,
    SideSpec,
)
from .unpacking import unpack

#: told of a linear as soon as all rows of its matrix are packed
Packed = Callable[[nn.Module, list[PackedLinear]], None]
#: of a linear whose matrix exists in packed form alone, that form; None of others
PackedAlone = Callable[[nn.Module], "list[PackedLinear] | None"]

#: the kernels' names of a plan's formats
KERNEL_FORMATS = {None: None, "int8": "int8_groups", "int4": "int4", AS_PACKED: None}
#: of a recurrence, what its description and the step's have alike
_AS_DESCRIBED = (
    "fading", "fading_bias", "read_heads", "heads", "key_dim", "value_dim", "tap_act", "open_act",
    "most_rate", "unit_eps",
)  # fmt: skip
_OF_ATTENTION = frozenset("qkvo")  # linears by their names in `kernels.step`
HEAD_FORMAT = "int8_groups"  # 4 bits there cost +4.6 % perplexity on the embedded model


@dataclass(frozen=True, eq=False)
class StepProgram:
    """What one decode step computes in place of dense MLPs and linears, with its weights packed, and how many neurons
    that skips per token.

    Whoever makes one keeps it as long as its choice holds: the native step made for it goes with it.

    Attributes:
        mlps: by layer; None: dense.
        skipped: MLP neurons that a token leaves out, where that is known before.
        no_attention, no_mlp: layers that skip these halves; their attention still writes its keys and values.
        as_loaded: read the weights as they were loaded, whatever the plan's format.
        columns: by layer, the linears that leave out small inputs, by their names in `kernels.step`.
        experts: by layer, which experts are kept, uint8 ``[experts]`` or None, and the least weight, as a share of a
            token's greatest, at which one of its experts is computed.
    """

    mlps: Sequence[SparseMLP | SlimMLP | None]
    skipped: int
    no_attention: frozenset[int] = frozenset()
    no_mlp: frozenset[int] = frozenset()
    as_loaded: bool = False
    columns: Mapping[int, Mapping[str, SparseLinear]] = field(default_factory=dict)
    experts: Mapping[int, tuple[Tensor | None, float]] = field(default_factory=dict)

    @classmethod
    def dense(cls, layers: int, *, as_loaded: bool = False) -> StepProgram:
        """Nothing is left out."""
        return cls([None] * layers, 0, as_loaded=as_loaded)

    @property
    def by_rule(self) -> bool:
        """Whether each token chooses neurons, inputs or experts of its own, beyond what a router chooses."""
        return bool(self.columns or self.experts) or any(mlp is not None and mlp.rule != "listed" for mlp in self.mlps)

    @property
    def rounds(self) -> bool:
        """Whether MLPs round what they meet to 8 bits. Two ways to the same x then differ by steps where they differed
        by last bits, and by more where that decides which neurons are kept: on the embedded model by 0.02 to 0.1
        standard deviations of the logits."""
        return any(mlp is not None and mlp.rounds for mlp in self.mlps)


@dataclass(frozen=True, eq=False)
class Packing:
    """In which form native steps read the matrices.

    Attributes:
        weights: None: as loaded; "int8": one byte a weight, in groups; "int4": 4-bit groups, and bytes for the LM head.
        narrow: as loaded, float32 matrices whose very numbers take at most this share of their bytes in another form
            (`cpu.pack_exactly`) are read in that; 0: all where they lie.
        bundled: layers whose MLP no step reads as matrices; these stay where they lie.
        packed: called for each linear, so that who frees its matrix has no more than one layer twice.
        packed_alone: see `PackedAlone`.
        before: what was packed in a format of its own before, and is added to; None where matrices are not to be held.
    """

    weights: str | None = None
    narrow: float = 0.0
    bundled: frozenset[int] = frozenset()
    packed: Packed | None = None
    packed_alone: PackedAlone = lambda module: None
    before: PackedBefore | None = None


class CpuModel:
    """A described model as the native step sees it; `spec` and `rotary` may serve several of them.

    Raises:
        NotCovered: the weights are on a meta device.
    """

    def __init__(self, spec: ModelSpec, rotary: RotaryTables, packing: Packing) -> None:
        if spec.embedding_scale is None:
            raise NotCovered("its weights are not there yet")
        self.spec, self.rotary, self._packing = spec, rotary, packing
        self._format, tables = KERNEL_FORMATS[packing.weights], rotary.tables()
        layers = [
            replace(self._layer(layer, i in packing.bundled, tables[i]), side=self._side(layer.side, i))
            for i, layer in enumerate(spec.layers)
        ]
        self.base = native.StepModel(
            embedding=_table(spec),
            layers=layers,
            norm=_norm(spec.norm),
            head=self._parts(spec.head, HEAD_FORMAT if self._format else None)[0],
            dtype=spec.dtype,
            embedding_scale=spec.embedding_scale,
            logit_scale=spec.logit_scale,
            logit_softcap=spec.logit_softcap,
            places=None if spec.places is None else spec.places.table[spec.places.first :].contiguous(),
            embedding_norm=_norm(spec.embedding_norm),
            token_norm=_norm(spec.token_norm),
            before=self._before_head(spec.before),
            sides=self._sides(spec.sides),
        )

    def step(self, program: StepProgram) -> native.Step:
        layers = [programmed(layer, index, program) for index, layer in enumerate(self.base.layers)]
        return native.Step(replace(self.base, layers=layers))

    def spans(self, program: StepProgram, at: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[native.Step]:
        """Steps of some of the described layers each, where these are parts of the layers `at` of a program."""
        layers = [programmed(layer, index, program) for index, layer in zip(at, self.base.layers, strict=True)]
        return [native.Step(replace(self.base, layers=layers[begin:end]), inner=True) for begin, end in spans]

    def check_end(self, positions: int) -> None:
        """Raises NotThisCall where the model cannot come to so many positions."""
        if self.spec.end is not None and positions > self.spec.end:
            raise NotThisCall(f"the model knows {self.spec.end} positions")

    def reach(self, positions: int) -> None:
        """Makes sure that steps can come to so many positions; raises as `check_end` does."""
        self.check_end(positions)
        self.rotary.reach(positions)

    def positions_of(self, named: dict[str, Any], past: int, start: Tensor) -> Tensor:
        """int64 [rows, length]: the positions of a call's tokens behind `past` others, where each row's text begins at
        `start` int64 [rows]."""
        places = self.spec.places
        if places is None or (places.given and named.get("position_ids") is not None):
            return positions_of(named, past)
        positions = positions_of({**named, "position_ids": None}, past)
        return (positions - start[:, None]).clamp_min(0) if places.by_mask else positions

    def nbytes(self) -> tuple[int, int]:
        """Of all matrices, and of the dense MLPs' and the experts'."""
        mlps: list[Any] = [layer.mlp for layer in self.base.layers if layer.mlp is not None]
        of_mlps = sum(mlp.nbytes for mlp in mlps)
        attentions: list[Any] = [layer.attention for layer in self.base.layers if layer.attention is not None]
        of_attention = sum(m.nbytes for a in attentions for m in a.linears)
        return of_mlps + of_attention + self.base.head.nbytes, of_mlps

    def _before_head(self, before: BeforeHeadSpec | None) -> native.BeforeHead | None:
        if before is None:
            return None
        return native.BeforeHead(self._parts(before.linear, None)[0], before.act, _norm(before.norm))

    def _side(self, side: SideSpec | None, index: int) -> native.Side | None:
        if side is None:
            return None
        assert self.spec.sides is not None
        gate, out = (self._parts(linear, self._format)[0] for linear in (side.gate, side.out))
        return native.Side(gate, out, _norm(side.norm), side.act, index * self.spec.sides.width)

    def _sides(self, sides: SideInputsSpec | None) -> native.SideInputs | None:
        if sides is None:
            return None
        return native.SideInputs(
            self._parts(sides.linear, None)[0],
            lower_norm(sides.norm),
            sides.table.weight.detach(),
            **{name: getattr(sides, name) for name in ("width", "scale", "table_scale", "sum")},
        )

    # --- layers

    def _layer(self, layer: LayerSpec, bundled: bool, rotation: tuple[Tensor, Tensor] | None) -> native.StepLayer:
        mlp: native.DenseMLP | PackedExperts | None = None
        act = "silu"  # of nothing
        if layer.experts is not None:
            mlp, act = self._experts(layer.experts), layer.experts.act
        elif layer.bricks:
            (brick,) = layer.bricks
            mlp, act = _where_it_lies(brick) if bundled else self._mlp(brick), brick.act
        return native.StepLayer(
            attention=None if layer.attention is None else self._attention(layer.attention, rotation),
            mlp=mlp,
            act=act,
            attention_in=_norm(layer.attention_in),
            attention_out=_norm(layer.attention_out),
            mlp_in=_norm(layer.mlp_in),
            mlp_out=_norm(layer.mlp_out),
            residual_scale=layer.residual_scale,
            parallel=layer.parallel,
            attention_after=_norm(layer.attention_after),
            mlp_after=_norm(layer.mlp_after),
            scale=layer.scale,
            curve=layer.bricks[0].curve if layer.bricks else None,
        )

    def _latent(self, attention: LatentSpec, rotation: tuple[Tensor, Tensor] | None) -> native.LatentAttention:
        weight, bias = rows_of(attention.expand.module)
        if self._format is not None:  # the numbers that the patched modules multiply with, as floats
            parts = self._parts(attention.expand, self._format)
            weight = unpack(parts, torch.empty(weight.shape, dtype=torch.float32, device="cpu"))
        if rotation is None or bias is not None:
            raise NotCovered("its latent attention has no rotation, or a bias where it expands latents")
        low = attention.q_low
        return native.LatentAttention(
            q_low=None if low is None else self._parts(low, self._format)[0],
            q_low_norm=_norm(attention.q_low_norm),
            q=self._parts(attention.q, self._format)[0],
            kv_low=self._parts(attention.kv_low, self._format)[0],
            kv_low_norm=lower_norm(attention.kv_low_norm),
            expand=PackedLinear.pack(weight),  # read by rows and by columns: no form of fewer bytes is
            o=self._parts(attention.output, self._format)[0],
            rotation=rotation,
            **{name: getattr(attention, name) for name in ("heads", "rope", "scale", "paired", "apart", "window")},
        )

    def _recurrent(self, found: RecurrentSpec) -> native.Recurrence | native.Convolution:
        alike: dict[str, Any] = {
            "inputs": tuple(self._parts(linear, self._format)[0] for linear in found.inputs),
            "places": found.places,
            "o": self._parts(found.output, self._format)[0],
            "taps": found.taps.detach()[:, 0].float().contiguous(),
            "tap_bias": None if found.tap_bias is None else found.tap_bias.detach().float().contiguous(),
        }
        if not isinstance(found, RecurrenceSpec):
            return native.Convolution(**alike)
        return native.Recurrence(
            **alike, norm=lower_norm(found.norm), **{name: getattr(found, name) for name in _AS_DESCRIBED}
        )

    def _attention(
        self, attention: AttentionSpec | LatentSpec | RecurrentSpec, rotation: tuple[Tensor, Tensor] | None
    ) -> native.Attention | native.LatentAttention | native.Recurrence | native.Convolution:
        if isinstance(attention, LatentSpec):
            return self._latent(attention, rotation)
        if isinstance(attention, RecurrentSpec):
            return self._recurrent(attention)
        q, *others = (part for linear in attention.inputs for part in self._parts(linear, self._format))
        k, v = others or (None, None)
        return native.Attention(
            q, k, v, self._parts(attention.output, self._format)[0],
            head_dim=attention.head_dim,
            scale=attention.scale,
            rotation=rotation,
            q_norm=_norm(attention.q_norm),
            k_norm=_norm(attention.k_norm),
            window=attention.window,
            softcap=attention.softcap,
            order=attention.order,
            paired=attention.paired,
            turned=attention.turned,
            slopes=attention.slopes,
            sinks=None if attention.sinks is None else attention.sinks.detach().float().contiguous(),
            q_place=attention.q_place,
            gating=attention.gating,
            gate=None if attention.gate is None else self._parts(attention.gate, self._format)[0],
            gate_place=attention.gate_place,
            v_norm=_norm(attention.v_norm),
            v_scale=attention.v_scale,
            out_norm=_norm(attention.out_norm),
        )  # fmt: skip

    def _mlp(self, brick: BrickSpec) -> native.DenseMLP:
        parts = [part for linear in brick.linears for part in self._parts(linear, self._format)]
        gate = parts[0] if len(parts) == 3 else None
        return native.DenseMLP(gate, parts[-2], parts[-1], _norm(brick.norm))

    def _experts(self, spec: ExpertsSpec) -> PackedExperts:
        shared = None
        if spec.shared is not None:
            mlp: Any = self._mlp(spec.shared)
            shared = Expert(mlp.gate, mlp.up, mlp.down)
        gate = None if spec.shared_gate is None else self._pack(*rows_of(spec.shared_gate.module), None)
        logits = self._pack(spec.router.weight, spec.router.bias, None)
        held = spec.experts.module
        if isinstance(held, HeldExperts):
            experts = held.experts(whole=self._packing.weights is None)
        else:
            experts = packed_experts(spec, self._pack_experts, narrow=self._format is None)
        return lower_experts(spec, experts, logits, shared, gate)

    # --- matrices

    def _parts(self, linear: LinearSpec, fmt: str | None) -> list[PackedLinear]:
        """A linear's matrix in as many parts as it holds projections."""
        if linear.more is None:
            return self._parts_alone(linear, fmt)
        (whole,) = self._parts_alone(replace(linear, more=None), fmt)
        more = linear.more.detach().float()
        return [replace(whole, bias=more.clone() if whole.bias is None else whole.bias + more)]

    def _parts_alone(self, linear: LinearSpec, fmt: str | None) -> list[PackedLinear]:
        module: Any = linear.module
        if isinstance(module, PackedLayer):
            return _in_parts(module.parts(whole=self._packing.weights is None), linear.rows)
        alone = self._packing.packed_alone(module)
        if alone is not None:
            return alone
        weight, bias = rows_of(module)
        if linear.rows is None:
            parts = [self._pack(weight, bias, fmt)]
        else:
            biases = [None] * linear.parts if bias is None else bias.split(linear.rows)
            pairs = zip(weight.split(linear.rows), biases, strict=True)
            parts = [self._pack(rows, some, fmt) for rows, some in pairs]
        del weight
        if self._packing.packed is not None:
            self._packing.packed(module, parts)
        return parts

    def _pack(self, weight: Tensor, bias: Tensor | None, fmt: str | None) -> PackedLinear:
        return self._pack_all([(weight, bias)], fmt, lambda parts: [packed for packed, _ in parts])[0]

    def _pack_experts(self, matrices: Sequence[tuple[Tensor, Tensor | None]]) -> list[PackedLinear]:
        return self._pack_all(matrices, self._format, side_by_side)

    def _pack_all(
        self,
        matrices: Sequence[tuple[Tensor, Tensor | None]],
        fmt: str | None,
        put: Callable[[Iterator[tuple[PackedLinear, Tensor]]], list[PackedLinear]],
    ) -> list[PackedLinear]:
        """Packs matrices with their biases. put: where packed ones go, with what they were packed from."""
        given = [(weight.detach(), None if bias is None else bias.detach()) for weight, bias in matrices]
        before = self._packing.before
        if before is None or (fmt is None and not self._packing.narrow):  # read where they lie
            return put((self._packed_anew(weight, bias, fmt), weight) for weight, bias in given)
        keys = [(w.data_ptr(), w.shape, w.stride(), fmt or self._packing.narrow) for w, _ in given]
        if not all(key in before for key in keys):
            found = put((self._packed_anew(weight, bias, fmt), weight) for weight, bias in given)
            # with the weight: while it is alive, its address is no other's
            weights = [weight for weight, _ in given]
            before.update(zip(keys, zip(weights, found, strict=True), strict=True))
        return [before[key][1] for key in keys]

    def _packed_anew(self, weight: Tensor, bias: Tensor | None, fmt: str | None) -> PackedLinear:
        narrow = self._packing.narrow if fmt is None else 0.0
        exact = cpu.pack_exactly(weight, bias, most=narrow) if narrow else None
        return exact or PackedLinear.pack(weight, bias, fmt=fmt)


def programmed(layer: native.StepLayer, index: int, program: StepProgram) -> native.StepLayer:
    """What a program leaves of a layer, its `index`-th.

    Raises NotCovered where a native step does not leave that out.
    """
    mlp = None if layer.mlp is None else program.mlps[index]
    if isinstance(layer.mlp, PackedExperts):
        if mlp is not None or program.columns.get(index, {}).keys() - _OF_ATTENTION:
            raise NotCovered("neurons or inputs of a shared expert are left out")
        if index in program.experts:
            layer = replace(layer, mlp=layer.mlp.limited(*program.experts[index]))
    matrices = _slim(mlp) if isinstance(mlp, SlimMLP) else mlp
    kept = None if index in program.no_mlp else layer.mlp if mlp is None else matrices
    norm = layer.mlp_in if mlp is None else _scaled(layer.mlp_in, mlp.smooth)
    layer = replace(layer, mlp=kept, mlp_in=norm, entries_only=index in program.no_attention)
    left_out = index in program.no_attention or program.columns.get(index, {}).keys() & _OF_ATTENTION
    if isinstance(layer.attention, native.Recurrent) and left_out:
        raise NotCovered("a recurrence is left out, or some of what it reads")
    return _by_columns(layer, program.columns.get(index, {}))


def _slim(mlp: SlimMLP) -> native.DenseMLP:
    wanted = None if mlp.lists is None else mlp.lists.by_row(mlp.up.out_features)
    return native.DenseMLP(mlp.gate, mlp.up, mlp.down, wanted=wanted)


def describe(model: Any, anatomy: Anatomy, packing: Packing | None = None) -> CpuModel:
    """The model with its weights where they lie.

    Raises:
        NotCovered: the native step does not describe the model, or cannot run here.
    """
    packing = packing or Packing()
    check_describable(model, anatomy, packing.packed_alone)
    spec = read_spec(model, anatomy)
    try:
        return CpuModel(spec, RotaryTables(spec), Packing(packed_alone=packing.packed_alone))
    except ValueError as reason:
        raise NotCovered(str(reason)) from None


def refusal(model: Any, anatomy: Anatomy) -> str | None:
    """Why decode steps of this model would not run natively, as far as its description tells; None where they would."""
    try:
        describe(model, anatomy)
    except NotCovered as reason:
        return str(reason)
    return None


def check_finite(model: nn.Module) -> None:
    """Raises NotCovered where a matrix has no form of 4 or 8 bits."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and not isinstance(m, PackedLayer)]
    if not all(finite(m.weight.detach()) for m in linears):
        raise NotCovered("weights with infinities or NaNs have no form of 4 or 8 bits")


def check_describable(model: Any, anatomy: Anatomy, packed_alone: PackedAlone) -> None:
    """Raises NotCovered where native code cannot run here, or not on matrices like these."""
    if available("cpu") is not None:
        raise NotCovered(str(available("cpu")))
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    gone = {id(m.weight) for m in linears if isinstance(m, PackedLayer) or packed_alone(m) is not None}
    gone |= {id(m.weight) for m in model.modules() if isinstance(m, PackedRows)}
    gone |= {id(p) for p in model.parameters() if isinstance(p, StandIn)}
    of_routers = {id(p) for experts in anatomy.experts if experts for p in of_router(experts)}
    parameters = [p for p in model.parameters() if id(p) not in gone | of_routers]
    if any(p.device.type != "cpu" for p in parameters):
        raise NotCovered("the model is not on the CPU")
    if len({p.dtype for p in parameters}) > 1 or parameters[0].dtype not in DTYPES:
        raise NotCovered("its parameters are not all float32, all bfloat16 or all float16")


def of_router(experts: Experts) -> Iterator[Tensor]:
    """A router's own parameters, which may have another dtype than the model."""
    if experts.router is not None:
        places = (experts.router.weight_at, experts.router.bias_at, experts.router.correction_at)
        for path, name in (place for place in places if place is not None):
            yield getattr(experts.block.get_submodule(path), name)


def _in_parts(packed: list[PackedLinear], rows: tuple[int, ...] | None) -> list[PackedLinear]:
    """A packed matrix in parts of so many rows, as views.

    Raises:
        NotCovered: a part would begin within a tile.
    """
    if rows is None or len(packed) == len(rows):
        return packed
    if len(packed) != 1:
        raise NotCovered("a fused projection is packed in other parts than its projections")
    parts, first = [], 0
    for count in rows:
        part = packed[0].part(first, count)
        if part is None:
            raise NotCovered("a fused projection is packed in tiles that belong to two projections")
        parts.append(part)
        first += count
    return parts


def _table(spec: ModelSpec) -> Tensor | PackedLinear:
    """The embeddings as steps look them up."""
    if not isinstance(spec.table, PackedRows):
        return spec.embedding
    packed = spec.table.part()
    if packed.grouped:
        return packed
    return packed.weight[:, : packed.in_features].contiguous()  # padding, if there is any, goes


def _where_it_lies(brick: BrickSpec) -> native.DenseMLP:
    w = brick.feed_forward.matrices()
    gate = None if w.gate is None else PackedLinear.pack(w.gate, w.gate_bias)
    up, down = PackedLinear.pack(w.up, w.up_bias), PackedLinear.pack(w.down.t(), w.down_bias)
    return native.DenseMLP(gate, up, down, _norm(brick.norm))


def lower_norm(norm: NormSpec) -> native.Norm:
    """With its weight as the factor of the outputs, float32."""
    if norm.weight is None:
        weight = torch.full((norm.size,), norm.offset, dtype=torch.float32, device="cpu")
    else:
        weight = (norm.slope * norm.weight.detach().float() + norm.offset).contiguous()
    bias = None if norm.bias is None else norm.bias.detach().float().contiguous()
    return native.Norm(weight, bias, norm.eps, norm.kind)


def _norm(norm: NormSpec | None) -> native.Norm | None:
    return None if norm is None else lower_norm(norm)


def _scaled(norm: native.Norm | None, factors: Tensor | None) -> native.Norm | None:
    """A norm whose outputs are multiplied by `factors`, where there are any."""
    if factors is None:
        return norm
    if norm is None:
        raise NotCovered("no norm comes before an MLP whose inputs are smoothed")
    return replace(norm, weight=norm.weight * factors, bias=None if norm.bias is None else norm.bias * factors)


def _by_columns(layer: native.StepLayer, columns: Mapping[str, SparseLinear]) -> native.StepLayer:
    """A layer some of whose linears leave out small inputs."""
    attention: dict[str, Any] = {name: linear for name, linear in columns.items() if name in _OF_ATTENTION}
    mlp: dict[str, Any] = {name: linear for name, linear in columns.items() if name not in attention}
    whole = isinstance(layer.attention, native.Attention) and layer.attention.order is None
    if attention.keys() & {"q", "k", "v"} and not whole:
        raise NotCovered("inputs are left out of a projection that is not one of q, k or v alone")
    if attention and layer.attention is not None:
        layer = replace(layer, attention=replace(layer.attention, **attention))
    if mlp and isinstance(layer.mlp, native.DenseMLP):
        layer = replace(layer, mlp=replace(layer.mlp, **mlp))
    return layer
