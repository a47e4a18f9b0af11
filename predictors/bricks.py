"""Bricks from a dense MLP: neurons in groups of one size that a token takes or leaves as a whole (MoEfication, arXiv
2110.01786; Configurable Foundation Models, arXiv 2409.02877).

Groups come from the weights, from what fires together, or from its sparse features (features.py); which of them a token
takes says a router over the MLP's input. Nothing is trained by gradient descent: the paper's routers that need no
training, and a linear one in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from .anatomy import FeedForward
from .checks import BrickRouter, Clustering
from .errors import CoreskipError
from .features import factorise
from .importance import kept_count
from .learned import best
from .policies import Bricks
from .token_samples import means_when_left_out

_STEPS = 12  # of k-means; assignments hardly move after eight
_FEATURE_STEPS = 60  # as `Snmf` takes; each feature has twice its share of neurons, for some are in several
_RIDGE = 1e-3  # of the linear router, as a share of the inputs' mean square


def make_bricks(
    mlps: list[FeedForward],
    hidden: list[Tensor],
    activations: list[Tensor],
    norms: list[Tensor],
    *,
    keep: float,
    bricks: int,
    cluster: Clustering,
    router: BrickRouter,
    seed: int = 0,
    progress: bool = True,
) -> list[Bricks]:
    """One `Bricks` per layer.

    Args:
        hidden, activations: per layer, inputs of the MLP ``[tokens, hidden]`` and of its down projection ``[tokens,
            width]``, of the same tokens.
        norms: per layer, norms of the down projection's columns, fp32 ``[width]``.

    Raises:
        CoreskipError: a layer has not so many neurons.
    """
    least = min(mlp.intermediate_size for mlp in mlps)
    if bricks > least:
        raise CoreskipError(f"{bricks} bricks are more than a layer's {least} neurons: give fewer")
    layers = tqdm(
        list(zip(mlps, hidden, activations, norms, strict=True)),
        desc="making bricks",
        disable=not progress,
        leave=False,
    )
    return [_of_layer(mlp, x, a, n, keep, bricks, cluster, router, seed) for mlp, x, a, n in layers]


def _of_layer(
    mlp: FeedForward,
    x: Tensor,
    a: Tensor,
    norm: Tensor,
    keep: float,
    bricks: int,
    cluster: Clustering,
    router: BrickRouter,
    seed: int,
) -> Bricks:
    matrices = mlp.matrices()
    gates = (matrices.up if matrices.gate is None else matrices.gate).float()
    sizes = a.float().abs() * norm
    if cluster == "snmf":
        assignment = _by_features(a.float() * norm, bricks, seed).to(x.device)
    else:
        assignment = balanced_clusters(gates if cluster == "weights" else sizes.t(), bricks, seed)
    members = F.one_hot(assignment, bricks).float()
    worth = (sizes.square() @ members).sqrt()  # what leaving a brick out of a token costs, about
    if router == "centroids":
        route, bias = (members.t() @ gates) / members.sum(0)[:, None], torch.zeros(bricks, device=x.device)
    else:
        route, bias = _linear_router(x.float(), worth)
    scores = F.linear(x.float(), route, bias)
    spread = scores.std().clamp_min(1e-12)  # scores go through a sigmoid, which must not come to 1 for several
    kept = best(scores, kept_count(bricks, keep))[:, assignment]
    return Bricks(
        keep=float(kept.float().mean()),
        assignment=assignment.cpu(),
        route=(route / spread).cpu(),
        bias=(bias / spread).cpu(),
        mean=means_when_left_out(a, kept).cpu(),
    )


def _by_features(a: Tensor, count: int, seed: int) -> Tensor:
    """Each neuron in the feature in which it weighs most, as long as that has room; int64 ``[neurons]``. a: activations
    ``[tokens, neurons]``, by what they add to the output.

    Where its features are full, or it is in none, the one decides whose tokens it fires at.
    """
    tokens = torch.arange(len(a))
    found = factorise(a, tokens, features=count, sparsity=2 / count, steps=_FEATURE_STEPS, seed=seed)
    together = F.normalize(a.abs().t(), dim=1) @ found.tokens.to(a)  # [neurons, features], at most 1
    weights = found.neurons.abs().to(a)
    return _fill(weights / weights.amax(0).clamp_min(1e-12) + 1e-3 * together, count)


def _linear_router(x: Tensor, worth: Tensor) -> tuple[Tensor, Tensor]:
    """The linear map of the inputs that comes closest to what the bricks are worth, by ridge regression: ``[bricks,
    hidden]`` and ``[bricks]``."""
    centre, level = x.mean(0), worth.mean(0)
    x, worth = (x - centre).double(), (worth - level).double()
    square = x.t() @ x
    ridge = _RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64, device=x.device)
    route = torch.linalg.solve(square + ridge, x.t() @ worth).t().float()
    return route, level - route @ centre


def balanced_clusters(rows: Tensor, count: int, seed: int) -> Tensor:
    """Rows ``[neurons, features]`` in `count` clusters whose sizes differ by one at most, by cosine: k-means whose rows
    choose in the order of how much the best cluster is better for them than the second best. int64 ``[neurons]``."""
    rows = F.normalize(rows.float(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    centres = rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]
    assignment = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for _ in range(_STEPS):
        found = _fill(rows @ centres.t(), count).to(rows.device)
        if torch.equal(found, assignment):
            break
        assignment = found
        sums = torch.zeros_like(centres).index_add_(0, assignment, rows)
        centres = F.normalize(sums, dim=1)
    return assignment


def _fill(likeness: Tensor, count: int) -> Tensor:
    """Each row's cluster, from its likeness to each ``[neurons, clusters]``; none takes more than its share."""
    neurons = likeness.shape[0]
    room = [neurons // count + (index < neurons % count) for index in range(count)]
    two = likeness.topk(min(2, count), dim=1).values
    order = (two[:, 0] - two[:, -1]).argsort(descending=True).tolist()
    wishes = likeness.argsort(dim=1, descending=True).tolist()
    assignment = [0] * neurons
    for neuron in order:
        cluster = next(each for each in wishes[neuron] if room[each])
        room[cluster] -= 1
        assignment[neuron] = cluster
    return torch.tensor(assignment)
