"""The budget search: holds what it promises, says so where it cannot, can be stopped and goes on."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_policies import plan_with, some_policy
from test_tune import NoTokenizer, run, text
from tiny_models import plan_of, tiny

import coreskip
from coreskip import CoreskipError, Plan, PlanError
from coreskip.kernels.ops import available
from coreskip.predictors.plan import Sketch
from coreskip.runtime.cost import bytes_per_token, cost, predicted_seconds, read_bandwidth
from coreskip.runtime.search import FAMILIES, Journal, pareto
from coreskip.runtime.tune import Study
from coreskip.runtime.wrap import runtime_of

needs_kernels = pytest.mark.skipif(available("cpu") is not None, reason="the native step is not built")


def budgeted(model: Any, budget: str, **options: Any) -> Plan:
    return run(model, budget=budget, tokens=600, **options)


def test_a_generous_budget_takes_the_fewest_bytes(llama: Any) -> None:
    plan = budgeted(llama, "kl<100")
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


def test_nothing_within_the_budget_is_said_plainly(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "coreskip"):
        plan = budgeted(llama, "kl<0", method="static")
    assert "no plan found within kl<0 is faster than dense" in caplog.text
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
    assert len(file.read_text().splitlines()) == 2
    with file.open("a") as handle:
        handle.write('{"key": "cut of')  # the line that was being written
    measured.clear()
    monkeypatch.setattr(
        Study, "measure", lambda self, plan, *about: measured.append(plan) or original(self, plan, *about)
    )
    again = budgeted(llama, "kl<0.5", fast=True, resume=file)
    assert str(again) == str(whole)
    everything = len(measured) + 2
    measured.clear()
    assert str(budgeted(llama, "kl<0.5", fast=True, resume=file)) == str(whole)
    assert not measured
    budgeted(llama, "kl<0.5", fast=True, resume=file, seed=1)
    assert len(measured) >= everything - 2, "another study starts anew"


def test_a_foreign_file_is_no_search(llama: Any, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("dear diary\nnothing\n")
    with pytest.raises(CoreskipError, match="line 1 of"):
        budgeted(llama, "kl<1", resume=file)
    with pytest.raises(CoreskipError, match="cannot read"):
        Journal(tmp_path)
    with pytest.raises(CoreskipError, match="cannot write"):
        Journal(tmp_path / "nowhere" / "x").add("key", {})


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
    norms = sum(p.numel() for n, p in llama.named_parameters() if "norm" in n and "layers" in n)
    assert dense == 4 * (sum(m.weight.numel() for m in linears) + norms)
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


@pytest.mark.parametrize("weights", ["int8", "int4"])
@needs_kernels
def test_bytes_of_weight_formats_are_those_that_are_packed(embedded: tuple[Any, Any], weights: str) -> None:
    model = embedded[0]
    plan = Plan.dense(model, weights)
    with coreskip.wrap(model, plan):
        ids = torch.tensor([[5, 6, 7]])
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        packed, _ = runtime_of(model).packed_bytes()
    assert bytes_per_token(model, plan) == pytest.approx(packed, rel=0.002)


@needs_kernels
def test_bytes_of_what_no_format_changes(llama: Any) -> None:
    """Policies that run on the modules, and the halves of a plan that the format leaves alone."""

    def read(policy: Any, weights: str | None) -> int:
        return bytes_per_token(llama, replace(plan_with(llama, policy), weights=weights))

    for name in ("teal", "topk", "learned"):
        policy = some_policy(llama, name)
        assert read(policy, "int4") == read(policy, None)
    fewer = {name: read(some_policy(llama, name), None) - read(some_policy(llama, name), "int8") for name in ("cats",)}
    rest = sum(p.numel() for n, p in llama.named_parameters() if p.ndim == 2 and ("attn" in n or "lm_head" in n))
    assert fewer["cats"] == pytest.approx(rest * (4 - 1 - 1 / 16), rel=1e-6)
    assert read(Sketch(keep=0.5), None) - read(Sketch(keep=0.5), "int8") == pytest.approx(fewer["cats"], rel=1e-6)


def test_time_is_bytes_over_bandwidth_and_dearer_where_neurons_are_chosen() -> None:
    model = tiny("llama")
    assert read_bandwidth("cpu") > 1e8
    dense, sparse = Plan.dense(model), plan_with(model, Sketch(keep=0.3))
    assert predicted_seconds(model, sparse) < predicted_seconds(model, dense)
    assert predicted_seconds(model, dense) == bytes_per_token(model, dense) / read_bandwidth("cpu")
    assert cost(model, sparse).weighed > cost(model, sparse).moved
    on_modules = plan_with(model, some_policy(model, "topk"))
    assert cost(model, on_modules).weighed > cost(model, on_modules).moved + 1e7


# ---- weights in fewer bits ----


@needs_kernels
def test_weights_in_fewer_bits_win_where_they_hold(llama: Any) -> None:
    """Random weights lose much by int4 and little by int8: nothing that leaves neurons out is as close, and as fast."""
    plan = budgeted(llama, "kl<0.01")
    assert plan.weights == "int8"
    assert plan.recipe["method"] == "dense"
    assert plan.frontier[0]["name"] == "dense int4"
    assert plan.frontier[-1]["name"] == "dense int8"
    assert "weights      int8" in str(plan)
    assert budgeted(llama, "kl<0.05", method="sketch").recipe["method"] == "sketch"


@needs_kernels
def test_the_model_must_be_one_that_the_native_step_covers() -> None:
    plan = budgeted(tiny("opt"), "kl<0.05")
    assert plan.weights is None


@needs_kernels
def test_a_winner_that_fails_the_check_gives_way(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Study.measure

    def harsh(self: Study, plan: Plan, part: str = "checked", windows: int | None = None) -> dict[str, Any]:
        found = original(self, plan, part, windows)
        return {**found, "kl": 9.0} if part == "checked" and plan.recipe["method"] == "dense" else found

    monkeypatch.setattr(Study, "measure", harsh)
    plan = budgeted(llama, "kl<5")
    assert plan.recipe["method"] != "dense"
    assert plan.quality is not None
    assert plan.quality["kl"] <= 5
