"""Every Triton kernel compiled to the machine code of GPUs that are not here (A100, H100), at sizes of real models:
what the interpreter allows and a compiler does not is noticed, and loads of 16 bytes that fell apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
from triton_process import scripts

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (the extra `gpu`)")

SETUP = """
import torch
import triton
from triton import knobs
from gpu_compile import compiled
from coreskip.kernels import gpu_step as step
from coreskip.kernels.gpu_formats import GroupedMatrix, Quantized
from coreskip.kernels.packed import PackedColumns, PackedMLP
from coreskip.kernels.step_model import Norm

half = torch.bfloat16
LIMIT = 99 << 10  # shared memory of a program on the smallest cards of these generations

def grouped(outs, inputs, bits):
    words = torch.empty((outs, inputs // 32, bits), dtype=torch.int32)
    return GroupedMatrix(words, torch.empty((outs, inputs // 32), dtype=torch.int32), inputs)

def rounded(rows, inputs):
    groups = inputs // 32
    return Quantized(torch.empty((rows, inputs), dtype=torch.int8), *torch.empty((2, rows, groups)), inputs)

def norm(size, kind="rms"):
    return Norm(torch.empty(size), torch.empty(size) if kind == "layer" else None, 1e-6, kind)

def bundles(hidden, dtype=half):
    return PackedMLP(torch.empty((4, 3, hidden), dtype=dtype), hidden, True, "silu")

def made(call, *names, capability=90):
    found = compiled(call, capability)
    assert [name for name, _ in found] == list(names), [name for name, _ in found]
    for _, kernel in found:
        assert kernel.asm["cubin"] and kernel.metadata.shared <= LIMIT, kernel.metadata.shared
        assert ".local" not in kernel.asm["ptx"]
    return [kernel.asm["ptx"] for _, kernel in found]

def adds_up_last(ptx):
    "The last program sees what all have stored: stores, a barrier, the counter, a barrier, loads that no cache keeps."
    parts = ptx.split("atom.global.gpu.acq_rel.add")
    assert len(parts) > 1 and "ld.global.nc" not in ptx
    for before, after in zip(parts, parts[1:]):
        assert "st.global" not in before[before.rindex("bar.sync"):]
        assert "ld.global" not in after[:after.index("bar.sync")]
"""

Run = Callable[[str], None]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with scripts(SETUP, interpreted=False) as script:
        yield script


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_with_groups(run: Run, capability: int, bits: int) -> None:
    run(f"""
for outs, inputs in ((22016, 4096), (4096, 11008), (576, 576)) if {capability} == 90 else ((22016, 4096),):
    for rows in (1, 3, 8) if inputs == 4096 else (1,):
        matrix, x = grouped(outs, inputs, {bits}), rounded(rows, inputs)
        name = "_tile_kernel" if rows > 3 else "_dot_kernel"
        (ptx,) = made(lambda: step.linear(x, matrix), name, capability={capability})
        if rows > 3:
            assert "mma.sync.aligned.m16n8k32" in ptx and "cp.async.cg.shared.global" in ptx
        else:
            assert "dp4a" in ptx and "ld.global.v4.b32" in ptx and "ld.global.b8" not in ptx
listed = torch.zeros(64, dtype=torch.int64)
made(lambda: step.linears(rounded(8, inputs), [matrix], rows=listed), "_tile_kernel", capability={capability})
made(lambda: step.linears(rounded(1, inputs), [matrix], rows=listed), "_dot_kernel", capability={capability})
""")


@pytest.mark.parametrize("capability", [80, 90])
def test_rows(run: Run, capability: int) -> None:
    run(f"""
for hidden in (576, 4096, 8192) if {capability} == 90 else (4096,):
    x, one, layer = torch.empty(1, hidden), norm(hidden), norm(hidden, "layer")
    made(lambda: step.add_norm(x, one, x, out=layer, quantize=True), "_add_norm_kernel", capability={capability})
made(lambda: step.add_norm(x, one, x, x, after=layer, second=one, dtype=half), "_add_norm_kernel")
wide = torch.empty(1, 22016)
made(lambda: step.act_mul(wide, "silu", quantize=True), "_act_mul_kernel", capability={capability})
made(lambda: step.act_mul(wide, "gelu", inverse=torch.zeros(12000, dtype=torch.int64)), "_act_mul_kernel")
made(lambda: step.quantize(x.to(half)), "_act_mul_kernel", capability={capability})
""")


@pytest.mark.parametrize("capability", [80, 90])
def test_attention(run: Run, capability: int) -> None:
    run(f"""
def check(heads, kv_heads, size, dtype=half, one=None, **options):
    keys = torch.empty((2, kv_heads, 2048, size), dtype=dtype)
    at, table = torch.zeros(2, dtype=torch.int64), torch.empty((64, size))
    ends = heads * size, (heads + kv_heads) * size
    places = (0, heads, 0), (ends[0], kv_heads, 0), (ends[1], kv_heads, 0)
    qkv = torch.empty((2, ends[1] + kv_heads * size))
    made(lambda: step.rotary_write(qkv, keys, keys, at, heads=heads, places=places, rotation=(table, table), q_norm=one,
        k_norm=one), "_rotary_kernel", capability={capability})
    q = torch.empty((2, heads, size), dtype=dtype)
    (ptx,) = made(lambda: step.attention(q, keys, keys, at, scale=0.1, quantize=True, **options), "_attention_kernel",
        capability={capability})
    adds_up_last(ptx)
check(8, 1, 256, seen=torch.ones((2, 2048), dtype=torch.bool), softcap=50.0, window=512, sinks=torch.ones(8))
if {capability} == 90:
    check(32, 32, 128)
    check(32, 8, 64, one=norm(64))
    check(6, 6, 80, torch.float16)
    check(8, 4, 128, torch.float32, slopes=torch.ones(8))
""")


@pytest.mark.parametrize("capability", [80, 90])
def test_floats(run: Run, capability: int) -> None:
    run(f"""
names = "_mlp_kernel", "_sum_kernel"
for hidden in (576, 4096, 8192) if {capability} == 90 else (4096,):
    x, packed = torch.empty(1, hidden), bundles(hidden)
    for way in ({{}}, {{"indices": torch.zeros(9, dtype=torch.int64)}}, {{"rule": "gate"}}, {{"rule": "activation"}}):
        if (hidden == 4096 and {capability} == 90) or not way:
            ptx = made(lambda: step.mlp(x, packed, **way), *names, capability={capability})
            assert "ld.global.v4.b32" in ptx[0]
made(lambda: step.mlp(x, bundles(hidden, torch.float32)), *names, capability={capability})
columns = PackedColumns(torch.empty((4096, 4096), dtype=half), 4096, torch.empty(4096))
for count, act in ((1, None), (2, "silu"), (3, None)):
    (ptx,) = made(lambda: step.columns(torch.empty(1, 4096), [columns] * count, [0.1] * count, by_norm=True, act=act),
        "_columns_kernel", capability={capability})
    adds_up_last(ptx)
for inputs in (576, 4096, 11008) if {capability} == 90 else (4096,):
    matrices = [step.pack(torch.empty((n, inputs), dtype=half)) for n in (64, 16, 16)]
    x = torch.empty(1, inputs)
    (ptx,) = made(lambda: step.linears(x, matrices), "_row_kernel", capability={capability})
    assert "ld.global.v4.b32" in ptx
""")


@pytest.mark.parametrize("capability", [80, 90])
def test_choices(run: Run, capability: int) -> None:
    run(f"""
from coreskip.kernels.gpu_formats import ByRow
from coreskip.kernels.packed import PackedLinear
for neurons in (1536, 28672) if {capability} == 90 else (11008,):
    score, ends = torch.empty(1, neurons), torch.empty(neurons)
    made(lambda: step.pick(score, keep=neurons // 2), "_pick_kernel", capability={capability})
    made(lambda: step.pick(score, threshold=0.5, kind="size", norm=ends), "_pick_kernel", capability={capability})
for hidden in (576, 4096, 8192) if {capability} == 90 else (4096,):
    half_row = -(-hidden // 128) * 64
    packed = PackedMLP(torch.empty((8, 2, half_row), dtype=torch.uint8), hidden, True, "silu",
        low=torch.empty((8, 4 * half_row), dtype=torch.uint8), scale=torch.empty(8, 3), norm=torch.empty(8))
    x = ByRow(torch.empty((1, half_row * 2), dtype=torch.int8), torch.empty(1), torch.empty(1, dtype=torch.int32))
    (ptx, _) = made(lambda: step.sketch_mlp(x, packed, threshold=0.5, refine=0.1), "_sketch_kernel", "_sum_kernel",
        capability={capability})
    assert "dp4a" in ptx and "ld.global.v4.b32" in ptx and "ld.global.b8" not in ptx
    made(lambda: step.sketch_mlp(x, packed, indices=torch.zeros(8, dtype=torch.int32)), "_sketch_kernel", "_sum_kernel",
        capability={capability})
    made(lambda: step.sketch_scores(x, packed), "_scores_kernel", capability={capability})
    given = torch.empty(1, hidden)
    made(lambda: step.add_norm(given, norm(hidden), given, quantize="row", smooth=torch.empty(hidden)),
        "_add_norm_kernel", capability={capability})
signs = PackedLinear(torch.empty((64, 4096), dtype=torch.uint8), 4096, torch.empty(64))
made(lambda: step.sign_sums(torch.empty((1, 4096), dtype=half), signs), "_sign_kernel", capability={capability})
gates = [step.pack(torch.empty((64, 4096), dtype=half)) for _ in range(2)]
(ptx,) = made(lambda: step.activated(torch.empty((1, 4096), dtype=half), gates, "silu"), "_row_kernel",
    capability={capability})
assert "ld.global.v4.b32" in ptx
""")


@pytest.mark.parametrize("capability", [80, 90])
def test_experts(run: Run, capability: int) -> None:
    """Shapes of Qwen3-30B-A3B, DeepSeek-V2 (whose groups are no power of two) and gpt-oss (stored by columns)."""
    run(f"""
from coreskip.kernels.experts import Router
from coreskip.kernels.gpu_formats import ExpertMatrices
from coreskip.kernels.packed import PackedLinear
def route(count, chosen, **options):
    router = Router(PackedLinear(torch.empty((count, 32)), 32, None), chosen, **options)
    made(lambda: step.route(torch.empty(1, count), router), "_route_kernel", capability={capability})
route(128, 8, normalized=True)
route(160, 6, groups=8, groups_kept=3, correction=torch.empty(160), kept=torch.empty(160, dtype=torch.uint8), least=0.1)
route(256, 8, scoring="sigmoid", groups=8, groups_kept=4, by_pairs=True)
route(32, 4, scoring="softmax_of_chosen")
route(16, 2, scoring="sparse_mixer")
chosen, weights = torch.zeros((1, 8), dtype=torch.int32), torch.empty(1, 8)
def check(up, down, bias=None, **options):
    gate_bias, up_bias, down_bias = bias or (None, None, None)
    matrices = ExpertMatrices(up[0], up[1], down, gate_bias, up_bias, down_bias, "silu", **options)
    x, more = torch.empty((1, down.shape[1]), dtype=half), torch.empty(1, down.shape[1])
    found = made(lambda: step.experts(x, matrices, chosen, weights, more=more, gate=more), "_widening_kernel",
        "_narrowing_kernel", capability={capability})
    assert all("ld.global.v4.b32" in ptx for ptx in found)
both = torch.empty((2, 1536, 2048), dtype=half)
check((both[:, :768], both[:, 768:]), torch.empty((2, 2048, 768), dtype=half))
turns, bias = torch.empty((2, 2880, 5760), dtype=half).transpose(1, 2), torch.empty((2, 5760), dtype=half)
down = torch.empty((2, 2880, 2880), dtype=half).transpose(1, 2)
made(lambda: step.experts(torch.empty((1, 2880), dtype=half), ExpertMatrices(turns[:, ::2], turns[:, 1::2], down,
    bias[:, ::2], bias[:, 1::2], bias[:, :2880], "silu", limit=7.0, slope=1.702, offset=1.0), chosen, weights),
    "_widening_kernel", "_narrowing_kernel", capability={capability})
""")


@pytest.mark.parametrize("capability", [80, 90])
def test_latents(run: Run, capability: int) -> None:
    """The shape of DeepSeek-V2-Lite, and in float32."""
    run(f"""
from coreskip.kernels import gpu_latents as latents
for dtype in (half, torch.float32) if {capability} == 90 else (half,):
    keys, values = torch.empty((1, 1, 2048, 512), dtype=dtype), torch.empty((1, 1, 2048, 64), dtype=dtype)
    q, kv, table = torch.empty(1, 16, 192), torch.empty(1, 576), torch.empty(1, 64)
    at = torch.zeros(1, dtype=torch.int64)
    made(lambda: latents.latent_write(q, kv, keys, values, at, norm=norm(512), rotation=(table, table), positions=at,
        paired=False, apart=True), "_write_kernel", capability={capability})
    weight = torch.empty((16, 256, 512), dtype=dtype)
    made(lambda: latents.head_products(q[..., :128], weight[:, :128].transpose(1, 2)), "_heads_kernel",
        capability={capability})
    asked = torch.empty(1, 16, 512)
    (ptx,) = made(lambda: latents.head_products(asked, weight[:, 128:]), "_heads_kernel", capability={capability})
    assert "ld.global.v4.b32" in ptx
    turned = torch.empty((1, 16, 64), dtype=dtype)
    (ptx,) = made(lambda: latents.latent_attention(asked, turned, keys, values, at, scale=0.1), "_latent_kernel",
        capability={capability})
    adds_up_last(ptx)
""")


def test_matrices_in_eight_bits_with_one_scale_a_row(run: Run) -> None:
    """The kernels of gpu.py that are left."""
    run("""
from coreskip.kernels import gpu
packed = PackedMLP.pack(*(torch.randn(64, 256) for _ in range(3)), act="silu", fmt="int8")
x = torch.randn(1, 256)
made(lambda: gpu.mlp(x, packed, None, "listed", -1, 0.0, 0.0), "_activations_kernel", "_down_kernel", "_sum_kernel")
""")


def test_other_cards(run: Run) -> None:
    """RTX 30 and 40, B200, RTX 50; and numbers that are 1, which are constants of a kernel."""
    run("""
for capability in (86, 89, 100, 120):
    made(lambda: step.linear(rounded(8, 4096), grouped(64, 4096, 4)), "_tile_kernel", capability=capability)
    made(lambda: step.linear(rounded(1, 4096), grouped(64, 4096, 4)), "_dot_kernel", capability=capability)
one = torch.empty(1, 1)
made(lambda: step.linear(rounded(4, 32), grouped(1, 32, 8)), "_tile_kernel")
made(lambda: step.linear(rounded(1, 32), grouped(1, 32, 4)), "_dot_kernel")
made(lambda: step.linear(one, step.pack(one)), "_row_kernel")
made(lambda: step.add_norm(one, norm(1), quantize=True), "_add_norm_kernel")
made(lambda: step.columns(one, [PackedColumns(torch.empty((1, 32)), 1, torch.empty(1))], [0.1]), "_columns_kernel")
lists = torch.zeros((1, 1), dtype=torch.int32)
made(lambda: step.mlp(torch.empty(1, 64), bundles(64), indices=lists), "_mlp_kernel", "_sum_kernel")
keys, at = torch.empty((1, 1, 1, 16)), torch.zeros(1, dtype=torch.int64)
made(lambda: step.attention(keys[0], keys, keys, at, scale=1.0), "_attention_kernel")
""")


def test_launches_that_overlap() -> None:
    """Weights are asked for before the launch before is waited for, x after it."""
    setup = "import os\nos.environ['CORESKIP_OVERLAP'] = '1'\n" + SETUP
    with scripts(setup, interpreted=False) as script:
        script("""
for call, name in (
    (lambda: step.linear(rounded(1, 4096), grouped(64, 4096, 4)), "_dot_kernel"),
    (lambda: step.linear(torch.empty(1, 4096), step.pack(torch.empty((64, 4096), dtype=half))), "_row_kernel"),
    (lambda: step.activated(torch.empty(1, 4096), [step.pack(torch.empty((64, 4096), dtype=half))] * 2, "silu"),
        "_row_kernel"),
):
    (ptx,) = made(call, name)
    before, after = ptx.split("griddepcontrol.wait", 1)
    assert "ld.global.v4.b32" in before and "ld.global.v4.b32" in after
x = torch.empty(1, 4096)
(ptx,) = made(lambda: step.add_norm(x, norm(4096), x), "_add_norm_kernel")
assert "ld.global" not in ptx.split("griddepcontrol.wait", 1)[0]
""")
