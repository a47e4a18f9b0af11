"""`make demo` on a tiny model: what it shows of each way of running is there."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import tiny

from coreskip.bench import demo
from coreskip.runtime.wrap import is_wrapped


def test_the_demo_shows_speed_perplexity_and_text_of_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], embedded: tuple[Any, Any]
) -> None:
    models = []

    def load_tiny(**options: Any) -> tuple[Any, Any]:
        models.append(tiny("llama", vocab_size=len(embedded[1])))
        return models[-1], embedded[1]

    monkeypatch.setattr(demo, "load", load_tiny)
    small = {"CHARACTERS": 12_000, "TOKENS": 512, "WINDOWS": 2, "NEW_TOKENS": 4, "ROUNDS": 1}
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)
    demo.main()
    shown = capsys.readouterr().out
    for name in ("transformers, float32", "transformers, bfloat16", "fastest within ppl+1%", "neurons left out"):
        assert shown.count(f"\n{name}") == 2, name  # in the table, and above its text
    assert shown.count("(+0.0 %)") >= 1
    lines = {line.split("  ")[0]: line for line in shown.splitlines() if "%" in line}
    assert lines["neurons left out"].rstrip().endswith("40%")
    assert "first token" in shown
    assert "done in" in shown
    assert not any(is_wrapped(model) for model in models)
