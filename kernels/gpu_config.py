"""How large the programs of the kernels are, by the shape of what they read: picked by hand, nothing is tried out.

Measured on an H200 (132 multiprocessors, 4.2 TB/s): the tiles of `group_dot` for one row, and of `bundles`. Reasoned,
not measured: everything for other cards, which have 28 to 144 multiprocessors and 0.3 to 2 TB/s. They need fewer bytes
under way for each multiprocessor (Little's law: an A100 of 2 TB/s over 108 needs 19 KB, an RTX 4090 of 1 TB/s over 128
8 KB, an H200 32 KB), so tiles that keep an H200 busy keep them busy; the number of programs follows from theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from .gpu_launch import INTERPRETED
from .gpu_parts import power


@dataclass(frozen=True)
class Tile:
    """Outputs, and groups of 32 inputs, that a program reads at once, its warps, and how many tiles are under way."""

    block_n: int
    block_g: int
    warps: int
    stages: int = 1


def group_dot(outs: int, groups: int) -> Tile:
    """For dot products of bytes: one output a program, a group a thread (22016x4096: 3,439 GB/s)."""
    block = min(128, power(groups))
    return Tile(power(min(outs, 512)) if INTERPRETED else 1, block, max(1, block // 32))


def group_tiles(outs: int, groups: int) -> Tile:
    """For tensor cores, reasoned from what ptxas makes of a tile: the instructions for 22016x4096 take 11 us at 1.7
    GHz with 32 outputs and 8 groups a program. Of matrices with few outputs 16 and 16, so that each multiprocessor has
    two programs."""
    if INTERPRETED:
        return Tile(power(min(outs, 512), 16), min(8, power(groups)), 4)
    if outs < 64 * processors():
        return Tile(16, min(16, power(groups)), max(1, min(16, power(groups)) // 2), 3)
    return Tile(32, min(8, power(groups)), max(1, min(8, power(groups)) // 2), 3)


@dataclass(frozen=True)
class Split:
    """Shares of the positions, and how many of them a program reads at once."""

    splits: int
    block: int


def attention(kv_heads: int, capacity: int, size: int, itemsize: int) -> Split:
    """Reasoned: 128 to 256 programs for one row, one or two for each multiprocessor, and 16 KB of keys at once, twice.
    More than 16 shares would take longer to put together than they save."""
    block = max(16, min(64, (16 << 10) // (power(size, 16) * itemsize)))
    splits = min(16, 256 // min(256, power(kv_heads)), power(-(-capacity // block)))
    return Split(min(splits, 4) if INTERPRETED else splits, block)


@dataclass(frozen=True)
class Bundles:
    """Neurons that a program of the one-pass MLP reads at once, its warps, and how many programs there are."""

    block_n: int
    warps: int
    programs: int


def bundles(hidden: int, itemsize: int, count: int) -> Bundles:
    """Measured on an H200 in bf16, two programs a multiprocessor: 4 neurons and 8 warps for hidden sizes up to 4096
    (4096x11008: 3,876 GB/s), 2 for 8192 (4,358). Reasoned: 1 beyond, half as many of float32, 4 warps below 2048."""
    if INTERPRETED:
        return Bundles(power(min(max(1, count), 64)), 4, 2)
    wide = power(hidden) * itemsize // 2
    block = 4 if wide <= 4096 else 2 if wide <= 8192 else 1
    tiles = -(-count // block)
    return Bundles(block, 8 if hidden >= 2048 else 4, max(1, min(2 * processors(), tiles)))


def sketches(half: int, count: int) -> Bundles:
    """half: bytes of a row of nibbles. Reasoned: 16 KB of gate and up at once, two programs a multiprocessor, as in
    `bundles`."""
    if INTERPRETED:
        return Bundles(power(min(max(1, count), 64)), 4, 2)
    block = max(1, min(16, (8 << 10) // power(half)))
    return Bundles(block, 8 if half >= 1024 else 4, max(1, min(2 * processors(), -(-count // block))))


@dataclass(frozen=True)
class Columns:
    """Outputs, and inputs, that a program of `columns` reads at once, and the shares of the inputs."""

    block_o: int
    block_i: int
    splits: int


def columns(outs: int, inputs: int) -> Columns:
    """Reasoned: half a kilobyte of a column, 32 of them at once; four programs a multiprocessor."""
    if INTERPRETED:
        return Columns(power(min(outs, 256)), 64, 2)
    blocks = -(-outs // 256)
    return Columns(256, 32, max(1, min(-(-inputs // 32), 4 * processors() // blocks)))


def float_rows(outs: int, inputs: int, itemsize: int, matrices: int = 1) -> Tile:
    """Reasoned: 32 KB of the matrices of floats that a program reads, as in `bundles`; up to 2,048 numbers of a row at
    once."""
    block = min(2048, power(inputs))
    rows = max(1, min(8, (32 << 10) // (matrices * power(inputs) * itemsize)))
    if INTERPRETED:
        return Tile(power(min(outs, 256)), block, 4)
    return Tile(rows, block, 4 if block * rows >= 2048 else 2)


def expert_rows(outs: int, inputs: int, itemsize: int, by_rows: bool, matrices: int = 1) -> Tile:
    """For matrices of experts. Reasoned: as `float_rows` where a row's numbers lie side by side; where those of a
    column do, half a kilobyte of each of 32 columns."""
    if by_rows:
        return float_rows(outs, inputs, itemsize, matrices)
    if INTERPRETED:
        return Tile(power(min(outs, 256)), power(min(inputs, 64)), 4)
    return Tile(min(power(outs), 512 // itemsize), 32, 4)


@cache
def processors() -> int:
    """Multiprocessors of the current device; few in the interpreter, which runs programs one after the other."""
    if INTERPRETED or not torch.cuda.is_available():
        return 2 if INTERPRETED else 132
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
