"""The Plan: which neurons and layers run, decided once, kept as a folder.

``plan.json`` holds the recipe, the fingerprints, each layer's policy and the measured quality;
``plan.safetensors`` the indices, centroids, means and predictor weights. A damaged, edited or foreign Plan raises
`PlanError` before any model is touched.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast, get_args

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from . import files
from .anatomy import Anatomy, canonical_activation, dissect
from .checks import check_score, check_share, kind_of, path_of
from .errors import CoreskipError, PlanError
from .importance import Score, kept_count

FORMAT_VERSION = 1
_JSON, _TENSORS = "plan.json", "plan.safetensors"
_PROBES_PER_LAYER = 32


@dataclass(frozen=True)
class Dense:
    """Every neuron, every token."""

    name: ClassVar[str] = "dense"

    def check(self, width: int) -> None:
        """Nothing to check."""

    def kept(self, width: int) -> int:
        return width


@dataclass(frozen=True, eq=False)
class Static:
    """One fixed set of neurons, found in calibration. `indices`: int64 ``[kept]``, ascending."""

    indices: Tensor
    name: ClassVar[str] = "static"

    def check(self, width: int) -> None:
        _check_indices(self.indices, width, ndim=1)

    def kept(self, width: int) -> int:
        return int(self.indices.shape[0])


@dataclass(frozen=True)
class CoreNeurons:
    """Stability-guided core neurons (CoreInfer, section 3): chosen from the prompt at prefill, fixed while decoding.

    `alpha`: share of a token's neurons that count as its core. `beta`: share of the neurons kept. `score`: see
    `token_contributions`.
    """

    alpha: float
    beta: float
    score: Score
    name: ClassVar[str] = "core_neurons"

    def check(self, width: int) -> None:
        check_share("alpha", self.alpha)
        check_share("beta", self.beta)
        check_score(self.score)

    def kept(self, width: int) -> int:
        return kept_count(width, self.beta)


@dataclass(frozen=True, eq=False)
class Similar:
    """Similarity-guided core neurons: the set of the calibration cluster nearest to the prompt.

    `clusters`: int64 ``[clusters, kept]``, ascending in each row.
    """

    clusters: Tensor
    name: ClassVar[str] = "similar"

    def check(self, width: int) -> None:
        _check_indices(self.clusters, width, ndim=2)

    def kept(self, width: int) -> int:
        return int(self.clusters.shape[1])


Rule = Literal["teal", "wina", "cats"]


@dataclass(frozen=True)
class Threshold:
    """What is small is left out, token by token, by thresholds that are quantiles of the calibration text.

    `rule`: ``teal``: the inputs of each linear by |x_j| (TEAL, arXiv 2408.14690, section 4); ``wina``: by
    |x_j| times the norm of the weight's column j (WINA, arXiv 2505.19427); ``cats``: the neurons by |act(gate)|,
    in a plain MLP |act(up)| (CATS, arXiv 2404.08763).
    `keep`: the share of the MLP's weights (``cats``: of its neurons) that stays on the calibration text.
    `least`: what counts, by linear: ``mlp.NAME`` and ``attention.NAME`` as the model names them; for ``cats``
    ``{"act": least}`` alone.
    """

    rule: Rule
    keep: float
    least: Mapping[str, float]
    name: ClassVar[str] = "threshold"

    def check(self, width: int) -> None:
        if self.rule not in get_args(Rule):
            raise PlanError(f"unknown threshold rule {self.rule!r}")
        check_share("keep", self.keep)
        if not isinstance(self.least, Mapping) or not self.least:
            raise PlanError("the thresholds are not a table with an entry per linear")
        for name, least in self.least.items():
            if (name == "act") != (self.rule == "cats") or not name.startswith(("act", "mlp.", "attention.")):
                raise PlanError(f"a {self.rule} threshold for {name!r} makes no sense")
            _check_threshold(least)

    def kept(self, width: int) -> int:
        return kept_count(width, self.keep)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Scored:
    """Neurons kept by a score of each token: the `keep` share with the highest or, where there is a `threshold`, all
    from it up, which is the share `keep` on the calibration text.

    `mean`: fp32 ``[width]`` or None: what a neuron counts as where it is left out.
    """

    keep: float
    threshold: float | None = None
    mean: Tensor | None = None

    def check(self, width: int) -> None:
        check_share("keep", self.keep)
        if self.threshold is not None:
            _check_threshold(self.threshold)
        for name in ("mean", "norm"):
            _check_floats(name, getattr(self, name, None), (width,))

    def kept(self, width: int) -> int:
        return kept_count(width, self.keep)


@dataclass(frozen=True, eq=False, kw_only=True)
class TopK(_Scored):
    """The exact score |a_i| * norm_i, known only after gate and up were computed in full (Lazy Neuron, arXiv
    2210.06313): the oracle that predictors are held against. Saves the down projection alone.

    `norm`: fp32 ``[width]``; None: the norms of the down projection's columns.
    """

    norm: Tensor | None = None
    name: ClassVar[str] = "topk"


@dataclass(frozen=True, eq=False, kw_only=True)
class Sketch(_Scored):
    """The score of `TopK`, estimated from the first `bits` of each int8 weight.

    `bits`: 4: the high nibbles of gate and up, which are part of the weights anyway. 1: the signs of the gate's (in a
    plain MLP the up's) weights and of the inputs, the score being the share of them that agree: SparseInfer (arXiv
    2411.12692) for ReLU models, whose parameter alpha is the threshold 1 / (1 + alpha).
    `norm`: as in `TopK`; unused by signs. `smooth`: fp32 ``[hidden]`` or None: the MLP's inputs are divided by it and
    the columns of gate and up multiplied, before either is rounded to 8 bits (SmoothQuant, arXiv 2211.10438).
    `refine`: None or a second threshold: what the first has let through is computed in all 8 bits and then left out
    after all, its down row unread, where |a_i - mean_i| * norm_i is below this one. On the calibration text the first
    lets the share `candidates` through, the second `keep`.
    """

    bits: int = 4
    norm: Tensor | None = None
    smooth: Tensor | None = None
    refine: float | None = None
    candidates: float | None = None
    name: ClassVar[str] = "sketch"

    def check(self, width: int) -> None:
        super().check(width)
        if self.bits not in (1, 4) or isinstance(self.bits, bool):
            raise PlanError(f"a sketch of {self.bits} bits: there are 1 (signs) and 4 (high nibbles)")
        if self.bits == 1 and not (self.norm is self.smooth is None):
            raise PlanError("a sketch of signs has neither norms nor smoothed inputs")
        if self.smooth is not None:
            _check_floats("smooth", self.smooth, tuple(self.smooth.shape))
            if not bool((self.smooth > 0).all()):
                raise PlanError("smooth holds something that is not above 0")
        self._check_refine()

    def _check_refine(self) -> None:
        if self.refine is None and self.candidates is None:
            return
        if self.refine is None or self.candidates is None or self.threshold is None or self.bits != 4:
            raise PlanError("a refined sketch has 4 bits, two thresholds and a share of candidates")
        _check_threshold(self.refine)
        check_share("candidates", self.candidates)
        if self.candidates < self.keep:
            raise PlanError(f"a refined sketch keeps {self.keep} of {self.candidates} candidates")


@dataclass(frozen=True, eq=False, kw_only=True)
class Learned(_Scored):
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

    def check(self, width: int) -> None:
        super().check(width)
        if self.reduce.ndim != 2 or self.rank < 1:
            raise PlanError("a learned predictor's maps are matrices of at least rank 1")
        _check_floats("reduce", self.reduce, tuple(self.reduce.shape))
        _check_floats("expand", self.expand, (width, self.rank))
        _check_floats("bias", self.bias, (width,))
        if self.recall is not None and not 0 <= self.recall <= 1:
            raise PlanError(f"recall is {self.recall}; it is a share")


@dataclass(frozen=True)
class Run:
    """The layer runs."""

    name: ClassVar[str] = "run"
    attention: ClassVar[bool] = True  # whether it always runs
    mlp: ClassVar[bool] = True

    def check(self) -> None:
        """Nothing to check."""


@dataclass(frozen=True)
class Skip(Run):
    """Neither attention nor MLP runs while decoding: the layer adds nothing to the residual stream.

    A skipped attention still writes the keys and values that it would have written for the same input (the key and
    value projections alone), so that the KV cache has an entry per token in every layer: the next prompt, a dense
    verification or another row of a batch attends to them. See runtime/layers.py.
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

    def check(self) -> None:
        if not isinstance(self.alpha, (int, float)) or not 0.0 <= self.alpha < float("inf"):
            raise CoreskipError(f"alpha is {self.alpha}: an adaptive layer needs a number of 0 or more")


NeuronPolicy = Dense | Static | CoreNeurons | Similar | Threshold | TopK | Sketch | Learned
LayerPolicy = Run  # or one of its subclasses
_NEURON_POLICIES: dict[str, type[Any]] = {
    p.name: p for p in (Dense, Static, CoreNeurons, Similar, Threshold, TopK, Sketch, Learned)
}
_LAYER_POLICIES: dict[str, type[Any]] = {p.name: p for p in (Run, Skip, SkipAttention, SkipMLP, Adaptive)}


@dataclass(frozen=True)
class LayerPlan:
    """What one decoder layer does while decoding."""

    neurons: NeuronPolicy = field(default_factory=Dense)
    layer: LayerPolicy = field(default_factory=Run)

    def kept(self, width: int) -> int:
        """Neurons that a decode step computes of `width`; where that depends on the prompt, as if the layer ran."""
        return self.neurons.kept(width) if self.layer.mlp else 0


@dataclass(frozen=True, eq=False)
class Clusters:
    """How a prompt finds its cluster (similarity-guided plans): its core neurons at layer `anchor`, by `alpha`,
    `beta` and `score` as in `CoreNeurons`, against `centroids`, fp32 ``[clusters, intermediate]``."""

    anchor: int
    alpha: float
    beta: float
    score: Score
    centroids: Tensor


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What a Plan remembers of its model: the shapes, and a sample of the weights.

    `probes`: fp32 ``[layers, 32]``, down-projection weights at fixed places. Models are compared through them in
    the coarser of the two dtypes, so that a plan made in fp32 serves the same model loaded in bf16.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_sizes: tuple[int, ...]
    activation: str
    dtype: str
    probes: Tensor

    def __post_init__(self) -> None:
        _dtype(self.dtype)
        shape = (len(self.intermediate_sizes), _PROBES_PER_LAYER)
        if self.probes.dtype != torch.float32 or self.probes.shape != shape:
            raise PlanError(f"the fingerprint's weight probes are not fp32 of shape {shape}")

    @classmethod
    def of(cls, model: nn.Module, anatomy: Anatomy | None = None) -> Fingerprint:
        anatomy = anatomy or dissect(model)
        act = canonical_activation(anatomy.mlps[0].act)
        weights = [mlp.matrices().down for mlp in anatomy.mlps]
        return cls(
            model_type=anatomy.model_type,
            vocab_size=int(cast(Any, model).config.get_text_config().vocab_size),
            hidden_size=anatomy.mlps[0].hidden_size,
            intermediate_sizes=tuple(mlp.intermediate_size for mlp in anatomy.mlps),
            activation=act if isinstance(act, str) else type(act).__name__,
            dtype=str(weights[0].dtype).removeprefix("torch."),
            probes=torch.stack([_probe(w) for w in weights]),
        )

    def require(self, other: Fingerprint) -> None:
        """Raise `PlanError` unless `other`, a model's fingerprint, is of the model this one was taken from."""
        for name in ("model_type", "hidden_size", "intermediate_sizes", "activation"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise PlanError(
                    f"the plan was made for a model with {name} {_short(mine)}, this one has {_short(theirs)}: "
                    "run `coreskip analyze` on this model"
                )
        coarse = max((_dtype(self.dtype), _dtype(other.dtype)), key=lambda dtype: torch.finfo(dtype).eps)
        same = self.dtype == other.dtype
        tolerance = 0.0 if same else torch.finfo(coarse).eps
        if not torch.allclose(self.probes, other.probes, rtol=tolerance, atol=0.0 if same else 1e-7):
            raise PlanError(
                "the plan was made for a model of this shape with other weights: run `coreskip analyze` on this model"
            )


def _probe(down: Tensor) -> Tensor:
    flat_places = torch.linspace(0, down.numel() - 1, _PROBES_PER_LAYER, dtype=torch.float64, device="cpu").long()
    rows, columns = flat_places // down.shape[1], flat_places % down.shape[1]
    return down[rows.to(down.device), columns.to(down.device)].float().cpu()


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise PlanError(f"the plan names an unknown dtype {name!r}")
    return dtype


def _short(value: object) -> str:
    if isinstance(value, tuple) and len(set(value)) == 1:
        return f"{value[0]} in {len(value)} layers"
    return str(value)


WEIGHTS = (None, "int8", "int4")


@dataclass(frozen=True, eq=False)
class Plan:
    """Per layer one neuron policy and one layer policy, with where they come from and what they cost.

    Attributes:
        layers: one `LayerPlan` per decoder layer.
        model: fingerprint of the model that the plan was made for.
        recipe: how it was made (method, keep, alpha, seed, ...): plain JSON values.
        calibration: what text it was calibrated on: source, tokens, sha256 of the token ids.
        quality: what `evaluate` measured on held-out text, or None.
        clusters: for similarity-guided plans.
        frontier: what the search for a budget found that nothing beat in both bytes and quality: plain JSON tables.
        weights: in which format the native decode step holds weights: None: as loaded; "int8": one byte each, in
            groups of 32 inputs; "int4": 4-bit groups, and bytes for the LM head. Where that step does not
            cover a model they stay as loaded.
    """

    layers: tuple[LayerPlan, ...]
    model: Fingerprint
    recipe: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    quality: Mapping[str, Any] | None = None
    clusters: Clusters | None = None
    frontier: tuple[Mapping[str, Any], ...] = ()
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise PlanError(f"weights must be one of {', '.join(map(repr, WEIGHTS))}, not {self.weights!r}")
        widths = self.model.intermediate_sizes
        if len(self.layers) != len(widths):
            raise PlanError(f"the plan has {len(self.layers)} layers, its model {len(widths)}")
        for index, (layer, width) in enumerate(zip(self.layers, widths, strict=True)):
            try:
                layer.neurons.check(width)
                layer.layer.check()
                self._check_clusters(layer.neurons)
                self._check_predictor(layer.neurons)
            except CoreskipError as error:
                raise PlanError(f"layer {index} of the plan: {error}") from None

    def _check_clusters(self, policy: NeuronPolicy) -> None:
        if not isinstance(policy, Similar):
            return
        c = self.clusters
        if c is None:
            raise PlanError("a similarity-guided layer needs the plan's cluster centroids")
        CoreNeurons(c.alpha, c.beta, c.score).check(0)
        if not 0 <= c.anchor < len(self.layers):
            raise PlanError(f"the clusters' anchor layer {c.anchor} is not one of {len(self.layers)}")
        if c.centroids.shape != (policy.clusters.shape[0], self.model.intermediate_sizes[c.anchor]):
            raise PlanError(f"centroids of shape {tuple(c.centroids.shape)} do not fit the plan's clusters")
        if c.centroids.dtype != torch.float32 or not torch.isfinite(c.centroids).all():
            raise PlanError("the centroids are not finite fp32 numbers")

    def _check_predictor(self, policy: NeuronPolicy) -> None:
        read = self.model.hidden_size
        if isinstance(policy, Learned):
            read = policy.reduce.shape[1]
        elif isinstance(policy, Sketch) and policy.smooth is not None:
            read = policy.smooth.numel()
        if read != self.model.hidden_size:
            raise PlanError(f"the predictor reads {read} inputs, the model has {self.model.hidden_size}")

    @classmethod
    def dense(cls, model: nn.Module, weights: str | None = None) -> Plan:
        """A plan that skips nothing; `weights` as in the class."""
        fingerprint = Fingerprint.of(model)
        return cls(
            layers=tuple(LayerPlan() for _ in fingerprint.intermediate_sizes),
            model=fingerprint,
            recipe={"method": "dense"},
            weights=weights,
        )

    def check(self, model: nn.Module, anatomy: Anatomy | None = None) -> None:
        """Raise `PlanError` unless this plan was made for `model`."""
        self.model.require(Fingerprint.of(model, anatomy))

    @classmethod
    def of(cls, plan: Plan | str | os.PathLike[str] | None, model: nn.Module) -> Plan:
        """What may stand for a plan for `model`: itself, the path of one, or None for the dense plan.

        Raises:
            CoreskipError: none of these.
        """
        if isinstance(plan, Plan):
            return plan
        if plan is None:
            return cls.dense(model)
        if not isinstance(plan, (str, os.PathLike)):
            raise PlanError(f"a plan is a coreskip.Plan, the path of one, or None (dense), not {kind_of(plan)}")
        return cls.load(plan)

    @property
    def keep(self) -> float:
        """Planned share of all MLP neurons that a decode step computes."""
        widths = self.model.intermediate_sizes
        kept = sum(layer.kept(width) for layer, width in zip(self.layers, widths, strict=True))
        return kept / sum(widths)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder `path`. Atomic: an older Plan there survives any failure whole.

        Raises:
            CoreskipError: `path` is something other than a Plan, or cannot be written (no room, no permission).
        """
        target = path_of(path, "a plan")
        check_target(target)
        document, tensors = _encode(self)
        try:
            with files.replaced_folder(target) as draft:
                files.write_durably(draft / _TENSORS, tensors)
                files.write_durably(draft / _JSON, document)
        except OSError as error:
            raise CoreskipError(
                f"cannot write the plan {target}: {error.strerror or error}; what was there is unchanged"
            ) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read the folder `path`.

        Raises:
            PlanError: not a Plan, of a newer format, truncated, edited or inconsistent.
        """
        folder = path_of(path, "a plan")
        try:
            text, data = files.read_together(folder, (_JSON, _TENSORS))
        except OSError as error:
            if not folder.is_dir():
                raise PlanError(f"there is no plan at {folder}: make one with `coreskip analyze -o {folder}`") from None
            raise PlanError(f"{folder} is not a plan: {Path(str(error.filename)).name}: {error.strerror}") from None
        return _decode(text, data, folder)

    def __repr__(self) -> str:
        words = [str(self.recipe.get("method", "no method")), f"keep {self.keep:.1%}", self.weights or "as loaded"]
        if self.quality is not None:
            words.append(f"ppl {self.quality['ppl_increase']:+.1%}")
        return f"Plan({', '.join(words)}; {len(self.layers)} layers of {self.model.model_type})"

    def __str__(self) -> str:
        from .drawing import plan_table

        return plan_table(self)


def check_target(target: Path) -> None:
    """Raise `CoreskipError` where a Plan must not or cannot be written: over a file, into a folder with other things in
    it, or without permission. Of a link, the folder behind it is meant."""
    if not target.name:
        raise CoreskipError(f"{str(target)!r} cannot name a plan; give a folder name such as my.plan")
    try:
        if target.exists() and not target.is_dir():
            raise CoreskipError(f"{target} exists and is not a plan folder; choose another name")
        if target.is_dir() and {entry.name for entry in target.iterdir()} - {_JSON, _TENSORS}:
            raise CoreskipError(f"{target} exists and holds other files than a plan's; choose another name")
    except OSError as error:
        raise CoreskipError(f"cannot write the plan {target}: {error.strerror}") from None
    files.check_folder(target)


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


def _check_floats(name: str, values: Tensor | None, shape: tuple[int, ...]) -> None:
    if values is None:
        return
    if not isinstance(values, Tensor) or values.dtype != torch.float32 or values.shape != shape:
        raise PlanError(f"{name} is not fp32 of shape {shape}")
    if not bool(torch.isfinite(values).all()):
        raise PlanError(f"{name} holds something that is not a finite number")


# --- the file format -------------------------------------------------------------------------------------------


def _encode(plan: Plan) -> tuple[bytes, bytes]:
    tensors: dict[str, Tensor] = {"model.probes": plan.model.probes}
    layers = []
    for index, layer in enumerate(plan.layers):
        values, arrays = _split(layer.neurons)
        tensors |= {f"layers.{index}.{name}": tensor for name, tensor in arrays.items()}
        layers.append(
            {
                "neurons": {"policy": layer.neurons.name, **values},
                "layer": {"policy": layer.layer.name, **_split(layer.layer)[0]},
            },
        )
    document: dict[str, Any] = {
        "format": "coreskip.plan",
        "version": FORMAT_VERSION,
        "recipe": dict(plan.recipe),
        "model": _split(plan.model)[0],
        "calibration": dict(plan.calibration),
        "quality": None if plan.quality is None else dict(plan.quality),
        "layers": layers,
        "clusters": None,
        "frontier": [dict(row) for row in plan.frontier],
        "weights": plan.weights,
    }
    if plan.clusters is not None:
        document["clusters"], arrays = _split(plan.clusters)
        tensors |= {f"clusters.{name}": tensor for name, tensor in arrays.items()}
    # layers may share a tensor, which safetensors refuses
    data = safetensors.torch.save({name: t.cpu().contiguous().clone() for name, t in tensors.items()})
    document["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    return seal(document), data


def seal(document: dict[str, Any]) -> bytes:
    """The document as JSON with the checksum by which `Plan.load` knows that nobody edited it."""
    body = {key: value for key, value in document.items() if key != "checksum"}
    body["checksum"] = hashlib.sha256(_canonical(body)).hexdigest()
    return (json.dumps(body, indent=1, allow_nan=False) + "\n").encode()


def _canonical(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _split(value: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A dataclass's plain fields and its tensors."""
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    arrays = {name: item for name, item in fields.items() if isinstance(item, Tensor)}
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items() if name not in arrays}
    plain = {name: dict(v) if isinstance(v, Mapping) else v for name, v in plain.items()}
    return plain, arrays


def _decode(text: bytes, data: bytes, folder: Path) -> Plan:
    document = _parse(text, folder)
    if hashlib.sha256(data).hexdigest() != document.get("tensors_sha256"):
        raise PlanError(f"{folder / _TENSORS} is truncated or was edited: make the plan again")
    try:
        tensors = safetensors.torch.load(data)
        plan = _build(document, tensors)
    except PlanError:
        raise
    # whatever a sealed but senseless document trips over (a missing key, a number where a list belongs) means one
    # thing to the user
    except (safetensors.SafetensorError, CoreskipError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"{folder} is not a well-formed plan ({error}): make the plan again") from None
    return plan


def _parse(text: bytes, folder: Path) -> dict[str, Any]:
    path = folder / _JSON
    try:
        document = json.loads(text, parse_constant=_no_constants)
    except (ValueError, RecursionError):
        raise PlanError(f"{path} is truncated or is not JSON: make the plan again") from None
    if not isinstance(document, dict) or document.get("format") != "coreskip.plan":
        raise PlanError(f"{path} is not a coreskip plan")
    version = document.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise PlanError(f"{path} has no valid format version: make the plan again")
    if version > FORMAT_VERSION:
        raise PlanError(f"{path} has format version {version}, newer than {FORMAT_VERSION}: upgrade coreskip")
    body = {key: value for key, value in document.items() if key != "checksum"}
    try:
        expected = hashlib.sha256(_canonical(body)).hexdigest()
    except (ValueError, RecursionError):
        expected = None
    if document.get("checksum") != expected:
        raise PlanError(f"{path} was edited or damaged: make the plan again")
    return document


def _no_constants(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _build(document: dict[str, Any], tensors: dict[str, Tensor]) -> Plan:
    model = dict(document["model"])
    model["intermediate_sizes"] = tuple(_integers(model["intermediate_sizes"]))
    fingerprint = _make(Fingerprint, model, {"probes": tensors["model.probes"]})
    layers = []
    for index, entry in enumerate(document["layers"]):
        neurons = dict(entry["neurons"])
        policy = _known(_NEURON_POLICIES, neurons.pop("policy"))
        prefix = f"layers.{index}."
        arrays = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        layer = dict(entry["layer"])
        layer_policy = _known(_LAYER_POLICIES, layer.pop("policy"))
        layers.append(LayerPlan(_make(policy, neurons, arrays), layer_policy(**layer)))
    clusters = None
    if document["clusters"] is not None:
        clusters = _make(Clusters, document["clusters"], {"centroids": tensors["clusters.centroids"]})
        if not isinstance(clusters.anchor, int):
            raise PlanError("the clusters' anchor is not a layer number")
    for name in ("recipe", "calibration"):
        if not isinstance(document[name], dict):
            raise PlanError(f"{name} is not a table")
    _check_quality(document["quality"])
    return Plan(
        layers=tuple(layers),
        model=fingerprint,
        recipe=document["recipe"],
        calibration=document["calibration"],
        quality=document["quality"],
        clusters=clusters,
        frontier=_frontier(document.get("frontier", [])),
        weights=document.get("weights"),  # plans of coreskip 0.1 have none
    )


def _check_quality(quality: Any) -> None:
    if quality is None:
        return
    figures = [quality["dense"]["ppl"], quality["sparse"]["ppl"], quality["tokens"]]
    figures += [quality[name] for name in ("ppl_increase", "kl", "top1_agreement", "neuron_sparsity")]
    if not all(isinstance(figure, (int, float)) for figure in figures):
        raise PlanError("quality holds something that is not a number")


def _frontier(rows: Any) -> tuple[dict[str, Any], ...]:
    numbers = ("keep", "megabytes", "milliseconds", "ppl_increase", "kl", "top1_agreement", "neuron_sparsity")
    for row in rows:
        if not isinstance(row["name"], str) or not all(isinstance(row[name], (int, float)) for name in numbers):
            raise PlanError("the frontier holds something that is not a measurement")
    return tuple(rows)


def _integers(values: object) -> list[int]:
    if not isinstance(values, list) or not all(type(v) is int and v > 0 for v in values):
        raise PlanError("intermediate_sizes is not a list of positive numbers")
    return values


_T = TypeVar("_T")


def _make(cls: Callable[..., _T], values: dict[str, Any], arrays: dict[str, Tensor]) -> _T:
    return cls(**values, **arrays)


def _known(registry: dict[str, type[Any]], name: object) -> type[Any]:
    if not isinstance(name, str) or name not in registry:
        raise PlanError(f"the plan uses the policy {name!r}, which this version does not know: upgrade coreskip")
    return registry[name]
