"""Phases, selections that follow their sequences, and what wrap refuses."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from tiny_models import greedy, plan_of, prompt, tiny
from transformers import AutoModel, DynamicCache, StaticCache, pipeline

import coreskip
from coreskip import CoreskipError, PlanError
from coreskip.kernels.ops import available
from coreskip.predictors.importance import most_important, token_contributions
from coreskip.predictors.observe import taps
from coreskip.predictors.plan import Plan
from coreskip.runtime.modules import ModulePatches
from coreskip.runtime.selections import SelectedNeurons, selections_of
from coreskip.runtime.wrap import is_wrapped, runtime_of


def choice_of(model: Any, cache: Any) -> SelectedNeurons:
    runtime = runtime_of(model)
    selections = selections_of(cache, runtime)
    assert selections is not None
    return runtime.prepared.selected(selections)


def neurons_of(model: Any, cache: Any, layer: int, row: int = 0) -> list[int]:
    """The neurons a row decodes with: its list or, where all rows chose alike, those whose gate rows are packed."""
    choice = choice_of(model, cache)
    lists = choice.mlps[layer].lists
    if lists is not None:
        return lists.lists[row].tolist()
    gate = runtime_of(model).anatomy.mlps[layer].matrices().gate
    packed_gate = choice.mlps[layer].packed.weight[:, 0, : gate.shape[1]]
    return torch.cdist(packed_gate, gate).argmin(1).tolist()


def expected_neurons(model: Any, ids: torch.Tensor, layer: int, score: str, keep: float) -> list[int]:
    """The definition, from one dense pass over one prompt."""
    seen: dict[int, torch.Tensor] = {}
    anatomy = runtime_of(model).anatomy
    down_norm = anatomy.mlps[layer].matrices().down.norm(dim=1)
    with taps(anatomy, lambda index, a: seen.__setitem__(index, a.clone())), torch.no_grad():
        model(ids, use_cache=False)
    counts = token_contributions(seen[layer], score, 0.4, down_norm).sum(0)  # type: ignore[arg-type]
    ties = seen[layer].abs().sum(0)
    return most_important(counts, ties, round(keep * len(counts))).tolist()


@pytest.mark.parametrize("score", ["signed", "magnitude", "magnitude_down", "griffin"])
def test_selection_is_the_definition_applied_to_the_prompt(llama: Any, score: str) -> None:
    ids = prompt(1, 12)
    with torch.no_grad(), coreskip.wrap(llama, plan_of(llama, score)):
        cache = DynamicCache(config=llama.config)
        llama(ids, past_key_values=cache)
        llama(ids[:, :1], past_key_values=cache)
        for layer in range(3):
            assert neurons_of(llama, cache, layer) == expected_neurons(llama, ids, layer, score, 0.5)


def test_padding_does_not_vote(llama: Any) -> None:
    ids = prompt(1, 8)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), ids], dim=1)
    mask = (padded > 0).long()
    with torch.no_grad(), coreskip.wrap(llama, plan_of(llama, "griffin")):
        cache = DynamicCache(config=llama.config)
        position_ids = (mask.cumsum(1) - 1).clamp_min(0)
        llama(padded, attention_mask=mask, position_ids=position_ids, past_key_values=cache)
        assert neurons_of(llama, cache, 1) == expected_neurons(llama, ids, 1, "griffin", 0.5)


def phases(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    runtime = runtime_of(model)
    begin = ModulePatches.begin

    def spy(self: Any, named: dict[str, Any]) -> Any:
        step = begin(self, named)
        seen.append(step.phase.value)
        return step

    monkeypatch.setattr(ModulePatches, "begin", spy)
    monkeypatch.setattr(runtime.steps.native, "forward", lambda *_: None)  # which tells the phases apart by itself
    return seen


def test_a_one_token_prompt_is_prefill_and_five_tokens_on_a_cache_are_decode(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad(), coreskip.wrap(llama, plan_of(llama, "griffin")):
        seen = phases(llama, monkeypatch)
        cache = DynamicCache(config=llama.config)
        llama(prompt(1, 1), past_key_values=cache)
        llama(prompt(1, 5), past_key_values=cache)
        llama(prompt(1, 5), use_cache=False)
        with coreskip.prefilling():
            llama(prompt(1, 5), past_key_values=cache)
        llama(prompt(1, 1), past_key_values=cache)
        assert seen == ["prefill", "decode", "prefill", "prefill", "decode"]


def test_generate_marks_chunks_and_turns_as_prefill(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with coreskip.wrap(llama, plan_of(llama, "griffin")):
        seen = phases(llama, monkeypatch)
        out = greedy(llama, prompt(1, 9), 3, prefill_chunk_size=4, return_dict_in_generate=True)
        assert seen == ["prefill"] * 3 + ["decode"] * 2
        seen.clear()
        turn = torch.cat([out.sequences, prompt(1, 4, seed=5)], dim=1)
        greedy(llama, turn, 3, past_key_values=out.past_key_values)
        assert seen == ["prefill"] + ["decode"] * 2


def test_several_tokens_at_once_equal_one_by_one(llama: Any) -> None:
    ids, more = prompt(2, 9), prompt(2, 6, seed=4)
    with torch.no_grad(), coreskip.wrap(llama, plan_of(llama, "signed")):
        one, many = DynamicCache(config=llama.config), DynamicCache(config=llama.config)
        llama(ids, past_key_values=one)
        llama(ids, past_key_values=many)
        single = torch.cat([llama(t, past_key_values=one).logits for t in more.split(1, dim=1)], dim=1)
        torch.testing.assert_close(llama(more, past_key_values=many).logits, single, rtol=1e-4, atol=1e-4)


def test_rows_decode_with_their_own_neurons_and_equal_rows_share(llama: Any) -> None:
    ids = torch.cat([prompt(1, 9, seed=1), prompt(1, 9, seed=2), prompt(1, 9, seed=1)])
    with torch.no_grad(), coreskip.wrap(llama, plan_of(llama, "griffin")):
        cache = DynamicCache(config=llama.config)
        llama(ids, past_key_values=cache)
        first, second, third = (neurons_of(llama, cache, 0, row) for row in range(3))
        assert first == third != second
        choice = choice_of(llama, cache)
        assert choice_of(llama, cache) is choice, "found again, not made again"
        other = DynamicCache(config=llama.config)
        llama(prompt(2), past_key_values=other)
        for found in zip(choice_of(llama, other).mlps.values(), choice.mlps.values(), strict=True):
            assert found[0].packed is found[1].packed, "whole layers are packed once"
        cache.reorder_cache(torch.tensor([2, 1, 0]))
        assert choice_of(llama, cache) is choice, "nothing changed"
        cache.batch_select_indices(torch.tensor([0, 2]))
        assert not choice_of(llama, cache).differ
        assert neurons_of(llama, cache, 0) == first


def test_a_finished_generation_leaves_nothing_behind(llama: Any) -> None:
    """Keys, values and packed slices go with the last reference to the cache, not with the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad(), coreskip.wrap(llama, plan_of(llama, "griffin")):
            cache = DynamicCache(config=llama.config)
            llama(prompt(1), past_key_values=cache)
            llama(prompt(1, 1), past_key_values=cache)
            selections = weakref.ref(selections_of(cache, runtime_of(llama)))
            assert type(cache).__name__ == "DynamicCache"
            gone = weakref.ref(cache)
            del cache
            assert gone() is None
            assert selections() is None
            runtime = weakref.ref(runtime_of(llama))
        assert runtime() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("settled", [False, True])
def test_selections_follow_the_cache(llama: Any, settled: bool) -> None:
    """Reordering, repeating, selecting, copying and dropping rows, before and after the first decode step."""
    ids = torch.cat([prompt(1, 9, seed=seed) for seed in (1, 2, 3)])
    with torch.no_grad(), coreskip.wrap(llama, plan_of(llama, "griffin")):
        cache = DynamicCache(config=llama.config)
        llama(ids, past_key_values=cache)
        runtime = runtime_of(llama)
        if settled:
            llama(ids[:, :1], past_key_values=cache)
            before = [neurons_of(llama, cache, 1, row) for row in range(3)]
        else:
            before = [expected_neurons(llama, ids[row : row + 1], 1, "griffin", 0.5) for row in range(3)]
        twin = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        assert [neurons_of(llama, cache, 1, row) for row in range(3)] == [before[2], before[0], before[0]]
        assert [neurons_of(llama, twin, 1, row) for row in range(3)] == before, "the copy stays as it was"
        twin.batch_repeat_interleave(2)
        assert neurons_of(llama, twin, 1, 3) == before[1]
        twin.batch_select_indices(torch.tensor([4, 1]))
        assert [neurons_of(llama, twin, 1, row) for row in range(2)] == [before[2], before[0]]
        twin.reset()
        assert selections_of(twin, runtime) is None
        cache.crop(-1)
        assert selections_of(cache, runtime) is not None
        cache.crop(-cache.get_seq_length())
        assert selections_of(cache, runtime) is None, "an emptied cache awaits a new prompt"


def test_a_copied_prompt_cache_continues_like_the_original(llama: Any) -> None:
    """The usual recipe for a shared system prompt: prefill once, deepcopy the cache for every question."""
    ids = prompt(1, 9)
    with torch.no_grad(), coreskip.wrap(llama, plan_of(llama, "griffin")):
        cache = DynamicCache(config=llama.config)
        llama(ids, past_key_values=cache)
        question = torch.cat([ids, prompt(1, 3, seed=8)], dim=1)
        one = greedy(llama, question, past_key_values=copy.deepcopy(cache))
        two = greedy(llama, question, past_key_values=copy.deepcopy(cache))
        assert torch.equal(one, two)
        assert torch.equal(one, greedy(llama, question, past_key_values=cache))


def test_multi_turn_equals_reprefilling_where_nothing_was_generated(llama: Any) -> None:
    """Two prefill passes through generate choose what one long prompt chooses."""
    ids = prompt(1, 16)
    with torch.no_grad(), coreskip.wrap(llama, plan_of(llama, "griffin")):
        cache = DynamicCache(config=llama.config)
        llama(ids[:, :7], past_key_values=cache)
        assert torch.equal(greedy(llama, ids, past_key_values=cache), greedy(llama, ids))


def test_a_reset_static_cache_starts_a_new_sequence(llama: Any) -> None:
    with torch.no_grad(), coreskip.wrap(llama, plan_of(llama, "griffin")):
        cache = StaticCache(config=llama.config, max_cache_len=40)
        first, second = prompt(1, 9, seed=1), prompt(1, 9, seed=2)
        greedy(llama, first, past_key_values=cache)
        cache.reset()
        assert torch.equal(greedy(llama, second, past_key_values=cache), greedy(llama, second))


def test_a_cache_filled_before_wrap_decodes_densely(llama: Any) -> None:
    ids, more = prompt(1, 9), prompt(1, 2, seed=3)
    with torch.no_grad():
        dense_cache, cache = DynamicCache(config=llama.config), DynamicCache(config=llama.config)
        llama(ids, past_key_values=dense_cache)
        llama(ids, past_key_values=cache)
        expected = llama(more, past_key_values=dense_cache).logits
        with coreskip.wrap(llama, plan_of(llama, "griffin")):
            torch.testing.assert_close(llama(more, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-4)


def test_training_mode_is_dense(llama: Any) -> None:
    ids = prompt(1, 6)
    llama.train()
    expected = llama(ids).logits
    with coreskip.wrap(llama, plan_of(llama, "static")):
        out = llama(ids, use_cache=True)
        assert torch.equal(out.logits, expected)
        loss = llama(ids[:, :1], past_key_values=out.past_key_values).logits.sum()
        loss.backward()
        assert all(m.up.weight.grad is not None for m in runtime_of(llama).anatomy.mlps)


def test_beams_of_a_batch_keep_their_prompts_neurons(llama: Any) -> None:
    """Beams of two prompts in one batch give what each prompt's beams give alone."""
    ids = prompt(2, 9)
    with coreskip.wrap(llama, plan_of(llama, "griffin")):
        together = greedy(llama, ids, 8, num_beams=3)
        for row in range(2):
            assert torch.equal(together[row : row + 1], greedy(llama, ids[row : row + 1], 8, num_beams=3))


def test_assisted_generation_verifies_in_decode(llama: Any) -> None:
    assistant = tiny("llama", seed=5)
    with coreskip.wrap(llama, plan_of(llama, "static")):
        plain = greedy(llama, prompt(1), 12)
        assert torch.equal(greedy(llama, prompt(1), 12, assistant_model=assistant), plain)


def test_a_wrapped_assistant_goes_on_decoding(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each draft is a generate call of its own over the assistant's kept cache: only the first prefills."""
    assistant = tiny("llama")
    expected = greedy(llama, prompt(1), 12)
    with coreskip.wrap(assistant, plan_of(assistant, "griffin")):
        seen = phases(assistant, monkeypatch)
        assert torch.equal(greedy(llama, prompt(1), 12, assistant_model=assistant), expected)
    assert seen[0] == "prefill"
    assert set(seen[1:]) == {"decode"}


def test_static_plan_follows_a_cast_and_new_weights(llama: Any) -> None:
    plan = plan_of(llama, "static")
    ids = prompt(1)
    with coreskip.wrap(llama, plan):
        greedy(llama, ids)
        llama.to(torch.bfloat16)
        cast = greedy(llama, ids)
        other = tiny("llama", seed=9).to(torch.bfloat16)
        llama.load_state_dict(other.state_dict())
        loaded = greedy(llama, ids)
    fresh = tiny("llama").to(torch.bfloat16)
    with coreskip.wrap(fresh, plan):
        assert torch.equal(greedy(fresh, ids), cast)
    with coreskip.wrap(other, Plan(plan.layers, Plan.dense(other).model)):
        assert torch.equal(greedy(other, ids), loaded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype: torch.dtype) -> None:
    model = tiny("qwen2").to(dtype)
    with coreskip.wrap(model, plan_of(model, "griffin")):
        assert greedy(model, prompt(), 8).shape == (2, 17)


def test_threads_get_what_they_would_get_alone(llama: Any) -> None:
    prompts = [prompt(1, 6 + i, seed=i) for i in range(6)]
    with coreskip.wrap(llama, plan_of(llama, "griffin")):
        alone = [greedy(llama, ids, 24) for ids in prompts]
        together: list[Any] = [None] * len(prompts)

        def work(i: int) -> None:
            together[i] = greedy(llama, prompts[i], 24)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("text", ["The sea is", "def fibonacci(n):", "Q: What is the capital of France? A:"])
def test_native_kernels_decode_the_same_tokens(embedded: tuple[Any, Any], text: str) -> None:
    """A dense plan skips nothing: every linear of a decode step runs on the kernels, and the text stays the same."""
    model, tokenizer = embedded
    ids = tokenizer(text, return_tensors="pt").input_ids
    expected = greedy(model, ids, 24)
    with coreskip.wrap(model, Plan.dense(model)):
        assert torch.equal(greedy(model, ids, 24), expected)
        assert runtime_of(model).prepared._linears or available("cpu") is not None
        for module, packed in runtime_of(model).prepared._linears.items():
            assert packed.weight.data_ptr() == module.weight.data_ptr(), "weights are read in place, not copied"


def test_pipeline(embedded: tuple[Any, Any]) -> None:
    model, tokenizer = embedded
    with coreskip.wrap(model, plan_of(model, "griffin")):
        # a copy: the pipeline makes it pad on the left, and leaves it so
        generate = pipeline("text-generation", model=model, tokenizer=copy.deepcopy(tokenizer))
        prompts = ["The sea is", "Once upon a time there was a"]
        texts = generate(prompts, max_new_tokens=5, do_sample=False, batch_size=2)
        assert [t[0]["generated_text"].startswith(p) for t, p in zip(texts, prompts, strict=True)] == [True, True]
        assert runtime_of(model).usage.neuron_sparsity() == pytest.approx(0.5, abs=0.01)


def test_save_pretrained_while_wrapped(llama: Any, tmp_path: Any) -> None:
    expected = greedy(llama, prompt())
    with coreskip.wrap(llama, plan_of(llama, "static")):
        llama.save_pretrained(tmp_path)
    loaded = type(llama).from_pretrained(tmp_path)
    assert torch.equal(greedy(loaded, prompt()), expected)


# --- refusals: one clear line, and nothing patched


def refuses(action: Any, match: str, error: type[Exception] = CoreskipError) -> None:
    with pytest.raises(error, match=match) as caught:
        action()
    assert "\n" not in str(caught.value)


def test_wrapping_twice_and_unwrapping_nothing(llama: Any) -> None:
    plan = plan_of(llama, "static")
    refuses(lambda: coreskip.unwrap(llama), "not wrapped")
    with coreskip.wrap(llama, plan):
        refuses(lambda: coreskip.wrap(llama, plan), "wrapped already")
        assert is_wrapped(llama)
    refuses(lambda: coreskip.unwrap(llama), "not wrapped")


def test_another_models_plan(llama: Any) -> None:
    attributes = [sorted(vars(m)) for m in llama.modules()]
    refuses(lambda: coreskip.wrap(llama, plan_of(tiny("llama", seed=3), "static")), "other weights", PlanError)
    refuses(lambda: coreskip.wrap(llama, plan_of(tiny("qwen2"), "static")), "model_type", PlanError)
    wider = tiny("llama", intermediate_size=192)
    refuses(lambda: coreskip.wrap(llama, plan_of(wider, "static")), "intermediate_sizes", PlanError)
    assert [sorted(vars(m)) for m in llama.modules()] == attributes


def test_a_plan_made_in_fp32_serves_the_model_in_half_precision(llama: Any) -> None:
    plan = plan_of(llama, "static")
    for dtype in (torch.bfloat16, torch.float16):
        coreskip.unwrap(coreskip.wrap(tiny("llama").to(dtype), plan))
    other = tiny("llama", seed=3).to(torch.bfloat16)
    refuses(lambda: coreskip.wrap(other, plan), "other weights", PlanError)


def test_models_that_are_not_causal_lms(llama: Any) -> None:
    refuses(lambda: Plan.dense(llama.model), "generates")
    refuses(lambda: Plan.dense(torch.nn.Linear(2, 2)), "not a Hugging Face model")
    from transformers import BertConfig, T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8))
    refuses(lambda: Plan.dense(t5), "encoder-decoder")
    bert = AutoModel.from_config(
        BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    refuses(lambda: Plan.dense(bert), "head|generates")


def test_experts_of_an_unknown_form_are_refused() -> None:
    from transformers import JetMoeConfig, JetMoeForCausalLM

    config = JetMoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8,
        num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    refuses(lambda: Plan.dense(JetMoeForCausalLM(config)), "JetMoeParallelExperts.* does not read")


def test_accelerate_hooks_are_refused(llama: Any) -> None:
    from accelerate import cpu_offload

    plan = plan_of(llama, "static")
    offloaded = cpu_offload(tiny("llama"), execution_device="cpu")
    refuses(lambda: coreskip.wrap(offloaded, plan), "one device")


def test_a_single_device_map_is_fine(llama: Any, tmp_path: Any) -> None:
    llama.save_pretrained(tmp_path)
    placed = type(llama).from_pretrained(tmp_path, device_map="cpu")
    with coreskip.wrap(placed, plan_of(llama, "static")):
        assert greedy(placed, prompt(), 4).shape == (2, 13)


def test_unknown_structures_are_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    refuses(lambda: Plan.dense(MambaForCausalLM(config)), "found no MLP")


def test_copying_and_pickling_a_wrapped_model(llama: Any) -> None:
    import pickle

    with coreskip.wrap(llama, plan_of(llama, "static")):
        refuses(lambda: copy.deepcopy(llama), "unwrap")
        refuses(lambda: pickle.dumps(llama), "unwrap")
    copy.deepcopy(llama)


def test_bloom_in_slices_is_refused() -> None:
    model = tiny("bloom", pretraining_tp=2, slow_but_exact=True)
    refuses(lambda: Plan.dense(model), "slow_but_exact")


def test_sequences_list_neurons_of_one_packing(llama: Any) -> None:
    plan, prompts = plan_of(llama, "griffin"), [prompt(1, 9, seed=seed) for seed in range(3)]
    expected = []
    for ids in prompts:
        with coreskip.wrap(llama, plan):
            expected.append(greedy(llama, ids))
    with coreskip.wrap(llama, plan):
        outputs = [greedy(llama, ids, return_dict_in_generate=True) for ids in prompts]
        chosen = [choice_of(llama, output.past_key_values).mlps for output in outputs]
        for layer in range(3):
            assert len({mlps[layer].packed.weight.data_ptr() for mlps in chosen}) == 1
            lists = [mlps[layer].lists.listed for mlps in chosen]
            assert not torch.equal(lists[0], lists[1])
        # a captured step of one sequence is not replayed for another
        fixed = [{id(t) for t in runtime_of(llama).settled(output.past_key_values)[1]} for output in outputs]
        assert fixed[0] != fixed[1]
        for output, text in zip(outputs, expected, strict=True):
            assert torch.equal(output.sequences, text)
