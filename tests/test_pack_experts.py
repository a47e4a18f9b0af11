"""Mixtures of experts as packed models: the same numbers in tiles that are mapped."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import packed, tokenizer
from tiny_models import greedy, prompt, tiny

import coreskip
from coreskip import CoreskipError
from coreskip.kernels import ops
from coreskip.predictors.plan import Plan
from coreskip.predictors.sealed import seal
from coreskip.runtime.packed_experts import HeldExperts, held_experts
from coreskip.runtime.packed_folder import describe
from coreskip.runtime.packed_layer import weight_bytes
from coreskip.runtime.wrap import runtime_of

pytestmark = pytest.mark.skipif(ops.available("cpu") is not None, reason="needs the compiled kernels")

# shared experts, groups of experts; experts with biases in turns and transposed; experts that are given every token
FAMILIES = ("mixtral", "qwen2_moe", "glm4_moe", "gpt_oss", "llama4")


def unpacked(folder: Path) -> Any:
    return coreskip.load(folder, packed=False)[0]


@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_experts_are_the_numbers_of_the_folder(family: str, weights: str, tmp_path: Path) -> None:
    model, ids = tiny(family), prompt(2, 9)
    found = packed(model, tmp_path / "p", weights=weights)
    plain = unpacked(tmp_path / "p")
    assert any(True for _ in held_experts(found))
    assert not any(True for _ in held_experts(plain))
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    expected = greedy(plain, ids, 16)
    assert torch.equal(greedy(found, ids, 16), expected)
    with coreskip.wrap(found, Plan.dense(found)):
        assert torch.equal(greedy(found, ids, 16), expected)
        assert runtime_of(found).steps.native.ready or family in ("gpt_oss", "llama4")  # by layers
    assert torch.equal(greedy(found, ids, 16), expected)
    formats = describe(tmp_path / "p")["formats"]
    inside = {"int4": "int4", "int8": "int8_groups"}[weights]
    assert formats[inside]["tensors"] > 3 * len(list(held_experts(found)))
    assert "uint8" not in formats
    assert weight_bytes(found) < 0.6 * weight_bytes(model)


def test_rounded_to_the_same_numbers_as_a_plan_rounds_to(tmp_path: Path) -> None:
    model, ids = tiny("qwen3_moe"), prompt(1, 9)
    found = packed(model, tmp_path / "p", weights="int4")
    with torch.no_grad(), coreskip.wrap(model, Plan.dense(model, "int4"), keep_originals=True):
        greedy(model, ids, 2)
        native = runtime_of(model).steps.native
        assert native.described is not None
        of_plan: Any = native.described.model.base.layers[0].mlp
        held = dict(held_experts(found))["model.layers.0.mlp.experts"]
        for one, other in zip(of_plan.experts, held.experts(), strict=True):
            assert all(torch.equal(a.weight, b.weight) for a, b in zip(one.linears, other.linears, strict=True))


def test_the_very_numbers_where_fewer_bytes_hold_them(tmp_path: Path) -> None:
    model, ids = tiny("mixtral").bfloat16().float(), prompt(2, 9)
    found = packed(model, tmp_path / "p", weights="as-loaded")
    held = [module for _, module in held_experts(found)]
    assert {linear.weight.dtype for module in held for e in module.experts() for linear in e.linears} == {
        torch.bfloat16
    }
    expected = greedy(model, ids, 16)
    assert torch.equal(greedy(found, ids, 16), expected)
    with coreskip.wrap(found):
        assert torch.equal(greedy(found, ids, 16), expected)
        assert runtime_of(found).steps.native.ready
    again = packed(found, tmp_path / "again", weights="as-loaded")
    assert torch.equal(greedy(again, ids, 16), expected)
    # numbers that nothing smaller holds stay as they were
    plain = packed(tiny("mixtral"), tmp_path / "plain", weights="as-loaded")
    assert not any(True for _ in held_experts(plain))
    halves = packed(tiny("mixtral"), tmp_path / "halves", weights="bfloat16")
    assert {p.dtype for p in halves.parameters()} == {torch.bfloat16}


def test_copies_casts_and_unpacking(tmp_path: Path) -> None:
    found, ids = packed(tiny("gpt_oss"), tmp_path / "p", weights="int4"), prompt(1, 9)
    expected = greedy(found, ids, 8)
    assert torch.equal(greedy(copy.deepcopy(found), ids, 8), expected)
    layer = found.model.layers[0].mlp.experts
    assert isinstance(layer, HeldExperts)
    again = pickle.loads(pickle.dumps(layer))
    x, index, weights = torch.randn(3, 64), torch.tensor([[0, 2], [1, 0], [7, 3]]), torch.rand(3, 2)
    torch.testing.assert_close(again(x, index, weights), layer(x, index, weights))
    assert found.bfloat16()(ids).logits.dtype == torch.bfloat16
    assert isinstance(layer, HeldExperts)
    found.double()
    assert not isinstance(layer, HeldExperts)
    assert layer.down_proj.dtype == torch.float64
    with pytest.raises(CoreskipError, match="cannot save or load"):
        packed(tiny("mixtral"), tmp_path / "m", weights="int4").model.layers[0].mlp.experts.state_dict()


def test_what_would_not_act_is_refused(tmp_path: Path) -> None:
    found, ids = packed(tiny("mixtral"), tmp_path / "p", weights="int4"), prompt(1, 9)
    experts = found.model.layers[1].mlp.experts
    before = experts.down_proj
    experts.down_proj = torch.nn.Parameter(torch.zeros(before.shape))
    with pytest.raises(CoreskipError, match="cannot be changed"):
        found(ids)
    experts.down_proj = before
    before.requires_grad_()
    with pytest.raises(CoreskipError, match="cannot be trained"):
        found(ids)
    before.requires_grad_(False)
    greedy(found, ids, 2)
    with torch.no_grad():
        before.zero_()
    with pytest.raises(CoreskipError, match="cannot be changed"):
        found(ids)


def test_what_cannot_be_packed_or_read_is_refused_in_a_line(tmp_path: Path) -> None:
    model = tiny("mixtral")
    with pytest.raises(CoreskipError, match="experts are not rounded with a text"):
        coreskip.pack(model, tokenizer(), tmp_path / "p", weights="int4", text="w5 w6 w7 " * 200, progress=False)
    assert not (tmp_path / "p").exists()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 2, 1] = torch.nan
    with pytest.raises(CoreskipError, match="infinities or NaNs"):
        coreskip.pack(model, tokenizer(), tmp_path / "p", weights="int4", progress=False)
    coreskip.pack(tiny("mixtral"), tokenizer(), tmp_path / "p", weights="int4", progress=False)
    document = json.loads((tmp_path / "p" / "packed.json").read_text())
    document.pop("checksum", None)
    name = next(iter(document["experts"]))
    document["experts"][name]["stacks"]["up"]["rows"] += 16
    (tmp_path / "p" / "packed.json").write_bytes(seal(document))
    with pytest.raises(CoreskipError, match="not a well-formed packed model"):
        coreskip.load(tmp_path / "p")
