"""The command line. Results go to stdout, progress and warnings to stderr; a mistake is one line and exit code 2."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from coreskip import __version__, streams
from coreskip.predictors.errors import CoreskipError

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _model_options(command: _Command) -> _Command:
    command = click.option("--dtype", help="float32, bfloat16 or float16; by default the checkpoint's own.")(command)
    command = click.option("--device", help="cpu or cuda; by default cuda where there is one.")(command)
    return click.argument("model", required=False)(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Say more on stderr.")
def cli(verbose: bool) -> None:
    """Sparse inference for any Hugging Face causal LM.

    MODEL is a hub id, a local folder, a .gguf file, or nothing: the embedded SmolLM2-135M-Instruct.
    """
    logger = logging.getLogger("coreskip")
    if not any(isinstance(handler, _OnStderr) for handler in logger.handlers):
        logger.addHandler(_OnStderr())
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        _quiet_libraries()


class _OnStderr(logging.Handler):
    """What is logged, each message as a line on what stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"coreskip: {self.format(record)}", err=True)


def _quiet_libraries() -> None:
    """Their bars and retry messages would drown the one line that a mistake deserves."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


@cli.command()
@_model_options
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write the plan to.")
@click.option(
    "--method",
    default="auto",
    show_default=True,
    help="auto, sketch, threshold, learned, core, similar, static, topk, layers.",
)
@click.option("--keep", type=float, help="Share of neurons (0.6 by default) or layers (0.9) to keep, in (0, 1].")
@click.option("--budget", help="ppl+1%, kl<0.05 or agreement>0.95: the fastest plan found that holds it.")
@click.option("--text", type=click.Path(path_type=Path), help="UTF-8 text to calibrate on; else the model writes some.")
@click.option("--score", help="griffin (default), magnitude, magnitude_down, or signed as CoreInfer published.")
@click.option("--alpha", type=float, show_default="0.4", help="By these: share of a token's neurons in its core.")
@click.option("--first-layer", type=int, show_default="0", help="Layers before it stay dense.")
@click.option("--layers", help="Leave layers out: skip:6, skip-attention:6, skip-mlp:6, every:2 or adaptive:0.8.")
@click.option("--tokens", type=int, default=16384, show_default=True, help="Observe at most this many tokens.")
@click.option("--rule", show_default="teal", help="Of threshold: teal, wina or cats.")
@click.option("--all-linears", is_flag=True, help="Of threshold: the attention's linears, too.")
@click.option("--allocation", show_default="greedy", help="Of sketch, topk: equal, cett, residual, fisher, greedy.")
@click.option("--bits", type=int, show_default="4", help="Of sketch: 4, or 1 for ReLU models.")
@click.option("--refine", is_flag=True, help="Of sketch: exact scores drop some of what it chose; slower, more exact.")
@click.option("--rank", type=int, show_default="64", help="Of learned.")
@click.option("--windows", type=click.IntRange(2), show_default="12", help="Of 512 tokens per measurement.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampling, clustering and training.")
@click.option("--fast", is_flag=True, help="With a budget: fewer candidates and windows, about a third of the time.")
@click.option("--resume", type=click.Path(path_type=Path), help="With a budget: keep measurements in this file.")
def analyze(
    model: str | None,
    output: Path,
    text: Path | None,
    layers: str | None,
    dtype: str | None,
    device: str | None,
    **options: Any,
) -> None:
    """Observe MODEL and write a plan."""
    from coreskip.runtime.options import check_options, given

    options = given(options)
    dense = layers is not None and options["method"] == "auto" and not options.keys() & {"keep", "budget"}
    check_options(dense=dense, **options)
    if layers is not None and options["method"] == "layers":
        raise CoreskipError("--layers says which layers to leave out, --method layers looks for them: give one of them")

    from coreskip.predictors.calibration import read_text, tokenize
    from coreskip.predictors.files import check_file, keep
    from coreskip.predictors.layers import LayerChoice
    from coreskip.predictors.plan_file import check_target
    from coreskip.runtime.load import load
    from coreskip.runtime.tune import analyze

    check_target(output)
    if "resume" in options:
        check_file(options["resume"], regular=True)
    choice = LayerChoice.parse(layers) if layers is not None else None
    content = read_text(text) if text is not None else None
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    tokens = tokenize(tokenizer, content, Path(str(text)).name) if content is not None else None
    if choice is None:
        plan = analyze(loaded, tokenizer, text=tokens, **options)
    else:
        plan = _without_layers(loaded, tokenizer, choice, tokens, options, dense)
    click.echo(str(plan))
    keep(plan.save, output)
    click.echo(f"\nwritten to {output}")


def _without_layers(model: Any, tokenizer: Any, choice: Any, text: Any, options: dict[str, Any], dense: bool) -> Any:
    """A plan that leaves layers out, and neurons too where that was asked for; measured on the text's last part."""
    from dataclasses import replace

    from coreskip.predictors.anatomy import dissect
    from coreskip.predictors.calibration import sample_text
    from coreskip.predictors.layers import leave_out
    from coreskip.predictors.plan import Plan
    from coreskip.runtime.quality import evaluate
    from coreskip.runtime.tune import analyze

    choice.check(len(dissect(model)))
    if text is None:
        text = sample_text(model, tokenizer, tokens=8192, length=512, seed=options["seed"])
    seen, held_out = text.split(0.8, 0.2)
    if dense:
        plan = replace(Plan.dense(model), calibration=seen.fingerprint())
    else:
        plan = analyze(model, tokenizer, text=seen, **options)
    plan = leave_out(plan, model, seen, choice)
    window = min(512, len(held_out.ids) // 2 * 2)
    windows = options.get("windows", 8)
    return replace(plan, quality=evaluate(model, tokenizer, plan, held_out, windows=windows, window=window))


@cli.command()
@click.argument("plan", type=click.Path(path_type=Path))
def show(plan: Path) -> None:
    """Print a plan: where it comes from, what it costs, what each layer keeps."""
    from coreskip.predictors.plan import Plan

    click.echo(str(Plan.load(plan)))


@cli.command()
@_model_options
@click.option("--plan", "folder", type=click.Path(path_type=Path), help="Decode under this plan; dense without.")
@click.option("--exact", is_flag=True, help="The dense model's own text: the plan and the text only draft tokens.")
@click.option("-p", "--prompt", required=True, help="The prompt.")
@click.option("--chat", is_flag=True, help="Put the prompt through the tokenizer's chat template.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--temperature", type=float, help="Sample at this temperature; else greedy.")
@click.option("--seed", type=int, help="Of sampling: with a --temperature.")
@click.option("--stop", multiple=True, help="End before this string; may be given several times.")
def generate(
    model: str | None,
    folder: Path | None,
    exact: bool,
    prompt: str,
    chat: bool,
    max_new_tokens: int,
    temperature: float | None,
    seed: int | None,
    stop: tuple[str, ...],
    dtype: str | None,
    device: str | None,
) -> None:
    """Generate text, printed as it comes."""
    from coreskip.predictors.checks import check_above_zero, check_encodable, check_seed

    check_encodable("--prompt", prompt)
    if not prompt:
        raise CoreskipError("--prompt is empty: give some text")
    if temperature is not None:
        check_above_zero("--temperature", temperature)
    if seed is not None:
        check_seed(seed)
        if temperature is None:
            raise CoreskipError("--seed is of sampling: add a --temperature, or leave it out")

    from coreskip.predictors.plan import Plan
    from coreskip.runtime.engine import Engine
    from coreskip.runtime.load import load

    plan = Plan.load(folder) if folder is not None else None
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature is not None}
    if temperature is not None:
        options |= {"temperature": temperature, "seed": seed}
    # nobody needs the model afterwards: its originals may go
    with Engine(loaded, tokenizer, plan, exact=exact, keep_originals=None if exact else False) as engine:
        message: Any = [{"role": "user", "content": prompt}] if chat else prompt
        for piece in engine.stream(message, stop_strings=list(stop), **options):
            click.echo(piece, nl=False)
            sys.stdout.flush()
        statistics = engine.statistics
    click.echo()
    if statistics is not None:
        click.echo(f"coreskip: exact: {statistics}", err=True)


@cli.command("eval")
@_model_options
@click.option("--plan", "folder", required=True, type=click.Path(path_type=Path), help="The plan to measure.")
@click.option("--text", type=click.Path(path_type=Path), help="UTF-8 text to score; else the model writes some.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the figures to this file.")
@click.option("--windows", type=click.IntRange(1), default=24, show_default=True, help="Score at most this many.")
@click.option("--window", type=click.IntRange(4), default=512, show_default=True, help="Tokens each; half is scored.")
@click.option("--token-by-token", is_flag=True, help="Passes of one token instead of eight: the same figures.")
@click.option(
    "--ppl-sparsity", type=float, help="Also the oracle's sparsity at this many % of perplexity: 1 for PPL-1%."
)
def evaluate(
    model: str | None,
    folder: Path,
    text: Path | None,
    output: Path | None,
    windows: int,
    window: int,
    token_by_token: bool,
    ppl_sparsity: float | None,
    dtype: str | None,
    device: str | None,
) -> None:
    """Measure what a plan costs: perplexity, KL divergence, agreement with the dense model."""
    from coreskip.predictors.calibration import read_text, sample_text, tokenize
    from coreskip.predictors.checks import check_above_zero
    from coreskip.predictors.files import STDOUT, check_file, keep, write_text
    from coreskip.predictors.plan import Plan
    from coreskip.runtime.load import load
    from coreskip.runtime.quality import evaluate, summary
    from coreskip.runtime.sparsing_law import ppl_sparsity as law

    if ppl_sparsity is not None:
        check_above_zero("--ppl-sparsity", ppl_sparsity)
    if output is not None:
        check_file(output)
    plan = Plan.load(folder)
    content = read_text(text) if text is not None else None
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    plan.check(loaded)
    if content is not None:
        scored = tokenize(tokenizer, content, Path(str(text)).name)
    else:
        # another seed than analyze's default: the plan must not be scored on the text that made it
        scored = sample_text(loaded, tokenizer, tokens=8 * window, length=window, seed=1)
    quality = evaluate(loaded, tokenizer, plan, scored, windows=windows, window=window, token_by_token=token_by_token)
    beside = output == STDOUT  # the figures alone go there
    click.echo(summary(quality), err=beside)
    if ppl_sparsity is not None:
        found = law(loaded, tokenizer, scored, percent=ppl_sparsity, windows=windows, window=window)
        quality["ppl_sparsity"] = found
        name = f"PPL-{ppl_sparsity:g}% sparsity"
        click.echo(f"{name:22}{found['sparsity']:.1%} at CETT {found['cett']:.3f}, by oracle", err=beside)
    if output is not None:
        keep(lambda path: write_text(path, json.dumps(quality, indent=1) + "\n"), output)


class _Bench(click.Group):
    """`coreskip bench` measures a model unless its first word names one of the group's commands."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


@cli.group(cls=_Bench)
def bench() -> None:
    """Measure speed and quality, side by side with other runtimes (see `coreskip bench --help`)."""


@bench.command("run", epilog="Also: `coreskip bench report ROWS`, `bench tables`, `bench kernels`.")
@click.argument("model", required=False)
@click.option("--plan", "plans", multiple=True, type=click.Path(path_type=Path), help="A plan; may be given again.")
@click.option("--keep", "keeps", multiple=True, type=float, help="Keep this share by core neurons, uncalibrated.")
@click.option("--against", help="hf, hf-compile, onnxruntime, openvino, llama.cpp, or none; by default all.")
@click.option("--dtype", "dtypes", default="float32,bfloat16,int4", show_default=True, help="Of hf and coreskip.")
@click.option("--device", help="cpu or cuda; by default cuda where there is one.")
@click.option("--threads", type=click.IntRange(1), help="Of every runner; by default as many as there are.")
@click.option("--tokens", type=click.IntRange(16), default=64, show_default=True, help="Generated each time.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="How often each prompt is timed.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Measure less, to end within this time.")
@click.option("--workload", "workloads", multiple=True, help="prose, qa, code, summary or chat; by default all.")
@click.option("--prompts", "prompt_file", type=click.Path(path_type=Path), help="Prompts, separated by lines of ---.")
@click.option("--shape", help="Random weights of a real shape instead of a model: llama-3.2-1b, opt-1.3b, ...")
@click.option("--layers", type=click.IntRange(1), help="Of the shape, only so many layers.")
@click.option("--sparsity", type=float, help="Natural sparsity of a ReLU shape; 0.9 by default.")
@click.option("--gguf", type=click.Path(path_type=Path), help="The model as GGUF, for llama.cpp, openvino.")
@click.option("--text", type=click.Path(path_type=Path), help="UTF-8 text to score; else Python's documentation.")
@click.option("--windows", type=click.IntRange(0), default=4, show_default=True, help="Of 512 tokens to score.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the rows to this file.")
def bench_run(**options: Any) -> None:
    """Time MODEL in every runner: verified first, in interleaved rounds, with the memory's bandwidth beside it."""
    from coreskip.bench.settings import settings_of
    from coreskip.predictors.files import check_file

    if options["output"] is not None:
        check_file(options["output"])
    _measure(settings_of(**{name: value for name, value in options.items() if name != "output"}), options["output"])


def _measure(settings: Any, output: Path | None) -> None:
    from coreskip.bench import row_schema, tables, throughput
    from coreskip.predictors.files import STDOUT, keep

    outcome = throughput.run(settings)
    beside = output == STDOUT  # the rows alone go there
    if outcome.rows:
        click.echo(tables.terminal_table(outcome.rows), err=beside)
        click.echo("\n" + "\n".join(tables.origins(outcome.rows)), err=beside)
    for name, reason in outcome.left_out.items():
        click.echo(f"{name}: {reason}", err=beside)
    if output is not None and outcome.rows:
        keep(lambda path: row_schema.write(path, outcome.rows), output)
    if outcome.interrupted:
        raise KeyboardInterrupt
    if not outcome.rows:
        raise CoreskipError("nothing was measured")


@bench.command("report")
@click.argument("rows", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", default="report.html", show_default=True, type=click.Path(path_type=Path))
def bench_report(rows: tuple[Path, ...], output: Path) -> None:
    """Draw the rows of these files on one self-contained HTML page."""
    from coreskip.bench.report import page
    from coreskip.bench.row_schema import read
    from coreskip.predictors.files import STDOUT, check_file, write_text

    check_file(output)
    write_text(output, page(read(rows)))
    click.echo(f"written to {output}", err=output == STDOUT)


@bench.command("tables")
@click.argument("document", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
def bench_tables(document: Path, folder: Path) -> None:
    """Make the tables marked in DOCUMENT anew from the rows in FOLDER."""
    from coreskip.bench.tables import fill_tables
    from coreskip.predictors.files import check_file, read_text, write_text

    check_file(document)
    write_text(document, fill_tables(read_text(document, "the document"), folder))


@bench.command("kernels", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench_kernels(arguments: tuple[str, ...]) -> None:
    """Time the kernels by themselves (`coreskip bench kernels --help`)."""
    from coreskip.bench.kernels import main

    main(list(arguments))


def main(arguments: list[str] | None = None) -> None:
    """The `coreskip` command."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        streams.prepare()
        status = cli.main(words or ["--help"], prog_name="coreskip", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        _fail(error.format_message())
    except CoreskipError as error:
        _fail(str(error))
    except (KeyboardInterrupt, click.Abort):
        click.echo("coreskip: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:  # as in `| head`: whoever read has read enough
        streams.let_go()
        sys.exit(streams.BROKEN_PIPE)
    except OSError as error:
        if not streams.is_of_stdout(error):
            raise
        streams.let_go()
        _fail(f"cannot write to stdout: {error.strerror}")
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be as full as stdout; the exit code still tells
        click.echo("coreskip: " + " ".join(message.split()), err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
