"""The rows of `coreskip.bench.method_quality` as one picture: what each method costs, by the speed it decodes at.

python -m coreskip.bench.method_plot bench/rows/core_neurons.jsonl bench/rows/token_choice.jsonl -o bench/quality.svg
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from coreskip.bench.svg import new_figure, svg_of
from coreskip.predictors.files import check_file, read_text, write_text


@click.command()
@click.argument("rows", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="SVG file to write.")
def main(rows: tuple[Path, ...], output: Path) -> None:
    """Draw the rows of these files."""
    check_file(output)
    lines = [line for path in rows for line in read_text(path, "the rows").splitlines()]
    write_text(output, draw([json.loads(line) for line in lines]))


def draw(rows: Sequence[dict[str, Any]]) -> str:
    """SVG: left, increase of perplexity over neurons left out; right, over decode speed where it was timed.

    Raises:
        CoreskipError: matplotlib is not installed.
    """
    figure = new_figure((11, 5.4), "the plot is")
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(row["name"] for row in rows))
    for number, name in enumerate(names):
        mine = sorted((row for row in rows if row["name"] == name), key=lambda row: row["neuron_sparsity"])
        look = {"color": f"C{number % 10}", "marker": "osD^vP*X"[number // 10 % 8], "linewidth": 0.8, "markersize": 5}
        _curve(left, mine, [100 * row["neuron_sparsity"] for row in mine], look, name)
        timed = [row for row in mine if "tok_s" in row]
        _curve(right, timed, [row["tok_s"]["p50"] for row in timed], look, None)
    for axes, label in ((left, "MLP neurons skipped (percent)"), (right, "decode speed (tokens per second)")):
        axes.set_yscale("symlog", linthresh=1.0)
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter("{x:g}")
    left.set_ylabel("increase of perplexity (percent)")
    figure.legend(fontsize=7, frameon=False, loc="outside lower center", ncols=3)
    return svg_of(figure, "quality")


def _curve(
    axes: Any, rows: Sequence[dict[str, Any]], x: Sequence[float], look: dict[str, Any], name: str | None
) -> None:
    increase = [100 * row["ppl_increase"] for row in rows]
    errors = [100 * (row["ppl_increase_stderr"] or 0) for row in rows]
    axes.errorbar(x, increase, yerr=errors, elinewidth=0.6, label=name, **look)


if __name__ == "__main__":
    main()
