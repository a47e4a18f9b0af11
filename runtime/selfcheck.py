"""Where native steps are compared with the model's own modules, beyond the first of them.

What a model does may change with the position (queries scaled beyond the length that it was trained on) or with the
length of the text (a window). So the first comparison is followed by two of its kind over repeated keys and values, one
at positions far apart, one behind many keys. Later ones wait for a text to reach another range of lengths: these begin
where the configuration names a position, and wherever the length has doubled. Each is made once a model.
"""

from __future__ import annotations

import bisect
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..kernels.ops import MAX_ROWS
from .calls import NotCovered
from .kv_cache import is_plain

# Keys and values made up for the second comparison: half a thousand take 23 MB of the embedded model in float32.
KEYS = 512
FEW = 8  # for the first
_LONGEST = 1 << 24
_POSITIONS = ("position", "window", "length", "context", "chunk", "floor_scale", "seq_len")
# Tokens that are tried before steps count as different. In bfloat16 the embedded model's right description is beyond
# the tolerance for one token in four, so for eight in a row once in 65,000 comparisons.
_TRIES = 8


class Checkpoints:
    """Ranges of lengths, and those in which a step was compared with the modules."""

    def __init__(self, config: Any) -> None:
        switches = {KEYS << n for n in range(1, 16)} | {at for at in named_positions(config) if KEYS <= at <= _LONGEST}
        # the token at position n, or the first to see more than n keys, is the one that makes n + 1
        self._starts = [0, *(at + 1 for at in sorted(switches))]
        self._passed = {0}
        self._low, self._high = 0, self._starts[1]  # a range that was passed

    def due(self, past: int, more: int) -> bool:
        """Whether a step that makes `past` tokens `more` reaches a range where none was compared."""
        if self._low <= past and past + more < self._high:
            return False
        first, last = self._range(past + 1), self._range(past + more)
        if not self._passed.issuperset(range(first, last + 1)):
            return True
        self._low, self._high = self._starts[last], self._end(last)
        return False

    def passed(self, past: int, more: int) -> None:
        """Such a step was compared, token by token."""
        self._passed.update(range(self._range(past + 1), self._range(past + more) + 1))

    def room(self, past: int) -> int:
        """How many tokens may follow `past` in the range that the next one reaches."""
        if self._low <= past < self._high - 1:
            return self._high - 1 - past
        return self._end(self._range(past + 1)) - 1 - past

    def _range(self, length: int) -> int:
        return bisect.bisect_right(self._starts, length) - 1

    def _end(self, index: int) -> int:
        return self._starts[index + 1] if index + 1 < len(self._starts) else 1 << 62


def named_positions(config: Any) -> set[int]:
    """The whole numbers that a configuration names after positions, lengths or windows."""
    return {at for name, at in _numbers(config.to_dict()) if at > 1 and any(word in name for word in _POSITIONS)}


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield str(name), value


def far_positions(config: Any) -> Tensor:
    """int64 [at most 8]: positions within the model's length: a near one, its end, where the configuration names one,
    and else four times apart."""
    end = int(getattr(config, "max_position_embeddings", None) or KEYS)
    named = [at for at in sorted(named_positions(config)) if at < end]
    apart = [end >> n for n in range(2, 24, 2)]
    wanted = dict.fromkeys([FEW, end - 1, *named, *apart])
    return torch.tensor([at for at in wanted if FEW <= at < end][:MAX_ROWS] or [FEW], device="cpu")


def made_up(config: Any, like: DynamicCache, rows: int, keys: int) -> DynamicCache:
    """A cache of `keys` keys and values in each row: those of the first sequence of `like`, again and again after its
    first token. Texts lean on their first token: behind random numbers, which none of them leans on, rounding to
    bfloat16 alone moves the embedded model's logits by a standard deviation, behind these by a twentieth of one. Layers
    without keys get the states of the first sequence.

    Raises NotCovered for layers of other kinds.
    """
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cast(Any, like.layers)):
        if not is_plain(layer):
            cache.layers[index] = _states_of(layer, rows)
            continue
        if not layer.is_initialized:  # of what no text comes to, as attention to pictures
            continue
        length = layer.keys.shape[2]
        again = torch.arange(keys, device="cpu") % max(1, length - 1) + min(1, length - 1)
        again[0] = 0
        parts = (
            part[:1, :, again].nan_to_num(0.0, 0.0, 0.0).expand(rows, -1, -1, -1).contiguous()
            for part in (layer.keys, layer.values)
        )
        cache.update(*parts, index)
    return cache


def _states_of(layer: Any, rows: int) -> Any:
    """A copy of a cache's layer that has nothing, or states alone, those of its first sequence for so many."""
    if not any(isinstance(value, (Tensor, dict)) for value in vars(layer).values()):
        return copy.deepcopy(layer)
    states = {name: getattr(layer, name, None) for name in ("conv_states", "recurrent_states")}
    if hasattr(layer, "keys") or not all(isinstance(found, dict) for found in states.values()):
        raise NotCovered(f"what a {type(layer).__name__} holds behind other texts is not known")
    twin = copy.deepcopy(layer)
    for name, found in states.items():
        some = cast("dict[int, Tensor | None]", found).items()
        setattr(twin, name, {at: None if x is None else x[:1].repeat_interleave(rows, 0) for at, x in some})
    return twin


def agree(
    run: Callable[[Tensor], tuple[Tensor, Tensor]],
    close: Callable[[Tensor, Tensor], bool],
    shape: tuple[int, int],
    vocabulary: int,
) -> bool:
    """Whether every row has logits close to those expected for one of several choices of its tokens.

    run: of tokens ``[rows, length]`` the logits and those expected, each ``[rows, length, vocabulary]``.
    """
    left, generator = list(range(shape[0])), torch.Generator().manual_seed(0)
    for _ in range(_TRIES):
        logits, expected = run(torch.randint(0, vocabulary, shape, generator=generator, device="cpu"))
        left = [row for row in left if not close(logits[row], expected[row])]
        if not left:
            return True
    return False
