"""What a decode step moves through memory under a plan, and how long that takes here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..kernels import cpu
from ..kernels.ops import available
from ..kernels.packed import EXACT_BYTES
from ..predictors.anatomy import Anatomy, FeedForward, dissect, is_packed
from ..predictors.plan import Plan
from ..predictors.policies import Chooser
from ..predictors.rounding_recipe import RoundingRecipe
from .calls import NotCovered
from .formats import bytes_in, format_takers, takes_format
from .linear_names import linear_of
from .lower_cpu import refusal
from .packed_layer import packed_bytes_of
from .program import FORMAT_BYTES, BrickProgram, LayerProgram, Program
from .span_reading import read_shared

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
    """What one decode step of one sequence reads under `plan`: the matrices of the program that runs.

    native: whether the native step runs it, where that is known; else as far as model and plan tell: wholly, or some
    layers of it and the modules the others.

    A threshold's share is what it kept on the calibration text; an adaptive layer counts as if it ran. The KV cache is
    left out: no plan changes it, for skipped attentions write their entries, too.
    """
    anatomy = anatomy or dissect(model)
    if plan.rounding is not None and not any(map(is_packed, model.modules())):
        moved = _bytes_rounded(model, plan.rounding, anatomy)
        return Cost(moved, moved)
    of_modules = len(anatomy) if native is None and not runs_natively(anatomy, plan) else 0
    if native is None:
        of_modules = of_modules or on_modules(model, anatomy)
        native = of_modules < len(anatomy)
    elif not native:
        of_modules = len(anatomy)
    runs_in_place = native
    program = Program.of(anatomy, plan, lambda weight: _bytes_of(weight, plan.weights, runs_in_place))
    step = _Reading(plan.weights, native)
    head = model.get_output_embeddings().weight
    total = (
        loaded_bytes(model)
        - sum(_bytes_of_experts(anatomy))
        - head.nbytes
        + step.matrix(head, "int8" if plan.weights in FORMAT_BYTES else None)
    )
    for index, (layer, module) in enumerate(zip(program.layers, anatomy.layers, strict=True)):
        mlp = anatomy.feed_forwards[index]
        inner = [] if mlp is None else [m.weight for m in _matrices(mlp.owner) if _is_of(mlp, m)]
        in_mlp = set(map(id, inner))
        matrices = [m.weight for m in _matrices(module)]
        total -= sum(w.nbytes for w in matrices)
        total += sum(step.matrix(w, plan.weights) for w in matrices if id(w) not in in_mlp)
        total -= step.unread_attention(anatomy, index, layer)
        if layer.skips.mlp:
            total += sum(step.brick(brick, inner[0]) for brick in layer.bricks)
            total += 0.0 if layer.experts is None else layer.experts.nbytes
    extra = step.extra + _MODULES * of_modules
    return Cost(total, total + extra)


def _bytes_rounded(model: Any, recipe: RoundingRecipe, anatomy: Anatomy) -> float:
    """Bytes of a token once the model is packed by a recipe."""
    names = {module: name for name, module in model.named_modules()}
    linears = dict.fromkeys(format_takers(model, anatomy))
    rounded = sum(bytes_in(module, recipe.widths[names[module]]) for module in linears)
    return float(loaded_bytes(model) - sum(module.weight.nbytes for module in linears) + rounded)


class _Reading:
    """Adds up what takes longer than to read its bytes in a row (`extra`), in bytes read meanwhile."""

    def __init__(self, weights: str | None, native: bool) -> None:
        self._weights, self._native, self.extra = weights, native, 0.0

    def matrix(self, weight: Any, form: str | None) -> float:
        """Bytes of a matrix that is read whole."""
        read = _bytes_of(weight, form, self._native) * int(weight.numel())
        if form is None and read < weight.nbytes:
            self.extra += (_WHOLE - 1) * read
        return read

    def brick(self, brick: BrickProgram, weight: Any) -> float:
        """Bytes of a brick; weight: one of its matrices."""
        in_fewer_bytes = _bytes_of(weight, self._weights, self._native) < weight.element_size()
        if brick.chooser is Chooser.NOTHING and self._weights is None and in_fewer_bytes:
            self.extra += (_WHOLE - 1) * brick.nbytes
        if brick.chooser in (Chooser.TOKEN, Chooser.INPUTS):
            self.extra += ((_CHOSEN if brick.rate is None else brick.rate) - 1) * brick.nbytes
        return brick.nbytes

    def unread_attention(self, anatomy: Anatomy, index: int, layer: LayerProgram) -> float:
        """Bytes of the attention's matrices that stay unread."""
        attention = anatomy.attentions[index]
        if attention is None:
            return 0.0
        if not layer.skips.attention:
            # keys and values are still written; the queries' projection has as many weights as the output's
            output = cast(Any, attention.part(attention.output)).weight
            return 2.0 * int(output.numel()) * _bytes_of(output, self._weights, self._native)
        unread = 0.0
        for brick in layer.bricks:
            for name in brick.thresholds:
                module, in_mlp = linear_of(anatomy, index, name)
                weight: Any = module.weight
                if not in_mlp:
                    read = weight.numel() * _bytes_of(weight, self._weights, self._native)
                    unread += read - brick.share * weight.nbytes
        return unread


def _bytes_of_experts(anatomy: Anatomy) -> Iterator[int]:
    """Of all experts' matrices, by layer."""
    for experts in anatomy.experts:
        if experts is not None:
            yield sum(p.nbytes for p in experts.module.parameters(recurse=False) if p.ndim == 3)


def _matrices(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if takes_format(m)]


def _is_of(mlp: FeedForward, module: nn.Module) -> bool:
    names = (mlp.gate_name, mlp.up_name, mlp.down_name)
    return any(name is not None and getattr(mlp.owner, name) is module for name in names)


def loaded_bytes(model: Any) -> int:
    """Every parameter once, but of embedding tables the one row that a token looks up (a tied head reads all)."""
    head = model.get_output_embeddings().weight
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    total = 0
    for parameter in model.parameters():  # tied ones come once
        looked_up = parameter is not head and any(parameter is table for table in tables)
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
    program = Program.of(anatomy, plan)
    return program.native and not program.thins_shared_experts


_on_modules: WeakKeyDictionary[Anatomy, int] = WeakKeyDictionary()  # searches ask for hundreds of costs


def on_modules(model: Any, anatomy: Anatomy) -> int:
    """How many decoder layers of `model` decode steps have to call the modules of, as far as descriptions tell."""
    if anatomy not in _on_modules:
        _on_modules[anatomy] = 0 if refusal(model, anatomy) is None else _called(model, anatomy)
    return _on_modules[anatomy]


def _called(model: Any, anatomy: Anatomy) -> int:
    if available("cpu") is not None or model.device.type != "cpu":
        return len(anatomy)
    try:
        return sum(split.without is not None for split in next(read_shared(model, anatomy)).splits)
    except NotCovered:
        return len(anatomy)


def _bytes_of(weight: Any, fmt: str | None, native: bool) -> float:
    """Bytes of one weight of a matrix as a step reads it."""
    packed = packed_bytes_of(weight)
    if packed is not None:
        return packed / int(weight.numel())
    if fmt in FORMAT_BYTES:
        return FORMAT_BYTES[fmt]
    loaded = float(weight.element_size())
    if not native or weight.device.type != "cpu" or available("cpu") is not None:
        return loaded
    # of experts' matrices, which lie in one tensor, the first tells
    exact = EXACT_BYTES.get(str(cpu.exact_form(weight[0] if weight.ndim == 3 else weight)), loaded)
    return exact if exact <= LITTLE * loaded else loaded


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
