"""Where drafted tokens come from: the text itself (prompt lookup), and the plan.

The plan drafts along the text: where prompt lookup finds a continuation, one draft pass reads several of its tokens,
and those that the plan chooses itself are drafts for the price of one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from .draft_costs import DraftCostModel
from .passes import MAX_DRAFT
from .sampler import Sampler, accepted


@dataclass
class Statistics:
    """What one generation in exact mode did.

    Attributes:
        tokens: generated.
        passes: of the dense model after prefill, over one or several tokens.
        drafted, accepted: tokens by where they came from, "lookup" or "plan".
        prefill_s, draft_s, verify_s, total_s: seconds; what is left of the total is the choice of tokens.
        note: why nothing was drafted; None where drafting was possible.
    """

    tokens: int = 0
    passes: int = 0
    drafted: dict[str, int] = field(default_factory=lambda: {"lookup": 0, "plan": 0})
    accepted: dict[str, int] = field(default_factory=lambda: {"lookup": 0, "plan": 0})
    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    total_s: float = 0.0
    note: str | None = None

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that the dense model accepted; 0 where none was drafted."""
        drafted = sum(self.drafted.values())
        return sum(self.accepted.values()) / drafted if drafted else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens generated per dense pass; prefill, which gives the first, is not counted."""
        return (self.tokens - 1) / self.passes if self.passes else 0.0

    def __str__(self) -> str:
        if self.note is not None:
            return f"{self.tokens} tokens, nothing drafted: {self.note}"
        by = ", ".join(f"{self.accepted[name]} of {n} from the {name}" for name, n in self.drafted.items())
        return (
            f"{self.tokens} tokens in {self.passes} dense passes ({self.tokens_per_pass:.2f} each); accepted {by}; "
            f"prefill {self.prefill_s:.2f} s, drafting {self.draft_s:.2f} s, verifying {self.verify_s:.2f} s "
            f"of {self.total_s:.2f} s"
        )


class PromptLookup:
    """Continuations from the text itself: what followed the latest earlier occurrence of its last 4, 3 or 2 tokens
    (prompt lookup decoding, Saxena 2023)."""

    SIZES = (4, 3, 2)

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._follower: dict[tuple[int, ...], int] = {}  # n-gram -> the place after its latest occurrence
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        for size in self.SIZES:
            if len(self._ids) >= size:
                self._follower[tuple(self._ids[-size:])] = len(self._ids)
        self._ids.append(token)

    def find(self, most: int, drafts: Sequence[int] = ()) -> tuple[int, list[int]]:
        """The length of the match (0: none) and up to `most` tokens that may follow the text and `drafts`."""
        end = [*self._ids[-self.SIZES[0] :], *drafts]
        for size in self.SIZES:
            at = self._follower.get(tuple(end[-size:]))
            if at is not None and len(end) >= size:
                text = (
                    [*self._ids[at : at + most], *drafts] if at + most > len(self._ids) else self._ids[at : at + most]
                )
                while len(text) < most:  # the match runs into the end of the text: the text is repeating itself
                    text += text
                return size, text[:most]
        return 0, []


@dataclass(frozen=True)
class Draft:
    """Drafted `tokens` and, for each, the key that its acceptance is counted under in its `source`."""

    source: str = "lookup"
    keys: Sequence[int] = ()
    tokens: Sequence[int] = ()


class Drafter:
    """Drafts for one generation.

    Attributes:
        last: the text's last token, which no pass has read yet.
    """

    def __init__(
        self, sampler: Sampler, costs: DraftCostModel, statistics: Statistics, plan_drafts: bool, last: int
    ) -> None:
        """`sampler`'s text is the prompt and its first token, `last`; plan_drafts: whether the plan is a draft model,
        or drafts come from the text alone."""
        self._sampler, self._costs, self._statistics, self._plan_drafts = sampler, costs, statistics, plan_drafts
        self._lookup = PromptLookup(sampler.text.ids[0].tolist())
        self.last = last

    def extend(self, tokens: Sequence[int]) -> None:
        """The text was extended by `tokens`."""
        for token in tokens:
            self._lookup.append(token)
        self.last = [self.last, *tokens][-1]

    def record(self, draft: Draft, made: Sequence[int]) -> None:
        """The verification of `draft` chose `made`, up to the first token that differs."""
        source = self._costs.plan if draft.source == "plan" else self._costs.lookup
        for key, drafted, token in zip(draft.keys, draft.tokens, made, strict=False):
            held = accepted(drafted, token)
            source.record(key, held)
            self._statistics.accepted[draft.source] += held

    def draft(self, left: int) -> Draft:
        """The tokens to verify next, at most `left` of which the text has room for; none where drafting does not
        pay."""
        most = min(MAX_DRAFT, left - 1)
        if most <= 0 or not self._costs.ready:
            return Draft()
        costs, drafted = self._costs, self._statistics.drafted
        size, found = self._lookup.find(most)
        from_text, text_rate, draft_s = 0, 1 / costs.verify_s, costs.draft_s
        if size:
            acceptance = costs.lookup.acceptance[size].value
            from_text, text_rate = costs.best_draft_length(acceptance, 0.0, most)
            width = min(most, self._sampler.passes.draft_width - 1)
            draft_s = costs.best_continuation_length(acceptance, width)[1]
        if self._plan_drafts:
            by_plan, plan_rate = costs.best_draft_length(costs.plan.overall.value, draft_s, most)
            price = 0.0 if drafted["plan"] else costs.first_draft_s
            pays = left * (1 / text_rate - 1 / plan_rate) > price
            # trying a source for which even near-perfect drafts would not pay is wasted
            could_pay = left * (1 / text_rate - 1 / costs.best_draft_length(0.95, draft_s, most)[1]) > price
            if could_pay and (pays or not from_text) and costs.plan.due(pays):
                return self._draft_by_plan(most, by_plan)
        if size and costs.lookup.due(from_text > 0):
            tokens = found[: max(1, from_text)]
            drafted["lookup"] += len(tokens)
            return Draft("lookup", [size] * len(tokens), tokens)
        return Draft()

    def _draft_by_plan(self, most: int, hoped: int) -> Draft:
        costs, passes, drafted = self._costs, self._sampler.passes, self._statistics.drafted
        start = passes.length
        # two passes where it has yet to be seen whether drafts pay: the first may pack neurons, the second is timed
        least = 2 if hoped == 0 or not drafted["plan"] else 1
        expected, seconds, probability = 1.0, costs.verify_s, 1.0
        keys: list[int] = []
        drafts: list[int] = []
        while len(drafts) < most and (
            len(drafts) < least or costs.pays(probability * costs.plan.overall.value, costs.draft_s, expected, seconds)
        ):
            count = 1 if not drafted["plan"] or len(drafts) < least else most - len(drafts)
            threshold = self._least_confidence(probability, expected, seconds) if count > 1 else 0.0
            made, probabilities, each_s = self._draft_pass(drafts, most, count, threshold)
            drafts += made
            passes.rollback(start + len(drafts))
            for confidence in probabilities:
                keys.append(0 if math.isnan(confidence) else min(int(confidence * costs.BINS), costs.BINS - 1))
                probability *= costs.plan.acceptance[keys[-1]].value
                expected, seconds = expected + probability, seconds + each_s + costs.verify_token_s
        passes.rollback(start)
        return Draft("plan", keys, drafts)

    def _draft_pass(
        self, drafts: Sequence[int], most: int, count: int, threshold: float
    ) -> tuple[list[int], list[float], float]:
        """One draft pass along a continuation of the text and of `drafts`, or up to `count` draft passes over one token
        each: the tokens that the plan chose, their probabilities, and the seconds that each should cost."""
        costs, statistics = self._costs, self._statistics
        first, last = not statistics.drafted["plan"], drafts[-1] if drafts else self.last
        size, found = self._lookup.find(most - len(drafts), drafts)
        acceptance = costs.lookup.acceptance[size].value if size else 0.0
        room = 0 if first else max(0, min(len(found), self._sampler.passes.draft_width) - 1)
        width = costs.best_continuation_length(acceptance, room)[0]
        begin = time.perf_counter()
        if width:
            made, probabilities = self._sampler.draft_along(last, drafts, found[:width])
        else:
            made, probabilities = self._sampler.draft(last, drafts, count, threshold)
        spent = time.perf_counter() - begin
        passes = 1 if width else len(made)
        costs.record_draft(1 + width, passes, spent, first)
        for proposed, token in zip(found[:width], made, strict=False):
            costs.lookup.record(size, proposed == token)
        statistics.draft_s += spent
        statistics.drafted["plan"] += len(made)
        return made, probabilities, (passes * costs.draft_s + width * costs.draft_token_s) / len(made)

    def _least_confidence(self, probability: float, expected: float, seconds: float) -> float:
        """The plan's probability of a token below which a token after that one is not worth its draft pass, after a
        draft that is accepted with `probability` and gives `expected` tokens in `seconds`."""
        costs = self._costs
        for key in range(costs.BINS):
            further = probability * costs.plan.acceptance[key].value
            after = seconds + costs.draft_s + costs.verify_token_s
            if costs.pays(further * costs.plan.overall.value, costs.draft_s, expected + further, after):
                return key / costs.BINS
        return 2.0
