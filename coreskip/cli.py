"""The command line. Results go to stdout, progress and warnings to stderr; a mistake is one line and exit code 2."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

import click

from coreskip import __version__, streams
from coreskip.explaining import explain
from coreskip.exporting import export
from coreskip.generating import chat, generate
from coreskip.packing import pack
from coreskip.planning import analyze, evaluate, info, show
from coreskip.predictors.errors import CoreskipError
from coreskip.serving import serve


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


for _command in (analyze, pack, export, show, explain, info, generate, chat, evaluate, serve):
    cli.add_command(_command)


class _Bench(click.Group):
    """`coreskip bench` measures a model unless its first word names one of the group's commands."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


@cli.group(cls=_Bench)
def bench() -> None:
    """Measure speed and quality, side by side with other runtimes (see `coreskip bench --help`)."""


@bench.command("run", epilog="Also: `coreskip bench report ROWS`, `bench tables`, `bench kernels`, `bench serve`.")
@click.argument("model", required=False)
@click.option("--plan", "plans", multiple=True, type=click.Path(path_type=Path), help="A plan; may be given again.")
@click.option("--keep", "keeps", multiple=True, type=float, help="Keep this share by core neurons, uncalibrated.")
@click.option("--against", help="hf, hf-compile, onnxruntime, openvino, llama.cpp, or none; by default all.")
@click.option("--dtype", "dtypes", default="float32,bfloat16,int4", show_default=True, help="Of hf and coreskip.")
@click.option("--weights", help="Measure coreskip with weights in this format, too: int4 or int8.")
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
@click.option("--memory", "caps", multiple=True, help="MODEL, a packed folder, within this much memory: 4GB, or 0.5.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the rows to this file.")
@click.pass_context
def bench_run(context: click.Context, /, **options: Any) -> None:
    """Time MODEL in every runner: verified first, in interleaved rounds, with the memory's bandwidth beside it. With
    --memory: ours under caps, beside the same weights mapped, in memory control groups of their own."""
    if caps := options.pop("caps"):
        _bench_memory(context, caps, **options)
        return
    from coreskip.predictors.checks import check_weights
    from coreskip.predictors.files import check_file

    weights = options.pop("weights")
    check_weights(weights)
    if weights is not None and weights not in options["dtypes"].split(","):
        options["dtypes"] += f",{weights}"
    if options["output"] is not None:
        check_file(options["output"])
    from coreskip.bench.settings import settings_of

    _measure(settings_of(**{name: value for name, value in options.items() if name != "output"}), options["output"])


def _bench_memory(
    context: click.Context, caps: tuple[str, ...], model: str | None, plans: tuple[Path, ...], **options: Any
) -> None:
    """`python -m coreskip.bench.memory` has more options: shapes, a checkpoint for accelerate."""
    for option in context.command.params:
        given = context.get_parameter_source(str(option.name)) is click.core.ParameterSource.COMMANDLINE
        if given and option.name in options.keys() - {"tokens", "output"}:
            raise CoreskipError(f"under a cap --plan, --tokens and --json are asked alone: leave out {option.opts[0]}")
    from coreskip.runtime.memory_size import bytes_of, share_of

    for cap in caps:
        if share_of(cap) is None:
            bytes_of(cap)
    if model is None or not (Path(model) / "packed.json").is_file():
        raise CoreskipError("a cap is on a packed model: run `coreskip pack -o FOLDER`, then bench FOLDER --memory 4GB")
    from coreskip.bench.memory import main

    words = [model, "--tokens", str(options["tokens"])]
    words += [word for cap in caps for word in ("--cap", cap)]
    words += [word for plan in plans for word in ("--plan", str(plan))]
    words += [] if options["output"] is None else ["--rows", str(options["output"])]
    main(words)


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


@bench.command("serve", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench_serve(arguments: tuple[str, ...]) -> None:
    """Time servers under concurrent clients (`coreskip bench serve --help`)."""
    from coreskip.bench.serve import main

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
