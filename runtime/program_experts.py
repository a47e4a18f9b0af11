"""What a plan makes a decode step do with mixtures of experts: one builder for each policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..predictors.anatomy import Experts
from ..predictors.errors import PlanError
from ..predictors.expert_policies import AllExperts, CoreExperts, ExpertPolicy, KeptExperts, SkipExperts, ThinExperts


@dataclass(frozen=True, eq=False)
class ExpertsProgram:
    """What a decode step does with one mixture of experts.

    Attributes:
        policy: of the plan.
        count, width: experts, and the neurons of one.
        top_k: experts of a token; 0: not known.
        active: experts computed for a token; where tokens differ, on the calibration text.
        nbytes: bytes of experts' weights that a step of one token reads; shared experts are bricks.
        allowed: bool ``[count]``: only these can be chosen, see `Choice.of`; None: all.
        beta: experts of a token are left out whose weight is below this share of its largest.
        normalised: whether the weights of the others then make up for theirs.
        by_prompt: what each sequence's prompt allows; None: it decides nothing.
        least: ``[experts]``, of the gates of neurons that are computed; None: all are.
        native: whether native steps make the choice.
    """

    policy: ExpertPolicy
    count: int
    width: int
    top_k: int
    active: float
    nbytes: float
    allowed: Tensor | None = None
    beta: float = 0.0
    normalised: bool = False
    by_prompt: CoreExperts | None = None
    least: Tensor | None = None
    native: bool = False

    @property
    def chooses(self) -> bool:
        """Whether it computes anything else than the model's router asks for."""
        restricted = self.allowed is not None or self.by_prompt is not None
        return restricted or self.least is not None or self.beta > 0

    def weights(self, given: Tensor) -> Tensor:
        """A token's weights ``[tokens, top_k]`` with 0 for the experts that are left out, fp32."""
        given = given.float()
        stay = given >= self.beta * given.amax(-1, keepdim=True)
        left = given.masked_fill(~stay, 0.0)
        return left * (given.sum(-1, keepdim=True) / left.sum(-1, keepdim=True)) if self.normalised else left


ExpertsBuilder = Callable[[Any, Experts], ExpertsProgram]
_EXPERTS_BUILDERS: dict[type[ExpertPolicy], ExpertsBuilder] = {}


def builds_experts(policy: type[ExpertPolicy]) -> Callable[[ExpertsBuilder], ExpertsBuilder]:
    """Registers a function as the builder of this policy."""

    def register(builder: ExpertsBuilder) -> ExpertsBuilder:
        _EXPERTS_BUILDERS[policy] = builder
        return builder

    return register


def build_experts(
    policy: ExpertPolicy, experts: Experts, dense: Callable[[Tensor], float] | None = None
) -> ExpertsProgram:
    """The program of one mixture under `policy`. dense: see `Program.of`; by default weights are read as loaded.

    Raises:
        PlanError: there is no builder for policies of this type, or the mixture is not one that it can be for.
    """
    builder = _EXPERTS_BUILDERS.get(type(policy))
    if builder is None:
        raise PlanError(f"nothing carries out the policy {policy.name!r}: register a builder for it")
    found = builder(policy, experts)
    if dense is None:
        return found
    return replace(found, nbytes=found.nbytes * dense(experts.down) / experts.down.element_size())


def _routed(policy: ExpertPolicy, experts: Experts, active: float, **choice: Any) -> ExpertsProgram:
    neuron = (3 if experts.gated else 2) * experts.hidden_size * experts.down.element_size()
    read = active * experts.intermediate_size * neuron
    return ExpertsProgram(
        policy, experts.count, experts.intermediate_size, experts.top_k, active, read, **choice
    )  # fmt: skip


@builds_experts(AllExperts)
def _all_experts(policy: ExpertPolicy, experts: Experts) -> ExpertsProgram:
    return _routed(policy, experts, experts.top_k)


@builds_experts(SkipExperts)
def _skip_experts(policy: SkipExperts, experts: Experts) -> ExpertsProgram:
    if policy.beta == 0:
        return _all_experts(policy, experts)
    _check_separate(experts)
    normalised = experts.router is not None and experts.router.choice.normalised
    active = max(1.0, policy.share * experts.top_k)
    known = experts.router is not None
    return _routed(policy, experts, active, beta=float(policy.beta), normalised=normalised, native=known)


@builds_experts(KeptExperts)
def _kept_experts(policy: KeptExperts, experts: Experts) -> ExpertsProgram:
    kept = policy.kept(experts.count)
    if kept == experts.count:
        return _all_experts(policy, experts)
    _check_restricted(experts)
    allowed = torch.zeros(experts.count, dtype=torch.bool, device="cpu")
    allowed[policy.indices] = True
    return _routed(policy, experts, min(kept, experts.top_k), allowed=allowed, native=True)


@builds_experts(CoreExperts)
def _core_experts(policy: CoreExperts, experts: Experts) -> ExpertsProgram:
    if policy.count == experts.count:
        return _all_experts(policy, experts)
    _check_restricted(experts)
    return _routed(policy, experts, min(policy.count, experts.top_k), by_prompt=policy, native=True)


def _check_separate(experts: Experts) -> None:
    """Raises PlanError where no expert can be left out."""
    if experts.scaled_inputs:
        raise PlanError("every expert is given every token, multiplied by the router's weights: none can be left out")


def _check_restricted(experts: Experts) -> None:
    """Raises PlanError where a router's choice cannot be restricted to some experts."""
    _check_separate(experts)
    if experts.router is None:
        raise PlanError("what its router computes is not known: --method skip-experts can leave experts out")


@builds_experts(ThinExperts)
def _thin_experts(policy: ThinExperts, experts: Experts) -> ExpertsProgram:
    if experts.scaled_inputs or experts.gating is None or not experts.gated:
        raise PlanError("its experts have no gates by which neurons could be left out")
    whole = _routed(policy, experts, experts.top_k)
    return replace(whole, nbytes=whole.nbytes * (1 + 2 * policy.share) / 3, least=policy.least)
