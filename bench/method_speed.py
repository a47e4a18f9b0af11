"""How fast the plans of `coreskip.bench.method_quality` decode: adds tokens per second to its rows.

    python -m coreskip.bench.method_speed bench/rows/token_choice.jsonl --plans FOLDER

Each plan takes turns with the same model in dense fp32, and the row gets both: what else the machine does slows them
alike. Matrices are read where they lie (CORESKIP_NARROW=0): that the embedded model's numbers fit into 4 bits would
hide what leaving neurons out does for a model whose numbers do not. Rows that have a speed are left as they are, so
that a run that was stopped goes on.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import click
from torch import Tensor

from coreskip.bench.clock import greedy
from coreskip.bench.machine import matrices_in_place
from coreskip.bench.method_quality import plan_name
from coreskip.bench.provenance import provenance, write_rows
from coreskip.bench.workloads import prompts
from coreskip.predictors.plan import Plan
from coreskip.runtime.cost import bytes_per_token
from coreskip.runtime.load import load
from coreskip.runtime.wrap import wrap

_TOKENS = 32  # generated at a time
_ROUNDS = 5


@click.command()
@click.argument("rows", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--plans", "folder", required=True, type=click.Path(path_type=Path), help="What quality wrote.")
def main(rows: Path, folder: Path) -> None:
    """Time the plans of ROWS."""
    click.get_current_context().with_resource(matrices_in_place())
    lines = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    about = provenance(f"python -m coreskip.bench.method_speed bench/rows/{rows.name} --plans plans")
    (model, tokenizer), (reference, _) = (load(device="cpu", dtype="float32") for _ in range(2))
    ids = tokenizer(prompts()[0].text, return_tensors="pt").input_ids
    wrap(reference, Plan.dense(reference))
    for index, row in enumerate(lines):
        if "tok_s" in row:
            continue
        plan = Plan.load(folder / plan_name(index))
        row["megabytes"] = round(bytes_per_token(model, plan) / 1e6, 2)
        with wrap(model, plan):
            for each in (reference, model):  # packs, and proves the native step
                speed(each, ids, 8)
            pairs = [(speed(reference, ids, _TOKENS), speed(model, ids, _TOKENS)) for _ in range(_ROUNDS)]
        dense, found = (sorted(values) for values in zip(*pairs, strict=True))
        row["tok_s"] = {"p20": found[1], "p50": median(found), "p80": found[-2]}
        row["dense_tok_s"] = median(dense)
        row["speedup"] = median(b / a for a, b in pairs)
        row["timed"] = {name: about[name] for name in ("device", "threads", "commit", "time", "command")}
        write_rows(rows, lines)
        click.echo(f"{row['name']} {row['keep']:g}: {row['tok_s']['p50']:.1f} tok/s, {row['speedup']:.2f} x dense fp32")


def speed(model: Any, ids: Tensor, tokens: int) -> float:
    """Tokens per second of greedy ``generate``: `tokens` after the first one; ids ``[1, length]``."""
    return greedy(model, ids, 1 + tokens)[1].tok_s


if __name__ == "__main__":
    main()
