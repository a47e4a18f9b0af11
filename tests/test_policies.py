"""Policies that choose token by token: each equals its definition, in every phase and shape that generation has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_definitions import by_definition, defined
from test_decode import COVERED, prefilled, ragged, some_tokens, spy, teacher_forced
from test_plan import rewrite
from tiny_models import greedy, prompt, tiny
from torch import Tensor

import coreskip
from coreskip import Plan, PlanError
from coreskip.kernels import cpu
from coreskip.kernels.ops import available
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.plan import LayerPlan
from coreskip.predictors.policies import (
    Bricks,
    Cats,
    Dense,
    Learned,
    Run,
    Sketch,
    SkipAttention,
    Teal,
    TopK,
    Wina,
)
from coreskip.runtime.wrap import runtime_of

KEEP = 0.5
NAMES = (
    "teal",
    "teal_all",
    "wina",
    "cats",
    "topk",
    "topk_threshold",
    "sketch",
    "sketch_threshold",
    "sketch_smooth",
    "sketch_refined",
    "signs",
    "learned",
    "bricks",
)


def plan_with(model: Any, *policies: Any) -> Plan:
    dense = Plan.dense(model)
    layers = len(dense.layers)
    chosen = policies * layers if len(policies) == 1 else policies
    return Plan(tuple(LayerPlan(policy) for policy in chosen), dense.model, {"method": "test"})


def some_policy(model: Any, name: str) -> Any:
    """A policy that leaves out about half."""
    rng = torch.Generator().manual_seed(3)
    anatomy = dissect(model)
    mlp, attention = anatomy.mlps[0], anatomy.attentions[0]
    width, hidden = mlp.intermediate_size, mlp.hidden_size
    names = [f"mlp.{n}" for n in (mlp.gate_name, mlp.up_name, mlp.down_name) if n is not None]
    if name == "teal":
        return Teal(KEEP, dict.fromkeys(names, 0.5))
    if name in ("teal_all", "wina"):
        assert attention is not None
        names += [f"attention.{n}" for n in (*attention.inputs, attention.output)]
        return (Teal if name == "teal_all" else Wina)(KEEP, dict.fromkeys(names, 0.5))
    if name == "cats":
        return Cats(KEEP, 0.4)
    mean = torch.randn(width, generator=rng) * 0.1
    norm = torch.rand(width, generator=rng) + 0.5
    if name.startswith("topk"):
        return TopK(keep=KEEP, threshold=1.0 if "threshold" in name else None, norm=norm, mean=mean)
    if name.startswith("sketch"):
        smooth = torch.rand(hidden, generator=rng) + 0.5 if "smooth" in name else None
        if "refined" in name:
            return Sketch(keep=KEEP, threshold=0.5, refine=1.0, candidates=0.7, norm=norm, mean=mean)
        threshold = 1.0 if "threshold" in name else None
        return Sketch(keep=KEEP, threshold=threshold, norm=norm, mean=mean, smooth=smooth)
    if name == "bricks":
        route, assignment = torch.randn(8, hidden, generator=rng), torch.randperm(width, generator=rng) % 8
        return Bricks(keep=KEEP, assignment=assignment, route=route, bias=torch.zeros(8), mean=mean)
    if name == "signs":
        return Sketch(keep=KEEP, bits=1)
    return Learned(
        keep=KEEP,
        threshold=0.6 if "threshold" in name else None,
        reduce=torch.randn(8, hidden, generator=rng),
        expand=torch.randn(width, 8, generator=rng),
        bias=torch.zeros(width),
        mean=mean,
    )


def bricks(assignment: Tensor, route: Tensor | None = None, threshold: float | None = None) -> Bricks:
    route = torch.ones(4, 64) if route is None else route
    return Bricks(keep=KEEP, assignment=assignment, route=route, bias=torch.zeros(4), threshold=threshold)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llama", "llama_bias", "phi3", "starcoder2", "gemma"])
def test_equals_its_definition(family: str, name: str) -> None:
    model = tiny(family)
    if name == "wina" and family == "phi3":
        pytest.skip("the stacked gate and up are one matrix: `teal` covers it")
    policy = some_policy(model, name)
    ids = prompt(2, 9)
    options: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
    with by_definition(model, policy):
        expected = greedy(model, ids, 6, **options)
    dense = greedy(model, ids, 6, **options)
    with coreskip.wrap(model, plan_with(model, policy)):
        runtime_of(model).usage.counting = True
        found = greedy(model, ids, 6, **options)
        skipped = runtime_of(model).usage.neuron_sparsity()
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        # rounding x to 8 bits may turn the last float digit into a whole step, and a step into another choice
        error = 0.2 * float((dense.logits[-1] - b).norm()) if "sketch" in name else 2e-3 * float(b.abs().max())
        assert float((a - b).norm() if "sketch" in name else (a - b).abs().max()) <= error
    assert not torch.allclose(found.logits[-1], dense.logits[-1], rtol=1e-2, atol=1e-2)
    assert 0.1 < skipped < 0.9


@pytest.mark.skipif(available("cpu") is not None, reason="needs the compiled kernels")
@pytest.mark.parametrize("name", ["sketch", "sketch_threshold", "sketch_refined", "cats"])
@pytest.mark.parametrize("family", COVERED)
def test_two_hundred_native_steps_from_ragged_prompts(family: str, name: str) -> None:
    model = tiny(family)
    policy = some_policy(model, name)
    ids, mask = ragged()
    tokens = some_tokens(2, 200)
    with torch.no_grad():
        dense = teacher_forced(model, ids, mask, tokens, each=200)
        with by_definition(model, policy):
            expected = teacher_forced(model, ids, mask, tokens, each=200)
        with coreskip.wrap(model, plan_with(model, policy)):
            found = teacher_forced(model, ids, mask, tokens, each=1)
            assert runtime_of(model).steps.native.refusal is None
    error, change = (found - expected).norm(dim=-1), (dense - expected).norm(dim=-1)
    print("ERR", family, name, float((error / change).median()), float((error / change).max()))
    assert float((error / change).median()) < 1


NATIVE = ("teal", "teal_all", "wina", "learned", "learned_threshold")


def on_modules(model: Any) -> None:
    """From now on the wrapped model's steps run on its patched modules."""
    runtime_of(model).program_for = lambda cache: "a test wants it"  # type: ignore[method-assign]


@pytest.mark.skipif(available("cpu") is not None, reason="needs the compiled kernels")
@pytest.mark.parametrize("name", ["teal_all", "wina", "learned"])
@pytest.mark.parametrize("family", COVERED)
def test_native_steps_choose_what_the_modules_choose(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    ids, mask = ragged()
    tokens = some_tokens(2, 200)
    with torch.no_grad(), coreskip.wrap(model, plan_with(model, some_policy(model, name))):
        teacher_forced(model, ids, mask, tokens[:, :2], each=1)  # the first step of a wrapping is the modules' own
        seen = spy(model, monkeypatch)
        found = teacher_forced(model, ids, mask, tokens, each=1)
        assert seen == [2] * 200
        together = teacher_forced(model, ids, mask, tokens, each=4)
        assert seen[200:] == [8] * 50
        on_modules(model)
        expected = teacher_forced(model, ids, mask, tokens, each=4)
        assert len(seen) == 250
    for logits in (found, together):
        error = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
        # a choice that rounding turns stays in the cache, and other tokens see it
        assert float(error.median()) < 1e-5
        assert float(error[:, :20].median(dim=1).values.max()) < 1e-4


@pytest.mark.skipif(available("cpu") is not None, reason="needs the compiled kernels")
@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("family", ["llama_bias", "phi3", "gemma2"])
def test_native_choices_in_half_precision(family: str, name: str) -> None:
    """As near to the same weights in fp32 as the modules are, which round between them."""
    model = tiny(family).bfloat16()
    policy, (ids, mask), tokens = some_policy(model.float(), name), ragged(), some_tokens(2, 60)
    logits = {}
    with torch.no_grad():
        for how in ("exact", "native", "modules"):
            model = model.float() if how == "exact" else model.bfloat16()
            with coreskip.wrap(model, plan_with(model, policy)):
                teacher_forced(model, ids, mask, tokens[:, :8], each=1)
                assert runtime_of(model).steps.native.ready
                if how != "native":
                    on_modules(model)
                logits[how] = teacher_forced(model, ids, mask, tokens, each=2).float()
    usual, error = ((logits[how] - logits["exact"]).norm(dim=-1).median() for how in ("modules", "native"))
    assert float(error) < 1.5 * float(usual)


@pytest.mark.parametrize("isa", cpu.supported() if available("cpu") is None else [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_columns_are_the_same_bits_however_they_are_shared_out(dtype: torch.dtype, isa: str) -> None:
    best, threads = cpu.active(), torch.get_num_threads()
    model = tiny("llama_bias").to(dtype)
    (ids, mask), tokens = ragged(), some_tokens(2, 24)
    try:
        cpu.use(isa)
        with torch.no_grad(), coreskip.wrap(model, plan_with(model, some_policy(model, "wina"))):
            for _ in range(4):  # in bf16 a first step may disagree with modules that round
                teacher_forced(model, ids, mask, tokens, each=1)
            assert runtime_of(model).steps.native.ready
            on_modules(model)
            expected = teacher_forced(model, ids, mask, tokens, each=1)
            del vars(runtime_of(model))["program_for"]
            both = prefilled(model, ids, mask)  # by torch, whose sums do depend on both
            one = copy.deepcopy(both)
            one.batch_select_indices(torch.tensor([0]))
            first = ids[:1], mask[:1], tokens[:1]
            alone = teacher_forced(model, *first, each=1, cache=copy.deepcopy(one))
            for count in (1, 3):
                torch.set_num_threads(count)
                for each in (1, 3, 4):
                    found = teacher_forced(model, ids, mask, tokens, each=each, cache=copy.deepcopy(both))
                    assert torch.equal(found[:1], alone)
                assert torch.equal(teacher_forced(model, *first, each=8, cache=copy.deepcopy(one)), alone)
    finally:
        torch.set_num_threads(threads)
        cpu.use(best)
    error = (alone - expected[:1]).float().norm(dim=-1) / expected[:1].float().norm(dim=-1)
    assert float(error.median()) < (1e-5 if dtype is torch.float32 else 0.1)


@pytest.mark.skipif(available("cpu") is not None, reason="needs the compiled kernels")
@pytest.mark.parametrize("name", [*NATIVE, "topk", "signs"])
@pytest.mark.parametrize("family", ["llama", "phi3", "starcoder2"])
def test_generate_decodes_natively(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = tiny(family), prompt(1)
    with coreskip.wrap(model, plan_with(model, some_policy(model, name))):
        greedy(model, ids, 4)
        seen = spy(model, monkeypatch)
        with caplog.at_level("DEBUG", "coreskip"):
            text = greedy(model, ids, 24)
        assert sum(seen) == (23 if name in NATIVE else 0)
        assert ("makes its choice" in caplog.text) == (name not in NATIVE)
        on_modules(model)
        assert torch.equal(greedy(model, ids, 24), text)


@pytest.mark.skipif(available("cpu") is not None, reason="needs the compiled kernels")
def test_a_native_step_of_many_policies() -> None:
    """Some linears of some layers by columns, others dense, beside predicted and sketched neurons."""
    model = tiny("llama_bias", num_hidden_layers=5)
    policies = (
        Teal(KEEP, {"mlp.down_proj": 0.5, "attention.k_proj": 0.3}),
        Dense(),
        some_policy(model, "learned"),
        Wina(KEEP, {"mlp.gate_proj": 0.5, "attention.o_proj": 0.3}),
        some_policy(model, "sketch"),
    )
    dense, (ids, mask), tokens = Plan.dense(model), ragged(), some_tokens(2, 40)
    runs = (Run(), Run(), Run(), SkipAttention(), Run())
    layers = tuple(LayerPlan(policy, run) for policy, run in zip(policies, runs, strict=True))
    with torch.no_grad(), coreskip.wrap(model, Plan(layers, dense.model, {"method": "test"})):
        runtime_of(model).usage.counting = True
        found, skipped = [], []
        for _ in range(2):
            runtime_of(model).usage.reset()
            found.append(teacher_forced(model, ids, mask, tokens, each=2))
            assert runtime_of(model).steps.native.ready
            skipped.append(runtime_of(model).usage.neuron_sparsity())
            on_modules(model)
    error = (found[0] - found[1]).norm(dim=-1) / found[1].norm(dim=-1)
    assert float(error.median()) < 1e-4
    assert skipped[0] == pytest.approx(skipped[1], abs=0.005)


@pytest.mark.skipif(available("cpu") is not None, reason="needs the compiled kernels")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["sketch_threshold", "sketch_refined", *NATIVE])
def test_the_native_step_counts_what_the_modules_count(name: str, rows: int) -> None:
    model = tiny("llama")
    shares = []
    with coreskip.wrap(model, plan_with(model, some_policy(model, name))):
        for options in ({}, {"output_hidden_states": True, "return_dict_in_generate": True}):
            usage = runtime_of(model).usage
            usage.counting = True
            usage.reset()
            greedy(model, prompt(rows, 9), 8, **options)
            shares.append(usage.neuron_sparsity())
        assert runtime_of(model).steps.native.ready
    assert shares[0] == pytest.approx(shares[1], abs=0.005)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith(("teal", "wina"))])
@pytest.mark.parametrize("family", ["llama_bias", "starcoder2"])
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_one_mlp_equals_its_definition(family: str, name: str, rows: int) -> None:
    model = tiny(family)
    policy = some_policy(model, name)
    layer = dissect(model).mlps[1]
    x = torch.randn(rows, layer.hidden_size, generator=torch.Generator().manual_seed(5))
    with coreskip.wrap(model, plan_with(model, policy)), torch.no_grad():
        found, kept = runtime_of(model).prepared.mlp(1).run(x, counting=True)
        expected = defined(policy, layer, x)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert kept is not None
    assert 0.1 * rows * layer.intermediate_size < kept < 0.9 * rows * layer.intermediate_size


@pytest.mark.parametrize("family", ["opt", "gpt2", "bloom"])
@pytest.mark.parametrize("name", NAMES)
def test_plain_mlps_run_every_policy(family: str, name: str) -> None:
    """Where the MLP has no module of its own, or keeps its weights transposed."""
    model = tiny(family)
    policy = some_policy(model, name)
    options: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
    dense = greedy(model, prompt(), 6, **options)
    with coreskip.wrap(model, plan_with(model, policy)):
        sparse = greedy(model, prompt(), 6, **options)
        alone = greedy(model, prompt()[:1], 6)
    assert torch.equal(sparse.sequences[:1], alone)
    assert torch.allclose(sparse.logits[0], dense.logits[0], rtol=1e-4, atol=1e-4), "prefill is dense"
    assert not torch.allclose(sparse.logits[1], dense.logits[1], rtol=1e-3, atol=1e-3)
    assert torch.equal(greedy(model, prompt(), 6), dense.sequences)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_and_beams_choose_for_themselves(llama: Any, name: str) -> None:
    plan = plan_with(llama, some_policy(llama, name))
    ids = prompt(3, 8)
    with coreskip.wrap(llama, plan):
        together = greedy(llama, ids, 8)
        for row in range(3):
            assert torch.equal(together[row : row + 1], greedy(llama, ids[row : row + 1], 8))
        beams = greedy(llama, ids, 8, num_beams=3)
        for row in range(3):
            assert torch.equal(beams[row : row + 1], greedy(llama, ids[row : row + 1], 8, num_beams=3))
        many = greedy(llama, ids.repeat(4, 1), 8)  # more rows than the native kernels take
        assert torch.equal(many, together.repeat(4, 1))


@pytest.mark.parametrize("name", NAMES)
def test_low_precision_and_moving_the_model(llama: Any, name: str) -> None:
    plan = plan_with(llama, some_policy(llama, name))
    with coreskip.wrap(llama, plan):
        greedy(llama, prompt(), 3)
        llama.to(torch.bfloat16)
        assert greedy(llama, prompt(), 3).shape == (2, 12)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_exact_zeros_of_relu_cost_nothing(family: str) -> None:
    """A threshold just above zero leaves out what ReLU made zero: the logits stay, most of the work goes."""
    model = tiny(family, **({"hidden_act": "relu"} if family == "llama" else {}))
    natural = []
    with torch.no_grad():
        for layer in dissect(model).mlps:
            first = layer.up if layer.gate_name is None else getattr(layer.owner, layer.gate_name)
            if first.bias is None:
                first.weight[::2] -= 5.0 * first.weight[::2].abs()  # half of the neurons: mostly below zero
            else:
                first.bias.sub_(4.0)
    policy = Cats(0.2, torch.finfo(torch.float32).tiny)
    options: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
    dense = greedy(model, prompt(), 8, **options)
    with coreskip.wrap(model, plan_with(model, policy)):
        runtime_of(model).usage.counting = True
        sparse = greedy(model, prompt(), 8, **options)
        natural.append(runtime_of(model).usage.neuron_sparsity())
    assert torch.equal(sparse.sequences, dense.sequences)
    for a, b in zip(sparse.logits, dense.logits, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    assert natural[0] > 0.4


# ---- the policies in a plan ----


@pytest.mark.parametrize("name", NAMES)
def test_plans_keep_them(llama: Any, tmp_path: Path, name: str) -> None:
    policy = some_policy(llama, name)
    plan = plan_with(llama, policy)
    plan.save(tmp_path / "p.plan")
    again = Plan.load(tmp_path / "p.plan")
    assert str(again) == str(plan)
    assert again.keep == pytest.approx(KEEP)
    for layer in again.layers:
        assert type(layer.neurons) is type(policy)
        for field, value in vars(policy).items():
            found = getattr(layer.neurons, field)
            assert torch.equal(found, value) if isinstance(value, Tensor) else found == value
    with coreskip.wrap(llama, plan):
        expected = greedy(llama, prompt(), 4)
    with coreskip.wrap(llama, again):
        assert torch.equal(greedy(llama, prompt(), 4), expected)


@pytest.mark.parametrize(
    ("policy", "match"),
    [
        (Teal(0.5, {"act": 1.0}), "makes no sense"),
        (Wina(0.5, {}), "an entry per linear"),
        (Cats(0.5, float("nan")), "a threshold is nan"),
        (Cats(0.5, -1.0), "a threshold is -1"),
        (TopK(keep=0.0), "keep is 0"),
        (TopK(keep=0.5, mean=torch.zeros(3)), "mean is not fp32 of shape"),
        (TopK(keep=0.5, norm=torch.full((160,), torch.inf)), "not a finite number"),
        (Sketch(keep=0.5, bits=3), "sketch of 3 bits"),
        (Sketch(keep=0.5, bits=1, norm=torch.ones(160)), "neither norms nor smoothed"),
        (Sketch(keep=0.5, threshold=0.1, refine=0.2), "a refined sketch has"),
        (Sketch(keep=0.5, refine=0.2, candidates=0.6), "a refined sketch has"),
        (Sketch(keep=0.5, threshold=0.1, refine=float("inf"), candidates=0.6), "a threshold is inf"),
        (Sketch(keep=0.5, threshold=0.1, refine=0.2, candidates=1.1), "candidates is 1.1"),
        (Sketch(keep=0.5, threshold=0.1, refine=0.2, candidates=0.4), "of 0.4 candidates 0.5 cannot be kept"),
        (Sketch(keep=0.5, smooth=torch.ones(63)), "reads 63 inputs"),
        (Sketch(keep=0.5, smooth=torch.zeros(64)), "not above 0"),
        (Sketch(keep=0.5, norm=torch.ones(160).double()), "norm is not fp32"),
        (Learned(keep=0.5, reduce=torch.ones(2, 7), expand=torch.ones(160, 2), bias=torch.ones(160)), "reads 7 inputs"),
        (Learned(keep=0.5, reduce=torch.ones(2, 64), expand=torch.ones(160, 3), bias=torch.ones(160)), "expand is not"),
        (bricks(torch.arange(160) % 4, route=torch.ones(4, 7)), "reads 7 inputs"),
        (bricks(torch.arange(160) % 5), "neurons in bricks 0..4 of 4"),
        (bricks(torch.arange(159) % 4), "assignment is not int64"),
        (bricks(torch.arange(160) % 4, threshold=0.5), "not those above a threshold"),
    ],
)
def test_senseless_policies(llama: Any, policy: Any, match: str) -> None:
    with pytest.raises(PlanError, match=match):
        plan_with(llama, policy)


def test_an_unknown_linear_is_noticed_before_anything_is_patched(llama: Any) -> None:
    plan = plan_with(llama, Teal(0.5, {"mlp.fc7": 0.1}))
    before = llama.model.forward
    with pytest.raises(PlanError, match="no linear mlp"):
        coreskip.wrap(llama, plan)
    assert llama.model.forward == before


@pytest.mark.parametrize(
    "edit",
    [
        lambda n: n.update(bits=2),
        lambda n: n.update(keep="much"),
        lambda n: n.update(threshold=[1]),
        lambda n: n.update(mean=3),
        lambda n: n.pop("keep"),
        lambda n: n.update(unheard_of=1),
    ],
)
def test_damaged_files(llama: Any, tmp_path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    plan_with(llama, Sketch(keep=0.5)).save(tmp_path / "p.plan")
    rewrite(tmp_path / "p.plan", lambda document: edit(document["layers"][0]["neurons"]))
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "p.plan")


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_learned_scores_beyond_where_a_sigmoid_is_one(rows: int) -> None:
    """In float32 that is 17: the neurons with the greatest scores, not the first of those that are large."""
    model = tiny("llama")
    policy = replace(some_policy(model, "learned"), expand=40 * some_policy(model, "learned").expand)
    layer = dissect(model).mlps[1]
    x = torch.randn(rows, layer.hidden_size, generator=torch.Generator().manual_seed(5))
    with coreskip.wrap(model, plan_with(model, policy)), torch.no_grad():
        found, _ = runtime_of(model).prepared.mlp(1).run(x)
        expected = defined(policy, layer, x)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
