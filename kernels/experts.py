"""Mixtures of experts: what a router gives each token, and the experts' matrices, packed one by one.

The definitions here are in plain torch; a native step (step.py) carries them out for up to 8 rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from . import reference
from .memory import allocate
from .packed import ACTS, PackedLinear

#: How a router scores experts: by the softmax of all logits, by their sigmoids, by the logits themselves, of which the
#: chosen ones' softmax or sigmoids weigh them, or as PhiMoE's sparse mixer does. In the order of the enum in
#: csrc/formats.h.
SCORINGS = ("softmax", "sigmoid", "softmax_of_chosen", "sparse_mixer", "sigmoid_of_chosen")
MOST_GROUPS = 256  # kMaxGroups in csrc/step_routing.h
_TOGETHER = 32 << 20  # bytes of matrices that share their memory

Multiply = Callable[[Tensor, PackedLinear], Tensor]


@dataclass(frozen=True, eq=False)
class Router:
    """Which experts a token gets, and what each of them counts.

    Attributes:
        logits: ``[experts, hidden]``; x meets it in float32.
        chosen: experts of a token.
        scoring: one of `SCORINGS`.
        correction: float32 ``[experts]``, added to scores where experts are chosen and not where they are weighed
            (DeepSeek-V3, arXiv 2412.19437, section 2.1.2), or None.
        groups, groups_kept: a token's experts come from so many of the groups of neighbouring experts; by_pairs: a
            group is as good as the sum of its two best, else as its best one.
        normalized: weights are divided by max(their sum + added, floor). scale: multiplies them after.
        jitter: of the sparse mixer (arXiv 2409.12136): logits count that are within twice this of the greatest.
        kept: uint8 ``[experts]``, 0 for experts that are as if the router had no row for them; None: all are kept.
        least: experts whose weight is below this share of the token's greatest one are left out, before weights are
            divided by their sum (arXiv 2402.14800, section 3.3).
    """

    logits: PackedLinear
    chosen: int
    scoring: str = "softmax"
    correction: Tensor | None = None
    groups: int = 1
    groups_kept: int = 1
    by_pairs: bool = False
    normalized: bool = False
    added: float = 0.0
    floor: float = 0.0
    scale: float = 1.0
    jitter: float = 0.0
    kept: Tensor | None = None
    least: float = 0.0

    def __post_init__(self) -> None:
        count = self.count
        if self.scoring not in SCORINGS:
            raise ValueError(f"scoring must be one of {', '.join(map(repr, SCORINGS))}, not {self.scoring!r}")
        if not 1 <= self.chosen <= (min(count, 2) if self.scoring == "sparse_mixer" else count):
            raise ValueError(f"a token cannot have {self.chosen} of {count} experts")
        if not (1 <= self.groups_kept <= self.groups <= MOST_GROUPS and count % self.groups == 0):
            raise ValueError(f"{count} experts have no {self.groups} groups of which {self.groups_kept} are kept")
        for name, per_expert, dtype in (
            ("correction", self.correction, torch.float32),
            ("kept", self.kept, torch.uint8),
        ):
            if per_expert is not None and (per_expert.shape != (count,) or per_expert.dtype != dtype):
                raise ValueError(f"{name} must be {dtype} [{count}], not {per_expert.dtype} {tuple(per_expert.shape)}")

    @property
    def count(self) -> int:
        """Experts in all."""
        return self.logits.out_features

    @torch.no_grad()
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: ``[rows, hidden]``. Returns weights, float32 ``[rows, chosen]``, and experts, int64 ``[rows, chosen]``, -1
        for those that are left out, whose weight is 0."""
        return self.weigh(reference.linear(x.float(), self.logits))

    def weigh(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What `route` returns, of logits, float32 ``[rows, experts]``."""
        if self.kept is not None:
            logits = logits.masked_fill(self.kept == 0, -inf)
        weights, experts = self._mix(logits) if self.scoring == "sparse_mixer" else self._best(logits)
        there = experts >= 0
        weights = torch.where(there, weights, 0)
        there &= ~(weights < self.least * weights.amax(-1, keepdim=True))
        weights, experts = torch.where(there, weights, 0), torch.where(there, experts, -1)
        if self.normalized or self.scoring == "softmax_of_chosen":
            weights = weights / (weights.sum(-1, keepdim=True) + self.added).clamp_min(self.floor)
        return weights * self.scale, experts

    def _best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits
        if self.scoring == "softmax":
            scores = logits.softmax(-1)
        elif self.scoring == "sigmoid":
            scores = logits.sigmoid()
        choice = scores if self.correction is None else scores + self.correction
        if self.kept is not None:
            choice = choice.masked_fill(self.kept == 0, -inf)
        if self.groups_kept < self.groups:
            choice = self._in_groups(choice)
        best = choice.topk(self.chosen, -1)
        weights = scores.gather(-1, best.indices)
        there = best.values != -inf
        if self.scoring == "softmax_of_chosen":
            weights = torch.where(there, weights, -inf)
            weights = (weights - weights.amax(-1, keepdim=True)).exp()
        elif self.scoring == "sigmoid_of_chosen":
            weights = weights.sigmoid()
        return weights, torch.where(there, best.indices, -1)

    def _in_groups(self, choice: Tensor) -> Tensor:
        """Scores, those of experts in other groups than the best ones -inf. Of a group's, those that are not kept count
        0, unless there is no other."""
        groups = choice.unflatten(-1, (self.groups, -1))
        kept = None if self.kept is None else self.kept.bool().view(self.groups, -1)
        counted = groups if kept is None else groups.masked_fill(~kept, 0.0)
        best = counted.topk(min(2 if self.by_pairs else 1, counted.shape[-1]), -1).values.sum(-1)
        if kept is not None:
            best = best.masked_fill(~kept.any(-1), -inf)
        left_out = torch.ones_like(best, dtype=torch.bool)
        left_out.scatter_(-1, best.topk(self.groups_kept, -1).indices, False)
        of_best: Tensor = groups.masked_fill(left_out[..., None], -inf).flatten(-2)
        return of_best

    def _mix(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, experts, others = [], [], logits
        for _ in range(self.chosen):
            greatest, expert = others.max(-1, keepdim=True)
            far = (greatest - logits) / logits.abs().clamp_min(greatest) > 2 * self.jitter
            among = others.masked_fill(far, -inf).softmax(-1)
            weights.append(among.gather(-1, expert))
            experts.append(torch.where(greatest != -inf, expert, -1))
            others = others.scatter(-1, expert, -inf)
        return torch.cat(weights, -1), torch.cat(experts, -1)


@dataclass(frozen=True, eq=False)
class Expert:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where there is no gate. One of many, or shared by all tokens."""

    gate: PackedLinear | None
    up: PackedLinear
    down: PackedLinear

    def __post_init__(self) -> None:
        if self.gate is not None and self.gate.grouped != self.up.grouped:
            raise ValueError("gate and up must both be in groups, or neither")
        if self.down.in_features != self.up.out_features:
            raise ValueError(f"down reads {self.down.in_features} neurons, of {self.up.out_features}")

    @property
    def linears(self) -> tuple[PackedLinear, ...]:
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """A mixture of experts, and an expert that all tokens share, where there is one.

    Attributes:
        shared_gate: ``[1, hidden]``, whose sigmoid weighs the shared expert; None: it counts whole.
        limit: gates are at most this, and ups within plus and minus it; 0: any. slope: of a gate's sigmoid, where `act`
            is "silu": gate * sigmoid(slope * gate). offset: added to ups. (gpt-oss; gated experts alone.)
        shared_scale: multiplies what the shared expert gives.
        by_inputs: whether an expert's weight multiplies what it reads, not what it gives (Llama 4).
    """

    router: Router
    experts: Sequence[Expert]
    act: str
    shared: Expert | None = None
    shared_gate: PackedLinear | None = None
    limit: float = 0.0
    slope: float = 1.0
    offset: float = 0.0
    shared_scale: float = 1.0
    by_inputs: bool = False

    def __post_init__(self) -> None:
        if len(self.experts) != self.router.count:
            raise ValueError(f"the router chooses among {self.router.count} experts, not {len(self.experts)}")
        if self.slope != 1 and self.act != "silu":
            raise ValueError(f"there is no slope of {self.act}")
        if self.shared_gate is not None and self.shared is None:
            raise ValueError("shared_gate given without a shared expert")
        if self.shared_gate is not None and self.shared_scale != 1:
            raise ValueError("a shared expert is weighed by a gate or by a number, not by both")

    def limited(self, kept: Tensor | None, least: float) -> PackedExperts:
        """The same mixture under a router with another `kept` and `least`."""
        return replace(self, router=replace(self.router, kept=kept, least=least))

    @property
    def linears(self) -> list[PackedLinear]:
        """All matrices but the router's."""
        experts = [*self.experts, *([] if self.shared is None else [self.shared])]
        return [linear for expert in experts for linear in expert.linears]

    @property
    def nbytes(self) -> int:
        extra = [self.router.logits, *([] if self.shared_gate is None else [self.shared_gate])]
        return sum(linear.nbytes for linear in (*self.linears, *extra))

    @property
    def routed_bytes(self) -> int:
        """Of the experts that one token gets."""
        return self._own_bytes * self.router.chosen // len(self.experts)

    @property
    def active_bytes(self) -> int:
        """Of all that one token reads."""
        return self.nbytes - self._own_bytes + self.routed_bytes

    @property
    def _own_bytes(self) -> int:
        return sum(linear.nbytes for expert in self.experts for linear in expert.linears)

    def compute(self, x: Tensor, multiply: Multiply = reference.linear) -> Tensor:
        """The mixture's output for x ``[.., hidden]`` of a float dtype, of the same shape and dtype, expert by expert.

        multiply: x ``[rows, inputs]`` times a packed matrix.
        """
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router.route(rows)
        return self.weighted(rows, weights, chosen, multiply).reshape(x.shape)

    def weighted(self, rows: Tensor, weights: Tensor, chosen: Tensor, multiply: Multiply = reference.linear) -> Tensor:
        """The same of x ``[rows, hidden]`` with what a router gave it: see `Router.route`."""
        y = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        for expert in chosen.unique().tolist():
            if expert >= 0:
                at, place = (chosen == expert).nonzero(as_tuple=True)
                weight = weights[at, place, None]
                given = (rows[at] * weight).to(rows.dtype) if self.by_inputs else rows[at]
                found = self._of(self.experts[expert], given, multiply).float()
                y.index_add_(0, at, found if self.by_inputs else found * weight.float())
        if self.shared is not None:
            found = self._of(self.shared, rows, multiply).float() * self.shared_scale
            y += found if self.shared_gate is None else found * multiply(rows, self.shared_gate).float().sigmoid()
        return y.to(rows.dtype)

    def _of(self, expert: Expert, x: Tensor, multiply: Multiply) -> Tensor:
        up = multiply(x, expert.up)
        if expert.gate is None:
            return multiply(ACTS[self.act](up), expert.down)
        gate = multiply(x, expert.gate)
        if self.limit > 0:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        h = ACTS[self.act](gate) if self.slope == 1 else gate * (self.slope * gate).sigmoid()
        return multiply(h * (up + self.offset), expert.down)


#: packs matrices ``[outputs, inputs]``, each with its bias or None
PackAll = Callable[[Sequence[tuple[Tensor, "Tensor | None"]]], Sequence[PackedLinear]]


def where_they_lie(matrices: Sequence[tuple[Tensor, Tensor | None]]) -> list[PackedLinear]:
    """A `PackAll` of matrices as they were loaded: those that need no padding stay in place."""
    return side_by_side((PackedLinear.pack(weight, bias), weight) for weight, bias in matrices)


def side_by_side(parts: Iterable[tuple[PackedLinear, Tensor]]) -> list[PackedLinear]:
    """Packed matrices in memory that they share: each alone would take up a whole number of huge pages.

    parts: one after the other, with what each was packed from; those that still lie there stay.
    """
    found: list[PackedLinear] = []
    rooms: list[Tensor] = []
    for packed, source in parts:
        weight = packed.weight
        if weight.untyped_storage().data_ptr() != source.untyped_storage().data_ptr():
            if not rooms or (rooms[0].shape, rooms[0].dtype) != (weight.shape, weight.dtype):
                count = max(1, _TOGETHER // weight.nbytes)
                rooms = list(allocate((count, *weight.shape), weight.dtype, weight.device))
            packed = replace(packed, weight=rooms.pop(0).copy_(weight))
        found.append(packed)
    return found


def experts_of(
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    stacked: bool = False,
    interleaved: bool = False,
    transposed: bool = False,
    pack: PackAll = where_they_lie,
) -> list[Expert]:
    """Packs experts whose matrices lie in one parameter for all.

    up: ``[experts, neurons, hidden]``, or with the gates ``[experts, 2 * neurons, hidden]``, these first where
    `stacked`, each before its neuron's row where `interleaved`; gate: as up, where gates lie apart; down: ``[experts,
    hidden, neurons]``. transposed: the last two dimensions of all are the other way round. Biases: ``[experts,
    outputs]`` or None, in the same order.
    """
    neurons = down.shape[1 if transposed else 2]

    def packed(weight: Tensor, bias: Tensor | None, rows: slice = slice(None)) -> Sequence[PackedLinear]:
        weight = (weight.transpose(1, 2) if transposed else weight).detach()[:, rows]
        biases = [None] * len(weight) if bias is None else bias.detach()[:, rows]
        return pack(list(zip(weight, biases, strict=True)))

    of_gates = slice(0, None, 2) if interleaved else slice(0, neurons)
    of_ups = slice(1, None, 2) if interleaved else slice(neurons if stacked else 0, None)
    gates: Sequence[PackedLinear | None] = [None] * len(up)
    if stacked or interleaved:
        gates = packed(up, up_bias, of_gates)
    elif gate is not None:
        gates = packed(gate, gate_bias)
    return list(map(Expert, gates, packed(up, up_bias, of_ups), packed(down, down_bias)))
