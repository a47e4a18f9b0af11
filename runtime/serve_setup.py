"""From what a server is told to serve, by a command line or a cluster's configuration, to the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..predictors.errors import CoreskipError
from .memory_size import bytes_of

if TYPE_CHECKING:
    from .serve import Server

#: The name of the dense model beside one under a plan.
EXACT = "exact"
_LIBRARIES = {"anyio", "llguidance", "prometheus_client", "pydantic", "pydantic_core", "starlette", "uvicorn"}


@dataclass(frozen=True)
class Setup:
    """
    Attributes:
        model, dtype, device: as `load` takes them.
        plans: each a path, ``NAME=PATH``, or ``exact``: the dense model beside the plan.
        weights: of decode steps: ``int4`` or ``int8``; None: the plan's.
        memory: that the model and its texts may take; None: any.
        prompt_memory: for prompts that were read before, as `bytes_of` reads it; "0": none; None: what `Engine` takes.
        name: what requests call the model; None: its id, or its file's or folder's name.
        threads: to compute with; None: all.
        keys, max_body, timeout: of `Limits`; max_body in megabytes.
        max_batch, max_waiting, max_context: texts at once, texts in the queue, tokens of a prompt and its answer.
    """

    model: str | None = None
    plans: Sequence[str] = ()
    weights: str | None = None
    memory: str | None = None
    prompt_memory: str | None = None
    name: str | None = None
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None
    keys: Sequence[str] = ()
    max_batch: int = 16
    max_waiting: int = 256
    max_context: int | None = None
    max_body: float = 8.0
    timeout: float = 600.0

    def check(self) -> None:
        """
        Raises:
            CoreskipError: something that makes no sense, found without loading anything.
        """
        names = [name for name, _ in self.names()]
        if len(set(names)) < len(names):
            raise CoreskipError(f"two models have one name: {', '.join(names)}")
        if any(not key.strip() for key in self.keys):
            raise CoreskipError("an --api-key is empty")
        self._prompt_bytes()

    def _prompt_bytes(self) -> int | None:
        given = self.prompt_memory
        if given is None or given.strip() == "0":
            return None if given is None else 0
        try:
            return bytes_of(given)
        except CoreskipError as error:
            raise CoreskipError(f"--prompt-memory: {error}") from error

    def _plans(self) -> list[tuple[str | None, str | None]]:
        """Names, None where there is none, and paths, None for the dense model."""
        found = list[tuple[str | None, str | None]]()
        for plan in self.plans:
            name, path = plan.split("=", 1) if "=" in plan and not Path(plan).exists() else (None, plan)
            if name == "" or not path:
                raise CoreskipError(f"--plan {plan}: write NAME=PATH, or a path")
            found.append((EXACT, None) if name is None and path == EXACT else (name, path))
        paths = [path for _, path in found if path is not None]
        if len(paths) > 1:
            raise CoreskipError(
                f"one model decodes under one plan: leave out {paths[0]} or {paths[1]}, or serve them from two "
                "processes; --plan exact serves the dense model beside a plan"
            )
        return found

    def names(self) -> list[tuple[str, str | None]]:
        """What requests may call the model, with the lane of each; the model's own name is the first."""
        model = self.model
        named = [(name, None if path else "dense") for name, path in self._plans() if name is not None]
        here = model is not None and Path(model).exists()
        own = self.name or (Path(str(model)).resolve().name.removesuffix(".gguf") if here else model)
        return [(own or "smollm2-135m-instruct", None), *named]

    def start(self) -> Server:
        """Load the model, and make everything that the first request would wait for. Close the server afterwards.

        Raises:
            CoreskipError: as `load`, `Plan.load` and `Engine` raise it, or a context that the model does not have.
        """
        self.check()
        from ..predictors.plan import Plan
        from .engine import Engine
        from .load import load, packed_for
        from .packed_folder import plan_of
        from .serve import Limits, Server, served_models

        _set_threads(self.threads)
        path = next((path for _, path in self._plans() if path is not None), None)
        folder = plan_of(self.model) if path is None else Path(path)
        plan = Plan.load(folder) if folder is not None else None
        packed = packed_for(self.model, self.weights)
        model, tokenizer = load(self.model, dtype=self.dtype, device=self.device, packed=packed, memory=self.memory)
        names = self.names()
        # nobody needs the model afterwards: its originals may go, unless texts of the dense model read them
        keep = None if any(lane == "dense" for _, lane in names) else False
        engine = Engine(
            model,
            tokenizer,
            plan,
            weights=self.weights,
            keep_originals=keep,
            max_batch=self.max_batch,
            max_waiting=self.max_waiting,
            prompt_bytes=self._prompt_bytes(),
        )
        try:
            limits = Limits(self.keys, body_bytes=round(self.max_body * 1e6), request_s=self.timeout)
            server = Server(served_models(engine, names, self.max_context), limits)
            _warm_up(server)
        except BaseException:
            engine.close()
            raise
        return server


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _warm_up(server: Server) -> None:
    """Have everything made that the first request would wait for: native steps, tokens as bytes."""
    from .sequence import Request

    for served in server.models:
        served.engine.submit(Request([0], 2, ignore_eos=True, lane=served.lane)).collect()
        served.vocabulary.bytes(0)


def check_libraries() -> None:
    """
    Raises:
        CoreskipError: the server's libraries are not installed; it says how to install them.
    """
    try:
        import uvicorn  # noqa: F401

        from . import serve  # noqa: F401
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in _LIBRARIES:
            raise
        raise CoreskipError("serving needs more libraries: pip install 'coreskip[serve]'") from None
