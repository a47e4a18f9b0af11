"""Layers: which are void, how much they matter, and that skipping them does what it says, KV cache included."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_decode import COVERED, some_tokens, teacher_forced
from tiny_models import greedy, plan_of, prompt, tiny
from transformers import DynamicCache

import coreskip
from coreskip import CoreskipError, PlanError
from coreskip.kernels.ops import available
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.layer_selection import LayerSelection
from coreskip.predictors.layers import (
    attention_ranks,
    block_influence,
    half_losses,
    residuals,
    void,
    void_maps,
    with_skipped_layers,
)
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import Adaptive, Dense, Run, Skip, SkipAttention, SkipMLP
from coreskip.runtime.wrap import runtime_of

FAMILIES = ["llama", "mistral", "qwen3", "phi3", "gemma2", "opt", "gpt2", "gpt_neox", "stablelm", "cohere", "phi"]
POLICIES = [Skip(), SkipAttention(), SkipMLP()]


def plan_with(model: Any, policies: dict[int, Run], keep: float = 1.0) -> Plan:
    """`policies` by layer; the others run."""
    plan = Plan.dense(model) if keep == 1.0 else plan_of(model, "static", keep)
    layers = tuple(LayerPlan(layer.neurons, policies.get(i, Run())) for i, layer in enumerate(plan.layers))
    return Plan(layers, plan.model, {"method": "layers"})


# --- the slow reference: one dense pass over everything, without a cache, in which what is skipped is zeroed


@contextmanager
def zeroed(model: Any, masks: dict[tuple[int, str], torch.Tensor]) -> Iterator[None]:
    """`masks` by layer and sublayer: bool ``[rows, tokens]``, True where its output counts for nothing."""
    anatomy, handles = dissect(model), []

    def hook(mask: torch.Tensor) -> Callable[..., Any]:
        def after(module: Any, args: Any, output: Any) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            zeroed = y.reshape(*mask.shape, -1).masked_fill(mask.unsqueeze(-1), 0.0).view_as(y)
            return (zeroed, *output[1:]) if isinstance(output, tuple) else zeroed

        return after

    for (index, sublayer), mask in masks.items():
        mlp = anatomy.mlps[index]
        module = anatomy.attentions[index].module if sublayer == "attention" else mlp.owner if mlp.whole else mlp.down
        handles.append(module.register_forward_hook(hook(mask)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reference(
    model: Any, ids: torch.Tensor, decoded: torch.Tensor, policies: dict[int, Run], rows: dict[int, torch.Tensor]
) -> torch.Tensor:
    """Logits of an unwrapped model. `decoded`: bool ``[tokens]``, True where a token was decoded rather than
    prefilled; `rows`: for adaptive layers, bool ``[rows]``, True where skipped."""
    masks = {}
    for index, policy in policies.items():
        mask = decoded.expand(ids.shape)
        if isinstance(policy, Adaptive):
            mask = mask & rows[index].unsqueeze(1)
        for sublayer in ("attention", "mlp"):
            if isinstance(policy, Adaptive) or not getattr(policy, sublayer):
                masks[index, sublayer] = mask
    with torch.no_grad(), zeroed(model, masks):
        return model(ids, use_cache=False).logits


def majority(model: Any, ids: torch.Tensor, alpha: float) -> torch.Tensor:
    """Bool ``[layers, rows]``: void for most of the prompt's tokens, from one dense pass."""
    norms: list[torch.Tensor] = []

    def see(index: int, before: torch.Tensor, after: torch.Tensor) -> None:
        norms.extend([before.norm(dim=-1), after.norm(dim=-1)][index > 0 :])

    with torch.no_grad(), residuals(dissect(model), see):
        model(ids, use_cache=False)
    return void(norms, alpha).float().mean(-1) > 0.5


def telling_alpha(model: Any, ids: torch.Tensor) -> float:
    """An alpha under which some layer is void for some rows and not for others."""
    for alpha in (0.25 * i for i in range(1, 60)):
        chosen = majority(model, ids, alpha).float().mean(1)
        if bool(((chosen > 0) & (chosen < 1)).any()):
            return alpha
    raise AssertionError("the rows of this model never disagree")


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_equals_the_reference_that_recomputes_everything(family: str, policy: Run) -> None:
    """Two turns: the second prompt is prefilled densely over entries that skipped layers wrote."""
    model = tiny(family)
    ids = prompt(2, 24)
    decoded = torch.zeros(24, dtype=torch.bool)
    decoded[9:14] = decoded[18:] = True
    policies: dict[int, Run] = {0: policy, 2: policy}
    expected = reference(model, ids, decoded, policies, {})
    with torch.no_grad(), coreskip.wrap(model, plan_with(model, policies)):
        cache = DynamicCache(config=model.config)
        parts = [model(ids[:, :9], past_key_values=cache).logits]
        parts += [model(t, past_key_values=cache).logits for t in ids[:, 9:14].split(1, dim=1)]
        with coreskip.prefilling():
            parts.append(model(ids[:, 14:18], past_key_values=cache).logits)
        parts.append(model(ids[:, 18:], past_key_values=cache).logits)  # several tokens at once
        assert {layer.get_seq_length() for layer in cache.layers} == {24}
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.skipif(available("cpu") is not None, reason="needs the compiled kernels")
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
@pytest.mark.parametrize("family", COVERED)
def test_two_hundred_native_steps_without_layers(family: str, policy: Run) -> None:
    model = tiny(family)
    policies: dict[int, Run] = {0: policy, 2: policy}
    tokens = some_tokens(1, 200)
    for length in (9, 5):
        ids = prompt(1, length)
        decoded = torch.arange(length + 200) >= length
        expected = reference(model, torch.cat([ids, tokens], 1), decoded, policies, {})[:, length:]
        with torch.no_grad(), coreskip.wrap(model, plan_with(model, policies)):
            found = teacher_forced(model, ids, torch.ones_like(ids), tokens, each=1)
            assert runtime_of(model).steps.native.refusal is None
        torch.testing.assert_close(found, expected, rtol=5e-4, atol=5e-4)


def test_bloom_may_skip_mlps_and_falcon_nothing_of_its_attention() -> None:
    model, ids = tiny("bloom"), prompt(2, 14)
    decoded = torch.arange(14) >= 9
    expected = reference(model, ids, decoded, {1: SkipMLP()}, {})
    with torch.no_grad(), coreskip.wrap(model, plan_with(model, {1: SkipMLP()})):
        cache = DynamicCache(config=model.config)
        logits = [model(t, past_key_values=cache).logits for t in (ids[:, :9], ids[:, 9:])]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=2e-4, atol=2e-4)
    falcon = tiny("falcon")
    for policy in (Skip(), SkipAttention(), Adaptive(0.8)):
        with pytest.raises(CoreskipError, match="attention of their own"):
            coreskip.wrap(falcon, plan_with(falcon, {0: policy}))
    assert not any("forward" in vars(module) for module in falcon.modules())


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_what_is_skipped_is_not_computed(family: str, policy: Run) -> None:
    """Its weights are spoilt after prefill, and nothing notices."""
    model, ids = tiny(family), prompt(1, 9)
    with torch.no_grad(), coreskip.wrap(model, plan_with(model, {1: policy})):
        anatomy = runtime_of(model).anatomy
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        expected = model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
        attention, mlp = anatomy.attentions[1], anatomy.mlps[1]
        spoilt = [] if policy.mlp else [mlp.up, mlp.down]
        if not policy.attention:
            spoilt += [getattr(attention.module, attention.output)]
            spoilt += [attention.module.q_proj] if len(attention.inputs) == 3 else []
        for module in spoilt:
            module.weight.fill_(float("nan"))
        # the model was changed: its native step is compared anew, and may be refused for a dense step of these weights
        torch.testing.assert_close(model(ids[:, :1], past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-4)
        assert bool(expected.isfinite().all())


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2"])
def test_adaptive_layers_follow_their_own_prompt(family: str) -> None:
    """Rows that disagree, alone, together, reordered, and a second turn: always the reference."""
    model, ids = tiny(family), prompt(6, 20)
    alpha = telling_alpha(model, ids[:, :9])
    chosen = majority(model, ids[:, :9], alpha)
    policies: dict[int, Run] = {i: Adaptive(alpha) for i in range(3)}
    decoded = torch.arange(20) >= 9
    expected = reference(model, ids, decoded, policies, dict(enumerate(chosen)))
    with torch.no_grad(), coreskip.wrap(model, plan_with(model, policies)):
        cache = DynamicCache(config=model.config)
        parts = [model(ids[:, :9], past_key_values=cache).logits]
        parts += [model(t, past_key_values=cache).logits for t in ids[:, 9:14].split(1, dim=1)]
        order = torch.tensor([3, 3, 0, 5, 1, 1])
        moved = copy.deepcopy(cache)
        moved.reorder_cache(order)
        parts += [model(t, past_key_values=cache).logits for t in ids[:, 14:].split(1, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=2e-4, atol=2e-4)
        after = model(ids[order, 14:], past_key_values=moved).logits
        torch.testing.assert_close(after, expected[order, 14:], rtol=2e-4, atol=2e-4)
        for row in range(3):
            alone = DynamicCache(config=model.config)
            model(ids[row : row + 1, :9], past_key_values=alone)
            logits = model(ids[row : row + 1, 9:], past_key_values=alone).logits
            torch.testing.assert_close(logits, expected[row : row + 1, 9:], rtol=2e-4, atol=2e-4)


def test_padding_does_not_vote_and_generation_in_a_batch_equals_generation_alone(llama: Any) -> None:
    ids, alpha = prompt(1, 9), telling_alpha(llama, prompt(6, 9))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), ids], dim=1)
    both = torch.cat([padded, prompt(1, 14, seed=3)])
    mask = (both > 0).long()
    with coreskip.wrap(llama, plan_with(llama, {i: Adaptive(alpha) for i in range(3)})):
        together = greedy(llama, both, 12, attention_mask=mask)
        assert torch.equal(together[0, 14:], greedy(llama, ids, 12)[0, 9:])
        assert torch.equal(together[1:], greedy(llama, both[1:], 12))


def test_beam_search_under_adaptive_layers_equals_beam_search_without_a_cache(llama: Any) -> None:
    """Every step of the slow one prefills all it has with the skips that the prompt decided."""
    ids, alpha = prompt(1, 9), 5.0
    policies: dict[int, Run] = {i: Adaptive(alpha) for i in range(3)}
    chosen = majority(llama, ids, alpha)
    assert bool(chosen.any())
    with coreskip.wrap(llama, plan_with(llama, policies)):
        found = greedy(llama, ids, 8, num_beams=3, num_return_sequences=3)

    forward = llama.forward

    def slow(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        masks = {
            (i, name): (torch.arange(input_ids.shape[1]) >= 9).expand(input_ids.shape)
            for i in range(3)
            for name in ("attention", "mlp")
            if bool(chosen[i, 0])
        }
        with zeroed(llama, masks):
            return forward(input_ids=input_ids, use_cache=False)

    llama.forward = slow
    try:
        expected = greedy(llama, ids, 8, num_beams=3, num_return_sequences=3, use_cache=False)
    finally:
        del llama.forward
    assert torch.equal(found, expected)


def test_a_second_prompt_votes_too(llama: Any) -> None:
    """Both prompts' tokens count, the answer between them does not."""
    ids = prompt(1, 20)
    with torch.no_grad(), coreskip.wrap(llama, plan_with(llama, {i: Adaptive(0.3) for i in range(3)})):
        cache = DynamicCache(config=llama.config)
        llama(ids[:, :9], past_key_values=cache)
        votes = {i: v.clone() for i, v in cache._coreskip_selections._void.items()}
        assert all(abs(int(v)) <= 9 for v in votes.values())
        llama(ids[:, 9:14], past_key_values=cache)
        assert cache._coreskip_selections._void == votes
        with coreskip.prefilling():
            llama(ids[:, 14:], past_key_values=cache)
        changed = {i: int(v) - int(votes[i]) for i, v in cache._coreskip_selections._void.items()}
        assert all(change in (-6, -4, -2, 0, 2, 4, 6) for change in changed.values())


@pytest.mark.skipif(available("cpu") is not None, reason="drafts are verified by the CPU kernels")
@pytest.mark.parametrize("policy", [*POLICIES, Adaptive(5.0)], ids=lambda p: p.name)
@pytest.mark.parametrize("family", ["llama", "mistral", "opt"])
def test_exact_mode_drafts_with_layers_left_out(family: str, policy: Run) -> None:
    from exact_mode import dense, tokens_and_statistics

    model, ids = tiny(family, num_hidden_layers=4), prompt(1, 9)
    plan = plan_with(model, {0: policy, 2: policy}, keep=0.9)
    output, done = tokens_and_statistics(model, plan, ids, new=40)
    assert done.drafted["plan"] > 0
    assert torch.equal(output, dense(model, ids, new=40))


def test_usage_counts_skipped_mlps_and_unwrap_restores(llama: Any) -> None:
    before = {name: dict(vars(module)) for name, module in llama.named_modules()}
    with torch.no_grad():
        plain = llama(prompt(1, 9)).logits
        with coreskip.wrap(llama, plan_with(llama, {0: Skip(), 1: SkipAttention()})) as wrapped:
            greedy(llama, prompt(1, 9), 5)
            assert runtime_of(wrapped).usage.neuron_sparsity() == pytest.approx(1 / 3)
        assert torch.equal(llama(prompt(1, 9)).logits, plain)
    after = {name: dict(vars(module)) for name, module in llama.named_modules()}
    assert {n: set(v) for n, v in before.items()} == {n: set(v) for n, v in after.items()}


def test_plans_keep_layer_policies(llama: Any, tmp_path: Any) -> None:
    policies = {0: Skip(), 1: Adaptive(0.8), 2: SkipMLP()}
    plan = plan_with(llama, policies, keep=0.5)
    plan.save(tmp_path / "layers.plan")
    loaded = Plan.load(tmp_path / "layers.plan")
    assert [layer.layer for layer in loaded.layers] == list(policies.values())
    assert loaded.keep == pytest.approx(0.5 / 3)
    for name in ("skip", "adaptive", "alpha=0.8", "skip_mlp"):
        assert name in str(loaded)
    for alpha in (-0.1, float("nan"), float("inf"), "much"):
        with pytest.raises(PlanError, match="adaptive"):
            plan_with(llama, {0: Adaptive(alpha)})  # type: ignore[arg-type]
    assert LayerPlan(Dense()).kept(7) == 7


# --- analyses


def test_void_is_the_definition() -> None:
    norms = [n.tolist() for n in torch.rand(7, 5, generator=torch.Generator().manual_seed(3)) * 4]
    got = void([torch.tensor(n) for n in norms], 0.8)
    for token in range(5):
        changes: list[float] = []
        for layer in range(6):
            change = norms[layer + 1][token] - norms[layer][token]
            threshold = 0.8 * (max(changes) - min(changes)) if changes else 0.0
            assert bool(got[layer, token]) == (change < threshold), (layer, token)
            changes.append(change)
    assert 0 < int(got.sum()) < got.numel()


def test_void_maps_tell_the_phases_apart(llama: Any) -> None:
    ids = [prompt(1, 9), prompt(1, 6, seed=3)]
    maps = void_maps(llama, ids, alpha=0.5, new_tokens=4)
    assert maps.prompt.shape == (3, 15)
    assert maps.response.shape == (3, 8)
    norms: list[torch.Tensor] = []

    def see(index: int, before: torch.Tensor, after: torch.Tensor) -> None:
        norms.extend([before.norm(dim=-1), after.norm(dim=-1)][index > 0 :])

    answered = greedy(llama, ids[0], 5)
    with torch.no_grad(), residuals(dissect(llama), see):
        llama(answered, use_cache=False)
    whole = void(norms, 0.5)[:, 0]
    assert torch.equal(maps.prompt[:, :9], whole[:, :9])
    assert torch.equal(maps.response[:, :4], whole[:, 9:13])
    assert maps.shares()["void_response"][0] == pytest.approx(float(maps.response[0].float().mean()))
    with pytest.raises(CoreskipError, match="at least one prompt"):
        void_maps(llama, [])


def test_block_influence_is_one_minus_the_cosine(llama: Any) -> None:
    ids = prompt(2, 9)
    found = block_influence(llama, [ids[:1], ids[1:]])
    with torch.no_grad():
        hidden = llama.model(ids, output_hidden_states=True, use_cache=False).hidden_states
        for index in range(2):  # the last hidden state is normed
            cosine = torch.cosine_similarity(hidden[index], hidden[index + 1], dim=-1)
            assert found[index].layer == pytest.approx(float((1 - cosine).mean()), rel=1e-4)
    silent = tiny("llama")
    silent.model.layers[1].self_attn.o_proj.weight.data.zero_()
    silent.model.layers[2].mlp.down_proj.weight.data.zero_()
    found = block_influence(silent, [ids])
    assert found[1].attention == pytest.approx(0.0, abs=1e-5)
    assert found[1].mlp == pytest.approx(found[1].layer, rel=1e-4)
    assert found[2].mlp == pytest.approx(0.0, abs=1e-5)


def test_attention_ranks_are_those_of_the_maps(llama: Any) -> None:
    found = attention_ranks(llama, [prompt(2, 12)])
    assert len(found) == 3
    assert all(0 < rank <= 1 for rank in found)
    assert llama.config._attn_implementation == "sdpa"
    uniform = tiny("llama")
    uniform.model.layers[1].self_attn.q_proj.weight.data.zero_()
    assert attention_ranks(uniform, [prompt(2, 12)])[1] == 1.0  # the mean of all before: triangular, full rank


@pytest.mark.parametrize("family", ["llama", "opt", "olmo2", "gpt_neox"])
def test_losses_of_small_halves_are_those_of_leaving_them_out(family: str) -> None:
    """Where a half adds little, its predicted loss is the divergence measured; OLMo 2 has norms after both halves."""
    model, ids = tiny(family), prompt(8, 96)
    layer = dissect(model).layers[1]
    after = {"llama": ("self_attn.o_proj", "mlp.down_proj"), "opt": ("self_attn.out_proj", "fc2")}
    after |= {"olmo2": ("post_attention_layernorm", "post_feedforward_layernorm")}
    modules = [layer.get_submodule(name) for name in after.get(family, ("attention.dense", "mlp.dense_4h_to_h"))]
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter *= 0.03
        predicted = half_losses(model, ids, progress=False)
        dense = model(ids).logits.log_softmax(-1)
        for module, loss in zip(modules, predicted[1].tolist(), strict=True):
            handle = module.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
            without = model(ids).logits.log_softmax(-1)
            handle.remove()
            measured = float((dense.exp() * (dense - without)).sum(-1)[:, 48:].mean())
            assert 0.5 * measured < loss < 1.5 * measured
    assert float(predicted[[0, 2]].min()) > 10 * float(predicted[1].max())


def test_layers_of_a_plan_that_leaves_some_out_already_stay_out(llama: Any) -> None:
    plan = plan_with(llama, {0: SkipMLP(), 1: SkipAttention()})
    text = TokenText(prompt(1, 200)[0], torch.tensor([], dtype=torch.int64), "random letters")
    every = with_skipped_layers(plan, llama, text, LayerSelection.parse("skip-attention:3"))
    assert [type(layer.layer) for layer in every.layers] == [Skip, SkipAttention, SkipAttention]
    adaptive = with_skipped_layers(plan_with(llama, {2: Skip()}), llama, text, LayerSelection.parse("adaptive:0.8"))
    assert [type(layer.layer) for layer in adaptive.layers] == [Adaptive, Adaptive, Skip]
