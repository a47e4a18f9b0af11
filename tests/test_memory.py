"""Packed models under a cap on memory: the same text, however little of them is in memory."""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import on_grid, tokenizer
from tiny_models import greedy, plan_of, prompt, tiny

import coreskip
from coreskip import CoreskipError, Engine
from coreskip.bench import memory as benchmark
from coreskip.cli import main
from coreskip.kernels import files, ops, residency
from coreskip.kernels.store import checksum
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.plan import Plan
from coreskip.predictors.policies import Skip, SkipMLP
from coreskip.runtime import memory, native_check
from coreskip.runtime.memory_size import bytes_of, free_memory
from coreskip.runtime.native_prompts import NativePrompts
from coreskip.runtime.packed_folder import WEIGHTS
from coreskip.runtime.wrap import runtime_of

NO_LIBRARY = ops.available("cpu")
pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))

LARGER = {"hidden_size": 256, "intermediate_size": 1024}
FORMATS = ("int4", "int8", "bfloat16", "as-loaded")
SHARES = (0.75, 0.5, 0.25)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tiny matrices come in several."""
    monkeypatch.setattr(memory, "_LEAST_PIECE", 2 * files.PAGE)


@pytest.fixture(autouse=True)
def _prompts_on_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are under a cap: a native prompt has other last bits, and rounds other inputs to 8 bits."""
    monkeypatch.setattr(NativePrompts, "forward", lambda *_: None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A llama in each format."""
    found = {}
    for weights in FORMATS:
        model = tiny("llama", **LARGER)
        found[weights] = tmp_path_factory.mktemp("packed") / weights
        coreskip.pack(
            on_grid(model) if weights == "as-loaded" else model, tokenizer(), found[weights],
            weights=weights, progress=False,
        )  # fmt: skip
    return found


def least(folder: Path, plan: Plan | None = None) -> int:
    """The smallest cap that is taken."""
    with pytest.raises(CoreskipError, match="too little for this model"):
        coreskip.load(folder, memory=1000)
    model, _ = coreskip.load(folder)
    with pytest.raises(CoreskipError, match="needs at least") as error:
        coreskip.wrap(model, plan, memory="1KB")
    found = int(float(str(error.value).split("needs at least ")[1].split(" MB")[0]) * 1e6) + 100_000
    with coreskip.wrap(model, plan, memory=found):
        return found


def cap_at(folder: Path, share: float) -> int:
    """A cap that leaves room for so much of the matrices, beside what is needed anyway."""
    return least(folder) + int(share * os.path.getsize(folder / WEIGHTS))


def capped(folder: Path, share: float) -> Any:
    return coreskip.load(folder, memory=cap_at(folder, share))[0]


@torch.no_grad()
def text_of(model: Any, ids: torch.Tensor, new: int = 16, **options: Any) -> torch.Tensor:
    with coreskip.wrap(model, **options):
        return greedy(model, ids, new)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("weights", FORMATS)
def test_the_same_text_in_less_memory(weights: str, share: float, folders: dict[str, Path]) -> None:
    folder, ids = folders[weights], prompt(1, 9)
    expected = text_of(coreskip.load(folder)[0], ids)
    model = capped(folder, share)
    with torch.no_grad(), coreskip.wrap(model):
        assert torch.equal(greedy(model, ids), expected)
        runtime = runtime_of(model)
        assert runtime.steps.native.ready
        found = runtime.memory
        assert isinstance(found, memory.Capped)
        assert found.streamed_bytes > 0
        assert found.kept_bytes + found.needs.always + found.needs.of_text(1, 9, 25) <= found.cap
        assert found.kept_bytes > (share - 0.15) * os.path.getsize(folder / WEIGHTS)


@pytest.mark.parametrize("weights", FORMATS)
def test_the_same_logits_to_the_bit(weights: str, folders: dict[str, Path]) -> None:
    ids, plain, model = prompt(1, 12), coreskip.load(folders[weights])[0], capped(folders[weights], 0.25)
    with torch.no_grad(), coreskip.wrap(plain), coreskip.wrap(model):
        a, b = plain(ids, use_cache=True), model(ids, use_cache=True)
        assert torch.equal(a.logits, b.logits)
        for token in ids[0, :4]:
            step = {"input_ids": token.view(1, 1)}
            a = plain(**step, past_key_values=a.past_key_values)
            b = model(**step, past_key_values=b.past_key_values)
            assert torch.equal(a.logits, b.logits)


@pytest.mark.parametrize("family", ["phi3", "gemma2", "llama_bias", "opt", "falcon", "gpt2"])
def test_families(family: str, tmp_path: Path) -> None:
    sizes = {"gpt2": {"n_embd": 256, "n_inner": 1024}, "opt": {"hidden_size": 256, "ffn_dim": 1024}}.get(family, LARGER)
    sizes = {**sizes, "word_embed_proj_dim": 256} if family == "opt" else sizes
    coreskip.pack(tiny(family, **sizes), tokenizer(), tmp_path / "p", weights="int8", progress=False)
    ids = prompt(1, 9)
    expected = text_of(coreskip.load(tmp_path / "p")[0], ids, 8)
    assert torch.equal(text_of(capped(tmp_path / "p", 0.3), ids, 8), expected)


@pytest.mark.parametrize("options", [{"exact": True}, {"lookup": True}, {"exact": True, "plan": "static"}])
def test_ways_of_running(options: dict[str, Any], folders: dict[str, Path]) -> None:
    folder = folders["int4"]
    # the plan's neurons are taken out of matrices that are unpacked for it
    plain, model = coreskip.load(folder)[0], capped(folder, 1.3 if options.get("plan") else 0.9)
    if options.get("plan"):
        options = {**options, "plan": replace(plan_of(model, "static"), weights="packed")}
    ids = torch.cat([prompt(1, 9), prompt(1, 9)], 1)
    assert torch.equal(text_of(model, ids, **options), text_of(plain, ids, **options))


def test_batches_and_long_prompts(folders: dict[str, Path]) -> None:
    folder = folders["bfloat16"]
    plain, model = coreskip.load(folder)[0], capped(folder, 0.6)
    for ids in (prompt(3, 9), prompt(1, 80), prompt(10, 5)):
        assert torch.equal(text_of(model, ids, 8), text_of(plain, ids, 8))


def test_engines_and_threads(folders: dict[str, Path]) -> None:
    folder, prompts = folders["int8"], ["w5 w6 w7", "w9 w8", "w50 w51 w52 w53", "w17"]
    loaded, words = coreskip.load(folder)
    with Engine(loaded, words) as engine:
        expected = [engine.generate(text, max_new_tokens=12) for text in prompts]
    found = dict[str, str]()
    with Engine(*coreskip.load(folder), memory=cap_at(folder, 0.6)) as engine:

        def run(text: str) -> None:
            found[text] = "".join(engine.stream(text, max_new_tokens=12))

        threads = [threading.Thread(target=run, args=(text,)) for text in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[text] for text in prompts] == expected


@pytest.mark.parametrize("kind", [Skip, SkipMLP])
def test_layers_that_are_skipped_are_not_read(kind: Any, folders: dict[str, Path]) -> None:
    plain, model = coreskip.load(folders["bfloat16"])[0], capped(folders["bfloat16"], 0.25)
    dense = Plan.dense(model)
    plan = replace(dense, layers=(dense.layers[0], replace(dense.layers[1], layer=kind()), *dense.layers[2:]))
    ids = prompt(1, 9)
    with torch.no_grad(), coreskip.wrap(model, plan):
        assert torch.equal(greedy(model, ids), text_of(plain, ids, plan=plan))
        found = runtime_of(model).memory
        assert isinstance(found, memory.Capped)
        mlp = {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
        assert not mlp & set(found._order)


@pytest.mark.parametrize("kind", ["static", "griffin", "similar"])
@pytest.mark.parametrize("weights", FORMATS)
def test_nothing_is_read_once_the_kept_neurons_are_there(kind: str, weights: str, folders: dict[str, Path]) -> None:
    folder, ids = folders[weights], prompt(1, 9)
    plain = coreskip.load(folder)[0]
    plan = plan_of(plain, kind)
    if weights in ("int4", "int8"):
        plan = replace(plan, weights="packed")
    expected = text_of(plain, ids, plan=plan)
    model, _ = coreskip.load(folder)
    others = os.path.getsize(folder / WEIGHTS) // 2  # attentions and head, and more
    with torch.no_grad(), coreskip.wrap(model, plan, memory=least(folder, plan) + others):
        assert torch.equal(greedy(model, ids), expected)
        found, native = runtime_of(model).memory, runtime_of(model).steps.native
        assert isinstance(found, memory.Capped)
        assert not any("mlp" in name for name in found._kept)
        assert found.kept_bytes > 0
        assert found.streamed_bytes == 0
        assert native.described is not None
        steps = [step for step, _ in native.described.steps.values()]
        assert steps or kind != "static"  # others go with their caches
        assert all(step.stream is not None and step.stream.bytes_a_step == 0 for step in steps)
    capped = text_of(coreskip.load(folder)[0], ids, plan=plan, memory=least(folder, plan) + others // 3)
    assert torch.equal(capped, expected)


def test_rows_that_choose_different_neurons(folders: dict[str, Path]) -> None:
    for weights in ("int4", "bfloat16"):
        folder = folders[weights]
        plain, model = coreskip.load(folder)[0], coreskip.load(folder)[0]
        plan = replace(plan_of(plain, "griffin"), weights="packed" if weights == "int4" else None)
        for rows in (3, 10):
            ids = prompt(rows, 6)
            expected = text_of(plain, ids, 6, plan=plan)
            assert torch.equal(text_of(model, ids, 6, plan=plan, memory=least(folder, plan) * 3), expected)


def test_a_plan_whose_neurons_do_not_fit_says_so(folders: dict[str, Path]) -> None:
    model = coreskip.load(folders["int4"])[0]
    plan = replace(plan_of(model, "static"), weights="packed")
    with pytest.raises(CoreskipError, match=r"at least .* MB, \d\.\d MB of that for the neurons that the plan keeps"):
        coreskip.wrap(model, plan, memory="1MB")
    assert torch.equal(text_of(model, prompt(1, 9)), text_of(coreskip.load(folders["int4"])[0], prompt(1, 9)))


def test_analysis_under_a_cap(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folders["int4"]
    ids = torch.randint(5, 128, (1500,), generator=torch.Generator().manual_seed(0))
    tokens = TokenText(ids, ids[:0], "random")
    model, words = coreskip.load(folder)
    cap = least(folder, replace(plan_of(model, "static"), weights="packed")) + 1_200_000
    options = {"text": tokens, "memory": cap, "progress": False, "windows": 2}
    plan = coreskip.analyze(model, words, method="static", keep=0.5, **options)
    assert {"memory", "in_memory", "read_per_token"} <= plan.recipe.keys()
    assert plan.recipe["read_per_token"] == "0.0 MB"
    plan.save(tmp_path / "plan")
    with pytest.raises(SystemExit):
        main(["show", str(tmp_path / "plan")])
    assert "read_per_token 0.0 MB" in capsys.readouterr().out
    found = coreskip.analyze(model, words, budget="kl<1000", **options)
    assert found.recipe["read_per_token"] == "0.0 MB"  # what reads nothing is fastest
    assert not any(layer.neurons.name in ("sketch", "topk", "cats", "teal", "wina") for layer in found.layers)
    with pytest.raises(CoreskipError, match="no plan of method topk is run"):
        coreskip.analyze(model, words, method="topk", **options)
    with pytest.raises(CoreskipError, match="for the neurons that the plan keeps"):
        coreskip.analyze(model, words, method="core", keep=0.99, **{**options, "memory": least(folder)})
    assert memory.cap_of(model) is None


def test_matrices_give_way_to_long_texts_and_come_back(folders: dict[str, Path]) -> None:
    folder = folders["bfloat16"]
    plain, model = coreskip.load(folder)[0], capped(folder, 0.5)
    with torch.no_grad(), coreskip.wrap(plain), coreskip.wrap(model):
        found = runtime_of(model).memory
        assert isinstance(found, memory.Capped)
        before = found.kept_bytes
        long = prompt(1, 90)
        assert torch.equal(greedy(model, long, 40), greedy(plain, long, 40))
        between = found.kept_bytes
        assert between < before
        assert between + found.needs.always + found.needs.of_text(1, 90, 130) <= found.cap
        assert torch.equal(greedy(model, prompt(1, 4), 4), greedy(plain, prompt(1, 4), 4))
        assert found.kept_bytes > between
        with pytest.raises(CoreskipError, match=r"has no room for 1 x \d+ tokens: give .* or shorten"):
            greedy(model, prompt(1, 8), 100_000)


def test_the_first_step_has_room_to_be_compared(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A 3B shape went 137 MB beyond its cap in it, and was killed."""
    model, kept, compare = capped(folders["bfloat16"], 0.5), list[int](), native_check.Comparison._probe

    def watched(self: Any, *arguments: Any) -> None:
        kept.append(found.kept_bytes)
        compare(self, *arguments)

    monkeypatch.setattr(native_check.Comparison, "_probe", watched)
    with torch.no_grad(), coreskip.wrap(model):
        found = runtime_of(model).memory
        assert isinstance(found, memory.Capped)
        greedy(model, prompt(1, 4), 4)
        needs = found.needs.always + found.needs.of_text(1, 4, 8) + found.needs.of_probe(found.probe_keys)
        assert len(kept) == 1
        assert kept[0] + needs <= found.cap
        assert found.kept_bytes > kept[0]  # what that took is for matrices afterwards


def test_looking_at_a_packed_model_does_not_change_it(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Its layers were in training mode, and out of it while they were observed: steps were proved three times."""
    caplog.set_level("DEBUG", logger="coreskip")
    for weights, cap in (("int4", None), ("bfloat16", cap_at(folders["bfloat16"], 0.5))):
        model, _ = coreskip.load(folders[weights], memory=cap)
        assert not any(module.training for module in model.modules())
        text_of(model, prompt(1, 9))
    told = [record.getMessage() for record in caplog.records]
    assert not any("were changed" in text for text in told)
    assert sum("run natively" in text for text in told) == 2


def test_a_cap_for_all_of_it_changes_nothing(folders: dict[str, Path]) -> None:
    model, ids = coreskip.load(folders["int4"], memory="1GB")[0], prompt(1, 9)
    with torch.no_grad(), coreskip.wrap(model):
        assert runtime_of(model).memory.cap is None
        layer = model.model.layers[0].mlp.up_proj
        assert residency.of(layer.parts()[0].weight.data_ptr()) is None
        assert torch.equal(greedy(model, ids), text_of(coreskip.load(folders["int4"])[0], ids))


def test_caps_change_between_wraps(folders: dict[str, Path]) -> None:
    model, ids = coreskip.load(folders["int4"])[0], prompt(1, 9)
    expected = text_of(model, ids)
    for share in (0.2, 0.7, 0.4):
        assert torch.equal(text_of(model, ids, memory=cap_at(folders["int4"], share)), expected)
    assert torch.equal(text_of(model, ids), expected)


def test_without_direct_reads(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_go_direct", lambda fd: False)
    ids = prompt(1, 9)
    expected = text_of(coreskip.load(folders["int8"])[0], ids)
    assert torch.equal(text_of(capped(folders["int8"], 0.3), ids), expected)


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_a_file_that_is_truncated_meanwhile(weights: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders[weights], tmp_path / "p"))
    words = coreskip.load(folder)[1]
    model = capped(folder, 0.3)
    with Engine(model, words) as engine:
        expected = engine.generate("w5 w6 w7", max_new_tokens=8)
        pieces = engine.stream("w5 w6 w7", max_new_tokens=200)
        got = [next(pieces)]
        os.truncate(folder / WEIGHTS, 3 * os.path.getsize(folder / WEIGHTS) // 4)
        with pytest.raises(CoreskipError, match="cannot read the weights any more"):
            got.extend(pieces)
        assert "".join(got).startswith(expected[:10]) or expected.startswith("".join(got))
        with pytest.raises(CoreskipError, match="cannot read the weights any more"):
            engine.generate("w5 w6 w7", max_new_tokens=8)


def test_a_folder_that_is_replaced_goes_on_as_it_was(folders: dict[str, Path], tmp_path: Path) -> None:
    coreskip.pack(tiny("llama", **LARGER), tokenizer(), tmp_path / "p", weights="int8", progress=False)
    model, ids = capped(tmp_path / "p", 0.3), prompt(1, 9)
    expected = text_of(model, ids)
    coreskip.pack(tiny("llama", seed=5, **LARGER), tokenizer(), tmp_path / "p", weights="int8", progress=False)
    assert torch.equal(text_of(model, ids), expected)


def test_changes_to_weights_are_refused(folders: dict[str, Path]) -> None:
    folder, ids = folders["bfloat16"], prompt(1, 9)
    with torch.no_grad(), coreskip.wrap(capped(folder, 0.3)) as model:
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
        with pytest.raises(CoreskipError, match="a packed matrix cannot be changed"):
            greedy(model, ids, 2)
    model = coreskip.load(folder)[0]
    with torch.no_grad(), coreskip.wrap(model, memory=cap_at(folder, 0.3)):
        greedy(model, ids, 2)
        with pytest.raises(CoreskipError, match="cannot move or cast"):
            model.float()
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
        with pytest.raises(CoreskipError, match="cannot write to its weights"):
            greedy(model, ids, 2)


def test_the_checksum_of_a_folder_is_checked_sparingly(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["int4"], tmp_path / "p"))
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(500_000)
        byte = file.read(1)
        file.seek(500_000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CoreskipError, match="damaged: its contents are not what was written"):
        coreskip.load(folder, memory="1GB")


def test_a_checksum_is_the_sum_of_its_parts() -> None:
    memory = torch.randint(0, 256, (100_003,), dtype=torch.uint8)
    parts = [(0, 4096), (4096, 65_536), (65_536, 100_003)]
    assert checksum(memory) == sum(checksum(memory[a:b], a // 8) for a, b in parts) % 2**64


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9),
        ("512MB", 512 * 10**6),
        ("1.5GiB", 3 << 29),
        ("1.5 gib", 3 << 29),
        ("800", 800),
        ("2T", 2 * 10**12),
        ("64KiB", 1 << 16),
        (12345, 12345),
        (2.0e9, 2 * 10**9),
    ],
)
def test_sizes(text: Any, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "4 G B", "0", "0%", "101%", "four", True, None, -5, float("nan"), [4]]
)
def test_sizes_that_make_no_sense(text: Any) -> None:
    with pytest.raises(CoreskipError, match="memory is "):
        bytes_of(text)


def test_a_share_of_what_is_free(tmp_path: Path) -> None:
    assert 0 < bytes_of("50%") <= free_memory()
    for version, names in {1: ("limit_in_bytes", "usage_in_bytes"), 2: ("max", "current")}.items():
        root = tmp_path / str(version)
        group = root / "sys/fs/cgroup" / ("memory" if version == 1 else "") / "mine"
        group.mkdir(parents=True)
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/cgroup").write_text("4:memory:/mine\n" if version == 1 else "0::/mine\n")
        (group / f"memory.{names[0]}").write_text("3000000\n")
        (group / f"memory.{names[1]}").write_text("2000000\n")
        (group / "memory.stat").write_text(
            "cache 5\ntotal_inactive_file 500000\n" if version == 1 else "inactive_file 500000\n"
        )
        assert free_memory(root) == 1_500_000


def test_what_stays_is_spread_evenly() -> None:
    sizes = [(f"{layer}.{name}", 10 if name == "mlp" else 2) for layer in range(12) for name in ("attention", "mlp")]
    kept = memory.spread(sizes, 72)
    assert sum(dict(sizes)[name] for name in kept) == 72
    halves = [sum(dict(sizes)[n] for n in kept if (int(n.split(".")[0]) < 6) is first) for first in (True, False)]
    assert abs(halves[0] - halves[1]) <= 12
    assert memory.spread(sizes, 0) == []
    assert len(memory.spread(sizes, 1000)) == 24


def test_mistakes(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CoreskipError, match="memory caps packed models"):
        coreskip.load(memory="1GB")
    with pytest.raises(CoreskipError, match="memory caps packed models"):
        coreskip.wrap(tiny("llama"), memory="1GB")
    folder = folders["bfloat16"]
    for options in ({"dtype": "float32"}, {"packed": False}):
        with pytest.raises(CoreskipError, match="runs as it was packed"):
            coreskip.load(folder, memory="1GB", **options)
    model = coreskip.load(folder)[0]
    with pytest.raises(CoreskipError, match="format it was packed in, not in int4"):
        coreskip.wrap(model, Plan.dense(model, "int4"), memory=cap_at(folder, 0.4))
    with pytest.raises(CoreskipError, match="plain transformers"):
        Engine(model, tokenizer(), plain=True, memory="1GB")
    for arguments in (
        ["generate", str(folder), "--memory", "lots", "-p", "w5"],
        ["generate", str(folder), "--memory", "1KB", "-p", "w5"],
        ["generate", str(folder), "--memory", "1GB", "--weights", "int4", "-p", "w5"],
        ["generate", "--memory", "1GB", "-p", "w5"],
        ["chat", str(folder), "--memory", "1GB", "--plain"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1


def test_commands(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, cap = folders["int8"], str(cap_at(folders["int8"], 0.5))
    texts = []
    for more in ([], ["--memory", cap]):
        with pytest.raises(SystemExit) as stop:
            main(["generate", str(folder), "-p", "w5 w6", "--max-new-tokens", "9", *more])
        assert not stop.value.code
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--memory", "4GB"], "a cap is on a packed model: run `coreskip pack -o FOLDER`"),
        (["FOLDER", "--memory", "lots"], "memory is 'lots'"),
        (["FOLDER", "--memory", "0.5", "--rounds", "2"], "are asked alone: leave out --rounds"),
    ],
)
def test_bench_under_a_cap_refuses_at_once(
    words: list[str], error: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", *(str(folders["int4"]) if word == "FOLDER" else word for word in words)])
    assert end.value.code == 2
    assert error in capsys.readouterr().err


def test_bench_under_a_cap(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is run is noted here, not run: it drops the machine's page cache."""
    asked: list[tuple[Any, ...]] = []

    def run(way: str, _: Path, *rest: Any, **__: Any) -> Any:
        cap, plan, tokens, limit = rest[:4]
        asked.append((way, cap, plan, tokens, limit is None))
        figures = {"tokens_per_second": 4.0, "first_token_s": 0.1, "bytes_read_per_token": 5e6}
        return {**figures, "major_faults_per_token": 0, "peak_bytes": None, "text": [1, 2, 3], "grouped": False}

    monkeypatch.setattr(benchmark, "run_way", run)
    rows, folder = tmp_path / "rows.jsonl", folders["int4"]
    plan_of(coreskip.load(folder)[0], "static", 0.5).save(tmp_path / "half")
    words = ["--memory", "4MB", "--memory", "0.5", "--plan", str(tmp_path / "half"), "--tokens", "16"]
    with pytest.raises(SystemExit) as end:
        main(["bench", str(folder), *words, "--json", str(rows)])
    assert not end.value.code, capsys.readouterr().err
    half = os.path.getsize(folder / WEIGHTS) // 2
    assert [cap for _, cap, *_ in asked] == [None, None, 4_000_000, None, 4_000_000, half, None, half], (
        "mapped has none"
    )
    assert [free for *_, free in asked] == [True, True, *[False] * 6], "what texts are compared with"
    assert [plan is None for _, _, plan, *_ in asked] == [True, False, True, True, False, True, True, False]
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["way"] for row in found] == ["no cap", *["memory", "mapped", "memory, half"] * 2]
    assert all(row["same_text"] for row in found)
