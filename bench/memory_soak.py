"""Long runs under a cap on memory: texts of changing prompts for some minutes, and how much memory they take.

    python -m coreskip.bench.memory_soak FOLDER --cap 0.25 --minutes 10 --rows bench/rows/memory_soak.jsonl

FOLDER is a packed model; --shape makes one with random weights, as `bench.memory` does. A process in a memory control
group of its own, whose limit is the cap and --beside, makes greedy texts of random prompts until the minutes are over:
the first and the last of 1,000 tokens, those between of 4 to 63. Another makes the same ones without a cap; they are
compared.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
import transformers

from coreskip.bench.memory import BESIDE, cap_in, in_a_group, join, make_shape, warm_up
from coreskip.bench.provenance import model_name, provenance, write_rows
from coreskip.predictors.checks import PACKINGS
from coreskip.predictors.errors import CoreskipError
from coreskip.predictors.files import check_file
from coreskip.runtime.load import load
from coreskip.runtime.packed_folder import WEIGHTS
from coreskip.runtime.wrap import wrap

Row = dict[str, Any]
_LONG, _EACH = 1000, 100  # tokens of the long texts, and after how many of these memory is looked at
_SHORT = 4, 64  # tokens of prompts and of short texts: at least, and less than


class _Gauge(transformers.generation.streamers.BaseStreamer):
    """MB of the process' own memory by tokens of a text."""

    def __init__(self) -> None:
        self.seen, self._tokens = dict[int, float](), -1  # the prompt comes first, as one

    def put(self, value: torch.Tensor) -> None:
        before, self._tokens = self._tokens, self._tokens + (1 if self._tokens < 0 else value.numel())
        if self._tokens // _EACH > before // _EACH and self._tokens > 0:
            self.seen[self._tokens // _EACH * _EACH] = anonymous_mb()

    def end(self) -> None:
        pass


def anonymous_mb() -> float:
    """MB of this process that are no file's pages."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssAnon"))


def _serve(group: str | None, folder: str, cap: int | None, minutes: float, count: int | None) -> None:
    """Prints texts and memory; count: of the texts, in place of the minutes."""
    warm_up(Path(folder))
    join(group)
    model, _ = load(folder, memory=cap)
    vocabulary, generator = model.get_input_embeddings().weight.shape[0], torch.Generator().manual_seed(0)
    texts, errors, memory = list[list[int]](), list[str](), list[dict[int, float]]()
    begin = time.monotonic()
    with wrap(model), torch.no_grad():
        for long in _longs(begin + 60 * minutes, count):
            length, new = (int(n) for n in torch.randint(*_SHORT, (2,), generator=generator))
            ids, gauge = torch.randint(5, vocabulary, (1, length), generator=generator), _Gauge()
            options = {"max_new_tokens": _LONG if long else new, "do_sample": False, "pad_token_id": 0}
            options["min_new_tokens"] = options["max_new_tokens"]
            try:
                made = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=gauge, **options)
                texts.append(made[0, length:].tolist())
            except (CoreskipError, RuntimeError, OSError) as error:
                errors.append(str(error))
                texts.append([])
            if long:
                memory.append(gauge.seen)
    print(json.dumps({"texts": texts, "errors": errors, "memory": memory, "s": time.monotonic() - begin}))


def _longs(end: float, count: int | None) -> Iterator[bool]:
    """Of each text whether it is a long one."""
    yield True
    made = 1
    while made < count - 1 if count is not None else time.monotonic() < end:
        yield False
        made += 1
    yield True


def soak(folder: Path, cap: int, minutes: float, beside: int) -> Row:
    """memory_mb_by_tokens: of the first long text and of the last."""
    about: Row = {"kind": "soak_capped", "model": model_name(str(folder)), "minutes": minutes, "cap": cap}
    about |= {"weight_bytes": (folder / WEIGHTS).stat().st_size, "limit_bytes": cap + beside}
    module = "coreskip.bench.memory_soak"
    found = in_a_group(module, (folder, cap, minutes, None), cap + beside)
    if found is None:
        return about | {"killed": True}
    texts = found["texts"]
    free = in_a_group(module, (folder, None, 0, len(texts)), None)
    assert free is not None
    return about | {
        "texts": len(texts),
        "tokens": sum(map(len, texts)),
        "errors": len(found["errors"]),
        "first_error": (found["errors"] or [None])[0],
        "differing": sum(mine != other for mine, other in zip(texts, free["texts"], strict=True)),
        "s": round(found["s"], 1),
        "memory_mb_by_tokens": [{at: round(mb, 1) for at, mb in seen.items()} for seen in found["memory"]],
        "peak_bytes": found["peak_bytes"],
        "grouped": found["grouped"],
    }


@click.command(help=__doc__)
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--shape", help="Random weights of a real shape.")
@click.option("--weights", type=click.Choice(PACKINGS), default="bfloat16", show_default=True, help="Of the shape.")
@click.option("--work", type=click.Path(path_type=Path), help="Where the shape's files are kept.")
@click.option("--cap", "caps", multiple=True, default=("0.25",), show_default=True)
@click.option("--minutes", default=10.0, show_default=True, help="Under each cap.")
@click.option("--beside", default=BESIDE, show_default=True, help="MB of a group beside the cap.")
@click.option("--rows", type=click.Path(path_type=Path), help="Where the rows go.")
def main(
    folder: Path | None, shape: str | None, weights: str, work: Path | None, caps: tuple[str, ...], minutes: float,
    beside: int, rows: Path | None,
) -> None:  # fmt: skip
    if (folder is None) == (shape is None) or (shape is not None and work is None):
        raise click.UsageError("give the folder of a packed model, or a --shape and where to --work")
    if rows is not None:
        check_file(rows)
    if shape is not None:
        assert work is not None
        folder, _ = make_shape(shape, weights, work)
    assert folder is not None
    found, about = list[Row](), provenance("python -m coreskip.bench.memory_soak " + " ".join(sys.argv[1:]))
    for cap in caps:
        row = soak(folder, cap_in(cap, (folder / WEIGHTS).stat().st_size), minutes, beside << 20)
        found.append(row | about)
        click.echo(json.dumps(row))
        if rows is not None:
            write_rows(rows, found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _serve(*map(json.loads, sys.argv[2:]))
    else:
        main()
