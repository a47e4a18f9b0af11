"""Which linears need more than 4 bits most, and what all mixtures of widths take and cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..predictors.anatomy import dissect, shape_of
from ..predictors.calibration import TokenText
from ..predictors.checks import WIDTHS, check_count, check_seed, check_share
from ..predictors.errors import CoreskipError
from ..predictors.rounding_recipe import RoundingRecipe
from ..predictors.token_samples import output_gradients
from .formats import bytes_in, format_takers
from .rounding import TOKENS, WINDOW, Rounded, alternatives, windows_of

OF_GRADIENTS = 4096  # tokens

#: by the name of each linear, by width
Costs = dict[str, dict[str, float]]


def _information(model: Any, rows: Tensor, modules: Sequence[nn.Module], seed: int, progress: bool) -> list[Tensor]:
    """Of each output of each module the Fisher information, float32 ``[outputs]``."""
    check_seed(seed)
    sums = [torch.zeros(shape_of(module)[0], dtype=torch.float32, device=rows.device) for module in modules]
    counts = [0] * len(modules)
    for pairs in output_gradients(model, rows, modules, seed=seed, progress=progress):
        for index, (_, gradient) in enumerate(pairs):
            sums[index] += gradient.square().sum(0)
            counts[index] += len(gradient)
    return [total / max(1, count) for total, count in zip(sums, counts, strict=True)]


def costs_of_widths(
    model: Any,
    rows: Tensor,
    *,
    seed: int = 0,
    resume: bool = False,
    progress: bool = True,
    keep: Callable[[dict[str, Rounded]], None] = lambda found: None,
) -> Costs:
    """What rounding each linear, the LM head included, to each width is predicted to cost, KL divergence in nats per
    token: half the sum over outputs of the squared error, as the rounding has measured it, times the Fisher
    information, which is the mean square of the gradient that log p(y) has there, y drawn from the model's own
    predictions.

    Args:
        rows: what calibrates, as `windows_of` gives it; `OF_GRADIENTS` tokens of it have a backward pass, too.
        seed: of drawing y.
        resume: see `compensate`.
        keep: is given every linear in all widths.
    """
    few = max(1, OF_GRADIENTS // rows.shape[1])
    gradients = rows[:: max(1, len(rows) // few)][:few]
    modules = list(dict.fromkeys(format_takers(model, dissect(model))))
    information = dict(zip(modules, _information(model, gradients, modules, seed, progress), strict=True))
    costs: Costs = {}
    for found in alternatives(model, rows, resume=resume, progress=progress):
        keep(found)
        for width, rounded in found.items():
            cost = float((information[rounded.module] * rounded.error).sum()) / 2
            costs.setdefault(rounded.name, {})[width] = cost
    return costs


@dataclass(frozen=True)
class Mixtures:
    """The mixtures of widths to choose from: all linears in 4 bits, and from there on whatever saves most divergence
    per byte is widened next.

    Attributes:
        sizes: bytes of each linear in each width.
        costs: see `costs_of_widths`.
    """

    sizes: Mapping[str, Mapping[str, int]]
    costs: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, model: Any, costs: Costs) -> Mixtures:
        names = {module: name for name, module in model.named_modules()}
        takers = dict.fromkeys(format_takers(model, dissect(model)))
        return cls({names[m]: {width: bytes_in(m, width) for width in WIDTHS} for m in takers}, costs)

    def bytes_of(self, widths: Mapping[str, str]) -> int:
        return sum(of_linear[widths[name]] for name, of_linear in self.sizes.items())

    @property
    def widest(self) -> int:
        """Bytes of all linears in 8 bits."""
        return self.bytes_of(dict.fromkeys(self.sizes, WIDTHS[-1]))

    @property
    def least(self) -> float:
        """Share of these that 4 bits take."""
        return self.bytes_of(dict.fromkeys(self.sizes, WIDTHS[0])) / self.widest

    def within(self, share: float) -> dict[str, str]:
        """Widths that take at most this share of the bytes in 8 bits.

        Raises:
            CoreskipError: not even 4 bits do.
        """
        check_share("share", share)
        widths = dict.fromkeys(self.sizes, WIDTHS[0])
        left = share * self.widest * (1 + 1e-9) - self.bytes_of(widths)
        if left < 0:
            raise CoreskipError(
                f"share is {share:g}; 4 bits everywhere are {self.least:.2f} of the bytes of 8: give more"
            )
        for name, width in self._steps:
            more = self.sizes[name][width] - self.sizes[name][widths[name]]
            if more <= left:
                widths[name] = width
                left -= more
        return widths

    @cached_property
    def _steps(self) -> list[tuple[str, str]]:
        """What is widened, and to what, in order."""
        best = {name: self._next(name, WIDTHS[0]) for name in self.sizes}
        steps = []
        while best:
            name = max(best, key=lambda name: best[name][0])
            _, width = best.pop(name)
            steps.append((name, width))
            if width != WIDTHS[-1]:
                best[name] = self._next(name, width)
        return steps

    def _next(self, name: str, width: str) -> tuple[float, str]:
        """What widening a linear saves per byte, at best, and to what width."""
        sizes, costs = self.sizes[name], self.costs[name]
        wider = WIDTHS[WIDTHS.index(width) + 1 :]
        return max(((costs[width] - costs[to]) / (sizes[to] - sizes[width]), to) for to in wider)


def recipe_within(
    model: Any,
    text: TokenText,
    share: float,
    *,
    tokens: int = TOKENS,
    window: int = WINDOW,
    seed: int = 0,
    progress: bool = True,
) -> RoundingRecipe:
    """Mixed widths whose bytes per token are at most this share of those in 8 bits, the LM head included.

    Raises:
        CoreskipError: 4 bits everywhere are more.
    """
    check_count("tokens", tokens)
    rows = windows_of(model, text, tokens, window)
    nothing = Mixtures.of(model, {})
    if share < nothing.least:
        nothing.within(share)
    widths = Mixtures.of(model, costs_of_widths(model, rows, seed=seed, resume=True, progress=progress)).within(share)
    return RoundingRecipe(widths, rows.cpu().int(), text.fingerprint())
