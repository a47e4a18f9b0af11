"""Prompts natively on a CPU, in place of passes through a model's modules, where matrices are read in groups.

What a prompt computes is what decode steps compute that leave nothing out, in the plan's weights (kernels/prefill.py);
so it counts as the model's own where native steps do (native_check.py). Matrices that lie as they were loaded are left
to torch, which multiplies many rows with these in less time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from ..kernels import prefill
from ..kernels.cpu import exact_form
from ..kernels.groups import GROUPED
from ..predictors.anatomy import Anatomy, is_packed
from ..predictors.observe import inference
from .calls import NotCovered, NotThisCall, check_call, check_outputs, positions_of, row_starts
from .kv_cache import Rooms, first_rooms, take_back
from .layer_skips import LayerSkips
from .lower_cpu import StepProgram
from .modules import ModulePatches
from .native import Described, NativeSteps, check_ranges
from .patches import Usage
from .phases import Pass, mode, tokens_in, unprompted
from .selections import Observed, attach


class Host(Protocol):
    """A wrapped model, as prompts need it."""

    skips: LayerSkips
    usage: Usage

    @property
    def observed(self) -> Mapping[int, Observed]: ...

    @property
    def verifies(self) -> bool: ...

    @property
    def modules(self) -> ModulePatches: ...

    def program_for(self, cache: Cache) -> StepProgram | str: ...


class NativePrompts:
    """The prompts of one wrapped model, where native `steps` cover it.

    Args:
        narrow: whether float32 matrices are read in groups that hold their very numbers.
    """

    def __init__(self, host: Host, steps: NativeSteps, anatomy: Anatomy, narrow: bool) -> None:
        self._host, self._steps, self._anatomy, self._narrow = host, steps, anatomy, narrow
        self._program = StepProgram.dense(len(anatomy))
        self._lock = threading.Lock()
        self._tried: object = None  # the state of the model in which it was described for a prompt, or could not be

    def forward(self, original: Callable[..., Any], named: dict[str, Any]) -> Any:
        """The output of a prompt's pass, or None where the model's own modules have to compute it; nothing has happened
        then.

        original: the model's own forward; named: its arguments.
        """
        try:
            self._check(named)
            described = self._described(original)
            return self._run(described, named)
        except NotCovered:
            return None

    def _check(self, named: dict[str, Any]) -> None:
        """Raises NotCovered where a prompt is for the modules."""
        if self._host.verifies or self._host.skips.adaptive or mode().as_loaded or mode().densely:
            raise NotThisCall("the prompt is the dense model's own, or its residual stream is looked at")
        if not isinstance(named.get("past_key_values"), Cache):
            raise NotThisCall("there is no KV cache")
        check_call(named, "cpu", most=1 << 40)
        check_outputs(self._steps.model.config)
        if any(self._anatomy.experts):
            raise NotCovered("experts read a prompt on the modules, each for all of its tokens at once")
        if self._steps.refusal is not None or self._steps.exits_early:
            raise NotCovered("native steps do not cover the model")

    def _described(self, original: Callable[..., Any]) -> Described:
        """The model as native steps have it, with its matrices in groups.

        Raises NotCovered where there is no such.
        """
        if self._steps.described is None and self._in_groups():
            # else the first prompt, which comes before any step, would be another one than those that follow
            self._describe(original)
        described = self._steps.described
        if described is None or not self._steps.ready:
            raise NotCovered("no step was compared with the model's modules yet")
        if described.prompts_uncovered is not None:
            raise NotCovered(described.prompts_uncovered)
        return described

    def _in_groups(self) -> bool:
        """Whether native steps will read matrices in groups, as far as can be told before these are packed."""
        up = next(mlp.up for _, mlp in self._anatomy.present)
        if self._steps.weights is not None or is_packed(up):
            return True
        form = exact_form(cast(Tensor, up.weight)) if self._narrow else None
        return form is not None and form in GROUPED

    def _describe(self, original: Callable[..., Any]) -> None:
        """Has a step compared with the model's modules, behind a few tokens of its own."""
        with self._lock:
            state = self._steps.checkpoints  # made anew with every state of the model
            if self._tried is state or self._steps.described is not None:
                return
            self._tried = state
            model = self._steps.model
            ids = torch.arange(1, 10, device="cpu")[None] % model.get_input_embeddings().weight.shape[0]
            cache = DynamicCache(config=model.config)
            with inference(model), unprompted(), self._host.usage.paused():
                original(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
                named = {"input_ids": ids[:, -1:], "past_key_values": cache}
                self._steps.forward(original, self._host.program_for(cache), named)

    def _run(self, described: Described, named: dict[str, Any]) -> Any:
        ids, cache = named["input_ids"], named["past_key_values"]
        rows, length = ids.shape
        past = tokens_in(cache)
        start = row_starts(named.get("attention_mask"), rows, past + length)
        positions = described.model.positions_of(named, past, start)
        step = self._steps.step_of(described, self._program)
        check_ranges(step, described.model, ids, positions)
        rooms = self._rooms(described, cache, rows, past, length)
        begun = self._host.modules.begin(named)
        logits = prefill.Prefill(step).run(
            ids, positions, start, rooms.table, past, named.get("logits_to_keep") or length, *self._observer(begun)
        )
        rooms.advance(length)
        self._compare(named, past)
        if begun.selections is not None:
            attach(cache, begun.selections)
        return described.output(logits=logits, past_key_values=cache)

    def _observer(self, begun: Pass) -> tuple[Collection[int], prefill.Observer | None]:
        """The layers whose activations are wanted, and who wants them."""
        selections = begun.selections
        if selections is None:
            return (), None
        return self._host.observed, lambda layer, a: selections.observe(layer, a, begun.valid)

    def _compare(self, named: dict[str, Any], past: int) -> None:
        """Compares a step behind the prompt with the modules' own, where none of this length was.

        Raises NotCovered where they differ; the cache is then as it was before the prompt.
        """
        ids, cache, mask = named["input_ids"], named["past_key_values"], named.get("attention_mask")
        seen = past + ids.shape[1]
        if not self._steps.checkpoints.due(seen, 1):
            return
        more = {} if mask is None else {"attention_mask": torch.cat([mask, mask[:, -1:]], -1)}
        next_one = positions_of(named, past)[:, -1:] + 1
        call = {"input_ids": ids[:, -1:], "position_ids": next_one, "past_key_values": cache, **more}
        try:
            with unprompted():
                self._steps.compare(call)
        except NotCovered:
            if past:
                take_back(cache, ids.shape[1])
            else:
                cache.reset()
            raise

    def _rooms(self, described: Described, cache: Any, rows: int, past: int, length: int) -> Rooms:
        if past:
            found: Rooms | str = self._steps.admit(cache, length)
        else:
            found = first_rooms(cache, rows, length, described.entries)
        if isinstance(found, str):
            raise NotThisCall(found)
        if found.rows != rows:
            raise NotThisCall("the KV cache has another number of rows")
        return found
