"""Families whose decode steps run natively, in every form of their weights: the tokens of the model's own modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import packed
from test_memory import capped
from tiny_models import greedy, prompt
from transformers import DynamicCache

import coreskip
from coreskip.bench.census import build
from coreskip.kernels.ops import available
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import Skip, SkipAttention, SkipMLP
from coreskip.runtime.reading import read_spec
from coreskip.runtime.spec import beyond_llama
from coreskip.runtime.wrap import runtime_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(available("cpu") is not None, reason="the native kernels are not built"),
]

#: by what tells them from Llama
TYPES = {
    "norms of the stream after each half": ["bart", "ctrl"],
    "learned or fixed places": ["gpt2", "opt", "xglm", "pegasus", "biogpt", "gpt_neo", "whisper"],
    "slopes": ["bloom", "mpt"],
    "heads of q, k and v in turn": ["gpt_neox", "persimmon", "falcon", "gpt_bigcode"],
    "heads in four parts, angles of a table": ["codegen"],
    "neighbours turn": ["gptj", "cohere2", "glm4", "helium", "ernie4_5"],
    "norms of heads after turning": ["hunyuan_v1_dense", "nanochat"],
    "norms of other names": ["vaultgemma", "exaone4", "hyperclovax", "olmo"],
    "sinks": ["gpt_oss", "granite_swa", "flint"],
    "an MLP beside experts": ["granitemoeshared"],
    "experts whose inputs are weighed": ["llama4_text"],
    "a mean of routed and shared experts": ["cohere2_moe"],
    "latents": ["deepseek_v2", "deepseek_v3", "minicpm3", "youtu"],
    "gates of heads": ["afmoe", "laguna"],
    "norms inside attentions and MLPs": ["bitnet"],
    "values that are scaled": ["mimo_v2_flash"],
    "an output that comes first": ["phi4_multimodal"],
    "an activation of learned numbers": ["apertus"],
    "routers of other kinds": ["phimoe", "kolibri1"],
    "a norm that ends a mixture": ["axk1"],
    "a vector that is added to an attention": ["gpt_neox_japanese"],
    "normed embeddings under places": ["blenderbot-small"],
    "a number that ends a layer": ["gemma4_unified_text"],
    "a map before the head": ["modernbert-decoder"],
    "layers that are idle without images": ["mllama"],
    "third halves": ["gemma4_text"],
    "recurrences in place of attentions": ["qwen3_next", "qwen3_5_text", "olmo_hybrid"],
    "convolutions in place of attentions": ["lfm2_moe", "lfm3"],
}
ALL = [name for some in TYPES.values() for name in some]


def made(name: str) -> Any:
    """A tiny model whose norms have weights of their own, so that it matters where these stand."""
    model = build(name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def padded() -> torch.Tensor:
    ids = prompt(2, 11)
    ids[1, :4] = 0
    return ids


def calls() -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """One row, and two of which one is padded."""
    ids = padded()
    return [(prompt(1), {}), (ids, {"attention_mask": (ids > 0).long()})]


def texts(model: Any, new: int = 12) -> list[torch.Tensor]:
    return [greedy(model, ids, new, **options) for ids, options in calls()]


@pytest.mark.parametrize("name", ALL)
def test_tokens_are_the_models_own(name: str) -> None:
    model = made(name)
    expected = texts(model)
    for mode in ({}, {"exact": True}):
        with coreskip.wrap(model, Plan.dense(model), **mode):
            for got, text in zip(texts(model), expected, strict=True):
                assert torch.equal(got, text)
            native = runtime_of(model).steps.native
            assert native.ready, native.refusal
    assert all(map(torch.equal, texts(model), expected))


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ALL)
def test_in_groups_steps_agree_with_modules(name: str, weights: str) -> None:
    """Prompts run natively, too, unless a mixture is in the way."""
    model, (ids, options) = made(name), calls()[1]
    with coreskip.wrap(model, Plan.dense(model, weights)):
        greedy(model, ids, 12, **options)
        native = runtime_of(model).steps.native
        assert native.ready, native.refusal
        described = native.described
        assert described is not None
        of_modules = TYPES["latents"] + TYPES["norms inside attentions and MLPs"] + TYPES["a number that ends a layer"]
        of_modules += (
            TYPES["third halves"] + TYPES["a map before the head"] + TYPES["layers that are idle without images"]
        )
        of_modules += TYPES["recurrences in place of attentions"] + TYPES["convolutions in place of attentions"]
        if any(runtime_of(model).anatomy.experts) or name in of_modules:
            return  # prompts of these run on the modules
        assert described.prompts_uncovered is None
        prompts = [logits_of(model, ids, options["attention_mask"], steps) for steps in (0, 1, 5)]
    assert torch.equal(prompts[0], prompts[1])
    assert torch.equal(prompts[0], prompts[2])


def logits_of(model: Any, ids: torch.Tensor, mask: torch.Tensor, steps: int) -> torch.Tensor:
    """Of the last token, behind a prompt and so many steps."""
    cache = DynamicCache(config=model.config)
    ends = range(ids.shape[1] - steps, ids.shape[1] + 1)
    with torch.no_grad():
        for begin, end in zip((0, *ends), ends, strict=False):
            call = {"attention_mask": mask[:, :end], "past_key_values": cache, "use_cache": True}
            logits = model(ids[:, begin:end], **call).logits[:, -1]
    return logits


@pytest.mark.parametrize("name", ALL)
def test_in_bfloat16_it_is_read_as_well(name: str) -> None:
    model = made(name).to(torch.bfloat16)
    with coreskip.wrap(model, Plan.dense(model)):
        for _ in range(4):
            greedy(model, prompt(1), 4)
        native = runtime_of(model).steps.native
        assert native.described is not None, native.refusal


@pytest.mark.parametrize("name", ALL)
def test_a_tokens_bits_do_not_depend_on_its_neighbours(name: str) -> None:
    """Three tokens of each of two texts in a step, and in steps one by one."""
    model, ids = made(name), prompt(2, 12)
    with torch.no_grad(), coreskip.wrap(model, Plan.dense(model)):
        greedy(model, prompt(1), 4)
        found = []
        for lengths in ([3], [1, 1, 1]):
            cache, at = DynamicCache(config=model.config), 9
            model(ids[:, :at], past_key_values=cache, use_cache=True)
            for length in lengths:
                logits = model(ids[:, at : at + length], past_key_values=cache, use_cache=True).logits[:, -1]
                at += length
            found.append(logits)
        native = runtime_of(model).steps.native
        assert native.ready, native.refusal
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "name",
    [
        *("gpt_neox", "gpt2", "bart", "bloom", "deepseek_v3", "minicpm3", "llama4_text", "bitnet", "laguna"),
        *("gemma4_text", "olmo_hybrid", "qwen3_5_text", "lfm3"),
    ],
)
def test_packed(name: str, tmp_path: Path) -> None:
    """Matrices in groups, and their very numbers in float32."""
    model = packed(made(name), tmp_path / "packed", weights="int4")
    plain = greedy(model, prompt(1), 6)
    assert plain.shape == (1, 15)
    with coreskip.wrap(model, Plan.dense(model)):
        assert torch.equal(greedy(model, prompt(1), 6), plain)
        native = runtime_of(model).steps.native
        assert native.ready, native.refusal


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "bart", "minicpm3", "youtu", "bitnet", "olmo_hybrid", "lfm3"])
@pytest.mark.parametrize("weights", ["int4", "as-loaded"])
def test_under_a_cap(name: str, weights: str, tmp_path: Path) -> None:
    """Matrices come from the disk in the order in which a step reads them."""
    plain = packed(made(name), tmp_path / "packed", weights=weights)
    model = capped(tmp_path / "packed", 0.25)
    with coreskip.wrap(plain):
        expected = greedy(plain, prompt(1), 8)
    with coreskip.wrap(model):
        assert torch.equal(greedy(model, prompt(1), 8), expected)
        native = runtime_of(model).steps.native
        assert native.ready, native.refusal


@pytest.mark.parametrize("name", [name for name in ALL if name not in TYPES["norms of other names"]])
def test_who_knows_only_common_models_is_told(name: str) -> None:
    model = made(name)
    plain = name in ("granitemoeshared", "falcon", "phi4_multimodal", *TYPES["routers of other kinds"])
    reason = beyond_llama(read_spec(model, dissect(model)))
    assert plain or reason is not None
    common = made("llama")
    assert beyond_llama(read_spec(common, dissect(common))) is None


@pytest.mark.parametrize("policy", [Skip(), SkipAttention(), SkipMLP()], ids=lambda policy: policy.name)
@pytest.mark.parametrize("name", ["bart", "gpt_neox", "deepseek_v3", "minicpm3"])
def test_a_layer_that_is_left_out(name: str, policy: Any) -> None:
    """Its entries are written, and norms of the residual stream stay."""
    model, ids = made(name), prompt(1, 12)
    dense = Plan.dense(model)
    layers = tuple(LayerPlan(layer=policy) if index == 1 else LayerPlan() for index in range(len(dense.layers)))
    found = []
    for natively in (True, False):
        with torch.no_grad(), coreskip.wrap(model, Plan(layers, dense.model, {"method": "layers"})):
            native = runtime_of(model).steps.native
            if not natively:
                native._refuse("the modules are what is compared with")
            cache = DynamicCache(config=model.config)
            model(ids[:, :8], past_key_values=cache, use_cache=True)
            for at in range(8, 12):
                logits = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits
            assert native.ready is natively
            found.append(logits)
    torch.testing.assert_close(*found, rtol=0, atol=1e-4 * float(found[1].std()))


def test_halves_that_add_nothing() -> None:
    """Two norms then give the same, and the MLP reads what the attention reads."""
    model = build("llama")
    layer = model.model.layers[1]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    expected = texts(model)
    with coreskip.wrap(model, Plan.dense(model)):
        assert all(map(torch.equal, texts(model), expected))
        native = runtime_of(model).steps.native
        assert native.ready, native.refusal
