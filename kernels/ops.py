"""Decode arithmetic: what each operation means, and which backend carries it out.

Every operation has a plain-torch definition here. The fast backends are registered under the names
`coreskip::mlp` and `coreskip::linear` with torch's dispatcher, which picks one by device.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import cpu
from .packed import ACTS, DTYPES, Act, PackedLinear, PackedMLP

__all__ = ["BACKENDS", "MAX_ROWS", "PackedLinear", "PackedMLP", "available", "linear", "mlp"]

BACKENDS = ("auto", "torch", "cpu")
MAX_ROWS = cpu.MAX_ROWS

log = logging.getLogger("coreskip")


def mlp(x: Tensor, packed: PackedMLP, indices: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """The MLP of `packed` over all neurons, or over those in `indices` alone.

    x: [..., hidden_size] of float32, bfloat16 or float16; the result has its shape and dtype.
    indices: integers, [k] for all rows alike or [R, k] with one list per row of x.reshape(R, hidden_size);
    distinct within a list, in any order; -1 stands for no neuron, so that lists can be padded.
    backend: "auto" takes the fast kernel of x's device for up to 8 rows and torch otherwise; "torch" and "cpu"
    take that one or raise.
    Raises ValueError where shapes or devices do not fit or where a named backend cannot do this call,
    RuntimeError where it is not installed, IndexError for an index out of range.
    """
    _check_input(x, packed.hidden_size, packed.weight)
    rows = x.numel() // packed.hidden_size
    if indices is not None:
        _check_indices(indices, rows, x.device)
    if _choose(backend, x, rows, packed.act) == "torch":
        return _mlp_torch(x, *_fields(packed), indices, packed.hidden_size, packed.act)
    result: Tensor = torch.ops.coreskip.mlp(x, *_fields(packed), indices, packed.hidden_size, packed.act)
    return result


def linear(x: Tensor, packed: PackedLinear, *, backend: str = "auto") -> Tensor:
    """x @ weight.t() + bias.

    x: [..., in_features] of float32, bfloat16 or float16; the result is [..., out_features] of the same dtype.
    backend and errors: as for `mlp`.
    """
    _check_input(x, packed.in_features, packed.weight)
    rows = x.numel() // packed.in_features
    if _choose(backend, x, rows, "silu") == "torch":
        return _linear_torch(x, packed.weight, packed.bias, packed.in_features)
    result: Tensor = torch.ops.coreskip.linear(x, packed.weight, packed.bias, packed.in_features)
    return result


def available(backend: str) -> str | None:
    """None where a backend can be used, else the reason why not."""
    if backend not in BACKENDS:
        return f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}"
    try:
        if backend == "cpu":
            cpu.library()
    except cpu.Unavailable as error:
        return str(error)
    return None


# ---- the choice of a backend ----


def _choose(backend: str, x: Tensor, rows: int, act: Act) -> str:
    """Returns "torch" or "op". Only a call under "auto" may end up elsewhere than asked for."""
    if backend == "torch":
        return "torch"
    if backend == "auto":
        return "torch" if _refusal(x, rows, act) else "op"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    reason = available(backend)
    if reason:
        raise RuntimeError(f"backend {backend!r}: {reason}")
    reason = _refusal(x, rows, act) or (f"x is on {x.device.type}" if x.device.type != backend else None)
    if reason:
        raise ValueError(f"backend {backend!r} cannot do this call: {reason}")
    return "op"


def _refusal(x: Tensor, rows: int, act: Act) -> str | None:
    if rows > MAX_ROWS or rows == 0:
        return f"x has {rows} rows, not 1 to {MAX_ROWS}"
    if not isinstance(act, str):
        return "the activation is a callable"
    if x.requires_grad and torch.is_grad_enabled():
        return "x requires a gradient"
    return None


def _check_input(x: Tensor, width: int, weight: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(f"x must be [..., {width}], not {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float32, bfloat16 or float16, not {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, the weights are on {weight.device}")


def _check_indices(indices: Tensor, rows: int, device: torch.device) -> None:
    if indices.dtype.is_floating_point or indices.dtype is torch.bool:
        raise ValueError(f"indices must be integers, not {indices.dtype}")
    if indices.dim() not in (1, 2) or (indices.dim() == 2 and indices.shape[0] != rows):
        raise ValueError(f"indices must be [k] or [{rows}, k], not {tuple(indices.shape)}")
    if indices.device != device:
        raise ValueError(f"indices are on {indices.device}, x is on {device}")


# ---- the definitions in plain torch ----

_Fields = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def _fields(packed: PackedMLP) -> _Fields:
    return packed.weight, packed.gate_bias, packed.up_bias, packed.down_bias


def _mlp_torch(
    x: Tensor,
    weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    indices: Tensor | None,
    hidden: int,
    act: Act,
) -> Tensor:
    # Matrix products in the wider of the two dtypes, over views of the packed rows: torch's GEMM takes their
    # stride as it is, so that prefill through packed weights copies nothing.
    dtype = torch.promote_types(x.dtype, weight.dtype)
    rows = x.reshape(-1, hidden).to(dtype)
    shared = indices is not None and indices.dim() == 1
    if indices is not None and shared:
        _check_range(indices, weight.shape[0])
        listed = indices[indices >= 0].long()
        weight = weight.index_select(0, listed)
        gate_bias, up_bias = (None if b is None else b.index_select(0, listed) for b in (gate_bias, up_bias))
    weight = weight.to(dtype)
    biases = [None if bias is None else bias.to(dtype) for bias in (gate_bias, up_bias, down_bias)]
    up = F.linear(rows, weight[:, -2, :hidden], biases[1])
    function = ACTS[act] if isinstance(act, str) else act
    h = function(up) if weight.shape[1] == 2 else function(F.linear(rows, weight[:, 0, :hidden], biases[0])) * up
    if indices is not None and not shared:
        h = torch.where(_wanted(indices, weight.shape[0]), h, 0)
    y = torch.matmul(h, weight[:, -1, :hidden])
    return (y if biases[2] is None else y + biases[2]).to(x.dtype).reshape(x.shape)


def _wanted(indices: Tensor, neurons: int) -> Tensor:
    """[R, neurons] of bool: which row lists which neuron."""
    _check_range(indices, neurons)
    table = indices.new_zeros((indices.shape[0], neurons + 1), dtype=torch.bool)
    table.scatter_(1, indices.long().remainder(neurons + 1), True)  # -1 falls into the extra column
    return table[:, :neurons]


def _check_range(indices: Tensor, neurons: int) -> None:
    if indices.numel() and (int(indices.min()) < -1 or int(indices.max()) >= neurons):
        raise IndexError(f"indices must be -1 (nothing) or in [0, {neurons})")


def _linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None, in_features: int) -> Tensor:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    bias = None if bias is None else bias.to(dtype)
    return F.linear(x.to(dtype), weight[:, :in_features].to(dtype), bias).to(x.dtype)


# ---- registration ----

_Library: Any = torch.library.Library  # torch leaves it without types
_lib = _Library("coreskip", "DEF")
_lib.define(
    "mlp(Tensor x, Tensor weight, Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, Tensor? indices, "
    "int hidden, str act) -> Tensor"
)
_lib.define("linear(Tensor x, Tensor weight, Tensor? bias, int in_features) -> Tensor")


@cache
def _usable(backend: str) -> bool:
    reason = available(backend)
    if reason:
        log.warning("decoding with plain torch instead of the %s kernels: %s", backend, reason)
    return reason is None


def _mlp_cpu(*arguments: Any) -> Tensor:
    return cpu.mlp(*arguments) if _usable("cpu") else _mlp_torch(*arguments)


def _linear_cpu(*arguments: Any) -> Tensor:
    return cpu.linear(*arguments) if _usable("cpu") else _linear_torch(*arguments)


_lib.impl("mlp", _mlp_torch, "CompositeExplicitAutograd")
_lib.impl("linear", _linear_torch, "CompositeExplicitAutograd")
_lib.impl("mlp", _mlp_cpu, "CPU")
_lib.impl("linear", _linear_cpu, "CPU")


def _mlp_fake(
    x: Tensor,
    weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    indices: Tensor | None,
    hidden: int,
    act: str,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, in_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


torch.library.register_fake("coreskip::mlp", _mlp_fake, lib=_lib)
torch.library.register_fake("coreskip::linear", _linear_fake, lib=_lib)
