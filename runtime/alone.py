"""An engine's calls without a scheduler: each is one of ``model.generate``, in the thread that made it or in one of its
own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer

from .behaviour import counting_abstentions
from .figures import Figures
from .generation_options import samples
from .stop_strings import StopStrings


@dataclass
class Latest:
    """Figures of the generation that ended last; None before the first."""

    figures: Figures | None = None


class Alone:
    """Calls of ``model.generate``. Those that sample wait for one another: they share the random number generator.

    Args:
        acquire: called before the model is used. latest: gets the figures of each call that has ended.
    """

    def __init__(self, model: Any, tokenizer: Any, acquire: Callable[[], None], latest: Latest) -> None:
        self._model, self._tokenizer, self._acquire, self._latest = model, tokenizer, acquire, latest
        self._sampling = threading.Lock()

    def run(self, inputs: dict[str, Any], options: dict[str, Any], seed: int | None, stops: list[str]) -> torch.Tensor:
        """Token ids of prompts and continuations, padded."""
        self._acquire()
        ids = inputs["input_ids"]
        if stops:
            criteria = [*(options.get("stopping_criteria") or ()), StopStrings(self._tokenizer, stops, ids.shape[1])]
            options = {**options, "stopping_criteria": StoppingCriteriaList(criteria)}
        streamer = options.get("streamer")
        new, start = 0, 0.0
        abstained = list[int]()
        try:
            with self._randomness(options, seed), counting_abstentions() as abstained:
                start = time.perf_counter()
                output = self._model.generate(**inputs, **options)
            output = cast(torch.Tensor, getattr(output, "sequences", output))
            new = (output.shape[1] - ids.shape[1]) * output.shape[0]
        except _Abandoned:
            new = len(cast(Any, streamer).made)
            raise
        finally:
            if new:
                end, first = time.perf_counter(), getattr(streamer, "first_at", None)
                begun = None if first is None else first - start
                self._latest.figures = Figures(ids.numel(), new, end - start, begun, sum(abstained))
        return output

    def pieces(
        self, inputs: dict[str, Any], options: dict[str, Any], seed: int | None, stops: list[str], made: list[int]
    ) -> Generator[str, None, None]:
        """The text piece by piece, made in a thread of its own. made: gets the ids of the new tokens."""
        streamer = _Streamer(self._tokenizer, made)
        failure: list[BaseException] = []

        def work() -> None:
            try:
                self.run(inputs, {**options, "streamer": streamer}, seed, stops)
            except _Abandoned:
                pass
            except BaseException as error:  # handed to the consumer's thread, which raises it
                failure.append(error)
                streamer.end()  # type: ignore[no-untyped-call]

        thread = threading.Thread(target=work, name="coreskip-stream", daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            streamer.abandoned.set()
            thread.join()
        if failure:
            raise failure[0]

    @contextlib.contextmanager
    def _randomness(self, options: dict[str, Any], seed: int | None) -> Iterator[None]:
        """One sampling call at a time, from its own seed if it has one; the caller's random state is untouched."""
        if not samples(self._model, options):
            yield
            return
        with self._sampling:
            if seed is None:
                yield
                return
            devices = [self._model.device] if self._model.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                yield


class _Abandoned(Exception):
    """Ends a generation whose consumer went away."""


class _Streamer(TextIteratorStreamer):
    """A stream that ends its generation from within: a stopping criterion, which has to be asked about every token,
    would keep greedy text from being made several tokens a call (255 against 311 tok/s in int4).

    made: gets the ids of new tokens.
    """

    def __init__(self, tokenizer: Any, made: list[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.abandoned = threading.Event()
        self.made = made
        self.first_at: float | None = None  # by time.perf_counter

    def put(self, value: torch.Tensor) -> None:
        if self.abandoned.is_set():
            raise _Abandoned
        if not self.next_tokens_are_prompt:
            if self.first_at is None:
                self.first_at = time.perf_counter()
            self.made.extend(value.flatten().tolist())
        super().put(value)  # type: ignore[no-untyped-call]
