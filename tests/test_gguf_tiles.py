"""Matrices of GGUF files in tiles: the very numbers of the file, and products with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import rounding
import torch
from gguf_files import blocks_of, numbers_of
from torch import Tensor
from torch.nn import functional as F

from coreskip.kernels import cpu, ops, reference
from coreskip.kernels.groups import BY_BYTES, FORMATS, OF_GGUF, ungroup, untile
from coreskip.kernels.packed import DTYPES, PackedLinear
from coreskip.kernels.step import Attention, DenseMLP, KeyValues, Norm, Step, StepLayer, StepModel

NO_LIBRARY = ops.available("cpu")
pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))
KINDS = list(OF_GGUF)
SHAPES = [(1, 256), (16, 256), (17, 768), (45, 512)]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def matrix(kind: str, rows: int, width: int, seed: int = 0, *, whole: bool = True) -> tuple[PackedLinear, Tensor]:
    raw = blocks_of(kind, rows, width, seed)
    return cpu.tiles_of_gguf(torch.from_numpy(raw), kind, whole=whole), numbers_of(kind, raw)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_hold_the_very_numbers(isa: str, kind: str, shape: tuple[int, int]) -> None:
    packed, weight = matrix(kind, *shape)
    assert (packed.fmt, packed.out_features, packed.in_features) == (OF_GGUF[kind], *shape)
    assert packed.stride == shape[1]
    assert same_bits(ungroup(*untile(packed)).flatten(1), weight)
    assert same_bits(cpu.untile(packed, torch.empty(shape)), weight)
    first = shape[0] // 3
    for dtype in DTYPES:
        some = cpu.untile(packed, torch.empty(shape[0] - first, shape[1], dtype=dtype), first)
        assert torch.equal(some, weight[first:].to(dtype))


def test_they_take_up_to_five_percent_more_than_the_file() -> None:
    assert len(BY_BYTES) == len(FORMATS)
    for kind, name in OF_GGUF.items():
        assert cpu.gguf_bytes(kind) * 16 <= FORMATS[name].tile_bytes <= 1.05 * 16 * cpu.gguf_bytes(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_in_the_order_asked_for(kind: str) -> None:
    raw = torch.from_numpy(blocks_of(kind, 37, 256))
    order = torch.randperm(37)
    packed = cpu.tiles_of_gguf(raw, kind, order)
    assert torch.equal(packed.weight, cpu.tiles_of_gguf(raw[order], kind).weight)


def test_what_is_no_such_matrix_is_refused() -> None:
    raw = torch.from_numpy(blocks_of("Q4_K", 5, 512))
    for wrong in (raw[:, :-1], raw[:, :0], raw.int()):
        with pytest.raises(ValueError, match="144 bytes"):
            cpu.tiles_of_gguf(wrong, "Q4_K")
    for order in (torch.arange(4), torch.arange(1, 6), torch.arange(5).int()):
        with pytest.raises(ValueError, match="order"):
            cpu.tiles_of_gguf(raw, "Q4_K", order)
    with pytest.raises(KeyError):
        cpu.tiles_of_gguf(raw, "Q2_K")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", range(1, 9))
def test_products_with_inputs_as_they_are(isa: str, kind: str, shape: tuple[int, int], rows: int) -> None:
    packed, weight = matrix(kind, *shape)
    packed, x = replace(packed, bias=torch.randn(shape[0])), torch.randn(rows, shape[1])
    y = ops.linear(x, packed, backend="cpu")
    exact = F.linear(x.double(), weight.double(), packed.bias.double())
    assert bool(((y - exact).abs() <= rounding.of_linear(x, weight, packed.bias, torch.float32)).all())
    for row in range(rows):  # alone as among others
        assert torch.equal(ops.linear(x[row], packed, backend="cpu"), y[row])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", range(1, 9))
def test_products_with_inputs_in_8_bits(isa: str, kind: str, shape: tuple[int, int], rows: int) -> None:
    packed, weight = matrix(kind, *shape, whole=False)
    x = torch.randn(rows, shape[1]) * torch.logspace(-2, 2, shape[1])
    y = ops.linear(x, packed, backend="cpu")
    rounded = rounded_to_8_bits(x)
    # a group's integers are multiplied with scale and with least on their own, and may cancel each other
    _, scale, least = untile(packed)
    form = FORMATS[OF_GGUF[kind]]
    of_least = scale.abs().float() * (1 << form.bits - 1) if form.centred else least.abs().float()
    bound = rounding.of_linear(rounded, weight, None, torch.float32)
    bound += rounding.of_linear(rounded, of_least.repeat_interleave(shape[1] // scale.shape[1], 1), None, torch.float32)
    assert bool(((y - rounded @ weight.double().t()).abs() <= bound).all())
    torch.testing.assert_close(y, reference.linear(x, packed), rtol=1e-4, atol=1e-5 * float(y.abs().max()))
    for row in range(rows):
        assert torch.equal(ops.linear(x[row], packed, backend="cpu"), y[row])


def rounded_to_8_bits(x: Tensor) -> Tensor:
    groups = x.view(-1, 32)
    step = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / step).round().double() * step.double()).view(x.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_numbers_and_inputs_do_not_overflow(isa: str, kind: str) -> None:
    raw = blocks_of(kind, 16, 256)
    for fill in (0x00, 0x7F, 0x80, 0xFF):
        whole = torch.from_numpy(raw).clone()
        halves = {0, 1, 2, 3} if kind.endswith("1") or kind in ("Q4_K", "Q5_K") else {0, 1}
        halves = {208, 209} if kind == "Q6_K" else halves
        block = cpu.gguf_bytes(kind)
        for at in set(range(block)) - halves:
            whole[:, at::block] = fill
        packed = cpu.tiles_of_gguf(whole, kind, whole=False)
        for sign in (1, -1):
            x = torch.full((2, 256), 127.0) * sign
            x[1, ::2] *= -1
            y = cpu.linear(x, packed)
            expected = x.double() @ numbers_of(kind, whole.numpy()).double().t()
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole", [True, False])
def test_infinities_and_nans_reach_the_output(isa: str, kind: str, whole: bool) -> None:
    packed, weight = matrix(kind, 33, 256, whole=whole)
    for odd in (float("inf"), float("nan")):
        x = torch.randn(2, 256)
        x[1, 40] = odd
        y = ops.linear(x, packed, backend="cpu")
        if whole:
            torch.testing.assert_close(y, F.linear(x, weight), rtol=1e-4, atol=1e-4, equal_nan=True)
        else:
            assert y[0].isfinite().all()
            assert y[1].isnan().all()


def test_the_op_goes_through_the_dispatcher() -> None:
    packed, _ = matrix("Q6_K", 32, 256)
    x = torch.randn(3, 256)
    compiled = torch.compile(lambda x: ops.linear(x, packed), backend="eager", fullgraph=True)
    expected = reference.linear(x, packed)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


# ---- steps ---------------------------------------------------------------------------------------------------------

ORDERS = [
    ("Q4_K", "Q6_K", "Q5_K", "Q4_0", "Q5_1", "Q8_0", "Q4_1"),
    ("Q6_K", "Q4_K", "Q8_0", "Q5_0", "Q5_K", "Q4_1", "Q6_K"),
]


def decoder(kinds: tuple[str, ...], *, whole: bool, floats: bool) -> tuple[Step, KeyValues]:
    """A decoder of two layers with matrices of these types, or of the same numbers in float32."""

    def linear(kind: str, outputs: int, inputs: int, seed: int) -> PackedLinear:
        packed, weight = matrix(kind, outputs, inputs, seed, whole=whole)
        return PackedLinear.pack(weight) if floats else packed

    torch.manual_seed(0)
    norm = Norm(torch.rand(256) + 0.5, None, 1e-5, "rms")
    layers = [
        StepLayer(
            Attention(*(linear(kind, 256, 256, 10 * i + n) for n, kind in enumerate(kinds[:4])), 64, 0.125),
            DenseMLP(
                linear(kinds[4], 512, 256, 10 * i + 5),
                linear(kinds[5], 512, 256, 10 * i + 6),
                linear(kinds[6], 256, 512, 10 * i + 7),
            ),
            "silu",
            attention_in=norm,
            mlp_in=norm,
        )
        for i in range(2)
    ]
    head = linear(kinds[0], 100, 256, 99)
    step = Step(StepModel(torch.randn(100, 256), layers, norm, head, torch.float32))
    rooms = [torch.zeros(1, 4, 64, 64) for _ in range(4)]
    return step, KeyValues(rooms[:2], rooms[2:], [0] * 2)


def logits_of(step: Step, caches: KeyValues) -> Tensor:
    tokens = torch.tensor([[5, 17, 42, 8, 77]])
    start, found, past = torch.zeros(1, dtype=torch.int64), [], 0
    for some in tokens.split([3, 1, 1], 1):  # several tokens at once, then one by one
        places = torch.arange(past, past + some.shape[1])[None]
        found.append(step.run(some, places, start, caches, past, some.shape[1])[0])
        past += some.shape[1]
    return torch.cat(found, 1)


@pytest.mark.parametrize("kinds", ORDERS)
def test_a_step_computes_with_the_very_numbers(isa: str, kinds: tuple[str, ...]) -> None:
    expected = logits_of(*decoder(kinds, whole=True, floats=True))
    logits = logits_of(*decoder(kinds, whole=True, floats=False))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    rounded = logits_of(*decoder(kinds, whole=False, floats=False))
    distance = (rounded - expected).norm() / expected.norm()
    assert 1e-5 < distance < 0.2  # attention over such weights is sharp


def test_matrices_of_several_types_share_one_rounding_of_their_input(isa: str) -> None:
    """q, k and v, gate and up: to the bit what they come to alone."""
    norm = Norm(torch.ones(256), None, 1e-5, "rms")
    kinds = ("Q4_K", "Q6_K", "Q8_0")
    gate, up, down = (
        matrix(kind, rows, width, seed, whole=False)[0]
        for seed, (kind, rows, width) in enumerate(zip(kinds, (512, 512, 256), (256, 256, 512), strict=True))
    )
    head = PackedLinear.pack(torch.eye(256))
    layer = StepLayer(None, DenseMLP(gate, up, down), "silu")
    embedding = torch.randn(9, 256)
    step = Step(StepModel(embedding, [layer], norm, head, torch.float32))
    tokens = torch.tensor([[3]])
    logits, _ = step.run(tokens, tokens, torch.zeros(1, dtype=torch.int64), KeyValues([], [], []), 0, 1)
    x = embedding[3]
    h = F.silu(cpu.linear(x, gate)) * cpu.linear(x, up)
    expected = F.rms_norm(x + cpu.linear(h, down), (256,), eps=1e-5)
    torch.testing.assert_close(logits[0, 0], expected, rtol=1e-2, atol=1e-2)  # h may round to the neighbour
