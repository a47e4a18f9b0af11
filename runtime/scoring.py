"""`scores`: what each neuron, expert or head of a model is worth, by any source."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor

from ..predictors import (
    features,
    lm_head,
    sources_activation,
    sources_contrast,
    sources_gradient,
)
from ..predictors.anatomy import check_model, dissect
from ..predictors.calibration import TokenText, check_tokenizer, most_positions, text_of
from ..predictors.checks import check_count, check_seed
from ..predictors.errors import CoreskipError
from ..predictors.fingerprint import Fingerprint
from ..predictors.observe import inference
from ..predictors.scores import NeuronScores
from ..predictors.sources import AGAINST, SOURCES, Reading, Source, Wants
from .calibration_text import model_text
from .unknown import closest
from .wrap import make_way

#: imported because importing them registers their sources
REGISTERED = (sources_activation, sources_gradient, sources_contrast, lm_head, features)

Text = str | os.PathLike[str] | TokenText
_LEAST = 8  # tokens of a row of text


def scores(
    model: Any,
    tokenizer: Any,
    text: Text | Mapping[str, Text] | None = None,
    *,
    method: str = "griffin",
    against: Text | None = None,
    tokens: int = 16384,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> NeuronScores:
    """What each neuron of `model` is worth, by one measure; see the sources' own docstrings for their definitions.

    Args:
        model, tokenizer: from `load`, or any causal LM and its tokenizer.
        text: what is read: a text, or the `Path` of a UTF-8 file; None samples some from the model itself. Sources that
            compare languages take several by name: ``{"en": ..., "fr": ...}``.
        method: by activations ``griffin``, ``signed``, ``magnitude``, ``magnitude_down``, ``wanda``, ``snmf``; by
            gradients ``taylor``, ``smooth_gradient``, ``hessian``, ``bigram``; by contrast, with `against`,
            ``mean_difference`` and ``relation``, with several texts ``lape``; of weights ``lm_head``; of experts
            ``reap`` and ``frequency``; of heads and whole MLPs ``ablation``.
        against: the text that `text` is held against.
        tokens: at most this many of each text are read.
        seed: of whatever a source draws, and of sampled text.
        options: the source's own fields.

    Raises:
        CoreskipError: before any work is done where an argument is wrong; texts that are too short, or the same;
            numbers that came out as NaN or infinity.
    """
    chosen = source_of(method, options)
    check_count("tokens", tokens, _LEAST)
    check_seed(seed)
    check_model(model)
    check_tokenizer(tokenizer)
    make_way(model)
    texts = _texts(model, tokenizer, chosen, text, against, tokens, seed, progress)
    return scored(model, chosen, texts, tokens=tokens, seed=seed, progress=progress)


def scored(
    model: Any, source: Source, texts: Mapping[str, TokenText], *, tokens: int, seed: int = 0, progress: bool = True
) -> NeuronScores:
    """`scores` of an unwrapped model by a source, from the texts that it wants, by name."""
    rows = {name: _rows(model, each, source.window, tokens, name) for name, each in texts.items()}
    prefix = next((each.prefix for each in texts.values()), torch.zeros(0, dtype=torch.int64))
    reading = Reading(model, dissect(model), rows, prefix, seed, progress)
    with inference(model):
        layers = [layer.detach().float().cpu() for layer in source.score(reading)]
    about = {name: each.fingerprint() for name, each in texts.items()}
    options: dict[str, Any] = {each.name: getattr(source, each.name) for each in fields(cast(Any, source))}
    calibration = about["text"] if set(about) == {"text"} else about
    recipe = {"method": source.name, **options, "seed": seed}
    return NeuronScores(tuple(layers), Fingerprint.of(model), source.unit, recipe, calibration)


def source_of(method: str, options: Mapping[str, Any]) -> Source:
    """The source of this name, with these options.

    Raises:
        CoreskipError: there is no such source, or it has no such option.
    """
    if not isinstance(method, str) or method not in SOURCES:
        raise CoreskipError(f"unknown method {method!r}: {closest(str(method), set(SOURCES))}")
    known = {each.name for each in fields(SOURCES[method])}
    for name in options:
        if name not in known:
            hint = closest(name, known) if known else "it has none"
            raise CoreskipError(f"the method {method} has no option {name!r}: {hint}")
    chosen: Source = SOURCES[method](**options)
    chosen.check()
    return chosen


def _texts(
    model: Any, tokenizer: Any, chosen: Source, text: Any, against: Any, tokens: int, seed: int, progress: bool
) -> dict[str, TokenText]:
    """The texts that a source wants, by name."""
    wants, name = chosen.wants, chosen.name
    if wants is not Wants.CONTRAST and against is not None:
        raise CoreskipError(f"{name} holds no text against another: leave out against")
    if wants is Wants.NOTHING:
        if text is not None:
            raise CoreskipError(f"{name} reads the weights alone: leave out the text")
        return {}
    if isinstance(text, Mapping) != (wants is Wants.TEXTS):
        several = wants is Wants.TEXTS
        hint = 'several by name, text={"en": ..., "fr": ...}' if several else "one, as a str or the Path of a file"
        raise CoreskipError(f"{name} takes {'several texts' if several else 'one text'}: give {hint}")
    if isinstance(text, Mapping):
        if len(text) < 2:
            raise CoreskipError(f"{name} compares texts: give two of them at least")
        if not all(isinstance(key, str) for key in text):
            raise CoreskipError(f"{name} takes texts by name, and a name is a str")
        found = {key: text_of(tokenizer, value) for key, value in text.items()}
    elif text is None and wants is Wants.TEXT:
        found = {"text": model_text(model, tokenizer, tokens=-(-tokens // 2), length=256, seed=seed, progress=progress)}
    else:
        if text is None or (wants is Wants.CONTRAST and against is None):
            raise CoreskipError(f"{name} holds one text against another: give text and against")
        found = {"text": text_of(tokenizer, text)}
        if wants is Wants.CONTRAST:
            found[AGAINST] = text_of(tokenizer, against)
    check_different(found)
    return found


def check_different(texts: Mapping[str, TokenText]) -> None:
    """Raise `CoreskipError` where two of the texts are the same."""
    names = list(texts)
    for index, name in enumerate(names):
        for other in names[:index]:
            if torch.equal(texts[name].ids, texts[other].ids):
                raise CoreskipError(f"{other} and {name} are the same text: nothing tells them apart")


def _rows(model: Any, text: TokenText, window: int, tokens: int, name: str) -> Tensor:
    length = min(window, most_positions(model, window), len(text.ids) + len(text.prefix), tokens)
    if length < _LEAST:
        raise CoreskipError(
            f"the text ({name if name != 'text' else text.source}) has {len(text.ids)} tokens, {_LEAST} are needed at "
            "least and some thousands are good: give a longer one"
        )
    return text.windows(length, max(1, tokens // length))
