"""Where a decoder layer has its norms and how its halves are added up, found in a pass of a few tokens: whatever the
parts are called, x += out(attention(in(x))), x = after(x), then the same for the MLP, has to give what the layer gave.

Without a pass, on a meta device, the names that many architectures share have to do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..predictors.anatomy import Anatomy, Attention
from .calls import NotCovered
from .coverage import INERT
from .norms import read_norm
from .side_reading import SideModules, side_of
from .spec import NormSpec
from .tracing import Trace

_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True, eq=False)
class Composition:
    """How a layer is put together: see `LayerSpec`. norms: the modules by the names of their places there. beside:
    whether its MLP reads what its experts read, and is added to what they give. scale: what the residual stream is
    multiplied by in the end. more: what is added to the attention's output besides. side: a third half."""

    norms: dict[str, nn.Module]
    parallel: bool
    residual_scale: float
    beside: bool = False
    scale: float = 1.0
    more: Tensor | None = None
    side: SideModules | None = None

    def specs(self, size: int | None = None) -> dict[str, NormSpec | None]:
        places = ("attention_in", "attention_out", "attention_after", "mlp_in", "mlp_out", "mlp_after")
        return {place: read_norm(self.norms[place], size) if place in self.norms else None for place in places}


def by_name(layer: nn.Module) -> Composition:
    """Norms before a layer's halves (Llama), after them (OLMo 2), or both (Gemma 2).

    Raises:
        NotCovered: it has others.
    """
    has = {name: module for name in _NORMS if isinstance(module := getattr(layer, name, None), nn.Module)}
    names, parallel = set(has), bool(getattr(layer, "use_parallel_residual", False))
    if names == {"input_layernorm"}:
        places, parallel = {"attention_in": "input_layernorm", "mlp_in": "input_layernorm"}, True
    elif names == {"input_layernorm", "post_attention_layernorm"}:
        places = {"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}
    elif names == {"post_attention_layernorm", "post_feedforward_layernorm"}:
        places = {"attention_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}
    elif len(names) == 4:
        places = dict(zip(("attention_in", "attention_out", "mlp_in", "mlp_out"), _NORMS, strict=True))
    else:
        raise NotCovered("its decoder layers have other norms than decode steps know")
    scale = float(getattr(layer, "residual_multiplier", 1.0))
    return Composition({place: has[name] for place, name in places.items()}, parallel, scale)


def by_values(anatomy: Anatomy, index: int, seen: Trace) -> Composition:
    """The composition of layer `index` in a pass.

    Raises:
        NotCovered: what the layer gave is not put together so.
    """
    return _Layer(anatomy, index, seen).read()


class Residual:
    """One layer's residual stream in a pass: what it was given and gave, and the norms outside of the modules
    `inside` its halves."""

    def __init__(self, layer: nn.Module, inside: Collection[nn.Module], seen: Trace) -> None:
        self._x, self._y, self._own = seen.given(layer), seen.gave(layer), layer
        told = getattr(layer, "residual_multiplier", None)
        self._told = [1.0, float(told)] if isinstance(told, (int, float)) else [1.0]
        self._seen = seen
        self._norms = [module for module in layer.modules() if module not in inside and self._changes(module, seen)]

    def _changes(self, module: nn.Module, seen: Trace) -> bool:
        """Whether a module, in one call, may make something else of as many numbers."""
        calls = seen.calls.get(module, [])
        if any(module.children()) or isinstance(module, INERT) or len(calls) != 1:
            return False
        given, gave = calls[0].given, calls[0].gave
        return given is not None and gave is not None and given.shape == self._x.shape == gave.shape

    def _giving(self, value: Tensor, others: Mapping[str, nn.Module]) -> nn.Module | None:
        """The norm that gave `value`, one of the `others` last: beside a half that adds nothing, two norms give the
        same."""
        found = [m for m in self._norms if torch.equal(self._seen.gave(m), value)]
        return next((m for m in found if m not in others.values()), next(iter(found), None))

    def _normed(self, norms: dict[str, nn.Module], place: str, value: Tensor) -> Tensor:
        """What a norm that is given `value` makes of it, if there is one."""
        norm = next((m for m in self._norms if torch.equal(self._seen.given(m), value)), None)
        if norm is None:
            return value
        norms[place] = norm
        return self._seen.gave(norm)

    def _scale(self, x: Tensor, gave: Tensor, total: Tensor, known: float | None = None) -> float | None:
        """By what a half's output is multiplied before it is added to x; None where the total is no such sum. known:
        what it has to be."""
        found = float(((total - x) * gave).sum() / (gave * gave).sum().clamp_min(1e-30))
        scales = [*self._told, found] if known is None else [known]
        return next((scale for scale in scales if self._seen.sums(x, scale * gave, total)), None)

    def _scaled_sum(self, x: Tensor, gave: Tensor, total: Tensor, known: float | None) -> tuple[float, float] | None:
        """The same, and what the sum is multiplied by."""
        scale = self._scale(x, gave, total, known)
        if scale is not None:
            return scale, 1.0
        for scale in self._told if known is None else [known]:
            plain = x + scale * gave
            end = float((total * plain).sum() / (plain * plain).sum().clamp_min(1e-30))
            if self._seen.sums(end * x, end * scale * gave, total):
                return scale, end
        return None

    def _more(self, gave: Tensor, total: Tensor) -> Tensor | None:
        """A parameter of the layer that is added to x besides what its attention gives, where that is the total."""
        tensors = (p for module in self._own.modules() for p in module._parameters.values() if p is not None)
        fitting = (p for p in tensors if p.shape == self._x.shape[-1:])
        return next((p for p in fitting if self._seen.sums(self._x, gave + p.detach().float().cpu(), total)), None)


class _Layer(Residual):
    """One layer in a pass, with what its halves were given and gave."""

    def __init__(self, anatomy: Anatomy, index: int, seen: Trace) -> None:
        attention = anatomy.attentions[index]
        assert attention is not None
        self._attention = attended_in(attention, seen)
        self._mlp, of_mlp, self._beside = mlp_in_pass(anatomy, index, seen)
        super().__init__(anatomy.layers[index], {*attention.module.modules(), *of_mlp}, seen)
        if any(part.shape != self._x.shape for part in (*self._attention, *self._mlp, self._y)):
            raise NotCovered("a half of its decoder layers gives something else than the size of what it reads")

    def read(self) -> Composition:
        norms: dict[str, nn.Module] = {}
        reads, gave = self._attention
        attention_in = self._giving(reads, norms)
        if attention_in is not None:
            norms["attention_in"], reads = attention_in, self._seen.given(attention_in)
        if not torch.equal(reads, self._x):
            raise NotCovered("its attention reads something else than the residual stream")
        gave = self._normed(norms, "attention_out", gave)
        for kind in (self._before_mlp, self._after_attention):
            found = kind(dict(norms), gave)
            if found is not None:
                return found
        raise NotCovered("what its decoder layers add up is not what decode steps do")

    def _before_mlp(self, norms: dict[str, nn.Module], attended: Tensor) -> Composition | None:
        """A norm, or none, between the residual stream and the MLP."""
        reads = self._mlp[0]
        mlp_in = self._giving(reads, norms)
        if mlp_in is not None:
            norms["mlp_in"], reads = mlp_in, self._seen.given(mlp_in)
        if torch.equal(reads, self._x):
            return self._closed(norms, self._x, attended, parallel=True)
        scale, more = self._scale(self._x, attended, reads), None
        if scale is None:
            more = self._more(attended, reads)
            scale = None if more is None else 1.0
        found = None if scale is None else self._closed(norms, reads, scale=scale)
        return found if found is None or more is None else replace(found, more=more)

    def _after_attention(self, norms: dict[str, nn.Module], attended: Tensor) -> Composition | None:
        """A norm of the residual stream after the attention, which the MLP reads as it is."""
        after = self._giving(self._mlp[0], norms)
        if after is None:
            return None
        norms["attention_after"], given = after, self._seen.given(after)
        scale = self._scale(self._x, attended, given)
        return None if scale is None else self._closed(norms, self._mlp[0], scale=scale)

    def _closed(
        self,
        norms: dict[str, nn.Module],
        x: Tensor,
        attended: Tensor | float = 0.0,
        parallel: bool = False,
        scale: float | None = None,
    ) -> Composition | None:
        """The composition, if the residual stream x and what the MLP gives come to what the layer gave.

        attended: what a parallel attention gives. scale: of what the halves give, where that is known.
        """
        more = self._normed(norms, "mlp_out", self._mlp[1]) + attended
        y, after = self._y, self._giving(self._y, norms)
        if after is not None:
            norms["mlp_after"], y = after, self._seen.given(after)
        found = self._scaled_sum(x, more, y, scale)
        if found is not None:
            return Composition(norms, parallel, found[0], self._beside, found[1])
        for told in self._told if scale is None else [scale]:
            side = side_of(self._own, x + told * more, self._seen)
            ended = None if side is None else self._scaled_sum(x + told * more, side[1], y, 1.0)
            if side is not None and ended is not None:
                return Composition(norms, parallel, told, self._beside, ended[1], side=side[0])
        return None


def attended_in(attention: Attention, seen: Trace) -> tuple[Tensor, Tensor]:
    """What an attention was given and gave."""
    return seen.given(attention.part(attention.inputs[0])), seen.gave(attention.part(attention.output))


def mlp_in_pass(anatomy: Anatomy, index: int, seen: Trace) -> tuple[tuple[Tensor, Tensor], list[nn.Module], bool]:
    """What a layer's MLP, or its experts, were given and gave, the modules inside, and whether an MLP beside the
    experts (Granite) is counted in."""
    mlp, experts = anatomy.feed_forwards[index], anatomy.experts[index]
    inside = [] if mlp is None else list(mlp.owner.modules()) if mlp.whole else [mlp.up, mlp.down]
    if experts is None:
        if mlp is None:
            raise NotCovered("a layer has no MLP that was recognised")
        return (seen.given(mlp.up), seen.gave(mlp.down)), inside, False
    inside += (module for module in experts.block.modules() if module is not experts.norm)
    reads = seen.given(experts.block)
    gave = seen.gave(experts.block) if experts.norm is None else seen.given(experts.norm)
    if mlp is None or mlp is experts.shared or not torch.equal(seen.given(mlp.up), reads):
        return (reads, gave), inside, False
    return (reads, gave + seen.gave(mlp.down)), inside, True
