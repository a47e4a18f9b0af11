"""Reads models whose decoder layers native steps cover in part: hybrids with layers of other kinds, attentions or MLPs
that nothing describes, layers that do something beside both halves.

Each layer is shared out between native steps and its own module, which is told to leave out the halves that are not its
own. What is read was seen in a pass of a few tokens; the first steps are compared with the modules' own (spans.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..predictors.anatomy import Anatomy
from .attention_names import linear
from .attention_reading import read_attention
from .calls import NotCovered
from .coverage import computes_as_its_class, uncovered_part
from .layer_reading import Composition, Residual, attended_in, by_values, mlp_in_pass
from .packed_layer import PackedRows
from .reading import check_table, read_brick, read_end, read_experts, read_rotary
from .spec import AttentionSpec, BrickSpec, ExpertsSpec, LatentSpec, LayerSpec, ModelSpec, NormSpec, RotarySpec
from .tracing import Trace, trace

ATTENTION, MLP = "attention", "mlp"
BOTH = frozenset((ATTENTION, MLP))


@dataclass(frozen=True, eq=False)
class Split:
    """How a layer is shared out.

    before, after: what is computed natively before its module is called, and after that; None: nothing is.
    without: the halves that the module leaves out, or does not get to compute; None: it is not called.
    outputs: how many things the layer gives; see `Call`. attention_outputs, mlp_outputs: likewise.
    joined: whether what it gives is what the next layer is given. has_mlp: whether an MLP, or experts, are in it.
    """

    before: LayerSpec | None = None
    without: frozenset[str] | None = frozenset()
    after: LayerSpec | None = None
    outputs: int = 0
    attention_outputs: int = 0
    mlp_outputs: int = 0
    joined: bool = True
    has_mlp: bool = True

    @property
    def pieces(self) -> list[LayerSpec]:
        return [piece for piece in (self.before, self.after) if piece is not None]

    @property
    def halves(self) -> int:
        """Attentions and MLPs that are native."""
        return sum((p.attention is not None) + bool(p.bricks or p.experts) for p in self.pieces)

    @property
    def parts(self) -> int:
        """Halves that the layer has."""
        return self.halves if self.without is None else 1 + self.has_mlp


@dataclass(frozen=True, eq=False)
class Shared:
    """A model whose layers are shared out. spec: of the native pieces, as if these were all of its layers."""

    spec: ModelSpec
    splits: tuple[Split, ...]

    @property
    def halves(self) -> tuple[int, int]:
        """How many of the layers' halves are native, and how many there are."""
        return sum(split.halves for split in self.splits), sum(split.parts for split in self.splits)


def read_shared(model: Any, anatomy: Anatomy) -> Iterator[Shared]:
    """What may be computed natively of `model`, most first.

    Raises:
        NotCovered: nothing is.
    """
    table = model.get_input_embeddings()
    check_table(table)
    if table.weight.is_meta and not isinstance(table, PackedRows):
        raise NotCovered("its weights are not there yet")
    if len(set(anatomy.layers)) != len(anatomy):
        raise NotCovered("a layer stands in it twice")
    seen = trace(model, anatomy, partly=True)
    rotary, attentions = _attentions(model, anatomy, seen)
    found: list[tuple[Split, ...]] = []
    none: list[Attended] = [None] * len(anatomy)
    for besides, attending in ((True, attentions), (False, attentions), (False, none)):  # the last: MLPs alone
        splits = tuple(_Reader(anatomy, i, attending[i], seen).split(besides) for i in range(len(anatomy)))
        if any(split.halves for split in splits) and not _alike(splits, found):
            found.append(splits)
    if not found:
        raise NotCovered("no half of its decoder layers is described")
    for splits in found:
        pieces = tuple(piece for split in splits for piece in split.pieces)
        spec = ModelSpec(
            table=table,
            layers=pieces,
            norm=None,
            head=linear(model.get_output_embeddings()),
            rotary=rotary if any(piece.attention is not None for piece in pieces) else None,
            dtype=table.weight.dtype,
            embedding_scale=1.0,
            logit_scale=1.0,
            logit_softcap=0.0,
            end=read_end(anatomy, rotary, None, seen),
        )
        yield Shared(spec, splits)


def _alike(splits: tuple[Split, ...], found: list[tuple[Split, ...]]) -> bool:
    shapes = [[(s.before is None, s.without, s.after is None) for s in some] for some in (splits, *found)]
    return shapes[0] in shapes[1:]


# ---- attentions ----


Attended = AttentionSpec | LatentSpec | None


def _attentions(model: Any, anatomy: Anatomy, seen: Trace) -> tuple[RotarySpec | None, list[Attended]]:
    """How the layers rotate, and the attentions of those whose is described."""
    config, cache = model.config.get_text_config(), DynamicCache(config=model.config)
    try:
        rotary = read_rotary(anatomy)
    except NotCovered:  # the modules' own to do
        return None, [None] * len(anatomy)
    variants = [rotary] if rotary is None else [rotary, replace(rotary, backwards=True)]
    found = [[_attention(anatomy, i, cache, config, one, seen) for i in range(len(anatomy))] for one in variants]
    best = max(range(len(found)), key=lambda i: sum(attention is not None for attention in found[i]))
    return variants[best], found[best]


def _attention(
    anatomy: Anatomy, index: int, cache: DynamicCache, config: Any, rotary: RotarySpec | None, seen: Trace
) -> Attended:
    attention, layers = anatomy.attentions[index], cast(Any, cache.layers)
    if attention is None or attention.module not in seen.calls or index >= min(len(layers), len(seen.keys)):
        return None
    layer = layers[index]
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or seen.keys[index].ndim != 3:
        return None
    if uncovered_part(attention.module, None, None, attention, (), seen.calls) is not None:
        return None
    try:
        window = int(layer.sliding_window) if layer.is_sliding else 0
        return read_attention(attention, index, window, config, rotary, seen)
    except NotCovered:
        return None


# ---- layers ----

Bricks = tuple[tuple[BrickSpec, ...], "ExpertsSpec | None"]


class _Reader:
    """One layer in a pass."""

    def __init__(self, anatomy: Anatomy, index: int, attention: Attended, seen: Trace) -> None:
        self._anatomy, self._index, self._attention, self._seen = anatomy, index, attention, seen
        self._layer = anatomy.layers[index]

    def split(self, besides: bool) -> Split:
        """besides: whether both halves may be native where the layer does something beside them."""
        seen, layer = self._seen, self._layer
        try:
            x, y, outputs = seen.given(layer), seen.gave(layer), seen.outputs(layer)
        except NotCovered:
            return Split(joined=False)
        following = self._anatomy.layers[self._index + 1 : self._index + 2]
        joined = not following or self._goes_on(following[0], y)
        plain = x.ndim == 2 and x.shape == y.shape and computes_as_its_class(layer)
        found = self._split(besides) if plain else Split()
        attention = self._anatomy.attentions[self._index]
        experts = self._anatomy.experts[self._index]
        return replace(
            found,
            outputs=outputs,
            attention_outputs=0 if attention is None else self._outputs(attention.module),
            mlp_outputs=0 if experts is None else self._outputs(experts.block),
            joined=joined,
            has_mlp=experts is not None or self._anatomy.feed_forwards[self._index] is not None,
        )

    def _goes_on(self, following: nn.Module, y: Tensor) -> bool:
        try:
            return torch.equal(self._seen.given(following), y)
        except NotCovered:
            return False

    def _outputs(self, module: nn.Module) -> int:
        try:
            return self._seen.outputs(module)
        except NotCovered:
            return 0

    def _split(self, besides: bool) -> Split:
        mlp = self._mlp()
        whole = self._whole(mlp)
        if whole is not None:
            return Split(before=whole, without=None)
        middle = _Halves(self._anatomy, self._index, self._seen)
        ahead = None if self._attention is None else middle.attention()
        behind = None if mlp is None else middle.mlp()
        if ahead is None and behind is None:
            return Split()
        first = None if ahead is None else self._piece(ahead, self._attention, ())
        last = None if behind is None or mlp is None else self._piece(behind, None, mlp)
        if first is not None and middle.ends and self._bare(ahead, attends=True):
            return Split(before=first, without=None)  # a layer that does nothing else
        if last is not None and middle.closed and middle.begins and self._bare(behind, attends=False):
            return Split(before=last, without=None)
        # what the module leaves out is zero there, and a norm of it has to be, too
        first = None if first is None or _speaks(first.attention_out) else first
        last = None if last is None or _speaks(last.mlp_out) else last
        if besides and first is not None and last is not None and _go_together(first, last):
            both = {place: getattr(last, place) for place in ("mlp_in", "mlp_out", "bricks", "experts")}
            return Split(before=replace(first, **cast(Any, both)), without=BOTH)
        if last is not None and middle.closed and last.mlp_after is None:
            return Split(without=frozenset((MLP,)), after=last)
        if first is not None:
            return Split(before=first, without=frozenset((ATTENTION,)))
        return Split()

    def _whole(self, mlp: Bricks | None) -> LayerSpec | None:
        """The layer, where all of it is described."""
        if self._attention is None or mlp is None:
            return None
        anatomy, index = self._anatomy, self._index
        try:
            found = by_values(anatomy, index, self._seen)
            if found.side is not None:
                return None
            parts = anatomy.feed_forwards[index], anatomy.experts[index], anatomy.attentions[index]
            reason = uncovered_part(
                self._layer, *parts, found.norms.values(), self._seen.calls, found.beside, found.more
            )
            return None if reason is not None else self._piece(found, self._attention, mlp)
        except NotCovered:
            return None

    def _piece(self, found: Composition, attention: Attended, mlp: Bricks | tuple[()]) -> LayerSpec | None:
        bricks, experts = mlp or ((), None)
        if isinstance(attention, AttentionSpec) and found.more is not None:
            attention = replace(attention, output=replace(attention.output, more=found.more))
        try:
            norms = cast(Any, found.specs(self._seen.given(self._layer).shape[-1]))
        except NotCovered:
            return None
        return LayerSpec(
            attention=attention,
            bricks=bricks,
            experts=experts,
            residual_scale=found.residual_scale,
            parallel=found.parallel,
            scale=found.scale,
            **norms,
        )

    def _bare(self, found: Composition | None, attends: bool) -> bool:
        """Whether a layer is its one half, and norms."""
        if found is None:
            return False
        mlp = None if attends else self._anatomy.feed_forwards[self._index]
        experts = None if attends else self._anatomy.experts[self._index]
        attention, norms = self._anatomy.attentions[self._index] if attends else None, found.norms.values()
        return uncovered_part(self._layer, mlp, experts, attention, norms, self._seen.calls, found.beside) is None

    def _mlp(self) -> Bricks | None:
        """The layer's MLP, or its experts, as far as they are described."""
        mlp, experts = self._anatomy.feed_forwards[self._index], self._anatomy.experts[self._index]
        try:
            (reads, _), _, beside = mlp_in_pass(self._anatomy, self._index, self._seen)
            if reads.shape != self._seen.given(self._layer).shape:
                return None
            if experts is not None:
                owned = experts.shared if not beside else None
                if uncovered_part(experts.block, owned, experts, None, (), self._seen.calls, beside) is not None:
                    return None
                shared = mlp if beside else experts.shared
                if beside and mlp is not None and uncovered_part(mlp.owner, mlp, None, None, (), self._seen.calls):
                    return None
                return (), read_experts(experts, shared)
            if mlp is None or (mlp.whole and uncovered_part(mlp.owner, mlp, None, None, (), self._seen.calls)):
                return None
            return (read_brick(mlp),), None
        except NotCovered:
            return None


def _speaks(norm: NormSpec | None) -> bool:
    """Whether a norm makes something of nothing."""
    return norm is not None and norm.bias is not None


def _go_together(first: LayerSpec, last: LayerSpec) -> bool:
    """Whether both halves may come before whatever else their layer does."""
    return last.mlp_after is None and first.residual_scale == last.residual_scale


class _Halves(Residual):
    """One layer in a pass, whose halves are read one by one.

    Attributes:
        begins: whether its MLP comes first. ends: whether nothing comes behind its attention.
        closed: whether the layer gives what its MLP makes of the residual stream.
    """

    def __init__(self, anatomy: Anatomy, index: int, seen: Trace) -> None:
        inside = set[nn.Module]()
        attention = anatomy.attentions[index]
        self._attends = self._found = None
        try:
            if attention is not None:
                inside |= set(attention.module.modules())
                self._attends = attended_in(attention, seen)
        except NotCovered:
            self._attends = None
        try:
            (reads, gave), of_mlp, self._beside = mlp_in_pass(anatomy, index, seen)
            inside |= set(of_mlp)
            self._found = reads, gave
        except NotCovered:
            self._found = None
        super().__init__(anatomy.layers[index], inside, seen)
        self.begins = self.ends = self.closed = False

    def _fits(self, parts: tuple[Tensor, Tensor] | None) -> bool:
        return parts is not None and all(part.shape == self._x.shape for part in parts)

    def _middle(self, norms: dict[str, nn.Module]) -> Tensor | None:
        """The residual stream between the halves: what the MLP, or the norm before it, is given."""
        if not self._fits(self._found):
            return None
        assert self._found is not None
        reads = self._found[0]
        norm = self._giving(reads, norms)
        if norm is None:
            return reads
        norms["mlp_in"] = norm
        return self._seen.given(norm)

    def attention(self) -> Composition | None:
        """The first half, if it adds what the attention gives to what the layer is given."""
        if not self._fits(self._attends):
            return None
        assert self._attends is not None
        norms: dict[str, nn.Module] = {}
        reads, gave = self._attends
        norm = self._giving(reads, norms)
        if norm is not None:
            norms["attention_in"], reads = norm, self._seen.given(norm)
        if not torch.equal(reads, self._x):
            return None
        gave, middle = self._normed(norms, "attention_out", gave), self._middle({})
        for total, ends in ((middle, False), (self._y, True)):
            scale = None if total is None else self._scale(self._x, gave, total)
            if scale is not None and scale != 0.0:
                self.ends = ends or torch.equal(cast(Tensor, total), self._y)
                return Composition(norms, False, scale)
        return None

    def mlp(self) -> Composition | None:
        """The second half, which adds what the MLP gives to what it, or the norm before it, reads."""
        norms: dict[str, nn.Module] = {}
        x = self._middle(norms)
        if x is None or self._found is None or not self._fits(self._found):
            return None
        gave, y = self._normed(norms, "mlp_out", self._found[1]), self._y
        after = self._giving(y, norms)
        if after is not None and after not in norms.values():
            norms["mlp_after"], y = after, self._seen.given(after)
        scale = self._scale(x, gave, y)
        self.begins, self.closed = torch.equal(x, self._x), scale is not None and scale != 0.0
        if scale is None or scale == 0.0:
            norms.pop("mlp_after", None)
            scale = self._told[-1]
        return Composition(norms, False, scale, self._beside)
