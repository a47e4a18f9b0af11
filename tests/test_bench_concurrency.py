"""The bench of concurrent streams, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from byte_texts import Bytes, bytes_model
from click.testing import CliRunner

from coreskip.bench import concurrency
from coreskip.kernels.ops import available


class Tokenizer(Bytes):
    def __call__(self, texts: Any, **options: Any) -> Any:
        if isinstance(texts, str):
            return SimpleNamespace(input_ids=list(texts.encode()[:60]))
        return super().__call__(texts, **options)


@pytest.mark.skipif(available("cpu") is not None, reason="no kernel reads int4")
def test_streams_are_measured_and_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(concurrency, "load", lambda **options: (bytes_model(), Tokenizer()))
    rows = tmp_path / "rows.jsonl"
    asked = ["--rows", str(rows), "--streams", "1,6", "--tokens", "12", "--rounds", "2"]
    result = CliRunner().invoke(concurrency.main, asked, catch_exceptions=False)
    assert result.exit_code == 0
    one, six = map(json.loads, rows.read_text().splitlines())
    assert (one["streams"], six["streams"]) == (1, 6)
    assert one["same_as_alone"]
    assert six["same_as_alone"]
    assert one["times_the_first"] == 1
    assert six["times_the_first"] == pytest.approx(six["tok_s"] / one["tok_s"], abs=0.01)
    for row in (one, six):
        assert 0 < row["first_token_ms"]["p50"] <= row["first_token_ms"]["p95"]
        assert 0 < row["between_tokens_ms"]["p50"] <= row["between_tokens_ms"]["p95"]
        assert row["decode_tok_s"] > 0
        assert str(tmp_path) not in row["command"]
