"""The budget search: holds what it promises, says so where it cannot, can be stopped and goes on."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from packed_models import tokenizer
from test_analyze import run, text
from test_policies import plan_with, some_policy
from tiny_models import NoTokenizer, greedy, plan_of, prompt, tiny

import coreskip
from coreskip import CoreskipError, Plan, PlanError
from coreskip.bench import budget as benchmark
from coreskip.kernels.ops import available
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.expert_policies import SkipExperts
from coreskip.predictors.four_bits import Form
from coreskip.predictors.plan import LayerPlan
from coreskip.predictors.policies import Adaptive, Run, Sketch, Skip, SkipAttention, SkipMLP, Static
from coreskip.runtime.calibrate import Study
from coreskip.runtime.cost import bytes_per_token, cost, predicted_seconds, read_bandwidth, runs_natively
from coreskip.runtime.families import FAST, outline
from coreskip.runtime.search import FAMILIES, Family, Journal, pareto
from coreskip.runtime.step_timing import StepClock
from coreskip.runtime.wrap import is_wrapped, runtime_of

needs_kernels = pytest.mark.skipif(available("cpu") is not None, reason="the native step is not built")


@pytest.fixture(autouse=True)
def _time_as_bytes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of timings, which differ from run to run."""
    monkeypatch.setattr(
        StepClock, "seconds", lambda self, plans: [cost(self._model, plan).weighed / 1e9 for plan in plans]
    )


def budgeted(model: Any, budget: str, **options: Any) -> Plan:
    return run(model, budget=budget, tokens=600, **options)


def test_a_generous_budget_takes_the_fewest_bytes(llama: Any) -> None:
    plan = budgeted(llama, "kl<100", fast=True)
    assert plan.recipe["budget"] == "kl<100"
    dense = bytes_per_token(llama, Plan.dense(llama))
    assert bytes_per_token(llama, plan) < 0.5 * dense
    assert plan.quality is not None
    assert 0 < plan.quality["kl"] < 100
    assert plan.frontier
    predicted = [row["milliseconds"] for row in plan.frontier]
    losses = [row["kl"] for row in plan.frontier]
    assert predicted == sorted(predicted)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("budget", "measure", "limit"),
    [("agreement>0.8", "top1_agreement", 0.8), ("kl<0.5", "kl", 0.5), ("ppl+60%", "ppl_increase", 0.6)],
)
def test_budgets_hold_on_the_text_checked(llama: Any, budget: str, measure: str, limit: float) -> None:
    plan = budgeted(llama, budget, method="sketch")
    assert plan.quality is not None
    found = plan.quality[measure]
    assert found >= limit if measure == "top1_agreement" else found <= limit
    assert plan.keep < 1


@needs_kernels
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_mixtures_are_searched_for_experts_to_skip(family: str) -> None:
    """Neurons of shared experts, which would run on the modules, are not what wins."""
    model = tiny(family)
    plan = budgeted(model, "kl<100", method="skip-experts")
    assert plan.recipe["method"] == "skip-experts"
    assert plan.recipe["budget"] == "kl<100"
    shares = [layer.experts.share for layer in plan.layers if isinstance(layer.experts, SkipExperts)]
    assert shares
    assert max(shares) < 0.6, "of two experts a token about one is left"
    assert bytes_per_token(model, plan) < bytes_per_token(model, Plan.dense(model, plan.weights))
    best = budgeted(model, "kl<0.5", fast=True)
    assert {row["name"].split()[0] for row in best.frontier} <= {"dense", "skip-experts", "skip"}
    assert predicted_seconds(model, best) <= predicted_seconds(model, Plan.dense(model))
    static = plan_with(model, Static(torch.arange(40))) if family == "qwen2_moe" else None
    assert static is None or not runs_natively(dissect(model), static)


def test_nothing_within_the_budget_is_said_plainly(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "coreskip"):
        plan = budgeted(llama, "kl<1e-9", method="static")
    assert "no plan found within kl<1e-9 is faster than dense" in caplog.text
    assert plan.keep == 1.0
    assert plan.recipe["method"] == "dense"
    assert plan.frontier, "what was tried is kept"


def test_one_method_alone(llama: Any) -> None:
    plan = budgeted(llama, "kl<100", method="threshold")
    assert plan.recipe["method"] == "threshold"
    assert {row["name"].split()[0] for row in plan.frontier} == {"threshold"}


def test_a_search_goes_on_where_it_was_stopped(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "search.jsonl"
    whole = budgeted(llama, "kl<0.5", fast=True)
    measured: list[Any] = []
    original = Study.measure

    def counted(self: Study, plan: Plan, part: str = "checked", windows: int | None = None) -> dict[str, Any]:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(part)
        return original(self, plan, part, windows)

    monkeypatch.setattr(Study, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        budgeted(llama, "kl<0.5", fast=True, resume=file)
    assert sum(" seconds " not in line for line in file.read_text().splitlines()) == 2
    with file.open("a") as handle:
        handle.write('{"key": "cut of')  # the line that was being written
    measured.clear()
    monkeypatch.setattr(
        Study, "measure", lambda self, plan, *about: measured.append(plan) or original(self, plan, *about)
    )
    again = budgeted(llama, "kl<0.5", fast=True, resume=file)
    assert str(again) == str(whole)
    assert measured
    lines = file.read_text()
    measured.clear()
    assert str(budgeted(llama, "kl<0.5", fast=True, resume=file)) == str(whole)
    assert not measured

    def stopped(self: Study, plan: Plan, *about: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Study, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):  # another study starts anew, with its first measurement
        budgeted(llama, "kl<0.5", fast=True, resume=file, seed=1)
    assert file.read_text() == lines


def test_a_foreign_file_is_no_search(llama: Any, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("dear diary\nnothing\n")
    with pytest.raises(CoreskipError, match="line 1 of"):
        budgeted(llama, "kl<1", resume=file)
    with pytest.raises(CoreskipError, match="is a folder"):
        Journal(tmp_path)
    with pytest.raises(CoreskipError, match="there is no folder"):
        Journal(tmp_path / "nowhere" / "x")


def test_pareto(llama: Any) -> None:
    plans = pareto(
        llama, NoTokenizer(), text=text(), tokens=600, windows=2, keeps=(0.7, 0.4), fast=True, progress=False
    )
    assert len(plans) >= 2
    assert all(plan.quality is not None for plan in plans)
    times = [cost(llama, plan).weighed for plan in plans]
    assert times == sorted(times)
    assert {plan.weights for plan in plans} >= {"int4"}
    losses = [plan.quality["kl"] for plan in plans]  # type: ignore[index]
    assert losses == sorted(losses, reverse=True)
    for plan in plans:
        assert plan.frontier[0]["keep"] == plan.recipe.get("keep", 1.0)


def test_families_are_told_apart() -> None:
    assert len({family.label for family in FAMILIES}) == len(FAMILIES)


def test_every_form_of_four_bits_is_looked_at(llama: Any) -> None:
    """Each as what its calibration makes, in bytes."""
    found = {form: family for family in FAST if (form := replace(family, weights="int4").form) is not None}
    assert set(found) == set(Form)
    plan = replace(Plan.dense(llama, "int4"), layers=outline(found[Form.ROWS], 0.5, dissect(llama)))
    whole, kept = 160 * 64, 80 * 64
    saved = bytes_per_token(llama, Plan.dense(llama, "int4")) - bytes_per_token(llama, plan)
    assert saved == len(plan.layers) * 0.5 * (whole - kept)


def test_the_frontier_is_kept_and_shown(llama: Any, tmp_path: Path) -> None:
    plan = budgeted(llama, "kl<100", fast=True)
    plan.save(tmp_path / "p.plan")
    again = Plan.load(tmp_path / "p.plan")
    assert again.frontier == plan.frontier
    assert "MB/token" in str(again)
    assert plan.frontier[0]["name"] in str(again)
    from test_plan import rewrite

    rewrite(tmp_path / "p.plan", lambda d: d["frontier"][0].pop("kl"))
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "p.plan")
    rewrite(tmp_path / "p.plan", lambda d: d.pop("frontier"))
    assert Plan.load(tmp_path / "p.plan").frontier == ()


# ---- bytes and time ----


def test_bytes_are_those_of_the_packed_weights(llama: Any) -> None:
    """By hand, for a layer of hidden size 64 and 160 neurons in fp32."""
    dense = bytes_per_token(llama, Plan.dense(llama))
    linears = [m for m in llama.modules() if isinstance(m, torch.nn.Linear)]
    norms = sum(p.numel() for n, p in llama.named_parameters() if "norm" in n)
    assert dense == 4 * (sum(m.weight.numel() for m in linears) + norms + 64)  # and one token's embedding
    mlp = 3 * 160 * 64 * 4

    def saved(policy: Any) -> float:
        return (dense - bytes_per_token(llama, plan_with(llama, policy))) / 3

    assert saved(Sketch(keep=0.5)) == mlp - (160 * 64 + 80 * (64 + 64))
    refined = some_policy(llama, "sketch_refined")  # completes 70 % of the neurons, keeps 50 %
    assert saved(refined) == mlp - (160 * 64 + 112 * 64 + 80 * 64)
    assert saved(some_policy(llama, "topk")) == 80 * 64 * 4
    assert saved(some_policy(llama, "cats")) == 80 * 64 * 4 * 2
    assert saved(some_policy(llama, "teal")) == mlp / 2
    assert saved(some_policy(llama, "teal_all")) == mlp / 2 + 4 * (2 * 64 * 64 + 2 * 64 * 32) / 2
    assert saved(some_policy(llama, "learned")) == mlp / 2 - 8 * (64 + 160) * 4
    assert dense - bytes_per_token(llama, plan_of(llama, "static")) == 3 * mlp / 2
    assert bytes_per_token(llama, plan_of(llama, "griffin")) == bytes_per_token(llama, plan_of(llama, "static"))


@pytest.mark.parametrize("weights", ["int8", "int4", None])
@needs_kernels
def test_bytes_of_weight_formats_are_those_that_are_packed(embedded: tuple[Any, Any], weights: str | None) -> None:
    model = embedded[0]
    plan = Plan.dense(model, weights)
    with coreskip.wrap(model, plan):
        ids = torch.tensor([[5, 6, 7]])
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        packed, _ = runtime_of(model).steps.native.packed_bytes()
    assert bytes_per_token(model, plan) == pytest.approx(packed, rel=0.002)


@needs_kernels
def test_bytes_of_what_no_format_changes(llama: Any) -> None:
    """The MLPs of policies that choose token by token, natively or on the modules, have formats of their own."""

    def read(policy: Any, weights: str | None) -> int:
        return bytes_per_token(llama, replace(plan_with(llama, policy), weights=weights))

    head = llama.lm_head.weight.numel()
    rest = head + sum(p.numel() for n, p in llama.named_parameters() if p.ndim == 2 and "attn" in n)
    policies = {name: some_policy(llama, name) for name in ("cats", "teal", "teal_all", "learned", "signs", "topk")}
    for name, policy in {**policies, "sketch": Sketch(keep=0.5)}.items():
        changed = head if name == "teal_all" else rest  # columns have no other format
        assert read(policy, None) - read(policy, "int8") == pytest.approx(changed * (4 - 1 - 1 / 16), rel=1e-6)


def test_time_is_bytes_over_bandwidth_and_dearer_where_neurons_are_chosen() -> None:
    model = tiny("llama")
    assert read_bandwidth("cpu") > 1e8
    dense, sparse = Plan.dense(model), plan_with(model, Sketch(keep=0.3))
    assert predicted_seconds(model, sparse) < predicted_seconds(model, dense)
    assert predicted_seconds(model, dense) == bytes_per_token(model, dense) / read_bandwidth("cpu")
    assert cost(model, sparse).weighed > cost(model, sparse).moved
    on_modules = plan_with(model, some_policy(model, "topk"))
    assert cost(model, on_modules).weighed > cost(model, on_modules).moved + 1e7


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
@pytest.mark.parametrize("policy", [Skip(), SkipAttention(), SkipMLP()], ids=lambda p: p.name)
@needs_kernels
def test_bytes_of_layers_left_out_are_those_that_the_step_does_not_read(
    embedded: tuple[Any, Any], policy: Run, weights: str | None
) -> None:
    model = embedded[0]
    dense = Plan.dense(model, weights)
    plan = replace(dense, layers=(LayerPlan(layer=policy), *dense.layers[1:]))
    with coreskip.wrap(model, plan):
        ids = torch.tensor([[5, 6, 7]])
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        runtime = runtime_of(model)
        described = runtime.steps.native.described
        assert described is not None
        full = described.model.base.layers[0]
        made = [step.model.layers[0] for step, _ in described.steps.values()]  # of prompts, and of the plan
        step = next(layer for layer in made if layer.entries_only or layer.mlp is None)
    attention, mlp = full.attention, full.mlp
    unread = [attention.q, attention.o] if step.entries_only else []
    unread += [mlp.gate, mlp.up, mlp.down] if step.mlp is None else []
    assert unread
    fewer = bytes_per_token(model, dense) - bytes_per_token(model, plan)
    assert fewer == pytest.approx(sum(matrix.nbytes for matrix in unread), rel=0.002)


def test_neurons_of_an_mlp_that_is_left_out_cost_nothing(llama: Any) -> None:
    plan = plan_with(llama, Sketch(keep=0.5))
    dense = Plan.dense(llama)
    without = replace(plan, layers=tuple(replace(layer, layer=SkipMLP()) for layer in plan.layers))
    assert bytes_per_token(llama, without) == bytes_per_token(llama, dense) - 3 * 3 * 160 * 64 * 4
    assert cost(llama, without).weighed == cost(llama, without).moved
    adaptive = replace(dense, layers=tuple(LayerPlan(layer=Adaptive(0.5)) for _ in dense.layers))
    assert bytes_per_token(llama, adaptive) == bytes_per_token(llama, dense)


# ---- layers ----


def with_idle_halves(*idle: tuple[int, str]) -> Any:
    """A model of four layers, of which some attentions and MLPs add nothing: the weights of their outputs are zero."""
    model = tiny("llama", num_hidden_layers=4)
    with torch.no_grad():
        for index, half in idle:
            layer = model.model.layers[index]
            (layer.self_attn.o_proj if half == "attention" else layer.mlp.down_proj).weight.zero_()
    return model


def test_a_layer_that_does_nothing_is_found_and_left_out() -> None:
    model = with_idle_halves((1, "attention"), (1, "mlp"))
    plan = budgeted(model, "kl<0.00001", method="layers")
    assert [type(layer.layer) for layer in plan.layers] == [Run, Skip, Run, Run]
    assert plan.recipe["method"] == "layers"
    assert plan.recipe["leave"] == "layers"
    assert plan.weights is None, "random weights lose more than this by rounding"
    assert "+ skip" in str(plan)
    assert any(row["name"] == "skip layers" for row in plan.frontier)
    with coreskip.wrap(model, plan):
        greedy(model, prompt(), 4)


@pytest.mark.parametrize(("half", "policy"), [("attention", SkipAttention), ("mlp", SkipMLP)])
def test_halves_that_do_nothing_are_left_out_where_no_whole_layer_may_be(half: str, policy: type[Run]) -> None:
    model = with_idle_halves((0, half), (2, half))
    plan = budgeted(model, "kl<0.00001", fast=True)
    assert [type(layer.layer) for layer in plan.layers] == [policy, Run, policy, Run]


def test_layers_are_not_calibrated_for_where_they_cannot_win(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("coreskip.runtime.calibrate.half_losses", lambda *about, **options: asked.append(about))
    monkeypatch.setattr("coreskip.runtime.search._Search._can_win", lambda self, family, keep: family.method == "dense")
    assert budgeted(llama, "kl<100").recipe["method"] == "dense"
    assert not asked


@needs_kernels
def test_what_fails_by_far_is_not_tried_with_less_kept_in_other_weights(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense int4 holds; without a layer it is three times the budget away: int8 without two is not measured."""
    measured: list[tuple[str | None, int]] = []

    def judged(self: Study, plan: Plan, part: str = "checked", windows: int | None = None) -> dict[str, Any]:
        skipped = sum(isinstance(layer.layer, Skip) for layer in plan.layers)
        measured.append((plan.weights, skipped))
        figures = {"kl": 0.9 + 2.1 * skipped, "ppl_increase": 0.0, "ppl_increase_stderr": 0.0, "tokens": 1}
        return {**figures, "top1_agreement": 1.0, "neuron_sparsity": 0.0}

    monkeypatch.setattr(Study, "measure", judged)
    only = Family("layers", {"leave": "layers"})
    monkeypatch.setattr("coreskip.runtime.search._Search.families", lambda self: [only])
    assert budgeted(llama, "kl<1").weights == "int4"
    assert ("int4", 1) in measured
    assert not [weights for weights, skipped in measured if skipped and weights != "int4"]


def test_a_search_for_layers_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = with_idle_halves((3, "mlp")), tmp_path / "search.jsonl"
    plan = budgeted(model, "kl<0.00001", method="layers", resume=file)
    monkeypatch.setattr(Study, "measure", lambda *about: pytest.fail("measured again"))
    assert str(budgeted(model, "kl<0.00001", method="layers", resume=file)) == str(plan)
    plan.save(tmp_path / "p.plan")
    assert str(Plan.load(tmp_path / "p.plan")) == str(plan)


# ---- weights in fewer bits ----


@needs_kernels
def test_weights_in_fewer_bits_win_where_they_hold(llama: Any) -> None:
    """Random weights lose much by int4 and little by int8: nothing that leaves neurons out is as close, and as fast."""
    plan = budgeted(llama, "kl<0.007", fast=True)
    assert plan.weights == "int8"
    assert plan.recipe["method"] == "dense"
    assert plan.frontier[0]["name"] == "dense int4"
    assert plan.frontier[-1]["name"] == "dense int8"
    assert "weights      int8" in str(plan)
    assert budgeted(llama, "kl<0.05", method="sketch").recipe["method"] == "sketch"


@needs_kernels
def test_the_model_must_be_one_that_the_native_step_covers() -> None:
    plan = budgeted(tiny("doge"), "kl<0.05", fast=True)
    assert plan.weights is None


@needs_kernels
def test_a_search_in_given_weights_stays_in_them(llama: Any) -> None:
    plan = budgeted(llama, "kl<100", method="static", weights="int8", fast=True)
    assert (plan.weights, plan.recipe["method"]) == ("int8", "static")
    assert {row["name"] for row in plan.frontier} == {"static int8"}
    none = budgeted(llama, "kl<1e-9", method="static", weights="int8", fast=True)
    assert (none.weights, none.recipe["method"]) == ("int8", "dense")


@needs_kernels
def test_a_winner_that_fails_the_check_gives_way(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Study.measure

    def harsh(self: Study, plan: Plan, part: str = "checked", windows: int | None = None) -> dict[str, Any]:
        found = original(self, plan, part, windows)
        return {**found, "kl": 9.0} if part == "checked" and plan.recipe["method"] == "dense" else found

    monkeypatch.setattr(Study, "measure", harsh)
    plan = budgeted(llama, "kl<5", fast=True)
    assert plan.recipe["method"] != "dense"
    assert plan.quality is not None
    assert plan.quality["kl"] <= 5


# ---- the benchmark of searches ----


class Letters(NoTokenizer):
    def __call__(self, text: str, **options: Any) -> Any:
        return SimpleNamespace(input_ids=[5 + ord(letter) % 100 for letter in text])


def test_the_benchmark_goes_on_from_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, rows, plans = tmp_path / "text.txt", tmp_path / "rows.jsonl", tmp_path / "plans"
    text.write_text("".join(chr(97 + letter) for letter in prompt(1, 4000)[0].tolist()))
    monkeypatch.setattr(benchmark, "load", lambda **options: (tiny("llama"), Letters()))
    searched: list[str] = []
    original = benchmark.search

    def counted(study: Study, limit: Any, method: str, **options: Any) -> Plan:
        searched.append(f"{limit.text}, {method}")
        if len(searched) == 3:
            raise KeyboardInterrupt
        return original(study, limit, method, **options)

    monkeypatch.setattr(benchmark, "search", counted)
    words = [str(text), "--rows", str(rows), "--plans", str(plans), "--fast", "--windows", "2"]
    wanted = ["--budget", "kl<0.5", "--budget", "kl<100", "--method", "static", "--method", "auto"]
    assert CliRunner().invoke(benchmark.main, words + wanted).exit_code == 1
    before = rows.read_text()
    assert len(before.splitlines()) == 2
    result = CliRunner().invoke(benchmark.main, words + wanted)
    assert result.exit_code == 0, result.output
    assert searched == ["kl<0.5, static", "kl<0.5, auto", "kl<100, static", "kl<100, static", "kl<100, auto"]
    assert rows.read_text().startswith(before)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert all(row["search_s"] >= 0 and row["frontier"] > 0 and row["windows"] == 2 for row in found)
    for index, row in enumerate(found):
        assert Plan.load(plans / f"{index}.plan").recipe["budget"] == row["budget"]
    result = CliRunner().invoke(benchmark.main, [*words[:-1], "3"])
    assert isinstance(result.exception, CoreskipError)
    assert "rows of another command" in str(result.exception)


def test_what_reads_little_less_is_timed(llama: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A plan that reads less than another, and takes longer, is not chosen."""
    asked: list[list[Plan]] = []

    def seconds(self: StepClock, plans: list[Plan]) -> list[float]:
        asked.append(list(plans))
        return [1.0 if plan.keep == 1 else 2.0 for plan in plans]

    monkeypatch.setattr(StepClock, "seconds", seconds)
    file = tmp_path / "search.jsonl"
    plan = budgeted(llama, "kl<0.5", fast=True, resume=file)
    assert asked
    assert plan.keep == 1
    count = len(asked)
    assert str(budgeted(llama, "kl<0.5", fast=True, resume=file)) == str(plan)
    assert len(asked) == count


def test_a_clock_times_plans_in_turn(llama: Any) -> None:
    plans = [Plan.dense(llama), Plan.dense(llama, "int4"), plan_of(llama, "static")]
    found = StepClock(llama, prompt(1, 9)).seconds(plans)
    assert len(found) == 3
    assert all(0 < one < 1 for one in found)
    assert not is_wrapped(llama)


@needs_kernels
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_every_family_has_weights_to_run_in(llama: Any, weights: str) -> None:
    """Gates need 4 bits: in others they are no family."""
    plans = pareto(llama, NoTokenizer(), keeps=[0.5], weights=weights, text=text(), tokens=400, windows=1, fast=True)
    names = {row["name"] for row in plans[0].frontier}
    assert all(weights in name for name in names)
    assert all(plan.weights == weights for plan in plans)


@needs_kernels
def test_a_packed_model_is_searched_in_its_own_format(tmp_path: Path) -> None:
    coreskip.pack(tiny("llama"), tokenizer(), tmp_path / "packed", weights="int4", progress=False)
    model, _ = coreskip.load(tmp_path / "packed")
    plan = budgeted(model, "kl<2", fast=True)
    assert plan.weights in (None, "packed")
