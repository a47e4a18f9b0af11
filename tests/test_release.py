"""Packed weights in place of the originals."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import NoTokenizer, greedy, plan_of, prompt, tiny
from torch import nn
from transformers import DynamicCache

import coreskip
from coreskip import CoreskipError, Engine, Plan
from coreskip.kernels import cpu, ops
from coreskip.kernels.groups import ungroup, untile
from coreskip.kernels.packed import DTYPES, PackedLinear
from coreskip.predictors.plan import LayerPlan
from coreskip.predictors.policies import Sketch
from coreskip.runtime import native_check, unpacking
from coreskip.runtime.wrap import is_wrapped, runtime_of

NO_LIBRARY = ops.available("cpu")
pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))


def numbers(packed: PackedLinear) -> torch.Tensor:
    """The definition of what tiles stand for, float32."""
    return ungroup(*untile(packed)).flatten(1)[:, : packed.in_features]


@pytest.mark.parametrize("fmt", ["int4", "int8_groups"])
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 33), (100, 70), (45, 288)])
def test_untile_is_its_definition(isa: str, fmt: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 2, shape[0])[:, None]
    packed = PackedLinear.pack(weight, fmt=fmt)
    for dtype in DTYPES:
        expected = numbers(packed).to(dtype)
        for first, last in {(0, shape[0]), (shape[0] // 2, shape[0]), (shape[0] // 3, shape[0] // 3 + 1)}:
            out = torch.full((last - first, shape[1]), torch.nan, dtype=dtype)
            assert torch.equal(cpu.untile(packed, out, first), expected[first:last])


def matrices(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def bytes_of(model: nn.Module) -> int:
    places = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters() if not p.is_meta}
    return sum(places.values())


def rounded(model: Any, weights: str) -> Any:
    """A copy whose weights are the numbers that the packed ones stand for."""
    twin = copy.deepcopy(model)
    for module in matrices(twin):
        fmt = "int4" if weights == "int4" and module is not twin.get_output_embeddings() else "int8_groups"
        module.weight.data = numbers(PackedLinear.pack(module.weight, fmt=fmt)).to(module.weight.dtype)
    return twin


@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("family", ["llama", "llama_bias", "phi3", "qwen3", "olmo2"])
def test_prefill_is_that_of_the_rounded_model(family: str, weights: str) -> None:
    model, ids = tiny(family), prompt(2, 12)
    twin, before = rounded(model, weights), bytes_of(model)
    in_matrices = sum(m.weight.nbytes for m in matrices(model))
    coreskip.wrap(model, Plan.dense(model, weights=weights), keep_originals=False)
    assert before - bytes_of(model) == in_matrices
    assert [m.weight.shape for m in matrices(model)] == [m.weight.shape for m in matrices(twin)]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, twin(ids).logits)


def test_what_the_native_step_does_not_cover_runs_on_the_tiles() -> None:
    model = tiny("llama")
    twin = rounded(model, "int4")
    coreskip.wrap(model, Plan.dense(model, weights="int4"), keep_originals=False)
    ids, many = prompt(1, 9), prompt(65, 6)  # more rows than it takes
    together = greedy(model, many, 6)
    for row in (0, 8, 64):
        assert torch.equal(together[row : row + 1], greedy(model, many[row : row + 1], 6))
    options = {"output_attentions": True, "return_dict_in_generate": True}
    model.set_attn_implementation("eager")
    out = greedy(model, ids, 4, **options)
    assert out.attentions[-1][0].shape[-1] == 12
    embeddings = torch.randn(1, 5, 64, requires_grad=True)
    for each in (model, twin):
        each(inputs_embeds=embeddings).logits.square().sum().backward()
    doubled = embeddings.grad.clone()
    embeddings.grad = None
    twin(inputs_embeds=embeddings).logits.square().sum().backward()
    torch.testing.assert_close(doubled, 2 * embeddings.grad, rtol=1e-3, atol=1e-3)


def test_a_matrix_put_together_in_pieces_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("phi3"), prompt(1, 9)
    monkeypatch.setattr(unpacking, "_AT_ONCE", 40 * 64 * 4)  # 40 rows, neither tiles nor parts
    twin = rounded(model, "int8")
    coreskip.wrap(model, Plan.dense(model, weights="int8"), keep_originals=False)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-5, atol=1e-5)


def test_what_packing_does_not_round_comes_back_bit_for_bit() -> None:
    model = rounded(tiny("llama"), "int4")
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    with coreskip.wrap(model, Plan.dense(model, weights="int4")):
        assert len(runtime_of(model).replaced) > 10
        with pytest.raises(CoreskipError, match=r"call coreskip.unwrap\(model\) first"):
            model.state_dict()
        greedy(model, prompt(1, 9), 4)
    for name, p in model.named_parameters():
        assert before[name][0] == id(p)
        assert torch.equal(before[name][1].view(torch.int32), p.view(torch.int32))
        assert p.requires_grad
    model.load_state_dict(model.state_dict())


def test_by_default_what_packing_rounds_is_kept(llama: Any) -> None:
    before = bytes_of(llama)
    with coreskip.wrap(llama, Plan.dense(llama, weights="int8")):
        assert bytes_of(llama) == before
        assert runtime_of(llama).steps.native.packed_bytes() is not None


def test_refusals(llama: Any, tmp_path: Any) -> None:
    with pytest.raises(CoreskipError, match="exact mode verifies with the weights"):
        coreskip.wrap(llama, Plan.dense(llama, weights="int8"), exact=True, keep_originals=False)
    assert not is_wrapped(llama)
    saved = copy.deepcopy(llama.state_dict())
    coreskip.wrap(llama, Plan.dense(llama, weights="int8"), keep_originals=False)
    for attempt in (
        lambda: coreskip.unwrap(llama),
        lambda: llama.__enter__(),
        lambda: llama.to(torch.bfloat16),
        lambda: llama.load_state_dict(saved),
        lambda: llama.model.load_state_dict({k.removeprefix("model."): v for k, v in saved.items()}, strict=False),
        lambda: llama.state_dict(),
        lambda: llama.model.layers[0].state_dict(),
        lambda: llama.save_pretrained(tmp_path / "saved"),
    ):
        with pytest.raises(CoreskipError, match="packed weights have replaced the model's own; load the model again"):
            attempt()
    assert not list(tmp_path.rglob("*.safetensors"))
    assert len(greedy(llama, prompt(1, 9), 4)[0]) == 13  # and it still runs


def test_an_engine_leaves_a_model_wrapped_that_cannot_be_unwrapped(llama: Any) -> None:
    with Engine(llama, NoTokenizer(), Plan.dense(llama, weights="int8"), keep_originals=False):
        pass
    assert is_wrapped(llama)


@pytest.mark.parametrize("reason", ["not one of the kernels'", "hooks", "infinities"])
def test_nothing_goes_where_the_native_step_does_not_run(
    reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    if reason == "not one of the kernels'":
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.Hardswish()
    if reason == "hooks":
        model.lm_head.register_forward_hook(lambda *_: None)
    if reason == "infinities":
        model.lm_head.weight.data[-1, -1] = torch.inf
        monkeypatch.setattr(native_check, "compare", lambda *_, **__: None)  # behind a ReLU it would not show
        monkeypatch.setattr(native_check, "close", lambda *_: True)
    before = bytes_of(model)
    with (
        caplog.at_level(logging.WARNING, "coreskip"),
        coreskip.wrap(model, Plan.dense(model, weights="int8"), keep_originals=False),
    ):
        assert bytes_of(model) == before
    assert [r for r in caplog.messages if "the original weights are kept" in r and reason in r]


@pytest.mark.parametrize("kind", ["dense", "static", "sketch", "griffin"])
def test_decoding_is_what_it_is_with_the_originals_beside_it(kind: str) -> None:
    """Static sets and sketches are packed while the originals are there; core neurons keep their MLPs'."""
    model, ids, more = tiny("llama"), prompt(1, 12), prompt(1, 1, seed=3)
    if kind == "sketch":
        dense = Plan.dense(model, weights="int4")
        policy = Sketch(bits=4, keep=0.5)
        plan = Plan(tuple(LayerPlan(policy) for _ in dense.layers), dense.model, {"method": kind}, weights="int4")
    else:
        plan = Plan.dense(model, weights="int8") if kind == "dense" else replace(plan_of(model, kind), weights="int4")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        caches = copy.deepcopy(cache), copy.deepcopy(cache)
        with coreskip.wrap(model, plan, keep_originals=True):
            model(more, past_key_values=copy.deepcopy(cache))  # the first step is the modules'
            expected = model(more, past_key_values=caches[0]).logits
        coreskip.wrap(model, plan, keep_originals=False)
        assert torch.equal(model(more, past_key_values=caches[1]).logits, expected)
        assert model.model.layers[0].self_attn.q_proj.weight.is_meta
        assert model.model.layers[0].mlp.up_proj.weight.is_meta == (kind != "griffin")
    greedy(model, ids, 4)


_PEAK = """
import torch, coreskip
from coreskip.bench.processes import memory_at_peak

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024

model, tokenizer = coreskip.load(device="cpu")
ids = torch.arange(100, 164)[None]
model.generate(ids, max_new_tokens=4)
dense = memory_at_peak("cpu")
coreskip.wrap(model, coreskip.Plan.dense(model, weights="int4"), keep_originals=False)
model.generate(ids, max_new_tokens=4)
print(dense, memory_at_peak("cpu"), resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_the_dense_models_and_memory_falls_below_it() -> None:
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    dense, peak, now = map(int, done.stdout.split())
    assert peak <= 1.1 * dense
    assert now <= dense - 250e6  # 425 MB of fp32 went, 95 MB came


def test_the_embedded_model_is_made_of_such_numbers(embedded: tuple[Any, Any]) -> None:
    model, _ = embedded
    with coreskip.wrap(model, Plan.dense(model, weights="int4")):
        assert len(runtime_of(model).replaced) == 210  # all but the head, which shares the embeddings' matrix
        short = greedy(model, prompt(1, 20), 8)
    with coreskip.wrap(model, Plan.dense(model, weights="int4"), keep_originals=True):
        assert torch.equal(greedy(model, prompt(1, 20), 8), short)
