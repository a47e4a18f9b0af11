"""Decode steps on a GPU, captured once as CUDA graphs and replayed for every token.

What is captured is a lowering of the whole step (gpu_model.py), for several tokens of each sequence, too, or, where
that does not cover the model or its plan, one token through the model's own patched modules (gpu_modules.py). Both
compute over memory that never moves (gpu_place.py), which is lent to the caller's cache (`lend_rooms`), and to the next
cache when nobody holds anything of the last. There is one graph for each number of sequences, class of capacities, of
tokens, and set of choices; neurons that prompts chose are lists in a place's memory, no part of a graph.

What a capture computes first is compared with the modules' own logits for the same tokens, the first one at other
positions, too (gpu_check.py), and all where texts reach other ranges of lengths (selfcheck.py); whatever cannot be
captured or differs runs on the modules as before. CORESKIP_GRAPHS=0 in the environment leaves everything to them,
CORESKIP_GRAPHS=modules captures nothing but modules.

Captured modules have run on an H200. The lowering of the whole step has run on none yet: tests record a step's
operations and replay them on the CPU.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..kernels.gpu_step import MAX_ROWS
from ..kernels.sparse import SparseMLP
from ..predictors.anatomy import Anatomy
from .calls import Disagrees, NotCovered, NotThisCall, check_call, close, compare
from .gpu_check import check_elsewhere
from .gpu_lowering import GpuLowering, GpuStep
from .gpu_modules import ModuleStep, attention_of
from .gpu_place import MOST_TOKENS, Capture, Place
from .kv_cache import Entries, Rooms, known_rooms, leave_rooms, length_of, passing_twin, sizes_of, unfit
from .layer_skips import LayerSkips
from .lower_cpu import StepProgram
from .patches import Usage
from .prepared import Prepared
from .program import Program
from .reading import windows
from .selections import Selections
from .selfcheck import Checkpoints

logger = logging.getLogger("coreskip")

_MOST = 16  # places that a model keeps; each has keys and values of its own
_LEAST = 256  # capacity of the smallest; the others' are its doubles
# In bfloat16, and where a token's choice is a near thing, the right lowering of a step, too, is now and then further
# from the modules than the tolerance: only who is so for several texts is refused.
_ATTEMPTS = 4

#: What a captured pass of modules has fixed: the layers whose attention, and MLP, it leaves out, and the weights that
#: its sequences chose.
Settled = tuple[tuple[frozenset[int], frozenset[int]], list[Tensor]]

Step = GpuStep | ModuleStep


@dataclass(eq=False)
class _Graph:
    step: Step
    replay: Callable[[], Tensor]
    held: list[Tensor] = field(default_factory=list)  # so that no other tensor comes to lie there


@dataclass(eq=False)
class _Held:
    """A place, and what was captured over its memory, by what it has fixed."""

    place: Place
    graphs: dict[Hashable, _Graph] = field(default_factory=dict)


class Host(Protocol):
    """A wrapped model, as its captured steps need it."""

    model: nn.Module
    anatomy: Anatomy
    program: Program
    usage: Usage

    @property
    def chooses_by_token(self) -> bool: ...

    @property
    def exits_early(self) -> bool: ...

    def check_modules(self) -> None: ...

    def program_for(self, cache: Cache, native: bool = True) -> StepProgram | str: ...

    def settled(self, cache: Cache) -> Settled | str: ...


class _Places:
    """The memory of one model's captured steps.

    Attributes:
        held: the one used last at the end.
        entries: of caches that a captured step can write into, as far as is known.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self.held: list[_Held] = []
        self.entries: Entries | None = None

    def check(self, cache: Any, rows: int, host: Host) -> None:
        """Raises NotCovered unless steps can write into a cache that comes here for the first time, or was moved."""
        host.check_modules()
        if self.entries is None:
            self.entries = Entries(self._device, windows(host.model.config, len(host.anatomy)))
        reason = unfit(cache, self.entries)
        if reason is not None:
            raise NotCovered(reason)
        if cache.layers[0].keys.shape[0] != rows:
            raise NotCovered("the KV cache has another number of rows")

    def learn(self, dtype: torch.dtype, made: list[Any]) -> None:
        """What this model's keys and values are, from layers to which its modules have added some of their own."""
        entries = cast(Entries, self.entries)
        if made[0].keys.dtype != dtype:
            raise NotCovered("the KV cache is not in the model's dtype")
        if entries.sizes is None:
            self.entries = replace(entries, sizes=[sizes_of(layer) for layer in made], dtype=dtype)

    def serving(self, cache: Cache, tokens: int) -> tuple[_Held, Rooms] | tuple[None, None]:
        """What has the cache's keys and values, where it has room for so many more."""
        rooms = None if self.entries is None else known_rooms(cache, tokens, self.entries)
        held = next((held for held in self.held if held.place.serves(rooms)), None)
        return (None, None) if held is None or rooms is None else (held, rooms)

    def vacant(self, key: Hashable, rows: int, length: int, cache: Cache) -> _Held | None:
        """What was made for other sequences; taken from one that may go on only where there are too many."""
        fitting = [h for h in self.held if h.place.rows == rows and h.place.capacity >= length]
        fitting.sort(key=lambda held: (key not in held.graphs, held.place.capacity))
        free = next((held for held in fitting if held.place.is_free_for(cache)), None)
        if free is not None or not fitting or len(self.held) < _MOST:
            return free
        fitting[0].place.take_away()
        if fitting[0].place.is_free_for(cache):
            return fitting[0]
        self.held.remove(fitting[0])  # somebody has taken keys or values from the cache, and still holds them
        return None

    def made(self, cache: Any, length: int) -> _Held:
        """A new one."""
        capacity = max(_LEAST, 1 << (length - 1).bit_length())
        return _Held(Place(cache.layers, capacity, cast(Entries, self.entries)))

    def used(self, held: _Held) -> None:
        """It was used just now."""
        if held in self.held:
            self.held.remove(held)
        elif len(self.held) == _MOST:
            del self.held[0]
        self.held.append(held)

    def leave(self, cache: Cache) -> None:
        """Leaves the cache memory of its own."""
        rooms = None if self.entries is None else known_rooms(cache, 0, self.entries)
        if rooms is not None:
            leave_rooms(rooms)


@dataclass(frozen=True, eq=False)
class _Way:
    """How a step is captured. key: what of it a graph has fixed. program: of the lowered step; None: by modules.
    settled: what these have fixed."""

    key: Hashable
    tokens: int
    program: StepProgram | None
    settled: list[Tensor] = field(default_factory=list)


class CapturedSteps:
    """The captured decode steps of one wrapped model.

    Attributes:
        capture: what makes a step over fixed memory replayable: `Capture` on a GPU, None where nothing is captured.
        lowering: of the whole step.
    """

    def __init__(self, host: Host, lowering: GpuLowering) -> None:
        self._host: Host = weakref.proxy(host)  # which has this: a cycle would outlive `unwrap`
        self._lock = threading.Lock()
        self.lowering = lowering
        self.forget()

    def forget(self) -> None:
        """The model's weights were moved, cast or loaded anew: what was captured reads the old ones."""
        self.lowering.forget()
        self._refusal: str | None = None  # why passes of this model's modules are not captured
        self._output: Any = None  # the class of what the model returns
        self._disagreed = 0
        self._probed = False
        self._checkpoints = Checkpoints(cast(Any, self._host.model).config.get_text_config())
        self._device = next(self._host.model.parameters()).device.type
        self._places = _Places(self._device)
        wanted = os.environ.get("CORESKIP_GRAPHS")
        self.capture: Callable[[Callable[[], Tensor], torch.device], Callable[[], Tensor]] | None = (
            Capture if self._device == "cuda" and wanted != "0" else None
        )
        if wanted == "modules":
            self.lowering.refuse("CORESKIP_GRAPHS=modules was set")

    @property
    def refusal(self) -> str | None:
        """Why this model's steps are not captured, if they are not."""
        return None if self.lowering.ready else self._refusal

    @property
    def _captured(self) -> list[_Held]:
        return self._places.held

    @property
    def ready(self) -> bool:
        """Whether a captured step has been found to agree with the model's own modules."""
        return self.refusal is None and any(held.graphs for held in self._places.held)

    def forward(
        self, original: Callable[..., Any], named: dict[str, Any], program: StepProgram | str, verifies: bool = False
    ) -> Any:
        """The output of one decode step, or None where the model's own modules have to compute it one by one.

        original: the model's own forward; named: its arguments; program: what the step computes, or why no lowered one
        can; verifies: whether modules that are captured would not do.
        """
        try:
            check_call(named, self._device, MAX_ROWS)
            self._check_call(named)
            with self._lock:
                logits = self._step(original, named, program, verifies)
        except NotCovered as reason:
            logger.debug("this step is not replayed: %s", reason)
            return None
        return None if logits is None else self._output(logits=logits, past_key_values=named["past_key_values"])

    @torch.no_grad()
    def greedy(
        self, cache: Cache, token: int, count: int, ends: Sequence[int], program: StepProgram | str
    ) -> list[int]:
        """Appends `token` to the cache of one unpadded sequence and returns the likeliest tokens after it: `count`, or
        fewer up to one of `ends` or to the capacity; none where no captured step has the cache's keys and values.

        Nothing is read before all of them are made.
        """
        with self._lock:
            found = self._known_graph(cache, program, 1)
            if found is None:
                return []
            held, graph, rooms = found
            place, past = held.place, rooms.length
            count = min(count, place.capacity - past, self._checkpoints.room(past))
            place.load(token, past + count - 1, 1, None, None)
            tokens = []
            for at in range(past, past + count):
                place.at.fill_(at)
                place.positions.fill_(at)
                tokens.append(graph.replay()[:, -1].argmax(-1))
                place.ids[:, 0] = tokens[-1]
            made: list[int] = torch.cat(tokens).tolist()
            made = made[: next((i for i, t in enumerate(made) if t in ends), count) + 1]
            self._count(rooms, graph.step, len(made))
            return made

    @torch.no_grad()
    def append(self, cache: Cache, tokens: Sequence[int], program: StepProgram) -> Tensor | None:
        """Logits ``[tokens, vocabulary]`` of 1 to 8 tokens that are appended to the cache of one unpadded sequence;
        None where no captured step has its keys and values."""
        with self._lock:
            found = self._known_graph(cache, program, len(tokens))
            if found is None:
                return None
            held, graph, rooms = found
            ids = torch.tensor([list(tokens)], device=self._device)
            held.place.load(ids, rooms.length, _class_of(len(tokens)), None, None)
            logits = graph.replay()[0, : len(tokens)].clone()
            self._count(rooms, graph.step, len(tokens))
            return logits

    # --- what is asked for

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
        so_far = int(named["past_key_values"].get_seq_length()) + length
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (rows, so_far)):
            raise NotCovered("the attention mask is not [rows, length so far]")
        if positions is not None and (positions.ndim != 2 or positions.shape[1] != length):
            raise NotCovered("position_ids is not [rows, tokens]")

    def _way(
        self, cache: Cache, program: StepProgram | str, tokens: int, verifies: bool = False, rows: int = 1
    ) -> _Way:
        """How a step of so many tokens a sequence is captured. Raises NotCovered where it is not."""
        reason = self.lowering.covers(program)
        if reason is None and tokens > MOST_TOKENS:
            reason = "a sequence has more tokens than a step takes"
        if reason is None and isinstance(program, StepProgram):
            wide = _class_of(tokens) if rows * _class_of(tokens) <= MAX_ROWS else tokens
            return _Way(("step", self.lowering.key(program), wide), wide, program)
        if verifies:  # verification's tokens are the dense model's own to the last bit: so are its steps
            raise NotCovered(f"verification is not captured by modules: {reason}")
        if tokens != 1:
            raise NotCovered("the step has several tokens a sequence")
        if self._refusal is not None:
            raise NotCovered(self._refusal)
        settled = self._host.settled(cache)
        if isinstance(settled, str):
            raise NotCovered(settled)
        chosen = tuple((t.data_ptr(), t.shape) for t in settled[1])
        return _Way(("modules", settled[0], chosen), 1, None, settled[1])

    def _known_graph(self, cache: Cache, program: StepProgram | str, tokens: int) -> tuple[_Held, _Graph, Rooms] | None:
        """What was captured over a cache's keys and values for just this, with what it reads of the cache loaded."""
        try:
            self._check_surroundings()
            self._host.check_modules()
            way = self._way(cache, program, tokens)
        except NotCovered:
            return None
        held, rooms = self._places.serving(cache, way.tokens)
        graph = None if held is None or held.place.rows != 1 else held.graphs.get(way.key)
        if held is None or graph is None or rooms is None or self._checkpoints.due(rooms.length, tokens):
            return None
        self._choose(graph, way)
        return held, graph, rooms

    # --- one step

    def _step(
        self, original: Callable[..., Any], named: dict[str, Any], program: StepProgram | str, verifies: bool
    ) -> Tensor | None:
        cache: Cache = named["past_key_values"]
        rows, length = named["input_ids"].shape
        way = self._way(cache, program, length, verifies, rows)
        held, rooms = self._places.serving(cache, way.tokens)
        if held is None or rooms is None:
            self._places.check(cache, rows, self._host)
            held = self._places.vacant(way.key, rows, length_of(cache.layers[0]) + way.tokens, cache)
            rooms = None if held is None else held.place.adopt(cache)
        if held is None or rooms is None or way.key not in held.graphs or self._checkpoints.due(rooms.length, length):
            return self._new(original, named, way, program, verifies)
        self._places.used(held)
        graph = held.graphs[way.key]
        logits = self._run(held, graph, way, named, rooms.length)
        self._count(rooms, graph.step, length)
        return logits

    def _run(self, held: _Held, graph: _Graph, way: _Way, named: dict[str, Any], past: int) -> Tensor:
        length = named["input_ids"].shape[1]
        self._load(held.place, way, named, past)
        self._choose(graph, way)
        logits = graph.replay()[:, :length]
        keep = named.get("logits_to_keep") or length
        return logits[:, length - keep :].clone()

    def _load(self, place: Place, way: _Way, named: dict[str, Any], past: int) -> None:
        mask, positions = named.get("attention_mask"), named.get("position_ids")
        if way.program is not None:
            positions = self.lowering.positions(named, past)
        place.load(named["input_ids"], past, way.tokens, mask, positions)

    @staticmethod
    def _choose(graph: _Graph, way: _Way) -> None:
        if isinstance(graph.step, GpuStep) and way.program is not None:
            graph.step.choose(way.program)

    def _count(self, rooms: Rooms, step: Step, tokens: int) -> None:
        rooms.advance(tokens)
        rows = rooms.rows
        # of modules, what their one token has left out over all rows
        skipped = step.skipped * rows * tokens if isinstance(step, GpuStep) else step.skipped * tokens
        self._host.usage.count(rows * tokens, skipped)

    # --- the first step

    def _new(
        self, original: Callable[..., Any], named: dict[str, Any], way: _Way, program: StepProgram | str, verifies: bool
    ) -> Tensor | None:
        """Captures a step and compares it with the model's own modules, which leave the cache as it is. None: they
        do not agree, and nothing has happened to the cache."""
        cache, length = named["past_key_values"], named["input_ids"].shape[1]
        twin = passing_twin(cache)
        expected = original(**{**named, "past_key_values": twin})
        self._places.learn(cache.layers[0].keys.dtype, twin.layers)
        self._output, logits = type(expected), expected.logits
        del twin, expected  # which hold what the cache holds
        try:
            return self._captured_anew(original, named, way, logits)
        except NotThisCall:
            self._places.leave(cache)
            raise
        except Exception as error:  # a capture fails in as many ways as there are modules
            self._places.leave(cache)
            self._refuse(error, way)
        if way.program is None or self.lowering.refusal is None:
            return None
        way = self._way(cache, self.lowering.refusal, length, verifies)  # raises where modules would not do
        return self._new(original, named, way, program, verifies)

    def _captured_anew(
        self, original: Callable[..., Any], named: dict[str, Any], way: _Way, expected: Tensor
    ) -> Tensor:
        cache = named["past_key_values"]
        rows, length = named["input_ids"].shape
        held, rooms = self._places.serving(cache, way.tokens)
        if held is None or rooms is None:
            needed = length_of(cache.layers[0]) + way.tokens
            held = self._places.vacant(way.key, rows, needed, cache) or self._places.made(cache, needed)
            rooms = held.place.adopt(cache)
        self._load(held.place, way, named, rooms.length)
        step: Step
        if way.program is not None:
            step = self.lowering.step(way.program, held.place, way.tokens)
        else:
            step = ModuleStep(original, held.place, *attention_of(self._host.model, len(self._host.anatomy)))
        assert self.capture is not None
        graph = _Graph(step, held.place.capture(self.capture, step), way.settled)
        logits = self._run(held, graph, way, named, rooms.length)
        self._compare(logits, expected, way)
        if way.program is None:  # other choices than the last ones' are not made again
            held.graphs = {key: graph for key, graph in held.graphs.items() if isinstance(graph.step, GpuStep)}
        if way.program is not None and not self._probed:
            entries = cast(Entries, self._places.entries)
            self._probed = check_elsewhere(self.lowering, way.program, original, self._host, cache, entries)
        self._checkpoints.passed(rooms.length, length)
        held.graphs[way.key] = graph
        self._places.used(held)
        rooms.advance(length)  # the modules have counted
        return logits

    def _compare(self, logits: Tensor, expected: Tensor, way: _Way) -> None:
        by_rule = self._host.chooses_by_token or self._host.program.weights is not None
        if way.program is not None and not by_rule and logits.dtype != torch.float32:
            if not close(logits, expected, rounded=False):
                raise Disagrees("its logits differ from the model's own")
            return
        compare(logits, expected, by_rule)

    def _refuse(self, error: Exception, way: _Way) -> None:
        """Takes note that a way is none."""
        reason = str(error).partition("\n")[0] or type(error).__name__
        if way.program is not None:
            self._disagreed += isinstance(error, Disagrees)
            if isinstance(error, Disagrees) and self._disagreed < self._attempts:
                return
            self.lowering.refuse(reason)
        else:
            self._refusal = reason
            logger.warning(
                "decode steps of this %s are not captured in a CUDA graph, which makes them slower: %s",
                self._host.anatomy.model_type,
                reason,
            )
        self._places.held.clear()

    @property
    def _attempts(self) -> int:
        entries = self._places.entries
        rounded = self._host.program.weights is not None or (entries is not None and entries.dtype != torch.float32)
        return _ATTEMPTS if rounded or self._host.chooses_by_token else 1


def settled_by(prepared: Prepared, skips: LayerSkips, selections: Selections | None) -> Settled | str:
    """What a captured pass of modules has fixed for sequences with these selections, or why there can be none."""
    if selections is None:
        return skips.skipped(None), []
    selected = prepared.selected(selections)
    if selected.differ or skips.disputed(selections):
        return "its sequences chose differently"
    mlps = [mlp for mlp in selected.mlps.values() if isinstance(mlp, SparseMLP)]
    parts = [part for mlp in mlps for part in (mlp.packed, mlp.lists) if part is not None]
    return skips.skipped(selections), [t for p in parts for t in vars(p).values() if isinstance(t, Tensor)]


def _class_of(tokens: int) -> int:
    """How many tokens the step has that `tokens` of a sequence go through."""
    return min(1 << (tokens - 1).bit_length(), MOST_TOKENS)
