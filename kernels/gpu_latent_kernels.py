"""Attention over latents in Triton; see gpu_latents.py. Sixteen heads share what a program reads of the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gpu_config
from .gpu_attention import _combine, _head
from .gpu_norm import kind_of
from .gpu_parts import PLAIN, counters_for, last_of, launch, power, row_stride, wait
from .step_model import Norm

_HEADS = 16  # of a program


def latent_write(
    q: Tensor,
    kv: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    norm: Norm,
    rotation: tuple[Tensor, Tensor],
    positions: Tensor,
    paired: bool,
    apart: bool,
) -> Tensor:
    """See `gpu_latents.latent_write`."""
    (rows, heads, size), rank, rope = q.shape, keys.shape[3], values.shape[3]
    turned = torch.empty((rows, heads, rope), dtype=keys.dtype, device=q.device)
    if q.stride(1) != size or q.stride(2) != 1 or keys.stride(3) != 1 or values.stride(3) != 1:
        raise ValueError("queries must lie side by side, and so must what a position has in the cache")
    cos, sin = rotation
    launch(
        "small", _write_kernel, (heads + 2, rows), q, kv, cos, sin, positions, at, turned, keys, values, norm.weight,
        norm.bias, norm.eps, q.stride(0), row_stride(kv), row_stride(cos), keys.stride(0), keys.stride(2),
        values.stride(0), values.stride(2), keys.shape[2],
        HEADS=heads, SIZE=size, RANK=rank, ROPE=rope, BLOCK=power(rope), BLOCK_R=power(rank), TURNED=cos.shape[1],
        TOKENS=rows // keys.shape[0], PAIRED=paired or apart, APART=apart, NORM=kind_of(norm),
        BIAS=norm.bias is not None, num_warps=1,
    )  # fmt: skip
    return turned


def head_products(x: Tensor, weight: Tensor) -> Tensor:
    """See `gpu_latents.head_products`."""
    rows, (heads, outs, inputs) = x.shape[0], weight.shape
    y = torch.empty((rows, heads, outs), dtype=torch.float32, device=x.device)
    tile = gpu_config.expert_rows(outs, inputs, weight.element_size(), weight.stride(2) == 1)
    launch(
        "gemv", _heads_kernel, (triton.cdiv(outs, tile.block_n), heads, rows), x, weight, y, outs, inputs, *x.stride(),
        *weight.stride(), BLOCK_N=tile.block_n, BLOCK_K=tile.block_g, num_warps=tile.warps,
        nbytes=weight.numel() * weight.element_size(),
    )  # fmt: skip
    return y


def latent_attention(
    q: Tensor,
    turned: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    scale: float,
    seen: Tensor | None,
    window: int,
    counters: Tensor | None,
) -> Tensor:
    """See `gpu_latents.latent_attention`."""
    rows, heads, rank = q.shape
    sequences, _, capacity, rope = values.shape
    blocks = triton.cdiv(heads, _HEADS)
    tile = gpu_config.attention(blocks, capacity, rank, keys.element_size())
    largest, total = torch.empty((2, rows, heads, tile.splits), dtype=torch.float32, device=q.device)
    part = torch.empty((rows, heads, tile.splits, rank), dtype=torch.float32, device=q.device)
    y = torch.empty((rows, heads, rank), dtype=torch.float32, device=q.device)
    counters = counters_for(counters, rows * blocks, q.device)
    seen = None if seen is None else seen.view(torch.uint8)
    launch(
        "small", _latent_kernel, (tile.splits, blocks, rows), q, turned, keys, values, at, seen, largest, total, part,
        counters, y, scale, keys.stride(0), keys.stride(2), values.stride(0), values.stride(2), row_stride(seen),
        capacity, window,
        HEADS=heads, EACH=_HEADS, TOKENS=rows // sequences, RANK=rank, ROPE=rope, BLOCK_R=power(rank, 16),
        BLOCK_T=power(rope, 16), BLOCK=tile.block, SPLITS=tile.splits, WINDOW=window > 0, SEEN=seen is not None,
        GROUPS=power(triton.cdiv(_HEADS * rank, 32)), PLAIN=PLAIN, num_warps=8, num_stages=1,
    )  # fmt: skip
    return y


# ---- kernels ----


@triton.jit
def _placed(d, ROPE: tl.constexpr, APART: tl.constexpr):
    """Where dimension d of a turned key lies: neighbours half of them apart."""
    if APART:
        d = d // 2 + d % 2 * (ROPE // 2)
    return d


@triton.jit
def _write_kernel(
    q, kv, cos, sin, positions, at, turned, keys, values, weight, bias, eps, q_row, kv_row, table_row, key_sequence,
    key_index, value_sequence, value_index, capacity,
    HEADS: tl.constexpr, SIZE: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr, TURNED: tl.constexpr, TOKENS: tl.constexpr, PAIRED: tl.constexpr, APART: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    head, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position = tl.load(positions + r)
    cos += position * table_row
    sin += position * table_row
    d = tl.arange(0, BLOCK)
    if head < HEADS:
        query = _head(
            q + r * q_row + (SIZE - ROPE), head, cos, sin, None, None, 0.0, 0, 1, SIZE, ROPE, HEADS, BLOCK, TURNED,
            PAIRED, False, 0, False, 0,
        )  # fmt: skip
        to = turned + (r * HEADS + head) * ROPE
        tl.store(to + _placed(d, ROPE, APART), query.to(turned.dtype.element_ty), mask=d < ROPE)
    else:
        index = tl.load(at + r)
        there = tl.where(index >= 0, tl.where(index < capacity, 1, 0), 0)  # an index outside: nothing
        sequence = r // TOKENS
        if head == HEADS:
            key = _head(
                kv + r * kv_row + RANK, 0, cos, sin, None, None, 0.0, 0, 1, ROPE, ROPE, 1, BLOCK, TURNED, PAIRED,
                False, 0, False, 0,
            )  # fmt: skip
            at_key = values + sequence * value_sequence + index * value_index
            tl.store(at_key + _placed(d, ROPE, APART), key.to(values.dtype.element_ty), mask=d < ROPE * there)
        else:
            latent = _head(
                kv + r * kv_row, 0, cos, sin, weight, bias, eps, 0, 1, RANK, RANK, 1, BLOCK_R, 0, False, False, NORM,
                BIAS, 0,
            )  # fmt: skip
            k = tl.arange(0, BLOCK_R)
            at_latent = keys + sequence * key_sequence + index * key_index
            tl.store(at_latent + k, latent.to(keys.dtype.element_ty), mask=k < RANK * there)


@triton.jit
def _heads_kernel(
    x, weight, y, outs, inputs, x_row, x_head, x_input, of_head, of_output, of_input, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head, r = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows = weight + head * of_head + n.to(tl.int64) * of_output
    given = x + r * x_row + head * x_head
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        mask = (n < outs)[:, None] & (i < inputs)[None, :]
        ws = tl.load(rows[:, None] + (i.to(tl.int64) * of_input)[None, :], mask=mask, other=0.0).to(tl.float32)
        total += ws * tl.load(given + i * x_input, mask=i < inputs, other=0.0).to(tl.float32)[None, :]
    tl.store(y + (r * tl.num_programs(1) + head) * outs + n, tl.sum(total, 1), mask=n < outs)


@triton.jit
def _latent_kernel(
    q, turned, keys, values, at, seen, largest, total, part, counters, y, scale, key_sequence, key_index,
    value_sequence, value_index, seen_row, capacity, window,
    HEADS: tl.constexpr, EACH: tl.constexpr, TOKENS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr,
    SEEN: tl.constexpr, GROUPS: tl.constexpr, PLAIN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    split, block, r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = block * EACH + tl.arange(0, EACH)
    real = head < HEADS
    k, t = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_T)
    last = tl.minimum(tl.load(at + r), capacity - 1).to(tl.int32)
    first = 0
    if WINDOW:
        first = tl.maximum(last - window + 1, 0)
    share = tl.cdiv(tl.cdiv(last + 1 - first, SPLITS), BLOCK) * BLOCK
    begin = first + split * share
    end = tl.minimum(begin + share, last + 1)
    sequence = (r // TOKENS).to(tl.int64)
    at_head = (r * HEADS + head)[:, None]
    asked = tl.load(q + at_head * RANK + k[None, :], mask=real[:, None] & (k < RANK)[None, :], other=0.0)
    asked = asked.to(keys.dtype.element_ty)
    angled = tl.load(turned + at_head * ROPE + t[None, :], mask=real[:, None] & (t < ROPE)[None, :], other=0.0)
    if PLAIN:  # the interpreter multiplies the bits of bfloat16
        asked, angled = asked.to(tl.float32), angled.to(tl.float32)
    keys += sequence * key_sequence
    values += sequence * value_sequence
    most = tl.full((EACH,), float("-inf"), tl.float32)
    sums = tl.zeros((EACH,), tl.float32)
    result = tl.zeros((EACH, BLOCK_R), tl.float32)
    for start in range(begin, end, BLOCK):
        c = start + tl.arange(0, BLOCK)
        there = c < end
        if SEEN:
            there = there & (tl.load(seen + sequence * seen_row + c, mask=there, other=0) != 0)
        place = c.to(tl.int64)[:, None]
        latents = tl.load(keys + place * key_index + k[None, :], mask=there[:, None] & (k < RANK)[None, :], other=0.0)
        angles = tl.load(
            values + place * value_index + t[None, :], mask=there[:, None] & (t < ROPE)[None, :], other=0.0
        )
        if PLAIN:
            latents, angles = latents.to(tl.float32), angles.to(tl.float32)
        scores = tl.dot(asked, tl.trans(latents), input_precision="ieee")
        scores += tl.dot(angled, tl.trans(angles), input_precision="ieee")
        scores = tl.where(there[None, :], scores * scale, float("-inf"))
        above = tl.maximum(most, tl.max(scores, 1))
        safe = tl.where(above == float("-inf"), 0.0, above)  # where nothing has been seen yet
        shares = tl.exp(scores - safe[:, None])
        faded = tl.exp(most - safe)
        sums = sums * faded + tl.sum(shares, 1)
        result = result * faded[:, None] + tl.dot(shares.to(latents.dtype), latents, input_precision="ieee")
        most = above
    to = (r * HEADS + head) * SPLITS + split
    tl.store(largest + to, most, mask=real)
    tl.store(total + to, sums, mask=real)
    tl.store(part + to[:, None] * RANK + k[None, :], result, mask=real[:, None] & (k < RANK)[None, :])
    if last_of(counters + r * tl.num_programs(1) + block, SPLITS):
        _combine(
            largest, total, part, None, y, None, None, None, r, block * EACH * RANK, RANK, HEADS * RANK, EACH * RANK,
            SPLITS, GROUPS, False, False,
        )  # fmt: skip
