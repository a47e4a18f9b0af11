"""Neurons read through the LM head: which tokens a neuron promotes, and what makes it fire ("Decoding specialised
feature neurons in LLMs with the final projection layer", arXiv 2501.02688).

The paper multiplies the rows of the up projection with the head: what they look for. What a neuron writes is its column
of the down projection; both are offered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from .anatomy import Anatomy, dissect, rows_of
from .errors import CoreskipError
from .sources import Reading, Source, Wants, needs_mlps, source

_AT_ONCE = 256  # neurons whose logits are held together, 4 bytes a token of the vocabulary each

Side = Literal["writes", "reads"]


@dataclass(frozen=True, eq=False)
class LMHead:
    """The head as a lens.

    Attributes:
        rows: the head's matrix times the final norm's gains, fp32 ``[vocabulary, hidden]``.
        anatomy: the model's parts.
    """

    rows: Tensor
    anatomy: Anatomy

    @classmethod
    def of(cls, model: Any) -> LMHead:
        anatomy = dissect(model)
        head = rows_of(model.get_output_embeddings())[0].float()
        return cls(head * _gains(anatomy), anatomy)

    def logits(self, layer: int, neurons: Tensor | slice = slice(None), side: Side = "writes") -> Tensor:
        """What one unit of the neurons' activation adds to each token's logit, up to the scale of the final norm; with
        ``reads``, what each token's direction adds to their gate (of a plain MLP, their up row). fp32 ``[neurons,
        vocabulary]``."""
        matrices = self.anatomy.mlp(layer).matrices()
        looks = matrices.up if matrices.gate is None else matrices.gate
        directions = (matrices.down if side == "writes" else looks)[neurons].float()
        return directions @ self.rows.t()

    def promoted(self, layer: int, neuron: int, count: int = 10, side: Side = "writes") -> list[tuple[int, float]]:
        """The tokens that a neuron promotes most, and by how many standard deviations of its logits."""
        self.check(layer, neuron)
        score = standardised(self.logits(layer, torch.tensor([neuron]), side))[0]
        best = score.topk(min(count, len(score)))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    def promoters(self, token: int, count: int = 10) -> list[tuple[int, int, float]]:
        """The neurons whose logits stand out most at a token: layer, neuron, standard deviations."""
        found: list[tuple[float, int, int]] = []
        for layer, neurons, logits in self.every():
            score = standardised(logits)[:, token]
            best = score.topk(min(count, len(score)))
            found += [
                (v, layer, int(neurons[i])) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        return [(layer, neuron, value) for value, layer, neuron in sorted(found, reverse=True)[:count]]

    def every(self, side: Side = "writes") -> Iterator[tuple[int, Tensor, Tensor]]:
        """All neurons in blocks: layer, their numbers, their logits ``[neurons, vocabulary]``."""
        for layer, mlp in self.anatomy.present:
            for neurons in torch.arange(mlp.intermediate_size).split(_AT_ONCE):
                yield layer, neurons, self.logits(layer, neurons, side)

    def check(self, layer: int, neuron: int) -> None:
        """Raise `CoreskipError` unless the model has such a neuron."""
        if not 0 <= layer < len(self.anatomy):
            raise CoreskipError(f"there is no layer {layer}: the model has layers 0 to {len(self.anatomy) - 1}")
        width = self.anatomy.mlp(layer).intermediate_size
        if not 0 <= neuron < width:
            raise CoreskipError(f"layer {layer} has no neuron {neuron}: it has neurons 0 to {width - 1}")


def standardised(logits: Tensor) -> Tensor:
    """Logits ``[neurons, vocabulary]`` in standard deviations from their mean over the vocabulary: neurons of large
    norm are no clearer than others."""
    centred = logits - logits.mean(-1, keepdim=True)
    return centred / centred.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)


def _gains(anatomy: Anatomy) -> Tensor:
    """The final norm's gain of every channel, fp32 ``[hidden]``; 1 where no such norm is found.

    Found by what the norm does to a vector of alternating signs and its opposite, whose mean is 0 and whose root mean
    square is 1: so a gain that the norm keeps as 1 + w, and a bias, come out right."""
    norm = _final_norm(anatomy)
    probe = torch.ones(anatomy.hidden_size)
    probe[1::2] = -1
    if norm is None:
        return torch.ones(anatomy.hidden_size)
    weight = next(norm.parameters(), None)
    x = probe if weight is None else probe.to(weight.device, weight.dtype)
    with torch.no_grad():
        gains: Tensor = (norm(x) - norm(-x)) / 2 * x
    return gains.float()


def _final_norm(anatomy: Anatomy) -> nn.Module | None:
    """The last part beside the layers, in the module that holds them, with one gain per channel."""
    inside = {id(module) for layer in anatomy.layers for module in layer.modules()}
    norms = [
        module
        for name, module in anatomy.stack.named_children()
        if id(module) not in inside and "norm" in f"{name}{type(module).__name__}".lower()
    ]
    return norms[-1] if norms else None


@source
@dataclass(frozen=True)
class LMHeadClarity(Source):
    """How clearly a neuron stands for one token: its largest logit through the LM head in standard deviations of all of
    its logits; `side`: of what it ``writes`` or ``reads``, see `LMHead.logits`. Reads the weights alone; as many
    multiplications as neurons x vocabulary x hidden size."""

    side: Side = "writes"
    name: ClassVar[str] = "lm_head"
    wants: ClassVar[Wants] = Wants.NOTHING

    def check(self) -> None:
        if self.side not in get_args(Side):
            raise CoreskipError(f"side is {self.side!r}; choose from {', '.join(get_args(Side))}")

    def score(self, reading: Reading) -> list[Tensor]:
        needs_mlps(reading, self.name)
        scores, head = reading.empty(), LMHead.of(reading.model)
        blocks: Iterable[tuple[int, Tensor, Tensor]] = head.every(self.side)
        for layer, neurons, logits in reading.bar(blocks, "reading through the LM head"):
            scores[layer][neurons] = standardised(logits).amax(1).double()
        return scores
