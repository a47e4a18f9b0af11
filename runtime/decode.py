"""Decode steps in one native call: what the model is, read from its modules once, and the calls that replace its own.

The description is data (`kernels.step`), built from the anatomy and the plan. It is read from attribute names that
many architectures share, so it may be wrong for one that gives them another meaning: before the first native step is
used, its logits are compared with those of the model's own modules for the same tokens. What is not covered, or does
not pass, runs on the patched modules as before.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.pytorch_utils import Conv1D

from ..kernels import cpu
from ..kernels import step as native
from ..kernels.ops import MAX_ROWS, PackedLinear, available
from ..kernels.packed import DTYPES, finite
from ..predictors.anatomy import Anatomy, FeedForward, canonical_activation, rows_of
from .coverage import uncovered
from .kv_cache import Entries, Rooms, known_rooms, make_rooms, take_back, twin_of
from .selections import as_loaded, densely
from .selfcheck import FEW, KEYS, Checkpoints, agree, far_positions, made_up
from .width import MOST_TOKENS, most_tokens

logger = logging.getLogger("coreskip")

# Rotation types whose angles depend on the position alone; others depend on the length of the sequence too.
STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


class NotCovered(Exception):
    """A model or a call that the native step does not describe; the message says what it is."""


# ---- reading the architecture ----

#: told of a linear as soon as all rows of its matrix are packed
Packed = Callable[[nn.Module, list[PackedLinear]], None]
Gone = Callable[[nn.Module], "list[PackedLinear] | None"]
#: what was packed, by the matrix that it is of
PackedBefore = dict[tuple[Any, ...], tuple[Tensor, PackedLinear]]


class Architecture:
    """A model as the native step sees it, with the weights where they lie or, under `weights`, packed anew.

    weights: None: as loaded; "int8": one byte a weight, in groups; "int4": 4-bit groups, and bytes for the LM head.
    narrow: as loaded, float32 matrices whose very numbers take at most this share of their bytes in another form
        (`cpu.pack_exactly`) are read in that; 0: all where they lie.
    bundled: layers whose MLP no step reads as matrices; these stay where they lie.
    packed: called for each linear, so that who frees its matrix has no more than one layer twice.
    gone: of a linear whose matrix exists in packed form alone, that form; None of others.
    before: what was packed in a format of its own before, and is added to; None where matrices are not to be held.
    """

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        weights: str | None = None,
        packed: Packed | None = None,
        before: PackedBefore | None = None,
        narrow: float = 0.0,
        bundled: frozenset[int] = frozenset(),
        gone: Gone = lambda module: None,
    ) -> None:
        self._bundled, self._gone = bundled, gone
        self._model, self._anatomy, self._weights = model, anatomy, {"int8": "int8_groups"}.get(str(weights), weights)
        self._packed, self._before, self._narrow = packed, before, narrow
        self.config = model.config.get_text_config()
        self._check()
        self.rotation = _Rotation(anatomy.stack)
        layers = [self._layer(index, window) for index, window in enumerate(windows(model.config, len(anatomy)))]
        head = model.get_output_embeddings()
        embedding = _table(model.get_input_embeddings())
        self.base = native.StepModel(
            embedding=embedding,
            layers=layers,
            norm=_norm(self._last_norm()),
            head=self._of_linear(head, [None], "int8_groups" if weights else None)[0],
            dtype=embedding.dtype,
            embedding_scale=self._embedding_scale(embedding),
            logit_scale=self._logit_scale(),
            logit_softcap=float(getattr(self.config, "final_logit_softcapping", None) or 0.0),
        )

    def step(self, chosen: Chosen) -> native.Step:
        layers = []
        for index, (layer, mlp) in enumerate(zip(self.base.layers, chosen.mlps, strict=True)):
            kept = None if index in chosen.no_mlp else layer.mlp if mlp is None else mlp
            norm = layer.mlp_in if mlp is None else _scaled(layer.mlp_in, mlp.smooth)
            layer = replace(layer, mlp=kept, mlp_in=norm, entries_only=index in chosen.no_attention)
            layers.append(_by_columns(layer, chosen.columns.get(index, {})))
        return native.Step(replace(self.base, layers=layers))

    def nbytes(self) -> tuple[int, int]:
        """Of all matrices, and of the dense MLPs'."""
        mlps: list[Any] = [layer.mlp for layer in self.base.layers]
        of_mlps = sum(m.nbytes for mlp in mlps for m in (mlp.gate, mlp.up, mlp.down) if m is not None)
        attentions: list[Any] = [layer.attention for layer in self.base.layers]
        of_attention = sum(m.nbytes for a in attentions for m in (a.q, a.k, a.v, a.o))
        return of_mlps + of_attention + self.base.head.nbytes, of_mlps

    def _check(self) -> None:
        if available("cpu") is not None:
            raise NotCovered(str(available("cpu")))
        gone = {id(m.weight) for m in self._model.modules() if isinstance(m, nn.Linear) and self._gone(m) is not None}
        parameters = [p for p in self._model.parameters() if id(p) not in gone]
        if any(p.device.type != "cpu" for p in parameters):
            raise NotCovered("the model is not on the CPU")
        if len({p.dtype for p in parameters}) > 1 or parameters[0].dtype not in DTYPES:
            raise NotCovered("its parameters are not all float32, all bfloat16 or all float16")
        reason = uncovered(self._anatomy)
        if reason is not None:
            raise NotCovered(reason)

    def _pack(self, weight: Tensor, bias: Tensor | None, fmt: str | None) -> PackedLinear:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        if fmt is None and not self._narrow:  # read where it lies
            return PackedLinear.pack(weight, bias)
        if self._before is None:
            return self._packed_anew(weight, bias, fmt)
        key = (weight.data_ptr(), weight.shape, weight.stride(), fmt or self._narrow)
        if key not in self._before:  # with the weight: while it is alive, its address is no other's
            self._before[key] = weight, self._packed_anew(weight, bias, fmt)
        return self._before[key][1]

    def _packed_anew(self, weight: Tensor, bias: Tensor | None, fmt: str | None) -> PackedLinear:
        exact = cpu.pack_exactly(weight, bias, most=self._narrow) if fmt is None else None
        return exact or PackedLinear.pack(weight, bias, fmt=fmt)

    def _keep(self, module: nn.Module, parts: list[PackedLinear]) -> list[PackedLinear]:
        """`parts` are all rows of the module's matrix."""
        if self._packed is not None:
            self._packed(module, parts)
        return parts

    def _linear(self, module: Any) -> PackedLinear:
        return self._of_linear(module, [None], self._weights)[0]

    def _of_linear(self, module: Any, sizes: Sequence[int | None], fmt: str | None) -> list[PackedLinear]:
        """A linear's matrix in parts of so many rows each; [None]: whole."""
        if not is_plain_linear(module) or not isinstance(module, nn.Linear):
            raise NotCovered(f"a projection is a {type(module).__name__}")
        gone = self._gone(module)
        if gone is not None:
            return gone
        if len(sizes) == 1:
            return self._keep(module, [self._pack(module.weight, module.bias, fmt)])
        biases = [None] * len(sizes) if module.bias is None else module.bias.split(sizes)
        split = zip(module.weight.split(sizes), biases, strict=True)
        return self._keep(module, [self._pack(weight, bias, fmt) for weight, bias in split])

    def _last_norm(self) -> nn.Module:
        for name in ("norm", "final_layernorm", "final_layer_norm", "ln_f"):
            module = getattr(self._anatomy.stack, name, None)
            if isinstance(module, nn.Module):
                return module
        raise NotCovered("no norm before the LM head was found")

    def _logit_scale(self) -> float:
        divisor = getattr(self.config, "logits_scaling", None)
        return 1.0 / float(divisor) if divisor else float(getattr(self.config, "logit_scale", None) or 1.0)

    def _embedding_scale(self, embedding: Tensor) -> float:
        """Gemma and Granite scale embeddings; who adds positions to them is not covered."""
        ids = torch.tensor([[1, 2, 3]], device="cpu")
        x, w = _input_of_first_layer(self._anatomy, ids)[0].float(), embedding[ids[0]].float()
        scale = float((x * w).sum() / (w * w).sum())
        if not (x - scale * w).norm() <= 1e-2 * x.norm():
            raise NotCovered("the first layer does not read plain token embeddings")
        return 1.0 if abs(scale - 1.0) < 1e-3 else scale

    def _layer(self, index: int, window: int) -> native.StepLayer:
        layer, mlp = self._anatomy.layers[index], self._anatomy.mlps[index]
        act = canonical_activation(mlp.act)
        if not isinstance(act, str):
            raise NotCovered("its activation is not one of the kernels'")
        return native.StepLayer(
            attention=self._attention(index, window),
            mlp=self._dense_mlp(mlp) if index in self._bundled else self._mlp(mlp),
            act=act,
            residual_scale=float(getattr(layer, "residual_multiplier", 1.0)),
            **_norms(layer),
        )

    def _mlp(self, mlp: FeedForward) -> native.DenseMLP:
        linears = [mlp.up, mlp.down] if mlp.gate_name is None else [getattr(mlp.owner, mlp.gate_name), mlp.up, mlp.down]
        if not all(map(is_plain_linear, linears)):
            raise NotCovered("a projection of an MLP is not a plain linear layer")
        gone = [self._gone(linear) for linear in linears]
        if any(gone):
            return self._partly_gone(mlp, linears, gone)
        w = mlp.matrices()
        gate = None if w.gate is None else self._pack(w.gate, w.gate_bias, self._weights)
        up, down = self._pack(w.up, w.up_bias, self._weights), self._pack(w.down.t(), w.down_bias, self._weights)
        del w  # which holds the matrices
        if gate is not None and mlp.gate_name is not None:
            self._keep(getattr(mlp.owner, mlp.gate_name), [gate])
        self._keep(mlp.up, [gate, up] if gate is not None and mlp.stacked else [up])
        self._keep(mlp.down, [down])
        return native.DenseMLP(gate, up, down)

    def _partly_gone(
        self, mlp: FeedForward, linears: list[nn.Module], gone: list[list[PackedLinear] | None]
    ) -> native.DenseMLP:
        """An MLP some of whose matrices exist in packed form alone."""
        parts = []
        for linear, packed in zip(linears, gone, strict=True):
            weight, bias = rows_of(linear)
            if packed is None and linear is mlp.up and mlp.stacked:
                biases = [None, None] if bias is None else bias.chunk(2)
                pairs = zip(weight.chunk(2), biases, strict=True)
                packed = [self._pack(rows, some, self._weights) for rows, some in pairs]
            parts += packed or [self._pack(weight, bias, self._weights)]
        return native.DenseMLP(*parts) if len(parts) == 3 else native.DenseMLP(None, *parts)

    def _dense_mlp(self, mlp: FeedForward) -> native.DenseMLP:
        """The MLP's matrices where they lie."""
        w = mlp.matrices()
        gate = None if w.gate is None else PackedLinear.pack(w.gate, w.gate_bias)
        return native.DenseMLP(gate, PackedLinear.pack(w.up, w.up_bias), PackedLinear.pack(w.down.t(), w.down_bias))

    def _attention(self, index: int, window: int) -> native.Attention:
        found = self._anatomy.attentions[index]
        if found is None:
            raise NotCovered("a layer's attention was not recognised")
        module = cast(Any, found.module)
        head_dim = getattr(module, "head_dim", None)
        if not isinstance(head_dim, int):
            raise NotCovered("the attention does not say its head size")
        if len(found.inputs) == 3:
            q, k, v = (self._linear(getattr(module, name)) for name in found.inputs)
        else:
            q, k, v = self._fused(getattr(module, found.inputs[0]), head_dim)
        self.rotation.add_layer(module, index)
        scale = getattr(module, "scaling", getattr(module, "scale", None))
        return native.Attention(
            q, k, v, self._linear(getattr(module, found.output)),
            head_dim=head_dim,
            scale=float(head_dim**-0.5 if scale is None else scale),
            rotation=self.rotation.tables()[-1],
            q_norm=_head_norm(getattr(module, "q_norm", None)),
            k_norm=_head_norm(getattr(module, "k_norm", None)),
            window=window,
            softcap=float(getattr(module, "attn_logit_softcapping", None) or 0.0),
        )  # fmt: skip

    def _fused(self, module: Any, head_dim: int) -> list[PackedLinear]:
        """One projection whose rows are those of q, then k, then v."""
        heads = self.config.num_attention_heads
        kv_heads = getattr(self.config, "num_key_value_heads", heads)
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        if sum(sizes) != getattr(module, "out_features", None):
            raise NotCovered("a fused projection does not hold q, k and v")
        return self._of_linear(module, sizes, self._weights)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module does no more than its matrix and bias say: not an adapter around one, nor one whose matrix is
    computed anew for every pass."""
    forward = type(module).forward
    plain = forward in (nn.Linear.forward, Conv1D.forward) or forward.__qualname__ == "FalconLinear.forward"
    return plain and "weight" in module._parameters


def _table(module: nn.Module) -> Tensor:
    """The matrix of token embeddings."""
    weight, own = module._parameters.get("weight"), type(module).forward.__module__.partition(".")[0]
    if not isinstance(module, nn.Embedding) or weight is None or own not in ("torch", "transformers"):
        raise NotCovered(f"the token embeddings are a {type(module).__name__}")
    return weight.detach()


def _by_columns(layer: native.StepLayer, columns: Mapping[str, native.SparseLinear]) -> native.StepLayer:
    """A layer some of whose linears leave out small inputs."""
    attention: dict[str, Any] = {name: linear for name, linear in columns.items() if name in ("q", "k", "v", "o")}
    mlp: dict[str, Any] = {name: linear for name, linear in columns.items() if name not in attention}
    if attention and layer.attention is not None:
        layer = replace(layer, attention=replace(layer.attention, **attention))
    if mlp and isinstance(layer.mlp, native.DenseMLP):
        layer = replace(layer, mlp=replace(layer.mlp, **mlp))
    return layer


def refusal(model: Any, anatomy: Anatomy) -> str | None:
    """Why decode steps of this model would not run natively, as far as its description tells; None where they would."""
    try:
        Architecture(model, anatomy)
    except NotCovered as reason:
        return str(reason)
    return None


def windows(config: Any, layers: int) -> list[int]:
    """How far back each layer sees (0: all), as the cache that `generate` makes says it."""
    cache = DynamicCache(config=config)
    if len(cache.layers) != layers:
        raise NotCovered("the model does not keep one KV cache layer for each decoder layer")
    kept: Any = cache.layers
    for layer in kept:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise NotCovered(f"its KV cache has layers of type {type(layer).__name__}")
    return [int(layer.sliding_window) if layer.is_sliding else 0 for layer in kept]


def _norms(layer: nn.Module) -> dict[str, Any]:
    """Where a decoder layer has its norms: before its halves (Llama), after them (OLMo 2), or both (Gemma 2)."""
    has = {
        name: getattr(layer, name)
        for name in (
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
        )
        if isinstance(getattr(layer, name, None), nn.Module)
    }  # fmt: skip
    names = set(has)
    parallel = bool(getattr(layer, "use_parallel_residual", False))
    if names == {"input_layernorm"}:
        places, parallel = {"attention_in": "input_layernorm", "mlp_in": "input_layernorm"}, True
    elif names == {"input_layernorm", "post_attention_layernorm"}:
        places = {"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}
    elif names == {"post_attention_layernorm", "post_feedforward_layernorm"}:
        places = {"attention_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}
    elif len(names) == 4:
        places = {
            "attention_in": "input_layernorm",
            "attention_out": "post_attention_layernorm",
            "mlp_in": "pre_feedforward_layernorm",
            "mlp_out": "post_feedforward_layernorm",
        }
    else:
        raise NotCovered("its decoder layers have other norms than the native step knows")
    return {"parallel": parallel, **{place: _norm(has[name]) for place, name in places.items()}}


def _norm(module: nn.Module) -> native.Norm:
    """A norm's kind, weight and bias, found by what it does to a few inputs: classes differ in whether the weight is an
    offset from one (Gemma), or is there at all (OLMo)."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    size = next((p.shape[-1] for p in module.parameters()), None)
    size = size or next(iter(getattr(module, "normalized_shape", ())), None)
    if not isinstance(eps, float) or not isinstance(size, int) or size % 2:
        raise NotCovered(f"a {type(module).__name__} is not a norm that the native step knows")
    probe = copy.deepcopy(module).float()
    flat = torch.ones(size, dtype=torch.float32, device="cpu")
    signs = flat.clone()
    signs[1::2] = -1
    sample = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu") + 0.5
    with torch.no_grad():
        bias, flat, swing, expected = (probe(x[None])[0] for x in (torch.zeros_like(flat), flat, signs, sample))
        kind = "layer" if (flat - bias).abs().max() < 1e-3 * (swing - bias).abs().max() else "rms"
        weight = (swing - bias) * signs * math.sqrt(1 + eps)
        centred = sample - sample.mean() if kind == "layer" else sample
        got = centred * torch.rsqrt(centred.square().mean() + eps) * weight + bias
    if not torch.allclose(got, expected, rtol=1e-4, atol=1e-5):
        raise NotCovered(f"a {type(module).__name__} is not a norm that the native step knows")
    return native.Norm(weight.contiguous(), bias.contiguous() if bool(bias.any()) else None, eps, kind)


def _scaled(norm: native.Norm | None, factors: Tensor | None) -> native.Norm | None:
    """A norm whose outputs are multiplied by `factors`, where there are any."""
    if factors is None:
        return norm
    if norm is None:
        raise NotCovered("no norm comes before an MLP whose inputs are smoothed")
    return replace(norm, weight=norm.weight * factors, bias=None if norm.bias is None else norm.bias * factors)


def _head_norm(module: Any) -> native.Norm | None:
    return _norm(module) if isinstance(module, nn.Module) and any(True for _ in module.parameters()) else None


class _Rotation:
    """Tables of rotary position embeddings, made by the model's own module, longer as positions need it."""

    def __init__(self, stack: Any) -> None:
        self._module: Any = getattr(stack, "rotary_emb", None)
        self._kinds: list[str | None] = []  # per layer; "" where there is no rotation
        self.version = 0
        self._tables: dict[str | None, tuple[Tensor, Tensor]] = {}
        self._outgrown: list[Any] = []  # a step in another thread may still read them; together as large as the present
        self._lock = threading.Lock()
        if self._module is None:
            raise NotCovered("its positions are not rotary embeddings made once for all layers")
        kinds = getattr(self._module, "rope_type", "default")
        names = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if not names <= set(STATIC_ROPE):
            raise NotCovered(f"rotary embeddings of type {', '.join(sorted(names))} change with the length of the text")
        self._by_type = "layer_type" in inspect.signature(self._module.forward).parameters
        self.positions = 1024

    def add_layer(self, attention: Any, index: int) -> None:
        kind = None
        if not getattr(attention, "use_rope", True):
            kind = ""
        elif self._by_type:
            kind = getattr(attention, "layer_type", None) or attention.config.layer_types[index]
        self._kinds.append(kind)
        if kind != "" and kind not in self._tables:
            self._tables[kind] = self._make(kind)

    def tables(self) -> list[tuple[Tensor, Tensor] | None]:
        """(cos, sin) of each layer added so far, float32 [positions, rotated dimensions]."""
        return [self._tables.get(kind) for kind in self._kinds]

    def at(self, positions: Tensor) -> list[tuple[Tensor, Tensor] | None]:
        """Tables of `positions` int64 [n] alone, for each layer added so far."""
        tables = {kind: self._make(kind, positions) for kind in self._tables}
        return [tables.get(kind) for kind in self._kinds]

    def reach(self, positions: int) -> None:
        """Makes sure that there are tables for so many positions."""
        with self._lock:
            if positions <= self.positions:
                return
            self.positions = max(positions, 2 * self.positions)
            self._outgrown.append(self._tables)
            self._tables = {kind: self._make(kind) for kind in self._tables}
            self.version += 1

    def _make(self, kind: str | None, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        positions = torch.arange(self.positions, device="cpu") if positions is None else positions
        arguments = (torch.zeros(1, dtype=torch.float32, device="cpu"), positions[None]) + (
            (kind,) if self._by_type else ()
        )
        with torch.no_grad():
            cos, sin = self._module(*arguments)
        return cos[0].float().contiguous(), sin[0].float().contiguous()


class _Stop(Exception):
    def __init__(self, value: Tensor) -> None:
        self.value = value


def _input_of_first_layer(anatomy: Anatomy, ids: Tensor) -> Tensor:
    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Stop(args[0] if args else kwargs["hidden_states"])

    handle = anatomy.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            type(anatomy.stack).forward(anatomy.stack, input_ids=ids, use_cache=False)  # past what wrap has patched
    except _Stop as stopped:
        return stopped.value
    finally:
        handle.remove()
    raise NotCovered("the first layer was not reached")


# ---- running ----

# Arguments of a model's forward that the native step honours. Others must be absent, None or False.
_HONOURED = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
_HARMLESS = {"return_dict", "cache_position", "next_sequence_length"}

# How far native logits may be from the modules' own, in standard deviations of the logits, for the description to
# count as right: a wrong rotation or norm is off by 0.1 to 1. Where a rule chooses neurons, rounding may change some,
# which moves a few logits further than the rest: there all of them count together.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
# In half precision even that tells little: the modules round what they compare with thresholds, and choose otherwise.
# On the embedded model TEAL's logits in bfloat16 differ by 0.2 to 0.9 (median 0.4). There the same description without
# its choices is compared.
_TOLERANCE_OF_RULES = 0.05
# In bfloat16 the embedded model's right description exceeds its tolerance for one prompt in four (0.05 to 0.26): only
# who does so for several is refused for good.
_ATTEMPTS = 4


@dataclass(frozen=True, eq=False)
class Chosen:
    """What the native step runs in place of each layer's MLP (None: dense), and the neurons that this skips per token.

    Whoever makes one keeps it as long as its choice holds: the native step made for it goes with it.

    columns: by layer, the linears that leave out small inputs, by their names in `kernels.step`.
    no_attention, no_mlp: layers that skip these halves; their attention still writes its keys and values.
    plain: use the weights as they were loaded, whatever the plan's format.
    """

    mlps: Sequence[native.BundledMLP | None]
    skipped: int
    no_attention: frozenset[int] = frozenset()
    no_mlp: frozenset[int] = frozenset()
    plain: bool = False
    columns: Mapping[int, Mapping[str, native.SparseLinear]] = field(default_factory=dict)

    @property
    def by_rule(self) -> bool:
        return bool(self.columns) or any(mlp is not None and mlp.rule != "listed" for mlp in self.mlps)


class Decoder:
    """Runs the decode steps of one wrapped model natively, where they are covered.

    count: called with the tokens of a step and the neurons skipped in it. before, narrow, bundled, gone: see
    `Architecture`. packed: told of each linear whose matrix is packed in the plan's format, beside the original.
    notice: takes note of what others have changed, and says why steps have to run on the modules now.
    """

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        weights: str | None,
        count: Callable[[int, float], None],
        before: PackedBefore | None = None,
        narrow: float = 0.0,
        bundled: frozenset[int] = frozenset(),
        packed: Packed | None = None,
        gone: Gone = lambda module: None,
        notice: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._before, self._narrow, self._bundled, self._gone = before, narrow, bundled, gone
        self._packed, self._notice = packed, notice
        self._model, self._anatomy, self._weights, self._count = model, anatomy, weights, count
        self._lock, self._checking = threading.Lock(), threading.Lock()
        self._depth, config = len(anatomy), getattr(anatomy.stack, "config", None)
        self._settings = {} if config is None else vars(config)
        self.times_forgotten = 0
        self.forget()

    def forget(self) -> None:
        """The model's weights were moved, cast or loaded anew: describe it again before the next step."""
        self.times_forgotten += 1
        self._loaded: Architecture | None = None  # with the weights as loaded
        self._architecture: Architecture | None = None  # with the plan's
        self._refusal: str | None = None
        self._disagreed = 0  # first steps so far whose logits were not the model's own
        self._steps: weakref.WeakKeyDictionary[Chosen, tuple[native.Step, int]] = weakref.WeakKeyDictionary()
        self._output: type | None = None
        self._entries: Entries | None = None  # of the KV caches that native steps write into
        self._original: Callable[..., Any] | None = None  # the model's own forward
        self.checkpoints = Checkpoints(self._model.config.get_text_config())

    @property
    def exits_early(self) -> bool:
        """Whether the model's configuration has passes end before the last layer now, as a model that drafts for
        itself has it (`assistant_early_exit`)."""
        return bool(self._settings.get("num_hidden_layers", self._depth) != self._depth)

    @property
    def refusal(self) -> str | None:
        """Why this model's steps are not run natively, if they are not."""
        return self._refusal

    def forward(self, original: Callable[..., Any], chosen: Chosen | str, named: dict[str, Any]) -> Any:
        """The output of one decode step, or None where the model's own modules have to compute it.

        original: the model's own forward; named: its arguments; chosen: a text says why the native step cannot.
        """
        try:
            check_call(named, "cpu", self._most_tokens(chosen))
            if isinstance(chosen, str):
                raise NotCovered(chosen)
            self._check_outputs()
            made = self._output  # another thread may forget it
            if made is None:
                return self._first(original, chosen, named)
            if self.checkpoints.due(int(named["past_key_values"].get_seq_length()), named["input_ids"].shape[1]):
                self.check(named)
            step = self._step_of(chosen)
            logits, left_out = self._run(step, named, self._of(chosen))
            tokens = named["input_ids"].numel()
            self._count(tokens, chosen.skipped * tokens + left_out)
        except NotCovered as reason:
            logger.debug("this step runs on the model's modules: %s", reason)
            return None
        return made(logits=logits, past_key_values=named["past_key_values"])

    def replace(
        self, original: Callable[..., Any], chosen: Chosen | str, named: dict[str, Any], packed: Packed
    ) -> str | None:
        """Runs a first step, as `forward` would; `packed` may free each linear's matrix when it is told of it.

        Returns why no such step can be, if so. Else the native step may be `ready`, or try again with other tokens.
        """
        try:
            check_call(named, "cpu")
            if isinstance(chosen, str):
                raise NotCovered(chosen)
            self.check_modules()
            self._first(original, chosen, named, packed)
        except NotCovered as reason:
            return str(reason)
        return self._refusal

    @property
    def ready(self) -> bool:
        """Whether a native step has been found to agree with the model's own modules."""
        return self._output is not None and self._refusal is None

    def packed_bytes(self) -> tuple[int, int] | None:
        """Bytes of all matrices as packed for native steps, and of the MLPs'; None where there are none."""
        if self._architecture is None:
            return None
        return self._architecture.nbytes()

    def _most_tokens(self, chosen: Chosen | str) -> int:
        """How many tokens a step may have here and not on the modules."""
        if isinstance(chosen, str) or chosen.plain:
            return MAX_ROWS
        if self._architecture is None:
            return MOST_TOKENS if self._weights is not None else MAX_ROWS
        return most_tokens(self._architecture.base)

    def _of(self, chosen: Chosen) -> Architecture:
        found = self._loaded if chosen.plain else self._architecture
        if found is None:  # another thread has forgotten it
            raise _OfThisCall("the model was changed meanwhile")
        return found

    def _step_of(self, chosen: Chosen) -> native.Step:
        architecture = self._of(chosen)
        with self._lock:
            version = architecture.rotation.version
            step, made = self._steps.get(chosen, (None, -1))
            if step is None:
                step = architecture.step(chosen)
            if made != version:
                step.rotate_by(architecture.rotation.tables())
                self._steps[chosen] = (step, version)
        return step

    def _admit(self, cache: Any, more: int) -> Rooms:
        """The cache's rooms. What takes longer to check is checked once a cache, not once a step."""
        entries = self._entries
        if entries is None:
            raise _OfThisCall("the model was changed meanwhile")
        if self.exits_early:
            raise _OfThisCall("passes are to end before the last layer")
        rooms = known_rooms(cache, more, entries)
        if rooms is not None:
            return rooms
        found = make_rooms(cache, more, entries)
        if isinstance(found, str):
            raise _OfThisCall(found)
        return found

    def check_modules(self) -> None:
        """Raises NotCovered where something wants to see what happens inside the model's modules."""
        self._check_outputs()
        reason = self._notice()
        if reason is not None:
            raise _OfThisCall(reason)

    def _check_outputs(self) -> None:
        settings = vars(self._model.config).get  # of which attributes take longer, at every step
        if settings("_output_attentions") or settings("output_attentions") or settings("output_hidden_states"):
            raise _OfThisCall("attentions or hidden states are wanted")

    # --- the first step

    def _first(
        self,
        original: Callable[..., Any],
        chosen: Chosen,
        named: dict[str, Any],
        packed: Packed | None = None,
    ) -> Any:
        """Runs the native step, and the model's own modules on a copy of the cache, to see whether they agree."""
        with self._lock:
            if self._output is not None:  # another thread was first
                return None
            if self.exits_early:
                raise _OfThisCall("passes are to end before the last layer")
            begun = self.times_forgotten
            try:
                loaded = Architecture(self._model, self._anatomy, gone=self._gone)
                self._entries = Entries.of(loaded.base)
                twin = twin_of(named["past_key_values"])
                step = loaded.step(chosen)
                plain = chosen.by_rule and loaded.base.dtype != torch.float32
                judged = self._without_plan(named, loaded) if plain else None
                logits, left_out = self._run(step, named, loaded)
            except _OfThisCall:
                raise
            except NotCovered as reason:
                self._refuse(str(reason))
                return None
            try:
                with as_loaded(), densely() if plain else nullcontext():
                    output = original(**{**named, "past_key_values": twin})
                self._check_unchanged(begun)
                if judged is None:
                    compare(logits, output.logits, chosen.by_rule)
                else:
                    compare(judged, output.logits, by_rule=False)
                self._original = original
                self._probe(loaded, named["past_key_values"])
                self._check_unchanged(begun)
                if packed is None:
                    self._loaded = self._as_loaded(loaded)
                    self._architecture = self._pack() if self._weights else self._loaded
                else:
                    if self._weights is not None:
                        _check_finite(self._model)  # while nothing is gone
                    del loaded, step  # they hold the weights where they lie
                    self._architecture = self._pack(packed)
                # once more as every step after it: the same numbers may be added up in another order
                take_back(named["past_key_values"], named["input_ids"].shape[1])
                logits, left_out = self._run(self._of(chosen).step(chosen), named, self._of(chosen))
            except NotCovered as reason:
                self._disagreed += isinstance(reason, _Disagrees)
                for_good = not isinstance(reason, (_Disagrees, _OfThisCall))
                if for_good or self._disagreed == _ATTEMPTS:
                    self._refuse(str(reason))
                take_back(named["past_key_values"], named["input_ids"].shape[1])
                return None
            self._output = type(output)
            if plain:  # else the modules have counted
                tokens = named["input_ids"].numel()
                self._count(tokens, chosen.skipped * tokens + left_out)
            return self._output(logits=logits, past_key_values=named["past_key_values"])

    def _check_unchanged(self, begun: int) -> None:
        """Raises NotCovered where the model was changed since it had been forgotten `begun` times."""
        if self.times_forgotten != begun:
            raise _OfThisCall("the model was changed meanwhile")

    def _probe(self, loaded: Architecture, like: DynamicCache) -> None:
        """Compares steps at positions far apart, and behind many keys: what texts will come to."""
        far, behind = far_positions(loaded.config)[:, None], torch.arange(KEYS, KEYS + MAX_ROWS, device="cpu")[None]
        if not (self._agrees_at(far, FEW, loaded, like) and self._agrees_at(behind, KEYS, loaded, like)):
            raise NotCovered("at other positions its logits differ from the model's own")

    def _agrees_at(self, places: Tensor, keys: int, loaded: Architecture, like: DynamicCache) -> bool:
        """places: positions [rows, length] of tokens that come after as many keys."""
        cache, step = made_up(self._model.config, like, places.shape[0], keys), loaded.step(self._nothing_chosen())
        # what the positions are rotated by, and no table up to there, which may be large
        step.rotate_by(loaded.rotation.at(places.flatten()))
        rooms, indices = self._admit(cache, places.shape[1]), torch.arange(places.numel(), device="cpu").view_as(places)
        start = torch.zeros(places.shape[0], dtype=torch.int64, device="cpu")

        def natively(ids: Tensor) -> Tensor:
            return step.run(ids, indices, start, rooms.table, keys, ids.shape[1])[0]

        named = {"input_ids": places, "position_ids": places, "past_key_values": cache, "use_cache": True}
        return self._agrees(natively, named)

    def _agrees(self, natively: Callable[[Tensor], Tensor], named: dict[str, Any]) -> bool:
        """Whether a step of other tokens than `named` has gives the logits that modules give; the cache stays."""
        rounded = self._output is not None and self._loaded is None

        def run(ids: Tensor) -> tuple[Tensor, Tensor]:
            logits = natively(ids)  # before there is a twin: its keys and values are views, which no step writes beside
            asked = {**named, "input_ids": ids, "past_key_values": twin_of(named["past_key_values"])}
            with densely():
                return logits, cast(Any, self._original)(**{**asked, "logits_to_keep": 0}).logits

        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        return agree(run, lambda got, expected: _close(got, expected, rounded), named["input_ids"].shape, vocabulary)

    def check(self, named: dict[str, Any]) -> None:
        """Compares a step of as many tokens as `named` has with the modules' own, where none of its length was.

        Raises NotCovered where they differ, now and from now on.
        """
        past, length = int(named["past_key_values"].get_seq_length()), named["input_ids"].shape[1]
        with self._checking:
            if self._refusal is None and self.checkpoints.due(past, length):
                architecture = cast(Architecture, self._loaded or self._architecture)
                step = architecture.step(self._nothing_chosen())
                step.rotate_by(architecture.rotation.tables())

                def natively(ids: Tensor) -> Tensor:
                    return self._compute(step, {**named, "input_ids": ids, "logits_to_keep": 0}, architecture)[1][0]

                if self._agrees(natively, named):
                    self.checkpoints.passed(past, length)
                else:
                    self._refuse(f"from {past} tokens on its logits differ from the model's own")
        if self._refusal is not None:
            raise NotCovered(self._refusal)

    def _nothing_chosen(self) -> Chosen:
        return Chosen([None] * len(self._anatomy), 0)

    def _without_plan(self, named: dict[str, Any], loaded: Architecture) -> Tensor:
        """Logits of a native step that leaves nothing out, on a copy of the cache."""
        step = loaded.step(self._nothing_chosen())
        return self._run(step, {**named, "past_key_values": twin_of(named["past_key_values"])}, loaded)[0]

    def _pack(self, packed: Packed | None = None) -> Architecture:
        try:
            before = None if packed is not None else self._before
            packed = packed or self._packed
            return Architecture(
                self._model, self._anatomy, self._weights, packed, before, self._narrow, gone=self._gone
            )
        except ValueError as reason:
            raise NotCovered(str(reason)) from None

    def _as_loaded(self, in_place: Architecture) -> Architecture:
        """The same numbers in fewer bytes, where there are such."""
        if not self._narrow or in_place.base.dtype != torch.float32:
            return in_place
        return Architecture(
            self._model, self._anatomy, None, None, self._before, self._narrow, self._bundled, gone=self._gone
        )

    def _refuse(self, reason: str) -> None:
        self._refusal = reason
        level, fmt = (logging.DEBUG, "") if self._weights is None else (logging.WARNING, f", in {self._weights}")
        kind = self._anatomy.model_type
        logger.log(level, "decode steps of this %s run on its own modules%s: %s", kind, fmt, reason)

    # --- every step

    def _run(self, step: native.Step, named: dict[str, Any], architecture: Architecture) -> tuple[Tensor, float]:
        rooms, result = self._compute(step, named, architecture)
        rooms.advance(named["input_ids"].shape[1])
        return result

    def _compute(
        self, step: native.Step, named: dict[str, Any], architecture: Architecture
    ) -> tuple[Rooms, tuple[Tensor, float]]:
        """A step whose keys and values lie beyond what the cache counts as its own."""
        ids: Tensor = named["input_ids"]
        rows, length = ids.shape
        rooms = self._admit(named["past_key_values"], length)
        if rooms.rows != rows:
            raise _OfThisCall("the KV cache has another number of rows")
        if step.rows not in (None, rows):
            raise _OfThisCall("other rows than the KV cache's chose their neurons")
        past = rooms.length
        start = _starts(named.get("attention_mask"), rows, past + length)
        positions = named.get("position_ids")
        if positions is None:
            positions = torch.arange(past, past + length, device="cpu").expand(rows, length)
        elif positions.shape != ids.shape:
            positions = (positions if positions.ndim < 3 else positions[0]).expand(rows, length)
        self._check_ranges(step, architecture, ids, positions)
        return rooms, step.run(ids, positions, start, rooms.table, past, named.get("logits_to_keep") or length)

    def _check_ranges(self, step: native.Step, architecture: Architecture, ids: Tensor, positions: Tensor) -> None:
        tokens, places = ids.flatten().tolist(), positions.flatten().tolist()
        vocabulary = step.model.embedding.shape[0]
        if min(tokens) < 0 or max(tokens) >= vocabulary:
            raise IndexError(f"token ids must be in [0, {vocabulary})")
        if min(places) < 0:
            raise _OfThisCall("a position is negative")
        if max(places) >= architecture.rotation.positions:
            architecture.rotation.reach(max(places) + 1)
            step.rotate_by(architecture.rotation.tables())


def check_call(named: dict[str, Any], device: str, most: int = MAX_ROWS) -> None:
    """Raises NotCovered unless a decode step on a type of device can give all that a call of the model's forward with
    these arguments asks for, `most` tokens at most."""
    for name, value in named.items():
        if name not in _HONOURED and name not in _HARMLESS and value is not None and value is not False:
            raise NotCovered(f"{name} was given")
    if named.get("return_dict") is False or named.get("use_cache") is False:
        raise NotCovered("a tuple is wanted, or no cache")
    ids, keep = named.get("input_ids"), named.get("logits_to_keep", 0)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype != torch.int64 or ids.device.type != device:
        raise NotCovered(f"input_ids is not int64 [rows, length] on the {device.upper()}")
    if not 1 <= ids.numel() <= most:
        raise NotCovered(f"the step has {ids.numel()} tokens, not 1 to {most}")
    if not isinstance(keep, int) or keep > ids.shape[1]:
        raise NotCovered("logits_to_keep is not a number of last tokens")
    positions = named.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim > 2 and not _same_on_all_axes(positions):
        raise NotCovered("positions differ between the axes of a picture")
    if torch.is_autocast_enabled(device):
        raise NotCovered("autocast casts what modules compute with")
    if torch.is_grad_enabled():
        raise NotCovered("gradients are wanted: decode under torch.no_grad() or torch.inference_mode()")


def _same_on_all_axes(positions: Tensor) -> bool:
    """Whether positions [axes, rows, length], as vision-language models count them, are those of plain text."""
    return positions.ndim == 3 and bool((positions == positions[:1]).all())


def compare(logits: Tensor, expected: Tensor, by_rule: bool) -> None:
    """Raises _Disagrees where a step's logits are too far from the modules' own. by_rule: whether it chose neurons or
    inputs."""
    difference = logits.float() - expected.float()
    tolerance, error = _TOLERANCE[logits.dtype], difference.abs().max()
    if by_rule:
        tolerance, error = max(tolerance, _TOLERANCE_OF_RULES), difference.square().mean().sqrt()
    error = error / expected.float().std().clamp_min(1e-6)
    if not error <= tolerance:
        raise _Disagrees(f"its logits differ from the model's own by {error:.2g} standard deviations")


def _close(logits: Tensor, expected: Tensor, rounded: bool) -> bool:
    """rounded: whether both come from weights that inputs meet in 8 bits, whose rounding tells them apart."""
    try:
        compare(logits, expected, by_rule=rounded)
    except _Disagrees:
        return False
    return True


class NativeSequence:
    """One sequence that nobody else touches while it decodes: steps without a look at the caller's arguments."""

    def __init__(self, decoder: Decoder, cache: Any) -> None:
        decoder.check_modules()
        if not decoder.ready:
            raise _OfThisCall("the model was changed: it has to be described anew first")
        self._decoder, self._cache, self._described = decoder, cache, decoder.times_forgotten
        self._rooms = decoder._admit(cache, 1)
        self._start = torch.zeros(1, dtype=torch.int64, device="cpu")

    @property
    def length(self) -> int:
        """Tokens whose keys and values are in the cache."""
        return self._rooms.length

    def _ready(self, chosen: Chosen, more: int, at_once: int) -> native.Step:
        """For `more` tokens, the first `at_once` of them in one step."""
        self._decoder.check_modules()
        if self._described != self._decoder.times_forgotten:
            raise _OfThisCall("the model was changed meanwhile")
        if self._decoder.refusal is not None:
            raise NotCovered(self._decoder.refusal)
        if self._decoder.checkpoints.due(self.length, at_once):
            places = torch.arange(self.length, self.length + at_once, device="cpu")[None]
            self._decoder.check({"input_ids": places, "position_ids": places, "past_key_values": self._cache})
        if not self._rooms.fits(more):
            self._rooms = self._decoder._admit(self._cache, more)
        self._decoder._of(chosen).rotation.reach(self.length + more)
        return self._decoder._step_of(chosen)

    def step(self, tokens: Sequence[int], chosen: Chosen) -> Tensor:
        """Logits ``[tokens, vocabulary]`` of 1 to 8 tokens that are appended."""
        step, count = self._ready(chosen, len(tokens), len(tokens)), len(tokens)
        ids, positions = (
            torch.tensor([tokens], device="cpu"),
            torch.arange(self.length, self.length + count, device="cpu")[None],
        )
        logits, left_out = step.run(ids, positions, self._start, self._rooms.table, self.length, count)
        self._rooms.advance(count)
        self._decoder._count(count, chosen.skipped * count + left_out)
        return logits[0]

    def greedy(self, token: int, count: int, ends: Sequence[int], chosen: Chosen) -> list[int]:
        """Appends `token` and returns the likeliest tokens after it: `count`, or fewer up to one of `ends`."""
        count = min(count, self._decoder.checkpoints.room(self.length))
        step, past = self._ready(chosen, count, 1), self.length
        made, left_out = step.generate(token, past, 0, self._rooms.table, past, count, ends)
        self._rooms.advance(len(made))
        self._decoder._count(len(made), chosen.skipped * len(made) + left_out)
        return made

    def draft(self, token: int, count: int, least: float, chosen: Chosen) -> tuple[list[int], list[float]]:
        """Appends `token` and returns the likeliest tokens after it with their probabilities: `count`, or fewer up to
        one whose probability is below `least`."""
        count = min(count, self._decoder.checkpoints.room(self.length))
        step, past = self._ready(chosen, count, 1), self.length
        made, chances, left_out = step.draft(token, past, 0, self._rooms.table, past, count, least)
        self._rooms.advance(len(made))
        self._decoder._count(len(made), chosen.skipped * len(made) + left_out)
        return made, chances

    def rollback(self, length: int) -> None:
        self._rooms.advance(length - self.length)


def _check_finite(model: nn.Module) -> None:
    if not all(finite(m.weight.detach()) for m in model.modules() if isinstance(m, nn.Linear)):
        raise NotCovered("weights with infinities or NaNs have no form of 4 or 8 bits")


class _OfThisCall(NotCovered):
    """Not covered in this call; another may be."""


class _Disagrees(NotCovered):
    """The native step's logits are not the model's own."""


def _starts(mask: Any, rows: int, length: int) -> Tensor:
    """int64 [rows]: where each row's text begins, from a 2-D attention mask [rows, length] that pads on the left."""
    if mask is None:
        return torch.zeros(rows, dtype=torch.int64, device="cpu")
    if not isinstance(mask, Tensor) or mask.shape != (rows, length):
        raise _OfThisCall("the attention mask is not [rows, length so far]")
    seen = mask.bool()
    if bool(seen.all()):
        return torch.zeros(rows, dtype=torch.int64, device="cpu")
    start = length - seen.sum(1)
    if not torch.equal(seen, torch.arange(length, device="cpu") >= start[:, None]) or bool((start == length).any()):
        raise _OfThisCall("the attention mask has holes")
    return start
