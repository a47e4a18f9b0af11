"""Packed models for tests, and what makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import coreskip
from coreskip.kernels import ops
from coreskip.runtime.packed_layer import PackedLayer


def tokenizer() -> Any:
    words = {f"w{i}": i for i in range(128)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w3", pad_token="w0", eos_token="w2")


def packed(model: Any, folder: Path, **options: Any) -> Any:
    """The model that comes back from a folder."""
    coreskip.pack(model, tokenizer(), folder, progress=False, **options)
    return coreskip.load(folder)[0]


def on_grid(model: Any, fmt: str = "int4") -> Any:
    """The model with numbers that groups of 4 or 8 bits hold."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                rounded = ops.PackedLinear.pack(module.weight, fmt=fmt)
                module.weight.copy_(PackedLayer([rounded], None, torch.float32).unpacked())
    return model
