"""The model as data: its norms, rotary positions, attentions, bricks and head, as a decode step computes them.

Read from the attribute names that many architectures share, on whatever device the model is (a meta device too).
Weights are referred to, not copied, and nothing is packed: a lowering does that. The names may have another meaning in
some architecture, so that what is read may be wrong: before a lowering's first step is used, its logits are compared
with those of the model's own modules for the same tokens.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.pytorch_utils import Conv1D

from ..predictors.anatomy import Anatomy, Attention, Experts, FeedForward, canonical_activation
from ..predictors.experts import Layout
from ..predictors.routing import Choice
from .calls import NotCovered
from .coverage import uncovered
from .packed_layer import PackedLayer, PackedRows

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
    """

    module: nn.Module
    rows: tuple[int, ...] | None = None

    @property
    def parts(self) -> int:
        return 1 if self.rows is None else len(self.rows)


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """Grouped-query attention. inputs: q, k and v, or one linear that holds all three. rotation: the kind of rotary
    tables; "" where there is no rotation. window: how many positions a token sees, itself included; 0: all. softcap:
    of the scores; 0: none."""

    inputs: tuple[LinearSpec, ...]
    output: LinearSpec
    head_dim: int
    scale: float
    rotation: str | None
    q_norm: NormSpec | None
    k_norm: NormSpec | None
    window: int
    softcap: float


@dataclass(frozen=True, eq=False)
class BrickSpec:
    """A run of neurons: gate, up and down rows, and the activation's name. gate None: plain, or in `up` before its own
    rows where that is `stacked`."""

    gate: LinearSpec | None
    up: LinearSpec
    down: LinearSpec
    act: str
    feed_forward: FeedForward

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
    experts: Experts


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """A decoder layer: x += after(attention(before(x))), then the same for its bricks; absent norms are None.

    bricks: a dense layer's MLP; none where there are `experts`.
    parallel: the bricks read x as it was before the attention.
    """

    attention: AttentionSpec
    bricks: tuple[BrickSpec, ...]
    experts: ExpertsSpec | None
    attention_in: NormSpec | None
    attention_out: NormSpec | None
    mlp_in: NormSpec | None
    mlp_out: NormSpec | None
    residual_scale: float
    parallel: bool


@dataclass(frozen=True, eq=False)
class RotarySpec:
    """Rotary position embeddings, made once for all layers. by_type: whether its module makes a kind for each type of
    layer."""

    module: nn.Module
    by_type: bool


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """A decoder: embedding, layers, a last norm, and the LM head.

    table: the module of the tokens' embeddings.
    embedding_scale: what embeddings are multiplied by; None where that cannot be seen, on a meta device.
    """

    table: nn.Module
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    head: LinearSpec
    rotary: RotarySpec
    dtype: torch.dtype
    embedding_scale: float | None
    logit_scale: float
    logit_softcap: float

    @property
    def embedding(self) -> Tensor:
        """Of the tokens; without numbers where `table` holds them packed."""
        return cast(Tensor, self.table.weight).detach()

    @property
    def linears(self) -> Iterator[LinearSpec]:
        """Every linear once, in the order of the layers, the head last; routers and experts' matrices are none."""
        for layer in self.layers:
            yield from (*layer.attention.inputs, layer.attention.output)
            for brick in layer.bricks:
                yield from brick.linears
            if layer.experts is not None and layer.experts.shared is not None:
                yield from layer.experts.shared.linears
        yield self.head


def read_spec(model: Any, anatomy: Anatomy) -> ModelSpec:
    """Describes `model`.

    Raises:
        NotCovered: something of it is not described by these classes.
    """
    reason = uncovered(anatomy)
    if reason is not None:
        raise NotCovered(reason)
    config = model.config.get_text_config()
    rotary = _rotary(anatomy.stack)
    places = enumerate(windows(model.config, len(anatomy)))
    layers = tuple(_layer(anatomy, index, window, config, rotary) for index, window in places)
    table = model.get_input_embeddings()
    _check_table(table)
    divisor = getattr(config, "logits_scaling", None)
    return ModelSpec(
        table=table,
        layers=layers,
        norm=read_norm(_last_norm(anatomy)),
        head=_linear(model.get_output_embeddings()),
        rotary=rotary,
        dtype=table.weight.dtype,
        embedding_scale=_embedding_scale(anatomy, table),
        logit_scale=1.0 / float(divisor) if divisor else float(getattr(config, "logit_scale", None) or 1.0),
        logit_softcap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module does no more than its matrix and bias say: not an adapter around one, nor one whose matrix is
    computed anew for every pass."""
    forward = type(module).forward
    known = (nn.Linear.forward, Conv1D.forward, PackedLayer.forward)
    plain = forward in known or forward.__qualname__ == "FalconLinear.forward"
    return plain and "weight" in module._parameters


def windows(config: Any, layers: int) -> list[int]:
    """How far back each layer sees (0: all), as the cache that `generate` makes says it."""
    cache = DynamicCache(config=config)
    if len(cache.layers) != layers:
        raise NotCovered("the model does not keep one KV cache layer for each decoder layer")
    kept: Any = cache.layers
    for layer in kept:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise NotCovered(f"its KV cache has layers of type {type(layer).__name__}")
    return [int(layer.sliding_window) if layer.is_sliding else 0 for layer in kept]


# ---- linears and layers ----


def _linear(module: Any, rows: tuple[int, ...] | None = None) -> LinearSpec:
    if not is_plain_linear(module) or not isinstance(module, nn.Linear):
        raise NotCovered(f"a projection is a {type(module).__name__}")
    return LinearSpec(module, rows)


def _layer(anatomy: Anatomy, index: int, window: int, config: Any, rotary: RotarySpec) -> LayerSpec:
    layer, found = anatomy.layers[index], anatomy.attentions[index]
    if found is None:
        raise NotCovered("a layer's attention was not recognised")
    mlp, experts = anatomy.feed_forwards[index], anatomy.experts[index]
    return LayerSpec(
        attention=_attention(found, index, window, config, rotary),
        bricks=(_brick(mlp),) if mlp is not None and experts is None else (),
        experts=None if experts is None else _experts(experts),
        residual_scale=float(getattr(layer, "residual_multiplier", 1.0)),
        **_norms(layer),
    )


def _brick(mlp: FeedForward) -> BrickSpec:
    act = canonical_activation(mlp.act)
    if mlp.norm_name is not None:
        raise NotCovered("a norm stands before the down projection of its MLPs")
    if not isinstance(act, str):
        raise NotCovered("its activation is not one of the kernels'")
    linears = [mlp.up, mlp.down] if mlp.gate_name is None else [getattr(mlp.owner, mlp.gate_name), mlp.up, mlp.down]
    if not all(map(is_plain_linear, linears)):
        raise NotCovered("a projection of an MLP is not a plain linear layer")
    width = mlp.intermediate_size
    up = LinearSpec(mlp.up, (width, width) if mlp.stacked else None)
    gate = None if mlp.gate_name is None else LinearSpec(linears[0])
    return BrickSpec(gate, up, LinearSpec(mlp.down), act, mlp)


def _experts(found: Experts) -> ExpertsSpec:
    router, gating, at = found.router, found.gating, found.layout
    if router is None:
        raise NotCovered("what its router computes is not known")
    act = None if gating is None else canonical_activation(gating.act)
    if gating is None or not isinstance(act, str):
        raise NotCovered("what its experts make of gate and up is not one of the kernels' activations")

    def own(name: str | None) -> Tensor | None:
        return None if name is None else found.parameter(name)

    return ExpertsSpec(
        router=RouterSpec(
            weight=router.weight,
            bias=router.bias,
            correction=router.correction,
            choice=router.choice,
            dtype=torch.float32 if router.upcast else router.weight.dtype,
        ),
        gate=own(at.gate),
        up=found.parameter(at.up),
        down=found.down,
        gate_bias=own(at.gate_bias),
        up_bias=own(at.up_bias),
        down_bias=own(at.down_bias),
        layout=at,
        act=act,
        alpha=gating.alpha,
        shift=gating.shift,
        limit=gating.limit,
        count=found.count,
        width=found.intermediate_size,
        shared=None if found.shared is None else _brick(found.shared),
        shared_gate=None if found.shared_gate is None else _linear(found.shared_gate),
        scaled_inputs=found.scaled_inputs,
        experts=found,
    )


def _attention(found: Attention, index: int, window: int, config: Any, rotary: RotarySpec) -> AttentionSpec:
    module = cast(Any, found.module)
    head_dim = getattr(module, "head_dim", None)
    if not isinstance(head_dim, int):
        raise NotCovered("the attention does not say its head size")
    if len(found.inputs) == 3:
        inputs = tuple(_linear(getattr(module, name)) for name in found.inputs)
    else:
        inputs = (_fused(getattr(module, found.inputs[0]), head_dim, config),)
    scale = getattr(module, "scaling", getattr(module, "scale", None))
    return AttentionSpec(
        inputs=inputs,
        output=_linear(getattr(module, found.output)),
        head_dim=head_dim,
        scale=float(head_dim**-0.5 if scale is None else scale),
        rotation=_kind_of_rotation(module, index, rotary),
        q_norm=_head_norm(getattr(module, "q_norm", None)),
        k_norm=_head_norm(getattr(module, "k_norm", None)),
        window=window,
        softcap=float(getattr(module, "attn_logit_softcapping", None) or 0.0),
    )


def _fused(module: Any, head_dim: int, config: Any) -> LinearSpec:
    """One projection whose rows are those of q, then k, then v."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    if sum(sizes) != getattr(module, "out_features", None):
        raise NotCovered("a fused projection does not hold q, k and v")
    return _linear(module, sizes)


# ---- norms ----


def _norms(layer: nn.Module) -> dict[str, Any]:
    """Where a decoder layer has its norms: before its halves (Llama), after them (OLMo 2), or both (Gemma 2)."""
    has = {
        name: getattr(layer, name)
        for name in (
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
        )
        if isinstance(getattr(layer, name, None), nn.Module)
    }  # fmt: skip
    names = set(has)
    parallel = bool(getattr(layer, "use_parallel_residual", False))
    if names == {"input_layernorm"}:
        places, parallel = {"attention_in": "input_layernorm", "mlp_in": "input_layernorm"}, True
    elif names == {"input_layernorm", "post_attention_layernorm"}:
        places = {"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}
    elif names == {"post_attention_layernorm", "post_feedforward_layernorm"}:
        places = {"attention_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}
    elif len(names) == 4:
        places = {
            "attention_in": "input_layernorm",
            "attention_out": "post_attention_layernorm",
            "mlp_in": "pre_feedforward_layernorm",
            "mlp_out": "post_feedforward_layernorm",
        }
    else:
        raise NotCovered("its decoder layers have other norms than decode steps know")
    absent = dict.fromkeys(("attention_in", "attention_out", "mlp_in", "mlp_out"))
    return {"parallel": parallel, **absent, **{place: read_norm(has[name]) for place, name in places.items()}}


def _last_norm(anatomy: Anatomy) -> nn.Module:
    for name in ("norm", "final_layernorm", "final_layer_norm", "ln_f"):
        module = getattr(anatomy.stack, name, None)
        if isinstance(module, nn.Module):
            return module
    raise NotCovered("no norm before the LM head was found")


def _head_norm(module: Any) -> NormSpec | None:
    return read_norm(module) if isinstance(module, nn.Module) and any(True for _ in module.parameters()) else None


def read_norm(module: nn.Module) -> NormSpec:
    """Describes a norm by what a copy of it, with other weights, does to a sample: classes differ in whether the weight
    is an offset from one (Gemma), or is there at all (OLMo)."""
    unknown = NotCovered(f"a {type(module).__name__} is not a norm that decode steps know")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    own = dict(module.named_parameters())
    size = next((p.shape[-1] for p in own.values()), None) or next(iter(getattr(module, "normalized_shape", ())), None)
    known = own.keys() <= {"weight", "bias"} and all(p.ndim == 1 for p in own.values())
    if not isinstance(eps, float) or not isinstance(size, int) or not known:
        raise unknown
    generator = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(module).to_empty(device="cpu").float()
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.normal_(generator=generator)
        # two samples, for what adds some of its input looks like an offset in one; the second so small that eps counts
        scales = torch.tensor([[1.0], [30 * math.sqrt(eps)]], dtype=torch.float32, device="cpu")
        samples = (torch.randn(2, size, generator=generator, dtype=torch.float32, device="cpu") + 0.5) * scales
        found = probe(samples)
        weight = getattr(probe, "weight", None) if "weight" in own else None
        bias: Tensor = cast(Any, probe).bias if "bias" in own else torch.zeros_like(samples[0])
    for kind in ("rms", "layer"):
        centred = samples - samples.mean(-1, keepdim=True) if kind == "layer" else samples
        base = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        slope, offset = _line(base[0], found[0] - bias, weight)
        factor = torch.full_like(base[0], offset) if weight is None else slope * weight + offset
        if torch.allclose(base * factor + bias, found, rtol=1e-4, atol=1e-4):
            return NormSpec(kind, eps, size, own.get("weight"), own.get("bias"), slope, offset)
    raise unknown


def _line(base: Tensor, found: Tensor, weight: Tensor | None) -> tuple[float, float]:
    """The slope and offset with which base * (slope * weight + offset) comes closest to `found`. Whole numbers where
    these are close: rounding must not make a weight of 1 one of 0.9999999."""
    columns = base.double()[:, None] if weight is None else torch.stack([base * weight, base], 1).double()
    solved = torch.linalg.lstsq(columns, found.double()[:, None]).solution[:, 0].tolist()
    rounded = [float(round(value)) if abs(value - round(value)) < 1e-3 else float(value) for value in solved]
    return (0.0, rounded[0]) if weight is None else (rounded[0], rounded[1])


# ---- positions and embeddings ----


def _rotary(stack: Any) -> RotarySpec:
    module = getattr(stack, "rotary_emb", None)
    if not isinstance(module, nn.Module):
        raise NotCovered("its positions are not rotary embeddings made once for all layers")
    kinds = getattr(module, "rope_type", "default")
    names = set(cast(Any, kinds).values()) if isinstance(kinds, dict) else {kinds}
    if not names <= set(STATIC_ROPE):
        raise NotCovered(f"rotary embeddings of type {', '.join(sorted(names))} change with the length of the text")
    return RotarySpec(module, "layer_type" in inspect.signature(module.forward).parameters)


def _kind_of_rotation(attention: Any, index: int, rotary: RotarySpec) -> str | None:
    if not getattr(attention, "use_rope", True):
        return ""
    if rotary.by_type:
        kind: str = getattr(attention, "layer_type", None) or attention.config.layer_types[index]
        return kind
    return None


def _check_table(module: nn.Module) -> None:
    """Raises NotCovered where tokens' embeddings are not the rows of a matrix."""
    weight, own = module._parameters.get("weight"), type(module).forward.__module__.partition(".")[0]
    known = own in ("torch", "transformers") or isinstance(module, PackedRows)
    if not isinstance(module, nn.Embedding) or weight is None or not known:
        raise NotCovered(f"the token embeddings are a {type(module).__name__}")


def _embedding_scale(anatomy: Anatomy, module: Any) -> float | None:
    """Gemma and Granite scale embeddings; who adds positions to them is not covered."""
    packed = isinstance(module, PackedRows)
    if module.weight.is_meta and not packed:
        return None
    ids = torch.tensor([[1, 2, 3]], device="cpu" if packed else module.weight.device)
    w = (module.rows(ids[0]) if packed else module.weight.detach()[ids[0]]).float()
    x = _input_of_first_layer(anatomy, ids)[0].float()
    scale = float((x * w).sum() / (w * w).sum())
    if not (x - scale * w).norm() <= 1e-2 * x.norm():
        raise NotCovered("the first layer does not read plain token embeddings")
    return 1.0 if abs(scale - 1.0) < 1e-3 else scale


class _Reached(Exception):
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _input_of_first_layer(anatomy: Anatomy, ids: Tensor) -> Tensor:
    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    handle = anatomy.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            type(anatomy.stack).forward(anatomy.stack, input_ids=ids, use_cache=False)  # past what wrap has patched
    except _Reached as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise NotCovered("the first layer was not reached")
