"""Drafts for models whose passes depend on how far the text has come: none where that would show in the text."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from exact_mode import Eager, needs_kernels
from tiny_models import greedy, plan_of, prompt, tiny
from transformers.generation import GenerationMixin

import coreskip
from coreskip.predictors.plan import Plan
from coreskip.runtime.wrap import runtime_of

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, "factor": 4.0,
    "short_factor": [1.0] * 8, "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
    "longrope_kept_cache": ("llama", {"rope_parameters": LONGROPE}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}),
    "switch_alone": ("phi3", {"original_max_position_embeddings": 16}),
}


def model_of(name: str) -> Any:
    family, settings = MODELS[name]
    return tiny(family, **settings)


def repeating(length: int) -> torch.Tensor:
    return prompt(1, 5).repeat(1, 8)[:, :length]


@needs_kernels
@pytest.mark.parametrize("mode", ["exact", "lookup", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_the_text_is_plain_transformers(name: str, mode: str) -> None:
    model = model_of(name)
    ids = repeating(10)
    expected = [greedy(copy.deepcopy(model), ids, 30), greedy(copy.deepcopy(model), ids, 5)]
    plan = plan_of(model, "griffin", 0.7) if mode == "exact" else Plan.dense(model)
    with coreskip.wrap(model, plan, exact=mode == "exact", lookup=mode == "lookup"):
        drafter = runtime_of(model).exact or runtime_of(model).lookup
        for attempt in range(2):  # the second turn finds native steps, where there are such, and a used model
            if drafter is not None:
                drafter.costs = Eager()
            assert torch.equal(greedy(model, ids, 30), expected[0]), attempt
            assert torch.equal(greedy(model, ids, 5), expected[1]), attempt


@needs_kernels
@pytest.mark.parametrize("name", MODELS)
def test_drafts_where_the_length_stays_on_one_side(name: str) -> None:
    model, plain = model_of(name), model_of(name)  # dynamic frequencies depend on what was generated before, too
    with coreskip.wrap(model, plan_of(model, "griffin", 0.7), exact=True):
        exact = runtime_of(model).exact
        for length, new, drafts in ((6, 10, True), (6, 11, False), (16, 9, False), (20, 9, name != "dynamic")):
            ids = repeating(length)
            exact.costs = Eager()
            text = greedy(model, ids, new)
            assert (exact.last.note is None) == drafts, (length, new, exact.last.note)
            if drafts:
                assert sum(exact.last.drafted.values()) > 0
            else:
                assert "16 tokens" in exact.last.note
            assert torch.equal(text, greedy(plain, ids, new))


@needs_kernels
def test_a_model_that_prepares_its_own_inputs_is_not_drafted_for() -> None:
    model, ids = tiny("llama"), prompt(1, 9)

    class Own(type(model)):  # type: ignore[misc]
        def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            """Sees no further back than the last four tokens."""
            kwargs["past_key_values"], kwargs["position_ids"] = None, None
            return GenerationMixin.prepare_inputs_for_generation(
                self, input_ids[:, -4:], **{**kwargs, "next_sequence_length": None}
            )

    model.__class__ = Own
    expected = greedy(model, ids, 20)
    for options in ({"exact": True}, {"lookup": True}, {}):
        with coreskip.wrap(model, Plan.dense(model), **options):
            for _ in range(2):
                assert torch.equal(greedy(model, ids, 20), expected), options
