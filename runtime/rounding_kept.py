"""What a rounding has done so far, on disk: one that was killed goes on at the layer where it was.

A folder of the cache, named after all that the numbers depend on: each layer's tiles in a file of its own, and the
hidden states behind the last one, whose file says which layers there are and what their files hold. It goes when the
rounding is finished. What is damaged or half written is not there: the layers from it on are rounded again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..kernels.memory import allocate
from ..kernels.packed import PackedLinear
from ..predictors.anatomy import rows_of
from ..predictors.version import VERSION
from .cache import cache_folder

logger = logging.getLogger("coreskip")

_STATES = "states.safetensors"
_OLD = 7 * 24 * 3600.0  # seconds after which nobody goes on with it
Found = dict[str, tuple[PackedLinear, Tensor]]


@dataclass(frozen=True)
class Reached:
    """Hidden states behind the layers that are done; bare: see `_Call` of rounding.py, by layer."""

    layers: int
    bare: Sequence[bool]
    states: list[Tensor]
    original: list[Tensor]


class Kept:
    """One rounding's folder. about: plain values that tell the rounding from others of the same model."""

    def __init__(self, model: nn.Module, about: Any) -> None:
        key = json.dumps([VERSION, torch.__version__, _digest(model), about], sort_keys=True)
        self._folder: Path | None = cache_folder() / "rounding" / hashlib.sha256(key.encode()).hexdigest()[:24]
        self._sums: list[str] = []
        self._bare: list[bool] = []
        _remove_old(self._folder.parent)

    def reached(self) -> Reached | None:
        """Where an earlier run was; None at the beginning."""
        if self._folder is None or not (self._folder / _STATES).is_file():
            return None
        try:
            data = (self._folder / _STATES).read_bytes()
            with safetensors.safe_open(self._folder / _STATES, "pt") as file:
                about = json.loads(file.metadata()["about"])
            tensors = safetensors.torch.load(data)
            if about["sha256"] != _checksum(tensors):
                return None
            for index, expected in enumerate(about["layers"]):
                if hashlib.sha256((self._folder / _name(index)).read_bytes()).hexdigest() != expected:
                    return None
            self._sums, self._bare = list(about["layers"]), list(about["bare"])
            states, original = (list(tensors[name].split(1)) for name in ("states", "original"))
            return Reached(len(self._sums), self._bare, states, original)
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            logger.debug("the rounding so far cannot be read (%s): it begins anew", error)
            return None

    def layer(self, index: int, modules: Sequence[nn.Module], formats: Mapping[nn.Module, Sequence[str]]) -> Any:
        """What a layer's linears became, by module, as it was added."""
        assert self._folder is not None
        tensors = safetensors.torch.load_file(self._folder / _name(index))
        return {
            module: {fmt: _read(tensors, f"{place}.{fmt}", module) for fmt in formats[module]}
            for place, module in enumerate(modules)
        }

    def add(
        self, found: Mapping[nn.Module, Found], bare: bool, states: Sequence[Tensor], original: Sequence[Tensor]
    ) -> None:
        """Another layer: its linears in their order, and the hidden states behind it."""
        if self._folder is None:
            return
        tensors: dict[str, Tensor] = {}
        for place, of_module in enumerate(found.values()):
            for fmt, (packed, error) in of_module.items():
                tensors |= {f"{place}.{fmt}.tiles": packed.weight, f"{place}.{fmt}.error": error}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            data = safetensors.torch.save(tensors)
            _write(self._folder / _name(len(self._sums)), data)
            self._sums.append(hashlib.sha256(data).hexdigest())
            self._bare.append(bare)
            both = {"states": torch.cat(list(states)), "original": torch.cat(list(original))}
            about = {"layers": self._sums, "bare": self._bare, "sha256": _checksum(both)}
            _write(self._folder / _STATES, safetensors.torch.save(both, {"about": json.dumps(about)}))
        except (OSError, safetensors.SafetensorError) as error:
            logger.warning("what is rounded is not kept in %s (%s): killed, it would begin anew", self._folder, error)
            self.remove()

    def remove(self) -> None:
        """The rounding is finished."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None


def _name(index: int) -> str:
    return f"layer-{index:04}.safetensors"


def _read(tensors: Mapping[str, Tensor], name: str, module: nn.Module) -> tuple[PackedLinear, Tensor]:
    tiles, (weight, bias) = tensors[f"{name}.tiles"], rows_of(module)
    aligned = allocate(tuple(tiles.shape), tiles.dtype, tiles.device).copy_(tiles)
    bias = None if bias is None else bias.detach().float().clone()
    packed = PackedLinear(aligned, weight.shape[1], bias=bias, rows=weight.shape[0])
    return packed, tensors[f"{name}.error"]


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all. Not waiting for the disk: after a loss of power, checksums tell."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(data)
    os.replace(draft, path)


def _remove_old(folder: Path) -> None:
    for path in folder.glob("*"):
        try:
            if time.time() - path.stat().st_mtime > _OLD:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(model: nn.Module) -> str:
    """A checksum of every weight. 0.4 s for half a gigabyte."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
