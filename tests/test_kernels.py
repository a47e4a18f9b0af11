"""The kernels against their definition in double precision, on every instruction set that this machine has."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import rounding
import torch
from torch import Tensor

from coreskip.kernels import cpu, ops
from coreskip.kernels.ops import PackedColumns, PackedLinear, PackedMLP, column_linear, linear, mlp
from coreskip.kernels.packed import ACTS, DTYPES, padded

NO_LIBRARY = ops.available("cpu")
needs_library = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))
BACKENDS = [
    "torch",
    *(pytest.param(isa, marks=needs_library) for isa in (["generic"] if NO_LIBRARY else cpu.supported())),
]
SHAPES = [(1, 1), (3, 5), (17, 31), (64, 2), (65, 48), (100, 333), (576, 129)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "torch":
        yield "torch"
        return
    before = cpu.active()
    cpu.use(request.param)
    yield "cpu"
    cpu.use(before)


class Weights:
    """A random MLP, scaled so that activations stay near one, and what it computes in double precision."""

    def __init__(self, hidden, neurons, dtype, *, act="silu", gated=True, bias=False, seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.gate, self.up = (torch.randn(neurons, hidden, generator=rng).div(hidden**0.5).to(dtype) for _ in "gu")
        self.down = torch.randn(neurons, hidden, generator=rng).div(neurons**0.5).to(dtype)
        self.biases = [torch.randn(n, generator=rng).to(dtype) if bias else None for n in (neurons, neurons, hidden)]
        self.gated, self.act, self.rng, self.hidden = gated, act, rng, hidden
        if not gated:
            self.gate = self.biases[0] = None

    def x(self, *rows, dtype=None):
        return torch.randn(*rows, self.hidden, generator=self.rng).to(dtype or self.up.dtype)

    def pack(self, **kwargs):
        names = ("gate_bias", "up_bias", "down_bias")
        return PackedMLP.pack(
            self.gate, self.up, self.down, act=self.act, **dict(zip(names, self.biases, strict=True)), **kwargs
        )

    def compute(self, x: Tensor, mask: Tensor | None = None, dtype=torch.float64) -> Tensor:
        def project(weight, bias):
            y = x.to(dtype) @ weight.to(dtype).t()
            return y if bias is None else y + bias.to(dtype)

        function = ACTS[self.act]
        up = project(self.up, self.biases[1])
        h = function(project(self.gate, self.biases[0])) * up if self.gated else function(up)
        y = (h if mask is None else h * mask.to(dtype)) @ self.down.to(dtype)
        return y if self.biases[2] is None else y + self.biases[2].to(dtype)

    def bound(self, x: Tensor, mask: Tensor | None, wide: torch.dtype) -> Tensor:
        """How far a result of x's dtype may be from `compute`, which is in double precision, where what comes before
        the down projection is rounded to `wide`."""

        def project(weight, bias):
            exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
            return exact, rounding.of_linear(x, weight, bias, wide)

        h, error = project(self.up, self.biases[1])
        if self.gated:
            gate, of_gate = project(self.gate, self.biases[0])
            of_gate = rounding.of_activation(self.act, gate, of_gate, wide)
            gate = ACTS[self.act](gate)
            error = rounding.of_product(gate, h, of_gate, error, wide)
            h = gate * h
        else:
            error = rounding.of_activation(self.act, h, error, wide)
            h = ACTS[self.act](h)
        if mask is not None:
            h, error = h * mask, error * mask
        down = self.down.t()
        return rounding.of_linear(h, down, self.biases[2], x.dtype) + rounding.carried(error, down)


def check(result: Tensor, weights: Weights, x: Tensor, mask: Tensor | None = None, backend: str = "torch") -> None:
    """A kernel may err by what its roundings can add up to: compiled ones stay in float32 up to the result."""
    wide = torch.promote_types(x.dtype, weights.up.dtype) if backend == "torch" else torch.float32
    assert result.dtype == x.dtype
    assert result.shape == x.shape
    error = (result.double() - weights.compute(x, mask)).abs()
    assert bool((error <= weights.bound(x, mask, wide)).all())


def mask_of(indices: Tensor, neurons: int) -> Tensor:
    return torch.nn.functional.one_hot(indices, neurons).sum(-2).bool()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "neurons"), SHAPES)
def test_dense_mlp_over_ugly_shapes(backend, dtype, hidden, neurons):
    weights = Weights(hidden, neurons, dtype, bias=True)
    packed = weights.pack()
    for rows in (1, 2, 3, 8):
        x = weights.x(rows)
        check(mlp(x, packed, backend=backend), weights, x, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gated", [True, False])
def test_activations(backend, dtype, act, gated):
    weights = Weights(96, 200, dtype, act=act, gated=gated, bias=True)
    weights.up *= 4  # well into both tails
    x = weights.x(2)
    check(mlp(x, weights.pack(), backend=backend), weights, x, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [0, 1, 2, 17, 150, 299, 300])
def test_shared_list(backend, dtype, keep):
    weights = Weights(72, 300, dtype, bias=True)
    indices = torch.randperm(300, generator=weights.rng)[:keep]
    x = weights.x(1, 3)
    check(mlp(x, weights.pack(), indices, backend=backend), weights, x, mask_of(indices, 300), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_list_per_row(backend, dtype):
    weights = Weights(72, 300, dtype, bias=True)
    indices = torch.stack([torch.randperm(300, generator=weights.rng)[:90] for _ in range(8)])
    x = weights.x(8)
    check(mlp(x, weights.pack(), indices, backend=backend), weights, x, mask_of(indices, 300), backend=backend)
    check(
        mlp(x[:1], weights.pack(), indices[:1], backend=backend),
        weights,
        x[:1],
        mask_of(indices[:1], 300),
        backend=backend,
    )


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_minus_one_stands_for_no_neuron(backend, kind):
    weights = Weights(40, 50, torch.float32)
    packed, x = weights.pack(), weights.x(2)
    padding = torch.tensor([4, -1, 7, -1], dtype=kind)
    same = mlp(x, packed, torch.tensor([4, 7]), backend=backend)
    assert torch.equal(mlp(x, packed, padding, backend=backend), same)
    check(
        mlp(x, packed, padding.expand(2, 4), backend=backend),
        weights,
        x,
        mask_of(torch.tensor([[4, 7]] * 2), 50),
        backend=backend,
    )
    nothing = mlp(x, packed, torch.full((2, 3), -1), backend=backend)
    assert torch.equal(nothing, torch.zeros_like(x))


@pytest.mark.parametrize("bad", [-2, 50, 2**40])
def test_index_out_of_range(backend, bad):
    weights = Weights(40, 50, torch.float32)
    packed, x = weights.pack(), weights.x(2)
    for indices in (torch.tensor([0, bad]), torch.tensor([[0, bad], [1, 2]])):
        with pytest.raises(IndexError):
            mlp(x, packed, indices, backend=backend)


def test_x_of_another_dtype(backend):
    weights = Weights(72, 100, torch.bfloat16)
    x = weights.x(2, dtype=torch.float32)
    check(mlp(x, weights.pack(), backend=backend), weights, x, backend=backend)


def test_pack_of_a_slice_equals_a_list(backend):
    weights = Weights(72, 300, torch.float32, bias=True)
    weights.down = weights.down.t().contiguous().t()  # what a caller passes for nn.Linear
    indices = torch.randperm(300, generator=weights.rng)[:100]
    x, packed = weights.x(1), weights.pack()
    for part in (weights.pack(indices=indices), packed.take(indices)):
        assert part.intermediate_size == 100
        check(mlp(x, part, backend=backend), weights, x, mask_of(indices, 300), backend=backend)
    assert torch.equal(weights.pack(indices=indices).weight, packed.take(indices).weight)


def test_a_callable_activation_takes_torch():
    weights = Weights(72, 100, torch.float32)
    x = weights.x(2)
    expected = mlp(x, weights.pack(), backend="torch")
    weights.act = torch.nn.functional.silu
    assert torch.equal(mlp(x, weights.pack()), expected)
    if NO_LIBRARY is None:
        with pytest.raises(ValueError, match="callable"):
            mlp(x, weights.pack(), backend="cpu")


@pytest.mark.parametrize("rows", [9, 256])
def test_many_rows(rows):
    weights = Weights(72, 300, torch.float32, bias=True)
    x, packed = weights.x(rows), weights.pack()
    indices = torch.stack([torch.randperm(300, generator=weights.rng)[:90] for _ in range(rows)])
    check(mlp(x, packed), weights, x)
    check(mlp(x, packed, indices[0]), weights, x, mask_of(indices[0], 300))
    check(mlp(x, packed, indices), weights, x, mask_of(indices, 300))


def test_no_rows():
    packed = Weights(72, 30, torch.float32).pack()
    assert mlp(torch.empty(0, 72), packed).shape == (0, 72)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (7, 3), (64, 64), (65, 130), (576, 49)])
def test_linear(backend, dtype, in_features, out_features):
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(out_features, in_features, generator=rng).div(in_features**0.5).to(dtype)
    bias = torch.randn(out_features, generator=rng).to(dtype)
    packed = PackedLinear.pack(weight, bias)
    for rows in (1, 2, 5, 8):
        x = torch.randn(rows, in_features, generator=rng).to(dtype)
        y = linear(x, packed, backend=backend)
        exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        assert y.shape == exact.shape
        assert y.dtype == dtype
        assert bool(((y.double() - exact).abs() <= rounding.of_linear(x, weight, bias, dtype)).all())


def test_linear_shares_a_weight_that_needs_no_padding():
    weight = torch.randn(10, 64)
    assert PackedLinear.pack(weight).weight.data_ptr() == weight.data_ptr()
    assert PackedLinear.pack(weight[:, :50]).weight.shape == (10, 64)
    assert PackedLinear.pack(weight.t().contiguous().t()).weight.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (7, 3), (65, 130), (300, 64)])
def test_column_linear(backend, dtype, in_features, out_features):
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(out_features, in_features, generator=rng).div(in_features**0.5).to(dtype)
    bias = torch.randn(out_features, generator=rng).to(dtype)
    packed = PackedColumns.pack(weight, bias)
    for rows in (1, 3, 8):
        x = torch.randn(rows, in_features, generator=rng).to(dtype)
        for by_norm in (False, True):
            score = x.float().abs() * (weight.float().norm(dim=0) if by_norm else 1)
            sparse = torch.where(score >= 0.6, x, 0)
            y = column_linear(x, packed, threshold=0.6, by_norm=by_norm, backend=backend)
            exact = torch.nn.functional.linear(sparse.double(), weight.double(), bias.double())
            assert y.dtype == dtype
            assert bool(((y.double() - exact).abs() <= rounding.of_linear(sparse, weight, bias, dtype)).all())
        kept = column_linear(x, packed, keep=in_features, backend=backend)
        dense = linear(x, PackedLinear.pack(weight, bias), backend=backend)
        apart = (kept.double() - dense.double()).abs()
        assert bool((apart <= 2 * rounding.of_linear(x, weight, bias, dtype)).all())
        assert torch.equal(column_linear(x, packed, keep=0, backend=backend), bias.expand(rows, -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_packed_columns(dtype):
    """Views where a row goes on far enough, whatever stands there; norms are those of whole columns."""
    weight, bias = torch.randn(100, 30).to(dtype), torch.randn(100)
    packed = PackedColumns.pack(weight, bias)
    for first, count, shared in ((0, 60, True), (60, 30, True), (90, 10, dtype is torch.float32)):
        part = packed.part(first, count)
        inside = packed.weight.data_ptr() <= part.weight.data_ptr() < packed.weight.data_ptr() + packed.weight.nbytes
        assert inside is shared
        assert part.weight.shape[1] >= padded(count, dtype)
        assert torch.equal(part.weight[:, :count], weight[first : first + count].t())
        assert part.norm is packed.norm
        assert torch.equal(part.bias, bias[first : first + count])
        assert (part.in_features, part.out_features) == (30, count)


def same_kind(result: Tensor, expected: Tensor) -> None:
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.isposinf(), expected.isposinf())
    assert torch.equal(result.isneginf(), expected.isneginf())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_infinities_and_nans_in_x(backend, dtype, act, value):
    weights = Weights(33, 40, dtype, act=act, gated=False)
    x = weights.x(2)
    x[0, 5] = value  # the other row must stay finite
    same_kind(mlp(x, weights.pack(), backend=backend), weights.compute(x, dtype=torch.float32))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("per_row", [True, False])
def test_a_skipped_neuron_leaves_nothing_behind(backend, value, per_row):
    if backend == "torch" and per_row:
        pytest.skip("the torch definition masks rows with lists of their own: 0 * infinity")
    weights = Weights(33, 40, torch.float32)
    weights.down[7] = value
    x = weights.x(2)
    lists = torch.tensor([[1, 2, 3], [1, 2, 7]])
    y = mlp(x, weights.pack(), lists if per_row else lists[0], backend=backend)
    assert y[0].isfinite().all()
    assert y[1].isfinite().all() != per_row


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_are_not_flushed(backend, dtype):
    tiny = torch.finfo(dtype).smallest_normal / 4
    weight = torch.eye(40).to(dtype)
    x = torch.full((1, 40), tiny, dtype=dtype)
    assert torch.equal(linear(x, PackedLinear.pack(weight), backend=backend), x)


def test_half_precision_conversions_are_exact_for_every_number(backend):
    if backend == "torch":
        pytest.skip("torch's own")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    one = torch.ones(1, 1)
    for dtype in (torch.bfloat16, torch.float16):
        weight = every.view(dtype).reshape(-1, 1)
        x = one.to(dtype)
        y = linear(x, PackedLinear.pack(weight), backend=backend)[0]
        expected = weight[:, 0]
        assert torch.equal(y.isnan(), expected.isnan())
        number = ~expected.isnan()
        assert torch.equal(y[number].view(torch.int16) & 0x7FFF, expected[number].view(torch.int16) & 0x7FFF)


def test_rounding_to_half_precision_is_torchs(backend):
    rng = torch.Generator().manual_seed(2)
    values = torch.randn(4096, generator=rng) * 2.0 ** torch.randint(-30, 20, (4096,), generator=rng)
    ties = torch.tensor(
        [1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 65520.0, 2.0**-25, 3 * 2.0**-25, 1 + 2**-8, 1 + 3 * 2**-8]
    )
    values = torch.cat([values, ties, -ties])
    packed = PackedLinear.pack(values.reshape(-1, 1))
    for dtype in (torch.bfloat16, torch.float16):
        y = linear(torch.ones(1, 1, dtype=dtype), packed, backend=backend)[0]
        assert torch.equal(y, values.to(dtype))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_bit_identical(dtype):
    weights = Weights(576, 1536, dtype)
    packed, x = weights.pack(), weights.x(3)
    indices = torch.randperm(1536, generator=weights.rng)[:700]
    first = mlp(x, packed, indices, backend="cpu")
    assert all(torch.equal(mlp(x, packed, indices, backend="cpu"), first) for _ in range(20))


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads(threads):
    weights = Weights(65, 100, torch.float32)
    packed, x = weights.pack(), weights.x(2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(mlp(x, packed, backend="cpu"), weights, x)
        check(mlp(x, packed, torch.tensor([3]), backend="cpu"), weights, x, mask_of(torch.tensor([3]), 100))
    finally:
        torch.set_num_threads(before)


@needs_library
def test_several_python_threads_at_once():
    cases = []
    for seed in range(6):
        weights = Weights(100 + 50 * seed, 400, torch.bfloat16, seed=seed)
        packed, x = weights.pack(), weights.x(1 + seed)
        cases.append((x, packed, mlp(x, packed, backend="cpu")))

    def work(case):
        x, packed, expected = case
        return all(torch.equal(mlp(x, packed, backend="cpu"), expected) for _ in range(50))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, cases))


@needs_library
def test_one_openmp_pool_for_torch_and_the_kernels():
    script = """
import os, torch
from coreskip.kernels.ops import PackedMLP, mlp
torch.set_num_threads(4)
big = torch.randn(512, 512)
big @ big, (big + 1).sum()
before = len(os.listdir("/proc/self/task"))
packed = PackedMLP.pack(big, big, big, act="silu")
mlp(big[:1], packed, backend="cpu")
print(before, len(os.listdir("/proc/self/task")))
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("counts threads through /proc")
    before, after = run(script).split()
    assert before == after


@needs_library
def test_torch_compile_sees_the_ops():
    weights = Weights(64, 100, torch.float32)
    mlp_packed, linear_packed = weights.pack(), PackedLinear.pack(torch.randn(30, 64))
    torch.library.opcheck(
        torch.ops.coreskip.mlp.default, (weights.x(2), *ops._fields(mlp_packed), None, "listed", -1, 0.0, 0.0)
    )
    torch.library.opcheck(torch.ops.coreskip.linear.default, (weights.x(2), *ops._linear_fields(linear_packed)))

    @torch.compile(backend="eager", fullgraph=True)
    def step(x, indices):
        return linear(mlp(x, mlp_packed, indices) + 1, linear_packed)

    x, indices = weights.x(2), torch.arange(0, 100, 3)
    assert torch.equal(step(x, indices), linear(mlp(x, mlp_packed, indices) + 1, linear_packed))


def test_a_gradient_takes_torch():
    weights = Weights(72, 100, torch.float32)
    x = weights.x(1).requires_grad_()
    mlp(x, weights.pack()).sum().backward()
    assert x.grad is not None
    if NO_LIBRARY is None:
        with pytest.raises(ValueError, match="gradient"):
            mlp(x, weights.pack(), backend="cpu")


def test_bad_arguments():
    w, x = torch.randn(5, 8), torch.randn(2, 8)
    packed = PackedMLP.pack(w, w, w, act="silu")
    with pytest.raises(ValueError, match="one dtype"):
        PackedMLP.pack(w, w.half(), w, act="silu")
    with pytest.raises(ValueError, match="intermediate, hidden"):
        PackedMLP.pack(w, w, w.t(), act="silu")
    with pytest.raises(TypeError, match="float64"):
        PackedMLP.pack(None, w.double(), w.double(), act="silu")
    with pytest.raises(ValueError, match="act"):
        PackedMLP.pack(w, w, w, act="swish")
    with pytest.raises(ValueError, match="down_bias"):
        PackedMLP.pack(w, w, w, act="silu", down_bias=torch.zeros(5))
    with pytest.raises(ValueError, match="without a gate"):
        PackedMLP.pack(None, w, w, act="silu", gate_bias=torch.zeros(5))
    with pytest.raises(ValueError, match=r"\.\.\., 8"):
        mlp(x[:, :7], packed)
    with pytest.raises(ValueError, match="indices"):
        mlp(x, packed, torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="integers"):
        mlp(x, packed, torch.zeros(3))
    with pytest.raises(ValueError, match="backend"):
        mlp(x, packed, backend="cuda")


def test_packed_sizes_and_names():
    w = torch.randn(5, 70, dtype=torch.bfloat16)
    packed = PackedMLP.pack(w, w, w, act="silu", up_bias=torch.zeros(5))
    assert (packed.intermediate_size, packed.hidden_size, packed.gated) == (5, 70, True)
    assert packed.nbytes == 5 * 3 * padded(70, torch.bfloat16) * 2 + 5 * 4
    assert packed.weight.data_ptr() % 64 == 0
    assert "70x5" in repr(packed)


def run(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_library
@pytest.mark.parametrize("isa", [] if NO_LIBRARY else cpu.supported())
def test_an_instruction_set_can_be_forced(isa):
    """Looking at which there are changes nothing."""
    script = "from coreskip.kernels import cpu; cpu.supported(); print(cpu.active())"
    assert run(script, CORESKIP_CPU=isa).strip() == isa


@needs_library
def test_an_instruction_set_that_is_missing_raises():
    script = """
from coreskip.kernels import cpu, ops
print(ops.available("cpu"))
"""
    assert "avx9000" in run(script, CORESKIP_CPU="avx9000")


def test_without_the_compiled_library():
    """`auto` takes torch and says so once; the backend asked for by name raises."""
    script = """
import logging, torch
logging.basicConfig(format="%(message)s", force=True)
from coreskip.kernels import cpu, ops
cpu.find_spec = lambda name: None
packed = ops.PackedMLP.pack(*torch.randn(3, 20, 16), act="silu")
x = torch.randn(1, 16)
for _ in range(3):
    assert torch.equal(ops.mlp(x, packed), ops.mlp(x, packed, backend="torch"))
try:
    ops.mlp(x, packed, backend="cpu")
except RuntimeError as error:
    print("raised", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.count("plain torch") == 1
    assert "raised backend 'cpu'" in done.stdout
