"""Several processes that generate at once on the same cores: each one's speed, against its speed alone.

``python -m coreskip.bench.sharing --rows bench/rows/sharing.jsonl``
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from coreskip.bench.clock import greedy
from coreskip.bench.provenance import provenance, write_rows
from coreskip.bench.workloads import prompts
from coreskip.predictors.plan import Plan
from coreskip.runtime.load import load
from coreskip.runtime.wrap import wrap

Row = dict[str, Any]
WEIGHTS = {"int4": "int4", "float32": None}  # of the dense plan


class Process:
    """A process of its own that generates when it is asked to."""

    def __init__(self, weights: str, threads: int) -> None:
        # what the process starts with is the machine's own, not this one's variables
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
        command = [sys.executable, "-m", "coreskip.bench.sharing", "--serve", weights, "--threads", str(threads)]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def ask(self, tokens: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{tokens}\n")

    def answer(self) -> float:
        """Tokens per second of what was asked for."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException("a process that should generate has ended")
        return float(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@click.command()
@click.option("--rows", "output", type=click.Path(path_type=Path), help="JSONL file to write.")
@click.option("--processes", default="1,2,4", show_default=True, help="How many at once, one after the other.")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1), help="Of each process.")
@click.option("--tokens", default=200, show_default=True, type=click.IntRange(8), help="Of each generation.")
@click.option("--rounds", default=6, show_default=True, type=click.IntRange(1))
@click.option("--serve", type=click.Choice(list(WEIGHTS)), hidden=True)
def main(output: Path | None, processes: str, threads: int, tokens: int, rounds: int, serve: str | None) -> None:
    """Measure the embedded model, dense, in int4 and in float32."""
    if serve:
        _serve(serve, threads)
        return
    if output is None:
        raise click.UsageError("Missing option '--rows'.")
    try:
        counts = sorted({1, *(int(count) for count in processes.split(","))})
    except ValueError:
        raise click.BadParameter("numbers, separated by commas", param_hint="--processes") from None
    command = (
        f"python -m coreskip.bench.sharing --rows bench/rows/{output.name} --processes {processes} "
        f"--threads {threads} --tokens {tokens} --rounds {rounds}"
    )
    about = {**provenance(command), "threads": threads, "cores": _cores(), "model": "embedded"}
    rows: list[Row] = []
    for weights in WEIGHTS:
        for row in measured(weights, counts, threads, tokens, rounds):
            rows.append({**row, **about})
            write_rows(output, rows)
            click.echo(row)


def measured(weights: str, counts: Sequence[int], threads: int, tokens: int, rounds: int) -> Iterator[Row]:
    """A row for each number of processes: every process's tokens per second over `rounds`, all numbers in turn.

    A fair share of the speed alone is the cores divided by all the processes' threads, at most 1.
    """
    started = list[Process]()
    try:
        for _ in range(max(counts)):
            started.append(Process(weights, threads))
        for process in started:
            process.answer()
        speeds: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(rounds):
            for count in counts:
                for process in started[:count]:
                    process.ask(tokens)
                speeds[count] += [process.answer() for process in started[:count]]
    finally:
        for process in started:
            process.close()
    alone = median(speeds[1])
    for count in counts:
        share = median(speeds[count]) / alone
        yield {
            "kind": "sharing",
            "dtype": weights,
            "processes": count,
            "tokens": tokens,
            "rounds": rounds,
            "tok_s": [round(speed, 1) for speed in (min(speeds[count]), median(speeds[count]), max(speeds[count]))],
            "of_alone": round(share, 3),
            "of_fair_share": round(share / min(1.0, _cores() / (count * threads)), 3),
        }


def _serve(weights: str, threads: int) -> None:
    """Answers every number of tokens on standard input with the speed of their generation, prompt included."""
    torch.set_num_threads(threads)
    model, tokenizer = load(device="cpu", dtype="float32")
    ids = tokenizer(prompts()[0].text, return_tensors="pt").input_ids
    with wrap(model, Plan.dense(model, WEIGHTS[weights])):
        _, first = greedy(model, ids, 8)  # packs, and proves the native step
        print(first.tok_s, flush=True)
        for line in sys.stdin:
            _, made = greedy(model, ids, int(line))
            print(len(made.tokens) / (made.ttft + sum(made.gaps)), flush=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
