"""`coreskip serve`: a model behind OpenAI's HTTP API."""

from __future__ import annotations

import logging
import sys
from typing import Any

import click

from coreskip.common_options import check_memory, memory_option, model_options, weights_option
from coreskip.runtime.serve_setup import Setup, check_libraries


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
@memory_option
@click.option(
    "--prompt-memory",
    metavar="SIZE",
    help="For prompts that were read before, so that what begins alike is not read again: 512MB or 5% of what is free; "
    "0: none. By default up to 1GB.",
)
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
@click.option(
    "--max-body", type=click.FloatRange(0, min_open=True), default=8, show_default=True, help="Megabytes of a request."
)
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=600, show_default=True, help="Seconds for an answer."
)
@click.option(
    "--grace", type=click.FloatRange(0), default=30, show_default=True, help="Seconds that answers have at the end."
)
def serve(host: str, port: int, grace: float, **options: Any) -> None:
    """Serve MODEL over HTTP, as OpenAI's API: chat and plain completions, streamed or whole.

    Without a plan the dense model runs on the fast path.
    """
    setup = Setup(**options)
    setup.check()
    check_memory(options["memory"], options["weights"])
    check_libraries()
    from coreskip.runtime.serve_http import bind, is_local, run

    with bind(host, port) as bound:
        if not setup.keys and not is_local(bound):
            click.echo("coreskip: everybody who reaches this address may use the model: set an --api-key", err=True)
        server = setup.start()
        try:
            _log_requests()
            run(server, bound, grace)
        finally:
            server.close()


def _log_requests() -> None:
    """Each request is a JSON object on a line of its own, on stderr, for programs to read."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("coreskip.requests")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
