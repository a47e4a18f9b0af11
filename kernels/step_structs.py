"""A described decode step in the structs that native code reads (csrc/arguments.h)."""

from __future__ import annotations

import ctypes
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from . import arguments, cpu
from .experts import SCORINGS, PackedExperts, Router
from .neuron_groups import PackedNeurons
from .packed import PackedLinear
from .sparse import RowLists, SparseLinear, SparseMLP
from .step_model import (
    GATINGS,
    RECURRENT,
    Attention,
    BeforeHead,
    Convolution,
    DenseMLP,
    Heads,
    LatentAttention,
    Linear,
    Norm,
    PlaceIn,
    Recurrence,
    Recurrent,
    SideInputs,
    StepLayer,
    packed_of,
)

_NORM = {"rms": 1, "layer": 2}
_RULE = {**cpu.RULE, "learned": 3}
_NORMS = ("attention_in", "attention_out", "attention_after", "mlp_in", "mlp_out", "mlp_after")
CURVE = len(cpu.ACT)  # kCurve in csrc/formats.h
_OF_ROUTERS = (
    "count", "chosen", "groups", "groups_kept", "by_pairs", "normalized", "added", "floor", "scale", "jitter", "least",
)  # fmt: skip


def embedding_struct(table: Tensor | PackedLinear) -> dict[str, int]:
    if isinstance(table, PackedLinear):
        where, hidden, dtype, stride = table.weight.data_ptr(), table.in_features, table.code, table.stride
    else:
        where, hidden, dtype, stride = table.data_ptr(), table.shape[1], cpu.DTYPE[table.dtype], table.shape[1]
    return {"embedding": where, "hidden": hidden, "embedding_dtype": dtype, "embedding_stride": stride}


def sides_struct(sides: SideInputs | None) -> dict[str, Any]:
    if sides is None:
        return {}
    found = {"side": linear_struct(sides.linear), "side_norm": norm_struct(sides.norm), "side_width": sides.width}
    table = {"side_table": sides.table.data_ptr(), "side_dtype": cpu.DTYPE[sides.table.dtype]}
    return found | table | {"side_scale": sides.scale, "side_table_scale": sides.table_scale, "side_sum": sides.sum}


def before_head_struct(before: BeforeHead | None) -> dict[str, Any]:
    if before is None:
        return {}
    norm, act = norm_struct(before.norm), cpu.ACT[before.act]
    return {"before_head": linear_struct(before.linear), "before_norm": norm, "before_act": act}


def norm_struct(norm: Norm | None) -> arguments.StepNorm:
    if norm is None:
        return arguments.StepNorm()
    return arguments.StepNorm(
        cpu.address(norm.weight), cpu.address(norm.bias), norm.weight.numel(), norm.eps, _NORM[norm.kind]
    )


def linear_struct(linear: Linear | None) -> arguments.StepLinear:
    if linear is None:
        return arguments.StepLinear()
    packed = packed_of(linear)
    weight = packed.weight
    out = arguments.StepLinear(
        weight=weight.data_ptr(), bias=cpu.address(packed.bias), in_=packed.in_features, out=packed.out_features
    )
    if isinstance(linear, SparseLinear):
        out.norm = linear.packed.norm.data_ptr() if linear.by_norm else None
        out.stride, out.dtype, out.columns = weight.stride(0), cpu.DTYPE[weight.dtype], True
        out.least, out.neurons = linear.threshold, linear.neurons
    else:
        out.scale, out.stride, out.whole = cpu.address(linear.scale), linear.stride, linear.whole
        out.dtype = linear.code if linear.grouped else cpu.DTYPE[weight.dtype]
        out.counts, out.tile = cpu.address(linear.counts), 0 if linear.counts is None else linear.tile
    return out


def _bundled(mlp: SparseMLP) -> arguments.StepMlp:
    packed, lists = mlp.packed, mlp.lists
    if isinstance(packed, PackedNeurons):
        return arguments.StepMlp(
            **_lists(lists),
            down_bias=cpu.address(packed.down_bias),
            groups=packed.argument(mlp.threshold or 0.0, mlp.refine),
        )
    names = ("weight", "low", "scale", "norm", "gate_bias", "up_bias", "down_bias", "mean")
    sliced = packed.low is not None
    reduce, expand = mlp.predictor or (None, None)
    return arguments.StepMlp(
        **{name: cpu.address(getattr(packed, name)) for name in names},
        **_lists(lists),
        neurons=packed.intermediate_size,
        stride=packed.weight.shape[2] * (2 if sliced else 1),
        keep=-1 if mlp.keep is None else mlp.keep,
        threshold=mlp.least,
        refine=mlp.refine,
        dtype=cpu.SLICED if sliced else cpu.DTYPE[packed.weight.dtype],
        gated=packed.gated,
        rule=_RULE[mlp.rule],
        reduce=linear_struct(reduce),
        expand=linear_struct(expand),
    )


def _lists(lists: RowLists | None) -> dict[str, int | None]:
    if lists is None:
        return {}
    return {
        "list": lists.listed.data_ptr(),
        "selected": cpu.address(lists.wanted),
        "listed": lists.listed.numel(),
    }


def layer_struct(layer: StepLayer) -> arguments.StepLayer:
    attention, mlp = layer.attention, layer.mlp
    out = _of_attention(attention)
    fields = dict(
        **{name: norm_struct(getattr(layer, name)) for name in _NORMS},
        residual_scale=layer.residual_scale,
        act=CURVE if layer.act == "curve" else cpu.ACT[layer.act],
        curve=cpu.address(layer.curve),
        scale=layer.scale,
        run_attention=attention is not None and not layer.entries_only,
        run_mlp=mlp is not None,
        parallel=layer.parallel,
        special=is_special(layer),
    )
    for name, value in fields.items():
        setattr(out, name, value)
    if isinstance(mlp, DenseMLP):
        out.gate, out.up, out.down = linear_struct(mlp.gate), linear_struct(mlp.up), linear_struct(mlp.down)
        out.inner_norm = norm_struct(mlp.norm)
        out.wanted, out.wanted_rows = cpu.address(mlp.wanted), 0 if mlp.wanted is None else mlp.wanted.shape[0]
    elif isinstance(mlp, PackedExperts):
        _put_experts(out, mlp)
    elif mlp is not None:
        out.mlp = _bundled(mlp)
    if layer.side is not None:
        side = layer.side
        out.side_gate, out.side_out = linear_struct(side.gate), linear_struct(side.out)
        out.side_norm, out.side_act, out.side_at = norm_struct(side.norm), cpu.ACT[side.act], side.at
    return out


# Steps of one model share their attentions, and a prompt that chooses neurons makes a step.
_attentions: WeakKeyDictionary[Attention | LatentAttention | Recurrent, arguments.StepLayer] = WeakKeyDictionary()


def _of_attention(attention: Attention | LatentAttention | Recurrent | None) -> arguments.StepLayer:
    """A layer's struct with nothing but its attention."""
    if attention is None:
        return arguments.StepLayer(v_scale=1.0)
    found = _attentions.get(attention)
    if found is None:
        found = arguments.StepLayer(v_scale=1.0)
        if isinstance(attention, LatentAttention):
            _put_latent(found, attention)
        elif isinstance(attention, Recurrence):
            _put_recurrence(found, attention)
        elif isinstance(attention, Convolution):
            _put_convolution(found, attention)
        elif isinstance(attention, Attention):
            _put_attention(found, attention)
        _attentions[attention] = found
    return arguments.StepLayer.from_buffer_copy(found)


def is_special(layer: StepLayer) -> bool:
    """Whether a layer has what few models have, inside its attention or its MLP."""
    attention, mlp = layer.attention, layer.mlp
    inside = isinstance(attention, Recurrent) or (isinstance(attention, Attention) and attention.special)
    return inside or (isinstance(mlp, DenseMLP) and mlp.norm is not None)


# Thousands of structs in a large model, which all steps over it share.
_matrices: WeakKeyDictionary[PackedExperts, Any] = WeakKeyDictionary()


def _put_experts(out: arguments.StepLayer, mlp: PackedExperts) -> None:
    if mlp not in _matrices:
        linears = [linear_struct(linear) for expert in mlp.experts for linear in (expert.gate, expert.up, expert.down)]
        _matrices[mlp] = (arguments.StepLinear * len(linears))(*linears)
    shared = mlp.shared
    if shared is not None:
        out.gate, out.up, out.down = linear_struct(shared.gate), linear_struct(shared.up), linear_struct(shared.down)
    out.experts = arguments.StepExperts(
        router=_router(mlp.router),
        matrices=ctypes.addressof(_matrices[mlp]),
        shared_gate=linear_struct(mlp.shared_gate),
        limit=mlp.limit,
        slope=mlp.slope,
        offset=mlp.offset,
        shared_scale=mlp.shared_scale,
        by_inputs=mlp.by_inputs,
    )


def _router(router: Router) -> arguments.StepRouter:
    return arguments.StepRouter(
        logits=linear_struct(router.logits),
        correction=cpu.address(router.correction),
        kept=cpu.address(router.kept),
        scoring=SCORINGS.index(router.scoring),
        **{name: getattr(router, name) for name in _OF_ROUTERS},
    )


def _apart(attention: Attention) -> tuple[Heads, Heads, Heads]:
    """The places of heads that lie one after the other."""
    return (0, attention.heads, 0), (0, attention.kv_heads, 0), (0, attention.kv_heads, 0)


def _put_attention(out: arguments.StepLayer, attention: Attention) -> None:
    for name in ("q", "k", "v", "o"):
        setattr(out, name, linear_struct(getattr(attention, name)))
    out.q_norm, out.k_norm = norm_struct(attention.q_norm), norm_struct(attention.k_norm)
    out.heads, out.kv_heads = attention.heads, attention.kv_heads
    out.fused, out.paired, out.turned = attention.order is not None, attention.paired, attention.turned
    for place, name in zip(attention.order or _apart(attention), "qkv", strict=True):
        linear = attention.q if attention.order else getattr(attention, name)
        setattr(out, f"{name}_heads", arguments.StepHeads(*place, linear.out_features))
    if attention.q_place is not None:
        out.q_heads = arguments.StepHeads(*attention.q_place, attention.q.out_features)
    if attention.gate_place is not None:
        gates = attention.gate or attention.q
        out.gate_heads = arguments.StepHeads(*attention.gate_place, gates.out_features)
        out.attention_gate, out.gate_width = linear_struct(attention.gate), attention.gate_width
        out.gating = GATINGS.index(attention.gating)
    out.v_norm, out.attended_norm = norm_struct(attention.v_norm), norm_struct(attention.out_norm)
    out.v_scale = attention.v_scale
    out.slopes, out.sinks = cpu.address(attention.slopes), cpu.address(attention.sinks)
    out.head_dim, out.window = attention.head_dim, attention.window
    out.attention_scale, out.softcap = attention.scale, attention.softcap
    if attention.rotation is not None:
        cos, sin = attention.rotation
        out.rope_dim, out.cos, out.sin = cos.shape[1], cos.data_ptr(), sin.data_ptr()


def _put_latent(out: arguments.StepLayer, attention: LatentAttention) -> None:
    cos, sin = attention.rotation
    out.q, out.k, out.o = linear_struct(attention.q), linear_struct(attention.expand), linear_struct(attention.o)
    out.latent = arguments.StepLatentPart(
        q_low=linear_struct(attention.q_low),
        kv_low=linear_struct(attention.kv_low),
        q_low_norm=norm_struct(attention.q_low_norm),
        kv_low_norm=norm_struct(attention.kv_low_norm),
        apart=attention.apart,
        **{name: getattr(attention, name) for name in ("rank", "nope", "rope", "value")},
    )
    out.heads, out.kv_heads, out.head_dim = attention.heads, 1, attention.rank
    out.rope_dim, out.cos, out.sin, out.paired = cos.shape[1], cos.data_ptr(), sin.data_ptr(), attention.paired
    out.window, out.attention_scale, out.softcap = attention.window, attention.scale, attention.softcap
    out.sinks = cpu.address(attention.sinks)


def _put_recurrence(out: arguments.StepLayer, found: Recurrence) -> None:
    _put_inputs(out, found)
    places = [_place_in(found, place) for place in found.places]
    out.recurrence = arguments.StepRecurrence(
        more=(arguments.StepLinear * 2)(*map(linear_struct, found.inputs[4:])),
        places=(arguments.StepHeads * len(places))(*places),
        from_=(ctypes.c_int * len(places))(*(which for which, _ in found.places)),
        **{name: cpu.address(getattr(found, name)) for name in ("taps", "tap_bias", "fading", "fading_bias")},
        norm=norm_struct(found.norm),
        tap_count=found.taps.shape[1],
        **{name: getattr(found, name) for name in ("read_heads", "heads", "key_dim", "value_dim")},
        most_rate=found.most_rate,
        unit_eps=found.unit_eps,
        tap_act=cpu.ACT[found.tap_act],
        open_act=cpu.ACT[found.open_act],
    )


def _put_convolution(out: arguments.StepLayer, found: Convolution) -> None:
    _put_inputs(out, found)
    out.recurrence = arguments.StepRecurrence(
        taps=cpu.address(found.taps),
        tap_bias=cpu.address(found.tap_bias),
        tap_count=found.taps.shape[1],
        heads=found.channels // found.run,
        value_dim=found.run,
    )
    for name, place in zip(("value", "rate", "open"), found.places, strict=True):
        out.recurrence.places[RECURRENT.index(name)] = _place_in(found, place)


def _put_inputs(out: arguments.StepLayer, found: Recurrent) -> None:
    for name, linear in zip(("q", "k", "v", "attention_gate"), found.inputs, strict=False):
        setattr(out, name, linear_struct(linear))
    out.o = linear_struct(found.o)


def _place_in(found: Recurrent, place: PlaceIn) -> arguments.StepHeads:
    which, heads = place
    return arguments.StepHeads(*heads, packed_of(found.inputs[which]).out_features)
