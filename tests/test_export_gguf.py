"""Models under plans as GGUF files: read back by our own loader, and by llama.cpp where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_models import tokenizer as words
from tiny_models import plan_of, prompt, tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import coreskip
from coreskip import CoreskipError
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import Run, Skip
from coreskip.runtime.gguf_file import read_gguf

SIZE = 320  # of the vocabulary
TEXT = "The year 1987, isn't it?\n\n  Yes! It was the year of the ferry; the ferry came back empty. " * 4
SPECIAL = [AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")]
#: what differs from the tiny models elsewhere: what llama.cpp takes for granted
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_bias": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"attention_bias": True},  # which are zeros
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "olmo2": {},
    "starcoder2": {},
    "granite": {},
    "smollm3": {},
}


def tokenizer(*, pieces: bool = False, before: Any = None) -> Any:
    """Trained on a line of text: bytes, or pieces as SentencePiece has them."""
    if pieces:
        inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
        start = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=SIZE, special_tokens=start, show_progress=False)
    else:
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = before or pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
    inner.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def model_of(family: str) -> Any:
    model = tiny(family, vocab_size=SIZE, **SETTINGS.get(family, {}))
    if family == "qwen3":
        for name, parameter in model.named_parameters():
            parameter.data.mul_(not name.endswith("bias"))
    return model


def both(family: str, folder: Path, *, skips: bool = True, **options: Any) -> Any:
    """A GGUF file in `folder`, and the plain checkpoint of the same plan."""
    model = model_of(family)
    static = plan_of(model, "static", 0.7)
    last = Skip() if skips else Run()
    layers = [LayerPlan(layer.neurons, last if i == 2 else Run()) for i, layer in enumerate(static.layers)]
    plan = Plan(tuple(layers), static.model, static.recipe)
    coreskip.export(model, tokenizer(), folder / "hf", plan=plan, progress=False)
    coreskip.export(model, tokenizer(), folder / "gguf", plan=plan, to="gguf", progress=False, **options)
    return AutoModelForCausalLM.from_pretrained(folder / "hf").eval()


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("weights", ["float16", "float32"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "starcoder2"])
def test_our_own_loader_reads_it_back(family: str, weights: str, tmp_path: Path) -> None:
    plain = both(family, tmp_path, weights=weights)
    loaded, read = coreskip.load(tmp_path / "gguf", packed=False)
    assert loaded.config.num_hidden_layers == 2
    assert loaded.config.intermediate_size == 128  # 112, padded to whole blocks
    with torch.no_grad():
        least = {"float16": 5e-3, "float32": 1e-5}[weights]
        assert distance(loaded(prompt()).logits, plain(prompt()).logits) < least
    assert read(TEXT).input_ids == tokenizer()(TEXT).input_ids


@pytest.mark.parametrize(("weights", "steps"), [("q8_0", 254), ("q4_0", 14), ("q4_1", 28)])
def test_blocks_hold_near_numbers(weights: str, steps: int, tmp_path: Path) -> None:
    plain = both("llama", tmp_path, weights=weights)
    tensors = read_gguf(tmp_path / "gguf" / "model.gguf").tensors
    down = tensors["blk.1.ffn_down.weight"]
    assert down.kind == weights.upper()
    assert tensors["token_embd.weight"].kind == "Q8_0"
    found = torch.from_numpy(down.dequantised())[:, :112].unflatten(1, (-1, 16))
    wanted = plain.model.layers[1].mlp.down_proj.weight.detach().unflatten(1, (-1, 16))
    assert float((found - wanted).abs().max()) <= 2.1 * float(wanted.abs().max()) / steps


@pytest.mark.parametrize("weights", ["float16", "float32"])
@pytest.mark.parametrize("family", SETTINGS)
def test_llama_cpp_computes_the_same(family: str, weights: str, tmp_path: Path) -> None:
    """In float32 to float32's own rounding, where it holds keys and values so, too."""
    llama_cpp = pytest.importorskip("llama_cpp")
    plain, ids = both(family, tmp_path, skips=family != "gemma2", weights=weights), prompt(1, 24)
    file = str(tmp_path / "gguf" / "model.gguf")
    kinds = dict.fromkeys(("type_k", "type_v"), getattr(llama_cpp, f"GGML_TYPE_F{weights.removeprefix('float')}"))
    llama = llama_cpp.Llama(file, n_ctx=64, n_threads=1, logits_all=True, verbose=False, **kinds)
    try:
        llama.eval(ids[0].tolist())
        got = torch.from_numpy(np.array(llama.scores[:24]))
        with torch.no_grad():
            assert distance(got, plain(ids).logits[0]) < {"float16": 2e-2, "float32": 1e-3}[weights]
    finally:
        llama.close()


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "pieces"])
def test_llama_cpp_reads_texts_alike(kind: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    digits, ours = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    before = pre_tokenizers.Sequence([digits, ours]) if kind == "smollm" else None
    spoken = tokenizer(pieces=kind == "pieces", before=before)
    coreskip.export(model_of("llama"), spoken, tmp_path / "out", to="gguf", progress=False)
    llama = llama_cpp.Llama(str(tmp_path / "out" / "model.gguf"), vocab_only=True, verbose=False)
    try:
        for text in (TEXT, "Years: 2026; 1234567 ferries?\tNo.", "the ferry", "ünïcödé 語"):
            expected = spoken(text, add_special_tokens=False).input_ids
            assert llama.tokenize(text.encode(), add_bos=False) == expected
    finally:
        llama.close()


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("opt", {}, "'opt' models are not written as GGUF: llama, mistral"),
        ("mistral", {"sliding_window": 8}, "sliding windows that llama.cpp does not give them"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "attention is scaled otherwise"),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, "without rotary positions"),
        ("llama", {"hidden_act": "gelu"}, "its MLPs are not those of"),
        ("qwen3", {"attention_bias": True}, "has no biases of its q"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rotary positions are scaled",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise(family: str, change: Any, said: str, tmp_path: Path) -> None:
    model = tiny(family, vocab_size=SIZE, **{**SETTINGS.get(family, {}), **change})
    with pytest.raises(CoreskipError, match=said):
        coreskip.export(model, tokenizer(), tmp_path / "out", to="gguf", progress=False)
    assert not list(tmp_path.iterdir())


def test_tokenizers_without_a_form_there(tmp_path: Path) -> None:
    rules = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    for spoken, said in [(words(), "WordLevel, not BPE"), (tokenizer(before=rules), "split by rules that are none of")]:
        with pytest.raises(CoreskipError, match=said):
            coreskip.export(model_of("llama"), spoken, tmp_path / "out", to="gguf", progress=False)
    assert not list(tmp_path.iterdir())
