"""Rows as tables: on the terminal, and in Markdown between the marks of a document."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coreskip.bench.memory_columns import MEMORY
from coreskip.bench.row_schema import Row, read
from coreskip.predictors.errors import CoreskipError
from coreskip.predictors.files import read_text


def _speed(row: Row) -> str:
    return f"{row.tok_s['p50']:.1f} ({row.tok_s['p20']:.1f}-{row.tok_s['p80']:.1f})"


# heading -> how a row fills it
COLUMNS: dict[str, Callable[[Row], str]] = {
    "runner": lambda row: row.runner,
    "dtype": lambda row: row.dtype,
    "keep": lambda row: "" if row.method == "dense" else f"{row.keep:.2f} {row.method}",
    "tok/s (p20-p80)": _speed,
    "x best HF": lambda row: "" if row.speedup is None else f"{row.speedup['p50']:.2f}",
    "TTFT ms": lambda row: f"{row.ttft_ms['p50']:.0f}",
    "MB/token": lambda row: f"{row.weight_bytes_per_token / 1e6:.0f}",
    "GB/s": lambda row: f"{row.gb_s:.1f}",
    "of bandwidth": lambda row: f"{row.bandwidth_share:.0%}",
    "ppl": lambda row: "" if row.ppl is None else f"{row.ppl:.2f}",
    "peak GB": lambda row: f"{row.memory_bytes / 1e9:.2f}",
    "load + warm-up s": lambda row: f"{row.load_s:.0f} + {row.warmup_s:.0f}",
}


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table of these rows, its heading first."""
    return [list(COLUMNS), *([cell(row) for cell in COLUMNS.values()] for row in rows)]


def terminal_table(rows: Sequence[Row]) -> str:
    """Rows as aligned text."""
    table = cells(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table, with a line that says where they come from."""
    head, *lines = ("| " + " | ".join(line) + " |" for line in cells(rows))
    return "\n".join([head, "| --- " * len(COLUMNS) + "|", *lines, "", *origins(rows)])


_WEIGHTS = {"int4": "4-bit weights", "int8": "8-bit weights"}
_NAMES = {
    "hf": "transformers",
    "coreskip-dense": "coreskip, nothing left out",
    "coreskip-lookup": "the same, drafts from the text itself",
}
_METHODS = {"sketch": "coreskip, neurons chosen at every token", "core": "coreskip, neurons fixed for each prompt"}
# of a run with more runners, what the short table shows
_HEADLINE = [("hf", "float32"), ("hf", "bfloat16"), ("coreskip-dense", "float32"), ("coreskip-dense", "int4")]
_HEADLINE += [("coreskip-lookup", "int4"), ("coreskip", "int4")]
# of plans, by method and weights: how `coreskip.bench.method_quality` calls them
_SCORED = {
    ("dense", "int4"): "dense, int4 in groups",
    ("sketch", "int4"): "4-bit sketch, greedy, the rest int4",
    ("core", "int4"): "GRIFFIN (stability-guided, its score)",
}


def headline_table(rows: Sequence[Row], quality: Sequence[dict[str, Any]]) -> str:
    """Speed and quality in one short Markdown table: speeds from rows of one run, and what the same method costs at the
    same share of neurons from rows of `coreskip.bench.method_quality`. In float32 with nothing left out it costs
    nothing: the tokens are the same. Other runners are not shown."""
    table = [["what runs", "MLP neurons left out", "tok/s", "× transformers", "first token", "increase of perplexity"]]
    table.append(["---"] * len(table[0]))
    used: list[dict[str, Any]] = []
    for row in (row for row in rows if (row.runner, row.dtype) in _HEADLINE):
        name = _SCORED.get((row.method, row.dtype))
        scored = [line for line in quality if line["name"] == name and math.isclose(line["keep"], row.keep)][:1]
        used += scored
        exact = (row.method, row.dtype) == ("dense", "float32")
        what = _NAMES.get(row.runner) or _METHODS.get(row.method, f"coreskip, {row.method}")
        table.append(
            [
                f"{what}; {_WEIGHTS.get(row.dtype, row.dtype)}",
                f"{100 * (1 - row.keep):.0f} %",
                f"{row.tok_s['p50']:.0f}",
                "" if row.speedup is None else f"{row.speedup['p50']:.1f}",
                f"{row.ttft_ms['p50']:.0f} ms",
                "+0 %" if exact else _increase(scored[0]) if scored else "",
            ]
        )
    sources = dict.fromkeys(map(_short_origin, used))
    return "\n".join(["| " + " | ".join(line) + " |" for line in table] + ["", *origins(rows), *sources])


def _short_origin(row: dict[str, Any]) -> str:
    weights = row.get("weights") or row["dtype"]
    return (
        f"Perplexity of {row['name']}: weights in {weights}, {row['tokens']} tokens of {row['text']}, dense "
        f"{row['dense']['ppl']:.2f}, commit {row['commit'] or 'unknown'}; the command is in bench/RESULTS.md"
    )


def _noise(row: Row) -> str:
    return "noise unknown" if row.noise is None else f"noise {row.noise:.0%}"


def origins(rows: Sequence[Row]) -> list[str]:
    """Per run: what it ran on, how much the machine's noise was, and the command that makes it again; then the rows'
    notes."""
    firsts = {row.run: row for row in reversed(rows)}
    runs = [
        f"{row.model} on {row.device}, {row.threads} threads, {row.tokens} tokens after each of {row.workload}, "
        f"{row.samples} samples; read bandwidth {row.machine_gb_s:.1f} GB/s; {_noise(row)}; "
        f"{row.time[:10]}, commit {row.commit or 'unknown'}: `{row.command}`"
        for row in sorted(firsts.values(), key=lambda row: row.time)
    ]
    return runs + list(dict.fromkeys(f"{row.runner}: {row.notes}" for row in rows if row.notes))


def quality_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `coreskip.bench.method_quality` as a Markdown table, and per run a line that says where it comes from."""
    columns = {heading: [cell(row) for row in rows] for heading, cell in _QUALITY.items()}
    shown = {heading: cells for heading, cells in columns.items() if any(cells)}  # older rows do not say everything
    lines = [list(shown), ["---"] * len(shown), *map(list, zip(*shown.values(), strict=True))]
    firsts = {row["command"]: row for row in reversed(rows)}
    return "\n".join(
        ["| " + " | ".join(line) + " |" for line in lines] + [""] + list(map(_origin, reversed(firsts.values())))
    )


def kernel_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `coreskip.bench.kernels` as a Markdown table: a layer of a native step by the share of neurons kept."""
    steps = [row for row in rows if row["call"] == "step"]
    keeps = sorted({row["keep"] for row in steps}, reverse=True)
    lines = [["MLP", "weights", "torch dense, µs", *(f"keep {keep:g}, µs (of bandwidth, × torch)" for keep in keeps)]]
    lines.append(["---"] * len(lines[0]))
    for shape, fmt in dict.fromkeys((row["shape"], row["fmt"]) for row in steps):
        here = [row for row in rows if (row["shape"], row["fmt"]) == (shape, fmt)]
        dense = next(row["us_per_layer_p50"] for row in here if row["backend"] == "torch")
        found = {row["keep"]: row for row in here if row["call"] == "step"}
        cell = "{us_per_layer_p50:.0f} ({share_of_bandwidth:.2f}, {times:.1f}×)"
        times = {keep: dense / row["us_per_layer_p50"] for keep, row in found.items()}
        done = [cell.format(**found[keep], times=times[keep]) if keep in found else "" for keep in keeps]
        lines.append([shape, fmt, f"{dense:.0f}", *done])
    first, read = rows[0], sorted({row["bandwidth_gb_per_s"] for row in rows})
    origin = (
        f"{first['device']} ({first['isa']}), {first['threads']} threads; the memory read at {read[0]:.1f} to "
        f"{read[-1]:.1f} GB/s; {first['date']}, commit {first['commit'] or 'unknown'}: `{first['command']}`"
    )
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", origin])


def _of_rows(row: dict[str, Any]) -> str:
    return f"{row['rows']} row{'s' * (row['rows'] > 1)}"


def _of_prompt(row: dict[str, Any]) -> str:
    return f"prompt of {row['prompt_tokens']}"


def batch_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `coreskip.bench.batches` as Markdown tables: how many times as fast as the unwrapped model each batch
    decodes, what the native step does not cover, and prompts."""
    tables = []
    for kind, heading, column in (
        ("batch", "plan", _of_rows),
        ("fallback", "dense plan with", _of_rows),
        ("prefill", "", _of_prompt),
    ):
        lines: dict[tuple[str, str], dict[str, str]] = {}
        for row in rows:
            if row["kind"] != kind:
                continue
            kept = "" if row["keep"] == 1 else f" {row['keep']:.2f}"
            name = row.get("case", "") if kind == "fallback" else "" if kind == "prefill" else row["plan"] + kept
            speed = (
                f" ({row['tok_s']['coreskip']:.0f} tok/s)" if kind == "batch" else f" ({row['ms']['coreskip']:.0f} ms)"
            )
            lines.setdefault((row["format"], name), {})[column(row)] = f"{row['times']:.2f}{speed}"
        if lines:
            columns = list(dict.fromkeys(name for cells in lines.values() for name in cells))
            table = [["weights", heading, *columns], ["---"] * (2 + len(columns))]
            table += [[*key, *(cells.get(name, "") for name in columns)] for key, cells in lines.items()]
            tables.append("\n".join("| " + " | ".join(line) + " |" for line in table))
    first = rows[0]
    origin = (
        f"{first['model']} on {first['device']}, {first['threads']} threads; times as fast as the unwrapped model in "
        f"{' or '.join(name for name in first['ms'] if name != 'coreskip')}; {first['time'][:10]}, "
        f"commit {first['commit'] or 'unknown'}: `{first['command']}`"
    )
    return "\n\n".join([*tables, origin])


def _increase(row: dict[str, Any]) -> str:
    digits = 2 if abs(row["ppl_increase"]) < 0.1 else 0
    return f"{100 * row['ppl_increase']:+.{digits}f} ± {100 * row['ppl_increase_stderr']:.{digits}f} %"


_SPEED = "tok/s (p20-p80)"
# heading -> how a row of quality fills it
_QUALITY: dict[str, Callable[[dict[str, Any]], str]] = {
    "method": lambda row: str(row["name"]),
    "keep": lambda row: f"{row['keep']:g}",
    "neurons skipped": lambda row: f"{100 * row['neuron_sparsity']:.0f} %",
    "perplexity": lambda row: f"{row['sparse']['ppl']:.2f}",
    "increase": _increase,
    "KL": lambda row: f"{row['kl']:.3f}",
    "top-1 agreement": lambda row: f"{100 * row['top1_agreement']:.0f} %",
    "MB per token": lambda row: _megabytes(row["megabytes"]) if "megabytes" in row else "",
    _SPEED: lambda row: "{p50:.0f} ({p20:.0f}-{p80:.0f})".format(**row["tok_s"]) if "tok_s" in row else "",
    "x dense fp32": lambda row: f"{row['speedup']:.2f}" if "speedup" in row else "",
}


def _megabytes(some: float) -> str:
    return f"{some:.0f}" if some >= 10 else f"{some:.2f}"


# heading -> how a row fills it: of rounding weights, of processes that share cores, of starts
_ROUNDING: dict[str, Callable[[dict[str, Any]], str]] = {
    "weights": lambda row: str(row["name"]),
    "perplexity": lambda row: f"{row['sparse']['ppl']:.2f}",
    "increase": _increase,
    "KL": lambda row: f"{row['kl']:.4f}",
    "top-1 agreement": lambda row: f"{100 * row['top1_agreement']:.1f} %",
    "MB per token": lambda row: f"{row['megabytes']:.0f}",
    "rounded in": lambda row: f"{row['seconds']:.0f} s",
}


def _quantiles_of(name: str) -> Callable[[dict[str, Any]], str]:
    """Two quantiles of a row, in the form p50 (p95)."""
    return lambda row: f"{row[name]['p50']:.0f} ({row[name]['p95']:.0f})" if row.get(name) else ""


def _increase_over_dense(row: dict[str, Any]) -> str:
    return f"{100 * row['ppl_increase']:+.1f} ± {100 * row['ppl_increase_stderr']:.1f} %"


def _given(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)


def _increase_on_prose(row: dict[str, Any]) -> str:
    if "prose" not in row:
        return ""
    found = row["prose"]
    error = found["increase_stderr"]  # of one window there is none
    return f"{100 * found['increase']:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + " %"


def _how_steps_run(row: dict[str, Any]) -> str:
    if row.get("native"):
        return "native"
    some = "native in {} of {} halves of layers: ".format(*row["halves"]) if row.get("halves") else ""
    return some + str(row.get("reason") or "")


def _parts_of_layers(row: dict[str, Any]) -> str:
    return f"{row['mlps']}, {row['experts']} of {row['layers']}" if "layers" in row else ""


#: ways of generating, as rows of `coreskip.bench.modes` name them
MODES = (
    "greedy", "batch", "sampling", "beams", "static cache", "prompt in chunks", "exact", "lookup", "packed",
    "packed int4", "int4",
)  # fmt: skip


def _in_mode(name: str, row: dict[str, Any]) -> str:
    return str(row.get(name, "")) or "-"


_PLAIN: dict[str, dict[str, Callable[[dict[str, Any]], str]]] = {
    **MEMORY,
    "sharing": {
        "weights": lambda row: str(row["dtype"]),
        "processes": lambda row: str(row["processes"]),
        "tok/s of each (least-most)": lambda row: "{1:.0f} ({0:.0f}-{2:.0f})".format(*row["tok_s"]),
        "of the speed alone": lambda row: f"{row['of_alone']:.2f}",
        "of a fair share": lambda row: f"{row['of_fair_share']:.2f}",
    },
    "leaving_out": {
        "model": lambda row: f"{row['model']}, {row['weights']}",
        "plan": lambda row: str(row["plan"]),
        "neurons left out": lambda row: f"{100 * row['left_out']:.0f} %",
        "MB per token": lambda row: f"{row['megabytes']:.0f}",
        "tok/s": lambda row: f"{row['tok_s']:.1f}",
        "x dense": lambda row: f"{row['of_dense']:.2f}",
        "x dense, with the prompt": lambda row: f"{row['of_dense_with_prompt']:.2f}",
        "settling, ms": lambda row: f"{row['settling_ms']:.1f}" if "settling_ms" in row else "",
    },
    "curve": {
        "neurons": lambda row: str(row["name"]),
        "kept": lambda row: f"{row['keep']:.0%}",
        "MB per token": lambda row: f"{row['megabytes']:.0f}",
        "tok/s": lambda row: f"{row['tok_s']:.0f}" if "tok_s" in row else "",
        "x dense int4": lambda row: f"{row['of_dense']:.2f}" if "of_dense" in row else "",
        "increase of perplexity over dense int4": _increase_over_dense,
        "KL": lambda row: f"{row['kl']:.3f}",
    },
    "natural_zeros": {
        "model": lambda row: str(row["model"]),
        "way": lambda row: str(row["plan"]),
        "neurons left out": lambda row: f"{100 * row['left_out']:.0f} %",
        "recall": lambda row: "" if row["recall"] is None else f"{100 * row['recall']:.1f} %",
        "MB per token": lambda row: f"{row['megabytes']:.0f}",
        "tok/s": lambda row: f"{row['tok_s']:.1f}",
        "x dense": lambda row: f"{row['of_dense']:.2f}",
        "tokens as dense, of 64": lambda row: str(row["same_tokens"]),
    },
    "experts": {
        "model": lambda row: str(row["model"]),
        "way": lambda row: str(row["way"]),
        "tok/s": lambda row: f"{row['tok_s']:.1f}",
        "x transformers": lambda row: f"{row['of_transformers']:.1f}",
        "MB per token": lambda row: f"{row['megabytes']:.0f}",
        "of a token's experts": lambda row: f"{row['experts_megabytes']:.0f}",
        "of bandwidth": lambda row: f"{row['bandwidth_share']:.0%}",
    },
    "export": {
        "runtime": lambda row: str(row["runtime"]),
        "weights": lambda row: str(row["weights"]),
        "plan": lambda row: str(row["plan"]),
        "tok/s": lambda row: f"{row['tok_s']:.1f}",
        "x dense": lambda row: f"{row['of_dense']:.2f}",
        "first token, ms": lambda row: f"{row['ttft_ms']:.0f}",
        "MB per token": lambda row: f"{row['megabytes']:.0f}",
        "of bandwidth": lambda row: f"{row['bandwidth_share']:.0%}",
    },
    "export_rules": {
        "way": lambda row: str(row["way"]),
        "us per layer": lambda row: f"{row['us_per_layer']:.1f}",
        "x dense": lambda row: f"{row['of_dense']:.2f}",
    },
    "neuron_groups": {
        "shape": lambda row: str(row["shape"]),
        "way": lambda row: str(row["way"]),
        "neurons left out": lambda row: f"{100 * row['left_out']:.0f} %",
        "us per layer": lambda row: f"{row['us_per_layer']:.1f}",
        "of dense": lambda row: f"{row['of_dense']:.2f}",
    },
    "concurrency": {
        "streams": lambda row: f"{row['streams']}, {row['weights']}",
        "tok/s of all": lambda row: f"{row['tok_s']:.0f}",
        "x one stream": lambda row: f"{row['times_the_first']:.2f}",
        "while all decode": lambda row: f"{row['decode_tok_s']:.0f}",
        "first token, ms: p50 (p95)": _quantiles_of("first_token_ms"),
        "between tokens, ms: p50 (p95)": _quantiles_of("between_tokens_ms"),
        "texts as alone": lambda row: str(row["same_as_alone"]),
    },
    "serve": {
        "server": lambda row: str(row["server"]),
        "clients": lambda row: str(row["clients"]),
        "tok/s of all": lambda row: f"{row['tok_s']:.0f}" if "tok_s" in row else str(row["failed"]),
        "first token, ms: p50 (p95)": _quantiles_of("ttft_ms"),
        "between tokens, ms: p50 (p95)": _quantiles_of("inter_token_ms"),
        "texts as alone": lambda row: str(row.get("same_as_alone", "")),
        "errors": lambda row: str(len(row["errors"])) if "errors" in row else "",
    },
    "stream_peers": {
        "system": lambda row: str(row["system"]),
        "streams": lambda row: str(row["streams"]),
        "tok/s of all": lambda row: f"{row['tok_s']:.0f}" if "tok_s" in row else str(row["failed"]),
        "computes": lambda row: str(row["notes"]),
    },
    "soak": {
        "server": lambda row: str(row["server"]),
        "minutes": lambda row: f"{row['minutes']:g}",
        "clients": lambda row: str(row["clients"]),
        "requests": lambda row: str(sum(row["requests"].values())),
        "wrong": lambda row: str(sum(row["wrong"].values())),
        "MB by seconds": lambda row: ", ".join(f"{at}: {mb:.0f}" for at, mb in row["memory_mb_by_seconds"].items()),
    },
    "sources": {
        "score": lambda row: str(row["name"]),
        "chosen": lambda row: (
            "from each prompt" if row["chosen"] == "prompt" else f"once, per {row.get('per', 'layer')}"
        ),
        "keep": lambda row: f"{row['keep']:g}",
        "increase of perplexity": _increase,
        "KL": lambda row: f"{row['kl']:.3f}",
        "top-1 agreement": lambda row: f"{100 * row['top1_agreement']:.0f} %",
    },
    "purpose": {
        "plan made for": lambda row: str(row["name"]),
        "score": lambda row: str(row["score"]),
        "measured on": lambda row: str(row["on"]),
        "keep": lambda row: f"{row['keep']:g}",
        "increase of perplexity": _increase,
        "KL": lambda row: f"{row['kl']:.3f}",
    },
    "lm_head": {
        "neuron": lambda row: f"{row['layer']}:{row['neuron']}",
        "token": lambda row: repr(row["token"]),
        "clearness": lambda row: f"{row['clearness']:.0f}",
        "clamped at": lambda row: f"{row['clamped_at']:.1f}",
        "its probability": lambda row: f"{row['plain']:.2g}",
        "clamped": lambda row: f"{row['clamped']:.2g}",
        "times": lambda row: f"{row['clamped'] / row['plain']:.1f}",
    },
    "export_texts": {
        "plan": lambda row: str(row["plan"]),
        "runtime": lambda row: str(row["runtime"]),
        "equal": lambda row: (
            f"{row['equal']} of {row['steps']} steps" if "steps" in row else f"{row['equal']} of {row['texts']} texts"
        ),
        "tokens before they part": lambda row: (
            f"{row['before_they_part']:.0f} of {row['tokens']}" if "tokens" in row else ""
        ),
        "at a gap of at most": lambda row: _given(row.get("largest_gap"), "{:.2g}"),
        "largest error of logits": lambda row: _given(row.get("error"), "{:.1e}"),
        "of float32 itself": lambda row: _given(row.get("error_of_float32"), "{:.1e}"),
    },
    "drafts": {
        "score": lambda row: str(row["name"]),
        "keep": lambda row: f"{row['keep']:g}",
        "drafted": lambda row: str(row["drafted"]),
        "accepted": lambda row: f"{100 * row['share']:.0f} %",
        "tokens a dense pass": lambda row: f"{row['tokens_per_pass']:.2f}",
    },
    "behaviour": {
        "way": lambda row: str(row["name"]),
        "of the neurons": lambda row: _given(row.get("share"), "{:.1%}"),
        "by": lambda row: _given(row.get("ranking"), "{}"),
        "strength": lambda row: _given(row.get("strength"), "{:g}"),
        "perplexity on code": lambda row: f"{row['code']['ppl']:.1f}" if "code" in row else "",
        "times": lambda row: f"{1 + row['code']['increase']:.2f}" if "code" in row else "",
        "on prose": lambda row: f"{row['prose']['ppl']:.2f}" if "prose" in row else "",
        "increase": _increase_on_prose,
        "abstains from code": lambda row: _given(row.get("abstained_code"), "{:.1%}"),
        "from prose": lambda row: _given(row.get("abstained_prose"), "{:.1%}"),
        "from the language reference": lambda row: _given(row.get("abstained_reference"), "{:.1%}"),
    },
    "steering": {
        "direction": lambda row: str(row["method"]),
        "added after": lambda row: str(row["layers"]),
        "strength": lambda row: f"{row['strength']:+g}",
        "chances of good words": lambda row: f"{row['good_share']:.3f}",
        "perplexity on prose": lambda row: f"{row['ppl']:.2f}",
    },
    "census": {
        "type": lambda row: str(row["type"]),
        "built": lambda row: "yes" if row["built"] else str(row["error"]),
        "MLPs, mixtures of layers": _parts_of_layers,
        "dense plan": lambda row: str(row.get("dense", "refused" if row.get("refused") else "")),
        "half of the neurons": lambda row: str(row.get("neurons", "")).partition(":")[0],
        "one expert a token": lambda row: str(row.get("top_expert", "")).partition(":")[0],
        "unwrap": lambda row: ("exact" if row["unwrap"] else "not exact") if "unwrap" in row else "",
        "decode steps": _how_steps_run,
    },
    "modes": {
        "type": lambda row: str(row["type"]),
        "steps": lambda row: str(row.get("steps", "")),
        **{name: functools.partial(_in_mode, name) for name in MODES},
    },
    "gpu": {
        "shape": lambda row: str(row["shape"]),
        "way": lambda row: str(row["name"]),
        "weights": lambda row: str(row["fmt"] or "as loaded"),
        "keep": lambda row: f"{row['keep']:g}",
        "products a layer": lambda row: _given(row["products"], "{}"),
        "small launches a layer": lambda row: _given(row["small"], "{}"),
        "GB a token": lambda row: "" if row["nbytes"] is None else f"{row['nbytes'] / 1e9:.2f}",
        "predicted us": lambda row: "" if row["us"] is None else f"{row['us']['p50']:.0f}",
        "tok/s": lambda row: _given(row["tok_s"], "{:.0f}"),
        "of copy bandwidth": lambda row: _given(row["share"], "{:.3f}"),
    },
    "starting": {
        "model": lambda row: f"{row['model']}, {row['weights']}",
        "packed in": lambda row: f"{row['pack_s']:.0f} s",
        "packed MB": lambda row: f"{row['packed_bytes'] / 1e6:.0f}",
        "loaded in": lambda row: f"{row['load_s']:.2f} s",
        "wrapped in": lambda row: f"{row['wrap_s']:.2f} s",
        "first token after": lambda row: f"{row['first_token_s']:.2f} s",
        "resident, of packed bytes": lambda row: f"{row['of_packed']:.2f}",
    },
}


def plain_table(rows: Sequence[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    """Rows by these columns, with a line that says where they come from."""
    table = [list(columns), ["---"] * len(columns), *([fill(row) for fill in columns.values()] for row in rows)]
    first = rows[0]
    origin = f"{first['model']} on {first['device']}; {first['time'][:10]}, commit {first['commit'] or 'unknown'}"
    lines = ["| " + " | ".join(line) + " |" for line in table]
    return "\n".join([*lines, "", f"{origin}: `{first['command']}`"])


def _origin(row: dict[str, Any]) -> str:
    """Where a run's quality comes from, and its speeds."""
    origin = (
        f"{row['model']} {row['dtype']} on {row['device']}, {row['tokens']} tokens of {row['text']} in "
        f"{row['windows']} windows, perplexity of the dense model {row['dense']['ppl']:.2f}; {row['time'][:10]}, "
        f"commit {row['commit'] or 'unknown'}: `{row['command']}`"
    )
    if "timed" not in row:
        return origin
    timed = row["timed"]
    return (
        f"{origin}; speeds with {timed['threads']} threads, commit {timed['commit'] or 'unknown'}: `{timed['command']}`"
    )


def _table_of(folder: Path, names: str) -> str:
    """The table of files of rows, joined by ``+``: of quality where they have a KL divergence, of kernels, else of
    speed; the short one of both where `names` begin with "short of"."""
    paths = [folder / f"{name}.jsonl" for name in names.removeprefix(_SHORT).split("+")]
    try:
        lines = [json.loads(line) for path in paths for line in read_text(path, "the rows").splitlines()]
    except ValueError as error:
        raise CoreskipError(f"cannot read the rows of the table {names}: {error}") from None
    if names.startswith(_SHORT):
        return headline_table(read(paths[:1]), [line for line in lines if "kl" in line])
    if lines and "times" in lines[0]:
        return batch_table(lines)
    if lines and lines[0].get("kind") in _PLAIN:
        return plain_table(lines, _PLAIN[lines[0]["kind"]])
    if lines and "kl" in lines[0] and "calibration_tokens" in lines[0]:
        speed = {_SPEED: _QUALITY[_SPEED]} if any("tok_s" in line for line in lines) else {}
        return plain_table(lines, {**_ROUNDING, **speed})
    if lines and "kl" in lines[0]:
        return quality_table(lines)
    if lines and "us_per_layer_p50" in lines[0]:
        return kernel_table(lines)
    return markdown_table(read(paths))


_MARK = "<!-- table: "
_SHORT = "short of "


def fill_tables(text: str, folder: Path) -> str:
    """`text` with every table between ``<!-- table: NAME -->`` and ``<!-- end table -->`` made anew from
    ``folder/NAME.jsonl``, or from several files joined by ``+``; NAME may begin with "short of", see `headline_table`.

    Raises:
        CoreskipError: a mark without its end, or without rows.
    """
    head, *marked = text.split(_MARK)
    done = [head]
    for piece in marked:
        name, close, rest = piece.partition(" -->")
        _, end, tail = rest.partition("<!-- end table -->")
        if not close or not end:
            raise CoreskipError(f"the table {name.strip()[:40]!r} has no `<!-- end table -->`")
        done.append(f"{_MARK}{name} -->\n{_table_of(folder, name)}\n{end}{tail}")
    return "".join(done)
