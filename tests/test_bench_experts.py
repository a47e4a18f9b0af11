"""The bench of mixtures of experts, over a tiny one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from coreskip.bench import experts
from coreskip.bench.tables import fill_tables
from coreskip.bench.workloads import SHAPES
from coreskip.kernels.ops import available

pytestmark = pytest.mark.skipif(available("cpu") is not None, reason="needs the compiled kernels")


def test_rows_of_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
    monkeypatch.setitem(SHAPES, "olmoe-1b-7b", SHAPES["olmoe-1b-7b"] | small)
    monkeypatch.setattr("coreskip.bench.machine._BUFFER", 1 << 20)
    rows = tmp_path / "experts.jsonl"
    done = CliRunner().invoke(experts.main, ["--layers", "2", "--rounds", "1", "--rows", str(rows)])
    assert done.exit_code == 0, done.output
    found = {row["way"].split(",")[0]: row for row in map(json.loads, rows.read_text().splitlines())}
    assert found.keys() == {
        "transformers float32", "transformers bfloat16", "coreskip bfloat16", "coreskip int8", "coreskip int4",
    }  # fmt: skip
    whole, half = found["transformers float32"], found["coreskip bfloat16"]
    # two layers, each token 8 of 64 experts of 3 x 64 x 64
    assert half["experts_megabytes"] == pytest.approx(2 * 8 * 3 * 64 * 64 * 2 / 1e6, abs=0.1)
    assert whole["megabytes"] == pytest.approx(2 * found["transformers bfloat16"]["megabytes"], abs=0.2)
    assert max(whole["of_transformers"], found["transformers bfloat16"]["of_transformers"]) == 1
    assert "| coreskip int4 |" in fill_tables("<!-- table: experts -->\n<!-- end table -->", tmp_path)
