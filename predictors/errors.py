"""The errors that a user can cause. Each carries one line that names the cause and the remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 200  # characters of what a library says


class CoreskipError(ValueError):
    """A user's mistake: wrong model, wrong plan, wrong text, wrong option. Nothing was patched or written."""


class PlanError(CoreskipError):
    """A Plan that cannot be read, or that does not belong to the model at hand."""


def reason_of(error: BaseException) -> str:
    """What a library's error says, in one line."""
    return " ".join(str(error).split())[:_LONGEST] or type(error).__name__


@contextmanager
def one_line(what: str, hint: str = "") -> Iterator[None]:
    """Turn what loading libraries raise into one line that names what was to be loaded."""
    try:
        yield
    except CoreskipError:
        raise
    except Exception as error:  # a damaged file surfaces as anything, struct.error included
        raise CoreskipError(f"cannot load {what}: {reason_of(error)}{hint}") from error
