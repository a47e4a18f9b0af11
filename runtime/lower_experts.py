"""A described mixture of experts as the native step of a CPU reads it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.experts import Expert, PackedExperts, Router, experts_of
from ..kernels.packed import PackedLinear
from .calls import NotCovered
from .spec import ExpertsSpec, RouterSpec

#: a matrix ``[outputs, inputs]`` and its bias, packed
Pack = Callable[[Tensor, "Tensor | None"], PackedLinear]


def lower_experts(
    spec: ExpertsSpec, pack: Pack, pack_router: Pack, shared: Expert | None, shared_gate: PackedLinear | None
) -> PackedExperts:
    """pack, pack_router: of one expert's matrix, and of the router's. shared: the expert that all tokens go through.

    Raises:
        NotCovered: the native step does not compute this.
    """
    if spec.scaled_inputs:
        raise NotCovered("routers multiply what experts read, not what they give")
    if spec.shared is not None and spec.shared.act != spec.act:
        raise NotCovered("its shared experts have another activation")
    try:
        return PackedExperts(
            _router(spec.router, pack_router),
            _experts(spec, pack),
            spec.act,
            shared,
            shared_gate,
            limit=spec.limit or 0.0,
            slope=1.0 if spec.alpha is None else spec.alpha,
            offset=spec.shift,
        )
    except ValueError as reason:
        raise NotCovered(str(reason)) from None


def _experts(spec: ExpertsSpec, pack: Pack) -> list[Expert]:
    layout = spec.layout
    gated = layout.stacked or layout.interleaved
    ups = experts_of(
        spec.up, spec.down, spec.up_bias, spec.down_bias,
        gated=gated, interleaved=layout.interleaved, transposed=layout.transposed, pack=pack,
    )  # fmt: skip
    if spec.gate is None:
        return ups
    gates = spec.gate.transpose(1, 2) if layout.transposed else spec.gate
    biases = [None] * len(ups) if spec.gate_bias is None else spec.gate_bias
    return [
        Expert(pack(gate, bias), expert.up, expert.down) for gate, bias, expert in zip(gates, biases, ups, strict=True)
    ]


def _router(spec: RouterSpec, pack: Pack) -> Router:
    choice = spec.choice
    return Router(
        pack(spec.weight, spec.bias),
        choice.top_k,
        choice.scoring,
        None if spec.correction is None else spec.correction.to(torch.float32).contiguous(),
        choice.groups,
        choice.top_groups,
        by_pairs=choice.group_score == "top2",
        normalized=choice.normalised,
        added=choice.epsilon if choice.normalised else 0.0,
        scale=choice.scale,
    )
