"""MLPs in 4-bit groups of which neurons are left out: as the numbers of their tiles define them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import rounding
import torch
from packed_models import tokenizer
from test_decode import COVERED
from tiny_models import greedy, prompt, tiny
from torch import Tensor

import coreskip
from coreskip import CoreskipError, PlanError
from coreskip.kernels import ops
from coreskip.kernels.groups import GROUP, ungroup, untile
from coreskip.kernels.neuron_groups import Form, PackedNeurons, neurons
from coreskip.kernels.packed import ACTS, PackedLinear, quantize
from coreskip.kernels.sparse import RowLists, SparseMLP
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.four_bits import Form as Choice
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import CoreNeurons, Static
from coreskip.runtime.bundles import Weights
from coreskip.runtime.cost import cost
from coreskip.runtime.step_timing import trial
from coreskip.runtime.wrap import runtime_of

NO_LIBRARY = ops.available("cpu")
pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))
# hidden, neurons, gated, rows: with blocks of 16 groups and without, runs left over, groups that are not full
SHAPES = [
    (576, 96, True, 1),
    (64, 100, True, 3),
    (100, 72, True, 8),
    (48, 33, False, 5),
    (1100, 40, True, 2),
    (640, 64, False, 1),
]


@dataclass(frozen=True)
class Case:
    """An MLP in tiles, inputs, and what it is to compute, in float64."""

    gate: PackedLinear | None
    up: PackedLinear
    down: PackedLinear
    x: Tensor
    act: str = "silu"

    @classmethod
    def of(cls, hidden: int, count: int, gated: bool, rows: int) -> Case:
        torch.manual_seed(hidden + count + rows)

        def packed(outputs: int, inputs: int) -> PackedLinear:
            return PackedLinear.pack(torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs) / 4, fmt="int4")

        gate = packed(count, hidden) if gated else None
        return cls(gate, packed(count, hidden), packed(hidden, count), torch.randn(rows, hidden))

    def packed(self, form: Form) -> PackedNeurons:
        return PackedNeurons.pack(self.gate, self.up, self.down, act=self.act, form=form)

    def gates(self, upper: bool = False) -> Tensor:
        """act(gate), ``[rows, neurons]``."""
        assert self.gate is not None
        return ACTS[self.act](_product(self.x, self.gate, upper))

    def activations(self, upper: bool = False) -> Tensor:
        up = _product(self.x, self.up, upper)
        return ACTS[self.act](up) if self.gate is None else self.gates(upper) * up

    def output(self, h: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What activations h ``[rows, neurons]`` come to, and how far sums in float32 may be from that: an activation
        that lies between two of its 255 steps may go to either."""
        weight = numbers(self.down)
        rounded, step, between = _rounded(h)
        y = rounded @ weight.t() + (self.down.bias if bias is None else bias)
        slack = (between * step) @ weight.abs().t()
        # the activations' own rounding is far below their steps
        return y, slack + rounding.of_linear(rounded, weight, self.down.bias, torch.float32) * 4


def numbers(packed: PackedLinear, upper: bool = False) -> Tensor:
    q, scale, least = untile(packed)
    values = 2 * (q >> 1) + 0.5 if upper else q
    return ungroup(values, scale, least).flatten(1)[:, : packed.in_features].double()


def _rounded(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x in 8 bits by groups of 32, the step of each value, and where a value is near the middle between two steps."""
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP)).float()
    integers, step = quantize(groups.reshape(-1, GROUP))
    at = groups.reshape(-1, GROUP) / step.clamp_min(1e-30)[:, None]
    between = ((at - at.floor() - 0.5).abs() < 1e-3).double()
    values = [integers.double() * step[:, None], step[:, None].expand_as(integers), between]
    first, second, third = (value.reshape(groups.shape)[:, : x.shape[1]].double() for value in values)
    return first, second, third


def _product(x: Tensor, packed: PackedLinear, upper: bool) -> Tensor:
    y: Tensor = _rounded(x)[0] @ numbers(packed, upper).t()
    return y if packed.bias is None else y + packed.bias


def between_two(scores: Tensor, share: float) -> float:
    """A threshold that is not near any score, below which about `share` of them lie."""
    ordered = scores.flatten().sort().values
    at = int(share * ordered.numel())
    some = ordered[max(0, at - 4) : at + 5]
    widest = int(some.diff().argmax())
    return float((some[widest] + some[widest + 1]) / 2)


def check(y: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    assert ((y.double() - expected[0]).abs() <= expected[1]).all()
    assert float(expected[1].median()) < 1e-2 * float(expected[0].abs().max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_listed_neurons(isa: str, shape: tuple[int, int, bool, int]) -> None:
    case = Case.of(*shape)
    packed, a = case.packed("listed"), case.activations()
    y, left_out = neurons(case.x, packed)
    check(y, case.output(a))
    assert left_out == 0
    for count in (1, shape[1] // 3, shape[1] - 1):
        indices = torch.randperm(shape[1])[:count].sort().values
        kept = torch.zeros_like(a)
        kept[:, indices] = 1
        check(neurons(case.x, packed, indices)[0], case.output(a * kept))
        wanted = (torch.rand(shape[1], shape[3]) < 0.5).to(torch.uint8)
        check(neurons(case.x, packed, indices, wanted)[0], case.output(a * kept * wanted.t()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", get_args(Form)[1:])
@pytest.mark.parametrize("means", [False, True])
def test_neurons_that_tokens_choose(isa: str, shape: tuple[int, int, bool, int], form: Form, means: bool) -> None:
    case = Case.of(*shape)
    if form == "gates" and case.gate is None:
        pytest.skip("has no gates")
    packed, a = case.packed(form), case.activations()
    norm, reach, mean = (torch.rand(shape[1]) + 0.5 for _ in range(3))
    if means:
        packed = packed.compensated(mean)
        a = a - mean
    packed = packed.scored(norm, reach if form == "gates" else None)
    exact, seen = a.abs() * norm, torch.full_like(a, torch.inf)
    if form == "gates":
        seen = case.gates().abs() * reach
    elif form == "planes":
        seen = case.activations(upper=True).abs() * norm
    threshold = 0.0 if form == "rows" else between_two(seen, 0.3)
    refine = between_two(exact, 0.5)
    kept = (seen >= threshold) & (exact >= refine)
    y, left_out = neurons(case.x, packed, threshold=threshold, refine=refine)
    assert left_out == int((~kept).sum())
    assert 0 < left_out < a.numel()
    check(y, case.output(a * kept, packed.down_bias))


def test_a_nan_stays(isa: str) -> None:
    case = Case.of(64, 64, True, 2)
    case.x[1, 5] = torch.nan
    for form in get_args(Form)[1:]:
        packed = case.packed(form).scored(None, torch.ones(64) if form == "gates" else None)
        y, _ = neurons(case.x, packed, threshold=1e9, refine=1e9)
        assert y[0].isfinite().all(), form
        assert y[1].isnan().all(), form


def test_down_rows_are_the_tiles_numbers() -> None:
    for shape in SHAPES:
        case = Case.of(*shape)
        for form in ("listed", "rows"):
            assert torch.equal(case.packed(form).down_rows().t().double(), numbers(case.down))


def test_what_cannot_be_packed() -> None:
    case = Case.of(48, 33, False, 1)
    with pytest.raises(ValueError, match="no gates"):
        case.packed("gates")
    with pytest.raises(ValueError, match="form must be one of"):
        case.packed("some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="int4 tiles"):
        PackedNeurons.pack(None, PackedLinear.pack(torch.randn(33, 48)), case.down, act="silu")
    with pytest.raises(ValueError, match="the reverse"):
        PackedNeurons.pack(None, case.down, case.up.part(0, 32) or case.up, act="silu")
    packed = case.packed("listed")
    for indices in ([3, 3], [4, 2], [-1, 2], [33]):
        with pytest.raises(ValueError, match="must ascend"):
            neurons(case.x, packed, torch.tensor(indices))
    with pytest.raises(ValueError, match="at most 8"):
        neurons(torch.randn(9, 48), packed)


def test_more_rows_than_one_call_takes() -> None:
    case = Case.of(64, 100, True, 3)
    packed, lists = case.packed("listed"), torch.stack([torch.randperm(100)[:30].sort().values for _ in range(3)])
    x = torch.randn(3, 6, 64)
    y, kept = SparseMLP(packed, lists=RowLists.of(lists, 100)).run(x)
    assert kept == 18 * 30
    for row in range(3):
        alone = torch.cat([neurons(x[row, i : i + 1], packed, lists[row])[0] for i in range(6)])
        assert torch.allclose(y[row], alone, atol=1e-5)


# ---- whole models ----


def plan_in_groups(model: Any, kind: str) -> Plan:
    anatomy = dissect(model)
    dense = Plan.dense(model, "int4")
    widths = [mlp.intermediate_size for mlp in anatomy.mlps]
    torch.manual_seed(3)
    if kind == "static":
        layers = [LayerPlan(Static(torch.randperm(width)[: width // 2].sort().values)) for width in widths]
    elif kind == "core":
        layers = [LayerPlan(CoreNeurons(0.4, 0.5, "griffin"))] * len(widths)
    else:
        hidden = [torch.randn(64, mlp.hidden_size) for mlp in anatomy.mlps]
        return trial(dense, anatomy.mlps, hidden, Choice(kind))
    return replace(dense, layers=tuple(layers))


def texts(model: Any, plan: Plan, rows: int, natively: bool) -> tuple[Tensor, float]:
    """Logits of 12 steps, and the share of neurons left out."""
    with coreskip.wrap(model, plan, keep_originals=True), torch.no_grad():
        runtime = runtime_of(model)
        if not natively:
            runtime.program_for = lambda cache: "a test wants it"  # type: ignore[method-assign]
        runtime.usage.counting = True
        ids, found = prompt(rows), []
        out = model(ids, use_cache=True)
        for step in range(12):
            token = (ids[:, :1] * 7 + step) % 50 + 3
            out = model(token, past_key_values=out.past_key_values)
            found.append(out.logits)
        assert runtime.steps.native.ready or not natively
        return torch.cat(found, 1), runtime.usage.neuron_sparsity()


@pytest.mark.parametrize("kind", ["static", "core", "gates", "rows", "planes"])
@pytest.mark.parametrize("family", COVERED)
def test_native_steps_compute_what_the_modules_do(family: str, kind: str) -> None:
    model = tiny(family)
    if kind == "gates" and not all(mlp.gated for mlp in dissect(model).mlps):
        pytest.skip("has no gates")
    plan = plan_in_groups(model, kind)
    natively, share = texts(model, plan, 2, True)
    on_modules, expected = texts(model, plan, 2, False)
    # rounding to 8 bits turns the last bits of what is rounded into steps
    error = (natively - on_modules).square().mean().sqrt() / on_modules.std()
    assert float(error) < 0.02
    assert share == pytest.approx(expected, abs=0.01)
    assert share > 0.3
    assert cost(model, plan).moved < cost(model, Plan.dense(model, "int4")).moved


def runtime_of_groups(model: Any, plan: Plan) -> PackedNeurons:
    """What the first layer's neurons are read from."""
    with coreskip.wrap(model, plan):
        packed = runtime_of(model).prepared.mlp(0).packed
        assert isinstance(packed, PackedNeurons)
        return packed


@pytest.mark.parametrize("kind", ["gates", "rows", "planes"])
def test_what_kernels_cannot_choose_is_refused_at_once(kind: str) -> None:
    model = tiny("llama")
    odd = torch.nn.Hardswish()
    for layer in model.model.layers:
        layer.mlp.act_fn = odd
    plan = plan_in_groups(model, kind)
    with pytest.raises(CoreskipError, match="do not know the activation"):
        coreskip.wrap(model, plan)
    with coreskip.wrap(model, replace(plan_in_groups(model, "static"), weights="int4")):
        model.generate(prompt(1), max_new_tokens=4)  # listed neurons are read in 8 bits there
    if kind != "rows":  # which other weights have, too
        with pytest.raises(PlanError, match="weights must be int4"):
            coreskip.wrap(model, replace(plan, weights=None))


def test_a_packed_models_own_groups(tmp_path: Path) -> None:
    """Neurons of a packed model are read from its tiles, and not rounded again."""
    model = tiny("llama")
    coreskip.pack(model, tokenizer(), tmp_path / "packed", weights="int4", progress=False)
    packed, _ = coreskip.load(tmp_path / "packed")
    for kind in ("core", "gates", "planes"):
        plan = plan_in_groups(model, kind)
        own = replace(plan, weights="packed", model=Plan.dense(packed).model)
        (natively, share), (on_modules, _) = (texts(packed, own, 2, how) for how in (True, False))
        error = (natively - on_modules).square().mean().sqrt() / on_modules.std()
        assert float(error) < 0.02, kind
        assert share > 0.3
        groups = Weights(dissect(packed)).groups(0, "listed") if kind == "core" else runtime_of_groups(packed, own)
        difference = groups.down_rows() - packed.model.layers[0].mlp.down_proj.unpacked().t()
        assert float(difference.abs().max()) == 0, kind


class Inside(torch.nn.Module):
    """A module without a weight of its own, as adapters made at home are."""

    def __init__(self, linear: torch.nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
def test_a_layer_with_a_part_of_another_kind_runs_dense(weights: str | None, part: str) -> None:
    model = tiny("llama")
    plan = replace(plan_in_groups(model, "core"), weights=weights)
    with coreskip.wrap(model, plan, keep_originals=True):
        mlp = model.model.layers[1].mlp
        setattr(mlp, part, Inside(getattr(mlp, part)))
        usage = runtime_of(model).usage
        usage.counting = True
        usage.reset()
        greedy(model, prompt(1), 6)
        assert usage.neuron_sparsity() == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize("kind", ["static", "core", "gates"])
def test_a_nan_written_later(kind: str) -> None:
    model = tiny("llama")
    with coreskip.wrap(model, plan_in_groups(model, kind), keep_originals=True), torch.no_grad():
        greedy(model, prompt(1), 4)
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
        if kind == "gates":
            with pytest.raises(CoreskipError, match="layer 1 has no 4-bit groups"):
                greedy(model, prompt(1), 4)
        else:
            greedy(model, prompt(1), 4)


def test_scores_below_zero_are_refused() -> None:
    model = tiny("llama")
    for kind, name in (("gates", "reach"), ("planes", "norm")):
        plan = plan_in_groups(model, kind)
        policy = replace(plan.layers[0].neurons, **{name: -torch.ones(160)})
        with pytest.raises(PlanError, match="below 0"):
            coreskip.wrap(model, replace(plan, layers=(LayerPlan(policy), *plan.layers[1:])))
