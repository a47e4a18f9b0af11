"""Exact mode against the dense path: is every token the same, and how much faster is it?

``python -m coreskip.bench.exactness identity --prompts 200`` compares texts and times nothing. The dense path's text
is made once per dtype, whatever the number of plans, and is also held against Hugging Face's own logits. It takes hours
on two cores; fewer prompts take evenly from all workloads, and rows are written as they come.
``python -m coreskip.bench.exactness speed --repeats 3`` times both paths in turn, on few prompts.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from coreskip.bench.clock import greedy
from coreskip.bench.provenance import commit, device_name, model_name
from coreskip.bench.workloads import PROMPTS
from coreskip.predictors.files import check_file
from coreskip.predictors.layer_selection import LayerSelection
from coreskip.predictors.layers import Influence, layer_policies
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import CoreNeurons
from coreskip.runtime.load import load
from coreskip.runtime.wrap import runtime_of, wrap

NEAR_TIE = 1e-3  # between logits that rounding in float32 may order either way


def cuts(workload: str, count: int) -> list[str]:
    """`count` prompts from a built-in one: it ends, in equal steps, at words of its second half; the whole is last."""
    words = PROMPTS[workload].split(" ")
    first = len(words) // 2
    ends = [round(first + (len(words) - first) * (i + 1) / count) for i in range(count)]
    return [" ".join(words[:end]) for end in ends]


def plan_named(name: str, model: Any) -> Plan:
    """``dense`` (drafts come from the text alone), ``core:KEEP`` (core neurons of the prompt), or layers left out,
    ``every:2``; each may draft with coarser weights: ``dense+int4``, ``every:2+int8``."""
    name, _, weights = name.partition("+")
    dense = Plan.dense(model)
    kind, _, share = name.partition(":")
    if kind == "core":
        layers = tuple(LayerPlan(CoreNeurons(0.4, float(share), "griffin")) for _ in dense.layers)
    elif kind == "dense":
        layers = dense.layers
    else:
        even = [Influence(0.0, 0.0, 0.0)] * len(dense.layers)
        layers = tuple(LayerPlan(layer=policy) for policy in layer_policies(LayerSelection.parse(name), even))
    return Plan(layers, dense.model, {"method": name}, weights=weights or None)


@dataclass(frozen=True)
class Options:
    """What `identity` and `speed` are asked for; the command line below says what each option means."""

    kind: str
    model: str | None
    prompts: int
    tokens: int
    repeats: int
    dtypes: str
    plans: str
    workloads: str
    #: of the source before the work: it may move on meanwhile
    commit: str | None


@click.command(help=__doc__)
@click.argument("kind", type=click.Choice(["identity", "speed"]))
@click.argument("model", required=False)
@click.option("--prompts", type=click.IntRange(1), default=5, show_default=True, help="In all, over the workloads.")
@click.option("--tokens", type=click.IntRange(1), default=128, show_default=True, help="Generated after each prompt.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Of each prompt, by `speed`.")
@click.option("--dtypes", default="float32,bfloat16", show_default=True)
@click.option("--plans", default="dense+int4", show_default=True, help="That draft: dense+int4, core:0.5, every:2, ...")
@click.option("--workloads", default=",".join(PROMPTS), show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Append the rows to this file.")
def main(output: Path | None, **asked: Any) -> None:
    if output is not None:
        check_file(output)
    options = Options(**asked, commit=commit())
    measure = {"identity": identity, "speed": speed}[options.kind]
    for dtype in options.dtypes.split(","):
        for row in measure(dtype, options):
            click.echo(json.dumps(row))
            if output is not None:
                with output.open("a", encoding="utf-8") as file:  # what an interrupted run has found stays
                    file.write(json.dumps(row) + "\n")


def prompts_of(tokenizer: Any, options: Options) -> dict[str, list[Tensor]]:
    """int64 ``[1, length]`` each, by workload."""
    names = options.workloads.split(",")
    each = max(1, options.prompts // len(names))
    return {name: [tokenizer(text, return_tensors="pt").input_ids for text in cuts(name, each)] for name in names}


# --- identity -------------------------------------------------------------------------------------------------------


def identity(dtype: str, options: Options) -> Iterator[dict[str, Any]]:
    """A row per workload for the dense path against Hugging Face, then one per plan and workload."""
    model, tokenizer = load(options.model, dtype=dtype, device="cpu")
    prompts = prompts_of(tokenizer, options)
    with wrap(model, Plan.dense(model)):
        dense = {name: texts(f"{dtype} dense {name}", model, ids, options.tokens) for name, ids in prompts.items()}
    for name, ids in prompts.items():
        yield about(options, dtype, "hf", name) | against_hf(model, ids, dense[name])
    for plan in options.plans.split(","):
        with wrap(model, plan_named(plan, model), exact=True):
            for name, ids in prompts.items():
                tally = Tally()
                made = texts(f"{dtype} {plan} {name}", model, ids, options.tokens, tally)
                yield about(options, dtype, plan, name) | compared(dense[name], made, ids) | tally.summary()


def texts(label: str, model: Any, prompts: Sequence[Tensor], tokens: int, tally: Tally | None = None) -> list[Tensor]:
    """The greedy continuation of each prompt, whole."""
    made = []
    for i, ids in enumerate(prompts, 1):
        made.append(greedy(model, ids, tokens)[0])
        if tally is not None:
            tally.add(runtime_of(model).exact)
        progress(f"{label}: {i} of {len(prompts)}")
    return made


def progress(text: str) -> None:
    print(f"\r{text:<60}", end="", file=sys.stderr, flush=True)


def compared(expected: Sequence[Tensor], made: Sequence[Tensor], prompts: Sequence[Tensor]) -> dict[str, Any]:
    """How many texts are the same, and where the others part, counted in generated tokens."""
    differing = [
        {"prompt": i, "at": first_difference(left, right) - ids.shape[1]}
        for i, (left, right, ids) in enumerate(zip(expected, made, prompts, strict=True))
        if not torch.equal(left, right)
    ]
    return {"prompts": len(made), "identical": len(made) - len(differing), "differing": differing}


def against_hf(model: Any, prompts: Sequence[Tensor], made: Sequence[Tensor]) -> dict[str, Any]:
    """Whether Hugging Face's greedy choice is the text's own token at every position, which is one pass over a finished
    text: as long as it is, greedy search goes the same way.

    In float32 every text should be identical. In coarser types it need not be: Hugging Face rounds between any two
    operations, our kernels where they write, and bfloat16 logits from 16 on are multiples of 1/8: rounding often
    decides which is the greatest. `agreement` is the share of generated positions where the choice is the text's token.
    Where it is not, `largest_gap` is the most that the text's token lacks to the greatest logit (None: no such
    position), `near_ties` counts where it lacks less than `NEAR_TIE`, and `differing` has the first place of each text.
    """
    places = [places_off(model, ids, text) for ids, text in zip(prompts, made, strict=True)]
    gaps = [place["gap"] for of_text in places for place in of_text]
    generated = sum(text.shape[1] - ids.shape[1] for ids, text in zip(prompts, made, strict=True))
    differing = [{"prompt": i, **of_text[0]} for i, of_text in enumerate(places) if of_text]
    return {
        "prompts": len(made),
        "identical": len(made) - len(differing),
        "differing": differing,
        "agreement": round(1 - len(gaps) / generated, 5),
        "largest_gap": max(gaps, default=None),
        "near_ties": sum(gap < NEAR_TIE for gap in gaps),
    }


@torch.no_grad()
def places_off(model: Any, ids: Tensor, text: Tensor) -> list[dict[str, Any]]:
    """Generated tokens (counted from 0) of `text` ``[1, length]`` that are not the likeliest by the model's own
    modules, and by how much the likeliest one's logit is greater there."""
    past = ids.shape[1]
    logits = model(text[:, :-1], logits_to_keep=text.shape[1] - past).logits[0].float()
    gaps = logits.max(-1).values - logits.gather(1, text[0, past:, None])[:, 0]
    off = (logits.argmax(-1) != text[0, past:]).nonzero().flatten().tolist()
    return [{"at": at, "gap": float(gaps[at])} for at in off]


# --- speed ----------------------------------------------------------------------------------------------------------


def speed(dtype: str, options: Options) -> Iterator[dict[str, Any]]:
    """One row per plan and workload."""
    dense, tokenizer = load(options.model, dtype=dtype, device="cpu")
    exact, _ = load(options.model, dtype=dtype, device="cpu")
    prompts = prompts_of(tokenizer, options)
    wrap(dense, Plan.dense(dense))
    for plan in options.plans.split(","):
        with wrap(exact, plan_named(plan, exact), exact=True):
            for model in (dense, exact):
                greedy(model, next(iter(prompts.values()))[0], 16)
            for name, ids in prompts.items():
                yield about(options, dtype, plan, name) | timed(f"{dtype} {plan} {name}", dense, exact, ids, options)


def timed(label: str, dense: Any, exact: Any, prompts: list[Tensor], options: Options) -> dict[str, Any]:
    """Both paths in turn. Speeds count the tokens after the first, in the time after it; `end_to_end` is the speed-up
    of generations with their prefill, which is the same pass in both."""
    tally, made = Tally(), list[tuple[Tensor, Tensor]]()
    speeds: dict[str, list[float]] = {"dense": [], "exact": [], "ratio": [], "end_to_end": []}
    for i, ids in enumerate(prompts * options.repeats, 1):
        (left, before), (right, after) = (greedy(model, ids, options.tokens) for model in (dense, exact))
        tally.add(runtime_of(exact).exact)
        made.append((left, right))
        speeds["dense"].append(before.tok_s)
        speeds["exact"].append(after.tok_s)
        speeds["ratio"].append(after.tok_s / before.tok_s)
        speeds["end_to_end"].append((before.ttft + sum(before.gaps)) / (after.ttft + sum(after.gaps)))
        progress(f"{label}: {i} of {len(prompts) * options.repeats}")
    return {
        **compared([left for left, _ in made], [right for _, right in made], prompts * options.repeats),
        **tally.summary(),
        "repeats": options.repeats,
        "dense_tok_s": quantiles(speeds["dense"]),
        "exact_tok_s": quantiles(speeds["exact"]),
        "speedup": quantiles(speeds["ratio"]),
        "end_to_end_speedup": quantiles(speeds["end_to_end"]),
    }


# --- both -----------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What exact mode did on one workload."""

    generations: int = 0
    tokens: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    def add(self, exact: Any) -> None:
        done = exact.last
        self.generations += 1
        self.tokens, self.passes = self.tokens + done.tokens, self.passes + done.passes
        self.drafted += sum(done.drafted.values())
        self.accepted += sum(done.accepted.values())

    def summary(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "acceptance": round(self.accepted / self.drafted, 3) if self.drafted else None,
            "tokens_per_pass": round((self.tokens - self.generations) / self.passes, 2) if self.passes else None,
        }


def first_difference(left: Tensor, right: Tensor) -> int:
    return int((left != right)[0].nonzero()[0, 0])


def about(options: Options, dtype: str, plan: str, workload: str) -> dict[str, Any]:
    where = {"device": device_name("cpu"), "threads": torch.get_num_threads(), "commit": options.commit}
    what = {"model": model_name(options.model), "dtype": dtype, "plan": plan, "workload": workload}
    command = (
        f"python -m coreskip.bench.exactness {options.kind} --prompts {options.prompts} --tokens {options.tokens} "
        f"--dtypes {dtype} --plans {options.plans} --workloads {options.workloads}"
    )
    if options.kind == "speed":
        command += f" --repeats {options.repeats}"
    return {"kind": options.kind, **what, **where, "command": command}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = {"p20": ordered[len(ordered) // 5], "p50": statistics.median(ordered), "p80": ordered[len(ordered) * 4 // 5]}
    return {name: round(value, 3) for name, value in at.items()}


if __name__ == "__main__":
    main()
