"""Where an architecture keeps its decoder layers, MLP matrices, activation and attention projections.

A small table names the attributes of the known families; any other family is recognised by its structure.
Either way the result is proved before it is used: the formula ``down(act(gate(x)) * up(x))`` over the matrices
found must reproduce what the model's own MLP module returns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..kernels.packed import ACTS
from .checks import kind_of
from .errors import CoreskipError

Activation = Callable[[Tensor], Tensor]


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


@dataclass(frozen=True)
class Matrices:
    """Views of one MLP's weights, one row per neuron: gate, up, down ``[intermediate, hidden]``; gate is None
    in a plain MLP. Biases: gate and up ``[intermediate]``, down ``[hidden]``, or None."""

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None


@dataclass(frozen=True, eq=False)
class FeedForward:
    """One decoder layer's MLP, by the names under which its owner keeps it."""

    owner: nn.Module
    gate_name: str | None
    up_name: str
    down_name: str
    act_name: str
    stacked: bool
    whole: bool

    @property
    def up(self) -> nn.Module:
        return cast(nn.Module, getattr(self.owner, self.up_name))

    @property
    def down(self) -> nn.Module:
        return cast(nn.Module, getattr(self.owner, self.down_name))

    @property
    def act(self) -> Activation:
        return cast(Activation, getattr(self.owner, self.act_name))

    @property
    def gated(self) -> bool:
        return self.stacked or self.gate_name is not None

    @property
    def hidden_size(self) -> int:
        return _shape(self.down)[1]

    @property
    def intermediate_size(self) -> int:
        return _shape(self.down)[0]

    def matrices(self) -> Matrices:
        """The weights as they are now, as views: nothing is copied."""
        up, up_bias = rows_of(self.up)
        down, down_bias = rows_of(self.down)
        gate: Tensor | None = None
        gate_bias: Tensor | None = None
        if self.gate_name is not None:
            gate, gate_bias = rows_of(getattr(self.owner, self.gate_name))
        elif self.stacked:
            gate, up = up.chunk(2)
            if up_bias is not None:
                gate_bias, up_bias = up_bias.chunk(2)
        return Matrices(gate, up, down.t(), gate_bias, up_bias, down_bias)

    def formula(self, x: Tensor) -> Tensor:
        """``down(act(gate(x)) * up(x))`` for x ``[..., hidden]``: what the table claims this MLP computes."""
        if is_packed(self.up):
            return self._of_modules(x)
        w = self.matrices()
        h = F.linear(x, w.up, w.up_bias)
        h = self.act(h) if w.gate is None else self.act(F.linear(x, w.gate, w.gate_bias)) * h
        return F.linear(h, w.down.t(), w.down_bias)

    def _of_modules(self, x: Tensor) -> Tensor:
        """The formula by the linears themselves, which hold their matrices packed."""
        h = self.up(x)
        if self.gate_name is not None:
            return cast(Tensor, self.down(self.act(getattr(self.owner, self.gate_name)(x)) * h))
        if self.stacked:
            gate, h = h.chunk(2, -1)
            return cast(Tensor, self.down(self.act(gate) * h))
        return cast(Tensor, self.down(self.act(h)))


@dataclass(frozen=True, eq=False)
class Attention:
    """One decoder layer's attention module and the names of its projections."""

    module: nn.Module
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of a causal LM that coreskip works on, in layer order."""

    model_type: str
    stack: nn.Module  # the module that holds the decoder layers; its forward sees the KV cache
    layers: tuple[nn.Module, ...]
    mlps: tuple[FeedForward, ...]
    attentions: tuple[Attention | None, ...]

    def __len__(self) -> int:
        return len(self.layers)


def dissect(model: nn.Module, *, empty: bool = False) -> Anatomy:
    """Find and prove the parts of `model`, any Hugging Face causal LM.

    empty: the model may be on a meta device, where nothing can be computed and so no MLP is proved.

    Raises:
        CoreskipError: not a causal LM, a mixture of experts, quantised or offloaded weights, or an MLP that is
            not of the form ``down(act(gate(x)) * up(x))`` or ``down(act(up(x)))``.
    """
    _require_causal_lm(model)
    _refuse_experts(model)
    config = cast(Any, model).config.get_text_config()
    base = cast(nn.Module, getattr(model, "base_model", model))
    family = FAMILIES.get(config.model_type)
    # a model that nests the family's decoder (a vision-language model) does not have its layers where the table says
    if family is not None and family.layers in dict(base.named_modules()):
        anatomy = _by_table(base, config.model_type, family)
    else:
        anatomy = _by_structure(cast(Any, model).get_decoder(), config, empty)
    for index, mlp in enumerate(anatomy.mlps):
        _check_linears(index, mlp, empty)
        if mlp.whole and not _proved(mlp, empty):
            raise CoreskipError(
                f"the MLP of layer {index} ({type(mlp.owner).__name__}) does not compute down(act(gate(x)) * up(x)); "
                f"coreskip cannot make {config.model_type!r} models sparse"
            )
    return anatomy


def canonical_activation(act: Activation) -> str | Activation:
    """The name of an activation as the kernels know it, found by comparing values; itself if none matches.

    Comparing values rather than classes is what lets BLOOM's, GPT-2's and PyTorch's tanh-GELU, three classes
    with the same curve, share one kernel.
    """
    x = torch.linspace(-8.0, 8.0, 257, dtype=torch.float32, device="cpu")
    try:
        y = act(x)
    except Exception:  # an activation with needs of its own (parameters on a GPU, say) stays a callable
        return act
    for name, reference in ACTS.items():
        if isinstance(y, Tensor) and torch.allclose(y, reference(x), rtol=1e-5, atol=1e-6):
            return name
    return act


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


_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


def _refuse_experts(model: nn.Module) -> None:
    config = cast(Any, model).config.get_text_config()
    by_config = any((getattr(config, name, None) or 0) > 1 for name in _EXPERT_COUNTS)
    if by_config or any("Expert" in type(m).__name__ or "SparseMoe" in type(m).__name__ for m in model.modules()):
        raise CoreskipError(f"{config.model_type!r} is a mixture of experts: not supported yet, use a dense model")


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
    return Anatomy(model_type, stack, layers, tuple(mlps), tuple(attentions))


def _by_structure(base: nn.Module, config: Any, empty: bool) -> Anatomy:
    stacks = [
        (stack, tuple(child))
        for stack in base.modules()
        for child in stack.children()
        if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers
    ]
    for stack, layers in stacks:
        mlps = [next((m for m in _mlp_candidates(layer) if _proved(m, empty)), None) for layer in layers]
        if all(mlps):
            attentions = tuple(_attention_of(layer) for layer in layers)
            return Anatomy(config.model_type, stack, layers, tuple(cast(list[FeedForward], mlps)), attentions)
    for name, module in base.named_modules():
        _refuse_adapter(name, module)
    raise CoreskipError(
        f"found no MLP of the form down(act(gate(x)) * up(x)) in every layer of this {config.model_type!r} model; "
        f"families known by name: {', '.join(sorted(FAMILIES))}"
    )


def _mlp_candidates(layer: nn.Module) -> Iterator[FeedForward]:
    """Every reading of the layer's submodules as an MLP: the caller keeps the one that reproduces the module."""
    for owner in layer.modules():
        linears = {n: m for n, m in owner.named_children() if _is_linear(m)}
        acts = [n for n, m in owner.named_children() if n not in linears and not list(m.parameters())]
        acts += [n for n, v in vars(owner).items() if callable(v) and not n.startswith("_")]
        for down in linears:
            width, hidden = _shape(linears[down])
            ups = [n for n in linears if n != down and _shape(linears[n])[0] == hidden]
            for act in acts:
                if len(linears) == 3:
                    for gate in ups:
                        for up in ups:
                            if gate != up and _shape(linears[up])[1] == width == _shape(linears[gate])[1]:
                                yield FeedForward(owner, gate, up, down, act, False, True)
                elif len(linears) == 2:
                    for up in ups:
                        if _shape(linears[up])[1] in (width, 2 * width):
                            stacked = _shape(linears[up])[1] == 2 * width
                            yield FeedForward(owner, None, up, down, act, stacked, True)


def _attention_of(layer: nn.Module) -> Attention | None:
    for name, module in layer.named_children():
        linears = [n for n, m in module.named_children() if _is_linear(m)]
        if "att" in name and len(linears) >= 2:
            return Attention(module, tuple(linears[:-1]), linears[-1])
    return None


def _proved(mlp: FeedForward, empty: bool) -> bool:
    """Whether an MLP computes what its names claim; `empty`: or has no weights to compute with."""
    weight = getattr(mlp.up, "weight", None)
    return (empty and isinstance(weight, Tensor) and weight.is_meta) or _reproduces(mlp)


def _reproduces(mlp: FeedForward) -> bool:
    weight = cast(Tensor, mlp.up.weight)
    device = torch.device("cpu") if is_packed(mlp.up) else weight.device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, mlp.hidden_size, generator=generator, dtype=torch.float32, device="cpu")
    x = x.to(device, weight.dtype)
    was_training = mlp.owner.training
    mlp.owner.eval()  # an MLP with dropout inside would differ from run to run
    try:
        with torch.no_grad():
            expected = mlp.owner(x)
            got = mlp.formula(x)
    except (TypeError, RuntimeError, ValueError, AttributeError):
        return False  # not an MLP of this form: the caller says what that means
    finally:
        mlp.owner.train(was_training)
    if not isinstance(expected, Tensor) or expected.shape != got.shape:
        return False
    error = (expected.float() - got.float()).norm()
    return bool(error <= 1e-2 * expected.float().norm())


def _check_linears(index: int, mlp: FeedForward, empty: bool) -> None:
    names = [n for n in (mlp.gate_name, mlp.up_name, mlp.down_name) if n is not None]
    for name in names:
        module = getattr(mlp.owner, name)
        weight = getattr(module, "weight", None)
        _refuse_adapter(f"layer {index}: {name}", module)
        if not _is_linear(module) or not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise CoreskipError(
                f"layer {index}: {name} is a {type(module).__name__}, not a plain linear layer; "
                "load the model unquantised and merge its adapters first"
            )
        if weight.device.type == "meta" and not (empty or is_packed(module)):
            raise CoreskipError(f"layer {index}: {name} has no weights in memory (offloaded); load it on one device")


def _refuse_adapter(name: str, module: nn.Module) -> None:
    if hasattr(module, "base_layer"):  # so PEFT keeps the layer that it adapts
        kind = type(module)
        raise CoreskipError(
            f"{name} carries an adapter ({kind.__module__}.{kind.__name__}): merge it into the weights first, "
            "model = model.merge_and_unload()"
        )


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, (nn.Linear, Conv1D)) and isinstance(weight, Tensor) and weight.ndim == 2


def rows_of(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight of an nn.Linear or a Conv1D as ``[outputs, inputs]``, and its bias or None, as views; of a linear that
    holds its weight packed, a copy."""
    bias = cast("Tensor | None", linear.bias)
    weight = cast(Any, linear).unpacked() if is_packed(linear) else cast(Tensor, linear.weight).detach()
    return (weight.t() if isinstance(linear, Conv1D) else weight), (None if bias is None else bias.detach())


def is_packed(linear: nn.Module) -> bool:
    """Whether a linear holds its weight in packed form alone (runtime/packed_layer.py): `weight` has no numbers."""
    return hasattr(linear, "unpacked")


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of an nn.Linear or a Conv1D."""
    inputs, outputs = _shape(linear)
    return outputs, inputs


def _shape(linear: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of an nn.Linear or a Conv1D, which stores its weight transposed."""
    rows, columns = cast(Tensor, linear.weight).shape
    return (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)
