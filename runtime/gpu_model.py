"""A described model as the lowered step of a GPU reads it: matrices where they lie, or packed in groups on the device.

Nothing is computed here; gpu_lowering.py does that. Experts, and what expands latents, are read as floats, whatever a
plan's format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..kernels.experts import Router
from ..kernels.gpu_formats import ExpertMatrices, FloatMatrix, GroupedMatrix, Matrix
from ..kernels.groups import GROUP
from ..kernels.packed import DTYPES, PackedLinear
from ..kernels.step_model import Heads, Norm
from ..predictors.anatomy import Anatomy, rows_of
from .bundles import Weights
from .calls import NotCovered
from .formats import Formats
from .gpu_matrices import GpuFormats, GpuReplaced, GpuWeights, GroupedMLP, kept_first
from .lower_cpu import HEAD_FORMAT, lower_norm, of_router
from .lower_experts import lower_router
from .packed_experts import HeldExperts
from .packed_layer import PackedLayer, PackedRows
from .prepared import Prepared
from .program import Program
from .reading import read_spec
from .release import Replaced
from .rotary_tables import Rotation
from .spec import (
    AttentionSpec,
    BrickSpec,
    ExpertsSpec,
    LatentSpec,
    LayerSpec,
    LinearSpec,
    ModelSpec,
    NormSpec,
    beside_its_halves,
)

#: the kernels' names of a plan's formats, of those that a GPU has
FORMATS = {None: None, "int8": "int8_groups", "int4": "int4"}
#: told of linears as soon as their matrices are packed
Packed = Callable[[nn.Module, list[GroupedMatrix]], None]


@dataclass(frozen=True, eq=False)
class GpuAttention:
    """Grouped-query attention; see `AttentionSpec`.

    Attributes:
        inputs: what gives queries, keys and values, side by side.
        entries: what gives keys and values alone, or `inputs`.
        order: where the heads of q, k and v lie in what `inputs` give. entries_order: and `entries`.
    """

    spec: AttentionSpec
    inputs: tuple[Matrix, ...]
    entries: tuple[Matrix, ...]
    output: Matrix
    heads: int
    kv_heads: int
    order: tuple[Heads, Heads, Heads]
    entries_order: tuple[Heads, Heads, Heads]
    q_norm: Norm | None
    k_norm: Norm | None
    slopes: Tensor | None
    sinks: Tensor | None

    @property
    def head_dim(self) -> int:
        return self.spec.head_dim

    @property
    def nbytes(self) -> int:
        """Of all matrices that a token reads."""
        return sum(matrix.nbytes for matrix in (*self.inputs, self.output))


@dataclass(frozen=True, eq=False)
class GpuLatent:
    """Attention over latents; see `LatentSpec`.

    Attributes:
        inputs: what gives queries, or their latents, and then a position's latent and key, side by side.
        q: from queries' latents to queries; None: `inputs` give these.
        of_keys: ``[heads, rank, numbers of a query that are not turned]``, what those are multiplied by to meet
            latents. of_values: ``[heads, numbers of a value, rank]``.
    """

    spec: LatentSpec
    inputs: tuple[Matrix, ...]
    q: Matrix | None
    q_low_norm: Norm | None
    kv_low_norm: Norm
    of_keys: Tensor
    of_values: Tensor
    output: Matrix

    @property
    def nbytes(self) -> int:
        """Of all matrices that a token reads."""
        of_heads = sum(t.numel() * t.element_size() for t in (self.of_keys, self.of_values))
        return of_heads + sum(m.nbytes for m in (*self.inputs, self.q, self.output) if m is not None)


@dataclass(frozen=True, eq=False)
class GpuMLP:
    """down(act(gate) * up) of what `widening` gives, gate and up side by side; of a plain MLP down(act(up))."""

    widening: tuple[Matrix, ...]
    down: Matrix
    gated: bool
    act: str

    @property
    def nbytes(self) -> int:
        """Of all matrices that a token reads."""
        return sum(matrix.nbytes for matrix in (*self.widening, self.down))


@dataclass(frozen=True, eq=False)
class GpuExperts:
    """A mixture of experts; see `ExpertsSpec`.

    Attributes:
        logits: the router's matrix, and that of the shared expert's gate, which read the same.
        shared: what every token goes through, whose output counts shared_scale times.
    """

    router: Router
    logits: tuple[FloatMatrix, ...]
    matrices: ExpertMatrices
    shared: GpuMLP | None
    shared_scale: float

    @property
    def nbytes(self) -> int:
        """Of all matrices that a token reads."""
        of_experts = self.matrices.nbytes * self.router.chosen // self.router.count
        return of_experts + sum(part.nbytes for part in (*self.logits, self.shared) if part is not None)


@dataclass(frozen=True, eq=False)
class GpuLayer:
    """See `LayerSpec`."""

    attention: GpuAttention | GpuLatent
    mlp: GpuMLP | GpuExperts
    attention_in: Norm | None
    attention_out: Norm | None
    attention_after: Norm | None
    mlp_in: Norm | None
    mlp_out: Norm | None
    mlp_after: Norm | None
    residual_scale: float
    parallel: bool


@dataclass(frozen=True, eq=False)
class GpuModel:
    """See `ModelSpec`. rotations: by kind of tables."""

    spec: ModelSpec
    table: Tensor
    places: Tensor | None
    embedding_norm: Norm | None
    layers: tuple[GpuLayer, ...]
    norm: Norm | None
    head: Matrix
    rotations: dict[str | None, Rotation]

    @property
    def nbytes(self) -> int:
        """Of all matrices that a step of one token reads."""
        return self.head.nbytes + sum(layer.attention.nbytes + layer.mlp.nbytes for layer in self.layers)


class GpuPacking:
    """In which form a step on a GPU reads the matrices.

    Args:
        weights: None: as loaded; "int8": groups of 8 bits; "int4": of 4 bits, and of 8 for the LM head.
        formats: holds what is packed; None: nothing is.
        kept: by layer, neurons that every step under the plan computes, and no others.
        packed: see `Packed`; who frees a matrix has no more than one layer twice.
    """

    def __init__(
        self,
        weights: str | None,
        formats: GpuFormats | None = None,
        kept: Mapping[int, Tensor] | None = None,
        packed: Packed = lambda module, parts: None,
    ) -> None:
        self.weights, self._formats, self.kept, self._packed = weights, formats, kept or {}, packed
        self.format = FORMATS.get(weights)

    def side_by_side(self, linears: Sequence[LinearSpec], fmt: str | None) -> tuple[Matrix, ...]:
        """The matrices of linears that read the same input: one, where they are packed together, else each as it
        lies."""
        if fmt is None or self._formats is None:
            return tuple(_where_it_lies(linear.module) for linear in linears)
        found = [self._formats.held(linear.module) for linear in linears]
        if all(found):
            parts = [part for held in found for part in held or ()]
            whole = _whole_of(parts)
            return tuple(parts) if whole is None else (whole,)
        parts = [GroupedMatrix.round(*_floats(linear.module), fmt) for linear in linears]
        whole, first = parts[0] if len(parts) == 1 else GroupedMatrix.stack(parts), 0
        for linear, part in zip(linears, parts, strict=True):
            self._hold(linear.module, [whole.rows(first, part.out_features)])
            first += part.out_features
        return (whole,)

    def kept_first(self, index: int, brick: BrickSpec) -> GroupedMLP | None:
        """The neurons that the plan keeps in a layer, of an MLP that is packed with these first: its steps read no
        list, and nothing is copied. None where that cannot be."""
        formats, fmt, keep = self._formats, self.format, self.kept.get(index)
        if formats is None or fmt is None or keep is None or any(_bias_of(linear) for linear in brick.linears[:-1]):
            return None
        if index not in formats.kept:
            if any(formats.held(linear.module) for linear in brick.linears):
                return None
            formats.kept[index] = self._permuted(brick, keep, fmt)
        return formats.kept[index]

    def _permuted(self, brick: BrickSpec, keep: Tensor, fmt: str) -> GroupedMLP:
        halves = [half for linear in brick.linears[:-1] for half in _halves(linear)]
        width, k = halves[0].shape[0], keep.numel()
        others = torch.ones(width, dtype=torch.bool, device=keep.device)
        others[keep] = False
        order = torch.cat([keep, others.nonzero()[:, 0]]).to(halves[0].device)
        pieces = [half[some] for some in (order[:k], order[k:]) for half in halves]
        whole = GroupedMatrix.round(torch.cat(pieces), None, fmt)
        del pieces
        count = len(halves)
        parts = [[whole.rows(i * k, k), whole.rows(count * k + i * (width - k), width - k)] for i in range(count)]
        first = list(brick.linears[:-1])
        if len(first) == count:
            for linear, rows in zip(first, parts, strict=True):
                self._hold(linear.module, rows)
        else:
            self._hold(first[0].module, [part for rows in parts for part in rows])
        weight, bias = _floats(brick.down.module)
        down = GroupedMatrix.round(weight[:, order], bias, fmt)
        self._hold(brick.down.module, [down])
        groups = min(-(-k // GROUP) * GROUP, width)
        return GroupedMLP((whole.rows(0, count * k),), down.inputs(groups), count == 2, brick.act)

    def _hold(self, module: nn.Module, parts: list[GroupedMatrix]) -> None:
        if self._formats is not None:
            self._formats.hold(module, parts)
        self._packed(module, parts)


class Host(Protocol):
    """A wrapped model, as packing for a GPU needs it."""

    program: Program
    replaced: Replaced | None
    prepared: Prepared


def packing_of(host: Any, formats: Formats, weights: Weights) -> GpuPacking:
    """How a GPU's lowered steps read a wrapped model's matrices. host: a `Host`; formats, weights: the model's."""
    known: Host = host
    if not isinstance(formats, GpuFormats):
        return GpuPacking(known.program.weights)
    weights.in_groups_of_gpu = GpuWeights(weights, formats)

    def packed(module: nn.Module, parts: list[GroupedMatrix]) -> None:
        if isinstance(known.replaced, GpuReplaced):
            known.prepared.let_go(module)  # which holds the matrix
            known.replaced.hold(module, parts)

    return GpuPacking(known.program.weights, formats, kept_first(known.program), packed)


def _where_it_lies(module: Any) -> FloatMatrix:
    if isinstance(module, PackedLayer):
        raise NotCovered("its matrices are packed for a CPU")
    weight, bias = rows_of(module)
    return FloatMatrix(weight.detach(), None if bias is None else bias.detach())


def _floats(module: Any) -> tuple[Tensor, Tensor | None]:
    lies = _where_it_lies(module)
    if lies.weight.is_meta or not bool(lies.weight.isfinite().all()):
        raise NotCovered("weights with infinities or NaNs have no form of 4 or 8 bits")
    return lies.weight, lies.bias


def _bias_of(linear: LinearSpec) -> bool:
    return getattr(linear.module, "bias", None) is not None


def _halves(linear: LinearSpec) -> list[Tensor]:
    """A linear's matrix by the projections that it holds."""
    weight, _ = _floats(linear.module)
    return [weight] if linear.rows is None else list(weight.split(linear.rows))


def _whole_of(parts: list[GroupedMatrix]) -> GroupedMatrix | None:
    """The matrix whose rows parts are, in turn, where they lie so."""
    first, at = parts[0], 0
    for part in parts:
        same = part.words.untyped_storage().data_ptr() == first.words.untyped_storage().data_ptr()
        if not same or part.words.storage_offset() != first.words.storage_offset() + at * first.words.stride(0):
            return None
        at += part.out_features
    words = first.words.as_strided((at, *first.words.shape[1:]), first.words.stride())
    ends = first.ends.as_strided((at, first.ends.shape[1]), first.ends.stride())
    biases = [part.bias for part in parts]
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([torch.zeros(p.out_features, device=p.device) if p.bias is None else p.bias for p in parts])
    return GroupedMatrix(words, ends, first.in_features, bias)


def describe(model: Any, anatomy: Anatomy) -> ModelSpec:
    """
    Raises:
        NotCovered: the lowered step does not cover the model.
    """
    parameters = [p for p in model.parameters() if not p.is_meta]
    if len({p.device for p in parameters}) > 1:
        raise NotCovered("its parameters are not all on one device")
    of_routers = {id(p) for experts in filter(None, anatomy.experts) for p in of_router(experts)}
    dtypes = {p.dtype for p in parameters if id(p) not in of_routers}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise NotCovered("its parameters are not all float32, all bfloat16 or all float16")
    spec = read_spec(model, anatomy)
    if spec.embedding_scale is None:
        raise NotCovered("its weights are not there yet")
    if isinstance(spec.table, PackedRows):
        raise NotCovered("its embeddings are packed for a CPU")
    more = beside_its_halves(spec)
    if more is not None:
        raise NotCovered(more)
    for layer in spec.layers:
        attention = layer.attention
        if isinstance(attention, LatentSpec) and (
            attention.rotation == "" or rows_of(attention.expand.module)[1] is not None
        ):
            raise NotCovered("its latent attention has no rotation, or a bias where it expands latents")
        if (isinstance(attention, AttentionSpec) and attention.inside) or any(
            brick.norm is not None for brick in layer.bricks
        ):
            raise NotCovered("heads have gates, or norms stand inside of attentions or MLPs")
    return spec


def lower(spec: ModelSpec, packing: GpuPacking) -> GpuModel:
    """The model with matrices as `packing` says, layer by layer.

    Raises:
        NotCovered: a matrix has no such form.
    """
    if packing.weights not in FORMATS:
        raise NotCovered(f"weights in {packing.weights} have no form on a GPU")
    device = spec.embedding.device
    kinds = dict.fromkeys(layer.attention.rotation for layer in spec.layers if layer.attention is not None)
    places = spec.places
    return GpuModel(
        spec=spec,
        table=spec.embedding,
        places=None if places is None else places.table[places.first :].detach(),
        embedding_norm=_norm(spec.embedding_norm, device),
        layers=tuple(_layer(index, layer, packing, device) for index, layer in enumerate(spec.layers)),
        norm=_norm(spec.norm, device),
        head=packing.side_by_side([spec.head], HEAD_FORMAT if packing.format else None)[0],
        rotations={kind: Rotation(spec.rotary, kind, device) for kind in kinds if kind != "" and spec.rotary},
    )


def _layer(index: int, layer: LayerSpec, packing: GpuPacking, device: torch.device) -> GpuLayer:
    assert layer.attention is not None
    lowered = _latent if isinstance(layer.attention, LatentSpec) else _attention
    names = ("attention_in", "attention_out", "attention_after", "mlp_in", "mlp_out", "mlp_after")
    norms: dict[str, Any] = {name: _norm(getattr(layer, name), device) for name in names}
    return GpuLayer(
        attention=lowered(cast(Any, layer.attention), packing, device),
        mlp=_mlp(packing.kept_first(index, layer.bricks[0]) or layer.bricks[0], packing)
        if layer.experts is None
        else _experts(layer.experts, packing),
        residual_scale=layer.residual_scale,
        parallel=layer.parallel,
        **norms,
    )


def _attention(spec: AttentionSpec, packing: GpuPacking, device: torch.device) -> GpuAttention:
    inputs = packing.side_by_side(spec.inputs, packing.format)
    (output,) = packing.side_by_side([spec.output], packing.format)
    d, width = spec.head_dim, sum(matrix.out_features for matrix in inputs)
    heads = output.in_features // d
    kv_heads = (width // d - heads) // 2
    order = spec.order or _in_turn(0, heads, kv_heads, d)
    entries, entries_order = inputs, order
    if len(spec.inputs) == 3:  # keys and values can be had without the queries
        parts = inputs[1:] if len(inputs) == 3 else (inputs[0].rows(heads * d, 2 * kv_heads * d),)
        entries, entries_order = parts, _in_turn(-heads * d, heads, kv_heads, d)
    return GpuAttention(
        spec, inputs, entries, output, heads, kv_heads, order, entries_order,
        _norm(spec.q_norm, device), _norm(spec.k_norm, device),
        slopes=None if spec.slopes is None else spec.slopes.to(device),
        sinks=None if spec.sinks is None else spec.sinks.detach().float().contiguous(),
    )  # fmt: skip


def _latent(spec: LatentSpec, packing: GpuPacking, device: torch.device) -> GpuLatent:
    first = spec.q if spec.q_low is None else spec.q_low
    (output,) = packing.side_by_side([spec.output], packing.format)
    (expand,) = packing.side_by_side([spec.expand], packing.format)
    weight = expand.weight if isinstance(expand, FloatMatrix) else expand.floats(rows_of(spec.q.module)[0].dtype)
    weight = weight.unflatten(0, (spec.heads, -1))
    values = output.in_features // spec.heads
    kv_low_norm = _norm(spec.kv_low_norm, device)
    assert kv_low_norm is not None
    return GpuLatent(
        spec=spec,
        inputs=packing.side_by_side([first, spec.kv_low], packing.format),
        q=None if spec.q_low is None else packing.side_by_side([spec.q], packing.format)[0],
        q_low_norm=_norm(spec.q_low_norm, device),
        kv_low_norm=kv_low_norm,
        of_keys=weight[:, :-values].transpose(1, 2),
        of_values=weight[:, -values:],
        output=output,
    )


def _in_turn(first: int, heads: int, kv_heads: int, d: int) -> tuple[Heads, Heads, Heads]:
    """All heads of q from `first` on, then all of k, then all of v."""
    k = first + heads * d
    return (first, heads, 0), (k, kv_heads, 0), (k + kv_heads * d, kv_heads, 0)


def _mlp(brick: BrickSpec | GroupedMLP, packing: GpuPacking) -> GpuMLP:
    if isinstance(brick, GroupedMLP):
        return GpuMLP(brick.widening, brick.down, brick.gated, brick.act)
    first = [brick.up] if brick.gate is None else [brick.gate, brick.up]
    (down,) = packing.side_by_side([brick.down], packing.format)
    gated = brick.gate is not None or brick.stacked
    return GpuMLP(packing.side_by_side(first, packing.format), down, gated, brick.act)


def _experts(spec: ExpertsSpec, packing: GpuPacking) -> GpuExperts:
    if isinstance(spec.experts.module, HeldExperts):
        raise NotCovered("its experts are packed for a CPU")
    if spec.shared is not None and spec.shared.norm is not None:
        raise NotCovered("a norm stands inside of a shared expert")
    at, whole, biases = spec.layout, spec.up.transpose(1, 2) if spec.layout.transposed else spec.up, spec.up_bias
    gates, ups = (
        (slice(0, None, 2), slice(1, None, 2)) if at.interleaved else (slice(spec.width), slice(-spec.width, None))
    )
    gate, gate_bias = spec.gate, spec.gate_bias
    if gate is not None and at.transposed:
        gate = gate.transpose(1, 2)
    if at.stacked or at.interleaved:
        gate, gate_bias = whole[:, gates], None if biases is None else biases[:, gates]
        whole, biases = whole[:, ups], None if biases is None else biases[:, ups]
    logits = PackedLinear.pack(spec.router.weight, spec.router.bias)
    matrix = FloatMatrix(logits.weight[:, : logits.in_features], logits.bias)
    return GpuExperts(
        router=lower_router(spec.router, logits, spec.routed_scale),
        logits=(matrix, *(() if spec.shared_gate is None else (_where_it_lies(spec.shared_gate.module),))),
        matrices=ExpertMatrices(
            gate, whole, spec.down.transpose(1, 2) if at.transposed else spec.down,
            gate_bias, biases, spec.down_bias, spec.act, spec.limit or 0.0, 1.0 if spec.alpha is None else spec.alpha,
            spec.shift, spec.scaled_inputs,
        ),
        shared=None if spec.shared is None else _mlp(spec.shared, packing),
        shared_scale=spec.shared_scale,
    )  # fmt: skip


def _norm(norm: NormSpec | None, device: torch.device) -> Norm | None:
    if norm is None:
        return None
    found = lower_norm(norm)
    bias = None if found.bias is None else found.bias.to(device)
    return Norm(found.weight.to(device), bias, found.eps, found.kind)
