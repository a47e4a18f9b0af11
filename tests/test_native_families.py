"""Families whose decode steps run natively, in every form of their weights: the tokens of the model's own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import greedy, prompt
from transformers import DynamicCache

import coreskip
from coreskip.bench.census import build
from coreskip.kernels.ops import available
from coreskip.predictors.plan import Plan
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
}
ALL = [name for some in TYPES.values() for name in some]


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
    model = build(name)
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
    model, (ids, options) = build(name), calls()[1]
    with coreskip.wrap(model, Plan.dense(model, weights)):
        greedy(model, ids, 12, **options)
        native = runtime_of(model).steps.native
        assert native.ready, native.refusal
        described = native.described
        assert described is not None
        if any(runtime_of(model).anatomy.experts):
            return
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
    model = build(name).to(torch.bfloat16)
    with coreskip.wrap(model, Plan.dense(model)):
        for _ in range(4):
            greedy(model, prompt(1), 4)
        native = runtime_of(model).steps.native
        assert native.described is not None, native.refusal
