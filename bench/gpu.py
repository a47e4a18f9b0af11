"""One command for a card: checks every kernel, times kernels and whole steps, and writes rows.

    python -m coreskip.bench.gpu --minutes 7 --rows FILE

It needs a CUDA machine with torch, triton and transformers, and runs from a checkout with PYTHONPATH=. (no compiler, no
network). What matters most comes first, each part in a process of its own, so that one that fails takes no other with
it; what there is no time for is said. Without a card `--shape tiny` runs all of it in Triton's interpreter, and
`--shape predicted` counts launches and reasons what an H200 should do.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import click
import torch

from coreskip.predictors.errors import CoreskipError
from coreskip.predictors.files import check_file

#: each with its share of the minutes
PARTS = {"kernels": 0.25, "7b": 0.38, "7b-overlap": 0.07, "steps": 0.12, "8b": 0.1, "1b": 0.08}
WITHOUT_CARD = ("tiny", "predicted")


@click.command("gpu", help=__doc__)
@click.option("--minutes", type=float, default=7.0, show_default=True, help="After which it ends.")
@click.option("--rows", "output", help="Append a JSON row for each figure to this file.")
@click.option("--shape", type=click.Choice([*PARTS, "all", *WITHOUT_CARD]), default="all", show_default=True)
@click.option("--inside", is_flag=True, hidden=True, help="This process runs the part itself.")
def command(minutes: float, output: str | None, shape: str, inside: bool) -> None:
    if not minutes > 0:
        raise CoreskipError(f"--minutes is {minutes}: give a time above 0")
    path = None if output is None else Path(output)
    if path is not None:
        check_file(path)
    cuda = torch.cuda.is_available()
    if shape not in WITHOUT_CARD and not cuda:
        raise CoreskipError("there is no CUDA device: --shape tiny runs everything in Triton's interpreter")
    if inside:
        run_part(shape, minutes * 60, path, cuda)
        return
    if shape != "all":
        if _child(shape, minutes, path):
            raise CoreskipError(f"the part {shape} ended early")
        return
    end = time.monotonic() + minutes * 60
    for part, share in PARTS.items():
        left = (end - time.monotonic()) / 60
        _child(part, left if part == "1b" else min(left, max(minutes * share, left - minutes * _after(part))), path)


def _after(part: str) -> float:
    """The share of the minutes that the parts after this one have."""
    names = list(PARTS)
    return sum(PARTS[name] for name in names[names.index(part) + 1 :])


def _child(part: str, minutes: float, path: Path | None) -> int:
    """Runs one part in a process of its own; the interpreter is chosen when Triton is imported."""
    words = ["--shape", part, "--minutes", f"{minutes:.3f}", "--inside"]
    words += [] if path is None else ["--rows", str(path)]
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    if part.endswith("-overlap"):
        environment["CORESKIP_OVERLAP"] = "1"
    command = [sys.executable, "-m", "coreskip.bench.gpu", *words]
    try:
        return subprocess.run(command, env=environment, check=False, timeout=minutes * 60 + 20).returncode
    except subprocess.TimeoutExpired:
        print(f"{part} did not end in time", flush=True)
        return 1


def run_part(part: str, seconds: float, path: Path | None, cuda: bool) -> None:
    """One part, in this process."""
    from coreskip.bench import gpu_kernels, gpu_steps
    from coreskip.bench.gpu_clock import Results
    from coreskip.kernels import gpu_step
    from coreskip.runtime import bundles, gpu_matrices

    device = torch.device("cuda" if cuda else "cpu")
    results = Results(path, seconds, f"python -m coreskip.bench.gpu --shape {part}")
    if part in WITHOUT_CARD:
        # what runs in the interpreter stands for a GPU
        gpu_matrices.packs_for = lambda model: True
        cast(Any, bundles).slimmed = lambda *arguments: None
        gpu_steps.count_launches(results)
        for name in gpu_steps.MODELS:
            gpu_steps.predict(results, name)
        if part == "predicted":
            return
    results.measure_copy(device)
    if part == "tiny":
        gpu_kernels.check(results, device, 64, 96, 0)
        _kernels(results, device, ((64, 96),), 128)
        with gpu_step.definitions():  # the kernels take the interpreter a second a step
            gpu_steps.check_steps(results, device)
        gpu_steps.run_ways(results, "tiny", device, tokens=4)
    elif part == "kernels":
        hidden, inner = gpu_kernels.SHAPES[0]
        gpu_kernels.check(results, device, hidden, inner, seconds * 0.5)
        _kernels(results, device, gpu_kernels.SHAPES, 2048)
    elif part == "steps":
        gpu_steps.check_steps(results, device)
    elif part == "7b-overlap":
        gpu_steps.run_overlapping(results, "7b", device)
    else:
        gpu_steps.predict(results, part)
        gpu_steps.run_ways(results, part, device)


def _kernels(results: object, device: torch.device, shapes: Sequence[tuple[int, int]], context: int) -> None:
    from coreskip.bench import gpu_kernels
    from coreskip.bench.gpu_clock import Results

    assert isinstance(results, Results)
    for i, (hidden, inner) in enumerate(shapes):
        if results.left < 8:
            print(f"no time was left for {hidden}x{inner}", flush=True)
            continue
        gpu_kernels.time_mlp(results, device, hidden, inner, torch.bfloat16)
        gpu_kernels.time_groups(results, device, 2 * inner, hidden, (1, 2, 4, 8) if i == 0 else (1, 8))
        if i == 0:
            gpu_kernels.time_groups(results, device, hidden, inner, (1, 8))
            gpu_kernels.time_groups(results, device, hidden, hidden, (1, 8))
            gpu_kernels.time_small(results, device, hidden, inner, context)
            mixture = (128, 8, 2048, 768) if device.type == "cuda" else (8, 2, 64, 32)  # of Qwen3-30B-A3B
            gpu_kernels.time_experts(results, device, *mixture, torch.bfloat16)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command with these arguments, or those of the process.

    Raises:
        CoreskipError, click.ClickException: an argument that makes no sense, or no GPU.
    """
    command.main(list(sys.argv[1:] if arguments is None else arguments), prog_name="coreskip.bench.gpu",
                 standalone_mode=False)  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except (CoreskipError, click.ClickException) as error:
        print(error if isinstance(error, CoreskipError) else error.format_message(), file=sys.stderr)
        sys.exit(2)
