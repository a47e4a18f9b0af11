"""The Triton kernels against the torch definition, in Triton's interpreter: what they compute, not how fast.

The interpreter is chosen when Triton is imported, so it gets a process of its own; one for all tests, for it takes
longer to start than most of them. A kernel takes it about a second whatever its shape: what is checked together differs
in several ways at once where one way cannot hide another.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (the extra `gpu`)")

SETUP = """
import torch
from coreskip.kernels import gpu
from coreskip.kernels.ops import PackedMLP, gate_mlp, gate_select, linear, mlp, sketch_mlp, sketch_select
from coreskip.kernels.packed import ACTS, PackedLinear

real = gpu._BLOCKS  # set to 0 for most tests: the interpreter takes milliseconds for a block

def random_mlp(hidden, neurons, *, fmt=None, gated=True, act="silu", dtype=torch.float32):
    torch.manual_seed(0)
    gate, up, down = (torch.randn(neurons, hidden).div(hidden**0.5).to(dtype) for _ in range(3))
    biases = {"up_bias": torch.randn(neurons), "down_bias": torch.randn(hidden)}
    if gated:
        biases["gate_bias"] = torch.randn(neurons)
    packed = PackedMLP.pack(gate if gated else None, up, down, act=act, fmt=fmt, **biases)
    return torch.randn(3, hidden).to(dtype), packed

def close(result, expected):
    assert result.shape == expected.shape and result.dtype == expected.dtype
    limit = 1e-5 + torch.finfo(result.dtype).eps
    assert (result.double() - expected.double()).abs().max() <= limit * expected.double().abs().max()

def check(x, packed, indices=None):
    expected = mlp(x.float(), packed, indices, backend="torch").to(x.dtype)
    close(mlp(x, packed, indices, backend="triton"), expected)
"""

# Executes the scripts that come in, each with a fresh copy of what SETUP defines, and answers with what went wrong.
SERVER = """
import json, sys, traceback
defined = dict(globals())
for line in sys.stdin:
    try:
        gpu._BLOCKS = 0
        exec(json.loads(line), dict(defined))
        print(json.dumps(None), flush=True)
    except BaseException:
        print(json.dumps(traceback.format_exc()), flush=True)
"""


@pytest.fixture(scope="module")
def run():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SETUP + SERVER], env=environment, **pipe) as process:

        def answer(script):
            process.stdin.write(json.dumps(script) + "\n")
            process.stdin.flush()
            wrong = json.loads(process.stdout.readline())
            assert wrong is None, wrong[-3000:]

        yield answer
        process.stdin.close()


def test_shapes_and_dtypes(run):
    run("""
check(*random_mlp(1, 1))
check(*random_mlp(300, 40))
for dtype in (torch.bfloat16, torch.float16):
    check(*random_mlp(65, 17, dtype=dtype))
""")


def test_activations(run):
    run("""
for i, act in enumerate(ACTS):
    check(*random_mlp(65, 17, act=act, gated=i % 2 == 0))
check(*random_mlp(65, 17, act="silu", gated=False))
""")


def test_lists(run):
    run("""
x, packed = random_mlp(65, 40)
check(x, packed, torch.randperm(40)[:33])
check(x, packed, torch.stack([torch.randperm(40)[:13] for _ in range(3)]))
check(x, packed, torch.tensor([4, -1, 7, -1], dtype=torch.int32))
check(x, packed, torch.full((3, 2), -1))
check(x, packed, torch.empty(0, dtype=torch.int64))
""")


@pytest.mark.parametrize("fmt", ["int8", "int8_sliced"])
def test_quantized_weights(run, fmt):
    run(f"""
x, packed = random_mlp(200, 40, fmt="{fmt}")
check(x, packed)
check(x, packed, torch.randperm(40)[:13])
check(*random_mlp(200, 40, fmt="{fmt}", gated=False))
""")


def test_choosing_by_a_sketch(run):
    run("""
x, packed = random_mlp(200, 40, fmt="int8_sliced")
for rule in ({"keep": 13}, {"threshold": 0.4}):
    chosen = sketch_select(x, packed, backend="torch", **rule)
    assert torch.equal(sketch_select(x, packed, backend="triton", **rule), chosen)
    close(sketch_mlp(x, packed, backend="triton", **rule), mlp(x, packed, chosen, backend="torch"))
""")


def test_choosing_by_the_gate(run):
    run("""
x, packed = random_mlp(200, 40)
for rule in ({"keep": 13}, {"threshold": 0.4}):
    chosen = gate_select(x, packed, backend="torch", **rule)
    assert torch.equal(gate_select(x, packed, backend="triton", **rule), chosen)
    close(gate_mlp(x, packed, backend="triton", **rule), mlp(x, packed, chosen, backend="torch"))
""")


def test_dropping_by_exact_scores(run):
    run("""
x, packed = random_mlp(200, 40, fmt="int8_sliced")
with_means = packed.compensated(torch.randn(40) * 0.2)
cases = ((packed, {"keep": 13}, 0.8), (with_means, {"threshold": 0.4}, 0.8), (packed, {"threshold": 0.4}, 1e9))
for some, rule, refine in cases:
    y = sketch_mlp(x, some, backend="triton", refine=refine, **rule)
    close(y, sketch_mlp(x, some, backend="torch", refine=refine, **rule))
    unrefined = sketch_mlp(x, some, backend="torch", **rule)
    assert (y - unrefined).abs().max() > 1e-3 * unrefined.abs().max()
assert torch.equal(sketch_mlp(x, some, backend="triton", refine=refine, **rule), y)
""")


@pytest.mark.parametrize("fmt", [None, "int8", "int8_sliced"])
def test_means(run, fmt):
    run(f"""
x, packed = random_mlp(200, 40, fmt={fmt!r})
packed = packed.compensated(torch.randn(40))
check(x, packed)
check(x, packed, torch.tensor([4, -1, 7, -1]))
rule = {{"keep": 13}}
if packed.fmt == "int8_sliced":
    chosen = sketch_select(x, packed, backend="torch", **rule)
    close(sketch_mlp(x, packed, backend="triton", **rule), mlp(x, packed, chosen, backend="torch"))
if packed.fmt is None:
    chosen = gate_select(x, packed, backend="torch", **rule)
    close(gate_mlp(x, packed, backend="triton", **rule), mlp(x, packed, chosen, backend="torch"))
""")


def test_as_many_blocks_as_a_gpu_gets(run):
    run("""
gpu._BLOCKS = real
x, packed = random_mlp(65, 17)
check(x, packed)
check(x, packed, torch.tensor([[4, 7, 9, -1, -1], [1, 2, 3, 4, 5], [-1] * 5]))
""")


def test_two_runs_are_bit_identical(run):
    run("""
x, packed = random_mlp(300, 40, dtype=torch.bfloat16)
assert torch.equal(mlp(x, packed, backend="triton"), mlp(x, packed, backend="triton"))
""")


def test_without_a_gpu_or_the_interpreter():
    script = """
import torch
from coreskip.kernels import ops
if not torch.cuda.is_available():
    assert "CUDA" in ops.available("triton")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
