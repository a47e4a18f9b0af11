"""How the decode steps of a wrapped model run: natively on a CPU, captured on a GPU (whole, or through its modules), or
on its own modules.

Whoever decodes comes here: the model's patched forward with one call at a time, the loops of generation with sequences
that are theirs alone. Which lowering carries a step out is decided in `Steps.lowering`, once for each state of the
model; a lowering that does not cover a call, or whose first step disagrees with the modules, leaves it to them.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache

from .behaviour import Behaviour
from .calls import NotCovered
from .lower_cpu import StepProgram
from .lower_gpu import CapturedSteps
from .native import NativeSequence, NativeSteps
from .native_prompts import NativePrompts
from .passes import CapturedPasses, NativePasses, Passes
from .phases import mode
from .spans import SpanSteps

logger = logging.getLogger("coreskip")


class Lowering(Enum):
    """What carries decode steps out."""

    NATIVE = "one native call"
    SPANS = "native calls between the model's own modules"
    CAPTURED = "a captured graph"
    MODULES = "the model's own modules"


class Host(Protocol):
    """A wrapped model, as the choice of its lowering needs it."""

    model: Any
    behaviour: Behaviour

    @property
    def verifies(self) -> bool: ...

    def notice(self, every_setting: bool = False) -> str | None: ...

    def program_for(self, cache: Cache, native: bool = True) -> StepProgram | str: ...


class Steps:
    """The decode steps of one wrapped model."""

    def __init__(
        self,
        host: Host,
        native: NativeSteps,
        prompts: NativePrompts,
        captured: CapturedSteps,
        spans: SpanSteps,
    ) -> None:
        self._host: Host = weakref.proxy(host)  # which has this: a cycle would outlive `unwrap`
        self.native, self._prompts, self.captured, self.spans = native, prompts, captured, spans
        self._dense = StepProgram.dense(len(native.anatomy), as_loaded=True)  # what verification computes
        self._said: tuple[Lowering, str | None] | None = None

    def forget(self) -> None:
        """The model was changed: what was described or captured of it does not hold any more."""
        self.native.forget()
        self.captured.forget()
        self.spans.forget()
        self._said = None

    @property
    def lowering(self) -> Lowering:
        """What carries decode steps out, as far as is known."""
        if self.captured.capture is not None:  # a GPU's captured steps are what native ones are to a CPU
            found, reason = Lowering.CAPTURED, self.captured.refusal
        else:
            found, reason = Lowering.NATIVE, self.native.refusal
        if reason is not None:
            in_part = found is Lowering.NATIVE and self.native.uncovered and self.spans.refusal is None
            found = Lowering.SPANS if in_part else Lowering.MODULES
        if self._said != (found, reason):
            self._said = found, reason
            logger.debug("decode steps run by %s%s", found.value, "" if reason is None else f": {reason}")
        return found

    @property
    def ready(self) -> bool:
        """Whether a step of this lowering has been found to agree with the model's own modules."""
        lowering = self.lowering
        if lowering is Lowering.SPANS:
            return self.spans.ready
        return (lowering is Lowering.NATIVE and self.native.ready) or (
            lowering is Lowering.CAPTURED and self.captured.ready
        )

    def forward(self, original: Callable[..., Any], named: dict[str, Any], reason: str | None) -> Any:
        """The output of a decode step, or None where the model's own modules have to compute it.

        original: the model's own forward; named: its arguments; reason: why they have to, where that is known.
        """
        lowering = self.lowering
        verifying = self._host.verifies and not mode().drafting
        if lowering is Lowering.CAPTURED:
            if reason is not None:
                return None
            program = self._captured_program(named["past_key_values"], dense=verifying)
            return self.captured.forward(original, named, program, verifying)
        if lowering is Lowering.NATIVE:
            program = reason or self._program(named["past_key_values"], dense=verifying or mode().densely)
            output = self.native.forward(original, program, named)
            if output is not None or self.lowering is not Lowering.SPANS:
                return output
        # what verification and a dense pass give are the modules' own tokens, to the bit
        if self.lowering is Lowering.SPANS and not (verifying or mode().densely or mode().as_loaded):
            program = reason or self._program(named["past_key_values"], dense=False)
            return self.spans.forward(original, program, named)
        return None

    def prompt(self, original: Callable[..., Any], named: dict[str, Any], reason: str | None) -> Any:
        """As `forward`, of a pass over a prompt."""
        reason = reason or self._host.behaviour.obstacle(decodes=False)
        if reason is not None or self.lowering is not Lowering.NATIVE:
            return None
        return self._prompts.forward(original, named)

    def _program(self, cache: Cache, dense: bool, native: bool = True) -> StepProgram | str:
        """What a native step computes for the sequences of a cache, or why none can; dense: leaving nothing out."""
        if self._host.behaviour.withholds(cache):
            return "nothing is to be said after a prompt"
        if dense:
            return self._dense
        return self._host.program_for(cache) if native else self._host.program_for(cache, native=False)

    def _captured_program(self, cache: Cache, dense: bool) -> StepProgram | str:
        """The same of a lowered step on a GPU. Nothing is packed for it where none is."""
        return self.captured.lowering.refusal or self._program(cache, dense, native=False)

    def greedy(self, cache: Cache, token: int, count: int, ends: Sequence[int]) -> list[int]:
        """`CapturedSteps.greedy` under the plan."""
        return self.captured.greedy(cache, token, count, ends, self._captured_program(cache, dense=False))

    def passes(self, cache: Cache) -> Passes | None:
        """Passes over one sequence's cache by native or captured steps: in exact mode the plan drafts and the dense
        model verifies, else the plan does both. None where these do not cover the model and its plan."""
        self._host.notice()
        if self.lowering is Lowering.CAPTURED:
            return self._captured_passes(cache)
        return self.native_passes(cache)

    def native_passes(self, cache: Cache) -> NativePasses | None:
        """`passes` by native steps alone."""
        self._host.notice()
        draft = self._program(cache, dense=False)
        if not self.native.ready or isinstance(draft, str):
            return None
        try:
            sequence = NativeSequence(self.native, cache)
        except NotCovered:
            return None
        return NativePasses(sequence, draft, self._dense if self._host.verifies else draft)

    def pack_on_gpu(self) -> str | None:
        """Packs what lowered steps on a GPU read; why there are none, if so."""
        with torch.no_grad():
            return self.captured.lowering.prepare(StepProgram.dense(len(self._dense.mlps)))

    def _captured_passes(self, cache: Cache) -> CapturedPasses | None:
        verify = self._captured_program(cache, dense=self._host.verifies)
        if isinstance(verify, str) or self.captured.lowering.covers(verify) is not None:
            return None
        draft = self._captured_program(cache, dense=False)
        return CapturedPasses(self._host.model, cache, self.captured, draft, verify)

    @property
    def by_rows(self) -> bool:
        """Whether a pass over several tokens is known to give each the bits that a pass over it alone gives."""
        return self.lowering is Lowering.CAPTURED and self.captured.lowering.ready

    def sequence(self, cache: Cache, most: int, dense: bool = False) -> tuple[NativeSequence, StepProgram] | None:
        """What steps one sequence natively, by `most` tokens at most, and the program that decides about its text;
        `dense`: the one that leaves nothing out. None where native steps do not cover the model and its plan."""
        self._host.notice()
        program = self._program(cache, dense or self._host.verifies)
        if not self.native.ready or isinstance(program, str):
            return None
        try:
            return NativeSequence(self.native, cache, most), program
        except NotCovered:
            return None
