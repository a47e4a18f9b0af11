"""Figures as SVG that does not change from run to run, for the documents."""

from __future__ import annotations

from io import StringIO
from typing import Any

from coreskip.predictors.errors import CoreskipError


def new_figure(size: tuple[float, float], what: str) -> Any:
    """An empty matplotlib figure of `size` in inches.

    Raises:
        CoreskipError: matplotlib is not installed; it names `what` was to be drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise CoreskipError(f"{what} drawn with matplotlib: run `pip install 'coreskip[plots]'`") from None
    return Figure(figsize=size, layout="constrained")


def svg_of(figure: Any, salt: str) -> str:
    """The figure's SVG; `salt` makes its identifiers."""
    import matplotlib

    text = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()
