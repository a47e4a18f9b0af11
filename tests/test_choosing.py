"""How a request's tokens are drawn: by the distribution that transformers' own processors leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper
from transformers import TopPLogitsWarper as TopP

from coreskip.runtime.choosing import TokenChooser
from coreskip.runtime.sequence import Request

DRAWS = 4000


def expected(logits: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(options["temperature"])])
    warpers += [TopKLogitsWarper(options["top_k"])] if "top_k" in options else []
    warpers += [TopP(options["top_p"])] if "top_p" in options else []
    warpers += [MinPLogitsWarper(options["min_p"])] if "min_p" in options else []
    return warpers(torch.zeros(1, 1, dtype=torch.int64), logits[None].clone())[0].softmax(-1)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 7},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.7},
        {"temperature": 1.2, "min_p": 0.1},
        {"temperature": 1.2, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 1.0, "top_p": 0.0},
    ],
)
@pytest.mark.parametrize("size", [40, 3000])
def test_draws_follow_the_distribution_of_transformers(options: dict[str, Any], size: int) -> None:
    """Of a few tokens, and of more than are sorted at first."""
    logits = torch.randn(size, generator=torch.Generator().manual_seed(3)) * (2 if size < 100 else 0.5)
    logits[5] = -float("inf")
    chances = expected(logits, options)
    chooser = TokenChooser.of(Request([1], 1, seed=11, **options))
    ids = torch.tensor([[1]])
    drawn = torch.tensor([chooser.choose(ids, logits)[0] for _ in range(DRAWS)]).bincount(minlength=size) / DRAWS
    assert float(drawn[chances == 0].sum()) == 0
    wide = 5 * (chances * (1 - chances) / DRAWS).sqrt() + 2 / DRAWS
    assert bool(((drawn - chances).abs() <= wide).all())


def test_no_token_is_left() -> None:
    nothing = torch.full((9,), -float("inf"))
    for temperature in (0.0, 1.0):
        with pytest.raises(RuntimeError, match="no token"):
            TokenChooser.of(Request([1], 1, temperature=temperature)).choose(torch.tensor([[1]]), nothing)
    with pytest.raises(RuntimeError, match="no token"):
        TokenChooser.of(Request([1], 1, temperature=1.0)).choose(torch.tensor([[1]]), torch.tensor([1.0, float("nan")]))
