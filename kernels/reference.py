"""What every operation means, in plain torch. Also the backend wherever there is no faster one.

Float weights meet x in the wider of the two dtypes. Quantised weights meet x rounded to 8 bits per row, the products
of integers are summed in float32 (exact up to 2**24), and the down projection is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .groups import GROUP, ungroup, untile
from .packed import ACTS, PackedColumns, PackedLinear, PackedMLP, quantize, spread


def mlp(x: Tensor, packed: PackedMLP, indices: Tensor | None = None) -> Tensor:
    """See `ops.mlp`; any number of rows."""
    rows = x.reshape(-1, packed.hidden_size)
    shared = indices is not None and indices.dim() == 1
    if indices is not None:
        _check_range(indices, packed.intermediate_size)
    if indices is not None and shared:
        packed = packed.take(indices[indices >= 0].long())
    h = _activations(rows, packed)
    if packed.mean is not None:
        h = h - packed.mean.to(h.dtype)
    if indices is not None and not shared:
        # A masked neuron is multiplied all the same: an infinite down row would show. The kernels leave it out.
        h = torch.where(_listed(indices, packed.intermediate_size), h, 0)
    y = torch.matmul(h, _down(packed, h.dtype))
    y = y if packed.down_bias is None else y + packed.down_bias.to(y.dtype)
    return y.to(x.dtype).reshape(x.shape)


def choose(x: Tensor, packed: PackedMLP, rule: str, keep: int, threshold: float) -> Tensor:
    """[R, k] of int64: the neurons of each row by `rule`, ascending, then -1. See `ops.sketch_select`."""
    rows = x.reshape(-1, packed.hidden_size)
    score = sketch_scores(rows, packed) if rule == "sketch" else _gate(rows.float(), packed).abs()
    return pick(score, keep, threshold)


def refined(x: Tensor, packed: PackedMLP, indices: Tensor, least: float) -> Tensor:
    """`indices` ``[R, k]`` without the neurons whose exact score is below `least`, each of which becomes -1.

    The exact score is what leaving a neuron out would cost: its activation's distance from its mean, where there are
    means, times its norm. A NaN stays, as in `pick`.
    """
    assert packed.norm is not None
    h = _activations(x.reshape(-1, packed.hidden_size), packed)
    score = (h if packed.mean is None else h - packed.mean).abs() * packed.norm
    return torch.where(score.gather(1, indices.clamp_min(0)) < least, -1, indices)


def mlp_by(x: Tensor, packed: PackedMLP, rule: str, keep: int, threshold: float, refine: float) -> Tensor:
    """See `ops.sketch_mlp` and `ops.gate_mlp`; any number of rows."""
    chosen = choose(x, packed, rule, keep, threshold)
    return mlp(x, packed, refined(x, packed, chosen, refine) if refine > 0 else chosen)


def pick(score: Tensor, keep: int, threshold: float) -> Tensor:
    """The `keep` best of each row of [R, neurons] (of equals the first) or, where keep < 0, those of `threshold` up.

    A NaN is picked: it has to reach the output, as it would in a dense layer.
    """
    score = torch.where(score.isnan(), torch.inf, score)
    rows, neurons = score.shape
    width = neurons if keep < 0 else keep
    if keep == 0:
        return torch.empty((rows, 0), dtype=torch.int64, device=score.device)
    if keep < 0:
        kept = score >= threshold
    else:
        least = score.topk(keep, sorted=False).values.amin(-1, keepdim=True)
        more, equal = score > least, score == least
        kept = more | (equal & (equal.cumsum(-1) <= keep - more.sum(-1, keepdim=True)))
    # Counting places instead of sorting: a sixth of the time for 14336 scores on a CPU, and fewer passes on a GPU.
    place = torch.where(kept, kept.cumsum(-1) - 1, width)
    listed = place.new_full((rows, width + 1), -1)  # the last column takes all that are not kept
    listed.scatter_(1, place, torch.arange(neurons, device=score.device).expand_as(place))
    return listed[:, :width]


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """See `ops.linear`; any number of rows."""
    if packed.grouped:
        return _grouped_linear(x, packed)
    if packed.scale is not None:
        integers, scale = quantize(x.reshape(-1, packed.in_features).float())
        weight = packed.weight[:, : packed.in_features].float() - 128
        y = F.linear(integers, weight) * (scale[:, None] * packed.scale)
        y = y if packed.bias is None else y + packed.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], packed.out_features)
    dtype = torch.promote_types(x.dtype, packed.weight.dtype)
    bias = None if packed.bias is None else packed.bias.to(dtype)
    return F.linear(x.to(dtype), packed.weight[:, : packed.in_features].to(dtype), bias).to(x.dtype)


def _grouped_linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """Both sides by groups of 32 inputs: x rounded to 8 bits in each, its integers multiplied exactly; or `whole`."""
    if packed.counts is not None:
        x, packed = packed.in_groups(x), packed.whole_groups()
    q, scale, least = untile(packed)
    if packed.whole:
        weight = ungroup(q, scale, least).flatten(1)[:, : packed.in_features]
        return F.linear(x.float(), weight, packed.bias).to(x.dtype)
    rows = F.pad(x.reshape(-1, packed.in_features).float(), (0, packed.stride - packed.in_features))
    integers, step = quantize(rows.reshape(-1, GROUP))
    groups, size = q.shape[1:]  # of weights, which may have two scales where x has one
    integers = integers.view(-1, groups, size)
    step = step.view(-1, packed.stride // GROUP).repeat_interleave(GROUP // size, 1)
    products = torch.einsum("rgk,ogk->rog", integers, q.float())
    y = torch.einsum("rog,rg,og->ro", products, step, scale.float()) + (step * integers.sum(-1)) @ least.float().t()
    y = y if packed.bias is None else y + packed.bias
    return y.to(x.dtype).reshape(*x.shape[:-1], packed.out_features)


def columns(x: Tensor, packed: PackedColumns, by_norm: bool, keep: int, threshold: float) -> Tensor:
    """See `ops.column_linear`; any number of rows."""
    rows = x.reshape(-1, packed.in_features)
    score = rows.float().abs() * (packed.norm if by_norm else 1)
    wanted = _listed(pick(score, keep, threshold), packed.in_features)
    dtype = torch.promote_types(x.dtype, packed.weight.dtype)
    y = torch.matmul(torch.where(wanted, rows, 0).to(dtype), packed.weight[:, : packed.out_features].to(dtype))
    y = y if packed.bias is None else y + packed.bias.to(dtype)
    return y.to(x.dtype).reshape(*x.shape[:-1], packed.out_features)


# ---- the parts of an MLP ----


def _activations(rows: Tensor, packed: PackedMLP) -> Tensor:
    """[R, neurons]: act(gate) * up, or act(up)."""
    up = _projection(rows, packed, int(packed.gated), packed.up_bias)
    return _gate(rows, packed) * up if packed.gated else _function(packed)(up)


def _gate(rows: Tensor, packed: PackedMLP) -> Tensor:
    return _function(packed)(_projection(rows, packed, 0, packed.gate_bias))


def _function(packed: PackedMLP) -> Callable[[Tensor], Tensor]:
    return ACTS[packed.act] if isinstance(packed.act, str) else packed.act


def _projection(rows: Tensor, packed: PackedMLP, part: int, bias: Tensor | None) -> Tensor:
    if packed.scale is not None:
        y = _integer_products(rows, packed, part, _bytes(packed, part).float() - 128)
        return y if bias is None else y + bias
    # A view of the packed rows: torch's GEMM takes their stride as it is, so that prefill copies nothing.
    dtype = torch.promote_types(rows.dtype, packed.weight.dtype)
    weight = packed.weight[:, part, : packed.hidden_size].to(dtype)
    return F.linear(rows.to(dtype), weight, None if bias is None else bias.to(dtype))


def _integer_products(rows: Tensor, packed: PackedMLP, part: int, weight: Tensor) -> Tensor:
    assert packed.scale is not None
    integers, scale = quantize(rows.float())
    return F.linear(integers, weight[:, : packed.hidden_size]) * (scale[:, None] * packed.scale[:, part])


def _bytes(packed: PackedMLP, part: int) -> Tensor:
    """[neurons, stride] of uint8, for gate or up."""
    if packed.low is None:
        return packed.weight[:, part]
    half = packed.weight.shape[2]
    return 16 * spread(packed.weight[:, part]) + spread(packed.low[:, part * half : (part + 1) * half])


def _down(packed: PackedMLP, dtype: torch.dtype) -> Tensor:
    # Float rows stay a view: prefill copies nothing.
    return packed.down_rows() if packed.scale is not None else packed.weight[:, -1, : packed.hidden_size].to(dtype)


def sketch_scores(rows: Tensor, packed: PackedMLP) -> Tensor:
    """|act(gate) * up| * |down| from the high nibbles, where a low nibble counts as 7.5, the middle of its range."""
    assert packed.norm is not None
    biases = (packed.gate_bias, packed.up_bias) if packed.gated else (packed.up_bias,)
    values = []
    for part, bias in enumerate(biases):
        y = _integer_products(rows, packed, part, 16.0 * spread(packed.weight[:, part]) + (7.5 - 128))
        values.append(y if bias is None else y + bias)
    h = _function(packed)(values[0])
    return (h * values[1] if packed.gated else h).abs() * packed.norm


# ---- lists of neurons ----


def _listed(indices: Tensor, neurons: int) -> Tensor:
    """[R, neurons] of bool: which row lists which neuron."""
    table = indices.new_zeros((indices.shape[0], neurons + 1), dtype=torch.bool)
    table.scatter_(1, indices.long().remainder(neurons + 1), True)  # -1 falls into the extra column
    return table[:, :neurons]


def _check_range(indices: Tensor, neurons: int) -> None:
    if indices.numel() and (int(indices.min()) < -1 or int(indices.max()) >= neurons):
        raise IndexError(f"indices must be -1 (nothing) or in [0, {neurons})")
