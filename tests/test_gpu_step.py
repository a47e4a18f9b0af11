"""The decode step of a GPU lowered as a whole: the model's own logits, whatever the family, plan and format.

There is no GPU here. The definitions of the kernels run on CPU tensors; `Recorded` stands in for a CUDA graph where it
matters that nothing is read back, and Triton's interpreter runs the kernels themselves for a few tokens.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_sweep import judge
from test_decode import ragged, some_tokens, teacher_forced
from test_experts_native import with_experts
from test_graph import Recorded, alike, captured, close, modules_logits, policy_plan, talk
from test_policies import NAMES
from tiny_models import EXPERTS, FAMILIES, greedy, plan_of, prompt, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from triton_process import scripts

import coreskip
from coreskip.kernels import gpu_step, ops
from coreskip.predictors.errors import CoreskipError
from coreskip.predictors.expert_policies import CoreExperts, ThinExperts
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import Skip, SkipAttention, SkipMLP, Static
from coreskip.runtime import bundles, gpu_matrices, lower_gpu, selfcheck
from coreskip.runtime.gpu_lowering import GpuStep
from coreskip.runtime.wrap import runtime_of

COVERED = sorted(FAMILIES.keys() - {"falcon_new"})  # whose fused projection is not described, for a CPU neither


def as_it_is(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """In place of a graph: the step itself."""
    return step


@contextmanager
def lowered(model: Any, plan: Plan | None = None, **options: Any) -> Iterator[lower_gpu.CapturedSteps]:
    """The model wrapped, with steps lowered as a whole, which have to have been used."""
    with captured(model, plan, lowered=True, **options) as graphs:
        graphs.capture = as_it_is
        yield graphs
        assert graphs.lowering.refusal is None
        assert graphs.refusal is None
        steps = [graph.step for held in graphs._captured for graph in held.graphs.values()]
        assert steps
        assert all(isinstance(step, GpuStep) for step in steps)


@pytest.fixture(autouse=True)
def _through_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_is_plain", lambda x: False)
    monkeypatch.setattr(bundles, "slimmed", lambda *arguments: None)  # which is a CPU's way


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans' formats are those of a GPU."""
    monkeypatch.setattr(gpu_matrices, "packs_for", lambda model: True)


def all_at_once(judge: Any, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """Logits of `tokens` after each row's text, unpadded, from one pass."""
    logits = []
    for row in range(ids.shape[0]):
        text = torch.cat([ids[row : row + 1, int((mask[row] == 0).sum()) :], tokens[row : row + 1]], 1)
        logits.append(judge(text).logits[:, -tokens.shape[1] :])
    return torch.cat(logits)


@pytest.mark.parametrize("family", COVERED)
def test_two_hundred_steps_from_ragged_prompts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the capacity grows. Closer than twice the modules' own distance from float64, and of the same tokens."""
    monkeypatch.setattr(lower_gpu, "_LEAST", 64)
    model = tiny(family)
    ids, mask = ragged()
    tokens = some_tokens(2, 200)
    with torch.no_grad():
        exact = all_at_once(copy.deepcopy(model).double(), ids, mask, tokens)
        usual = (all_at_once(model, ids, mask, tokens) - exact).abs().max()
        with lowered(model) as graphs:
            logits = teacher_forced(model, ids, mask, tokens, each=1)
            assert [held.place.capacity for held in graphs._captured] == [64, 128, 256]
    assert (logits - exact).abs().max() <= 2 * usual + 2e-6 * exact.abs().max()
    assert torch.equal(logits.argmax(-1), exact.argmax(-1))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon", "bloom", "cohere"])
def test_recorded_steps_of_several_tokens_and_the_same_bits_twice(family: str) -> None:
    model = tiny(family)
    arguments = (*ragged(), some_tokens(2, 24))
    expected = modules_logits(model, Plan.dense(model), *arguments)
    with torch.no_grad(), lowered(model) as graphs:
        graphs.capture = Recorded
        for each in (1, 3, 4):
            found = [teacher_forced(model, *arguments, each=each) for _ in range(2)]
            assert torch.equal(*found)
            close(found[0], expected)
        (held,) = graphs._captured
        assert sorted(key[2] for key in held.graphs) == [1, 4]


def test_eight_rows_are_what_each_is_alone() -> None:
    model = tiny("llama")
    ids, tokens = torch.cat([prompt(1, seed=seed) for seed in range(8)]), some_tokens(8, 6)
    mask = torch.ones_like(ids)
    with torch.no_grad(), lowered(model) as graphs:
        for rows in (8, 5, 1):
            found = teacher_forced(model, ids[:rows], mask[:rows], tokens[:rows], each=1)
            close(found, all_at_once(model, ids[:rows], mask[:rows], tokens[:rows]))
        assert [held.place.rows for held in graphs._captured] == [8, 5, 1]


@pytest.mark.parametrize("name", ["static", "signed", "griffin", *NAMES])
def test_policies_choose_without_the_host(name: str) -> None:
    model = tiny("llama_bias" if name == "teal_all" else "llama")
    plan = plan_of(model, name) if name == "griffin" else policy_plan(model, name)
    ids, mask = ragged()
    alone = name in ("signed", "griffin")
    arguments = (ids[:1], mask[:1], some_tokens(1, 20)) if alone else (ids, mask, some_tokens(2, 20))
    expected = modules_logits(model, plan, *arguments)
    with torch.no_grad(), lowered(model, plan) as graphs:
        graphs.capture = Recorded
        alike(teacher_forced(model, *arguments, each=1), expected)
        usage = runtime_of(model).usage
        assert abs(usage.neuron_sparsity() - 0.5) < 0.2


@pytest.mark.parametrize(
    ("family", "name"),
    [("bloom", "sketch_threshold"), ("gpt_neox", "teal_all"), ("falcon", "wina"), ("gemma2", "int4"), ("opt", "topk")],
)
def test_steps_are_their_definitions_in_float64(family: str, name: str) -> None:
    """A few of all families and policies, for a few tokens: `make test-gpu-steps` has the others, for 200."""
    verdict = judge(family, name, 20)
    assert verdict.way == "step"
    assert verdict.ok, verdict


@pytest.mark.parametrize("policy", [Skip(), SkipAttention(), SkipMLP()])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "gpt_neox"])
def test_layers_are_skipped(family: str, policy: Any) -> None:
    model = tiny(family)
    plan = Plan.dense(model)
    plan = replace(plan, layers=(plan.layers[0], LayerPlan(plan.layers[1].neurons, policy), plan.layers[2]))
    arguments = (*ragged(), some_tokens(2, 12))
    expected = modules_logits(model, plan, *arguments)
    with torch.no_grad(), lowered(model, plan):
        close(teacher_forced(model, *arguments, each=1), expected)


def test_another_prompts_neurons_need_no_other_graph(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    plan = plan_of(model, "griffin")
    prompts = [prompt(1, seed=seed) for seed in range(3)]
    tokens, mask = some_tokens(1, 6), torch.ones_like(prompts[0])
    expected = [modules_logits(model, plan, ids, mask, tokens) for ids in prompts]
    assert not torch.allclose(expected[0], expected[1], atol=0.1)
    with torch.no_grad(), lowered(model, plan) as graphs:
        graphs.capture = Recorded
        for ids, logits in zip(prompts, expected, strict=True):
            close(teacher_forced(model, ids, mask, tokens, each=1), logits)
        (held,) = graphs._captured
        assert len(held.graphs) == 1


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_turns_beams_and_copies_of_a_cache(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_gpu, "_LEAST", 16)
    model = tiny(family)
    expected, beams = talk(model), greedy(model, prompt(1), 12, num_beams=3, use_cache=False)
    tokens, mask = some_tokens(1, 12), torch.ones_like(prompt(1))
    with torch.no_grad(), lowered(model) as graphs:
        graphs.capture = Recorded
        for found, wanted in zip(talk(model), expected, strict=True):
            assert torch.equal(found, wanted)
        assert torch.equal(greedy(model, prompt(1), 12, num_beams=3), beams)
        reference = all_at_once(model, prompt(1), mask, tokens)
        cache = DynamicCache(config=model.config)
        model(prompt(1), past_key_values=cache)
        cache.activate_past_recording()
        close(model(tokens[:, :4], past_key_values=cache).logits, reference[:, :4])
        twin = copy.deepcopy(cache)
        cache.crop(-2)
        close(model(tokens[:, 2:5], past_key_values=cache).logits, reference[:, 2:5])
        close(model(tokens[:, 4:8], past_key_values=twin).logits, reference[:, 4:8])
        close(model(tokens[:, 5:6], past_key_values=cache).logits, reference[:, 5:6])


def test_greedy_tokens_are_made_several_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny("llama"), list[int]()
    expected = greedy(model, prompt(1), 40)
    with lowered(model) as graphs:
        graphs.capture = Recorded
        greedy(model, prompt(1), 4)
        original = graphs.greedy

        def spy(*arguments: Any) -> list[int]:
            tokens = original(*arguments)
            made.append(len(tokens))
            return tokens

        monkeypatch.setattr(graphs, "greedy", spy)
        assert torch.equal(greedy(model, prompt(1), 40), expected)
        assert max(made) == 8


@pytest.mark.parametrize("options", [{"exact": True}, {"lookup": True}])
def test_drafts_and_verification_are_captured(options: dict[str, bool]) -> None:
    model, ids = tiny("llama"), prompt(1).repeat(1, 3)
    plan = plan_of(model, "static", keep=0.9) if "exact" in options else Plan.dense(model)
    expected = greedy(model, ids, 60)
    with lowered(model, plan, **options) as graphs:
        graphs.capture = Recorded
        for _ in range(2):
            assert torch.equal(greedy(model, ids, 60), expected)
        runtime = runtime_of(model)
        drafter = runtime.exact or runtime.lookup
        assert drafter is not None
        assert drafter.last is not None
        assert drafter.last.passes < 60  # several tokens of a pass were accepted
        keys = [key for held in graphs._captured for key in held.graphs]
        assert max(key[2] for key in keys) == 8  # tokens of a verification


# ---- weights of 4 and 8 bits ----


@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("family", ["llama", "llama_bias", "phi3", "gpt2", "falcon", "gemma2"])
def test_groups_are_those_of_a_cpu(family: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which reads the same numbers, in another order of sums: inputs may round otherwise by a step."""
    model, arguments = tiny(family), (*ragged(), some_tokens(2, 12))
    plan = Plan.dense(model, weights)
    with torch.no_grad(), coreskip.wrap(tiny(family), plan) as other:
        expected = teacher_forced(other, *arguments, each=1)
    monkeypatch.setattr(gpu_matrices, "packs_for", lambda model: True)
    left = [p.shape for name, p in model.named_parameters() if p.ndim == 2 and "embed" in name]
    with torch.no_grad():
        coreskip.wrap(model, plan, keep_originals=False)  # for good: the matrices go
        graphs = runtime_of(model).steps.captured
        graphs.capture = Recorded
        alike(teacher_forced(model, *arguments, each=1), expected)
        assert graphs.lowering.refusal is None
        if family in ("gpt2", "falcon"):  # whose linears are of a class that keeps its matrix
            return
        assert [p.shape for p in model.parameters() if p.ndim == 2 and not p.is_meta] == left
        with pytest.raises(CoreskipError, match="replaced the model's own"):
            coreskip.unwrap(model)


@pytest.mark.usefixtures("on_gpu")
def test_bytes_of_a_model_in_four_bits() -> None:
    """5 bits a weight, and 9 of the LM head: what a step reads."""
    model = tiny("llama")
    coreskip.wrap(model, Plan.dense(model, "int4"), keep_originals=False)
    (lowered,) = runtime_of(model).steps.captured.lowering._models.values()
    of_layers = 3 * (64 * (64 + 64) + 64 * 64 + 3 * 64 * 160)
    assert lowered.nbytes == of_layers * 20 // 32 + 64 * 128 * 36 // 32


def static(model: Any, weights: str | None, kept: Tensor) -> Plan:
    dense = Plan.dense(model, weights)
    return replace(dense, layers=tuple(LayerPlan(Static(kept)) for _ in dense.layers))


def test_kept_neurons_of_whole_groups_are_those_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments = tiny("llama"), (*ragged(), some_tokens(2, 12))
    plan = static(model, "int4", torch.arange(96))  # which lie first as it is: groups stay what they were
    with torch.no_grad(), coreskip.wrap(tiny("llama"), plan) as other:
        expected = teacher_forced(other, *arguments, each=1)
    monkeypatch.setattr(gpu_matrices, "packs_for", lambda model: True)
    with torch.no_grad(), lowered(model, plan):
        alike(teacher_forced(model, *arguments, each=1), expected)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("keep_originals", [None, False])
@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("family", ["llama", "phi3", "nemotron_relu2", "llama_bias"])
def test_kept_neurons_lie_first(family: str, weights: str, keep_originals: bool | None) -> None:
    """A static plan's: a prefix of the packed matrices, which prompts read whole. (Where gate and up have biases they
    stay where they are, and are read by list.) What comes out is what the numbers stand for, but for rounded inputs."""
    kept, arguments = torch.arange(1, 160, 2), (*ragged(), some_tokens(2, 12))
    model = tiny(family)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        coreskip.wrap(model, static(model, weights, kept), keep_originals=keep_originals)
        runtime = runtime_of(model)
        runtime.steps.native._state.refusal = "modules are to compute"
        by_modules = teacher_forced(model, *arguments, each=1)
        runtime.steps.captured.capture = Recorded
        found = teacher_forced(model, *arguments, each=1)
        alike(found, by_modules)
        assert runtime.steps.captured.lowering.refusal is None
        assert runtime.usage.neuron_sparsity() == 0.5
        assert bool(runtime.formats.kept) == (family != "llama_bias")
        back = torch.cat([kept, torch.arange(0, 160, 2)]).argsort()
        names = {module: name for name, module in model.named_modules()}
        for module, parts in runtime.formats._matrices.items():
            weight = torch.cat([part.floats() for part in parts])
            if family != "llama_bias" and ".mlp." in names[module]:
                halves = weight.split(160) if weight.shape[0] % 160 == 0 else [weight[:, back]]
                weight = torch.cat([half[back] for half in halves]) if len(halves) * 160 == len(weight) else halves[0]
            plain.get_submodule(names[module]).weight.copy_(weight)
        with coreskip.wrap(plain, static(plain, None, kept)):
            expected = teacher_forced(plain, *arguments, each=1)
    assert (found - expected).norm() <= 0.1 * expected.norm()  # inputs in 8 bits; other neurons: 0.5 and more


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("family", ["llama", "nemotron_relu2"])
def test_neurons_that_a_prompt_chose_in_four_bits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny(family), prompt(1)
    plan = replace(plan_of(model, "griffin"), weights="int4")
    arguments = (ids, torch.ones_like(ids), some_tokens(1, 12))
    with torch.no_grad():
        monkeypatch.setattr(gpu_matrices, "packs_for", lambda model: False)
        with coreskip.wrap(tiny(family), plan) as other:
            expected = teacher_forced(other, *arguments, each=1)
        monkeypatch.setattr(gpu_matrices, "packs_for", lambda model: True)
        coreskip.wrap(model, plan, keep_originals=False)
        graphs = runtime_of(model).steps.captured
        graphs.capture = Recorded
        alike(teacher_forced(model, *arguments, each=1), expected)
        assert graphs.lowering.refusal is None
        assert [key[0] for held in graphs._captured for key in held.graphs] == ["step"]


@pytest.mark.usefixtures("on_gpu")
def test_what_a_gpu_has_no_format_for_is_said() -> None:
    model = tiny("llama")
    for name in ("cats", "topk_threshold"):
        plan = replace(policy_plan(model, name), weights="int8")
        with pytest.raises(CoreskipError, match="a GPU chooses neurons token by token among 16-bit weights alone"):
            coreskip.wrap(model, plan)


# ---- what is not covered, and what a step costs ----


def test_what_is_not_lowered_is_said_once_and_its_modules_are_captured(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("falcon_new")
    expected = greedy(model, prompt(1), 8)
    with captured(model, lowered=True) as graphs, caplog.at_level(logging.DEBUG, "coreskip"):
        for _ in range(2):
            assert torch.equal(greedy(model, prompt(1), 8), expected)
        assert graphs.lowering.refusal == "a fused projection does not hold q, k and v"
        assert [key[0] for held in graphs._captured for key in held.graphs] == ["modules"]
    said = [record.message for record in caplog.records if "not lowered as a whole" in record.message]
    assert len(said) == 1
    assert said[0].endswith(graphs.lowering.refusal)
    normed = tiny("bitnet")
    with captured(normed, lowered=True) as graphs:
        greedy(normed, prompt(1), 4)
        assert "norms stand inside" in str(graphs.lowering.refusal)


@pytest.mark.parametrize("probed", [True, False])
def test_positions_that_a_text_comes_to_later(probed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4 attends within chunks of 64 positions, which nothing before the 65th tells: it is seen by a look ahead
    or, without it, where the configuration names a position."""
    model = tiny("llama4")
    arguments = (*ragged(), some_tokens(2, 80))
    with torch.no_grad():
        expected = teacher_forced(model, *arguments, each=1)
        if not probed:
            monkeypatch.setattr(lower_gpu, "check_elsewhere", lambda *arguments: None)
            monkeypatch.setattr(selfcheck, "KEYS", 16)
        with captured(model, lowered=True) as graphs:
            close(teacher_forced(model, *arguments, each=1), expected)
            reason = str(graphs.lowering.refusal)
            assert reason.startswith("at other positions" if probed else "its logits differ"), reason
            assert graphs.refusal == "its layers attend within chunks of positions"


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2_moe", "skip_experts"), ("gpt_oss", "kept_experts"), ("glm4_moe", "dense"), ("mixtral", "core_experts"),
        ("deepseek_v2", "skip_experts"), ("deepseek_v3", "dense"), ("deepseek_v2", "int4"),
    ],
)  # fmt: skip
def test_mixtures_of_experts_and_latents(family: str, name: str) -> None:
    verdict = judge(family, name, 20)
    assert verdict.way == "step"
    assert verdict.ok, verdict


def test_another_prompts_experts_need_no_other_graph() -> None:
    model = tiny("mixtral")
    plan = with_experts(model, CoreExperts(3))
    tokens, expected, logits = some_tokens(1, 6), list[Tensor](), list[Tensor]()
    prompts = [prompt(1, seed=seed) for seed in range(3)]
    mask = torch.ones_like(prompts[0])
    with torch.no_grad(), coreskip.wrap(model, plan):
        runtime_of(model).steps.native._state.refusal = "the native step is left out here"
        expected = [teacher_forced(model, ids, mask, tokens, each=1) for ids in prompts]
    assert not torch.allclose(expected[0], expected[1], atol=0.1)
    with torch.no_grad(), lowered(model, plan) as graphs:
        graphs.capture = Recorded
        logits = [teacher_forced(model, ids, mask, tokens, each=1) for ids in prompts]
        (held,) = graphs._captured
        assert len(held.graphs) == 1
    for found, wanted in zip(logits, expected, strict=True):
        close(found, wanted)


def test_neurons_of_experts_are_left_out_on_the_modules() -> None:
    model = tiny("mixtral")
    plan = with_experts(model, ThinExperts(torch.full((8,), 0.1), 0.8))
    with captured(model, plan, lowered=True) as graphs, torch.no_grad():
        model(prompt(1, 1), past_key_values=model(prompt(1)).past_key_values)
        assert graphs.lowering.refusal is None
        program = runtime_of(model).program_for(DynamicCache(), native=False)
        assert graphs.lowering.covers(program) == "neurons of experts are left out"


def test_a_lowering_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    expected = greedy(model, prompt(1), 12)
    real = gpu_step.add_norm
    monkeypatch.setattr(gpu_step, "add_norm", lambda stream, norm, *deltas, **options: real(stream, None, **options))
    with captured(model, lowered=True) as graphs:
        assert torch.equal(greedy(model, prompt(1), 12), expected)
        assert "differ" in str(graphs.lowering.refusal)
        assert graphs.refusal is None
        assert [key[0] for held in graphs._captured for key in held.graphs] == ["modules"]


def test_new_weights_are_described_anew_and_buffers_go_with_the_wrapping() -> None:
    model, twin = tiny("llama"), tiny("llama", seed=4)
    expected = greedy(twin, prompt(1), 12)
    with lowered(model) as graphs:
        greedy(model, prompt(1), 12)
        model.load_state_dict(twin.state_dict())
        assert not graphs._captured
        graphs.capture = as_it_is  # on a GPU it stays
        assert torch.equal(greedy(model, prompt(1), 12), expected)
    gc.collect()
    del graphs


SETUP = """
import sys, torch, coreskip
import test_graph as t
import test_gpu_step as s
from coreskip.kernels import ops
from coreskip.runtime import bundles
ops._is_plain = lambda x: False
bundles.slimmed = lambda *arguments: None

def check(kind, tokens):
    "Steps by the Triton kernels, which have to agree with the modules, and twice with themselves."
    model = s.tiny("llama", num_hidden_layers=1, intermediate_size=64, hidden_size=32, head_dim=8)
    plan = t.policy_plan(model, kind)
    arguments = t.prompt(1, 2), torch.ones_like(t.prompt(1, 2)), t.some_tokens(1, tokens)
    expected = t.modules_logits(model, plan, *arguments)
    with torch.no_grad(), s.lowered(model, plan):
        found = [t.teacher_forced(model, *arguments, each=1) for _ in range(2)]
    assert torch.equal(*found)
    t.alike(found[0], expected)
"""


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Callable[[str], None]]:
    pytest.importorskip("triton", reason="Triton is not installed (the extra `gpu`)")
    with scripts(SETUP, interpreted=True) as run:
        yield run


@pytest.mark.parametrize("kind", ["teal", "sketch_refined", "learned"])
def test_policies_by_the_kernels(kind: str, interpreter: Callable[[str], None]) -> None:
    interpreter(f"check({kind!r}, 2)")


class Launched(TorchDispatchMode):
    """Counts what torch would launch on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        if not function.is_view and "empty" not in name and "view" not in name:
            self.operations[name] += 1
        return function(*args, **(kwargs or {}))


#: products with matrices of a layer in bfloat16; a predictor has two, a choice by a count computes scores before
_PRODUCTS = {"dense": 4, "teal": 4, "teal_all": 4, "wina": 4, "topk": 4, "sketch": 4, "sketch_smooth": 4, "signs": 4}
_PRODUCTS |= {"learned": 5, "bricks": 5}
LAUNCHES = [(None, kind, _PRODUCTS.get(kind, 3)) for kind in ("dense", "static", "signed", *NAMES)]
LAUNCHES += [("int4", "dense", 4), ("int4", "static", 4), ("int4", "signed", 5), ("int8", "dense", 4)]
# of a mixture that of its router (and of its shared expert's gate), two of its experts, and two of the shared one
LAUNCHES += [(None, "mixtral", 5), (None, "qwen2_moe", 7), ("int4", "mixtral", 5)]
LAUNCHES += [(None, "deepseek_v3", 10)]  # queries' latents, queries, two of heads and latents, o; five of experts


_ALL_MIXED: dict[str, Any] = {"qwen2_moe": {"mlp_only_layers": []}, "deepseek_v3": {"first_k_dense_replace": 0}}


@pytest.mark.parametrize(("weights", "kind", "products"), LAUNCHES)
def test_launches_of_a_layer(
    weights: str | None, kind: str, products: int, on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six small ones at most besides the products with matrices, and nothing that torch launches."""
    pytest.importorskip("triton", reason="Triton is not installed (the extra `gpu`)")
    from coreskip.kernels import gpu_parts

    small, found, by_torch = list[int](), list[int](), list[Counter[str]]()
    for layers in (1, 2):
        family = kind if kind in EXPERTS else "llama_bias" if kind == "teal_all" else "llama"
        model = tiny(family, num_hidden_layers=layers, **_ALL_MIXED.get(kind, {}))
        plan = Plan.dense(model) if kind == "dense" or kind in EXPERTS else policy_plan(model, kind)
        ids = prompt(1, 4)
        with torch.no_grad(), lowered(model, replace(plan, weights=weights)) as graphs, monkeypatch.context() as patch:
            teacher_forced(model, ids, torch.ones_like(ids), some_tokens(1, 1), each=1)
            (graph,) = graphs._captured[0].graphs.values()
            patch.setattr(gpu_parts, "run", lambda *arguments: None)  # counted and not run: there is no GPU
            patch.setattr(gpu_step, "_kernels", lambda name, x: gpu_step._module(name))
            with gpu_step.launches() as counted, Launched() as torchs:
                graph.step()
        small.append(counted["small"])
        found.append(counted["gemv"])
        by_torch.append(torchs.operations)
    assert small[1] - small[0] <= 6
    assert small[0] - (small[1] - small[0]) == 1  # the last norm
    assert found == [products + 1, 2 * products + 1]  # the LM head
    assert by_torch[0] == by_torch[1]
    assert sum(by_torch[0].values()) <= 12  # positions and their angles, the embedding


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["dense", "static", "signed"])
@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_groups_on_a_gpu(weights: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama").to("cuda", torch.bfloat16)
    plan = replace(Plan.dense(model) if kind == "dense" else plan_of(model, kind), weights=weights)
    ids, tokens = prompt(1).cuda(), some_tokens(1, 40).cuda()
    arguments = (ids, torch.ones_like(ids), tokens)
    coreskip.wrap(model, plan, keep_originals=False)
    graphs = runtime_of(model).steps.captured
    with torch.no_grad():
        with monkeypatch.context() as switch:
            switch.setattr(graphs, "capture", None)
            expected = teacher_forced(model, *arguments, each=1)
        found = [teacher_forced(model, *arguments, each=1) for _ in range(2)]
    assert graphs.lowering.refusal is None
    assert torch.equal(*found)
    assert float((found[0] - expected).float().norm()) <= 0.1 * float(expected.float().norm())
