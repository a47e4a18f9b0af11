"""Matrices in groups of 32 inputs, each with a scale of its own, in tiles of 16 rows: the formats, packing, and back.

csrc/formats.h describes the bytes. All formats of a GGUF file's matrices are among them, number for number; floats are
rounded to three of them, "int4", "int5" and "int8_groups".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .memory import allocate

GROUP, TILE = 32, 16  # inputs of a group, rows of a tile; kGroup and kTile in csrc/formats.h
_SUPER = 8  # groups of a super-block
_AT_ONCE = 2048  # rows that are rounded together


@dataclass(frozen=True)
class TileFormat:
    """How groups are stored. `code`: that of csrc/formats.h; `bits` of a number; `gguf`: llama.cpp's name of the type.

    centred: w = scale * (q - 2 ** (bits - 1)); else w = scale * q + least. nested: scales, and leasts, are bytes that
    stand for multiples of one fp16 number in 256 inputs; 6 bits have two scales a group.
    """

    code: int
    gguf: str
    bits: int
    centred: bool
    nested: bool = False

    @property
    def groups(self) -> int:
        """Groups that lie together in a block, of 32 or 256 inputs."""
        return _SUPER if self.nested else 1

    @property
    def numbers(self) -> int:
        """Bytes of a group's numbers in a tile."""
        return TILE * GROUP * self.bits // 8

    @property
    def head(self) -> int:
        """Bytes of a tile's block before its first group."""
        return TILE * (2 if self.centred else 4) if self.nested else 0

    @property
    def tile_bytes(self) -> int:
        """Bytes of a block in a tile."""
        ends = TILE * (2 if self.centred or self.nested else 4)
        return self.head + self.groups * (self.numbers + ends)


FORMATS = {
    "int4": TileFormat(5, "Q4_1", 4, False),
    "int8_groups": TileFormat(6, "Q8_0", 8, True),
    "int4_centred": TileFormat(7, "Q4_0", 4, True),
    "int5": TileFormat(8, "Q5_1", 5, False),
    "int5_centred": TileFormat(9, "Q5_0", 5, True),
    "int4_super": TileFormat(10, "Q4_K", 4, False, nested=True),
    "int5_super": TileFormat(11, "Q5_K", 5, False, nested=True),
    "int6_super": TileFormat(12, "Q6_K", 6, True, nested=True),
    "int4_upper": TileFormat(13, "", 3, False),  # see neuron_groups.py; no matrix is stored so
}
OF_GGUF = {form.gguf: name for name, form in FORMATS.items() if form.gguf}
#: by the bytes of a block in a tile, which no two formats share
BY_BYTES = {form.tile_bytes: name for name, form in FORMATS.items()}
GROUPED = ("int4", "int8_groups")  # what floats are packed in
_STEPS = {"int4": 15, "int5": 31}  # of groups with two ends that floats are rounded to


# ---- rounding ----


def group_weights(weight: Tensor, steps: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds each group of 32 inputs to numbers from 0 to `steps`: w is about scale * q + least.

    weight: [rows, inputs] of any float dtype. Returns q [rows, groups, 32] of uint8, scale and least [rows, groups] of
    float16. The ends of a group are the first guess, which is exact for numbers that were made that way; elsewhere
    least squares, given q, does better by a tenth.
    """
    rows, width = weight.shape
    groups = -(-width // GROUP)
    w = torch.nn.functional.pad(weight.float(), (0, groups * GROUP - width), mode="constant")
    if groups * GROUP != width:
        w[:, width:] = w[:, width - 1 : width]  # a group's padding must not widen its range
    w = w.view(rows, groups, GROUP)
    low, high = w.amin(-1), w.amax(-1)
    best = _rounded(w, (high - low) / steps, low, steps)
    error = (w - ungroup(*best)).square().sum(-1)
    for _ in range(2):
        q = best[0].float()
        mean_q, mean_w = q.mean(-1), w.mean(-1)
        spread = (q - mean_q[..., None]).square().sum(-1)
        slope = ((q - mean_q[..., None]) * (w - mean_w[..., None])).sum(-1) / spread.clamp_min(1e-12)
        fit = _rounded(w, slope, mean_w - slope * mean_q, steps)
        fit_error = (w - ungroup(*fit)).square().sum(-1)
        better = fit_error < error
        chosen = torch.where(better[..., None], fit[0], best[0])
        best = (chosen, torch.where(better, fit[1], best[1]), torch.where(better, fit[2], best[2]))
        error = torch.where(better, fit_error, error)
    return best


def _rounded(w: Tensor, scale: Tensor, least: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    scale, least = scale.half(), least.half()
    q = (w - least.float()[..., None]) / torch.where(scale == 0, 1.0, scale.float())[..., None]
    return q.round().clamp(0, steps).to(torch.uint8), scale, least


def group_bytes(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `group_weights`, for w about scale * (q - 128) with q in 1..255."""
    rows, width = weight.shape
    w = torch.nn.functional.pad(weight.float(), (0, -width % GROUP)).view(rows, -1, GROUP)
    scale = (w.abs().amax(-1) / 127).half()
    q = (w / torch.where(scale == 0, 1.0, scale.float())[..., None]).round().clamp(-127, 127) + 128
    return q.to(torch.uint8), scale, scale


def ungroup(q: Tensor, scale: Tensor, least: Tensor) -> Tensor:
    """What groups stand for: float32 [rows, groups, inputs of a group]; the inverse of `group_weights`."""
    return q.float() * scale.float()[..., None] + least.float()[..., None]


# ---- tiles ----


def tile_shape(fmt: str, rows: int, inputs: int) -> tuple[int, int, int]:
    """The shape of a tiled matrix' bytes. Raises KeyError for a format that has no tiles."""
    form = FORMATS[fmt]
    return -(-rows // TILE), -(-inputs // (GROUP * form.groups)), form.tile_bytes


def tile_up(weight: Tensor, fmt: str) -> Tensor:
    """The tiles of floats, [rows, inputs], in one of `GROUPED` or "int5": uint8 [ceil(rows / 16), groups, bytes]."""
    tiles = allocate(tile_shape(fmt, *weight.shape), torch.uint8, weight.device)
    # a few rows at a time: rounding a whole LM head takes memory for six copies of it
    for rows, some in zip(weight.split(_AT_ONCE), tiles.split(_AT_ONCE // TILE), strict=True):
        some.copy_(_tiles_of(rows, fmt))
    return tiles


def _tiles_of(weight: Tensor, fmt: str) -> Tensor:
    return tiles_from_groups(*(group_weights(weight, _STEPS[fmt]) if fmt in _STEPS else group_bytes(weight)), fmt)


def tiles_from_groups(q: Tensor, scale: Tensor, least: Tensor, fmt: str) -> Tensor:
    """The bytes of rounded groups, uint8 ``[ceil(rows / 16), groups, bytes of a tile]``, in one of `GROUPED`, "int5" or
    "int4_upper", of whose 4-bit numbers the upper three bits are kept.

    q: uint8 [rows, groups, 32]; scale and least: float16 [rows, groups]. Of "int8_groups", whose least is -128 scales,
    least is not looked at.
    """
    ends = [scale] if FORMATS[fmt].centred else [scale, least]
    fill = -q.shape[0] % TILE
    if fill:
        q, *ends = (torch.nn.functional.pad(t, (0, 0) * (t.dim() - 1) + (0, fill)) for t in (q, *ends))
    groups = q.shape[1]
    ends = [t.view(-1, TILE, groups).transpose(1, 2).contiguous().view(torch.uint8) for t in ends]
    if fmt in _STEPS:
        # [tile, row, group, half, four, input of four] -> [tile, group, four, row, input of four] for each half
        low, high = q.view(-1, TILE, groups, 2, 4, 4).permute(3, 0, 2, 4, 1, 5)
        words = (low & 15) | (high & 15) << 4
        if fmt == "int5":  # a plane of the fifth bits: four of each half's a byte
            places = torch.arange(4, dtype=torch.uint8, device=q.device)[:, None, None]
            plane = (low >> 4 << places | high >> 4 << places + 4).sum(2, keepdim=True, dtype=torch.uint8)
            words = torch.cat([words, plane], 2)
        numbers = words.reshape(-1, groups, FORMATS[fmt].numbers)
    elif fmt == "int4_upper":
        # [tile, row, group, unit, input of four] -> [tile, group, unit, row, input of four]
        units = q.view(-1, TILE, groups, 8, 4).permute(0, 2, 3, 1, 4).reshape(-1, groups, 8, TILE * 4) >> 1
        words = units[:, :, 0:6:2] | units[:, :, 1:6:2] << 3
        words[:, :, 0] |= (units[:, :, 6] & 3) << 6
        words[:, :, 1] |= (units[:, :, 7] & 3) << 6
        words[:, :, 2] |= units[:, :, 6] >> 2 << 6 | units[:, :, 7] >> 2 << 7
        numbers = words.flatten(2)
    else:
        numbers = q.view(-1, TILE, groups, 8, 4).permute(0, 2, 3, 1, 4).reshape(-1, groups, TILE * GROUP)
    return torch.cat([numbers, *ends], -1)


class Tiled(Protocol):
    """What `untile` reads of a `PackedLinear`: tiles, how many rows of them count, and the name of their format."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def rows(self) -> int | None: ...

    @property
    def fmt(self) -> str | None: ...


def untile(packed: Tiled) -> tuple[Tensor, Tensor, Tensor]:
    """q, scale and least of tiles, such that `ungroup` of them are the numbers, even to the sign of a zero.

    Returns q [rows, groups, 32], scale and least [rows, groups], or twice as many groups of 16 for "int6_super". q is
    uint8 with two ends; of centred formats it is int16, and least the -0.0 that changes no number it is added to.
    """
    form, tiles = FORMATS[packed.fmt or ""], packed.weight
    heads, blocks = tiles[..., : form.head], tiles[..., form.head :]
    groups = blocks.reshape(tiles.shape[0], tiles.shape[1] * form.groups, -1)
    q = _numbers(groups[..., : form.numbers], form.bits)
    scale, least = _nested_ends(form, heads, groups) if form.nested else _ends(form, groups)
    if form.centred:
        q = q.to(torch.int16) - (1 << form.bits - 1)
        least = torch.full_like(scale, -0.0)
        q = q.view(q.shape[0], scale.shape[1], -1)
    return q[: packed.rows], scale[: packed.rows], least[: packed.rows]


def _numbers(numbers: Tensor, bits: int) -> Tensor:
    """[tiles, groups, bytes] -> [tiles * 16, groups, 32] of uint8."""
    tiles, groups, _ = numbers.shape
    words = numbers.view(tiles, groups, bits, TILE, 4).permute(0, 3, 1, 2, 4)  # [tile, row, group, vector, byte]
    if bits == 8:
        return words.reshape(-1, groups, GROUP)
    nibbles, planes = words[..., :4, :], words[..., 4:, :]
    low, high = nibbles & 15, nibbles >> 4
    if bits > 4:
        more = bits - 4
        mask = (1 << more) - 1
        shifts = torch.arange(0, 4, more, dtype=torch.uint8, device=numbers.device)[:, None]
        # [.., plane, 1, byte] >> [words that share it, 1]
        upper = [(planes[..., None, :] >> (shifts + at) & mask).flatten(-3, -2) << 4 for at in (0, 4)]
        low, high = low | upper[0], high | upper[1]
    return torch.stack([low, high], -3).reshape(-1, groups, GROUP)


def _ends(form: TileFormat, groups: Tensor) -> tuple[Tensor, Tensor]:
    ends = _halves(groups[..., form.numbers :])
    return ends[0], ends[-1]


def _nested_ends(form: TileFormat, heads: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """float32: what the bytes of a super-block's groups stand for."""
    d = _halves(heads).float().repeat_interleave(_SUPER, -1)  # [1 or 2, rows, groups]
    tiles, count, _ = groups.shape
    ends = groups[..., form.numbers :].view(tiles, count, 2, TILE).permute(2, 0, 3, 1).reshape(2, -1, count)
    if form.centred:
        scale = d * ends.view(torch.int8).float()  # of the first and the second half
        return scale.permute(1, 2, 0).flatten(1), scale
    scale, least = d * ends.float()
    return scale, -least


def _halves(ends: Tensor) -> Tensor:
    """fp16 numbers of rows, [tiles, blocks, bytes] -> [kinds, tiles * 16, blocks]."""
    tiles, blocks, _ = ends.shape
    halves = ends.contiguous().view(torch.float16).view(tiles, blocks, -1, TILE)
    return halves.permute(2, 0, 3, 1).reshape(halves.shape[2], -1, blocks)
