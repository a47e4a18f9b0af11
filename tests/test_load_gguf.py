"""GGUF files run as they are: the tokens of the dequantised model, from as many bytes as the file has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import HIDDEN, TOKENS, write_llama
from tiny_models import greedy

import coreskip
from coreskip import CoreskipError, Plan
from coreskip.kernels import ops
from coreskip.runtime.cost import bytes_per_token
from coreskip.runtime.packed_layer import PackedLayer, packed_layers, packed_modules
from coreskip.runtime.wrap import runtime_of

NO_LIBRARY = ops.available("cpu")
pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16")
NAMES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "output", "token_embd")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORESKIP_CACHE", str(tmp_path / "cache"))


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, TOKENS, (1, 3 + i), generator=generator) for i in range(20)]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_the_dequantised_model(kind: str, tmp_path: Path) -> None:
    file = write_llama(tmp_path / "m.gguf", dict.fromkeys(NAMES, kind))
    plain, _ = coreskip.load(file, packed=False)
    assert not packed_modules(plain)
    for turn in range(2):  # from the file, and from the cache
        model, tokenizer = coreskip.load(file)
        assert len(tokenizer) >= TOKENS
        assert len(packed_modules(model)) == 2 * 7 + 2
        with torch.no_grad():
            ids = prompts()[turn]
            torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
        with coreskip.wrap(model):
            for ids in prompts()[: 20 if turn else 3]:
                assert torch.equal(greedy(model, ids, 64), greedy(plain, ids, 64))
            assert runtime_of(model).steps.native.refusal is None
        with coreskip.wrap(model, Plan.dense(model, "packed")):  # with inputs in 8 bits
            assert 3 < greedy(model, prompts()[0], 8).shape[1] <= 3 + 8  # perhaps it ends


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_per_token_are_the_files_own(kind: str, tmp_path: Path) -> None:
    model, _ = coreskip.load(write_llama(tmp_path / "m.gguf", dict.fromkeys(NAMES, kind)))
    size = {"F16": 2, "BF16": 2, "Q4_0": 18 / 32, "Q4_1": 20 / 32, "Q5_0": 22 / 32, "Q5_1": 24 / 32, "Q8_0": 34 / 32}
    size |= {"Q4_K": 144 / 256, "Q5_K": 176 / 256, "Q6_K": 210 / 256}
    numbers = sum(layer.weight.numel() for _, layer in packed_layers(model))
    norms = 4 * 5 * HIDDEN
    # a vocabulary of 60 is filled up to tiles of 16 rows, one of real models hardly
    filled = model.get_output_embeddings().weight.numel() * size[kind] * (4 / 60 if kind not in ("F16", "BF16") else 0)
    found = bytes_per_token(model, Plan.dense(model)) - filled
    assert found <= 1.05 * (numbers * size[kind] + norms) + HIDDEN * 4
    assert found >= 0.95 * numbers * size[kind]


def test_a_mixed_file_with_a_tied_head(tmp_path: Path) -> None:
    kinds = {"attn_q": "Q4_K", "attn_k": "Q4_K", "attn_v": "Q6_K", "attn_output": "Q5_K", "ffn_gate": "Q4_K"}
    kinds |= {"ffn_up": "Q5_0", "ffn_down": "Q2_K", "token_embd": "Q6_K"}
    file = write_llama(tmp_path / "m.gguf", kinds, tied=True)
    plain, _ = coreskip.load(file, packed=False)
    for _ in range(2):
        model, _ = coreskip.load(file)
        head: Any = model.get_output_embeddings()
        assert isinstance(head, PackedLayer)
        assert head.parts()[0].weight.data_ptr() == model.get_input_embeddings().part().weight.data_ptr()
        with coreskip.wrap(model, exact=True):
            for ids in prompts()[:4]:
                assert torch.equal(greedy(model, ids, 40), greedy(plain, ids, 40))
    half = coreskip.load(file, dtype="bfloat16")[0]
    with coreskip.wrap(half):
        assert greedy(half, prompts()[0], 8).shape[1] > 3


def test_another_file_of_the_name_is_read_anew(tmp_path: Path) -> None:
    file = write_llama(tmp_path / "m.gguf", dict.fromkeys(NAMES, "Q4_0"))
    first = greedy(coreskip.load(file)[0], prompts()[3], 30)
    write_llama(file, dict.fromkeys(NAMES, "Q5_1"))
    second, _ = coreskip.load(file)
    assert {fmt for _, layer in packed_layers(second) for fmt in layer.formats} == {"int5"}
    assert not torch.equal(first, greedy(second, prompts()[3], 30))


def test_a_spoilt_cache_is_made_anew(tmp_path: Path) -> None:
    file = write_llama(tmp_path / "m.gguf", dict.fromkeys(NAMES, "Q8_0"))
    text = greedy(coreskip.load(file)[0], prompts()[3], 10)
    (weights,) = (tmp_path / "cache").glob("*/weights.bin")
    weights.write_bytes(weights.read_bytes()[:-8])
    assert torch.equal(greedy(coreskip.load(file)[0], prompts()[3], 10), text)
    assert torch.equal(greedy(coreskip.load(file)[0], prompts()[3], 10), text)


def test_without_a_place_for_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CORESKIP_CACHE", str(tmp_path / "file" / "cache"))
    model, _ = coreskip.load(write_llama(tmp_path / "m.gguf", dict.fromkeys(NAMES, "Q8_0")))
    assert greedy(model, prompts()[0], 3).shape == (1, 6)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(10))
    with pytest.raises(CoreskipError) as caught:
        coreskip.load(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)
