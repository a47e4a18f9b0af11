"""The adapter for lm-evaluation-harness: its likelihoods are those of decode steps under the plan."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_mistakes import characters
from tiny_models import plan_of, tiny

import coreskip
from coreskip import CoreskipError
from coreskip.runtime.lm_evaluation import Likelihoods, language_model, register

CONTEXT, CONTINUATION = "the old ferry ", "crossed the river"


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def token_by_token(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """By hand: all but the context's last token prefilled, one decode step for each token scored."""
    out = model(torch.tensor([context[:-1]]), use_cache=True)
    total, greedy = 0.0, True
    for last, wanted in zip([context[-1], *continuation[:-1]], continuation, strict=True):
        with torch.no_grad():
            out = model(torch.tensor([[last]]), past_key_values=out.past_key_values, use_cache=True)
        total += float(out.logits[0, -1].double().log_softmax(-1)[wanted])
        greedy = greedy and int(out.logits[0, -1].argmax()) == wanted
    return total, greedy


@pytest.mark.parametrize("kind", [None, "static", "griffin"])
def test_likelihoods_are_those_of_decode_steps(kind: str | None) -> None:
    model, tokenizer = tiny("llama"), characters()
    plan = None if kind is None else plan_of(model, kind)
    found = Likelihoods(model, tokenizer, plan)
    (score, greedy), (again, _) = found.loglikelihood(
        [request(CONTEXT, CONTINUATION), request("the old ferry", " crossed the river")], disable_tqdm=True
    )
    found.engine.close()
    ids = tokenizer("the old ferry").input_ids, tokenizer(" crossed the river").input_ids
    with coreskip.wrap(model, plan):
        expected = token_by_token(model, *ids)
    assert (score, greedy) == (pytest.approx(expected[0], rel=1e-5), expected[1])
    assert again == score, "a space at the context's end belongs to the continuation"
    if kind is not None:
        dense = Likelihoods(model, tokenizer).loglikelihood([request(CONTEXT, CONTINUATION)], disable_tqdm=True)
        assert abs(dense[0][0] - score) > 1e-3


def test_greedy_continuations_and_single_tokens() -> None:
    model, tokenizer = tiny("llama"), characters()
    found = Likelihoods(model, tokenizer, plan_of(model, "static"))
    text = found.generate_until([request("the ferry", {"max_gen_toks": 1, "until": []})], disable_tqdm=True)[0]
    for wanted in ("a", "b"):
        score, greedy = found.loglikelihood([request("the ferry", wanted)], disable_tqdm=True)[0]
        assert score < 0
        assert greedy == (wanted == text)
    with pytest.raises(CoreskipError, match="nothing to score"):
        found.loglikelihood([request("the ferry", "")], disable_tqdm=True)


def test_rolling_likelihoods_go_over_all_of_a_text() -> None:
    model, tokenizer = tiny("gpt2", n_positions=16), characters()
    found = Likelihoods(model, tokenizer, plain=True)
    text = "a text that is longer than the model's positions"
    ids = [found._start(), *tokenizer(text).input_ids]
    expected = 0.0
    for start in range(0, len(ids) - 1, 15):
        piece = torch.tensor([ids[start : start + 16]])
        with torch.no_grad():
            logits = model(piece).logits[0, :-1].double().log_softmax(-1)
        expected += float(logits.gather(1, piece[0, 1:, None]).sum())
    assert found.loglikelihood_rolling([request(text)], disable_tqdm=True) == [pytest.approx(expected, rel=1e-5)]


def test_generation_ends_before_until() -> None:
    model, tokenizer = tiny("llama", vocab_size=99), characters()
    found = Likelihoods(model, tokenizer)
    options = {"max_gen_toks": 12, "until": [], "do_sample": False, "suppress_tokens": [0, 1, 2, 3]}
    whole = found.generate_until([request("abc", options)], disable_tqdm=True)[0]
    cut = found.generate_until([request("abc", {**options, "until": [whole[5:7]]})], disable_tqdm=True)[0]
    assert cut == whole[: whole.index(whole[5:7])]


def test_the_harness_is_asked_for_where_it_is_missing() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        with pytest.raises(CoreskipError, match="pip install lm-eval"):
            language_model()
        return
    from lm_eval.api.registry import get_model

    assert get_model("coreskip" if register() else "") is register()
