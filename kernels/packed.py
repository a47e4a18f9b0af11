"""Weights in the order in which decoding reads them.

An MLP is packed by neuron: the gate, up and down rows of one neuron lie side by side, so that leaving a neuron
out leaves one contiguous run of bytes unread. Rows are padded with zeros to whole cache lines or pairs of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .groups import BY_BYTES, GROUP, GROUPED, TILE, tile_up
from .groups import FORMATS as TILE_FORMATS
from .memory import LINE, allocate

PAD = 128  # bytes, or nibbles, to whose multiples any other row is padded; kPad in csrc/formats.h
#: forms that may hold the numbers of a float32 matrix, and bytes a number, with its share of the ends of a group
EXACT_BYTES = {
    **{fmt: TILE_FORMATS[fmt].tile_bytes / (TILE * GROUP) for fmt in GROUPED},
    "bfloat16": 2.0,
    "float16": 2.0,
}
_AT_ONCE = 2048  # rows that are looked at together
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (None, "int8", "int8_sliced")
MAX_INT8_WIDTH = (2**31 - 1) // (255 * 127)  # beyond it a row of products could overflow 32 bits

Act = str | Callable[[Tensor], Tensor]


def padded(width: int, dtype: torch.dtype) -> int:
    """The number of elements in a packed row of `width` elements."""
    run = PAD // dtype.itemsize
    return -(-width // run) * run


@dataclass(frozen=True, eq=False, repr=False)
class PackedMLP:
    """One layer's MLP: down(act(gate(x)) * up(x)), or down(act(up(x))) where there is no gate.

    `weight` is [intermediate_size, parts, stride], parts being (gate,) up, down. In "int8" it holds bytes and a weight
    is scale[neuron, part] * (byte - 128). In "int8_sliced" the bytes of gate and up lie in two planes of nibbles,
    byte = 16 * high + low: `weight` is the high plane, [intermediate_size, (gate,) up, stride / 2], and `low` has the
    low plane and the bytes of the down row side by side. Biases, scales, norms and means are float32.
    With `mean`, a neuron that is left out counts as its mean: y = down_bias + sum of (a_i - mean_i) * down_i over those
    computed, where `down_bias` already holds the sum of mean_i * down_i over all neurons.
    Made by `pack`, never changed afterwards.
    """

    weight: Tensor
    hidden_size: int
    gated: bool
    act: Act
    low: Tensor | None = None
    scale: Tensor | None = None
    norm: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    mean: Tensor | None = None

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
        gate_bias, up_bias: [I]; down_bias: [d]. indices: [k] of int64, distinct.
        fmt: None keeps the dtype; "int8" and "int8_sliced" round every row to 255 steps: the originals cannot be had
        back from them, who needs them keeps them.
        Raises ValueError where shapes or names do not fit, TypeError for another dtype.
        """
        parts = [up, down] if gate is None else [gate, up, down]
        _check_parts(parts, act, fmt)
        _check_biases(up, gate is not None, gate_bias, up_bias, down_bias)
        rows = [part.detach() if indices is None else _rows(part.detach(), indices) for part in parts]
        sliced = fmt == "int8_sliced"
        weight, low, scale = _pack_floats(rows) if fmt is None else _pack_bytes(rows, sliced=sliced)
        return cls(
            weight=weight,
            hidden_size=up.shape[1],
            gated=gate is not None,
            act=act,
            low=low,
            scale=scale,
            norm=rows[-1].float().norm(dim=1) if sliced else None,
            gate_bias=_floats(gate_bias, indices),
            up_bias=_floats(up_bias, indices),
            down_bias=_floats(down_bias, None),
        )

    @torch.no_grad()
    def compensated(self, mean: Tensor) -> PackedMLP:
        """The same MLP, in which every neuron that is left out counts as its `mean` activation, [intermediate_size].

        Nothing but the down projection's bias and the means is new; the weights are shared.
        Raises ValueError for means of another shape, or where there are means already.
        """
        return replace(self, **means_of(self, mean))

    def down_rows(self) -> Tensor:
        """The down projection as it is computed with, float32 [intermediate_size, hidden_size]."""
        rows = self.weight[:, -1] if self.low is None else self.low[:, -2 * self.weight.shape[2] :]
        rows = rows[:, : self.hidden_size].float()
        return rows if self.scale is None else (rows - 128) * self.scale[:, -1:]

    @torch.no_grad()
    def take(self, indices: Tensor) -> PackedMLP:
        """The same MLP with the neurons in `indices` ([k] of int64) alone, copied side by side.

        Bundles are copied whole, which is faster than packing a slice of the original weights again.
        """
        return replace(
            self,
            weight=_take(self.weight, indices),
            low=None if self.low is None else _take(self.low, indices),
            scale=_floats(self.scale, indices),
            norm=_floats(self.norm, indices),
            gate_bias=_floats(self.gate_bias, indices),
            up_bias=_floats(self.up_bias, indices),
            mean=_floats(self.mean, indices),
        )

    @property
    def intermediate_size(self) -> int:
        return self.weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def fmt(self) -> str | None:
        """None, "int8" or "int8_sliced"."""
        return None if self.scale is None else "int8" if self.low is None else "int8_sliced"

    @property
    def nbytes(self) -> int:
        """Bytes of memory in use, padding, scales and biases included."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    def __repr__(self) -> str:
        shape = f"{self.hidden_size}x{self.intermediate_size}"
        fmt = self.fmt or str(self.weight.dtype).removeprefix("torch.")
        return f"PackedMLP({shape}, {fmt}, act={self.act}, gated={self.gated})"


@dataclass(frozen=True, eq=False, repr=False)
class PackedLinear:
    """A linear layer's weight, [out_features, stride], and its bias as float32 or None. Made by `pack`.

    In "int8" the weight holds bytes and stands for scale[out_feature] * (byte - 128). In the formats of groups.py it is
    [ceil(out_features / 16), blocks, bytes] of uint8: tiles of 16 rows by 32 inputs, or by blocks of 256. Among them
    are "int4", w = scale * q + least with q in 0..15, 320 bytes a tile (llama.cpp calls these numbers Q4_1), and
    "int8_groups", w = scale * (byte - 128), 544 bytes a tile (Q8_0). With all of them x is rounded to 8 bits in groups
    of 32 or, where `whole`, stays as it is, and is multiplied with just these numbers in float32.

    counts: of "int4" of which some inputs are left, uint8 [groups]: how many of each group; the weight is then [tiles,
    bytes of a tile], and what it gives is what the whole matrix gives where the others are zero, to the bit
    (`taken.some`).
    """

    weight: Tensor
    in_features: int
    scale: Tensor | None = None
    bias: Tensor | None = None
    rows: int | None = None  # of tiles, the last of which may be filled up
    whole: bool = False
    counts: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def pack(cls, weight: Tensor, bias: Tensor | None = None, *, fmt: str | None = None) -> PackedLinear:
        """weight: [out_features, in_features] of float32, bfloat16 or float16; bias: [out_features] or None.

        fmt: None, "int8", "int8_groups" or "int4". With None, rows that need no padding are shared with `weight`,
        anything else is copied. The groups lose nothing where the weights are such numbers already, as in a model
        loaded from a file of them.
        Raises ValueError where shapes or names do not fit, TypeError for another dtype.
        """
        _check_dtype(weight)
        if weight.dim() != 2:
            raise ValueError(f"weight must be [out_features, in_features], not {tuple(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape {tuple(weight.shape[:1])}, not {tuple(bias.shape)}")
        if fmt not in (None, "int8", *GROUPED):
            raise ValueError(f"fmt must be None, 'int8', {', '.join(map(repr, GROUPED))}, not {fmt!r}")
        rows, scale = weight.detach(), None
        if fmt in GROUPED:
            return cls(_tiles(rows, fmt), weight.shape[1], bias=_floats(bias, None), rows=weight.shape[0])
        if fmt == "int8":
            packed, _, scales = _pack_bytes([rows], sliced=False)
            rows, scale = packed[:, 0], scales[:, 0].contiguous()
        elif not (rows.stride(1) == 1 and padded(rows.shape[1], rows.dtype) == rows.shape[1] == rows.stride(0)):
            rows = _pack_floats([rows])[0][:, 0]
        return cls(weight=rows, in_features=weight.shape[1], scale=scale, bias=_floats(bias, None))

    def part(self, first: int, count: int) -> PackedLinear | None:
        """Rows `first` to `first + count` as a view; None where they begin or end within a tile that others share."""
        last, bias = first + count, self.bias
        if bias is not None:
            bias = bias[first:last]
        if self.rows is None:
            scale = None if self.scale is None else self.scale[first:last]
            return replace(self, weight=self.weight[first:last], scale=scale, bias=bias)
        if first % TILE or (last % TILE and last != self.rows):
            return None
        return replace(self, weight=self.weight[first // TILE : -(-last // TILE)], bias=bias, rows=count)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0] if self.rows is None else self.rows

    @property
    def stride(self) -> int:
        """Inputs of one row with its padding."""
        if self.rows is None:
            return self.weight.stride(0)
        if self.counts is not None:
            return self.counts.numel() * GROUP
        return self.weight.shape[1] * GROUP * TILE_FORMATS[BY_BYTES[self.weight.shape[2]]].groups

    @property
    def fmt(self) -> str | None:
        """None, "int8", or the name of one of groups.py."""
        if self.grouped:
            return "int4" if self.counts is not None else BY_BYTES[self.weight.shape[2]]
        return None if self.scale is None else "int8"

    @property
    def code(self) -> int:
        """Of a format of groups, that of csrc/formats.h."""
        return TILE_FORMATS[self.fmt or ""].code

    @property
    def tile(self) -> int:
        """Bytes of a tile of 16 rows."""
        return self.weight.stride(0)

    def in_groups(self, x: Tensor) -> Tensor:
        """The inputs x ``[..., in_features]`` where the numbers of their groups are, `counts` of each, zeros elsewhere:
        ``[..., stride]``. The j-th of a group is where a line of a tile has it, see csrc/vector/take.h."""
        assert self.counts is not None
        counts = self.counts.to(torch.int64)
        group = torch.arange(counts.numel(), device=x.device).repeat_interleave(counts)
        j = torch.arange(self.in_features, device=x.device) - (counts.cumsum(0) - counts)[group]
        spread = x.new_zeros((*x.shape[:-1], self.stride))
        spread[..., group * GROUP + j % 4 + j // 8 * 4 + j // 4 % 2 * (GROUP // 2)] = x
        return spread

    def whole_groups(self) -> PackedLinear:
        """The same matrix for what `in_groups` gives, with any numbers in place of those that are not there."""
        assert self.counts is not None
        form, at = TILE_FORMATS["int4"], 0
        tiles = self.weight.new_zeros((self.weight.shape[0], self.counts.numel(), form.tile_bytes))
        for group, count in enumerate(self.counts.tolist()):
            numbers, ends = -(-count // 8) * LINE, form.tile_bytes - form.numbers if count else 0
            tiles[:, group, :numbers] = self.weight[:, at : at + numbers]
            tiles[:, group, form.numbers : form.numbers + ends] = self.weight[:, at + numbers : at + numbers + ends]
            at += numbers + ends
        return replace(self, weight=tiles, in_features=self.stride, counts=None)

    @property
    def grouped(self) -> bool:
        return self.rows is not None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.weight, self.scale, self.bias, self.counts) if t is not None)

    def __repr__(self) -> str:
        fmt = self.fmt or str(self.weight.dtype).removeprefix("torch.")
        return f"PackedLinear({self.in_features} -> {self.out_features}, {fmt}, bias={self.bias is not None})"


@dataclass(frozen=True, eq=False, repr=False)
class PackedColumns:
    """A linear layer's weight by column, [in_features, stride], for inputs of which many may be left out.

    `norm` is the length of each column, [in_features]; it and the bias are float32. Made by `pack`.
    """

    weight: Tensor
    out_features: int
    norm: Tensor
    bias: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def pack(cls, weight: Tensor, bias: Tensor | None = None) -> PackedColumns:
        """Copies weight, [out_features, in_features] of float32, bfloat16 or float16; bias: [out_features] or None.

        Raises ValueError where shapes do not fit, TypeError for another dtype.
        """
        _check_dtype(weight)
        if weight.dim() != 2:
            raise ValueError(f"weight must be [out_features, in_features], not {tuple(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape {tuple(weight.shape[:1])}, not {tuple(bias.shape)}")
        columns = _pack_floats([weight.detach().t()])[0][:, 0]
        norm = weight.detach().float().norm(dim=0)
        return cls(weight=columns, out_features=weight.shape[0], norm=norm, bias=_floats(bias, None))

    @torch.no_grad()
    def part(self, first: int, count: int) -> PackedColumns:
        """`count` outputs from `first` on, with the norms of the whole columns: a view, where what follows in a row,
        other outputs or padding, reaches as far as padding of its own would."""
        columns = self.weight[:, first:]
        if columns.shape[1] < padded(count, columns.dtype):
            columns = _pack_floats([columns[:, :count]])[0][:, 0]
        bias = None if self.bias is None else self.bias[first : first + count]
        return PackedColumns(columns, count, self.norm, bias)

    @property
    def in_features(self) -> int:
        return self.weight.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.weight, self.norm, self.bias) if t is not None)

    def __repr__(self) -> str:
        dtype = str(self.weight.dtype).removeprefix("torch.")
        return f"PackedColumns({self.in_features} -> {self.out_features}, {dtype}, bias={self.bias is not None})"


class LeavesOut(Protocol):
    """What `means_of` reads of an MLP that leaves neurons out."""

    @property
    def intermediate_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def mean(self) -> Tensor | None: ...

    @property
    def down_bias(self) -> Tensor | None: ...

    def down_rows(self) -> Tensor: ...


def means_of(packed: LeavesOut, mean: Tensor) -> dict[str, Any]:
    """What is new where every neuron that is left out counts as its `mean`: see `PackedMLP.compensated`."""
    if packed.mean is not None or mean.shape != (packed.intermediate_size,):
        raise ValueError(f"mean must be given once, as [{packed.intermediate_size}], not {tuple(mean.shape)}")
    mean = mean.to(packed.device, torch.float32).contiguous()
    constant = mean @ packed.down_rows()
    return {"mean": mean, "down_bias": constant if packed.down_bias is None else packed.down_bias + constant}


# ---- packing ----


def _pack_floats(parts: list[Tensor]) -> tuple[Tensor, None, None]:
    neurons, width = parts[0].shape
    dtype, device = parts[0].dtype, parts[0].device
    weight = allocate((neurons, len(parts), padded(width, dtype)), dtype, device)
    for part, rows in enumerate(parts):
        weight[:, part, :width] = rows
    weight[:, :, width:] = 0
    return weight, None, None


def _pack_bytes(parts: list[Tensor], *, sliced: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns (weight, low or None, scale): the rows of all parts as bytes, in one tensor or in two planes."""
    neurons, width = parts[0].shape
    stride = padded(width, torch.uint8) if sliced else -(-width // LINE) * LINE
    integers, scales = zip(*(quantize(rows.float()) for rows in parts), strict=True)
    rows = torch.nn.functional.pad(torch.stack(integers, 1) + 128, (0, stride - width), value=128).to(torch.uint8)
    scale = torch.stack(scales, 1).contiguous()
    device = parts[0].device
    if not sliced:
        return allocate(tuple(rows.shape), torch.uint8, device).copy_(rows), None, scale
    low = allocate((neurons, (len(parts) + 1) * stride // 2), torch.uint8, device)
    low[:, :-stride] = nibbles_of(rows[:, :-1] & 15).flatten(1)
    low[:, -stride:] = rows[:, -1]
    high = nibbles_of(rows[:, :-1] >> 4)
    return allocate(tuple(high.shape), torch.uint8, device).copy_(high), low, scale


def finite(weight: Tensor) -> bool:
    """Whether every number is, looked at a few rows at a time: torch makes two copies of what it is asked about."""
    return all(bool(rows.isfinite().all()) for rows in weight.split(_AT_ONCE))


def _tiles(weight: Tensor, fmt: str) -> Tensor:
    if not finite(weight):
        raise ValueError("weights with infinities or NaNs have no form of 4 or 8 bits")
    return tile_up(weight, fmt)


def nibbles_of(values: Tensor, run: int = PAD) -> Tensor:
    """[..., n] of 0..15 -> [..., n / 2]: in each run of so many the first half low, the second half high."""
    runs = values.reshape(*values.shape[:-1], -1, 2, run // 2)
    return (runs[..., 0, :] | runs[..., 1, :] << 4).flatten(-2)


def spread(nibbles: Tensor, run: int = PAD) -> Tensor:
    """The inverse of `nibbles_of`: [..., n / 2] of uint8 -> [..., n] of 0..15."""
    runs = nibbles.reshape(*nibbles.shape[:-1], -1, 1, run // 2)
    return torch.cat([runs & 15, runs >> 4], -2).flatten(-3)


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row of [R, n] in float32 to 255 steps: rows is about scale * integers.

    Returns integers [R, n], as float32, and scale [R]. A row with an infinity or a NaN gets the scale NaN.
    """
    largest = rows.abs().amax(-1, keepdim=True) if rows.shape[-1] else rows.new_zeros((*rows.shape[:-1], 1))
    some = largest.isfinite() & (largest >= 1e-30)
    step = largest / 127
    integers = torch.where(some, (rows / step).round(), 0)
    scale = torch.where(some, step, torch.where(largest.isfinite(), 0.0, torch.nan))
    return integers, scale.squeeze(-1)


def _take(weight: Tensor, indices: Tensor) -> Tensor:
    taken = allocate((indices.numel(), *weight.shape[1:]), weight.dtype, weight.device)
    torch.index_select(weight, 0, indices, out=taken)
    return taken


def _rows(weight: Tensor, indices: Tensor) -> Tensor:
    if weight.is_contiguous():
        return weight.index_select(0, indices)
    # A transposed view: picking columns of what lies in memory row by row is several times faster.
    return weight.t().index_select(1, indices).t()


def _floats(values: Tensor | None, indices: Tensor | None) -> Tensor | None:
    if values is None:
        return None
    values = values.detach() if indices is None else values.detach().index_select(0, indices)
    return values.to(torch.float32, copy=True).contiguous()


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
    if fmt not in FORMATS:
        raise ValueError(f"fmt must be one of {', '.join(map(repr, FORMATS))}, not {fmt!r}")
    if fmt is not None and parts[0].shape[1] > MAX_INT8_WIDTH:
        raise ValueError(f"int8 sums are exact up to a hidden size of {MAX_INT8_WIDTH}")


def _check_biases(up: Tensor, gated: bool, gate: Tensor | None, up_bias: Tensor | None, down: Tensor | None) -> None:
    if gate is not None and not gated:
        raise ValueError("gate_bias given without a gate")
    for name, bias, size in (("gate", gate, up.shape[0]), ("up", up_bias, up.shape[0]), ("down", down, up.shape[1])):
        if bias is not None and bias.shape != (size,):
            raise ValueError(f"{name}_bias must have shape ({size},), not {tuple(bias.shape)}")


class Curve:
    """An activation of four numbers: a x^2 + b x above 0, and c (e^x - 1) + d x below: xIELU (2411.13010), ELU, SELU,
    leaky ReLU. numbers: float32 ``[4]``."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    def __call__(self, x: Tensor) -> Tensor:
        a, b, c, d = (number.to(x.dtype) for number in self.numbers.to(x.device))
        low = x.clamp_max(0)
        return torch.where(x > 0, x * (a * x + b), c * torch.expm1(low) + d * low)


# The order is that of the Act enum in csrc/formats.h.
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "relu2": lambda x: torch.nn.functional.relu(x).square(),
}
