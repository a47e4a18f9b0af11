"""The one native call that carries out a decode step (csrc/step.cpp).

The runtime describes an architecture once with `StepModel`; `Step` keeps that description in the form the native code
reads, together with every tensor it points to.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import arguments, cpu, residency
from .sparse import SparseMLP
from .step_model import (
    Attention,
    BeforeHead,
    Convolution,
    DenseMLP,
    Heads,
    LatentAttention,
    Linear,
    Norm,
    Recurrence,
    Recurrent,
    Side,
    SideInputs,
    StepLayer,
    StepModel,
    all_tiles,
)
from .step_structs import before_head_struct, embedding_struct, layer_struct, linear_struct, norm_struct, sides_struct

__all__ = [
    "Attention",
    "BeforeHead",
    "Convolution",
    "DenseMLP",
    "Heads",
    "KeyValues",
    "LatentAttention",
    "Linear",
    "Norm",
    "Recurrence",
    "Recurrent",
    "Side",
    "SideInputs",
    "Step",
    "StepLayer",
    "StepModel",
    "likeliest",
]

_P, _N, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

#: tokens that go through the layers together where all matrices are tiles
MOST_TOGETHER = 16

Place = tuple[int, int]  # the address of a sequence's keys and values, and how many positions are in them already


class Step:
    """A described decoder, ready to run. Immutable but for the rotation tables, which may grow (`rotate_by`).

    inner: for `through` alone, which needs no LM head; it is not fetched ahead then.
    """

    def __init__(self, model: StepModel, inner: bool = False) -> None:
        self.model = model
        self.library = cpu.library()
        self._layers = (arguments.StepLayer * len(model.layers))(*(layer_struct(layer) for layer in model.layers))
        kept = [layer.attention for layer in model.layers]
        recurrences = [found for found in kept if isinstance(found, Recurrent)]
        attentions = [found for found in kept if found is not None and not isinstance(found, Recurrent)]
        places = {False: 0, True: len(attentions)}  # of a sequence's caches: with keys and values, then with states
        for struct, found in zip(self._layers, kept, strict=True):
            recurs = isinstance(found, Recurrent)
            struct.cache = places[recurs]
            places[recurs] += found is not None
        self._model = arguments.StepModel(
            layers=ctypes.cast(self._layers, _P),
            norm=norm_struct(model.norm),
            embedding_norm=norm_struct(model.embedding_norm),
            token_norm=norm_struct(model.token_norm),
            head=linear_struct(None if inner else model.head),
            layer_count=len(model.layers),
            embedding_scale=model.embedding_scale,
            logit_scale=model.logit_scale,
            logit_softcap=model.logit_softcap,
            **embedding_struct(model.embedding),
            **before_head_struct(None if inner else model.before),
            **sides_struct(model.sides),
            places=cpu.address(model.places),
            places_dtype=0 if model.places is None else cpu.DTYPE[model.places.dtype],
            kv_dtype=cpu.DTYPE[model.dtype],
            logit_dtype=cpu.DTYPE[model.dtype],
        )
        #: what brings weights that are not in memory; None: all are
        self.stream = residency.attach(self._model, self._layers)
        self._rotations: list[tuple[Tensor, Tensor] | None] = []
        self._parts: dict[tuple[int, int], Step] = {}
        self._entries = [(model.dtype, *a.sizes) for a in attentions]
        self._states = [(model.dtype, found.sizes) for found in recurrences]
        self._windows = [a.window for a in attentions]
        self.rows = next((rows for layer in model.layers if (rows := _rows_of(layer)) is not None), None)

    @functools.cached_property
    def most_tokens(self) -> int:
        """How many tokens go through the layers together: what all kernels take, or more where they are with tiles."""
        return MOST_TOGETHER if self.stream is None and all_tiles(self.model) else cpu.MAX_ROWS

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

        tokens, positions: int64 [rows, length]; more than `most_tokens` go through the layers in slices. start: int64
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

    def through(
        self, x: Tensor, positions: Tensor, start: Tensor, caches: KeyValues, past: int
    ) -> tuple[Tensor, float]:
        """The residual stream x float32 [rows, length, hidden] behind the layers, without embedding and LM head, and
        the neurons that rules left out; the rest as for `run`. At most 8 tokens: ValueError."""
        rows, length, _ = x.shape
        if rows * length > cpu.MAX_ROWS or self.rows not in (None, rows):
            raise ValueError(f"{rows} rows of {length} tokens do not go through the layers together")
        self.check_caches(caches, rows, past, past + length)
        places = [(caches.row(row) if self._entries else 0, past) for row in range(rows)]
        y = x.detach().clone(memory_format=torch.contiguous_format)
        return y, self._call(None, positions, start, places, 0, None, y)

    def _sliced(
        self, tokens: Tensor, positions: Tensor, start: Tensor, places: Sequence[Place], wanted: int
    ) -> tuple[Tensor, float]:
        rows, length = tokens.shape
        if self.rows not in (None, rows):
            raise ValueError(f"{self.rows} rows have lists of neurons, not {rows}")
        most = self.most_tokens
        if rows * length <= most:
            return self._run(tokens, positions, start, places, wanted)
        logits = torch.empty((rows, wanted, self.model.head.out_features), dtype=self.model.dtype, device="cpu")
        together, left_out = max(1, most // length), 0.0
        for first in range(0, rows, together):
            last = min(first + together, rows)
            step = self._part(first, last)
            for at in range(0, length, most):
                end = min(at + most, length)
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
        """`run` of at most `most_tokens` tokens."""
        tokens, rows = tokens.contiguous(), tokens.shape[0]
        logits = torch.empty((rows, wanted, self.model.head.out_features), dtype=self.model.dtype, device="cpu")
        return logits, self._call(tokens, positions, start, places, wanted, logits, None)

    def _call(
        self,
        tokens: Tensor | None,
        positions: Tensor,
        start: Tensor,
        places: Sequence[Place],
        wanted: int,
        logits: Tensor | None,
        hidden: Tensor | None,
    ) -> float:
        (rows, length), positions = positions.shape, positions.contiguous()
        skipped, past = ctypes.c_double(0), (_N * rows)(*(past for _, past in places))
        caches = (_P * rows)(*(entries for entries, _ in places))
        call = arguments.StepCall(
            cpu.address(tokens), positions.data_ptr(), start.data_ptr(), ctypes.addressof(past),
            ctypes.addressof(caches), cpu.address(logits), cpu.address(hidden), ctypes.addressof(skipped),
            rows, length, wanted, torch.get_num_threads(),
        )  # fmt: skip
        with self._reading():
            cpu.check(self.library.coreskip_step(ctypes.byref(self._model), ctypes.byref(call)), 0)
        return skipped.value

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
        with self._of_one_token(token, position, start, caches, past) as (call, skipped):
            made = self._generated(call, count, [ends])
        return made[0], skipped.value

    def generate_each(
        self, tokens: Sequence[int], caches: Sequence[KeyValues], pasts: Sequence[int], count: int,
        ends: Sequence[Sequence[int]], hurry: ctypes.c_int32 | None = None,
    ) -> tuple[list[list[int]], float]:  # fmt: skip
        """`generate` of at most `most_tokens` sequences as `run_each` steps them; their positions are their `pasts`.
        Each makes as many tokens: `count`, or fewer, but one at least, where one of its own `ends` comes to any of them
        or another thread sets `hurry` to 1."""
        for cache, past in zip(caches, pasts, strict=True):
            self.check_caches(cache, 1, past, past + count)
        if self.rows is not None:
            raise ValueError("rows that have lists of neurons are stepped one by one")
        rows = len(tokens)
        last, places, start = (_N * rows)(*tokens), (_N * rows)(*pasts), (_N * rows)()
        entries, skipped = (_P * rows)(*(cache.row(0) for cache in caches)), ctypes.c_double(0)
        logits = torch.empty((rows, self.model.head.out_features), dtype=self.model.dtype, device="cpu")
        call = arguments.StepCall(
            ctypes.addressof(last), ctypes.addressof(places), ctypes.addressof(start), ctypes.addressof(places),
            ctypes.addressof(entries), logits.data_ptr(), None, ctypes.addressof(skipped), rows, 1, 1,
            torch.get_num_threads(),
        )  # fmt: skip
        return self._generated(call, count, ends, hurry), skipped.value

    def _generated(
        self, call: arguments.StepCall, count: int, ends: Sequence[Sequence[int]], hurry: ctypes.c_int32 | None = None
    ) -> list[list[int]]:
        """By row, the tokens of a call."""
        rows = len(ends)
        tokens = [token for of_row in ends for token in of_row]
        firsts = itertools.accumulate((len(of_row) for of_row in ends), initial=0)
        made, done = (_N * (count * rows))(), _N(0)
        with self._reading():
            status = self.library.coreskip_generate(
                ctypes.byref(self._model), ctypes.byref(call), count, (_N * len(tokens))(*tokens),
                (_N * (rows + 1))(*firsts), None if hurry is None else ctypes.byref(hurry), made, ctypes.byref(done),
            )  # fmt: skip
            cpu.check(status, 0)
        found = made[: done.value * rows]
        return [found[row::rows] for row in range(rows)]

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
        if not (self._entries or self._states):
            return
        if caches.entries != self._entries or caches.state_sizes != self._states:
            raise ValueError("the KV cache is not this model's")
        if rows > caches.rows or not 0 <= past < end or (self._entries and end > caches.longest):
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
            at, at + width, at + 2 * width, at + 3 * width, ctypes.addressof(entries), logits.data_ptr(), None,
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

    first: per layer, the position that lies at index 0. states: of layers with a recurrence, what steps write in place,
    each with rows first: the last inputs of its channels, in the model's dtype, and what heads hold, if any do, in
    float32.
    Raises ValueError unless a layer's keys and values have the same shape and dtype, lie alike, and are on the CPU, as
    states are.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    first: Sequence[int]
    states: Sequence[tuple[Tensor, ...]] = ()
    entries: list[tuple[torch.dtype, int, int, int]] = field(init=False)  # per layer: heads, sizes of keys and values
    state_sizes: list[tuple[torch.dtype, tuple[tuple[int, ...], ...]]] = field(init=False)
    rows: int = field(init=False)
    longest: int = field(init=False)  # positions that all layers have memory for
    begins_late: bool = field(init=False)  # whether a layer has forgotten the first of them
    _table: Any = field(init=False)  # [rows][layers]: with keys and values first, then with states
    _width: int = field(init=False)

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
        for states in self.states:
            lie = all(x.is_contiguous() and x.device.type == "cpu" for x in states)
            if not lie or any(x.dtype != torch.float32 for x in states[1:]):
                raise ValueError("the states of a recurrence do not lie one after the other on the CPU")
        self.state_sizes = [(some[0].dtype, tuple(tuple(x.shape[1:]) for x in some)) for some in self.states]
        self.rows = min((x.shape[0] for x in (*self.keys, *(x for some in self.states for x in some))), default=0)
        capacities = (k.shape[2] + first for k, first in zip(self.keys, self.first, strict=True))
        self.longest = min(capacities, default=0)
        self.begins_late = max(self.first, default=0) > 0
        layers = list(zip(self.keys, self.values, self.first, strict=True))
        self._width = len(layers) + len(self.states)
        table = [
            cache
            for row in range(self.rows)
            for cache in (
                *(arguments.StepCache(_row(k, row), _row(v, row), k.stride(1), begin) for k, v, begin in layers),
                *(arguments.StepCache(*(_row(x, row) for x in some)) for some in self.states),
            )
        ]
        self._table = (arguments.StepCache * len(table))(*table)

    def row(self, row: int) -> int:
        """The address of what the native step reads of one sequence's keys and values."""
        return ctypes.addressof(self._table) + row * self._width * ctypes.sizeof(arguments.StepCache)

    def entry(self, row: int, layer: int) -> int:
        """The same of one of its layers."""
        return self.row(row) + layer * ctypes.sizeof(arguments.StepCache)


def _row(tensor: Tensor, row: int) -> int:
    """The address of a row of a batch."""
    return tensor.data_ptr() + row * tensor.stride(0) * tensor.itemsize


def _rows_of(layer: StepLayer) -> int | None:
    """How many rows have neurons of their own; None: all have the same."""
    mlp = layer.mlp
    if isinstance(mlp, DenseMLP):
        return None if mlp.wanted is None or mlp.wanted.shape[0] == 1 else mlp.wanted.shape[0]
    return mlp.lists.rows if isinstance(mlp, SparseMLP) and mlp.lists is not None else None


def _part(layer: StepLayer, first: int, last: int) -> StepLayer:
    """The layer of some rows alone."""
    mlp = layer.mlp
    if _rows_of(layer) is None:
        return layer
    if isinstance(mlp, DenseMLP) and mlp.wanted is not None:
        return replace(layer, mlp=replace(mlp, wanted=mlp.wanted[first:last]))
    assert isinstance(mlp, SparseMLP)
    assert mlp.lists is not None
    return replace(layer, mlp=replace(mlp, lists=mlp.lists.part(first, last)))
