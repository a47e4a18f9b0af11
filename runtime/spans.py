"""Decode steps of models that native steps cover in part (span_reading.py): the model's own forward, with runs of
native halves of layers in place of its own.

A layer's forward is told what to do while such a step is under way (`_Run`): native halves wait until a module has to
run, or the last layer ends, and go as one call of native code over all layers that lie between. Recurrences,
convolutions, and whatever else nothing describes, run as they are, with their own entries of the cache; embedding, last
norm and LM head are the model's own.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..kernels import step as kernel
from ..kernels.ops import MAX_ROWS
from .calls import Disagrees, NotCovered, NotThisCall, check_call, check_outputs, close, compare, row_starts
from .changes import Changes
from .kv_cache import Entries, Rooms, known_rooms, make_rooms, twin_of
from .lower_cpu import CpuModel, Packed, Packing, StepProgram, check_describable
from .native import NativeSteps
from .patches import Patches
from .phases import as_loaded, current_pass, densely, tokens_in
from .rotary_tables import RotaryTables
from .selfcheck import FEW, KEYS, Checkpoints, agree, far_positions, made_up
from .span_reading import ATTENTION, MLP, Shared, read_shared

logger = logging.getLogger("coreskip")

_ATTEMPTS = 4  # as of native steps (native.py)


class Memory(Protocol):
    """What a wrapped model may take."""

    @property
    def cap(self) -> int | None: ...


class Host(Protocol):
    """A wrapped model, as its spans need it."""

    patches: Patches
    changes: Changes

    @property
    def memory(self) -> Memory: ...


@dataclass(eq=False)
class _Model:
    """A model that is computed natively in part.

    Attributes:
        loaded: its native pieces with the weights as they were loaded. model: with the plan's, or the same.
        at: of each piece, its layer. spans: the pieces from and up to which each native call goes.
        before, after: by layer, the span that ends before its module is called, and after that.
        attending: of each span, which of the rooms are those of its attentions.
    """

    shared: Shared
    loaded: CpuModel
    model: CpuModel
    at: list[int]
    spans: list[tuple[int, int]]
    before: dict[int, int]
    after: dict[int, int]
    attending: list[tuple[int, int]]
    entries: Entries
    forward: Callable[..., Any]
    steps: WeakKeyDictionary[StepProgram, tuple[list[kernel.Step], int]] = field(default_factory=WeakKeyDictionary)

    @classmethod
    def of(cls, shared: Shared, loaded: CpuModel, forward: Callable[..., Any]) -> _Model:
        at: list[int] = []
        spans: list[tuple[int, int]] = []
        before: dict[int, int] = {}
        after: dict[int, int] = {}
        begun = 0
        for index, split in enumerate(shared.splits):
            at += [index] * (split.before is not None)
            if split.without is not None:
                if len(at) > begun:
                    before[index] = len(spans)
                    spans.append((begun, len(at)))
                begun = len(at)
                at += [index] * (split.after is not None)
            last = index + 1 == len(shared.splits)
            if len(at) > begun and (last or not split.joined):
                after[index] = len(spans)
                spans.append((begun, len(at)))
                begun = len(at)
        counts = [0]
        for layer in loaded.base.layers:
            counts.append(counts[-1] + (layer.attention is not None))
        own = tuple(index for index, layer in zip(at, loaded.base.layers, strict=True) if layer.attention is not None)
        attending = [(counts[begin], counts[end]) for begin, end in spans]
        entries = Entries.of(loaded.base, own)
        return cls(shared, loaded, loaded, at, spans, before, after, attending, entries, forward)

    def steps_of(self, program: StepProgram) -> list[kernel.Step]:
        model = self.loaded if program.as_loaded else self.model
        steps, made = self.steps.get(program, ([], -1))
        version = model.rotary.version
        if not steps:
            steps = model.spans(program, self.at, self.spans)
        if made != version:
            self.rotate(steps, model.rotary.tables())
            self.steps[program] = steps, version
        return steps

    def rotate(self, steps: Sequence[kernel.Step], tables: Sequence[Any]) -> None:
        for step, (begin, end) in zip(steps, self.spans, strict=True):
            step.rotate_by(tables[begin:end])

    def left_out(self, program: StepProgram) -> list[int]:
        """By span, the MLP neurons that a token is known to leave out."""
        found = []
        for begin, end in self.spans:
            count = 0
            for piece in range(begin, end):
                bricks, mlp = self.shared.spec.layers[piece].bricks, program.mlps[self.at[piece]]
                if bricks and mlp is not None and mlp.rule == "listed":
                    count += bricks[0].feed_forward.intermediate_size - mlp.listed_neurons
            found.append(count)
        return found


class _Run:
    """A pass that is under way.

    rooms: of the attentions that are native; None where there are none.
    """

    def __init__(self, model: _Model, steps: Sequence[kernel.Step], known: Sequence[int], rooms: Rooms | None) -> None:
        self.model, self._steps, self._known, self._rooms = model, steps, known, rooms
        self.positions = self.start = torch.empty(0, dtype=torch.int64, device="cpu")
        self.past = 0
        self.without: frozenset[str] = frozenset()  # halves that the module under way leaves out
        self.attention_outputs = self.mlp_outputs = 0
        self._like: Tensor | None = None  # what that module was given

    def layer(self, index: int, original: Callable[..., Any], x: Tensor, args: Any, kwargs: Any) -> Any:
        """What layer `index` gives for the residual stream x, which stays behind where native halves wait."""
        split, model = self.model.shared.splits[index], self.model
        if index in model.before:
            x = self._span(model.before[index], x)
        rest: tuple[Any, ...] = (None,) * (split.outputs - 1)
        several = split.outputs > 0
        if split.without is not None:
            self.without, self._like = split.without, x
            self.attention_outputs, self.mlp_outputs = split.attention_outputs, split.mlp_outputs
            try:
                output = original(x, *args, **kwargs)
            finally:
                self.without = frozenset()
            several = isinstance(output, (tuple, list))
            x, rest = (output[0], tuple(output[1:])) if several else (output, ())
        if index in model.after:
            x = self._span(model.after[index], x)
        return (x, *rest) if several else x

    def nothing(self, half: str, x: Tensor | None) -> Any:
        """What a half gives that the module leaves out."""
        like = self._like if x is None else x
        assert like is not None
        outputs = self.attention_outputs if half == ATTENTION else self.mlp_outputs
        zeros = like.new_zeros(like.shape)
        return (zeros, *[None] * (outputs - 1)) if outputs else zeros

    def _span(self, index: int, x: Tensor) -> Tensor:
        begin, end = self.model.attending[index]
        entries = _NO_ENTRIES if self._rooms is None else self._rooms.part(begin, end)
        y, skipped = self._steps[index].through(x.float(), self.positions, self.start, entries, self.past)
        step = current_pass()
        if step is not None:
            step.skipped += skipped + self._known[index] * self.positions.numel()
        return y.to(x.dtype)


_RUN: ContextVar[_Run | None] = ContextVar("coreskip_spans", default=None)
_NO_ENTRIES = kernel.KeyValues([], [], [])


class SpanSteps:
    """The decode steps of one wrapped model that native steps cover in part.

    Args:
        native: its steps if they were covered as a whole.
        take: told of each linear whose matrix is packed in the plan's format.
    """

    def __init__(self, host: Host, native: NativeSteps, packing: Packing, take: Packed) -> None:
        self._host, self._native, self._packing, self._take = host, native, packing, take
        self.anatomy = native.anatomy
        self._lock = threading.Lock()
        self._patched: set[nn.Module] = set()
        self.forget()

    def forget(self) -> None:
        """The model was changed."""
        self._described: _Model | None = None
        self.refusal: str | None = None
        self._disagreed = 0
        self._checkpoints = Checkpoints(self._model.config.get_text_config())

    @property
    def _model(self) -> Any:
        return self._native.model

    @property
    def ready(self) -> bool:
        """Whether such a step has been found to agree with the model's own modules."""
        return self._described is not None and self.refusal is None

    @property
    def halves(self) -> tuple[int, int] | None:
        """How many halves of layers are native, of how many; None where nothing is."""
        return self._described.shared.halves if self._described is not None and self.ready else None

    def forward(self, original: Callable[..., Any], program: StepProgram | str, named: dict[str, Any]) -> Any:
        """The output of one decode step, or None where nothing of it is native.

        original: the model's own forward; named: its arguments; program: a text says why nothing can be.
        """
        try:
            check_call(named, "cpu", MAX_ROWS)
            if isinstance(program, str):
                raise NotCovered(program)
            if program.no_attention or program.no_mlp or program.columns:
                raise NotCovered("layers or inputs are left out by the modules")
            check_outputs(self._model.config)
            if self._native.exits_early:
                raise NotThisCall("passes are to end before the last layer")
            described = self._described or self._first(original, named)
            length = named["input_ids"].shape[1]
            if self._checkpoints.due(tokens_in(named["past_key_values"]), length):
                self._compare_here(described, named, length)
            return self._run(described, described.steps_of(program), described.left_out(program), named)
        except NotCovered as reason:
            logger.debug("this step runs on the model's modules: %s", reason)
            return None

    # --- a step

    def _run(
        self,
        model: _Model,
        steps: Sequence[kernel.Step],
        known: Sequence[int],
        named: dict[str, Any],
        positions: Tensor | None = None,
    ) -> Any:
        """The model's output. positions: int64 [rows, length], those that the steps rotate by."""
        rows, length = named["input_ids"].shape
        rooms = self._rooms(model, named["past_key_values"], length, rows)
        run = _Run(model, steps, known, rooms)
        run.past = tokens_in(named["past_key_values"]) if rooms is None else rooms.length
        run.start = row_starts(named.get("attention_mask"), rows, run.past + length)
        if positions is None:
            positions = model.model.positions_of(named, run.past, run.start)
            self._reach(model, steps, positions)
        run.positions = positions
        token = _RUN.set(run)
        try:
            output = model.forward(**named)
        finally:
            _RUN.reset(token)
        if rooms is not None:
            rooms.advance(length)
        return output

    @staticmethod
    def _reach(model: _Model, steps: Sequence[kernel.Step], positions: Tensor) -> None:
        least, most = int(positions.min()), int(positions.max())
        if least < 0:
            raise NotThisCall("a position is negative")
        model.model.check_end(most + 1)
        if most >= model.model.rotary.positions:
            model.model.rotary.reach(most + 1)
            model.rotate(steps, model.model.rotary.tables())

    def _rooms(self, model: _Model, cache: Any, more: int, rows: int) -> Rooms | None:
        if not model.entries.windows:
            return None
        rooms = known_rooms(cache, more, model.entries) or make_rooms(cache, more, model.entries)
        if isinstance(rooms, str):
            raise NotThisCall(rooms)
        if rooms.rows != rows:
            raise NotThisCall("the KV cache has another number of rows")
        return rooms

    # --- the first step

    def _first(self, original: Callable[..., Any], named: dict[str, Any]) -> _Model:
        """Compares what may be native with the model's own modules, on copies of the cache."""
        with self._lock:
            if self._described is not None:
                return self._described
            if self.refusal is not None:
                raise NotCovered(self.refusal)
            (rows, length), past = named["input_ids"].shape, tokens_in(named["past_key_values"])
            row_starts(named.get("attention_mask"), rows, past + length)  # before anything takes time
            refused: NotCovered | None = None
            try:
                if self._host.memory.cap is not None:
                    raise NotCovered(
                        "its matrices are read from the disk in the order in which a whole step reads them"
                    )
                check_describable(self._model, self.anatomy, self._packing.packed_alone)
                for shared in read_shared(self._model, self.anatomy):
                    try:
                        self._described = self._tried(shared, original, named)
                        return self._described
                    except NotThisCall:
                        raise
                    except NotCovered as reason:
                        refused = refused or reason
            except NotThisCall:
                raise
            except NotCovered as reason:
                refused = reason
            assert refused is not None
            self._disagreed += isinstance(refused, Disagrees)
            if not isinstance(refused, Disagrees) or self._disagreed == _ATTEMPTS:
                self.refusal = str(refused)
                self._native.warn(f"{self._native.refusal}; nor does any part of them run natively: {refused}")
            raise refused

    def _tried(self, shared: Shared, original: Callable[..., Any], named: dict[str, Any]) -> _Model:
        rotary = RotaryTables(shared.spec)
        model = _Model.of(shared, _lower(shared, rotary, Packing(packed_alone=self._packing.packed_alone)), original)
        self._patch(shared)
        dense = StepProgram.dense(len(self.anatomy), as_loaded=True)
        steps, nothing = model.steps_of(dense), [0] * len(model.spans)
        got, expected = self._both(model, lambda call: self._run(model, steps, nothing, call), named)
        compare(got, expected, by_rule=False)
        self._probe(model, dense, named["past_key_values"])
        packing = self._packing
        if packing.narrow and model.loaded.base.dtype == torch.float32:  # the same numbers in fewer bytes
            model.loaded = model.model = _lower(shared, rotary, replace(packing, weights=None, packed=None))
        if packing.weights is not None:
            model.model = _lower(shared, rotary, replace(packing, bundled=frozenset(), packed=self._take))
        model.steps.clear()
        logger.debug("%d of %d halves of this %s's layers run natively", *shared.halves, self.anatomy.model_type)
        return model

    def _both(
        self, model: _Model, natively: Callable[[dict[str, Any]], Any], named: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The logits of a pass with native parts, and of the modules' own, each on a copy of the cache."""
        found = []
        with as_loaded(), densely(), torch.no_grad():
            for forward in (natively, lambda call: model.forward(**call)):
                logits = forward({**named, "past_key_values": twin_of(named["past_key_values"])}).logits
                found.append(logits.to(model.loaded.base.dtype))  # some give float32, which says how exact they are
        return found[0], found[1]

    def _compare_here(self, model: _Model, named: dict[str, Any], length: int) -> None:
        """Compares a step behind texts of other lengths; raises NotCovered where they differ, now and from now on."""
        past = tokens_in(named["past_key_values"])
        with self._lock:
            if not self._checkpoints.due(past, length):
                return
            dense = StepProgram.dense(len(self.anatomy), as_loaded=True)
            steps, nothing = model.steps_of(dense), [0] * len(model.spans)
            if not self._agrees(model, lambda call: self._run(model, steps, nothing, call), named):
                self.refusal = f"from {past} tokens on its logits differ from the model's own"
                self._native.warn(self.refusal)
                raise NotCovered(self.refusal)
            self._checkpoints.passed(past, length)

    def _agrees(self, model: _Model, natively: Callable[[dict[str, Any]], Any], named: dict[str, Any]) -> bool:
        def run(ids: Tensor) -> tuple[Tensor, Tensor]:
            return self._both(model, natively, {**named, "input_ids": ids, "logits_to_keep": 0})

        if "logits_to_keep" not in inspect.signature(type(self._model).forward).parameters:
            named = {name: value for name, value in named.items() if name != "logits_to_keep"}
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        return agree(run, lambda got, expected: close(got, expected, False), named["input_ids"].shape, vocabulary)

    def _probe(self, model: _Model, dense: StepProgram, like: Any) -> None:
        """Compares steps at positions far apart, and behind many keys, where any attention is native."""
        if not model.entries.windows:
            return
        config, end = self._model.config.get_text_config(), model.loaded.spec.end
        if model.loaded.spec.rotary is None:  # positions are the modules' own, and may be rows of a table
            end = end or getattr(config, "max_position_embeddings", None)
        far, keys = far_positions(config)[:, None], KEYS
        if end is not None:
            far, keys = far[far[:, 0] < end], min(keys, end - MAX_ROWS)
        behind = torch.arange(keys, keys + MAX_ROWS, device="cpu")[None]
        for places, count in ((far, FEW), (behind, keys)):
            if not len(places):
                continue
            cache = made_up(self._model.config, like, places.shape[0], count)
            steps = model.loaded.spans(dense, model.at, model.spans)
            model.rotate(steps, model.loaded.rotary.at(places.flatten()))
            indices = torch.arange(places.numel(), device="cpu").view_as(places)
            named = {"input_ids": places, "position_ids": places, "past_key_values": cache, "use_cache": True}
            natively = functools.partial(self._run, model, steps, [0] * len(model.spans), positions=indices)
            if not self._agrees(model, natively, named):
                raise NotCovered("at other positions its logits differ from the model's own")

    # --- the model's modules

    def _patch(self, shared: Shared) -> None:
        """Lets the layers ask what to do in a pass that is native in part, and halves give nothing where it does them.

        Nothing changes in any other pass.
        """
        parts = zip(self.anatomy.layers, self.anatomy.attentions, strict=True)
        for index, (layer, attention) in enumerate(parts):
            self._set(layer, functools.partial(_layer_forward, index))
            if attention is not None:
                self._set(attention.module, functools.partial(_half_forward, ATTENTION))
            mlp, experts = self.anatomy.feed_forwards[index], self.anatomy.experts[index]
            if experts is not None:
                self._set(experts.block, functools.partial(_half_forward, MLP))
            if mlp is not None and (experts is None or mlp is not experts.shared):
                self._set(mlp.owner if mlp.whole else mlp.down, functools.partial(_half_forward, MLP))

    def _set(self, module: nn.Module, made: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        if module not in self._patched:
            self._patched.add(module)
            self._host.patches.set(module, "forward", made(module.forward))
            self._host.changes.expect(module)


def _layer_forward(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        run = _RUN.get()
        if run is None:
            return original(*args, **kwargs)
        x, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        return run.layer(index, original, x, rest, kwargs)

    return forward


def _half_forward(half: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        run = _RUN.get()
        if run is None or half not in run.without:
            return original(*args, **kwargs)
        return run.nothing(half, args[0] if half == MLP and args else None)

    return forward


def _lower(shared: Shared, rotary: RotaryTables, packing: Packing) -> CpuModel:
    try:
        return CpuModel(shared.spec, rotary, packing)
    except ValueError as reason:
        raise NotCovered(str(reason)) from None
