"""A tokenizer's tokens as bytes, and grammars over them: what answers in a given format are held to.

Grammars are llguidance's: at every step it says in microseconds which tokens may come next.
"""

from __future__ import annotations

import codecs
import json
import threading
from collections.abc import Sequence
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor

from ..predictors.errors import CoreskipError
from .serve_errors import bad_request

#: Between the parts of JSON: enough for indentation. Without a limit small models stay there for good.
_JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \n\t]{0,12}"}
_BITS = torch.arange(8, dtype=torch.uint8)


class Vocabulary:
    """The tokens of one model.

    Args:
        size: of the model's logits, which may be more than the tokenizer has tokens.
        ends: ids of the tokens that end a text.
    """

    def __init__(self, tokenizer: Any, size: int, ends: Sequence[int]) -> None:
        self.tokenizer, self.size, self.ends = tokenizer, size, tuple(ends)
        self._tokens: LLTokenizer | str | None = None
        self._lock = threading.Lock()

    def tokens(self) -> LLTokenizer | str:
        """What llguidance makes of the tokenizer, or why it does not: once, for it takes about a second."""
        with self._lock:
            if self._tokens is None:
                ends = [end for end in self.ends if end < self.size]
                try:
                    self._tokens = from_tokenizer(self.tokenizer, n_vocab=self.size, eos_token=ends or None)
                except Exception as error:  # by whatever a tokenizer has that it does not know
                    self._tokens = " ".join(str(error).split())
            return self._tokens

    def text(self, token: int) -> str:
        """One token for people: bytes that are no text by themselves as OpenAI writes them, ``bytes:\\xe2\\x82``."""
        found = self.bytes(token)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def bytes(self, token: int) -> bytes:
        tokens = self.tokens()
        if isinstance(tokens, str):
            return str(self.tokenizer.decode([token], skip_special_tokens=False)).encode()
        return tokens.decode_bytes([token])

    def shows(self, text: str) -> bool:
        """Whether `text` is the same without special tokens."""
        return str(self.tokenizer.decode(self._ids(text), skip_special_tokens=True)) == text

    def offsets(self) -> Offsets:
        return Offsets(self)

    def decoder(self) -> Decoder:
        return Decoder(self)

    def grammar(self, definition: str, param: str) -> Grammar:
        """A grammar in llguidance's form, checked.

        Raises:
            ApiError: 400; it names `param`.
        """
        tokens = self.tokens()
        if isinstance(tokens, str):
            reason = f"{param} needs a tokenizer that llguidance reads, and this model's is none: {tokens}"
            raise bad_request(reason, param, "unsupported_parameter")
        refused, messages = LLMatcher.validate_grammar_with_warnings(definition, tokens)
        if refused:
            reason = " ".join(messages[0].split())
            raise bad_request(f"{param} cannot be generated: {reason}", param)
        return Grammar(tokens, definition, self.size, param)

    def of_schema(self, schema: dict[str, Any], param: str) -> Grammar:
        try:
            definition = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_JSON_OPTIONS)
        except ValueError as error:
            raise bad_request(f"{param} is not a schema: {error}", param) from None
        return self.grammar(definition, param)

    def of_regex(self, pattern: str, param: str) -> Grammar:
        return self.grammar(LLMatcher.grammar_from_regex(pattern), param)

    def of_calls(self, before: str, after: str, schemas: Sequence[dict[str, Any]]) -> Grammar:
        """One JSON object that fits one of the `schemas`, between two texts that are written in the tokenizer's own
        tokens, special ones among them."""
        body: dict[str, Any] = {"x-guidance": _JSON_OPTIONS, "anyOf": list(schemas)}
        around = [" ".join(f"<[{id}]>" for id in self._ids(text)) for text in (before, after)]
        lark = f"start: {around[0]} body {around[1]}\nbody: %json {json.dumps(body)}"
        return self.grammar(LLMatcher.grammar_from_lark(lark), "tools")

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


class Grammar:
    """What answers of one request have to match; each of its texts has a `matcher` of its own.

    size: of the model's logits. param: the field of the request that asked for it.
    """

    def __init__(self, tokens: LLTokenizer, definition: str, size: int, param: str) -> None:
        self._tokens, self._definition, self._size, self._param = tokens, definition, size, param

    def matcher(self) -> Matcher:
        return Matcher(LLMatcher(self._tokens, self._definition), self._size, self._param)


class Unfollowable(CoreskipError):
    """A grammar that turned out to be more than llguidance can follow. param: see `Grammar`."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class Matcher:
    """Holds one text to a grammar; a `Constraint` of runtime/sequence.py. size, param: see `Grammar`."""

    def __init__(self, matcher: LLMatcher, size: int, param: str) -> None:
        self._matcher, self._size, self._param = matcher, size, param

    def mask(self, logits: Tensor) -> Tensor:
        """Forbids what may not come next in `logits` ``[vocabulary]``; where the text is complete, all but its end.

        Raises:
            Unfollowable: see there.
        """
        self._check()
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        allowed = (bits[:, None].bitwise_right_shift(_BITS) & 1).flatten()[: self._size].bool()
        return logits.masked_fill_(~allowed.to(logits.device), -torch.inf)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())
            raise Unfollowable(f"the answer's format cannot be followed: {reason}", self._param)


class Decoder:
    """The text of tokens as they come, special ones included, except those that end the text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._pending = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, tokens: Sequence[int], last: bool) -> str:
        known = [token for token in tokens if token not in self._vocabulary.ends]
        return self._pending.decode(b"".join(self._vocabulary.bytes(token) for token in known), last)


class Offsets:
    """Where tokens begin in the text, in characters. Special tokens take no room, and a token within a character begins
    where that does."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary, self._length = vocabulary, 0
        self._special = frozenset(vocabulary.tokenizer.all_special_ids)
        self._pending = codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, tokens: Sequence[int]) -> list[int]:
        """Of the next tokens of the text."""
        found = []
        for token in tokens:
            found.append(self._length)
            if token not in self._special:
                self._length += len(self._pending.decode(self._vocabulary.bytes(token)))
        return found
