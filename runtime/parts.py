"""The parts of a wrapped model: they tell when somebody changes them, and their copies are parts of a plain model.

After a decode step has cleared the caches, to look at the 397 modules of the embedded model takes Python a millisecond,
a third of a step. So nobody looks: while a model is wrapped, the classes of its parts are subclasses of the same name
whose assignments, hooks and children are noted as they happen.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import nn

_NOTES = "_coreskip_notes"
_PLAIN = "_coreskip_own_class"
_WATCHED_DICTS = ("_modules", "_parameters")
_ABSENT = object()


class Notes:
    """Whether something was changed since this was last set to False; and what a part is without its patches.

    names: which attributes were assigned meanwhile, each with its part's identity. own: those that a part assigns
    itself in every pass, which are no change.
    """

    def __init__(self, plain_state: Callable[[nn.Module], dict[str, Any]]) -> None:
        self.changed = False
        self.names: set[tuple[int, str]] = set()
        self.own: set[tuple[int, str]] = set()
        self.plain_state = plain_state

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied part belongs to no wrapped model."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()


def _note(part: Any) -> None:
    notes = vars(part).get(_NOTES)
    if notes is not None:
        notes.changed = True


class Watched:
    """A module that notes what is assigned to it, deleted from it, and hooked to it."""

    def __setattr__(self, name: str, value: Any) -> None:
        before = vars(self).get(name, _ABSENT)
        super().__setattr__(name, value)
        notes = vars(self).get(_NOTES)
        if before is not value and notes is not None and (id(self), name) not in notes.own:
            notes.names.add((id(self), name))
            notes.changed = True

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        _note(self)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        handle = super().register_forward_hook(*args, **kwargs)  # type: ignore[misc]
        _note(self)
        return handle

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        handle = super().register_forward_pre_hook(*args, **kwargs)  # type: ignore[misc]
        _note(self)
        return handle


class _Part(Watched):
    """A part of a wrapped model."""

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(*args, **kwargs)  # type: ignore[misc]
        _note(self)
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are of the plain class, without patches."""
        notes, plain = vars(self).get(_NOTES), unwatched_class(type(self))
        if notes is None:
            return super().__reduce_ex__(protocol)
        made = copyreg._reconstructor, (plain, object, None)  # type: ignore[attr-defined]
        return *made, notes.plain_state(cast(nn.Module, self))


class _Noted(dict[str, Any]):
    """A module's children or parameters."""

    __slots__ = ("notes", "original")

    def __init__(self, original: dict[str, Any], notes: Notes) -> None:
        super().__init__(original)
        self.original, self.notes = original, notes

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self.original), (), None, None, iter(self.items())

    def restored(self) -> dict[str, Any]:
        self.original.clear()
        self.original.update(self)
        return self.original


def _noting(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    @functools.wraps(method)
    def noting(self: _Noted, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        self.notes.changed = True
        return result

    return noting


for _name in ("__setitem__", "__delitem__", "__ior__", "pop", "popitem", "clear", "update", "setdefault"):
    setattr(_Noted, _name, _noting(_name))


@functools.cache
def _part_class(cls: type) -> type:
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls)(cls.__name__, (_Part, cls), {**names, _PLAIN: cls})


def unwatched_class(cls: type) -> type:
    """The class of a part before it was watched."""
    return cast(type, vars(cls).get(_PLAIN, cls))


def watch(module: nn.Module, notes: Notes) -> None:
    """Have `module` note its changes; once more does no harm. A whole model's class does so by itself (`Watched`)."""
    if vars(module).get(_NOTES) is not notes:
        object.__setattr__(module, _NOTES, notes)
    if not isinstance(module, Watched):
        object.__setattr__(module, "__class__", _part_class(cast(Any, type(module))))
    for name in _WATCHED_DICTS:
        entries = vars(module)[name]
        if entries and not isinstance(entries, _Noted):
            vars(module)[name] = _Noted(entries, notes)


def unwatch(module: nn.Module) -> None:
    """The inverse of `watch`, with the children and parameters that there are now."""
    vars(module).pop(_NOTES, None)
    for name in _WATCHED_DICTS:
        entries = vars(module)[name]
        if isinstance(entries, _Noted):
            vars(module)[name] = entries.restored()
    cls = cast(Any, type(module))
    if unwatched_class(cls) is not cls:
        object.__setattr__(module, "__class__", unwatched_class(cls))
    elif isinstance(module, _Part):  # somebody, such as torch's parametrisation, has derived a class from ours
        cls.__bases__ = tuple(unwatched_class(base) for base in cls.__bases__)


def plain_items(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module consists of, but for what `watch` put there."""
    for name, value in vars(module).items():
        if name != _NOTES:
            yield name, type(value.original)(value) if isinstance(value, _Noted) else value
