"""The measuring code on shapes too small to mean anything: rows are complete, and a wrong kernel is not timed."""

import json

import pytest
import torch

from coreskip.bench import kernels as bench
from coreskip.bench.tables import kernel_table
from coreskip.kernels import cpu, ops

pytestmark = pytest.mark.skipif(ops.available("cpu") is not None, reason="needs the compiled kernels")


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setattr(bench, "cache_bytes", lambda: 1 << 14)


def test_rows_are_complete(tmp_path):
    file = tmp_path / "rows.jsonl"
    what = ["--shapes", "64x96", "--formats", "bfloat16,int8_sliced", "--keeps", "1.0,0.5"]
    bench.main([*what, "--rounds", "2", "--json", str(file)])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for name, found in (("mlp", rows[:8]), ("sketch_mlp", rows[8:])):
        assert [(row["op"], row["backend"], row["call"], row["keep"]) for row in found] == [
            ("read", "cpu", "op", 1.0),
            ("mlp", "torch", "op", 1.0),
            *((name, "cpu", call, keep) for keep in (1.0, 0.5) for call in ("op", "bound", "step")),
        ]
    for row in rows:
        assert row["us_per_layer_p20"] <= row["us_per_layer_p50"] <= row["us_per_layer_p80"]
        assert row["gb_per_s"] >= 0
        assert {"device", "isa", "threads", "torch", "coreskip", "commit", "command", "shape", "fmt"} <= row.keys()
    table = kernel_table(rows).splitlines()
    assert [line.split(" | ")[1] for line in table[2:4]] == ["bfloat16", "int8_sliced"]
    assert all(line.count("×)") == 2 for line in table[2:4])


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    right = cpu.mlp
    monkeypatch.setattr(cpu, "mlp", lambda *arguments: right(*arguments) * 1.1)
    with pytest.raises(RuntimeError, match="nothing was timed"):
        bench.measure("64x96", "float32", rounds=1)


def test_a_bound_call_reads_x_anew():
    torch.manual_seed(0)
    packed = ops.PackedMLP.pack(*torch.randn(3, 96, 64), act="silu")
    x, wanted = torch.randn(1, 64), torch.tensor([5, 0, 80])
    bound = cpu.bind(x, packed, wanted, "listed", -1, 0.0)
    for _ in range(2):
        assert torch.equal(bound(), ops.mlp(x, packed, wanted, backend="cpu"))
        x.add_(1)
