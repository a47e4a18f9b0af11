"""Every runner by its name, and what has to be installed for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from coreskip.bench.peers import LlamaCpp, OnnxRuntime
from coreskip.bench.runner import Runner
from coreskip.bench.torch_runners import Compiled, Coreskip, CoreskipEngine, CoreskipExact, CoreskipLookup, HuggingFace

RUNNERS: dict[str, type[Runner]] = {
    "hf": HuggingFace,
    "hf-compile": Compiled,
    "onnxruntime": OnnxRuntime,
    "llama.cpp": LlamaCpp,
    "coreskip-dense": Coreskip,
    "coreskip": Coreskip,
    "coreskip-exact": CoreskipExact,
    "coreskip-engine": CoreskipEngine,
    "coreskip-lookup": CoreskipLookup,
}
OPPONENTS = ("hf", "hf-compile", "onnxruntime", "llama.cpp")
_MODULES = {"onnxruntime": ("onnxruntime_genai", "onnx_ir"), "llama.cpp": ("llama_cpp",)}
_INSTALL = {"onnxruntime": "pip install onnxruntime-genai onnx-ir", "llama.cpp": "pip install llama-cpp-python"}


def missing(names: Iterable[str]) -> dict[str, str]:
    """Of these runners, the ones that are not installed, and the command that installs each."""
    return {
        name: _INSTALL[name]
        for name in names
        if any(importlib.util.find_spec(module) is None for module in _MODULES.get(name, ()))
    }
