"""Models whose passes depend on how long the text has become, and not on the tokens' positions alone.

Drafts extend beyond the text, and one pass verifies several tokens. Neither gives what passes over one token give where
the model looks at the longest position:
- dynamic NTK scaling makes its rotary frequencies anew for every length and keeps those of the longest text seen, so
  that a rejected draft leaves other frequencies behind;
- longrope has one set of frequencies up to a length and another beyond it;
- Phi-3 also drops its KV cache at that length and computes it anew.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from transformers.generation.utils import GenerationMixin

from .spec import STATIC_ROPE

#: Modules of transformers whose models prepare the inputs of a step as every model does, but for a prompt's images and,
#: in the Phi families, a KV cache that is dropped where the text outgrows `original_max_position_embeddings`.
_PREPARE_AS_USUAL = tuple(
    f"transformers.models.{name}.modeling_{name}"
    for name in ("phi3", "phi4_multimodal", "gemma3", "gemma3n", "exaone4_5")
)

_ROTARY: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()


def length_dependence(model: Any, ids: Tensor, arguments: dict[str, Any]) -> str | None:
    """Why passes over several of the tokens that a call of ``model._sample`` generates from `ids` ``[1, length]`` may
    differ from passes over each token alone, or why the model prepares its passes in a way of its own; None where
    neither holds.

    arguments: the call's other arguments by name.
    """
    prepare = getattr(model.prepare_inputs_for_generation, "__func__", None)
    own = prepare is not GenerationMixin.prepare_inputs_for_generation
    if own and getattr(prepare, "__module__", None) not in _PREPARE_AS_USUAL:
        return "the model prepares the inputs of a step in its own way"
    longest = max(arguments["generation_config"].max_length or 0, arguments["stopping_criteria"].max_length or 0)
    for changing, length, settles in _changes(model, own):
        if longest > length and not (settles and ids.shape[1] > length):
            return f"{changing} change with the length of the text, which may pass {length} tokens"
    return None


def _changes(model: Any, own: bool) -> list[tuple[str, int, bool]]:
    """What changes, the length of the text at which that starts, and whether it stays the same beyond that length.

    own: whether the model prepares its inputs by a method of its own.
    """
    found: list[tuple[str, int, bool]] = []
    if model not in _ROTARY:  # the search takes half a millisecond where a model has 500 modules
        _ROTARY[model] = [module for module in model.modules() if "rope_type" in vars(module)]
    for module in _ROTARY[model]:
        kinds = module.rope_type if isinstance(module.rope_type, dict) else {None: module.rope_type}
        for layer_type, kind in kinds.items():
            name = f"rotary embeddings of type {kind}"
            if kind == "longrope":
                scaling = module.config.rope_parameters
                scaling = scaling if layer_type is None else scaling[layer_type]
                found.append((name, int(scaling["original_max_position_embeddings"]), True))
            elif "dynamic" in kind:
                found.append((name, int(module.original_max_seq_len), False))
            elif kind not in STATIC_ROPE:
                found.append((name, 0, False))
    drops_at = getattr(model.config, "original_max_position_embeddings", None)
    if own and isinstance(drops_at, int):
        found.append(("the entries of its KV cache", drops_at, True))
    return found
