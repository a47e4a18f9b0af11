"""Leaving neurons out of MLPs whose weights are 4-bit groups: what the kernels see of them, and what that loses and
saves.

A neuron is a candidate by what is cheap to know of it, and kept by its exact score; only kept neurons' down rows are
read. Three forms differ in what is cheap. Planes: the upper three bits of gate and up. Gates: gate rows are read whole,
up rows of candidates alone. Rows: gate and up are read whole, everything is a candidate.

On the embedded model, bytes spread over the layers by `spread_bytes`, 12 windows, at 0.85, 0.82, 0.79 and 0.76 of a
dense MLP's bytes: KL divergence from dense int4, and perplexity above its.

    gates   0.0063 0.0116 0.0204 0.0323   +0.5 +0.9 +1.6 +2.6 %
    planes  0.0106 0.0193 0.0336 0.0539   +1.1 +1.7 +2.6 +4.7 %
    rows    0.0314 0.0722 0.1766          +2.7 +6.6 +17 %
    gates, off the 4-bit grid (rescaled and rounded): 0.0075 0.0142 0.0250, +0.6 +1.6 +2.9 %
    with equal shares, at 0.85 and 0.79: gates 0.0065 0.0217, planes 0.0112 0.0358; no means, 0.79: 0.0214, 0.0364
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..kernels.groups import GROUP, group_weights, ungroup
from ..kernels.packed import quantize
from .anatomy import Activation, FeedForward
from .errors import CoreskipError
from .policies import Dense, NeuronPolicy, Sketch, TopK
from .token_samples import means_when_left_out, quantile

#: Shares of a layer's neurons between which an allocation by bytes chooses what is left out.
LEFT_OUT = tuple(round(0.05 * step, 2) for step in range(2, 19))
_TOKENS = 2048  # of which activations are computed anew for each plan
_LOSS_TOKENS = 512  # over which a predicted loss is averaged
_ROUNDS = 3  # means and threshold depend on one another, and settle at once
_WHOLE, _UPPER, _DOWN = 0.625, 0.5, 0.5  # bytes of a weight: in 4 bits with its ends, in 3, of a down row without ends
_ENDS = 0.125  # bytes of a down weight's ends, which rows share


class Form(Enum):
    """What makes a neuron a candidate."""

    PLANES = "planes"
    GATES = "gates"
    ROWS = "rows"

    @property
    def ratios(self) -> tuple[float, ...]:
        """What that must say of a neuron, as shares of the exact score that it then needs, between which an allocation
        by bytes chooses; 0 lets everything through. |act(gate)| counts with the size that its up usually has, so that
        most candidates have less than it says."""
        return {Form.PLANES: (0.35, 0.5, 0.7, 1.0), Form.GATES: (0.0, 1.0, 1.4, 1.8), Form.ROWS: (0.0,)}[self]

    @property
    def usual_ratio(self) -> float:
        """Where the allocation does not choose one."""
        return {Form.PLANES: 0.7, Form.GATES: 1.4, Form.ROWS: 0.0}[self]

    def bytes_read(self, mlp: FourBitMLP, kept: float, candidates: float) -> float:
        """Bytes of weights that a token reads, of which these shares are completed and kept."""
        scoring = len(mlp.whole)
        each = {
            Form.PLANES: scoring * (_UPPER + (_WHOLE - _UPPER) * candidates),
            Form.GATES: _WHOLE * (1 + (scoring - 1) * candidates),
            Form.ROWS: scoring * _WHOLE,
        }[self]
        return (each + _DOWN * kept + _ENDS) * mlp.down.numel()


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
        whole, upper = zip(*(_numbers(matrix) for matrix in rows), strict=True)
        return cls(whole, upper, biases, _numbers(w.down.t())[0].t().contiguous(), mlp.act)

    @property
    def nbytes(self) -> float:
        """Bytes of weights that a token reads that leaves nothing out."""
        return _WHOLE * (len(self.whole) + 1) * self.down.numel()

    def parts(self, x: Tensor, matrices: Sequence[Tensor]) -> list[Tensor]:
        """act(gate) and up, in a plain MLP act(up), fp32 ``[tokens, intermediate]`` each. x: ``[tokens, hidden]``."""
        x = rounded(x.float())
        values = [
            F.linear(x, matrix, None if bias is None else bias.float())
            for matrix, bias in zip(matrices, self.biases, strict=True)
        ]
        return [self.act(values[0]), *values[1:]]

    def activations(self, x: Tensor) -> Tensor:
        """fp32 ``[tokens, intermediate]``, as all four bits give them."""
        return product(self.parts(x, self.whole))

    def estimates(self, x: Tensor) -> Tensor:
        """As the upper three bits do."""
        return product(self.parts(x, self.upper))


def product(parts: Sequence[Tensor]) -> Tensor:
    """Activations, of what `FourBitMLP.parts` gives."""
    return parts[0] if len(parts) == 1 else parts[0] * parts[1]


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
        a: activations. seen: what makes candidates. Both ``[tokens, neurons]``.
        norm: what a unit of each activation is worth.
        reach: what a unit of |act(gate)| is worth: norm times the usual size of up.
        compensated: whether a neuron counts as its mean where it is left out.
    """

    form: Form
    a: Tensor
    seen: Tensor
    norm: Tensor
    reach: Tensor
    compensated: bool

    @classmethod
    def of(cls, form: Form, mlp: FourBitMLP, x: Tensor, norm: Tensor, *, mean: bool) -> Scores:
        parts = mlp.parts(x, mlp.whole)
        reach = norm * (parts[1].square().mean(0).sqrt() if len(parts) == 2 else 1)
        a = product(parts)
        seen = parts[0].abs() * reach if form is Form.GATES else a
        seen = mlp.estimates(x).abs_().mul_(norm) if form is Form.PLANES else seen
        return cls(form, a, seen, norm, reach, mean)

    def from_threshold(self, least: float, ratio: float, means: Tensor) -> Choice:
        """What scores of `least` and more keep, given means; and the means then."""
        exact = self._exact(means) >= least
        candidates = self.seen >= ratio * least if ratio else torch.ones_like(exact)
        wanted = exact & candidates
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


def loss_curve(
    form: Form, mlp: FourBitMLP, x: Tensor, norm: Tensor, information: Tensor, *, mean: bool = True
) -> list[Point]:
    """What leaving out each of `LEFT_OUT` by each of the form's ratios reads and loses: the errors of the neurons are
    summed as they add up, which a sum of their norms does not know.

    information: what an error at the MLP's output costs, see `fisher_information`.
    """
    scores = Scores.of(form, mlp, _some(x, _LOSS_TOKENS), norm, mean=mean)
    points = [Point(1.0, None, mlp.nbytes, 0.0)]
    ordered = (scores.a.abs() * norm).flatten().sort().values
    for ratio in form.ratios:
        means = torch.zeros_like(norm)
        for left_out in LEFT_OUT:
            least = max(float(ordered[int(left_out * ordered.numel())]), torch.finfo(torch.float32).tiny)
            means = scores.from_threshold(least, ratio, means).means
            found = scores.from_threshold(least, ratio, means)
            means = found.means
            error = torch.where(found.wanted, 0, scores.a - means) @ mlp.down
            loss = float(((error @ information) * error).sum(1).mean()) / 2
            kept, candidates = _share(found.wanted), _share(found.candidates)
            points.append(Point(kept, ratio, form.bytes_read(mlp, kept, candidates), loss))
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
    """What keeps this share of a layer's neurons."""
    found, one = scores.from_share(share, ratio), 1 / scores.norm.numel()
    means = found.means.cpu() if scores.compensated else None
    keep, candidates, norm = max(_share(found.wanted), one), max(_share(found.candidates), one), scores.norm.cpu()
    if scores.form is Form.PLANES:
        return Sketch(
            bits=3, keep=keep, norm=norm, mean=means,
            threshold=ratio * found.least, candidates=candidates, refine=found.least,
        )  # fmt: skip
    if ratio == 0:
        return TopK(keep=keep, threshold=found.least, norm=norm, mean=means)
    return TopK(
        keep=keep, threshold=found.least, norm=norm, mean=means,
        gate=ratio * found.least, reach=scores.reach.cpu(), candidates=candidates,
    )  # fmt: skip


class FourBits:
    """The MLPs of one model and the sampled inputs of each, and what leaves neurons out of them.

    One layer's numbers are held at a time: twice its matrices and some activations, in fp32.

    Args:
        hidden: per layer, ``[tokens, hidden]``.
        norms: what a unit of each activation is worth, by which a layer's neurons are ranked, see `fisher_norms`. On
            the embedded model, with equal shares of half by exact scores, a KL divergence of 0.0186; 0.0194 by the
            norms of down rows.
        information: see `fisher_information`.
    """

    def __init__(
        self,
        mlps: Sequence[FeedForward],
        hidden: Sequence[Tensor],
        norms: Sequence[Tensor],
        information: Sequence[Tensor],
        *,
        progress: bool = True,
    ) -> None:
        self._mlps, self._hidden, self._norms, self._information = mlps, hidden, norms, information
        self._progress = progress
        self._known: dict[tuple[Form, bool], list[list[Point]]] = {}

    def spread(self, form: Form, keep: float, *, mean: bool = True) -> list[NeuronPolicy]:
        """A policy per layer, together keeping about this share where that saves most bytes for what it loses."""
        points = spread_bytes(self._curves(form, mean), [mlp.intermediate_size for mlp in self._mlps], keep)
        return self.policies(form, [(point.kept, point.ratio or 0.0) for point in points], mean=mean)

    def policies(self, form: Form, shares: Sequence[tuple[float, float]], *, mean: bool = True) -> list[NeuronPolicy]:
        """A policy per layer that keeps this share, by this ratio."""
        _check_form(form, self._mlps)
        found: list[NeuronPolicy] = []
        for mlp, x, norm, (share, ratio) in zip(self._mlps, self._hidden, self._norms, shares, strict=True):
            if share >= 1:
                found.append(Dense())
                continue
            scores = Scores.of(form, FourBitMLP.of(mlp), _some(x, _TOKENS), norm, mean=mean)
            found.append(policy_of(scores, share, ratio))
        return found

    def _curves(self, form: Form, mean: bool) -> list[list[Point]]:
        if (form, mean) not in self._known:
            _check_form(form, self._mlps)
            layers = zip(self._mlps, self._hidden, self._norms, self._information, strict=True)
            bar = tqdm(layers, desc="shares", total=len(self._mlps), disable=not self._progress, leave=False)
            self._known[form, mean] = [
                loss_curve(form, FourBitMLP.of(mlp), x, norm, matrix, mean=mean) for mlp, x, norm, matrix in bar
            ]
        return self._known[form, mean]


def _check_form(form: Form, mlps: Sequence[FeedForward]) -> None:
    if form is Form.GATES and not all(mlp.gated for mlp in mlps):
        raise CoreskipError("this model's MLPs have no gate that could choose before up rows are read")


def _some(x: Tensor, most: int) -> Tensor:
    """At most so many rows, evenly spread."""
    return x[:: -(-x.shape[0] // most)]
