"""Tables of rotary position embeddings, made by the model's own module, longer as positions need it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .calls import NotCovered
from .spec import ModelSpec, RotarySpec

Table = tuple[Tensor, Tensor]
_FIRST = 1024  # positions that tables are made for at first


class RotaryTables:
    """(cos, sin) of each layer of a model, float32 ``[positions, rotated dimensions]`` on the CPU.

    Attributes:
        positions: how many there are tables for.
        version: rises whenever the tables are made anew.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._rotary, self._end = spec.rotary, spec.end
        attentions = [layer.attention for layer in spec.layers]
        self._kinds = ["" if attention is None else attention.rotation for attention in attentions]
        self._lock = threading.Lock()
        self._outgrown: list[Any] = []  # a step in another thread may still read them; together as large as the present
        self.positions, self.version = min(_FIRST, spec.end or _FIRST), 0
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
            self.positions = min(max(positions, 2 * self.positions), self._end or 1 << 62)
            self._outgrown.append(self._tables)
            self._tables = {kind: self._make(kind) for kind in self._tables}
            self.version += 1

    def _make(self, kind: str | None, positions: Tensor | None = None) -> Table:
        assert self._rotary is not None  # else no layer has a kind
        positions = torch.arange(self.positions, device="cpu") if positions is None else positions
        return table_of(self._rotary, kind, positions)


def table_of(rotary: RotarySpec, kind: str | None, positions: Tensor) -> Table:
    """(cos, sin) of `positions` int64 [n], float32 ``[n, rotated dimensions]`` on the CPU: those of the first halves of
    turned pairs, then of the second."""
    cos, sin = _made(rotary, kind, positions)
    return cos, -sin if rotary.backwards else sin


def _made(rotary: RotarySpec, kind: str | None, positions: Tensor) -> Table:
    if rotary.table is not None:
        sin, cos = rotary.table.detach()[positions.to(rotary.table.device)].float().cpu().chunk(2, -1)
        return _twice(cos), _twice(sin)
    module = cast(Any, rotary.module)
    device = next((buffer.device for buffer in module.buffers()), torch.device("cpu"))
    like = torch.zeros(1, dtype=torch.float32, device=device)
    with torch.no_grad():
        made = module(like, positions[None].to(device), *([kind] if rotary.by_type else []))
    made = made.cpu() if isinstance(made, Tensor) else [part.cpu() for part in made]
    if isinstance(made, Tensor):  # as complex numbers (Llama 4)
        if not made.is_complex():
            raise NotCovered("its rotary embeddings are neither cosines and sines nor complex numbers")
        return _twice(made[0].real.float()), _twice(made[0].imag.float())
    cos, sin = made[0][0].float(), made[1][0].float()
    angles = getattr(module, "inv_freq" if kind is None else f"{kind}_inv_freq", None)
    if isinstance(angles, Tensor) and cos.shape[-1] == angles.shape[-1]:  # of the first halves alone (GPT-OSS)
        return _twice(cos), _twice(sin)
    if torch.equal(cos[:, ::2], cos[:, 1::2]) and torch.equal(sin[:, ::2], sin[:, 1::2]):  # each one twice in a row
        return _twice(cos[:, ::2]), _twice(sin[:, ::2])
    return cos.contiguous(), sin.contiguous()


def _twice(half: Tensor) -> Tensor:
    return torch.cat([half, half], -1).contiguous()


class Rotation:
    """What `table_of` makes, on the model's own device and without a look at what is in a tensor: a step that calls it
    can be captured."""

    def __init__(self, rotary: RotarySpec, kind: str | None, device: torch.device) -> None:
        self._rotary, self._kind, self._device = rotary, kind, device
        self._table = None if rotary.table is None else rotary.table.detach().float().to(device)
        if self._table is None:
            self._made = self._way()

    def __call__(self, positions: Tensor) -> Table:
        """(cos, sin) of `positions` int64 [n], float32 ``[n, rotated dimensions]``."""
        if self._table is not None:
            at = positions.clamp(0, self._table.shape[0] - 1)  # beyond its end nothing that is asked for lies
            sin, cos = self._table.index_select(0, at).chunk(2, -1)
            cos, sin = _twice(cos), _twice(sin)
        else:
            cos, sin = self._made(self._module(positions))
        return cos, -sin if self._rotary.backwards else sin

    def _module(self, positions: Tensor) -> Any:
        like = torch.zeros(1, dtype=torch.float32, device=self._device)
        kinds = [self._kind] if self._rotary.by_type else []
        with torch.no_grad():
            return cast(Any, self._rotary.module)(like, positions[None], *kinds)

    def _way(self) -> Callable[[Any], Table]:
        """From what the module makes to what `table_of` does: seen at a few positions."""
        positions = torch.arange(1, 9, device=self._device)
        made, wanted = self._module(positions), table_of(self._rotary, self._kind, positions.cpu())
        ways: list[Callable[[Any], Table]] = (
            [lambda made: (_twice(made[0].real.float()), _twice(made[0].imag.float()))]
            if isinstance(made, Tensor)
            else [
                lambda made: (made[0][0].float(), made[1][0].float()),
                lambda made: (_twice(made[0][0].float()), _twice(made[1][0].float())),
                lambda made: (_twice(made[0][0, :, ::2].float()), _twice(made[1][0, :, ::2].float())),
            ]
        )
        sign = -1.0 if self._rotary.backwards else 1.0
        for way in ways:
            cos, sin = way(made)
            if cos.shape == wanted[0].shape and _same(cos, wanted[0]) and _same(sign * sin, wanted[1]):
                return way
        raise NotCovered("its rotary embeddings are made in a way of their own on this device")


def _same(made: Tensor, table: Tensor) -> bool:
    return torch.allclose(made.cpu(), table, rtol=0, atol=1e-5)
