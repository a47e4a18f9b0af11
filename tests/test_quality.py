"""Quality figures: the fast pass equals the token-by-token run, and the figures are what they claim to be."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_policies import NAMES, plan_with, some_policy
from tiny_models import plan_of, prompt, tiny
from transformers import DynamicCache

import coreskip
from coreskip import CoreskipError
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.plan import Plan
from coreskip.runtime.bundles import Weights
from coreskip.runtime.quality import decode_logits, evaluate_all, summary
from coreskip.runtime.wrap import runtime_of, wrapped


def text(tokens: int = 400, seed: int = 2) -> TokenText:
    return TokenText(prompt(1, tokens, seed)[0], torch.tensor([1]), "random letters")


def score(model: Any, plan: Plan, **options: Any) -> dict[str, Any]:
    return evaluate_all(model, [plan], text(), windows=4, window=32, progress=False, **options)[0]


def policies_of(model: Any, name: str) -> Plan:
    """A plan by what it leaves out, and the format of its weights."""
    kind, _, weights = name.partition("+")
    if kind in ("signed", "griffin", "similar", "static"):
        plan = plan_of(model, kind)
    else:
        plan = Plan.dense(model) if kind == "dense" else plan_with(model, some_policy(model, kind))
    return replace(plan, weights=weights or None)


KINDS = (*NAMES, "signed", "griffin", "similar", "static")
IN_FORMATS = ("dense+int4", "dense+int8", "sketch+int4", "cats+int8", "learned+int4", "static+int4", "griffin+int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*KINDS, *IN_FORMATS])
@torch.no_grad()
def test_a_pass_of_eight_tokens_is_eight_of_one(name: str, dtype: torch.dtype) -> None:
    """What figures rest on: bit for bit, what generation runs."""
    model = tiny("llama").to(dtype)
    plan, ids = policies_of(model, name), text().windows(48, 1)
    with wrapped(model, plan, Weights(dissect(model))):
        model(ids, use_cache=True)
        for _ in range(4):  # until the native step has been compared
            decode_logits(model, ids, 1)
        native = runtime_of(model).steps.native.ready
        one, eight, all_at_once = (decode_logits(model, ids, count) for count in (1, 8, 23))
    if native:
        assert torch.equal(one, eight)
    else:  # rows of an attention in torch are added up in another order
        assert (one - eight).square().mean().sqrt() < {4: 1e-4, 2: 0.05}[dtype.itemsize] * one.std()
    # packed weights meet more than eight tokens in slices of eight; else these run on the modules
    assert torch.equal(one, all_at_once) == (native and plan.weights is not None)
    assert native == (name not in ("topk", "topk_threshold", "signs"))


@pytest.mark.parametrize("name", [*KINDS, *IN_FORMATS])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_figures_equal_token_by_token(family: str, name: str) -> None:
    model = tiny(family)
    plan = policies_of(model, name)
    fast, slow = score(model, plan), score(model, plan, token_by_token=True)
    if family == "llama" and "topk" not in name and name != "signs":
        assert {**fast, "neuron_sparsity": 0} == {**slow, "neuron_sparsity": 0}  # shares are added up in another order
    # on modules, rounding may move an input across half a step of its group, and that a choice
    relative, absolute = (0.1, 1e-3) if "sketch" in name or "+" in name else (1e-3, 1e-5)
    for figure in ("ppl_increase", "kl", "top1_agreement", "neuron_sparsity", "tokens"):
        assert fast[figure] == pytest.approx(slow[figure], rel=relative, abs=absolute), figure
    assert fast["kl"] > 1e-5, "the plan must change something for this to mean anything"


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
    with pytest.raises(CoreskipError, match=r"at least|must be even"):
        evaluate_all(llama, [Plan.dense(llama)], text(), windows=windows, window=window, progress=False)
