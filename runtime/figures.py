"""What one generation took: tokens, seconds, memory."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Figures:
    """What one generation took.

    Attributes:
        prompt_tokens: of all rows together.
        new_tokens: generated, of all rows together.
        seconds: from the prompt's tokens to the last new one.
        first_token_s: seconds up to the first new token; None where nothing was streamed.
        abstained: prompts of them after which the plan has nothing said.
    """

    prompt_tokens: int
    new_tokens: int
    seconds: float
    first_token_s: float | None
    abstained: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens per second, the first one and the time up to it left out where that is known; None of too few."""
        tokens, seconds = self.new_tokens, self.seconds
        if self.first_token_s is not None:
            tokens, seconds = tokens - 1, seconds - self.first_token_s
        return tokens / seconds if tokens > 0 and seconds > 0 else None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has had in memory at most: of the GPU's on CUDA, else of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
