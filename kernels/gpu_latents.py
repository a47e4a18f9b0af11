"""The operations of a GPU's decode step over latents (DeepSeek-V2, 2405.04434), as gpu_step.py has the others: what
they mean, and which kernels carry them out.

Keys and values of all heads are linear in a position's latent, so heads look at latents: a query is first multiplied by
its head's part of the expansion, and what comes out by the values' part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import gpu_reference as reference
from . import gpu_step
from .step_model import Norm

Rotation = tuple[Tensor, Tensor]


def latent_write(
    q: Tensor,
    kv: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    *,
    norm: Norm,
    rotation: Rotation,
    positions: Tensor,
    paired: bool,
    apart: bool,
) -> Tensor:
    """Norms a position's latent, turns its key and all queries, writes both to the cache, and returns the turned parts
    of q [R, heads, rope] in the cache's dtype. One launch.

    q: [R, heads, size], of whose last dimensions those of a key are turned. kv: [R, rank + rope]. keys, values: latents
    [B, 1, capacity, rank] and turned keys [B, 1, capacity, rope], of which index `at` int64 [R] is written; one outside
    of them writes nothing. rotation, positions: see `gpu_step.rotary_write`. paired, apart: see `LatentSpec`.
    """
    kernel = gpu_step._kernels("gpu_latent_kernels", kv)
    if kernel is not None:
        return kernel.latent_write(  # type: ignore[no-any-return]
            q, kv, keys, values, at, norm, rotation, positions, paired, apart
        )
    rank, rope = keys.shape[3], values.shape[3]
    latent = reference.normed(kv[:, :rank].float(), norm)
    both = torch.cat([q[..., -rope:].float(), kv[:, None, rank:].float()], 1)
    both = reference.rotated(both, rotation, positions, paired or apart)
    if apart:
        both = torch.cat([both[..., ::2], both[..., 1::2]], -1)
    sequence = torch.arange(kv.shape[0], device=kv.device) // (kv.shape[0] // keys.shape[0])
    inside, where = (at >= 0) & (at < keys.shape[2]), at.clamp(0, keys.shape[2] - 1)
    for cache, new in ((keys, latent[:, None]), (values, both[:, -1:])):
        old = cache[sequence, :, where]
        cache[sequence, :, where] = torch.where(inside[:, None, None], new.to(cache.dtype), old)
    return both[:, :-1].to(keys.dtype)


def head_products(x: Tensor, weight: Tensor) -> Tensor:
    """float32 [R, heads, outs]: weight [heads, outs, inputs] times x [R, heads, inputs], both of any strides, head by
    head and row by row. One launch."""
    kernel = gpu_step._kernels("gpu_latent_kernels", x)
    if kernel is not None:
        return kernel.head_products(x, weight)  # type: ignore[no-any-return]
    wide = x if x.dtype is torch.float64 else x.float()
    return torch.einsum("rhi,hoi->rho", wide, weight.to(wide.dtype))


def latent_attention(
    q: Tensor,
    turned: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    *,
    scale: float,
    seen: Tensor | None = None,
    window: int = 0,
    counters: Tensor | None = None,
) -> Tensor:
    """float32 [R, heads, rank]: each head's mean of the latents of the indices 0..at of its sequence. One launch.

    q: [R, heads, rank], what meets latents; turned: [R, heads, rope], what meets turned keys. keys, values: see
    `latent_write`; the others as for `gpu_step.attention`.
    """
    kernel = gpu_step._kernels("gpu_latent_kernels", q)
    if kernel is not None:
        return kernel.latent_attention(  # type: ignore[no-any-return]
            q, turned, keys, values, at, scale, seen, window, counters
        )
    both, wide = torch.cat([keys, values], -1), torch.cat([q.to(turned.dtype), turned], -1)
    rank = keys.shape[3]
    latents = torch.nn.functional.pad(keys, (0, values.shape[3]))
    y = reference.attention(wide, both, latents, at, seen, scale, window, 0.0, None, None)
    return y.view(*q.shape[:2], -1)[..., :rank].contiguous()
