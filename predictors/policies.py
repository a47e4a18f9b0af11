"""What a decode step may leave out: of an MLP's neurons, or of its linears' inputs (neuron policies), and of a layer's
halves (layer policies).

A neuron policy is one dataclass, registered under the name that plans save. It says what chooses (`chooser`), what it
needs from calibration (`needs_clusters`), how many neurons it keeps, and checks its own numbers. What it makes a decode
step compute is one builder in runtime/program.py. Nothing else tests what type a policy has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .checks import check_score, check_share
from .core_neurons import nearest_cluster
from .errors import CoreskipError, PlanError
from .importance import Score, kept_count, most_important


class Chooser(Enum):
    """What decides which neurons, or inputs, a decode step leaves out."""

    NOTHING = "nothing"  # every neuron is computed
    CALIBRATION = "calibration"  # one set for every text
    PROMPT = "prompt"  # each sequence's own set, fixed while it decodes
    TOKEN = "token"  # each token's own neurons
    INPUTS = "inputs"  # each token's own inputs of each linear


class NeuronPolicy:
    """What one brick (in a dense model a layer's MLP) computes at a decode step.

    Attributes:
        name: what a saved plan calls the policy.
        chooser: what decides what is left out.
        needs_clusters: whether the plan has to hold the cluster centroids of the calibration text.
    """

    name: ClassVar[str]
    chooser: ClassVar[Chooser]
    needs_clusters: ClassVar[bool] = False

    def check(self, width: int, hidden: int) -> None:
        """Raise `CoreskipError` where the policy does not fit a brick of `width` neurons over `hidden` inputs."""

    def kept(self, width: int) -> int:
        """Neurons that a decode step computes of `width`; where tokens differ, on the calibration text."""
        raise NotImplementedError


Policy = TypeVar("Policy", bound=type[NeuronPolicy])

NEURON_POLICIES: dict[str, type[Any]] = {}


def neuron_policy(cls: Policy) -> Policy:
    """Registers a neuron policy under its name: plans with it can be saved and loaded."""
    if cls.name in NEURON_POLICIES:
        raise ValueError(f"there is a neuron policy {cls.name!r} already")
    NEURON_POLICIES[cls.name] = cls
    return cls


@neuron_policy
@dataclass(frozen=True)
class Dense(NeuronPolicy):
    """Every neuron, every token."""

    name: ClassVar[str] = "dense"
    chooser: ClassVar[Chooser] = Chooser.NOTHING

    def kept(self, width: int) -> int:
        return width


@neuron_policy
@dataclass(frozen=True, eq=False)
class Static(NeuronPolicy):
    """One fixed set of neurons, found in calibration. `indices`: int64 ``[kept]``, ascending."""

    indices: Tensor
    name: ClassVar[str] = "static"
    chooser: ClassVar[Chooser] = Chooser.CALIBRATION

    def check(self, width: int, hidden: int) -> None:
        _check_indices(self.indices, width, ndim=1)

    def kept(self, width: int) -> int:
        return int(self.indices.shape[0])


@dataclass(frozen=True, eq=False)
class Clusters:
    """How a prompt finds its cluster (similarity-guided plans): its core neurons at layer `anchor`, by `alpha`,
    `beta` and `score` as in `CoreNeurons`, against `centroids`, fp32 ``[clusters, intermediate]``."""

    anchor: int
    alpha: float
    beta: float
    score: Score
    centroids: Tensor

    def check(self, widths: tuple[int, ...]) -> None:
        """Raise `CoreskipError` unless these are clusters of a model whose layers have so many neurons."""
        CoreNeurons(self.alpha, self.beta, self.score).check(0, 0)
        if not isinstance(self.anchor, int) or not 0 <= self.anchor < len(widths):
            raise PlanError(f"the clusters' anchor layer {self.anchor} is not one of {len(widths)}")
        if self.centroids.ndim != 2 or self.centroids.shape[1] != widths[self.anchor]:
            raise PlanError(f"centroids of shape {tuple(self.centroids.shape)} do not fit the plan's clusters")
        if self.centroids.dtype != torch.float32 or not torch.isfinite(self.centroids).all():
            raise PlanError("the centroids are not finite fp32 numbers")


@dataclass(frozen=True)
class Observation:
    """What prefill adds up over a prompt's tokens at one layer; see `token_contributions`."""

    layer: int
    score: Score
    alpha: float


class PromptNeurons(NeuronPolicy):
    """Neurons that are chosen from each sequence's prompt, and stay while it decodes."""

    chooser: ClassVar[Chooser] = Chooser.PROMPT

    def observes(self, layer: int, clusters: Clusters | None) -> Observation:
        """What the choice of `layer` depends on."""
        raise NotImplementedError

    def select(self, scores: Tensor, ties: Tensor, clusters: Clusters | None) -> Tensor:
        """Neurons ``[rows, kept]`` of each prompt, from what was observed: scores, and what decides between equal ones,
        each ``[rows, width]``."""
        raise NotImplementedError


@neuron_policy
@dataclass(frozen=True)
class CoreNeurons(PromptNeurons):
    """Stability-guided core neurons (CoreInfer, section 3): chosen from the prompt at prefill, fixed while decoding.

    `alpha`: share of a token's neurons that count as its core. `beta`: share of the neurons kept. `score`: see
    `token_contributions`.
    """

    alpha: float
    beta: float
    score: Score
    name: ClassVar[str] = "core_neurons"

    def check(self, width: int, hidden: int) -> None:
        check_share("alpha", self.alpha)
        check_share("beta", self.beta)
        check_score(self.score)

    def kept(self, width: int) -> int:
        return kept_count(width, self.beta)

    def observes(self, layer: int, clusters: Clusters | None) -> Observation:
        return Observation(layer, self.score, self.alpha)

    def select(self, scores: Tensor, ties: Tensor, clusters: Clusters | None) -> Tensor:
        return most_important(scores, ties, self.kept(scores.shape[1]))


@neuron_policy
@dataclass(frozen=True, eq=False)
class Similar(PromptNeurons):
    """Similarity-guided core neurons: the set of the calibration cluster nearest to the prompt.

    `clusters`: int64 ``[clusters, kept]``, ascending in each row.
    """

    clusters: Tensor
    name: ClassVar[str] = "similar"
    needs_clusters: ClassVar[bool] = True

    def check(self, width: int, hidden: int) -> None:
        _check_indices(self.clusters, width, ndim=2)

    def kept(self, width: int) -> int:
        return int(self.clusters.shape[1])

    def observes(self, layer: int, clusters: Clusters | None) -> Observation:
        assert clusters is not None  # the plan has checked it
        return Observation(clusters.anchor, clusters.score, clusters.alpha)

    def select(self, scores: Tensor, ties: Tensor, clusters: Clusters | None) -> Tensor:
        assert clusters is not None
        nearest = nearest_cluster(scores, clusters.centroids, clusters.beta)
        return self.clusters.to(nearest.device)[nearest]


@neuron_policy
@dataclass(frozen=True)
class Cats(NeuronPolicy):
    """Neurons whose |act(gate)|, in a plain MLP |act(up)|, is below a threshold are left out, token by token (CATS,
    arXiv 2404.08763).

    `keep`: the share of the neurons that stays on the calibration text. `threshold`: the quantile of that text at it.
    """

    keep: float
    threshold: float
    name: ClassVar[str] = "cats"
    chooser: ClassVar[Chooser] = Chooser.TOKEN

    def check(self, width: int, hidden: int) -> None:
        check_share("keep", self.keep)
        _check_threshold(self.threshold)

    def kept(self, width: int) -> int:
        return kept_count(width, self.keep)


@dataclass(frozen=True)
class InputThresholds(NeuronPolicy):
    """Each linear leaves out its own small inputs, token by token, by thresholds that are quantiles of the calibration
    text.

    `keep`: the share of the linears' weights that stays on that text. `thresholds`: by linear, ``mlp.NAME`` and
    ``attention.NAME`` as the model names it. `by_norm`: whether an input's size counts times the norm of the weight's
    column that it meets.
    """

    keep: float
    thresholds: Mapping[str, float]
    chooser: ClassVar[Chooser] = Chooser.INPUTS
    by_norm: ClassVar[bool]

    def check(self, width: int, hidden: int) -> None:
        check_share("keep", self.keep)
        if not isinstance(self.thresholds, Mapping) or not self.thresholds:
            raise PlanError("the thresholds are not a table with an entry per linear")
        for name, threshold in self.thresholds.items():
            if not name.startswith(("mlp.", "attention.")):
                raise PlanError(f"a {self.name} threshold for {name!r} makes no sense")
            _check_threshold(threshold)

    def kept(self, width: int) -> int:
        return kept_count(width, self.keep)


@neuron_policy
@dataclass(frozen=True)
class Teal(InputThresholds):
    """Inputs are chosen by |x_j| (TEAL, arXiv 2408.14690, section 4)."""

    name: ClassVar[str] = "teal"
    by_norm: ClassVar[bool] = False


@neuron_policy
@dataclass(frozen=True)
class Wina(InputThresholds):
    """Inputs are chosen by |x_j| times the norm of the weight's column j (WINA, arXiv 2505.19427)."""

    name: ClassVar[str] = "wina"
    by_norm: ClassVar[bool] = True


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoredNeurons(NeuronPolicy):
    """Neurons kept by a score of each token: the `keep` share with the highest or, where there is a `threshold`, all
    from it up, which is the share `keep` on the calibration text.

    `mean`: fp32 ``[width]`` or None: what a neuron counts as where it is left out.
    """

    keep: float
    threshold: float | None = None
    mean: Tensor | None = None
    chooser: ClassVar[Chooser] = Chooser.TOKEN

    def check(self, width: int, hidden: int) -> None:
        check_share("keep", self.keep)
        if self.threshold is not None:
            _check_threshold(self.threshold)
        for name in ("mean", "norm"):
            _check_floats(name, getattr(self, name, None), (width,))
        _check_sizes("norm", getattr(self, "norm", None))

    def kept(self, width: int) -> int:
        return kept_count(width, self.keep)


@neuron_policy
@dataclass(frozen=True, eq=False, kw_only=True)
class TopK(ScoredNeurons):
    """The exact score |a_i| * norm_i, known only after gate and up were computed in full (Lazy Neuron, arXiv
    2210.06313): the oracle that predictors are held against. Saves the down projection alone.

    `norm`: fp32 ``[width]``; None: the norms of the down projection's columns.
    With weights in 4 bits the score is what leaving the neuron out costs, |a_i - mean_i| * norm_i, as in a refined
    `Sketch`; natively where there is a threshold. There may be a first one on the gate alone, `gate`: where
    |act(gate_i)| * reach_i is below it the neuron is left out, its up row unread, too. On the calibration text that
    lets the share `candidates` through.
    """

    norm: Tensor | None = None
    gate: float | None = None
    reach: Tensor | None = None
    candidates: float | None = None
    name: ClassVar[str] = "topk"

    def check(self, width: int, hidden: int) -> None:
        super().check(width, hidden)
        if self.gate is None and self.reach is None and self.candidates is None:
            return
        if self.gate is None or self.reach is None or self.candidates is None or self.threshold is None:
            raise PlanError("scores that begin with the gate have two thresholds, reaches and a share of candidates")
        _check_threshold(self.gate)
        _check_floats("reach", self.reach, (width,))
        _check_sizes("reach", self.reach)
        _check_candidates(self.candidates, self.keep)


@neuron_policy
@dataclass(frozen=True, eq=False, kw_only=True)
class Sketch(ScoredNeurons):
    """The score of `TopK`, estimated from the first `bits` of each weight.

    `bits`: 4: of int8 weights, the high nibbles of gate and up, which are part of the weights anyway. 3: of int4
    weights, the upper three bits of gate and up, the last one counted as its middle. 1: the signs of the gate's (in a
    plain MLP the up's) weights and of the inputs, the score being the share of them that agree: SparseInfer (arXiv
    2411.12692) for ReLU models, whose parameter alpha is the threshold 1 / (1 + alpha).
    `norm`: as in `TopK`; unused by signs. `smooth`: fp32 ``[hidden]`` or None: the MLP's inputs are divided by it and
    the columns of gate and up multiplied, before either is rounded to 8 bits (SmoothQuant, arXiv 2211.10438).
    `refine`: None or a second threshold: what the first has let through is computed in all bits and then left out
    after all, its down row unread, where |a_i - mean_i| * norm_i is below this one. On the calibration text the first
    lets the share `candidates` through, the second `keep`.
    Of 3 bits there is always a threshold, and no `smooth`: inputs are rounded in groups, where a large channel takes
    the range of 31 others alone.
    """

    bits: int = 4
    norm: Tensor | None = None
    smooth: Tensor | None = None
    refine: float | None = None
    candidates: float | None = None
    name: ClassVar[str] = "sketch"

    def check(self, width: int, hidden: int) -> None:
        super().check(width, hidden)
        if self.bits not in (1, 3, 4) or type(self.bits) is not int:
            raise PlanError(f"a sketch of {self.bits} bits: there are 1 (signs), 3 (of int4) and 4 (high nibbles)")
        if self.bits == 1 and not (self.norm is self.smooth is None):
            raise PlanError("a sketch of signs has neither norms nor smoothed inputs")
        if self.bits == 3 and (self.threshold is None or self.smooth is not None):
            raise PlanError("a sketch of 3 bits has a threshold and no smoothed inputs")
        if self.smooth is not None:
            _check_floats("smooth", self.smooth, tuple(self.smooth.shape))
            _check_inputs(self.smooth.numel(), hidden)
            if not bool((self.smooth > 0).all()):
                raise PlanError("smooth holds something that is not above 0")
        self._check_refine()

    def _check_refine(self) -> None:
        if self.refine is None and self.candidates is None:
            return
        if self.refine is None or self.candidates is None or self.threshold is None or self.bits == 1:
            raise PlanError("a refined sketch has 3 or 4 bits, two thresholds and a share of candidates")
        _check_threshold(self.refine)
        _check_candidates(self.candidates, self.keep)


@neuron_policy
@dataclass(frozen=True, eq=False, kw_only=True)
class Learned(ScoredNeurons):
    """The score is a trained low-rank map of the MLP's input, sigmoid(expand @ (reduce @ x) + bias) (Deja Vu, arXiv
    2310.17157, section 4.1).

    `reduce`: fp32 ``[rank, hidden]``, `expand`: ``[width, rank]``, `bias`: ``[width]``. `recall`: the share of the
    wanted neurons that it found on calibration text held out from its training.
    """

    reduce: Tensor
    expand: Tensor
    bias: Tensor
    recall: float | None = None
    name: ClassVar[str] = "learned"

    @property
    def rank(self) -> int:
        return int(self.reduce.shape[0])

    def check(self, width: int, hidden: int) -> None:
        super().check(width, hidden)
        if self.reduce.ndim != 2 or self.rank < 1:
            raise PlanError("a learned predictor's maps are matrices of at least rank 1")
        _check_floats("reduce", self.reduce, tuple(self.reduce.shape))
        _check_inputs(self.reduce.shape[1], hidden)
        _check_floats("expand", self.expand, (width, self.rank))
        _check_floats("bias", self.bias, (width,))
        if self.recall is not None and not 0 <= self.recall <= 1:
            raise PlanError(f"recall is {self.recall}; it is a share")


@neuron_policy
@dataclass(frozen=True, eq=False, kw_only=True)
class Bricks(ScoredNeurons):
    """Neurons in bricks of one size; a token takes those of the highest score, route @ x + bias (MoEfication, arXiv
    2110.01786, sections 3.1 and 3.2; see `bricks.py`).

    `assignment`: int64 ``[width]``, each neuron's brick. `route`: fp32 ``[bricks, hidden]``, `bias`: ``[bricks]``.
    """

    assignment: Tensor
    route: Tensor
    bias: Tensor
    name: ClassVar[str] = "bricks"

    @property
    def count(self) -> int:
        """Bricks."""
        return int(self.route.shape[0])

    def check(self, width: int, hidden: int) -> None:
        super().check(width, hidden)
        if self.threshold is not None:
            raise PlanError("a token takes a number of bricks, not those above a threshold")
        if self.route.ndim != 2 or self.count < 1:
            raise PlanError("a router of bricks is a matrix with a row for each")
        _check_floats("route", self.route, tuple(self.route.shape))
        _check_inputs(self.route.shape[1], hidden)
        _check_floats("bias", self.bias, (self.count,))
        places = self.assignment
        if places.dtype != torch.int64 or places.shape != (width,):
            raise PlanError(f"assignment is not int64 of shape {(width,)}")
        if int(places.min()) < 0 or int(places.max()) >= self.count:
            raise PlanError(f"neurons in bricks {int(places.min())}..{int(places.max())} of {self.count}")


@dataclass(frozen=True)
class Run:
    """The layer runs.

    Attributes:
        attention, mlp: whether that half of the layer runs at every decode step.
        by_prompt: whether each sequence's prompt decides; the halves count as running then.
    """

    name: ClassVar[str] = "run"
    attention: ClassVar[bool] = True
    mlp: ClassVar[bool] = True
    by_prompt: ClassVar[bool] = False

    @property
    def may_skip_attention(self) -> bool:
        return self.by_prompt or not self.attention

    @property
    def may_skip_mlp(self) -> bool:
        return self.by_prompt or not self.mlp

    def check(self) -> None:
        """Nothing to check."""


@dataclass(frozen=True)
class Skip(Run):
    """Neither attention nor MLP runs while decoding: the layer adds nothing to the residual stream.

    A skipped attention still writes the keys and values that it would have written for the same input (the key and
    value projections alone), so that the KV cache has an entry per token in every layer: the next prompt, a dense
    verification or another row of a batch attends to them. See runtime/layer_skips.py.
    """

    name: ClassVar[str] = "skip"
    attention: ClassVar[bool] = False
    mlp: ClassVar[bool] = False


@dataclass(frozen=True)
class SkipAttention(Run):
    """The attention does not run while decoding, as in `Skip`; the MLP does."""

    name: ClassVar[str] = "skip_attention"
    attention: ClassVar[bool] = False


@dataclass(frozen=True)
class SkipMLP(Run):
    """The MLP does not run while decoding, as in `Skip`; the attention does."""

    name: ClassVar[str] = "skip_mlp"
    mlp: ClassVar[bool] = False


@dataclass(frozen=True)
class Adaptive(Run):
    """Skipped while decoding, as in `Skip`, for the sequences in whose prompt it was void for most tokens.

    `alpha` is LAC's (see `predictors.layers.void`): the larger, the more layers are void.
    """

    alpha: float
    name: ClassVar[str] = "adaptive"
    by_prompt: ClassVar[bool] = True

    def check(self) -> None:
        if not isinstance(self.alpha, (int, float)) or not 0.0 <= self.alpha < float("inf"):
            raise CoreskipError(f"alpha is {self.alpha}: an adaptive layer needs a number of 0 or more")


LayerPolicy = Run  # or one of its subclasses
LAYER_POLICIES: dict[str, type[Any]] = {p.name: p for p in (Run, Skip, SkipAttention, SkipMLP, Adaptive)}


def _check_indices(indices: Tensor, width: int, ndim: int) -> None:
    if indices.dtype != torch.int64 or indices.ndim != ndim or indices.numel() == 0:
        raise PlanError("neuron indices must be a non-empty int64 array")
    if int(indices.min()) < 0 or int(indices.max()) >= width:
        raise PlanError(f"neuron indices out of range: {int(indices.min())}..{int(indices.max())} of {width}")
    if indices.shape[-1] > 1 and not bool((indices.diff(dim=-1) > 0).all()):
        raise PlanError("neuron indices must be ascending without repeats")


def _check_threshold(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
        raise PlanError(f"a threshold is {value}; it must be a number of at least 0")


def _check_candidates(candidates: float, keep: float) -> None:
    check_share("candidates", candidates)
    if candidates < keep:
        raise PlanError(f"of {candidates} candidates {keep} cannot be kept")


def _check_floats(name: str, values: Tensor | None, shape: tuple[int, ...]) -> None:
    if values is None:
        return
    if not isinstance(values, Tensor) or values.dtype != torch.float32 or values.shape != shape:
        raise PlanError(f"{name} is not fp32 of shape {shape}")
    if not bool(torch.isfinite(values).all()):
        raise PlanError(f"{name} holds something that is not a finite number")


def _check_sizes(name: str, values: Tensor | None) -> None:
    if values is not None and bool((values < 0).any()):
        raise PlanError(f"{name} holds a number below 0: such a neuron would never be kept")


def _check_inputs(found: int, hidden: int) -> None:
    if found != hidden:
        raise PlanError(f"the predictor reads {found} inputs, the model has {hidden}")
