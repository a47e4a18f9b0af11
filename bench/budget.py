"""What the budget search finds, against the best plan of each single method within the same budget.

    python -m coreskip.bench.budget TEXT --rows bench/rows/budget.jsonl --plans FOLDER
    python -m coreskip.bench.quality_speed bench/rows/budget.jsonl --plans FOLDER

The first half of TEXT is all that the searches see; the rows' figures are of its second half, token by token.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from coreskip.bench.quality import plan_name, provenance, undo_wikitext, write_rows
from coreskip.bench.rows import quality_table
from coreskip.predictors.calibration import read_text, tokenize
from coreskip.runtime.cost import bytes_per_token
from coreskip.runtime.emulation import Emulation
from coreskip.runtime.load import load
from coreskip.runtime.search import search
from coreskip.runtime.tune import Budget, Study

BUDGETS = ("ppl+0.5%", "ppl+1%", "ppl+2%", "ppl+5%")
METHODS = ("auto", "sketch", "threshold", "static")


@click.command()
@click.argument("text", type=click.Path(path_type=Path))
@click.option("--rows", "output", required=True, type=click.Path(path_type=Path), help="JSONL file to write.")
@click.option("--plans", "folder", required=True, type=click.Path(path_type=Path), help="Folder for the plans found.")
@click.option("--journal", type=click.Path(path_type=Path), help="Keep the searches' measurements in this file.")
@click.option("--method", "methods", multiple=True, help=f"By default {', '.join(METHODS)}.")
@click.option("--windows", default=24, show_default=True, help="Windows of 512 tokens to score the plans found on.")
@click.option("--fast", is_flag=True, help="As analyze's.")
def main(
    text: Path, output: Path, folder: Path, journal: Path | None, methods: tuple[str, ...], windows: int, fast: bool
) -> None:
    """Search for every budget and method with the embedded model in fp32, and score what is found."""
    command = f"python -m coreskip.bench.budget {text.name} --rows {output.name} --windows {windows}"
    command += " --fast" * fast + "".join(f" --method {method}" for method in methods)
    about = provenance(command)  # before the work: the commit may move on meanwhile
    model, tokenizer = load(device="cpu", dtype="float32")
    seen, unseen = tokenize(tokenizer, undo_wikitext(read_text(text)), text.name).split(0.5, 0.5)
    study = Study(model, tokenizer, text=seen, fast=fast)
    scored = Emulation(model, unseen, windows=windows)
    rows: list[dict[str, Any]] = []
    for budget in BUDGETS:
        for method in methods or METHODS:
            start = time.perf_counter()
            plan = search(study, Budget.parse(budget), method, journal=journal)
            row = {"name": f"{budget}, {method}", "model": "SmolLM2-135M-Instruct", "dtype": "float32", "keep": 1.0}
            row |= {**plan.recipe, "weights": plan.weights, "search_s": round(time.perf_counter() - start, 1)}
            row["searched"] = plan.quality
            row |= {
                **scored.score(plan, token_by_token=True),
                "megabytes": round(bytes_per_token(model, plan) / 1e6, 2),
            }
            plan.save(folder / plan_name(len(rows)))
            rows.append({**row, **about})
            write_rows(output, rows)
    click.echo(quality_table(rows))


if __name__ == "__main__":
    main()
