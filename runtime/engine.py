"""Serving from Python: text in, text out, whole or streamed, from any number of threads."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from transformers import TextIteratorStreamer

from ..predictors.anatomy import check_model
from ..predictors.calibration import check_tokenizer
from ..predictors.checks import kind_of
from ..predictors.errors import CoreskipError
from ..predictors.plan import Plan
from .drafting import Statistics
from .generation import runtime_of
from .prompts import Message, Prompt, as_batch, check_length, learned_positions, own_options, render, samples
from .wrap import is_wrapped, unwrap, wrap


class Engine:
    """A model, its tokenizer and a plan, ready to generate.

    Prompts are texts, or chats: lists of ``{"role": ..., "content": ...}`` that the tokenizer's template renders; one
    such message by itself is a chat, too. Every keyword argument of ``model.generate`` is taken (``max_new_tokens``,
    ``do_sample``, ``num_beams``, ...), besides

    - ``stop_strings``: a string or several; the text ends before the first that appears;
    - ``seed``: makes sampling repeatable, whatever other threads do; from 0 to 2**64 - 1.

    Threads may call at once: each call has its own KV cache and neuron selections. Calls that sample wait for one
    another, since they share the random number generator.

    Args:
        model: a causal LM; wrapped here if a plan is given, until `close`.
        plan: or the path of one; None to use the model as it is (dense, or wrapped by the caller).
        exact: as for `wrap`; without a plan, drafts come from the text alone.
        keep_originals, lookup: as for `wrap`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        plan: Plan | str | os.PathLike[str] | None = None,
        *,
        exact: bool = False,
        keep_originals: bool | None = None,
        lookup: bool = False,
    ) -> None:
        check_model(model)
        _check_tokenizer(tokenizer)
        if (plan is not None or exact or lookup) and is_wrapped(model):
            raise CoreskipError("the model is wrapped already: call coreskip.unwrap(model) first, or pass no plan")
        wraps = plan is not None or exact or lookup
        if wraps:
            wrap(model, plan, exact=exact, keep_originals=keep_originals, lookup=lookup)
        self.model, self.tokenizer = model, tokenizer
        self._positions = learned_positions(model)
        self._owns_wrapping = wraps
        self._sampling = threading.Lock()
        self._tokenizing = threading.Lock()  # fast tokenizers keep padding and truncation as shared state

    def close(self) -> None:
        """Unwrap the model, if this engine wrapped it and its own weights are not gone (``keep_originals=False``)."""
        if self._owns_wrapping:
            self._owns_wrapping = False
            if runtime_of(self.model).removable:
                unwrap(self.model)

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
        inputs = self._encode(prompts, options)
        output = self._run(inputs, options, seed, stops)
        texts = [_cut(text, stops) for text in self._decode(output[:, inputs["input_ids"].shape[1] :])]
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
        if options.get("streamer") is not None:
            raise CoreskipError("a stream has a streamer of its own: leave it out, or use generate")
        seed, stops, options = own_options(self.model, options)
        if (options.get("num_beams") or 1) > 1 or (options.get("num_return_sequences") or 1) > 1:
            raise CoreskipError("a stream is one sequence: leave out num_beams and num_return_sequences")
        return _stop_before(self._pieces(self._encode(prompts, options), options, seed, stops), stops)

    def _pieces(self, inputs: Any, options: dict[str, Any], seed: int | None, stops: list[str]) -> Iterator[str]:
        streamer = _Pieces(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
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

    def _run(self, inputs: Any, options: dict[str, Any], seed: int | None, stops: list[str]) -> torch.Tensor:
        if stops:
            options = {**options, "stop_strings": stops, "tokenizer": self.tokenizer}
        with self._randomness(options, seed):
            output = self.model.generate(**inputs, **options)
        return cast(torch.Tensor, getattr(output, "sequences", output))

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

    def _encode(self, prompts: list[str | list[Message]], options: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Token ids ``[prompts, longest]`` and their attention mask, padded on the left."""
        texts = [p if isinstance(p, str) else render(self.tokenizer, p) for p in prompts]
        with self._tokenizing:
            # a chat template writes its own special tokens
            rows = self.tokenizer(texts, add_special_tokens=isinstance(prompts[0], str), padding=False)["input_ids"]
        longest = max(map(len, rows))
        if not all(rows):
            raise CoreskipError("the tokenizer makes no token of a prompt: give some text")
        check_length(self.model, self._positions, longest, options)
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        pad = next(id for id in ids if id is not None)  # which one does not matter: it is masked
        padded = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": padded.to(self.model.device), "attention_mask": mask.to(self.model.device)}

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
    would keep greedy text from being made several tokens a call (255 against 311 tok/s in int4)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.abandoned = threading.Event()

    def put(self, value: torch.Tensor) -> None:
        if self.abandoned.is_set():
            raise _Abandoned
        super().put(value)  # type: ignore[no-untyped-call]


def _cut(text: str, stops: list[str]) -> str:
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def _stop_before(pieces: Iterator[str], stops: list[str]) -> Iterator[str]:
    """The pieces up to the first stop string, holding back what may be the beginning of one."""
    held = ""
    for piece in pieces:
        held += piece
        cut = _cut(held, stops)
        if len(cut) < len(held):
            held = cut
            break
        safe = len(held) - max((_overlap(held, stop) for stop in stops), default=0)
        if safe > 0:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could begin `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
