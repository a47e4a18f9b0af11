"""Everything of a step that goes by rows of the residual stream or of activations: norms, sums, rounding to 8 bits.

A row is one program: 4,096 values take 1.7 us on an H200, whatever is done with them, so as much as possible is.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_formats import ByRow, Inputs, Quantized
from .gpu_launch import INTERPRETED
from .gpu_parts import ACT, NO_ACT, act, launch, power, row_stride, store_rows, wait
from .groups import GROUP
from .packed import PAD
from .step_model import Norm

_GROUPS = 64 if INTERPRETED else 4  # groups of 32 values that a program of `act_mul` computes


def add_norm(
    stream: Tensor,
    norm: Norm | None,
    deltas: tuple[Tensor, ...],
    out: Norm | None,
    after: Norm | None,
    second: Norm | None,
    scale: float,
    quantize: bool | str,
    smooth: Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Inputs, Inputs | None]:
    """See `gpu_step.add_norm`."""
    rows, width = stream.shape
    changed = bool(deltas) or after is not None
    new = torch.empty((rows, width), dtype=stream.dtype, device=stream.device) if changed else stream
    y = empty_rows(rows, width, quantize, dtype or stream.dtype, stream)
    more = None if second is None else empty_rows(rows, width, quantize, dtype or stream.dtype, stream)
    first, also = (*deltas, None, None)[:2]
    norms = (out, after, norm, second)
    weights = [None if n is None else n.weight for n in norms]
    biases = [None if n is None else n.bias for n in norms]
    kinds = [kind_of(n) for n in norms]
    by_row = quantize == "row"
    groups = power(triton.cdiv(width, GROUP), PAD // GROUP if by_row else 1)
    launch(
        "small", _add_norm_kernel, (rows,), stream, first, also, *weights, *biases, smooth, new, *places_of(y),
        *places_of(more), *(0.0 if n is None else n.eps for n in norms), scale, row_stride(stream), row_stride(first),
        row_stride(also),
        DELTAS=len(deltas), OUT=kinds[0], AFTER=kinds[1], NORM=kinds[2], SECOND=kinds[3],
        OUT_BIAS=biases[0] is not None, AFTER_BIAS=biases[1] is not None, NORM_BIAS=biases[2] is not None,
        SECOND_BIAS=biases[3] is not None, TWICE=more is not None, CHANGED=changed,
        QUANTIZE=2 if by_row else int(quantize), SMOOTH=smooth is not None, WIDTH=width, GROUPS=groups,
        num_warps=max(1, min(16, groups // 8)),
    )  # fmt: skip
    return new, y, more


def kind_of(norm: Norm | None) -> int:
    """What kernels call a kind of norm; 0: none."""
    return 0 if norm is None else {"rms": 1, "layer": 2}[norm.kind]


def act_mul(
    x: Tensor, name: str, gated: bool, inverse: Tensor | None, quantize: bool, dtype: torch.dtype | None
) -> Inputs:
    """See `gpu_step.act_mul`."""
    return _act_mul(x, ACT[name], gated, inverse, quantize, dtype)


def quantize(x: Tensor) -> Quantized:
    """See `gpu_step.quantize`."""
    found = _act_mul(x, NO_ACT, False, None, True, None)
    assert isinstance(found, Quantized)
    return found


def _act_mul(
    x: Tensor, code: int, gated: bool, inverse: Tensor | None, quantize: bool, dtype: torch.dtype | None
) -> Inputs:
    rows, neurons = x.shape[0], x.shape[1] // (2 if gated else 1)
    width = neurons if inverse is None else inverse.numel()
    y = empty_rows(rows, width, quantize, dtype or x.dtype, x)
    launch(
        "small", _act_mul_kernel, (triton.cdiv(width, GROUP * _GROUPS), rows), x, inverse, *places_of(y), row_stride(x),
        neurons, ACT=code, GATED=gated, LISTED=inverse is not None, QUANTIZE=quantize, WIDTH=width, GROUPS=_GROUPS,
        num_warps=1,
    )  # fmt: skip
    return y


def empty_rows(rows: int, width: int, quantize: bool | str, dtype: torch.dtype, like: Tensor) -> Inputs:
    """[rows, width] to be filled in, of floats or rounded."""
    if not quantize:
        return torch.empty((rows, width), dtype=dtype, device=like.device)
    if quantize == "row":
        integers = torch.empty((rows, -(-width // PAD) * PAD), dtype=torch.int8, device=like.device)
        step = torch.empty(rows, dtype=torch.float32, device=like.device)
        return cast(Any, ByRow(integers, step, torch.empty(rows, dtype=torch.int32, device=like.device)))  # type: ignore[no-any-return]
    groups = triton.cdiv(width, GROUP)
    integers = torch.empty((rows, groups * GROUP), dtype=torch.int8, device=like.device)
    step, total = torch.empty((2, rows, groups), dtype=torch.float32, device=like.device)
    return Quantized(integers, step, total, width)


def places_of(y: Inputs | None) -> tuple[Any, Any, Any, Any]:
    """Where a kernel stores it: floats, or integers, steps and totals."""
    if isinstance(y, (Quantized, ByRow)):
        return None, y.integers, y.step, y.total
    return y, None, None, None


# ---- kernels ----


@triton.jit
def _normed(
    x, weight, bias, eps, column, inside, KIND: tl.constexpr, BIAS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """x [groups, 32], of WIDTH values in all, normed; 0 beyond them."""
    if KIND > 0:
        if KIND == 2:
            mean = tl.sum(tl.sum(x, 1), 0) / WIDTH
            x = tl.where(inside, x - mean, 0.0)
        square = tl.sum(tl.sum(x * x, 1), 0) / WIDTH
        x = x * tl.rsqrt(square + eps) * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _add_norm_kernel(
    stream, delta, also, out_weight, after_weight, norm_weight, second_weight, out_bias, after_bias, norm_bias,
    second_bias, smooth, new, y, y_integers, y_step, y_total, z, z_integers, z_step, z_total, out_eps, after_eps,
    norm_eps, second_eps, scale, stream_stride, delta_stride, also_stride,
    DELTAS: tl.constexpr, OUT: tl.constexpr, AFTER: tl.constexpr, NORM: tl.constexpr, SECOND: tl.constexpr,
    OUT_BIAS: tl.constexpr, AFTER_BIAS: tl.constexpr, NORM_BIAS: tl.constexpr, SECOND_BIAS: tl.constexpr,
    TWICE: tl.constexpr, CHANGED: tl.constexpr, QUANTIZE: tl.constexpr, SMOOTH: tl.constexpr, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    r = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    column = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = column < WIDTH
    x = tl.load(stream + r * stream_stride + column, mask=inside, other=0.0).to(tl.float32)
    if DELTAS > 0:
        d = tl.load(delta + r * delta_stride + column, mask=inside, other=0.0).to(tl.float32)
        x += scale * _normed(d, out_weight, out_bias, out_eps, column, inside, OUT, OUT_BIAS, WIDTH)
    if DELTAS > 1:
        x += scale * tl.load(also + r * also_stride + column, mask=inside, other=0.0).to(tl.float32)
    x = _normed(x, after_weight, after_bias, after_eps, column, inside, AFTER, AFTER_BIAS, WIDTH)
    if CHANGED:
        tl.store(new + r * WIDTH + column, x.to(new.dtype.element_ty), mask=inside)
    n = _normed(x, norm_weight, norm_bias, norm_eps, column, inside, NORM, NORM_BIAS, WIDTH)
    if SMOOTH:
        n *= tl.load(smooth + column, mask=inside, other=0.0)
    store_rows(y, y_integers, y_step, y_total, r, group, column, n, WIDTH, QUANTIZE)
    if TWICE:
        n = _normed(x, second_weight, second_bias, second_eps, column, inside, SECOND, SECOND_BIAS, WIDTH)
        store_rows(z, z_integers, z_step, z_total, r, group, column, n, WIDTH, QUANTIZE)


@triton.jit
def _act_mul_kernel(
    x, inverse, y, integers, step, total, stride, neurons,
    ACT: tl.constexpr, GATED: tl.constexpr, LISTED: tl.constexpr, QUANTIZE: tl.constexpr, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait(OVERLAP)
    r = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = column < WIDTH
    at = column
    if LISTED:
        at = tl.load(inverse + column, mask=inside, other=-1)
        inside = at >= 0
    value = act(tl.load(x + r * stride + at, mask=inside, other=0.0).to(tl.float32), ACT)
    if GATED:
        value *= tl.load(x + r * stride + neurons + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(inside, value, 0.0)
    store_rows(y, integers, step, total, r, group, column, value, WIDTH, QUANTIZE)
