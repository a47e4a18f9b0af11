"""What the benchmark runs: built-in prompts of five kinds, and models of real shapes with random weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from coreskip.predictors.errors import CoreskipError
from coreskip.predictors.files import read_text

PROMPTS = {
    "prose": (
        "The ferry to the island ran twice a day in winter, once before the light came and once after it had gone. "
        "Marta had taken the morning boat for eleven years, always on the port side, where the wind was kinder, and in "
        "all that time she had never seen the captain smile. That changed on the second Tuesday of February, when"
    ),
    "qa": (
        "Answer each question in one or two sentences.\n\n"
        "Question: Why does ice float on water?\n"
        "Answer: Water expands when it freezes, so ice is less dense than the liquid around it.\n\n"
        "Question: Why are there usually two high tides a day rather than one?\n"
        "Answer:"
    ),
    "code": (
        "from dataclasses import dataclass\n\n\n"
        "@dataclass\n"
        "class Interval:\n"
        "    start: float\n"
        "    end: float\n\n"
        "    def overlaps(self, other):\n"
        "        return self.start < other.end and other.start < self.end\n\n\n"
        "def merge(intervals):\n"
        '    """Merge overlapping intervals and return them in ascending order."""\n'
    ),
    "summary": (
        "Minutes of the allotment society, 4 March. Present: nine members and a dog. The treasurer reported that the "
        "water bill had doubled since the leak by plot twelve was found; the repair will cost 340 pounds and begins on "
        "Monday. Ms Okafor offered to lend her pump until then. The committee agreed to raise the yearly fee from 45 "
        "to 52 pounds from April, with no change for pensioners. Plot seven stays vacant: two people on the waiting "
        "list were asked and both declined because of the shade from the railway poplars. Mr Lind proposed to fell "
        "them; the vote was three for, five against, one abstention. The summer fair will be held on 21 June.\n\n"
        "List every decision above with its exact numbers and dates.\n\n"
        "Decisions:\n1. The repair of the leak by plot twelve will cost 340 pounds and begins on Monday.\n2."
    ),
    "chat": (
        "User: I have two hours, a bag of red lentils, an onion and not much else. What can I cook?\n"
        "Assistant: Lentil soup works well with that. Do you have any spices, or stock?\n"
        "User: Cumin, I think, and half a lemon. How do I start?\n"
        "Assistant:"
    ),
}


@dataclass(frozen=True)
class Prompt:
    """One prompt: what it is called in rows, and its text."""

    name: str
    text: str


def prompts(names: tuple[str, ...] = (), file: Path | None = None) -> list[Prompt]:
    """The built-in prompts of these names (all without), or those of a UTF-8 file, separated by lines of ``---``.

    Raises:
        CoreskipError: an unknown name; a file that cannot be read or holds no prompt; names and a file.
    """
    if file is not None and names:
        raise CoreskipError("give workloads or a file of prompts, not both")
    if file is not None:
        return _prompts_of(file)
    unknown = [name for name in names if name not in PROMPTS]
    if unknown:
        raise CoreskipError(f"unknown workload {unknown[0]!r}; choose from {', '.join(PROMPTS)}")
    return [Prompt(name, PROMPTS[name]) for name in names or PROMPTS]


def _prompts_of(file: Path) -> list[Prompt]:
    lines = read_text(file, "the prompts", most=1 << 20).splitlines()
    pieces = "\n".join("\0" if line.strip() == "---" else line for line in lines).split("\0")
    texts = [piece.strip("\n") for piece in pieces if piece.strip()]
    if not texts:
        raise CoreskipError(f"{file} holds no prompt: write some, separated by lines of ---")
    return [Prompt(f"{file.stem}-{i}", text) for i, text in enumerate(texts, 1)]


def byte_ids(text: str, vocabulary: int) -> list[int]:
    """Token ids for a model that has no tokenizer: the text's bytes, one token for four, as real tokenizers average."""
    return [3 + byte % (vocabulary - 3) for byte in text.encode()[::4]]


# --- models of real shapes --------------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "llama-2-7b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "qwen3-4b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "olmoe-1b-7b": {
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "max_position_embeddings": 4096,
        "pad_token_id": 1,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 8192,
    },
    "qwen3.5-0.8b": {
        "model_type": "qwen3_5_text",
        "vocab_size": 248320,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "lfm2-350m": {
        "model_type": "lfm2",
        "vocab_size": 65536,
        "hidden_size": 1024,
        "intermediate_size": 6656,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14],
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "relu-llama-1.1b": {  # TinyLlama's sizes, with ReLU gates as ProSparse (2402.13516) gives a llama
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "hidden_act": "relu",
        "mlp_bias": True,
    },
    "opt-1.3b": {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": 2048,
        "ffn_dim": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": 2048,
        "activation_function": "relu",
    },
}

NATURAL_SPARSITY = 0.9  # of ReLU shapes: the share of neurons that are exactly zero on an average token
_LOGIT_SPREAD = 3.0  # standard deviation: a token that is not the best one is then far from it, as in a real model
# Weights are one block of random numbers laid end to end: drawing 7e9 of them takes minutes and decoding cannot tell.
# Its length is prime, so that no row width divides it and rows differ.
_BLOCK = 1_000_003


@dataclass(frozen=True)
class Shape:
    """A model of a real shape with random weights: for speed alone, never for quality.

    Attributes:
        name: a key of `SHAPES`.
        layers: cap on the number of decoder layers, or None for all.
        sparsity: of ReLU shapes, the natural sparsity that the biases give.
    """

    name: str
    layers: int | None = None
    sparsity: float = NATURAL_SPARSITY

    def __post_init__(self) -> None:
        if self.name not in SHAPES:
            raise CoreskipError(f"unknown shape {self.name!r}; choose from {', '.join(SHAPES)}")
        if self.layers is not None and not 1 <= self.layers <= self.depth:
            raise CoreskipError(f"{self.name} has {self.depth} layers, {self.layers} asked for")
        if not 0 < self.sparsity < 1:
            raise CoreskipError(f"the natural sparsity is {self.sparsity}: give a share between 0 and 1")

    @property
    def depth(self) -> int:
        return int(SHAPES[self.name]["num_hidden_layers"])

    @property
    def vocabulary(self) -> int:
        return int(SHAPES[self.name]["vocab_size"])

    def __str__(self) -> str:
        layers = f", {self.layers} of {self.depth} layers" if self.layers not in (None, self.depth) else ""
        relu = f", {self.sparsity:.0%} of neurons zero" if has_relu(self.name) else ""
        return f"{self.name} shape, random weights{layers}{relu}"

    def config(self) -> Any:
        settings = dict(SHAPES[self.name])
        settings["num_hidden_layers"] = self.layers or self.depth
        return AutoConfig.for_model(settings.pop("model_type"), **settings)

    def parameters(self) -> int:
        with torch.device("meta"):
            model = _from_config(self.config())
        return sum(parameter.numel() for parameter in model.parameters())

    def build(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Any:
        """The model, in evaluation mode; the same seed gives the same weights in every process."""
        with torch.device("meta"):
            model = _from_config(self.config(), dtype=dtype)
        model.to_empty(device=device)
        model.tie_weights()
        block = torch.empty(_BLOCK).normal_(generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for module in model.modules():
                _fill(module, block)
            # last, for a head may share the embedding's memory
            _tile(model.get_output_embeddings().weight, block, _LOGIT_SPREAD / model.config.hidden_size**0.5)
            self._silence(model)
        _restore_buffers(model)
        return model.eval()

    def _silence(self, model: Any) -> None:
        """Give ReLU layers their natural sparsity: a normalised input meets rows of norm 1, so that pre-activations
        are standard normal and the bias is a quantile of that."""
        for module in model.modules():
            bias = getattr(getattr(module, "fc1", getattr(module, "gate_proj", None)), "bias", None)
            if bias is not None:
                nn.init.constant_(bias, -NormalDist().inv_cdf(self.sparsity))


def has_relu(shape: str) -> bool:
    """Whether a shape's neurons are zero by nature, most of the time."""
    settings = SHAPES.get(shape, {})
    return "relu" in (settings.get("activation_function"), settings.get("hidden_act"))


def _from_config(config: Any, **options: Any) -> Any:
    return cast(Any, AutoModelForCausalLM).from_config(config, **options)


def _fill(module: Any, block: torch.Tensor) -> None:
    """Scales that keep activations near 1 throughout, whatever the depth and the width."""
    if isinstance(module, nn.Embedding):
        # small beside what the layers add, so that they and not the last token decide what comes next
        _tile(module.weight, block, _LOGIT_SPREAD / module.embedding_dim**0.5)
    elif isinstance(module, nn.Linear):
        _tile(module.weight, block, module.in_features**-0.5)
        if module.bias is not None:
            module.bias.zero_()
    elif getattr(module, "weight", None) is not None and module.weight.ndim == 2:  # a router
        _tile(module.weight, block, module.weight.shape[1] ** -0.5)
    elif hasattr(module, "weight"):
        nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
    for name, number in module.named_parameters(recurse=False):  # of a recurrence's heads
        if number.ndim == 1 and name not in ("weight", "bias"):
            nn.init.zeros_(number)
    for experts in (p for p in module.parameters(recurse=False) if p.ndim == 3):
        _tile(experts, block, experts.shape[2] ** -0.5)


def _tile(weight: torch.Tensor, block: torch.Tensor, scale: float) -> None:
    piece = (block * scale).to(weight.device, weight.dtype)
    flat = weight.view(-1)
    whole = flat.numel() // _BLOCK * _BLOCK
    flat[:whole].view(-1, _BLOCK).copy_(piece.expand(whole // _BLOCK, _BLOCK))
    flat[whole:] = piece[: flat.numel() - whole]


def _restore_buffers(model: Any) -> None:
    """Rotary frequencies are computed at construction, which on the meta device computed nothing."""
    module: Any
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            fresh: Any = type(module)(model.config)
            module.inv_freq = fresh.inv_freq.to(module.inv_freq.device)
            module.original_inv_freq = module.inv_freq


def threads_available() -> int:
    """CPUs that this process may use, which an affinity mask may make fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
