"""A GGUF file as transformers understands it: configuration, tokenizer, and the weights under its parameters' names,
matrices of the common types in the very numbers of the file."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers import modeling_gguf_pytorch_utils as tables

from ..kernels import cpu
from ..kernels.groups import OF_GGUF
from ..kernels.packed import PackedLinear
from ..predictors.errors import CoreskipError, one_line
from .gguf_file import GgufFile, GgufTensor

log = logging.getLogger("coreskip")

_ARRAY = 9  # the type of metadata, in the gguf package's numbers


class NotAsItIs(CoreskipError):
    """transformers loads an architecture in a way of its own, dequantised."""


State = dict[str, "PackedLinear | Tensor"]


def config_of(file: GgufFile) -> PreTrainedConfig:
    """The configuration that transformers reads from the file's metadata.

    Raises:
        CoreskipError: it cannot be read, in one line.
    """
    with _read_here(file), one_line(f"{file.path}"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(file.path.parent), gguf_file=file.path.name)
    return config


def tokenizer_of(file: GgufFile) -> Any:
    """The tokenizer that transformers builds from the file's metadata. Raises as `config_of`."""
    with _read_here(file), one_line(f"the tokenizer of {file.path}"):
        return AutoTokenizer.from_pretrained(str(file.path.parent), gguf_file=file.path.name)


def load_state(file: GgufFile, model: nn.Module | PreTrainedConfig, *, whole: bool = True) -> State:
    """The file's weights under the names of a transformers model's parameters.

    Args:
        model: of transformers, on any device, as on "meta": its names and its configuration are read. Or the
            configuration alone.
        whole: inputs meet the packed matrices in float32, not rounded to 8 bits; see `PackedLinear`.

    Returns:
        Matrices of `OF_GGUF`'s types as `PackedLinear`, the embedding's among them, whose rows `cpu.untile` gives. All
        others as tensors of their own memory: float32, float16 and bfloat16 as they are in the file, further types in
        float32, as transformers loads them. Rows are permuted to transformers' order where it does so. What the model
        has no name for is left out, as transformers leaves it out.

    Raises:
        CoreskipError: transformers does not know the architecture; `NotAsItIs` where it loads it in a way of its own.
    """
    architecture = file.architecture
    if _has_its_own_way(architecture):
        raise NotAsItIs(f"matrices of {architecture} are not read from GGUF files as they are")
    if isinstance(model, PreTrainedConfig):
        with torch.device("meta"), one_line(f"{file.path}"):
            skeleton: nn.Module = AutoModelForCausalLM.from_config(model)
    else:
        skeleton = model
    with one_line(f"{file.path}"):
        return _Conversion.of(file, skeleton, whole).state()


def _has_its_own_way(architecture: str) -> bool:
    return bool(import_module("transformers.integrations.gguf").is_gguf_arch_supported(architecture))


@dataclass(frozen=True, eq=False)
class _Conversion:
    """From a file's names and tensors to those of transformers."""

    file: GgufFile
    processor: Any
    names: dict[str, str]  # from the file's to transformers'
    parsed: dict[str, Any]  # what processors add tensors to
    whole: bool

    @classmethod
    def of(cls, file: GgufFile, model: nn.Module, whole: bool) -> _Conversion:
        with _read_here(file):
            parsed = tables.load_gguf_checkpoint(str(file.path))
            kind: Any = tables.TENSOR_PROCESSORS.get(file.architecture, tables.TensorProcessor)
            processor = kind(config=parsed["config"])
            names = tables.get_gguf_hf_weights_map(model, processor)
        return cls(file, processor, names, parsed | {"tensors": {}}, whole)

    def state(self) -> State:
        found: State = {}
        others: set[str] = set()
        for tensor in self.file.tensors.values():
            name = self.names.get(tensor.name)
            if name is None and len(tensor.shape) < 3:
                continue  # of experts, which are named together, a processor knows the names
            moved, order = self._row_order(tensor)
            weight = self._as_it_is(tensor, order) if moved else None
            if weight is None:
                others |= {tensor.kind} - {"F32", "F16", "BF16"}
                name, weight = self._processed(tensor)
            if name is not None:
                found[name] = weight
        if others:
            log.warning("%s: weights of %s are held in float32", self.file.path, ", ".join(sorted(others)))
        added: State = self.parsed["tensors"]
        return found | added

    def _as_it_is(self, tensor: GgufTensor, order: Tensor | None) -> PackedLinear | Tensor | None:
        """The file's very numbers, row by row; None: they have no such form."""
        if len(tensor.shape) == 2 and tensor.kind in OF_GGUF:
            return cpu.tiles_of_gguf(tensor.raw, tensor.kind, order, whole=self.whole)
        floats = tensor.floats()
        return floats if floats is None or order is None else floats[order]

    def _processed(self, tensor: GgufTensor) -> tuple[str | None, Tensor]:
        done = self._process(tensor.dequantised(), tensor.name)
        return self.names.get(done.name), torch.from_numpy(np.array(done.weights))

    def _row_order(self, tensor: GgufTensor) -> tuple[bool, Tensor | None]:
        """Whether transformers does no more than to move rows, and which row comes where; None: all stay.

        Found by what becomes of the rows' numbers: whatever else is done to weights leaves other numbers, another shape
        or another name.
        """
        if not tensor.shape:
            return False, None
        rows = tensor.shape[0]
        numbers = np.arange(rows, dtype=np.float64).reshape(rows, *[1] * (len(tensor.shape) - 1))
        added = set(self.parsed["tensors"])
        try:
            done = self._process(numbers.copy(), tensor.name)
        except Exception:  # it wants all columns
            return False, None
        finally:
            for name in set(self.parsed["tensors"]) - added:
                del self.parsed["tensors"][name]
        if done.name != tensor.name or done.weights.shape != numbers.shape:
            return False, None
        order = np.asarray(done.weights).reshape(rows)
        if np.array_equal(order, numbers.reshape(rows)):
            return True, None
        if not np.array_equal(np.sort(order), numbers.reshape(rows)):
            return False, None
        return True, torch.from_numpy(order.astype(np.int64))

    def _process(self, weights: np.ndarray[Any, Any], name: str) -> Any:
        return self.processor.process(
            weights=weights, name=name, tensor_key_mapping=self.names, parsed_parameters=self.parsed
        )


# --- transformers' own reading of metadata


@dataclass(frozen=True)
class _Field:
    """A metadata value as the gguf package's reader hands it to transformers."""

    parts: list[Any]
    types: list[int]
    data: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, value: Any) -> _Field:
        if isinstance(value, list) and len(value) == 1:
            value = value[0]  # as transformers takes a list of one
        if isinstance(value, list):
            return cls([value], [_ARRAY])  # an array without a type of its own is taken as it is
        if isinstance(value, str):
            return cls([value.encode()], [int(gguf.GGUFValueType.STRING)])
        kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.INT64, float: gguf.GGUFValueType.FLOAT64}
        return cls([np.array([value])], [int(kinds[type(value)])])


class _Fields:
    """A `GgufFile` where transformers expects the gguf package's reader, of which it reads these two alone."""

    def __init__(self, file: GgufFile) -> None:
        self.fields = {key: _Field.of(value) for key, value in file.metadata.items()}
        self.tensors = list(file.tensors.values())


_replacing = threading.RLock()


@contextmanager
def _read_here(file: GgufFile) -> Iterator[None]:
    """Has transformers read this file's metadata from `file`: its conversion of configurations, with all that is
    peculiar to an architecture, takes a path, and reads 5 s for 0.05. And has it make the map of names once, not once
    for each module: 9 s of the embedded model's."""
    package: Any = gguf
    with _replacing:
        slow, name_map = package.GGUFReader, package.get_tensor_name_map

        def reader(path: Any, *args: Any, **options: Any) -> Any:
            ours = os.path.realpath(path) == os.path.realpath(file.path)
            return _Fields(file) if ours else slow(path, *args, **options)

        package.GGUFReader, package.get_tensor_name_map = reader, cache(name_map)
        try:
            yield
        finally:
            package.GGUFReader, package.get_tensor_name_map = slow, name_map
