"""Products with matrices in 4- or 8-bit groups: by dot products of four bytes for one to three rows, by tensor cores
for more.

A dot product of bytes reads a weight once and multiplies it once a row: on an H200 it is bound by memory for one row
and by arithmetic from two on. Tensor cores multiply the 32 numbers of a group by those of 16 rows at once. Both sum the
integers of a group exactly and the groups in float32, as the definition does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gpu_config
from .gpu_formats import GroupedMatrix, Quantized
from .gpu_parts import PLAIN, launch, wait

MAX_DOT_ROWS = 3


def linear(x: Quantized, matrix: GroupedMatrix, out: Tensor, listed: Tensor | None, form: str | None) -> None:
    """Writes x @ weight.t() + bias to out [R, outs], whose rows may lie apart; listed: the outputs that are asked for.
    See `gpu_step.linears`."""
    rows, groups = x.step.shape
    outs = out.shape[1]
    if rows <= MAX_DOT_ROWS and form != "many":
        kernel, tile, each = _dot_kernel, gpu_config.group_dot(outs, groups), rows
        words, integers = matrix.words, x.integers.view(torch.int32)
    else:
        kernel, tile = _tile_kernel, gpu_config.group_tiles(outs, groups)
        each = 8 if rows <= 8 or form == "many" else 16
        words, integers = matrix.words.view(torch.int8 if matrix.bits == 8 else torch.uint8), x.integers
    grid = (triton.cdiv(outs, tile.block_n), triton.cdiv(rows, each))
    launch(
        "gemv", kernel, grid, words, matrix.ends, matrix.bias, integers, x.step, x.total, listed, out, outs,
        matrix.words.stride(0) // matrix.bits, matrix.ends.stride(0), out.stride(0), rows,
        ROWS=each, GROUPS=groups, BITS=matrix.bits, BIAS=matrix.bias is not None,
        LISTED=listed is not None, BLOCK_N=tile.block_n, BLOCK_G=tile.block_g, PLAIN=PLAIN, num_warps=tile.warps,
        num_stages=tile.stages,
        nbytes=outs * groups * (matrix.bits * 4 + 4),
    )  # fmt: skip


# ---- kernels ----


@triton.jit
def dp4a(a, b, c, SIGNED: tl.constexpr, PLAIN: tl.constexpr):
    """c plus the products of the four bytes of a, signed or not, and the signed ones of b."""
    if PLAIN:
        for shift in tl.static_range(0, 32, 8):
            one = (a >> shift) & 255
            if SIGNED:
                one = (one ^ 128) - 128
            c += one * ((((b >> shift) & 255) ^ 128) - 128)
    elif SIGNED:
        c = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        c = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    return c


@triton.jit
def _halves(ends):
    """The scales and leasts of int32 ends, as float32."""
    scale = ends.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    least = (ends >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, least


@triton.jit
def _interleaved(low, high, PLAIN: tl.constexpr):
    """Bytes of two words in turn: l0 h0 l1 h1, and l2 h2 l3 h3; all of them are below 128."""
    if PLAIN:
        first = (low & 255) | ((high & 255) << 8) | ((low & 0xFF00) << 8) | ((high & 0xFF00) << 16)
        low, high = low >> 16, high >> 16
        last = (low & 255) | ((high & 255) << 8) | ((low & 0xFF00) << 8) | ((high & 0xFF00) << 16)
    else:
        first = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5140;", "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
        last = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7362;", "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    return first, last


@triton.jit
def _products(first, last, x, step, total, scale, least, place, group, there, BITS: tl.constexpr, PLAIN: tl.constexpr):
    """[outs, groups]: what each group adds, of one row of x. first, last: four words of weights each."""
    zero = tl.zeros(first.shape, tl.int32)
    x_first = tl.broadcast_to(tl.load(x + place, mask=there[None, :, None], other=0), first.shape)
    x_last = tl.broadcast_to(tl.load(x + place + 4, mask=there[None, :, None], other=0), first.shape)
    dots = dp4a(last, x_last, dp4a(first, x_first, zero, BITS == 8, PLAIN), BITS == 8, PLAIN)
    steps = tl.load(step + group, mask=there, other=0.0)
    totals = tl.load(total + group, mask=there, other=0.0)
    return tl.sum(dots, 2).to(tl.float32) * (scale * steps[None, :]) + least * totals[None, :]


@triton.jit
def _dot_kernel(
    words, ends, bias, x, step, total, listed, out, outs, row_groups, row_ends, out_stride, rows,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, BIAS: tl.constexpr, LISTED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, PLAIN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, outs - 1).to(tl.int64)  # beyond the last output it is computed again, and not stored
    if LISTED:
        wait(OVERLAP)
        row = tl.load(listed + row)
    sum0 = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    sum1 = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    sum2 = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    four = tl.arange(0, 4)[None, None, :]
    for start in tl.static_range(0, GROUPS, BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        there = group < GROUPS
        # a row's place is counted in groups, so that every load is known to be of 16 bytes
        at = words + (row[:, None] * row_groups + group[None, :])[:, :, None] * BITS + four
        first = tl.load(at, mask=there[None, :, None], other=0)
        if BITS == 4:
            first, last = _interleaved(first & 0x0F0F0F0F, (first >> 4) & 0x0F0F0F0F, PLAIN)
        else:
            last = tl.load(at + 4, mask=there[None, :, None], other=0)
        packed = tl.load(ends + row[:, None] * row_ends + group[None, :], mask=there[None, :], other=0)
        if start == 0 and not LISTED:
            wait(OVERLAP)
        scale, least = _halves(packed)
        place = group[None, :, None] * 8 + four
        sum0 += _products(first, last, x, step, total, scale, least, place, group, there, BITS, PLAIN)
        if ROWS > 1:
            sum1 += _products(
                first, last, x + GROUPS * 8, step + GROUPS, total + GROUPS, scale, least, place, group, there, BITS,
                PLAIN,
            )  # fmt: skip
        if ROWS > 2:
            sum2 += _products(
                first, last, x + GROUPS * 16, step + GROUPS * 2, total + GROUPS * 2, scale, least, place, group, there,
                BITS, PLAIN,
            )  # fmt: skip
    here = n < outs
    more = tl.zeros((BLOCK_N,), tl.float32)
    if BIAS:
        more = tl.load(bias + row).to(tl.float32)
    tl.store(out + n, (tl.sum(sum0, 1) + more).to(out.dtype.element_ty), mask=here)
    if ROWS > 1:
        tl.store(out + out_stride + n, (tl.sum(sum1, 1) + more).to(out.dtype.element_ty), mask=here)
    if ROWS > 2:
        tl.store(out + 2 * out_stride + n, (tl.sum(sum2, 1) + more).to(out.dtype.element_ty), mask=here)


@triton.jit
def _nibbles(both, PLAIN: tl.constexpr):
    """The lower and the upper halves of bytes, as int8; four bytes at once, which the compiler does not see."""
    if PLAIN:
        low, high = (both & 15).to(tl.int8), (both >> 4).to(tl.int8)
    else:
        low, high = tl.inline_asm_elementwise(
            "and.b32 $0, $2, 0x0F0F0F0F; shr.u32 $1, $2, 4; and.b32 $1, $1, 0x0F0F0F0F;", "=&r,=&r,r", [both],
            dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    return low, high


@triton.jit
def _tile_kernel(
    words, ends, bias, x, step, total, listed, out, outs, row_groups, row_ends, out_stride, rows,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, BIAS: tl.constexpr, LISTED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, PLAIN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = tl.where(n < outs, n, 0).to(tl.int64)
    if LISTED:
        row = tl.load(listed + row)
    sums = tl.zeros((BLOCK_G, BLOCK_N, ROWS), tl.float32)
    order = tl.arange(0, 32)
    if BITS == 4:
        order = order // 8 * 4 + order % 4 + order // 4 % 2 * 16  # of inputs, as nibbles lie
    for start in range(0, GROUPS, BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        there = group < GROUPS
        of_rows = there[:, None] & (r < rows)[None, :]
        of_outs = there[:, None] & (n < outs)[None, :]
        place = (row[None, :] * row_groups + group[:, None])[:, :, None] * (BITS * 4)
        if BITS == 4:
            both = tl.load(words + place + tl.arange(0, 16)[None, None, :], mask=of_outs[:, :, None], other=0)
            low, high = _nibbles(both, PLAIN)
            q = tl.reshape(tl.join(low, high), (BLOCK_G, BLOCK_N, 32))
        else:
            q = tl.load(words + place + tl.arange(0, 32)[None, None, :], mask=of_outs[:, :, None], other=0)
        x_place = (r[None, :] * GROUPS + group[:, None])[:, :, None] * 32 + order[None, None, :]
        given = tl.permute(tl.load(x + x_place, mask=of_rows[:, :, None], other=0), (0, 2, 1))
        products = tl.dot(q, given, out_dtype=tl.int32).to(tl.float32)
        scale, least = _halves(tl.load(ends + row[None, :] * row_ends + group[:, None], mask=of_outs, other=0))
        at = r[None, :] * GROUPS + group[:, None]
        steps = tl.load(step + at, mask=of_rows, other=0.0)
        totals = tl.load(total + at, mask=of_rows, other=0.0)
        sums += products * (scale[:, :, None] * steps[:, None, :])
        sums += least[:, :, None] * totals[:, None, :]
    y = tl.sum(sums, 0)
    if BIAS:
        y += tl.load(bias + row).to(tl.float32)[:, None]
    tl.store(
        out + r[None, :] * out_stride + n[:, None], y.to(out.dtype.element_ty),
        mask=(n < outs)[:, None] & (r < rows)[None, :],
    )  # fmt: skip
