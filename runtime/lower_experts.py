"""A described mixture of experts as the native step of a CPU reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..kernels.experts import Expert, PackAll, PackedExperts, Router, experts_of
from ..kernels.packed import PackedLinear
from .calls import NotCovered
from .spec import ExpertsSpec, RouterSpec


def lower_experts(
    spec: ExpertsSpec,
    experts: Sequence[Expert],
    logits: PackedLinear,
    shared: Expert | None,
    shared_gate: PackedLinear | None,
) -> PackedExperts:
    """experts: their matrices. logits: the router's. shared: the expert that all tokens go through.

    Raises:
        NotCovered: the native step does not compute this.
    """
    if spec.shared is not None and spec.shared.act != spec.act:
        raise NotCovered("its shared experts have another activation")
    try:
        return PackedExperts(
            lower_router(spec.router, logits, spec.routed_scale),
            experts,
            spec.act,
            shared,
            shared_gate,
            limit=spec.limit or 0.0,
            slope=1.0 if spec.alpha is None else spec.alpha,
            offset=spec.shift,
            shared_scale=spec.shared_scale,
            by_inputs=spec.scaled_inputs,
        )
    except ValueError as reason:
        raise NotCovered(str(reason)) from None


def packed_experts(spec: ExpertsSpec, pack: PackAll, narrow: bool) -> list[Expert]:
    """The experts' matrices, by `pack`, or as they were loaded where this is to be `narrow`, and finds forms of fewer
    bytes for some of them that do not go together.

    Raises:
        ValueError: they have no such form.
    """
    at = spec.layout
    parts = (spec.up, spec.down, spec.up_bias, spec.down_bias)
    how: dict[str, Any] = {"gate": spec.gate, "gate_bias": spec.gate_bias, "transposed": at.transposed}
    how |= {"stacked": at.stacked, "interleaved": at.interleaved}
    try:
        return experts_of(*parts, **how, pack=pack)
    except ValueError:
        if not narrow:
            raise
        return experts_of(*parts, **how)


def lower_router(spec: RouterSpec, logits: PackedLinear, scale: float) -> Router:
    """logits: of its matrix. scale: multiplies all weights besides."""
    choice = spec.choice
    return Router(
        logits,
        choice.top_k,
        choice.scoring,
        None if spec.correction is None else spec.correction.to(torch.float32).contiguous(),
        choice.groups,
        choice.top_groups,
        by_pairs=choice.group_score == "top2",
        normalized=choice.normalised,
        added=choice.epsilon if choice.normalised else 0.0,
        scale=choice.scale * scale,
        jitter=choice.jitter,
    )
