"""Neurons and experts that each token chooses, under a cap on memory: the same text, and what is read for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from packed_models import tokenizer
from tiny_models import greedy, prompt, tiny

import coreskip
from coreskip import CoreskipError
from coreskip.kernels import files, ops, slots
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import Cats, Learned, NeuronPolicy, Sketch, Teal, TopK
from coreskip.runtime import memory
from coreskip.runtime.native_prompts import NativePrompts
from coreskip.runtime.packed_folder import WEIGHTS
from coreskip.runtime.wrap import runtime_of

NO_LIBRARY = ops.available("cpu")
pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))

HIDDEN, NEURONS = 256, 1024
POLICIES: dict[str, Callable[[], NeuronPolicy]] = {
    "sketch": lambda: Sketch(keep=0.3),
    "refined": lambda: Sketch(keep=0.3, threshold=0.0005, refine=0.001, candidates=0.5),
    "cats": lambda: Cats(keep=0.5, threshold=0.02),
    "learned": lambda: Learned(
        keep=0.3, reduce=torch.ones(8, HIDDEN), expand=torch.linspace(-1, 1, 8 * NEURONS).reshape(NEURONS, 8),
        bias=torch.zeros(NEURONS),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny matrices in several pieces; prompts on the modules, as they are under a cap."""
    monkeypatch.setattr(memory, "_LEAST_PIECE", 2 * files.PAGE)
    monkeypatch.setattr(NativePrompts, "forward", lambda *_: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("packed") / "p"
    model = tiny("llama", hidden_size=HIDDEN, intermediate_size=NEURONS)
    return coreskip.pack(model, tokenizer(), target, weights="bfloat16", progress=False)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("packed") / "m"
    return coreskip.pack(tiny("qwen2_moe"), tokenizer(), target, weights="int8", progress=False)


def plan_of(model: Any, policy: NeuronPolicy) -> Plan:
    dense = Plan.dense(model)
    return replace(dense, layers=tuple(LayerPlan(policy) for _ in dense.layers), recipe={"method": policy.name})


def least(model: Any, plan: Plan | None = None) -> int:
    with pytest.raises(CoreskipError, match="needs at least") as error:
        coreskip.wrap(model, plan, memory="1KB")
    return int(float(str(error.value).split("needs at least ")[1].split(" MB")[0]) * 1e6) + 100_000


@torch.no_grad()
def run(folder: Path, plan: Callable[[Any], Plan | None], share: float | None, ids: torch.Tensor, new: int = 10) -> Any:
    """The text, and what slots have done; share: of the file that there is room for beside what is needed; None: no
    cap."""
    model, _ = coreskip.load(folder)
    made = plan(model)
    cap = None if share is None else least(model, made) + int(share * os.path.getsize(folder / WEIGHTS))
    with coreskip.wrap(model, made, memory=cap):
        text = greedy(model, ids, new)
        found = runtime_of(model)
        assert found.steps.native.ready
        if share is None:
            return text, {}
        assert isinstance(found.memory, memory.Capped)
        held = found.memory.residency.slots
        assert held is not None
        assert found.memory.kept_bytes + held.nbytes + found.memory.needs.always - found.memory.needs.slots <= cap
        return text, {**held.figures(), "bytes": held.nbytes}


@pytest.mark.parametrize("kind", POLICIES)
def test_the_same_text_from_neurons_that_are_read_when_they_are_chosen(kind: str, folder: Path) -> None:
    ids = prompt(2, 7)

    def plan(model: Any) -> Plan:
        return plan_of(model, POLICIES[kind]())

    expected, _ = run(folder, plan, None, ids)
    text, tight = run(folder, plan, 0.0, ids)
    assert torch.equal(text, expected)
    assert 0 < tight["missed"] < tight["wanted"]
    assert tight["read_bytes"] > 0
    assert (tight["expected"] > 0) is (kind != "learned")


def test_without_reading_ahead_and_by_least_recent_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, plan = prompt(1, 9), lambda model: plan_of(model, Sketch(keep=0.3))
    text, ahead = run(folder, plan, 0.0, ids)
    monkeypatch.setattr(slots, "AHEAD", False)
    monkeypatch.setattr(slots, "HALF_LIFE", 0.0)
    same, waiting = run(folder, plan, 0.0, ids)
    assert torch.equal(text, same)
    assert waiting["expected"] == 0
    assert waiting["missed"] > ahead["missed"]


@pytest.mark.parametrize("policy", [TopK(keep=0.5), Teal(keep=0.5, thresholds={"mlp.up_proj": 0.1})])
def test_what_cannot_be_read_by_neuron_is_refused(policy: NeuronPolicy, folder: Path) -> None:
    model, _ = coreskip.load(folder)
    with pytest.raises(CoreskipError, match="is read by neuron for sketches of 4 bits"):
        coreskip.wrap(model, plan_of(model, policy), memory="100MB")


def test_experts(mixture: Path) -> None:
    for ids in (prompt(1, 9), prompt(3, 5)):
        expected, _ = run(mixture, lambda _: None, None, ids)
        text, tight = run(mixture, lambda _: None, 0.3, ids)
        assert torch.equal(text, expected)
        assert 0 < tight["missed"] < tight["wanted"]


def test_experts_that_stay_are_not_read_again(mixture: Path) -> None:
    ids = prompt(1, 9)
    _, short = run(mixture, lambda _: None, 0.3, ids, 4)
    _, long = run(mixture, lambda _: None, 0.3, ids, 24)
    assert long["wanted"] > 2 * short["wanted"]
    assert long["read_bytes"] < 2 * short["read_bytes"]


@torch.no_grad()
def test_a_mixture_that_is_truncated_meanwhile(mixture: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mixture, tmp_path / "m"))
    model, _ = coreskip.load(folder)
    with coreskip.wrap(model, memory=least(model)):
        greedy(model, prompt(1, 9), 4)
        os.truncate(folder / WEIGHTS, os.path.getsize(folder / WEIGHTS) // 2)
        with pytest.raises(CoreskipError, match="cannot read the weights any more"):
            greedy(model, prompt(1, 9), 20)


@torch.no_grad()
def test_what_the_last_step_read_from_goes_before_others_come(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 3B shape was killed: 0.7 GB of slots were held by the stream that had read last, while its head came."""
    model, _ = coreskip.load(folder)
    plan, filling, alive = plan_of(model, Sketch(keep=0.3)), memory.Capped._fill, list[int]()
    made = WeakSet[slots.Native]()
    native = slots.Slots.native

    def watched(self: Any) -> slots.Native:
        found = native(self)
        made.add(found)
        return found

    def fill(self: Any, room: int) -> None:
        keep = self.residency.keep

        def kept(name: str) -> None:
            alive.append(sum(some.memory.numel() for some in made))
            keep(name)

        with monkeypatch.context() as here:
            here.setattr(self.residency, "keep", kept)
            filling(self, room)

    monkeypatch.setattr(slots.Slots, "native", watched)
    monkeypatch.setattr(memory.Capped, "_fill", fill)
    with coreskip.wrap(model, plan, memory=least(model, plan)):
        held = runtime_of(model).memory
        assert isinstance(held, memory.Capped)
        cap, every = held.cap, held.kept_bytes + held.streamed_bytes
        monkeypatch.setattr(held, "_step", 1)
        held.cap -= held._room(held.needs.of_text(1, *memory._SHORT)) - (every - files.PAGE)  # one does not fit
        greedy(model, prompt(1, 9), 4)
        before = held.kept_bytes
        assert held.streamed_bytes > 0  # the stream that reads these held the slots
        assert sum(some.memory.numel() for some in made) > held.needs.slots + files.PAGE
        alive.clear()
        held.cap = cap
        held.fill_up()
        assert held.kept_bytes > before
        assert alive
        assert max(alive) <= held.needs.slots
