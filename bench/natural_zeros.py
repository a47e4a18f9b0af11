"""Times decoding of ReLU shapes in 4-bit weights that leaves out what is zero, against all neurons in the same run.

python -m coreskip.bench.natural_zeros --shape opt-1.3b [--layers N] [--sparsity 0.9] [--rows FILE]

Weights are random and biases give the zeros, so that nothing can be learned about which neurons fire: what is told of
them comes from their own numbers. Ways: rows, gate and up are read whole, down rows of what is not zero; gates, gates
whole, up and down rows of those that are open; planes, three bits of gate and up, then the last bits of what those do
not see as zero, and its down rows. And a tenth known beforehand, in matrices of their own: the limit of every way.
recall: of neurons that are not zero, the share that is computed, over a sample of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from coreskip.bench.leaving_out import measure, report
from coreskip.bench.workloads import NATURAL_SPARSITY, SHAPES, Shape, has_relu
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.four_bits import FourBitMLP, product
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import NeuronPolicy, Sketch, Static, TopK
from coreskip.predictors.token_samples import sample_tokens

_LEAST = 1e-30  # a score below this is a zero
_SAMPLE = 64  # tokens
_PROMPT = 128


def plans_of(model: Any, ids: Tensor, known: float) -> tuple[Mapping[str, Plan], dict[str, float]]:
    """What is timed, by name, and the share of active neurons that each way computes. known: the share of neurons that
    is known beforehand."""
    anatomy, dense = dissect(model), Plan.dense(model, "int4")
    hidden = sample_tokens(model, ids, progress=False).hidden
    policies: dict[str, list[NeuronPolicy]] = {"rows": [], "planes": []}
    hits: dict[str, list[float]] = {"planes": []}
    if anatomy.mlps[0].gated:
        policies["gates"] = []
    for mlp, x in zip(anatomy.mlps, hidden, strict=True):
        numbers, x = FourBitMLP.of(mlp), x[:_SAMPLE]
        parts = numbers.parts(x, numbers.whole)
        active, open_, seen = product(parts) != 0, parts[0] != 0, numbers.estimates(x) != 0
        ones = torch.ones(active.shape[1], dtype=torch.float32, device="cpu")
        kept, opened, candidates = (float(found.float().mean()) for found in (active, open_, seen))
        policies["rows"].append(TopK(keep=kept, threshold=_LEAST, norm=ones))
        found = seen & active
        hits["planes"].append(float(found.sum() / active.sum()))
        policies["planes"].append(
            Sketch(bits=3, keep=float(found.float().mean()), threshold=_LEAST, candidates=candidates, refine=_LEAST,
                   norm=ones)
        )  # fmt: skip
        if "gates" in policies:
            policies["gates"].append(
                TopK(keep=kept, threshold=_LEAST, norm=ones, gate=_LEAST, reach=ones, candidates=opened)
            )
    widths = [mlp.intermediate_size for mlp in anatomy.mlps]
    policies[f"{known:.0%} known beforehand"] = [
        Static(torch.randperm(width)[: round(known * width)].sort().values) for width in widths
    ]
    plans = {name: replace(dense, layers=tuple(map(LayerPlan, found))) for name, found in policies.items()}
    recall = {name: sum(found) / len(found) for name, found in hits.items()}
    return {"dense": dense, **plans}, {"dense": 1.0, "rows": 1.0, "gates": 1.0, **recall}


@click.command(help=__doc__)
@click.option("--shape", default="opt-1.3b", show_default=True)
@click.option("--layers", type=int, help="Fewer layers than the shape has.")
@click.option("--sparsity", default=NATURAL_SPARSITY, show_default=True, help="Share of neurons that are zero.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--rows", type=click.Path(path_type=Path), help="Where the rows go; those of others stay.")
def main(shape: str, layers: int | None, sparsity: float, rounds: int, rows: Path | None) -> None:
    if not has_relu(shape):
        raise click.BadParameter(f"--shape: choose from {', '.join(name for name in SHAPES if has_relu(name))}")
    torch.manual_seed(0)
    one = Shape(shape, layers, sparsity)
    model = one.build(torch.bfloat16, torch.device("cpu"))
    ids = torch.randint(5, one.vocabulary, (1, _PROMPT))
    plans, recall = plans_of(model, ids, 1 - sparsity)
    found = measure(model, ids, "int4", rounds, plans)
    report(
        [row | {"kind": "natural_zeros", "recall": recall.get(row["plan"])} for row in found],
        str(one), "python -m coreskip.bench.natural_zeros", rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
