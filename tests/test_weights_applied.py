"""A plan's weight format is what decode steps read, on every architecture and every path, or it is refused."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_quality import text
from tiny_models import greedy, plan_of, prompt, tiny
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

import coreskip
from coreskip import CoreskipError, Plan
from coreskip.kernels import ops, reference
from coreskip.kernels.packed import PackedLinear
from coreskip.predictors.anatomy import dissect, rows_of
from coreskip.runtime.cost import bytes_per_token, loaded_bytes
from coreskip.runtime.decode import refusal
from coreskip.runtime.quality import evaluate_all
from coreskip.runtime.selections import densely, prefilling
from coreskip.runtime.wrap import is_wrapped, runtime_of, wrapped
from coreskip.runtime.sparse_mlp import Weights

NO_LIBRARY = ops.available("cpu")
pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))

ON_MODULES = ["opt", "gpt2", "falcon", "falcon_new", "bloom", "gpt_neox", "phi", "stablelm", "cohere"]


def takers(model: Any) -> list[Any]:
    """Every linear of the decoder layers, and the LM head."""
    layers = [module for layer in dissect(model).layers for module in layer.modules()]
    return [m for m in (*layers, model.get_output_embeddings()) if isinstance(m, (nn.Linear, Conv1D))]


def by_definition(model: Any, weights: str) -> Any:
    """A copy each of whose linears is the definition of the kernels' over its matrix in the plan's format."""
    twin = copy.deepcopy(model)
    for module in takers(twin):
        fmt = "int4" if weights == "int4" and module is not twin.get_output_embeddings() else "int8_groups"
        packed = PackedLinear.pack(*rows_of(module), fmt=fmt)
        module.forward = lambda x, packed=packed: reference.linear(x, packed)
    return twin


@torch.no_grad()
def after_prefill(model: Any, twin: Any, ids: Tensor, more: Tensor, **options: Any) -> Tensor:
    """The logits of `twin` for tokens that follow a prompt which `model` has read."""
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    return twin(more, past_key_values=cache, **options).logits


def differ(logits: Tensor, expected: Tensor) -> float:
    """The largest difference, in standard deviations of the expected logits."""
    return float((logits - expected).abs().max() / expected.std())


# What two orders of adding up can differ by: a few steps of float32, or an input at a half of a step of its group,
# which falls to the other side and moves an output by a 127th of the input's share.
ROUNDING = 0.02


@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("family", ON_MODULES)
def test_decode_steps_on_modules_read_the_plans_format(family: str, weights: str) -> None:
    model, ids, more = tiny(family), prompt(2, 12), prompt(2, 3, seed=3)
    dense = after_prefill(model, model, ids, more)
    expected = after_prefill(model, by_definition(model, weights), ids, more)
    plain = model(ids).logits
    with coreskip.wrap(model, Plan.dense(model, weights=weights), keep_originals=True):
        found = after_prefill(model, model, ids, more)
        assert differ(found, expected) < ROUNDING
        assert differ(expected, dense) > 3 * ROUNDING or weights == "int8"
        assert differ(found, dense) > 0.003
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, plain)  # prefill reads the originals
    assert torch.equal(model(ids).logits, plain)
