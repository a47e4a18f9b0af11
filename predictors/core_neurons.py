"""Core neurons: the few neurons that carry a sentence (CoreInfer, arXiv 2410.18311; METHODS in the README).

*Stability-guided* selection happens at run time, from the prompt (see the runtime's Selections). This module holds
what is prepared beforehand: one fixed set for all texts (static), and sets for clusters of sentences
(similarity-guided).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .importance import Score, kept_count, most_important, token_contributions
from .observe import LayerStats

ANCHOR_DEPTH = 25 / 32  # CoreInfer clusters on layer 25 of 32-layer models; the same relative depth elsewhere
MAX_SENTENCES = 512  # bounds the memory of clustering: one row of counts per sentence and layer
MAX_CLUSTERS = 10
MIN_CLUSTERS = 4  # the published elbow search runs over 1..10 and takes at least 4


def static_set(stats: LayerStats, score: Score, keep: float) -> Tensor:
    """The `keep` share of a layer's neurons that mattered most over the whole calibration text, ascending int64."""
    width = stats.down_norm.shape[0]
    return most_important(stats.core[score], stats.squares, kept_count(width, keep))


class SentenceCounter:
    """A tap for `observe`: per layer, each sentence's summed token contributions.

    Every batch is one sentence. Kept as fp16 ``[sentences, width]``: counts up to 2,048 are exact there.
    """

    def __init__(self, down_norm: list[Tensor], score: Score, alpha: float) -> None:
        self._down_norm, self._score, self._alpha = down_norm, score, alpha
        self._rows: list[list[Tensor]] = [[] for _ in down_norm]

    def __call__(self, layer: int, a: Tensor) -> None:
        rows = self._rows[layer]
        if len(rows) >= MAX_SENTENCES:
            return
        counts = token_contributions(a, self._score, self._alpha, self._down_norm[layer])
        rows.append(counts.sum(0).half().cpu())

    def counts(self) -> list[Tensor]:
        return [torch.stack(rows) for rows in self._rows]


@dataclass(frozen=True, eq=False)
class SentenceClusters:
    """Clusters of calibration sentences.

    Attributes:
        anchor: the layer whose core neurons tell which cluster a prompt belongs to.
        centroids: mean membership of the anchor layer's neurons, fp32 ``[clusters, width]``.
        sets: per layer, each cluster's most frequent neurons, int64 ``[clusters, kept]``, ascending.
    """

    anchor: int
    centroids: Tensor
    sets: list[Tensor]


def cluster_sentences(counts: list[Tensor], keep: float, seed: int) -> SentenceClusters:
    """K-means over the sentences' core sets at the anchor layer, then each cluster's most frequent neurons.

    `counts` holds one ``[sentences, width]`` per layer, as `SentenceCounter` collects them.
    """
    anchor = min(len(counts) - 1, round(ANCHOR_DEPTH * len(counts)))
    members = core_membership(counts[anchor].float(), keep)
    centroids, assignment = kmeans_elbow(members, seed)
    sets = []
    for layer in counts:
        kept = kept_count(layer.shape[1], keep)
        rows = []
        for cluster in range(centroids.shape[0]):
            inside = layer[assignment == cluster].double()
            rows.append(most_important(inside.sum(0), inside.square().sum(0), kept))
        sets.append(torch.stack(rows))
    return SentenceClusters(anchor, centroids, sets)


def core_membership(counts: Tensor, keep: float) -> Tensor:
    """C_alpha^beta as 0/1: the most frequent neurons of each sentence; counts and result ``[sentences, width]``."""
    core = most_important(counts, torch.zeros_like(counts), kept_count(counts.shape[1], keep))
    return torch.zeros_like(counts).scatter_(1, core, 1.0)


def nearest_cluster(counts: Tensor, centroids: Tensor, keep: float) -> Tensor:
    """The cluster of each prompt, from its anchor-layer counts ``[prompts, width]``; int64 ``[prompts]``."""
    return torch.cdist(core_membership(counts.float(), keep), centroids.to(counts.device)).argmin(1)


def kmeans_elbow(points: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """K-means for 1..MAX_CLUSTERS clusters; the elbow is the k farthest below the line from first to last inertia.

    Returns:
        centroids ``[k, features]`` and each point's cluster ``[points]``.
    """
    most = min(MAX_CLUSTERS, points.shape[0])
    fits = [_kmeans(points, k, torch.Generator().manual_seed(seed)) for k in range(1, most + 1)]
    inertia = torch.tensor([fit[2] for fit in fits], dtype=torch.float32, device="cpu")
    line = torch.linspace(float(inertia[0]), float(inertia[-1]), most, dtype=torch.float32, device="cpu")
    elbow = int((line - inertia).argmax()) + 1
    centroids, assignment, _ = fits[max(elbow, min(MIN_CLUSTERS, most)) - 1]
    used = assignment.unique()
    return centroids[used], torch.searchsorted(used, assignment)


def _kmeans(points: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Lloyd's algorithm from a k-means++ start; a cluster that runs empty keeps its centroid."""
    centroids = points[torch.randint(points.shape[0], (1,), generator=generator, device="cpu")]
    while centroids.shape[0] < k:
        distance = torch.cdist(points, centroids).square().amin(1) + 1e-12
        centroids = torch.cat([centroids, points[torch.multinomial(distance, 1, generator=generator)]])
    assignment = torch.full((points.shape[0],), -1, device="cpu")
    for _ in range(100):
        nearest = torch.cdist(points, centroids).argmin(1)
        if torch.equal(nearest, assignment):
            break
        assignment = nearest
        for cluster in assignment.unique():
            centroids[cluster] = points[assignment == cluster].mean(0)
    inertia = float((points - centroids[assignment]).square().sum())
    return centroids, assignment, inertia
