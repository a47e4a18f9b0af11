"""A small server for tests: a tiny random llama with the embedded model's tokenizer behind OpenAI's routes."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tiny_models import tiny

from coreskip import Engine
from coreskip.runtime.serve import Limits, Server, served_models

ROOT = Path(__file__).parent.parent

#: How Qwen's and Hermes' templates write tools and calls.
TOOLS_TEMPLATE = """{%- if tools %}<|im_start|>system
Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

MESSAGES = [{"role": "user", "content": "Name a river."}]


def with_template(tokenizer: Any, template: str | None) -> Any:
    """A copy of the tokenizer with another chat template, or with none."""
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = template
    return copied


def small_model(tokenizer: Any, context: int = 512) -> Any:
    return tiny("llama", vocab_size=len(tokenizer), eos_token_id=2, max_position_embeddings=context)


def server_of(engine: Engine, names: list[tuple[str, str | None]] | None = None, **limits: Any) -> Server:
    return Server(served_models(engine, names or [("tiny", None), ("exact", "dense")], None), Limits(**limits))


def client_of(server: Server, **options: Any) -> httpx.AsyncClient:
    """A client of the application in this process; what the server fails on is a response, too."""
    transport = httpx.ASGITransport(app=server.app(), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60, **options)


def events(text: str) -> list[Any]:
    """What the events of a stream hold; ``[DONE]`` is None."""
    found = []
    for event in text.split("\n\n"):
        if event:
            assert event.startswith("data: "), event
            data = event.removeprefix("data: ")
            found.append(None if data == "[DONE]" else json.loads(data))
    return found


@contextmanager
def serving(model: Path | str, *words: str, folder: Path) -> Iterator[Served]:
    """`coreskip serve` in a process of its own, at a free port, until the end of the block. model: "" is the embedded
    one."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CORESKIP_API_KEYS": ""}
    log = folder / "stderr.txt"
    own = [str(model)] if str(model) else []
    command = [sys.executable, "-m", "coreskip", "serve", *own, "--port", "0", *words]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL, env=environment, cwd=folder)
    try:
        yield Served(process, log, _address(process, log))
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(1200):
        found = re.search(r"http://[\d.:]+", log.read_text())
        if found:
            return found[0]
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@dataclass
class Served:
    """url: without the path."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str

    def stop(self, within: float) -> int:
        """Ask it to end.

        Returns:
            its exit code.
        """
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        page = httpx.get(f"{self.url}/metrics").text
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE))

    def idle(self, within: float = 10) -> bool:
        """Whether nothing is generated any more, soon."""
        end = time.monotonic() + within
        while time.monotonic() < end:
            if self.metric("coreskip_running") + self.metric("coreskip_waiting") == 0:
                return True
            time.sleep(0.05)
        return False

    def connect(self, body: Any, receive_bytes: int | None = None) -> socket.socket:
        """A bare connection that has sent a request for a text and has read nothing yet."""
        host, port = self.url.removeprefix("http://").split(":")
        sock = socket.socket()
        if receive_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        sock.connect((host, int(port)))
        data = json.dumps(body).encode()
        head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
        sock.sendall("\r\n".join([*head, f"Content-Length: {len(data)}", "", ""]).encode() + data)
        return sock
