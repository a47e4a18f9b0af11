"""Several greedy texts at once through one engine's scheduler: tokens a second in all, and how even each one comes.

``python -m coreskip.bench.concurrency --rows bench/rows/concurrency.jsonl``
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click

from coreskip.bench.provenance import model_name, provenance, write_rows
from coreskip.bench.workloads import prompts
from coreskip.runtime.engine import Engine
from coreskip.runtime.load import load
from coreskip.runtime.sequence import Request

Row = dict[str, Any]


@dataclass(frozen=True)
class Stream:
    """One text: its tokens, when the first event and the last came (seconds after the first request), and seconds from
    each token to the next. Tokens that come together have the mean of their event."""

    tokens: list[int]
    first: float
    last: float
    gaps: list[float]


@click.command()
@click.option("--rows", "output", required=True, type=click.Path(path_type=Path), help="JSONL file to write.")
@click.option("--model", default=None, help="As for `coreskip generate`; by default the embedded one.")
@click.option("--weights", default="int4", show_default=True, help="Of the dense plan.")
@click.option("--streams", default="1,4,8,16", show_default=True, help="How many at once, in turn.")
@click.option("--tokens", default=128, type=click.IntRange(2), show_default=True, help="Of each stream.")
@click.option("--rounds", default=3, type=click.IntRange(1), show_default=True, help="Of all of these in turn.")
def main(output: Path, model: str | None, weights: str, streams: str, tokens: int, rounds: int) -> None:
    """Measure one model under numbers of concurrent streams."""
    counts = [int(count) for count in streams.split(",")]
    command = (
        f"python -m coreskip.bench.concurrency --rows bench/rows/{output.name} --weights {weights} "
        f"--streams {streams} --tokens {tokens} --rounds {rounds}"
    )
    about = provenance(command if model is None else f"{command} --model {model_name(model)}")
    rows: list[Row] = []
    for row in _measured(model, weights, counts, tokens, rounds):
        rows.append({"kind": "concurrency", "model": model_name(model), "weights": weights, **row, **about})
        click.echo(row)
    write_rows(output, rows)


def _measured(model: str | None, weights: str, counts: Sequence[int], tokens: int, rounds: int) -> Iterator[Row]:
    loaded, tokenizer = load(model, device="cpu") if model is not None else load(device="cpu")
    asked = different_prompts(tokenizer, max(counts))
    with Engine(loaded, tokenizer, weights=weights, max_batch=max(counts), prompt_bytes=0) as engine:
        alone = [streams_of(engine, [prompt], tokens)[1][0].tokens for prompt in asked]
        found: dict[int, list[tuple[float, list[Stream]]]] = {count: [] for count in counts}
        for _ in range(rounds):
            for count in counts:
                found[count].append(streams_of(engine, asked[:count], tokens))
    base = None
    for count, runs in found.items():
        row = _row(count, tokens, runs, alone, [len(prompt) for prompt in asked[:count]])
        base = row["tok_s"] if base is None else base
        yield {**row, "times_the_first": round(row["tok_s"] / base, 2)}


def different_prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Different ones, of lengths of their own."""
    found = []
    for i, prompt in zip(range(count), itertools.cycle(prompts()), strict=False):
        ids = tokenizer(prompt.text).input_ids
        found.append(ids[: max(8, len(ids) - 5 * (i // len(prompts())))])
    return found


def streams_of(engine: Engine, asked: Sequence[list[int]], tokens: int) -> tuple[float, list[Stream]]:
    """Seconds from the first request to the last token, and the streams."""

    start = time.perf_counter()

    async def read(prompt: list[int]) -> Stream:
        first, last, gaps, made = 0.0, start, list[float](), list[int]()
        async for event in engine.submit(Request(prompt, tokens, ignore_eos=True)):
            now = time.perf_counter()
            if not made:
                first = now - start
            elif event.tokens:
                gaps += [(now - last) / len(event.tokens)] * len(event.tokens)
            made += event.tokens
            last = now
        return Stream(made, first, last - start, gaps)

    async def together() -> list[Stream]:
        return await asyncio.gather(*map(read, asked))

    streams = asyncio.run(together())
    return time.perf_counter() - start, streams


def _row(
    count: int, tokens: int, runs: list[tuple[float, list[Stream]]], alone: list[list[int]], lengths: list[int]
) -> Row:
    streams = [stream for _, found in runs for stream in found]
    gaps = sorted(1e3 * gap for stream in streams for gap in stream.gaps)
    firsts = sorted(1e3 * stream.first for stream in streams)
    same = all(stream.tokens == alone[i] for _, found in runs for i, stream in enumerate(found))
    return {
        "streams": count,
        "tokens": tokens,
        "prompt_tokens": sum(lengths),
        "rounds": len(runs),
        "tok_s": round(count * tokens / median(seconds for seconds, _ in runs), 1),
        "decode_tok_s": round(median(_decoding(found) for _, found in runs), 1),
        "first_token_ms": {"p50": _quantile(firsts, 0.5), "p95": _quantile(firsts, 0.95)},
        "between_tokens_ms": {"p50": _quantile(gaps, 0.5), "p95": _quantile(gaps, 0.95)},
        "same_as_alone": same,
    }


def _decoding(streams: list[Stream]) -> float:
    """Tokens a second of all streams together while all of them decode; from the last first token on, where the first
    to end has ended before."""
    begin = max(stream.first for stream in streams)
    end = min(stream.last for stream in streams)
    end = end if end > begin else max(stream.last for stream in streams)
    made = 0
    for stream in streams:
        at = stream.first
        for gap in stream.gaps:
            at += gap
            made += begin < at <= end
    return made / (end - begin)


def _quantile(values: list[float], share: float) -> float:
    return round(values[min(len(values) - 1, int(share * len(values)))], 2)


if __name__ == "__main__":
    main()
