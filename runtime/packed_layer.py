"""Linear layers whose matrices exist in packed form alone, as a packed model has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels.packed import PackedLinear
from ..predictors.errors import CoreskipError
from .unpacking import Unpacking, unpack

_unpacking = Unpacking()
_BYTES = "_coreskip_packed_bytes"


class PackedLayer(nn.Linear):
    """A linear layer that computes with the numbers that its packed matrix stands for, in the model's dtype.

    `weight` has shape and dtype, and no numbers: it is on the meta device. What needs the matrix itself, as `rows_of`
    of predictors/anatomy.py, asks for `unpacked`.

    Args:
        parts: packed matrices, whose rows, in order, are those of the layer; groups alone. Their biases are not used.
        bias: ``[outputs]`` of the model's dtype, or None.
    """

    def __init__(self, parts: Sequence[PackedLinear], bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = parts[0].in_features, sum(part.out_features for part in parts)
        shape = self.out_features, self.in_features
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._packed = list(parts)
        self._note_bytes()
        self._handles = [self.register_state_dict_pre_hook(_no_state_dict)]
        self._handles.append(self.register_load_state_dict_pre_hook(_no_state_dict))

    def forward(self, input: Tensor) -> Tensor:
        return self.multiply(input, few=False)

    def multiply(self, x: Tensor, few: bool) -> Tensor:
        """x ``[..., inputs]`` times the matrix; see `Unpacking.multiply`."""
        return _unpacking.multiply(x, self.parts(), cast("Tensor | None", self.bias), self.weight.dtype, few)

    def parts(self, whole: bool = True) -> list[PackedLinear]:
        """The packed matrix. whole: whether x meets its numbers in float32, or rounded to 8 bits."""
        found, first = [], 0
        for part in self._packed:
            last = first + part.out_features
            bias = None if self.bias is None else self.bias.detach()[first:last].float()
            found.append(replace(part, bias=bias, whole=whole))
            first = last
        return found

    def unpacked(self) -> Tensor:
        """The matrix, ``[outputs, inputs]`` of the model's dtype, put together anew at every call."""
        return unpack(self._packed, torch.empty(self.weight.shape, dtype=self.weight.dtype, device="cpu"))

    def unpack(self) -> None:
        """Becomes a plain linear layer with the numbers that the packed matrix stands for."""
        self.weight = nn.Parameter(self.unpacked(), requires_grad=False)
        for handle in self._handles:
            handle.remove()
        del self._packed, self._handles
        self.__class__ = nn.Linear  # type: ignore[assignment]

    @property
    def formats(self) -> list[str]:
        return [str(part.fmt) for part in self._packed]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Casts; a packed matrix stays as it is. It is in the CPU's format: another device gets the matrix unpacked."""
        like = fn(torch.empty(0, dtype=self.weight.dtype, device="cpu"))
        if like.device.type != "cpu":
            self.unpack()
            return nn.Module._apply(self, fn, recurse)
        if like.dtype != self.weight.dtype:
            self.weight = nn.Parameter(self.weight.to(like.dtype), requires_grad=False)
            self._note_bytes()
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias.detach()), requires_grad=False)
        return self

    def _note_bytes(self) -> None:
        setattr(self.weight, _BYTES, sum(part.weight.nbytes for part in self._packed))


def packed_bytes_of(weight: Tensor) -> int | None:
    """Bytes that a product of a few rows with a `PackedLayer` reads, by its `weight`; None of other weights."""
    return getattr(weight, _BYTES, None)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, of packed matrices those that they take."""
    found = {id(p): p for p in model.parameters()}.values()
    return sum(p.nbytes if packed_bytes_of(p) is None else cast(int, packed_bytes_of(p)) for p in found)


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLayer]]:
    """A model's layers that have packed matrices alone, and their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLayer))


def _no_state_dict(*_: Any) -> None:
    raise CoreskipError(
        "cannot save or load the weights of a packed model: copy its folder, or use the model that it was packed from"
    )
