"""Where an architecture keeps its decoder layers, MLP matrices, activation and attention projections.

A small table names the attributes of the known families; any other family is recognised by its structure.
Either way the result is proved before it is used: the formula ``down(act(gate(x)) * up(x))`` over the matrices
found must reproduce what the model's own MLP module returns.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from .checks import kind_of
from .errors import CoreskipError
from .experts import Experts, find_experts
from .feed_forward import (
    Activation,
    FeedForward,
    Matrices,
    canonical_activation,
    curve_of,
    is_linear,
    is_packed,
    proved,
    readings,
    rows_of,
    shape_of,
    written_out,
)

__all__ = [
    "FAMILIES",
    "Activation",
    "Anatomy",
    "Attention",
    "Experts",
    "Family",
    "FeedForward",
    "Matrices",
    "canonical_activation",
    "check_model",
    "curve_of",
    "dissect",
    "is_packed",
    "rows_of",
    "shape_of",
]


@dataclass(frozen=True)
class Family:
    """Attribute names of one architecture family; paths are relative to the base model and to the layer."""

    layers: str
    mlp: str  # "" where the decoder layer itself holds the MLP's linears (OPT)
    gate: str | None
    up: str
    down: str
    act: str
    attention: str
    inputs: tuple[str, ...]  # the attention's input projections: q, k, v or one fused
    output: str
    stacked: bool = False  # `up` holds the gate's rows, then the up rows (phi3)
    whole: bool = True  # the MLP module maps x to the MLP's output and does nothing else


_QKV = ("q_proj", "k_proj", "v_proj")
_LLAMA = Family("layers", "mlp", "gate_proj", "up_proj", "down_proj", "act_fn", "self_attn", _QKV, "o_proj")
_NEOX = Family(
    "layers", "mlp", None, "dense_h_to_4h", "dense_4h_to_h", "act", "attention", ("query_key_value",), "dense"
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "stablelm"), _LLAMA
    ),
    "phi3": Family(
        "layers", "mlp", None, "gate_up_proj", "down_proj", "activation_fn", "self_attn", ("qkv_proj",), "o_proj", True
    ),
    "starcoder2": Family("layers", "mlp", None, "c_fc", "c_proj", "act", "self_attn", _QKV, "o_proj"),
    "opt": Family(
        "decoder.layers", "", None, "fc1", "fc2", "activation_fn", "self_attn", _QKV, "out_proj", whole=False
    ),
    "gpt2": Family("h", "mlp", None, "c_fc", "c_proj", "act", "attn", ("c_attn",), "c_proj"),
    "gpt_neox": _NEOX,
    "falcon": Family(
        "h", "mlp", None, "dense_h_to_4h", "dense_4h_to_h", "act", "self_attention", ("query_key_value",), "dense"
    ),
    "bloom": Family(
        "h",
        "mlp",
        None,
        "dense_h_to_4h",
        "dense_4h_to_h",
        "gelu_impl",
        "self_attention",
        ("query_key_value",),
        "dense",
        whole=False,
    ),
}


@dataclass(frozen=True, eq=False)
class Attention:
    """One decoder layer's attention module and the names of its projections. gate: of one beside q, k and v that heads
    may be multiplied by."""

    module: nn.Module
    inputs: tuple[str, ...]
    output: str
    gate: str | None = None

    def part(self, name: str) -> nn.Module:
        """The projection of that name, which may be inside of another module."""
        return self.module.get_submodule(name)


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of a causal LM that coreskip works on, in layer order."""

    model_type: str
    stack: nn.Module  # the module that holds the decoder layers; its forward sees the KV cache
    layers: tuple[nn.Module, ...]
    feed_forwards: tuple[FeedForward | None, ...]  # of a layer with experts the shared one, which all tokens go through
    attentions: tuple[Attention | None, ...]
    experts: tuple[Experts | None, ...]

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def mlps(self) -> tuple[FeedForward, ...]:
        """An MLP of every layer, for what needs one.

        Raises:
            CoreskipError: some layer has none: its neurons are those of experts, or of nothing that is read.
        """
        return tuple(map(self.mlp, range(len(self))))

    def mlp(self, layer: int) -> FeedForward:
        """The MLP of a layer.

        Raises:
            CoreskipError: it has none.
        """
        mlp = self.feed_forwards[layer]
        if mlp is None:
            what = "only experts" if self.experts[layer] is not None else "no MLP that coreskip reads"
            raise CoreskipError(
                f"layer {layer} of this {self.model_type!r} model has {what}: what chooses neurons needs an MLP in "
                "every layer; leave experts out (--method experts or skip-experts), or layers (--method layers)"
            )
        return mlp

    def half(self, layer: int) -> nn.Module:
        """The module whose output is what a layer's MLP, or its experts, add to the residual stream.

        Raises:
            CoreskipError: it is not one module's.
        """
        mlp, experts = self.feed_forwards[layer], self.experts[layer]
        if experts is None and mlp is not None:
            return mlp.down
        if experts is not None and experts.outputs and (mlp is None or mlp is experts.shared):
            return experts.block
        raise CoreskipError(
            f"what layer {layer} of this {self.model_type!r} model adds after its attention is not one module's "
            "output: its layers cannot be scored or skipped"
        )

    @property
    def present(self) -> Iterator[tuple[int, FeedForward]]:
        """The layers that have an MLP, with it."""
        return ((index, mlp) for index, mlp in enumerate(self.feed_forwards) if mlp is not None)

    @property
    def hidden_size(self) -> int:
        parts = [part for part in (*self.feed_forwards, *self.experts) if part is not None]
        return parts[0].hidden_size


def dissect(model: nn.Module, *, empty: bool = False) -> Anatomy:
    """Find and prove the parts of `model`, any Hugging Face causal LM.

    empty: the model may be on a meta device, where nothing can be computed and so no MLP is proved.

    Raises:
        CoreskipError: not a causal LM, quantised or offloaded weights, experts of an unknown form, or no MLP of the
            form ``down(act(gate(x)) * up(x))`` or ``down(act(up(x)))``.
    """
    _require_causal_lm(model)
    config = cast(Any, model).config.get_text_config()
    base = cast(nn.Module, getattr(model, "base_model", model))
    family = FAMILIES.get(config.model_type)
    # a model that nests the family's decoder (a vision-language model) does not have its layers where the table says
    if family is not None and family.layers in dict(base.named_modules()):
        anatomy = _by_table(base, config.model_type, family)
    else:
        decoder = cast(Any, model).get_decoder()
        if not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
            decoder = base  # a class may call its LM head so (ModernBERT)
        anatomy = _by_structure(decoder, config, empty)
    for index, mlp in anatomy.present:
        _check_linears(index, mlp, empty)
        if mlp.whole and not proved(mlp, empty):
            _check_finite(index, mlp)
            raise CoreskipError(
                f"the MLP of layer {index} ({type(mlp.owner).__name__}) does not compute down(act(gate(x)) * up(x)); "
                f"coreskip cannot make {config.model_type!r} models sparse"
            )
    return anatomy


def check_model(model: Any) -> None:
    """Raise `CoreskipError` unless `model` is a model that generates, rather than its name, say."""
    if isinstance(model, (str, os.PathLike)):
        name = os.fspath(model)
        raise CoreskipError(f"{name!r} is a name, not a model: load it, model, tokenizer = coreskip.load({name!r})")
    if isinstance(model, tuple):
        raise CoreskipError("the model is given as a tuple: coreskip.load returns two things, (model, tokenizer)")
    if model is None or isinstance(model, type):
        raise CoreskipError(f"the model is {kind_of(model)}: give one that coreskip.load() returned")
    if getattr(model, "config", None) is None or not hasattr(model, "generate"):
        raise CoreskipError(
            f"{type(model).__name__} is not a Hugging Face model that generates; pass an AutoModelForCausalLM"
        )


def _require_causal_lm(model: nn.Module) -> None:
    check_model(model)
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise CoreskipError(f"{config.model_type!r} is an encoder-decoder; coreskip takes causal (decoder-only) LMs")
    can_generate = getattr(model, "can_generate", lambda: True)()
    if not can_generate or cast(Any, model).get_output_embeddings() is None:
        raise CoreskipError(f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM")


def _by_table(base: nn.Module, model_type: str, family: Family) -> Anatomy:
    stack = base.get_submodule(family.layers.rpartition(".")[0])
    layers = tuple(cast(nn.ModuleList, base.get_submodule(family.layers)))
    mlps, attentions = [], []
    for layer in layers:
        owner = layer.get_submodule(family.mlp)
        if getattr(owner, "pretraining_tp", 1) > 1 and getattr(owner, "slow_but_exact", False):
            raise CoreskipError("BLOOM with slow_but_exact reads its weights in slices; set slow_but_exact=False")
        mlps.append(FeedForward(owner, family.gate, family.up, family.down, family.act, family.stacked, family.whole))
        attentions.append(Attention(layer.get_submodule(family.attention), family.inputs, family.output))
    return Anatomy(model_type, stack, layers, tuple(mlps), tuple(attentions), (None,) * len(layers))


def _by_structure(base: nn.Module, config: Any, empty: bool) -> Anatomy:
    stacks = [
        (stack, tuple(child))
        for stack in base.modules()
        for child in stack.children()
        if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers
    ]
    for stack, layers in stacks:
        parts = [_parts_of(layer, empty) for layer in layers]
        if not any(any(part) for part in parts):
            parts = [(mlp, None) for mlp in written_out(base, layers)]
        if _complete(layers, parts):
            attentions = tuple(_attention_of(layer) for layer in layers)
            mlps, experts = zip(*parts, strict=True)
            return Anatomy(config.model_type, stack, layers, mlps, attentions, experts)
    for name, module in base.named_modules():
        _refuse_adapter(name, module)
        if "Experts" in type(module).__name__:
            raise CoreskipError(
                f"{name}, a {type(module).__name__}, keeps the experts of this {config.model_type!r} model in a form "
                "that coreskip does not read; use another model"
            )
    raise CoreskipError(
        f"found no MLP of the form down(act(gate(x)) * up(x)) in every layer of this {config.model_type!r} model; "
        f"families known by name: {', '.join(sorted(FAMILIES))}"
    )


Parts = tuple[FeedForward | None, Experts | None]


def _complete(layers: Sequence[nn.Module], parts: Sequence[Parts]) -> bool:
    """Whether these are a decoder's layers, with all of their MLPs and experts: layers of a hybrid may have neither,
    but not a module like those of others that computes something else."""
    owners = {type(mlp.owner) for mlp, _ in parts if mlp is not None and mlp.whole}
    owners |= {type(experts.module) for _, experts in parts if experts is not None}
    others = [layer for layer, part in zip(layers, parts, strict=True) if not any(part)]
    return len(others) < len(layers) and not any(type(m) in owners for layer in others for m in layer.modules())


def _parts_of(layer: nn.Module, empty: bool) -> Parts:
    """A decoder layer's MLP and its mixture of experts; where it has both, all tokens go through the MLP."""

    def mlp_in(module: nn.Module) -> FeedForward | None:
        return next((mlp for mlp in readings(module) if proved(mlp, empty)), None)

    experts = find_experts(layer, mlp_in, empty)
    return (experts.shared if experts is not None and experts.shared else mlp_in(layer)), experts


def _attention_of(layer: nn.Module) -> Attention | None:
    for name, child in layer.named_children():
        if "att" not in name and not type(child).__name__.endswith("Attention"):
            continue
        for module in (child, *child.children()):  # some have it in a module of its own (GPT-Neo)
            linears = _linears(module)
            if len(linears) >= 2:
                return _named(module, linears)
    for child in layer.children():  # a convolution in its place
        if any(map(is_taps, child.children())) and len(_linears(child)) == 2:
            return _named(child, _linears(child))
    return None


def is_taps(module: nn.Module) -> bool:
    """Whether a module is a convolution along the text in which each channel is by itself."""
    plain = isinstance(module, nn.Conv1d) and (module.stride, module.dilation, module.padding_mode) == (
        (1,),
        (1,),
        "zeros",
    )
    return plain and module.groups == module.in_channels == module.out_channels


def _linears(module: nn.Module) -> list[str]:
    """The linears in a module, some of which may be all that a module of their own holds (Moshi)."""
    found = [n for n, m in module.named_children() if is_linear(m)]
    if found:
        return found
    inner = {n: list(m.named_modules())[1:] for n, m in module.named_children()}
    return [f"{n}.{some[0][0]}" for n, some in inner.items() if len(some) == 1 and is_linear(some[0][1])]


def _named(module: nn.Module, names: list[str]) -> Attention:
    """Which of an attention's projections is the output: the one whose name says so, else the last."""
    output = next((n for n in names if n.lower().startswith("o") or n.startswith("out")), names[-1])
    inputs = [name for name in names if name != output]
    gates = [name for name in inputs if name.startswith("g")]
    if len(inputs) == 4 and len(gates) == 1 and len(_in_order([n for n in inputs if n not in gates])) == 3:
        return Attention(module, _in_order([n for n in inputs if n not in gates]), output, gates[0])
    return Attention(module, _in_order(inputs), output)


def _in_order(names: list[str]) -> tuple[str, ...]:
    """Projections as q, k and v, where there are three whose names say which each is."""
    found = {letter: [n for n in names if n.lower().removeprefix("w").startswith(letter)] for letter in "qkv"}
    if len(names) == 3 and all(len(some) == 1 for some in found.values()):
        return tuple(some[0] for some in found.values())
    return tuple(names)


def _check_linears(index: int, mlp: FeedForward, empty: bool) -> None:
    names = [n for n in (mlp.gate_name, mlp.up_name, mlp.down_name) if n is not None]
    for name in names:
        module = getattr(mlp.owner, name)
        weight = getattr(module, "weight", None)
        _refuse_adapter(f"layer {index}: {name}", module)
        if not is_linear(module) or not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise CoreskipError(
                f"layer {index}: {name} is a {type(module).__name__}, not a plain linear layer; "
                "load the model unquantised and merge its adapters first"
            )
        if weight.device.type == "meta" and not (empty or is_packed(module)):
            raise CoreskipError(f"layer {index}: {name} has no weights in memory (offloaded); load it on one device")


def _check_finite(index: int, mlp: FeedForward) -> None:
    """Raise where an MLP computes no numbers, which is no question of its form."""
    for name in (n for n in (mlp.gate_name, mlp.up_name, mlp.down_name) if n is not None):
        weight = rows_of(getattr(mlp.owner, name))[0]
        if weight.device.type != "meta" and not bool(weight.isfinite().all()):
            raise CoreskipError(f"layer {index}: {name} holds NaN or infinity: load a checkpoint with finite weights")


def _refuse_adapter(name: str, module: nn.Module) -> None:
    if hasattr(module, "base_layer"):  # so PEFT keeps the layer that it adapts
        kind = type(module)
        raise CoreskipError(
            f"{name} carries an adapter ({kind.__module__}.{kind.__name__}): merge it into the weights first, "
            "model = model.merge_and_unload()"
        )
