"""The text that a model writes for its own calibration: on the fast path, once, and the same from the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import packed
from tiny_models import NoTokenizer, tiny

import coreskip
from coreskip.predictors.calibration import TokenText, sample_text
from coreskip.runtime import calibration_text
from coreskip.runtime.calibration_text import model_text
from coreskip.runtime.wrap import is_wrapped


@pytest.fixture
def sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the model was wrapped, for each time that text was sampled; the cache is an empty folder."""
    calls: list[bool] = []

    def counted(model: Any, *args: Any, **options: Any) -> TokenText:
        calls.append(is_wrapped(model))
        return sample_text(model, *args, **options)

    monkeypatch.setattr(calibration_text, "sample_text", counted)
    monkeypatch.setenv("CORESKIP_CACHE", str(tmp_path))
    return calls


def written(model: Any, seed: int = 0) -> TokenText:
    return model_text(model, NoTokenizer(), tokens=64, length=32, seed=seed, progress=False)


def test_text_is_sampled_once_on_the_fast_path(llama: Any, sampled: list[bool], tmp_path: Path) -> None:
    one = written(llama)
    two = written(llama)
    assert sampled == [True]
    assert not is_wrapped(llama)
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(one.prefix, two.prefix)
    assert one.source == two.source == "sampled from the model, seed 0"
    assert len(one.ids) == 64
    next(tmp_path.glob("texts/*.json")).unlink()
    assert torch.equal(written(llama).ids, one.ids)
    assert sampled == [True, True]


def test_another_model_seed_or_length_is_another_text(llama: Any, sampled: list[bool]) -> None:
    first = written(llama)
    assert not torch.equal(written(llama, seed=1).ids, first.ids)
    with torch.no_grad():
        llama.lm_head.weight[7, 3] += 1e-3  # no plan's fingerprint sees it
    written(llama)
    written(tiny("llama", seed=1))
    model_text(llama, NoTokenizer(), tokens=64, length=16, seed=0, progress=False)
    assert len(sampled) == 5


@pytest.mark.parametrize("damage", ["{", "[]", '{"key": 1}', "changed", "\x00"])
def test_a_damaged_cache_heals(llama: Any, sampled: list[bool], tmp_path: Path, damage: str) -> None:
    first = written(llama)
    file = next(tmp_path.glob("texts/*.json"))
    whole = file.read_text()
    if damage == "changed":
        document = json.loads(whole)
        document["ids"][0] += 1
        damage = json.dumps(document)
    file.write_text(damage)
    assert torch.equal(written(llama).ids, first.ids)
    assert len(sampled) == 2
    assert file.read_text() == whole


def test_what_cannot_be_wrapped_or_kept_is_sampled_all_the_same(
    llama: Any, sampled: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = written(llama)
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("CORESKIP_CACHE", str(tmp_path / "a file"))
    assert torch.equal(written(llama).ids, first.ids)
    llama.model.layers[0].mlp._hf_hook = object()  # as accelerate leaves it: `wrap` refuses
    written(llama, seed=1)
    assert sampled == [True, True, False]


def test_the_cache_keeps_the_last_texts(
    llama: Any, sampled: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_text, "_MOST", 2)
    for seed in range(4):
        written(llama, seed)
    assert len(list(tmp_path.glob("texts/*.json"))) == 2


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_packed_models_text(family: str, sampled: list[bool], tmp_path: Path) -> None:
    """Its parameters hold no numbers: another model's text would be the same to the cache, or there were none."""
    one, two = (packed(tiny(family, seed=seed), tmp_path / f"{seed}", weights="int4") for seed in (0, 1))
    first = written(one)
    assert torch.equal(written(coreskip.load(tmp_path / "0")[0]).ids, first.ids)
    assert len(sampled) == 1
    assert not torch.equal(written(two).ids, first.ids)
