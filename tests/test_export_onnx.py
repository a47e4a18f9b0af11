"""Models under plans as ONNX decoders, held against the plain checkpoint of the same plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import tokenizer
from tiny_models import greedy, plan_of, prompt, tiny
from transformers import AutoModelForCausalLM

import coreskip
from coreskip import CoreskipError, cli
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import Run, Skip, SkipAttention, SkipMLP

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

from coreskip.runtime import export_onnx, export_onnx_graph  # noqa: E402
from coreskip.runtime.onnx_engine import OnnxEngine  # noqa: E402
from coreskip.runtime.onnx_neurons import NeuronInputs, NeuronSession  # noqa: E402

FAMILIES = ["llama_bias", "mistral", "qwen3", "phi3", "gemma2", "gemma3_text", "olmo2", "cohere", "granite", "smollm3"]


def plan_with(model: Any, *policies: Any) -> Plan:
    """Seven tenths of the neurons, and these layer policies in turn."""
    plan = plan_of(model, "static", 0.7)
    layers = [LayerPlan(layer.neurons, policies[i % len(policies)]) for i, layer in enumerate(plan.layers)]
    return Plan(tuple(layers), plan.model, plan.recipe)


def both(model: Any, plan: Plan | None, folder: Path, **options: Any) -> tuple[Any, Any]:
    """The plain checkpoint, and a session of the ONNX model."""
    coreskip.export(model, tokenizer(), folder / "hf", plan=plan, progress=False)
    coreskip.export(model, tokenizer(), folder / "onnx", plan=plan, to="onnx", progress=False, **options)
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    return AutoModelForCausalLM.from_pretrained(folder / "hf").eval(), session


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_off_by_rounding(family: str, tmp_path: Path) -> None:
    """A prompt and steps that reach beyond sliding windows; a skipped layer, and neurons left out."""
    model, ids = tiny(family), prompt(1, 40)
    plain, session = both(model, plan_with(model, Run(), Skip(), Run()), tmp_path)
    assert len(session.get_outputs()) == 1 + 2 * 2
    got = torch.from_numpy(export_onnx.decoded(session, ids.numpy(), 20)).double()
    with torch.no_grad():
        usual = plain(ids).logits.double()
        exact = plain.double()(ids).logits
    allowed = 2 * (usual - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (got - exact).abs().max() <= allowed


def test_skipped_halves_are_gone(tmp_path: Path) -> None:
    model = tiny("llama")
    plain, session = both(model, plan_with(model, SkipAttention(), Run(), SkipMLP()), tmp_path)
    assert len(session.get_outputs()) == 1 + 2 * 2, "a layer without attention has no cache"
    settings = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    assert settings["model"]["decoder"]["num_hidden_layers"] == 2
    got = torch.from_numpy(export_onnx.decoded(session, prompt(1).numpy(), 4))
    with torch.no_grad():
        torch.testing.assert_close(got, plain(prompt(1)).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", ["float16", "int4"])
def test_narrow_weights_take_fewer_bytes(weights: str, tmp_path: Path) -> None:
    """That they compute the numbers written is checked by the export itself."""
    model, sizes = tiny("llama", hidden_size=128, intermediate_size=512), {}
    for each in ("float32", weights):
        out = coreskip.export(model, tokenizer(), tmp_path / each, to="onnx", weights=each, progress=False)
        sizes[each] = (out / "model.onnx.data").stat().st_size
    assert sizes[weights] < {"float16": 0.51, "int4": 0.25}[weights] * sizes["float32"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["float32", "float16", "int4"])
def test_a_model_in_halves_is_compared_in_the_graphs_arithmetic(
    dtype: torch.dtype, weights: str, tmp_path: Path
) -> None:
    """Rounding between the model's own layers is no fault of the graph's, and the model stays in its dtype."""
    model = tiny("llama", hidden_size=128, intermediate_size=512).to(dtype)
    coreskip.export(model, tokenizer(), tmp_path / "out", to="onnx", weights=weights, progress=False)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [32, 96, 160])
def test_blocks_hold_the_nearest_numbers(bits: int, inputs: int) -> None:
    weight = torch.randn(6, inputs, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    off = (export_onnx_graph.rounded(weight, bits) - weight).abs().unflatten(1, (-1, 32))
    span = weight.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True)
    assert bool((off <= span * (1.01 / 15 if bits == 4 else 0.51 / 127) + 1e-7).all())


def test_a_graph_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_onnx_graph.Decoder, "_act", lambda self, act, x: x)
    for weights in ("float32", "float16", "int4"):
        with pytest.raises(CoreskipError, match="ONNX Runtime's logits are off by"):
            coreskip.export(tiny("llama"), tokenizer(), tmp_path / "out", to="onnx", weights=weights, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["opt", "mixtral", "phi", "bloom", "deepseek_v3"])
def test_what_the_description_or_the_operators_do_not_know(family: str, tmp_path: Path) -> None:
    with pytest.raises(CoreskipError, match="models cannot be written as ONNX: ") as refusal:
        coreskip.export(tiny(family), tokenizer(), tmp_path / "out", to="onnx", progress=False)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "olmo2"])
def test_core_neurons_are_chosen_by_the_prompt_as_here(family: str, tmp_path: Path) -> None:
    """The text of the wrapped model, read by the graph: after every token the likeliest is the one that follows."""
    model = tiny(family)
    plan = plan_of(model, "griffin", 0.4)
    out = coreskip.export(model, tokenizer(), tmp_path / "out", plan=plan, to="onnx", progress=False)
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    neurons = NeuronInputs.load(out)
    assert neurons is not None
    assert neurons.nbytes_chosen == pytest.approx(0.4 * neurons.nbytes, rel=0.02)
    sets = []
    for seed in range(3):
        ids = prompt(1, 9 + seed, seed=seed)
        with coreskip.wrap(model, plan):
            text = greedy(model, ids, 12)
        chosen: list[dict[str, Any]] = []
        logits = export_onnx.decoded(session, text.numpy(), ids.shape[1], neurons, chosen.append)
        assert logits.argmax(-1)[0, ids.shape[1] - 1 : -1].tolist() == text[0, ids.shape[1] :].tolist()
        sets.append(chosen[0]["layers.0.mlp.down"].tobytes())
        assert chosen[0]["layers.0.mlp.down"].shape == (64, 64)
    assert len(set(sets)) == 3, "every prompt has its own"


@pytest.mark.parametrize(
    ("family", "plan", "options", "error"),
    [
        ("llama", ("griffin", 0.5), {"weights": "int4"}, "neurons in 4-bit blocks cannot be chosen by a prompt"),
        ("llama", ("signed", 0.5), {}, "chooses by each prompt"),
        ("starcoder2", ("griffin", 0.5), {}, "its MLPs have biases"),
        ("llama", ("similar", 0.5), {}, "chooses by each prompt"),
    ],
)
def test_choices_that_cannot_travel(
    family: str, plan: tuple[str, float], options: dict[str, Any], error: str, tmp_path: Path
) -> None:
    model = tiny(family)
    with pytest.raises(CoreskipError, match=error):
        coreskip.export(
            model, tokenizer(), tmp_path / "out", plan=plan_of(model, *plan), to="onnx", progress=False, **options
        )
    assert not list(tmp_path.iterdir())


def test_damaged_neurons_are_one_line(tmp_path: Path) -> None:
    model = tiny("llama")
    out = coreskip.export(
        model, tokenizer(), tmp_path / "out", plan=plan_of(model, "griffin", 0.5), to="onnx", progress=False
    )
    data = (out / "neurons.safetensors").read_bytes()
    for damaged in (data[: len(data) // 2], b"", data[:8] + b"x" * 40 + data[48:]):
        (out / "neurons.safetensors").write_bytes(damaged)
        with pytest.raises(CoreskipError, match="is damaged"):
            NeuronInputs.load(out)


def test_core_neurons_generate_in_onnxruntime(tmp_path: Path) -> None:
    model = tiny("llama", max_position_embeddings=512)
    plan = plan_of(model, "griffin", 0.4)
    out = coreskip.export(model, tokenizer(), tmp_path / "out", plan=plan, to="onnx", progress=False)
    neurons = NeuronInputs.load(out)
    assert neurons is not None
    session = NeuronSession(out, neurons, threads=1)
    for seed in (3, 4, 3):
        ids = prompt(1, 11, seed=seed)
        with coreskip.wrap(model, plan):
            text = greedy(model, ids, 16)[0, 11:].tolist()
        logits, made = session.begin(ids[0].tolist(), 40), []
        for _ in text:
            made.append(int(logits.argmax()))
            logits = session.step(made[-1])
        assert made == text
    with OnnxEngine(out) as engine:
        for options in ({}, {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}):
            texts = ["".join(engine.stream("some words", max_new_tokens=6, seed=5, **options)) for _ in range(2)]
            assert texts[0] == texts[1]
            assert engine.figures is not None
            assert 1 <= engine.figures.new_tokens <= 6
        with pytest.raises(CoreskipError, match="the model holds 512 tokens"):
            list(engine.stream("some words", max_new_tokens=512))


def test_onnxruntime_genai_generates_the_same_text(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    from coreskip.bench.peers import OnnxFolder
    from coreskip.bench.runner import Job

    model, ids = tiny("qwen3", max_position_embeddings=512), prompt(1, 12)
    plain, _ = both(model, plan_with(model, Run(), Skip(), Run()), tmp_path)
    runner = OnnxFolder(Job("onnxruntime-folder", "float32", model=str(tmp_path / "onnx"), context=64))
    runner.load()
    try:
        assert runner.generate(ids[0].tolist(), 40).tokens == greedy(plain, ids, 40)[0, 12:].tolist()
        assert runner.weight_bytes() < 4 * sum(p.numel() for p in plain.parameters())
    finally:
        runner.close()


def test_an_onnx_model_is_not_loaded_as_a_model(tmp_path: Path) -> None:
    out = coreskip.export(tiny("llama"), tokenizer(), tmp_path / "out", to="onnx", progress=False)
    with pytest.raises(CoreskipError, match="generate --backend onnxruntime"):
        coreskip.load(out)


def test_generate_runs_it(embedded: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime_genai")
    words, model = embedded[1], tiny("llama", vocab_size=49152)
    out = coreskip.export(model, words, tmp_path / "out", to="onnx", progress=False)
    with pytest.raises(SystemExit) as end:
        cli.main(
            ["generate", "--backend", "onnxruntime", str(out), "-p", "The ferry", "--max-new-tokens", "8", "--stats"]
        )
    shown = capsys.readouterr()
    ids = torch.tensor([words("The ferry").input_ids])
    new = greedy(model, ids, 8)[0, ids.shape[1] :]
    assert end.value.code == 0
    assert shown.out.strip() == words.decode(new, skip_special_tokens=True).strip()
    assert "8 tokens" in shown.err
