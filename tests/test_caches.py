"""KV caches that are not this model's, and what is kept, copied or written of those that are."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_decode import some_tokens, spy
from tiny_models import greedy, plan_of, prompt, tiny
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import coreskip
from coreskip.kernels.ops import available
from coreskip.kernels.step import KeyValues
from coreskip.predictors.plan import Plan
from coreskip.runtime.kv_cache import Rooms, known_rooms
from coreskip.runtime.selections import selections_of
from coreskip.runtime.wrap import is_wrapped, runtime_of

pytestmark = pytest.mark.skipif(available("cpu") is not None, reason="needs the compiled kernels")

PLAIN = (DynamicCache, DynamicLayer, DynamicSlidingWindowLayer)


def warm(family: str = "llama", kind: str = "dense", **options: Any) -> Any:
    """A wrapped model that decodes natively."""
    model = tiny(family)
    coreskip.wrap(model, Plan.dense(model) if kind == "dense" else plan_of(model, kind), **options)
    greedy(model, prompt(1), 8)
    assert runtime_of(model).steps.native.ready
    return model


def filled(model: Any, cache: Any = None, tokens: int = 2) -> Any:
    """A cache of 9 tokens and of some that were decoded one by one."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    model(prompt(1), past_key_values=cache)
    for token in some_tokens(1, tokens).split(1, 1) if tokens else ():
        model(token, past_key_values=cache)
    return cache


def rooms_of(model: Any, cache: Any) -> Rooms | None:
    return known_rooms(cache, 1, runtime_of(model).steps.native.described.entries)


def same(logits: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((logits - expected).abs().max() <= tolerance * expected.abs().max())


# --- caches of another model, or of nobody's


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"lookup": True}])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_drafting_by_the_first_layers(family: str, options: dict[str, Any]) -> None:
    """`assistant_early_exit`: the model's own cache of one layer, before any native step and after."""
    model = tiny(family)
    expected = greedy(model, prompt(1), 20)
    with coreskip.wrap(model, Plan.dense(model), **options):
        for _ in range(2):
            assert torch.equal(greedy(model, prompt(1), 20, assistant_early_exit=1), expected)
            assert torch.equal(greedy(model, prompt(1), 20), expected)
        assert runtime_of(model).steps.native.ready


@pytest.mark.parametrize("kind", ["signed", "similar", "static"])
def test_drafting_by_the_first_layers_of_a_plan(kind: str) -> None:
    model = tiny("llama")
    with coreskip.wrap(model, plan_of(model, kind), exact=True):
        expected = greedy(model, prompt(1), 20)
        assert torch.equal(greedy(model, prompt(1), 20, assistant_early_exit=1), expected)
    with coreskip.wrap(model, plan_of(model, kind)):
        greedy(model, prompt(1), 20, assistant_early_exit=2)


def half(layer: Any) -> None:
    layer.keys, layer.values = layer.keys.half(), layer.values.half()


def some_heads(layer: Any) -> None:
    layer.keys, layer.values = layer.keys[:, :1], layer.values[:, :1]


def small_heads(layer: Any) -> None:
    layer.keys, layer.values = layer.keys[..., :8], layer.values[..., :8]


def shorter(layer: Any) -> None:
    layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]


def values_alone(layer: Any) -> None:
    layer.values = layer.values * 0.5


def meta(layer: Any) -> None:
    layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")


@pytest.mark.parametrize("change", [half, some_heads, small_heads, shorter, values_alone, meta])
@pytest.mark.parametrize("which", [slice(0, 1), slice(1, 2), slice(None)])
def test_a_cache_that_was_changed(change: Callable[[Any], None], which: slice) -> None:
    """Before it has room and after: what the unwrapped model computes, or an error where that raises."""
    model, twin = warm(), tiny("llama")
    with torch.no_grad():
        for tokens in (0, 3):
            results = []
            for each in (model, twin):
                cache = filled(each, tokens=tokens)
                for layer in cache.layers[which]:
                    change(layer)
                try:
                    results.append([each(t, past_key_values=cache).logits for t in some_tokens(1, 3).split(1, 1)])
                except (RuntimeError, NotImplementedError):
                    results.append(None)
            ours, plain = results
            assert (ours is None) == (plain is None)
            assert ours is None or all(same(a, b, 1e-2) for a, b in zip(ours, plain, strict=True))


def test_the_cache_of_a_larger_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rooms that one wrapped model made are none for another."""
    model, other = warm(), tiny("llama", num_hidden_layers=4, num_key_value_heads=4)
    with torch.no_grad(), coreskip.wrap(other, Plan.dense(other)):
        greedy(other, prompt(1), 8)
        cache = filled(other)
        seen = spy(model, monkeypatch)
        with pytest.raises(RuntimeError):
            model(prompt(1, 1), past_key_values=cache)
        assert seen == []


@pytest.mark.parametrize(("of", "to"), [("mistral", "llama"), ("llama", "mistral")])
def test_windows_of_another_model(of: str, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that forgets what the model would still look at, and one that remembers more."""
    config, model, twin = tiny(of).config, warm(to), tiny(to)
    logits = []
    with torch.no_grad():
        for each in (model, twin):
            cache = filled(each, DynamicCache(config=config), tokens=6)
            logits.append(each(prompt(1, 1), past_key_values=cache).logits)
    assert same(*logits)


def test_who_has_methods_of_his_own_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that rounds what it stores, and a layer that counts."""

    class Rounding(DynamicCache):
        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().update(keys.round(decimals=1), values.round(decimals=1), *args, **kwargs)

    model, twin = warm(), tiny("llama")
    seen = spy(model, monkeypatch)
    with torch.no_grad():
        logits = [each(prompt(1, 1), past_key_values=filled(each, Rounding())).logits for each in (model, twin)]
        assert same(*logits)
        assert seen == []
        cache, calls = filled(model, tokens=0), []
        update = cache.layers[1].update
        cache.layers[1].update = lambda *arguments: (calls.append(1), update(*arguments))[1]
        model(prompt(1, 1), past_key_values=cache)
        assert calls == [1]


def test_an_odd_cache_first_does_not_spoil_the_rest() -> None:
    model = tiny("llama")
    with torch.no_grad(), coreskip.wrap(model, Plan.dense(model)):
        cache = filled(model, tokens=0)
        for layer in cache.layers:
            half(layer)
        model(prompt(1, 1), past_key_values=cache)
        greedy(model, prompt(1), 8)
        assert runtime_of(model).steps.native.ready


def test_the_native_step_refuses_what_it_would_overrun() -> None:
    model = warm()
    runtime = runtime_of(model)
    with torch.no_grad():
        cache = filled(model)
        step = runtime.steps.native.step_of(runtime.steps.native.described, runtime.program_for(cache))
    good = torch.zeros(1, 2, 128, 16)
    ids, start = torch.tensor([[5]]), torch.zeros(1, dtype=torch.int64)

    def run(keys: Tensor, values: Tensor, past: int = 9, layers: int = 3, first: int = 0) -> None:
        table = KeyValues([keys] * layers, [values] * layers, [first] * layers)
        step.run(ids, ids, start, table, past, 1)

    run(good, good.clone())
    for keys in (good.half(), good[:, :1], good[..., :8].contiguous(), good.repeat(1, 2, 1, 1)):
        with pytest.raises(ValueError, match=r"KV cache|alike"):
            run(keys, keys.clone())
    for arguments in ((128,), (-1,), (9, 2), (9, 3, 4)):
        with pytest.raises(ValueError, match="KV cache"):
            run(good, good.clone(), *arguments)
    for values in (good[:, :1], good.half(), good[..., :8], good.transpose(1, 2).contiguous().transpose(1, 2)):
        with pytest.raises(ValueError, match="alike"):
            run(good, values)
    table = KeyValues([good] * 3, [good.clone()] * 3, [0] * 3)
    with pytest.raises(ValueError, match="no room"):
        step.generate(5, 120, 0, table, 120, 9, ())
    with pytest.raises(ValueError, match="no room"):
        step.draft(5, 120, 0, table, 120, 9, 0.0)


# --- what is kept of a cache


def test_keys_kept_before_a_branch_can_be_put_back() -> None:
    """Kept, cropped, another branch, put back: and what is kept never changes."""
    model, twin = warm(), tiny("llama")
    texts = []
    with torch.no_grad():
        for each in (model, twin):
            cache = filled(each, tokens=6)
            kept = [(layer.keys, layer.values) for layer in cache.layers]
            before = [(k.clone(), v.clone()) for k, v in kept]
            cache.crop(-5)
            for token in some_tokens(1, 8).flip(1).split(1, 1):
                each(token, past_key_values=cache)
            for pair, old in zip(kept, before, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(pair, old, strict=True))
            for layer, (keys, values) in zip(cache.layers, kept, strict=True):
                layer.keys, layer.values = keys, values
            assert cache.layers[0].keys is kept[0][0]
            texts.append(each(prompt(1, 1), past_key_values=cache).logits)
    assert same(*texts)


def test_changing_what_was_kept_does_not_change_the_cache() -> None:
    """Nor the other way round: once a step has been made, they are apart."""
    model, twin = warm(), tiny("llama")
    logits = []
    with torch.no_grad():
        for each in (model, twin):
            cache = filled(each)
            kept = cache.layers[1].keys
            each(prompt(1, 1), past_key_values=cache)
            kept.zero_()
            cache.layers[0].values.mul_(0.5)  # this one it does
            logits.append(each(prompt(1, 1), past_key_values=cache).logits)
    assert same(*logits)


def test_crops_without_a_holder_stay_in_their_room() -> None:
    """Assisted decoding crops after every round: that must not copy the cache."""
    model = warm()
    with torch.no_grad():
        cache = filled(model)
        rooms = rooms_of(model, cache)
        assert rooms is not None
        for _ in range(5):
            model(prompt(1, 3), past_key_values=cache)
            cache.crop(-2)
            assert rooms_of(model, cache) is rooms
        kept = cache.layers[1].keys
        assert rooms_of(model, cache) is None
        model(prompt(1, 1), past_key_values=cache)
        del kept
        anew = rooms_of(model, cache)
        assert anew is not None
        assert [a is b for a, b in zip(anew.rooms, rooms.rooms, strict=True)] == [True, False, True]


@pytest.mark.parametrize("kind", ["dense", "signed"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_cache_is_written_and_copied_as_a_plain_one(family: str, kind: str) -> None:
    """While the model is wrapped, and after: in another process nothing of coreskip is needed to read it."""
    model = warm(family, kind)
    with torch.no_grad():
        cache = filled(model, tokens=6)
        for _ in range(2):
            file = io.BytesIO()
            torch.save(cache, file)
            assert len(file.getvalue()) < 40_000  # what is in use, not the capacity
            file.seek(0)
            read = [torch.load(file, weights_only=False), *(pickle.loads(pickle.dumps(cache, p)) for p in (0, 2, 5))]
            read.append(copy.deepcopy(cache))
            for other in read:
                assert all(type(layer) in PLAIN for layer in other.layers)
                assert other.get_seq_length() == cache.get_seq_length()
                for a, b in zip(other, cache, strict=True):
                    assert torch.equal(a[0], b[0])
                    assert torch.equal(a[1], b[1])
            assert all(type(other) is DynamicCache for other in read[:-1])
            assert b"coreskip" not in pickle.dumps(cache)
            if is_wrapped(model):
                runtime = runtime_of(model)
                for twin in (copy.copy(cache), copy.deepcopy(cache)):
                    assert selections_of(twin, runtime) is not None or kind == "dense"
                    assert torch.equal(
                        model(prompt(1, 1), past_key_values=copy.deepcopy(twin)).logits,
                        model(prompt(1, 1), past_key_values=copy.deepcopy(cache)).logits,
                    )
                coreskip.unwrap(model)


def test_a_copied_layer_goes_its_own_way() -> None:
    model, twin = warm(), tiny("llama")
    logits = []
    with torch.no_grad():
        for each in (model, twin):
            cache = filled(each)
            other = copy.copy(cache)
            other.layers = [copy.copy(layer) for layer in cache.layers]
            for c in (cache, other):
                each(prompt(1, 2), past_key_values=c)
            assert cache.get_seq_length() == other.get_seq_length() == 13
            cache.crop(-2)
            each(prompt(1, 2, seed=5), past_key_values=cache)
            logits += [each(prompt(1, 1), past_key_values=c).logits for c in (cache, other)]
    assert all(same(a, b) for a, b in zip(logits[:2], logits[2:], strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_first_turn_in_inference_mode(family: str) -> None:
    model, twin = warm(family), tiny(family)
    logits = []
    for each in (model, twin):
        with torch.inference_mode():
            cache = filled(each)
        with torch.no_grad():
            each(prompt(1, 10), past_key_values=cache)
            logits.append(each(prompt(1, 1), past_key_values=cache).logits)
    assert same(*logits)


def test_gradients_through_a_cache_that_has_room() -> None:
    """What a pass saves for its backward pass is not written over."""
    model, twin = warm(), tiny("llama")
    gradients = []
    for each in (model, twin):
        with torch.no_grad():
            cache = filled(each)
        loss = sum(each(prompt(1, 9, seed=s), past_key_values=cache).logits.logsumexp(-1).sum() for s in (1, 2))
        loss.backward()
        gradients.append(each.model.layers[0].self_attn.q_proj.weight.grad)
    assert same(*gradients, tolerance=1e-3)


def test_a_cache_goes_when_nobody_has_it() -> None:
    model = warm()
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            cache = filled(model)
            things = [weakref.ref(thing) for thing in (cache.layers[0], rooms_of(model, cache))]
            del cache
            assert [thing() for thing in things] == [None, None]
    finally:
        gc.enable()
