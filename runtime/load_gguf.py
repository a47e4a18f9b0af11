"""GGUF files as models whose matrices are the very numbers of the file, and a cache of them as packed models."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..kernels.packed import PackedLinear
from ..predictors.errors import CoreskipError, one_line
from ..predictors.files import remove_dead
from .cache import cache_folder
from .gguf_file import GgufFile, read_gguf
from .gguf_state import State, config_of, load_state, tokenizer_of
from .pack import pack
from .packed_folder import is_packed_folder
from .packed_layer import PackedLayer, PackedRows, prepare
from .skeleton import hold, left_empty, put, skeleton
from .weights import check_found, left_over_in_gguf

logger = logging.getLogger("coreskip")

_SAMPLE = 1 << 20  # bytes of a file's beginning, and of its end, by which it is known again


def model_of(file: GgufFile) -> Any:
    """The model of a file, in float32 between its matrices.

    Raises:
        CoreskipError: transformers does not know the architecture, or weights are missing or too many.
    """
    config = config_of(file)
    config.dtype = torch.float32
    with one_line(str(file.path)):
        model = skeleton(AutoModelForCausalLM._model_mapping[type(config)], config, torch.float32)
    state = load_state(file, model)
    misfits: dict[str, str] = {}
    for name, value in state.items():
        try:
            _put(model, name, value, state)
        except ValueError as error:
            misfits[name] = f"{name} ({error})"
    _tie(model)
    missing = [name for name in left_empty(model, state) if name not in misfits]
    prepare(model)
    check_found(model, file.path, missing, misfits.values(), left_over_in_gguf(model, file))
    return model


def _put(model: Any, name: str, value: PackedLinear | Tensor, state: State) -> None:
    module, _, leaf = name.rpartition(".")
    parent = model.get_submodule(module) if module else None
    if isinstance(value, Tensor) and value.dtype != torch.float32 and isinstance(parent, (nn.Linear, nn.Embedding)):
        value = PackedLinear.pack(value) if value.dim() == 2 else value
    if isinstance(value, PackedLinear):
        bias = state.get(f"{module}.bias")
        hold(model, module, [value], bias.float() if isinstance(bias, Tensor) else None, torch.float32)
    elif not (leaf == "bias" and isinstance(state.get(f"{module}.weight"), PackedLinear)):
        put(model, name, nn.Parameter(value.float(), requires_grad=False))


def _tie(model: Any) -> None:
    """An LM head that the file does not have is the embeddings' matrix."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings
    if not (tied and head.weight.is_meta) or isinstance(head, PackedLayer):
        return
    if isinstance(table, PackedRows):
        name = next(name for name, module in model.named_modules() if module is head)
        hold(model, name, [table.part()], None, torch.float32)
    else:
        head.weight = table.weight


def load_gguf(path: Path, cached: Callable[[Path], tuple[Any, Any]]) -> tuple[Any, Any]:
    """The model of a GGUF file and its tokenizer, from the cache where it has been loaded before.

    cached: loads a packed folder: its model and tokenizer.

    Raises:
        CoreskipError: the file cannot be read, or is of no model that transformers knows.
    """
    folder = cache_folder() / f"{path.stem.lower()}-{_identity(path)}"
    remove_dead(folder)
    if is_packed_folder(folder):
        try:
            return cached(folder)
        except CoreskipError as error:
            logger.warning("%s; it is made anew from %s", error, path.name)
    file = read_gguf(path)
    model, tokenizer = model_of(file), tokenizer_of(file)
    try:
        pack(model, tokenizer, folder, progress=False)
    except CoreskipError as error:
        way = "make room there, or name another folder in CORESKIP_CACHE"
        logger.warning("%s: the file is read anew each time; %s", error, way)
    return model, tokenizer


def _identity(path: Path) -> str:
    """By what a file is known again: its size, its time, and some of its bytes. To read gigabytes at each start takes
    longer than the start."""
    found = path.stat()
    digest = hashlib.sha256(f"{found.st_size} {found.st_mtime_ns}".encode())
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE))
        file.seek(max(0, found.st_size - _SAMPLE), os.SEEK_SET)
        digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:12]
