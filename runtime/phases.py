"""Forward passes, as the patched modules below them see them: prefill or decode, and what is asked of them.

Two things reach modules around the model's own code: the call under way (`Call`), and how decode steps are to be run
meanwhile (`Mode`). A third, that passes are prefill whatever the cache holds, is the user's to say (`prefilling`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from torch import Tensor

from ..predictors.checks import kind_of
from ..predictors.errors import CoreskipError
from .selections import Selections


class Phase(Enum):
    """Told apart by the cache's state, never by the input's length: a one-token prompt is prefill, a verification
    pass over five tokens is decode."""

    PREFILL = "prefill"
    DECODE = "decode"
    VERIFY = "verify"  # decoding densely: every pass of exact mode but its drafts, and those within `densely`


@dataclass(slots=True)
class Pass:
    """One pass through the decoder stack.

    Attributes:
        phase: prefill, decode, or in exact mode verification.
        rows, length: sequences in the batch, tokens of each.
        valid: bool ``[rows, length]``, False at padding; None where every token counts. Prefill only.
        selections: of the pass's KV cache; None where nothing was selected (a cache filled before `wrap`).
        skipped: MLP neurons not computed, over layers, rows and tokens; of those whose weights are read in part, the
            parts unread.
        entries_only: set while a skipped attention writes its keys and values.
        norms: of the residual stream, ``[rows, length]`` before the first layer and after each; prefill of adaptive
            plans only.
        cached: whether the caller keeps its keys and values, to go on from them.
        bypass: set between the up and the down projection of an MLP whose output is already computed.
    """

    phase: Phase
    rows: int
    length: int
    valid: Tensor | None
    selections: Selections | None
    cached: bool = True
    bypass: bool = False
    skipped: float = 0
    entries_only: bool = False
    norms: list[Tensor] = field(default_factory=list)


@dataclass(slots=True)
class Call:
    """A call of the model, or of its bare decoder stack: the pass that is under way, and the last one, which the LM
    head asks about when the pass is over."""

    running: Pass | None = None
    last: Pass | None = None


_CALL: ContextVar[Call | None] = ContextVar("coreskip_call", default=None)


def current_pass() -> Pass | None:
    """The pass under way; None outside of one, and in training."""
    call = _CALL.get()
    return None if call is None else call.running


def last_pass() -> Pass | None:
    """The call's pass that is over."""
    call = _CALL.get()
    return None if call is None else call.last


@contextmanager
def calling() -> Iterator[None]:
    """A call of the whole model: its pass stays known to the end."""
    token = _CALL.set(Call())
    try:
        yield
    finally:
        _CALL.reset(token)


@contextmanager
def passing(step: Pass | None) -> Iterator[None]:
    """`step` is under way; None: a pass that no module takes notice of."""
    call = _CALL.get()
    token = None
    if call is None or call.running is not None:
        call = Call()
        token = _CALL.set(call)
    call.running = step
    try:
        yield
    finally:
        call.running, call.last = None, step
        if token is not None:
            _CALL.reset(token)


def tokens_in(cache: Any) -> int:
    """Tokens that a KV cache holds, as the layer says that holds most: a recurrent one, asked first, says none."""
    layers = getattr(cache, "layers", ())
    lengths = [int(layer.get_seq_length()) for layer in layers if hasattr(layer, "get_seq_length")]
    return max([int(cache.get_seq_length()), *lengths])


# ---- how decode steps are run meanwhile ----


@dataclass(frozen=True)
class Mode:
    """How decode steps run.

    Attributes:
        densely: they follow no plan.
        as_loaded: they read the weights as they were loaded, whatever the plan's format.
        drafting: they follow the plan even in exact mode.
        tally: who gets the passes, in place of the wrapped model's count of what was skipped.
    """

    densely: bool = False
    as_loaded: bool = False
    drafting: bool = False
    tally: Callable[[Pass], None] | None = None


_PLAIN = Mode()
_MODE: ContextVar[Mode] = ContextVar("coreskip_mode", default=_PLAIN)


def mode() -> Mode:
    return _MODE.get()


@contextmanager
def _changed(**changes: Any) -> Iterator[None]:
    token = _MODE.set(replace(_MODE.get(), **changes))
    try:
        yield
    finally:
        _MODE.reset(token)


@contextmanager
def densely() -> Iterator[None]:
    """Decode steps inside follow no plan, and do not count."""
    with _changed(densely=True, tally=lambda step: None):
        yield


@contextmanager
def as_loaded() -> Iterator[None]:
    """Decode steps inside read the weights as they were loaded, whatever the plan's format."""
    with _changed(as_loaded=True):
        yield


@contextmanager
def drafting() -> Iterator[None]:
    """Decode steps inside follow the plan even in exact mode."""
    with _changed(drafting=True):
        yield


@contextmanager
def tallied(tally: Callable[[Pass], None]) -> Iterator[None]:
    """Who gets the decode steps inside."""
    with _changed(tally=tally):
        yield


# ---- prefill, whatever the cache holds ----


@dataclass(frozen=True)
class Prompt:
    attention_mask: Tensor | None


_PROMPT: ContextVar[Prompt | None] = ContextVar("coreskip_prompt", default=None)


@contextmanager
def prefilling(attention_mask: Tensor | None = None) -> Iterator[None]:
    """Forward passes inside are prefill even where the KV cache already holds tokens: the chunks of a long prompt,
    the next turn of a conversation. ``model.generate`` does this by itself; a hand-written loop says so here.

    `attention_mask`: ``[rows, tokens so far]``, 0 at padding; needed only where the passes carry no 2-D mask.
    """
    if not isinstance(attention_mask, (Tensor, Mapping, type(None))):  # transformers itself passes tables of masks
        raise CoreskipError(f"attention_mask is {kind_of(attention_mask)}: give a tensor [rows, tokens], or None")
    token = _PROMPT.set(Prompt(attention_mask))
    try:
        yield
    finally:
        _PROMPT.reset(token)


@contextmanager
def unprompted() -> Iterator[None]:
    """Passes inside are told apart by their own caches, whatever prompt is under way around them."""
    token = _PROMPT.set(None)
    try:
        yield
    finally:
        _PROMPT.reset(token)


def current_prompt() -> Prompt | None:
    """What `prefilling` was told, inside of it."""
    return _PROMPT.get()
