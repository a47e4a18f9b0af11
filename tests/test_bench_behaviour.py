"""The benchmark of behaviour runs from its texts to its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny_models import Spelled, tiny

from coreskip.bench import behaviour
from coreskip.bench.tables import fill_tables
from coreskip.predictors.calibration import TokenText


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = tiny("llama", max_position_embeddings=512)
    made.generation_config.eos_token_id = 3
    monkeypatch.setattr(behaviour, "load", lambda **options: (made, Spelled()))
    return made


def ran(command: str, file: Path, *options: str) -> list[dict[str, Any]]:
    result = CliRunner().invoke(behaviour.main, [command, "--rows", str(file), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(f"behaviour {command} --rows {file.name}" in row["command"] for row in rows)
    return rows


@pytest.mark.usefixtures("model")
def test_a_skill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = [way for way in behaviour._WAYS if way[1] == 0.03 and way[2] == 1.0]
    monkeypatch.setattr(behaviour, "_WAYS", [ways[0], *ways[-3:]])
    file = tmp_path / "behaviour.jsonl"
    rows = ran("skill", file, "--windows", "1", "--tokens", "1024", "--prompts", "24")
    assert [row["name"] for row in rows] == [
        "nothing switched off", "neuron_adjust", "pruning", "static", "random", "key_space",
    ]  # fmt: skip
    assert abs(rows[0]["code"]["increase"]) < 1e-4 < min(abs(row["code"]["increase"]) for row in rows[1:5])
    assert all(0 <= rows[-1][f"abstained_{kind}"] <= 1 for kind in ("code", "prose", "reference"))
    table = fill_tables("<!-- table: behaviour -->\n<!-- end table -->", tmp_path)
    assert "| neuron_adjust | 3.0% | difference | 1 |" in table
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1


@pytest.mark.usefixtures("model")
def test_steering(tmp_path: Path) -> None:
    rows = ran("steering", tmp_path / "steering.jsonl", "--windows", "1")
    unmoved = [row for row in rows if row["strength"] == 0]
    assert len(rows) == 36
    assert len({(row["good_share"], row["ppl"]) for row in unmoved}) == 1
    assert "| pca | the middle layer | +0.5 |" in fill_tables("<!-- table: steering --><!-- end table -->", tmp_path)


def test_texts_that_show_and_that_score_share_nothing() -> None:
    one, other = behaviour.source_code()
    assert min(len(one), len(other)) > 100_000
    assert not {line for line in one.splitlines() if line.startswith('"""')} & {
        line for line in other.splitlines() if line.startswith('"""') and len(line) > 30
    }
    text = TokenText(torch.arange(9999), torch.tensor([], dtype=torch.int64), "ids")
    found = behaviour.prompts(text, 50, 1)
    assert len({len(each.ids) for each in found}) > 20
    assert [each.ids.tolist() for each in found] == [each.ids.tolist() for each in behaviour.prompts(text, 50, 1)]
