"""The operations of a GPU's decode step: what `runtime`'s lowering of a whole step is made of.

On CUDA tensors, and under TRITON_INTERPRET=1 on CPU tensors, they are Triton kernels; elsewhere the definitions in
gpu_reference.py. None reads anything back to the host, all grids depend on shapes alone, nothing depends on the order
in which programs run: a sequence of them can be captured in a CUDA graph, and gives the same bits every time.

R rows are `tokens` consecutive tokens of each of B sequences, R = B * tokens, a sequence's tokens one after the other.
Results are new tensors. The residual stream is best kept in float32: a row is read by few, and never by a matrix.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import gpu_reference as reference
from .gpu_formats import FloatMatrix, GroupedMatrix, Inputs, Matrix, Quantized
from .packed import ACTS, PackedColumns, PackedMLP
from .step_model import Heads, Norm

__all__ = [
    "FloatMatrix",
    "GroupedMatrix",
    "Inputs",
    "Matrix",
    "Normed",
    "Quantized",
    "act_mul",
    "add_norm",
    "attention",
    "columns",
    "embed",
    "linear",
    "mlp",
    "quantize",
    "rotary_write",
]

MAX_GROUPED_ROWS = 32  # beyond them a grouped matrix is unpacked, and multiplied by torch


class Normed(NamedTuple):
    """stream: the residual stream [R, hidden], as `add_norm` left it; y, second: what linears read."""

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
    quantize: bool = False,
    dtype: torch.dtype | None = None,
) -> Normed:
    """stream = after(stream + scale * out(deltas[0]) + scale * deltas[1]), y = norm(stream): one launch.

    stream: [R, hidden] of any float dtype, which the new stream has, too. deltas: none, one or two of [R, hidden];
    `out` is for the first. norm None: y is the stream itself. second: a further norm of the new stream.
    quantize: y and second are `Quantized`; else they have `dtype`, by default that of the stream.
    """
    kernel = _kernels("gpu_norm", stream)
    if kernel is not None:
        return Normed(*kernel.add_norm(stream, norm, deltas, out, after, second, scale, quantize, dtype))
    x = reference.add_norm(stream, deltas, out, after, scale)
    y = _made(reference.normed(x, norm), quantize, dtype or stream.dtype)
    more = None if second is None else _made(reference.normed(x, second), quantize, dtype or stream.dtype)
    return Normed(x.to(stream.dtype), y, more)


def quantize(x: Tensor) -> Quantized:
    """x [R, n] of floats rounded to 8 bits in groups of 32: one launch."""
    kernel = _kernels("gpu_norm", x)
    return Quantized.of(x) if kernel is None else kernel.quantize(x)


def act_mul(
    x: Tensor, act: str, *, gated: bool = True, quantize: bool = False, dtype: torch.dtype | None = None
) -> Inputs:
    """[R, I]: act(gate) * up of x [R, 2 I], gates before ups; act(x) of x [R, I] where not gated. One launch.

    act: a name of `packed.ACTS`. quantize, dtype: as for `add_norm`, by default the dtype of x.
    """
    kernel = _kernels("gpu_norm", x)
    if kernel is not None:
        return kernel.act_mul(x, act, gated, quantize, dtype)
    return _made(reference.act_mul(x, act, gated), quantize, dtype or x.dtype)


def linear(x: Inputs, matrix: Matrix, *, dtype: torch.dtype | None = None) -> Tensor:
    """x @ weight.t() + bias, [R, out] in `dtype`: one launch, and torch's own product for floats of several rows.

    x: [R, in]. With a `GroupedMatrix` it is a `Quantized` (a Tensor is quantised first: one more launch), any number of
    rows; beyond `MAX_GROUPED_ROWS` the matrix is unpacked for the call, and x stays as it is (prefill). dtype: by
    default that of a Tensor x, and float32 for a `Quantized`.
    """
    given = x if isinstance(x, Tensor) else x.step
    dtype = dtype or (x.dtype if isinstance(x, Tensor) else torch.float32)
    kernel = _kernels("gpu_groups" if isinstance(matrix, GroupedMatrix) else "gpu_floats", given)
    if isinstance(matrix, FloatMatrix):
        rows = x.floats() if isinstance(x, Quantized) else x
        if kernel is not None and kernel.takes(rows, matrix):
            return kernel.linear(rows, matrix, dtype)
        bias = None if matrix.bias is None else matrix.bias.to(matrix.weight.dtype)
        return F.linear(rows.to(matrix.weight.dtype), matrix.weight, bias).to(dtype)
    if given.shape[0] > MAX_GROUPED_ROWS:
        return _unpacked(x, matrix, dtype)
    if kernel is None:
        return reference.linear(x, matrix).to(dtype)
    return kernel.linear(quantize(x) if isinstance(x, Tensor) else x, matrix, dtype)


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

    One launch. qkv: [R, width], in which the heads of q, k and v lie at `places` (see `step_model.Heads`).
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
    starts: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    quantize: bool = False,
    dtype: torch.dtype | None = None,
) -> Inputs:
    """[R, heads * head_dim]: each row's attention over indices starts <= i <= at of its sequence. Two launches.

    q: [R, heads, head_dim] as `rotary_write` returns it; keys, values: [B, kv_heads, capacity, head_dim] of one dtype;
    at: int64 [R], read on the device, as starts int64 [B] are (None: 0). window: how many indices a row sees, itself
    included; 0: all. softcap: of scores; 0: none. slopes: float32 [heads], what a score loses for each index that it
    lies back; sinks: float32 [heads], see `step_model.Attention`. Rows that see nothing get zeros.
    quantize, dtype: as for `add_norm`, by default the dtype of q.
    """
    kernel = _kernels("gpu_attention", q)
    if kernel is not None:
        return kernel.attention(
            q, keys, values, at, starts, scale, window, softcap, slopes, sinks, quantize, dtype or q.dtype
        )
    y = reference.attention(q, keys, values, at, starts, scale, window, softcap, slopes, sinks)
    return _made(y, quantize, dtype or q.dtype)


def mlp(
    x: Tensor,
    packed: PackedMLP,
    *,
    indices: Tensor | None = None,
    rule: Literal["listed", "gate", "activation"] = "listed",
    threshold: float = 0.0,
    dtype: torch.dtype | None = None,
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
        return kernel.mlp(x, packed, indices, rule, threshold, dtype or x.dtype)  # type: ignore[no-any-return]
    return reference.mlp(x, packed, indices, rule, threshold).to(dtype or x.dtype)


def columns(
    x: Tensor, packed: PackedColumns, threshold: float, *, by_norm: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """A linear without the inputs below `threshold`, whose columns stay unread: [R, out] in `dtype`. Two launches.

    x: [R, in]. An input counts by |x| (TEAL) or, by_norm, by |x| * |column| (WINA).
    """
    kernel = _kernels("gpu_mlp", x)
    if kernel is not None:
        return kernel.columns(x, packed, threshold, by_norm, dtype or x.dtype)  # type: ignore[no-any-return]
    return reference.columns(x, packed, threshold, by_norm).to(dtype or x.dtype)


def embed(ids: Tensor, table: Tensor | GroupedMatrix, *, scale: float = 1.0, dtype: torch.dtype) -> Tensor:
    """The rows `ids` int64 [R] of a table [vocabulary, hidden], times scale, in `dtype`."""
    return reference.embed(ids, table, scale).to(dtype)


def _unpacked(x: Inputs, matrix: GroupedMatrix, dtype: torch.dtype) -> Tensor:
    rows = x if isinstance(x, Tensor) else x.floats()
    bias = None if matrix.bias is None else matrix.bias.to(rows.dtype)
    return F.linear(rows, matrix.floats(rows.dtype), bias).to(dtype)


def _made(x: Tensor, quantize: bool, dtype: torch.dtype) -> Inputs:
    return Quantized.of(x) if quantize else x.to(dtype)


def _kernels(name: str, x: Tensor) -> Any:
    """The module of Triton kernels, imported at its first use; None where the definitions run."""
    if not (x.is_cuda or _interpreted()):
        return None
    return _module(name)


@cache
def _module(name: str) -> Any:
    try:
        return import_module(f".{name}", __package__)
    except ModuleNotFoundError:
        return None


@cache
def _interpreted() -> bool:
    import os

    return os.environ.get("TRITON_INTERPRET") == "1"
