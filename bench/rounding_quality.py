"""What rounding a model's weights costs on a text: 8 bits, 4 bits plainly and with compensation, and mixed widths.

    python -m coreskip.bench.finetune --text TEXT -o FOLDER
    python -m coreskip.bench.rounding_quality FOLDER --text TEXT --rows bench/rows/rounding.jsonl

The first half of TEXT calibrates, windows of the second half are scored; each window's second half counts. The rounded
numbers are put into the model in float32: inputs of the products are not rounded to 8 bits, as the kernels round them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from torch import Tensor
from tqdm.auto import tqdm

from coreskip.bench.method_quality import undo_wikitext
from coreskip.bench.provenance import model_name, provenance, write_rows
from coreskip.predictors.calibration import TokenText, read_text, tokenize
from coreskip.predictors.files import check_file
from coreskip.predictors.observe import inference
from coreskip.runtime.load import load
from coreskip.runtime.quality import WINDOW, Tally, decode_logits
from coreskip.runtime.rounding import TOKENS, Rounded, compensate, plainly, replaced
from coreskip.runtime.sensitivity import mixed

BUDGETS = (0.75, 0.85)  # of the bytes of 8 bits, for mixed widths


def kinds(
    model: Any, calibration: TokenText, tokens: int, budgets: Sequence[float]
) -> list[tuple[str, Callable[[], list[Rounded]]]]:
    """What is compared, by its name; each is made when it is called."""

    def within(budget: float) -> list[Rounded]:
        widths = mixed(model, calibration, budget=budget, tokens=tokens)
        return list(compensate(model, calibration, widths=widths, tokens=tokens))

    return [
        ("int8", lambda: list(plainly(model, widths="int8"))),
        ("int4, plain", lambda: list(plainly(model))),
        ("int4, compensated", lambda: list(compensate(model, calibration, tokens=tokens))),
        *((f"mixed, {budget:g} of int8's bytes", partial(within, budget)) for budget in budgets),
    ]


class Scored:
    """Windows, and what the unrounded model says of them."""

    def __init__(self, model: Any, text: TokenText, windows: int) -> None:
        self._model, self._rows = model, text.windows(WINDOW, windows)
        self.about = {"windows": len(self._rows), "window": WINDOW, "text": text.source}
        # half precision: a KL divergence from them is off by some 1e-5
        self._dense = [self._log_p(ids).half() for ids in self._rows.split(1)]

    def _log_p(self, ids: Tensor) -> Tensor:
        with inference(self._model):
            return decode_logits(self._model, ids, ids.shape[1]).log_softmax(-1)

    def figures(self, found: Sequence[Rounded]) -> dict[str, Any]:
        """`evaluate_all`'s figures of rounded linears."""
        tally = Tally()
        with replaced(found):
            for ids, dense in zip(tqdm(self._rows.split(1), desc="scoring", leave=False), self._dense, strict=True):
                tally.add(dense.float(), self._log_p(ids), ids[0, ids.shape[1] // 2 :], 0.0)
        return {"keep": 1.0, **tally.result(), **self.about}


@click.command(help=__doc__)
@click.argument("model", required=False)
@click.option("--text", required=True, type=click.Path(path_type=Path), help="First half calibrates, second is scored.")
@click.option("--rows", "output", required=True, type=click.Path(path_type=Path), help="JSONL file to write.")
@click.option("--windows", default=24, show_default=True, help="Windows of 512 tokens to score.")
@click.option("--tokens", default=TOKENS, show_default=True, help="Calibration tokens.")
@click.option("--budget", "budgets", multiple=True, default=BUDGETS, show_default=True, help="Of mixed; 0 for none.")
def main(model: str | None, text: Path, output: Path, windows: int, tokens: int, budgets: tuple[float, ...]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    check_file(output)
    name = model_name(model)
    command = f"python -m coreskip.bench.rounding_quality {'' if model is None else name + ' '}--text {text.name}"
    command += f" --rows {output.name} --windows {windows} --tokens {tokens}"
    about = provenance(command + "".join(f" --budget {budget:g}" for budget in budgets))
    loaded, tokenizer = load(model, device="cpu", dtype="float32")
    calibration, scored = tokenize(tokenizer, undo_wikitext(read_text(text)), text.name).split(0.5, 0.5)
    dense = Scored(loaded, scored, windows)
    rows: list[dict[str, Any]] = []
    for kind, make in kinds(loaded, calibration, tokens, [budget for budget in budgets if budget]):
        start = time.perf_counter()
        found = make()
        row = {"name": kind, "model": name, "dtype": "float32", "seconds": round(time.perf_counter() - start, 1)}
        row |= {"calibration_tokens": tokens, **dense.figures(found)}
        row["megabytes"] = round(sum(each.packed.nbytes for each in found) / 1e6, 2)
        rows.append({**row, **about})
        write_rows(output, rows)  # after each: an interrupted run keeps what it has
        click.echo(line(row))


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    return (
        f"{row['name']:28} ppl {row['sparse']['ppl']:7.3f} ({row['ppl_increase']:+.2%})  KL {row['kl']:.4f}  "
        f"top-1 {row['top1_agreement']:.1%}  {row['megabytes']:.0f} MB per token  {row['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
