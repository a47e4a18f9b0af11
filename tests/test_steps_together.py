"""Sequences of their own lengths and caches in one native step: to the bit what each gets from a step of its own."""

from __future__ import annotations

import copy
import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import plan_of, prompt, tiny
from transformers import DynamicCache

import coreskip
from coreskip.kernels import ops
from coreskip.kernels.step import MOST_TOGETHER, KeyValues
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import Cats, Sketch, SkipAttention, Teal
from coreskip.runtime.decoding import shares_steps
from coreskip.runtime.native import NativeSequence
from coreskip.runtime.wrap import runtime_of

pytestmark = pytest.mark.skipif(ops.available("cpu") is not None, reason="needs the compiled kernels")

# one token, within a chunk of the attention, at its end, behind it; more than one native call takes at once
LENGTHS = (5, 1, 127, 128, 200, 9, 64, 3, 31, 12)
KINDS = ("dense", "static", "teal", "int4", "int8")


def plan(model: Any, kind: str) -> Plan:
    dense = Plan.dense(model)
    if kind in ("int4", "int8"):
        return Plan.dense(model, kind)
    if kind == "teal":
        names = ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj", "attention.q_proj", "attention.o_proj")
        policy: Any = Teal(keep=0.5, thresholds=dict.fromkeys(names, 0.3))
        return Plan(tuple(LayerPlan(policy) for _ in dense.layers), dense.model, {"method": kind})
    return dense if kind == "dense" else plan_of(model, kind)


def caches_of(model: Any, lengths: tuple[int, ...]) -> list[DynamicCache]:
    found = []
    with torch.no_grad():
        for seed, length in enumerate(lengths):
            cache = DynamicCache(config=model.config)
            model(prompt(1, length, seed), past_key_values=cache)
            found.append(cache)
        twin = copy.deepcopy(found[0])
        model(prompt(1, 1), past_key_values=twin)  # proves the native step
        assert runtime_of(model).steps.ready
    return found


def check(model: Any, lengths: tuple[int, ...], steps: int = 3) -> None:
    chosen = runtime_of(model).steps
    found = caches_of(model, lengths)
    alone = [chosen.sequence(copy.deepcopy(cache), 8) for cache in found]
    together = [chosen.sequence(cache, 8) for cache in found]
    program = together[0][1]
    assert shares_steps(program)
    tokens = list(range(10, 10 + len(lengths)))
    for _ in range(steps):
        expected = [sequence.step([token], program)[0] for (sequence, _), token in zip(alone, tokens, strict=True)]
        logits = NativeSequence.step_together([sequence for sequence, _ in together], tokens, program)
        assert torch.equal(logits, torch.stack(expected))
        tokens = logits.argmax(-1).tolist()
    for (a, _), (b, _) in zip(alone, together, strict=True):
        assert a.length == b.length
        for one, other in zip(a._cache.layers, b._cache.layers, strict=True):
            assert torch.equal(one.keys, other.keys)
            assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_weights_and_plan(kind: str, isa: str) -> None:
    model = tiny("llama")
    with coreskip.wrap(model, plan(model, kind)):
        for rows in (1, 3, 6, 10, MOST_TOGETHER):
            check(model, (LENGTHS * 2)[:rows], steps=2)


@pytest.mark.parametrize("kind", ["dense", "int4", "static"])
@pytest.mark.parametrize("heads", [(4, 2), (6, 2), (3, 1), (5, 1)])
def test_several_tokens_of_each_in_one_call(kind: str, heads: tuple[int, int], isa: str) -> None:
    """Until one of its own ends comes to a sequence, or to another that goes through the layers with it."""
    model = tiny("llama", num_attention_heads=heads[0], num_key_value_heads=heads[1], hidden_size=16 * heads[0])
    with coreskip.wrap(model, plan(model, kind)):
        lengths = (LENGTHS * 2)[: MOST_TOGETHER + 2]
        found, tokens = caches_of(model, lengths), list(range(10, 10 + len(lengths)))
        chosen = runtime_of(model).steps
        alone = [chosen.sequence(copy.deepcopy(cache), 12) for cache in found]
        together = [sequence for sequence, _ in (chosen.sequence(cache, 12) for cache in found)]
        program = alone[0][1]
        expected = [sequence.greedy(token, 8, [], program) for (sequence, _), token in zip(alone, tokens, strict=True)]
        ends = [[] for _ in tokens]
        ends[4] = [expected[4][2]]  # which ends the first ones that share their steps, not the last two
        ends[5] = [token for token in range(128) if token not in expected[5]]
        made = NativeSequence.greedy_together(together, tokens, 5, ends, program)
        most = runtime_of(model).steps.native.step_of(together[0]._described, program).most_tokens
        stop = expected[4].index(ends[4][0]) + 1
        counts = [stop if at // most == 4 // most else 5 for at in range(len(tokens))]
        assert made == [whole[:count] for whole, count in zip(expected, counts, strict=True)]
        lasts = [new[-1] for new in made]
        rest = NativeSequence.greedy_together(together, lasts, 3, [[] for _ in tokens], program)
        assert rest == [whole[count : count + 3] for whole, count in zip(expected, counts, strict=True)]
        assert [sequence.length for sequence in together] == [
            length + count + 3 for length, count in zip(lengths, counts, strict=True)
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_two_threads(kind: str, two_threads: None) -> None:
    model = tiny("llama")
    with coreskip.wrap(model, plan(model, kind)):
        for rows in (3, 10, MOST_TOGETHER + 3):
            check(model, (LENGTHS * 2)[:rows], steps=2)


def test_who_is_wanted_elsewhere_makes_one_token_of_each(isa: str) -> None:
    model = tiny("llama")
    with coreskip.wrap(model, plan(model, "int4")):
        found, tokens = caches_of(model, LENGTHS[:3]), [10, 11, 12]
        chosen = runtime_of(model).steps
        alone = [chosen.sequence(copy.deepcopy(cache), 12) for cache in found]
        together = [sequence for sequence, _ in (chosen.sequence(cache, 12) for cache in found)]
        program = alone[0][1]
        expected = [sequence.greedy(token, 6, [], program) for (sequence, _), token in zip(alone, tokens, strict=True)]
        made, hurry = [[token] for token in tokens], ctypes.c_int32(1)
        for count in (1, 5):
            new = NativeSequence.greedy_together(together, [m[-1] for m in made], 5, [[]] * 3, program, hurry)
            assert [len(more) for more in new] == [count] * 3
            made = [[*before, *more] for before, more in zip(made, new, strict=True)]
            hurry.value = 0
        assert [of_row[1:] for of_row in made] == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, isa: str) -> None:
    model = tiny("llama").to(dtype)
    with coreskip.wrap(model):
        check(model, LENGTHS)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "olmo2", "qwen3", "phi"])
def test_windows_caps_and_other_attentions(family: str, isa: str) -> None:
    model = tiny(family)
    with coreskip.wrap(model):
        check(model, LENGTHS, steps=2)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("kind", ["dense", "int4"])
def test_mixtures_of_experts(family: str, kind: str, two_threads: None) -> None:
    model = tiny(family)
    with coreskip.wrap(model, plan(model, kind)):
        check(model, LENGTHS, steps=2)


def test_a_skipped_attention_writes_its_entries(isa: str) -> None:
    model = tiny("llama")
    dense = Plan.dense(model)
    layers = (LayerPlan(dense.layers[0].neurons, SkipAttention()), *dense.layers[1:])
    with coreskip.wrap(model, replace(dense, layers=layers)):
        check(model, LENGTHS)


def test_plans_whose_tokens_choose_neurons_do_not_share_steps() -> None:
    model = tiny("llama")
    dense = Plan.dense(model)
    for policy in (Sketch(bits=4, keep=0.5), Cats(0.5, 0.1)):
        layers = tuple(LayerPlan(policy) for _ in dense.layers)
        with coreskip.wrap(model, Plan(layers, dense.model, {"method": "test"})):
            (cache,) = caches_of(model, (4,))
            _, program = runtime_of(model).steps.sequence(cache, 8)
            assert not shares_steps(program)


def test_a_step_refuses_caches_without_room_or_of_another_model() -> None:
    model = tiny("llama")
    with coreskip.wrap(model):
        caches = caches_of(model, (4, 6))
        native = runtime_of(model).steps.native
        described = native.described
        assert described is not None
        step = native.step_of(described, runtime_of(model).prepared.step_program(None))
        tables = [native.admit(cache, 4).table for cache in caches]
        ids = torch.tensor([[5], [6]])
        step.run_each(ids, torch.tensor([[4], [6]]), tables, [4, 6], 1)
        with pytest.raises(ValueError, match="no room"):
            step.run_each(ids, ids, tables, [4, tables[1].longest], 1)
        other = KeyValues([torch.zeros(1, 1, 8, 16)] * 3, [torch.zeros(1, 1, 8, 16)] * 3, [0] * 3)
        with pytest.raises(ValueError, match="not this model's"):
            step.run_each(ids, ids, [tables[0], other], [4, 0], 1)
