"""What each token chooses of a file, neurons or experts: some are kept in memory, the others are read when they are
chosen, or a little before (csrc/slots.h)."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import arguments, cpu
from .files import PAGE, DirectFile, anonymous

READERS = 8  # threads: what is chosen lies apart, and a disk does several small reads in the time of one
#: Steps after which a use of a unit counts half, see csrc/slots.h; 0: the least recently used goes first.
HALF_LIFE = 32.0
AHEAD = True  # whether what the next layer will probably choose is read while this one waits
_PIECE = 8 << 20  # bytes that are written at once
_BOUNCE = (512 << 10) + 2 * PAGE  # of each reader

#: one part of the units of a layer: its place in the file, the distance from unit to unit, and the bytes of each,
#: from the first that is read to the last
Part = tuple[int, int, int, int]


class Slots:
    """Slots of memory for units of a file, which layers choose among.

    Args:
        file: what they are read from.
    """

    def __init__(self, file: DirectFile) -> None:
        self.file, self.ahead, self._half_life = file, AHEAD, HALF_LIFE
        self._layers: list[arguments.SlotLayer] = []
        self._index: dict[int, int] = {}
        self._least = 0  # slots
        self._bytes = 0
        self._native: Native | None = None
        self._done = dict.fromkeys(_FIGURES, 0)  # by what is gone

    def add(self, address: int, units: int, parts: Sequence[Part], together: int) -> None:
        """A layer's units, by the address under which steps know the first. together: how many a step may want."""
        layer = arguments.SlotLayer(units=units, parts=len(parts))
        for index, (at, step, first, last) in enumerate(parts):
            layer.at[index], layer.step[index], layer.from_[index], layer.bytes[index] = at, step, first, last - first
        self._index[address] = len(self._layers)
        self._layers.append(layer)
        self._least = max(self._least, min(units, together))
        self._drop()

    def layer(self, address: int | None) -> int | None:
        """Which layer's units begin at this address; None where none do."""
        return None if address is None else self._index.get(address)

    def allow(self, nbytes: int) -> bool:
        """May take so many bytes from now on, or what it needs at least. Returns whether steps have to be made anew."""
        if nbytes == self._bytes:
            return False
        self._bytes = nbytes
        self._drop()
        return True

    @property
    def nbytes(self) -> int:
        return 0 if self._native is None else self._native.memory.numel()

    @property
    def slot_bytes(self) -> int:
        layers = (arguments.SlotLayer * len(self._layers))(*self._layers)
        return int(cpu.library().coreskip_slot_bytes(layers, len(layers)))

    def native(self) -> Native:
        """What steps use, as long as they hold it."""
        if self._native is None:
            layers = (arguments.SlotLayer * len(self._layers))(*self._layers)
            most = sum(layer.units for layer in self._layers)
            count = min(most, max(self._least, self._bytes // self.slot_bytes))
            self._native = Native(self.file, layers, count * self.slot_bytes, count, self._half_life)
        return self._native

    def figures(self) -> dict[str, int]:
        """So far: units that steps `wanted`, `missed` and had `expected`, `reads` and `read_bytes`, and nanoseconds
        that they `waited`."""
        now = dict.fromkeys(_FIGURES, 0) if self._native is None else self._native.figures()
        return {name: self._done[name] + now[name] for name in _FIGURES}

    def _drop(self) -> None:
        self._done = self.figures()
        self._native = None


_FIGURES = tuple(str(field[0]) for field in arguments.SlotFigures._fields_)


class Native:
    """The native object, with its memory. count: of slots."""

    def __init__(self, file: DirectFile, layers: ctypes.Array[arguments.SlotLayer], nbytes: int, count: int,
                 half_life: float) -> None:  # fmt: skip
        self.memory, self._held, self._library = anonymous(nbytes), file, cpu.library()
        self.address: int = self._library.coreskip_slots(
            file.fd, layers, len(layers), self.memory.data_ptr(), count, half_life, READERS
        )
        if not self.address:
            raise MemoryError("no memory for slots")
        self._end = weakref.finalize(self, _end, self._library, self.address, self.memory, file)

    def figures(self) -> dict[str, int]:
        found = arguments.SlotFigures()
        self._library.coreskip_slots_figures(self.address, ctypes.byref(found))
        return {name: int(getattr(found, name)) for name in _FIGURES}


def _end(library: ctypes.CDLL, address: int, *held: object) -> None:
    """Nothing reads any more; `held` until then."""
    library.coreskip_slots_end(address)


def readers_bytes() -> int:
    """What the readers need besides slots."""
    return READERS * _BOUNCE


class Spilled:
    """A file without a name, for tensors that are to be read from a disk: it goes when nobody has it any more.

    Raises OSError where none can be made in `folder`, nor where temporary files go.
    """

    def __init__(self, folder: Path) -> None:
        place = folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
        self._to, name = tempfile.mkstemp(prefix=".coreskip-", dir=place)
        self._close = weakref.finalize(self, os.close, self._to)
        try:
            self.file = DirectFile(os.open(name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
        finally:
            os.unlink(name)
        self._size = 0

    def put(self, tensors: Iterable[Tensor]) -> tuple[Tensor, int]:
        """Tensors on the CPU, alike but for their first dimension: one of all of them in the file, mapped, and where it
        begins there.

        Raises OSError where the disk is full.
        """
        at, end, rows, last = self._size, self._size, 0, torch.empty(0, device="cpu")
        for last in tensors:
            data, done = last.reshape(-1).view(torch.uint8).numpy().data, 0
            while done < len(data):
                done += os.pwrite(self._to, data[done : done + _PIECE], end + done)
            end, rows = end + len(data), rows + last.shape[0]
        self._size = -(-end // PAGE) * PAGE
        os.truncate(self._to, self._size)
        os.fsync(self._to)  # only then may its pages go
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._to, at, self._size - at, os.POSIX_FADV_DONTNEED)
        mapped = mmap.mmap(self._to, self._size - at, offset=at, access=mmap.ACCESS_COPY)
        found = torch.frombuffer(mapped, dtype=torch.uint8, count=end - at)
        return found.view(last.dtype).view(rows, *last.shape[1:]), at
