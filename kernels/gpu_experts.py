"""A mixture of experts on a GPU: which experts a row gets, chosen by one program a row, and products with the matrices
of these alone. What other rows chose is not read; nothing goes back to the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gpu_config
from .experts import SCORINGS, Router
from .gpu_formats import ExpertMatrices
from .gpu_parts import ACT, act, launch, power, row_stride, wait


def route(logits: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """See `gpu_step.route`."""
    rows, count = logits.shape
    weights = torch.empty((rows, router.chosen), dtype=torch.float32, device=logits.device)
    chosen = torch.empty((rows, router.chosen), dtype=torch.int32, device=logits.device)
    each = count // router.groups
    scoring = SCORINGS.index(router.scoring)
    launch(
        "small", _route_kernel, (rows,), logits, router.correction, router.kept, weights, chosen, row_stride(logits),
        router.least, router.added, router.floor, router.scale, 2 * router.jitter,
        EACH=each, GROUPS=router.groups, BLOCK_G=power(router.groups), BLOCK_E=power(each), CHOSEN=router.chosen,
        BLOCK_C=power(router.chosen), GROUPS_KEPT=router.groups_kept, SCORING=scoring, PAIRS=router.by_pairs,
        NORMALIZED=router.normalized or router.scoring == "softmax_of_chosen",
        CORRECTION=router.correction is not None, KEPT=router.kept is not None,
        num_warps=max(1, min(4, power(router.groups) * power(each) // 256)),
    )  # fmt: skip
    return weights, chosen


def widened(x: Tensor, matrices: ExpertMatrices, chosen: Tensor, weights: Tensor | None) -> Tensor:
    """What the neurons of each row's experts give, float32 ``[rows, chosen, neurons]``; nothing for an expert of -1."""
    rows, count = chosen.shape
    up, gated = matrices.up, matrices.gate is not None
    neurons, hidden = up.shape[1:]
    tile = gpu_config.expert_rows(neurons, hidden, up.element_size(), up.stride(2) == 1, 2 if gated else 1)
    h = torch.empty((rows, count, neurons), dtype=torch.float32, device=x.device)
    launch(
        "gemv", _widening_kernel, (triton.cdiv(neurons, tile.block_n), rows * count), x, matrices.gate, up,
        matrices.gate_bias, matrices.up_bias, chosen, weights, h, neurons, hidden, row_stride(x), *up.stride(),
        0 if matrices.up_bias is None else matrices.up_bias.stride(0),
        0 if matrices.up_bias is None else matrices.up_bias.stride(1), matrices.limit, matrices.slope, matrices.offset,
        CHOSEN=count, GATED=gated, ACT=ACT[matrices.act], SLOPE=matrices.slope != 1, LIMIT=matrices.limit > 0,
        GATE_BIAS=matrices.gate_bias is not None, UP_BIAS=matrices.up_bias is not None, WEIGHTED=weights is not None,
        BLOCK_N=tile.block_n, BLOCK_K=tile.block_g, num_warps=tile.warps,
        nbytes=rows * count * neurons * hidden * up.element_size() * (2 if gated else 1),
    )  # fmt: skip
    return h


def summed(
    h: Tensor,
    matrices: ExpertMatrices,
    chosen: Tensor,
    weights: Tensor | None,
    more: Tensor | None,
    gate: Tensor | None,
    more_scale: float,
) -> Tensor:
    """Float32 ``[rows, hidden]``: the down projections of all experts of a row, weighed, and what `gpu_step.experts`
    adds."""
    rows, count, neurons = h.shape
    down = matrices.down
    hidden = down.shape[1]
    tile = gpu_config.expert_rows(hidden, neurons, down.element_size(), down.stride(2) == 1)
    y = torch.empty((rows, hidden), dtype=torch.float32, device=h.device)
    launch(
        "gemv", _narrowing_kernel, (triton.cdiv(hidden, tile.block_n), rows), h, down, matrices.down_bias, chosen,
        weights, more, gate, y, hidden, neurons, *down.stride(),
        0 if matrices.down_bias is None else matrices.down_bias.stride(0), row_stride(more), row_stride(gate),
        more_scale,
        CHOSEN=count, BIAS=matrices.down_bias is not None, WEIGHTED=weights is not None, MORE=more is not None,
        GATE=gate is not None, BLOCK_N=tile.block_n, BLOCK_K=tile.block_g, num_warps=tile.warps,
        nbytes=rows * count * neurons * hidden * down.element_size(),
    )  # fmt: skip
    return y


# ---- kernels ----


@triton.jit
def _largest(x):
    """Of a matrix ``[groups, experts of a group]``."""
    return tl.max(tl.max(x, 1), 0)


@triton.jit
def _first(where, place):
    """The least place where something is so."""
    return tl.min(tl.min(tl.where(where, place, 1 << 30), 1), 0)


@triton.jit
def _best_groups(rank, kept, here, EACH: tl.constexpr, BLOCK_G: tl.constexpr, GROUPS: tl.constexpr,
                 GROUPS_KEPT: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """Ranks, those of experts in other groups than the best ones -inf."""
    least = float("-inf")
    place = tl.arange(0, rank.shape[1])[None, :] + tl.zeros(rank.shape, tl.int32)
    counted = tl.where(here, tl.where(kept, rank, 0.0), least)
    best = tl.max(counted, 1)
    if PAIRS and EACH > 1:
        first = tl.min(tl.where(counted == best[:, None], place, 1 << 30), 1)
        best += tl.max(tl.where(place == first[:, None], least, counted), 1)
    some = tl.max(tl.where(kept, 1, 0), 1) > 0
    group = tl.arange(0, BLOCK_G)
    best = tl.where(some & (group < GROUPS), best, least)
    taken = group < 0
    for _ in tl.static_range(GROUPS_KEPT):
        left = tl.where(taken | (group >= GROUPS), least, best)
        top = tl.max(left, 0)
        free = (left == top) & (taken == 0) & (group < GROUPS)
        taken = taken | (group == tl.min(tl.where(free, group, 1 << 30), 0))
    return tl.where(taken[:, None], rank, least)


@triton.jit
def _route_kernel(
    logits, correction, kept_experts, weights, experts, row, least_share, added, floor, scale, jitter,
    EACH: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr, CHOSEN: tl.constexpr,
    BLOCK_C: tl.constexpr, GROUPS_KEPT: tl.constexpr, SCORING: tl.constexpr, PAIRS: tl.constexpr,
    NORMALIZED: tl.constexpr, CORRECTION: tl.constexpr, KEPT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    r = tl.program_id(0).to(tl.int64)
    none = float("-inf")
    within = tl.arange(0, BLOCK_E)
    group = tl.arange(0, BLOCK_G)
    here = (group < GROUPS)[:, None] & (within < EACH)[None, :]
    place = group[:, None] * EACH + within[None, :]
    x = tl.load(logits + r * row + place, mask=here, other=none).to(tl.float32)
    kept = here
    if KEPT:
        kept = here & (tl.load(kept_experts + place, mask=here, other=0) != 0)
    x = tl.where(kept, x, none)
    if SCORING == 0:
        top = _largest(x)
        score = tl.exp(x - tl.where(top == none, 0.0, top))
        score = score / tl.sum(tl.sum(score, 1), 0)
    elif SCORING == 1:
        score = 1 / (1 + tl.exp(-x))
    else:
        score = x
    rank = score
    if CORRECTION:
        rank += tl.load(correction + place, mask=here, other=0.0)
    rank = tl.where(kept, rank, none)
    if GROUPS_KEPT < GROUPS:
        rank = _best_groups(rank, kept, here, EACH, BLOCK_G, GROUPS, GROUPS_KEPT, PAIRS)
    slot = tl.arange(0, BLOCK_C)
    weight = tl.zeros((BLOCK_C,), tl.float32)
    expert = tl.full((BLOCK_C,), -1, tl.int32)
    for i in tl.static_range(CHOSEN):
        top = _largest(rank)
        found = _first(rank == top, place)
        is_it = place == found
        if SCORING == 3:  # among the logits that lie near the greatest that is left
            size = tl.maximum(tl.abs(x), top)
            near = (((top - x) / size > jitter) == 0) & (rank != none)
            value = 1 / tl.sum(tl.sum(tl.where(near, tl.exp(rank - top), 0.0), 1), 0)
        else:
            value = tl.sum(tl.sum(tl.where(is_it, score, 0.0), 1), 0)
            if SCORING == 4:
                value = 1 / (1 + tl.exp(-value))
        found = found + tl.zeros((BLOCK_C,), tl.int32)
        there = (top + tl.zeros((BLOCK_C,), tl.float32) != none) & (found < GROUPS * EACH)  # a NaN is nobody's score
        weight = tl.where((slot == i) & there, value, weight)
        expert = tl.where((slot == i) & there, found, expert)
        rank = tl.where(is_it, none, rank)
    if SCORING == 2:
        top = tl.max(tl.where(expert >= 0, weight, none), 0)
        weight = tl.where(expert >= 0, tl.exp(weight - top), 0.0)
    stays = (expert >= 0) & ((weight < least_share * tl.max(weight, 0)) == 0)
    weight = tl.where(stays, weight, 0.0)
    if NORMALIZED:
        weight = weight / tl.maximum(tl.sum(weight, 0) + added, floor)
    tl.store(weights + r * CHOSEN + slot, weight * scale, mask=slot < CHOSEN)
    tl.store(experts + r * CHOSEN + slot, tl.where(stays, expert, -1), mask=slot < CHOSEN)


@triton.jit
def _widening_kernel(
    x, gate, up, gate_bias, up_bias, chosen, weights, h, neurons, hidden, x_row, of_expert, of_neuron, of_input,
    bias_expert, bias_neuron, limit, slope, offset,
    CHOSEN: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, LIMIT: tl.constexpr,
    GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.program_id(1).to(tl.int64)
    expert = tl.load(chosen + slot).to(tl.int64)
    there = (n < neurons) & (expert + tl.zeros((BLOCK_N,), tl.int64) >= 0)
    at = expert * of_expert + n.to(tl.int64) * of_neuron
    xs = x + slot // CHOSEN * x_row
    factor = 1.0
    if WEIGHTED:
        factor = tl.load(weights + slot)
    total, other = tl.zeros((BLOCK_N, BLOCK_K), tl.float32), tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, hidden, BLOCK_K):  # gates and ups side by side, so that both are under way
        i = start + tl.arange(0, BLOCK_K)
        inside = i < hidden
        place = at[:, None] + (i.to(tl.int64) * of_input)[None, :]
        ups = tl.load(up + place, mask=there[:, None] & inside[None, :], other=0.0)
        if GATED:
            gates = tl.load(gate + place, mask=there[:, None] & inside[None, :], other=0.0)
        given = tl.load(xs + i, mask=inside, other=0.0).to(tl.float32) * factor
        total += ups.to(tl.float32) * given[None, :]
        if GATED:
            other += gates.to(tl.float32) * given[None, :]
    value = tl.sum(total, 1)
    if UP_BIAS:
        value += tl.load(up_bias + expert * bias_expert + n * bias_neuron, mask=there, other=0.0).to(tl.float32)
    if GATED:
        opened = tl.sum(other, 1)
        if GATE_BIAS:
            opened += tl.load(gate_bias + expert * bias_expert + n * bias_neuron, mask=there, other=0.0).to(tl.float32)
        if LIMIT:
            opened = tl.where(opened > limit, limit, opened)
            value = tl.where(value > limit, limit, tl.where(value < -limit, -limit, value))
        if SLOPE:  # noqa: SIM108
            opened = opened / (1 + tl.exp(-slope * opened))
        else:
            opened = act(opened, ACT)
        value = opened * (value + offset)
    else:
        value = act(value, ACT)
    tl.store(h + slot * neurons + n, tl.where(there, value, 0.0), mask=n < neurons)


@triton.jit
def _narrowing_kernel(
    h, down, bias, chosen, weights, more, gate, y, hidden, neurons, of_expert, of_output, of_neuron, bias_expert,
    more_row, gate_row, more_scale,
    CHOSEN: tl.constexpr, BIAS: tl.constexpr, WEIGHTED: tl.constexpr, MORE: tl.constexpr, GATE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for i in range(CHOSEN):
        expert = tl.load(chosen + r * CHOSEN + i).to(tl.int64)
        there = (n < hidden) & (expert + tl.zeros((BLOCK_N,), tl.int64) >= 0)
        at = expert * of_expert + n.to(tl.int64) * of_output
        given = h + (r * CHOSEN + i) * neurons
        products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in range(0, neurons, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            place = at[:, None] + (k.to(tl.int64) * of_neuron)[None, :]
            rows = tl.load(down + place, mask=there[:, None] & (k < neurons)[None, :], other=0.0)
            products += rows.to(tl.float32) * tl.load(given + k, mask=k < neurons, other=0.0)[None, :]
        value = tl.sum(products, 1)
        if BIAS:
            value += tl.load(bias + expert * bias_expert + n, mask=there, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + r * CHOSEN + i)
        total += tl.where(there, value, 0.0)
    if MORE:
        added = tl.load(more + r * more_row + n, mask=n < hidden, other=0.0).to(tl.float32)
        if GATE:
            added *= 1 / (1 + tl.exp(-tl.load(gate + r * gate_row).to(tl.float32)))
        total += added * more_scale
    tl.store(y + r * hidden + n, total, mask=n < hidden)
