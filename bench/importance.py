"""What sources of importance are worth, on the embedded model: sets of neurons by each of them, plans for one kind of
text, neurons read through the LM head, and sets as drafts.

    python -m coreskip.bench.importance sources TEXT --rows bench/rows/sources.jsonl
    python -m coreskip.bench.importance purpose TEXT --rows bench/rows/purpose.jsonl
    python -m coreskip.bench.importance lm-head TEXT --rows bench/rows/lm_head.jsonl
    python -m coreskip.bench.importance drafts TEXT --rows bench/rows/set_drafts.jsonl

The first half of TEXT calibrates, the second is scored. Code is Python's own library, every other module for each.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch

from coreskip.bench.method_quality import undo_wikitext
from coreskip.bench.provenance import provenance, write_rows
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.calibration import TokenText, read_text, tokenize
from coreskip.predictors.checks import STATIC_SCORES
from coreskip.predictors.files import check_file
from coreskip.predictors.lm_head import LMHead, standardised
from coreskip.predictors.observe import inference, taps
from coreskip.predictors.plan import Plan
from coreskip.predictors.scores import NeuronScores, NeuronSet, Per
from coreskip.runtime.bundles import Weights
from coreskip.runtime.draft_costs import DraftCostModel, DraftSource
from coreskip.runtime.load import load
from coreskip.runtime.quality import Tally, decode_logits, evaluate_all
from coreskip.runtime.scoring import scored, source_of
from coreskip.runtime.wrap import runtime_of, wrap, wrapped

Rows = list[dict[str, Any]]
_CODE_CHARACTERS = 400_000  # of each half


@click.group()
def main() -> None:
    """Measure sources of importance on the embedded model."""


def measuring(measure: Callable[..., Iterator[dict[str, Any]]]) -> Callable[..., None]:
    """A command that writes what `measure` yields as rows, each as soon as it is there."""

    def run(text: Path, output: Path, **options: Any) -> None:
        words = [f"--{key.replace('_', '-')} {value}" for key, value in options.items()]
        name = measure.__name__.replace("_", "-")
        command = " ".join([f"python -m coreskip.bench.importance {name} {text.name} --rows {output.name}", *words])
        output.parent.mkdir(parents=True, exist_ok=True)
        check_file(output)
        about = provenance(command)
        model, tokenizer = load(device="cpu", dtype="float32")
        halves = tokenize(tokenizer, undo_wikitext(read_text(text)), text.name).split(0.5, 0.5)
        rows: Rows = []
        for row in measure(model, tokenizer, *halves, **options):
            rows.append({"model": "SmolLM2-135M-Instruct", "dtype": "float32", **row, **about})
            write_rows(output, rows)
            click.echo("  ".join(f"{key} {_short(value)}" for key, value in row.items()), err=True)

    run.__doc__ = measure.__doc__
    return run


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def figures(quality: dict[str, Any]) -> dict[str, Any]:
    """What tables show of a measurement."""
    names = (
        "ppl_increase",
        "ppl_increase_stderr",
        "kl",
        "top1_agreement",
        "neuron_sparsity",
        "tokens",
        "windows",
        "text",
    )
    return {"dense_ppl": quality["dense"]["ppl"], **{name: quality[name] for name in names if name in quality}}


_arguments = [
    click.argument("text", type=click.Path(path_type=Path)),
    click.option("--rows", "output", required=True, type=click.Path(path_type=Path), help="JSONL file to write."),
]


def command(*options: Any) -> Callable[[Callable[..., Iterator[dict[str, Any]]]], click.Command]:
    """Registers a measurement with the options that all have, and its own."""

    def register(measure: Callable[..., Iterator[dict[str, Any]]]) -> click.Command:
        run: Any = measuring(measure)
        for decorator in (*options, *reversed(_arguments)):
            run = decorator(run)
        return main.command(measure.__name__.replace("_", "-"))(run)

    return register


@command(
    click.option("--windows", default=12, show_default=True, help="Windows of 512 tokens to score."),
    click.option("--tokens", default=8192, show_default=True, help="Calibration tokens."),
    click.option("--per", default="layer", show_default=True, help="Share of every layer, or of the whole model."),
    click.option("--only", default="all", show_default=True, help="Names of sources, with commas between."),
    click.option("--chosen", default="static,prompt", show_default=True, help="Sets made once, or for each prompt."),
)
def sources(
    model: Any,
    tokenizer: Any,
    calibration: TokenText,
    unseen: TokenText,
    windows: int,
    tokens: int,
    per: Per,
    only: str,
    chosen: str,
) -> Iterator[dict[str, Any]]:
    """Every source of one text, and the LM head's: static sets of 0.7 and 0.5, and sets of 0.5 from each window's own
    prompt."""
    names = (*STATIC_SCORES, "lm_head", "random") if only == "all" else tuple(only.split(","))
    for name in names if "static" in chosen else ():
        found = _scores(model, calibration, name, tokens)
        plans = [_top(model, found, share, per) for share in (0.7, 0.5)]
        for share, quality in zip((0.7, 0.5), evaluate_all(model, plans, unseen, windows=windows), strict=True):
            about = {"kind": "sources", "name": name, "chosen": "static", "per": per, "keep": share}
            yield {**about, **figures(quality)}
    for name in names if "prompt" in chosen else ():
        if name in STATIC_SCORES:
            about = {"kind": "sources", "name": name, "chosen": "prompt", "keep": 0.5}
            yield {**about, **_by_prompt(model, unseen, name, windows)}


def _scores(model: Any, text: TokenText, name: str, tokens: int) -> NeuronScores | None:
    if name == "random":
        return None
    texts = {} if name == "lm_head" else {"text": text}
    return scored(model, source_of(name, {}), texts, tokens=tokens)


def _top(model: Any, found: NeuronScores | None, share: float, per: Per = "layer") -> Plan:
    return (NeuronSet.random(model, share) if found is None else found.top(share, per=per)).plan(model)


def _by_prompt(model: Any, text: TokenText, name: str, windows: int) -> dict[str, Any]:
    """Each window under the set that its own prompt gives."""
    tally, rows, weights = Tally(), text.windows(512, windows), Weights(dissect(model))
    for ids in rows.split(1):
        prompt = TokenText(ids[0, : ids.shape[1] // 2], torch.zeros(0, dtype=torch.int64), "a prompt")
        plan = scored(model, source_of(name, {}), {"text": prompt}, tokens=512, progress=False).top(0.5).plan(model)
        with inference(model):
            dense = decode_logits(model, ids, ids.shape[1]).log_softmax(-1)
            with wrapped(model, plan, weights):
                sparse = decode_logits(model, ids, 8).log_softmax(-1)
        tally.add(dense, sparse, ids[0, ids.shape[1] // 2 :], 0.5)
    return figures({**tally.result(), "windows": len(rows), "text": text.source})


def python_code(tokenizer: Any) -> tuple[TokenText, TokenText]:
    """Two halves of Python source, no module in both."""
    folder = Path(sysconfig.get_path("stdlib"))
    modules = sorted(path for path in folder.glob("*.py") if path.stat().st_size > 4000)
    halves = []
    for start in (0, 1):
        text = "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in modules[start::2])
        halves.append(tokenize(tokenizer, text[:_CODE_CHARACTERS], "Python's library"))
    return halves[0], halves[1]


@command(
    click.option("--windows", default=16, show_default=True, help="Windows of 512 tokens to score."),
    click.option("--tokens", default=8192, show_default=True, help="Calibration tokens."),
    click.option("--keep", default=0.6, show_default=True, help="Share of neurons kept."),
)
def purpose(
    model: Any, tokenizer: Any, prose: TokenText, unseen_prose: TokenText, windows: int, tokens: int, keep: float
) -> Iterator[dict[str, Any]]:
    """Static plans made for prose, for code, and for both, measured on both kinds of unseen text; random sets
    beside."""
    code, unseen_code = python_code(tokenizer)
    kinds = {"prose": [prose], "code": [code], "both": [prose, code]}
    for score in ("griffin", "taylor"):
        plans = {
            name: scored(model, source_of(score, {}), {"text": TokenText.joined(texts)}, tokens=tokens)
            .top(keep)
            .plan(model)
            for name, texts in kinds.items()
        }
        if score == "griffin":
            plans["random"] = NeuronSet.random(model, keep).plan(model)
        for kind, text in (("prose", unseen_prose), ("code", unseen_code)):
            found = evaluate_all(model, list(plans.values()), text, windows=windows)
            for name, quality in zip(plans, found, strict=True):
                about = {"name": name, "score": "none" if name == "random" else score, "on": kind, "keep": keep}
                yield {"kind": "purpose", **about, **figures(quality)}


@command(
    click.option(
        "--neurons", default=20, show_default=True, help="How many are clamped, of those with the clearest tokens."
    ),
    click.option("--seed", default=0, show_default=True, help="Of the places where probabilities are read."),
)
def lm_head(
    model: Any, tokenizer: Any, seen: TokenText, unseen: TokenText, neurons: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Clamps the neurons whose tokens are clearest, each at the largest activation that it has in the text, and reads
    its token's probability at 64 places of unseen text."""
    head = LMHead.of(model)
    clear = [
        (float(value), layer, int(some[index]), int(token))
        for layer, some, logits in head.every()
        for index, (value, token) in enumerate(zip(*standardised(logits).max(1), strict=True))
    ]
    chosen: dict[int, tuple[float, int, int, int]] = {}
    for each in sorted(clear, reverse=True):
        chosen.setdefault(each[3], each)  # one neuron a token
    largest = _largest_activations(model, seen)
    ids = unseen.windows(65, 16)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(1, 64, (len(ids), 4), generator=generator)
    for value, layer, index, token in list(chosen.values())[:neurons]:
        plain = _probability(model, ids, places, token)
        clamped = _probability(model, ids, places, token, (head.anatomy.mlp(layer).down, index, largest[layer][index]))
        about = {"layer": layer, "neuron": index, "token": tokenizer.decode([token]), "clearness": value}
        yield {
            "kind": "lm_head",
            **about,
            "clamped_at": float(largest[layer][index]),
            "plain": plain,
            "clamped": clamped,
        }


def _largest_activations(model: Any, text: TokenText) -> list[torch.Tensor]:
    anatomy = dissect(model)
    found = [torch.zeros(mlp.intermediate_size) for mlp in anatomy.mlps]

    def see(layer: int, a: torch.Tensor) -> None:
        found[layer] = torch.maximum(found[layer], a.float().amax(0))

    with inference(model), taps(anatomy, see):
        for ids in text.windows(256, 16).split(1):
            anatomy.stack(input_ids=ids, use_cache=False)
    return found


def _probability(
    model: Any, ids: torch.Tensor, places: torch.Tensor, token: int, clamp: tuple[Any, int, torch.Tensor] | None = None
) -> float:
    """The mean probability of a token after the places of ids ``[rows, length]``, with one neuron clamped."""
    handle = None
    if clamp is not None:
        module, neuron, value = clamp

        def before(module: Any, args: Any) -> Any:
            a = args[0].clone()
            a[..., neuron] = value
            return (a,)

        handle = module.register_forward_pre_hook(before)
    try:
        with inference(model):
            logits = model(ids, use_cache=False).logits.float().softmax(-1)
    finally:
        if handle is not None:
            handle.remove()
    return float(logits[torch.arange(len(ids))[:, None], places, token].mean())


class NoDrafts(DraftSource):
    """A source that is never drafted from."""

    def due(self, pays: bool) -> bool:
        return False


class EagerDrafts(DraftCostModel):
    """Prices under which every draft by the plan pays, and none from the text: what is asked is how good the plan's
    are, not whether this machine gains from them."""

    verify_s, verify_token_s, draft_s, first_draft_s = 1.0, 0.0, 0.0, 0.0
    draft_token_s, ready = 1e9, True

    def __init__(self) -> None:
        super().__init__()
        self.lookup = NoDrafts({2: 0.0, 3: 0.0, 4: 0.0})


@command(
    click.option("--tokens", default=128, show_default=True, help="Generated after each prompt."),
    click.option("--prompts", default=6, show_default=True, help="Taken from the unseen half."),
)
def drafts(
    model: Any, tokenizer: Any, calibration: TokenText, unseen: TokenText, tokens: int, prompts: int
) -> Iterator[dict[str, Any]]:
    """Sets of 90, 70 and 50 % of the neurons as the drafts of exact mode, drafted whatever they cost: how many tokens
    are accepted, and how many each dense pass gives."""
    ids = unseen.windows(96, prompts).split(1)
    for name in ("griffin", "taylor", "bigram", "random"):
        found = _scores(model, calibration, name, 8192)
        for keep in (0.9, 0.7, 0.5):
            done = [_drafted(model, _top(model, found, keep), prompt, tokens) for prompt in ids]
            accepted, drafted = (sum(part[of] for part in done) for of in ("accepted", "drafted"))
            about = {"kind": "drafts", "name": name, "keep": keep, "accepted": accepted, "drafted": drafted}
            yield {
                **about,
                "share": accepted / max(drafted, 1),
                "tokens_per_pass": sum(part["tokens"] for part in done) / sum(part["passes"] for part in done),
            }


def _drafted(model: Any, plan: Plan, prompt: torch.Tensor, tokens: int) -> dict[str, int]:
    """What one greedy text in exact mode drafted and accepted."""
    with wrap(model, plan, exact=True):
        exact = runtime_of(model).exact
        assert exact is not None
        exact.costs = EagerDrafts()
        model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        done = exact.last
    assert done is not None
    return {
        "accepted": done.accepted["plan"],
        "drafted": done.drafted["plan"],
        "tokens": done.tokens - 1,
        "passes": done.passes,
    }


if __name__ == "__main__":
    main()
