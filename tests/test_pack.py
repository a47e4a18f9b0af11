"""Packed models: the same numbers in a folder that is mapped, however it is used."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import on_grid, packed, tokenizer
from tiny_models import FAMILIES, greedy, plan_of, prompt, tiny

import coreskip
from coreskip import CoreskipError, Engine, Plan, PlanError
from coreskip.cli import main
from coreskip.kernels import ops, store
from coreskip.predictors.anatomy import rows_of
from coreskip.runtime.cost import bytes_per_token
from coreskip.runtime.packed_folder import WEIGHTS, describe
from coreskip.runtime.packed_layer import PackedLayer, PackedRows, packed_layers, weight_bytes
from coreskip.runtime.wrap import runtime_of

NO_LIBRARY = ops.available("cpu")
pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))


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
            assert runtime_of(found).steps.native.refusal is None
    assert error[:, -1].square().mean().sqrt() < 0.08 * expected.std()
    assert error[:, -1].abs().max() > 0


@pytest.mark.parametrize("kind", ["static", "griffin", "similar"])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_its_plan_goes_with_it(kind: str, weights: str | None, tmp_path: Path) -> None:
    model = on_grid(tiny("llama"), "int8_groups")
    plan, ids = replace(plan_of(model, kind), weights=weights), prompt(1, 9)
    found = packed(model, tmp_path / "p", plan=plan)
    kept = Plan.load(tmp_path / "p")
    assert kept.weights == (None if weights is None else "packed")
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
    assert sizes[1]["int5"]["tensors"] > 0
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
        ("pack", source, "-o", folder, "--share", "0.8"),
        ("show", tmp_path / "none"),
    ):
        code, _, err = command(capsys, *wrong)
        assert (code, err.count("\n")) == (2, 1), err
    assert describe(folder)["weights"] == "int4"
    code, _, _ = command(capsys, "pack", folder, "-o", tmp_path / "again")
    assert (code, describe(tmp_path / "again")) == (0, describe(folder))
    code, _, _ = command(capsys, "pack", source, "-o", folder)
    assert (code, describe(folder)["weights"]) == (0, None)
    for chosen in ("int4", "int8"):  # of a folder with the model's own numbers
        code, _, _ = command(capsys, "generate", folder, *options, "--weights", chosen)
        assert code == 0


def test_changes_that_would_not_act_are_refused(tmp_path: Path) -> None:
    def fresh() -> Any:
        return coreskip.load(tmp_path / "p")[0]

    def step(model: Any) -> None:
        greedy(model, prompt(1, 5), 2)

    def written(model: Any) -> None:
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.zero_()
        step(model)

    def given(model: Any) -> None:
        model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(160, 64))
        step(model)

    def trained(model: Any) -> None:
        model.train().requires_grad_(True)(prompt(1, 5)).logits.sum().backward()

    def resized(model: Any) -> None:
        model.resize_token_embeddings(200)

    packed(tiny("llama"), tmp_path / "p", weights="int4")
    for change in (written, given, trained, resized):
        with pytest.raises(CoreskipError, match="packed=False"):
            change(fresh())
        if change is not resized:
            model = coreskip.wrap(fresh())
            step(model)
            with pytest.raises(CoreskipError, match="packed=False"):
                change(model)
    double = fresh().double()  # the kernels have no such type: plain matrices
    assert double(prompt(1, 5)).logits.dtype == torch.float64
    plain, _ = coreskip.load(tmp_path / "p", packed=False)
    trained(plain)
    plain.resize_token_embeddings(200)


def test_as_loaded_in_mixed_dtypes_and_rotary_frequencies(tmp_path: Path) -> None:
    model = tiny("llama").to(torch.bfloat16)
    model.lm_head.float()
    model.model.norm.float()
    with torch.no_grad():
        model.lm_head.weight.add_(1e-4)
    found = packed(model, tmp_path / "p", weights="as-loaded")
    for (name, ours), theirs in zip(found.named_parameters(), model.parameters(), strict=True):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name
    half, _ = coreskip.load(tmp_path / "p", dtype="bfloat16")
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_copies_are_as_small_and_count_the_same(family: str, tmp_path: Path) -> None:
    """gemma2: its class of embeddings, which scale, was made when it was loaded."""
    with torch.no_grad():
        model = on_grid(tiny(family))
        model.get_input_embeddings().weight.mul_(0.0).add_(torch.randint(-7, 8, (1, 64)) / 4)
    found, ids = packed(model, tmp_path / "p", weights="int4"), prompt(1, 6)
    text, plan = greedy(found, ids, 8), Plan.dense(found, "packed")
    torch.save(found, tmp_path / "p.pt")
    copies = [copy.deepcopy(found), torch.load(tmp_path / "p.pt", weights_only=False)]
    copies += [pickle.loads(pickle.dumps(found)), copy.deepcopy(copies[1])]
    expected = weight_bytes(found)
    assert found.get_memory_footprint() == expected + sum(b.nbytes for b in found.buffers())
    plain, _ = coreskip.load(tmp_path / "p", packed=False)
    assert found.get_memory_footprint() < 0.6 * plain.get_memory_footprint()
    for other in copies:
        table = other.get_input_embeddings()
        assert isinstance(table, PackedRows)
        assert type(table) is type(found.get_input_embeddings())
        assert table.weight.untyped_storage().nbytes() <= 4
        assert weight_bytes(other) == expected
        assert other.get_memory_footprint() == found.get_memory_footprint()
        assert bytes_per_token(other, plan) == bytes_per_token(found, plan)
        assert torch.equal(greedy(other, ids, 8), text)
        assert other.to(torch.bfloat16).get_input_embeddings().weight.untyped_storage().nbytes() <= 2
        table.unpack()
        assert type(table) is type(plain.get_input_embeddings())


def test_a_plan_is_not_for_a_packed_model_with_other_linears(tmp_path: Path) -> None:
    model = tiny("llama")
    plan, found = Plan.dense(model), packed(model, tmp_path / "p", weights="int4")
    plan.check(found)
    plan.check(copy.deepcopy(found))
    plan.check(coreskip.load(tmp_path / "p", packed=False)[0])
    found.model.layers[1].mlp.down_proj = torch.nn.Linear(160, 64, bias=False)
    with pytest.raises(PlanError, match="other weights"):
        plan.check(found)


def test_a_model_is_not_shown_as_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama").save_pretrained(tmp_path / "m")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for path in (tmp_path / "m", tmp_path / "m.gguf"):
        code, _, err = command(capsys, "show", path)
        assert (code, f"coreskip info {path}" in err.splitlines()[-1]) == (2, True)
