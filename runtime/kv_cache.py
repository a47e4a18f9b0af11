"""Room to grow for transformers' dynamic KV cache, so that a decode step can write into it in place.

A `DynamicCache` concatenates: every step copies all keys and values. A layer that has been given room keeps them in
buffers with spare capacity; whatever transformers does with the layer afterwards (cropping, beam reordering, another
forward pass of the model's own) works on views of the used part, and what replaces them is taken in again.

Whoever takes keys or values from a plain cache has tensors that no later step changes, and whose change no later step
sees. So it is here: where a view of a room is still held by somebody, the next step goes on in a room of its own. And
what is copied or pickled is the plain layer that it would be without room.

No address of a cache's tensors reaches native code before `unfit` has compared the cache with the model (`Entries`).
"""

from __future__ import annotations

import copy
import copyreg
import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..kernels.step import KeyValues, Recurrent, StepModel
from .recurrent_states import States, StateSizes, are_states, copies, is_recurrent, put_back, same, states_of

_MARK = "_coreskip_library_class"

Span = tuple[int, int]
Sizes = tuple[int, int, int]


class Room:
    """keys, values: [rows, kv_heads, capacity, head_dim]; entries start..end are in use.

    of_values: start and end of the values in use, while they differ from the keys': between two assignments.
    views: what was handed out last, by name: the view and its start and end. shared: somebody holds one of an earlier
    state.
    """

    __slots__ = ("_alone", "capacity", "end", "keys", "of_values", "shared", "start", "values", "views")

    def __init__(self, keys: Tensor, values: Tensor, start: int, end: int) -> None:
        self.keys, self.values, self.start, self.end = keys, values, start, end
        self.capacity = int(keys.shape[2])
        self.of_values: Span | None = None
        self.views: dict[str, tuple[Tensor, Span]] = {}
        self.shared = False
        self._alone = self._holders()

    def used(self, name: str) -> Span:
        if name == "values" and self.of_values is not None:
            return self.of_values
        return self.start, self.end

    def move(self, name: str, span: Span) -> None:
        """The keys, or the values, in use are others now."""
        if name == "keys":
            values = self.used("values")
            self.start, self.end = span
        else:
            values = span
        self.of_values = None if values == (self.start, self.end) else values

    def span_of(self, name: str, given: Any) -> Span | None:
        """Which entries `given` is a view of; None where it is something else."""
        mine: Tensor = getattr(self, name)
        if not isinstance(given, Tensor) or given.ndim != 4 or (given.dtype, given.device) != (mine.dtype, mine.device):
            return None
        if given.layout is not torch.strided or given.stride() != mine.stride():
            return None
        if (given.shape[:2], given.shape[3]) != (mine.shape[:2], mine.shape[3]):
            return None
        if given.untyped_storage().data_ptr() != mine.untyped_storage().data_ptr():
            return None
        start, rest = divmod(int(given.storage_offset()) - int(mine.storage_offset()), int(mine.stride(2)))
        return None if rest or start < 0 else (start, start + int(given.shape[2]))

    def is_ours(self) -> bool:
        """Whether nobody else would notice that entries are added: no view that was handed out is held any more."""
        if self.views:
            self.views = {}
            self.shared = self.shared or self._holders() != self._alone
        return not self.shared

    def settle(self) -> None:
        """Those who hold the room's buffers now are its own."""
        self._alone = self._holders()

    def takes(self, keys: Tensor, values: Tensor) -> bool:
        """Whether these can be added as they are, in place."""
        like = self.keys
        return (
            self.end + keys.shape[2] <= self.capacity
            and self.of_values is None
            and keys.shape == (*like.shape[:2], keys.shape[2], like.shape[3])
            and values.shape == (*like.shape[:2], keys.shape[2], self.values.shape[3])
            and (keys.dtype, keys.device) == (like.dtype, like.device)
            and (values.dtype, values.device) == (self.values.dtype, like.device)
            and self.is_ours()
        )

    def _holders(self) -> int:
        count = torch._C._storage_Use_Count
        return int(sum(count(t.untyped_storage()._cdata) for t in (self.keys, self.values)))


class _Roomy:
    """What a cache layer that has been given room has instead of two attributes. Copied into a subclass of the layer's
    class rather than inherited: an instance can change its class only along one line of bases."""

    _room: Room | None
    _loose: dict[str, Any]  # keys and values where there is no room (any more)

    @property
    def keys(self) -> Any:
        return _used(self, "keys")

    @keys.setter
    def keys(self, keys: Any) -> None:
        _replace(self, "keys", keys)

    @property
    def values(self) -> Any:
        return _used(self, "values")

    @values.setter
    def values(self, values: Any) -> None:
        _replace(self, "values", values)

    def get_seq_length(self) -> int:
        """Without making a view."""
        room = self._room
        if room is None or cast(Any, self).is_sliding:
            return int(cast(Any, library_class(type(self))).get_seq_length(self))
        return room.end - room.start

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A pass of the model's own modules writes into the room, too, while there is some. With gradients it does not:
        what it saves for the backward pass must not change."""
        room = self._room
        sliding = cast(Any, self).is_sliding or torch.is_grad_enabled()
        if room is None or sliding or not room.takes(key_states, value_states):
            plain = cast(Any, library_class(type(self)))
            return plain.update(self, key_states, value_states, *args, **kwargs)
        more = key_states.shape[2]
        room.keys[:, :, room.end : room.end + more] = key_states
        room.values[:, :, room.end : room.end + more] = value_states
        room.end += more
        return self.keys, self.values

    def activate_past_recording(self) -> None:
        """A room still holds what a plain window layer has forgotten."""
        room, layer = self._room, cast(Any, self)
        if room is not None and not layer.record_past:
            room.start = max(room.start, room.end - layer.sliding_window + 1)
        cast(Any, library_class(type(self))).activate_past_recording(self)

    def __copy__(self) -> Any:
        return _plain(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = _plain(self, apart=True)
        twin.__dict__.update(copy.deepcopy(vars(twin) if self._room is None else _others(self), memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = _plain(self, apart=True)
        return copyreg._reconstructor, (type(plain), object, None), vars(plain)  # type: ignore[attr-defined]


_OWN = ("keys", "values", "get_seq_length", "update", "__copy__", "__deepcopy__", "__reduce_ex__")
_OF_WINDOWS = ("activate_past_recording",)


def _used(layer: Any, name: str) -> Any:
    room = layer._room
    if room is None:
        return layer._loose[name]
    start, end = room.used(name)
    if layer.is_sliding and not layer.record_past:
        start = max(start, end - layer.sliding_window + 1)
    view, span = room.views.get(name, (None, None))
    if span != (start, end):  # the one that was handed out last shows other entries
        view = getattr(room, name)[:, :, start:end]
        room.views[name] = view, (start, end)
    return view


def _replace(layer: Any, name: str, given: Any) -> None:
    room = layer._room
    if room is None:
        layer._loose[name] = given
        return
    span = room.span_of(name, given)
    if span is None:
        layer._loose = {"keys": layer.keys, "values": layer.values, name: given}
        layer._room = None
    else:
        room.move(name, span)
        room.views[name] = given, span


def _others(layer: Any) -> dict[str, Any]:
    """All that a layer has but keys and values."""
    return {name: value for name, value in vars(layer).items() if name not in ("_room", "_loose")}


def _plain(layer: Any, apart: bool = False) -> Any:
    """A layer of the plain class with the same keys and values. apart: in memory of their own, not in that of a room,
    all of whose capacity would be copied or written with them."""
    twin: Any = object.__new__(library_class(type(layer)))
    keys, values = layer.keys, layer.values
    if apart and layer._room is not None:
        keys, values = (t.detach().clone().requires_grad_(t.requires_grad) for t in (keys, values))
    twin.__dict__.update(_others(layer), keys=keys, values=values)
    return twin


@functools.cache
def _roomy(cls: type) -> type:
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {name: vars(_Roomy)[name] for name in (*_OWN, *(name for name in _OF_WINDOWS if hasattr(cls, name)))}
    return type(cls.__name__, (cls,), {**names, **own, _MARK: cls})


def library_class(cls: type) -> type:
    """The class of a layer before it was given room."""
    return cast(type, getattr(cls, _MARK, cls))


# --- what fits a model ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entries:
    """A model's keys and values, as steps that write them in place take them.

    windows: of each layer, how far back it sees (0: all). sizes: of each layer, KV heads, and the size of a key and of
    a value; None where nothing but the model's modules knows. dtype: likewise. at: of which layers of a cache all this
    is, where its others are the modules'; None: of all. alone: whether those others have to be empty: their layers do
    nothing while they are (Mllama). states: of the layers that hold a recurrence's states in place of keys and values,
    which of a cache's they are, and the sizes of a sequence's.
    """

    device: str
    windows: Sequence[int]
    sizes: Sequence[Sizes] | None = None
    dtype: torch.dtype | None = None
    at: tuple[int, ...] | None = None
    alone: bool = False
    states: tuple[tuple[int, StateSizes], ...] = ()

    @classmethod
    def of(cls, model: StepModel, at: tuple[int, ...] | None = None) -> Entries:
        """Of a model that the native step runs."""
        kept = [(i, cast(Any, layer.attention)) for i, layer in enumerate(model.layers) if layer.attention is not None]
        states = tuple((i, found.sizes) for i, found in kept if isinstance(found, Recurrent))
        attentions = [found for _, found in kept if not isinstance(found, Recurrent)]
        sizes, own = [a.sizes for a in attentions], tuple(i for i, a in kept if not isinstance(a, Recurrent))
        alone = at is None and len(kept) < len(model.layers)
        at = own if alone or states else at
        return cls("cpu", [a.window for a in attentions], sizes, model.dtype, at, alone, states)

    def layers_of(self, cache: Any) -> list[Any]:
        """The layers of a cache that hold the keys and values."""
        layers: list[Any] = cache.layers
        return layers if self.at is None else [layers[index] for index in self.at if index < len(layers)]

    def recurrent_of(self, cache: Any) -> list[Any]:
        """The layers of a cache that hold states."""
        return [cache.layers[index] for index, _ in self.states if index < len(cache.layers)]


# What a pass asks of a cache and its layers. Who has a method of his own for it wants it called.
_ASKED = ("update", "get_seq_length", "get_mask_sizes", "get_query_offset")


def unfit(cache: Any, entries: Entries) -> str | None:
    """Why steps cannot write into the cache in place; None where they can.

    Whoever asks has the model's own modules run such a cache: they compute, or raise, what they would without coreskip.
    """
    reason = _of_another_kind(cache, entries)
    if reason is not None:
        return reason
    layers = entries.layers_of(cache)
    if not all(layer.is_initialized and _are_entries(layer.keys, layer.values, entries) for layer in layers):
        return f"a KV cache layer is empty, or not on the {entries.device.upper()} in the model's dtype"
    first = layers[0]
    if any(length_of(layer) != length_of(first) or layer.keys.shape[0] != first.keys.shape[0] for layer in layers):
        return "the KV cache's layers differ in length or rows"
    if any(layer.keys.dtype != first.keys.dtype for layer in layers):
        return "the KV cache's layers differ in dtype"
    if not all(_sees(layer, window) for layer, window in zip(layers, entries.windows, strict=True)):
        return "the KV cache forgets what the model still sees"
    if entries.sizes is not None:
        for layer, sizes in zip(layers, entries.sizes, strict=True):
            if sizes_of(layer) != sizes:
                return f"a KV cache layer has not the model's {sizes[0]} heads of {sizes[1]}"
    for layer, (_, of_state) in zip(entries.recurrent_of(cache), entries.states, strict=True):
        if not are_states(layer, first.keys.shape[0], of_state, first.keys.dtype):
            return "what a recurrence holds is not what steps write in place"
    return None


def _of_another_kind(cache: Any, entries: Entries) -> str | None:
    """Why a cache is not a growing one with plain layers, as many as the model has; None where it is."""
    if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
        return f"the KV cache is a {type(cache).__name__}"
    if any(getattr(type(cache), name) is not getattr(DynamicCache, name) or name in vars(cache) for name in _ASKED):
        return "the KV cache has methods of its own"
    layers = entries.layers_of(cache)
    if len(layers) != len(entries.windows) or len({id(layer) for layer in layers}) != len(layers):
        return f"the KV cache has not {len(entries.windows)} layers"
    recurrent = entries.recurrent_of(cache)
    if len(recurrent) != len(entries.states) or not all(map(is_recurrent, recurrent)):
        return "the KV cache has not the states of all recurrences"
    others = (layer for layer in cache.layers if layer not in layers and layer not in recurrent)
    if entries.alone and any(getattr(layer, "is_initialized", True) for layer in others):
        return "the KV cache holds what layers attend to that are idle without"
    for layer in layers:
        if not is_plain(layer) or any(name in vars(layer) for name in _ASKED):
            return f"a KV cache layer is a {type(layer).__name__}, or has methods of its own"
    return None


def _are_entries(keys: Any, values: Any, entries: Entries) -> bool:
    return (
        isinstance(keys, Tensor)
        and isinstance(values, Tensor)
        and keys.ndim == values.ndim == 4
        and keys.shape[:3] == values.shape[:3]
        and keys.numel() > 0
        and values.numel() > 0
        and keys.layout is values.layout is torch.strided
        and keys.dtype == values.dtype
        and entries.dtype in (None, keys.dtype)
        and keys.device == values.device
        and keys.device.type == entries.device
    )


def _sees(layer: Any, window: int) -> bool:
    """Whether a layer has every position that a model with this window looks back at, and none twice."""
    has, length = int(layer.keys.shape[2]), length_of(layer)
    if layer.is_sliding and layer.sliding_window != window:
        return False
    return has <= length and has >= (min(length, window - 1) if layer.is_sliding else length)


def sizes_of(layer: Any) -> Sizes:
    return layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]


def length_of(layer: Any) -> int:
    """Positions that a layer has seen."""
    if layer.is_sliding:
        return int(layer.cumulative_length)
    room = layer.__dict__.get("_room")
    return int(layer.keys.shape[2]) if room is None else room.end - room.start


# --- the rooms of a cache ---------------------------------------------------------------------------------------------


class Rooms:
    """The rooms of one cache's layers, for steps of a model with these `entries`, and its layers that hold states."""

    def __init__(self, layers: list[Any], entries: Entries, recurrent: Sequence[Any] = ()) -> None:
        self.layers, self.entries, self.recurrent = layers, entries, recurrent
        self._states = [states_of(layer) for layer in recurrent]
        self.rooms: list[Room] = [layer._room for layer in layers]
        self.length = length_of(layers[0])
        self._first = [length_of(layer) - room.end for layer, room in zip(layers, self.rooms, strict=True)]
        self._starts = [room.start for room in self.rooms]
        self._parts: dict[Span, KeyValues] = {}

    @functools.cached_property
    def table(self) -> KeyValues:
        """As the native step reads them."""
        return KeyValues([r.keys for r in self.rooms], [r.values for r in self.rooms], self._first, self._states)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """States are afterwards what they are now, whatever steps write to them."""
        before = copies(self.recurrent)
        try:
            yield
        finally:
            put_back(self._states, before)

    def part(self, begin: int, end: int) -> KeyValues:
        """Those of some layers alone."""
        if (begin, end) not in self._parts:
            rooms = self.rooms[begin:end]
            tables = KeyValues([r.keys for r in rooms], [r.values for r in rooms], self._first[begin:end])
            self._parts[begin, end] = tables
        return self._parts[begin, end]

    def fits(self, more: int) -> bool:
        """Whether nothing has been moved since, and `more` positions can be written. Takes note of positions cut off
        the end."""
        layers = self.layers
        if any(x.record_past for x in self.recurrent) or not all(
            map(same, self._states, map(states_of, self.recurrent))
        ):
            return False
        if len(layers) != len(self.rooms) or getattr(layers[0], "_room", None) is not self.rooms[0]:
            return False
        length = length_of(layers[0])
        for layer, room, first, start in zip(layers, self.rooms, self._first, self._starts, strict=True):
            if getattr(layer, "_room", None) is not room or room.of_values is not None:
                return False
            if room.end + more > room.capacity or room.end + first != length:
                return False
            if room.start != start and not (layer.is_sliding and _sees(layer, layer.sliding_window)):
                return False
            if (room.views or room.shared) and not room.is_ours():
                return False
        self.length = length
        return True

    def advance(self, more: int) -> None:
        self.length += more
        for layer, room in zip(self.layers, self.rooms, strict=True):
            room.end += more
            if layer.is_sliding:
                layer.cumulative_length += more

    def settle(self) -> None:
        """Those who hold the buffers now are the rooms' own."""
        for room in self.rooms:
            room.settle()

    @property
    def is_ours(self) -> bool:
        """Whether nobody else holds anything of the rooms."""
        return all(room.is_ours() for room in self.rooms)

    @property
    def rows(self) -> int:
        return int(self.rooms[0].keys.shape[0])


# Beside the caches, not in them: what is pickled or copied of a cache is what transformers knows of it.
_ROOMS: weakref.WeakKeyDictionary[Cache, Rooms] = weakref.WeakKeyDictionary()


def known_rooms(cache: Cache, more: int, entries: Entries) -> Rooms | None:
    """The rooms that an earlier step found for the cache, if they still hold and `more` positions fit."""
    rooms = _ROOMS.get(cache)
    if rooms is None or rooms.entries is not entries:
        return None
    layers = entries.layers_of(cache)
    if rooms.layers is not layers and (entries.at is None or list(map(id, rooms.layers)) != list(map(id, layers))):
        return None
    if entries.states and list(map(id, rooms.recurrent)) != list(map(id, entries.recurrent_of(cache))):
        return None
    return rooms if rooms.fits(more) else None


def make_rooms(cache: Cache, more: int, entries: Entries, snug: bool = False) -> Rooms | str:
    """Gives the cache's layers room for `more` positions, and unless `snug` for as many again; or says why they cannot
    have it."""
    reason = unfit(cache, entries)
    if reason is not None:
        return reason
    layers = entries.layers_of(cache)
    for layer in layers:
        _give_room(layer, more, snug)
    rooms = _ROOMS[cache] = Rooms(layers, entries, entries.recurrent_of(cache))
    return rooms


def first_rooms(cache: Cache, rows: int, more: int, entries: Entries) -> Rooms | str:
    """Gives an empty cache room for the first `more` positions of so many rows; or says why it cannot have it, and has
    changed nothing then."""
    reason = _of_another_kind(cache, entries)
    if reason is not None:
        return reason
    layers: list[Any] = cache.layers
    if entries.sizes is None or entries.dtype is None or any(layer.is_initialized for layer in layers):
        return "the KV cache is not a new one"
    if any(layer.is_sliding and layer.sliding_window != w for layer, w in zip(layers, entries.windows, strict=True)):
        return "the KV cache forgets what the model still sees"
    for layer, (heads, of_key, of_value) in zip(layers, entries.sizes, strict=True):
        keys, values = (torch.empty((rows, heads, 0, d), dtype=entries.dtype, device="cpu") for d in (of_key, of_value))
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        _give_room(layer, more)
    rooms = _ROOMS[cache] = Rooms(layers, entries)
    return rooms


def lend_rooms(cache: Cache, buffers: Iterable[tuple[Tensor, Tensor]], entries: Entries) -> Rooms:
    """Moves the cache's layers into somebody's (keys, values), position i to index i, one after the other.

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
    rooms = _ROOMS[cache] = Rooms(cache.layers, entries)
    rooms.settle()  # rooms of an earlier loan are gone only now
    return rooms


def leave_rooms(rooms: Rooms) -> None:
    """Copies what layers keep in rooms to tensors of their own."""
    for layer in rooms.layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()


def take_back(cache: Cache, positions: int, states: Sequence[States] = ()) -> None:
    """Forgets the last positions of a cache that has just been given room for them; states: what its recurrences held
    before."""
    rooms = _ROOMS[cache]
    rooms.advance(-positions)
    if states:
        put_back(rooms._states, states)


def twin_of(cache: Any) -> Any:
    """A cache that goes its own way from here, without a copy of what both hold, but for what passes write to in place:
    the states of recurrences."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) if is_plain(layer) else copy.deepcopy(layer) for layer in cache.layers]
    return twin


def passing_twin(cache: Any) -> Any:
    """A cache for one pass that sees what `cache` holds: of what the pass adds to keys and values nothing is kept, so
    that no more than one layer is ever there twice."""
    twin = twin_of(cache)
    for layer in twin.layers:
        if is_plain(layer):
            layer.__class__ = _passing(cast(Any, type(layer)))
    return twin


@functools.cache
def _passing(cls: Any) -> type:
    def update(layer: Any, *args: Any, **kwargs: Any) -> Any:
        before = layer.keys, layer.values
        made = cls.update(layer, *args, **kwargs)
        layer.keys, layer.values = before
        return made

    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "update": update})


def is_plain(layer: Any) -> bool:
    """Whether a cache's layer has keys and values, all of them or those of a window, and nothing else."""
    return library_class(type(layer)) in (DynamicLayer, DynamicSlidingWindowLayer)


def _give_room(layer: Any, more: int, snug: bool = False) -> None:
    """Copies a layer's keys and values into buffers of about twice the size (`snug`: of the size needed), unless they
    lie in large enough ones that nobody else looks at."""
    room = layer.__dict__.get("_room")
    if room is not None and room.end + more <= room.capacity and room.is_ours():
        return
    keys, values = layer.keys, layer.values
    rows, heads, used, _ = keys.shape
    most, whole = (used, 16) if snug else (max(2 * used, used + 128), 128)
    capacity = -(-(most + more) // whole) * whole
    with torch.inference_mode(False):  # else no pass outside of it could write to them
        new_keys, new_values = (
            torch.empty((rows, heads, capacity, t.shape[3]), dtype=t.dtype, device=t.device) for t in (keys, values)
        )
    _move(layer, new_keys, new_values, 0)


def _move(layer: Any, keys: Tensor, values: Tensor, start: int) -> None:
    """Into these buffers, from index `start` on."""
    end = start + layer.keys.shape[2]
    with torch.no_grad():
        keys[:, :, start:end], values[:, :, start:end] = layer.keys, layer.values
    if library_class(type(layer)) is type(layer):
        for name in ("keys", "values"):
            del layer.__dict__[name]
        layer.__class__ = _roomy(cast(Any, type(layer)))
    layer._room, layer._loose = Room(keys, values, start, end), {}
