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

from coreskip import CoreskipError, Plan, PlanError
from coreskip.kernels.groups import group_weights, ungroup
from coreskip.kernels.packed import PackedLinear
from coreskip.kernels.reference import linear
from coreskip.predictors.anatomy import dissect, rows_of
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.checks import ALLOCATIONS
from coreskip.predictors.four_bits import Form, FourBitMLP, Point, loss_curve, spread_bytes
from coreskip.predictors.policies import Dense, Sketch, TopK
from coreskip.predictors.token_choice import TokenCalibration
from coreskip.predictors.token_samples import means_when_left_out
from coreskip.runtime.calibrate import Calibrator
from coreskip.runtime.options import SketchOptions, check_options


def calibration(model: Any) -> TokenCalibration:
    return TokenCalibration(model, prompt(6, 40), most=120, progress=False)


def calibrator(model: Any, **options: Any) -> Calibrator:
    text = TokenText(prompt(6, 40).flatten(), torch.tensor([], dtype=torch.int64), "letters")
    return Calibrator(model, text, progress=False, **options)


def kept_by(policy: Any, mlp: FourBitMLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates, and which of them are kept, by the policies' definitions."""
    a = mlp.activations(x)
    exact = (a - (0 if policy.mean is None else policy.mean)).abs() * policy.norm
    if isinstance(policy, Sketch):
        assert policy.refine is not None
        candidates = mlp.estimates(x).abs() * policy.norm >= policy.threshold
        return candidates, candidates & (exact >= policy.refine)
    candidates = torch.ones_like(a, dtype=torch.bool)
    if policy.gate is not None:
        candidates = mlp.parts(x, mlp.whole)[0].abs() * policy.reach >= policy.gate
    return candidates, candidates & (exact >= policy.threshold)


@pytest.mark.parametrize("family", ["llama", "llama_bias", "phi3", "opt", "gpt2"])
def test_activations_are_those_of_4_bit_weights(family: str) -> None:
    """Against products with packed matrices, which round x as the kernels do; the upper bits by their definition."""
    mlp = dissect(tiny(family)).mlps[1]
    x = torch.randn(7, mlp.hidden_size)
    four, w = FourBitMLP.of(mlp), mlp.matrices()
    a, seen = four.activations(x), four.estimates(x)
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
    assert four.activations(torch.randn(3, 72)).shape == (3, 150)
    assert plan_with(model, *calibration(model).in_four_bits(Form.PLANES, 0.6)).keep == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_allocations_keep_the_share_asked_for(family: str, form: Form, allocation: Any) -> None:
    model = tiny(family)
    found = calibration(model)
    if form is Form.GATES and family == "opt":
        with pytest.raises(CoreskipError, match="have no gate"):
            found.in_four_bits(form, 0.8, allocation)
        return
    for keep in (0.8, 0.4):
        policies = found.in_four_bits(form, keep, allocation)
        # half of a tiny OPT's activations are zero: leaving them out costs nothing
        least = keep if family == "llama" else min(keep, 0.5)
        assert least - 0.04 < plan_with(model, *policies).keep < keep + 0.04
    assert all(isinstance(policy, Dense) for policy in found.in_four_bits(form, 1.0, allocation))


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("form", Form)
def test_thresholds_give_the_shares_that_the_policy_states(form: Form, mean: bool, llama: Any) -> None:
    found = calibration(llama)
    for layer, policy in enumerate(found.in_four_bits(form, 0.5, "equal", mean=mean)):
        mlp, x = FourBitMLP.of(dissect(llama).mlps[layer]), found.samples.hidden[layer]
        candidates, wanted = kept_by(policy, mlp, x)
        assert float(wanted.float().mean()) == pytest.approx(policy.keep, abs=0.01)
        assert policy.keep == pytest.approx(0.5, abs=0.01)
        if form is Form.ROWS:
            assert policy.gate is policy.candidates is None
        else:
            assert float(candidates.float().mean()) == pytest.approx(policy.candidates, abs=1e-6)
            assert policy.keep < policy.candidates < 0.95
        assert (policy.mean is not None) == mean
        if mean:
            a = mlp.activations(x)
            off = policy.mean - means_when_left_out(a, wanted)
            assert float(off.abs().mean()) < 0.02 * float(a.abs().mean())


def test_predicted_losses_and_bytes(llama: Any) -> None:
    """A curve's first point is dense, its bytes are those of a packed matrix, and more left out loses more."""
    found = calibration(llama)
    mlp = FourBitMLP.of(dissect(llama).mlps[0])
    matrix = PackedLinear.pack(mlp.down, fmt="int4").weight.nbytes
    for form in Form:
        points = loss_curve(form, mlp, found.samples.hidden[0], found.fisher[0], found.information[0])
        assert points[0] == Point(1.0, None, mlp.nbytes, 0.0)
        assert form.bytes_read(mlp, 1.0, 1.0) == mlp.nbytes == 3 * matrix
        for ratio in form.ratios:
            losses = [p.loss for p in points if p.ratio == ratio]
            assert all(after > before for before, after in pairwise(losses))
        assert all(0.35 * points[0].nbytes < p.nbytes < points[0].nbytes for p in points[1:])


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


@pytest.mark.parametrize("form", Form)
def test_plans_save_and_load(form: Form, llama: Any, tmp_path: Path) -> None:
    plan = plan_with(llama, *calibration(llama).in_four_bits(form, 0.5, "equal"))
    plan.save(tmp_path / "some.plan")
    again = Plan.load(tmp_path / "some.plan")
    for before, after in zip(plan.layers, again.layers, strict=True):
        assert type(after.neurons) is type(before.neurons) is (Sketch if form is Form.PLANES else TopK)
        for name, value in vars(before.neurons).items():
            found = getattr(after.neurons, name)
            assert torch.equal(found, value) if isinstance(value, Tensor) else found == value


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
    assert isinstance(found.make("topk", 0.5, allocation="equal", gated=True).layers[0].neurons.gate, float)  # type: ignore[attr-defined]
    with pytest.raises(CoreskipError, match="of weights in 4 bits: add weights int4"):
        without.make("sketch", 0.5, bits=3)
    with pytest.raises(CoreskipError, match="of weights in 4 bits: add weights int4"):
        without.make("topk", 0.5, gated=True)


def test_mistakes() -> None:
    zeros, good = torch.zeros(4), {"bits": 3, "keep": 0.5, "threshold": 0.1}
    Sketch(**good, refine=0.2, candidates=0.6, mean=zeros, norm=zeros).check(4, 2)
    for wrong, words in (
        ({**good, "threshold": None}, "3 bits has a threshold"),
        ({**good, "smooth": torch.ones(2)}, "no smoothed inputs"),
        ({**good, "refine": 0.2}, "a refined sketch has 3 or 4 bits"),
        ({**good, "refine": 0.2, "candidates": 0.4}, "of 0.4 candidates 0.5 cannot be kept"),
        ({**good, "bits": 2}, "a sketch of 2 bits"),
    ):
        with pytest.raises(PlanError, match=words):
            Sketch(**wrong).check(4, 2)
    gated = {"keep": 0.5, "threshold": 0.1, "gate": 0.1, "reach": zeros, "candidates": 0.7}
    TopK(**gated).check(4, 2)
    for name in ("threshold", "gate", "reach", "candidates"):
        with pytest.raises(PlanError, match="scores that begin with the gate have two thresholds"):
            TopK(**{**gated, name: None}).check(4, 2)
    with pytest.raises(PlanError, match="reach is not fp32 of shape"):
        TopK(**gated).check(5, 2)
    with pytest.raises(CoreskipError, match="bits is 2: a sketch has 4 bits, 3"):
        SketchOptions(bits=2)
    with pytest.raises(CoreskipError, match="a sketch of 3 bits is of weights in 4 bits: add weights int4"):
        check_options(method="sketch", bits=3, weights="int8")
    check_options(method="sketch", bits=3, weights="int4", keep=0.5)


@pytest.mark.parametrize("form", Form)
def test_bytes_are_spread_better_than_equally(form: Form, llama: Any) -> None:
    """Of two plans of half of the neurons, as much less is lost as more is read, or better."""
    found = calibration(llama)
    mlps = [FourBitMLP.of(mlp) for mlp in dissect(llama).mlps]

    def loss_by_bytes(policies: Any) -> float:
        loss, read = 0.0, 0.0
        for layer, (mlp, policy) in enumerate(zip(mlps, policies, strict=True)):
            x = found.samples.hidden[layer]
            _, wanted = kept_by(policy, mlp, x)
            error = torch.where(wanted, 0, mlp.activations(x) - policy.mean) @ mlp.down
            loss += float(((error @ found.information[layer]) * error).sum(1).mean()) / 2
            read += form.bytes_read(mlp, policy.keep, policy.candidates or 1.0)
        return loss * read

    greedy, equal = (loss_by_bytes(found.in_four_bits(form, 0.5, allocation)) for allocation in ("greedy", "equal"))
    assert greedy < equal
