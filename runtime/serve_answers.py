"""Answers in the shape of OpenAI's API, whole and as streams of chunks."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ..predictors.version import VERSION
from .sequence import Event, TokenLogprob
from .serve_generation import Generation
from .serve_protocol import ChatRequest, CompletionRequest, Sampling
from .serve_tools import Call, CallFormat, CallReader
from .serve_vocabulary import Decoder, Vocabulary

Json = dict[str, Any]

#: What stands for minus infinity, which JSON does not have.
_LEAST = -9999.0


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST


class Answer:
    """What the answers to both kinds of requests have in common.

    Args:
        model: the name that the request was sent to.
        per_prompt: texts of each prompt.
    """

    prefix, whole_kind, chunk_kind = "", "", ""

    def __init__(
        self, asked: Sampling, model: str, generation: Generation, vocabulary: Vocabulary, per_prompt: int
    ) -> None:
        self._generation, self._vocabulary, self._per_prompt = generation, vocabulary, per_prompt
        options = asked.stream_options
        self._usage_at_end = options is not None and options.include_usage
        self._usage_always = options is not None and options.continuous_usage_stats
        self._head: Json = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.whole_kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"coreskip-{VERSION}",
        }

    def usage(self) -> Json:
        return self._generation.usage(self._per_prompt)

    async def whole(self) -> Json:
        events = await self._generation.collect()
        choices = [self._choice(index, event) for index, event in enumerate(events)]
        return {**self._head, "choices": choices, "usage": self.usage()}

    async def chunks(self) -> AsyncIterator[Json]:
        """The chunks of a stream, the one with the usage among them where it was asked for.

        Raises:
            ApiError: a text failed.
        """
        self._head["object"] = self.chunk_kind
        for choice in self._opening():
            yield self._chunk(choice)
        async for index, event in self._generation.events():
            for choice in self._deltas(index, event):
                yield self._chunk(choice)
        if self._usage_at_end:
            yield {**self._head, "choices": [], "usage": self.usage()}

    def _chunk(self, choice: Json) -> Json:
        chunk = {**self._head, "choices": [choice]}
        if self._usage_always:
            return {**chunk, "usage": self.usage()}
        return {**chunk, "usage": None} if self._usage_at_end else chunk

    def _opening(self) -> list[Json]:
        """The choices of chunks before any token."""
        return []

    def _choice(self, index: int, event: Event) -> Json:
        raise NotImplementedError

    def _deltas(self, index: int, event: Event) -> list[Json]:
        raise NotImplementedError


class ChatAnswer(Answer):
    """tools: how calls are written; None where the request has none."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        asked: ChatRequest,
        model: str,
        generation: Generation,
        vocabulary: Vocabulary,
        tools: CallFormat | None = None,
    ) -> None:
        super().__init__(asked, model, generation, vocabulary, asked.n)
        self._asked, self._tools = asked, tools
        self._readers = [self._reader() for _ in range(asked.n)] if tools is not None else []

    def _reader(self) -> _Calls:
        assert self._tools is not None
        names = [tool.function.name for tool in self._asked.tools]
        most = None if self._asked.parallel_tool_calls else 1
        decoder = None if self._vocabulary.shows(self._tools.before + self._tools.after) else self._vocabulary.decoder()
        return _Calls(CallReader(self._tools, names), decoder, most)

    def _choice(self, index: int, event: Event) -> Json:
        message: Json = {"role": "assistant", "content": event.text, "refusal": None}
        finish: str | None = event.finish
        if self._tools is not None:
            content, calls = self._readers[index].read(event)
            message["content"] = content if content or not calls else None
            if calls:
                message["tool_calls"], finish = calls, "tool_calls"
        return {"index": index, "message": message, "logprobs": self._logprobs(event), "finish_reason": finish}

    def _opening(self) -> list[Json]:
        return [self._delta(index, {"role": "assistant", "content": ""}) for index in range(self._asked.n)]

    def _deltas(self, index: int, event: Event) -> list[Json]:
        logprobs = self._logprobs(event)
        finish: str | None = event.finish
        found: list[Json] = [{"content": event.text}] if event.text else []
        if self._tools is not None:
            content, calls = self._readers[index].read(event)
            first = self._readers[index].made - len(calls)
            found = [{"content": content}] if content else []
            found += [{"tool_calls": [{"index": first + i, **call}]} for i, call in enumerate(calls)]
            if finish is not None and self._readers[index].made:
                finish = "tool_calls"
        if not found and logprobs is not None and logprobs["content"]:
            found = [{"content": ""}]
        deltas = [self._delta(index, delta, logprobs if i == 0 else None) for i, delta in enumerate(found)]
        return deltas if finish is None else [*deltas, self._delta(index, {}, None, finish)]

    def _delta(self, index: int, delta: Json, logprobs: Json | None = None, finish: str | None = None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, event: Event) -> Json | None:
        """Of the tokens of the text; those that end it are no part of it."""
        if not self._asked.logprobs:
            return None
        ends = self._vocabulary.ends if event.finish == "stop" else ()
        found = [each for each in event.logprobs or () if each.token not in ends]
        return {"content": [self._logprob(each) for each in found], "refusal": None}

    def _logprob(self, found: TokenLogprob) -> Json:
        top = [self._alternative(token, logprob) for token, logprob in found.top]
        return {**self._alternative(found.token, found.logprob), "top_logprobs": top}

    def _alternative(self, token: int, logprob: float) -> Json:
        found = self._vocabulary
        return {"token": found.text(token), "logprob": _finite(logprob), "bytes": list(found.bytes(token))}


class _Calls:
    """Text and calls of one answer, in the API's shape.

    decoder: where calls stand between special tokens, which the text of events leaves out; else None.
    most: calls; those after are left out, as ``parallel_tool_calls: false`` asks.
    made: calls so far.
    """

    def __init__(self, reader: CallReader, decoder: Decoder | None, most: int | None) -> None:
        self._reader, self._decoder, self._most = reader, decoder, most
        self.made = 0

    def read(self, event: Event) -> tuple[str, list[Json]]:
        """What an event adds."""
        last = event.finish is not None
        text = event.text if self._decoder is None else self._decoder.feed(event.tokens, last)
        found: list[str | Call] = list(self._reader.feed(text))
        if last:
            found += self._reader.end()
        calls = [self._call(each) for each in found if isinstance(each, Call)]
        if self._most is not None:
            calls = calls[: max(0, self._most - self.made)]
        self.made += len(calls)
        return "".join(each for each in found if isinstance(each, str)), calls

    def _call(self, call: Call) -> Json:
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


class CompletionAnswer(Answer):
    """prompts: of the request, by text, as the answer echoes them. ids: their tokens."""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        asked: CompletionRequest,
        model: str,
        generation: Generation,
        vocabulary: Vocabulary,
        prompts: Sequence[str],
        ids: Sequence[list[int]],
    ) -> None:
        super().__init__(asked, model, generation, vocabulary, asked.n)
        self._asked, self._prompts, self._ids = asked, prompts, ids
        self._echoed = set[int]()
        self._offsets = [vocabulary.offsets() for _ in range(len(prompts) * asked.n)]

    def _choice(self, index: int, event: Event) -> Json:
        return self._deltas(index, event)[0]

    def _deltas(self, index: int, event: Event) -> list[Json]:
        text, logprobs = event.text, self._logprobs(index, event)
        if self._asked.echo and index not in self._echoed:
            self._echoed.add(index)
            text = self._prompts[index // self._per_prompt] + text
        if not text and event.finish is None and not (logprobs and logprobs["tokens"]):
            return []
        return [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": event.finish}]

    def _logprobs(self, index: int, event: Event) -> Json | None:
        if self._asked.logprobs is None:
            return None
        tokens, found = list(event.tokens), list[TokenLogprob | None](event.logprobs or ())
        if self._asked.echo and index not in self._echoed:
            tokens = [*self._ids[index // self._per_prompt], *tokens]
            found = [*(self._generation.tickets[index].prompt_logprobs or ()), *found]
        return {
            "tokens": [self._vocabulary.text(token) for token in tokens],
            "token_logprobs": [None if each is None else _finite(each.logprob) for each in found],
            "top_logprobs": [None if each is None else self._top(each) for each in found],
            "text_offset": self._offsets[index].of(tokens),
        }

    def _top(self, found: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens and the chosen one. Where two tokens are written alike the likelier one counts."""
        top = {self._vocabulary.text(found.token): _finite(found.logprob)}
        for token, logprob in found.top:
            text = self._vocabulary.text(token)
            top[text] = max(top.get(text, _LEAST), _finite(logprob))
        return top
