"""Neurons that a token chooses: by a count, without sorting, and by the upper four bits of their weights.

A choice is one program a row: the scores of a row stay in its registers while the least of those that are kept is
found, two bits at a time. A sketch (`PackedMLP` in "int8_sliced") is one pass over the neurons: the upper nibbles of
gate and up decide, and the lower ones and the down row are read of those alone that pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gpu_config
from .gpu_formats import ByRow
from .gpu_groups import dp4a
from .gpu_launch import INTERPRETED
from .gpu_mlp import summed
from .gpu_parts import ACT, PLAIN, act, dealt, launch, power, row_stride, wait
from .packed import PackedLinear, PackedMLP


def pick(score: Tensor, keep: int, threshold: float, kind: str, norm: Tensor | None) -> Tensor:
    """See `gpu_step.pick`."""
    rows, neurons = score.shape
    width = neurons if keep < 0 else keep
    listed = torch.empty((rows, width), dtype=torch.int32, device=score.device)
    block = power(neurons, 16)
    launch(
        "small", _pick_kernel, (rows if width else 0,), score, norm, listed, threshold, row_stride(score),
        NEURONS=neurons, BLOCK=block, KEEP=keep, SIZE=kind == "size", NORM=norm is not None,
        num_warps=max(1, min(32, block // 512)),
    )  # fmt: skip
    return listed


def sign_sums(x: Tensor, signs: PackedLinear) -> Tensor:
    """See `gpu_step.sign_sums`."""
    rows, outs, inputs = x.shape[0], signs.out_features, signs.in_features
    y = torch.empty((rows, outs), dtype=torch.float32, device=x.device)
    block = power(min(outs, 512)) if INTERPRETED else 4
    launch(
        "gemv", _sign_kernel, (triton.cdiv(outs, block), rows), x, signs.weight, y, outs, row_stride(x),
        signs.weight.stride(0), INPUTS=inputs, BLOCK_N=block, BLOCK_K=min(1024, power(inputs)), num_warps=4,
        nbytes=outs * inputs,
    )  # fmt: skip
    return y


def sketch_scores(x: ByRow, packed: PackedMLP) -> Tensor:
    """See `gpu_step.sketch_scores`."""
    rows, neurons = x.rows, packed.intermediate_size
    score = torch.empty((rows, neurons), dtype=torch.float32, device=packed.device)
    words, tile = _words(packed.weight), _tile(packed)
    launch(
        "gemv", _scores_kernel, (triton.cdiv(neurons, tile.block_n), rows), *_given(x), words, packed.scale,
        packed.norm, packed.gate_bias, packed.up_bias, score, neurons, words.stride(0), words.stride(1),
        WORDS=words.shape[2], BLOCK_W=power(words.shape[2]), BLOCK_N=tile.block_n, ACT=ACT[str(packed.act)],
        GATED=packed.gated, GATE_BIAS=packed.gate_bias is not None, UP_BIAS=packed.up_bias is not None, PLAIN=PLAIN,
        num_warps=tile.warps, nbytes=packed.weight.nbytes,
    )  # fmt: skip
    return score


def sketch(
    x: ByRow,
    packed: PackedMLP,
    indices: Tensor | None,
    threshold: float | None,
    refine: float,
    dtype: torch.dtype,
) -> Tensor:
    """See `gpu_step.sketch_mlp`."""
    assert packed.low is not None
    rows, hidden = x.rows, packed.hidden_size
    neurons = packed.intermediate_size if indices is None else indices.shape[-1]
    tile = _tile(packed)
    programs = max(1, min(tile.programs, triton.cdiv(neurons, tile.block_n)))
    partial = torch.empty((programs, rows, hidden), dtype=torch.float32, device=packed.device)
    words, low = _words(packed.weight), _words(packed.low)
    parts = words.shape[1]
    launch(
        "gemv", _sketch_kernel, (programs, rows), *_given(x), words, low, packed.low, packed.scale, packed.norm,
        packed.gate_bias, packed.up_bias, packed.mean, indices, partial, threshold or 0.0, refine, neurons,
        0 if indices is None or indices.dim() == 1 else indices.stride(0), words.stride(0), words.stride(1),
        low.stride(0), packed.low.stride(0), packed.low.shape[1] - 2 * packed.weight.shape[2],
        HIDDEN=hidden, BLOCK=power(hidden), WORDS=words.shape[2], BLOCK_W=power(words.shape[2]),
        BLOCK_N=tile.block_n, PARTS=parts, ACT=ACT[str(packed.act)], GATED=packed.gated, LISTED=indices is not None,
        BY_THRESHOLD=threshold is not None, REFINE=refine > 0, GATE_BIAS=packed.gate_bias is not None,
        UP_BIAS=packed.up_bias is not None, MEAN=packed.mean is not None, PLAIN=PLAIN, num_warps=tile.warps,
        num_stages=1, nbytes=neurons * (words.stride(0) + low.stride(0)) * 4,
    )  # fmt: skip
    return summed(partial, packed.down_bias, dtype)


def _words(plane: Tensor) -> Tensor:
    """Four bytes at once."""
    return plane.view(torch.int32)


def _given(x: ByRow) -> tuple[Tensor, Tensor, Tensor]:
    return _words(x.integers), x.step, x.total


def _tile(packed: PackedMLP) -> gpu_config.Bundles:
    return gpu_config.sketches(packed.weight.shape[2], packed.intermediate_size)


# ---- kernels ----


@triton.jit
def _count(key, there, candidate):
    """1 for each key that is at least the candidate."""
    return tl.where(there & (key >= candidate), 1, 0).to(tl.int64)


@triton.jit
def _pick_kernel(
    score, norm, listed, threshold, score_row, NEURONS: tl.constexpr, BLOCK: tl.constexpr, KEEP: tl.constexpr,
    SIZE: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    r = tl.program_id(0).to(tl.int64)
    neuron = tl.arange(0, BLOCK)
    there = neuron < NEURONS
    x = tl.load(score + r * score_row + neuron, mask=there, other=0.0)
    if SIZE:
        x = tl.abs(x)
    if NORM:
        x *= tl.load(norm + neuron, mask=there, other=0.0)
    x = tl.where(x == x, x, float("inf"))  # a NaN is picked: it has to reach the output
    WIDTH: tl.constexpr = NEURONS if KEEP < 0 else KEEP
    if KEEP < 0:
        kept = there & (x >= threshold)
        count = tl.sum(kept.to(tl.int32), 0)
    else:
        # integers in the order of the floats, without a sign
        bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
        key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
        least = tl.zeros((1,), tl.uint32)
        for step in tl.static_range(16):
            # three candidates for the next two bits, counted in one sum
            one = tl.full((1,), 1 << (30 - 2 * step), tl.uint32)
            first, second, third = least + one, least + one + one, least + one + one + one
            counts = tl.sum(
                _count(key, there, first)
                + (_count(key, there, second) << 20)
                + (_count(key, there, third) << 40), 0,
            )  # fmt: skip
            more = ((counts >> 40) >= KEEP).to(tl.int32)
            more += (((counts >> 20) & 0xFFFFF) >= KEEP).to(tl.int32)
            more += ((counts & 0xFFFFF) >= KEEP).to(tl.int32)
            least += one * more.to(tl.uint32)
        above = there & (key > least)
        equal = there & (key == least)
        left = KEEP - tl.sum(above.to(tl.int32), 0)
        kept = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))  # of equals the first
        count = KEEP
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(listed + r * WIDTH + place, neuron, mask=kept)
    if KEEP < 0:
        tl.store(listed + r * WIDTH + neuron, tl.full((BLOCK,), -1, tl.int32), mask=there & (neuron >= count))


@triton.jit
def _sign_kernel(
    x, signs, y, outs, x_row, row, INPUTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    n, r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1).to(tl.int64)
    at = tl.minimum(n, outs - 1).to(tl.int64)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    for start in tl.static_range(0, INPUTS, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        inside = i < INPUTS
        negative = tl.load(x + r * x_row + i, mask=inside, other=0.0).to(tl.float32) < 0
        signed = tl.load(signs + at[:, None] * row + i[None, :], mask=inside[None, :], other=128).to(tl.int32) < 128
        total += tl.where(inside[None, :], tl.where(signed == negative[None, :], 1, -1), 0)
    tl.store(y + r * outs + n, tl.sum(total, 1).to(tl.float32), mask=n < outs)


@triton.jit
def _nibble_sum(plane, neuron, bundle, word, wanted, x_low, x_high, WORDS: tl.constexpr, PLAIN: tl.constexpr):
    """[neurons]: sums of the products of a row's nibbles, 0 to 15, and the integers of x."""
    place = plane + (neuron * bundle)[:, None] + word[None, :]
    both = tl.load(place, mask=wanted[:, None] & (word < WORDS)[None, :], other=0)
    zero = tl.zeros(both.shape, tl.int32)
    dots = dp4a(both & 0x0F0F0F0F, tl.broadcast_to(x_low[None, :], both.shape), zero, False, PLAIN)
    dots = dp4a((both >> 4) & 0x0F0F0F0F, tl.broadcast_to(x_high[None, :], both.shape), dots, False, PLAIN)
    return tl.sum(dots, 1)


@triton.jit
def _x_words(x, word, WORDS: tl.constexpr):
    """A run of 128 inputs is 32 words of x and 16 of nibbles: the lower ones meet its first half, the upper ones its
    second."""
    at = word // 16 * 32 + word % 16
    low = tl.load(x + at, mask=word < WORDS, other=0)
    high = tl.load(x + at + 16, mask=word < WORDS, other=0)
    return low, high


@triton.jit
def _value(sums, step, scale, bias, neuron, at, wanted, BIAS: tl.constexpr):
    """[neurons] of float32: integers of weights times those of x, in their units."""
    value = sums * (step * tl.load(scale + at, mask=wanted, other=0.0))
    if BIAS:
        value += tl.load(bias + neuron, mask=wanted, other=0.0)
    return value


@triton.jit
def _middle(sums, total):
    """Sums of upper nibbles, times 16, with lower ones of 7.5 and less 128; total: the sum of x."""
    return (sums * 16 - total * 120).to(tl.float32) - total.to(tl.float32) * 0.5


@triton.jit
def _sketched(
    gate_sum, up_sum, step, total, scale, norm, gate_bias, up_bias, neuron, wanted, ACT: tl.constexpr,
    GATED: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr,
):  # fmt: skip
    """[neurons]: the scores by the upper nibbles, where a lower one counts as the middle of its range."""
    parts: tl.constexpr = 3 if GATED else 2
    h = _value(_middle(up_sum, total), step, scale, up_bias, neuron, neuron * parts + parts - 2, wanted, UP_BIAS)
    if GATED:
        gate = _middle(gate_sum, total)
        gate = _value(gate, step, scale, gate_bias, neuron, neuron * parts, wanted, GATE_BIAS)
        h = act(gate, ACT) * h
    else:
        h = act(h, ACT)
    return tl.abs(h) * tl.load(norm + neuron, mask=wanted, other=0.0)


@triton.jit
def _scores_kernel(
    x, step, total, words, scale, norm, gate_bias, up_bias, score, neurons, bundle, part,
    WORDS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr,
    GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, PLAIN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    r = tl.program_id(1).to(tl.int64)
    word = tl.arange(0, BLOCK_W)
    low, high = _x_words(x + r * WORDS * 2, word, WORDS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = n < neurons
    neuron = tl.where(wanted, n, 0).to(tl.int64)
    first = _nibble_sum(words, neuron, bundle, word, wanted, low, high, WORDS, PLAIN)
    second = first
    if GATED:
        second = _nibble_sum(words + part, neuron, bundle, word, wanted, low, high, WORDS, PLAIN)
    found = _sketched(
        first, second, tl.load(step + r), tl.load(total + r), scale, norm, gate_bias, up_bias, neuron, wanted, ACT,
        GATED, GATE_BIAS, UP_BIAS,
    )  # fmt: skip
    tl.store(score + r * neurons + n, found, mask=wanted)


@triton.jit
def _sketch_kernel(
    x, step, total, words, low_words, down, scale, norm, gate_bias, up_bias, mean, indices, partial, threshold, refine,
    neurons, list_row, bundle, part, low_bundle, down_bundle, down_first,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, LISTED: tl.constexpr, BY_THRESHOLD: tl.constexpr,
    REFINE: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, MEAN: tl.constexpr, PLAIN: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    r, programs = tl.program_id(1).to(tl.int64), tl.num_programs(0)
    word, column = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK)
    x_low, x_high = _x_words(x + r * WORDS * 2, word, WORDS)
    of_row, sum_of_x = tl.load(step + r), tl.load(total + r)
    y = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tl.cdiv(neurons, BLOCK_N * programs)):
        block = start * programs + tl.program_id(0)
        neuron, wanted = dealt(block, indices, r * list_row, neurons, BLOCK_N, LISTED)
        first = _nibble_sum(words, neuron, bundle, word, wanted, x_low, x_high, WORDS, PLAIN)
        second = first
        if GATED:
            second = _nibble_sum(words + part, neuron, bundle, word, wanted, x_low, x_high, WORDS, PLAIN)
        if BY_THRESHOLD:
            score = _sketched(
                first, second, of_row, sum_of_x, scale, norm, gate_bias, up_bias, neuron, wanted, ACT, GATED,
                GATE_BIAS, UP_BIAS,
            )  # fmt: skip
            wanted = wanted & ((score < threshold) == 0)  # a NaN is computed
        up = second * 16 - sum_of_x * 128 + _nibble_sum(
            low_words + (PARTS - 1) * part, neuron, low_bundle, word, wanted, x_low, x_high, WORDS, PLAIN
        )  # fmt: skip
        at_scale = neuron * (PARTS + 1)
        at_up = at_scale + PARTS - 1
        h = _value(up.to(tl.float32), of_row, scale, up_bias, neuron, at_up, wanted, UP_BIAS)
        if GATED:
            gate = first * 16 - sum_of_x * 128 + _nibble_sum(
                low_words, neuron, low_bundle, word, wanted, x_low, x_high, WORDS, PLAIN
            )  # fmt: skip
            gate = _value(gate.to(tl.float32), of_row, scale, gate_bias, neuron, at_scale, wanted, GATE_BIAS)
            h = act(gate, ACT) * h
        else:
            h = act(h, ACT)
        if MEAN:
            h -= tl.load(mean + neuron, mask=wanted, other=0.0)
        if REFINE:
            cost = tl.abs(h) * tl.load(norm + neuron, mask=wanted, other=0.0)
            wanted = wanted & ((cost < refine) == 0)
        rows = tl.load(
            down + (neuron * down_bundle)[:, None] + down_first + column[None, :],
            mask=wanted[:, None] & (column < HIDDEN)[None, :], other=128,
        ).to(tl.float32)  # fmt: skip
        h *= tl.load(scale + at_scale + PARTS, mask=wanted, other=0.0)
        y += tl.sum((rows - 128) * tl.where(wanted, h, 0.0)[:, None], 0)
    to = (tl.program_id(0) * tl.num_programs(1) + r) * HIDDEN
    tl.store(partial + to + column, y, mask=column < HIDDEN)
