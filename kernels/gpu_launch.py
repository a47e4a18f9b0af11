"""Launches on a GPU, counted as they are made: what a step costs beyond the bytes that it reads."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

#: Triton runs its kernels in Python, on CPU tensors
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_counting = threading.local()


@contextmanager
def launches() -> Iterator[Counter[str]]:
    """Counts what the calling thread launches meanwhile: "gemv", which read matrices, and "small", the others.

    Also "bytes" of matrices that those read, as far as shapes tell.
    """
    before = getattr(_counting, "counter", None)
    _counting.counter = counter = Counter[str]()
    try:
        yield counter
    finally:
        _counting.counter = before


def count(kind: str, nbytes: int = 0) -> None:
    """Notes one launch."""
    counter = getattr(_counting, "counter", None)
    if counter is not None:
        counter[kind] += 1
        counter["bytes"] += nbytes
