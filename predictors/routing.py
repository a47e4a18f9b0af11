"""How a mixture of experts chooses: a router as data, read by probing a copy of the block that holds it.

Classes differ in where they keep the router's matrix and in what they call things; what they compute is one formula
with a few choices. The copy is given other weights and its own inputs, and the reading that gives the same experts
with the same weights is the router. A reading that no sample contradicts is the only one that counts; where there is
none, the block's own code goes on choosing.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Scoring = Literal["softmax", "sigmoid", "sigmoid_of_chosen", "sparse_mixer"]
GroupScore = Literal["max", "top2"]
Place = tuple[str, str]  # the path of a module inside the block, and the name of one of its tensors

_SAMPLES = 64
_TINY = 1e-20  # no sum of scores is as small; keeps a sum of zeros from being divided by


@dataclass(frozen=True)
class Choice:
    """What a router makes of its logits ``[tokens, experts]``.

    scoring: scores are the logits' softmax or sigmoid; or the logits themselves, of which the chosen ones' sigmoids
    are the weights; or "sparse_mixer" (PhiMoE, 2409.12136): the two greatest logits, each weighed by a softmax over
    those alone that are within 2 * `jitter` of it, relative to their size, of all for the first, of the others for
    the second. top_k: experts of a token, those with the highest score, or score + correction where there is one.
    groups, top_groups: experts are `groups` groups of neighbours, and only those of the best `top_groups` can be
    chosen: by their best expert ("max"), or their two best together ("top2"). normalised: whether the weights,
    which are the chosen scores, are divided by their sum + epsilon. scale: what they are multiplied by in the end.
    """

    scoring: Scoring
    top_k: int
    groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "max"
    normalised: bool = False
    epsilon: float = _TINY
    scale: float = 1.0
    jitter: float = 0.0

    def scores(self, logits: Tensor, allowed: Tensor | None = None) -> Tensor:
        if self.scoring == "sigmoid":
            return logits.sigmoid()
        if self.scoring == "sigmoid_of_chosen":
            return logits
        return F.softmax(logits if allowed is None else logits.masked_fill(~allowed, -torch.inf), -1)

    def of(self, logits: Tensor, correction: Tensor | None, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The chosen experts, int64 ``[tokens, top_k]``, and their weights, fp32.

        allowed: bool ``[experts]``: the others count as absent, as if the model had never had them. Where too few are
        allowed, a place is left with weight 0.
        """
        if self.scoring == "sparse_mixer":
            return self._mixed(logits if allowed is None else logits.masked_fill(~allowed, -torch.inf))
        scores = self.scores(logits, allowed)
        ranks = scores if correction is None else scores + correction
        if self.top_groups < self.groups:
            ranks = self._of_best_groups(ranks, allowed)
        if allowed is not None:
            ranks = ranks.masked_fill(~allowed, -torch.inf)
        best, index = ranks.topk(self.top_k, dim=-1)
        chosen = scores.gather(-1, index)
        chosen = chosen.sigmoid() if self.scoring == "sigmoid_of_chosen" else chosen
        return index, self.weights(chosen.masked_fill(best == -torch.inf, 0.0))

    def _mixed(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, experts, others = [], [], logits
        for _ in range(self.top_k):
            greatest, expert = others.max(-1, keepdim=True)
            far = (greatest - logits) / logits.abs().clamp_min(greatest) > 2 * self.jitter
            among = others.masked_fill(far, -torch.inf).softmax(-1).gather(-1, expert)
            weights.append(among.masked_fill(greatest == -torch.inf, 0.0))
            experts.append(expert)
            others = others.scatter(-1, expert, -torch.inf)
        return torch.cat(experts, -1), self.weights(torch.cat(weights, -1))

    def weights(self, chosen: Tensor) -> Tensor:
        """From the scores of chosen experts ``[tokens, experts]``; 0 where one is left out."""
        if self.normalised:
            chosen = chosen / (chosen.sum(-1, keepdim=True) + self.epsilon)
        return chosen * self.scale

    def _of_best_groups(self, ranks: Tensor, allowed: Tensor | None) -> Tensor:
        """ranks, -inf outside of the chosen groups."""
        grouped = ranks.unflatten(-1, (self.groups, -1))
        counted = grouped if allowed is None else grouped.masked_fill(~allowed.unflatten(-1, (self.groups, -1)), 0.0)
        of_groups = counted.amax(-1) if self.group_score == "max" else counted.topk(2, dim=-1).values.sum(-1)
        if allowed is not None:
            of_groups = of_groups.masked_fill(~allowed.unflatten(-1, (self.groups, -1)).any(-1), -torch.inf)
        best = of_groups.topk(self.top_groups, dim=-1).indices
        outside = torch.ones_like(of_groups, dtype=torch.bool).scatter_(-1, best, False)
        of_best: Tensor = grouped.masked_fill(outside[..., None], -torch.inf).flatten(-2)
        return of_best


@dataclass(frozen=True, eq=False)
class Router:
    """A router by where its block keeps it. upcast: whether logits are computed in float32 whatever the weights are."""

    block: nn.Module
    weight_at: Place
    bias_at: Place | None
    correction_at: Place | None
    choice: Choice
    upcast: bool

    @property
    def weight(self) -> Tensor:
        """``[experts, hidden]``, as it is now."""
        return _tensor(self.block, self.weight_at)

    @property
    def bias(self) -> Tensor | None:
        return None if self.bias_at is None else _tensor(self.block, self.bias_at)

    @property
    def correction(self) -> Tensor | None:
        """``[experts]``, added to the scores for the choice alone."""
        return None if self.correction_at is None else _tensor(self.block, self.correction_at).flatten()

    def logits(self, x: Tensor) -> Tensor:
        """fp32 ``[tokens, experts]`` of x ``[tokens, hidden]``."""
        return _logits(x, self.weight, self.bias, self.upcast)

    def route(self, x: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Experts and their weights; see `Choice.of`."""
        return self.choice.of(self.logits(x), self.correction, allowed)


class Seen(nn.Module):
    """Stands for the experts in a copy of their block, keeps what these are given, and gives its own output.

    Attributes:
        index, weights: ``[tokens, top_k]``: the chosen experts and what their outputs are multiplied by.
        scaled_inputs: whether the experts' inputs were multiplied instead (Llama 4): the weights are these factors.
    """

    index: Tensor
    weights: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.x, self.output, self.scaled_inputs = count, Tensor(), Tensor(), False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        index = next((value for value in given if not value.is_floating_point()), None)
        if index is None:
            return self._scaled(x)
        weights = next(value for value in given if value.is_floating_point())
        if index.shape != weights.shape or index.ndim != 2:
            raise ValueError("experts that are not given the chosen ones and their weights")
        self.x, self.index, self.weights = x, index, weights
        self.output = x.flip(-1) + 1.0
        return self.output

    def _scaled(self, copies: Tensor) -> Tensor:
        """Every expert is given every token, times what the router makes of it: nothing for one that is not chosen."""
        copies = copies.unflatten(0, (self.count, -1))
        self.scaled_inputs, self.x = True, copies
        self.output = copies.flip(-1) + 1.0
        return self.output.flatten(0, 1)

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return int((self.x.abs().sum(-1) > 0).sum(0).max()) if self.scaled_inputs else int(self.index.shape[1])

    def is_given(self, x: Tensor) -> bool:
        """Whether the experts' inputs are x, or multiples of it."""
        return self.scaled_inputs or torch.equal(self.x.reshape(x.shape), x)

    def dense(self, x: Tensor) -> Tensor:
        """The weights of all experts, fp32 ``[tokens, experts]``, for the inputs x of the block."""
        if self.scaled_inputs:
            return ((self.x.float() * x.float()).sum(-1) / x.float().square().sum(-1)).t()
        return spread(self.index, self.weights, self.count)


class Instead(nn.Module):
    """Stands for a shared expert in a copy of its block, with an output that is not its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 3.0 - x.roll(1, -1)


def spread(index: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Weights ``[tokens, top_k]`` as fp32 ``[tokens, experts]``; 0 where an expert is not chosen."""
    dense = torch.zeros(len(index), experts, dtype=torch.float32, device=index.device)
    return dense.scatter_add_(1, index.long(), weights.float())


@dataclass(frozen=True, eq=False)
class Probe:
    """A copy of a block, in which stand-ins are its experts and its shared expert, with weights of its own in float32
    on the CPU, and the samples that it is given, ``[tokens, hidden]``."""

    block: nn.Module
    seen: Seen
    samples: Tensor
    returned: list[int] = field(default_factory=list)  # of the last run: how many things

    @classmethod
    def of(cls, block: nn.Module, experts: nn.Module, shared: nn.Module | None, count: int, hidden: int) -> Probe:
        seen = Seen(count)
        memo: dict[int, Any] = {id(experts): seen} | ({} if shared is None else {id(shared): Instead()})
        copied = copy.deepcopy(block, memo).to_empty(device="cpu").float().eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in (*copied.parameters(), *copied.buffers()):
                if tensor.is_floating_point():
                    tensor.normal_(generator=generator)
                    tensor.mul_(hidden**-0.5 if tensor.ndim == 2 and tensor.shape[1] == hidden else 0.3)
        samples = torch.randn(_SAMPLES, hidden, generator=generator, dtype=torch.float32, device="cpu")
        return cls(copied, seen, samples)

    def run(self, x: Tensor) -> Tensor:
        """The block's output for x ``[tokens, hidden]``, in the same shape."""
        with torch.no_grad():
            found = self.block(x[None].clone())
        self.returned[:] = [len(found) if isinstance(found, tuple) else 1]
        found = found[0] if isinstance(found, tuple) else found
        return cast(Tensor, found.reshape(x.shape))

    def places(self) -> Iterator[tuple[Place, Tensor]]:
        """Every tensor of the copy's own modules."""
        for path, module in self.block.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.is_floating_point():
                    yield (path, name), tensor


def read_router(block: nn.Module, probe: Probe, dtype: torch.dtype) -> Router | None:
    """The router of `block`, of which `probe` is a copy; None where no reading gives what it chooses.

    dtype: of the model's hidden states.
    """
    probe.run(probe.samples)
    wanted, shape = probe.seen.dense(probe.samples), (probe.seen.count, probe.samples.shape[1])
    places = list(probe.places())
    small = [place for place, tensor in places if tensor.numel() == shape[0]]
    for weight_at in (place for place, tensor in places if tensor.shape == shape):
        biases: list[Place | None] = [(path, name) for path, name in small if path == weight_at[0] and "bias" in name]
        for bias_at in (*biases, None):
            corrections = [place for place in small if place != bias_at]
            logits = _logits(probe.samples, *_of(probe.block, weight_at, bias_at), upcast=True)
            found = _reading(probe, logits, wanted, corrections) or _mixer(probe, weight_at, bias_at, wanted)
            if found is not None:
                choice, correction_at = found
                choice = _with_epsilon(probe, choice, weight_at, small)
                router = Router(block, weight_at, bias_at, correction_at, choice, True)
                return _as_computed(router, probe, dtype)
    return None


def _reading(
    probe: Probe, logits: Tensor, wanted: Tensor, corrections: list[Place]
) -> tuple[Choice, Place | None] | None:
    top_k = int((wanted > 0).sum(-1).max())
    scorings: tuple[Scoring, ...] = ("softmax", "sigmoid", "sigmoid_of_chosen")
    for scoring, correction_at, grouping in itertools.product(scorings, (*corrections, None), _groupings(probe)):
        choice = Choice(scoring, top_k, *grouping)
        correction = None if correction_at is None else _tensor(probe.block, correction_at).flatten()
        index, plain = choice.of(logits, correction)
        if not torch.equal(spread(index, torch.ones_like(plain), wanted.shape[1]) > 0, wanted > 0):
            continue
        given = wanted.gather(1, index)
        for normalised in (False, True):
            choice = Choice(scoring, top_k, *grouping, normalised=normalised)
            ratios = given / choice.weights(plain)
            scale = float(ratios.mean())
            if torch.allclose(ratios, ratios.mean(), rtol=1e-4):
                return Choice(scoring, top_k, *grouping, normalised, scale=_named(probe, scale)), correction_at
    return None


def _mixer(probe: Probe, weight_at: Place, bias_at: Place | None, wanted: Tensor) -> tuple[Choice, None] | None:
    """The reading as a sparse mixer, whose jitter is a number of the block's: which one it is shows where logits lie
    close together."""
    weight, bias = _of(probe.block, weight_at, bias_at)
    if int((wanted > 0).sum(-1).max()) != 2 or bias is not None:
        return None
    seen, before = [(_logits(probe.samples, weight, None, upcast=True), wanted)], weight.clone()
    apart = 1 + torch.logspace(-4, -0.5, len(weight), dtype=torch.float32, device="cpu")
    with torch.no_grad():
        weight.copy_(before[:1] * apart[:, None])
        probe.run(probe.samples)
        seen.append((_logits(probe.samples, weight, None, upcast=True), probe.seen.dense(probe.samples)))
        weight.copy_(before)
    for jitter in _numbers(probe):
        choice = Choice("sparse_mixer", 2, jitter=jitter)
        spreads = ((spread(*choice.of(logits, None), given.shape[1]), given) for logits, given in seen)
        if all(torch.allclose(found, given, rtol=1e-4, atol=1e-6) for found, given in spreads):
            return choice, None
    return None


def _groupings(probe: Probe) -> Iterator[tuple[int, int, GroupScore]]:
    """How experts may be grouped, by the numbers that the block's modules have under a name with "group" in it."""
    yield 1, 1, "max"
    experts = probe.seen.count
    modules = list(probe.block.modules())
    found = {
        int(v) for m in modules for n, v in vars(m).items() if "group" in n and type(v) is int and 0 < v <= experts
    }
    for groups, best in itertools.product(sorted(found), repeat=2):
        if best < groups and experts % groups == 0:
            yield groups, best, "max"
            if experts // groups > 1:
                yield groups, best, "top2"


def _named(probe: Probe, value: float) -> float:
    """The number among the block's own that `value` was measured of; without one, the value."""
    return next((v for v in (1.0, *_numbers(probe)) if abs(v - value) <= 1e-5 * abs(value)), value)


def _numbers(probe: Probe) -> list[float]:
    return [v for m in probe.block.modules() for v in vars(m).values() if type(v) is float]


def _with_epsilon(probe: Probe, choice: Choice, weight_at: Place, small: list[Place]) -> Choice:
    """The choice with what is added to the sum that weights are divided by, which shows where all scores are tiny."""
    if not choice.normalised or choice.scoring != "sigmoid":
        return choice
    weight, before = _tensor(probe.block, weight_at), {}
    x = torch.ones_like(probe.samples)
    with torch.no_grad():
        for place in (weight_at, *small):
            before[place] = _tensor(probe.block, place).clone()
            _tensor(probe.block, place).zero_()
        weight.fill_(-14.0 / x.shape[1])
        probe.run(x)
        total = float(probe.seen.dense(x)[0].sum())
        for place, values in before.items():
            _tensor(probe.block, place).copy_(values)
    scores = choice.top_k * float(torch.tensor(-14.0).sigmoid())
    epsilon = scores * (choice.scale / total - 1.0) if total > 0 else _TINY
    if epsilon < 1e-4 * scores:
        return choice
    return Choice(**{**vars(choice), "epsilon": float(f"{epsilon:.2g}")})


def _as_computed(router: Router, probe: Probe, dtype: torch.dtype) -> Router:
    """The router with the dtype of its logits: where the weights are halves, a run in halves shows which it is."""
    if dtype == torch.float32:
        return router
    for (path, name), tensor in list(probe.places()):
        module, halves = probe.block.get_submodule(path), tensor.detach().to(_tensor(router.block, (path, name)).dtype)
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(halves)
        else:
            module._buffers[name] = halves
    x = probe.samples.to(dtype)
    try:
        probe.run(x)
    except (RuntimeError, TypeError, ValueError):
        return router
    wanted = probe.seen.dense(x)
    correction = None if router.correction_at is None else _tensor(probe.block, router.correction_at).flatten()

    def error(upcast: bool) -> float:
        logits = _logits(x, *_of(probe.block, router.weight_at, router.bias_at), upcast)
        return float((spread(*router.choice.of(logits, correction), wanted.shape[1]) - wanted).abs().sum())

    return Router(**{**vars(router), "upcast": error(True) <= error(False)})


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, upcast: bool) -> Tensor:
    weight = weight.detach()
    if upcast:
        return F.linear(x.float(), weight.float(), None if bias is None else bias.detach().float())
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.detach()).float()


def _of(block: nn.Module, weight_at: Place, bias_at: Place | None) -> tuple[Tensor, Tensor | None]:
    return _tensor(block, weight_at), None if bias_at is None else _tensor(block, bias_at)


def _tensor(block: nn.Module, place: Place) -> Tensor:
    return cast(Tensor, getattr(block.get_submodule(place[0]), place[1])).detach()
