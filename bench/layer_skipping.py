"""Layers of a model: LAC's void maps in both phases, what truly skipping layers costs and gains, what each is worth.

``python -m coreskip.bench.layer_skipping --text wiki.txt --json layers.jsonl --svg void_maps.svg``
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from torch import Tensor

from coreskip.bench.method_speed import speed
from coreskip.bench.provenance import commit, device_name, model_name
from coreskip.bench.svg import new_figure, svg_of
from coreskip.bench.workloads import prompts
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.calibration import TokenText, read_text, tokenize
from coreskip.predictors.files import check_file, write_text
from coreskip.predictors.layer_selection import LayerSelection
from coreskip.predictors.layers import VoidMaps, attention_ranks, block_influence, layer_policies, void_maps
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import LayerPolicy, Run, Skip, SkipAttention, SkipMLP
from coreskip.runtime.load import load
from coreskip.runtime.quality import evaluate_all
from coreskip.runtime.wrap import runtime_of, wrap

Row = dict[str, Any]


@click.command(help=__doc__)
@click.argument("model", required=False)
@click.option(
    "--text", required=True, type=click.Path(path_type=Path), help="First half: influence, ranks; second: perplexity."
)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--alpha", type=float, default=0.8, show_default=True, help="Of LAC.")
@click.option("--plans", default="adaptive:0.8,skip:1,skip:3,skip-attention:3,skip-mlp:3,every:2", show_default=True)
@click.option("--windows", type=click.IntRange(1), default=8, show_default=True, help="Of 512 tokens, scored.")
@click.option("--tokens", type=click.IntRange(1), default=48, show_default=True, help="Generated per prompt.")
@click.option("--each", is_flag=True, help="Also the cost of every layer and half layer alone.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write rows to this file.")
@click.option("--svg", type=click.Path(path_type=Path), help="Draw the void maps into this file.")
def main(
    model: str | None,
    text: Path,
    dtype: str,
    alpha: float,
    plans: str,
    windows: int,
    tokens: int,
    each: bool,
    output: Path | None,
    svg: Path | None,
) -> None:
    for path in (output, svg):
        if path is not None:
            check_file(path)
    loaded, tokenizer = load(model, dtype=dtype, device="cpu")
    seen, scored = tokenize(tokenizer, read_text(text), text.name).split(0.5, 0.5)
    texts = [tokenizer(prompt.text, return_tensors="pt").input_ids for prompt in prompts()]
    about: Row = {"model": model_name(model), "dtype": dtype, "device": device_name("cpu")}
    about |= {"threads": torch.get_num_threads(), "commit": commit()}
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(about | _rounded(row))
        click.echo(json.dumps(_rounded(row)))

    maps = void_maps(loaded, texts, alpha=alpha, new_tokens=tokens)
    keep({"what": "void", "alpha": alpha, **_void_row(maps)})
    if svg is not None:
        write_text(svg, draw(maps))
    calibration = seen.windows(256, 4).split(1)
    influence = block_influence(loaded, calibration)
    ranks = attention_ranks(loaded, calibration)
    keep({"what": "importance", "influence": [vars(layer) for layer in influence], "attention_rank": ranks})
    names = plans.split(",")
    made = [_plan(loaded, layer_policies(LayerSelection.parse(name), influence)) for name in names]
    for name, plan, quality in zip(names, made, _quality(loaded, made, scored, windows), strict=True):
        keep({"what": "plan", "plan": name, **quality, **_speed(loaded, plan, texts, tokens)})
    for policy in (Skip(), SkipAttention(), SkipMLP()) if each else ():
        keep({"what": "each", "policy": policy.name, "ppl_increase": _alone(loaded, policy, scored, windows)})
    if output is not None:
        write_text(output, "".join(json.dumps(row) + "\n" for row in rows))


def _rounded(value: Any) -> Any:
    """Four significant digits: more is noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _plan(model: Any, policies: Sequence[LayerPolicy]) -> Plan:
    dense = Plan.dense(model)
    return Plan(tuple(LayerPlan(layer=policy) for policy in policies), dense.model, {"method": "layers"})


def _void_row(maps: VoidMaps) -> Row:
    both = {"prompt": maps.prompt, "response": maps.response}
    means = {phase: float(void.float().mean()) for phase, void in both.items()}
    return {"share": means, "tokens": {phase: void.shape[1] for phase, void in both.items()}, **maps.shares()}


def _quality(model: Any, plans: Sequence[Plan], text: TokenText, windows: int) -> list[Row]:
    found = evaluate_all(model, plans, text, windows=windows)
    names = ("ppl_increase", "ppl_increase_stderr", "kl", "top1_agreement", "tokens")
    return [{"ppl": q["sparse"]["ppl"], "dense_ppl": q["dense"]["ppl"], **{n: q[n] for n in names}} for q in found]


def _alone(model: Any, policy: LayerPolicy, text: TokenText, windows: int) -> list[float]:
    """The perplexity's relative increase with this policy in each layer alone."""
    depth = len(dissect(model))
    plans = [_plan(model, [policy if i == index else Run() for i in range(depth)]) for index in range(depth)]
    return [quality["ppl_increase"] for quality in _quality(model, plans, text, windows)]


def _speed(model: Any, plan: Plan, texts: Sequence[Tensor], tokens: int) -> Row:
    """Decode tok/s of the dense path and under the plan, prompt by prompt in turn; the share of MLPs left out."""
    speeds: dict[str, list[float]] = {"dense_tok_s": [], "tok_s": []}
    skipped = 0.0
    for ids in texts:
        for name, chosen in (("dense_tok_s", Plan.dense(model)), ("tok_s", plan)):
            with wrap(model, chosen):
                speed(model, ids, 8)  # packs, and proves the native step
                speeds[name].append(speed(model, ids, tokens))
                skipped = runtime_of(model).usage.neuron_sparsity()
    ratios = [sparse / dense for dense, sparse in zip(*speeds.values(), strict=True)]
    row = {name: round(median(values), 2) for name, values in speeds.items()}
    return {**row, "speedup": round(median(ratios), 3), "mlps_skipped_last_prompt": round(skipped, 3)}


def draw(maps: VoidMaps, most: int = 160) -> str:
    """Void maps of both phases as SVG: layers upwards, tokens to the right (at most `most`), void dark.

    Raises:
        CoreskipError: matplotlib is not installed.
    """
    figure = new_figure((9, 3.2), "the void maps are")
    phases = (("prompt processing", maps.prompt), ("response generation", maps.response))
    for axis, (name, void) in zip(figure.subplots(1, 2, sharey=True), phases, strict=True):
        axis.pcolormesh(void[:, :most].int().numpy(), cmap="Greys", vmin=0, vmax=1.4, rasterized=True)
        axis.set_title(f"{name}: {float(void.float().mean()):.0%} void", fontsize=10)
        axis.set_xlabel("token")
    figure.axes[0].set_ylabel("layer")
    figure.suptitle(f"void layers, LAC with α = {maps.alpha:g} (dark: void)", fontsize=11)
    return svg_of(figure, "void")


if __name__ == "__main__":
    main()
