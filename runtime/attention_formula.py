"""What an attention computes, in plain torch: the definition that readings of a model are tried with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Table = tuple[Tensor, Tensor]


def turned(x: Tensor, table: Table, paired: bool) -> Tensor:
    """The first dimensions of x ``[..., tokens, size]`` turned by the angles of ``(cos, sin)``, each ``[tokens,
    rotated]``: neighbours where they are `paired`, else each dimension with that half of them away."""
    cos, sin = (t.to(x.device) for t in table)
    half = cos.shape[-1] // 2
    some, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = some.unflatten(-1, (half, 2)).unbind(-1) if paired else some.chunk(2, -1)
    new = a * cos[:, :half] - b * sin[:, :half], b * cos[:, half:] + a * sin[:, half:]
    return torch.cat([torch.stack(new, -1).flatten(-2) if paired else torch.cat(new, -1), rest], -1)


def attended(
    heads: Sequence[Tensor],
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """What the output projection is given, ``[tokens, heads * size]``. heads: q, k and v, ``[heads, tokens, size]``;
    the others as `AttentionSpec` has them."""
    q, k, v = heads
    each = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(each, 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(q.shape[1], device=q.device)
    back = place[:, None] - place
    if slopes is not None:
        scores = scores - slopes.to(q.device)[:, None, None] * back
    hidden = back < 0 if not window else (back < 0) | (back >= window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        column = sinks.detach().float().to(q.device).view(-1, 1, 1).expand(-1, q.shape[1], 1)
        scores = torch.cat([scores, column], -1)
    return (scores.softmax(-1)[..., : q.shape[1]] @ v).transpose(0, 1).flatten(1)
