"""A prompt's way through a decoder that `step.Step` describes, natively and layer by layer (csrc/prefill.cpp).

Many tokens of one sequence go through a layer before the next layer is looked at, so that its weights are read once for
every 128 of them. Each token's numbers are those of a decode step, to the bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from . import arguments, cpu
from .packed import PackedLinear
from .step import DenseMLP, KeyValues, Step, StepModel

#: told of a layer's activations [tokens, neurons], in float32, good until it returns
Observer = Callable[[int, Tensor], None]


def uncovered(model: StepModel) -> str | None:
    """Why prompts of a model do not go through it here; None where they do."""
    for layer in model.layers:
        attention, mlp = layer.attention, layer.mlp
        if attention is None or layer.entries_only or not isinstance(mlp, DenseMLP):
            return "a layer leaves something out"
        matrices = (attention.q, attention.k, attention.v, attention.o, mlp.gate, mlp.up, mlp.down)
        if not all(m is None or (isinstance(m, PackedLinear) and m.grouped) for m in matrices):
            return "matrices lie as they were loaded, and torch multiplies many rows with these in less time"
    return None


class Prefill:
    """Prompts through the decoder of a `step`, which `uncovered` has nothing against.

    observed: layers whose activations are wanted, in prompts that have an observer.
    """

    def __init__(self, step: Step, observed: frozenset[int] = frozenset()) -> None:
        self.step, self._observed = step, observed

    def run(
        self, tokens: Tensor, positions: Tensor, caches: KeyValues, past: int, wanted: int, observe: Observer | None = None
    ) -> Tensor:
        """Logits ``[wanted, vocabulary]`` of the last tokens, of the model's dtype; keys and values of all are written.

        tokens, positions: int64 ``[length]``. past: positions already in the caches of one row, which have room.
        Raises ValueError for caches that are not this model's or too small.
        """
        length, model = tokens.shape[0], self.step.model
        self.step.check_caches(caches, 1, past, past + length)
        x, positions = self._embedded(tokens), positions.contiguous()
        for index, layer in enumerate(model.layers):
            observed = observe if index in self._observed else None
            assert isinstance(layer.mlp, DenseMLP)
            seen = None if observed is None else x.new_empty((length, layer.mlp.up.out_features))
            self._through(index, x, positions, caches, past, seen)
            if observed is not None and seen is not None:
                observed(index, seen)
        return self._logits(x[length - wanted :])

    def _embedded(self, tokens: Tensor) -> Tensor:
        model, tokens = self.step.model, tokens.contiguous()
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < model.vocabulary:
            raise IndexError(f"token ids must be in [0, {model.vocabulary})")
        x = torch.empty((tokens.shape[0], model.norm.weight.shape[0]), dtype=torch.float32, device="cpu")
        call = self.step.address, tokens.data_ptr(), tokens.shape[0], x.data_ptr(), torch.get_num_threads()
        cpu.check(cpu.library().coreskip_embed(*call), 0)
        return x

    def _through(
        self, index: int, x: Tensor, positions: Tensor, caches: KeyValues, past: int, activations: Tensor | None
    ) -> None:
        entry = ctypes.addressof(caches.table) + index * ctypes.sizeof(arguments.StepCache)
        call = arguments.PrefillCall(
            x.data_ptr(), positions.data_ptr(), entry, cpu.address(activations), x.shape[0], past, torch.get_num_threads()
        )
        cpu.check(cpu.library().coreskip_prefill(self.step.address, index, ctypes.byref(call)), 0)

    def _logits(self, x: Tensor) -> Tensor:
        model = self.step.model
        logits = torch.empty((x.shape[0], model.head.out_features), dtype=model.dtype, device="cpu")
        call = self.step.address, x.data_ptr(), x.shape[0], logits.data_ptr(), torch.get_num_threads()
        cpu.check(cpu.library().coreskip_head(*call), 0)
        return logits
