"""A model with rounded linears in its own place: what it is once it has been packed, without the folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from ..kernels.packed import PackedLinear
from ..predictors.anatomy import Anatomy, dissect, rows_of
from ..predictors.checks import AS_PACKED
from ..predictors.fingerprint import KEPT, Fingerprint
from ..predictors.plan import PACKED_AS, Plan
from .bundles import Weights
from .calls import NotCovered
from .packed_layer import PackedLayer
from .reading import read_spec
from .rounding import Rounded
from .spec import LinearSpec
from .wrap import wrapped


@contextmanager
def rounded_in_place(model: Any, found: Iterable[Rounded], packed_as: str = "int4") -> Iterator[None]:
    """Inside, the model is the one that comes back from a folder that it is packed in with these numbers: it prefills
    and decodes as that one does, by native steps, too. Afterwards it is bit for bit what it was.

    The model must not be wrapped.
    """
    rows = rows_of_parts(model, dissect(model))
    notes = {KEPT: Fingerprint.of(model), PACKED_AS: packed_as}
    before = {name: vars(model).get(name) for name in notes}
    exchanged: dict[str, nn.Module] = {}
    try:
        for each in found:
            _, bias = rows_of(each.module)
            parts = split(each.packed, rows.get(each.module, (each.packed.out_features,)))
            dtype = each.module.weight.dtype
            layer = PackedLayer(parts, None if bias is None else bias.detach(), dtype)  # type: ignore[arg-type]
            exchanged[each.name] = each.module
            model.set_submodule(each.name, layer.train(each.module.training))
        for name, value in notes.items():
            setattr(model, name, value)
        yield
    finally:
        for name, module in exchanged.items():
            model.set_submodule(name, module)
        for name, old in before.items():
            vars(model).pop(name, None)
            if old is not None:
                setattr(model, name, old)


@contextmanager
def decoding_rounded(model: Any, found: Iterable[Rounded]) -> Iterator[None]:
    """Inside, the model is in place of that packed one and wrapped: decode steps have inputs in 8 bits, too."""
    with rounded_in_place(model, found), _wrapped(model):
        yield


def _wrapped(model: Any) -> AbstractContextManager[Any]:
    return wrapped(model, Plan.dense(model, AS_PACKED), Weights(dissect(model)))


def split(packed: PackedLinear, rows: tuple[int, ...]) -> list[PackedLinear]:
    """A matrix in parts of so many rows; whole where a tile has rows of two of them."""
    parts, first = [], 0
    for count in rows:
        part = packed.part(first, count)
        if part is None:
            return [packed]
        parts.append(part)
        first += count
    return parts


def rows_of_parts(model: Any, anatomy: Anatomy) -> dict[nn.Module, tuple[int, ...]]:
    """Of linears that hold several projections, how many rows each has, as the native step takes them apart."""
    try:
        linears: Iterable[LinearSpec] = read_spec(model, anatomy).linears
        return {linear.module: linear.rows for linear in linears if linear.rows is not None}
    except NotCovered:
        return {}
