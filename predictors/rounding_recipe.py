"""How a plan's weights are rounded with a text: all that it takes to round them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import WIDTHS
from .errors import PlanError


@dataclass(frozen=True, eq=False)
class RoundingRecipe:
    """Widths found by measurement, and the text that calibrates the rounding.

    The tokens themselves are here, some tens of kilobytes: a plan whose text has to be brought along again, whole and
    unchanged, or which was sampled from the model, could not be packed later.

    Attributes:
        widths: "int4", "int5" or "int8" by the name of each linear, the LM head included.
        ids: int32 ``[windows, length]``, tokens as the model sees them.
        text: what they were taken from: source, tokens, sha256, as `TokenText.fingerprint` has it.
    """

    widths: Mapping[str, str]
    ids: Tensor
    text: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name, width in self.widths.items():
            if width not in WIDTHS:
                raise PlanError(f"the plan rounds {name} to {width!r}, which is none of {', '.join(WIDTHS)}")
        ids = self.ids
        if ids.dtype != torch.int32 or ids.dim() != 2 or not ids.numel() or int(ids.min()) < 0:
            raise PlanError("the plan's rounding has no text of token ids")
        if not isinstance(self.text.get("source"), str):
            raise PlanError("the plan's rounding does not say what its text is")

    def count(self, width: str) -> int:
        """How many linears get it."""
        return sum(each == width for each in self.widths.values())
