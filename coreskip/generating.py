"""`coreskip generate` and `coreskip chat`: text, printed as it comes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from coreskip.common_options import (
    PATH,
    check_running,
    model_options,
    running_options,
    sampling,
    sampling_options,
    set_threads,
)
from coreskip.predictors.checks import check_encodable
from coreskip.predictors.errors import CoreskipError
from coreskip.predictors.files import read_text

_END = ("/exit", "/quit")


@click.command()
@model_options
@running_options
@click.option("-p", "--prompt", help="The prompt; - reads it from stdin.")
@click.option(
    "--prompt-file",
    type=PATH,
    help="A text file that is the prompt; of .jsonl each line: a string, or an object with a prompt or messages.",
)
@click.option("--chat", is_flag=True, help="Put the prompt through the tokenizer's chat template.")
@sampling_options
@click.option("-n", "--num-samples", type=click.IntRange(1), default=1, help="So many texts: with a --temperature.")
@click.option("--backend", type=click.Choice(["onnxruntime"]), help="Run MODEL, a folder of `export --to onnx`, there.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a result on stdout, with its figures.")
def generate(
    model: str | None,
    prompt: str | None,
    prompt_file: Path | None,
    chat: bool,
    num_samples: int,
    stats: bool,
    as_json: bool,
    backend: str | None,
    dtype: str | None,
    device: str | None,
    threads: int | None,
    **rest: Any,
) -> None:
    """Generate text, printed as it comes.

    Without a plan the dense model runs on the fast path; --plain is plain transformers.
    """
    running, options = _checked(rest, num_samples)
    if (prompt is None) == (prompt_file is None):
        raise CoreskipError("give one of --prompt and --prompt-file: the text to go on from")
    prompts = list(_prompts(prompt, prompt_file, chat))
    if backend is None:
        opened = _engine(model, dtype, device, threads, running)
    else:
        given = {"--dtype": dtype, "--device": device, "--stop": options["stop_strings"], **_named(running)}
        opened = _onnx_engine(model, threads, {**given, "--num-samples": num_samples > 1})
        del options["stop_strings"]
    with opened as engine:
        report = _Report(engine, stats or (sys.stderr.isatty() and not as_json))
        for index, message in enumerate(prompts):
            if index and not as_json:
                click.echo("---")
            report.begin()
            if as_json or num_samples > 1:
                _whole(engine, message, options, report, as_json)
            else:
                for piece in engine.stream(message, **options):
                    _put(piece)
                click.echo()
            report.end()
        if engine.statistics is not None:
            name = "exact" if running["exact"] else "lookup"
            click.echo(f"coreskip: {name}: {engine.statistics}", err=True)


def _checked(rest: dict[str, Any], samples: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    """How the model runs, and the options of generation; before torch is imported."""
    running = {name: rest.pop(name) for name in ("folder", "weights", "exact", "lookup", "memory", "plain")}
    check_running(**running)
    for stop in rest["stop"]:
        check_encodable("a stop string", stop)
        if not stop:
            raise CoreskipError("a stop string is empty")
    return running, sampling(**rest, samples=samples)


def _engine(
    model: str | None, dtype: str | None, device: str | None, threads: int | None, running: dict[str, Any]
) -> Any:
    from coreskip.predictors.plan import Plan
    from coreskip.runtime.engine import Engine
    from coreskip.runtime.load import load, packed_for
    from coreskip.runtime.packed_folder import plan_of

    set_threads(threads)
    folder = running.pop("folder")
    if folder is None and not running["plain"]:
        folder = plan_of(model)
    plan = Plan.load(folder) if folder is not None else None
    packed, memory = packed_for(model, running["weights"]), running.pop("memory")
    loaded, tokenizer = load(model, dtype=dtype, device=device, packed=packed, memory=memory)
    # nobody needs the model afterwards: its originals may go
    keep = None if running["exact"] or running["plain"] else False
    return Engine(loaded, tokenizer, plan, keep_originals=keep, **running)


def _named(running: dict[str, Any]) -> dict[str, Any]:
    """The ways of running by the names of their options."""
    return {f"--{'plan' if name == 'folder' else name}": value for name, value in running.items()}


def _onnx_engine(model: str | None, threads: int | None, others: dict[str, Any]) -> Any:
    """others: options that are coreskip's own, by name, each of which should not be set."""
    given = [name for name, value in others.items() if value]
    if given:
        raise CoreskipError(f"an exported model runs in onnxruntime as it was written: leave out {given[0]}")
    if model is None:
        raise CoreskipError("--backend onnxruntime runs a folder of `coreskip export --to onnx`: name it")
    from coreskip.runtime.onnx_engine import OnnxEngine

    return OnnxEngine(model, threads)


def _prompts(prompt: str | None, file: Path | None, chat: bool) -> Iterator[Any]:
    """Texts, or lists of messages.

    Raises:
        CoreskipError: a file or a line that holds none.
    """
    if prompt == "-" or (prompt is None and file == Path("-")):
        prompt, name = sys.stdin.read(), "stdin"
    elif prompt is not None:
        name = "--prompt"
    else:
        assert file is not None
        content, name = read_text(file, "the prompts"), str(file)
        if file.suffix == ".jsonl":
            yield from _json_lines(content, name, chat)
            return
        prompt = content
    check_encodable(name, prompt)
    prompt = prompt.rstrip("\n") if name != "--prompt" else prompt
    if not prompt:
        raise CoreskipError(f"{name} is empty: give some text")
    yield [{"role": "user", "content": prompt}] if chat else prompt


def _json_lines(content: str, name: str, chat: bool) -> Iterator[Any]:
    lines = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    if not lines:
        raise CoreskipError(f"{name} is empty: give one JSON string or object a line")
    for number, line in lines:
        try:
            found = json.loads(line)
        except ValueError as error:
            raise CoreskipError(f"line {number} of {name} is not JSON: {error}") from None
        messages = found.get("messages") if isinstance(found, dict) else None
        text = found.get("prompt") if isinstance(found, dict) else found
        if isinstance(messages, list) and messages:
            yield messages
        elif isinstance(text, str) and text:
            yield [{"role": "user", "content": text}] if chat else text
        else:
            raise CoreskipError(
                f'line {number} of {name} holds no prompt: write a string, {{"prompt": "..."}} or {{"messages": [...]}}'
            )


def _whole(engine: Any, message: Any, options: dict[str, Any], report: _Report, as_json: bool) -> None:
    """Texts that are not streamed: for programs, or several of one prompt."""
    if options.get("num_return_sequences", 1) > 1:
        texts = engine.generate(message, **options)
    else:
        texts = ["".join(engine.stream(message, **options))]
    for index, text in enumerate(texts):
        if as_json:
            named = {"prompt": message} if isinstance(message, str) else {"messages": message}
            click.echo(json.dumps({**named, "text": text, **report.figures()}, ensure_ascii=False))
        else:
            click.echo(("---\n" if index else "") + text)


def _put(piece: str) -> None:
    click.echo(piece, nl=False)
    sys.stdout.flush()


class _Report:
    """What generations took, for people and programs.

    shown: whether a line goes to stderr after each.
    """

    def __init__(self, engine: Any, shown: bool) -> None:
        self._engine, self._shown = engine, shown

    def begin(self) -> None:
        """A generation is about to start: what was counted before is none of its."""
        usage = self._usage()
        if usage is not None:
            usage.reset()

    def _usage(self) -> Any:
        from coreskip.runtime.wrap import is_wrapped, runtime_of

        model = self._engine.model
        return runtime_of(model).usage if model is not None and is_wrapped(model) else None

    def figures(self) -> dict[str, Any]:
        """Of the generation that ended last; seconds, bytes, and shares from 0 to 1."""
        import torch

        from coreskip.runtime.figures import peak_memory

        found, usage = self._engine.figures, self._usage()
        return {
            **(found.as_dict() if found is not None else {}),
            "neuron_sparsity": 0.0 if usage is None else usage.neuron_sparsity(),
            "peak_memory": peak_memory(getattr(self._engine.model, "device", torch.device("cpu"))),
        }

    def end(self) -> None:
        if not self._shown:
            return
        found = self.figures()
        if "new_tokens" not in found:
            return
        words = [f"{found['new_tokens']} tokens"]
        if found["tokens_per_second"] is not None:
            words[0] += f" at {found['tokens_per_second']:.1f} tok/s"
        if found["first_token_s"] is not None:
            words.append(f"first token after {found['first_token_s']:.2f} s")
        words.append(f"{found['neuron_sparsity']:.1%} of the MLP neurons skipped")
        words.append(f"peak memory {found['peak_memory'] / 1e9:.2f} GB")
        click.echo(f"coreskip: {', '.join(words)}", err=True)


@click.command()
@model_options
@running_options
@click.option("--system", help="What the model is told before the first message.")
@sampling_options
def chat(
    model: str | None,
    system: str | None,
    stats: bool,
    dtype: str | None,
    device: str | None,
    threads: int | None,
    **rest: Any,
) -> None:
    """Talk to MODEL: answers stream, and each turn prefills only what is new.

    /exit or Ctrl-D ends the chat, Ctrl-C an answer. Where stdin is no terminal, each of its lines is a message.
    """
    running, options = _checked(rest)
    if system is not None:
        check_encodable("--system", system)
    from coreskip.runtime.conversation import Conversation

    with _engine(model, dtype, device, threads, running) as engine:
        conversation = Conversation(engine, system=system, **options)
        report = _Report(engine, stats)
        for text in _messages():
            report.begin()
            try:
                for piece in conversation.send(text):
                    _put(piece)
                click.echo()
            except KeyboardInterrupt:
                click.echo()
                continue
            except CoreskipError as error:
                if not sys.stdin.isatty():
                    raise
                click.echo(f"coreskip: {error}", err=True)
                continue
            report.end()


def _messages() -> Iterator[str]:
    """What the user says, up to /exit or the end of stdin."""
    watched = sys.stdin.isatty()
    while True:
        try:
            line = input("> ") if watched else sys.stdin.readline()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo("\n/exit or Ctrl-D ends the chat", err=True)
            continue
        if line.strip() in _END or (not watched and not line):
            return
        if line.strip():
            yield line.strip()
