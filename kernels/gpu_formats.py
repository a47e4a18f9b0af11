"""Matrices and inputs as the kernels of a GPU read them. The numbers are those of groups.py, only their places differ.

A group of 32 weights of 4 bits is one load of 16 bytes, one of 8 bits two. Nothing here needs Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .groups import GROUP, group_bytes, group_weights, ungroup, untile
from .packed import ACTS, PAD, PackedLinear, quantize

#: formats of groups.py that `GroupedMatrix.of` takes, with the bits that a weight has on a GPU
GROUPED_BITS = {"int4": 4, "int4_centred": 4, "int5": 8, "int5_centred": 8, "int8_groups": 8}
_AT_ONCE = 2048  # rows that are rounded together


@dataclass(frozen=True, eq=False)
class FloatMatrix:
    """A linear's matrix as floats, ``[out, in]`` of float32, bfloat16 or float16, and its bias ``[out]`` or None."""

    weight: Tensor
    bias: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def rows(self, first: int, count: int) -> FloatMatrix:
        """Outputs `first` to `first + count`, as a view."""
        return FloatMatrix(self.weight[first : first + count], _part(self.bias, first, count))

    def inputs(self, count: int) -> FloatMatrix:
        """The first `count` inputs alone, as a view."""
        return replace(self, weight=self.weight[:, :count])

    def take(self, indices: Tensor) -> FloatMatrix:
        """The outputs in `indices`, int64 [k], copied."""
        return FloatMatrix(self.weight[indices], None if self.bias is None else self.bias[indices])

    @staticmethod
    def stack(parts: Sequence[FloatMatrix]) -> FloatMatrix:
        """One matrix of the outputs of all parts, in turn, copied."""
        return FloatMatrix(torch.cat([part.weight for part in parts]), _biases(parts))


@dataclass(frozen=True, eq=False, repr=False)
class GroupedMatrix:
    """A linear's matrix in groups of 32 inputs of 4 or of 8 bits.

    4 bits: w = scale * q + least, q in 0..15. words: int32 [out, groups, 4]; the nibbles of word j, from the lowest on,
    are inputs 4 j to 4 j + 3, then 16 + 4 j to 16 + 4 j + 3.
    8 bits: w = scale * q + least, q in -128..127. words: int32 [out, groups, 8], a byte an input, in order.
    ends: int32 [out, groups], a scale in the lower and a least in the upper half, both float16.
    Rows lie words.stride(0) words, and ends.stride(0) ends, apart: matrices of fewer inputs are views of others.
    bias: float32 [out] or None. What the last group has beyond in_features meets zeros.
    """

    words: Tensor
    ends: Tensor
    in_features: int
    bias: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, packed: PackedLinear, device: torch.device | str = "cpu") -> GroupedMatrix:
        """The very numbers of a packed matrix. Raises ValueError for a format that is not one of `GROUPED_BITS`."""
        bits = GROUPED_BITS.get(packed.fmt or "")
        if bits is None:
            raise ValueError(f"{packed.fmt} has no form on a GPU: {', '.join(GROUPED_BITS)} have")
        q, scale, least = (t.to(device) for t in untile(packed))
        if packed.fmt == "int4_centred":
            q, least = q + 8, -8.0 * scale
        bias = None if packed.bias is None else packed.bias.to(device)
        return cls(_words(q, bits), _ends(scale, least), packed.in_features, bias)

    @classmethod
    @torch.no_grad()
    def round(cls, weight: Tensor, bias: Tensor | None = None, fmt: str = "int4") -> GroupedMatrix:
        """Floats [out, in] of any device rounded as `groups.group_weights` says, a few rows at a time: fmt "int4" or
        "int8_groups"."""
        bits, groups = GROUPED_BITS[fmt], -(-weight.shape[1] // GROUP)
        words = torch.empty((weight.shape[0], groups, bits), dtype=torch.int32, device=weight.device)
        ends = torch.empty((weight.shape[0], groups), dtype=torch.int32, device=weight.device)
        for some, to, at in zip(*(t.split(_AT_ONCE) for t in (weight, words, ends)), strict=True):
            if fmt == "int4":
                q, scale, least = group_weights(some)
            else:
                q, scale, _ = group_bytes(some)
                q, least = q.to(torch.int16) - 128, torch.full_like(scale, -0.0)
            to.copy_(_words(q, bits))
            at.copy_(_ends(scale, least))
        return cls(words, ends, weight.shape[1], None if bias is None else bias.float().contiguous())

    @property
    def bits(self) -> int:
        return self.words.shape[2]

    @property
    def out_features(self) -> int:
        return self.words.shape[0]

    @property
    def groups(self) -> int:
        return self.words.shape[1]

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.words, self.ends, self.bias) if t is not None)

    def rows(self, first: int, count: int) -> GroupedMatrix:
        """Outputs `first` to `first + count`, as a view."""
        words, ends = self.words[first : first + count], self.ends[first : first + count]
        return replace(self, words=words, ends=ends, bias=_part(self.bias, first, count))

    def inputs(self, count: int) -> GroupedMatrix:
        """The first `count` inputs alone, whole groups, as a view. Raises ValueError where a group would be cut."""
        if count % GROUP and count != self.in_features:
            raise ValueError(f"{count} inputs are not whole groups of {GROUP}")
        groups = -(-count // GROUP)
        return replace(self, words=self.words[:, :groups], ends=self.ends[:, :groups], in_features=count)

    def take(self, indices: Tensor) -> GroupedMatrix:
        """The outputs in `indices`, int64 [k], copied."""
        bias = None if self.bias is None else self.bias[indices]
        return replace(self, words=self.words[indices], ends=self.ends[indices], bias=bias)

    def take_groups(self, groups: Tensor) -> GroupedMatrix:
        """The inputs of these groups, int64 [k], side by side, copied: whole groups alone."""
        return replace(
            self, words=self.words[:, groups], ends=self.ends[:, groups], in_features=groups.numel() * GROUP
        )  # fmt: skip

    @staticmethod
    def stack(parts: Sequence[GroupedMatrix]) -> GroupedMatrix:
        """One matrix of the outputs of all parts, in turn, copied. Raises ValueError where bits or inputs differ."""
        if len({(part.bits, part.in_features) for part in parts}) > 1:
            raise ValueError("matrices of other bits or inputs do not stack")
        words, ends = torch.cat([part.words for part in parts]), torch.cat([part.ends for part in parts])
        return GroupedMatrix(words, ends, parts[0].in_features, _biases(parts))

    def numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """q int16 [out, groups, 32], scale and least float16 [out, groups]: see `groups.ungroup`."""
        halves = self.ends.contiguous().view(torch.float16).view(*self.ends.shape, 2)
        found = self.words.contiguous().view(torch.uint8)
        if self.bits == 4:
            nibbles = torch.stack([found & 15, found >> 4], -1).view(*self.ends.shape, 4, 2, 4)
            found = nibbles.transpose(-3, -2).flatten(2).to(torch.int16)
        else:
            found = found.view(torch.int8).to(torch.int16)
        return found, halves[..., 0], halves[..., 1]

    def floats(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the matrix stands for, ``[out, in]``, a few rows at a time."""
        out = torch.empty((self.out_features, self.in_features), dtype=dtype, device=self.device)
        for first in range(0, self.out_features, _AT_ONCE):
            part = replace(self, bias=None).rows(first, _AT_ONCE)
            out[first : first + _AT_ONCE] = ungroup(*part.numbers()).flatten(1)[:, : self.in_features]
        return out

    def __repr__(self) -> str:
        return f"GroupedMatrix({self.in_features} -> {self.out_features}, {self.bits} bits)"


Matrix = FloatMatrix | GroupedMatrix


@dataclass(frozen=True, eq=False)
class ExpertMatrices:
    """The matrices of a mixture's experts where they lie, and what a neuron makes of its gate and up.

    gate, up: floats ``[experts, neurons, hidden]``, views that lie alike; gate None: plain. down: ``[experts, hidden,
    neurons]``. Biases: ``[experts, outputs]``, those of gate and up lying alike, or None. act: a name of `packed.ACTS`.
    limit, slope, offset: see `experts.PackedExperts`. by_inputs: a row's weight multiplies what an expert reads.
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    act: str
    limit: float = 0.0
    slope: float = 1.0
    offset: float = 0.0
    by_inputs: bool = False

    def __post_init__(self) -> None:
        for one, other in ((self.gate, self.up), (self.gate_bias, self.up_bias)):
            if one is not None and other is not None and (one.shape, one.stride()) != (other.shape, other.stride()):
                raise ValueError("gates and ups of experts must lie in memory alike")
        if self.act not in ACTS or (self.slope != 1 and self.act != "silu"):
            raise ValueError(f"experts have no activation {self.act!r} with a slope of {self.slope}")

    @property
    def nbytes(self) -> int:
        """Of all experts."""
        return sum(t.numel() * t.element_size() for t in (self.gate, self.up, self.down) if t is not None)


def pack(weight: Tensor, bias: Tensor | None = None, fmt: str | None = None) -> Matrix:
    """Floats [out, in] where they are: by reference, or rounded to "int4" or "int8_groups"."""
    if fmt is None:
        return FloatMatrix(weight.detach(), None if bias is None else bias.detach())
    return GroupedMatrix.round(weight.detach(), None if bias is None else bias.detach(), fmt)


@dataclass(frozen=True, eq=False)
class Quantized:
    """Rows of inputs rounded to 8 bits in groups of 32: x is about step * integers.

    integers: int8 [rows, groups * 32], zeros beyond `in_features`; step: float32 [rows, groups]; total: float32
    [rows, groups], step times the sum of a group's integers, which is what leasts of weights are multiplied by.
    """

    integers: Tensor
    step: Tensor
    total: Tensor
    in_features: int

    @classmethod
    def of(cls, x: Tensor) -> Quantized:
        """x: [rows, in] of floats, rounded as `packed.quantize` says."""
        rows = F.pad(x.float(), (0, -x.shape[1] % GROUP))
        integers, step = quantize(rows.reshape(-1, GROUP))
        step = step.view(rows.shape[0], -1)
        total = step * integers.sum(-1).view_as(step)
        return cls(integers.to(torch.int8).view_as(rows), step, total, x.shape[1])

    @property
    def rows(self) -> int:
        return self.integers.shape[0]

    def floats(self) -> Tensor:
        """What the integers stand for, float32 ``[rows, in]``."""
        values = self.integers.view(*self.step.shape, GROUP).float() * self.step[..., None]
        return values.flatten(1)[:, : self.in_features]


@dataclass(frozen=True, eq=False)
class ByRow:
    """Rows of inputs rounded to 8 bits with one step each, as sketches are read: x is about step * integers.

    integers: int8 [rows, whole runs of 128], zeros beyond the inputs; step: float32 [rows]; total: int32 [rows], the
    sum of a row's integers.
    """

    integers: Tensor
    step: Tensor
    total: Tensor

    @classmethod
    def of(cls, x: Tensor, smooth: Tensor | None = None) -> ByRow:
        """x: [rows, in] of floats, times smooth [in], rounded as `packed.quantize` says."""
        rows = x.float() if smooth is None else x.float() * smooth
        integers, step = quantize(F.pad(rows, (0, -x.shape[1] % PAD)))
        return cls(integers.to(torch.int8), step, integers.sum(-1).int())

    @property
    def rows(self) -> int:
        return self.integers.shape[0]


Inputs = Tensor | Quantized


def _words(q: Tensor, bits: int) -> Tensor:
    """[rows, groups, 32] of integers -> int32 [rows, groups, 4 or 8]."""
    if bits == 4:
        q = q.to(torch.uint8).view(*q.shape[:2], 2, 4, 4).transpose(-3, -2).flatten(2)
        return (q[..., ::2] | q[..., 1::2] << 4).contiguous().view(torch.int32)
    return q.to(torch.int8).contiguous().view(torch.int32)


def _ends(scale: Tensor, least: Tensor) -> Tensor:
    """int32 [rows, groups]."""
    return torch.stack([scale.half(), least.half()], -1).view(torch.int32)[..., 0]


def _part(bias: Tensor | None, first: int, count: int) -> Tensor | None:
    return None if bias is None else bias[first : first + count]


def _biases(parts: Sequence[FloatMatrix] | Sequence[GroupedMatrix]) -> Tensor | None:
    if all(part.bias is None for part in parts):
        return None
    zeros = [torch.zeros(part.out_features, device=_device(part)) if part.bias is None else part.bias for part in parts]
    return torch.cat(zeros)


def _device(part: Matrix) -> torch.device:
    return part.weight.device if isinstance(part, FloatMatrix) else part.device
