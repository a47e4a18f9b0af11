"""A native step compared with the model's own modules: the first, its kind at other positions, and now and then later
ones (selfcheck.py says when)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..kernels import step as kernel
from ..kernels.ops import MAX_ROWS
from .calls import NotCovered, close, compare
from .kv_cache import Entries, Rooms, twin_of
from .lower_cpu import CpuModel, StepProgram
from .phases import as_loaded, densely
from .selfcheck import FEW, agree, far_positions, made_up


class Steps(Protocol):
    """The native steps of a model, as a comparison needs them."""

    probe_keys: int

    @property
    def model(self) -> Any: ...

    def admit(self, cache: Any, more: int, entries: Entries | None = None, snug: bool = False) -> Rooms: ...

    def run(
        self, step: kernel.Step, named: dict[str, Any], model: CpuModel, entries: Entries | None = None
    ) -> tuple[Tensor, float]: ...

    def compute(
        self, step: kernel.Step, named: dict[str, Any], model: CpuModel, entries: Entries | None = None
    ) -> tuple[Rooms, tuple[Tensor, float]]: ...


@dataclass(frozen=True, eq=False)
class FirstStep:
    """The logits of a first native step, before the modules have computed theirs.

    twin: a copy of the cache as it was. judged: what is compared in place of `logits` where a rule chooses in half
    precision, or MLPs round what they meet: those of a step that leaves nothing out.
    """

    logits: Tensor
    twin: Any
    by_rule: bool
    judged: Tensor | None


class Comparison:
    """Native steps of one model against its own forward.

    rounded: whether both read the same weights of 4 or 8 bits, whose inputs are rounded, too.
    """

    def __init__(self, steps: Steps, forward: Callable[..., Any], entries: Entries, rounded: bool = False) -> None:
        self._steps, self._forward, self.entries, self._rounded = steps, forward, entries, rounded

    def begin(self, loaded: CpuModel, program: StepProgram, named: dict[str, Any]) -> FirstStep:
        """Runs the step, whose keys and values the cache has from now on."""
        twin, step = twin_of(named["past_key_values"]), loaded.step(program)
        whole = not (program.no_attention or program.no_mlp)  # modules that compute densely leave no layer out
        without = (program.rounds and whole) or (program.by_rule and loaded.base.dtype != torch.float32)
        judged = self._without_plan(named, loaded) if without else None
        logits, _ = self._steps.run(step, named, loaded, self.entries)
        return FirstStep(logits, twin, program.by_rule, judged)

    def finish(self, first: FirstStep, loaded: CpuModel, named: dict[str, Any]) -> Any:
        """The modules' own output for the same call.

        Raises NotCovered where it, or that of steps at other positions, is not what native steps give.
        """
        with as_loaded(), densely() if first.judged is not None else nullcontext():
            output = self._forward(**{**named, "past_key_values": first.twin})
        if first.judged is None:
            compare(first.logits, output.logits, first.by_rule)
        else:
            compare(first.judged, output.logits, by_rule=False)
        self._probe(loaded, named["past_key_values"])
        return output

    def holds(self, model: CpuModel, named: dict[str, Any]) -> bool:
        """Whether a step of as many other tokens as `named` has gives the logits that modules give."""
        step = model.step(self._nothing_chosen(model))
        step.rotate_by(model.rotary.tables())

        def natively(ids: Tensor) -> Tensor:
            call = {**named, "input_ids": ids, "logits_to_keep": 0}
            with self._steps.admit(call["past_key_values"], ids.shape[1], self.entries).kept():
                return self._steps.compute(step, call, model, self.entries)[1][0]

        return self._agrees(natively, named)

    def _probe(self, loaded: CpuModel, like: Any) -> None:
        """Compares steps at positions far apart, and behind many keys: what texts will come to."""
        config = self._steps.model.config.get_text_config()
        far, keys = far_positions(config)[:, None], self._steps.probe_keys
        if loaded.spec.end is not None:
            far, keys = far[far[:, 0] < loaded.spec.end], min(keys, loaded.spec.end - MAX_ROWS)
        if loaded.spec.places is not None and not loaded.spec.places.given:  # no text could be at these
            far = far[:0]
        behind = torch.arange(keys, keys + MAX_ROWS, device="cpu")[None]
        afar = not len(far) or self._agrees_at(far, FEW, loaded, like)
        if not (afar and self._agrees_at(behind, keys, loaded, like)):
            raise NotCovered("at other positions its logits differ from the model's own")

    def _agrees_at(self, places: Tensor, keys: int, loaded: CpuModel, like: Any) -> bool:
        """places: positions [rows, length] of tokens that come after as many keys."""
        cache = made_up(self._steps.model.config, like, places.shape[0], keys)
        step = loaded.step(self._nothing_chosen(loaded))
        # what the positions are rotated by, and no table up to there, which may be large
        step.rotate_by(loaded.rotary.at(places.flatten()))
        if loaded.base.places is not None:
            step.place_by(loaded.base.places[places.flatten()])
        rooms = self._steps.admit(cache, places.shape[1], self.entries, snug=True)
        indices = torch.arange(places.numel(), device="cpu").view_as(places)
        start = torch.zeros(places.shape[0], dtype=torch.int64, device="cpu")

        def natively(ids: Tensor) -> Tensor:
            with rooms.kept():
                return step.run(ids, indices, start, rooms.table, keys, ids.shape[1])[0]

        named = {"input_ids": places, "position_ids": places, "past_key_values": cache, "use_cache": True}
        return self._agrees(natively, named)

    def _agrees(self, natively: Callable[[Tensor], Tensor], named: dict[str, Any]) -> bool:
        """Whether a step of other tokens than `named` has gives the logits that modules give; the cache stays."""

        def run(ids: Tensor) -> tuple[Tensor, Tensor]:
            logits = natively(ids)  # before there is a twin: its keys and values are views, which no step writes beside
            asked = {**named, "input_ids": ids, "past_key_values": twin_of(named["past_key_values"])}
            with densely():
                return logits, cast(Any, self._forward)(**{**asked, "logits_to_keep": 0}).logits

        vocabulary = self._steps.model.get_input_embeddings().weight.shape[0]
        return agree(
            run, lambda got, expected: close(got, expected, self._rounded), named["input_ids"].shape, vocabulary
        )

    def _without_plan(self, named: dict[str, Any], loaded: CpuModel) -> Tensor:
        """Logits of a native step that leaves nothing out, on a copy of the cache."""
        step, twin = loaded.step(self._nothing_chosen(loaded)), twin_of(named["past_key_values"])
        return self._steps.run(step, {**named, "past_key_values": twin}, loaded, self.entries)[0]

    @staticmethod
    def _nothing_chosen(model: CpuModel) -> StepProgram:
        return StepProgram.dense(len(model.base.layers))
