"""Two replicas behind one address, one of them killed under load. Runs where Ray is installed: ``coreskip[ray]``."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from served import MESSAGES, events, small_model

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")

PORT = 8517
URL = f"http://127.0.0.1:{PORT}"
BODY = {"prompt": "Water", "max_tokens": 40, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory, embedded: tuple[Any, Any]) -> Iterator[str]:
    from coreskip.runtime.ray_serve import Arguments, app

    path = tmp_path_factory.mktemp("ray") / "tiny-llama"
    small_model(embedded[1]).save_pretrained(path)
    embedded[1].save_pretrained(path)
    here = {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": here}, log_to_driver=False)
    try:
        serve.start(http_options={"port": PORT})
        arguments = Arguments(model=str(path), min_replicas=2, max_replicas=2, cpus=0.5)
        serve.run(app(arguments), name="coreskip")
        yield "tiny-llama"
    finally:
        serve.shutdown()
        ray.shutdown()


def workers() -> list[int]:
    """Process ids of the replicas."""
    found = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"]]
    return [process.pid for process in found if process.info["cmdline"][0].startswith("ray::ServeReplica:coreskip")]


def test_the_routes_are_the_servers(replicas: str) -> None:
    assert httpx.get(f"{URL}/v1/models", timeout=60).json()["data"][0]["id"] == replicas
    chat = {"messages": MESSAGES, "max_tokens": 5, "temperature": 0}
    whole = httpx.post(f"{URL}/v1/chat/completions", json=chat, timeout=60).json()["choices"][0]["message"]["content"]
    chunks = events(httpx.post(f"{URL}/v1/chat/completions", json={**chat, "stream": True}, timeout=60).text)
    assert chunks[-1] is None
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]) == whole
    refused = httpx.post(f"{URL}/v1/completions", json={"prompt": "a", "x": 1}, timeout=60)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x")


def test_a_replica_is_killed_under_load(replicas: str) -> None:
    """Those that it was answering get an error, all others the text; then there are two again."""

    async def ask(client: httpx.AsyncClient, end: float, found: list[Any]) -> None:
        while time.monotonic() < end:
            try:
                response = await client.post(f"{URL}/v1/completions", json=BODY)
                found.append((response.status_code, response.text))
            except httpx.HTTPError as error:
                found.append((0, type(error).__name__))

    async def run() -> list[Any]:
        found: list[Any] = []
        async with httpx.AsyncClient(timeout=60) as client:
            tasks = [asyncio.create_task(ask(client, time.monotonic() + 12, found)) for _ in range(6)]
            await asyncio.sleep(3)
            before = len(found)
            os.kill(victim, signal.SIGKILL)
            await asyncio.wait_for(asyncio.gather(*tasks), 120)
        assert len(found) > before
        return found

    (victim, *_), both = workers(), workers()
    assert len(both) == 2
    found = asyncio.run(run())
    answers = [text for status, text in found if status == 200]
    failed = [(status, text) for status, text in found if status != 200]
    assert len(failed) <= 6 < len(answers)  # at most what was under way
    assert len({httpx.Response(200, text=text).json()["choices"][0]["text"] for text in answers}) == 1
    end = time.monotonic() + 120
    while len(set(workers()) - {victim}) < 2:
        assert time.monotonic() < end
        time.sleep(0.5)
    assert httpx.post(f"{URL}/v1/completions", json=BODY, timeout=60).status_code == 200
