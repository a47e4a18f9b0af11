"""A file of named tensors that is mapped, not read: processes that use it at once share one copy in the page cache.

Every tensor begins on a page of its own. What is where stands in an index that the caller keeps: ``{name: {"at",
"dtype", "shape"}}``, with the file's size and checksum beside it.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from . import cpu
from .files import PAGE, DirectFile, anonymous

_PIECE = 1 << 20  # words of a checksum at a time, where no native code takes it
_SPARING = 4 << 20  # bytes that are read at a time where they shall not stay
DTYPES = {
    name: getattr(torch, name)
    for name in ("uint8", "int8", "int16", "int32", "int64", "bool", "float16", "bfloat16", "float32", "float64")
}


class Damaged(ValueError):
    """The file is not what its index says; the message says in what."""


@dataclass
class Writer:
    """Writes tensors one after the other. `index` says where they are; `close` returns the file's size and checksum."""

    path: Path
    index: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._file: BinaryIO = self.path.open("wb")

    def add(self, name: str, tensor: Tensor) -> None:
        """Raises OSError where there is no room."""
        tensor = tensor.detach().cpu().contiguous()
        at = -(-self._file.tell() // PAGE) * PAGE
        self._file.write(bytes(at - self._file.tell()))
        if tensor.numel():
            self._file.write(tensor.view(-1).view(torch.uint8).numpy().data)
        self.index[name] = {"at": at, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}

    def close(self) -> dict[str, Any]:
        """Returns ``{"bytes", "checksum"}`` when the disk has the file."""
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        with self.path.open("rb") as file:
            memory = _map(file.fileno())
        return {"bytes": memory.numel(), "checksum": f"{checksum(memory):016x}"}

    def abandon(self) -> None:
        self._file.close()


class Store:
    """The tensors of a file that `Writer` made, as views of the mapping.

    They may be written to: changes stay in this process.

    Args:
        sparing: check the contents without having them in memory, not even in the page cache.

    Attributes:
        folder: where it lay. file: to read from, however the folder changes meanwhile.
        memory: its mapping. spans: of each tensor where it is, and its bytes.

    Raises:
        Damaged: the file is shorter or longer than it was, has other contents, or the index names places beyond it.
        OSError: it cannot be read.
    """

    def __init__(
        self, path: Path, index: Mapping[str, Any], size: int, expected: str, *, sparing: bool = False
    ) -> None:
        self.folder = path.parent
        self.file = DirectFile(os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
        found = os.fstat(self.file.fd).st_size
        if found != size:
            raise Damaged(f"it has {found} bytes, not {size}")
        self.memory = _map(self.file.fd)
        if f"{_checksum_of(self.file, size) if sparing else checksum(self.memory):016x}" != expected:
            raise Damaged("its contents are not what was written")
        self._tensors = {name: _view(self.memory, name, entry) for name, entry in index.items()}
        self.spans = {name: (int(index[name]["at"]), tensor.nbytes) for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        """Raises Damaged where there is none of this name."""
        try:
            return self._tensors[name]
        except KeyError:
            raise Damaged(f"it has no tensor {name}") from None

    def __iter__(self) -> Any:
        return iter(self._tensors)


def checksum(memory: Tensor, first: int = 0) -> int:
    """Of the bytes of a contiguous tensor, read as little-endian words w_i of 64 bits, the last one filled up with
    zeros: the sum of (w_i xor (w_i >> 32)) * (2 i + 1), modulo 2**64. No change of a single word is missed.

    first: the place of the first word in what the sum is of, which is the sum of its parts' sums."""
    if memory.nbytes == 0:
        return 0
    try:
        library = cpu.library()
    except cpu.Unavailable:
        return _checksum(memory, first)
    return int(library.coreskip_checksum(memory.data_ptr(), memory.nbytes, first, torch.get_num_threads()))


def _checksum_of(file: DirectFile, size: int) -> int:
    """The same of a file's first bytes, read one piece after the other."""
    total, piece = 0, anonymous(min(size, _SPARING))
    for at in range(0, size, _SPARING):
        count = min(size - at, _SPARING)
        file.read(at, count, piece)
        total += checksum(piece[:count], at // 8)
    return total % 2**64


def _checksum(memory: Tensor, first_word: int) -> int:
    data = memory.view(torch.uint8).numpy()
    whole = data[: len(data) // 8 * 8].view("<u8")
    rest = np.frombuffer(data[whole.nbytes :].tobytes().ljust(8, b"\0"), dtype="<u8")
    total = np.uint64(0)
    with np.errstate(over="ignore"):
        for first in range(0, len(whole) + 1, _PIECE):
            words = whole[first : first + _PIECE]
            words = np.concatenate([words, rest]) if first + _PIECE > len(whole) else words
            at = first_word + first
            places = np.arange(at, at + len(words), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
            total += ((words ^ (words >> np.uint64(32))) * places).sum(dtype=np.uint64)
    return int(total)


def _map(fd: int) -> Tensor:
    """The bytes of an open file, which stay when the file is replaced or removed."""
    if os.fstat(fd).st_size == 0:
        return torch.empty(0, dtype=torch.uint8)
    if sys.byteorder != "little":  # numbers were written as a little-endian machine has them
        raise Damaged("packed models are for little-endian machines")
    return torch.frombuffer(mmap.mmap(fd, 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)


def _view(memory: Tensor, name: str, entry: Any) -> Tensor:
    try:
        at, dtype, shape = entry["at"], DTYPES[entry["dtype"]], entry["shape"]
        good = all(type(n) is int and 0 <= n <= 2**62 for n in (at, *shape)) and at % PAGE == 0
    except (KeyError, TypeError):
        good = False
    if not good:
        raise Damaged(f"where {name} is makes no sense")
    size = prod(shape) * dtype.itemsize
    if at + size > memory.numel():
        raise Damaged(f"{name} would lie beyond its end")
    if not size:
        return torch.empty(shape, dtype=dtype)
    # in a storage of its own: a tensor that is pickled takes all of its storage along
    return torch.frombuffer(memory.numpy(), dtype=torch.uint8, offset=at, count=size).view(dtype).view(shape)
