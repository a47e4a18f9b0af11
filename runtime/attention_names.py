"""What attention modules say of themselves, by attributes that many share."""

from __future__ import annotations

from typing import Any

from torch import nn

from .calls import NotCovered
from .spec import LinearSpec, RotarySpec, is_plain_linear

_SCALES = ("scaling", "scale", "inv_norm_factor", "softmax_scale")
_DIVISORS = ("norm_factor", "scale_attn")


def linear(module: Any, rows: tuple[int, ...] | None = None) -> LinearSpec:
    """A projection, which holds several where there are `rows`.

    Raises:
        NotCovered: it does more than its matrix and bias say.
    """
    if not isinstance(module, nn.Module) or not is_plain_linear(module):
        raise NotCovered(f"a projection is a {type(module).__name__}")
    return LinearSpec(module, rows)


def kind_of_rotation(attention: Any, index: int, rotary: RotarySpec | None) -> str | None:
    """Of the rotary tables, those that the attention of layer `index` uses; "" where it turns nothing."""
    if rotary is None or not getattr(attention, "use_rope", True):
        return ""
    if rotary.by_type:
        kind: str = getattr(attention, "layer_type", None) or attention.config.layer_types[index]
        return kind
    return None


def told_scales(attention: Any) -> list[float]:
    """What scores may be multiplied by."""
    told = [getattr(attention, name, None) for name in _SCALES]
    told += [1 / float(getattr(attention, name)) for name in _DIVISORS if getattr(attention, name, None)]
    return [float(scale) for scale in told if isinstance(scale, (int, float))]
