"""The server's process: an address, uvicorn, and an end in which answers under way are finished."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from types import FrameType

import uvicorn

from ..predictors.errors import CoreskipError
from .serve import Server

logger = logging.getLogger("coreskip")

#: Clients keep connections for reuse; one that closes first on either side loses a request, so this is longer than
#: what clients' libraries wait.
_KEEP_ALIVE = 75
#: Seconds after the grace period in which the last words of cancelled answers are sent.
_LAST_WORDS = 5


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address that nothing listens on yet, so that a mistake shows before a model is loaded.

    Raises:
        CoreskipError: there is no such address, or another program has it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise CoreskipError(f"cannot listen at {host}, port {port}: {error.strerror or error}") from None
    return bound


def is_local(bound: socket.socket) -> bool:
    """Whether only programs of this machine reach the socket."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def run(server: Server, bound: socket.socket, grace: float) -> None:
    """Serve until SIGINT or SIGTERM. Then nothing new is taken; what is under way is finished within `grace` seconds,
    or its clients are told. A second signal cuts that short."""
    config = uvicorn.Config(
        server.app(),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=round(grace) + _LAST_WORDS,
    )
    _Process(config, server, grace).run(sockets=[bound])


class _Process(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, server: Server, grace: float) -> None:
        super().__init__(config)
        self._server, self._grace = server, grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = (sockets or [])[0].getsockname()[:2]
        names = ", ".join(served.name for served in self._server.models)
        logger.info("serving %s at http://%s:%d/v1", names, f"[{host}]" if ":" in host else host, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._server.drain()
        logger.info("no more requests are taken; those under way have %g s", self._grace)
        timer = asyncio.get_running_loop().call_later(self._grace, self._end)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def _end(self) -> None:
        self._server.cancel("the server is shutting down")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Unlike uvicorn's own this does not raise the signal again at the end: it was obeyed."""
        if self.should_exit:
            self._end()
        self.should_exit = True
