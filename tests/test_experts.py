"""Mixtures of experts: what is read of them, against what they compute; policies over experts, against slow sums."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import EXPERTS, NoTokenizer, greedy, plan_of, prompt, tiny
from torch import Tensor

import coreskip
from coreskip.cli import main
from coreskip.kernels.ops import available
from coreskip.predictors.anatomy import Experts, dissect
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.errors import CoreskipError, PlanError
from coreskip.predictors.expert_policies import AllExperts, KeptExperts, SkipExperts
from coreskip.predictors.expert_scores import ExpertStats, observe_experts, routed, skipped_experts
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import SkipMLP, Static
from coreskip.predictors.routing import Choice
from coreskip.runtime.cost import bytes_per_token, cost
from coreskip.runtime.program_experts import build_experts
from coreskip.runtime.reading import read_spec
from coreskip.runtime.wrap import runtime_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def mixtures(model: Any) -> list[Experts]:
    return [experts for experts in dissect(model).experts if experts is not None]


def given_to(model: Any, ids: Tensor) -> list[tuple[Experts, Tensor, Tensor, Tensor]]:
    """What every mixture's experts are given in a dense pass: inputs, chosen experts, weights."""
    anatomy, found = dissect(model), []

    def see(layer: int, x: Tensor, index: Tensor, weights: Tensor) -> None:
        found.append((anatomy.experts[layer], x.clone(), index.clone(), weights.clone()))

    with torch.no_grad(), routed(anatomy, see):
        model(ids, use_cache=False)
    return found


def plan_with(model: Any, policy: Any) -> Plan:
    dense = Plan.dense(model)
    layers = tuple(LayerPlan(experts=policy if count else AllExperts()) for count in dense.model.experts)
    return Plan(layers, dense.model, {"method": "by hand"})


def decoded(model: Any, ids: Tensor) -> Tensor:
    """Logits of the second half of ids ``[1, length]``, token by token after a dense prefill."""
    half = ids.shape[1] // 2
    with torch.no_grad():
        out = model(ids[:, :half], use_cache=True)
        steps = [
            model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True).logits
            for i in range(half, ids.shape[1])
        ]
    return torch.cat(steps, 1)


# ---- what is read ----


@pytest.mark.parametrize("family", EXPERTS)
def test_a_mixture_computes_what_is_read_of_it(family: str) -> None:
    model = tiny(family)
    assert mixtures(model)
    for experts in mixtures(model):
        x = torch.randn(1, 7, 64)
        with torch.no_grad():
            expected = experts.block(x)
            expected = expected[0] if isinstance(expected, tuple) else expected
            seen: list[Any] = []
            handle = experts.entrance.register_forward_pre_hook(
                lambda _, args, kwargs, experts=experts, seen=seen: seen.append(experts.routed(args, kwargs)),
                with_kwargs=True,
            )
            experts.block(x)
            handle.remove()
            got = experts.mixture(*seen[0])
            if experts.shared is not None:
                shared = experts.shared.formula(x[0])
                gate = 1.0 if experts.shared_gate is None else torch.sigmoid(experts.shared_gate(x[0]))
                got = got + gate * shared
        torch.testing.assert_close(
            got.view_as(expected), expected.view(1, 7, 64).view_as(expected), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("family", EXPERTS)
def test_a_router_chooses_what_the_familys_own_does(family: str) -> None:
    model = tiny(family)
    with torch.no_grad():  # zero as they are made: what has no effect then must be read right, too
        for name, tensor in (*model.named_buffers(), *model.named_parameters()):
            if "correction" in name or "expert_bias" in name:
                tensor.normal_(0.0, 0.2)
    for experts, x, index, weights in given_to(model, prompt(2, 24)):
        mine, own = experts.router.route(x)
        order, theirs = mine.sort(-1).indices, index.sort(-1).indices
        assert torch.equal(mine.gather(1, order), index.gather(1, theirs))
        torch.testing.assert_close(own.gather(1, order), weights.gather(1, theirs).float(), rtol=1e-4, atol=1e-6)


def test_readings_say_what_differs_between_families() -> None:
    read = {family: mixtures(tiny(family))[0] for family in EXPERTS}
    assert read["lfm2_moe"].router.choice.epsilon == pytest.approx(1e-6, rel=0.1)
    assert read["deepseek_v3"].router.choice.scale == 2.5
    assert read["deepseek_v2"].router.choice.scale == 1.5
    assert read["deepseek_v3"].router.choice.group_score == "top2"
    assert read["deepseek_v2"].router.choice.group_score == "max"
    assert {f for f, e in read.items() if e.router is not None and e.router.choice.scoring == "sigmoid"} == {
        "deepseek_v3", "glm4_moe", "lfm2_moe", "dots1", "llama4",
    }  # fmt: skip
    assert not read["olmoe"].router.choice.normalised
    assert read["mixtral"].router.choice.normalised
    oss = read["gpt_oss"]
    assert (oss.gating.alpha, oss.gating.shift, oss.gating.limit) == (1.702, 1.0, 7.0)
    assert oss.layout.interleaved
    assert oss.layout.transposed
    assert oss.layout.down_bias == "down_proj_bias"
    assert read["llama4"].scaled_inputs
    assert read["llama4"].layout.transposed
    assert not read["llama4"].layout.interleaved
    assert read["qwen2_moe"].shared_gate is not None
    assert read["glm4_moe"].shared_gate is None
    assert all(e.top_k == {"qwen3_moe": 3, "olmoe": 3, "llama4": 1}.get(f, 2) for f, e in read.items())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_halves_are_read_as_they_compute(family: str) -> None:
    """DeepSeek's logits are float32 in any model, Mixtral's are the model's."""
    model = tiny(family).to(torch.bfloat16)
    assert next(experts.router.upcast for experts in mixtures(model)) == (family == "deepseek_v3")


def test_a_description_without_weights_is_the_same() -> None:
    model = tiny("qwen3_moe")
    with torch.device("meta"):
        empty = type(model)(model.config)
    here, there = read_spec(model, dissect(model)), read_spec(empty, dissect(empty, empty=True))
    for mine, theirs in zip(here.layers, there.layers, strict=True):
        assert mine.experts.router.choice == theirs.experts.router.choice
        assert mine.experts.layout == theirs.experts.layout
        assert theirs.experts.up.is_meta


def test_experts_that_compute_something_else_are_not_read() -> None:
    model = tiny("mixtral")
    experts = type(model.model.layers[1].mlp.experts)
    original = experts._apply_gate
    try:
        experts._apply_gate = lambda self, gate_up: original(self, gate_up).flip(-1)
        read = mixtures(model)[0]
        assert read.gating is None  # its own code stands for it, and the proof holds
        with pytest.raises(Exception, match="make of gate and up"):
            read_spec(model, dissect(model))
    finally:
        experts._apply_gate = original


# ---- routing with some experts left out ----


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [(1, 1, "max"), (4, 2, "max"), (4, 2, "top2")])
@pytest.mark.parametrize("normalised", [False, True])
def test_choices_are_what_sorting_says(scoring: Any, groups: Any, normalised: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, correction = torch.randn(40, 8, generator=generator), 0.3 * torch.randn(8, generator=generator)
    allowed = torch.tensor([True, False, True, True, False, True, True, True])
    choice = Choice(scoring, 2, *groups, normalised, scale=2.0)
    index, weights = choice.of(logits, correction, allowed)
    for token in range(40):
        kept = [e for e in range(8) if allowed[e]]
        exps = {e: float(logits[token, e].exp()) for e in kept}
        scores = {e: exps[e] / (sum(exps.values()) if scoring == "softmax" else 1 + exps[e]) for e in kept}
        ranks = {e: scores[e] + float(correction[e]) for e in kept}
        best = list(range(groups[0]))
        if groups[0] > 1:
            members = {g: sorted((ranks[e] for e in kept if e // 2 == g), reverse=True) for g in best}
            members = {g: found for g, found in members.items() if found}
            worth = {g: found[0] if groups[2] == "max" else sum(found[:2]) for g, found in members.items()}
            if groups[2] == "max":  # an absent expert counts as a score of 0 in its group
                worth = {g: max(w, 0.0) if len(members[g]) < 2 else w for g, w in worth.items()}
            best = sorted(worth, key=worth.__getitem__, reverse=True)[: groups[1]]
        size = 8 // groups[0]
        chosen = sorted((e for e in kept if e // size in best), key=ranks.__getitem__, reverse=True)[:2]
        total = sum(scores[e] for e in chosen) if normalised else 1.0
        expected = {e: 2.0 * scores[e] / total for e in chosen}
        got = {int(e): float(w) for e, w in zip(index[token], weights[token], strict=True) if w > 0}
        assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt_oss"])
def test_kept_experts_are_a_model_without_the_others(family: str) -> None:
    """Decode steps against a model whose other experts were cut out of its parameters."""
    model, twin = tiny(family), tiny(family)
    kept = torch.tensor([0, 2, 3, 6, 7])
    for experts in mixtures(twin):
        module, router = experts.module, experts.block.get_submodule(experts.router.weight_at[0])
        for owner in (module, router):
            for name, parameter in list(owner.named_parameters(recurse=False)):
                setattr(owner, name, torch.nn.Parameter(parameter.detach()[kept]))
            owner.num_experts = len(kept)
    ids = prompt(1, 16)
    with coreskip.wrap(model, plan_with(model, KeptExperts(kept))):
        got = decoded(model, ids)
    with torch.no_grad():
        cache = tiny(family)(ids[:, :8], use_cache=True).past_key_values  # the same dense prefill
        expected = [twin(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(8, 16)]
    torch.testing.assert_close(got, torch.cat(expected, 1), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek_v3", "gpt_oss", "qwen2_moe", "phimoe", "jamba"])
def test_skipped_experts_are_left_out_of_a_slow_sum(family: str) -> None:
    model, twin, beta = tiny(family), tiny(family), 0.999 if family == "deepseek_v3" else 0.6  # of sigmoids near 1
    ids = prompt(1, 24)
    expected, dropped = _decoded_slowly(twin, ids, beta)
    with coreskip.wrap(model, plan_with(model, SkipExperts(beta))):
        got = decoded(model, ids)
        usage = runtime_of(model).usage
        width = mixtures(model)[0].intermediate_size
        assert usage._skipped == width * sum(dropped)
    assert sum(dropped) > 0
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-3)


def _decoded_slowly(model: Any, ids: Tensor, beta: float) -> tuple[Tensor, list[int]]:
    """Decode steps whose experts are computed one token and one expert at a time, with what was dropped by layer."""
    found = mixtures(model)
    dropped, decoding = [0] * len(found), [False]
    originals = [experts.module.forward for experts in found]

    def slow(layer: int, experts: Experts) -> Any:
        def forward(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            if not decoding[0]:
                return originals[layer](x, index, weights)
            out = torch.zeros_like(x)
            for token in range(len(x)):
                pairs = [(int(e), float(w)) for e, w in zip(index[token], weights[token], strict=True)]
                stay = [(e, w) for e, w in pairs if w >= beta * max(w for _, w in pairs)]
                dropped[layer] += len(pairs) - len(stay)
                normalised = experts.router is not None and experts.router.choice.normalised
                scale = sum(w for _, w in pairs) / sum(w for _, w in stay) if normalised else 1.0
                for e, w in stay:
                    out[token] += scale * w * experts.formula(x[token : token + 1], e)[0]
            return out

        return forward

    for layer, experts in enumerate(found):
        experts.module.forward = slow(layer, experts)
    half = ids.shape[1] // 2
    with torch.no_grad():
        cache = model(ids[:, :half], use_cache=True).past_key_values
        decoding[0] = True
        steps = [
            model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(half, ids.shape[1])
        ]
    return torch.cat(steps, 1), dropped


# ---- wrapped models ----


@pytest.mark.parametrize("family", EXPERTS)
def test_dense_plans_give_the_same_tokens_and_leave_no_trace(family: str) -> None:
    model = tiny(family)
    with torch.no_grad():
        before = model(prompt()).logits
    rows, alone = greedy(model, prompt()), greedy(model, prompt(1))
    with coreskip.wrap(model):
        assert torch.equal(greedy(model, prompt()), rows)
        assert torch.equal(greedy(model, prompt(1)), alone)
    with coreskip.wrap(model, plan_with(model, SkipExperts(0.0))):
        assert torch.equal(greedy(model, prompt(1)), alone)
    with torch.no_grad():
        assert torch.equal(model(prompt()).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "jamba"])
def test_plans_over_experts_draft_for_the_dense_model(family: str) -> None:
    model = tiny(family)
    expected = greedy(model, prompt(1))
    with coreskip.wrap(model, plan_with(model, SkipExperts(0.7)), exact=True):
        assert torch.equal(greedy(model, prompt(1)), expected)
    with coreskip.wrap(model, lookup=True):
        assert torch.equal(greedy(model, prompt(1)), expected)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "lfm2_moe"])
def test_every_way_to_generate(family: str) -> None:
    model, new = tiny(family), 6
    ids = prompt(3)
    mask = torch.ones_like(ids)
    mask[0, :4], ids[0, :4] = 0, 0
    with coreskip.wrap(model, plan_with(model, SkipExperts(0.6))):
        rows = greedy(model, ids, new, attention_mask=mask)
        alone = greedy(model, ids[2:], new)
        assert torch.equal(rows[2:], alone), "what is skipped depends on the token alone"
        assert torch.equal(greedy(model, ids, new, attention_mask=mask), rows)
        sampled = greedy(model, ids, new, attention_mask=mask, do_sample=True, num_return_sequences=2)
        beams = greedy(model, ids, new, attention_mask=mask, num_beams=3, num_return_sequences=2)
        assert sampled.shape == beams.shape == (6, ids.shape[1] + new)
        first = model.generate(ids[2:], max_new_tokens=new, do_sample=False, return_dict_in_generate=True)
        turn = torch.cat([first.sequences, prompt(1, 4, seed=3)], dim=1)
        assert greedy(model, turn, new, past_key_values=first.past_key_values).shape == (1, turn.shape[1] + new)


def test_packed_mixtures_compute_what_they_did(tmp_path: Path, embedded: tuple[Any, Any]) -> None:
    """Linears are packed, experts stay as they were loaded; plans hold for both."""
    model = tiny("qwen2_moe")
    expected = greedy(model, prompt(1))
    plan = plan_with(model, SkipExperts(0.6))
    with coreskip.wrap(model, plan):
        skipping = greedy(model, prompt(1))
    coreskip.pack(model, embedded[1], tmp_path / "moe.packed", weights="as-loaded", plan=plan, progress=False)
    packed, _ = coreskip.load(tmp_path / "moe.packed")
    assert torch.equal(greedy(packed, prompt(1)), expected)
    with coreskip.wrap(packed, plan):
        assert torch.equal(greedy(packed, prompt(1)), skipping)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2", "llama4", "granitemoeshared"])
def test_shared_experts_leave_neurons_out(family: str) -> None:
    """Half of a shared expert's neurons against a model in which the others are zero."""
    model, twin = tiny(family), tiny(family)
    plan = plan_of(model, "static")
    for layer, mlp in dissect(twin).present:
        indices = plan.layers[layer].neurons.indices  # type: ignore[attr-defined]
        dropped = torch.ones(mlp.intermediate_size, dtype=torch.bool).index_fill(0, indices, False)
        with torch.no_grad():
            mlp.matrices().down[dropped] = 0.0
    ids = prompt(1)
    with torch.no_grad(), coreskip.wrap(model, plan):
        cache = model(ids, use_cache=True).past_key_values
        got = model(ids[:, :1], past_key_values=cache, use_cache=True).logits
        dense = tiny(family)
        cache = dense(ids, use_cache=True).past_key_values
        expected = twin(ids[:, :1], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4"])
def test_a_skipped_mixture_adds_nothing(family: str) -> None:
    model, twin = tiny(family), tiny(family)
    dense = Plan.dense(model)
    layer = next(i for i, count in enumerate(dense.model.experts) if count)
    layers = tuple(LayerPlan(layer=SkipMLP()) if i == layer else LayerPlan() for i in range(len(dense.layers)))
    spoilt = dissect(twin).experts[layer]
    assert spoilt is not None
    with torch.no_grad():
        for parameter in (*spoilt.module.parameters(), *(spoilt.shared.owner.parameters() if spoilt.shared else ())):
            parameter.zero_()
        ids = prompt(1)
        with coreskip.wrap(model, Plan(layers, dense.model)):
            cache = model(ids, use_cache=True).past_key_values
            got = model(ids[:, :1], past_key_values=cache, use_cache=True).logits
        cache = model(ids, use_cache=True).past_key_values
        expected = twin(ids[:, :1], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "name"), [("hunyuan_v1_moe", "wg"), ("qwen2_moe", "shared_expert_gate")])
def test_routers_are_not_rounded(family: str, name: str) -> None:
    """A plan in 4 bits leaves alone what decides about experts: it is read as it was loaded."""
    model = tiny(family)
    linear = next(module for path, module in model.named_modules() if path.endswith(name))
    seen: list[Any] = []
    with torch.no_grad(), coreskip.wrap(model, Plan.dense(model, "int4")):
        linear.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        cache = model(prompt(1), use_cache=True).past_key_values
        model(prompt(1)[:, :1], past_key_values=cache, use_cache=True)
    x, y = seen[-1]
    assert torch.equal(y, torch.nn.functional.linear(x, linear.weight))


# ---- plans ----


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_plans_over_experts_are_saved_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("qwen2_moe")
    plan = plan_with(model, KeptExperts(torch.tensor([1, 3, 4, 7])))
    static = replace(plan.layers[1], neurons=Static(torch.arange(10)), experts=SkipExperts(0.25, 0.9))
    plan = replace(plan, layers=(plan.layers[0], static, plan.layers[2]))
    plan.save(tmp_path / "a.plan")
    loaded = Plan.load(tmp_path / "a.plan")
    assert loaded.layers[1].experts == SkipExperts(0.25, 0.9)
    assert torch.equal(loaded.layers[2].experts.indices, torch.tensor([1, 3, 4, 7]))  # type: ignore[attr-defined]
    assert isinstance(loaded.layers[0].experts, AllExperts)
    assert loaded.experts == 0.75
    _, shown, _ = command(capsys, "show", str(tmp_path / "a.plan"))
    assert "75.0% of all experts" in shown
    assert "4 of 8 experts" in shown
    assert "90% of a token's (beta 0.25)" in shown
    _, document, _ = command(capsys, "show", "--json", str(tmp_path / "a.plan"))
    assert json.loads(document)["layers"][2]["experts"]["indices"] == [1, 3, 4, 7]
    loaded.check(model)


@pytest.mark.parametrize(
    ("policy", "error"),
    [
        (KeptExperts(torch.tensor([1, 8])), "out of range: 1..8 of 8"),
        (KeptExperts(torch.tensor([3, 1])), "ascending"),
        (KeptExperts(torch.tensor([], dtype=torch.int64)), "non-empty"),
        (SkipExperts(1.5), "beta is 1.5"),
        (SkipExperts(float("nan")), "beta is nan"),
        (SkipExperts(0.5, 0.0), "share is 0"),
    ],
)
def test_policies_check_their_numbers(policy: Any, error: str) -> None:
    with pytest.raises(PlanError, match=f"layer 0 of the plan: .*{error}"):
        plan_with(tiny("mixtral"), policy)


def test_plans_are_refused_where_they_do_not_fit(llama: Any) -> None:
    dense = Plan.dense(llama)
    with pytest.raises(PlanError, match="no experts to choose from"):
        replace(dense, layers=(LayerPlan(experts=SkipExperts(0.5)), *dense.layers[1:]))
    mixtral = Plan.dense(tiny("mixtral"))
    with pytest.raises(PlanError, match="no MLP to choose neurons of"):
        replace(mixtral, layers=(LayerPlan(Static(torch.arange(3))), *mixtral.layers[1:]))
    with pytest.raises(PlanError, match="experts 8 in 3 layers, this one has 4 in 3 layers"):
        mixtral.check(tiny("mixtral", num_local_experts=4))
    other = tiny("mixtral")
    with torch.no_grad():
        other.model.layers[2].mlp.experts.down_proj[0, 0, 0] += 1.0
    with pytest.raises(PlanError, match="other weights"):
        mixtral.check(other)
    llama4 = tiny("llama4")
    with pytest.raises(PlanError, match="layer 1: every expert is given every token"):
        coreskip.wrap(llama4, plan_with(llama4, SkipExperts(0.5)))
    assert not any("forward" in vars(module) for module in llama4.modules())


# ---- calibration ----


def text(tokens: int = 1500) -> TokenText:
    ids = torch.randint(5, 128, (tokens,), generator=torch.Generator().manual_seed(3))
    return TokenText(ids, torch.tensor([1]), "random")


def analyzed(model: Any, **options: Any) -> Plan:
    return coreskip.analyze(model, NoTokenizer(), text=text(), progress=False, windows=2, **options)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_statistics_are_those_of_every_token(family: str) -> None:
    model, ids = tiny(family), prompt(2, 12)
    stats = [found for found in observe_experts(model, ids.split(1), total=2, progress=False) if found is not None]
    given = given_to(model, ids[:1]), given_to(model, ids[1:])
    for layer, found in enumerate(stats):
        tokens, weighted = torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.float64)
        for experts, x, index, weights in (batch[layer] for batch in given):
            for token in range(len(x)):
                for e, w in zip(index[token].tolist(), weights[token].tolist(), strict=True):
                    tokens[e] += 1
                    weighted[e] += w * float(experts.formula(x[token : token + 1], e).norm())
        assert torch.equal(found.tokens, tokens)
        torch.testing.assert_close(found.weighted, weighted, rtol=1e-4, atol=1e-6)


def test_what_is_useless_is_left_out_by_reap_and_what_is_rare_by_frequency() -> None:
    model = tiny("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj[[2, 5]] = 0.0
    plan = analyzed(model, method="experts", keep=0.75)
    assert all(layer.experts.indices.tolist() == [0, 1, 3, 4, 6, 7] for layer in plan.layers)  # type: ignore[attr-defined]
    assert plan.recipe["score"] == "reap"
    assert plan.experts == 0.75
    often = analyzed(model, method="experts", keep=0.5, score="frequency")
    seen = observe_experts(model, text().split(0.6, 0.2, 0.2)[0].windows(512, 2).split(1), total=None, progress=False)
    assert all(layer.experts.kept(8) == 4 for layer in often.layers)
    assert all(s is not None for s in seen)
    one, two = (analyzed(model, method="experts", score="random", seed=seed) for seed in (1, 1))
    assert [a.experts.indices.tolist() for a in one.layers] == [b.experts.indices.tolist() for b in two.layers]  # type: ignore[attr-defined]
    few = analyzed(model, method="experts", keep=0.01)
    assert all(layer.experts.kept(8) == 2 for layer in few.layers), "as many as a token goes to at least"


def test_betas_keep_the_share_that_was_asked_for() -> None:
    ratios = torch.tensor([[1.0, 0.9], [1.0, 0.2], [1.0, 0.5], [1.0, 0.7]])
    stats = ExpertStats(torch.zeros(4), torch.zeros(4), [ratios])
    policy = skipped_experts(stats, 0.75)
    assert (policy.beta, policy.share) == (pytest.approx(0.7), 0.75), "the median of the second's ratios"
    assert skipped_experts(stats, 1.0) == SkipExperts(0.0, 1.0)
    assert skipped_experts(stats, 0.01).beta == 1.0, "every token's first stays"
    assert skipped_experts(stats, 0.75, beta=0.6) == SkipExperts(0.6, 0.75)
    plan = analyzed(tiny("qwen3_moe"), method="skip-experts", keep=0.6)
    assert plan.quality["neuron_sparsity"] == pytest.approx(0.4, abs=0.08)  # type: ignore[index]


def test_costs_count_the_experts_of_a_token() -> None:
    model = tiny("mixtral")
    dense = plan_with(model, AllExperts())
    expert = 3 * 64 * 160 * 4
    everything = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight[1:].nbytes
    assert bytes_per_token(model, dense) == everything - 3 * 6 * expert
    skipping = plan_with(model, SkipExperts(0.5, 0.75))
    assert bytes_per_token(model, dense) - bytes_per_token(model, skipping) == 3 * expert // 2
    assert bytes_per_token(model, plan_with(model, KeptExperts(torch.arange(4)))) == bytes_per_token(model, dense)
    assert build_experts(KeptExperts(torch.arange(1)), mixtures(model)[0]).active == 1


@pytest.mark.skipif(available("cpu") is not None, reason="the native step is not built")
def test_costs_count_experts_in_the_bits_that_are_read() -> None:
    model = tiny("mixtral")
    numbers = 3 * 64 * 160
    for weights, size in (("int4", 0.625), ("int8", 1.0625)):
        dense, skipping = (
            replace(plan_with(model, policy), weights=weights) for policy in (AllExperts(), SkipExperts(0.5, 0.75))
        )
        assert cost(model, dense).moved - cost(model, skipping).moved == 3 * numbers * size / 2
        attention = 64 * (64 + 32 + 32 + 64)
        layers = 3 * (attention + 2 * numbers) * size
        rest = cost(model, dense).moved - layers
        head = model.lm_head.weight.numel() * 1.0625
        routers = 3 * 8 * 64 * 4
        assert rest - head - routers == pytest.approx(8 * 64 * 4), "norms, and the embedding's row"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"method": "experts", "score": "griffin"}, "unknown score 'griffin' of experts"),
        ({"method": "core", "score": "reap"}, "unknown score 'reap'"),
        ({"method": "experts", "budget": "ppl+1%"}, "no search for a budget with the method experts"),
        ({"method": "skip-experts", "beta": 2.0}, "beta is 2.0"),
        ({"method": "skip-experts", "beta": 0.5, "keep": 0.5}, "keep or beta"),
        ({"method": "core", "beta": 0.5}, "beta is of the method skip-experts"),
        ({"method": "static"}, "layer 0 of this 'mixtral' model has only experts"),
    ],
)
def test_mistakes_are_refused_before_any_work(options: dict[str, Any], error: str) -> None:
    with pytest.raises(CoreskipError, match=error):
        coreskip.analyze(tiny("mixtral"), NoTokenizer(), **options)


def test_dense_models_have_no_experts_to_leave_out(llama: Any, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(CoreskipError, match="'llama' models have no experts"):
        coreskip.analyze(llama, NoTokenizer(), method="experts")
    code, _, error = command(
        capsys, "analyze", "-o", str(tmp_path / "x.plan"), "--method", "experts", "--budget", "kl<1"
    )
    assert code == 2
    assert "no search for a budget" in error
