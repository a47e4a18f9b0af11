"""Control vectors: directions in the residual stream along which a model's texts change (representation engineering,
Zou et al. 2023, arXiv 2310.01405, sections 3.1 and 3.2), and the file that they are kept in."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .anatomy import Anatomy
from .checks import path_of
from .errors import CoreskipError
from .files import read_bytes, write_bytes
from .fingerprint import Fingerprint
from .observe import of_this_thread
from .sealed import seal, unseal
from .skills import Texts, observed_length, run_texts

_FORMAT, _VERSION = "coreskip.control_vector", 1
_MOST_BYTES = 1 << 30
_KEY = "coreskip"  # of the sealed document in the file's metadata
METHODS = ("pca", "mean")


@dataclass(frozen=True, eq=False)
class ControlVector:
    """What `steer` adds to the residual stream.

    Attributes:
        directions: by layer, what is added to each token's hidden state after it at strength 1, fp32 ``[hidden]``.
        model: fingerprint of the model that it was made for.
        recipe: how it was made: plain JSON values. calibration: of which texts: their counts and checksums.
    """

    directions: Mapping[int, Tensor]
    model: Fingerprint
    recipe: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        depth, hidden = len(self.model.intermediate_sizes), self.model.hidden_size
        if not self.directions:
            raise CoreskipError("a control vector needs a direction for one layer at least")
        for layer, direction in self.directions.items():
            if type(layer) is not int or not 0 <= layer < depth:
                raise CoreskipError(f"the control vector is for layer {layer!r}, its model has {depth}, from 0 on")
            if direction.dtype != torch.float32 or direction.shape != (hidden,):
                raise CoreskipError(f"the control vector's direction of layer {layer} is not fp32 of shape {(hidden,)}")
            if not bool(torch.isfinite(direction).all()):
                raise CoreskipError(f"the control vector of layer {layer} holds something that is not a finite number")

    def check(self, fingerprint: Fingerprint) -> None:
        """Raise `CoreskipError` unless it was made for the model with this fingerprint."""
        self.model.require(fingerprint, "the control vector was", "run coreskip.control_vector on this model")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            CoreskipError: it cannot be written.
        """
        file = path_of(path, "a control vector")
        if file.is_dir():
            raise CoreskipError(f"{file} is a folder: give the name of a file, such as {file / 'tone.safetensors'}")
        tensors = {f"layers.{layer}": tensor.contiguous() for layer, tensor in sorted(self.directions.items())}
        tensors["model.probes"] = self.model.probes
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": self.model.document(),
            "recipe": dict(self.recipe),
            "calibration": dict(self.calibration),
            "tensors_sha256": _digest(tensors),
        }
        write_bytes(file, safetensors.torch.save(tensors, {_KEY: seal(document).decode()}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ControlVector:
        """Read what `save` has written.

        Raises:
            CoreskipError: not a control vector, of a newer format, truncated, edited or inconsistent.
        """
        file = path_of(path, "a control vector")
        try:
            data = read_bytes(file, _MOST_BYTES)
        except OSError as error:
            raise CoreskipError(f"cannot read the control vector {file}: {error.strerror}") from None
        again = "make it again with coreskip.control_vector"
        try:
            tensors = safetensors.torch.load(data)
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            text = str(metadata[_KEY]).encode()
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError):
            raise CoreskipError(f"{file} is not a control vector, or is truncated: {again}") from None
        document = unseal(text, file, kind=_FORMAT, version=_VERSION, foreign="a control vector", again=again)
        if document.get("tensors_sha256") != _digest(tensors):
            raise CoreskipError(f"{file} was edited or damaged: {again}")
        try:
            return cls._decoded(document, tensors)
        except (CoreskipError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CoreskipError(f"{file} is not a well-formed control vector ({error}): {again}") from None

    @classmethod
    def _decoded(cls, document: dict[str, Any], tensors: dict[str, Tensor]) -> ControlVector:
        fingerprint = Fingerprint.read(document["model"], tensors.pop("model.probes"))
        directions = {int(name.removeprefix("layers.")): tensor for name, tensor in tensors.items()}
        return cls(directions, fingerprint, dict(document["recipe"]), dict(document["calibration"]))

    def __repr__(self) -> str:
        norms = [float(direction.norm()) for direction in self.directions.values()]
        return (
            f"ControlVector({self.recipe.get('method', 'no method')}; {len(norms)} layers of {self.model.model_type}, "
            f"norms {min(norms):.3g} to {max(norms):.3g})"
        )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- finding them -----------------------------------------------------------------------------------------------------


def last_hidden(model: Any, anatomy: Anatomy, texts: Texts, progress: bool = True) -> list[Tensor]:
    """By layer, the residual stream after it at each text's last token, fp32 ``[texts, hidden]``. Of a longer text the
    first tokens count, see `observed_length`.

    Raises:
        CoreskipError: they are not finite.
    """
    length = observed_length(model)
    found: list[list[Tensor]] = [[] for _ in anatomy.layers]
    with _after_layers(anatomy, lambda layer, hidden: found[layer].append(hidden.reshape(-1, hidden.shape[-1])[-1])):
        run_texts(model, anatomy, [ids[None, :length] for ids in texts.ids], f"observing {texts.name}", progress)
    states = [torch.stack(rows).float().cpu() for rows in found]
    if not all(bool(torch.isfinite(each).all()) for each in states):
        raise CoreskipError(f"the model's hidden states on {texts.name} are not finite numbers: check its weights")
    return states


@contextmanager
def _after_layers(anatomy: Anatomy, see: Any) -> Iterator[None]:
    handles = []

    def hook(index: int) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            see(index, output if isinstance(output, Tensor) else output[0])

        return after

    try:
        handles += [
            layer.register_forward_hook(of_this_thread(hook(index))) for index, layer in enumerate(anatomy.layers)
        ]
        yield
    finally:
        for handle in handles:
            handle.remove()


def direction(positive: Tensor, negative: Tensor, method: str) -> Tensor:
    """The direction from one kind of texts to the other, fp32 ``[hidden]``, from their hidden states ``[texts,
    hidden]``.

    mean: the difference of the means. pca: the first principal component of the pairs' differences, each pair taken in
    both orders (the paper draws an order by chance): centred on their own mean, all pairs alike would leave nothing. It
    points from negative to positive, and is as long as the differences are along it on average: strength 1 is the same
    for both methods.
    """
    if method == "mean":
        return positive.mean(0) - negative.mean(0)
    differences = (positive - negative).double()
    component = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    along = differences @ component
    sign = -1.0 if float(along.sum()) < 0 else 1.0
    found: Tensor = (sign * along.abs().mean() * component).float()
    return found
