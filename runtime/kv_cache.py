"""Room to grow for transformers' dynamic KV cache, so that a decode step can write into it in place.

A `DynamicCache` concatenates: every step copies all keys and values. A layer that has been given room keeps them in
buffers with spare capacity; whatever transformers does with the layer afterwards (cropping, beam reordering, another
forward pass of the model's own) works on views of the used part, and what replaces them is taken in again.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..kernels.step import KeyValues

_ROOMS = "_coreskip_rooms"
_MARK = "_coreskipplain_class"


@dataclass(eq=False)
class Room:
    """keys, values: [rows, kv_heads, capacity, head_dim]; entries start..end are in use."""

    keys: Tensor
    values: Tensor
    start: int
    end: int

    def holds(self, keys: Tensor) -> bool:
        """Whether `keys` is a view of this room's keys over all rows and heads."""
        mine = self.keys
        return (
            keys.untyped_storage().data_ptr() == mine.untyped_storage().data_ptr()
            and keys.stride() == mine.stride()
            and (keys.shape[0], keys.shape[1], keys.shape[3]) == (mine.shape[0], mine.shape[1], mine.shape[3])
        )


class _Roomy:
    """What a cache layer that has been given room has instead of two attributes. Copied into a subclass of the layer's
    class rather than inherited: an instance can change its class only along one line of bases."""

    _room: Room | None
    _loose: tuple[Any, Any]  # keys and values where there is no room (any more)

    @property
    def keys(self) -> Any:
        return self._used("keys", 0)

    @keys.setter
    def keys(self, keys: Any) -> None:
        room = self._room
        if room is not None and isinstance(keys, Tensor) and room.holds(keys):
            room.start = (keys.storage_offset() - room.keys.storage_offset()) // room.keys.stride(2)
            room.end = room.start + keys.shape[2]
        else:
            self._loose = (keys, self.values)
            self._room = None

    @property
    def values(self) -> Any:
        return self._used("values", 1)

    @values.setter
    def values(self, values: Any) -> None:
        if self._room is None:
            self._loose = (self._loose[0], values)

    def _used(self, name: str, at: int) -> Any:
        room = self._room
        if room is None:
            return self._loose[at]
        start, layer = room.start, cast(Any, self)
        if layer.is_sliding and not layer.record_past:
            start = max(start, room.end - layer.sliding_window + 1)
        return getattr(room, name)[:, :, start : room.end]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A pass of the model's own modules writes into the room, too, while there is some."""
        room, more = self._room, key_states.shape[2]
        if room is None or cast(Any, self).is_sliding or room.end + more > room.keys.shape[2]:
            plain = cast(Any, plain_class(type(self)))
            return plain.update(self, key_states, value_states, *args, **kwargs)
        room.keys[:, :, room.end : room.end + more] = key_states
        room.values[:, :, room.end : room.end + more] = value_states
        room.end += more
        return self.keys, self.values


@functools.cache
def _roomy(cls: type) -> type:
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {name: value for name, value in vars(_Roomy).items() if not name.startswith("__")}
    return type(cls.__name__, (cls,), {**names, **own, _MARK: cls})


def plain_class(cls: type) -> type:
    """The class of a layer before it was given room."""
    return cast(type, getattr(cls, _MARK, cls))


class Rooms:
    """The rooms of one cache's layers."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.rooms: list[Room] = [layer._room for layer in layers]
        self.length = length_of(layers[0])
        self._first = [length_of(layer) - room.end for layer, room in zip(layers, self.rooms, strict=True)]

    @functools.cached_property
    def table(self) -> KeyValues:
        """As the native step reads them."""
        return KeyValues([r.keys for r in self.rooms], [r.values for r in self.rooms], self._first)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied cache makes its own: this one's table points into the original's buffers."""

    def fits(self, more: int) -> bool:
        """Whether nothing has been moved since, and `more` positions fit. Takes note of positions cut off the end."""
        length = length_of(self.layers[0])
        for layer, room, first in zip(self.layers, self.rooms, self._first, strict=True):
            if layer._room is not room or room.end + more > room.keys.shape[2] or room.end + first != length:
                return False
        self.length = length
        return True

    def advance(self, more: int) -> None:
        self.length += more
        for layer, room in zip(self.layers, self.rooms, strict=True):
            room.end += more
            if layer.is_sliding:
                layer.cumulative_length += more

    @property
    def rows(self) -> int:
        return self.rooms[0].keys.shape[0]


def known_rooms(cache: Cache, more: int) -> Rooms | None:
    """The rooms that an earlier step found for the cache, if they still hold and `more` positions fit."""
    rooms = cache.__dict__.get(_ROOMS)
    return rooms if isinstance(rooms, Rooms) and rooms.layers is cache.layers and rooms.fits(more) else None


def make_rooms(cache: Cache, more: int) -> Rooms | str:
    """Gives the cache's layers room for `more` positions; or says why they cannot have it."""
    reason = unfit(cache, "cpu")
    if reason is not None:
        return reason
    for layer in cache.layers:
        _give_room(layer, more)
    rooms = cache.__dict__[_ROOMS] = Rooms(cache.layers)
    return rooms


def lend_rooms(cache: Cache, buffers: Sequence[tuple[Tensor, Tensor]]) -> Rooms:
    """Moves the cache's layers into somebody's (keys, values), position i to index i.

    The rest becomes zero: what a mask weighs with 0 must not be a NaN of an earlier sequence. Who holds these buffers
    can tell from the number of views on them whether the cache, or anyone who took something from it, still needs them.
    """
    layer: Any
    for layer, (keys, values) in zip(cache.layers, buffers, strict=True):
        end = length_of(layer)
        start = end - layer.keys.shape[2]
        _move(layer, keys[:], values[:], start)
        for buffer in (keys, values):
            buffer[:, :, :start] = 0
            buffer[:, :, end:] = 0
    rooms = cache.__dict__[_ROOMS] = Rooms(cache.layers)
    return rooms


def leave_rooms(rooms: Rooms) -> None:
    """Copies what layers keep in rooms to tensors of their own."""
    for layer in rooms.layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()


def take_back(cache: Cache, positions: int) -> None:
    """Forgets the last positions of a cache that has just been given room for them."""
    cast(Rooms, cache.__dict__[_ROOMS]).advance(-positions)


def twin_of(cache: Any) -> Any:
    """A cache that goes its own way from here, without a copy of what both hold."""
    twin = copy.copy(cache)
    twin.__dict__ = {name: value for name, value in vars(cache).items() if name != _ROOMS}
    twin.layers = []
    for layer in cache.layers:
        own = object.__new__(plain_class(type(layer)))
        own.__dict__.update({name: value for name, value in vars(layer).items() if name not in ("_room", "_loose")})
        own.keys, own.values = layer.keys, layer.values
        twin.layers.append(own)
    return twin


def unfit(cache: Cache, device: str) -> str | None:
    """Why the cache's layers cannot have rooms on a type of device; None where they can."""
    if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
        return f"the KV cache is a {type(cache).__name__}"
    lengths = set()
    layer: Any
    for layer in cache.layers:
        if plain_class(type(layer)) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"a KV cache layer is a {type(layer).__name__}"
        if not layer.is_initialized or layer.keys.device.type != device:
            return f"a KV cache layer is empty or not on the {device.upper()}"
        lengths.add(length_of(layer))
    return None if len(lengths) == 1 else "the KV cache's layers differ in length"


def length_of(layer: Any) -> int:
    """Positions that a layer has seen."""
    if layer.is_sliding:
        return int(layer.cumulative_length)
    room = layer.__dict__.get("_room")
    return int(layer.keys.shape[2]) if room is None else room.end - room.start


def _give_room(layer: Any, more: int) -> None:
    """Copies a layer's keys and values into buffers of about twice the size, unless they lie in large enough ones."""
    room = layer.__dict__.get("_room")
    if room is not None and room.end + more <= room.keys.shape[2]:
        return
    keys, values = layer.keys, layer.values
    rows, heads, used, _ = keys.shape
    capacity = -(-(max(2 * used, used + 128) + more) // 128) * 128
    new_keys, new_values = (
        torch.empty((rows, heads, capacity, t.shape[3]), dtype=t.dtype, device="cpu") for t in (keys, values)
    )
    _move(layer, new_keys, new_values, 0)


def _move(layer: Any, keys: Tensor, values: Tensor, start: int) -> None:
    """Into these buffers, from index `start` on."""
    end = start + layer.keys.shape[2]
    keys[:, :, start:end], values[:, :, start:end] = layer.keys, layer.values
    if plain_class(type(layer)) is type(layer):
        for name in ("keys", "values"):
            del layer.__dict__[name]
        layer.__class__ = _roomy(cast(Any, type(layer)))
    layer._room, layer._loose = Room(keys, values, start, end), (None, None)
