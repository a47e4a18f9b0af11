"""`coreskip explain`: what a plan keeps and drops, in the model's own words."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from coreskip.common_options import PATH, model_options, set_threads
from coreskip.predictors.errors import CoreskipError
from coreskip.predictors.files import check_file, keep


@click.command()
@click.argument("plan", type=PATH)
@model_options
@click.option("--with", "others", multiple=True, type=PATH, help="A plan or set to compare with; several times.")
@click.option("--neuron", "place", help="LAYER:INDEX: tell of this neuron.")
@click.option("--top", type=click.IntRange(1), default=20, show_default=True, help="Of scores: so many neurons.")
@click.option("--picture", type=PATH, help="Draw what is kept of every layer: a .png, .svg or .pdf.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def explain(
    plan: Path,
    model: str | None,
    others: tuple[Path, ...],
    place: str | None,
    top: int,
    picture: Path | None,
    as_json: bool,
    dtype: str | None,
    device: str | None,
    threads: int | None,
) -> None:
    """Tell what PLAN, or a set or scores of neurons, keeps and drops of MODEL: per layer the tokens that these neurons
    promote."""
    where = None if place is None else _neuron(place)
    if picture is not None:
        check_file(picture)
    from coreskip.predictors.scores import NeuronScores, NeuronSet
    from coreskip.runtime import explain as words
    from coreskip.runtime.load import load

    if picture is not None:
        words.check_picture(picture)
    found = _read(plan)
    beside = {path.name: _set_of(_read(path), path) for path in others}
    _refuse_of_scores(found, bool(others), picture is not None, as_json)
    set_threads(threads)
    loaded, tokenizer = load(model, dtype=dtype, device=device)
    found.check(loaded)
    if where is not None:
        click.echo(words.neuron(*where, loaded, tokenizer, found if isinstance(found, NeuronScores) else None))
        return
    if isinstance(found, NeuronScores):
        click.echo(words.scores_table(found, top, tokenizer, loaded))
        return
    of_plan = found.plan(loaded) if isinstance(found, NeuronSet) else found
    layers = words.explain(of_plan, loaded, tokenizer)
    if as_json:
        click.echo(json.dumps({"layers": [asdict(each) for each in layers]}, indent=1))
    else:
        click.echo(words.table(layers))
    if beside or picture is not None:
        mine = _set_of(found, plan)
        if beside and not as_json:
            click.echo(words.overlaps(mine, beside))
        if picture is not None:
            keep(lambda path: words.picture({plan.name: mine, **beside}, path), picture)


def _neuron(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise CoreskipError(f"--neuron is {text!r}: write LAYER:INDEX, as in 12:345")
    return int(match[1]), int(match[2])


def _read(path: Path) -> Any:
    """A plan, scores or a set, by what lies in the folder."""
    from coreskip.predictors.plan import Plan
    from coreskip.predictors.scores import NeuronScores, NeuronSet

    for kind, name in ((NeuronScores, "scores.json"), (NeuronSet, "set.json")):
        if (path / name).exists():
            return kind.load(path)
    return Plan.load(path)


def _set_of(found: Any, path: Path) -> Any:
    from coreskip.predictors.scores import NeuronScores, NeuronSet

    if isinstance(found, NeuronScores):
        raise CoreskipError(
            f"{path} holds scores, which keep nothing by themselves: make a set of them, scores.top(0.5)"
        )
    return found if isinstance(found, NeuronSet) else NeuronSet.of(found)


def _refuse_of_scores(found: Any, compared: bool, drawn: bool, as_json: bool) -> None:
    from coreskip.predictors.scores import NeuronScores

    if isinstance(found, NeuronScores) and (compared or drawn or as_json):
        raise CoreskipError("--with, --picture and --json are of plans and sets: make a set of these scores first")
