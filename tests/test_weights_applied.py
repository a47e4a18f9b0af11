"""A plan's weight format is what decode steps read, on every architecture and every path, or it is refused."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_quality import text
from tiny_models import greedy, plan_of, prompt, tiny
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

import coreskip
from coreskip import CoreskipError, Plan
from coreskip.kernels import ops, reference
from coreskip.kernels.groups import ungroup, untile
from coreskip.kernels.packed import PackedLinear
from coreskip.predictors.anatomy import dissect, rows_of
from coreskip.runtime.bundles import Weights
from coreskip.runtime.cost import bytes_per_token, loaded_bytes
from coreskip.runtime.phases import densely, prefilling
from coreskip.runtime.quality import evaluate_all
from coreskip.runtime.wrap import is_wrapped, runtime_of, wrapped

NO_LIBRARY = ops.available("cpu")
pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))

ON_MODULES = ["opt", "gpt2", "falcon", "falcon_new", "bloom", "gpt_neox", "phi", "stablelm", "cohere"]


def takers(model: Any) -> list[Any]:
    """Every linear of the decoder layers, and the LM head."""
    layers = [module for layer in dissect(model).layers for module in layer.modules()]
    return [m for m in (*layers, model.get_output_embeddings()) if isinstance(m, (nn.Linear, Conv1D))]


def by_definition(model: Any, weights: str) -> Any:
    """A copy each of whose linears is the definition of the kernels' over its matrix in the plan's format."""
    twin = copy.deepcopy(model)
    for module in takers(twin):
        fmt = "int4" if weights == "int4" and module is not twin.get_output_embeddings() else "int8_groups"
        packed = PackedLinear.pack(*rows_of(module), fmt=fmt)
        module.forward = lambda x, packed=packed: reference.linear(x, packed)
    return twin


@torch.no_grad()
def after_prefill(model: Any, twin: Any, ids: Tensor, more: Tensor, **options: Any) -> Tensor:
    """The logits of `twin` for tokens that follow a prompt which `model` has read."""
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    return twin(more, past_key_values=cache, **options).logits


def differ(logits: Tensor, expected: Tensor) -> float:
    """The largest difference, in standard deviations of the expected logits."""
    return float((logits - expected).abs().max() / expected.std())


# What two orders of adding up can differ by: a few steps of float32, or an input at a half of a step of its group,
# which falls to the other side and moves an output by a 127th of the input's share.
ROUNDING = 0.02
PROMPT_ROUNDING = 0.06  # of a prompt that was read so, too


@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("family", ON_MODULES)
def test_decode_steps_on_modules_read_the_plans_format(family: str, weights: str) -> None:
    model, ids, more = tiny(family), prompt(2, 12), prompt(2, 3, seed=3)
    dense = after_prefill(model, model, ids, more)
    defined = by_definition(model, weights)
    expected = after_prefill(defined, defined, ids, more)
    plain = model(ids).logits
    with coreskip.wrap(model, Plan.dense(model, weights=weights), keep_originals=True):
        found = after_prefill(model, model, ids, more)
        assert differ(found, expected) < PROMPT_ROUNDING
        assert differ(expected, dense) > 3 * ROUNDING or weights == "int8"
        assert differ(found, dense) > 0.003
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, plain)  # scoring reads the originals
    assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("family", ["opt", "gpt2", "bloom"])
def test_figures_are_of_what_ran(family: str, weights: str) -> None:
    model = tiny(family)
    plan, dense = Plan.dense(model, weights=weights), Plan.dense(model)
    with coreskip.wrap(model, plan, keep_originals=True):
        after_prefill(model, model, prompt(1, 9), prompt(1, 1))
        formats = runtime_of(model).formats
        read = sum(part.weight.nbytes for module in takers(model) for part in formats.parts(module))
    others = loaded_bytes(model) - sum(module.weight.nbytes for module in takers(model))
    assert bytes_per_token(model, plan) == pytest.approx(others + read, rel=0.01)  # the last tile may be filled up
    assert bytes_per_token(model, dense) == loaded_bytes(model)
    found = evaluate_all(model, [plan], text(), windows=4, window=32, progress=False)[0]
    assert abs(found["ppl_increase"]) > 1e-4
    assert found["kl"] > 1e-4


@pytest.mark.parametrize("kind", ["static", "griffin"])
@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_beside_neurons_left_out(family: str, kind: str) -> None:
    model, ids, more = tiny(family), prompt(1, 12), prompt(1, 1, seed=3)
    plan = plan_of(model, kind)
    logits = []
    for each in (plan, replace(plan, weights="int8"), replace(plan, weights="int4")):
        with coreskip.wrap(model, each):
            logits.append(after_prefill(model, model, ids, more))
    assert 0.003 < differ(logits[1], logits[0]) < 0.3
    assert differ(logits[2], logits[0]) > differ(logits[1], logits[0])


@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("keep_originals", [None, True, False])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_native_step_and_the_modules_read_the_same(family: str, keep_originals: bool | None, weights: str) -> None:
    """What the native step does not take (a mask with holes, more rows, hidden states) has the plan's text, too."""
    model, ids = tiny(family), prompt(1, 12)
    coreskip.wrap(model, Plan.dense(model, weights=weights), keep_originals=keep_originals)
    expected = greedy(model, ids, 16)
    assert runtime_of(model).steps.native.ready
    natively = after_prefill(model, model, ids, expected[:, 12:18])
    by_modules = after_prefill(model, model, ids, expected[:, 12:18], output_hidden_states=True)
    assert differ(by_modules, natively) < ROUNDING
    options = {"output_hidden_states": True, "return_dict_in_generate": True}
    assert torch.equal(greedy(model, ids, 16, **options).sequences, expected)
    many = prompt(1, 20, seed=5)  # more tokens than the native step takes
    pieces = [natively_in_pieces(model, ids, many), after_prefill(model, model, ids, many)]
    assert differ(pieces[1], pieces[0]) < ROUNDING
    dense = after_prefill(tiny(family), tiny(family), ids, many)
    assert differ(pieces[1], dense) > 3 * ROUNDING or weights == "int8"
    batch = greedy(model, ids.repeat(9, 1), 16)
    assert torch.equal(batch, expected.repeat(9, 1))


@torch.no_grad()
def natively_in_pieces(model: Any, ids: Tensor, more: Tensor) -> Tensor:
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    return torch.cat([model(piece, past_key_values=cache).logits for piece in more.split(8, dim=1)], 1)


def test_memory_is_not_taken_twice(llama: Any) -> None:
    """What the native step has packed serves the modules."""
    with coreskip.wrap(llama, Plan.dense(llama, weights="int4"), keep_originals=True):
        greedy(llama, prompt(1, 9), 4)
        runtime = runtime_of(llama)
        packed = {id(p) for module in takers(llama) for p in runtime.formats.parts(module)}
        base = runtime.steps.native.described.model.base
        native = [base.head, *(m for layer in base.layers for m in (layer.mlp.gate, layer.mlp.up, layer.mlp.down))]
        native += [m for layer in base.layers for m in (layer.attention.q, layer.attention.k, layer.attention.v)]
        assert {id(p) for p in native} <= packed


def test_what_stays_dense(llama: Any) -> None:
    doge, ids, more = tiny("doge"), prompt(1, 12), prompt(1, 3, seed=3)
    plain, defined = after_prefill(doge, doge, ids, more), by_definition(doge, "int4")
    with coreskip.wrap(doge, Plan.dense(doge, weights="int4")):
        with prefilling():
            found = after_prefill(doge, doge, ids, more)
        assert differ(found, after_prefill(defined, defined, ids, more)) < PROMPT_ROUNDING
        with densely():
            assert differ(after_prefill(doge, doge, ids, more), plain) < 1e-4
        cache = DynamicCache(config=doge.config)
        doge(ids, past_key_values=cache)
        logits = doge(more, past_key_values=cache).logits  # with gradients
        assert differ(logits.detach(), plain) < 1e-4
        logits.sum().backward()
        first = doge(more).logits
    assert torch.equal(doge(more).logits, first)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_exact_mode_drafts_in_the_format_and_verifies_without(family: str) -> None:
    model, ids = tiny(family), prompt(1, 12)
    expected = greedy(model, ids, 40)
    with coreskip.wrap(model, Plan.dense(model, weights="int4"), exact=True):
        assert torch.equal(greedy(model, ids, 40), expected)
        verified = after_prefill(model, model, ids, expected[:, 12:13])
    assert differ(verified, after_prefill(model, model, ids, expected[:, 12:13])) < 1e-4


def test_a_matrix_without_such_a_form_stays_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, ids, more = tiny("opt"), prompt(1, 12), prompt(1, 3, seed=3)
    model.lm_head.weight.data[3, 0] = torch.inf  # of a token that no prompt here has
    with caplog.at_level(logging.WARNING, "coreskip"), coreskip.wrap(model, Plan.dense(model, weights="int4")):
        found = after_prefill(model, model, ids, more)
        after_prefill(model, model, ids, more)
    assert [i for i in range(128) if not bool(found[..., i].isfinite().all())] == [3]
    assert len([line for line in caplog.messages if "stays as it was loaded: weights with infinities" in line]) == 1


def test_what_has_no_kernels_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("opt").double()
    plan = replace(Plan.dense(model), weights="int4")
    with pytest.raises(CoreskipError, match=r"cannot be used: they are made from float32, .* not from float64"):
        coreskip.wrap(model, plan)
    with pytest.raises(CoreskipError, match="float64"), wrapped(model, plan, Weights(dissect(model))):
        pass
    assert not is_wrapped(model)
    monkeypatch.setattr("coreskip.runtime.formats.available", lambda _: "there is no compiler")
    model = tiny("opt")
    with pytest.raises(CoreskipError, match="weights in int8 cannot be used: there is no compiler; leave them out"):
        coreskip.wrap(model, Plan.dense(model, weights="int8"))


def test_weights_loaded_anew_are_packed_anew() -> None:
    model, ids, more = tiny("opt"), prompt(1, 12), prompt(1, 3, seed=3)
    other = tiny("opt", seed=1)
    with coreskip.wrap(model, Plan.dense(model, weights="int4")):
        after_prefill(model, model, ids, more)
        model.load_state_dict(other.state_dict())
        found = after_prefill(model, model, ids, more)
    defined = by_definition(other, "int4")
    assert differ(found, after_prefill(defined, defined, ids, more)) < PROMPT_ROUNDING


def test_the_figure_knows_where_steps_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 4-bit numbers loaded in float32 is read in 4 bits by the native step, in 32 by the modules."""
    for family, native in (("llama", True), ("doge", False)):
        model = tiny(family)
        for module in takers(model):
            q, scale, least = untile(PackedLinear.pack(module.weight, fmt="int4"))
            module.weight.data = ungroup(q, scale, least).flatten(1)[:, : module.weight.shape[1]]
        plan = Plan.dense(model)
        assert (bytes_per_token(model, plan) < 0.5 * loaded_bytes(model)) == native
        assert bytes_per_token(model, plan, native=False) == loaded_bytes(model)
