"""A Plan as text: a table with one bar per layer, for the terminal and for logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plan import LayerPlan, Plan

_BAR = 30


def plan_table(plan: Plan) -> str:
    """The plan's origin, cost and layers; one line per layer with its policy and the share of neurons kept."""
    model = plan.model
    lines = [
        f"plan for {model.model_type}: {len(plan.layers)} layers, hidden {model.hidden_size}, "
        f"activation {model.activation}",
        "recipe       " + _pairs(plan.recipe),
        "calibration  " + (_pairs(plan.calibration) or "none"),
        "quality      " + _quality(plan.quality),
        f"keeps        {plan.keep:.1%} of all MLP neurons at each decode step",
        "",
        "layer  neurons                                    kept",
    ]
    lines += [
        _layer_line(i, layer, width)
        for i, (layer, width) in enumerate(zip(plan.layers, model.intermediate_sizes, strict=True))
    ]
    return "\n".join(lines)


def _layer_line(index: int, layer: LayerPlan, width: int) -> str:
    kept = layer.neurons.kept(width)
    bar = "█" * round(_BAR * kept / width)
    return f"{index:5}  {_policy(layer):30} {kept:6} / {width:<6} {bar:·<{_BAR}} {kept / width:6.1%}"


def _policy(layer: LayerPlan) -> str:
    policy: Any = layer.neurons
    details = [f"{name}={getattr(policy, name)}" for name in ("alpha", "beta", "score") if hasattr(policy, name)]
    if hasattr(policy, "clusters"):
        details.append(f"clusters={policy.clusters.shape[0]}")
    return " ".join([policy.name, *details])


def _quality(quality: Any) -> str:
    if quality is None:
        return "not measured"
    return (
        f"ppl {quality['dense']['ppl']:.2f} dense, {quality['sparse']['ppl']:.2f} sparse "
        f"({quality['ppl_increase']:+.1%}), KL {quality['kl']:.3f}, top-1 agreement {quality['top1_agreement']:.1%}, "
        f"{quality['tokens']} tokens of {quality.get('text', 'unnamed text')}"
    )


def _pairs(values: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
