"""Many requests on one model: one thread decodes all of them, step by step; they join and leave between steps."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..predictors.errors import CoreskipError
from .decoding import Decoder
from .memory_size import free_memory
from .prompt_cache import PromptCache
from .running import Running
from .sequence import Busy, Load

logger = logging.getLogger("coreskip")

_SHARE = 0.5  # of the memory that is free, for keys and values
_WHOLE = 128  # positions by which room for keys and values grows
_RETRY_S = 1.0, 60.0  # what a full queue asks to wait, at least and at most
_MOST_PROMPTS = 10**9  # bytes: else a server grows for hours, into memory that nobody gave it


def prompts_beside(kv_bytes: int) -> int:
    """Bytes for prompts that were read before, where nobody said."""
    return min(kv_bytes // 4, _MOST_PROMPTS)


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        batch: sequences that run at once.
        waiting: requests in the queue; None: any number.
        kv_bytes: of keys and values; None: half of the memory that is free when the scheduler starts.
        prompt_bytes: of keys and values of prompts that were read before; None: a quarter of `kv_bytes`, beside these,
            but not more than 1 GB.
        chunk: tokens of a prompt that are read between two steps.
    """

    batch: int
    waiting: int | None = None
    kv_bytes: int | None = None
    prompt_bytes: int | None = None
    chunk: int = 256


class Scheduler:
    """Runs sequences of one model, first come first served.

    A sequence is admitted when one of `limits.batch` places is free and its keys and values, with all the tokens that
    it may make, fit beside the others': so none has to be stopped later. Nobody overtakes the first one in the queue.
    Between two steps one chunk of a prompt is read, the first one's that came, or as many short prompts as make one.

    Args:
        acquire: called before the model is used; has it wrapped as it should be.
    """

    def __init__(self, model: Any, limits: Limits, acquire: Callable[[], None]) -> None:
        self._limits, self._acquire = limits, acquire
        self._memory = _Memory(model, limits.kv_bytes)
        kept = prompts_beside(self._memory.limit) if limits.prompt_bytes is None else limits.prompt_bytes
        self._decoder = Decoder(model, limits.chunk, PromptCache(kept, limits.chunk))
        self._changed = threading.Condition()
        self._waiting: deque[Running] = deque()
        self._running: list[Running] = []
        self._closing = False
        self._steps = self._decoded = self._prefilled = self._cached = 0
        self._step_s = 0.0  # a step takes, of late
        self._batch_sizes: Counter[int] = Counter()
        self._thread = threading.Thread(target=self._work, name="coreskip-scheduler", daemon=True)
        self._thread.start()

    # --- from any thread

    def wake(self) -> None:
        """Something has changed: a request was cancelled."""
        with self._changed:
            self._decoder.hurry.value = 1
            self._changed.notify_all()

    def check(self, prompt: int, most: int) -> None:
        """
        Raises:
            CoreskipError: so many tokens can never fit the memory for keys and values.
        """
        needed = self._memory.needed(prompt + most)
        if needed > self._memory.limit:
            raise CoreskipError(
                f"keys and values of {prompt} + {most} tokens take {needed / 1e6:.0f} MB, more than the "
                f"{self._memory.limit / 1e6:.0f} MB that there are for all: ask for fewer tokens"
            )

    def submit(self, sequence: Running) -> None:
        """Queue a sequence that `check` has accepted; its ticket tells what becomes of it.

        Raises:
            Busy: the queue is full. CoreskipError: the scheduler is closed.
        """
        sequence.nbytes = self._memory.needed(sequence.prompt + sequence.most)
        with self._changed:
            if self._closing:
                raise CoreskipError("the engine is closed: make another one")
            waiting = [other for other in self._waiting if not other.ticket.cancelled]
            held = len(waiting) + 1 - self._admissible([*waiting, sequence])
            if self._limits.waiting is not None and held > self._limits.waiting:
                raise Busy(held - 1, self._retry_after())
            self._waiting.append(sequence)
            self._decoder.hurry.value |= held == 0  # all who wait have a place
            self._changed.notify_all()

    def load(self) -> Load:
        with self._changed:
            return Load(
                running=sum(sequence.finish is None for sequence in self._running),
                waiting=len(self._waiting),
                max_batch=self._limits.batch,
                max_waiting=self._limits.waiting,
                kv_bytes=sum(sequence.nbytes for sequence in self._running if sequence.finish is None),
                kv_limit=self._memory.limit,
                decode_tokens=self._decoded,
                prefill_tokens=self._prefilled,
                cached_tokens=self._cached,
                steps=self._steps,
                batch_sizes=dict(self._batch_sizes),
            )

    def close(self) -> None:
        """End everything: whoever waits gets a last event. Returns when the model is not used any more."""
        with self._changed:
            self._closing = True
            self._decoder.hurry.value = 1
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _retry_after(self) -> float:
        """When the sequence next to end will have ended, at the speed of late."""
        left = min((sequence.room for sequence in self._running), default=0)
        return min(max(left * self._step_s, _RETRY_S[0]), _RETRY_S[1])

    # --- in the thread that decodes

    def _work(self) -> None:
        while True:
            with self._changed:
                self._sweep()
                while not (self._waiting or self._running or self._closing):
                    self._changed.wait()
                    self._sweep()
                if self._closing:
                    break
                self._decoder.hurry.value = 0  # what it told of is looked at here
                self._admit()
            try:
                self._turn()
            except Exception as error:
                logger.exception("a turn of the scheduler failed")
                for sequence in self._running:
                    sequence.end("error", error)
        for sequence in [*self._running, *self._waiting]:
            sequence.end("cancelled")
        self._running, self._waiting = [], deque()

    def _sweep(self) -> None:
        """Lets those go that have ended or were cancelled."""
        for sequence in [*self._running, *self._waiting]:
            if sequence.ticket.cancelled:
                sequence.end("cancelled")
        self._running = [sequence for sequence in self._running if sequence.finish is None]
        self._waiting = deque(sequence for sequence in self._waiting if sequence.finish is None)

    def _admit(self) -> None:
        for _ in range(self._admissible(list(self._waiting))):
            self._running.append(self._waiting.popleft())

    def _admissible(self, waiting: list[Running]) -> int:
        """How many of those that wait have a place now: the first ones, up to one that has none."""
        running = [sequence for sequence in self._running if sequence.finish is None]
        room = self._memory.limit - sum(sequence.nbytes for sequence in running)
        for count, sequence in enumerate(waiting):
            room -= sequence.nbytes
            if len(running) + count >= self._limits.batch or room < 0:
                return count
        return len(waiting)

    def _turn(self) -> None:
        """One chunk of a prompt, or several short ones that are no more together, and a step of all whose prompts have
        been read: prompts read one by one would have the others wait for as many steps of ever more rows."""
        self._acquire()
        room = self._limits.chunk
        for sequence in self._running:
            while sequence.finish is None and not sequence.decodes and not sequence.ticket.cancelled:
                wanted = min(self._limits.chunk, sequence.prompt - sequence.read)
                if wanted > room:
                    break
                room -= wanted
                self._read(sequence)
            if not sequence.decodes and sequence.finish is None:
                break  # nobody overtakes the first one
        decoding = [s for s in self._running if s.decodes and s.finish is None and not s.ticket.cancelled]
        if decoding:
            self._step(decoding)

    def _read(self, sequence: Running) -> None:
        timings = sequence.ticket.timings
        timings.started, usage = timings.started or time.perf_counter(), sequence.ticket.usage
        cached = usage.cached_tokens
        try:
            self._prefilled += self._decoder.prefill(sequence)
            self._cached += usage.cached_tokens - cached
        except Exception as error:  # a processor's, a constraint's, or the model's on this prompt
            sequence.end("error", error)

    def _step(self, decoding: list[Running]) -> None:
        start, before = time.perf_counter(), [sequence.length for sequence in decoding]
        self._decoder.step(decoding, undisturbed=all(sequence.decodes for sequence in self._running))
        made = [sequence.length - length for sequence, length in zip(decoding, before, strict=True)]
        steps = max(1, *made)
        self._steps += steps
        self._decoded += sum(made)
        self._batch_sizes[len(decoding)] += steps
        each = (time.perf_counter() - start) / steps
        self._step_s = each if self._step_s == 0 else 0.9 * self._step_s + 0.1 * each


class _Memory:
    """What sequences need for keys and values, and how much there is."""

    def __init__(self, model: Any, limit: int | None) -> None:
        self._each = bytes_a_position(model)
        self.limit = limit if limit is not None else int(_SHARE * _free(model.device))

    def needed(self, positions: int) -> int:
        return -(-positions // _WHOLE) * _WHOLE * self._each


def bytes_a_position(model: Any) -> int:
    """Of the keys and values of one token in all layers, by the model's configuration: at most, for some have fewer."""
    config = model.config.get_text_config()
    heads = _most(config, "num_attention_heads", 1)
    kept = _most(config, "num_key_value_heads", heads)
    size = _most(config, "head_dim", _most(config, "hidden_size", 1) // heads)
    return 2 * _most(config, "num_hidden_layers", 1) * kept * size * int(model.dtype.itemsize)


def _most(config: Any, name: str, otherwise: int) -> int:
    """A number of a configuration, the largest where it has one for each layer."""
    found = getattr(config, name, None)
    numbers = [n for n in (found if isinstance(found, (list, tuple)) else [found]) if isinstance(n, int) and n > 0]
    return max(numbers, default=otherwise)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()
