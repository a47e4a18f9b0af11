"""`make demo`: the embedded model in plain transformers, under the fastest plan found within +1 % of perplexity, and
under a plan that leaves neurons out, side by side: speed, first token, perplexity, text."""

from __future__ import annotations

import statistics
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from coreskip.bench.clock import Generation, greedy
from coreskip.bench.settings import scored_text
from coreskip.kernels.ops import available
from coreskip.predictors.calibration import TokenText, text_of
from coreskip.predictors.plan import Plan
from coreskip.runtime.analyze import analyze
from coreskip.runtime.load import load
from coreskip.runtime.quality import evaluate_all
from coreskip.runtime.wrap import wrap

BUDGET = "ppl+1%"
KEEP = 0.6
NEW_TOKENS = 48
ROUNDS = 3
TOKENS = 4096  # observed, a quarter of what `analyze` does: 16,384 of them take two minutes on two cores
WINDOWS = 8  # of 512 tokens, per measurement of a plan
CHARACTERS = 100_000  # of text: enough tokens for the search, and for windows that it has not seen
PROMPT = (
    "The lighthouse stood at the end of a long spit of rock, and for sixty years the same family had kept its lamp. "
    "Every evening at dusk the keeper climbed the hundred and twelve steps, trimmed the wick, polished the lens and "
    "wrote the weather in a book. In winter the waves broke over the door, and nobody came for weeks. The children "
    "learned to read from old newspapers and to tell a schooner from a brig by its lights. One night in the autumn of"
)


@dataclass
class Entry:
    """One way of running the model: the plan, None for plain transformers, and what was measured."""

    name: str
    model: Any
    plan: Plan | None
    ppl: float | None
    skipped: float
    generations: list[Generation] = field(default_factory=list)

    def applied(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.plan is None else wrap(self.model, self.plan)

    def median(self, figure: str) -> float:
        return float(statistics.median(getattr(generation, figure) for generation in self.generations))


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Say what is done, and afterwards how long it took."""
    print(f"{what} ...", flush=True)
    start = time.perf_counter()
    yield
    print(f"  done in {time.perf_counter() - start:.0f} s", flush=True)


def plans_of(model: Any, tokenizer: Any, text: TokenText) -> tuple[Plan, Plan]:
    """The fastest plan found within `BUDGET`, and one that leaves neurons out with its weights in the same format."""
    with stage(f"searching the fastest plan within {BUDGET}"):
        fast = analyze(model, tokenizer, budget=BUDGET, text=text, fast=True, tokens=TOKENS, windows=WINDOWS)
    with stage(f"choosing neurons token by token, keep {KEEP:g}"):
        sparse = analyze(model, tokenizer, method="sketch", keep=KEEP, text=text, tokens=TOKENS // 2, windows=2)
    return fast, replace(sparse, weights=fast.weights)


def race(entries: Sequence[Entry], ids: Any) -> None:
    """Every entry in turn, round after round, after one uncounted round: a busy machine slows all of them alike."""
    for _ in range(ROUNDS + 1):
        for entry in entries:
            with entry.applied():
                greedy(entry.model, ids, 2)  # packs what the plan needs
                entry.generations.append(greedy(entry.model, ids, NEW_TOKENS)[1])
    for entry in entries:
        del entry.generations[0]


def main() -> None:
    began = time.perf_counter()
    reason = available("cpu")
    print("native CPU kernels:", "ready" if reason is None else f"not available, using torch ({reason})")
    with stage("loading the embedded SmolLM2-135M-Instruct (its first start dequantises it: half a minute)"):
        model, tokenizer = load(device="cpu", dtype="float32")
        half, _ = load(device="cpu", dtype="bfloat16")
    content, source = scored_text(None)
    text = replace(text_of(tokenizer, content[:CHARACTERS]), source=source)
    seen, unseen = text.split(0.75, 0.25)
    fast, sparse = plans_of(model, tokenizer, seen)
    with stage("measuring perplexity on text that neither plan has seen"):
        of_fast, of_sparse = evaluate_all(model, [fast, sparse], unseen, windows=WINDOWS)
    entries = [
        Entry("transformers, float32", model, None, of_fast["dense"]["ppl"], 0.0),
        Entry("transformers, bfloat16", half, None, None, 0.0),
        Entry(f"fastest within {BUDGET}", model, fast, of_fast["sparse"]["ppl"], of_fast["neuron_sparsity"]),
        Entry("neurons left out", model, sparse, of_sparse["sparse"]["ppl"], of_sparse["neuron_sparsity"]),
    ]
    with stage(f"generating {NEW_TOKENS} tokens, {ROUNDS} rounds in turn"):
        race(entries, tokenizer(PROMPT, return_tensors="pt").input_ids)
    print(f"\n{_summary(fast)}\n")
    print(_table(entries))
    print(f"\nperplexity over {of_fast['tokens']} tokens of {source}; greedy text after: ... {PROMPT[-52:]}")
    for entry in entries:
        print(f"\n{entry.name}\n{_wrapped(tokenizer.decode(torch.tensor(entry.generations[0].tokens)))}")
    print(f"\n{time.perf_counter() - began:.0f} s in all")


def _summary(plan: Plan) -> str:
    weights = f"weights in {plan.weights}" if plan.weights else "weights as they were loaded"
    return f"the search chose: {weights}, {1 - plan.keep:.0%} of the MLP neurons left out"


def _table(entries: Sequence[Entry]) -> str:
    base = max(entry.median("tok_s") for entry in entries if entry.plan is None)
    dense = entries[0].ppl
    lines = [f"{'':26}{'tok/s':>8}{'speed':>8}{'first token':>13}{'perplexity':>20}{'neurons left out':>18}"]
    for entry in entries:
        rate, first = entry.median("tok_s"), 1e3 * entry.median("ttft")
        cost = "" if entry.ppl is None or dense is None else f"{entry.ppl:.2f} ({100 * (entry.ppl / dense - 1):+.1f} %)"
        lines.append(f"{entry.name:26}{rate:8.1f}{rate / base:7.2f}x{first:10.0f} ms{cost:>20}{entry.skipped:18.0%}")
    return "\n".join(lines)


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 100, initial_indent="  ", subsequent_indent="  ")


if __name__ == "__main__":
    main()
