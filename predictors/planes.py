"""Leaving neurons out of MLPs whose weights are 4-bit groups: what the kernels see of them, and what that loses and
saves.

Two forms. By *planes*: the upper three bits of gate and up say which neurons are candidates, their last bits which of
them are kept. By *exact scores*: gate and up are read whole. Both read the down rows of kept neurons alone. The second
is the first with everything a candidate, so one set of functions calibrates both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.groups import GROUP, group_weights, ungroup
from ..kernels.packed import quantize
from .anatomy import Activation, FeedForward
from .policies import NeuronPolicy, Sketch, TopK
from .token_samples import means_when_left_out, quantile

#: Shares of a layer's neurons between which an allocation by bytes chooses what is left out.
LEFT_OUT = tuple(round(0.05 * step, 2) for step in range(1, 20))
#: What the upper bits must say of a neuron, as shares of the exact score that it then needs; 0: exact scores at once.
RATIOS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
EXACT = (0.0,)
RATIO = 0.5  # where the allocation does not choose one
_LOSS_TOKENS = 700  # over which a predicted loss is averaged
_ROUNDS = 3  # means and threshold depend on one another, and settle at once


@dataclass(frozen=True, eq=False)
class FourBitMLP:
    """An MLP in the numbers that its 4-bit groups stand for, all fp32, one row a neuron.

    Attributes:
        whole: the matrices that give activations: gate and up, in a plain MLP up.
        upper: the same of their upper three bits, the last one counted as its middle.
        biases: theirs.
        down: ``[intermediate, hidden]``.
    """

    whole: tuple[Tensor, ...]
    upper: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    down: Tensor
    act: Activation

    @classmethod
    def of(cls, mlp: FeedForward) -> FourBitMLP:
        w = mlp.matrices()
        rows, biases = ((w.up,), (w.up_bias,)) if w.gate is None else ((w.gate, w.up), (w.gate_bias, w.up_bias))
        pairs = [_numbers(matrix) for matrix in rows]
        whole, upper = zip(*pairs, strict=True)
        return cls(whole, upper, biases, _numbers(w.down.t())[0].t().contiguous(), mlp.act)

    def activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What each neuron gives, fp32 ``[tokens, intermediate]``: exactly, and by the upper bits. x: ``[tokens,
        hidden]``."""
        x = rounded(x.float())
        return self._activations(x, self.whole), self._activations(x, self.upper)

    def _activations(self, x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        values = [
            F.linear(x, matrix, None if bias is None else bias.float())
            for matrix, bias in zip(matrices, self.biases, strict=True)
        ]
        h = self.act(values[0])
        return h if len(values) == 1 else h * values[1]


def _numbers(weight: Tensor) -> tuple[Tensor, Tensor]:
    """What 4-bit groups of a matrix stand for, whole and with the last bit at its middle."""
    q, scale, least = group_weights(weight)
    whole, upper = (ungroup(values, scale, least).flatten(1) for values in (q, 2 * (q >> 1) + 0.5))
    return whole[:, : weight.shape[1]].contiguous(), upper[:, : weight.shape[1]].contiguous()


def rounded(x: Tensor) -> Tensor:
    """x ``[tokens, inputs]`` in 8 bits by groups of 32 inputs, as the kernels meet 4-bit weights."""
    groups = F.pad(x, (0, -x.shape[1] % GROUP))
    integers, step = quantize(groups.reshape(-1, GROUP))
    return (integers * step[:, None]).view_as(groups)[:, : x.shape[1]]


@dataclass(frozen=True, eq=False)
class Choice:
    """Which neurons the tokens of a sample keep.

    Attributes:
        least: the exact score that is kept.
        candidates, wanted: bool ``[tokens, neurons]``.
        means: what a neuron counts as where it is left out, ``[neurons]``.
    """

    least: float
    candidates: Tensor
    wanted: Tensor
    means: Tensor


@dataclass(frozen=True, eq=False)
class Scores:
    """What chooses in a layer, at the tokens of a sample.

    Attributes:
        a: activations, and `seen` what the upper bits say of them, times `norm`; both ``[tokens, neurons]``.
        norm: what a unit of each activation is worth.
        compensated: whether a neuron counts as its mean where it is left out.
    """

    a: Tensor
    seen: Tensor
    norm: Tensor
    compensated: bool

    @classmethod
    def of(cls, mlp: FourBitMLP, x: Tensor, norm: Tensor, *, mean: bool) -> Scores:
        a, seen = mlp.activations(x)
        return cls(a, seen.abs_().mul_(norm), norm, mean)

    def from_threshold(self, least: float, ratio: float, means: Tensor) -> Choice:
        """What scores of `least` and more keep, given means; and the means then."""
        candidates = self.seen >= ratio * least
        wanted = (self._exact(means) >= least) & candidates
        means = means_when_left_out(self.a, wanted) if self.compensated else means
        return Choice(least, candidates, wanted, means)

    def from_share(self, share: float, ratio: float) -> Choice:
        """What keeps this share."""
        means = torch.zeros_like(self.norm)
        for _ in range(_ROUNDS):
            score = self._exact(means)
            # what both thresholds let through, one being a share of the other
            score = torch.minimum(score, self.seen / ratio) if ratio else score
            found = self.from_threshold(quantile(score, 1 - share), ratio, means)
            means = found.means
        return found

    def _exact(self, means: Tensor) -> Tensor:
        return (self.a - means).abs_().mul_(self.norm)


@dataclass(frozen=True)
class Point:
    """One way of leaving neurons out of a layer, `ratio` None being none.

    Attributes:
        kept: the share of the neurons.
        nbytes: read for a token.
        loss: predicted, in nats a token.
    """

    kept: float
    ratio: float | None
    nbytes: float
    loss: float


def bytes_read(mlp: FourBitMLP, kept: float, candidates: float) -> float:
    """Bytes of weights that a token reads: numbers of 3 bits of every neuron, of the fourth of candidates, of 4 of down
    rows that are kept, and all ends of groups."""
    scoring = len(mlp.whole)
    each = scoring * (0.375 + 0.125 * candidates + 0.125) + 0.5 * kept + 0.125
    return each * mlp.down.numel()


def loss_curve(
    mlp: FourBitMLP, x: Tensor, norm: Tensor, information: Tensor, ratios: Sequence[float], *, mean: bool = True
) -> list[Point]:
    """What leaving out each of `LEFT_OUT` by each of `ratios` reads and loses: the errors of the neurons are summed as
    they add up, which a sum of their norms does not know.

    information: what an error at the MLP's output costs, see `fisher_information`.
    """
    scores = Scores.of(mlp, x[:: max(1, x.shape[0] // _LOSS_TOKENS)], norm, mean=mean)
    points = [Point(1.0, None, 0.625 * mlp.down.numel() * (len(mlp.whole) + 1), 0.0)]
    ordered = (scores.a.abs() * norm).flatten().sort().values
    for ratio in ratios:
        means = torch.zeros_like(norm)
        for left_out in LEFT_OUT:
            least = max(float(ordered[int(left_out * ordered.numel())]), torch.finfo(torch.float32).tiny)
            means = scores.from_threshold(least, ratio, means).means
            found = scores.from_threshold(least, ratio, means)
            means = found.means
            error = torch.where(found.wanted, 0, scores.a - means) @ mlp.down
            loss = float(((error @ information) * error).sum(1).mean()) / 2
            kept, candidates = _share(found.wanted), _share(found.candidates)
            points.append(Point(kept, ratio, bytes_read(mlp, kept, candidates), loss))
    return points


def _share(wanted: Tensor) -> float:
    return float(wanted.float().mean())


def spread_bytes(curves: Sequence[Sequence[Point]], widths: Sequence[int], keep: float) -> list[Point]:
    """One point per layer, together about the share `keep` of all neurons, at the least sum of losses for the bytes.

    Bytes are saved where the next ones cost least: along the lower convex hulls of the layers' curves, whose first
    points are dense. What costs nothing, the zeros of a ReLU, is left out of every layer.
    """
    steps = []
    for layer, points in enumerate(curves):
        for before, after in pairwise(_hull(points)):
            steps.append(((after.loss - before.loss) / (before.nbytes - after.nbytes), layer, before, after))
    chosen = [points[0] for points in curves]
    spare = (1 - keep) * sum(widths)  # neurons that are still to be left out; below 0 after more zeros than that
    for price, layer, before, after in sorted(steps, key=lambda step: step[0]):
        neurons = (before.kept - after.kept) * widths[layer]
        if neurons > spare and price > 0:
            wanted = before.kept - max(spare, 0) / widths[layer]
            chosen[layer] = min(
                curves[layer], key=lambda p: (round(abs(p.kept - wanted) / 0.05), p.loss + price * p.nbytes)
            )
            break
        chosen[layer], spare = after, spare - neurons
    return chosen


def _hull(points: Sequence[Point]) -> list[Point]:
    """The corners of the lower convex hull of losses over bytes, from the first point down in bytes."""
    corners = [points[0]]
    while True:
        last = corners[-1]
        below = [p for p in points if p.nbytes < last.nbytes]
        if not below:
            return corners
        corners.append(min(below, key=lambda p: ((p.loss - last.loss) / (last.nbytes - p.nbytes), p.nbytes)))


def policy_of(scores: Scores, share: float, ratio: float) -> NeuronPolicy:
    """What keeps this share of a layer's neurons, by planes or, where `ratio` is 0, by exact scores."""
    found, least = scores.from_share(share, ratio), 1 / scores.norm.numel()
    means = found.means.cpu() if scores.compensated else None
    keep, norm = max(_share(found.wanted), least), scores.norm.cpu()
    if ratio == 0:
        return TopK(keep=keep, threshold=found.least, norm=norm, mean=means)
    return Sketch(
        bits=3, keep=keep, norm=norm, mean=means, threshold=ratio * found.least, refine=found.least,
        candidates=max(_share(found.candidates), least),
    )  # fmt: skip
