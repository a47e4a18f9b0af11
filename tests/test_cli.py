"""The command line: results on stdout, mistakes in one line with exit code 2, nothing written."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import plan_of, tiny

from coreskip import Engine
from coreskip.cli import main
from coreskip.kernels.ops import available
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.runtime.conversation import Conversation
from coreskip.runtime.cost import bytes_per_token
from coreskip.runtime.wrap import is_wrapped, runtime_of


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, embedded: tuple[Any, Any]) -> Path:
    """A tiny llama with the embedded model's tokenizer, on disk."""
    path = tmp_path_factory.mktemp("tiny")
    _, tokenizer = embedded
    tiny("llama", vocab_size=len(tokenizer), eos_token_id=2, max_position_embeddings=512).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("The old ferry crossed the river twice a day, and nobody ever asked why it came back empty. " * 60)
    return path


def test_analyze_show_generate_eval(
    capsys: pytest.CaptureFixture[str], folder: Path, story: Path, tmp_path: Path
) -> None:
    plan, figures = str(tmp_path / "my.plan"), tmp_path / "eval.json"
    code, out, _ = run(
        capsys, "analyze", str(folder), "-o", plan, "--method", "core", "--keep", "0.5", "--text", str(story)
    )
    assert (code, "keeps        50.0%" in out) == (0, True)
    assert "story.txt" in out
    code, shown, _ = run(capsys, "show", plan)
    assert code == 0
    assert shown.strip() in out
    code, sparse, _ = run(capsys, "generate", str(folder), "--plan", plan, "--max-new-tokens", "5", "-p", "The ferry")
    assert code == 0
    assert sparse.strip()
    code, out, _ = run(
        capsys, "eval", str(folder), "--plan", plan, "--text", str(story), "--windows", "2", "--window", "64",
        "--json", str(figures),
    )  # fmt: skip
    assert code == 0
    assert "KL(dense || sparse)" in out
    found = json.loads(figures.read_text())
    assert set(found) >= {"dense", "sparse", "ppl_increase", "kl", "top1_agreement", "neuron_sparsity", "tokens"}
    assert found["dense"]["ppl"] > 0
    assert found["neuron_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert found["tokens"] == 64


def test_analyze_leaves_layers_out(
    capsys: pytest.CaptureFixture[str], folder: Path, story: Path, tmp_path: Path
) -> None:
    plan = str(tmp_path / "layers.plan")
    words = ("analyze", str(folder), "-o", plan, "--text", str(story), "--layers")
    code, out, _ = run(capsys, *words, "skip-mlp:1")
    assert (code, out.count("+ skip_mlp")) == (0, 1)
    assert "keeps        66.7%" in out
    assert "void layers" in run(capsys, "show", plan)[1]
    code, out, _ = run(capsys, *words, "every:2", "--method", "core", "--keep", "0.5")
    assert (code, out.count("+ skip"), out.count("core_neurons")) == (0, 1, 3)
    code, out, _ = run(capsys, *words, "adaptive:0.8")
    assert out.count("+ adaptive alpha=0.8") == 1
    assert "\n   0-2  dense + adaptive alpha=0.8" in out
    assert "not measured" not in out
    for wrong in ("skip", "skip:0", "skip:1.5", "every:1", "adaptive:-1", "adaptive:nan", "some:3"):
        assert run(capsys, *words, wrong)[0] == 2
    code, _, err = run(capsys, *words, "skip:4")
    assert (code, "more layers than the model's 3" in err) == (2, True)


def test_generate_samples_by_seed(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    words = ("generate", str(folder), "-p", "The", "--max-new-tokens", "6", "--temperature", "2.0", "--seed")
    assert run(capsys, *words, "1")[1] == run(capsys, *words, "1")[1] != run(capsys, *words, "2")[1]


def test_generate_exact_is_the_dense_text(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    plan = str(tmp_path / "absurd.plan")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    plan_of(model, "griffin", 0.05).save(plan)
    words = ("generate", str(folder), "-p", "The ferry and the ferry and the", "--max-new-tokens", "12")
    dense = run(capsys, *words, "--exact")
    drafted = run(capsys, *words, "--exact", "--plan", plan)
    assert dense[:2] == drafted[:2] == (0, run(capsys, *words)[1])
    assert "exact: 12 tokens" in drafted[2]


def test_show_json_and_folded_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, plan = tiny("llama", num_hidden_layers=5), str(tmp_path / "p.plan")
    made = plan_of(model, "griffin", 0.5)
    layers = (*made.layers[:2], LayerPlan(), *made.layers[3:])
    replace(made, layers=layers, weights="int8").save(plan)
    out = run(capsys, "show", plan)[1]
    assert [line.split()[:2] for line in out.splitlines() if "/ 160" in line] == [
        ["0-1", "core_neurons"], ["2", "dense"], ["3-4", "core_neurons"],
    ]  # fmt: skip
    found = json.loads(run(capsys, "show", plan, "--json")[1])
    assert (found["weights"], found["keep"]) == ("int8", pytest.approx(0.6))
    assert [layer["kept"] for layer in found["layers"]] == [80, 80, 160, 80, 80]
    assert found["layers"][0]["neurons"] == {"policy": "core_neurons", "alpha": 0.4, "beta": 0.5, "score": "griffin"}
    assert repr(Plan.load(plan)) == "Plan(griffin, keep 60.0%, int8; 5 layers of llama)"


def test_what_was_observed_is_shown(
    capsys: pytest.CaptureFixture[str], folder: Path, story: Path, tmp_path: Path
) -> None:
    words = ["analyze", str(folder), "-o", str(tmp_path / "p.plan"), "--text", str(story), "--method", "static"]
    out = run(capsys, *words, "--tokens", "256", "--windows", "2")[1]
    calibration = Plan.load(tmp_path / "p.plan").calibration
    assert calibration["observed"] == 256 < calibration["tokens"]
    assert "observed 256" in out


def test_generate_from_files_stdin_and_lines(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("generate", str(folder), "--max-new-tokens", "5")
    expected = run(capsys, *words, "-p", "The ferry")[1]
    (tmp_path / "one.txt").write_text("The ferry\n")
    assert run(capsys, *words, "--prompt-file", str(tmp_path / "one.txt"))[1] == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("The ferry\n"))
    assert run(capsys, *words, "-p", "-")[1] == expected
    lines = ['"The ferry"', '{"prompt": "A river"}', "", '{"messages": [{"role": "user", "content": "Hi"}]}']
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    many = ("--prompt-file", str(tmp_path / "all.jsonl"))
    code, out, _ = run(capsys, *words, *many, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row.get("prompt") for row in rows] == ["The ferry", "A river", None]
    assert rows[2]["messages"][0]["content"] == "Hi"
    assert rows[0]["text"] + "\n" == expected
    assert all(row["new_tokens"] <= 5 and row["seconds"] > 0 and row["peak_memory"] > 0 for row in rows)
    out = run(capsys, *words, *many)[1]
    assert out.split("---\n") == [row["text"] + "\n" for row in rows]


def test_generate_samples_several(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    words = ("generate", str(folder), "-p", "The", "--max-new-tokens", "6", "--seed", "1", "-n", "3", "--top-k", "40")
    _, out, err = run(capsys, *words, "--temperature", "1.5", "--top-p", "0.9", "--json", "--stats")
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 3
    assert len({row["text"] for row in rows}) > 1
    assert "tokens at" in err
    assert "peak memory" in err


def test_generate_runs_as_it_is_told(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense on the fast path by default, plain transformers where that is asked for: the same text."""
    made: list[Any] = []
    original = Engine.__init__

    def noted(self: Engine, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        made.append((is_wrapped(self.model), runtime_of(self.model).plan.weights if is_wrapped(self.model) else None))

    monkeypatch.setattr(Engine, "__init__", noted)
    threads = torch.get_num_threads()
    words = ("generate", str(folder), "-p", "The ferry and the ferry and the", "--max-new-tokens", "8")
    try:
        texts = [
            run(capsys, *words, *more)[1]
            for more in ((), ("--plain",), ("--lookup",), ("--temperature", "0"), ("--threads", "1"))
        ]
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert len(set(texts)) == 1
    assert made == [(True, None), (False, None), *[(True, None)] * 3]
    if available("cpu") is None:
        assert run(capsys, *words, "--weights", "int8")[0] == 0
        assert made[-1] == (True, "int8")


def test_eval_without_a_plan(capsys: pytest.CaptureFixture[str], folder: Path, story: Path, tmp_path: Path) -> None:
    words = ("eval", str(folder), "--text", str(story), "--windows", "2", "--window", "64", "--json", "-")
    found = json.loads(run(capsys, *words)[1])
    assert abs(found["kl"]) < 1e-5
    if available("cpu") is None:
        assert json.loads(run(capsys, *words, "--weights", "int4")[1])["kl"] > 1e-4


def test_info(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "info", str(folder), "--json")
    found = json.loads(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert code == 0
    assert (found["model_type"], found["layers"], found["dtype"]) == ("llama", 3, "float32")
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["formats"]["as loaded"]["bytes_per_token"] == bytes_per_token(model, Plan.dense(model))
    if available("cpu") is None:
        assert (found["native"], found["reason"]) == (True, None)
        sizes = [found["formats"][name]["bytes_per_token"] for name in ("int4", "int8", "as loaded")]
        assert sizes == sorted(sizes)
    tiny("doge", vocab_size=128).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    out = run(capsys, "info", str(tmp_path))[1]
    assert "3 of 6 halves of layers native, the others on modules: " in out
    assert "doge, " in out


def test_chat(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("chat", str(folder), "--system", "Be brief.", "--max-new-tokens", "5")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nWhy?\n/exit\nnever\n"))
    code, out, err = run(capsys, *words, "--stats")
    assert (code, err.count("coreskip: ")) == (0, 2)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with Engine(model, transformers.AutoTokenizer.from_pretrained(folder)) as engine:
        conversation = Conversation(engine, system="Be brief.", max_new_tokens=5, do_sample=False)
        expected = ["".join(conversation.send(text)) for text in ("Hello", "Why?")]
    assert out == "".join(f"{text}\n" for text in expected)


def test_mistakes(capsys: pytest.CaptureFixture[str], folder: Path, story: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.plan"
    plan_of(tiny("qwen2"), "static").save(other)
    empty, short, target = tmp_path / "empty.txt", tmp_path / "short.txt", str(tmp_path / "new.plan")
    empty.write_text(" \n")
    short.write_text("Too short.")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    model = str(folder)
    for words, match in (
        (["nonsense"], "No such command"),
        (["analyze", model], "Missing option"),
        (["analyze", model, "-o", target, "--keep", "0"], "keep is 0.0"),
        (["analyze", model, "-o", target, "--keep", "1.2"], "keep is 1.2"),
        (["analyze", model, "-o", target, "--keep", "much"], "not a valid float"),
        (["analyze", model, "-o", target, "--method", "magic"], "unknown method"),
        (["analyze", model, "-o", target, "--budget", "free"], "cannot read the budget"),
        (["analyze", model, "-o", target, "--method", "layers", "--layers", "skip:1"], "give one of them"),
        (["analyze", model, "-o", target, "--text", str(tmp_path / "none.txt")], "cannot read the text"),
        (["analyze", model, "-o", target, "--text", str(empty)], "is empty"),
        (["analyze", model, "-o", target, "--text", str(short)], "at least 100 are needed"),
        (["analyze", model, "-o", target, "--dtype", "int3"], "unknown dtype"),
        (["analyze", model, "-o", target, "--device", "abacus"], "no device"),
        (["analyze", model, "-o", str(story), "--keep", "0.5"], "not a plan folder"),
        (["analyze", str(tmp_path / "folder"), "-o", target], "no config.json"),
        (["analyze", "/no/such/folder", "-o", target], "no model folder"),
        (["analyze", "none.gguf", "-o", target], "no file"),
        (["analyze", str(tmp_path / "broken.gguf"), "-o", target], "cannot load"),
        (["show", str(tmp_path / "none.plan")], "no plan at"),
        (["generate", model, "--plan", str(other), "-p", "x"], "made for a model with"),
        (["generate", model, "-p", ""], "empty"),
        (["eval", model, "--plan", str(other), "--text", str(story)], "made for a model with"),
        (["eval", model, "--plan", str(other), "--json", "/no/such/file.json"], "no folder"),
    ):
        code, out, err = run(capsys, *words)
        lines = [line for line in err.splitlines() if line]
        assert (code, out) == (2, ""), words
        assert match in lines[-1], (words, err)
        assert lines[-1].startswith("coreskip: ")
        assert "Traceback" not in err
    assert not Path(target).exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_masked_language_model_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    code, _, err = run(capsys, "analyze", str(tmp_path), "-o", str(tmp_path / "x.plan"))
    assert code == 2
    assert "not a causal language model" in err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[0] == 0
    code, out, _ = run(capsys, "analyze", "--help")
    assert code == 0
    assert "--budget" in out
    assert Plan.__doc__


AT_ONCE = [
    ["analyze", "-o", "x", "--budget", "kl<0"], ["analyze", "-o", "-"], ["analyze", "-o", "x", "--layers", "skip"],
    ["analyze", "-o", "x", "--method", "core", "--rank", "3"], ["analyze", "-o", "x", "--weights", "int3"],
    ["analyze", "-o", "x", "--allocation", "best"], ["analyze", "-o", "x", "--tokens", "0"],
    ["generate", "-p", "x", "--seed", "3"], ["generate"], ["generate", "-p", "x", "--temperature", "1e-300"],
    ["generate", "-p", "x", "--plain", "--exact"], ["generate", "-p", "x", "-n", "2"], ["generate", "-p", ""],
    ["chat", "--top-p", "0.5"], ["chat", "--plain", "--weights", "int4"], ["chat", "--temperature", "-1"],
    ["eval", "--window", "5"], ["eval", "--ppl-sparsity", "nan"], ["eval", "--lookup"],
    ["serve", "--plan", "a", "--plan", "b=c"], ["serve", "--api-key", " "], ["serve", "--port", "-1"],
    ["bench", "--weights", "int3"], ["info", "--nonsense"], ["show"], ["nonsense"],
]  # fmt: skip


def test_mistakes_do_not_wait_for_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom coreskip.cli import main\n"
        f"for words in {AT_ONCE!r}:\n"
        "    try: main(words)\n    except SystemExit as end: assert end.code == 2, words\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=False, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr.count("\n")) == (0, len(AT_ONCE)), ran.stderr
