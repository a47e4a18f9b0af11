"""Requests that nobody would send: whatever they hold, they get an answer or an error that the API documents.

``CORESKIP_FUZZ=10000`` sends as many (`make fuzz-serve`).
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import MESSAGES, TOOLS_TEMPLATE, client_of, events, small_model, with_template

from coreskip import Engine
from coreskip.runtime.serve import Limits, Server, served_models

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
EXAMPLES = int(os.environ.get("CORESKIP_FUZZ", "200"))

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", None, 1]}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "find", "description": "A.", "parameters": SCHEMA}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"a": 1}'}}
NAMED = {"type": "function", "function": {"name": "find"}}
CALLED = [
    {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}, *MESSAGES,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "1", "tool_call_id": "call_1"},
]  # fmt: skip
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMA}}
SAMPLING = {
    "model": "tiny", "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "presence_penalty": 0.5, "n": 2,
    "frequency_penalty": -0.5, "repetition_penalty": 1.1, "seed": 3, "stop": ["ab", "."], "logit_bias": {"300": 5},
    "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "user": "u", "metadata": {"k": "v"},
}  # fmt: skip
VALID: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": MESSAGES}),
    (CHAT, {"messages": MESSAGES, **SAMPLING, "max_tokens": 5, "logprobs": True, "top_logprobs": 2}),
    (CHAT, {"messages": CALLED, "tools": [TOOL], "max_completion_tokens": 6}),
    (CHAT, {"messages": MESSAGES, "tools": [TOOL], "tool_choice": NAMED, "parallel_tool_calls": False}),
    (CHAT, {"messages": MESSAGES, "response_format": FORMAT}),
    (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_object"}, "stream": True}),
    (TEXT, {"prompt": "Water"}),
    (TEXT, {"prompt": ["Water", [5, 6, 7]], **SAMPLING, "max_tokens": 3, "logprobs": 2, "echo": True, "best_of": 2}),
    (TEXT, {"prompt": [5, 6], "max_tokens": 0, "echo": True, "logprobs": 1}),
    (TEXT, {"prompt": "Water", "response_format": {"type": "regex", "pattern": "[ab]+c"}, "max_tokens": 6}),
]  # fmt: skip

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**30, 1e308, -1e308])
    | st.sampled_from(["", "\0", "<|im_end|>", "é€🙂", "auto", "a" * 3000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a body something may be changed."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, each in inside for found in places(each, (*path, key)))]


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, Any]:
    """A valid body of which up to three places hold something else, of another place, are gone or are new."""
    path, valid = draw(st.sampled_from(VALID))
    body: Any = copy.deepcopy(valid)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.sampled_from(places(body)))
        if not place:
            continue
        owner = body
        for key in place[:-1]:
            owner = owner[key]
        kind = draw(st.sampled_from(["junk", "junk", "other", "gone", "new"]))
        if kind == "gone":
            del owner[place[-1]]
        elif kind == "new" and isinstance(owner, dict):
            owner[draw(st.text(max_size=6) | st.sampled_from([*SAMPLING, "echo", "tools", "suffix"]))] = draw(JUNK)
        elif kind == "other":
            other = draw(st.sampled_from(VALID))[1]
            owner[place[-1]] = copy.deepcopy(draw(st.sampled_from(list(other.values()))))
        else:
            owner[place[-1]] = draw(JUNK)
    return path, body


@pytest.fixture(scope="module")
def server(embedded: tuple[Any, Any]) -> Iterator[Server]:
    tokenizer = with_template(embedded[1], TOOLS_TEMPLATE)
    with Engine(small_model(tokenizer), tokenizer, max_batch=4) as engine:
        yield Server(served_models(engine, [("tiny", None)], 160), Limits(body_bytes=100_000))


def answer(server: Server, path: str, content: bytes) -> httpx.Response:
    async def sent() -> httpx.Response:
        async with client_of(server) as client:
            return await client.post(path, content=content, headers={"content-type": "application/json"})

    return asyncio.run(sent())


def check(response: httpx.Response) -> None:
    """An answer, or one of the errors that the API documents, in its shape."""
    assert response.status_code in (200, 400, 404, 413), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert "\n" not in error["message"]
    elif response.headers["content-type"].startswith("text/event-stream"):
        *chunks, done = events(response.text)
        assert done is None or done["error"]["code"] == "invalid_value"
        assert all(chunk["object"] for chunk in chunks)
    else:
        assert response.json()["choices"]


SETTINGS = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@SETTINGS
@given(bodies())
def test_bodies_that_are_almost_right(server: Server, asked: tuple[str, Any]) -> None:
    path, body = asked
    check(answer(server, path, json.dumps(body).encode()))


@settings(SETTINGS, max_examples=max(50, EXAMPLES // 10))
@given(st.sampled_from([CHAT, TEXT]), st.binary(max_size=64) | JUNK.map(lambda junk: json.dumps(junk).encode()))
def test_bodies_that_are_nothing(server: Server, path: str, body: bytes) -> None:
    response = answer(server, path, body)
    check(response)
    assert response.status_code == 400
