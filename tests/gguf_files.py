"""Small GGUF files, with matrices of every type of blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
#: where the fp16 numbers of a block lie
_HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "Q2_K": [80, 82],
}
HIDDEN, WIDTH, LAYERS, HEADS, KV_HEADS, TOKENS = 256, 512, 2, 4, 2, 60


def blocks_of(kind: str, rows: int, width: int, seed: int = 0, size: float = 0.01) -> Bytes:
    """[rows, bytes of a row]: blocks of random bytes, all of which are valid, with scales and leasts around `size`."""
    rng = np.random.default_rng([seed, *kind.encode()])
    block, block_bytes = gguf.GGML_QUANT_SIZES[Type[kind]]
    assert width % block == 0
    raw = rng.integers(0, 256, (rows, width // block, block_bytes), dtype=np.uint8)
    for at in _HALVES[kind]:
        numbers = (rng.standard_normal(raw.shape[:2]) * size).astype(np.float16)
        raw[:, :, at : at + 2] = numbers[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def numbers_of(kind: str, raw: Bytes) -> Tensor:
    """float32 [rows, width], as the gguf package has them."""
    return torch.from_numpy(gguf.dequantize(raw, Type[kind]))


def write_llama(path: Path, matrices: dict[str, str], *, arch: str = "llama", tied: bool = False) -> Path:
    """A llama of random weights. matrices: types by the ends of matrices' names, such as "attn_q"; others are F32."""
    writer = gguf.GGUFWriter(str(path), arch)
    _describe(writer)
    rng = np.random.default_rng(5)
    kv = HIDDEN * KV_HEADS // HEADS
    shapes = {"token_embd": (TOKENS, HIDDEN), **({} if tied else {"output": (TOKENS, HIDDEN)})}
    norms = ["output_norm"]
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_{name}": (rows, HIDDEN) for name, rows in (("q", HIDDEN), ("k", kv), ("v", kv))}
        shapes |= {f"blk.{i}.attn_output": (HIDDEN, HIDDEN), f"blk.{i}.ffn_down": (HIDDEN, WIDTH)}
        shapes |= {f"blk.{i}.ffn_{name}": (WIDTH, HIDDEN) for name in ("gate", "up")}
        norms += [f"blk.{i}.attn_norm", f"blk.{i}.ffn_norm"]
    for seed, (name, shape) in enumerate(shapes.items()):
        kind = matrices.get(name.split(".")[-1], "F32")
        if kind in _HALVES:
            # a super-block's scales multiply it by up to 63, or by 127
            size = 0.0002 if kind.endswith("K") else 0.005
            writer.add_tensor(f"{name}.weight", blocks_of(kind, *shape, seed, size), raw_dtype=Type[kind])
        else:
            weight = (rng.standard_normal(shape) / shape[1] ** 0.5).astype(np.float32)
            writer.add_tensor(f"{name}.weight", gguf.quantize(weight, Type[kind]), raw_dtype=Type[kind])
    for name in norms:
        writer.add_tensor(f"{name}.weight", rng.standard_normal(HIDDEN).astype(np.float32) * 0.1 + 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _describe(writer: Any) -> None:
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(TOKENS)
    letters = [chr(ord("!") + i) for i in range(TOKENS - 3)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<|begin|>", "<|end|>", *letters, letters[0] + letters[1]])
    writer.add_token_types([3, 3] + [1] * (TOKENS - 2))
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
