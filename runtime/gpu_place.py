"""Where steps on a GPU read their arguments, and keep keys and values: buffers that never move, so that steps over them
can be captured; and the capture."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .kv_cache import Entries, Rooms, leave_rooms, lend_rooms

MOST_TOKENS = 8  # of each sequence in a step


class Capture:
    """A step on a GPU: run twice, so that everything is compiled and allocated, captured, and replayed when called."""

    _alone = threading.Lock()  # a process makes one capture at a time

    def __init__(self, step: Callable[[], Tensor], device: torch.device) -> None:
        self._device = device
        with self._alone, torch.cuda.device(device):
            self._graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()  # the buffers may have been written on another stream
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                step()
                step()
            side.synchronize()
            # thread_local: others may go on meanwhile
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._logits = step()

    def __call__(self) -> Tensor:
        """The step's logits, in memory that the next call overwrites."""
        with torch.cuda.device(self._device):
            self._graph.replay()
        return self._logits


class Place:
    """Memory for the steps of some sequences: their arguments, keys and values.

    Args:
        layers: of a dynamic cache, for the shapes of keys and values.
        capacity: how many positions there is memory for.
        entries: what a cache of this model's is.

    Attributes:
        ids, positions: int64 ``[rows, 8]``, of a step's tokens; one of fewer reads the first.
        at: int64 ``[1]``, how many positions came before.
        seen: bool ``[rows, capacity]``, which positions are not hidden.
        buffers: keys and values by layer, ``[rows, kv_heads, capacity, head_dim]``.
    """

    def __init__(self, layers: Sequence[Any], capacity: int, entries: Entries) -> None:
        keys = layers[0].keys
        rows, device = keys.shape[0], keys.device
        self._entries = entries
        self.rows, self.capacity, self.device = rows, capacity, device
        with torch.inference_mode(False):  # else nobody else could write to them
            self.ids = torch.zeros((rows, MOST_TOKENS), dtype=torch.int64, device=device)
            self.positions = torch.zeros_like(self.ids)
            self.at = torch.zeros(1, dtype=torch.int64, device=device)
            self.seen = torch.zeros((rows, capacity), dtype=torch.bool, device=device)
            self._index = torch.arange(capacity, device=device)
        self.buffers: list[tuple[Tensor, Tensor]] = []  # made when a first cache comes
        self._unused = 0
        self._cache: Callable[[], Cache | None] = lambda: None
        self._rooms: Callable[[], Rooms | None] = lambda: None

    # --- whose keys and values these are

    @property
    def cache(self) -> Cache | None:
        return self._cache()

    def adopt(self, cache: Cache) -> Rooms:
        """Copies a cache's keys and values into the buffers, which are the cache's from now on."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # whose they were may have used another stream
        rooms = lend_rooms(cache, self.buffers or self._made(cache), self._entries)
        self._cache, self._rooms = weakref.ref(cache), weakref.ref(rooms)
        return rooms

    def _made(self, cache: Cache) -> Iterator[tuple[Tensor, Tensor]]:
        """Buffers for one layer after the other: what the cache had before is let go meanwhile."""
        layer: Any
        for layer in cache.layers:
            with torch.inference_mode(False):
                self.buffers.append((_buffer(layer.keys, self.capacity), _buffer(layer.values, self.capacity)))
            self._unused += _holders(self.buffers[-1])
            yield self.buffers[-1]

    def serves(self, rooms: Rooms | None) -> bool:
        return rooms is not None and self._rooms() is rooms

    def is_free_for(self, cache: Cache) -> bool:
        """Whether nobody else could notice that the buffers are overwritten."""
        rooms = self._rooms()
        if rooms is not None and self._cache() is cache:
            return rooms.is_ours
        return self._holders() == self._unused

    def take_away(self) -> None:
        """The cache that has the buffers gets copies."""
        rooms = self._rooms()
        if rooms is not None:
            leave_rooms(rooms)

    def capture(
        self, make: Callable[[Callable[[], Tensor], torch.device], Callable[[], Tensor]], step: Callable[[], Tensor]
    ) -> Callable[[], Tensor]:
        """What `make` makes of a step over this memory, which may hold views of it for as long as this is there."""
        step()  # what it makes for itself, once, it keeps, too
        before = self._holders()
        replay = make(step, self.device)
        self._unused += self._holders() - before
        rooms = self._rooms()
        if rooms is not None:
            rooms.settle()
        return replay

    def _holders(self) -> int:
        return sum(map(_holders, self.buffers))

    # --- a step's arguments

    def load(self, ids: Tensor | int, past: int, tokens: int, mask: Tensor | None, positions: Tensor | None) -> None:
        """Takes over what a call of the model's forward asks for.

        ids: ``[rows, n]``, n up to `tokens`; what lies beyond is made up, and seen by nothing that is asked for.
        past: positions in the cache. mask: ``[rows, past + n]`` or None. positions: ``[rows, n]`` or None.
        """
        count = ids.shape[1] if isinstance(ids, Tensor) else 1
        self.at.fill_(past)
        self.ids[:, :count] = ids
        self.ids[:, count:tokens] = 0
        self.seen[:, : past + tokens] = True
        if mask is not None:
            self.seen[:, : past + count] = mask
        if positions is None:
            self.positions[:, :tokens] = self._index[past : past + tokens]
        else:
            self.positions[:, :count] = positions
            self.positions[:, count:tokens] = positions[:, -1:]


def _holders(pair: tuple[Tensor, Tensor]) -> int:
    counts = torch._C._storage_Use_Count
    return sum(counts(t.untyped_storage()._cdata) for t in pair)


def _buffer(like: Tensor, capacity: int) -> Tensor:
    rows, heads, _, size = like.shape
    return torch.empty((rows, heads, capacity, size), dtype=like.dtype, device=like.device)
