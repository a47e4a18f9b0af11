"""The Triton backend of the ops, for CUDA tensors; under TRITON_INTERPRET=1 it runs on CPU tensors, slowly, for tests.

An MLP of floats is one pass over its bundles (gpu_mlp.py). One in 8 bits is three launches: the activations of the
listed neurons, partial sums of the down projection in float32, and their sum. Nothing depends on the order in which
blocks run, nothing is read back to the host, and all sizes depend on shapes alone, so that a call can be captured in a
CUDA graph. No kernel is tuned by trying, for the same reason.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gpu_mlp, reference
from .gpu_launch import INTERPRETED
from .gpu_parts import ACT as _ACT
from .gpu_parts import act as _act
from .gpu_parts import launch
from .packed import PackedMLP, quantize

__all__ = ["INTERPRETED", "choose", "mlp"]

_FLOAT, _BYTES, _SLICED, _HIGH = 0, 1, 2, 3  # how _weights reads
_BLOCKS = 512  # about 4 for each multiprocessor, of 8 kB under way


def mlp(
    x: Tensor, packed: PackedMLP, indices: Tensor | None, rule: str, keep: int, threshold: float, refine: float
) -> Tensor:
    """The op coreskip::mlp; `ops.mlp` describes it. An index out of range is not noticed: it is never read back."""
    rows = x.reshape(-1, packed.hidden_size).contiguous()
    if packed.scale is None and rule == "gate" and keep < 0:
        return gpu_mlp.mlp(rows, packed, None, rule, threshold, x.dtype, None).reshape(x.shape)
    if rule != "listed":
        indices = choose(x, packed, rule, keep, threshold)
    if packed.scale is None:
        return gpu_mlp.mlp(rows, packed, indices, "listed", 0.0, x.dtype, None).reshape(x.shape)
    count = packed.intermediate_size if indices is None else indices.shape[-1]
    h = _activations(rows, packed, indices, count, refine=refine)
    return _down(h, packed, indices, x, skip_zeros=refine > 0).reshape(x.shape)


def choose(x: Tensor, packed: PackedMLP, rule: str, keep: int, threshold: float) -> Tensor:
    """The op coreskip::choose; `ops.sketch_select` describes it."""
    rows = x.reshape(-1, packed.hidden_size).contiguous()
    score = _activations(rows, packed, None, packed.intermediate_size, rule=rule).abs()
    if packed.norm is not None:
        score = score * packed.norm
    return reference.pick(score, keep, threshold)


def _activations(
    rows: Tensor, packed: PackedMLP, indices: Tensor | None, count: int, rule: str = "listed", refine: float = 0.0
) -> Tensor:
    """[R, count] in float32: act(gate) * up; for the rule "gate" act(gate) alone, for "sketch" from high nibbles.

    0 where what a neuron would add to the output is below `refine`, see `reference.refined`.
    """
    h = torch.empty((rows.shape[0], count), dtype=torch.float32, device=rows.device)
    scale = None
    if packed.scale is not None:
        rows, scale = quantize(rows.float())
    block_n, block_d = 16, min(256, triton.next_power_of_2(packed.hidden_size))
    while block_n > 4 and triton.cdiv(count, block_n) * rows.shape[0] < _BLOCKS:
        block_n //= 2
    grid = (triton.cdiv(count, block_n), rows.shape[0])
    launch(
        "gemv", _activations_kernel, grid, rows, scale, packed.weight, packed.low, packed.scale, packed.gate_bias,
        packed.up_bias, packed.mean, packed.norm, indices, h, refine, packed.hidden_size, count, _list_stride(indices),
        packed.weight.stride(0), packed.weight.stride(1), 0 if packed.low is None else packed.low.stride(0),
        FORMAT=_HIGH if rule == "sketch" else _format(packed), ACT=_ACT[str(packed.act)],
        GATED=packed.gated, GATE_ONLY=rule == "gate", LISTED=indices is not None,
        GATE_BIAS=packed.gate_bias is not None, UP_BIAS=packed.up_bias is not None,
        MEAN=rule == "listed" and packed.mean is not None,  # scores are of the activations themselves
        REFINE=refine > 0,
        BLOCK_N=block_n, BLOCK_D=block_d,
    )  # fmt: skip
    return h


def _down(h: Tensor, packed: PackedMLP, indices: Tensor | None, x: Tensor, skip_zeros: bool) -> Tensor:
    assert packed.scale is not None
    rows, count = h.shape
    hidden = packed.hidden_size
    down = packed.weight[:, -1] if packed.low is None else packed.low[:, -2 * packed.weight.shape[2] :]
    block_k, block_d = 16, min(256, triton.next_power_of_2(hidden))
    columns = triton.cdiv(hidden, block_d)
    splits = 32 if columns * rows * 16 < _BLOCKS else 16  # parts of the sum over neurons
    partial = torch.empty((splits, rows, hidden), dtype=torch.float32, device=x.device)
    launch(
        "gemv", _down_kernel, (columns, splits, rows), h, down, packed.scale, indices, partial, hidden, count,
        triton.cdiv(count, splits), _list_stride(indices), down.stride(0), packed.scale.shape[1],
        LISTED=indices is not None, SKIP_ZEROS=skip_zeros, BLOCK_K=block_k, BLOCK_D=block_d,
    )  # fmt: skip
    return gpu_mlp.summed(partial, packed.down_bias, x.dtype)


def _format(packed: PackedMLP) -> int:
    return {None: _FLOAT, "int8": _BYTES, "int8_sliced": _SLICED}[packed.fmt]


def _list_stride(indices: Tensor | None) -> int:
    return 0 if indices is None or indices.dim() == 1 else indices.stride(0)


# ---- kernels ----


@triton.jit
def _activations_kernel(
    x, x_scale, weight, low, scale, gate_bias, up_bias, mean, norm, indices, h,
    refine, hidden, count, list_stride, bundle, row, low_bundle,
    FORMAT: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, GATE_ONLY: tl.constexpr, LISTED: tl.constexpr,
    GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, MEAN: tl.constexpr, REFINE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(1)
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    neuron, wanted = _neurons(indices + r * list_stride if LISTED else indices, at, count, LISTED)
    projections: tl.constexpr = 2 if GATED else 1
    first = _project(
        x + r * hidden, weight + neuron * bundle, low + neuron * low_bundle if FORMAT == 2 else low, wanted, hidden,
        FORMAT, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if FORMAT > 0:
        factor = tl.load(x_scale + r)
        first *= factor * tl.load(scale + neuron * (projections + 1), mask=wanted, other=0)
    if GATE_BIAS:
        first += tl.load(gate_bias + neuron, mask=wanted, other=0)
    if UP_BIAS and not GATED:
        first += tl.load(up_bias + neuron, mask=wanted, other=0)
    value = _act(first, ACT)
    if GATED and not GATE_ONLY:
        up = _project(
            x + r * hidden, weight + neuron * bundle + row, low + neuron * low_bundle + row if FORMAT == 2 else low,
            wanted, hidden, FORMAT, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        if FORMAT > 0:
            up *= factor * tl.load(scale + neuron * 3 + 1, mask=wanted, other=0)
        if UP_BIAS:
            up += tl.load(up_bias + neuron, mask=wanted, other=0)
        value *= up
    if MEAN:
        value -= tl.load(mean + neuron, mask=wanted, other=0)
    if REFINE:
        value = tl.where(tl.abs(value) * tl.load(norm + neuron, mask=wanted, other=0) < refine, 0, value)
    tl.store(h + r * count + at, tl.where(wanted, value, 0), mask=at < count)


@triton.jit
def _neurons(indices, at, count, LISTED: tl.constexpr):
    """The neurons at some places of a list, and which of them there are: beyond the end and at -1 there is none."""
    if LISTED:
        neuron = tl.load(indices + at, mask=at < count, other=-1).to(tl.int64)
    else:
        neuron = tl.where(at < count, at, -1).to(tl.int64)
    return tl.where(neuron >= 0, neuron, 0), neuron >= 0


@triton.jit
def _project(x, weight, low, wanted, hidden, FORMAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_N]: the products of x and the rows that `weight` (and `low`) point to."""
    total = tl.zeros((BLOCK_N,), tl.float32)
    end = hidden * tl.max(wanted.to(tl.int32), 0)  # most blocks of a list by threshold are beyond its end
    for start in range(0, end, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = column < hidden
        mask = wanted[:, None] & inside[None, :]
        xs = tl.load(x + column, mask=inside, other=0).to(tl.float32)
        if FORMAT >= 2:
            # A run of 128 weights is 64 bytes: the low nibbles are its first half, the high ones its second.
            byte = column // 128 * 64 + column % 64
            shift = (column % 128 // 64 * 4)[None, :]
            ws = (tl.load(weight[:, None] + byte[None, :], mask=mask, other=0).to(tl.int32) >> shift & 15) * 16.0
            if FORMAT == 2:
                ws += (tl.load(low[:, None] + byte[None, :], mask=mask, other=0).to(tl.int32) >> shift & 15) - 128.0
            else:
                ws += 7.5 - 128  # a low nibble that is not read counts as the middle of its range
        else:
            ws = tl.load(weight[:, None] + column[None, :], mask=mask, other=0).to(tl.float32)
            if FORMAT == 1:
                ws -= 128
        total += tl.sum(ws * xs[None, :], 1)
    return total


@triton.jit
def _down_kernel(
    h, down, scale, indices, partial, hidden, count, share, list_stride, bundle, parts,
    LISTED: tl.constexpr, SKIP_ZEROS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    split, r = tl.program_id(1), tl.program_id(2)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < hidden
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, share, BLOCK_K):
        # dealt out in turn: the neurons of a list by threshold are all at its beginning
        at = (start + tl.arange(0, BLOCK_K)) * tl.num_programs(1) + split
        neuron, wanted = _neurons(indices + r * list_stride if LISTED else indices, at, count, LISTED)
        factor = tl.load(h + r * count + at, mask=wanted, other=0)
        if SKIP_ZEROS:
            wanted = wanted & (factor != 0)
        ws = tl.load(
            down + neuron[:, None] * bundle + column[None, :], mask=wanted[:, None] & inside[None, :], other=0
        ).to(tl.float32)
        factor *= tl.load(scale + neuron * parts + parts - 1, mask=wanted, other=0)
        total += tl.sum((ws - 128) * factor[:, None], 0)
    tl.store(partial + (split * tl.num_programs(2) + r) * hidden + column, total, mask=inside)
