"""What the tests of exact mode share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import greedy, prompt

import coreskip
from coreskip.kernels.ops import available
from coreskip.predictors.plan import Plan
from coreskip.runtime.draft_costs import DraftCostModel
from coreskip.runtime.drafting import Statistics
from coreskip.runtime.wrap import runtime_of

needs_kernels = pytest.mark.skipif(available("cpu") is not None, reason="drafts are verified by the CPU kernels")


class Eager(DraftCostModel):
    """Drafts as much as it can, from the plan as long as its tokens are accepted more often than the text's."""

    verify_s, verify_token_s, draft_s, first_draft_s = 1.0, 0.0, 0.0, 0.0  # type: ignore[assignment]
    ready = True  # type: ignore[assignment]


def drafted(model: Any, ids: torch.Tensor, **options: Any) -> tuple[Any, Statistics]:
    """What a model wrapped in exact mode generates with eager drafts, and its statistics."""
    exact = runtime_of(model).exact
    exact.costs = Eager()
    return greedy(model, ids, **options), exact.last


def tokens_and_statistics(model: Any, plan: Plan, ids: torch.Tensor, **options: Any) -> tuple[Any, Statistics]:
    with coreskip.wrap(model, plan, exact=True):
        return drafted(model, ids, **options)


def dense(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    with coreskip.wrap(model, Plan.dense(model)):
        return greedy(model, ids, **options)


def repeating(rows: int = 1) -> torch.Tensor:
    return prompt(rows, 7).repeat(1, 4)
