"""An MLP over bundles in one pass, and a linear over columns of which some stay unread.

Each program of a grid as large as the GPU walks its share of the neurons and keeps a sum of outputs of its own; a
second launch adds these up. The down row of a neuron is loaded beside its gate and up rows wherever that does not
depend on them, so that memory is never waited for twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import gpu_config, gpu_norm
from .gpu_launch import count
from .gpu_parts import ACT, act, launch, power, row_stride, wait
from .packed import PackedColumns, PackedMLP

_RULE = {"listed": 0, "gate": 1, "activation": 2}
_MANY = 32  # rows that torch's products get in the form "many"


def mlp(
    x: Tensor,
    packed: PackedMLP,
    indices: Tensor | None,
    rule: str,
    threshold: float,
    dtype: torch.dtype,
    form: str | None,
) -> Tensor:
    """See `gpu_step.mlp`. Several rows that compute all neurons read them once, by torch's products."""
    dense = indices is None and rule == "listed"
    if dense and (form == "many" or (x.shape[0] > 1 and form is None)):
        return _dense(x, packed, dtype, form)
    return one_pass(x, packed, indices, rule, threshold, dtype)


def one_pass(
    x: Tensor, packed: PackedMLP, indices: Tensor | None, rule: str, threshold: float, dtype: torch.dtype
) -> Tensor:
    """[R, hidden]: each row on its own."""
    rows, hidden, weight = x.shape[0], packed.hidden_size, packed.weight
    neurons = packed.intermediate_size if indices is None else indices.shape[-1]
    tile = gpu_config.bundles(hidden, weight.element_size(), neurons)
    partial = torch.empty((tile.programs, rows, hidden), dtype=torch.float32, device=x.device)
    normed = rule == "activation" and packed.norm is not None
    launch(
        "gemv", _mlp_kernel, (tile.programs, rows), x, weight, packed.gate_bias, packed.up_bias, packed.mean,
        packed.norm if normed else None, indices, partial, threshold, neurons, row_stride(x),
        0 if indices is None or indices.dim() == 1 else indices.stride(0), weight.stride(0), weight.stride(1),
        HIDDEN=hidden, BLOCK=power(hidden), BLOCK_N=tile.block_n, ACT=ACT[str(packed.act)], GATED=packed.gated,
        RULE=_RULE[rule], LISTED=indices is not None, GATE_BIAS=packed.gate_bias is not None,
        UP_BIAS=packed.up_bias is not None, MEAN=packed.mean is not None, NORM=normed, num_warps=tile.warps,
        num_stages=1, nbytes=neurons * weight.shape[1] * hidden * weight.element_size(),
    )  # fmt: skip
    return summed(partial, packed.down_bias, dtype)


def columns(x: Tensor, packed: PackedColumns, threshold: float, by_norm: bool, dtype: torch.dtype) -> Tensor:
    """See `gpu_step.columns`."""
    rows, weight = x.shape[0], packed.weight
    outs, inputs = packed.out_features, packed.in_features
    tile = gpu_config.columns(outs, inputs)
    partial = torch.empty((tile.splits, rows, outs), dtype=torch.float32, device=x.device)
    launch(
        "gemv", _columns_kernel, (triton.cdiv(outs, tile.block_o), tile.splits, rows), x, weight,
        packed.norm if by_norm else None, partial, threshold, outs, inputs, row_stride(x), weight.stride(0),
        triton.cdiv(inputs, tile.splits * tile.block_i), NORM=by_norm, BLOCK_I=tile.block_i, BLOCK_O=tile.block_o,
        num_warps=4, num_stages=2, nbytes=outs * inputs * weight.element_size(),
    )  # fmt: skip
    return summed(partial, packed.bias, dtype)


def summed(partial: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[rows, width]: the sum of partial [programs, rows, width], float32, and a bias [width]."""
    programs, rows, width = partial.shape
    out = torch.empty((rows, width), dtype=dtype, device=partial.device)
    launch(
        "small", _sum_kernel, (triton.cdiv(width, 32), rows), partial, bias, out, width, rows * width,
        PROGRAMS=programs, BIAS=bias is not None, num_warps=4,
    )  # fmt: skip
    return out


def _dense(x: Tensor, packed: PackedMLP, dtype: torch.dtype, form: str | None) -> Tensor:
    """By torch's products over the bundles as they lie, gate and up of all rows first."""
    rows, hidden, weight = x.shape[0], packed.hidden_size, packed.weight
    x = x.to(weight.dtype)
    if form == "many" and rows < _MANY:
        x = F.pad(x, (0, 0, 0, _MANY - rows))
    parts = weight.shape[1] - 1
    h = x.new_empty((x.shape[0], parts * packed.intermediate_size))
    biases = (packed.gate_bias, packed.up_bias) if packed.gated else (packed.up_bias,)
    for part, (to, bias) in enumerate(zip(h.chunk(parts, 1), biases, strict=True)):
        count("gemv", weight.nbytes // weight.shape[1])
        to.copy_(F.linear(x, weight[:, part, :hidden], None if bias is None else bias.to(x.dtype)))
    acted = gpu_norm.act_mul(h, str(packed.act), packed.gated, None, False, torch.float32)
    assert isinstance(acted, Tensor)
    h = acted if packed.mean is None else acted - packed.mean
    count("gemv", weight.nbytes // weight.shape[1])
    y = torch.matmul(h.to(weight.dtype), weight[:, -1, :hidden])[:rows].to(dtype)
    return y if packed.down_bias is None else y + packed.down_bias.to(dtype)


# ---- kernels ----


@triton.jit
def _mlp_kernel(
    x, weight, gate_bias, up_bias, mean, norm, indices, partial, threshold, neurons, x_row, list_row, bundle, row,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr,
    RULE: tl.constexpr, LISTED: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, MEAN: tl.constexpr,
    NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    r, programs = tl.program_id(1), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    xs = tl.load(x + r * x_row + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = tl.zeros((BLOCK,), tl.float32)
    up_part: tl.constexpr = 1 if GATED else 0
    # dealt out in turn: neighbours are read at the same time, and a list's -1 at its end are everybody's
    for start in range(0, tl.cdiv(neurons, BLOCK_N * programs)):
        at = (start * programs + tl.program_id(0)) * BLOCK_N + tl.arange(0, BLOCK_N)
        if LISTED:
            neuron = tl.load(indices + r * list_row + at, mask=at < neurons, other=-1).to(tl.int64)
        else:
            neuron = tl.where(at < neurons, at, -1).to(tl.int64)
        wanted = neuron >= 0
        neuron = tl.where(wanted, neuron, 0)
        place = weight + (neuron * bundle)[:, None] + column[None, :]
        if GATED:
            first = tl.load(place, mask=wanted[:, None] & inside[None, :], other=0.0)
        if RULE == 0:
            second = tl.load(place + up_part * row, mask=wanted[:, None] & inside[None, :], other=0.0)
            down = tl.load(place + (up_part + 1) * row, mask=wanted[:, None] & inside[None, :], other=0.0)
        if GATED:
            gate = tl.sum(first.to(tl.float32) * xs, 1)
            if GATE_BIAS:
                gate += tl.load(gate_bias + neuron)
            gate = act(gate, ACT)
        if RULE == 1:
            wanted = wanted & ((tl.abs(gate) < threshold) == 0)  # a NaN is computed
        if RULE > 0:
            second = tl.load(place + up_part * row, mask=wanted[:, None] & inside[None, :], other=0.0)
        up = tl.sum(second.to(tl.float32) * xs, 1)
        if UP_BIAS:
            up += tl.load(up_bias + neuron)
        if GATED:  # noqa: SIM108
            h = gate * up
        else:
            h = act(up, ACT)
        if RULE == 2:
            score = tl.abs(h)
            if NORM:
                score *= tl.load(norm + neuron)
            wanted = wanted & ((score < threshold) == 0)
        if RULE > 0:
            down = tl.load(place + (up_part + 1) * row, mask=wanted[:, None] & inside[None, :], other=0.0)
        if MEAN:
            h -= tl.load(mean + neuron)
        h = tl.where(wanted, h, 0.0)
        y += tl.sum(down.to(tl.float32) * h[:, None], 0)
    to = (tl.program_id(0) * tl.num_programs(1) + r).to(tl.int64) * HIDDEN
    tl.store(partial + to + column, y, mask=inside)


@triton.jit
def _sum_kernel(
    partial, bias, out, width, size, PROGRAMS: tl.constexpr, BIAS: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    wait(OVERLAP)
    r = tl.program_id(1)
    column = tl.program_id(0) * 32 + tl.arange(0, 32)
    inside = column < width
    total = tl.zeros((32,), tl.float32)
    for start in range(0, PROGRAMS, 32):
        at = start + tl.arange(0, 32)
        place = at[:, None].to(tl.int64) * size + r * width + column[None, :]
        total += tl.sum(tl.load(partial + place, mask=(at < PROGRAMS)[:, None] & inside[None, :], other=0.0), 0)
    if BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + r * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _columns_kernel(
    x, weight, norm, partial, threshold, outs, inputs, x_row, column, share,
    NORM: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    split, r = tl.program_id(1), tl.program_id(2)
    out = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    there = out < outs
    total = tl.zeros((BLOCK_O,), tl.float32)
    for start in range(0, share):
        i = (start * tl.num_programs(1) + split) * BLOCK_I + tl.arange(0, BLOCK_I)
        inside = i < inputs
        value = tl.load(x + r * x_row + i, mask=inside, other=0.0).to(tl.float32)
        score = tl.abs(value)
        if NORM:
            score *= tl.load(norm + i, mask=inside, other=0.0)
        wanted = inside & ((score < threshold) == 0)
        place = weight + i.to(tl.int64)[:, None] * column + out[None, :]
        ws = tl.load(place, mask=wanted[:, None] & there[None, :], other=0.0).to(tl.float32)
        total += tl.sum(ws * tl.where(wanted, value, 0.0)[:, None], 0)
    to = (split * tl.num_programs(2) + r).to(tl.int64) * outs
    tl.store(partial + to + out, total, mask=there)
