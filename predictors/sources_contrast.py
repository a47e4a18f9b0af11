"""Scores from texts held against each other: which neurons fire for one language, relation or task and not for others,
and which heads or MLPs a task fails without."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from .anatomy import Anatomy, Attention, FeedForward, shape_of
from .checks import check_share
from .errors import CoreskipError
from .observe import Tap, of_this_thread, taps
from .scores import Unit
from .sources import AGAINST, Reading, Source, Wants, needs_mlps, source
from .sources_gradient import next_token_loss


@source
@dataclass(frozen=True)
class MeanDifference(Source):
    """The mean activation on the text minus that on the other: positive where a neuron is the text's (the contrast that
    representation engineering takes of hidden states, arXiv 2310.01405, section 3.1, of neurons). One pass over
    both."""

    name: ClassVar[str] = "mean_difference"
    wants: ClassVar[Wants] = Wants.CONTRAST

    def score(self, reading: Reading) -> list[Tensor]:
        needs_mlps(reading, self.name)
        means = [self._means(reading, name) for name in ("text", AGAINST)]
        return [mine - other for mine, other in zip(*means, strict=True)]

    def _means(self, reading: Reading, name: str) -> list[Tensor]:
        rows = reading.texts[name]
        sums = reading.summed(rows, f"means on the {name}", lambda layer, a: a)
        return [total / rows.numel() for total in sums]


@source
@dataclass(frozen=True)
class Lape(Source):
    """Language activation probability entropy (LAPE, arXiv 2402.16438, section 2.2), as its distance from the largest
    possible: ``log K - H_j``, 0 for a neuron that fires as often in all K texts, log K for one that fires in one alone.

    H_j is the entropy of the probabilities, over the texts, that neuron j's gate is positive, divided by their sum.
    Neurons that fire rarely everywhere are set to 0, as the source drops them: none of their probabilities reaches the
    `quantile` (0.95) of all probabilities of all layers. `of`: with the name of one text, the neurons that fire there:
    all whose probability on it does not reach that quantile are 0. One pass over each text.
    """

    of: str | None = None
    quantile: float = 0.95
    name: ClassVar[str] = "lape"
    wants: ClassVar[Wants] = Wants.TEXTS

    def check(self) -> None:
        check_share("quantile", self.quantile)
        if self.of is not None and not isinstance(self.of, str):
            raise CoreskipError(f"of is {self.of!r}: give the name of one text")

    def score(self, reading: Reading) -> list[Tensor]:
        needs_mlps(reading, self.name)
        if self.of is not None and self.of not in reading.texts:
            raise CoreskipError(f"there is no text {self.of!r}; choose from {', '.join(reading.texts)}")
        names = list(reading.texts)
        by_text = [firing(reading, name) for name in names]
        layers = [torch.stack(each) for each in zip(*by_text, strict=True)]  # [texts, width]
        least = _quantile(torch.cat([each.flatten() for each in layers]), self.quantile)
        return [self._of_layer(each, names, least) for each in layers]

    def _of_layer(self, probability: Tensor, names: list[str], least: float) -> Tensor:
        share = probability / probability.sum(0).clamp_min(1e-30)
        entropy = -torch.special.xlogy(share, share).sum(0)
        fires = (probability if self.of is None else probability[names.index(self.of)][None]).amax(0) >= least
        return torch.where(fires, math.log(len(names)) - entropy, 0.0).clamp_min(0.0)


def firing(reading: Reading, name: str) -> list[Tensor]:
    """Of every neuron, the share of a text's tokens on which its gate, in a plain MLP its activation, is positive: fp64
    ``[width]`` per layer."""
    sums, rows = reading.empty(), reading.texts[name]

    def see(layer: int, gate: Tensor) -> None:
        sums[layer] += (gate > 0).sum(0)

    with gates(reading.anatomy, see):
        reading.through(rows, f"firing in {name}")
    return [total / rows.numel() for total in sums]


@contextmanager
def gates(anatomy: Anatomy, tap: Tap) -> Iterator[None]:
    """Call ``tap(layer, gate)`` with what enters every activation of an MLP, ``[tokens, width]``; of a plain MLP it is
    the up projection's output."""
    handles = []

    def hook(index: int, mlp: FeedForward) -> Callable[[nn.Module, Any, Tensor], None]:
        def after(module: nn.Module, args: Any, output: Tensor) -> None:
            flat = output.flatten(0, -2)
            tap(index, flat.chunk(2, -1)[0] if mlp.stacked else flat)

        return after

    try:
        for index, mlp in anatomy.present:
            handles.append(mlp.pre_activation.register_forward_hook(of_this_thread(hook(index, mlp))))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _quantile(values: Tensor, share: float) -> float:
    """The value below which `share` of the values lie; of any number of values, which torch.quantile does not take."""
    return float(values.kthvalue(max(1, min(len(values), math.ceil(share * len(values))))).values)


@source
@dataclass(frozen=True)
class Relation(Source):
    """How well a neuron tells the text's pieces from the other's: the average precision of ranking all pieces of both
    by the neuron's mean activation over a piece's tokens, positives being the text's. 1: all of them first; about their
    share among the pieces: no connection.

    The statistics by which "On Relation-Specific Neurons" (arXiv 2502.17355, section 3) finds a relation's neurons,
    and Cuadros et al. (arXiv 2110.02802, section 3) experts for a concept. Pieces are the rows of text, of 64 tokens;
    their means are kept, 4 bytes a piece and neuron. One pass over both."""

    name: ClassVar[str] = "relation"
    wants: ClassVar[Wants] = Wants.CONTRAST
    window: ClassVar[int] = 64

    def score(self, reading: Reading) -> list[Tensor]:
        needs_mlps(reading, self.name)
        means: list[list[Tensor]] = [[] for _ in reading.anatomy.layers]

        def see(layer: int, a: Tensor) -> None:
            means[layer].append(a.float().mean(0).cpu())

        for name in ("text", AGAINST):
            with taps(reading.anatomy, see):
                reading.through(reading.texts[name], f"means of the {name}'s pieces")
        positive = torch.arange(sum(map(len, reading.texts.values()))) < len(reading.texts["text"])
        return [average_precision(torch.stack(rows), positive) if rows else torch.zeros(0) for rows in means]


def average_precision(values: Tensor, positive: Tensor) -> Tensor:
    """Of every column of values ``[pieces, width]``: rank the pieces by it, highest first; the mean, over the positive
    ones, of the share of positives down to there. Equal values rank in order. bool ``[pieces]``; fp64 ``[width]``."""
    hits = positive[values.argsort(dim=0, descending=True, stable=True)].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1, dtype=torch.float64)[:, None]
    return (precision * hits).sum(0) / positive.sum()


Ablated = Literal["heads", "mlps"]


@source
@dataclass(frozen=True)
class Ablation(Source):
    """What the text's next tokens lose, nats per token, where one attention head, or one whole MLP, gives nothing: the
    causal measure by which the few heads and MLPs that do arithmetic were found (arXiv 2409.01659, section 3; that
    paper replaces a head's output by its output on a corrupted prompt, this by zero). As many passes over the text as
    there are heads or MLPs: give a short one.

    what: ``heads`` or ``mlps``.
    """

    what: Ablated = "heads"
    name: ClassVar[str] = "ablation"

    @property
    def unit(self) -> Unit:
        return self.what

    def check(self) -> None:
        if self.what not in get_args(Ablated):
            raise CoreskipError(f"what is {self.what!r}; choose from {', '.join(get_args(Ablated))}")

    def score(self, reading: Reading) -> list[Tensor]:
        rows = reading.rows.to(reading.device)
        dense = self._loss(reading, rows)
        parts = [self._parts(reading, layer) for layer in range(len(reading.anatomy))]
        found: list[list[float]] = [[] for _ in parts]
        every = [(layer, part) for layer, each in enumerate(parts) for part in each]
        for layer, (module, columns) in reading.bar(every, f"leaving out {self.what}"):
            with _silenced(module, columns):
                found[layer].append(self._loss(reading, rows) - dense)
        return [torch.tensor(losses, dtype=torch.float64) for losses in found]

    def _loss(self, reading: Reading, rows: Tensor) -> float:
        total = sum(
            float(next_token_loss(ids)(reading.model(input_ids=ids, use_cache=False).logits)) for ids in rows.split(1)
        )
        return total / (rows.shape[0] * (rows.shape[1] - 1))

    def _parts(self, reading: Reading, layer: int) -> list[tuple[nn.Module, slice]]:
        """The modules, and the columns of their input, that are left out one by one."""
        if self.what == "mlps":
            mlp = reading.anatomy.feed_forwards[layer]
            return [] if mlp is None else [(mlp.down, slice(None))]
        attention = reading.anatomy.attentions[layer]
        return [] if attention is None else _heads(attention, reading.model.config.get_text_config())


def _heads(attention: Attention, config: Any) -> list[tuple[nn.Module, slice]]:
    output = cast(nn.Module, getattr(attention.module, attention.output))
    width, heads = shape_of(output)[1], int(config.num_attention_heads)
    if width % heads:
        raise CoreskipError(f"an attention's output takes {width} numbers, which are not those of {heads} heads")
    size = width // heads
    return [(output, slice(head * size, (head + 1) * size)) for head in range(heads)]


@contextmanager
def _silenced(module: nn.Module, columns: slice) -> Iterator[None]:
    """These columns of what goes into `module` are 0."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        x[..., columns] = 0
        return (x, *args[1:])

    handle = module.register_forward_pre_hook(of_this_thread(before))
    try:
        yield
    finally:
        handle.remove()
