"""What a scheduler is asked for and what it gives back: a request, and its ticket, which a thread or an asyncio task
reads event by event."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..predictors.checks import (
    check_above_zero,
    check_count,
    check_encodable,
    check_flag,
    check_seed,
    check_temperature,
    kind_of,
)
from ..predictors.errors import CoreskipError

Finish = Literal["stop", "length", "cancelled", "error"]

#: The lanes of an engine: None is its plan; "dense" leaves nothing out and reads the weights as they were loaded.
LANES = (None, "dense")


class Busy(CoreskipError):
    """The queue is full.

    retry_after: seconds after which a place is likely to be free.
    """

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Constraint(Protocol):
    """What a text has to follow, such as a grammar. It belongs to one request and may remember its tokens."""

    def mask(self, logits: Tensor) -> Tensor | None:
        """Forbids tokens by -inf in `logits`, float32 ``[vocabulary]``, in place or in what it returns."""

    def accept(self, token: int) -> None:
        """`token` was chosen and is part of the text."""


@dataclass(frozen=True)
class Request:
    """One continuation.

    Attributes:
        ids: the prompt's tokens.
        max_new_tokens: at most; 0 for a prompt's log-probabilities alone.
        temperature: 0 is greedy. top_p, top_k, min_p: None: all tokens may be drawn.
        seed: of the text's own random numbers: the same seed gives the same text, whatever runs beside it; None: any.
        stop: the text ends before the first of these strings. stop_ids: and with these tokens, which are no part of it.
        logit_bias: by token, what is added to its logit.
        presence_penalty, frequency_penalty: taken from the logits of tokens that the continuation has, once and for
            each time. repetition_penalty: by which logits of tokens of prompt and continuation are divided, or
            multiplied where they are below 0 (2019, 1909.05858, section 4.1).
        logprobs: for each new token its log-probability and those of so many likeliest ones; None: none. They are the
            model's own, before bias, penalties and temperature.
        prompt_logprobs: the same of the prompt's tokens; the first has none.
        ignore_eos: the model's end-of-text tokens do not end the text.
        constraint: see `Constraint`.
        lane: see `LANES`.
    """

    ids: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    constraint: Constraint | None = None
    lane: str | None = None

    def check(self, vocabulary: int) -> None:
        """
        Raises:
            CoreskipError: a field that makes no sense; its line begins with the field's name.
        """
        _check_tokens("ids", self.ids, vocabulary)
        if not self.ids:
            raise CoreskipError("ids is empty: give at least one token")
        check_count("max_new_tokens", self.max_new_tokens, 0)
        if isinstance(self.temperature, bool) or self.temperature != 0:
            check_temperature("temperature", self.temperature)
        for name, share in (("top_p", self.top_p), ("min_p", self.min_p)):
            if share is not None and not (_is_number(share) and 0 <= share <= 1):
                raise CoreskipError(f"{name} is {share!r}; it must be a share from 0 to 1")
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        if self.seed is not None:
            check_seed(self.seed)
        self._check_ends(vocabulary)
        self._check_penalties(vocabulary)
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None:
                check_count(name, count, 0)
                if count > vocabulary:
                    raise CoreskipError(f"{name} is {count}; there are {vocabulary} tokens")
        if self.lane not in LANES:
            raise CoreskipError(f"lane is {self.lane!r}; choose from {', '.join(map(repr, LANES))}")

    def _check_ends(self, vocabulary: int) -> None:
        check_flag("ignore_eos", self.ignore_eos)
        if not isinstance(self.stop, (tuple, list)) or not all(isinstance(stop, str) and stop for stop in self.stop):
            raise CoreskipError(f"stop is {self.stop!r}: give strings that are not empty")
        for stop in self.stop:
            check_encodable("a stop string", stop)
        _check_tokens("stop_ids", self.stop_ids, vocabulary)

    def _check_penalties(self, vocabulary: int) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            if not _is_number(getattr(self, name)):
                raise CoreskipError(f"{name} is {getattr(self, name)!r}; it must be a number")
        check_above_zero("repetition_penalty", self.repetition_penalty)
        if not isinstance(self.logit_bias, Mapping):
            raise CoreskipError(f"logit_bias is {kind_of(self.logit_bias)}: give numbers by token")
        _check_tokens("logit_bias", list(self.logit_bias), vocabulary)
        if not all(_is_number(bias) for bias in self.logit_bias.values()):
            raise CoreskipError("logit_bias holds something that is no number")


def _check_tokens(name: str, tokens: Any, vocabulary: int) -> None:
    if not isinstance(tokens, (list, tuple)):
        raise CoreskipError(f"{name} is {kind_of(tokens)}: give a list of token ids")
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
            raise CoreskipError(f"{name} holds {token!r}: token ids are whole numbers from 0 to {vocabulary - 1}")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < float("inf")


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log-probability, and the likeliest tokens in its place with theirs, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, logprobs: Tensor, token: int, count: int) -> TokenLogprob:
        """logprobs: float ``[vocabulary]``; count: of how many of the likeliest."""
        values, tokens = logprobs.topk(count)
        return cls(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))


@dataclass(frozen=True)
class Event:
    """What was added to a text.

    Attributes:
        text: whole characters; "" where the new tokens are still part of one, or may begin a stop string.
        tokens: all new ones, the one that ended the text included.
        logprobs: one for each of `tokens`; None where they were not asked for.
        finish: why this is the last event; None before.
        error: what went wrong, in one line.
    """

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish: Finish | None = None
    error: str | None = None


@dataclass
class Usage:
    """Tokens of one request. cached_tokens: of the prompt, whose keys and values were there already. abstained: whether
    the plan has nothing said after it."""

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    abstained: bool = False


@dataclass
class Timings:
    """When a request came to what, by ``time.perf_counter``. queued: it was submitted. started: its prompt's turn
    came."""

    queued: float
    started: float | None = None
    first_token: float | None = None
    done: float | None = None


@dataclass(frozen=True)
class Load:
    """What a scheduler does, for metrics.

    Attributes:
        running, waiting: requests. max_batch, max_waiting: the most of them; None: any number.
        kv_bytes: reserved for keys and values of those that run. kv_limit: the most.
        decode_tokens, prefill_tokens, cached_tokens: so far; cached ones were not computed again.
        steps: decode steps so far. batch_sizes: how many of these had so many sequences.
    """

    running: int
    waiting: int
    max_batch: int
    max_waiting: int | None
    kv_bytes: int
    kv_limit: int
    decode_tokens: int
    prefill_tokens: int
    cached_tokens: int
    steps: int
    batch_sizes: dict[int, int]


class Ticket:
    """A request under way. One consumer iterates over its events, in a thread or in an asyncio task; an event that ends
    it is the last.

    Attributes:
        request: what was asked for; None where it was prepared by ``model.generate``.
        prompt_logprobs: of each token of the prompt once it has been read, the first None.
        usage, timings: up to date at every event.
        failure: the exception behind an event with an `error`.
    """

    def __init__(self, prompt_tokens: int, request: Request | None, wake: Callable[[], None]) -> None:
        self.request = request
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.usage = Usage(prompt_tokens)
        self.timings = Timings(time.perf_counter())
        self.failure: BaseException | None = None
        self._wake = wake
        self._changed = threading.Condition()
        self._events: deque[Event] = deque()
        self._awaiting: Callable[[], None] | None = None
        self._cancelled = self._ended = self._read = False

    def cancel(self) -> None:
        """End it before the next step; a last event comes, with what there was. Of no effect afterwards."""
        self._cancelled = True
        self._wake()

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    @property
    def done(self) -> bool:
        """Whether its last event has been put."""
        return self._ended

    def put(self, event: Event) -> None:
        """For the scheduler: the next event."""
        with self._changed:
            if self._ended:
                return
            self._ended = event.finish is not None
            self._events.append(event)
            self._changed.notify_all()
            awaiting, self._awaiting = self._awaiting, None
        if awaiting is not None:
            awaiting()

    def __iter__(self) -> Ticket:
        return self

    def __next__(self) -> Event:
        with self._changed:
            while not self._events and not self._read:
                self._changed.wait()
            return self._next(StopIteration)

    def _next(self, end: type[Exception]) -> Event:
        if not self._events:
            raise end
        event = self._events.popleft()
        self._read = event.finish is not None
        return event

    def __aiter__(self) -> Ticket:
        return self

    async def __anext__(self) -> Event:
        loop = asyncio.get_running_loop()
        while True:
            with self._changed:
                if self._events or self._read:
                    return self._next(StopAsyncIteration)
                arrived = loop.create_future()
                self._awaiting = functools.partial(_tell, loop, arrived)
            await arrived

    def collect(self) -> Event:
        """Wait for the end; all events as one. An interrupt cancels the request."""
        try:
            return joined(list(self))
        except BaseException:
            self.cancel()
            raise

    async def acollect(self) -> Event:
        """`collect` of an asyncio task; where that is cancelled, so is the request."""
        try:
            return joined([event async for event in self])
        except BaseException:
            self.cancel()
            raise


def _tell(loop: asyncio.AbstractEventLoop, arrived: asyncio.Future[None]) -> None:
    def tell() -> None:
        if not arrived.done():
            arrived.set_result(None)

    with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
        loop.call_soon_threadsafe(tell)


def joined(events: list[Event]) -> Event:
    """All events of a ticket as one."""
    last = events[-1]
    logprobs = [found for event in events for found in event.logprobs or ()]
    return Event(
        "".join(event.text for event in events),
        [token for event in events for token in event.tokens],
        logprobs if any(event.logprobs is not None for event in events) else None,
        last.finish,
        last.error,
    )


@torch.no_grad()
def prompt_logprobs(logits: Tensor, following: list[int], count: int) -> list[TokenLogprob]:
    """Of the tokens that followed each of `logits` ``[tokens, vocabulary]``."""
    found = logits.float().log_softmax(-1)
    return [TokenLogprob.of(row, token, count) for row, token in zip(found, following, strict=True)]
