"""Which layers a user wants left out, as text. Without torch, so that a command line is refused at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import CoreskipError

#: What is left out: whole layers, or halves of them.
Leave = Literal["layers", "attentions", "mlps"]

_COUNTED = ("skip", "skip-attention", "skip-mlp")  # so many, those of least block influence


@dataclass(frozen=True)
class LayerSelection:
    """Which layers a plan leaves out, as a user writes it: see `parse`."""

    kind: str
    amount: float

    @classmethod
    def parse(cls, text: str) -> LayerSelection:
        """``skip:6``, ``skip-attention:6`` or ``skip-mlp:6`` leave out the 6 of least block influence, ``every:2``
        every second layer, ``adaptive:0.8`` the layers void in most of the prompt under LAC's alpha of 0.8.

        Raises:
            CoreskipError: none of these.
        """
        kind, _, amount = text.partition(":") if isinstance(text, str) else ("", "", "")
        try:
            value = float(amount)
        except ValueError:
            value = -1.0
        whole = value >= (2 if kind == "every" else 1) and value == int(value)
        if not (kind == "adaptive" and 0 <= value < float("inf")) and not (whole and kind in (*_COUNTED, "every")):
            raise CoreskipError(
                f"cannot read the layers {text!r}; write skip:6, skip-attention:6, skip-mlp:6, every:2 or adaptive:0.8"
            )
        return cls(kind, value)

    def __str__(self) -> str:
        return f"{self.kind}:{self.amount:g}"

    def check(self, depth: int) -> None:
        """Raise `CoreskipError` where a model of so many layers would have none left, or has not got them."""
        if self.kind in _COUNTED and self.amount > depth:
            raise CoreskipError(f"{self} leaves out more layers than the model's {depth}")
        if self.kind == "every" and self.amount > depth:
            raise CoreskipError(f"{self} leaves out none of the model's {depth} layers: give every:{depth} or less")
        if self.kind == "skip" and self.amount == depth:
            raise CoreskipError(f"{self} leaves out all of the model's {depth} layers: leave at least one")
