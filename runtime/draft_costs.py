"""What passes cost and how often drafted tokens are accepted, as measured; and the draft lengths that follow."""

from __future__ import annotations

import statistics
from collections import deque
from typing import cast


class AcceptanceRate:
    """A success rate that forgets: the last few dozen outcomes count, beside a prior belief that weighs as two."""

    def __init__(self, prior: float) -> None:
        self._prior, self._accepted, self._drafted = prior, 0.0, 0.0

    def record(self, accepted: bool) -> None:
        self._accepted, self._drafted = 0.97 * self._accepted + accepted, 0.97 * self._drafted + 1

    @property
    def value(self) -> float:
        return (self._accepted + 2 * self._prior) / (self._drafted + 2)


class _MedianSeconds:
    """The median of the last few measurements: one pass in a few dozen is interrupted by something else."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=9)
        self.value: float | None = None

    def record(self, seconds: float) -> None:
        self._recent.append(seconds)
        self.value = statistics.median(list(self._recent))


class DraftSource:
    """One place that drafts come from: how often its tokens are accepted, and when to try it again after it did not
    pay.

    acceptance: by key, a mark that tells a source's likelier tokens from its less likely ones. Prompt lookup's key is
    the length of the match, the plan's is the bin of the token's probability under the plan.
    """

    RETRY_AFTER = 32  # decisions against the source, at first; doubled at each retry, up to MAX_RETRY_AFTER
    MAX_RETRY_AFTER = 1024

    def __init__(self, priors: dict[int, float]) -> None:
        self.acceptance = {key: AcceptanceRate(prior) for key, prior in priors.items()}
        self.overall = AcceptanceRate(statistics.mean(priors.values()))
        self._retry_after, self._unused = self.RETRY_AFTER, 0

    def record(self, key: int, accepted: bool) -> None:
        self.acceptance[key].record(accepted)
        self.overall.record(accepted)

    def due(self, pays: bool) -> bool:
        """Whether to draft from this source now. A source that does not pay is tried now and then, ever more rarely."""
        if pays:
            self._retry_after, self._unused = self.RETRY_AFTER, 0
            return True
        self._unused += 1
        if self._unused < self._retry_after:
            return False
        self._retry_after, self._unused = min(2 * self._retry_after, self.MAX_RETRY_AFTER), 0
        return True


class DraftCostModel:
    """Measured seconds of passes and acceptance rates of drafts: decides where to draft from, and how many tokens.

    The measure is expected tokens per second. Let p be the probability that all of a draft is accepted, and a that one
    more token is. That token then adds p * a tokens, for the seconds of a draft pass and of one more token to verify.
    """

    BINS = 8  # of a drafted token's probability under the plan

    def __init__(self) -> None:
        self._verify, self._verify_token = _MedianSeconds(), _MedianSeconds()
        self._draft, self._draft_token, self._first_draft = _MedianSeconds(), _MedianSeconds(), _MedianSeconds()
        self.lookup = DraftSource({2: 0.4, 3: 0.6, 4: 0.8})
        self.plan = DraftSource({i: (i + 0.5) / self.BINS for i in range(self.BINS)})
        self._packed_for: set[bool] = set()

    def record_verification(self, tokens: int, seconds: float) -> None:
        """A dense pass over `tokens` tokens took `seconds`. The first pass over one token and the first over several
        are not kept: weights are packed in these."""
        if (tokens > 1) not in self._packed_for:
            self._packed_for.add(tokens > 1)
        elif tokens == 1:
            self._verify.record(seconds)
        elif self._verify.value is not None:
            self._verify_token.record(max(0.0, seconds - self._verify.value) / (tokens - 1))

    def record_draft(self, tokens: int, passes: int, seconds: float, first: bool) -> None:
        """`passes` draft passes over `tokens` tokens each took `seconds` together. first: they are the first of a
        generation, in which the neurons that the generation decodes with are packed."""
        if first:
            self._first_draft.record(seconds)
        elif tokens == 1:
            self._draft.record(seconds / passes)
        elif self._draft.value is not None:
            self._draft_token.record(max(0.0, seconds - self._draft.value) / (tokens - 1))

    @property
    def ready(self) -> bool:
        """Whether a dense pass over one token has been timed, which drafts are compared with."""
        return self._verify.value is not None

    @property
    def verify_s(self) -> float:
        """Seconds of a dense pass over one token."""
        return cast(float, self._verify.value)

    @property
    def verify_token_s(self) -> float:
        """Seconds of one more token in a verification; a twentieth of a dense pass until they are measured."""
        return self._verify_token.value if self._verify_token.value is not None else 0.05 * self.verify_s

    @property
    def draft_s(self) -> float:
        """Seconds of a draft pass over one token; half a dense pass until they are measured."""
        return self._draft.value if self._draft.value is not None else 0.5 * self.verify_s

    @property
    def draft_token_s(self) -> float:
        """Seconds of one more token in a draft pass; a fifth of the pass until they are measured."""
        return self._draft_token.value if self._draft_token.value is not None else 0.2 * self.draft_s

    @property
    def first_draft_s(self) -> float:
        """Seconds of a generation's first draft pass; 0 until they are measured."""
        return self._first_draft.value or 0.0

    def pays(self, probability: float, draft_s: float, expected: float, seconds: float) -> bool:
        """Whether a token that is reached and accepted with `probability`, and drafted in `draft_s` seconds, should be
        appended to a draft that gives `expected` tokens in `seconds`."""
        return probability * seconds > expected * (draft_s + self.verify_token_s)

    def best_draft_length(self, acceptance: float, draft_s: float, most: int) -> tuple[int, float]:
        """The best draft length up to `most`, where every token is accepted with the same probability and drafted in
        `draft_s` seconds; and the tokens per second that the length gives."""
        expected, seconds, probability = 1.0, self.verify_s, 1.0
        for length in range(most):
            probability *= acceptance
            if not self.pays(probability, draft_s, expected, seconds):
                return length, expected / seconds
            expected, seconds = expected + probability, seconds + draft_s + self.verify_token_s
        return most, expected / seconds

    def best_continuation_length(self, acceptance: float, most: int) -> tuple[int, float]:
        """How many tokens of a continuation found by prompt lookup one draft pass should read, up to `most`, where the
        plan chooses each of them with the same probability; and the seconds that a drafted token then costs."""
        drafted, seconds, probability = 1.0, self.draft_s, 1.0
        for length in range(most):
            probability *= acceptance
            if probability * seconds <= drafted * self.draft_token_s:
                return length, seconds / drafted
            drafted, seconds = drafted + probability, seconds + self.draft_token_s
        return most, seconds / drafted
