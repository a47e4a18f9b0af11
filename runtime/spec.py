"""The model as data: its norms, positions, attentions, bricks and head, as a decode step computes them.

Weights are referred to, not copied, and nothing is packed: a lowering does that. `reading` makes such a description.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..kernels.step import Heads
from ..predictors.anatomy import Experts, FeedForward
from ..predictors.experts import Layout
from ..predictors.routing import Choice
from .packed_layer import PackedLayer

# Rotation types whose angles depend on the position alone; others depend on the length of the sequence too.
STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


@dataclass(frozen=True, eq=False)
class NormSpec:
    """RMSNorm ("rms") or LayerNorm ("layer"), whose outputs are multiplied by slope * weight + offset: Gemma's weight
    is an offset from one, OLMo has none. weight, bias: the module's own, or None."""

    kind: str
    eps: float
    size: int
    weight: Tensor | None
    bias: Tensor | None
    slope: float
    offset: float


@dataclass(frozen=True, eq=False)
class LinearSpec:
    """A linear module, whose rows are those of one or several projections.

    rows: outputs of each, in order; None: one, of all rows.
    more: ``[outputs]``, added to what the module gives by whoever calls it (GPT-NeoX Japanese); None: nothing is.
    """

    module: nn.Module
    rows: tuple[int, ...] | None = None
    more: Tensor | None = None

    @property
    def parts(self) -> int:
        return 1 if self.rows is None else len(self.rows)


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """Grouped-query attention.

    Attributes:
        inputs: q, k and v, or one linear that holds all three.
        order: where that one has the heads of q, k and v, in turn; None: all of q, then of k, then of v.
        rotation: the kind of rotary tables; "" where there is no rotation.
        paired: whether it turns neighbours (GPT-J, Cohere), not each dimension with that half of them away.
        turned: whether q and k are normed after it.
        window: how many positions a token sees, itself included; 0: all.
        softcap: of the scores; 0: none.
        slopes: float32 ``[heads]``, what a score loses for each position that its key lies back (ALiBi), or None.
        sinks: ``[heads]``, the model's own: a further score in each softmax, which no value belongs to; or None.
        q_place: where q's heads are among its outputs, where these are not all.
        gating: what is made of the numbers that heads are multiplied by before the output: "sigmoid", "softplus";
            "": they are not. gate: a projection of what q reads to these; None: they are among q's outputs.
            gate_place: where each head's numbers are there.
        v_norm, v_scale: of the heads of v. out_norm: of what the output projection is given.
    """

    inputs: tuple[LinearSpec, ...]
    output: LinearSpec
    head_dim: int
    scale: float
    rotation: str | None
    q_norm: NormSpec | None
    k_norm: NormSpec | None
    window: int
    softcap: float
    order: tuple[Heads, Heads, Heads] | None = None
    paired: bool = False
    turned: bool = False
    slopes: Tensor | None = None
    sinks: Tensor | None = None
    q_place: Heads | None = None
    gating: str = ""
    gate: LinearSpec | None = None
    gate_place: Heads | None = None
    v_norm: NormSpec | None = None
    v_scale: float = 1.0
    out_norm: NormSpec | None = None

    @property
    def inside(self) -> bool:
        """Whether heads have gates, or norms and numbers stand inside."""
        return bool(self.gating) or self.v_scale != 1.0 or self.v_norm is not None or self.out_norm is not None


@dataclass(frozen=True, eq=False)
class LatentSpec:
    """Latent attention (DeepSeek-V2, 2405.04434), whose cache has a latent and a turned key for each position.

    Attributes:
        q_low, q_low_norm: where queries have a latent of their own.
        q: the queries of all heads, the last `rope` dimensions of each turned.
        kv_low: a position's latent, normed by kv_low_norm, and the key's part that is turned, the same for all heads.
        expand: from a latent to the rest of the keys, and to the values, head by head.
        apart: neighbours are turned, and come to lie half of what is turned apart (DeepSeek-V3).
        others: see `AttentionSpec`.
    """

    q_low: LinearSpec | None
    q_low_norm: NormSpec | None
    q: LinearSpec
    kv_low: LinearSpec
    kv_low_norm: NormSpec
    expand: LinearSpec
    output: LinearSpec
    heads: int
    rope: int
    scale: float
    rotation: str | None
    window: int
    paired: bool = False
    apart: bool = False

    @property
    def inputs(self) -> tuple[LinearSpec, ...]:
        """All linears but the output."""
        low = () if self.q_low is None else (self.q_low,)
        return (*low, self.q, self.kv_low, self.expand)


@dataclass(frozen=True, eq=False)
class ConvolutionSpec:
    """A short convolution in place of an attention, as `kernels.step_model.Convolution` has it, whose cache has states.

    taps, tap_bias: as `RecurrenceSpec` has them.
    """

    inputs: tuple[LinearSpec, ...]
    output: LinearSpec
    places: tuple[tuple[int, Heads], ...]
    taps: Tensor
    tap_bias: Tensor | None
    rotation: str = ""  # nothing is turned


@dataclass(frozen=True, eq=False)
class RecurrenceSpec:
    """A recurrence in place of an attention, as `kernels.step_model.Recurrence` has it, whose cache has states.

    Attributes:
        taps, tap_bias: the model's own, ``[channels, 1, count]`` and ``[channels]``, or None.
        fading, fading_bias: float32 ``[heads]``.
        others: see there.
    """

    inputs: tuple[LinearSpec, ...]
    output: LinearSpec
    places: tuple[tuple[int, Heads], ...]
    taps: Tensor
    tap_bias: Tensor | None
    fading: Tensor
    fading_bias: Tensor
    norm: NormSpec
    read_heads: int
    heads: int
    key_dim: int
    value_dim: int
    tap_act: str
    open_act: str
    most_rate: float
    unit_eps: float
    rotation: str = ""  # nothing is turned


RecurrentSpec = RecurrenceSpec | ConvolutionSpec


@dataclass(frozen=True, eq=False)
class BrickSpec:
    """A run of neurons: gate, up and down rows, and the activation's name. gate None: plain, or in `up` before its own
    rows where that is `stacked`. norm: of all activations, before the down projection. curve: the numbers of an `act`
    "curve", see `kernels.packed.Curve`."""

    gate: LinearSpec | None
    up: LinearSpec
    down: LinearSpec
    act: str
    feed_forward: FeedForward
    norm: NormSpec | None = None
    curve: Tensor | None = None

    @property
    def stacked(self) -> bool:
        return self.up.parts == 2

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)


@dataclass(frozen=True, eq=False)
class RouterSpec:
    """Which experts a token goes to: logits = x @ weight.T + bias, and what `choice` makes of them.

    Attributes:
        weight: ``[experts, hidden]``, the module's own, as `bias` ``[experts]`` is.
        correction: ``[experts]``, added to the scores for the choice alone; None: none is.
        choice: scoring, top_k, groups, normalisation, scale. `Choice.of` is the definition.
        dtype: in which logits are computed, with x and weight cast to it; all that follows is float32.
    """

    weight: Tensor
    bias: Tensor | None
    correction: Tensor | None
    choice: Choice
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class ExpertsSpec:
    """A mixture of experts: the weighted sum of a token's experts, plus a shared one.

    Attributes:
        gate, up, down: of all experts, the module's own parameters, ``[experts, outputs, inputs]``, or
            ``[experts, inputs, outputs]`` where `layout.transposed`. gate None: plain, or in `up`: before its rows
            where `layout.stacked`, each before its row where `layout.interleaved`.
        gate_bias, up_bias, down_bias: ``[experts, outputs]``, in the same order, or None.
        act: the activation's name. alpha, shift, limit: see `Gating`; alpha None: act is the activation.
        count, width: experts, and the neurons of one.
        shared: an MLP that every token goes through; shared_gate: a linear of one output, by whose sigmoid it counts.
        scaled_inputs: a router's weight multiplies the expert's input, not its output.
        routed_scale, shared_scale: multiply what the experts, and the shared one, give.
        experts: where all this was found. `Experts.mixture` is the definition.
    """

    router: RouterSpec
    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    layout: Layout
    act: str
    alpha: float | None
    shift: float
    limit: float | None
    count: int
    width: int
    shared: BrickSpec | None
    shared_gate: LinearSpec | None
    scaled_inputs: bool
    routed_scale: float
    shared_scale: float
    experts: Experts


@dataclass(frozen=True, eq=False)
class SideSpec:
    """A layer's third half (Gemma 4): x += norm(out(act(gate(x)) * p)), see `SideInputsSpec`."""

    gate: LinearSpec
    out: LinearSpec
    norm: NormSpec | None
    act: str


@dataclass(frozen=True, eq=False)
class SideInputsSpec:
    """What a token has for the third halves of all layers, `width` numbers for each: sum * (norm(scale * linear(x)) +
    table_scale * its row of table), where x is its embedding."""

    linear: LinearSpec
    norm: NormSpec
    table: nn.Embedding
    width: int
    scale: float
    table_scale: float
    sum: float


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """A decoder layer: x += out(attention(in(x))), x = after(x), then the same for its bricks; absent norms are None.

    bricks: a dense layer's MLP; none where there are `experts`.
    parallel: the bricks read x as it was before the attention.
    side: a third half. scale: what x is multiplied by in the end.
    attention None, bricks () and experts None: of a layer that is described in part, what is not (span_reading.py); of
    one that is idle, all: layers that attend to images do nothing where there are none (Mllama).
    """

    attention: AttentionSpec | LatentSpec | RecurrentSpec | None
    bricks: tuple[BrickSpec, ...]
    experts: ExpertsSpec | None
    attention_in: NormSpec | None
    attention_out: NormSpec | None
    mlp_in: NormSpec | None
    mlp_out: NormSpec | None
    residual_scale: float
    parallel: bool
    attention_after: NormSpec | None = None
    mlp_after: NormSpec | None = None
    scale: float = 1.0
    side: SideSpec | None = None

    @property
    def idle(self) -> bool:
        return self.attention is None and not self.bricks and self.experts is None


@dataclass(frozen=True, eq=False)
class BeforeHeadSpec:
    """A map between the decoder and the LM head (ModernBERT): norm(act(linear(x)))."""

    linear: LinearSpec
    act: str
    norm: NormSpec | None


@dataclass(frozen=True, eq=False)
class RotarySpec:
    """Rotary position embeddings, the same for all layers, or all layers of one type.

    module: makes them; by_type: whether it makes a kind for each type of layer.
    table: or they are kept, ``[positions, rotated dimensions]``: sines, then cosines (GPT-J).
    backwards: whether everything is turned the other way (NanoChat).
    """

    module: nn.Module | None
    by_type: bool = False
    table: Tensor | None = None
    backwards: bool = False


@dataclass(frozen=True, eq=False)
class PlacesSpec:
    """Embeddings of positions, added to those of the tokens.

    table: ``[rows, hidden]``, the model's own, of which position 0 has row `first`. by_mask: where no positions are
    given, the model counts them from the first token that its mask does not hide. given: those that are given count.
    """

    table: Tensor
    first: int
    by_mask: bool
    given: bool

    @property
    def count(self) -> int:
        """How many positions there are."""
        return self.table.shape[0] - self.first


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """A decoder: embedding, layers, a last norm, and the LM head.

    table: the module of the tokens' embeddings.
    embedding_scale: what embeddings are multiplied by; None where that cannot be seen, on a meta device.
    places: what positions add to them. embedding_norm: of the sum. token_norm: of the tokens' before that.
    before: a map between the last norm and the LM head. sides: of layers' third halves.
    end: how many positions the model knows; None: no end is known.
    """

    table: nn.Module
    layers: tuple[LayerSpec, ...]
    norm: NormSpec | None
    head: LinearSpec
    rotary: RotarySpec | None
    dtype: torch.dtype
    embedding_scale: float | None
    logit_scale: float
    logit_softcap: float
    places: PlacesSpec | None = None
    embedding_norm: NormSpec | None = None
    token_norm: NormSpec | None = None
    before: BeforeHeadSpec | None = None
    sides: SideInputsSpec | None = None
    end: int | None = None

    @property
    def embedding(self) -> Tensor:
        """Of the tokens; without numbers where `table` holds them packed."""
        return cast(Tensor, self.table.weight).detach()

    @property
    def linears(self) -> Iterator[LinearSpec]:
        """Every linear once, in the order of the layers, the head last; routers and experts' matrices are none."""
        for layer in self.layers:
            if layer.attention is not None:
                yield from layer.attention.inputs
                if isinstance(layer.attention, AttentionSpec) and layer.attention.gate is not None:
                    yield layer.attention.gate
                yield layer.attention.output
            for brick in layer.bricks:
                yield from brick.linears
            if layer.experts is not None and layer.experts.shared is not None:
                yield from layer.experts.shared.linears
            if layer.side is not None:
                yield from (layer.side.gate, layer.side.out)
        if self.sides is not None:
            yield self.sides.linear
        if self.before is not None:
            yield self.before.linear
        yield self.head


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module does no more than its matrix and bias say: not an adapter around one, nor one whose matrix is
    computed anew for every pass."""
    forward = type(module).forward
    known = (nn.Linear.forward, Conv1D.forward, PackedLayer.forward)
    plain = forward in known or forward.__qualname__ == "FalconLinear.forward"
    return plain and "weight" in module._parameters


def beyond_llama(spec: ModelSpec) -> str | None:
    """What of a model is beyond norms before or after the halves of a layer, rotation by halves and grouped-query
    attention; None: nothing. Who carries a description out and does not know every field of it asks first."""
    rotary = spec.rotary
    if spec.places is not None or spec.embedding_norm is not None:
        return "positions are added to its embeddings, or these are normed"
    if rotary is None or rotary.module is None or rotary.backwards:
        return "its positions are not rotary embeddings as most models have them"
    if spec.norm is None:
        return "no norm comes before its LM head"
    more = beside_its_halves(spec)
    if more is not None:
        return more
    return next(filter(None, map(_beyond_llama, spec.layers)), None)


def beside_its_halves(spec: ModelSpec) -> str | None:
    """What of a model no lowering but the native step knows; None: nothing is."""
    if spec.token_norm is not None or spec.before is not None:
        return "its tokens' embeddings are normed by themselves, or a map lies before its LM head"
    if spec.sides is not None:
        return "its layers have third halves"
    if any(layer.idle for layer in spec.layers):
        return "some of its layers are idle while there is text alone"
    if any(layer.scale != 1.0 for layer in spec.layers):
        return "its layers end with a number of their own"
    if any(layer.attention is not None and layer.attention.output.more is not None for layer in spec.layers):
        return "a vector of its own is added to what its attention gives"
    if any(brick.curve is not None for layer in spec.layers for brick in layer.bricks):
        return "its activation is a curve of its own numbers"
    return None


def _beyond_llama(layer: LayerSpec) -> str | None:
    attention, experts = layer.attention, layer.experts
    if attention is None:
        return "a layer has no attention that is described"
    if isinstance(attention, LatentSpec):
        return "its attention is over latents"
    if isinstance(attention, RecurrentSpec):
        return "a recurrence, or a convolution, stands in place of an attention"
    if attention.order is not None or attention.paired or attention.turned:
        return "heads of its attention lie in turn, or are turned by neighbours, or before their norm"
    if attention.slopes is not None or attention.sinks is not None:
        return "its attention has slopes or sinks"
    if attention.inside or any(brick.norm is not None for brick in layer.bricks):
        return "heads of its attention have gates, or norms stand inside of attentions or MLPs"
    if layer.attention_after is not None or layer.mlp_after is not None:
        return "the residual stream itself is normed"
    if experts is not None and (experts.routed_scale, experts.shared_scale) != (1.0, 1.0):
        return "what its experts give is multiplied by numbers"
    return None
