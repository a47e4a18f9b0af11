"""What the benchmark compares: each runner loads one model, generates greedily from token ids with a clock running,
and knows how many bytes of weights a decode step of its reads."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, StaticCache
from transformers.generation.streamers import BaseStreamer

from coreskip.bench.workloads import Shape, byte_ids
from coreskip.kernels import cpu
from coreskip.kernels.ops import available
from coreskip.predictors.calibration import TokenText, tokenize
from coreskip.predictors.errors import CoreskipError
from coreskip.predictors.observe import inference
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import CoreNeurons
from coreskip.predictors.version import VERSION
from coreskip.runtime.cost import bytes_per_token, loaded_bytes
from coreskip.runtime.engine import Engine
from coreskip.runtime.load import embedded_gguf, load
from coreskip.runtime.quality import WINDOW, evaluate_all
from coreskip.runtime.wrap import is_wrapped, runtime_of, unwrap, wrap


@dataclass(frozen=True)
class Job:
    """One runner with its settings; it travels to the runner's own process.

    Attributes:
        runner: a key of `RUNNERS`.
        dtype: of the weights: float32, bfloat16, float16; int8 or int4, which coreskip makes of float32; or the peer's
            own (int4, gguf).
        model: as `coreskip.load` takes it; not looked at where there is a `shape`.
        plan: folder of a plan, or a share of neurons to keep by core neurons without any calibration.
        gguf: for llama.cpp and a model other than the embedded one.
        context: tokens of the longest prompt and its continuation: what a cache of fixed size must hold.
    """

    runner: str
    dtype: str
    model: str | None = None
    shape: Shape | None = None
    plan: Path | float | None = None
    gguf: Path | None = None
    device: str = "cpu"
    threads: int = 1
    context: int = 1024

    def __str__(self) -> str:
        plan = "" if self.plan is None else f" {self.plan}"
        return f"{self.runner} {self.dtype}{plan}"


@dataclass(frozen=True)
class Generation:
    """Greedily generated token ids, with the clock: seconds to the first one, then seconds from each to the next."""

    tokens: list[int]
    ttft: float
    gaps: list[float]

    @property
    def tok_s(self) -> float:
        """Tokens per second after the first."""
        return len(self.gaps) / sum(self.gaps)


Scored = tuple[float, int]  # a perplexity, and over how many tokens


class Stopwatch(BaseStreamer):
    """Notes when each token arrives; as a transformers streamer, it is told every one as soon as it is chosen."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._prompt_seen = False
        self._start = time.perf_counter()
        self._arrivals: list[float] = []

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:  # generate hands over the prompt first
            self._prompt_seen = True
            return
        self.add(int(value))

    def add(self, token: int) -> None:
        self._arrivals.append(time.perf_counter())
        self.tokens.append(token)

    def end(self) -> None:
        """Nothing is held back."""

    def generation(self) -> Generation:
        arrivals = self._arrivals
        gaps = [after - before for before, after in itertools.pairwise(arrivals)]
        return Generation(self.tokens, arrivals[0] - self._start, gaps)


def greedy(model: Any, ids: Tensor, tokens: int, **options: Any) -> tuple[Tensor, Generation]:
    """``model.generate``'s greedy continuation of `ids` ``[1, length]``, whole, and when its `tokens` tokens came: an
    end-of-text token does not stop it."""
    watch = Stopwatch()
    chosen: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "streamer": watch, **options}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **chosen)
    return output, watch.generation()


class Runner:
    """One way to run a model. Figures that it cannot give are None."""

    #: pip package that it needs besides coreskip's own dependencies
    package: str | None = None

    def __init__(self, job: Job) -> None:
        self.job = job

    def load(self) -> None:
        raise NotImplementedError

    def generate(self, ids: Sequence[int], new: int) -> Generation:
        """Greedy, exactly `new` tokens: an end-of-text token does not stop it, so that every runner does equal work."""
        raise NotImplementedError

    def weight_bytes(self) -> int:
        """Bytes of weights that a decode step reads."""
        raise NotImplementedError

    def perplexity(self, text: TokenText, windows: int) -> Scored | None:
        """Over windows of 512 tokens whose first half is prefilled and whose second half is scored under decode."""
        raise NotImplementedError

    def traits(self) -> dict[str, Any]:
        """dtype as read, the plan's method and keep, the share of neurons skipped so far."""
        return {"dtype": self.job.dtype, "method": "dense", "keep": 1.0, "neurons_skipped": 0.0}

    def versions(self) -> dict[str, str]:
        found = {"coreskip": VERSION, "python": platform.python_version()}
        for package in ("torch", "transformers", self.package):
            if package is not None:
                found[package] = version(package)
        return found

    def close(self) -> None:
        """Delete what was written."""


# --- transformers and coreskip --------------------------------------------------------------------------------------


class HuggingFace(Runner):
    """transformers, eager, with its dynamic KV cache."""

    def load(self) -> None:
        formats = self.job.dtype in FORMATS  # coreskip's own, packed from what is loaded
        dtype = torch.float32 if formats else getattr(torch, self.job.dtype)
        device = torch.device(self.job.device)
        self.tokenizer: Any = None
        if self.job.shape is not None:
            self.model: Any = self.job.shape.build(dtype, device)
        else:
            self.model, self.tokenizer = load(self.job.model, dtype=dtype, device=device)
        # greedy, without the checkpoint's penalties and without an end
        self.model.generation_config = cast(Any, GenerationConfig)(do_sample=False, pad_token_id=0)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included."""
        if self.tokenizer is None:
            return [byte_ids(text, self.model.config.vocab_size) for text in texts]
        return [list(self.tokenizer(text).input_ids) for text in texts]

    def scored_text(self, text: str, source: str) -> TokenText:
        return tokenize(self.tokenizer, text, source)

    def generate(self, ids: Sequence[int], new: int) -> Generation:
        prompt = torch.tensor([ids], device=self.model.device)
        return greedy(self.model, prompt, new, **self._fresh_cache())[1]

    def _fresh_cache(self) -> dict[str, Any]:
        return {}  # generate makes one

    def regrets(self, ids: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """How much worse than the best choice each token is, in nats, by this runner's own decode policy: 0 where it
        is the one that greedy decoding takes. One prefill of `ids`, then one pass over `tokens`."""
        prompt, rest = torch.tensor([ids]), torch.tensor([list(tokens)])
        prompt, rest = prompt.to(self.model.device), rest.to(self.model.device)
        with inference(self.model):
            out = self.model(input_ids=prompt, use_cache=True)
            logits = [out.logits[0, -1:]]
            if len(tokens) > 1:
                out = self.model(input_ids=rest[:, :-1], past_key_values=out.past_key_values, use_cache=True)
                logits.append(out.logits[0])
        scores = torch.cat(logits).float().log_softmax(-1)
        chosen = scores.gather(1, rest[0].unsqueeze(1)).squeeze(1)
        return (scores.max(-1).values - chosen).tolist()

    def weight_bytes(self) -> int:
        return loaded_bytes(self.model)

    def perplexity(self, text: TokenText, windows: int) -> Scored | None:
        measured = evaluate_all(self.model, [Plan.dense(self.model)], text, windows=windows, progress=False)[0]
        return measured["dense"]["ppl"], measured["tokens"]


class Compiled(HuggingFace):
    """transformers with torch.compile over a static KV cache; prefill stays eager, as transformers does it.

    A compiled graph per prompt length would cost more than it saves, and a frozen graph is the fastest one on a CPU.
    """

    def load(self) -> None:
        compiling: Any = CompileConfig(mode="default" if self.job.device == "cpu" else "reduce-overhead")
        compiling._compile_all_devices = True  # else transformers compiles on accelerators only
        cast(Any, torch._inductor).config.freezing = self.job.device == "cpu"
        super().load()
        self.model.generation_config.compile_config = compiling
        # One cache for good: a frozen graph keeps the addresses of the first one, and with a fresh cache per prompt,
        # as generate makes them, every output from the second prompt on was wrong (by 14 nats).
        self._cache: Any = StaticCache(config=self.model.config, max_cache_len=self.job.context)

    def _fresh_cache(self) -> dict[str, Any]:
        self._cache.reset()
        return {"past_key_values": self._cache}

    def perplexity(self, text: TokenText, windows: int) -> Scored | None:
        return None  # scoring would run the eager model, which is not what was timed


class Coreskip(HuggingFace):
    """coreskip under a plan: the job's, or one that skips nothing."""

    exact = False

    def load(self) -> None:
        super().load()
        self.plan = self._plan()
        # both counted while the originals are there: the native step's check of its first result may refuse it
        self._covered = bytes_per_token(self.model, self.plan)
        self._on_modules = bytes_per_token(self.model, self.plan, native=False)
        self._wrap()

    def _wrap(self) -> None:
        wrap(self.model, self.plan, exact=self.exact, keep_originals=None if self.exact else False)

    @property
    def _bytes(self) -> int:
        """Of weights that a decode step reads where it ran."""
        return self._covered if runtime_of(self.model).steps.native.refusal is None else self._on_modules

    def _plan(self) -> Plan:
        dense = Plan.dense(self.model, self.job.dtype if self.job.dtype in FORMATS else None)
        if self.job.plan is None:
            return dense
        if isinstance(self.job.plan, Path):
            plan = Plan.load(self.job.plan)
            return replace(plan, weights=dense.weights or plan.weights)
        policy = CoreNeurons(alpha=0.4, beta=self.job.plan, score="griffin")
        layers = tuple(LayerPlan(policy) for _ in dense.layers)
        recipe = {"method": "core", "keep": self.job.plan, "score": "griffin"}
        return Plan(layers, dense.model, recipe, weights=dense.weights)

    def weight_bytes(self) -> int:
        return self._bytes

    def perplexity(self, text: TokenText, windows: int) -> Scored | None:
        super().load()  # the wrapped one's originals may be gone
        measured = evaluate_all(self.model, [self.plan], text, windows=windows, progress=False)[0]
        self._wrap()
        return measured["sparse"]["ppl"], measured["tokens"]

    def traits(self) -> dict[str, Any]:
        return {
            "dtype": self.plan.weights or self.job.dtype,
            "method": str(self.plan.recipe.get("method", "unknown")),
            "keep": self.plan.keep,
            "neurons_skipped": runtime_of(self.model).usage.neuron_sparsity(),
        }

    def close(self) -> None:
        if is_wrapped(self.model) and runtime_of(self.model).removable:
            unwrap(self.model)


class CoreskipExact(Coreskip):
    """Exact mode: the dense model's own text. Unless the job has a plan, 4-bit weights and the text itself draft."""

    exact = True

    def _plan(self) -> Plan:
        return Plan.dense(self.model, "int4") if self.job.plan is None else super()._plan()

    def weight_bytes(self) -> int:
        """What tokens cost on average: verification passes and draft steps together."""
        done = runtime_of(self.model).exact
        last = None if done is None else done.last
        total = bytes_per_token(self.model, Plan.dense(self.model))
        if last is None or last.tokens == 0:
            return total
        return round((last.passes * total + last.drafted["plan"] * self._bytes) / last.tokens)

    def perplexity(self, text: TokenText, windows: int) -> Scored | None:
        return None  # that of the dense model

    def traits(self) -> dict[str, Any]:
        return {"dtype": self.job.dtype, "method": "exact", "keep": 1.0, "neurons_skipped": 0.0}


class CoreskipEngine(Coreskip):
    """`Engine.generate`: from a text to the text of its continuation."""

    def generate(self, ids: Sequence[int], new: int) -> Generation:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        if list(self.tokenizer(text).input_ids) != list(ids):
            raise CoreskipError("an engine takes texts, and this prompt's tokens are not those of its text")
        watch = Stopwatch()
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "streamer": watch}
        Engine(self.model, self.tokenizer).generate(text, max_new_tokens=new, **options)
        return watch.generation()


class CoreskipLookup(CoreskipEngine):
    """The same with drafts from the text itself, which the plan verifies: the same text."""

    def _wrap(self) -> None:
        wrap(self.model, self.plan, keep_originals=False, lookup=True)

    def weight_bytes(self) -> int:
        """What a token costs on average: a pass over several reads the weights once."""
        done = runtime_of(self.model).lookup
        last = None if done is None else done.last
        return self._bytes if last is None or not last.tokens else round(last.passes * self._bytes / last.tokens)


# --- peers ------------------------------------------------------------------------------------------------------------


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


class OnnxRuntime(Peer):
    """onnxruntime-genai, over what its own model builder makes of the checkpoint; greedy search of its own."""

    package: str | None = "onnxruntime-genai"

    def load(self) -> None:
        import onnxruntime_genai as og

        og.disable_telemetry_events()
        self._folder = tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-")
        built = Path(self._folder.name) / "onnx"
        _in_own_process(_BUILD_ONNX, self.job.model or "", str(built), {"float32": "fp32"}.get(self.job.dtype, "int4"))
        settings = json.loads((built / "genai_config.json").read_text())
        settings["model"]["eos_token_id"] = []  # nothing ends a generation early
        decoder = settings["model"]["decoder"]
        decoder["session_options"]["intra_op_num_threads"] = self.job.threads
        (built / "genai_config.json").write_text(json.dumps(settings))
        self._bytes = onnx_weight_bytes(built / decoder["filename"])
        self._model = og.Model(str(built))

    def generate(self, ids: Sequence[int], new: int) -> Generation:
        watch = Stopwatch()
        self._start(ids)
        for _ in range(new):
            self._generator.generate_next_token()
            watch.add(int(self._generator.get_next_tokens()[0]))
        return watch.generation()

    def _start(self, ids: Sequence[int]) -> None:
        import onnxruntime_genai as og

        search = og.GeneratorParams(self._model)
        search.set_search_options(do_sample=False, max_length=self._context)
        self._generator = og.Generator(self._model, search)
        self._generator.append_tokens(np.asarray([ids], dtype=np.int32))

    def _feed(self, token: int) -> None:
        self._generator.append_tokens(np.asarray([[token]], dtype=np.int32))

    def _logits(self) -> np.ndarray[Any, Any]:
        return np.asarray(self._generator.get_logits()).reshape(-1)

    def weight_bytes(self) -> int:
        return self._bytes

    def close(self) -> None:
        self._generator = self._model = None
        self._folder.cleanup()


# In a process of its own: converting holds the fp32 model in memory, which is not this runner's memory.
_BUILD_ONNX = """
import os, subprocess, sys, tempfile
from coreskip.bench.lifetime import die_with_parent
die_with_parent()
from coreskip.runtime.load import load
model, out, precision = sys.argv[1:]
with tempfile.TemporaryDirectory(dir=os.path.dirname(out)) as folder:
    for part in load(model or None, dtype="float32", device="cpu"):
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

        path = gguf_of(self.job)
        self._llama: Any = llama_cpp.Llama(
            str(path),
            n_ctx=self._context,
            n_threads=self.job.threads,
            n_threads_batch=self.job.threads,
            n_gpu_layers=0 if self.job.device == "cpu" else -1,
            verbose=False,
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
    """The GGUF file that llama.cpp runs for this job.

    Raises:
        CoreskipError: the model is not a GGUF file and none was given.
    """
    if job.gguf is not None:
        return job.gguf
    if job.shape is None and job.model is None:
        return embedded_gguf()
    if job.shape is None and str(job.model).endswith(".gguf"):
        return Path(str(job.model))
    raise CoreskipError("llama.cpp needs the model as GGUF: name one with --gguf FILE")


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
FORMATS = ("int8", "int4")  # in which coreskip holds weights
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


# --- the machine ------------------------------------------------------------------------------------------------------

_BUFFER = 512 << 20  # bytes: sixteen times the last-level cache of the machine that this was written on


def _native_read() -> Callable[[Tensor], Any] | None:
    """The kernels' own stream of loads, where they are built. Without it, of torch's reductions the one that reads
    fastest: mv reached 18 GB/s where sum, dot and amax reached 17."""
    return getattr(cpu, "read", None) if available("cpu") is None else None


class Machine:
    """Measures how fast this machine reads memory: the ceiling of every decode speed."""

    def __init__(self, device: str, threads: int) -> None:
        self._device = torch.device(device)
        torch.set_num_threads(threads)
        self._buffer = torch.ones(_BUFFER // 4, device=self._device)

    def read_gb_s(self) -> float:
        """GB/s of the best of three passes: anything that disturbs a pass makes it slower, nothing makes it faster.

        On a GPU, a copy within the device, whose reads and writes both count.
        """
        passes = self._copies() if self._device.type == "cuda" else self._reads()
        return max(passes) / 1e9

    def _reads(self) -> Iterator[float]:
        matrix = self._buffer.view(-1, 4096)
        read = _native_read() or partial(torch.mv, vec=torch.ones(matrix.shape[1]))
        for _ in range(3):
            start = time.perf_counter()
            read(matrix)
            yield _BUFFER / (time.perf_counter() - start)

    def _copies(self) -> Iterator[float]:
        target = torch.empty_like(self._buffer)
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            target.copy_(self._buffer)
            torch.cuda.synchronize()
            yield 2 * _BUFFER / (time.perf_counter() - start)
