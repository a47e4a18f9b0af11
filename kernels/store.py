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

PAGE = 4096
_PIECE = 1 << 20  # words of a checksum at a time, where no native code takes it
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
        memory = _map(self.path)
        return {"bytes": memory.numel(), "checksum": f"{checksum(memory):016x}"}

    def abandon(self) -> None:
        self._file.close()


class Store:
    """The tensors of a file that `Writer` made, as views of the mapping.

    They may be written to: changes stay in this process.

    Raises:
        Damaged: the file is shorter or longer than it was, has other contents, or the index names places beyond it.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, index: Mapping[str, Any], size: int, expected: str) -> None:
        if os.path.getsize(path) != size:
            raise Damaged(f"it has {os.path.getsize(path)} bytes, not {size}")
        memory = _map(path)
        if f"{checksum(memory):016x}" != expected:
            raise Damaged("its contents are not what was written")
        self._tensors = {name: _view(memory, name, entry) for name, entry in index.items()}

    def __getitem__(self, name: str) -> Tensor:
        """Raises Damaged where there is none of this name."""
        try:
            return self._tensors[name]
        except KeyError:
            raise Damaged(f"it has no tensor {name}") from None

    def __iter__(self) -> Any:
        return iter(self._tensors)


def checksum(memory: Tensor) -> int:
    """Of the bytes of a contiguous tensor, read as little-endian words w_i of 64 bits, the last one filled up with
    zeros: the sum of (w_i xor (w_i >> 32)) * (2 i + 1), modulo 2**64. No change of a single word is missed."""
    if memory.nbytes == 0:
        return 0
    try:
        library = cpu.library()
    except cpu.Unavailable:
        return _checksum(memory)
    return int(library.coreskip_checksum(memory.data_ptr(), memory.nbytes, torch.get_num_threads()))


def _checksum(memory: Tensor) -> int:
    data = memory.view(torch.uint8).numpy()
    whole = data[: len(data) // 8 * 8].view("<u8")
    rest = np.frombuffer(data[whole.nbytes :].tobytes().ljust(8, b"\0"), dtype="<u8")
    total = np.uint64(0)
    with np.errstate(over="ignore"):
        for first in range(0, len(whole) + 1, _PIECE):
            words = whole[first : first + _PIECE]
            words = np.concatenate([words, rest]) if first + _PIECE > len(whole) else words
            places = np.arange(first, first + len(words), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
            total += ((words ^ (words >> np.uint64(32))) * places).sum(dtype=np.uint64)
    return int(total)


def _map(path: Path) -> Tensor:
    """The bytes of a file, which stay when the file is replaced or removed."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return torch.empty(0, dtype=torch.uint8)
        if sys.byteorder != "little":  # numbers were written as a little-endian machine has them
            raise Damaged("packed models are for little-endian machines")
        region = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(region, dtype=torch.uint8)


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
