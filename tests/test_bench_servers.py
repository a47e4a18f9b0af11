"""What benches of servers and of many streams write where a system is slow, missing or broken; and a soak's memory."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner

from coreskip.bench import serve, soak, stream_peers
from coreskip.bench.servers import Job, ServerProcess


class Silent:
    """A server that takes requests and answers none."""

    model = "silent"

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url, self.closed = f"http://127.0.0.1:{self._listening.getsockname()[1]}", False

    def close(self) -> int:
        self._listening.close()
        self.closed = True
        return 0


@pytest.fixture
def silent() -> Iterator[Silent]:
    server = Silent()
    yield server
    server.close()


def test_a_server_that_is_too_slow_has_rows_that_say_so(silent: Silent) -> None:
    servers = {"transformers": cast(ServerProcess, silent)}
    rows = list(serve.measured(servers, [1, 4], 16, 2, None, 0.2))
    assert [(row["server"], row["clients"]) for row in rows] == [("transformers", 1), ("transformers", 4)]
    assert {row["failed"] for row in rows} == {"1 clients had no whole answers of 16 tokens in 0.2 s"}
    assert silent.closed  # else it would compute beside the others


def test_servers_that_cannot_run_are_told_of(tmp_path: Path) -> None:
    started, failed = serve._started(["llama-server"], Job(None, tmp_path, None, 1, 1), None, None)
    assert (started, failed) == ({}, {"llama-server": "llama-server needs the model as GGUF"})


def test_systems_that_are_missing_or_fail_have_rows_that_say_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, embedded: Any
) -> None:
    class Fake:
        def __init__(self, name: str, *_: Any) -> None:
            self.name, self.turns = name, 0

        def seconds(self, asked: list[list[int]], new: int, patience: float) -> float:
            self.turns += 1
            if self.name == "llama.cpp" and self.turns == 3:
                raise stream_peers.SystemFailed("its process ended")
            return 0.5

        def close(self) -> None:
            pass

    systems = {**stream_peers.SYSTEMS, "openvino": (stream_peers._openvino, "no_such_module", "")}
    systems["llama.cpp"] = (stream_peers._llama_cpp, "coreskip", "")
    monkeypatch.setattr(stream_peers, "SYSTEMS", systems)
    monkeypatch.setattr(stream_peers, "SystemProcess", Fake)
    output = tmp_path / "rows.jsonl"
    words = ["--rows", str(output), "--streams", "1,16", "--rounds", "2", "--systems", "coreskip,openvino,llama.cpp"]
    assert CliRunner().invoke(stream_peers.main, words, catch_exceptions=False).exit_code == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    found = [(row["system"], row["streams"], row.get("tok_s"), row.get("failed")) for row in rows]
    assert found == [
        ("coreskip", 1, 256.0, None),
        ("coreskip", 16, 4096.0, None),
        ("openvino", 1, None, "there is no no_such_module"),
        ("openvino", 16, None, "there is no no_such_module"),
        ("llama.cpp", 1, None, "its process ended"),
        ("llama.cpp", 16, None, "its process ended"),
    ]


def test_a_soak_tells_memory_over_time(silent: Silent) -> None:
    found = soak.Soak(cast(ServerProcess, silent), 0)
    found.memory = [(5.0 * i, 1e9 + (2e9 if i >= 20 else 1e8 * i)) for i in range(1, 121)]
    summary = soak._summary(found)
    assert list(summary["memory_mb_by_seconds"]) == ["120", "240", "360", "480", "600"]
    assert list(summary["memory_mb_by_seconds"].values())[1:] == [3000.0] * 4
    assert summary["memory_mb"]["late"] == 3000.0
