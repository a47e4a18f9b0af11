"""A plan's text with an assistant is the plan's own: the prompt is prefill, the candidates are decode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import greedy, plan_of, prompt, tiny

import coreskip
from coreskip import CoreskipError
from coreskip.predictors.plan import Plan
from coreskip.runtime.selections import selections_of
from coreskip.runtime.wrap import runtime_of

KINDS = ["static", "griffin", "similar", "dense"]


def plan_for(model: Any, kind: str) -> Plan:
    return Plan.dense(model) if kind == "dense" else plan_of(model, kind)


def repeating() -> torch.Tensor:
    return prompt(1, 6).repeat(1, 3)


@pytest.mark.parametrize("family", ["llama", "mistral", "opt"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_an_assistant_model(kind: str, family: str) -> None:
    model, ids = tiny(family), prompt(1, 9)
    assistants = [tiny(family), tiny(family, seed=3)]  # one whose candidates often hold, and one whose never do
    plain = greedy(model, ids, 24)
    with coreskip.wrap(model, plan_for(model, kind)):
        expected = greedy(model, ids, 24)
        for assistant in assistants:
            assert torch.equal(greedy(model, ids, 24, assistant_model=assistant), expected)
    assert torch.equal(plain, expected) == (kind == "dense")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 4}, {"prompt_lookup_num_tokens": 12}], ids=str)
def test_with_candidates_from_the_prompt(llama: Any, kind: str, options: dict[str, Any]) -> None:
    ids = repeating()
    with coreskip.wrap(llama, plan_for(llama, kind)):
        expected = greedy(llama, ids, 24)
        assert torch.equal(greedy(llama, ids, 24, **options), expected)


@pytest.mark.parametrize("kind", ["static", "griffin"])
def test_a_wrapped_assistant_and_one_that_is_the_model_itself(llama: Any, kind: str) -> None:
    ids, assistant = prompt(1, 9), tiny("llama")
    with coreskip.wrap(llama, plan_of(llama, kind)), coreskip.wrap(assistant, plan_of(assistant, "griffin", 0.7)):
        expected = greedy(llama, ids, 24)
        assert torch.equal(greedy(llama, ids, 24, assistant_model=assistant), expected)
        assert torch.equal(greedy(llama, ids, 24, assistant_model=llama), expected)
    plain = greedy(assistant, ids, 24)
    with coreskip.wrap(llama, plan_of(llama, kind)):
        assert torch.equal(greedy(assistant, ids, 24, assistant_model=llama), plain)


def test_candidates_do_not_vote_for_neurons(llama: Any) -> None:
    ids = prompt(1, 9)
    with coreskip.wrap(llama, plan_of(llama, "griffin")):
        runtime = runtime_of(llama)
        caches = [
            greedy(llama, ids, 12, return_dict_in_generate=True, **options).past_key_values
            for options in ({}, {"assistant_model": tiny("llama", seed=3)})
        ]
        alone, assisted = (selections_of(cache, runtime) for cache in caches)
        assert alone is not None
        assert assisted is not None
        for layer, score in alone._scores.items():
            assert torch.allclose(assisted._scores[layer], score, rtol=1e-5)


@pytest.mark.parametrize("kind", ["static", "griffin"])
def test_what_generate_returns_besides(llama: Any, kind: str) -> None:
    ids, assistant = prompt(1, 9), tiny("llama", seed=3)
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    with coreskip.wrap(llama, plan_of(llama, kind)):
        alone = greedy(llama, ids, 12, **wanted)
        assisted = greedy(llama, ids, 12, **wanted, assistant_model=assistant)
        assert torch.equal(alone.sequences, assisted.sequences)
        for name in ("scores", "logits"):
            assert len(alone[name]) == len(assisted[name]) == 12
            for one, other in zip(alone[name], assisted[name], strict=True):
                assert torch.allclose(one, other, atol=1e-4)
        with pytest.raises(CoreskipError, match="output_hidden_states"):
            greedy(llama, ids, 12, **wanted, assistant_model=assistant, output_hidden_states=True)


@pytest.mark.parametrize("kind", ["static", "griffin"])
def test_the_next_turn_of_a_conversation(llama: Any, kind: str) -> None:
    """transformers by itself reads the whole conversation once more, on top of the cache."""
    ids, more = prompt(1, 9), prompt(1, 5, seed=2)
    texts = []
    with coreskip.wrap(llama, plan_of(llama, kind)):
        for options in ({}, {"assistant_model": tiny("llama", seed=3)}):
            first = greedy(llama, ids, 8, return_dict_in_generate=True)
            whole = torch.cat([first.sequences, more], dim=1)
            texts.append(greedy(llama, whole, 8, past_key_values=first.past_key_values, **options))
    assert torch.equal(*texts)


def test_a_prompt_in_chunks_a_masked_one_and_one_of_embeddings(llama: Any) -> None:
    ids, mask = prompt(1, 9), torch.ones(1, 9, dtype=torch.int64)
    mask[0, :2] = 0
    with coreskip.wrap(llama, plan_of(llama, "griffin")):
        for options in ({"prefill_chunk_size": 4}, {"attention_mask": mask}):
            expected = greedy(llama, ids, 16, **options)
            assert torch.equal(greedy(llama, ids, 16, **options, assistant_model=tiny("llama", seed=3)), expected)
        options = {"inputs_embeds": llama.get_input_embeddings()(ids).detach(), "do_sample": False}
        expected = llama.generate(**options, max_new_tokens=16)
        assert torch.equal(llama.generate(**options, max_new_tokens=16, prompt_lookup_num_tokens=3), expected)
        assert greedy(llama, ids, 1, assistant_model=tiny("llama", seed=3)).shape == (1, 10)


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_packed_weights(weights: str) -> None:
    settings = {"hidden_size": 128, "intermediate_size": 256}
    model, ids = tiny("llama", **settings), prompt(1, 9)
    with coreskip.wrap(model, replace(Plan.dense(model), weights=weights), keep_originals=True):
        expected = greedy(model, ids, 24)
        for options in ({"assistant_model": tiny("llama", **settings)}, {"prompt_lookup_num_tokens": 3}):
            assert torch.equal(greedy(model, ids, 24, **options), expected)


def test_sampling_with_an_assistant_ends(llama: Any) -> None:
    with coreskip.wrap(llama, plan_of(llama, "griffin")):
        output = greedy(llama, prompt(1, 9), 12, do_sample=True, assistant_model=tiny("llama", seed=3))
        assert output.shape == (1, 21)


def test_an_exact_model_with_an_assistant_gives_the_dense_text(llama: Any) -> None:
    ids = prompt(1, 9)
    plain = greedy(llama, ids, 24)
    with coreskip.wrap(llama, plan_of(llama, "griffin", 0.1), exact=True):
        assert torch.equal(greedy(llama, ids, 24, assistant_model=tiny("llama", seed=3)), plain)
