"""The linears of a layer, as plans and native steps name them."""

from __future__ import annotations

import torch

from ..predictors.anatomy import Anatomy, FeedForward, shape_of
from ..predictors.errors import PlanError


def native_names(anatomy: Anatomy, layer: int) -> dict[str, dict[str, int]]:
    """What a native step calls a layer's linears, with their outputs, by the names that a plan has for them.

    One that is fused is several.
    """
    mlp, attention = anatomy.feed_forwards[layer], anatomy.attentions[layer]
    names = {} if mlp is None else _names_of_mlp(mlp)
    if attention is None or len(attention.inputs) not in (1, 3):
        return names
    outputs, queries = shape_of(attention.part(attention.output))
    names[f"attention.{attention.output}"] = {"o": outputs}
    sizes = [shape_of(attention.part(name))[0] for name in attention.inputs]
    if len(sizes) == 3:
        triples = zip(attention.inputs, "qkv", sizes, strict=True)
        return names | {f"attention.{name}": {part: size} for name, part, size in triples}
    others, rest = divmod(sizes[0] - queries, 2)
    if others > 0 and rest == 0:
        names[f"attention.{attention.inputs[0]}"] = {"q": queries, "k": others, "v": others}
    return names


def _names_of_mlp(mlp: FeedForward) -> dict[str, dict[str, int]]:
    width = mlp.intermediate_size
    names = {
        f"mlp.{mlp.up_name}": {"gate": width, "up": width} if mlp.stacked else {"up": width},
        f"mlp.{mlp.down_name}": {"down": mlp.hidden_size},
    }
    if mlp.gate_name is not None:
        names[f"mlp.{mlp.gate_name}"] = {"gate": width}
    return names


def linear_of(anatomy: Anatomy, layer: int, name: str) -> tuple[torch.nn.Module, bool]:
    """The linear of a layer that a plan calls `name`, and whether it belongs to the MLP.

    Raises:
        PlanError: the layer has no such linear.
    """
    mlp, attention = anatomy.feed_forwards[layer], anatomy.attentions[layer]
    owners = {
        "mlp": None if mlp is None else mlp.owner,
        "attention": None if attention is None else attention.module,
    }
    part, _, attribute = name.partition(".")
    owner = owners[part]
    module = None if owner is None else dict(owner.named_modules()).get(attribute)
    if module is None or not attribute:
        raise PlanError(f"layer {layer} has no linear {name}, for which the plan has a threshold")
    return module, part == "mlp"
