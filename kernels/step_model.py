"""A whole decode step as data: what `step.Step` carries out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .experts import PackedExperts
from .packed import PackedColumns, PackedLinear
from .sparse import SparseLinear, SparseMLP


@dataclass(frozen=True, eq=False)
class Norm:
    """RMSNorm ("rms") or LayerNorm ("layer"): weight and bias are float32 of the normed size."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    kind: str


Linear = PackedLinear | SparseLinear


@dataclass(frozen=True, eq=False)
class DenseMLP:
    """down(act(gate(x)) * up(x)), each matrix where it lies; gate is None in a plain MLP. norm: of what down reads.
    wanted: uint8 [rows, neurons], or [1, neurons] for all rows: where it is 0, down reads 0; None: all counts."""

    gate: Linear | None
    up: Linear
    down: Linear
    norm: Norm | None = None
    wanted: Tensor | None = None

    @property
    def nbytes(self) -> int:
        linears = (self.gate, self.up, self.down)
        return sum((m.packed if isinstance(m, SparseLinear) else m).nbytes for m in linears if m is not None)


#: what is made of the gates of heads
GATINGS = ("", "sigmoid", "softplus")

Heads = tuple[int, int, int]  # offset, run and step: head h is at offset + h // run * step + h % run * head_dim


@dataclass(frozen=True, eq=False)
class Attention:
    """Grouped-query attention. Projections q, k, v to heads of `head_dim`, and o back.

    order: where `q` holds k and v, too (which are None then): the places of q's, k's and v's heads among its outputs.
    rotation: (cos, sin), each float32 [positions, rope_dim], applied to the first rope_dim dimensions, by halves or, if
    `paired`, to neighbours, each with the angles of the first half; None: none. turned: norms come after it.
    window: how many positions a token sees, itself included; 0: all. softcap: of the scores; 0: none.
    q_place: where q's heads are among its outputs, where these are not all.
    gating: what is made of the numbers that heads are multiplied by before o: see `GATINGS`; "": they are not. gate: a
    projection of what q reads to these, in turn for all heads: as many as a head has, or one for each. None: they are
    among q's outputs, at gate_place.
    v_norm, v_scale: of the heads of v. out_norm: of all that o is given.
    slopes: float32 [heads], what a score loses for each position that its key lies back (ALiBi). sinks: float32
    [heads], a further score in each softmax, which no value belongs to.
    """

    q: Linear
    k: Linear | None
    v: Linear | None
    o: Linear
    head_dim: int
    scale: float
    rotation: tuple[Tensor, Tensor] | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    window: int = 0
    softcap: float = 0.0
    order: tuple[Heads, Heads, Heads] | None = None
    paired: bool = False
    turned: bool = False
    slopes: Tensor | None = None
    sinks: Tensor | None = None
    q_place: Heads | None = None
    gating: str = ""
    gate: Linear | None = None
    gate_place: Heads | None = None
    v_norm: Norm | None = None
    v_scale: float = 1.0
    out_norm: Norm | None = None

    def __post_init__(self) -> None:
        """Raises ValueError where native code would read beside what it is given."""
        counts = (self.heads, self.kv_heads, self.kv_heads)
        for (offset, run, step), count in zip(self.order or (), counts, strict=False):
            last = offset + (count - 1) // run * step + min(run, count) * self.head_dim
            if last > self.q.out_features:
                raise ValueError("heads of q, k or v lie beyond the projection's outputs")
        for norm in (self.q_norm, self.k_norm):
            if norm is not None and norm.weight.numel() != self.head_dim and (self.order is not None or self.turned):
                raise ValueError("heads that lie in turn, or were turned, are normed one by one alone")
        self._check_gates()
        if self.out_norm is not None and self.out_norm.weight.numel() != self.heads * self.head_dim:
            raise ValueError("the norm of what heads attend to is not of all of them")
        if self.v_norm is not None and self.v_norm.weight.numel() != self.head_dim:
            raise ValueError("heads of v are normed one by one alone")
        for per_head in (self.slopes, self.sinks):
            if per_head is not None and per_head.numel() != self.heads:
                raise ValueError("there is not one slope, or one sink, for each head")
        if self.rotation is not None and self.rotation[0].shape[1] > self.head_dim:
            raise ValueError("more dimensions are turned than a head has")

    def _check_gates(self) -> None:
        places = [(self.q_place, self.q, self.head_dim), (self.gate_place, self.gate or self.q, self.gate_width)]
        for place, linear, size in places:
            if place is not None and place[0] + (self.heads - 1) // place[1] * place[2] + size > linear.out_features:
                raise ValueError("heads of q, or their gates, lie beyond the projection's outputs")
        if self.q_place is not None and (self.order is not None or self.q_place[1] != 1):
            raise ValueError("heads of q lie in turn with those of k and v, or in runs")
        if self.q_place is not None and self.q_norm is not None and self.q_norm.weight.numel() != self.head_dim:
            raise ValueError("heads that lie in turn are normed one by one alone")
        if bool(self.gating) != (self.gate_place is not None) or (self.gate_place and self.gate_place[1] != 1):
            raise ValueError("gates are what some function makes of numbers at known places")

    @property
    def special(self) -> bool:
        """Whether heads have gates, or norms and numbers stand inside."""
        return bool(self.gating) or self.v_scale != 1.0 or self.v_norm is not None or self.out_norm is not None

    @property
    def gate_width(self) -> int:
        """Numbers of a head's gate."""
        return self.head_dim if self.gate is None else self.gate.out_features // self.heads

    @property
    def heads(self) -> int:
        return packed_of(self.o).in_features // self.head_dim

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Of a position's entries: heads, and the size of each one's key and value."""
        return self.kv_heads, self.head_dim, self.head_dim

    @property
    def kv_heads(self) -> int:
        if self.k is not None:
            return self.k.out_features // self.head_dim
        return (self.q.out_features // self.head_dim - self.heads) // 2

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(linear for linear in (self.q, self.k, self.v, self.gate, self.o) if linear is not None)


@dataclass(frozen=True, eq=False)
class LatentAttention:
    """Latent attention (DeepSeek-V2, 2405.04434), whose cache has a latent and a turned key for each position.

    q gives nope + rope dimensions of each head, from what q_low gives, normed, where there is one, else from x. kv_low
    gives a latent, which is normed, and `rope` dimensions that are turned, as q's are. expand: floats, from a latent to
    nope dimensions of keys and `value` ones of values, head by head. rotation, paired: as for `Attention`, of those
    that are turned; apart: neighbours are turned, and come to lie half of what is turned apart.
    """

    q_low: Linear | None
    q_low_norm: Norm | None
    q: Linear
    kv_low: Linear
    kv_low_norm: Norm
    expand: PackedLinear
    o: Linear
    heads: int
    rope: int
    scale: float
    rotation: tuple[Tensor, Tensor]
    paired: bool = False
    apart: bool = False
    window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        if self.expand.grouped or self.expand.scale is not None or self.expand.bias is not None:
            raise ValueError("what expands latents must be floats, without a bias")
        if self.rotation[0].shape[1] > self.rope:
            raise ValueError("more dimensions are turned than a head has for it")

    @property
    def rank(self) -> int:
        return self.expand.in_features

    @property
    def nope(self) -> int:
        return packed_of(self.q).out_features // self.heads - self.rope

    @property
    def value(self) -> int:
        return self.expand.out_features // self.heads - self.nope

    @property
    def sizes(self) -> tuple[int, int, int]:
        """See `Attention.sizes`."""
        return 1, self.rank, self.rope

    @property
    def linears(self) -> tuple[Linear, ...]:
        found = (self.q_low, self.q, self.kv_low, self.expand, self.o)
        return tuple(linear for linear in found if linear is not None)


#: what a recurrence reads of a token, in the order of its places
RECURRENT = ("read", "key", "value", "open", "rate", "decay")

PlaceIn = tuple[int, Heads]  # which of the inputs, and where the heads are among its outputs


class Recurrent:
    """What stands in place of an attention and keeps states, which steps write in place, not keys and values."""

    inputs: tuple[Linear, ...]
    o: Linear

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Of a sequence's states: the last inputs of all channels, and what heads hold."""
        raise NotImplementedError

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (*self.inputs, self.o)


@dataclass(frozen=True, eq=False)
class Convolution(Recurrent):
    """A short convolution along the text (LFM2): o(open * sum of each channel's last few value * times, by taps).

    inputs: a projection of x to all three. places: of value, times and open there, each of as many numbers as channels.
    taps: float32 [channels, count]; tap_bias: [channels], or None.
    """

    inputs: tuple[Linear, ...]
    places: tuple[PlaceIn, ...]
    o: Linear
    taps: Tensor
    tap_bias: Tensor | None

    def __post_init__(self) -> None:
        """Raises ValueError where native code would read beside what it is given."""
        ends = [offset + self.channels for _, (offset, _, _) in self.places]
        if len(self.inputs) != 1 or max(ends) > packed_of(self.inputs[0]).out_features or len(ends) != 3:
            raise ValueError("a convolution reads beside what its projection gives")
        if not self.taps.is_contiguous() or self.taps.dtype != torch.float32:
            raise ValueError("taps are float32, and lie one after the other")

    @property
    def channels(self) -> int:
        return self.taps.shape[0]

    @property
    def run(self) -> int:
        """Channels that a thread takes at once."""
        return math.gcd(self.channels, 64)

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        return (tuple(self.taps.shape),)


@dataclass(frozen=True, eq=False)
class Recurrence(Recurrent):
    """The gated delta rule (Yang et al., 2412.06464) in place of an attention. In float32, of each token and head:

        S *= exp(-fading * softplus(decay + fading_bias)); S += key (most_rate * sigmoid(rate) * (value - key S))
        y = norm(read S) * act(open)

    where read, key and value have gone through taps, the weighted sums of each channel's last few inputs, and
    `tap_act`, and read and key have been brought to a length of key_dim^-1/2 and 1: x / sqrt(x x + unit_eps).

    inputs: up to six projections of x. places: where each of RECURRENT is among what they give; rate and decay are one
    number a head. o: back, from all heads. taps: float32 [channels, count] of the heads of read, then key, then value;
    tap_bias: [channels], or None. fading, fading_bias: [heads]. Each of `read_heads` serves as many of `heads` in turn.
    """

    inputs: tuple[Linear, ...]
    places: tuple[PlaceIn, ...]
    o: Linear
    taps: Tensor
    tap_bias: Tensor | None
    fading: Tensor
    fading_bias: Tensor
    norm: Norm
    read_heads: int
    heads: int
    key_dim: int
    value_dim: int
    tap_act: str
    open_act: str
    most_rate: float
    unit_eps: float

    def __post_init__(self) -> None:
        """Raises ValueError where native code would read beside what it is given."""
        counts = (self.read_heads, self.read_heads, *(self.heads,) * 4)
        sizes = (self.key_dim, self.key_dim, self.value_dim, self.value_dim, 1, 1)
        for (which, (offset, run, step)), count, size in zip(self.places, counts, sizes, strict=True):
            last = offset + (count - 1) // run * step + min(run, count) * size
            if last > packed_of(self.inputs[which]).out_features:
                raise ValueError("heads of a recurrence lie beyond what its projections give")
        channels = 2 * self.read_heads * self.key_dim + self.heads * self.value_dim
        per_head = (self.fading, self.fading_bias)
        if not 1 <= len(self.inputs) <= 6 or self.heads % self.read_heads or self.taps.shape[0] != channels:
            raise ValueError("a recurrence has other inputs, heads or taps than it needs")
        if any(x.shape != (self.heads,) for x in per_head) or self.norm.weight.numel() != self.value_dim:
            raise ValueError("there is not one number for each head, or for each of what it gives")
        if not all(x.is_contiguous() and x.dtype == torch.float32 for x in (self.taps, *per_head)):
            raise ValueError("numbers of a recurrence are float32, and lie one after the other")

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(self.taps.shape), (self.heads, self.key_dim, self.value_dim)


@dataclass(frozen=True, eq=False)
class Side:
    """A layer's third half (Gemma 4): x += norm(out(act(gate(x)) * p)), where p are the numbers from `at` on of what a
    token has for all layers. gate: [width, hidden]. out: [hidden, width]."""

    gate: PackedLinear
    out: PackedLinear
    norm: Norm | None
    act: str
    at: int


@dataclass(frozen=True, eq=False)
class SideInputs:
    """What a token has for the third halves of all layers: sum * (norm(scale * linear(x)) + table_scale * its row of
    table), where x is its embedding and `width` numbers of each layer are normed by themselves.
    table: [tokens, all]."""

    linear: PackedLinear
    norm: Norm
    table: Tensor
    width: int
    scale: float
    table_scale: float
    sum: float

    def __post_init__(self) -> None:
        """Raises ValueError where native code would read beside what it is given."""
        if self.linear.out_features != self.table.shape[1] or self.norm.weight.numel() != self.width:
            raise ValueError("what tokens have for all layers is not of one size")
        if not self.table.is_contiguous():
            raise ValueError("rows of a table do not lie one after the other")


@dataclass(frozen=True, eq=False)
class StepLayer:
    """A decoder layer: x += out(attention(in(x))), x = after(x), then the same for the MLP; absent norms are None.

    side: see `Side`. scale: what x is multiplied by in the end. curve: float32 [4], the numbers of an `act` "curve"
    (`packed.Curve`).
    parallel: the MLP reads x as it was before the attention. mlp None: it is skipped. entries_only: the attention is
    skipped but for the keys and values of the new tokens, which are written to the cache. attention None: there
    is none.
    """

    attention: Attention | LatentAttention | Recurrence | Convolution | None
    mlp: DenseMLP | SparseMLP | PackedExperts | None
    act: str
    attention_in: Norm | None = None
    attention_out: Norm | None = None
    mlp_in: Norm | None = None
    mlp_out: Norm | None = None
    residual_scale: float = 1.0
    parallel: bool = False
    entries_only: bool = False
    attention_after: Norm | None = None
    mlp_after: Norm | None = None
    scale: float = 1.0
    curve: Tensor | None = None
    side: Side | None = None


@dataclass(frozen=True, eq=False)
class BeforeHead:
    """A map between the last norm and the LM head: norm(act(linear(x))). linear: [hidden, hidden]."""

    linear: PackedLinear
    act: str
    norm: Norm | None


@dataclass(frozen=True, eq=False)
class StepModel:
    """A decoder: embedding [vocabulary, hidden], or in tiles, layers, a last norm, and the LM head.

    places: [positions, hidden], added to embeddings by position, and embedding_norm, of the sum; token_norm, of
    embeddings before that; None: there is none. before: see `BeforeHead`.
    """

    embedding: Tensor | PackedLinear
    layers: Sequence[StepLayer]
    norm: Norm | None
    head: PackedLinear
    dtype: torch.dtype  # of logits, keys and values
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    places: Tensor | None = None
    embedding_norm: Norm | None = None
    token_norm: Norm | None = None
    before: BeforeHead | None = None
    sides: SideInputs | None = None

    @property
    def hidden(self) -> int:
        table = self.embedding
        return table.in_features if isinstance(table, PackedLinear) else table.shape[1]

    @property
    def vocabulary(self) -> int:
        """How many tokens have an embedding."""
        table = self.embedding
        return table.out_features if isinstance(table, PackedLinear) else table.shape[0]


def packed_of(linear: Linear) -> PackedLinear | PackedColumns:
    """The matrix of a linear, by rows or by columns."""
    return linear.packed if isinstance(linear, SparseLinear) else linear


def all_tiles(model: StepModel) -> bool:
    """Whether all of a step's products are with tiles, which are taken apart once for as many tokens as there are."""
    for layer in model.layers:
        if not isinstance(layer.attention, Attention) or not isinstance(layer.mlp, DenseMLP):
            return False
        mlp = layer.mlp
        linears = [*layer.attention.linears, *(m for m in (mlp.gate, mlp.up, mlp.down) if m is not None)]
        if not all(isinstance(m, PackedLinear) and m.grouped for m in linears):
            return False
    return model.head.grouped
