"""Recurrences in place of attentions, found by trying what models do: the first reading that gives the states in the
cache, and what the output projection was given, in a pass of a few tokens, is the model's.

The gated delta rule (Yang et al., 2412.06464), as Qwen3-Next, Qwen3.5 and OLMo Hybrid have it, and short convolutions
(LFM2): see `Recurrence` and `Convolution` in kernels/step_model.py for what they compute.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.packed import ACTS
from ..kernels.step import Heads
from ..predictors.anatomy import Attention, is_taps
from .attention_names import linear
from .calls import NotCovered
from .norms import epsilons, normed
from .spec import ConvolutionSpec, NormSpec, RecurrenceSpec, RecurrentSpec
from .tracing import Trace

_UNIT_EPS = 1e-6  # of what queries and keys are divided by, as the library's kernels have it
_MOST_RATES = (1.0, 2.0)  # the second where states may turn round (OLMo Hybrid)

Places = tuple[tuple[int, Heads], ...]  # see `kernels.step_model.Recurrence`


@dataclass(frozen=True, eq=False)
class Parts:
    """What an attention consists of beside linears, if it may be a recurrence: a convolution along the text, each
    channel by itself; and, if that is not all, a norm and two numbers for each head."""

    taps: nn.Conv1d
    norm: nn.Module | None
    numbers: tuple[nn.Parameter, ...]

    @property
    def modules(self) -> list[nn.Module]:
        return [self.taps, *([] if self.norm is None else [self.norm])]


def parts_of(attention: nn.Module) -> Parts | None:
    """The parts of an attention module that may be a recurrence; None of others."""
    taps = [module for module in attention.children() if is_taps(module)]
    norms = [module for module in attention.children() if [p.ndim for p in module.parameters()] == [1]]
    numbers = tuple(p for p in attention._parameters.values() if p is not None)
    if len(taps) != 1 or (len(norms), len(numbers)) not in ((0, 0), (1, 2)) or any(p.ndim != 1 for p in numbers):
        return None
    return Parts(cast(nn.Conv1d, taps[0]), next(iter(norms), None), numbers)


def read_recurrence(found: Attention, index: int, seen: Trace) -> RecurrentSpec:
    """Describes the recurrence of layer `index`.

    Raises:
        NotCovered: it is of no kind that is described, or gave something else in the pass.
    """
    parts, states = parts_of(found.module), seen.states[index]
    if parts is None or len(states) != 1 + bool(parts.numbers):
        raise NotCovered("a recurrence of its decoder layers is of no kind that is described")
    if parts.numbers:
        return _delta(found, parts, states[0], states[1], seen)
    return _convolution(found, parts, states[0], seen)


def _convolution(found: Attention, parts: Parts, recent: Tensor, seen: Trace) -> ConvolutionSpec:
    output, channels = found.part(found.output), parts.taps.out_channels
    if len(found.inputs) != 1 or seen.gave(found.part(found.inputs[0])).shape[-1] != 3 * channels:
        raise NotCovered("a convolution of its decoder layers has other projections than it needs")
    given = seen.gave(found.part(found.inputs[0])).split(channels, -1)
    for value, times, opened in ((0, 2, 1), (0, 1, 2), (1, 2, 0)):  # the former two are alike
        y, last = _through_taps(parts.taps, given[value] * given[times])
        if seen.near(last, recent) and seen.near(y * given[opened], seen.given(output)):
            places = tuple((0, (at * channels, channels, 0)) for at in (value, times, opened))
            inputs = (linear(found.part(found.inputs[0])),)
            return ConvolutionSpec(inputs, linear(output), places, parts.taps.weight, parts.taps.bias)
    raise NotCovered("what a convolution of its decoder layers computes is not known")


def _through_taps(taps: nn.Conv1d, x: Tensor) -> tuple[Tensor, Tensor]:
    """x ``[tokens, channels]`` through taps, and the last inputs of each channel, ``[channels, count]``."""
    count, weight = taps.kernel_size[0], taps.weight.detach().float().cpu()
    bias = None if taps.bias is None else taps.bias.detach().float().cpu()
    padded = F.pad(x.t(), (count, 0))
    return F.conv1d(padded[None, :, 1:], weight, bias, groups=len(weight))[0].t(), padded[:, -count:]


def _delta(found: Attention, parts: Parts, recent: Tensor, state: Tensor, seen: Trace) -> RecurrenceSpec:
    heads, key_dim, value_dim = state.shape
    of_keys, rest = divmod(recent.shape[0] - heads * value_dim, 2 * key_dim)
    if rest or of_keys <= 0 or heads % of_keys or recent.shape != (parts.taps.out_channels, *parts.taps.kernel_size):
        raise NotCovered("the states of a recurrence are not of its heads")
    # the widest first: steps fetch these ahead
    inputs = sorted(map(found.part, found.inputs), key=lambda part: -seen.gave(part).shape[-1])
    evidence = _Evidence(parts, recent, state, [seen.gave(part) for part in inputs], of_keys)
    output = found.part(found.output)
    for first in _tapped(evidence, seen):
        for second in _recalled(evidence, first, seen):
            norm = _opened(evidence, first, second, seen, seen.given(output))
            if norm is not None:
                return RecurrenceSpec(
                    inputs=tuple(map(linear, inputs)),
                    output=linear(output),
                    places=(*first.places, norm.place, *second.places),
                    taps=parts.taps.weight,
                    tap_bias=parts.taps.bias,
                    fading=second.fading,
                    fading_bias=second.fading_bias,
                    norm=norm.norm,
                    read_heads=of_keys,
                    heads=heads,
                    key_dim=key_dim,
                    value_dim=value_dim,
                    tap_act=first.tap_act,
                    open_act=norm.act,
                    most_rate=second.most_rate,
                    unit_eps=_UNIT_EPS,
                )
    raise NotCovered("what a recurrence of its decoder layers computes is not known")


@dataclass(frozen=True, eq=False)
class _Evidence:
    """Of one layer in a pass: see `Parts`; its states; what the projections gave; how many heads keys have."""

    parts: Parts
    recent: Tensor
    state: Tensor
    projected: list[Tensor]
    of_keys: int

    @property
    def heads(self) -> int:
        return self.state.shape[0]

    def of(self, place: tuple[int, Heads], count: int, size: int) -> Tensor:
        """``[tokens, heads, size]``."""
        which, (offset, run, step) = place
        begins = [offset + head // run * step + head % run * size for head in range(count)]
        return torch.stack([self.projected[which][:, at : at + size] for at in begins], 1)


# ---- where queries, keys and values are, and their taps ----


@dataclass(frozen=True, eq=False)
class _Tapped:
    """places: of queries, keys and values. grouped: which projection has them in turn, head by head of the keys, with
    what opens outputs behind them; None: they lie one after the other. channels: ``[tokens, channels]`` behind taps."""

    places: Places
    grouped: int | None
    tap_act: str
    channels: Tensor


def _tapped(evidence: _Evidence, seen: Trace) -> Iterator[_Tapped]:
    for places, grouped in _layouts(evidence):
        keys, values = (evidence.of_keys, evidence.state.shape[1]), (evidence.heads, evidence.state.shape[2])
        parts = [evidence.of(place, *size) for place, size in zip(places, (keys, keys, values), strict=True)]
        channels = torch.cat([part.flatten(1) for part in parts], -1)
        y, last = _through_taps(evidence.parts.taps, channels)
        if not seen.near(last, evidence.recent):
            continue
        for act, made in ACTS.items():
            yield _Tapped(places, grouped, act, made(y))


def _layouts(evidence: _Evidence) -> Iterator[tuple[Places, int | None]]:
    """Where queries, keys and values may be among what the projections give."""
    heads, keys, d, n = evidence.heads, evidence.of_keys, *evidence.state.shape[1:]
    sizes = [x.shape[-1] for x in evidence.projected]
    of_keys, of_values, each = keys * d, heads * n, heads // keys
    one_after_other = ((0, keys, 0), (of_keys, keys, 0), (2 * of_keys, heads, 0))
    step = 2 * (d + each * n)
    in_turn = ((0, 1, step), (d, 1, step), (2 * d, each, step))
    for which, size in enumerate(sizes):
        if size == 2 * of_keys + of_values:
            yield tuple((which, place) for place in one_after_other), None
        if size == 2 * (of_keys + of_values):
            yield tuple((which, place) for place in in_turn), which
    apart = [[i for i, size in enumerate(sizes) if size == wanted] for wanted in (of_keys, of_keys, of_values)]
    for q, k, v in itertools.product(*apart):
        if len({q, k, v}) == 3:
            yield ((q, (0, keys, 0)), (k, (0, keys, 0)), (v, (0, heads, 0))), None


# ---- what the states become ----


@dataclass(frozen=True, eq=False)
class _Recalled:
    """places: of rates and decays; see `Recurrence`. outputs: ``[tokens, heads, value_dim]``."""

    places: Places
    fading: Tensor
    fading_bias: Tensor
    most_rate: float
    outputs: Tensor


def _recalled(evidence: _Evidence, first: _Tapped, seen: Trace) -> Iterator[_Recalled]:
    heads, keys, d, n = evidence.heads, evidence.of_keys, *evidence.state.shape[1:]
    q, k, v = first.channels.split([keys * d, keys * d, heads * n], -1)
    q, k = (_of_length_one(x.unflatten(-1, (keys, d))).repeat_interleave(heads // keys, 1) for x in (q, k))
    either = itertools.permutations(evidence.parts.numbers)
    for (rate, decay), numbers in itertools.product(_of_heads(evidence), either):
        logs, bias = (number.detach().float().cpu() for number in numbers)
        if logs.shape != (heads,) or bias.shape != (heads,):
            continue
        given = (evidence.of(place, heads, 1)[..., 0] for place in (rate, decay))
        rates, decays = next(given).sigmoid(), (-logs.exp() * F.softplus(next(given) + bias)).exp()
        for most in _MOST_RATES:
            outputs, state = _through(q * d**-0.5, k, v.unflatten(-1, (heads, n)), most * rates, decays)
            if seen.near(state, evidence.state):
                yield _Recalled((rate, decay), logs.exp(), bias, most, outputs)


def _of_heads(evidence: _Evidence) -> Iterator[tuple[tuple[int, Heads], tuple[int, Heads]]]:
    """Where rates and decays may be: of projections of their own, or in one, in turn for the heads of keys."""
    heads, each = evidence.heads, evidence.heads // evidence.of_keys
    sizes = [x.shape[-1] for x in evidence.projected]
    whole = (0, heads, 0)
    for a, b in itertools.permutations([i for i, size in enumerate(sizes) if size == heads], 2):
        yield (a, whole), (b, whole)
    for i in (i for i, size in enumerate(sizes) if size == 2 * heads):
        first, second = (i, (0, each, 2 * each)), (i, (each, each, 2 * each))
        yield first, second
        yield second, first


def _of_length_one(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _UNIT_EPS)


def _through(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, decays: Tensor) -> tuple[Tensor, Tensor]:
    """What the heads give for each token, and their states in the end: the definition."""
    state, outputs = v.new_zeros((q.shape[1], q.shape[2], v.shape[2])), []
    for q_, k_, v_, rate, decay in zip(q, k, v, rates, decays, strict=True):
        state = state * decay[:, None, None]
        change = (v_ - torch.einsum("hk,hkv->hv", k_, state)) * rate[:, None]
        state = state + k_[..., None] * change[:, None]
        outputs.append(torch.einsum("hk,hkv->hv", q_, state))
    return torch.stack(outputs), state


# ---- what becomes of the outputs ----


@dataclass(frozen=True, eq=False)
class _Opened:
    norm: NormSpec
    place: tuple[int, Heads]
    act: str


def _opened(evidence: _Evidence, first: _Tapped, found: _Recalled, seen: Trace, expected: Tensor) -> _Opened | None:
    """The norm of what heads give, and what opens them."""
    heads, each, d, n = evidence.heads, evidence.heads // evidence.of_keys, *evidence.state.shape[1:]
    taken = {which for which, _ in first.places}
    places: list[tuple[int, Heads]] = []
    if first.grouped is not None:
        places = [(first.grouped, (2 * d + each * n, each, 2 * (d + each * n)))]
    places += [
        (i, (0, heads, 0)) for i, x in enumerate(evidence.projected) if x.shape[-1] == heads * n and i not in taken
    ]
    module = cast(nn.Module, evidence.parts.norm)
    weight = next(module.parameters())
    if weight.shape != (n,):
        return None
    for eps, offset, place in itertools.product(epsilons(module), (0.0, 1.0), places):
        norm = NormSpec("rms", eps, n, weight, None, 1.0, offset)
        y, gates = normed(norm, found.outputs), evidence.of(place, heads, n)
        for act, made in ACTS.items():
            if seen.near((y * made(gates)).flatten(1), expected):
                return _Opened(norm, place, act)
    return None
