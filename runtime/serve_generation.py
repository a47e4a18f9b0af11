"""The texts of one HTTP request, from its tokens to their events."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ..predictors.errors import CoreskipError
from .engine import Engine
from .sequence import Busy, Event, Request, Ticket, joined
from .serve_errors import ApiError, bad_request
from .serve_metrics import Meter
from .serve_vocabulary import Unfollowable

logger = logging.getLogger("coreskip")

#: Seconds between tries to submit a request's second and later texts where the queue is full.
_RETRY = 0.05

#: What fields of a `Request` are called in the API, where that is something else.
_FIELDS = {"max_new_tokens": "max_tokens"}


class Generation:
    """One HTTP request's texts: the first is submitted at once, or the request is refused; the others follow as the
    queue has room for them.

    Args:
        prompt: what the request calls its prompt, for errors: ``prompt`` or ``messages``.

    Attributes:
        tickets: by index, as far as they were submitted.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], prompt: str, meter: Meter) -> None:
        self._engine, self._requests, self._prompt, self._meter = engine, requests, prompt, meter
        self.tickets: dict[int, Ticket] = {}
        self._over = False
        self._reason = "the answer was cancelled"

    def start(self) -> None:
        """
        Raises:
            ApiError: 429 where the queue is full, 400 where the engine refuses a request.
        """
        try:
            self._submit(0)
        except Busy as error:
            seconds = max(1, round(error.retry_after))
            raise ApiError(429, str(error), code="queue_full", retry_after=seconds) from None

    def _submit(self, index: int) -> Ticket:
        try:
            ticket = self._engine.submit(self._requests[index])
        except Busy:
            raise
        except CoreskipError as error:
            field = str(error).partition(" ")[0]  # where the engine names one
            known = field in Request.__dataclass_fields__ and field != "ids"
            raise bad_request(str(error), _FIELDS.get(field, field) if known else self._prompt) from None
        self.tickets[index] = ticket
        return ticket

    async def _ticket(self, index: int) -> Ticket:
        while index not in self.tickets:
            if self._over:
                raise ApiError(503, self._reason, code="cancelled")
            try:
                return self._submit(index)
            except Busy:
                await asyncio.sleep(_RETRY)
        return self.tickets[index]

    async def collect(self) -> list[Event]:
        """Each text as one event.

        Raises:
            ApiError: a text failed.
        """
        return list(await asyncio.gather(*(self._collect(index) for index in range(len(self._requests)))))

    async def _collect(self, index: int) -> Event:
        return joined([event async for event in self._events(index)])

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """The events of all texts as they come, with the index of each.

        Raises:
            ApiError: a text failed.
        """
        if len(self._requests) == 1:
            async for event in self._events(0):
                yield 0, event
            return
        arrived: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        tasks = [asyncio.create_task(self._forward(index, arrived)) for index in range(len(self._requests))]
        try:
            left = len(tasks)
            while left:
                index, found = await arrived.get()
                if isinstance(found, Exception):
                    raise found
                left -= found.finish is not None
                yield index, found
        finally:
            for task in tasks:
                task.cancel()

    async def _forward(self, index: int, arrived: asyncio.Queue[tuple[int, Event | Exception]]) -> None:
        try:
            async for event in self._events(index):
                arrived.put_nowait((index, event))
        except Exception as error:  # raised where the events are read
            arrived.put_nowait((index, error))

    async def _events(self, index: int) -> AsyncIterator[Event]:
        ticket = await self._ticket(index)
        last = None
        async for event in ticket:
            if event.finish == "error":
                raise self._failed(ticket, event)
            if event.finish == "cancelled":
                raise ApiError(503, self._reason, code="cancelled")
            if event.tokens:
                now = time.perf_counter()
                self._meter.tokens(len(event.tokens), now, last, ticket.timings)
                last = now
            yield event

    def _failed(self, ticket: Ticket, event: Event) -> ApiError:
        if isinstance(ticket.failure, Unfollowable):
            return bad_request(str(ticket.failure), ticket.failure.param)
        logger.error("generation failed: %s", event.error, exc_info=ticket.failure)
        return ApiError(500, "generation failed; the server's log says why", code="generation_failed")

    def cancel(self, reason: str | None = None) -> None:
        """End all texts before the next step, and submit no more of them.

        reason: for whoever waits for them; None: nobody does.
        """
        self._over, self._reason = True, reason or self._reason
        for ticket in self.tickets.values():
            ticket.cancel()

    def usage(self, per_prompt: int) -> dict[str, Any]:
        """Tokens so far, in the API's shape; a prompt counts once, however many texts it has.

        per_prompt: texts of each prompt.
        """
        found = [ticket.usage for ticket in self.tickets.values()]
        firsts = [ticket.usage for index, ticket in self.tickets.items() if index % per_prompt == 0]
        prompt, made = sum(each.prompt_tokens for each in firsts), sum(each.completion_tokens for each in found)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in firsts)},
        }
