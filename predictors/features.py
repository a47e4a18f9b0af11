"""Sparse features of co-active neurons, by semi-nonnegative matrix factorisation of MLP activations (SNMF, arXiv
2506.10920; Ding, Li and Jordan, 2010).

Activations A ``[width, tokens]`` are written as F G^T: column k of F is a feature, a few neurons with a weight of
either sign; G, which is not negative, says how strongly each token shows it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .checks import check_count, check_share
from .errors import CoreskipError
from .observe import taps
from .sources import Reading, Source, needs_mlps, source


@dataclass(frozen=True, eq=False)
class Features:
    """One layer's features.

    Attributes:
        neurons: F, fp32 ``[width, features]``.
        tokens: G, fp32 ``[tokens, features]``, columns of length 1.
        ids: the tokens' ids, int64 ``[tokens]``.
        error: share of the activations' squares that F G^T does not account for.
    """

    neurons: Tensor
    tokens: Tensor
    ids: Tensor
    error: float

    def top_tokens(self, feature: int, count: int = 10) -> list[tuple[int, float]]:
        """Ids of the tokens that show a feature most, each once, and how strongly."""
        strongest: dict[int, float] = {}
        for place in self.tokens[:, feature].argsort(descending=True, stable=True).tolist():
            strongest.setdefault(int(self.ids[place]), float(self.tokens[place, feature]))
            if len(strongest) == count:
                break
        return list(strongest.items())


def factorise(activations: Tensor, ids: Tensor, *, features: int, sparsity: float, steps: int, seed: int) -> Features:
    """Features of activations ``[tokens, width]``; float32 throughout.

    From a random G, every step solves for F, keeps of each feature the `sparsity` share of the neurons with the largest
    weights (winner takes all), brings G's columns to length 1, and multiplies G by
    ``sqrt((P+ + G Q-) / (P- + G Q+))``, P = A^T F and Q = F^T F parted by sign. The best step is kept.
    """
    a = activations.float().t()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    g = torch.rand(a.shape[1], features, generator=generator).to(a).clamp_min(1e-6)
    unit = torch.eye(features, device=a.device) * 1e-6
    whole = float(a.square().sum()) or 1.0
    best: tuple[float, Tensor, Tensor] | None = None
    for _ in range(steps):
        f = a @ torch.linalg.solve(g.t() @ g + unit, g.t()).t()
        f = winners(f, sparsity)
        length = g.norm(dim=0).clamp_min(1e-8)
        f, g = f * length, g / length
        loss = float((a - f @ g.t()).square().sum()) / whole
        if best is None or loss < best[0]:
            best = loss, f, g
        p, q = a.t() @ f, f.t() @ f
        up = p.clamp_min(0) + g @ (-q).clamp_min(0)
        g = g * (up / ((-p).clamp_min(0) + g @ q.clamp_min(0)).clamp_min(1e-12)).sqrt()
    assert best is not None
    return Features(best[1].cpu(), best[2].cpu(), ids.cpu(), best[0])


def winners(f: Tensor, share: float) -> Tensor:
    """f ``[width, features]`` with all but the `share` largest of each column, by size, set to 0."""
    count = max(1, math.ceil(share * f.shape[0]))
    kept = f.abs().topk(count, dim=0).indices
    return torch.zeros_like(f).scatter(0, kept, f.gather(0, kept))


@source
@dataclass(frozen=True)
class Snmf(Source):
    """How much a neuron weighs in the layer's co-activation features: the root of the sum of squares of its weights in
    all of them or, with `feature`, the size of its weight in that one. One pass; then `steps` products of the first
    `tokens` tokens' activations with the features, layer by layer."""

    features: int = 32
    sparsity: float = 0.05
    steps: int = 60
    tokens: int = 2048
    feature: int | None = None
    name: ClassVar[str] = "snmf"

    def check(self) -> None:
        check_count("features", self.features)
        check_share("sparsity", self.sparsity)
        check_count("steps", self.steps)
        check_count("tokens", self.tokens)
        if self.feature is not None:
            check_count("feature", self.feature, 0)
            if self.feature >= self.features:
                raise CoreskipError(f"there is no feature {self.feature} of {self.features}")

    def score(self, reading: Reading) -> list[Tensor]:
        needs_mlps(reading, self.name)
        return [torch.zeros(0) if found is None else self._weights(found) for found in self.find(reading)]

    def _weights(self, found: Features) -> Tensor:
        f = found.neurons
        return f.norm(dim=1) if self.feature is None else f[:, self.feature].abs()

    def find(self, reading: Reading) -> list[Features | None]:
        """Every layer's features; None where it has no MLP."""
        rows = reading.rows[: max(1, self.tokens // reading.rows.shape[1])]
        kept: list[list[Tensor]] = [[] for _ in reading.anatomy.layers]
        with taps(reading.anatomy, lambda layer, a: kept[layer].append(a.float())):
            reading.through(rows, "activations")
        found: list[Features | None] = []
        for layer in reading.bar(kept, "factorising"):
            options = {"features": self.features, "sparsity": self.sparsity, "steps": self.steps}
            activations = torch.cat(layer) if layer else None
            layer.clear()
            found.append(
                None if activations is None else factorise(activations, rows.flatten(), seed=reading.seed, **options)  # type: ignore[arg-type]
            )
        return found
