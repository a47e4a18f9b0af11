"""What the methods cost on a text: one row per method and keep, for the tables of bench/RESULTS.md.

    python -m coreskip.bench.method_quality TEXT --rows bench/rows/core_neurons.jsonl
    python -m coreskip.bench.method_quality TEXT --rows bench/rows/token_choice.jsonl --by token --plans plans
    python -m coreskip.bench.method_speed bench/rows/token_choice.jsonl --plans plans

The first half of TEXT calibrates, the second half is scored (DESIGN: windows of 512 tokens, 256 of them scored), token
by token where the native step decodes. The last command adds decode speeds and may have the machine to itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from coreskip.bench.provenance import provenance, write_rows
from coreskip.bench.tables import quality_table
from coreskip.predictors.calibration import TokenText, read_text, tokenize
from coreskip.predictors.files import check_file
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import Sketch
from coreskip.runtime.calibrate import Calibrator
from coreskip.runtime.cost import bytes_per_token
from coreskip.runtime.emulation import Emulation
from coreskip.runtime.load import load
from coreskip.runtime.quality import evaluate_all

# (how the table names it, method, options)
BY_PROMPT: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("CoreInfer, stability-guided (signed, α 0.4)", "core", {"score": "signed", "alpha": 0.4}),
    ("the same, α 0.2 (the authors' code)", "core", {"score": "signed", "alpha": 0.2}),
    ("the same, α 0.4, layers 4 to last (the paper)", "core", {"score": "signed", "alpha": 0.4, "first_layer": 4}),
    ("CoreInfer, similarity-guided (signed, α 0.4)", "similar", {"score": "signed", "alpha": 0.4}),
    ("stability-guided, magnitude", "core", {"score": "magnitude", "alpha": 0.4}),
    ("stability-guided, magnitude × ‖down column‖", "core", {"score": "magnitude_down", "alpha": 0.4}),
    ("GRIFFIN (stability-guided, its score)", "core", {"score": "griffin"}),
    ("static, GRIFFIN's score", "static", {"score": "griffin"}),
    ("static, magnitude × ‖down column‖", "static", {"score": "magnitude_down", "alpha": 0.4}),
)
# (how the table names it, method, options, shares to keep)
BY_TOKEN: tuple[tuple[str, str, dict[str, Any], tuple[float, ...]], ...] = (
    ("4-bit sketch, equal shares, neither means nor smoothing", "bare", {}, (0.7, 0.6, 0.5, 0.4)),
    ("4-bit sketch, equal shares", "sketch", {"allocation": "equal"}, (0.7, 0.6, 0.5, 0.4)),
    ("dense, int8 in groups", "dense", {"weights": "int8"}, (1.0,)),
    ("dense, int4 in groups", "dense", {"weights": "int4"}, (1.0,)),
    ("4-bit sketch, greedy by predicted loss", "sketch", {"allocation": "greedy"}, (0.7, 0.6, 0.5, 0.4)),
    ("4-bit sketch, greedy, refined", "sketch", {"allocation": "greedy", "refine": True}, (0.7, 0.6, 0.55, 0.5)),
    ("4-bit sketch, Fisher norms, one threshold", "sketch", {"allocation": "fisher"}, (0.6, 0.5)),
    ("4-bit sketch, relative to the residual", "sketch", {"allocation": "residual"}, (0.6, 0.5)),
    ("4-bit sketch, one CETT", "sketch", {"allocation": "cett"}, (0.6, 0.5)),
    ("4-bit sketch, greedy, the rest int4", "sketch", {"allocation": "greedy", "weights": "int4"}, (0.6, 0.5)),
    ("oracle (exact top-k), equal shares", "topk", {"allocation": "equal"}, (0.6, 0.5)),
    ("oracle, greedy by predicted loss", "topk", {"allocation": "greedy"}, (0.6, 0.5)),
    ("CATS", "threshold", {"rule": "cats"}, (0.6, 0.5)),
    ("TEAL on the MLP", "threshold", {"rule": "teal"}, (0.6, 0.5)),
    ("WINA on the MLP", "threshold", {"rule": "wina"}, (0.6, 0.5)),
    ("TEAL on all linears", "threshold", {"rule": "teal", "all_linears": True}, (0.6, 0.5)),
    ("learned, rank 64 (Deja Vu)", "learned", {}, (0.6, 0.5)),
    *(
        (
            f"bricks, {count} of {cluster}, router {router}",
            "bricks",
            {"bricks": count, "cluster": cluster, "router": router},
            keeps,
        )
        for count, cluster, router, keeps in (
            (64, "coactivation", "linear", (0.8, 0.7, 0.5)),
            (64, "coactivation", "centroids", (0.7,)),
            (64, "weights", "linear", (0.7,)),
            (64, "weights", "centroids", (0.7,)),
            (64, "snmf", "linear", (0.7, 0.5)),
            (256, "coactivation", "linear", (0.7, 0.5)),
        )
    ),
)
KEEPS = (0.7, 0.5)  # of methods that choose by prompt


def by_prompt(model: Any, calibration: TokenText, tokens: int) -> Iterator[tuple[str, Plan]]:
    """Every method that chooses from the prompt or before it, at every keep, made from the calibration text alone."""
    for name, method, options in BY_PROMPT:
        calibrator = Calibrator(model, calibration, max_tokens=tokens, **options)
        yield from ((name, calibrator.make(method, keep)) for keep in KEEPS)


def by_token(
    model: Any, calibration: TokenText, tokens: int, keeps: Sequence[float], only: str = ""
) -> Iterator[tuple[str, Plan]]:
    """Every method that chooses token by token, or not at all, at its own keeps or, of those, at `keeps`; `only` those
    whose names hold this."""
    calibrator = Calibrator(model, calibration, max_tokens=tokens)
    for name, method, options, own in BY_TOKEN:
        if only not in name:
            continue
        weights = options.get("weights")
        named = {key: value for key, value in options.items() if key != "weights"}
        for keep in own:
            if method == "dense":
                yield name, Plan.dense(model, weights=weights)
            elif method == "bare" and (not keeps or keep in keeps):
                yield name, _bare_sketch(model, keep)
            elif not keeps or keep in keeps:
                yield name, replace(calibrator.make(method, keep, **named), weights=weights)


def _bare_sketch(model: Any, keep: float) -> Plan:
    """Nothing calibrated: an equal share of every layer's neurons, left out without a trace."""
    dense = Plan.dense(model)
    layers = tuple(LayerPlan(Sketch(keep=keep)) for _ in dense.layers)
    return replace(dense, layers=layers, recipe={"method": "sketch", "keep": keep})


def undo_wikitext(text: str) -> str:
    """WikiText writes `1 @,@ 000` for `1,000`."""
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    return text


@click.command()
@click.argument("text", type=click.Path(path_type=Path))
@click.option("--rows", "output", required=True, type=click.Path(path_type=Path), help="JSONL file to write.")
@click.option("--windows", default=24, show_default=True, help="Windows of 512 tokens to score.")
@click.option("--tokens", default=16384, show_default=True, help="Calibration tokens.")
@click.option("--by", default="prompt", show_default=True, type=click.Choice(["prompt", "token"]), help="Who chooses.")
@click.option("--keep", "keeps", multiple=True, type=float, help="By token: of the shares to keep only these.")
@click.option("--only", default="", help="By token: of the methods only those whose names hold this.")
@click.option("--plans", "folder", type=click.Path(path_type=Path), help="Also write the plans into this folder.")
def main(
    text: Path,
    output: Path,
    windows: int,
    tokens: int,
    by: str,
    keeps: tuple[float, ...],
    only: str,
    folder: Path | None,
) -> None:
    """Score every method of a kind on TEXT with the embedded model in fp32."""
    command = f"python -m coreskip.bench.method_quality {text.name} --rows {output.name}"
    command += f" --windows {windows} --tokens {tokens}"
    if by == "token":
        command += (
            " --by token" + "".join(f" --keep {keep:g}" for keep in keeps) + (f' --only "{only}"' if only else "")
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    check_file(output)
    about = provenance(command)  # before the work: the commit may move on meanwhile
    model, tokenizer = load(device="cpu", dtype="float32")
    calibration, scored = tokenize(tokenizer, undo_wikitext(read_text(text)), text.name).split(0.5, 0.5)
    rows: list[dict[str, Any]] = []
    for name, plan, quality in _scored(model, calibration, scored, windows, tokens, by, keeps, only):
        row = {"name": name, "model": "SmolLM2-135M-Instruct", "dtype": "float32", "keep": 1.0, **plan.recipe}
        row |= {"weights": plan.weights, **quality}
        row["megabytes"] = round(bytes_per_token(model, plan) / 1e6, 2)
        if folder is not None:
            plan.save(folder / plan_name(len(rows)))
        rows.append({**row, **about})
        write_rows(output, rows)  # after each: an interrupted run keeps what it has
    click.echo(quality_table(rows))


def plan_name(row: int) -> str:
    """The folder of a row's plan."""
    return f"{row}.plan"


def _scored(
    model: Any,
    calibration: TokenText,
    text: TokenText,
    windows: int,
    tokens: int,
    by: str,
    keeps: tuple[float, ...],
    only: str,
) -> Iterator[tuple[str, Plan, dict[str, Any]]]:
    if by == "prompt":
        plans = list(by_prompt(model, calibration, tokens))
        qualities = evaluate_all(model, [plan for _, plan in plans], text, windows=windows)
        yield from ((name, plan, quality) for (name, plan), quality in zip(plans, qualities, strict=True))
        return
    emulation = Emulation(model, text, windows=windows)
    for name, plan in by_token(model, calibration, tokens, keeps, only):
        yield name, plan, decoded_score(emulation, plan)


def decoded_score(emulation: Emulation, plan: Plan) -> dict[str, Any]:
    """The plan's figures as it decodes."""
    return {**emulation.score(plan, token_by_token=True), "token_by_token": True}


if __name__ == "__main__":
    main()
