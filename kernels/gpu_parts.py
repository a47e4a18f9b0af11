"""What several Triton kernels are made of."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .gpu_launch import INTERPRETED, count
from .packed import ACTS

ACT = {name: code for code, name in enumerate(ACTS)}
NO_ACT = -1
_MOST_ROWS = 65535
PLAIN = INTERPRETED  # no inline assembly
#: Whether a launch may begin before the one before it has ended, and reads its weights meanwhile (programmatic
#: dependent launch, from Hopper on). Not tried on a card yet: it has to be asked for.
OVERLAP = os.environ.get("CORESKIP_OVERLAP") == "1" and not INTERPRETED


def launch(kind: str, kernel: Any, grid: tuple[int, ...], *arguments: Any, nbytes: int = 0, **options: Any) -> None:
    """Counts and makes a launch; a grid without programs is none.

    Raises ValueError where a GPU has no grid like that: of its second and third dimensions, in which rows are counted,
    there are 65,535 at most.
    """
    if any(n > _MOST_ROWS for n in grid[1:]):
        raise ValueError(f"a launch takes at most {_MOST_ROWS:,} rows: give fewer at once")
    if all(grid):
        count(kind, nbytes)
        if OVERLAP and "OVERLAP" in kernel.arg_names:
            options["launch_pdl"] = True
        if "OVERLAP" in kernel.arg_names:
            options["OVERLAP"] = OVERLAP
        run(kernel, grid, arguments, options)


def run(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """What a launch does; tests put something else here."""
    kernel[grid](*arguments, **options)


def power(n: int, least: int = 1) -> int:
    """The least power of two from n up, and from `least` up."""
    return max(least, 1 << max(0, n - 1).bit_length())


def row_stride(x: Tensor | None) -> int:
    """Elements from one row [R, n] to the next. Raises ValueError where those of a row do not lie side by side."""
    if x is None:
        return 0
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError("rows must lie side by side in memory")
    return x.stride(0)


def counters_for(counters: Tensor | None, needed: int, device: torch.device) -> Tensor:
    """int32 zeros for `last_of`: those given, where they are enough, else new ones, which are a launch."""
    if counters is not None and counters.numel() >= needed:
        return counters
    count("small")
    return torch.zeros(needed, dtype=torch.int32, device=device)


@triton.jit
def last_of(counter, programs):
    """Whether this program is the last of so many to come here, which may read what all of them have stored before.
    None waits for another, and the counter, which was 0, is 0 again."""
    tl.debug_barrier()  # every thread has stored what it has to
    before = tl.atomic_add(counter, 1, sem="acq_rel")
    last = before == programs - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """What the launches before have written may be read from here on; the next one may begin."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def dealt(block, indices, first, neurons, BLOCK_N: tl.constexpr, LISTED: tl.constexpr):
    """The neurons of a block, of a list from `first` on where there is one, and which of them there are."""
    at = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if LISTED:
        neuron = tl.load(indices + first + at, mask=at < neurons, other=-1).to(tl.int64)
    else:
        neuron = tl.where(at < neurons, at, -1).to(tl.int64)
    wanted = neuron >= 0
    return tl.where(wanted, neuron, 0), wanted


@triton.jit
def act(x, ACT: tl.constexpr):
    """An activation of packed.ACTS, in their order; any other code: none."""
    if ACT == 0:
        x = x / (1 + tl.exp(-x))
    elif ACT == 1:
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACT == 2:
        x = x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACT == 3:
        x = tl.where(x < 0, 0.0, x)
    elif ACT == 4:
        x = tl.where(x < 0, 0.0, x)
        x = x * x
    return x


@triton.jit
def half_even(x):
    """Rounded to integers, of equally near ones to the even one; for |x| below 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _rounded_by(x, largest, wrong):
    """Integers, as floats, and steps; of each row, its largest size and whether it has infinities or NaNs are known."""
    some = (largest >= 1e-30) & (wrong == 0)
    step = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32))
    safe = tl.where(some, step, 1.0)
    integers = tl.where(some[:, None], half_even(tl.div_rn(x, tl.broadcast_to(safe[:, None], x.shape))), 0.0)
    return integers, tl.where(some, step, tl.where(wrong, float("nan"), 0.0))


@triton.jit
def rounded(x):
    """x [groups, 32] as `packed.quantize` rounds each row: integers, as floats, and steps [groups]."""
    finite = tl.abs(x) < float("inf")
    wrong = tl.max(tl.where(finite, 0, 1), 1) > 0
    x = tl.where(finite, x, 0.0)
    return _rounded_by(x, tl.max(tl.abs(x), 1), wrong)


@triton.jit
def rounded_as_one(x):
    """x [groups, 32] as `packed.quantize` rounds a row: integers, as floats, and the step, once for each group."""
    finite = tl.abs(x) < float("inf")
    wrong = tl.max(tl.max(tl.where(finite, 0, 1), 1), 0)
    x = tl.where(finite, x, 0.0)
    groups = tl.zeros((x.shape[0],), tl.float32)
    return _rounded_by(x, groups + tl.max(tl.max(tl.abs(x), 1), 0), groups + wrong.to(tl.float32) > 0)


@triton.jit
def store_rows(y, integers, step, total, r, group, column, x, WIDTH: tl.constexpr, QUANTIZE: tl.constexpr):
    """Stores x [groups, 32] at `column` of row r of y, or rounded to 8 bits in groups (QUANTIZE 1) or, where all of the
    row is here, as one (2). x is 0 beyond WIDTH."""
    if QUANTIZE == 2:
        RUNS: tl.constexpr = (WIDTH + 127) // 128
        whole, steps = rounded_as_one(x)
        tl.store(integers + r * RUNS * 128 + column, whole.to(tl.int32).to(tl.int8), mask=(group < RUNS * 4)[:, None])
        tl.store(step + r + group, steps, mask=group == 0)
        tl.store(total + r, tl.sum(tl.sum(whole.to(tl.int32), 1), 0))
    elif QUANTIZE:
        GROUPS: tl.constexpr = (WIDTH + 31) // 32
        there = group < GROUPS
        whole, steps = rounded(x)
        tl.store(integers + r * GROUPS * 32 + column, whole.to(tl.int32).to(tl.int8), mask=there[:, None])
        tl.store(step + r * GROUPS + group, steps, mask=there)
        tl.store(total + r * GROUPS + group, steps * tl.sum(whole, 1), mask=there)
    else:
        tl.store(y + r * WIDTH + column, x.to(y.dtype.element_ty), mask=column < WIDTH)
