"""The native step over mixtures of experts, against their definition in torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from coreskip.kernels.experts import SCORINGS, Expert, PackedExperts, Router, experts_of, side_by_side
from coreskip.kernels.ops import MAX_ROWS, PackedLinear, available
from coreskip.kernels.step import KeyValues, Norm, Step, StepLayer, StepModel

pytestmark = pytest.mark.skipif(available("cpu") is not None, reason="needs the compiled kernels")

FORMATS = ("float32", "bfloat16", "float16", "int8", "int8_groups", "int4")


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def packing(fmt: str) -> Any:
    def pack(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
        if fmt in ("float32", "bfloat16", "float16"):
            return PackedLinear.pack(weight.to(getattr(torch, fmt)), bias)
        return PackedLinear.pack(weight, bias, fmt=fmt)

    return pack


def pack_all(pack: Any) -> Any:
    return lambda matrices: side_by_side((pack(weight, bias), weight) for weight, bias in matrices)


def mixture(
    experts: int = 8,
    chosen: int = 2,
    hidden: int = 48,
    neurons: int = 40,
    *,
    fmt: str = "float32",
    gated: bool = True,
    biased: bool = False,
    shared: int = 0,
    act: str = "silu",
    seed: int = 0,
    **router: Any,
) -> PackedExperts:
    pack = packing(fmt)
    up = drawn(experts, neurons * (1 + gated), hidden, seed=seed + 1, scale=hidden**-0.5)
    down = drawn(experts, hidden, neurons, seed=seed + 2, scale=neurons**-0.5)
    biases = drawn(experts, up.shape[1], seed=seed + 3), drawn(experts, hidden, seed=seed + 4)
    packed = experts_of(up, down, *(biases if biased else ()), stacked=gated, pack=pack_all(pack))
    extra = None
    if shared:
        parts = (drawn(shared, hidden, seed=seed + 5, scale=hidden**-0.5) for _ in range(2))
        extra = Expert(*map(pack, parts), pack(drawn(hidden, shared, seed=seed + 6, scale=shared**-0.5)))
    logits = PackedLinear.pack(drawn(experts, hidden, seed=seed + 7, scale=hidden**-0.5))
    return PackedExperts(Router(logits, chosen, **router), packed, act, extra)


def norm_of(hidden: int) -> Norm:
    return Norm(torch.ones(hidden), None, 1e-6, "rms")


def step_over(*mixtures: PackedExperts, table: Tensor) -> Step:
    """A decoder without attention, whose logits are its normed residuals."""
    hidden = table.shape[1]
    layers = [StepLayer(None, mixed, mixed.act, mlp_in=norm_of(hidden)) for mixed in mixtures]
    return Step(StepModel(table, layers, norm_of(hidden), PackedLinear.pack(torch.eye(hidden)), torch.float32))


def run(step: Step, tokens: Tensor) -> tuple[Tensor, float]:
    """Logits [rows, hidden] of tokens [rows], each a sequence."""
    places = torch.zeros((len(tokens), 1), dtype=torch.int64)
    nothing = KeyValues((), (), ())
    logits, skipped = step.run(tokens[:, None], places, places[:, 0], nothing, 0, 1)
    return logits[:, 0], skipped


def defined(table: Tensor, tokens: Tensor, *mixtures: PackedExperts) -> Tensor:
    def normed(x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    x = table[tokens]
    for mixed in mixtures:
        x = x + mixed.compute(normed(x))
    return normed(x)


def check(*mixtures: PackedExperts, rows: int = 3, tolerance: float = 2e-5) -> None:
    hidden = mixtures[0].experts[0].down.out_features
    table, tokens = drawn(32, hidden, seed=9), torch.arange(rows) * 3 % 32
    got, _ = run(step_over(*mixtures, table=table), tokens)
    expected = defined(table, tokens, *mixtures)
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 3, MAX_ROWS])
def test_formats_and_rows(isa: str, fmt: str, rows: int) -> None:
    # x may differ in its last bits where it is rounded to 8, and then by a step
    tolerance = {"int8": 2e-2, "int8_groups": 2e-2, "int4": 2e-2}.get(fmt, 2e-5)
    check(mixture(fmt=fmt, shared=24), rows=rows, tolerance=tolerance)


@pytest.mark.parametrize("fmt", ["float32", "int4"])
@pytest.mark.parametrize(("hidden", "neurons"), [(17, 5), (33, 31), (64, 16), (100, 77), (130, 129)])
@pytest.mark.parametrize("gated", [True, False])
def test_ugly_sizes(isa: str, hidden: int, neurons: int, gated: bool, fmt: str) -> None:
    mixed = mixture(5, 2, hidden, neurons, gated=gated, biased=True, fmt=fmt, act="gelu_tanh")
    check(mixed, rows=3, tolerance=3e-2 if fmt == "int4" else 2e-5)


@pytest.mark.parametrize(("experts", "chosen"), [(2, 1), (2, 2), (7, 3), (64, 8), (128, 1), (128, 8)])
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("normalized", [True, False])
def test_numbers_of_experts(isa: str, experts: int, chosen: int, scoring: str, normalized: bool) -> None:
    if scoring == "sparse_mixer":
        if chosen > 2:
            return
        extra = {"jitter": 0.1}
    else:
        extra = {"correction": drawn(experts, seed=11, scale=0.1), "scale": 2.5, "added": 1e-20}
    check(mixture(experts, chosen, 32, 16, scoring=scoring, normalized=normalized, **extra), rows=4)


@pytest.mark.parametrize("by_pairs", [True, False])
@pytest.mark.parametrize(("groups", "groups_kept"), [(2, 1), (4, 2), (8, 3), (16, 16), (16, 4)])
def test_groups_of_experts(isa: str, groups: int, groups_kept: int, by_pairs: bool) -> None:
    extra = {"groups": groups, "groups_kept": groups_kept, "by_pairs": by_pairs, "scoring": "sigmoid"}
    mixed = mixture(16, 2, correction=drawn(16, seed=12, scale=0.5), **extra)
    check(mixed, rows=MAX_ROWS)
    kept = torch.tensor([1, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 1], dtype=torch.uint8)
    check(replace(mixed, router=replace(mixed.router, kept=kept)), rows=MAX_ROWS)


def test_several_layers_of_other_sizes_and_formats(isa: str) -> None:
    first = mixture(8, 2, 48, 40, shared=100, fmt="bfloat16")
    second = mixture(16, 5, 48, 24, seed=20)
    gated = replace(first, shared_gate=PackedLinear.pack(drawn(1, 48, seed=40)))
    check(first, second, gated, rows=5)


def test_clamped_gates_and_interleaved_transposed_parameters(isa: str) -> None:
    experts, hidden, neurons = 4, 36, 20
    up, down = drawn(experts, hidden, 2 * neurons, seed=1), drawn(experts, neurons, hidden, seed=2, scale=0.2)
    biases = drawn(experts, 2 * neurons, seed=3), drawn(experts, hidden, seed=4)
    packed = experts_of(up, down, *biases, interleaved=True, transposed=True)
    router = Router(PackedLinear.pack(drawn(experts, hidden, seed=5), drawn(experts, seed=6)), 2, "softmax_of_chosen")
    mixed = PackedExperts(router, packed, "silu", limit=2.0, slope=1.702, offset=1.0)
    check(mixed, rows=4)
    # what gpt-oss says of one expert
    x = drawn(3, hidden, seed=7)
    gate, up_of_x = (x @ up[1] + biases[0][1])[:, ::2].clamp(max=2), (x @ up[1] + biases[0][1])[:, 1::2].clamp(-2, 2)
    expected = ((up_of_x + 1) * gate * torch.sigmoid(gate * 1.702)) @ down[1] + biases[1][1]
    only = mixed.weighted(x, torch.ones(3, 1), torch.ones(3, 1, dtype=torch.int64))
    torch.testing.assert_close(only, expected, rtol=1e-4, atol=1e-4)


def test_plain_parameters_stay_where_they_lie() -> None:
    up, down = drawn(3, 64, 64), drawn(3, 64, 32)
    packed = experts_of(up, down, stacked=True)
    assert packed[1].gate is not None
    assert packed[1].gate.weight.data_ptr() == up[1].data_ptr()
    assert packed[1].up.weight.data_ptr() == up[1, 32:].data_ptr()
    assert packed[2].down.weight.data_ptr() == down[2].data_ptr()


def test_packed_matrices_lie_side_by_side_and_gates_may_lie_apart() -> None:
    gate, up, down = drawn(3, 32, 64, seed=1), drawn(3, 32, 64, seed=2), drawn(3, 64, 32, seed=3)
    whole = experts_of(torch.cat([gate, up], 1), down, stacked=True, pack=pack_all(packing("int4")))
    apart = experts_of(up, down, gate=gate, pack=pack_all(packing("int4")))
    for one, other in zip(whole, apart, strict=True):
        for a, b in zip(one.linears, other.linears, strict=True):
            assert torch.equal(a.weight, b.weight)
    first, second = (expert.up.weight for expert in apart[:2])
    assert second.data_ptr() - first.data_ptr() == first.nbytes


@pytest.mark.parametrize("scoring", SCORINGS)
def test_kept_experts_are_those_of_a_router_without_the_others(isa: str, scoring: str) -> None:
    mixed = mixture(12, 2, scoring=scoring, jitter=0.2 if scoring == "sparse_mixer" else 0.0)
    kept = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1], dtype=torch.uint8)
    places = kept.nonzero()[:, 0]
    fewer = replace(
        mixed,
        router=replace(mixed.router, logits=PackedLinear.pack(mixed.router.logits.weight[places, :48])),
        experts=[mixed.experts[i] for i in places],
    )
    masked = replace(mixed, router=replace(mixed.router, kept=kept))
    check(masked, rows=5)
    table, tokens = drawn(32, 48, seed=9), torch.arange(5)
    torch.testing.assert_close(
        run(step_over(masked, table=table), tokens)[0], run(step_over(fewer, table=table), tokens)[0]
    )


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("least", [0.0, 0.8, 0.99])
def test_experts_of_little_weight_are_left_out(isa: str, scoring: str, least: float) -> None:
    chosen = 2 if scoring == "sparse_mixer" else 4
    mixed = mixture(8, chosen, scoring=scoring, least=least, normalized=True, jitter=0.05)
    check(mixed, rows=6)
    table, tokens = drawn(32, 48, seed=9), torch.arange(6)
    _, skipped = run(step_over(mixed, table=table), tokens)
    x = table[tokens]
    _, experts = mixed.router.route(x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt())
    assert skipped == int((experts < 0).sum()) * 40
    assert (skipped > 0) == (least > 0)


@pytest.mark.parametrize("fmt", ["float32", "bfloat16", "int8_groups", "int4"])
def test_bits_depend_neither_on_threads_nor_on_other_rows(isa: str, fmt: str, threads: None) -> None:
    mixtures = mixture(16, 3, 96, 80, fmt=fmt, shared=64), mixture(16, 3, 96, 48, fmt=fmt, seed=30)
    table, tokens = drawn(32, 96, seed=9), torch.arange(MAX_ROWS)
    step = step_over(*mixtures, table=table)
    torch.set_num_threads(1)
    alone = torch.cat([run(step, tokens[i : i + 1])[0] for i in range(MAX_ROWS)])
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        for _ in range(5):
            assert torch.equal(run(step, tokens)[0], alone)
            assert torch.equal(run(step, tokens[:3])[0], alone[:3])


def test_equal_scores_are_chosen_as_torch_chooses_them(isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for experts, chosen in [(4, 2), (8, 2), (16, 4), (60, 4), (64, 8), (128, 1), (128, 2), (128, 8), (256, 3)]:
        mixed = mixture(experts, chosen, 32, 4)
        # logits of few values: those of equal experts are equal
        rows = torch.randint(0, 5, (experts,), generator=generator)
        tied = replace(mixed, router=replace(mixed.router, logits=PackedLinear.pack(drawn(5, 32, seed=3)[rows])))
        check(tied, rows=MAX_ROWS)


def test_numbers_that_are_none_come_through(isa: str) -> None:
    mixed = mixture()
    table = drawn(32, 48, seed=9)
    table[0, 3] = torch.nan
    got, _ = run(step_over(mixed, table=table), torch.tensor([0, 1]))
    assert got[0].isnan().all()
    assert torch.equal(got[1:], run(step_over(mixed, table=table), torch.tensor([1]))[0])


def test_what_makes_no_mixture_is_refused() -> None:
    mixed = mixture()
    logits = mixed.router.logits
    for wrong in (
        {"chosen": 9}, {"chosen": 0}, {"scoring": "cosine"}, {"groups": 3}, {"groups": 2, "groups_kept": 3},
        {"chosen": 3, "scoring": "sparse_mixer"}, {"correction": torch.zeros(7)}, {"kept": torch.ones(8)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"."):
            Router(logits, **{"chosen": 2, **wrong})
    with pytest.raises(ValueError, match="chooses among 8 experts, not 7"):
        replace(mixed, experts=mixed.experts[1:])
    with pytest.raises(ValueError, match="slope"):
        replace(mixed, act="gelu", slope=1.7)
    first, second = mixed.experts[0], mixture(fmt="int4").experts[0]
    with pytest.raises(ValueError, match="in groups"):
        Expert(first.gate, second.up, second.down)


def test_experts_are_read_in_turn_whatever_share_a_thread_has(isa: str, threads: None) -> None:
    """Sizes at which shares begin and end within experts, with more threads than experts are active."""
    for neurons, shared in pairwise((16, 33, 48, 250, 7)):
        mixed = mixture(6, 1, 64, neurons, fmt="int4", shared=shared)
        for count in (1, 2, 4, 8):
            torch.set_num_threads(count)
            check(mixed, rows=1, tolerance=2e-2)
