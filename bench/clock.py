"""The clock of a generation: when each token came."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Generation:
    """Greedily generated token ids, with the clock: seconds to the first one, then seconds from each to the next."""

    tokens: list[int]
    ttft: float
    gaps: list[float]

    @property
    def tok_s(self) -> float:
        """Tokens per second after the first."""
        return len(self.gaps) / sum(self.gaps)


class Stopwatch(BaseStreamer):
    """Notes when each token arrives; as a transformers streamer, it is told every one as soon as it is chosen."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._prompt_seen = False
        self._start = time.perf_counter()
        self._arrivals: list[float] = []

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:  # generate hands over the prompt first
            self._prompt_seen = True
            return
        self.add(int(value))

    def add(self, token: int) -> None:
        self._arrivals.append(time.perf_counter())
        self.tokens.append(token)

    def end(self) -> None:
        """Nothing is held back."""

    def generation(self) -> Generation:
        arrivals = self._arrivals
        gaps = [after - before for before, after in itertools.pairwise(arrivals)]
        return Generation(self.tokens, arrivals[0] - self._start, gaps)


def greedy(model: Any, ids: Tensor, tokens: int, **options: Any) -> tuple[Tensor, Generation]:
    """``model.generate``'s greedy continuation of `ids` ``[1, length]``, whole, and when its `tokens` tokens came: an
    end-of-text token does not stop it."""
    watch = Stopwatch()
    chosen: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "streamer": watch, **options}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **chosen)
    return output, watch.generation()
