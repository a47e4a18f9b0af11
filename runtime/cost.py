"""What a decode step moves through memory under a plan, and how long that takes here."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..kernels import cpu
from ..kernels.ops import available
from ..kernels.packed import EXACT_BYTES
from ..predictors.anatomy import Anatomy, dissect, rows_of
from ..predictors.importance import kept_count
from ..predictors.plan import Adaptive, CoreNeurons, Dense, Learned, Plan, Run, Similar, Sketch, Static, Threshold, TopK
from .decode import refusal
from .formats import takes_format
from .sparse_mlp import TOKEN_POLICIES, native_rule

_INT4, _INT8_GROUPS = EXACT_BYTES["int4"], EXACT_BYTES["int8_groups"]
# Share of a matrix' bytes that another form of its numbers may take beside it unasked: 4-bit groups take 0.16 of
# float32's, 8-bit groups 0.27.
LITTLE = 0.3
_READ = 256 << 20  # bytes: several times the last cache

# What a byte costs where neurons are chosen token by token, in bytes read in a row: the rule comes first, then
# scattered bundles. Measured on the embedded model, 2 cores with AVX-512: sketches read at 16-18 GB/s what dense int8
# reads at 22 and dense int4 at 24-27; by bytes alone a sketch of 0.5 would be as fast as dense int4, it takes 1.4 times
# as long. Fixed sets read at the dense kernels' rate.
_CHOSEN = 1.4
# And where inputs meet the numbers of groups as they are, in fp32: 2.75 ms a step of the embedded model, with inputs
# rounded to 8 bits 2.61.
_WHOLE = 1.05
# A decoder layer whose step runs in Python, on the modules, in bytes read meanwhile (0.5 ms at 20 GB/s).
_MODULES = 10e6


@dataclass(frozen=True)
class Cost:
    """Bytes of weights that a decode step reads, and those that would take as long to read in a row."""

    moved: float
    weighed: float


def cost(model: Any, plan: Plan, anatomy: Anatomy | None = None, *, native: bool | None = None) -> Cost:
    """What one decode step of one sequence reads under `plan`.

    native: whether the native step runs it, where that is known; else as far as model and plan tell.

    A threshold's share is what it kept on the calibration text; an adaptive layer counts as if it ran. The KV cache is
    left out: no plan changes it, for skipped attentions write their entries, too.
    """
    anatomy = anatomy or dissect(model)
    head = model.get_output_embeddings().weight
    loaded = head.element_size()
    native = runs_natively(anatomy, plan) and _covered(model, anatomy) if native is None else native
    fmt = plan.weights
    mlp_weights = {id(p) for mlp in anatomy.mlps for p in (mlp.up.weight, mlp.down.weight)}
    mlp_weights |= {id(getattr(mlp.owner, mlp.gate_name).weight) for mlp in anatomy.mlps if mlp.gate_name is not None}
    extra = 0.0

    def dense(weight: Any, form: str | None) -> float:
        nonlocal extra
        size = _bytes_of(weight, form, native)
        extra += (_WHOLE - 1) * size * weight.numel() if form is None and size < loaded else 0.0
        return size * int(weight.numel())

    moved = loaded_bytes(model) - head.nbytes + dense(head, None if fmt is None else "int8")
    for index, (layer, mlp) in enumerate(zip(anatomy.layers, anatomy.mlps, strict=True)):
        policy, runs = plan.layers[index].neurons, plan.layers[index].layer
        matrices: list[Any] = [m.weight for m in layer.modules() if takes_format(m)]
        others = [weight for weight in matrices if id(weight) not in mlp_weights]
        moved += sum(dense(p, fmt) - p.nbytes for p in others)
        moved -= _unread_attention(anatomy, index, policy, runs, fmt, native)
        moved -= loaded * sum(p.numel() for p in layer.parameters() if id(p) in mlp_weights)
        if not runs.mlp:
            continue
        size = _bytes_of(mlp.up.weight, fmt, native)
        read = _mlp_bytes(policy, mlp.intermediate_size, mlp.hidden_size, mlp.gated, size, loaded, fmt)
        moved += read
        extra += (_WHOLE - 1) * read if isinstance(policy, Dense) and fmt is None and size < loaded else 0.0
        extra += (_CHOSEN - 1) * read if isinstance(policy, TOKEN_POLICIES) else 0.0
    if not native:
        extra += _MODULES * len(anatomy)
    return Cost(moved, moved + extra)


def loaded_bytes(model: Any) -> int:
    """Every parameter once, but of embedding tables the one row that a token looks up (a tied head reads all)."""
    head = model.get_output_embeddings().weight
    tables = {m.weight.data_ptr(): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    total = 0
    for parameter in model.parameters():  # tied ones come once
        looked_up = parameter.data_ptr() in tables and parameter.data_ptr() != head.data_ptr()
        total += parameter[0].nbytes if looked_up else parameter.nbytes
    return total


def bytes_per_token(model: Any, plan: Plan, anatomy: Anatomy | None = None, *, native: bool | None = None) -> int:
    """Bytes of weights that one decode step of one sequence reads under `plan`; see `cost`."""
    return round(cost(model, plan, anatomy, native=native).moved)


def predicted_seconds(model: Any, plan: Plan, anatomy: Anatomy | None = None) -> float:
    """How long a decode step takes if it does nothing but read its weights, by what reads them."""
    return cost(model, plan, anatomy).weighed / read_bandwidth(model.device.type)


def runs_natively(anatomy: Anatomy, plan: Plan) -> bool:
    """Whether every policy of the plan is one that the native step carries out, where it covers the model."""
    return all(
        native_rule(layer.neurons, anatomy, index)
        for index, layer in enumerate(plan.layers)
        if isinstance(layer.neurons, TOKEN_POLICIES)
    )


_refusals: WeakKeyDictionary[Anatomy, str | None] = WeakKeyDictionary()  # searches ask for hundreds of costs


def _covered(model: Any, anatomy: Anatomy) -> bool:
    if anatomy not in _refusals:
        _refusals[anatomy] = refusal(model, anatomy)
    return _refusals[anatomy] is None


def _mlp_bytes(policy: Any, width: int, hidden: int, gated: bool, size: float, loaded: int, fmt: str | None) -> float:
    first = 2 if gated else 1  # projections that give the activations
    kept = int(policy.kept(width))
    row = hidden * loaded
    if isinstance(policy, Dense):
        return width * (first + 1) * hidden * size
    if isinstance(policy, (Static, CoreNeurons, Similar)):  # packed in bytes under either format
        return kept * (first + 1) * (row if fmt is None else hidden)
    if isinstance(policy, Sketch) and policy.bits == 4:
        completed = kept if policy.candidates is None else kept_count(width, policy.candidates)
        return width * first * hidden / 2 + completed * first * hidden / 2 + kept * hidden
    if isinstance(policy, Sketch):
        return width * hidden + kept * (first + 1) * row
    if isinstance(policy, TopK) or (isinstance(policy, Threshold) and policy.rule == "cats" and not gated):
        return width * first * row + kept * row
    if isinstance(policy, Threshold) and policy.rule == "cats":
        return width * row + kept * 2 * row
    if isinstance(policy, Learned):
        return int(policy.rank) * (hidden + width) * 4 + kept * (first + 1) * row
    return kept * (first + 1) * row


def _bytes_of(weight: Any, fmt: str | None, native: bool) -> float:
    """Bytes of one weight of a matrix as a step reads it."""
    if fmt is not None:
        return {"int8": _INT8_GROUPS, "int4": _INT4}[fmt]
    loaded = float(weight.element_size())
    if not native or weight.device.type != "cpu" or available("cpu") is not None:
        return loaded
    exact = EXACT_BYTES.get(str(cpu.exact_form(weight)), loaded)
    return exact if exact <= LITTLE * loaded else loaded


def _unread_attention(anatomy: Anatomy, index: int, policy: Any, runs: Run, fmt: str | None, native: bool) -> float:
    """Bytes of the attention's weights that stay unread."""
    attention = anatomy.attentions[index]
    if attention is None:
        return 0.0
    if not (runs.attention or isinstance(runs, Adaptive)):
        # keys and values are still written; the queries' projection has as many weights as the output's
        output = rows_of(getattr(attention.module, attention.output))[0]
        return 2.0 * output.numel() * _bytes_of(output, fmt, native)
    if not isinstance(policy, Threshold):
        return 0.0
    names = [name.partition(".")[2] for name in policy.least if name.startswith("attention.")]
    matrices = [rows_of(getattr(attention.module, name))[0] for name in names]
    return sum(w.numel() * _bytes_of(w, fmt, native) - policy.keep * w.nbytes for w in matrices)


@cache
def read_bandwidth(device: str) -> float:
    """Bytes per second at which memory is read here with the threads there are: the best of three passes."""
    memory = torch.ones(_READ, dtype=torch.uint8, device=device)
    best = float("inf")
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        if device == "cpu" and available("cpu") is None:
            cpu.read(memory)
        else:
            float(memory.view(torch.float32).sum())
        best = min(best, time.perf_counter() - start)
    return _READ / best
