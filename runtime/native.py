"""Decode steps in one native call on a CPU, in place of the calls of a model's modules.

What the native step computes is described (spec.py), packed (lower_cpu.py), and compared with the model's own modules
before it is used and now and then after (native_check.py). What is not covered, or does not agree, runs on the patched
modules.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..kernels import prefill
from ..kernels import step as kernel
from ..kernels.ops import MAX_ROWS
from ..predictors.anatomy import Anatomy
from .calls import Disagrees, NotCovered, NotThisCall, check_call, check_outputs, row_starts
from .kv_cache import Entries, Rooms, known_rooms, make_rooms, take_back
from .lower_cpu import CpuModel, Packed, Packing, StepProgram, check_finite, describe
from .native_check import Comparison
from .phases import tokens_in
from .recurrent_states import copies
from .release import trim
from .rotary_tables import RotaryTables
from .selfcheck import KEYS, Checkpoints
from .spec import ModelSpec
from .width import MOST_TOKENS, most_tokens

logger = logging.getLogger("coreskip")

# In bfloat16 the embedded model's right description exceeds its tolerance for one prompt in four (0.05 to 0.26): only
# who does so for several is refused for good.
_ATTEMPTS = 4


@dataclass(eq=False)
class Described:
    """A model that native steps have been found to agree with. Dropped whole when the model changes.

    Attributes:
        loaded: with the weights as they were loaded. model: with the plan's, or the same.
        output: the class of what the model returns.
        entries: of the KV caches that steps write into.
        forward: the model's own.
        alone: whether the matrices exist in packed form alone, which the modules unpack.
        steps: what was made for each program, and by which version of the rotary tables.
    """

    loaded: CpuModel
    model: CpuModel
    output: type
    entries: Entries
    forward: Callable[..., Any]
    alone: bool = False
    steps: WeakKeyDictionary[StepProgram, tuple[kernel.Step, int]] = field(default_factory=WeakKeyDictionary)

    @cached_property
    def prompts_uncovered(self) -> str | None:
        """Why prompts do not run natively; None where they do."""
        return prefill.uncovered(self.model.base)

    def of(self, program: StepProgram) -> CpuModel:
        return self.loaded if program.as_loaded else self.model


class _State:
    """What is known of the model as it is now."""

    def __init__(self, config: Any) -> None:
        self.refusal: str | None = None
        self.uncovered = False
        self.described: Described | None = None
        self.disagreed = 0  # first steps so far whose logits were not the model's own
        self.checkpoints = Checkpoints(config)


class NativeSteps:
    """Runs the decode steps of one wrapped model natively, where they are covered.

    Args:
        packing: of the matrices under the plan. Its `packed` is told of each linear whose matrix is packed in the
            plan's format, beside the original.
        count: called with the tokens of a step and the neurons skipped in it.
        notice: takes note of what others have changed, and says why steps have to run on the modules now.
    """

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        packing: Packing,
        count: Callable[[int, float], None],
        notice: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.model, self.anatomy, self._packing = model, anatomy, packing
        self._count, self._notice = count, notice
        self._lock, self._comparing = threading.Lock(), threading.Lock()
        config = getattr(anatomy.stack, "config", None)
        self._settings = {} if config is None else vars(config)
        self.probe_keys = KEYS  # behind how many keys steps are compared with the modules, to begin with
        self.compared: Callable[[Any], Any] = lambda output: output  # called when they were, with that step's output
        self.forget()

    def forget(self) -> None:
        """The model's weights were moved, cast or loaded anew: describe it again before the next step."""
        self._state = _State(self.model.config.get_text_config())

    def renew(self) -> None:
        """Other matrices are in memory: steps are made again before they run."""
        with self._lock:
            if self._state.described is not None:
                self._state.described.steps.clear()

    @property
    def weights(self) -> str | None:
        """The plan's format."""
        return self._packing.weights

    @property
    def described(self) -> Described | None:
        """The model as it was found to agree; None before, and after it was changed."""
        return self._state.described

    @property
    def checkpoints(self) -> Checkpoints:
        return self._state.checkpoints

    @property
    def refusal(self) -> str | None:
        """Why this model's steps are not run natively, if they are not."""
        return self._state.refusal

    @property
    def uncovered(self) -> bool:
        """Whether that is because of what the model is."""
        return self._state.uncovered

    @property
    def ready(self) -> bool:
        """Whether a native step has been found to agree with the model's own modules."""
        return self._state.described is not None and self._state.refusal is None

    @property
    def exits_early(self) -> bool:
        """Whether the model's configuration has passes end before the last layer now, as a model that drafts for
        itself has it (`assistant_early_exit`)."""
        depth = len(self.anatomy)
        return bool(self._settings.get("num_hidden_layers", depth) != depth)

    def packed_bytes(self) -> tuple[int, int] | None:
        """Bytes of all matrices as packed for native steps, and of the MLPs'; None where there are none."""
        described = self._state.described
        return None if described is None else described.model.nbytes()

    def forward(self, original: Callable[..., Any], program: StepProgram | str, named: dict[str, Any]) -> Any:
        """The output of one decode step, or None where the model's own modules have to compute it.

        original: the model's own forward; named: its arguments; program: a text says why no native step can.
        """
        try:
            check_call(named, "cpu", self._most_tokens(program))
            if isinstance(program, str):
                raise NotCovered(program)
            check_outputs(self.model.config)
            described = self._state.described  # another thread may forget it
            if described is None:
                return self.compared(self._first(original, program, named))
            if self.checkpoints.due(tokens_in(named["past_key_values"]), named["input_ids"].shape[1]):
                self.compare(named)
            logits, left_out = self.run(self.step_of(described, program), named, described.of(program))
            tokens = named["input_ids"].numel()
            self._count(tokens, program.skipped * tokens + left_out)
        except NotCovered as reason:
            logger.debug("this step runs on the model's modules: %s", reason)
            return None
        return described.output(logits=logits, past_key_values=named["past_key_values"])

    def replace(
        self, original: Callable[..., Any], program: StepProgram | str, named: dict[str, Any], packed: Packed
    ) -> str | None:
        """Runs a first step, as `forward` would; `packed` may free each linear's matrix when it is told of it.

        Returns why no such step can be, if so. Else native steps may be `ready`, or try again with other tokens.
        """
        try:
            check_call(named, "cpu")
            if isinstance(program, str):
                raise NotCovered(program)
            self.check_modules()
            self._first(original, program, named, packed)
        except NotCovered as reason:
            return str(reason)
        return self.refusal

    def check_modules(self) -> None:
        """Raises NotCovered where something wants to see what happens inside the model's modules."""
        check_outputs(self.model.config)
        reason = self._notice()
        if reason is not None:
            raise NotThisCall(reason)

    def count(self, tokens: int, skipped: float) -> None:
        """So many tokens were decoded, and so many neurons skipped in it."""
        self._count(tokens, skipped)

    def _most_tokens(self, program: StepProgram | str) -> int:
        """How many tokens a step may have here and not on the modules."""
        if isinstance(program, str) or program.as_loaded:
            return MAX_ROWS
        described = self._state.described
        if described is None:
            return MOST_TOKENS if self.weights is not None else MAX_ROWS
        return most_tokens(described.model.base)

    # --- the first step

    def _first(
        self,
        original: Callable[..., Any],
        program: StepProgram,
        named: dict[str, Any],
        packed: Packed | None = None,
    ) -> Any:
        """Runs the native step, and the model's own modules on a copy of the cache, to see whether they agree."""
        with self._lock:
            state, cache, tokens = self._state, named["past_key_values"], named["input_ids"]
            if state.described is not None:  # another thread was first
                return None
            if self.exits_early:
                raise NotThisCall("passes are to end before the last layer")
            try:
                loaded = describe(self.model, self.anatomy, self._packing)
                comparison = Comparison(self, original, Entries.of(loaded.base))
                before = copies(comparison.entries.recurrent_of(cache))
                found = comparison.begin(loaded, program, named)
            except NotThisCall:
                raise
            except NotCovered as reason:
                state.uncovered = True  # but maybe in part: who warns is spans.py
                self._refuse(str(reason), logging.DEBUG)
                return None
            try:
                output = comparison.finish(found, loaded, named)
                self._check_unchanged(state)
                entries, kind = comparison.entries, type(output)
                if packed is None:
                    described = Described(*self._packed_beside(loaded), kind, entries, original)
                else:
                    spec, rotary = loaded.spec, loaded.rotary
                    del loaded  # which holds the weights where they lie
                    model = self._packed_instead(spec, rotary, packed)
                    described = Described(model, model, kind, entries, original, alone=True)
                # once more as every step after it: the same numbers may be added up in another order
                take_back(cache, tokens.shape[1], before)
                model = described.of(program)
                logits, left_out = self.run(model.step(program), named, model, entries)
                self._check_unchanged(state)
            except NotCovered as reason:
                state.disagreed += isinstance(reason, Disagrees)
                for_good = not isinstance(reason, (Disagrees, NotThisCall))
                # maybe halves of its layers are; in halves of floats, texts would part from the modules' at near ties
                state.uncovered = for_good and self.model.dtype == torch.float32
                if for_good or state.disagreed == _ATTEMPTS:
                    self._refuse(str(reason))
                take_back(cache, tokens.shape[1], before)
                return None
            state.described = described
            trim()  # what the comparison took, 40 MB of the embedded model
            logger.debug("decode steps of this %s run natively", self.anatomy.model_type)
            if found.judged is not None:  # else the modules have counted
                self._count(tokens.numel(), program.skipped * tokens.numel() + left_out)
            return described.output(logits=logits, past_key_values=cache)

    def _packed_beside(self, loaded: CpuModel) -> tuple[CpuModel, CpuModel]:
        """The model as loaded and as the plan has it, in the forms that its steps read from now on."""
        kept = loaded
        if self._packing.narrow and loaded.base.dtype == torch.float32:  # the same numbers in fewer bytes
            kept = _lower(loaded.spec, loaded.rotary, replace(self._packing, weights=None, packed=None))
        if self.weights is None:
            return kept, kept
        return kept, _lower(loaded.spec, loaded.rotary, replace(self._packing, bundled=frozenset()))

    def _packed_instead(self, spec: ModelSpec, rotary: RotaryTables, packed: Packed) -> CpuModel:
        """The model in packed form, where the originals may go."""
        if self.weights is not None:
            check_finite(self.model)  # while nothing is gone
        return _lower(spec, rotary, replace(self._packing, bundled=frozenset(), packed=packed, before=None))

    def _check_unchanged(self, state: _State) -> None:
        """Raises NotCovered where the model was changed since `state` began."""
        if self._state is not state:
            raise NotThisCall("the model was changed meanwhile")

    def compare(self, named: dict[str, Any]) -> None:
        """Compares a step of as many tokens as `named` has with the modules' own, where none of its length was.

        Raises NotCovered where they differ, now and from now on.
        """
        past, length = tokens_in(named["past_key_values"]), named["input_ids"].shape[1]
        with self._comparing:
            described = self._state.described
            if described is not None and self.refusal is None and self.checkpoints.due(past, length):
                comparison = Comparison(self, described.forward, described.entries, rounded=described.alone)
                if comparison.holds(described.loaded, named):
                    self.checkpoints.passed(past, length)
                else:
                    self._refuse(f"from {past} tokens on its logits differ from the model's own")
        if self.refusal is not None:
            raise NotCovered(self.refusal)

    def _refuse(self, reason: str, level: int | None = None) -> None:
        self._state.refusal = reason
        self.warn(reason, level)

    def warn(self, reason: str, level: int | None = None) -> None:
        """Says that decode steps run on the modules, aloud where these have packed weights to read."""
        usual, fmt = (logging.DEBUG, "") if self.weights is None else (logging.WARNING, f", in {self.weights}")
        kind = self.anatomy.model_type
        logger.log(level or usual, "decode steps of this %s run on its own modules%s: %s", kind, fmt, reason)

    # --- every step

    def step_of(self, described: Described, program: StepProgram) -> kernel.Step:
        model = described.of(program)
        with self._lock:
            version = model.rotary.version
            step, made = described.steps.get(program, (None, -1))
            if step is None:
                step = model.step(program)
            if made != version:
                step.rotate_by(model.rotary.tables())
                described.steps[program] = (step, version)
        return step

    def admit(self, cache: Any, more: int, entries: Entries | None = None, snug: bool = False) -> Rooms:
        """The cache's rooms. What takes longer to check is checked once a cache, not once a step. snug: new ones get
        place for `more` positions and hardly any beyond these."""
        if entries is None:
            described = self._state.described
            if described is None:
                raise NotThisCall("the model was changed meanwhile")
            entries = described.entries
        if self.exits_early:
            raise NotThisCall("passes are to end before the last layer")
        rooms = known_rooms(cache, more, entries)
        if rooms is not None:
            return rooms
        found = make_rooms(cache, more, entries, snug)
        if isinstance(found, str):
            raise NotThisCall(found)
        return found

    def run(
        self, step: kernel.Step, named: dict[str, Any], model: CpuModel, entries: Entries | None = None
    ) -> tuple[Tensor, float]:
        """Logits of a step by the tokens of `named`, which the cache counts from now on, and neurons left out."""
        rooms, result = self.compute(step, named, model, entries)
        rooms.advance(named["input_ids"].shape[1])
        return result

    def compute(
        self, step: kernel.Step, named: dict[str, Any], model: CpuModel, entries: Entries | None = None
    ) -> tuple[Rooms, tuple[Tensor, float]]:
        """A step whose keys and values lie beyond what the cache counts as its own."""
        ids: Tensor = named["input_ids"]
        rows, length = ids.shape
        rooms = self.admit(named["past_key_values"], length, entries)
        if rooms.rows != rows:
            raise NotThisCall("the KV cache has another number of rows")
        if step.rows not in (None, rows):
            raise NotThisCall("other rows than the KV cache's chose their neurons")
        past = rooms.length
        start = row_starts(named.get("attention_mask"), rows, past + length)
        positions = model.positions_of(named, past, start)
        check_ranges(step, model, ids, positions)
        return rooms, step.run(ids, positions, start, rooms.table, past, named.get("logits_to_keep") or length)


def _lower(spec: ModelSpec, rotary: RotaryTables, packing: Packing) -> CpuModel:
    try:
        return CpuModel(spec, rotary, packing)
    except ValueError as reason:
        raise NotCovered(str(reason)) from None


def check_ranges(step: kernel.Step, model: CpuModel, ids: Tensor, positions: Tensor) -> None:
    """Raises IndexError for ids of no token, NotThisCall for positions that are none. Tables will reach so far."""
    tokens, places = ids.flatten().tolist(), positions.flatten().tolist()
    vocabulary = step.model.vocabulary
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        raise IndexError(f"token ids must be in [0, {vocabulary})")
    if min(places) < 0:
        raise NotThisCall("a position is negative")
    model.check_end(max(places) + 1)
    if max(places) >= model.rotary.positions:
        model.rotary.reach(max(places) + 1)
        step.rotate_by(model.rotary.tables())


class NativeSequence:
    """One sequence that nobody else touches while it decodes: steps without a look at the caller's arguments.

    most: how many tokens it may come to have beyond those in the cache, where that is known: it gets room for these.
    """

    def __init__(self, steps: NativeSteps, cache: Any, most: int | None = None) -> None:
        steps.check_modules()
        described = steps.described
        if described is None or not steps.ready:
            raise NotThisCall("the model was changed: it has to be described anew first")
        self.steps, self._cache, self._described = steps, cache, described
        self._rooms = steps.admit(cache, most or 1, snug=most is not None)
        self._start = torch.zeros(1, dtype=torch.int64, device="cpu")

    @property
    def length(self) -> int:
        """Tokens whose keys and values are in the cache."""
        return self._rooms.length

    def _ready(self, program: StepProgram, more: int, at_once: int) -> kernel.Step:
        """For `more` tokens, the first `at_once` of them in one step."""
        self.steps.check_modules()
        self._reach(program, more, at_once)
        return self.steps.step_of(self._described, program)

    def _reach(self, program: StepProgram, more: int, at_once: int) -> None:
        """Makes sure that the sequence, and nothing but what the model is now, can go on by `more` tokens."""
        steps = self.steps
        if steps.described is not self._described:
            raise NotThisCall("the model was changed meanwhile")
        if steps.refusal is not None:
            raise NotCovered(steps.refusal)
        if steps.checkpoints.due(self.length, at_once):
            places = torch.arange(self.length, self.length + at_once, device="cpu")[None]
            steps.compare({"input_ids": places, "position_ids": places, "past_key_values": self._cache})
        if not self._rooms.fits(more):
            self._rooms = steps.admit(self._cache, more)
        self._described.of(program).reach(self.length + more)

    def step(self, tokens: Sequence[int], program: StepProgram) -> Tensor:
        """Logits ``[tokens, vocabulary]`` of 1 to 8 tokens that are appended."""
        step, count = self._ready(program, len(tokens), len(tokens)), len(tokens)
        ids = torch.tensor([tokens], device="cpu")
        positions = torch.arange(self.length, self.length + count, device="cpu")[None]
        logits, left_out = step.run(ids, positions, self._start, self._rooms.table, self.length, count)
        self._advance(count, program, left_out)
        return logits[0]

    def greedy(self, token: int, count: int, ends: Sequence[int], program: StepProgram) -> list[int]:
        """Appends `token` and returns the likeliest tokens after it: `count`, or fewer up to one of `ends`."""
        count = min(count, self.steps.checkpoints.room(self.length))
        step, past = self._ready(program, count, 1), self.length
        made, left_out = step.generate(token, past, 0, self._rooms.table, past, count, ends)
        self._advance(len(made), program, left_out)
        return made

    def draft(self, token: int, count: int, least: float, program: StepProgram) -> tuple[list[int], list[float]]:
        """Appends `token` and returns the likeliest tokens after it with their probabilities: `count`, or fewer up to
        one whose probability is below `least`."""
        count = min(count, self.steps.checkpoints.room(self.length))
        step, past = self._ready(program, count, 1), self.length
        made, chances, left_out = step.draft(token, past, 0, self._rooms.table, past, count, least)
        self._advance(len(made), program, left_out)
        return made, chances

    def _advance(self, tokens: int, program: StepProgram, left_out: float) -> None:
        self._rooms.advance(tokens)
        self.steps.count(tokens, program.skipped * tokens + left_out)

    def rollback(self, length: int) -> None:
        self._rooms.advance(length - self.length)

    @classmethod
    def greedy_together(
        cls, sequences: Sequence[NativeSequence], tokens: Sequence[int], count: int, ends: Sequence[Sequence[int]],
        program: StepProgram, hurry: ctypes.c_int32 | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """Appends a token to each of several sequences of one model; the likeliest tokens after each: `count`, or fewer
        up to where one of `ends`, its own, comes to any of those that go through the layers with it, or another
        thread sets `hurry` to 1.

        Raises:
            NotCovered: one of them has to be described, or to run on the modules, first. Nothing has been appended.
        """
        first = sequences[0]
        first.steps.check_modules()
        count = min(count, *(first.steps.checkpoints.room(sequence.length) for sequence in sequences))
        for sequence in sequences:
            sequence._reach(program, count, 1)
        step, made = first.steps.step_of(first._described, program), list[list[int]]()
        for at in range(0, len(sequences), step.most_tokens):
            some = slice(at, at + step.most_tokens)
            tables, lengths = [s._rooms.table for s in sequences[some]], [s.length for s in sequences[some]]
            found, left_out = step.generate_each(tokens[some], tables, lengths, count, ends[some], hurry)
            for sequence, new in zip(sequences[some], found, strict=True):
                sequence._rooms.advance(len(new))
            new_tokens = sum(map(len, found))
            first.steps.count(new_tokens, program.skipped * new_tokens + left_out)
            made += found
        return made

    @classmethod
    def step_together(cls, sequences: Sequence[NativeSequence], tokens: Sequence[int], program: StepProgram) -> Tensor:
        """Appends a token to each of several sequences of one model; logits ``[sequences, vocabulary]``.

        Raises:
            NotCovered: one of them has to be described, or to run on the modules, first. Nothing has been appended.
        """
        first = sequences[0]
        first.steps.check_modules()
        for sequence in sequences:
            sequence._reach(program, 1, 1)
        step, lengths = first.steps.step_of(first._described, program), [sequence.length for sequence in sequences]
        ids, places = (torch.tensor(values, device="cpu")[:, None] for values in (tokens, lengths))
        logits, left_out = step.run_each(ids, places, [s._rooms.table for s in sequences], lengths, 1)
        for sequence in sequences:
            sequence._rooms.advance(1)
        first.steps.count(len(tokens), program.skipped * len(tokens) + left_out)
        return logits[:, 0]
