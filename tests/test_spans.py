"""Models that native steps cover in part: recurrences and what else nothing describes run as they are,
between native calls. The tokens of the model's own modules, in every way of generating."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import packed
from test_memory import capped
from test_native_families import calls, texts
from test_native_families import made as of_family
from tiny_models import greedy, prompt, tiny
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache

import coreskip
from coreskip.kernels.ops import available
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import CoreNeurons, Dense, Skip, Static
from coreskip.runtime.info import describe, table
from coreskip.runtime.packed_layer import PackedLayer
from coreskip.runtime.spans import _RUN
from coreskip.runtime.steps import Lowering
from coreskip.runtime.wrap import runtime_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(available("cpu") is not None, reason="the native kernels are not built"),
]

#: by what of them runs on their modules, with the halves that are native, and how many there are
TYPES = {
    "recurrences": {"jamba": (6, 8), "granitemoehybrid": (6, 8), "nemotron_h": (3, 4)},
    "attentions that choose keys": {"deepseek_v32": (4, 8)},
    "attentions of two maps": {"diffllama": (4, 8)},
    # with something of their own that nothing describes, see `made`
    "routers": {"phimoe": (4, 8)},
    "activations": {"apertus": (4, 8)},
    "what stands beside both halves": {"gemma4_text": (8, 8)},
    "embeddings": {"blenderbot-small": (8, 8)},
}
ALL = {name: halves for some in TYPES.values() for name, halves in some.items()}


def made(name: str) -> Any:
    """A tiny model; a few have another router, activation, third half or norm than their family."""
    model = of_family(name)
    for module in list(model.modules()):
        if name == "phimoe" and type(module).__name__ == "PhimoeTopKRouter":
            module.__class__ = _squaring(type(module))
        elif name == "apertus" and hasattr(module, "act_fn"):
            module.act_fn = nn.Mish()
        elif name == "gemma4_text" and hasattr(module, "per_layer_input_gate"):
            module.act_fn = nn.Tanh()
        elif name == "blenderbot-small" and hasattr(module, "layernorm_embedding"):
            module.layernorm_embedding = nn.Sequential(module.layernorm_embedding, nn.Tanh())
    return model


def _squaring(kind: Any) -> Any:
    def forward(self: Any, x: torch.Tensor) -> Any:
        logits, weights, index = kind.forward(self, x)
        return logits, weights**2, index

    return type("SquaringRouter", (kind,), {"forward": forward, "__module__": kind.__module__})


def spans_of(model: Any) -> Any:
    steps = runtime_of(model).steps
    assert steps.lowering is Lowering.SPANS
    assert not steps.native.ready
    assert steps.spans.ready, steps.spans.refusal
    return steps.spans


@pytest.mark.parametrize("name", ALL)
def test_tokens_are_the_models_own(name: str) -> None:
    model = made(name)
    expected = texts(model)
    beams = greedy(model, prompt(1), 8, num_beams=3)
    before = [p.clone() for p in model.parameters()]
    with coreskip.wrap(model, Plan.dense(model)):
        for got, text in zip(texts(model), expected, strict=True):
            assert torch.equal(got, text)
        assert spans_of(model).halves == ALL[name]
        assert torch.equal(greedy(model, prompt(1), 8, num_beams=3), beams)
    assert all(map(torch.equal, texts(model), expected))
    assert all(map(torch.equal, model.parameters(), before))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["jamba", "gemma4_text", "deepseek_v32"])
def test_exact_mode_gives_the_dense_models_tokens(name: str) -> None:
    model = made(name)
    expected = texts(model)
    plan = half_of_the_neurons(model)
    with coreskip.wrap(model, plan, exact=True):
        assert all(map(torch.equal, texts(model), expected))


def half_of_the_neurons(model: Any) -> Plan:
    dense = Plan.dense(model)
    policies = [Static(torch.arange(0, width, 2)) if width else Dense() for width in dense.model.intermediate_sizes]
    return Plan(tuple(map(LayerPlan, policies)), dense.model, {"method": "static"})


def stepped(model: Any, lengths: tuple[int, ...] = (1, 1, 1, 1), begin: int = 8) -> torch.Tensor:
    """Logits behind a prompt, step by step."""
    ids, at = prompt(1, begin + sum(lengths)), begin
    found, cache = [], DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :at], past_key_values=cache, use_cache=True)
        for length in lengths:
            found.append(model(ids[:, at : at + length], past_key_values=cache, use_cache=True).logits)
            at += length
    return torch.cat(found, 1)


def on_modules(model: Any) -> None:
    """Nothing of the wrapped model's steps is native."""
    steps = runtime_of(model).steps
    steps.native._refuse("the modules are what is compared with")
    steps.spans.refusal = "the modules are what is compared with"
    assert steps.lowering is Lowering.MODULES


@pytest.mark.parametrize("name", ["jamba", "gemma4_text", "diffllama", "nemotron_h"])
@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_plans_are_carried_out_as_on_modules(name: str, weights: str | None) -> None:
    model = made(name)
    dense, found, skipped = half_of_the_neurons(model), [], []
    plan = Plan(dense.layers, dense.model, dense.recipe, weights=weights)
    for natively in (True, False):
        with coreskip.wrap(model, plan):
            if not natively:
                on_modules(model)
            found.append(stepped(model))
            assert not natively or spans_of(model).ready
            skipped.append(runtime_of(model).usage.neuron_sparsity())
    assert skipped[0] == pytest.approx(skipped[1])
    assert skipped[0] > 0
    error = float((found[0] - found[1]).square().mean().sqrt() / found[1].std())
    assert error < (1e-4 if weights is None else 0.05)


@pytest.mark.parametrize("name", ["jamba", "gemma4_text"])
def test_prompts_choose_neurons(name: str) -> None:
    model, dense = made(name), Plan.dense(made(name))
    policies = [CoreNeurons(0.4, 0.5, "griffin") if width else Dense() for width in dense.model.intermediate_sizes]
    plan = Plan(tuple(map(LayerPlan, policies)), dense.model, {"method": "core"})
    found = []
    for natively in (True, False):
        with coreskip.wrap(model, plan):
            if not natively:
                on_modules(model)
            found.append((texts(model), runtime_of(model).usage.neuron_sparsity()))
            assert not natively or spans_of(model).ready
    assert all(map(torch.equal, found[0][0], found[1][0]))
    assert found[0][1] == pytest.approx(found[1][1])
    assert found[0][1] > 0


@pytest.mark.parametrize("name", ALL)
def test_several_tokens_at_once_and_in_bfloat16(name: str) -> None:
    model = made(name)
    expected = stepped(model, (3, 1, 2))
    with coreskip.wrap(model, Plan.dense(model)):
        got = stepped(model, (3, 1, 2))
        assert spans_of(model).ready
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3 * float(expected.std()))
    model = model.to(torch.bfloat16)
    with coreskip.wrap(model, Plan.dense(model)):
        for _ in range(4):
            greedy(model, prompt(1), 4)
        assert runtime_of(model).steps.lowering is Lowering.SPANS


@pytest.mark.parametrize("name", ["jamba", "granitemoehybrid", "gemma4_text"])
def test_a_copied_cache_goes_its_own_way(name: str) -> None:
    """States of recurrences are written in place."""
    model, ids = made(name), prompt(1, 12)
    found = []
    for wrapped in (False, True):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            if wrapped:
                coreskip.wrap(model, Plan.dense(model))
            model(ids[:, :8], past_key_values=cache, use_cache=True)
            model(ids[:, 8:9], past_key_values=cache, use_cache=True)
            branch = copy.deepcopy(cache)
            model(ids[:, 3:4], past_key_values=branch, use_cache=True)
            found.append(model(ids[:, 9:10], past_key_values=cache, use_cache=True).logits)
            found.append(model(ids[:, 9:10], past_key_values=branch, use_cache=True).logits)
            if wrapped:
                assert spans_of(model).ready
                coreskip.unwrap(model)
    for plain, got in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(got, plain, rtol=0, atol=1e-3 * float(plain.std()))


def test_layers_that_are_left_out_run_on_the_modules() -> None:
    model = made("jamba")
    dense = Plan.dense(model)
    try:
        plan = Plan((LayerPlan(), LayerPlan(layer=Skip()), *dense.layers[2:]), dense.model, {"method": "layers"})
        coreskip.wrap(model, plan)
    except coreskip.CoreskipError:
        return  # where no such plan is possible
    greedy(model, prompt(1), 4)
    assert not runtime_of(model).steps.spans.ready


def test_weights_that_change_count_at_the_next_step() -> None:
    model = made("jamba")
    with coreskip.wrap(model, Plan.dense(model)):
        greedy(model, prompt(1), 4)
        mlp = next(mlp for _, mlp in dissect(model).present)
        with torch.no_grad():
            mlp.down.weight.mul_(-1.0)
        got = stepped(model)
        assert spans_of(model).ready
    torch.testing.assert_close(got, stepped(model), rtol=0, atol=1e-3 * float(got.std()))


def test_a_description_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are compared with the modules' own on copies of the cache, which stays as it was."""
    from coreskip.runtime import span_reading

    right = span_reading._Halves.mlp

    def wrong(self: Any) -> Any:
        found = right(self)
        return found if found is None else type(found)(found.norms, found.parallel, 0.5, found.beside)

    monkeypatch.setattr(span_reading._Halves, "mlp", wrong)
    model = made("jamba")
    expected = texts(model)
    with coreskip.wrap(model, Plan.dense(model)):
        for _ in range(4):
            assert all(map(torch.equal, texts(model), expected))
        steps = runtime_of(model).steps
        assert not steps.spans.ready
        assert "differ" in str(steps.spans.refusal)


def test_nothing_is_told_to_other_passes() -> None:
    model = made("jamba")
    with coreskip.wrap(model, Plan.dense(model)):
        greedy(model, prompt(1), 4)
        assert _RUN.get() is None
        hidden = torch.randn(1, 3, model.config.hidden_size)
        block = runtime_of(model).anatomy.mlp(0).owner
        assert not torch.equal(block(hidden), torch.zeros_like(hidden))
    ids, options = calls()[1]
    assert greedy(model, ids, 2, **options).shape[0] == 2


@pytest.mark.parametrize("name", ["granitemoehybrid", "diffllama"])
@pytest.mark.parametrize("weights", ["int4", "as-loaded"])
def test_packed(name: str, weights: str, tmp_path: Path) -> None:
    model = packed(made(name), tmp_path / "packed", weights=weights)
    plain = greedy(model, prompt(1), 6)
    with coreskip.wrap(model, Plan.dense(model)):
        assert torch.equal(greedy(model, prompt(1), 6), plain)
        assert spans_of(model).ready


def test_under_a_cap_the_modules_run(tmp_path: Path) -> None:
    plain = packed(made("granitemoehybrid"), tmp_path / "packed", weights="as-loaded")
    model = capped(tmp_path / "packed", 0.25)
    with coreskip.wrap(plain):
        expected = greedy(plain, prompt(1), 6)
    with coreskip.wrap(model):
        assert torch.equal(greedy(model, prompt(1), 6), expected)
        assert "from the disk" in str(runtime_of(model).steps.spans.refusal)


def test_who_warns_says_both_reasons(caplog: pytest.LogCaptureFixture) -> None:
    """Where matrices are packed, and nothing of the steps is native."""
    model = made("deepseek_v4")
    with coreskip.wrap(model, Plan.dense(model, "int4")):
        greedy(model, prompt(1), 3)
    (found,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "own modules" in r.getMessage()]
    assert "KV cache" in found
    assert "no half of its decoder layers" in found


def test_threads_do_not_see_each_others_passes() -> None:
    model = made("jamba")
    expected = texts(model)
    with coreskip.wrap(model, Plan.dense(model)), ThreadPoolExecutor(3) as pool:
        texts(model)
        for found in pool.map(lambda _: texts(model), range(6)):
            assert all(map(torch.equal, found, expected))
        assert spans_of(model).ready


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_matrices_that_a_mixer_reads_itself_stay_where_they_are(weights: str, tmp_path: Path) -> None:
    """Jamba multiplies by its `dt_proj.weight`: as numbers that are not there, that gave garbage, and no error."""
    model = packed(made("jamba"), tmp_path / "packed", weights=weights)
    plain = coreskip.load(tmp_path / "packed", packed=False)[0]
    names = [name for name, module in model.named_modules() if name.endswith("dt_proj")]
    assert names
    assert all(type(model.get_submodule(name)) is nn.Linear for name in names)
    assert isinstance(model.get_submodule(names[0].replace("dt_proj", "in_proj")), PackedLayer)
    ids = prompt()
    expected = greedy(plain, ids, 8)
    assert torch.equal(greedy(model, ids, 8), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-2, atol=1e-2)


def test_linears_that_do_more_than_their_matrix_says_are_not_packed(tmp_path: Path) -> None:
    """DeepSeek V4's output projection multiplies groups of its inputs by parts of its matrix."""
    model = packed(made("deepseek_v4"), tmp_path / "packed", weights="int4")
    plain = coreskip.load(tmp_path / "packed", packed=False)[0]
    attention = model.model.layers[0].self_attn
    assert not isinstance(attention.o_a_proj, PackedLayer)
    assert isinstance(attention.o_b_proj, PackedLayer)
    assert torch.equal(greedy(model, prompt(1), 4), greedy(plain, prompt(1), 4))


def test_exact_mode_where_a_pass_takes_one_token_alone() -> None:
    model = made("prophetnet")
    expected = greedy(model, prompt(1), 6)
    with coreskip.wrap(model, half_of_the_neurons(model), exact=True):
        assert torch.equal(greedy(model, prompt(1), 6), expected)
        assert "several tokens" in runtime_of(model).exact.last.note


def test_numbers_that_are_not_there_are_not_computed_with(tmp_path: Path) -> None:
    model = packed(tiny("llama"), tmp_path / "packed", weights="int4")
    weight = model.model.layers[0].mlp.up_proj.weight
    x = torch.ones(weight.shape[1])
    for read in (lambda: weight @ x, lambda: F.linear(x, weight), lambda: weight + 1, lambda: torch.stack([weight])):
        with pytest.raises(RuntimeError, match="exists in packed form alone"):
            read()
    assert weight.shape == (160, 64)
    assert weight.to(torch.bfloat16).dtype == torch.bfloat16


def test_info_says_what_is_native_in_part() -> None:
    found = describe(made("jamba"))
    assert not found["native"]
    assert found["native_halves"] == [6, 8]
    assert "6 of 8 halves of layers native" in table(found)
    assert describe(tiny("llama"))["native_halves"] is None
