"""Times what `export` writes where other tools run it: the dense model beside a plan's, in one interleaved run.

python -m coreskip.bench.export speed [MODEL] [--plan PLAN | --keep 0.5] [--text FILE] [--rounds N] [--rows FILE]
python -m coreskip.bench.export rules [--rounds N] [--rows FILE]

`speed`: each format of `export` in a process of its own, generating in turn: ONNX Runtime in float32 and int4,
llama.cpp in float16, q8_0 and q4_0, dense and under the plan; and ONNX Runtime in float32 with as many core neurons,
which each prompt chooses. A row has the medians and, against the dense model in the
same format, the median of the ratios within a round.

`rules`: one gated MLP in ONNX Runtime, dense, and as its gate would choose neurons token by token: TopK over the
activations, Gather of the rows of up and down, products with those alone.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from coreskip.bench.machine import Machine
from coreskip.bench.processes import Worker
from coreskip.bench.provenance import model_name, provenance, write_rows
from coreskip.bench.runner import Job
from coreskip.bench.settings import scored_text
from coreskip.bench.workloads import threads_available
from coreskip.predictors.plan import Plan
from coreskip.runtime.analyze import analyze
from coreskip.runtime.export import export
from coreskip.runtime.load import load

_FORMS = (("onnx", "float32"), ("onnx", "int4"), ("gguf", "float16"), ("gguf", "q8_0"), ("gguf", "q4_0"))
_RUNNERS = {"onnx": "onnxruntime-folder", "gguf": "llama.cpp"}
_BY_PROMPT = "core"  # how the plan's name begins whose neurons each prompt chooses
_PROMPT, _TOKENS, _WARM_UP = 72, 64, 4
_HIDDEN, _WIDTH, _LAYERS = 576, 1536, 30  # the embedded model's MLPs; as many as keep weights out of the caches
_SHARES = (0.25, 0.5)


class Contender:
    """A folder in the runtime that it is for.

    Attributes:
        speeds, prompts: tokens per second, and seconds to the first token, by round.
    """

    def __init__(self, to: str, weights: str, plan: str, folder: Path, threads: int) -> None:
        self.to, self.weights, self.plan = to, weights, plan
        named: dict[str, Any] = {"gguf": folder / "model.gguf"} if to == "gguf" else {"model": str(folder)}
        runner = "onnxruntime-neurons" if plan.startswith(_BY_PROMPT) else _RUNNERS[to]
        self._worker = Worker(Job(runner, weights, threads=threads, context=_PROMPT + _TOKENS, **named))
        self._worker("load")
        self.megabytes = self._worker("weight_bytes") / 1e6
        self.speeds, self.prompts = list[float](), list[float]()

    def run(self, ids: list[int], tokens: int) -> None:
        found = self._worker("generate", ids, tokens)
        self.speeds.append(found.tok_s)
        self.prompts.append(found.ttft)

    def forget(self) -> None:
        self.speeds.clear()
        self.prompts.clear()

    def close(self) -> None:
        self._worker.close()


def measure(model: Any, tokenizer: Any, plan: Plan, core: Plan, text: str, rounds: int) -> list[dict[str, Any]]:
    """One row a format, dense and under the plan; and one of core neurons."""
    threads = threads_available()
    machine, ids = Machine("cpu", threads), list(tokenizer(text).input_ids[:_PROMPT])
    with tempfile.TemporaryDirectory() as scratch:
        contenders = list[Contender]()
        forms = [(*form, name, each) for form in _FORMS for name, each in (("dense", None), (_name(plan), plan))]
        forms.append(("onnx", "float32", f"{_BY_PROMPT} {core.keep:.0%}", core))
        for to, weights, name, each in forms:
            folder = Path(scratch) / f"{to}-{weights}-{len(contenders)}"
            export(model, tokenizer, folder, plan=each, to=to, weights=weights, progress=False)
            contenders.append(Contender(to, weights, name, folder, threads))
        try:
            bandwidth = _timed(contenders, ids, rounds, machine)
        finally:
            for contender in contenders:
                contender.close()
    dense = {(c.to, c.weights): c for c in contenders if c.plan == "dense"}
    return [_row(c, dense[c.to, c.weights], bandwidth) for c in contenders]


def _timed(contenders: list[Contender], ids: list[int], rounds: int, machine: Machine) -> float:
    for contender in contenders:
        contender.run(ids, _WARM_UP)
        contender.forget()
    bandwidth = [machine.read_gb_s()]
    for turn in range(rounds):
        for contender in contenders:
            contender.run(ids, _TOKENS)
        bandwidth.append(machine.read_gb_s())
        click.echo(f"round {turn + 1} of {rounds}", err=True)
    return statistics.median(bandwidth)


def _name(plan: Plan) -> str:
    return f"{plan.recipe.get('method', 'plan')} {plan.keep:.0%}"


def _row(found: Contender, dense: Contender, bandwidth: float) -> dict[str, Any]:
    ratios = [some / other for some, other in zip(found.speeds, dense.speeds, strict=True)]
    speed = statistics.median(found.speeds)
    return {
        "kind": "export",
        "runtime": "ONNX Runtime" if found.to == "onnx" else "llama.cpp",
        "weights": found.weights,
        "plan": found.plan,
        "tok_s": round(speed, 2),
        "tok_s_each": [round(each, 2) for each in found.speeds],
        "of_dense": round(statistics.median(ratios), 3),
        "of_dense_each": [round(ratio, 3) for ratio in ratios],
        "ttft_ms": round(1e3 * statistics.median(found.prompts), 1),
        "megabytes": round(found.megabytes, 1),
        "machine_gb_s": round(bandwidth, 2),
        "bandwidth_share": round(found.megabytes * speed / 1e3 / bandwidth, 3),
    }


# --- token-level rules as operators


def rule_graph(share: float | None) -> Any:
    """Gated MLPs one after the other, ``[1, 576]`` to the same; share: of neurons that each gate lets through, None:
    dense."""
    import onnx_ir as ir

    generator, kind = np.random.default_rng(0), ir.TensorType(ir.DataType.FLOAT)
    nodes, initializers = list[ir.Node](), list[ir.Value]()

    def weight(*shape: int) -> Any:
        tensor = ir.tensor(generator.standard_normal(shape, dtype=np.float32) / 30, name=f"w{len(initializers)}")
        initializers.append(ir.Value(name=tensor.name, shape=tensor.shape, type=kind, const_value=tensor))
        return initializers[-1]

    def op(name: str, *inputs: Any, count: int = 1, **attributes: Any) -> Any:
        node = ir.node(name, inputs, attributes, num_outputs=count)
        nodes.append(node)
        for index, output in enumerate(node.outputs):
            output.name = f"v{len(nodes)}.{index}"
        return node.outputs[0] if count == 1 else node.outputs

    x = given = ir.Value(name="x", shape=ir.Shape([1, _HIDDEN]), type=kind)
    if share is not None:
        counted = ir.tensor(np.asarray([round(share * _WIDTH)], np.int64), name="kept")
        kept = ir.Value(name="kept", shape=counted.shape, type=ir.TensorType(ir.DataType.INT64), const_value=counted)
        initializers.append(kept)
    for _ in range(_LAYERS):
        gate = op("MatMul", x, weight(_HIDDEN, _WIDTH))
        a = op("Mul", gate, op("Sigmoid", gate))
        up, down = weight(_WIDTH, _HIDDEN) if share is not None else weight(_HIDDEN, _WIDTH), weight(_WIDTH, _HIDDEN)
        if share is None:
            x = op("MatMul", op("Mul", a, op("MatMul", x, up)), down)
            continue
        _, chosen = op("TopK", op("Abs", a), kept, count=2, axis=-1, sorted=0)
        listed = op("Squeeze", chosen)
        rows = op("Transpose", op("Gather", up, listed, axis=0), perm=[1, 0])
        h = op("Mul", op("GatherElements", a, chosen, axis=1), op("MatMul", x, rows))
        x = op("MatMul", h, op("Gather", down, listed, axis=0))
    x.name, x.shape, x.type = "y", ir.Shape([1, _HIDDEN]), kind
    graph = ir.Graph([given], [x], nodes=nodes, initializers=initializers, opset_imports={"": 22}, name="rules")
    return ir.Model(graph, ir_version=10, producer_name="coreskip")


def measure_rules(rounds: int, threads: int) -> list[dict[str, Any]]:
    """Microseconds a layer, dense and by shares, medians of interleaved rounds."""
    runs: dict[float | None, Callable[[], float]] = {share: _session(share, threads) for share in (None, *_SHARES)}
    times: dict[float | None, list[float]] = {share: [] for share in runs}
    for _ in range(rounds):
        for share, run in runs.items():
            times[share].append(run())
    dense = statistics.median(times[None])
    return [
        {
            "kind": "export_rules",
            "way": "dense" if share is None else f"TopK and Gather, {share:.0%} kept",
            "us_per_layer": round(1e6 * statistics.median(found) / _LAYERS, 1),
            "of_dense": round(dense / statistics.median(found), 3),
        }
        for share, found in times.items()
    ]


def _session(share: float | None, threads: int) -> Callable[[], float]:
    import onnx_ir as ir
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as scratch:
        ir.save(rule_graph(share), Path(scratch) / "rules.onnx")
        session = InferenceSession(str(Path(scratch) / "rules.onnx"), options, providers=["CPUExecutionProvider"])
    x = np.ones((1, _HIDDEN), np.float32)
    session.run(None, {"x": x})

    def run() -> float:
        begun = time.perf_counter()
        for _ in range(10):
            session.run(None, {"x": x})
        return (time.perf_counter() - begun) / 10

    return run


# --- commands


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.argument("model", required=False)
@click.option("--plan", "folder", type=click.Path(path_type=Path), help="That can travel; else a static one is made.")
@click.option("--keep", default=0.5, show_default=True, help="Of the static plan, and of core neurons.")
@click.option("--text", type=click.Path(path_type=Path), help="Calibrates it, and is the prompt; else Python's manual.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--rows", type=click.Path(path_type=Path), help="Where the rows go.")
def speed(
    model: str | None, folder: Path | None, keep: float, text: Path | None, rounds: int, rows: Path | None
) -> None:
    """Dense against a plan, in every format."""
    loaded, tokenizer = load(model, device="cpu", packed=False)
    content, _ = scored_text(text)
    if folder is not None:
        plan = Plan.load(folder)
    else:
        plan = analyze(loaded, tokenizer, method="static", keep=keep, text=content)
    core = analyze(loaded, tokenizer, method="core", keep=keep, text=content)
    found = measure(loaded, tokenizer, plan, core, content, rounds)
    for row in found:
        click.echo(
            f"{row['runtime']:13} {row['weights']:8} {row['plan']:12} {row['tok_s']:7.1f} tok/s "
            f"{row['of_dense']:5.2f} x, first token {row['ttft_ms']:.0f} ms, {row['megabytes']:.1f} MB, "
            f"{row['bandwidth_share']:.0%} of bandwidth"
        )
    _keep(rows, [{"model": model_name(model), **row} for row in found])


@main.command()
@click.option("--rounds", default=21, show_default=True)
@click.option("--rows", type=click.Path(path_type=Path), help="Where the rows go.")
def rules(rounds: int, rows: Path | None) -> None:
    """What choosing neurons token by token gains as ONNX operators."""
    found = measure_rules(rounds, threads_available())
    for row in found:
        click.echo(f"{row['way']:28} {row['us_per_layer']:7.1f} us per layer, {row['of_dense']:.2f} x dense")
    _keep(rows, [{"model": f"{_LAYERS} random MLPs of {_HIDDEN} x {_WIDTH}", **row} for row in found])


def _keep(path: Path | None, found: list[dict[str, Any]]) -> None:
    if path is not None:
        about = provenance("python -m coreskip.bench.export " + " ".join(sys.argv[1:]))
        write_rows(path, [{**row, **about, "threads": threads_available()} for row in found])


if __name__ == "__main__":
    main()
