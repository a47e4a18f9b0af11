"""`make demo`: the embedded model, analyzed, then dense and sparse side by side."""

from __future__ import annotations

import statistics
import textwrap
from typing import Any

from coreskip.bench.runners import Stopwatch
from coreskip.kernels.ops import available
from coreskip.predictors.plan import Plan
from coreskip.runtime.analyze import analyze
from coreskip.runtime.load import load
from coreskip.runtime.wrap import wrap

KEEP = 0.7
NEW_TOKENS = 48
ROUNDS = 5
PROMPT = (
    "The lighthouse stood at the end of a long spit of rock, and for sixty years the same family had kept its lamp. "
    "Every evening at dusk the keeper climbed the hundred and twelve steps, trimmed the wick, polished the lens and "
    "wrote the weather in a book. In winter the waves broke over the door, and nobody came for weeks. The children "
    "learned to read from old newspapers and to tell a schooner from a brig by its lights. One night in the autumn of"
)


def generate(model: Any, tokenizer: Any) -> tuple[str, float]:
    """Greedy continuation of the prompt, and decode tokens per second; choosing neurons is part of the time."""
    watch = Stopwatch()
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    output = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, streamer=watch
    )
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :]), watch.generation().tok_s


def race(model: Any, tokenizer: Any, plan: Plan) -> dict[str, tuple[str, list[float]]]:
    """Dense and sparse in turn, A B A B ..., after one uncounted round each."""
    found: dict[str, tuple[str, list[float]]] = {}
    for _ in range(ROUNDS + 1):
        dense = generate(model, tokenizer)
        with wrap(model, plan):
            sparse = generate(model, tokenizer)
        for name, (text, rate) in (("dense", dense), ("sparse", sparse)):
            found.setdefault(name, (text, []))[1].append(rate)
    return {name: (text, rates[1:]) for name, (text, rates) in found.items()}


def main() -> None:
    reason = available("cpu")
    print("native CPU kernels:", "ready" if reason is None else f"not available, using torch ({reason})")
    print("loading the embedded SmolLM2-135M-Instruct, fp32, CPU (its first start dequantises it: half a minute) ...")
    model, tokenizer = load(device="cpu", dtype="float32")
    print(f"analyzing: the model writes its own calibration text, then GRIFFIN's core neurons at keep {KEEP} ...")
    plan = analyze(model, tokenizer, method="core", keep=KEEP)
    print(f"\n{plan}\n")
    print(f"generating {NEW_TOKENS} tokens, {ROUNDS} rounds of dense and sparse in turn ...")
    found = race(model, tokenizer, plan)
    quality: dict[str, Any] = dict(plan.quality or {})
    skipped = {"dense": 0.0, "sparse": quality["neuron_sparsity"]}
    base = statistics.median(found["dense"][1])
    print(f"\n{'':22}{'tok/s (median)':>16}{'speed':>8}{'perplexity':>12}{'MLP neurons skipped':>21}")
    for name, (_, rates) in found.items():
        rate = statistics.median(rates)
        label = "dense (transformers)" if name == "dense" else "sparse (coreskip)"
        print(f"{label:22}{rate:16.1f}{rate / base:7.2f}x{quality[name]['ppl']:12.2f}{skipped[name]:20.1%}")
    print(f"\nperplexity is over {quality['tokens']} held-out tokens {quality['text']}; README: figures on real text")
    print(f"\nprompt\n{_wrapped(PROMPT)}")
    for name, (text, _) in found.items():
        print(f"\n{name}\n{_wrapped(text)}")


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 100, initial_indent="  ", subsequent_indent="  ")


if __name__ == "__main__":
    main()
