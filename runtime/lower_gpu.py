"""The decode step on a GPU: the model's own modules, captured once as a CUDA graph and replayed for every token.

A step of a few rows is hundreds of small launches, which Python makes one by one. `StaticStep` is one step over buffers
that never move, as a plain function that reads nothing back to the host: it can be captured. It computes with the
patched modules, so that every policy runs as in a step of its own; attention reads the whole capacity of the keys and
values under a mask by position. Its buffers are lent to the caller's cache (`lend_rooms`), and to the next cache when
nobody holds anything of the last.

What a capture computes first is compared with the modules' own logits for the same tokens; whatever cannot be captured
or differs runs on the modules as before. CORESKIP_GRAPHS=0 in the environment leaves everything to them. `Capture`
alone needs a GPU, and has not run on one yet: the tests record a step's operations and replay them on the CPU.
"""

from __future__ import annotations

import copy
import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from ..predictors.anatomy import Anatomy
from .calls import NotCovered, check_call, compare
from .kv_cache import Entries, Rooms, known_rooms, leave_rooms, lend_rooms, length_of, sizes_of, unfit
from .patches import Usage
from .phases import Pass, tallied
from .reading import windows
from .selections import share_selections

logger = logging.getLogger("coreskip")

_MOST = 16  # captured steps that a model keeps; each has keys and values of its own
_LEAST = 256  # capacity of the smallest; the others' are its doubles

#: What a captured step has fixed: the layers whose attention, and MLP, it leaves out, and the weights that its
#: sequences chose.
Settled = tuple[tuple[frozenset[int], frozenset[int]], list[Tensor]]


class Capture:
    """A step on a GPU: run twice, so that everything is compiled and allocated, captured, and replayed when called."""

    _alone = threading.Lock()  # a process makes one capture at a time

    def __init__(self, step: StaticStep) -> None:
        self._device = step.ids.device
        with self._alone, torch.cuda.device(self._device):
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


class _StaticLayer(DynamicLayer):
    """Keys and values ``[rows, kv_heads, capacity, head_dim]``, of which every step writes those at index `at`.

    It says to be full: whatever a model derives from a cache's length on the host, a capture would freeze, and has to
    be noticed at the first comparison.
    """

    def __init__(self, keys: Tensor, values: Tensor, at: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = self._both = keys, values
        self._at, self.is_initialized = at, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for buffer, new in zip(self._both, (key_states, value_states), strict=True):
            buffer.index_copy_(2, self._at, new)
        return self._both


class StaticStep:
    """One token for each of some sequences, over buffers that never move; a second call does what the first did.

    Args:
        forward: of the model, unpatched.
        layers: of a dynamic cache, for the shapes of keys and values.
        capacity: how many positions there is memory for.
        kinds: each layer's type, and how far back it sees (0: all).
        additive: whether the attention adds its mask (else it takes a boolean one).
        entries: what a cache of this model's is.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        layers: list[Any],
        capacity: int,
        kinds: list[tuple[str, int]],
        additive: bool,
        entries: Entries,
    ) -> None:
        keys = layers[0].keys
        rows, device = keys.shape[0], keys.device
        self._entries = entries
        self._forward, self._kinds, self._dtype = forward, kinds, keys.dtype if additive else None
        self.rows, self.capacity = rows, capacity
        self.skipped = 0.0  # neurons that a call leaves out
        with torch.inference_mode(False):  # else nobody else could write to them
            self.ids = torch.zeros((rows, 1), dtype=torch.int64, device=device)
            self.positions = torch.zeros_like(self.ids)
            self.at = torch.zeros(1, dtype=torch.int64, device=device)
            self.seen = torch.zeros((rows, capacity), dtype=torch.bool, device=device)
            self._index = torch.arange(capacity, device=device)
            self.buffers = [(_buffer(layer.keys, capacity), _buffer(layer.values, capacity)) for layer in layers]
        self._layers = [_StaticLayer(*pair, self.at) for pair in self.buffers]
        self._unused = self._holders()
        self._cache: Callable[[], Cache | None] = lambda: None
        self._rooms: Callable[[], Rooms | None] = lambda: None

    # --- whose keys and values these are

    def adopt(self, cache: Cache) -> Rooms:
        """Copies a cache's keys and values into the buffers, which are the cache's from now on."""
        if self.ids.is_cuda:
            torch.cuda.synchronize(self.ids.device)  # whose they were may have used another stream
        rooms = lend_rooms(cache, self.buffers, self._entries)
        self._cache, self._rooms = weakref.ref(cache), weakref.ref(rooms)
        return rooms

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

    def _holders(self) -> int:
        counts = torch._C._storage_Use_Count
        return sum(counts(t.untyped_storage()._cdata) for pair in self.buffers for t in pair)

    # --- the step

    def load(self, named: dict[str, Any], past: int) -> None:
        """Takes over the arguments of a call of the model's forward, with `past` positions in the cache."""
        mask, positions = named.get("attention_mask"), named.get("position_ids")
        self.ids[:] = named["input_ids"]
        self.at.fill_(past)
        self.positions.copy_(self.at if positions is None else positions)
        self.seen[:, : past + 1] = True if mask is None else mask

    def __call__(self) -> Tensor:
        """Logits ``[rows, 1, vocabulary]`` of `ids`, whose keys and values are written."""
        cache = Cache(layers=list(self._layers))
        share_selections(self._cache(), cache)
        with tallied(self._note):
            output = self._forward(
                input_ids=self.ids,
                position_ids=self.positions,
                attention_mask=self._masks(),
                past_key_values=cache,
                use_cache=True,
            )
        return cast(Tensor, output.logits)

    def _note(self, step: Pass) -> None:
        self.skipped = step.skipped

    def _masks(self) -> Any:
        """As transformers prepares it: one mask ``[rows, 1, 1, capacity]``, or one for each type of layer."""
        behind = self.at - self._index
        masks = {}
        for kind, window in dict(self._kinds).items():
            visible = self.seen & (behind >= 0)
            if window:
                visible &= behind < window
            mask = visible[:, None, None]
            if self._dtype is not None:
                hidden = ~mask
                mask = torch.zeros_like(mask, dtype=self._dtype).masked_fill(hidden, torch.finfo(self._dtype).min)
            masks[kind] = mask
        return masks if len(masks) > 1 else next(iter(masks.values()))


def _buffer(like: Tensor, capacity: int) -> Tensor:
    rows, heads, _, size = like.shape
    return torch.empty((rows, heads, capacity, size), dtype=like.dtype, device=like.device)


@dataclass(eq=False)
class _Captured:
    step: StaticStep
    settled: Settled  # holding the chosen weights, so that no other tensor comes to lie there
    replay: Callable[[], Tensor]

    def suits(self, settled: Settled, rows: int) -> bool:
        (skips, chosen), (other_skips, other) = self.settled, settled
        same = len(chosen) == len(other) and all(
            a.data_ptr() == b.data_ptr() and a.shape == b.shape for a, b in zip(chosen, other, strict=True)
        )
        return same and skips == other_skips and self.step.rows == rows


class Host(Protocol):
    """A wrapped model, as its captured steps need it."""

    model: nn.Module
    anatomy: Anatomy
    usage: Usage

    @property
    def chooses_by_token(self) -> bool: ...

    @property
    def exits_early(self) -> bool: ...

    def check_modules(self) -> None: ...

    def settled(self, cache: Cache) -> Settled | str: ...


class CapturedSteps:
    """The captured decode steps of one wrapped model.

    `capture` is what makes a `StaticStep` replayable: `Capture` on a GPU, None where nothing is captured.
    """

    def __init__(self, host: Host) -> None:
        self._host: Host = weakref.proxy(host)  # which has this: a cycle would outlive `unwrap`
        self._lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        """The model's weights were moved, cast or loaded anew: what was captured reads the old ones."""
        self.refusal: str | None = None  # why this model's steps are not captured, if they are not
        self._captured: list[_Captured] = []  # the one used last at the end
        self._output: Any = None  # the class of what the model returns
        self._entries: Entries | None = None  # of caches that a captured step can write into, as far as is known
        self._device = next(self._host.model.parameters()).device.type
        wanted = self._device == "cuda" and os.environ.get("CORESKIP_GRAPHS") != "0"
        self.capture: Callable[[StaticStep], Callable[[], Tensor]] | None = Capture if wanted else None

    def forward(self, original: Callable[..., Any], named: dict[str, Any]) -> Any:
        """The output of one decode step, or None where the model's own modules have to compute it one by one.

        original: the model's own forward; named: its arguments.
        """
        if self.refusal is not None:
            return None
        try:
            check_call(named, self._device)
            self._check_call(named)
            with self._lock:
                logits = self._step(original, named)
        except NotCovered as reason:
            logger.debug("this step is not replayed: %s", reason)
            return None
        return None if logits is None else self._output(logits=logits, past_key_values=named["past_key_values"])

    @property
    def ready(self) -> bool:
        """Whether a captured step has been found to agree with the model's own modules."""
        return self.refusal is None and bool(self._captured)

    @torch.no_grad()
    def greedy(self, cache: Cache, token: int, count: int, ends: Sequence[int]) -> list[int]:
        """Appends `token` to the cache of one unpadded sequence and returns the likeliest tokens after it: `count`, or
        fewer up to one of `ends` or to the capacity; none where no captured step has the cache's keys and values.

        Nothing is read before all of them are made.
        """
        try:
            self._check_surroundings()
            self._host.check_modules()
        except NotCovered:
            return []
        with self._lock:
            rooms = self._known(cache)
            captured = next((c for c in self._captured if c.step.serves(rooms)), None)
            settled = self._host.settled(cache)
            if captured is None or rooms is None or isinstance(settled, str) or not captured.suits(settled, 1):
                return []
            step, past = captured.step, rooms.length
            count = min(count, step.capacity - past)
            step.load({"input_ids": token}, past + count - 1)
            tokens = []
            for at in range(past, past + count):
                step.at.fill_(at)
                step.positions.fill_(at)
                tokens.append(captured.replay()[:, -1].argmax(-1))
                step.ids[:, 0] = tokens[-1]
            made: list[int] = torch.cat(tokens).tolist()
            made = made[: next((i for i, t in enumerate(made) if t in ends), count) + 1]
            rooms.advance(len(made))
            self._host.usage.count(len(made), step.skipped * len(made))
            return made

    def _check_surroundings(self) -> None:
        if self._host.usage.counting:
            raise NotCovered("what thresholds keep is being counted")
        if self._host.exits_early:
            raise NotCovered("passes are to end before the last layer")
        if torch.is_autocast_enabled(self._device):
            raise NotCovered("autocast is on")
        if self._device == "cuda" and torch.cuda.is_current_stream_capturing():
            raise NotCovered("the caller is capturing a graph")

    def _check_call(self, named: dict[str, Any]) -> None:
        self._check_surroundings()
        rows, length = named["input_ids"].shape
        mask, positions = named.get("attention_mask"), named.get("position_ids")
        if length != 1:
            raise NotCovered("the step has several tokens a sequence")
        so_far = int(named["past_key_values"].get_seq_length()) + 1
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (rows, so_far)):
            raise NotCovered("the attention mask is not [rows, length so far]")
        if positions is not None and (positions.ndim != 2 or positions.shape[1] != 1):
            raise NotCovered("position_ids is not [rows, 1]")

    def _step(self, original: Callable[..., Any], named: dict[str, Any]) -> Tensor | None:
        cache: Cache = named["past_key_values"]
        settled = self._host.settled(cache)
        if isinstance(settled, str):
            raise NotCovered(settled)
        rows = int(named["input_ids"].shape[0])
        suiting = [c for c in self._captured if c.suits(settled, rows)]
        rooms = self._known(cache)
        captured = next((c for c in suiting if c.step.serves(rooms)), None)
        if captured is None or rooms is None:
            captured = self._vacant(suiting, self._length(cache, rows), cache)
            if captured is None:
                return self._new(original, named, settled)
            rooms = captured.step.adopt(cache)
        self._captured.remove(captured)
        self._captured.append(captured)
        captured.step.load(named, rooms.length)
        logits = captured.replay().clone()
        rooms.advance(1)
        self._host.usage.count(rows, captured.step.skipped)
        return logits

    def _length(self, cache: Cache, rows: int) -> int:
        """Of a cache that comes here for the first time, or was moved."""
        self._host.check_modules()
        if self._entries is None:
            self._entries = Entries(self._device, windows(self._host.model.config, len(self._host.anatomy)))
        reason = unfit(cache, self._entries)
        if reason is not None:
            raise NotCovered(reason)
        first: Any = cache.layers[0]
        if first.keys.shape[0] != rows:
            raise NotCovered("the KV cache has another number of rows")
        return length_of(first)

    def _known(self, cache: Cache) -> Rooms | None:
        return None if self._entries is None else known_rooms(cache, 1, self._entries)

    def _vacant(self, suiting: list[_Captured], length: int, cache: Cache) -> _Captured | None:
        """What was captured for other sequences; taken from one that may go on only where there are too many."""
        fitting = [c for c in suiting if c.step.capacity > length]
        free = [c for c in fitting if c.step.is_free_for(cache)]
        if free:
            return min(free, key=lambda c: c.step.capacity)
        if not fitting or len(self._captured) < _MOST:
            return None
        fitting[0].step.take_away()
        if fitting[0].step.is_free_for(cache):
            return fitting[0]
        self._captured.remove(fitting[0])  # somebody has taken keys or values from the cache, and still holds them
        return None

    def _new(self, original: Callable[..., Any], named: dict[str, Any], settled: Settled) -> Tensor | None:
        """Captures a step and compares it with the model's own modules, which run on a copy of the cache. None: they
        do not agree, and nothing has happened to the cache."""
        cache = named["past_key_values"]
        twin = copy.deepcopy(cache)
        expected = original(**{**named, "past_key_values": twin})
        self._learn(cache.layers[0].keys.dtype, twin.layers)
        del twin
        try:
            length = length_of(cache.layers[0])
            capacity = max(_LEAST, 1 << length.bit_length())
            step = StaticStep(original, cache.layers, capacity, *self._attention(), cast(Entries, self._entries))
            rooms = step.adopt(cache)
            step.load(named, length)
            assert self.capture is not None
            replay = self.capture(step)
            rooms.settle()  # what the capture holds
            logits = replay().clone()
            compare(logits, expected.logits, self._host.chooses_by_token)
        except Exception as error:  # a capture fails in as many ways as there are modules
            self._refuse(error)
            lent = self._known(cache)
            if lent is not None:
                leave_rooms(lent)
            return None
        if len(self._captured) == _MOST:
            del self._captured[0]
        self._captured.append(_Captured(step, settled, replay))
        self._output = type(expected)
        rooms.advance(1)
        return logits

    def _learn(self, dtype: torch.dtype, made: list[Any]) -> None:
        """What this model's keys and values are, from layers to which its modules have added some of their own."""
        entries = cast(Entries, self._entries)
        if made[0].keys.dtype != dtype:
            raise NotCovered("the KV cache is not in the model's dtype")
        if entries.sizes is None:
            self._entries = replace(entries, sizes=[sizes_of(layer) for layer in made], dtype=dtype)

    def _attention(self) -> tuple[list[tuple[str, int]], bool]:
        """Each layer's type and how far back it sees, and whether masks are added."""
        config: Any = self._host.model.config
        found = windows(config, len(self._host.anatomy))
        config = config.get_text_config()
        types = [""] * len(found) if len(set(found)) == 1 else getattr(config, "layer_types", [])
        kinds = list(zip(types, found, strict=False))
        if len(kinds) < len(found) or len(set(kinds)) > len(set(types)):
            raise NotCovered("its layers see differently far, and their types do not tell how far")
        if config._attn_implementation not in ("sdpa", "eager"):
            raise NotCovered(f"its attention is {config._attn_implementation!r}, not 'sdpa' or 'eager'")
        return kinds, config._attn_implementation == "eager"

    def _refuse(self, error: Exception) -> None:
        self.refusal = str(error).partition("\n")[0] or type(error).__name__
        self._captured.clear()
        logger.warning(
            "decode steps of this %s are not captured in a CUDA graph, which makes them slower: %s",
            self._host.anatomy.model_type,
            self.refusal,
        )
