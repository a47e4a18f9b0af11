"""What every request passes through: its id, its key, the size of its body, and a line in the log."""

from __future__ import annotations

import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from .serve_errors import ApiError
from .serve_metrics import Meter

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("coreskip")
requests_log = logging.getLogger("coreskip.requests")

_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
#: What a client that sends too much may still send, so that it gets to read why it was refused.
_DRAINED = 64 * 2**20
#: The status in the log where the client went away before it had one; nginx's.
_GONE = 499


@dataclass
class Record:
    """What is known of a request for the log; nothing of what it says.

    Attributes:
        route: the path's pattern, so that logs and metrics have few of them.
        figures: tokens, milliseconds, how it ended.
    """

    id: str
    method: str
    path: str
    route: str = "other"
    status: int = _GONE
    figures: dict[str, Any] = field(default_factory=dict)


def record_of(request: Request) -> Record:
    found = request.scope["coreskip.record"]
    assert isinstance(found, Record)
    return found


class Guard:
    """An ASGI application around another one.

    Args:
        keys: one of them has to come as a bearer token; none: nobody is asked.
        open_paths: that need no key.
    """

    def __init__(self, app: App, keys: Sequence[str], open_paths: Sequence[str], meter: Meter) -> None:
        self._app, self._meter, self._open = app, meter, frozenset(open_paths)
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(_request_id(scope), scope["method"], scope["path"])
        scope["coreskip.record"] = record
        start = time.perf_counter()

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", record.id.encode())]
            await send(message)

        try:
            await self._answer(scope, receive, noted, record)
        finally:
            seconds = time.perf_counter() - start
            self._meter.request(record.route, record.status, seconds)
            line = {"request_id": record.id, "method": record.method, "path": record.path, "status": record.status}
            line |= {"ms": round(1e3 * seconds, 1), **record.figures}
            requests_log.info("%s", json.dumps(line, ensure_ascii=True))

    async def _answer(self, scope: Scope, receive: Receive, send: Send, record: Record) -> None:
        try:
            if scope["path"] not in self._open:
                self._check_key(scope)
            await self._app(scope, receive, send)
        except ClientDisconnect:
            return
        except Exception as error:
            refused = error if isinstance(error, ApiError) else failed()
            if not isinstance(error, ApiError):
                logger.exception("request %s failed", record.id)
            if record.status == _GONE:  # else half of an answer is on its way, and ends here
                await refusal(refused)(scope, receive, send)

    def _check_key(self, scope: Scope) -> None:
        if not self._keys:
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        # all are compared, and each in constant time: how long it takes says nothing about the keys
        same = [hmac.compare_digest(key.strip(), each) for each in self._keys]
        if kind.lower() != b"bearer" or not any(same):
            raise ApiError(401, "send one of the server's keys: Authorization: Bearer KEY", code="invalid_api_key")


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
    return given if _ID.fullmatch(given) else uuid.uuid4().hex


def failed() -> ApiError:
    return ApiError(500, "the server failed; its log says why, under this request's id", code="internal_error")


def refusal(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


async def body_of(request: Request, most: int, seconds: float) -> bytes:
    """The body of a request.

    Raises:
        ApiError: 413 beyond `most` bytes, 408 where it has not come within `seconds`.
        ClientDisconnect: the client is gone.
    """
    parts, size = [], 0
    try:
        with anyio.fail_after(seconds):
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    parts.append(part)
                elif size > most + _DRAINED:
                    break
    except TimeoutError:
        raise ApiError(408, f"the body has not come within {seconds:g} s", code="body_timeout") from None
    if size > most:
        raise ApiError(413, f"the body has more than {most} bytes, the most this server takes", code="body_too_large")
    return b"".join(parts)


async def while_there(receive: Receive, work: Callable[[], Awaitable[None]]) -> bool:
    """Do `work`, unless the client goes away: then it is cancelled.

    Returns:
        whether it was done.
    """
    done = False
    failure: Exception | None = None

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        try:
            await work()
            done = True
        except Exception as error:  # raised below: a task group would raise it in a group
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return done
