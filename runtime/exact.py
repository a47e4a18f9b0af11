"""Exact mode: the plan and the text itself draft tokens, the dense model verifies several in one pass.

Output does not depend on the drafts. At every position the next token is a function of the dense model's logits and,
when sampling, of one draw of noise: the largest of p / e over exponential noise e, which is how `torch.multinomial`
draws too. A drafted token is accepted where it equals that token (drafter-invariant speculative decoding: Daliri,
Musco and Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding", 2024; the drafter uses
the same noise, so that like distributions make like choices). Greedy and sampled text are therefore the dense
model's own, token for token, for the same seed.

The plan drafts in the same manner: where the text has a continuation to offer, one pass under the plan looks at
several of its tokens, and those that the plan would have chosen itself are drafts for the price of one.

That needs a pass over k tokens to give the logits of k passes over one. The linear layers' decode kernels do; attention
is made to by running it query by query. Whether a whole model does is tested before its first draft. Where it does
not (layers without a decode kernel, a GPU), float32 still drafts, and wherever rounding could decide between two
tokens a pass over that token alone does; coarser types decode without drafts.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..kernels.ops import MAX_ROWS
from ..kernels.step import likeliest
from .calls import NotCovered
from .growth import growth
from .kv_cache import plain_class
from .lower_cpu import StepProgram
from .native import NativeSequence
from .phases import drafting

logger = logging.getLogger("coreskip")

MAX_DRAFT = MAX_ROWS - 1  # a verification pass also holds the last accepted token
AT_ONCE = MAX_DRAFT  # draft steps of one native call


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


# --- passes over the KV cache ---------------------------------------------------------------------------------------


class Passes(Protocol):
    """The model and one sequence's KV cache, as the loop sees them. `length` counts the cache's tokens."""

    widest: int  # tokens of one pass under the plan

    @property
    def length(self) -> int: ...

    def draft(self, tokens: Sequence[int]) -> Tensor:
        """Append 1 to `widest` `tokens` under the plan; their logits ``[tokens, vocabulary]``."""

    def verify(self, tokens: Sequence[int]) -> Tensor:
        """Append 1 to 8 `tokens` densely; their logits ``[tokens, vocabulary]``, each row as from a pass of its own."""

    def rollback(self, length: int) -> None:
        """Drop the cache's entries from position `length` on. To be called after every `verify`."""


class NativePasses:
    """`Passes` through the native step, without the model's forward in between."""

    widest = MAX_ROWS

    def __init__(self, native: NativeSequence, draft: StepProgram, dense: StepProgram) -> None:
        self._native, self._draft, self._dense = native, draft, dense

    @property
    def length(self) -> int:
        return self._native.length

    def draft(self, tokens: Sequence[int]) -> Tensor:
        return self._native.step(tokens, self._draft)

    def draft_on(self, token: int, count: int, least: float) -> tuple[list[int], list[float]]:
        """Append `token` under the plan, and the likeliest after it, `count` or up to one whose probability is below
        `least`; returns these and their probabilities. The last of them is not appended."""
        return self._native.draft(token, count, least, self._draft)

    def verify(self, tokens: Sequence[int]) -> Tensor:
        return self._native.step(tokens, self._dense)

    def run(self, token: int, count: int, ends: Sequence[int]) -> list[int]:
        """Append `token` densely, and the likeliest after it: `count`, or up to one of `ends`. Returns these; the last
        of them is not appended."""
        return self._native.greedy(token, count, ends, self._dense)

    def rollback(self, length: int) -> None:
        self._native.rollback(length)


class ModulePasses:
    """`Passes` through the patched modules. Drafted and verified tokens share one cache: a draft reads exact entries
    of the past, and its own are dropped before the verification writes theirs, so it costs no memory."""

    widest = 1  # layers that skip as they go decide token by token

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
            # the pass is timed, and choosing tokens waits for it anyway
            torch.cuda.current_stream(self._device).synchronize()
        return logits

    def rollback(self, length: int) -> None:
        # zero tokens too: sliding windows shrink to their size here
        self._cache.crop(length - self.length)
        self.length = length


# --- whether rows are apart -------------------------------------------------------------------------------------------


@torch.no_grad()
def _row_error(model: nn.Module, ids: Tensor) -> float:
    """The largest difference between the logits of a pass over 8 tokens and those of 8 passes over one."""
    ids = ids[:, -MAX_ROWS:].repeat(1, MAX_ROWS)[:, :MAX_ROWS]
    logits = []
    for width in (1, MAX_ROWS):
        cache = DynamicCache(config=cast(Any, model).config)
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.activate_past_recording()
        passes = ModulePasses(model, cache)
        parts = []
        for tokens in ids[0].split(width):
            parts.append(passes.verify(tokens.tolist()))
            passes.rollback(passes.length)
        logits.append(torch.cat(parts).float())
    return float((logits[0] - logits[1]).abs().max())


# --- what is worth drafting -----------------------------------------------------------------------------------------


class Lookup:
    """Continuations from the text itself: what followed the latest earlier occurrence of its last 4, 3 or 2 tokens
    (prompt lookup decoding, Saxena 2023)."""

    SIZES = (4, 3, 2)

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._follower: dict[tuple[int, ...], int] = {}
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
                while len(text) < most:  # the match runs into the end of the text: it is repeating itself
                    text += text
                return size, text[:most]
        return 0, []


class _Share:
    """A success rate that forgets: the last few dozen outcomes count, beside a prior belief worth two."""

    def __init__(self, prior: float) -> None:
        self._prior, self._hits, self._tries = prior, 0.0, 0.0

    def add(self, hit: bool) -> None:
        self._hits, self._tries = 0.97 * self._hits + hit, 0.97 * self._tries + 1

    @property
    def value(self) -> float:
        return (self._hits + 2 * self._prior) / (self._tries + 2)


class _Seconds:
    """The median of the last few measurements: one pass in a few dozen is interrupted by something else."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=9)
        self.value: float | None = None

    def add(self, seconds: float) -> None:
        self._recent.append(seconds)
        self.value = statistics.median(list(self._recent))


class Source:
    """One place that drafts come from: how often they hold, and when to look at it again after it did not pay."""

    PATIENCE = 32

    def __init__(self, priors: dict[int, float]) -> None:
        self.acceptance = {key: _Share(prior) for key, prior in priors.items()}
        self.overall = _Share(statistics.mean(priors.values()))
        self._patience, self._idle = self.PATIENCE, 0

    def judge(self, key: int, held: bool) -> None:
        self.acceptance[key].add(held)
        self.overall.add(held)

    def due(self, pays: bool) -> bool:
        """Whether to draft from it now. One that does not pay is tried now and then, ever more rarely."""
        if pays:
            self._patience, self._idle = self.PATIENCE, 0
            return True
        self._idle += 1
        if self._idle < self._patience:
            return False
        self._patience, self._idle = min(2 * self._patience, 1024), 0
        return True


class Pace:
    """What passes cost and how often drafts hold, as measured so far: decides where to draft from and how far.

    Expected tokens per second is the measure. Appending one more token to a draft that is reached with probability r
    and accepted with probability a adds r * a tokens for the price of a draft step and of one more row to verify.
    """

    BINS = 8  # of the drafter's confidence in its token

    def __init__(self) -> None:
        self.single, self.row = _Seconds(), _Seconds()
        self.step, self.step_row, self.settling = _Seconds(), _Seconds(), _Seconds()
        self.lookup = Source({2: 0.4, 3: 0.6, 4: 0.8})
        self.plan = Source({i: (i + 0.5) / self.BINS for i in range(self.BINS)})
        self._warm: set[bool] = set()

    def verified(self, count: int, seconds: float) -> None:
        """A dense pass over `count` tokens took so long. The first over one and the first over several are not kept:
        they pack weights."""
        if (count > 1) not in self._warm:
            self._warm.add(count > 1)
        elif count == 1:
            self.single.add(seconds)
        elif self.single.value is not None:
            self.row.add(max(0.0, seconds - self.single.value) / (count - 1))

    def stepped(self, count: int, steps: int, seconds: float, first: bool) -> None:
        """`steps` draft steps of `count` tokens each took so long. The first of a generation settles which neurons it
        decodes with."""
        if first:
            self.settling.add(seconds)
        elif count == 1:
            self.step.add(seconds / steps)
        elif self.step.value is not None:
            self.step_row.add(max(0.0, seconds - self.step.value) / (count - 1))

    @property
    def ready(self) -> bool:
        """Whether a dense pass over one token has been timed, against which drafts are weighed."""
        return self.single.value is not None

    @property
    def pass_s(self) -> float:
        """Seconds of a dense pass over one token."""
        return cast(float, self.single.value)

    @property
    def row_s(self) -> float:
        """Seconds of one more token in a verification; a twentieth of a pass until it is measured."""
        return self.row.value if self.row.value is not None else 0.05 * self.pass_s

    @property
    def step_s(self) -> float:
        """Seconds of one draft step; half a dense pass until it is measured."""
        return self.step.value if self.step.value is not None else 0.5 * self.pass_s

    @property
    def step_row_s(self) -> float:
        """Seconds of one more token in a draft step; a fifth of it until it is measured."""
        return self.step_row.value if self.step_row.value is not None else 0.2 * self.step_s

    @property
    def settling_s(self) -> float:
        """Seconds of a generation's first draft step; nothing until it is measured."""
        return self.settling.value or 0.0

    def worth(self, reach: float, step: float, expected: float, seconds: float) -> bool:
        """Whether a token that is accepted with probability `reach` should be appended to a draft that gives
        `expected` tokens in `seconds`."""
        return reach * seconds > expected * (step + self.row_s)

    def look(self, acceptance: float, most: int) -> tuple[int, float]:
        """How many tokens of a continuation the plan should look at in one step, where each is its own choice with the
        same probability; and the seconds that a drafted token then costs."""
        drafted, seconds, reach = 1.0, self.step_s, 1.0
        for count in range(most):
            reach *= acceptance
            if reach * seconds <= drafted * self.step_row_s:
                return count, seconds / drafted
            drafted, seconds = drafted + reach, seconds + self.step_row_s
        return most, seconds / drafted

    def extent(self, acceptance: float, step: float, most: int) -> tuple[int, float]:
        """The best draft length where every token is accepted with the same probability, and its tokens/s."""
        expected, seconds, reach = 1.0, self.pass_s, 1.0
        for length in range(most):
            reach *= acceptance
            if not self.worth(reach, step, expected, seconds):
                return length, expected / seconds
            expected, seconds = expected + reach, seconds + step + self.row_s
        return most, expected / seconds


# --- the loop -------------------------------------------------------------------------------------------------------


class _Draws:
    """The noise of one generation, in the order in which plain sampling draws it: one vector per token.

    What was drawn ahead for drafts beyond the last token is given back to the generator.
    """

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._vocabulary, self._device = vocabulary, device
        self._ahead: deque[tuple[Tensor, Tensor]] = deque()

    def get(self, ahead: int) -> Tensor:
        while len(self._ahead) <= ahead:
            state = self._state()
            noise = torch.empty(1, self._vocabulary, dtype=torch.float32, device=self._device).exponential_(1)
            self._ahead.append((state, noise))
        return self._ahead[ahead][1]

    def use(self) -> None:
        self._ahead.popleft()

    def close(self) -> None:
        if self._ahead:
            state = self._ahead[0][0]
            if self._device.type == "cuda":
                torch.cuda.set_rng_state(state, self._device)
            else:
                torch.set_rng_state(state)

    def _state(self) -> Tensor:
        return torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else torch.get_rng_state()


class Text:
    """The growing text of one generation: chooses tokens as plain generation does, and ends where it does."""

    def __init__(
        self, ids: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any, vocabulary: int
    ) -> None:
        self.ids, self._processors, self._criteria, self._streamer = ids, processors, criteria, streamer
        self._draws = _Draws(vocabulary, ids.device) if config.do_sample else None
        self._for_drafts = [processor for processor in processors if _is_pure(processor)]
        self.finished = False
        self.scores: list[Tensor] | None = [] if config.return_dict_in_generate and config.output_scores else None
        self.logits: list[Tensor] | None = [] if config.return_dict_in_generate and config.output_logits else None

    def append(self, logits: Tensor) -> int:
        """Choose the next token from the dense model's `logits` ``[vocabulary]``."""
        raw = logits.to(copy=True, dtype=torch.float32, device=self.ids.device).unsqueeze(0)
        scores = self._processors(self.ids, raw)
        if self.scores is not None:
            self.scores.append(scores)
        if self.logits is not None:
            self.logits.append(raw)
        token, chance = self._choose(scores, 0)
        if self._draws is not None:
            if math.isnan(chance):  # as torch.multinomial refuses them: one NaN or infinity makes all of them NaN
                raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
            self._draws.use()
        self.ids = torch.cat([self.ids, torch.tensor([[token]], device=self.ids.device)], dim=-1)
        if self._streamer is not None:
            self._streamer.put(torch.tensor([token]))
        self.finished = bool(self._criteria(self.ids, None if self.scores is None else tuple(self.scores)).all())
        return token

    def certain(self, logits: Tensor, margin: float) -> bool:
        """Whether the next token is the same for all logits within `margin` of these. Only for pure processors."""
        scores = self._score_draft(self.ids, logits).log_softmax(dim=-1)
        first, second = (scores if self._draws is None else scores - self._draws.get(0).log()).topk(2, dim=-1).values[0]
        return bool(first - second > margin)

    def guess(self, drafts: Sequence[int], logits: Tensor) -> tuple[int, float]:
        """The token that would follow `drafts` were `logits` the dense model's, and its probability."""
        ids = torch.cat([self.ids, torch.tensor([list(drafts)], device=self.ids.device, dtype=self.ids.dtype)], dim=-1)
        return self._choose(self._score_draft(ids, logits), len(drafts))

    def _score_draft(self, ids: Tensor, logits: Tensor) -> Tensor:
        scores = logits.to(copy=True, dtype=torch.float32, device=ids.device).unsqueeze(0)
        for processor in self._for_drafts:
            scores = processor(ids, scores)
        return scores

    def _choose(self, scores: Tensor, ahead: int) -> tuple[int, float]:
        probabilities = scores.softmax(dim=-1)
        weights = scores if self._draws is None else probabilities / self._draws.get(ahead)
        token = int(weights.argmax(dim=-1))
        return token, float(probabilities[0, token])

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens that were chosen greedily elsewhere; only their number and the last decide about the end."""
        self.ids = torch.cat([self.ids, torch.tensor([list(tokens)], device=self.ids.device)], dim=-1)
        if self._streamer is not None:
            for token in tokens:
                self._streamer.put(torch.tensor([token]))
        self.finished = bool(self._criteria(self.ids, None).all())

    def result(self, config: Any, cache: Any) -> Any:
        """What ``generate`` returns."""
        if not config.return_dict_in_generate:
            return self.ids
        kept = {"scores": self.scores, "logits": self.logits}
        tuples: dict[str, Any] = {name: None if value is None else tuple(value) for name, value in kept.items()}
        return GenerateDecoderOnlyOutput(sequences=cast(Any, self.ids), past_key_values=cache, **tuples)

    def close(self) -> None:
        if self._draws is not None:
            self._draws.close()


_STATEFUL = ("UnbatchedClassifierFreeGuidance", "Watermark", "SynthID", "PrefixConstrained")


def _is_pure(processor: Any) -> bool:
    """Whether a logits processor may see drafts: it must not remember what it has seen. One that the user wrote
    might; it then acts in verification only."""
    cls = type(processor)
    return cls.__module__ == logits_process.__name__ and not cls.__name__.startswith(_STATEFUL)


def ends_of(arguments: dict[str, Any]) -> list[int] | None:
    """The tokens that end a greedy text, where nothing but them and a length decides; else None."""
    config, criteria = arguments["generation_config"], arguments["stopping_criteria"]
    wants_more = config.return_dict_in_generate and (config.output_scores or config.output_logits)
    if config.do_sample or len(arguments["logits_processor"]) or wants_more:
        return None
    if any(type(c) not in (EosTokenCriteria, MaxLengthCriteria) for c in criteria) or criteria.max_length is None:
        return None
    return [int(t) for c in criteria if isinstance(c, EosTokenCriteria) for t in c.eos_token_id.flatten()]


def accepted(guess: int, token: int) -> bool:
    """The acceptance rule: a drafted token stays where the dense model chose the same."""
    return guess == token


def obstacle(ids: Tensor, arguments: dict[str, Any]) -> str | None:
    """Why a call of ``_sample`` is more than one unpadded sequence over a plain KV cache, if it is."""
    config, kwargs = arguments["generation_config"], arguments["model_kwargs"]
    cache, mask, positions = kwargs.get("past_key_values"), kwargs.get("attention_mask"), kwargs.get("position_ids")
    if torch.is_autocast_enabled(ids.device.type):
        return "autocast casts what modules compute with"
    if ids.shape[0] != 1:
        return f"a batch of {ids.shape[0]} sequences"
    if arguments["synced_gpus"] or config.is_assistant:
        return "the model is another's assistant or one of several synchronised ones"
    if config.output_attentions or config.output_hidden_states:
        return "attentions or hidden states are asked for"
    if not kwargs.get("use_cache", True) or not isinstance(cache, DynamicCache):
        return "the KV cache is not a DynamicCache"
    if any(plain_class(type(layer)) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return "the KV cache holds more than keys and values"
    if getattr(cache, "offloading", False):
        return "the KV cache is offloaded"
    if ids.shape[1] == 0 or (isinstance(mask, Tensor) and not bool(mask.bool().all())):
        return "the prompt is padded or given as embeddings"
    if isinstance(positions, Tensor) and int(positions.flatten()[-1]) != ids.shape[1] - 1:
        return "the positions are the caller's own"
    if set(kwargs) - {"past_key_values", "use_cache", "attention_mask", "position_ids", "logits_to_keep"}:
        return "the model takes more inputs than tokens"
    return None


class Choices:
    """The tokens that the dense model chooses and those that the plan guesses, by all that plain generation does."""

    def __init__(self, passes: Passes, text: Text, ends: Sequence[int] | None = None) -> None:
        self.passes, self.text, self._ends = passes, text, ends or ()

    def accept(self, drafts: Sequence[int], logits: Tensor, margin: float) -> list[int]:
        """Extend the text by the tokens chosen from `logits` ``[1 + drafts, vocabulary]``, up to the first that was not
        drafted; returns them. Where rounding could decide (`margin`), up to that token."""
        made: list[int] = []
        for row, guess in enumerate([*drafts, None]):
            if margin and drafts and not self.text.certain(logits[row], margin):
                break
            made.append(self.text.append(logits[row]))
            if guess is None or self.text.finished or not accepted(guess, made[-1]):
                break
        return made

    def look(self, last: int, drafts: Sequence[int], found: Sequence[int]) -> tuple[list[int], list[float]]:
        """One draft step over the last token and `found`: what the plan guesses after `drafts`, up to the first token
        that is not the next of `found`, and the guesses' probabilities."""
        logits, made, chances = self.passes.draft([last, *found]), list[int](), list[float]()
        for row, next_one in zip(logits, [*found, None], strict=True):
            token, chance = self.text.guess([*drafts, *made], row)
            made.append(token)
            chances.append(chance)
            if token != next_one:
                break
        return made, chances

    def step(self, last: int, drafts: Sequence[int], count: int, least: float) -> tuple[list[int], list[float]]:
        """Draft steps: what the plan guesses after `drafts`, at most `count` tokens or up to one whose probability is
        below `least`; and the probabilities."""
        return self.look(last, drafts, [])


class PlainChoices(Choices):
    """Greedy choices without processors, which are the likeliest tokens: found by native passes themselves. In Python
    the choice of a token took 0.3 ms, and a draft step 0.5 ms besides its 4.2."""

    passes: NativePasses

    def accept(self, drafts: Sequence[int], logits: Tensor, margin: float) -> list[int]:
        tokens, _ = likeliest(logits, chances=False)
        made: list[int] = []
        for token, guess in zip(tokens, [*drafts, None], strict=True):
            made.append(token)
            if guess is None or token in self._ends or not accepted(guess, token):
                break
        self.text.extend(made)
        return made

    def run(self, last: int, count: int) -> list[int]:
        """Extend the text by `count` tokens, or up to its end, without a draft; returns them."""
        made = self.passes.run(last, count, self._ends)
        self.text.extend(made)
        return made

    def look(self, last: int, drafts: Sequence[int], found: Sequence[int]) -> tuple[list[int], list[float]]:
        made, chances = likeliest(self.passes.draft([last, *found]))
        held = next((i for i, token in enumerate(found) if token != made[i]), len(found))
        return made[: held + 1], chances[: held + 1]

    def step(self, last: int, drafts: Sequence[int], count: int, least: float) -> tuple[list[int], list[float]]:
        return self.passes.draft_on(last, count, least)


@dataclass
class _Run:
    """One generation under way. last: the token that no pass has read yet."""

    choices: Choices
    lookup: Lookup
    done: Statistics
    last: int

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.lookup.append(token)
        self.last, self.done.tokens = [self.last, *tokens][-1], self.done.tokens + len(tokens)


def _alone(passes: Passes, text: Text) -> None:
    """The rest of a text, one token a pass."""
    passes.rollback(text.ids.shape[1] - 1)
    while not text.finished:
        text.append(passes.verify([int(text.ids[0, -1])])[0])
        passes.rollback(text.ids.shape[1] - 1)


class Exact:
    """Exact mode on one wrapped model: what it has measured, and the generation loop.

    Attributes:
        last: statistics of the generation that ended last; None before the first.
    """

    def __init__(self, has_draft: bool) -> None:
        self._has_draft = has_draft  # a plan that skips nothing has no faster draft to offer
        self.native_only = False  # whether none but native steps may be over several tokens
        self.by_rows = False  # whether linear layers and attention all treat rows apart; `wrap` knows
        self.pace = Pace()
        self.last: Statistics | None = None
        self._margin: float | None = None  # between scores that differ for rounding alone; 0 where rows are apart
        self._noted: set[str] = set()

    def forget(self) -> None:
        """The model's weights were moved, cast or loaded anew."""
        self.pace, self._margin = Pace(), None

    @contextmanager
    def _recorded(self, note: str | None = None) -> Iterator[Statistics]:
        statistics_, start = Statistics(note=note), time.perf_counter()
        yield statistics_
        statistics_.total_s = time.perf_counter() - start
        self.last = statistics_
        logger.debug("with drafts: %s", statistics_)

    def generate(
        self,
        model: Any,
        plain: Callable[[], Any],
        ids: Tensor,
        arguments: dict[str, Any],
        native: Callable[[Cache], Passes | None],
    ) -> Any:
        """What ``model._sample`` returns, by drafts where they are possible and by `plain` where not. `native` gives
        passes that avoid the model's forward, where the native step covers it."""
        reason = self._refusal(model, ids, arguments)
        if reason is not None:
            if reason not in self._noted:
                self._noted.add(reason)
                logger.info("decoding without drafts: %s", reason)
            with self._recorded(reason) as done:
                output = plain()
                done.tokens = int(getattr(output, "sequences", output).shape[1] - ids.shape[1])
            return output
        with self._recorded() as done:
            return self._generate(model, ids, done, native, arguments)

    def _refusal(self, model: Any, ids: Tensor, arguments: dict[str, Any]) -> str | None:
        reason = obstacle(ids, arguments) or growth(model, ids, arguments)
        if reason is not None:
            return reason
        if self._margin is None:
            self._margin = self._measure_margin(model, ids)
        if self._margin == float("inf"):
            return "in this dtype and on this device a pass over several tokens rounds otherwise than passes over one"
        if self._margin and not all(map(_is_pure, arguments["logits_processor"])):
            return "a logits processor of the user's own might remember what it has seen"
        return None

    def _measure_margin(self, model: Any, ids: Tensor) -> float:
        error = _row_error(model, ids)
        if self.by_rows and error == 0.0:
            return 0.0
        # 20 times what 8 tokens showed: errors grow with the context, and both sides have one
        return max(1e-3, 20 * error) if model.dtype is torch.float32 and error < 1e-2 else float("inf")

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
        ends = None if self._margin else ends_of(arguments)
        longest = config.max_length if ends is None else criteria.max_length
        try:
            passes = native(cache)
            if passes is None and self.native_only:
                raise NotCovered("native steps do not cover the model")
            passes = passes or ModulePasses(model, cache)
            plain = isinstance(passes, NativePasses) and ends is not None
            choices = (PlainChoices if plain else Choices)(passes, text, cast(Any, ends))
            self._decode(choices, first, longest - ids.shape[1], done)
        except NotCovered as reason:  # native steps have been found to differ, from this length on
            self._margin, done.note = None, str(reason)
            if text.ids.shape[1] == ids.shape[1]:
                text.append(first)
            _alone(ModulePasses(model, cache), text)
            done.tokens = text.ids.shape[1] - ids.shape[1]
        finally:
            text.close()
            for layer in cache.layers:
                layer.record_past = False
        if streamer is not None:
            streamer.end()
        return text.result(config, cache)

    def _decode(self, choices: Choices, first: Tensor, room: int, done: Statistics) -> None:
        passes, text = choices.passes, choices.text
        last, alone, idle = text.append(first), False, 0
        run = _Run(choices, Lookup(text.ids[0].tolist()), done, last)
        done.tokens = 1
        while not text.finished:
            name, keys, drafts = self._draft(run, 0 if alone else room - done.tokens)
            start = time.perf_counter()
            idle = 0 if drafts else idle + 1
            if idle and isinstance(choices, PlainChoices):
                # the longer there was nothing to draft, the longer nobody looks: a look at every token takes 0.2 ms
                made = choices.run(run.last, min(room - done.tokens, 1 + idle // 2, AT_ONCE))
                seconds = time.perf_counter() - start
                self.pace.verified(1, seconds / len(made))
                done.passes, done.verify_s = done.passes + len(made), done.verify_s + seconds
                run.extend(made)
                passes.rollback(text.ids.shape[1] - 1)
                continue
            logits = passes.verify([run.last, *drafts])
            seconds = time.perf_counter() - start
            self.pace.verified(1 + len(drafts), seconds)
            done.passes, done.verify_s = done.passes + 1, done.verify_s + seconds
            made = choices.accept(drafts, logits, self._margin or 0.0)
            # nothing was rejected and yet not all accepted: rounding could have decided
            alone = not text.finished and len(made) <= len(drafts) and made == drafts[: len(made)]
            run.extend(made)
            for key, guess, token in zip(keys, drafts, made, strict=False):
                held = accepted(guess, token)
                getattr(self.pace, name).judge(key, held)
                done.accepted[name] += held
            # the cache holds every token but the last, as after plain generation
            passes.rollback(text.ids.shape[1] - 1)

    def _draft(self, run: _Run, left: int) -> tuple[str, list[int], list[int]]:
        """Where the drafted tokens come from, what their acceptance is counted under, and the tokens; none where it
        does not pay. `left`: tokens to the end at most."""
        most = min(MAX_DRAFT, left - 1)
        if most <= 0 or not self.pace.ready:
            return "lookup", [], []
        pace, done = self.pace, run.done
        size, found = run.lookup.find(most)
        from_text, text_rate, step_s = 0, 1 / pace.pass_s, pace.step_s
        if size:
            acceptance = pace.lookup.acceptance[size].value
            from_text, text_rate = pace.extent(acceptance, 0.0, most)
            step_s = pace.look(acceptance, min(most, run.choices.passes.widest - 1))[1]
        if self._has_draft:
            by_plan, plan_rate = pace.extent(pace.plan.overall.value, step_s, most)
            price = 0.0 if done.drafted["plan"] else pace.settling_s
            pays = left * (1 / text_rate - 1 / plan_rate) > price
            # a look where even near-perfect drafts would not pay is wasted
            could_pay = left * (1 / text_rate - 1 / pace.extent(0.95, step_s, most)[1]) > price
            if could_pay and (pays or not from_text) and pace.plan.due(pays):
                return "plan", *self._draft_by_plan(run, most, by_plan)
        if size and pace.lookup.due(from_text > 0):
            drafts = found[: max(1, from_text)]
            done.drafted["lookup"] += len(drafts)
            return "lookup", [size] * len(drafts), drafts
        return "lookup", [], []

    def _draft_by_plan(self, run: _Run, most: int, hoped: int) -> tuple[list[int], list[int]]:
        pace, done, passes = self.pace, run.done, run.choices.passes
        start = passes.length
        # two steps where it has yet to be seen whether it pays: the first may settle, the second is timed
        least = 2 if hoped == 0 or not done.drafted["plan"] else 1
        expected, seconds, reach = 1.0, pace.pass_s, 1.0
        keys: list[int] = []
        drafts: list[int] = []
        while len(drafts) < most and (
            len(drafts) < least or pace.worth(reach * pace.plan.overall.value, pace.step_s, expected, seconds)
        ):
            first, last = not done.drafted["plan"], [run.last, *drafts][-1]
            size, found = run.lookup.find(most - len(drafts), drafts)
            acceptance = pace.lookup.acceptance[size].value if size else 0.0
            width = 0 if first else pace.look(acceptance, min(len(found), passes.widest) - 1)[0]
            count = 1 if first or len(drafts) < least else min(AT_ONCE, most - len(drafts))
            bound = self._bound(reach, expected, seconds) if count > 1 else 0.0
            begin = time.perf_counter()
            if width:
                made, chances = run.choices.look(last, drafts, found[:width])
            else:
                made, chances = run.choices.step(last, drafts, count, bound)
            spent = time.perf_counter() - begin
            steps = 1 if width else len(made)
            pace.stepped(1 + width, steps, spent, first)
            for guess, token in zip(found[:width], made, strict=False):
                pace.lookup.judge(size, guess == token)
            done.draft_s, done.drafted["plan"] = done.draft_s + spent, done.drafted["plan"] + len(made)
            drafts += made
            passes.rollback(start + len(drafts))
            price = (steps * pace.step_s + width * pace.step_row_s) / len(made) + pace.row_s
            for chance in chances:
                keys.append(0 if math.isnan(chance) else min(int(chance * pace.BINS), pace.BINS - 1))
                reach *= pace.plan.acceptance[keys[-1]].value
                expected, seconds = expected + reach, seconds + price
        passes.rollback(start)
        return keys, drafts

    def _bound(self, reach: float, expected: float, seconds: float) -> float:
        """The probability of a token after which a further one is not worth its step."""
        pace = self.pace
        for key in range(pace.BINS):
            further = reach * pace.plan.acceptance[key].value
            after = seconds + pace.step_s + pace.row_s
            if pace.worth(further * pace.plan.overall.value, pace.step_s, expected + further, after):
                return key / pace.BINS
        return 2.0
