"""The README is short, and its Python runs from top to bottom as it is printed."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny

import coreskip
from coreskip.predictors.calibration import TokenText
from coreskip.runtime.wrap import is_wrapped

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_LINES = 150


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= MOST_LINES


def test_its_links_and_pictures_are_there() -> None:
    for document in ("README.md", "DESIGN.md", "bench/RESULTS.md"):
        path = ROOT / document
        links = re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text(encoding="utf-8"))
        assert links
        assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_files_that_design_names_for_additions_are_there() -> None:
    text = (ROOT / "DESIGN.md").read_text(encoding="utf-8")
    start = text.index("## Where to add")
    named = re.findall(
        r"`((?:kernels|predictors|runtime|bench|tests)/[a-z_0-9]+\.py)`", text[start : text.index("## The Plan")]
    )
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_its_python_runs_as_printed(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    embedded: tuple[Any, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a tiny model in the place of the embedded one, noise in the place of text that it would write, and little of
    it looked at."""
    model, tokenizer = tiny("llama", vocab_size=len(embedded[1])), embedded[1]
    noise = TokenText(torch.randint(5, 1000, (2500,)), torch.tensor([], dtype=torch.int64), "noise")
    monkeypatch.setattr(coreskip, "load", lambda: (model, tokenizer))
    small = {"tokens": 512, "windows": 2, "progress": False}
    monkeypatch.setattr(coreskip, "analyze", partial(coreskip.analyze, **small))
    for module in [module for name, module in sys.modules.items() if name.startswith("coreskip.")]:
        if hasattr(module, "sample_text"):
            monkeypatch.setattr(module, "sample_text", lambda *arguments, **options: noise)
    monkeypatch.setenv("CORESKIP_CACHE", str(tmp_path / "cache"))  # where text that a model wrote may be kept
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 4
    inputs = tokenizer("The lighthouse keeper wrote in his book that", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=48)
    found: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), found)
        assert not is_wrapped(model), f"left wrapped by:\n{block}"
        if "exact=True" in block:
            assert torch.equal(found["output"], expected)
    assert coreskip.Plan.load("smollm2.plan").recipe["budget"] == "ppl+1%"
    assert 0.6 <= found["plan"].keep <= 0.7
    assert capsys.readouterr().out
