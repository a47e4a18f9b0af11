"""What a decoder layer's attention computes, found by trying what models do: the first reading that gives the keys and
values in the cache, and what the output projection was given, in a pass of a few tokens, is the model's.

Without a pass, on a meta device, names and sizes have to do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels.step import Heads
from ..predictors.anatomy import Attention
from .attention_formula import Table, attended, turned
from .attention_names import kind_of_rotation, linear, told_scales
from .calls import NotCovered
from .latent_reading import read_latent
from .norms import normed, read_norm
from .rotary_tables import table_of
from .spec import AttentionSpec, LatentSpec, LinearSpec, NormSpec, RotarySpec
from .tracing import Trace

Order = tuple[Heads, Heads, Heads]


def read_attention(
    found: Attention, index: int, window: int, config: Any, rotary: RotarySpec | None, seen: Trace | None
) -> AttentionSpec | LatentSpec:
    """Describes the attention of layer `index`.

    Raises:
        NotCovered: it is of no kind that is described, or, in a pass, gave something else.
    """
    latent = None if seen is None else read_latent(found, index, window, rotary, seen)
    if latent is not None:
        return latent
    spec = _by_name(found, index, window, config, rotary, seen)
    if seen is None:
        return spec
    evidence = _evidence(found, index, seen)
    for reading in _readings(spec, evidence, cast(Any, found.module), seen.named(found.module)):
        given = _given(reading, evidence, rotary, seen)
        if given is not None:
            return given
    raise NotCovered("what its attention computes is not known")


# ---- by names ----


def _by_name(
    found: Attention, index: int, window: int, config: Any, rotary: RotarySpec | None, seen: Trace | None
) -> AttentionSpec:
    module = cast(Any, found.module)
    head_dim = getattr(module, "head_dim", None) if seen is None else seen.keys[index].shape[-1]
    if not isinstance(head_dim, int):
        raise NotCovered("the attention does not say its head size")
    if seen is None and (found.gate is not None or _norms_inside(module) or _head_norm(module, "v", head_dim)):
        raise NotCovered("its attention has gates, or norms of its own")
    if len(found.inputs) == 3:
        inputs = tuple(linear(found.part(name)) for name in found.inputs)
    elif len(found.inputs) == 1:
        inputs = (_fused(found.part(found.inputs[0]), head_dim, config, found, index, seen),)
    else:
        raise NotCovered(f"its attention has {len(found.inputs)} projections before it")
    scale = getattr(module, "scaling", getattr(module, "scale", None))
    return AttentionSpec(
        inputs=inputs,
        output=linear(found.part(found.output)),
        head_dim=head_dim,
        scale=float(scale) if isinstance(scale, (int, float)) else head_dim**-0.5,
        rotation=kind_of_rotation(module, index, rotary),
        q_norm=_head_norm(module, "q", head_dim),
        k_norm=_head_norm(module, "k", head_dim),
        v_norm=_head_norm(module, "v", head_dim),
        window=window,
        softcap=float(getattr(module, "attn_logit_softcapping", None) or 0.0),
        sinks=getattr(module, "sinks", None),
    )


def _fused(module: Any, head_dim: int, config: Any, found: Attention, index: int, seen: Trace | None) -> LinearSpec:
    """One projection whose rows are those of q, then k, then v, as far as is known yet."""
    if seen is None:
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", heads)
    else:
        output = found.part(found.output)
        heads, kv_heads = seen.given(output).shape[-1] // head_dim, seen.keys[index].shape[0]
    sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    plain = linear(module, sizes)
    if sum(sizes) != (seen.gave(module).shape[-1] if seen else getattr(module, "out_features", None)):
        raise NotCovered("a fused projection does not hold q, k and v")
    return plain


_WORDS = {"q": "query", "k": "key", "v": "value"}


def _of_heads(name: str) -> bool:
    """Whether a norm's name says whose heads it norms."""
    return name.partition("_")[0] in (*_WORDS, *_WORDS.values(), "qk")


def _norms_inside(attention: nn.Module) -> list[nn.Module]:
    """The norms in an attention that are of none of its heads."""
    named = attention.named_children()
    return [m for name, m in named if "norm" in name and not _of_heads(name) and not isinstance(m, nn.Identity)]


def _head_norm(attention: nn.Module, letter: str, head_dim: int) -> NormSpec | None:
    """The norm of q's heads, or of k's, or of both: whose name says so."""
    for name, module in attention.named_children():
        if "norm" in name and name.partition("_")[0] in (letter, _WORDS[letter], *(("qk",) if letter != "v" else ())):
            return None if isinstance(module, nn.Identity) else read_norm(module, head_dim)
    return None


# ---- by values ----


@dataclass(frozen=True, eq=False)
class _Evidence:
    """Of one layer in a pass: what the projections gave, the cache has, and the output projection was given."""

    projected: list[Tensor]  # [tokens, outputs]
    keys: Tensor  # [kv_heads, tokens, head_dim]
    values: Tensor
    attended: Tensor  # [tokens, heads * head_dim]
    gates: Tensor | None  # [tokens, outputs]: of a projection beside q, k and v
    gate: LinearSpec | None
    norms: list[nn.Module]  # in the attention, of none of its heads


def _evidence(found: Attention, index: int, seen: Trace) -> _Evidence:
    module = cast(Any, found.module)
    keys, values = seen.keys[index], seen.values[index]
    if keys.shape != values.shape:
        raise NotCovered("its keys and values have heads of different sizes")
    projected = [seen.gave(found.part(name)) for name in found.inputs]
    gates = None if found.gate is None else seen.gave(found.part(found.gate))
    gate = None if found.gate is None else linear(found.part(found.gate))
    return _Evidence(projected, keys, values, seen.given(found.part(found.output)), gates, gate, _norms_inside(module))


def _readings(spec: AttentionSpec, evidence: _Evidence, module: Any, named: dict[str, Any]) -> Iterator[AttentionSpec]:
    """What the attention may be, the likeliest first."""
    heads = evidence.attended.shape[-1] // spec.head_dim
    rotations = [(spec.rotation, False), (spec.rotation, True), ("", False)] if spec.rotation != "" else [("", False)]
    scales = list(dict.fromkeys([spec.scale, *told_scales(module), spec.head_dim**-0.5, 1.0]))
    biases_of_keys = alibi(named)
    slopes = None if biases_of_keys is None else biases_of_keys.float()[:, 0].diff(dim=-1)[:, -1].cpu().contiguous()
    biases = [None] if slopes is None else [slopes, *(slopes * scale for scale in scales)]
    norms = [False] if spec.q_norm is None and spec.k_norm is None else [False, True]
    orders = [None] if len(spec.inputs) == 3 else [None, *_orders(heads, evidence.keys.shape[0], spec.head_dim)]
    for order, (rotation, paired), after in itertools.product(orders, rotations, norms):
        inputs = spec.inputs if order is None else (LinearSpec(spec.inputs[0].module),)
        some = replace(spec, inputs=inputs, order=order, rotation=rotation, paired=paired, turned=after)
        for scale, bias in itertools.product(scales, biases):
            yield replace(some, scale=scale, slopes=bias)


def alibi(named: dict[str, Any]) -> Tensor | None:
    """The biases of scores that an attention was given, ``[heads, 1, keys]``, if it was given any."""
    biases = (named.get(name) for name in ("alibi", "position_bias"))
    return next((bias for bias in biases if isinstance(bias, Tensor) and bias.ndim == 3 and bias.shape[1] == 1), None)


def _orders(heads: int, kv_heads: int, d: int) -> Iterator[Order]:
    """In which orders one projection may hold q, k and v."""
    each = heads // kv_heads
    step = (each + 2) * d  # of a KV head with its queries (GPT-NeoX, BLOOM, Falcon)
    yield (0, each, step), (each * d, 1, step), ((each + 1) * d, 1, step)
    if heads == kv_heads and heads % 4 == 0:  # four parts, each with q, v and k of its heads (CodeGen)
        run = heads // 4
        yield (0, run, 3 * run * d), (2 * run * d, run, 3 * run * d), (run * d, run, 3 * run * d)


def _given(spec: AttentionSpec, evidence: _Evidence, rotary: RotarySpec | None, seen: Trace) -> AttentionSpec | None:
    """The description, with what it does beside the usual, if that gives what was seen."""
    spec, (q, k, v) = _with_gates_in_q(spec, evidence)
    if not seen.near(v, evidence.values):
        norm, values = spec.v_norm, evidence.values
        v = v if norm is None else normed(norm, v)
        scale = 1.0 if norm is not None else float((v * values).sum() / (v * v).sum().clamp_min(1e-30))
        if v.shape != values.shape or not seen.near(scale * v, values):
            return None
        spec, v = replace(spec, v_scale=scale), scale * v
    elif spec.v_norm is not None:
        return None
    table = None if spec.rotation == "" or rotary is None else table_of(rotary, spec.rotation, _places(q))
    q, k = (_prepared(spec, x, norm, table) for x, norm in ((q, spec.q_norm), (k, spec.k_norm)))
    if not seen.near(k, evidence.keys) or (spec.slopes is not None and spec.slopes.numel() != q.shape[0]):
        return None
    found = attended((q, k, v), spec.scale, spec.window, spec.softcap, spec.slopes, spec.sinks)
    finished = _finished(spec, evidence, found)
    return next((reading for reading, gives in finished if seen.near(gives, evidence.attended)), None)


def _with_gates_in_q(spec: AttentionSpec, evidence: _Evidence) -> tuple[AttentionSpec, list[Tensor]]:
    """The description and its heads; where q has twice as many outputs as heads, each head's gates lie behind it."""
    q, *others = _heads(spec, evidence)
    d, heads = spec.head_dim, evidence.attended.shape[-1] // spec.head_dim
    if len(spec.inputs) != 3 or q.shape[0] != 2 * heads:
        return spec, [q, *others]
    place = (0, 1, 2 * d)
    q = _in_turn(evidence.projected[0], place, heads, d)
    return replace(spec, q_place=place, gate_place=(d, 1, 2 * d)), [q, *others]


_OPEN: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "softplus": nn.functional.softplus}


def _finished(spec: AttentionSpec, evidence: _Evidence, found: Tensor) -> Iterator[tuple[AttentionSpec, Tensor]]:
    """What may be done to what heads attend to, before the output projection."""
    d, heads, gates = spec.head_dim, found.shape[-1] // spec.head_dim, evidence.gates
    if spec.gate_place is not None:
        in_q = _in_turn(evidence.projected[0], spec.gate_place, heads, d)
        gates = in_q.transpose(0, 1).flatten(1)
    if gates is not None and gates.shape[-1] in (heads, heads * d):
        each = gates.shape[-1] // heads
        gated = replace(spec, gate=evidence.gate, gate_place=spec.gate_place or (0, 1, each))
        for name, opened in _OPEN.items():
            by_head = found.unflatten(-1, (heads, d)) * opened(gates).unflatten(-1, (heads, each))
            yield replace(gated, gating=name), by_head.flatten(1)
        return
    yield spec, found
    for module in evidence.norms:
        norm = read_norm(module, found.shape[-1])
        if norm.size == found.shape[-1]:
            yield replace(spec, out_norm=norm), normed(norm, found)


def _places(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device="cpu")


def _heads(spec: AttentionSpec, evidence: _Evidence) -> list[Tensor]:
    """q, k and v, each ``[heads, tokens, head_dim]``."""
    d, kv_heads = spec.head_dim, evidence.keys.shape[0]
    counts = (evidence.attended.shape[-1] // d, kv_heads, kv_heads)
    if spec.order is not None:
        (whole,) = evidence.projected
        return [_in_turn(whole, place, n, d) for place, n in zip(spec.order, counts, strict=True)]
    given = evidence.projected
    if len(given) == 1:
        given = list(given[0].split([n * d for n in counts], -1))
    return [x.unflatten(-1, (-1, d)).transpose(0, 1) for x in given]


def _in_turn(whole: Tensor, place: Heads, count: int, d: int) -> Tensor:
    offset, run, step = place
    begins = [offset + head // run * step + head % run * d for head in range(count)]
    return torch.stack([whole[:, at : at + d] for at in begins])


def _prepared(spec: AttentionSpec, x: Tensor, norm: NormSpec | None, table: Table | None) -> Tensor:
    """q or k as they meet: normed and turned."""

    def norm_heads(x: Tensor) -> Tensor:
        if norm is None or norm.size == spec.head_dim:
            return x if norm is None else normed(norm, x)
        together = x.transpose(0, 1).flatten(1)
        if together.shape[-1] != norm.size:
            raise NotCovered("a norm of its heads is neither of each nor of all together")
        all_normed = normed(norm, together)
        return all_normed.view(len(all_normed), -1, x.shape[-1]).transpose(0, 1)

    x = x if spec.turned else norm_heads(x)
    x = x if table is None else turned(x, table, spec.paired)
    return norm_heads(x) if spec.turned else x
