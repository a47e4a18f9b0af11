"""Third halves of decoder layers (Gemma 4), which read what a token has for each layer besides: found in a pass.

x += norm(out(act(gate(x)) * p)), where p is sum * (norm(scale * linear(embedding)) + table_scale * row of a table).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.packed import ACTS
from ..predictors.anatomy import Anatomy
from .attention_names import linear
from .calls import NotCovered
from .norms import normed, read_norm
from .spec import NormSpec, SideInputsSpec, SideSpec
from .tracing import Trace


@dataclass(frozen=True, eq=False)
class SideModules:
    """The modules of a third half: two linears, and a norm of what the second gives. modules: all, with what is given
    what the first gives."""

    gate: nn.Module
    out: nn.Module
    norm: nn.Module | None
    modules: list[nn.Module]


def side_of(layer: nn.Module, x: Tensor, seen: Trace) -> tuple[SideModules, Tensor] | None:
    """The third half of a layer whose residual stream was x ``[tokens, hidden]`` before it, up to rounding, and what it
    adds; None: there is none."""
    linears = [m for m in layer.children() if isinstance(m, nn.Linear) and len(seen.calls.get(m, ())) == 1]
    gates = [m for m in linears if seen.given(m).shape == x.shape and seen.near(seen.given(m), x)]
    outs = [m for m in linears if m not in gates and seen.gave(m).shape == x.shape]
    if len(gates) != 1 or len(outs) != 1 or seen.gave(gates[0]).shape != seen.given(outs[0]).shape:
        return None
    gave = seen.gave(outs[0])
    acts, norms = (_given(layer, some, seen) for some in (seen.gave(gates[0]), gave))
    norm = next(iter(norms), None)
    return SideModules(gates[0], outs[0], norm, [*gates, *outs, *acts, *norms]), gave if norm is None else seen.gave(
        norm
    )


def _given(layer: nn.Module, x: Tensor, seen: Trace) -> list[nn.Module]:
    """The modules of a layer's own that are given x."""
    calls = ((module, call) for module in layer.children() for call in seen.calls.get(module, ()))
    return [module for module, call in calls if call.given is not None and torch.equal(call.given, x)]


def read_sides(
    anatomy: Anatomy, found: Sequence[SideModules | None], table: nn.Module, seen: Trace | None
) -> tuple[SideInputsSpec | None, list[SideSpec | None]]:
    """What tokens have for all layers, and each layer's third half.

    Raises:
        NotCovered: some layers have none, or they are not what is described.
    """
    sides = [side for side in found if side is not None]
    if not sides or seen is None:
        return None, [None] * len(anatomy)
    if len(sides) != len(anatomy):
        raise NotCovered("some of its layers have third halves, and others none")
    width = seen.gave(sides[0].gate).shape[-1]
    for inputs, parts in _inputs(anatomy, table, width, seen):
        for act in ACTS:
            whole = _weighed(sides, parts, act, seen)
            if whole is not None:
                hidden = seen.given(sides[0].gate).shape[-1]
                return SideInputsSpec(**inputs, width=width, sum=whole), [_spec(side, act, hidden) for side in sides]
    raise NotCovered("what its layers read besides the residual stream is not known")


def _spec(side: SideModules, act: str, hidden: int) -> SideSpec:
    norm = None if side.norm is None else read_norm(side.norm, hidden)
    return SideSpec(linear(side.gate), linear(side.out), norm, act)


def _weighed(sides: list[SideModules], parts: Tensor, act: str, seen: Trace) -> float | None:
    """What the parts ``[tokens, all]`` are multiplied by, if the halves read that."""
    gates = torch.cat([ACTS[act](seen.gave(side.gate)) for side in sides], -1)
    given = torch.cat([seen.given(side.out) for side in sides], -1)
    if not gates.shape == given.shape == parts.shape:
        return None
    opened = gates * parts
    whole = float((opened * given).sum() / opened.square().sum().clamp_min(1e-30))
    return whole if seen.near(whole * opened, given) else None


def _inputs(anatomy: Anatomy, table: nn.Module, width: int, seen: Trace) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """What may make the parts: modules that are called before the first layer, and the sum of what they make."""
    size, x = width * len(anatomy), seen.given(anatomy.layers[0])
    tables = [m for m in seen.before if isinstance(m, nn.Embedding) and m is not table and m.embedding_dim == size]
    tables = [m for m in tables if not m.weight.is_meta]  # one that is packed has no numbers there
    linears = [m for m in seen.before if isinstance(m, nn.Linear) and m.out_features == size]
    norms = [m for m in seen.before if {p.shape for p in m.parameters()} == {(width,)}]
    for rows_of, made_by, norm in ((t, m, n) for t in tables for m in linears for n in norms):
        looked_up, plain = rows_of.weight.detach()[seen.ids[0]].float(), seen.gave(made_by)
        if not torch.equal(seen.given(made_by), x):
            continue
        spec, rows = read_norm(norm, width), seen.gave(rows_of)
        scale, before = _ratio(rows, looked_up), _ratio(seen.given(norm).flatten(-2), plain)
        if scale is None or before is None or not seen.near(_normed(spec, before * plain), seen.gave(norm).flatten(-2)):
            continue
        found = {"linear": linear(made_by), "norm": spec, "table": rows_of, "scale": before, "table_scale": scale}
        yield found, _normed(spec, before * plain) + rows


def _normed(norm: NormSpec, x: Tensor) -> Tensor:
    return normed(norm, x.unflatten(-1, (-1, norm.size))).flatten(-2)


def _ratio(y: Tensor, x: Tensor) -> float | None:
    """By what x is multiplied to give y, if it is."""
    if y.shape != x.shape:
        return None
    found = float((y * x).sum() / x.square().sum().clamp_min(1e-30))
    return found if bool((found * x - y).norm() <= 1e-2 * y.norm()) else None
