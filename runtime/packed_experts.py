"""Experts whose matrices exist in packed form alone, as a packed model has them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels.experts import Expert, PackAll, experts_of
from ..kernels.packed import DTYPES, PackedLinear
from ..predictors.anatomy import Experts
from ..predictors.errors import CoreskipError
from ..predictors.experts import Layout
from .packed_layer import StandIn, check_untouched, refusing
from .unpacking import Unpacking, unpack
from .width import product

_unpacking = Unpacking()


class HeldExperts(nn.Module):
    """A module of experts that computes with the numbers of packed matrices, in the model's dtype; `hold` makes one of
    a module that is there. What is no matrix, biases among it, stays, and so does what its class makes of gate and up.

    The parameters of its matrices have shape and dtype, and no numbers: they are on the meta device.
    """

    _held: list[Expert]
    _layout: Layout
    _absent: dict[str, StandIn]  # in a dict, or they would be parameters
    _handles: list[Any]

    @staticmethod
    def hold(module: nn.Module, layout: Layout, experts: Sequence[Expert], dtype: torch.dtype) -> None:
        """experts: without biases."""
        module.__class__ = _class_of_experts(type(module))
        held = cast(HeldExperts, module)
        held._held, held._layout = list(experts), layout
        held._stand_in(dtype)
        held._handles = refusing(module)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self._check_untouched()
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == expert)
            found = self._one(hidden_states[token], expert).float()
            total.index_add_(0, token, found * top_k_weights[token, place, None].float())
        return total.to(hidden_states.dtype)

    def forward_own_rows(self, hidden_states: Tensor) -> Tensor:
        """`forward` where rows belong to one expert after the other, multiplied by its weights (Llama 4)."""
        self._check_untouched()
        return of_own_rows(hidden_states, len(self._held), self._one)

    def _one(self, x: Tensor, expert: int) -> Tensor:
        held, at, own = self._held[expert], self._layout, cast(Any, self)
        parts = [held.up] if held.gate is None else [held.gate, held.up]
        up = _unpacking.multiply(x, parts, None, x.dtype, few=False)
        if at.interleaved:
            up = torch.stack(up.chunk(2, -1), -1).flatten(-2)
        if at.up_bias is not None:
            up = up + getattr(self, at.up_bias)[expert]
        h = own.act_fn(up) if held.gate is None else _gated(own, up)
        bias = None if at.down_bias is None else getattr(self, at.down_bias)[expert]
        return _unpacking.multiply(h, [held.down], bias, x.dtype, few=False)

    def experts(self, whole: bool = True) -> list[Expert]:
        """The packed matrices with their biases. whole: whether x meets their numbers in float32, or rounded to 8
        bits."""
        self._check_untouched()
        at, found = self._layout, []
        halves = (slice(0, None, 2), slice(1, None, 2)) if at.interleaved else None
        for index, held in enumerate(self._held):
            rows = halves or (slice(0, held.up.out_features), slice(held.up.out_features, None))
            gate = None if held.gate is None else self._part(held.gate, at.up_bias, index, rows[0], whole)
            up = self._part(held.up, at.up_bias, index, slice(None) if gate is None else rows[1], whole)
            found.append(Expert(gate, up, self._part(held.down, at.down_bias, index, slice(None), whole)))
        return found

    def _part(self, packed: PackedLinear, bias: str | None, expert: int, rows: slice, whole: bool) -> PackedLinear:
        found = None if bias is None else getattr(self, bias).detach()[expert, rows].float().contiguous()
        return replace(packed, bias=found, whole=whole and packed.grouped)

    def unpacked(self, name: str, expert: int) -> Tensor:
        """One expert's part of a parameter, in its order and the model's dtype, put together anew at every call."""
        held, at = self._held[expert], self._layout
        parts = [held.down] if name == at.down else [held.up] if held.gate is None else [held.gate, held.up]
        shape = sum(part.out_features for part in parts), parts[0].in_features
        found = unpack(parts, torch.empty(shape, dtype=self._absent[name].dtype, device="cpu"))
        if name == at.up and at.interleaved:
            found = torch.stack(list(found.chunk(2)), 1).flatten(0, 1)
        return found.t() if at.transposed else found

    def unpack(self) -> None:
        """Becomes what it was, with the numbers that the packed matrices stand for."""
        for name, before in self._absent.items():
            whole = torch.empty(before.shape, dtype=before.dtype, device="cpu")
            for expert, rows in enumerate(whole):
                rows.copy_(self.unpacked(name, expert))
            self._parameters[name] = nn.Parameter(whole, requires_grad=False)
        for handle in self._handles:
            handle.remove()
        del self._held, self._layout, self._absent, self._handles
        self.__class__ = cast(Any, type(self).__bases__[0])

    @property
    def stacks(self) -> dict[str, list[PackedLinear]]:
        """Gates, ups and downs of all experts, without biases."""
        gates = [held.gate for held in self._held if held.gate is not None]
        found = {"gate": gates, "up": [held.up for held in self._held], "down": [held.down for held in self._held]}
        return {name: parts for name, parts in found.items() if parts}

    def _check_untouched(self) -> None:
        for name, absent in self._absent.items():
            check_untouched(self._parameters[name], absent)

    def _stand_in(self, dtype: torch.dtype) -> None:
        self._absent = {}
        for name, kinds in ((self._layout.up, ("gate", "up")), (self._layout.down, ("down",))):
            shape = tuple(cast(Tensor, self._parameters[name]).shape)
            nbytes = sum(part.weight.nbytes for kind in kinds for part in self.stacks.get(kind, ()))
            self._parameters[name] = self._absent[name] = StandIn.of(shape, dtype, nbytes, "meta")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Casts; packed matrices stay as they are, and are unpacked on another device and in dtypes that kernels do not
        have."""
        like = fn(torch.empty(0, dtype=self._absent[self._layout.down].dtype, device="cpu"))
        if like.device.type != "cpu" or like.dtype not in DTYPES:
            self.unpack()
            return nn.Module._apply(self, fn, recurse)
        self._stand_in(like.dtype)
        for name, parameter in self._parameters.items():
            if parameter is not None and not isinstance(parameter, StandIn):
                self._parameters[name] = nn.Parameter(fn(parameter.detach()), requires_grad=False)
        self._buffers = {name: None if buffer is None else fn(buffer) for name, buffer in self._buffers.items()}
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:  # the class may have been made here, where pickle looks for none
        return _blank_experts, (type(self).__bases__[0],), self.__dict__


def _gated(module: Any, up: Tensor) -> Tensor:
    """What a module of experts makes of gates and ups side by side."""
    if hasattr(module, "_apply_gate"):
        return cast(Tensor, module._apply_gate(up))
    gate, up = up.chunk(2, -1)
    return cast(Tensor, up * module.act_fn(gate))


def of_own_rows(x: Tensor, count: int, output: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The output of experts for x ``[count * tokens, hidden]``, one expert's rows after the other's. Rows of zeros
    that a router did not choose give zeros: such experts have no biases.

    output: of an expert for some of its rows.
    """
    each = x.reshape(count, -1, x.shape[-1])
    found = torch.zeros_like(each)
    for expert in each.any(-1).any(-1).nonzero().flatten().tolist():
        wanted = each[expert].any(-1)
        found[expert, wanted] = output(each[expert, wanted], expert)
    return found.view(-1, x.shape[-1])


def few_rows(mixture: Experts, packed: Sequence[Expert], x: Tensor) -> Tensor:
    """`of_own_rows` of a few tokens, by kernels that read each chosen expert's packed matrices."""
    return of_own_rows(x, len(packed), lambda rows, expert: _output(mixture, packed[expert], rows))


def _output(mixture: Experts, part: Expert, x: Tensor) -> Tensor:
    assert mixture.gating is not None, mixture
    gate = None if part.gate is None else product(x, [part.gate])
    return product(mixture.gating(gate, product(x, [part.up])), [part.down])


def few_tokens(mixture: Experts, packed: Sequence[Expert], x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """`Experts.mixture` of a few tokens, by kernels that read each chosen expert's packed matrices."""
    return mixture.summed(x, index, weights, lambda rows, expert: _output(mixture, packed[expert], rows))


_classes: dict[type[nn.Module], type[HeldExperts]] = {}


def _class_of_experts(plain: type[nn.Module]) -> type[HeldExperts]:
    """The class of packed experts that are else like those of `plain`."""
    if plain not in _classes:
        own = {name: vars(HeldExperts)[name] for name in ("forward", "_apply", "__reduce_ex__")}
        if len(inspect.signature(plain.forward).parameters) == 2:  # nothing but itself and inputs
            own["forward"] = vars(HeldExperts)["forward_own_rows"]
        _classes[plain] = type(plain.__name__, (plain, HeldExperts), own)
    return _classes[plain]


def _blank_experts(plain: type[nn.Module]) -> HeldExperts:
    cls = _class_of_experts(plain)
    return cls.__new__(cls)


def held_experts(model: nn.Module) -> Iterator[tuple[str, HeldExperts]]:
    """A model's modules of experts that have packed matrices alone, and their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, HeldExperts))


def can_be_held(found: Experts) -> bool:
    """Whether a mixture's matrices can exist in packed form alone: what else is computed, its module's class says."""
    at, module = found.layout, found.module
    gated = at.stacked or at.interleaved
    computes = hasattr(module, "_apply_gate" if gated and not found.scaled_inputs else "act_fn")
    known = found.gating is not None and at.gate is None and not (found.scaled_inputs and (at.up_bias or at.down_bias))
    return computes and known and module._parameters.get(at.down) is not None


def packed_of(mixture: Experts, pack: PackAll) -> list[Expert]:
    """All experts, packed by `pack`, with biases."""
    at = mixture.layout
    biases = [None if name is None else mixture.parameter(name) for name in (at.up_bias, at.down_bias)]
    return experts_of(
        mixture.parameter(at.up), mixture.down, *biases,
        stacked=at.stacked, interleaved=at.interleaved, transposed=at.transposed, pack=pack,
    )  # fmt: skip


def names_of(mixture: Experts) -> tuple[str, str]:
    """The parameters that hold a mixture's matrices."""
    return mixture.layout.up, mixture.layout.down


def stacks_of(mixture: Experts, pack: PackAll) -> dict[str, list[PackedLinear]]:
    """Gates, ups and downs of all experts, packed by `pack`, without biases."""
    found = packed_of(mixture, lambda matrices: pack([(weight, None) for weight, _ in matrices]))
    gates = [expert.gate for expert in found if expert.gate is not None]
    every = {"gate": gates, "up": [expert.up for expert in found], "down": [expert.down for expert in found]}
    return {kind: parts for kind, parts in every.items() if parts}


def hold_by_name(
    model: nn.Module, name: str, layout: dict[str, Any], stacks: dict[str, list[PackedLinear]], dtype: torch.dtype
) -> None:
    """Lets the experts of this name hold their matrices packed. layout: the fields of a `Layout`.

    Raises:
        ValueError: the model has no such experts, or of other shapes.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the model has no {name}") from None
    at = Layout(**layout)
    biases = [name for name in (at.up_bias, at.down_bias) if name is not None]
    if len({len(parts) for parts in stacks.values()}) != 1 or any(b not in module._parameters for b in biases):
        raise ValueError(f"{name} has experts that do not go together")
    up, down = module._parameters.get(at.up), module._parameters.get(at.down)
    rows = len(stacks.get("gate", ())) and stacks["gate"][0].out_features
    found = stacks["up"][0].out_features + rows, stacks["up"][0].in_features
    for parameter, shape in ((up, found), (down, (stacks["down"][0].out_features, stacks["down"][0].in_features))):
        wanted = (len(stacks["down"]), *(shape[::-1] if at.transposed else shape))
        if parameter is None or tuple(parameter.shape) != wanted:
            raise ValueError(f"{name} has no experts of the shape {wanted}")
    gates: Sequence[PackedLinear | None] = stacks.get("gate") or [None] * len(stacks["up"])
    HeldExperts.hold(module, at, list(map(Expert, gates, stacks["up"], stacks["down"])), dtype)


def refuse_with_text(anatomy_experts: Sequence[Experts | None]) -> None:
    """Raises CoreskipError for models whose experts would have to be rounded with a text."""
    if any(found is not None for found in anatomy_experts):
        raise CoreskipError("experts are not rounded with a text yet: leave it out, which rounds them plainly")
