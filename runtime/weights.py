"""Weights and configuration must belong together: transformers fills what a checkpoint lacks with random numbers, drops
what it has too much, and says so in a log at most."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
from torch import nn
from transformers import AutoModelForCausalLM

from ..predictors.errors import CoreskipError
from .gguf_file import GgufFile, read_gguf

logger = logging.getLogger("coreskip")

# Parts that a checkpoint may have beside its language model: other senses, heads of other tasks, and layers that guess
# further tokens. A model without them generates the same text.
_BESIDE = re.compile(
    r"(^|_)(vision|visual|vpm|image|img|video|audio|speech|sound|projector|connector|resampler|talker|token2wav"
    r"|code2wav|mtp|nextn|medusa|eagle|v_head|value_head|reward_head)(_|\d|$)"
)
# Buffers that older versions saved and that are computed today.
_COMPUTED = ("inv_freq", "masked_bias", "position_ids")
_SHOWN = 1  # names per kind of fault; the rest is counted


def load_whole(source: str | Path, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """``auto.from_pretrained(source, **options)``, where every weight has its place and every place its weight.

    Raises:
        CoreskipError: weights are missing, have another shape, or have no place in the model that the configuration
            describes: a bias, a norm, another layer. Parts beside the language model may be left over: towers of
            images and sounds, their projectors, value heads, layers that guess further tokens; and whatever the
            model's class declares.
    """
    model, found = auto.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    file = Path(source) / options["gguf_file"] if "gguf_file" in options else None
    left_over = [key for key in found["unexpected_keys"] if not _may_be_left_over(model, key)]
    if file is not None:
        left_over += left_over_in_gguf(model, read_gguf(file))
    shapes = {f"{key} ({times(there)} instead of {times(here)})" for key, there, here in found["mismatched_keys"]}
    check_found(model, file or source, found["missing_keys"], shapes, left_over)
    return model


def check_found(
    model: nn.Module, source: str | Path, missing: Iterable[str], shapes: Iterable[str], left_over: Iterable[str]
) -> None:
    """Raises CoreskipError where weights of `model` are missing, of another shape, or have no place in it: their
    names."""
    faults = [
        f"{what} {_some(keys)}"
        for what, keys in (
            ("there are no weights for", missing),
            ("of another shape is", shapes),
            ("the model has no place for", left_over),
        )
        if keys
    ]
    if faults:
        raise CoreskipError(
            f"the weights in {source} are not those of the {type(model).__name__} that it describes: "
            f"{'; '.join(faults)}: fetch or save the model again"
        )


def _may_be_left_over(model: nn.Module, key: str) -> bool:
    """Whether a weight that the model has no place for changes nothing of its text."""
    *path, leaf = key.split(".")
    module = model
    for depth, name in enumerate(path):
        if not hasattr(module, name):
            in_layer = any(part.isdigit() for part in path[:depth])  # where nothing stands beside the language model
            return _BESIDE.search(name) is not None and not in_layer
        module = getattr(module, name)
    return leaf in _COMPUTED or leaf in dict(module.named_buffers(recurse=False))


def left_over_in_gguf(model: Any, file: GgufFile) -> list[str]:
    """Of a GGUF file, of which transformers takes what it knows, the layers and biases that the model has no place
    for."""
    names = list(file.tensors)
    if "rope_freqs.weight" in names:
        logger.warning("%s scales its rotary frequencies, which transformers does not read from GGUF files", file.path)
    kind = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}.get(file.architecture)
    if kind is None:
        return []
    layers = model.config.get_text_config().num_hidden_layers
    known = gguf.get_tensor_name_map(kind, layers)
    without = {
        known.get_name(name)
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None and getattr(module, "bias", None) is None
    }
    return [
        name
        for name in names
        if _layer(name) >= layers or (name.endswith(".bias") and name.removesuffix(".bias") in without)
    ]


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _some(keys: Iterable[str]) -> str:
    ordered = sorted(keys, key=_in_order)
    more = len(ordered) - _SHOWN
    return ", ".join(ordered[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _in_order(key: str) -> list[tuple[int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(int(part) if part.isdigit() else -1, part) for part in key.split(".")]


def times(size: Iterable[int]) -> str:
    return " x ".join(map(str, size))
