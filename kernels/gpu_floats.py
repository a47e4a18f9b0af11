"""Products with a matrix of floats for one row: each program reads some rows of the matrix, all inputs of them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import gpu_config
from .gpu_formats import FloatMatrix
from .gpu_parts import launch


def linear(x: Tensor, matrix: FloatMatrix, out: Tensor, form: str | None) -> bool:
    """Writes x @ weight.t() + bias to out [1, out_features]; False where torch's product is the better one."""
    weight = matrix.weight
    if x.shape[0] != 1 or form == "many" or weight.stride(1) != 1:
        return False
    outs, inputs = weight.shape
    tile = gpu_config.float_rows(outs, inputs, weight.element_size())
    launch(
        "gemv", _row_kernel, (triton.cdiv(outs, tile.block_n),), x, weight, matrix.bias, out, outs, weight.stride(0),
        INPUTS=inputs, BLOCK_N=tile.block_n, BLOCK_K=tile.block_g, BIAS=matrix.bias is not None, num_warps=tile.warps,
        nbytes=weight.shape[0] * inputs * weight.element_size(),
    )  # fmt: skip
    return True


@triton.jit
def _row_kernel(
    x, weight, bias, out, outs, row,
    INPUTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = weight + tl.minimum(n, outs - 1).to(tl.int64)[:, None] * row
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in tl.static_range(0, INPUTS, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        inside = i < INPUTS
        ws = tl.load(place + i[None, :], mask=inside[None, :], other=0.0)
        # x rounded to the matrix's dtype, as torch's product has it
        xs = tl.load(x + i, mask=inside, other=0.0).to(weight.dtype.element_ty).to(tl.float32)
        total += ws.to(tl.float32) * xs[None, :]
    y = tl.sum(total, 1)
    there = n < outs
    if BIAS:
        y += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=there)
