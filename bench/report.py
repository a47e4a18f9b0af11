"""Benchmark rows as one self-contained HTML page: plots drawn by matplotlib, inlined as SVG, and the table."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from typing import Any

from coreskip.bench.row_schema import Row
from coreskip.bench.tables import cells, origins
from coreskip.predictors.errors import CoreskipError

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
figure { display: inline-block; margin: 0 1rem 1.5rem 0; vertical-align: top; max-width: 36rem }
figure svg { max-width: 100%; height: auto } figcaption, p.origin { color: #555; font-size: 13px }
div.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px }
td, th { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
td:first-child, th:first-child, td:nth-child(2), th:nth-child(2) { text-align: left }
code { font-size: 12px; overflow-wrap: anywhere }
"""


def page(rows: Sequence[Row]) -> str:
    """The report, an HTML page that needs no other file and no network.

    Raises:
        CoreskipError: matplotlib is not installed.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.device), []).append(row)
    sections = "".join(_section(model, device, members) for (model, device), members in groups.items())
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>coreskip bench</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>coreskip bench</h1>\n{sections}</body></html>\n"
    )


def _section(model: str, device: str, rows: Sequence[Row]) -> str:
    figures = [
        _figure(
            _speed_and_quality(rows),
            "Up and to the right is better. Bars reach from p20 to p80. The line is the Pareto front: no runner is "
            "both faster and better than one on it. Runners without a measured perplexity are not shown.",
        ),
        _figure(
            _share_of_bandwidth(rows),
            "Bytes of weights read per second over the machine's measured read bandwidth, which decoding from "
            "memory cannot exceed; what is missing is time in which the memory waited.",
        ),
        _figure(
            _latency(rows),
            "Median time between a token and the next, by position. Packing the chosen neurons shows at the first one.",
        ),
    ]
    sources = "".join(f'<p class="origin">{_with_code(line)}</p>' for line in origins(rows))
    return f"<h2>{escape(model)} on {escape(device)}</h2>\n{''.join(figures)}\n{_table(rows)}\n{sources}\n"


def _with_code(line: str) -> str:
    text, _, command = line.partition("`")
    return f"{escape(text)}<code>{escape(command.rstrip('`'))}</code>"


def _table(rows: Sequence[Row]) -> str:
    kinds = ["th", *("td" for _ in rows)]
    lines = (
        "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in line) + "</tr>"
        for kind, line in zip(kinds, cells(rows), strict=True)
    )
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


# --- plots ------------------------------------------------------------------------------------------------------------


def _figure(figure: Any, caption: str) -> str:
    """The figure as inline SVG: text stays text, and ids differ from those of the page's other figures."""
    import matplotlib

    title = figure.axes[0].get_title()
    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title + caption}):
        figure.savefig(drawn, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = drawn.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}<figcaption>{escape(caption)}</figcaption></figure>\n"


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise CoreskipError("the report draws with matplotlib: run `pip install 'coreskip[plots]'`") from None
    figure = Figure(figsize=(6.4, 4.4))
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


_MARKS = {"hf": "s", "hf-compile": "D", "onnxruntime": "^", "llama.cpp": "v", "coreskip-dense": "o", "coreskip": "o"}


def _look(row: Row, number: int) -> dict[str, Any]:
    return {"color": f"C{number % 10}", "marker": _MARKS.get(row.runner, "o"), "label": row.label}


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _speed_and_quality(rows: Sequence[Row]) -> Any:
    figure, axes = _axes("Speed against quality", "decode speed (tokens per second)", "perplexity (lower is better)")
    scored = [(i, row) for i, row in enumerate(rows) if row.ppl is not None]
    for i, row in scored:
        speed = row.tok_s
        bar = [[speed["p50"] - speed["p20"]], [speed["p80"] - speed["p50"]]]
        axes.errorbar(speed["p50"], row.ppl, xerr=bar, linestyle="", markersize=7, **_look(row, i))
    front = pareto([(row.tok_s["p50"], row.ppl) for _, row in scored if row.ppl is not None])
    axes.plot(
        *zip(*front, strict=True) if front else ((), ()), color="0.6", linewidth=1, zorder=0, label="Pareto front"
    )
    axes.invert_yaxis()
    if not scored:
        _say(axes, "no perplexity in these rows")
    axes.set_xlim(left=0)
    _legend(axes)
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (speed, perplexity) pairs, those that no other beats in both, from the fastest to the slowest."""
    front: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (-point[0], point[1])):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _share_of_bandwidth(rows: Sequence[Row]) -> Any:
    figure, axes = _axes(
        "Share of the machine's bandwidth against keep",
        "share of MLP neurons read (percent)",
        "achieved share of read bandwidth (percent)",
    )
    for i, row in enumerate(rows):
        kept = 100 * (1 - row.neurons_skipped)
        axes.plot(kept, 100 * row.bandwidth_share, linestyle="", markersize=7, **_look(row, i))
    axes.axhline(100, color="0.6", linewidth=1)
    axes.set_xlim(0, 105)
    axes.set_ylim(bottom=0)
    _legend(axes)
    return figure


def _latency(rows: Sequence[Row]) -> Any:
    figure, axes = _axes("Latency per token", "position in the generated text (tokens)", "time to the next token (ms)")
    for i, row in enumerate(rows):
        gaps = row.latency_by_position_ms
        axes.plot(range(1, len(gaps) + 1), gaps, color=f"C{i % 10}", linewidth=1.2, label=row.label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    _legend(axes)
    return figure


def _say(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="0.4")
