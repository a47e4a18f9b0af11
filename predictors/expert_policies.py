"""What a decode step may leave out of a mixture of experts: which of a token's experts run, and which exist at all.

A policy is one dataclass, registered under the name that plans save; what it makes a step do is one builder in
runtime/program.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .checks import check_count, check_share
from .errors import PlanError


class ExpertPolicy:
    """What one mixture computes at a decode step.

    name: what a saved plan calls the policy. by_prompt: whether each sequence's prompt decides.
    """

    name: ClassVar[str]
    by_prompt: ClassVar[bool] = False

    def check(self, count: int) -> None:
        """Raise `CoreskipError` where the policy does not fit a mixture of `count` experts."""

    def kept(self, count: int) -> int:
        """Experts of `count` that tokens may go to."""
        return count

    @property
    def active(self) -> float:
        """Share of a token's experts that is computed, on the calibration text."""
        return 1.0

    @property
    def words(self) -> str:
        """What else there is to say of those that are kept; "" where nothing is."""
        return ""


Policy = TypeVar("Policy", bound=type[ExpertPolicy])

EXPERT_POLICIES: dict[str, type[Any]] = {}


def expert_policy(cls: Policy) -> Policy:
    """Registers an expert policy under its name: plans with it can be saved and loaded."""
    if cls.name in EXPERT_POLICIES:
        raise ValueError(f"there is an expert policy {cls.name!r} already")
    EXPERT_POLICIES[cls.name] = cls
    return cls


@expert_policy
@dataclass(frozen=True)
class AllExperts(ExpertPolicy):
    """The experts that the router chooses."""

    name: ClassVar[str] = "all"


@expert_policy
@dataclass(frozen=True)
class SkipExperts(ExpertPolicy):
    """A token's experts whose weight is below `beta` times its largest are left out (dynamic expert skipping, arXiv
    2402.14800, section 3.3). Where the router's weights are normalised, those that stay keep the sum.

    `share`: of a token's experts that stays on the calibration text.
    """

    beta: float
    share: float = 1.0
    name: ClassVar[str] = "skip_experts"

    def check(self, count: int) -> None:
        if isinstance(self.beta, bool) or not isinstance(self.beta, (int, float)) or not 0 <= self.beta <= 1:
            raise PlanError(f"beta is {self.beta}: experts are skipped below a share of the first's weight, 0 to 1")
        check_share("share", self.share)

    @property
    def active(self) -> float:
        return self.share

    @property
    def words(self) -> str:
        return f"{self.active:.0%} of a token's (beta {self.beta:.3g})"


@expert_policy
@dataclass(frozen=True, eq=False)
class KeptExperts(ExpertPolicy):
    """Routing is restricted to fixed experts, as if the model had no others: their logits alone are scored, and the
    weights normalised as the router does it (REAP, arXiv 2510.13999, prunes a model so).

    `indices`: int64 ``[kept]``, ascending.
    """

    indices: Tensor
    name: ClassVar[str] = "experts"

    def check(self, count: int) -> None:
        i = self.indices
        if i.dtype != torch.int64 or i.ndim != 1 or i.numel() == 0 or not bool((i.diff() > 0).all()):
            raise PlanError("the kept experts must be a non-empty int64 array, ascending without repeats")
        if int(i[0]) < 0 or int(i[-1]) >= count:
            raise PlanError(f"kept experts out of range: {int(i[0])}..{int(i[-1])} of {count}")

    def kept(self, count: int) -> int:
        return int(self.indices.numel())


@expert_policy
@dataclass(frozen=True)
class CoreExperts(ExpertPolicy):
    """Routing is restricted, from the end of a prompt on, to the experts that the prompt used most: CoreInfer's idea
    (arXiv 2410.18311) with experts in place of neurons. Each sequence has its own.

    `count`: experts that are kept.
    """

    count: int
    name: ClassVar[str] = "core_experts"
    by_prompt: ClassVar[bool] = True

    def check(self, count: int) -> None:
        check_count("count", self.count, 1)
        if self.count > count:
            raise PlanError(f"{self.count} experts are to be kept of {count}")

    def kept(self, count: int) -> int:
        return self.count

    @property
    def words(self) -> str:
        return "those that the prompt used most"

    def allowed(self, used: Tensor) -> Tensor:
        """Which experts are kept, bool ``[rows, experts]``: those with the largest sums of router weights over the
        prompt, `used` ``[rows, experts]``; of equal ones the first."""
        best = used.argsort(dim=-1, descending=True, stable=True)[:, : self.count]
        return torch.zeros_like(used, dtype=torch.bool).scatter_(1, best, True)


@expert_policy
@dataclass(frozen=True, eq=False)
class ThinExperts(ExpertPolicy):
    """Of a token's experts the neurons are left out whose gates are hardly open (CATS, arXiv 2404.08763, in every
    expert): gates are read whole, rows of up and down for the others alone.

    `least`: float32 ``[experts]``, of the absolute value of an activated gate. `share`: of the neurons of a token's
    experts that stays on the calibration text.
    """

    least: Tensor
    share: float
    name: ClassVar[str] = "thin_experts"

    def check(self, count: int) -> None:
        if self.least.dtype != torch.float32 or self.least.shape != (count,):
            raise PlanError(f"least must be float32 of {count} experts")
        if not bool((self.least >= 0).all() & self.least.isfinite().all()):
            raise PlanError("thresholds of gates must be numbers from 0 on")
        check_share("share", self.share)

    @property
    def words(self) -> str:
        return f"{self.share:.0%} of the neurons of a token's"
