"""Whether any of many tensors was written to or given other memory since it was last looked at.

Torch counts writes (`Tensor._version`) and says where a tensor lies (`data_ptr`), but to ask 272 tensors from Python
takes 300 microseconds after a decode step has cleared the caches: every question reads four cold lines of memory, one
after the other. Their addresses do not change as long as the tensors are held, so native code reads all of them at
once. Where those numbers lie inside of a tensor is found by experiment; where that fails, Python asks.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from . import cpu

_SAMPLES = 2  # numbers of a tensor that are compared themselves: some writes are not counted


class Watch:
    """Some tensors, and how they were when this was made.

    A change is found where torch counts it, where a tensor got other memory, and, for writes past the counter
    (``p.data.mul_(2)``, fused optimizers, numpy), where the first or the last number is another. Holds the tensors'
    memory.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        here = [t for t in tensors if t.device.type in ("cpu", "meta") and t.layout is torch.strided]
        where = _layout() if here else None
        native = [] if where is None else here
        by_address = set(map(id, native))
        self._asked = [t for t in tensors if id(t) not in by_address]
        self._before = [_ask(t) for t in self._asked]
        with torch.no_grad():
            self._held = [(t, t.detach()) for t in native]  # which share memory and counter
        places, samples = list[list[int]](), list[list[int]]()
        for t in native:
            of_tensor = _words(cast(_Layout, where), t)
            places.append(of_tensor[0])
            samples.append(of_tensor[1])
        self._places, self._samples = places, samples
        # numbers of the data come last: they are read only where the data is known to lie where it did
        every = [a for addresses in (*places, *samples) for a in addresses]
        self._value = {address: _word(address) for address in every}
        self._addresses = (ctypes.c_int64 * len(every))(*every)
        self._expected = (ctypes.c_int32 * len(every))(*(self._value[a] for a in every))
        self._look = cpu.library().coreskip_unchanged if every else None

    def changed(self) -> bool:
        if self._look is not None and not self._look(self._addresses, self._expected, len(self._expected)):
            return True
        return bool(self._asked) and any(_ask(t) != was for t, was in zip(self._asked, self._before, strict=True))

    def which(self) -> list[Tensor]:
        """The tensors that changed."""
        found = [t for t, was in zip(self._asked, self._before, strict=True) if _ask(t) != was]
        for (t, _), places, samples in zip(self._held, self._places, self._samples, strict=True):
            if any(_word(a) != self._value[a] for a in (*places, *samples)):
                found.append(t)
        return found


def _ask(t: Tensor) -> tuple[int, int, torch.dtype]:
    address = 0 if t.device.type == "meta" else t.data_ptr()
    return (0 if t.is_inference() else t._version), address, t.dtype


def _word(address: int) -> int:
    return ctypes.c_int32.from_address(address).value


@dataclass(frozen=True)
class _Layout:
    """Offsets in bytes: of a tensor's storage and counter in what ``_cdata`` points to, of the number in the counter,
    and of the data's address in the storage."""

    storage: int
    counter: int
    version: int
    data: int


@functools.cache
def _layout() -> _Layout | None:
    try:
        cpu.library()
    except cpu.Unavailable:
        return None
    a = torch.zeros(8)
    alias, other = a.detach(), a.data  # the first shares the counter, the second does not
    words = [_read(t._cdata, 16) for t in (a, alias, other)]
    at = {8 * i for i, word in enumerate(words[0]) if word == a.untyped_storage()._cdata}
    counters = {8 * i for i, (x, y, z) in enumerate(zip(*words, strict=True)) if x == y != z and x}
    data = {8 * i for i, word in enumerate(_read(a.untyped_storage()._cdata, 6)) if word == a.data_ptr()}
    if not (len(at) == len(counters) == 1 and data):
        return None
    found = _Layout(at.pop(), counters.pop(), 16, min(data))
    counter = _read(a._cdata + found.counter, 1)[0]
    for version in (0x5CA1AB1E, 7):
        torch._C._autograd._unsafe_set_version_counter((a,), (version,))
        a.add_(1)
        if ctypes.c_uint32.from_address(counter + found.version).value != version + 1 or a._version != version + 1:
            return None
    return found


def _read(address: int, words: int) -> list[int]:
    return list((ctypes.c_uint64 * words).from_address(address))


def _words(where: _Layout, t: Tensor) -> tuple[list[int], list[int]]:
    """Addresses of the 32-bit words that say where a tensor lies and how often it was written to; and of some of its
    numbers."""
    storage = t.untyped_storage()
    starts = t._cdata + where.storage, storage._cdata + where.data
    places = [start + half for start in starts for half in (0, 4)]
    if not t.is_inference():
        places.append(_read(t._cdata + where.counter, 1)[0] + where.version)
    count = t.nbytes // 4 if t.is_contiguous() and t.device.type != "meta" else 0
    chosen = {i * (count - 1) // (_SAMPLES - 1) for i in range(_SAMPLES)} if count else set()
    return places, [t.data_ptr() + 4 * i for i in sorted(chosen)]
