"""Every family: what dissect finds, keep = 1 is dense to the token, unwrap leaves no trace, every way to generate."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, greedy, plan_of, prompt, tiny
from transformers import DynamicCache, StaticCache
from transformers.generation import TextStreamer

import coreskip
from coreskip.predictors.anatomy import FAMILIES as TABLE
from coreskip.predictors.anatomy import canonical_activation, dissect
from coreskip.runtime.wrap import runtime_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def fingerprint(model: Any) -> dict[str, Any]:
    """Everything that unwrap promises to restore."""
    with torch.no_grad():
        logits = model(prompt()).logits
    return {
        "class": type(model),
        "keys": list(model.state_dict()),
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "signatures": [str(inspect.signature(module.forward)) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "logits": logits,
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, after[name]), name
        else:
            assert value == after[name], name


@pytest.mark.parametrize("family", FAMILIES)
def test_dissect_reads_the_right_weights(family: str) -> None:
    model = tiny(family)
    anatomy = dissect(model)
    assert len(anatomy) == 3
    assert all(attention is not None for attention in anatomy.attentions)
    for mlp in anatomy.mlps:
        x = torch.randn(1, 4, 64)
        seen: list[torch.Tensor] = []
        handle = mlp.down.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            if mlp.whole:
                expected = mlp.owner(x)
            elif hasattr(mlp.owner, "fc1"):
                expected = mlp.down(mlp.act(mlp.up(x)))
            else:
                expected = mlp.owner(x, torch.zeros_like(x))
        handle.remove()
        torch.testing.assert_close(mlp.formula(x), expected, rtol=1e-4, atol=1e-5)
        assert seen[0].shape[-1] == mlp.intermediate_size == mlp.matrices().up.shape[0]
        assert isinstance(canonical_activation(mlp.act), str), "tiny configs use activations the kernels know"


def test_the_issue_names_are_in_the_table() -> None:
    named = "llama mistral qwen2 qwen3 phi3 gemma gemma2 gemma3_text olmo2 stablelm starcoder2 opt gpt2 gpt_neox"
    assert set(named.split()) | {"falcon", "bloom"} <= set(TABLE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["magnitude", "static"])
def test_keep_one_is_dense(family: str, kind: str) -> None:
    model = tiny(family)
    expected = greedy(model, prompt())
    with coreskip.wrap(model, plan_of(model, kind, keep=1.0)):
        assert torch.equal(greedy(model, prompt()), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_the_neurons_is_what_the_formula_says(family: str) -> None:
    """One decode step under a static plan against a dense model whose other neurons were zeroed in the weights."""
    model, twin = tiny(family), tiny(family)
    plan = plan_of(model, "static")
    for layer, mlp in zip(plan.layers, dissect(twin).mlps, strict=True):
        dropped = torch.ones(mlp.intermediate_size, dtype=torch.bool)
        dropped[layer.neurons.indices] = False  # type: ignore[union-attr]
        with torch.no_grad():
            mlp.matrices().down[dropped] = 0.0
    ids = prompt()
    cache = DynamicCache(config=model.config)
    twin_cache = DynamicCache(config=model.config)
    with torch.no_grad(), coreskip.wrap(model, plan):
        model(ids, past_key_values=cache, use_cache=True)
        step = model(ids[:, :1], past_key_values=cache, use_cache=True).logits
        dense = tiny(family)
        dense(ids, past_key_values=twin_cache, use_cache=True)  # the same dense prefill
        expected = twin(ids[:, :1], past_key_values=twin_cache, use_cache=True).logits
        assert runtime_of(model).usage.neuron_sparsity() == pytest.approx(0.5, abs=0.01)
    torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_unwrap_leaves_no_trace(family: str) -> None:
    model = tiny(family)
    before = fingerprint(model)
    wrapped = coreskip.wrap(model, plan_of(model, "griffin"))
    assert wrapped is model
    during = fingerprint(model)
    for name in ("keys", "signatures", "hooks"):
        assert during[name] == before[name]
    assert [name for name, _ in during["modules"]] == [name for name, _ in before["modules"]]
    greedy(model, prompt())
    coreskip.unwrap(model)
    same(before, fingerprint(model))


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids = prompt(3)
    mask = torch.ones_like(ids)
    for row, padding in ((0, 4), (1, 2)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["signed", "similar"])
def test_every_way_to_generate(family: str, kind: str) -> None:
    model = tiny(family)
    ids, mask = left_padded()
    new = 6
    with coreskip.wrap(model, plan_of(model, kind)):
        rows = greedy(model, ids, new, attention_mask=mask)
        alone = greedy(model, ids[2:], new)
        assert torch.equal(rows[2:], alone), "a selection depends on its own row only"
        assert torch.equal(greedy(model, ids, new, attention_mask=mask), rows), "a second generate starts afresh"
        assert torch.equal(greedy(model, ids[2:], new, prefill_chunk_size=4), alone), "chunks choose the same neurons"
        torch.manual_seed(0)
        sampled = greedy(model, ids, new, attention_mask=mask, do_sample=True, num_return_sequences=2)
        beams = greedy(model, ids, new, attention_mask=mask, num_beams=3, num_return_sequences=2)
        assert sampled.shape == beams.shape == (6, ids.shape[1] + new)
        if model._can_compile_fullgraph or family == "llama":
            static = StaticCache(config=model.config, max_cache_len=32)
            assert torch.equal(greedy(model, ids[2:], new, past_key_values=static), alone)
        first = model.generate(ids[2:], max_new_tokens=new, do_sample=False, return_dict_in_generate=True)
        turn = torch.cat([first.sequences, prompt(1, 4, seed=3)], dim=1)
        again = greedy(model, turn, new, past_key_values=first.past_key_values)
        assert again.shape == (1, turn.shape[1] + new)
        assert runtime_of(model).usage.neuron_sparsity() > 0.4


class Collector(TextStreamer):
    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ids.append(-1)


def test_streamers_see_every_token(llama: Any) -> None:
    collector = Collector()
    with coreskip.wrap(llama, plan_of(llama, "griffin")):
        output = greedy(llama, prompt(1), streamer=collector)
    assert collector.ids == [*output[0].tolist(), -1]
