"""Trains low-rank predictors of the neurons that a token needs (Deja Vu, arXiv 2310.17157, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from .importance import kept_count
from .policies import Learned

RANK = 64
_STEPS = 300  # at batches of 512 this is 37 passes over 4,096 tokens; recall stops growing before
_BATCH = 512
_HELD_OUT = 1 / 8


def train_predictors(
    hidden: Sequence[Tensor],
    scores: Sequence[Tensor],
    *,
    keep: float,
    rank: int = RANK,
    steps: int = _STEPS,
    seed: int = 0,
    progress: bool = True,
) -> list[Learned]:
    """One predictor per layer, by binary cross-entropy on whether a neuron is among the token's `keep` share.

    Args:
        hidden: per layer, MLP inputs ``[tokens, hidden]``.
        scores: per layer, what each neuron was worth to the token, ``[tokens, neurons]``.

    Returns:
        per layer a `Learned` whose recall was measured on the last eighth of the tokens, unseen in training.
    """
    pairs = tqdm(
        list(zip(hidden, scores, strict=True)), desc="training", unit="layer", disable=not progress, leave=False
    )
    return [_train(x.float(), score.float(), keep, rank, steps, seed) for x, score in pairs]


def recall(predictor: Learned, x: Tensor, score: Tensor) -> float:
    """The share of each token's `keep` share of neurons by `score` that the predictor puts among its own."""
    kept = kept_count(score.shape[1], predictor.keep)
    wanted = best(score, kept)
    return float(
        (wanted & best(_logits(predictor.reduce, predictor.expand, predictor.bias, x), kept)).sum() / wanted.sum()
    )


def _train(x: Tensor, score: Tensor, keep: float, rank: int, steps: int, seed: int) -> Learned:
    wanted = best(score, kept_count(score.shape[1], keep))
    trained = len(x) - max(1, round(_HELD_OUT * len(x)))
    generator = torch.Generator().manual_seed(seed)
    # inputs of unit size: those of a norm layer differ by orders of magnitude between models
    size = x[:trained].square().mean().sqrt().clamp_min(1e-12)
    reduce = (
        torch.randn(rank, x.shape[1], generator=generator, dtype=torch.float32, device="cpu") / x.shape[1] ** 0.5
    ).to(x.device)
    expand = (torch.randn(score.shape[1], rank, generator=generator, dtype=torch.float32, device="cpu") / rank**0.5).to(
        x.device
    )
    share = wanted[:trained].float().mean(0).clamp(0.01, 0.99)
    weights = [w.requires_grad_() for w in (reduce, expand, share.logit())]
    optimizer = torch.optim.Adam(weights, lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            batch = torch.randint(trained, (_BATCH,), generator=generator).to(x.device)
            logits = _logits(weights[0], weights[1], weights[2], x[batch] / size)
            loss = F.binary_cross_entropy_with_logits(logits, wanted[batch].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    reduce, expand, bias = (w.detach() for w in weights)
    found = Learned(keep=keep, reduce=(reduce / size).cpu(), expand=expand.cpu(), bias=bias.cpu())
    return Learned(**{**vars(found), "recall": recall(found, x[trained:].cpu(), score[trained:].cpu())})


def _logits(reduce: Tensor, expand: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, reduce), expand, bias)


def best(score: Tensor, kept: int) -> Tensor:
    """Which neurons are among the `kept` with the highest score of each row, bool like `score`."""
    highest = score.topk(kept, dim=-1, sorted=False).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, highest, True)
