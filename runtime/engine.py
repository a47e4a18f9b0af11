"""Serving from Python: text in, text out, whole or streamed, from any number of threads."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer

from ..predictors.anatomy import check_model
from ..predictors.calibration import check_tokenizer
from ..predictors.checks import check_flag, check_weights, kind_of
from ..predictors.errors import CoreskipError
from ..predictors.plan import Plan
from .drafting import Statistics
from .figures import Figures
from .generation_options import check_length, learned_positions, own_options, samples
from .memory import cap_of
from .memory_size import bytes_of
from .prompts import Message, Prompt, as_batch, render
from .shared_wrapping import Settings, SharedWrapping
from .stop_strings import StopStrings, cut, stop_before
from .unknown import refuses_unknown
from .wrap import is_wrapped, make_way, runtime_of


class Engine:
    """A model, its tokenizer and a plan, ready to generate.

    Prompts are texts, or chats: lists of ``{"role": ..., "content": ...}`` that the tokenizer's template renders; one
    such message by itself is a chat, too. Every keyword argument of ``model.generate`` is taken (``max_new_tokens``,
    ``do_sample``, ``num_beams``, ...), besides

    - ``stop_strings``: a string or several; the text ends before the first that appears;
    - ``seed``: makes sampling repeatable, whatever other threads do; from 0 to 2**64 - 1;
    - ``temperature``: 0 is greedy.

    Threads may call at once: each call has its own KV cache and neuron selections. Calls that sample wait for one
    another, since they share the random number generator.

    Args:
        model: a causal LM. The engine wraps it until `close`, or until nobody holds the engine any more. A model that
            the caller has wrapped is used as it is; engines with the same settings share one wrapping.
        plan: or the path of one; None for the dense model on the fast path, or on plain transformers where coreskip
            does not cover the model. The wrapping of an engine without a plan gives way to whoever wraps, analyses or
            evaluates the model, and comes back with the engine's next call.
        exact: as for `wrap`; without a plan, drafts come from the text alone.
        keep_originals, lookup, memory: as for `wrap`.
        weights: ``"int4"`` or ``"int8"``: the format in which decode steps read their weights, in place of the plan's
            own; None leaves the plan's.
        plain: plain transformers, without anything of coreskip's.

    Raises:
        CoreskipError: a plan of another model, weights that no kernel reads here, a model that is wrapped with other
            settings, something that is no model or no tokenizer. Nothing was changed.
    """

    @refuses_unknown
    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        plan: Plan | str | os.PathLike[str] | None = None,
        *,
        exact: bool = False,
        keep_originals: bool | None = None,
        lookup: bool = False,
        weights: str | None = None,
        plain: bool = False,
        memory: int | str | None = None,
    ) -> None:
        check_model(model)
        _check_tokenizer(tokenizer)
        for name, flag in (("exact", exact), ("lookup", lookup), ("plain", plain)):
            check_flag(name, flag)
        check_flag("keep_originals", keep_originals, none=True)
        check_weights(weights)
        cap = cap_of(model) if memory is None else bytes_of(memory)
        settings = Settings(plan, exact, keep_originals, lookup, weights, cap)
        self._wrapping: SharedWrapping | None = None
        if plain and settings.given:
            raise CoreskipError("plain is plain transformers: leave out plan, exact, lookup, weights and memory")
        if plain:
            make_way(model)
        else:
            self._wrapping = SharedWrapping(model, settings)
            self._release = weakref.finalize(self, self._wrapping.release)
            self._release.atexit = False
        self.model, self.tokenizer = model, tokenizer
        self._positions = learned_positions(model)
        self._sampling = threading.Lock()
        self._tokenizing = threading.Lock()  # fast tokenizers keep padding and truncation as shared state
        self.figures: Figures | None = None  # of the generation that ended last

    def close(self) -> None:
        """Unwrap the model, if this engine wrapped it, no other engine shares that, and the model's own weights are not
        gone (``keep_originals=False``)."""
        if self._wrapping is not None:
            self._release()
            self._wrapping = None

    def acquire(self) -> None:
        """Have the model wrapped as this engine uses it: without a plan somebody may have unwrapped it meanwhile."""
        if self._wrapping is not None:
            self._wrapping.acquire()

    @property
    def statistics(self) -> Statistics | None:
        """Of the generation with drafts (exact mode, lookup) that ended last; None before the first, and without."""
        runtime = runtime_of(self.model) if is_wrapped(self.model) else None
        drafter = None if runtime is None else runtime.exact or runtime.lookup
        return None if drafter is None else drafter.last

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def generate(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> Any:
        """The continuation of one prompt, or of several at once.

        Returns:
            one text for one prompt, a list for a list of prompts; with ``num_return_sequences`` above 1, a list of
            that many texts in place of each.

        Raises:
            CoreskipError: a prompt or an option that makes no sense, messages that the chat template refuses, more
                tokens than the model has learned positions for. Nothing was run.
        """
        prompts, single = as_batch(prompt)
        seed, stops, options = own_options(self.model, options)
        inputs = self.encode(prompts, options)
        output = self._run(inputs, options, seed, stops)
        texts = [cut(text, stops) for text in self._decode(output[:, inputs["input_ids"].shape[1] :])]
        each = len(texts) // len(prompts)
        if each > 1:
            grouped = [texts[i : i + each] for i in range(0, len(texts), each)]
            return grouped[0] if single else grouped
        return texts[0] if single else texts

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """The continuation of one prompt, piece by piece as it is generated; closing the iterator stops generation.

        An exception in generation is raised here.
        """
        prompts, single = as_batch(prompt)
        if not single:
            raise CoreskipError("stream takes one prompt; use generate for several")
        seed, stops, options = self.stream_options(options)
        return self.pieces(self.encode(prompts, options), options, seed, stops)

    def stream_options(self, options: dict[str, Any]) -> tuple[int | None, list[str], dict[str, Any]]:
        """As `own_options`, for what is streamed."""
        if options.get("streamer") is not None:
            raise CoreskipError("a stream has a streamer of its own: leave it out, or use generate")
        seed, stops, options = own_options(self.model, options)
        if (options.get("num_beams") or 1) > 1 or (options.get("num_return_sequences") or 1) > 1:
            raise CoreskipError("a stream is one sequence: leave out num_beams and num_return_sequences")
        return seed, stops, options

    def pieces(
        self,
        inputs: dict[str, Any],
        options: dict[str, Any],
        seed: int | None,
        stops: list[str],
        made: list[int] | None = None,
    ) -> Iterator[str]:
        """The continuation of one row of token ids, as text piece by piece up to a stop string.

        Args:
            inputs: of ``model.generate``: ``input_ids`` and ``attention_mask``, perhaps a KV cache.
            options, seed, stops: from `stream_options`.
            made: gets the ids of the new tokens, as far as they were made before the consumer went away.
        """
        return stop_before(self._pieces(inputs, options, seed, stops, [] if made is None else made), stops)

    def _pieces(
        self, inputs: dict[str, Any], options: dict[str, Any], seed: int | None, stops: list[str], made: list[int]
    ) -> Iterator[str]:
        streamer = _Pieces(self.tokenizer, made)
        failure: list[BaseException] = []

        def work() -> None:
            try:
                self._run(inputs, {**options, "streamer": streamer}, seed, stops)
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

    def _run(self, inputs: dict[str, Any], options: dict[str, Any], seed: int | None, stops: list[str]) -> torch.Tensor:
        self.acquire()
        ids = inputs["input_ids"]
        if stops:
            criteria = [*(options.get("stopping_criteria") or ()), StopStrings(self.tokenizer, stops, ids.shape[1])]
            options = {**options, "stopping_criteria": StoppingCriteriaList(criteria)}
        streamer = options.get("streamer")
        new, start = 0, 0.0
        try:
            with self._randomness(options, seed):
                start = time.perf_counter()
                output = self.model.generate(**inputs, **options)
            output = cast(torch.Tensor, getattr(output, "sequences", output))
            new = (output.shape[1] - ids.shape[1]) * output.shape[0]
        except _Abandoned:
            new = len(cast(Any, streamer).made)
            raise
        finally:
            if new:
                end, first = time.perf_counter(), getattr(streamer, "first_at", None)
                self.figures = Figures(ids.numel(), new, end - start, None if first is None else first - start)
        return output

    @contextlib.contextmanager
    def _randomness(self, options: dict[str, Any], seed: int | None) -> Iterator[None]:
        """One sampling call at a time, from its own seed if it has one; the caller's random state is untouched."""
        if not samples(self.model, options):
            yield
            return
        with self._sampling:
            if seed is None:
                yield
                return
            devices = [self.model.device] if self.model.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                yield

    def tokenize(self, texts: list[str], *, special: bool) -> list[list[int]]:
        """Token ids of each text; `special`: with what the tokenizer puts around every text, such as BOS."""
        with self._tokenizing:
            rows = self.tokenizer(texts, add_special_tokens=special, padding=False)["input_ids"]
        if not all(rows):
            raise CoreskipError("the tokenizer makes no token of a prompt: give some text")
        return [list(row) for row in rows]

    def encode(self, prompts: list[str | list[Message]], options: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Token ids ``[prompts, longest]`` and their attention mask, padded on the left."""
        texts = [p if isinstance(p, str) else render(self.tokenizer, p) for p in prompts]
        # a chat template writes its own special tokens
        rows = self.tokenize(texts, special=isinstance(prompts[0], str))
        longest = max(map(len, rows))
        self.check_length(longest, options)
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        pad = next(id for id in ids if id is not None)  # which one does not matter: it is masked
        padded = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": padded.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def check_length(self, tokens: int, options: dict[str, Any]) -> None:
        """Raise `CoreskipError` where a prompt of so many tokens and its continuation have no learned positions."""
        check_length(self.model, self._positions, tokens, options)

    def _decode(self, ids: torch.Tensor) -> list[str]:
        return cast("list[str]", self.tokenizer.batch_decode(ids, skip_special_tokens=True))


def _check_tokenizer(tokenizer: Any) -> None:
    check_tokenizer(tokenizer)
    if hasattr(tokenizer, "tokenizer"):
        raise CoreskipError(f"{type(tokenizer).__name__} holds the tokenizer: pass its .tokenizer")
    if not hasattr(tokenizer, "batch_decode"):
        raise CoreskipError(f"the tokenizer is {kind_of(tokenizer)}: give the one that coreskip.load() returned")


class _Abandoned(Exception):
    """Ends a generation whose consumer went away."""


class _Pieces(TextIteratorStreamer):
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
