"""Prompts natively: bit for bit what decode steps compute, and what the model's modules compute within rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, greedy, plan_of, prompt, tiny
from transformers import DynamicCache

import coreskip
from coreskip.kernels import ops, prefill
from coreskip.kernels.groups import group_weights, ungroup
from coreskip.kernels.step import KeyValues
from coreskip.predictors.plan import Plan
from coreskip.runtime.calls import NotCovered
from coreskip.runtime.lower_cpu import StepProgram
from coreskip.runtime.native import NativeSteps
from coreskip.runtime.wrap import runtime_of

pytestmark = pytest.mark.skipif(ops.available("cpu") is not None, reason="needs the compiled kernels")

FAMILIES = ("llama_bias", "mistral", "qwen3", "gemma2", "olmo2", "stablelm", "granite", "phi3")


def on_grid(family: str, **overrides: Any) -> Any:
    """A model whose matrices are made of 4-bit groups, so that float32 steps read them as such."""
    model = tiny(family, **overrides)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                rows, inputs = module.weight.shape
                module.weight.copy_(ungroup(*group_weights(module.weight)).reshape(rows, -1)[:, :inputs])
    return model


@pytest.fixture
def natively(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the prompts that ran natively."""
    lengths: list[int] = []
    run = prefill.Prefill.run

    def noting(self: Any, tokens: torch.Tensor, *args: Any) -> torch.Tensor:
        logits = run(self, tokens, *args)
        lengths.append(tokens.shape[1])
        return logits

    monkeypatch.setattr(prefill.Prefill, "run", noting)
    return lengths


def caches(model: Any, rows: int, capacity: int) -> KeyValues:
    layers = [layer.attention for layer in model.layers]
    shapes = [(rows, a.k.out_features // a.head_dim, capacity, a.head_dim) for a in layers]
    keys, values = ([torch.zeros(shape, dtype=model.dtype) for shape in shapes] for _ in range(2))
    return KeyValues(keys, values, [0] * len(shapes))


@pytest.mark.parametrize("weights", ["int4", "int8", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_bit_for_bit_what_steps_compute(isa: str, family: str, weights: str | None) -> None:
    model = on_grid(family, max_position_embeddings=512)
    with coreskip.wrap(model, Plan.dense(model, weights)):
        greedy(model, prompt(1), 2)
        steps = runtime_of(model).steps.native
        described = steps.described
        assert described is not None
        assert prefill.uncovered(described.model.base) is None
        described.model.rotary.reach(400)
        step = steps.step_of(described, StepProgram.dense(len(model.model.layers)))
        start = torch.tensor([0, 5])
        of_prompt, of_steps = (caches(described.model.base, 2, 400) for _ in range(2))
        past = 0
        for length in (7, 1, 150, 129):
            ids = prompt(2, length, seed=length)
            places = torch.arange(past, past + length).expand(2, length) - start[:, None].clamp_max(past)
            call = places.clamp_min(0), start
            got = prefill.Prefill(step).run(ids, *call, of_prompt, past, 2 if length > 1 else 1)
            expected, _ = step.run(ids, *call, of_steps, past, got.shape[1])
            assert torch.equal(got, expected), (length, float((got - expected).abs().max()))
            past += length
        for mine, other in zip((*of_prompt.keys, *of_prompt.values), (*of_steps.keys, *of_steps.values), strict=True):
            assert torch.equal(mine[0], other[0])
            assert torch.equal(mine[1, :, 5:], other[1, :, 5:])  # before: padding


@pytest.mark.parametrize(
    ("family", "weights", "longest"), [("llama_bias", "int4", 1100), ("gemma2", "int8", 100), ("phi3", None, 100)]
)
def test_blocks_of_two_threads(family: str, weights: str | None, longest: int, two_threads: None) -> None:
    """Tokens for each thread: bit for bit what one thread computes, also of more than go through all layers at once."""
    model = on_grid(family, max_position_embeddings=2048)
    with coreskip.wrap(model, Plan.dense(model, weights)):
        greedy(model, prompt(1), 2)
        steps = runtime_of(model).steps.native
        described = steps.described
        assert described is not None
        described.model.rotary.reach(1200)
        step = steps.step_of(described, StepProgram.dense(len(model.model.layers)))
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            table, past, logits = caches(described.model.base, 1, 1200), 0, []
            for length in (33, 1, longest):
                places = torch.arange(past, past + length)[None]
                ids = prompt(1, length, seed=length)
                logits.append(prefill.Prefill(step).run(ids, places, torch.tensor([0]), table, past, min(length, 40)))
                past += length
            found.append((*logits, *table.keys, *table.values))
        assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_modules_compute(family: str, natively: list[int]) -> None:
    model = on_grid(family)
    ids = prompt(1, 70)
    with torch.no_grad():
        expected = model(ids).logits
        text = greedy(model, ids, 12)
    with coreskip.wrap(model), torch.no_grad():
        got = model(ids, past_key_values=DynamicCache(config=model.config)).logits
        assert torch.equal(greedy(model, ids, 12), text)
    assert natively == [70, 70]
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


def test_matrices_as_they_were_loaded_are_left_to_the_modules(natively: list[int]) -> None:
    model = tiny("llama")
    with coreskip.wrap(model):
        greedy(model, prompt(1), 4)
        greedy(model, prompt(1), 4)
    assert natively == []


@pytest.mark.parametrize("kind", ["dense", "magnitude", "similar", "static"])
@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_every_prompt_gives_one_text(kind: str, weights: str, natively: list[int]) -> None:
    """The first prompt, later ones, and a prompt beside others and padding."""
    model, long, short = tiny("llama"), prompt(1, 40), prompt(1, 9, seed=3)
    plan = plan_of(model, kind) if kind != "dense" else Plan.dense(model)
    plan = Plan(plan.layers, plan.model, plan.recipe, clusters=plan.clusters, weights=weights)
    with coreskip.wrap(model, plan, keep_originals=True):
        first, second = greedy(model, long), greedy(model, long)
        alone = greedy(model, short)
        padding = torch.zeros(1, 31, dtype=torch.int64)
        ids = torch.cat([long, torch.cat([padding, short], 1)])
        mask = torch.ones_like(ids)
        mask[1, :31] = 0
        together = greedy(model, ids, attention_mask=mask)
    assert natively == [40, 40, 9, 40]
    assert torch.equal(first, second)
    assert torch.equal(together[0], first[0])
    assert torch.equal(together[1, 31:], alone[0])


def test_prompts_choose_the_same_neurons_as_on_the_modules(
    monkeypatch: pytest.MonkeyPatch, natively: list[int]
) -> None:
    model, ids = on_grid("llama"), prompt(1, 50)
    texts = []
    for way in ("native", "modules"):
        with coreskip.wrap(model, plan_of(model, "magnitude")):
            if way == "modules":
                monkeypatch.setattr(runtime_of(model).steps, "prompt", lambda *_: None)
            texts.append(greedy(model, ids))
    assert natively == [50]
    assert torch.equal(*texts)


def test_chunks_and_turns_are_one_prompt(natively: list[int]) -> None:
    model, ids = tiny("llama"), prompt(1, 60)
    with coreskip.wrap(model, Plan.dense(model, "int4"), keep_originals=True), torch.no_grad():
        whole = model(ids, past_key_values=DynamicCache(config=model.config)).logits[:, -1]
        cache = DynamicCache(config=model.config)
        for chunk in ids.split([1, 20, 39], 1):
            with coreskip.prefilling():
                logits = model(chunk, past_key_values=cache).logits[:, -1]
    assert natively == [60, 1, 20, 39]
    assert torch.equal(logits, whole)
    assert cache.get_seq_length() == 60


def test_windows_forget_as_without(natively: list[int]) -> None:
    model, ids = on_grid("mistral"), prompt(1, 50)
    plain = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=plain)
        with coreskip.wrap(model):
            ours = DynamicCache(config=model.config)
            model(ids, past_key_values=ours)
    assert natively == [50]
    for mine, other in zip(ours.layers, plain.layers, strict=True):
        assert mine.keys.shape == other.keys.shape
        assert torch.allclose(mine.keys, other.keys, atol=1e-4)
        assert mine.get_seq_length() == other.get_seq_length() == 50


def test_exact_mode_reads_the_prompt_as_the_dense_model_does(natively: list[int]) -> None:
    model, ids = on_grid("llama"), prompt(1, 50)
    text = greedy(model, ids)
    with coreskip.wrap(model, plan_of(model, "static"), exact=True):
        assert torch.equal(greedy(model, ids), text)
    assert natively == []


@pytest.mark.parametrize("past", [0, 9])
def test_where_longer_texts_disagree_the_modules_do_the_prompt(
    past: int, monkeypatch: pytest.MonkeyPatch, natively: list[int]
) -> None:
    model = on_grid("llama", max_position_embeddings=1024)
    ids = prompt(1, 700)
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        with coreskip.wrap(model):
            greedy(model, prompt(1), 2)
            cache = DynamicCache(config=model.config)
            if past:
                model(ids[:, :past], past_key_values=cache)

            def differs(self: Any, named: dict[str, Any]) -> None:
                raise NotCovered("its logits differ")

            monkeypatch.setattr(NativeSteps, "compare", differs)
            with coreskip.prefilling():
                got = model(ids[:, past:], past_key_values=cache).logits[:, -1]
    assert natively[-1] == 700 - past
    assert cache.get_seq_length() == 700
    assert torch.allclose(got, expected, atol=1e-4 * float(expected.std()))


def test_ids_of_no_token_leave_the_cache_as_it_was() -> None:
    model = on_grid("llama")
    with coreskip.wrap(model), torch.no_grad():
        greedy(model, prompt(1), 2)
        cache = DynamicCache(config=model.config)
        with pytest.raises(IndexError):
            model(torch.tensor([[5, VOCABULARY]]), past_key_values=cache)
        assert cache.get_seq_length() == 0
