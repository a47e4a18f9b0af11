"""`control_vector`: the direction from one kind of texts to another, in a model's residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..predictors.anatomy import check_model, dissect
from ..predictors.calibration import check_tokenizer
from ..predictors.control_vectors import METHODS, ControlVector, direction, last_hidden
from ..predictors.errors import CoreskipError
from ..predictors.fingerprint import Fingerprint
from ..predictors.skills import SomeTexts, Texts, check_contrast, checked_layers
from .steer import is_steered
from .unknown import refuses_unknown
from .wrap import make_way


@refuses_unknown
def control_vector(
    model: Any,
    tokenizer: Any,
    *,
    positive: SomeTexts,
    negative: SomeTexts,
    method: str = "pca",
    layers: Sequence[int] | None = None,
    progress: bool = True,
) -> ControlVector:
    """Find what lies between two kinds of texts in a model's residual stream at their last tokens.

    Args:
        model, tokenizer: from `load`, or any causal LM and its tokenizer; neither wrapped nor steered.
        positive: texts of the kind that `steer` leads to. negative: of the other one.
        method: ``pca``: the first principal component of the differences between pairs, text i of one list and text i
            of the other, which had best differ in nothing else; ``mean``: the difference of the means, for which texts
            need not be pairs. See `predictors.control_vectors.direction`.
        layers: after which to look; by default all.

    Raises:
        CoreskipError: lists that are empty, the same, or for pca no pairs; no such layer or method; texts that the
            model's hidden states do not tell apart. Nothing was changed.
    """
    if method not in METHODS:
        raise CoreskipError(f"method is {method!r}; choose from {', '.join(METHODS)}")
    check_model(model)
    check_tokenizer(tokenizer)
    kinds = Texts.of("positive", positive, tokenizer), Texts.of("negative", negative, tokenizer)
    counts = [len(kind.ids) for kind in kinds]
    if method == "pca" and counts[0] != counts[1]:
        raise CoreskipError(
            f"pca compares pairs, and there are {counts[0]} positive and {counts[1]} negative texts: give as many of "
            "each, or method='mean'"
        )
    check_contrast(*kinds)
    make_way(model)
    if is_steered(model):
        raise CoreskipError("the model is steered already: call coreskip.unwrap(model) first")
    anatomy = dissect(model)
    wanted = range(len(anatomy)) if layers is None else checked_layers(layers, len(anatomy))
    states = [last_hidden(model, anatomy, kind, progress) for kind in kinds]
    found = {index: direction(states[0][index], states[1][index], method) for index in wanted}
    if not all(float(each.norm()) > 0 for each in found.values()):
        raise CoreskipError("the model's hidden states do not tell positive from negative texts: give other ones")
    calibration = {kind.name: kind.fingerprint() for kind in kinds}
    return ControlVector(found, Fingerprint.of(model, anatomy), {"method": method}, calibration)
