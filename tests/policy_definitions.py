"""What policies leave out of a decode step, written down a second time: masks over the dense products of a model of
any float dtype. In float64 they are what everything else is compared with, and say how near each choice was to another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coreskip.kernels.gpu_formats import GroupedMatrix
from coreskip.kernels.groups import GROUP
from coreskip.kernels.packed import quantize
from coreskip.predictors.anatomy import dissect, rows_of
from coreskip.predictors.expert_policies import KeptExperts, SkipExperts
from coreskip.predictors.policies import Bricks, Cats, Dense, InputThresholds, Learned, Sketch, Static, TopK
from coreskip.runtime.formats import format_takers


class Margins:
    """By how much the numbers of a step would have to be others for a choice, or a rounding, to come out otherwise.

    least: float64 ``[tokens]``, the smallest of all distances since `clear`, each as a share of the largest number
    among those that were compared or rounded together.
    """

    def __init__(self) -> None:
        self.least: Tensor | None = None

    def clear(self) -> None:
        self.least = None

    def note(self, distances: Tensor, largest: Tensor) -> None:
        """distances: ``[tokens, n]``. largest: ``[tokens, 1]``."""
        found = (distances / largest.clamp_min(1e-30)).amin(-1).double()
        self.least = found if self.least is None else torch.minimum(self.least, found)

    def compared(self, score: Tensor, least: float) -> Tensor:
        """Which scores ``[tokens, n]`` are at least `least`."""
        self.note((score - least).abs(), score.abs().amax(-1, keepdim=True))
        return score >= least

    def rounded(self, x: Tensor, of: int | None = None) -> tuple[Tensor, Tensor]:
        """`quantize` of rows, which are those of the tokens, or `of` so many tokens, and how near they are to halves of
        steps. (The largest of a row is a whole number of them.)"""
        integers, scale = quantize(x)
        to_half = 0.5 - (x / scale[:, None].clamp_min(1e-30) - integers).abs()
        self.note(to_half.view(of or x.shape[0], -1), to_half.new_full((of or x.shape[0], 1), 127.0))
        return integers, scale


def best(score: Tensor, policy: Any, margins: Margins) -> Tensor:
    if policy.threshold is not None:
        return margins.compared(score, policy.threshold)
    ordered, order = score.sort(dim=-1, descending=True, stable=True)  # of equal scores the first
    count = policy.kept(score.shape[-1])
    gap = ordered[:, count - 1 : count] - ordered[:, count : count + 1]
    gap = gap.masked_fill(gap == 0, torch.inf)  # zeros of a ReLU: no rounding makes one of them greater
    margins.note(gap, score.abs().amax(-1, keepdim=True))
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[:, :count], True)


def nibbled(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The int8 weights as numbers, and what their high nibbles say."""
    integers, scale = quantize(weight.float())
    high = torch.div(integers + 128, 16, rounding_mode="floor") * 16 + 7.5 - 128
    return (integers * scale[:, None]).to(weight.dtype), (high * scale[:, None]).to(weight.dtype)


def defined(policy: Any, layer: Any, x: Tensor, margins: Margins | None = None) -> Tensor:
    """One MLP under a policy of neurons: x ``[tokens, hidden]``."""
    margins = margins or Margins()
    w = layer.matrices()
    act = layer.act

    def activations(gate: Tensor | None, up: Tensor, x: Tensor) -> Tensor:
        u = F.linear(x, up, w.up_bias)
        return act(u) if gate is None else act(F.linear(x, gate, w.gate_bias)) * u

    def own(name: str) -> Tensor:
        return getattr(policy, name).to(x.dtype)

    gate, up, down = w.gate, w.up, w.down
    if isinstance(policy, Sketch) and policy.bits == 4:
        smooth = torch.ones_like(x[0]) if policy.smooth is None else own("smooth")
        integers, scale = margins.rounded(x / smooth)
        up, gate = up * smooth, None if gate is None else gate * smooth
        x = integers * scale[:, None]
        up, up_high = nibbled(up)
        gate, gate_high = (None, None) if gate is None else nibbled(gate)
        # a nibble's 7.5 stands beside rounded inputs, as in the kernels
        wanted = best(activations(gate_high, up_high, x).abs() * own("norm"), policy, margins)
        down = nibbled(down)[0]
        a = activations(gate, up, x)
        if policy.refine is not None:
            wanted &= margins.compared((a - own("mean")).abs() * own("norm"), policy.refine)
    else:
        a = activations(gate, up, x)
        if isinstance(policy, Cats):
            inner = act(F.linear(x, gate, w.gate_bias)) if gate is not None else a
            wanted = margins.compared(inner.abs(), policy.threshold)
        elif isinstance(policy, Static):
            wanted = torch.zeros_like(a, dtype=torch.bool).index_fill_(-1, policy.indices, True)
        elif isinstance(policy, TopK):
            wanted = best(a.abs() * own("norm"), policy, margins)
        elif isinstance(policy, Bricks):
            wanted = best((x @ own("route").t())[:, policy.assignment], policy, margins)
        elif isinstance(policy, Learned):
            wanted = best(x @ own("reduce").t() @ own("expand").t(), policy, margins)
        else:
            margins.note(x.abs(), x.abs().amax(-1, keepdim=True))
            signs = torch.where(x < 0, -1.0, 1.0).to(x.dtype)
            rows = up if gate is None else gate
            counted = signs @ torch.where(rows < 0, -1.0, 1.0).to(x.dtype).t()
            wanted = best(counted, policy, Margins())  # whole numbers: equal ones are equal whatever is rounded
    mean = torch.zeros_like(a[0]) if getattr(policy, "mean", None) is None else own("mean")
    y = torch.where(wanted, a - mean, 0) @ down + mean @ down
    return y if w.down_bias is None else y + w.down_bias


def routed(policy: Any, mixture: Any, x: Tensor, margins: Margins) -> tuple[Tensor, Tensor]:
    """The experts of tokens x ``[tokens, hidden]``, and their weights, which are 0 for those that are left out."""
    router = mixture.router
    logits = F.linear(x, router.weight.to(x.dtype), None if router.bias is None else router.bias.to(x.dtype))
    allowed = None
    if isinstance(policy, KeptExperts):
        allowed = torch.zeros(mixture.count, dtype=torch.bool).index_fill_(0, policy.indices, True)
    index, weights = router.choice.of(logits, router.correction, allowed)
    scores = router.choice.scores(logits, allowed)
    ranks = scores if router.correction is None else scores + router.correction
    gaps = ranks.sort(-1, descending=True).values.diff().abs()
    if router.choice.groups == 1:  # else any two may decide which group is the better
        gaps = gaps[:, router.choice.top_k - 1 : router.choice.top_k]
    margins.note(gaps.masked_fill((gaps == 0) | gaps.isnan(), torch.inf), scores.abs().amax(-1, keepdim=True))
    if isinstance(policy, SkipExperts):
        stay = margins.compared(weights / weights.amax(-1, keepdim=True), policy.beta)
        left = torch.where(stay, weights, 0)
        again = weights.sum(-1, keepdim=True) / left.sum(-1, keepdim=True)
        weights = left * again if router.choice.normalised else left
    return index, weights


@contextmanager
def by_definition(model: Any, *policies: Any, experts: Sequence[Any] | None = None) -> Iterator[Margins]:
    """Decode steps compute `defined` or mask inputs; prompts stay dense. policies: one for each layer, or for all.
    experts: a layer's policy for its experts.

    Yields the margins of the last step.
    """
    handles, margins, anatomy = [], Margins(), dissect(model)
    every: Sequence[Any] = policies * len(anatomy) if len(policies) == 1 else policies

    def masked(policy: Any, least: float, weight: Tensor) -> Callable[..., Any]:
        def before(module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor] | None:
            if not model.decoding:
                return None
            rows = arguments[0].reshape(-1, arguments[0].shape[-1])
            norm = weight.norm(dim=0) if policy.by_norm else 1.0
            wanted = margins.compared(rows.abs() * norm, least)
            return (torch.where(wanted, rows, 0).view_as(arguments[0]),)

        return before

    def noted(seen: dict[int, Tensor], index: int) -> Callable[..., None]:
        def before(module: nn.Module, arguments: tuple[Tensor]) -> None:
            seen[index] = arguments[0]

        return before

    def replaced(policy: Any, layer: Any, index: int) -> Callable[..., Any]:
        """What a down projection gives; residuals and gates around the MLP stay the model's own."""

        def after(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor | None:
            x = seen[index].reshape(-1, layer.hidden_size)
            return defined(policy, layer, x, margins).view_as(output) if model.decoding else None

        return after

    def of_router(policy: Any, mixture: Any) -> Callable[..., Any]:
        """Experts are given what `routed` says. Where their inputs are multiplied, theirs stay."""

        def before(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if not model.decoding:
                return None
            return (arguments[0], *routed(policy, mixture, arguments[0], margins))

        return before

    def phase(module: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        model.decoding = named["past_key_values"].get_seq_length() > 0
        margins.clear()

    handles.append(anatomy.stack.register_forward_pre_hook(phase, with_kwargs=True))
    seen: dict[int, Tensor] = {}
    layers = zip(every, anatomy.feed_forwards, anatomy.attentions, strict=True)
    for index, (policy, layer, attention) in enumerate(cast(Any, layers)):
        if isinstance(policy, InputThresholds):
            for name, least in policy.thresholds.items():
                owner = layer.owner if name.startswith("mlp") else attention.module
                linear = getattr(owner, name.partition(".")[2])
                weight, _ = rows_of(linear)
                handles.append(linear.register_forward_pre_hook(masked(policy, least, weight)))
        elif not isinstance(policy, Dense):
            handles.append(layer.up.register_forward_pre_hook(noted(seen, index)))
            handles.append(layer.down.register_forward_hook(replaced(policy, layer, index)))
    for policy, mixture in zip(experts or (), anatomy.experts, strict=experts is not None):
        if mixture is not None and not mixture.scaled_inputs:
            handles.append(mixture.module.register_forward_pre_hook(of_router(policy, mixture)))
    try:
        yield margins
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def in_groups(model: Any, weights: str) -> Iterator[Margins]:
    """The model's linears have the numbers of a format in groups, int8 or int4 with an LM head in int8, for good; in
    decode steps inputs are rounded in groups, too.

    Yields the margins of the last step.
    """
    anatomy, margins, handles = dissect(model), Margins(), []
    head, model.rounding = model.get_output_embeddings(), False

    def rounded(module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor] | None:
        x = arguments[0]
        if not model.rounding or x.ndim == 4:  # latents of a whole text, which are expanded
            return None
        rows = x.reshape(-1, x.shape[-1])
        groups = F.pad(rows, (0, -rows.shape[1] % GROUP)).reshape(-1, GROUP)
        integers, scale = margins.rounded(groups, of=rows.shape[0])
        return ((integers * scale[:, None]).reshape(rows.shape[0], -1)[:, : rows.shape[1]].reshape(x.shape),)

    def phase(module: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        model.rounding = named["past_key_values"].get_seq_length() > 0
        margins.clear()

    handles.append(anatomy.stack.register_forward_pre_hook(phase, with_kwargs=True))
    for module in format_takers(model, anatomy):
        module.weight = nn.Parameter(module.weight.detach().clone())  # an LM head may share it with the embeddings
        weight, _ = rows_of(module)
        matrix = GroupedMatrix.round(
            weight.float(), None, "int4" if weights == "int4" and module is not head else "int8_groups"
        )
        weight.copy_(matrix.floats(weight.dtype))
        handles.append(module.register_forward_pre_hook(rounded))
    try:
        yield margins
    finally:
        for handle in handles:
            handle.remove()
