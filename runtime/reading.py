"""Describes a model (spec.py), as far as it can be described.

A pass of a few tokens shows what the parts do to each other (tracing.py); on a meta device, where there is none, the
attribute names that many architectures share have to do. What is read may still be wrong elsewhere than in this pass:
before a lowering's first step is used, its logits are compared with those of the model's own modules.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..kernels.packed import ACTS
from ..predictors.anatomy import Anatomy, Attention, Experts, FeedForward, canonical_activation, curve_of, rows_of
from .attention_names import linear
from .attention_reading import alibi, read_attention
from .calls import NotCovered
from .coverage import uncovered
from .layer_reading import Composition, by_name, by_values
from .norms import normed, read_norm
from .packed_layer import PackedRows
from .recurrence_reading import read_recurrence
from .recurrent_states import is_recurrent
from .side_reading import read_sides
from .spec import (
    STATIC_ROPE,
    AttentionSpec,
    BeforeHeadSpec,
    BrickSpec,
    ExpertsSpec,
    LatentSpec,
    LayerSpec,
    LinearSpec,
    ModelSpec,
    NormSpec,
    PlacesSpec,
    RecurrentSpec,
    RotarySpec,
    RouterSpec,
    is_plain_linear,
)
from .tracing import Trace, first_input, trace


def read_spec(model: Any, anatomy: Anatomy) -> ModelSpec:
    """Describes `model`.

    Raises:
        NotCovered: something of it is not described by the classes of spec.py.
    """
    table = model.get_input_embeddings()
    check_table(table)
    if any(attention is None for attention in anatomy.attentions):
        raise NotCovered("a layer's attention was not recognised")
    windows_of = cached(model.config, len(anatomy))  # before anything is computed
    seen = None if table.weight.is_meta and not isinstance(table, PackedRows) else trace(model, anatomy, partly=True)
    idle = idle_layers(anatomy, seen)
    found = [
        _IDLE if i in idle else by_name(layer) if seen is None else by_values(anatomy, i, seen)
        for i, layer in enumerate(anatomy.layers)
    ]
    beside = [index for index, layer in enumerate(found) if layer.beside]
    sides = [layer.side for layer in found]
    norms = [[*layer.norms.values(), *(() if layer.side is None else layer.side.modules)] for layer in found]
    more = [layer.more for layer in found]
    reason = uncovered(anatomy, norms, None if seen is None else seen.calls, beside, more, idle)
    if reason is not None:
        raise NotCovered(reason)
    config = model.config.get_text_config()
    size = table.weight.shape[-1]
    rotary, attentions = _attentions(anatomy, config, windows_of, seen, idle)
    side_inputs, of_layers = read_sides(anatomy, sides, table, seen)
    layers = tuple(
        replace(_layer(anatomy, index, layer, attention, size), side=of_layers[index])
        for index, (layer, attention) in enumerate(zip(found, attentions, strict=True))
    )
    scale, places, embedding_norm, token_norm = _embedding(anatomy, table, seen)
    divisor = getattr(config, "logits_scaling", None)
    return ModelSpec(
        table=table,
        layers=layers,
        norm=_last_norm(anatomy, seen, size),
        head=linear(model.get_output_embeddings()),
        rotary=rotary,
        dtype=table.weight.dtype,
        embedding_scale=scale,
        logit_scale=1.0 / float(divisor) if divisor else float(getattr(config, "logit_scale", None) or 1.0),
        logit_softcap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
        places=places,
        embedding_norm=embedding_norm,
        token_norm=token_norm,
        before=before_head(model, anatomy, size),
        sides=side_inputs,
        end=read_end(anatomy, rotary, places, seen),
    )


_IDLE = Composition({}, False, 1.0)


def idle_layers(anatomy: Anatomy, seen: Trace | None) -> frozenset[int]:
    """The layers that a pass of text alone does not call.

    Raises:
        NotCovered: one that it calls keeps no keys and values.
    """
    if seen is None:
        return frozenset()
    idle = frozenset(index for index, layer in enumerate(anatomy.layers) if layer not in seen.calls)
    kept = zip(seen.keys, seen.states, strict=True)
    if any(keys.ndim != 3 and not states for index, (keys, states) in enumerate(kept) if index not in idle):
        raise NotCovered("a layer keeps no keys and values in its cache")
    return idle


def windows(config: Any, layers: int) -> list[int]:
    """How far back each layer sees (0: all), as the cache that `generate` makes says it.

    Raises:
        NotCovered: a layer keeps something else than keys and values.
    """
    found = cached(config, layers)
    if None in found:
        raise NotCovered("its KV cache has layers of type LinearAttentionLayer")
    return cast("list[int]", found)


def cached(config: Any, layers: int) -> list[int | None]:
    """`windows`, and None for layers that keep the states of a recurrence."""
    cache = DynamicCache(config=config)
    if len(cache.layers) != layers:
        raise NotCovered("the model does not keep one KV cache layer for each decoder layer")
    found: list[int | None] = []
    kept: Any = cache.layers
    for layer in kept:
        plain = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        if not (plain or is_recurrent(layer)):
            raise NotCovered(f"its KV cache has layers of type {type(layer).__name__}")
        found.append((int(layer.sliding_window) if layer.is_sliding else 0) if plain else None)
    return found


# ---- layers ----


def _attentions(
    anatomy: Anatomy, config: Any, windows_of: list[int | None], seen: Trace | None, idle: frozenset[int]
) -> tuple[RotarySpec | None, list[AttentionSpec | LatentSpec | RecurrentSpec | None]]:
    """How the layers rotate, and attend; None for idle ones."""
    if seen is None and None in windows_of:
        raise NotCovered("what a recurrence computes shows in a pass alone, and its weights are not there yet")
    recurrent = {
        index: read_recurrence(cast(Attention, anatomy.attentions[index]), index, cast(Trace, seen))
        for index, window in enumerate(windows_of)
        if window is None and index not in idle
    }
    rotary = read_rotary(anatomy)
    variants = [rotary] if rotary is None or seen is None else [rotary, replace(rotary, backwards=True)]
    refused: NotCovered | None = None
    for variant in variants:
        try:
            return variant, [
                None
                if index in idle
                else recurrent[index]
                if window is None
                else read_attention(cast(Attention, attention), index, window, config, variant, seen)
                for index, (attention, window) in enumerate(zip(anatomy.attentions, windows_of, strict=True))
            ]
        except NotCovered as reason:
            refused = refused or reason
    raise cast(NotCovered, refused)


def _layer(anatomy: Anatomy, index: int, found: Composition, attention: Any, size: int) -> LayerSpec:
    mlp, experts = anatomy.feed_forwards[index], anatomy.experts[index]
    if found is _IDLE:
        mlp = experts = None
    if found.more is not None:
        attention = replace(attention, output=replace(attention.output, more=found.more))
    return LayerSpec(
        attention=attention,
        bricks=(read_brick(mlp),) if mlp is not None and experts is None else (),
        experts=None if experts is None else read_experts(experts, mlp if found.beside else experts.shared),
        residual_scale=found.residual_scale,
        parallel=found.parallel,
        scale=found.scale,
        **cast(Any, found.specs(size)),
    )


def read_brick(mlp: FeedForward) -> BrickSpec:
    act, curve = canonical_activation(mlp.act), None
    if not isinstance(act, str):
        curve = curve_of(mlp.act)
        if curve is None:
            raise NotCovered("its activation is not one of the kernels'")
        act = "curve"
    linears = [mlp.up, mlp.down] if mlp.gate_name is None else [getattr(mlp.owner, mlp.gate_name), mlp.up, mlp.down]
    if not all(map(is_plain_linear, linears)):
        raise NotCovered("a projection of an MLP is not a plain linear layer")
    width = mlp.intermediate_size
    up = LinearSpec(mlp.up, (width, width) if mlp.stacked else None)
    gate = None if mlp.gate_name is None else LinearSpec(linears[0])
    norm = None if mlp.norm_name is None else read_norm(getattr(mlp.owner, mlp.norm_name), width)
    numbers = None if curve is None else curve.numbers
    return BrickSpec(gate, up, LinearSpec(mlp.down), act, mlp, norm, numbers)


def read_experts(found: Experts, shared: FeedForward | None) -> ExpertsSpec:
    """shared: an MLP that every token goes through, in the mixture's block or beside it."""
    router, gating, at = found.router, found.gating, found.layout
    if router is None:
        raise NotCovered("what its router computes is not known")
    act = None if gating is None else canonical_activation(gating.act)
    if gating is None or not isinstance(act, str):
        raise NotCovered("what its experts make of gate and up is not one of the kernels' activations")

    if shared is not None and shared.norm_name is not None:
        raise NotCovered("a norm stands inside of a shared expert")

    def own(name: str | None) -> Tensor | None:
        return None if name is None else found.parameter(name)

    return ExpertsSpec(
        router=RouterSpec(
            weight=router.weight,
            bias=router.bias,
            correction=router.correction,
            choice=router.choice,
            dtype=torch.float32 if router.upcast else router.weight.dtype,
        ),
        gate=own(at.gate),
        up=found.parameter(at.up),
        down=found.down,
        gate_bias=own(at.gate_bias),
        up_bias=own(at.up_bias),
        down_bias=own(at.down_bias),
        layout=at,
        act=act,
        alpha=gating.alpha,
        shift=gating.shift,
        limit=gating.limit,
        count=found.count,
        width=found.intermediate_size,
        shared=None if shared is None else read_brick(shared),
        shared_gate=None if found.shared_gate is None else linear(found.shared_gate),
        scaled_inputs=found.scaled_inputs,
        routed_scale=found.routed_scale,
        shared_scale=found.shared_scale,
        experts=found,
    )


def _last_norm(anatomy: Anatomy, seen: Trace | None, size: int) -> NormSpec | None:
    """The norm between the last layer and what the decoder gives."""
    if seen is not None:
        called = [layer for layer in anatomy.layers if layer in seen.calls]
        last, gave = seen.gave(called[-1]), cast(Tensor, seen.last)
        if torch.equal(last, gave):
            return None
        norm = next((module for module, calls in seen.calls.items() if any(c.made(last, gave) for c in calls)), None)
        if norm is None:
            raise NotCovered("what the decoder gives is not its last layer's output, normed or as it is")
        return read_norm(norm, size)
    for name in ("norm", "final_layernorm", "final_layer_norm", "ln_f"):
        module = getattr(anatomy.stack, name, None)
        if isinstance(module, nn.Module):
            return read_norm(module, size)
    raise NotCovered("no norm before the LM head was found")


def before_head(model: Any, anatomy: Anatomy, size: int) -> BeforeHeadSpec | None:
    """A map of the model's that, as its shape says, comes between the decoder and the LM head; whether it does, the
    comparison with the model's own logits tells."""
    head = model.get_output_embeddings()
    for module in model.children():
        inside = set(module.modules())
        if anatomy.stack in inside or head in inside:
            continue
        linears = [part for part in inside if is_plain_linear(part)]
        norms = [part for part in module.children() if {p.shape for p in part.parameters()} == {(size,)}]
        square = len(linears) == 1 and linears[0].weight.shape == (size, size)
        if (
            not square
            or len(norms) > 1
            or set(module.parameters()) - {p for part in (*linears, *norms) for p in part.parameters()}
        ):
            continue
        found = BeforeHeadSpec(LinearSpec(linears[0]), "", read_norm(norms[0], size) if norms else None)
        for act in ACTS:
            if _is_map(module, replace(found, act=act)):
                return replace(found, act=act)
    return None


def _is_map(module: nn.Module, spec: BeforeHeadSpec) -> bool:
    weight, bias = rows_of(spec.linear.module)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.shape[1], generator=generator, dtype=torch.float32, device="cpu").to(weight)
    with torch.no_grad():
        y = ACTS[spec.act](torch.nn.functional.linear(x, weight, bias))
        y = y if spec.norm is None else normed(spec.norm, y.float())
        found = module(x)
    most = 2e-2 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
    return isinstance(found, Tensor) and torch.allclose(found.float(), y.float(), rtol=most, atol=most)


# ---- positions and embeddings ----


def read_rotary(anatomy: Anatomy) -> RotarySpec | None:
    """How the layers rotate, if they do."""
    attending = (attention.module for attention in anatomy.attentions if attention is not None)
    named = getattr(anatomy.stack, "rotary_emb", None) or getattr(next(attending, None), "rotary_emb", None)
    module = named or next((m for m in anatomy.stack.children() if "inv_freq" in m._buffers), None)
    if isinstance(module, nn.Module):
        kinds = getattr(module, "rope_type", "default")
        names = set(cast(Any, kinds).values()) if isinstance(kinds, dict) else {kinds}
        if not names <= set(STATIC_ROPE):
            raise NotCovered(f"rotary embeddings of type {', '.join(sorted(names))} change with the length of the text")
        return RotarySpec(module, "layer_type" in inspect.signature(module.forward).parameters)
    for attention in filter(None, anatomy.attentions):
        table = getattr(attention.module, "embed_positions", None)
        if isinstance(table, Tensor) and table.ndim == 2:  # each layer has the same
            return RotarySpec(None, table=table)
    return None


def read_end(anatomy: Anatomy, rotary: RotarySpec | None, places: PlacesSpec | None, seen: Trace | None) -> int | None:
    """How many positions the model knows, where it has a table of them."""
    ends = [] if places is None else [places.count]
    if rotary is not None and rotary.table is not None:
        ends.append(rotary.table.shape[0])
    if seen is not None:  # biases of scores that were made for all positions before (MPT)
        attending = [a for a in anatomy.attentions if a is not None and a.module in seen.calls]
        biases = None if not attending else alibi(seen.named(attending[0].module))
        ends += [biases.shape[-1]] if biases is not None and biases.shape[-1] > seen.ids.numel() else []
    return min(ends, default=None)


def check_table(module: nn.Module) -> None:
    """Raises NotCovered where tokens' embeddings are not the rows of a matrix."""
    weight, own = module._parameters.get("weight"), type(module).forward.__module__.partition(".")[0]
    known = own in ("torch", "transformers") or isinstance(module, PackedRows)
    if not isinstance(module, nn.Embedding) or weight is None or not known:
        raise NotCovered(f"the token embeddings are a {type(module).__name__}")


Embedding = tuple["float | None", "PlacesSpec | None", "NormSpec | None", "NormSpec | None"]


def _embedding(anatomy: Anatomy, module: Any, seen: Trace | None) -> Embedding:
    """What embeddings are multiplied by (Gemma, Granite), what positions add to them, and the norms of the sum, and
    of the tokens' alone."""
    if seen is None:
        return None, None, None, None
    ids = seen.ids[0]
    rows = module.rows(ids.cpu()) if isinstance(module, PackedRows) else module.weight.detach()[ids]
    w, x, norm = rows.float(), seen.given(anatomy.layers[0]), None
    for part in seen.before:
        given = seen.calls[part][0].given
        if given is not None and not torch.equal(given, x) and seen.calls[part][0].made(given, x):
            norm, x = read_norm(part, x.shape[-1]), given
            break
    scale = float((x * w).sum() / (w * w).sum())
    if seen.near(scale * w, x):
        return 1.0 if abs(scale - 1.0) < 1e-3 else scale, None, norm, None
    for scale, table in ((s, t) for s in (1.0, math.sqrt(w.shape[-1])) for t in _tables(anatomy, module, seen)):
        first = _first_row(seen, table, x, scale * w)
        if first is not None:
            return scale, _places(anatomy, seen, norm, scale * w, table, first), norm, None
    for norm_of, call in ((part, call) for part in seen.before for call in seen.calls[part]):
        if call.given is None or call.gave is None or not seen.near(call.given, w) or seen.near(call.gave, w):
            continue
        for table in _tables(anatomy, module, seen):  # the tokens' are normed by themselves (BlenderbotSmall)
            first = _first_row(seen, table, x, call.gave)
            if first is not None:
                return 1.0, _places(anatomy, seen, None, call.gave, table, first), None, read_norm(norm_of, w.shape[-1])
    raise NotCovered("the first layer does not read plain token embeddings, nor with what positions add to them")


def _tables(anatomy: Anatomy, module: Any, seen: Trace) -> Iterator[Tensor]:
    """What may be a table of positions' embeddings."""
    hidden = module.weight.shape[-1]
    for part in (anatomy.stack, *seen.before):
        named = {**part._parameters, **part._buffers, **vars(part)}
        for value in named.values():
            fits = isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == hidden
            if fits and not value.is_meta and value is not module.weight and value.is_floating_point():
                yield value.detach()


def _first_row(seen: Trace, table: Tensor, x: Tensor, tokens: Tensor) -> int | None:
    """The first of the rows of a table that give x when they are added to the tokens' embeddings."""
    for first in range(min(8, table.shape[0] - len(x) + 1)):
        if seen.sums(tokens, table[first : first + len(x)].float(), x):
            return first
    return None


def _places(
    anatomy: Anatomy, seen: Trace, norm: NormSpec | None, tokens: Tensor, table: Tensor, first: int
) -> PlacesSpec:
    """tokens: their embeddings."""

    def made(begin: int) -> Tensor:
        rows = torch.arange(first + begin, first + begin + len(tokens), device=table.device).clamp_min(0)
        x = tokens + table[rows].float()
        return x if norm is None else normed(norm, x)

    return PlacesSpec(table, first, *_counted(anatomy, seen, made))


def _counted(anatomy: Anatomy, seen: Trace, made: Callable[[int], Tensor]) -> tuple[bool, bool]:
    """Whether positions are counted from the first token that the mask does not hide, where none are given; and whether
    those that are given count. made: what the first layer is given where positions begin with a number."""
    ids, usual, later = seen.ids, made(0), made(1)
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    found = first_input(anatomy, ids, attention_mask=mask)[1:]
    by_mask = seen.near(found, made(-1)[1:])
    if not by_mask and not seen.near(found, usual[1:]):
        raise NotCovered("positions are counted in a way of their own where there is padding")
    try:
        found = first_input(anatomy, ids, position_ids=torch.arange(1, len(later) + 1, device=ids.device)[None])
    except NotCovered:  # it takes none
        return by_mask, False
    if not seen.near(found, later) and not seen.near(found, usual):
        raise NotCovered("positions that are given count in a way of their own")
    return by_mask, seen.near(found, later)
