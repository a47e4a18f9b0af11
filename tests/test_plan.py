"""The Plan on disk: round trips, and every kind of damage is one PlanError."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import greedy, plan_of, prompt, tiny

import coreskip
from coreskip import CoreskipError, Plan, PlanError
from coreskip.predictors import files
from coreskip.predictors.sealed import seal

QUALITY = {
    "dense": {"ppl": 10.0},
    "sparse": {"ppl": 11.0},
    "ppl_increase": 0.1,
    "kl": 0.02,
    "top1_agreement": 0.9,
    "neuron_sparsity": 0.5,
    "tokens": 512,
    "text": "a text",
}


def saved(tmp_path: Path, kind: str = "similar", model: Any = None) -> tuple[Plan, Path]:
    plan = plan_of(model if model is not None else tiny("llama"), kind)
    plan = Plan(plan.layers, plan.model, {"method": kind}, {"source": "x"}, QUALITY, plan.clusters)
    plan.save(tmp_path / "a.plan")
    return plan, tmp_path / "a.plan"


@pytest.mark.parametrize("kind", ["static", "similar", "signed", "griffin"])
def test_a_saved_plan_does_what_it_did(tmp_path: Path, kind: str) -> None:
    model = tiny("llama")
    plan, path = saved(tmp_path, kind, model)
    loaded = Plan.load(path)
    assert str(loaded) == str(plan)
    assert sorted(p.name for p in path.iterdir()) == ["plan.json", "plan.safetensors"]
    with coreskip.wrap(model, plan):
        expected = greedy(model, prompt())
    with coreskip.wrap(model, loaded):
        assert torch.equal(greedy(model, prompt()), expected)


def test_a_plan_prints_its_layers(tmp_path: Path) -> None:
    plan, _ = saved(tmp_path, "signed")
    text = str(plan)
    assert "core_neurons alpha=0.4 beta=0.5 score=signed" in text
    assert text.count("50.0%") == 2, "three layers alike are one row, and the sum"
    assert "0-2" in text
    assert "+10.0%" in text
    assert "KL 0.020" in text
    assert "not measured" in str(Plan.dense(tiny("llama")))


def loads(path: Path, match: str) -> None:
    with pytest.raises(PlanError, match=match) as caught:
        Plan.load(path)
    assert "\n" not in str(caught.value)


def rewrite(path: Path, change: Any, sealed: bool = True) -> None:
    document = json.loads((path / "plan.json").read_text())
    change(document)
    (path / "plan.json").write_bytes(seal(document) if sealed else json.dumps(document).encode())


def rewrite_tensors(path: Path, change: Any) -> None:
    import hashlib

    tensors = safetensors.torch.load_file(path / "plan.safetensors")
    change(tensors)
    data = safetensors.torch.save(tensors)
    (path / "plan.safetensors").write_bytes(data)
    rewrite(path, lambda d: d.update(tensors_sha256=hashlib.sha256(data).hexdigest()))


def test_damage(tmp_path: Path) -> None:
    loads(tmp_path / "none.plan", "no plan at")
    (tmp_path / "file.plan").write_text("x")
    loads(tmp_path / "file.plan", "no plan at")
    _, path = saved(tmp_path)
    text, data = (path / "plan.json").read_bytes(), (path / "plan.safetensors").read_bytes()

    def restore() -> None:
        (path / "plan.json").write_bytes(text)
        (path / "plan.safetensors").write_bytes(data)

    (path / "plan.json").write_bytes(text[: len(text) // 2])
    loads(path, "truncated")
    (path / "plan.json").write_text("[]")
    loads(path, "not a coreskip plan")
    restore()
    (path / "plan.safetensors").write_bytes(data[:-5])
    loads(path, "truncated or was edited")
    (path / "plan.safetensors").unlink()
    loads(path, "plan.safetensors")
    restore()
    rewrite(path, lambda d: d.update(version=3))
    loads(path, "newer than 2: upgrade")
    restore()
    rewrite(path, lambda d: d["recipe"].update(method="other"), sealed=False)
    loads(path, "edited")
    restore()
    rewrite(path, lambda d: d["layers"][0]["neurons"].update(policy="magic"))
    loads(path, "'magic'.*upgrade")
    restore()
    rewrite(path, lambda d: d["layers"].pop())
    loads(path, "2 layers, its model 3")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.update({"layers.1.indices": t["layers.1.indices"] + 160}), "layer 1.*out of range"),
        (lambda t: t.update({"layers.1.indices": t["layers.1.indices"] - 999}), "layer 1.*out of range"),
        (lambda t: t.update({"layers.2.indices": t["layers.2.indices"].flip(0)}), "ascending"),
        (lambda t: t.update({"layers.0.indices": t["layers.0.indices"].float()}), "int64"),
        (lambda t: t.update({"layers.0.indices": t["layers.0.indices"][:0]}), "non-empty"),
        (lambda t: t.pop("layers.0.indices"), "not a well-formed plan"),
        (lambda t: t.update({"model.probes": t["model.probes"][:, :3].clone()}), "probes"),
    ],
)
def test_sealed_but_senseless_tensors(tmp_path: Path, change: Any, match: str) -> None:
    _, path = saved(tmp_path, "static")
    rewrite_tensors(path, change)
    loads(path, match)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(p for key, inner in items for p in places(inner, (*at, key)))]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_plans_raise_only_plan_errors(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes flipped, cut or added; or any JSON value replaced, with a valid seal over the result."""
    model = FUZZED
    _, path = saved(tmp_path, data.draw(st.sampled_from(["static", "similar", "signed"])), model)
    name = data.draw(st.sampled_from(["plan.json", "plan.safetensors", "sealed"]))
    if name == "sealed":
        document = json.loads((path / "plan.json").read_text())
        place = data.draw(st.sampled_from([p for p in places(document) if p]))
        inner = document
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = data.draw(JSON)
        (path / "plan.json").write_bytes(seal(document))
    else:
        raw = bytearray((path / name).read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(raw) - 1))
            raw[at : at + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=20))
            raw = raw or bytearray(b"x")
        (path / name).write_bytes(raw)
    with contextlib.suppress(PlanError):  # any other exception fails the test
        plan = Plan.load(path)
        str(plan)
        plan.check(model)


FUZZED = tiny("llama")


# --- saving


def test_saving_over_something_else(tmp_path: Path) -> None:
    plan, path = saved(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CoreskipError, match="not a plan folder"):
        plan.save(tmp_path / "file")
    (path / "notes.txt").write_text("mine")
    with pytest.raises(CoreskipError, match="other files"):
        plan.save(path)
    (path / "notes.txt").unlink()
    plan.save(path)
    Plan.load(path)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path: Path) -> None:
    plan, _ = saved(tmp_path)
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(CoreskipError, match="cannot write"):
        plan.save(tmp_path / "locked" / "b.plan")


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from coreskip import CoreskipError, Plan
plan = Plan.load({source!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # every file above 1,000 bytes fails, as on a full disk
try:
    plan.save({target!r})
except CoreskipError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs setrlimit")
def test_no_room_on_the_disk(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    old = plan_of(tiny("llama"), "signed")
    old.save(tmp_path / "old.plan")
    script = FULL_DISK.format(paths=sys.path, source=str(path), target=str(tmp_path / "old.plan"))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "cannot write the plan" in run.stdout
    assert "unchanged" in run.stdout
    assert str(Plan.load(tmp_path / "old.plan")) == str(old)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.plan", "old.plan"]


def test_a_failed_swap_puts_the_old_plan_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, path = saved(tmp_path, "signed")
    rename = os.rename

    def failing(source: Any, target: Any) -> None:
        if Path(target) == path and ".old" not in Path(source).name and not path.exists():
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(CoreskipError, match="unchanged"):
        plan_of(tiny("llama"), "static").save(path)
    monkeypatch.undo()
    assert str(Plan.load(path)) == str(old)
    assert [p.name for p in tmp_path.iterdir()] == ["a.plan"]
