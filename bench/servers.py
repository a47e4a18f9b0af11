"""Servers that speak OpenAI's API, each in a process of its own: ours, and those it is measured against."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import httpx

from coreskip.predictors.errors import CoreskipError

#: Seconds that a server may take from its start to its first answer.
_START_S = 300.0
_NAME = "bench"


@dataclass(frozen=True)
class Job:
    """What a server is started for.

    Attributes:
        model: an id, a folder or a file, as `coreskip serve` takes it; None: the embedded one.
        folder: the same model as a folder of transformers'. gguf: as a GGUF file; None: there is none.
        streams: at once, at most. prompt_memory: of ours, for prompts that were read before; None: its default.
    """

    model: str | None
    folder: Path
    gguf: Path | None
    threads: int
    streams: int
    prompt_memory: str | None = None


@dataclass(frozen=True)
class Kind:
    """
    Attributes:
        command: of a job at a port. unavailable: why it cannot run here; None where it can.
        model: what requests call the model.
        notes: how it computes, for rows. ready: a path that answers once it runs.
    """

    command: Callable[[Job, int], list[str]]
    unavailable: Callable[[Job], str | None] = lambda job: None
    model: Callable[[Job], str] = lambda job: _NAME
    notes: str = ""
    ready: str = "/health"


def _coreskip(*words: str) -> Callable[[Job, int], list[str]]:
    def command(job: Job, port: int) -> list[str]:
        model = [] if job.model is None else [job.model]
        batch = ["--threads", str(job.threads), "--max-batch", str(job.streams), "--name", _NAME]
        kept = [] if job.prompt_memory is None else ["--prompt-memory", job.prompt_memory]
        return [sys.executable, "-m", "coreskip", "serve", *model, "--port", str(port), *batch, *kept, *words]

    return command


def _transformers(job: Job, port: int) -> list[str]:
    program = "from transformers.cli.transformers import main; main()"  # its script may be another environment's
    words = ["--port", str(port), "--device", "cpu", "--dtype", "bfloat16", "--continuous-batching"]
    return [sys.executable, "-c", program, "serve", str(job.folder), *words]


def _llama_server(job: Job, port: int) -> list[str]:
    words = ["-m", str(job.gguf), "--port", str(port), "-t", str(job.threads), "-np", str(job.streams)]
    return ["llama-server", *words, "-c", str(2048 * job.streams)]


def _llama_cpp_python(job: Job, port: int) -> list[str]:
    words = ["--model", str(job.gguf), "--model_alias", _NAME, "--port", str(port), "--n_ctx", "2048"]
    words += ["--interrupt_requests", "false"]  # by default a request that arrives cuts off the one being answered
    return [sys.executable, "-m", "llama_cpp.server", *words, "--n_threads", str(job.threads)]


def _no_llama_cpp_python(job: Job) -> str | None:
    if job.gguf is None:
        return "llama.cpp needs the model as GGUF"
    wanted = ("llama_cpp", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings")
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    return f"pip install 'llama-cpp-python[server]': there is no {missing[0]}" if missing else None


def _no_transformers_serve(job: Job) -> str | None:
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    return f"transformers serve needs {missing[0]}" if missing else None


def _no_llama_server(job: Job) -> str | None:
    if job.gguf is None:
        return "llama-server needs the model as GGUF"
    return None if shutil.which("llama-server") else "there is no llama-server on the path"


KINDS: dict[str, Kind] = {
    "coreskip": Kind(_coreskip()),
    "coreskip int4": Kind(_coreskip("--weights", "int4")),
    "transformers": Kind(
        _transformers, _no_transformers_serve, lambda job: str(job.folder), "continuous batching, bfloat16"
    ),
    "llama-server": Kind(_llama_server, _no_llama_server),
    "llama-cpp-python": Kind(
        _llama_cpp_python, _no_llama_cpp_python, notes="one request at a time", ready="/v1/models"
    ),
}


class ServerProcess:
    """A server that runs until `close`, at a port of its own.

    Raises:
        CoreskipError: it did not start; with the last line that it wrote.
    """

    def __init__(self, kind: str, job: Job) -> None:
        port = free_port()
        self.url, self.model = f"http://127.0.0.1:{port}", KINDS[kind].model(job)
        self._ready = self.url + KINDS[kind].ready
        self._log = TemporaryFile("w+")  # noqa: SIM115  (the server's, for as long as it runs)
        command, environment = KINDS[kind].command(job, port), _environment(job.threads)
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=environment)
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + _START_S
        while time.monotonic() < end and self._process.poll() is None:
            try:
                if httpx.get(self._ready, timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        self.close()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines() or ["it wrote nothing"]
        raise CoreskipError(f"the server at {self.url} did not start: {lines[-1]}")

    @property
    def process(self) -> int:
        """Its id."""
        return self._process.pid

    def close(self) -> int:
        """
        Returns:
            the exit code.
        """
        self._process.terminate()
        try:
            return self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def _environment(threads: int) -> dict[str, str]:
    """The machine's own variables rather than this process', with the number of threads where peers read it."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    return {**found, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
