"""Layers of a model: LAC's void maps in both phases, what truly skipping layers costs and gains, what each is worth.

``python -m coreskip.bench.layers --text wiki.txt --json layers.jsonl --svg void_maps.svg``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from coreskip.bench.quality_speed import speed
from coreskip.bench.rows import commit, device_name, model_name
from coreskip.bench.svg import new_figure, svg_of
from coreskip.bench.workloads import prompts
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.calibration import TokenText, read_text, tokenize
from coreskip.predictors.files import check_file, write_text
from coreskip.predictors.layer_selection import LayerSelection
from coreskip.predictors.layers import VoidMaps, attention_ranks, block_influence, layer_policies, void_maps
from coreskip.predictors.plan import LayerPlan, LayerPolicy, Plan, Run, Skip, SkipAttention, SkipMLP
from coreskip.runtime.load import load
from coreskip.runtime.quality import evaluate_all
from coreskip.runtime.wrap import runtime_of, wrap

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="hub id, folder or .gguf; the embedded model without")
    parser.add_argument("--text", type=Path, required=True, help="first half: influence and ranks; second: perplexity")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--alpha", type=float, default=0.8, help="of LAC")
    parser.add_argument("--plans", default="adaptive:0.8,skip:1,skip:3,skip-attention:3,skip-mlp:3,every:2")
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens, scored")
    parser.add_argument("--tokens", type=int, default=48, help="generated per prompt")
    parser.add_argument("--each", action="store_true", help="also the cost of every layer and half layer alone")
    parser.add_argument("--json", type=Path, help="write rows to this file")
    parser.add_argument("--svg", type=Path, help="draw the void maps into this file")
    options = parser.parse_args()
    for output in (options.json, options.svg):
        if output is not None:
            check_file(output)
    model, tokenizer = load(options.model, dtype=options.dtype, device="cpu")
    seen, scored = tokenize(tokenizer, read_text(options.text), options.text.name).split(0.5, 0.5)
    texts = [tokenizer(prompt.text, return_tensors="pt").input_ids for prompt in prompts()]
    about = {"model": model_name(options.model), "dtype": options.dtype, "device": device_name("cpu")}
    about |= {"threads": torch.get_num_threads(), "commit": commit()}
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(about | _rounded(row))
        print(json.dumps(_rounded(row)), flush=True)

    maps = void_maps(model, texts, alpha=options.alpha, new_tokens=options.tokens)
    keep({"what": "void", "alpha": options.alpha, **_void_row(maps)})
    if options.svg is not None:
        write_text(options.svg, draw(maps))
    windows = seen.windows(256, 4).split(1)
    influence = block_influence(model, windows)
    ranks = attention_ranks(model, windows)
    keep({"what": "importance", "influence": [vars(each) for each in influence], "attention_rank": ranks})
    names = options.plans.split(",")
    plans = [_plan(model, layer_policies(LayerSelection.parse(name), influence)) for name in names]
    for name, plan, quality in zip(names, plans, _quality(model, plans, scored, options.windows), strict=True):
        keep({"what": "plan", "plan": name, **quality, **_speed(model, plan, texts, options.tokens)})
    if options.each:
        for policy in (Skip(), SkipAttention(), SkipMLP()):
            keep(
                {"what": "each", "policy": policy.name, "ppl_increase": _alone(model, policy, scored, options.windows)}
            )
    if options.json is not None:
        write_text(options.json, "".join(json.dumps(row) + "\n" for row in rows))


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
