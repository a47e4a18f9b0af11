"""The wrapping that engines of one model share: the first engine makes it, the last one to close takes it off.

An engine without settings asks for the fast dense path. Nobody who wraps the model, or reads the model itself, has to
know of that wrapping: it gives way (`make_way` in runtime/wrap.py), and the engine wraps again at its next call.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..predictors.errors import CoreskipError
from ..predictors.plan import Plan
from .delegates import generator_of
from .wrap import changing, is_wrapped, runtime_of, wrap
from .wrapping import Runtime

logger = logging.getLogger("coreskip")


@dataclass(frozen=True, eq=False)
class Settings:
    """What an engine asks `wrap` for; the fields are the arguments of `Engine`."""

    plan: Plan | str | os.PathLike[str] | None = None
    exact: bool = False
    keep_originals: bool | None = None
    lookup: bool = False
    weights: str | None = None
    memory: int | None = None

    @property
    def given(self) -> bool:
        """Whether a certain wrapping is asked for, rather than whatever is fast."""
        return self.exact or self.lookup or any(x is not None for x in (self.plan, self.weights, self.memory))

    def loaded(self, model: Any) -> Settings:
        """The same with the plan read from its path."""
        return self if self.plan is None else replace(self, plan=Plan.of(self.plan, model))

    def plan_for(self, model: Any) -> Plan | None:
        """The plan in the weights asked for."""
        if self.weights is None:
            return cast("Plan | None", self.plan)
        return replace(Plan.of(self.plan, generator_of(model)), weights=self.weights)

    def equals(self, other: Settings) -> bool:
        return all(_equal(getattr(self, each.name), getattr(other, each.name)) for each in fields(self))


def _equal(a: Any, b: Any) -> bool:
    """Equality of plans and what they hold: dataclasses, sequences, mappings and tensors."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if is_dataclass(a):
        return all(_equal(getattr(a, each.name), getattr(b, each.name)) for each in fields(a))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


@dataclass(eq=False)
class _Share:
    settings: Settings
    engines: int = 0


_shares: WeakKeyDictionary[Runtime, _Share] = WeakKeyDictionary()  # wrappings that engines made


class SharedWrapping:
    """One engine's share in how its model is wrapped.

    Raises:
        CoreskipError: settings were given, and `wrap` refuses them or the model is wrapped with others.
    """

    def __init__(self, model: Any, settings: Settings) -> None:
        self._model, self._given = model, settings.given
        self._settings = settings.loaded(model)
        self._runtime: Runtime | None = None  # that this engine has a share in
        self.refusal: str | None = None  # why the model runs on plain transformers, if it does
        self.acquire()

    def acquire(self) -> None:
        """Have the model wrapped: by a wrapping that is there already, or by a new one. Without settings this is to be
        called before every use, for that wrapping gives way to others."""
        with changing:
            if self._given and self._runtime is not None:
                return
            if is_wrapped(self._model):
                self._join(runtime_of(self._model))
                return
            self.release()
            if self.refusal is None:
                self._wrap()

    def _join(self, runtime: Runtime) -> None:
        if runtime is self._runtime:
            return
        share = _shares.get(runtime)
        if self._given and runtime.gives_way:
            self._wrap()
            return
        if self._given and share is None:
            raise CoreskipError("the model is wrapped already: call coreskip.unwrap(model) first, or pass no plan")
        if self._given and share is not None and not share.settings.equals(self._settings):
            raise CoreskipError(
                "the model is wrapped already, by an Engine with other settings: close that one first (engine.close(), "
                "or use it in a with block)"
            )
        self.release()
        if share is not None:
            self._hold(runtime, share)

    def _wrap(self) -> None:
        asked = self._settings
        try:
            plan = asked.plan_for(self._model)
            options: dict[str, Any] = {
                "exact": asked.exact,
                "keep_originals": asked.keep_originals,
                "lookup": asked.lookup,
            }
            wrap(self._model, plan, **options, memory=asked.memory)
        except CoreskipError as error:
            if self._given:
                raise
            self.refusal = str(error)
            logger.info("the model runs on plain transformers: %s", error)
            return
        runtime = runtime_of(self._model)
        runtime.gives_way = not self._given and runtime.removable
        self._hold(runtime, _shares.setdefault(runtime, _Share(asked)))

    def _hold(self, runtime: Runtime, share: _Share) -> None:
        share.engines += 1
        self._runtime = runtime

    def release(self) -> None:
        """Give up this engine's share; the last one unwraps the model, unless somebody has done so or its own weights
        are gone (``keep_originals=False``)."""
        with changing:
            runtime, self._runtime = self._runtime, None
            share = None if runtime is None else _shares.get(runtime)
            if runtime is None or share is None:
                return
            share.engines -= 1
            current = is_wrapped(self._model) and runtime_of(self._model) is runtime
            if share.engines == 0 and current and runtime.removable:
                runtime.remove()
