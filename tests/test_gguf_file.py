"""GGUF files: read, refused in one line, and turned into the weights, configuration and tokenizer of transformers."""

from __future__ import annotations

import logging
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import LAYERS, TOKENS, write_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import modeling_gguf_pytorch_utils as tables

from coreskip.kernels import cpu, ops
from coreskip.kernels.groups import OF_GGUF
from coreskip.kernels.packed import PackedLinear
from coreskip.predictors.errors import CoreskipError
from coreskip.runtime.gguf_file import GgufFile, read_gguf
from coreskip.runtime.gguf_state import config_of, load_state, tokenizer_of
from coreskip.runtime.load import embedded_gguf

NO_LIBRARY = ops.available("cpu")
needs_library = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))
MIXED = {"attn_q": "Q4_K", "attn_k": "Q5_0", "attn_v": "Q6_K", "attn_output": "Q5_K", "ffn_gate": "Q4_0"}
MIXED |= {"ffn_up": "Q5_1", "ffn_down": "Q8_0", "token_embd": "Q4_1", "output": "Q6_K"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("gguf") / "mixed.gguf", MIXED)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of metadata, and two tensors."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_uint8("a.uint8", 200)
    writer.add_int8("a.int8", -3)
    writer.add_uint16("a.uint16", 60000)
    writer.add_int16("a.int16", -300)
    writer.add_uint32("a.uint32", 4_000_000_000)
    writer.add_int32("a.int32", -5)
    writer.add_uint64("a.uint64", 1 << 60)
    writer.add_int64("a.int64", -(1 << 50))
    writer.add_float32("a.float32", 0.5)
    writer.add_float64("a.float64", 1e-300)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "größer")
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.floats", [0.25, -1.0])
    writer.add_array("a.truths", [True, False])
    writer.add_array("a.strings", ["", "ab", "ç"])
    writer.add_array("a.one", ["x"])
    writer.add_custom_alignment(64)
    writer.add_tensor("first", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("second", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---- reading -------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read(small: Path) -> None:
    file = read_gguf(small)
    assert file.version == 3
    assert file.architecture == "llama"
    expected = {"uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 4_000_000_000, "int32": -5}
    expected |= {"uint64": 1 << 60, "int64": -(1 << 50), "float32": 0.5, "float64": 1e-300, "bool": True}
    expected |= {"string": "größer", "numbers": [1, 2, 3], "floats": [0.25, -1.0], "truths": [True, False]}
    expected |= {"strings": ["", "ab", "ç"], "one": ["x"]}
    assert {key[2:]: value for key, value in file.metadata.items() if key.startswith("a.")} == expected
    first, second = file.tensors.values()
    assert (first.name, first.shape, first.kind, first.raw.shape) == ("first", (2, 3), "F32", (2, 12))
    assert torch.equal(first.floats(), torch.arange(6.0).view(2, 3))
    assert torch.equal(second.floats(), torch.arange(5.0).half())
    assert np.array_equal(second.dequantised(), np.arange(5.0))
    assert str(file.path) in repr(file)
    assert "2x3" in repr(first)


def test_tensors_lie_in_the_file(mixed: Path) -> None:
    tensors, expected = read_gguf(mixed).tensors, gguf.GGUFReader(str(mixed)).tensors
    assert list(tensors) == [t.name for t in expected]
    for there in expected:
        here = tensors[there.name]
        assert (here.kind, list(here.shape)) == (there.tensor_type.name, there.shape.tolist()[::-1])
        assert np.array_equal(here.raw.numpy().ravel(), there.data.view(np.uint8).ravel())


def test_the_second_version_is_read(small: Path, tmp_path: Path) -> None:
    data = bytearray(small.read_bytes())
    data[4:8] = struct.pack("<I", 2)
    assert read_gguf(written(tmp_path, data)).metadata == read_gguf(small).metadata


# ---- files that are refused ----------------------------------------------------------------------------------------


def written(folder: Path, data: bytes | bytearray) -> Path:
    path = folder / "bad.gguf"
    path.write_bytes(bytes(data))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CoreskipError) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def header(version: int = 3, tensors: int = 0, fields: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + rest


def string(text: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if size is None else size) + text


def field(kind: int, value: bytes, key: bytes = b"key") -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(kind: int = 0, shape: tuple[int, ...] = (32,), offset: int = 0, name: bytes = b"w") -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + dimensions + struct.pack("<IQ", kind, offset)


ROOM = bytes(4096)
REFUSED = {
    "": "not a GGUF file",
    "mark": "not a GGUF file",
    "version 1": "version 1",
    "version 4": "version 4",
    "big-endian": "big-endian",
    "tensors": "cannot hold 4611686018427387904 tensors",
    "fields": "cannot hold 9223372036854775807 metadata fields",
    "key": "cut short",
    "string": "cut short",
    "not UTF-8": "not UTF-8",
    "array": "cannot hold 2305843009213693952 numbers",
    "strings": "cannot hold 1152921504606846976 strings",
    "string in array": "cut short",
    "string in array not UTF-8": "not UTF-8",
    "value type": "unknown type 13",
    "array type": "unknown type 77",
    "arrays in arrays": "unknown type 9",
    "twice": "'key' twice",
    "alignment 0": "alignment is 0",
    "alignment 3": "alignment is 3",
    "alignment text": "alignment is 'x'",
    "tensor type": "type 99",
    "tensor type removed": "type 4",
    "dimensions": "5 dimensions",
    "empty": "cannot be",
    "width": "which Q4_0 cannot be",
    "offset": "ends beyond",
    "absurd offset": "ends beyond",
    "absurd shape": "ends beyond",
    "tensor twice": "the tensor 'w' twice",
}
BYTES = {
    "": b"",
    "mark": b"GGML" + ROOM,
    "version 1": header(1) + ROOM,
    "version 4": header(4) + ROOM,
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + ROOM,
    "tensors": header(tensors=1 << 62) + ROOM,
    "fields": header(fields=(1 << 63) - 1) + ROOM,
    "key": header(fields=1) + string(b"", 1 << 63) + ROOM,
    "string": header(fields=1) + field(8, string(b"", 5000)) + ROOM,
    "not UTF-8": header(fields=1) + field(8, string(b"\xff\xfe")) + ROOM,
    "array": header(fields=1) + field(9, struct.pack("<IQ", 4, 1 << 61)) + ROOM,
    "strings": header(fields=1) + field(9, struct.pack("<IQ", 8, 1 << 60)) + ROOM,
    "string in array": header(fields=1) + field(9, struct.pack("<IQ", 8, 1) + string(b"", (1 << 64) - 1)) + ROOM,
    "string in array not UTF-8": header(fields=1) + field(9, struct.pack("<IQ", 8, 1) + string(b"\xc3\x28")) + ROOM,
    "value type": header(fields=1) + field(13, b"") + ROOM,
    "array type": header(fields=1) + field(9, struct.pack("<IQ", 77, 1)) + ROOM,
    "arrays in arrays": header(fields=1) + field(9, struct.pack("<IQ", 9, 1) * 9) + ROOM,
    "twice": header(fields=2) + 2 * field(0, b"1") + ROOM,
    "alignment 0": header(fields=1) + field(4, struct.pack("<I", 0), b"general.alignment") + ROOM,
    "alignment 3": header(fields=1) + field(4, struct.pack("<I", 3), b"general.alignment") + ROOM,
    "alignment text": header(fields=1) + field(8, string(b"x"), b"general.alignment") + ROOM,
    "tensor type": header(tensors=1) + tensor(99) + ROOM,
    "tensor type removed": header(tensors=1) + tensor(4) + ROOM,
    "dimensions": header(tensors=1) + tensor(shape=(1, 1, 1, 1, 1)) + ROOM,
    "empty": header(tensors=1) + tensor(shape=(32, 0)) + ROOM,
    "width": header(tensors=1) + tensor(2, (33,)) + ROOM,
    "offset": header(tensors=1) + tensor(offset=4096) + ROOM,
    "absurd offset": header(tensors=1) + tensor(offset=(1 << 64) - 32) + ROOM,
    "absurd shape": header(tensors=1) + tensor(shape=((1 << 63),) * 4) + ROOM,
    "tensor twice": header(tensors=2) + tensor() + tensor() + ROOM,
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_wrong_is_said_in_one_line(fault: str, tmp_path: Path) -> None:
    assert REFUSED[fault] in refusal(written(tmp_path, BYTES[fault]))


def test_a_file_that_is_not_there_or_no_file(tmp_path: Path) -> None:
    refusal(tmp_path / "nothing.gguf")
    refusal(tmp_path)


def test_a_file_cut_short_anywhere(small: Path, tmp_path: Path) -> None:
    data = small.read_bytes()
    end = data.rindex(np.arange(5, dtype=np.float16).tobytes()) + 10  # padding may be missing
    for size in [*range(0, len(data) - 300, 7), *range(len(data) - 300, end)]:
        assert "bad.gguf" in refusal(written(tmp_path, data[:size]))
    assert read_gguf(written(tmp_path, data[:end])).tensors


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_header_is_read_or_refused(small: Path, tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(small.read_bytes())
    for at, byte in changes:
        data[at % len(data)] = byte
    read_or_refused(written(tmp_path, data))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rest=st.binary(max_size=400), counts=st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_whatever_follows_the_mark(tmp_path: Path, rest: bytes, counts: tuple[int, int]) -> None:
    read_or_refused(written(tmp_path, header(3, *counts, rest)))


def read_or_refused(path: Path) -> None:
    refused = ""
    try:
        for found in read_gguf(path).tensors.values():
            found.raw.sum()
    except CoreskipError as error:
        refused = str(error)
    assert "\n" not in refused


# ---- as transformers has it ----------------------------------------------------------------------------------------


def of_transformers(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)


def floats_of(weight: PackedLinear | Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    return cpu.untile(weight, torch.empty(weight.out_features, weight.in_features))


def check_state(file: GgufFile, expected: dict[str, Tensor], *, tied: bool = False) -> dict[str, PackedLinear | Tensor]:
    """Everything has the very numbers that transformers loads, and nothing is missing."""
    state = load_state(file, config_of(file))
    assert set(expected) - set(state) == ({"lm_head.weight"} if tied else set())
    assert not set(state) - set(expected)
    for name, weight in state.items():
        assert torch.equal(floats_of(weight).float(), expected[name]), name
    return state


@needs_library
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_that_transformers_loads(mixed: Path, tmp_path: Path, tied: bool) -> None:
    path = write_llama(tmp_path / "tied.gguf", MIXED, tied=True) if tied else mixed
    state = check_state(read_gguf(path), of_transformers(path).state_dict(), tied=tied)
    formats = {name.split(".")[-2]: w.fmt for name, w in state.items() if isinstance(w, PackedLinear)}
    assert formats["q_proj"] == OF_GGUF["Q4_K"]  # whose rows lie in another order in the file
    assert formats["down_proj"] == OF_GGUF["Q8_0"]
    assert formats["embed_tokens"] == OF_GGUF["Q4_1"]
    assert len(formats) == 8 + (not tied)
    assert all(w.whole for w in state.values() if isinstance(w, PackedLinear))


@needs_library
def test_plain_floats_stay_what_they_are(tmp_path: Path) -> None:
    kinds = {"attn_q": "F16", "attn_k": "BF16", "attn_v": "F32", "ffn_up": "F16"}
    path = write_llama(tmp_path / "floats.gguf", kinds)
    state = check_state(read_gguf(path), of_transformers(path).state_dict())
    attention = "model.layers.1.self_attn"
    assert [state[f"{attention}.{n}_proj.weight"].dtype for n in "qkv"] == [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    assert not any(isinstance(w, PackedLinear) for w in state.values())


@needs_library
def test_other_types_are_held_in_float32_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_llama(tmp_path / "other.gguf", {"ffn_down": "Q2_K", "ffn_up": "Q4_K"})
    with caplog.at_level(logging.WARNING, "coreskip"):
        state = check_state(read_gguf(path), of_transformers(path).state_dict())
    assert [r for r in caplog.messages if "Q2_K" in r and "float32" in r and "Q4_K" not in r]
    for i in range(LAYERS):
        assert isinstance(state[f"model.layers.{i}.mlp.up_proj.weight"], PackedLinear)
        assert isinstance(state[f"model.layers.{i}.mlp.down_proj.weight"], Tensor)


@needs_library
def test_a_model_without_memory_tells_the_names(mixed: Path) -> None:
    file = read_gguf(mixed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(file))
    state = load_state(file, model, whole=False)
    assert set(state) == set(model.state_dict())
    assert not any(w.whole for w in state.values() if isinstance(w, PackedLinear))


def test_unknown_architectures_are_refused_in_one_line(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "odd.gguf", {}, arch="odd")
    for read in (config_of, tokenizer_of, lambda file: load_state(file, AutoConfig.for_model("llama"))):
        with pytest.raises(CoreskipError) as caught:
            read(read_gguf(path))
        assert "\n" not in str(caught.value)
        assert "odd" in str(caught.value)
    nameless = written(tmp_path, header() + ROOM)
    with pytest.raises(CoreskipError, match="architecture"):
        load_state(read_gguf(nameless), AutoConfig.for_model("llama"))


@pytest.mark.parametrize("which", ["embedded", "mixed"])
def test_configuration_and_tokenizer_are_those_of_transformers(which: str, mixed: Path) -> None:
    path = embedded_gguf() if which == "embedded" else mixed
    file, source = read_gguf(path), {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    config, expected = config_of(file), AutoConfig.from_pretrained(**source)
    assert type(config) is type(expected)
    assert config.to_dict() == expected.to_dict()
    if which == "mixed":
        assert config.vocab_size == TOKENS
    tokenizer, expected = tokenizer_of(file), AutoTokenizer.from_pretrained(**source)
    assert type(tokenizer) is type(expected)
    assert tokenizer.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert tokenizer.special_tokens_map == expected.special_tokens_map
    assert tokenizer.chat_template == expected.chat_template
    assert tokenizer("ab !").input_ids == expected("ab !").input_ids


@needs_library
def test_the_embedded_models_matrices_are_the_files(embedded: tuple[Any, Any]) -> None:
    model, _ = embedded
    file = read_gguf(embedded_gguf())
    state = check_state(file, model.state_dict(), tied=True)
    packed = [w for w in state.values() if isinstance(w, PackedLinear)]
    assert sum(w.nbytes for w in packed) == sum(t.raw.numel() for t in file.tensors.values() if len(t.shape) == 2)


class _Transposing(tables.TensorProcessor):
    def process(self, weights: Any, name: str, **options: Any) -> Any:
        return tables.GGUFTensor(weights.T if "attn_output" in name else weights, name, {})


class _Subtracting(tables.TensorProcessor):
    def process(self, weights: Any, name: str, **options: Any) -> Any:
        return tables.GGUFTensor(weights - 1 if "norm" in name or "ffn_up" in name else weights, name, {})


class _Naming(tables.TensorProcessor):
    """As of experts and of GPT-2's head: the tensor goes by a name of its own."""

    def process(self, weights: Any, name: str, **options: Any) -> Any:
        if name != "output.weight":
            return tables.GGUFTensor(weights, name, {})
        options["parsed_parameters"]["tensors"]["lm_head.weight"] = torch.from_numpy(np.copy(weights))
        return tables.GGUFTensor(weights, None, {})


class _Choosy(tables.TensorProcessor):
    """As Bloom's: wants whole rows."""

    def process(self, weights: Any, name: str, **options: Any) -> Any:
        if "attn_k" in name:
            weights = weights.reshape(2, 64, 256)[::-1].reshape(128, 256)
        return tables.GGUFTensor(weights, name, {})


@needs_library
@pytest.mark.parametrize("processor", [_Transposing, _Subtracting, _Naming, _Choosy])
def test_whatever_is_done_to_weights_is_done(
    processor: type, mixed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(tables.TENSOR_PROCESSORS, "llama", processor)
    file = read_gguf(mixed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(file))
    expected = tables.load_gguf_checkpoint(str(mixed), return_tensors=True, model_to_load=model)["tensors"]
    with caplog.at_level(logging.WARNING, "coreskip"):
        state = check_state(file, expected)
    changed = {_Transposing: "o_proj", _Subtracting: "up_proj", _Naming: "lm_head", _Choosy: "k_proj"}[processor]
    plain = {name.split(".")[-2] for name, w in state.items() if isinstance(w, Tensor) and "norm" not in name}
    assert plain == {changed}
    assert len(caplog.messages) == 1
