"""Instance attributes put in the place of others, with an exact inverse; and the count of what decode steps skip."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .phases import Pass


class Patches:
    """Instance attributes replaced, and how they were. What somebody else puts in their place stays."""

    _ABSENT = object()

    def __init__(self) -> None:
        self._undo: list[tuple[object, str, object, object]] = []
        self._now: dict[tuple[int, str], object] = {}

    def set(self, target: object, name: str, value: object) -> None:
        self._undo.append((target, name, vars(target).get(name, self._ABSENT), value))
        self._now[id(target), name] = value
        object.__setattr__(target, name, value)

    def current(self, target: object, name: str) -> object:
        """What was last put there; None where nothing was."""
        return self._now.get((id(target), name))

    def undo(self) -> None:
        for target, name, before, value in reversed(self._undo):
            if vars(target).get(name) is not value:
                continue
            if before is self._ABSENT:
                object.__delattr__(target, name)
            else:
                object.__setattr__(target, name, before)
        self._undo.clear()
        self._now.clear()

    def undone(self, target: object, attributes: dict[str, Any]) -> dict[str, Any]:
        """A target's `attributes` as they would be without patches."""
        for owner, name, before, value in reversed(self._undo):
            if owner is target and attributes.get(name) is value:
                if before is self._ABSENT:
                    del attributes[name]
                else:
                    attributes[name] = before
        return attributes


class Usage:
    """MLP neurons that decode steps could have computed and those they skipped, over all threads.

    `counting`: whether modules are to count what thresholds keep, which takes time; else the share that they kept in
    calibration is taken for it. Native steps count it in any case.
    """

    def __init__(self, neurons_per_token: int) -> None:
        self.counting = False
        self._per_token, self._lock = neurons_per_token, threading.Lock()
        self._paused = False
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self._possible, self._skipped = 0, 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Steps inside are nobody's."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def add(self, step: Pass) -> None:
        self.count(step.rows * step.length, step.skipped)

    def count(self, tokens: int, skipped: float) -> None:
        if self._paused:
            return
        with self._lock:
            self._possible += self._per_token * tokens
            self._skipped += skipped

    def neuron_sparsity(self) -> float:
        """Share of neurons skipped so far; 0 before the first decode step."""
        return self._skipped / self._possible if self._possible else 0.0
