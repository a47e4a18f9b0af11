"""Interventions carried out: what a plan changes about a layer's MLP, and prompts after which nothing is said.

An intervention acts on the model's own modules, in every pass but those of training, whatever its phase: a skill that
was switched off in decode steps alone would come back from the prompt's keys and values. No kernel carries
interventions out. A plan that changes activations runs on the modules throughout; one that looks at prompts reads these
there, and decodes as ever.

After a prompt that is abstained from, every token but the end of the text is impossible: generation ends at once,
whichever way it chooses tokens, and no loop has to know about it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..predictors.anatomy import Anatomy
from ..predictors.errors import CoreskipError
from ..predictors.interventions import Intervention, Site
from ..predictors.plan import Plan
from .phases import Pass, Phase, current_pass, last_pass
from .running import end_ids
from .selections import selections_in

logger = logging.getLogger("coreskip")

Replace = Callable[[object, str, object], None]


class Behaviour:
    """The interventions of a plan on one model.

    Raises:
        CoreskipError: the model has no token with which to end a text after which nothing is to be said; or the plan is
            only to draft, for a dense model that has the skill.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, plan: Plan, exact: bool) -> None:
        self._anatomy = anatomy
        device = next(model.parameters()).device
        every = {index: layer.intervention for index, layer in enumerate(plan.layers)}
        self._interventions = {i: _placed(f, device) for i, f in every.items() if f.site is not Site.NOWHERE}
        if exact and plan.intervenes:
            raise CoreskipError(
                "exact mode gives the dense model's text, with the skill that this plan switches off: leave exact out"
            )
        self._acting: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the linears in which they act
        self.abstains = plan.abstains
        self._ends = sorted(end_ids(model)) if self.abstains else []
        if self.abstains and not self._ends:
            raise CoreskipError(
                "the plan ends texts before they begin, and the model has no end-of-text token: set "
                "model.generation_config.eos_token_id"
            )

    @property
    def changes_activations(self) -> bool:
        return any(found.site is not Site.PROMPT for found in self._interventions.values())

    def obstacle(self, decodes: bool) -> str | None:
        """Why a pass has to run on the model's modules, if it has to; decodes: whether it is a decode step."""
        if self.changes_activations:
            return "the plan changes activations, which no kernel does"
        return "the plan looks at the prompt's last token" if self.abstains and not decodes else None

    def install(self, replace: Replace) -> None:
        """To be called after linears and MLPs are patched, for what they compute is changed; and again where others may
        have put linears of their own in their places."""
        for index, found in self._interventions.items():
            mlp = self._anatomy.mlp(index)
            module = mlp.pre_activation if found.site is Site.PRE_ACTIVATION else mlp.down
            if module in self._acting:
                continue
            self._acting.add(module)
            if found.site is Site.PROMPT:
                _patch_observer(index, module, found, replace)
            else:
                (_patch_output if found.site is Site.PRE_ACTIVATION else _patch_input)(module, found, replace)

    def withheld(self, output: Any) -> Any:
        """A pass's output, in which the rows that are abstained from have logits of their own."""
        step = last_pass() if self.abstains else None
        rows = None if step is None or step.selections is None else step.selections.abstained
        if rows is None or not bool(rows.any()):
            return output
        if isinstance(output, tuple):  # return_dict=False; a loss may come first
            place = next(i for i, item in enumerate(output) if isinstance(item, Tensor) and item.ndim == 3)
            return (*output[:place], self._only_the_end(output[place], rows), *output[place + 1 :])
        output.logits = self._only_the_end(output.logits, rows)
        return output

    def withholds(self, cache: object) -> bool:
        """Whether nothing is to be said after some prompt of a KV cache's sequences."""
        selections = selections_in(cache) if self.abstains else None
        rows = None if selections is None else selections.abstained
        return rows is not None and bool(rows.any())

    def _only_the_end(self, logits: Tensor, rows: Tensor) -> Tensor:
        # the least finite number: where an option forbids the end of the text, scores must not become NaN
        end = torch.full_like(logits[0], torch.finfo(logits.dtype).min)
        end[..., self._ends] = 0.0
        return torch.where(rows.to(logits.device).view(-1, 1, 1), end, logits)


def _placed(found: Intervention, device: torch.device) -> Intervention:
    """With its tensors where the model is; of a model that is moved later they follow at every pass."""
    fields = {each.name: getattr(found, each.name) for each in dataclasses.fields(cast(Any, found))}
    moved = {name: value.to(device) for name, value in fields.items() if isinstance(value, Tensor)}
    return cast(Intervention, dataclasses.replace(cast(Any, found), **moved))


def _patch_output(module: nn.Module, found: Intervention, replace: Replace) -> None:
    original = module.forward

    @functools.wraps(original)
    def forward(x: Tensor) -> Any:
        output = original(x)
        return output if current_pass() is None else found.changed(output)

    replace(module, "forward", forward)


def _patch_input(module: nn.Module, found: Intervention, replace: Replace) -> None:
    original = module.forward

    @functools.wraps(original)
    def forward(a: Tensor) -> Any:
        return original(a if current_pass() is None else found.changed(a))

    replace(module, "forward", forward)


def _patch_observer(index: int, module: nn.Module, found: Intervention, replace: Replace) -> None:
    original = module.forward

    @functools.wraps(original)
    def forward(a: Tensor) -> Any:
        step = current_pass()
        if step is not None and step.phase is Phase.PREFILL and step.selections is not None:
            keys, seen = _last(a, step)
            step.selections.judge(index, found.abstains(keys), seen)
        return original(a)

    replace(module, "forward", forward)


def _last(a: Tensor, step: Pass) -> tuple[Tensor, Tensor | None]:
    """Of activations of all rows' tokens, those of each row's last token that is no padding, ``[rows, width]``; and
    which rows have one in this pass, None where all have."""
    a = a.detach().view(step.rows, step.length, a.shape[-1])
    if step.valid is None:
        return a[:, -1], None
    valid = step.valid.to(a.device)
    last = (valid * torch.arange(1, step.length + 1, device=a.device)).argmax(1)
    return a[torch.arange(step.rows, device=a.device), last], valid.any(1).cpu()


# --- who has to know what was abstained from -------------------------------------------------------------------------

_COUNT: ContextVar[list[int] | None] = ContextVar("coreskip_abstentions", default=None)


@contextmanager
def counting_abstentions() -> Iterator[list[int]]:
    """Inside, by generation, how many of its sequences were abstained from."""
    found: list[int] = []
    token = _COUNT.set(found)
    try:
        yield found
    finally:
        _COUNT.reset(token)


def note_abstentions(cache: object) -> int:
    """To be called once when the prompts behind a KV cache have been read: how many are abstained from."""
    selections = selections_in(cache)
    rows = None if selections is None else selections.abstained
    if rows is None:
        return 0
    count = int(rows.sum())
    if count:
        logger.warning(
            "%d of %d prompts ask for what the plan has switched off: their texts end at once", count, len(rows)
        )
        found = _COUNT.get()
        if found is not None:
            found.append(count)
    return count
