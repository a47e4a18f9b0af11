"""Matrices of an MLP's kept neurons alone, in the form in which a step reads the whole one's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from ..kernels import cpu
from ..kernels.memory import Reused
from ..kernels.packed import EXACT_BYTES, Act, PackedLinear, finite
from ..kernels.residency import copied
from ..kernels.sparse import RowLists, SlimMLP
from ..kernels.taken import TAKEN, rows
from ..predictors.anatomy import FeedForward, rows_of
from .packed_layer import PackedLayer

#: of a linear, its packed matrix in one part or, where it holds two projections, in two; none: it has no such form
PartsOf = Callable[[nn.Module], list[PackedLinear]]
_IN_GROUPS = {"int4": "int4", "int8": "int8_groups"}


def linears_of(mlp: FeedForward) -> list[nn.Module]:
    """Gate, where there is one of its own, up and down."""
    gates = [] if mlp.gate_name is None else [getattr(mlp.owner, mlp.gate_name)]
    return [*gates, mlp.up, mlp.down]


def packed_parts(mlp: FeedForward, parts_of: PartsOf) -> list[PackedLinear]:
    """Gate, where there is one, up and down of an MLP, one packed matrix each; fewer where one is in parts that are not
    the projections, or has no such form."""
    parts = [part for module in linears_of(mlp) for part in parts_of(module)]
    if mlp.stacked and len(parts) == 2:
        rows, down = mlp.intermediate_size, parts[1]
        halves = parts[0].part(0, rows), parts[0].part(rows, rows)
        parts = [*(half for half in halves if half is not None), down]
    return parts


def slimmed(mlp: FeedForward, act: Act, kept: Tensor, fmt: str | None) -> SlimMLP | None:
    """The neurons `kept`, int64 ascending, of an MLP on the CPU; None where it is packed in a form of which rows cannot
    be taken, or holds numbers that are none.

    fmt: None, as loaded, in fewer bytes where these hold the very numbers; "int8" or "int4" groups. Rows of gate and up
    are the numbers that the whole matrices have in that format, to the bit. Groups of the down projection run along the
    neurons and are made anew: in 4 bits, or in 8 where its numbers are 4-bit groups already, which other groups of 4
    bits do not hold; as loaded they are floats.
    """
    packed = [isinstance(module, PackedLayer) for module in linears_of(mlp)]
    if not any(packed):
        return _of_floats(mlp, act, kept, fmt)
    parts = packed_parts(mlp, of_layers(whole=fmt is None)) if all(packed) else []
    if not _whole_mlp(parts, mlp):
        return None
    gate, up, down = _three(parts)
    if fmt is not None:
        return SlimMLP.of_tiles(gate, up, down, kept, act=act)
    narrow = _pack(rows_of(mlp.down)[0][:, kept].contiguous(), down.bias, None)
    return SlimMLP(None if gate is None else rows(copied(gate), kept), rows(copied(up), kept), narrow, act)


def chosen(
    mlp: FeedForward, act: Act, kept: Tensor, parts_of: PartsOf, memory: Reused | None, own: bool
) -> SlimMLP | None:
    """The neurons `kept` that prompts have chosen, int64 ascending, ``[k]`` for all rows or ``[rows, k]``, of tiles in
    4 bits as steps read them; None where the MLP is in no such form.

    own: in matrices of their own, in which rows that differ share what any of them wants; else they are all of the
    MLP's, of which the others count as zero. That is the same to the bit: who decodes with whom changes no text.
    """
    parts = packed_parts(mlp, parts_of)
    if not _whole_mlp(parts, mlp) or any(part.fmt != "int4" for part in parts):
        return None
    gate, up, down = _three(parts)
    every = kept if kept.dim() == 1 else kept.unique()
    if own:
        made = SlimMLP.of_tiles(gate, up, down, every, act=act, exactly=True, memory=memory)
        rows = None if kept.dim() == 1 else RowLists.of(torch.searchsorted(every, kept), every.numel())
    else:
        made = SlimMLP(gate, up, down, act)
        rows = RowLists.shared(kept) if kept.dim() == 1 else RowLists.of(kept, up.out_features)
    return replace(made, lists=rows)


def of_layers(whole: bool = False) -> PartsOf:
    """Of linears that are all `PackedLayer`. whole: as for `PackedLayer.parts`."""
    return lambda module: cast(PackedLayer, module).parts(whole=whole)


def _whole_mlp(parts: list[PackedLinear], mlp: FeedForward) -> bool:
    return len(parts) == 2 + mlp.gated and all(part.fmt in TAKEN for part in parts)


def _three(parts: list[PackedLinear]) -> tuple[PackedLinear | None, PackedLinear, PackedLinear]:
    return None if len(parts) == 2 else parts[0], parts[-2], parts[-1]


def slim_down_bytes(mlp: FeedForward, fmt: str | None) -> float | None:
    """Bytes of a weight of the down projection of `slimmed`; None: as many as of the whole one's."""
    packed = isinstance(mlp.down, PackedLayer)
    if not packed and (fmt not in (None, "int4") or not in_four_bits(mlp)):
        return None
    return float(cast(Tensor, mlp.down.weight).element_size()) if fmt is None else EXACT_BYTES["int8_groups"]


def in_four_bits(mlp: FeedForward) -> bool:
    """Whether the down projection's numbers are 4-bit groups along the neurons, as far as the first tell."""
    return cpu.holds("int4", rows_of(mlp.down)[0][:1].float().contiguous())


def _of_floats(mlp: FeedForward, act: Act, kept: Tensor, fmt: str | None) -> SlimMLP | None:
    w, form = mlp.matrices(), _IN_GROUPS.get(fmt or "")
    if form is not None and not all(finite(part) for part in (w.gate, w.up, w.down) if part is not None):
        return None

    def rows(weight: Tensor, bias: Tensor | None) -> PackedLinear:
        return _pack(weight[kept], None if bias is None else bias[kept], form)

    gate = None if w.gate is None else rows(w.gate, w.gate_bias)
    of_down = "int8_groups" if form == "int4" and in_four_bits(mlp) else form
    down = _pack(w.down[kept].t().contiguous(), w.down_bias, of_down)
    return SlimMLP(gate, rows(w.up, w.up_bias), down, act)


def _pack(weight: Tensor, bias: Tensor | None, form: str | None) -> PackedLinear:
    exact = cpu.pack_exactly(weight.detach(), bias) if form is None else None
    return exact or PackedLinear.pack(weight.detach(), bias, fmt=form)
