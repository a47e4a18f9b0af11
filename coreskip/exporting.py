"""`coreskip export`: a model under a plan, for tools that know nothing of plans."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from coreskip.common_options import PATH, model_options, set_threads
from coreskip.predictors.errors import CoreskipError
from coreskip.runtime.export_formats import WEIGHTS, check_format

_FORMS = "; ".join(f"{to}: {', '.join(weights)}" for to, weights in WEIGHTS.items())


@click.command()
@model_options
@click.option("--plan", "folder", type=PATH, help="What to leave out; dense without.")
@click.option("--to", required=True, help="hf (AutoModelForCausalLM), onnx (onnxruntime-genai) or gguf (llama.cpp).")
@click.option("-o", "--output", required=True, type=PATH, help="Folder to write; it must not exist.")
@click.option("--weights", help=f"Form of the weights: {_FORMS}.")
def export(
    model: str | None,
    folder: Path | None,
    to: str,
    output: Path,
    weights: str | None,
    dtype: str | None,
    device: str | None,
    threads: int | None,
) -> None:
    """Write what remains of MODEL under a plan, for other tools: kept neurons alone, skipped layers gone.

    Plans travel that fix everything beforehand: dense, static neurons, kept experts, skipped layers.
    """
    check_format(to, weights)
    if device not in (None, "cpu"):
        raise CoreskipError("models are exported on the CPU: leave out --device")
    from coreskip.predictors.plan import Plan
    from coreskip.runtime.export import check_target, export
    from coreskip.runtime.load import load

    check_target(output)
    plan = Plan.load(folder) if folder is not None else None
    set_threads(threads)
    loaded, tokenizer = load(model, dtype=dtype, device="cpu", packed=False)
    command = shlex.join(["coreskip", *sys.argv[1:]])
    export(loaded, tokenizer, output, plan=plan, to=to, weights=weights, command=command)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    click.echo(f"written to {output}, {size / 1e6:.1f} MB")
