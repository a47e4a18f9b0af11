"""A file of weights of which part is in memory: some of its tensors are kept there, the others are read from it, piece
by piece, whenever they are used.

Nothing else changes for who has the tensors: they are views of the mapped file, and whoever reads them gets their
numbers, by page faults. Who reads a lot asks here first: native steps (`attach`), and products on a model's modules
(`in_memory`). A mapping by itself would not do: a step reads all weights in the same order, and the page cache drops
just what is needed next. Here reads are large, go past the page cache where the system can (O_DIRECT), and are ahead
of what is computed (csrc/stream.h). What a token chooses, neurons or experts, is not read by everybody: of that, slots
keep some (slots.py).
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import arguments, cpu
from .files import PAGE, READERS, DirectFile, anonymous
from .groups import FORMATS, GROUP, TILE
from .packed import PackedLinear
from .slots import Slots, Spilled
from .store import Store

_CODES = {form.code: form for form in FORMATS.values()}
_WORTH_GUESSING = 8 << 20  # bytes of an expert from which on the next layer's are read ahead
_FOUR = 4  # rows of a unit of matrices without groups; `unit` in csrc/step_thread.h

_active: list[weakref.ref[Residency]] = []


class Residency:
    """What of a mapped file is kept in memory.

    Args:
        store: the file.
        streamed: names of the tensors that are read whenever they are used, unless they are kept. Others are left to
            the page cache.
        piece, ring: bytes that are read at once, whole pages, and of the memory that they are read into.
        scratch: bytes that matrices may be unpacked into at once.
        unreadable: made of a text and raised where the file cannot be read.
        bundled: whether neurons that tokens choose are put into a file of their own.
    """

    def __init__(
        self,
        store: Store,
        streamed: Sequence[str],
        piece: int,
        ring: int,
        scratch: int,
        unreadable: Callable[[str], Exception] = OSError,
        bundled: bool = False,
    ) -> None:
        self.bundled = bundled
        self.store, self.piece, self.scratch, self._unreadable = store, piece, scratch, unreadable
        self._base = store.memory.data_ptr()
        self._sizes = dict(sorted(store.spans[name] for name in streamed))  # bytes by offset
        self._offsets = list(self._sizes)
        self._kept: dict[int, Tensor] = {}  # by offset
        self.ring = anonymous(ring)
        self._running: Stream | None = None
        self._pool: ThreadPoolExecutor | None = None
        self.lock = threading.RLock()  # of the ring, and of slots
        self.slots: Slots | None = None  # what tokens choose
        self._allowed = 0
        self._spilled: Spilled | None = None
        self._bundles: dict[int, tuple[Tensor, int]] = {}  # what is there, and where; by address
        self._gates: dict[int, Tensor] = {}  # of bundles whose gates decide, by their address

    def open(self) -> None:
        """From now on products with the file's tensors come here."""
        _active.append(weakref.ref(self))

    def close(self) -> None:
        """The file is mapped as it was, and nothing of it kept."""
        _active[:] = [ref for ref in _active if ref() not in (None, self)]
        with self.lock:
            self.use(None)
            self._kept.clear()
            self._gates.clear()
            self._bundles.clear()
            self.slots = self._spilled = None
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None

    # --- what is kept

    def keep(self, name: str) -> None:
        """Reads a tensor into memory, to stay there."""
        at, size = self.store.spans[name]
        copy = anonymous(size)

        def read(first: int) -> None:
            self._read(at + first, min(self.piece, size - first), copy[first:])

        list(self._readers().map(read, range(0, size, self.piece)))
        self._kept[at] = copy[:size]

    def drop(self, name: str) -> None:
        """A tensor is not kept any longer; steps that were made before go on with what they hold."""
        del self._kept[self.store.spans[name][0]]
        self.rest()

    def covers(self, weight: Tensor) -> bool:
        """Whether these numbers are read from the file, or kept: changes to them would not act."""
        return weight.device.type == "cpu" and self._tensor_at(weight.data_ptr()) is not None

    def keeps(self, weight: Tensor) -> bool:
        """Whether these numbers are in memory."""
        found = self.place(weight.data_ptr())
        return found is not None and found[0] is not None

    def _tensor_at(self, address: int) -> tuple[int, int] | None:
        """The tensor that may be streamed at this address of the mapping: its offset, and that of the address."""
        offset = address - self._base
        before = bisect_right(self._offsets, offset)
        if not before:
            return None
        at = self._offsets[before - 1]
        return (at, offset) if offset < at + self._sizes[at] else None

    def place(self, address: int) -> tuple[int | None, int] | None:
        """Where something at this address of the mapping is: the address in memory, or None where it is to be read,
        and its offset in the file. None of what is not kept here."""
        found = self._tensor_at(address)
        if found is None:
            return None
        at, offset = found
        copy = self._kept.get(at)
        return (None if copy is None else copy.data_ptr() + offset - at), offset

    def holders(self) -> list[Tensor]:
        """What has to live as long as addresses from `place` are used."""
        return list(self._kept.values())

    # --- what tokens choose

    def put_bundles(self, tensors: Iterable[Tensor]) -> Tensor:
        """Bundles of a layer's neurons, of which each token chooses some, or what of them is then read, a few at once:
        all of them ``[neurons, ...]``, mapped from a file of their own.

        Raises what `Residency` was told to where there is no room for them.
        """
        try:
            if self._spilled is None:
                self._spilled = Spilled(self.store.folder)
            mapped, at = self._spilled.put(tensors)
        except OSError as error:
            raise self._unreadable(f"cannot write the neurons that tokens choose to a file: {error.strerror}") from None
        self._bundles[mapped.data_ptr()] = mapped, at
        return mapped

    def allow(self, nbytes: int) -> bool:
        """Slots may take so many bytes. Returns whether steps have to be made anew."""
        self._allowed = nbytes
        changes = self.slots is not None and self.slots.allow(nbytes)
        if changes:
            self.rest()
        return changes

    def _slots_of(self, file: DirectFile) -> Slots:
        if self.slots is None:
            self.slots = Slots(file)
            self.slots.allow(self._allowed)
        return self.slots

    def choose_experts(self, layer: arguments.StepLayer, rows: int) -> Any:
        """The matrices of a layer's experts, for a step that writes their places to them; None where they are not read
        from here. rows: of a step at most."""
        count = int(layer.experts.router.count)
        given = (arguments.StepLinear * (3 * count)).from_address(layer.experts.matrices)
        kinds = [kind for kind in range(3) if given[kind].weight]
        places = [[self.place(given[3 * e + kind].weight) for e in range(count)] for kind in kinds]
        if any(place is None for of_kind in places for place in of_kind):
            return None
        offsets = [[place[1] for place in of_kind if place is not None] for of_kind in places]
        slots = self._slots_of(self.store.file)
        index = slots.layer(given[kinds[0]].weight)
        if index is None:
            parts = []
            for kind, of_kind in zip(kinds, offsets, strict=True):
                step = of_kind[1] - of_kind[0] if count > 1 else 0
                if any(at != of_kind[0] + e * step for e, at in enumerate(of_kind)):
                    return None
                parts.append((of_kind[0], step, 0, _bytes_of(given[kind])))
            slots.add(given[kinds[0]].weight, count, parts, 2 * rows * int(layer.experts.router.chosen))
            index = slots.layer(given[kinds[0]].weight)
        assert index is not None
        copy = (arguments.StepLinear * (3 * count))(*given)
        layer.experts.matrices, layer.experts.slots = ctypes.addressof(copy), index + 1
        return copy

    def choose_neurons(self, mlp: arguments.StepMlp) -> bool:
        """Whether a layer's bundles are read from slots; its struct says so then."""
        address = mlp.low or mlp.weight
        if address not in self._bundles:
            return False
        mapped, at = self._bundles[address]
        assert self._spilled is not None
        slots = self._slots_of(self._spilled.file)
        if mlp.rule == cpu.RULE["gate"] and address not in self._gates:
            self._gates[address] = mapped[:, 0].contiguous()
        gates = self._gates.get(address)
        if slots.layer(address) is None:
            count, size = mapped.shape[0], mapped[0].nbytes
            first = 0 if gates is None else gates[0].nbytes
            slots.add(address, count, [(at, size, first, size)], count)
        index = slots.layer(address)
        assert index is not None
        mlp.slots, mlp.gates = index + 1, None if gates is None else gates.data_ptr()
        return True

    # --- reading

    def _read(self, at: int, size: int, to: Tensor) -> None:
        try:
            self.store.file.read(at, size, to)
        except OSError as error:
            raise self.error(str(error)) from None

    def error(self, reason: str) -> Exception:
        return self._unreadable(f"cannot read the weights any more, {reason}: load the model again")

    def check(self) -> None:
        """Raises where the file is shorter than it was: whoever reads the mapping beyond its end would be killed."""
        if os.fstat(self.store.file.fd).st_size < self.store.memory.numel():
            raise self.error("their file is shorter than it was")

    def use(self, stream: Stream | None) -> None:
        """Who has the ring from now on; None: this class itself. Under the lock."""
        if self._running not in (None, stream):
            self._running.stop()
        self._running = stream

    def rest(self) -> None:
        """Whoever read last is let go of, with the matrices and slots that it holds: they shall be free before others
        come in their place."""
        with self.lock:
            self.use(None)

    def runs(self, part: PackedLinear, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, PackedLinear]]:
        """See `in_memory`; others wait meanwhile."""
        weight = part.weight
        found = self._tensor_at(weight.data_ptr())
        if found is None:
            yield 0, part
            return
        at, offset = found
        copy = self._kept.get(at)
        if copy is not None:
            mine = copy[offset - at :][: weight.nbytes]
            yield 0, replace(part, weight=mine.view(weight.dtype).view(weight.shape))
        else:
            rows = TILE if part.grouped else 1
            units = begin // rows, -(-(part.out_features if end is None else end) // rows)
            with self.lock:
                self.use(None)
                yield from self._read_runs(part, offset, rows, units)

    def _read_runs(
        self, part: PackedLinear, offset: int, rows: int, units: tuple[int, int]
    ) -> Iterator[tuple[int, PackedLinear]]:
        """Some units of a matrix, of so many rows each, as many runs ahead as the ring holds."""
        weight = part.weight
        unit = weight.nbytes // weight.shape[0]
        count = max(1, self.piece // unit)
        place = (-(-count * unit // PAGE) + 1) * PAGE  # wherever a run begins in a page
        places = self.ring.numel() // place
        todo = deque(enumerate(range(*units, count)))
        reading: deque[tuple[int, int, Tensor, Future[None]]] = deque()

        def begin() -> None:
            index, first = todo.popleft()
            n = min(count, units[1] - first)
            to = self.ring[index % places * place :][:place]
            reading.append((first, n, to, self._readers().submit(self._read, offset + first * unit, n * unit, to)))

        try:
            while todo and len(reading) < places:
                begin()
            while reading:
                first, n, to, done = reading.popleft()
                done.result()
                memory = to[(offset + first * unit) % PAGE :][: n * unit]
                yield first * rows, _run(part, memory, first * rows, n)
                if todo:
                    begin()
        finally:
            for *_, done in reading:
                done.exception()  # nothing may write into the ring any more

    def _readers(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="coreskip-read")
        return self._pool


def _run(part: PackedLinear, memory: Tensor, first: int, units: int) -> PackedLinear:
    """Rows of a matrix from `first` on, which lie in `memory`."""
    weight = memory.view(part.weight.dtype).view(units, *part.weight.shape[1:])
    last = min(first + units * (TILE if part.grouped else 1), part.out_features)
    bias = None if part.bias is None else part.bias[first:last]
    return replace(part, weight=weight, bias=bias, rows=last - first if part.grouped else None)


def of(address: int) -> Residency | None:
    """Who keeps what is at this address, if anybody does."""
    for ref in _active:
        found = ref()
        if found is not None and found.place(address) is not None:
            return found
    return None


def in_memory(part: PackedLinear, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, PackedLinear]]:
    """Rows `begin` to `end` of a matrix, and perhaps some around them, in runs that are in memory, each good until the
    next is asked for: the first row's index, and the rows. Usually it is one, the matrix.

    Raises what `Residency` was told to where the file cannot be read.
    """
    holder = of(part.weight.data_ptr()) if _active else None
    return iter(((0, part),)) if holder is None else holder.runs(part, begin, end)


def copied(part: PackedLinear) -> PackedLinear:
    """A matrix in memory for as long as it is held: itself where it is there."""
    holder = of(part.weight.data_ptr()) if _active else None
    if holder is None or holder.keeps(part.weight):
        return next(in_memory(part))[1]
    return replace(part, weight=torch.cat([run.weight.clone() for _, run in holder.runs(part)]))


# ---- native steps ----


class Stream:
    """The pieces that the native step of one program reads, in its order."""

    def __init__(
        self, residency: Residency, pieces: Sequence[tuple[int, int, int, int]], chosen: Sequence[object]
    ) -> None:
        """pieces: of each its place in the file, bytes, and first and last unit. chosen: of layers that have slots."""
        self._residency, self._held = residency, [*residency.holders(), *residency._gates.values(), *chosen]
        self.slots = residency.slots.native() if chosen and residency.slots is not None else None
        self._pieces = _placed(pieces, residency.ring.numel())
        self._library = cpu.library()
        self.address = 0
        if pieces:
            fd, ring = residency.store.file.fd, residency.ring.data_ptr()
            self.address = self._library.coreskip_stream(fd, ring, self._pieces, len(pieces), READERS)
            self._end = weakref.finalize(self, self._library.coreskip_stream_end, self.address)

    @contextmanager
    def running(self) -> Iterator[None]:
        """For the length of native steps.

        Raises what `Residency` was told to where the file cannot be read.
        """
        if not self.address and self.slots is None:
            yield
            return
        with self._residency.lock:
            if self.address:
                self._residency.use(self)
            try:
                yield
            except OSError as error:
                self.stop()
                raise self._residency.error(str(error)) from None

    def stop(self) -> None:
        """Nothing is read any more."""
        if self.address:
            self._library.coreskip_stream_stop(self.address)

    @property
    def bytes_a_step(self) -> int:
        return sum(piece.bytes for piece in self._pieces)


def attach(model: arguments.StepModel, layers: Iterable[arguments.StepLayer]) -> Stream | None:
    """Lets a native step read its matrices where a `Residency` has them; None where none has any.

    Of the structs what is kept gets its address, what is read its pieces, and what tokens choose its slots.
    """
    layers = list(layers)
    matrices = [matrix for layer in layers for matrix in _in_order(layer)] + [model.head]
    holders = [of(matrix.weight) for matrix in matrices if matrix.weight] if _active else []
    residency = next((holder for holder in holders if holder is not None), None)
    if residency is None:
        return None
    pieces: list[tuple[int, int, int, int]] = []
    for matrix in matrices:
        found = residency.place(matrix.weight) if matrix.weight else None
        if found is None:
            continue
        address, offset = found
        if address is not None:
            matrix.weight = address
            continue
        mine = _pieces_of(matrix, offset, residency.piece)
        matrix.piece, matrix.pieces = len(pieces), len(mine)
        pieces += mine
    table = residency.place(model.embedding)
    if table is not None and table[0] is not None:
        model.embedding = table[0]
    chosen = [some for layer in layers if (some := _chosen(layer, residency))]
    stream = Stream(residency, pieces, chosen)
    model.stream = stream.address or None
    if stream.slots is not None and residency.slots is not None:
        model.slots = stream.slots.address
        # with experts of 0.8 MB guessing took 1.2 times as long as waiting for what was missed; with experts of 3.1 MB
        # it read more than it spared
        small = any(layer.experts.slots for layer in layers) and residency.slots.slot_bytes < _WORTH_GUESSING
        model.reads_ahead = residency.slots.ahead and not small
    return stream


def _chosen(layer: arguments.StepLayer, residency: Residency) -> object:
    """What has to live as long as a layer's slots are used; nothing where it has none."""
    if layer.run_mlp and layer.experts.matrices:
        return residency.choose_experts(layer, cpu.MAX_ROWS)
    return bool(layer.run_mlp and layer.mlp.weight) and residency.choose_neurons(layer.mlp)


def _in_order(layer: arguments.StepLayer) -> Iterator[Any]:
    """The matrices of a layer that a step reads, in its order; see csrc/step_walker.h."""
    latent = layer.latent
    if latent.kv_low.weight:  # what expands latents is read by heads, where it lies
        first = (latent.q_low, latent.kv_low, layer.q) if latent.q_low.weight else (layer.q, latent.kv_low)
        attention = [*first, *((layer.o,) if layer.run_attention else ())]
    elif layer.recurrence.taps:
        more = list(layer.recurrence.more)
        attention = [layer.q, layer.k, layer.v, layer.attention_gate, *more, layer.o]
    elif layer.run_attention:
        attention = [layer.q, layer.k, layer.v, layer.attention_gate, layer.o]
    else:  # its keys and values alone
        attention = [layer.q] if layer.fused else [layer.k, layer.v]
    bundled = layer.mlp.weight or layer.mlp.groups.rows
    mlp = [layer.gate, layer.up, layer.down] if layer.run_mlp and not bundled else []
    yield from (matrix for matrix in (*attention, *mlp) if not matrix.columns)


def _unit_of(matrix: arguments.StepLinear) -> tuple[int, int]:
    """Bytes of a matrix' unit, and of all of it."""
    form = _CODES.get(matrix.dtype)
    if form is None:
        size = matrix.stride * (4 if matrix.dtype == 0 else 2)
        return _FOUR * size, matrix.out * size
    unit = matrix.stride // (GROUP * form.groups) * form.tile_bytes
    return unit, -(-matrix.out // TILE) * unit


def _bytes_of(matrix: arguments.StepLinear) -> int:
    return _unit_of(matrix)[1]


def _pieces_of(matrix: arguments.StepLinear, offset: int, most: int) -> list[tuple[int, int, int, int]]:
    """A matrix in pieces of about `most` bytes: where each is, its bytes, and its first and last unit."""
    unit, total = _unit_of(matrix)
    count, step = -(-total // unit), max(1, most // unit)
    return [
        (offset + first * unit, min(total, (first + step) * unit) - first * unit, first, min(count, first + step))
        for first in range(0, count, step)
    ]


def _placed(pieces: Sequence[tuple[int, int, int, int]], ring: int) -> Any:
    """The pieces with their places in the ring, one after the other, and with what has had that memory before."""
    places, at = list[tuple[int, int]](), 0
    for where, size, *_ in pieces:
        room = -(-(where % PAGE + size) // PAGE) * PAGE
        at = 0 if at + room > ring else at
        places.append((at, at + room))
        at += room
    found = (arguments.StreamPiece * len(pieces))()
    for i, ((where, size, begin, end), place) in enumerate(zip(pieces, places, strict=True)):
        earlier = (j % len(pieces) for j in range(i - 1 + len(pieces), i - 1, -1))
        after = next(j for j in earlier if places[j][0] < place[1] and place[0] < places[j][1])
        found[i] = arguments.StreamPiece(where, size, place[0], after, begin, end)
    return found
