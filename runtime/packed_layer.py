"""Linear layers whose matrices exist in packed form alone, as a packed model has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels import cpu
from ..kernels.packed import DTYPES, PackedLinear
from ..predictors.errors import CoreskipError
from .unpacking import shared, unpack

_PLAIN_WAY = "load the model with packed=False"


#: Functions of torch, by name, that read a matrix's numbers.
_COMPUTING = frozenset((
    "linear", "matmul", "mm", "mv", "bmm", "addmm", "addmv", "baddbmm", "einsum", "tensordot", "dot", "embedding",
    "conv1d", "add", "sub", "mul", "div", "rsub", "neg", "exp", "abs", "sum", "mean", "norm", "stack", "cat",
    "__matmul__", "__rmatmul__", "__rsub__", "__rdiv__", "__rpow__",
))  # fmt: skip


class StandIn(nn.Parameter):
    """In place of a matrix that exists in packed form alone: its shape and dtype, and no numbers. Copies of it, pickled
    ones, too, take no more memory than it does.

    Attributes:
        packed_bytes: bytes that a product of a few rows with the packed matrix reads.
    """

    packed_bytes: int

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuses to compute: products with a tensor that has no numbers gave garbage, and no error."""
        if getattr(func, "__name__", "") in _COMPUTING:
            raise RuntimeError(
                "this matrix exists in packed form alone, and a module computes with it itself: load the model with "
                "packed=False"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: torch.dtype, packed_bytes: int, device: str) -> StandIn:
        """device: "meta", or "cpu", where it is one number that is none."""
        if device == "meta":
            data = torch.empty(shape, dtype=dtype, device="meta")
        else:
            data = torch.full((1, 1), torch.nan, dtype=dtype, device="cpu").expand(shape)
        made = cls(data, requires_grad=False)
        made.packed_bytes = packed_bytes
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> StandIn:
        if id(self) not in memo:
            memo[id(self)] = self._again().requires_grad_(self.requires_grad)
        return cast(StandIn, memo[id(self)])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return StandIn.of, (tuple(self.shape), self.dtype, self.packed_bytes, self.device.type)

    def _again(self) -> StandIn:
        return StandIn.of(tuple(self.shape), self.dtype, self.packed_bytes, self.device.type)


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
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._packed = list(parts)
        self._stand_in(dtype)
        self._handles = refusing(self)

    def forward(self, input: Tensor) -> Tensor:
        return self.multiply(input, few=False)

    def multiply(self, x: Tensor, few: bool) -> Tensor:
        """x ``[..., inputs]`` times the matrix; see `Unpacking.multiply`."""
        return shared.multiply(x, self.parts(), cast("Tensor | None", self.bias), self.weight.dtype, few)

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
            self._stand_in(like.dtype)
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias.detach()), requires_grad=False)
        return self

    def _stand_in(self, dtype: torch.dtype) -> None:
        nbytes = sum(part.weight.nbytes for part in self._packed)
        self.weight = StandIn.of((self.out_features, self.in_features), dtype, nbytes, "meta")
        self._absent = [self.weight]  # in a list, or it would be a parameter

    def _check_untouched(self) -> None:
        check_untouched(self.weight, self._absent[0])


def check_untouched(weight: Tensor | None, absent: StandIn) -> None:
    """Raises CoreskipError where somebody gave a module another weight than what stands for its packed one, wrote to
    what is not there, or wants to train it: nothing of it would act."""
    written = weight is absent and not weight.is_inference() and weight._version > 0
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
        module.__class__ = _class_of_rows(type(module))
        held = cast(PackedRows, module)
        held._packed = packed
        held._stand_in(dtype)
        held._handles = refusing(module)

    def forward(self, input: Tensor) -> Tensor:
        return self.rows(input)

    def rows(self, ids: Tensor) -> Tensor:
        """The embeddings of tokens, int64 ``[..]``, as ``[.., hidden]`` of the model's dtype, not scaled yet."""
        if self._packed.grouped:
            return cpu.rows_at(self._packed, ids, self.weight.dtype)
        return self._packed.weight[ids, : self._packed.in_features].to(self.weight.dtype)

    def _stand_in(self, dtype: torch.dtype) -> None:
        """On the CPU, since the first parameter's device is taken for the model's."""
        shape = self._packed.out_features, self._packed.in_features
        self.weight = StandIn.of(shape, dtype, self._packed.weight.nbytes, "cpu")

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
        self.__class__ = cast(Any, self._plain_class)

    @property
    def _plain_class(self) -> type[nn.Embedding]:
        return nn.Embedding if type(self) is PackedRows else cast(Any, type(self).__bases__[0])

    def __reduce_ex__(
        self, protocol: Any
    ) -> Any:  # the class itself may have been made here, where pickle looks for none
        return _blank_rows, (self._plain_class,), self.__dict__

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


_classes_of_rows: dict[type[nn.Module], type[PackedRows]] = {nn.Embedding: PackedRows}


def _class_of_rows(plain: type[nn.Embedding]) -> type[PackedRows]:
    """The class of packed embeddings that do else what those of `plain` do."""
    if plain not in _classes_of_rows:
        _classes_of_rows[plain] = type(plain.__name__, (plain, PackedRows), {})
    return _classes_of_rows[plain]


def _blank_rows(plain: type[nn.Embedding]) -> PackedRows:
    cls = _class_of_rows(plain)
    return cls.__new__(cls)


def packed_bytes_of(weight: Tensor) -> int | None:
    """Bytes that a product of a few rows with a `PackedLayer` reads, by its `weight`; None of other weights."""
    return weight.packed_bytes if isinstance(weight, StandIn) else None


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, of packed matrices those that they take; what modules share counts once."""
    plain = {id(p): p.nbytes for p in model.parameters() if packed_bytes_of(p) is None}
    plain |= {id(p): p.packed_bytes for p in model.parameters() if isinstance(p, StandIn) and p.ndim == 3}  # experts'
    tensors = [part.weight for _, layer in packed_layers(model) for part in layer.parts()]
    tensors += [module.part().weight for module in model.modules() if isinstance(module, PackedRows)]
    return sum(plain.values()) + sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def packed_modules(model: nn.Module) -> list[tuple[str, PackedLayer | PackedRows]]:
    """All modules that have packed matrices alone, and their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, (PackedLayer, PackedRows))]


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLayer]]:
    """A model's layers that have packed matrices alone, and their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLayer))


def prepare(model: Any) -> None:
    """What a packed model does otherwise than one of transformers."""
    model.resize_token_embeddings = refuse_resizing
    model.get_memory_footprint = partial(_footprint, model)


def _footprint(model: nn.Module, return_buffers: bool = True) -> int:
    """In place of `get_memory_footprint`, which would count the numbers that matrices stand for."""
    return weight_bytes(model) + (sum(buffer.nbytes for buffer in model.buffers()) if return_buffers else 0)


def refuse_resizing(*_: Any, **__: Any) -> None:
    """In place of a packed model's `resize_token_embeddings`, which would copy rows from where there are none."""
    raise CoreskipError(f"a packed model's embeddings cannot be resized: {_PLAIN_WAY}")


def refusing(module: Any) -> list[Any]:
    """Handles of hooks by which a module's weights are neither saved nor loaded."""
    saving: Any = module.register_state_dict_pre_hook(_no_state_dict)
    return [saving, module.register_load_state_dict_pre_hook(_no_state_dict)]


def _no_state_dict(*_: Any) -> None:
    raise CoreskipError(f"cannot save or load the weights of a packed model: copy its folder, or {_PLAIN_WAY}")
