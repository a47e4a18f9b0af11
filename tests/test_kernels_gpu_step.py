"""The operations of a GPU's decode step against their definitions, in Triton's interpreter: what they compute, not how
fast. Errors are at most twice those of torch in the same dtype, or a few roundings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
from triton_process import scripts

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (the extra `gpu`)")

SETUP = """
import pytest
import torch
from coreskip.kernels import gpu_reference as reference
from coreskip.kernels import gpu_step as step
from coreskip.kernels.gpu_formats import FloatMatrix, GroupedMatrix, Quantized
from coreskip.kernels.packed import ACTS, PackedColumns, PackedLinear, PackedMLP
from coreskip.kernels.step_model import Norm

torch.manual_seed(0)
half = torch.bfloat16

def twice(call, exact, dtype=torch.float32):
    '''Twice the error of the definition in float32, stored in `dtype`, and the same bits again.'''
    result, again = call(), call()
    assert torch.equal(result, again)
    with step.definitions():
        own = call()
    assert result.shape == own.shape and result.dtype == own.dtype == dtype
    scale = exact.double().abs().max()
    error = (result.double() - exact.double()).abs().max()
    own_error = (own.double() - exact.double()).abs().max()
    if dtype is half:  # which the interpreter cuts off, where a GPU rounds
        own_error = torch.maximum(own_error, scale * torch.finfo(half).eps / 2)
    assert error <= 2 * own_error + 4 * torch.finfo(torch.float32).eps * scale, (error, own_error, scale)

def norm(size, kind="rms", bias=False):
    return Norm(torch.rand(size) + 0.5, torch.randn(size) if bias else None, 1e-6, kind)

def same(result, expected):
    assert torch.equal(result.integers, expected.integers)
    assert torch.equal(result.step.nan_to_num(-1), expected.step.nan_to_num(-1))
    assert torch.allclose(result.total, expected.total, rtol=1e-6, atol=1e-6, equal_nan=True)
"""

Run = Callable[[str], None]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with scripts(SETUP, interpreted=True) as script:
        yield script


@pytest.mark.parametrize("width", [1, 32, 100])
def test_norms_and_sums(run: Run, width: int) -> None:
    run(f"""
x, first, second = (torch.randn(2, {width}) for _ in range(3))
one, other, layer = norm({width}), norm({width}), norm({width}, "layer", True)
wide = reference.add_norm(x.double(), (first.double(), second.double()), one, other, 0.5)
call = lambda: step.add_norm(x, layer, first, second, out=one, after=other, second=one, scale=0.5)
twice(lambda: call().stream, wide)
twice(lambda: call().y, reference.normed(wide, layer))
twice(lambda: call().second, reference.normed(wide, one))
twice(lambda: step.add_norm(x, None, first, dtype=half).y, x.double() + first, half)
assert torch.equal(step.add_norm(x, None).y, x)
same(step.add_norm(x, None, quantize=True).y, Quantized.of(x))
""")


def test_rounding_to_eight_bits(run: Run) -> None:
    run("""
x = torch.randn(3, 200) * torch.rand(3, 200).exp()
x[0, 32:64], x[1, 3], x[2, 70] = 0, float("nan"), float("inf")
x[0, 64:96] = torch.arange(32) / 2  # halves: to even
x[1, 96:128] = 1e-31
same(step.quantize(x), Quantized.of(x))
same(step.quantize(x.to(half)), Quantized.of(x.to(half)))
""")


def test_activations(run: Run) -> None:
    run("""
for act in ACTS:
    x = torch.randn(2, 140) * 3
    twice(lambda: step.act_mul(x, act, dtype=half), reference.act_mul(x.double(), act, True), half)
    twice(lambda: step.act_mul(x, act, gated=False), reference.act_mul(x.double(), act, False))
places = torch.full((100,), -1)
places[torch.tensor([1, 5, 98])] = torch.tensor([0, 69, 3])
expected = torch.where(places >= 0, reference.act_mul(x, "silu", True)[:, places.clamp_min(0)], 0)
twice(lambda: step.act_mul(x, "silu", inverse=places), expected)
h = step.act_mul(x, "silu")
same(step.act_mul(x, "silu", quantize=True), Quantized.of(h))
""")


@pytest.mark.parametrize("fmt", ["int4", "int8_groups"])
@pytest.mark.parametrize(("outs", "inputs"), [(48, 96), (33, 100), (5, 32)])
def test_products_with_groups(run: Run, fmt: str, outs: int, inputs: int) -> None:
    """In every form, and the numbers are those of the CPU's packed matrix."""
    run(f"""
from coreskip.kernels import reference as cpu_reference
weight, bias = torch.randn({outs}, {inputs}), torch.randn({outs})
packed = PackedLinear.pack(weight, bias, fmt={fmt!r})
matrix = GroupedMatrix.of(packed)
for rows in (1, 2, 3, 5, 17):
    x = torch.randn(rows, {inputs})
    expected = cpu_reference.linear(x.float(), packed)
    given = step.quantize(x)
    twice(lambda: step.linear(given, matrix), expected)
many = step.linear(given, matrix, form="many")
for row in (0, 7, 16):
    alone = Quantized(*(t[row : row + 1] for t in (given.integers, given.step, given.total)), {inputs})
    assert torch.equal(step.linear(alone, matrix, form="many")[0], many[row])
""")


def test_formats_are_the_cpu_s(run: Run) -> None:
    run("""
from coreskip.kernels.groups import ungroup, untile
from coreskip.kernels.packed import GROUPED
weight = torch.randn(40, 70)
for fmt in GROUPED:
    packed = PackedLinear.pack(weight, fmt=fmt)
    matrix = GroupedMatrix.of(packed)
    exact = ungroup(*untile(packed)).flatten(1)[:, :70]
    assert torch.equal(matrix.floats(), exact)
    assert torch.equal(GroupedMatrix.round(weight, fmt=fmt).words, matrix.words)
    assert torch.equal(matrix.rows(3, 9).floats(), exact[3:12])
    assert torch.equal(matrix.take(torch.tensor([30, 2])).floats(), exact[[30, 2]])
    assert torch.equal(matrix.inputs(32).floats(), exact[:, :32])
    assert torch.equal(matrix.take_groups(torch.tensor([1])).floats(), exact[:, 32:64])
    assert torch.equal(GroupedMatrix.stack([matrix, matrix]).floats()[40:], exact)
    x = torch.randn(2, 32)
    twice(lambda: step.linear(step.quantize(x), matrix.inputs(32)), reference.linear(x, matrix.inputs(32)))
try:
    GroupedMatrix.of(PackedLinear.pack(weight))
except ValueError as error:
    assert "no form" in str(error)
else:
    raise AssertionError("floats have no groups")
""")


def test_several_matrices_and_some_of_their_rows(run: Run) -> None:
    run("""
weight, bias = torch.randn(40, 300), torch.randn(40)
for fmt, dtype in (("int4", torch.float32), (None, torch.float32), (None, half), (None, torch.float16)):
    matrices = [step.pack(w.to(dtype), b, fmt) for w, b in ((weight, bias), (weight * 2, None), (weight - 1, bias))]
    for rows in (1, 2):
        x = torch.randn(rows, 300).to(dtype)
        for listed in (None, torch.tensor([3, 7, 39, 0])):
            for count in (1, 3):
                some = matrices[:count]
                parts = [reference.linear(x, m if listed is None else m.take(listed)) for m in some]
                call = lambda: step.linears(x, some, rows=listed, dtype=torch.float32)
                if dtype is torch.float32 or rows == 1:
                    twice(call, torch.cat(parts, 1))
""")


def test_activations_of_products(run: Run) -> None:
    run("""
weight, bias = torch.randn(40, 300), torch.randn(40)
for fmt, dtype in (("int4", torch.float32), (None, torch.float32), (None, half)):
    gate, up = (step.pack(w.to(dtype), b, fmt) for w, b in ((weight, bias), (weight * 2, None)))
    both = step.pack(torch.cat([weight, weight * 2]).to(dtype), torch.cat([bias, bias]), fmt)
    for rows in (1, 2):
        x = torch.randn(rows, 300).to(dtype)
        for matrices, gated in (((gate, up), True), ((both,), True), ((up,), False)):
            wide = torch.cat([reference.linear(x, m) for m in matrices], 1)
            exact = reference.act_mul(wide.double(), "silu", gated)
            call = lambda: step.activated(x, matrices, "silu", gated=gated, dtype=torch.float32)
            if dtype is torch.float32 or rows == 1:
                twice(call, exact)
            with step.launches() as found:
                call()
            assert found["small"] == (0 if fmt is None and rows == 1 else 1 if fmt is None else 2)
given = step.quantize(torch.randn(1, 300))
matrix = step.pack(weight, bias, "int4")
h = step.act_mul(step.linear(given, matrix), "relu", gated=False)
same(step.activated(given, [matrix], "relu", gated=False, quantize=True), Quantized.of(h))
""")


def test_neurons_are_picked(run: Run) -> None:
    """As many as are asked for, of equal ones the first; or by a threshold."""
    run("""
score = torch.randn(3, 200)
score[1] = score[1].round()  # many are equal
score[2, :150], score[2, 3], score[2, 100] = 0.0, -0.0, float("nan")
score[0, 7], score[0, 9] = float("inf"), -float("inf")
norm = torch.rand(200)
for keep in (1, 57, 103, 199, 200, 0):
    for kind, norms in (("plain", None), ("size", norm), ("size", None), ("plain", norm)):
        result = step.pick(score, keep=keep, kind=kind, norm=norms)
        assert result.dtype == torch.int32
        assert torch.equal(result.long(), reference.pick(score, keep, 0.0, kind, norms)), (keep, kind)
    assert torch.equal(step.pick(score, keep=keep), step.pick(score, keep=keep))
for threshold in (-9.0, 0.0, 0.5, 1e9):
    for kind in ("plain", "size"):
        result = step.pick(score, threshold=threshold, kind=kind, norm=norm)
        assert torch.equal(result.long(), reference.pick(score, -1, threshold, kind, norm))
""")


def test_signs(run: Run) -> None:
    run("""
from coreskip.kernels.sparse import SignScores
weight, x = torch.randn(33, 100), torch.randn(2, 100)
weight[3, 5], x[0, 7], x[1, 9] = 0.0, 0.0, float("nan")
scores = SignScores.of(weight)
sums = step.sign_sums(x, scores.signs)
assert torch.equal(sums, reference.sign_sums(x, scores.signs))
assert torch.allclose(0.5 + sums / 200, scores(x.nan_to_num(1.0)))
""")


@pytest.mark.parametrize(("hidden", "gated", "act"), [(200, True, "silu"), (64, False, "relu2"), (1, True, "gelu")])
def test_sketches(run: Run, hidden: int, gated: bool, act: str) -> None:
    """One pass: the choice, the refinement and the exact values are those of the CPU's definition, and of neurons that
    are left out nothing else is read."""
    run(f"""
from coreskip.kernels import reference as cpu
from coreskip.kernels.gpu_formats import ByRow
hidden, neurons = {hidden}, 70
gate, up, down = (torch.randn(neurons, hidden).div(hidden**0.5) for _ in range(3))
biases = {{"up_bias": torch.randn(neurons), "down_bias": torch.randn(hidden)}}
if {gated}:
    biases["gate_bias"] = torch.randn(neurons)
packed = PackedMLP.pack(gate if {gated} else None, up, down, act={act!r}, fmt="int8_sliced", **biases)
packed = packed.compensated(torch.randn(neurons))
x, smooth = torch.randn(3, hidden), torch.rand(hidden) + 0.5
one = norm(hidden)
made, own = step.add_norm(x, one, quantize="row", smooth=smooth).y, ByRow.of(reference.normed(x, one), smooth)
assert torch.equal(made.integers, own.integers) and torch.equal(made.total, own.total)
assert torch.allclose(made.step, own.step, rtol=1e-6)
given = step.add_norm(x, None, quantize="row").y
twice(lambda: step.sketch_scores(given, packed), cpu.sketch_scores(x, packed))
least, refine = 0.4 * packed.norm.mean().item(), 0.3 * packed.norm.mean().item()
shared = torch.cat([torch.randperm(neurons)[:31], torch.tensor([-1])])
for indices in (None, shared, torch.stack([shared, shared.flip(0), shared]).int()):
    for threshold, refined in ((None, 0.0), (least, 0.0), (least, refine), (None, refine)):
        call = lambda: step.sketch_mlp(given, packed, indices=indices, threshold=threshold, refine=refined)
        twice(call, reference.sketch_mlp(given, packed, indices, threshold, refined))
        if indices is None and threshold is not None:
            found = cpu.mlp_by(x, packed, "sketch", -1, threshold, refined)
            assert (call() - found).abs().max() <= 1e-5 * found.abs().max() + 1e-7
dropped = (cpu.sketch_scores(x[:1], packed) < least)[0]
packed.low[dropped], packed.scale[dropped, -1] = 255, float("nan")
assert 0 < dropped.sum() < neurons
assert step.sketch_mlp(x[:1], packed, threshold=least).isfinite().all()
x[1, 0] = float("nan")
wrong = step.sketch_mlp(x, packed, threshold=least)
assert wrong[1].isnan().all()
with step.launches() as found:
    step.sketch_mlp(given, packed, threshold=least)
assert (found["gemv"], found["small"]) == (1, 1)
""")


@pytest.mark.parametrize(
    ("hidden", "neurons", "gated", "act", "dtype"),
    [
        (1, 1, True, "silu", "float32"),
        (300, 40, True, "gelu", "float32"),
        (65, 17, False, "relu2", "bfloat16"),
        (65, 70, True, "gelu_tanh", "float16"),
    ],
)
def test_the_one_pass_mlp(run: Run, hidden: int, neurons: int, gated: bool, act: str, dtype: str) -> None:
    run(f"""
hidden, neurons, dtype = {hidden}, {neurons}, torch.{dtype}
gate, up, down = (torch.randn(neurons, hidden).div(hidden**0.5).to(dtype) for _ in range(3))
biases = {{"up_bias": torch.randn(neurons), "down_bias": torch.randn(hidden)}}
if {gated}:
    biases["gate_bias"] = torch.randn(neurons)
packed = PackedMLP.pack(gate if {gated} else None, up, down, act={act!r}, **biases).compensated(torch.randn(neurons))
x = torch.randn(2, hidden)
shared = torch.cat([torch.randperm(neurons)[: neurons // 2 + 1], torch.tensor([-1])])
ways = [
    {{"form": "one"}},
    {{"indices": shared}},
    {{"indices": torch.stack([shared, shared.flip(0)]).int()}},
    {{"rule": "activation", "threshold": 0.3}},
    {{"indices": shared, "rule": "gate" if {gated} else "activation", "threshold": 0.2}},
]
for way in ways:
    call = lambda: step.mlp(x, packed, dtype=torch.float32, **way)
    exact = reference.mlp(
        x.double(), packed, way.get("indices"), way.get("rule", "listed"), way.get("threshold", 0.0)
    )
    twice(call, exact)
    alone = step.mlp(x[1:], packed, dtype=torch.float32, **{{**way, "form": "one", **(
        {{"indices": way["indices"][1:]}} if way.get("indices", shared).dim() == 2 else {{}})}})
    assert torch.equal(alone, call()[1:])
given = x.to(dtype)
exact = reference.mlp(given.double(), packed, None, "listed", 0.0)
error = (step.mlp(given, packed, form="many").double() - exact).abs().max()
assert error <= (2e-5 + 3 * torch.finfo(dtype).eps) * exact.abs().max()
""")


def test_nothing_is_read_of_neurons_that_are_left_out(run: Run) -> None:
    """Rows that must not be read are NaN."""
    run("""
weight = torch.randn(20, 3, 64)
packed = PackedMLP(weight.clone(), 64, True, "relu")
x = torch.randn(1, 64)
gates = torch.relu(weight[:, 0] @ x[0])
packed.weight[gates < 0.5, 1:] = float("nan")
assert step.mlp(x, packed, rule="gate", threshold=0.5).isfinite().all()
assert not step.mlp(x, packed).isfinite().all()
packed.weight[7], listed = float("nan"), torch.tensor([i for i in range(20) if gates[i] >= 0.5 and i != 7])
assert step.mlp(x, packed, indices=listed).isfinite().all()
""")


def test_columns(run: Run) -> None:
    """One to three linears at once, and what an activation makes of them; counters are zeros again."""
    run("""
counters = torch.zeros(64, dtype=torch.int32)
for dtype in (torch.float32, half):
    outs = (300, 300, 20)
    every = [PackedColumns.pack(torch.randn(n, 70).to(dtype), torch.randn(n) if n == 300 else None) for n in outs]
    x = torch.randn(2, 70)
    for by_norm in (False, True):
        parts = [reference.columns(x.double(), p, t, by_norm) for p, t in zip(every, (0.7, 0.2, 0.0))]
        for count in (1, 3):
            call = lambda: step.columns(x, every[:count], (0.7, 0.2, 0.0)[:count], by_norm=by_norm, counters=counters)
            twice(call, torch.cat(parts[:count], 1))
    both = lambda: step.columns(x, every[:2], (0.7, 0.2), by_norm=True, act="silu", counters=counters)
    twice(both, ACTS["silu"](parts[0]) * parts[1])
    twice(lambda: step.columns(x, every[2:], (0.0,), by_norm=True, act="relu"), parts[2].relu())
assert not counters.any()
every[0].weight[x[0].abs() < 0.7] = float("nan")
assert step.columns(x[:1], every[:1], (0.7,)).isfinite().all()
with step.launches() as found:
    both()
assert (found["gemv"], found["small"]) == (1, 0)
try:
    step.columns(x, every, (0.1,) * 3, act="silu")
except ValueError:
    pass
else:
    raise AssertionError("three linears have no common activation")
""")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"turned": 8, "size": 8, "norms": "(norm(8), norm(8))"},
        {"turned": 4, "size": 12, "paired": True, "norms": "(norm(48), norm(24))", "tokens": 2},
        {"turned": 16, "size": 16, "norms": "(norm(16, 'layer', True), norm(16))", "after": True, "dtype": "bfloat16"},
        {"turned": 8, "size": 8, "places": "((0, 2, 32), (16, 1, 32), (24, 1, 32))"},
        {"heads": 0, "places": "((0, 1, 0), (0, 2, 0), (16, 2, 0))", "turned": 6},
    ],
    ids=["copied", "halves", "paired, over all heads", "normed afterwards", "in turn", "entries only"],
)
def test_rotation_and_writing(run: Run, options: dict[str, object]) -> None:
    given = {"turned": 0, "size": 8, "heads": 4, "tokens": 1, "paired": False, "after": False, "dtype": "float32"}
    given |= {"norms": "(None, None)", "places": "None", **options}
    run(f"""
heads, kv_heads, size, tokens, turned = {given["heads"]}, 2, {given["size"]}, {given["tokens"]}, {given["turned"]}
rows, dtype = 2 * tokens, torch.{given["dtype"]}
ends = heads * size, (heads + kv_heads) * size
places = {given["places"]} or ((0, heads, 0), (ends[0], kv_heads, 0), (ends[1], kv_heads, 0))
x = torch.randn(rows, ends[1] + kv_heads * size)
angles = torch.rand(32, max(1, turned // 2)) * 6
tables = (torch.cat([angles.cos()] * 2, 1), torch.cat([angles.sin()] * 2, 1)) if turned else None
at = torch.randperm(16)[:rows]
at[0] = 19  # beyond the end: nothing is written
q_norm, k_norm = {given["norms"]}
before = [torch.randn(2, kv_heads, 16, size).to(dtype) for _ in range(2)]

def call(wide=lambda t: t):
    keys, values = (t.clone() for t in before)
    q = step.rotary_write(
        x, keys, values, at, heads=heads, places=places, rotation=tables, positions=torch.arange(rows) + 3,
        paired={given["paired"]}, q_norm=q_norm, k_norm=k_norm, turned={given["after"]},
    )
    return torch.cat([t.flatten() for t in (q, keys, values)])

with step.definitions():
    kept = x, before
    x, before = x.double(), [t.float() for t in before]
    exact = call()
    x, before = kept
twice(call, exact, dtype)
""")


@pytest.mark.parametrize(
    "options",
    [
        "heads=4, kv_heads=2, size=8, tokens=3, capacity=100",
        "heads=4, kv_heads=4, size=12, window=9, softcap=5.0",
        "heads=8, kv_heads=2, size=16, capacity=300, slopes=torch.rand(8), sinks=torch.randn(8)",
        "heads=4, kv_heads=2, size=8, seen=torch.rand(2, 70) > 0.3, quantize=True",
        "heads=4, kv_heads=2, size=8, seen=torch.zeros(2, 70, dtype=torch.bool)",
        "heads=4, kv_heads=2, size=64, dtype=half, capacity=200",
        "heads=6, kv_heads=2, size=80, dtype=torch.float16",
    ],
)
def test_attention(run: Run, options: str) -> None:
    """What lies beyond a row's index is NaN."""
    run(f"""
def check(heads, kv_heads, size, tokens=1, capacity=70, dtype=torch.float32, quantize=False, **options):
    rows = 2 * tokens
    q = torch.randn(rows, heads, size).to(dtype)
    keys, values = (torch.randn(2, kv_heads, capacity, size).to(dtype) for _ in range(2))
    at = torch.randint(0, capacity, (rows,))
    for sequence in range(2):
        end = int(at.view(2, tokens)[sequence].max()) + 1
        keys[sequence, :, end:], values[sequence, :, end:] = float("nan"), float("nan")
    call = lambda quantize=False: step.attention(
        q, keys, values, at, scale=size**-0.5, dtype=torch.float32, quantize=quantize, **options
    )
    named = {{"seen": None, "window": 0, "softcap": 0.0, "slopes": None, "sinks": None, **options}}
    exact = reference.attention(
        q.double(), keys.double(), values.double(), at, named["seen"], size**-0.5, *list(named.values())[1:]
    )
    counters = torch.zeros(rows * step.COUNTERS, dtype=torch.int32)
    options["counters"] = counters
    result = call()
    assert torch.equal(result, call()) and not counters.any()
    limit = (2e-6 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps) * exact.abs().max() + 1e-30
    assert (result - exact).abs().max() <= limit
    if quantize:
        same(call(True), Quantized.of(result))
    own = slice(1 // tokens, 1 // tokens + 1)
    if "seen" in options:
        options["seen"] = options["seen"][own]
    alone = step.attention(
        q[1:2], keys[own], values[own], at[1:2], scale=size**-0.5, dtype=torch.float32, **options
    )
    assert torch.equal(alone, result[1:2])
check({options})
""")


@pytest.mark.parametrize(
    "options",
    [
        "8, 2", "60, 4, normalized=True, scale=2.5", "8, 3, scoring='sigmoid', normalized=True, added=1e-20, least=0.5",
        "12, 2, scoring='softmax_of_chosen'", "12, 3, scoring='sigmoid_of_chosen', kept=kept(12)",
        "16, 2, scoring='sparse_mixer', jitter=0.1", "16, 2, scoring='sparse_mixer', jitter=0.1, kept=kept(16)",
        "40, 6, groups=8, groups_kept=3, kept=kept(40)", "6, 4, kept=(torch.arange(6) < 3).to(torch.uint8)",
        "24, 4, scoring='sigmoid', correction=torch.randn(24), groups=4, groups_kept=2, by_pairs=True, normalized=True",
        "24, 6, correction=torch.rand(24), groups=4, groups_kept=2, by_pairs=True, kept=kept(24), least=0.3",
        "1, 1",
    ],
)  # fmt: skip
def test_routers(run: Run, options: str) -> None:
    run(f"""
from coreskip.kernels.experts import Router
def kept(count):
    return (torch.arange(count) % 3 != 1).to(torch.uint8)
def check(count, chosen, **options):
    router = Router(PackedLinear.pack(torch.randn(count, 8)), chosen, **options)
    logits = (torch.randn(9, count + 3) * 2)[:, :count]
    (weights, experts), (again, others) = step.route(logits, router), step.route(logits, router)
    assert torch.equal(weights, again) and torch.equal(experts, others)
    exact, wanted = router.weigh(logits.double())
    assert torch.equal(experts, wanted.int()), (experts, wanted)
    assert torch.allclose(weights.double(), exact, rtol=2e-6, atol=1e-7)
check({options})
""")


def test_experts(run: Run) -> None:
    """However their matrices lie, with everything that some families have; one that is left out is not read."""
    run("""
from coreskip.kernels.gpu_formats import ExpertMatrices
def floats(*shape, dtype=torch.float32):
    return (torch.randn(*shape) * 0.2).to(dtype)
chosen = torch.tensor([[2, 0], [4, -1], [2, 3]], dtype=torch.int32)
weights = torch.tensor([[0.7, 0.3], [1.0, 0.0], [0.2, 0.9]])
x, more, gate = torch.randn(3, 36), torch.randn(3, 36), torch.randn(3, 2)[:, 1:]
def check(gate_rows, up, down, biases, act, **options):
    matrices = ExpertMatrices(gate_rows, up, down, *biases, act, **options)
    for given in (x, x.to(up.dtype)):
        exact = reference.experts(given.double(), matrices, chosen, weights)
        twice(lambda: step.experts(given, matrices, chosen, weights), exact)
        exact += 0.5 * more * gate.sigmoid()
        twice(lambda: step.experts(given, matrices, chosen, weights, more=more, gate=gate, more_scale=0.5), exact)
    twice(lambda: step.experts(x, matrices, chosen, weights, more=more),
          reference.experts(x.double(), matrices, chosen, weights) + more)
stacked, down = floats(5, 40, 36), floats(5, 36, 20)
stacked[1], down[1] = float("nan"), float("nan")  # whom nobody chose
check(stacked[:, :20], stacked[:, 20:], down, (None, None, None), "silu")
check(None, stacked, floats(5, 36, 40), (None, floats(5, 40), floats(5, 36)), "relu2")
turns, bias = floats(5, 36, 40, dtype=half).transpose(1, 2), floats(5, 40, dtype=half)
check(turns[:, ::2], turns[:, 1::2], floats(5, 20, 36, dtype=half).transpose(1, 2),
      (bias[:, ::2], bias[:, 1::2], floats(5, 36, dtype=half)), "silu", limit=0.7, slope=1.7, offset=1.0)
check(floats(5, 20, 36), floats(5, 20, 36), floats(5, 36, 20), (None, None, None), "gelu", by_inputs=True)
with pytest.raises(ValueError):
    ExpertMatrices(turns[:, ::2], stacked[:, :20], down, None, None, None, "silu")
""")


@pytest.mark.parametrize("way", ["paired=True, apart=False", "paired=False, apart=True", "paired=False, apart=False"])
def test_latents(run: Run, way: str) -> None:
    """Of 20 heads of two sequences of two tokens each; what lies beyond a row's index is NaN."""
    run(f"""
from coreskip.kernels import gpu_latents as latents
heads, rank, rope, nope, rows, capacity = 20, 24, 8, 12, 4, 70
wide, kv, table = torch.randn(rows, heads * (nope + rope) + 5), torch.randn(rows, rank + rope), torch.rand(64, rope)
q = wide[:, 5:].unflatten(1, (heads, -1))
at, positions = torch.tensor([3, 4, 68, 69]), torch.tensor([5, 6, 1, 0])
one, rotation = norm(rank), (table.cos(), table.sin())
start = [torch.randn(2, 1, capacity, size) for size in (rank, rope)]
def written(dtype=torch.float32, at=at):
    keys, values = (t.to(dtype).clone() for t in start)
    found = latents.latent_write(q, kv, keys, values, at, norm=one, rotation=rotation, positions=positions, {way})
    return found, keys, values
for dtype in (torch.float32, half):
    with step.definitions():
        expected = written(dtype)
    for result, wanted in zip(written(dtype), expected, strict=True):
        error = 1e-2 if dtype is half else 1e-6
        assert result.dtype == dtype and torch.allclose(result.float(), wanted.float(), atol=2e-6, rtol=error)
assert torch.equal(written(at=at + 1000)[1], start[0])
turned, keys, values = written()
for sequence in range(2):
    end = int(at.view(2, 2)[sequence].max()) + 1
    keys[sequence, :, end:], values[sequence, :, end:] = float("nan"), float("nan")
weight = torch.randn(heads, nope + 9, rank)
of_keys, of_values = weight[:, :nope].transpose(1, 2), weight[:, nope:]
def products(x, weight):
    twice(lambda: latents.head_products(x, weight), torch.einsum("rhi,hoi->rho", x.double(), weight.double()))
products(q[..., :nope], of_keys)
asked = latents.head_products(q[..., :nope], of_keys)
products(asked, of_values.to(half))
counters = torch.zeros(rows * step.COUNTERS, dtype=torch.int32)
def check(seen, window):
    def call(*given):
        return latents.latent_attention(*given, at, scale=0.2, seen=seen, window=window, counters=counters)
    with step.definitions():
        exact = call(*(t.double() for t in (asked, turned, keys, values)))
    result = call(asked, turned, keys, values)
    assert torch.equal(result, call(asked, turned, keys, values)) and not counters.any()
    assert (result - exact).abs().max() <= 2e-6 * exact.abs().max()
check(None, 0)
check(torch.rand(2, capacity) > 0.3, 9)
check(torch.zeros(2, capacity, dtype=torch.bool), 0)
""")


def test_what_no_launch_can_do(run: Run) -> None:
    run("""
keys, at = torch.zeros(1, 2, 4, 8), torch.zeros(1, dtype=torch.int64)
places = (0, 2, 0), (16, 2, 0), (32, 2, 0)
call = lambda **options: step.rotary_write(
    torch.randn(1, 48), keys, keys.clone(), at, heads=2, places=places, **options)
call(k_norm=norm(16))
for wrong in (lambda: call(k_norm=norm(16), turned=True), lambda: step.act_mul(torch.empty(65536, 2), "silu")):
    with pytest.raises(ValueError):
        wrong()
""")


def test_embeddings_and_errors(run: Run) -> None:
    run("""
table, ids = torch.randn(50, 64), torch.tensor([3, 0, 49])
assert torch.equal(step.embed(ids, table, scale=2.0, dtype=torch.float32), table[ids] * 2)
matrix = GroupedMatrix.round(table)
assert torch.equal(step.embed(ids, matrix, dtype=torch.float32), matrix.floats()[ids])
packed = PackedMLP.pack(None, table, table, act="silu")
for wrong in (lambda: step.mlp(table, packed, rule="gate"), lambda: step.mlp(table, PackedMLP.pack(
        None, table, table, act="silu", fmt="int8"))):
    try:
        wrong()
    except ValueError:
        continue
    raise AssertionError("no error")
""")


def test_launches_are_counted(run: Run) -> None:
    run("""
x = torch.randn(1, 64)
matrix = step.pack(torch.randn(32, 64), fmt="int4")
with step.launches() as found:
    step.linear(step.quantize(x), matrix)
assert (found["small"], found["gemv"], found["bytes"]) == (1, 1, matrix.nbytes)
""")
