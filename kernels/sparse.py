"""What a decode step computes of an MLP that leaves neurons out, and of a linear that leaves inputs out.

There is one description of each, which the native step (step.py) reads, and which runs by the ops (ops.py) elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from . import reference, taken
from .memory import LINE, Reused
from .neuron_groups import PackedNeurons, neurons
from .ops import MAX_ROWS, column_linear, gate_mlp, gate_select, linear, mlp, sketch_mlp, sketch_select
from .packed import ACTS, Act, PackedColumns, PackedLinear, PackedMLP
from .residency import copied

Scorer = Callable[[Tensor], Tensor]

#: How the neurons of a step are found. ``listed``: all that are packed, or those of lists. ``sketch``, ``gate``: as
#: `ops.sketch_mlp` and `ops.gate_mlp`. ``exact``: by exact scores of candidates, over `PackedNeurons`. ``learned``: by
#: a low-rank predictor. ``scored``: by a function in Python, which native steps do not call.
Rule = Literal["listed", "sketch", "exact", "gate", "learned", "scored"]


@dataclass(frozen=True, eq=False)
class RowLists:
    """Which neurons each row of a batch computes.

    lists: int64 [rows, k], or [1, k] for all rows. listed: int64 [n], those that any row wants, ascending; wanted:
    uint8 [neurons, rows], 1 for who wants what; None: all rows want all that are listed.
    """

    lists: Tensor
    listed: Tensor
    wanted: Tensor | None

    @classmethod
    def of(cls, lists: Tensor, neurons: int) -> RowLists:
        """lists: int64 [rows, k] of indices below `neurons`."""
        wanted = lists.new_zeros((neurons, lists.shape[0]), dtype=torch.uint8)
        wanted.scatter_(0, lists.t(), 1)
        return cls(lists, wanted.any(1).nonzero()[:, 0], wanted)

    @classmethod
    def shared(cls, indices: Tensor) -> RowLists:
        """indices: int64 [k], ascending, for every row."""
        indices = indices.contiguous()
        return cls(indices[None], indices, None)

    @property
    def rows(self) -> int | None:
        """How many rows there must be; None: any number."""
        return None if self.wanted is None else self.wanted.shape[1]

    @property
    def kept(self) -> int:
        """Neurons that each row computes."""
        return self.lists.shape[1]

    def by_row(self, neurons: int) -> Tensor:
        """uint8 [rows, neurons], or [1, neurons] for all rows: 1 for what counts."""
        counts = self.lists.new_zeros((self.lists.shape[0], neurons), dtype=torch.uint8)
        return counts.scatter_(1, self.lists, 1)

    def part(self, first: int, last: int) -> RowLists:
        """Of rows `first` to `last` alone."""
        if self.wanted is None:
            return self
        wanted = self.wanted[:, first:last].contiguous()
        return RowLists(self.lists[first:last], wanted.any(1).nonzero()[:, 0], wanted)


@dataclass(frozen=True, eq=False)
class SparseMLP:
    """One MLP at a decode step, over bundles of neurons.

    Attributes:
        packed: the weights, with means and norms as the rule needs them.
        rule: see `Rule`.
        keep, threshold: how many neurons a token gets, or the least score; exactly one for a rule but ``listed``.
        scorer: of ``scored``: inputs ``[rows, hidden]`` to scores ``[rows, neurons]``.
        predictor: of ``learned``: scores are the second matrix times the first times x, `threshold` is one of their
            sigmoid (which is 1 for many large ones, in float32: nothing is chosen by it).
        smooth: float32 ``[hidden]``, what the inputs are multiplied by before they are rounded; `packed` has the
            inverse in its columns. A native step has it in the norm before the MLP.
        refine: of the neurons that a sketch chooses, or of candidates, those with an exact score below this are
            dropped; 0: none.
        lists: of ``listed``: which of the packed neurons; None: all.
    """

    packed: PackedMLP | PackedNeurons
    rule: Rule = "listed"
    keep: int | None = None
    threshold: float | None = None
    scorer: Scorer | None = None
    predictor: tuple[PackedLinear, PackedLinear] | None = None
    smooth: Tensor | None = None
    refine: float = 0.0
    lists: RowLists | None = None

    @property
    def listed_neurons(self) -> int:
        """Of ``listed``: how many neurons a token takes."""
        return self.packed.intermediate_size if self.lists is None else self.lists.kept

    @property
    def least(self) -> float:
        """The threshold of the scores; 0 where there is none."""
        if self.rule != "learned" or self.threshold is None:
            return self.threshold or 0.0
        return float(torch.tensor(min(self.threshold, 1.0), dtype=torch.float64, device="cpu").logit())

    @property
    def rounds(self) -> bool:
        """Whether x is rounded to 8 bits: of two x that differ in their last bits some values may then differ by a
        step."""
        return isinstance(self.packed, PackedNeurons) or self.packed.scale is not None

    def run(self, x: Tensor, counting: bool = False) -> tuple[Tensor, int | None]:
        """The output for x ``[..., hidden]`` and how many neurons it took, over all rows; None where that was not
        counted: the kernels that choose by threshold do not tell, choosing twice takes time, and a GPU would be waited
        for."""
        if self.smooth is None:
            return self._compute(x, counting)
        y, kept = self._compute(x.float() * self.smooth, counting)
        return y.to(x.dtype), kept

    def _compute(self, x: Tensor, counting: bool) -> tuple[Tensor, int | None]:
        tokens = x.numel() // x.shape[-1]
        if isinstance(self.packed, PackedNeurons):
            return self._in_groups(x, self.packed)
        if self.rule == "listed":
            y = mlp(x, self.packed) if self.lists is None else self._by_row(x, self.packed, self.lists)
            return y, self.listed_neurons * tokens
        kept = None if self.keep is None else self.keep * tokens
        if self.rule in ("learned", "scored"):
            indices = self.picked(x)
            if kept is None and counting:
                kept = int((indices >= 0).sum())
            return mlp(x, self.packed, indices), kept
        if counting and kept is None:
            kept = int((self._chosen(x, self.packed) >= 0).sum())
        if self.rule == "gate":
            return gate_mlp(x, self.packed, keep=self.keep, threshold=self.threshold), kept
        return sketch_mlp(x, self.packed, keep=self.keep, threshold=self.threshold, refine=self.refine), kept

    def _in_groups(self, x: Tensor, packed: PackedNeurons) -> tuple[Tensor, int]:
        """Neurons in 4-bit groups, as many rows at once as the kernel takes."""
        by_token, lists = x.reshape(-1, x.shape[-1]), self.lists
        if lists is not None and lists.wanted is not None:  # as many tokens of each row
            wanted = lists.wanted.repeat_interleave(by_token.shape[0] // lists.wanted.shape[1], 1)
        else:
            wanted = None
        found, left = [], 0
        for at in range(0, by_token.shape[0], MAX_ROWS):
            some = None if wanted is None else wanted[:, at : at + MAX_ROWS].contiguous()
            y, out = neurons(
                by_token[at : at + MAX_ROWS], packed, None if lists is None else lists.listed, some,
                threshold=self.threshold or 0.0, refine=self.refine,
            )  # fmt: skip
            found.append(y)
            left += out
        kept = self.listed_neurons if self.rule == "listed" else packed.intermediate_size
        return torch.cat(found).view_as(x), kept * by_token.shape[0] - left

    def _by_row(self, x: Tensor, packed: PackedMLP, lists: RowLists) -> Tensor:
        """Every token by its row's list; the rows of x are as many tokens each."""
        if lists.wanted is None:
            return mlp(x, packed, lists.listed)
        by_token = x.view(-1, x.shape[-1])
        every = lists.lists.repeat_interleave(by_token.shape[0] // lists.lists.shape[0], 0)
        parts = zip(by_token.split(MAX_ROWS), every.split(MAX_ROWS), strict=True)
        return torch.cat([mlp(some, packed, wanted) for some, wanted in parts]).view_as(x)

    def picked(self, x: Tensor) -> Tensor:
        """Of ``learned`` and ``scored``: the neurons of each row of x, int64 ``[rows, k]`` with -1 for none. Nothing is
        read back from a GPU."""
        return reference.pick(self._scores(x), -1 if self.keep is None else self.keep, self.least)

    def _chosen(self, x: Tensor, packed: PackedMLP) -> Tensor:
        """The neurons that a kernel's rule computes, int64 ``[rows, k]`` with -1 for none."""
        select = sketch_select if self.rule == "sketch" else gate_select
        chosen = select(x, packed, keep=self.keep, threshold=self.threshold)
        return reference.refined(x, packed, chosen, self.refine) if self.refine > 0 else chosen

    def _scores(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.predictor is not None:
            reduce, expand = self.predictor
            return linear(linear(rows.float(), reduce), expand)
        assert self.scorer is not None
        return self.scorer(rows)


@dataclass(frozen=True, eq=False)
class SlimMLP:
    """One MLP at a decode step of which the matrices of some neurons are all that was packed: a narrower dense one.

    A list over all neurons takes rows from everywhere, at half to two thirds of the rate at which matrices stream
    (bench/rows/neuron_groups.jsonl), and adds up in another order. A native step has this in place of the matrices.

    lists: which of its neurons count for which row, where rows differ; None: all. The others count as zero: what a row
    gets is what it gets from `of_tiles` of its own neurons, `exactly`, to the bit.
    """

    gate: PackedLinear | None
    up: PackedLinear
    down: PackedLinear
    act: Act
    lists: RowLists | None = None

    rule: ClassVar[Rule] = "listed"
    smooth: ClassVar[None] = None

    @classmethod
    @torch.no_grad()
    def of_tiles(
        cls,
        gate: PackedLinear | None,
        up: PackedLinear,
        down: PackedLinear,
        kept: Tensor,
        *,
        act: Act,
        exactly: bool = False,
        memory: Reused | None = None,
    ) -> SlimMLP:
        """The neurons `kept`, int64 ``[k]``, ascending, of matrices in tiles: gate and up with their very numbers, down
        as `taken.columns` has it, or `exactly`, as `taken.some`. memory: where it comes to lie; None: in memory of its
        own. Half of a layer of 2048 x 8192 takes about as long as two steps over all of it
        (bench/rows/neuron_groups.jsonl).

        Raises ValueError for formats of which neurons cannot be taken, or neurons that are not there.
        """
        parts = [copied(part) for part in (gate, up, down) if part is not None]
        places: list[Tensor | None] = [None] * len(parts)
        if memory is not None:
            sizes = [taken.rows_bytes(str(part.fmt), kept.numel(), part.in_features) for part in parts[:-1]]
            of_some = taken.some_bytes(down.out_features, down.in_features, kept.numel())
            sizes.append(of_some if exactly else taken.rows_bytes(taken.OF_COLUMNS, down.out_features, kept.numel()))
            sizes = [-(-size // LINE) * LINE for size in sizes]
            places = [*memory.take(sum(sizes)).split(sizes)]
        for part in parts:
            if part is not parts[-1] and part.out_features != down.in_features:
                raise ValueError(f"gate and up have {part.out_features} neurons, not the {down.in_features} of down")
        taken.check(down, kept, down.in_features)
        if exactly and down.fmt != "int4":
            raise ValueError(f"some inputs of groups are taken of int4, not of {down.fmt}")
        found = [taken.checked_rows(part, kept, place) for part, place in zip(parts[:-1], places[:-1], strict=True)]
        narrow = (taken.checked_some if exactly else taken.checked_columns)(parts[-1], kept, places[-1])
        return cls(found[0] if gate is not None else None, found[-1], narrow, act)

    @property
    def listed_neurons(self) -> int:
        """How many neurons a token takes."""
        return self.up.out_features if self.lists is None else self.lists.kept

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.gate, self.up, self.down) if part is not None)

    @property
    def rounds(self) -> bool:
        """See `SparseMLP.rounds`."""
        return any(part is not None and part.grouped and not part.whole for part in (self.gate, self.up, self.down))

    def run(self, x: Tensor, counting: bool = False) -> tuple[Tensor, int]:
        """See `SparseMLP.run`."""
        by_token = x.reshape(-1, x.shape[-1]).float()
        some = MAX_ROWS if self.lists is not None or self.down.counts is not None else max(1, len(by_token))
        if self.lists is None:
            parts = [self._compute(each, None) for each in by_token.split(some)]
        else:  # rows of x are as many tokens of each row of a batch
            counts = self.lists.by_row(self.up.out_features).bool()
            counts = counts.repeat_interleave(len(by_token) // len(counts), 0)
            pairs = zip(by_token.split(some), counts.split(some), strict=True)
            parts = [self._compute(*each) for each in pairs]
        return torch.cat(parts).to(x.dtype).view_as(x), self.listed_neurons * len(by_token)

    def _compute(self, x: Tensor, counts: Tensor | None) -> Tensor:
        """The outputs of x float32 ``[tokens, hidden]``. counts: bool ``[tokens, neurons]``."""
        act, up = ACTS[self.act] if isinstance(self.act, str) else self.act, linear(x, self.up)
        activations = act(up) if self.gate is None else act(linear(x, self.gate)) * up
        return linear(activations if counts is None else activations.masked_fill(~counts, 0.0), self.down)


@dataclass(frozen=True, eq=False)
class SparseLinear:
    """A linear that leaves out its small inputs: those whose size, or by_norm whose size times the length of their
    column, is below `threshold`. neurons: what each of them adds to the number of neurons left out."""

    packed: PackedColumns
    threshold: float
    by_norm: bool
    neurons: float = 0.0

    @property
    def out_features(self) -> int:
        return self.packed.out_features

    def run(self, x: Tensor) -> Tensor:
        return column_linear(x, self.packed, threshold=self.threshold, by_norm=self.by_norm)

    def kept(self, x: Tensor) -> int:
        """How many inputs count, over all rows of x."""
        score = x.float().abs() * (self.packed.norm if self.by_norm else 1)
        return int((score >= self.threshold).sum())


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
        return cls(PackedLinear.pack(signs(weight.float()), fmt="int8"))

    def __call__(self, x: Tensor) -> Tensor:
        return 0.5 + linear(signs(x.float()), self.signs) / (2 * x.shape[-1])


def signs(values: Tensor) -> Tensor:
    """1 where a value is at least zero, else -1, as floats."""
    return torch.where(values < 0, -1.0, 1.0)
