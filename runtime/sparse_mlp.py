"""From a policy that chooses token by token to the arithmetic of a decode step.

`SparseMLP` and `SparseColumns` are descriptions: packed weights, a rule and an amount. The patched modules run them
through the kernels' ops; a native decode step may read the same fields instead.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..kernels import reference
from ..kernels.ops import (
    PackedColumns,
    PackedLinear,
    PackedMLP,
    column_linear,
    gate_mlp,
    gate_select,
    linear,
    mlp,
    sketch_mlp,
    sketch_select,
)
from ..kernels.packed import ACTS, Act
from ..kernels.step import SparseLinear
from ..predictors.anatomy import Anatomy, canonical_activation, rows_of
from ..predictors.errors import PlanError
from ..predictors.plan import Learned, NeuronPolicy, Sketch, Threshold, TopK

Scorer = Callable[[Tensor], Tensor]

#: Policies that choose token by token, of whole neurons (`Threshold` only by the rule "cats").
TOKEN_POLICIES = (Threshold, TopK, Sketch, Learned)


@dataclass(frozen=True, eq=False)
class SparseMLP:
    """One layer's MLP at a decode step.

    Attributes:
        packed: the weights, with means and norms as the rule needs them.
        rule: ``sketch`` and ``gate`` are the kernels' own; ``listed`` computes the neurons that `scorer` puts first,
            without a scorer all that are packed.
        keep, threshold: how many neurons per token, or the least score; both None: all.
        scorer: inputs ``[rows, hidden]`` to scores ``[rows, neurons]``, for the rule ``listed`` alone.
        smooth: float32 ``[hidden]``, what the inputs are multiplied by before they are rounded; `packed` has the
            inverse in its columns.
        refine: of the neurons that a sketch chooses, those with an exact score below this are dropped; 0: none.
    """

    packed: PackedMLP
    rule: Literal["listed", "sketch", "gate"] = "listed"
    keep: int | None = None
    threshold: float | None = None
    scorer: Scorer | None = None
    smooth: Tensor | None = None
    refine: float = 0.0

    def run(self, x: Tensor, counting: bool = False) -> tuple[Tensor, int | None]:
        """The output for x ``[..., hidden]`` and how many neurons it took, over all rows; None where that was not
        counted: the kernels that choose by threshold do not tell, choosing twice takes time, and a GPU would be waited
        for."""
        if self.smooth is None:
            return self._compute(x, counting)
        y, kept = self._compute(x.float() * self.smooth, counting)
        return y.to(x.dtype), kept

    def _compute(self, x: Tensor, counting: bool) -> tuple[Tensor, int | None]:
        rows = x.numel() // x.shape[-1]
        kept = None if self.keep is None else self.keep * rows
        if self.rule == "listed":
            indices = self._indices(x)
            if indices is None:
                kept = self.packed.intermediate_size * rows
            elif kept is None and counting:
                kept = int((indices >= 0).sum())
            return mlp(x, self.packed, indices), kept
        if counting and kept is None:
            kept = int((self._chosen(x) >= 0).sum())
        if self.rule == "gate":
            return gate_mlp(x, self.packed, keep=self.keep, threshold=self.threshold), kept
        return sketch_mlp(x, self.packed, keep=self.keep, threshold=self.threshold, refine=self.refine), kept

    def _chosen(self, x: Tensor) -> Tensor:
        """The neurons that a kernel's rule computes, int64 ``[rows, k]`` with -1 for none."""
        select = sketch_select if self.rule == "sketch" else gate_select
        chosen = select(x, self.packed, keep=self.keep, threshold=self.threshold)
        return reference.refined(x, self.packed, chosen, self.refine) if self.refine > 0 else chosen

    def _indices(self, x: Tensor) -> Tensor | None:
        if self.scorer is None:
            return None
        scores = self.scorer(x.reshape(-1, x.shape[-1]))
        keep = -1 if self.keep is None else self.keep
        return reference.pick(scores, keep, self.threshold or 0.0)


@dataclass(frozen=True, eq=False)
class SparseColumns:
    """One linear at a decode step: inputs below `threshold`, by |x| or `by_norm` by |x| * |column|, are left out."""

    packed: PackedColumns
    threshold: float
    by_norm: bool

    def run(self, x: Tensor) -> Tensor:
        return column_linear(x, self.packed, threshold=self.threshold, by_norm=self.by_norm)

    def kept(self, x: Tensor) -> int:
        """How many inputs count, over all rows of x."""
        score = x.float().abs() * (self.packed.norm if self.by_norm else 1)
        return int((score >= self.threshold).sum())


class Weights:
    """A model's matrices as the kernels read them, each packed when it is first needed."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.acts = [canonical_activation(layer.act) for layer in anatomy.mlps]
        self._mlps: dict[tuple[int, str | None], tuple[PackedMLP, Tensor | None]] = {}
        self._columns: dict[nn.Module, PackedColumns] = {}
        self.linears: dict[tuple[Any, ...], tuple[Tensor, PackedLinear]] = {}  # of native steps

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

    def native_columns(self, layer: int, policy: Threshold) -> dict[str, SparseLinear]:
        """The linears of a layer that read their inputs by threshold, as a native step has them."""
        names, mlp, found = native_names(self.anatomy, layer), self.anatomy.mlps[layer], {}
        neuron = (3 if mlp.gated else 2) * mlp.hidden_size  # weights
        for name, (module, least, in_mlp) in zip(
            policy.least, column_linears(self.anatomy, layer, policy), strict=True
        ):
            columns, first = self.columns(module), 0
            for part, outputs in names[name].items():
                worth = outputs / neuron if in_mlp else 0.0
                found[part] = SparseLinear(columns.part(first, outputs), least, policy.rule == "wina", worth)
                first += outputs
        return found

    def describe(self, layer: int, policy: NeuronPolicy) -> SparseMLP:
        """What `policy`, one of `TOKEN_POLICIES` that chooses neurons, means for a layer."""
        if isinstance(policy, Threshold):
            return self._by_gate(layer, policy)
        assert isinstance(policy, (TopK, Sketch, Learned))
        nibbles = policy if isinstance(policy, Sketch) and policy.bits == 4 else None
        smooth = None if nibbles is None else nibbles.smooth
        packed = self.mlp(layer, None if nibbles is None else "int8_sliced", smooth)
        if nibbles is not None and nibbles.norm is not None:
            packed = replace(packed, norm=nibbles.norm.to(packed.weight.device))
        if policy.mean is not None:
            packed = packed.compensated(policy.mean)
        keep = policy.kept(packed.intermediate_size) if policy.threshold is None else None
        if nibbles is None:
            return SparseMLP(packed, "listed", keep, policy.threshold, self._scorer(layer, policy))
        factors = None if smooth is None else smooth.to(packed.weight.device).reciprocal()
        return SparseMLP(packed, "sketch", keep, policy.threshold, smooth=factors, refine=nibbles.refine or 0.0)

    def _by_gate(self, layer: int, policy: Threshold) -> SparseMLP:
        packed, least = self.mlp(layer, None), policy.least["act"]
        if packed.gated:
            return SparseMLP(packed, "gate", threshold=least)
        return SparseMLP(packed, threshold=least, scorer=self._exact(layer, None))

    def _scorer(self, layer: int, policy: TopK | Sketch | Learned) -> Scorer:
        w = self.anatomy.mlps[layer].matrices()
        if isinstance(policy, TopK):
            norm = w.down.float().norm(dim=1) if policy.norm is None else policy.norm.to(w.down.device)
            return self._exact(layer, norm)
        if isinstance(policy, Sketch):
            return SignScores.of(w.up if w.gate is None else w.gate)
        return LowRankScores.of(policy, w.up.device)

    def _exact(self, layer: int, norm: Tensor | None) -> ExactScores:
        w = self.anatomy.mlps[layer].matrices()
        gate = None if w.gate is None else PackedLinear.pack(w.gate, w.gate_bias)
        return ExactScores(gate, PackedLinear.pack(w.up, w.up_bias), self.acts[layer], norm)


def native_rule(policy: NeuronPolicy, anatomy: Anatomy, layer: int) -> bool:
    """Whether a native step makes the policy's choice itself."""
    if isinstance(policy, Threshold):
        if policy.rule == "cats":
            return anatomy.mlps[layer].gated
        return policy.least.keys() <= native_names(anatomy, layer).keys()
    return isinstance(policy, Learned) or (isinstance(policy, Sketch) and policy.bits == 4)


def native_names(anatomy: Anatomy, layer: int) -> dict[str, dict[str, int]]:
    """What a native step calls a layer's linears, with their outputs, by the names that a plan has for them.

    One that is fused is several.
    """
    mlp, attention = anatomy.mlps[layer], anatomy.attentions[layer]
    width = mlp.intermediate_size
    names = {
        f"mlp.{mlp.up_name}": {"gate": width, "up": width} if mlp.stacked else {"up": width},
        f"mlp.{mlp.down_name}": {"down": mlp.hidden_size},
    }
    if mlp.gate_name is not None:
        names[f"mlp.{mlp.gate_name}"] = {"gate": width}
    if attention is None or len(attention.inputs) not in (1, 3):
        return names
    outputs, queries = rows_of(getattr(attention.module, attention.output))[0].shape
    names[f"attention.{attention.output}"] = {"o": outputs}
    sizes = [rows_of(getattr(attention.module, name))[0].shape[0] for name in attention.inputs]
    if len(sizes) == 3:
        triples = zip(attention.inputs, "qkv", sizes, strict=True)
        return names | {f"attention.{name}": {part: size} for name, part, size in triples}
    others, rest = divmod(sizes[0] - queries, 2)
    if others > 0 and rest == 0:
        names[f"attention.{attention.inputs[0]}"] = {"q": queries, "k": others, "v": others}
    return names


def column_linears(anatomy: Anatomy, layer: int, policy: Threshold) -> Iterator[tuple[nn.Module, float, bool]]:
    """The linears of a layer that read their inputs by threshold: module, least, and whether it belongs to the MLP.

    Raises:
        PlanError: the plan names a linear that the layer does not have.
    """
    feed_forward, attention = anatomy.mlps[layer], anatomy.attentions[layer]
    owners = {"mlp": feed_forward.owner, "attention": None if attention is None else attention.module}
    for name, least in policy.least.items():
        part, _, attribute = name.partition(".")
        module = getattr(owners[part], attribute, None)
        if not isinstance(module, nn.Module):
            raise PlanError(f"layer {layer} has no linear {name}, for which the plan has a threshold")
        yield module, least, part == "mlp"


# ---- what scores neurons where no kernel does ----


@dataclass(frozen=True, eq=False)
class ExactScores:
    """|act(gate) * up| or |act(up)|, times `norm` where there is one."""

    gate: PackedLinear | None
    up: PackedLinear
    act: Act
    norm: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        act = ACTS[self.act] if isinstance(self.act, str) else self.act
        up = linear(x, self.up)
        a = (act(up) if self.gate is None else act(linear(x, self.gate)) * up).float().abs()
        return a if self.norm is None else a * self.norm


@dataclass(frozen=True, eq=False)
class SignScores:
    """The share of a neuron's weights whose sign is that of the input they meet; zero counts as positive.

    The signs are kept as bytes: a product of bits would need a kernel of its own, and on models without ReLU the rule
    has no use.
    """

    signs: PackedLinear

    @classmethod
    def of(cls, weight: Tensor) -> SignScores:
        """weight: ``[neurons, hidden]``."""
        return cls(PackedLinear.pack(_signs(weight.float()), fmt="int8"))

    def __call__(self, x: Tensor) -> Tensor:
        return 0.5 + linear(_signs(x.float()), self.signs) / (2 * x.shape[-1])


def _signs(values: Tensor) -> Tensor:
    return torch.where(values < 0, -1.0, 1.0)


@dataclass(frozen=True, eq=False)
class LowRankScores:
    """sigmoid(expand @ (reduce @ x) + bias)."""

    reduce: PackedLinear
    expand: PackedLinear

    @classmethod
    def of(cls, policy: Learned, device: torch.device) -> LowRankScores:
        reduce, expand, bias = (t.to(device) for t in (policy.reduce, policy.expand, policy.bias))
        return cls(PackedLinear.pack(reduce), PackedLinear.pack(expand, bias))

    def __call__(self, x: Tensor) -> Tensor:
        return linear(linear(x.float(), self.reduce), self.expand).sigmoid()
