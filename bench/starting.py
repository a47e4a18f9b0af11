"""How soon a packed model makes its first token, and in how much memory, each time in a fresh process.

    python -m coreskip.bench.starting --rows bench/rows/starting.jsonl
    python -m coreskip.bench.starting --shape llama-3.2-1b --weights int4 --rows bench/rows/starting.jsonl

Packs the embedded model, or random weights of a real shape, in bfloat16, with the embedded model's tokenizer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from coreskip.bench.provenance import provenance, write_rows
from coreskip.bench.workloads import Shape
from coreskip.predictors.checks import PACKINGS
from coreskip.predictors.files import check_file
from coreskip.runtime.load import load
from coreskip.runtime.pack import pack

# What the interpreter and the libraries take by themselves is told from the model's: the libraries' own lazy imports
# are made first, by a model of one layer and by the tokenizer, which takes 45 MB whatever model it is for.
_START = """
import json, resource, sys, time
begin = time.perf_counter()
import torch, transformers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
imported = time.perf_counter()
import coreskip
tiny = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
with coreskip.wrap(LlamaForCausalLM(tiny)) as warm:
    warm.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)
words = AutoTokenizer.from_pretrained(sys.argv[1])
def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["VmRSS"].split()[0]) * 1024
own, ready = resident(), time.perf_counter()
model, tokenizer = coreskip.load(sys.argv[1])
loaded = time.perf_counter()
coreskip.wrap(model)
wrapped = time.perf_counter()
ids = tokenizer("The lighthouse stood at the end of a long spit of rock, and", return_tensors="pt").input_ids
model.generate(ids, max_new_tokens=1, do_sample=False)
first = time.perf_counter()
model.generate(ids, max_new_tokens=64, do_sample=False)
print(json.dumps({
    "import_s": imported - begin, "load_s": loaded - ready, "wrap_s": wrapped - loaded, "first_token_s": first - ready,
    "own_bytes": own, "resident_bytes": resident(),
}))
"""


@click.command(help=__doc__)
@click.option("--rows", "output", required=True, type=click.Path(path_type=Path), help="JSONL file to add to.")
@click.option("--shape", help="Random weights of this shape instead of the embedded model.")
@click.option("--weights", type=click.Choice(PACKINGS), default="as-loaded", show_default=True)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
def main(output: Path, shape: str | None, weights: str, rounds: int) -> None:
    check_file(output)
    row: dict[str, Any] = {"kind": "starting", "model": shape or "embedded", "weights": weights, "rounds": rounds}
    with tempfile.TemporaryDirectory(dir=output.parent) as place:
        folder = Path(place) / "packed"
        row["pack_s"] = round(_packed(folder, shape, weights), 2)
        found = [_started(folder) for _ in range(rounds)]
        row["packed_bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    row |= {key: round(median(each[key] for each in found), 3) for key in found[0]}
    row["of_packed"] = round((row["resident_bytes"] - row["own_bytes"]) / row["packed_bytes"], 3)
    kept = [json.loads(line) for line in output.read_text().splitlines()] if output.is_file() else []
    others = [each for each in kept if (each["model"], each["weights"]) != (row["model"], row["weights"])]
    command = f"python -m coreskip.bench.starting {'' if shape is None else f'--shape {shape} '}--weights {weights}"
    command += f" --rows {output.name} --rounds {rounds}"
    write_rows(output, [*others, {**row, **provenance(command)}])
    click.echo(row)


def _packed(folder: Path, shape: str | None, weights: str) -> float:
    """Packs; the seconds that took."""
    model, tokenizer = load(device="cpu")
    if shape is not None:
        model = Shape(shape).build(torch.bfloat16, torch.device("cpu"))
    begin = time.perf_counter()
    pack(model, tokenizer, folder, weights=weights, progress=False)
    return time.perf_counter() - begin


def _started(folder: Path) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", _START, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(done.stderr.strip().splitlines()[-1])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
