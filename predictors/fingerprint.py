"""What a Plan remembers of the model that it was made for, to refuse any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .anatomy import Anatomy, canonical_activation, dissect
from .errors import PlanError

_PROBES_PER_LAYER = 32
#: where a packed model has the fingerprint of the one that it was made from: plans are for both
KEPT = "_coreskip_fingerprint"
_MARK = "_coreskip_as_packed"  # of the linears that came with it; of the model, how many these are


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What a Plan remembers of its model: the shapes, and a sample of the weights.

    `intermediate_sizes`: neurons of each layer's MLP, 0 where it has none. `experts`: how many each layer has; empty
    where none has any.
    `probes`: fp32 ``[layers, 32]``, down-projection weights at fixed places: of a layer's experts, else of its MLP; 0
    where it has neither. Models are compared through them in the coarser of the two dtypes, so that a plan made in
    fp32 serves the same model loaded in bf16.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_sizes: tuple[int, ...]
    activation: str
    dtype: str
    probes: Tensor
    experts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _dtype(self.dtype)
        shape = (len(self.intermediate_sizes), _PROBES_PER_LAYER)
        if self.probes.dtype != torch.float32 or self.probes.shape != shape:
            raise PlanError(f"the fingerprint's weight probes are not fp32 of shape {shape}")
        if self.experts and len(self.experts) != len(self.intermediate_sizes):
            raise PlanError(f"the plan names the experts of {len(self.experts)} layers, its model has {shape[0]}")

    @classmethod
    def of(cls, model: nn.Module, anatomy: Anatomy | None = None) -> Fingerprint:
        kept = getattr(model, "__dict__", {}).get(KEPT)
        if kept is not None and vars(model).get(_MARK) in (None, _marked(model)):
            return cast(Fingerprint, kept)
        anatomy = anatomy or dissect(model)
        acts = [canonical_activation(mlp.act) for _, mlp in anatomy.present]
        gatings = [experts.gating for experts in anatomy.experts if experts is not None]
        acts += [canonical_activation(gating.act) for gating in gatings if gating is not None]
        weights = [_down(anatomy, layer) for layer in range(len(anatomy))]
        mixtures = [0 if found is None else found.count for found in anatomy.experts]
        return cls(
            model_type=anatomy.model_type,
            vocab_size=int(cast(Any, model).config.get_text_config().vocab_size),
            hidden_size=anatomy.hidden_size,
            intermediate_sizes=tuple(0 if mlp is None else mlp.intermediate_size for mlp in anatomy.feed_forwards),
            activation=next((act if isinstance(act, str) else type(act).__name__ for act in acts), ""),
            dtype=next(str(w.dtype) for w in weights if w is not None).removeprefix("torch."),
            probes=torch.stack([torch.zeros(_PROBES_PER_LAYER) if w is None else _probe(w) for w in weights]),
            experts=tuple(mixtures) if any(mixtures) else (),
        )

    def document(self) -> dict[str, Any]:
        """All but the probes, as plain JSON values."""
        fields = {name: value for name, value in vars(self).items() if name != "probes"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def read(cls, document: Mapping[str, Any], probes: Tensor) -> Fingerprint:
        """From what `document` gave, and the probes.

        Raises:
            PlanError: the numbers make no sense.
        """
        sizes = tuple(_counts(document["intermediate_sizes"]))
        experts = tuple(_counts(document.get("experts", [])))  # plans of dense models have none
        return cls(**{**document, "intermediate_sizes": sizes, "experts": experts}, probes=probes)

    def require(
        self, other: Fingerprint, what: str = "the plan was", again: str = "run `coreskip analyze` on this model"
    ) -> None:
        """Raise `PlanError` unless `other`, a model's fingerprint, is of the model this one was taken from.

        what, again: what remembers it, and how to have it for another model, for people.
        """
        for name in ("model_type", "hidden_size", "intermediate_sizes", "experts", "activation"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise PlanError(
                    f"{what} made for a model with {name} {_short(mine)}, this one has {_short(theirs)}: {again}"
                )
        coarse = max((_dtype(self.dtype), _dtype(other.dtype)), key=lambda dtype: torch.finfo(dtype).eps)
        same = self.dtype == other.dtype
        tolerance = 0.0 if same else torch.finfo(coarse).eps
        if not torch.allclose(self.probes, other.probes, rtol=tolerance, atol=0.0 if same else 1e-7):
            raise PlanError(f"{what} made for a model of this shape with other weights: {again}")


def keep(model: nn.Module, fingerprint: Fingerprint) -> None:
    """Lets a model have the fingerprint of the one that it was made from, as long as it has the linears it has now."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            setattr(module, _MARK, True)
    setattr(model, KEPT, fingerprint)
    setattr(model, _MARK, _marked(model))


def _marked(model: nn.Module) -> int:
    return sum(_MARK in vars(module) for module in model.modules() if module is not model)


def _down(anatomy: Anatomy, layer: int) -> Tensor | None:
    """A matrix by which a layer is known, ``[rows, columns]``."""
    experts, mlp = anatomy.experts[layer], anatomy.feed_forwards[layer]
    if experts is not None:
        return experts.down.flatten(0, 1)
    return None if mlp is None else mlp.matrices().down


def _probe(down: Tensor) -> Tensor:
    flat_places = torch.linspace(0, down.numel() - 1, _PROBES_PER_LAYER, dtype=torch.float64, device="cpu").long()
    rows, columns = flat_places // down.shape[1], flat_places % down.shape[1]
    return down[rows.to(down.device), columns.to(down.device)].float().cpu()


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise PlanError(f"the plan names an unknown dtype {name!r}")
    return dtype


def _counts(values: object) -> list[int]:
    if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
        raise PlanError("intermediate_sizes, or experts, is not a list of numbers of at least 0")
    return values


def _short(value: object) -> str:
    if isinstance(value, tuple) and len(set(value)) == 1:
        return f"{value[0]} in {len(value)} layers"
    return str(value)
