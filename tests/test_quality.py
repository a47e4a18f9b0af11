"""Quality figures: the fast pass equals the token-by-token run, and the figures are what they claim to be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import plan_of, prompt, tiny
from transformers import DynamicCache

import coreskip
from coreskip import CoreskipError
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.plan import Plan
from coreskip.runtime.quality import evaluate_all, summary


def text(tokens: int = 400, seed: int = 2) -> TokenText:
    return TokenText(prompt(1, tokens, seed)[0], torch.tensor([1]), "random letters")


def score(model: Any, plan: Plan, **options: Any) -> dict[str, Any]:
    return evaluate_all(model, [plan], text(), windows=4, window=32, progress=False, **options)[0]


@pytest.mark.parametrize("kind", ["signed", "griffin", "similar", "static"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_fast_pass_equals_token_by_token(family: str, kind: str) -> None:
    model = tiny(family)
    plan = plan_of(model, kind)
    fast, slow = score(model, plan), score(model, plan, token_by_token=True)
    for name in ("ppl_increase", "kl", "top1_agreement", "neuron_sparsity", "tokens"):
        assert fast[name] == pytest.approx(slow[name], rel=1e-3, abs=1e-5), name
    assert fast["sparse"]["ppl"] == pytest.approx(slow["sparse"]["ppl"], rel=1e-4)
    assert fast["kl"] > 1e-3, "the plan must change something for this to mean anything"


def test_figures_from_first_principles(llama: Any) -> None:
    """Perplexity, KL and agreement of one window, computed by hand from manual decoding."""
    plan = plan_of(llama, "griffin")
    found = evaluate_all(llama, [plan], text(40), windows=1, window=32, progress=False)[0]
    ids = text(40).windows(32, 1)

    def logits() -> torch.Tensor:
        cache = DynamicCache(config=llama.config)
        rows = [llama(ids[:, :16], past_key_values=cache).logits[:, -1]]
        rows += [llama(ids[:, i : i + 1], past_key_values=cache).logits[:, 0] for i in range(16, 31)]
        return torch.cat(rows).double().log_softmax(-1)

    with torch.no_grad():
        dense = logits()
        with coreskip.wrap(llama, plan):
            sparse = logits()
    targets = ids[0, 16:]
    rows = torch.arange(16)
    assert found["tokens"] == 16
    assert found["dense"]["ppl"] == pytest.approx(math.exp(-float(dense[rows, targets].mean())), rel=1e-4)
    assert found["sparse"]["ppl"] == pytest.approx(math.exp(-float(sparse[rows, targets].mean())), rel=1e-4)
    assert found["ppl_increase"] == pytest.approx(found["sparse"]["ppl"] / found["dense"]["ppl"] - 1, rel=1e-4)
    assert found["kl"] == pytest.approx(float((dense.exp() * (dense - sparse)).sum(-1).mean()), rel=1e-3)
    assert found["top1_agreement"] == pytest.approx(float((dense.argmax(-1) == sparse.argmax(-1)).double().mean()))
    assert found["neuron_sparsity"] == pytest.approx(0.5, abs=0.01)


def test_a_dense_plan_costs_nothing(llama: Any) -> None:
    found = score(llama, Plan.dense(llama))
    assert found["ppl_increase"] == pytest.approx(0.0, abs=1e-6)
    assert found["kl"] == pytest.approx(0.0, abs=1e-9)
    assert found["top1_agreement"] == 1.0
    assert found["neuron_sparsity"] == 0.0


def test_several_plans_at_once_equal_one_at_a_time(llama: Any) -> None:
    plans = [plan_of(llama, kind) for kind in ("signed", "static")]
    together = evaluate_all(llama, plans, text(), windows=3, window=32, progress=False)
    for plan, found in zip(plans, together, strict=True):
        assert found == evaluate_all(llama, [plan], text(), windows=3, window=32, progress=False)[0]
    assert "windows of 32" in summary(together[0])


def test_the_mode_of_the_model_is_left_as_it_was(llama: Any) -> None:
    llama.train()
    score(llama, Plan.dense(llama))
    assert llama.training
    llama.eval()
    with coreskip.wrap(llama, Plan.dense(llama)), pytest.raises(CoreskipError, match="wrapped already"):
        score(llama, Plan.dense(llama))


def test_windows_shrink_to_the_models_positions() -> None:
    model = tiny("gpt2", n_positions=24)
    found = evaluate_all(model, [Plan.dense(model)], text(), windows=2, window=512, progress=False)[0]
    assert found["window"] == 24


@pytest.mark.parametrize(("windows", "window"), [(0, 32), (1, 31), (1, 2)])
def test_senseless_windows(llama: Any, windows: int, window: int) -> None:
    with pytest.raises(CoreskipError, match="at least one"):
        evaluate_all(llama, [Plan.dense(llama)], text(), windows=windows, window=window, progress=False)
