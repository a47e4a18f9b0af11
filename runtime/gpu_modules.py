"""A step of the model's own modules over memory that never moves, as a plain function that reads nothing back to the
host: what a GPU captures of models and plans that the lowering of the whole step (gpu_model.py) does not cover."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .calls import NotCovered
from .gpu_place import Place
from .phases import Pass, tallied
from .reading import windows
from .selections import share_selections


class _StaticLayer(DynamicLayer):
    """Keys and values ``[rows, kv_heads, capacity, head_dim]``, of which every step writes those at index `at`.

    It says to be full: whatever a model derives from a cache's length on the host, a capture would freeze, and has to
    be noticed at the first comparison.
    """

    def __init__(self, keys: Tensor, values: Tensor, at: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = self._both = keys, values
        self._at, self.is_initialized = at, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for buffer, new in zip(self._both, (key_states, value_states), strict=True):
            buffer.index_copy_(2, self._at, new)
        return self._both


class ModuleStep:
    """One token for each of the sequences of a place; a second call does what the first did.

    Args:
        forward: of the model, unpatched.
        kinds, additive: see `attention_of`.

    Attributes:
        skipped: neurons that a call leaves out.
    """

    def __init__(self, forward: Callable[..., Any], place: Place, kinds: list[tuple[str, int]], additive: bool) -> None:
        self._forward, self._place, self._kinds = forward, place, kinds
        self._dtype = place.buffers[0][0].dtype if additive else None
        self._index = torch.arange(place.capacity, device=place.device)
        self._layers = [_StaticLayer(*pair, place.at) for pair in place.buffers]
        self.skipped = 0.0

    def __call__(self) -> Tensor:
        """Logits ``[rows, 1, vocabulary]`` of the place's first token, whose keys and values are written."""
        cache = Cache(layers=list(self._layers))
        share_selections(self._place.cache, cache)
        with tallied(self._note):
            output = self._forward(
                input_ids=self._place.ids[:, :1],
                position_ids=self._place.positions[:, :1],
                attention_mask=self._masks(),
                past_key_values=cache,
                use_cache=True,
            )
        return cast(Tensor, output.logits)

    def _note(self, step: Pass) -> None:
        self.skipped = step.skipped

    def _masks(self) -> Any:
        """As transformers prepares it: one mask ``[rows, 1, 1, capacity]``, or one for each type of layer."""
        behind = self._place.at - self._index
        masks = {}
        for kind, window in dict(self._kinds).items():
            visible = self._place.seen & (behind >= 0)
            if window:
                visible &= behind < window
            mask = visible[:, None, None]
            if self._dtype is not None:
                hidden = ~mask
                mask = torch.zeros_like(mask, dtype=self._dtype).masked_fill(hidden, torch.finfo(self._dtype).min)
            masks[kind] = mask
        return masks if len(masks) > 1 else next(iter(masks.values()))


def attention_of(model: Any, layers: int) -> tuple[list[tuple[str, int]], bool]:
    """Each layer's type and how far back it sees (0: all), and whether its attention adds its mask (else it takes a
    boolean one).

    Raises:
        NotCovered: masks of this model's attention are not known.
    """
    config: Any = model.config
    found = windows(config, layers)
    config = config.get_text_config()
    if any("chunk" in kind for kind in getattr(config, "layer_types", None) or []):
        raise NotCovered("its layers attend within chunks of positions")
    types = [""] * len(found) if len(set(found)) == 1 else getattr(config, "layer_types", [])
    kinds = list(zip(types, found, strict=False))
    if len(kinds) < len(found) or len(set(kinds)) > len(set(types)):
        raise NotCovered("its layers see differently far, and their types do not tell how far")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise NotCovered(f"its attention is {config._attn_implementation!r}, not 'sdpa' or 'eager'")
    return kinds, config._attn_implementation == "eager"
