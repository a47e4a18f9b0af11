"""A small mixture of experts whose routing is trained, and what leaving experts out of it costs.

    python -m coreskip.bench.train_moe --text TEXT -o FOLDER
    python -m coreskip.bench.train_moe --text TEXT -o FOLDER --rows bench/rows/experts.jsonl

Random routers send every token everywhere: nothing that is claimed of experts can rest on them. This is an OLMoE of
bytes (4 layers, 16 experts of 128 neurons, 2 of them a token), trained on the first half of the text with the router's
own balancing loss: 900 steps took 20 minutes on two busy cores, to 1.45 nats a byte. With --rows the model that is in
FOLDER, or was just trained, is calibrated on the first half and measured on the second.

    python -m coreskip.bench.train_moe --text TEXT -o FOLDER --widen 4

makes FOLDERx4 beside it: every neuron of an expert stands four times, each with a quarter of its outputs. Function and
routing are the trained model's, at four times the bytes: what memory caps are tried on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from transformers import ByT5Tokenizer, OlmoeConfig, OlmoeForCausalLM

from coreskip.bench.clock import greedy
from coreskip.bench.finetune import descend
from coreskip.bench.method_quality import undo_wikitext
from coreskip.bench.provenance import provenance, write_rows
from coreskip.bench.tables import quality_table
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.calibration import TokenText, read_text, tokenize
from coreskip.predictors.files import check_file, check_folder, replaced_folder
from coreskip.predictors.observe import inference
from coreskip.predictors.plan import Plan
from coreskip.runtime.bundles import Weights
from coreskip.runtime.calibrate import Calibrator
from coreskip.runtime.cost import bytes_per_token
from coreskip.runtime.load import load
from coreskip.runtime.quality import evaluate_all
from coreskip.runtime.wrap import wrapped

STEPS, ROWS, LENGTH, RATE = 900, 16, 128, 3e-3

#: What is measured: a name, `analyze`'s method, its options, the shares that are kept.
PLANS: tuple[tuple[str, str, dict[str, Any], tuple[float, ...]], ...] = (
    ("experts by REAP", "experts", {"score": "reap"}, (0.75, 0.5)),
    ("experts by frequency", "experts", {"score": "frequency"}, (0.75, 0.5)),
    ("experts at random", "experts", {"score": "random"}, (0.75, 0.5)),
    ("a token's lightest skipped", "skip-experts", {}, (0.9, 0.75, 0.5)),
    ("core experts of the prompt", "core-experts", {}, (0.75, 0.5)),
    ("thresholds inside experts", "thin-experts", {}, (0.75, 0.5)),
)
PROMPT, TOKENS, ROUNDS = 256, 128, 5  # of each timed generation


def tiny_moe(seed: int = 0, experts: int = 16, neurons: int = 128, hidden: int = 128) -> Any:
    torch.manual_seed(seed)
    config = OlmoeConfig(
        vocab_size=384, hidden_size=hidden, intermediate_size=neurons, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, num_experts=experts, num_experts_per_tok=2, max_position_embeddings=1024,
        norm_topk_prob=True, router_aux_loss_coef=0.02, output_router_logits=True, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return OlmoeForCausalLM(config)


def widened(model: Any, times: int) -> Any:
    """A model of the same function and routing, whose experts have each neuron so many times."""
    config = copy.deepcopy(model.config)
    config.intermediate_size *= times
    wide = type(model)(config).to(model.dtype).eval()
    state = model.state_dict()
    for name, weight in state.items():
        if name.endswith("gate_up_proj"):  # gates first, then ups
            state[name] = torch.cat([part.repeat_interleave(times, 1) for part in weight.chunk(2, 1)], 1)
        elif name.endswith("experts.down_proj"):
            state[name] = weight.repeat_interleave(times, 2) / times
    wide.load_state_dict(state)
    return wide


def batches(text: TokenText, steps: int, rows: int, length: int, seed: int) -> Iterator[Tensor]:
    """`steps` times token ids, int64 ``[rows, length]``, from random places."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(text.ids) - length, (rows,), generator=generator)
        yield torch.stack([text.ids[start : start + length] for start in starts.tolist()])


def train(model: Any, text: TokenText, *, steps: int, rows: int, length: int, rate: float, seed: int) -> list[float]:
    """Trains in place; returns the losses in nats, the balancing loss included."""
    return descend(model, batches(text, steps, rows, length, seed), steps=steps, rate=rate, decay=0.05)


def plans(model: Any, calibration: TokenText, tokens: int) -> Iterator[tuple[str, Plan]]:
    yield "dense", Plan.dense(model)
    for name, method, options, keeps in PLANS:
        calibrator = Calibrator(model, calibration, max_tokens=tokens, **options)
        yield from ((name, calibrator.make(method, keep)) for keep in keeps)


def timed(model: Any, plans: list[Plan], text: TokenText) -> list[dict[str, float]]:
    """Decode speed under each plan, tokens a second: quantiles over rounds in which all are timed in turn."""
    ids, speeds, weights = text.ids[None, :PROMPT], [list[float]() for _ in plans], Weights(dissect(model))
    for turn in range(ROUNDS + 1):
        for plan, found in zip(plans, speeds, strict=True):
            with wrapped(model, plan, weights), inference(model):
                greedy(model, ids, 4)
                found += [greedy(model, ids, TOKENS)[1].tok_s] * (turn > 0)
    quantiles = (torch.tensor(found).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist() for found in speeds)
    return [{name: round(at, 1) for name, at in zip(("p20", "p50", "p80"), some, strict=True)} for some in quantiles]


def measured(model: Any, seen: TokenText, scored: TokenText, windows: int, tokens: int) -> list[dict[str, Any]]:
    """A row for each plan, made of `seen` and measured on `scored`."""
    named, about = list(plans(model, seen, tokens)), f"trained byte MoE, {model.config.num_experts} experts"
    speeds = timed(model, [plan for _, plan in named], scored)
    qualities = evaluate_all(model, [plan for _, plan in named], scored, windows=windows)
    return [
        {
            "name": name, "model": about, "dtype": "float32", "keep": 1.0, **plan.recipe,
            "weights": plan.weights, "experts_kept": plan.experts, **quality,
            "megabytes": round(bytes_per_token(model, plan) / 1e6, 3), "tok_s": speed,
        }
        for (name, plan), quality, speed in zip(named, qualities, speeds, strict=True)
    ]  # fmt: skip


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    with replaced_folder(folder) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)


@click.command(help=__doc__)
@click.option("--text", required=True, type=click.Path(path_type=Path), help="Its first half trains and calibrates.")
@click.option("-o", "folder", required=True, type=click.Path(path_type=Path), help="Hugging Face folder of the model.")
@click.option("--steps", default=STEPS, show_default=True, type=click.IntRange(1), help="Where FOLDER is not there.")
@click.option("--seed", default=0, show_default=True, help="Of the weights and of the order of the text.")
@click.option("--experts", default=16, show_default=True, help="Of a layer.")
@click.option("--neurons", default=128, show_default=True, help="Of an expert.")
@click.option("--hidden", default=128, show_default=True, help="Width of the residual stream.")
@click.option("--widen", type=click.IntRange(2), help="Make a model with each expert's neurons so many times, too.")
@click.option("--rows", "output", type=click.Path(path_type=Path), help="JSONL file to write: plans over experts.")
@click.option("--windows", default=24, show_default=True, help="Windows of 512 bytes to score.")
@click.option("--tokens", default=16384, show_default=True, help="Calibration bytes.")
def main(
    text: Path, folder: Path, steps: int, seed: int, experts: int, neurons: int, hidden: int, widen: int | None,
    output: Path | None, windows: int, tokens: int,
) -> None:  # fmt: skip
    command = f"python -m coreskip.bench.train_moe --text {text.name} -o {folder.name} --steps {steps} --seed {seed}"
    command += f" --experts {experts} --neurons {neurons} --hidden {hidden}"
    if output is not None:
        command += f" --rows {output.name} --windows {windows} --tokens {tokens}"
    about = provenance(command)
    tokenizer = ByT5Tokenizer()
    seen, scored = tokenize(tokenizer, undo_wikitext(read_text(text)), text.name).split(0.5, 0.5)
    if not folder.exists():
        check_folder(folder)
        model = tiny_moe(seed, experts, neurons, hidden)
        losses = train(model, seen, steps=steps, rows=ROWS, length=LENGTH, rate=RATE, seed=seed)
        model.config.output_router_logits = False  # which only training needs
        _save(model, tokenizer, folder)
        click.echo(f"{folder}: {steps} steps, loss from {losses[0]:.2f} to {losses[-1]:.2f} nats a byte")
    if widen is not None:
        wide = folder.with_name(f"{folder.name}x{widen}")
        check_folder(wide)
        _save(widened(load(folder, device="cpu", dtype="float32")[0], widen), tokenizer, wide)
        click.echo(f"{wide}: each neuron of an expert {widen} times")
    if output is None:
        return
    check_file(output)
    model, _ = load(folder, device="cpu", dtype="float32")
    rows = [{**row, **about} for row in measured(model, seen, scored, windows, tokens)]
    write_rows(output, rows)
    click.echo(quality_table(rows))


if __name__ == "__main__":
    main()
