"""Calibration of the policies that choose token by token, against what each figure is defined as."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from test_policies import plan_with
from tiny_models import greedy, prompt, sparse_of, tiny
from torch import Tensor

import coreskip
from coreskip import CoreskipError
from coreskip.kernels.ops import sketch_select
from coreskip.kernels.reference import refined
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.checks import ALLOCATIONS
from coreskip.predictors.learned import recall, train_predictors
from coreskip.predictors.policies import Cats, Teal, TopK, Wina
from coreskip.predictors.token_choice import SHARES, ThresholdRule, TokenCalibration, spread_share
from coreskip.predictors.token_samples import (
    cett_threshold,
    fisher_information,
    fisher_norms,
    means_when_left_out,
    quantile,
    relative_error,
    sample_tokens,
)
from coreskip.runtime.bundles import Weights
from coreskip.runtime.emulation import Emulation


def calibration(model: Any) -> TokenCalibration:
    return TokenCalibration(model, prompt(6, 40), most=120, progress=False)


def test_samples_are_the_linears_inputs(llama: Any) -> None:
    windows = prompt(3, 20)
    seen: list[Tensor] = []
    handle = dissect(llama).mlps[1].down.register_forward_pre_hook(lambda m, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        for row in windows.split(1):
            llama(row)
    handle.remove()
    found = sample_tokens(llama, windows, attention=True, progress=False)
    expected = torch.cat([a[0, 10:] for a in seen])
    assert torch.allclose(found.activations[1], expected, rtol=1e-4, atol=1e-5)
    assert found.hidden[0].shape == (30, 64)
    assert found.attention[2][0].shape == found.attention[2][1].shape == (30, 64)
    assert len(sample_tokens(llama, windows, most=6, progress=False).hidden[0]) == 6
    assert all(size > 0 for size in found.residual)


def test_quantile() -> None:
    values = torch.arange(100.0)[torch.randperm(100)]
    for share in (0.0, 0.01, 0.3, 1.0):
        least = quantile(values, share)
        assert int((values < least).sum()) == pytest.approx(100 * share, abs=1)


def test_cett_is_the_sparsing_laws_ratio() -> None:
    rng = torch.Generator().manual_seed(0)
    a, down = torch.randn(50, 30, generator=rng), torch.randn(30, 12, generator=rng)
    for cett in (0.1, 0.3, 0.7):
        least = cett_threshold(a, down, cett)
        ratios = []
        for token in a:
            outputs = token[:, None] * down
            left_out = outputs[outputs.norm(dim=1) < least].sum(0)
            ratios.append(float(left_out.norm() / outputs.sum(0).norm()))
        mean = sum(ratios) / len(ratios)
        assert mean <= cett
        assert mean == pytest.approx(cett, abs=0.03)
        wanted = a.abs() * down.norm(dim=1) >= least
        assert relative_error(a, down, wanted) == pytest.approx(torch.tensor(ratios), rel=1e-3)
    assert cett_threshold(a, down, 0.0) == pytest.approx(float((a.abs() * down.norm(dim=1)).min()))


def test_means_of_what_is_left_out() -> None:
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    wanted = torch.tensor([[True, True], [False, True], [False, True]])
    assert means_when_left_out(a, wanted).tolist() == [4.0, 0.0]


def test_fisher_norms_predict_what_an_error_costs() -> None:
    """Against KL divergences measured after nudging one neuron's output at one position."""
    model = tiny("llama", num_hidden_layers=2)
    ids = prompt(1, 12)
    norms = fisher_norms(dissect(model), fisher_information(model, ids.repeat(400, 1), progress=False))
    mlp = dissect(model).mlps[0]
    rows = mlp.matrices().down
    chosen = [int(norms[0].argmax()), int(norms[0].argmin()), 7]
    measured = []
    with torch.no_grad():
        dense = model(ids).logits[0].log_softmax(-1)
        for neuron in chosen:
            total = 0.0
            for place in range(6, 12):
                nudge = torch.zeros(1, 12, 64)
                nudge[0, place] = 0.02 * rows[neuron]
                handle = mlp.down.register_forward_hook(lambda m, i, out, nudge=nudge: out + nudge)
                log_q = model(ids).logits[0].log_softmax(-1)
                handle.remove()
                total += float((dense.exp() * (dense - log_q)).sum())
            measured.append((2 * total / 6) ** 0.5 / 0.02)
    assert [float(norms[0][n]) for n in chosen] == pytest.approx(measured, rel=0.25)
    assert measured[0] > 1.5 * measured[1]


def test_gradients_leave_the_model_as_it_was(llama: Any) -> None:
    llama.train()
    frozen = next(llama.parameters()).requires_grad_(False)
    before = llama(prompt()).logits
    fisher_information(llama, prompt(1, 12), progress=False)
    assert llama.training
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in llama.parameters() if p is not frozen)
    assert all(p.grad is None for p in llama.parameters())
    assert torch.equal(llama(prompt()).logits, before)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_allocations_keep_the_share_asked_for(family: str, allocation: Any) -> None:
    model = tiny(family)
    found = calibration(model)
    for keep in (0.8, 0.4):
        policies = found.sketch(keep, allocation)
        plan = plan_with(model, *policies)
        # half of a tiny OPT's activations are zero and never kept
        expected = keep if family == "llama" or allocation == "equal" else min(keep, 0.5)
        assert plan.keep == pytest.approx(expected, abs=0.03)
        layers = {policy.keep for policy in policies}
        assert (len(layers) == 1) == (allocation == "equal")
        with coreskip.wrap(model, plan):
            greedy(model, prompt(), 3)
        oracle = found.topk(keep, allocation)
        assert plan_with(model, *oracle).keep == pytest.approx(plan.keep, abs=0.03)
    assert {policy.keep for policy in found.sketch(1.0, allocation)} == {1.0}


def test_the_sketch_is_calibrated_on_what_it_sees(llama: Any) -> None:
    found = calibration(llama)
    for layer, policy in enumerate(found.sketch(0.6, "fisher")):
        sparse = sparse_of(Weights(dissect(llama)), layer, policy)
        x = found.samples.hidden[layer]
        wanted = (sketch_select(x[:8] * sparse.smooth, sparse.packed, threshold=policy.threshold) >= 0).sum(1)
        score = found.sketched[layer][:8] * policy.norm
        assert torch.equal(wanted, (score >= policy.threshold).sum(1))


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_refined_sketches_keep_the_share_asked_for(family: str, allocation: Any) -> None:
    model = tiny(family)
    found = calibration(model)
    for keep in (0.8, 0.4):
        policies = found.sketch(keep, allocation, refine=True)
        expected = keep if family == "llama" else min(keep, 0.5)
        assert plan_with(model, *policies).keep == pytest.approx(expected, abs=0.03)
    assert all(policy.refine is None for policy in found.sketch(1.0, allocation, refine=True))


def test_a_refined_sketch_is_calibrated_on_what_the_kernels_do(llama: Any) -> None:
    """Its shares are those counted, its means those of what is left out in the end, and its choice loses less."""
    found = calibration(llama)
    for layer, policy in enumerate(found.sketch(0.6, "greedy", refine=True)):
        assert policy.refine is not None
        assert policy.candidates is not None
        sparse = sparse_of(Weights(dissect(llama)), layer, policy)
        assert sparse.smooth is not None
        a, x = found.samples.activations[layer], found.samples.hidden[layer] * sparse.smooth
        chosen = sketch_select(x, sparse.packed, threshold=policy.threshold, backend="torch")
        kept = refined(x, sparse.packed, chosen, policy.refine)
        assert float((chosen >= 0).float().mean()) == pytest.approx(policy.candidates, abs=0.005)
        assert float((kept >= 0).float().mean()) == pytest.approx(policy.keep, abs=0.005)
        wanted = (kept[:, :, None] == torch.arange(a.shape[1])).any(1)
        assert policy.mean is not None
        off = policy.mean - means_when_left_out(a, wanted)
        assert float(off.abs().mean()) < 0.02 * float(a.abs().mean())
        score = found.sketched[layer] * found.fisher[layer]
        alike = score >= quantile(score, 1 - policy.keep)
        lost, before = (
            float((torch.where(w, 0, a - means_when_left_out(a, w)) * found.fisher[layer]).square().sum())
            for w in (wanted, alike)
        )
        assert lost < 0.9 * before


def test_greedy_shares_have_the_least_sum_of_losses() -> None:
    """Against every combination of shares."""
    steps = torch.tensor(SHARES, dtype=torch.float64)
    losses = torch.stack([steps**2, 3 * steps**2, 0.4 * steps + steps**4])
    for share in (0.2, 0.35, 0.6):
        found = spread_share(losses, [100, 100, 100], share)
        total = sum(found)
        assert total / 3 == pytest.approx(share, abs=0.01)
        spent = sum(float(curve[SHARES.index(s)]) for curve, s in zip(losses, found, strict=True))
        best = min(
            float(losses[0, i] + losses[1, j] + losses[2, k])
            for i, a in enumerate(SHARES)
            for j, b in enumerate(SHARES)
            for k, c in enumerate(SHARES)
            if a + b + c >= total - 1e-9
        )
        assert spent == pytest.approx(best)
    assert spread_share(losses, [100, 100, 100], 0.0) == [0.0, 0.0, 0.0]
    concave = torch.stack([0.5 * steps.sqrt(), steps])
    assert spread_share(concave, [100, 100], 0.25) == [0.5, 0.0], "a part of a segment that does not fit is taken"


def test_predicted_losses_are_those_of_one_layer_alone() -> None:
    """Against the KL divergence measured with that layer sparse, within what 60 tokens can tell."""
    model = tiny("llama", num_hidden_layers=2)
    windows = prompt(60, 12)
    found = TokenCalibration(model, windows, most=360, progress=False)
    predicted = found._losses(found.exact)
    index = SHARES.index(0.3)
    policies = [TopK(keep=1.0), TopK(keep=1.0)]
    a, norm = found.samples.activations[0], found.fisher[0]
    least = quantile(a.abs() * norm, 0.3)
    wanted = a.abs() * norm >= least
    policies[0] = TopK(keep=0.7, threshold=least, norm=norm, mean=means_when_left_out(a, wanted))
    text = TokenText(windows.flatten(), torch.tensor([], dtype=torch.int64), "letters")
    measured = Emulation(model, text, windows=60, window=12, progress=False).score(plan_with(model, *policies))
    assert float(predicted[0, index]) == pytest.approx(measured["kl"], rel=0.5)
    assert bool((predicted.diff(dim=1) > 0).all())


@pytest.mark.parametrize("rule", get_args(ThresholdRule))
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_thresholds_keep_the_share_asked_for(family: str, rule: Any) -> None:
    model = tiny(family)
    found = calibration(model)
    policies = found.threshold(0.6, rule, everywhere=rule == "teal")
    assert isinstance(policies[0], {"cats": Cats, "teal": Teal, "wina": Wina}[rule])
    if rule != "cats":
        down = next(name for name in policies[1].thresholds if name == f"mlp.{dissect(model).mlps[1].down_name}")
        x = found.samples.activations[1].abs()
        x = x * dissect(model).mlps[1].matrices().down.norm(dim=1) if rule == "wina" else x
        assert float((x >= policies[1].thresholds[down]).float().mean()) == pytest.approx(
            0.5 if family == "opt" else 0.6, abs=0.04
        )
        assert any(name.startswith("attention.") for name in policies[0].thresholds) == (rule == "teal")
    with coreskip.wrap(model, plan_with(model, *policies)):
        greedy(model, prompt(), 3)


def test_learned_predictors_find_what_can_be_found() -> None:
    """Scores that are a low-rank map of the inputs can be learned; a predictor of another layer's cannot know them."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1200, 20, generator=rng)
    truth = torch.randn(20, 3, generator=rng) @ torch.randn(3, 48, generator=rng)
    scores = [(x @ truth).exp(), (torch.randn(1200, 20, generator=rng) @ truth).exp()]
    good, hopeless = train_predictors([x, x], scores, keep=0.25, rank=4, progress=False)
    assert good.recall is not None
    assert hopeless.recall is not None
    assert good.recall > 0.85
    assert hopeless.recall < 0.45
    assert recall(good, x, scores[0]) == pytest.approx(good.recall, abs=0.05)
    again = train_predictors([x], scores[:1], keep=0.25, rank=4, progress=False)[0]
    assert torch.equal(again.expand, good.expand)


def test_signs_find_what_relu_leaves() -> None:
    """An OPT whose biases leave about one neuron in six: signs see the weights, so they do better than chance."""
    model = tiny("opt")
    with torch.no_grad():
        for mlp in dissect(model).mlps:
            mlp.up.bias.fill_(-1.5)
    found = calibration(model)
    natural = float(torch.cat([a == 0 for a in found.samples.activations]).float().mean())
    assert 0.7 < natural < 0.95
    recall = found.sign_recall(0.4)
    assert 0.7 < recall < 1
    x, mlp, a = found.samples.hidden[1], dissect(model).mlps[1], found.samples.activations[1]
    score = torch.sign(x) @ torch.sign(mlp.matrices().up).t()
    chosen = score >= score.topk(64, dim=1).values[:, -1:]
    assert float((chosen & (a > 0)).sum() / (a > 0).sum()) == pytest.approx(recall, abs=0.15)
    assert found.sign_recall(1.0) == 1.0


def test_learned_plans_run(llama: Any) -> None:
    policies = calibration(llama).learned(0.5, rank=8)
    assert all(policy.rank == 8 for policy in policies)
    with coreskip.wrap(llama, plan_with(llama, *policies)):
        greedy(llama, prompt(), 3)


def test_mistakes(llama: Any) -> None:
    with pytest.raises(CoreskipError, match="unknown allocation 'best'; choose from equal"):
        calibration(llama).sketch(0.5, "best")  # type: ignore[arg-type]
