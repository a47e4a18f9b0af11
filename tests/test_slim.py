"""Neurons that every text keeps, as smaller matrices: as the numbers of the whole ones define them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import on_grid, packed
from test_decode import COVERED
from test_program import with_policies
from tiny_models import greedy, prompt, tiny
from torch import Tensor
from torch.nn import functional as F

import coreskip
from coreskip.kernels import ops
from coreskip.kernels.groups import ungroup, untile
from coreskip.kernels.packed import ACTS, Act, PackedLinear
from coreskip.kernels.sparse import SlimMLP
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.checks import AS_PACKED
from coreskip.predictors.feed_forward import Matrices
from coreskip.predictors.policies import Static
from coreskip.runtime.wrap import runtime_of

NO_LIBRARY = ops.available("cpu")
pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))
KEPT = torch.arange(1, 160, 3)


def slim_of(model: Any, weights: str | None) -> SlimMLP:
    plan = replace(with_policies(model, Static(KEPT)), weights=weights)
    with coreskip.wrap(model, plan):
        greedy(model, prompt(1), 3)
        assert runtime_of(model).steps.native.refusal is None
        found = runtime_of(model).prepared.mlp(0)
    assert isinstance(found, SlimMLP)
    assert found.listed_neurons == KEPT.numel()
    return found


def numbers(matrix: PackedLinear) -> Tensor:
    """float32 [outputs, inputs]"""
    if not matrix.grouped:
        return matrix.weight[:, : matrix.in_features].float()
    return ungroup(*untile(matrix)).flatten(1)[:, : matrix.in_features]


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_rows_are_those_of_the_whole_matrices(family: str, weights: str | None) -> None:
    model = tiny(family)
    w = dissect(model).mlp(0).matrices()
    found, kept = slim_of(model, weights), KEPT.clone()
    fmt = {None: None, "int8": "int8_groups", "int4": "int4"}[weights]
    for part, whole, bias in ((found.gate, w.gate, w.gate_bias), (found.up, w.up, w.up_bias)):
        assert (part is None) == (whole is None)
        if part is not None and whole is not None:
            assert torch.equal(numbers(part), numbers(PackedLinear.pack(whole, fmt=fmt))[kept])
            assert (part.bias is None) == (bias is None)
            assert bias is None or part.bias is None or torch.equal(part.bias, bias[kept].float())
    assert torch.equal(numbers(found.down), numbers(PackedLinear.pack(w.down[kept].t().contiguous(), fmt=fmt)))


@pytest.mark.parametrize("weights", [None, "int4"])
def test_numbers_of_four_bits_are_not_rounded_again(weights: str | None, tmp_path: Path) -> None:
    """Other groups of the down projection would not hold them."""
    model = on_grid(tiny("llama"))
    w = dissect(model).mlp(0).matrices()
    assert w.gate is not None
    for one, form in ((model, weights), (packed(model, tmp_path / "packed"), weights and AS_PACKED)):
        found = slim_of(one, form)
        assert found.gate is not None
        assert found.gate.fmt == found.up.fmt == "int4"
        assert torch.equal(numbers(found.gate), w.gate[KEPT])
        assert torch.equal(numbers(found.up), w.up[KEPT])
        down = w.down[KEPT].t()
        error = (numbers(found.down) - down).abs().max()
        assert error == 0 if weights is None else 0 < error <= 0.005 * down.abs().max()


def formula(w: Matrices, act: Act, x: Tensor) -> Tensor:
    """The kept neurons in torch, in the dtype of x."""

    def linear(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(y, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def some(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[KEPT]

    function = ACTS[act] if isinstance(act, str) else act
    up = linear(x, w.up[KEPT], some(w.up_bias))
    gated = up if w.gate is None else linear(x, w.gate[KEPT], some(w.gate_bias))
    return linear(function(up) if w.gate is None else function(gated) * up, w.down[KEPT].t(), w.down_bias)


@pytest.mark.parametrize("family", sorted(COVERED))
def test_steps_are_those_of_a_model_without_the_others(family: str) -> None:
    """One row and several, against the formula in float64; native steps are compared with this before they run."""
    model = tiny(family)
    w, found = dissect(model).mlp(0).matrices(), slim_of(model, None)
    for rows in (1, 5, 20):
        torch.manual_seed(rows)
        x = torch.randn(rows, 1, w.up.shape[1])
        exact, (y, kept) = formula(w, found.act, x.double()), found.run(x)
        assert kept == rows * KEPT.numel()
        usual = (formula(w, found.act, x) - exact).abs().max()
        assert (y - exact).abs().max() <= 2 * usual + 1e-6 * exact.abs().max()
