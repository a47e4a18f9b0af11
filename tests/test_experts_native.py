"""Mixtures of experts on the native step: what the model's own modules compute, and under plans over experts."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_decode import by_modules, ragged, refusal, some_tokens, spy, teacher_forced
from tiny_models import greedy, prompt, tiny
from transformers import DynamicCache

import coreskip
from coreskip.kernels.experts import PackedExperts
from coreskip.kernels.ops import available
from coreskip.predictors.expert_policies import KeptExperts, SkipExperts
from coreskip.predictors.plan import Plan
from coreskip.runtime.wrap import runtime_of

pytestmark = pytest.mark.skipif(available("cpu") is not None, reason="needs the compiled kernels")

COVERED = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "glm4_moe", "dots1", "flex_olmo",
)  # fmt: skip


def with_experts(model: Any, policy: Any) -> Plan:
    """A plan that leaves experts out of every mixture."""
    dense = Plan.dense(model)
    anatomy = coreskip.predictors.anatomy.dissect(model)
    layers = [
        layer if experts is None else replace(layer, experts=policy)
        for layer, experts in zip(dense.layers, anatomy.experts, strict=True)
    ]
    return replace(dense, layers=tuple(layers))


@pytest.mark.parametrize("family", COVERED)
def test_two_hundred_steps_from_ragged_prompts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    ids, mask = ragged()
    tokens = some_tokens(2, 200)

    def all_at_once(judge: Any) -> torch.Tensor:
        logits = []
        for row in range(2):
            first, cache = int((mask[row] == 0).sum()), DynamicCache(config=model.config)
            judge(ids[row : row + 1, first:], past_key_values=cache)
            logits.append(judge(tokens[row : row + 1], past_key_values=cache).logits)
        return torch.cat(logits)

    with torch.no_grad():
        doubled = copy.deepcopy(model).double()
        doubled.set_experts_implementation("eager")
        exact = all_at_once(doubled)
        usual = (all_at_once(model) - exact).abs().max()
        with coreskip.wrap(model):
            teacher_forced(model, ids, mask, tokens[:, :2], each=1)
            seen = spy(model, monkeypatch)
            native = teacher_forced(model, ids, mask, tokens, each=1)
            assert refusal(model) is None
            assert seen == [2] * 200
    assert (native - exact).abs().max() <= 2 * usual + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("family", COVERED)
def test_tokens_and_exact_mode(family: str) -> None:
    model, ids = tiny(family), prompt(1, 9)
    expected = greedy(model, ids, new=48)
    with coreskip.wrap(model):
        assert torch.equal(greedy(model, ids, new=48), expected)
        assert runtime_of(model).steps.native.ready
    with coreskip.wrap(model, with_experts(model, SkipExperts(0.9)), exact=True):
        assert torch.equal(greedy(model, ids, new=48), expected)
        assert runtime_of(model).steps.native.ready
    assert torch.equal(greedy(model, ids, new=48), expected)


@pytest.mark.parametrize("policy", [SkipExperts(0.6), KeptExperts(torch.tensor([0, 2, 3, 6, 7]))], ids=lambda p: p.name)
@pytest.mark.parametrize("family", COVERED)
def test_plans_over_experts_as_on_the_modules(family: str, policy: Any) -> None:
    """The same tokens, logits and neurons skipped as the patched modules have."""
    model, (ids, mask), tokens = tiny(family), ragged(), some_tokens(2, 40)
    with torch.no_grad(), coreskip.wrap(model, with_experts(model, policy)):
        with by_modules(model):
            expected = teacher_forced(model, ids, mask, tokens, each=1)
            skipped = runtime_of(model).usage.neuron_sparsity()
        runtime_of(model).usage.reset()
        teacher_forced(model, ids, mask, tokens[:, :1], each=1)
        assert runtime_of(model).steps.native.ready, refusal(model)
        runtime_of(model).usage.reset()
        got = teacher_forced(model, ids, mask, tokens, each=1)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        assert runtime_of(model).usage.neuron_sparsity() == pytest.approx(skipped)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_packed_experts_stand_for_numbers_close_to_the_models(weights: str) -> None:
    """And the numbers of one pack are used again."""
    model = tiny("qwen2_moe")
    with coreskip.wrap(model, Plan.dense(model, weights), keep_originals=True):
        greedy(model, prompt(1, 9), new=2)
        native = runtime_of(model).steps.native
        assert native.ready, native.refusal
        assert native.described is not None
        mlp = native.described.model.base.layers[1].mlp
        assert isinstance(mlp, PackedExperts)
        assert {linear.fmt for linear in mlp.linears} == {"int4" if weights == "int4" else "int8_groups"}
        loaded = native.described.loaded.base.layers[1].mlp
        assert isinstance(loaded, PackedExperts)
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        exact, rounded = loaded.compute(x), mlp.compute(x)
        assert (rounded - exact).norm() <= (0.02 if weights == "int8" else 0.15) * exact.norm()


def test_neurons_of_a_shared_expert_are_left_out_on_the_modules() -> None:
    from tiny_models import plan_of

    model = tiny("qwen2_moe")
    with coreskip.wrap(model, plan_of(model, "static")):
        greedy(model, prompt(1, 9), new=4)
        assert "shared expert" in str(refusal(model))


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "gpt_oss"])
def test_modules_decode_with_the_plans_numbers(family: str) -> None:
    """Where the native step does not cover a call, or a model, the text is the same, prefill apart."""
    model, ids, tokens = tiny(family), prompt(1, 9), some_tokens(1, 12)
    mask = torch.ones_like(ids)
    with torch.no_grad(), coreskip.wrap(model, Plan.dense(model, "int4"), keep_originals=True):
        teacher_forced(model, ids, mask, tokens[:, :1], each=1)
        native = teacher_forced(model, ids, mask, tokens, each=1)
        with by_modules(model):
            of_modules = teacher_forced(model, ids, mask, tokens, each=1)
    loaded = teacher_forced(model, ids, mask, tokens, each=1) if family != "gpt_oss" else None
    # a value of x may be rounded to another step
    assert (native - of_modules).norm() <= 0.05 * native.norm()
    if loaded is not None:
        assert (native - of_modules).norm() < 0.3 * (native - loaded).norm()
