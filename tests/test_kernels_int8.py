"""Quantised weights and the rules that choose neurons, on every instruction set that this machine has."""

import pytest
import torch

from coreskip.kernels import cpu, ops
from coreskip.kernels.ops import PackedLinear, PackedMLP, gate_mlp, gate_select, linear, mlp, sketch_mlp, sketch_select
from coreskip.kernels.packed import DTYPES, quantize, spread

NO_LIBRARY = ops.available("cpu")
needs_library = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))
SHAPES = [(1, 1), (3, 5), (17, 31), (128, 40), (200, 77), (576, 130)]


@pytest.fixture(
    params=[
        "torch",
        *(pytest.param(isa, marks=needs_library) for isa in (["generic"] if NO_LIBRARY else cpu.supported())),
    ]
)
def backend(request):
    if request.param == "torch":
        yield "torch"
        return
    before = cpu.active()
    cpu.use(request.param)
    yield "cpu"
    cpu.use(before)


def random_mlp(hidden, neurons, *, fmt, gated=True, bias=True, act="silu", dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    gate, up, down = (torch.randn(neurons, hidden, generator=rng).div(hidden**0.5).to(dtype) for _ in range(3))
    biases = {name: torch.randn(neurons, generator=rng) for name in ("gate_bias", "up_bias")} if bias else {}
    if not gated:
        gate, biases = None, {}
    x = torch.randn(8, hidden, generator=rng).to(dtype)
    return x, PackedMLP.pack(gate, up, down, act=act, fmt=fmt, **biases)


def dequantized(packed):
    """The float MLP whose weights the bytes stand for."""
    hidden = packed.hidden_size
    rows = []
    for part in range(packed.scale.shape[1]):
        if packed.low is None:
            byte = packed.weight[:, part]
        elif part == packed.scale.shape[1] - 1:
            byte = packed.low[:, -2 * packed.weight.shape[2] :]
        else:
            half = packed.weight.shape[2]
            byte = 16 * spread(packed.weight[:, part]) + spread(packed.low[:, part * half : (part + 1) * half])
        rows.append((byte[:, :hidden].double() - 128) * packed.scale[:, part : part + 1].double())
    return rows


def close(result, expected, scale=1e-5):
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    error = (result.double() - expected.double()).abs().max()
    assert error <= (scale + torch.finfo(result.dtype).eps) * expected.double().abs().max()


def test_quantize_uses_the_whole_range_and_survives_odd_rows():
    rows = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1e-38, 0, 0], [float("inf"), 1, 1]])
    integers, scale = quantize(rows)
    assert integers[0].tolist() == [64.0, -127.0, 32.0]
    assert torch.equal(integers[1:3], torch.zeros(2, 3))
    assert scale[1:3].tolist() == [0, 0]
    assert scale[3].isnan()


@pytest.mark.parametrize("fmt", ["int8", "int8_sliced"])
@pytest.mark.parametrize("gated", [True, False])
def test_bytes_stand_for_the_weights(fmt, gated):
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(20, 70, generator=rng) for _ in range(3 if gated else 2)]
    packed = PackedMLP.pack(*(weights if gated else [None, *weights]), act="relu", fmt=fmt)
    for weight, back in zip(weights, dequantized(packed), strict=True):
        step = weight.abs().amax(1, keepdim=True) / 127
        assert ((back - weight).abs() <= step * 0.5001).all()
    assert packed.fmt == fmt
    assert packed.intermediate_size == 20


@pytest.mark.parametrize("fmt", ["int8", "int8_sliced"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("hidden", "neurons"), SHAPES)
def test_mlp_equals_its_definition(backend, fmt, gated, hidden, neurons):
    x, packed = random_mlp(hidden, neurons, fmt=fmt, gated=gated)
    parts = dequantized(packed)
    for rows in (1, 2, 5, 8):
        integers, scale = quantize(x[:rows])
        near = integers.double() * scale[:, None].double()
        up = near @ parts[-2].t() + (packed.up_bias.double() if gated else 0)
        h = torch.nn.functional.silu(near @ parts[0].t() + packed.gate_bias.double()) * up if gated else None
        h = torch.nn.functional.silu(up) if h is None else h
        close(mlp(x[:rows], packed, backend=backend), (h @ parts[-1]).float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_x_of_any_dtype_and_lists(backend, dtype):
    x, packed = random_mlp(200, 77, fmt="int8", dtype=dtype)
    lists = torch.stack([torch.randperm(77)[:30] for _ in range(8)])
    close(mlp(x, packed, lists, backend=backend), mlp(x, packed, lists, backend="torch"))
    close(mlp(x, packed, lists[0], backend=backend), mlp(x, packed, lists[0], backend="torch"))
    close(mlp(x, packed.take(lists[0]), backend=backend), mlp(x, packed, lists[0], backend="torch"))


@needs_library
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize(("hidden", "neurons"), SHAPES)
def test_two_planes_give_the_bits_of_one(backend, hidden, neurons, rows):
    """The integer products are the same, and so is everything after them."""
    if backend == "torch":
        pytest.skip("sums integers in floats")
    x, whole = random_mlp(hidden, neurons, fmt="int8")
    _, sliced = random_mlp(hidden, neurons, fmt="int8_sliced")
    expected = mlp(x[:rows], whole, backend="cpu")
    assert torch.equal(mlp(x[:rows], sliced, backend="cpu"), expected)
    assert torch.equal(sketch_mlp(x[:rows], sliced, keep=neurons, backend="cpu").float(), expected) or rows > 1
    close(sketch_mlp(x[:rows], sliced, keep=neurons, backend="cpu"), expected)


@pytest.mark.parametrize("keep", [0, 1, 40, 129, 130])
@pytest.mark.parametrize("gated", [True, False])
def test_sketch_by_number(backend, keep, gated):
    x, packed = random_mlp(576, 130, fmt="int8_sliced", gated=gated)
    chosen = sketch_select(x, packed, keep=keep, backend=backend)
    assert chosen.shape == (8, keep)
    assert torch.equal(chosen, sketch_select(x, packed, keep=keep, backend="torch"))
    close(
        sketch_mlp(x, packed, keep=keep, backend=backend),
        mlp(x, packed, chosen, backend="torch") if keep else torch.zeros_like(x),
    )


def test_sketch_by_threshold(backend):
    x, packed = random_mlp(576, 130, fmt="int8_sliced")
    for threshold in (0.0, 0.3, 1e9):
        chosen = sketch_select(x, packed, threshold=threshold, backend=backend)
        assert torch.equal(chosen, sketch_select(x, packed, threshold=threshold, backend="torch"))
        assert chosen.shape == (8, 130)
        close(sketch_mlp(x, packed, threshold=threshold, backend=backend), mlp(x, packed, chosen, backend="torch"))
    assert (chosen == -1).all()


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("means", [True, False])
def test_a_refined_sketch_completes_its_candidates_then_drops_the_small_ones(backend, means, gated, rows):
    x, packed = random_mlp(576, 130, fmt="int8_sliced", gated=gated)
    x = x[:rows]
    mean = torch.randn(130, generator=torch.Generator().manual_seed(1)) * 0.2
    packed = packed.compensated(mean) if means else packed
    *gate, up, _ = dequantized(packed)
    integers, scale = quantize(x)
    near = integers.double() * scale[:, None].double()
    h = near @ up.t() + (packed.up_bias if gated else 0)
    h = torch.nn.functional.silu(near @ gate[0].t() + packed.gate_bias) * h if gated else torch.nn.functional.silu(h)
    score = (h - mean if means else h).abs() * packed.norm
    for how in ({"threshold": 0.1}, {"keep": 80}):
        candidates = sketch_select(x, packed, backend="torch", **how)
        for refine in (0.3, 0.6, 1e9):
            kept = torch.where(score.gather(1, candidates.clamp_min(0)) >= refine, candidates, -1)
            assert (kept >= 0).sum() < (candidates >= 0).sum()
            y = sketch_mlp(x, packed, refine=refine, backend=backend, **how)
            close(y, mlp(x, packed, kept, backend="torch"))
            assert torch.equal(sketch_mlp(x, packed, refine=refine, backend=backend, **how), y)


def test_a_sketch_finds_most_of_what_matters(backend):
    x, packed = random_mlp(576, 400, fmt="int8_sliced", bias=False)
    gate, up, down = (part.float() for part in dequantized(packed))
    score = (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())).abs() * down.norm(dim=1)
    kept = torch.zeros(8, 400, dtype=torch.bool)
    kept.scatter_(1, sketch_select(x, packed, keep=200, backend=backend), True)
    assert (score * kept).sum() > 0.97 * score.sort(1).values[:, 200:].sum()


@pytest.mark.parametrize("fmt", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate(backend, fmt, dtype):
    x, packed = random_mlp(200, 77, fmt=fmt, dtype=dtype)
    for rule in ({"keep": 30}, {"threshold": 0.2}, {"keep": 0}):
        chosen = gate_select(x, packed, backend=backend, **rule)
        assert torch.equal(chosen, gate_select(x, packed, backend="torch", **rule))
        expected = mlp(x.float(), packed, chosen, backend="torch").to(dtype)
        close(gate_mlp(x, packed, backend=backend, **rule), expected, 1e-5 if dtype is torch.float32 else 1e-2)


def test_equal_scores_keep_the_first(backend):
    w = torch.ones(40, 64)
    packed = PackedMLP.pack(w, w, w, act="relu", fmt="int8_sliced")
    chosen = sketch_select(torch.ones(1, 64), packed, keep=7, backend=backend)
    assert chosen.tolist() == [list(range(7))]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_row_that_is_not_finite_becomes_nan(backend, value):
    x, packed = random_mlp(64, 40, fmt="int8_sliced")
    x[1, 3] = value
    refined = sketch_mlp(x, packed, keep=10, refine=0.1, backend=backend)
    for y in (mlp(x, packed, backend=backend), sketch_mlp(x, packed, keep=10, backend=backend), refined):
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (7, 3), (128, 64), (200, 131)])
def test_linear(backend, in_features, out_features):
    rng = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(out_features, in_features, generator=rng), torch.randn(out_features, generator=rng)
    packed = PackedLinear.pack(weight, bias, fmt="int8")
    integers, scale = quantize(weight)
    for rows in (1, 3, 8):
        x = torch.randn(rows, in_features, generator=rng)
        q, s = quantize(x)
        exact = (q.double() @ integers.double().t()) * (s[:, None] * scale).double() + bias.double()
        close(linear(x, packed, backend=backend), exact.float())


def test_torch_compile_sees_the_choice():
    x, packed = random_mlp(64, 40, fmt="int8_sliced")
    torch.library.opcheck(torch.ops.coreskip.choose.default, (x, *ops._fields(packed), "sketch", 7, 0.0))
    torch.library.opcheck(torch.ops.coreskip.choose.default, (x, *ops._fields(packed), "sketch", -1, 0.5))
    torch.library.opcheck(torch.ops.coreskip.mlp.default, (x, *ops._fields(packed), None, "sketch", 7, 0.0, 0.0))
    torch.library.opcheck(torch.ops.coreskip.mlp.default, (x, *ops._fields(packed), None, "sketch", -1, 0.1, 0.2))


def test_bad_arguments():
    x, sliced = random_mlp(64, 40, fmt="int8_sliced")
    _, floats = random_mlp(64, 40, fmt=None)
    _, plain = random_mlp(64, 40, fmt=None, gated=False)
    with pytest.raises(ValueError, match="either"):
        sketch_select(x, sliced)
    with pytest.raises(ValueError, match="either"):
        sketch_mlp(x, sliced, keep=1, threshold=1.0)
    with pytest.raises(ValueError, match="refine must be at least 0"):
        sketch_mlp(x, sliced, keep=1, refine=float("nan"))
    with pytest.raises(ValueError, match="int8_sliced"):
        sketch_select(x, floats, keep=1)
    with pytest.raises(ValueError, match="keep"):
        sketch_select(x, sliced, keep=41)
    for packed in (plain, sliced):
        with pytest.raises(ValueError, match="gate"):
            gate_mlp(x, packed, keep=1)
    with pytest.raises(ValueError, match="fmt"):
        PackedMLP.pack(x, x, x, act="silu", fmt="int4")
    with pytest.raises(ValueError, match="fmt"):
        PackedLinear.pack(x, fmt="int8_sliced")


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("fmt", [None, "int8", "int8_sliced"])
def test_a_neuron_left_out_counts_as_its_mean(backend, fmt, gated, rows):
    x, plain = random_mlp(70, 53, fmt=fmt, gated=gated)
    mean = torch.randn(53, generator=torch.Generator().manual_seed(1))
    packed = plain.compensated(mean)
    x = x[:rows]
    close(mlp(x, packed, backend=backend), mlp(x, plain, backend="torch"), 1e-4)
    lists = torch.stack([torch.randperm(53, generator=torch.Generator().manual_seed(r))[:20] for r in range(rows)])
    absent = torch.ones(rows, 53).scatter_(1, lists, 0)
    expected = mlp(x, plain, lists, backend="torch") + (absent * mean) @ plain.down_rows()
    close(mlp(x, packed, lists, backend=backend), expected, 1e-4)
    if rows == 1:
        close(mlp(x, packed, lists[0], backend=backend), expected, 1e-4)
        close(mlp(x, packed.take(lists[0]), backend=backend), expected, 1e-4)
    if fmt == "int8_sliced":  # the choice is by the activations themselves, as without means
        chosen = sketch_select(x, plain, keep=20, backend="torch")
        assert torch.equal(sketch_select(x, packed, keep=20, backend=backend), chosen)
        close(sketch_mlp(x, packed, keep=20, backend=backend), mlp(x, packed, chosen, backend="torch"), 1e-4)


def test_means_are_given_once_and_fit():
    _, packed = random_mlp(8, 5, fmt=None)
    with pytest.raises(ValueError, match="mean must be given once"):
        packed.compensated(torch.zeros(6))
    with pytest.raises(ValueError, match="mean must be given once"):
        packed.compensated(torch.zeros(5)).compensated(torch.zeros(5))


@needs_library
@pytest.mark.parametrize("isa", ["generic"] if NO_LIBRARY else cpu.supported())
@pytest.mark.parametrize("fmt", ["int4", "int8_groups"])
@pytest.mark.parametrize(("outputs", "inputs", "rows"), [(64, 64, 1), (50, 70, 3), (577, 100, 8), (1, 1, 2)])
def test_grouped_linears_are_the_definition(isa: str, fmt: str, outputs: int, inputs: int, rows: int) -> None:
    best = cpu.active()
    cpu.use(isa)
    generator = torch.Generator().manual_seed(outputs)
    weight, bias = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
    x = torch.randn(rows, inputs, generator=generator) * 3
    packed = PackedLinear.pack(weight, bias, fmt=fmt)
    assert (packed.out_features, packed.fmt) == (outputs, fmt)
    y = linear(x, packed, backend="cpu")
    expected = linear(x, packed, backend="torch")
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(y, linear(x, packed, backend="cpu"))
    assert torch.equal(y[:1], linear(x[:1], packed, backend="cpu"))  # rows do not see each other
    exact = x @ weight.t() + bias
    assert (y - exact).norm() <= (0.12 if fmt == "int4" else 0.015) * exact.norm()
    x[0, 0] = float("nan")
    assert bool(linear(x, packed, backend="cpu")[0].isnan().all())
    cpu.use(best)


def test_grouped_weights_must_be_finite() -> None:
    with pytest.raises(ValueError, match="4 or 8 bits"):
        PackedLinear.pack(torch.full((4, 4), float("inf")), fmt="int4")
