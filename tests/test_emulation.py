"""The searches' fast scoring equals decoding token by token through the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_policies import NAMES, plan_with, some_policy
from test_quality import text
from tiny_models import plan_of, sparse_of, tiny

from coreskip.predictors.anatomy import dissect
from coreskip.predictors.calibration import TokenText, tokenize
from coreskip.predictors.plan import Plan
from coreskip.predictors.policies import Sketch
from coreskip.predictors.token_choice import TokenCalibration
from coreskip.runtime.bundles import Weights
from coreskip.runtime.emulation import Emulation
from coreskip.runtime.quality import evaluate_all
from coreskip.runtime.wrap import is_wrapped

FIGURES = ("ppl_increase", "kl", "top1_agreement", "neuron_sparsity", "tokens")


def fast_score(model: Any, plan: Plan, about: TokenText, windows: int = 1) -> dict[str, Any]:
    return Emulation(model, about, windows=windows, window=32, progress=False).score(plan)


def both(model: Any, plan: Plan, about: TokenText, windows: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    options: dict[str, Any] = {"windows": windows, "window": 32, "token_by_token": True, "progress": False}
    return fast_score(model, plan, about, windows), evaluate_all(model, [plan], about, **options)[0]


def near(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> bool:
    return all(a[figure] == pytest.approx(b[figure], rel=tolerance, abs=2e-3) for figure in FIGURES)


@contextmanager
def disturbed(model: Any, seed: int) -> Iterator[None]:
    """Embeddings that are off by about ten times what float32 arithmetic rounds."""
    weight = model.get_input_embeddings().weight.detach()
    before = weight.clone()
    weight *= 1 + 1e-6 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    try:
        yield
    finally:
        weight.copy_(before)


def decided(model: Any, plan: Plan, about: TokenText, found: dict[str, Any], tolerance: float) -> bool:
    """Whether no choice among neurons is so close that rounding decides it: on another CPU it would fall otherwise, and
    with it all that comes after in the window."""
    for seed in range(4):
        with disturbed(model, seed):
            if not near(fast_score(model, plan, about), found, tolerance):
                return False
    return True


def near_where_decided(model: Any, plan: Plan, tolerance: float) -> bool:
    """Whether the figures of every window agree in which rounding decides nothing, and there are such."""
    compared = 0
    for ids in text().windows(32, 8):
        about = TokenText(ids, torch.tensor([1]), "one window")
        fast, slow = both(model, plan, about)
        if decided(model, plan, about, fast, tolerance):
            compared += 1
            if not near(fast, slow, tolerance):
                return False
    return compared >= 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llama_bias", "opt"])
def test_equals_token_by_token(family: str, name: str) -> None:
    model = tiny(family)
    plan = plan_with(model, some_policy(model, name))
    # sketches round x to 8 bits: the last digit of a float can become a step of an integer, and that another choice
    tolerance = 0.2 if "sketch" in name else 1e-3
    fast, slow = both(model, plan, text(), windows=4)
    assert fast["dense"]["ppl"] == pytest.approx(slow["dense"]["ppl"], rel=1e-4)
    assert fast["kl"] > 1e-3, "the plan must change something for this to mean anything"
    assert near(fast, slow, tolerance) or near_where_decided(model, plan, tolerance)


@pytest.mark.parametrize("name", ["sketch", "sketch_threshold", "sketch_smooth", "sketch_refined"])
@pytest.mark.parametrize("family", ["llama_bias", "opt"])
def test_one_mlp_equals_the_kernels_definition(family: str, name: str) -> None:
    model = tiny(family)
    policy = some_policy(model, name)
    emulated = sparse_of(Emulation(model, text(), windows=1, window=32, progress=False).weights, 1, policy)
    exact = sparse_of(Weights(dissect(model)), 1, policy)
    assert type(emulated) is not type(exact)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(5))
    (fast, kept), (slow, expected) = emulated.run(x, counting=True), exact.run(x, counting=True)
    assert kept == expected
    assert torch.allclose(fast, slow, rtol=1e-4, atol=1e-5 * float(slow.abs().max()))


def test_the_embedded_model(embedded: tuple[Any, Any]) -> None:
    model, tokenizer = embedded
    prose = tokenize(tokenizer, "The sea was calm that night, and the tide was full. " * 12)
    smooth = TokenCalibration(model, prose.windows(128, 1), progress=False).smooth
    plan = plan_with(model, *(Sketch(keep=0.6, mean=torch.full((1536,), 0.001), smooth=s) for s in smooth))
    found = Emulation(model, prose, windows=1, window=128, progress=False).score(plan)
    options: dict[str, Any] = {"windows": 1, "window": 128, "token_by_token": True, "progress": False}
    expected = evaluate_all(model, [plan], prose, **options)[0]
    assert found["neuron_sparsity"] == pytest.approx(expected["neuron_sparsity"], abs=1e-4)
    # 64 tokens, each with 30 layers in which rounding may exchange two neurons of equal worth
    assert found["ppl_increase"] == pytest.approx(expected["ppl_increase"], abs=0.02)
    assert found["kl"] == pytest.approx(expected["kl"], rel=0.2, abs=1e-3)


def test_static_and_dense_plans(llama: Any) -> None:
    for plan in (plan_of(llama, "static"), Plan.dense(llama)):
        fast, slow = both(llama, plan, text(), windows=4)
        for figure in FIGURES:
            assert fast[figure] == pytest.approx(slow[figure], rel=1e-3, abs=1e-4), figure


def test_one_emulation_scores_many_plans_and_leaves_the_model(llama: Any) -> None:
    emulation = Emulation(llama, text(), windows=3, window=32, progress=False)
    plans = [plan_with(llama, some_policy(llama, name)) for name in ("sketch", "sketch_threshold", "topk")]
    together = [emulation.score(plan) for plan in plans]
    assert len({found["kl"] for found in together}) == 3
    for plan, found in zip(plans, together, strict=True):
        assert emulation.score(plan) == found
        assert Emulation(llama, text(), windows=3, window=32, progress=False).score(plan) == found
    assert emulation.score(plans[0], windows=1)["tokens"] == 16
    assert not is_wrapped(llama)
    assert torch.is_grad_enabled()
