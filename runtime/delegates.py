"""Models whose ``generate`` is that of a model inside them: PEFT's, TRL's with a value head, a user's own.

What tells a prompt from decoding, and what drafts in exact mode, sits in methods of the model that generates: that one
is wrapped. The outer model stands for it: `wrap` and `unwrap` take either.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers.generation.utils import GenerationMixin

from ..predictors.errors import CoreskipError


def generator_of(model: nn.Module) -> nn.Module:
    """The model that runs when `model` generates: itself, or the only one inside that can."""
    if isinstance(model, GenerationMixin) or not hasattr(model, "generate"):
        return model
    inside = _inside(model)
    return inside[0] if len(inside) == 1 else model


def check_generates(model: nn.Module) -> None:
    """
    Raises:
        CoreskipError: it cannot be told which model runs when `model` generates.
    """
    if isinstance(model, GenerationMixin):
        method = getattr(cast(Any, model).generate, "__func__", None)
        inside = [] if method is GenerationMixin.generate else _inside(model)
    else:
        inside = _inside(model) if hasattr(model, "generate") else []
        inside = inside if len(inside) > 1 else []
    if inside:
        names = " or ".join(dict.fromkeys(type(found).__name__ for found in inside))
        raise CoreskipError(
            f"the generate of {type(model).__name__} may be that of a model inside it: wrap the {names} that it holds"
        )


def _inside(model: nn.Module) -> list[nn.Module]:
    """The outermost models inside that generate."""
    found: list[nn.Module] = []
    for child in model.children():
        generates = isinstance(child, GenerationMixin) and cast(Any, child).can_generate()
        found += [child] if generates else _inside(child)
    return list(dict.fromkeys(found))
