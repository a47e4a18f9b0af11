"""A smaller model as a GGUF file, for the architectures that llama.cpp knows.

What llama.cpp computes of an architecture is fixed in its code, and only some numbers are read from the file. So each
architecture has an entry here that says what that code assumes, and a description that says anything else is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..predictors.anatomy import rows_of
from ..predictors.errors import CoreskipError
from .calls import NotCovered
from .export_gguf_tokenizer import Vocabulary
from .export_spec import attention_of, plain_spec
from .export_weights import Smaller
from .spec import LayerSpec, LinearSpec, ModelSpec, NormSpec

MODEL = "model.gguf"
_TYPES = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "q4_1": (gguf.GGMLQuantizationType.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
}
_BYTES = {"float32": 4.0, "float16": 2.0, "q8_0": 1.07, "q4_0": 0.6, "q4_1": 0.66}  # of a number, about
_BLOCK = 32


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp's code for an architecture assumes, in the words of `ModelSpec`.

    Attributes:
        name: llama.cpp's.
        turned: whether rows of q and k are in the order of neighbouring pairs.
        after: whether each half has a norm before and one after it ("both"), or one after it alone ("only").
        period: of sliding windows: all layers but the last of each so many have one; 0: none has.
        unturned: positions are not turned in the last layer of each so many; 0: in all they are.
        scales: whether it reads scales of embeddings, residuals and logits; "gemma": embeddings times sqrt(hidden).
        biases: of which projections it reads biases: q, k, v, o, and mlp.
    """

    name: str
    norm: str = "rms"
    act: str = "silu"
    gated: bool = True
    turned: bool = False
    after: str = ""
    head_norms: str = ""
    period: int = 0
    unturned: int = 0
    scales: str = ""
    softcaps: bool = False
    biases: frozenset[str] = field(default=frozenset())


_QKV, _ALL = frozenset("qkv"), frozenset({"q", "k", "v", "o", "mlp"})
_LLAMA = Architecture("llama", turned=True, biases=_ALL)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", biases=_QKV),
    "qwen3": Architecture("qwen3", head_norms="heads"),
    "gemma": Architecture("gemma", act="gelu_tanh", scales="gemma"),
    "gemma2": Architecture("gemma2", act="gelu_tanh", scales="gemma", after="both", period=2, softcaps=True),
    "gemma3_text": Architecture("gemma3", act="gelu_tanh", scales="gemma", after="both", head_norms="heads", period=6),
    "starcoder2": Architecture("starcoder2", norm="layer", act="gelu_tanh", gated=False, biases=_ALL),
    "olmo2": Architecture("olmo2", after="only", head_norms="all"),
    "granite": Architecture("granite", turned=True, scales="all", biases=_ALL),
    "smollm3": Architecture("smollm3", turned=True, unturned=4),
}


class GgufFolder:
    """model.gguf of a smaller model.

    Raises:
        CoreskipError: llama.cpp does not know the architecture, or not in this form; or the tokenizer has no form
            there.
    """

    PAD = "blocks"
    CHOOSES = False

    def __init__(self, found: Smaller, tokenizer: Any, weights: str | None) -> None:
        self._found, self.weights, self.notes = found, weights or "float16", tuple[str, ...]()
        self._text = found.model.config.get_text_config()
        kind = self._text.model_type
        if kind not in ARCHITECTURES:
            raise CoreskipError(f"{kind!r} models are not written as GGUF: {', '.join(ARCHITECTURES)} are")
        self._arch = ARCHITECTURES[kind]
        try:
            self._spec = plain_spec(found.model)
            _check(self._spec, self._arch, self._text)
        except NotCovered as reason:
            raise CoreskipError(f"this {kind!r} model has no form in GGUF: {reason}") from None
        self._vocabulary = Vocabulary.of(tokenizer, self._spec.embedding.shape[0])

    @property
    def nbytes(self) -> float:
        """Of the weights, about."""
        return self._found.numbers * _BYTES[self.weights]

    @property
    def usage(self) -> str:
        """How it is run."""
        return f'llama-cli -m FOLDER/{MODEL} -p "Once upon a time"'

    def write(self, folder: Path, progress: bool) -> None:
        """Into an empty folder."""
        writer = gguf.GGUFWriter(folder / MODEL, self._arch.name)
        self._describe(writer)
        self._vocabulary.write(writer)
        tensors = list(_tensors(self._spec, self._arch))
        for name, tensor in tqdm(tensors, desc="packing", unit="tensor", disable=not progress, leave=False):
            array, whole = tensor.float().numpy(), name if name.endswith(".bias") else f"{name}.weight"
            if array.ndim == 1:
                writer.add_tensor(whole, np.ascontiguousarray(array))
            else:
                kind = self._kind(name, array.shape[1])
                writer.add_tensor(whole, gguf.quantize(array, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _kind(self, name: str, inputs: int) -> gguf.GGMLQuantizationType:
        """The type of a matrix: where 4 bits are asked for, embeddings and head, which lose most by them, have 8."""
        if inputs % _BLOCK and self.weights != "float32":
            return gguf.GGMLQuantizationType.F16
        of_tokens = name in ("token_embd", "output") and self.weights.startswith("q4")
        return gguf.GGMLQuantizationType.Q8_0 if of_tokens else _TYPES[self.weights][0]

    def _describe(self, writer: Any) -> None:
        text, spec, attention = self._text, self._spec, attention_of(self._spec.layers[0])
        writer.add_name(self._arch.name)
        writer.add_file_type(_TYPES[self.weights][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_vocab_size(spec.embedding.shape[0])
        writer.add_context_length(text.max_position_embeddings)
        writer.add_embedding_length(spec.embedding.shape[1])
        writer.add_block_count(len(spec.layers))
        writer.add_feed_forward_length(rows_of(spec.layers[0].bricks[0].down.module)[0].shape[1])
        writer.add_head_count(text.num_attention_heads)
        writer.add_head_count_kv(getattr(text, "num_key_value_heads", text.num_attention_heads))
        writer.add_key_length(attention.head_dim)
        writer.add_value_length(attention.head_dim)
        writer.add_rope_dimension_count(attention.head_dim)
        writer.add_rope_freq_base(_theta(text))
        assert spec.norm is not None  # as `plain_spec` has it
        (writer.add_layer_norm_rms_eps if self._arch.norm == "rms" else writer.add_layer_norm_eps)(spec.norm.eps)
        if self._arch.period:
            writer.add_sliding_window(max(attention_of(layer).window for layer in spec.layers) or 2**31 - 1)
        if self._arch.softcaps:
            writer.add_attn_logit_softcapping(attention.softcap)
            writer.add_final_logit_softcapping(spec.logit_softcap)
        if self._arch.scales == "all":
            writer.add_attention_scale(attention.scale)
            writer.add_embedding_scale(spec.embedding_scale)
            writer.add_residual_scale(spec.layers[0].residual_scale)
            writer.add_logit_scale(1 / spec.logit_scale)  # it divides


# --- what the architecture's code assumes


def _check(spec: ModelSpec, arch: Architecture, text: Any) -> None:
    """Raises NotCovered where llama.cpp would compute something else."""
    rope = getattr(text, "rope_parameters", None) or {}
    every = rope if all(isinstance(value, dict) for value in rope.values()) else {"": rope}
    if any(kind.get("rope_type", "default") != "default" for kind in every.values()):
        raise NotCovered("its rotary positions are scaled")
    if any(kind.get("partial_rotary_factor", 1.0) != 1.0 for kind in every.values()):
        raise NotCovered("only a part of each head is turned by its position")
    local = every.get("sliding_attention", {}).get("rope_theta")
    if local is not None and (arch.name != "gemma3" or local != 10000.0):
        raise NotCovered("layers with sliding windows have rotary positions of another base than llama.cpp gives them")
    _check_scales(spec, arch)
    for index, layer in enumerate(spec.layers):
        _check_layer(index, layer, arch, text)


def _check_scales(spec: ModelSpec, arch: Architecture) -> None:
    attention = attention_of(spec.layers[0])
    usual = {"embedding": spec.embedding_scale, "logit": spec.logit_scale}
    usual |= {"residual stream": spec.layers[0].residual_scale, "attention": attention.scale * attention.head_dim**0.5}
    if arch.scales == "gemma":
        usual["embedding"] = (spec.embedding_scale or 0) / spec.embedding.shape[1] ** 0.5
    for name, value in usual.items() if arch.scales != "all" else ():
        if abs((value or 0) - 1) > 1e-2:  # embeddings' was measured
            raise NotCovered(f"its {name} is scaled otherwise than by llama.cpp's {arch.name}")
    if not arch.softcaps and (spec.logit_softcap or attention.softcap):
        raise NotCovered("its scores are capped")


def _check_layer(index: int, layer: LayerSpec, arch: Architecture, text: Any) -> None:
    (brick,), attention = layer.bricks, attention_of(layer)
    if layer.parallel or attention.paired or len(attention.inputs) != 3:
        raise NotCovered("its layers have halves side by side, neighbours turned, or q, k and v in one matrix")
    norms = {"": (True, False), "both": (True, True), "only": (False, True)}[arch.after]
    found = layer.attention_in is not None, layer.attention_out is not None
    heads = attention.q_norm is not None
    kinds = {norm.kind for norm in (layer.attention_in, layer.mlp_in, layer.attention_out) if norm is not None}
    if found != norms or kinds != {arch.norm} or heads != bool(arch.head_norms):
        raise NotCovered("its layers have other norms")
    if brick.act != arch.act or (brick.gate is not None) != arch.gated or brick.stacked:
        raise NotCovered(f"its MLPs are not those of llama.cpp's {arch.name}")
    windowed = bool(arch.period) and index % arch.period < arch.period - 1
    window = attention.window if attention.window < text.max_position_embeddings else 0
    if window and not windowed:
        raise NotCovered("layers have sliding windows that llama.cpp does not give them")
    if windowed and not window and attention.window == 0:
        raise NotCovered("llama.cpp gives sliding windows by a fixed pattern, which these layers do not follow")
    turned = not (arch.unturned and index % arch.unturned == arch.unturned - 1)
    if (attention.rotation != "") != turned:
        raise NotCovered("layers without rotary positions are not those of llama.cpp's fixed pattern")
    for name, bias in _biases(layer):
        if name not in arch.biases and bool(bias.any()):
            raise NotCovered(f"llama.cpp's {arch.name} has no biases of its {name}")


def _biases(layer: LayerSpec) -> Iterator[tuple[str, Tensor]]:
    (brick,), attention = layer.bricks, attention_of(layer)
    linears = [*zip(("q", "k", "v"), attention.inputs, strict=False), ("o", attention.output)]
    for name, linear in [*linears, *(("mlp", linear) for linear in brick.linears)]:
        bias = rows_of(linear.module)[1]
        if bias is not None:
            yield name, bias


def _theta(text: Any) -> float:
    rope = text.rope_parameters
    return float(rope.get("rope_theta") or rope["full_attention"]["rope_theta"])


# --- tensors


def _tensors(spec: ModelSpec, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Names without ``.weight``, of biases with ``.bias``, and what they hold."""
    yield "token_embd", spec.embedding
    for index, layer in enumerate(spec.layers):
        for name, tensor in _layer_tensors(layer, arch):
            yield f"blk.{index}.{name}", tensor
    yield from _norm("output_norm", spec.norm)
    head: Any = spec.head.module
    if head.weight.data_ptr() != spec.embedding.data_ptr():
        yield from _linear("output", spec.head)


def _layer_tensors(layer: LayerSpec, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    attention, (brick,) = attention_of(layer), layer.bricks
    names = {"attn_norm": layer.attention_in, "post_attention_norm": layer.attention_out}
    names |= {"ffn_norm": layer.mlp_in, "post_ffw_norm": layer.mlp_out}
    names |= {"attn_q_norm": attention.q_norm, "attn_k_norm": attention.k_norm}
    for name, norm in names.items():
        yield from _norm(name, norm)
    for part, linear in zip("qkv", attention.inputs, strict=True):
        for name, tensor in _linear(f"attn_{part}", linear, part in arch.biases):
            turned = arch.turned and part != "v"
            yield name, _neighbours(tensor, attention.head_dim) if turned else tensor
    yield from _linear("attn_output", attention.output, "o" in arch.biases)
    linears = {"ffn_gate": brick.gate, "ffn_up": brick.up, "ffn_down": brick.down}
    for name, part_of_mlp in linears.items():
        if part_of_mlp is not None:
            yield from _linear(name, part_of_mlp, "mlp" in arch.biases)


def _linear(name: str, linear: LinearSpec, biased: bool = False) -> Iterator[tuple[str, Tensor]]:
    """biased: whether there is a place for a bias, which else is zero."""
    weight, bias = rows_of(linear.module)
    yield name, weight
    if bias is not None and biased:
        yield f"{name}.bias", bias


def _norm(name: str, norm: NormSpec | None) -> Iterator[tuple[str, Tensor]]:
    if norm is None:
        return
    weight = torch.full((norm.size,), norm.offset)
    if norm.weight is not None:
        weight = norm.slope * norm.weight.detach().float() + norm.offset
    yield name, weight
    if norm.bias is not None:
        yield f"{name}.bias", norm.bias.detach()


def _neighbours(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k, or their biases, whose pairs are halves of each head, with pairs side by side."""
    halves = rows.view(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
