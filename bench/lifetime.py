"""How long processes live: workers end with the one that started them, and that one is interrupted where nothing is
lost by it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C, `kill`, a terminal that is closed
_SIGNALS = [signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__]
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process as soon as its parent is no more, however that ended: a worker in the middle of
    a pass would go on for minutes. On Linux alone; elsewhere workers end with their current call.

    Args:
        parent: the parent's process id, where it is known: it may have ended before this call.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, ctypes.c_ulong(signal.SIGKILL))
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # signals can be set in that one alone


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, unless they are ignored or handled already."""
    mine = [number for number in _SIGNALS if _in_main_thread() and signal.getsignal(number) is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def deferred() -> Iterator[None]:
    """What comes to interrupt this process within the block does so at its end."""
    came: list[int] = []
    before = {}
    if _in_main_thread():
        before = {number: signal.signal(number, lambda which, _: came.append(which)) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if came:
            signal.raise_signal(came[0])


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes started within the block never hear what interrupts this one: Ctrl-C goes to every process of the
    terminal, and rows are made of the answers of workers that are still there. To this process it comes afterwards."""
    with deferred():
        if not hasattr(signal, "pthread_sigmask"):
            yield
            return
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # which children inherit
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
