"""A model's matrices as the kernels read them, each packed when it is first needed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..kernels.packed import Act, PackedColumns, PackedLinear, PackedMLP
from ..kernels.sparse import SparseLinear, SparseMLP
from ..predictors.anatomy import Anatomy, Matrices, canonical_activation, rows_of

#: what was packed, by the matrix that it is of
PackedBefore = dict[tuple[Any, ...], tuple[Tensor, PackedLinear]]


class Weights:
    """The packed weights of one model: bundles of neurons by layer, columns of linears, and matrices of native steps.

    linears: the matrices of native steps; what is packed is added to them.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.acts = [canonical_activation(layer.act) for layer in anatomy.mlps]
        self._mlps: dict[tuple[int, str | None], tuple[PackedMLP, Tensor | None]] = {}
        self._columns: dict[nn.Module, PackedColumns] = {}
        self.linears: PackedBefore = {}

    def clear(self) -> None:
        """Forget everything: the model's own weights were moved, cast or loaded anew."""
        self._mlps.clear()
        self._columns.clear()
        self.linears.clear()

    def forget(self, modules: Collection[nn.Module], layers: Collection[int]) -> None:
        """Forget what was packed of some modules, and of the MLPs of some layers: they were changed."""
        self.acts = [canonical_activation(layer.act) for layer in self.anatomy.mlps]
        self.linears.clear()
        for key in [key for key in self._mlps if key[0] in layers]:
            del self._mlps[key]
        for module in modules:
            self._columns.pop(module, None)

    def sparse(self, layer: int, pack: Callable[[Bundles], SparseMLP], fmt: str | None = None) -> SparseMLP:
        """What `pack`, of a brick's program, makes of a layer; fmt: of neurons that are packed for themselves."""
        return pack(Bundles(self, layer, fmt))

    def mlp(self, layer: int, fmt: str | None, smooth: Tensor | None = None) -> PackedMLP:
        """A layer's MLP, for inputs that are divided by `smooth` where it is given."""
        found = self._mlps.get((layer, fmt))
        if found is None or found[1] is not smooth:
            found = self._mlps[layer, fmt] = self.pack(layer, fmt=fmt, smooth=smooth), smooth
        return found[0]

    def pack(
        self,
        layer: int,
        *,
        fmt: str | None = None,
        indices: Tensor | None = None,
        smooth: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> PackedMLP:
        """A layer's MLP, or some of its neurons, packed anew; memory: see `PackedMLP.pack`."""
        w = self.anatomy.mlps[layer].matrices()
        columns = 1 if smooth is None else smooth.to(w.up)
        return PackedMLP.pack(
            w.gate if w.gate is None or smooth is None else w.gate * columns,
            w.up if smooth is None else w.up * columns,
            w.down,
            act=self.acts[layer],
            gate_bias=w.gate_bias,
            up_bias=w.up_bias,
            down_bias=w.down_bias,
            indices=None if indices is None else indices.to(w.up.device),
            fmt=fmt,
            memory=memory,
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
    """One layer's neurons as a policy's builder packs them. fmt: of neurons that are packed for themselves."""

    weights: Weights
    layer: int
    fmt: str | None

    @property
    def act(self) -> Act:
        return self.weights.acts[self.layer]

    def matrices(self) -> Matrices:
        """The weights as they are now, one row per neuron."""
        return self.weights.anatomy.mlps[self.layer].matrices()

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

    def some(self, indices: Tensor) -> PackedMLP:
        """These neurons."""
        return self.weights.pack(self.layer, fmt=self.fmt, indices=indices)

    @staticmethod
    def normed(packed: PackedMLP, norm: Tensor | None) -> PackedMLP:
        """With other norms than those of the down projection, where there are any."""
        return packed if norm is None else replace(packed, norm=norm.to(packed.weight.device))


def neuron_weights(hidden: int, gated: bool) -> float:
    """How many weights one neuron has."""
    return float((3 if gated else 2) * hidden)
