"""Parts of a wrapped model: their copies, and the hooks that are set on them at any moment."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import greedy, plan_of, prompt, tiny
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import coreskip
from coreskip import CoreskipError, Plan
from coreskip.kernels import watch
from coreskip.kernels.ops import available
from coreskip.runtime.wrap import runtime_of

pytestmark = pytest.mark.skipif(available("cpu") is not None, reason="needs the compiled kernels")


def saved(part: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(part, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda part: pickle.loads(pickle.dumps(part)),
    "save": saved,
}
PARTS = ("model", "model.layers.1", "model.layers.1.mlp", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn",
         "model.layers.1.mlp.act_fn", "model.norm", "model.rotary_emb", "lm_head")  # fmt: skip


def plain(part: nn.Module, twin: nn.Module) -> None:
    for mine, other in zip(part.modules(), twin.modules(), strict=True):
        assert type(mine) is type(other)
        assert list(vars(mine)) == list(vars(other))
        for name, value in vars(mine).items():
            assert type(value) is type(vars(other)[name]), name


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("exact", [False, True])
def test_a_copied_part_is_a_plain_one(kind: str, exact: bool) -> None:
    model, ids = tiny("llama"), prompt(1)
    twin = copy.deepcopy(model)
    with coreskip.wrap(model, plan_of(model, "static"), exact=exact):
        greedy(model, ids)
        for name in PARTS:
            part = COPIES[kind](model.get_submodule(name))
            plain(part, twin.get_submodule(name))
            with torch.no_grad():
                for parameter in part.parameters():
                    parameter.zero_()
        part = COPIES[kind](model.model)
        with torch.no_grad():
            assert torch.equal(part(ids).last_hidden_state, twin.model(ids).last_hidden_state)
            for parameter in part.parameters():
                parameter.zero_()
            assert not part(ids).last_hidden_state.any()
            assert model.model(ids).last_hidden_state.any()
    plain(model, twin)


@pytest.mark.parametrize("family", ["opt", "bloom", "gpt2"])
def test_a_copied_part_of_an_mlp_without_a_module_of_its_own(family: str) -> None:
    model, ids = tiny(family), prompt(1)
    twin = copy.deepcopy(model)
    with torch.no_grad(), coreskip.wrap(model, plan_of(model, "static")):
        greedy(model, ids, 4)
        part = copy.deepcopy(model.base_model)
        plain(part, twin.base_model)
        cache = DynamicCache(config=model.config)
        part(ids, past_key_values=cache)
        for parameter in part.parameters():
            parameter.zero_()
        assert not part(ids[:, :1], past_key_values=cache).last_hidden_state.any()


def test_a_shallow_copy_has_no_patches_of_its_own() -> None:
    model = tiny("llama")
    with coreskip.wrap(model, plan_of(model, "static")):
        part = copy.copy(model.model.layers[0].mlp)
        part.up_proj = nn.Identity()
        assert "forward" not in vars(part)
        assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)


def test_a_part_whose_weights_are_packed_alone_cannot_be_copied() -> None:
    model = tiny("llama")
    coreskip.wrap(model, Plan.dense(model, weights="int8"), keep_originals=False)
    for of_kind in (copy.copy, *COPIES.values()):
        with pytest.raises(CoreskipError, match="load the model again"):
            of_kind(model.model.layers[0].mlp)
    copy.deepcopy(model.model.norm)


def test_weights_that_are_packed_alone_cannot_be_written_to() -> None:
    model, ids = tiny("llama"), prompt(1)
    coreskip.wrap(model, Plan.dense(model, weights="int8"), keep_originals=False)
    with pytest.raises(CoreskipError, match="cannot resize its embeddings"):
        model.resize_token_embeddings(140)
    greedy(model, ids, 4)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    for _ in range(2):
        with pytest.raises(CoreskipError, match="cannot write to its weights"):
            greedy(model, ids, 4)


# ---- hooks ----


def test_hooks_between_two_turns_on_one_cache() -> None:
    model, calls = tiny("llama"), list[int]()
    with torch.no_grad(), coreskip.wrap(model, Plan.dense(model)):
        cache = DynamicCache(config=model.config)
        first = greedy(model, prompt(1), 6, past_key_values=cache)
        handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
        second = greedy(model, torch.cat([first, prompt(1, 3)], 1), 6, past_key_values=cache)
        assert len(calls) == 6
        handle.remove()
        greedy(model, torch.cat([second, prompt(1, 3)], 1), 6, past_key_values=cache)
        assert len(calls) == 6
        with register_module_forward_hook(lambda module, *_: calls.append(1) if module is model.lm_head else None):
            greedy(model, prompt(1), 6)
        assert len(calls) == 12


class Acting(BaseStreamer):
    """Does something when the fourth token of a text comes."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self._act, self._seen = act, 0

    def put(self, value: torch.Tensor) -> None:
        self._seen += 1  # the prompt is the first
        if self._seen == 5:
            self._act()

    def end(self) -> None: ...

    def processor(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.put(ids)
        return scores

    def criterion(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.put(ids)
        return torch.zeros(ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("way", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize("what", ["hook", "write", "replace"])
def test_changes_in_the_middle_of_a_generation(way: str, what: str) -> None:
    wrapped, twin, ids = tiny("llama"), tiny("llama"), prompt(1)
    counts = []

    def run(model: Any) -> torch.Tensor:
        calls: list[int] = []
        mlp = model.model.layers[1].mlp

        def act() -> None:
            if what == "hook":
                mlp.register_forward_hook(lambda *_: calls.append(1))
            elif what == "write":
                with torch.inference_mode(False), torch.no_grad():
                    mlp.down_proj.weight.mul_(-2)
                    model.model.norm.weight.mul_(0.5)
            else:
                mlp.up_proj = nn.Sequential(mlp.up_proj, nn.Hardtanh())

        acting = Acting(act)
        found = {"logits_processor": [acting.processor], "stopping_criteria": [acting.criterion]}
        text = greedy(model, ids, 12, **{way: found[way]})
        counts.append(len(calls))
        return text

    with coreskip.wrap(wrapped, Plan.dense(wrapped)):
        greedy(wrapped, ids, 8)
        assert torch.equal(run(wrapped), run(twin))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("options", [{"exact": True}, {"lookup": True}])
def test_a_generation_with_drafts_goes_on_when_hooks_come(options: dict[str, bool]) -> None:
    model, twin = tiny("llama"), tiny("llama")
    ids, calls = prompt(1, 6).repeat(1, 4), list[int]()
    with coreskip.wrap(model, plan_of(model, "static") if "exact" in options else Plan.dense(model), **options):
        greedy(model, ids, 24)
        acting = Acting(lambda: model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1)))
        assert torch.equal(greedy(model, ids, 24, streamer=acting), greedy(twin, ids, 24))
    assert calls


# ---- what tells ----


@pytest.mark.parametrize("native", [True, False])
def test_a_watch_sees_every_write(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(watch, "_layout", lambda: None)
    else:
        assert watch._layout() is not None, "where torch keeps its counters was not found"
    tensors = [torch.randn(5, 7), nn.Parameter(torch.randn(3)), torch.randn(64, 64).bfloat16(), torch.randn(1)]
    tensors += [torch.empty(3, device="meta"), torch.empty(0), torch.randn(6, 4).t()]

    def replaced(t: torch.Tensor) -> None:
        t.data = t.data.clone()

    with torch.no_grad():
        for index, change in [
            (0, lambda t: t.mul_(2)),
            (1, lambda t: t.detach()[1:2].zero_()),
            (2, lambda t: t[3].add_(1)),
            (6, lambda t: t.t().mul_(2)),
            (4, lambda t: t.mul_(2)),
            *((index, replaced) for index in (0, 1, 2, 3, 6)),
            (1, lambda t: setattr(t, "data", t.data.half())),
            *([(0, lambda t: t.data.add_(1)), (2, lambda t: t.data.mul_(2))] if native else []),
        ]:
            watched = watch.Watch(tensors)
            assert not watched.changed()
            assert watched.which() == []
            change(tensors[index])
            assert watched.changed()
            assert [t is tensors[index] for t in watched.which()] == [True]


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 0.4


class Counting(nn.SiLU):
    """Assigns an attribute in every pass, which is no change of the model."""

    calls = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(input)


def test_another_class_after_the_first_step() -> None:
    model, twin, ids = tiny("llama"), tiny("llama"), prompt(1)
    with coreskip.wrap(model, Plan.dense(model)):
        greedy(model, ids, 8)
        for each in (model, twin):
            each.model.layers[0].mlp.up_proj.__class__ = Scaled
        assert torch.equal(greedy(model, ids, 12), greedy(twin, ids, 12))


def test_a_cast_to_float64_after_the_first_step() -> None:
    model, twin, ids = tiny("llama"), tiny("llama"), prompt(1)
    with coreskip.wrap(model, Plan.dense(model)):
        greedy(model, ids, 8)
        assert torch.equal(greedy(model.double(), ids, 12), greedy(twin.double(), ids, 12))
        model.float()


def test_parts_that_write_to_themselves_are_still_watched() -> None:
    model, twin, ids = tiny("llama"), tiny("llama"), prompt(1)
    for each in (model, twin):
        each.model.layers[1].mlp.act_fn = Counting()
    with coreskip.wrap(model, Plan.dense(model)):
        for _ in range(2):
            assert torch.equal(greedy(model, ids, 8), greedy(twin, ids, 8))
        known = runtime_of(model).steps.native._state
        greedy(model, ids, 8)
        assert runtime_of(model).steps.native._state is known
        for each in (model, twin):
            each.model.layers[1].mlp.act_fn.register_forward_hook(lambda module, args, output: output * 0)
        assert torch.equal(greedy(model, ids, 8), greedy(twin, ids, 8))


def test_steps_are_native_again_after_a_change_without_originals() -> None:
    model, ids = tiny("llama"), prompt(1)
    coreskip.wrap(model, Plan.dense(model, weights="int4"), keep_originals=False)
    greedy(model, ids, 8)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    greedy(model, ids, 8)
    assert runtime_of(model).steps.native.ready
    assert runtime_of(model).steps.native.refusal is None


def test_a_copied_cache_decodes_with_the_new_weights() -> None:
    model, ids, token = tiny("llama"), prompt(1), torch.tensor([[7]])
    with torch.no_grad(), coreskip.wrap(model, plan_of(model, "griffin")):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        model(token, past_key_values=cache)
        twin = copy.deepcopy(cache)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(-1)
        expected = model(token, past_key_values=cache).logits
        torch.testing.assert_close(model(token, past_key_values=twin).logits, expected)
