"""A model under a plan, exported: a plain checkpoint computes what the wrapped model computes."""

from __future__ import annotations

import copy
import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import tokenizer
from tiny_models import FAMILIES, plan_of, prompt, tiny
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache
from transformers.pytorch_utils import Conv1D

import coreskip
from coreskip import CoreskipError, cli
from coreskip.predictors.anatomy import FeedForward, dissect
from coreskip.predictors.expert_policies import KeptExperts, SkipExperts
from coreskip.predictors.interventions import PrunedNeurons
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import Adaptive, Run, Skip, SkipAttention, SkipMLP, Static
from coreskip.runtime import export as exporting

#: whose attention of their own cannot be skipped
_OWN_ATTENTION = {"falcon", "falcon_new", "bloom"}


def skipping(plan: Plan, *policies: Any) -> Plan:
    """The plan with these layer policies, in turn."""
    layers = [replace(layer, layer=policies[i % len(policies)]) for i, layer in enumerate(plan.layers)]
    return replace(plan, layers=tuple(layers))


def ragged(model: Any) -> Plan:
    """A static plan whose layers keep different numbers of neurons."""
    plan = plan_of(model, "static", 0.7)
    kept = [Static(layer.neurons.indices[: len(layer.neurons.indices) - 5 * i]) for i, layer in enumerate(plan.layers)]
    return replace(plan, layers=tuple(LayerPlan(neurons) for neurons in kept))


PLANS = {
    "dense": Plan.dense,
    "static": lambda model: plan_of(model, "static", 0.7),
    "every third layer skipped": lambda model: skipping(Plan.dense(model), Run(), Skip(), Run()),
    "both": lambda model: skipping(plan_of(model, "static", 0.7), Run(), Skip(), Run()),
    "halves": lambda model: skipping(Plan.dense(model), SkipAttention(), Run(), SkipMLP()),
    "ragged": ragged,
}


def exported(model: Any, folder: Path, plan: Plan | None, **options: Any) -> Any:
    coreskip.export(model, tokenizer(), folder, plan=plan, progress=False, **options)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def cut(model: Any, plan: Plan) -> Any:
    """What a plan leaves of a model, the slow way: matrices with rows of the kept neurons, layers that return what they
    are given, halves whose output is multiplied by zero."""
    twin = copy.deepcopy(model)
    anatomy = dissect(twin)
    for i, layer in enumerate(plan.layers):
        mlp, attention = anatomy.mlp(i), anatomy.attentions[i]
        assert attention is not None
        if isinstance(layer.neurons, Static):
            _cut_mlp(mlp, layer.neurons.indices)
        if isinstance(layer.layer, Skip):
            anatomy.layers[i].register_forward_hook(_unchanged, with_kwargs=True)
        if isinstance(layer.layer, SkipAttention):
            getattr(attention.module, attention.output).register_forward_hook(lambda *found: found[-1] * 0)
        if isinstance(layer.layer, SkipMLP):
            mlp.down.register_forward_hook(lambda *found: found[-1] * 0)
    return twin


def _unchanged(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    given = args[0] if args else kwargs["hidden_states"]
    return given if isinstance(output, torch.Tensor) else (given, *output[1:])


def _cut_mlp(mlp: FeedForward, kept: torch.Tensor) -> None:
    def rows(linear: Any, chosen: torch.Tensor, dim: int) -> None:
        dim = 1 - dim if isinstance(linear, Conv1D) else dim
        linear.weight = nn.Parameter(linear.weight.detach().index_select(dim, chosen))
        if isinstance(linear, Conv1D):
            linear.nf = linear.weight.shape[1]
        if dim == (1 if isinstance(linear, Conv1D) else 0) and linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.detach()[chosen])

    both = torch.cat([kept, kept + mlp.intermediate_size]) if mlp.stacked else kept
    ups = [mlp.up] if mlp.gate_name is None else [mlp.up, getattr(mlp.owner, mlp.gate_name)]
    rows(mlp.down, kept, 1)
    for linear in ups:
        rows(linear, both, 0)


def aligned(model: Any) -> Any:
    """The model in memory of its own: a product's last bits depend on where its matrix begins."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@pytest.mark.parametrize("kind", [kind for kind in PLANS if kind != "halves"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2", "phi3"])
def test_a_checkpoint_computes_what_the_plan_leaves(family: str, kind: str, tmp_path: Path) -> None:
    model = tiny(family)
    plan = PLANS[kind](model)
    found = aligned(exported(model, tmp_path / "out", plan))
    with torch.no_grad():
        expected, got = cut(model, plan)(prompt()).logits, found(prompt()).logits
    if kind == "ragged":  # with zero neurons among them, sums are added up in another order
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(got, expected)
    whole = sum(p.numel() for p in model.parameters())
    assert (sum(p.numel() for p in found.parameters()) < whole) == (kind != "dense")


def continued(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(token, past_key_values=cache).logits for token in ids.split(1, 1)], 1)


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, "both") for family in sorted({*FAMILIES} - _OWN_ATTENTION)]
    + [(family, kind) for family in ("qwen2", "smollm3") for kind in PLANS if kind != "both"],
)
def test_decode_steps_are_the_wrapped_models(family: str, kind: str, tmp_path: Path) -> None:
    """After one dense token: bit for bit, but for zero neurons among the others (padding) and layers of zeros, whose
    parts cannot be told."""
    model = tiny(family)
    plan, ids = PLANS[kind](model), prompt(1, 20)
    found = exported(model, tmp_path / "out", plan)
    runs = [i for i, layer in enumerate(plan.layers) if layer.layer.attention or layer.layer.mlp]
    assert found.config.num_hidden_layers == len(runs)
    with torch.no_grad():
        cache = model(ids[:, :1], use_cache=True).past_key_values
        own, doubled = (DynamicCache(config=found.config) for _ in range(2))
        own.layers = [copy.deepcopy(cache.layers[i]) for i in runs]
        doubled.layers = copy.deepcopy(own.layers)
        for layer in doubled.layers:
            layer.keys, layer.values, layer.dtype = layer.keys.double(), layer.values.double(), torch.float64
        exact = continued(copy.deepcopy(found).double(), doubled, ids[:, 1:])
        plain = continued(found, copy.deepcopy(own), ids[:, 1:])
        with coreskip.wrap(model, plan):
            expected = continued(model, cache, ids[:, 1:])
        with coreskip.wrap(found):
            got = continued(found, own, ids[:, 1:])
    usual = (plain - exact).abs().max()
    assert (expected - exact).abs().max() <= 2 * usual + 1e-6 * exact.abs().max()
    if kind not in ("ragged", "halves"):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "olmoe", "ernie4_5_moe"])
def test_experts_go_with_their_routers_rows(family: str, tmp_path: Path) -> None:
    """That it computes the same is what the export has checked itself; see the next test."""
    model = tiny(family)
    dense = Plan.dense(model)
    kept = [KeptExperts(torch.arange(1, count, 2)) if count else None for count in dense.model.experts]
    layers = [layer if k is None else replace(layer, experts=k) for layer, k in zip(dense.layers, kept, strict=True)]
    found = exported(model, tmp_path / "out", replace(dense, layers=tuple(layers)))
    counts = [0 if experts is None else experts.count for experts in dissect(found).experts]
    assert counts == [count // 2 for count in dense.model.experts]


def test_an_export_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, real = tiny("mixtral"), exporting.smaller

    def wrong(*args: Any) -> Any:
        found = real(*args)
        gate = found.model.model.layers[0].mlp.gate  # its numbers are the whole model's
        gate.weight = nn.Parameter(-gate.weight)
        return found

    monkeypatch.setattr(exporting, "smaller", wrong)
    with pytest.raises(CoreskipError, match="computes something else than under the plan"):
        coreskip.export(model, tokenizer(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_layers_of_several_kinds_keep_theirs(tmp_path: Path) -> None:
    model = tiny("gemma3_text", num_hidden_layers=6, layer_types=["sliding_attention", "full_attention"] * 3)
    found = exported(model, tmp_path / "out", skipping(Plan.dense(model), Run(), Run(), Skip()))
    assert found.config.layer_types == [model.config.layer_types[i] for i in (0, 1, 3, 4)]


def test_it_loads_where_coreskip_is_not(tmp_path: Path) -> None:
    model = tiny("llama")
    plan = PLANS["both"](model)
    exported(model, tmp_path / "out", plan)
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "ids = AutoTokenizer.from_pretrained(sys.argv[1])('w5 w7 w9', return_tensors='pt').input_ids;"
        "print(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False).tolist());"
        "assert 'coreskip' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path / "out")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([[5, 7, 9]])
    mask = torch.ones_like(ids)
    expected = cut(model, plan).generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=False)
    assert json.loads(done.stdout) == expected.tolist()


def test_what_comes_along(tmp_path: Path) -> None:
    model, words = tiny("llama"), tokenizer()
    words.chat_template = "{{ messages[0]['content'] }}"
    model.generation_config.update(do_sample=True, top_k=7)
    quality = {"dense": {"ppl": 10.0}, "sparse": {"ppl": 10.5}, "ppl_increase": 0.05, "ppl_increase_stderr": 0.01}
    quality |= {"kl": 0.1, "top1_agreement": 0.9, "neuron_sparsity": 0.3, "tokens": 512, "windows": 2, "window": 512}
    plan = replace(PLANS["both"](model), recipe={"method": "static", "seed": 11}, quality={**quality, "text": "a text"})
    out = coreskip.export(
        model, words, tmp_path / "out", plan=plan, weights="bfloat16", command="coreskip export --to hf"
    )
    assert AutoTokenizer.from_pretrained(out).chat_template == words.chat_template
    found = AutoModelForCausalLM.from_pretrained(out)
    assert found.generation_config.top_k == 7
    assert found.dtype == torch.bfloat16
    text = (out / "README.md").read_text()
    for said in ("2 of 3", '"seed": 11', "+5.00%", "coreskip export --to hf", "bfloat16", "prompts go through"):
        assert said in text
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o666 & ~_umask()}


def test_the_card_says_that_weights_were_rounded_before(tmp_path: Path) -> None:
    coreskip.pack(tiny("llama"), tokenizer(), tmp_path / "packed", weights="int4", progress=False)
    for given, said in ((tmp_path / "packed", True), (None, False)):
        model, words = (tiny("llama"), tokenizer()) if given is None else coreskip.load(given, packed=False)
        out = coreskip.export(model, words, tmp_path / f"out-{said}", progress=False)
        assert ("int4, plainly rounded" in (out / "README.md").read_text()) is said


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("llama", lambda m: plan_of(m, "griffin"), "chooses by each prompt .core_neurons.: plans that can travel"),
        ("llama", lambda m: skipping(Plan.dense(m), Adaptive(0.5)), "by each prompt .adaptive.: plans that can travel"),
        ("llama", lambda m: skipping(Plan.dense(m), Skip()), "skips every layer"),
        ("llama", lambda m: _silencing(m), "would have the skill that is switched off"),
        ("mixtral", lambda m: _with_experts(m, SkipExperts(0.5)), "skips experts by each token"),
        ("mixtral", lambda m: _with_experts(m, *(KeptExperts(torch.arange(k)) for k in (4, 5, 6))), "keeps 4 to 6"),
        ("deepseek_v3", lambda m: _with_experts(m, KeptExperts(torch.arange(4))), "chooses groups of experts"),
    ],
)
def test_plans_that_cannot_travel(family: str, change: Any, said: str, tmp_path: Path) -> None:
    model = tiny(family)
    with pytest.raises(CoreskipError, match=said) as refusal:
        coreskip.export(model, tokenizer(), tmp_path / "out", plan=change(model))
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def _silencing(model: Any) -> Plan:
    plan = Plan.dense(model)
    return replace(
        plan, layers=(replace(plan.layers[0], intervention=PrunedNeurons(torch.arange(3))), *plan.layers[1:])
    )


def _with_experts(model: Any, *policies: Any) -> Plan:
    plan = Plan.dense(model)
    layers = [
        replace(layer, experts=policies[i % len(policies)] if count else layer.experts)
        for i, (layer, count) in enumerate(zip(plan.layers, plan.model.experts, strict=True))
    ]
    return replace(plan, layers=tuple(layers))


def test_mistakes_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = tiny("llama"), tokenizer()
    (tmp_path / "there").mkdir()
    for options, said in [
        ({"to": "tflite"}, "exported to hf, onnx, gguf, not to 'tflite'"),
        ({"weights": "int3"}, "hf has no weights 'int3'"),
        ({"folder": tmp_path / "there"}, "exists"),
        ({"plan": plan_of(tiny("qwen3"), "static")}, "made for"),
    ]:
        with pytest.raises(CoreskipError, match=said):
            coreskip.export(model, words, **{"folder": tmp_path / "out", **options})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1000))
    with pytest.raises(CoreskipError, match="MB left"):
        coreskip.export(model, words, tmp_path / "out")
    monkeypatch.undo()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(CoreskipError, match="no room on the disk; nothing of it is left"):
        coreskip.export(model, words, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    exported(model, tmp_path / "out", PLANS["both"](model), weights="bfloat16")
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with coreskip.wrap(model), pytest.raises(CoreskipError, match="wrapped already"):
        coreskip.export(model, tokenizer(), tmp_path / "again")


def test_where_a_configuration_cannot_say_it_there_are_zeros(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("bloom")
    plan = plan_of(model, "static", 0.7)
    with caplog.at_level("WARNING", "coreskip"):
        found = exported(model, tmp_path / "out", plan)
    assert "no setting for the width" in caplog.text
    assert "no setting for the width" in (tmp_path / "out" / "README.md").read_text()
    with torch.no_grad():
        torch.testing.assert_close(found(prompt()).logits, cut(model, plan)(prompt()).logits, rtol=1e-4, atol=1e-4)


def test_of_a_packed_model_the_numbers_are_written(tmp_path: Path) -> None:
    model = tiny("llama")
    coreskip.pack(model, tokenizer(), tmp_path / "packed", weights="int4", progress=False)
    loaded, plain = (coreskip.load(tmp_path / "packed", packed=packed)[0] for packed in (None, False))
    found = exported(loaded, tmp_path / "out", None)
    for name, value in plain.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "--to", "tflite", "-o", "OUT"], "exported to hf, onnx, gguf, not to 'tflite'"),
        (["export", "--to", "gguf", "--weights", "int4", "-o", "OUT"], "gguf has no weights 'int4'"),
        (["export", "--to", "hf", "-o", "THERE"], "exists: name a folder that does not"),
        (["export", "--to", "hf", "--plan", "OUT", "-o", "OUT"], "there is no plan at"),
        (["export", "--to", "hf", "--device", "cuda", "-o", "OUT"], "leave out --device"),
        (["generate", "--backend", "onnxruntime", "THERE", "-p", "x"], "is no ONNX model"),
        (["generate", "--backend", "onnxruntime", "-p", "x"], "name it"),
        (["generate", "--backend", "onnxruntime", "THERE", "--plan", "P", "-p", "x"], "leave out --plan"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    places = {"OUT": str(tmp_path / "out"), "THERE": str(tmp_path / "there")}
    with pytest.raises(SystemExit) as end:
        cli.main([places.get(word, word) for word in arguments])
    shown = capsys.readouterr()
    assert end.value.code == 2
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert not shown.out
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_command_writes_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    PLANS["both"](model).save(tmp_path / "plan")
    with pytest.raises(SystemExit) as end:
        cli.main(
            [
                "export",
                str(tmp_path / "model"),
                "--plan",
                str(tmp_path / "plan"),
                "--to",
                "hf",
                "-o",
                str(tmp_path / "out"),
            ]
        )
    assert end.value.code == 0
    assert "written to" in capsys.readouterr().out
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (found.config.num_hidden_layers, found.config.intermediate_size) == (2, 112)
