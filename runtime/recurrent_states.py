"""States that a recurrence keeps in place of keys and values: what a cache's layer holds of them.

Steps write them in place, as transformers' own passes do, and no pass can be taken back: who runs one to compare it
keeps a copy.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

States = tuple[Tensor, ...]  # with rows first: the last inputs of all channels, and what heads hold, if any do
StateSizes = tuple[tuple[int, ...], ...]  # of one sequence's

_ASKED = ("update_conv_state", "update_recurrent_state")


def is_recurrent(layer: Any) -> bool:
    """Whether a cache's layer holds the states of one recurrence, and nothing else."""
    plain = type(layer) is LinearAttentionLayer and not any(name in vars(layer) for name in _ASKED)
    return plain and layer.number_of_states == 1


def states_of(layer: Any) -> States:
    """The states of a layer that `is_recurrent`; none before a pass has written any."""
    found = layer.conv_states[0], layer.recurrent_states[0]
    return tuple(states for states in found if isinstance(states, Tensor))


def are_states(layer: Any, rows: int, sizes: StateSizes, dtype: torch.dtype) -> bool:
    """Whether a layer holds what passes of `rows` sequences have left there, as native steps write it in place: inputs
    of `dtype`, states in float32. A cache that records its past is to be cropped, which states cannot be."""
    found = states_of(layer)
    if layer.record_past or not layer.has_previous_state[0] or len(found) != len(sizes):
        return False
    for states, size, kind in zip(found, sizes, (dtype, torch.float32), strict=False):
        if states.shape != (rows, *size) or not states.is_contiguous():
            return False
        if states.dtype is not kind or states.device.type != "cpu":
            return False
    return True


def same(some: States, others: States) -> bool:
    """Whether these are the very tensors."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def copies(layers: Iterable[Any]) -> list[States]:
    """Of the states that layers of a cache hold, in turn."""
    return [tuple(x.clone() for x in states_of(layer)) for layer in layers if is_recurrent(layer)]


def put_back(states: Iterable[States], before: Iterable[States]) -> None:
    """Writes `before` to the tensors of `states`."""
    for pair, old in zip(states, before, strict=True):
        for now, then in zip(pair, old, strict=True):
            now.copy_(then)
