"""Rows and columns of tiles as matrices of their own, and what prompts choose in such: as their numbers define them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from packed_models import on_grid, packed
from test_program import with_policies
from tiny_models import greedy, prompt, tiny
from torch import Tensor

import coreskip
from coreskip.kernels import ops, taken
from coreskip.kernels.groups import FORMATS, group_bytes, tile_up, ungroup, untile
from coreskip.kernels.memory import Reused
from coreskip.kernels.packed import PackedLinear
from coreskip.kernels.sparse import SlimMLP, SparseMLP
from coreskip.predictors.checks import AS_PACKED
from coreskip.predictors.policies import CoreNeurons
from coreskip.runtime import prepared
from coreskip.runtime.slim import own_matrices
from coreskip.runtime.wrap import runtime_of

NO_LIBRARY = ops.available("cpu")
pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))


def matrix(fmt: str, rows: int, inputs: int) -> PackedLinear:
    torch.manual_seed(rows + inputs)
    tiles = tile_up(torch.randn(rows, inputs) / inputs**0.5, fmt)
    return PackedLinear(tiles, inputs, bias=torch.randn(rows), rows=rows)


def numbers(packed: PackedLinear) -> Tensor:
    return ungroup(*untile(packed)).flatten(1)[:, : packed.in_features]


@pytest.fixture(autouse=True)
def _own_matrices() -> Iterator[None]:
    with own_matrices():
        yield


@pytest.mark.parametrize("fmt", taken.TAKEN)
@pytest.mark.parametrize("kept", [[0], [3, 4, 49], [*range(0, 50, 2)], [*range(50)]])
def test_rows_are_number_for_number(isa: str, fmt: str, kept: list[int]) -> None:
    whole, some = matrix(fmt, 50, 100), torch.tensor(kept)
    found = taken.rows(whole, some)
    assert (found.fmt, found.out_features, found.in_features) == (fmt, len(kept), 100)
    assert torch.equal(numbers(found), numbers(whole)[some])
    assert found.bias is not None
    assert whole.bias is not None
    assert torch.equal(found.bias, whole.bias[some])
    x = torch.randn(3, 100)  # what fills up the last tile is not read, or is zeros
    assert torch.equal(ops.linear(x, found), ops.linear(x, whole)[:, some])


@pytest.mark.parametrize("fmt", taken.TAKEN)
@pytest.mark.parametrize("kept", [[5], [3, 4, 49, 99], [*range(1, 100, 2)], [*range(99)]])
def test_columns_are_rounded_as_bytes_are(isa: str, fmt: str, kept: list[int]) -> None:
    """The same bytes as the definition's, but where a number lies between two of them."""
    whole, some = matrix(fmt, 20, 100), torch.tensor(kept)
    found, exact = taken.columns(whole, some), numbers(whole)[:, some]
    assert (found.fmt, found.out_features, found.in_features) == ("int8_groups", 20, len(kept))
    q, scale, _ = group_bytes(exact)
    of_found = untile(found)
    assert torch.equal(of_found[1], scale)
    steps = (of_found[0] - (q.to(torch.int16) - 128)).abs()
    assert int(steps.max()) <= 1
    assert float((steps > 0).float().mean()) < 0.01


@pytest.mark.parametrize("fmt", taken.TAKEN)
def test_whole_groups_stay_as_they_are(fmt: str) -> None:
    """A prefix is one of them, and so is the last group, which may not be full."""
    whole = matrix(fmt, 20, 100)
    for kept in (torch.arange(64), torch.cat([torch.arange(32, 64), torch.arange(96, 100)]), torch.arange(100)):
        found = taken.columns(whole, kept)
        assert found.fmt == fmt
        assert torch.equal(numbers(found), numbers(whole)[:, kept])
    for kept in (torch.arange(65), torch.arange(16, 48), torch.arange(98)):
        assert not taken.whole_groups(kept, 100)


def test_what_cannot_be_taken() -> None:
    whole, floats = matrix("int4", 20, 100), PackedLinear.pack(torch.randn(20, 100))
    for kept in ([], [-1, 2], [2, 100], [3, 3], [4, 2]):
        with pytest.raises(ValueError, match="taken"):
            taken.columns(whole, torch.tensor(kept, dtype=torch.int64))
    with pytest.raises(ValueError, match="tiles in int4"):
        taken.rows(floats, torch.tensor([1]))
    assert {form for form in taken.TAKEN if FORMATS[form].nested} == set()


def test_memory_is_used_again_only_when_nobody_has_it() -> None:
    memory, kept = Reused(), torch.arange(1, 96, 2)
    parts = [matrix("int4", 96, 64), matrix("int4", 96, 64), matrix("int4", 64, 96)]

    def made() -> SlimMLP:
        return SlimMLP.of_tiles(*parts, kept, act="silu", memory=memory)

    first = made()
    memory.most = first.nbytes + 1000
    gate, before = first.gate, first.up.weight.data_ptr()
    del first
    assert memory.spare == 0  # its gate is still there
    second = made()
    assert second.up.weight.data_ptr() != before
    assert gate is not None
    assert torch.equal(numbers(gate), numbers(parts[0])[kept])
    del gate
    assert 0 < memory.spare <= memory.most
    assert made().up.weight.data_ptr() == before
    del second  # no more than `most` is held
    assert memory.spare <= memory.most


# ---- neurons of a prompt ----


def core(model: Any, weights: str) -> Any:
    return replace(with_policies(model, CoreNeurons(0.4, 0.5, "griffin")), weights=weights)


def settled(model: Any, cache: Any) -> Any:
    runtime = runtime_of(model)
    selections = runtime._own_selections(cache)
    assert selections is not None
    return runtime.prepared.selected(selections).mlps


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_prompts_neurons_are_matrices_of_their_own(
    family: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same text natively and on the modules, and near the one over lists, whose activations are rounded in other
    groups."""
    model, ids = tiny(family), prompt(1)
    logits = {}
    for room in (4, 1e30):
        monkeypatch.setattr(prepared, "_ROOM", room)
        with coreskip.wrap(model, core(model, "int4")):
            greedy(model, ids, 3)
            assert runtime_of(model).steps.native.refusal is None
            with torch.no_grad():
                out = model(ids, use_cache=True)
                logits[room] = model(ids[:, :1], past_key_values=out.past_key_values).logits
            mlps = settled(model, out.past_key_values)
        assert {type(mlp) for mlp in mlps.values()} == {SlimMLP if room == 4 else SparseMLP}
    error = (logits[4] - logits[1e30]).square().mean().sqrt() / logits[4].std()
    assert 0 < float(error) < 0.1


def test_a_packed_models_neurons_are_taken_from_its_tiles(tmp_path: Any) -> None:
    model = packed(on_grid(tiny("llama")), tmp_path / "packed")
    with coreskip.wrap(model, core(model, AS_PACKED)):
        out = model(prompt(1), use_cache=True)
        model(prompt(1)[:, :1], past_key_values=out.past_key_values)
        mlps = settled(model, out.past_key_values)
    assert all(isinstance(mlp, SlimMLP) and mlp.up.fmt == "int4" for mlp in mlps.values())


def test_rows_that_chose_differently_share_one_packing() -> None:
    model = tiny("llama")
    ids = torch.cat([prompt(1, seed=1), prompt(1, seed=2)])
    with coreskip.wrap(model, core(model, "int4")):
        out = model(ids, use_cache=True)
        model(ids[:, :1], past_key_values=out.past_key_values)
        assert {type(mlp) for mlp in settled(model, out.past_key_values).values()} == {SparseMLP}
