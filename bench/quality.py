"""What the core-neuron methods cost on a text: one row per method and keep, for the README's table.

    python -m coreskip.bench.quality TEXT --rows bench/rows/core_neurons.jsonl

The first half of TEXT calibrates, the second half is scored (DESIGN: windows of 512 tokens, 256 of them scored).
"""

from __future__ import annotations

import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import torch
import transformers

from coreskip.bench.rows import commit, device_name, quality_table, replace_text
from coreskip.predictors.calibration import TokenText, read_text, tokenize
from coreskip.predictors.plan import Plan
from coreskip.predictors.version import VERSION
from coreskip.runtime.load import load
from coreskip.runtime.quality import evaluate_all
from coreskip.runtime.tune import Workshop

# (how the table names it, method, options)
METHODS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("CoreInfer, stability-guided (signed, α 0.4)", "core", {"score": "signed", "alpha": 0.4}),
    ("the same, α 0.2 (the authors' code)", "core", {"score": "signed", "alpha": 0.2}),
    ("the same, α 0.4, layers 4 to last (the paper)", "core", {"score": "signed", "alpha": 0.4, "first_layer": 4}),
    ("CoreInfer, similarity-guided (signed, α 0.4)", "similar", {"score": "signed", "alpha": 0.4}),
    ("stability-guided, magnitude", "core", {"score": "magnitude", "alpha": 0.4}),
    ("stability-guided, magnitude × ‖down column‖", "core", {"score": "magnitude_down", "alpha": 0.4}),
    ("GRIFFIN (stability-guided, its score)", "core", {"score": "griffin"}),
    ("static, GRIFFIN's score", "static", {"score": "griffin"}),
    ("static, magnitude × ‖down column‖", "static", {"score": "magnitude_down", "alpha": 0.4}),
)
KEEPS = (0.7, 0.5)


def candidates(model: Any, calibration: TokenText, tokens: int) -> list[tuple[str, Plan]]:
    """Every method at every keep, made from the calibration text alone."""
    plans = []
    for name, method, options in METHODS:
        workshop = Workshop(model, calibration, max_tokens=tokens, **options)
        plans += [(name, workshop.make(method, keep)) for keep in KEEPS]
    return plans


def provenance(command: str) -> dict[str, Any]:
    """Where a row comes from: versions, machine, commit, time, and the command that makes it again."""
    return {
        "versions": {
            "coreskip": VERSION,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


def undo_wikitext(text: str) -> str:
    """WikiText writes `1 @,@ 000` for `1,000`."""
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    return text


@click.command()
@click.argument("text", type=click.Path(path_type=Path))
@click.option("--rows", "output", required=True, type=click.Path(path_type=Path), help="JSONL file to write.")
@click.option("--windows", default=24, show_default=True, help="Windows of 512 tokens to score.")
@click.option("--tokens", default=16384, show_default=True, help="Calibration tokens.")
def main(text: Path, output: Path, windows: int, tokens: int) -> None:
    """Score every core-neuron method on TEXT with the embedded model in fp32."""
    command = f"python -m coreskip.bench.quality {text.name} --rows {output.name} --windows {windows} --tokens {tokens}"
    output.parent.mkdir(parents=True, exist_ok=True)
    about = provenance(command)  # before the work: the commit may move on meanwhile
    model, tokenizer = load(device="cpu", dtype="float32")
    calibration, scored = tokenize(tokenizer, undo_wikitext(read_text(text)), text.name).split(0.5, 0.5)
    plans = candidates(model, calibration, tokens)
    qualities = evaluate_all(model, [plan for _, plan in plans], scored, windows=windows)
    rows = [
        {"name": name, "model": "SmolLM2-135M-Instruct", "dtype": "float32", **plan.recipe, **quality}
        for (name, plan), quality in zip(plans, qualities, strict=True)
    ]
    replace_text(output, "".join(json.dumps({**row, **about}, ensure_ascii=False) + "\n" for row in rows))
    click.echo(quality_table([{**row, **about} for row in rows]))


if __name__ == "__main__":
    main()
