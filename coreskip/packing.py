"""`coreskip pack`: a model as a folder from which it starts in a moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coreskip.common_options import PATH, model_options, set_threads
from coreskip.predictors.checks import PACKINGS


@click.command()
@model_options
@click.option("-o", "--output", required=True, type=PATH, help="Folder to write the packed model to.")
@click.option(
    "--plan", "folder", type=PATH, help="Goes with it, and is used where no other is named; may say how to round."
)
@click.option(
    "--weights",
    type=click.Choice(PACKINGS),
    help="Of the matrices: int4 or int8 in groups, bfloat16, or as-loaded (their very numbers, in groups where these "
    "hold them); by default the plan's, else as-loaded.",
)
@click.option("--text", type=PATH, help="UTF-8 text that calibrates rounding to 4 bits; without, it is plain.")
@click.option(
    "--share", type=float, help="With a text: 5 or 8 bits where 4 cost most, up to this share of the bytes in 8 bits."
)
def pack(
    model: str | None,
    output: Path,
    folder: Path | None,
    text: Path | None,
    dtype: str | None,
    device: str | None,
    threads: int | None,
    **options: Any,
) -> None:
    """Write MODEL with its matrices packed as decode steps read them: it is mapped, not read, at every start."""
    from coreskip.predictors.calibration import read_text, tokenize
    from coreskip.predictors.plan import Plan
    from coreskip.runtime.load import load, packed_for
    from coreskip.runtime.pack import check_mixed, check_target, check_weights, pack
    from coreskip.runtime.packed_folder import describe, table

    check_weights(options["weights"], text is not None)
    check_mixed(options["share"], text is not None)
    check_target(output)
    content = read_text(text) if text is not None else None
    plan = Plan.load(folder) if folder is not None else None
    set_threads(threads)
    rounds = text is not None or (plan is not None and plan.rounding is not None)
    planned = None if plan is None or rounds else plan.weights
    wanted = options["weights"] or planned or ("int4" if rounds else None)
    loaded, tokenizer = load(model, dtype=dtype, device=device or "cpu", packed=packed_for(model, wanted))
    tokens = tokenize(tokenizer, content, Path(str(text)).name) if content is not None else None
    pack(loaded, tokenizer, output, plan=plan, text=tokens, **options)
    click.echo(table(describe(output)))
    click.echo(f"\nwritten to {output}")
