"""What a runner is: one way to run one model, with a clock, and the job that says which."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coreskip.bench.clock import Generation
from coreskip.bench.workloads import Shape
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.version import VERSION

FORMATS = ("int8", "int4")  # in which coreskip holds weights
Scored = tuple[float, int]  # a perplexity, and over how many tokens


@dataclass(frozen=True)
class Job:
    """One runner with its settings; it travels to the runner's own process.

    Attributes:
        runner: a key of `RUNNERS`.
        dtype: of the weights: float32, bfloat16, float16; int8 or int4, which coreskip makes of float32; or the peer's
            own (int4, gguf).
        model: as `coreskip.load` takes it; not looked at where there is a `shape`.
        plan: folder of a plan, or a share of neurons to keep by core neurons without any calibration.
        gguf: for llama.cpp and OpenVINO GenAI, and a model other than the embedded one.
        context: tokens of the longest prompt and its continuation: what a cache of fixed size must hold.
    """

    runner: str
    dtype: str
    model: str | None = None
    shape: Shape | None = None
    plan: Path | float | None = None
    gguf: Path | None = None
    device: str = "cpu"
    threads: int = 1
    context: int = 1024

    def __str__(self) -> str:
        plan = "" if self.plan is None else f" {self.plan}"
        return f"{self.runner} {self.dtype}{plan}"


class Runner:
    """One way to run a model. Figures that it cannot give are None."""

    #: pip package that it needs besides coreskip's own dependencies
    package: str | None = None
    #: id of the process that runs the model, where that is not this one: its memory is what the row states
    process: int | None = None

    def __init__(self, job: Job) -> None:
        self.job = job

    def load(self) -> None:
        raise NotImplementedError

    def generate(self, ids: Sequence[int], new: int) -> Generation:
        """Greedy, exactly `new` tokens: an end-of-text token does not stop it, so that every runner does equal work."""
        raise NotImplementedError

    def weight_bytes(self) -> int:
        """Bytes of weights that a decode step reads."""
        raise NotImplementedError

    def perplexity(self, text: TokenText, windows: int) -> Scored | None:
        """Over windows of 512 tokens whose first half is prefilled and whose second half is scored under decode."""
        raise NotImplementedError

    def traits(self) -> dict[str, Any]:
        """dtype as read, the plan's method and keep, the share of neurons skipped so far; and `notes`, where the row
        has to say more about how the runner computes."""
        return {"dtype": self.job.dtype, "method": "dense", "keep": 1.0, "neurons_skipped": 0.0}

    def versions(self) -> dict[str, str]:
        found = {"coreskip": VERSION, "python": platform.python_version()}
        for package in ("torch", "transformers", self.package):
            if package is not None:
                found[package] = version(package)
        return found

    def close(self) -> None:
        """Delete what was written."""
