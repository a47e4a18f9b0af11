"""Rotary positions, writing keys and values, and attention over them, split along the positions.

The length is read on the device: each program of the attention walks its share of what a row sees, whatever the
capacity. How many shares there are depends on heads and capacity alone, so that a row's sum has the same order in every
batch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gpu_config
from .gpu_formats import Inputs
from .gpu_norm import empty_rows, kind_of, places_of
from .gpu_parts import PLAIN, counters_for, last_of, launch, power, row_stride, store_rows, wait
from .groups import GROUP
from .step_model import Heads, Norm


def rotary_write(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    heads: int,
    places: tuple[Heads, Heads, Heads],
    rotation: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    paired: bool,
    q_norm: Norm | None,
    k_norm: Norm | None,
    turned: bool,
) -> Tensor:
    """See `gpu_step.rotary_write`."""
    rows, (sequences, kv_heads, capacity, size) = qkv.shape[0], keys.shape
    if keys.stride() != values.stride() or keys.stride(3) != 1 or keys.dtype != values.dtype:
        raise ValueError("keys and values must lie in memory alike, and a head's numbers side by side")
    for norm, count, place in ((q_norm, heads, places[0]), (k_norm, kv_heads, places[1])):
        if _all_heads(norm, count, size) and (turned or place[1] < count):
            raise ValueError("heads that are normed at once must lie side by side, and not be turned before")
    q = torch.empty((rows, heads, size), dtype=keys.dtype, device=qkv.device)
    cos, sin = (None, None) if rotation is None else rotation
    norms: list[Tensor | float | None] = []
    for norm in (q_norm, k_norm):
        norms += [None, None, 0.0] if norm is None else [norm.weight, norm.bias, norm.eps]
    launch(
        "small", _rotary_kernel, (heads + 2 * kv_heads, rows), qkv, cos, sin, positions, at, q, keys, values, *norms,
        row_stride(qkv), row_stride(cos), *keys.stride()[:3], capacity,
        Q=tuple(places[0]), K=tuple(places[1]), V=tuple(places[2]), HEADS=heads, KV_HEADS=kv_heads,
        TOKENS=rows // sequences, SIZE=size, BLOCK=power(size), TURNED=0 if cos is None else cos.shape[1],
        PAIRED=paired, AFTER=turned, Q_NORM=kind_of(q_norm), K_NORM=kind_of(k_norm), Q_BIAS=_biased(q_norm),
        K_BIAS=_biased(k_norm), Q_ALL=_all_heads(q_norm, heads, size), K_ALL=_all_heads(k_norm, kv_heads, size),
        num_warps=1 if size <= 128 else 2,
    )  # fmt: skip
    return q


def attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    seen: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    slopes: Tensor | None,
    sinks: Tensor | None,
    quantize: bool,
    dtype: torch.dtype,
    counters: Tensor | None,
) -> Inputs:
    """See `gpu_step.attention`."""
    rows, heads, size = q.shape
    sequences, kv_heads, capacity, _ = keys.shape
    tile = gpu_config.attention(kv_heads, capacity, size, keys.element_size())
    shape = (rows, heads, tile.splits)
    largest, total = torch.empty((2, *shape), dtype=torch.float32, device=q.device)
    part = torch.empty((*shape, size), dtype=torch.float32, device=q.device)
    seen = None if seen is None else seen.view(torch.uint8)
    y = empty_rows(rows, heads * size, quantize, dtype, q)
    width = heads // kv_heads * size
    # heads that are put together at once: what is rounded in groups of 32 has to begin with one
    together = min(kv_heads, GROUP // math.gcd(GROUP, width)) if quantize else 1
    counters = counters_for(counters, rows * triton.cdiv(kv_heads, together), q.device)
    launch(
        "small", _attention_kernel, (tile.splits, kv_heads, rows), q, keys, values, at, seen, slopes, sinks, largest,
        total, part, counters, *places_of(y), scale, softcap, *keys.stride()[:3], row_stride(seen), capacity, window,
        HEADS=heads, KV_HEADS=kv_heads, TOKENS=rows // sequences, SIZE=size, BLOCK_D=power(size, 16),
        BLOCK_H=power(heads // kv_heads, 16), BLOCK=tile.block, SPLITS=tile.splits, WINDOW=window > 0,
        SOFTCAP=softcap > 0, SLOPES=slopes is not None, SEEN=seen is not None, SINKS=sinks is not None,
        TOGETHER=together, GROUPS=power(triton.cdiv(together * width, GROUP)), QUANTIZE=quantize, PLAIN=PLAIN,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return y


def _biased(norm: Norm | None) -> bool:
    return norm is not None and norm.bias is not None


def _all_heads(norm: Norm | None, heads: int, size: int) -> int:
    """Of a norm of all heads at once, the power of two that holds them; else 0."""
    return 0 if norm is None or norm.weight.numel() == size else power(heads * size)


# ---- kernels ----


@triton.jit
def _norm_of(x, KIND: tl.constexpr, COUNT: tl.constexpr, inside, eps):
    """What x is less, and multiplied by, to be normed; before weight and bias."""
    mean = 0.0
    if KIND == 2:
        mean = tl.sum(x, 0) / COUNT
        x = tl.where(inside, x - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(x * x, 0) / COUNT + eps)


@triton.jit
def _head(
    x, h, cos, sin, weight, bias, eps, OFFSET: tl.constexpr, RUN: tl.constexpr, STEP: tl.constexpr, SIZE: tl.constexpr,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, TURNED: tl.constexpr, PAIRED: tl.constexpr, AFTER: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """[BLOCK]: head h of a row, normed and turned."""
    d = tl.arange(0, BLOCK)
    inside = d < SIZE
    base = x + OFFSET + h // RUN * STEP + h % RUN * SIZE
    y = tl.load(base + d, mask=inside, other=0.0).to(tl.float32)
    half: tl.constexpr = TURNED // 2
    if PAIRED:
        other = d ^ 1
        angle = d // 2
        sign = tl.where(d % 2 == 0, -1.0, 1.0)
    else:
        other = tl.where(d < half, d + half, d - half)
        angle = d
        sign = tl.where(d < half, -1.0, 1.0)
    turns = d < TURNED
    if TURNED > 0:
        opposite = tl.load(base + other, mask=turns, other=0.0).to(tl.float32)
    if NORM > 0 and not AFTER:
        first = 0
        if ALL > 0:
            first = h * SIZE
            every = tl.arange(0, ALL)
            here = every < COUNT * SIZE
            mean, factor = _norm_of(
                tl.load(x + OFFSET + every, mask=here, other=0.0).to(tl.float32), NORM, COUNT * SIZE, here, eps
            )  # fmt: skip
        else:
            mean, factor = _norm_of(y, NORM, SIZE, inside, eps)
        y = (y - mean) * factor * tl.load(weight + first + d, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            y += tl.load(bias + first + d, mask=inside, other=0.0).to(tl.float32)
        if TURNED > 0:
            opposite = (
                (opposite - mean) * factor * tl.load(weight + first + other, mask=turns, other=0.0).to(tl.float32)
            )
            if BIAS:
                opposite += tl.load(bias + first + other, mask=turns, other=0.0).to(tl.float32)
    if TURNED > 0:
        c = tl.load(cos + angle, mask=turns, other=1.0)
        s = tl.load(sin + angle, mask=turns, other=0.0)
        y = tl.where(turns, y * c + sign * opposite * s, y)
    if NORM > 0 and AFTER:
        mean, factor = _norm_of(y, NORM, SIZE, inside, eps)
        y = (y - mean) * factor * tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            y += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def _rotary_kernel(
    qkv, cos, sin, positions, at, q, keys, values, q_weight, q_bias, q_eps, k_weight, k_bias, k_eps, row, table_row,
    of_sequence, of_head, of_index, capacity,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    TOKENS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, TURNED: tl.constexpr, PAIRED: tl.constexpr,
    AFTER: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, Q_BIAS: tl.constexpr, K_BIAS: tl.constexpr,
    Q_ALL: tl.constexpr, K_ALL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    head, r = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    inside = d < SIZE
    x = qkv + r * row
    if TURNED > 0:
        position = tl.load(positions + r)
        cos += position * table_row
        sin += position * table_row
    if head < HEADS:
        y = _head(
            x, head, cos, sin, q_weight, q_bias, q_eps, Q[0], Q[1], Q[2], SIZE, HEADS, BLOCK, TURNED, PAIRED, AFTER,
            Q_NORM, Q_BIAS, Q_ALL,
        )  # fmt: skip
        tl.store(q + (r * HEADS + head) * SIZE + d, y.to(q.dtype.element_ty), mask=inside)
    else:
        index = tl.load(at + r)
        here = d < tl.where(index >= 0, tl.where(index < capacity, SIZE, 0), 0)  # an index outside: nothing
        h = head - HEADS
        if h < KV_HEADS:
            y = _head(
                x, h, cos, sin, k_weight, k_bias, k_eps, K[0], K[1], K[2], SIZE, KV_HEADS, BLOCK, TURNED, PAIRED,
                AFTER, K_NORM, K_BIAS, K_ALL,
            )  # fmt: skip
            to = keys + (r // TOKENS).to(tl.int64) * of_sequence + h.to(tl.int64) * of_head + index * of_index
            tl.store(to + d, y.to(keys.dtype.element_ty), mask=here)
        else:
            h -= KV_HEADS
            y = _head(
                x, h, cos, sin, k_weight, k_bias, k_eps, V[0], V[1], V[2], SIZE, KV_HEADS, BLOCK, 0, False, False, 0,
                False, 0,
            )  # fmt: skip
            to = values + (r // TOKENS).to(tl.int64) * of_sequence + h.to(tl.int64) * of_head + index * of_index
            tl.store(to + d, y.to(values.dtype.element_ty), mask=here)


@triton.jit
def _attention_kernel(
    q, keys, values, at, seen, slopes, sinks, largest, total, part, counters, y, integers, step, sums_of_groups, scale,
    softcap, of_sequence, of_head, of_index, seen_row, capacity, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, TOKENS: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SLOPES: tl.constexpr, SEEN: tl.constexpr, SINKS: tl.constexpr, TOGETHER: tl.constexpr, GROUPS: tl.constexpr,
    QUANTIZE: tl.constexpr, PLAIN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    split, kv, r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    each: tl.constexpr = HEADS // KV_HEADS
    g = tl.arange(0, BLOCK_H)
    head = kv * each + g
    real = g < each
    d = tl.arange(0, BLOCK_D)
    inside = d < SIZE
    last = tl.minimum(tl.load(at + r), capacity - 1).to(tl.int32)
    first = 0
    if WINDOW:
        first = tl.maximum(last - window + 1, 0)
    share = tl.cdiv(tl.cdiv(last + 1 - first, SPLITS), BLOCK) * BLOCK
    begin = first + split * share
    end = tl.minimum(begin + share, last + 1)
    sequence = (r // TOKENS).to(tl.int64)
    asked = tl.load(
        q + (r * HEADS + head)[:, None] * SIZE + d[None, :], mask=real[:, None] & inside[None, :], other=0.0
    )  # fmt: skip
    if PLAIN:  # the interpreter multiplies the bits of bfloat16
        asked = asked.to(tl.float32)
    if SLOPES:
        slope = tl.load(slopes + head, mask=real, other=0.0).to(tl.float32)
    of_kv = sequence * of_sequence + kv.to(tl.int64) * of_head
    keys += of_kv
    values += of_kv
    most = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_H,), tl.float32)
    result = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK):
        c = start + tl.arange(0, BLOCK)
        there = c < end
        if SEEN:
            there = there & (tl.load(seen + sequence * seen_row + c, mask=there, other=0) != 0)
        place = c.to(tl.int64) * of_index
        k = tl.load(keys + place[None, :] + d[:, None], mask=there[None, :] & inside[:, None], other=0.0)
        if PLAIN:
            k = k.to(tl.float32)
        scores = tl.dot(asked, k, input_precision="ieee") * scale
        if SOFTCAP:
            scores = softcap * (1 - 2 / (tl.exp(scores * (2 / softcap)) + 1))
        if SLOPES:
            scores -= slope[:, None] * (last - c)[None, :].to(tl.float32)
        scores = tl.where(there[None, :], scores, float("-inf"))
        above = tl.maximum(most, tl.max(scores, 1))
        safe = tl.where(above == float("-inf"), 0.0, above)  # where nothing has been seen yet
        shares = tl.exp(scores - safe[:, None])
        faded = tl.exp(most - safe)
        v = tl.load(values + place[:, None] + d[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        sums = sums * faded + tl.sum(shares, 1)
        shares = shares.to(v.dtype)
        if PLAIN:
            shares, v = shares.to(tl.float32), v.to(tl.float32)
        result = result * faded[:, None] + tl.dot(shares, v, input_precision="ieee")
        most = above
    to = (r * HEADS + head) * SPLITS + split
    tl.store(largest + to, most, mask=real)
    tl.store(total + to, sums, mask=real)
    tl.store(part + to[:, None] * SIZE + d[None, :], result, mask=real[:, None] & inside[None, :])
    first_kv = kv // TOGETHER * TOGETHER
    programs = SPLITS * tl.minimum(KV_HEADS - first_kv, TOGETHER)
    if last_of(counters + r * tl.cdiv(KV_HEADS, TOGETHER) + kv // TOGETHER, programs):
        _combine(
            largest, total, part, sinks, y, integers, step, sums_of_groups, r, first_kv * each * SIZE, SIZE,
            HEADS * SIZE, TOGETHER * each * SIZE, SPLITS, GROUPS, SINKS, QUANTIZE,
        )  # fmt: skip


@triton.jit
def _combine(
    largest, total, part, sinks, y, integers, step, sums, r, first, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    OWN: tl.constexpr, SPLITS: tl.constexpr, GROUPS: tl.constexpr, SINKS: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    """What the shares of the positions give together: OWN columns of a row of WIDTH from `first` on."""
    own = tl.arange(0, GROUPS) * 32 < OWN
    group = tl.where(own, first // 32 + tl.arange(0, GROUPS), WIDTH)  # of others nothing is stored
    place = tl.arange(0, GROUPS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    column = first + place
    inside = (place < OWN) & (column < WIDTH)
    heads: tl.constexpr = WIDTH // SIZE
    if SIZE % 32 == 0:  # a group has one head
        head = tl.minimum((first + tl.arange(0, GROUPS)[:, None] * 32) // SIZE, heads - 1)
    else:
        head = tl.where(inside, column // SIZE, 0)
    at = (r * heads + head) * SPLITS
    top = tl.full(head.shape, float("-inf"), tl.float32)
    for i in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(largest + at + i))
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        top = tl.maximum(top, sink)
    safe = tl.where(top == float("-inf"), 0.0, top)
    above = tl.zeros((GROUPS, 32), tl.float32)
    below = tl.zeros(head.shape, tl.float32)
    for i in tl.static_range(SPLITS):
        weight = tl.exp(tl.load(largest + at + i) - safe)
        below += weight * tl.load(total + at + i)
        above += weight * tl.load(part + (at + i) * SIZE + column % SIZE, mask=inside, other=0.0)
    if SINKS:
        below += tl.exp(sink - safe)
    result = tl.where(inside & (below > 0), above * (1 / tl.where(below > 0, below, 1.0)), 0.0)
    if QUANTIZE:
        store_rows(y, integers, step, sums, r, group, column, result, WIDTH, QUANTIZE)
    else:
        tl.store(y + r * WIDTH + column, result.to(y.dtype.element_ty), mask=inside)
