"""Long contexts and long runs: decode speed after a long prompt, against Hugging Face, and memory over many tokens.

``python -m coreskip.bench.endurance --rows bench/rows/endurance.jsonl``
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import click
import psutil

from coreskip.bench.clock import Generation, greedy
from coreskip.bench.provenance import provenance, write_rows
from coreskip.bench.settings import scored_text
from coreskip.bench.workloads import prompts
from coreskip.predictors.plan import Plan
from coreskip.runtime.load import load
from coreskip.runtime.wrap import wrap

Row = dict[str, Any]
DTYPES = ("float32", "bfloat16")


@click.command()
@click.option("--rows", "output", required=True, type=click.Path(path_type=Path), help="JSONL file to write.")
@click.option("--context", default=4096, show_default=True, help="Tokens of the long prompt.")
@click.option("--tokens", default=48, show_default=True, help="Generated after it.")
@click.option("--rounds", default=3, show_default=True, help="Of both paths in turn.")
@click.option(
    "--run", "total", default=10_000, type=click.IntRange(1), show_default=True, help="Tokens of the long run."
)
@click.option(
    "--each", default=1_000, type=click.IntRange(1), show_default=True, help="Tokens of each of its generations."
)
def main(output: Path, context: int, tokens: int, rounds: int, total: int, each: int) -> None:
    """Measure the embedded model."""
    command = (
        f"python -m coreskip.bench.endurance --rows bench/rows/{output.name} --context {context} --tokens {tokens}"
    )
    about = provenance(f"{command} --rounds {rounds} --run {total} --each {each}")  # the commit may move on meanwhile
    about["model"] = "embedded"
    rows: list[Row] = []
    for row in _measured(context, tokens, rounds, total, each):
        rows.append({**row, **about})
        write_rows(output, rows)
        click.echo(row)


def _measured(context: int, tokens: int, rounds: int, total: int, each: int) -> Iterator[Row]:
    yield memory(total, each)  # first: what other models leave free would hide a leak
    for dtype in DTYPES:
        yield long_context(dtype, context, tokens, rounds)


def memory(total: int, each: int) -> Row:
    """Resident memory of this process after every generation of a run of `total` tokens, dense in int4. Generations are
    all `each` long, so that the KV cache's share is the same."""
    model, tokenizer = load(device="cpu", dtype="float32")
    speeds, resident = list[float](), dict[int, float]()
    with wrap(model, Plan.dense(model, "int4")):
        for made, prompt in enumerate(islice(cycle(prompts()), -(-total // each)), 1):
            ids = tokenizer(prompt.text, return_tensors="pt").input_ids
            speeds.append(greedy(model, ids, each)[1].tok_s)
            resident[made * each] = round(psutil.Process().memory_info().rss / 1e6, 1)
    return {"kind": "memory", "dtype": "int4", "tok_s": round(median(speeds), 1), "rss_mb_by_tokens": resident}


def long_context(dtype: str, context: int, tokens: int, rounds: int) -> Row:
    """Milliseconds per token after a prompt of `context` tokens, Hugging Face eager and the dense plan in turn: medians
    over rounds. The first `same_tokens` of the `tokens` generated are the same."""
    (eager, tokenizer), (dense, _) = (load(device="cpu", dtype=dtype) for _ in range(2))
    text, name = scored_text(None)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :context]
    with wrap(dense, Plan.dense(dense)):
        for model in (eager, dense):
            greedy(model, ids[:, :64], 8)  # packs, and proves the native step
        found = [(greedy(eager, ids, tokens), greedy(dense, ids, tokens)) for _ in range(rounds)]
    (left, _), (right, _) = found[0]
    differing = (left != right)[0, ids.shape[1] :].nonzero().flatten().tolist()
    pairs = [(_ms(before), _ms(after)) for (_, before), (_, after) in found]
    return {
        "kind": "context",
        "dtype": dtype,
        "text": name,
        "prompt_tokens": ids.shape[1],
        "tokens": tokens,
        "rounds": rounds,
        "hf_ms_per_token": median(before for before, _ in pairs),
        "dense_ms_per_token": median(after for _, after in pairs),
        "speedup": round(median(before / after for before, after in pairs), 3),
        "same_tokens": min(differing, default=tokens),
    }


def _ms(generation: Generation) -> float:
    """The mean: tokens made by one native call arrive together."""
    return round(1e3 / generation.tok_s, 3)


if __name__ == "__main__":
    main()
