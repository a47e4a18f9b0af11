"""The budget search rounds with the text, and what it finds is what packing with the plan makes."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import on_grid, packed, tokenizer
from test_analyze import run, text
from test_pack import command
from test_plan import rewrite
from tiny_models import greedy, prompt, tiny

import coreskip
from coreskip import CoreskipError, Plan, PlanError
from coreskip.kernels.ops import MAX_ROWS, available
from coreskip.predictors.anatomy import is_packed
from coreskip.runtime.cost import bytes_per_token
from coreskip.runtime.packed_folder import describe
from coreskip.runtime.quality import decode_logits
from coreskip.runtime.rounding_search import Roundings
from coreskip.runtime.wrap import runtime_of

pytestmark = pytest.mark.skipif(available("cpu") is not None, reason="the native step is not built")

BUDGET = "kl<0.02"  # plain 4 bits: 0.34, 8 bits: 0.006


def found(model: Any, **options: Any) -> Plan:
    return run(model, **{"budget": BUDGET, "tokens": 2048, "text": text(6000), **options})


@pytest.fixture(scope="module")
def plan() -> Plan:
    return found(tiny("llama"))


def test_fewer_bytes_than_eight_bits_where_plain_four_lose_too_much(plan: Plan) -> None:
    model = tiny("llama")
    assert plan.weights == "packed"
    assert plan.rounding is not None
    assert plan.quality is not None
    assert plan.quality["kl"] <= 0.02
    eight = bytes_per_token(model, Plan.dense(model, "int8"))
    assert 0.5 * eight < bytes_per_token(model, plan) < 0.9 * eight
    assert len(set(plan.rounding.widths.values())) > 1
    assert any(row["name"].startswith("rounded to") for row in plan.frontier)
    assert "rounded with" in str(plan)


def test_the_packed_model_is_the_one_that_was_measured(plan: Plan, tmp_path: Path) -> None:
    model = tiny("llama")
    plan.save(tmp_path / "p.plan")
    again = Plan.load(tmp_path / "p.plan")
    assert str(again) == str(plan)
    coreskip.pack(model, tokenizer(), tmp_path / "p", plan=again, progress=False)
    made, _ = coreskip.load(tmp_path / "p")
    assert describe(tmp_path / "p")["calibration"] == plan.rounding.text  # type: ignore[union-attr]
    kept = Plan.load(tmp_path / "p")
    assert bytes_per_token(made, kept) == bytes_per_token(model, plan)
    checked = text(6000).split(0.8, 0.2)[1]
    rows = checked.windows(plan.quality["window"], plan.quality["windows"])  # type: ignore[index]
    with torch.no_grad():
        expected = [decode_logits(model, ids, 1).log_softmax(-1) for ids in rows.split(1)]
        with coreskip.wrap(made, kept):
            ours = [decode_logits(made, ids, MAX_ROWS).log_softmax(-1) for ids in rows.split(1)]
            assert runtime_of(made).steps.native.ready
    kl = sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(expected, ours, strict=True)) / len(ours)
    assert kl == pytest.approx(plan.quality["kl"], rel=1e-3)  # type: ignore[index]


def test_nothing_of_the_search_stays(plan: Plan) -> None:
    model = tiny("llama")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    modules = list(model.modules())
    assert str(found(model)) == str(plan), "the same again"
    assert modules == list(model.modules())
    assert not any(map(is_packed, model.modules()))
    assert not {name for name in vars(model) if name.startswith("_coreskip")}
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_a_search_goes_on_without_rounding_again(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "search.jsonl"
    original, measured = Roundings.measure, []

    def stopped(self: Roundings, *about: Any) -> dict[str, Any]:
        if measured:
            raise KeyboardInterrupt
        measured.append(about)
        return original(self, *about)

    monkeypatch.setattr(Roundings, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        found(tiny("llama"), resume=file)
    monkeypatch.setattr(Roundings, "measure", original)
    assert str(found(tiny("llama"), resume=file)) == str(plan)
    monkeypatch.setattr(Roundings, "_round", lambda self: pytest.fail("rounded again"))
    assert str(found(tiny("llama"), resume=file)) == str(plan)


def test_numbers_on_the_grid_are_not_rounded_anew() -> None:
    plan = found(on_grid(tiny("llama")), budget="kl<0.05", fast=True)
    assert plan.rounding is None


def test_a_packed_model_is_searched_in_its_own_format(tmp_path: Path) -> None:
    plan = found(packed(on_grid(tiny("llama")), tmp_path / "p"), budget="kl<100", fast=True)
    assert plan.weights is None
    assert plan.rounding is None


def test_layers_left_out_besides_are_of_the_model_as_it_is() -> None:
    plan = found(tiny("llama"), layers="skip:1", fast=True)
    assert plan.rounding is None
    assert plan.quality is not None


def test_a_short_text_will_do() -> None:
    plan = found(tiny("llama"), text=text(400), fast=True)
    assert plan.frontier
    assert any(row["name"].startswith("rounded to") for row in plan.frontier)


def test_weights_that_are_named_are_not_mixed() -> None:
    assert found(tiny("llama"), weights="int8", fast=True).rounding is None


def test_what_is_not_packed_says_how(plan: Plan, tmp_path: Path) -> None:
    model = tiny("llama")
    for use in (
        lambda: coreskip.wrap(model, plan),
        lambda: coreskip.evaluate(model, tokenizer(), plan, "w5 w6 w7 " * 300),
    ):
        with pytest.raises(CoreskipError, match="coreskip pack --plan") as caught:
            use()
        assert "\n" not in str(caught.value)
    for options in ({"weights": "int4"}, {"text": "w5 w6 " * 900}, {"share": 0.7, "text": "w5 w6 " * 900}):
        with pytest.raises(CoreskipError, match="leave out"):
            coreskip.pack(model, tokenizer(), tmp_path / "q", plan=plan, **options)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="other weights"):
        coreskip.pack(tiny("llama", seed=5), tokenizer(), tmp_path / "q", plan=plan, progress=False)
    assert not (tmp_path / "q").exists()
    with pytest.raises(PlanError, match="packed"):
        replace(plan, weights="int8")


def test_packed_again_it_stays_as_it_is(plan: Plan, tmp_path: Path) -> None:
    coreskip.pack(tiny("llama"), tokenizer(), tmp_path / "a", plan=plan, progress=False)
    first, words = coreskip.load(tmp_path / "a")
    coreskip.pack(first, words, tmp_path / "b", plan=tmp_path / "a", progress=False)
    second, _ = coreskip.load(tmp_path / "b")
    with coreskip.wrap(first, tmp_path / "a"), coreskip.wrap(second, tmp_path / "b"):
        assert torch.equal(greedy(first, prompt(1, 7), 8), greedy(second, prompt(1, 7), 8))
    assert describe(tmp_path / "a") == describe(tmp_path / "b")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d["rounding"]["widths"].update(lm_head="int3"),
        lambda d: d["rounding"].update(widths=None),
        lambda d: d["rounding"].pop("text"),
        lambda d: d["rounding"].update(text={}),
        lambda d: d.update(weights="int4"),
        lambda d: d.update(rounding=7),
    ],
)
def test_a_damaged_recipe_is_one_line(spoil: Any, plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "p.plan")
    rewrite(tmp_path / "p.plan", spoil)
    with pytest.raises(PlanError) as caught:
        Plan.load(tmp_path / "p.plan")
    assert "\n" not in str(caught.value)


def test_the_recipe_of_other_linears_is_one_line(plan: Plan, tmp_path: Path) -> None:
    recipe = plan.rounding
    assert recipe is not None
    wrong = replace(plan, rounding=replace(recipe, widths={**recipe.widths, "model.layers.9.mlp.up_proj": "int4"}))
    with pytest.raises(CoreskipError, match="no linear"):
        coreskip.pack(tiny("llama"), tokenizer(), tmp_path / "q", plan=wrong, progress=False)
    large = replace(plan, rounding=replace(recipe, ids=recipe.ids + 10**6))
    with pytest.raises(CoreskipError, match="vocabulary"):
        coreskip.pack(tiny("llama"), tokenizer(), tmp_path / "q", plan=large, progress=False)
    assert not (tmp_path / "q").exists()


def test_two_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    source, folder, file = tmp_path / "m", tmp_path / "m.packed", tmp_path / "text.txt"
    tiny("llama").save_pretrained(source)
    tokenizer().save_pretrained(source)
    file.write_text(" ".join(f"w{int(i)}" for i in text(6000).ids.tolist()))
    options = ("--budget", BUDGET, "--text", file, "--tokens", 2048, "--windows", 2, "--fast")
    code, out, _ = command(capsys, "analyze", source, "-o", tmp_path / "m.plan", *options)
    assert (code, "coreskip pack" in out) == (0, True)
    code, _, err = command(capsys, "generate", source, "--plan", tmp_path / "m.plan", "-p", "w7 w9")
    assert (code, "coreskip pack --plan" in err.splitlines()[-1]) == (2, True)
    code, out, _ = command(capsys, "pack", source, "--plan", tmp_path / "m.plan", "-o", folder)
    assert (code, "rounded with compensation" in out) == (0, True)
    code, _, _ = command(capsys, "generate", folder, "-p", "w7 w9", "--max-new-tokens", 4)
    assert code == 0
    code, out, _ = command(capsys, "show", folder)
    assert (code, "rounded with" in out) == (0, True)
