"""A model's matrices as the kernels read them, each packed when it is first needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import residency
from ..kernels.groups import TILE
from ..kernels.memory import Reused
from ..kernels.neuron_groups import Form, PackedNeurons
from ..kernels.ops import available
from ..kernels.packed import ACTS, Act, PackedColumns, PackedLinear, PackedMLP
from ..kernels.sparse import RowLists, SlimMLP, SparseLinear, SparseMLP
from ..predictors.anatomy import Anatomy, FeedForward, Matrices, canonical_activation, rows_of
from ..predictors.errors import CoreskipError
from .packed_layer import PackedLayer
from .slim import PartsOf, chosen, linears_of, of_layers, packed_parts, slimmed

logger = logging.getLogger("coreskip")

#: an MLP of which a decode step leaves neurons out
FewerNeurons = SparseMLP | SlimMLP
_AT_ONCE = 256  # neurons that are packed at once where they go to a file
#: what was packed, by the matrix that it is of
PackedBefore = dict[tuple[Any, ...], tuple[Tensor, PackedLinear]]


class Weights:
    """The packed weights of one model: bundles of neurons by layer, columns of linears, and matrices of native steps.

    linears: the matrices of native steps; what is packed is added to them.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.acts = _acts(anatomy)
        self._mlps: dict[tuple[int, str | None], tuple[PackedMLP, Tensor | None]] = {}
        self._groups: dict[tuple[int, Form], PackedNeurons] = {}
        self._alike: dict[tuple[int, str | None], tuple[Tensor, FewerNeurons]] = {}  # with the neurons that it is of
        self._columns: dict[nn.Module, PackedColumns] = {}
        self.linears: PackedBefore = {}
        self._reused = Reused()
        #: what lists of neurons become where a plan's format is a GPU's
        self.in_groups_of_gpu: Callable[[int, Tensor], SparseMLP] | None = None

    def clear(self) -> None:
        """Forget everything: the model's own weights were moved, cast or loaded anew."""
        self._mlps.clear()
        self._groups.clear()
        self._alike.clear()
        self._columns.clear()
        self.linears.clear()

    def forget(self, modules: Collection[nn.Module], layers: Collection[int]) -> None:
        """Forget what was packed of some modules, and of the MLPs of some layers: they were changed."""
        self.acts = _acts(self.anatomy)
        self.linears.clear()
        for key in [key for key in self._mlps if key[0] in layers]:
            del self._mlps[key]
        for layer, form in [key for key in self._groups if key[0] in layers]:
            del self._groups[layer, form]
        for layer, fmt in [key for key in self._alike if key[0] in layers]:
            del self._alike[layer, fmt]
        for module in modules:
            self._columns.pop(module, None)

    def sparse(self, layer: int, pack: Callable[[Bundles], FewerNeurons], fmt: str | None = None) -> FewerNeurons:
        """What `pack`, of a brick's program, makes of a layer; fmt: of neurons that are packed for themselves."""
        return pack(Bundles(self, layer, fmt))

    def mlp(self, layer: int, fmt: str | None, smooth: Tensor | None = None) -> PackedMLP:
        """A layer's MLP, for inputs that are divided by `smooth` where it is given."""
        found = self._mlps.get((layer, fmt))
        if found is None or found[1] is not smooth:
            holder = self._holder(layer)
            far = holder is not None and holder.bundled
            packed = self._put_away(holder, layer, fmt, smooth) if far else self._pack(layer, fmt, smooth)
            found = self._mlps[layer, fmt] = packed, smooth
        return found[0]

    def groups(self, layer: int, form: Form) -> PackedNeurons:
        """A layer's MLP in 4-bit groups by neuron: the numbers of its matrices as native steps read them in int4."""
        found = self._groups.get((layer, form))
        if found is None:
            try:
                parts = _int4_parts(self.anatomy.mlp(layer))
            except ValueError as error:
                raise CoreskipError(f"the MLP of layer {layer} has no 4-bit groups: {error}") from None
            found = self._groups[layer, form] = PackedNeurons.pack(*parts, act=self.acts[layer], form=form)
        return found

    def listed(self, layer: int, fmt: str | None, lists: Tensor) -> SparseMLP:
        """A layer's MLP over listed neurons, int64 ``[k]`` for all rows or ``[rows, k]``, ascending; in "int4" where it
        can be had so, else in 8 bits.

        All neurons are packed, once. But where the layer's matrices are not in memory (kernels/residency.py) nobody
        else will want them: then those alone that are listed, which are numbered anew where the form allows it.
        """
        if fmt is not None and self.in_groups_of_gpu is not None:
            return self.in_groups_of_gpu(layer, lists)
        packed = self._listable(layer, fmt) if not self._far(layer) else self._only(layer, fmt, lists.unique())
        if isinstance(packed, PackedMLP) and packed.intermediate_size < self.anatomy.mlp(layer).intermediate_size:
            lists = torch.searchsorted(lists.unique(), lists)
        lists = lists.to(packed.device)
        rows = RowLists.shared(lists) if lists.dim() == 1 else RowLists.of(lists, packed.intermediate_size)
        return SparseMLP(packed, lists=rows)

    def alone(self, layer: int, fmt: str | None, kept: Tensor) -> FewerNeurons:
        """A layer's MLP of neurons that are the same for every text, int64 ``[k]``, ascending: smaller matrices where a
        CPU's kernels read them, else lists."""
        of, found = self._alike.get((layer, fmt), (None, None))
        if found is None or of is not kept:
            mlp = self.anatomy.mlp(layer)
            found = slimmed(mlp, self.acts[layer], kept, fmt) if reads_matrices(mlp) else None
            found = found or self.listed(layer, fmt, kept)
            self._alike[layer, fmt] = kept, found
        return found

    @property
    def reusable(self) -> int:
        """Bytes of memory that earlier prompts' neurons were in, and nobody's are."""
        return self._reused.spare

    def chosen(self, layer: int, kept: Tensor, parts_of: PartsOf, room: bool) -> SlimMLP | None:
        """A layer's MLP of the neurons that prompts have chosen, int64 ascending, ``[k]`` for all rows or
        ``[rows, k]``; None where it has none in int4 tiles: then `listed` is how steps read them. They are matrices of
        their own where all rows chose the same and there is `room`, or where the layer's are not in memory: see
        `slim.chosen`. parts_of: its linears as steps read them."""
        mlp, far = self.anatomy.mlp(layer), self._far(layer)
        if self.in_groups_of_gpu is not None or not self.in_groups(layer):
            return None
        own = far or (room and kept.dim() == 1)
        memory = None if far else self._reused  # what is kept for the next text counts as nobody's under a cap
        found = chosen(mlp, self.acts[layer], kept, parts_of, memory, own)
        if found is not None and own and not far:
            self._reused.most = self._reused.largest * len(self.anatomy)
        return found

    def _listable(self, layer: int, fmt: str | None) -> PackedMLP | PackedNeurons:
        if fmt != "int4":
            return self.mlp(layer, fmt)
        try:
            return self.groups(layer, "listed") if self.in_groups(layer) else self.mlp(layer, "int8")
        except CoreskipError as error:  # a NaN was written to it
            logger.warning("%s; its listed neurons are read in 8 bits", error)
            return self.mlp(layer, "int8")

    def _far(self, layer: int) -> bool:
        return self._holder(layer) is not None

    def _holder(self, layer: int) -> Any:
        """Who keeps a layer's matrices where they are not in memory."""
        up: Any = self.anatomy.mlp(layer).up
        weight = up.parts()[0].weight if isinstance(up, PackedLayer) else up.weight
        return residency.of(weight.data_ptr())

    def _put_away(self, holder: Any, layer: int, fmt: str | None, smooth: Tensor | None) -> PackedMLP:
        """A layer's MLP of which only what chooses neurons stays in memory: the rest goes to a file, mapped."""
        count, some = self.anatomy.mlp(layer).intermediate_size, list[PackedMLP]()
        weights = self.anatomy.mlp(layer).matrices()

        def bundles() -> Iterator[Tensor]:
            for first in range(0, count, _AT_ONCE):
                only = torch.arange(first, min(first + _AT_ONCE, count), device="cpu")
                packed = self._pack(layer, fmt, smooth, only, weights)
                what = "weight" if packed.low is None else "low"
                yield getattr(packed, what)
                gone: dict[str, Any] = {what: torch.empty(0, device="cpu")}
                some.append(replace(packed, **gone))

        far = holder.put_bundles(bundles())
        stays: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in some])
            for name in ("weight", "scale", "norm", "gate_bias", "up_bias")
            if getattr(some[0], name) is not None
        }
        stays["weight" if some[0].low is None else "low"] = far
        return replace(some[0], **stays)

    def _only(self, layer: int, fmt: str | None, only: Tensor) -> PackedMLP | PackedNeurons:
        if fmt == "int4" and self.in_groups(layer):
            return PackedNeurons.pack(*_int4_parts(self.anatomy.mlp(layer)), act=self.acts[layer], only=only)
        return self._pack(layer, "int8" if fmt == "int4" else fmt, None, only)

    def in_groups(self, layer: int) -> bool:
        """Whether a layer's MLP can be had in 4-bit groups by neuron here."""
        return known_in_groups(self.anatomy.mlp(layer), self.acts[layer])

    def _pack(
        self,
        layer: int,
        fmt: str | None,
        smooth: Tensor | None,
        only: Tensor | None = None,
        weights: Matrices | None = None,
    ) -> PackedMLP:
        """weights: the layer's, where somebody has them. only: of these neurons."""
        w = weights or self.anatomy.mlp(layer).matrices()
        if weights is not None and only is not None:
            w, only = _rows_of(w, only), None
        columns = 1 if smooth is None else smooth.to(w.up)
        return PackedMLP.pack(
            w.gate if w.gate is None or smooth is None else w.gate * columns,
            w.up if smooth is None else w.up * columns,
            w.down,
            act=self.acts[layer],
            gate_bias=w.gate_bias,
            up_bias=w.up_bias,
            down_bias=w.down_bias,
            indices=only,
            fmt=fmt,
        )

    def columns(self, module: nn.Module) -> PackedColumns:
        packed = self._columns.get(module)
        if packed is None:
            packed = self._columns[module] = PackedColumns.pack(*rows_of(module))
        return packed

    def sparse_linears(
        self, module: nn.Module, threshold: float, by_norm: bool, parts: dict[str, int], neuron: float
    ) -> dict[str, SparseLinear]:
        """A linear that leaves out small inputs, in the parts that a native step has of it: outputs by name.

        neuron: the weights of one neuron, for linears of the MLP; 0 of others, which count as none.
        """
        columns, first, found = self.columns(module), 0, {}
        for part, outputs in parts.items():
            worth = outputs / neuron if neuron else 0.0
            found[part] = SparseLinear(columns.part(first, outputs), threshold, by_norm, worth)
            first += outputs
        return found


@dataclass(frozen=True)
class Bundles:
    """One layer's neurons as a policy's builder packs them. fmt: of listed neurons: None, as loaded; "int8"; or "int4"
    groups."""

    weights: Weights
    layer: int
    fmt: str | None

    @property
    def act(self) -> Act:
        return self.weights.acts[self.layer]

    def matrices(self) -> Matrices:
        """The weights as they are now, one row per neuron."""
        return self.weights.anatomy.mlp(self.layer).matrices()

    def scoring_weights(self) -> Tensor:
        """The gate's, in a plain MLP the up's, ``[neurons, hidden]``."""
        w = self.matrices()
        return w.up if w.gate is None else w.gate

    def down_norms(self) -> Tensor:
        """The norm of each neuron's row of the down projection, fp32 ``[neurons]``."""
        norms: Tensor = self.matrices().down.float().norm(dim=1)
        return norms

    def every(self, fmt: str | None, smooth: Tensor | None = None) -> PackedMLP:
        """All neurons, packed once for all who want them so."""
        return self.weights.mlp(self.layer, fmt, smooth)

    def listed(self, indices: Tensor) -> SparseMLP:
        """These neurons, int64 ascending: a list over all that are packed, which are not copied."""
        return self.weights.listed(self.layer, self.fmt, indices)

    def alone(self, indices: Tensor) -> FewerNeurons:
        """These neurons, int64 ascending, for every text."""
        return self.weights.alone(self.layer, self.fmt, indices)

    def groups(self, form: Form) -> PackedNeurons:
        """All neurons in 4-bit groups."""
        return self.weights.groups(self.layer, form)

    @staticmethod
    def normed(packed: PackedMLP, norm: Tensor | None) -> PackedMLP:
        """With other norms than those of the down projection, where there are any."""
        return packed if norm is None else replace(packed, norm=norm.to(packed.weight.device))


def _rows_of(w: Matrices, only: Tensor) -> Matrices:
    """Of some neurons alone, that follow one another: as views."""
    some = slice(int(only[0]), int(only[-1]) + 1)
    gate = None if w.gate is None else w.gate[some]
    biases = [None if bias is None else bias[some] for bias in (w.gate_bias, w.up_bias)]
    return Matrices(gate, w.up[some], w.down[some], biases[0], biases[1], w.down_bias)


# ---- MLPs in 4-bit groups ----


def _acts(anatomy: Anatomy) -> dict[int, Act]:
    return {index: canonical_activation(mlp.act) for index, mlp in anatomy.present}


def reads_matrices(mlp: FeedForward) -> bool:
    """Whether a CPU's kernels read an MLP."""
    weight: Any = mlp.down.weight
    return (isinstance(mlp.down, PackedLayer) or weight.device.type == "cpu") and available("cpu") is None


def known_in_groups(mlp: FeedForward, act: Act) -> bool:
    """Whether kernels can read an MLP with this activation in 4-bit groups by neuron, here and from its matrices."""
    return reads_matrices(mlp) and act in ACTS and _fits_int4(mlp)


def packed_in_four_bits(mlp: FeedForward) -> bool:
    """Whether all matrices of an MLP exist in int4 tiles alone."""
    return all(isinstance(module, PackedLayer) for module in linears_of(mlp)) and _fits_int4(mlp)


def _fits_int4(mlp: FeedForward) -> bool:
    """Whether matrices that exist in packed form alone are int4 tiles; others can be rounded to them."""
    if isinstance(mlp.up, PackedLayer) and mlp.stacked and len(mlp.up.formats) == 1 and mlp.intermediate_size % TILE:
        return False  # a tile belongs to two projections
    packed = [module for module in linears_of(mlp) if isinstance(module, PackedLayer)]
    return all(form == "int4" for module in packed for form in module.formats)


def _int4_parts(mlp: FeedForward) -> tuple[PackedLinear | None, PackedLinear, PackedLinear]:
    """Gate, up and down in int4 tiles: as they are, or rounded as native steps round them."""
    if not isinstance(mlp.up, PackedLayer):
        w = mlp.matrices()
        gate = None if w.gate is None else PackedLinear.pack(w.gate, w.gate_bias, fmt="int4")
        up = PackedLinear.pack(w.up, w.up_bias, fmt="int4")
        return gate, up, PackedLinear.pack(w.down.t(), w.down_bias, fmt="int4")
    parts = packed_parts(mlp, of_layers())
    return (parts[0], parts[1], parts[2]) if mlp.gated else (None, parts[0], parts[1])


def neuron_weights(hidden: int, gated: bool) -> float:
    """How many weights one neuron has."""
    return float((3 if gated else 2) * hidden)
