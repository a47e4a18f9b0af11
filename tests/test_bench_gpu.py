"""The command for a card, where there is none: everything that it does, on shapes that the interpreter can do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from coreskip.bench import gpu_steps
from coreskip.bench.gpu_clock import GpuRow, Results

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (the extra `gpu`)")


def command(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    given = [sys.executable, "-m", "coreskip.bench.gpu", *words]
    return subprocess.run(given, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a card")
def test_a_run_of_all_parts_on_tiny_shapes(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    done = command("--shape", "tiny", "--minutes", "60", "--rows", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert not [row for row in rows if not row["ok"]]
    assert {row["part"] for row in rows} == {
        "machine", "check", "kernel", "small", "launches", "step", "prediction",
    }  # fmt: skip
    assert all(row["interpreted"] and row["torch"] == torch.__version__ for row in rows)
    steps = [row for row in rows if row["part"] == "step"]
    assert {row["name"] for row in steps} >= {"HF eager", "dense", "static", "dense, exact with lookup"}
    assert all(row["tok_s"] > 0 for row in steps)
    assert all("; lowered" in row["notes"] for row in steps if row["name"] != "HF eager")


def test_without_a_card_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("here is a card")
    done = command("--shape", "7b")
    assert done.returncode == 2
    assert "there is no CUDA device" in done.stderr
    assert command("--minutes", "0").returncode == 2


def test_what_fails_takes_nothing_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(None, 10, "a test")

    def fails(row: GpuRow) -> None:
        raise RuntimeError("out of\nresources")

    assert not results.attempt(GpuRow("check", "one"), fails)
    assert results.attempt(GpuRow("check", "two"), lambda row: None)
    assert "FAILED  RuntimeError: out of resources" in capsys.readouterr().out


def test_predictions_follow_the_bytes() -> None:
    """Llama-2-7B's matrices are 6.61e9 numbers, of which a step reads all but the embedding."""
    results = Results(None, 10, "a test")
    gpu_steps.predict(results, "7b")
    rows = {(row.fmt, row.keep): row for row in results.rows if row.name in ("dense", "static")}
    assert all(row.small is not None and row.small <= 6 for row in results.rows)
    assert rows["bfloat16", 1.0].nbytes == 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000)
    assert rows["int4", 1.0].nbytes == int(0.625 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 1.125 * 4096 * 32000)
    times = [rows[key].us["p50"] for key in (("bfloat16", 1.0), ("bfloat16", 0.5), ("int4", 1.0), ("int4", 0.5))]
    assert times == sorted(times, reverse=True)
