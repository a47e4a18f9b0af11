"""A prompt's way through a decoder that `step.Step` describes, natively and layer by layer (csrc/prefill.cpp).

Many tokens of one sequence go through a layer before the next layer is looked at, in blocks of which each is one
thread's, or by all threads together. Each token's numbers are those of a decode step, to the bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from . import arguments, cpu, residency
from .packed import PackedLinear
from .step import DenseMLP, KeyValues, LatentAttention, Recurrent, Step, StepModel

#: told of a layer, and of its activations [rows, length, neurons] in float32, zero at padding
Observer = Callable[[int, Tensor], None]


def uncovered(model: StepModel) -> str | None:
    """Why prompts of a model do not go through it here; None where they do."""
    if model.sides is not None:
        return "layers have third halves"
    if model.before is not None:
        return "a map lies between its last norm and its LM head"
    for layer in model.layers:
        attention, mlp = layer.attention, layer.mlp
        if attention is None or layer.entries_only or not isinstance(mlp, DenseMLP):
            return "a layer leaves something out"
        if isinstance(attention, Recurrent):
            return "a recurrence goes through a prompt in chunks, on the modules"
        if isinstance(attention, LatentAttention):
            return "latents of many tokens are expanded once for all of their heads by the modules"
        if attention.special or mlp.norm is not None:
            return "heads have gates, or norms stand inside of attentions or MLPs"
        found = [m for m in (*attention.linears, mlp.gate, mlp.up, mlp.down) if m is not None]
        if not all(isinstance(m, PackedLinear) and m.grouped for m in found):
            return "matrices lie as they were loaded, and torch multiplies many rows with these in less time"
        if any(isinstance(m, PackedLinear) and residency.of(m.weight.data_ptr()) is not None for m in found):
            return "matrices are read from the disk, piece by piece"
    return None


class Prefill:
    """Prompts through the decoder of a `step`, which `uncovered` has nothing against."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def run(
        self,
        tokens: Tensor,
        positions: Tensor,
        start: Tensor,
        caches: KeyValues,
        past: int,
        wanted: int,
        observed: Collection[int] = (),
        observe: Observer | None = None,
    ) -> Tensor:
        """Logits ``[rows, wanted, vocabulary]`` of the last tokens, in the model's dtype; all entries are written.

        tokens, positions: int64 ``[rows, length]``. start: int64 ``[rows]``, the first cache position that counts: a
        token before it is padding, whose logits, keys and values mean nothing. past: positions already in the caches,
        which have room. observed: the layers whose activations `observe` is told of.
        Raises ValueError for caches that are not this model's or too small, IndexError for ids of no token.
        """
        rows, length = tokens.shape
        self.step.check_caches(caches, rows, past, past + length)
        x, positions, starts = self._embedded(tokens, positions), positions.contiguous(), start.tolist()
        for layers in _runs(len(self.step.model.layers), observed):
            seen = self._room_for(layers.start, x) if layers.start in observed else None
            for row, first in enumerate(starts):
                skipped = max(0, first - past)  # padding
                some = None if seen is None else seen[row, skipped:]
                kept = x[row, skipped:], positions[row, skipped:], some
                self._through(layers, *kept, caches.row(row), past + skipped, first)
            if observe is not None and seen is not None:
                observe(layers.start, seen)
        return self._logits(x[:, length - wanted :].contiguous())

    def _embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        model, tokens, positions = self.step.model, tokens.contiguous(), positions.contiguous()
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < model.vocabulary:
            raise IndexError(f"token ids must be in [0, {model.vocabulary})")
        x = torch.empty((*tokens.shape, model.hidden), dtype=torch.float32, device="cpu")
        call = tokens.data_ptr(), positions.data_ptr(), tokens.numel(), x.data_ptr(), torch.get_num_threads()
        cpu.check(cpu.library().coreskip_embed(self.step.address, *call), 0)
        return x

    def _room_for(self, layer: int, x: Tensor) -> Tensor:
        """Zeros for the activations of a layer."""
        mlp = self.step.model.layers[layer].mlp
        assert isinstance(mlp, DenseMLP)
        return x.new_zeros((*x.shape[:2], mlp.up.out_features))

    def _through(
        self,
        layers: range,
        x: Tensor,
        positions: Tensor,
        activations: Tensor | None,
        entries: int,
        past: int,
        start: int,
    ) -> None:
        """One row's tokens through some layers."""
        call = arguments.PrefillCall(
            x.data_ptr(), positions.data_ptr(), entries, cpu.address(activations),
            x.shape[0], past, start, torch.get_num_threads(),
        )  # fmt: skip
        cpu.check(cpu.library().coreskip_prefill(self.step.address, layers.start, layers.stop, ctypes.byref(call)), 0)

    def _logits(self, x: Tensor) -> Tensor:
        model = self.step.model
        rows, wanted, _ = x.shape
        logits = torch.empty((rows, wanted, model.head.out_features), dtype=model.dtype, device="cpu")
        call = self.step.address, x.data_ptr(), rows * wanted, logits.data_ptr(), torch.get_num_threads()
        cpu.check(cpu.library().coreskip_head(*call), 0)
        return logits


def _runs(layers: int, observed: Collection[int]) -> Iterator[range]:
    """The layers in turn, as many at a time as there are; those that are observed one by one."""
    begin = 0
    for index in (*sorted(observed), layers):
        if begin < index:
            yield range(begin, index)
        if index < layers:
            yield range(index, index + 1)
        begin = index + 1
