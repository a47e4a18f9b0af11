"""Other runtimes as runners: onnxruntime and llama.cpp."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coreskip.bench.clock import Generation, Stopwatch
from coreskip.bench.runner import Job, Runner, Scored
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.errors import CoreskipError
from coreskip.runtime.export_formats import ONNX_SETTINGS
from coreskip.runtime.load import embedded_gguf
from coreskip.runtime.onnx_engine import open_model
from coreskip.runtime.onnx_neurons import MODEL, NeuronInputs, NeuronSession
from coreskip.runtime.quality import WINDOW


class Peer(Runner):
    """A peer decodes token by token through `_logits`, which is also how it is scored."""

    @property
    def _context(self) -> int:
        return max(self.job.context, WINDOW)

    def _start(self, ids: Sequence[int]) -> None:
        """Forget everything, then prefill."""
        raise NotImplementedError

    def _feed(self, token: int) -> None:
        raise NotImplementedError

    def _logits(self) -> np.ndarray[Any, Any]:
        """``[vocabulary]``, after the last token fed."""
        raise NotImplementedError

    def generate(self, ids: Sequence[int], new: int) -> Generation:
        watch = Stopwatch()
        self._start(ids)
        for left in range(new, 0, -1):
            watch.add(int(self._logits().argmax()))
            if left > 1:
                self._feed(watch.tokens[-1])
        return watch.generation()

    def perplexity(self, text: TokenText, windows: int) -> Scored | None:
        losses = [loss for window in text.windows(WINDOW, windows) for loss in self._losses(window.tolist())]
        return math.exp(sum(losses) / len(losses)), len(losses)

    def _losses(self, ids: list[int]) -> Iterator[float]:
        half = len(ids) // 2
        self._start(ids[:half])
        for position, target in enumerate(ids[half:], half + 1):
            logits = self._logits().astype(np.float64)
            top = logits.max()
            yield float(np.log(np.exp(logits - top).sum()) + top - logits[target])
            if position < len(ids):
                self._feed(target)


SCRATCH = "coreskip-onnx-"  # how the temporary folders of a runner begin, its process id next


class OnnxFolder(Peer):
    """onnxruntime-genai over a folder as it is, the job's model; greedy search of its own."""

    package: str | None = "onnxruntime-genai"

    def load(self) -> None:
        self._open(Path(str(self.job.model)))

    def _open(self, built: Path) -> None:
        import onnxruntime_genai as og

        og.disable_telemetry_events()
        settings = json.loads((built / ONNX_SETTINGS).read_text())
        # nothing ends a generation early: it wants a token that does, and takes what pads where it is told none
        self.pad = int(settings["model"]["vocab_size"]) - 1
        ends = {"model": {"eos_token_id": [self.pad], "pad_token_id": self.pad}}
        self.model = open_model(built, self.job.threads, ends)
        self._bytes = onnx_weight_bytes(built / settings["model"]["decoder"]["filename"])

    def generate(self, ids: Sequence[int], new: int) -> Generation:
        watch = Stopwatch()
        self._start(ids)
        for _ in range(new):
            self._generator.generate_next_token()
            watch.add(int(self._generator.get_next_tokens()[0]))
        return watch.generation()

    def _start(self, ids: Sequence[int]) -> None:
        import onnxruntime_genai as og

        search = og.GeneratorParams(self.model)
        search.set_search_options(do_sample=False, max_length=self._context)
        self._generator = og.Generator(self.model, search)
        self._generator.append_tokens(np.asarray([ids], dtype=np.int32))

    def _feed(self, token: int) -> None:
        self._generator.append_tokens(np.asarray([[token]], dtype=np.int32))

    def _logits(self) -> np.ndarray[Any, Any]:
        return np.asarray(self._generator.get_logits()).reshape(-1)

    def weight_bytes(self) -> int:
        return self._bytes

    def close(self) -> None:
        self._generator = self.model = None


class OnnxNeurons(Peer):
    """ONNX Runtime by itself over a folder whose graph takes the neurons that a prompt chooses: onnxruntime-genai takes
    no such inputs in the middle of a text."""

    package: str | None = "onnxruntime"

    def load(self) -> None:
        folder = Path(str(self.job.model))
        neurons = NeuronInputs.load(folder)
        if neurons is None:
            raise ValueError(f"{folder} has no neurons to choose from")
        self._session = NeuronSession(folder, neurons, self.job.threads)
        self._bytes = onnx_weight_bytes(folder / MODEL) + neurons.nbytes_chosen

    def _start(self, ids: Sequence[int]) -> None:
        self._next = self._session.begin(list(ids), self._context)

    def _feed(self, token: int) -> None:
        self._next = self._session.step(token)

    def _logits(self) -> np.ndarray[Any, Any]:
        return self._next

    def weight_bytes(self) -> int:
        return self._bytes

    def close(self) -> None:
        del self._session


class OnnxRuntime(OnnxFolder):
    """The same over what onnxruntime-genai's own model builder makes of the checkpoint."""

    def load(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-")
        built = Path(self._folder.name) / "onnx"
        _in_own_process(_BUILD_ONNX, self.job.model or "", str(built), {"float32": "fp32"}.get(self.job.dtype, "int4"))
        self._open(built)

    def close(self) -> None:
        super().close()
        self._folder.cleanup()


# In a process of its own: converting holds the fp32 model in memory, which is not this runner's memory.
_BUILD_ONNX = """
import os, subprocess, sys, tempfile
from coreskip.bench.lifetime import die_with_parent
die_with_parent()
from coreskip.runtime.load import load
model, out, precision = sys.argv[1:]
with tempfile.TemporaryDirectory(dir=os.path.dirname(out)) as folder:
    for part in load(model or None, dtype="float32", device="cpu", packed=False):
        part.save_pretrained(folder)
    build = "import runpy; runpy.run_module('onnxruntime_genai.models.builder', run_name='__main__')"
    build = "from coreskip.bench.lifetime import die_with_parent; die_with_parent(); " + build
    command = [sys.executable, "-P", "-c", build, "-i", folder, "-o", out, "-p", precision, "-e", "cpu"]
    subprocess.run(command, check=True)
"""


def _in_own_process(script: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-P", "-c", script, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines() or ["no message"]
        raise CoreskipError(f"converting the model failed: {last[-1][:300]}")


# operators that read one row of their table a token: of embeddings, and of GroupQueryAttention's rotary angles
_LOOK_UPS = {"Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding"}


def onnx_weight_bytes(path: Path) -> int:
    """Bytes of the initialisers that a decode step reads: of tables that are only looked up, one row."""
    import onnx_ir

    total = 0
    for value in onnx_ir.load(path).graph.initializers.values():
        tensor = value.const_value
        users = {node.op_type for node in value.consumers()}
        looked_up = bool(users) and users <= _LOOK_UPS
        if tensor is not None:
            rows: Any = tensor.shape[0] if tensor.shape else 1
            total += tensor.nbytes // (rows if looked_up and len(tensor.shape) > 1 else 1)
    return total


class LlamaCpp(Peer):
    """llama.cpp through llama-cpp-python, on a GGUF file as it is."""

    package = "llama-cpp-python"

    def load(self) -> None:
        import llama_cpp

        path, exact = gguf_of(self.job), {}
        if self.job.dtype == "float32":  # keys and values, too, which it rounds to 16 bits
            exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        self._llama: Any = llama_cpp.Llama(
            str(path),
            n_ctx=self._context,
            n_threads=self.job.threads,
            n_threads_batch=self.job.threads,
            n_gpu_layers=0 if self.job.device == "cpu" else -1,
            verbose=False,
            **exact,
        )
        self._bytes, self._kind = gguf_weights(path)

    def _start(self, ids: Sequence[int]) -> None:
        self._llama.reset()
        self._llama.eval(list(ids))

    def _feed(self, token: int) -> None:
        self._llama.eval([token])

    def _logits(self) -> np.ndarray[Any, Any]:
        import llama_cpp

        pointer = llama_cpp.llama_get_logits(self._llama.ctx)
        return np.ctypeslib.as_array(pointer, shape=(self._llama.n_vocab(),))

    def weight_bytes(self) -> int:
        return self._bytes

    def traits(self) -> dict[str, Any]:
        return {**super().traits(), "dtype": self._kind}

    def close(self) -> None:
        self._llama.close()


def gguf_of(job: Job) -> Path:
    """The GGUF file that a peer runs for this job.

    Raises:
        CoreskipError: the model is not a GGUF file and none was given.
    """
    if job.gguf is not None:
        return job.gguf
    if job.shape is None and job.model is None:
        return embedded_gguf()
    if job.shape is None and str(job.model).endswith(".gguf"):
        return Path(str(job.model))
    raise CoreskipError(f"{job.runner} needs the model as GGUF: name one with --gguf FILE")


def gguf_weights(path: Path) -> tuple[int, str]:
    """Bytes that a decode step reads, and the type that most of them have."""
    from gguf import GGUFReader

    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    if "output.weight" in tensors:  # else the embedding table is the head too, and is read whole
        tensors.pop("token_embd.weight", None)
    by_type: dict[str, int] = {}
    for tensor in tensors.values():
        kind = tensor.tensor_type.name.lower()
        by_type[kind] = by_type.get(kind, 0) + int(tensor.n_bytes)
    return sum(by_type.values()), max(by_type, key=lambda kind: by_type[kind])
