"""What the experts of a mixture are worth, from one pass over the calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .anatomy import Anatomy, Experts, dissect
from .checks import ExpertScore
from .errors import CoreskipError
from .expert_policies import ExpertPolicy, KeptExperts, SkipExperts, ThinExperts
from .importance import kept_count
from .observe import inference

_GATES = 256  # tokens of each expert whose gates are kept


@dataclass(eq=False)
class ExpertStats:
    """Of one mixture, over the tokens observed.

    Attributes:
        tokens: int64 ``[experts]``, tokens that went to each.
        weighted: float64 ``[experts]``, the sum over these of router weight times the norm of the expert's output.
        gates: by expert, how far its neurons' gates were open, per batch ``[tokens, neurons]``, of the first `_GATES`
            tokens or so; none where its gates cannot be seen.
        ratios: per batch, each chosen expert's weight as a share of its token's largest, fp32 ``[tokens, top_k]``.
    """

    tokens: Tensor
    weighted: Tensor
    ratios: list[Tensor] = field(default_factory=list)
    gates: list[list[Tensor]] = field(default_factory=list)

    @classmethod
    def empty(cls, count: int) -> ExpertStats:
        return cls(
            torch.zeros(count, dtype=torch.int64, device="cpu"), torch.zeros(count, dtype=torch.float64, device="cpu")
        )

    def see(self, experts: Experts, x: Tensor, index: Tensor, weights: Tensor) -> None:
        """x ``[tokens, hidden]`` goes to experts `index` ``[tokens, top_k]`` with these weights."""
        for expert in index.unique().tolist():
            token, place = torch.where(index == expert)
            factor = weights[token, place, None]
            given = x[token] * factor.to(x.dtype) if experts.scaled_inputs else x[token]
            norms = experts.formula(given, expert).float().norm(dim=-1)
            if not experts.scaled_inputs:  # else the output has the weight in it already
                norms = norms * factor[:, 0].float()
            if experts.gating is not None and experts.gated and self.tokens[expert] < _GATES:
                self.gates = self.gates or [[] for _ in range(experts.count)]
                self.gates[expert].append(experts.opened(given[:_GATES], expert)[0].abs().float().cpu())
            self.tokens[expert] += len(token)
            self.weighted[expert] += norms.double().sum().cpu()
        largest = weights.float().amax(-1, keepdim=True).clamp(min=1e-30)
        self.ratios.append((weights.float() / largest).cpu())

    def scores(self, score: ExpertScore, generator: torch.Generator) -> Tensor:
        """What each expert is worth, ``[experts]``. reap: the mean, over the tokens that went to it, of router weight
        times the norm of its output (arXiv 2510.13999, section 4)."""
        if score == "frequency":
            return self.tokens.double()
        if score == "random":
            return torch.rand(len(self.tokens), generator=generator, dtype=torch.float64, device="cpu")
        return self.weighted / self.tokens.clamp(min=1)


def observe_experts(
    model: Any, batches: Iterable[Tensor], *, total: int | None, progress: bool
) -> list[ExpertStats | None]:
    """By layer, what its experts did in dense passes over token ids ``[rows, length]`` without padding; None where it
    has none.

    Raises:
        CoreskipError: the model has no experts.
    """
    anatomy = dissect(model)
    check_experts(anatomy)
    stats = [None if experts is None else ExpertStats.empty(experts.count) for experts in anatomy.experts]

    def see(layer: int, x: Tensor, index: Tensor, weights: Tensor) -> None:
        cast(ExpertStats, stats[layer]).see(cast(Experts, anatomy.experts[layer]), x, index, weights)

    bar = tqdm(batches, total=total, desc="observing experts", unit="batch", disable=not progress, leave=False)
    with inference(model), routed(anatomy, see), bar:
        for ids in bar:
            anatomy.stack(input_ids=ids.to(model.device), use_cache=False)
    return stats


def check_experts(anatomy: Anatomy) -> None:
    """Raises CoreskipError where no layer has experts."""
    if not any(anatomy.experts):
        raise CoreskipError(
            f"{anatomy.model_type!r} models have no experts: give a method that chooses neurons, or leave it out"
        )


@contextmanager
def routed(anatomy: Anatomy, see: Callable[[int, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls `see(layer, x, index, weights)` with what every mixture's experts are given."""
    handles = []

    def before(layer: int, experts: Experts) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(layer, *experts.routed(args, kwargs))

        return hook

    try:
        for layer, experts in enumerate(anatomy.experts):
            if experts is not None:
                entrance = experts.entrance
                handles.append(entrance.register_forward_pre_hook(before(layer, experts), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def kept_experts(
    stats: ExpertStats, score: ExpertScore, keep: float, top_k: int, generator: torch.Generator
) -> ExpertPolicy:
    """The share `keep` of the experts, those of the highest score, and as many as a token goes to at least."""
    count = max(top_k, kept_count(len(stats.tokens), keep))
    best = stats.scores(score, generator).argsort(descending=True, stable=True)[:count]
    return KeptExperts(best.sort().values)


def thin_experts(stats: ExpertStats, keep: float) -> ThinExperts:
    """Thresholds at which each expert keeps the share `keep` of its neurons; of one that no token went to, all.

    Raises:
        CoreskipError: the experts have no gates, or these cannot be seen.
    """
    if not stats.gates:
        raise CoreskipError("its experts have no gates by which neurons could be left out")
    least = [torch.cat(seen).flatten().quantile(1 - keep) if seen else torch.zeros(()) for seen in stats.gates]
    kept = [(torch.cat(seen) >= some).double().mean() for seen, some in zip(stats.gates, least, strict=True) if seen]
    return ThinExperts(torch.stack(least).float(), float(torch.stack(kept).mean()))


def skipped_experts(stats: ExpertStats, keep: float, beta: float | None = None) -> SkipExperts:
    """The `beta` given, or that at which the share `keep` of what tokens were routed to stays: every token's first at
    least. With two experts a token, 0.75 is the median of their ratio, which the paper takes."""
    ratios = torch.cat(stats.ratios).flatten().sort().values
    if beta is None:
        dropped = min(round((1 - keep) * len(ratios)), len(ratios) - 1)
        beta = min(1.0, float(ratios[dropped])) if dropped else 0.0
    return SkipExperts(beta, float((ratios >= beta).double().mean()))
