"""Which tokens the passes of exact mode choose: drafted under the plan, accepted by the dense model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .passes import CapturedPasses, NativePasses, Passes
from .text import Text


def accepted(drafted: int, token: int) -> bool:
    """The acceptance rule: a drafted token stays where the dense model chose the same."""
    return drafted == token


class Sampler:
    """Chooses the tokens of dense passes and of draft passes by every option that transformers' generation has."""

    def __init__(self, passes: Passes, text: Text, ends: Sequence[int] | None = None) -> None:
        self.passes, self.text, self._ends = passes, text, ends or ()

    def accept(self, drafts: Sequence[int], logits: Tensor, margin: float) -> list[int]:
        """Extend the text by the tokens chosen from the dense `logits` ``[1 + drafts, vocabulary]``, up to the first
        token that was not drafted; returns these. With a `margin`, up to the first token that logits within `margin`
        of these could decide otherwise, which is not appended."""
        made: list[int] = []
        for row, drafted in enumerate([*drafts, None]):
            if margin and drafts and not self.text.is_certain(logits[row], margin):
                break
            made.append(self.text.append(logits[row]))
            if drafted is None or self.text.finished or not accepted(drafted, made[-1]):
                break
        return made

    def draft_along(
        self, last: int, drafts: Sequence[int], continuation: Sequence[int]
    ) -> tuple[list[int], list[float]]:
        """One draft pass over the text's `last` token and its `continuation`, found by prompt lookup: the tokens that
        the plan chooses after `drafts`, up to the first that is not the next of `continuation`, and their
        probabilities."""
        logits, made, probabilities = self.passes.draft([last, *continuation]), list[int](), list[float]()
        for row, expected in zip(logits, [*continuation, None], strict=True):
            token, probability = self.text.draft_token([*drafts, *made], row)
            made.append(token)
            probabilities.append(probability)
            if token != expected:
                break
        return made, probabilities

    def draft(
        self, last: int, drafts: Sequence[int], count: int, min_probability: float
    ) -> tuple[list[int], list[float]]:
        """Draft passes over one token each: the tokens that the plan chooses after `drafts`, at most `count` or up to
        the first whose probability is below `min_probability`; and their probabilities."""
        return self.draft_along(last, drafts, [])


class GreedySampler(Sampler):
    """The likeliest tokens, without logits processors: native and captured passes find these themselves. In Python the
    choice of a token took 0.3 ms, and a draft step 0.5 ms besides its own 4.2 ms."""

    passes: NativePasses | CapturedPasses

    def accept(self, drafts: Sequence[int], logits: Tensor, margin: float) -> list[int]:
        tokens, _ = self.passes.likeliest(logits, chances=False)
        made: list[int] = []
        for token, drafted in zip(tokens, [*drafts, None], strict=True):
            made.append(token)
            if drafted is None or token in self._ends or not accepted(drafted, token):
                break
        self.text.extend(made)
        return made

    def extend(self, last: int, count: int) -> list[int]:
        """Extend the text by `count` tokens, or up to its end, without a draft; returns these."""
        made = self.passes.greedy(last, count, self._ends)
        self.text.extend(made)
        return made

    def draft_along(
        self, last: int, drafts: Sequence[int], continuation: Sequence[int]
    ) -> tuple[list[int], list[float]]:
        made, probabilities = self.passes.likeliest(self.passes.draft([last, *continuation]))
        matching = next((i for i, token in enumerate(continuation) if token != made[i]), len(continuation))
        return made[: matching + 1], probabilities[: matching + 1]

    def draft(
        self, last: int, drafts: Sequence[int], count: int, min_probability: float
    ) -> tuple[list[int], list[float]]:
        return self.passes.draft_greedily(last, count, min_probability)
