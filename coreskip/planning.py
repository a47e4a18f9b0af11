"""`coreskip analyze`, `show`, `eval` and `info`: plans made, read and measured, and what a model allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from coreskip.common_options import (
    PATH,
    check_memory,
    lookup_option,
    memory_option,
    model_options,
    plan_option,
    set_threads,
    text_option,
    together,
    weights_option,
)
from coreskip.predictors.checks import check_above_zero, check_count
from coreskip.predictors.errors import CoreskipError
from coreskip.predictors.files import STDOUT, check_file, keep, write_text

#: Of the methods, one option for each field of their dataclasses (runtime/options.py).
method_options = together(
    click.option(
        "--score",
        help="griffin, signed, magnitude, magnitude_down, static: taylor, ...; experts: reap, frequency, random.",
    ),
    click.option("--beta", type=float, help="Of skip-experts, in place of --keep: of a token's largest weight."),
    click.option("--alpha", type=float, show_default="0.4", help="By these: share of a token's neurons in its core."),
    click.option("--rule", show_default="teal", help="Of threshold: teal, wina or cats."),
    click.option("--all-linears", is_flag=True, help="Of threshold: the attention's linears, too."),
    click.option("--allocation", show_default="greedy", help="Of sketch, topk: equal, cett, residual, fisher, greedy."),
    click.option("--bits", type=int, help="Of sketch: 3 in int4 and else 4 by default, or 1 for ReLU models."),
    click.option("--refine", is_flag=True, help="Of sketch: exact scores drop some of what it chose."),
    click.option("--bricks", type=int, show_default="64", help="Of bricks: how many a layer's neurons are in."),
    click.option("--cluster", show_default="coactivation", help="Of bricks: coactivation, snmf, or weights."),
    click.option("--router", show_default="linear", help="Of bricks: linear, or centroids."),
    click.option("--rank", type=int, show_default="64", help="Of learned; at most the model's hidden size."),
)


@click.command()
@model_options
@click.option("-o", "--output", required=True, type=PATH, help="Folder to write the plan to.")
@click.option(
    "--method",
    default="auto",
    show_default=True,
    help="auto, sketch, threshold, learned, bricks, core, similar, static, topk, layers; of mixtures experts, "
    "skip-experts, core-experts (of the prompt: for a cap), thin-experts (neurons inside; no faster).",
)
@click.option(
    "--keep",
    type=float,
    help="Share to keep: of neurons (0.6 by default), layers (0.9), experts or their neurons (0.75).",
)
@click.option("--budget", help="ppl+1%, kl<0.05 or agreement>0.95: the fastest plan found that holds it.")
@click.option("--layers", help="Leave layers out: skip:6, skip-attention:6, skip-mlp:6, every:2 or adaptive:0.8.")
@weights_option("Decode with weights in 4 or 8 bits; a search for a budget tries them, and mixtures, by itself.")
@memory_option
@lookup_option
@text_option
@click.option("--keep-for", multiple=True, type=PATH, help="In place of --text, what the plan is for; several times.")
@click.option("--drop-for", multiple=True, type=PATH, help="What it may lose: measured beside; several times.")
@method_options
@click.option("--first-layer", type=int, show_default="0", help="Layers before it stay dense.")
@click.option("--tokens", type=int, default=16384, show_default=True, help="Observe at most this many tokens.")
@click.option("--windows", type=click.IntRange(2), show_default="12", help="Of 512 tokens per measurement.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampling, clustering and training.")
@click.option("--fast", is_flag=True, help="With a budget: fewer candidates and windows, about a third of the time.")
@click.option("--resume", type=PATH, help="With a budget: keep measurements in this file.")
def analyze(
    model: str | None,
    output: Path,
    text: Path | None,
    keep_for: tuple[Path, ...],
    drop_for: tuple[Path, ...],
    lookup: bool,
    dtype: str | None,
    device: str | None,
    threads: int | None,
    **options: Any,
) -> None:
    """Observe MODEL and write a plan."""
    from coreskip.runtime.options import check_options, given

    options = given(options)
    check_memory(options.get("memory"), options.get("weights"))
    check_options(**options)
    if output == STDOUT:
        raise CoreskipError("a plan is a folder, which stdout cannot hold: give a name such as my.plan")
    if "resume" in options:
        check_file(options["resume"], regular=True)

    from coreskip.predictors.calibration import read_text, tokenize
    from coreskip.predictors.plan import FOLDER
    from coreskip.runtime.analyze import analyze
    from coreskip.runtime.load import load, packed_for

    FOLDER.check_target(output)
    if drop_for and not keep_for:
        raise CoreskipError("--drop-for names what a plan may lose; say what it is for, too: --keep-for FILE")
    if keep_for and text is not None:
        raise CoreskipError("give --text or --keep-for, not both: --keep-for is the text that the plan is made from")
    content = read_text(text) if text is not None else None
    purpose = {path: read_text(path) for path in (*keep_for, *drop_for)}
    set_threads(threads)
    packed = packed_for(model, options.get("weights"))
    loaded, tokenizer = load(model, dtype=dtype, device=device, packed=packed, memory=options.get("memory"))
    tokens = tokenize(tokenizer, content, Path(str(text)).name) if content is not None else None
    for name, paths in (("keep_for", keep_for), ("drop_for", drop_for)):
        if paths:
            options[name] = [tokenize(tokenizer, purpose[path], path.name) for path in paths]
    plan = analyze(loaded, tokenizer, text=tokens, **options)
    click.echo(str(plan))
    keep(plan.save, output)
    click.echo(f"\nwritten to {output}")
    if plan.rounding is not None:
        name = "" if model is None else f"{model} "
        click.echo(
            f"its weights are rounded with the text: `coreskip pack {name}--plan {output} -o FOLDER` makes the model"
        )
    if lookup:
        click.echo("lookup drafts while text is generated: give --lookup to `coreskip generate`, too", err=True)


@click.command()
@click.argument("plan", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object, tensors left out.")
def show(plan: Path, as_json: bool) -> None:
    """Print a plan: where it comes from, what it costs, what each layer keeps; and a packed model's formats."""
    if (plan / "packed.json").is_file():
        _show_packed(plan, as_json)
        return
    if (plan.is_file() and plan.suffix.lower() == ".gguf") or (plan / "config.json").is_file():
        raise CoreskipError(
            f"{plan} is a model, and neither a plan nor a packed one: `coreskip info {plan}` tells of it"
        )
    if any((plan / f"{word}.json").is_file() for word in ("scores", "set")):
        raise CoreskipError(f"{plan} holds scores, or a set of neurons: `coreskip explain {plan}` tells of them")
    from coreskip.predictors.drawing import plan_document, plan_table
    from coreskip.predictors.plan import Plan

    loaded = Plan.load(plan)
    click.echo(json.dumps(plan_document(loaded), indent=1) if as_json else plan_table(loaded))


def _show_packed(folder: Path, as_json: bool) -> None:
    from coreskip.predictors.drawing import plan_document, plan_table
    from coreskip.predictors.plan import Plan
    from coreskip.runtime.packed_folder import describe, plan_of, table

    found, place = describe(folder), plan_of(folder)
    plan = None if place is None else Plan.load(place)
    if as_json:
        click.echo(json.dumps({**found, "plan": None if plan is None else plan_document(plan)}, indent=1))
        return
    click.echo(table(found))
    if plan is not None:
        click.echo("\n" + plan_table(plan))


@click.command()
@model_options
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def info(model: str | None, as_json: bool, dtype: str | None, device: str | None, threads: int | None) -> None:
    """Tell how MODEL's decode steps run here, in which weight formats, and how fast they would be."""
    from coreskip.runtime.info import describe, table
    from coreskip.runtime.load import load

    set_threads(threads)
    loaded, _ = load(model, dtype=dtype, device=device)
    found = describe(loaded)
    click.echo(json.dumps(found, indent=1) if as_json else table(found))


@click.command("eval")
@model_options
@plan_option
@weights_option("Score with weights in 4 or 8 bits, on top of the plan or of the dense model.")
@memory_option
@lookup_option
@text_option
@click.option("--json", "output", type=PATH, help="Also write the figures to this file.")
@click.option("--windows", type=click.IntRange(1), default=24, show_default=True, help="Score at most this many.")
@click.option("--window", type=click.IntRange(4), default=512, show_default=True, help="Tokens each; half is scored.")
@click.option("--token-by-token", is_flag=True, help="Passes of one token instead of eight: the same figures.")
@click.option(
    "--ppl-sparsity", type=float, help="Also the oracle's sparsity at this many % of perplexity: 1 for PPL-1%."
)
def evaluate(
    model: str | None,
    folder: Path | None,
    weights: str | None,
    memory: str | None,
    lookup: bool,
    text: Path | None,
    output: Path | None,
    windows: int,
    window: int,
    token_by_token: bool,
    ppl_sparsity: float | None,
    dtype: str | None,
    device: str | None,
    threads: int | None,
) -> None:
    """Measure what a plan costs: perplexity, KL divergence, agreement with the dense model.

    Without a plan the dense model on the fast path is measured, in --weights of fewer bits where they are given.
    """
    if ppl_sparsity is not None:
        check_above_zero("--ppl-sparsity", ppl_sparsity)
    check_count("windows", windows)
    check_memory(memory, weights)
    if window % 2:
        raise CoreskipError(f"window is {window}; it must be even: the first half is the prompt, the second is scored")
    if lookup:
        raise CoreskipError("--lookup drafts while text is generated, and here text is scored: leave it out")
    if output is not None:
        check_file(output)

    from coreskip.predictors.calibration import read_text, tokenize
    from coreskip.predictors.plan import Plan
    from coreskip.runtime.calibration_text import model_text
    from coreskip.runtime.load import load, packed_for
    from coreskip.runtime.quality import evaluate, summary
    from coreskip.runtime.sparsing_law import ppl_sparsity as law

    plan = Plan.load(folder) if folder is not None else None
    content = read_text(text) if text is not None else None
    set_threads(threads)
    loaded, tokenizer = load(model, dtype=dtype, device=device, packed=packed_for(model, weights), memory=memory)
    if plan is not None:
        plan.check(loaded)
    if content is not None:
        scored = tokenize(tokenizer, content, Path(str(text)).name)
    else:
        # another seed than analyze's default: the plan must not be scored on the text that made it
        scored = model_text(loaded, tokenizer, tokens=8 * window, length=window, seed=1)
    quality = evaluate(
        loaded, tokenizer, plan, scored,
        weights=weights, windows=windows, window=window, token_by_token=token_by_token,
    )  # fmt: skip
    beside = output == STDOUT  # the figures alone go there
    click.echo(summary(quality), err=beside)
    if ppl_sparsity is not None:
        found = law(loaded, tokenizer, scored, percent=ppl_sparsity, windows=windows, window=window)
        quality["ppl_sparsity"] = found
        name = f"PPL-{ppl_sparsity:g}% sparsity"
        click.echo(f"{name:22}{found['sparsity']:.1%} at CETT {found['cett']:.3f}, by oracle", err=beside)
    if output is not None:
        keep(lambda path: write_text(path, json.dumps(quality, indent=1) + "\n"), output)
