"""Every causal LM that transformers knows, tiny and random: whether it runs, and what of it runs how.

``python -m coreskip.bench.census -o bench/rows/census.jsonl``

Each type of `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES` is built in a process of its own with one generic small configuration,
and compared with itself: the tokens under a dense plan, decode steps with half of the neurons of its MLPs or one expert
a token (against the model's own modules with the others' weights at zero), the logits after `unwrap`. A census that was
stopped goes on where it was.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import click
import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers.cache_utils import Cache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from coreskip.bench.provenance import provenance, write_rows
from coreskip.predictors.anatomy import Experts, dissect
from coreskip.predictors.errors import CoreskipError
from coreskip.predictors.expert_policies import AllExperts, SkipExperts
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import CoreNeurons, Dense, Static
from coreskip.runtime.wrap import runtime_of, unwrap, wrap

Row = dict[str, Any]

_SECONDS = 240  # for one type
_FORKS = multiprocessing.get_context("fork")
_HIDDEN, _WIDTH, _LAYERS, _HEADS = 64, 96, 4, 4
vocabulary = 128  # tokens of every model
#: What configurations call their sizes; each is given those that it has.
_SIZES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (vocabulary, ("vocab_size", "vocab_size_per_layer_input")),
    (_HIDDEN, ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim", "lru_width")),
    (_WIDTH, (
        "intermediate_size", "n_inner", "ffn_dim", "d_ff", "dff", "dim_ff", "ffn_hidden_size", "decoder_ffn_dim",
        "encoder_ffn_dim", "shared_expert_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp",
        "dense_intermediate_size", "intermediate_dim",
    )),
    (48, ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size")),
    (_LAYERS, ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")),
    (_HEADS, (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
        "num_linear_attention_heads",
    )),
    (2, (
        "num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k",
        "moe_top_k", "n_group", "mamba_n_groups", "attn_layer_period", "expert_layer_period",
    )),
    (16, (
        "head_dim", "attention_head_dim", "kv_channels", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim",
        "v_head_dim", "qk_head_dim", "dim_head", "linear_key_head_dim", "linear_value_head_dim", "mamba_d_head",
        "index_head_dim", "global_head_dim",
    )),
    (8, (
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts",
        "qk_rope_head_dim", "rotary_dim", "sliding_window", "mamba_d_state", "ssm_state_size", "mamba_n_heads",
        "moe_num_primary_experts",
    )),
    (1, (
        "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "topk_group", "first_k_dense_replace",
        "attn_layer_offset", "expert_layer_offset",
    )),
    (256, ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")),
)  # fmt: skip
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "is_decoder": True, "use_cache": True}
#: What is tried when the sizes above do not go together, one after the other.
_OTHERWISE: tuple[Row, ...] = (
    {},
    {"num_key_value_heads": _HEADS, "num_kv_heads": _HEADS},
    {"num_key_value_heads": _HEADS, "qk_rope_head_dim": 8, "head_dim": 8, "rope_head_dim": 8},
    {"head_dim": None, "intermediate_size": None},
    {"num_hidden_layers": 8, "num_layers": 8, "n_layer": 8},
    {"hidden_size": 128, "num_key_value_heads": _HEADS},
    # hybrids, whose default layers are more than these few
    {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "attn_layer_indices": [1, 3],
        "num_kv_shared_layers": 0,
    },
    {"layer_types": ["mamba", "attention"] * 2, "layers_block_type": ["mamba", "attention"] * 2, "mamba_d_ssm": 128},
    {"layer_types": ["conv", "full_attention"] * 2, "num_key_value_heads": 2},
    {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 0},
    {
        "attention_types": [[["global", "local"], 2]],
        "qk_rope_head_dim": 8,
        "head_dim": 8,
        "num_key_value_heads": _HEADS,
    },
)


def build(model_type: str) -> Any:
    """A tiny random model of one type.

    Raises:
        Exception: what its classes say to every configuration that was tried; the first of them.
    """
    first: Exception | None = None
    for changes in _OTHERWISE:
        try:
            return _random(_configuration(model_type, changes))
        except Exception as error:  # classes raise whatever they like
            first = first or error
    assert first is not None
    raise first


def _configuration(model_type: str, changes: Row) -> Any:
    default = transformers.AutoConfig.for_model(model_type)
    values = {**{name: size for size, names in _SIZES for name in names}, **_TOKENS, **changes}
    return type(default)(**_known(default, values))


def _known(default: Any, values: Row) -> Row:
    """Of the values, those that a configuration has, in the configurations inside it, too."""
    names = {*vars(default), *type(default).attribute_map}
    found = {name: value for name, value in values.items() if name in names and value is not None}
    found |= {name: value for name, value in values.items() if name == "eos_token_id"}
    for name, inner in vars(default).items():
        if isinstance(inner, transformers.PreTrainedConfig):
            found[name] = _known(inner, values)
    return found


def _random(config: Any) -> Any:
    """A model whose logits are far from ties, and whose caches work."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and parameter.is_floating_point():
                parameter.normal_(0.0, 0.2)
            elif "bias" in name and parameter.is_floating_point():
                parameter.normal_(0.0, 0.1)
        model(prompt(2), use_cache=True)
    return model


def examine(model_type: str) -> Row:
    """What one type does; see the columns of the table."""
    row: Row = {"type": model_type, "built": False, "refused": None, "error": None}
    try:
        model = build(model_type)
        expected = [_generate(model, rows) for rows in (1, 2)]
        before = _logits(model)
    except Exception as error:
        return {**row, "error": text_of(error)}
    row |= {"built": True, "parameters": sum(p.numel() for p in model.parameters())}
    try:
        anatomy = dissect(model)
    except CoreskipError as error:
        return {**row, "refused": str(error)}
    row |= {
        "cache": isinstance(cache_of(model), Cache),  # without one every pass is prefill, and so dense
        "layers": len(anatomy),
        "mlps": sum(mlp is not None for mlp in anatomy.feed_forwards),
        "experts": sum(experts is not None for experts in anatomy.experts),
        "routers": sum(experts is not None and experts.router is not None for experts in anatomy.experts),
    }
    checks = {"dense": _dense, "neurons": _neurons, "core": _core, "top_expert": _top_expert}
    for name, check in checks.items() if row["cache"] else [("dense", _dense)]:
        try:
            row |= {name: check(model, row, expected)}
        except CoreskipError as error:
            row |= {name: f"refused: {error}"}
        except Exception as error:
            row |= {name: "error", "error": text_of(error)}
    row["unwrap"] = bool(torch.equal(_logits(model), before))
    return row


def _dense(model: Any, row: Row, expected: list[Tensor]) -> str:
    """Whether a dense plan gives the model's own tokens; notes why it does not run natively, if it does not, and how
    many halves of its layers, of how many, then do."""
    wrap(model)
    try:
        same = all(torch.equal(_generate(model, rows), tokens) for rows, tokens in zip((1, 2), expected, strict=True))
        steps = runtime_of(model).steps
        native, halves = steps.native, steps.spans.halves
        row |= {"native": native.ready, "reason": None if native.ready else native.refusal or "no step was covered"}
        row |= {"halves": list(halves) if halves is not None else None}
    finally:
        unwrap(model)
    return "right" if same else "wrong"


def _neurons(model: Any, row: Row, expected: list[Tensor]) -> str:
    """Whether decode steps with half of every MLP's neurons are those of a twin whose other neurons give nothing."""
    if not row["mlps"]:
        return "no MLP"
    dense = Plan.dense(model)
    policies = [Static(torch.arange(0, width, 2)) if width else Dense() for width in dense.model.intermediate_sizes]
    plan = Plan(tuple(map(LayerPlan, policies)), dense.model, {"method": "static"})
    wrap(model, plan)
    try:
        got, skipped = decoded(model), runtime_of(model).usage.neuron_sparsity()
    finally:
        unwrap(model)
    if skipped == 0:
        return "nothing skipped"
    kept = [(mlp.matrices().down, mlp.matrices().down.clone()) for _, mlp in dissect(model).present]

    def halve(half: bool) -> None:
        with torch.no_grad():
            for down, whole in kept:
                down.copy_(whole)
                if half:
                    down[1::2] = 0.0

    expected_logits = decoded(model, halve)
    halve(False)
    far = float((got - expected_logits).abs().max() / expected_logits.abs().max())
    return "right" if far < 1e-3 else f"wrong by {far:.1e}"


def _core(model: Any, row: Row, expected: list[Tensor]) -> str:
    """Whether neurons that prompts choose are chosen, and text is generated."""
    if not row["mlps"]:
        return "no MLP"
    dense = Plan.dense(model)
    policies = [CoreNeurons(0.4, 0.5, "griffin") if width else Dense() for width in dense.model.intermediate_sizes]
    wrap(model, Plan(tuple(map(LayerPlan, policies)), dense.model, {"method": "core"}))
    try:
        rows = [_generate(model, rows) for rows in (1, 2)]
        chosen = runtime_of(model).usage.neuron_sparsity() > 0
    finally:
        unwrap(model)
    return "right" if chosen and [r.shape for r in rows] == [r.shape for r in expected] else "nothing skipped"


def _top_expert(model: Any, row: Row, expected: list[Tensor]) -> str:
    """Whether decode steps that skip all experts of a token but the first are the model's own with other weights."""
    if not row["experts"]:
        return "no experts"
    dense, anatomy = Plan.dense(model), dissect(model)
    policies = [SkipExperts(1.0) if count else AllExperts() for count in dense.model.experts]
    layers = tuple(LayerPlan(experts=policy) for policy in policies)
    wrap(model, Plan(layers, dense.model, {"method": "skip-experts"}))
    try:
        got, skipped = decoded(model), runtime_of(model).usage.neuron_sparsity()
    finally:
        unwrap(model)
    handles: list[Any] = []

    def first_alone(experts: Experts) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: Row) -> Any:
            weights = experts.routed(args, kwargs)[2]
            left = weights.masked_fill(weights < weights.amax(-1, keepdim=True), 0.0)
            if experts.router is not None and experts.router.choice.normalised:
                left = left * (weights.sum(-1, keepdim=True) / left.sum(-1, keepdim=True))
            return tuple(left if value is weights else value for value in args), kwargs

        return hook

    def change(_: bool) -> None:
        for experts in filter(None, anatomy.experts):
            handles.append(experts.module.register_forward_pre_hook(first_alone(experts), with_kwargs=True))

    expected_logits = decoded(model, change)
    for handle in handles:
        handle.remove()
    if skipped == 0:
        return "nothing skipped"
    far = float((got - expected_logits).abs().max() / expected_logits.abs().max())
    return "right" if far < 1e-3 else f"wrong by {far:.1e}"


def cache_of(model: Any) -> Any:
    with torch.no_grad():
        return getattr(model(prompt(1), use_cache=True), "past_key_values", None)


def prompt(rows: int, length: int = 12) -> Tensor:
    return torch.randint(5, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def _generate(model: Any, rows: int) -> Tensor:
    ids = prompt(rows)
    tokens: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return tokens


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(prompt(2), use_cache=False).logits
    return logits


def decoded(model: Any, change: Any = None) -> Tensor:
    """fp32 logits of four decode steps after a dense prefill; `change(True)` comes between."""
    ids = prompt(1)
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True).past_key_values
        if change is not None:
            change(True)
        steps = [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(8, 12)]
    return torch.cat(steps, 1).float()


def text_of(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def examined(
    examine: Callable[[str], Row], of_all: Row, command: str, output: Path | None, types: str | None
) -> list[Row]:
    """Rows of every type, or of those `types`, which are separated by commas, and of those that `output` has, where
    they are written as they come. of_all: what all of them have. What is there is kept, unless `types` names it."""
    every = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    kept = [json.loads(line) for line in output.read_text().splitlines()] if output and output.exists() else []
    anew = set(types.split(",")) if types else set()
    done = {row["type"]: row for row in kept if row["type"] not in anew}
    wanted = [name for name in every if name in anew or name in done or not anew]
    origin, rows = provenance(command), list[Row]()
    for name in tqdm(wanted, desc="types", unit="type"):
        if name in done:
            rows.append(done[name])
            continue
        start = time.perf_counter()
        row = _apart(examine, name)
        seconds = round(time.perf_counter() - start, 1)
        rows.append({"model": "tiny random models", **of_all, **row, "seconds": seconds, **origin})
        if output is not None:  # what is not reached yet stays
            write_rows(output, rows + [done[name] for name in done if name not in {r["type"] for r in rows}])
    return rows


def _apart(examine: Callable[[str], Row], model_type: str) -> Row:
    """`examine` in a process of its own, which may hang or die. It is forked: to import everything takes longer."""
    receive, send = _FORKS.Pipe(duplex=False)
    process = _FORKS.Process(target=lambda: send.send(examine(model_type)))
    process.start()
    send.close()
    failed: Row = {"type": model_type, "built": False, "refused": None}
    try:
        if not receive.poll(_SECONDS):
            return {**failed, "error": f"took more than {_SECONDS} s"}
        return cast(Row, receive.recv())
    except EOFError:
        process.join()
        return {**failed, "error": f"its process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def of_every_type(
    kind: str, examine: Callable[[str], Row], told: Callable[[list[Row]], str], about: str
) -> click.Command:
    """A command that examines every type, writes rows of this kind, and says what they come to. about: its help."""

    @click.command(help=about)
    @click.option(
        "-o", "--output", type=click.Path(path_type=Path), help="JSON lines, one a type; what is there is kept."
    )
    @click.option("--examine", "one", help="Examine this type alone, here, and print its row.")
    @click.option("--types", help="Only these, separated by commas; they are examined anew.")
    def main(output: Path | None, one: str | None, types: str | None) -> None:
        torch.set_num_threads(1)  # forks have no others
        if one is not None:
            click.echo(json.dumps(examine(one)))
            return
        command = f"python -m coreskip.bench.{kind} -o bench/rows/{kind}.jsonl"
        click.echo(told(examined(examine, {"kind": kind}, command, output, types)))

    return main


def summary(rows: list[Row]) -> str:
    """How many types do what."""
    built = [row for row in rows if row["built"]]
    parts = []
    for name, some in (
        ("dense", [r for r in built if not r.get("experts")]),
        ("mixtures", [r for r in built if r.get("experts")]),
    ):
        right = [r for r in some if r.get("dense") == "right" and r.get("unwrap")]
        natively, in_part = sum(bool(r.get("native")) for r in some), sum(bool(r.get("halves")) for r in some)
        parts.append(f"{name}: {len(some)} built, {len(right)} right, {natively} native, {in_part} in part")
    return f"{len(rows)} types; " + "; ".join(parts)


# found when it is called: tests put others in its place
main = of_every_type("census", lambda name: examine(name), summary, "A census of all causal LMs of transformers.")


if __name__ == "__main__":  # a process of its own: whoever calls `main` keeps how much is logged
    transformers.logging.set_verbosity_error()
    logging.getLogger("coreskip").setLevel(logging.ERROR)
    main()
