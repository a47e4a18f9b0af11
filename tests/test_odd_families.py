"""Dense families whose MLPs are not where, or not what, others' are: by structure, or refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import ODD, NoTokenizer, greedy, plan_of, prompt, tiny

import coreskip
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.errors import CoreskipError, PlanError
from coreskip.runtime.wrap import runtime_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NORMED = ("bitnet",)  # whose neurons cannot be left out


@pytest.mark.parametrize("family", ODD)
def test_dense_plans_give_the_same_tokens_and_leave_no_trace(family: str) -> None:
    model = tiny(family)
    with torch.no_grad():
        before = model(prompt()).logits
    rows, alone = greedy(model, prompt()), greedy(model, prompt(1))
    with coreskip.wrap(model):
        assert torch.equal(greedy(model, prompt()), rows)
        assert torch.equal(greedy(model, prompt(1)), alone)
    with coreskip.wrap(model, exact=True):
        assert torch.equal(greedy(model, prompt(1)), alone)
    with torch.no_grad():
        assert torch.equal(model(prompt()).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", [family for family in ODD if family not in NORMED])
def test_half_of_the_neurons_is_a_model_with_the_others_at_zero(family: str) -> None:
    model, twin = tiny(family), tiny(family)
    plan, anatomy = plan_of(model, "static"), dissect(twin)
    for layer, mlp in anatomy.present:
        indices = plan.layers[layer].neurons.indices  # type: ignore[attr-defined]
        dropped = torch.ones(mlp.intermediate_size, dtype=torch.bool).index_fill(0, indices, False)
        with torch.no_grad():
            mlp.matrices().down[dropped] = 0.0
    ids = prompt(1)
    with torch.no_grad(), coreskip.wrap(model, plan):
        cache = model(ids, use_cache=True).past_key_values
        got = model(ids[:, :1], past_key_values=cache, use_cache=True).logits
        assert runtime_of(model).usage.neuron_sparsity() == pytest.approx(0.5, abs=0.01)
        cache = tiny(family)(ids, use_cache=True).past_key_values  # the same dense prefill
        expected = twin(ids[:, :1], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", [family for family in ODD if family not in NORMED])
def test_prompts_choose_neurons(family: str) -> None:
    model = tiny(family)
    with coreskip.wrap(model, plan_of(model, "griffin")):
        both = greedy(model, prompt())
        assert both.shape == (2, 25)
        assert runtime_of(model).usage.neuron_sparsity() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("family", NORMED)
def test_neurons_before_a_norm_stay(family: str) -> None:
    model = tiny(family)
    with pytest.raises(PlanError, match="norm all activations before the down projection"):
        coreskip.wrap(model, plan_of(model, "static"))
    with pytest.raises(CoreskipError, match="norm all activations"):
        coreskip.analyze(model, NoTokenizer(), method="sketch", text="nothing is read before")
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_may_have_no_mlp_but_not_a_different_one() -> None:
    hybrid = dissect(tiny("nemotron_h"))
    assert [mlp is not None for mlp in hybrid.feed_forwards] == [False, True, False]
    model: Any = tiny("lfm2")
    mlp = model.model.layers[1].feed_forward
    mlp.forward = lambda x: type(mlp).forward(mlp, x).flip(-1)
    with pytest.raises(CoreskipError, match="found no MLP"):
        dissect(model)
