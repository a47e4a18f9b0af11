"""Recurrences in place of attentions, natively: the gated delta rule against its definition, and what becomes of
a cache's states."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from byte_texts import Bytes, alone
from test_native_families import made, texts
from test_spans import half_of_the_neurons, on_modules, stepped
from tiny_models import greedy, prompt
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

import coreskip
from coreskip import Engine
from coreskip.kernels.ops import available
from coreskip.kernels.packed import PackedLinear
from coreskip.kernels.step import KeyValues, Norm, Recurrence, Step, StepLayer, StepModel
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import SkipAttention, Teal
from coreskip.runtime import loop
from coreskip.runtime.lower_cpu import CpuModel
from coreskip.runtime.sequence import Request
from coreskip.runtime.wrap import runtime_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(available("cpu") is not None, reason="the native kernels are not built"),
]

#: of two projections, of four and of six; a convolution
TYPES = ["qwen3_next", "qwen3_5_text", "olmo_hybrid", "lfm2_moe"]


def native_of(model: Any) -> Any:
    native = runtime_of(model).steps.native
    assert native.ready, native.refusal
    return native


# ---- the kernel ----

READ_HEADS, HEADS, KEYS, VALUES, TAPS, HIDDEN = 2, 6, 12, 20, 3, 24  # no width is that of a vector


def recurrence(dtype: torch.dtype) -> Recurrence:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    of_keys, of_values = READ_HEADS * KEYS, HEADS * VALUES
    widths = (2 * of_keys + of_values, of_values, HEADS, HEADS)
    inputs = tuple(PackedLinear.pack(numbers(width, HIDDEN).to(dtype), numbers(width)) for width in widths)
    whole = (0, HEADS, 0)
    q, k, v = (0, READ_HEADS, 0), (of_keys, READ_HEADS, 0), (2 * of_keys, HEADS, 0)
    return Recurrence(
        inputs=inputs,
        places=((0, q), (0, k), (0, v), (1, whole), (2, whole), (3, whole)),
        o=PackedLinear.pack(numbers(HIDDEN, of_values).to(dtype)),
        taps=numbers(widths[0], TAPS),
        tap_bias=numbers(widths[0]),
        fading=numbers(HEADS).exp(),
        fading_bias=numbers(HEADS),
        norm=Norm(numbers(VALUES), None, 1e-5, "rms"),
        read_heads=READ_HEADS,
        heads=HEADS,
        key_dim=KEYS,
        value_dim=VALUES,
        tap_act="silu",
        open_act="silu",
        most_rate=2.0,
        unit_eps=1e-6,
    )


def by_definition(found: Recurrence, x: Tensor, recent: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What one sequence's tokens x ``[tokens, hidden]`` get, and its states after them."""
    outputs = []
    for token in x:
        mixed, gates, rates, decays = (F.linear(token, p.weight[:, :HIDDEN].float(), p.bias) for p in found.inputs)
        recent = torch.cat([recent[:, 1:], mixed[:, None]], 1)
        tapped = F.silu((found.taps * recent).sum(1) + found.tap_bias)
        q, k, v = tapped.split([READ_HEADS * KEYS, READ_HEADS * KEYS, HEADS * VALUES])
        for head in range(HEADS):
            shared = head // (HEADS // READ_HEADS)
            some = slice(shared * KEYS, (shared + 1) * KEYS)
            read, key = (y[some] / (y[some].square().sum() + 1e-6).sqrt() for y in (q, k))
            mine = state[head] * torch.exp(-found.fading[head] * F.softplus(decays[head] + found.fading_bias[head]))
            value = v[head * VALUES : (head + 1) * VALUES]
            mine = mine + key[:, None] * (2.0 * rates[head].sigmoid() * (value - key @ mine))
            state = torch.stack([*state[:head], mine, *state[head + 1 :]])
            y = read @ mine / KEYS**0.5
            y = y / (y.square().mean() + 1e-5).sqrt() * found.norm.weight
            outputs.append(y * F.silu(gates[head * VALUES : (head + 1) * VALUES]))
    attended = torch.stack(outputs).view(len(x), -1)
    o: Any = found.o
    return attended @ o.weight[:, : HEADS * VALUES].float().t(), recent, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_step_is_the_definition(dtype: torch.dtype, threads: int) -> None:
    """Two sequences of three tokens, which goes on from states."""
    found, generator = recurrence(dtype), torch.Generator().manual_seed(1)
    head = PackedLinear.pack(torch.eye(HIDDEN).to(dtype))
    layer = StepLayer(found, None, "silu")
    step = Step(StepModel(torch.zeros(8, HIDDEN, dtype=dtype), [layer], None, head, dtype))
    x = torch.randn(2, 3, HIDDEN, generator=generator)
    recent = torch.randn(2, *found.sizes[0], generator=generator).to(dtype)
    state = torch.randn(2, *found.sizes[1], generator=generator)
    expected = [by_definition(found, *row) for row in zip(x, recent.float(), state, strict=True)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    places = torch.zeros(2, 3, dtype=torch.int64)
    y = x.clone()
    caches = KeyValues([], [], [], [(recent, state)])
    step.check_caches(caches, 2, 0, 3)
    step._call(None, places, places[:, 0].contiguous(), [(caches.row(0), 0), (caches.row(1), 0)], 0, None, y)
    torch.set_num_threads(before)
    most = {"rtol": 0, "atol": 1e-4 if dtype is torch.float32 else 0.03}
    for row, (gave, recent_after, state_after) in enumerate(expected):
        torch.testing.assert_close(y[row], x[row] + gave, **most)
        torch.testing.assert_close(recent[row].float(), recent_after, **most)
        torch.testing.assert_close(state[row], state_after, **most)
    other = KeyValues([], [], [], [(recent[:, 1:].contiguous(), state)])
    with pytest.raises(ValueError, match="not this model's"):
        step.check_caches(other, 2, 0, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"places": ((0, (0, 2, 0)),) * 3 + ((1, (1, 6, 0)), (2, (0, 6, 0)), (3, (0, 6, 0)))},
        {"taps": torch.zeros(7, 3)},
        {"fading": torch.zeros(5)},
        {"read_heads": 4},
        {"fading_bias": torch.zeros(6, dtype=torch.float64)},
    ],
    ids=str,
)
def test_what_would_be_read_beside_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"recurrence|one number for each head"):
        replace(recurrence(torch.float32), **wrong)


# ---- models ----


@pytest.mark.parametrize("name", TYPES)
def test_beams_and_batches_and_copies(name: str) -> None:
    """States are written in place, and replaced where sequences are chosen among."""
    model = made(name)
    beams = greedy(model, prompt(2), 8, num_beams=3)
    found = []
    for wrapped in (False, True):
        if wrapped:
            coreskip.wrap(model, Plan.dense(model))
        ids, cache = prompt(2, 12), DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :8], past_key_values=cache, use_cache=True)
            model(ids[:, 8:9], past_key_values=cache, use_cache=True)
            branch = copy.deepcopy(cache)
            branch.reorder_cache(torch.tensor([1, 0]))
            found.append(model(ids[:, 3:4], past_key_values=branch, use_cache=True).logits)
            found.append(model(ids[:, 9:12], past_key_values=cache, use_cache=True).logits)
            found.append(model(ids[:, 1:2], past_key_values=cache, use_cache=True).logits)
    native_of(model)
    assert torch.equal(greedy(model, prompt(2), 8, num_beams=3), beams)
    for plain, got in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(got, plain, rtol=0, atol=1e-3 * float(plain.std()))


@pytest.mark.parametrize("name", ["qwen3_5_text", "olmo_hybrid", "lfm3"])
@pytest.mark.parametrize("weights", [None, "int4"])
def test_plans_are_carried_out_as_on_modules(name: str, weights: str | None) -> None:
    model = made(name)
    dense, found, skipped = half_of_the_neurons(model), [], []
    for natively in (True, False):
        with coreskip.wrap(model, Plan(dense.layers, dense.model, dense.recipe, weights=weights)):
            if not natively:
                on_modules(model)
            found.append(stepped(model))
            assert not natively or native_of(model)
            skipped.append(runtime_of(model).usage.neuron_sparsity())
    assert skipped[0] == pytest.approx(skipped[1])
    assert skipped[0] > 0
    error = float((found[0] - found[1]).square().mean().sqrt() / found[1].std())
    assert error < (1e-4 if weights is None else 0.05)


def test_requests_that_share_steps_get_the_tokens_they_get_alone() -> None:
    model = made("qwen3_5_text")
    requests = [Request(prompt(1, length, length)[0].tolist(), 12) for length in (5, 9, 20)]
    with Engine(model, Bytes(), Plan.dense(model), max_batch=4, prompt_bytes=0) as engine:
        expected = [alone(model, request) for request in requests]
        native_of(model)
        tickets = [engine.submit(request) for request in requests]
        assert [ticket.collect().tokens for ticket in tickets] == expected


@pytest.mark.parametrize(
    ("name", "change"), [("qwen3_next", {"most_rate": 1.5}), ("lfm3", {"tap_bias": torch.ones(64)})]
)
def test_a_description_that_is_wrong_leaves_the_cache_as_it_was(
    name: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = CpuModel._recurrent

    def wrong(self: Any, found: Any) -> Any:
        return replace(right(self, found), **change)

    monkeypatch.setattr(CpuModel, "_recurrent", wrong)
    model = made(name)
    expected = texts(model)
    with coreskip.wrap(model, Plan.dense(model)):
        for _ in range(4):
            assert all(map(torch.equal, texts(model), expected))
        assert "differ" in str(runtime_of(model).steps.native.refusal)


@pytest.mark.parametrize("name", ["olmo_hybrid", "lfm3"])
def test_a_recurrence_cannot_be_skipped(name: str) -> None:
    """Its states would be those of another text."""
    model = made(name)
    dense = Plan.dense(model)
    layers = (LayerPlan(), LayerPlan(layer=SkipAttention()), *dense.layers[2:])
    with pytest.raises(coreskip.CoreskipError, match="attention of their own"):
        coreskip.wrap(model, Plan(layers, dense.model, {"method": "layers"}))


def test_inputs_that_a_convolution_leaves_out_are_left_out_by_the_modules() -> None:
    model = made("lfm3")
    dense = Plan.dense(model)
    policy = Teal(keep=0.5, thresholds={"attention.in_proj": 0.5, "attention.out_proj": 0.1})
    conv = next(i for i, layer in enumerate(model.model.layers) if hasattr(layer, "conv"))
    layers = tuple(LayerPlan(policy) if i == conv else LayerPlan() for i in range(len(dense.layers)))
    expected = stepped(model)
    with coreskip.wrap(model, Plan(layers, dense.model, {"method": "teal"})):
        got = stepped(model)
        assert not runtime_of(model).steps.native.ready
    assert not torch.equal(got, expected)


def test_a_cache_that_records_its_past_is_the_modules() -> None:
    """It is to be cropped, which states that were written over cannot be."""
    model, ids = made("olmo_hybrid"), prompt(1, 12)
    with torch.no_grad(), coreskip.wrap(model, Plan.dense(model)):
        greedy(model, prompt(1), 4)
        steps = native_of(model)
        cache = DynamicCache(config=model.config)
        model(ids[:, :8], past_key_values=cache, use_cache=True)
        cache.activate_past_recording()
        with pytest.raises(Exception, match="recurrence"):
            steps.admit(cache, 1)
        model(ids[:, 8:9], past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 9


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2_moe"])
def test_texts_are_made_without_pythons_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled ones, too; states know no way back, so that nothing is drafted."""
    model, ids = made(name), prompt(1)
    asked: list[dict[str, Any]] = [{}, {"do_sample": True, "temperature": 0.7}]

    def both() -> list[Tensor]:
        torch.manual_seed(0)
        return [greedy(model, ids, 20, **options) for options in asked]

    expected, calls = both(), []
    decode = loop._decode
    monkeypatch.setattr(loop, "_decode", lambda *given: (calls.append(1), decode(*given))[1])
    for mode in ({}, {"lookup": True}):
        with coreskip.wrap(model, Plan.dense(model), **mode):
            greedy(model, ids, 4)  # proves the native step
            calls.clear()
            assert all(map(torch.equal, both(), expected))
            assert len(calls) == 2
            native_of(model)


@pytest.mark.parametrize(
    ("name", "changed"), [("olmo_hybrid", "A_log"), ("qwen3_next", "conv1d.weight"), ("lfm3", "conv.weight")]
)
def test_numbers_that_change_count_at_the_next_step(name: str, changed: str) -> None:
    model = made(name)
    number = next(parameter for path, parameter in model.named_parameters() if path.endswith(changed))
    with coreskip.wrap(model, Plan.dense(model)):
        before = stepped(model)
        native_of(model)
        with torch.no_grad():
            number.mul_(0.5)
        got = stepped(model)
        native_of(model)
    expected = stepped(model)
    assert not torch.equal(before, got)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3 * float(expected.std()))
