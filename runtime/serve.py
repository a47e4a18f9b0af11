"""The HTTP server's application: OpenAI's routes over engines, as ASGI."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import anyio
import psutil
from anyio.to_thread import run_sync
from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..predictors.errors import CoreskipError
from ..predictors.plan import Plan
from ..predictors.version import VERSION
from .engine import Engine
from .running import end_ids
from .scheduler import bytes_a_position
from .serve_answers import Answer, ChatAnswer, CompletionAnswer
from .serve_errors import ApiError
from .serve_generation import Generation
from .serve_guard import App, Guard, Receive, Scope, Send, body_of, failed, record_of, refusal, while_there
from .serve_metrics import EngineFigures, Meter
from .serve_protocol import ChatRequest, CompletionRequest, Sampling, parse
from .serve_requests import Prepared, Served, prepare_chat, prepare_completion
from .serve_vocabulary import Vocabulary
from .wrap import is_wrapped, runtime_of

#: Seconds that a client which reads nothing gets for the last words of its stream.
_LAST_WORDS = 1.0
_NO_EMBEDDINGS = "this server generates text: it has no embeddings"

Asked = TypeVar("Asked", bound=Sampling)


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        keys: of the API, one of which a request has to bring; none: nobody is asked.
        body_bytes: of a request. body_s: seconds within which it has to come.
        request_s: seconds from there to the end of an answer.
    """

    keys: Sequence[str] = ()
    body_bytes: int = 8 * 2**20
    body_s: float = 30.0
    request_s: float = 600.0


@dataclass
class Server:
    """Models under their names, and what is under way. The first model is that of requests which name none.

    Attributes:
        draining: nothing new is taken; the server is about to stop.
    """

    models: Sequence[Served]
    limits: Limits = field(default_factory=Limits)
    draining: bool = False

    def __post_init__(self) -> None:
        engines = {id(each.engine): (each.name, each.engine) for each in reversed(self.models)}
        figures = {name: EngineFigures(engine.load, partial(_skipped, engine)) for name, engine in engines.values()}
        self.meter = Meter(figures, time.perf_counter, lambda: float(psutil.Process().memory_info().rss))
        self.created = int(time.time())
        self._generations: set[Generation] = set()

    def app(self) -> App:
        """
        Returns:
            an ASGI application. When it ends, `close` is the caller's to call.
        """
        routes = [
            _route("GET", "/health", self._health),
            _route("GET", "/metrics", self._metrics),
            _route("GET", "/v1/models", self._models),
            _route("GET", "/v1/models/{name:path}", self._model),
            _route("POST", "/v1/chat/completions", self._chat),
            _route("POST", "/v1/completions", self._completions),
            _route("POST", "/v1/embeddings", self._embeddings),
        ]
        handlers = {HTTPException: _http_error, ApiError: _api_error, Exception: _failure}
        app = Starlette(routes=routes, exception_handlers=handlers)
        return Guard(app, self.limits.keys, ["/health"], self.meter)

    def close(self) -> None:
        """Close the engines. Nothing may be under way."""
        for served in self.models:
            served.engine.close()

    def drain(self) -> None:
        """Refuse what is new; what is under way goes on."""
        self.draining = True

    def cancel(self, reason: str) -> None:
        """End what is under way: its clients get an error that says why."""
        for generation in list(self._generations):
            generation.cancel(reason)

    # --- routes

    async def _health(self, request: Request) -> Response:
        status = "draining" if self.draining else "ok"
        return JSONResponse({"status": status, "version": VERSION}, 503 if self.draining else 200)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.meter.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described(each) for each in self.models]})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(self._described(self._named(request.path_params["name"])))

    def _described(self, served: Served) -> dict[str, Any]:
        found = {"id": served.name, "object": "model", "created": self.created, "owned_by": "coreskip"}
        return {**found, "max_model_len": served.context, **served.about}

    async def _embeddings(self, request: Request) -> Response:
        raise ApiError(404, _NO_EMBEDDINGS, code="unsupported_endpoint")

    async def _chat(self, request: Request) -> Response:
        def answer(served: Served, asked: ChatRequest, prepared: Prepared, generation: Generation) -> Answer:
            return ChatAnswer(asked, served.name, generation, served.vocabulary, prepared.tools)

        return await self._generate(request, ChatRequest, prepare_chat, answer, "messages")

    async def _completions(self, request: Request) -> Response:
        def answer(served: Served, asked: CompletionRequest, prepared: Prepared, generation: Generation) -> Answer:
            return CompletionAnswer(asked, served.name, generation, served.vocabulary, prepared.prompts, prepared.ids)

        return await self._generate(request, CompletionRequest, prepare_completion, answer, "prompt")

    # --- from a request to its answer

    async def _generate(
        self,
        request: Request,
        kind: type[Asked],
        prepare: Callable[[Served, Asked], Prepared],
        answer: Callable[[Served, Asked, Prepared, Generation], Answer],
        prompt: str,
    ) -> Response:
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
        _check_type(request)
        asked = parse(kind, await body_of(request, self.limits.body_bytes, self.limits.body_s))
        served = self._named(asked.model)
        record_of(request).figures["model"] = served.name
        prepared = await run_sync(prepare, served, asked)
        generation = Generation(served.engine, prepared.requests, prompt, self.meter)
        return _Answering(self, answer(served, asked, prepared, generation), generation, asked.stream)

    def _named(self, name: str | None) -> Served:
        for served in self.models:
            if name in (None, served.name):
                return served
        names = ", ".join(each.name for each in self.models)
        raise ApiError(
            404, f"there is no model {name!r} here: there are {names}", param="model", code="model_not_found"
        )

    @asynccontextmanager
    async def under_way(self, generation: Generation) -> AsyncIterator[None]:
        """For the length of the block; afterwards nothing of it runs on."""
        self._generations.add(generation)
        try:
            yield
        finally:
            self._generations.discard(generation)
            generation.cancel()


class _Answering(Response):
    """An answer that is generated while its client is there: whole, or as server-sent events."""

    def __init__(self, server: Server, answer: Answer, generation: Generation, streams: bool) -> None:
        self._server, self._answer, self._generation, self._streams = server, answer, generation, streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        send_all = self._stream if self._streams else self._whole
        async with self._server.under_way(self._generation):
            self._generation.start()
            try:
                there = await while_there(receive, partial(send_all, scope, receive, send))
            finally:
                figures = scope["coreskip.record"].figures
                figures.update(self._figures())
            figures["client"] = "stayed" if there else "left"

    def _figures(self) -> dict[str, Any]:
        usage, timings = self._answer.usage(), [ticket.timings for ticket in self._generation.tickets.values()]
        firsts = [each.first_token - each.queued for each in timings if each.first_token is not None]
        first = round(1e3 * min(firsts), 1) if firsts else None
        return {name: usage[name] for name in ("prompt_tokens", "completion_tokens")} | {"first_token_ms": first}

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with anyio.fail_after(self._server.limits.request_s):
                body = await self._answer.whole()
        except TimeoutError:
            raise self._late() from None
        await Response(to_json(body), media_type="application/json")(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        headers.append((b"x-accel-buffering", b"no"))  # a proxy that collects events would make no stream of them
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            with anyio.fail_after(self._server.limits.request_s):
                async for chunk in self._answer.chunks():
                    await _event(send, to_json(chunk))
                await _event(send, b"[DONE]", more=False)
        except (ApiError, TimeoutError) as error:
            self._generation.cancel()
            refused = error if isinstance(error, ApiError) else self._late()
            scope["coreskip.record"].figures["error"] = refused.code  # the status has been sent
            with anyio.move_on_after(_LAST_WORDS):
                await _event(send, to_json(refused.body()), more=False)

    def _late(self) -> ApiError:
        return ApiError(504, f"the answer took longer than {self._server.limits.request_s:g} s", code="timeout")


def _route(method: str, path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
    async def noted(request: Request) -> Response:
        record_of(request).route = path
        return await endpoint(request)

    return Route(path, noted, methods=[method])


async def _event(send: Send, data: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": more})


def _check_type(request: Request) -> None:
    """Forms and the like are no JSON; whoever names no type is taken at their word."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"the body is {kind}: send application/json", code="unsupported_media_type")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return refusal(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {404: f"there is no {request.url.path} here", 405: f"{request.url.path} takes no {request.method}"}
    made = ApiError(error.status_code, messages.get(error.status_code, error.detail), code=None)
    return JSONResponse(made.body(), error.status_code, error.headers)


async def _failure(request: Request, error: Exception) -> Response:
    return refusal(failed())  # the guard logs what it was


def served_models(engine: Engine, names: Sequence[tuple[str, str | None]], most_context: int | None) -> list[Served]:
    """One engine under several names.

    Args:
        names: with the lane of each.
        most_context: tokens of a prompt and its answer; None: as many as the model has positions for. Either way no
            more than there is memory for.

    Raises:
        CoreskipError: a context that the model does not have.
    """
    config = engine.model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    fitting = engine.load().kv_limit // bytes_a_position(engine.model)
    if most_context is not None and positions is not None and most_context > positions:
        raise CoreskipError(f"the model has {positions} positions: a context of {most_context} tokens is too long")
    context = min(n for n in (most_context, positions, fitting) if n is not None)
    if context < 1:
        raise CoreskipError("there is no memory for keys and values: give the server more")
    ends = end_ids(engine.model) or {engine.tokenizer.eos_token_id} - {None}
    vocabulary = Vocabulary(engine.tokenizer, int(engine.model.get_input_embeddings().num_embeddings), sorted(ends))
    runtime = runtime_of(engine.model) if is_wrapped(engine.model) else None
    plan = Plan.dense(engine.model) if runtime is None else runtime.plan
    found = []
    for name, lane in names:
        about = {"plan": "dense" if lane == "dense" else str(plan.recipe.get("method", "dense"))}
        found.append(Served(name, engine, vocabulary, context, lane, about))
    return found


def _skipped(engine: Engine) -> float:
    return runtime_of(engine.model).usage.neuron_sparsity() if is_wrapped(engine.model) else 0.0
