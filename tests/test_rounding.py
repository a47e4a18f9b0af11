"""Rounding with compensation: closer outputs than plain rounding, exact where nothing has to be rounded, no traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny
from torch import Tensor

from coreskip.bench.finetune import batches, finetune, leave_grid
from coreskip.bench.rounding_quality import Scored, kinds
from coreskip.bench.tables import quality_table
from coreskip.kernels.groups import group_weights, tiles_from_groups, ungroup, untile
from coreskip.kernels.packed import PackedLinear
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.compensation import Compensation, fitted_ends
from coreskip.predictors.errors import CoreskipError
from coreskip.runtime.rounded_model import rounded_in_place
from coreskip.runtime.rounding import Rounded, alternatives, compensate, plainly, replaced, round_by, windows_of
from coreskip.runtime.sensitivity import Mixtures, costs_of_widths, recipe_within

# gated and plain MLPs, one stacked, fused projections, Conv1D, MLP and attention side by side, two kinds of layers
FAMILIES = ["llama", "phi3", "gemma3_text", "opt", "gpt2", "falcon", "phi"]
WINDOW = 64


def ids(seed: int = 3, windows: int = 12) -> Tensor:
    """Words of a skewed distribution: as in texts, few directions carry most of the inputs."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(windows * WINDOW, generator=generator).square() * (VOCABULARY - 5)).long() + 5


def rounded(model: Any, **options: Any) -> list[Rounded]:
    return list(compensate(model, ids(), **{"window": WINDOW, "progress": False, **options}))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids(seed=4, windows=4).view(4, -1)).logits
    return found


def weights(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_closer_than_those_of_plain_rounding(family: str) -> None:
    model = tiny(family)
    before, expected = weights(model), logits(model)
    ours, plain = rounded(model), list(plainly(model))
    errors = []
    for found in (ours, plain):
        with replaced(found):
            errors.append(float((logits(model) - expected).norm()))
    assert errors[0] < 0.97 * errors[1]
    assert [each.name for each in ours] == [each.name for each in plain]
    assert [each.packed.fmt for each in ours] == ["int4"] * (len(ours) - 1) + ["int8_groups"]
    after = weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(model), expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("width", ["int4", "int8"])
def test_numbers_on_the_grid_stay_what_they_are(family: str, width: str) -> None:
    model = tiny(family)
    plain = list(plainly(model, widths=width))
    with replaced(plain[:-1]):
        again = rounded(model, widths=width)
        for each, its_own in zip(again, plain, strict=True):
            assert torch.equal(each.packed.weight, its_own.packed.weight), each.name
            assert torch.equal(each.values(), its_own.values()), each.name
            assert not each.error.any()


def test_the_same_text_gives_the_same_numbers() -> None:
    first, second = rounded(tiny("llama")), rounded(tiny("llama"))
    assert all(torch.equal(a.packed.weight, b.packed.weight) for a, b in zip(first, second, strict=True))


def test_widths_by_name() -> None:
    model = tiny("llama")
    name = "model.layers.1.self_attn.k_proj"  # whose input two others share
    found = {each.name: each for each in rounded(model, widths={name: "int8"})}
    wide = {key for key, each in found.items() if each.packed.fmt == "int8_groups"}
    assert wide == {name, "lm_head"}
    narrow = {each.name: each for each in rounded(model)}
    assert found[name].error.sum() < 0.02 * narrow[name].error.sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": "int3"}, "int3"),
        ({"widths": {"model.layers.9.mlp.up_proj": "int4"}}, "no linear"),
        ({"widths": {"model.layers.0.mlp.up_proj": 4}}, "a width is 4"),
        ({"window": 4096, "tokens": 0}, "tokens is 0"),
    ],
)
def test_mistakes_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CoreskipError, match=message) as caught:
        rounded(tiny("llama"), **options)
    assert "\n" not in str(caught.value)


def test_too_little_text_is_one_line_and_comes_at_once() -> None:
    text = TokenText(ids()[:40], torch.tensor([1]), "a note")
    with pytest.raises(CoreskipError, match=r"the text \(a note\) has 40 tokens") as caught:
        compensate(tiny("llama"), text, window=WINDOW)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("at", [2, 9])
def test_an_error_leaves_neither_hooks_nor_numbers(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    before, rounds = weights(model), []

    def fails(self: Compensation, weight: Tensor, fmt: str) -> None:
        rounds.append(weight)
        if len(rounds) == at:
            raise RuntimeError("out of memory")
        return true_round(self, weight, fmt)

    true_round = Compensation.round
    monkeypatch.setattr(Compensation, "round", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        rounded(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_caller_runs_with_the_model_as_it_was() -> None:
    model = tiny("llama").train()
    before = weights(model)
    for each in compensate(model, ids(), window=WINDOW, progress=False):
        assert torch.is_grad_enabled()
        assert model.training
        assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())
        if "layers.1" in each.name:
            break  # a caller that has seen enough
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("inputs", [64, 70])
@pytest.mark.parametrize("fmt", ["int4", "int8_groups"])
def test_a_matrix_has_a_smaller_output_error(inputs: int, fmt: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 12, generator=generator) @ torch.randn(12, inputs, generator=generator)
    x += 0.1 * torch.randn(500, inputs, generator=generator)
    weight = torch.randn(24, inputs, generator=generator)
    values = Compensation(x.t() @ x).round(weight, fmt).values(inputs)
    packed = PackedLinear.pack(weight, fmt=fmt)
    plain = ungroup(*untile(packed)).flatten(1)[:, :inputs]
    assert (x @ (values - weight).t()).norm() < 0.5 * (x @ (plain - weight).t()).norm()


def test_the_error_on_other_inputs_is_foretold() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(96, 96, generator=generator)
    x, other = (torch.randn(n, 96, generator=generator) @ mixing for n in (300, 5000))
    weight = torch.randn(200, 96, generator=generator)
    compensation = Compensation(x.t() @ x)
    off = compensation.round(weight, "int4").values(96) - weight
    seen, true = ((inputs @ off.t()).square().mean() for inputs in (x, other))
    assert true > 1.15 * seen
    assert compensation.optimism(300) * seen == pytest.approx(float(true), rel=0.3)


def test_a_shift_makes_up_for_changed_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(400, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    x = original + 0.3 * torch.randn(400, 64, generator=generator)
    weight = torch.randn(24, 64, generator=generator)
    shifted = Compensation(x.t() @ x, damping=1e-3).shifted(weight, x.t() @ (original - x))
    assert (x @ shifted.t() - original @ weight.t()).norm() < 0.7 * ((x - original) @ weight.t()).norm()


def test_ends_by_least_squares_are_no_worse_than_the_range_and_exact_on_the_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    w, importance = torch.randn(32, 50, generator=generator), torch.rand(32, generator=generator)
    error = []
    for scale, least in (fitted_ends(w, importance), ((w.amax(0) - w.amin(0)) / 15, w.amin(0))):
        q = ((w - least) / scale).round().clamp(0, 15)
        error.append((importance[:, None] * (w - q * scale - least).square()).sum())
    assert error[0] < 0.9 * error[1]
    on_grid = ungroup(*group_weights(w.t())).flatten(1).t()
    scale, least = fitted_ends(on_grid, importance)
    assert torch.equal(((on_grid - least) / scale).round() * scale + least, on_grid)


@pytest.mark.parametrize("rows", [16, 19])
def test_tiles_from_groups_are_those_of_packing(rows: int) -> None:
    weight = torch.randn(rows, 96, generator=torch.Generator().manual_seed(0))
    packed = PackedLinear.pack(weight, fmt="int4")
    assert torch.equal(tiles_from_groups(*untile(packed), "int4"), packed.weight)
    packed = PackedLinear.pack(weight, fmt="int8_groups")
    q, scale, least = untile(packed)
    assert torch.equal(tiles_from_groups((q + 128).to(torch.uint8), scale, least, "int8_groups"), packed.weight)


def test_wider_goes_where_four_bits_cost_most() -> None:
    model, kept = tiny("llama"), []
    rows = windows_of(model, ids(), 512, WINDOW)
    costs = costs_of_widths(model, rows, progress=False, keep=kept.append)
    mixtures = Mixtures.of(model, costs)
    assert costs.keys() == mixtures.sizes.keys() == {next(iter(each.values())).name for each in kept}
    assert "lm_head" in costs
    for name, of_linear in costs.items():
        assert of_linear["int4"] > of_linear["int5"] > of_linear["int8"] > 0 or name == "lm_head", name
    for each in kept:
        for width, found in each.items():
            assert found.packed.nbytes == mixtures.sizes[found.name][width]
    taken, lost = [], []
    for share in (mixtures.least, 0.7, 0.8, 0.9, 1.0):
        widths = mixtures.within(share)
        taken.append(mixtures.bytes_of(widths) / mixtures.widest)
        lost.append(sum(costs[name][width] for name, width in widths.items()))
        assert share - 0.06 < taken[-1] <= share + 1e-6
    assert lost == sorted(lost, reverse=True)
    assert set(mixtures.within(mixtures.least).values()) == {"int4"}
    assert set(mixtures.within(1.0).values()) == {"int8"}
    with pytest.raises(CoreskipError, match="give more"):
        recipe_within(model, TokenText(ids(), torch.empty(0, dtype=torch.int64), "ids"), 0.2, progress=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_gives_the_same_numbers_again(family: str) -> None:
    model = tiny(family, tie_word_embeddings=True) if family == "llama" else tiny(family)
    text = TokenText(ids(), torch.empty(0, dtype=torch.int64), "ids")
    recipe = recipe_within(model, text, 0.75, tokens=512, window=WINDOW, progress=False)
    assert len(set(recipe.widths.values())) > 1
    before, hooks = weights(model), [m for m in model.modules() if "forward" in vars(m)]
    each = list(alternatives(model, recipe.ids.long(), progress=False))
    again = list(round_by(model, recipe, progress=False))
    assert [found["int4"].name for found in each] == [found.name for found in again] == list(recipe.widths)
    for found, one in zip(each, again, strict=True):
        assert torch.equal(found[recipe.widths[one.name]].packed.weight, one.packed.weight), one.name
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())
    assert hooks == [m for m in model.modules() if "forward" in vars(m)]


@pytest.mark.parametrize("damage", [None, "states", "layer"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_rounding_goes_on_where_it_was_stopped(
    family: str, damage: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORESKIP_CACHE", str(tmp_path))
    model, true_round, rounds = tiny(family), Compensation.round, []

    def counted(self: Compensation, weight: Tensor, fmt: str) -> Any:
        rounds.append(fmt)
        return true_round(self, weight, fmt)

    monkeypatch.setattr(Compensation, "round", counted)
    whole = rounded(model, head="int5", resume=True)
    needed, seen = len(rounds), []
    assert not list((tmp_path / "rounding").glob("*")), "nothing stays of what is finished"
    for each in compensate(model, ids(), head="int5", window=WINDOW, resume=True, progress=False):
        seen.append(each)
        if each.name.split(".")[2:3] == ["1"]:
            break  # as if it were killed: the second layer is done
    (folder,) = (tmp_path / "rounding").glob("*")
    if damage is not None:
        (file,) = folder.glob("states*" if damage == "states" else "layer-0001*")
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
    rounds.clear()
    other = ids(seed=9)  # another text is another rounding
    assert next(compensate(model, other, window=WINDOW, resume=True, progress=False)).error.any()
    rounds.clear()
    again = rounded(model, head="int5", resume=True)
    assert len(rounds) < needed if damage is None else len(rounds) == needed
    for before, after in zip(whole, again, strict=True):
        assert before.name == after.name
        assert torch.equal(before.packed.weight, after.packed.weight)
        assert torch.equal(before.error, after.error)
        assert (before.packed.bias is None) == (after.packed.bias is None)
    assert not folder.exists()


def test_where_nothing_can_be_kept_it_is_rounded_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CORESKIP_CACHE", str(tmp_path / "file"))
    found = rounded(tiny("llama"), resume=True)
    assert torch.equal(found[3].packed.weight, rounded(tiny("llama"))[3].packed.weight)
    assert caplog.text.count("killed, it would begin anew") == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("width", ["int4", "int5"])
def test_a_head_in_few_bits_is_closer_than_a_plainly_rounded_one(family: str, width: str) -> None:
    model = tiny(family)
    expected, errors = logits(model), []
    for found in (rounded(model, widths="int8", head=width), list(plainly(model, widths="int8", head=width))):
        assert found[-1].packed.fmt == width
        with rounded_in_place(model, found):  # a tied embedding stays
            errors.append(float((logits(model) - expected).norm()))
    assert 0 < errors[0] < errors[1]


def test_rescaling_leaves_the_grid_and_the_text() -> None:
    model = tiny("llama")
    with replaced(list(plainly(model))[:-1]):
        expected = logits(model)
        before = weights(model)
        leave_grid(model)
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
        for name, rescaled in weights(model).items():
            if "layers" in name:
                assert not torch.equal(before[name], rescaled) or "q_norm" in name, name
    model = tiny("llama")
    with replaced(list(plainly(model))[:-1]):
        leave_grid(model)
        assert any(each.error.any() for each in rounded(model))


def test_training_is_the_same_each_time_and_moves_every_matrix() -> None:
    text = TokenText(ids(), torch.empty(0, dtype=torch.int64), "ids")
    assert len(list(batches(text, 15, WINDOW, 0))) == 15  # more than there are windows
    first, second = tiny("llama"), tiny("llama")
    before = weights(first)
    assert finetune(first, text, steps=3, length=WINDOW) == finetune(second, text, steps=3, length=WINDOW)
    after = weights(first)
    assert all(torch.equal(after[name], tensor) for name, tensor in weights(second).items())
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_rows_of_rounding_fill_a_table() -> None:
    model = tiny("llama")
    text = TokenText(ids(windows=40), torch.empty(0, dtype=torch.int64), "ids")
    scored = Scored(model, text, 2)
    about = {
        "model": "tiny",
        "dtype": "float32",
        "device": "a CPU",
        "time": "2026-01-01",
        "commit": None,
        "command": "",
    }
    rows = []
    for name, found, _ in kinds(model, text, 1024, [0.8]):
        rows.append({"name": name, "megabytes": 1, **scored.figures(found), **about})
    assert [row["name"] for row in rows] == ["int8", "int4, plain", "int4, compensated", "mixed, 0.8 of int8's bytes"]
    eight, plain, compensated, mixture = (row["kl"] for row in rows)
    assert eight < compensated < plain
    assert mixture < compensated
    assert "int4, compensated" in quality_table(rows)
