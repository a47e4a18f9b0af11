"""Which token comes next in one sequence of many: by options, random numbers and constraints of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from .sequence import Constraint, Request, TokenLogprob

_FEW = 512  # tokens that are sorted first


class TokenChooser:
    """Chooses the tokens of one sequence.

    Args:
        processors: of transformers, before the constraint.
        draw: takes a token from the scores that they leave; None: the likeliest one is taken.
        logprobs: of how many of the likeliest tokens log-probabilities are wanted beside the chosen one's; None: none.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        draw: Draw | None = None,
        logprobs: int | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self._processors, self._draw = processors, draw
        self._logprobs, self._constraint = logprobs, constraint

    @classmethod
    def of(cls, request: Request) -> TokenChooser:
        draw = _Drawn(request) if request.temperature > 0 else None
        return cls(_processors(request), draw, request.logprobs, request.constraint)

    @property
    def plain(self) -> bool:
        """Whether it takes the likeliest token of the model's own logits, and nothing more is asked of it."""
        asked = self._logprobs is not None or self._constraint is not None or self._draw is not None
        return not asked and not self._processors

    def choose(self, ids: Tensor, logits: Tensor) -> tuple[int, TokenLogprob | None]:
        """The next token after `ids` int64 ``[1, length]``, by the model's `logits` ``[vocabulary]``.

        Raises:
            RuntimeError: no token has a probability. Whatever a processor or the constraint raises.
        """
        raw = logits.to(copy=True, dtype=torch.float32, device=ids.device)
        scores = raw if self._logprobs is None else raw.clone()
        scores = self._processors(cast(torch.LongTensor, ids), cast(torch.FloatTensor, scores[None]))[0]
        if self._constraint is not None:
            masked = self._constraint.mask(scores)
            scores = scores if masked is None else masked
        token = _likeliest(scores) if self._draw is None else self._draw(scores)
        if self._constraint is not None:
            self._constraint.accept(token)
        if self._logprobs is None:
            return token, None
        return token, TokenLogprob.of(raw.log_softmax(-1), token, self._logprobs)


#: from scores, float32 ``[vocabulary]``, to a token
Draw = Callable[[Tensor], int]


def _likeliest(scores: Tensor) -> int:
    token = int(scores.argmax())
    if float(scores[token]) == -math.inf:
        raise RuntimeError("no token is allowed here")
    return token


def as_transformers_draws(generator: torch.Generator) -> Draw:
    """The token that transformers draws with the same random numbers (by ``torch.multinomial``)."""

    def draw(scores: Tensor) -> int:
        probabilities = scores.softmax(-1).cpu()
        noise = torch.empty_like(probabilities).exponential_(1, generator=generator)
        token = int((probabilities / noise).argmax())
        if math.isnan(float(probabilities[token])):
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        return token

    return draw


class _Drawn:
    """Draws by a request's temperature, top_k, top_p and min_p, in this order, as transformers has them. Mostly a few
    hundred tokens hold nearly all of the probability: only where they do not is a whole vocabulary sorted, which takes
    as long as a small model's step."""

    def __init__(self, request: Request) -> None:
        self._temperature, self._top_k = float(request.temperature), request.top_k
        self._top_p = 1.0 if request.top_p is None else float(request.top_p)
        self._min_p = 0.0 if request.min_p is None else float(request.min_p)
        self._generator = torch.Generator()
        self._generator.seed() if request.seed is None else self._generator.manual_seed(request.seed)

    def __call__(self, scores: Tensor) -> int:
        chances = (scores.cpu() / self._temperature).softmax(-1)
        tokens = None
        if self._top_k is not None or self._top_p < 1:
            chances, tokens = self._likeliest(chances)
        chances = torch.where(chances >= self._min_p * chances.max(), chances, 0.0)
        sums = chances.double().cumsum(0)
        point = torch.rand((), dtype=torch.float64, generator=self._generator) * sums[-1]
        if not float(sums[-1]) > 0:
            raise RuntimeError("no token has a probability")
        at = min(int(torch.searchsorted(sums, point, right=True)), int(chances.nonzero()[-1]))
        return at if tokens is None else int(tokens[at])

    def _likeliest(self, chances: Tensor) -> tuple[Tensor, Tensor]:
        """Those that top_k and top_p leave, the likeliest first, and which tokens they are of."""
        size = chances.numel()
        few = min(size, _FEW if self._top_k is None else self._top_k)
        found, tokens = chances.topk(few)
        if self._top_k is None and few < size and float(found.sum()) < self._top_p:
            found, tokens = chances.sort(descending=True)
        whole = found.double()
        if self._top_k is not None:
            whole = whole / whole.sum()
        kept = max(1, int((whole.cumsum(0) - whole < self._top_p).sum()))
        return found[:kept], tokens[:kept]


class _Bias(LogitsProcessor):
    """OpenAI's ``logit_bias``."""

    def __init__(self, bias: Any) -> None:
        self._tokens = torch.tensor(list(bias), dtype=torch.int64)
        self._bias = torch.tensor([float(value) for value in bias.values()])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self._tokens] += self._bias.to(scores.device)
        return scores


class _Penalties(LogitsProcessor):
    """OpenAI's presence and frequency penalties: of the tokens after the prompt."""

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self._prompt, self._presence, self._frequency = prompt, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, counts = input_ids[0, self._prompt :].unique(return_counts=True)
        scores[:, tokens] -= self._presence + self._frequency * counts.to(scores.dtype)
        return scores


def _processors(request: Request) -> LogitsProcessorList:
    found = LogitsProcessorList()
    if request.logit_bias:
        found.append(_Bias(request.logit_bias))
    if request.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(float(request.repetition_penalty)))
    if request.presence_penalty or request.frequency_penalty:
        found.append(_Penalties(len(request.ids), request.presence_penalty, request.frequency_penalty))
    return found
