"""The speed of the machine's memory, the ceiling of every decode speed; and how models read their matrices from it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from coreskip.kernels import cpu
from coreskip.kernels.ops import available

_BUFFER = 512 << 20  # bytes: sixteen times the last-level cache of the machine that this was written on


def _native_read() -> Callable[[Tensor], Any] | None:
    """The kernels' own stream of loads, where they are built. Without it, of torch's reductions the one that reads
    fastest: mv reached 18 GB/s where sum, dot and amax reached 17."""
    return getattr(cpu, "read", None) if available("cpu") is None else None


class Machine:
    """Measures how fast this machine reads memory: the ceiling of every decode speed."""

    def __init__(self, device: str, threads: int) -> None:
        self._device = torch.device(device)
        torch.set_num_threads(threads)
        self._buffer = torch.ones(_BUFFER // 4, device=self._device)

    def read_gb_s(self) -> float:
        """GB/s of the best of three passes: anything that disturbs a pass makes it slower, nothing makes it faster.

        On a GPU, a copy within the device, whose reads and writes both count.
        """
        passes = self._copies() if self._device.type == "cuda" else self._reads()
        return max(passes) / 1e9

    def _reads(self) -> Iterator[float]:
        matrix = self._buffer.view(-1, 4096)
        read = _native_read() or partial(torch.mv, vec=torch.ones(matrix.shape[1]))
        for _ in range(3):
            start = time.perf_counter()
            read(matrix)
            yield _BUFFER / (time.perf_counter() - start)

    def _copies(self) -> Iterator[float]:
        target = torch.empty_like(self._buffer)
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            target.copy_(self._buffer)
            torch.cuda.synchronize()
            yield 2 * _BUFFER / (time.perf_counter() - start)


@contextmanager
def matrices_in_place() -> Iterator[None]:
    """Models read their matrices where they lie, as if no form of fewer bytes held the same numbers."""
    before = os.environ.get("CORESKIP_NARROW")
    os.environ["CORESKIP_NARROW"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CORESKIP_NARROW"]
        else:
            os.environ["CORESKIP_NARROW"] = before
