"""analyze: every method makes a plan that runs, budgets are kept on text that the search did not see."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import NoTokenizer, greedy, prompt, tiny

import coreskip
from coreskip import CoreskipError, analyze
from coreskip.kernels.ops import available
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.policies import (
    Bricks,
    CoreNeurons,
    Dense,
    Learned,
    Run,
    Similar,
    Sketch,
    Skip,
    Static,
    Teal,
    TopK,
    Wina,
)
from coreskip.runtime.options import METHODS, OF_METHODS, Budget, options_of


def text(tokens: int = 1200) -> TokenText:
    return TokenText(prompt(1, tokens, 2)[0], torch.tensor([], dtype=torch.int64), "random letters")


def run(model: Any, **options: Any) -> coreskip.Plan:
    return analyze(model, NoTokenizer(), **{"text": text(), "progress": False, "windows": 2, **options})


@pytest.mark.parametrize(
    ("method", "policy"),
    [
        ("core", CoreNeurons),
        ("static", Static),
        ("similar", Similar),
        ("sketch", Sketch),
        ("topk", TopK),
        ("learned", Learned),
        ("bricks", Bricks),
    ],
)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_methods(family: str, method: str, policy: type) -> None:
    model = tiny(family)
    plan = run(model, method=method, keep=0.5)
    assert all(isinstance(layer.neurons, policy) for layer in plan.layers)
    # thresholds keep what they keep: on the text measured about what they did in calibration
    assert plan.keep == pytest.approx(0.5, abs=0.03)
    assert plan.quality is not None
    assert plan.quality["neuron_sparsity"] == pytest.approx(
        0.5, abs={"sketch": 0.1, "topk": 0.1, "bricks": 0.03}.get(method, 0.01)
    )
    assert plan.calibration["tokens"] == 1200
    with coreskip.wrap(model, plan):
        greedy(model, prompt(), 4)


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        ({"method": "threshold", "rule": "wina"}, {"rule": "wina", "all_linears": False}),
        ({"method": "threshold", "all_linears": True}, {"rule": "teal", "all_linears": True}),
        ({"method": "sketch", "bits": 1}, {"bits": 1}),
        ({"method": "sketch", "refine": True}, {"refine": True}),
        ({"method": "sketch", "allocation": "cett"}, {"allocation": "cett"}),
        ({"method": "learned", "rank": 3}, {"rank": 3}),
    ],
)
def test_options_of_methods(llama: Any, options: dict[str, Any], recipe: dict[str, Any]) -> None:
    plan = run(llama, keep=0.6, **options)
    assert {name: plan.recipe[name] for name in recipe} == recipe
    if plan.recipe["method"] == "threshold":
        assert all(isinstance(layer.neurons, Teal | Wina) for layer in plan.layers)


def test_layers_are_left_out_from_the_first_layer_on(llama: Any) -> None:
    plan = run(llama, method="layers", keep=0.34, first_layer=1)
    assert [type(layer.layer) for layer in plan.layers] == [Run, Skip, Skip]
    assert plan.quality is not None
    assert plan.quality["neuron_sparsity"] == pytest.approx(2 / 3)
    assert plan.recipe["keep"] == 0.34


def test_layers_are_named_in_python_too(llama: Any) -> None:
    plan = run(llama, layers="skip:1")
    assert [type(layer.layer) for layer in plan.layers].count(Skip) == 1
    assert all(isinstance(layer.neurons, Dense) for layer in plan.layers)
    assert plan.recipe["layers"] == "skip:1"
    assert len(plan.recipe["measures"]["influence"]) == 3
    assert plan.quality is not None
    assert plan.quality["neuron_sparsity"] == pytest.approx(1 / 3)
    both = run(llama, layers="every:2", method="core", keep=0.5)
    assert all(isinstance(layer.neurons, CoreNeurons) for layer in both.layers)
    assert both.recipe["layers"] == "every:2"


@pytest.mark.skipif(available("cpu") is not None, reason="no kernel reads int8")
def test_plans_are_found_in_the_weights_that_are_named(llama: Any) -> None:
    for options in ({"method": "static", "keep": 0.5}, {"layers": "skip-mlp:1"}):
        plan = run(llama, weights="int8", **options)
        assert plan.weights == "int8"
        assert plan.quality is not None
        expected = coreskip.evaluate(llama, NoTokenizer(), plan, text(), windows=2, window=64, progress=False)
        as_loaded = coreskip.evaluate(
            llama, NoTokenizer(), replace(plan, weights=None), text(), windows=2, window=64, progress=False
        )
        assert expected["kl"] != as_loaded["kl"]


def test_every_method_has_options_of_its_own() -> None:
    for method in METHODS:
        if method == "auto":
            continue
        options = options_of(method, {})
        with pytest.raises(dataclasses.FrozenInstanceError):
            options.anything = 1
        for name in OF_METHODS:
            if method not in OF_METHODS[name]:
                with pytest.raises(CoreskipError, match=f"the method {method} has no option '{name}'"):
                    options_of(method, {name: 1})


def test_auto_with_a_keep_is_the_sketch(llama: Any) -> None:
    assert run(llama, method="auto", keep=0.5).recipe["method"] == "sketch"


def test_first_layers_stay_dense_and_keep_one_skips_nothing(llama: Any) -> None:
    plan = run(llama, method="core", keep=0.5, first_layer=2, score="signed", alpha=0.2)
    assert [type(layer.neurons) for layer in plan.layers] == [Dense, Dense, CoreNeurons]
    assert plan.recipe["alpha"] == 0.2
    assert run(llama, method="static", keep=1.0).keep == 1.0


def test_the_same_seed_makes_the_same_plan(llama: Any) -> None:
    one, two = (run(llama, method="similar", keep=0.5, text=None, tokens=600, seed=3) for _ in range(2))
    assert str(one) == str(two)
    assert "sampled from the model, seed 3" in one.calibration["source"]
    for a, b in zip(one.layers, two.layers, strict=True):
        assert torch.equal(a.neurons.clusters, b.neurons.clusters)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "measure", "limit"), [("ppl+1%", "ppl", 0.01), ("ppl + 0.5 %", "ppl", 0.005), ("kl<0.05", "kl", 0.05)]
)
def test_budget_syntax(text: str, measure: str, limit: float) -> None:
    budget = Budget.parse(text)
    assert (budget.measure, budget.limit) == (measure, pytest.approx(limit))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "magic"}, "unknown method 'magic'; choose from auto"),
        ({"keep": 0.0}, "keep is 0.0"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"alpha": 2.0}, "alpha is 2.0"),
        ({"score": "best"}, "unknown score"),
        ({"budget": "ppl<1"}, "cannot read the budget"),
        ({"budget": "ppl+1%", "keep": 0.5}, "not both"),
        ({"first_layer": 3}, "layers 0..2"),
        ({"tokens": 0}, "at least 1"),
        ({"rule": "best"}, "unknown rule 'best'; choose from teal"),
        ({"allocation": "best"}, "unknown allocation"),
        ({"bits": 2}, "a sketch has 4 bits, 3"),
        ({"bits": 3}, "3 bits is of weights in 4 bits: add weights int4"),
        ({"bits": 1, "refine": True}, "signs cannot be refined"),
        ({"rank": 0}, "rank is 0"),
        ({"method": "learned", "rank": 65}, "rank is 65: more than the model's hidden size, 64"),
        ({"metod": "core"}, "analyze has no option 'metod': did you mean method"),
        ({"layers": "skip"}, "cannot read the layers"),
        ({"layers": "skip:3"}, "all of the model's 3 layers"),
        ({"layers": "skip:1", "method": "layers"}, "give one of them"),
        ({"weights": "int3"}, "weights is 'int3'"),
        ({"text": text(60)}, "at least 100 are needed"),
        ({"text": "  "}, "empty"),
    ],
)
def test_mistakes(llama: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(CoreskipError, match=match):
        run(llama, **options)
    with coreskip.wrap(llama, coreskip.Plan.dense(llama)), pytest.raises(CoreskipError, match="wrapped already"):
        run(llama)


# ---- plans for a purpose ----


def letters(tokens: int, seed: int) -> TokenText:
    return TokenText(prompt(1, tokens, seed)[0], torch.tensor([], dtype=torch.int64), f"letters {seed}")


def test_a_plan_for_some_texts_says_what_it_costs_on_others(llama: Any) -> None:
    mine, others = [letters(900, 2), letters(700, 3)], letters(400, 4)
    plan = run(llama, text=None, keep_for=mine, drop_for=others, method="static", keep=0.5)
    joined = TokenText.joined(mine)
    assert plan.calibration["tokens"] == 1600
    assert plan.calibration["sha256"] == joined.fingerprint()["sha256"]
    elsewhere = plan.recipe["elsewhere"]
    expected = coreskip.evaluate(llama, NoTokenizer(), plan, others, windows=2, window=400 // 2 * 2, progress=False)
    assert elsewhere["ppl_increase"] == pytest.approx(expected["ppl_increase"], rel=1e-3)
    assert elsewhere["text"] == "letters 4"
    assert str(plan).count("elsewhere    ppl") == 1
    again = run(llama, text=joined, method="static", keep=0.5)
    assert all(
        torch.equal(a.neurons.indices, b.neurons.indices) for a, b in zip(plan.layers, again.layers, strict=True)
    )


def test_every_part_of_joined_texts_has_of_all_of_them() -> None:
    joined = TokenText.joined(
        [TokenText(torch.full((n,), n), torch.tensor([], dtype=torch.int64), "x") for n in (640, 64)]
    )
    assert len(joined.ids) == 704
    for part in joined.split(0.25, 0.25, 0.5):
        assert int((part.ids == 64).sum()) == pytest.approx(len(part.ids) / 11, abs=2)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"drop_for": letters(200, 2)}, "say what it is for"),
        ({"keep_for": letters(900, 2), "text": letters(900, 3)}, "give text or keep_for"),
        ({"keep_for": []}, "keep_for is empty"),
        ({"keep_for": letters(900, 2), "drop_for": letters(900, 2)}, "the same text"),
        ({"keep_for": [letters(900, 2), letters(900, 2)]}, "the same text"),
        ({"keep_for": letters(900, 2), "drop_for": letters(9, 3)}, "drop_for has 9 tokens"),
        ({"keep_for": letters(20, 2)}, "at least 100 are needed"),
        ({"keep_for": 3}, "given as an int"),
    ],
)
def test_purposes_that_make_no_sense(llama: Any, options: dict[str, Any], line: str) -> None:
    with pytest.raises(CoreskipError, match=line):
        run(llama, **{"text": None, "method": "static", **options})
