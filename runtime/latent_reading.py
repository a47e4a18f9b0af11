"""Latent attention (DeepSeek-V2), found as other attentions are: by what gives the entries of the cache, and what the
output projection was given, in a pass of a few tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..predictors.anatomy import Attention, rows_of
from .attention_formula import Table, attended, turned
from .attention_names import kind_of_rotation, linear, told_scales
from .calls import NotCovered
from .norms import read_norm
from .rotary_tables import table_of
from .spec import LatentSpec, NormSpec, RotarySpec
from .tracing import Trace


def read_latent(found: Attention, index: int, window: int, rotary: RotarySpec | None, seen: Trace) -> LatentSpec | None:
    """The latent attention of layer `index`; None where it is another.

    Raises:
        NotCovered: it is one, but gave something else in the pass.
    """
    keys, values = seen.keys[index], seen.values[index]
    if len(found.inputs) not in (3, 4) or keys.shape[0] != 1 or rotary is None:
        return None
    module = cast(Any, found.module)
    *queries, low, expand = (found.part(name) for name in found.inputs)
    output = found.part(found.output)
    rank, rope = keys.shape[-1], values.shape[-1]
    if seen.gave(low).shape[-1] != rank + rope or seen.calls[expand][0].given is None:
        return None
    spec = LatentSpec(
        q_low=linear(queries[0]) if len(queries) == 2 else None,
        q_low_norm=_norm_between(module, queries, seen) if len(queries) == 2 else None,
        q=linear(queries[-1]),
        kv_low=linear(low),
        kv_low_norm=_norm_giving(module, keys[0], seen),
        expand=linear(expand),
        output=linear(output),
        heads=_heads(module),
        rope=rope,
        scale=1.0,
        rotation=kind_of_rotation(module, index, rotary),
        window=window,
    )
    table = table_of(rotary, spec.rotation, torch.arange(keys.shape[1], device="cpu"))
    for paired, apart in ((False, False), (True, False), (False, True)):
        for scale in told_scales(module):
            reading = replace(spec, paired=paired, apart=apart, scale=scale)
            if _gives(reading, table, seen, index, seen.given(output)):
                return reading
    raise NotCovered("what its latent attention computes is not known")


def _heads(attention: Any) -> int:
    heads = getattr(attention, "num_heads", None) or attention.config.num_attention_heads
    return int(heads)


def _norm_between(attention: nn.Module, queries: list[nn.Module], seen: Trace) -> NormSpec:
    given, gave = seen.gave(queries[0]), seen.given(queries[1])
    for module in attention.children():
        if any(call.made(given, gave) for call in seen.calls.get(module, ())):
            return read_norm(module, given.shape[-1])
    raise NotCovered("what makes queries of their latent is not a norm and a projection")


def _norm_giving(attention: nn.Module, latents: Tensor, seen: Trace) -> NormSpec:
    for module in attention.children():
        calls = seen.calls.get(module, ())
        if any(c.gave is not None and c.gave.shape == latents.shape and torch.equal(c.gave, latents) for c in calls):
            return read_norm(module, latents.shape[-1])
    raise NotCovered("its latents are not normed as they are cached")


def _gives(spec: LatentSpec, table: Table, seen: Trace, index: int, expected: Tensor) -> bool:
    """Whether an attention of this description gives what was seen."""
    latents, keys = seen.keys[index][0], seen.values[index]
    rank, heads = latents.shape[-1], spec.heads
    k_turned = _turned(spec, seen.gave(spec.kv_low.module)[:, rank:], table)
    if not seen.near(k_turned, keys[0]):
        return False
    expanded = (latents @ rows_of(spec.expand.module)[0].float().t()).unflatten(-1, (heads, -1)).transpose(0, 1)
    q = seen.gave(spec.q.module).unflatten(-1, (heads, -1)).transpose(0, 1)
    nope = q.shape[-1] - spec.rope
    q = torch.cat([q[..., :nope], _turned(spec, q[..., nope:], table)], -1)
    k = torch.cat([expanded[..., :nope], k_turned.expand(heads, -1, -1)], -1)
    return seen.near(attended((q, k, expanded[..., nope:]), spec.scale, spec.window), expected)


def _turned(spec: LatentSpec, x: Tensor, table: Table) -> Tensor:
    if spec.apart:
        x = torch.cat([x[..., ::2], x[..., 1::2]], -1)
    return turned(x, table, spec.paired)
