"""Drafts from the text alone (`lookup=True`), verified by the plan: the plan's own text, sooner."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact_mode import Eager, dense, needs_kernels, repeating
from tiny_models import NoTokenizer, greedy, plan_of, prompt, tiny

import coreskip
from coreskip import CoreskipError, Engine
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import Sketch
from coreskip.runtime.wrap import runtime_of


@needs_kernels
@pytest.mark.parametrize("kind", ["dense", "int8", "int4", "static", "griffin"])
@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "gemma2"])
def test_with_lookup_the_text_is_the_plans_own(family: str, kind: str) -> None:
    model, options = tiny(family), {"new": 120}  # random models come to repeat themselves
    plan = Plan.dense(model, kind if "int" in kind else None)
    plan = plan if kind in ("dense", "int8", "int4") else plan_of(model, kind)
    sampled = {"do_sample": True, "temperature": 0.3, **options}

    def texts() -> list[torch.Tensor]:
        found = [greedy(model, repeating(), **options), greedy(model, repeating(2), **options)]
        torch.manual_seed(3)
        return [*found, greedy(model, repeating(), **sampled), torch.rand(3)]

    with coreskip.wrap(model, plan, keep_originals=True):
        greedy(model, repeating(), 3)
        expected = texts()
    with coreskip.wrap(model, plan, keep_originals=True, lookup=True):
        greedy(model, repeating(), 3)
        runtime_of(model).lookup.costs = Eager()
        assert all(torch.equal(a, b) for a, b in zip(texts(), expected, strict=True))
        drafted = 0
        for seed in range(1, 9):  # not every text repeats itself
            greedy(model, prompt(1, 7, seed=seed).repeat(1, 4), **options)
            done = runtime_of(model).lookup.last
            assert done.note is None
            assert done.drafted["plan"] == 0
            assert done.passes + done.accepted["lookup"] == 119
            drafted += done.drafted["lookup"]
        assert drafted > 0 or family != "llama"


@needs_kernels
def test_lookup_by_the_engine(llama: Any) -> None:
    ids, plan = repeating(), Plan.dense(llama)
    expected = dense(llama, ids, new=30)
    with Engine(llama, NoTokenizer(), plan, lookup=True) as engine:
        assert torch.equal(greedy(llama, ids, new=30), expected)
        assert engine.statistics is not None
        assert engine.statistics.tokens == 30
    with pytest.raises(CoreskipError, match="wrapped already"), coreskip.wrap(llama, plan):
        Engine(llama, NoTokenizer(), lookup=True)


@needs_kernels
def test_a_rule_that_rounding_turns_is_not_drafted_for_or_gives_its_own_text(llama: Any) -> None:
    plain = Plan.dense(llama)
    plan = Plan(tuple(LayerPlan(Sketch(bits=4, keep=0.5)) for _ in plain.layers), plain.model, {"method": "sketch"})
    with coreskip.wrap(llama, plan):
        greedy(llama, repeating(), 3)
        expected = greedy(llama, repeating(), new=40)
    with coreskip.wrap(llama, plan, lookup=True):
        assert torch.equal(greedy(llama, repeating(), new=40), expected)
        assert runtime_of(llama).lookup.last.tokens == 40
