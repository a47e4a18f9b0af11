"""How long prompts of several lengths take to their first token, in coreskip and in every installed peer.

    python -m coreskip.bench.first_token --rows bench/rows/first_token.jsonl

For each length, prompts of just so many tokens of the embedded model's tokenizer, from Python's language reference: the
protocol of `coreskip bench`, whose rows these are.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from coreskip.bench.row_schema import Row, write
from coreskip.bench.runners import OPPONENTS
from coreskip.bench.settings import scored_text, settings_of
from coreskip.bench.throughput import run
from coreskip.predictors.files import check_file
from coreskip.runtime.load import load

LENGTHS = (72, 512, 2048)
_PROMPTS = 3  # of each length


@click.command(help=__doc__)
@click.option("--rows", "output", required=True, type=click.Path(path_type=Path), help="JSONL file to write.")
@click.option("--against", default="hf,onnxruntime,openvino", show_default=True, help="As for `coreskip bench`.")
@click.option("--lengths", default=",".join(map(str, LENGTHS)), show_default=True, help="Tokens of the prompts.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="How often each prompt is timed.")
def main(output: Path, against: str, lengths: str, rounds: int) -> None:
    check_file(output)
    _, tokenizer = load(device="cpu")
    ids = tokenizer(scored_text(None)[0], verbose=False)["input_ids"]
    command = shlex.join(["python", "-m", "coreskip.bench.first_token", *sys.argv[1:]])
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        for length in map(int, lengths.split(",")):
            file = Path(place) / f"{length}.txt"
            file.write_text("\n---\n".join(_prompts(tokenizer, ids, length)), encoding="utf-8")
            asked = settings_of(model=None, against=against, tokens=16, rounds=rounds, windows=0, prompt_file=file)
            jobs = [job for job in asked.jobs if job.runner in (*OPPONENTS, "coreskip-dense")]
            rows += [replace(row, command=command) for row in run(replace(asked, jobs=jobs)).rows]
            write(output, rows)  # after each length: the longest takes minutes
    for row in rows:
        click.echo(f"{row.prompt_tokens} tokens, {row.runner} {row.dtype}: {row.ttft_ms['p50']:.0f} ms")


def _prompts(tokenizer: Any, ids: list[int], length: int) -> list[str]:
    """Texts of so many tokens, once they are tokenized again."""
    found: list[str] = []
    at = 0
    while len(found) < _PROMPTS:
        text = tokenizer.decode(ids[at : at + length]).strip("\n")
        at += length
        if len(tokenizer(text)["input_ids"]) == length and "---" not in text:
            found.append(text)
    return found


if __name__ == "__main__":
    main()
