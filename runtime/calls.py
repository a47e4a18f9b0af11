"""What of a call decode steps honour, and when a step's logits count as the model's own: for every lowering alike."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..kernels.ops import MAX_ROWS

# Arguments of a model's forward that decode steps honour. Others must be absent, None or False.
_HONOURED = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
_WITHOUT_EFFECT = {"return_dict", "cache_position", "next_sequence_length"}

# How far a step's logits may be from the modules' own, in standard deviations of the logits, for the description to
# count as right: a wrong rotation or norm is off by 0.1 to 1. Where a rule chooses neurons, rounding may change some,
# which moves a few logits further than the rest: there all of them count together.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
# In half precision even that tells little: the modules round what they compare with thresholds, and choose otherwise.
# On the embedded model TEAL's logits in bfloat16 differ by 0.2 to 0.9 (median 0.4). There the same description without
# its choices is compared.
_TOLERANCE_OF_RULES = 0.05
# Nor does the largest difference where several texts are tried: the modules' own rounding moves some logit of the
# embedded model in bfloat16 by 0.15 and more for most tokens, and all together by 0.03 to 0.1 (up to 0.5).
_TOLERANCE_OF_SEVERAL = {torch.bfloat16: 0.1, torch.float16: 0.05}


class NotCovered(Exception):
    """A model or a call that a lowering does not describe; the message says what it is."""


class NotThisCall(NotCovered):
    """Not covered in this call; another may be."""


class Disagrees(NotCovered):
    """A step's logits are not the model's own."""


def check_call(named: dict[str, Any], device: str, most: int = MAX_ROWS) -> None:
    """Raises NotCovered unless a decode step on a type of device can give all that a call of the model's forward with
    these arguments asks for, `most` tokens at most."""
    for name, value in named.items():
        if name not in _HONOURED and name not in _WITHOUT_EFFECT and value is not None and value is not False:
            raise NotCovered(f"{name} was given")
    if named.get("return_dict") is False or named.get("use_cache") is False:
        raise NotCovered("a tuple is wanted, or no cache")
    ids, keep = named.get("input_ids"), named.get("logits_to_keep", 0)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype != torch.int64 or ids.device.type != device:
        raise NotCovered(f"input_ids is not int64 [rows, length] on the {device.upper()}")
    if not 1 <= ids.numel() <= most:
        raise NotCovered(f"the step has {ids.numel()} tokens, not 1 to {most}")
    if not isinstance(keep, int) or keep > ids.shape[1]:
        raise NotCovered("logits_to_keep is not a number of last tokens")
    positions = named.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim > 2 and not _same_on_all_axes(positions):
        raise NotCovered("positions differ between the axes of a picture")
    if torch.is_autocast_enabled(device):
        raise NotCovered("autocast casts what modules compute with")
    if torch.is_grad_enabled():
        raise NotCovered("gradients are wanted: decode under torch.no_grad() or torch.inference_mode()")


def _same_on_all_axes(positions: Tensor) -> bool:
    """Whether positions [axes, rows, length], as vision-language models count them, are those of plain text."""
    return positions.ndim == 3 and bool((positions == positions[:1]).all())


def check_outputs(config: Any) -> None:
    """Raises NotThisCall where a model's configuration asks for what happens inside its layers."""
    settings = vars(config).get  # of which attributes take longer, at every step
    if settings("_output_attentions") or settings("output_attentions") or settings("output_hidden_states"):
        raise NotThisCall("attentions or hidden states are wanted")


def compare(logits: Tensor, expected: Tensor, by_rule: bool) -> None:
    """Raises Disagrees where a step's logits are too far from the modules' own. by_rule: whether it chose neurons or
    inputs."""
    error, tolerance = _largest(logits, expected), _TOLERANCE[logits.dtype]
    if by_rule:
        error, tolerance = _spread(logits, expected), max(tolerance, _TOLERANCE_OF_RULES)
    if not error <= tolerance:
        raise Disagrees(f"its logits differ from the model's own by {error:.2g} standard deviations")


def close(logits: Tensor, expected: Tensor, rounded: bool) -> bool:
    """Whether logits for tokens that are one try of several are the modules' own. rounded: whether both come from
    weights that inputs meet in 8 bits, whose rounding tells them apart."""
    if logits.dtype in _TOLERANCE_OF_SEVERAL:
        return _spread(logits, expected) <= _TOLERANCE_OF_SEVERAL[logits.dtype]
    if rounded:
        return _spread(logits, expected) <= _TOLERANCE_OF_RULES
    return _largest(logits, expected) <= _TOLERANCE[logits.dtype]


def _largest(logits: Tensor, expected: Tensor) -> float:
    """The largest difference, in standard deviations of what is expected."""
    return float((logits.float() - expected.float()).abs().max() / expected.float().std().clamp_min(1e-6))


def _spread(logits: Tensor, expected: Tensor) -> float:
    """The root mean square of the differences, in standard deviations of what is expected."""
    error = (logits.float() - expected.float()).square().mean().sqrt()
    return float(error / expected.float().std().clamp_min(1e-6))


def positions_of(named: dict[str, Any], past: int) -> Tensor:
    """int64 [rows, length]: the positions of a call's tokens behind `past` others. `check_call` has accepted it."""
    (rows, length), positions = named["input_ids"].shape, named.get("position_ids")
    if positions is None:
        return torch.arange(past, past + length, device="cpu").expand(rows, length)
    return cast(Tensor, positions if positions.ndim < 3 else positions[0]).expand(rows, length)


def row_starts(mask: Any, rows: int, length: int) -> Tensor:
    """int64 [rows]: where each row's text begins, from a 2-D attention mask [rows, length] that pads on the left."""
    if mask is None:
        return torch.zeros(rows, dtype=torch.int64, device="cpu")
    if not isinstance(mask, Tensor) or mask.shape != (rows, length):
        raise NotThisCall("the attention mask is not [rows, length so far]")
    seen = mask.bool()
    if bool(seen.all()):
        return torch.zeros(rows, dtype=torch.int64, device="cpu")
    start = length - seen.sum(1)
    if not torch.equal(seen, torch.arange(length, device="cpu") >= start[:, None]) or bool((start == length).any()):
        raise NotThisCall("the attention mask has holes")
    return start
