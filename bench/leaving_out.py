"""Times decoding that leaves neurons out of 4-bit weights, against all of them in the same run.

python -m coreskip.bench.leaving_out [--shape llama-3.2-1b] [--weights int4|bfloat16] [--only NAMES] [--rows FILE]

Without a shape it is the embedded model. Shapes have random weights, and plans here are not calibrated: thresholds are
those of a few tokens that let given shares through, and static sets are drawn. What the shares lose is measured
elsewhere. Whole generations of a prompt are timed in turn, round after round: tokens per second after the first one,
and the seconds from the prompt to the last of 64 tokens, in which a choice by the prompt is settled; how long that
takes alone is a row's settling_ms.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from coreskip.bench.clock import greedy
from coreskip.bench.provenance import provenance, write_rows
from coreskip.bench.workloads import Shape
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.four_bits import Form
from coreskip.predictors.observe import inference
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import CoreNeurons, NeuronPolicy, Static
from coreskip.predictors.token_samples import sample_tokens
from coreskip.runtime.bundles import Weights
from coreskip.runtime.cost import bytes_per_token
from coreskip.runtime.load import load
from coreskip.runtime.step_timing import trial
from coreskip.runtime.wrap import runtime_of, wrapped

_TOKENS = 64
_PROMPT = 128
#: Shares of candidates and of neurons kept: what the embedded model's calibrations chose at 0.82 and 0.76 of the MLPs'
#: bytes, where it lost 0.9 and 2.6 % of perplexity by gates, and 1.7 and 4.7 by planes.
_GATES = {"gates, 0.82 of the bytes": (0.78, 0.59), "gates, 0.76 of the bytes": (0.69, 0.49)}
_ROWS = {"rows, 0.6 kept": 0.6, "rows, half kept": 0.5}
_PLANES = {"planes, 0.82 of the bytes": (0.59, 0.53), "planes, 0.76 of the bytes": (0.43, 0.38)}


def plans_of(model: Any, ids: Tensor, weights: str, only: Sequence[str] = ()) -> Mapping[str, Plan]:
    """What is timed, by its name. only: these, if any are given; "dense" comes along."""
    anatomy = dissect(model)
    dense = Plan.dense(model, weights if weights == "int4" else None)

    def everywhere(policies: list[NeuronPolicy]) -> Plan:
        return replace(dense, layers=tuple(map(LayerPlan, policies)))

    widths = [mlp.intermediate_size for mlp in anatomy.mlps]
    drawn: list[NeuronPolicy] = [Static(torch.randperm(width)[: width // 2].sort().values) for width in widths]
    core: list[NeuronPolicy] = [CoreNeurons(0.4, 0.5, "griffin") for _ in widths]
    found = {"dense": dense, "static 0.5": everywhere(drawn), "core 0.5": everywhere(core)}
    if only and not {*only} <= {*found, *_GATES, *_PLANES, *_ROWS}:
        raise click.BadParameter(f"--only: choose from {', '.join([*found, *_GATES, *_PLANES, *_ROWS])}")
    if weights != "int4" or (only and {*only} <= found.keys()):
        return {name: plan for name, plan in found.items() if not only or name in {"dense", *only}}
    hidden = sample_tokens(model, ids, progress=False).hidden
    forms = {**dict.fromkeys(_GATES, Form.GATES), **dict.fromkeys(_PLANES, Form.PLANES)}
    forms |= dict.fromkeys(_ROWS, Form.ROWS)
    shares = {**_GATES, **_PLANES, **{name: (1.0, kept) for name, kept in _ROWS.items()}}
    for name, form in forms.items():
        if not only or name in only:
            found[name] = trial(dense, anatomy.mlps, hidden, form, shares[name])
    return {name: plan for name, plan in found.items() if not only or name in {"dense", *only}}


def measure(model: Any, ids: Tensor, weights: str, rounds: int, plans: Mapping[str, Plan]) -> list[dict[str, Any]]:
    """One row a plan: medians, and medians of the ratios to dense in the same round. plans: "dense" and others."""
    packed, texts = Weights(dissect(model)), dict[str, Tensor]()
    speed: dict[str, list[float]] = {name: [] for name in plans}
    whole: dict[str, list[float]] = {name: [] for name in plans}
    settling: dict[str, list[float]] = {name: [] for name in plans}
    left: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name, plan in plans.items():
            with wrapped(model, plan, packed), inference(model):
                greedy(model, ids, 8)
                if not runtime_of(model).steps.native.ready:
                    raise click.ClickException(f"{name}: {runtime_of(model).steps.native.refusal}; nothing was timed")
                start = time.perf_counter()
                texts[name], found = greedy(model, ids, _TOKENS)
                taken = time.perf_counter() - start
                left[name] = runtime_of(model).usage.neuron_sparsity()
                settled = _settling(model, ids)
            if turn:  # the first one packs
                settling[name].append(settled)
                speed[name].append(found.tok_s)
                whole[name].append(taken)
    return [
        {
            "kind": "leaving_out",
            "plan": name,
            "weights": weights,
            "tok_s": round(statistics.median(speed[name]), 2),
            "of_dense": round(_ratio(speed[name], speed["dense"]), 3),
            "of_dense_each": [round(a / b, 3) for a, b in zip(speed[name], speed["dense"], strict=True)],
            "of_dense_with_prompt": round(_ratio(whole["dense"], whole[name]), 3),
            "settling_ms": round(1e3 * statistics.median(settling[name]), 2),
            "left_out": round(left[name], 4),
            "same_tokens": same_at_first(texts[name][0], texts["dense"][0]) - ids.shape[1],
            "megabytes": round(bytes_per_token(model, plan) / 1e6, 1),
        }
        for name, plan in plans.items()
    ]


def same_at_first(one: Tensor, other: Tensor) -> int:
    """Of how many tokens two texts are the same up to where they part."""
    return int((one == other).long().cumprod(0).sum())


def _settling(model: Any, ids: Tensor) -> float:
    """Seconds between a prompt and its first step in which what it chose is made ready."""
    runtime = runtime_of(model)
    cache = model(ids, use_cache=True).past_key_values
    native = runtime.steps.native
    start = time.perf_counter()
    program = runtime.program_for(cache)
    assert native.described is not None
    assert not isinstance(program, str)
    native.step_of(native.described, program)
    return time.perf_counter() - start


def _ratio(some: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(some, others, strict=True))


@click.command(help=__doc__)
@click.option("--shape", help="A model of this shape, in place of the embedded one.")
@click.option("--weights", type=click.Choice(["int4", "bfloat16"]), default="int4", show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--only", multiple=True, help="A plan by its name; may be given again. Dense is always timed.")
@click.option("--rows", type=click.Path(path_type=Path), help="Where the rows go; those of others stay.")
def main(shape: str | None, weights: str, rounds: int, only: tuple[str, ...], rows: Path | None) -> None:
    torch.manual_seed(0)
    if shape is None:
        model, _ = load()
        model = model.to(torch.bfloat16) if weights == "bfloat16" else model
    else:
        model = Shape(shape).build(torch.bfloat16, torch.device("cpu"))
    ids = torch.randint(5, 40000, (1, _PROMPT))
    found = measure(model, ids, weights, rounds, plans_of(model, ids, weights, only))
    report(found, str(Shape(shape)) if shape else "embedded", "python -m coreskip.bench.leaving_out", rows)


def report(found: Sequence[dict[str, Any]], name: str, command: str, rows: Path | None) -> None:
    """Prints rows of the model `name`, and puts them into the file `rows` in place of those of the same plans."""
    about = provenance(f"{command} {shlex.join(sys.argv[1:])}")
    for row in found:
        weights = row["weights"]
        figures = f"{row['tok_s']:8.1f} tok/s {row['of_dense']:6.3f} {row['of_dense_with_prompt']:6.3f} with prompt"
        click.echo(f"{name}, {weights}: {row['plan']:26} {figures}, {row['megabytes']} MB, {row['of_dense_each']}")
    if rows is not None:
        before = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
        timed = {(name, row["weights"], row["plan"]) for row in found}
        others = [row for row in before if (row["model"], row["weights"], row["plan"]) not in timed]
        write_rows(rows, [*others, *({"model": name, **row, **about} for row in found)])


if __name__ == "__main__":
    main()
