"""The decode step of a GPU: captured once, replayed for every token.

There is no GPU here. `Recorded` stands in for a CUDA graph: it notes every operation that a step dispatches, and
replays them on the very same memory without any of the Python in between; a step that reads a value back to the host
cannot be recorded.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from test_decode import ragged, some_tokens, teacher_forced
from test_policies import NAMES, plan_with, some_policy
from tiny_models import greedy, plan_of, prompt, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import coreskip
from coreskip import Engine
from coreskip.kernels import ops
from coreskip.predictors.plan import Plan
from coreskip.runtime import gpu_place, lower_gpu
from coreskip.runtime.gpu_modules import ModuleStep
from coreskip.runtime.kv_cache import passing_twin
from coreskip.runtime.phases import drafting
from coreskip.runtime.wrap import runtime_of

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}


class HostRead(RuntimeError):
    """A GPU would have to be waited for."""


class Recorded(TorchDispatchMode):
    """A step's operations on fixed memory, as a CUDA graph holds them."""

    def __init__(self, step: Callable[[], Tensor], device: torch.device) -> None:
        super().__init__()
        step()
        self._operations: list[tuple[Any, Any, Any, list[Tensor] | None]] = []
        with self:
            self._logits = step()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name.partition("::")[2] in WAITS:
            raise HostRead(f"{function} in a captured step")
        result = function(*args, **(kwargs or {}))
        given, made = (self._tensors(x) for x in ((args, kwargs), result))
        memory = {t.untyped_storage().data_ptr() for t in given}
        alias = any(t.untyped_storage().data_ptr() in memory for t in made)
        if function._schema.is_mutable or not alias:  # a view stays a view of the same memory
            self._operations.append((function, args, kwargs or {}, None if alias else made))
        return result

    @staticmethod
    def _tensors(tree: Any) -> list[Tensor]:
        return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]

    def __call__(self) -> Tensor:
        with torch.inference_mode():  # which may write to what was made in it
            for function, args, kwargs, made in self._operations:
                result = function(*args, **kwargs)
                for old, new in zip(made or [], self._tensors(result), strict=False):
                    old.copy_(new)
        return self._logits


@contextmanager
def captured(
    model: Any, plan: Plan | None = None, lowered: bool = False, **options: Any
) -> Iterator[lower_gpu.CapturedSteps]:
    """The model wrapped, with its decode steps recorded where a GPU would capture them. lowered: as whole steps, not
    through the model's modules."""
    with coreskip.wrap(model, Plan.dense(model) if plan is None else plan, **options):
        graphs = runtime_of(model).steps.captured
        graphs.capture = Recorded
        if not lowered:
            graphs.lowering.refuse("a test is of captured modules")
        yield graphs


@pytest.fixture(autouse=True)
def _through_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the kernels of the CPU, like those of a GPU, are operations of a graph."""
    monkeypatch.setattr(ops, "_is_plain", lambda x: False)


def close(logits: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert logits.shape == expected.shape
    assert float((logits - expected).abs().max()) <= tolerance * float(expected.abs().max())


def alike(logits: Tensor, expected: Tensor) -> None:
    """Where neurons are chosen: the last digit of an input may turn one rounding or choice, and so a few logits."""
    assert logits.shape == expected.shape
    assert float((logits - expected).norm()) <= 0.01 * float(expected.norm())


def modules_logits(model: Any, plan: Plan, *arguments: Any) -> Tensor:
    """Of the patched modules, called one by one."""
    with torch.no_grad(), coreskip.wrap(model, plan):
        runtime_of(model).steps.native._state.refusal = "the native step is left out here"
        return teacher_forced(model, *arguments, each=1)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "mistral", "gemma2", "gemma3_text", "phi3", "opt", "gpt_neox", "falcon"]
)
def test_logits_are_the_modules_own_while_the_capacity_grows(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_gpu, "_LEAST", 16)
    model = tiny(family)
    arguments = (*ragged(), some_tokens(2, 48))
    with torch.no_grad():
        expected = modules_logits(model, Plan.dense(model), *arguments)
        with captured(model) as graphs:
            close(teacher_forced(model, *arguments, each=1), expected)
            assert graphs.refusal is None
            assert [c.place.capacity for c in graphs._captured] == [16, 32, 64]
            close(teacher_forced(model, *arguments, each=1), expected)  # the same memory, another cache
            assert len(graphs._captured) == 3


def talk(model: Any) -> tuple[Tensor, Tensor]:
    """Two turns over one cache; the second prompt comes while the first answer's keys and values are in the buffers."""
    ids, mask = ragged()
    first = greedy(model, ids, 24, attention_mask=mask, return_dict_in_generate=True)
    more = torch.cat([first.sequences, prompt(2, 5, seed=3)], 1)
    mask = torch.cat([mask, torch.ones_like(more[:, mask.shape[1] :])], 1)
    return first.sequences, greedy(model, more, 24, attention_mask=mask, past_key_values=first.past_key_values)


def policy_plan(model: Any, name: str) -> Plan:
    return plan_of(model, name) if name in ("static", "signed") else plan_with(model, some_policy(model, name))


@pytest.mark.parametrize("name", ["static", "signed", *NAMES])
def test_policies_choose_without_the_host(name: str) -> None:
    """`Recorded` refuses to read anything back; what the modules compute under the plan is what is replayed."""
    model = tiny("llama_bias" if name == "teal_all" else "llama")
    plan = policy_plan(model, name)
    ids, mask = ragged()
    arguments = (ids[:1], mask[:1], some_tokens(1, 40)) if name == "signed" else (ids, mask, some_tokens(2, 40))
    expected = modules_logits(model, plan, *arguments)
    with torch.no_grad(), captured(model, plan) as graphs:
        alike(teacher_forced(model, *arguments, each=1), expected)
        usage = runtime_of(model).usage
        assert graphs.refusal is None
        assert len(graphs._captured) == 1
        assert 0.3 < usage.neuron_sparsity() < 0.7 or "teal" in name


def test_what_was_skipped_is_counted_once_a_token() -> None:
    model = tiny("llama")
    with captured(model, plan_of(model, "static")):
        greedy(model, prompt(1), 12)
        usage = runtime_of(model).usage
        assert usage._possible == 11 * 3 * 160
        assert usage.neuron_sparsity() == 0.5
        usage.reset()
        usage.counting = True
        greedy(model, prompt(1), 12)
        assert usage.neuron_sparsity() == 0.5


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_generate_and_further_turns_over_its_cache(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_gpu, "_LEAST", 16)
    model = tiny(family)
    expected = talk(model)
    with captured(model) as graphs:
        for found, wanted in zip(talk(model), expected, strict=True):
            assert torch.equal(found, wanted)
        assert graphs._captured
        assert torch.equal(
            greedy(model, prompt(1), 12, num_beams=3), greedy(model, prompt(1), 12, num_beams=3, use_cache=False)
        )


def test_no_more_than_a_layer_of_a_cache_is_there_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first step is compared with the modules, and while the cache moves to where steps find it."""
    model, ids, twins = tiny("llama"), prompt(1, 30), list[Any]()
    expected = model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    cache, buffer, twin_of, moved = DynamicCache(config=model.config), gpu_place._buffer, passing_twin, list[int]()

    def made(like: Tensor, capacity: int) -> Tensor:
        moved.append([layer.keys.data_ptr() for layer in cache.layers].index(pointers[len(moved) // 2]))
        assert all(layer.keys.data_ptr() not in pointers for layer in cache.layers[: moved[-1]])
        return buffer(like, capacity)

    def twin(cache: DynamicCache) -> DynamicCache:
        twins.append(twin_of(cache))
        return twins[-1]

    monkeypatch.setattr(gpu_place, "_buffer", made)
    monkeypatch.setattr(lower_gpu, "passing_twin", twin)
    with torch.no_grad(), captured(model):
        model(ids, past_key_values=cache)
        pointers = [layer.keys.data_ptr() for layer in cache.layers]
        close(model(ids[:, :1], past_key_values=cache).logits, expected)
    assert moved == [0, 0, 1, 1, 2, 2]
    assert [layer.keys.data_ptr() for layer in twins[0].layers] == pointers
    assert [layer.keys.shape[2] for layer in cache.layers] == [31] * 3


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


@pytest.mark.parametrize("ends", [False, True])
def test_greedy_tokens_are_made_several_at_once(ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_gpu, "_LEAST", 16)
    model = tiny("llama")
    ids = prompt(1)
    expected = greedy(model, ids, 40)
    end = int(expected[0, 9 + 27])
    options: dict[str, Any] = {"eos_token_id": end} if ends else {}
    expected = greedy(model, ids, 40, **options)
    made: list[int] = []
    with captured(model) as graphs:
        original = graphs.greedy

        def spy(*arguments: Any) -> list[int]:
            tokens = original(*arguments)
            made.append(len(tokens))
            return tokens

        monkeypatch.setattr(graphs, "greedy", spy)
        assert torch.equal(greedy(model, ids, 40, **options), expected)
        assert not made  # nothing had been captured and compared before
        usage, heard = runtime_of(model).usage, Heard()
        usage.reset()
        cache = DynamicCache(config=model.config)
        assert torch.equal(greedy(model, ids, 40, past_key_values=cache, streamer=heard, **options), expected)
        assert heard.tokens == [*expected[0].tolist(), -1]
        # the first token, and the first in a larger capacity, are made by calls of the model
        assert made[:6] == [0, 6, 0, 8, 7, 0]
        assert cache.get_seq_length() == expected.shape[1] - 1
        assert usage._possible == (expected.shape[1] - 9 - 1) * 3 * 160
        usage.counting = True
        made.clear()
        assert torch.equal(greedy(model, ids, 40, **options), expected)
        assert not any(made)
        more = torch.cat([expected, prompt(1, 5, seed=3)], 1)
        again = greedy(model, more, 12, past_key_values=cache)
    assert torch.equal(again, greedy(model, more, 12))


def test_sampling_processors_and_inference_mode() -> None:
    model = tiny("llama")

    def sampled() -> Tensor:
        torch.manual_seed(5)
        return greedy(model, prompt(2), 12, do_sample=True, top_k=5, temperature=2.0, repetition_penalty=1.3)

    expected = sampled()
    with captured(model) as graphs:
        with torch.inference_mode():
            assert torch.equal(sampled(), expected)
        assert torch.equal(sampled(), expected)
        assert len(graphs._captured) == 1


def test_buffers_go_to_the_next_cache_only_when_nobody_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    monkeypatch.setattr(lower_gpu, "_MOST", 2)
    options = {"return_dict_in_generate": True}
    prompts = [prompt(1, 9, seed=s) for s in range(4)]
    expected = [greedy(model, ids, 8, **options) for ids in prompts]
    with captured(model) as graphs:
        keys = greedy(model, prompts[0], 8, **options).past_key_values.layers[1].keys  # the cache itself is gone
        before = keys.clone()
        kept = [greedy(model, ids, 8, **options) for ids in prompts[1:]]  # more caches than buffers
        assert len(graphs._captured) == 2
        for found, wanted in zip(kept, expected[1:], strict=True):
            assert torch.equal(found.sequences, wanted.sequences)
            for layer, other in zip(found.past_key_values.layers, wanted.past_key_values.layers, strict=True):
                close(layer.keys, other.keys)
                close(layer.values, other.values)
        assert torch.equal(keys, before) or graphs._captured[0].place.buffers[1][0].data_ptr() == keys.data_ptr()
        del kept, found
        greedy(model, prompts[0], 8)
        assert len(graphs._captured) == 2


def test_a_batch_that_chose_differently_and_a_mask_with_holes() -> None:
    model = tiny("llama")
    ids, mask = ragged()
    plan = plan_of(model, "signed")
    expected = modules_logits(model, plan, ids, mask, some_tokens(2, 4))
    with torch.no_grad(), captured(model, plan) as graphs:
        assert torch.equal(teacher_forced(model, ids, mask, some_tokens(2, 4), each=1), expected)
        assert not graphs._captured
        assert graphs.refusal is None
    mask[0, 3] = 0
    expected = modules_logits(model, Plan.dense(model), ids, mask, some_tokens(2, 4))
    with torch.no_grad(), captured(model) as graphs:
        close(teacher_forced(model, ids, mask, some_tokens(2, 4), each=1), expected)
        assert graphs._captured


def wrong_masks(step: ModuleStep) -> Tensor:
    return step._place.seen[:, None, None] | True


def reading(step: ModuleStep) -> Tensor:
    return step._place.seen[:, None, None, :] & (step._place.at.item() >= step._index)


@pytest.mark.parametrize(("masks", "reason"), [(wrong_masks, "differ"), (reading, "_local_scalar_dense")])
def test_what_differs_or_waits_stays_on_the_modules(
    masks: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("llama")
    expected = talk(model)
    monkeypatch.setattr(ModuleStep, "_masks", masks)
    with captured(model) as graphs, caplog.at_level(logging.WARNING, "coreskip"):
        for found, wanted in zip(talk(model), expected, strict=True):
            assert torch.equal(found, wanted)
        assert reason in str(graphs.refusal)
        assert not graphs._captured
        assert len(caplog.records) == 1
        assert "\n" not in caplog.text.strip()


def test_a_length_read_on_the_host_is_noticed() -> None:
    """ALiBi is made from a 2-D mask's length: frozen, it would be wrong from the second token on."""
    model = tiny("bloom")
    expected = greedy(model, prompt(1), 12)
    with captured(model) as graphs:
        assert torch.equal(greedy(model, prompt(1), 12), expected)
        assert graphs.refusal is not None


def test_new_weights_are_captured_anew() -> None:
    model = tiny("llama")
    twin = tiny("llama", seed=4)
    expected = greedy(twin, prompt(1), 12)
    with captured(model) as graphs:
        greedy(model, prompt(1), 12)
        model.load_state_dict(twin.state_dict())
        assert not graphs._captured
        graphs.capture = Recorded  # on a GPU it stays
        assert torch.equal(greedy(model, prompt(1), 12), expected)
        assert graphs._captured


def test_hooks_autocast_and_gradients_get_the_modules() -> None:
    model = tiny("llama")
    cache, calls = DynamicCache(config=model.config), []
    with captured(model) as graphs, torch.no_grad():
        model(prompt(1), past_key_values=cache)
        handle = model.model.layers[1].register_forward_hook(lambda *arguments: calls.append(1))
        model(prompt(1, 1), past_key_values=cache)
        handle.remove()
        assert calls == [1]
        with torch.autocast("cpu", torch.bfloat16):
            model(prompt(1, 1), past_key_values=cache)
        with torch.enable_grad():
            assert model(prompt(1, 1), past_key_values=cache).logits.requires_grad
        four = torch.ones((1, 1, 1, cache.get_seq_length() + 1), dtype=torch.bool)
        model(prompt(1, 1), past_key_values=cache, attention_mask=four)
        model(prompt(1, 3), past_key_values=cache)
        assert not graphs._captured
        model(prompt(1, 1), past_key_values=cache)
        assert graphs._captured
        assert graphs.refusal is None


def test_exact_mode_replays_drafts_alone() -> None:
    model = tiny("llama")
    tokens = some_tokens(1, 3)
    expected = greedy(model, prompt(1), 24)
    cache = DynamicCache(config=model.config)
    with captured(model, plan_of(model, "static"), exact=True) as graphs:
        assert torch.equal(greedy(model, prompt(1), 24), expected)
        with torch.no_grad():
            model(prompt(1), past_key_values=cache)
            model(tokens[:, :1], past_key_values=cache)
            assert not graphs._captured
            with drafting():
                model(tokens[:, 1:2], past_key_values=cache)
            assert graphs._captured
            cache.crop(-1)
            verified = model(tokens[:, 1:], past_key_values=cache).logits
    with torch.no_grad():
        close(verified, model(torch.cat([prompt(1), tokens], 1)).logits[:, -2:])


def test_threads_have_buffers_of_their_own() -> None:
    model = tiny("llama")
    prompts = [prompt(1, 9, seed=s) for s in range(3)]
    expected = [greedy(model, ids, 12) for ids in prompts]
    found: dict[int, Tensor] = {}
    with captured(model):
        threads = [
            threading.Thread(target=lambda i=i: found.__setitem__(i, greedy(model, prompts[i], 12))) for i in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[i], wanted) for i, wanted in enumerate(expected))


def test_a_copied_cache_is_a_cache_of_its_own() -> None:
    model = tiny("llama")
    tokens = some_tokens(1, 6)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), captured(model) as graphs:
        model(prompt(1), past_key_values=cache)
        model(tokens[:, :1], past_key_values=cache)
        twin = copy.deepcopy(cache)
        logits = [[model(t, past_key_values=c).logits for t in tokens[:, 1:].split(1, 1)] for c in (cache, twin)]
        for a, b in zip(*logits, strict=True):
            close(a, b)
        assert len(graphs._captured) == 2
        assert graphs.refusal is None


def test_engine(embedded: tuple[Any, Any]) -> None:
    model, tokenizer = embedded
    expected = Engine(model, tokenizer).generate(["The sea", "A long and winding road"], max_new_tokens=8)
    with captured(model) as graphs:
        engine = Engine(model, tokenizer)
        assert engine.generate(["The sea", "A long and winding road"], max_new_tokens=8) == expected
        assert "".join(engine.stream("The sea", max_new_tokens=8)) == expected[0]
        assert len(graphs._captured) == 2
        assert graphs.refusal is None


def test_buffers_go_with_the_wrapping() -> None:
    model = tiny("llama")
    gc.collect()
    gc.disable()
    try:
        with captured(model) as graphs:
            greedy(model, prompt(1), 4)
            step = weakref.ref(graphs._captured[0].place)
            del graphs
        assert step() is None
    finally:
        gc.enable()


TRITON = """
import sys
sys.path.insert(0, "tests")
import torch
import test_graph as t
from coreskip.kernels import gpu, ops
from torch.utils._python_dispatch import TorchDispatchMode

class NoReads(TorchDispatchMode):
    "The calls of the backend itself, which `Recorded` takes for single operations."
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function._schema.name.partition("::")[2] not in t.WAITS, function
        return function(*args, **(kwargs or {}))

def watched(function):
    def call(*arguments):
        with NoReads():
            return function(*arguments)
    return call

ops._is_plain = lambda x: False
gpu._BLOCKS = 0  # the interpreter takes milliseconds for a block
model = t.tiny("llama", num_hidden_layers=1, intermediate_size=48)
tokens = t.some_tokens(1, 3)
for name in ("sketch", "sketch_threshold", "cats", "topk_threshold"):
    plan = t.policy_plan(model, name)
    expected = t.modules_logits(model, plan, t.prompt(1), torch.ones_like(t.prompt(1)), tokens)
    real = ops.cpu.mlp, ops.cpu.choose
    ops.cpu.mlp, ops.cpu.choose = watched(gpu.mlp), watched(gpu.choose)
    with torch.no_grad(), t.captured(model, plan) as graphs:
        found = t.teacher_forced(model, t.prompt(1), torch.ones_like(t.prompt(1)), tokens, each=1)
        assert graphs.refusal is None and graphs._captured, graphs.refusal
    ops.cpu.mlp, ops.cpu.choose = real
    t.alike(found, expected)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (the extra `gpu`)")
def test_with_the_triton_kernels_inside() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", TRITON], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["dense", "static", "signed", "sketch", "sketch_threshold", "cats", "topk", "teal"])
def test_captured_on_a_gpu(name: str, dtype: torch.dtype, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama").to("cuda", dtype)
    plan = Plan.dense(model) if name == "dense" else policy_plan(model, name)
    ids, mask, tokens = (t.cuda() for t in (*ragged(), some_tokens(2, 300)))
    if name == "signed":
        ids, mask, tokens = ids[:1], mask[:1], tokens[:1]
    with torch.no_grad(), monkeypatch.context() as switch, coreskip.wrap(model, plan):
        switch.setenv("CORESKIP_GRAPHS", "0")
        runtime_of(model).steps.captured.forget()
        assert runtime_of(model).steps.captured.capture is None
        expected = teacher_forced(model, ids, mask, tokens, each=1)
    with torch.no_grad(), coreskip.wrap(model, plan):
        graphs = runtime_of(model).steps.captured
        if not whole:
            graphs.lowering.refuse("a test is of captured modules")
        for _ in range(2):
            found = teacher_forced(model, ids, mask, tokens, each=1)
            assert graphs.refusal is None
            assert not whole or graphs.lowering.refusal is None
            assert [c.place.capacity for c in graphs._captured] == [256, 512]
            error = (found - expected).float().square().mean().sqrt() / expected.float().std()
            assert float(error) <= (1e-3 if dtype is torch.float32 else 0.1)
        texts = [greedy(model, ids, 40, attention_mask=mask) for _ in range(2)]
        assert torch.equal(*texts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_threads_on_a_gpu() -> None:
    """Each with a capture of its own while the others prefill, replay and sample."""
    model = tiny("llama").cuda()
    prompts = [prompt(1, 9 + i, seed=i).cuda() for i in range(4)]
    expected = [greedy(model, ids, 30) for ids in prompts]
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            greedy(model, prompts[i], 30, do_sample=True)
            found[i] = greedy(model, prompts[i], 30)

    with coreskip.wrap(model, Plan.dense(model)):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert runtime_of(model).steps.captured.refusal is None
        assert runtime_of(model).steps.captured._captured
    assert all(torch.equal(found[i], wanted) for i, wanted in enumerate(expected))
