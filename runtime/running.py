"""One sequence in a scheduler's hands: its tokens, its KV cache, and when it ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.cache_utils import Cache

from ..predictors.errors import reason_of
from .choosing import TokenChooser
from .lower_cpu import StepProgram
from .native import NativeSequence
from .pieces import Pieces
from .sequence import Event, Finish, Ticket, TokenLogprob


class Running:
    """A sequence under way.

    Args:
        prompt: its token ids. most: new tokens at most. ends: tokens that end it, and are no part of its text.
        criteria: further ones, asked after every token.
        dense: whether nothing is left out, and the weights are read as they were loaded.
        echo: of how many likeliest tokens the prompt's log-probabilities are wanted; None: they are not.

    Attributes:
        cache: keys and values of its first `read` tokens. native: what steps it natively, and by which program; None
            where nothing does yet.
        state: of the model, when the sequence began: see `Decoder`. nbytes: reserved for keys and values.
    """

    def __init__(
        self,
        ticket: Ticket,
        prompt: Sequence[int],
        most: int,
        ends: frozenset[int],
        chooser: TokenChooser,
        pieces: Pieces,
        *,
        criteria: StoppingCriteriaList | None = None,
        dense: bool = False,
        echo: int | None = None,
    ) -> None:
        self.ticket, self.chooser, self.pieces = ticket, chooser, pieces
        self.prompt, self.most, self.ends, self.dense, self.echo = len(prompt), most, ends, dense, echo
        self._criteria = criteria or None
        self._tokens = torch.empty((1, len(prompt) + most), dtype=torch.int64, device="cpu")
        self._tokens[0, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        self._numbers = self._tokens[0].numpy()  # the same memory: to write a token to a tensor takes ten times as long
        self.length, self.read, self.nbytes = len(prompt), 0, 0
        self.cache: Cache | None = None
        self.state: object = None
        self.native: tuple[NativeSequence, StepProgram] | None = None
        self.finish: Finish | None = None

    @property
    def ids(self) -> Tensor:
        """int64 ``[1, length]``: the prompt and what was made of it so far."""
        return self._tokens[:, : self.length]

    @property
    def last(self) -> int:
        return int(self._numbers[self.length - 1])

    @property
    def room(self) -> int:
        """How many tokens may still be made."""
        return self.prompt + self.most - self.length

    @property
    def decodes(self) -> bool:
        """Whether its prompt has been read."""
        return self.read >= self.prompt

    @property
    def plain(self) -> bool:
        """Whether it takes the likeliest tokens up to a length or an end, and asks for nothing else."""
        return self.chooser.plain and self._criteria is None

    def choose(self, logits: Tensor) -> None:
        """Goes on by the token that its options choose from `logits` ``[vocabulary]``."""
        token, logprob = self.chooser.choose(self.ids, logits)
        self.extend([token], None if logprob is None else [logprob])

    def extend(self, tokens: Sequence[int], logprobs: list[TokenLogprob] | None = None) -> None:
        """Goes on by `tokens`, up to the one that ends it."""
        now = time.perf_counter()
        self.ticket.timings.first_token = self.ticket.timings.first_token or now
        taken, text = self._certain(tokens)
        for token in tokens[taken:]:
            taken += 1
            text += self._take(token)
            if self.finish is not None:
                break
        self.ticket.usage.completion_tokens += taken
        self._put(text, list(tokens[:taken]), logprobs)

    def _certain(self, tokens: Sequence[int]) -> tuple[int, str]:
        """Takes those of the tokens that cannot end it, at once: how many, and the text that comes with them."""
        if len(tokens) == 1 or self._criteria is not None:
            return 0, ""
        some = tokens[: self.room - 1]  # the one that leaves no room ends it
        if some and some[-1] in self.ends:
            some = some[:-1]
        text = None if not some or self.ends.intersection(some) else self.pieces.add_all(some)
        if text is None:
            return 0, ""
        self._numbers[self.length : self.length + len(some)] = some
        self.length += len(some)
        return len(some), text

    def _take(self, token: int) -> str:
        """The text that comes with the token."""
        self._numbers[self.length] = token
        self.length += 1
        if token in self.ends:
            self.finish = "stop"
            return self.pieces.end()
        text = self.pieces.add(token)
        if self.pieces.stopped or (self._criteria is not None and bool(self._criteria(self.ids, None).all())):
            self.finish = "stop"
        elif self.room == 0:
            self.finish = "length"
        if self.finish is not None:
            text += self.pieces.end()
            self.finish = "stop" if self.pieces.stopped else self.finish
        return text

    def end(self, finish: Finish, failure: BaseException | None = None) -> None:
        """Ends here, with what there is."""
        if self.finish is not None:
            return
        self.finish, self.ticket.failure = finish, failure
        text = "" if failure is not None else self.pieces.end()
        self._put(text, [], None, None if failure is None else reason_of(failure))

    def _put(self, text: str, tokens: list[int], logprobs: list[TokenLogprob] | None, error: str | None = None) -> None:
        if self.finish is not None:
            self.ticket.timings.done = time.perf_counter()
            self.cache = self.native = None  # before anybody is told: the memory is free then
        self.ticket.put(Event(text, tokens, logprobs, self.finish, error))


def end_ids(model: Any) -> frozenset[int]:
    """The tokens that end a text of the model's."""
    found = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        found = getattr(model.config.get_text_config(), "eos_token_id", None)
    return frozenset() if found is None else frozenset(found if isinstance(found, (list, tuple)) else [found])
