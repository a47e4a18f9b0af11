"""Whether exported plans write the same texts where other tools run them.

    python -m coreskip.bench.export_texts --text TEXT --rows bench/rows/export_texts.jsonl

The embedded model dense, with 70 % of the neurons (static, calibrated on the first half of the text), without every
third layer, and with both: exported as a checkpoint, to ONNX in float32 and to GGUF in float32, where llama.cpp holds
keys and values in 32 bits, too, and in float16, where it rounds them and activations to 16. Greedy texts after prompts
of the second half against transformers on the checkpoint, with how near a tie texts part, and the largest error of ONNX
Runtime's logits beside that of float32 itself, both against the checkpoint in float64. And how many decode steps of the
wrapped checkpoint give the logits of the wrapped model, to the bit.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, DynamicCache

from coreskip.bench.processes import Worker
from coreskip.bench.provenance import provenance, write_rows
from coreskip.bench.runner import Job
from coreskip.bench.workloads import threads_available
from coreskip.predictors.calibration import read_text, tokenize
from coreskip.predictors.files import check_file
from coreskip.predictors.observe import inference
from coreskip.predictors.plan import Plan
from coreskip.predictors.policies import Skip
from coreskip.runtime.analyze import analyze
from coreskip.runtime.export import export
from coreskip.runtime.load import load
from coreskip.runtime.wrap import wrap

_PROMPT = 40


def plans(model: Any, tokenizer: Any, text: Any) -> dict[str, Plan]:
    """What is exported, by name."""
    dense = Plan.dense(model)
    static = analyze(model, tokenizer, method="static", keep=0.7, text=text)
    names = {"dense": dense, "static 0.7": static}
    return names | {"every third layer skipped": _thinned(dense), "both": _thinned(static)}


def _thinned(plan: Plan) -> Plan:
    layers = (replace(layer, layer=Skip()) if i % 3 == 1 else layer for i, layer in enumerate(plan.layers))
    return replace(plan, layers=tuple(layers))


def measure(
    model: Any, tokenizer: Any, named: dict[str, Plan], prompts: list[list[int]], tokens: int
) -> Iterator[dict[str, Any]]:
    """A row for every plan and runtime."""
    for name, plan in named.items():
        with tempfile.TemporaryDirectory() as scratch:
            folders = {to: Path(scratch) / to for to in ("hf", "onnx", "float32", "float16")}
            for to, folder in folders.items():
                how = {"to": "gguf", "weights": to} if to.startswith("float") else {"to": to}
                export(model, tokenizer, folder, plan=plan, progress=False, **how)
            checkpoint = AutoModelForCausalLM.from_pretrained(folders["hf"]).eval()
            yield _bits(model, plan, checkpoint, prompts[0]) | {"plan": name}
            expected = [_greedy(checkpoint, ids, tokens) for ids in tqdm(prompts, desc=name, leave=False)]
            runners = {
                "ONNX Runtime": Job(
                    "onnxruntime-folder", "float32", model=str(folders["onnx"]), context=_PROMPT + tokens
                ),
            }
            for form in ("float32", "float16"):
                job = Job("llama.cpp", form, gguf=folders[form] / "model.gguf", context=_PROMPT + tokens)
                runners[f"llama.cpp, {form}"] = job
            for runtime, job in runners.items():
                found = _texts(job, prompts, tokens)
                same = [_same(got, wanted) for got, wanted in zip(found, expected, strict=True)]
                row = {
                    "kind": "export_texts",
                    "plan": name,
                    "runtime": runtime,
                    "texts": len(prompts),
                    "tokens": tokens,
                }
                row |= {"equal": sum(n == tokens for n in same), "before_they_part": float(np.mean(same))}
                row |= {"largest_gap": _largest_gap(checkpoint, prompts, found, expected)}
                yield row | (_errors(checkpoint, folders["onnx"], prompts[0]) if runtime == "ONNX Runtime" else {})


def _bits(model: Any, plan: Plan, checkpoint: Any, ids: list[int]) -> dict[str, Any]:
    """Decode steps of the wrapped model and of the wrapped checkpoint, after one dense token: how many of their logits
    are the same to the bit."""
    given, runs = torch.tensor([ids]), [i for i, layer in enumerate(plan.layers) if layer.layer.mlp]
    own = DynamicCache(config=checkpoint.config)
    with inference(model), inference(checkpoint):
        cache = model(given[:, :1], use_cache=True).past_key_values
        own.layers = [copy.deepcopy(cache.layers[i]) for i in runs]
        with wrap(model, plan):
            expected = _continued(model, cache, given)
        with wrap(checkpoint):
            found = _continued(checkpoint, own, given)
    same = int((found == expected).all(-1).sum())
    return {"kind": "export_texts", "runtime": "coreskip, to the bit", "steps": found.shape[1], "equal": same}


def _continued(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(token, past_key_values=cache).logits for token in ids[:, 1:].split(1, 1)], 1)


def _greedy(model: Any, ids: list[int], tokens: int) -> list[int]:
    given = torch.tensor([ids])
    model.generation_config.eos_token_id = None
    out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False)
    found: list[int] = out[0, len(ids) :].tolist()
    return found


def _texts(job: Job, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    worker = Worker(replace(job, threads=threads_available()))
    try:
        worker("load")
        return [list(worker("generate", ids, tokens).tokens) for ids in prompts]
    finally:
        worker.close()


def _same(got: list[int], wanted: list[int]) -> int:
    """How many tokens are the expected ones, from the first on."""
    pairs = list(zip(got, wanted, strict=False))
    return next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))


def _largest_gap(
    checkpoint: Any, prompts: list[list[int]], found: list[list[int]], expected: list[list[int]]
) -> float | None:
    """Where texts part: by how much the checkpoint's logit of its own token is above that of the other runtime's, at
    most; in rounding alone two runtimes can part no further than their logits differ. None: all are equal."""
    gaps = []
    for ids, got, wanted in zip(prompts, found, expected, strict=True):
        at = _same(got, wanted)
        if at < min(len(got), len(wanted)):
            with inference(checkpoint):
                logits = checkpoint(torch.tensor([[*ids, *wanted[:at]]])).logits[0, -1].float()
            gaps.append(float(logits[wanted[at]] - logits[got[at]]))
    return max(gaps, default=None)


def _errors(checkpoint: Any, folder: Path, prompt: list[int]) -> dict[str, float]:
    import onnxruntime

    from coreskip.runtime.export_onnx import decoded

    ids = np.array([prompt])
    found = torch.from_numpy(
        decoded(onnxruntime.InferenceSession(folder / "model.onnx"), ids, len(prompt) // 2)
    ).double()
    with inference(checkpoint):
        usual = checkpoint(torch.from_numpy(ids)).logits.double()
        exact = checkpoint.double()(torch.from_numpy(ids)).logits
    return {"error": float((found - exact).abs().max()), "error_of_float32": float((usual - exact).abs().max())}


@click.command()
@click.option("--text", required=True, type=click.Path(path_type=Path), help="Half of it calibrates.")
@click.option("--rows", "output", required=True, type=click.Path(path_type=Path))
@click.option("--prompts", default=20, show_default=True)
@click.option("--tokens", default=64, show_default=True)
def main(text: Path, output: Path, prompts: int, tokens: int) -> None:
    """Texts of exported plans in ONNX Runtime and llama.cpp against transformers."""
    check_file(output)
    options = f"--text {text.name} --rows {output.name} --prompts {prompts} --tokens {tokens}"
    about = provenance(f"python -m coreskip.bench.export_texts {options}")
    model, tokenizer = load(device="cpu", dtype="float32", packed=False)
    calibration, unseen = tokenize(tokenizer, read_text(text), text.name).split(0.5, 0.5)
    begins = [ids.tolist() for ids in unseen.windows(_PROMPT, prompts)]
    rows: list[dict[str, Any]] = []
    for row in measure(model, tokenizer, plans(model, tokenizer, calibration), begins, tokens):
        rows.append({"model": "SmolLM2-135M-Instruct", **row, **about})
        write_rows(output, rows)
        of = f"{row['steps']} steps" if "steps" in row else f"{row['texts']} texts"
        click.echo(f"{row['plan']:26} {row['runtime']:19} {row['equal']} of {of} equal")


if __name__ == "__main__":
    main()
