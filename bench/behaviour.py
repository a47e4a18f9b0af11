"""A skill switched off, and texts steered: what it takes away, and what it costs elsewhere.

    python -m coreskip.bench.behaviour skill --text TEXT --rows bench/rows/behaviour.jsonl
    python -m coreskip.bench.behaviour steering --text TEXT --rows bench/rows/steering.jsonl

The skill is Python source: the standard library's own modules, whole files, of which one half shows the skill and the
other is scored. What is to stay is the prose of TEXT, its first half against its second; by default Python's language
reference. The embedded model in float32.
"""

from __future__ import annotations

import math
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm.auto import tqdm

from coreskip.bench.method_quality import undo_wikitext
from coreskip.bench.provenance import provenance, write_rows
from coreskip.bench.settings import scored_text
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.calibration import TokenText, tokenize
from coreskip.predictors.files import check_file
from coreskip.predictors.interventions import PrunedNeurons
from coreskip.predictors.observe import inference
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.skills import NeuronStats, Texts, neuron_stats
from coreskip.runtime.behaviour_plans import of_neurons, switch_off
from coreskip.runtime.engine import Engine
from coreskip.runtime.load import load
from coreskip.runtime.quality import WINDOW, evaluate_all
from coreskip.runtime.steer import steer
from coreskip.runtime.steer_vectors import control_vector

Row = dict[str, Any]

_SMALLEST, _LARGEST = 8_000, 200_000  # bytes of a module: others are tables, or too short to show a style
_MOST_CODE = 400_000  # characters of either half
_PROMPT_TOKENS = 24, 96

# method, share, strength, ranking
_WAYS: tuple[tuple[str, float, float, str], ...] = (
    *(("neuron_adjust", share, 1.0, "difference") for share in (0.01, 0.02, 0.03, 0.05)),
    ("neuron_adjust", 0.03, 0.5, "difference"),
    ("neuron_adjust", 0.03, 1.0, "standardised"),
    *(("neuron_adjust", share, 1.0, "distance") for share in (0.03, 0.05, 0.07, 0.1)),
    *(("pruning", share, 1.0, "magnitude") for share in (0.01, 0.02, 0.03)),
    *(("static", share, 1.0, "magnitude") for share in (0.01, 0.03)),
    *(("random", share, 1.0, "") for share in (0.01, 0.03)),
)


@click.group(help=__doc__)
def main() -> None:
    pass


_text = click.option("--text", type=click.Path(path_type=Path), help="Prose; else Python's language reference.")
_rows = click.option("--rows", "output", required=True, type=click.Path(path_type=Path), help="JSONL file to write.")


# --- a skill ----------------------------------------------------------------------------------------------------------


def source_code(seed: int = 0) -> tuple[str, str]:
    """Two halves of the standard library's modules, which share no file."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.glob("*.py") if _SMALLEST <= path.stat().st_size <= _LARGEST)
    random.Random(seed).shuffle(files)
    texts = ["\n\n".join(path.read_text(encoding="utf-8") for path in half) for half in (files[::2], files[1::2])]
    return texts[0][:_MOST_CODE], texts[1][:_MOST_CODE]


def prompts(text: TokenText, count: int, seed: int) -> list[TokenText]:
    """Pieces of a text, evenly spread, each of another length."""
    lengths = random.Random(seed)
    starts = [i * (len(text.ids) - _PROMPT_TOKENS[1]) // count for i in range(count)]
    return [
        TokenText(text.ids[start : start + lengths.randint(*_PROMPT_TOKENS)], text.prefix, text.source)
        for start in starts
    ]


@main.command()
@_text
@_rows
@click.option("--windows", default=12, show_default=True, help="Windows of 512 tokens to score, of either kind.")
@click.option("--tokens", default=16384, show_default=True, help="Observed, of either kind.")
@click.option("--prompts", "count", default=200, show_default=True, help="To abstain from or not, of either kind.")
def skill(text: Path | None, output: Path, windows: int, tokens: int, count: int) -> None:
    """Perplexity on code and on prose under every way of switching code off; which prompts are abstained from."""
    check_file(output)
    content, source = scored_text(text)
    command = "python -m coreskip.bench.behaviour skill" + ("" if text is None else f" --text {source}")
    about = provenance(f"{command} --rows {output.name} --windows {windows} --tokens {tokens} --prompts {count}")
    model, tokenizer = load(device="cpu", dtype="float32")
    code = [tokenize(tokenizer, half, "Python's standard library") for half in source_code()]
    prose = tokenize(tokenizer, undo_wikitext(content), source).split(0.5, 0.5)
    about |= {"kind": "behaviour", "model": "SmolLM2-135M-Instruct", "dtype": "float32", "text": source}
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append({**row, **about})
        write_rows(output, rows)  # after each: an interrupted run keeps what it has

    for name, plan in [("nothing switched off", Plan.dense(model)), *_plans(model, code[0], prose[0], tokens)]:
        row: Row = {"name": name, **{key: plan.recipe.get(key) for key in ("share", "strength", "ranking")}}
        for kind, scored in (("code", code[1]), ("prose", prose[1])):
            found = evaluate_all(model, [plan], scored, windows=windows)[0]
            row[kind] = {
                "ppl": found["sparse"]["ppl"],
                "dense_ppl": found["dense"]["ppl"],
                "increase": found["ppl_increase"],
                "increase_stderr": found["ppl_increase_stderr"],
                "tokens": found["tokens"],
            }
        keep(row)
        click.echo(f"{name} {plan.recipe}: code {row['code']['increase']:+.1%}, prose {row['prose']['increase']:+.1%}")
    keep(_abstentions(model, tokenizer, code, prose, count))


def _plans(model: Any, code: TokenText, prose: TokenText, tokens: int) -> Iterator[tuple[str, Plan]]:
    anatomy, dense = dissect(model), Plan.dense(model)
    kinds = [
        Texts(name, tuple(torch.cat([text.prefix, ids]) for ids in text.ids.split(WINDOW)))
        for name, text in (("forget", code), ("retain", prose))
    ]
    stats = [neuron_stats(model, anatomy, kind, tokens) for kind in kinds]
    where = range(len(anatomy))
    for method, share, strength, ranking in _WAYS:
        if method == "random":
            layers, recipe = _random(stats[0], share), {"share": share}
        else:
            options: Row = {"share": share, "ranking": ranking}
            options |= {"strength": strength} if method == "neuron_adjust" else {}
            layers, recipe = of_neurons(method, anatomy, stats, where, **options), options
        made = tuple(layers.get(index, layer) for index, layer in enumerate(dense.layers))
        yield method, Plan(made, dense.model, {"method": method, **recipe})


def _random(stats: NeuronStats, share: float) -> dict[int, LayerPlan]:
    """As many neurons of each layer, drawn by chance, silenced."""
    generator = torch.Generator().manual_seed(0)
    widths = [len(mean) for mean in stats.mean]
    chosen = [torch.randperm(w, generator=generator)[: max(1, round(share * w))].sort().values for w in widths]
    return {index: LayerPlan(intervention=PrunedNeurons(neurons)) for index, neurons in enumerate(chosen)}


def _abstentions(model: Any, tokenizer: Any, code: Sequence[TokenText], prose: Sequence[TokenText], count: int) -> Row:
    """Key Space Detection: of which prompts that it has not seen it abstains."""
    plan = switch_off(
        model, tokenizer, method="key_space",
        forget=prompts(code[0], count, 1), retain=prompts(prose[0], count, 2),
    )  # fmt: skip
    reference, _ = scored_text(None)
    unseen = {"code": code[1], "prose": prose[1], "reference": tokenize(tokenizer, reference, "reference")}
    row: Row = {"name": "key_space", "layer": plan.recipe["layer"], "alpha": plan.recipe["alpha"]}
    with Engine(model, tokenizer, plan) as engine:
        for seed, (kind, text) in enumerate(unseen.items(), 3):
            asked = prompts(text, count, seed)
            row[f"abstained_{kind}"] = sum(_abstains(engine, p.ids) for p in tqdm(asked, desc=kind)) / count
    click.echo(str(row))
    return {
        **row,
        "prompts": count,
        "held_out": {key: plan.recipe[key] for key in ("true_positives", "false_positives")},
    }


def _abstains(engine: Engine, ids: Tensor) -> bool:
    engine.generate(engine.tokenizer.decode(ids), max_new_tokens=1)
    assert engine.figures is not None
    return engine.figures.abstained == 1


# --- steering ---------------------------------------------------------------------------------------------------------

_GOOD = ("wonderful", "great", "delightful", "excellent", "lovely", "brilliant")
_BAD = ("terrible", "awful", "dreadful", "horrible", "miserable", "disappointing")
_SAID = (
    "The film was", "Dinner at the new place was", "Our holiday by the sea was", "The book I finished was",
    "The concert last night was", "My first week at work was", "The weather this spring was", "The service was",
)  # fmt: skip
_ASKED = (
    "When the play was over, everyone agreed that it had been", "I tried the soup, and it tasted",
    "The review of the hotel said that the rooms were", "She looked back at the year and thought that it was",
    "The team's performance on Sunday was", "To be honest, the lecture was",
)  # fmt: skip
_STRENGTHS = (-1.0, -0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, 1.0)


@main.command()
@_text
@_rows
@click.option("--windows", default=8, show_default=True, help="Windows of 512 tokens of prose to score.")
def steering(text: Path | None, output: Path, windows: int) -> None:
    """How the chances of good and bad words, after prompts that made no vector, follow the strength of steering."""
    check_file(output)
    content, source = scored_text(text)
    command = "python -m coreskip.bench.behaviour steering" + ("" if text is None else f" --text {source}")
    about = provenance(f"{command} --rows {output.name} --windows {windows}")
    about |= {"kind": "steering", "model": "SmolLM2-135M-Instruct", "dtype": "float32", "text": source}
    model, tokenizer = load(device="cpu", dtype="float32")
    prose = tokenize(tokenizer, undo_wikitext(content), source).windows(WINDOW, windows)
    depth = len(dissect(model))
    third = list(range(depth // 3, 2 * depth // 3))
    places = {"the middle layer": ([depth // 2], 1.0), "each of the middle third, shared out": (third, 1 / len(third))}
    rows: list[Row] = []
    for method in ("mean", "pca"):
        texts = [[f"{said} {word}" for said in _SAID for word in words] for words in (_GOOD, _BAD)]
        vector = control_vector(model, tokenizer, positive=texts[0], negative=texts[1], method=method)
        for place, (layers, part) in places.items():
            for strength in _STRENGTHS:
                with steer(model, vector, strength * part, layers=layers):
                    row = {"method": method, "layers": place, "strength": strength, "ppl": _ppl(model, prose)}
                    row |= {"good_share": _good_share(model, tokenizer), **about}
                rows.append(row)
                write_rows(output, rows)
                click.echo(f"{method}, {place}, {strength:+g}: {row['good_share']:.3f}, ppl {row['ppl']:.2f}")


def _good_share(model: Any, tokenizer: Any) -> float:
    """Of the chances that good and bad words have together, what the good ones have: the mean over prompts."""
    firsts = [[tokenizer(f" {word}").input_ids[0] for word in words] for words in (_GOOD, _BAD)]
    shares = []
    with inference(model):
        for asked in _ASKED:
            ids = torch.tensor([tokenizer(asked).input_ids])
            chances = model(input_ids=ids).logits[0, -1].float().softmax(-1)
            good, bad = (float(chances[list(set(tokens))].sum()) for tokens in firsts)
            shares.append(good / (good + bad))
    return sum(shares) / len(shares)


def _ppl(model: Any, windows: Tensor) -> float:
    """Perplexity of the second halves of windows ``[windows, tokens]``."""
    half, losses = windows.shape[1] // 2, []
    with inference(model):
        for ids in windows.split(1):
            logits = model(input_ids=ids, use_cache=False).logits[0, half - 1 : -1].float()
            losses.append(float(torch.nn.functional.cross_entropy(logits, ids[0, half:])))
    return math.exp(sum(losses) / len(losses))


if __name__ == "__main__":
    main()
