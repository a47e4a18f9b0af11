"""An MLP over bundles in one pass, and a linear over columns of which some stay unread.

Each program of a grid as large as the GPU walks its share of the neurons and keeps a sum of outputs of its own; a
second launch adds these up. The down row of a neuron is loaded beside its gate and up rows wherever that does not
depend on them, so that memory is never waited for twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import gpu_config, gpu_norm
from .gpu_launch import count
from .gpu_parts import ACT, NO_ACT, act, counters_for, dealt, last_of, launch, power, row_stride, wait
from .packed import PackedColumns, PackedMLP

_RULE = {"listed": 0, "gate": 1, "activation": 2}
MOST = 3  # linears of one launch: gate and up, or q, k and v
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


def columns(
    x: Tensor,
    packed: Sequence[PackedColumns],
    thresholds: Sequence[float],
    by_norm: bool,
    act: str | None,
    dtype: torch.dtype,
    counters: Tensor | None,
) -> Tensor:
    """See `gpu_step.columns`."""
    rows, inputs, device = x.shape[0], packed[0].in_features, x.device
    outs = [part.out_features for part in packed]
    multiplied = act is not None and len(packed) == 2
    tile = gpu_config.columns(outs[0] if multiplied else sum(outs), inputs)
    blocks = [triton.cdiv(n, tile.block_o) for n in (outs[:1] if multiplied else outs)]
    partial = torch.empty((tile.splits, rows, sum(outs)), dtype=torch.float32, device=device)
    y = torch.empty((rows, outs[0] if multiplied else sum(outs)), dtype=dtype, device=device)
    counters = counters_for(counters, rows * sum(blocks), device)
    none: list[None] = [None] * (MOST - len(packed))
    nothing = [0] * len(none)
    norms = [part.norm if by_norm else None for part in packed]
    biases = [*(part.bias for part in packed), *none]
    launch(
        "gemv", _columns_kernel, (sum(blocks), tile.splits, rows), x, *(part.weight for part in packed), *none, *norms,
        *none, *biases, *thresholds, *(0.0 for _ in none), partial, counters, y, *outs, *nothing,
        *(part.weight.stride(0) for part in packed), *nothing, *(*blocks, 0, 0)[:2], inputs, row_stride(x),
        triton.cdiv(inputs, tile.splits * tile.block_i),
        COUNT=len(packed), NORM=by_norm, BIASES=tuple(bias is not None for bias in biases),
        ACT=NO_ACT if act is None else ACT[act], MULTIPLIED=multiplied, SPLITS=tile.splits, BLOCK_I=tile.block_i,
        BLOCK_O=tile.block_o, num_warps=4, num_stages=2,
        nbytes=sum(outs) * inputs * packed[0].weight.element_size(),
    )  # fmt: skip
    return y


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
    r, programs = tl.program_id(1).to(tl.int64), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    xs = tl.load(x + r * x_row + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = tl.zeros((BLOCK,), tl.float32)
    up_part: tl.constexpr = 1 if GATED else 0
    # dealt out in turn: neighbours are read at the same time, and a list's -1 at its end are everybody's
    for start in range(0, tl.cdiv(neurons, BLOCK_N * programs)):
        block = start * programs + tl.program_id(0)
        neuron, wanted = dealt(block, indices, r * list_row, neurons, BLOCK_N, LISTED)
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
    to = (tl.program_id(0) * tl.num_programs(1) + r) * HIDDEN
    tl.store(partial + to + column, y, mask=inside)


@triton.jit
def _sum_kernel(
    partial, bias, out, width, size, PROGRAMS: tl.constexpr, BIAS: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    wait(OVERLAP)
    r = tl.program_id(1).to(tl.int64)
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
def _column_sum(
    x, weight, norm, threshold, out, outs, inputs, column, share, NORM: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """[BLOCK_O]: what this program's share of the inputs adds to some outputs, in float32."""
    total = tl.zeros((BLOCK_O,), tl.float32)
    for start in range(0, share):
        i = (start * tl.num_programs(1) + tl.program_id(1)) * BLOCK_I + tl.arange(0, BLOCK_I)
        inside = i < inputs
        value = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
        score = tl.abs(value)
        if NORM:
            score *= tl.load(norm + i, mask=inside, other=0.0)
        wanted = inside & ((score < threshold) == 0)
        place = weight + i.to(tl.int64)[:, None] * column + out[None, :]
        ws = tl.load(place, mask=wanted[:, None] & (out < outs)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(ws * tl.where(wanted, value, 0.0)[:, None], 0)
    return total


@triton.jit
def _over_shares(partial, bias, out, outs, size, SPLITS: tl.constexpr, BIAS: tl.constexpr, BLOCK_O: tl.constexpr):
    """[BLOCK_O]: the sum of all shares, which lie `size` numbers apart, and the bias."""
    total = tl.zeros((BLOCK_O,), tl.float32)
    for start in tl.static_range(0, SPLITS, 16):
        split = start + tl.arange(0, 16)
        place = partial + split[:, None].to(tl.int64) * size + out[None, :]
        total += tl.sum(tl.load(place, mask=(split < SPLITS)[:, None] & (out < outs)[None, :], other=0.0), 0)
    if BIAS:
        total += tl.load(bias + out, mask=out < outs, other=0.0).to(tl.float32)
    return total


@triton.jit
def _some_columns(
    x, weight, norm, bias, threshold, partial, counter, y, outs, inputs, column, share, block, size,
    SPLITS: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    out = block * BLOCK_O + tl.arange(0, BLOCK_O)
    total = _column_sum(x, weight, norm, threshold, out, outs, inputs, column, share, NORM, BLOCK_I, BLOCK_O)
    tl.store(partial + tl.program_id(1).to(tl.int64) * size + out, total, mask=out < outs)
    if last_of(counter, SPLITS):
        total = act(_over_shares(partial, bias, out, outs, size, SPLITS, BIAS, BLOCK_O), ACT)
        tl.store(y + out, total.to(y.dtype.element_ty), mask=out < outs)


@triton.jit
def _columns_kernel(
    x, weight0, weight1, weight2, norm0, norm1, norm2, bias0, bias1, bias2, threshold0, threshold1, threshold2,
    partial, counters, y, outs0, outs1, outs2, column0, column1, column2, blocks0, blocks1, inputs, x_row, share,
    COUNT: tl.constexpr, NORM: tl.constexpr, BIASES: tl.constexpr, ACT: tl.constexpr, MULTIPLIED: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    block, r = tl.program_id(0), tl.program_id(2).to(tl.int64)
    width = outs0 + outs1 + outs2
    size = tl.num_programs(2) * width
    x += r * x_row
    partial += r * width
    counter = counters + r * tl.num_programs(0) + block
    if MULTIPLIED:
        out = block * BLOCK_O + tl.arange(0, BLOCK_O)
        gate = _column_sum(x, weight0, norm0, threshold0, out, outs0, inputs, column0, share, NORM, BLOCK_I, BLOCK_O)
        up = _column_sum(x, weight1, norm1, threshold1, out, outs1, inputs, column1, share, NORM, BLOCK_I, BLOCK_O)
        to = partial + tl.program_id(1).to(tl.int64) * size
        tl.store(to + out, gate, mask=out < outs0)
        tl.store(to + outs0 + out, up, mask=out < outs1)
        if last_of(counter, SPLITS):
            gate = act(_over_shares(partial, bias0, out, outs0, size, SPLITS, BIASES[0], BLOCK_O), ACT)
            up = _over_shares(partial + outs0, bias1, out, outs1, size, SPLITS, BIASES[1], BLOCK_O)
            tl.store(y + r * outs0 + out, (gate * up).to(y.dtype.element_ty), mask=out < outs0)
    else:  # the whole of it three times, as in gpu_floats.py
        y += r * width
        if block < blocks0:
            _some_columns(
                x, weight0, norm0, bias0, threshold0, partial, counter, y, outs0, inputs, column0, share, block, size,
                SPLITS, ACT, NORM, BIASES[0], BLOCK_I, BLOCK_O,
            )  # fmt: skip
        elif COUNT > 1:
            if block < blocks0 + blocks1:
                _some_columns(
                    x, weight1, norm1, bias1, threshold1, partial + outs0, counter, y + outs0, outs1, inputs, column1,
                    share, block - blocks0, size, SPLITS, ACT, NORM, BIASES[1], BLOCK_I, BLOCK_O,
                )  # fmt: skip
            elif COUNT > 2:
                _some_columns(
                    x, weight2, norm2, bias2, threshold2, partial + outs0 + outs1, counter, y + outs0 + outs1, outs2,
                    inputs, column2, share, block - blocks0 - blocks1, size, SPLITS, ACT, NORM, BIASES[2], BLOCK_I,
                    BLOCK_O,
                )  # fmt: skip
