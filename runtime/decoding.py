"""How a scheduler's sequences read their prompts and decode: together in one native step where that gives each of them
the bits that it gets alone, else one after another."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..kernels.step import likeliest
from .behaviour import note_abstentions
from .calls import NotCovered
from .lower_cpu import StepProgram
from .native import NativeSequence
from .phases import as_loaded, densely, prefilling
from .prompt_cache import PromptCache, filled
from .running import Running
from .selections import selections_in
from .sequence import prompt_logprobs
from .steps import Lowering, Steps
from .wrap import is_wrapped, runtime_of

# Tokens that each sequence makes in one native call where nothing but the likeliest ones are wanted, and the seconds
# that they may take: they reach their readers together. Who comes or goes meanwhile ends the call with its next step.
# Token by token, 16 sequences spent 2.3 ms between steps of 10.
AT_ONCE, AT_ONCE_S = 16, 0.1
IN_TURN = 8  # tokens that a sequence makes in its turn where to change caches costs a GPU more than a step


class Decoder:
    """Passes of one model over the caches of many sequences.

    Args:
        chunk: how many tokens of a prompt one pass reads at most. Chunks begin at multiples of it, so that what a
            prompt comes to does not depend on what runs beside it.
        prompts: what was read before.
    """

    def __init__(self, model: Any, chunk: int, prompts: PromptCache) -> None:
        self.model, self.chunk, self._prompts = model, chunk, prompts
        self.hurry = ctypes.c_int32(0)  # 1, from any thread: a native call of several tokens ends with its next step
        self._pace = 1, AT_ONCE_S  # sequences of the last native call of several tokens, and seconds a step of it took
        self._keep_last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}

    # --- prompts

    @torch.no_grad()
    def prefill(self, sequence: Running) -> int:
        """Reads the next chunk of a prompt; with the last one comes the first new token. Returns how many tokens were
        computed."""
        if sequence.cache is None:
            known = self._begin(sequence)
            if known is not None:
                self._first_token(sequence, known)
                return 0
        begin = sequence.read
        end = min(begin + self.chunk, sequence.prompt)
        keep = self._keep_last if sequence.echo is None else {}
        ids = sequence.ids[:, begin:end].to(self.model.device)
        with prefilling(), _lane(sequence):
            output = self.model(input_ids=ids, past_key_values=sequence.cache, use_cache=True, **keep)
        sequence.read = end
        logits: Tensor = output.logits[0]
        if sequence.echo is not None:
            self._echo(sequence, logits, begin, end)
        if sequence.state is self._state() and selections_in(sequence.cache) is None:
            whole = logits[-1].clone() if sequence.decodes else None
            self._prompts.keep(sequence.dense, sequence.ids[0, :end].tolist(), sequence.cache, begin, whole)
        if sequence.decodes:
            sequence.ticket.usage.abstained = bool(note_abstentions(sequence.cache))
            self._first_token(sequence, logits[-1])
        return end - begin

    def _begin(self, sequence: Running) -> Tensor | None:
        """Gives a sequence its cache, with what was read of its prompt before; logits where that is all of it."""
        sequence.state = self._state()
        self._prompts.check(sequence.state)
        blocks = [] if sequence.echo is not None else self._prompts.find(sequence.dense, sequence.ids[0].tolist())
        sequence.cache = filled(self.model.config, blocks) if blocks else DynamicCache(config=self.model.config)
        sequence.read = sequence.ticket.usage.cached_tokens = sum(block.tokens for block in blocks)
        return blocks[-1].logits if sequence.decodes else None

    def _state(self) -> object:
        """The same object as long as the model is not changed; None where nobody notices that."""
        if not is_wrapped(self.model):
            return None
        runtime = runtime_of(self.model)
        runtime.notice(every_setting=True)
        # hooks (a steered model's) may come to something else for the same tokens
        return None if runtime.changes.obstacle() is not None else runtime.prepared

    @staticmethod
    def _first_token(sequence: Running, logits: Tensor) -> None:
        if sequence.most == 0:
            sequence.end("length")
        else:
            sequence.choose(logits)

    @staticmethod
    def _echo(sequence: Running, logits: Tensor, begin: int, end: int) -> None:
        following = sequence.ids[0, begin + 1 : min(end, sequence.prompt - 1) + 1].tolist()
        found = prompt_logprobs(logits[: len(following)], following, sequence.echo or 0)
        ticket = sequence.ticket
        ticket.prompt_logprobs = [*(ticket.prompt_logprobs or [None]), *found]

    # --- steps

    @torch.no_grad()
    def step(self, sequences: Sequence[Running], undisturbed: bool) -> None:
        """Every sequence goes on by one token at least; `undisturbed`, where no other one has a prompt to read, by
        several if these are the likeliest. An error ends the one that it comes from."""
        steps = runtime_of(self.model).steps if is_wrapped(self.model) else None
        groups, rest = self._grouped(sequences, steps)
        for group in groups:
            try:
                self._natively(group, undisturbed and len(groups) == 1 and not rest)
            except NotCovered:  # of one of them: the model's own pass covers it, or describes the model anew
                rest += [sequence for sequence, _ in group]
        for sequence in rest:
            if sequence.finish is None:
                self._by_the_model(sequence, steps)

    def _grouped(
        self, sequences: Sequence[Running], steps: Steps | None
    ) -> tuple[list[list[tuple[Running, NativeSequence]]], list[Running]]:
        """Those that may share a native step, and those that no native step covers."""
        groups: dict[object, list[tuple[Running, NativeSequence]]] = {}
        rest = []
        for sequence in sequences:
            native = self._native(sequence, steps)
            if native is None:
                rest.append(sequence)
                continue
            stepper, program = native
            key = program if shares_steps(program) else sequence
            groups.setdefault(key, []).append((sequence, stepper))
        return list(groups.values()), rest

    @staticmethod
    def _native(sequence: Running, steps: Steps | None) -> tuple[NativeSequence, StepProgram] | None:
        if steps is None:
            sequence.native = None
        elif sequence.native is None or sequence.native[0].steps is not steps.native:
            assert sequence.cache is not None
            sequence.native = steps.sequence(sequence.cache, sequence.room, dense=sequence.dense)
        return sequence.native

    def _natively(self, group: list[tuple[Running, NativeSequence]], undisturbed: bool) -> None:
        first = group[0][0]
        assert first.native is not None
        program = first.native[1]
        try:
            if undisturbed and all(sequence.plain for sequence, _ in group):
                self._greedily(group, program)
                return
            logits = NativeSequence.step_together([native for _, native in group], [s.last for s, _ in group], program)
        except NotCovered:
            for sequence, _ in group:
                sequence.native = None
            raise
        plain = [i for i, (sequence, _) in enumerate(group) if sequence.plain]
        chosen = dict(zip(plain, likeliest(logits[plain], chances=False)[0], strict=True)) if plain else {}
        for i, (sequence, _) in enumerate(group):
            with _Isolated(sequence):
                sequence.extend([chosen[i]]) if i in chosen else sequence.choose(logits[i])

    def _greedily(self, group: list[tuple[Running, NativeSequence]], program: StepProgram) -> None:
        """Several tokens of each without leaving the native code, up to where the first of them may end."""
        start = time.perf_counter()
        sequences, steppers = [sequence for sequence, _ in group], [stepper for _, stepper in group]
        count = min(AT_ONCE, *(s.room for s in sequences), max(1, int(AT_ONCE_S / self._pace_of(len(group)))))
        ends = [sorted(s.ends) for s in sequences]
        last = [s.last for s in sequences]
        made = NativeSequence.greedy_together(steppers, last, count, ends, program, self.hurry)
        self._pace = len(group), (time.perf_counter() - start) / len(made[0])
        for sequence, tokens in zip(sequences, made, strict=True):
            with _Isolated(sequence):
                sequence.extend(tokens)

    def _pace_of(self, rows: int) -> float:
        """Seconds that a step of so many rows may take: as the last one took, and more for more rows than that had."""
        before, seconds = self._pace
        return seconds * max(1.0, rows / before)

    def _by_the_model(self, sequence: Running, steps: Steps | None) -> None:
        turn = IN_TURN if steps is not None and steps.lowering is Lowering.CAPTURED else 1
        with _Isolated(sequence), _lane(sequence):
            for _ in range(turn):
                ids = sequence.ids[:, -1:].to(self.model.device)
                output = self.model(input_ids=ids, past_key_values=sequence.cache, use_cache=True)
                sequence.choose(output.logits[0, -1])
                if sequence.finish is not None:
                    break


def shares_steps(program: StepProgram) -> bool:
    """Whether a step of several sequences gives each the bits of a step of its own. Where each token chooses its
    neurons, what the threads add up is divided by what any of the tokens has chosen."""
    return all(mlp is None or (mlp.rule == "listed" and _alike(mlp)) for mlp in program.mlps)


def _alike(mlp: Any) -> bool:
    return mlp.lists is None or mlp.lists.rows is None


@contextmanager
def _lane(sequence: Running) -> Iterator[None]:
    """Passes inside are those of the sequence's lane."""
    if not sequence.dense:
        yield
        return
    with densely(), as_loaded():
        yield


class _Isolated:
    """An error inside ends one sequence, and nothing else."""

    def __init__(self, sequence: Running) -> None:
        self._sequence = sequence

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        self._sequence.end("error", error)
        return True
