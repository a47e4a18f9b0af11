"""Where drafts come from, what is worth drafting, and what native passes draft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact_mode import Eager, dense, needs_kernels
from tiny_models import greedy, plan_of, prompt
from transformers import DynamicCache

import coreskip
from coreskip.kernels.step import likeliest
from coreskip.predictors.plan import Plan
from coreskip.runtime.draft_costs import DraftCostModel, DraftSource
from coreskip.runtime.drafting import PromptLookup
from coreskip.runtime.native import NativeSequence
from coreskip.runtime.passes import NativePasses
from coreskip.runtime.wrap import runtime_of


def test_lookup_takes_the_longest_match_and_its_latest_occurrence() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 9, 3, 4, 6, 7, 1, 3, 4])
    assert lookup.find(3) == (2, [6, 7, 1])
    lookup = PromptLookup([1, 2, 3, 4, 5, 9, 3, 4, 6, 7, 1, 2, 3, 4])
    assert lookup.find(2) == (4, [5, 9])
    assert PromptLookup([1, 2, 3]).find(4) == (0, [])
    assert PromptLookup([7, 8, 7, 8, 7, 8]).find(5) == (4, [7, 8, 7, 8, 7])  # a repetition is carried on
    assert PromptLookup([]).find(5) == (0, [])


def test_lookup_goes_on_after_drafts() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 9, 6, 7, 1])
    assert lookup.find(2, [2]) == (2, [3, 4])
    assert lookup.find(3, [2, 3, 4]) == (4, [5, 9, 6])
    assert lookup.find(2, [8]) == (0, [])
    assert PromptLookup([7, 8, 7, 8]).find(4, [7]) == (3, [8, 7, 8, 7])


def test_the_cost_model_weighs_acceptance_against_measured_cost() -> None:
    costs = DraftCostModel()
    assert not costs.ready
    for _ in range(2):
        costs.record_verification(1, 0.040)
    assert costs.ready
    for count in (4, 4, 8):
        costs.record_verification(count, 0.040 + 0.002 * (count - 1))
    assert costs.verify_token_s == pytest.approx(0.002)
    assert costs.best_draft_length(0.01, 0.0, 7)[0] == 0  # one more row costs more than it brings
    assert costs.best_draft_length(0.95, 0.0, 7)[0] == 7
    assert 1 <= costs.best_draft_length(0.4, 0.0, 7)[0] <= 3
    assert costs.best_draft_length(0.95, 0.038, 7)[0] == 0  # a draft step at the price of a dense one never pays
    assert costs.best_draft_length(0.95, 0.010, 7)[0] >= 3
    length, rate = costs.best_draft_length(0.8, 0.010, 7)
    rates = [sum(0.8**i for i in range(n + 1)) / (0.040 + n * 0.012) for n in range(8)]
    assert length == max(range(8), key=rates.__getitem__)
    assert rate == pytest.approx(max(rates))


def test_a_continuation_is_as_long_as_it_saves_draft_passes() -> None:
    costs = DraftCostModel()
    for _ in range(2):
        costs.record_verification(1, 0.040)
    costs.record_draft(1, 2, 0.010, first=False)
    costs.record_draft(5, 1, 0.009, first=False)
    assert costs.draft_s == pytest.approx(0.005)
    assert costs.draft_token_s == pytest.approx(0.001)
    assert costs.best_continuation_length(0.1, 7) == (
        0,
        pytest.approx(0.005),
    )  # a row that rarely holds costs more than it saves
    assert costs.best_continuation_length(0.9, 7)[0] >= 5
    assert costs.best_continuation_length(0.9, 2)[0] == 2
    width, each = costs.best_continuation_length(0.6, 7)
    costs = [(0.005 + 0.001 * n) / sum(0.6**i for i in range(n + 1)) for n in range(8)]
    assert width == min(range(8), key=costs.__getitem__)
    assert each == pytest.approx(min(costs))


def test_a_source_that_does_not_pay_is_tried_ever_more_rarely() -> None:
    source = DraftSource({1: 0.5})
    tries = [i for i in range(400) if source.due(pays=False)]
    assert tries == [31, 95, 223]
    assert source.due(pays=True)
    assert [i for i in range(40) if source.due(pays=False)] == [31]


class AlongTheText(Eager):
    """Drafts from the plan alone, along the continuations that the text offers."""

    draft_s, draft_token_s = 0.1, 0.01  # type: ignore[assignment]

    def best_draft_length(self, acceptance: float, draft_s: float, most: int) -> tuple[int, float]:
        return (most, 2.0) if draft_s else (0, 1.0)


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 1}, {"repetition_penalty": 1.0001}])
def test_the_plan_drafts_along_what_the_text_offers(llama: Any, options: dict[str, Any], monkeypatch: Any) -> None:
    """A text that repeats itself is drafted in fewer passes than tokens, by the native sampler and by Python's."""
    widths: list[int] = []

    def spied(native: Any, tokens: Any) -> torch.Tensor:
        widths.append(len(tokens))
        return native._native.step(tokens, native._draft)

    monkeypatch.setattr(NativePasses, "draft", spied)
    ids = prompt(1, 9).repeat(1, 4)
    torch.manual_seed(0)
    expected = dense(llama, ids, new=60, **options)
    with coreskip.wrap(llama, plan_of(llama, "static", 1.0), exact=True):
        exact = runtime_of(llama).exact
        exact._has_draft, exact.costs = True, AlongTheText()
        torch.manual_seed(0)
        assert torch.equal(greedy(llama, ids, 60, **options), expected)
        assert exact.last.drafted["plan"] > 40
        assert exact.last.acceptance == 1.0
        assert max(widths) > 1


@needs_kernels
def test_native_drafts_stop_at_the_first_doubt(llama: Any) -> None:
    with coreskip.wrap(llama, Plan.dense(llama)), torch.no_grad():
        runtime, cache = runtime_of(llama), DynamicCache(config=llama.config)
        for tokens in (prompt(1, 9), torch.tensor([[5]])):
            llama(tokens, past_key_values=cache)
        sequence, chosen = NativeSequence(runtime.steps.native, cache), runtime.program_for(cache)
        start, made, chances = sequence.length, [5], list[float]()
        for _ in range(6):
            logits = sequence.step(made[-1:], chosen)[0].float()
            made.append(int(logits.argmax()))
            chances.append(float(logits.softmax(0).max()))
        sequence.rollback(start)
        tokens, found = sequence.draft(5, 6, 0.0, chosen)
        assert (tokens, sequence.length) == (made[1:], start + 6)
        assert found == pytest.approx(chances, rel=1e-4)
        for least in (sorted(chances)[2], 2.0):
            sequence.rollback(start)
            count = next(i for i, chance in enumerate(chances, 1) if chance < least * 1.001)
            assert sequence.draft(5, 6, least * 1.001, chosen)[0] == made[1 : 1 + count]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_likeliest_tokens_are_the_first_of_the_greatest(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 9001, generator=torch.Generator().manual_seed(3)).to(dtype)
    logits[1, [400, 8000]] = 9.0
    logits[2, 5000] = float("inf")
    logits[3, 7000] = float("nan")
    tokens, chances = likeliest(logits)
    assert tokens == logits.float().argmax(1).tolist()
    assert tokens[1:4] == [400, 5000, 7000]
    expected = logits.float().softmax(1).max(1).values
    assert [chances[i] for i in (0, 1, 4)] == pytest.approx(expected[[0, 1, 4]].tolist(), rel=1e-4)
    assert likeliest(logits, chances=False) == (tokens, [])


@needs_kernels
def test_drafting_that_does_not_pay_switches_itself_off(llama: Any) -> None:
    """Random text and a draft that costs as much as the dense pass: a few drafts, then passes over one token."""
    plan, ids = plan_of(llama, "griffin", 0.05), prompt(1, 9)

    class Costly(DraftCostModel):
        verify_s, verify_token_s, draft_s, ready = 1.0, 0.3, 0.9, True  # type: ignore[assignment]

    with coreskip.wrap(llama, plan, exact=True):
        exact = runtime_of(llama).exact
        exact.costs = Costly()
        greedy(llama, ids, 200, do_sample=True, temperature=5.0)
        assert sum(exact.last.drafted.values()) < 30
        assert exact.last.passes > 180


@needs_kernels
def test_a_draft_that_could_never_pay_is_not_tried_again(llama: Any) -> None:
    """Choosing core neurons costs more than the rest of this text could save, however well they drafted."""

    class Settling(DraftCostModel):
        verify_s, verify_token_s, draft_s, first_draft_s, ready = 1.0, 0.1, 0.8, 50.0, True  # type: ignore[assignment]

    with coreskip.wrap(llama, plan_of(llama, "griffin", 0.8), exact=True):
        exact = runtime_of(llama).exact
        exact.costs = Settling()
        greedy(llama, prompt(1, 9), 120, do_sample=True, temperature=5.0)
        assert exact.last.drafted["plan"] == 0


@needs_kernels
def test_without_a_continuation_the_plan_drafts_several_tokens_a_native_call(llama: Any, monkeypatch: Any) -> None:
    recorded: list[tuple[int, int]] = []

    class Recorded(Eager):
        def record_draft(self, tokens: int, passes: int, seconds: float, first: bool) -> None:
            recorded.append((tokens, passes))

    monkeypatch.setattr(PromptLookup, "find", lambda self, most, drafts=(): (0, []))
    ids = prompt(1, 9)
    expected = dense(llama, ids, new=40)
    with coreskip.wrap(llama, plan_of(llama, "static", 1.0), exact=True):
        exact = runtime_of(llama).exact
        exact._has_draft, exact.costs = True, Recorded()
        assert torch.equal(greedy(llama, ids, 40), expected)
        assert exact.last.acceptance == 1.0
    assert {tokens for tokens, _ in recorded} == {1}
    assert max(passes for _, passes in recorded) > 1
