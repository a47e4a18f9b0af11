"""Strings that end a text: in generation, in a stream, and in what was generated."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

_TOKENS_PER_CHARACTER = 4  # at most, where a tokenizer falls back to bytes
_MORE = 8  # tokens of no text, such as special ones


class StopStrings(StoppingCriteria):
    """Stops a row whose text, as the tokenizer decodes it, has come to one of the strings.

    By text, for any tokenizer: transformers' own criterion looks for the string's tokens in the vocabulary, which fails
    for vocabularies of whole words.

    Args:
        prompt: tokens before the new ones.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt: int) -> None:
        self._tokenizer, self._stops, self._prompt = tokenizer, stops, prompt
        # all that may hold the end of the longest string, and its beginning
        self._most = _TOKENS_PER_CHARACTER * max(map(len, stops)) + _MORE

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        new = input_ids[:, self._prompt :][:, -self._most :]
        texts = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        found = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of the strings."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def stop_before(pieces: Iterator[str], stops: Sequence[str]) -> Generator[str, None, None]:
    """The pieces up to the first stop string, holding back what may be the beginning of one."""
    held = ""
    for piece in pieces:
        held += piece
        before = cut(held, stops)
        if len(before) < len(held):
            held = before
            break
        safe = len(held) - max((overlap(held, stop) for stop in stops), default=0)
        if safe > 0:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could begin `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
