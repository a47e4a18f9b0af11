"""Where scores come from. A source is one dataclass: its options, what texts it wants, and `score`.

Every source is registered under the name by which `coreskip.scores(method=NAME)` finds it. Adding one takes one file
that is imported in runtime/scoring.py (DESIGN, "Where to add").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .anatomy import Anatomy
from .errors import CoreskipError
from .observe import taps
from .scores import Unit

_T = TypeVar("_T")
AGAINST = "against"  # how the second of two contrasted texts is called


class Wants(Enum):
    """What a source reads."""

    NOTHING = "nothing"  # the weights alone
    TEXT = "text"  # one text
    CONTRAST = "contrast"  # a text, and another that it is held against
    TEXTS = "texts"  # two texts or more, by name


@dataclass(frozen=True, eq=False)
class Reading:
    """What a source is given.

    Attributes:
        model: unwrapped, in evaluation mode, without gradients.
        anatomy: its parts.
        texts: by name, token ids ``[rows, length]`` without padding, the source's own `window` long at most. One text
            is called ``text``, of two that are contrasted the second ``against``.
        prefix: ids that the tokenizer puts before every text (a BOS token, or nothing), which begin every row.
        seed: of whatever is drawn.
    """

    model: Any
    anatomy: Anatomy
    texts: Mapping[str, Tensor]
    prefix: Tensor
    seed: int
    progress: bool

    @property
    def rows(self) -> Tensor:
        """The token ids of the one text, or the first of two."""
        return self.texts["text"]

    def bar(self, items: Iterable[_T], what: str, total: int | None = None) -> Iterator[_T]:
        """The items, with a progress bar on stderr."""
        yield from tqdm(items, total=total, desc=what, disable=not self.progress, leave=False)

    def through(self, rows: Tensor, what: str) -> None:
        """Rows ``[rows, length]`` through the decoder layers, one at a time, for hooks to see."""
        for ids in self.bar(rows.split(1), what, len(rows)):
            self.anatomy.stack(input_ids=ids.to(self.device), use_cache=False)

    def summed(self, rows: Tensor, what: str, of: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        """Per layer the sum over the rows' tokens of ``of(layer, a)``, a the neurons' activations, fp32 ``[tokens,
        width]``; fp64 ``[width]``."""
        sums = self.empty()

        def see(layer: int, a: Tensor) -> None:
            sums[layer] += of(layer, a.float()).sum(0, dtype=torch.float64)

        with taps(self.anatomy, see):
            self.through(rows, what)
        return sums

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def empty(self) -> list[Tensor]:
        """fp64 zeros for every layer's neurons, on the model's device."""
        widths = [0 if mlp is None else mlp.intermediate_size for mlp in self.anatomy.feed_forwards]
        return [torch.zeros(width, dtype=torch.float64, device=self.device) for width in widths]


class Source:
    """One measure of importance.

    Attributes:
        name: how it is called.
        wants: what it reads.
        window: tokens of a row of text, at most.
    """

    name: ClassVar[str]
    wants: ClassVar[Wants] = Wants.TEXT
    window: ClassVar[int] = 256

    @property
    def unit(self) -> Unit:
        """What is scored."""
        return "neurons"

    def check(self) -> None:
        """Raise `CoreskipError` where an option makes no sense."""

    def score(self, reading: Reading) -> list[Tensor]:
        """One tensor ``[units]`` per layer, any float dtype, finite; empty where the layer has none."""
        raise NotImplementedError


S = TypeVar("S", bound=type[Source])
SOURCES: dict[str, type[Any]] = {}


def source(cls: S) -> S:
    """Registers a source under its name."""
    if cls.name in SOURCES:
        raise ValueError(f"there is a source {cls.name!r} already")
    SOURCES[cls.name] = cls
    return cls


def needs_mlps(reading: Reading, name: str) -> None:
    """Raise `CoreskipError` where the model has no MLP in any layer whose neurons could be scored."""
    if not any(reading.anatomy.present):
        raise CoreskipError(
            f"{name} scores the neurons of MLPs, and this {reading.anatomy.model_type!r} model has experts alone: "
            "score these by reap"
        )
