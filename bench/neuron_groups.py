"""Times MLPs in 4-bit groups of which neurons are left out, against the same MLPs computed whole from their tiles.

python -m coreskip.bench.neuron_groups [--rows FILE]

A decoder of MLPs alone, so many that their weights do not fit in the last cache, is one native step, as decoding runs
it. All ways of one shape run in turn, round after round. Each is verified before it is timed: what it computes is
compared with the numbers of the tiles in torch. Weights are random: shares of neurons are what is timed, not what they
cost.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from coreskip.bench.kernels import SHAPES, cache_bytes
from coreskip.bench.provenance import provenance, write_rows
from coreskip.kernels import cpu
from coreskip.kernels.groups import tile_up, ungroup, untile
from coreskip.kernels.memory import Reused, allocate
from coreskip.kernels.neuron_groups import Form, PackedNeurons
from coreskip.kernels.packed import PackedLinear
from coreskip.kernels.sparse import RowLists, SlimMLP, SparseMLP
from coreskip.kernels.step import DenseMLP, KeyValues, Norm, Step, StepLayer, StepModel
from coreskip.predictors.four_bits import rounded

_HEAD = 16  # values of the hidden state that come out as logits: enough to verify
_LAYERS = 4  # of different weights; the others are copies, or making them takes minutes
_LARGE = 32 << 20  # weights of a matrix from which on one of them is enough: every way has copies of its own
_TOKEN = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Layer:
    """One MLP in tiles, and the float32 numbers they stand for."""

    tiles: tuple[PackedLinear, PackedLinear, PackedLinear]
    numbers: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def random(cls, hidden: int, neurons: int) -> Layer:
        shapes = (neurons, hidden), (neurons, hidden), (hidden, neurons)
        tiles = [PackedLinear.pack(torch.randn(shape) / shape[1] ** 0.5, fmt="int4") for shape in shapes]
        numbers = [ungroup(*untile(tile)).flatten(1)[:, : tile.in_features] for tile in tiles]
        return cls((tiles[0], tiles[1], tiles[2]), (numbers[0], numbers[1], numbers[2]))

    def activations(self, x: Tensor) -> Tensor:
        gate, up, _ = self.numbers
        x = rounded(x)
        return F.silu(x @ gate.t()) * (x @ up.t())


Way = Callable[[Layer, Tensor, Tensor], "tuple[DenseMLP | SparseMLP, Tensor]"]


def _dense(layer: Layer, x: Tensor, a: Tensor) -> tuple[DenseMLP | SparseMLP, Tensor]:
    return DenseMLP(*layer.tiles), torch.ones_like(a)


def _listed(keep: float, prefix: bool) -> Way:
    def way(layer: Layer, x: Tensor, a: Tensor) -> tuple[DenseMLP | SparseMLP, Tensor]:
        packed, chosen = PackedNeurons.pack(*layer.tiles, act="silu"), _chosen(a.shape[1], keep, prefix)
        return SparseMLP(packed, lists=RowLists.shared(chosen)), torch.zeros_like(a).index_fill_(1, chosen, 1.0)

    return way


def _alone(keep: float, prefix: bool, down: str | None = None, exactly: bool = False) -> Way:
    """In matrices of their own. down: in this format. exactly: in the very numbers, as a prompt's neurons are taken
    (`settling`)."""

    def way(layer: Layer, x: Tensor, a: Tensor) -> tuple[DenseMLP | SparseMLP, Tensor]:
        chosen = _chosen(a.shape[1], keep, prefix)
        slim = SlimMLP.of_tiles(*layer.tiles, chosen, act="silu", exactly=exactly)
        if down is not None:
            tiles = tile_up(layer.numbers[2][:, chosen], down)
            slim = replace(slim, down=replace(slim.down, weight=tiles))
        return DenseMLP(slim.gate, slim.up, slim.down), torch.zeros_like(a).index_fill_(1, chosen, 1.0)

    return way


def _chosen(neurons: int, keep: float, prefix: bool) -> Tensor:
    order = torch.arange(neurons) if prefix else torch.randperm(neurons)
    return order[: max(1, round(keep * neurons))].sort().values


def settling(layers: list[Layer], keep: float, rounds: int) -> float:
    """Seconds in which drawn neurons of a layer are taken into matrices of their own, as the median of `rounds`."""
    memory, seconds = Reused(), list[float]()
    memory.most = sum(tile.nbytes for layer in layers for tile in layer.tiles)
    for _ in range(rounds + 1):
        lists = [_chosen(layer.tiles[0].out_features, keep, False) for layer in layers]
        start = time.perf_counter()
        made = [
            SlimMLP.of_tiles(*layer.tiles, chosen, act="silu", exactly=True, memory=memory)
            for layer, chosen in zip(layers, lists, strict=True)
        ]
        seconds.append((time.perf_counter() - start) / len(layers))
        del made  # its memory is what the next round gets
    return statistics.median(seconds[1:])


def _scanned(form: Form, keep: float, candidates: float) -> Way:
    def way(layer: Layer, x: Tensor, a: Tensor) -> tuple[DenseMLP | SparseMLP, Tensor]:
        packed = PackedNeurons.pack(*layer.tiles, act="silu", form=form)
        assert packed.norm is not None
        score, some = a.abs() * packed.norm, 0.0
        least = float(score.quantile(1 - keep))
        if form == "gates":  # thresholds that let these shares through, of scores that are independent here
            reach = packed.norm
            gates = F.silu(rounded(x) @ layer.numbers[0].t()).abs() * reach
            some = float(gates.quantile(1 - candidates))
            left = score[gates >= some]
            least = float(left.quantile(1 - keep / candidates))
            kept = (gates >= some) & (score >= least)
            return SparseMLP(packed.scored(None, reach), "exact", threshold=some, refine=least), kept.float()
        if form == "planes":  # estimates lie about exact scores: a share of the one is a share of the other
            some = float(score.quantile(1 - candidates))
        return SparseMLP(packed, "exact", threshold=some, refine=least), (score >= least).float()

    return way


def ways(keeps: tuple[float, ...], scanned: bool) -> dict[str, Way]:
    """What is timed, by its name. scanned: also what tokens choose."""
    found: dict[str, Way] = {"dense": _dense, "all listed": _listed(1.0, True)}
    for keep in keeps:
        found[f"prefix {keep:g}"] = _listed(keep, True)
        found[f"list {keep:g}"] = _listed(keep, False)
        found[f"prefix {keep:g}, matrices of their own"] = _alone(keep, True)
        found[f"list {keep:g}, matrices of their own"] = _alone(keep, False)
        found[f"list {keep:g}, the same with down as it was"] = _alone(keep, False, exactly=True)
        found[f"list {keep:g}, the same with down in 5 bits"] = _alone(keep, False, "int5")
    for keep in (0.6, 0.1) if scanned else ():
        found[f"rows, {keep:g} kept"] = _scanned("rows", keep, 1.0)
    for form in ("gates", "planes") if scanned else ():
        for candidates, keep in ((0.7, 0.6), (0.6, 0.45), (0.15, 0.1)):
            found[f"{form}, {candidates:g} looked at, {keep:g} kept"] = _scanned(form, keep, candidates)
    return found


class Decoder:
    """A native step of MLPs alone."""

    def __init__(self, way: Way, layers: list[Layer], count: int, x: Tensor) -> None:
        torch.manual_seed(1)
        hidden = x.shape[1]
        norm = Norm(torch.ones(hidden), None, 1e-6, "rms")
        made, stack, self.expected = {}, [], x
        for index in range(count):
            layer = layers[index % len(layers)]
            normed = F.rms_norm(self.expected, (hidden,), eps=1e-6)
            a = layer.activations(normed)
            if index < len(layers):
                made[index] = way(layer, normed, a)
            mlp, kept = made[index % len(layers)]
            # every layer has memory of its own, or the cache would serve it
            stack.append(StepLayer(None, _copied(mlp) if index >= len(layers) else mlp, "silu", mlp_in=norm,
                                   residual_scale=1e-3))  # fmt: skip
            if index < len(layers):
                self.expected = self.expected + 1e-3 * rounded(a * kept) @ layer.numbers[2].t()
        head = PackedLinear.pack(torch.eye(_HEAD, hidden))
        stacks = stack, stack[: len(layers)]
        self.step, self.few = (Step(StepModel(x, some, norm, head, torch.float32)) for some in stacks)
        self.neurons = layers[0].tiles[0].out_features * count

    def verify(self) -> None:
        """Raises RuntimeError where the first layers compute something else than torch does with the same numbers."""
        hidden = self.expected.shape[1]
        found = self.few.run(*_TOKEN, KeyValues([], [], []), 0, 1)[0][0]
        expected = F.rms_norm(self.expected, (hidden,), eps=1e-6)[:, :_HEAD]
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error < 2e-3:  # a neuron whose score is that of the threshold may go either way
            raise RuntimeError(f"off by {error:.1e} of the largest output; nothing was timed")

    def run(self) -> float:
        """The share of neurons left out."""
        return self.step.run(*_TOKEN, KeyValues([], [], []), 0, 1)[1] / self.neurons


def _copied(mlp: DenseMLP | SparseMLP) -> DenseMLP | SparseMLP:
    return replace(mlp, **{name: _own(part) for name, part in vars(mlp).items()})


def _own(value: Any) -> Any:
    """The same in memory of its own."""
    if isinstance(value, Tensor) and value.nbytes > 1 << 16:
        return allocate(tuple(value.shape), value.dtype, value.device).copy_(value)
    if isinstance(value, (PackedLinear, PackedNeurons)):
        return replace(value, **{name: _own(part) for name, part in vars(value).items()})
    return value


def measure(
    shape: str, keeps: tuple[float, ...], rounds: int, memory: float, scanned: bool = True
) -> list[dict[str, Any]]:
    """One row a way: microseconds a layer, and as a share of the dense one's in the same rounds; and one for how long
    neurons are taken into matrices of their own."""
    torch.manual_seed(0)
    hidden, neurons = (int(n) for n in shape.split("x"))
    layers = [Layer.random(hidden, neurons) for _ in range(_LAYERS if hidden * neurons < _LARGE else 1)]
    dense_bytes = sum(tile.nbytes for tile in layers[0].tiles)
    count = max(2 * len(layers), -(-int(memory) // dense_bytes))
    x = torch.randn(1, hidden)
    decoders = {}
    for name, way in tqdm(ways(keeps, scanned).items(), desc=f"packing {shape}", leave=False):
        decoders[name] = Decoder(way, layers, count, x)
        decoders[name].verify()
    times: dict[str, list[float]] = {name: [] for name in decoders}
    left: dict[str, float] = {}
    for _ in tqdm(range(rounds + 1), desc=shape, leave=False):
        for name, decoder in decoders.items():
            start = time.perf_counter()
            left[name] = decoder.run()
            times[name].append((time.perf_counter() - start) / count)
    for keep in keeps:
        name = f"taking {keep:g} of them"
        times[name], left[name] = [settling(layers, keep, 5)] * (rounds + 1), 1 - keep
    rows = []
    for name, seconds in times.items():
        ratios = [one / other for one, other in zip(seconds[1:], times["dense"][1:], strict=True)]
        rows.append(
            {
                "kind": "neuron_groups",
                "model": "MLPs alone",
                "shape": shape,
                "way": name,
                "us_per_layer": round(1e6 * statistics.median(seconds[1:]), 1),
                "of_dense": round(statistics.median(ratios), 3),
                "left_out": round(left[name], 4),
                "dense_bytes": dense_bytes,
                "layers": count,
                "isa": cpu.active(),
            }
        )
    return rows


@click.command(help=__doc__)
@click.option("--shapes", default=",".join(SHAPES), show_default=True)
@click.option("--listed", is_flag=True, help="Only what does not depend on tokens.")
@click.option("--rounds", default=21, show_default=True)
@click.option("--memory", default=0, help="Megabytes of weights at least; 0: one and a half times the last cache.")
@click.option("--rows", type=click.Path(path_type=Path), help="Where the rows go; those of others stay.")
def main(shapes: str, listed: bool, rounds: int, memory: int, rows: Path | None) -> None:
    found = []
    for shape in shapes.split(","):
        made = measure(shape, (0.5, 0.1), rounds, memory * 1e6 or 1.5 * min(cache_bytes(), 64 << 20), not listed)
        for row in made:
            click.echo(f"{shape} {row['way']:20} {row['us_per_layer']:8.1f} us {row['of_dense']:6.3f} "
                       f"left out {row['left_out']:.3f}")  # fmt: skip
        found += [row | provenance("python -m coreskip.bench.neuron_groups " + " ".join(sys.argv[1:])) for row in made]
    if rows is not None:
        before = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
        timed = {(row["shape"], row["way"]) for row in found}
        write_rows(rows, [*(row for row in before if (row["shape"], row["way"]) not in timed), *found])


if __name__ == "__main__":
    main()
