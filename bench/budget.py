"""What the budget search finds, against the best plan of each single method within the same budget.

    python -m coreskip.bench.budget TEXT --rows bench/rows/budget.jsonl --plans FOLDER
    python -m coreskip.bench.method_speed bench/rows/budget.jsonl --plans FOLDER

Matrices are read where they lie (CORESKIP_NARROW=0): what a search finds for a model whose numbers, unlike the embedded
one's, fit into no fewer bits. The first half of TEXT is all that the searches see; the rows' figures are of its second
half, token by token where the native step decodes. Rows are written as they come, and those that there are stay: what
was stopped goes on.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from coreskip.bench.machine import matrices_in_place
from coreskip.bench.method_quality import decoded_score, plan_name, undo_wikitext
from coreskip.bench.provenance import provenance, write_rows
from coreskip.bench.tables import quality_table
from coreskip.predictors.calibration import read_text, tokenize
from coreskip.predictors.errors import CoreskipError
from coreskip.predictors.files import check_file
from coreskip.predictors.files import read_text as read_rows
from coreskip.predictors.plan import Plan
from coreskip.runtime.calibrate import Study
from coreskip.runtime.cost import bytes_per_token
from coreskip.runtime.emulation import Emulation
from coreskip.runtime.load import load
from coreskip.runtime.options import Budget
from coreskip.runtime.search import Journal, search

BUDGETS = ("ppl+0.5%", "ppl+1%", "ppl+2%", "ppl+5%")
METHODS = ("auto", "sketch", "threshold", "static")


@click.command()
@click.argument("text", type=click.Path(path_type=Path))
@click.option("--rows", "output", required=True, type=click.Path(path_type=Path), help="JSONL file to write or go on.")
@click.option("--plans", "folder", required=True, type=click.Path(path_type=Path), help="Folder for the plans found.")
@click.option("--journal", type=click.Path(path_type=Path), help="Of all searches; measured.jsonl among the plans.")
@click.option("--method", "methods", multiple=True, help=f"By default {', '.join(METHODS)}.")
@click.option("--budget", "budgets", multiple=True, help=f"By default {', '.join(BUDGETS)}.")
@click.option("--windows", default=24, show_default=True, help="Windows of 512 tokens to score the plans found on.")
@click.option("--fast", is_flag=True, help="As analyze's.")
def main(
    text: Path,
    output: Path,
    folder: Path,
    journal: Path | None,
    methods: tuple[str, ...],
    budgets: tuple[str, ...],
    windows: int,
    fast: bool,
) -> None:
    """Search for every budget and method with the embedded model in fp32, and score what is found."""
    click.get_current_context().with_resource(matrices_in_place())
    command = f"python -m coreskip.bench.budget {text.name} --rows {output.name} --windows {windows}" + " --fast" * fast
    about = provenance(command)  # before the work: the commit may move on meanwhile
    check_file(output, regular=True)
    rows = _so_far(output, command)
    missing = [(b, m) for b in budgets or BUDGETS for m in methods or METHODS if _name(b, m) not in rows]
    folder.mkdir(parents=True, exist_ok=True)
    measured = Journal(journal or folder / "measured.jsonl")
    model, tokenizer = load(device="cpu", dtype="float32")
    seen, unseen = tokenize(tokenizer, undo_wikitext(read_text(text)), text.name).split(0.5, 0.5)
    study = Study(model, tokenizer, text=seen, fast=fast)
    scored = Scores(Emulation(model, unseen, windows=windows))
    for budget, method in missing:
        start = time.perf_counter()
        # plans found are scored on the model as it is, not packed
        plan = search(study, Budget.parse(budget), method, journal=measured, rounds=False)
        name = _name(budget, method)
        row = {"name": name, "model": "SmolLM2-135M-Instruct", "dtype": "float32", "keep": 1.0}
        # a search profits from what those before it measured and calibrated
        row |= {**plan.recipe, "weights": plan.weights, "search_s": round(time.perf_counter() - start, 1)}
        row |= {"searched": plan.quality, "frontier": len(plan.frontier), **scored.of(plan)}
        row["megabytes"] = round(bytes_per_token(model, plan) / 1e6, 2)
        plan.save(folder / plan_name(len(rows)))
        rows[name] = {**row, **about}
        write_rows(output, list(rows.values()))
    click.echo(quality_table(list(rows.values())))


def _name(budget: str, method: str) -> str:
    return f"{budget}, {method}"


def _so_far(output: Path, command: str) -> dict[str, dict[str, Any]]:
    """By name the rows that there are, in their order, which is that of the plans."""
    if not output.exists():
        return {}
    rows = [json.loads(line) for line in read_rows(output, "the rows").splitlines()]
    if any(row["command"] != command for row in rows):
        raise CoreskipError(f"{output} holds rows of another command than `{command}`: name another file")
    return {row["name"]: row for row in rows}


class Scores:
    """Figures of plans on one text, each scored once however many searches end with it."""

    def __init__(self, emulation: Emulation) -> None:
        self._emulation = emulation
        self._known: dict[str, dict[str, Any]] = {}

    def of(self, plan: Plan) -> dict[str, Any]:
        made = {name: value for name, value in plan.recipe.items() if name != "budget"}
        key = json.dumps([made, plan.weights], sort_keys=True)
        if key not in self._known:
            self._known[key] = decoded_score(self._emulation, plan)
        return self._known[key]


if __name__ == "__main__":
    main()
