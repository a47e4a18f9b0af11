"""Memory as the kernels read it fastest: from whole cache lines, and on huge pages."""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

LINE = 64  # bytes of a cache line; kLine in csrc/formats.h
HUGE_PAGE = 2 << 20


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor; on a CPU it starts on a huge page, where the system has them.

    Scattered bundles miss the TLB on 4 KiB pages: a page holds less than one fp32 bundle of the smallest model.
    """
    nbytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes == 0:
        return torch.empty(shape, dtype=dtype, device=device)
    if not hasattr(mmap, "MADV_HUGEPAGE") or nbytes < HUGE_PAGE // 2:
        memory = torch.empty(nbytes + LINE, dtype=torch.uint8, device="cpu")
        start = -memory.data_ptr() % LINE
    else:
        region = mmap.mmap(-1, (1 - (-nbytes // HUGE_PAGE)) * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        region.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(region, dtype=torch.uint8)
        start = -memory.data_ptr() % HUGE_PAGE
    return memory[start : start + nbytes].view(dtype).view(shape)
