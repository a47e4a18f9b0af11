"""Passes of the model over one sequence's KV cache, as exact mode and the loop without drafts call them.

Exact mode needs a pass over k tokens to give the logits of k passes over one token each. The linear layers' decode
kernels do that; attention does where it is run query by query. `rounding_error` tests whether a whole model does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from ..kernels.ops import MAX_ROWS
from ..kernels.step import likeliest
from .lower_cpu import StepProgram
from .lower_gpu import CapturedSteps
from .native import NativeSequence
from .phases import drafting, mode

MAX_DRAFT = MAX_ROWS - 1  # drafted tokens of one verification pass, which also holds the last accepted token


class Passes(Protocol):
    """The model and one sequence's KV cache. `length` counts the tokens whose keys and values the cache holds."""

    draft_width: int  # tokens of one pass under the plan, at most

    @property
    def length(self) -> int: ...

    def draft(self, tokens: Sequence[int]) -> Tensor:
        """Append 1 to `draft_width` `tokens` under the plan; their logits ``[tokens, vocabulary]``."""

    def verify(self, tokens: Sequence[int]) -> Tensor:
        """Append 1 to 8 `tokens` under the weights that decide about the text (exact mode: the dense ones); their
        logits ``[tokens, vocabulary]``, each row as from a pass over that token alone."""

    def rollback(self, length: int) -> None:
        """Drop the cache's entries from position `length` on. To be called after every `verify`."""


class NativePasses:
    """`Passes` through the native step, without the model's forward in between."""

    draft_width = MAX_ROWS

    def __init__(self, native: NativeSequence, draft: StepProgram, verify: StepProgram) -> None:
        self._native, self._draft, self._verify = native, draft, verify

    @property
    def length(self) -> int:
        return self._native.length

    def draft(self, tokens: Sequence[int]) -> Tensor:
        return self._native.step(tokens, self._draft)

    def draft_greedily(self, token: int, count: int, min_probability: float) -> tuple[list[int], list[float]]:
        """Append `token` under the plan, then the likeliest tokens after it: `count`, or up to the first whose
        probability is below `min_probability`. Returns the likeliest tokens and their probabilities; the last of these
        tokens is not appended."""
        return self._native.draft(token, count, min_probability, self._draft)

    def verify(self, tokens: Sequence[int]) -> Tensor:
        return self._native.step(tokens, self._verify)

    @staticmethod
    def likeliest(logits: Tensor, chances: bool = True) -> tuple[list[int], list[float]]:
        """See `kernels.step.likeliest`."""
        return likeliest(logits, chances)

    def greedy(self, token: int, count: int, ends: Sequence[int]) -> list[int]:
        """Append `token` as `verify` does, then the likeliest tokens after it: `count`, or up to the first of `ends`.
        Returns the likeliest tokens; the last of these is not appended."""
        return self._native.greedy(token, count, ends, self._verify)

    def rollback(self, length: int) -> None:
        self._native.rollback(length)


class ModulePasses:
    """`Passes` through the patched modules. Drafted and verified tokens share one cache: a draft pass reads the
    verified entries of the past, and the draft's own entries are dropped before the verification writes others in
    their place, so that drafts cost no memory."""

    draft_width = 1  # layers that skip as they go decide token by token

    def __init__(self, model: nn.Module, cache: Cache) -> None:
        self._model, self._cache = model, cache
        self._device = next(model.parameters()).device
        self.length = int(cache.get_seq_length())

    def draft(self, tokens: Sequence[int]) -> Tensor:
        with drafting():
            return self.verify(tokens)

    def verify(self, tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor([list(tokens)], device=self._device)
        self.length += len(tokens)
        logits = cast(Tensor, self._model(input_ids=ids, past_key_values=self._cache, use_cache=True).logits[0])
        if self._device.type == "cuda":
            # the pass is timed, and choosing tokens waits for its end anyway
            torch.cuda.current_stream(self._device).synchronize()
        return logits

    def rollback(self, length: int) -> None:
        # of zero tokens too: the layers of sliding windows shrink to the window's size in it
        self._cache.crop(length - self.length)
        self.length = length


class CapturedPasses(ModulePasses):
    """`Passes` through steps that a GPU has captured; the model's forward captures those that were not yet."""

    draft_width = MAX_ROWS

    def __init__(
        self, model: nn.Module, cache: Cache, steps: CapturedSteps, draft: StepProgram | str, verify: StepProgram
    ) -> None:
        super().__init__(model, cache)
        self._steps, self._draft, self._verify = steps, draft, verify
        if isinstance(draft, str) or steps.lowering.covers(draft) is not None:
            self.draft_width = 1  # by modules

    def draft(self, tokens: Sequence[int]) -> Tensor:
        logits = None if isinstance(self._draft, str) else self._append(tokens, self._draft)
        return super().draft(tokens) if logits is None else logits

    def verify(self, tokens: Sequence[int]) -> Tensor:
        drafts = mode().drafting
        logits = None if drafts else self._append(tokens, self._verify)
        return super().verify(tokens) if logits is None else logits

    def draft_greedily(self, token: int, count: int, min_probability: float) -> tuple[list[int], list[float]]:
        """See `NativePasses`."""
        tokens, chances = list[int](), list[float]()
        while len(tokens) < count and (not chances or chances[-1] >= min_probability):
            some, each = self.likeliest(self.draft([tokens[-1] if tokens else token]))
            tokens, chances = tokens + some, chances + each
        return tokens, chances

    def greedy(self, token: int, count: int, ends: Sequence[int]) -> list[int]:
        """See `NativePasses`."""
        made = self._steps.greedy(self._cache, token, count, ends, self._verify)
        self.length += len(made)
        return made or self.likeliest(self.verify([token]), chances=False)[0]

    @staticmethod
    def likeliest(logits: Tensor, chances: bool = True) -> tuple[list[int], list[float]]:
        """Of each row of `logits` ``[rows, vocabulary]`` the first of the likeliest tokens, and its probability, where
        `chances` are wanted."""
        made = logits.argmax(-1)
        if not chances:
            return made.tolist(), []
        shares = logits.float().softmax(-1).gather(1, made[:, None])[:, 0]
        return made.tolist(), shares.tolist()

    def _append(self, tokens: Sequence[int], program: StepProgram) -> Tensor | None:
        logits = self._steps.append(self._cache, tokens, program)
        if logits is not None:
            self.length += len(tokens)
        return logits


@torch.no_grad()
def rounding_error(model: nn.Module, ids: Tensor) -> float | None:
    """The largest difference between the logits of one pass over 8 tokens, taken from `ids` ``[1, length]``, and the
    logits of 8 passes over one token each. None where the model takes no several tokens behind others (ProphetNet), or
    a pass does not append one entry a token to the KV cache of each layer (a decoder layer that stands in the model
    twice appends two): a rollback would leave entries of rejected tokens there."""
    ids = ids[:, -MAX_ROWS:].repeat(1, MAX_ROWS)[:, :MAX_ROWS]
    logits = []
    for width in (1, MAX_ROWS):
        cache = DynamicCache(config=cast(Any, model).config)
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        if not _one_entry_a_token(cache, ids.shape[1]):
            return None
        cache.activate_past_recording()
        passes = ModulePasses(model, cache)
        parts = []
        try:
            for tokens in ids[0].split(width):
                parts.append(passes.verify(tokens.tolist()))
                passes.rollback(passes.length)
        except (AssertionError, ValueError, TypeError, RuntimeError, NotImplementedError):
            if width == 1:
                raise
            return None
        logits.append(torch.cat(parts).float())
    return float((logits[0] - logits[1]).abs().max())


def _one_entry_a_token(cache: Cache, tokens: int) -> bool:
    lengths = [int(layer.get_seq_length()) for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
    # layers that share the keys and values of another have an empty cache of their own
    return int(cache.get_seq_length()) == tokens and all(length in (0, tokens) for length in lengths)
