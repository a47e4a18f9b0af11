"""Products with matrices of floats for one row: each program reads some rows of a matrix, all inputs of them.

torch's products reach 2.5 to 3.8 TB/s there on an H200 (4096x4096 and 22016x4096 in bfloat16), and are a launch each.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import gpu_config
from .gpu_formats import FloatMatrix
from .gpu_parts import ACT, NO_ACT, act, launch, wait

MOST = 3  # matrices of one launch: gate and up, or q, k and v


def linears(
    x: Tensor,
    matrices: Sequence[FloatMatrix],
    out: Tensor,
    rows: Tensor | None,
    form: str | None,
    act: str | None = None,
    gated: bool = False,
) -> bool:
    """Writes x @ weight.t() + bias of all matrices to out [1, sum of outs], side by side, in one launch; or what an
    activation makes of it, see `gpu_step.activated`.

    rows: see `gpu_step.linears`. False, and nothing is done, where torch's products are to be used.
    """
    if gated and len(matrices) == 1:
        half = matrices[0].out_features // 2
        matrices = matrices[0].rows(0, half), matrices[0].rows(half, half)
    first = matrices[0].weight
    alike = all(m.weight.dtype == first.dtype and m.weight.stride() == first.stride() for m in matrices)
    if x.shape[0] != 1 or form == "many" or len(matrices) > MOST or not alike or first.stride(1) != 1:
        return False
    outs = [m.out_features if rows is None else rows.numel() for m in matrices]
    inputs = first.shape[1]
    tile = gpu_config.float_rows(sum(outs), inputs, first.element_size(), 2 if gated else 1)
    blocks = [triton.cdiv(n, tile.block_n) for n in (outs[:1] if gated else outs)]
    none: list[None] = [None] * (MOST - len(matrices))
    nothing = [0] * len(none)
    biases = [*(m.bias for m in matrices), *none]
    launch(
        "gemv", _row_kernel, (sum(blocks),), x, *(m.weight for m in matrices), *none, *biases, rows, out, *outs,
        *nothing, *(*blocks, 0, 0)[:2], first.stride(0),
        INPUTS=inputs, COUNT=len(matrices), BLOCK_N=tile.block_n, BLOCK_K=tile.block_g,
        BIASES=tuple(bias is not None for bias in biases), LISTED=rows is not None,
        ACT=NO_ACT if act is None else ACT[act], GATED=gated, num_warps=tile.warps,
        nbytes=sum(outs) * inputs * first.element_size(),
    )  # fmt: skip
    return True


# ---- kernels ----


@triton.jit
def _sums(
    x, weight, bias, rows, n, outs, row, WAIT: tl.constexpr, INPUTS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BIAS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N]: the outputs n in float32. WAIT: x is not there yet."""
    at = tl.minimum(n, outs - 1).to(tl.int64)  # beyond the last one it is computed again, and not stored
    if LISTED:
        wait(WAIT)
        at = tl.load(rows + at)
    place = weight + at[:, None] * row
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in tl.static_range(0, INPUTS, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        inside = i < INPUTS
        ws = tl.load(place + i[None, :], mask=inside[None, :], other=0.0)
        if start == 0 and not LISTED:
            wait(WAIT)
        # x rounded to the matrix's dtype, as torch's product has it
        xs = tl.load(x + i, mask=inside, other=0.0).to(ws.dtype).to(tl.float32)
        total += ws.to(tl.float32) * xs[None, :]
    y = tl.sum(total, 1)
    if BIAS:
        y += tl.load(bias + at).to(tl.float32)
    return y


@triton.jit
def _rows(
    x, weight, bias, rows, out, outs, program, row,
    INPUTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr, LISTED: tl.constexpr,
    ACT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    n = program * BLOCK_N + tl.arange(0, BLOCK_N)
    y = _sums(x, weight, bias, rows, n, outs, row, OVERLAP, INPUTS, BLOCK_N, BLOCK_K, BIAS, LISTED)
    tl.store(out + n, act(y, ACT).to(out.dtype.element_ty), mask=n < outs)


@triton.jit
def _row_kernel(
    x, weight0, weight1, weight2, bias0, bias1, bias2, rows, out, outs0, outs1, outs2, blocks0, blocks1, row,
    INPUTS: tl.constexpr, COUNT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIASES: tl.constexpr,
    LISTED: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0)
    if GATED:
        n = p * BLOCK_N + tl.arange(0, BLOCK_N)
        y = _sums(x, weight0, bias0, rows, n, outs0, row, OVERLAP, INPUTS, BLOCK_N, BLOCK_K, BIASES[0], LISTED)
        y = act(y, ACT)
        y *= _sums(x, weight1, bias1, rows, n, outs0, row, False, INPUTS, BLOCK_N, BLOCK_K, BIASES[1], LISTED)
        tl.store(out + n, y.to(out.dtype.element_ty), mask=n < outs0)
    # the whole of it three times: of a pointer that is chosen here it would not be known that 16 bytes lie together
    elif p < blocks0:
        _rows(x, weight0, bias0, rows, out, outs0, p, row, INPUTS, BLOCK_N, BLOCK_K, BIASES[0], LISTED, ACT, OVERLAP)
    elif COUNT > 1:
        if p < blocks0 + blocks1:
            _rows(
                x, weight1, bias1, rows, out + outs0, outs1, p - blocks0, row, INPUTS, BLOCK_N, BLOCK_K, BIASES[1],
                LISTED, ACT, OVERLAP,
            )  # fmt: skip
        elif COUNT > 2:
            _rows(
                x, weight2, bias2, rows, out + outs0 + outs1, outs2, p - blocks0 - blocks1, row, INPUTS, BLOCK_N,
                BLOCK_K, BIASES[2], LISTED, ACT, OVERLAP,
            )  # fmt: skip
