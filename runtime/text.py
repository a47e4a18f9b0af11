"""The text of one generation: which token comes next, and where the text ends, as in transformers' own generation.

Both the loop without drafts (runtime/loop.py) and exact mode extend their text through `Text`. When sampling, the next
token is the largest of p / e over exponential noise e, which is how `torch.multinomial` draws a token, too: the same
seed gives the same text as transformers' own loop.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .kv_cache import is_plain
from .recurrent_states import is_recurrent


class _SamplingNoise:
    """The noise of one generation, in the order in which transformers draws it: one vector per token.

    Noise that was drawn ahead, for drafted tokens beyond the last accepted one, is given back to the generator.
    """

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._vocabulary, self._device = vocabulary, device
        self._drawn: deque[tuple[Tensor, Tensor]] = deque()  # the generator's state before each vector, and the vector

    def at(self, ahead: int) -> Tensor:
        """The noise ``[1, vocabulary]`` of the token that is `ahead` tokens after the next one."""
        while len(self._drawn) <= ahead:
            state = self._state()
            noise = torch.empty(1, self._vocabulary, dtype=torch.float32, device=self._device).exponential_(1)
            self._drawn.append((state, noise))
        return self._drawn[ahead][1]

    def consume(self) -> None:
        """The next token was chosen: its noise is used up."""
        self._drawn.popleft()

    def give_back(self) -> None:
        """Set the generator back to before the noise that no token has used."""
        if self._drawn:
            state = self._drawn[0][0]
            if self._device.type == "cuda":
                torch.cuda.set_rng_state(state, self._device)
            else:
                torch.set_rng_state(state)

    def _state(self) -> Tensor:
        return torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else torch.get_rng_state()


class Text:
    """The growing text of one generation: chooses tokens as transformers does, and ends where transformers ends it.

    Attributes:
        ids: int64 [1, length], the prompt and the tokens chosen so far.
        finished: whether a stopping criterion holds.
        scores, logits: float32 [1, vocabulary] per chosen token, where the caller asked for these; else None.
    """

    def __init__(
        self, ids: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any, vocabulary: int
    ) -> None:
        self.ids, self._processors, self._criteria, self._streamer = ids, processors, criteria, streamer
        self._noise = _SamplingNoise(vocabulary, ids.device) if config.do_sample else None
        self._stateless = [processor for processor in processors if is_stateless(processor)]
        self.finished = False
        self.scores: list[Tensor] | None = [] if config.return_dict_in_generate and config.output_scores else None
        self.logits: list[Tensor] | None = [] if config.return_dict_in_generate and config.output_logits else None

    def append(self, logits: Tensor) -> int:
        """Choose the next token from the model's `logits` ``[vocabulary]``, append the token and return it.

        Raises:
            RuntimeError: sampling, and no token has a probability; the words are torch.multinomial's.
        """
        raw = logits.to(copy=True, dtype=torch.float32, device=self.ids.device).unsqueeze(0)
        scores = self._processors(self.ids, raw)
        if self.scores is not None:
            self.scores.append(scores)
        if self.logits is not None:
            self.logits.append(raw)
        token, probability = self._choose(scores, 0)
        if self._noise is not None:
            if math.isnan(probability):  # as torch.multinomial refuses them: one NaN or infinity makes all of them NaN
                raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
            self._noise.consume()
        self.ids = torch.cat([self.ids, torch.tensor([[token]], device=self.ids.device)], dim=-1)
        if self._streamer is not None:
            self._streamer.put(torch.tensor([token]))
        self.finished = bool(self._criteria(self.ids, None if self.scores is None else tuple(self.scores)).all())
        return token

    def extend(self, tokens: Sequence[int]) -> None:
        """Append `tokens` that were chosen greedily elsewhere. Only for stopping criteria that read the text's length
        and its last token."""
        self.ids = torch.cat([self.ids, torch.tensor([list(tokens)], device=self.ids.device)], dim=-1)
        if self._streamer is not None:
            for token in tokens:
                self._streamer.put(torch.tensor([token]))
        self.finished = bool(self._criteria(self.ids, None).all())

    def is_certain(self, logits: Tensor, margin: float) -> bool:
        """Whether the next token is the same for all logits within `margin` of these `logits` ``[vocabulary]``. Only
        for stateless processors."""
        scores = self._draft_scores(self.ids, logits).log_softmax(dim=-1)
        if self._noise is not None:
            scores = scores - self._noise.at(0).log()
        first, second = scores.topk(2, dim=-1).values[0]
        return bool(first - second > margin)

    def draft_token(self, drafts: Sequence[int], logits: Tensor) -> tuple[int, float]:
        """The token that would follow the text and `drafts` if `logits` ``[vocabulary]`` were the model's there, and
        the token's probability. It is drawn with the noise that the verification of that place will use."""
        ids = torch.cat([self.ids, torch.tensor([list(drafts)], device=self.ids.device, dtype=self.ids.dtype)], dim=-1)
        return self._choose(self._draft_scores(ids, logits), len(drafts))

    def _draft_scores(self, ids: Tensor, logits: Tensor) -> Tensor:
        scores = logits.to(copy=True, dtype=torch.float32, device=ids.device).unsqueeze(0)
        for processor in self._stateless:
            scores = processor(ids, scores)
        return scores

    def _choose(self, scores: Tensor, ahead: int) -> tuple[int, float]:
        probabilities = scores.softmax(dim=-1)
        weights = scores if self._noise is None else probabilities / self._noise.at(ahead)
        token = int(weights.argmax(dim=-1))
        return token, float(probabilities[0, token])

    def result(self, config: Any, cache: Any) -> Any:
        """What ``generate`` returns under the generation `config`."""
        if not config.return_dict_in_generate:
            return self.ids
        kept = {"scores": self.scores, "logits": self.logits}
        tuples: dict[str, Any] = {name: None if value is None else tuple(value) for name, value in kept.items()}
        return GenerateDecoderOnlyOutput(sequences=cast(Any, self.ids), past_key_values=cache, **tuples)

    def close(self) -> None:
        """To be called when the generation ends, whichever way it does."""
        if self._noise is not None:
            self._noise.give_back()


_STATEFUL = ("UnbatchedClassifierFreeGuidance", "Watermark", "SynthID", "PrefixConstrained")


def is_stateless(processor: Any) -> bool:
    """Whether a logits processor may be called on drafted tokens: it must not remember what it was called with. A
    processor that the user wrote might remember; such a one is called in verification only."""
    cls = type(processor)
    return cls.__module__ == logits_process.__name__ and not cls.__name__.startswith(_STATEFUL)


def end_tokens(arguments: dict[str, Any]) -> list[int] | None:
    """The tokens that end a greedy text, where nothing but these and a length decides about the text; else None.

    arguments: of one call of ``model._sample``, by name.
    """
    config, criteria = arguments["generation_config"], arguments["stopping_criteria"]
    wants_more = config.return_dict_in_generate and (config.output_scores or config.output_logits)
    if config.do_sample or len(arguments["logits_processor"]) or wants_more:
        return None
    if any(type(c) not in (EosTokenCriteria, MaxLengthCriteria) for c in criteria) or criteria.max_length is None:
        return None
    return [int(t) for c in criteria if isinstance(c, EosTokenCriteria) for t in c.eos_token_id.flatten()]


def uncovered_call(ids: Tensor, arguments: dict[str, Any], goes_back: bool = True) -> str | None:
    """Why a call of ``model._sample`` is more than one unpadded sequence over a growing KV cache; None where it is not.

    ids: int64 [rows, length]; arguments: the call's others, by name. goes_back: whether tokens may be taken back, which
    the states of recurrences do not know.
    """
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
    if not all(is_plain(layer) or (is_recurrent(layer) and not goes_back) for layer in cache.layers):
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
