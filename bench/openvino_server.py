"""OpenVINO GenAI behind a pipe: a script for whichever Python has `openvino_genai`, which need not have coreskip.

    PYTHON openvino_server.py MODEL.gguf THREADS

It writes one JSON line once the model is loaded: how it computes. Then it answers each JSON line on stdin,
``{"ids": [...], "new": N}``, by one line on stdout: the greedy tokens, and the seconds after which each came. It ends
when its stdin is closed, so also when the process that started it has ended.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import openvino
import openvino_genai


class Arrivals(openvino_genai.StreamerBase):  # type: ignore[misc]
    """Notes when each token arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[int] = []
        self.seconds: list[float] = []
        self._start = time.perf_counter()

    def write(self, tokens: int | list[int]) -> Any:
        arrived = time.perf_counter() - self._start
        for token in [tokens] if isinstance(tokens, int) else tokens:
            self.tokens.append(int(token))
            self.seconds.append(arrived)
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Nothing is held back."""


def arithmetic() -> dict[str, Any]:
    """How the CPU plugin computes unless it is told otherwise, in its own words."""
    core = openvino.Core()
    group = core.get_property("CPU", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
    return {
        "kv_cache": core.get_property("CPU", "KV_CACHE_PRECISION").get_type_name(),
        "floats": core.get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name(),
        "group": int(group),
        "version": version("openvino-genai"),
    }


def generate(pipeline: Any, ids: list[int], new: int) -> dict[str, Any]:
    """Greedy, exactly `new` tokens: an end-of-text token does not stop it."""
    config = openvino_genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
    tokens = openvino.Tensor(np.asarray([ids], dtype=np.int64))
    mask = openvino.Tensor(np.ones((1, len(ids)), dtype=np.int64))
    arrivals = Arrivals()
    pipeline.generate(openvino_genai.TokenizedInputs(tokens, mask), config, arrivals)
    return {"tokens": arrivals.tokens, "seconds": arrivals.seconds}


def main() -> None:
    path, threads = sys.argv[1:]
    answers, sys.stdout = sys.stdout, sys.stderr  # what the library prints is no answer
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # else a prompt that was seen once has its first token at once
    pipeline = openvino_genai.LLMPipeline(path, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=int(threads))
    print(json.dumps(arithmetic()), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(generate(pipeline, **json.loads(line))), file=answers, flush=True)


main()
