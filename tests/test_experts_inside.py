"""Experts that a prompt keeps, and neurons that are left out inside of experts, against what is done by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_experts import decoded, given_to, mixtures, plan_with
from tiny_models import NoTokenizer, greedy, prompt, tiny
from torch import Tensor
from transformers import DynamicCache

import coreskip
from coreskip.kernels.ops import available
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.errors import CoreskipError, PlanError
from coreskip.predictors.expert_policies import CoreExperts, KeptExperts, ThinExperts
from coreskip.predictors.expert_scores import ExpertStats
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.routing import spread
from coreskip.runtime.cost import bytes_per_token
from coreskip.runtime.wrap import runtime_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def most_used(model: Any, ids: Tensor, count: int) -> list[Tensor]:
    """By mixture, the experts with the largest sums of weights over a prompt, ascending."""
    sums = [spread(index, weights, experts.count).sum(0) for experts, _, index, weights in given_to(model, ids)]
    return [total.argsort(descending=True, stable=True)[:count].sort().values for total in sums]


def by_hand(model: Any, kept: list[Tensor]) -> Plan:
    dense, left = Plan.dense(model), iter(kept)
    layers = [LayerPlan(experts=KeptExperts(next(left))) if count else LayerPlan() for count in dense.model.experts]
    return Plan(tuple(layers), dense.model, {"method": "by hand"})


@pytest.mark.parametrize("natively", [True, False], ids=["native", "modules"])
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek_v3", "qwen2_moe", "gpt_oss"])
def test_steps_choose_from_the_experts_that_the_prompt_used_most(
    family: str, natively: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if natively and available("cpu") is not None:
        pytest.skip("the native kernels are not built")
    model, ids = tiny(family), prompt(1, 24)
    expected = by_hand(model, most_used(model, ids[:, :12], 3))
    found = []
    for plan in (expected, plan_with(model, CoreExperts(3))):
        with coreskip.wrap(model, plan):
            native = runtime_of(model).steps.native
            if not natively:
                native._refuse("the modules are what is compared with")
            found.append(decoded(model, ids))
            assert native.ready is natively or not natively
    assert torch.equal(*found)
    with coreskip.wrap(model):
        assert not torch.equal(decoded(model, ids), found[0])


def test_each_sequence_has_its_own() -> None:
    model = tiny("mixtral")
    ids = torch.cat([prompt(1, 12), prompt(2, 12)[1:]])
    plan = plan_with(model, CoreExperts(2))
    mask = torch.ones_like(ids)
    with coreskip.wrap(model, plan):
        alone = [greedy(model, row[None], 8) for row in ids]
        together = greedy(model, ids, 8, attention_mask=mask)
        assert torch.equal(together, torch.cat(alone))
        assert not torch.equal(most_used(model, ids[:1], 2)[0], most_used(model, ids[1:], 2)[0])


def test_what_a_prompt_keeps_follows_its_cache_and_grows_with_the_next_turn() -> None:
    model, ids = tiny("mixtral"), prompt(1, 24)
    with torch.no_grad(), coreskip.wrap(model, plan_with(model, CoreExperts(2))):
        cache = DynamicCache(config=model.config)
        model(ids[:, :12], past_key_values=cache, use_cache=True)
        twin = copy.deepcopy(cache)
        steps = [model(ids[:, 12:13], past_key_values=c, use_cache=True).logits for c in (cache, twin)]
        assert torch.equal(*steps)
        with coreskip.prefilling():
            model(ids[:, 13:20], past_key_values=twin, use_cache=True)
        got = model(ids[:, 20:21], past_key_values=twin, use_cache=True).logits
    read = torch.cat([ids[:, :12], ids[:, 13:20]], 1)  # the token between them was decoded, and counts for nothing
    sums = [0.0] * len(mixtures(model))
    for i, (experts, _, index, weights) in enumerate(given_to(model, ids[:, :20])):
        of_prompt = torch.ones(20, dtype=torch.bool)
        of_prompt[12] = False
        sums[i] = spread(index, weights, experts.count)[of_prompt].sum(0)
    assert read.shape[1] == 19
    first = sums[0].argsort(descending=True, stable=True)[:2].sort().values
    selections = vars(twin)["_coreskip_selections"]
    assert torch.equal(selections.allowed_experts(0)[0].nonzero()[:, 0], first)
    assert bool(got.isfinite().all())


def test_padding_is_no_part_of_a_prompt() -> None:
    model, ids = tiny("mixtral"), prompt(1, 12)
    padded = torch.cat([torch.zeros_like(ids[:, :4]), ids], 1)
    mask = (torch.arange(16) >= 4).long()[None]
    with torch.no_grad(), coreskip.wrap(model, plan_with(model, CoreExperts(2))):
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        model(ids, past_key_values=caches[0], use_cache=True)
        model(padded, attention_mask=mask, past_key_values=caches[1], use_cache=True)
        used = [vars(cache)["_coreskip_selections"]._used[0] for cache in caches]
    torch.testing.assert_close(*used, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_neurons_of_experts_whose_gates_are_hardly_open_are_left_out(family: str) -> None:
    model, twin, ids = tiny(family), tiny(family), prompt(1, 24)
    count = mixtures(model)[0].count
    least = torch.linspace(0.01, 0.2, count)
    left_out = [0]

    def slow(experts: Any) -> Any:
        original = experts.module.forward

        def forward(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            if len(x) > 1:
                return original(x, index, weights)
            out = torch.zeros_like(x)
            for e, w in zip(index[0].tolist(), weights[0].tolist(), strict=True):
                gates, h = experts.opened(x, e)
                left_out[0] += int((gates.abs() < least[e]).sum())
                h = torch.where(gates.abs() < least[e], 0.0, h)
                at = experts.layout
                out += w * experts._linear(h, at.down, at.down_bias, e)
            return out

        return forward

    for experts in mixtures(twin):
        experts.module.forward = slow(experts)
    expected = decoded(twin, ids)
    with coreskip.wrap(model, plan_with(model, ThinExperts(least, 0.8))):
        got = decoded(model, ids)
        assert runtime_of(model).usage._skipped == left_out[0] > 0
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("method", ["core-experts", "thin-experts"])
def test_analyze_makes_them(method: str, tmp_path: Path) -> None:
    model = tiny("olmoe")
    text = TokenText(prompt(1, 3000)[0], prompt(1)[0, :0], "drawn")
    plan = coreskip.analyze(model, NoTokenizer(), method=method, keep=0.5, text=text, tokens=1024, progress=False)
    plan.save(tmp_path / "plan")
    again = Plan.load(tmp_path / "plan")
    assert again.recipe["method"] == method
    assert plan.quality is not None
    assert plan.quality["kl"] > 1e-4  # prompts decide in the measurement, too
    assert again.layers[0].experts.words in str(again)
    assert bytes_per_token(model, plan) <= bytes_per_token(model, Plan.dense(model))
    ids = prompt(1, 12)
    found = []
    for one in (plan, again):
        with coreskip.wrap(model, one):
            found.append(greedy(model, ids, 8))
    assert torch.equal(*found)


def test_thresholds_keep_the_share_that_is_wanted() -> None:
    from coreskip.predictors.expert_scores import observe_experts, thin_experts

    model = tiny("mixtral")
    stats = observe_experts(model, prompt(4, 64).split(1), total=4, progress=False)
    assert isinstance(stats[0], ExpertStats)
    policy = thin_experts(stats[0], 0.7)
    assert policy.share == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (CoreExperts(0), "count"),
        (CoreExperts(9), "9 experts are to be kept of 8"),
        (ThinExperts(torch.zeros(7), 1.0), "float32 of 8 experts"),
        (ThinExperts(torch.full((8,), -1.0), 1.0), "numbers from 0 on"),
    ],
)
def test_wrong_numbers_are_refused(policy: Any, message: str) -> None:
    model = tiny("mixtral")
    with pytest.raises(CoreskipError, match=message):
        coreskip.wrap(model, plan_with(model, policy))


def test_neurons_inside_experts_and_weights_do_not_go_together() -> None:
    model = tiny("mixtral")
    plan = plan_with(model, ThinExperts(torch.zeros(8), 1.0))
    plan = Plan(plan.layers, plan.model, plan.recipe, weights="int4")
    with pytest.raises(PlanError, match="make the plan without weights"):
        coreskip.wrap(model, plan)


def test_a_router_of_no_known_kind_goes_on_choosing() -> None:
    """Squared weights are no formula that is known."""
    model = tiny("mixtral")
    for experts in mixtures(model):
        router: Any = experts.block.get_submodule(experts.router.weight_at[0])
        kind = type(router)

        def forward(self: Any, x: Tensor, kind: Any = kind) -> Any:
            logits, weights, index = kind.forward(self, x)
            return logits, weights**2, index

        router.__class__ = type("SquaringRouter", (kind,), {"forward": forward})
    assert all(experts.router is None for experts in mixtures(model))
    expected = greedy(model, prompt(1))
    with coreskip.wrap(model):
        assert torch.equal(greedy(model, prompt(1)), expected)
    with pytest.raises(PlanError, match="what its router computes is not known"):
        coreskip.wrap(model, plan_with(model, CoreExperts(3)))
