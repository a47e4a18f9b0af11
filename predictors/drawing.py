"""A Plan as text: a table with one bar per layer, for the terminal and for logs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .checks import WIDTHS

# The types of what is drawn are in the module that draws by this one: a Plan, and a LayerPlan for each of its layers.
Plan = Any
LayerPlan = Any

_BAR = 30
_MEASURED = ("measures", "elsewhere")  # of the recipe, what has lines of its own


def plan_table(plan: Plan) -> str:
    """The plan's origin, cost and layers; one line per layer with its policy and the share of neurons kept."""
    model = plan.model
    lines = [
        f"plan for {model.model_type}: {len(plan.layers)} layers, hidden {model.hidden_size}, "
        f"activation {model.activation}",
        "recipe       " + _pairs({name: value for name, value in plan.recipe.items() if name not in _MEASURED}),
        "calibration  " + (_pairs(plan.calibration) or "none"),
        "quality      " + _quality(plan.quality),
        *(["elsewhere    " + _quality(plan.recipe["elsewhere"])] if "elsewhere" in plan.recipe else []),
        "keeps        " + ", ".join(_kept(plan)) + " at each decode step",
        "weights      " + (plan.weights or "as loaded") + _rounding(plan.rounding),
        "",
    ]
    policies = [_policy(layer) for layer in plan.layers]
    room = max(map(len, policies))
    counts = model.experts or (0,) * len(plan.layers)
    rows = [
        f"{policy:{room}} {_share(layer.kept(width), width)}{_of_experts(layer, count)}"
        for policy, layer, width, count in zip(policies, plan.layers, model.intermediate_sizes, counts, strict=True)
    ]
    lines.append(f"layers  {'neurons':{room}}   kept / all")
    lines += [f"{where:>6}  {row}" for where, row in _folded(rows)]
    lines += _measures(plan.recipe.get("measures"), len(plan.layers))
    return "\n".join([*lines, *_frontier(plan.frontier)])


def _kept(plan: Plan) -> list[str]:
    """How much of what the model has a step may compute."""
    neurons = [f"{plan.keep:.1%} of all MLP neurons"] if any(plan.model.intermediate_sizes) else []
    return neurons + ([f"{plan.experts:.1%} of all experts"] if plan.model.experts else [])


def _of_experts(layer: LayerPlan, count: int) -> str:
    """Which experts tokens may go to, and how many of a token's run."""
    if count == 0:
        return ""
    words = layer.experts.words
    return f"  {layer.experts.kept(count)} of {count} experts" + (f", {words}" if words else "")


def _rounding(recipe: Any) -> str:
    """How a plan's weights are rounded, by the names of their widths."""
    if recipe is None:
        return ""
    counts = [f"{recipe.count(width)} in {width}" for width in WIDTHS if recipe.count(width)]
    return f", rounded with {recipe.ids.numel()} tokens of {recipe.text['source']}: {', '.join(counts)}"


def _folded(rows: list[str]) -> list[tuple[str, str]]:
    """Equal rows in a row as one, with the layers that they are of: ``0-29``, or ``3`` for one alone."""
    found: list[tuple[str, str]] = []
    start = 0
    for index, row in enumerate(rows):
        if index + 1 == len(rows) or rows[index + 1] != row:
            found.append((str(start) if start == index else f"{start}-{index}", row))
            start = index + 1
    return found


def plan_document(plan: Plan) -> dict[str, Any]:
    """What `plan_table` shows, as JSON holds it: what is a tensor is left out."""
    model = plan.model
    layers = [
        {
            "layer": index,
            "neurons": {"policy": layer.neurons.name, **_plain(layer.neurons)},
            "kept": layer.kept(width),
            "of": width,
            "runs": {"policy": layer.layer.name, **_plain(layer.layer)},
            **_document_of_experts(layer, model.experts[index] if model.experts else 0),
            **_document_of_intervention(layer),
        }
        for index, (layer, width) in enumerate(zip(plan.layers, model.intermediate_sizes, strict=True))
    ]
    return {
        "model": _plain(model),
        "recipe": dict(plan.recipe),
        "calibration": dict(plan.calibration),
        "quality": None if plan.quality is None else dict(plan.quality),
        "keep": plan.keep,
        "weights": plan.weights,
        "rounding": None if plan.rounding is None else {**_plain(plan.rounding), "tokens": plan.rounding.ids.numel()},
        "layers": layers,
        "frontier": [dict(row) for row in plan.frontier],
    }


def _document_of_experts(layer: LayerPlan, count: int) -> dict[str, Any]:
    if count == 0:
        return {}
    policy = layer.experts
    chosen = {"policy": policy.name, **_plain(policy), "kept": policy.kept(count), "of": count, "active": policy.active}
    indices = getattr(policy, "indices", None)
    return {"experts": chosen if indices is None else {**chosen, "indices": indices.tolist()}}


def _document_of_intervention(layer: LayerPlan) -> dict[str, Any]:
    found = layer.intervention
    return {"intervention": {"policy": found.name, **_plain(found)}} if found.words else {}


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass's fields that are words, numbers or mappings and sequences of them."""
    found = {each.name: getattr(value, each.name) for each in fields(value)}
    return {name: dict(v) if isinstance(v, Mapping) else v for name, v in found.items() if _is_plain(v)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return (
        value is None
        or isinstance(value, (bool, int, float, str))
        or (isinstance(value, (list, tuple)) and all(map(_is_plain, value)))
    )


def _measures(measures: Any, depth: int) -> list[str]:
    """What was measured of whole layers: block influence, and the share of tokens for which LAC finds each void."""
    names = ("influence", "void_prompt", "void_response")
    if not isinstance(measures, dict) or any(len(measures.get(name, ())) != depth for name in names):
        return []
    influence, *shares = (measures[name] for name in names)
    means = [f"{sum(values) / depth:.1%}" for values in shares]
    lines = ["", f"void layers (LAC, alpha 0.8): {means[0]} in prompts, {means[1]} in responses"]
    lines.append("layers  influence  void in prompts                         void in responses")
    rows = [
        f"{influence[index]:9.3f}  "
        + "  ".join(f"{'█' * round(_BAR * v[index]):·<{_BAR}} {v[index]:6.1%}" for v in shares)
        for index in range(depth)
    ]
    return lines + [f"{where:>6}  {row}" for where, row in _folded(rows)]


def _frontier(rows: Any) -> list[str]:
    """What the search found, fewest bytes first."""
    if not rows:
        return []
    room = max(len(row["name"]) for row in rows)
    lines = ["", f"found  {'':{room}}   keep  MB/token   ms  skipped     ppl      KL"]
    return lines + [
        f"       {row['name']:{room}}  {row['keep']:5.2f}  {row['megabytes']:8.1f} {row['milliseconds']:5.2f} "
        f"{row['neuron_sparsity']:8.1%} {row['ppl_increase']:+7.2%} {row['kl']:7.4f}{_estimated(row)}"
        for row in rows
    ]


def _share(kept: int, width: int) -> str:
    if width == 0:
        return f"{'no MLP':>15} {'':{_BAR}} {'':6}"
    bar = "█" * round(_BAR * kept / width)
    return f"{kept:6} / {width:<6} {bar:·<{_BAR}} {kept / width:6.1%}"


def _policy(layer: LayerPlan) -> str:
    policy: Any = layer.neurons
    names = ["alpha", "beta", "score", "rule", "bits", "rank"]
    if getattr(policy, "score", None) == "griffin":
        names.remove("alpha")  # that score has none
    details = [f"{name}={getattr(policy, name)}" for name in names if hasattr(policy, name)]
    if hasattr(policy, "clusters"):
        details.append(f"clusters={policy.clusters.shape[0]}")
    if getattr(policy, "threshold", None) is not None:
        details.append(f"threshold={policy.threshold:.3g}")
    if getattr(policy, "refine", None) is not None:
        details.append(f"refine={policy.refine:.3g} of {policy.candidates:.0%}")
    details += [f"with {name}" for name in ("norm", "smooth", "mean") if getattr(policy, name, None) is not None]
    if layer.layer.name != "run":
        details.append("+ " + " ".join([layer.layer.name, *(f"{k}={v}" for k, v in vars(layer.layer).items())]))
    if layer.intervention.words:
        details.append(f"+ {layer.intervention.name} ({layer.intervention.words})")
    return " ".join([policy.name, *details])


def _quality(quality: Any) -> str:
    if quality is None:
        return "not measured"
    return (
        f"ppl {quality['dense']['ppl']:.2f} dense, {quality['sparse']['ppl']:.2f} sparse "
        f"({quality['ppl_increase']:+.1%}), KL {quality['kl']:.3f}, top-1 agreement {quality['top1_agreement']:.1%}, "
        f"{quality['tokens']} tokens of {quality.get('text', 'unnamed text')}{_estimated(quality)}"
    )


def _estimated(figures: Any) -> str:
    """Marks figures of masks over whole passes, which rounding sets apart from decoding."""
    return " (estimated)" if figures.get("estimated") else ""


def _pairs(values: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
