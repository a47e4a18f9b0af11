"""Between an attention module and the attention function it calls: query by query in verification, not at all where
the plan skips it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..predictors.anatomy import Anatomy, is_taps
from .phases import Phase, current_pass

_NAME = "coreskip"
Output = tuple[Tensor, "Tensor | None"]


class _Redirected:
    """An attention module's configuration, which sends it to `_attend` and is otherwise as before."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __getattr__(self, name: str) -> Any:
        return _NAME if name == "_attn_implementation" else getattr(self.original, name)


def can_redirect(anatomy: Anatomy) -> bool:
    """Whether every attention module goes through transformers' attention interface."""
    modules: list[Any] = [None if attention is None else attention.module for attention in anatomy.attentions]
    return all(
        # a recurrence among them calls no attention function
        hasattr(module, "config")
        and hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")
        and not any(map(is_taps, module.children()))
        for module in modules
    )


def redirect_attention(anatomy: Anatomy, replace: Callable[[object, str, object], None]) -> None:
    """Let `replace` (of `Patches`) send every attention module to `_attend`."""
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
    for attention in anatomy.attentions:
        module = cast(Any, attention).module
        replace(module, "config", _Redirected(module.config))


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Output:
    """The model's own attention, but for passes that skip it or verify several tokens."""
    original = cast(Any, module.config).original
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = cast(
        Callable[..., Output],
        ALL_ATTENTION_FUNCTIONS.get_interface(original._attn_implementation, cast(Any, eager)),
    )
    step = current_pass()
    if step is not None and step.entries_only:
        return query.transpose(1, 2).contiguous(), None  # of the right shape; the output projection ignores it
    if step is None or step.phase is not Phase.VERIFY or query.shape[2] == 1:
        return attend(module, query, key, value, attention_mask, **options)
    return _by_query(attend, module, query, key, value, attention_mask, options)


def _by_query(
    attend: Callable[..., Output],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> Output:
    """Each query gets the keys and the call that it has in a pass of its own.

    A matrix product over 8 queries rounds otherwise than over one, which decides near-ties: in bfloat16 one token in
    a few dozen.
    """
    queries, keys = query.shape[2], key.shape[2]
    window: int | None = options.get("sliding_window")
    slides = window is not None and keys - queries < window  # a cache that forgets: it holds a window and the queries
    outputs = []
    for i in range(queries):
        end = keys - queries + 1 + i
        start = max(0, end - window) if window is not None and slides else 0
        mask = attention_mask
        if mask is not None and window is None and mask.dtype is torch.bool:  # who slides by the mask alone (PhiMoE)
            seen = mask[:, :, i, :end].flatten(0, 1).any(0)
            start = int(seen.int().argmax())
        if mask is not None:
            # transformers leaves a lone query's boolean mask out unless its keys fill the window
            needed = mask.dtype is not torch.bool or (window is not None and end - start >= window)
            needed = needed or (window is None and not bool(mask[:, :, i, start:end].all()))
            mask = mask[:, :, i : i + 1, start:end] if needed else None
        rows = (query[:, :, i : i + 1], key[:, :, start:end], value[:, :, start:end])
        outputs.append(attend(module, *rows, mask, **options)[0])
    return torch.cat(outputs, dim=1), None
