"""Checks of what users pass, by kind; each raises one line that names the argument and says what to give. Without
torch, so that a command line is refused before anything is imported."""

from __future__ import annotations

import math
import os
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import CoreskipError

Score = Literal["signed", "magnitude", "magnitude_down", "griffin"]
SCORES: tuple[Score, ...] = get_args(Score)
#: by which a static plan can rank neurons: the sources of scores (predictors/sources.py) that read one text
STATIC_SCORES = (*SCORES, "bigram", "hessian", "smooth_gradient", "snmf", "taylor", "wanda")
ExpertScore = Literal["reap", "frequency", "random"]
EXPERT_SCORES: tuple[ExpertScore, ...] = get_args(ExpertScore)
Allocation = Literal["equal", "cett", "residual", "fisher", "greedy"]
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)
Clustering = Literal["coactivation", "weights", "snmf"]
BrickRouter = Literal["linear", "centroids"]
WEIGHT_FORMATS = ("int4", "int8")
WIDTHS = ("int4", "int5", "int8")  # of matrices that are rounded with a text, the fewest bytes first
AS_PACKED = "packed"  # a packed model's own format
PACKINGS = (*WEIGHT_FORMATS, "bfloat16", "as-loaded")  # of the matrices that `pack` writes

_LEAST_TEMPERATURE = 1e-30  # scores, up to some hundreds, divided by less are no float32 numbers any more
_MOST_SEED = 2**64 - 1  # torch's generators hold 64 bits
_TEXT_SUFFIXES = {".txt", ".text", ".md", ".rst", ".json", ".jsonl", ".csv", ".tsv", ".html", ".xml", ".log", ".tex"}
_LONGEST_NAME = 4096  # of a path, on Linux


def check_score(score: str, known: tuple[str, ...] = SCORES) -> None:
    if score not in known:
        raise CoreskipError(f"unknown score {score!r}; choose from {', '.join(known)}")


def check_allocation(allocation: str) -> None:
    if allocation not in ALLOCATIONS:
        raise CoreskipError(f"unknown allocation {allocation!r}; choose from {', '.join(ALLOCATIONS)}")


def check_weights(weights: Any) -> None:
    """The format in which decode steps read their weights: None leaves them as they are loaded, or the plan's own."""
    if weights is not None and weights not in (*WEIGHT_FORMATS, AS_PACKED):
        raise CoreskipError(f"weights is {weights!r}; choose from {', '.join(WEIGHT_FORMATS)}, or leave it out")


def check_share(name: str, value: float) -> None:
    """Shares of neurons (keep, alpha, beta) lie in (0, 1]."""
    if not (_is_number(value) and 0 < value <= 1):
        raise CoreskipError(f"{name} is {value}; it must be above 0 and at most 1")


def check_above_zero(name: str, value: Any) -> None:
    """A finite number above 0."""
    if not (_is_number(value) and value > 0):
        raise CoreskipError(f"{name} is {value!r}; it must be a number above 0")


def check_number(name: str, value: Any) -> None:
    """A finite number."""
    if not _is_number(value):
        raise CoreskipError(f"{name} is {value!r}; it must be a finite number")


def check_temperature(name: str, value: Any) -> None:
    """What scores can be divided by."""
    check_above_zero(name, value)
    if value < _LEAST_TEMPERATURE:
        raise CoreskipError(f"{name} is {value!r}, by which scores cannot be divided: give 0 for greedy text, or more")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """A whole number of at least `least`."""
    if not _is_whole(value) or value < least:
        raise CoreskipError(f"{name} is {value!r}; it must be a whole number, at least {least}")


def check_seed(seed: Any) -> None:
    if not _is_whole(seed) or not 0 <= seed <= _MOST_SEED:
        raise CoreskipError(f"seed is {seed!r}; it must be a whole number from 0 to 2**64 - 1")


def check_flag(name: str, value: Any, *, none: bool = False) -> None:
    """True or False, or where `none` is set None: a word such as "no" would count as True."""
    if not isinstance(value, bool) and not (none and value is None):
        raise CoreskipError(f"{name} is {value!r}; it must be True{', False or None' if none else ' or False'}")


def check_encodable(name: str, text: str) -> None:
    """Text that UTF-8 can hold: undecodable bytes of a command line become lone surrogates, which it cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CoreskipError(f"{name} is not valid text: {text[error.start : error.end]!r} is no character") from None


def path_of(path: Any, what: str) -> Path:
    """`path`, a str or PathLike, as a Path. `what` names it for people, as in "the plan"."""
    try:
        name = os.fspath(path)
    except TypeError:
        name = None
    if not isinstance(name, str):
        raise CoreskipError(f"{what} is given as {kind_of(path)}: give its path")
    if not name or "\0" in name:
        raise CoreskipError(f"{name!r} cannot name {what}: give its path")
    return Path(name)


def names_a_file(text: str) -> bool:
    """Whether `text` was meant as the name of a text file rather than as text: there is such a file, or it is one word
    that ends as text files do."""
    if len(text) > _LONGEST_NAME or "\n" in text or "\0" in text:
        return False
    one_word = not any(character.isspace() for character in text)
    return (one_word and Path(text).suffix.lower() in _TEXT_SUFFIXES) or _is_file(text)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # longer than a file system takes
        return False


def kind_of(value: Any) -> str:
    """What `value` is, for a message: "a Tensor", "None"."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    if name.endswith("s"):  # bytes
        return name
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
