"""Packed matrices in place of those that a model was loaded with.

What runs on a module's own matrix (prefill, and every pass that the native step does not cover) multiplies with one
that is unpacked for the length of the call (unpacking.py).

Where packing has lost nothing, as of a model that was made of such numbers, `Replaced` can put the originals back, bit
for bit. Else they are gone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..kernels.packed import PackedLinear
from ..predictors.errors import CoreskipError
from .unpacking import Unpacking, unpack
from .width import product


@dataclass(eq=False)
class _Linear:
    parts: list[PackedLinear]  # the rows of the matrix, in order
    weight: nn.Parameter  # as it was, without its data
    absent: nn.Parameter  # what stands in its place
    handles: list[Any]


class Replaced:
    """The linears of one wrapped model whose matrices exist in packed form alone.

    lossy: replace matrices that packing rounds, too.
    kept: modules that keep their own, and those inside them theirs.
    """

    def __init__(self, model: nn.Module, lossy: bool, kept: Iterable[nn.Module]) -> None:
        self._lossy, self._linears = lossy, dict[nn.Module, _Linear]()
        self.reversible = True
        self._unpacking = Unpacking()
        owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
        parts = {part for module in kept for part in module.modules()}
        #: plain linears with a matrix that no other module uses
        self.candidates = {
            m
            for m in model.modules()
            if type(m).forward is nn.Linear.forward and "forward" not in vars(m)
            if m not in parts and owners[id(m.weight)] == 1
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
        weight = cast(Tensor, module.weight)
        if module not in self.candidates or any(part.weight.dtype == weight.dtype for part in parts):
            return False
        lossless = self._restores(parts, weight)
        if not (lossless or self._lossy):
            return False
        self._let_go(module, parts, lossless)
        return True

    def _let_go(self, module: nn.Module, parts: list[PackedLinear], lossless: bool) -> None:
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        self.reversible = self.reversible and lossless
        handles = [module.register_state_dict_pre_hook(self._no_state_dict)]
        handles.append(module.register_load_state_dict_pre_hook(self._no_state_dict))
        # whoever reads what is not there gets an error, not some numbers
        absent = module.weight = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
        self._linears[module] = _Linear(parts, weight, absent, handles)
        with _unmapped(weight), torch.inference_mode(False):
            weight.data = weight.new_empty(0)

    def parts(self, module: nn.Module) -> list[PackedLinear]:
        """What has replaced the matrix of `module`, its rows in order."""
        return self._linears[module].parts

    def product(self, module: nn.Module, x: Tensor) -> Tensor:
        """x ``[..., inputs]`` times the numbers that have replaced the matrix, as a step multiplies."""
        return product(x, self.parts(module))

    def put_back(self) -> None:
        """Every module has its own matrix again, bit for bit. Only where `reversible`."""
        for module, linear in self._linears.items():
            for handle in linear.handles:
                handle.remove()
            if module not in self:
                continue
            with torch.inference_mode(False):  # whose tensors could not be trained
                whole = torch.empty_like(cast(Tensor, module.weight), device="cpu")
                linear.weight.data = unpack(linear.parts, whole)
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
        """x ``[..., inputs]`` times the numbers that the module's tiles stand for; see `Unpacking.multiply`."""
        linear = self._linears[module]
        bias = cast("Tensor | None", module.bias)
        return self._unpacking.multiply(x, linear.parts, bias, linear.weight.dtype, few)

    def _restores(self, parts: list[PackedLinear], weight: Tensor) -> bool:
        bits = {2: torch.int16, 4: torch.int32}[weight.itemsize]  # a zero has two signs
        return all(
            torch.equal(rows.view(bits), weight.detach()[first : first + rows.shape[0]].view(bits))
            for first, rows in self._unpacking.rows(parts, weight.dtype)
        )


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
