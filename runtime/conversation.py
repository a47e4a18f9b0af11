"""A conversation over one KV cache that is kept from turn to turn: each turn prefills only what is new."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, cast

import torch
from transformers import DynamicCache

from ..predictors.checks import check_encodable
from ..predictors.errors import CoreskipError
from .delegates import generator_of
from .engine import Engine
from .prompts import Message, render
from .selections import selections_of
from .wrap import is_wrapped, runtime_of

logger = logging.getLogger("coreskip")


class Conversation:
    """A chat with an engine's model, whose answers stream.

    Args:
        system: what the model is told before the first message; None for nothing.
        options: of ``Engine.stream``, for every answer.

    Attributes:
        messages: so far, answers included.
        reused: tokens of the last turn's prompt that were in the cache already.
    """

    def __init__(self, engine: Engine, *, system: str | None = None, **options: Any) -> None:
        self._engine, self._options = engine, options
        engine.stream_options(options)  # mistakes show now
        self.messages: list[Message] = []
        if system is not None:
            check_encodable("the system's message", system)
            self.messages.append({"role": "system", "content": system})
            render(engine.tokenizer, [*self.messages, {"role": "user", "content": "a"}])  # some templates have none
        self.reused = 0
        self._cache: DynamicCache | None = None
        self._cached: list[int] = []  # the tokens that are in the cache

    def send(self, text: str) -> Iterator[str]:
        """The answer to `text`, piece by piece. Closing the iterator stops it; what came until then counts as the
        answer.

        Raises:
            CoreskipError: no text, or more tokens than the model has learned positions for; the conversation is as it
                was.
        """
        if not text.strip():
            raise CoreskipError("the message is empty: give some text")
        check_encodable("the message", text)
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._engine.tokenize([render(self._engine.tokenizer, messages)], special=False)[0]
        seed, stops, options = self._engine.stream_options(self._options)
        self._engine.check_length(len(ids), options)
        return self._answer(messages, ids, seed, stops, options)

    def _answer(
        self, messages: list[Message], ids: list[int], seed: int | None, stops: list[str], options: dict[str, Any]
    ) -> Iterator[str]:
        cache = self._reuse(ids)
        made: list[int] = []
        tokens = torch.tensor([ids], device=self._engine.model.device)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "past_key_values": cache}
        answer: list[str] = []
        self._cache = None  # until it is known what it holds
        pieces = self._engine.pieces(inputs, options, seed, stops, made)
        try:
            for piece in pieces:
                answer.append(piece)
                yield piece
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:  # a generation that goes on would write to the cache
                close()
            self._keep(cache, [*ids, *made])
            self.messages = [*messages, {"role": "assistant", "content": "".join(answer)}]

    def _reuse(self, ids: list[int]) -> DynamicCache:
        """A cache that holds a beginning of `ids`: the kept one, cut where the chat template has rewritten what came
        before; or an empty one."""
        common = next((i for i, (a, b) in enumerate(zip(self._cached, ids, strict=False)) if a != b), None)
        common = min(len(self._cached), len(ids)) if common is None else common
        common = min(common, len(ids) - 1)  # the last token has to be run: its logits choose the next one
        if self._cache is not None and self._cut(self._cache, common):
            self.reused = common
            return self._cache
        if self._cached:
            logger.debug("the conversation is encoded anew: its first %d tokens alone are as they were", common)
        self.reused = 0
        return DynamicCache(config=cast(Any, generator_of(self._engine.model)).config)

    def _cut(self, cache: DynamicCache, length: int) -> bool:
        """Whether the cache holds so many tokens now, having held at least as many."""
        surplus = int(cache.get_seq_length()) - length
        if surplus == 0:
            return length > 0
        if surplus < 0 or length == 0:
            return False
        model = self._engine.model
        if is_wrapped(model) and selections_of(cache, runtime_of(model)) is not None:
            return False  # its neurons were chosen by what would be cut off, too
        try:
            cache.crop(-surplus)
        except (ValueError, RuntimeError) as error:  # a window that has let go of what came before
            logger.debug("the KV cache cannot be cut: %s", error)
            return False
        return int(cache.get_seq_length()) == length

    def _keep(self, cache: DynamicCache, ids: list[int]) -> None:
        """Remember what the cache holds: all of `ids`, or all but the last ones. An answer that was stopped may have
        put more into it than was read."""
        length = int(cache.get_seq_length())
        if length > len(ids) - 1 and not self._cut(cache, len(ids) - 1):
            self._cache, self._cached = None, []
            return
        self._cache, self._cached = cache, ids[: min(length, len(ids) - 1)]
