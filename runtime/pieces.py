"""A text as it grows token by token: whole characters, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .stop_strings import cut, overlap

_MOST_HELD = 64  # tokens that may wait for the rest of a character: a text of broken ones goes out as it is


class Pieces:
    """Decodes tokens as they come.

    Tokens may be parts of a character, and some tokenizers decode one as it follows another (with a space before it or
    not). So each is decoded together with those before it, and what ends in a replacement character waits for the next.

    Attributes:
        stopped: whether a stop string has come. The text before it has been returned, and nothing comes after it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, list(stops)
        self._tokens: list[int] = []  # those that the next one is decoded with
        self._decoded = 0  # of these, how many the text has
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain once `token` has come."""
        self._tokens.append(token)
        return self._certain(self._fresh(whole=True))

    def add_all(self, tokens: Sequence[int]) -> str | None:
        """`add` of several tokens, decoded once: two decodings take 20 us, for each token as many as for all. None, and
        nothing is added, where they have to come one by one: for a stop string, or a character that is not complete."""
        if self._stops or self.stopped:
            return None
        held, self._tokens = self._tokens, [*self._tokens, *tokens]
        text = self._fresh(whole=True)
        if self._decoded < len(self._tokens):
            self._tokens = held
            return None
        return text

    def end(self) -> str:
        """What is left when no token comes any more."""
        rest = self._certain(self._fresh(whole=False)) if self._decoded < len(self._tokens) else ""
        held, self._held = self._held, ""
        return rest if self.stopped else rest + held

    def _fresh(self, whole: bool) -> str:
        """Text of the tokens that the text does not have yet. whole: nothing where a character is not complete."""
        before, text = self._decode(self._tokens[: self._decoded]), self._decode(self._tokens)
        if whole and text.endswith("\ufffd") and len(self._tokens) - self._decoded < _MOST_HELD:
            return ""
        fresh = text[len(before) :]
        # what decodes to nothing, as special tokens do, is no context: the next word would come without its space
        if fresh.strip() or len(self._tokens) > _MOST_HELD:
            self._tokens = self._tokens[self._decoded :]
        self._decoded = len(self._tokens)
        return fresh

    def _certain(self, text: str) -> str:
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        self._held += text
        before = cut(self._held, self._stops)
        self.stopped = len(before) < len(self._held)
        held = 0 if self.stopped else max(overlap(self._held, stop) for stop in self._stops)
        found = before[: len(before) - held]
        self._held = "" if self.stopped else self._held[len(found) :]
        return found

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""
