"""Bricks from a dense MLP: clusters of one size, routers, and what they keep."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny
from torch.nn import functional as F

from coreskip import CoreskipError
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.bricks import _by_features, balanced_clusters, make_bricks


@pytest.mark.parametrize("count", [2, 5, 7, 40])
def test_clusters_are_of_one_size(count: int) -> None:
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    sizes = balanced_clusters(rows, count, seed=0).bincount(minlength=count)
    assert int(sizes.max()) - int(sizes.min()) <= 1
    assert int(sizes.sum()) == 40


def test_planted_clusters_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q[:4]
    places = torch.arange(48) % 4
    rows = directions[places] * (1 + torch.rand(48, 1, generator=generator)) + 0.05 * torch.randn(
        48, 16, generator=generator
    )
    best = max(_agreement(balanced_clusters(rows, 4, seed=seed), places) for seed in range(4))
    assert best == 1.0


def _agreement(found: torch.Tensor, places: torch.Tensor) -> float:
    together = found[:, None] == found[None]
    return float((together == (places[:, None] == places[None])).float().mean())


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("cluster", ["coactivation", "weights", "snmf"])
@pytest.mark.parametrize("router", ["linear", "centroids"])
def test_bricks_are_those_that_matter(family: str, cluster: str, router: str) -> None:
    """Of the activations' weight, the kept half has more than half; means are those of the tokens that leave out."""
    anatomy = dissect(tiny(family))
    generator = torch.Generator().manual_seed(2)
    hidden = [torch.randn(600, 64, generator=generator) for _ in anatomy.mlps]
    activations, norms = [], []
    for mlp, x in zip(anatomy.mlps, hidden, strict=True):
        w = mlp.matrices()
        up = F.linear(x, w.up, w.up_bias)
        activations.append((mlp.act(up) if w.gate is None else mlp.act(F.linear(x, w.gate, w.gate_bias)) * up).detach())
        norms.append(w.down.norm(dim=1).detach())
    found = make_bricks(
        list(anatomy.mlps), hidden, activations, norms,
        keep=0.5, bricks=8, cluster=cluster, router=router, progress=False,  # type: ignore[arg-type]
    )  # fmt: skip
    shares = []
    for policy, x, a, norm in zip(found, hidden, activations, norms, strict=True):
        policy.check(160, 64)
        scores = F.linear(x, policy.route, policy.bias)
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(4, dim=1).indices, True)
        kept = kept[:, policy.assignment]
        assert policy.keep == pytest.approx(float(kept.float().mean()))
        left = torch.stack(
            [a[~kept[:, i], i].mean() if bool((~kept[:, i]).any()) else torch.tensor(0.0) for i in range(160)]
        )
        assert policy.mean is not None
        torch.testing.assert_close(policy.mean, left, rtol=1e-4, atol=1e-5)
        weight = (a.abs() * norm).square()
        shares.append(float((weight * kept).sum() / weight.sum()))
    assert min(shares) > (0.52 if router == "linear" else 0.4)
    if family == "opt" or router == "linear":
        assert sum(shares) / len(shares) > 0.5


def test_bricks_of_features_are_the_neurons_that_make_them_up() -> None:
    """Planted features of eight neurons each, shown by some tokens: bricks of eight are those, whatever the rest
    does."""
    generator = torch.Generator().manual_seed(5)
    planted = torch.zeros(64, 8)
    for k in range(8):
        planted[k * 8 : k * 8 + 8, k] = torch.randn(8, generator=generator).sign() * (
            1 + torch.rand(8, generator=generator)
        )
    shown = torch.rand(400, 8, generator=generator) * (torch.rand(400, 8, generator=generator) < 0.3)
    noise = 0.01 * torch.randn(400, 64, generator=generator)
    found = max(
        _agreement(_by_features(shown @ planted.t() + noise, 8, seed), torch.arange(64) // 8) for seed in range(4)
    )
    assert found == 1.0


def test_more_bricks_than_neurons_are_refused() -> None:
    anatomy = dissect(tiny("llama"))
    nothing = [torch.zeros(4, 64)] * 3
    with pytest.raises(CoreskipError, match="161 bricks are more than a layer's 160 neurons"):
        make_bricks(
            list(anatomy.mlps), nothing, nothing, nothing,
            keep=0.5, bricks=161, cluster="weights", router="linear", progress=False,
        )  # fmt: skip
