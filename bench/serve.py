"""A server under concurrent clients: tokens a second in all, time to the first token and between tokens.

``python -m coreskip.bench.serve --rows bench/rows/serve.jsonl``
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import click
import httpx
import torch

from coreskip.bench.provenance import model_name, provenance, write_rows
from coreskip.bench.servers import KINDS, Job, ServerProcess
from coreskip.bench.workloads import prompts, threads_available
from coreskip.predictors.errors import CoreskipError
from coreskip.runtime.load import embedded_gguf, load

Row = dict[str, Any]
_ALONE = 2  # streams of each round that are asked for again, with nothing beside them


@dataclass
class Stream:
    """What one client got.

    Attributes:
        pieces: of its text, each with the seconds since the one before, or since the request. A piece may hold several
            tokens.
        begin, end: by ``time.perf_counter``.
        error: what went wrong instead.
    """

    prompt: str
    begin: float
    end: float = 0.0
    pieces: list[tuple[str, float]] = field(default_factory=list)
    error: str | None = None

    @property
    def text(self) -> str:
        return "".join(piece for piece, _ in self.pieces)


@click.command()
@click.argument("model", required=False)
@click.option("--rows", "output", required=True, type=click.Path(path_type=Path), help="JSONL file to write.")
@click.option(
    "--servers", default="coreskip,coreskip int4,transformers,llama-server,llama-cpp-python", show_default=True
)
@click.option("--clients", default="1,4,16", show_default=True, help="How many at once, one after the other.")
@click.option("--tokens", default=128, type=click.IntRange(8), show_default=True, help="Of each answer, at most.")
@click.option("--rounds", default=3, type=click.IntRange(1), show_default=True, help="Of all servers in turn.")
@click.option("--threads", type=click.IntRange(1), help="Of every server; by default as many as there are.")
@click.option(
    "--patience",
    default=60.0,
    type=click.FloatRange(0, min_open=True),
    show_default=True,
    help="Seconds for all clients of one turn; a server that takes longer has a row that says so, and no more turns.",
)
def main(
    model: str | None,
    output: Path,
    servers: str,
    clients: str,
    tokens: int,
    rounds: int,
    threads: int | None,
    patience: float,
) -> None:
    """Measure MODEL, by default the embedded one, behind each server: greedy streams that begin at the same time."""
    counts, threads = [int(count) for count in clients.split(",")], threads or threads_available()
    unknown = [name for name in servers.split(",") if name not in KINDS]
    if unknown:
        raise click.BadParameter(f"{unknown[0]}: choose from {', '.join(KINDS)}", param_hint="--servers")
    words = f"--servers '{servers}' --clients {clients} --tokens {tokens} --rounds {rounds} --threads {threads}"
    words += f" --patience {patience:g}"
    about = provenance(f"python -m coreskip.bench.serve --rows bench/rows/{output.name} {words}")
    about = {**about, "threads": threads, "model": model_name(model)}
    with tempfile.TemporaryDirectory() as folder:
        loaded, tokenizer = load(model, device="cpu")
        gguf = embedded_gguf() if model is None else Path(model) if model.endswith(".gguf") else None
        job = Job(model, Path(folder), gguf, threads, max(counts))
        started, failed = _started(servers.split(","), job, loaded, tokenizer)
        del loaded
        try:
            found = list(measured(started, counts, tokens, rounds, tokenizer, patience))
            found += [_failed(name, count, reason) for name, reason in failed.items() for count in counts]
            rows = [{**row, **about} for row in found]
        finally:
            for server in started.values():
                server.close()
    write_rows(output, rows)
    for row in rows:
        click.echo({name: value for name, value in row.items() if name not in about})


def _started(
    names: Sequence[str], job: Job, model: Any, tokenizer: Any
) -> tuple[dict[str, ServerProcess], dict[str, str]]:
    """The servers that run, and why others do not."""
    started, failed = dict[str, ServerProcess](), dict[str, str]()
    if "transformers" in names:
        model.to(torch.bfloat16).save_pretrained(job.folder)
        tokenizer.save_pretrained(job.folder)
    for name in names:
        reason = KINDS[name].unavailable(job)
        try:
            if reason is None:
                started[name] = ServerProcess(name, job)
        except CoreskipError as error:
            reason = str(error)
        if reason is not None:
            failed[name] = reason
            click.echo(f"{name}: {reason}", err=True)
    return started, failed


def measured(
    servers: dict[str, ServerProcess],
    counts: Sequence[int],
    tokens: int,
    rounds: int,
    tokenizer: Any,
    patience: float,
) -> Iterator[Row]:
    """A row for each server and number of clients. Every prompt is another one, so that nothing is found in a cache. A
    server that keeps its clients waiting for longer than `patience` seconds is asked no more."""
    found: dict[tuple[str, int], list[list[Stream]]] = {(name, n): [] for name in servers for n in counts}
    same: dict[tuple[str, int], list[bool]] = {key: [] for key in found}
    slow = dict[str, str]()

    def answers(name: str, asked: Sequence[str]) -> list[Stream]:
        if name in slow:
            return []
        try:
            return asyncio.run(asyncio.wait_for(_streams(servers[name], asked, tokens), patience))
        except TimeoutError:
            slow[name] = f"{len(asked)} clients had no whole answers of {tokens} tokens in {patience:g} s"
            servers[name].close()  # it would go on beside the others
            return []

    for name in servers:
        answers(name, _asked("warm-up", 1))
    for turn in range(rounds):
        for count in counts:
            for name in servers:
                streams = answers(name, _asked(f"{turn}.{count}", count))
                if streams:
                    found[name, count].append(streams)
                for stream in streams[:_ALONE]:
                    same[name, count] += [alone.text == stream.text for alone in answers(name, [stream.prompt])]
    for (name, count), streams_by_round in found.items():
        if streams_by_round:
            yield _row(name, count, streams_by_round, same[name, count], tokens, tokenizer)
        else:
            yield _failed(name, count, slow[name])


def _failed(name: str, count: int, reason: str) -> Row:
    return {"kind": "serve", "server": name, "clients": count, "failed": reason, "notes": KINDS[name].notes}


def _row(name: str, count: int, rounds: list[list[Stream]], same: list[bool], tokens: int, tokenizer: Any) -> Row:
    """tok_s: of all streams together, from the first request to the last token: medians over rounds. inter_token_ms:
    the time between two pieces, for each of the tokens in the second."""

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    every = [stream for streams in rounds for stream in streams]
    later = [(max(1, length(piece)), seconds) for stream in every for piece, seconds in stream.pieces[1:]]
    speeds = [
        sum(length(s.text) for s in streams) / (max(s.end for s in streams) - min(s.begin for s in streams))
        for streams in rounds
    ]
    return {
        "kind": "serve",
        "server": name,
        "clients": count,
        "tokens": tokens,
        "rounds": len(rounds),
        "tok_s": round(median(speeds), 1),
        "ttft_ms": _quantiles([stream.pieces[0][1] for stream in every if stream.pieces]),
        "inter_token_ms": _quantiles([seconds / made for made, seconds in later for _ in range(made)]),
        "between_pieces_ms": _quantiles([seconds for _, seconds in later]),
        "answered_tokens": sum(length(stream.text) for stream in every),
        "errors": [stream.error for stream in every if stream.error is not None],
        "same_as_alone": f"{sum(same)} of {len(same)}",
        "notes": KINDS[name].notes,
    }


def _quantiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    found = torch.tensor(seconds).mul(1e3).quantile(torch.tensor([0.5, 0.95])).tolist()
    return {"p50": round(found[0], 2), "p95": round(found[1], 2)}


def _asked(mark: str, count: int) -> list[str]:
    texts = [prompt.text for prompt in prompts()]
    return [f"[{mark}.{index}] {texts[index % len(texts)]}" for index in range(count)]


async def _streams(server: ServerProcess, texts: Sequence[str], tokens: int) -> list[Stream]:
    """Of all prompts at once."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        return list(await asyncio.gather(*(_stream(client, server.model, text, tokens) for text in texts)))


async def _stream(client: httpx.AsyncClient, model: str, prompt: str, tokens: int) -> Stream:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    found = Stream(prompt, time.perf_counter())
    last = found.begin
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise ValueError(f"status {response.status_code}: {(await response.aread())[:200]!r}")
            async for line in response.aiter_lines():
                piece, now = _text(line), time.perf_counter()
                if piece:
                    found.pieces.append((piece, now - last))
                    last = now
    except (httpx.HTTPError, ValueError) as error:
        found.error = f"{type(error).__name__}: {error}"
    found.end = time.perf_counter()
    return found


def _text(line: str) -> str:
    """What a line of a stream of events adds to the text."""
    data = line.removeprefix("data:").strip()
    if not line.startswith("data:") or data == "[DONE]":
        return ""
    chunk = json.loads(data)
    if "error" in chunk:
        raise ValueError(str(chunk["error"]))
    return "".join(choice.get("text") or "" for choice in chunk.get("choices", ()))


if __name__ == "__main__":
    main()
