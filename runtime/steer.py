"""`steer`: a control vector is added to a model's residual stream, in prompts and decode steps alike.

The vector is added by hooks of the decoder layers. Whoever runs steps natively sees hooks and leaves these steps to the
model's own modules: so a steered model may be wrapped, a wrapped one steered, and either undone first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..predictors.anatomy import Anatomy, check_model, dissect
from ..predictors.checks import check_number, kind_of
from ..predictors.control_vectors import ControlVector
from ..predictors.errors import CoreskipError
from ..predictors.fingerprint import Fingerprint
from .delegates import generator_of
from .unknown import refuses_unknown
from .wrapping import ATTRIBUTE

_STEERINGS = "_coreskip_steerings"


class _Addition:
    """A hook of one decoder layer: its hidden states go on with `direction`, fp32 ``[hidden]``, added."""

    def __init__(self, direction: Tensor) -> None:
        self._direction = direction
        self._as: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        kind = hidden.dtype, hidden.device
        if kind not in self._as:
            self._as[kind] = self._direction.to(hidden)
        moved = hidden + self._as[kind]
        return moved if isinstance(output, Tensor) else (moved, *output[1:])


class Steering:
    """A control vector at work on a model; a context manager that takes it off at the end."""

    def __init__(self, model: nn.Module, layers: Iterable[tuple[nn.Module, Tensor]]) -> None:
        self._model = model
        self._handles = [layer.register_forward_hook(_Addition(direction)) for layer, direction in layers]
        vars(model).setdefault(_STEERINGS, []).append(self)

    def close(self) -> None:
        """Take it off; of no effect afterwards."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        active = vars(self._model).get(_STEERINGS, [])
        if self in active:
            active.remove(self)
            if not active:
                del vars(self._model)[_STEERINGS]

    def __enter__(self) -> Steering:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@refuses_unknown
def steer(model: Any, vector: ControlVector, strength: float = 1.0, *, layers: Sequence[int] | None = None) -> Steering:
    """Steer `model` along `vector` from now on: whatever it computes, with or without a plan, in prompts and decode
    steps. Several vectors add up. Decode steps then run on the model's own modules.

    Args:
        model: a causal LM, wrapped or not; changed in place.
        vector: from `control_vector`, made for this model.
        strength: what the vector is multiplied by; below 0 it points the other way. At 1, in one layer, hidden states
            move by what lies between the two kinds of texts on average.
        layers: after which it is added; by default after the middle one of those that the vector has.

    Returns:
        a `Steering`: its `close`, its end as a context manager, or `unwrap` take the vector off again, after which the
        model is bit for bit what it was.

    Raises:
        CoreskipError: another model's vector, a layer that it does not have, a strength that is no number. Nothing was
            changed.
    """
    check_model(model)
    if not isinstance(vector, ControlVector):
        raise CoreskipError(f"the control vector is {kind_of(vector)}: give what coreskip.control_vector returned")
    check_number("strength", strength)
    chosen = _layers_of(vector, layers)
    inner = generator_of(model)
    anatomy, fingerprint = _known(inner)
    vector.check(fingerprint)
    return Steering(inner, [(anatomy.layers[i], float(strength) * vector.directions[i]) for i in chosen])


def _layers_of(vector: ControlVector, layers: Any) -> list[int]:
    present = sorted(vector.directions)
    if layers is None:
        return [present[len(present) // 2]]
    given = list(layers) if isinstance(layers, (list, tuple, range, set, frozenset)) else None
    if not given or not all(type(layer) is int for layer in given):
        raise CoreskipError(f"layers is {layers!r}: give a list of numbers of layers")
    missing = [layer for layer in given if layer not in present]
    if missing:
        raise CoreskipError(f"the control vector has no layer {missing[0]}: it has {_ranges(present)}")
    return sorted(set(given))


def _ranges(layers: Sequence[int]) -> str:
    whole = list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if whole and len(layers) > 1 else ", ".join(map(str, layers))


def _known(model: nn.Module) -> tuple[Anatomy, Fingerprint]:
    """The parts and the fingerprint of a model; of a wrapped one as it was: its weights may be packed by now."""
    runtime = vars(model).get(ATTRIBUTE)
    if runtime is not None:
        return runtime.anatomy, runtime.plan.model
    anatomy = dissect(model)
    return anatomy, Fingerprint.of(model, anatomy)


def is_steered(model: nn.Module) -> bool:
    return _STEERINGS in getattr(generator_of(model), "__dict__", {})


def stop_steering(model: nn.Module) -> None:
    """Take every control vector off."""
    for steering in list(cast("list[Steering]", vars(generator_of(model)).get(_STEERINGS, []))):
        steering.close()
