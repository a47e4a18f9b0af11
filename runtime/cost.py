"""What a decode step moves through memory under a plan, and how long that takes here."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch

from ..kernels import cpu
from ..kernels.ops import available
from ..predictors.anatomy import Anatomy, dissect, rows_of
from ..predictors.plan import Dense, Learned, Plan, Sketch, Threshold, TopK

_INT4 = 0.5 + 1 / 16  # bytes a weight, with a scale per group
_READ = 256 << 20  # bytes: several times the last cache


def bytes_per_token(model: Any, plan: Plan, anatomy: Anatomy | None = None) -> int:
    """Bytes of weights that one decode step of one sequence reads under `plan`.

    A threshold's share is what it kept on the calibration text. The KV cache is left out: no plan changes it.
    """
    anatomy = anatomy or dissect(model)
    head = model.get_output_embeddings().weight
    size = _weight_size(plan, head.element_size())
    mlp_weights = {id(p) for mlp in anatomy.mlps for p in (mlp.up.weight, mlp.down.weight)}
    mlp_weights |= {id(getattr(mlp.owner, mlp.gate_name).weight) for mlp in anatomy.mlps if mlp.gate_name is not None}
    total = head.numel() * (1 if plan.weights is not None else head.element_size())
    for index, (layer, mlp) in enumerate(zip(anatomy.layers, anatomy.mlps, strict=True)):
        others = sum(p.numel() for p in layer.parameters() if id(p) not in mlp_weights)
        policy = plan.layers[index].neurons
        total += round(size * (others - _unread_attention(anatomy, index, policy)))
        total += round(_mlp_bytes(policy, mlp.intermediate_size, mlp.hidden_size, mlp.gated, size))
    return int(total)


def _weight_size(plan: Plan, loaded: int) -> float:
    return {None: float(loaded), "int8": 1.0, "int4": _INT4}[plan.weights]


def _mlp_bytes(policy: Any, width: int, hidden: int, gated: bool, size: float) -> float:
    first = 2 if gated else 1  # projections that give the activations
    kept = int(policy.kept(width))
    row = hidden * size
    if isinstance(policy, Dense):
        return width * (first + 1) * row
    if isinstance(policy, Sketch) and policy.bits == 4:
        return width * first * hidden / 2 + kept * (first * hidden / 2 + hidden)
    if isinstance(policy, Sketch):
        return width * hidden + kept * (first + 1) * row
    if isinstance(policy, TopK) or (isinstance(policy, Threshold) and policy.rule == "cats" and not gated):
        return width * first * row + kept * row
    if isinstance(policy, Threshold) and policy.rule == "cats":
        return width * row + kept * 2 * row
    if isinstance(policy, Learned):
        return int(policy.rank) * (hidden + width) * 4 + kept * (first + 1) * row
    return kept * (first + 1) * row


def _unread_attention(anatomy: Anatomy, index: int, policy: Any) -> float:
    """Weights of the attention that stay unread."""
    attention = anatomy.attentions[index]
    if not isinstance(policy, Threshold) or attention is None:
        return 0.0
    names = [name.partition(".")[2] for name in policy.least if name.startswith("attention.")]
    return sum((1 - policy.keep) * rows_of(getattr(attention.module, name))[0].numel() for name in names)


@cache
def read_bandwidth(device: str) -> float:
    """Bytes per second at which memory is read here with the threads there are: the best of three passes."""
    memory = torch.ones(_READ, dtype=torch.uint8, device=device)
    best = float("inf")
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        if device == "cpu" and available("cpu") is None:
            cpu.read(memory)
        else:
            float(memory.view(torch.float32).sum())
        best = min(best, time.perf_counter() - start)
    return _READ / best


def predicted_seconds(model: Any, plan: Plan, anatomy: Anatomy | None = None) -> float:
    """How long a decode step takes if it does nothing but read its weights."""
    return bytes_per_token(model, plan, anatomy) / read_bandwidth(model.device.type)
