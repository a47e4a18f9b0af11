"""Folders of packed models: damaged, killed while they are written, replaced while they are read, shared."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_models import tokenizer
from tiny_models import greedy, prompt, tiny

import coreskip
from coreskip import CoreskipError
from coreskip.kernels import ops, store
from coreskip.predictors.sealed import seal
from coreskip.runtime import pack as packing
from coreskip.runtime.packed_folder import DOCUMENT, WEIGHTS, describe, read_document
from coreskip.runtime.packed_layer import packed_layers

NO_LIBRARY = ops.available("cpu")
pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))


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
    "an edited configuration": lambda f: edit(f / "config.json", "rms_norm_eps", 0.5),
    "no generation settings": lambda f: (f / "generation_config.json").unlink(),
    "an edited tokenizer": lambda f: edit(f / "tokenizer_config.json", "eos_token", "w9"),
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
from packed_models import tokenizer
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


def test_threads_that_load_at_once(whole: Path) -> None:
    found: list[Any] = []

    def load() -> None:
        found.append(coreskip.load(whole)[0])

    for _ in range(4):
        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 16
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"
    text = greedy(found[0], prompt(1, 5), 4)
    assert all(torch.equal(greedy(model, prompt(1, 5), 4), text) for model in found)


_WRITE = """
import sys
sys.path.insert(0, sys.argv[1])
import coreskip
from packed_models import tokenizer
from tiny_models import tiny
models = [tiny("llama"), tiny("llama", seed=3, rms_norm_eps=0.5)]
words = tokenizer()
for turn in range(40):
    coreskip.pack(models[turn % 2], words, sys.argv[2], weights=("int4", "int8")[turn % 2], progress=False)
    print(turn, flush=True)
"""


def test_a_folder_that_is_replaced_while_it_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITE, str(Path(__file__).parent), str(folder)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    seen = set()
    while process.poll() is None:
        model, _ = coreskip.load(folder)
        fmt = next(layer.formats[0] for _, layer in packed_layers(model))
        seen.add((fmt, model.config.rms_norm_eps))
    assert seen <= {("int4", 1e-6), ("int8_groups", 0.5)}


@pytest.mark.parametrize("wrong", [None, "a tokenizer"])
def test_what_cannot_be_saved_shows_first(wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_write_packed", lambda *_: pytest.fail("matrices were packed before"))
    with pytest.raises(CoreskipError):
        coreskip.pack(tiny("llama"), wrong, tmp_path / "p", progress=False)
    model = tiny("llama")
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, False
    with pytest.raises(CoreskipError):
        coreskip.pack(model, tokenizer(), tmp_path / "p", progress=False)
    assert not (tmp_path / "p").exists()
