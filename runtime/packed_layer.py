"""Linear layers whose matrices exist in packed form alone, as a packed model has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels import cpu
from ..kernels.packed import DTYPES, PackedLinear
from ..predictors.errors import CoreskipError
from .unpacking import Unpacking, unpack

_unpacking = Unpacking()
_BYTES = "_coreskip_packed_bytes"
_PLAIN_WAY = "load the model with packed=False"


class PackedLayer(nn.Linear):
    """A linear layer that computes with the numbers that its packed matrix stands for, in the model's dtype.

    `weight` has shape and dtype, and no numbers: it is on the meta device. What needs the matrix itself, as `rows_of`
    of predictors/anatomy.py, asks for `unpacked`.

    Args:
        parts: packed matrices whose rows, in order, are those of the layer: groups, or halves for float32. Their
            biases are not used.
        bias: ``[outputs]`` of the model's dtype, or None.
    """

    def __init__(self, parts: Sequence[PackedLinear], bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = parts[0].in_features, sum(part.out_features for part in parts)
        shape = self.out_features, self.in_features
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._packed = list(parts)
        self._note_weight()
        self._handles = _refusing(self)

    def forward(self, input: Tensor) -> Tensor:
        return self.multiply(input, few=False)

    def multiply(self, x: Tensor, few: bool) -> Tensor:
        """x ``[..., inputs]`` times the matrix; see `Unpacking.multiply`."""
        return _unpacking.multiply(x, self.parts(), cast("Tensor | None", self.bias), self.weight.dtype, few)

    def parts(self, whole: bool = True) -> list[PackedLinear]:
        """The packed matrix. whole: whether x meets its numbers in float32, or rounded to 8 bits."""
        self._check_untouched()
        found, first = [], 0
        for part in self._packed:
            last = first + part.out_features
            bias = None if self.bias is None else self.bias.detach()[first:last].float()
            found.append(replace(part, bias=bias, whole=whole and part.grouped))
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
        del self._packed, self._handles, self._absent
        self.__class__ = nn.Linear  # type: ignore[assignment]

    @property
    def formats(self) -> list[str]:
        return [part.fmt or str(part.weight.dtype).removeprefix("torch.") for part in self._packed]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Casts; a packed matrix stays as it is. It is in the CPU's format: on another device, and in a dtype that the
        kernels do not have, the matrix is unpacked."""
        like = fn(torch.empty(0, dtype=self.weight.dtype, device="cpu"))
        if like.device.type != "cpu" or like.dtype not in DTYPES:
            self.unpack()
            return nn.Module._apply(self, fn, recurse)
        if like.dtype != self.weight.dtype:
            self.weight = nn.Parameter(self.weight.to(like.dtype), requires_grad=False)
            self._note_weight()
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias.detach()), requires_grad=False)
        return self

    def _note_weight(self) -> None:
        setattr(self.weight, _BYTES, sum(part.weight.nbytes for part in self._packed))
        self._absent = [self.weight]  # in a list, or it would be a parameter

    def _check_untouched(self) -> None:
        """Raises CoreskipError where somebody gave the layer other weights, wrote to those that are not there, or wants
        to train them: nothing of it would act."""
        weight, absent = self.weight, self._absent[0]
        written = not weight.is_inference() and weight._version > 0
        if weight is not absent or written:
            raise CoreskipError(f"a packed matrix cannot be changed: {_PLAIN_WAY}")
        if weight.requires_grad and torch.is_grad_enabled():
            raise CoreskipError(f"a packed matrix cannot be trained: {_PLAIN_WAY}")


class PackedRows(nn.Embedding):
    """Embeddings of tokens whose matrix exists in packed form alone; `hold` makes one of a module that is there."""

    _packed: PackedLinear
    _handles: list[Any]

    @staticmethod
    def hold(module: nn.Embedding, packed: PackedLinear, dtype: torch.dtype) -> None:
        """Lets `module` look its rows up in a packed matrix; what its class does with them, as to scale them, stays."""
        cls = type(module)
        module.__class__ = PackedRows if cls is nn.Embedding else type(cls.__name__, (cls, PackedRows), {})
        held = cast(PackedRows, module)
        held._packed = packed
        held._stand_in(dtype)
        held._handles = _refusing(module)

    def forward(self, input: Tensor) -> Tensor:
        return self.rows(input)

    def rows(self, ids: Tensor) -> Tensor:
        """The embeddings of tokens, int64 ``[..]``, as ``[.., hidden]`` of the model's dtype, not scaled yet."""
        if self._packed.grouped:
            return cpu.rows_at(self._packed, ids, self.weight.dtype)
        return self._packed.weight[ids, : self._packed.in_features].to(self.weight.dtype)

    def _stand_in(self, dtype: torch.dtype) -> None:
        """Gives `weight` shape and dtype, and one number that is none: on the CPU, since the first parameter's device
        is taken for the model's."""
        nothing = torch.full((1, 1), torch.nan, dtype=dtype, device="cpu")
        shape = self._packed.out_features, self._packed.in_features
        self.weight = nn.Parameter(nothing.expand(shape), requires_grad=False)
        setattr(self.weight, _BYTES, self._packed.weight.nbytes)

    def part(self, whole: bool = True) -> PackedLinear:
        """The packed matrix."""
        return replace(self._packed, whole=whole)

    def unpack(self) -> None:
        """Becomes what it was, with the numbers that the packed matrix stands for."""
        shape, dtype = self.weight.shape, self.weight.dtype
        self.weight = nn.Parameter(unpack([self._packed], torch.empty(shape, dtype=dtype, device="cpu")), False)
        for handle in self._handles:
            handle.remove()
        del self._packed, self._handles
        self.__class__ = cast(Any, nn.Embedding if type(self) is PackedRows else type(self).__bases__[0])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        like = fn(torch.empty(0, dtype=self.weight.dtype, device="cpu"))
        if like.device.type != "cpu" or like.dtype not in DTYPES:
            self.unpack()
            return nn.Module._apply(self, fn, recurse)
        if like.dtype != self.weight.dtype:
            self._stand_in(like.dtype)
        buffers = self._buffers.items()
        self._buffers = {name: None if buffer is None else fn(buffer) for name, buffer in buffers}
        return self


def packed_bytes_of(weight: Tensor) -> int | None:
    """Bytes that a product of a few rows with a `PackedLayer` reads, by its `weight`; None of other weights."""
    return getattr(weight, _BYTES, None)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, of packed matrices those that they take; what modules share counts once."""
    plain = {id(p): p.nbytes for p in model.parameters() if packed_bytes_of(p) is None}
    tensors = [part.weight for _, layer in packed_layers(model) for part in layer.parts()]
    tensors += [module.part().weight for module in model.modules() if isinstance(module, PackedRows)]
    return sum(plain.values()) + sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def packed_modules(model: nn.Module) -> list[tuple[str, PackedLayer | PackedRows]]:
    """All modules that have packed matrices alone, and their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, (PackedLayer, PackedRows))]


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLayer]]:
    """A model's layers that have packed matrices alone, and their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLayer))


def refuse_resizing(*_: Any, **__: Any) -> None:
    """In place of a packed model's `resize_token_embeddings`, which would copy rows from where there are none."""
    raise CoreskipError(f"a packed model's embeddings cannot be resized: {_PLAIN_WAY}")


def _refusing(module: Any) -> list[Any]:
    """Handles of hooks by which a module's weights are neither saved nor loaded."""
    saving: Any = module.register_state_dict_pre_hook(_no_state_dict)
    return [saving, module.register_load_state_dict_pre_hook(_no_state_dict)]


def _no_state_dict(*_: Any) -> None:
    raise CoreskipError(f"cannot save or load the weights of a packed model: copy its folder, or {_PLAIN_WAY}")
