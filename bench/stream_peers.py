"""Several greedy texts at once, in coreskip and in peers that batch: tokens a second of all.

``python -m coreskip.bench.stream_peers --rows bench/rows/stream_peers.jsonl``

Each system has a process of its own. The Python must have the peers: ``pip install openvino-genai onnxruntime-genai
llama-cpp-python``; one that is not installed, fails or is too slow gets a row that says so.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import click
import numpy as np

from coreskip.bench.concurrency import different_prompts, streams_of
from coreskip.bench.lifetime import die_with_parent
from coreskip.bench.peers import SCRATCH, OnnxRuntime, gguf_of
from coreskip.bench.provenance import provenance, write_rows
from coreskip.bench.runner import Job
from coreskip.bench.workloads import threads_available
from coreskip.runtime.engine import Engine
from coreskip.runtime.load import load

Row = dict[str, Any]
_START_S = 240.0  # that a system may take from its start until it is ready


class System(Protocol):
    """Makes `new` tokens behind each prompt, whatever ends a text; returns how many it made of each."""

    def __call__(self, asked: Sequence[list[int]], new: int) -> list[int]: ...


def _coreskip(job: Job, most: int) -> System:
    model, tokenizer = load(device="cpu")
    engine = Engine(model, tokenizer, weights="int4", max_batch=most, prompt_bytes=0)
    return lambda asked, new: [len(stream.tokens) for stream in streams_of(engine, asked, new)[1]]


def _openvino(job: Job, most: int) -> System:
    """Continuous batching over the GGUF file, with the CPU plugin's own defaults."""
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_seqs = most
    pipe = openvino_genai.LLMPipeline(
        str(gguf_of(job)), "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=job.threads
    )

    def run(asked: Sequence[list[int]], new: int) -> list[int]:
        config = openvino_genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        ids, mask = _padded(asked)
        tokens = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(mask))
        return [len(text) for text in pipe.generate(tokens, config).tokens]

    return run


def _onnxruntime(job: Job, most: int) -> System:
    """One batch of prompts that are padded on the left."""
    import onnxruntime_genai as og

    runner = OnnxRuntime(job)
    runner.load()

    def run(asked: Sequence[list[int]], new: int) -> list[int]:
        ids, _ = _padded(asked)
        ids[ids == 0] = runner.pad  # nothing else is that token
        search = og.GeneratorParams(runner.model)
        search.set_search_options(do_sample=False, max_length=ids.shape[1] + new, batch_size=len(asked))
        generator = og.Generator(runner.model, search)
        generator.append_tokens(ids.astype(np.int32))
        for _ in range(new):
            generator.generate_next_token()
        return [len(generator.get_sequence(i)) - ids.shape[1] for i in range(len(asked))]

    return run


def _llama_cpp(job: Job, most: int) -> System:
    """llama.cpp's own batches, which llama-cpp-python passes through: each text is a sequence of one context."""
    import llama_cpp as ll

    ll.llama_backend_init()
    model = ll.llama_model_load_from_file(str(gguf_of(job)).encode(), ll.llama_model_default_params())
    settings = ll.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = job.context * most, 2048, 512
    settings.n_seq_max, settings.kv_unified = most, True
    settings.n_threads = settings.n_threads_batch = job.threads
    context = ll.llama_init_from_model(model, settings)
    words = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    batch = ll.llama_batch_init(2048, 0, 1)

    def fed(entries: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """The likeliest next tokens of a batch, of its (token, position, sequence, wanted)."""
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        batch.n_tokens = len(entries)
        if ll.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        return [
            int(np.ctypeslib.as_array(ll.llama_get_logits_ith(context, i), shape=(words,)).argmax())
            for i, entry in enumerate(entries)
            if entry[3]
        ]

    def run(asked: Sequence[list[int]], new: int) -> list[int]:
        ll.llama_memory_clear(ll.llama_get_memory(context), True)
        last = [
            fed([(token, at, row, at == len(ids) - 1) for at, token in enumerate(ids)])[0]
            for row, ids in enumerate(asked)
        ]
        for made in range(new - 1):
            last = fed([(token, len(asked[row]) + made, row, True) for row, token in enumerate(last)])
        return [new] * len(asked)

    return run


def _padded(asked: Sequence[list[int]]) -> tuple[Any, Any]:
    """Prompts as a batch padded on the left with token 0, and its mask; int64."""
    longest = max(map(len, asked))
    ids, mask = (np.zeros((len(asked), longest), dtype=np.int64) for _ in range(2))
    for row, prompt in enumerate(asked):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


#: by name: how it is made, the module that it needs, and how it computes
SYSTEMS: dict[str, tuple[Callable[[Job, int], System], str, str]] = {
    "coreskip": (_coreskip, "coreskip", "int4; keys and values in float32"),
    "openvino": (_openvino, "openvino_genai", "the GGUF file, continuous batching, its own defaults (8-bit KV cache)"),
    "onnxruntime": (_onnxruntime, "onnxruntime_genai", "int4 of its own builder, one padded batch"),
    "llama.cpp": (_llama_cpp, "llama_cpp", "the GGUF file, one context of many sequences; 16-bit KV cache"),
}


class SystemFailed(Exception):
    """A system cannot go on; the message says why."""


class SystemProcess:
    """A system in a process of its own, stopped but for its turns: idle threads of some peers spin, on cores that the
    others need."""

    def __init__(self, name: str, threads: int, most: int, context: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_work, args=(theirs, name, threads, most, context))
        self._process.start()
        theirs.close()
        self._answer(_START_S)
        self._signal(signal.SIGSTOP)

    def seconds(self, asked: Sequence[list[int]], new: int, patience: float) -> float:
        """From the first request to the last token of all.

        Raises:
            SystemFailed: it took longer than `patience` seconds, ended, or made another number of tokens.
        """
        self._signal(signal.SIGCONT)
        self._pipe.send((list(asked), new))
        seconds, made = self._answer(patience)
        self._signal(signal.SIGSTOP)
        if made != [new] * len(asked):
            raise SystemFailed(f"made {made} tokens where {new} were asked of each")
        return float(seconds)

    def _answer(self, patience: float) -> Any:
        if not self._pipe.poll(patience):
            self.close()
            raise SystemFailed(f"no answer in {patience:.0f} s")
        try:
            found = self._pipe.recv()
        except EOFError:
            self.close()
            raise SystemFailed("its process ended") from None
        if isinstance(found, str):
            self.close()
            raise SystemFailed(found)
        return found

    def _signal(self, number: int) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self._pipe.close()  # which ends it between two turns
        self._process.join(5)
        self._process.kill()
        self._process.join()
        for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}{self._process.pid}-*"):
            shutil.rmtree(left, ignore_errors=True)


def _work(pipe: Connection, name: str, threads: int, most: int, context: int) -> None:
    die_with_parent()
    import torch

    torch.set_num_threads(threads)
    try:
        system = SYSTEMS[name][0](Job(name, "int4", threads=threads, context=context), most)
        pipe.send(None)
        while True:
            asked, new = pipe.recv()
            begin = time.perf_counter()
            made = system(asked, new)
            pipe.send((time.perf_counter() - begin, made))
    except EOFError:
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {str(error)[:200]}")


@click.command()
@click.option("--rows", "output", required=True, type=click.Path(path_type=Path), help="JSONL file to write.")
@click.option("--systems", default=",".join(SYSTEMS), show_default=True)
@click.option("--streams", default="1,16", show_default=True, help="How many at once, in turn.")
@click.option("--tokens", default=128, type=click.IntRange(2), show_default=True, help="Of each stream.")
@click.option("--rounds", default=3, type=click.IntRange(1), show_default=True, help="Of all systems in turn.")
@click.option("--patience", default=60.0, show_default=True, help="Seconds for all streams of one turn.")
def main(output: Path, systems: str, streams: str, tokens: int, rounds: int, patience: float) -> None:
    """Measure the embedded model."""
    names, counts = systems.split(","), [int(count) for count in streams.split(",")]
    unknown = [name for name in names if name not in SYSTEMS]
    if unknown:
        raise click.BadParameter(f"{unknown[0]}: choose from {', '.join(SYSTEMS)}", param_hint="--systems")
    words = f"--systems {systems} --streams {streams} --tokens {tokens} --rounds {rounds} --patience {patience:g}"
    about = provenance(f"python -m coreskip.bench.stream_peers --rows bench/rows/{output.name} {words}")
    asked = different_prompts(load(device="cpu")[1], max(counts))
    found, failed = measured(names, counts, asked, tokens, rounds, patience)
    shared = {"tokens": tokens, "rounds": rounds, "threads": threads_available(), "model": "embedded", **about}
    rows = [
        {"kind": "stream_peers", "system": name, "streams": count, "notes": SYSTEMS[name][2], **shared,
         **({"failed": failed[name]} if name in failed else
            {"tok_s": round(count * tokens / median(found[name, count]), 1)})}
        for name in names for count in counts
    ]  # fmt: skip
    write_rows(output, rows)
    for row in rows:
        click.echo(f"{row['system']}, {row['streams']}: {row.get('tok_s', row.get('failed'))}")


def measured(
    names: Sequence[str], counts: Sequence[int], asked: Sequence[list[int]], new: int, rounds: int, patience: float
) -> tuple[dict[tuple[str, int], list[float]], dict[str, str]]:
    """Seconds of each round, by system and number of streams; and why systems have failed."""
    running, failed = dict[str, SystemProcess](), dict[str, str]()
    found: dict[tuple[str, int], list[float]] = {(name, count): [] for name in names for count in counts}
    context = max(map(len, asked)) + new
    try:
        for name in names:
            try:
                if importlib.util.find_spec(SYSTEMS[name][1]) is None:
                    raise SystemFailed(f"there is no {SYSTEMS[name][1]}")
                running[name] = SystemProcess(name, threads_available(), max(counts), context)
                running[name].seconds(asked[: max(counts)], 4, patience)  # warms up
            except SystemFailed as error:
                failed[name] = str(error)
        for _ in range(rounds):
            for count in counts:
                for name in [name for name in names if name not in failed]:
                    try:
                        found[name, count].append(running[name].seconds(asked[:count], new, patience))
                    except SystemFailed as error:
                        failed[name] = str(error)
    finally:
        for system in running.values():
            system.close()
    return found, failed


if __name__ == "__main__":
    main()
