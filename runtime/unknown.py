"""Options that nobody knows: a word is refused with the closest one that is known, rather than swallowed."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection
from typing import ParamSpec, TypeVar

from ..predictors.errors import CoreskipError

P = ParamSpec("P")
T = TypeVar("T")


def closest(name: str, known: Collection[str]) -> str:
    """For a message: which of the `known` names may have been meant."""
    found = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f"did you mean {found[0]}?" if found else f"choose from {', '.join(sorted(known))}"


def refuses_unknown(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, which raises a `CoreskipError` for a keyword argument that it does not have."""
    signature = inspect.signature(function)
    known = {
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD) and name != "self"
    }

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in known:
                options = {n for n in known if signature.parameters[n].kind is inspect.Parameter.KEYWORD_ONLY}
                what = function.__qualname__.removesuffix(".__init__")
                raise CoreskipError(f"{what} has no option {name!r}: {closest(name, options)}")
        return function(*args, **kwargs)

    return checked
