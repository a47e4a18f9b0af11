"""What `export` writes, by name. Without torch, so that a command line is refused before anything is imported."""

from __future__ import annotations

import importlib.util
from typing import Any

from ..predictors.errors import CoreskipError

#: formats, and the forms of weights that each can have
WEIGHTS = {
    "hf": ("float32", "bfloat16", "float16"),
    "onnx": ("float32", "float16", "int4"),
    "gguf": ("float32", "float16", "q8_0", "q4_0", "q4_1"),
}

ONNX_SETTINGS = "genai_config.json"  # by which an exported ONNX model is known


def check_format(to: Any, weights: Any) -> None:
    """Raises CoreskipError unless there is such a format, and it has such weights; None: its default."""
    if not isinstance(to, str) or to not in WEIGHTS:
        raise CoreskipError(f"a model is exported to {', '.join(WEIGHTS)}, not to {to!r}")
    if weights is not None and weights not in WEIGHTS[to]:
        raise CoreskipError(f"{to} has no weights {weights!r}: choose from {', '.join(WEIGHTS[to])}")
    if to == "onnx" and not all(map(importlib.util.find_spec, ("onnx_ir", "onnxruntime"))):
        raise CoreskipError(
            "ONNX models are written by onnx-ir and checked by onnxruntime: pip install 'coreskip[export]'"
        )
