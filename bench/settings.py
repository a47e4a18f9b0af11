"""What a benchmark run is asked to do, and the options of `coreskip bench` that ask for it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreskip.bench.runner import FORMATS, Job
from coreskip.bench.runners import OPPONENTS
from coreskip.bench.workloads import NATURAL_SPARSITY, Prompt, Shape, has_relu, prompts, threads_available
from coreskip.predictors.calibration import read_text
from coreskip.predictors.checks import check_above_zero, check_share
from coreskip.predictors.errors import CoreskipError
from coreskip.predictors.plan import Plan
from coreskip.runtime.load import check_gguf, device_of

WIDTHS = {"float16": 16, "bfloat16": 16, "float32": 32}  # bits


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        jobs: the runners, in the order in which they take turns.
        prompts: given to every runner, one per round.
        rounds: how often each prompt is timed.
        tokens: generated each time.
        minutes: limit on the whole run, or None. Under it fewer tokens, rounds, runners and perplexities are measured,
            each as carefully as without.
        windows: of 512 tokens, scored for the perplexity; 0 for none.
        text: to score, with its name for people.
        command: that makes the rows again.
    """

    jobs: Sequence[Job]
    prompts: Sequence[Prompt]
    rounds: int = 3
    tokens: int = 64
    minutes: float | None = None
    windows: int = 4
    text: tuple[str, str] = ("", "")
    command: str = ""


def settings_of(
    *,
    model: str | None,
    plans: Sequence[Path] = (),
    keeps: Sequence[float] = (),
    against: str | None = None,
    dtypes: str = "float32,bfloat16,int4",
    device: str | None = None,
    threads: int | None = None,
    tokens: int = 64,
    rounds: int = 3,
    minutes: float | None = None,
    workloads: tuple[str, ...] = (),
    prompt_file: Path | None = None,
    shape: str | None = None,
    layers: int | None = None,
    sparsity: float | None = None,
    gguf: Path | None = None,
    text: Path | None = None,
    windows: int = 4,
) -> Settings:
    """What the options of `coreskip bench` ask for.

    Raises:
        CoreskipError: an option that makes no sense, before anything is loaded.
    """
    if shape is None and (layers, sparsity) != (None, None):
        raise CoreskipError("--layers and --sparsity are for a --shape")
    if shape is not None and (model, gguf, text) != (None, None, None):
        raise CoreskipError("a --shape has random weights: it takes no MODEL, --gguf or --text")
    if text is not None and not windows:
        raise CoreskipError("--text is to be scored, and --windows 0 scores none: leave one out")
    if minutes is not None:
        check_above_zero("--minutes", minutes)
    place = str(device_of(device))
    common: dict[str, Any] = {
        "model": model,
        "shape": None if shape is None else Shape(shape, layers, NATURAL_SPARSITY if sparsity is None else sparsity),
        "device": place,
        "threads": threads or threads_available(),
        "gguf": gguf,
    }
    opponents = _opponents(against, place, shape)
    if gguf is not None and not {"llama.cpp", "openvino"} & set(opponents):
        raise CoreskipError("--gguf is for llama.cpp and openvino: leave it out, or name one of them in --against")
    if sparsity is not None and shape is not None and not has_relu(shape):
        raise CoreskipError(f"--sparsity is of ReLU shapes, and {shape} has no ReLU: leave it out")
    for plan in plans:
        Plan.load(plan)
    if gguf is not None:
        check_gguf(gguf)
    for keep in keeps:
        check_share("keep", keep)
    return Settings(
        jobs=_jobs(opponents, _dtypes(dtypes), [*plans, *keeps], common),
        prompts=prompts(workloads, prompt_file),
        rounds=rounds,
        tokens=tokens,
        minutes=minutes,
        windows=windows,
        text=scored_text(text) if windows and shape is None else ("", ""),
        command=shlex.join(["coreskip", *sys.argv[1:]]),
    )


def _opponents(against: str | None, device: str, shape: str | None) -> list[str]:
    if against is None:
        return list(OPPONENTS) if shape is None and device == "cpu" else ["hf", "hf-compile"]
    names = [name.strip() for name in against.split(",") if name.strip() not in ("", "none")]
    unknown = [name for name in names if name not in OPPONENTS]
    if unknown:
        raise CoreskipError(f"unknown runner {unknown[0]!r}; choose from {', '.join(OPPONENTS)}, or none")
    peers = [name for name in names if not name.startswith("hf")]
    if shape is not None and peers:
        raise CoreskipError(f"{peers[0]} takes no --shape: there is no file of random weights for it to read")
    if device != "cpu" and peers:
        raise CoreskipError(f"{peers[0]} is run on the CPU: measure it with --device cpu")
    return names


def _dtypes(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in (*WIDTHS, *FORMATS)]
    if unknown:
        raise CoreskipError(f"unknown dtype {unknown[0]!r}; choose from {', '.join([*WIDTHS, *FORMATS])}")
    return names


def _jobs(
    opponents: Sequence[str],
    dtypes: Sequence[str],
    plans: Sequence[Path | float],
    common: dict[str, Any],
) -> list[Job]:
    """hf first: what is compared with it then follows it closely in every round."""
    floats = [dtype for dtype in dtypes if dtype in WIDTHS]
    its_own = {
        "onnxruntime": ["float32", "int4"],
        "openvino": ["gguf"],
        "llama.cpp": ["gguf"],
        "coreskip-dense": dtypes,
    }
    its_own["coreskip-engine"] = [dtype for dtype in dtypes if dtype != "float32"]  # what it adds shows in short steps
    its_own["coreskip-lookup"] = [dtype for dtype in dtypes if dtype not in WIDTHS]  # floats have exact mode
    names = [*opponents, "coreskip-dense"]
    if common["shape"] is None:  # the text of random weights says nothing about drafts, and there is no tokenizer
        names += ["coreskip-engine", "coreskip-lookup", "coreskip-exact"]
    jobs = [Job(name, dtype, **common) for name in names for dtype in its_own.get(name, floats)]
    return jobs + [Job("coreskip", dtype, plan=plan, **common) for plan in plans for dtype in dtypes]


def scored_text(file: Path | None) -> tuple[str, str]:
    """The text to score and its name: a file's, or Python's own language reference, which every Python carries."""
    if file is not None:
        return read_text(file), file.name
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return text, f"the language reference in Python {sys.version_info.major}.{sys.version_info.minor}"
