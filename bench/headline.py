"""The speeds of the README's table: six ways of running the embedded model, in one interleaved run.

    python -m coreskip.bench.headline TEXT --plan FOLDER --rows bench/rows/headline.jsonl

What the same plans cost in perplexity is in the rows of `coreskip.bench.method_quality`; `tables.headline_table` puts
both together. The machine should be left alone meanwhile.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from coreskip.bench import row_schema, tables, throughput
from coreskip.bench.method_quality import undo_wikitext
from coreskip.bench.runner import Job
from coreskip.bench.settings import Settings
from coreskip.bench.workloads import prompts, threads_available
from coreskip.predictors.calibration import read_text, text_of
from coreskip.predictors.errors import CoreskipError
from coreskip.predictors.files import check_file
from coreskip.runtime.load import load
from coreskip.runtime.tune import analyze

KEEP_BY_TOKEN = 0.6  # of a sketch, which chooses anew at every token
KEEP_BY_PROMPT = 0.7  # of core neurons, which stay for a text
CALIBRATION = 4096  # tokens, a quarter of what a plan for use is made from: its speed does not depend on it


def jobs(sketch: Path) -> list[Job]:
    """The six, each with all the threads that there are."""
    common: dict[str, Any] = {"threads": threads_available()}
    return [
        Job("hf", "float32", **common),
        Job("hf", "bfloat16", **common),
        Job("coreskip-dense", "float32", **common),
        Job("coreskip-dense", "int4", **common),
        Job("coreskip", "int4", plan=sketch, **common),
        Job("coreskip", "int4", plan=KEEP_BY_PROMPT, **common),
    ]


def save_sketch(text: Path, folder: Path) -> None:
    """Write the plan that leaves neurons out token by token, calibrated on the first half of `text`."""
    content = undo_wikitext(read_text(text))
    model, tokenizer = load(device="cpu", dtype="float32")
    calibration = replace(text_of(tokenizer, content[: len(content) // 2]), source=text.name)
    options: dict[str, Any] = {"method": "sketch", "keep": KEEP_BY_TOKEN, "tokens": CALIBRATION, "windows": 2}
    replace(analyze(model, tokenizer, text=calibration, **options), weights="int4").save(folder)


@click.command(help=__doc__)
@click.argument("text", type=click.Path(path_type=Path))
@click.option("--rows", "output", required=True, type=click.Path(path_type=Path), help="JSONL file to write.")
@click.option(
    "--plan", "folder", required=True, type=click.Path(path_type=Path), help="Of the sketch: made if it is not there."
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="How often each prompt is timed.")
@click.option("--tokens", type=click.IntRange(16), default=64, show_default=True, help="Generated each time.")
def main(text: Path, output: Path, folder: Path, rounds: int, tokens: int) -> None:
    check_file(output)
    if not folder.exists():
        save_sketch(text, folder)
    words = ["python", "-m", "coreskip.bench.headline", text.name, "--plan", folder.name]
    words += ["--rows", f"bench/rows/{output.name}", "--rounds", str(rounds), "--tokens", str(tokens)]
    asked = Settings(
        jobs=jobs(folder), prompts=prompts(), rounds=rounds, tokens=tokens, windows=0, command=shlex.join(words)
    )
    outcome = throughput.run(asked)
    for name, reason in outcome.left_out.items():
        click.echo(f"{name}: {reason}", err=True)
    if not outcome.rows:
        raise CoreskipError("nothing was measured")
    row_schema.write(output, outcome.rows)
    click.echo(tables.terminal_table(outcome.rows))


if __name__ == "__main__":
    main()
