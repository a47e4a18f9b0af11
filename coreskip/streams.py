"""Standard streams that a shell may have closed, filled or given an encoding that lacks most characters."""

from __future__ import annotations

import os
import signal
import sys

from coreskip.predictors.errors import CoreskipError

BROKEN_PIPE = 128 + getattr(signal, "SIGPIPE", 13)  # what a shell reports of a program that nobody reads any more


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


def stdout_fails() -> bool:
    """Whether what was written to stdout cannot get out: the device is full, say."""
    try:
        sys.stdout.flush()
    except OSError:
        return True
    return False


def let_go() -> None:
    """Nothing more can be written to stdout: what is still held back must not fail again when Python ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
