"""Models without weights, and what is put into them: packed matrices, parameters, buffers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..kernels.packed import PackedLinear
from .packed_experts import held_experts
from .packed_layer import PackedLayer, PackedRows, StandIn, packed_modules
from .weights import times


def skeleton(cls: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model of a class of transformers, in evaluation mode, whose parameters are on the meta device; what it
    computes when it is made (frequencies of rotary embeddings) is there."""
    with torch.device("cpu"), _WithoutWeights():
        model = cls._from_config(config, dtype=dtype)
    return model.eval()


class _WithoutWeights(TorchFunctionMode):
    """What is allocated without numbers, as the weights of modules are, is on the meta device. In this thread alone:
    accelerate's way exchanges a method of all modules, and threads that load at once leave it exchanged."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({**kwargs, "device": "meta"} if func is torch.empty else kwargs))


def cast_parameters(model: Any, dtype: torch.dtype) -> Any:
    """The model with parameters of `dtype`, as transformers loads one: buffers, the frequencies of rotary embeddings
    among them, stay as they are."""
    for _, module in (*packed_modules(model), *held_experts(model)):
        module._apply(lambda t: t.to(dtype))
    packed = {id(p) for p in model.parameters() if isinstance(p, StandIn)}
    for parameter in model.parameters():
        if id(parameter) not in packed and parameter.is_floating_point() and not parameter.is_meta:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def hold(model: Any, name: str, parts: list[PackedLinear], bias: Tensor | None, dtype: torch.dtype) -> None:
    """Lets the linear or embedding of this name hold its matrix packed.

    Raises:
        ValueError: the model has no such module, or one of another shape.
    """
    old = _submodule(model, name)
    shape = sum(part.out_features for part in parts), parts[0].in_features
    weight = getattr(old, "weight", None)
    if not isinstance(weight, Tensor) or tuple(weight.shape) not in (shape, shape[::-1]):
        raise ValueError(f"{times(shape)} instead of {times(getattr(weight, 'shape', ()))}")
    if isinstance(old, nn.Embedding):
        if len(parts) != 1 or tuple(weight.shape) != shape:
            raise ValueError(f"{name} is packed as embeddings are not")
        PackedRows.hold(old, parts[0], dtype)
    else:
        # in the mode of what it stands for: one that trains in a model that does not is changed whenever it is observed
        model.set_submodule(name, PackedLayer(parts, bias, dtype).train(old.training))


def put(model: Any, name: str, value: Tensor) -> None:
    """A parameter or buffer.

    Raises:
        ValueError: the model has none of this name and shape.
    """
    path, _, leaf = name.rpartition(".")
    module = _submodule(model, path)
    own: Any = module._parameters if isinstance(value, nn.Parameter) else module._buffers
    before = own.get(leaf)
    if leaf not in own:
        raise ValueError(f"the model has no place for {name}")
    if before is not None and before.shape != value.shape:
        raise ValueError(f"{times(value.shape)} instead of {times(before.shape)}")
    own[leaf] = value


def left_empty(model: Any, given: Iterable[str]) -> list[str]:
    """Names of parameters that were not given, and of what has no numbers."""
    packed = {f"{name}.{leaf}" for name, _ in packed_modules(model) for leaf in ("weight", "bias")}
    known = packed | set(given)
    named = ((name, p) for name, p in model.named_parameters() if not isinstance(p, StandIn))
    found = [name for name, _ in named if name not in known]
    return found + [name for name, buffer in model.named_buffers() if buffer.is_meta]


def unpack_modules(model: nn.Module) -> None:
    """All packed matrices become plain ones with their numbers, in the model's dtype."""
    for _, module in (*packed_modules(model), *held_experts(model)):
        module.unpack()


def _submodule(model: Any, name: str) -> nn.Module:
    try:
        return cast(nn.Module, model.get_submodule(name))
    except AttributeError:
        raise ValueError(f"the model has no {name}") from None
