"""Calibration of what leaves neurons out on top of 4-bit weights, against what each figure is defined as."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from test_policies import plan_with
from tiny_models import prompt, tiny
from torch import Tensor
from torch.nn import functional as F

from coreskip import CoreskipError, Plan, PlanError
from coreskip.kernels.groups import group_weights, ungroup
from coreskip.kernels.packed import PackedLinear
from coreskip.kernels.reference import linear
from coreskip.predictors.anatomy import dissect, rows_of
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.checks import ALLOCATIONS
from coreskip.predictors.planes import EXACT, RATIOS, FourBitMLP, Point, bytes_read, loss_curve, spread_bytes
from coreskip.predictors.policies import Dense, Sketch, TopK
from coreskip.predictors.token_choice import TokenCalibration
from coreskip.predictors.token_samples import means_when_left_out
from coreskip.runtime.calibrate import Calibrator
from coreskip.runtime.options import SketchOptions, check_options

FORMS = ("planes", "exact_rows")


def calibration(model: Any) -> TokenCalibration:
    return TokenCalibration(model, prompt(6, 40), most=120, progress=False)


def calibrator(model: Any, **options: Any) -> Calibrator:
    text = TokenText(prompt(6, 40).flatten(), torch.tensor([], dtype=torch.int64), "letters")
    return Calibrator(model, text, progress=False, **options)


def made(found: TokenCalibration, form: str, keep: float, allocation: Any = "greedy", mean: bool = True) -> Any:
    return getattr(found, form)(keep, allocation, mean=mean)


def kept_by(policy: Any, a: Tensor, seen: Tensor) -> Tensor:
    """As issue 17 defines it."""
    mean = 0 if policy.mean is None else policy.mean
    exact = (a - mean).abs() * policy.norm
    if isinstance(policy, TopK):
        return exact >= policy.threshold
    assert policy.refine is not None
    return (seen.abs() * policy.norm >= policy.threshold) & (exact >= policy.refine)


@pytest.mark.parametrize("family", ["llama", "llama_bias", "phi3", "opt", "gpt2"])
def test_activations_are_those_of_4_bit_weights(family: str) -> None:
    """Against products with packed matrices, which round x as the kernels do; the upper bits by their definition."""
    mlp = dissect(tiny(family)).mlps[1]
    x = torch.randn(7, mlp.hidden_size)
    four, w = FourBitMLP.of(mlp), mlp.matrices()
    a, seen = four.activations(x)
    up = linear(x, PackedLinear.pack(w.up, w.up_bias, fmt="int4"))
    expected = mlp.act(up)
    if w.gate is not None:
        expected = mlp.act(linear(x, PackedLinear.pack(w.gate, w.gate_bias, fmt="int4"))) * up
    assert torch.allclose(a, expected, rtol=1e-4, atol=1e-5)
    q, scale, least = (t.float() for t in group_weights(w.up))
    middle = (scale[..., None] * (2 * (q / 2).floor() + 0.5) + least[..., None]).flatten(1)
    assert torch.equal(four.upper[-1], middle)
    assert float((a - seen).abs().mean()) < float(a.abs().mean())
    down = rows_of(mlp.down)[0]
    assert torch.equal(four.down.t(), ungroup(*group_weights(down)).flatten(1)[:, : down.shape[1]])


def test_a_width_that_fills_no_group() -> None:
    model = tiny("llama", hidden_size=72, intermediate_size=150)
    four = FourBitMLP.of(dissect(model).mlps[0])
    assert four.whole[0].shape == four.upper[1].shape == four.down.shape == (150, 72)
    assert four.activations(torch.randn(3, 72))[1].shape == (3, 150)
    assert plan_with(model, *calibration(model).planes(0.6)).keep == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_allocations_keep_the_share_asked_for(family: str, form: str, allocation: Any) -> None:
    model = tiny(family)
    found = calibration(model)
    for keep in (0.8, 0.4):
        policies = made(found, form, keep, allocation)
        # half of a tiny OPT's activations are zero: leaving them out costs nothing
        least = keep if family == "llama" else min(keep, 0.5)
        assert least - 0.04 < plan_with(model, *policies).keep < keep + 0.04
    assert all(isinstance(policy, Dense) for policy in made(found, form, 1.0, allocation))


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_thresholds_give_the_shares_that_the_policy_states(form: str, mean: bool, llama: Any) -> None:
    found = calibration(llama)
    for layer, policy in enumerate(made(found, form, 0.5, "equal", mean)):
        a, seen = FourBitMLP.of(dissect(llama).mlps[layer]).activations(found.samples.hidden[layer])
        wanted = kept_by(policy, a, seen)
        assert float(wanted.float().mean()) == pytest.approx(policy.keep, abs=0.01)
        assert policy.keep == pytest.approx(0.5, abs=0.01)
        if isinstance(policy, Sketch):
            assert policy.candidates is not None
            candidates = seen.abs() * policy.norm >= policy.threshold
            assert float(candidates.float().mean()) == pytest.approx(policy.candidates, abs=1e-6)
            assert policy.keep < policy.candidates < 0.95
        assert (policy.mean is not None) == mean
        if mean:
            off = policy.mean - means_when_left_out(a, wanted)
            assert float(off.abs().mean()) < 0.02 * float(a.abs().mean())


def test_predicted_losses_and_bytes(llama: Any) -> None:
    """A curve's first point is dense, its bytes are those of a packed matrix, and more left out loses more."""
    found = calibration(llama)
    mlp = FourBitMLP.of(dissect(llama).mlps[0])
    matrix = PackedLinear.pack(mlp.down, fmt="int4").weight.nbytes
    for ratios in (EXACT, RATIOS):
        points = loss_curve(mlp, found.samples.hidden[0], found.fisher[0], found.information[0], ratios)
        assert points[0] == Point(1.0, None, 3 * matrix, 0.0)
        assert bytes_read(mlp, 1.0, 1.0) == points[0].nbytes
        for ratio in ratios:
            losses = [p.loss for p in points if p.ratio == ratio]
            assert all(after > before for before, after in pairwise(losses))
        assert all(0.6 * points[0].nbytes < p.nbytes < points[0].nbytes for p in points[1:])


def test_bytes_are_spread_at_the_least_loss() -> None:
    """Against every combination of points that reads as little."""
    shares = (0.9, 0.7, 0.5, 0.3, 0.1)
    steps = [1 - share for share in shares]
    curves = [
        [Point(1.0, None, 100.0, 0.0)]
        + [Point(k, 0.5, 20 + 70 * k, slope * s**2) for k, s in zip(shares, steps, strict=True)]
        + [Point(k, 1.0, 20 + 60 * k, 1.5 * slope * s**2) for k, s in zip(shares, steps, strict=True)]
        for slope in (1.0, 3.0, 0.3)
    ]
    for keep in (0.8, 0.6, 0.4):
        found = spread_bytes(curves, [100, 100, 100], keep)
        assert sum(point.kept for point in found) / 3 == pytest.approx(keep, abs=0.07)
        read, lost = sum(point.nbytes for point in found), sum(point.loss for point in found)
        best = min(sum(p.loss for p in some) for some in product(*curves) if sum(p.nbytes for p in some) <= read)
        assert lost <= 1.1 * best
    assert spread_bytes(curves, [100, 100, 100], 1.0) == [points[0] for points in curves]


def test_plans_of_planes_save_and_load(llama: Any, tmp_path: Path) -> None:
    plan = plan_with(llama, *calibration(llama).planes(0.5, "equal"))
    plan.save(tmp_path / "planes.plan")
    again = Plan.load(tmp_path / "planes.plan")
    for before, after in zip(plan.layers, again.layers, strict=True):
        assert isinstance(before.neurons, Sketch)
        assert isinstance(after.neurons, Sketch)
        assert after.neurons.bits == 3
        for name in ("keep", "threshold", "refine", "candidates", "smooth"):
            assert getattr(after.neurons, name) == getattr(before.neurons, name)
        for name in ("mean", "norm"):
            assert torch.equal(getattr(after.neurons, name), getattr(before.neurons, name))


def test_the_weights_say_what_a_method_makes(llama: Any) -> None:
    found = calibrator(llama, weights="int4")
    planes = found.make("sketch", 0.5)
    assert {getattr(layer.neurons, "bits", 3) for layer in planes.layers} == {3}
    assert planes.recipe["bits"] == 3
    assert found.make("sketch", 0.5, bits=3) is not planes
    assert {layer.neurons.bits for layer in found.make("sketch", 0.5, bits=4).layers} == {4}  # type: ignore[attr-defined]
    kept = [layer.neurons for layer in found.make("topk", 0.5, allocation="equal").layers]
    assert all(isinstance(policy, TopK) and policy.threshold is not None for policy in kept)
    without = calibrator(llama)
    assert {layer.neurons.bits for layer in without.make("sketch", 0.5).layers} == {4}  # type: ignore[attr-defined]
    assert {getattr(p.neurons, "bits", 3) for p in without.make("sketch", 0.5, weights="int4").layers} == {3}
    assert all(layer.neurons.threshold is None for layer in without.make("topk", 0.5, allocation="equal").layers)  # type: ignore[attr-defined]
    with pytest.raises(CoreskipError, match="of weights in 4 bits: add weights int4"):
        without.make("sketch", 0.5, bits=3)


def test_mistakes() -> None:
    zeros, good = torch.zeros(4), {"bits": 3, "keep": 0.5, "threshold": 0.1}
    Sketch(**good, refine=0.2, candidates=0.6, mean=zeros, norm=zeros).check(4, 2)
    for wrong, words in (
        ({**good, "threshold": None}, "3 bits has a threshold"),
        ({**good, "smooth": torch.ones(2)}, "no smoothed inputs"),
        ({**good, "refine": 0.2}, "a refined sketch has 3 or 4 bits"),
        ({**good, "refine": 0.2, "candidates": 0.4}, "keeps 0.5 of 0.4 candidates"),
        ({**good, "bits": 2}, "a sketch of 2 bits"),
    ):
        with pytest.raises(PlanError, match=words):
            Sketch(**wrong).check(4, 2)
    with pytest.raises(CoreskipError, match="bits is 2: a sketch has 4 bits, 3"):
        SketchOptions(bits=2)
    with pytest.raises(CoreskipError, match="a sketch of 3 bits is of weights in 4 bits: add weights int4"):
        check_options(method="sketch", bits=3, weights="int8")
    check_options(method="sketch", bits=3, weights="int4", keep=0.5)


def test_more_is_left_out_at_the_same_loss_by_bytes(llama: Any) -> None:
    """The allocation by bytes predicts no more loss than equal shares that read as much."""
    found = calibration(llama)
    mlps = [FourBitMLP.of(mlp) for mlp in dissect(llama).mlps]

    def lost(policies: Any) -> tuple[float, float]:
        loss, read = 0.0, 0.0
        for layer, (mlp, policy) in enumerate(zip(mlps, policies, strict=True)):
            a, seen = mlp.activations(found.samples.hidden[layer])
            if isinstance(policy, Dense):
                read += 1.875 * mlp.down.numel()
                continue
            error = F.linear(torch.where(kept_by(policy, a, seen), 0, a - policy.mean), mlp.down.t())
            loss += float(((error @ found.information[layer]) * error).sum(1).mean()) / 2
            read += bytes_read(mlp, policy.keep, policy.candidates or 1.0)
        return loss, read

    equal, greedy = lost(found.planes(0.5, "equal")), lost(found.planes(0.5, "greedy"))
    assert greedy[0] * greedy[1] < equal[0] * equal[1]
