"""The Triton backend of the ops, for CUDA tensors; under TRITON_INTERPRET=1 it runs on CPU tensors, slowly, for tests.

An MLP of floats is one pass over its bundles (gpu_mlp.py), a sliced one over its nibbles (gpu_choice.py). One in 8 bits
is three launches: the activations of the listed neurons, partial sums of the down projection in float32, and their sum.
Nothing depends on the order in which blocks run, nothing is read back to the host, and all sizes depend on shapes
alone, so that a call can be captured in a CUDA graph. No kernel is tuned by trying, for the same reason.
"""

from __future__ import annotations

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gpu_mlp, gpu_step
from .gpu_formats import FloatMatrix
from .gpu_launch import INTERPRETED
from .gpu_parts import ACT as _ACT
from .gpu_parts import act as _act
from .gpu_parts import launch
from .packed import PackedMLP, quantize

__all__ = ["INTERPRETED", "choose", "mlp"]

_BLOCKS = 512  # about 4 for each multiprocessor, of 8 kB under way


def mlp(
    x: Tensor, packed: PackedMLP, indices: Tensor | None, rule: str, keep: int, threshold: float, refine: float
) -> Tensor:
    """The op coreskip::mlp; `ops.mlp` describes it. An index out of range is not noticed: it is never read back."""
    rows = x.reshape(-1, packed.hidden_size).contiguous()
    if packed.scale is None and rule == "gate" and keep < 0:
        return gpu_mlp.mlp(rows, packed, None, rule, threshold, x.dtype, None).reshape(x.shape)
    if rule == "sketch" and keep < 0:
        y = gpu_step.sketch_mlp(rows, packed, threshold=threshold, refine=refine, dtype=x.dtype)
        return y.reshape(x.shape)
    if rule != "listed":
        indices = _chosen(rows, packed, rule, keep, threshold)
    if packed.low is not None:
        return gpu_step.sketch_mlp(rows, packed, indices=indices, refine=refine, dtype=x.dtype).reshape(x.shape)
    if packed.scale is None:
        return gpu_mlp.mlp(rows, packed, indices, "listed", 0.0, x.dtype, None).reshape(x.shape)
    count = packed.intermediate_size if indices is None else indices.shape[-1]
    h = _activations(rows, packed, indices, count, gate_only=False)
    return _down(h, packed, indices, x).reshape(x.shape)


def choose(x: Tensor, packed: PackedMLP, rule: str, keep: int, threshold: float) -> Tensor:
    """The op coreskip::choose; `ops.sketch_select` describes it."""
    rows = x.reshape(-1, packed.hidden_size).contiguous()
    return _chosen(rows, packed, rule, keep, threshold).long()


def _chosen(rows: Tensor, packed: PackedMLP, rule: str, keep: int, threshold: float) -> Tensor:
    """int32 [R, k]."""
    if rule == "sketch":
        score = gpu_step.sketch_scores(rows, packed)
    elif packed.scale is None:
        gates = FloatMatrix(packed.weight[:, 0, : packed.hidden_size], packed.gate_bias)
        made = gpu_step.activated(rows, [gates], str(packed.act), gated=False, dtype=torch.float32)
        score = cast(Tensor, made).abs()
    else:
        score = _activations(rows, packed, None, packed.intermediate_size, gate_only=True).abs()
    return gpu_step.pick(score, keep=None if keep < 0 else keep, threshold=threshold)


def _activations(rows: Tensor, packed: PackedMLP, indices: Tensor | None, count: int, gate_only: bool) -> Tensor:
    """[R, count] in float32: act(gate) * up, or act(gate) alone."""
    assert packed.scale is not None
    h = torch.empty((rows.shape[0], count), dtype=torch.float32, device=rows.device)
    rows, scale = quantize(rows.float())
    block_n, block_d = 16, min(256, triton.next_power_of_2(packed.hidden_size))
    while block_n > 4 and triton.cdiv(count, block_n) * rows.shape[0] < _BLOCKS:
        block_n //= 2
    grid = (triton.cdiv(count, block_n), rows.shape[0])
    launch(
        "gemv", _activations_kernel, grid, rows, scale, packed.weight, packed.scale, packed.gate_bias,
        packed.up_bias, packed.mean, indices, h, packed.hidden_size, count, _list_stride(indices),
        packed.weight.stride(0), packed.weight.stride(1), ACT=_ACT[str(packed.act)],
        GATED=packed.gated, GATE_ONLY=gate_only, LISTED=indices is not None,
        GATE_BIAS=packed.gate_bias is not None, UP_BIAS=packed.up_bias is not None,
        MEAN=not gate_only and packed.mean is not None,  # scores are of the activations themselves
        BLOCK_N=block_n, BLOCK_D=block_d,
    )  # fmt: skip
    return h


def _down(h: Tensor, packed: PackedMLP, indices: Tensor | None, x: Tensor) -> Tensor:
    assert packed.scale is not None
    rows, count = h.shape
    hidden = packed.hidden_size
    down = packed.weight[:, -1]
    block_k, block_d = 16, min(256, triton.next_power_of_2(hidden))
    columns = triton.cdiv(hidden, block_d)
    splits = 32 if columns * rows * 16 < _BLOCKS else 16  # parts of the sum over neurons
    partial = torch.empty((splits, rows, hidden), dtype=torch.float32, device=x.device)
    launch(
        "gemv", _down_kernel, (columns, splits, rows), h, down, packed.scale, indices, partial, hidden, count,
        triton.cdiv(count, splits), _list_stride(indices), down.stride(0), packed.scale.shape[1],
        LISTED=indices is not None, BLOCK_K=block_k, BLOCK_D=block_d,
    )  # fmt: skip
    return gpu_mlp.summed(partial, packed.down_bias, x.dtype)


def _list_stride(indices: Tensor | None) -> int:
    return 0 if indices is None or indices.dim() == 1 else indices.stride(0)


# ---- kernels ----


@triton.jit
def _activations_kernel(
    x, x_scale, weight, scale, gate_bias, up_bias, mean, indices, h, hidden, count, list_stride, bundle, row,
    ACT: tl.constexpr, GATED: tl.constexpr, GATE_ONLY: tl.constexpr, LISTED: tl.constexpr,
    GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, MEAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    neuron, wanted = _neurons(indices + r * list_stride if LISTED else indices, at, count, LISTED)
    projections: tl.constexpr = 2 if GATED else 1
    first = _project(x + r * hidden, weight + neuron * bundle, wanted, hidden, BLOCK_N, BLOCK_D)
    factor = tl.load(x_scale + r)
    first *= factor * tl.load(scale + neuron * (projections + 1), mask=wanted, other=0)
    if GATE_BIAS:
        first += tl.load(gate_bias + neuron, mask=wanted, other=0)
    if UP_BIAS and not GATED:
        first += tl.load(up_bias + neuron, mask=wanted, other=0)
    value = _act(first, ACT)
    if GATED and not GATE_ONLY:
        up = _project(x + r * hidden, weight + neuron * bundle + row, wanted, hidden, BLOCK_N, BLOCK_D)
        up *= factor * tl.load(scale + neuron * 3 + 1, mask=wanted, other=0)
        if UP_BIAS:
            up += tl.load(up_bias + neuron, mask=wanted, other=0)
        value *= up
    if MEAN:
        value -= tl.load(mean + neuron, mask=wanted, other=0)
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
def _project(x, weight, wanted, hidden, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_N]: the products of x and the rows that `weight` points to."""
    total = tl.zeros((BLOCK_N,), tl.float32)
    end = hidden * tl.max(wanted.to(tl.int32), 0)  # most blocks of a list by threshold are beyond its end
    for start in range(0, end, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = column < hidden
        mask = wanted[:, None] & inside[None, :]
        xs = tl.load(x + column, mask=inside, other=0).to(tl.float32)
        ws = tl.load(weight[:, None] + column[None, :], mask=mask, other=0).to(tl.float32) - 128
        total += tl.sum(ws * xs[None, :], 1)
    return total


@triton.jit
def _down_kernel(
    h, down, scale, indices, partial, hidden, count, share, list_stride, bundle, parts,
    LISTED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    split, r = tl.program_id(1), tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < hidden
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, share, BLOCK_K):
        # dealt out in turn: the neurons of a list by threshold are all at its beginning
        at = (start + tl.arange(0, BLOCK_K)) * tl.num_programs(1) + split
        neuron, wanted = _neurons(indices + r * list_stride if LISTED else indices, at, count, LISTED)
        factor = tl.load(h + r * count + at, mask=wanted, other=0)
        ws = tl.load(
            down + neuron[:, None] * bundle + column[None, :], mask=wanted[:, None] & inside[None, :], other=0
        ).to(tl.float32)
        factor *= tl.load(scale + neuron * parts + parts - 1, mask=wanted, other=0)
        total += tl.sum((ws - 128) * factor[:, None], 0)
    tl.store(partial + (split * tl.num_programs(2) + r) * hidden + column, total, mask=inside)
