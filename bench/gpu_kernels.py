"""The kernels of a GPU's decode step: checked against their definitions, then timed against cuBLAS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from coreskip.bench.gpu_clock import GpuRow, Results, difference, layers_for, seconds_of
from coreskip.kernels import gpu_reference as reference
from coreskip.kernels import gpu_step as step
from coreskip.kernels.experts import Router
from coreskip.kernels.gpu_formats import ByRow, ExpertMatrices, GroupedMatrix, Quantized
from coreskip.kernels.packed import ACTS, PackedColumns, PackedLinear, PackedMLP
from coreskip.kernels.step_model import Norm

#: hidden and intermediate sizes, the most important first
SHAPES = ((4096, 11008), (4096, 14336), (8192, 28672), (2048, 8192), (576, 1536))
KEEP = 0.5


@dataclass
class Check:
    """One kernel with what it has to give, and in which dtype it stores that."""

    name: str
    run: Callable[..., Any]
    expected: Callable[..., Any]
    dtype: torch.dtype = torch.float32
    roundings: int = 1  # of that dtype on the way to a result


# ---- checks ----


def check(results: Results, device: torch.device, hidden: int, inner: int, least: float) -> None:
    """Every kernel against its definition on this device, twice, until `least` seconds are left."""
    for case in _checks(device, hidden, inner):
        if results.left < least:
            results.add(GpuRow("check", "the others", ok=False, notes="no time was left for them"))
            return
        results.attempt(GpuRow("check", case.name, f"{hidden}x{inner}"), lambda row, case=case: _compare(row, case))


def _compare(row: GpuRow, case: Check) -> None:
    with torch.no_grad():
        result, again, expected = case.run(), case.run(), case.expected()
    row.error = difference(result, expected)
    row.limit = 2e-5 + case.roundings * torch.finfo(case.dtype).eps
    row.ok = row.error <= row.limit and torch.equal(result, again)
    if not torch.equal(result, again):
        row.notes = "two runs differ"


def _checks(device: torch.device, hidden: int, inner: int) -> Iterator[Check]:
    torch.manual_seed(0)
    half = torch.bfloat16
    yield from _check_groups(device, hidden, inner)
    yield from _check_mlp(device, hidden, inner, half)
    yield from _check_choices(device, hidden, inner)
    yield from _check_rows(device, hidden, half)
    yield from _check_attention(device, hidden, half)
    yield from _check_experts(device, hidden, inner, half)


def _check_groups(device: torch.device, hidden: int, inner: int) -> Iterator[Check]:
    weight = torch.randn(inner + 3, hidden, device=device).div(hidden**0.5)
    listed = torch.randperm(inner, device=device)[: inner // 2].sort().values
    for fmt in ("int4", "int8_groups"):
        matrix = GroupedMatrix.round(weight, torch.randn(inner + 3, device=device), fmt)
        for rows in (1, 2, 3, 4, 8, 16, 31):
            x = step.quantize(torch.randn(rows, hidden, device=device))
            yield _of_linear(f"{fmt} product", x, matrix)
        yield _of_linear(f"{fmt} product, many", x, matrix, form="many")
        one = Quantized(x.integers[:1], x.step[:1], x.total[:1], hidden)
        yield _of_linear(f"{fmt} product, listed", one, matrix, rows=listed)
        yield Check(
            f"{fmt} product, many: a row alone",
            lambda one=one, m=matrix: step.linear(one, m, form="many"),
            lambda x=x, m=matrix: step.linear(x, m, form="many")[:1],
        )


def _of_linear(name: str, x: Quantized, matrix: GroupedMatrix, **options: Any) -> Check:
    taken = matrix.take(options["rows"]) if "rows" in options else matrix
    return Check(
        f"{name}, {x.rows} rows",
        lambda: step.linears(x, [matrix], **options),
        lambda: reference.linear(x, taken),
    )


def _check_mlp(device: torch.device, hidden: int, inner: int, dtype: torch.dtype) -> Iterator[Check]:
    packed = bundles(hidden, inner, dtype, device)
    x = torch.randn(2, hidden, device=device)
    listed = kept_list(inner, KEEP, device)
    ways: dict[str, dict[str, Any]] = {
        "all": {"form": "one"},
        "listed": {"indices": listed},
        "a list each": {"indices": torch.stack([listed, listed.flip(0)])},
        "gates": {"rule": "gate", "threshold": 0.2},
        "activations": {"rule": "activation", "threshold": 0.1},
    }
    for name, options in ways.items():
        given = {key: options[key] for key in options if key != "form"}
        yield Check(
            f"mlp {name}",
            lambda o=options: step.mlp(x, packed, dtype=torch.float32, **o),
            lambda g=given: reference.mlp(
                x.double(), packed, g.get("indices"), g.get("rule", "listed"), g.get("threshold", 0.0)
            ),
        )
    yield Check(
        "mlp all, torch's products",
        lambda: step.mlp(x.to(dtype), packed, form="many"),
        lambda: reference.mlp(x.to(dtype).double(), packed, None, "listed", 0.0),
        dtype,
        3,
    )
    columns = PackedColumns.pack(packed.weight[:, 1, :hidden])
    for by_norm in (False, True):
        yield Check(
            f"columns, by norm {by_norm}",
            lambda b=by_norm: step.columns(x, [columns] * 3, [0.5, 0.2, 0.1], by_norm=b),
            lambda b=by_norm: torch.cat([reference.columns(x.double(), columns, t, b) for t in (0.5, 0.2, 0.1)], 1),
        )
    gated = ACTS["silu"](reference.columns(x.double(), columns, 0.5, False))
    yield Check(
        "columns, activated",
        lambda: step.columns(x, [columns] * 2, [0.5, 0.2], act="silu"),
        lambda: gated * reference.columns(x.double(), columns, 0.2, False),
    )
    for count in (1, 2, 3):
        matrices = [step.pack(packed.weight[:, part, :hidden]) for part in range(count)]
        yield Check(
            f"{count} float products at once",
            lambda m=matrices: step.linears(x[:1].to(dtype), m, dtype=torch.float32),
            lambda m=matrices: torch.cat([reference.linear(x[:1].to(dtype).double(), one) for one in m], 1),
        )
    pair = [step.pack(packed.weight[:, part, :hidden]) for part in range(2)]
    one = x[:1].to(dtype)
    yield Check(
        "float products, activated",
        lambda: step.activated(one, pair, "silu", dtype=torch.float32),
        lambda: reference.act_mul(torch.cat([reference.linear(one.double(), m) for m in pair], 1), "silu", True),
    )


def _check_choices(device: torch.device, hidden: int, inner: int) -> Iterator[Check]:
    score, norm = torch.randn(3, inner, device=device), torch.rand(inner, device=device)
    score[1] = score[1].round()  # many are equal
    for keep, threshold in ((int(inner * KEEP), 0.0), (None, 0.7)):
        yield Check(
            f"picked by {'a count' if keep else 'a threshold'}",
            lambda k=keep, t=threshold: step.pick(score, keep=k, threshold=t, kind="size", norm=norm),
            lambda k=keep, t=threshold: reference.pick(score, -1 if k is None else k, t, "size", norm),
        )
    x, packed = torch.randn(2, hidden, device=device), sliced(hidden, inner, device)
    rounded = step.by_row(x)
    least = float(reference.sketch_scores(ByRow.of(x), packed).median())
    yield Check(
        "sketch, scores",
        lambda: step.sketch_scores(rounded, packed),
        lambda: reference.sketch_scores(ByRow.of(x), packed),
    )
    listed = kept_list(inner, KEEP, device)
    for name, options in (("by threshold", {"threshold": least}), ("listed", {"indices": listed})):
        given: dict[str, Any] = {"indices": None, "threshold": None, "refine": 0.0, **options}
        yield Check(
            f"sketch, {name}",
            lambda o=options: step.sketch_mlp(rounded, packed, **o),
            lambda g=given: reference.sketch_mlp(ByRow.of(x), packed, **g),
        )
    signs = PackedLinear.pack(torch.randn(inner, hidden, device=device).sign(), fmt="int8")
    yield Check("signs", lambda: step.sign_sums(x, signs), lambda: reference.sign_sums(x, signs))


def _check_rows(device: torch.device, hidden: int, dtype: torch.dtype) -> Iterator[Check]:
    x, delta = torch.randn(2, hidden, device=device), torch.randn(2, hidden, device=device)
    weight, bias = torch.rand(hidden, device=device) + 0.5, torch.randn(hidden, device=device)
    for kind in ("rms", "layer"):
        norm = Norm(weight, bias if kind == "layer" else None, 1e-6, kind)
        stream = x.double() + reference.normed(delta.double(), norm)
        yield Check(
            f"{kind} norm of a sum",
            lambda n=norm: step.add_norm(x, n, delta, out=n).y,
            lambda n=norm, s=stream: reference.normed(s, n),
        )
        yield Check(
            f"{kind} norm rounded to 8 bits",
            lambda n=norm: cast(Quantized, step.add_norm(x, n, quantize=True).y).floats(),
            lambda n=norm: reference.normed(x.double(), n),
            roundings=1 << 16,  # half a step of 127
        )
    wide = torch.randn(2, 2 * hidden, device=device)
    for act in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
        yield Check(
            f"{act}, times up",
            lambda a=act: step.act_mul(wide, a, dtype=dtype),
            lambda a=act: reference.act_mul(wide.double(), a, True),
            dtype,
        )
    yield Check("rounded to 8 bits", lambda: _parts(step.quantize(wide)), lambda: _parts(Quantized.of(wide)))


def _parts(x: Quantized) -> Tensor:
    return torch.cat([x.integers.float() * 1e-2, x.step, x.total], 1)


def _check_attention(device: torch.device, hidden: int, dtype: torch.dtype) -> Iterator[Check]:
    for heads, kv_heads, size in ((hidden // 64, max(1, hidden // 256), 64), (4, 2, 128), (2, 2, 80), (2, 1, 256)):
        qkv = torch.randn(4, (heads + 2 * kv_heads) * size, device=device)
        places = (0, heads, 0), (heads * size, kv_heads, 0), ((heads + kv_heads) * size, kv_heads, 0)
        angles = torch.rand(64, size // 2, device=device) * 6
        tables = tuple(torch.cat([t, t], 1) for t in (angles.cos(), angles.sin()))
        at = torch.tensor([3, 4, 700, 701], device=device)
        norm = Norm(torch.rand(size, device=device) + 0.5, None, 1e-6, "rms")
        made = [torch.randn(2, kv_heads, 1024, size, device=device).to(dtype) for _ in range(2)]

        def rotate(wide: Callable[..., Any], of: Any = (qkv, places, tables, at, norm, made, heads)) -> Tensor:
            qkv, places, tables, at, norm, (keys, values), heads = of
            keys, values = keys.clone(), values.clone()
            q = wide(qkv, keys, values, at, heads=heads, places=places, rotation=tables, positions=at % 64,
                     q_norm=norm, k_norm=norm)  # fmt: skip
            return torch.cat([t.flatten().float() for t in (q, keys, values)])

        shape = f"{heads} heads of {size}"
        yield Check(f"rotation, {shape}", lambda r=rotate: r(step.rotary_write), lambda r=rotate: _defined(r), dtype, 2)
        q = torch.randn(4, heads, size, device=device).to(dtype)
        seen = torch.rand(2, 1024, device=device) > 0.2
        options: dict[str, Any] = {"scale": size**-0.5, "seen": seen, "window": 600, "softcap": 30.0}
        yield Check(
            f"attention, {shape}",
            lambda q=q, m=made, a=at, o=options: step.attention(q, m[0], m[1], a, dtype=torch.float32, **o),
            lambda q=q, m=made, a=at, s=size, seen=seen: reference.attention(
                q.double(), m[0].double(), m[1].double(), a, seen, s**-0.5, 600, 30.0, None, None
            ),
            dtype,
            2,
        )


def _check_experts(device: torch.device, hidden: int, inner: int, dtype: torch.dtype) -> Iterator[Check]:
    logits = torch.randn(3, 128, device=device) * 2
    kept = (torch.arange(128, device=device) % 3 != 1).to(torch.uint8)
    ways: dict[str, dict[str, Any]] = {
        "softmax": {"normalized": True},
        "groups, some experts": {"groups": 8, "groups_kept": 3, "by_pairs": True, "kept": kept, "least": 0.3},
        "sigmoid, corrected": {"scoring": "sigmoid", "correction": torch.randn(128, device=device)},
        "softmax of chosen": {"scoring": "softmax_of_chosen"},
    }
    for name, options in ways.items():
        router = Router(PackedLinear.pack(torch.randn(128, 8, device=device)), 6, **options)
        yield Check(
            f"router, {name}",
            lambda r=router: _as_row(*step.route(logits, r)),
            lambda r=router: _as_row(*r.weigh(logits.double())),
        )
    x, inner = torch.randn(2, hidden, device=device), inner // 4
    for name, transposed in (("by rows", False), ("by columns, biased", True)):
        matrices = experts_of(8, hidden, inner, dtype, device, transposed)
        weights = torch.rand(2, 3, device=device)
        chosen = torch.tensor([[1, 6, -1], [6, 0, 3]], dtype=torch.int32, device=device)
        yield Check(
            f"experts {name}",
            lambda m=matrices, c=chosen, w=weights: step.experts(x, m, c, w, more=x, gate=w[:, :1]),
            lambda m=matrices, c=chosen, w=weights: reference.experts(x.double(), m, c, w) + x * w[:, :1].sigmoid(),
        )


def _as_row(weights: Tensor, experts: Tensor) -> Tensor:
    return torch.cat([weights, experts.to(weights.dtype) * 0.01], 1)


def _defined(rotate: Callable[[Any], Tensor]) -> Tensor:
    """By the definition, which runs wherever no kernels are asked for."""
    with step.definitions():
        return rotate(step.rotary_write)


# ---- what is timed ----


def bundles(hidden: int, inner: int, dtype: torch.dtype, device: torch.device) -> PackedMLP:
    """Random weights, made where they are used."""
    weight = torch.randn(inner, 3, hidden, device=device, dtype=dtype).mul_(hidden**-0.5)
    return PackedMLP(weight, hidden, True, "silu")


def sliced(hidden: int, inner: int, device: torch.device) -> PackedMLP:
    """Random weights in 8 bits, as a sketch reads them."""
    stride = -(-hidden // 128) * 128
    weight, low = (
        torch.randint(0, 256, (inner, *shape), dtype=torch.uint8, device=device)
        for shape in ((2, stride // 2), (2 * stride,))
    )
    scale = torch.rand(inner, 3, device=device).mul_(0.02 * hidden**-0.5)
    return PackedMLP(
        weight, hidden, True, "silu", low=low, scale=scale, norm=torch.rand(inner, device=device) + 0.5
    )  # fmt: skip


def experts_of(
    count: int, hidden: int, inner: int, dtype: torch.dtype, device: torch.device, transposed: bool = False
) -> ExpertMatrices:
    """Random weights: gates before ups; transposed: by columns, gates and ups in turn, with biases (gpt-oss)."""
    first, second = (2 * inner, hidden), (hidden, inner)
    if transposed:
        first, second = first[::-1], second[::-1]
    both, down = (
        torch.randn(count, *shape, device=device, dtype=dtype).mul_(hidden**-0.5) for shape in (first, second)
    )
    if not transposed:
        return ExpertMatrices(both[:, :inner], both[:, inner:], down, None, None, None, "silu")
    both, bias = both.transpose(1, 2), torch.randn(count, 2 * inner, device=device, dtype=dtype)
    return ExpertMatrices(
        both[:, ::2], both[:, 1::2], down.transpose(1, 2), bias[:, ::2], bias[:, 1::2], None, "silu", 7.0, 1.702, 1.0
    )  # fmt: skip


def kept_list(inner: int, keep: float, device: torch.device) -> Tensor:
    return torch.randperm(inner, device=device)[: int(inner * keep)].sort().values


def time_mlp(results: Results, device: torch.device, hidden: int, inner: int, dtype: torch.dtype) -> None:
    """One gated MLP at batch 1 in floats: cuBLAS, the one-pass kernel in its ways, and products of rows."""
    shape, fmt = f"{hidden}x{inner}", str(dtype).removeprefix("torch.")
    one = 3 * hidden * inner * dtype.itemsize
    layers = [bundles(hidden, inner, dtype, device) for _ in range(layers_for(one, device))]
    x = torch.randn(1, hidden, device=device).to(dtype)
    gates = F.silu(F.linear(x, layers[0].weight[:, 0])).abs().float().flatten()
    threshold = float(gates.kthvalue(max(1, int(inner * (1 - KEEP)))).values)
    base = GpuRow("kernel", "mlp, cuBLAS", shape, fmt)
    plain = [tuple(p.weight[:, part].contiguous() for part in range(3)) for p in layers]

    def cublas(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return torch.matmul(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    results.attempt(
        base,
        lambda row: results.speed(row, seconds_of([lambda w=w: cublas(*w) for w in plain], device), one),
    )
    lists = [kept_list(inner, KEEP, device) for _ in layers]
    cases: list[Case] = [
        ("mlp, one pass", 1.0, one, [lambda p=p: step.mlp(x, p, form="one") for p in layers]),
        (
            "mlp, one pass, listed", KEEP, int(one * KEEP),
            [lambda p=p, i=i: step.mlp(x, p, indices=i) for p, i in zip(layers, lists, strict=True)],
        ),
        (
            "mlp, one pass, by gates", KEEP, int(one * (1 + 2 * KEEP) / 3),
            [lambda p=p: step.mlp(x, p, rule="gate", threshold=threshold) for p in layers],
        ),
        ("mlp, three products", 1.0, one, [lambda w=w: _products(x, w) for w in _matrices(plain)]),
        *_by_inputs(x, plain, one),
        *_by_sketch(x, hidden, inner, len(layers)),
    ]  # fmt: skip
    for name, keep, nbytes, calls in cases:
        row = GpuRow("kernel", name, shape, fmt, keep=keep, notes="against cuBLAS dense")
        results.attempt(row, lambda row, calls=calls, nbytes=nbytes: _timed(results, row, calls, device, nbytes, base))


Case = tuple[str, float, int, list[Callable[..., Any]]]


def _by_inputs(x: Tensor, plain: list[Any], one: int) -> Iterator[Case]:
    """Two launches: of every linear half of the inputs."""
    counters = torch.zeros(step.COUNTERS, dtype=torch.int32, device=x.device)
    layers = [
        (PackedColumns.pack(gate), PackedColumns.pack(up), PackedColumns.pack(down.t())) for gate, up, down in plain
    ]
    gate, up, _ = layers[0]
    half = float(x.float().abs().median())
    h = step.columns(x, [gate, up], [half, half], act="silu", counters=counters)
    least = float(h.float().abs().median())

    def run(gate: PackedColumns, up: PackedColumns, down: PackedColumns) -> Tensor:
        h = step.columns(x, [gate, up], [half, half], act="silu", counters=counters)
        return step.columns(h, [down], [least], counters=counters)

    yield "mlp, by inputs", KEEP, one // 2, [lambda w=w: run(*w) for w in layers]


def _by_sketch(x: Tensor, hidden: int, inner: int, count: int) -> Iterator[Case]:
    """In 8 bits; the upper nibbles of gate and up of all neurons, and of half of them the others."""
    layers = [sliced(hidden, inner, x.device) for _ in range(count)]
    rounded = step.by_row(x)
    least = float(step.sketch_scores(rounded, layers[0]).median())
    nbytes = int(hidden * inner * (1 + 2 * KEEP))
    calls = [lambda p=p: step.sketch_mlp(rounded, p, threshold=least) for p in layers]
    yield "mlp, one pass, by sketch", KEEP, nbytes, calls
    score = step.sketch_scores(rounded, layers[0])
    yield "neurons by a count", KEEP, 0, [lambda: step.pick(score, keep=int(inner * KEEP))] * count


def _matrices(plain: list[Any]) -> list[Any]:
    return [(step.pack(gate), step.pack(up), step.pack(down.t().contiguous())) for gate, up, down in plain]


def _products(x: Tensor, w: Any) -> Tensor:
    return step.linear(step.activated(x, w[:2], "silu"), w[2], dtype=torch.float32)


def time_groups(results: Results, device: torch.device, outs: int, inputs: int, rows: tuple[int, ...]) -> None:
    """Products with a matrix in 4 and 8 bits, of several rows, against cuBLAS in bfloat16."""
    shape, dtype = f"{outs}x{inputs}", torch.bfloat16
    floats = [
        torch.randn(outs, inputs, device=device, dtype=dtype) for _ in range(layers_for(outs * inputs // 2, device))
    ]
    first: dict[int, GpuRow] = {}
    for fmt in ("int4", "int8_groups"):
        matrices = [GroupedMatrix.round(w, None, fmt) for w in floats]
        for count in rows if fmt == "int4" else rows[:1]:
            x = torch.randn(count, inputs, device=device).to(dtype)
            if count not in first:
                first[count] = GpuRow("kernel", "product, cuBLAS", shape, "bfloat16", rows=count)
                results.attempt(
                    first[count],
                    lambda row, x=x: results.speed(
                        row, seconds_of([lambda w=w: F.linear(x, w) for w in floats], device), outs * inputs * 2
                    ),
                )
            given = step.quantize(x)
            row = GpuRow("kernel", "product", shape, fmt, rows=count, notes="against cuBLAS bfloat16")
            results.attempt(
                row,
                lambda row, given=given, m=matrices, base=first[count]: _timed(
                    results, row, [lambda w=w: step.linear(given, w) for w in m], device, m[0].nbytes, base
                ),
            )


def _timed(
    results: Results, row: GpuRow, calls: list[Callable[..., Any]], device: torch.device, nbytes: int, base: GpuRow
) -> None:
    results.speed(row, seconds_of(calls, device), nbytes)
    if row.us and base.us:
        row.against = round(base.us["p50"] / row.us["p50"], 3)


def time_experts(
    results: Results, device: torch.device, count: int, chosen: int, hidden: int, inner: int, dtype: torch.dtype
) -> None:
    """The experts of one token, others at every call, and their choice."""
    shape, mixture = f"{chosen} of {count} {hidden}x{inner}", experts_of(count, hidden, inner, dtype, device)
    x, weights = torch.randn(1, hidden, device=device).to(dtype), torch.rand(1, chosen, device=device)
    picked = [torch.randperm(count, device=device)[None, :chosen].int() for _ in range(32)]
    row = GpuRow("kernel", "experts of a token", shape, str(dtype).removeprefix("torch."))
    nbytes = 3 * chosen * hidden * inner * dtype.itemsize
    calls = [lambda p=p: step.experts(x, mixture, p, weights) for p in picked]
    results.attempt(row, lambda row: results.speed(row, seconds_of(calls, device), nbytes))
    router = Router(PackedLinear.pack(torch.randn(count, hidden, device=device)), chosen, normalized=True)
    logits = torch.randn(1, count, device=device)
    results.attempt(
        GpuRow("small", "choice of experts", shape),
        lambda row: results.speed(row, seconds_of([lambda: step.route(logits, router)] * 32, device), 0),
    )


def time_small(results: Results, device: torch.device, hidden: int, inner: int, context: int) -> None:
    """Each small launch of a layer, 32 in a row."""
    x, wide = torch.randn(1, hidden, device=device), torch.randn(1, 2 * inner, device=device)
    norm = Norm(torch.ones(hidden, device=device), None, 1e-6, "rms")
    size = min(128, hidden // 4)
    heads = hidden // size
    keys, values = (
        torch.randn(1, heads, context, size, device=device, dtype=torch.bfloat16) for _ in range(2)
    )  # fmt: skip
    qkv = torch.randn(1, 3 * hidden, device=device)
    places = (0, heads, 0), (hidden, heads, 0), (2 * hidden, heads, 0)
    table = torch.ones(context, size, device=device)
    at, early = torch.tensor([context - 1], device=device), torch.tensor([min(127, context - 1)], device=device)
    counters = torch.zeros(step.COUNTERS, dtype=torch.int32, device=device)
    q = step.rotary_write(qkv, keys, values, at, heads=heads, places=places, rotation=(table, table))
    cases: dict[str, tuple[Callable[..., Any], int]] = {
        "norm of a sum, rounded": (lambda: step.add_norm(x, norm, x, quantize=True), 0),
        "norm of a sum": (lambda: step.add_norm(x, norm, x, dtype=torch.bfloat16), 0),
        "silu times up, rounded": (lambda: step.act_mul(wide, "silu", quantize=True), 0),
        "rotation and KV write": (
            lambda: step.rotary_write(qkv, keys, values, at, heads=heads, places=places, rotation=(table, table)), 0,
        ),
        f"attention over {context}": (
            lambda: step.attention(q, keys, values, at, scale=0.1, quantize=True, counters=counters), 2 * keys.nbytes,
        ),
        "attention over 128": (
            lambda: step.attention(q, keys, values, early, scale=0.1, quantize=True, counters=counters), 0,
        ),
    }  # fmt: skip
    for name, (call, nbytes) in cases.items():
        row = GpuRow("small", name, f"{hidden}x{inner}")
        results.attempt(
            row,
            lambda row, call=call, nbytes=nbytes: results.speed(
                row, seconds_of([call] * (32 if device.type == "cuda" else 1), device), nbytes
            ),
        )
