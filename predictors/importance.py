"""How much each MLP neuron matters to a token, to a sentence, to a text.

A neuron's *activation* a is what enters the down projection: ``act(gate(x)) * up(x)``, or ``act(up(x))`` in a
plain MLP. Every score is a sum over tokens of a non-negative contribution, so that prompts may arrive in chunks
and texts may be any length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import SCORES as SCORES
from .checks import Score as Score


def kept_count(width: int, keep: float) -> int:
    """Neurons kept of `width`: rounded to the nearest, at least one."""
    return max(1, min(width, round(width * keep)))


def token_contributions(a: Tensor, score: Score, alpha: float, down_norm: Tensor) -> Tensor:
    """What each token adds to each neuron's sentence-level score.

    Args:
        a: activations ``[tokens, intermediate]``, any float dtype.
        score: ``signed``: 1 for the neurons in C_alpha, the top `alpha` share of the token's positive activations
            (CoreInfer, arXiv 2410.18311, section 3). ``magnitude``: 1 for the top `alpha` share of all neurons by
            ``|a|``. ``magnitude_down``: the same by ``|a| * down_norm``. ``griffin``: ``(a / ||a||)**2``
            (GRIFFIN, arXiv 2404.01365, section 4; its root is taken at the end and changes no order).
        alpha: share of a token's neurons that count as its core; unused by ``griffin``.
        down_norm: norms of the down projection's columns ``[intermediate]``, fp32.

    Returns:
        fp32 ``[tokens, intermediate]``.
    """
    a = a.float()
    if score == "griffin":
        size: Tensor = a.norm(dim=-1, keepdim=True)
        return (a / size.clamp_min(torch.finfo(torch.float32).tiny)).square()
    core = torch.zeros_like(a)
    if score == "signed":  # each token has its own number of positive activations, hence of core neurons
        wanted = (alpha * (a > 0).sum(-1, keepdim=True)).ceil().long()
        most = int(wanted.max()) if wanted.numel() else 0
        member = torch.arange(most, device=a.device) < wanted
        return core.scatter_(1, a.topk(most, dim=-1).indices, member.float())
    ranked = a.abs() if score == "magnitude" else a.abs() * down_norm
    # unsorted: half the time of a sorted topk at a third of 1,536 neurons
    return core.scatter_(1, ranked.topk(math.ceil(alpha * a.shape[1]), dim=-1, sorted=False).indices, 1.0)


def most_important(score: Tensor, tiebreak: Tensor, count: int) -> Tensor:
    """Indices of the `count` neurons with the highest score, ascending; ties go to the larger `tiebreak`, then to
    the lower index, so that a prompt of few tokens (whose counts are mostly tied) still selects sensibly.

    Args:
        score, tiebreak: ``[..., intermediate]``, finite and non-negative.

    Returns:
        int64 ``[..., count]``.
    """
    if score.device.type == "cpu" and 0 < count < score.shape[-1]:
        last = score.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        wanted = score >= last
        if int(wanted.sum()) == count * (
            score.numel() // score.shape[-1]
        ):  # no ties at the border: a third of the time
            return wanted.nonzero()[:, -1].view(*score.shape[:-1], count)
    by_tiebreak = tiebreak.sort(dim=-1, descending=True, stable=True).indices
    by_score = score.gather(-1, by_tiebreak).sort(dim=-1, descending=True, stable=True).indices
    return by_tiebreak.gather(-1, by_score)[..., :count].sort(dim=-1).values
