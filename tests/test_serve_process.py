"""`coreskip serve` as a process: clients from the registry as they are, clients that misbehave, and its end."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
from served import MESSAGES, Served, events, serving, small_model

from coreskip.cli import main
from coreskip.runtime.scheduler import prompts_beside
from coreskip.runtime.serve_setup import Setup

CONTEXT = 1 << 15
LONG = {"prompt": "a", "max_tokens": 32000, "ignore_eos": True, "temperature": 0, "stream": True}
SHORT = {"prompt": "Water", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, embedded: tuple[Any, Any]) -> Path:
    path = tmp_path_factory.mktemp("served") / "tiny-llama"
    small_model(embedded[1], CONTEXT).save_pretrained(path)
    embedded[1].save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(folder, "--plan", "exact", folder=tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


# --- OpenAI's own client


class River(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=6)
    km: int = pydantic.Field(ge=0, le=99)


def test_openai(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-llama", "exact"]
    asked: Any = {"model": "tiny-llama", "messages": MESSAGES, "max_tokens": 10, "temperature": 0}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, user="me", metadata={"a": "b"})
    assert whole.usage is not None
    assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.content) == 10  # type: ignore
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 3  # type: ignore
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens  # type: ignore
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0  # type: ignore
    several = client.chat.completions.create(**{**asked, "temperature": 1.2}, n=3, seed=3)
    assert len({choice.message.content for choice in several.choices}) == 3
    legacy = client.completions.create(model="exact", prompt=["Water", "Fire"], max_tokens=4, logprobs=1, echo=True)
    assert [choice.text[:4] for choice in legacy.choices] == ["Wate", "Fire"]
    assert legacy.choices[0].logprobs.token_logprobs[0] is None  # type: ignore


def test_openai_parses_what_follows_a_schema(client: openai.OpenAI) -> None:
    asked: Any = {"model": "exact", "messages": MESSAGES, "response_format": River, "max_tokens": 100}
    found = client.chat.completions.parse(**asked)
    river = found.choices[0].message.parsed
    assert isinstance(river, River)
    with client.chat.completions.stream(**asked, seed=4) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, River)


def test_openai_raises_what_is_refused(served: Served, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="exact", messages=MESSAGES, reasoning_effort="high")  # type: ignore
    assert (caught.value.param, caught.value.code) == ("reasoning_effort", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError, match="tiny-llama, exact"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.NotFoundError, match="no embeddings"):
        client.embeddings.create(model="exact", input="a")


def test_openai_in_many_tasks(served: Served) -> None:
    """Streams beside each other are those of each alone."""

    async def text(client: openai.AsyncOpenAI, prompt: str) -> str:
        asked: Any = {"model": "tiny-llama", "max_tokens": 24, "temperature": 0, "stream": True}
        found = await client.completions.create(prompt=prompt, **asked)
        return "".join([chunk.choices[0].text async for chunk in found])

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            prompts = [f"{number} rivers" for number in range(12)]
            together = await asyncio.gather(*(text(client, prompt) for prompt in prompts))
            assert together == [await text(client, prompt) for prompt in prompts]

    asyncio.run(run())


def test_what_lm_eval_sends(served: Served, embedded: tuple[Any, Any]) -> None:
    """Its payload for log-likelihoods, and how it reads the answer: the tokens after the context, without the one that
    was generated."""
    tokenizer, model = embedded[1], small_model(embedded[1], CONTEXT)
    contexts, endings = ["Water boils at", "The ferry"], [" one hundred degrees", " was late"]
    rows = [tokenizer(a)["input_ids"] + tokenizer(b)["input_ids"] for a, b in zip(contexts, endings, strict=True)]
    payload = {"model": "exact", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    response = httpx.post(f"{served.url}/v1/completions", json={"prompt": rows, **payload}, timeout=60)
    choices = response.json()["choices"]
    for choice, row, context in zip(choices, rows, contexts, strict=True):
        start = len(tokenizer(context)["input_ids"])
        found = choice["logprobs"]["token_logprobs"][start:-1]
        expected = model(model.dummy_inputs["input_ids"].new_tensor([row])).logits[0].detach().log_softmax(-1)
        wanted = [float(expected[place - 1, row[place]]) for place in range(start, len(row))]
        assert math.fsum(found) == pytest.approx(math.fsum(wanted), abs=1e-3)
        tops = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][start:-1]]
        greedy = [int(expected[place - 1].argmax()) == row[place] for place in range(start, len(row))]
        assert [a == b for a, b in zip(found, tops, strict=True)] == greedy


@pytest.mark.parametrize(
    ("path", "body"),
    [
        # the load generators of vLLM and guidellm, and lm-eval's texts until a stop string
        (
            "completions",
            {"prompt": "a", "temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 4, "logprobs": None,
             "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True},
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "max_completion_tokens": 4,
             "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
             "ignore_eos": True, "stop": None},
        ),
        (
            "completions",
            {"prompt": [[5, 6]], "max_tokens": 4, "temperature": 0, "stop": ["\n\n", "Q:", "a", "b", "c"], "seed": 7},
        ),
    ],
)  # fmt: skip
def test_what_other_clients_send(served: Served, path: str, body: Any) -> None:
    response = httpx.post(f"{served.url}/v1/{path}", json={"model": "exact", **body}, timeout=60)
    assert response.status_code == 200, response.text
    if body.get("stream"):
        *_, usage, done = events(response.text)
        assert (usage["choices"], usage["usage"]["completion_tokens"], done) == ([], 4, None)


# --- clients that misbehave


def test_clients_that_vanish(served: Served) -> None:
    expected = httpx.post(f"{served.url}/v1/completions", json=SHORT, timeout=60).json()["choices"]
    for turn in range(24):
        sock = served.connect({**LONG, "stream": turn % 2 == 0})
        if turn % 6 == 0:
            sock.recv(100)
        if turn % 4 == 0:  # reset rather than closed
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()
    assert served.idle()
    assert httpx.post(f"{served.url}/v1/completions", json=SHORT, timeout=60).json()["choices"] == expected


def test_a_slow_reader_stalls_nobody(served: Served) -> None:
    with served.connect({**LONG, "n": 4}, receive_bytes=4096) as slow:
        assert slow.recv(10)
        start = time.monotonic()
        for _ in range(3):
            assert httpx.post(f"{served.url}/v1/completions", json=SHORT, timeout=60).status_code == 200
        assert time.monotonic() - start < 10
    assert served.idle()


def test_half_a_request_stalls_nobody(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert httpx.post(f"{served.url}/v1/completions", json=SHORT, timeout=60).status_code == 200


def test_a_full_queue_and_the_end(folder: Path, tmp_path: Path) -> None:
    """200 connections on a queue of 16; then the end, which waits for answers and cuts short those that take long."""

    async def run(url: str) -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(limits=limits, timeout=120) as client:
            body = {**SHORT, "max_tokens": 100, "ignore_eos": True}
            return list(await asyncio.gather(*(client.post(f"{url}/v1/completions", json=body) for _ in range(200))))

    words = ("--max-batch", "2", "--max-waiting", "16", "--grace", "2")
    with serving(folder, *words, folder=tmp_path) as served:
        found = asyncio.run(run(served.url))
        refused = [response for response in found if response.status_code == 429]
        answered = [response for response in found if response.status_code == 200]
        assert len(refused) + len(answered) == 200
        assert refused
        assert len(answered) >= 16
        assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
        assert len({response.json()["choices"][0]["text"] for response in answered}) == 1
        assert served.metric("coreskip_requests_total") == 200
        assert served.idle()

        endless = served.connect(LONG)
        short = served.connect({**SHORT, "ignore_eos": True, "stream": True})
        assert endless.recv(10)
        assert short.recv(10)
        assert served.stop(30) == 0
        ends = [b"".join(iter(lambda sock=sock: sock.recv(65536), b"")) for sock in (endless, short)]
        assert b"the server is shutting down" in ends[0]
        assert b"[DONE]" not in ends[0]
        assert b"[DONE]" in ends[1]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{served.url}/health")
        lines = [json.loads(line) for line in served.log.read_text().splitlines() if line.startswith("{")]
        assert [line["status"] for line in lines if line["path"] == "/v1/completions"].count(429) == len(refused)


# --- the command


def test_mistakes_of_the_command(
    folder: Path, served: Served, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    port = served.url.rpartition(":")[2]
    for words, match in (
        (["--port", port], f"cannot listen at 127.0.0.1, port {port}"),
        (["--host", "no.such.host.invalid"], "cannot listen at no.such.host.invalid"),
        (["--api-key", " "], "an --api-key is empty"),
        (["--plan", "a.plan", "--plan", "b=c.plan"], "one model decodes under one plan"),
        (["--plan", "=x"], "write NAME=PATH"),
        (["--plan", "exact", "--name", "exact"], "two models have one name"),
        (["--plan", str(tmp_path / "none.plan"), "--port", "0"], "no plan at"),
        (["--max-context", "99999", "--port", "0"], f"the model has {CONTEXT} positions"),
        (["--max-batch", "0"], "--max-batch"),
        (["--prompt-memory", "much"], "--prompt-memory: memory is 'much'; give bytes"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["serve", str(folder), *words])
        out, err = capsys.readouterr()
        assert (caught.value.code, out) == (2, "")
        assert match in err.splitlines()[-1], err


def test_names_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, file = tmp_path / "Llama-3.2-1B", tmp_path / "model.Q4_0.gguf"
    folder.mkdir()
    file.touch()
    monkeypatch.chdir(folder)
    for setup, names in (
        (Setup(), [("smollm2-135m-instruct", None)]),
        (Setup("org/Some-Model-1.5"), [("org/Some-Model-1.5", None)]),
        (Setup(str(folder)), [("Llama-3.2-1B", None)]),
        (Setup("."), [("Llama-3.2-1B", None)]),
        (Setup(str(file)), [("model.Q4_0", None)]),
        (Setup("m", plans=("a.plan",)), [("m", None)]),
        (Setup("m", plans=("exact",)), [("m", None), ("exact", "dense")]),
        (Setup("m", plans=("exact", "fast=a.plan"), name="n"), [("n", None), ("exact", "dense"), ("fast", None)]),
    ):
        setup.check()
        assert setup.names() == names


def test_kept_prompts_are_bounded_where_nobody_said() -> None:
    assert [prompts_beside(kv_bytes) for kv_bytes in (4000, 10**12)] == [1000, 10**9]


def test_without_its_libraries_it_says_how_to_install_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    for name in [name for name in sys.modules if name.startswith("coreskip.runtime.serve") and "setup" not in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit) as caught:
        main(["serve"])
    assert caught.value.code == 2
    assert "pip install 'coreskip[serve]'" in capsys.readouterr().err
