"""A plan's weight format on a model's own modules.

Native prompts and steps read matrices in the plan's format wherever they cover a model. What runs on the modules
(another architecture, a hook, a static cache, more rows than the native step takes) multiplies with the same numbers
here, so that a plan has one text. Verification, exact mode's prompts and passes with gradients read the originals.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels.experts import Expert, side_by_side
from ..kernels.groups import tile_shape
from ..kernels.ops import PackedLinear, available
from ..kernels.packed import DTYPES
from ..predictors.anatomy import Anatomy, Experts, canonical_activation, rows_of, shape_of
from ..predictors.checks import AS_PACKED
from ..predictors.errors import CoreskipError
from ..predictors.plan import Plan
from .bundles import PackedBefore, known_in_groups
from .lower_cpu import HEAD_FORMAT, KERNEL_FORMATS
from .packed_experts import HeldExperts, packed_of
from .packed_layer import PackedLayer
from .phases import Pass, Phase, mode
from .program import Program
from .spec import is_plain_linear
from .width import product

logger = logging.getLogger("coreskip")

#: the kernels' names of the widths that matrices are rounded to with a text
FORMAT_OF = {"int4": "int4", "int5": "int5", "int8": str(KERNEL_FORMATS["int8"])}


def bytes_in(module: nn.Module, width: str) -> int:
    """Bytes of a linear's matrix in one of these widths."""
    return prod(tile_shape(FORMAT_OF[width], *shape_of(module)))


def check_format(model: Any, anatomy: Anatomy, plan: Plan) -> None:
    """Raises CoreskipError where decode steps of `model` cannot read their weights in the plan's format."""
    if plan.weights is None:
        return
    takers = format_takers(model, anatomy)
    matrices = [module.weight for module in takers if not isinstance(module, PackedLayer)]
    reason = available("cpu") or _of_packed(plan.weights, len(takers) - len(matrices), len(takers))
    if reason is None and any(weight.device.type != "cpu" for weight in matrices):
        reason = f"the model is on {model.device.type}, and only the CPU's kernels read them"
    if reason is None and any(weight.dtype not in DTYPES for weight in matrices):
        reason = f"they are made from float32, bfloat16 or float16, not from {model.dtype}".replace("torch.", "")
    if reason is None and not _all_known(anatomy, plan):
        reason = "neurons are chosen in 4-bit groups, and the kernels do not know the activation, or the packed format"
    if reason is not None:
        way = "leave them out" if plan.weights != AS_PACKED else "pack it first"
        if plan.rounding is not None:
            way = "pack it with this plan (`coreskip pack --plan`, or coreskip.pack) and use what that writes"
        raise CoreskipError(f"weights in {plan.weights} cannot be used: {reason}; {way}")


def _all_known(anatomy: Anatomy, plan: Plan) -> bool:
    """Whether every MLP whose neurons the plan chooses in 4-bit groups can be read so."""
    layers = Program.of(anatomy, plan).layers
    chosen = [mlp for index, mlp in anatomy.present if any(brick.in_groups for brick in layers[index].bricks)]
    return all(known_in_groups(mlp, canonical_activation(mlp.act)) for mlp in chosen)


def _of_packed(weights: str | None, packed: int, linears: int) -> str | None:
    """Why a format is not that of a model some of whose linears are packed, if it is not."""
    if weights == AS_PACKED:
        return None if packed else "the model is not packed"
    if packed == linears:
        return "the model is packed, in a format of its own (load it with packed=False to pack it anew)"
    return None


def format_takers(model: Any, anatomy: Anatomy) -> list[Any]:
    """The modules whose matrices a plan's format is for: all linears of the decoder layers, but for those of routers,
    and the LM head."""
    choose = routing_modules(anatomy)
    inner = [module for layer in anatomy.layers for module in layer.modules() if module not in choose]
    return [m for m in (*inner, model.get_output_embeddings()) if takes_format(m)]


def routing_modules(anatomy: Anatomy) -> set[nn.Module]:
    """What decides about experts: small, and read as it was loaded, for a rounded choice is another expert."""
    found = set[nn.Module]()
    for experts in filter(None, anatomy.experts):
        found |= {*experts.block.modules()} - ({*experts.shared.owner.modules()} if experts.shared else set())
    return found


def takes_format(module: nn.Module) -> bool:
    """Whether the module multiplies with one matrix, and does nothing else, so that this may be packed."""
    return is_plain_linear(module) and cast(Any, module).weight.ndim == 2


class Formats:
    """The matrices of one wrapped model in the plan's format, each packed when a module first needs it.

    weights: the plan's "int4" or "int8", or None: nothing takes a format. head: the LM head, which takes bytes.
    before: what was packed before, and is added to; None where the originals are not to be held.
    of_gpu: whether a GPU's kernels read what is packed.
    """

    of_gpu = False

    def __init__(self, weights: str | None, head: nn.Module, before: PackedBefore | None) -> None:
        self._weights, self._format = weights, KERNEL_FORMATS[weights]
        self._head, self._before = head, before
        self._parts: dict[nn.Module, list[PackedLinear]] = {}
        self._experts: dict[nn.Module, list[Expert]] = {}

    def clear(self) -> None:
        """Forget everything: the model's own weights were moved, cast or loaded anew."""
        self._parts.clear()
        self._experts.clear()

    def take(self, module: nn.Module, parts: list[PackedLinear]) -> None:
        """The native step has packed the module's matrix: `parts` are its rows."""
        self._parts[module] = parts

    @staticmethod
    def apply(step: Pass | None, verifies: bool) -> bool:
        """Whether modules multiply with packed numbers in a pass. A prompt that nobody goes on from is scored, by the
        dense model. verifies: whether the model is in exact mode, whose prompts are the dense model's own."""
        if step is None or torch.is_grad_enabled() or mode().as_loaded:
            return False
        if step.phase is Phase.PREFILL:
            return step.cached and not (verifies or mode().densely)
        return step.phase is Phase.DECODE

    def parts(self, module: nn.Module) -> list[PackedLinear]:
        """The rows of the module's matrix in the plan's format; none where it has no such form."""
        parts = self._parts.get(module)
        if parts is None:
            parts = module.parts(whole=False) if isinstance(module, PackedLayer) else self._pack(module)
            self._parts[module] = parts
        return parts

    def product(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """x ``[..., inputs]`` times the module's matrix in the plan's format; None where it has no such form."""
        parts = self.parts(module)
        return product(x, parts) if parts else None

    def experts(self, mixture: Experts) -> list[Expert]:
        """A mixture's experts in the plan's format; none where they have no such form."""
        module = mixture.module
        if module not in self._experts:
            if isinstance(module, HeldExperts):
                self._experts[module] = module.experts(whole=False)
            else:
                self._experts[module] = self._packed_experts(mixture)
        return self._experts[module]

    def _packed_experts(self, mixture: Experts) -> list[Expert]:
        def pack(matrices: Sequence[tuple[Tensor, Tensor | None]]) -> list[PackedLinear]:
            before = self._before or {}
            keys = [(w.data_ptr(), w.shape, w.stride(), self._format) for w, _ in matrices]
            if all(key in before for key in keys):
                return [before[key][1] for key in keys]
            return side_by_side((PackedLinear.pack(w, bias, fmt=self._format), w) for w, bias in matrices)

        try:
            return [] if self._format is None else packed_of(mixture, pack)
        except (TypeError, ValueError) as reason:
            logger.warning("the experts of a %s stay as they were loaded: %s", type(mixture.block).__name__, reason)
            return []

    def _pack(self, module: nn.Module) -> list[PackedLinear]:
        if self._format is None:  # of a packed model, the linears that are not
            return []
        weight, bias = rows_of(module)
        fmt = HEAD_FORMAT if module is self._head else self._format
        key = (weight.data_ptr(), weight.shape, weight.stride(), fmt)
        if self._before is not None and key in self._before:
            return [self._before[key][1]]
        try:
            packed = PackedLinear.pack(weight, bias, fmt=fmt)
        except (TypeError, ValueError) as reason:  # numbers without such a form, or cast to a type without one
            logger.warning("a %s of %d x %d stays as it was loaded: %s", type(module).__name__, *weight.shape, reason)
            return []
        if self._before is not None:  # with the weight: while it is alive, its address is no other's
            self._before[key] = weight, packed
        return [packed]
