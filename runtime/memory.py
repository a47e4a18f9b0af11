"""A packed model under a cap on memory: which of its matrices stay there, and what else takes room.

A decode step reads every matrix of its program once, in the same order at every token. So which ones stay does not
matter for how much is read, only how many bytes; they are spread evenly, so that the disk is never idle for long
while the rest is read ahead (kernels/residency.py). Of neurons and experts that each token chooses a token reads some
only: matrices come first, and slots for these have what is left (kernels/slots.py). Long texts need room for keys,
values and what a prompt's pass computes: both give way to them.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import nn

from ..kernels.files import PAGE, look_up
from ..kernels.ops import MAX_ROWS
from ..kernels.residency import Residency
from ..kernels.slots import readers_bytes
from ..kernels.store import Store
from ..predictors.anatomy import Anatomy, dissect
from ..predictors.checks import WEIGHT_FORMATS
from ..predictors.errors import CoreskipError
from ..predictors.plan import Plan
from ..predictors.policies import Chooser
from .cost import Cost, cost, read_bandwidth
from .layer_skips import LayerSkips
from .memory_parts import (
    copied_bytes,
    entry_bytes,
    largest_unit,
    mixtures_of,
    neuron_bytes,
    step_bytes,
    streamed_of,
    tables_of,
    unread_by,
    widths,
)
from .memory_size import text_of
from .packed_folder import reader_of, store_of
from .packed_layer import PackedLayer
from .prepared import Prepared
from .program import Program
from .release import trim
from .selfcheck import FEW, KEYS
from .steps import Steps
from .unpacking import scratch_of

logger = logging.getLogger("coreskip")

# What is read at once: pieces below 256 KiB leave bandwidth of a disk unused, larger ones than 4 MiB gain nothing.
_LEAST_PIECE, _MOST_PIECE = 256 << 10, 4 << 20
_PIECES = 8  # of the ring: what two readers are at, and as much again ahead
_SHORT = 16, 48  # tokens of a prompt, and with its continuation, for which there has to be room at least
_FEWEST_KEYS = 16  # behind which native steps are compared with the modules
_PACKING = 6  # bytes a weight while one matrix of an MLP is taken apart
_PUTTING_AWAY = 64 * 256  # bytes an input while neurons that tokens choose go to a file, a few at a time
_PACKED = Chooser.PROMPT, Chooser.CALIBRATION  # who choose neurons that are packed by themselves
_PROBE = 16  # the part of the cap that comparing native steps with the modules may take, where a few keys take less
_REFILL = 8  # a part of the cap that has to be free before more matrices are kept again

#: caps that `load` was told
_caps: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def check_cap(model: Any, cap: int) -> None:
    """`model` is to be wrapped under this cap.

    Raises:
        CoreskipError: it is too small.
    """
    anatomy = dissect(model)
    Capped(model, anatomy, Program.of(anatomy, Plan.dense(model)), set(), cap)
    _caps[model] = cap


def cap_of(model: nn.Module) -> int | None:
    return _caps.get(model)


@dataclass(frozen=True)
class Sizes:
    """Bytes that a model takes besides its matrices.

    Attributes:
        always: norms, buffers, what is read into, what matrices are unpacked into, a step's own memory.
        entry: keys and values of one token.
        activations: of one token of a prompt's pass.
        fixed: neurons that the plan keeps for all texts, and what tokens choose neurons by. chosen: that one prompt
            chooses. packing: of a layer, while these are taken out of its matrices. once: the same where it is done
            before the first text.
        slots: that are needed at least for what tokens choose.
        logits: of the tokens that a step may have, in the copies that comparing takes.
    """

    always: int
    entry: int
    activations: int
    logits: int
    fixed: int
    chosen: int
    packing: int
    once: int
    slots: int

    def of_probe(self, keys: int) -> int:
        """Of a comparison of native steps with the model's own modules behind so many keys, twice there while they
        move to where steps add to them, and at several positions behind a few."""
        return self.entry * max(2 * keys + 32, 3 * FEW * MAX_ROWS) + self.logits

    @property
    def least(self) -> int:
        """What has to fit beside it, with no matrix kept: a short text, and a comparison."""
        return max(self.of_probe(_FEWEST_KEYS), self.of_text(1, *_SHORT), self.once)

    def of_text(self, rows: int, prompt: int, length: int) -> int:
        """Of so many texts at once; the KV cache grows by doubling."""
        return rows * (self.entry * (2 * length + 128) + max(self.activations * prompt, self.packing) + self.chosen)


class Memory:
    """What a wrapped model may take: all that it needs."""

    cap: int | None = None

    def __init__(self, model: nn.Module) -> None:
        self._reader = reader_of(model)  # while it is not wrapped, if it was loaded sparingly

    def start(self) -> None:
        """From now on matrices are read as the cap has it."""
        if self._reader is not None:
            self._reader.close()

    def settle(self) -> None:
        """Steps have been compared with the model's own modules, which takes memory: what stays is read."""

    def stop(self) -> None:
        """Nothing stays."""
        if self._reader is not None:
            self._reader.open()

    def check(self) -> None:
        """Raises CoreskipError where the model's file is not what it was."""

    def covers(self, modules: Iterable[nn.Module]) -> bool:
        """Whether weights of these are the file's: changes to them would not act."""
        return False

    def refuse(self, what: str) -> None:
        """Raises CoreskipError where the weights are the file's."""

    def holding(self, rows: int, prompt: int, length: int) -> AbstractContextManager[None]:
        """Room for so many texts of up to `length` tokens, `prompt` of them at once.

        Raises:
            CoreskipError: there is none.
        """
        return nullcontext()


class Host(Protocol):
    """A wrapped model, as its cap needs it."""

    model: nn.Module
    anatomy: Anatomy
    plan: Plan
    program: Program
    skips: LayerSkips
    steps: Steps
    prepared: Prepared


#: ways to choose neurons, experts or layers that a budget's search tries under a cap, and those that a cap allows
METHODS = ("auto", "core", "similar", "static", "layers", "experts", "skip-experts")
_ALLOWED = (*METHODS, "sketch", "threshold", "learned", "bricks")


def check_method(method: str) -> None:
    """Raises CoreskipError where plans of this method are not run under a cap."""
    if method not in _ALLOWED:
        raise CoreskipError(f"under memory= no plan of method {method} is run; choose from {', '.join(_ALLOWED)}")


def _check_program(program: Program) -> None:
    """Raises CoreskipError where what tokens choose cannot be read from a file."""
    by_token = program.chosen_by(Chooser.TOKEN)
    if program.chosen_by(Chooser.INPUTS) or not all(brick.native and brick.chosen for brick in by_token.values()):
        raise CoreskipError(
            "under memory= inputs are not left out, and what tokens choose is read by neuron for sketches of 4 bits, "
            "gates (cats), learned predictors and experts alone: use one of these, or a plan of method core, similar, "
            "static or layers, or leave out memory"
        )
    if by_token and any(layer.experts is not None for layer in program.layers):
        raise CoreskipError("under memory= tokens choose neurons or experts, not both: leave one out of the plan")


def capped_under(model: Any, plan: Plan, anatomy: Anatomy, cap: int) -> Capped:
    """What a model would keep and read under a plan.

    Raises:
        CoreskipError: the plan does not fit, or the model cannot be capped.
    """
    program = Program.of(anatomy, plan)
    _check_program(program)
    return Capped(model, anatomy, program, unread_by(anatomy, program, LayerSkips(anatomy, plan).skipped(None)), cap)


def cost_under(model: Any, plan: Plan, anatomy: Anatomy, cap: int) -> Cost:
    """`cost` where a cap leaves matrices on the disk: what is read from there takes as many bytes of memory as are read
    meanwhile. Of a plan that does not fit, infinitely many."""
    found = cost(model, plan, anatomy)
    try:
        capped = capped_under(model, plan, anatomy, cap)
    except CoreskipError:
        return Cost(found.moved, math.inf)
    read = capped.expected[1] + capped.chosen_per_token
    slower = read_bandwidth("cpu") / capped.residency.store.file.bandwidth if read else 0.0
    return Cost(found.moved, max(found.weighed, read * slower))


def recipe_under(model: Any, plan: Plan, cap: int) -> dict[str, str]:
    """What a plan's recipe says of a cap: what stays in memory, and what a token reads."""
    capped = capped_under(model, plan, dissect(model), cap)
    kept, read = capped.expected
    neurons = capped.needs.fixed + capped.needs.chosen
    return {
        "memory": text_of(cap),
        "in_memory": text_of(kept + neurons),
        "read_per_token": text_of(read + capped.chosen_per_token),
    }


def memory_of(host: Host, cap: int | None, reads_all: bool) -> Memory:
    """reads_all: whether steps leave nothing out that the plan leaves out.

    Raises:
        CoreskipError: the model, or its plan, cannot be capped, or the cap is too small.
    """
    if cap is None:
        return Memory(host.model)
    if host.plan.weights in WEIGHT_FORMATS:
        raise CoreskipError(
            f"under memory= a model runs in the format it was packed in, not in {host.plan.weights}: pack it so"
        )
    _check_program(host.program)
    me: Any = weakref.proxy(host)  # who has this
    unread = set[nn.Module]() if reads_all else unread_by(host.anatomy, host.program, host.skips.skipped(None))
    early = host.program.chosen_by(Chooser.CALIBRATION, Chooser.TOKEN)
    capped = Capped(
        host.model, host.anatomy, host.program, unread, cap, lambda: me.steps.native.renew(),
        lambda: [me.prepared.mlp(layer) for layer in early],
        lambda: not (me.steps.native.ready or me.steps.native.refusal),
    )  # fmt: skip
    if capped.holds_all:
        return Memory(host.model)
    host.steps.native.probe_keys, host.steps.native.compared = capped.probe_keys, capped.fill_up
    return capped


class Capped(Memory):
    """A packed model whose matrices are in memory as far as a cap allows.

    unread: linears that no step reads as matrices. changed: called when other matrices are in memory. prepare: packs
    what the plan keeps for all texts. compares: whether the next step is compared with the model's own modules.

    Raises:
        CoreskipError: it is not packed, or the cap is too small.
    """

    cap: int

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        program: Program,
        unread: set[nn.Module],
        cap: int,
        changed: Callable[[], None] = lambda: None,
        prepare: Callable[[], object] = lambda: None,
        compares: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(model)
        self.cap, self._changed, self._prepare, self._compares = cap, changed, prepare, compares
        store = _store(model)
        streamed, mixtures = streamed_of(model, anatomy, store), mixtures_of(anatomy, store)
        read = (names for module, names in streamed.items() if module not in unread)
        self._order = list(dict.fromkeys(name for names in read for name in names))
        everywhere = [*streamed.values(), *(mixture.names for mixture in mixtures)]
        names = list(dict.fromkeys(name for some in everywhere for name in some))
        self._sizes = {name: -(-store.spans[name][1] // PAGE) * PAGE for name in names}
        piece = min(max(store.memory.numel() // 256, _LEAST_PIECE), _MOST_PIECE) // PAGE * PAGE
        ring = max(_PIECES * piece, 2 * largest_unit(anatomy))
        inner: list[Any] = [m for layer in anatomy.layers for m in layer.modules() if m in streamed]
        unpacked = [mixture.unpacked for mixture in mixtures]
        scratch = max([0, *unpacked, *(scratch_of(m.weight, isinstance(m, PackedLayer)) for m in inner)])
        by_token = program.chosen_by(Chooser.TOKEN).values()
        self._bundles = [round(brick.chosen * brick.width) + 256 * brick.width for brick in by_token]
        self.chosen_per_token = sum(round(brick.chosen * brick.kept) for brick in by_token)
        self.chosen_per_token += sum(mixture.unit * mixture.top_k for mixture in mixtures)
        slots = max([0, *self._bundles, *(mixture.least for mixture in mixtures)])
        once = _PACKING * math.prod(widths(anatomy)) if program.chosen_by(*_PACKED) else 0
        if self._bundles:
            once = 3 * math.prod(widths(anatomy)) * 2 * model.dtype.itemsize + _PUTTING_AWAY * anatomy.hidden_size
        tables = tables_of(model, store)
        rest = sum(size for name, (_, size) in store.spans.items() if name not in {*self._sizes, *tables})
        self.needs = Sizes(
            always=rest
            + copied_bytes(model, anatomy, streamed)
            + ring
            + 2 * scratch  # torch arranges what it multiplies many rows with in memory of its own
            + step_bytes(model, anatomy)
            + (slots + readers_bytes() if slots else 0),
            entry=entry_bytes(model, anatomy),
            activations=4 * sum(widths(anatomy)) * model.dtype.itemsize,
            logits=16 * MAX_ROWS * int(model.get_input_embeddings().weight.shape[0]),
            fixed=neuron_bytes(program, Chooser.CALIBRATION)
            + sum(round(brick.stays) + 32 * brick.width for brick in by_token),
            chosen=neuron_bytes(program, Chooser.PROMPT, math.prod(widths(anatomy)) // 16),
            packing=_PACKING * math.prod(widths(anatomy)) if program.chosen_by(Chooser.PROMPT) else 0,
            once=once,
            slots=slots,
        )
        self._step = max(1, cap // (4 * _REFILL))  # slots change by so many bytes: they are read anew then
        self._looked_up = [store.spans[name] for name in tables]
        self._held, self._kept = list[int](), list[str]()  # of texts under way; by name
        self._lock, self._for_probe = threading.RLock(), 0  # the latter: bytes left to the comparison now
        self._check(self._room(self.needs.least))
        most = (min(cap // _PROBE, self._room(0)) - self.needs.logits) // (2 * self.needs.entry)
        self.probe_keys = min(KEYS, max(_FEWEST_KEYS, most))
        self.residency = Residency(store, names, piece, ring, scratch, CoreskipError, bundled=bool(self._bundles))

    @property
    def expected(self) -> tuple[int, int]:
        """Bytes of matrices that stay beside a short text, and of those that a step then reads."""
        every = sum(self._sizes[name] for name in self._order)
        kept = min(every, self._room(self.needs.least))
        return kept, every - kept

    @property
    def holds_all(self) -> bool:
        """Whether the whole model fits."""
        return sum(self._sizes.values()) + sum(self._bundles) <= self._room(self.needs.least)

    # --- in and out

    def start(self) -> None:
        super().start()
        self.residency.open()
        for at, size in self._looked_up:
            look_up(self.residency.store.memory[at : at + size])

    def settle(self) -> None:
        self._prepare()
        trim()
        self.fill_up()

    def stop(self) -> None:
        self.residency.close()
        self._kept.clear()
        super().stop()

    @property
    def kept_bytes(self) -> int:
        return sum(self._sizes[name] for name in self._kept)

    @property
    def streamed_bytes(self) -> int:
        """Of what a step reads from the file."""
        return sum(self._sizes[name] for name in self._order) - self.kept_bytes

    def check(self) -> None:
        self.residency.check()

    def refuse(self, what: str) -> None:
        raise CoreskipError(f"cannot {what}: under memory= its weights are those of its folder; unwrap it first")

    def covers(self, modules: Iterable[nn.Module]) -> bool:
        weights = (m.weight for m in modules if isinstance(m, nn.Linear) and not isinstance(m, PackedLayer))
        return any(self.residency.covers(weight) for weight in weights)

    # --- texts

    @contextmanager
    def holding(self, rows: int, prompt: int, length: int) -> Iterator[None]:
        need = self.needs.of_text(rows, prompt, length)
        with self._lock:
            room = self._room(sum(self._held) + need)
            if room < 0:
                raise CoreskipError(
                    f"memory={text_of(self.cap)} has no room for {rows} x {length} tokens: "
                    f"give {text_of(self.cap - room)}, or shorten the text"
                )
            self._held.append(need)
        try:
            self.fill_up()
            yield
        finally:
            with self._lock:
                self._held.remove(need)

    def _room(self, texts: int) -> int:
        """Bytes for matrices beside texts that take so many."""
        return self.cap - self.needs.always - self.needs.fixed - texts

    def _check(self, room: int) -> None:
        if room < 0:
            neurons = self.needs.fixed + self.needs.chosen
            kept = f", {text_of(neurons)} of that for the neurons that the plan keeps" if neurons else ""
            raise CoreskipError(
                f"memory={text_of(self.cap)} is too little for this model: it needs at least "
                f"{text_of(self.cap - room)}{kept}, with {text_of(sum(self._sizes.values()))} of matrices left on the "
                "disk"
            )

    def fill_up(self, output: object = None) -> object:
        """Keeps matrices in what texts under way and a first step's comparison leave of the cap. Returns `output`."""
        with self._lock:
            texts = max(sum(self._held), self.needs.of_text(1, *_SHORT))
            probe = self.needs.of_probe(self.probe_keys) if self._compares() else 0
            refill, self._for_probe = probe < self._for_probe, probe
            room, before = max(0, self._room(texts) - probe), list(self._kept)
            while self._kept and self.kept_bytes > room:
                over = self.kept_bytes - room
                enough = [name for name in self._kept if self._sizes[name] >= over]
                name = min(enough or self._kept, key=lambda name: self._sizes[name] * (1 if enough else -1))
                self._kept.remove(name)
                self.residency.drop(name)
            if before != self._kept:
                self._changed()  # steps hold what they were made with
            if refill or not before or room - self.kept_bytes > self.cap // _REFILL:
                self._fill(room)
            left = max(0, room - self.kept_bytes) // self._step * self._step
            if self.residency.allow(self.needs.slots + left) or before != self._kept:
                self._changed()
        return output

    def _fill(self, room: int) -> None:
        rest = [(name, self._sizes[name]) for name in self._order if name not in set(self._kept)]
        names = spread(rest, room - self.kept_bytes)
        if names and self.residency.allow(self.needs.slots):  # before matrices come, slots go
            self._changed()
        for name in names:
            self.residency.keep(name)
            self._kept.append(name)
        logger.debug("%s are kept, %s are read at every token", *map(text_of, (self.kept_bytes, self.streamed_bytes)))


def spread(sizes: Sequence[tuple[str, int]], room: int) -> list[str]:
    """Which of these, in the order in which they are read, fill so many bytes: evenly, so that of any stretch about the
    same share is among them; and then whatever else fits."""
    total, kept, used, due = sum(size for _, size in sizes), list[str](), 0, 0.0
    for name, size in sizes:
        due += size * min(1.0, room / total)
        if due >= size / 2 and used + size <= room:
            kept.append(name)
            used, due = used + size, due - size
    for name, size in sorted(sizes, key=lambda pair: -pair[1]):
        if name not in kept and used + size <= room:
            kept.append(name)
            used += size
    return kept


# ---- what is where, and how large ----


def _store(model: Any) -> Store:
    store = store_of(model)
    if store is None:
        raise CoreskipError(
            "memory caps packed models: pack this one (`coreskip pack`, or coreskip.pack) and load the folder"
        )
    return store
