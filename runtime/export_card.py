"""The card of an exported model: what was left out, what that cost, and the command that does it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..predictors.plan import Plan
from ..predictors.version import VERSION
from .export_weights import Smaller
from .quality import summary

CARD = "README.md"
_PREFILL = (
    "Under coreskip a plan leaves prompts dense and acts on the tokens that follow. Here the neurons and layers are "
    "gone, so prompts go through the smaller model, too: expect a little more loss than measured."
)


def card(
    plan: Plan,
    found: Smaller,
    *,
    name: str,
    rounding: str | None,
    to: str,
    weights: str,
    usage: str,
    notes: Sequence[str],
    command: str,
) -> str:
    """The text, in Markdown.

    name: of the whole model; rounding: of its weights, before the export; usage: how the folder is loaded; notes: what
    is said besides.
    """
    config = found.model.config.get_text_config()
    layers, whole = len(found.layers), len(plan.layers)
    facts = [
        ("made from", f"{name} ({config.model_type})"),
        ("its weights", rounding or ""),
        ("plan", _method(plan)),
        ("layers", f"{layers} of {whole}" if layers < whole else f"all {whole}"),
        ("halves that add nothing", _halves(found)),
        ("neurons kept", f"{plan.keep:.1%}"),
        *([("experts kept", f"{plan.experts:.1%}")] if plan.model.experts else []),
        ("format", f"{to}, {weights}"),
        ("made by", f"coreskip {VERSION}: `{command}`"),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in facts if value)
    parts = [
        f"---\npipeline_tag: text-generation\ntags:\n- coreskip\n---\n\n# {name}, made smaller by coreskip",
        f"| | |\n| --- | --- |\n{table}",
        f"```\n{usage}\n```",
        *notes,
        *_quality(plan, smaller=layers < whole or plan.keep < 1 or plan.experts < 1),
    ]
    if plan.recipe:
        parts.append(f"The plan's recipe:\n\n```json\n{json.dumps(dict(plan.recipe), indent=1, default=str)}\n```")
    return "\n\n".join(parts) + "\n"


def name_of(model: Any) -> str:
    """What people call a model: its id, or the last part of its path."""
    given = str(getattr(model.config, "_name_or_path", "") or "")
    return (Path(given).name if Path(given).is_absolute() else given) or type(model).__name__


def _method(plan: Plan) -> str:
    text = plan.calibration.get("source")
    method = str(plan.recipe.get("method", "no method"))
    return method if not text else f"{method}, calibrated on {text}"


def _halves(found: Smaller) -> str:
    silent = [f"attention of {left.index}" for left in found.layers if not left.attention]
    silent += [f"MLP of {left.index}" for left in found.layers if not left.mlp]
    return ", ".join(silent)


def _quality(plan: Plan, smaller: bool) -> list[str]:
    found = [_PREFILL] if smaller else []
    if plan.quality is not None:
        measured = summary(dict(plan.quality))
        found.append(f"Measured on the whole model under this plan, before the export:\n\n```\n{measured}\n```")
    elif smaller:
        found.append("What it costs was not measured: `coreskip eval --plan PLAN` does.")
    return found
