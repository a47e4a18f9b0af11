"""What rounding a model's weights costs on a text: 8 bits, 4 bits plainly and with compensation, and mixed widths.

    python -m coreskip.bench.finetune --text TEXT -o FOLDER
    python -m coreskip.bench.rounding_quality FOLDER --text TEXT --rows bench/rows/rounding.jsonl --speed 5

The first half of TEXT calibrates, windows of the second half are scored; each window's second half counts. Scored is
what runs: the packed model's own prefill, then decode steps in the kernels, with inputs in 8 bits. `--speed` times all
kinds, one after the other and in that order again: they share what else the machine does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm.auto import tqdm

from coreskip.bench.method_quality import undo_wikitext
from coreskip.bench.provenance import model_name, provenance, write_rows
from coreskip.kernels.ops import MAX_ROWS
from coreskip.predictors.calibration import TokenText, read_text, tokenize
from coreskip.predictors.files import check_file
from coreskip.predictors.observe import inference
from coreskip.runtime.load import load
from coreskip.runtime.quality import WINDOW, Tally, decode_logits
from coreskip.runtime.rounded_model import decoding_rounded
from coreskip.runtime.rounding import TOKENS, Rounded, compensate, plainly, windows_of
from coreskip.runtime.sensitivity import Mixtures, costs_of_widths

SHARES = (0.0, 0.62, 0.7, 0.8)  # of the bytes of 8 bits, for mixed widths; 0: the least there are
_PROMPT, _NEW = 32, 64  # tokens that a timing decodes, and those before


def kinds(
    model: Any, calibration: TokenText, tokens: int, shares: Sequence[float]
) -> Iterator[tuple[str, list[Rounded], float]]:
    """What is compared: its name, the rounded linears, and the seconds that these took."""
    start = time.perf_counter()
    for name, found in (
        ("int8", plainly(model, widths="int8")),
        ("int4, plain", plainly(model)),
        ("int4, compensated", compensate(model, calibration, tokens=tokens)),
    ):
        start = time.perf_counter()
        yield name, list(found), time.perf_counter() - start
    if not shares:
        return
    by_name: dict[str, dict[str, Rounded]] = {}

    def keep(found: dict[str, Rounded]) -> None:
        by_name[next(iter(found.values())).name] = found

    start = time.perf_counter()
    costs = costs_of_widths(model, windows_of(model, calibration, tokens, WINDOW), keep=keep)
    mixtures, seconds = Mixtures.of(model, costs), time.perf_counter() - start
    for share in shares:
        share = max(share, mixtures.least)
        widths = mixtures.within(share)
        yield f"mixed, {share:.3g} of int8's bytes", [by_name[name][width] for name, width in widths.items()], seconds


class Scored:
    """Windows, and what the unrounded model says of them."""

    def __init__(self, model: Any, text: TokenText, windows: int) -> None:
        self._model, self._rows = model, text.windows(WINDOW, windows)
        self.about = {"windows": len(self._rows), "window": WINDOW, "text": text.source}
        # half precision: a KL divergence from them is off by some 1e-5
        self._dense = [self._log_p(ids, ids.shape[1]).half() for ids in self._rows.split(1)]

    def _log_p(self, ids: Tensor, at_once: int) -> Tensor:
        with inference(self._model):
            return decode_logits(self._model, ids, at_once).log_softmax(-1)

    def figures(self, found: Sequence[Rounded]) -> dict[str, Any]:
        """`evaluate_all`'s figures of rounded linears."""
        tally = Tally()
        with decoding_rounded(self._model, found):
            for ids, dense in zip(tqdm(self._rows.split(1), desc="scoring", leave=False), self._dense, strict=True):
                tally.add(dense.float(), self._log_p(ids, MAX_ROWS), ids[0, ids.shape[1] // 2 :], 0.0)
        return {"keep": 1.0, **tally.result(), **self.about}

    def seconds(self, found: Sequence[Rounded]) -> float:
        """Of a token that is decoded greedily."""
        ids = self._rows[:1, :_PROMPT]
        with inference(self._model), decoding_rounded(self._model, found):
            self._generate(ids, 8)  # the first steps are compared, and prepare
            one, many = self._generate(ids, 1), self._generate(ids, 1 + _NEW)
        return (many - one) / _NEW

    def _generate(self, ids: Tensor, new: int) -> float:
        start = time.perf_counter()
        options = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        self._model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return time.perf_counter() - start


@click.command(help=__doc__)
@click.argument("model", required=False)
@click.option("--text", required=True, type=click.Path(path_type=Path), help="First half calibrates, second is scored.")
@click.option("--rows", "output", required=True, type=click.Path(path_type=Path), help="JSONL file to write.")
@click.option("--windows", default=24, show_default=True, help="Windows of 512 tokens to score.")
@click.option("--tokens", default=TOKENS, show_default=True, help="Calibration tokens.")
@click.option("--share", "shares", multiple=True, default=SHARES, show_default=True, help="Of mixed widths; 2: none.")
@click.option("--speed", "rounds", default=0, show_default=True, help="Time every kind so many times, in turns.")
def main(
    model: str | None, text: Path, output: Path, windows: int, tokens: int, shares: tuple[float, ...], rounds: int
) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    check_file(output)
    name = model_name(model)
    command = f"python -m coreskip.bench.rounding_quality {'' if model is None else name + ' '}--text {text.name}"
    command += f" --rows {output.name} --windows {windows} --tokens {tokens} --speed {rounds}"
    about = provenance(command + "".join(f" --share {share:g}" for share in shares))
    loaded, tokenizer = load(model, device="cpu", dtype="float32")
    calibration, scored = tokenize(tokenizer, undo_wikitext(read_text(text)), text.name).split(0.5, 0.5)
    dense = Scored(loaded, scored, windows)
    rows: list[dict[str, Any]] = []
    all_found: list[list[Rounded]] = []
    for kind, found, seconds in kinds(loaded, calibration, tokens, [share for share in shares if share <= 1]):
        row = {"name": kind, "model": name, "dtype": "float32", "seconds": round(seconds, 1)}
        row |= {"calibration_tokens": tokens, **dense.figures(found)}
        row["megabytes"] = round(sum(each.packed.nbytes for each in found) / 1e6, 2)
        rows.append({**row, **about})
        all_found.append(found)
        write_rows(output, rows)  # after each: an interrupted run keeps what it has
        click.echo(line(row))
    if rounds:
        times = [[dense.seconds(found) for found in all_found] for _ in range(rounds)]
        for row, of_kind in zip(rows, zip(*times, strict=True), strict=True):
            speeds = torch.tensor([1 / seconds for seconds in of_kind], dtype=torch.float64)
            row["tok_s"] = {f"p{p}": round(float(speeds.quantile(p / 100)), 1) for p in (20, 50, 80)}
            click.echo(f"{row['name']:28} {float(speeds.median()):.0f} tok/s")
        write_rows(output, rows)


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    return (
        f"{row['name']:28} ppl {row['sparse']['ppl']:7.3f} ({row['ppl_increase']:+.2%})  KL {row['kl']:.4f}  "
        f"top-1 {row['top1_agreement']:.1%}  {row['megabytes']:.0f} MB per token  {row['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
