"""A plan's weight format on a GPU: matrices in groups of 4 or 8 bits beside a model's own, or in their place.

One packed copy serves the lowered steps (gpu_model.py) and the modules: a few rows of inputs are multiplied as steps
multiply, more (prompts) with a matrix that is unpacked for the length of the call, a linear at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels import gpu_step as kernel
from ..kernels.gpu_formats import GroupedMatrix
from ..kernels.packed import DTYPES
from ..kernels.sparse import RowLists, SparseMLP
from ..predictors.anatomy import Anatomy, Experts, rows_of
from ..predictors.errors import CoreskipError
from ..predictors.plan import Plan
from ..predictors.policies import Chooser
from .bundles import Weights
from .formats import Formats, check_format, format_takers
from .lower_cpu import HEAD_FORMAT, KERNEL_FORMATS
from .packed_layer import PackedLayer
from .program import Program
from .release import Replaced

logger = logging.getLogger("coreskip")


def packs_for(model: Any) -> bool:
    """Whether the plan's formats of this model are those of a GPU."""
    return bool(next(model.parameters()).device.type == "cuda")


def check_any_format(model: Any, anatomy: Anatomy, plan: Plan) -> None:
    """Raises CoreskipError where decode steps of `model` cannot read their weights in the plan's format."""
    if plan.weights is not None and packs_for(model):
        check_format_of_gpu(model, anatomy, plan)
    else:
        check_format(model, anatomy, plan)


def check_format_of_gpu(model: Any, anatomy: Anatomy, plan: Plan) -> None:
    """The same of a model on a GPU."""
    matrices, reason = [m.weight for m in format_takers(model, anatomy)], None
    if plan.weights not in ("int4", "int8"):
        reason = "a GPU has matrices in int4 and in int8"
    elif any(isinstance(m, PackedLayer) for m in format_takers(model, anatomy)):
        reason = "the model is packed for a CPU (load it with packed=False)"
    elif any(w.dtype not in DTYPES for w in matrices):
        reason = f"they are made from float32, bfloat16 or float16, not from {model.dtype}".replace("torch.", "")
    elif Program.of(anatomy, plan).chosen_by(Chooser.TOKEN):
        reason = "a GPU chooses neurons token by token among 16-bit weights alone"
    if reason is not None:
        raise CoreskipError(f"weights in {plan.weights} cannot be used: {reason}; leave them out")


# ---- neurons ----


@dataclass(frozen=True, eq=False)
class GroupedMLP:
    """down(act(gate) * up) of what `widening` gives, all gates before all ups; of a plain MLP down(act(up)).

    Where fewer neurons than it has inputs are given, `down` has the first groups of its inputs alone.
    """

    widening: tuple[GroupedMatrix, ...]
    down: GroupedMatrix
    gated: bool
    act: str

    @property
    def intermediate_size(self) -> int:
        return sum(matrix.out_features for matrix in self.widening) // (2 if self.gated else 1)

    @property
    def device(self) -> torch.device:
        return self.down.device

    @property
    def halves(self) -> tuple[GroupedMatrix, ...]:
        """All gates and all ups, each a matrix of its own, or the ups."""
        if not self.gated or len(self.widening) == 2:
            return self.widening
        (both,) = self.widening
        return both.rows(0, self.intermediate_size), both.rows(self.intermediate_size, self.intermediate_size)

    def activations(self, rows: Tensor) -> Tensor:
        """float32 ``[R, neurons]``."""
        wide = kernel.linears(rows, self.widening, dtype=torch.float32)
        return cast(Tensor, kernel.act_mul(wide, self.act, gated=self.gated))


@dataclass(frozen=True, eq=False)
class SlicedMLP(SparseMLP):
    """Listed neurons of an MLP in groups. `packed` is a `GroupedMLP`, of which those that the plan keeps are views.

    What is left out of a list is 0 where the down projection meets it: its numbers are those of the whole matrix, whose
    groups hold neighbours.
    """

    @property
    def groups(self) -> GroupedMLP:
        return cast(GroupedMLP, self.packed)

    @property
    def rounds(self) -> bool:
        return True

    def _compute(self, x: Tensor, counting: bool) -> tuple[Tensor, int | None]:
        rows = x.reshape(-1, x.shape[-1])
        h = self.groups.activations(rows)
        if self.lists is not None:
            h = h * self._wanted(self.lists, h)
        y = kernel.linear(h, self.groups.down, dtype=x.dtype)
        return y.view_as(x), self.listed_neurons * rows.shape[0]

    @staticmethod
    def _wanted(lists: RowLists, h: Tensor) -> Tensor:
        """Of each token and neuron, whether it is listed."""
        if lists.wanted is None:
            return h.new_zeros(h.shape[1]).index_fill_(0, lists.listed, 1.0)
        return lists.wanted.t().to(h.dtype).repeat_interleave(h.shape[0] // lists.wanted.shape[1], 0)


# ---- formats ----


class GpuFormats(Formats):
    """`Formats` of a model on a GPU.

    Attributes:
        kept: MLPs whose neurons the plan keeps lie first, by layer: these alone.
    """

    of_gpu = True

    def __init__(self, weights: str | None, head: nn.Module) -> None:
        super().__init__(weights, head, None)
        self._matrices: dict[nn.Module, list[GroupedMatrix]] = {}
        self.kept: dict[int, GroupedMLP] = {}

    def clear(self) -> None:
        """Forget everything but what exists in groups alone."""
        super().clear()
        alone = {m: parts for m, parts in self._matrices.items() if cast(Any, m).weight.is_meta}
        biases = {m: cast(Any, m).bias for m in alone}
        self._matrices = {m: parts if len(parts) > 1 else renewed(parts, biases[m]) for m, parts in alone.items()}
        if not alone:
            self.kept.clear()

    def held(self, module: nn.Module) -> list[GroupedMatrix] | None:
        """What was packed of a linear; None where nothing was yet."""
        return self._matrices.get(module)

    def hold(self, module: nn.Module, parts: list[GroupedMatrix]) -> None:
        """A linear was packed: `parts` are its rows."""
        self._matrices[module] = parts

    def matrices(self, module: Any) -> list[GroupedMatrix]:
        """The rows of a linear's matrix in groups; none where it has no such form."""
        if module not in self._matrices:
            weight, bias = rows_of(module)
            if weight.is_meta or not bool(weight.isfinite().all()):
                logger.warning("a %s stays as it was loaded: it has infinities or NaNs", type(module).__name__)
                self._matrices[module] = []
            else:
                fmt = HEAD_FORMAT if module is self._head else str(KERNEL_FORMATS[self._weights])
                self._matrices[module] = [GroupedMatrix.round(weight.detach(), bias, fmt)]
        return self._matrices[module]

    def product(self, module: nn.Module, x: Tensor) -> Tensor | None:
        parts = self.matrices(module)
        return multiply(x, parts) if parts else None

    def experts(self, mixture: Experts) -> list[Any]:
        return []  # stay as they were loaded


def multiply(x: Tensor, parts: Sequence[GroupedMatrix]) -> Tensor:
    """x ``[..., inputs]`` times the matrix whose rows are those of `parts`, in the dtype of x."""
    rows = x.reshape(-1, x.shape[-1])
    return kernel.linears(rows, parts, dtype=x.dtype).view(*x.shape[:-1], -1)


class GpuReplaced(Replaced):
    """The linears of a model on a GPU whose matrices exist in groups alone, which has rounded them."""

    def hold(self, module: nn.Module, parts: list[GroupedMatrix]) -> bool:
        """Lets go of the matrix of `module`, whose rows are those of `parts`, where that is allowed: whether it was."""
        if module not in self.candidates or not self._lossy:
            return False
        self._let_go(module, cast(Any, parts), lossless=False)
        return True

    def product(self, module: nn.Module, x: Tensor) -> Tensor:
        return multiply(x, cast(Any, self.parts(module)))

    def run(self, module: nn.Module, x: Tensor, few: bool) -> Tensor:
        """x times the numbers that the groups stand for, unrounded."""
        parts: list[Any] = list(self.parts(module))
        return torch.cat(
            [
                nn.functional.linear(x, part.floats(x.dtype), None if part.bias is None else part.bias.to(x.dtype))
                for part in parts
            ],
            -1,
        )


class GpuWeights:
    """Listed neurons of one model in groups: what `Weights.listed` gives where the plan's format is a GPU's."""

    def __init__(self, weights: Weights, formats: GpuFormats) -> None:
        self._weights, self._formats = weights, formats
        self._whole: dict[int, GroupedMLP] = {}

    def __call__(self, layer: int, lists: Tensor) -> SparseMLP:
        """int64 ``[k]`` for all rows, or ``[rows, k]``, ascending."""
        kept = self._formats.kept.get(layer)
        if kept is not None:
            return SlicedMLP(cast(Any, kept))
        mlp = self._weights.anatomy.mlp(layer)
        linears = [mlp.up] if mlp.gate_name is None else [getattr(mlp.owner, mlp.gate_name), mlp.up]
        widening = [part for module in linears for part in self._formats.matrices(module)]
        (down,) = self._formats.matrices(mlp.down)
        whole = GroupedMLP(tuple(widening), down, mlp.gated, str(self._weights.acts[layer]))
        lists = lists.to(down.device)
        found = RowLists.shared(lists) if lists.dim() == 1 else RowLists.of(lists, whole.intermediate_size)
        return SlicedMLP(cast(Any, whole), lists=found)


def kept_first(program: Program) -> dict[int, Tensor]:
    """By layer, the neurons that the plan keeps whatever the text, where that is not all of them."""
    found = program.chosen_by(Chooser.CALIBRATION)
    lists = {layer: getattr(brick.policy, "indices", None) for layer, brick in found.items()}
    return {layer: indices for layer, indices in lists.items() if isinstance(indices, Tensor)}


def renewed(parts: list[GroupedMatrix], bias: Tensor | None) -> list[GroupedMatrix]:
    """The same matrices with the bias as it is now."""
    if bias is None:
        return parts
    every = bias.detach().float().split([part.out_features for part in parts])
    return [replace(part, bias=some) for part, some in zip(parts, every, strict=True)]
