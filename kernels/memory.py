"""Memory as the kernels read it fastest: from whole cache lines, and on huge pages."""

from __future__ import annotations

import ctypes
import mmap
import weakref
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
        memory = torch.frombuffer(_region(nbytes), dtype=torch.uint8)
        start = -memory.data_ptr() % HUGE_PAGE
    return memory[start : start + nbytes].view(dtype).view(shape)


def _region(nbytes: int) -> mmap.mmap:
    """Pages for so many bytes from a huge page on."""
    pages = 1 - (-nbytes // HUGE_PAGE)
    region = mmap.mmap(-1, pages * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    return region


class Reused:
    """Memory for what is made anew for every prompt. What tensors let go of is handed out again, for pages that the
    system has to clear first take longer to come than to fill.

    most: bytes that are kept for who comes next. largest: that were asked for at once.
    """

    def __init__(self) -> None:
        self.most = self.largest = 0
        self._spare: dict[int, list[mmap.mmap]] = {}

    def take(self, nbytes: int) -> Tensor:
        """uint8 ``[nbytes]`` on a CPU, of any values. It is given back when no tensor has its storage any more."""
        self.largest = max(self.largest, nbytes)
        try:
            region = self._spare.get(nbytes, []).pop()
        except IndexError:
            region = _region(nbytes)
        loan = (ctypes.c_ubyte * len(region)).from_buffer(region)
        weakref.finalize(loan, _give_back, weakref.ref(self), nbytes, region).atexit = False
        memory = torch.frombuffer(loan, dtype=torch.uint8)
        start = -memory.data_ptr() % HUGE_PAGE
        return memory[start : start + nbytes]

    @property
    def spare(self) -> int:
        """Bytes that nobody has."""
        return sum(nbytes * len(regions) for nbytes, regions in self._spare.items())


def _give_back(to: weakref.ref[Reused], nbytes: int, region: mmap.mmap) -> None:
    memory = to()
    if memory is not None and memory.spare + nbytes <= memory.most:
        memory._spare.setdefault(nbytes, []).append(region)
