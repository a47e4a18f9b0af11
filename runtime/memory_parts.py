"""What of a packed model can be read from its folder at every token, and how many bytes its parts take: what a cap on
memory is counted from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..kernels.files import PAGE
from ..kernels.memory import HUGE_PAGE
from ..kernels.ops import MAX_ROWS
from ..kernels.packed import padded
from ..kernels.store import Store
from ..predictors.anatomy import Anatomy, shape_of
from ..predictors.errors import CoreskipError
from ..predictors.policies import Chooser
from .formats import format_takers
from .linear_names import native_names
from .packed_experts import HeldExperts
from .packed_layer import PackedLayer
from .program import Program


@dataclass(frozen=True)
class Mixture:
    """The experts of a layer. names: of their tensors. unit: bytes of a slot for one. least: of as many slots as a step
    may need. unpacked: bytes that a matrix is unpacked into."""

    names: list[str]
    unit: int
    top_k: int
    least: int
    unpacked: int


def mixtures_of(anatomy: Anatomy, store: Store) -> list[Mixture]:
    """Of the layers that have one, in turn. Raises CoreskipError where weights are no longer the folder's."""
    at, found = {span[0]: name for name, span in store.spans.items() if span[1]}, []
    for experts in filter(None, anatomy.experts):
        module = experts.module
        if isinstance(module, HeldExperts):
            first = [parts[0].weight for parts in module.stacks.values()]
        else:
            kinds = (experts.layout.gate, experts.layout.up, experts.layout.down)
            first = [experts.parameter(kind) for kind in kinds if kind is not None]
        names = [at.get(weight.data_ptr() - store.memory.data_ptr()) for weight in first]
        if None in names:
            raise CoreskipError("the model's weights are not its folder's any more: load it again to cap its memory")
        unit = sum(store.spans[str(name)][1] // experts.count for name in names) + 6 * PAGE
        wanted = min(experts.count, 2 * MAX_ROWS * experts.top_k)
        largest = experts.intermediate_size * experts.hidden_size * 2 * experts.down.dtype.itemsize
        found.append(Mixture([str(name) for name in names], unit, experts.top_k, wanted * unit, largest))
    return found


def streamed_of(model: Any, anatomy: Anatomy, store: Store) -> dict[nn.Module, list[str]]:
    """The linears whose matrices can be read whenever they are used, in the order of a step, and their tensors. Experts
    that all tokens share are in memory: a step reads them with others, in no order of their own."""
    at = {span[0]: name for name, span in store.spans.items() if span[1]}
    shared = {module for e in anatomy.experts if e is not None and e.shared for module in e.shared.owner.modules()}
    found: dict[nn.Module, list[str]] = {}
    for module in dict.fromkeys(module for module in format_takers(model, anatomy) if module not in shared):
        if isinstance(module, PackedLayer):
            weights = [part.weight for part in module.parts()]
        elif isinstance(module, nn.Linear) and _unpadded(module.weight):
            weights = [module.weight]
        else:
            continue
        names = [at.get(weight.data_ptr() - store.memory.data_ptr()) for weight in weights]
        if None in names:
            raise CoreskipError("the model's weights are not its folder's any more: load it again to cap its memory")
        found[module] = [name for name in names if name is not None]
    return found


def _unpadded(weight: torch.Tensor) -> bool:
    return weight.ndim == 2 and weight.is_contiguous() and padded(weight.shape[1], weight.dtype) == weight.shape[1]


def unread_by(anatomy: Anatomy, program: Program, skipped: tuple[frozenset[int], frozenset[int]]) -> set[nn.Module]:
    """Linears that no step reads as matrices."""
    found: set[nn.Module] = set()
    bundled = set(program.chosen_by(Chooser.CALIBRATION, Chooser.PROMPT, Chooser.TOKEN))
    for index in bundled | skipped[1]:
        mlp = anatomy.feed_forwards[index]
        found.update(() if mlp is None else mlp.owner.modules())
    for index in skipped[0]:
        attention = anatomy.attentions[index]
        if attention is not None and len(attention.inputs) == 3:
            found.update(attention.part(name) for name in (attention.inputs[0], attention.output))
    return found


def tables_of(model: Any, store: Store) -> set[str]:
    """Tensors of embeddings, of which rows are looked up."""
    base = store.memory.data_ptr()
    at = {span[0]: name for name, span in store.spans.items() if span[1]}
    table = model.get_input_embeddings()
    weight = table.part().weight if hasattr(table, "part") else table.weight
    name = at.get(weight.data_ptr() - base)
    return set() if name is None else {name}


def copied_bytes(model: Any, anatomy: Anatomy, streamed: dict[nn.Module, list[str]]) -> int:
    """Bytes of matrices that steps cannot read where they lie: copies with rows of whole cache lines, or turned."""
    total = 0
    for module in dict.fromkeys(format_takers(model, anatomy)):
        if module not in streamed:
            outputs, inputs = shape_of(module)
            total += outputs * padded(inputs, module.weight.dtype) * module.weight.element_size()
    return total


def neuron_bytes(program: Program, chooser: Chooser, more: int = 0) -> int:
    """Bytes of neurons that are packed side by side, each padded to cache lines, those of a layer to huge pages. more:
    than a layer's neurons take where they lie as they come (`Brick.chosen`), at most."""
    sizes = [round(brick.nbytes) + 256 * brick.kept + more for brick in program.chosen_by(chooser).values()]
    return sum(size + (2 * HUGE_PAGE if size >= HUGE_PAGE // 2 else 0) for size in sizes)


def widths(anatomy: Anatomy) -> tuple[int, int]:
    """The largest hidden size and intermediate size."""
    inner = [mlp.intermediate_size for _, mlp in anatomy.present]
    inner += [experts.intermediate_size * max(1, experts.top_k) for experts in filter(None, anatomy.experts)]
    return anatomy.hidden_size, max(inner)


def largest_unit(anatomy: Anatomy) -> int:
    """Bytes of the rows that are read together at least: 16 in groups of bytes, or 4 in float32."""
    return 17 * (max(widths(anatomy)) + 256) + 4 * PAGE


def entry_bytes(model: Any, anatomy: Anatomy) -> int:
    """Bytes of keys and values that a token adds."""
    total = 0
    for layer in range(len(anatomy)):
        parts = {part: size for names in native_names(anatomy, layer).values() for part, size in names.items()}
        total += 2 * parts.get("k", anatomy.hidden_size)
    return total * int(model.dtype.itemsize)


def step_bytes(model: Any, anatomy: Anatomy) -> int:
    """Bytes of a native step's own memory, and of logits."""
    hidden, inner = widths(anatomy)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return 16 * int(vocabulary) + 128 * (1 + torch.get_num_threads()) * (hidden + inner)
