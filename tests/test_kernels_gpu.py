"""The Triton kernels against the torch definition, in Triton's interpreter: what they compute, not how fast.

The interpreter is chosen when Triton is imported, so it gets a process of its own.
"""

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

gpu._BLOCKS, real = 0, gpu._BLOCKS  # the interpreter takes milliseconds for a block

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


def run(script):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", SETUP + script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_shapes_dtypes_and_activations():
    run("""
for hidden, neurons in ((1, 1), (65, 17), (300, 40)):
    check(*random_mlp(hidden, neurons))
for dtype in (torch.bfloat16, torch.float16):
    check(*random_mlp(65, 17, dtype=dtype))
for act in ACTS:
    for gated in (True, False):
        check(*random_mlp(65, 17, act=act, gated=gated))
""")


def test_lists():
    run("""
x, packed = random_mlp(65, 90)
check(x, packed, torch.randperm(90)[:33])
check(x, packed, torch.stack([torch.randperm(90)[:33] for _ in range(3)]))
check(x, packed, torch.tensor([4, -1, 7, -1], dtype=torch.int32))
check(x, packed, torch.full((3, 2), -1))
check(x, packed, torch.empty(0, dtype=torch.int64))
""")


@pytest.mark.parametrize("fmt", ["int8", "int8_sliced"])
def test_quantized_weights(fmt):
    run(f"""
for gated in (True, False):
    x, packed = random_mlp(200, 40, fmt="{fmt}", gated=gated)
    check(x, packed)
    check(x, packed, torch.randperm(40)[:13])
""")


def test_choosing():
    run("""
x, packed = random_mlp(200, 40, fmt="int8_sliced")
for rule in ({"keep": 13}, {"threshold": 0.4}):
    chosen = sketch_select(x, packed, backend="torch", **rule)
    assert torch.equal(sketch_select(x, packed, backend="triton", **rule), chosen)
    close(sketch_mlp(x, packed, backend="triton", **rule), mlp(x, packed, chosen, backend="torch"))
x, packed = random_mlp(200, 40, fmt="int8_sliced")
for means in (False, True):
    packed = packed.compensated(torch.randn(40) * 0.2) if means else packed
    for rule in ({"keep": 13, "refine": 0.8}, {"threshold": 0.4, "refine": 0.8}, {"threshold": 0.4, "refine": 1e9}):
        y = sketch_mlp(x, packed, backend="triton", **rule)
        close(y, sketch_mlp(x, packed, backend="torch", **rule))
        assert torch.equal(sketch_mlp(x, packed, backend="triton", **rule), y)
        unrefined = {name: value for name, value in rule.items() if name != "refine"}
        assert not torch.equal(sketch_mlp(x, packed, backend="triton", **unrefined), y)
x, packed = random_mlp(200, 40)
for rule in ({"keep": 13}, {"threshold": 0.4}):
    chosen = gate_select(x, packed, backend="torch", **rule)
    assert torch.equal(gate_select(x, packed, backend="triton", **rule), chosen)
    close(gate_mlp(x, packed, backend="triton", **rule), mlp(x, packed, chosen, backend="torch"))
""")


@pytest.mark.parametrize("fmt", [None, "int8", "int8_sliced"])
def test_means(fmt):
    run(f"""
x, packed = random_mlp(200, 40, fmt={fmt!r})
packed = packed.compensated(torch.randn(40))
check(x, packed)
check(x, packed, torch.randperm(40)[:13])
check(x, packed, torch.tensor([4, -1, 7, -1]))
rule = {{"keep": 13}}
if packed.fmt == "int8_sliced":
    chosen = sketch_select(x, packed, backend="torch", **rule)
    close(sketch_mlp(x, packed, backend="triton", **rule), mlp(x, packed, chosen, backend="torch"))
if packed.fmt is None:
    chosen = gate_select(x, packed, backend="torch", **rule)
    close(gate_mlp(x, packed, backend="triton", **rule), mlp(x, packed, chosen, backend="torch"))
""")


def test_as_many_blocks_as_a_gpu_gets():
    run("""
gpu._BLOCKS = real
x, packed = random_mlp(65, 17)
check(x, packed)
check(x, packed, torch.tensor([[4, 7, 9, -1, -1], [1, 2, 3, 4, 5], [-1] * 5]))
""")


def test_two_runs_are_bit_identical():
    run("""
x, packed = random_mlp(300, 90, dtype=torch.bfloat16)
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
