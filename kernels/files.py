"""Reading a file in large pieces, past the page cache where the system can."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import torch
from torch import Tensor

PAGE = 4096  # bytes: what direct reads are whole multiples of
READERS = 2  # threads: one alone leaves the disk idle between its reads
_HUGE = 2 << 20
_PIECE, _MEASURED = 4 << 20, 512 << 20


class DirectFile:
    """A file that stays the same when its name goes to another. fd: for native code."""

    def __init__(self, fd: int) -> None:
        """fd: open for reading; it is this object's from now on."""
        self.fd = fd
        self._close = weakref.finalize(self, os.close, fd)
        self.direct = _go_direct(fd)

    def read(self, at: int, size: int, to: Tensor) -> None:
        """Bytes `at` to `at + size` go to `to`, uint8, as far from its begin as `at` is from a page's. `to` begins on a
        page, and has room for whole pages.

        Raises OSError where the file is too short, or its disk fails.
        """
        first, end = at // PAGE * PAGE, at + size
        last = -(-end // PAGE) * PAGE
        memory = memoryview(to.numpy().data)
        while first < end:
            got = os.preadv(self.fd, [memory[: last - first]], first)
            if first + got < end and got < PAGE:
                raise OSError(errno.EIO, "it is shorter than it was")
            got = got if first + got >= end else got // PAGE * PAGE
            memory, first = memory[got:], first + got
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, at, size, os.POSIX_FADV_DONTNEED)

    @cached_property
    def bandwidth(self) -> float:
        """Bytes per second at which its first 512 MB come, a few MB at once by two threads."""
        size = min(os.fstat(self.fd).st_size, _MEASURED)
        places = [anonymous(_PIECE) for _ in range(READERS)]

        def read(reader: int) -> None:
            for at in range(reader * _PIECE, size, READERS * _PIECE):
                self.read(at, min(_PIECE, size - at), places[reader])

        start = time.perf_counter()
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(read, range(READERS)))
        return size / (time.perf_counter() - start)


def _go_direct(fd: int) -> bool:
    """Whether reads go past the page cache from now on."""
    try:
        import fcntl

        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
        with mmap.mmap(-1, PAGE) as page:
            os.preadv(fd, [page], 0)
    except (ImportError, AttributeError):
        return False
    except OSError:  # a file system that has none of it
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        return False
    return True


def look_up(memory: Tensor) -> None:
    """Page faults in these bytes of a mapping, which begin on a page, shall bring no more than the page: a row of
    embeddings came with 128 KB around it."""
    if os.name == "posix" and hasattr(mmap, "MADV_RANDOM"):
        where, size = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.nbytes)
        ctypes.CDLL(None).madvise(where, size, mmap.MADV_RANDOM)


def anonymous(size: int) -> Tensor:
    """Memory of whole pages, uint8, which goes back to the system when nobody has the tensor any more."""
    region = mmap.mmap(-1, max(1, -(-size // PAGE)) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= 2 * _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=torch.uint8)
