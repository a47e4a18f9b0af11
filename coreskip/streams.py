"""Standard streams that a shell may have closed, filled or given an encoding that lacks most characters."""

from __future__ import annotations

import errno
import os
import sys

from coreskip.predictors.errors import CoreskipError

BROKEN_PIPE = 1  # the exit code that click gives it
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def prepare() -> None:
    """Every character can be written: what the encoding lacks appears as its number.

    Raises:
        CoreskipError: stdout is closed; the first file opened would take its place, and get the results.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (for as long as the process runs)
    if sys.stdout is None:
        raise CoreskipError("stdout is closed: send it to a file, or to /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def is_of_stdout(error: OSError) -> bool:
    """Whether writing to stdout raised it: files are named by what opens them, and Python keeps nothing of what could
    not be written that could be tried again."""
    return error.filename is None and error.errno in _CANNOT_WRITE


def let_go() -> None:
    """Nothing more can be written to stdout: what is still held back must not fail again when Python ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
