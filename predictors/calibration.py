"""The text that a Plan is calibrated on: a file's, or sampled from the model itself."""

from __future__ import annotations

import codecs
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from .checks import check_encodable, check_seed, kind_of, names_a_file, path_of
from .errors import CoreskipError
from .files import read_bytes

logger = logging.getLogger("coreskip")

MOST_CHARACTERS = 8_000_000  # of a longer file, evenly spread pieces are read: memory stays bounded
_PIECES = 64


@dataclass(frozen=True, eq=False)
class TokenText:
    """A text as token ids.

    Attributes:
        ids: int64 ``[tokens]``.
        prefix: ids that the tokenizer puts before every text (a BOS token, or nothing).
        source: what the text is, for people.
    """

    ids: Tensor
    prefix: Tensor
    source: str

    @classmethod
    def sampled(cls, ids: Tensor, tokenizer: Any, seed: int) -> TokenText:
        """Text that a model has written: int64 ids ``[tokens]``."""
        return cls(ids, _prefix(tokenizer), f"sampled from the model, seed {seed}")

    def split(self, *shares: float) -> list[TokenText]:
        """Consecutive parts of the given shares, which sum to at most 1."""
        parts, start = [], 0.0
        for share in shares:
            low, high = round(start * len(self.ids)), round((start + share) * len(self.ids))
            parts.append(TokenText(self.ids[low:high], self.prefix, self.source))
            start += share
        return parts

    @classmethod
    def joined(cls, texts: Sequence[TokenText]) -> TokenText:
        """Several texts as one, a piece of each in turn, so that every part of it has of all of them in proportion."""
        if len(texts) == 1:
            return texts[0]
        pieces = [text.ids.tensor_split(_PIECES) for text in texts]
        ids = torch.cat([piece for turn in zip(*pieces, strict=True) for piece in turn])
        return cls(ids, texts[0].prefix, " and ".join(dict.fromkeys(text.source for text in texts)))

    def windows(self, length: int, most: int) -> Tensor:
        """Up to `most` windows of `length` tokens each (the prefix included), evenly spread, not overlapping.

        Raises:
            CoreskipError: the text holds no whole window.
        """
        body = length - len(self.prefix)
        available = len(self.ids) // body if body > 0 else 0
        if available < 1:
            raise CoreskipError(
                f"the text ({self.source}) has {len(self.ids)} tokens, at least {max(body, 1)} are needed: give a "
                "longer one"
            )
        count = min(most, available)
        starts = [(i * available // count) * body for i in range(count)]
        return torch.stack([torch.cat([self.prefix, self.ids[s : s + body]]) for s in starts])

    def fingerprint(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.ids.to(torch.int32).numpy().tobytes()).hexdigest()
        return {"source": self.source, "tokens": len(self.ids), "sha256": digest}


def tokenize(tokenizer: Any, text: str, source: str = "text") -> TokenText:
    """Token ids of `text` without special tokens; the tokenizer's BOS, if it adds one, becomes the prefix."""
    if not text.strip():
        raise CoreskipError(f"the text ({source}) is empty: give some prose to calibrate on")
    check_encodable(f"the text ({source})", text)
    check_tokenizer(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return TokenText(torch.tensor(ids, dtype=torch.int64, device="cpu"), _prefix(tokenizer), source)


def _prefix(tokenizer: Any) -> Tensor:
    bos = tokenizer.bos_token_id
    added = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    return torch.tensor([bos] if added else [], dtype=torch.int64, device="cpu")


def text_of(tokenizer: Any, text: str | os.PathLike[str] | TokenText) -> TokenText:
    """What may stand for a text: the text itself, the path of a UTF-8 file (a `Path`, not a str), or token ids.

    Raises:
        CoreskipError: none of these, or a str that names a file: it would be taken for the text.
    """
    if isinstance(text, TokenText):
        return text
    if isinstance(text, os.PathLike):
        return tokenize(tokenizer, read_text(text), Path(text).name)
    if not isinstance(text, str):
        raise CoreskipError(f"the text is given as {kind_of(text)}: give a str, or the Path of a UTF-8 file")
    if names_a_file(text):
        raise CoreskipError(f"the text {text!r} is the name of a file: give Path({text!r}) to read it")
    return tokenize(tokenizer, text)


def check_tokenizer(tokenizer: Any) -> None:
    """Raise `CoreskipError` unless `tokenizer` is one of transformers', or like it: called with a text it gives ids."""
    if not callable(tokenizer) or isinstance(tokenizer, (torch.nn.Module, type)):
        raise CoreskipError(f"the tokenizer is {kind_of(tokenizer)}: give the one that coreskip.load() returned")


def most_positions(model: Any, without: int) -> int:
    """Tokens that the model was made for; `without`, where its configuration does not tell."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or without


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file or pipe. Of a file above `MOST_CHARACTERS` bytes evenly spread pieces of that size in
    all, of what a pipe brings the first so many.

    Raises:
        CoreskipError: it cannot be read, or is no text.
    """
    file = path_of(path, "the text")
    try:
        if file.is_file() and (size := file.stat().st_size) > MOST_CHARACTERS:
            text = "\n".join(_pieces(file, size))
        else:
            text = _beginning(file)
    except OSError as error:
        raise CoreskipError(f"cannot read the text {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CoreskipError(f"{file} is not UTF-8 text") from None
    if "\0" in text:
        raise CoreskipError(f"{file} is not UTF-8 text: it holds null characters")
    return text


def _beginning(file: Path) -> str:
    data = read_bytes(file, MOST_CHARACTERS + 1)
    cut = len(data) > MOST_CHARACTERS
    if cut:
        logger.warning("of %s only the first %.0f MB are read", file, MOST_CHARACTERS / 1e6)
    # a cut may go through a character
    return codecs.getincrementaldecoder("utf-8")().decode(data[:MOST_CHARACTERS], final=not cut)


def _pieces(file: Path, size: int) -> Iterator[str]:
    piece = MOST_CHARACTERS // _PIECES
    with file.open("rb") as handle:
        for i in range(_PIECES):
            handle.seek(i * (size // _PIECES))
            yield handle.read(piece).decode("utf-8", errors="ignore")


class _Bar(StoppingCriteria):
    """Shows progress: generation asks it once per token whether to stop."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self._bar.update(input_ids.shape[0])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def sample_text(model: Any, tokenizer: Any, *, tokens: int, length: int, seed: int, progress: bool = True) -> TokenText:
    """Text that the model itself writes, for when there is none at hand: nucleus sampling from an empty prompt.

    Top-p 0.95, because free sampling from a small model drifts into gibberish: on the embedded model at keep 0.7, a
    static plan from such text cost +91 % perplexity on real text, from freely sampled text +94 %, from top-p 0.9
    +106 %, from temperature 0.8 +108 %, from real text +61 % (5 windows).

    Args:
        tokens: how many to sample, rounded up to whole sequences of `length`.
        length: of each sequence, or what the model has positions for.
        seed: the same seed gives the same text; the caller's random state is left as it was.
    """
    check_seed(seed)
    check_tokenizer(tokenizer)
    length = min(length, most_positions(model, length + 1) - 1)
    start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), 0)
    rows = -(-tokens // length)
    device = next(model.parameters()).device
    config = GenerationConfig(
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=0.95,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
    )
    prompt = torch.full((rows, 1), start, dtype=torch.int64, device=device)
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        tqdm(total=rows * length, desc="sampling text", unit="tok", disable=not progress, leave=False) as bar,
    ):
        torch.manual_seed(seed)
        written = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([_Bar(bar)]),
        )
    ids = written[:, 1:].reshape(-1).cpu()
    return TokenText.sampled(ids, tokenizer, seed)
