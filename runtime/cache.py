"""The embedded model as fp32 safetensors in a cache folder: its GGUF file takes a quarter of a minute to dequantise."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..predictors.errors import CoreskipError
from ..predictors.files import remove_dead, replaced_folder, write_durably

logger = logging.getLogger("coreskip")

_SIZES = "sizes.json"  # of the other files, in bytes: written last
_Load = Callable[[Path, "torch.dtype | None"], tuple[Any, Any]]


def load_cached(gguf: Path, dtype: torch.dtype | None, read: _Load, load: _Load) -> tuple[Any, Any]:
    """The model of a GGUF file and its tokenizer, from the cache, which is filled first where it has no whole copy.

    A copy with a truncated or missing file, or one that does not load, is made anew. Where that cannot be, for want of
    room or permission, the GGUF file itself is read, and a warning says so.

    Args:
        read: loads from a GGUF file, `load` from a folder.
    """
    folder = cache_folder() / f"{gguf.stem.lower()}-{_digest(gguf)[:12]}"
    remove_dead(folder)
    try:
        if not _whole(folder):
            _fill(folder, gguf, read)
        try:
            return load(folder, dtype or torch.float32)
        except CoreskipError as error:
            logger.warning("%s; it is made anew from %s", error, gguf.name)
            _fill(folder, gguf, read)
        return load(folder, dtype or torch.float32)
    except (OSError, SafetensorError) as error:  # safetensors has errors of its own for a full disk
        logger.warning(
            "cannot cache the dequantised model in %s (%s): it is dequantised anew each time; make room there, or name "
            "another folder in CORESKIP_CACHE",
            folder,
            error,
        )
        return read(gguf, dtype)


def cache_folder() -> Path:
    """``$CORESKIP_CACHE``, or ``coreskip`` in the user's folder for caches."""
    chosen = os.environ.get("CORESKIP_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coreskip"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _whole(folder: Path) -> bool:
    """Whether every file is there in full, by its size: a checksum of half a gigabyte would take longer than loading
    it."""
    try:
        sizes = json.loads((folder / _SIZES).read_bytes())
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _fill(folder: Path, gguf: Path, read: _Load) -> None:
    """Save the GGUF's weights as fp32 safetensors: 4-bit weights times fp16 scales are exact in fp32 only."""
    with replaced_folder(folder) as draft:
        model, tokenizer = read(gguf, torch.float32)
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        sizes = {path.name: path.stat().st_size for path in draft.iterdir()}
        write_durably(draft / _SIZES, json.dumps(sizes).encode())
