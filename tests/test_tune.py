"""analyze: every method makes a plan that runs, budgets are kept on text that the search did not see."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import greedy, prompt, tiny

import coreskip
from coreskip import CoreskipError, analyze
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.plan import CoreNeurons, Dense, Similar, Static
from coreskip.runtime.tune import Budget


def text(tokens: int = 1200) -> TokenText:
    return TokenText(prompt(1, tokens, 2)[0], torch.tensor([], dtype=torch.int64), "random letters")


class NoTokenizer:
    bos_token_id = 1
    eos_token_id = None
    pad_token_id = 0

    def __call__(self, text: str, **options: Any) -> Any:
        return SimpleNamespace(input_ids=[5])


def run(model: Any, **options: Any) -> coreskip.Plan:
    return analyze(model, NoTokenizer(), **{"text": text(), "progress": False, "windows": 2, **options})


@pytest.mark.parametrize(("method", "policy"), [("core", CoreNeurons), ("static", Static), ("similar", Similar)])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_methods(family: str, method: str, policy: type) -> None:
    model = tiny(family)
    plan = run(model, method=method, keep=0.5)
    assert all(isinstance(layer.neurons, policy) for layer in plan.layers)
    assert plan.keep == pytest.approx(0.5, abs=0.01)
    assert plan.quality is not None
    assert plan.quality["neuron_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert plan.calibration["tokens"] == 1200
    with coreskip.wrap(model, plan):
        greedy(model, prompt(), 4)


def test_auto_takes_the_closest_method(llama: Any) -> None:
    auto = run(llama, method="auto", keep=0.5)
    assert auto.recipe["method"] in ("core", "static", "similar")
    assert auto.quality is not None


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


def test_budgets_hold_on_the_text_checked(llama: Any) -> None:
    generous = run(llama, budget="kl<100")
    assert generous.keep == pytest.approx(0.3, abs=0.01)
    assert generous.recipe["budget"] == "kl<100"
    moderate = run(llama, budget="agreement>0.8")
    assert moderate.quality is not None
    assert moderate.quality["top1_agreement"] >= 0.8
    nothing = run(llama, budget="kl<0", method="static")
    assert nothing.keep == 1.0
    assert nothing.recipe["method"] == "dense"


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
        ({"text": text(60)}, "at least 100 are needed"),
        ({"text": "  "}, "empty"),
    ],
)
def test_mistakes(llama: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(CoreskipError, match=match):
        run(llama, **options)
    with coreskip.wrap(llama, coreskip.Plan.dense(llama)), pytest.raises(CoreskipError, match="wrapped already"):
        run(llama)
