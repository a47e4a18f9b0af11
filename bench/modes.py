"""Every decoder that transformers has, tiny and random, in every way of generating: whether a wrapped model gives its
own tokens.

``python -m coreskip.bench.modes -o bench/rows/modes.jsonl``

Each type of the census is built in a process of its own and generates before it is wrapped and after: greedily, in a
batch of which a row is padded, sampling with a seed, with beams, over a static cache, with its prompt in chunks, in
exact mode under a plan that leaves out half of its neurons or all experts of a token but one, and under one that keeps
all (drafts are looked up in the text); packed, as it was loaded and in 4 bits. Steps in 4 bits are compared with the
modules that multiply with the same numbers. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.cache_utils import Cache

from coreskip.bench.census import Row, build, cache_of, decoded, of_every_type, prompt, text_of, vocabulary
from coreskip.bench.tables import MODES
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.errors import CoreskipError, PlanError
from coreskip.predictors.expert_policies import AllExperts, SkipExperts
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import Dense, Run, Skip, Static
from coreskip.runtime.load import load
from coreskip.runtime.pack import pack
from coreskip.runtime.wrap import runtime_of, unwrap, wrap

_NEW = 16
_CLOSE = 0.05  # standard deviations of the logits, between steps and modules that read the same numbers

#: by the names of the row: what `generate` is asked for
_ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "batch": {},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "prompt in chunks": {"prefill_chunk_size": 4},
}


def examine(model_type: str) -> Row:
    """What one type does in every mode: "same", or what else; "" where the model itself does not do it."""
    row: Row = {"type": model_type, "built": False}
    try:
        model = build(model_type)
        dissect(model)
    except Exception as error:  # classes raise whatever they like
        return {**row, "error": text_of(error)}
    row = {**row, "built": True, "error": None}
    expected: dict[str, Tensor | None] = {name: _tried(model, name) for name in _ASKED}
    repeated = _generated(model, "greedy", _repeating())
    row |= _noted(lambda: _plainly(model, expected))
    row |= _noted(lambda: {"exact": _exactly_lossy(model, repeated)}, "exact")
    row |= _noted(lambda: {"lookup": _exactly(model, Plan.dense(model), repeated)}, "lookup")
    row |= _noted(lambda: {"int4": _in_four_bits(model)}, "int4")
    row |= _noted(lambda: {"packed": _packed(model, "as-loaded", expected["greedy"])}, "packed")
    row |= _noted(lambda: {"packed int4": _packed(model, "int4", expected["greedy"])}, "packed int4")
    return row


def _noted(check: Callable[[], Row], name: str | None = None) -> Row:
    """What a check finds, or what it raised, under `name`, or under every mode that `generate` is asked for."""
    try:
        return check()
    except CoreskipError as error:
        found = f"refused: {str(error)[:200]}"
    except Exception as error:
        found = f"error: {text_of(error)}"
    return dict.fromkeys([name] if name is not None else _ASKED, found)


def _plainly(model: Any, expected: dict[str, Tensor | None]) -> Row:
    found: Row = {}
    wrap(model)
    try:
        _generated(model, "greedy")  # proves the native step
        steps = runtime_of(model).steps
        found["steps"] = steps.lowering.value
        for name, tokens in expected.items():
            found |= _noted(functools.partial(_again, model, name, tokens), name)
    finally:
        unwrap(model)
    return found


def _again(model: Any, name: str, expected: Tensor | None) -> Row:
    return {name: "" if expected is None else _compared(_generated(model, name), expected)}


def _tried(model: Any, name: str) -> Tensor | None:
    try:
        return _generated(model, name)
    except Exception:  # this model does not do it
        return None


def _generated(model: Any, name: str, ids: Tensor | None = None) -> Tensor:
    rows = prompt(2 if name == "batch" else 1) if ids is None else ids
    mask = torch.ones_like(rows)
    if name == "batch":
        rows[1, :4] = mask[1, :4] = 0
    torch.manual_seed(3)
    options = {"do_sample": False, **_ASKED[name]}
    tokens: Tensor = model.generate(rows, attention_mask=mask, max_new_tokens=_NEW, **options)
    return tokens


def _repeating() -> Tensor:
    return prompt(1, 5).repeat(1, 4)


def _compared(got: Tensor, expected: Tensor) -> str:
    if torch.equal(got, expected):
        return "same"
    if got.shape != expected.shape:
        return f"shape {tuple(got.shape)}, not {tuple(expected.shape)}"
    return f"other from token {int((got != expected).any(0).nonzero()[0])} on"


def _lossy(model: Any) -> Plan:
    """Half of the neurons of MLPs, or one expert a token."""
    dense = Plan.dense(model)
    layers, widths = [], dense.model.intermediate_sizes
    for width, experts in zip(widths, dense.model.experts or (0,) * len(widths), strict=True):
        neurons = Static(torch.arange(0, width, 2)) if width else Dense()
        layers.append(LayerPlan(neurons, experts=SkipExperts(1.0) if experts else AllExperts()))
    return Plan(tuple(layers), dense.model, {"method": "static"})


def _exactly_lossy(model: Any, expected: Tensor) -> str:
    try:
        return _exactly(model, _lossy(model), expected)
    except PlanError:  # neither neurons nor experts of it can be left out (BitNet, Llama 4)
        return _exactly(model, _without_layers(model), expected)


def _without_layers(model: Any) -> Plan:
    dense = Plan.dense(model)
    layers = tuple(LayerPlan(layer=Skip() if index % 2 else Run()) for index in range(len(dense.layers)))
    return Plan(layers, dense.model, {"method": "layers"})


def _exactly(model: Any, plan: Plan, expected: Tensor) -> str:
    wrap(model, plan, exact=True)
    try:
        return _compared(_generated(model, "greedy", _repeating()), expected)
    finally:
        unwrap(model)


def _in_four_bits(model: Any) -> str:
    """Decode steps behind a prompt, by native code as far as it goes and by the modules alone."""
    if not isinstance(cache_of(model), Cache):
        return ""
    found = []
    for natively in (True, False):
        wrap(model, Plan.dense(model, "int4"))
        try:
            steps = runtime_of(model).steps
            if not natively:
                steps.native._refuse("the modules are what is compared with")
                steps.spans.refusal = "the modules are what is compared with"
            found.append(decoded(model))
        finally:
            unwrap(model)
    far = float((found[0] - found[1]).square().mean().sqrt() / found[1].std())
    return "same" if far < _CLOSE else f"other by {far:.2g} standard deviations"


def _packed(model: Any, weights: str, expected: Tensor | None) -> str:
    """The tokens of what comes back from a folder: as loaded the model's own; in 4 bits, wrapped, those of itself."""
    with tempfile.TemporaryDirectory() as folder:
        pack(model, _tokenizer(), Path(folder) / "packed", weights=weights, progress=False)
        back = load(Path(folder) / "packed")[0]
        plain = _generated(back, "greedy")
        if weights == "as-loaded" and expected is not None and not torch.equal(plain, expected):
            return _compared(plain, expected)
        wrap(back, Plan.dense(back))
        return _compared(_generated(back, "greedy"), plain)


def _tokenizer() -> Any:
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w3", pad_token="w0", eos_token="w2")


def _told(rows: list[Row]) -> str:
    built = [row for row in rows if row["built"]]
    return f"{len(built)} decoders; " + "; ".join(f"{name}: {_count(built, name)}" for name in MODES)


def _count(rows: list[Row], name: str) -> str:
    """How many of those that do something at all in a mode do the same."""
    found = [row.get(name, "") for row in rows if row.get(name, "")]
    return f"{found.count('same')} of {len(found)}"


main = of_every_type(
    "modes", lambda name: examine(name), _told, "Every decoder of transformers in every way of generating."
)


if __name__ == "__main__":  # a process of its own: whoever calls `main` keeps how much is logged
    transformers.logging.set_verbosity_error()
    logging.getLogger("coreskip").setLevel(logging.ERROR)
    main()
