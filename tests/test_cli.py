"""The command line: results on stdout, mistakes in one line with exit code 2, nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_models import plan_of, tiny

from coreskip.cli import main
from coreskip.predictors.plan import Plan


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
    assert out.count("+ adaptive alpha=0.8") == 3
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
