"""Times mixtures of experts: transformers in two dtypes, and native steps in three formats, side by side.

python -m coreskip.bench.experts [--shape olmoe-1b-7b|qwen3-30b-a3b] [--layers N] [--rounds N] [--rows FILE]

The models have random weights: which experts a token gets is drawn by a random router, and speed means something,
quality nothing. Layers are capped so that the float32 model, the bfloat16 one and what is packed of it fit into memory
at once. transformers runs in whichever of its implementations of experts is fastest here, tried before. Whole
generations are timed in turn, round after round, with the memory's bandwidth between them; `experts_megabytes` are
those of a token's own experts, and the shares of bandwidth are by them and by all weights that a token reads.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from coreskip.bench.clock import greedy
from coreskip.bench.machine import Machine
from coreskip.bench.provenance import provenance, write_rows
from coreskip.bench.workloads import Shape, threads_available
from coreskip.kernels.experts import PackedExperts
from coreskip.kernels.step import DenseMLP
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.observe import inference
from coreskip.predictors.plan import Plan
from coreskip.runtime.bundles import Weights
from coreskip.runtime.native import NativeSteps
from coreskip.runtime.wrap import runtime_of, wrapped

_PROMPT, _TOKENS, _TRIAL = 32, 32, 6
_DEFAULT_LAYERS = {"olmoe-1b-7b": 4, "qwen3-30b-a3b": 3}
_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
_FORMATS = {"bfloat16": None, "int8": "int8", "int4": "int4"}


class Contender:
    """One way to run: what generates, its bytes a token, and its speeds by round."""

    def __init__(self, name: str, run: Callable[[int], float], experts: float, every: float) -> None:
        self.name, self.run, self.experts, self.every = name, run, experts, every
        self.speeds: list[float] = []


def transformers_runner(model: Any, ids: Tensor, dtype: str) -> Contender:
    """The model's own forward, in its fastest implementation of experts."""

    def tok_s(implementation: str, tokens: int) -> float:
        model.set_experts_implementation(implementation)
        with inference(model):
            return greedy(model, ids, tokens)[1].tok_s

    tried = {name: max(tok_s(name, _TRIAL) for _ in range(2)) for name in _IMPLEMENTATIONS}
    best = max(tried, key=lambda name: tried[name])
    every, of_experts = _loaded_bytes(model)
    return Contender(f"transformers {dtype}, {best}", lambda tokens: tok_s(best, tokens), of_experts, every)


def native_runner(model: Any, ids: Tensor, name: str, weights: Weights) -> Contender:
    """Native steps in one format, whose matrices `weights` keeps from round to round."""
    plan = Plan.dense(model, _FORMATS[name])

    def tok_s(tokens: int) -> float:
        with wrapped(model, plan, weights), inference(model):
            greedy(model, ids, 4)  # described, packed where it was not, and compared
            native = runtime_of(model).steps.native
            if not native.ready:
                raise click.ClickException(f"{name}: {native.refusal}; nothing was timed")
            found[:] = _packed_bytes(native)
            return greedy(model, ids, tokens)[1].tok_s

    found: list[float] = []
    tok_s(_TRIAL)
    return Contender(f"coreskip {name}", tok_s, found[0], found[1])


def _loaded_bytes(model: Any) -> tuple[float, float]:
    """Of all weights that a token reads, and of its own experts: as they were loaded."""
    anatomy = dissect(model)
    stored = active = 0.0
    for experts in anatomy.experts:
        if experts is not None and experts.router is not None:
            nbytes = sum(p.nbytes for p in experts.module.parameters(recurse=False))
            stored += nbytes
            active += nbytes * experts.router.choice.top_k / experts.count
    table = model.get_input_embeddings().weight
    tied = table is model.get_output_embeddings().weight
    every = sum(p.nbytes for p in model.parameters()) - (0 if tied else table.nbytes)
    return every - stored + active, active


def _packed_bytes(native: NativeSteps) -> tuple[float, float]:
    """Of a token's own experts, and of all weights that it reads: as steps read them."""
    assert native.described is not None
    base = native.described.model.base
    every, active = float(base.head.nbytes), 0.0
    for layer in base.layers:
        attention, mlp = layer.attention, layer.mlp
        parts: list[Any] = [] if attention is None else list(attention.linears)
        every += sum(part.nbytes for part in parts)
        if isinstance(mlp, PackedExperts):
            active += mlp.routed_bytes
            every += mlp.active_bytes
        elif isinstance(mlp, DenseMLP):
            every += mlp.nbytes
    return active, every


def measure(shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """One row a contender: medians, and medians of the ratios to the better of transformers in the same round."""
    threads = threads_available()
    machine = Machine("cpu", threads)
    whole = shape.build(torch.float32, torch.device("cpu"))
    half = shape.build(torch.bfloat16, torch.device("cpu"))
    ids = torch.randint(5, shape.vocabulary, (1, _PROMPT), generator=torch.Generator().manual_seed(0))
    packed = Weights(dissect(half))
    contenders = [transformers_runner(whole, ids, "float32"), transformers_runner(half, ids, "bfloat16")]
    contenders += [native_runner(half, ids, name, packed) for name in _FORMATS]
    bandwidth = [machine.read_gb_s()]
    for turn in range(rounds):
        for contender in contenders:
            contender.speeds.append(contender.run(_TOKENS))
        bandwidth.append(machine.read_gb_s())
        click.echo(f"round {turn + 1} of {rounds}", err=True)
    best = [max(pair) for pair in zip(*(c.speeds for c in contenders[:2]), strict=True)]
    return [_row(contender, best, statistics.median(bandwidth)) for contender in contenders]


def _row(contender: Contender, best: list[float], bandwidth: float) -> dict[str, Any]:
    speed = statistics.median(contender.speeds)
    ratios = [some / other for some, other in zip(contender.speeds, best, strict=True)]
    return {
        "kind": "experts",
        "way": contender.name,
        "tok_s": round(speed, 2),
        "of_transformers": round(statistics.median(ratios), 2),
        "of_transformers_each": [round(ratio, 2) for ratio in ratios],
        "experts_megabytes": round(contender.experts / 1e6, 1),
        "megabytes": round(contender.every / 1e6, 1),
        "gb_s": round(contender.every * speed / 1e9, 2),
        "machine_gb_s": round(bandwidth, 2),
        "bandwidth_share": round(contender.every * speed / 1e9 / bandwidth, 3),
        "bandwidth_share_of_experts": round(contender.experts * speed / 1e9 / bandwidth, 3),
    }


@click.command(help=__doc__)
@click.option("--shape", type=click.Choice(sorted(_DEFAULT_LAYERS)), default="olmoe-1b-7b", show_default=True)
@click.option("--layers", type=int, help="Decoder layers; 4 and 3 of these shapes take some 15 GB.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--rows", type=click.Path(path_type=Path), help="Where the rows go; those of other shapes stay.")
def main(shape: str, layers: int | None, rounds: int, rows: Path | None) -> None:
    capped = Shape(shape, layers or _DEFAULT_LAYERS[shape])
    found = measure(capped, rounds)
    about = provenance("python -m coreskip.bench.experts " + " ".join(sys.argv[1:]))
    for row in found:
        click.echo(
            f"{row['way']:36} {row['tok_s']:8.2f} tok/s {row['of_transformers']:6.2f} x, {row['megabytes']:7.1f} MB "
            f"({row['experts_megabytes']:.1f} of experts), {row['bandwidth_share']:.2f} of {row['machine_gb_s']} GB/s"
        )
    if rows is not None:
        before = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
        others = [row for row in before if row["model"] != str(capped)]
        write_rows(rows, [*others, *({"model": str(capped), **row, **about} for row in found)])


if __name__ == "__main__":
    main()
