"""Batches of more rows than one native call takes: the tokens of each row alone, in every kind of plan."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, greedy, plan_of, prompt, tiny
from transformers import DynamicCache, StaticCache

import coreskip
from coreskip.kernels import cpu, ops
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import Sketch
from coreskip.runtime import unpacking
from coreskip.runtime.wrap import runtime_of

pytestmark = pytest.mark.skipif(ops.available("cpu") is not None, reason="needs the compiled kernels")

ROWS = (9, 12, 17)
KINDS = ("dense", "static", "magnitude", "sketch", "int4", "int8")


def plan(model: Any, kind: str) -> Plan:
    dense = Plan.dense(model)
    if kind == "sketch":
        return Plan(tuple(LayerPlan(Sketch(bits=4, keep=0.5)) for _ in dense.layers), dense.model, {"method": kind})
    if kind in ("int4", "int8"):
        return Plan.dense(model, kind)
    return dense if kind == "dense" else plan_of(model, kind)


def left_padded(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of 4 to 10 tokens, padded on the left."""
    ids = prompt(rows, 10, seed=rows)
    mask = (torch.arange(10) >= torch.arange(rows)[:, None] % 7).long()
    return ids * mask, mask


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every matrix that is unpacked."""
    seen: list[int] = []
    restore = unpacking.unpack

    def noted(parts: Any, out: torch.Tensor, first: int = 0) -> torch.Tensor:
        seen.append(out.shape[0])
        return restore(parts, out, first)

    monkeypatch.setattr(unpacking, "unpack", noted)
    return seen


def steps_of(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each native step from now on."""
    decoder, seen = runtime_of(model).steps.native, []
    count = decoder._count

    def counted(tokens: int, skipped: float) -> None:
        seen.append(tokens)
        count(tokens, skipped)

    monkeypatch.setattr(decoder, "_count", counted)
    return seen


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rows_of_a_large_batch_are_those_alone(family: str, kind: str, rows: int) -> None:
    model = tiny(family)
    ids, mask = left_padded(rows)
    with coreskip.wrap(model, plan(model, kind)):
        greedy(model, ids[:1, -4:], 4)  # proves the native step
        alone = [greedy(model, row[seen.bool()][None], 12)[0, -12:] for row, seen in zip(ids, mask, strict=True)]
        together = greedy(model, ids, 12, attention_mask=mask)[:, -12:]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("kind", ["int4", "int8", "static", "magnitude", "sketch"])
def test_a_large_batch_runs_natively_where_weights_are_packed(
    kind: str, unpacked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    chosen = replace(plan(model, kind), weights="int8" if kind == "int8" else "int4")
    ids, mask = left_padded(17)
    coreskip.wrap(model, chosen, keep_originals=False)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), coreskip.prefilling(mask):
        model(ids, attention_mask=mask, past_key_values=cache)
    unpacked.clear()
    seen = steps_of(model, monkeypatch)
    with torch.no_grad():
        for _ in range(2):
            mask = torch.cat([mask, mask.new_ones(17, 1)], 1)
            model(ids[:, -1:], attention_mask=mask, past_key_values=cache)
    assert seen == [17, 17]
    assert unpacked == []


@pytest.mark.parametrize("kind", KINDS)
def test_beams_of_a_large_batch(kind: str) -> None:
    model = tiny("llama")
    ids, mask = left_padded(4)
    with coreskip.wrap(model, plan(model, kind)):
        greedy(model, ids[:1, -4:], 4)
        alone = [
            greedy(model, row[seen.bool()][None], 8, num_beams=3)[0, -8:] for row, seen in zip(ids, mask, strict=True)
        ]
        together = greedy(model, ids, 8, num_beams=3, attention_mask=mask)[:, -8:]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("wanted", [0, 1, 3, 20])
@pytest.mark.parametrize("shape", [(1, 20), (2, 20), (2, 7), (5, 3), (3, 20)])
def test_many_tokens_a_pass_are_those_one_by_one(shape: tuple[int, int], wanted: int) -> None:
    (rows, length), model = shape, tiny("mistral")
    wanted = min(wanted, length)
    ids = prompt(rows, 6)
    tokens = torch.randint(5, VOCABULARY, shape, generator=torch.Generator().manual_seed(2))
    coreskip.wrap(model, Plan.dense(model, "int4"), keep_originals=False)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        twin = copy.deepcopy(cache)
        single = torch.cat([model(tokens[:, i : i + 1], past_key_values=twin).logits for i in range(length)], 1)
        found = model(tokens, past_key_values=cache, logits_to_keep=wanted).logits
    assert torch.equal(found.argmax(-1), single[:, -wanted:].argmax(-1))
    torch.testing.assert_close(found, single[:, -wanted:], rtol=1e-5, atol=1e-5)
    assert cache.get_seq_length() == twin.get_seq_length()


def test_lists_of_rows_follow_their_rows() -> None:
    """Prompts that choose different neurons, in more rows than one call takes, reordered between two steps."""
    model = tiny("llama")
    ids, order = prompt(12, 9), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    coreskip.wrap(model, replace(plan_of(model, "magnitude"), weights="int4"), keep_originals=False)
    tokens = ids[:, :1]
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        model(tokens, past_key_values=cache)
        twin = copy.deepcopy(cache)
        twin.reorder_cache(order)
        expected = model(tokens, past_key_values=cache).logits[order]
        found = model(tokens[order], past_key_values=twin).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["static cache", "hooks", "attentions"])
@pytest.mark.parametrize("rows", [3, 9, 17])
def test_what_is_not_native_unpacks_nothing(case: str, rows: int, unpacked: list[int]) -> None:
    model = tiny("llama")
    if case == "attentions":
        model.set_attn_implementation("eager")
    ids = prompt(rows, 8)
    reference = tiny("llama")
    coreskip.wrap(model, Plan.dense(model, "int4"), keep_originals=False)
    if case == "hooks":
        model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    cache = StaticCache(model.config, 32) if case == "static cache" else DynamicCache(config=model.config)
    options = {"output_attentions": True} if case == "attentions" else {}
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
        unpacked.clear()
        found = model(ids[:, :1], past_key_values=cache, logits_to_keep=1, **options).logits
        assert unpacked == []
        plain = DynamicCache(config=model.config)
        reference(ids, past_key_values=plain)
        expected = reference(ids[:, :1], past_key_values=plain, logits_to_keep=1).logits
    error = (found - expected).square().mean().sqrt() / expected.std()
    assert error < 0.5  # tiny random weights in 4 bits


@pytest.fixture
def bfloat16_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies bfloat16 fast, and matrices of any size that are worth it."""
    monkeypatch.setattr(cpu, "has_bfloat16_tiles", lambda: True)
    monkeypatch.setattr(unpacking, "_WORTH_CASTING", 1)


@pytest.mark.parametrize("family", ["llama", "llama_bias", "phi3"])
def test_prefill_in_bfloat16_where_that_is_fast(family: str, bfloat16_tiles: None) -> None:
    model, ids = tiny(family), prompt(2, 12)
    with torch.no_grad(), pytest.MonkeyPatch.context() as without:
        without.setattr(cpu, "has_bfloat16_tiles", lambda: False)
        coreskip.wrap(model, Plan.dense(model, "int4"), keep_originals=False)
        whole = model(ids).logits
    with torch.no_grad():
        half = model(ids).logits
    assert half.dtype == torch.float32
    assert not torch.equal(half, whole)
    assert (half - whole).square().mean().sqrt() / whole.std() < 0.05


def test_exact_forms_are_not_multiplied_in_bfloat16(bfloat16_tiles: None) -> None:
    model, ids = tiny("llama").bfloat16().float(), prompt(2, 12)
    with torch.no_grad():
        expected = model(ids).logits
        with coreskip.wrap(model, Plan.dense(model), keep_originals=False):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
