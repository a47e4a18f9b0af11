"""Exact mode against the dense path, prompt by prompt in turn: is every token the same, and how much faster is it?

``python -m coreskip.bench.exact --prompts 200 --tokens 128 --json rows.jsonl`` takes hours on two cores; fewer prompts
take evenly from all workloads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coreskip.bench.rows import commit, device_name, model_name, replace_text
from coreskip.bench.workloads import PROMPTS
from coreskip.predictors.layers import Influence, LayerChoice
from coreskip.predictors.plan import CoreNeurons, LayerPlan, Plan
from coreskip.runtime.load import load
from coreskip.runtime.wrap import runtime_of, unwrap, wrap

NEAR_TIE = 1e-3  # two logits of Hugging Face's own that its rounding may order either way


def cuts(workload: str, count: int) -> list[str]:
    """`count` prompts from a built-in one: it ends, in equal steps, at words of its second half; the whole is last."""
    words = PROMPTS[workload].split(" ")
    first = len(words) // 2
    ends = [round(first + (len(words) - first) * (i + 1) / count) for i in range(count)]
    return [" ".join(words[:end]) for end in ends]


def plan_named(name: str, model: Any) -> Plan:
    """``dense`` (drafts come from the text alone), ``core:KEEP`` (core neurons of the prompt), or layers left out:
    ``every:2``, ``adaptive:0.8``."""
    dense = Plan.dense(model)
    kind, _, share = name.partition(":")
    if kind == "dense":
        return dense
    if kind == "core":
        layers = tuple(LayerPlan(CoreNeurons(0.4, float(share), "griffin")) for _ in dense.layers)
        return Plan(layers, dense.model, {"method": name})
    even = [Influence(0.0, 0.0, 0.0)] * len(dense.layers)
    policies = LayerChoice.parse(name).policies(even)
    return Plan(tuple(LayerPlan(layer=policy) for policy in policies), dense.model, {"method": name})


@dataclass
class Tally:
    """What exact mode did on one workload."""

    prompts: int = 0
    identical: int = 0
    tokens: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    ratios: list[float] = field(default_factory=list)
    dense_tok_s: list[float] = field(default_factory=list)
    exact_tok_s: list[float] = field(default_factory=list)
    differing: list[dict[str, Any]] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="hub id, folder or .gguf; the embedded model without")
    parser.add_argument("--prompts", type=int, default=10, help="in all; a multiple of the workloads")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--plans", default="dense,core:0.8,core:0.05,every:2")
    parser.add_argument("--workloads", default=",".join(PROMPTS))
    parser.add_argument("--json", type=Path, help="write rows to this file")
    options = parser.parse_args()
    rows = [row for dtype in options.dtypes.split(",") for row in measure(dtype, options)]
    if options.json is not None:
        replace_text(options.json, "".join(json.dumps(row) + "\n" for row in rows))


def measure(dtype: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per plan and workload; printed as they come."""
    names = options.workloads.split(",")
    dense, tokenizer = load(options.model, dtype=dtype, device="cpu")
    each = max(1, options.prompts // len(names))
    prompts = {name: [tokenizer(text, return_tensors="pt").input_ids for text in cuts(name, each)] for name in names}
    reference = {}
    if dtype == "float32":  # coarser types tie too often for Hugging Face's kernels and ours to agree
        reference = {name: [generate(dense, ids, options.tokens)[0] for ids in prompts[name]] for name in names}
    wrap(dense, Plan.dense(dense))
    exact, _ = load(options.model, dtype=dtype, device="cpu")
    for plan in options.plans.split(","):
        wrap(exact, plan_named(plan, exact), exact=True)
        for model in (dense, exact):
            generate(model, prompts[names[0]][0], 8)
        for name in names:
            tally, hf = Tally(), {"differing": 0, "near_ties": 0}
            for i, ids in enumerate(prompts[name]):
                expected, dense_s = generate(dense, ids, options.tokens)
                output, exact_s = generate(exact, ids, options.tokens)
                compare(tally, i, ids, expected, output, dense_s, exact_s, runtime_of(exact).exact)
                if reference and not torch.equal(reference[name][i], output):
                    hf["differing"] += 1
                    hf["near_ties"] += near_tie(dense, reference[name][i], output)
            row = about(options, dtype, plan, name) | summary(tally) | ({"hf": hf} if reference else {})
            print(json.dumps(row), flush=True)
            yield row
        unwrap(exact)


def generate(model: Any, ids: Tensor, tokens: int) -> tuple[Tensor, float]:
    """Greedy continuation, whole, and the seconds it took."""
    begin = time.perf_counter()
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None
    )
    return output, time.perf_counter() - begin


def compare(
    tally: Tally, i: int, ids: Tensor, expected: Tensor, output: Tensor, dense_s: float, exact_s: float, exact: Any
) -> None:
    tally.prompts += 1
    tally.identical += torch.equal(expected, output)
    if not torch.equal(expected, output):
        tally.differing.append({"prompt": i, "at": first_difference(expected, output) - ids.shape[1]})
    done = exact.last
    tally.tokens, tally.passes = tally.tokens + done.tokens, tally.passes + done.passes
    tally.drafted += sum(done.drafted.values())
    tally.accepted += sum(done.accepted.values())
    tally.ratios.append(dense_s / exact_s)
    tally.dense_tok_s.append(done.tokens / dense_s)
    tally.exact_tok_s.append(done.tokens / exact_s)


def first_difference(left: Tensor, right: Tensor) -> int:
    return int((left != right)[0].nonzero()[0, 0])


@torch.no_grad()
def near_tie(dense: Any, reference: Tensor, output: Tensor) -> bool:
    """Whether Hugging Face's two best logits lie within `NEAR_TIE` where the texts part."""
    unwrap(dense)
    best = dense(reference[:, : first_difference(reference, output)]).logits[0, -1].topk(2).values
    wrap(dense, Plan.dense(dense))
    return bool(best[0] - best[1] < NEAR_TIE)


def about(options: argparse.Namespace, dtype: str, plan: str, workload: str) -> dict[str, Any]:
    where = {"device": device_name("cpu"), "threads": torch.get_num_threads(), "commit": commit()}
    return {"model": model_name(options.model), "dtype": dtype, "plan": plan, "workload": workload, **where}


def summary(tally: Tally) -> dict[str, Any]:
    return {
        "prompts": tally.prompts,
        "tokens": tally.tokens,
        "identical": tally.identical,
        "differing": tally.differing,
        "acceptance": round(tally.accepted / tally.drafted, 3) if tally.drafted else None,
        "tokens_per_pass": round((tally.tokens - tally.prompts) / tally.passes, 2) if tally.passes else None,
        "dense_tok_s": quantiles(tally.dense_tok_s),
        "exact_tok_s": quantiles(tally.exact_tok_s),
        "speedup": quantiles(tally.ratios),
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = {"p20": ordered[len(ordered) // 5], "p50": statistics.median(ordered), "p80": ordered[len(ordered) * 4 // 5]}
    return {name: round(value, 3) for name, value in at.items()}


if __name__ == "__main__":
    main()
