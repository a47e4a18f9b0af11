"""Rounding one matrix to groups of 4, 5 or 8 bits so that its outputs, not its numbers, stay close.

GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv 2210.17323) rounds input by input and pushes what each rounding errs by onto the inputs that are still to come.
Coordinate descent then goes over the numbers and the ends of the groups again, now that all others are known
(QuantEase, arXiv 2309.01885). Inside, matrices are transposed, ``[inputs, rows]``: what is done to one input of all
rows is then one run of memory.

What was chosen by measurement: the squared error of the outputs on other text, as a share of plain rounding's, the
geometric mean over the linears of three layers of the embedded model (rescaled, see `bench/finetune.py`), 8192 tokens
unless said:

    ends of a group: its range 0.62, searched 0.43; then coordinate descent, sweeps: 1 0.41, 3 0.40, 10 0.40
    inputs by falling weight, ends from the original weights: 0.43; in their order, ends from the original weights: 0.45
    damping, 3 sweeps: 0.001 0.41, 0.01 0.40, 0.05 0.39; tokens, 3 sweeps, damping 0.01: 2048 0.58, 4096 0.47

On the calibration text itself it is 0.18 with 2048 tokens and 0.27 with 8192: more text helps most of all.
The KL divergence with the first six layers rounded, 4096 tokens: plainly 0.031, damping 0.05 0.0106, 0.2 0.0093.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.groups import GROUP
from .errors import CoreskipError

SWEEPS = 1  # of coordinate descent
_DAMPING = 0.2  # of the mean diagonal is added to it; GPTQ adds 0.01
_FILL = 1e-6  # of the mean diagonal is that of inputs that only fill up a group
_BLOCK = 128  # inputs whose errors reach the inputs behind them in one matrix product
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)  # shares of a group's range that its ends are tried at
_FITS = 2  # least squares for the ends, after each of which the numbers are rounded anew
_LEVELS = {"int4": (0, 15), "int5": (0, 31), "int8_groups": (1, 255)}
_CENTRED = "int8_groups"  # has one end, the others two


@dataclass(frozen=True, eq=False)
class Groups:
    """A rounded matrix: w = scale * q + least.

    q: uint8 ``[rows, groups, 32]``. scale, least: ``[rows, groups]`` of float32, holding float16 numbers; of
    "int8_groups" least is -128 scales.
    """

    q: Tensor
    scale: Tensor
    least: Tensor

    def split(self, rows: Sequence[int]) -> list[Groups]:
        """Matrices that were rounded one below the other."""
        parts = (self.q.split(list(rows)), self.scale.split(list(rows)), self.least.split(list(rows)))
        return [Groups(*some) for some in zip(*parts, strict=True)]

    @classmethod
    def joined(cls, parts: Sequence[Groups]) -> Groups:
        """Matrices one below the other."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("q", "scale", "least")))

    def values(self, inputs: int) -> Tensor:
        """The rounded numbers, float32 ``[rows, inputs]``."""
        whole = self.q.float() * self.scale[..., None] + self.least[..., None]
        return whole.flatten(1)[:, :inputs]


class Compensation:
    """What the inputs of a matrix are like, and so how an error of one weight is made up for by others.

    Args:
        gram: X'X over the inputs of calibration tokens, ``[inputs, inputs]`` of float32.
        damping: see `_DAMPING`; keeps what few tokens say of rare directions from being believed.
    """

    def __init__(self, gram: Tensor, damping: float | None = None) -> None:
        if not gram.isfinite().all():
            raise CoreskipError(
                "the model's activations on this text are infinite or NaN: nothing can be rounded by them"
            )
        damping = _DAMPING if damping is None else damping
        fill = -gram.shape[0] % GROUP
        self._inputs = gram.shape[0]
        diagonal = gram.diagonal().double()
        mean = diagonal.mean().clamp_min(1e-12)
        hessian = F.pad(gram.double(), (0, fill, 0, fill))
        # the inputs that fill up the last group are of next to no weight, and touch no others
        floor = F.pad(torch.full_like(diagonal, float(damping * mean)), (0, fill), value=float(_FILL * mean))
        hessian.diagonal().add_(floor)
        self._cholesky = torch.linalg.cholesky(hessian)
        self._hessian = hessian.float()
        self._inverse = torch.cholesky_inverse(self._cholesky)
        # directions that the tokens, rather than the damping, decide
        self._freedom = self._inputs - float(damping * mean) * float(self._inverse.diagonal()[: self._inputs].sum())

    def optimism(self, tokens: int) -> float:
        """By what the squared error on the calibration tokens has to be multiplied to tell that on other text, as in
        generalised cross-validation (Golub, Heath and Wahba 1979). Measured for 1536 inputs, damping 0.01: 1.7 with
        8192 tokens, 2.8 with 4096; undamped, this were 1.5 and 2.6."""
        return max(1 - self._freedom / tokens, 0.25) ** -2

    def shifted(self, weight: Tensor, cross: Tensor) -> Tensor:
        """The weight whose outputs on the inputs as they are come closest to the original's on the inputs as they were:
        what the layers before have lost is made up for as well as a linear can (GPTAQ, arXiv 2504.02692).

        weight: ``[rows, inputs]``; cross: X'(Y - X), ``[inputs, inputs]``, Y being the original inputs.
        """
        fill = self._hessian.shape[0] - self._inputs
        if len(weight) < self._inputs:
            moved = F.pad(cross @ weight.t(), (0, 0, 0, fill)).double()
            return weight + torch.cholesky_solve(moved, self._cholesky)[: self._inputs].t().float()
        by = torch.cholesky_solve(F.pad(cross, (0, 0, 0, fill)).double(), self._cholesky)[: self._inputs]
        return weight + weight @ by.t().float()

    def round(self, weight: Tensor, fmt: str) -> Groups:
        """weight: ``[rows, inputs]`` of float32; fmt: "int4", "int5" or "int8_groups"."""
        target = weight.t().contiguous()
        fill = self._hessian.shape[0] - self._inputs
        if fill:  # like the last input, so that they widen no range
            target = torch.cat([target, target[-1:].expand(fill, -1)])
        rounding = _Rounding(target, fmt)
        rounding.push(torch.linalg.cholesky(self._inverse, upper=True).float())
        for _ in range(SWEEPS):
            rounding.sweep(self._hessian)
        return rounding.groups()


class _Rounding:
    """A matrix while it is rounded: numbers `q` ``[inputs, rows]`` in float32, ends ``[groups, rows]``."""

    def __init__(self, target: Tensor, fmt: str) -> None:
        self._target, self._fmt, self._levels = target, fmt, _LEVELS[fmt]
        inputs, rows = target.shape
        self.q = torch.empty_like(target)
        self.scale, self.least = target.new_empty(inputs // GROUP, rows), target.new_empty(inputs // GROUP, rows)

    def push(self, factor: Tensor) -> None:
        """GPTQ. factor: the upper Cholesky factor of the Hessian's inverse.

        The ends of a group are chosen when it is reached, on weights that hold the errors so far, and under the
        weights by which GPTQ's own loss counts an error of each input, the squared inverse of the factor's diagonal.
        """
        w = self._target.clone()
        weights = factor.diagonal().reciprocal().square()
        for start in range(0, len(w), _BLOCK):
            stop = min(start + _BLOCK, len(w))
            errors = torch.empty_like(w[start:stop])
            for first in range(start, stop, GROUP):
                last = first + GROUP
                self._fit(first // GROUP, w[first:last], weights[first:last])
                self._round_group(first, w[first:last], factor[first:last, first:last], errors[first - start :])
                of_group = errors[first - start : last - start]
                w[last:stop].addmm_(factor[first:last, last:stop].t(), of_group, alpha=-1)
            w[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)

    def _fit(self, group: int, w: Tensor, weights: Tensor) -> None:
        if self._fmt != _CENTRED:
            self.scale[group], self.least[group] = fitted_ends(w, weights, self._levels)
        else:
            self.scale[group] = _half(w.abs().amax(0) / 127)
            self.least[group] = -128 * self.scale[group]

    def _round_group(self, first: int, w: Tensor, factor: Tensor, errors: Tensor) -> None:
        scale, least = self.scale[first // GROUP], self.least[first // GROUP]
        diagonal = factor.diagonal().tolist()
        for i in range(GROUP):
            steps = _steps(w[i], scale, least, self._levels)
            self.q[first + i] = steps
            torch.sub(w[i], steps * scale + least, out=errors[i])
            errors[i] /= diagonal[i]
            w[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)

    def sweep(self, hessian: Tensor) -> None:
        """Coordinate descent on the outputs' squared error: per group the ends by least squares, then each number."""
        values = self._values()
        gradient = hessian @ (self._target - values)
        for group in range(len(self.scale)):
            span = slice(group * GROUP, (group + 1) * GROUP)
            moved = self._descend(group, hessian[span, span].contiguous(), gradient[span], values[span])
            gradient.addmm_(hessian[:, span], moved, alpha=-1)

    def _descend(self, group: int, hessian: Tensor, gradient: Tensor, old: Tensor) -> Tensor:
        """What the values of a group change by."""
        q = self.q[group * GROUP : (group + 1) * GROUP]
        new, gradient = old.clone(), gradient.clone()
        if self._fmt != _CENTRED:
            ends = self.scale[group], self.least[group]
            self.scale[group], self.least[group] = _refitted(hessian, gradient + hessian @ old, q, *ends)
            new = q * self.scale[group] + self.least[group]
            gradient.addmm_(hessian, new - old, alpha=-1)
        scale, least, diagonal = self.scale[group], self.least[group], hessian.diagonal().tolist()
        for i in range(GROUP):
            steps = _steps(new[i] + gradient[i] / diagonal[i], scale, least, self._levels)
            moved = steps * scale + least - new[i]
            q[i] = steps
            new[i] += moved
            gradient.addr_(hessian[:, i], moved, alpha=-1)
        return q * scale + least - old

    def _values(self) -> Tensor:
        q = self.q.view(-1, GROUP, self.q.shape[1])
        return (q * self.scale[:, None] + self.least[:, None]).view_as(self.q)

    def groups(self) -> Groups:
        q = self.q.to(torch.uint8).t().contiguous().view(self.q.shape[1], -1, GROUP)
        return Groups(q, self.scale.t().contiguous(), self.least.t().contiguous())


def nearest_bytes(weight: Tensor) -> Groups:
    """weight, ``[rows, inputs]``, in "int8_groups", each number for itself."""
    w = F.pad(weight.float(), (0, -weight.shape[1] % GROUP)).view(len(weight), -1, GROUP)
    scale = _half(w.abs().amax(-1) / 127)
    least = -128 * scale
    return Groups(_steps(w, scale[..., None], least[..., None], _LEVELS[_CENTRED]).to(torch.uint8), scale, least)


def fitted_ends(w: Tensor, weights: Tensor, levels: tuple[int, int] = _LEVELS["int4"]) -> tuple[Tensor, Tensor]:
    """scale and least ``[rows]`` of groups w ``[32, rows]`` that minimise the squared error under `weights`
    ``[32]``: from several shares of the range, each improved by least squares, given the numbers.

    The whole range is the first guess, which is exact for numbers that were made that way.
    """
    weights = (weights / weights.sum().clamp_min(1e-30))[:, None]
    low, high = w.amin(0), w.amax(0)
    middle, half, mean = (low + high) / 2, (high - low) / 2, (weights * w).sum(0)
    best = torch.full_like(low, torch.inf)
    scale = least = low
    for shrink in _SHRINK:
        guess = _half(half * (2 * shrink / levels[1])), _half(low if shrink == 1 else middle - shrink * half)
        for fit in range(_FITS + 1):
            q = _steps(w, *guess, levels)
            error = (weights * (w - (q * guess[0] + guess[1])).square()).sum(0)
            better = error < best
            best = torch.where(better, error, best)
            scale, least = torch.where(better, guess[0], scale), torch.where(better, guess[1], least)
            if fit < _FITS:
                mean_q = (weights * q).sum(0)
                q -= mean_q
                slope = _half((weights * q * (w - mean)).sum(0) / (weights * q.square()).sum(0).clamp_min(1e-20))
                guess = slope, _half(mean - slope * mean_q)
    return scale, least


def _refitted(hessian: Tensor, pull: Tensor, q: Tensor, scale: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """The ends ``[rows]`` that minimise v'Hv - 2 v'pull over v = scale * q + least, where that is better than those
    there are: two linear equations per row."""
    with_q, with_one = hessian @ q, hessian.sum(1, keepdim=True)
    qq, q1, one = (q * with_q).sum(0), (q * with_one).sum(0), hessian.sum()
    q_pull, one_pull = (q * pull).sum(0), pull.sum(0)
    determinant = qq * one - q1.square()
    some = determinant > 1e-6 * qq * one  # else all numbers of the group are the same
    slope = _half((one * q_pull - q1 * one_pull) / torch.where(some, determinant, 1.0))
    offset = _half((one_pull - q1 * slope) / one)

    def loss(scale: Tensor, least: Tensor) -> Tensor:
        return scale * (scale * qq + 2 * (least * q1 - q_pull)) + least * (least * one - 2 * one_pull)

    better = some & slope.isfinite() & offset.isfinite() & (loss(slope, offset) < loss(scale, least))
    return torch.where(better, slope, scale), torch.where(better, offset, least)


def _steps(w: Tensor, scale: Tensor, least: Tensor, levels: tuple[int, int]) -> Tensor:
    return ((w - least) / torch.where(scale == 0, 1.0, scale)).round_().clamp_(*levels)


def _half(values: Tensor) -> Tensor:
    return values.half().float()
