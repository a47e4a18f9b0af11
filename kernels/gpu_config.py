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
    """For tensor cores (reasoned from what ptxas makes of a tile: the instructions for 22016x4096 take 11 us at 1.7 GHz): 32
    outputs and 8 groups a program; of matrices with few outputs 16 and 16, so that each multiprocessor has two
    programs."""
    if INTERPRETED:
        return Tile(power(min(outs, 512), 16), min(8, power(groups)), 4)
    if outs < 64 * processors():
        return Tile(16, min(16, power(groups)), max(1, min(16, power(groups)) // 2), 3)
    return Tile(32, min(8, power(groups)), max(1, min(8, power(groups)) // 2), 3)


@cache
def processors() -> int:
    """Multiprocessors of the current device; few in the interpreter, which runs programs one after the other."""
    if INTERPRETED or not torch.cuda.is_available():
        return 2 if INTERPRETED else 132
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
