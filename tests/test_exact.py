"""Exact mode gives the dense model's own text, token for token, whatever drafts."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
from exact_mode import Eager, dense, drafted, needs_kernels, tokens_and_statistics
from tiny_models import greedy, plan_of, prompt, tiny
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import coreskip
from coreskip import CoreskipError, Engine
from coreskip.bench.exactness import places_off
from coreskip.kernels.ops import available
from coreskip.predictors.plan import Plan
from coreskip.runtime.drafting import Statistics
from coreskip.runtime.wrap import runtime_of

ROWS_APART = ["llama", "llama_bias", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "olmo2"]
ROWS_APART += ["stablelm", "starcoder2", "opt", "gpt_neox", "olmo", "cohere", "granite", "phi", "smollm3"]


@needs_kernels
@pytest.mark.parametrize("family", ROWS_APART)
def test_greedy_text_is_the_dense_models(family: str) -> None:
    model, ids = tiny(family), prompt(1, 9)
    expected = dense(model, ids, new=40)
    for keep in (0.05, 0.8):
        output, done = tokens_and_statistics(model, plan_of(model, "griffin", keep), ids, new=40)
        assert torch.equal(output, expected), keep
        assert done.note is None
        assert sum(done.drafted.values()) > 0
        assert done.tokens == 40 == 1 + done.passes + sum(done.accepted.values())


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_too(dtype: torch.dtype) -> None:
    """There near-ties are common: one pass over several tokens must round as passes over one do."""
    model = tiny("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=2).to(dtype)
    prompts = [prompt(1, 30 + 30 * seed, seed=seed) for seed in range(4)]  # over the 128 positions of an attention task
    with coreskip.wrap(model, Plan.dense(model)):
        expected = [greedy(model, ids, new=60) for ids in prompts]
    for kind in ("griffin", "static", "similar"):
        with coreskip.wrap(model, plan_of(model, kind, 0.7), exact=True):
            for ids, text in zip(prompts, expected, strict=True):
                output, done = drafted(model, ids, new=60)
                assert done.note is None
                assert sum(done.drafted.values()) > 0
                assert torch.equal(output, text), kind


@needs_kernels
def test_a_good_draft_is_accepted_and_saves_passes(llama: Any) -> None:
    ids = prompt(1, 9)
    static = plan_of(llama, "static", 1.0)
    with coreskip.wrap(llama, static, exact=True):
        exact = runtime_of(llama).exact
        exact._has_draft, exact.costs = True, Eager()
        for options in ({}, {"do_sample": True, "temperature": 1.7, "top_k": 20}):
            greedy(llama, ids, 33, **options)
            assert exact.last.acceptance == 1.0, options
            assert exact.last.passes == 4  # 32 tokens after the first, 8 a pass
            assert exact.last.tokens_per_pass == 8.0


@needs_kernels
def test_max_new_tokens_is_reached_exactly(llama: Any) -> None:
    with coreskip.wrap(llama, plan_of(llama, "griffin", 0.9), exact=True):
        for new in (1, 2, 3, 7, 8, 9, 17):
            output, done = drafted(llama, prompt(1, 9), new=new)
            assert output.shape[1] == 9 + new
            assert done.tokens == new


OPTIONS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2, "min_new_tokens": 12},
    {"do_sample": True, "temperature": 0.7},
    {"do_sample": True, "top_k": 5, "top_p": 0.8},
    {"do_sample": True, "top_k": 0, "min_p": 0.02, "repetition_penalty": 1.2},
    {"prefill_chunk_size": 4},
]


@needs_kernels
def test_every_option_acts_as_in_plain_generation() -> None:
    """Sampling draws the same noise for the same token, so that one seed gives one text, drafted or not."""
    model = tiny("llama", vocab_size=24)
    ids = prompt(1, 9) % 24
    expected = []
    with coreskip.wrap(model, Plan.dense(model)):
        for options in OPTIONS:
            for seed in range(3):
                torch.manual_seed(seed)
                expected.append((greedy(model, ids, new=40, **options), torch.get_rng_state()))
    with coreskip.wrap(model, plan_of(model, "griffin", 0.6), exact=True):
        for options in OPTIONS:
            for seed in range(3):
                torch.manual_seed(seed)
                output, done = drafted(model, ids, new=40, **options)
                text, state = expected.pop(0)
                assert sum(done.drafted.values()) > 0
                assert torch.equal(output, text), (options, seed)
                assert torch.equal(torch.get_rng_state(), state)  # noise drawn ahead was given back


@needs_kernels
def test_end_of_sequence_ends_in_the_middle_of_a_draft(llama: Any) -> None:
    ids = prompt(1, 9)
    whole = dense(llama, ids, new=30)[0, 9:].tolist()
    with coreskip.wrap(llama, plan_of(llama, "griffin", 0.9), exact=True):
        for eos in dict.fromkeys(whole[3:12]):
            output, _ = drafted(llama, ids, new=30, eos_token_id=eos)
            assert output[0, 9:].tolist() == whole[: whole.index(eos) + 1]


class Puts(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@needs_kernels
def test_a_streamer_sees_token_after_token(llama: Any) -> None:
    ids = prompt(1, 9)
    mine, theirs = Puts(), Puts()
    tokens_and_statistics(llama, plan_of(llama, "griffin", 0.9), ids, new=20, streamer=mine)
    dense(llama, ids, new=20, streamer=theirs)
    assert mine.values == theirs.values
    assert mine.ended


class Remembers(LogitsProcessor):
    """A user's processor with a memory: it must see every position once, in order."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        return scores.roll(len(self.lengths) % 3, dims=-1)


@needs_kernels
def test_processors_with_a_memory_see_each_position_once(llama: Any) -> None:
    ids, mine, theirs = prompt(1, 9), Remembers(), Remembers()
    plan = plan_of(llama, "griffin", 0.9)
    output, _ = tokens_and_statistics(llama, plan, ids, new=20, logits_processor=LogitsProcessorList([mine]))
    assert torch.equal(output, dense(llama, ids, new=20, logits_processor=LogitsProcessorList([theirs])))
    assert mine.lengths == list(range(9, 29)) == theirs.lengths


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_scores_and_cache_are_those_of_plain_generation(family: str) -> None:
    """What the next turn of a conversation goes on from holds no trace of rejected drafts."""
    model, ids = tiny(family), prompt(1, 9)
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    mine, _ = tokens_and_statistics(model, plan_of(model, "griffin", 0.5), ids, new=21, **options)
    theirs = dense(model, ids, new=21, **options)
    for name in ("scores", "logits"):
        assert torch.equal(torch.cat(getattr(mine, name)), torch.cat(getattr(theirs, name)))
    for left, right in zip(mine.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        assert torch.equal(left.keys, right.keys)
        assert torch.equal(left.values, right.values)
    turn = torch.cat([theirs.sequences, prompt(1, 4, seed=5)], dim=1)
    again, _ = tokens_and_statistics(
        model, plan_of(model, "griffin", 0.5), turn, new=12, past_key_values=mine.past_key_values
    )
    assert torch.equal(again, dense(model, turn, new=12, past_key_values=theirs.past_key_values))


@needs_kernels
def test_a_cache_made_by_hand_keeps_all_of_a_sliding_models_past() -> None:
    model, ids = tiny("mistral"), prompt(1, 9)
    plan = plan_of(model, "griffin", 0.7)
    output, done = tokens_and_statistics(model, plan, ids, new=20, past_key_values=DynamicCache())
    assert done.note is None
    assert torch.equal(output, dense(model, ids, new=20, past_key_values=DynamicCache()))


# --- where nothing is drafted


@pytest.mark.parametrize(
    ("options", "rows", "note"),
    [
        ({}, 2, "a batch of 2"),
        ({"num_return_sequences": 3, "do_sample": True}, 1, "a batch of 3"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, 1, "hidden states"),
        ({"use_cache": False}, 1, "not a DynamicCache"),
        ({"cache_implementation": "static"}, 1, "not a DynamicCache"),
    ],
)
def test_what_is_not_covered_runs_densely_with_a_note(
    llama: Any, options: dict[str, Any], rows: int, note: str, caplog: pytest.LogCaptureFixture
) -> None:
    ids = prompt(rows, 9)
    caplog.set_level(logging.INFO, logger="coreskip")
    torch.manual_seed(0)
    output, done = tokens_and_statistics(llama, plan_of(llama, "griffin", 0.05), ids, new=8, **options)
    assert note in done.note
    assert note in caplog.text
    torch.manual_seed(0)
    expected = dense(llama, ids, new=8, **options)
    assert torch.equal(getattr(output, "sequences", output), getattr(expected, "sequences", expected))


def test_padding_and_beams_run_densely(llama: Any) -> None:
    ids, plan = prompt(1, 9), plan_of(llama, "griffin", 0.05)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    output, done = tokens_and_statistics(llama, plan, ids, new=8, attention_mask=mask)
    assert "padded" in done.note
    assert torch.equal(output, dense(llama, ids, new=8, attention_mask=mask))
    output, done = tokens_and_statistics(llama, plan, ids, new=8, num_beams=3)
    assert done is None  # beam search is another loop, and dense
    assert torch.equal(output, dense(llama, ids, new=8, num_beams=3))


@needs_kernels
@pytest.mark.parametrize("mode", ["exact", "lookup"])
@pytest.mark.parametrize(("place", "other"), [(0, 2), (1, 2), (2, 0)])
def test_a_layer_that_stands_in_the_model_twice_is_not_drafted_for(
    llama: Any, mode: str, place: int, other: int
) -> None:
    """It appends two entries a token to one layer of the KV cache, and none to another."""
    ids = prompt(1, 9)
    plan = plan_of(llama, "griffin", 0.8) if mode == "exact" else Plan.dense(llama)
    with coreskip.wrap(llama, plan, exact=mode == "exact", lookup=mode == "lookup"):
        greedy(llama, ids, 6)
        greedy(llama, ids, 6)  # by native steps, whose drafts have been measured
        llama.model.layers[place] = llama.model.layers[other]
        found = [greedy(llama, ids, 12) for _ in range(2)]
        decoder = runtime_of(llama).exact or runtime_of(llama).lookup
        assert "one entry a token" in decoder.last.note
    expected = greedy(llama, ids, 12)
    assert all(torch.equal(text, expected) for text in found)


def test_unwrap_restores_attention_and_verification_is_dense(llama: Any) -> None:
    configs = [layer.self_attn.config for layer in llama.model.layers]
    ids, more = prompt(1, 9), prompt(1, 3, seed=4)

    def logits() -> torch.Tensor:
        cache = DynamicCache(config=llama.config)
        llama(ids, past_key_values=cache)
        return torch.cat([llama(t, past_key_values=cache).logits for t in more.split(1, dim=1)])

    with torch.no_grad():
        with coreskip.wrap(llama, Plan.dense(llama)):
            expected = logits()
        with coreskip.wrap(llama, plan_of(llama, "griffin", 0.05), exact=True):
            assert torch.equal(logits(), expected)
            llama.to(torch.float64).to(torch.float32)
            assert torch.equal(logits(), expected)
    assert [layer.self_attn.config for layer in llama.model.layers] == configs
    assert all(layer.self_attn.config is llama.config for layer in llama.model.layers)


# --- engine, statistics, bench


def test_the_engine_in_exact_mode(embedded: tuple[Any, Any]) -> None:
    model, tokenizer = embedded
    text = "red green blue, " * 4 + "red"
    with Engine(model, tokenizer, Plan.dense(model)) as engine:
        assert engine.statistics is None
        expected = engine.generate(text, max_new_tokens=16, do_sample=False)
        sampled = engine.generate(text, max_new_tokens=8, do_sample=True, seed=3)
        batch = engine.generate([text, "Hello"], max_new_tokens=4, do_sample=False)
    stop = expected.split()[2]
    with Engine(model, tokenizer, exact=True) as engine:
        for _ in range(2):
            assert engine.generate(text, max_new_tokens=16, do_sample=False) == expected
        if available("cpu") is None:
            assert engine.statistics.accepted["lookup"] > 5
            assert engine.statistics.tokens_per_pass > 1.2
        assert engine.generate(text, max_new_tokens=8, do_sample=True, seed=3) == sampled
        assert engine.generate([text, "Hello"], max_new_tokens=4, do_sample=False) == batch
        cut = engine.generate(text, max_new_tokens=16, do_sample=False, stop_strings=stop)
        assert cut == expected[: expected.index(stop)]
        assert "".join(engine.stream(text, max_new_tokens=16, do_sample=False, stop_strings=stop)) == cut
        texts = ["", ""]

        def work(i: int) -> None:
            texts[i] = engine.generate(text, max_new_tokens=16, do_sample=False)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert texts == [expected, expected]
        with pytest.raises(CoreskipError, match="wrapped already"):
            Engine(model, tokenizer, lookup=True)


def test_statistics_say_what_happened() -> None:
    done = Statistics(tokens=9, passes=4, drafted={"lookup": 6, "plan": 2}, accepted={"lookup": 4, "plan": 0})
    assert done.acceptance == 0.5
    assert done.tokens_per_pass == 2.0
    assert "4 of 6 from the lookup" in str(done)
    assert "a batch" in str(Statistics(tokens=3, note="a batch of 2"))
    assert Statistics().acceptance == Statistics().tokens_per_pass == 0.0


def test_the_bench_notices_a_token_that_is_not_hugging_faces(llama: Any) -> None:
    ids = prompt(1, 9)
    text = greedy(llama, ids, 12)
    assert places_off(llama, ids, text) == []
    text[0, 14] = (text[0, 14] + 1) % 128
    assert places_off(llama, ids, text)[0]["at"] == 5
    assert places_off(llama, ids, text)[0]["gap"] > 0
