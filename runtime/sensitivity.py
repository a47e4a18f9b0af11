"""Which linears need 8 bits most, where not all can have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.packed import EXACT_BYTES
from ..predictors.calibration import TokenText
from ..predictors.checks import check_count, check_seed, check_share
from ..predictors.errors import CoreskipError
from ..predictors.token_samples import output_gradients
from .lower_cpu import HEAD_FORMAT, KERNEL_FORMATS
from .rounding import WINDOW, Rounded, compensate, windows_of

TOKENS = 4096


def sensitivities(
    model: Any,
    text: TokenText | Tensor,
    found: Sequence[Rounded],
    *,
    tokens: int = TOKENS,
    window: int = WINDOW,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """What rounding each linear is predicted to cost, KL divergence in nats per token, by its name.

    Half the sum over outputs of the squared error, as `compensate` has measured it, times the Fisher information, which
    is the mean square of the gradient that log p(y) has there, y drawn from the model's own predictions.

    Args:
        found: linears of the layers, as `compensate` yields them.
        text, tokens, window: what the gradients are measured on, one forward and one backward pass per window.
        seed: of drawing y.
    """
    check_seed(seed)
    rows = windows_of(model, text, tokens, window)
    modules = [each.module for each in found]
    sums = [torch.zeros_like(each.error) for each in found]
    count = 0
    for pairs in output_gradients(model, rows, modules, seed=seed, progress=progress):
        for total, (_, gradient) in zip(sums, pairs, strict=True):
            total += gradient.square().sum(0)
        count += len(pairs[0][1])
    return {each.name: float((total * each.error).sum()) / (2 * count) for each, total in zip(found, sums, strict=True)}


def mixed(
    model: Any,
    text: TokenText | Tensor,
    *,
    budget: float,
    tokens: int = TOKENS,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, str]:
    """ "int8" for the linears to which 4 bits cost most per byte, "int4" for the others: `widths` of `compensate`.

    Args:
        budget: bytes per token as a share of those with all linears in 8 bits, the LM head included.
        text, tokens: what 4 bits cost is measured on, by `compensate`, and gradients by `sensitivities`.

    Raises:
        CoreskipError: 4 bits everywhere are more than the budget.
    """
    check_share("budget", budget)
    check_count("tokens", tokens)
    linears = list(compensate(model, text, tokens=tokens, progress=progress))[:-1]
    costs = sensitivities(model, text, linears, tokens=tokens, seed=seed, progress=progress)
    return widths_within(model, linears, costs, budget)


def widths_within(model: Any, linears: Sequence[Rounded], costs: dict[str, float], budget: float) -> dict[str, str]:
    """The widths of linears within a budget, by what 4 bits cost each: see `mixed`."""
    sizes = {each.name: each.packed.out_features * each.packed.in_features for each in linears}
    per_weight = {width: EXACT_BYTES[str(KERNEL_FORMATS[width])] for width in ("int4", "int8")}
    head = model.get_output_embeddings().weight.numel() * EXACT_BYTES[HEAD_FORMAT]
    total = sum(sizes.values())
    left = budget * (head + total * per_weight["int8"]) - head - total * per_weight["int4"]
    if left < 0:
        least = (head + total * per_weight["int4"]) / (head + total * per_weight["int8"])
        raise CoreskipError(f"budget is {budget:g}; 4 bits everywhere are {least:.2f} of the bytes of 8: give more")
    widths = dict.fromkeys(sizes, "int4")
    for name in sorted(sizes, key=lambda name: costs[name] / sizes[name], reverse=True):
        extra = sizes[name] * (per_weight["int8"] - per_weight["int4"])
        if extra <= left:
            widths[name] = "int8"
            left -= extra
    return widths
