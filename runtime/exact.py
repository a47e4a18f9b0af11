"""Exact mode: the plan and the text itself draft tokens, the dense model verifies several of them in one pass.

The text does not depend on the drafts. At every position the next token is a function of the dense model's logits and,
when sampling, of one draw of noise (runtime/text.py). A drafted token is accepted where it equals that token
(drafter-invariant speculative decoding: Daliri, Musco and Suresh, "Coupling without Communication and Drafter-Invariant
Speculative Decoding", 2024; the drafter uses the same noise, so that like distributions make like choices). Greedy and
sampled text are therefore the dense model's own, token for token, for the same seed.

That needs a pass over k tokens to give the logits of k passes over one token each, which is tested before a model's
first draft (runtime/passes.py). Where a model's passes do not (layers without a decode kernel, a GPU), float32 still
drafts, and wherever rounding could decide between two tokens a pass over that token alone decides; coarser types decode
without drafts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .calls import NotCovered
from .draft_costs import DraftCostModel
from .drafting import Draft, Drafter, Statistics
from .length_dependence import length_dependence
from .passes import MAX_DRAFT, CapturedPasses, ModulePasses, NativePasses, Passes, rounding_error
from .sampler import GreedySampler, Sampler
from .text import Text, end_tokens, is_stateless, uncovered_call

logger = logging.getLogger("coreskip")


class ByRows(Protocol):
    """What may compute the rows of a pass apart."""

    @property
    def by_rows(self) -> bool: ...


class SpeculativeDecoder:
    """Generation with drafts on one wrapped model: the verification loop, and what it has measured. Exact mode verifies
    by the dense model; with `wrap(..., lookup=True)` the plan's own steps verify what prompt lookup drafts.

    Attributes:
        native_only: whether none but native steps may be over several tokens.
        by_rows: whether linear layers and attention all compute the rows of a pass apart; `wrap` knows.
        costs: measured seconds and acceptance rates, kept from one generation to the next.
        last: statistics of the generation that ended last; None before the first.
    """

    def __init__(self, has_draft: bool, steps: ByRows | None = None) -> None:
        """has_draft: whether the plan is a draft model; one that skips nothing is no faster than the dense model.
        steps: what passes may go through."""
        self._has_draft = has_draft
        self.native_only = False
        self.by_rows = False
        self._steps = steps
        self.costs = DraftCostModel()
        self.last: Statistics | None = None
        # scores that lie no further apart may differ for rounding alone: 0 where rows are computed apart, infinite
        # where rounding is too coarse for drafts, None until it is measured
        self._margin: float | None = None
        self._noted: set[str] = set()

    def forget(self) -> None:
        """The model's weights were moved, cast or loaded anew."""
        self.costs, self._margin = DraftCostModel(), None

    @contextmanager
    def _recorded(self, note: str | None = None) -> Iterator[Statistics]:
        done, start = Statistics(note=note), time.perf_counter()
        yield done
        done.total_s = time.perf_counter() - start
        self.last = done
        logger.debug("with drafts: %s", done)

    def generate(
        self,
        model: Any,
        undrafted: Callable[[], Any],
        ids: Tensor,
        arguments: dict[str, Any],
        native: Callable[[Cache], Passes | None],
    ) -> Any:
        """What ``model._sample`` returns: by drafts where they are possible, by `undrafted` where not.

        ids: int64 [1, length]; arguments: the other arguments of ``_sample`` by name; native: gives passes over a cache
        that avoid the model's forward, or None where the native step does not cover the model.
        """
        reason = self._refusal(model, ids, arguments)
        if reason is not None:
            if reason not in self._noted:
                self._noted.add(reason)
                logger.info("decoding without drafts: %s", reason)
            with self._recorded(reason) as done:
                output = undrafted()
                done.tokens = int(getattr(output, "sequences", output).shape[1] - ids.shape[1])
            return output
        with self._recorded() as done:
            return self._generate(model, ids, done, native, arguments)

    def _refusal(self, model: Any, ids: Tensor, arguments: dict[str, Any]) -> str | None:
        reason = uncovered_call(ids, arguments) or length_dependence(model, ids, arguments)
        if reason is not None:
            return reason
        if self._margin is None:
            error = rounding_error(model, ids)
            if error is None:
                return "a pass does not take several tokens, or append one entry a token to each layer's KV cache"
            self._margin = self._margin_of(error, model.dtype)
        if self._margin == float("inf"):
            return "in this dtype and on this device a pass over several tokens rounds otherwise than passes over one"
        if self._margin and not all(map(is_stateless, arguments["logits_processor"])):
            return "a logits processor of the user's own might remember what it has seen"
        return None

    def _margin_of(self, error: float, dtype: torch.dtype) -> float:
        if error == 0.0 and (self.by_rows or (self._steps is not None and self._steps.by_rows)):
            return 0.0
        # 20 times what 8 tokens showed: errors grow with the context, and both sides of a comparison have one
        return max(1e-3, 20 * error) if dtype is torch.float32 and error < 1e-2 else float("inf")

    def _generate(
        self,
        model: Any,
        ids: Tensor,
        done: Statistics,
        native: Callable[[Cache], Passes | None],
        arguments: dict[str, Any],
    ) -> Any:
        config, streamer = arguments["generation_config"], arguments["streamer"]
        processors, criteria = arguments["logits_processor"], arguments["stopping_criteria"]
        start = time.perf_counter()
        outputs = model._prefill(ids, config, arguments["model_kwargs"])
        done.prefill_s = time.perf_counter() - start
        cache = outputs.past_key_values
        cache.activate_past_recording()
        first = outputs.logits[0, -1]
        text = Text(ids, processors, criteria, config, streamer, vocabulary=first.shape[0])
        ends = None if self._margin else end_tokens(arguments)
        longest = config.max_length if ends is None else criteria.max_length
        try:
            passes = native(cache)
            if passes is None and self.native_only:
                raise NotCovered("native steps do not cover the model")
            passes = passes or ModulePasses(model, cache)
            greedy = isinstance(passes, (NativePasses, CapturedPasses)) and ends is not None
            sampler = (GreedySampler if greedy else Sampler)(passes, text, ends)
            self._decode(sampler, first, longest - ids.shape[1], done)
        except NotCovered as reason:  # native steps have been found to differ, from this length on
            self._margin, done.note = None, str(reason)
            if text.ids.shape[1] == ids.shape[1]:
                text.append(first)
            _decode_undrafted(ModulePasses(model, cache), text)
            done.tokens = text.ids.shape[1] - ids.shape[1]
        finally:
            text.close()
            for layer in cache.layers:
                layer.record_past = False
        if streamer is not None:
            streamer.end()
        return text.result(config, cache)

    def _decode(self, sampler: Sampler, first: Tensor, room: int, done: Statistics) -> None:
        """Append the tokens chosen from the logits `first` ``[vocabulary]`` and after them, `room` at most."""
        passes, text = sampler.passes, sampler.text
        drafter = Drafter(sampler, self.costs, done, self._has_draft, text.append(first))
        done.tokens, alone, undrafted = 1, False, 0
        while not text.finished:
            draft = Draft() if alone else drafter.draft(room - done.tokens)
            undrafted = 0 if draft.tokens else undrafted + 1
            start = time.perf_counter()
            if undrafted and isinstance(sampler, GreedySampler):
                # the longer there was nothing to draft, the rarer drafts are looked for: at every token that takes
                # 0.2 ms
                made = sampler.extend(drafter.last, min(room - done.tokens, 1 + undrafted // 2, MAX_DRAFT))
                self._record_verification(done, len(made), 1, time.perf_counter() - start)
            else:
                logits = passes.verify([drafter.last, *draft.tokens])
                self._record_verification(done, 1, 1 + len(draft.tokens), time.perf_counter() - start)
                made = sampler.accept(draft.tokens, logits, self._margin or 0.0)
                # nothing was rejected and yet not all accepted: rounding could have decided
                alone = not text.finished and len(made) <= len(draft.tokens) and made == list(draft.tokens[: len(made)])
                drafter.record(draft, made)
            drafter.extend(made)
            done.tokens += len(made)
            # the cache holds every token but the last, as after generation by transformers
            passes.rollback(text.ids.shape[1] - 1)

    def _record_verification(self, done: Statistics, passes: int, tokens: int, seconds: float) -> None:
        """`passes` dense passes over `tokens` tokens each took `seconds` together."""
        self.costs.record_verification(tokens, seconds / passes)
        done.passes, done.verify_s = done.passes + passes, done.verify_s + seconds


def _decode_undrafted(passes: Passes, text: Text) -> None:
    """The rest of a text, one token a pass."""
    passes.rollback(text.ids.shape[1] - 1)
    while not text.finished:
        text.append(passes.verify([int(text.ids[0, -1])])[0])
        passes.rollback(text.ids.shape[1] - 1)
