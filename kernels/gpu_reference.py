"""What each small kernel of a GPU's decode step means, in plain torch; `gpu_step` describes the arguments.

Everything is computed in float32, or in float64 for float64 inputs, and rounded once where a result is stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference as cpu_reference
from .gpu_formats import ByRow, ExpertMatrices, FloatMatrix, GroupedMatrix, Inputs, Matrix, Quantized
from .groups import GROUP
from .packed import ACTS, PackedColumns, PackedLinear, PackedMLP, spread
from .step_model import Heads, Norm

Rotation = tuple[Tensor, Tensor]


def normed(x: Tensor, norm: Norm | None) -> Tensor:
    """x as it is, or its rows normed."""
    if norm is None:
        return x
    weight = norm.weight.to(x.dtype)
    bias = None if norm.bias is None else norm.bias.to(x.dtype)
    if norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
    y = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * weight
    return y if bias is None else y + bias


def add_norm(stream: Tensor, deltas: tuple[Tensor, ...], out: Norm | None, after: Norm | None, scale: float) -> Tensor:
    """The new residual stream, float32."""
    x = _wide(stream)
    for i, delta in enumerate(deltas):
        x = x + scale * normed(_wide(delta), out if i == 0 else None)
    return normed(x, after)


def act_mul(x: Tensor, act: str, gated: bool) -> Tensor:
    x = _wide(x)
    if not gated:
        return ACTS[act](x)
    gate, up = x.chunk(2, -1)
    return ACTS[act](gate) * up


def linear(x: Inputs, matrix: Matrix) -> Tensor:
    """[rows, out] in float32."""
    if isinstance(matrix, FloatMatrix):
        given = _wide(x.floats() if isinstance(x, Quantized) else x)
        y = F.linear(given, matrix.weight.to(given.dtype))
    else:
        y = grouped(x if isinstance(x, Quantized) else Quantized.of(x), matrix)
    return y if matrix.bias is None else y + matrix.bias.to(y.dtype)


def grouped(x: Quantized, matrix: GroupedMatrix) -> Tensor:
    """Integers multiplied exactly in each group, as `reference.linear` does with tiles; without the bias."""
    q, scale, least = matrix.numbers()
    integers = x.integers.view(*x.step.shape, GROUP).float()
    products = torch.einsum("rgk,ogk->rog", integers, q.float())
    return torch.einsum("rog,rg,og->ro", products, x.step, scale.float()) + x.total @ least.float().t()


def columns(x: Tensor, packed: PackedColumns, threshold: float, by_norm: bool) -> Tensor:
    """[rows, out] in float32; the rule of TEAL, and of WINA."""
    score = x.float().abs() * (packed.norm if by_norm else 1)
    kept = torch.where(~(score < threshold), _wide(x), 0)  # a NaN is kept
    y = kept @ packed.weight[:, : packed.out_features].to(kept.dtype)
    return y if packed.bias is None else y + packed.bias.to(y.dtype)


def mlp(x: Tensor, packed: PackedMLP, indices: Tensor | None, rule: str, threshold: float) -> Tensor:
    """[rows, hidden] in float32, in which a neuron that is left out is not looked at."""
    x = _wide(x)
    weight = packed.weight[..., : packed.hidden_size].to(x.dtype)
    gate = None
    up = _biased(F.linear(x, weight[:, -2]), packed.up_bias)
    if packed.gated:
        gate = ACTS[str(packed.act)](_biased(F.linear(x, weight[:, 0]), packed.gate_bias))
        h = gate * up
    else:
        h = ACTS[str(packed.act)](up)
    kept = kept_by(gate, h, packed, rule, threshold)
    if indices is not None:
        kept = kept & _table(indices, x.shape[0], packed.intermediate_size)
    h = h if packed.mean is None else h - packed.mean.to(h.dtype)
    y = torch.where(kept, h, 0) @ weight[:, -1]
    return _biased(y, packed.down_bias)


def kept_by(gate: Tensor | None, h: Tensor, packed: PackedMLP, rule: str, threshold: float) -> Tensor:
    """[rows, neurons] of bool; a NaN is kept."""
    if rule == "listed":
        return torch.ones_like(h, dtype=torch.bool)
    score = gate if rule == "gate" else h
    assert score is not None
    score = score.abs() if packed.norm is None or rule == "gate" else score.abs() * packed.norm
    return ~(score < threshold)


def pick(score: Tensor, keep: int, threshold: float, kind: str, norm: Tensor | None) -> Tensor:
    """int64."""
    score = score.abs() if kind == "size" else score
    return cpu_reference.pick(score if norm is None else score * norm, keep, threshold)


def sign_sums(x: Tensor, signs: PackedLinear) -> Tensor:
    """Integers, in float32."""
    one = torch.where(x < 0, -1.0, 1.0)
    return F.linear(one, torch.where(signs.weight[:, : signs.in_features] < 128, -1.0, 1.0))


def _sliced(x: ByRow, packed: PackedMLP, sums: Callable[[int], Tensor]) -> Tensor:
    """[rows, neurons]: act(gate) * up, or act(up), of integers of weights that `sums` gives by part."""
    assert packed.scale is not None
    integers, values = x.integers.double(), []
    for part, bias in enumerate((packed.gate_bias, packed.up_bias) if packed.gated else (packed.up_bias,)):
        y = (integers @ sums(part).double().t()).float() * (x.step[:, None] * packed.scale[:, part])
        values.append(_biased(y, bias))
    h = ACTS[str(packed.act)](values[0])
    return h * values[1] if packed.gated else h


def sketch_scores(x: ByRow, packed: PackedMLP) -> Tensor:
    """By the upper nibbles, where a lower one counts as 7.5."""
    assert packed.norm is not None
    return _sliced(x, packed, lambda part: 16.0 * spread(packed.weight[:, part]) + (7.5 - 128)).abs() * packed.norm


def sketch_mlp(x: ByRow, packed: PackedMLP, indices: Tensor | None, threshold: float | None, refine: float) -> Tensor:
    """[rows, hidden] in float32."""
    assert packed.low is not None
    low, half = packed.low, packed.weight.shape[2]
    h = _sliced(
        x, packed,
        lambda part: 16.0 * spread(packed.weight[:, part]) + spread(low[:, part * half : (part + 1) * half]) - 128.0,
    )  # fmt: skip
    h = h if packed.mean is None else h - packed.mean
    kept = torch.ones_like(h, dtype=torch.bool) if indices is None else _table(indices, x.rows, h.shape[1])
    if threshold is not None:
        kept = kept & ~(sketch_scores(x, packed) < threshold)  # a NaN is kept
    if refine > 0:
        assert packed.norm is not None
        kept = kept & ~(h.abs() * packed.norm < refine)
    return _biased(torch.where(kept, h, 0) @ packed.down_rows(), packed.down_bias)


def experts(x: Tensor, matrices: ExpertMatrices, chosen: Tensor, weights: Tensor) -> Tensor:
    """[rows, hidden] in float32."""
    x, at = _wide(x), chosen.clamp_min(0).long()
    there, weights = (chosen >= 0)[..., None], weights[..., None].to(x.dtype)

    def made(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.einsum("rki,rkoi->rko", given, weight[at].to(x.dtype))
        return y if bias is None else y + bias[at].to(x.dtype)

    given = x[:, None].expand(-1, chosen.shape[1], -1)
    given = given * weights if matrices.by_inputs else given
    h = made(given, matrices.up, matrices.up_bias)
    if matrices.gate is None:
        h = ACTS[matrices.act](h)
    else:
        gate, limit = made(given, matrices.gate, matrices.gate_bias), matrices.limit
        if limit > 0:
            gate, h = gate.clamp(max=limit), h.clamp(-limit, limit)
        opened = ACTS[matrices.act](gate) if matrices.slope == 1 else gate * (matrices.slope * gate).sigmoid()
        h = opened * (h + matrices.offset)
    y = made(h, matrices.down, matrices.down_bias)
    return torch.where(there, y if matrices.by_inputs else y * weights, 0).sum(1)


def heads_of(x: Tensor, place: Heads, count: int, size: int) -> Tensor:
    """The heads [rows, count, size] that lie at `place` among x [rows, width]."""
    offset, run, step = place
    if not count:
        return x.new_empty((x.shape[0], 0, size))
    first = [offset + h // run * step + h % run * size for h in range(count)]
    return torch.stack([x[:, at : at + size] for at in first], 1)


def rotated(x: Tensor, rotation: Rotation | None, positions: Tensor, paired: bool) -> Tensor:
    """x [rows, heads, size], of which the first dimensions are turned."""
    if rotation is None:
        return x
    cos, sin = (table[positions].to(x.dtype)[:, None] for table in rotation)
    width = cos.shape[-1]
    some, rest = x[..., :width], x[..., width:]
    half = width // 2
    if paired:
        first, second, cos, sin = some[..., ::2], some[..., 1::2], cos[..., :half], sin[..., :half]
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
    else:
        turned = some * cos + torch.cat([-some[..., half:], some[..., :half]], -1) * sin
    return torch.cat([turned, rest], -1)


def head_norm(x: Tensor, norm: Norm | None) -> Tensor:
    """x [rows, heads, size], normed head by head, or all heads at once where the weight is as long as they are."""
    if norm is None or norm.weight.numel() == x.shape[-1]:
        return normed(x, norm)
    return normed(x.flatten(1), norm).view_as(x)


def attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    seen: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """[rows, heads * size] in float32."""
    rows, heads, _ = q.shape
    sequences, kv_heads, capacity, _ = keys.shape
    tokens = rows // sequences
    k, v = (_wide(t).repeat_interleave(tokens, 0).repeat_interleave(heads // kv_heads, 1) for t in (keys, values))
    scores = scale * torch.einsum("rhd,rhcd->rhc", _wide(q), k)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    behind = at[:, None] - torch.arange(capacity, device=q.device)  # [rows, capacity]
    if slopes is not None:
        scores = scores - slopes[:, None].to(scores.dtype) * behind[:, None].to(scores.dtype)
    visible = behind >= 0
    if seen is not None:
        visible &= seen.repeat_interleave(tokens, 0)
    if window:
        visible &= behind < window
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[None, :, None].expand(rows, -1, 1)], -1)
    shares = scores.softmax(-1)[..., :capacity].nan_to_num(0.0)  # who sees nothing gets nothing
    v = torch.where(visible[:, None, :, None], v, 0)
    return torch.einsum("rhc,rhcd->rhd", shares, v).flatten(1)


def embed(ids: Tensor, table: Tensor | GroupedMatrix, scale: float) -> Tensor:
    """[rows, hidden] in float32."""
    x = _wide(table[ids]) if isinstance(table, Tensor) else table.take(ids).floats()
    return x if scale == 1.0 else x * scale


def _table(indices: Tensor, rows: int, neurons: int) -> Tensor:
    """[rows, neurons] of bool: which are listed."""
    listed = indices.expand(rows, -1).long().remainder(neurons + 1)
    table = torch.zeros((rows, neurons + 1), dtype=torch.bool, device=indices.device)
    return table.scatter_(1, listed, True)[:, :-1]  # -1 falls into the extra column


def _biased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()
