"""The requests that the server takes: OpenAI's fields for text, checked, and what is refused of the others.

Three kinds of fields are accepted: those that do something; those that ask for nothing (``store: false``); and those
that only concern whoever pays for or watches a request (``user``, ``metadata``). Everything else is an error that names
the field. A field that is null was not given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .serve_errors import ApiError, bad_request

#: Texts of one request: prompts times `n`.
MOST_TEXTS = 128
MOST_STOPS = 16
MOST_ALTERNATIVES = 20

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

#: Fields of OpenAI's that this server has nothing to answer with, and what to do instead.
_UNSUPPORTED = {
    "audio": "this server generates text alone",
    "function_call": "it was replaced by tool_choice",
    "functions": "they were replaced by tools",
    "prediction": "no text is drafted from another one",
    "reasoning_effort": "write it into the messages, where the model's template has a word for it",
    "suffix": "only text after the prompt is generated",
    "verbosity": "write it into the messages",
    "web_search_options": "this server searches nothing",
}


class Strict(BaseModel):
    """Numbers are numbers and unknown fields are mistakes; a null is a field that was not given."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


class JsonSchema(Strict):
    name: str = Field(min_length=1, max_length=64)
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """``regex`` with a ``pattern`` is this server's own."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    pattern: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        for kind, field in (("json_schema", "json_schema"), ("regex", "pattern")):
            if (self.type == kind) != (getattr(self, field) is not None):
                raise ValueError(f"{field} goes with the type {kind!r}, and only with it")
        return self


class Function(Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = None

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("up to 64 letters, digits, underscores and hyphens")
        return name


class Tool(Strict):
    type: Literal["function"]
    function: Function


class _NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: _NamedFunction


class _CalledFunction(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    """A call that an earlier answer made. index is what clients leave there that put it together from a stream."""

    id: str
    type: Literal["function"] = "function"
    function: _CalledFunction
    index: int | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    """refusal and annotations are what clients leave in answers that they send back; no template reads them."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise _Of("content", "a message has one; only an assistant's that calls tools may have none")
        if self.tool_calls and self.role != "assistant":
            raise _Of("tool_calls", "only an assistant's message has them")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Sampling(Strict):
    """What both kinds of requests have in common."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MOST_TEXTS)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: list[str] = Field(default_factory=list)
    ignore_eos: bool = False
    logit_bias: dict[int, float] = Field(default_factory=dict)
    response_format: ResponseFormat | None = None

    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, given: Any) -> Any:
        stops = [given] if isinstance(given, str) else given
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise ValueError("a string, or a list of strings")
        if len(stops) > MOST_STOPS or not all(stops):
            raise ValueError(f"at most {MOST_STOPS} strings, none of them empty")
        return stops

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _biases(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ValueError("an object from token ids to numbers from -100 to 100")
        found = {}
        for key, value in given.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not re.fullmatch(r"\d{1,9}", str(key), re.ASCII) or not number or not -100 <= value <= 100:
                raise ValueError("an object from token ids to numbers from -100 to 100")
            found[int(key)] = float(value)
        return found

    @model_validator(mode="after")
    def _streams(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise _Of("stream_options", "it goes with stream: true")
        return self


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_ALTERNATIVES)
    tools: list[Tool] = Field(default_factory=list, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise _Of("top_logprobs", "it goes with logprobs: true")
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise _Of("max_tokens", "max_completion_tokens has another value: give one of them")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise _Of("tool_choice", "there are no tools to choose from")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise _Of("tools", "two functions have one name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise _Of("tool_choice", "no tool has that name")
        formatted = self.response_format is not None and self.response_format.type != "text"
        if formatted and self.tools and self.tool_choice != "none":
            raise _Of("response_format", "an answer calls tools or has a format: leave one of them out")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Sampling):
    """prompts: of the request, each a text or a list of token ids."""

    prompt: Any
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    echo: bool = False
    best_of: int | None = None
    suffix: Literal[""] | None = None

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, given: Any) -> Any:
        list(_prompts(given))
        return given

    @model_validator(mode="after")
    def _agrees(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise _Of("best_of", "texts are not ranked: leave it out, or give the value of n")
        if len(self.prompts) * self.n > MOST_TEXTS:
            raise _Of("prompt", f"one request makes at most {MOST_TEXTS} texts, prompts times n")
        if self.max_tokens == 0 and not self.echo:
            raise _Of("max_tokens", "0 goes with echo: true")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        return list(_prompts(self.prompt))


def _prompts(given: Any) -> Iterator[str | list[int]]:
    if isinstance(given, str) or _are_ids(given):
        yield given
    elif isinstance(given, list) and given and all(isinstance(each, str) or _are_ids(each) for each in given):
        yield from given
    else:
        raise ValueError("a text, a list of token ids, or a list of these")


def _are_ids(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(token) is int for token in given)


class _Of(ValueError):
    """A mistake between several fields, told of one of them."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


Asked = TypeVar("Asked", bound=Sampling)


def parse(kind: type[Asked], body: bytes) -> Asked:
    """The request in a body of JSON.

    Raises:
        ApiError: 400; it names the first field that is wrong.
    """
    try:
        given = pydantic_core.from_json(body, allow_inf_nan=False)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise bad_request(f"the body is not JSON: {reason}", None, "invalid_json") from None
    if not isinstance(given, dict):
        raise bad_request("the body is not a JSON object", None, "invalid_json")
    for name, remedy in _UNSUPPORTED.items():
        if given.get(name) not in (None, ""):
            raise bad_request(f"{name} is not supported: {remedy}", name, "unsupported_parameter")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _named(error, given) from None


def _named(error: ValidationError, given: dict[str, Any]) -> ApiError:
    """The deepest of the mistakes: of a union's alternatives, the one that the value was nearest to."""
    path, found = max(((_path(e, given), e) for e in error.errors(include_url=False)), key=lambda each: len(each[0]))
    cause = (found.get("ctx") or {}).get("error")
    if isinstance(cause, _Of):
        path = [*path, cause.field]
    param = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".") or None
    if found["type"] == "extra_forbidden":
        return bad_request(f"there is no parameter {param!r}", param, "unknown_parameter")
    if found["type"] == "missing":
        return bad_request(f"{param} is missing", param, "missing_required_parameter")
    reason = found["msg"].removeprefix("Value error, ")
    return bad_request(f"{param} does not fit: {reason[:1].lower()}{reason[1:]}", param)


def _path(found: Any, given: Any) -> list[str | int]:
    """Where in the request a mistake is, without the names of a union's alternatives."""
    path: list[str | int] = []
    location = list(found["loc"])
    for step in location:
        inside = isinstance(given, dict) and step in given
        if inside or (isinstance(given, list) and isinstance(step, int) and step < len(given)):
            given = given[step]
            path.append(step)
    if found["type"] == "missing":
        path.append(location[-1])
    return path


def rendered(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates read them: texts, and arguments of calls as objects.

    Raises:
        ApiError: arguments of a call that are no JSON object.
    """
    return [_rendered(message, index) for index, message in enumerate(messages)]


def _rendered(message: Message, index: int) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": message.text}
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
        for call, arguments in ((c, _arguments(c, f"messages[{index}]")) for c in message.tool_calls or ())
    ]
    return {**found, "tool_calls": calls} if calls else found


def _arguments(call: ToolCall, place: str) -> dict[str, Any]:
    try:
        found = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise bad_request(f"the arguments of the call {call.id!r} are no JSON object", f"{place}.tool_calls")
    return found
