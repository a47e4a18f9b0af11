"""Reading GGUF files: their metadata, and their tensors where they lie in the mapped file.

The gguf package makes arrays of every string of a vocabulary: 5 s for 49152 tokens, where one pass over the bytes
takes 0.05.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np
import torch
from torch import Tensor

from ..predictors.checks import path_of
from ..predictors.errors import CoreskipError

VERSIONS = (2, 3)  # the first counted in 32 bits, and is not to be found any more
_MARK = b"GGUF"
_STRING, _ARRAY = 8, 9
#: value types of a fixed size, as struct knows them
_FORMATS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_LEAST_FIELD = 8 + 4 + 1  # bytes of a key's length, of a type, and of the least value
_LEAST_TENSOR = 8 + 4 + 4 + 8  # of a name's length, the number of dimensions, a type and an offset
_MOST_DIMENSIONS = 4
_MOST = 1 << 24  # of anything, as a damaged number of many gigabytes would become objects of ten times their size
_DEEPEST = 4  # arrays within arrays; files in use have none
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, eq=False, repr=False)
class GgufTensor:
    """A tensor of a file.

    Attributes:
        name: the file's, such as ``blk.0.attn_q.weight``.
        shape: as in torch, the dimension that lies together last.
        kind: the name of its type, such as ``Q4_K``.
        raw: uint8 ``[..., bytes of a row]``, a view of the mapped file; one row where there is one dimension.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    raw: Tensor

    def floats(self) -> Tensor | None:
        """The numbers in memory of their own, where they are plain float32, float16 or bfloat16; else None."""
        dtype = _FLOATS.get(self.kind)
        return None if dtype is None else self.raw.clone().view(dtype).view(self.shape)

    def dequantised(self) -> np.ndarray[Any, Any]:
        """The numbers as float32 of `shape`, as the gguf package computes them.

        Raises:
            CoreskipError: that package does not know how.
        """
        try:
            numbers = gguf.dequantize(self.raw.numpy(), gguf.GGMLQuantizationType[self.kind])
        except NotImplementedError:
            raise CoreskipError(f"{self.name} is of type {self.kind}, which the gguf package cannot read") from None
        return np.asarray(numbers, dtype=np.float32).reshape(self.shape)

    def __repr__(self) -> str:
        return f"GgufTensor({self.name}, {'x'.join(map(str, self.shape))}, {self.kind})"


@dataclass(frozen=True, eq=False, repr=False)
class GgufFile:
    """What `read_gguf` found.

    Attributes:
        metadata: numbers, strings, truth values and lists of them by their keys.
        tensors: by name, in the file's order.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """Raises `CoreskipError` where the file does not name one."""
        found = self.metadata.get("general.architecture")
        if not isinstance(found, str):
            raise CoreskipError(f"cannot load {self.path}: it does not say which architecture it is of")
        return found

    def __repr__(self) -> str:
        return f"GgufFile({self.path}, {len(self.tensors)} tensors)"


def read_gguf(path: str | Path) -> GgufFile:
    """Read the metadata of a GGUF file of version 2 or 3, and map its tensors.

    Takes as long as its strings are many: 0.2 s for 262144 tokens. Tensors are read when they are looked at; the file
    must not be changed meanwhile.

    Raises:
        CoreskipError: there is no such file, or it is not a whole GGUF file of these versions, in one line.
    """
    path = path_of(path, "the model")
    try:
        with path.open("rb") as file:
            # a private mapping, which torch may write to: it has no read-only tensors
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except ValueError:  # there is nothing to map
        raise CoreskipError(f"cannot load {path}: it is not a GGUF file") from None
    except OSError as error:
        raise CoreskipError(f"cannot read {path}: {error.strerror}") from None
    return _Reader(path, data).read()


class _Reader:
    """A position in a file's bytes. No number of the file is believed before the file's size is known to bear it."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0

    def read(self) -> GgufFile:
        if self.data[: len(_MARK)] != _MARK:
            self.fail("it is not a GGUF file")
        self.at = len(_MARK)
        version = self.number("I")
        if version not in VERSIONS:
            big = version & 0xFFFF == 0 and version != 0
            self.fail("its bytes are in big-endian order" if big else f"version {version} of GGUF is not known")
        tensors = self.count("Q", _LEAST_TENSOR, "tensors")
        fields = self.count("Q", _LEAST_FIELD, "metadata fields")
        metadata: dict[str, Any] = {}
        for _ in range(fields):
            key = self.string()
            if key in metadata:
                self.fail(f"it has {key!r} twice")
            metadata[key] = self.value(self.number("I"))
        found = [self.tensor() for _ in range(tensors)]
        return GgufFile(self.path, version, metadata, self.mapped(found, self.alignment(metadata)))

    def fail(self, why: str) -> NoReturn:
        raise CoreskipError(f"cannot load {self.path}: {why}")

    def cut_short(self) -> NoReturn:
        self.fail(f"it is cut short after {self.size} bytes, or damaged")

    # --- numbers and strings

    def take(self, size: int) -> int:
        """The position of the next `size` bytes, which are there."""
        at = self.at
        if size > self.size - at:
            self.cut_short()
        self.at = at + size
        return at

    def number(self, fmt: str) -> Any:
        fmt = "<" + fmt
        return struct.unpack_from(fmt, self.data, self.take(struct.calcsize(fmt)))[0]

    def count(self, fmt: str, least: int, what: str) -> int:
        """How many things follow of at least `least` bytes."""
        count = int(self.number(fmt))
        if count * least > self.size - self.at or count > _MOST:
            self.fail(f"it is cut short or damaged: {self.size} bytes cannot hold {count} {what}")
        return count

    def string(self) -> str:
        size = int(self.number("Q"))
        return self.text(self.take(size), size)

    def text(self, at: int, size: int) -> str:
        try:
            return self.data[at : at + size].decode("utf-8")
        except UnicodeDecodeError:
            self.fail("a string is not UTF-8")

    def strings(self, count: int) -> list[str]:
        # written out, as a vocabulary has many: half the time of `string`
        data, at, size, found = self.data, self.at, self.size, []
        unpack = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                end = at + 8 + unpack(data, at)[0]
                if end > size:
                    self.cut_short()
                found.append(data[at + 8 : end].decode("utf-8"))
                at = end
        except struct.error:
            self.cut_short()
        except UnicodeDecodeError:
            self.fail("a string is not UTF-8")
        self.at = at
        return found

    # --- metadata

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(depth)
        if kind not in _FORMATS:
            self.fail(f"a metadata value is of the unknown type {kind}")
        return self.number(_FORMATS[kind])

    def array(self, depth: int) -> list[Any]:
        kind = int(self.number("I"))
        if kind in _FORMATS:
            dtype = np.dtype(_FORMATS[kind]).newbyteorder("<")
            count = self.count("Q", dtype.itemsize, "numbers")
            numbers: list[Any] = np.frombuffer(self.data, dtype, count, self.take(count * dtype.itemsize)).tolist()
            return numbers
        if kind == _STRING:
            return self.strings(self.count("Q", 8, "strings"))
        if kind != _ARRAY or depth == _DEEPEST:
            self.fail(f"a metadata array is of the unknown type {kind}")
        return [self.array(depth + 1) for _ in range(self.count("Q", 12, "arrays"))]

    def alignment(self, metadata: dict[str, Any]) -> int:
        found = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(found, int) or found < 1 or found & (found - 1) or found > self.size:
            self.fail(f"its alignment is {found!r}")
        return found

    # --- tensors

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, dimensions as in the file, number of the type, and offset."""
        name = self.string()
        dimensions = int(self.number("I"))
        if dimensions > _MOST_DIMENSIONS:
            self.fail(f"{name!r} has {dimensions} dimensions")
        shape = tuple(int(self.number("Q")) for _ in range(dimensions))
        return name, shape, int(self.number("I")), int(self.number("Q"))

    def mapped(self, found: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, GgufTensor]:
        begin = -(-self.at // alignment) * alignment
        whole = torch.frombuffer(self.data, dtype=torch.uint8)
        tensors: dict[str, GgufTensor] = {}
        for name, dimensions, number, offset in found:
            if name in tensors:
                self.fail(f"it has the tensor {name!r} twice")
            kind = self.kind(name, number)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            width, rows = (dimensions or (1,))[0], prod(dimensions[1:])
            if width % block or not width or not rows:
                self.fail(f"{name!r} is {list(dimensions)}, which {kind.name} cannot be")
            row = width // block * block_bytes
            if begin + offset + row * rows > self.size:
                self.fail(f"it is cut short or damaged: {name!r} ends beyond its {self.size} bytes")
            raw = whole[begin + offset : begin + offset + row * rows]
            shape = tuple(reversed(dimensions))
            tensors[name] = GgufTensor(name, shape, kind.name, raw.view(*shape[:-1], row))
        return tensors

    def kind(self, name: str, number: int) -> gguf.GGMLQuantizationType:
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            self.fail(f"{name!r} is of type {number}, which is not known")
        if kind not in gguf.GGML_QUANT_SIZES:
            self.fail(f"{name!r} is of type {kind.name}, which is not known")
        return kind
