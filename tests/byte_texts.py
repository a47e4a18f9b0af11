"""Tiny models whose tokens are bytes, and what they make alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from tiny_models import greedy, prompt, tiny
from transformers import BatchEncoding

from coreskip.runtime.sequence import Request


class Bytes:
    """Every token is a byte."""

    bos_token_id = eos_token_id = pad_token_id = None

    def __call__(self, texts: list[str], **options: Any) -> Any:
        return BatchEncoding({"input_ids": [list(text.encode()) for text in texts]})

    def decode(self, tokens: list[int], **options: Any) -> str:
        return bytes(tokens).decode("utf-8", "replace")

    def batch_decode(self, rows: Any, **options: Any) -> list[str]:
        return [self.decode(list(map(int, row))) for row in rows]


def bytes_model(family: str = "llama", **settings: Any) -> Any:
    return tiny(family, vocab_size=256, max_position_embeddings=1024, **settings)


def ids(length: int, seed: int) -> list[int]:
    return prompt(1, length, seed)[0].tolist()


def alone(model: Any, request: Request) -> list[int]:
    """What transformers' own generate makes of it on the model as it is wrapped, one call at a time."""
    output = greedy(model, torch.tensor([request.ids]), request.max_new_tokens)[0, len(request.ids) :].tolist()
    ends = [i for i, token in enumerate(output) if token in request.stop_ids]
    return output[: ends[0] + 1] if ends else output


def in_threads(run: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def settles(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)
