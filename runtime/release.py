"""Packed matrices in place of those that a model was loaded with.

What runs on a module's own matrix (prefill, and every pass that the native step does not cover) multiplies with one
that is put together from the packed one for the length of the call: on two threads 6 ms for all of the embedded
model's. Few rows at a time, so that it stays in the caches and takes no memory to speak of.

Where packing has lost nothing, as of a model that was made of such numbers, `Replaced` can put the originals back, bit
for bit. Else they are gone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..kernels import cpu
from ..kernels.memory import allocate
from ..kernels.packed import PackedLinear
from ..predictors.errors import CoreskipError
from .width import joined, most_rows, product

_AT_ONCE = 32 << 20  # bytes of a matrix that are put together at once
_WORTH_CASTING = 1 << 16  # numbers of a matrix from which on a product in bfloat16 may take less time


@dataclass(eq=False)
class _Linear:
    parts: list[PackedLinear]  # the rows of the matrix, in order
    weight: nn.Parameter  # as it was, without its data
    absent: nn.Parameter  # what stands in its place
    handles: list[Any]


class Replaced:
    """The linears of one wrapped model whose matrices exist in packed form alone.

    lossy: replace matrices that packing rounds, too.
    kept: modules that keep their own.
    """

    def __init__(self, model: nn.Module, lossy: bool, kept: Iterable[nn.Module]) -> None:
        self._lossy, self._linears = lossy, dict[nn.Module, _Linear]()
        self.reversible = True
        self._memory = threading.local()
        owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
        kept = set(kept)
        #: plain linears with a matrix that no other module uses
        self.candidates = {
            m
            for m in model.modules()
            if type(m).forward is nn.Linear.forward and "forward" not in vars(m)
            if m not in kept and owners[id(m.weight)] == 1
        }

    def __contains__(self, module: object) -> bool:
        """Whether the matrix of `module` exists in packed form alone; not so where somebody gave it another."""
        linear = self._linears.get(cast(nn.Module, module))
        return linear is not None and linear.absent is cast(nn.Module, module)._parameters.get("weight")

    @property
    def written_to(self) -> bool:
        """Whether somebody has written to a matrix that is not there, which does nothing."""
        absent = (linear.absent for linear in self._linears.values())
        return any(not weight.is_inference() and weight._version for weight in absent)

    def renewed(self, module: nn.Module) -> list[PackedLinear] | None:
        """What has replaced the matrix of `module`, with the bias as it is now; None where nothing has."""
        if module not in self:
            return None
        linear, first, parts = self._linears[module], 0, []
        bias = cast("Tensor | None", module.bias)
        for part in linear.parts:
            some = None if bias is None else bias.detach()[first : first + part.out_features].float()
            parts.append(replace(part, bias=some))
            first += part.out_features
        linear.parts = parts
        return parts

    def __len__(self) -> int:
        return len(self._linears)

    def replace(self, module: nn.Module, parts: list[PackedLinear]) -> bool:
        """Lets go of the matrix of `module`, whose rows are those of `parts`, where that is allowed: whether it was."""
        weight = module.weight
        if module not in self.candidates or any(part.weight.dtype == weight.dtype for part in parts):
            return False
        assert isinstance(weight, nn.Parameter)
        lossless = self._restores(parts, weight)
        if not (lossless or self._lossy):
            return False
        self.reversible = self.reversible and lossless
        handles = [module.register_state_dict_pre_hook(self._no_state_dict)]
        handles.append(module.register_load_state_dict_pre_hook(self._no_state_dict))
        # whoever reads what is not there gets an error, not some numbers
        absent = module.weight = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
        self._linears[module] = _Linear(parts, weight, absent, handles)
        with _unmapped(weight), torch.inference_mode(False):
            weight.data = weight.new_empty(0)
        return True

    def parts(self, module: nn.Module) -> list[PackedLinear]:
        """What has replaced the matrix of `module`, its rows in order."""
        return self._linears[module].parts

    def put_back(self) -> None:
        """Every module has its own matrix again, bit for bit. Only where `reversible`."""
        for module, linear in self._linears.items():
            for handle in linear.handles:
                handle.remove()
            if module not in self:
                continue
            with torch.inference_mode(False):  # whose tensors could not be trained
                whole = torch.empty_like(cast(Tensor, module.weight), device="cpu")
                linear.weight.data = _restore(linear.parts, whole)
            module.weight = linear.weight
        self._linears.clear()

    def refuse(self, what: str) -> None:
        """Raises CoreskipError where matrices were replaced."""
        if self._linears:
            way = "call coreskip.unwrap(model) first" if self.reversible else "load the model again"
            raise CoreskipError(f"cannot {what}: packed weights have replaced the model's own; {way}")

    def _no_state_dict(self, *_: Any) -> None:
        self.refuse("save or load its weights")

    def run(self, module: nn.Module, x: Tensor, few: bool) -> Tensor:
        """x ``[..., inputs]`` times the numbers that the module's tiles stand for, as torch multiplies or, for `few`
        rows (one for each sequence), as a native step does."""
        linear = self._linears[module]
        if few and x.numel() <= most_rows(linear.parts) * x.shape[-1]:
            return product(x, linear.parts)
        if self._in_bfloat16(x, linear):
            return self._product_in_bfloat16(module, x)
        bias: Any = module.bias
        # what autograd keeps until it goes back must not be written over
        fresh = x.requires_grad and torch.is_grad_enabled()
        y = [
            F.linear(x, rows, None if bias is None else bias[first : first + rows.shape[0]])
            for first, rows in self._rows(linear.parts, linear.weight.dtype, fresh)
        ]
        return joined(y)

    def _in_bfloat16(self, x: Tensor, linear: _Linear) -> bool:
        """Whether a CPU multiplies bfloat16 so much faster that weights of 4 or 8 bits, whose products with a native
        step's x in 8 bits are no closer, are multiplied in it."""
        if linear.weight.dtype != torch.float32 or torch.is_grad_enabled() or not cpu.has_bfloat16_tiles():
            return False
        inputs = linear.parts[0].in_features
        size = inputs * sum(part.out_features for part in linear.parts)
        return size >= _WORTH_CASTING and all(part.grouped and not part.whole for part in linear.parts)

    def _product_in_bfloat16(self, module: nn.Module, x: Tensor) -> Tensor:
        x, parts = x.to(torch.bfloat16), self._linears[module].parts
        y = [F.linear(x, rows).float() for _, rows in self._rows(parts, torch.bfloat16, fresh=False)]
        bias: Any = module.bias
        return joined(y) if bias is None else joined(y) + bias

    def _restores(self, parts: list[PackedLinear], weight: Tensor) -> bool:
        bits = {2: torch.int16, 4: torch.int32}[weight.itemsize]  # a zero has two signs
        return all(
            torch.equal(rows.view(bits), weight.detach()[first : first + rows.shape[0]].view(bits))
            for first, rows in self._rows(parts, weight.dtype, fresh=False)
        )

    def _rows(self, parts: list[PackedLinear], dtype: torch.dtype, fresh: bool) -> Iterator[tuple[int, Tensor]]:
        """The matrix, some rows at a time: the first one's index, and the rows, good until the next are asked for."""
        count, inputs = sum(part.out_features for part in parts), parts[0].in_features
        most = min(count, max(1, _AT_ONCE // (inputs * dtype.itemsize)))
        memory = torch.empty(0, device="cpu") if fresh else self._scratch(most * inputs * dtype.itemsize)
        for first in range(0, count, most):
            shape = min(most, count - first), inputs
            out = (
                torch.empty(shape, dtype=dtype, device="cpu")
                if fresh
                else memory.view(dtype)[: shape[0] * inputs].view(shape)
            )
            yield first, _restore(parts, out, first)

    def _scratch(self, nbytes: int) -> Tensor:
        """Memory of this thread: fresh pages for every product would take longer than to fill them."""
        memory: Tensor | None = getattr(self._memory, "bytes", None)
        if memory is None or memory.nbytes < nbytes:
            with torch.inference_mode(False):  # it may be written to where there is none
                memory = self._memory.bytes = allocate((nbytes,), torch.uint8, torch.device("cpu"))
        return memory[:nbytes]


@contextmanager
def _unmapped(weight: Tensor) -> Iterator[None]:
    """For the length of the block in which `weight` lets go of its memory. If that maps a file, its pages leave the
    resident set, provided that nobody else has them: safetensors maps whole checkpoints, which stay mapped as long as
    one tensor is in use (the embedded model in fp32: 1.09 GB instead of 0.66 after `wrap`)."""
    memory = weight.untyped_storage()
    begin, end, users = memory.data_ptr(), memory.data_ptr() + memory.nbytes(), StorageWeakRef(memory)
    first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    of_file = first < last and _maps_file(first, last)
    del memory
    yield
    if of_file and users.expired():
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _maps_file(first: int, last: int) -> bool:
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.is_file() else ():
        where, _, _, _, inode, *_ = line.split()
        begin, end = (int(number, 16) for number in where.split("-"))
        if begin <= first and last <= end:
            return inode != "0"
    return False


def trim() -> None:
    """Gives freed memory back to the system, where the C library can: matrices of a few MB lie in its heap."""
    trim_heap = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim_heap is not None:
        trim_heap(0)


def _restore(parts: list[PackedLinear], out: Tensor, first: int = 0) -> Tensor:
    """Writes rows `first` and following of the matrix that `parts` make up to `out`."""
    last, at = first + out.shape[0], 0
    for part in parts:
        begin, end = max(first, at), min(last, at + part.out_features)
        if begin < end and part.grouped:
            cpu.untile(part, out[begin - first : end - first], begin - at)
        elif begin < end:
            out[begin - first : end - first] = part.weight[begin - at : end - at, : part.in_features]
        at += part.out_features
    return out
