"""The text that a Plan is calibrated on: a file's, or sampled from the model itself."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from .errors import CoreskipError

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

    def split(self, *shares: float) -> list[TokenText]:
        """Consecutive parts of the given shares, which sum to at most 1."""
        parts, start = [], 0.0
        for share in shares:
            low, high = round(start * len(self.ids)), round((start + share) * len(self.ids))
            parts.append(TokenText(self.ids[low:high], self.prefix, self.source))
            start += share
        return parts

    def windows(self, length: int, most: int) -> Tensor:
        """Up to `most` windows of `length` tokens each (the prefix included), evenly spread, not overlapping.

        Raises:
            CoreskipError: the text holds no whole window.
        """
        body = length - len(self.prefix)
        available = len(self.ids) // body
        if available < 1:
            raise CoreskipError(
                f"the text ({self.source}) has {len(self.ids)} tokens, at least {body} are needed: give a longer one"
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
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return TokenText(torch.tensor(ids, dtype=torch.int64, device="cpu"), _prefix(tokenizer), source)


def _prefix(tokenizer: Any) -> Tensor:
    bos = tokenizer.bos_token_id
    added = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    return torch.tensor([bos] if added else [], dtype=torch.int64, device="cpu")


def read_text(path: str | os.PathLike[str]) -> str:
    """A UTF-8 file's text; of a file above `MOST_CHARACTERS` bytes, evenly spread pieces of that size in all."""
    file = Path(path)
    try:
        size = file.stat().st_size
        if size <= MOST_CHARACTERS:
            return file.read_text(encoding="utf-8")
        return "\n".join(_pieces(file, size))
    except OSError as error:
        raise CoreskipError(f"cannot read the text {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CoreskipError(f"{file} is not UTF-8 text") from None


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
        seed: the same seed gives the same text; the caller's random state is left as it was.
    """
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
    return TokenText(ids, _prefix(tokenizer), f"sampled from the model, seed {seed}")
