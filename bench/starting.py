"""How soon a packed model makes its first token, and in how much memory, each time in a fresh process.

coreskip pack [MODEL] -o FOLDER
python -m coreskip.bench.starting FOLDER --rows bench/rows/starting.jsonl
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import click

from coreskip.bench.provenance import provenance, write_rows
from coreskip.predictors.files import check_file

# What the interpreter and the libraries take by themselves is told from the model's: the libraries' own lazy imports
# are made first, by a model of one layer.
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
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--rows", "output", required=True, type=click.Path(path_type=Path), help="JSONL file to write.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--name", help="Of the model, in the row; by default the folder's.")
def main(folder: Path, output: Path, rounds: int, name: str | None) -> None:
    check_file(output)
    found = [_started(folder) for _ in range(rounds)]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    row: dict[str, Any] = {"kind": "starting", "model": name or folder.name, "rounds": rounds, "packed_bytes": size}
    row |= {key: round(median(each[key] for each in found), 3) for key in found[0]}
    row["of_packed"] = round((row["resident_bytes"] - row["own_bytes"]) / size, 3)
    command = f"python -m coreskip.bench.starting {folder.name} --rows {output.name} --rounds {rounds}"
    kept = [json.loads(line) for line in output.read_text().splitlines()] if output.is_file() else []
    rows = [each for each in kept if each["model"] != row["model"]]
    write_rows(output, [*rows, {**row, **provenance(command)}])
    click.echo(row)


def _started(folder: Path) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", _START, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(done.stderr.strip().splitlines()[-1])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
