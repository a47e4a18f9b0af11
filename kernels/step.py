"""A whole decode step as data, and the one native call that carries it out (csrc/arguments.h, csrc/step.cpp).

The runtime describes an architecture once with `StepModel`; `Step` keeps that description in the form the native code
reads, together with every tensor it points to.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import arguments, cpu, residency
from .experts import SCORINGS, PackedExperts, Router
from .neuron_groups import PackedNeurons
from .packed import PackedColumns, PackedLinear
from .sparse import RowLists, SparseLinear, SparseMLP

_P, _N, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

Place = tuple[int, int]  # the address of a sequence's keys and values, and how many positions are in them already

_NORM = {"rms": 1, "layer": 2}
_RULE = {**cpu.RULE, "learned": 3}
_NORMS = ("attention_in", "attention_out", "attention_after", "mlp_in", "mlp_out", "mlp_after")
_OF_ROUTERS = (
    "count", "chosen", "groups", "groups_kept", "by_pairs", "normalized", "added", "floor", "scale", "jitter", "least",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Norm:
    """RMSNorm ("rms") or LayerNorm ("layer"): weight and bias are float32 of the normed size."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    kind: str


Linear = PackedLinear | SparseLinear


@dataclass(frozen=True, eq=False)
class DenseMLP:
    """down(act(gate(x)) * up(x)), each matrix where it lies; gate is None in a plain MLP."""

    gate: Linear | None
    up: Linear
    down: Linear

    @property
    def nbytes(self) -> int:
        linears = (self.gate, self.up, self.down)
        return sum((m.packed if isinstance(m, SparseLinear) else m).nbytes for m in linears if m is not None)


Heads = tuple[int, int, int]  # offset, run and step: head h is at offset + h // run * step + h % run * head_dim


@dataclass(frozen=True, eq=False)
class Attention:
    """Grouped-query attention. Projections q, k, v to heads of `head_dim`, and o back.

    order: where `q` holds k and v, too (which are None then): the places of q's, k's and v's heads among its outputs.
    rotation: (cos, sin), each float32 [positions, rope_dim], applied to the first rope_dim dimensions, by halves or, if
    `paired`, to neighbours, each with the angles of the first half; None: none. turned: norms come after it.
    window: how many positions a token sees, itself included; 0: all. softcap: of the scores; 0: none.
    slopes: float32 [heads], what a score loses for each position that its key lies back (ALiBi). sinks: float32
    [heads], a further score in each softmax, which no value belongs to.
    """

    q: Linear
    k: Linear | None
    v: Linear | None
    o: Linear
    head_dim: int
    scale: float
    rotation: tuple[Tensor, Tensor] | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    window: int = 0
    softcap: float = 0.0
    order: tuple[Heads, Heads, Heads] | None = None
    paired: bool = False
    turned: bool = False
    slopes: Tensor | None = None
    sinks: Tensor | None = None

    @property
    def heads(self) -> int:
        return _packed(self.o).in_features // self.head_dim

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Of a position's entries: heads, and the size of each one's key and value."""
        return self.kv_heads, self.head_dim, self.head_dim

    @property
    def kv_heads(self) -> int:
        if self.k is not None:
            return self.k.out_features // self.head_dim
        return (self.q.out_features // self.head_dim - self.heads) // 2

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(linear for linear in (self.q, self.k, self.v, self.o) if linear is not None)


@dataclass(frozen=True, eq=False)
class LatentAttention:
    """Latent attention (DeepSeek-V2, 2405.04434), whose cache has a latent and a turned key for each position.

    q gives nope + rope dimensions of each head, from what q_low gives, normed, where there is one, else from x. kv_low
    gives a latent, which is normed, and `rope` dimensions that are turned, as q's are. expand: floats, from a latent to
    nope dimensions of keys and `value` ones of values, head by head. rotation, paired: as for `Attention`, of those
    that are turned; apart: neighbours are turned, and come to lie half of what is turned apart.
    """

    q_low: Linear | None
    q_low_norm: Norm | None
    q: Linear
    kv_low: Linear
    kv_low_norm: Norm
    expand: PackedLinear
    o: Linear
    heads: int
    rope: int
    scale: float
    rotation: tuple[Tensor, Tensor]
    paired: bool = False
    apart: bool = False
    window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.expand.in_features

    @property
    def nope(self) -> int:
        return _packed(self.q).out_features // self.heads - self.rope

    @property
    def value(self) -> int:
        return self.expand.out_features // self.heads - self.nope

    @property
    def sizes(self) -> tuple[int, int, int]:
        """See `Attention.sizes`."""
        return 1, self.rank, self.rope

    @property
    def linears(self) -> tuple[Linear, ...]:
        found = (self.q_low, self.q, self.kv_low, self.expand, self.o)
        return tuple(linear for linear in found if linear is not None)


@dataclass(frozen=True, eq=False)
class StepLayer:
    """A decoder layer: x += out(attention(in(x))), x = after(x), then the same for the MLP; absent norms are None.

    parallel: the MLP reads x as it was before the attention. mlp None: it is skipped. entries_only: the attention is
    skipped but for the keys and values of the new tokens, which are written to the cache. attention None: there
    is none.
    """

    attention: Attention | LatentAttention | None
    mlp: DenseMLP | SparseMLP | PackedExperts | None
    act: str
    attention_in: Norm | None = None
    attention_out: Norm | None = None
    mlp_in: Norm | None = None
    mlp_out: Norm | None = None
    residual_scale: float = 1.0
    parallel: bool = False
    entries_only: bool = False
    attention_after: Norm | None = None
    mlp_after: Norm | None = None


@dataclass(frozen=True, eq=False)
class StepModel:
    """A decoder: embedding [vocabulary, hidden], or in tiles, layers, a last norm, and the LM head.

    places: [positions, hidden], added to embeddings by position, and embedding_norm, of the sum; None: there is none.
    """

    embedding: Tensor | PackedLinear
    layers: Sequence[StepLayer]
    norm: Norm | None
    head: PackedLinear
    dtype: torch.dtype  # of logits, keys and values
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    places: Tensor | None = None
    embedding_norm: Norm | None = None

    @property
    def hidden(self) -> int:
        table = self.embedding
        return table.in_features if isinstance(table, PackedLinear) else table.shape[1]

    @property
    def vocabulary(self) -> int:
        """How many tokens have an embedding."""
        table = self.embedding
        return table.out_features if isinstance(table, PackedLinear) else table.shape[0]


class Step:
    """A described decoder, ready to run. Immutable but for the rotation tables, which may grow (`rotate_by`)."""

    def __init__(self, model: StepModel) -> None:
        self.model = model
        self.library = cpu.library()
        self._layers = (arguments.StepLayer * len(model.layers))(*(_layer(layer) for layer in model.layers))
        self._model = arguments.StepModel(
            layers=ctypes.cast(self._layers, _P),
            norm=_norm(model.norm),
            embedding_norm=_norm(model.embedding_norm),
            head=_linear(model.head),
            layer_count=len(model.layers),
            embedding_scale=model.embedding_scale,
            logit_scale=model.logit_scale,
            logit_softcap=model.logit_softcap,
            **_embedding(model.embedding),
            places=cpu.address(model.places),
            places_dtype=0 if model.places is None else cpu.DTYPE[model.places.dtype],
            kv_dtype=cpu.DTYPE[model.dtype],
            logit_dtype=cpu.DTYPE[model.dtype],
        )
        #: what brings weights that are not in memory; None: all are
        self.stream = residency.attach(self._model, self._layers)
        self._rotations: list[tuple[Tensor, Tensor] | None] = []
        self._parts: dict[tuple[int, int], Step] = {}
        attentions = [layer.attention for layer in model.layers if layer.attention is not None]
        self._entries = [(model.dtype, *a.sizes) for a in attentions]
        self._windows = [a.window for a in attentions]
        lists = (layer.mlp.lists for layer in model.layers if isinstance(layer.mlp, SparseMLP))
        self.rows = next((found.rows for found in lists if found is not None and found.rows is not None), None)

    @property
    def address(self) -> int:
        """Of the description that native code reads."""
        return ctypes.addressof(self._model)

    def rotate_by(self, rotations: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        """Uses other rotation tables, one pair a layer, from now on."""
        for layer, rotation in zip(self._layers, rotations, strict=True):
            layer.cos, layer.sin = (None, None) if rotation is None else (r.data_ptr() for r in rotation)
        self._rotations = list(rotations)
        for part in list(self._parts.values()):
            part.rotate_by(rotations)

    def place_by(self, places: Tensor) -> None:
        """Adds other rows to embeddings, [positions, hidden], from now on."""
        self._places = places.contiguous()
        self._model.places = self._places.data_ptr()

    def run(
        self, tokens: Tensor, positions: Tensor, start: Tensor, caches: KeyValues, past: int, wanted: int
    ) -> tuple[Tensor, float]:
        """One step of every sequence by `length` tokens, whose keys and values are written to `caches`.

        tokens, positions: int64 [rows, length]; more than 8 tokens go through the layers in slices of 8. start: int64
        [rows], the first cache position that counts (what lies before is left padding). past: positions already in the
        cache, whose capacity must suffice. wanted: of how many last tokens of each row the logits are wanted.
        Returns logits [rows, wanted, vocabulary] of the model's dtype, and the number of neurons that rules left out,
        those of whole experts among them, summed over tokens and layers. Raises ValueError for other rows than there
        are lists for, or caches that are not this model's or too small.
        """
        rows, length = tokens.shape
        self.check_caches(caches, rows, past, past + length)
        return self._sliced(tokens, positions, start, [(caches.row(row), past) for row in range(rows)], wanted)

    def run_each(
        self, tokens: Tensor, positions: Tensor, caches: Sequence[KeyValues], pasts: Sequence[int], wanted: int
    ) -> tuple[Tensor, float]:
        """`run` of sequences that have nothing in common but the model: each has a cache of one row, and positions in
        it of its own. What a sequence gets is what it gets alone, to the bit, unless a rule chooses neurons: what the
        threads add up is then divided by what any of the sequences has chosen."""
        rows, length = tokens.shape
        for cache, past in zip(caches, pasts, strict=True):
            self.check_caches(cache, 1, past, past + length)
        start = torch.zeros(rows, dtype=torch.int64, device="cpu")
        places = [(cache.row(0), past) for cache, past in zip(caches, pasts, strict=True)]
        return self._sliced(tokens, positions, start, places, wanted)

    def _sliced(
        self, tokens: Tensor, positions: Tensor, start: Tensor, places: Sequence[Place], wanted: int
    ) -> tuple[Tensor, float]:
        rows, length = tokens.shape
        if self.rows not in (None, rows):
            raise ValueError(f"{self.rows} rows have lists of neurons, not {rows}")
        if rows * length <= cpu.MAX_ROWS:
            return self._run(tokens, positions, start, places, wanted)
        logits = torch.empty((rows, wanted, self.model.head.out_features), dtype=self.model.dtype, device="cpu")
        together, left_out = max(1, cpu.MAX_ROWS // length), 0.0
        for first in range(0, rows, together):
            last = min(first + together, rows)
            step = self._part(first, last)
            for at in range(0, length, cpu.MAX_ROWS):
                end = min(at + cpu.MAX_ROWS, length)
                some = slice(first, last), slice(at, end)
                to = wanted - (length - end)  # where the logits of the slice's last token go, if they are wanted
                kept = min(end - at, max(to, 0))
                further = [(entries, past + at) for entries, past in places[first:last]]
                found, skipped = step._run(tokens[some], positions[some], start[first:last], further, kept or 1)
                if kept:
                    logits[first:last, to - kept : to] = found
                left_out += skipped
        return logits, left_out

    def _part(self, first: int, last: int) -> Step:
        """The step of rows `first` to `last`, where each has lists of its own."""
        if self.rows is None:
            return self
        part = self._parts.get((first, last))
        if part is None:
            layers = [_part(layer, first, last) for layer in self.model.layers]
            part = Step(replace(self.model, layers=layers))
            if self._rotations:
                part.rotate_by(self._rotations)
            self._parts[first, last] = part
        return part

    def _run(
        self, tokens: Tensor, positions: Tensor, start: Tensor, places: Sequence[Place], wanted: int
    ) -> tuple[Tensor, float]:
        """`run` of at most 8 tokens."""
        rows, length = tokens.shape
        tokens, positions = tokens.contiguous(), positions.contiguous()
        logits = torch.empty((rows, wanted, self.model.head.out_features), dtype=self.model.dtype, device="cpu")
        skipped, past = ctypes.c_double(0), (_N * rows)(*(past for _, past in places))
        caches = (_P * rows)(*(entries for entries, _ in places))
        call = arguments.StepCall(
            tokens.data_ptr(), positions.data_ptr(), start.data_ptr(), ctypes.addressof(past),
            ctypes.addressof(caches), logits.data_ptr(), ctypes.addressof(skipped), rows, length, wanted,
            torch.get_num_threads(),
        )  # fmt: skip
        with self._reading():
            cpu.check(self.library.coreskip_step(ctypes.byref(self._model), ctypes.byref(call)), 0)
        return logits, skipped.value

    def _reading(self) -> AbstractContextManager[None]:
        return nullcontext() if self.stream is None else self.stream.running()

    def generate(
        self, token: int, position: int, start: int, caches: KeyValues, past: int, count: int, ends: Sequence[int]
    ) -> tuple[list[int], float]:
        """Greedy decoding of one sequence without leaving the native code.

        token: the last one, whose keys and values are not in the cache yet, at `position`; start, past: as for `run`.
        Makes `count` tokens, for which the caches have room, or fewer where one of `ends` comes, the last then.
        Returns the tokens and the number of neurons that rules left out. The entries of all but the last are written.
        """
        self.check_caches(caches, 1, past, past + count)
        stops, made, done = (_N * len(ends))(*ends), (_N * count)(), _N(0)
        with self._of_one_token(token, position, start, caches, past) as (call, skipped):
            call_with = (
                ctypes.byref(self._model),
                ctypes.byref(call),
                count,
                stops,
                len(ends),
                made,
                ctypes.byref(done),
            )
            with self._reading():
                cpu.check(self.library.coreskip_generate(*call_with), 0)
        return list(made[: done.value]), skipped.value

    def draft(
        self, token: int, position: int, start: int, caches: KeyValues, past: int, count: int, least: float
    ) -> tuple[list[int], list[float], float]:
        """Greedy decoding as `generate` does it, up to the first token whose probability is below `least`, the last
        then. Returns the tokens, their probabilities, and the number of neurons that rules left out."""
        self.check_caches(caches, 1, past, past + count)
        made, chances, done = (_N * count)(), (_F * count)(), _N(0)
        with self._of_one_token(token, position, start, caches, past) as (call, skipped):
            call_with = (ctypes.byref(self._model), ctypes.byref(call), count, least, made, chances, ctypes.byref(done))
            with self._reading():
                cpu.check(self.library.coreskip_draft(*call_with), 0)
        return list(made[: done.value]), list(chances[: done.value]), skipped.value

    def check_caches(self, caches: KeyValues, rows: int, past: int, end: int) -> None:
        """Raises ValueError where native code would read or write beside the caches."""
        if not self._entries:
            return
        if caches.entries != self._entries:
            raise ValueError("the KV cache is not this model's")
        if rows > caches.rows or not 0 <= past < end <= caches.longest:
            raise ValueError(f"the KV cache has no room for {rows} rows of {end} positions")
        if caches.begins_late and any(
            first > (max(0, past - window + 1) if window else 0)
            for first, window in zip(caches.first, self._windows, strict=True)
        ):
            raise ValueError("the KV cache does not hold what the step looks back at")

    @contextmanager
    def _of_one_token(
        self, token: int, position: int, start: int, caches: KeyValues, past: int
    ) -> Iterator[tuple[arguments.StepCall, ctypes.c_double]]:
        """The call of a step of one token, with what it points to; and where it counts neurons left out."""
        numbers, skipped = (_N * 4)(token, position, start, past), ctypes.c_double(0)
        at, width, entries = ctypes.addressof(numbers), ctypes.sizeof(_N), _P(caches.row(0))
        logits = torch.empty(self.model.head.out_features, dtype=self.model.dtype, device="cpu")
        yield arguments.StepCall(
            at, at + width, at + 2 * width, at + 3 * width, ctypes.addressof(entries), logits.data_ptr(),
            ctypes.addressof(skipped), 1, 1, 1, torch.get_num_threads(),
        ), skipped  # fmt: skip


def likeliest(logits: Tensor, chances: bool = True) -> tuple[list[int], list[float]]:
    """Of each row of `logits` ``[rows, vocabulary]`` the first of the likeliest tokens, and its probability (where
    `chances` are wanted, else nothing)."""
    rows, vocabulary = logits.shape
    logits, made, found = logits.contiguous(), (_N * rows)(), (_F * rows)()
    cpu.library().coreskip_likeliest(
        logits.data_ptr(), cpu.DTYPE[logits.dtype], rows, vocabulary, made, found if chances else None,
        min(rows, torch.get_num_threads()),
    )  # fmt: skip
    return list(made), list(found) if chances else []


@dataclass(eq=False)
class KeyValues:
    """Where each layer's keys and values lie: [rows, kv_heads, capacity, head_dim] of the model's dtype.

    first: per layer, the position that lies at index 0.
    Raises ValueError unless a layer's keys and values have the same shape and dtype, lie alike, and are on the CPU.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    first: Sequence[int]
    entries: list[tuple[torch.dtype, int, int, int]] = field(init=False)  # per layer: heads, sizes of keys and values
    rows: int = field(init=False)
    longest: int = field(init=False)  # positions that all layers have memory for
    begins_late: bool = field(init=False)  # whether a layer has forgotten the first of them
    _table: Any = field(init=False)  # [rows][layers]

    def __post_init__(self) -> None:
        for k, v in zip(self.keys, self.values, strict=True):
            alike = (k.shape[:3], k.dtype, k.device) == (v.shape[:3], v.dtype, v.device)
            if k.shape == v.shape:
                alike = alike and k.stride() == v.stride()
            dense = all(x.ndim == 4 and x.stride()[2:] == (x.shape[3], 1) for x in (k, v))
            if not alike or not dense or k.device.type != "cpu":
                raise ValueError("keys and values are not [rows, heads, capacity, head_dim] on the CPU, alike")
        pairs = zip(self.keys, self.values, strict=True)
        self.entries = [(k.dtype, k.shape[1], k.shape[3], v.shape[3]) for k, v in pairs]
        self.rows = min((k.shape[0] for k in self.keys), default=0)
        capacities = (k.shape[2] + first for k, first in zip(self.keys, self.first, strict=True))
        self.longest = min(capacities, default=0)
        self.begins_late = max(self.first, default=0) > 0
        layers = list(zip(self.keys, self.values, self.first, strict=True))
        self._table = (arguments.StepCache * (self.rows * len(layers)))(
            *(
                arguments.StepCache(_row(k, row), _row(v, row), k.stride(1), begin)
                for row in range(self.rows)
                for k, v, begin in layers
            )
        )

    def row(self, row: int) -> int:
        """The address of what the native step reads of one sequence's keys and values."""
        return ctypes.addressof(self._table) + row * len(self.keys) * ctypes.sizeof(arguments.StepCache)

    def entry(self, row: int, layer: int) -> int:
        """The same of one of its layers."""
        return self.row(row) + layer * ctypes.sizeof(arguments.StepCache)


def _row(tensor: Tensor, row: int) -> int:
    """The address of a row of a batch."""
    return tensor.data_ptr() + row * tensor.stride(0) * tensor.itemsize


def _part(layer: StepLayer, first: int, last: int) -> StepLayer:
    """The layer of some rows alone."""
    if not isinstance(layer.mlp, SparseMLP) or layer.mlp.lists is None:
        return layer
    return replace(layer, mlp=replace(layer.mlp, lists=layer.mlp.lists.part(first, last)))


# ---- as the structs of csrc/arguments.h ----


def _embedding(table: Tensor | PackedLinear) -> dict[str, int]:
    if isinstance(table, PackedLinear):
        where, hidden, dtype, stride = table.weight.data_ptr(), table.in_features, table.code, table.stride
    else:
        where, hidden, dtype, stride = table.data_ptr(), table.shape[1], cpu.DTYPE[table.dtype], table.shape[1]
    return {"embedding": where, "hidden": hidden, "embedding_dtype": dtype, "embedding_stride": stride}


def _norm(norm: Norm | None) -> arguments.StepNorm:
    if norm is None:
        return arguments.StepNorm()
    return arguments.StepNorm(
        cpu.address(norm.weight), cpu.address(norm.bias), norm.weight.numel(), norm.eps, _NORM[norm.kind]
    )


def _packed(linear: Linear) -> PackedLinear | PackedColumns:
    return linear.packed if isinstance(linear, SparseLinear) else linear


def _linear(linear: Linear | None) -> arguments.StepLinear:
    if linear is None:
        return arguments.StepLinear()
    packed = _packed(linear)
    weight = packed.weight
    out = arguments.StepLinear(
        weight=weight.data_ptr(), bias=cpu.address(packed.bias), in_=packed.in_features, out=packed.out_features
    )
    if isinstance(linear, SparseLinear):
        out.norm = linear.packed.norm.data_ptr() if linear.by_norm else None
        out.stride, out.dtype, out.columns = weight.stride(0), cpu.DTYPE[weight.dtype], True
        out.least, out.neurons = linear.threshold, linear.neurons
    else:
        out.scale, out.stride, out.whole = cpu.address(linear.scale), linear.stride, linear.whole
        out.dtype = linear.code if linear.grouped else cpu.DTYPE[weight.dtype]
    return out


def _bundled(mlp: SparseMLP) -> arguments.StepMlp:
    packed, lists = mlp.packed, mlp.lists
    if isinstance(packed, PackedNeurons):
        return arguments.StepMlp(
            **_lists(lists),
            down_bias=cpu.address(packed.down_bias),
            groups=packed.argument(mlp.threshold or 0.0, mlp.refine),
        )
    names = ("weight", "low", "scale", "norm", "gate_bias", "up_bias", "down_bias", "mean")
    sliced = packed.low is not None
    reduce, expand = mlp.predictor or (None, None)
    return arguments.StepMlp(
        **{name: cpu.address(getattr(packed, name)) for name in names},
        **_lists(lists),
        neurons=packed.intermediate_size,
        stride=packed.weight.shape[2] * (2 if sliced else 1),
        keep=-1 if mlp.keep is None else mlp.keep,
        threshold=_least(mlp),
        refine=mlp.refine,
        dtype=cpu.SLICED if sliced else cpu.DTYPE[packed.weight.dtype],
        gated=packed.gated,
        rule=_RULE[mlp.rule],
        reduce=_linear(reduce),
        expand=_linear(expand),
    )


def _lists(lists: RowLists | None) -> dict[str, int | None]:
    if lists is None:
        return {}
    return {
        "list": lists.listed.data_ptr(),
        "selected": cpu.address(lists.wanted),
        "listed": lists.listed.numel(),
    }


def _least(mlp: SparseMLP) -> float:
    """The threshold of what the native code compares: of learned scores what goes into the sigmoid, which rises."""
    if mlp.rule != "learned" or mlp.threshold is None:
        return mlp.threshold or 0.0
    return torch.tensor(min(mlp.threshold, 1.0), dtype=torch.float64).logit().item()


def _layer(layer: StepLayer) -> arguments.StepLayer:
    attention, mlp = layer.attention, layer.mlp
    out = arguments.StepLayer(
        **{name: _norm(getattr(layer, name)) for name in _NORMS},
        residual_scale=layer.residual_scale,
        act=cpu.ACT[layer.act],
        run_attention=attention is not None and not layer.entries_only,
        run_mlp=mlp is not None,
        parallel=layer.parallel,
    )
    if isinstance(attention, LatentAttention):
        _put_latent(out, attention)
    elif attention is not None:
        _put_attention(out, attention)
    if isinstance(mlp, DenseMLP):
        out.gate, out.up, out.down = _linear(mlp.gate), _linear(mlp.up), _linear(mlp.down)
    elif isinstance(mlp, PackedExperts):
        _put_experts(out, mlp)
    elif mlp is not None:
        out.mlp = _bundled(mlp)
    return out


# Thousands of structs in a large model, which all steps over it share.
_matrices: WeakKeyDictionary[PackedExperts, Any] = WeakKeyDictionary()


def _put_experts(out: arguments.StepLayer, mlp: PackedExperts) -> None:
    if mlp not in _matrices:
        linears = [_linear(linear) for expert in mlp.experts for linear in (expert.gate, expert.up, expert.down)]
        _matrices[mlp] = (arguments.StepLinear * len(linears))(*linears)
    shared = mlp.shared
    if shared is not None:
        out.gate, out.up, out.down = _linear(shared.gate), _linear(shared.up), _linear(shared.down)
    out.experts = arguments.StepExperts(
        router=_router(mlp.router),
        matrices=ctypes.addressof(_matrices[mlp]),
        shared_gate=_linear(mlp.shared_gate),
        limit=mlp.limit,
        slope=mlp.slope,
        offset=mlp.offset,
    )


def _router(router: Router) -> arguments.StepRouter:
    return arguments.StepRouter(
        logits=_linear(router.logits),
        correction=cpu.address(router.correction),
        kept=cpu.address(router.kept),
        scoring=SCORINGS.index(router.scoring),
        **{name: getattr(router, name) for name in _OF_ROUTERS},
    )


def _apart(attention: Attention) -> tuple[Heads, Heads, Heads]:
    """The places of heads that lie one after the other."""
    return (0, attention.heads, 0), (0, attention.kv_heads, 0), (0, attention.kv_heads, 0)


def _put_attention(out: arguments.StepLayer, attention: Attention) -> None:
    for name in ("q", "k", "v", "o"):
        setattr(out, name, _linear(getattr(attention, name)))
    out.q_norm, out.k_norm = _norm(attention.q_norm), _norm(attention.k_norm)
    out.heads, out.kv_heads = attention.heads, attention.kv_heads
    out.fused, out.paired, out.turned = attention.order is not None, attention.paired, attention.turned
    for place, name in zip(attention.order or _apart(attention), "qkv", strict=True):
        linear = attention.q if attention.order else getattr(attention, name)
        setattr(out, f"{name}_heads", arguments.StepHeads(*place, linear.out_features))
    out.slopes, out.sinks = cpu.address(attention.slopes), cpu.address(attention.sinks)
    out.head_dim, out.window = attention.head_dim, attention.window
    out.attention_scale, out.softcap = attention.scale, attention.softcap
    if attention.rotation is not None:
        cos, sin = attention.rotation
        out.rope_dim, out.cos, out.sin = cos.shape[1], cos.data_ptr(), sin.data_ptr()


def _put_latent(out: arguments.StepLayer, attention: LatentAttention) -> None:
    cos, sin = attention.rotation
    out.q, out.k, out.o = _linear(attention.q), _linear(attention.expand), _linear(attention.o)
    out.latent = arguments.StepLatentPart(
        q_low=_linear(attention.q_low),
        kv_low=_linear(attention.kv_low),
        q_low_norm=_norm(attention.q_low_norm),
        kv_low_norm=_norm(attention.kv_low_norm),
        apart=attention.apart,
        **{name: getattr(attention, name) for name in ("rank", "nope", "rope", "value")},
    )
    out.heads, out.kv_heads, out.head_dim = attention.heads, 1, attention.rank
    out.rope_dim, out.cos, out.sin, out.paired = cos.shape[1], cos.data_ptr(), sin.data_ptr(), attention.paired
    out.window, out.attention_scale, out.softcap = attention.window, attention.scale, attention.softcap
    out.sinks = cpu.address(attention.sinks)
