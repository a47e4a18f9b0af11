"""Sources with holes: what is missing, too much or of another shape is one line, whatever kind of file it is in."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tiny_models import prompt, tiny
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from coreskip.cli import main
from coreskip.predictors.errors import CoreskipError
from coreskip.runtime import cache
from coreskip.runtime.load import load

Weights = dict[str, Tensor]
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny("llama").save_pretrained(folder)
    words = {f"w{i}": i for i in range(128)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def changed(folder: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(folder / FILE)
    change(weights)
    save_file(weights, folder / FILE, metadata={"format": "pt"})


def configured(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def cut(file: Path, share: float = 0.5) -> None:
    os.truncate(file, int(file.stat().st_size * share))


def refused(source: Path, *parts: str) -> None:
    with pytest.raises(CoreskipError) as caught:
        load(source, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    for part in (source.name, *parts):
        assert part in message, message


def without(*parts: str) -> Callable[[Weights], object]:
    return lambda weights: [weights.pop(name) for name in list(weights) if any(part in name for part in parts)]


def renamed(change: Callable[[str], str]) -> Callable[[Weights], object]:
    def rename(weights: Weights) -> None:
        before = dict(weights)
        weights.clear()
        weights.update({change(name): tensor for name, tensor in before.items()})

    return rename


def another_layer(weights: Weights) -> None:
    weights.update({k.replace("layers.2", "layers.3"): v.clone() for k, v in weights.items() if "layers.2" in k})


MLP = "model.layers.{}.mlp.{}_proj.weight"
FAULTS: list[tuple[str, Callable[[Weights], object], tuple[str, ...]]] = [
    ("two MLPs", without("1.mlp", "2.mlp"), ("no weights for model.layers.1.mlp.down_proj.weight and 5 more",)),
    ("a norm", without("model.norm"), ("no weights for model.norm.weight:",)),
    ("the head", without("lm_head"), ("no weights for lm_head.weight:",)),
    ("the embeddings", without("embed"), ("no weights for model.embed_tokens.weight:",)),
    ("a bias", lambda w: w.update({"model.layers.0.mlp.gate_proj.bias": torch.ones(160)}), ("no place for", "bias:")),
    ("a bias of the head", lambda w: w.update({"lm_head.bias": torch.ones(128)}), ("no place for lm_head.bias",)),
    ("a norm of queries", lambda w: w.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}), ("q_norm",)),
    ("an adapter", lambda w: w.update({"model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 64)}), ("lora_A",)),
    ("scales", lambda w: w.update({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}), ("weight_scale",)),
    ("positions", lambda w: w.update({"model.embed_positions.weight": torch.ones(9, 64)}), ("embed_positions",)),
    ("a layer", another_layer, ("no place for model.layers.3.input_layernorm.weight and 8 more",)),
    ("a shape", lambda w: w.update({MLP.format(0, "up"): torch.ones(100, 64)}), ("(100 x 64 instead of 160 x 64)",)),
    ("a prefix", renamed("_orig_mod.{}".format), ("no weights for", "no place for _orig_mod.")),
]


@pytest.mark.parametrize(("change", "parts"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_weights_that_do_not_fit(folder: Path, change: Any, parts: tuple[str, ...]) -> None:
    changed(folder, change)
    refused(folder, "are not those of the LlamaForCausalLM", *parts)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
        lambda w: w.update({"model.rotary_emb.inv_freq": torch.ones(8)}),
        lambda w: w.update({"v_head.summary.weight": torch.ones(1, 64)}),
        lambda w: w.update({"model.vision_tower.layers.0.mlp.weight": torch.ones(8, 8)}),
        lambda w: w.update({"multi_modal_projector.linear.weight": torch.ones(8, 8)}),
        lambda w: w.update({"mtp.layers.0.mlp.weight": torch.ones(8, 8)}),
        renamed(lambda name: name.removeprefix("model.")),
    ],
    ids=["old inv_freq", "inv_freq", "value head", "vision tower", "projector", "multi-token prediction", "base model"],
)
def test_what_may_be_left_over(folder: Path, change: Any) -> None:
    changed(folder, change)
    model, _ = load(folder, device="cpu")
    with torch.no_grad():
        assert torch.equal(model(prompt()).logits, tiny("llama")(prompt()).logits)


def test_tied_heads_and_old_masks_are_whole(folder: Path, tmp_path: Path) -> None:
    for family, options in (("gemma", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("gpt_neox", {})):
        place = tmp_path / family
        model = tiny(family, **options)
        model.save_pretrained(place)
        for file in folder.glob("token*"):
            shutil.copy(file, place)
        if family == "gpt2":
            changed(place, lambda w: w.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 256, 256)}))
        if family == "gpt_neox":
            changed(place, lambda w: w.update({"gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)}))
        loaded, _ = load(place, device="cpu")
        with torch.no_grad():
            assert torch.equal(loaded(prompt()).logits, model(prompt()).logits)


def test_the_configuration_tells_how_many_layers(folder: Path) -> None:
    configured(folder, num_hidden_layers=4)
    refused(folder, "no weights for model.layers.3.input_layernorm.weight and 8 more")
    configured(folder, num_hidden_layers=2)
    refused(folder, "no place for model.layers.2.input_layernorm.weight and 8 more")


def test_damaged_folders(folder: Path) -> None:
    for file, part in ((FILE, "cannot load"), ("config.json", "cannot load"), ("tokenizer.json", "the tokenizer of")):
        data = (folder / file).read_bytes()
        cut(folder / file)
        refused(folder, part)
        (folder / file).write_bytes(data)
    for file in folder.glob("token*"):
        file.unlink()
    refused(folder, "the tokenizer of")
    (folder / FILE).unlink()
    refused(folder, "cannot load")


def sharded(folder: Path) -> list[Path]:
    (folder / FILE).unlink(missing_ok=True)
    tiny("llama").save_pretrained(folder, max_shard_size="200KB")
    return sorted(folder.glob("*-of-*.safetensors"))


def test_shards(folder: Path) -> None:
    assert len(sharded(folder)) > 2
    load(folder, device="cpu")
    cut(sharded(folder)[-1])
    refused(folder, "cannot load")
    shards = sharded(folder)
    shutil.copy(shards[0], shards[-1])  # one in another's place
    refused(folder, "no weights for")
    sharded(folder)[1].unlink()
    refused(folder, "No such file")
    sharded(folder)
    index = folder / f"{FILE}.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.norm.weight"] = "absent.safetensors"
    index.write_text(json.dumps(table))
    refused(folder, "absent.safetensors")
    cut(index)
    refused(folder, "cannot load")


def test_pickled_weights(folder: Path) -> None:
    weights, file = load_file(folder / FILE), folder / "pytorch_model.bin"
    (folder / FILE).unlink()
    torch.save(weights, file)
    load(folder, device="cpu")
    torch.save({name: tensor for name, tensor in weights.items() if "1.mlp.up" not in name}, file)
    refused(folder, "no weights for model.layers.1.mlp.up_proj.weight")
    cut(file)
    refused(folder, "cannot load")


def test_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(folder, without("1.mlp"))
    with pytest.raises(SystemExit) as caught:
        main(["generate", str(folder), "-p", "w5 w6", "--max-new-tokens", "2"])
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert err.strip().splitlines()[-1].startswith("coreskip: the weights in")


# --- GGUF

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.layers.": "blk.",
}  # fmt: skip


def write_gguf(path: Path, change: Callable[[dict[str, Any]], object] = lambda tensors: None, layers: int = 3) -> Path:
    model = tiny("llama")
    tensors: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        tensors[name] = tensor.numpy()
    change(tensors)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(160)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(128)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", *(f"w{i}" for i in range(125))])
    writer.add_token_types([gguf.TokenType.NORMAL] * 128)
    writer.add_token_merges(["a b"])
    for name, array in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(write_gguf(tmp_path / "whole.gguf"), device="cpu")
    one = np.ones(160, np.float32)
    for name, change, parts in (
        ("missing", lambda t: t.pop("blk.1.ffn_up.weight"), ("no weights for model.layers.1.mlp.up_proj.weight",)),
        ("norm", lambda t: t.pop("output_norm.weight"), ("no weights for model.norm.weight",)),
        ("bias", lambda t: t.update({"blk.0.ffn_gate.bias": one}), ("no place for blk.0.ffn_gate.bias",)),
        ("layer", lambda t: t.update({"blk.3.ffn_norm.weight": one[:64]}), ("no place for blk.3.ffn_norm.weight",)),
        ("shape", lambda t: t.update({"blk.0.ffn_up.weight": np.ones((100, 64), np.float32)}), ("100 x 64 instead",)),
    ):
        refused(write_gguf(tmp_path / f"{name}.gguf", change), *parts)
    refused(write_gguf(tmp_path / "fewer.gguf", layers=4), "no weights for model.layers.3.")
    for share in (0.99, 0.5, 0.01):
        cut(write_gguf(tmp_path / "cut.gguf"), share)
        refused(tmp_path / "cut.gguf", "cannot load")
    (tmp_path / "cut.gguf").write_bytes(b"not it")
    refused(tmp_path / "cut.gguf", "not a GGUF file")
    factors = {"rope_freqs.weight": np.full(8, 2, np.float32)}
    with caplog.at_level(logging.WARNING, logger="coreskip"):
        load(write_gguf(tmp_path / "scaled.gguf", lambda t: t.update(factors)), device="cpu")
    assert "scales its rotary frequencies" in caplog.text


# --- the cache of the embedded model


class Source:
    """Stands for the embedded model: a GGUF file whose dequantising is counted."""

    def __init__(self, whole: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.whole, self.reads, self.cache = whole, 0, folder / "cache"
        self.gguf = folder / "tiny.gguf"
        self.gguf.write_bytes(b"GGUF")
        monkeypatch.setenv("CORESKIP_CACHE", str(self.cache))

    def read(self, gguf: Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
        self.reads += 1
        return load(self.whole, dtype=dtype, device="cpu")

    def load(self) -> Tensor:
        model, _ = cache.load_cached(
            self.gguf, None, self.read, lambda folder, dtype: load(folder, dtype=dtype, device="cpu")
        )
        return model(prompt()).logits

    @property
    def folder(self) -> Path:
        (found,) = (path for path in self.cache.iterdir() if not path.name.startswith("."))
        return found


@pytest.fixture
def source(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    return Source(whole, tmp_path, monkeypatch)


@torch.no_grad()
def test_a_damaged_cache_heals(source: Source) -> None:
    expected = source.load()
    source.load()
    assert source.reads == 1
    for number, file in enumerate((FILE, "config.json", "tokenizer.json", "sizes.json"), 2):
        cut(source.folder / file)
        assert torch.equal(source.load(), expected)
        assert source.reads == number
        source.load()
        assert source.reads == number
    (source.folder / FILE).unlink()
    assert torch.equal(source.load(), expected)
    data = bytearray((source.folder / FILE).read_bytes())
    data[:100] = bytes(100)  # as long as before
    (source.folder / FILE).write_bytes(data)
    assert torch.equal(source.load(), expected)
    assert source.reads == 7
    assert len(list(source.cache.iterdir())) == 1


@torch.no_grad()
def test_drafts_of_killed_fills_go(source: Source) -> None:
    source.load()
    draft = source.cache / f".{source.folder.name}.01234567.draft"
    draft.mkdir()
    (draft / FILE).write_bytes(b"half")
    source.load()
    assert not draft.exists()
    assert source.reads == 1


@torch.no_grad()
def test_two_fills_at_once(source: Source) -> None:
    """The second finds the first one's folder in its place when it is done."""
    read = source.read

    def slowly(gguf: Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
        if source.reads == 0:
            source.reads += 1
            source.load()  # the other process
        return read(gguf, dtype)

    source.read = slowly  # type: ignore[method-assign]
    source.load()
    source.load()
    assert source.reads == 3
    assert len(list(source.cache.iterdir())) == 1


@torch.no_grad()
def test_a_cache_that_cannot_be_written_is_named(source: Source, caplog: pytest.LogCaptureFixture) -> None:
    source.cache.write_text("a file")
    with caplog.at_level(logging.WARNING, logger="coreskip"):
        source.load()
    assert f"cannot cache the dequantised model in {source.cache}" in caplog.text
    assert "CORESKIP_CACHE" in caplog.text
