"""Of the budget search: weights rounded with the text, in mixtures of widths (sensitivity.py).

The model is rounded once, every matrix in every width; a candidate takes one of each. Its quality is that of the packed
model which it would become, with these very numbers, through the kernels. What the widths cost is kept in the search's
journal: a search that goes on rounds again only for what is still to be measured.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Protocol

import torch

from ..kernels.ops import MAX_ROWS
from ..predictors.anatomy import dissect
from ..predictors.checks import AS_PACKED
from ..predictors.observe import inference
from ..predictors.plan import Plan
from ..predictors.rounding_recipe import RoundingRecipe
from .calibrate import Study
from .cost import loaded_bytes
from .formats import format_takers
from .quality import decode_logits
from .rounded_model import decoding_rounded
from .rounding import TOKENS, WINDOW, Rounded, windows_of
from .sensitivity import Costs, Mixtures, costs_of_widths

_STEP = 0.02  # between the shares of the bytes in 8 bits that are tried


class Known(Protocol):
    """A search's journal."""

    def get(self, key: str) -> dict[str, Any] | None: ...

    def add(self, key: str, quality: dict[str, Any]) -> None: ...


class Roundings:
    """All mixtures of one study. about: what tells the study from others in the journal."""

    def __init__(self, study: Study, journal: Known, about: str) -> None:
        self._study, self._journal, self._about = study, journal, about
        model = study.model
        linears = list(dict.fromkeys(format_takers(model, dissect(model))))
        self._sizes = Mixtures.of(model, {})
        self._others = loaded_bytes(model) - sum(module.weight.nbytes for module in linears)
        self._dense = Plan.dense(model, AS_PACKED)
        self._found: dict[str, dict[str, Rounded]] = {}

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the bytes of all linears in 8 bits, the most first; 4 bits everywhere come last."""
        least = math.ceil(1e4 * self._sizes.least) / 1e4
        steps = range(math.floor(least / _STEP) + 1, round(1 / _STEP))
        return (*(round(_STEP * step, 2) for step in reversed(steps)), least)

    def nbytes(self, share: float) -> float:
        """Bytes of a token at most."""
        return float(self._others + share * self._sizes.widest)

    def plan(self, share: float) -> Plan:
        """A plan that leaves nothing out, to be packed with."""
        widths = Mixtures(self._sizes.sizes, self._costs).within(share)
        recipe = RoundingRecipe(widths, self._rows.cpu().int(), self._study.seen.fingerprint())
        return replace(self._dense, rounding=recipe, recipe={**self._dense.recipe, "share": share})

    def measure(self, plan: Plan, part: str, windows: int | None) -> dict[str, Any]:
        """`Study.measure` of the packed model that the plan makes."""
        assert plan.rounding is not None
        model, judge = self._study.model, self._study.windows_of(part, windows)
        if not self._found:
            self._round()
        found = [self._found[name][width] for name, width in plan.rounding.widths.items()]
        with inference(model), decoding_rounded(model, found):
            return judge.judged(partial(decode_logits, model, at_once=MAX_ROWS), windows or self._study.windows)

    @cached_property
    def _rows(self) -> torch.Tensor:
        seen = self._study.seen
        window = min(WINDOW, len(seen.ids) + len(seen.prefix))  # a short text is one window
        return windows_of(self._study.model, seen, min(TOKENS, self._study.tokens), window)

    @property
    def _costs(self) -> Costs:
        known = self._journal.get(self._key)
        return known if known is not None else self._round()

    @property
    def _key(self) -> str:
        return f"{self._about} costs of widths"

    def _round(self) -> Costs:
        """Rounds everything; what it costs, by name and width."""

        def keep(found: dict[str, Rounded]) -> None:
            self._found[next(iter(found.values())).name] = found

        costs = costs_of_widths(
            self._study.model, self._rows, seed=self._study.seed, resume=True, progress=self._study.progress, keep=keep
        )
        if self._journal.get(self._key) is None:
            self._journal.add(self._key, costs)
        return costs
