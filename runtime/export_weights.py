"""What remains of a model under a plan that decides nothing at run time: a smaller model of the model's own class.

Whole layers that a plan skips go, skipped halves add zeros, neurons and experts that it leaves out go with their rows
and columns. Read from the program (program.py), so what is written is what decode steps compute. Tensors that lose
nothing are the model's own, not copies.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache
from transformers.pytorch_utils import Conv1D

from ..predictors.anatomy import Anatomy, Experts, FeedForward
from ..predictors.errors import CoreskipError, PlanError, reason_of
from ..predictors.observe import inference
from ..predictors.plan import Plan
from ..predictors.policies import Chooser, Dense
from .bundles import Weights
from .packed_experts import HeldExperts
from .packed_layer import PackedLayer, PackedRows
from .program import LayerProgram, Program
from .skeleton import skeleton
from .unpacking import unpack
from .wrap import wrapped

TRAVEL = (
    "plans that can travel fix everything beforehand: dense, --method static, --method experts, skipped layers; to "
    "onnx also --method core"
)
_PROBE = 12  # tokens on which the smaller model is compared with the wrapped one
#: of the logits' norm: how far apart the two may be, by rounding
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

Pad = Literal["none", "model", "blocks"]
_BLOCK = 32  # inputs of a group in block formats: of a padded width a multiple


@dataclass(frozen=True, eq=False)
class RemainingLayer:
    """What a plan leaves of one decoder layer.

    Attributes:
        index: its place in the whole model.
        attention, mlp: whether that half adds anything to the residual stream.
        neurons: int64 ``[kept]``, ascending, of its MLP or shared expert; None: all.
        experts: int64 ``[kept]``, ascending; None: all, or there are none.
        chosen: how many neurons each prompt chooses; 0: none are chosen.
    """

    index: int
    attention: bool
    mlp: bool
    neurons: Tensor | None
    experts: Tensor | None
    chosen: int = 0

    @property
    def runs(self) -> bool:
        return self.attention or self.mlp


def remaining(program: Program, by_prompt: bool = False) -> tuple[RemainingLayer, ...]:
    """What is left of every layer. by_prompt: whether core neurons can be chosen by GRIFFIN's score of a prompt.

    Raises:
        PlanError: the plan chooses at run time, which takes a runtime that chooses.
    """
    layers = tuple(_remaining(index, layer, by_prompt) for index, layer in enumerate(program.layers))
    if not any(layer.runs for layer in layers):
        raise PlanError("the plan skips every layer: nothing would be left to export")
    return layers


def _remaining(index: int, layer: LayerProgram, by_prompt: bool) -> RemainingLayer:
    neurons, chosen = None, 0
    if layer.skips.by_prompt:
        raise PlanError(f"layer {index} is skipped or not by each prompt ({layer.skips.name}): {TRAVEL}")
    for brick in layer.bricks:
        if brick.chooser is Chooser.NOTHING or not layer.skips.mlp:
            continue
        policy: Any = brick.policy
        if by_prompt and policy.name == "core_neurons" and policy.score == "griffin":
            chosen = policy.kept(brick.width)
            continue
        if brick.chooser is not Chooser.CALIBRATION:
            raise PlanError(f"layer {index} chooses by each {brick.chooser.value} ({brick.policy.name}): {TRAVEL}")
        neurons = policy.indices
    experts = layer.experts
    if experts is not None and experts.beta > 0 and layer.skips.mlp:
        raise PlanError(f"layer {index} skips experts by each token ({experts.policy.name}): {TRAVEL}")
    kept = None if experts is None or experts.allowed is None else experts.allowed.nonzero().flatten()
    return RemainingLayer(index, layer.skips.attention, layer.skips.mlp, neurons, kept, chosen)


@dataclass(frozen=True, eq=False)
class Smaller:
    """A model without what a plan leaves out.

    Attributes:
        model: of the original's class; its configuration says its numbers of layers and experts, and its width where
            that is one for all layers and was asked for.
        layers: of the plan, those that the model has, in order.
        notes: what could not be made smaller and is zeros instead, a line each.
    """

    model: Any
    layers: tuple[RemainingLayer, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def numbers(self) -> int:
        """Of all parameters."""
        return sum(tensor.numel() for tensor in self.model.parameters())


def smaller(model: Any, anatomy: Anatomy, layers: tuple[RemainingLayer, ...], pad: Pad) -> Smaller:
    """The model that remains.

    Args:
        model: unwrapped; it stays as it is.
        pad: widths of the MLPs that lose neurons: "none": each its own; "model": one for the model, as its
            configuration can say, with zero neurons; "blocks": such a one, and a multiple of 32.

    Raises:
        CoreskipError: the architecture has no place for what remains.
    """
    return _Cut(model, anatomy, layers, pad).made()


class _Cut:
    """Makes a smaller model: its configuration by trial, for no two architectures call things alike."""

    def __init__(self, model: Any, anatomy: Anatomy, layers: tuple[RemainingLayer, ...], pad: Pad) -> None:
        self._model, self._anatomy, self._pad = model, anatomy, pad
        self._path = next(
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and tuple(module) == anatomy.layers
        )
        self._notes: list[str] = []
        self._layers = tuple(layer for layer in layers if layer.runs)
        self._config = _with_layers(model.config, [layer.index for layer in self._layers])
        if self._shell() is None:
            self._notes.append("its layers cannot be counted otherwise: those that the plan skips add zeros")
            self._layers, self._config = layers, copy.deepcopy(model.config)

    def made(self) -> Smaller:
        self._tell_experts()
        widths = self._widths()
        values = self._values(widths)
        shell = self._shell()
        assert shell is not None
        _fill(shell, self._named(values))
        shell.generation_config = copy.deepcopy(self._model.generation_config)
        return Smaller(shell, self._layers, tuple(self._notes))

    def _shell(self, config: Any = None) -> Any:
        """A model without weights; None where its layers are not those that remain, or none is made at all."""
        config = config or self._config
        try:
            shell = skeleton(type(self._model), copy.deepcopy(config), self._model.dtype)
            stack = shell.get_submodule(self._path)
        except Exception:  # configurations check themselves, each in its way
            return None
        pairs = zip(stack, self._layers, strict=False)
        same = all(_kinds(layer) == _kinds(self._anatomy.layers[left.index]) for layer, left in pairs)
        return shell if same and len(stack) == len(self._layers) else None

    # --- what the configuration has to say

    def _tell(self, old: int, new: int, fits: Callable[[Any], bool]) -> bool:
        """Sets what of the configuration is `old` and decides it to `new`; False where nothing does. fits: whether a
        model without weights is what is wanted."""
        settings = self._config.get_text_config().to_dict()
        named = [name for name, value in settings.items() if type(value) is int and value == old]
        named += [
            name for name, value in settings.items() if value is None and re.search("inner|ffn|intermediate", name)
        ]
        for name in named:
            tried = copy.deepcopy(self._config)
            try:
                setattr(tried.get_text_config(), name, new)
            except Exception:
                continue
            shell = self._shell(tried)
            if shell is not None and fits(shell):
                self._config = tried
                return True
        return False

    def _parallel(self, shell: Any, module: nn.Module) -> Any:
        """The module of a shell that stands where `module` stands in the whole model."""
        name = next(name for name, found in self._model.named_modules() if found is module)
        return shell.get_submodule(self._renamed(name))

    def _renamed(self, name: str) -> str:
        """A module's name in the smaller model."""
        places = {str(left.index): str(new) for new, left in enumerate(self._layers)}
        head, rest = self._path + ".", name[len(self._path) + 1 :]
        if not name.startswith(head):
            return name
        index, dot, inner = rest.partition(".")
        return f"{head}{places[index]}{dot}{inner}"

    def _tell_experts(self) -> None:
        found = [(self._anatomy.experts[left.index], left) for left in self._layers]
        mixtures = [(experts, left) for experts, left in found if experts is not None]
        if not any(left.experts is not None for _, left in mixtures):
            return
        counts = {experts.count if left.experts is None else len(left.experts) for experts, left in mixtures}
        if len(counts) > 1:
            raise CoreskipError(
                f"the plan keeps {min(counts)} to {max(counts)} experts a layer, and a checkpoint has one number of "
                "them: plan with the same for all layers"
            )
        first, kept = mixtures[0][0], counts.pop()
        assert first.router is not None  # the program has seen to that
        if first.router.choice.groups > 1:
            raise CoreskipError("its router chooses groups of experts, which would be other ones without some of them")
        top_k = first.router.choice.top_k

        def counted(shell: Any) -> bool:
            own = getattr(self._parallel(shell, first.module), first.layout.down)
            return bool(own.shape[0] == kept)

        if not self._tell(first.count, kept, counted):
            raise CoreskipError(f"{self._anatomy.model_type!r} models have no setting for the number of their experts")
        text = self._config.get_text_config()
        for name in ("num_experts_per_tok", "moe_k", "moe_topk"):
            if kept < top_k and getattr(text, name, None) == top_k:
                setattr(text, name, kept)

    def _widths(self) -> dict[int, int]:
        """By layer (of the whole model), how wide its MLP is written, where that is not its own width."""
        mlps = [(self._anatomy.feed_forwards[left.index], left) for left in self._layers]
        present = [(mlp, left) for mlp, left in mlps if mlp is not None]
        if self._pad == "none":
            return {left.index: _kept(mlp, left) for mlp, left in present if left.neurons is not None or not left.mlp}
        written: dict[int, int] = {}
        for old in {mlp.intermediate_size for mlp, _ in present}:
            group = [(mlp, left) for mlp, left in present if mlp.intermediate_size == old]
            new = self._width_of(old, group)
            written |= {left.index: new for _, left in group if new < old or left.neurons is not None}
        return written

    def _width_of(self, old: int, group: Sequence[tuple[FeedForward, RemainingLayer]]) -> int:
        """One width for MLPs that are all `old` wide."""
        new = max(_kept(mlp, left) for mlp, left in group)
        if self._pad == "blocks":
            return min(old, -(-new // _BLOCK) * _BLOCK)
        mlps = [mlp for mlp, _ in group]
        if new == old or self._tell(old, new, lambda shell: self._fits(shell, mlps, new)):
            return new
        self._notes.append(
            f"{self._anatomy.model_type!r} models have no setting for the width of their MLPs: neurons that the plan "
            "leaves out are zeros"
        )
        return old

    def _fits(self, shell: Any, mlps: Sequence[FeedForward], width: int) -> bool:
        """Whether these MLPs have this width in a shell, and nothing else differs."""
        changed = set()
        for mlp in mlps:
            inside = replace(mlp, owner=self._parallel(shell, mlp.owner))
            if inside.intermediate_size != width:
                return False
            changed |= set(_linears(inside))
        pairs = zip(shell.modules(), self._shell().modules(), strict=True)
        return all(one in changed or _shapes(one) == _shapes(other) for one, other in pairs)

    # --- the weights

    def _values(self, widths: dict[int, int]) -> dict[tuple[nn.Module, str], Tensor]:
        """What differs from the whole model's tensors, by the module and its name there."""
        values: dict[tuple[nn.Module, str], Tensor] = {}
        for left in self._layers:
            mlp, experts = self._anatomy.feed_forwards[left.index], self._anatomy.experts[left.index]
            if mlp is not None and (left.neurons is not None or left.index in widths):
                width = widths.get(left.index, mlp.intermediate_size)
                neurons = torch.arange(mlp.intermediate_size) if left.neurons is None else left.neurons
                values |= _mlp(mlp, neurons if left.mlp else neurons[:0], width)
            if experts is not None and left.experts is not None:
                values |= _experts(experts, left.experts)
            values |= self._silenced(left, values)
        return values

    def _silenced(
        self, left: RemainingLayer, values: dict[tuple[nn.Module, str], Tensor]
    ) -> dict[tuple[nn.Module, str], Tensor]:
        """Zeros for the outputs of halves that are skipped."""
        mlp, experts = self._anatomy.feed_forwards[left.index], self._anatomy.experts[left.index]
        attention, silent = self._anatomy.attentions[left.index], list[tuple[nn.Module, str]]()
        if not left.attention:
            assert attention is not None  # a plan for a model that has none is not carried out
            output = getattr(attention.module, attention.output)
            silent += [(output, "weight"), (output, "bias")]
        if not left.mlp and mlp is not None:
            silent += [(mlp.down, "weight"), (mlp.down, "bias")]
        if not left.mlp and experts is not None:
            at = experts.layout
            silent += [(experts.module, name) for name in (at.down, at.down_bias) if name is not None]
        found = {place: values.get(place, _own(*place)) for place in silent}
        return {place: torch.zeros_like(value) for place, value in found.items() if value is not None}

    def _named(self, values: dict[tuple[nn.Module, str], Tensor]) -> dict[str, nn.Parameter | Tensor]:
        """Every tensor of the smaller model by its name; of tied ones the same."""
        stay = {left.index for left in self._layers}
        absent = {m for i, layer in enumerate(self._anatomy.layers) if i not in stay for m in layer.modules()}
        shared: dict[int, nn.Parameter] = {}
        found: dict[str, nn.Parameter | Tensor] = {}
        for name, module in self._model.named_modules(remove_duplicate=False):
            if module in absent:
                continue
            prefix = self._renamed(name) + "." if name else ""
            for leaf, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in shared:
                    value = values.get((module, leaf))
                    value = cast(Tensor, _own(module, leaf)) if value is None else value
                    shared[id(parameter)] = nn.Parameter(value, requires_grad=False)
                found[prefix + leaf] = shared[id(parameter)]
            for leaf, buffer in module._buffers.items():
                if buffer is not None and leaf not in module._non_persistent_buffers_set:
                    found[prefix + leaf] = values.get((module, leaf), buffer)
        return found


def _kept(mlp: FeedForward, left: RemainingLayer) -> int:
    """Neurons that are needed of an MLP: of one that is skipped one, for a matrix has rows."""
    if not left.mlp:
        return 1
    return mlp.intermediate_size if left.neurons is None else len(left.neurons)


def _linears(mlp: FeedForward) -> list[nn.Module]:
    return [getattr(mlp.owner, name) for name in (mlp.gate_name, mlp.up_name, mlp.down_name) if name is not None]


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in module._parameters.values() if parameter is not None]


def _kinds(layer: nn.Module) -> list[tuple[str, type]]:
    """What a layer consists of, as if nothing were packed."""
    return [(name, _plain_class(module)) for name, module in layer.named_modules()]


def _plain_class(module: nn.Module) -> type:
    kind: type = type(module)
    if kind is PackedLayer:
        return nn.Linear
    return kind.__bases__[0] if isinstance(module, HeldExperts) else kind


def _with_layers(config: Any, indices: list[int]) -> Any:
    """A configuration of the layers with these indices alone."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    count = text.num_hidden_layers
    if len(indices) == count:
        return config
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == count and "token" not in name:
            setattr(text, name, [value[index] for index in indices])
        elif name in ("mlp_only_layers", "moe_layers") and isinstance(value, list):
            setattr(text, name, [new for new, index in enumerate(indices) if index in value])
        elif name == "first_k_dense_replace":
            setattr(text, name, sum(index < value for index in indices))
    text.num_hidden_layers = len(indices)
    return config


def _own(module: nn.Module, leaf: str) -> Tensor | None:
    """A tensor of a module, or the numbers that its packed form stands for; None where it has none."""
    value = module._parameters.get(leaf)
    if value is None:
        return module._buffers.get(leaf)
    if isinstance(module, HeldExperts) and value.is_meta:
        return torch.stack([module.unpacked(leaf, expert) for expert in range(value.shape[0])])
    if leaf == "weight" and isinstance(module, PackedLayer):
        return module.unpacked()
    if leaf == "weight" and isinstance(module, PackedRows):
        return unpack([module.part()], torch.empty(value.shape, dtype=value.dtype, device="cpu"))
    return value.detach()


def _mlp(mlp: FeedForward, neurons: Tensor, width: int) -> dict[tuple[nn.Module, str], Tensor]:
    """An MLP's matrices with these neurons alone, and zeros up to `width`."""
    spare, old = width - len(neurons), mlp.intermediate_size

    def rows(linear: nn.Module, parts: int) -> Iterator[tuple[tuple[nn.Module, str], Tensor]]:
        for leaf in ("weight", "bias"):
            value = _own(linear, leaf)
            if value is None:
                continue
            turned = leaf == "weight" and isinstance(linear, Conv1D)
            value = value.t() if turned else value
            kept = [part[neurons] for part in value.split(old)]
            assert len(kept) == parts
            kept = [F.pad(part, (0, 0) * (part.ndim - 1) + (0, spare)) for part in kept]
            yield (linear, leaf), (torch.cat(kept).t() if turned else torch.cat(kept)).contiguous()

    found = dict(rows(mlp.up, 2 if mlp.stacked else 1))
    if mlp.gate_name is not None:
        found |= rows(getattr(mlp.owner, mlp.gate_name), 1)
    down = cast(Tensor, _own(mlp.down, "weight"))
    if isinstance(mlp.down, Conv1D):
        found[mlp.down, "weight"] = F.pad(down[neurons], (0, 0, 0, spare))
    else:
        found[mlp.down, "weight"] = F.pad(down[:, neurons], (0, spare))
    return found


def _experts(experts: Experts, kept: Tensor) -> dict[tuple[nn.Module, str], Tensor]:
    """A mixture's matrices, and its router's rows, with these experts alone."""
    at, router = experts.layout, experts.router
    assert router is not None
    names = (at.gate, at.up, at.down, at.gate_bias, at.up_bias, at.down_bias)
    places = [(experts.module, name) for name in names if name is not None]
    for place in (router.weight_at, router.bias_at, router.correction_at):
        if place is not None:
            places.append((router.block.get_submodule(place[0]), place[1]))
    found = {place: cast(Tensor, _own(*place)) for place in places}
    return {
        place: value.index_select(value.ndim - 1 if value.shape[0] == 1 else 0, kept.to(value.device))
        for place, value in found.items()
    }


def _fill(shell: Any, tensors: dict[str, nn.Parameter | Tensor]) -> None:
    """Puts every tensor in its place; linears become as wide as theirs.

    Raises:
        CoreskipError: the smaller model wants another one.
    """
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = shell.get_submodule(path)
        own = module._parameters if isinstance(value, nn.Parameter) else module._buffers
        before = own.get(leaf)
        linear = isinstance(module, (nn.Linear, Conv1D))
        if before is None or not (linear or before.shape == value.shape):
            raise CoreskipError(f"a smaller model of this kind has no place for {name}: it cannot be exported")
        own[leaf] = value
        if linear and leaf == "weight":
            _state_size(module, value)
    empty = [name for name, tensor in (*shell.named_parameters(), *shell.named_buffers()) if tensor.is_meta]
    if empty:
        raise CoreskipError(f"a smaller model of this kind wants {empty[0]}, which the model does not have")


def _state_size(linear: Any, weight: Tensor) -> None:
    if isinstance(linear, Conv1D):
        linear.nx, linear.nf = weight.shape
    else:
        linear.out_features, linear.in_features = weight.shape


def prove(model: Any, anatomy: Anatomy, plan: Plan, found: Smaller) -> None:
    """Compares the smaller model with the wrapped one, over one KV cache: a dense token, then some under the plan, but
    for neurons that a prompt chooses, which the model still has.

    Raises:
        CoreskipError: they differ by more than rounding: something of this architecture is not what its names say.
    """
    layers = (replace(p, neurons=Dense()) if p.neurons.chooser is Chooser.PROMPT else p for p in plan.layers)
    plan = replace(plan, weights=None, rounding=None, layers=tuple(layers))
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, _PROBE), generator=torch.Generator().manual_seed(0)).to(model.device)
    with inference(model):
        cache = model(input_ids=ids[:, :1], use_cache=True).past_key_values
        own = _without_layers(cache, anatomy, found)
        with wrapped(model, plan, Weights(anatomy)):
            wanted = _decoded(model, cache, ids)
        try:
            got = _decoded(found.model, own, ids)
        except Exception as error:  # with too few experts, say, whatever a class trips over
            raise CoreskipError(
                f"a {anatomy.model_type!r} model without what the plan leaves out does not run: {reason_of(error)}"
            ) from error
    off = float((got - wanted).norm() / wanted.norm())
    if not off <= _TOLERANCE[model.dtype]:
        raise CoreskipError(
            f"a {anatomy.model_type!r} model without what the plan leaves out computes something else than under the "
            f"plan (by {off:.1%}): it cannot be exported"
        )


def _without_layers(cache: Any, anatomy: Anatomy, found: Smaller) -> DynamicCache:
    """A copy of what a cache holds of the layers that remain."""
    layers = getattr(cache, "layers", ())
    if len(layers) != len(anatomy):
        raise CoreskipError(f"{anatomy.model_type!r} models have no KV cache layer for each decoder layer")
    own = DynamicCache(config=found.model.config)
    own.layers = [copy.deepcopy(layers[left.index]) for left in found.layers]
    return own


def _decoded(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """fp32 logits of all tokens but the first, one a step."""
    steps = ids[:, 1:].split(1, 1)
    return torch.cat([model(input_ids=token, past_key_values=cache).logits.float() for token in steps])
