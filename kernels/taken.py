"""Some rows, or some columns, of a matrix in tiles, as a matrix of their own in tiles."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import cpu
from .groups import FORMATS, GROUP, TILE, tile_shape
from .memory import LINE, allocate
from .packed import PackedLinear

#: formats of which these can be taken
TAKEN = ("int4", "int5", "int8_groups")
OF_COLUMNS = "int8_groups"  # the format of columns whose groups are made anew


def rows(packed: PackedLinear, kept: Tensor, memory: Tensor | None = None) -> PackedLinear:
    """The rows `kept`, int64 ``[k]``, ascending, in the same format, number for number.

    memory: uint8, of `rows_bytes` at least; None: its own. Raises ValueError for another format or rows that are not
    there.
    """
    check(packed, kept, packed.out_features)
    return checked_rows(packed, kept, memory)


def checked_rows(packed: PackedLinear, kept: Tensor, memory: Tensor | None) -> PackedLinear:
    """`rows` that are known to be there."""
    count = kept.numel()
    tiles = _tiles((-(-count // TILE), *packed.weight.shape[1:]), memory)
    cpu.library().coreskip_take_rows(
        packed.weight.data_ptr(), packed.code, packed.weight.shape[1], kept.data_ptr(), count, tiles.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return replace(packed, weight=tiles, bias=None if packed.bias is None else packed.bias[kept], rows=count)


def columns(packed: PackedLinear, kept: Tensor, memory: Tensor | None = None) -> PackedLinear:
    """The columns `kept`, int64 ``[k]``, ascending: whole groups of 32 as they are, others in groups of 8 bits that are
    made anew, within half a step of 127 of a group's largest number. See `rows`."""
    check(packed, kept, packed.in_features)
    return checked_columns(packed, kept, memory)


def checked_columns(packed: PackedLinear, kept: Tensor, memory: Tensor | None) -> PackedLinear:
    """`columns` that are known to be there."""
    count = kept.numel()
    if whole_groups(kept, packed.in_features):
        groups = kept[::GROUP] // GROUP
        tiles = _tiles((packed.weight.shape[0], groups.numel(), packed.weight.shape[2]), memory)
        torch.index_select(packed.weight, 1, groups, out=tiles)
    else:
        tiles = _tiles(tile_shape(OF_COLUMNS, packed.out_features, count), memory)
        cpu.library().coreskip_take_columns(
            packed.weight.data_ptr(), packed.code, packed.weight.shape[1], packed.weight.shape[0], kept.data_ptr(),
            count, tiles.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return replace(packed, weight=tiles, in_features=count)


def some(packed: PackedLinear, kept: Tensor, memory: Tensor | None = None) -> PackedLinear:
    """The columns `kept` of a matrix in "int4", number for number, in the groups that they were in: see
    `PackedLinear.counts`. memory: uint8, of `some_bytes` at least; the rest as for `rows`."""
    check(packed, kept, packed.in_features)
    if packed.fmt != "int4":
        raise ValueError(f"some inputs of groups are taken of int4, not of {packed.fmt}")
    return checked_some(packed, kept, memory)


def checked_some(packed: PackedLinear, kept: Tensor, memory: Tensor | None) -> PackedLinear:
    """`some` columns that are known to be there."""
    tiles, groups, _ = packed.weight.shape
    counts = torch.bincount(kept // GROUP, minlength=groups)
    tile = LINE * int(((counts + 7) // 8 + (counts > 0)).sum())
    of_groups, taken = counts.to(torch.uint8), _tiles((tiles, tile), memory)
    cpu.library().coreskip_take_some(
        packed.weight.data_ptr(), groups, tiles, kept.data_ptr(), of_groups.data_ptr(), tile, taken.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return replace(packed, weight=taken, in_features=kept.numel(), counts=of_groups)


def some_bytes(outputs: int, inputs: int, count: int) -> int:
    """The most bytes that so many columns take, however they lie in groups."""
    groups = -(-inputs // GROUP)
    lines = min(GROUP // 8 * groups, count, (count + 7 * groups) // 8)
    return -(-outputs // TILE) * LINE * (lines + min(groups, count))


def whole_groups(kept: Tensor, width: int) -> bool:
    """Whether ascending columns are groups of 32 as they lie in a matrix of `width` columns, none in part."""
    end = min(GROUP, kept.numel()) - 1
    if int(kept[0]) % GROUP or int(kept[end]) - int(kept[0]) != end:  # most lists, at once
        return False
    first = kept[::GROUP]
    every = (first[:, None] + torch.arange(GROUP, device="cpu")).flatten()
    every = every[every < width]
    return every.shape == kept.shape and not bool((first % GROUP).any()) and torch.equal(every, kept)


def rows_bytes(fmt: str, count: int, inputs: int) -> int:
    """Bytes of so many rows."""
    tiles, groups, size = tile_shape(fmt, count, inputs)
    return tiles * groups * size


def _tiles(shape: tuple[int, ...], memory: Tensor | None) -> Tensor:
    if memory is None:
        return allocate(shape, torch.uint8, torch.device("cpu"))
    return memory[: torch.Size(shape).numel()].view(shape)


def check(packed: PackedLinear, kept: Tensor, among: int) -> None:
    """Raises ValueError where not all of `kept` can be taken among so many."""
    if packed.fmt not in TAKEN or FORMATS[packed.fmt].nested:
        raise ValueError(f"rows and columns are taken of tiles in {', '.join(TAKEN)}, not of {packed.fmt}")
    if kept.dtype != torch.int64 or kept.dim() != 1 or not kept.is_contiguous() or kept.numel() == 0:
        raise ValueError("what is taken is listed as int64, in one row, and is something")
    if int(kept[0]) < 0 or int(kept[-1]) >= among or bool((kept.diff() <= 0).any()):
        raise ValueError(f"what is taken must ascend within 0..{among - 1}")
