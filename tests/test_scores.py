"""Scores and sets as data: algebra, folders, plans, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import NoTokenizer, plan_of, prompt, tiny

import coreskip
from coreskip import CoreskipError, NeuronScores, NeuronSet, Plan
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.expert_policies import KeptExperts
from coreskip.predictors.fingerprint import Fingerprint
from coreskip.predictors.interventions import PrunedNeurons
from coreskip.predictors.policies import Dense, Static

WIDTH = 160


def scores_of(model: Any, *layers: torch.Tensor, **more: Any) -> NeuronScores:
    return NeuronScores(tuple(layers), Fingerprint.of(model), **more)


def drawn(model: Any, seed: int = 0) -> NeuronScores:
    generator = torch.Generator().manual_seed(seed)
    widths = Fingerprint.of(model).intermediate_sizes
    return scores_of(model, *(torch.randn(w, generator=generator) for w in widths), recipe={"method": f"drawn {seed}"})


def test_algebra_is_that_of_the_numbers(llama: Any) -> None:
    a, b = drawn(llama, 0), drawn(llama, 1)
    for layer, x, y in zip((a + b * 2.0 - b).layers, a.layers, b.layers, strict=True):
        torch.testing.assert_close(layer, x + y)
    for layer in (3.0 * a).normalised().layers:
        assert float(layer.mean()) == pytest.approx(0, abs=1e-6)
        assert float(layer.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert torch.equal((-a).layers[1], -a.layers[1])


def test_ranks_share_their_mean_where_scores_are_equal(llama: Any) -> None:
    values = torch.cat([torch.tensor([5.0, 1.0, 5.0, 2.0]), torch.arange(WIDTH - 4) + 10.0])
    found = scores_of(llama, values, values, torch.ones(WIDTH)).ranks()
    last = WIDTH - 1
    torch.testing.assert_close(found.layers[0][:4], torch.tensor([2.5, 0.0, 2.5, 1.0]) / last)
    assert float(found.layers[0].max()) == 1.0
    assert bool((found.layers[2] == 0.5).all())


def test_top_takes_the_highest(llama: Any) -> None:
    found = drawn(llama).top(0.25)
    for layer, values in zip(found.layers, drawn(llama).layers, strict=True):
        assert set(layer.nonzero().flatten().tolist()) == set(values.topk(40).indices.tolist())
    assert found.shares == (0.25,) * 3
    together = drawn(llama).top(0.25, per="model")
    least = torch.cat(drawn(llama).layers).topk(120).values[-1]
    assert all(torch.equal(m, v >= least) for m, v in zip(together.layers, drawn(llama).layers, strict=True))
    assert torch.equal(drawn(llama).bottom(0.1).layers[0], (-drawn(llama)).top(0.1).layers[0])
    assert drawn(llama).above(0.0).size == sum(int((layer > 0).sum()) for layer in drawn(llama).layers)


def test_sets_are_sets(llama: Any) -> None:
    a, b = drawn(llama, 0).top(0.5), drawn(llama, 1).top(0.3)
    mine, theirs = (set(each.indices(1).tolist()) for each in (a, b))
    for found, expected in (
        (a | b, mine | theirs),
        (a & b, mine & theirs),
        (a - b, mine - theirs),
        (a ^ b, mine ^ theirs),
        (~a, set(range(WIDTH)) - mine),
    ):
        assert set(found.indices(1).tolist()) == expected
    both, either = (a & b).size, (a | b).size
    assert a.overlap(b) == pytest.approx(both / either)
    assert a.overlap(a) == 1.0
    assert NeuronSet.random(llama, 0.5, seed=1).size == a.size
    assert torch.equal(NeuronSet.random(llama, 0.5, seed=1).layers[0], NeuronSet.random(llama, 0.5, seed=1).layers[0])
    assert not torch.equal(NeuronSet.random(llama, 0.5).layers[0], NeuronSet.random(llama, 0.5, seed=1).layers[0])


def test_a_set_makes_a_plan_that_runs(llama: Any) -> None:
    a, b = drawn(llama, 0), drawn(llama, 1)
    chosen = a.top(0.5) | b.top(0.1)
    plan = chosen.plan(llama)
    for layer, members in zip(plan.layers, chosen, strict=True):
        assert isinstance(layer.neurons, Static)
        assert torch.equal(layer.neurons.indices, members)
    assert plan.keep == pytest.approx(chosen.share)
    again = NeuronSet.of(plan)
    assert all(torch.equal(x, y) for x, y in zip(again.layers, chosen.layers, strict=True))
    off = chosen.plan(llama, off=True)
    assert off.keep == pytest.approx(1 - chosen.share)
    ids = prompt(1, 6)
    with coreskip.wrap(llama, plan):
        kept = llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    masked = tiny("llama")
    with torch.no_grad():
        for index, layer in enumerate(masked.model.layers):
            layer.mlp.down_proj.weight[:, ~chosen.layers[index]] = 0
    # prefill is dense under a plan: only the first token comes from it
    assert kept.shape == (1, 14)
    assert isinstance((a.top(1.0)).plan(llama).layers[0].neurons, Dense)


def test_sets_of_experts_keep_experts() -> None:
    model = tiny("olmoe")
    text = TokenText(prompt(1, 300, 2)[0], torch.tensor([], dtype=torch.int64), "letters")
    found = coreskip.scores(model, NoTokenizer(), text, method="reap", progress=False)
    assert found.unit == "experts"
    assert [len(layer) for layer in found.layers] == [8, 8, 8]
    plan = found.top(0.5).plan(model)
    assert all(isinstance(layer.experts, KeptExperts) and len(layer.experts.indices) == 4 for layer in plan.layers)


def test_folders(llama: Any, tmp_path: Path) -> None:
    a = dataclasses.replace(drawn(llama), calibration={"source": "a book", "tokens": 3})
    a.save(tmp_path / "a.scores")
    again = NeuronScores.load(tmp_path / "a.scores")
    assert all(torch.equal(x, y) for x, y in zip(a.layers, again.layers, strict=True))
    assert (again.unit, dict(again.recipe), dict(again.calibration)) == (a.unit, dict(a.recipe), dict(a.calibration))
    again.check(llama)
    chosen = a.top(0.3)
    chosen.save(tmp_path / "a.set")
    read = NeuronSet.load(tmp_path / "a.set")
    assert all(torch.equal(x, y) for x, y in zip(chosen.layers, read.layers, strict=True))
    (a + again).save(tmp_path / "a.scores")  # over itself
    with pytest.raises(CoreskipError, match="no set at"):
        NeuronSet.load(tmp_path / "none")
    with pytest.raises(CoreskipError, match=r"set\.json"):
        NeuronSet.load(tmp_path / "a.scores")
    data = tmp_path / "a.set" / "set.safetensors"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CoreskipError, match="truncated or was edited"):
        NeuronSet.load(tmp_path / "a.set")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CoreskipError, match="not a scores folder"):
        a.save(tmp_path / "file")


def test_mistakes(llama: Any) -> None:
    a, other = drawn(llama), drawn(tiny("llama", seed=1))
    model = Fingerprint.of(llama)
    with pytest.raises(CoreskipError, match="other weights: make them again"):
        _ = a + other
    with pytest.raises(CoreskipError, match="other weights: make them again"):
        a.top(0.5).plan(tiny("llama", seed=1))
    with pytest.raises(CoreskipError, match="cannot be combined with a NeuronSet"):
        _ = a + a.top(0.5)  # type: ignore[operator]
    with pytest.raises(CoreskipError, match=r"cannot be combined with a Plan: NeuronSet\.of"):
        _ = a.top(0.5) | Plan.dense(llama)  # type: ignore[operator]
    with pytest.raises(CoreskipError, match=r"chooses its neurons at run time \(core_neurons\)"):
        NeuronSet.of(plan_of(llama, "griffin"))
    with pytest.raises(CoreskipError, match="hold NaN"):
        NeuronScores((torch.full((WIDTH,), torch.nan),) * 3, model)
    with pytest.raises(CoreskipError, match="of 2 layers, the model has 3"):
        NeuronScores((torch.zeros(WIDTH),) * 2, model)
    with pytest.raises(CoreskipError, match="layer 0 has"):
        NeuronScores((torch.zeros(WIDTH - 1),) * 3, model)
    with pytest.raises(CoreskipError, match="set is empty"):
        (a.top(0.5) - a.top(0.5)).plan(llama)
    with pytest.raises(CoreskipError, match="set holds everything"):
        a.top(1.0).plan(llama, off=True)
    with pytest.raises(CoreskipError, match="leaves layer 0 without neurons"):
        dataclasses.replace(a.top(0.5), layers=(torch.zeros(WIDTH, dtype=torch.bool), *a.top(0.5).layers[1:])).plan(
            llama
        )
    for share in (0.0, 1.1, float("nan"), True):
        with pytest.raises(CoreskipError, match="above 0 and at most 1"):
            a.top(share)
    with pytest.raises(CoreskipError, match="finite number"):
        _ = a * float("inf")
    with pytest.raises(CoreskipError, match="choose from layer, model"):
        a.top(0.5, per="network")  # type: ignore[arg-type]


def test_plans_that_change_activations_have_no_set(llama: Any) -> None:
    dense = Plan.dense(llama)
    layers = (dataclasses.replace(dense.layers[0], intervention=PrunedNeurons(torch.arange(3))), *dense.layers[1:])
    with pytest.raises(CoreskipError, match="changes what neurons compute"):
        NeuronSet.of(dataclasses.replace(dense, layers=layers))
    with pytest.raises(CoreskipError, match="not of a str"):
        NeuronSet.of("my.plan")  # type: ignore[arg-type]
    for least in (float("nan"), "x", None, True):
        with pytest.raises(CoreskipError, match="above a finite number"):
            drawn(llama).above(least)  # type: ignore[arg-type]
