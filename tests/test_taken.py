"""Rows and columns of tiles as matrices of their own, and what prompts choose in such: as their numbers define them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from packed_models import on_grid, packed, tokenizer
from test_program import with_policies
from tiny_models import greedy, prompt, tiny
from torch import Tensor

import coreskip
from coreskip.kernels import ops, reference, taken
from coreskip.kernels.groups import FORMATS, group_bytes, tile_up, ungroup, untile
from coreskip.kernels.memory import Reused
from coreskip.kernels.packed import PackedLinear
from coreskip.kernels.sparse import RowLists, SlimMLP
from coreskip.predictors.checks import AS_PACKED
from coreskip.predictors.policies import CoreNeurons
from coreskip.runtime import prepared
from coreskip.runtime.program import Brick
from coreskip.runtime.wrap import runtime_of

NO_LIBRARY = ops.available("cpu")
pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))


def matrix(fmt: str, rows: int, inputs: int) -> PackedLinear:
    torch.manual_seed(rows + inputs)
    tiles = tile_up(torch.randn(rows, inputs) / inputs**0.5, fmt)
    return PackedLinear(tiles, inputs, bias=torch.randn(rows), rows=rows)


def numbers(packed: PackedLinear) -> Tensor:
    return ungroup(*untile(packed)).flatten(1)[:, : packed.in_features]


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


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("kept", [[5], [3, 4, 49, 99], [*range(0, 100, 2)], [*range(33), 98], [*range(100)]])
def test_some_columns_come_to_what_the_whole_matrix_comes_to(isa: str, kept: list[int], rows: int) -> None:
    """To the bit, where the others meet zeros; and as the definition has it."""
    whole, columns, x = matrix("int4", 20, 100), torch.tensor(kept), torch.randn(rows, len(kept))
    found, full = taken.some(whole, columns), torch.zeros(rows, 100).index_copy(1, columns, x)
    assert (found.fmt, found.out_features, found.in_features, found.stride) == ("int4", 20, len(kept), 128)
    assert found.weight.numel() <= taken.some_bytes(20, 100, len(kept))
    y = ops.linear(x, found)
    assert torch.equal(y, ops.linear(full, whole))
    assert torch.equal(numbers(found.whole_groups())[:, found.in_groups(torch.ones(len(kept))) > 0].sort(1).values,
                       numbers(whole)[:, columns].sort(1).values)  # fmt: skip
    assert torch.allclose(y, reference.linear(x, found), atol=1e-5)
    with torch.inference_mode():  # through the dispatcher
        assert torch.equal(torch.ops.coreskip.linear.default(x, *ops._linear_fields(found)), y)


def test_rows_differ_as_they_would_alone(isa: str) -> None:
    parts = [matrix("int4", 96, 64), matrix("int4", 96, 64), matrix("int4", 64, 96)]
    whole, x = SlimMLP(*parts, act="silu"), torch.randn(6, 64)
    lists = torch.stack([torch.randperm(96)[:40].sort().values for _ in range(3)])
    together, _ = replace(whole, lists=RowLists.of(lists, 96)).run(x)
    every = lists.unique()
    some = SlimMLP.of_tiles(*parts, every, act="silu", exactly=True)
    wanted = RowLists.of(torch.searchsorted(every, lists), every.numel())
    assert torch.equal(replace(some, lists=wanted).run(x)[0], together)
    for row, kept in enumerate(lists):
        alone, count = SlimMLP.of_tiles(*parts, kept, act="silu", exactly=True).run(x[2 * row : 2 * row + 2])
        assert torch.equal(together[2 * row : 2 * row + 2], alone)
        assert count == 80


def test_what_cannot_be_taken() -> None:
    whole, floats = matrix("int4", 20, 100), PackedLinear.pack(torch.randn(20, 100))
    for kept in ([], [-1, 2], [2, 100], [3, 3], [4, 2]):
        with pytest.raises(ValueError, match="taken"):
            taken.columns(whole, torch.tensor(kept, dtype=torch.int64))
    with pytest.raises(ValueError, match="tiles in int4"):
        taken.rows(floats, torch.tensor([1]))
    with pytest.raises(ValueError, match="taken of int4, not of int5"):
        taken.some(matrix("int5", 20, 100), torch.tensor([1]))
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
def test_a_text_is_the_same_whatever_room_there_is(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In matrices of its own, or over the whole ones, alone and beside others: the same bits."""
    model, (one, other) = tiny(family), (prompt(1, 12, seed=seed) for seed in (1, 2))
    tokens, logits = torch.tensor([[5, 9, 17]]), {}
    with coreskip.wrap(model, core(model, "int4")):
        greedy(model, one, 3)
        assert runtime_of(model).steps.native.refusal is None
        for room in (4, 1e30):
            monkeypatch.setattr(prepared, "_ROOM", room)
            for name, ids in (("one", one), ("other", other), ("both", torch.cat([one, other]))):
                runtime_of(model)._weights._reused = Reused()
                logits[name, room], mlps = steps_after(model, ids, tokens)
                own = room == 4 and name != "both"
                assert all(isinstance(mlp, SlimMLP) and (mlp.lists is None) == own for mlp in mlps.values())
                assert len({mlp.listed_neurons for mlp in mlps.values()}) == 1
    for room in (4, 1e30):
        assert torch.equal(logits["both", room], torch.cat([logits["one", 4], logits["other", 4]]))
        assert torch.equal(logits["one", room], logits["one", 4])
    assert not torch.equal(logits["one", 4], logits["other", 4])


@torch.no_grad()
def steps_after(model: Any, ids: Tensor, tokens: Tensor) -> tuple[Tensor, Any]:
    """Logits of `tokens` one by one after a prompt, natively, and what the prompt chose."""
    cache = model(ids, use_cache=True).past_key_values
    rows = tokens.expand(len(ids), -1).split(1, 1)
    logits = torch.cat([model(token, past_key_values=cache).logits for token in rows], 1)
    return logits, settled(model, cache)


def test_a_packed_models_neurons_are_taken_from_its_tiles(tmp_path: Any) -> None:
    model = packed(on_grid(tiny("llama")), tmp_path / "packed")
    with coreskip.wrap(model, core(model, AS_PACKED)):
        out = model(prompt(1), use_cache=True)
        model(prompt(1)[:, :1], past_key_values=out.past_key_values)
        mlps = settled(model, out.past_key_values)
    assert all(isinstance(mlp, SlimMLP) and mlp.up.fmt == "int4" for mlp in mlps.values())


def test_rows_that_chose_differently_share_the_models_own_tiles() -> None:
    model = tiny("llama")
    ids = torch.cat([prompt(1, seed=1), prompt(1, seed=2)])
    with coreskip.wrap(model, core(model, "int4")):
        found = [steps_after(model, some, torch.tensor([[5]]))[1] for some in (ids, ids.flip(0))]
        for layer, mlp in found[0].items():
            assert mlp.lists.rows == 2
            assert mlp.up.weight.data_ptr() == found[1][layer].up.weight.data_ptr()


@pytest.mark.parametrize(
    "lists", [torch.arange(512), torch.arange(0, 1024, 2), torch.arange(1024).view(32, 32)[:, :17].flatten()]
)
def test_no_list_takes_more_than_is_counted(lists: Tensor) -> None:
    """However neurons lie in groups: 17 of each takes the most lines."""
    parts = [matrix("int4", 1024, 64), matrix("int4", 1024, 64), matrix("int4", 64, 1024)]
    brick = Brick(1024, 64, gated=True, loaded=4.0, dense=0.625, weights="int4", in_groups=True)
    taken_bytes = SlimMLP.of_tiles(*parts, lists, act="silu", exactly=True).nbytes
    biases = 4 * (2 * lists.numel() + 64) + 32  # and how many inputs each group has
    assert taken_bytes - biases <= brick.chosen(lists.numel()) + 1024 * 64 // 16
    drawn = torch.randperm(1024, generator=torch.Generator().manual_seed(0))[: lists.numel()].sort().values
    usual = SlimMLP.of_tiles(*parts, drawn, act="silu", exactly=True).nbytes - biases
    assert usual == pytest.approx(brick.chosen(lists.numel()), rel=0.02)


def test_engines_give_each_call_the_text_that_it_gets_alone() -> None:
    model, words = tiny("llama"), tokenizer()
    prompts = ["w5 w6 w7", "w9 w8", "w50 w51 w52 w53", "w17 w3"]
    with coreskip.wrap(model, core(model, "int4")):
        expected = [greedy(model, words(text, return_tensors="pt").input_ids, 12) for text in prompts]
    with coreskip.Engine(model, words, core(model, "int4"), max_batch=4) as engine, ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda text: engine.generate(text, max_new_tokens=12), prompts))
    assert texts == [words.decode(ids[0, -12:], skip_special_tokens=True) for ids in expected]
