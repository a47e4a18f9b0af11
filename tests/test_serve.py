"""The server's answers, on a tiny random model in this process: what they hold, and what is refused."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
import torch
from served import MESSAGES, TOOLS_TEMPLATE, client_of, events, server_of, small_model, with_template
from tiny_models import greedy, plan_of

from coreskip import CoreskipError, Engine
from coreskip.runtime.serve import Server, served_models
from coreskip.runtime.serve_tools import call_format

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPT = "The old ferry crossed the river"


@pytest.fixture(scope="module")
def engine(embedded: tuple[Any, Any]) -> Iterator[Engine]:
    with Engine(small_model(embedded[1]), embedded[1], max_batch=4, max_waiting=64) as made:
        yield made


@pytest.fixture(scope="module")
def server(engine: Engine) -> Server:
    return server_of(engine)


async def _sent(server: Server, path: str, body: Any, headers: Any) -> httpx.Response:
    async with client_of(server) as client:
        if isinstance(body, bytes):
            return await client.post(path, content=body, headers={"content-type": "application/json", **headers})
        return await client.post(path, json=body, headers=headers)


def send(server: Server, path: str, body: Any, **headers: str) -> httpx.Response:
    return asyncio.run(_sent(server, path, body, headers))


def ask(server: Server, path: str, **body: Any) -> Any:
    response = send(server, path, {"temperature": 0, **body})
    assert response.status_code == 200, response.text
    return events(response.text) if body.get("stream") else response.json()


def refuse(server: Server, path: str, status: int, **body: Any) -> Any:
    response = send(server, path, body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def get(server: Server, path: str, **headers: str) -> httpx.Response:
    async def got() -> httpx.Response:
        async with client_of(server) as client:
            return await client.get(path, headers=headers)

    return asyncio.run(got())


# --- texts


def test_texts_are_the_engines(server: Server, engine: Engine) -> None:
    found = ask(server, TEXT, prompt=PROMPT, max_tokens=12)
    assert found["choices"] == [
        {"index": 0, "text": engine.generate(PROMPT, max_new_tokens=12), "logprobs": None, "finish_reason": "length"}
    ]
    assert found["usage"]["completion_tokens"] == 12
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + 12
    assert (found["object"], found["model"]) == ("text_completion", "tiny")
    chat = ask(server, CHAT, messages=MESSAGES, max_completion_tokens=9)
    message = {"role": "assistant", "content": engine.generate(MESSAGES, max_new_tokens=9), "refusal": None}
    assert chat["choices"][0]["message"] == message
    assert chat["object"] == "chat.completion"


def test_several_prompts_in_several_forms(server: Server, engine: Engine) -> None:
    ids = engine.tokenizer(PROMPT)["input_ids"]
    found = ask(server, TEXT, prompt=[PROMPT, ids, "Water"], n=2, max_tokens=6)
    texts = [choice["text"] for choice in found["choices"]]
    assert [choice["index"] for choice in found["choices"]] == list(range(6))
    assert len(set(texts[:4])) == 1
    assert texts[4] == texts[5] == engine.generate("Water", max_new_tokens=6)
    assert found["usage"]["prompt_tokens"] == 2 * len(ids) + 1
    assert ask(server, TEXT, prompt=ids, max_tokens=6)["choices"][0]["text"] == texts[0]


@pytest.mark.parametrize("body", [{}, {"n": 3, "temperature": 1, "seed": 5}, {"logprobs": True, "top_logprobs": 2}])
def test_a_streamed_chat_is_the_whole_one(server: Server, body: Any) -> None:
    asked = {"messages": MESSAGES, "max_tokens": 8, **body}
    whole = ask(server, CHAT, **asked)
    *chunks, usage, done = ask(server, CHAT, **asked, stream=True, stream_options={"include_usage": True})
    assert done is None
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], whole["usage"]["completion_tokens"])
    assert {chunk["id"] for chunk in chunks} == {usage["id"]}
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["usage"] is None for chunk in chunks)
    for choice in whole["choices"]:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(each["delta"].get("content", "") for each in own) == choice["message"]["content"]
        assert [each["finish_reason"] for each in own] == [None] * (len(own) - 1) + ["length"]
        told = [token for each in own if each["logprobs"] for token in each["logprobs"]["content"]]
        assert told == (choice["logprobs"] or {"content": []})["content"]


def test_a_streamed_text_is_the_whole_one(server: Server) -> None:
    asked = {"prompt": [PROMPT, "Water"], "max_tokens": 7, "echo": True, "logprobs": 2}
    whole = ask(server, TEXT, **asked)
    chunks = ask(server, TEXT, **asked, stream=True)
    assert chunks[-1] is None
    assert all("usage" not in chunk for chunk in chunks[:-1])
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == choice["index"]]
        assert "".join(each["text"] for each in own) == choice["text"]
        for name, expected in choice["logprobs"].items():
            assert [x for each in own for x in each["logprobs"][name]] == expected
    often = ask(server, TEXT, prompt=PROMPT, max_tokens=5, stream=True, stream_options={"continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in often[:-1]]
    assert counts == sorted(counts)
    assert counts[-1] == 5


def test_seeds_and_choices(server: Server) -> None:
    def texts(**body: Any) -> list[str]:
        found = ask(server, TEXT, prompt=PROMPT, max_tokens=8, **body)
        return [choice["text"] for choice in found["choices"]]

    sampled = {"temperature": 1.5, "seed": 7}
    assert len(set(texts(**sampled, n=4))) == 4
    assert texts(**sampled, n=4)[:1] == texts(**sampled)
    assert texts(temperature=1.5, seed=-1) == texts(temperature=1.5, seed=2**64 - 1) != texts(temperature=1.5, seed=3)
    assert texts(**sampled, top_k=1) == texts(**sampled, min_p=1.0) == texts(**sampled, top_p=1e-9) == texts()


def test_biases_penalties_and_ends(server: Server, engine: Engine) -> None:
    def made(**body: Any) -> Any:
        return ask(server, TEXT, prompt=PROMPT, logprobs=0, **{"max_tokens": 10, **body})["choices"][0]

    likeliest = engine.tokenizer(made(max_tokens=1)["text"], add_special_tokens=False)["input_ids"][0]
    free = made()
    assert free["logprobs"]["tokens"][0] == engine.tokenizer.decode([likeliest])
    assert made(logit_bias={str(likeliest): -100})["logprobs"]["tokens"][0] != free["logprobs"]["tokens"][0]
    assert set(made(logit_bias={"300": 100})["logprobs"]["tokens"]) == {engine.tokenizer.decode([300])}
    repeated = made(logit_bias={"300": 100}, presence_penalty=2, frequency_penalty=2, max_tokens=60)
    assert len(set(repeated["logprobs"]["tokens"])) > 1  # 2 and 2 a time are more than 100 in the end
    ended = made(logit_bias={"2": 100})
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")
    assert made(logit_bias={"2": 100}, ignore_eos=True)["finish_reason"] == "length"
    word = free["text"][3:6]
    stopped = made(stop=[word, "never"])
    assert (stopped["text"], stopped["finish_reason"]) == (free["text"][: free["text"].index(word)], "stop")


def test_logprobs_are_plain_transformers(server: Server, engine: Engine, embedded: tuple[Any, Any]) -> None:
    model = small_model(embedded[1])
    ids = torch.tensor([engine.tokenizer(PROMPT)["input_ids"]])
    expected = model(ids).logits[0].log_softmax(-1).detach()
    asked = {"prompt": ids[0].tolist(), "echo": True, "logprobs": 3}
    scored = ask(server, TEXT, **asked, max_tokens=0)["choices"][0]
    found, length = scored["logprobs"], ids.shape[1]
    assert [len(values) for values in found.values()] == [length] * 4
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    for place in range(1, length):
        row, token = expected[place - 1], int(ids[0, place])
        assert found["token_logprobs"][place] == pytest.approx(float(row[token]), abs=1e-3)
        assert max(found["top_logprobs"][place].values()) == pytest.approx(float(row.max()), abs=1e-3)
        assert len(found["top_logprobs"][place]) in (3, 4)
    for token, place in zip(found["tokens"], found["text_offset"], strict=True):
        assert scored["text"][place:].startswith(token)
    one = ask(server, TEXT, **asked, max_tokens=1)["choices"][0]["logprobs"]
    assert one["token_logprobs"][1:-1] == pytest.approx(found["token_logprobs"][1:], abs=1e-5)
    assert one["token_logprobs"][-1] == max(one["top_logprobs"][-1].values())
    assert one["token_logprobs"][-1] == pytest.approx(float(expected[-1].max()), abs=1e-3)
    assert ask(server, TEXT, prompt=PROMPT, echo=True, max_tokens=1)["choices"][0]["text"].startswith(PROMPT)


def test_logprobs_of_a_chat(server: Server) -> None:
    found = ask(server, CHAT, messages=MESSAGES, max_tokens=12, logprobs=True, top_logprobs=4)["choices"][0]
    tokens = found["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode("utf-8", "replace") == found["message"]["content"]
    for token in tokens:
        top = [each["logprob"] for each in token["top_logprobs"]]
        assert top == sorted(top, reverse=True)
        assert token["token"] == token["top_logprobs"][0]["token"]
    ended = ask(server, CHAT, messages=MESSAGES, max_tokens=5, logprobs=True, logit_bias={"2": 100})["choices"][0]
    assert (ended["logprobs"]["content"], ended["finish_reason"]) == ([], "stop")


def test_a_name_may_be_the_dense_model(embedded: tuple[Any, Any]) -> None:
    model, plain = small_model(embedded[1]), small_model(embedded[1])
    ids = embedded[1](PROMPT, return_tensors="pt").input_ids
    dense = embedded[1].decode(greedy(plain, ids, 12)[0, ids.shape[1] :], skip_special_tokens=True)
    with Engine(model, embedded[1], plan_of(model, "static", 0.3), max_batch=4) as engine:
        server = server_of(engine, [("fast", None), ("exact", "dense")])
        asked = {"prompt": PROMPT, "max_tokens": 12}
        fast, exact = (ask(server, TEXT, model=name, **asked) for name in ("fast", "exact"))
        assert [each["model"] for each in (fast, exact)] == ["fast", "exact"]
        assert exact["choices"][0]["text"] == dense
        assert fast["choices"][0]["text"] == engine.generate(PROMPT, max_new_tokens=12) != dense
        assert refuse(server, TEXT, 404, prompt="a", model="gpt-4")["code"] == "model_not_found"
        described = get(server, "/v1/models").json()["data"]
        assert [each["plan"] for each in described] == ["static", "dense"]
        (share,) = re.findall(r'\ncoreskip_neurons_skipped_ratio{engine="fast"} (\S+)', get(server, "/metrics").text)
        assert 0.1 < float(share) < 0.7


# --- formats and tools

SCHEMA = {
    "type": "object",
    "properties": {"river": {"type": "string", "maxLength": 8}, "km": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["river", "km"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_answers_follow_a_schema(server: Server, temperature: float) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "river", "strict": True, "schema": SCHEMA}}
    asked = {"messages": MESSAGES, "max_tokens": 200, "response_format": form, "temperature": temperature, "seed": 1}
    choice = ask(server, CHAT, **asked)["choices"][0]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    chunks = ask(server, CHAT, **asked, stream=True)[:-1]
    streamed = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert streamed == choice["message"]["content"]


def test_answers_follow_a_pattern_and_are_objects(server: Server) -> None:
    form = {"type": "regex", "pattern": "(yes|no), [0-9]{2}"}
    made = ask(server, TEXT, prompt=PROMPT, max_tokens=20, n=3, temperature=1, response_format=form)
    assert all(re.fullmatch(form["pattern"], choice["text"]) for choice in made["choices"])
    found = ask(server, CHAT, messages=MESSAGES, max_tokens=6, response_format={"type": "json_object"})
    assert found["choices"][0]["message"]["content"].startswith("{")


TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA, "description": "A river."}}
    for name in ("find", "swim")
]


@pytest.fixture(scope="module")
def tools_server(embedded: tuple[Any, Any]) -> Iterator[Server]:
    tokenizer = with_template(embedded[1], TOOLS_TEMPLATE)
    with Engine(small_model(tokenizer), tokenizer, max_batch=4) as engine:
        yield server_of(engine)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "swim"}}])
def test_tools_are_called(tools_server: Server, choice: Any) -> None:
    asked = {
        "messages": MESSAGES,
        "tools": TOOLS,
        "tool_choice": choice,
        "max_tokens": 300,
        "temperature": 1,
        "seed": 3,
    }
    found = ask(tools_server, CHAT, **asked)["choices"][0]
    assert (found["finish_reason"], found["message"]["content"]) == ("tool_calls", None)
    (call,) = found["message"]["tool_calls"]
    assert call["function"]["name"] in ({"swim"} if isinstance(choice, dict) else {"find", "swim"})
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
    chunks = [chunk["choices"][0] for chunk in ask(tools_server, CHAT, **asked, stream=True)[:-1]]
    (streamed,) = [each for chunk in chunks for each in chunk["delta"].get("tool_calls", [])]
    assert (streamed["index"], streamed["function"]) == (0, call["function"])
    assert chunks[-1]["finish_reason"] == "tool_calls"
    result = {"role": "tool", "content": "3", "tool_call_id": call["id"]}
    answered = [*MESSAGES, {"role": "assistant", "tool_calls": [call]}, result]
    assert (
        ask(tools_server, CHAT, messages=answered, tools=TOOLS, max_tokens=3)["choices"][0]["finish_reason"] == "length"
    )


def test_tools_may_not_be_called(tools_server: Server, server: Server) -> None:
    plain = ask(tools_server, CHAT, messages=MESSAGES, max_tokens=5)
    none = ask(tools_server, CHAT, messages=MESSAGES, tools=TOOLS, tool_choice="none", max_tokens=5)
    free = ask(tools_server, CHAT, messages=MESSAGES, tools=TOOLS, max_tokens=5)
    assert none["choices"] == plain["choices"]
    assert free["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]
    assert refuse(server, CHAT, 400, messages=MESSAGES, tools=TOOLS)["param"] == "tools"
    call = {"id": "a", "type": "function", "function": {"name": "find", "arguments": "{}"}}
    called = [*MESSAGES, {"role": "assistant", "tool_calls": [call]}]
    assert refuse(server, CHAT, 400, messages=called)["param"] == "messages[1].tool_calls"
    ask(server, CHAT, messages=MESSAGES, tools=TOOLS, tool_choice="none", max_tokens=2)


def test_calls_between_special_tokens_are_read(embedded: tuple[Any, Any]) -> None:
    """As of Mistral's models: such tokens are no part of the text that users see."""
    template = TOOLS_TEMPLATE.replace("<tool_call>", "<repo_name>").replace("</tool_call>", "<file_sep>")
    tokenizer = with_template(embedded[1], template)
    form = call_format(tokenizer)
    assert not isinstance(form, str)
    assert (form.before, form.after) == ("<repo_name>", "<file_sep>")
    with Engine(small_model(tokenizer), tokenizer, max_batch=2) as engine:
        server = server_of(engine)
        asked = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required", "max_tokens": 300}
        assert len(ask(server, CHAT, **asked)["choices"][0]["message"]["tool_calls"]) == 1
        assert refuse(server, CHAT, 400, **asked, stop=".")["param"] == "stop"


# --- refusals


def test_mistakes_that_depend_on_the_model(server: Server) -> None:
    wrong = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}
    form, open_group = "response_format", {"type": "regex", "pattern": "("}
    for path, status, param, code, body in (
        (TEXT, 400, "prompt", "context_length_exceeded", {"prompt": [5] * 600}),
        (TEXT, 400, "prompt", "context_length_exceeded", {"prompt": "a", "max_tokens": 512}),
        (CHAT, 400, "messages", "context_length_exceeded", {"messages": [{"role": "user", "content": "a " * 900}]}),
        (TEXT, 400, "prompt", "invalid_value", {"prompt": ""}),
        (TEXT, 400, "prompt", "invalid_value", {"prompt": [10**6]}),
        (TEXT, 400, "prompt", "invalid_value", {"prompt": [-1]}),
        (TEXT, 400, "logit_bias", "invalid_value", {"prompt": "a", "logit_bias": {"999999": 1}}),
        (CHAT, 400, f"{form}.json_schema.schema", "invalid_value", {"messages": MESSAGES, form: wrong}),
        (CHAT, 400, f"{form}.pattern", "invalid_value", {"messages": MESSAGES, form: open_group}),
        ("/v1/embeddings", 404, None, "unsupported_endpoint", {"input": "a", "model": "tiny"}),
        ("/v1/responses", 404, None, None, {}),
        ("/v1/models", 405, None, None, {}),
    ):  # fmt: skip
        error = refuse(server, path, status, **body)
        assert (error["param"], error["code"]) == (param, code), error
        assert "\n" not in error["message"]


def test_a_chat_without_a_template_is_refused(embedded: tuple[Any, Any]) -> None:
    tokenizer = with_template(embedded[1], None)
    with Engine(small_model(tokenizer), tokenizer, max_batch=1) as engine:
        assert refuse(server_of(engine), CHAT, 400, messages=MESSAGES)["param"] == "messages"


def test_bodies(engine: Engine) -> None:
    server = server_of(engine, body_bytes=1000)
    assert send(server, TEXT, b"x" * 2000).status_code == 413
    assert send(server, TEXT, b"x" * 999).status_code == 400
    assert send(server, TEXT, b'{"prompt": "a"}', **{"content-type": "text/plain"}).status_code == 415

    async def slow() -> int:
        async def parts() -> Any:
            yield b'{"prompt":'
            await asyncio.sleep(5)

        async with client_of(server_of(engine, body_s=0.05)) as client:
            return (await client.post(TEXT, content=parts())).status_code

    assert asyncio.run(slow()) == 408


def test_keys(engine: Engine) -> None:
    server = server_of(engine, keys=("first", "zweiter-schlüssel"))
    for headers in ({}, {"authorization": "Bearer nope"}, {"authorization": "Basic first"}, {"authorization": "first"}):
        response = get(server, "/v1/models", **headers)
        assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert get(server, "/v1/models", authorization="Bearer first").status_code == 200
    assert get(server, "/metrics").status_code == 401
    assert get(server, "/health").status_code == 200
    assert send(server, TEXT, {"prompt": "a"}).status_code == 401


def test_models(server: Server, engine: Engine) -> None:
    found = get(server, "/v1/models").json()
    assert [each["id"] for each in found["data"]] == ["tiny", "exact"]
    assert get(server, "/v1/models/exact").json() == found["data"][1]
    assert found["data"][0]["max_model_len"] == 512
    assert get(server, "/v1/models/none").status_code == 404
    assert served_models(engine, [("a", None)], 64)[0].context == 64
    with pytest.raises(CoreskipError, match="512 positions"):
        served_models(engine, [("a", None)], 1024)


def test_ids_metrics_and_logs_say_nothing_of_texts(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    server = server_of(engine)
    with caplog.at_level(logging.INFO, logger="coreskip.requests"):
        given = send(server, TEXT, {"prompt": "a secret ferry", "max_tokens": 3}, **{"x-request-id": "abc-1.2"})
        made = send(server, TEXT, {"prompt": "a secret ferry", "stop": 5}, **{"x-request-id": "no\tgood"})
    assert given.headers["x-request-id"] == "abc-1.2"
    assert re.fullmatch("[0-9a-f]{32}", made.headers["x-request-id"])
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [line["request_id"] for line in lines] == [made_by.headers["x-request-id"] for made_by in (given, made)]
    assert (lines[0]["completion_tokens"], lines[0]["model"], lines[1]["status"]) == (3, "tiny", 400)
    assert lines[0]["first_token_ms"] > 0
    assert "ferry" not in caplog.text
    page = get(server, "/metrics").text
    for expected in (
        'coreskip_requests_total{route="/v1/completions",status="200"} 1.0',
        'coreskip_requests_total{route="/v1/completions",status="400"} 1.0',
        "coreskip_time_to_first_token_seconds_count 1.0",
        "coreskip_inter_token_seconds_count 2.0",
        'coreskip_waiting{engine="tiny"} 0.0',
        'coreskip_neurons_skipped_ratio{engine="tiny"} 0.0',
    ):
        assert expected in page, expected
    assert re.search(r"coreskip_memory_bytes \d", page)
    assert float(re.findall(r"\ncoreskip_tokens_per_second (\S+)", page)[0]) == pytest.approx(0.3)


# --- load, time, and clients that leave


def test_a_full_queue_is_told(embedded: tuple[Any, Any]) -> None:
    async def run(server: Server) -> list[httpx.Response]:
        async with client_of(server) as client:
            body = {"prompt": "a", "max_tokens": 150, "temperature": 0, "ignore_eos": True}
            return list(await asyncio.gather(*(client.post(TEXT, json=body) for _ in range(12))))

    with Engine(small_model(embedded[1]), embedded[1], max_batch=1, max_waiting=3) as engine:
        found = asyncio.run(run(server_of(engine)))
        assert len(ask(server_of(engine), TEXT, prompt="a", n=9, max_tokens=2)["choices"]) == 9  # more than fit at once
    statuses = [response.status_code for response in found]
    assert set(statuses) == {200, 429}
    assert 3 <= statuses.count(200) < 12
    refused = next(response for response in found if response.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    assert len({r.json()["choices"][0]["text"] for r in found if r.status_code == 200}) == 1


def test_answers_that_take_too_long(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    server = server_of(engine, request_s=0.15)
    body = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "n": 4}
    assert send(server, TEXT, body).status_code == 504
    with caplog.at_level(logging.INFO, logger="coreskip.requests"):
        *chunks, error = events(send(server, TEXT, {**body, "stream": True}).text)
    assert error["error"]["code"] == "timeout"
    assert chunks
    assert json.loads(caplog.records[-1].getMessage())["error"] == "timeout"
    idle(engine)


def idle(engine: Engine) -> None:
    """Wait until the engine runs nothing any more; it has to come to that soon."""

    async def wait() -> None:
        for _ in range(200):
            if engine.load().running + engine.load().waiting == 0:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(engine.load())

    asyncio.run(wait())


@pytest.mark.parametrize("stream", [False, True])
def test_generation_ends_with_its_client(server: Server, engine: Engine, stream: bool) -> None:
    """An ASGI client that sends its request, takes a few messages and is gone."""
    body = json.dumps({"prompt": "a", "max_tokens": 500, "ignore_eos": True, "n": 4, "stream": stream}).encode()
    started = asyncio.Event()
    incoming = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if incoming:
            return incoming.pop()
        await (started.wait() if stream else asyncio.sleep(0.1))
        return {"type": "http.disconnect"}

    sent = []

    async def keep(message: Any) -> None:
        sent.append(message)
        if message.get("body"):
            started.set()

    scope = {"type": "http", "method": "POST", "path": TEXT, "query_string": b"", "headers": [], "root_path": ""}
    before = engine.load().decode_tokens
    asyncio.run(asyncio.wait_for(server.app()(scope, receive, keep), 20))
    idle(engine)
    assert engine.load().decode_tokens - before < 4 * 500
    assert bool(sent) == stream


def test_the_last_of_a_server(engine: Engine) -> None:
    server = server_of(engine)

    async def run() -> tuple[httpx.Response, ...]:
        async with client_of(server) as client:
            body = {"prompt": "a", "max_tokens": 500, "ignore_eos": True}
            ways = [client.post(TEXT, json={**body, "stream": stream, "n": 8}) for stream in (False, True)]
            under_way = [asyncio.create_task(way) for way in ways]
            await asyncio.sleep(0.1)
            server.drain()
            late, health = await client.post(TEXT, json=body), await client.get("/health")
            server.cancel("the server is shutting down")
            return late, health, *(await asyncio.gather(*under_way))

    late, health, whole, stream = asyncio.run(run())
    assert (late.status_code, health.status_code, whole.status_code) == (503, 503, 503)
    assert late.headers["retry-after"]
    assert whole.json()["error"]["message"] == "the server is shutting down"
    assert events(stream.text)[-1]["error"]["message"] == "the server is shutting down"


def test_what_fails_is_logged_and_not_told(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("an inner secret")

    monkeypatch.setattr(server.models[0].engine, "submit", broken)
    error = refuse(server, TEXT, 500, prompt="a")
    assert "secret" not in json.dumps(error)
    assert "an inner secret" in caplog.text
