"""Scores from what neurons do on a text: the four of core neurons, Wanda's, and REAP's for experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .checks import ExpertScore, Score, check_share
from .expert_scores import observe_experts
from .importance import token_contributions
from .observe import down_norm
from .scores import Unit
from .sources import Reading, Source, needs_mlps, source


@dataclass(frozen=True)
class _Contributions(Source):
    """Sums of `token_contributions` over the text: of each token, how much a neuron adds to its score. One pass."""

    alpha: float = 0.4
    by: ClassVar[Score]

    def check(self) -> None:
        check_share("alpha", self.alpha)

    def score(self, reading: Reading) -> list[Tensor]:
        needs_mlps(reading, self.name)
        norms = {index: down_norm(mlp) for index, mlp in reading.anatomy.present}

        def contributions(layer: int, a: Tensor) -> Tensor:
            return token_contributions(a, self.by, self.alpha, norms[layer])

        return reading.summed(reading.rows, f"scoring by {self.name}", contributions)


@source
@dataclass(frozen=True)
class Griffin(_Contributions):
    """Activations relative to their token's, squared and summed (GRIFFIN, arXiv 2404.01365, section 4)."""

    name: ClassVar[str] = "griffin"
    by: ClassVar[Score] = "griffin"


@source
@dataclass(frozen=True)
class Signed(_Contributions):
    """Tokens of whose positive activations a neuron is in the top share `alpha` (CoreInfer, arXiv 2410.18311, section
    3)."""

    name: ClassVar[str] = "signed"
    by: ClassVar[Score] = "signed"


@source
@dataclass(frozen=True)
class Magnitude(_Contributions):
    """Tokens in whose top share `alpha` by ``|a|`` a neuron is."""

    name: ClassVar[str] = "magnitude"
    by: ClassVar[Score] = "magnitude"


@source
@dataclass(frozen=True)
class MagnitudeDown(_Contributions):
    """Tokens in whose top share `alpha` by ``|a| * ||down||`` a neuron is."""

    name: ClassVar[str] = "magnitude_down"
    by: ClassVar[Score] = "magnitude_down"


@source
@dataclass(frozen=True)
class Wanda(Source):
    """``sum_i |W_ij| * ||a_j||`` over the outputs i of the down projection W, with the norm over all tokens: Wanda's
    score of a weight, |W_ij| * ||x_j|| (arXiv 2306.11695, section 3, equation 1), summed over the weights that go with
    neuron j. The source scores single weights; the sum over a neuron's is ours. One pass."""

    name: ClassVar[str] = "wanda"

    def score(self, reading: Reading) -> list[Tensor]:
        needs_mlps(reading, self.name)
        squares = reading.summed(reading.rows, "scoring by wanda", lambda layer, a: a.square())
        for index, mlp in reading.anatomy.present:
            squares[index] = squares[index].sqrt() * mlp.matrices().down.float().abs().sum(1).double()
        return squares


@dataclass(frozen=True)
class _OfExperts(Source):
    """Scores of a mixture's experts, from one dense pass; see `ExpertStats.scores`."""

    by: ClassVar[ExpertScore]

    @property
    def unit(self) -> Unit:
        return "experts"

    def score(self, reading: Reading) -> list[Tensor]:
        rows = reading.rows
        stats = observe_experts(reading.model, rows.split(1), total=len(rows), progress=reading.progress)
        generator = torch.Generator().manual_seed(reading.seed)
        return [torch.zeros(0) if found is None else found.scores(self.by, generator) for found in stats]


@source
@dataclass(frozen=True)
class Reap(_OfExperts):
    """Of every expert, the mean over its tokens of router weight times the norm of its output (REAP, arXiv 2510.13999,
    section 4)."""

    name: ClassVar[str] = "reap"
    by: ClassVar[ExpertScore] = "reap"


@source
@dataclass(frozen=True)
class Frequency(_OfExperts):
    """Of every expert, how many tokens were routed to it."""

    name: ClassVar[str] = "frequency"
    by: ClassVar[ExpertScore] = "frequency"
