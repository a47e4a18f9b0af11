"""Runners in processes of their own, called over a pipe."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from coreskip.bench.lifetime import deaf_children, deferred, die_with_parent
from coreskip.bench.machine import Machine
from coreskip.bench.peers import SCRATCH
from coreskip.bench.runner import Job
from coreskip.bench.runners import RUNNERS

MACHINE = "machine"  # a job that measures the machine itself


class Client(Protocol):
    """Calls the methods of a runner, wherever it lives. Raises `RunnerFailed` for whatever goes wrong there."""

    def __call__(self, method: str, *arguments: Any) -> Any: ...

    def close(self) -> None: ...


class RunnerFailed(Exception):
    """A runner cannot go on; the message says why."""


class Worker:
    """A runner in a process of its own: its memory, its threads and its crashes are its own.

    It ends with the process, and on Linux also with the thread, that made it, however that ends.

    Raises:
        RunnerFailed: from a call, when the runner raised or its process died.
    """

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._answers_due = 0
        self._process = context.Process(target=serve, args=(theirs, job), name=str(job))
        # started under the mask of `deaf_children`, it would take that off again
        if os.name == "posix":
            resource_tracker.ensure_running()
        with _inherited(job.threads):
            self._process.start()
        theirs.close()

    def __call__(self, method: str, *arguments: Any) -> Any:
        try:
            # half a message sent or received would leave the pipe out of step
            with deferred():
                self._pipe.send((method, arguments))
                self._answers_due += 1
            while self._answers_due:  # more than one where Ctrl-C came while an earlier one was awaited
                self._pipe.poll(None)
                with deferred():
                    ok, answer = self._pipe.recv()
                    self._answers_due -= 1
        except (EOFError, OSError):
            self._process.join(5)
            raise RunnerFailed(f"its process died with exit code {self._process.exitcode}") from None
        if not ok:
            raise RunnerFailed(answer)
        return answer

    def close(self) -> None:
        self._pipe.close()  # which ends `serve`
        if not self._answers_due:  # else it works on what nobody waits for any more
            self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}{self._process.pid}-*"):
            shutil.rmtree(left, ignore_errors=True)


_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@contextmanager
def _inherited(threads: int) -> Iterator[None]:
    """What a process must find from its very start: thread counts, which libraries read once, when they are loaded,
    and deafness to what interrupts the process that writes the rows."""
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    try:
        with deaf_children():
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def serve(pipe: Connection, job: Job) -> None:
    """Carry out calls for a `Worker` until its end of the pipe closes."""
    parent = multiprocessing.parent_process()
    die_with_parent(None if parent is None else parent.pid)
    here = Local(job)
    while True:
        try:
            method, arguments = pipe.recv()
        except (EOFError, OSError):  # an error of its own where an answer lay unread when the other end closed
            break
        try:
            answer = (True, here(method, *arguments))
        except RunnerFailed as error:
            answer = (False, str(error))
        try:
            pipe.send(answer)
        except OSError:
            break
    here.close()


class Local:
    """A runner in this process."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._target: Any = None

    def __call__(self, method: str, *arguments: Any) -> Any:
        try:
            if self._target is None:
                torch.set_num_threads(self._job.threads)
                self._target = self._make()
            if method == "memory":
                return memory_at_peak(self._job.device, getattr(self._target, "process", None))
            return getattr(self._target, method)(*arguments)
        except Exception as error:  # whatever a peer raises ends that peer, not the run
            message = " ".join(str(error).split())[:300]
            raise RunnerFailed(message or type(error).__name__) from error

    def _make(self) -> Any:
        if self._job.runner == MACHINE:
            return Machine(self._job.device, self._job.threads)
        return RUNNERS[self._job.runner](self._job)

    def close(self) -> None:
        if hasattr(self._target, "close"):
            self._target.close()


def memory_at_peak(device: str, process: int | None = None) -> int:
    """Bytes: what this process allocated on a CUDA device at most, else the largest resident memory of `process`, by
    default this one."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    status = Path(f"/proc/{process or 'self'}/status")
    if status.is_file():  # psutil knows the peak on Windows alone; getrusage counts the parent's before exec, too
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    memory = psutil.Process(process).memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))
