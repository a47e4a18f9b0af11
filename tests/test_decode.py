"""The native decode step: the same logits as the model's own modules, for whatever it says it covers."""

from __future__ import annotations

import copy
import logging
import threading
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tiny_models import VOCABULARY, greedy, plan_of, prompt, tiny
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

import coreskip
from coreskip.kernels import cpu
from coreskip.kernels.groups import ungroup, untile
from coreskip.kernels.ops import PackedLinear, available
from coreskip.predictors.plan import Plan
from coreskip.runtime.calls import NotCovered, compare
from coreskip.runtime.selections import selections_of
from coreskip.runtime.wrap import runtime_of

pytestmark = pytest.mark.skipif(available("cpu") is not None, reason="needs the compiled kernels")

COVERED = (
    "llama", "llama_bias", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "olmo2", "stablelm",
    "starcoder2", "granite", "phi", "nemotron_relu2", "smollm3",
)  # fmt: skip
NOT_COVERED = ("doge", "nemotron_h")


def refusal(model: Any) -> str | None:
    return runtime_of(model).steps.native.refusal


def ragged() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts of 9 and 5 tokens, the second padded on the left."""
    ids = prompt(2, 9)
    ids[1, :4] = 0
    return ids, (ids > 0).long()


def some_tokens(rows: int, count: int) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(3))


def prefilled(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> DynamicCache:
    """The KV cache of prompts that are padded on the left."""
    cache = DynamicCache(config=model.config)
    with coreskip.prefilling():
        places = (mask.cumsum(1) - 1).clamp_min(0)
        model(ids, attention_mask=mask, position_ids=places, past_key_values=cache)
    return cache


def teacher_forced(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor, each: int, cache: Any = None
) -> torch.Tensor:
    """Logits of `tokens` [rows, n], decoded `each` at a time after prompts padded on the left, of which a `cache` may
    hold the keys and values."""
    cache, length, logits = cache or prefilled(model, ids, mask), ids.shape[1], []
    mask = torch.cat([mask, torch.ones_like(tokens)], 1)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    for at, some in zip(range(length, mask.shape[1], each), tokens.split(each, 1), strict=True):
        given = {"attention_mask": mask[:, : at + each], "position_ids": places[:, at : at + each]}
        logits.append(model(some, past_key_values=cache, **given).logits)
    return torch.cat(logits, 1)


def spy(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each native call from now on."""
    decoder, seen = runtime_of(model).steps.native, []
    count = decoder._count

    def counted(tokens: int, skipped: int) -> None:
        seen.append(tokens)
        count(tokens, skipped)

    monkeypatch.setattr(decoder, "_count", counted)
    return seen


def cut_neurons(model: Any, plan: Plan) -> Any:
    """The model whose other neurons' down columns are zero: what a static plan stands for."""
    twin = copy.deepcopy(model)
    for policy, mlp in zip(plan.layers, coreskip.predictors.anatomy.dissect(twin).mlps, strict=True):
        rows = mlp.down.weight.data
        left_out = torch.ones(rows.shape[1], dtype=torch.bool)
        left_out[policy.neurons.indices] = False
        rows[:, left_out] = 0
    return twin


@pytest.mark.parametrize("kind", ["dense", "static"])
@pytest.mark.parametrize("family", COVERED)
def test_two_hundred_steps_from_ragged_prompts(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    plan = Plan.dense(model) if kind == "dense" else plan_of(model, "static")
    reference = model if kind == "dense" else cut_neurons(model, plan)
    ids, mask = ragged()
    tokens = some_tokens(2, 200)

    def all_at_once(judge: Any) -> torch.Tensor:
        """Each row on its own, unpadded. A static plan leaves prefill dense: the prompt's keys and values come from the
        whole model."""
        own, logits = copy.deepcopy(model).to(judge.dtype), []
        for row in range(2):
            first = int((mask[row] == 0).sum())
            cache = DynamicCache(config=model.config)
            own(ids[row : row + 1, first:], past_key_values=cache)
            logits.append(judge(tokens[row : row + 1], past_key_values=cache).logits)
        return torch.cat(logits)

    with torch.no_grad():
        exact = all_at_once(copy.deepcopy(reference).double())
        usual = (all_at_once(reference) - exact).abs().max()
        with coreskip.wrap(model, plan):
            teacher_forced(model, ids, mask, tokens[:, :2], each=1)  # the first step of a wrapping is the modules' own
            seen = spy(model, monkeypatch)
            native = teacher_forced(model, ids, mask, tokens, each=1)
            assert refusal(model) is None
            assert seen == [2] * 200  # two rows
    assert (native - exact).abs().max() <= 2 * usual + 1e-6 * exact.abs().max()


def by_modules(model: Any) -> Any:
    """Steps inside run on the patched modules."""
    return patch.object(runtime_of(model).steps.native, "forward", lambda *_: None)


@pytest.mark.parametrize("kind", ["griffin", "similar"])
@pytest.mark.parametrize("family", ["llama", "llama_bias", "mistral", "gemma2", "starcoder2", "phi", "nemotron_relu2"])
def test_rows_with_neurons_of_their_own(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged prompts that chose differently: what the modules compute, one token a row and several."""
    model = tiny(family)
    ids, mask = ragged()
    tokens = some_tokens(2, 100)
    with torch.no_grad(), coreskip.wrap(model, plan_of(model, kind)):
        teacher_forced(model, ids, mask, tokens[:, :2], each=1)
        with by_modules(model):
            expected = teacher_forced(model, ids, mask, tokens, each=1)
        seen = spy(model, monkeypatch)
        for each in (1, 4):
            seen.clear()
            native = teacher_forced(model, ids, mask, tokens, each)
            assert refusal(model) is None
            assert seen == [2 * each] * (100 // each)
            torch.testing.assert_close(native, expected, rtol=2e-4, atol=2e-4)
        assert not runtime_of(model).prepared._own, "what was described goes with its cache"
        if kind == "griffin":
            alone = [teacher_forced(model, ids[r : r + 1], mask[r : r + 1], tokens[r : r + 1], 1) for r in range(2)]
            torch.testing.assert_close(native, torch.cat(alone), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_with_neurons_of_their_own_in_every_format(
    dtype: torch.dtype, weights: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama").to(dtype)
    plan = replace(plan_of(model, "griffin"), weights=weights)
    ids, mask = ragged()
    tokens = some_tokens(2, 30)
    with torch.no_grad(), coreskip.wrap(model, plan):
        for _ in range(4):  # in bfloat16 a first step may disagree
            teacher_forced(model, ids, mask, tokens[:, :1], each=1)
        seen = spy(model, monkeypatch)
        native = teacher_forced(model, ids, mask, tokens, each=1)
        assert refusal(model) is None
        assert seen == [2] * 30
        alone = [teacher_forced(model, ids[r : r + 1], mask[r : r + 1], tokens[r : r + 1], 1) for r in range(2)]
    error = (native - torch.cat(alone)).float().square().mean().sqrt() / native.float().std()
    # a batch is prefilled with other roundings than its rows alone, which inputs rounded to 8 bits make larger
    assert error < (1e-5 if dtype is torch.float32 and weights is None else 0.03)


@pytest.mark.parametrize("isa", cpu.supported() if available("cpu") is None else [])
def test_a_neuron_that_a_row_does_not_want_cannot_spoil_it(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The down row of a neuron that half of the rows chose becomes infinite: the others' logits stay what they were."""
    best, model, ids = cpu.active(), tiny("llama"), torch.cat([prompt(1, seed=seed) for seed in range(8)])
    tokens = some_tokens(8, 3)
    try:
        cpu.use(isa)
        with torch.no_grad(), coreskip.wrap(model, plan_of(model, "griffin")):
            runtime = runtime_of(model)
            greedy(model, ids, 2)
            cache = DynamicCache(config=model.config)
            model(ids, past_key_values=cache)
            choice = runtime.prepared.selected(selections_of(cache, runtime))
            wants = torch.stack([(lists[:, None] == torch.arange(160)).any(0) for lists in choice.mlps[1].lists.lists])
            neuron = int((wants.sum(0) == 4).nonzero()[0])
            packed, twin = choice.mlps[1].packed, copy.deepcopy(cache)
            expected = torch.cat([model(t, past_key_values=twin).logits for t in tokens.split(1, 1)], 1)
            packed.weight[neuron, -1] = torch.inf
            seen = spy(model, monkeypatch)
            logits = torch.cat([model(t, past_key_values=cache).logits for t in tokens.split(1, 1)], 1)
            assert seen == [8] * 3
        others = ~wants[:, neuron]
        assert torch.equal(logits[others], expected[others])
        assert not bool(logits[~others].isfinite().all(-1).any())
    finally:
        cpu.use(best)


def test_what_is_generated_with_neurons_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, beams, several texts of a prompt, and rows that end early: what the modules make, natively."""
    model = tiny("llama")
    ids, mask = ragged()
    calls: list[dict[str, Any]] = [
        {"max_new_tokens": 60},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"repetition_penalty": 1.3},
    ]

    def run(options: dict[str, Any]) -> torch.Tensor:
        torch.manual_seed(5)
        return model.generate(ids, attention_mask=mask, **{"max_new_tokens": 20, "do_sample": False, **options})

    with coreskip.wrap(model, plan_of(model, "griffin")):
        with by_modules(model):
            calls.append({"eos_token_id": int(run({})[1, 14])})  # ends the second row first
            expected = [run(options) for options in calls]
        greedy(model, ids, 2)
        seen = spy(model, monkeypatch)
        for options, text in zip(calls, expected, strict=True):
            seen.clear()
            assert torch.equal(run(options), text), options
            most = options.get("max_new_tokens", 20)
            assert len(seen) == most - 1 or ("eos_token_id" in options and seen)
        assert refusal(model) is None


def test_rows_cut_out_by_hand_lose_their_neurons(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = tiny("llama"), prompt(3)
    with torch.no_grad(), coreskip.wrap(model, plan_of(model, "griffin")):
        greedy(model, ids, 3)
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:2], layer.values[:2]
        with caplog.at_level(logging.WARNING, "coreskip"):
            assert model(ids[:2, :1], past_key_values=cache).logits.shape[0] == 2
        assert "cut to 2 rows by hand" in caplog.text


@pytest.mark.parametrize("family", NOT_COVERED)
def test_what_is_not_covered_runs_on_the_models_modules(family: str) -> None:
    model = tiny(family)
    expected = greedy(model, prompt(1))
    with coreskip.wrap(model, Plan.dense(model)):
        assert torch.equal(greedy(model, prompt(1)), expected)
        assert refusal(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_half_precision_is_nearer_to_the_truth_than_torch(family: str, dtype: torch.dtype) -> None:
    model = tiny(family).to(dtype)
    ids = prompt(1, 30)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids).logits[:, 10:]
        usual = (model(ids).logits[:, 10:] - exact).abs().max()
        with coreskip.wrap(model, Plan.dense(model)):
            for _ in range(2):
                cache = DynamicCache(config=model.config)
                model(ids[:, :10], past_key_values=cache)
                native = [model(ids[:, t : t + 1], past_key_values=cache).logits[:, 0] for t in range(10, 30)]
            assert refusal(model) is None
    assert (torch.stack(native, 1) - exact).abs().max() <= 2 * usual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_several_tokens_at_once_get_the_bits_they_get_alone(dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    ids = prompt(1, 140)
    with torch.no_grad(), coreskip.wrap(model, Plan.dense(model)):
        greedy(model, prompt(1), 4)
        alone, together = DynamicCache(config=model.config), DynamicCache(config=model.config)
        model(ids[:, :100], past_key_values=alone)
        model(ids[:, :100], past_key_values=together)
        at = 100
        for count in (2, 3, 4, 5, 6, 7, 8, 5):
            run = model(ids[:, at : at + count], past_key_values=together).logits
            for k in range(count):
                one = model(ids[:, at + k : at + k + 1], past_key_values=alone).logits
                assert torch.equal(one[:, 0], run[:, k])
            at += count


@pytest.mark.parametrize("isa", cpu.supported() if available("cpu") is None else [])
def test_every_instruction_set_gives_the_same_tokens(isa: str) -> None:
    best = cpu.active()
    model = tiny("gemma2")
    expected = greedy(model, prompt(1), 40)
    try:
        cpu.use(isa)
        with coreskip.wrap(model, Plan.dense(model)):
            assert torch.equal(greedy(model, prompt(1), 40), expected)
            assert refusal(model) is None
    finally:
        cpu.use(best)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "olmo2"])
def test_generate_is_what_it_was(family: str) -> None:
    model = tiny(family)
    ids, mask = ragged()
    calls: list[dict[str, Any]] = [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 20, "temperature": 0.8},
        {"repetition_penalty": 1.3},
        {"max_new_tokens": 150},
    ]

    def run(options: dict[str, Any]) -> torch.Tensor:
        torch.manual_seed(5)
        return model.generate(ids, attention_mask=mask, **{"max_new_tokens": 20, "do_sample": False, **options})

    expected = [run(options) for options in calls]
    with coreskip.wrap(model, Plan.dense(model)):
        greedy(model, ids, 2)
        for options, tokens in zip(calls, expected, strict=True):
            assert torch.equal(run(options), tokens), options
        assert refusal(model) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_sequence_without_transformers_own_loop(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy text of many tokens at once, and everything that is decided token by token, ends where it did."""
    model, ids = tiny("qwen3").to(dtype), prompt(1, 12)
    text = greedy(model, ids, 60)
    ends = [int(t) for t in text[0, [30, 50]]]  # one in the middle of what is decoded at once
    streamed: list[int] = []

    class Streamer(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            streamed.extend(value.flatten().tolist())

        def end(self) -> None:
            streamed.append(-1)

    calls: list[dict[str, Any]] = [
        {},
        {"eos_token_id": ends},
        {"eos_token_id": ends, "max_new_tokens": 1},
        {"eos_token_id": ends, "streamer": Streamer()},
        {"max_new_tokens": 3},
        {"max_new_tokens": 17},
        {"do_sample": True, "temperature": 0.7, "top_k": 30},
        {"do_sample": True, "top_p": 0.8, "repetition_penalty": 1.2, "eos_token_id": ends},
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 40, "eos_token_id": ends},
        {"max_time": 60.0},
    ]

    def run(options: dict[str, Any]) -> tuple[list[int], list[int]]:
        streamed.clear()
        torch.manual_seed(3)
        return greedy(model, ids, **{"new": 40, **options}).flatten().tolist(), list(streamed)

    for options in calls:
        options["new"] = options.pop("max_new_tokens", 40)
    if dtype is torch.bfloat16:  # rounds otherwise than the modules: compared with its own steps, one by one
        with coreskip.wrap(model, Plan.dense(model)):
            greedy(model, ids, 2)
            with monkeypatch.context() as patches:
                patches.setattr("coreskip.runtime.loop.generate", lambda *_: None)
                expected = [run(options) for options in calls]
    else:
        expected = [run(options) for options in calls]
    with coreskip.wrap(model, Plan.dense(model)):
        greedy(model, ids, 2)
        for options, result in zip(calls, expected, strict=True):
            assert run(options) == result, options


def test_a_conversation_goes_on_over_the_same_cache() -> None:
    model = tiny("mistral")  # with a window of 8
    first, second = prompt(1, 12), prompt(1, 7, seed=9)

    def talk() -> list[torch.Tensor]:
        cache = DynamicCache(config=model.config)
        said = greedy(model, first, 12, past_key_values=cache)
        return [said, greedy(model, torch.cat([said, second], 1), 12, past_key_values=cache)]

    expected = talk()
    with coreskip.wrap(model, Plan.dense(model)):
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(talk(), expected, strict=True))
        assert refusal(model) is None


def test_assisted_generation_crops_and_goes_on() -> None:
    model, assistant = tiny("llama"), tiny("llama", seed=4)
    expected = greedy(model, prompt(1), 40)
    with coreskip.wrap(model, Plan.dense(model)):
        for _ in range(2):
            assert torch.equal(greedy(model, prompt(1), 40, assistant_model=assistant), expected)
            assert torch.equal(greedy(model, prompt(1), 40, prompt_lookup_num_tokens=3), expected)
        assert refusal(model) is None


def test_a_copied_cache_is_a_cache_of_its_own() -> None:
    model, ids = tiny("llama"), prompt(1, 20)
    with torch.no_grad(), coreskip.wrap(model, Plan.dense(model)):
        greedy(model, ids, 2)
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        twin = copy.deepcopy(cache)
        expected = model(ids[:, 1:2], past_key_values=cache).logits
        for token in (7, 8, 9):
            model(torch.tensor([[token]]), past_key_values=twin)
        assert cache.get_seq_length() == 22
        assert twin.get_seq_length() == 24
        cache.crop(-1)
        assert torch.equal(model(ids[:, 1:2], past_key_values=cache).logits, expected)


def test_what_a_call_asks_for_beyond_logits_comes_from_the_modules(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = tiny("llama"), prompt(1, 9)
    options: list[dict[str, Any]] = [
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"output_attentions": True, "return_dict_in_generate": True},
        {"cache_implementation": "static"},
    ]
    expected = greedy(model, ids)
    with coreskip.wrap(model, Plan.dense(model)):
        greedy(model, ids, 3)
        seen = spy(model, monkeypatch)
        for option in options:
            with caplog.at_level(logging.DEBUG, "coreskip"):
                output = greedy(model, ids, **option)
            assert torch.equal(getattr(output, "sequences", output), expected)
            assert seen == []
            assert "runs on the model's modules" in caplog.text
            caplog.clear()
        greedy(model, ids)
        assert sum(seen) == 15
        with torch.enable_grad():
            cache = DynamicCache(config=model.config)
            model(ids, past_key_values=cache)
            assert model(ids[:, :1], past_key_values=cache).logits.requires_grad
        static = StaticCache(config=model.config, max_cache_len=32)
        with torch.no_grad():
            model(ids, past_key_values=static)
            assert model(ids[:, :1], past_key_values=static).logits.shape == (1, 1, VOCABULARY)


def test_hooks_are_called() -> None:
    model = tiny("llama")
    calls: list[int] = []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    with coreskip.wrap(model, Plan.dense(model)):
        calls.clear()
        greedy(model, prompt(1), 10)
        assert len(calls) == 10


def test_a_mask_with_holes_is_honoured() -> None:
    model, ids = tiny("llama"), prompt(1, 9)
    mask = torch.ones(1, 10, dtype=torch.int64)
    mask[0, 4] = 0

    def last() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        model(ids, attention_mask=mask[:, :9], past_key_values=cache)
        return model(ids[:, :1], attention_mask=mask, past_key_values=cache).logits

    with torch.no_grad():
        expected = last()
        with coreskip.wrap(model, Plan.dense(model)):
            greedy(model, ids, 3)
            assert torch.allclose(last(), expected, atol=1e-5)


def test_a_token_outside_the_vocabulary_is_an_error() -> None:
    model = tiny("llama")
    with torch.no_grad(), coreskip.wrap(model, Plan.dense(model)):
        greedy(model, prompt(1), 3)
        cache = DynamicCache(config=model.config)
        model(prompt(1), past_key_values=cache)
        with pytest.raises(IndexError, match="token ids"):
            model(torch.tensor([[VOCABULARY]]), past_key_values=cache)
        assert cache.get_seq_length() == 9


def test_positions_beyond_the_first_tables() -> None:
    model = tiny("llama", max_position_embeddings=4096)
    ids = prompt(1, 2100)
    with torch.no_grad():
        expected = model(ids).logits[:, -60:]
        with coreskip.wrap(model, Plan.dense(model)):
            greedy(model, ids[:, :9], 3)
            cache = DynamicCache(config=model.config)
            model(ids[:, :2040], past_key_values=cache)
            native = [model(ids[:, t : t + 1], past_key_values=cache).logits[:, 0] for t in range(2040, 2100)]
            assert refusal(model) is None
    assert torch.allclose(torch.stack(native, 1), expected, atol=2e-4)


def test_the_first_step_may_come_after_a_long_prompt() -> None:
    """Before any table of positions reaches that far, and with two sequences at once after it."""
    model, ids = tiny("llama", max_position_embeddings=4096), prompt(1, 1100)
    expected = greedy(model, ids, 6)
    with coreskip.wrap(model, Plan.dense(model)):
        for _ in range(2):
            assert torch.equal(greedy(model, ids, 6), expected)
        assert refusal(model) is None
        longer = prompt(1, 2200)
        texts: list[torch.Tensor] = []
        threads = [threading.Thread(target=lambda: texts.append(greedy(model, longer, 6))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(texts) == 2
        assert torch.equal(*texts)


def test_a_neuron_chosen_otherwise_is_not_a_wrong_description() -> None:
    expected = torch.randn(1, 1, 1000, generator=torch.Generator().manual_seed(0))
    few, all_of_them = expected.clone(), expected + 0.2 * torch.randn_like(expected)
    few[..., :5] += 0.2
    compare(few, expected, by_rule=True)
    for logits, by_rule in ((few, False), (all_of_them, True)):
        with pytest.raises(NotCovered, match="differ"):
            compare(logits, expected, by_rule)


def test_llama3_rope_and_yarn_are_covered_and_dynamic_rope_is_not() -> None:
    scaled = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled |= {"original_max_position_embeddings": 32, "rope_theta": 10000.0}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    for rope, covered in ((scaled, True), (yarn, True), (dynamic, False)):
        model = tiny("llama", rope_parameters=rope)
        expected = greedy(model, prompt(1), 60)
        with coreskip.wrap(model, Plan.dense(model)):
            assert torch.equal(greedy(model, prompt(1), 60), expected)
            assert (refusal(model) is None) is covered


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weight_formats_compute_with_the_rounded_weights(weights: str) -> None:
    model, ids = tiny("llama"), prompt(1, 40)
    twin = copy.deepcopy(model)
    for module in twin.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = rounded(module.weight.data, weights)
    twin.lm_head.weight = torch.nn.Parameter(rounded(twin.lm_head.weight.data, "int8"))
    with torch.no_grad(), coreskip.wrap(model, Plan.dense(model, weights=weights)):
        greedy(model, ids[:, :9], 3)
        # the keys and values of the prompt come from the model as it was loaded
        cache, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
        model(ids[:, :9], past_key_values=cache)
        model(ids[:, :9], past_key_values=other)
        native = [model(ids[:, t : t + 1], past_key_values=cache).logits[:, 0] for t in range(9, 40)]
        assert refusal(model) is None
        expected = twin(ids[:, 9:], past_key_values=other).logits
    error = (torch.stack(native, 1) - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.08  # x is rounded to 8 bits


def rounded(weight: torch.Tensor, weights: str) -> torch.Tensor:
    packed = PackedLinear.pack(weight, fmt="int4" if weights == "int4" else "int8_groups")
    return ungroup(*untile(packed)).flatten(1)[:, : weight.shape[1]]


def test_four_bit_numbers_survive_packing() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (48, 3, 32), generator=generator).float()
    q[..., 0], q[..., 1] = 0, 15
    scale = (torch.rand(48, 3, 1, generator=generator) + 0.1).half().float()
    least = torch.randn(48, 3, 1, generator=generator).half().float()
    weight = (scale * q + least).flatten(1)
    assert torch.equal(ungroup(*untile(PackedLinear.pack(weight, fmt="int4"))).flatten(1), weight)


def test_a_long_generation_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    psutil = pytest.importorskip("psutil")
    model = tiny("llama", max_position_embeddings=512)
    with coreskip.wrap(model, Plan.dense(model)):
        greedy(model, prompt(1), 200)
        before = psutil.Process().memory_info().rss
        for seed in range(10):
            greedy(model, prompt(1, seed=seed), 200)
        assert psutil.Process().memory_info().rss - before < 8 << 20
