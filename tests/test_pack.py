"""Packed models: the same numbers in a folder that is mapped, whatever happens to the folder."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, greedy, plan_of, prompt, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import coreskip
from coreskip import CoreskipError, Engine, Plan
from coreskip.cli import main
from coreskip.kernels import ops, store
from coreskip.predictors.anatomy import rows_of
from coreskip.runtime import pack as packing
from coreskip.runtime.packed_folder import DOCUMENT, WEIGHTS, describe, read_document, seal
from coreskip.runtime.packed_layer import PackedLayer, packed_layers
from coreskip.runtime.wrap import runtime_of

NO_LIBRARY = ops.available("cpu")
pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))


def tokenizer() -> Any:
    words = {f"w{i}": i for i in range(128)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w3", pad_token="w0", eos_token="w2")


def packed(model: Any, folder: Path, **options: Any) -> Any:
    """The model that comes back from a folder."""
    coreskip.pack(model, tokenizer(), folder, progress=False, **options)
    return coreskip.load(folder)[0]


def on_grid(model: Any, fmt: str = "int4") -> Any:
    """The model with numbers that groups of 4 or 8 bits hold."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                rounded = ops.PackedLinear.pack(module.weight, fmt=fmt)
                module.weight.copy_(PackedLayer([rounded], None, torch.float32).unpacked())
    return model


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_very_numbers(family: str, tmp_path: Path) -> None:
    model = on_grid(tiny(family))
    found, ids = packed(model, tmp_path / "p", weights="as-loaded"), prompt(2, 9)
    assert any(True for _ in packed_layers(found))
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
        expected = greedy(model, ids, 12)
        assert torch.equal(greedy(found, ids, 12), expected)
        with coreskip.wrap(found):
            assert torch.equal(greedy(found, ids, 12), expected)
        with coreskip.wrap(found, exact=True):
            assert torch.equal(greedy(found, ids[:1], 12), expected[:1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_in_bfloat16(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    found = packed(model, tmp_path / "p", weights="bfloat16")
    assert not any(True for _ in packed_layers(found))
    for (name, ours), theirs in zip(found.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(torch.bfloat16)), name
    assert greedy(found, prompt(2, 9), 4).shape == (2, 13)


COVERED = ("llama", "llama_bias", "phi3", "gemma2")


def decoded(model: Any, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt's last token and of `tokens`, one after the other."""
    out = model(ids, use_cache=True)
    logits = [out.logits[:, -1:]]
    logits += [model(token[:, None], past_key_values=out.past_key_values).logits for token in tokens]
    return torch.cat(logits, 1)


@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("family", ["llama", "llama_bias", "phi3", "gemma2", "gpt2", "opt", "falcon", "bloom"])
def test_decodes_as_the_original_in_that_format(family: str, weights: str, tmp_path: Path) -> None:
    model, ids = tiny(family), prompt(2, 9)
    found = packed(model, tmp_path / "p", weights=weights)
    assert {fmt for _, layer in packed_layers(found) for fmt in layer.formats} <= {"int4", "int8_groups"}
    unpacked = copy.deepcopy(found)
    for name, layer in list(packed_layers(unpacked)):
        fmt = "int8_groups" if layer.out_features == 128 and name != "model.layers" and "head" in name else None
        fmt = fmt or {"int4": "int4", "int8": "int8_groups"}[weights]
        original, _ = rows_of(model.get_submodule(name))
        assert torch.equal(
            PackedLayer([ops.PackedLinear.pack(original, fmt=fmt)], None, original.dtype).unpacked(), layer.unpacked()
        )
        layer.unpack()
    tokens = prompt(4, 2, seed=3)
    with torch.no_grad():
        expected = decoded(unpacked, ids, tokens)
        torch.testing.assert_close(decoded(found, ids, tokens), expected, rtol=1e-4, atol=1e-4)
        assert greedy(unpacked, ids, 3).shape == (2, 12)
        with coreskip.wrap(found):  # whose decode steps round inputs to 8 bits
            assert runtime_of(found).plan.weights == "packed"
            error = decoded(found, ids, tokens) - expected
            assert (runtime_of(found).steps.native.refusal is None) == (family in COVERED)
    assert error[:, -1].square().mean().sqrt() < 0.08 * expected.std()
    assert error[:, -1].abs().max() > 0


@pytest.mark.parametrize("kind", ["static", "griffin", "similar"])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_its_plan_goes_with_it(kind: str, weights: str | None, tmp_path: Path) -> None:
    model = on_grid(tiny("llama"), "int8_groups")
    plan, ids = replace(plan_of(model, kind), weights=weights), prompt(1, 9)
    found = packed(model, tmp_path / "p", plan=plan)
    kept = Plan.load(tmp_path / "p")
    assert kept.weights == "packed"
    with coreskip.wrap(found, replace(kept, weights=None)):
        text = greedy(found, ids, 12)
    with coreskip.wrap(model, replace(plan, weights=None)):
        assert torch.equal(greedy(model, ids, 12), text)
    with coreskip.wrap(found, tmp_path / "p"):  # with inputs in 8 bits
        assert greedy(found, ids, 12).shape == text.shape


def test_ways_of_using_it(tmp_path: Path) -> None:
    model = on_grid(tiny("llama"))
    found, ids = packed(model, tmp_path / "p"), prompt(3, 9)
    words = " ".join(f"w{i}" for i in ids[0].tolist())
    expected = Engine(model, tokenizer(), plain=True).generate(words, max_new_tokens=10)
    for options in ({}, {"exact": True}, {"lookup": True}, {"plain": True}, {"keep_originals": False}):
        with Engine(found, tokenizer(), **options) as engine:
            assert engine.generate(words, max_new_tokens=10) == expected, options
    with coreskip.wrap(found):
        assert torch.equal(greedy(found, ids, 10), greedy(model, ids, 10))
        sampled = [m.generate(ids, max_new_tokens=6, do_sample=True, pad_token_id=0) for m in (found,)]
        assert sampled[0].shape == (3, 15)
    twin = copy.deepcopy(found)
    assert torch.equal(greedy(twin, ids, 5), greedy(model, ids, 5))
    quality = coreskip.evaluate(
        found, tokenizer(), None, " ".join(f"w{5 + i * i % 120}" for i in range(900)), windows=2
    )
    assert abs(quality["ppl_increase"]) < 1e-6
    half = found.to(torch.bfloat16)
    with torch.no_grad():
        assert half(ids).logits.dtype == torch.bfloat16


def test_a_packed_model_says_what_it_cannot_do(tmp_path: Path) -> None:
    found = packed(tiny("llama"), tmp_path / "p", weights="int4")
    for action in (found.state_dict, lambda: found.save_pretrained(tmp_path / "s")):
        with pytest.raises(CoreskipError, match="packed"):
            action()
    for weights in ("int8", "int4"):
        with pytest.raises(CoreskipError, match="packed already"):
            coreskip.pack(found, tokenizer(), tmp_path / "q", weights=weights, progress=False)
    with pytest.raises(CoreskipError, match="the model is packed"):
        coreskip.wrap(found, replace(Plan.dense(found), weights="int8"))
    with coreskip.wrap(found, replace(Plan.dense(found), weights="int4")):  # its own
        greedy(found, prompt(1, 5), 3)
    with pytest.raises(CoreskipError, match="not packed"):
        coreskip.wrap(tiny("llama"), replace(Plan.dense(tiny("llama")), weights="packed"))
    elsewhere = copy.deepcopy(found).to("meta")  # unpacked on the way
    assert not any(True for _ in packed_layers(elsewhere))
    assert all(p.is_meta for p in elsewhere.parameters())
    assert elsewhere.state_dict()


def test_packed_again_and_tied_heads(tmp_path: Path) -> None:
    model, ids = tiny("gemma2", tie_word_embeddings=True), prompt(1, 6)
    first = packed(model, tmp_path / "a", weights="int4")
    text = greedy(first, ids, 8)
    second = packed(first, tmp_path / "b")
    assert torch.equal(greedy(second, ids, 8), text)
    assert describe(tmp_path / "a")["formats"] == describe(tmp_path / "b")["formats"]
    half = packed(model, tmp_path / "c", weights="bfloat16")
    assert half.get_output_embeddings().weight is half.get_input_embeddings().weight


def test_is_mapped_and_not_written_to(tmp_path: Path) -> None:
    found = packed(on_grid(tiny("llama")), tmp_path / "p")
    data = (tmp_path / "p" / WEIGHTS).read_bytes()
    for tensor in (found.get_input_embeddings().weight, found.model.norm.weight):
        with torch.no_grad():
            tensor.fill_(7.0)
    for _, layer in packed_layers(found):
        assert all(part.weight.data_ptr() % store.PAGE == 0 for part in layer.parts())
    assert (tmp_path / "p" / WEIGHTS).read_bytes() == data


# ---- folders that are not whole ----


def spoil(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = read_document(folder)
    change(document)
    (folder / DOCUMENT).write_bytes(seal(document))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "no document": lambda f: (f / DOCUMENT).write_text(""),
    "half a document": lambda f: (f / DOCUMENT).write_bytes((f / DOCUMENT).read_bytes()[:-40]),
    "an edited document": lambda f: (f / DOCUMENT).write_text(
        (f / DOCUMENT).read_text().replace("int4", "int8_groups")
    ),
    "a newer version": lambda f: spoil(f, lambda d: d.update(version=99)),
    "no weights": lambda f: (f / WEIGHTS).unlink(),
    "truncated weights": lambda f: os.truncate(f / WEIGHTS, 5000),
    "longer weights": lambda f: os.truncate(f / WEIGHTS, 500_000_0),
    "a flipped bit": lambda f: flip(f / WEIGHTS),
    "another class": lambda f: spoil(f, lambda d: d.update({"class": "os"})),
    "no class": lambda f: spoil(f, lambda d: d.pop("class")),
    "another configuration": lambda f: edit(f / "config.json", "hidden_size", 128),
    "no configuration": lambda f: (f / "config.json").unlink(),
    "a parameter left out": lambda f: spoil(f, lambda d: d["parameters"].pop("model.norm.weight")),
    "a parameter too many": lambda f: spoil(f, lambda d: d["parameters"].update({"model.more.weight": "fingerprint"})),
    "another shape": lambda f: spoil(f, lambda d: d["tensors"]["model.norm.weight"].update(shape=[63])),
    "a place beyond the end": lambda f: spoil(f, lambda d: d["tensors"]["model.norm.weight"].update(at=1 << 40)),
    "a negative size": lambda f: spoil(f, lambda d: d["tensors"]["model.norm.weight"].update(shape=[-64])),
    "an unknown format": lambda f: spoil(f, lambda d: first_part(d).update(format="int3")),
    "too many rows": lambda f: spoil(f, lambda d: first_part(d).update(rows=1 << 40)),
    "no tokenizer": lambda f: [path.unlink() for path in f.glob("tokenizer*")],
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def edit(path: Path, name: str, value: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))


def first_part(document: dict[str, Any]) -> Any:
    return next(iter(document["packed"].values()))["parts"][0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "whole"
    coreskip.pack(tiny("llama"), tokenizer(), folder, weights="int4", progress=False)
    return folder


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_folder_is_one_line(damage: str, whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path / "p")
    DAMAGE[damage](folder)
    with pytest.raises(CoreskipError) as caught:
        coreskip.load(folder)
    assert "\n" not in str(caught.value)


_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 1 << 70), st.floats(allow_nan=False, allow_infinity=False), st.text(),
    st.lists(st.integers(-2, 9), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_metadata(whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A sealed document in which something has another value: a model, or one line."""
    document = read_document(whole)
    place: Any = document
    for _ in range(data.draw(st.integers(0, 3))):
        inner = [v for v in (place.values() if isinstance(place, dict) else place) if isinstance(v, (dict, list)) and v]
        if not inner:
            break
        place = data.draw(st.sampled_from(inner))
    if isinstance(place, dict):
        key = data.draw(st.sampled_from(sorted(place)))
        place[key] = data.draw(_VALUES)
    elif place:
        place[data.draw(st.integers(0, len(place) - 1))] = data.draw(_VALUES)
    folder = tmp_path_factory.mktemp("fuzzed")
    for path in whole.iterdir():
        if path.name != DOCUMENT:
            os.link(path, folder / path.name)
    (folder / DOCUMENT).write_bytes(seal(document))
    for use in (coreskip.load, describe):
        with contextlib.suppress(CoreskipError):
            use(folder)


# ---- writing ----


def test_places_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "note").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "other", "", Path("/")):
        with pytest.raises(CoreskipError):
            coreskip.pack(tiny("llama"), tokenizer(), place, progress=False)
    with pytest.raises(CoreskipError, match="choose from"):
        coreskip.pack(tiny("llama"), tokenizer(), tmp_path / "p", weights="int3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]


def test_a_full_disk_leaves_what_was_there(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, count = copied(whole, tmp_path / "p"), 0
    add = store.Writer.add

    def some(self: store.Writer, name: str, tensor: torch.Tensor) -> None:
        nonlocal count
        count += 1
        if count == 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, name, tensor)

    monkeypatch.setattr(store.Writer, "add", some)
    with pytest.raises(CoreskipError, match="no room"):
        coreskip.pack(tiny("llama", seed=3), tokenizer(), folder, weights="int8", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]
    assert describe(folder)["weights"] == "int4"
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(CoreskipError, match="MB left"):
        coreskip.pack(tiny("llama"), tokenizer(), folder, weights="int8", progress=False)


_FOREVER = """
import sys
sys.path.insert(0, sys.argv[1])
import coreskip
from test_pack import tokenizer
from tiny_models import tiny
models = [tiny("llama", seed=seed) for seed in range(2)]
words = tokenizer()
print("ready", flush=True)
turn = 0
while True:
    coreskip.pack(models[turn % 2], words, sys.argv[2], weights=("int4", "int8")[turn % 2], progress=False)
    turn += 1
"""


@pytest.mark.parametrize("there", [False, True])
def test_killed_at_any_moment(there: bool, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    if there:
        copied(whole, folder)
    for turn in range(int(os.environ.get("CORESKIP_KILLS", "3"))):
        process = subprocess.Popen(
            [sys.executable, "-c", _FOREVER, str(Path(__file__).parent), str(folder)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep((turn * 0.618 % 1) * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if there or folder.exists():
            model, _ = coreskip.load(folder)
            assert greedy(model, prompt(1, 5), 2).shape == (1, 7)


_SHARE = """
import sys, torch, coreskip
model, _ = coreskip.load(sys.argv[1])
coreskip.wrap(model)
model.generate(torch.randint(5, 100, (1, 9)), max_new_tokens=4, do_sample=False)
print("ready", flush=True)
sys.stdin.readline()
total = 0
for block in open("/proc/self/smaps").read().split("VmFlags"):
    if "weights.bin" in block:
        total += int(block.split("Pss:")[1].split()[0])
print(total, flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's account of shared pages")
def test_processes_share_the_weights(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    model = tiny("llama", hidden_size=512, intermediate_size=2048, num_attention_heads=8)
    coreskip.pack(model, tokenizer(), folder, weights="int4", progress=False)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _SHARE, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        kilobytes = []
        for process in started:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            kilobytes.append(int(process.stdout.readline()))
    finally:
        for process in started:
            process.kill()
            process.wait()
    file = (folder / WEIGHTS).stat().st_size / 1024
    assert sum(kilobytes) <= 1.05 * file
    assert sum(kilobytes) >= 0.7 * file


def test_a_text_calibrates_the_rounding(tmp_path: Path) -> None:
    model, words = tiny("llama"), tokenizer()
    text = " ".join(f"w{5 + i * i % 120}" for i in range(1500))
    coreskip.pack(model, words, tmp_path / "p", weights="int4", progress=False)
    coreskip.pack(model, words, tmp_path / "t", text=text, progress=False)
    assert describe(tmp_path / "p")["formats"] == describe(tmp_path / "t")["formats"]
    assert describe(tmp_path / "t")["calibration"]["source"] == "text"
    ids = words(text, return_tensors="pt").input_ids[:, 1000:1256]
    with torch.no_grad():
        expected = model(ids).logits
        off = [float((coreskip.load(tmp_path / name)[0](ids).logits - expected).square().mean()) for name in "tp"]
    assert off[0] < 0.8 * off[1]
    coreskip.pack(model, words, tmp_path / "m", text=text, share=0.8, progress=False)
    sizes = [describe(tmp_path / name)["formats"] for name in "tm"]
    assert sizes[1]["int8_groups"]["tensors"] > sizes[0]["int8_groups"]["tensors"]
    assert sizes[1]["int4"]["tensors"] > 0
    mixed, _ = coreskip.load(tmp_path / "m")
    with coreskip.wrap(mixed):
        greedy(mixed, ids[:, :9], 4)
        assert runtime_of(mixed).steps.native.refusal is None
    for share in (0.1, 1.5, "half"):
        with pytest.raises(CoreskipError):
            coreskip.pack(model, words, tmp_path / "q", text=text, share=share, progress=False)
    with pytest.raises(CoreskipError, match="give one"):
        coreskip.pack(model, words, tmp_path / "q", share=0.8)
    with pytest.raises(CoreskipError, match="calibrates rounding to 4 bits"):
        coreskip.pack(model, words, tmp_path / "q", weights="int8", text=text)
    with pytest.raises(CoreskipError):
        coreskip.pack(model, words, tmp_path / "q", text="w5 w6 w7", progress=False)
    assert not (tmp_path / "q").exists()


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, folder, plan = tmp_path / "m", tmp_path / "m.packed", tmp_path / "m.plan"
    model = tiny("llama")
    model.save_pretrained(source)
    tokenizer().save_pretrained(source)
    plan_of(model, "static").save(plan)
    code, out, _ = command(capsys, "pack", source, "-o", folder, "--weights", "int4", "--plan", plan)
    assert (code, "plainly rounded" in out) == (0, True)
    code, out, _ = command(capsys, "show", folder)
    assert (code, "int8_groups" in out, "keeps" in out) == (0, True, True)
    code, out, _ = command(capsys, "show", folder, "--json")
    assert (code, json.loads(out)["plan"]["weights"]) == (0, "packed")
    options = ("-p", "w7 w9 w11", "--max-new-tokens", 6)
    code, out, err = command(capsys, "generate", folder, *options, "--stats")
    assert (code, "50.0% of the MLP neurons skipped" in err) == (0, True)  # the folder's own plan
    code, plain, _ = command(capsys, "generate", folder, *options, "--plain")
    assert code == 0
    code, exact, _ = command(capsys, "generate", folder, *options, "--exact")
    assert (code, exact) == (0, plain)
    for wrong in (
        ("pack", source, "-o", folder, "--weights", "int3"),
        ("pack", source, "-o", tmp_path),
        ("pack", source, "-o", folder, "--plan", tmp_path / "none"),
        ("pack", source, "-o", folder, "--weights", "int8", "--text", source / "config.json"),
        ("generate", folder, *options, "--weights", "int8"),
        ("show", tmp_path / "none"),
    ):
        code, _, err = command(capsys, *wrong)
        assert (code, err.count("\n")) == (2, 1), err
    assert describe(folder)["weights"] == "int4"
