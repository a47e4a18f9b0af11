"""Weights in the order in which decoding reads them.

An MLP is packed by neuron: the gate, up and down rows of one neuron lie side by side, so that leaving a neuron
out leaves one contiguous run of bytes unread. Rows are padded with zeros to a multiple of 128 bytes.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

PAD = 128  # bytes to whose multiples a row is padded; kPad in cpu.h
HUGE_PAGE = 2 << 20
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Act = str | Callable[[Tensor], Tensor]


def padded(width: int, dtype: torch.dtype) -> int:
    """The number of elements in a packed row of `width` elements."""
    run = PAD // dtype.itemsize
    return -(-width // run) * run


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor; on a CPU it starts on a huge page, where the system has them.

    Scattered bundles miss the TLB on 4 KiB pages: a page holds less than one fp32 bundle of the smallest model.
    """
    nbytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes == 0:
        return torch.empty(shape, dtype=dtype, device=device)
    if not hasattr(mmap, "MADV_HUGEPAGE") or nbytes < HUGE_PAGE:
        memory = torch.empty(nbytes + PAD, dtype=torch.uint8)
        start = -memory.data_ptr() % PAD
    else:
        region = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        region.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(region, dtype=torch.uint8)
        start = -memory.data_ptr() % HUGE_PAGE
    return memory[start : start + nbytes].view(dtype).view(shape)


@dataclass(frozen=True, eq=False, repr=False)
class PackedMLP:
    """One layer's MLP: down(act(gate(x)) * up(x)), or down(act(up(x))) where there is no gate.

    `weight` is [intermediate_size, parts, stride], parts being (gate,) up, down. The biases are float32.
    Made by `pack`, never changed afterwards.
    """

    weight: Tensor
    hidden_size: int
    act: Act
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def pack(
        cls,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        *,
        act: Act,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        indices: Tensor | None = None,
        fmt: str | None = None,
    ) -> PackedMLP:
        """Copies the weights, or those of the neurons in `indices` alone, into the packed layout.

        gate, up, down: [I, d] each, one row per neuron (for `nn.Linear` down projections pass `weight.t()`), any
        strides, all of one dtype: float32, bfloat16 or float16. gate is None for a plain MLP.
        act: "silu", "gelu", "gelu_tanh", "relu", "relu2", or a callable, which only the torch backend runs.
        gate_bias, up_bias: [I]; down_bias: [d]. indices: [k] of int64, distinct. fmt: None keeps the dtype.
        Raises ValueError where shapes or names do not fit, TypeError for another dtype.
        """
        parts = [up, down] if gate is None else [gate, up, down]
        _check_parts(parts, act, fmt)
        _check_biases(up, gate is not None, gate_bias, up_bias, down_bias)
        neurons = up.shape[0] if indices is None else indices.numel()
        width = up.shape[1]
        stride = padded(width, up.dtype)
        weight = allocate((neurons, len(parts), stride), up.dtype, up.device)
        for part, rows in enumerate(parts):
            weight[:, part, :width] = _rows(rows, indices)
        weight[:, :, width:] = 0
        return cls(
            weight=weight,
            hidden_size=width,
            act=act,
            gate_bias=_bias(gate_bias, indices),
            up_bias=_bias(up_bias, indices),
            down_bias=_bias(down_bias, None),
        )

    @torch.no_grad()
    def take(self, indices: Tensor) -> PackedMLP:
        """The same MLP with the neurons in `indices` ([k] of int64) alone, copied side by side.

        Bundles are copied whole, which is faster than packing a slice of the original weights again.
        """
        shape = (indices.numel(), *self.weight.shape[1:])
        weight = allocate(shape, self.weight.dtype, self.weight.device)
        torch.index_select(self.weight, 0, indices, out=weight)
        return PackedMLP(
            weight=weight,
            hidden_size=self.hidden_size,
            act=self.act,
            gate_bias=_bias(self.gate_bias, indices),
            up_bias=_bias(self.up_bias, indices),
            down_bias=self.down_bias,
        )

    @property
    def intermediate_size(self) -> int:
        return self.weight.shape[0]

    @property
    def gated(self) -> bool:
        return self.weight.shape[1] == 3

    @property
    def nbytes(self) -> int:
        """Bytes of memory in use, padding and biases included."""
        return sum(t.nbytes for t in (self.weight, self.gate_bias, self.up_bias, self.down_bias) if t is not None)

    def __repr__(self) -> str:
        shape = f"{self.hidden_size}x{self.intermediate_size}"
        dtype = str(self.weight.dtype).removeprefix("torch.")
        return f"PackedMLP({shape}, {dtype}, act={self.act}, gated={self.gated})"


@dataclass(frozen=True, eq=False, repr=False)
class PackedLinear:
    """A linear layer's weight, [out_features, stride], and its bias as float32 or None. Made by `pack`."""

    weight: Tensor
    in_features: int
    bias: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def pack(cls, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
        """weight: [out_features, in_features] of float32, bfloat16 or float16; bias: [out_features] or None.

        Rows that need no padding are shared with `weight`, anything else is copied.
        Raises ValueError where shapes do not fit, TypeError for another dtype.
        """
        _check_dtype(weight)
        if weight.dim() != 2:
            raise ValueError(f"weight must be [out_features, in_features], not {tuple(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape {tuple(weight.shape[:1])}, not {tuple(bias.shape)}")
        width = weight.shape[1]
        rows = weight.detach()
        if not (rows.is_contiguous() and padded(width, rows.dtype) == width):
            rows = allocate((weight.shape[0], padded(width, weight.dtype)), weight.dtype, weight.device)
            rows[:, :width] = weight
            rows[:, width:] = 0
        return cls(weight=rows, in_features=width, bias=_bias(bias, None))

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __repr__(self) -> str:
        dtype = str(self.weight.dtype).removeprefix("torch.")
        return f"PackedLinear({self.in_features} -> {self.out_features}, {dtype}, bias={self.bias is not None})"


def _rows(weight: Tensor, indices: Tensor | None) -> Tensor:
    if indices is None:
        return weight
    if weight.is_contiguous():
        return weight.index_select(0, indices)
    # A transposed view: picking columns of what lies in memory row by row is several times faster.
    return weight.t().index_select(1, indices).t()


def _bias(bias: Tensor | None, indices: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    bias = bias.detach() if indices is None else bias.detach().index_select(0, indices)
    return bias.to(torch.float32, copy=True).contiguous()


def _check_dtype(weight: Tensor) -> None:
    if weight.dtype not in DTYPES:
        raise TypeError(f"weights must be float32, bfloat16 or float16, not {weight.dtype}")


def _check_parts(parts: list[Tensor], act: Act, fmt: str | None) -> None:
    for part in parts:
        _check_dtype(part)
        if part.dim() != 2 or part.shape != parts[0].shape or part.dtype != parts[0].dtype:
            found = ", ".join(f"{tuple(p.shape)} {p.dtype}" for p in parts)
            raise ValueError(f"gate, up and down must be [intermediate, hidden] of one dtype, not {found}")
    if isinstance(act, str) and act not in ACTS:
        raise ValueError(f"act must be a callable or one of {', '.join(ACTS)}, not {act!r}")
    if fmt is not None:
        raise ValueError(f"fmt must be None, not {fmt!r}")


def _check_biases(up: Tensor, gated: bool, gate: Tensor | None, up_bias: Tensor | None, down: Tensor | None) -> None:
    if gate is not None and not gated:
        raise ValueError("gate_bias given without a gate")
    for name, bias, size in (("gate", gate, up.shape[0]), ("up", up_bias, up.shape[0]), ("down", down, up.shape[1])):
        if bias is not None and bias.shape != (size,):
            raise ValueError(f"{name}_bias must have shape ({size},), not {tuple(bias.shape)}")


# The order is that of the Act enum in cpu.h.
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "relu2": lambda x: torch.nn.functional.relu(x).square(),
}
