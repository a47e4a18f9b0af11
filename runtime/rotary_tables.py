"""Tables of rotary position embeddings, made by the model's own module, longer as positions need it."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from .spec import ModelSpec

Table = tuple[Tensor, Tensor]
_FIRST = 1024  # positions that tables are made for at first


class RotaryTables:
    """(cos, sin) of each layer of a model, float32 ``[positions, rotated dimensions]`` on the CPU.

    Attributes:
        positions: how many there are tables for.
        version: rises whenever the tables are made anew.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._module: Any = spec.rotary.module
        self._by_type = spec.rotary.by_type
        self._kinds = [layer.attention.rotation for layer in spec.layers]
        self._lock = threading.Lock()
        self._outgrown: list[Any] = []  # a step in another thread may still read them; together as large as the present
        self.positions, self.version = _FIRST, 0
        self._tables = {kind: self._make(kind) for kind in dict.fromkeys(self._kinds) if kind != ""}

    def tables(self) -> list[Table | None]:
        """Of each layer; None where there is no rotation."""
        return [self._tables.get(kind) for kind in self._kinds]

    def at(self, positions: Tensor) -> list[Table | None]:
        """Of `positions` int64 [n] alone, for each layer."""
        tables = {kind: self._make(kind, positions) for kind in self._tables}
        return [tables.get(kind) for kind in self._kinds]

    def reach(self, positions: int) -> None:
        """Makes sure that there are tables for so many positions."""
        with self._lock:
            if positions <= self.positions:
                return
            self.positions = max(positions, 2 * self.positions)
            self._outgrown.append(self._tables)
            self._tables = {kind: self._make(kind) for kind in self._tables}
            self.version += 1

    def _make(self, kind: str | None, positions: Tensor | None = None) -> Table:
        positions = torch.arange(self.positions, device="cpu") if positions is None else positions
        like = torch.zeros(1, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            cos, sin = self._module(like, positions[None], *([kind] if self._by_type else []))
        return cos[0].float().contiguous(), sin[0].float().contiguous()
