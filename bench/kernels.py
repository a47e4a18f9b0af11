"""Times the kernels against plain torch and against the memory itself.

Every timing is one pass over so many layers that the weights it reads do not fit in the last-level cache. The
variants of one shape run in turn, round after round, and the bandwidth of the memory is measured in the same
rounds: a busy machine slows all of them alike.
"""

from __future__ import annotations

import itertools
import json
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from coreskip.bench.provenance import commit, device_name
from coreskip.kernels import cpu
from coreskip.kernels.memory import allocate
from coreskip.kernels.ops import MAX_ROWS, PackedMLP, available, mlp, sketch_mlp
from coreskip.kernels.packed import PackedLinear
from coreskip.kernels.sparse import SparseMLP
from coreskip.kernels.step import DenseMLP, KeyValues, Norm, Step, StepLayer, StepModel
from coreskip.predictors.checks import check_count, check_share
from coreskip.predictors.errors import CoreskipError
from coreskip.predictors.files import check_file

SHAPES = ("576x1536", "2048x8192", "4096x11008")
FORMATS = ("float32", "bfloat16", "int8", "int8_sliced")
KEEPS = (1.0, 0.5, 0.1)

Row = dict[str, Any]


@dataclass
class Case:
    """One thing to time: `run` makes one pass and reads `nbytes` of weights.

    call: "op" is the public function; "bound" the compiled one with its arguments in place: the weights push Python
    out of the caches, and 10 to 30 us a call go by in it; "step" all layers in one native call, as decoding runs them
    (a dense layer from its three matrices, listed neurons from bundles of their own, side by side).
    """

    op: str
    backend: str
    call: str
    keep: float
    layers: int
    nbytes: int
    run: Callable[[], Any]


def measure(shape: str, fmt: str, keeps: tuple[float, ...] = KEEPS, *, rows: int = 1, rounds: int = 15) -> list[Row]:
    """Times one MLP shape ("hidden x intermediate") in one format: torch dense, then the kernels at every `keep`.

    fmt: a dtype's name, or "int8" or "int8_sliced" (against torch in bfloat16; sliced neurons are chosen by sketch).
    Raises RuntimeError where a kernel's result is wrong, before anything is timed.
    """
    hidden, neurons = (int(n) for n in shape.split("x"))
    cases = list(_mlp_cases(hidden, neurons, fmt, keeps, rows))
    times = _interleave(cases, rounds)
    bandwidth = cases[0].nbytes / _quantile(times[0], 0.5) / 1e9
    about = {"shape": shape, "fmt": fmt, "rows": rows, **machine()}
    return [_row(case, seconds, bandwidth) | about for case, seconds in zip(cases, times, strict=True)]


def _row(case: Case, seconds: list[float], bandwidth: float) -> Row:
    p20, p50, p80 = (_quantile(seconds, q) for q in (0.2, 0.5, 0.8))
    speed = case.nbytes / p50 / 1e9
    return {
        "op": case.op,
        "backend": case.backend,
        "call": case.call,
        "keep": case.keep,
        "layers": case.layers,
        "us_per_layer_p20": round(p20 / case.layers * 1e6, 1),
        "us_per_layer_p50": round(p50 / case.layers * 1e6, 1),
        "us_per_layer_p80": round(p80 / case.layers * 1e6, 1),
        "gb_per_s": round(speed, 2),
        "bandwidth_gb_per_s": round(bandwidth, 2),
        "share_of_bandwidth": round(speed / bandwidth, 3),
    }


def _interleave(cases: list[Case], rounds: int) -> list[list[float]]:
    """The seconds that each case took in each round; one round more runs first and is dropped."""
    times: list[list[float]] = [[] for _ in cases]
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for case, seconds in zip(cases, times, strict=True):
                start = time.perf_counter()
                case.run()
                seconds.append(time.perf_counter() - start)
    return [seconds[1:] for seconds in times]


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[round(q * (len(values) - 1))]


# ---- what is timed ----


def _read_case(memory: list[Tensor]) -> Case:
    """The layers' own memory read from front to back by the compiled library: the ceiling.

    A buffer of its own read at 33 GB/s in one process and at 56 in the next, while the layers' times did not change.
    """
    return Case("read", "cpu", "op", 1.0, 1, sum(m.nbytes for m in memory), lambda: [cpu.read(m) for m in memory])


def _mlp_cases(hidden: int, neurons: int, fmt: str, keeps: tuple[float, ...], rows: int) -> Iterator[Case]:
    quantized = fmt.startswith("int8")
    dtype = torch.bfloat16 if quantized else getattr(torch, fmt)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(rows, hidden, generator=rng).to(dtype)
    weights = [torch.randn(neurons, hidden, generator=rng).div(hidden**0.5).to(dtype) for _ in range(3)]
    packed = PackedMLP.pack(*weights, act="silu", fmt=fmt if quantized else None)
    layers = {keep: max(2, -(-4 * cache_bytes() // _bytes_read(packed, keep))) for keep in (1.0, *keeps)}
    copies, memory = _copies(packed, max(layers.values()))
    yield _read_case(memory)
    yield _torch_case(x, weights, layers[1.0])
    for keep in keeps:
        if packed.low is None:
            lists = [_kept(neurons, keep, rng) for _ in range(layers[keep])]
            run: _Listed | _Sketched = _Listed(x, copies, lists)
        else:
            run = _Sketched(x, copies[: layers[keep]], int(neurons * keep))
        verify(run.first("cpu"), run.first("torch"), x.dtype)
        op = "mlp" if packed.low is None else "sketch_mlp"
        nbytes = _bytes_read(packed, keep) * layers[keep]
        yield Case(op, "cpu", "op", keep, layers[keep], nbytes, run)
        yield Case(op, "cpu", "bound", keep, layers[keep], nbytes, _Bound(run.bound()))
        if rows == 1:
            yield Case(
                op, "cpu", "step", keep, layers[keep], nbytes, _decoder(x, weights, copies[: layers[keep]], keep)
            )


def _copies(packed: PackedMLP, count: int) -> tuple[list[PackedMLP], list[Tensor]]:
    """Layers with weights and scales of their own, and the memory in which the weights lie side by side."""
    planes = [packed.weight] if packed.low is None else [packed.weight, packed.low]
    memory = [allocate((count, *plane.shape), plane.dtype, plane.device).copy_(plane) for plane in planes]
    copies = [
        replace(packed, weight=memory[0][i], scale=_own(packed.scale), norm=_own(packed.norm)) for i in range(count)
    ]
    if packed.low is not None:
        copies = [replace(copy, low=low) for copy, low in zip(copies, memory[1], strict=True)]
    return copies, memory


def _own(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.clone()


def _bytes_read(packed: PackedMLP, keep: float) -> int:
    """Of one layer: the bundles of the kept neurons and, in a sketch, the whole high plane."""
    if packed.low is None:
        return int(packed.weight.nbytes * keep)
    return packed.weight.nbytes + int(packed.low.nbytes * keep)


@dataclass
class _Listed:
    """One pass over many layers, each with its own list of neurons."""

    x: Tensor
    packed: list[PackedMLP]
    lists: list[Tensor | None]

    def __call__(self) -> None:
        for packed, indices in zip(self.packed, self.lists, strict=False):
            mlp(self.x, packed, indices, backend="cpu")

    def bound(self) -> list[Callable[[], Tensor]]:
        pairs = zip(self.packed, self.lists, strict=False)
        return [cpu.bind(self.x, packed, indices, "listed", -1, 0.0) for packed, indices in pairs]

    def first(self, backend: str) -> Tensor:
        x = self.x if backend == "cpu" else self.x.float()
        return mlp(x, self.packed[0], self.lists[0], backend=backend)


@dataclass
class _Sketched:
    """The same where every layer chooses its neurons itself."""

    x: Tensor
    packed: list[PackedMLP]
    keep: int

    def __call__(self) -> None:
        for packed in self.packed:
            sketch_mlp(self.x, packed, keep=self.keep, backend="cpu")

    def bound(self) -> list[Callable[[], Tensor]]:
        return [cpu.bind(self.x, packed, None, "sketch", self.keep, 0.0) for packed in self.packed]

    def first(self, backend: str) -> Tensor:
        x = self.x if backend == "cpu" else self.x.float()
        return sketch_mlp(x, self.packed[0], keep=self.keep, backend=backend)


@dataclass
class _Bound:
    """Calls that need nothing but to be made."""

    calls: list[Callable[[], Tensor]]

    def __call__(self) -> None:
        for call in self.calls:
            call()


@dataclass
class _Decoder:
    """One native step of a decoder that consists of MLPs alone."""

    step: Step

    def __call__(self) -> Tensor:
        return self.step.run(*_ONE_TOKEN, KeyValues([], [], []), 0, 1)[0]


_HEAD = 16  # of the hidden state's values come out as logits: enough to verify, few enough not to be timed
_ONE_TOKEN = (
    torch.zeros(1, 1, dtype=torch.int64),
    torch.zeros(1, 1, dtype=torch.int64),
    torch.zeros(1, dtype=torch.int64),
)


def _decoder(x: Tensor, weights: list[Tensor], layers: list[PackedMLP], keep: float) -> _Decoder:
    """A decoder of which `x` [1, hidden] is the only embedding. Raises RuntimeError where its result is wrong."""
    first, count, hidden = layers[0], len(layers), x.shape[1]
    kept, sketched = int(first.intermediate_size * keep), layers[0].low is not None
    if keep < 1 and not sketched:
        layers = [layer.take(torch.arange(kept)) for layer in layers]
    mlps: list[SparseMLP | DenseMLP] = []
    for layer in layers:
        if sketched:
            mlps.append(SparseMLP(layer, "sketch", kept))
        else:
            mlps.append(SparseMLP(layer) if keep < 1 else _dense(weights, first.fmt))
    norm = Norm(torch.ones(hidden), None, 1e-6, "rms")
    stack = [StepLayer(None, one, "silu", residual_scale=1 / count) for one in mlps]
    head = PackedLinear.pack(torch.eye(_HEAD, hidden, dtype=x.dtype))
    decoder = _Decoder(Step(StepModel(x, stack, norm, head, x.dtype)))
    expected = x.float()
    for one in layers:
        y = sketch_mlp(expected, one, keep=kept, backend="torch") if sketched else mlp(expected, one, backend="torch")
        expected = expected + y / count
    verify(decoder()[0], F.rms_norm(expected, (hidden,), eps=1e-6)[:, :_HEAD], x.dtype)
    return decoder


def _dense(weights: list[Tensor], fmt: str | None) -> DenseMLP:
    gate, up, down = weights[0], weights[1], weights[2].t()
    packed = [PackedLinear.pack(w.clone(memory_format=torch.contiguous_format), fmt=fmt) for w in (gate, up, down)]
    return DenseMLP(packed[0], packed[1], packed[2])


def _torch_case(x: Tensor, weights: list[Tensor], layers: int) -> Case:
    """What a Hugging Face MLP does, on three weights of its own per layer."""
    own = [(gate.clone(), up.clone(), down.t().clone()) for gate, up, down in [weights] * layers]

    def run() -> None:
        for gate, up, down in own:
            F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    return Case("mlp", "torch", "op", 1.0, layers, sum(w.nbytes for w in weights) * layers, run)


def _kept(neurons: int, keep: float, rng: torch.Generator) -> Tensor | None:
    """A random ascending list of neurons, or None for all of them."""
    return None if keep == 1 else torch.randperm(neurons, generator=rng)[: int(neurons * keep)].sort().values


def verify(result: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compares a kernel with the torch definition in float32. Raises RuntimeError where they differ."""
    error = float((result.float() - expected).abs().max() / expected.abs().max())
    limit = 1e-5 if dtype is torch.float32 else 2e-2
    if not error <= limit:
        raise RuntimeError(f"the kernel's result is off by {error:.1e} of the largest output; nothing was timed")


# ---- where it ran ----


def cache_bytes() -> int:
    """The size of the last-level cache; 32 MiB where the system does not tell."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes), default=32 << 20)


def machine() -> Row:
    """What a row needs to be compared with another: device, threads, versions, commit."""
    return {
        "device": device_name("cpu"),
        "isa": cpu.active(),
        "threads": torch.get_num_threads(),
        "coreskip": version("coreskip"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


# ---- command line ----


@click.command("kernels", help=__doc__)
@click.option("--shapes", default=",".join(SHAPES), show_default=True, help="Hidden x intermediate sizes.")
@click.option(
    "--formats", default=",".join(FORMATS), show_default=True, help="float32, bfloat16, float16, int8, int8_sliced."
)
@click.option("--keeps", default=",".join(map(str, KEEPS)), show_default=True, help="Shares of the neurons to compute.")
@click.option("--rows", type=click.IntRange(1, MAX_ROWS), default=1, show_default=True, help="Rows of x.")
@click.option("--rounds", type=int, default=15, show_default=True, help="Timed passes of every case.")
@click.option("--json", "output", help="Append the rows to this file; - and nothing: stdout.")
def command(shapes: str, formats: str, keeps: str, rows: int, rounds: int, output: str | None) -> None:
    reason = available("cpu")
    if reason:
        raise CoreskipError(reason)
    asked = _shares(keeps), _sizes(shapes), _formats(formats)
    check_count("--rounds", rounds)
    if output:
        check_file(Path(output))
    made_by = shlex.join(["coreskip", "bench", "kernels", *click.get_current_context().obj])
    # never closed where it is stdout, which others may still write to
    with open(output, "a") if output not in (None, "-") else nullcontext(sys.stdout) as out:
        for shape, fmt in itertools.product(asked[1], asked[2]):
            for row in measure(shape, fmt, asked[0], rows=rows, rounds=rounds):
                print(json.dumps(row | {"command": made_by}), file=out, flush=True)
                print(_summary(row), file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command with these arguments, or those of the process: prints one JSON row per measurement to stdout, or
    appends them to a file.

    Raises:
        CoreskipError, click.ClickException: an argument that makes no sense, before anything is timed.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    command.main(words, prog_name="coreskip bench kernels", standalone_mode=False, obj=words)


def _shares(text: str) -> tuple[float, ...]:
    keeps = []
    for keep in text.split(","):
        try:
            keeps.append(float(keep))
        except ValueError:
            raise CoreskipError(f"--keeps holds {keep!r}: give shares, such as 1.0,0.5") from None
        check_share("keep", keeps[-1])
    return tuple(keeps)


def _sizes(text: str) -> list[str]:
    for shape in text.split(","):
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
            raise CoreskipError(f"--shapes holds {shape!r}: give hidden x intermediate sizes, such as 576x1536")
    return text.split(",")


def _formats(text: str) -> list[str]:
    known = (*FORMATS, "float16")
    unknown = [name for name in text.split(",") if name not in known]
    if unknown:
        raise CoreskipError(f"unknown format {unknown[0]!r}; choose from {', '.join(known)}")
    return text.split(",")


def _summary(row: Row) -> str:
    what = f"{row['shape']:>11} {row['fmt']:11} {row['op']:10} {row['backend']:6} {row['call']:6} keep {row['keep']:<5}"
    speed = f"{row['gb_per_s']:6.1f} GB/s, {row['share_of_bandwidth']:.2f} of the memory's"
    return f"{what}{row['us_per_layer_p50']:>10} us  {speed}"


if __name__ == "__main__":
    main()
