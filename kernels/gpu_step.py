"""The operations of a GPU's decode step: what `runtime`'s lowering of a whole step is made of.

On CUDA tensors (from Ampere on), and under TRITON_INTERPRET=1 on CPU tensors, they are Triton kernels; elsewhere the
definitions in gpu_reference.py. None reads anything back to the host, all grids depend on shapes alone, nothing depends
on the order in which programs run: a sequence of them can be captured in a CUDA graph, and gives the same bits every
time.

R rows are `tokens` consecutive tokens of each of B sequences, R = B * tokens, a sequence's tokens one after the other.
Results are new tensors. The residual stream is best kept in float32: a row is read by few, and never by a matrix.

form: "one" is the fastest way for a row or a few, "many" the one whose bits for a row depend on that row's inputs
alone, however many others there are, up to `MAX_ROWS` (a verification pass must choose the tokens that single steps
would have); None: by the number of rows. What has no `form` goes row by row in any case.

counters: int32 zeros by which a launch of many programs knows which of them is the last, and adds up what all of them
have found, always in the same order; they are zeros again afterwards. At most `COUNTERS` a row are asked for. Nobody
else may use them meanwhile. None: they are made for the call, by a launch more.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from . import gpu_reference as reference
from .experts import Router
from .gpu_formats import ByRow, ExpertMatrices, FloatMatrix, GroupedMatrix, Inputs, Matrix, Quantized, pack
from .gpu_launch import INTERPRETED, count, launches
from .packed import ACTS, PackedColumns, PackedLinear, PackedMLP
from .step_model import Heads, Norm

__all__ = [
    "ExpertMatrices",
    "FloatMatrix",
    "GroupedMatrix",
    "Inputs",
    "Matrix",
    "Normed",
    "Quantized",
    "act_mul",
    "activated",
    "add_norm",
    "attention",
    "by_row",
    "columns",
    "definitions",
    "embed",
    "experts",
    "launches",
    "linear",
    "linears",
    "mlp",
    "pack",
    "pick",
    "quantize",
    "rotary_write",
    "route",
    "sign_sums",
    "sketch_mlp",
    "sketch_scores",
]

Form = Literal["one", "many"]

COUNTERS = 1024
MAX_ROWS = 32  # of steps; beyond them grouped matrices are unpacked, and multiplied by torch


class Normed(NamedTuple):
    """stream: the residual stream [R, hidden], as `add_norm` left it; y, second: what linears read, or, where that was
    asked for, a `ByRow`."""

    stream: Tensor
    y: Inputs
    second: Inputs | None


def add_norm(
    stream: Tensor,
    norm: Norm | None,
    *deltas: Tensor,
    out: Norm | None = None,
    after: Norm | None = None,
    second: Norm | None = None,
    scale: float = 1.0,
    quantize: bool | Literal["row"] = False,
    smooth: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Normed:
    """stream = after(stream + scale * out(deltas[0]) + scale * deltas[1]), y = norm(stream): one launch.

    stream: [R, hidden] of any float dtype, which the new stream has, too. deltas: none, one or two of [R, hidden];
    `out` is for the first. norm None: y is the stream itself. second: a further norm of the new stream.
    quantize: y and second are `Quantized`, or `ByRow` for "row"; else they have `dtype`, by default that of the stream.
    smooth: float32 [hidden], what y is multiplied by before it is rounded.
    """
    kernel = _kernels("gpu_norm", stream)
    if kernel is not None:
        return Normed(*kernel.add_norm(stream, norm, deltas, out, after, second, scale, quantize, smooth, dtype))
    x = reference.add_norm(stream, deltas, out, after, scale)
    n = reference.normed(x, norm)
    y = _made(n if smooth is None else n * smooth, quantize, dtype or stream.dtype)
    more = None if second is None else _made(reference.normed(x, second), quantize, dtype or stream.dtype)
    return Normed(x.to(stream.dtype), y, more)


def quantize(x: Tensor) -> Quantized:
    """x [R, n] of floats rounded to 8 bits in groups of 32: one launch."""
    kernel = _kernels("gpu_norm", x)
    return Quantized.of(x) if kernel is None else kernel.quantize(x)


def act_mul(
    x: Tensor,
    act: str,
    *,
    gated: bool = True,
    inverse: Tensor | None = None,
    quantize: bool = False,
    dtype: torch.dtype | None = None,
) -> Inputs:
    """[R, I]: act(gate) * up of x [R, 2 I], gates before ups; act(x) of x [R, I] where not gated. One launch.

    act: a name of `packed.ACTS`. inverse: int64 [I], of x [R, 2 k], where among its k neurons each of I stands; less
    than 0: nowhere, and 0 comes out. quantize, dtype: as for `add_norm`, by default the dtype of x.
    """
    kernel = _kernels("gpu_norm", x)
    if kernel is not None:
        return kernel.act_mul(x, act, gated, inverse, quantize, dtype)  # type: ignore[no-any-return]
    h = reference.act_mul(x, act, gated)
    if inverse is not None:
        h = torch.where(inverse >= 0, h[:, inverse.clamp_min(0)], 0)
    return _made(h, quantize, dtype or x.dtype)


def linear(x: Inputs, matrix: Matrix, *, dtype: torch.dtype | None = None, form: Form | None = None) -> Tensor:
    """x @ weight.t() + bias, [R, out] in `dtype`: one launch.

    x: [R, in]. With a `GroupedMatrix` it is a `Quantized` (a Tensor is quantised first: one more launch); beyond
    `MAX_ROWS` rows the matrix is unpacked for the call, and x stays as it is (prefill). With a `FloatMatrix` x is
    rounded to its dtype; torch's own product where `gpu_floats` has no better one. dtype: by default that of a Tensor
    x, and float32 for a `Quantized`.
    """
    return linears(x, [matrix], dtype=dtype, form=form)


def linears(
    x: Inputs,
    matrices: Sequence[Matrix],
    *,
    rows: Tensor | None = None,
    dtype: torch.dtype | None = None,
    form: Form | None = None,
) -> Tensor:
    """What several matrices make of the same x, side by side, [R, sum of outs]. See `linear`.

    A launch each; up to three of floats for one row of x are one. rows: int64 [k], the outputs that each matrix is
    asked for, in that order (unchecked: nothing is read back), [R, k for each]; of others nothing is read.
    """
    given = x if isinstance(x, Tensor) else x.step
    dtype = dtype or (x.dtype if isinstance(x, Tensor) else torch.float32)
    if isinstance(x, Tensor) and given.shape[0] <= MAX_ROWS and all(isinstance(m, GroupedMatrix) for m in matrices):
        x = quantize(x)
    outs = [m.out_features if rows is None else rows.numel() for m in matrices]
    out = given.new_empty((given.shape[0], sum(outs)), dtype=dtype)
    floats = [m for m in matrices if isinstance(m, FloatMatrix)]
    kernel = _kernels("gpu_floats", out)
    if len(floats) == len(matrices) and kernel is not None and kernel.linears(_floats(x), floats, out, rows, form):
        return out
    for matrix, part in zip(matrices, out.split(outs, 1), strict=True):
        _linear(x, matrix, part, rows, form)
    return out


def activated(
    x: Inputs,
    matrices: Sequence[Matrix],
    act: str,
    *,
    gated: bool = True,
    quantize: bool = False,
    dtype: torch.dtype | None = None,
    form: Form | None = None,
) -> Inputs:
    """`act_mul` of what matrices make of x: [R, I]. One launch for one row and matrices of floats, else one more.

    matrices: that of gates and that of ups, or one that has gates before ups; of a plain MLP that of ups. dtype: as for
    `linear`. The others: as for `act_mul` and `linear`.
    """
    dtype = dtype or (x.dtype if isinstance(x, Tensor) else torch.float32)
    floats = [m for m in matrices if isinstance(m, FloatMatrix)]
    if len(floats) == len(matrices) and not quantize:
        given = _floats(x)
        neurons = sum(m.out_features for m in floats) // (2 if gated else 1)
        out = given.new_empty((given.shape[0], neurons), dtype=dtype)
        kernel = _kernels("gpu_floats", out)
        if kernel is not None and kernel.linears(given, floats, out, None, form, act, gated):
            return out
    wide = linears(x, matrices, dtype=torch.float32, form=form)
    return act_mul(wide, act, gated=gated, quantize=quantize, dtype=dtype)


def _linear(x: Inputs, matrix: Matrix, out: Tensor, rows: Tensor | None, form: Form | None) -> None:
    kernel = _kernels("gpu_groups", out)
    if isinstance(matrix, FloatMatrix):
        _by_torch(_floats(x), matrix if rows is None else matrix.take(rows), out, form)
    elif out.shape[0] > MAX_ROWS:
        found = matrix if rows is None else matrix.take(rows)
        floats = _floats(x)
        _by_torch(floats, FloatMatrix(found.floats(floats.dtype), found.bias), out, None)
    elif kernel is None:
        out.copy_(reference.linear(x, matrix if rows is None else matrix.take(rows)))
    else:
        kernel.linear(quantize(x) if isinstance(x, Tensor) else x, matrix, out, rows, form)


def _floats(x: Inputs) -> Tensor:
    return x.floats() if isinstance(x, Quantized) else x


def _by_torch(x: Tensor, matrix: FloatMatrix, out: Tensor, form: Form | None) -> None:
    """torch's product. Which of its kernels runs depends on the number of rows, so in the form "many" it is always the
    same."""
    rows, weight = x.shape[0], matrix.weight
    x = x.to(weight.dtype)
    if form == "many" and rows < MAX_ROWS:
        x = F.pad(x, (0, 0, 0, MAX_ROWS - rows))
    count("gemv", weight.nbytes)
    out.copy_(F.linear(x, weight, None if matrix.bias is None else matrix.bias.to(weight.dtype))[:rows])


def rotary_write(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    *,
    heads: int,
    places: tuple[Heads, Heads, Heads],
    rotation: tuple[Tensor, Tensor] | None = None,
    positions: Tensor | None = None,
    paired: bool = False,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    turned: bool = False,
) -> Tensor:
    """Turns and norms q and k, writes k and v to the cache, and returns q [R, heads, head_dim] in the cache's dtype.

    One launch. qkv: [R, width], in which the heads of q, k and v lie at `places` (see `step_model.Heads`). heads: of q;
    0: keys and values are written, and no q comes back.
    keys, values: [B, kv_heads, capacity, head_dim], of which index `at` int64 [R] is written, of each row's sequence;
    an index outside of them writes nothing. rotation: (cos, sin), float32 [positions, turned dimensions], read at
    `positions` int64 [R]; paired, turned, q_norm, k_norm: see `step_model.Attention`; norms that are as long as all
    heads together norm them at once.
    """
    size, kv_heads = keys.shape[3], keys.shape[1]
    if positions is None:
        positions = at
    kernel = _kernels("gpu_attention", qkv)
    if kernel is not None:
        return kernel.rotary_write(  # type: ignore[no-any-return]
            qkv, keys, values, at, heads, places, rotation, positions, paired, q_norm, k_norm, turned
        )
    wide = qkv.float()
    q, k, v = (
        reference.heads_of(wide, place, count, size)
        for place, count in zip(places, (heads, kv_heads, kv_heads), strict=True)
    )
    both = []
    for x, norm in ((q, q_norm), (k, k_norm)):
        x = x if turned else reference.head_norm(x, norm)
        x = reference.rotated(x, rotation, positions, paired)
        both.append(reference.head_norm(x, norm) if turned else x)
    q, k = both
    sequence = torch.arange(qkv.shape[0], device=qkv.device) // (qkv.shape[0] // keys.shape[0])
    inside = (at >= 0) & (at < keys.shape[2])
    where = at.clamp(0, keys.shape[2] - 1)
    for cache_, new in ((keys, k), (values, v)):
        old = cache_[sequence, :, where]
        cache_[sequence, :, where] = torch.where(inside[:, None, None], new.to(cache_.dtype), old)
    return q.to(keys.dtype)


def attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    *,
    scale: float,
    seen: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    quantize: bool = False,
    dtype: torch.dtype | None = None,
    counters: Tensor | None = None,
) -> Inputs:
    """[R, heads * head_dim]: each row's attention over the indices 0..at of its sequence that it sees. One launch.

    q: [R, heads, head_dim] as `rotary_write` returns it; keys, values: [B, kv_heads, capacity, head_dim] of one dtype;
    at: int64 [R], read on the device. seen: bool [B, capacity], what is not padding; None: everything. window: how many
    indices a row sees, itself included; 0: all. softcap: of scores; 0: none. slopes: float32 [heads], what a score
    loses for each index that it lies back; sinks: float32 [heads], see `step_model.Attention`. Rows that see nothing
    get zeros.
    quantize, dtype: as for `add_norm`, by default the dtype of q.
    """
    kernel = _kernels("gpu_attention", q)
    if kernel is not None:
        return kernel.attention(  # type: ignore[no-any-return]
            q, keys, values, at, seen, scale, window, softcap, slopes, sinks, quantize, dtype or q.dtype, counters
        )
    y = reference.attention(q, keys, values, at, seen, scale, window, softcap, slopes, sinks)
    return _made(y, quantize, dtype or q.dtype)


def mlp(
    x: Tensor,
    packed: PackedMLP,
    *,
    indices: Tensor | None = None,
    rule: Literal["listed", "gate", "activation"] = "listed",
    threshold: float = 0.0,
    dtype: torch.dtype | None = None,
    form: Form | None = None,
) -> Tensor:
    """An MLP over bundles of floats, [R, hidden] in `dtype` (default: that of x): two launches, each weight read once.

    x: [R, hidden]; packed: made with fmt None, gated or not, its act by name. indices: int64 or int32 [k], or [R, k]
    where rows differ; -1 stands for no neuron, none may come twice; None: all. It is not checked: nothing is read back.
    rule: of the neurons listed, "gate" computes those with |act(gate)| >= threshold, of whose other rows nothing is
    read (CATS); "activation" those with |act(gate) * up|, times packed.norm where there is one, >= threshold, of whose
    down rows alone nothing is read (TEAL, WINA).
    """
    if packed.scale is not None or not isinstance(packed.act, str) or packed.act not in ACTS:
        raise ValueError("the one-pass MLP is for floats, with an activation by name")
    if rule == "gate" and not packed.gated:
        raise ValueError("a plain MLP has no gates to choose by")
    kernel = _kernels("gpu_mlp", x)
    if kernel is not None:
        return kernel.mlp(x, packed, indices, rule, threshold, dtype or x.dtype, form)  # type: ignore[no-any-return]
    return reference.mlp(x, packed, indices, rule, threshold).to(dtype or x.dtype)


def columns(
    x: Tensor,
    packed: Sequence[PackedColumns],
    thresholds: Sequence[float],
    *,
    by_norm: bool = False,
    act: str | None = None,
    dtype: torch.dtype | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """What up to three linears make of x without the inputs below a threshold of each, side by side: columns of these
    inputs stay unread. [R, sum of outs] in `dtype`, one launch.

    x: [R, in]. An input counts by |x| (TEAL) or, by_norm, by |x| * |column| (WINA). act: a name of `packed.ACTS`, of
    the outputs; of two linears act(first) * second comes out, [R, out].
    """
    if not 1 <= len(packed) <= 3 or (act is not None and len(packed) == 3):
        raise ValueError("one launch takes one to three linears, and an activation one or two of them")
    kernel = _kernels("gpu_mlp", x)
    if kernel is not None:
        return kernel.columns(x, packed, thresholds, by_norm, act, dtype or x.dtype, counters)  # type: ignore[no-any-return]
    parts = [reference.columns(x, some, least, by_norm) for some, least in zip(packed, thresholds, strict=True)]
    y = torch.cat(parts, 1)
    return (y if act is None else reference.act_mul(y, act, len(packed) == 2)).to(dtype or x.dtype)


def pick(
    score: Tensor,
    *,
    keep: int | None = None,
    threshold: float = 0.0,
    kind: Literal["plain", "size"] = "plain",
    norm: Tensor | None = None,
) -> Tensor:
    """int32 [R, keep]: the neurons with the greatest of score [R, neurons], float32, ascending, of equal ones the
    first. keep None: [R, neurons], those of `threshold` up, then -1. A NaN is picked. One launch.

    kind: "plain": scores are what they are; "size": |score|. norm: float32 [neurons], what these are multiplied by.
    """
    count_ = -1 if keep is None else keep
    kernel = _kernels("gpu_choice", score)
    if kernel is not None:
        return kernel.pick(score, count_, threshold, kind, norm)  # type: ignore[no-any-return]
    return reference.pick(score, count_, threshold, kind, norm).int()


def by_row(x: Tensor | ByRow) -> ByRow:
    """x [R, hidden] of floats rounded to 8 bits by row, where it is not yet: one launch."""
    return x if isinstance(x, ByRow) else cast(ByRow, add_norm(x, None, quantize="row").y)


def sign_sums(x: Tensor, signs: PackedLinear) -> Tensor:
    """float32 [R, neurons]: of how many more weights than not the sign is that of the input they meet. One launch.

    signs: of `sparse.SignScores`. x: [R, in].
    """
    kernel = _kernels("gpu_choice", x)
    if kernel is not None:
        return kernel.sign_sums(x, signs)  # type: ignore[no-any-return]
    return reference.sign_sums(x, signs)


def sketch_scores(x: Tensor | ByRow, packed: PackedMLP) -> Tensor:
    """float32 [R, neurons]: |act(gate) * up| by the upper nibbles, times packed.norm. One launch.

    x: [R, hidden], rounded by row first (one more launch) where it is not yet. packed: in "int8_sliced".
    """
    given = by_row(x)
    kernel = _kernels("gpu_choice", given.step)
    if kernel is not None:
        return kernel.sketch_scores(given, packed)  # type: ignore[no-any-return]
    return reference.sketch_scores(given, packed)


def sketch_mlp(
    x: Tensor | ByRow,
    packed: PackedMLP,
    *,
    indices: Tensor | None = None,
    threshold: float | None = None,
    refine: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """An MLP in "int8_sliced", [R, hidden]: two launches, the second of which adds up.

    Of neurons whose score (`sketch_scores`) is below `threshold` nothing but the upper nibbles is read; refine: of the
    others, the down row is read of those whose exact score (`reference.refined`) is at least that. indices, x: as for
    `mlp` and `sketch_scores`.
    """
    given = by_row(x)
    kernel = _kernels("gpu_choice", given.step)
    if kernel is not None:
        return kernel.sketch(given, packed, indices, threshold, refine, dtype)  # type: ignore[no-any-return]
    return reference.sketch_mlp(given, packed, indices, threshold, refine).to(dtype)


def route(logits: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """What `Router.weigh` makes of logits [R, experts], float32: weights, float32 [R, chosen], and experts, int32 [R,
    chosen], -1 for those that are left out, whose weight is 0. One launch."""
    kernel = _kernels("gpu_experts", logits)
    if kernel is not None:
        return kernel.route(logits, router)  # type: ignore[no-any-return]
    weights, chosen = router.weigh(logits)
    return weights, chosen.int()


def experts(
    x: Tensor,
    matrices: ExpertMatrices,
    chosen: Tensor,
    weights: Tensor,
    *,
    more: Tensor | None = None,
    gate: Tensor | None = None,
    more_scale: float = 1.0,
) -> Tensor:
    """float32 [R, hidden]: the weighted sum of what each row's experts make of x [R, hidden], and more_scale * more, or
    more_scale * sigmoid(gate) * more, of more [R, hidden] and gate [R, 1]. Two launches.

    chosen, weights: of `route`, unchecked: nothing is read back. Of experts that no row chose nothing is read.
    """
    kernel = _kernels("gpu_experts", x)
    if kernel is not None:
        of_inputs, of_outputs = (weights, None) if matrices.by_inputs else (None, weights)
        h = kernel.widened(x, matrices, chosen, of_inputs)
        return kernel.summed(h, matrices, chosen, of_outputs, more, gate, more_scale)  # type: ignore[no-any-return]
    y = reference.experts(x, matrices, chosen, weights)
    if more is not None:
        y = y + more_scale * (more if gate is None else more * gate.sigmoid())
    return y.float()


def embed(ids: Tensor, table: Tensor | GroupedMatrix, *, scale: float = 1.0, dtype: torch.dtype) -> Tensor:
    """The rows `ids` int64 [R] of a table [vocabulary, hidden], times scale, in `dtype`."""
    return reference.embed(ids, table, scale).to(dtype)


def _made(x: Tensor, quantize: bool | str, dtype: torch.dtype) -> Inputs:
    if quantize == "row":
        return cast(Any, ByRow.of(x))  # type: ignore[no-any-return]
    return Quantized.of(x) if quantize else x.to(dtype)


_chosen = threading.local()


@contextmanager
def definitions() -> Iterator[None]:
    """The calling thread gets the definitions meanwhile, wherever its tensors are."""
    before = getattr(_chosen, "definitions", False)
    _chosen.definitions = True
    try:
        yield
    finally:
        _chosen.definitions = before


def _kernels(name: str, x: Tensor) -> Any:
    """The module of Triton kernels, imported at its first use; None where the definitions run."""
    if getattr(_chosen, "definitions", False):
        return None
    return _module(name) if INTERPRETED or (x.is_cuda and _capable(x.device)) else None


@cache
def _capable(device: torch.device) -> bool:
    """Whether the kernels compile for a card: from Ampere on."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _module(name: str) -> Any:
    return import_module(f".{name}", __package__)
