"""Exact mode where rounding could decide, and the distribution that it draws from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exact_mode import Eager, dense, needs_kernels, tokens_and_statistics
from tiny_models import plan_of, prompt, tiny
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList

import coreskip
from coreskip.predictors.plan import Plan
from coreskip.runtime import sampler as sampler_module
from coreskip.runtime.drafting import Statistics
from coreskip.runtime.exact import SpeculativeDecoder
from coreskip.runtime.sampler import Sampler
from coreskip.runtime.text import Text

VOCABULARY = 6


class Chain:
    """`Passes` over a Markov chain: the next token's logits depend on the last token alone."""

    draft_width = 8

    def __init__(self, logits: torch.Tensor, drafts: torch.Tensor, length: int) -> None:
        self._logits, self._drafts, self.length = logits, drafts, length

    def draft(self, tokens: list[int]) -> torch.Tensor:
        self.length += len(tokens)
        return self._drafts[list(tokens)]

    def verify(self, tokens: list[int]) -> torch.Tensor:
        self.length += len(tokens)
        return self._logits[list(tokens)]

    def rollback(self, length: int) -> None:
        assert length <= self.length
        self.length = length


class Warpers(list[Any]):
    """A LogitsProcessorList that does not look at each processor's signature each time, which takes most of a draw."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for warper in self:
            scores = warper(ids, scores)
        return scores


# --- rounding


@pytest.mark.parametrize("family", ["gpt2", "bloom", "falcon", "falcon_new", "nemotron_relu2"])
def test_models_whose_rows_are_not_apart_draft_in_float32_alone(family: str) -> None:
    model, ids = tiny(family), prompt(1, 9)
    plan = plan_of(model, "griffin", 0.8)
    for options in ({}, {"do_sample": True, "temperature": 0.7}):
        torch.manual_seed(1)
        output, done = tokens_and_statistics(model, plan, ids, new=40, **options)
        assert sum(done.drafted.values()) > 0
        torch.manual_seed(1)
        assert torch.equal(output, dense(model, ids, new=40, **options))
    model.to(torch.bfloat16)
    plan = plan_of(model, "griffin", 0.8)
    output, done = tokens_and_statistics(model, plan, ids, new=12)
    assert "rounds otherwise" in done.note
    assert torch.equal(output, dense(model, ids, new=12))


def test_what_rounding_could_decide_gets_a_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens whose logits differ by less than a pass over several is off: only the lone pass tells them apart."""

    class Rounding(Chain):
        alone = 0

        def verify(self, tokens: list[int]) -> torch.Tensor:
            logits = super().verify(tokens).clone()
            self.alone += len(tokens) == 1
            if len(tokens) > 1:
                logits[:, 0] += 2e-4
            return logits

    logits = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(2))
    logits[:, 0] = logits.max(1).values - 1e-4  # token 0 is always a close second
    logits[2] = torch.arange(VOCABULARY)  # but after token 2
    config = SimpleNamespace(do_sample=False, return_dict_in_generate=False)

    def run(margin: float) -> tuple[list[int], Rounding]:
        exact = SpeculativeDecoder(has_draft=True)
        exact.costs, exact._margin = Eager(), margin
        criteria = StoppingCriteriaList([MaxLengthCriteria(42)])
        text = Text(torch.zeros(1, 2, dtype=torch.int64), LogitsProcessorList(), criteria, config, None, 6)
        passes = Rounding(logits, logits, 2)
        exact._decode(Sampler(passes, text), logits[0], 40, Statistics())  # type: ignore[arg-type]
        return text.ids[0].tolist(), passes

    expected = [0, 0]
    while len(expected) < 42:
        expected.append(int(logits[expected[-1]].argmax()))
    text, passes = run(margin=1e-3)
    assert text == expected
    assert passes.alone > 10
    assert run(margin=0.0)[0] != expected


def test_a_rounding_model_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", hidden_size=128, intermediate_size=256).to(torch.bfloat16)
    monkeypatch.setattr("coreskip.runtime.wrapping.redirect_attention", lambda *a: None)
    monkeypatch.setattr("coreskip.runtime.native.NativeSteps.refusal", "switched off")  # which attends row by row
    _, done = tokens_and_statistics(model, plan_of(model, "griffin", 0.5), prompt(1, 40), new=4)
    assert "rounds otherwise" in done.note


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_apart_where_a_pass_reaches_over_128_positions(dtype: torch.dtype) -> None:
    """The native step reads the cache in parts of 128; a token before the border must not notice the part after."""
    model, ids = tiny("llama", hidden_size=256, intermediate_size=512).to(dtype), prompt(1, 137)
    with torch.no_grad(), coreskip.wrap(model, Plan.dense(model)):
        one, many = DynamicCache(config=model.config), DynamicCache(config=model.config)
        for cache in (one, many):
            model(ids[:, :120], past_key_values=cache)
        single = torch.cat([model(t, past_key_values=one).logits for t in ids[:, 120:136].split(1, dim=1)], dim=1)
        several = torch.cat([model(t, past_key_values=many).logits for t in ids[:, 120:136].split(5, dim=1)], dim=1)
        assert torch.equal(several, single)


# --- the distribution, on a chain of few tokens


def transitions(draws: int) -> tuple[torch.Tensor, torch.Tensor, SpeculativeDecoder]:
    """Counts ``[6, 6]`` of exact mode's next tokens by last token, and the probabilities they should have."""
    generator = torch.Generator().manual_seed(2)
    logits = 1.5 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    drafts = logits + 1.5 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    processors = Warpers([TemperatureLogitsWarper(0.8), TopKLogitsWarper(4)])
    config = SimpleNamespace(do_sample=True, return_dict_in_generate=False)
    exact = SpeculativeDecoder(has_draft=True)
    exact.costs = Eager()
    exact.costs.draft_s = 0.1  # type: ignore[misc]
    torch.manual_seed(11)
    counts = torch.zeros(VOCABULARY, VOCABULARY)
    for _ in range(draws // 500):
        ids = torch.zeros(1, 2, dtype=torch.int64)
        criteria = StoppingCriteriaList([MaxLengthCriteria(502)])
        text = Text(ids, processors, criteria, config, None, VOCABULARY)
        exact._decode(Sampler(Chain(logits, drafts, 2), text), logits[0], 500, done := Statistics())  # type: ignore[arg-type]
        assert done.tokens == 500
        pairs = text.ids[0, 1:].unfold(0, 2, 1)
        counts += torch.bincount(pairs[:, 0] * VOCABULARY + pairs[:, 1], minlength=VOCABULARY**2).view_as(counts)
    return counts, processors(ids, logits.clone()).softmax(-1), exact


def surprise(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Chi-square of each row's counts, in standard deviations from what chance gives."""
    expected = counts.sum(1, keepdim=True) * probabilities
    possible = expected > 0
    if bool((counts[~possible] > 0).any()):
        return float("inf")
    statistic = float(((counts - expected)[possible].square() / expected[possible]).sum())
    freedom = int(possible.sum()) - VOCABULARY
    return (statistic - freedom) / (2 * freedom) ** 0.5


def test_sampling_follows_the_dense_distribution_over_40_000_draws() -> None:
    counts, probabilities, exact = transitions(40_000)
    assert int(counts.sum()) == 40_000
    assert abs(surprise(counts, probabilities)) < 4
    assert exact.costs.plan.overall.value < 0.9  # there was something to reject
    plain = torch.stack([torch.multinomial(p, 16_000, replacement=True).bincount(minlength=6) for p in probabilities])
    assert abs(surprise(plain.float(), probabilities)) < 4


def test_a_broken_acceptance_rule_shows_in_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "accepted", lambda drafted, token: True)
    counts, probabilities, _ = transitions(2_000)
    assert surprise(counts, probabilities) > 10
