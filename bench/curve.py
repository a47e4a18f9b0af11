"""What leaving neurons out of 4-bit weights gives beyond all of them: speed and perplexity, each against dense int4.

    python -m coreskip.bench.curve quality TEXT --plans FOLDER --rows bench/rows/curve.jsonl
    python -m coreskip.bench.curve speed --plans FOLDER --rows bench/rows/curve.jsonl
    python -m coreskip.bench.curve draw bench/rows/curve.jsonl -o bench/curve.svg

The first half of TEXT calibrates, the second is scored, through the kernels. The second command may have the machine to
itself: it times all plans in turn, round after round, beside dense int4.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from coreskip.bench.leaving_out import measure
from coreskip.bench.method_quality import undo_wikitext
from coreskip.bench.provenance import provenance, write_rows
from coreskip.bench.svg import new_figure, svg_of
from coreskip.predictors.calibration import TokenText, read_text, tokenize
from coreskip.predictors.files import check_file, write_text
from coreskip.predictors.files import read_text as read_rows
from coreskip.predictors.plan import Plan
from coreskip.runtime.calibrate import Calibrator
from coreskip.runtime.cost import bytes_per_token
from coreskip.runtime.load import load
from coreskip.runtime.quality import evaluate_all

DENSE = "all neurons, 4 bits"
#: by the name in the figure: method, its options, shares to keep
CURVES: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "the same for all texts": ("static", {"score": "griffin"}, (0.98, 0.95, 0.9, 0.8, 0.7, 0.5)),
    "chosen by the prompt": ("core", {"score": "griffin"}, (0.95, 0.9, 0.7, 0.5)),
    "by the token: gates": ("topk", {"gated": True}, (0.7, 0.6, 0.5)),
    "by the token: planes": ("sketch", {}, (0.6, 0.5)),
    "by the token: exact scores": ("topk", {}, (0.6,)),
}


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.argument("text", type=click.Path(path_type=Path))
@click.option("--plans", "folder", required=True, type=click.Path(path_type=Path), help="Where the plans go.")
@click.option("--rows", "output", required=True, type=click.Path(path_type=Path), help="JSONL file to write.")
@click.option("--windows", default=12, show_default=True, help="Windows of 512 tokens to score.")
@click.option("--tokens", default=8192, show_default=True, help="Calibration tokens.")
def quality(text: Path, folder: Path, output: Path, windows: int, tokens: int) -> None:
    """Make the plans and score them."""
    check_file(output)
    options = f"--windows {windows} --tokens {tokens}"
    about = provenance(f"python -m coreskip.bench.curve quality {text.name} --rows {output.name} {options}")
    model, tokenizer = load(device="cpu", dtype="float32")
    calibration, scored = tokenize(tokenizer, undo_wikitext(read_text(text)), text.name).split(0.5, 0.5)
    made = [(DENSE, 1.0, Plan.dense(model, "int4")), *_plans(model, calibration, tokens)]
    found = evaluate_all(model, [plan for _, _, plan in made], scored, windows=windows)
    dense = found[0]["sparse"]["ppl"]
    rows = []
    for number, ((name, keep, plan), score) in enumerate(zip(made, found, strict=True)):
        plan.save(folder / f"{number}.plan")
        rows.append(
            {"kind": "curve", "model": "embedded", "name": name, "keep": keep, "left_out": score["neuron_sparsity"],
             "ppl_increase": score["sparse"]["ppl"] / dense - 1, "ppl_increase_stderr": score["ppl_increase_stderr"],
             "kl": score["kl"], "megabytes": round(bytes_per_token(model, plan) / 1e6, 1), "windows": windows, **about}
        )  # fmt: skip
        click.echo(f"{name:28} {keep:.2f} {100 * rows[-1]['ppl_increase']:+8.2f} %, {rows[-1]['megabytes']} MB")
    write_rows(output, rows)


def _plans(model: Any, calibration: TokenText, tokens: int) -> Iterator[tuple[str, float, Plan]]:
    calibrator = Calibrator(model, calibration, max_tokens=tokens, weights="int4")
    for name, (method, options, keeps) in CURVES.items():
        for keep in keeps:
            yield name, keep, replace(calibrator.make(method, keep, **options), weights="int4")


@main.command()
@click.option("--plans", "folder", required=True, type=click.Path(path_type=Path, exists=True), help="What was made.")
@click.option("--rows", "output", required=True, type=click.Path(path_type=Path, exists=True), help="Its rows.")
@click.option("--rounds", default=5, show_default=True)
def speed(folder: Path, output: Path, rounds: int) -> None:
    """Time the plans beside dense int4, and add that to their rows."""
    rows = _read(output)
    plans = {"dense" if row["name"] == DENSE else str(number): Plan.load(folder / f"{number}.plan")
             for number, row in enumerate(rows)}  # fmt: skip
    model, _ = load(device="cpu", dtype="float32")
    torch.manual_seed(0)
    found = measure(model, torch.randint(5, 40000, (1, 128)), "int4", rounds, plans)
    for row, timed in zip(rows, found, strict=True):
        row |= {key: timed[key] for key in ("tok_s", "of_dense", "of_dense_each", "of_dense_with_prompt")}
        click.echo(f"{row['name']:28} {row['keep']:.2f} {row['of_dense']:.3f} x {100 * row['ppl_increase']:+.2f} %")
    write_rows(output, rows)


@main.command()
@click.argument("rows", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="SVG file to write.")
def draw(rows: Path, output: Path) -> None:
    """Draw the rows."""
    check_file(output)
    write_text(output, drawn(_read(rows)))


def drawn(rows: Sequence[dict[str, Any]]) -> str:
    """SVG: increase of perplexity over speed, both against dense int4, a curve for each way of choosing.

    Raises:
        CoreskipError: matplotlib is not installed.
    """
    figure = new_figure((8, 4.2), "the plot is")
    axes = figure.subplots()
    timed = [row for row in rows if "of_dense" in row]
    for number, name in enumerate(dict.fromkeys(row["name"] for row in timed if row["name"] != DENSE)):
        mine = sorted((row for row in timed if row["name"] == name), key=lambda row: -row["keep"])
        increase = [100 * row["ppl_increase"] for row in mine]
        axes.plot([row["of_dense"] for row in mine], increase, "osD^v"[number % 5] + "-", label=name, linewidth=0.9,
                  markersize=5)  # fmt: skip
        for row, y in zip(mine, increase, strict=True):
            axes.annotate(f"{row['keep']:.0%}", (row["of_dense"], y), (4, 3), textcoords="offset points", fontsize=7)
    axes.plot([1], [0], "k*", markersize=13, label=f"{DENSE}: the point to beat", linestyle="none")
    axes.axvline(1, color="k", linewidth=0.5)
    axes.set_yscale("symlog", linthresh=1.0)
    axes.set_xlabel("decode speed, of all neurons in 4 bits")
    axes.set_ylabel("increase of perplexity (percent)")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return svg_of(figure, "curve")


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_rows(path, "the rows").splitlines()]


if __name__ == "__main__":
    main()
