"""`coreskip serve`: a model behind OpenAI's HTTP API."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click

from coreskip.common_options import model_options, set_threads, weights_option
from coreskip.predictors.errors import CoreskipError

#: The name of the dense model beside one under a plan.
_EXACT = "exact"
_LIBRARIES = {"anyio", "llguidance", "prometheus_client", "pydantic", "pydantic_core", "starlette", "uvicorn"}


@click.command()
@model_options
@click.option(
    "--plan",
    "plans",
    multiple=True,
    metavar="[NAME=]PLAN",
    help="Decode under this plan; with a NAME for requests that send it as their model. `exact` besides serves the "
    "dense model, too, under that name.",
)
@weights_option("Decode with weights in 4 or 8 bits, on top of the plan or of the dense model.")
@click.option("--name", help="What requests call the model; by default its id, or its file's or folder's name.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at; 0.0.0.0 is all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option(
    "--api-key",
    "keys",
    multiple=True,
    envvar="CORESKIP_API_KEYS",
    help="That requests have to bring, as a bearer token; may be given several times. Others on this machine can read "
    "a command line: rather set CORESKIP_API_KEYS, keys separated by spaces.",
)
@click.option("--max-batch", type=click.IntRange(1), default=16, show_default=True, help="Texts generated at once.")
@click.option(
    "--max-waiting", type=click.IntRange(0), default=256, show_default=True, help="Texts that wait; more get a 429."
)
@click.option("--max-context", type=click.IntRange(1), help="Tokens of prompt and answer; by default the model's.")
@click.option("--max-body", type=click.FloatRange(0, min_open=True), default=8, show_default=True, help="Megabytes.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=600, show_default=True, help="Of answers.")
@click.option(
    "--grace", type=click.FloatRange(0), default=30, show_default=True, help="Seconds for answers at the end."
)
def serve(
    model: str | None,
    plans: tuple[str, ...],
    weights: str | None,
    name: str | None,
    host: str,
    port: int,
    keys: tuple[str, ...],
    max_context: int | None,
    grace: float,
    dtype: str | None,
    device: str | None,
    threads: int | None,
    **options: Any,
) -> None:
    """Serve MODEL over HTTP, as OpenAI's API: chat and plain completions, streamed or whole.

    Without a plan the dense model runs on the fast path.
    """
    names, path = _names(model, name, plans)
    if any(not key.strip() for key in keys):
        raise CoreskipError("an --api-key is empty")
    try:
        from coreskip.runtime.serve_http import bind, is_local, run, warm_up
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in _LIBRARIES:
            raise
        raise CoreskipError("serving needs more libraries: pip install 'coreskip[serve]'") from None
    with bind(host, port) as bound:
        if not keys and not is_local(bound):
            click.echo("coreskip: everybody who reaches this address may use the model: set an --api-key", err=True)
        set_threads(threads)
        queue = {name: options[name] for name in ("max_batch", "max_waiting")}
        # nobody needs the model afterwards: its originals may go, unless texts of the dense model read them
        keep = None if any(lane == "dense" for _, lane in names) else False
        engine = _engine(model, dtype, device, path, weights=weights, keep_originals=keep, **queue)
        with engine:
            server = _server(engine, names, max_context, keys, options)
            _log_requests()
            warm_up(server)
            run(server, bound, grace)


def _names(
    model: str | None, name: str | None, plans: tuple[str, ...]
) -> tuple[list[tuple[str, str | None]], str | None]:
    """Names with their lanes, the model's own first; and the plan's path."""
    path, named = None, list[tuple[str, str | None]]()
    for plan in plans:
        own, given = plan.split("=", 1) if "=" in plan and not Path(plan).exists() else (None, plan)
        if own == "" or not given:
            raise CoreskipError(f"--plan {plan}: write NAME=PATH, or a path")
        if own is None and given == _EXACT:
            named.append((_EXACT, "dense"))
            continue
        if path is not None:
            raise CoreskipError(
                f"one model decodes under one plan: leave out {path} or {given}, or serve them from two processes; "
                "--plan exact serves the dense model beside a plan"
            )
        path = given
        if own is not None:
            named.append((own, None))
    own_name = name or (Path(model).stem if model is not None and Path(model).exists() else model)
    first = named[0][1] if named else None
    found = [(own_name or "smollm2-135m-instruct", first), *named]
    if len({each for each, _ in found}) < len(found):
        raise CoreskipError(f"two models have one name: {', '.join(each for each, _ in found)}")
    return found, path


def _engine(model: str | None, dtype: str | None, device: str | None, path: str | None, **options: Any) -> Any:
    from coreskip.predictors.plan import Plan
    from coreskip.runtime.engine import Engine
    from coreskip.runtime.load import load, packed_for
    from coreskip.runtime.packed_folder import plan_of

    folder = plan_of(model) if path is None else Path(path)
    plan = Plan.load(folder) if folder is not None else None
    loaded, tokenizer = load(model, dtype=dtype, device=device, packed=packed_for(model, options["weights"]))
    return Engine(loaded, tokenizer, plan, **options)


def _server(
    engine: Any,
    names: list[tuple[str, str | None]],
    max_context: int | None,
    keys: tuple[str, ...],
    options: dict[str, Any],
) -> Any:
    from coreskip.runtime.serve import Limits, Server, served_models

    limits = Limits(keys, body_bytes=round(options["max_body"] * 1e6), request_s=options["timeout"])
    return Server(served_models(engine, names, max_context), limits)


def _log_requests() -> None:
    """Each request is a JSON object on a line of its own, on stderr, for programs to read."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("coreskip.requests")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
