"""Options that commands have in common, each written once; and what is checked of them before torch is imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from coreskip.predictors.checks import WEIGHT_FORMATS, check_above_zero, check_seed, check_temperature
from coreskip.predictors.errors import CoreskipError
from coreskip.runtime.memory_size import bytes_of

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

PATH = click.Path(path_type=Path)


def together(*decorators: Decorator) -> Decorator:
    """One decorator of several, which `--help` lists in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def weights_option(meaning: str) -> Decorator:
    return click.option("--weights", type=click.Choice(WEIGHT_FORMATS), help=meaning)


threads_option = click.option("--threads", type=click.IntRange(1), help="Threads to compute with; by default all.")
memory_option = click.option(
    "--memory", help="Of a packed MODEL: take at most 4GB, 512MiB or 60% of what is free; the rest stays on the disk."
)
lookup_option = click.option(
    "--lookup", is_flag=True, help="Draft tokens from the text itself; the same text, sooner where it repeats itself."
)
plan_option = click.option("--plan", "folder", type=PATH, help="Decode under this plan; dense without.")
text_option = click.option("--text", type=PATH, help="UTF-8 text; else the model writes some.")

model_options: Decorator = together(
    click.argument("model", required=False),
    click.option("--device", help="cpu or cuda; by default cuda where there is one."),
    click.option("--dtype", help="float32, bfloat16 or float16; by default the checkpoint's own."),
    threads_option,
)

#: Of `generate` and `chat`: how the model runs.
running_options: Decorator = together(
    plan_option,
    weights_option("Decode with weights in 4 or 8 bits, on top of the plan or of the dense model."),
    click.option("--exact", is_flag=True, help="The dense model's own text: the plan and the text only draft tokens."),
    lookup_option,
    memory_option,
    click.option("--plain", is_flag=True, help="Plain transformers, nothing of coreskip's."),
)

#: Of `generate` and `chat`: what is generated.
sampling_options: Decorator = together(
    click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True),
    click.option("--temperature", type=float, help="Sample at this temperature; 0, or none, is greedy."),
    click.option("--top-p", type=float, help="Sample from the likeliest tokens of this share: with a --temperature."),
    click.option("--top-k", type=click.IntRange(1), help="Sample from so many tokens: with a --temperature."),
    click.option("--seed", type=int, help="Of sampling: with a --temperature."),
    click.option("--stop", multiple=True, help="End before this string; may be given several times."),
    click.option("--stats", is_flag=True, help="Print speed, share of neurons skipped and memory on stderr."),
)


def set_threads(threads: int | None) -> None:
    """Compute with so many threads, the native code's included; None leaves it to torch."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def check_memory(memory: str | None, weights: str | None) -> None:
    """Raise `CoreskipError` where `--memory` makes no sense."""
    if memory is None:
        return
    bytes_of(memory)
    if weights is not None:
        raise CoreskipError(
            f"--memory runs a model in the format it was packed in: leave out --weights, or pack it in {weights}"
        )


def check_running(
    *, folder: Path | None, weights: str | None, exact: bool, lookup: bool, memory: str | None, plain: bool
) -> None:
    """Raise `CoreskipError` where the ways of running contradict each other."""
    check_memory(memory, weights)
    given = [("--plan", folder), ("--weights", weights), ("--exact", exact), ("--lookup", lookup)]
    given.append(("--memory", memory))
    names = [name for name, value in given if value]
    if plain and names:
        raise CoreskipError(f"--plain is plain transformers: leave out {names[0]}")


def sampling(
    *,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    stop: tuple[str, ...],
    samples: int = 1,
) -> dict[str, Any]:
    """The options of generation for ``Engine.generate``.

    Raises:
        CoreskipError: a value that makes no sense, or an option of sampling where nothing is sampled.
    """
    sampled = temperature is not None and temperature != 0
    if temperature is not None and sampled:
        check_temperature("--temperature", temperature)
    if seed is not None:
        check_seed(seed)
    if top_p is not None:
        check_above_zero("--top-p", top_p)
        if top_p > 1:
            raise CoreskipError(f"--top-p is {top_p}; it must be at most 1")
    of_sampling = {
        "--seed": seed,
        "--top-p": top_p,
        "--top-k": top_k,
        "--num-samples": samples if samples > 1 else None,
    }
    for name, value in of_sampling.items():
        if value is not None and not sampled:
            raise CoreskipError(f"{name} is of sampling: add a --temperature above 0, or leave it out")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": sampled, "stop_strings": list(stop)}
    if sampled:
        options |= {"temperature": temperature, "seed": seed}
        options |= {name: value for name, value in (("top_p", top_p), ("top_k", top_k)) if value is not None}
    if samples > 1:
        options["num_return_sequences"] = samples
    return options
