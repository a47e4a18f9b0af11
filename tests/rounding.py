"""How far float arithmetic may be from exact arithmetic: bounds from the terms that are added, not from what one CPU
happened to round.

A sum of n products in a type of unit roundoff u errs by at most n u sum |x_i w_i| and, as rounding is as good as
random, almost never by more than a small multiple of sqrt(n) u sum |x_i w_i|, in whatever order it is added (Higham and
Mary, "A New Approach to Probabilistic Rounding Error Analysis", 2019, theorem 2.4). Errors of the terms themselves are
independent of one another: together they are a small multiple of the root of their summed squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLE = 3.0  # five standard deviations of errors that lie evenly within their bounds
UNIT = torch.finfo(torch.float32).eps / 2  # kernels add in float32
# An activation errs by so many units of its argument or, of relu2, of its value: the exponential function is a
# polynomial of six terms, after which come a division and a product.
ACTIVATION_UNITS = 16
STEEPEST = 1.13  # the largest slope of silu and gelu; that of relu2 grows with its argument


def of_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """float64 ``[..., out]``: how far x @ weight.t() + bias may be from its exact value.

    x ``[..., n]`` and weight ``[out, n]`` count as exact. Sums are in float32. The product and, once more, what the
    bias has been added to may be rounded to `dtype`, as torch does.
    """
    x, weight = x.double(), weight.double()
    size, product = x.abs() @ weight.abs().t(), (x @ weight.t()).abs()
    if bias is not None:
        size, product = size + bias.double().abs(), product + bias.double().abs()
    return MULTIPLE * (x.shape[-1] + 1) ** 0.5 * UNIT * size + torch.finfo(dtype).eps * product


def of_activation(act: str, x: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """How far act(x) may be, where x is float64 and may itself be off by `error`. The result may be rounded to
    `dtype`."""
    value = x.abs() ** (2 if act == "relu2" else 1)  # no activation is larger than this
    slope = 2 * x.abs() + error if act == "relu2" else STEEPEST
    return slope * error + ACTIVATION_UNITS * UNIT * value + torch.finfo(dtype).eps / 2 * value


def of_product(a: Tensor, b: Tensor, a_error: Tensor, b_error: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a * b may be, where a and b are float64 and may be off by their errors."""
    return a.abs() * b_error + a_error * b.abs() + a_error * b_error + torch.finfo(dtype).eps / 2 * (a * b).abs()


def carried(error: Tensor, weight: Tensor) -> Tensor:
    """``[..., out]``: what independent errors of inputs ``[..., n]`` become in a product with weight ``[out, n]``."""
    return MULTIPLE * (error.square() @ weight.double().square().t()).sqrt()
