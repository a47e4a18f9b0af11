"""Serving from Python: text in, text out, whole or streamed, from any number of threads."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from ..predictors.anatomy import check_model
from ..predictors.calibration import check_tokenizer
from ..predictors.checks import check_count, check_flag, check_weights, kind_of
from ..predictors.errors import CoreskipError
from ..predictors.plan import Plan
from .alone import Alone, Latest
from .batching import (
    Batching,
    Call,
    acollected,
    atexts_of,
    check_batches,
    collected,
    figures_of,
    finished,
    in_threads,
    texts_of,
)
from .drafting import Statistics
from .figures import Figures
from .generation_options import check_length, learned_positions, own_options
from .memory import cap_of
from .memory_size import bytes_of
from .prompts import Message, Prompt, as_batch, render
from .scheduler import Limits, prompts_beside
from .sequence import Event, Load, Request, Ticket
from .shared_wrapping import Settings, SharedWrapping
from .stop_strings import cut, stop_before
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
        keep_originals, lookup, memory: as for `wrap`; with max_batch, keys and values of texts are among the memory.
        weights: ``"int4"`` or ``"int8"``: the format in which decode steps read their weights, in place of the plan's
            own; None leaves the plan's.
        plain: plain transformers, without anything of coreskip's.
        max_batch: how many sequences decode together. Calls from threads and from asyncio tasks then share steps, each
            with its own random numbers; greedy texts are those that each call gets alone. Where native steps cover the
            model, a step of several sequences reads the weights once; elsewhere sequences take turns. With ``exact`` or
            ``lookup`` sequences decode without drafts. None: every call decodes by itself, in its own thread.
        max_waiting: of max_batch: how many requests may wait for a place; one more raises `Busy`. None: any number.
        kv_bytes: of max_batch: memory for the keys and values of all that run; None: half of what is free.
        prompt_bytes: of max_batch: memory for prompts that were read before, so that what begins alike, in whole
            chunks, or is the same is not read again; None: a quarter of `kv_bytes`, beside these, but not more than
            1 GB; 0: none.
        prefill_chunk: of max_batch: how many tokens of a prompt are read between two steps.

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
        max_batch: int | None = None,
        max_waiting: int | None = None,
        kv_bytes: int | None = None,
        prompt_bytes: int | None = None,
        prefill_chunk: int = 256,
    ) -> None:
        check_model(model)
        _check_tokenizer(tokenizer)
        for name, flag in (("exact", exact), ("lookup", lookup), ("plain", plain)):
            check_flag(name, flag)
        check_flag("keep_originals", keep_originals, none=True)
        check_weights(weights)
        limits = _limits(max_batch, max_waiting, kv_bytes, prompt_bytes, prefill_chunk)
        if limits is not None:
            check_batches(model)
        cap = cap_of(model) if memory is None else bytes_of(memory)
        if cap is not None and limits is not None:
            cap, limits = _shared_out(cap, limits)
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
        self._tokenizing = threading.Lock()  # fast tokenizers keep padding and truncation as shared state
        acquire = (lambda: None) if self._wrapping is None else self._wrapping.acquire
        self._latest = Latest()
        self._alone = Alone(model, tokenizer, acquire, self._latest)
        self._batching: Batching | None = None
        if limits is not None:
            self._batching = Batching(model, tokenizer, limits, acquire)
            self._stop = weakref.finalize(self, self._batching.close)

    def close(self) -> None:
        """Unwrap the model, if this engine wrapped it, no other engine shares that, and the model's own weights are not
        gone (``keep_originals=False``). Sequences of ``max_batch`` that are under way end first, cancelled."""
        if self._batching is not None:
            self._stop()
        if self._wrapping is not None:
            self._release()
            self._wrapping = None

    def acquire(self) -> None:
        """Have the model wrapped as this engine uses it: without a plan somebody may have unwrapped it meanwhile."""
        if self._wrapping is not None:
            self._wrapping.acquire()

    @property
    def figures(self) -> Figures | None:
        """Of the generation that ended last; None before the first."""
        return self._latest.figures

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
        tickets = self._start(prompts, options, seed, stops)
        if tickets is None:
            texts = self._generated(prompts, options, seed, stops)
        else:
            texts = self._texts(tickets, collected(tickets), stops)
        return _arranged(texts, len(prompts), single)

    async def agenerate(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> Any:
        """`generate` for an asyncio task. Where that is cancelled, an engine with ``max_batch`` stops generating."""
        prompts, single = as_batch(prompt)
        seed, stops, options = own_options(self.model, options)
        tickets = await asyncio.to_thread(self._start, prompts, options, seed, stops)
        if tickets is None:
            texts = await asyncio.to_thread(self._generated, prompts, options, seed, stops)
        else:
            texts = self._texts(tickets, await acollected(tickets), stops)
        return _arranged(texts, len(prompts), single)

    def _start(
        self, prompts: list[str | list[Message]], options: dict[str, Any], seed: int | None, stops: list[str]
    ) -> list[Ticket] | None:
        """Every prompt's sequences under way in the scheduler; None where there is none, or it does not cover the call.
        Sequences of one seed have random numbers of their own: the seeds that follow it."""
        if self._batching is None:
            return None
        each = options.get("num_return_sequences") or 1
        options = {name: value for name, value in options.items() if name != "num_return_sequences"}
        inputs = [self.encode([prompt], options) for prompt in prompts for _ in range(each)]
        seeds = [None if seed is None else (seed + i) % 2**64 for i in range(len(inputs))]
        return self._batching.start_all([Call(i, options, s, stops) for i, s in zip(inputs, seeds, strict=True)])

    def _texts(self, tickets: list[Ticket], events: list[Event], stops: list[str]) -> list[str]:
        self._note(tickets)
        found = [finished(ticket, event) for ticket, event in zip(tickets, events, strict=True)]
        return [cut(text, stops) for event in found for text in self._decode([event.tokens])]

    def _generated(
        self, prompts: list[str | list[Message]], options: dict[str, Any], seed: int | None, stops: list[str]
    ) -> list[str]:
        """The texts of one call of ``model.generate``."""
        inputs = self.encode(prompts, options)
        output = self._alone.run(inputs, options, seed, stops)
        return [cut(text, stops) for text in self._decode(output[:, inputs["input_ids"].shape[1] :])]

    def submit(self, request: Request) -> Ticket:
        """Queue a request on tokens; its ticket is iterated, in a thread or an asyncio task, as it goes on. Needs
        ``max_batch``.

        Raises:
            CoreskipError: a field that makes no sense, more tokens than the model has positions or the engine memory
                for, an engine without ``max_batch``. Busy: the queue is full. Nothing was queued.
        """
        return self._batched().submit(request)

    def load(self) -> Load:
        """What an engine with ``max_batch`` does now, and has done so far."""
        return self._batched().load()

    def _batched(self) -> Batching:
        if self._batching is None:
            raise CoreskipError("this engine has no scheduler: make it with max_batch=N")
        return self._batching

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """The continuation of one prompt, piece by piece as it is generated; closing the iterator stops generation.

        An exception in generation is raised here.
        """
        prompts, single = as_batch(prompt)
        if not single:
            raise CoreskipError("stream takes one prompt; use generate for several")
        seed, stops, options = self.stream_options(options)
        self.encode(prompts, options)  # mistakes show now
        return self._streamed(prompts, options, seed, stops)

    async def astream(self, prompt: Prompt, **options: Any) -> AsyncIterator[str]:
        """`stream` for an asyncio task. Where that is cancelled, or the iterator closed, generation stops."""
        prompts, single = as_batch(prompt)
        if not single:
            raise CoreskipError("stream takes one prompt; use agenerate for several")
        seed, stops, options = self.stream_options(options)
        tickets = await asyncio.to_thread(self._start, prompts, options, seed, stops)
        if tickets is None:
            inputs = self.encode(prompts, options)
            texts = in_threads(self.pieces(inputs, options, seed, stops))
        else:
            texts = atexts_of(tickets[0])
        async with contextlib.aclosing(texts):
            async for text in texts:
                yield text
        self._note(tickets)

    def _streamed(
        self, prompts: list[str | list[Message]], options: dict[str, Any], seed: int | None, stops: list[str]
    ) -> Iterator[str]:
        tickets = self._start(prompts, options, seed, stops)
        if tickets is None:
            yield from self.pieces(self.encode(prompts, options), options, seed, stops)
        else:
            yield from texts_of(tickets[0])
        self._note(tickets)

    def _note(self, tickets: list[Ticket] | None) -> None:
        if tickets is not None:
            self._latest.figures = figures_of(tickets)

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
    ) -> Generator[str, None, None]:
        """The continuation of one row of token ids, as text piece by piece up to a stop string.

        Args:
            inputs: of ``model.generate``: ``input_ids`` and ``attention_mask``, perhaps a KV cache.
            options, seed, stops: from `stream_options`.
            made: gets the ids of the new tokens, as far as they were made before the consumer went away.
        """
        return stop_before(self._alone.pieces(inputs, options, seed, stops, [] if made is None else made), stops)

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

    def _decode(self, ids: torch.Tensor | list[list[int]]) -> list[str]:
        return cast("list[str]", self.tokenizer.batch_decode(ids, skip_special_tokens=True))


def _arranged(texts: list[str], prompts: int, single: bool) -> Any:
    """One text for one prompt, a list for several; lists of texts where each prompt has several."""
    each = len(texts) // prompts
    if each > 1:
        grouped = [texts[i : i + each] for i in range(0, len(texts), each)]
        return grouped[0] if single else grouped
    return texts[0] if single else texts


def _limits(
    batch: int | None, waiting: int | None, kv_bytes: int | None, prompt_bytes: int | None, chunk: int
) -> Limits | None:
    given = {"max_waiting": (waiting, 0), "kv_bytes": (kv_bytes, 1), "prompt_bytes": (prompt_bytes, 0)}
    for name, (value, least) in given.items():
        if value is not None and batch is None:
            raise CoreskipError(f"{name} is of an engine with max_batch: add it, or leave {name} out")
        if value is not None:
            check_count(name, value, least)
    if batch is None:
        return None
    check_count("max_batch", batch)
    check_count("prefill_chunk", chunk)
    return Limits(batch, waiting, kv_bytes, prompt_bytes, chunk)


def _shared_out(cap: int, limits: Limits) -> tuple[int, Limits]:
    """What of a cap on memory is the model's, and limits whose keys and values take the rest: a fifth by
    default, and a quarter of that, at most 1 GB, for prompts that were read before."""
    texts = cap // 5 if limits.kv_bytes is None else limits.kv_bytes
    prompts = prompts_beside(texts) if limits.prompt_bytes is None else limits.prompt_bytes
    return max(1, cap - texts - prompts), replace(limits, kv_bytes=texts, prompt_bytes=prompts)


def _check_tokenizer(tokenizer: Any) -> None:
    check_tokenizer(tokenizer)
    if hasattr(tokenizer, "tokenizer"):
        raise CoreskipError(f"{type(tokenizer).__name__} holds the tokenizer: pass its .tokenizer")
    if not hasattr(tokenizer, "batch_decode"):
        raise CoreskipError(f"the tokenizer is {kind_of(tokenizer)}: give the one that coreskip.load() returned")
