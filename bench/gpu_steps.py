"""Whole decode steps on a GPU: plans of coreskip through its public face, against transformers, and predictions."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, StaticCache

from coreskip.bench.clock import greedy
from coreskip.bench.gpu_clock import GpuRow, Results
from coreskip.bench.workloads import SHAPES, Shape
from coreskip.kernels.gpu_launch import launches
from coreskip.kernels.gpu_step import definitions
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import Cats, CoreNeurons, Learned, NeuronPolicy, Sketch, Static, Teal, TopK, Wina
from coreskip.runtime.wrap import is_wrapped, runtime_of, unwrap, wrap

KEEP, PROMPT, TOKENS = 0.5, 96, 64
#: names on the command line, and of `workloads.SHAPES`; the most important first
MODELS = {"7b": "llama-2-7b", "8b": "llama-3-8b", "1b": "llama-3.2-1b"}


#: of `generate`, made anew for each call
Options = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Way:
    """How a model is run.

    name: of a policy for every layer, or "dense". weights: a plan's. exact: drafts from the text, verified. rows: of
    the batch. cost: about how many seconds it takes on an H200; it is left out where fewer are left. always: in the
    interpreter, too, which takes a second for a step.
    """

    name: str
    weights: str | None = None
    exact: bool = False
    rows: int = 1
    cost: float = 8.0
    always: bool = False


WAYS = (
    Way("dense", always=True),
    Way("dense", "int4", cost=12, always=True),
    Way("static", always=True),
    Way("static", "int4", cost=12),
    Way("cats"),
    Way("core"),
    Way("dense, exact with lookup", exact=True, cost=12, always=True),
    Way("dense", "int4", rows=8, cost=14),
    Way("core", "int4", cost=12),
    Way("teal"),
    Way("sketch", cost=12),
    Way("dense", "int8", cost=12),
)
#: whose launches are counted
COUNTED = (
    *(way for way in WAYS if way.rows == 1 and not way.exact),
    *(Way(name) for name in ("wina", "topk", "topk by threshold", "sketch by count", "signs", "learned")),
)
_COMPILING = 80  # seconds that transformers' compiled step may take: 51 of a 7B shape on an H200, and generating


def tiny() -> Any:
    """Small enough for the interpreter."""
    config = LlamaConfig(
        vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def build(name: str, device: torch.device) -> Any:
    """A model of random weights, made where it is to run."""
    if name == "tiny":
        return tiny()
    model = Shape(MODELS[name]).build(torch.bfloat16, device)
    model.generation_config = cast(Any, GenerationConfig)(do_sample=False, pad_token_id=0)
    return model


# ---- what is run ----


def plan_of(model: Any, way: Way) -> Plan:
    """The plan of one way: neurons or inputs at random, or by thresholds that let half of them through."""
    dense = Plan.dense(model, way.weights)
    if way.name.startswith("dense"):
        return dense
    policies = _POLICIES[way.name](model)
    layers = tuple(LayerPlan(policy) for policy in policies)
    return Plan(layers, dense.model, {"method": way.name, "keep": KEEP}, weights=dense.weights)


def _static(model: Any) -> Iterator[NeuronPolicy]:
    rng = torch.Generator().manual_seed(0)
    width = int(model.config.intermediate_size)
    for _ in model.model.layers:
        yield Static(torch.randperm(width, generator=rng)[: int(width * KEEP)].sort().values)


def _core(model: Any) -> Iterator[NeuronPolicy]:
    for _ in model.model.layers:
        yield CoreNeurons(alpha=0.4, beta=KEEP, score="griffin")


def _cats(model: Any) -> Iterator[NeuronPolicy]:
    for seen in _inputs(model, ("act_fn",), outputs=True):
        yield Cats(KEEP, seen["act_fn"])


def _teal(model: Any) -> Iterator[NeuronPolicy]:
    for seen in _inputs(model, ("gate_proj", "up_proj", "down_proj")):
        yield Teal(KEEP, {f"mlp.{name}": threshold for name, threshold in seen.items()})


def _wina(model: Any) -> Iterator[NeuronPolicy]:
    for policy in _teal(model):
        yield Wina(KEEP, cast(Teal, policy).thresholds)


def _by_threshold(kind: type[Sketch] | type[TopK]) -> Callable[[Any], Iterator[NeuronPolicy]]:
    """Scores that half of the neurons reach: a neuron's down row has a length of its own."""

    def policies(model: Any) -> Iterator[NeuronPolicy]:
        for seen, layer in zip(_inputs(model, ("down_proj",)), model.model.layers, strict=True):
            length = float(layer.mlp.down_proj.weight.detach().float().norm(dim=0).mean())
            yield kind(keep=KEEP, threshold=seen["down_proj"] * length)

    return policies


def _the_same(policy: NeuronPolicy) -> Callable[[Any], Iterator[NeuronPolicy]]:
    return lambda model: iter([policy] * len(model.model.layers))


def _learned(model: Any) -> Iterator[NeuronPolicy]:
    rng = torch.Generator().manual_seed(0)
    hidden, width = int(model.config.hidden_size), int(model.config.intermediate_size)
    for _ in model.model.layers:
        reduce, expand = torch.randn(8, hidden, generator=rng), torch.randn(width, 8, generator=rng)
        yield Learned(keep=KEEP, reduce=reduce, expand=expand, bias=torch.zeros(width))


_POLICIES: dict[str, Callable[[Any], Iterator[NeuronPolicy]]] = {
    "static": _static,
    "core": _core,
    "cats": _cats,
    "teal": _teal,
    "wina": _wina,
    "topk": _the_same(TopK(keep=KEEP)),
    "topk by threshold": _by_threshold(TopK),
    "sketch": _by_threshold(Sketch),
    "sketch by count": _the_same(Sketch(keep=KEEP)),
    "signs": _the_same(Sketch(keep=KEEP, bits=1)),
    "learned": _learned,
}


def _inputs(model: Any, names: tuple[str, ...], outputs: bool = False) -> list[dict[str, float]]:
    """By layer, what half of the inputs (or outputs) of parts of the MLP are below, on some random tokens."""
    found: list[dict[str, float]] = [{} for _ in model.model.layers]

    def watch(to: dict[str, float], name: str) -> Callable[..., None]:
        def note(module: nn.Module, given: Any, output: Tensor) -> None:
            values = (output if outputs else given[0])[0, -16:].float().abs()
            to[name] = float(values.quantile(1 - KEEP, dim=-1).mean())

        return note

    handles = []
    for layer, to in zip(model.model.layers, found, strict=True):
        if outputs:  # an activation may be one module for all layers
            handles.append(layer.mlp.gate_proj.register_forward_hook(_activated(layer.mlp, watch(to, names[0]))))
        else:
            handles += [getattr(layer.mlp, name).register_forward_hook(watch(to, name)) for name in names]
    with torch.no_grad():
        model(prompt(model, 1, 32))
    for handle in handles:
        handle.remove()
    return found


def _activated(mlp: Any, note: Callable[..., None]) -> Callable[..., None]:
    return lambda module, given, output: note(module, given, mlp.act_fn(output))


def prompt(model: Any, rows: int, length: int = PROMPT, repeats: bool = False) -> Tensor:
    """Random tokens, the same for every way; or a text that repeats itself."""
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(0, int(model.config.vocab_size), (rows, length), generator=rng)
    if repeats:
        ids = ids[:, :12].repeat(1, -(-length // 12))[:, :length]
    return ids.to(model.device)


def run_overlapping(results: Results, name: str, device: torch.device) -> None:
    """The dense ways with launches that begin before the ones before them have ended (CORESKIP_OVERLAP=1)."""
    for way in (way for way in WAYS if way.name == "dense" and way.rows == 1 and results.left > way.cost):
        row = GpuRow("step", "dense, launches overlap", name, way.weights or "bfloat16")
        eager = GpuRow("step", "none")
        results.attempt(
            row, lambda row, way=way, eager=eager: _run(results, row, build(name, device), way, TOKENS, eager)
        )
        _free()


def run_ways(results: Results, name: str, device: torch.device, tokens: int = TOKENS) -> None:
    """Every way of running one shape that there is time for, and transformers."""
    model = build(name, device)
    eager = GpuRow("step", "HF eager", name, str(model.dtype).removeprefix("torch."))
    results.attempt(eager, lambda row, model=model: _timed(results, row, model, tokens, _bytes_of(model), dict))
    for at, way in enumerate(way for way in WAYS if way.always or device.type == "cuda"):
        if at == 2 and device.type == "cuda" and name == "7b" and results.left > _COMPILING:
            model = model or build(name, device)
            row = GpuRow("step", "HF compiled, static cache", name, eager.fmt)
            results.attempt(row, lambda row, model=model: _compiled(results, row, model, tokens, eager))
            model = None
            _free()
        if results.left < way.cost:
            results.add(GpuRow("step", way.name, name, way.weights or "", way.rows, notes="no time was left"))
            continue
        model = model or build(name, device)
        row = GpuRow(
            "step", way.name, name, way.weights or eager.fmt, way.rows, 1.0 if way.name.startswith("dense") else KEEP
        )
        results.attempt(row, lambda row, way=way, model=model: _run(results, row, model, way, tokens, eager))
        model = _bare(model)
    if device.type == "cuda" and results.left > 40:
        model = None
        _free()
        row = GpuRow("step", "HF eager, torchao int4", name, "int4")
        results.attempt(row, lambda row: _torchao(results, row, build(name, device), tokens, eager))
    model = None
    _free()


def _bare(model: Any) -> Any:
    """The model as it was; None where its matrices were replaced by packed ones."""
    if is_wrapped(model) and not runtime_of(model).removable:
        model = None
    elif is_wrapped(model):
        unwrap(model)
    _free()
    return model


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _run(results: Results, row: GpuRow, model: Any, way: Way, tokens: int, eager: GpuRow) -> None:
    plan = plan_of(model, way)
    start = time.perf_counter()
    cuda = model.device.type == "cuda"
    wrap(model, plan, exact=way.exact, keep_originals=None if way.exact else not cuda)
    steps = runtime_of(model).steps.captured
    if not cuda:
        steps.capture = lambda step, device: step  # what a graph would replay
    _timed(results, row, model, tokens, 0, dict, eager, repeats=way.exact, prepare=start)
    lowering = steps.lowering
    if lowering.ready:
        weights = next(reversed(lowering._models.values())).nbytes
        row.notes += f"; lowered, {weights / 1e9:.2f} GB of matrices a step if nothing is left out"
    else:
        row.ok = False
        row.notes += f"; NOT LOWERED ({lowering.refusal}); captured: {steps.refusal or steps.ready}"


def _timed(
    results: Results,
    row: GpuRow,
    model: Any,
    tokens: int,
    nbytes: int,
    options: Options,
    eager: GpuRow | None = None,
    repeats: bool = False,
    prepare: float | None = None,
) -> None:
    """Generates twice, once to warm up, and then as often as there is time for: the tokens after the first count."""
    ids, cuda = prompt(model, row.rows, repeats=repeats), model.device.type == "cuda"
    _generate(model, ids, min(tokens, 24 if cuda else 2), options)
    ready = time.perf_counter()
    times = [_generate(model, ids, tokens, options) for _ in range(3 if cuda else 1)]
    results.speed(row, times, nbytes)
    assert row.us is not None
    row.tok_s = round(row.rows / row.us["p50"] * 1e6, 1)
    if eager is not None and eager.tok_s:
        row.against = round(row.tok_s / eager.tok_s, 3)
        row.notes = "against HF eager of one sequence"
    if prepare is not None:
        row.notes += f"; {ready - prepare:.1f} s to pack, compile, capture"
    if cuda:
        now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        row.notes += f"; {now / 1e9:.2f} GB, {peak / 1e9:.2f} at its peak"


def _generate(model: Any, ids: Tensor, tokens: int, options: Options) -> float:
    """Seconds a token after the first."""
    if ids.shape[0] == 1:
        watched = greedy(model, ids, tokens, **options())[1]
        return sum(watched.gaps) / max(1, len(watched.gaps))
    times = []  # streamers take one sequence: what two lengths differ by
    for count in (2, tokens):
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            **options(),
        )
        if ids.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return max(1e-9, (times[1] - times[0]) / max(1, tokens - 2))


def _compiled(results: Results, row: GpuRow, model: Any, tokens: int, eager: GpuRow) -> None:
    """transformers with a static cache and torch.compile: the strongest that it has on a GPU."""
    compiling: Any = CompileConfig(mode="reduce-overhead")
    model.generation_config.compile_config = compiling
    cache: Any = StaticCache(config=model.config, max_cache_len=PROMPT + tokens + 8)

    def fresh() -> dict[str, Any]:
        cache.reset()
        return {"past_key_values": cache}

    _timed(results, row, model, tokens, _bytes_of(model), fresh, eager)


def _torchao(results: Results, row: GpuRow, model: Any, tokens: int, eager: GpuRow) -> None:
    try:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        row.notes = "torchao is not installed"
        return
    quantize_(model, Int4WeightOnlyConfig(group_size=32))
    _timed(results, row, model, tokens, 0, dict, eager)


def _bytes_of(model: Any) -> int:
    """Of the matrices that one token reads."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return sum(m.weight.nbytes for m in linears)


# ---- launches, bytes and what they should take ----

#: GB/s on an H200 by the megabytes of a launch (GPU.md's tables): of 4 bits, and of floats
_RATES = {
    4: ((10.5, 2245), (21.1, 2541), (28.3, 2981), (31.5, 3218), (56.4, 3439), (81.8, 3682), (293.7, 4178)),
    16: ((33.5, 2467), (90.2, 3046), (100.7, 3237), (180.4, 3829), (270.5, 3876), (352.3, 3985), (1409.3, 4358)),
}
_SMALL_US = 1.66  # one program over 4,096 values


@dataclass(frozen=True)
class Predicted:
    """A way of running a shape, and what of its matrices a layer's launches read.

    name, bits: of the way and its weights. mlp: shares of three matrices that each launch of the MLP reads. small:
    small launches of a layer; in_rate: those that the measured rate of a product includes. notes: what the figures
    rest on.
    """

    name: str
    bits: int
    mlp: tuple[float, ...]
    small: int
    in_rate: int = 0
    notes: str = ""


PREDICTED = (
    Predicted("dense", 16, (2 / 3, 1 / 3), 4, 0, "; products at the rates that cuBLAS reached"),
    Predicted("static", 16, (KEEP,), 5, 1, "; the one pass's sum is in its rate"),
    Predicted("cats", 16, ((1 + 2 * KEEP) / 3,), 5, 1, "; the one pass's sum is in its rate"),
    Predicted(
        "teal", 16, (2 / 3 * KEEP, 1 / 3 * KEEP), 4, 0, "; columns at the rates of rows, which nobody has measured"
    ),
    Predicted("dense", 4, (2 / 3, 1 / 3), 5),
    Predicted("static", 4, (2 / 3 * KEEP, 1 / 3 * KEEP), 5),
)
_BESIDE = 12  # small launches of a step beside its layers: the last norm, the embedding, positions and their angles


def predict(results: Results, name: str) -> None:
    """What a token of a shape reads and launches, and how long that should take on an H200. Nothing of it was measured
    here."""
    settings = SHAPES[MODELS[name]]
    hidden, inner, layers = (settings[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads, kv = settings["num_attention_heads"], settings["num_key_value_heads"]
    size = settings.get("head_dim", hidden // heads)
    for way in PREDICTED:
        per_weight = 2.0 if way.bits == 16 else 0.625
        of_mlp = [share * 3 * inner * hidden for share in way.mlp]
        each = [(heads + 2 * kv) * size * hidden, heads * size * hidden, *of_mlp]
        head = hidden * settings["vocab_size"] * (2.0 if way.bits == 16 else 1.125)
        sizes = [n * per_weight for n in each] * layers + [head]
        micro = (
            sum(_microseconds(n, way.bits) for n in sizes) + ((way.small - way.in_rate) * layers + _BESIDE) * _SMALL_US
        )
        keep = 1.0 if way.name == "dense" else KEEP
        row = GpuRow("prediction", way.name, name, "bfloat16" if way.bits == 16 else "int4", keep=keep)
        row.us = {"p20": round(micro, 1), "p50": round(micro, 1), "p80": round(micro, 1)}
        row.nbytes = int(sum(sizes))
        row.gb_s = round(row.nbytes / micro / 1e3, 1)
        row.share = round(row.gb_s / 4227, 3)
        row.tok_s = round(1e6 / micro, 1)
        row.small, row.products = way.small, len(each)
        row.notes = (
            f"an H200, reasoned: {len(each)} products and {way.small} small launches a layer, {_BESIDE} beside them, "
            f"{row.nbytes / 1e9:.2f} GB{way.notes}"
        )
        results.add(row)


def _microseconds(nbytes: float, bits: int) -> float:
    """Of one product, by the rates that matrices of about its size reached."""
    table, megabytes = _RATES[bits], nbytes / 1e6
    if megabytes <= table[0][0]:
        return table[0][0] / table[0][1] * 1e3 * max(0.5, megabytes / table[0][0])
    for (low, slow), (high, fast) in itertools.pairwise(table):
        if megabytes <= high:
            return megabytes / (slow + (fast - slow) * (megabytes - low) / (high - low)) * 1e3
    return megabytes / table[-1][1] * 1e3


def count_launches(results: Results) -> None:
    """Small launches a layer of a lowered step, counted on a model of two layers and one of one."""
    for way in COUNTED:
        row = GpuRow("launches", way.name, "tiny", way.weights or "", keep=1.0 if way.name == "dense" else KEEP)
        results.attempt(row, lambda row, way=way: _count(row, way))


def _count(row: GpuRow, way: Way) -> None:
    counts = []
    for layers in (1, 2):
        model = tiny()
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        model.config.layer_types = None
        with _wrapped_for_counting(model, way) as step:
            with launches() as found, Launched() as others:
                step()
            found["small"] += others.operations
            counts.append(found)
    row.small, row.products = (counts[1][kind] - counts[0][kind] for kind in ("small", "gemv"))
    beside = counts[0]["small"] - row.small
    row.notes = f"{row.small} small launches and {row.products} products a layer, {beside} small ones beside"
    row.ok = row.small <= 6


class Launched(TorchDispatchMode):
    """Counts what torch launches itself, products with matrices apart. Kernels are counted, and not run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        if not function.is_view and not any(word in name for word in ("empty", "view", "::mm", "::addmm", "::linear")):
            self.operations += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> Launched:
        self._parts = cast(Any, import_module("coreskip.kernels.gpu_parts"))
        self._run = self._parts.run
        self._parts.run = lambda *arguments: None
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._parts.run = self._run
        super().__exit__(*error)  # type: ignore[no-untyped-call]


# ---- whether steps are right ----


def check_steps(results: Results, device: torch.device) -> None:
    """Lowered steps of a small model under every policy against its modules, and against themselves."""
    for way in (*COUNTED, Way("dense", rows=3), Way("dense", "int4", rows=8), Way("cats", rows=2)):
        if results.left < 8:
            results.add(GpuRow("check", "steps of the other ways", ok=False, notes="no time was left for them"))
            return
        keep = 1.0 if way.name == "dense" else KEEP
        row = GpuRow("check", f"steps, {way.name}", "tiny", way.weights or "float32", way.rows, keep)
        results.attempt(row, lambda row, way=way: _check_step(row, way, device))


def _check_step(row: GpuRow, way: Way, device: torch.device) -> None:
    model = tiny().to(device)
    wrap(model, plan_of(model, way), keep_originals=True)
    try:
        steps, native = runtime_of(model).steps.captured, runtime_of(model).steps.native
        if device.type != "cuda":  # which stands for a GPU, that has no native step
            native._state.refusal = "modules are to compute"
        capture = steps.capture if device.type == "cuda" else lambda step, device: step
        steps.capture = None
        expected = _forced(model, way.rows)
        steps.capture = capture
        found, again = (_forced(model, way.rows) for _ in range(2))
    finally:
        unwrap(model)
    # inputs in 8 bits turn roundings, and in the last digit of a score choices turn
    row.error, row.limit = float((found - expected).norm() / expected.norm()), 0.1 if way.weights else 0.01
    row.ok = row.error <= row.limit and torch.equal(found, again) and steps.lowering.ready and steps.ready
    if not torch.equal(found, again):
        row.notes = "two runs differ"
    if not steps.lowering.ready:
        row.notes += f"NOT LOWERED ({steps.lowering.refusal})"


def _forced(model: Any, rows: int, length: int = 12) -> Tensor:
    """Logits [rows, length, vocabulary] of given tokens after a prompt, decoded one by one."""
    ids = prompt(model, rows, 8 + length)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache)
        made = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(8, 8 + length)]
    return torch.cat(made, 1).float()


@contextmanager
def _wrapped_for_counting(model: Any, way: Way) -> Iterator[Callable[[], Any]]:
    """A lowered step of a wrapped model, as a graph would hold it."""
    found: list[Callable[[], Any]] = []
    wrap(model, plan_of(model, way), keep_originals=True)
    try:
        steps = runtime_of(model).steps.captured

        def keep(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
            found.append(step)
            return step

        steps.capture = keep
        with definitions():
            _generate(model, prompt(model, 1, 8), 3, dict)
        if not steps.lowering.ready or not found:
            raise RuntimeError(f"no step was lowered: {steps.lowering.refusal}")
        yield found[0]
    finally:
        with suppress(Exception):
            unwrap(model)
