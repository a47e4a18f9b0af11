"""Norms, described by what they do to a sample."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from .calls import NotCovered
from .spec import NormSpec

# where a norm does not say its epsilon, as OLMo's; the last is that of float32 itself
_USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12, torch.finfo(torch.float32).eps)


def read_norm(module: nn.Module, size: int | None = None) -> NormSpec:
    """Describes a norm by what a copy of it, with other weights, does to a sample: classes differ in whether the weight
    is an offset from one (Gemma), or is there at all (OLMo). size: of what is normed, where the norm does not say it.

    Raises:
        NotCovered: it is none.
    """
    unknown = NotCovered(f"a {type(module).__name__} is not a norm that decode steps know")
    own = dict(module.named_parameters())
    told = next((p.shape[-1] for p in own.values()), None) or next(iter(getattr(module, "normalized_shape", ())), None)
    size = told or size
    known = own.keys() <= {"weight", "bias"} and all(p.ndim == 1 for p in own.values())
    if not isinstance(size, int) or not known:
        raise unknown
    for eps in epsilons(module):
        found = _as_norm(module, own, size, eps)
        if found is not None:
            return found
    raise unknown


def normed(norm: NormSpec, x: Tensor) -> Tensor:
    """What a norm makes of x ``[..., size]``, float32: its definition."""
    factor = None if norm.weight is None else norm.slope * norm.weight.detach().float().to(x.device) + norm.offset
    y = _base(norm.kind, x, norm.eps) * (norm.offset if factor is None else factor)
    return y if norm.bias is None else y + norm.bias.detach().float().to(x.device)


def epsilons(module: nn.Module) -> list[float]:
    """What a norm may add to the mean of squares, as far as it says it."""
    told = (getattr(module, name, None) for name in ("variance_epsilon", "eps", "epsilon", "norm_eps"))
    return next(([eps] for eps in told if isinstance(eps, float)), list(_USUAL_EPS))


def _base(kind: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)


def _as_norm(module: nn.Module, own: dict[str, nn.Parameter], size: int, eps: float) -> NormSpec | None:
    generator = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(module).to_empty(device="cpu").float()
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.normal_(generator=generator)
        # two samples, for what adds some of its input looks like an offset in one; the second so small that eps counts
        scales = torch.tensor([[1.0], [30 * math.sqrt(eps)]], dtype=torch.float32, device="cpu")
        samples = (torch.randn(2, size, generator=generator, dtype=torch.float32, device="cpu") + 0.5) * scales
        try:
            found = probe(samples)
        except Exception:  # a module of any kind, called as a norm
            return None
        if not isinstance(found, Tensor) or found.shape != samples.shape:
            return None
        weight = getattr(probe, "weight", None) if "weight" in own else None
        bias: Tensor = cast(Any, probe).bias if "bias" in own else torch.zeros_like(samples[0])
    for kind in ("rms", "layer"):
        base = _base(kind, samples, eps)
        slope, offset = _line(base[0], found[0] - bias, weight)
        factor = torch.full_like(base[0], offset) if weight is None else slope * weight + offset
        if torch.allclose(base * factor + bias, found, rtol=1e-4, atol=1e-4):
            return NormSpec(kind, eps, size, own.get("weight"), own.get("bias"), slope, offset)
    return None


def _line(base: Tensor, found: Tensor, weight: Tensor | None) -> tuple[float, float]:
    """The slope and offset with which base * (slope * weight + offset) comes closest to `found`. Whole numbers where
    these are close: rounding must not make a weight of 1 one of 0.9999999."""
    columns = base.double()[:, None] if weight is None else torch.stack([base * weight, base], 1).double()
    solved = torch.linalg.lstsq(columns, found.double()[:, None]).solution[:, 0].tolist()
    rounded = [float(round(value)) if abs(value - round(value)) < 1e-3 else float(value) for value in solved]
    return (0.0, rounded[0]) if weight is None else (rounded[0], rounded[1])
