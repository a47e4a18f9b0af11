"""Every runner by its name, and what has to be installed for it."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterable

from coreskip.bench.openvino_peer import PYTHON_VARIABLE, OpenVino
from coreskip.bench.peers import LlamaCpp, OnnxFolder, OnnxNeurons, OnnxRuntime
from coreskip.bench.runner import Runner
from coreskip.bench.torch_runners import Compiled, Coreskip, CoreskipEngine, CoreskipExact, CoreskipLookup, HuggingFace

RUNNERS: dict[str, type[Runner]] = {
    "hf": HuggingFace,
    "hf-compile": Compiled,
    "onnxruntime": OnnxRuntime,
    "onnxruntime-folder": OnnxFolder,
    "onnxruntime-neurons": OnnxNeurons,
    "openvino": OpenVino,
    "llama.cpp": LlamaCpp,
    "coreskip-dense": Coreskip,
    "coreskip": Coreskip,
    "coreskip-exact": CoreskipExact,
    "coreskip-engine": CoreskipEngine,
    "coreskip-lookup": CoreskipLookup,
}
OPPONENTS = ("hf", "hf-compile", "onnxruntime", "openvino", "llama.cpp")
_MODULES = {
    "onnxruntime": ("onnxruntime_genai", "onnx_ir"),
    "onnxruntime-folder": ("onnxruntime_genai", "onnx_ir"),
    "onnxruntime-neurons": ("onnxruntime", "onnx_ir"),
    "openvino": ("openvino_genai",),
    "llama.cpp": ("llama_cpp",),
}
_PACKAGES = {
    "onnxruntime": "onnxruntime-genai onnx-ir",
    "onnxruntime-folder": "onnxruntime-genai onnx-ir",
    "onnxruntime-neurons": "onnxruntime onnx-ir",
    "openvino": "openvino-genai",
    "llama.cpp": "llama-cpp-python",
}


def missing(names: Iterable[str]) -> dict[str, str]:
    """Of these runners, the ones that are not installed, and what to do about each."""
    return {name: f"pip install {_PACKAGES[name]}" for name in names if not _installed(name)}


def _installed(name: str) -> bool:
    if name == "openvino" and os.environ.get(PYTHON_VARIABLE):
        return shutil.which(os.environ[PYTHON_VARIABLE]) is not None
    return all(importlib.util.find_spec(module) is not None for module in _MODULES.get(name, ()))
