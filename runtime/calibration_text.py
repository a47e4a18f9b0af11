"""Text that the model writes for its own calibration: sampled on the fast path, and kept on disk for the next time."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.packed import PackedLinear
from ..kernels.residency import copied
from ..predictors.calibration import TokenText, check_tokenizer, sample_text
from ..predictors.checks import check_seed
from ..predictors.errors import CoreskipError
from ..predictors.files import read_text, write_text
from ..predictors.version import VERSION
from .cache import cache_folder
from .packed_experts import HeldExperts
from .packed_layer import PackedLayer, PackedRows, StandIn
from .wrap import make_way, wrap

logger = logging.getLogger("coreskip")

_MOST = 64  # texts that are kept, some 50 KB each; the one that was not used for longest goes


def model_text(model: Any, tokenizer: Any, *, tokens: int, length: int, seed: int, progress: bool = True) -> TokenText:
    """What `sample_text` gives for these arguments; from the cache, where the same model has written it before.

    The model must not be wrapped: it is for the time that sampling takes, where it can be.
    """
    check_seed(seed)
    check_tokenizer(tokenizer)
    make_way(model)
    special = [getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")]
    key = f"{VERSION} {_digest(model)} {special} {tokens} {length} {seed}"
    file = cache_folder() / "texts" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    ids = _read(file, key)
    if ids is None:
        text = _sample(model, tokenizer, tokens, length, seed, progress)
        _write(file, key, text.ids.tolist())
        return text
    return TokenText.sampled(torch.tensor(ids, dtype=torch.int64, device="cpu"), tokenizer, seed)


def _sample(model: Any, tokenizer: Any, tokens: int, length: int, seed: int, progress: bool) -> TokenText:
    try:
        wrapped: Any = wrap(model)
    except CoreskipError as reason:
        logger.debug("text is sampled on plain transformers: %s", reason)
        wrapped = nullcontext()
    with wrapped:
        return sample_text(model, tokenizer, tokens=tokens, length=length, seed=seed, progress=progress)


def _digest(model: Any) -> str:
    """A checksum of all that the text depends on: the configuration and every weight. 0.4 s for half a gigabyte."""
    digest = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device.type}".encode())
        if not isinstance(tensor, StandIn):
            digest.update(_bytes(tensor))
    for name, part in _packed(model):
        digest.update(f"{name} {part!r}".encode())
        digest.update(_bytes(copied(part).weight))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _packed(model: Any) -> Iterator[tuple[str, PackedLinear]]:
    """Matrices that exist in packed form alone, whose parameters hold no numbers."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer):
            yield from ((name, part) for part in module.parts())
        elif isinstance(module, PackedRows):
            yield name, module.part()
        elif isinstance(module, HeldExperts):
            for expert in module.experts():
                yield from ((name, part) for part in (expert.gate, expert.up, expert.down) if part is not None)


def _read(file: Path, key: str) -> list[int] | None:
    """The token ids that are kept; None where there are none, or what is there is damaged or of another key."""
    if not file.is_file():
        return None
    try:
        found = json.loads(read_text(file, "the cached text"))
        ids = found["ids"]
        if found["key"] == key and found["sha256"] == _checksum(ids) and all(type(id) is int for id in ids):
            file.touch()
            return list(ids)
    except (CoreskipError, OSError, ValueError, KeyError, TypeError):
        pass
    logger.debug("%s is damaged: the text is sampled anew", file)
    return None


def _write(file: Path, key: str, ids: list[int]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"key": key, "sha256": _checksum(ids), "ids": ids}))
        kept = sorted(file.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for path in kept[:-_MOST]:
            path.unlink(missing_ok=True)
    except (CoreskipError, OSError) as error:  # the text is there; it is sampled again the next time
        logger.debug("the sampled text is not kept: %s", error)


def _checksum(ids: list[int]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()
