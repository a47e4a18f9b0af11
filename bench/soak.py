"""A server under mixed requests for minutes: answers, documented refusals, clients that vanish or read slowly, and
whether memory stays flat.

``python -m coreskip.bench.soak --rows bench/rows/soak.jsonl --minutes 10``
"""

from __future__ import annotations

import asyncio
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import httpx

from coreskip.bench.provenance import model_name, provenance, write_rows
from coreskip.bench.servers import Job, ServerProcess
from coreskip.bench.workloads import prompts, threads_available

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
_SAMPLE_S = 5.0  # between looks at the memory
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}}}


class Soak:
    """Requests of all kinds, at random, each checked for what it must get.

    Args:
        patience: seconds; a request that takes longer hangs.

    Attributes:
        done: by kind. wrong: what some got instead, by kind and status. memory: bytes over time, from ``/metrics``.
    """

    def __init__(self, server: ServerProcess, seed: int, patience: float = 120.0) -> None:
        self._server, self._random, self._patience = server, random.Random(seed), patience
        self.done, self.wrong = Counter[str](), Counter[str]()
        self.memory: list[tuple[float, float]] = []
        self._kinds: dict[str, Callable[[httpx.AsyncClient], Awaitable[None]]] = {
            "stream": self._stream,
            "whole": self._whole,
            "scored": self._scored,
            "schema": self._schema,
            "refused": self._refused,
            "vanishing": self._vanishing,
            "slow": self._slow,
        }

    async def run(self, seconds: float, clients: int) -> None:
        end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._server.url, timeout=self._patience, limits=limits) as client:
            try:
                await asyncio.gather(self._watch(client, end), *(self._client(client, end) for _ in range(clients)))
                await self._settled(client)
            except httpx.HTTPError as error:  # of the metrics: there is no server any more
                self.wrong[f"metrics: {type(error).__name__}"] += 1

    async def _client(self, client: httpx.AsyncClient, end: float) -> None:
        while time.monotonic() < end:
            name = self._random.choice(list(self._kinds))
            try:
                await self._kinds[name](client)
            except (httpx.HTTPError, AssertionError, ValueError) as error:
                self.wrong[f"{name}: {type(error).__name__} {str(error)[:80]}"] += 1
            self.done[name] += 1

    async def _watch(self, client: httpx.AsyncClient, end: float) -> None:
        start = time.monotonic()
        while time.monotonic() < end:
            self.memory.append((time.monotonic() - start, await self._metric(client, "coreskip_memory_bytes")))
            await asyncio.sleep(min(_SAMPLE_S, max(0.1, end - time.monotonic())))

    async def _settled(self, client: httpx.AsyncClient) -> None:
        """Whether nothing runs on after the last client is gone."""
        for _ in range(100):
            left = [await self._metric(client, f"coreskip_{name}") for name in ("running", "waiting")]
            if not any(left):
                return
            await asyncio.sleep(0.1)
        self.wrong["texts that nobody waits for"] += 1

    async def _metric(self, client: httpx.AsyncClient, name: str) -> float:
        page = (await client.get("/metrics")).text
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE))

    # --- kinds of requests

    def _text(self) -> dict[str, Any]:
        """A prompt that is mostly another one than before, so that caches of prompts fill up, too."""
        text = self._random.choice(prompts()).text
        return {"prompt": f"{self._random.randrange(10**6)} {text[: self._random.randrange(20, len(text))]}"}

    async def _post(self, client: httpx.AsyncClient, path: str, status: int = 200, **body: Any) -> Any:
        response = await client.post(path, json={"model": self._server.model, **body})
        assert response.status_code == status, f"status {response.status_code}"
        return response.json()

    async def _stream(self, client: httpx.AsyncClient) -> None:
        body = {
            "model": self._server.model,
            **self._text(),
            "stream": True,
            "max_tokens": self._random.randrange(1, 64),
        }
        async with client.stream("POST", TEXT, json=body) as response:
            assert response.status_code == 200, f"status {response.status_code}"
            lines = [line async for line in response.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]"

    async def _whole(self, client: httpx.AsyncClient) -> None:
        messages = [{"role": "user", "content": self._text()["prompt"]}]
        found = await self._post(client, CHAT, messages=messages, max_tokens=32, n=self._random.randrange(1, 4))
        assert all(choice["finish_reason"] in ("stop", "length") for choice in found["choices"])

    async def _scored(self, client: httpx.AsyncClient) -> None:
        found = await self._post(client, TEXT, **self._text(), echo=True, logprobs=2, max_tokens=1, temperature=0)
        logprobs = found["choices"][0]["logprobs"]["token_logprobs"]
        assert logprobs[0] is None
        assert all(each <= 0 for each in logprobs[1:])

    async def _schema(self, client: httpx.AsyncClient) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
        messages = [{"role": "user", "content": "Describe a person."}]
        found = await self._post(client, CHAT, messages=messages, max_tokens=48, response_format=form)
        assert found["choices"][0]["message"]["content"].lstrip().startswith("{")

    async def _refused(self, client: httpx.AsyncClient) -> None:
        wrong: list[dict[str, Any]] = [
            {"prompt": [5] * 200_000},
            {"prompt": "a", "best_of": 9},
            {"prompt": "a", "x": 1},
        ]
        assert (await self._post(client, TEXT, 400, **self._random.choice(wrong)))["error"]["param"]

    async def _vanishing(self, client: httpx.AsyncClient) -> None:
        body = {"model": self._server.model, **self._text(), "stream": True, "max_tokens": 200, "n": 2}
        async with client.stream("POST", TEXT, json=body) as response:
            assert response.status_code == 200, f"status {response.status_code}"
            async for _ in response.aiter_lines():
                if self._random.random() < 0.3:
                    return

    async def _slow(self, client: httpx.AsyncClient) -> None:
        body = {"model": self._server.model, **self._text(), "stream": True, "max_tokens": 32}
        async with client.stream("POST", TEXT, json=body) as response:
            assert response.status_code == 200, f"status {response.status_code}"
            async for _ in response.aiter_lines():
                await asyncio.sleep(0.05)


@click.command()
@click.argument("model", required=False)
@click.option("--rows", "output", required=True, type=click.Path(path_type=Path), help="JSONL file to write.")
@click.option("--minutes", default=10.0, type=click.FloatRange(0, min_open=True), show_default=True)
@click.option("--clients", default=12, type=click.IntRange(1), show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Of the server; by default as many as there are.")
@click.option("--server", default="coreskip", type=click.Choice(["coreskip", "coreskip int4"]), show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--prompt-memory", default="256MB", show_default=True, help="As for `coreskip serve`: full within minutes."
)
@click.option("--patience", default=120.0, show_default=True, help="Seconds; a request that takes longer hangs.")
def main(
    model: str | None,
    output: Path,
    minutes: float,
    clients: int,
    threads: int | None,
    server: str,
    seed: int,
    prompt_memory: str,
    patience: float,
) -> None:
    """Soak a server of MODEL, by default the embedded one. The exit code is 1 where something went wrong."""
    threads = threads or threads_available()
    words = f"--minutes {minutes:g} --clients {clients} --threads {threads} --server '{server}' --seed {seed}"
    words += f" --prompt-memory {prompt_memory} --patience {patience:g}"
    about = provenance(f"python -m coreskip.bench.soak --rows bench/rows/{output.name} {words}")
    with tempfile.TemporaryDirectory() as folder:
        started = ServerProcess(server, Job(model, Path(folder), None, threads, 8, prompt_memory))
    try:
        soak = Soak(started, seed, patience)
        asyncio.run(soak.run(60 * minutes, clients))
    finally:
        code = started.close()
    row = {"kind": "soak", "server": server, "minutes": minutes, "clients": clients, **_summary(soak), "exit": code}
    write_rows(output, [{**row, **about, "threads": threads, "model": model_name(model)}])
    click.echo(row)
    raise SystemExit(bool(soak.wrong) or code != 0)


def _summary(soak: Soak) -> dict[str, Any]:
    """Memory in megabytes: medians of the second and of the last tenth of the time, as the first one warms up; and of
    each fifth, by the seconds at its end, which tell whether it still grows."""
    samples = [value / 1e6 for _, value in soak.memory]
    tenth = max(1, len(samples) // 10)
    early, late = median(samples[tenth : 2 * tenth] or samples), median(samples[-tenth:])
    fifths = [samples[-(-len(samples) * i // 5) : -(-len(samples) * (i + 1) // 5)] for i in range(5)]
    ends = [soak.memory[-(-len(samples) * (i + 1) // 5) - 1][0] for i in range(5)]
    over_time = {f"{end:.0f}": round(median(some), 1) for end, some in zip(ends, fifths, strict=True) if some}
    return {
        "requests": dict(soak.done),
        "wrong": dict(soak.wrong),
        "memory_mb": {"early": round(early, 1), "late": round(late, 1), "most": round(max(samples), 1)},
        "memory_mb_by_seconds": over_time,
    }


if __name__ == "__main__":
    main()
