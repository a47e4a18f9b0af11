"""A model read as data, the programs that plans make of it, and what it takes to add a policy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from tiny_models import FAMILIES, greedy, prompt, tiny
from torch import nn

import coreskip
from coreskip import PlanError
from coreskip.kernels.ops import PackedMLP, available
from coreskip.kernels.sparse import SlimMLP
from coreskip.predictors import policies as registry
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import Cats, Chooser, NeuronPolicy, Sketch, Static, Teal, TopK, Wina, neuron_policy
from coreskip.predictors.sealed import seal
from coreskip.runtime import program
from coreskip.runtime.calls import NotCovered
from coreskip.runtime.cost import bytes_per_token
from coreskip.runtime.lower_cpu import lower_norm
from coreskip.runtime.norms import read_norm
from coreskip.runtime.program import BrickProgram, Program, build, builds
from coreskip.runtime.reading import read_spec
from coreskip.runtime.spec import ModelSpec, NormSpec
from coreskip.runtime.wrap import runtime_of

needs_kernels = pytest.mark.skipif(available("cpu") is not None, reason="needs the compiled kernels")


def with_policies(model: Any, *policies: NeuronPolicy) -> Plan:
    dense = Plan.dense(model)
    return replace(dense, layers=tuple(LayerPlan(policies[i % len(policies)]) for i in range(len(dense.layers))))


# ---- a policy of somebody else's ----


@pytest.fixture
def every_other() -> Iterator[type[NeuronPolicy]]:
    """One class and one builder; the registries are as before afterwards."""

    @neuron_policy
    @dataclass(frozen=True)
    class EveryOther(NeuronPolicy):
        """Every `step`-th neuron stays."""

        step: int
        name: ClassVar[str] = "every_other"
        chooser: ClassVar[Chooser] = Chooser.CALIBRATION

        def check(self, width: int, hidden: int) -> None:
            if not 1 <= self.step <= width:
                raise PlanError(f"step is {self.step}")

        def kept(self, width: int) -> int:
            return len(range(0, width, self.step))

    @builds(EveryOther)
    def _every_other(policy: EveryOther, brick: program.Brick) -> BrickProgram:
        indices, kept = torch.arange(0, brick.width, policy.step), policy.kept(brick.width)
        read = kept * (brick.scoring + 1) * brick.row
        return BrickProgram(
            policy, policy.chooser, kept, brick.width, read, pack=lambda bundles: bundles.listed(indices)
        )

    yield EveryOther
    del registry.NEURON_POLICIES["every_other"], program._BUILDERS[EveryOther]


def test_a_policy_is_one_class_and_one_builder(every_other: Any, tmp_path: Path) -> None:
    """It is checked, saved, loaded, shown, priced and decoded like the ones that are there."""
    model, ids = tiny("llama"), prompt(1)
    plan = with_policies(model, every_other(4))
    plan.save(tmp_path / "p")
    plan = Plan.load(tmp_path / "p")
    assert "every_other" in str(plan)
    assert plan.keep == 0.25
    same = with_policies(model, Static(torch.arange(0, 160, 4)))
    assert bytes_per_token(model, plan) == bytes_per_token(model, same) < bytes_per_token(model, Plan.dense(model))
    with coreskip.wrap(model, same):
        expected = greedy(model, ids, 12)
    with coreskip.wrap(model, plan):
        assert torch.equal(greedy(model, ids, 12), expected)
        assert runtime_of(model).usage.neuron_sparsity() == 0.75
        assert runtime_of(model).steps.native.ready or available("cpu") is not None
    with pytest.raises(PlanError, match="step is 0"):
        with_policies(model, every_other(0))


def test_a_policy_without_a_builder_is_refused_before_anything_is_patched(every_other: Any) -> None:
    model = tiny("llama")
    plan, builder = with_policies(model, every_other(2)), program._BUILDERS.pop(every_other)
    try:
        with pytest.raises(PlanError, match="every_other"):
            coreskip.wrap(model, plan)
        assert "forward" not in vars(model)
    finally:
        program._BUILDERS[every_other] = builder


def test_a_name_is_one_policys(every_other: Any) -> None:
    with pytest.raises(ValueError, match="'every_other' already"):
        neuron_policy(every_other)


# ---- plans of coreskip 0.1 ----


def as_saved_by_0_1(folder: Path, layers: list[dict[str, Any]]) -> None:
    """Puts neuron policies as 0.1 wrote them into a saved plan."""
    document = json.loads((folder / "plan.json").read_text())
    for entry, neurons in zip(document["layers"], layers, strict=True):
        entry["neurons"] = neurons
    (folder / "plan.json").write_bytes(seal(document))


def test_thresholds_of_0_1_are_three_policies_now(tmp_path: Path) -> None:
    model, ids = tiny("llama"), prompt(1)
    teal = {"mlp.down_proj": 0.5, "attention.q_proj": 0.25}
    plan = with_policies(model, Cats(0.5, 0.125), Teal(0.75, teal), Wina(0.5, {"mlp.up_proj": 1.5}))
    plan.save(tmp_path / "p")
    as_saved_by_0_1(
        tmp_path / "p",
        [
            {"policy": "threshold", "rule": "cats", "keep": 0.5, "least": {"act": 0.125}},
            {"policy": "threshold", "rule": "teal", "keep": 0.75, "least": teal},
            {"policy": "threshold", "rule": "wina", "keep": 0.5, "least": {"mlp.up_proj": 1.5}},
        ],
    )
    old = Plan.load(tmp_path / "p")
    assert [layer.neurons for layer in old.layers] == [layer.neurons for layer in plan.layers]
    with coreskip.wrap(model, plan):
        expected = greedy(model, ids, 12)
    with coreskip.wrap(model, old):
        assert torch.equal(greedy(model, ids, 12), expected)


@pytest.mark.parametrize(
    "neurons",
    [
        {"policy": "threshold", "rule": "magic", "keep": 0.5, "least": {"act": 1.0}},
        {"policy": "threshold", "rule": "cats", "keep": 0.5, "least": {"mlp.up_proj": 1.0}},
        {"policy": "threshold", "keep": 0.5, "least": {"act": 1.0}},
        {"policy": "threshold", "rule": "teal", "keep": 0.5, "least": 3},
    ],
)
def test_senseless_thresholds_of_0_1(tmp_path: Path, neurons: dict[str, Any]) -> None:
    plan = with_policies(tiny("llama"), Cats(0.5, 0.125))
    plan.save(tmp_path / "p")
    as_saved_by_0_1(tmp_path / "p", [neurons] * 3)
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "p")


# ---- the model as data ----


def shape_of(spec: ModelSpec) -> Any:
    """All that a spec says but for the numbers of the weights."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return tuple(value.shape), value.dtype
        if isinstance(value, nn.Module):
            return type(value).__name__
        if hasattr(value, "__dataclass_fields__"):
            return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__ if name != "feed_forward"}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    found = plain(spec)
    found.pop("embedding_scale")
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "phi3", "stablelm", "qwen3", "granite"])
def test_a_model_on_a_meta_device_reads_like_the_one_with_weights(family: str) -> None:
    model = tiny(family)
    with torch.device("meta"):
        empty = type(model)(model.config).eval()
    here, there = read_spec(model, dissect(model)), read_spec(empty, dissect(empty, empty=True))
    assert shape_of(here) == shape_of(there)
    assert there.embedding.is_meta
    assert here.embedding_scale is not None
    assert there.embedding_scale is None


def test_weights_are_referred_to_and_none_is_packed() -> None:
    model = tiny("gemma2")
    spec = read_spec(model, dissect(model))
    own = {p.data_ptr() for p in model.parameters()}
    norms = [spec.norm, *(layer.attention_in for layer in spec.layers)]
    assert {norm.weight.data_ptr() for norm in norms} <= own
    assert {linear.module.weight.data_ptr() for linear in spec.linears} <= own


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_norms_are_what_their_modules_compute(family: str) -> None:
    model, x = tiny(family), torch.randn(5, 64) + 0.5
    norms = [m for name, m in model.named_modules() if "norm" in name.rpartition(".")[2] or "ln_" in name]
    read = 0
    for module in norms:
        try:
            spec = read_norm(module)
        except NotCovered:
            continue
        with torch.no_grad():
            if spec.weight is not None:
                module.weight.normal_()
            norm, sample = lower_norm(spec), x[:, : spec.size]
            centred = sample - sample.mean(-1, keepdim=True) if norm.kind == "layer" else sample
            got = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
            torch.testing.assert_close(got if norm.bias is None else got + norm.bias, module(sample))
        read += 1
    # OLMo's norms do not say their epsilon
    assert read >= (0 if family == "olmo" else 4)


class Twice(nn.Module):
    """No norm, though it is called one: it adds half of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) + x / 2


def test_what_is_no_norm_is_not_read_as_one() -> None:
    with pytest.raises(NotCovered, match="Twice"):
        read_norm(Twice())


def test_a_weight_may_be_an_offset_from_one() -> None:
    gemma: NormSpec = read_norm(tiny("gemma").model.norm)
    llama: NormSpec = read_norm(tiny("llama").model.norm)
    assert (gemma.slope, gemma.offset) == (1.0, 1.0)
    assert (llama.slope, llama.offset) == (1.0, 0.0)


# ---- programs ----


def test_a_program_says_what_decides_and_what_is_read() -> None:
    model = tiny("llama")
    everything = Static(torch.arange(160))
    policies = (everything, Sketch(keep=0.5), Wina(0.5, {"mlp.down_proj": 0.1}))
    made = Program.of(dissect(model), with_policies(model, *policies))
    choosers = [layer.bricks[0].chooser for layer in made.layers]
    assert choosers == [Chooser.NOTHING, Chooser.TOKEN, Chooser.INPUTS], "keeping every neuron is the dense MLP"
    dense = 160 * 3 * 64 * 4
    assert made.layers[0].bricks[0].nbytes == dense
    # high nibbles of gate and up for all, low ones and down rows for half of the neurons
    assert made.layers[1].bricks[0].nbytes == 160 * 2 * 64 / 2 + 80 * 2 * 64 / 2 + 80 * 64
    assert made.layers[2].bricks[0].nbytes == dense / 2
    assert made.native
    assert not Program.of(dissect(model), with_policies(model, TopK(keep=0.5))).native


@needs_kernels
def test_a_cost_is_that_of_what_runs() -> None:
    """The bytes that a program counts are those of the tensors that its step reads."""
    model = tiny("llama", hidden_size=128)  # whose nibbles need no padding
    sizes = dict[str, float]()
    for name, policy in {"static": Static(torch.arange(96)), "sketch": Sketch(keep=0.999)}.items():
        plan = with_policies(model, policy)
        with coreskip.wrap(model, plan):
            greedy(model, prompt(1), 3)
            mlp = runtime_of(model).prepared.mlp(0)
            if isinstance(mlp, SlimMLP):
                sizes[name] = sum(part.nbytes for part in (mlp.gate, mlp.up, mlp.down) if part is not None)
            else:
                packed = cast(PackedMLP, mlp.packed)
                sizes[name] = packed.weight.nbytes + (0 if packed.low is None else packed.low.nbytes)
        counted = build(policy, program.brick_of(dissect(model), 0)).nbytes
        assert counted == pytest.approx(sizes[name], rel=0.02)


def test_files_of_plans_are_sealed(tmp_path: Path) -> None:
    plan = with_policies(tiny("llama"), Static(torch.arange(0, 160, 2)))
    plan.save(tmp_path / "p")
    document = json.loads((tmp_path / "p" / "plan.json").read_text())
    data = (tmp_path / "p" / "plan.safetensors").read_bytes()
    assert document["tensors_sha256"] == hashlib.sha256(data).hexdigest()
    assert seal(document) == (tmp_path / "p" / "plan.json").read_bytes()
