"""What was packed and settled for the decode steps of one wrapped model, as it is now."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..kernels.ops import PackedLinear
from ..kernels.sparse import SparseLinear
from ..predictors.anatomy import Anatomy, rows_of
from ..predictors.checks import AS_PACKED
from ..predictors.policies import Chooser
from .bundles import FewerNeurons, Weights, neuron_weights
from .formats import Formats
from .layer_skips import LayerSkips
from .linear_names import linear_of, native_names
from .lower_cpu import StepProgram
from .memory_size import free_memory
from .program import Program
from .program_experts import ExpertsProgram
from .selections import Packer, SelectedNeurons, Selections

#: as often as what a prompt's neurons take must be free before they get matrices of their own: other sequences may come
_ROOM = 4


class Prepared:
    """Packed bricks and linears by what needs them, and the step programs made of them. Dropped whole when the model is
    changed."""

    def __init__(
        self,
        anatomy: Anatomy,
        program: Program,
        weights: Weights,
        skips: LayerSkips,
        altered: frozenset[int],
        formats: Formats,
    ) -> None:
        self._anatomy, self._program, self._weights, self._skips = anatomy, program, weights, skips
        self._formats = formats
        self._altered = altered  # layers whose MLP runs dense, as parts of it were replaced by others
        self._packs = program.chosen_by(Chooser.CALIBRATION, Chooser.TOKEN)
        self._inputs = program.chosen_by(Chooser.INPUTS)
        self._mlps: dict[int, FewerNeurons] = {}
        self._linears: dict[nn.Module, PackedLinear] = {}
        self._alike: StepProgram | None = None  # where sequences have nothing of their own
        self._own: WeakKeyDictionary[Selections, tuple[SelectedNeurons, StepProgram]] = WeakKeyDictionary()

    @property
    def _bundle_format(self) -> str | None:
        """Of listed neurons."""
        weights = self._program.weights
        return "int4" if weights == AS_PACKED else weights

    def mlp(self, layer: int) -> FewerNeurons:
        """A brick that all sequences share."""
        found = self._mlps.get(layer)
        if found is None:
            pack = self._packs[layer].pack
            assert pack is not None
            found = self._mlps[layer] = self._weights.sparse(layer, pack, self._bundle_format)
        return found

    def linear(self, module: nn.Module) -> PackedLinear:
        """The module's own matrix where it lies, as the kernels read it."""
        packed = self._linears.get(module)
        if packed is None:
            packed = self._linears[module] = PackedLinear.pack(*rows_of(module))
        return packed

    def sparse_linear(self, module: nn.Module, threshold: float, by_norm: bool) -> SparseLinear:
        """A linear that leaves out small inputs, whole."""
        return SparseLinear(self._weights.columns(module), threshold, by_norm)

    def let_go(self, module: nn.Module) -> None:
        """The module's matrix may go."""
        self._linears.pop(module, None)

    def selected(self, selections: Selections) -> SelectedNeurons:
        """What the sequences of a cache have chosen, packed."""
        if selections.packed_of is not self:
            selections.forget_packed()
            selections.packed_of = self
        return selections.selected(self._packer, self._altered)

    def _packer(self) -> Packer:
        """What makes MLPs of chosen neurons. In 4 bits a sequence gets matrices of its own, where there is memory for
        them. In other formats all have lists over what they share."""
        in_groups, parts_of = self._bundle_format == "int4", self._formats.parts
        room = in_groups and self._has_room()

        def pack(layer: int, lists: Tensor) -> FewerNeurons:
            own = self._weights.chosen(layer, lists, parts_of, room) if in_groups else None
            return own or self._weights.listed(layer, self._bundle_format, lists)

        return pack

    def _has_room(self) -> bool:
        """Whether there is memory for a prompt's neurons beside the whole matrices."""
        needed = sum(brick.nbytes for brick in self._program.chosen_by(Chooser.PROMPT).values())
        return self._weights.reusable >= needed or free_memory() >= _ROOM * needed

    def step_program(self, selections: Selections | None) -> StepProgram:
        """What a native step computes for sequences with these selections; None: with none of their own."""
        if selections is None:
            if self._alike is None:
                self._alike = self._made({}, None)
            return self._alike
        chosen = self.selected(selections)
        before, program = self._own.get(selections, (None, None))
        if program is None or before is not chosen:
            program = self._made(chosen.mlps, selections)
            self._own[selections] = (chosen, program)
        return program

    def _made(self, own: Mapping[int, FewerNeurons], selections: Selections | None) -> StepProgram:
        attention, no_mlp = self._skips.skipped(selections)
        mlps = {**{layer: self.mlp(layer) for layer in self._packs}, **own}
        width = [layer.width for layer in self._program.layers]
        skipped = sum(width[layer] for layer in no_mlp)
        # what a rule leaves out the native step counts itself
        listed = {layer: mlp for layer, mlp in mlps.items() if mlp.rule == "listed" and layer not in no_mlp}
        skipped += sum(self._program.layers[i].bricks[0].width - mlp.listed_neurons for i, mlp in listed.items())
        columns = {layer: self._columns(layer) for layer in self._inputs}
        every = [mlps.get(layer) for layer in range(len(self._anatomy))]
        chosen = self._program.chosen_experts.items()
        experts = {index: (_kept(index, found, selections), found.beta) for index, found in chosen}
        return StepProgram(every, skipped, attention, no_mlp, columns=columns, experts=experts)

    def _columns(self, layer: int) -> dict[str, SparseLinear]:
        """The linears of a layer that leave out small inputs, as a native step names them."""
        brick, mlp, found = self._inputs[layer], self._anatomy.mlp(layer), dict[str, SparseLinear]()
        names, neuron = native_names(self._anatomy, layer), neuron_weights(mlp.hidden_size, mlp.gated)
        for name, threshold in brick.thresholds.items():
            module, in_mlp = linear_of(self._anatomy, layer, name)
            worth = neuron if in_mlp else 0.0
            found |= self._weights.sparse_linears(module, threshold, brick.by_norm, names[name], worth)
        return found


def _kept(layer: int, experts: ExpertsProgram, selections: Selections | None) -> Tensor | None:
    """The experts that a native step may choose from, uint8 ``[experts]``; None: all. Sequences that keep different
    ones have no native step."""
    if experts.by_prompt is None:
        return None if experts.allowed is None else experts.allowed.to(torch.uint8)
    allowed = None if selections is None else selections.allowed_experts(layer)
    return None if allowed is None else allowed[0].to(torch.uint8)
