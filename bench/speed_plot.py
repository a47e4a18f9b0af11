"""The rows of a run of `coreskip bench` as one picture: how fast each runner decodes, fastest first.

python -m coreskip.bench.speed_plot bench/rows/peers.jsonl -o bench/speed.svg
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from coreskip.bench.row_schema import Row, read
from coreskip.bench.svg import new_figure, svg_of
from coreskip.predictors.files import check_file, write_text

_COLOURS = {"others": "#9aa0a6", "coreskip, every neuron": "#1a73e8", "coreskip, neurons left out": "#e8710a"}


@click.command(help=__doc__)
@click.argument("rows", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="SVG file to write.")
def main(rows: Path, output: Path) -> None:
    check_file(output)
    write_text(output, draw(read([rows])))


def draw(rows: Sequence[Row]) -> str:
    """SVG: a bar for each row, its length the median decode speed, with a whisker from p20 to p80.

    Raises:
        CoreskipError: matplotlib is not installed.
    """
    ordered = sorted(rows, key=lambda row: row.tok_s["p50"])
    figure = new_figure((9, 0.6 + 0.27 * len(ordered)), "the plot is")
    axes = figure.subplots()
    for place, row in enumerate(ordered):
        speed = row.tok_s
        axes.barh(place, speed["p50"], height=0.72, color=_COLOURS[_kind(row)])
        axes.plot([speed["p20"], speed["p80"]], [place, place], color="#202124", linewidth=1)
        axes.annotate(f"{speed['p50']:.0f}", (speed["p80"], place), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(ordered)), [row.label for row in ordered])
    axes.set_ylim(-0.6, len(ordered) - 0.4)
    axes.set_xlabel("decode speed (tokens per second)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    for name, colour in _COLOURS.items():
        axes.barh(0, 0, color=colour, label=name)
    axes.legend(loc="lower right", frameon=False)
    return svg_of(figure, "speed")


def _kind(row: Row) -> str:
    if not row.runner.startswith("coreskip"):
        return "others"
    return "coreskip, every neuron" if row.keep == 1 else "coreskip, neurons left out"


if __name__ == "__main__":
    main()
