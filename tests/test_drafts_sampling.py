"""Scores that are no numbers: plain generation's error where there is nothing to draw from, its choice where not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact_mode import Eager, needs_kernels
from tiny_models import VOCABULARY, greedy, plan_of, prompt, tiny
from transformers import LogitsProcessor, LogitsProcessorList

import coreskip
from coreskip.predictors.plan import Plan
from coreskip.runtime.passes import NativePasses
from coreskip.runtime.wrap import runtime_of

LOOPS = ["loop", "exact", "lookup"]
NAN, INF = float("nan"), float("inf")


class From(LogitsProcessor):
    """From one length of the text on, scores become `value`: all of them, or only the one of a token."""

    def __init__(self, length: int, value: float, token: int | None = None) -> None:
        self.length, self.value, self.token, self.lengths = length, value, token, list[int]()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        if input_ids.shape[1] < self.length:
            return scores
        changed = scores.clone()
        changed[:, slice(None) if self.token is None else self.token] = self.value
        return changed


def wrapped(model: Any, loop: str) -> Any:
    plan = plan_of(model, "griffin", 0.7) if loop == "exact" else Plan.dense(model)
    wrapped = coreskip.wrap(model, plan, exact=loop == "exact", lookup=loop == "lookup")
    for _ in range(2):
        greedy(wrapped, prompt(1, 9), 6)  # from here on steps are native
    drafter = runtime_of(model).exact or runtime_of(model).lookup
    if drafter is not None:
        drafter.costs = Eager()
    return wrapped


def outcome(model: Any, processor: From, **options: Any) -> Any:
    torch.manual_seed(5)
    try:
        found: Any = greedy(model, prompt(1, 9), 12, logits_processor=LogitsProcessorList([processor]), **options)
    except RuntimeError as error:
        found = f"{type(error).__name__}: {error}"
    return found, processor.lengths, torch.get_rng_state()


CASES = [(NAN, None), (-INF, None), (INF, None), (NAN, 7), (INF, 7), (-INF, 7)]


@needs_kernels
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("do_sample", [True, False], ids=["sample", "greedy"])
def test_as_plain_generation(loop: str, do_sample: bool) -> None:
    for length in (9, 14):
        for value, token in CASES:
            expected = outcome(tiny("llama"), From(length, value, token), do_sample=do_sample)
            with wrapped(tiny("llama"), loop) as model:
                found = outcome(model, From(length, value, token), do_sample=do_sample)
            if isinstance(expected[0], str):
                assert found[0] == expected[0]
                assert "probability tensor" in found[0]
            else:
                assert torch.equal(found[0], expected[0])
            assert found[1] == expected[1]  # at the same token
            assert torch.equal(found[2], expected[2])


@needs_kernels
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("rows", [slice(None), slice(30, 31)], ids=["all", "one"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_weights_that_are_no_numbers(loop: str, rows: slice, value: float) -> None:
    """The LM head's: infinities of one sign make a score infinite or NaN, by the sign of what they multiply."""
    texts = []
    for wrap in (False, True):
        model = tiny("llama")
        if wrap:
            model = wrapped(model, loop)
        with torch.no_grad():
            model.lm_head.weight[rows] = value
        if wrap:
            runtime_of(model).repack()
            greedy(model, prompt(1, 9), 3)
        texts.append(greedy(model, prompt(1, 9), 12))
        with pytest.raises(RuntimeError, match="probability tensor"):
            greedy(model, prompt(1, 9), 12, do_sample=True)
    assert torch.equal(*texts)


@needs_kernels
@pytest.mark.parametrize("do_sample", [True, False], ids=["sample", "greedy"])
def test_a_draft_without_a_likeliest_token_is_only_a_bad_guess(do_sample: bool, monkeypatch: Any) -> None:
    """The plan's own logits are NaN: in half precision what it leaves out can be what kept them finite."""
    expected = outcome(tiny("llama"), From(99, 0.0), do_sample=do_sample)[0]
    with wrapped(tiny("llama"), "exact") as model:
        drafted = NativePasses.draft

        def broken(passes: Any, tokens: Any) -> torch.Tensor:
            return drafted(passes, tokens) * NAN

        monkeypatch.setattr(NativePasses, "draft", broken)
        assert torch.equal(outcome(model, From(99, 0.0), do_sample=do_sample)[0], expected)
        assert sum(runtime_of(model).exact.last.drafted.values()) > 0


@needs_kernels
def test_a_draft_asks_no_user_which_tokens_are_allowed() -> None:
    """A prefix function may know no answer for a text that is not to be."""
    model, ids = tiny("llama"), prompt(1, 9)
    expected, asked = greedy(model, ids, 20), list[tuple[int, ...]]()

    def allowed(row: int, text: torch.Tensor) -> list[int]:
        asked.append(tuple(text.tolist()))
        return list(range(VOCABULARY)) if torch.equal(text, expected[0, : len(text)]) else []

    with wrapped(model, "exact"):
        assert torch.equal(greedy(model, ids, 20, prefix_allowed_tokens_fn=allowed), expected)
        assert sum(runtime_of(model).exact.last.drafted.values()) > 0
    assert len(asked) == len(set(asked)) == 20
