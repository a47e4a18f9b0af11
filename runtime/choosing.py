"""Which token comes next in one sequence of many: by options, random numbers and constraints of its own."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .sequence import Constraint, Request, TokenLogprob


class Chooser:
    """Chooses the tokens of one sequence.

    Args:
        processors: of transformers, before the constraint. warpers: after it: those that shape what is drawn from.
        generator: of its random numbers; None: the likeliest token is taken.
        logprobs: of how many of the likeliest tokens log-probabilities are wanted beside the chosen one's; None: none.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        warpers: LogitsProcessorList | None = None,
        generator: torch.Generator | None = None,
        logprobs: int | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self._processors, self._warpers = processors, warpers or LogitsProcessorList()
        self._generator, self._logprobs, self._constraint = generator, logprobs, constraint

    @classmethod
    def of(cls, request: Request) -> Chooser:
        generator = None
        if request.temperature > 0:
            generator = torch.Generator()
            generator.seed() if request.seed is None else generator.manual_seed(request.seed)
        warpers = _warpers(request) if generator is not None else None
        return cls(_processors(request), warpers, generator, request.logprobs, request.constraint)

    @property
    def plain(self) -> bool:
        """Whether it takes the likeliest token of the model's own logits, and nothing more is asked of it."""
        asked = self._logprobs is not None or self._constraint is not None or self._generator is not None
        return not asked and not self._processors

    def choose(self, ids: Tensor, logits: Tensor) -> tuple[int, TokenLogprob | None]:
        """The next token after `ids` int64 ``[1, length]``, by the model's `logits` ``[vocabulary]``.

        Raises:
            RuntimeError: no token has a probability. Whatever a processor or the constraint raises.
        """
        raw = logits.to(copy=True, dtype=torch.float32, device=ids.device)
        tokens = cast(torch.LongTensor, ids)
        scores = self._processors(tokens, cast(torch.FloatTensor, raw.clone()[None]))
        if self._constraint is not None:
            masked = self._constraint.mask(scores[0])
            scores = scores if masked is None else cast(torch.FloatTensor, masked[None])
        token = self._draw(self._warpers(tokens, scores)[0])
        if self._constraint is not None:
            self._constraint.accept(token)
        if self._logprobs is None:
            return token, None
        return token, TokenLogprob.of(raw.log_softmax(-1), token, self._logprobs)

    def _draw(self, scores: Tensor) -> int:
        if self._generator is None:
            token = int(scores.argmax())
            best = float(scores[token])
            if math.isinf(best) and best < 0:
                raise RuntimeError("no token is allowed here")
            return token
        # as torch.multinomial draws one, and transformers with the same seed
        probabilities = scores.softmax(-1).cpu()
        noise = torch.empty_like(probabilities).exponential_(1, generator=self._generator)
        token = int((probabilities / noise).argmax())
        if math.isnan(float(probabilities[token])):
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        return token


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


def _warpers(request: Request) -> LogitsProcessorList:
    """In the order of transformers."""
    found = LogitsProcessorList()
    if request.temperature != 1:
        found.append(TemperatureLogitsWarper(float(request.temperature)))
    if request.top_k is not None:
        found.append(TopKLogitsWarper(request.top_k))
    if request.top_p is not None and request.top_p < 1:
        found.append(TopPLogitsWarper(float(request.top_p)))
    if request.min_p is not None:
        found.append(MinPLogitsWarper(float(request.min_p)))
    return found
