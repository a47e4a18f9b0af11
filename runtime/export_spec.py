"""The description of a model for formats that know fewer kinds of decoders than native steps do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..predictors.anatomy import dissect
from .calls import NotCovered
from .reading import read_spec
from .spec import AttentionSpec, LayerSpec, ModelSpec, beside_its_halves


def plain_spec(model: Any) -> ModelSpec:
    """Describes a decoder of the kind that Llama is: one stream, turned or untouched positions, grouped-query attention
    whose q, k and v lie apart or one after the other, one MLP a layer.

    Raises:
        NotCovered: it is none, or is not described.
    """
    with _heard(model):
        spec = read_spec(model, dissect(model))
    if spec.places is not None:
        raise NotCovered("it adds embeddings of positions")
    if spec.embedding_norm is not None or spec.norm is None:
        raise NotCovered("its embeddings are normed, or what the LM head reads is not")
    more = beside_its_halves(spec)
    if more is not None:
        raise NotCovered(more)
    for layer in spec.layers:
        attention_of(layer)
        if layer.experts is not None:
            raise NotCovered("mixtures of experts are not written")
        if any(brick.norm is not None for brick in layer.bricks):
            raise NotCovered("its MLPs norm all activations")
        if layer.attention_after is not None or layer.mlp_after is not None:
            raise NotCovered("its layers norm the residual stream itself")
    return spec


def attention_of(layer: LayerSpec) -> AttentionSpec:
    """The attention of a layer, where it is of that kind. Raises as `plain_spec`."""
    found = layer.attention
    if not isinstance(found, AttentionSpec):
        raise NotCovered("its attention keeps latents")
    if found.order is not None:
        raise NotCovered("q, k and v lie in turn in one matrix")
    if found.turned or found.slopes is not None or found.sinks is not None:
        raise NotCovered("its attention norms what was turned, or has biases or sinks among its scores")
    if found.inside:
        raise NotCovered("heads of its attention have gates, or norms stand inside")
    return found


@contextmanager
def _heard(model: nn.Module) -> Iterator[None]:
    """Inside, matrices of zeros have other numbers: what a layer does is read from what it gives, and of a half that is
    skipped nothing comes."""
    generator = torch.Generator().manual_seed(0)
    silent = [
        m for m in model.modules() if (w := m._parameters.get("weight")) is not None and w.ndim == 2 and not w.any()
    ]
    before = [module._parameters["weight"] for module in silent]
    try:
        for module, zeros in zip(silent, before, strict=True):
            assert zeros is not None
            noise = torch.randn(zeros.shape, generator=generator, dtype=torch.float32, device="cpu") / 30
            module._parameters["weight"] = nn.Parameter(noise.to(zeros.dtype), requires_grad=False)
        yield
    finally:
        for module, zeros in zip(silent, before, strict=True):
            module._parameters["weight"] = zeros
