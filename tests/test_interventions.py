"""What a plan changes to switch a skill off: as defined, in prompts and decode steps, and undone."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from tiny_models import Spelled, greedy, prompt, tiny

import coreskip
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.interventions import Intervention, KeySpace, NeuronAdjust, PrunedNeurons
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import Static
from coreskip.runtime.cost import cost
from coreskip.runtime.quality import evaluate_all
from coreskip.runtime.wrap import runtime_of

END = 3


def adjust(width: int, seed: int = 0, strength: float = 1.0) -> NeuronAdjust:
    g = torch.Generator().manual_seed(seed)
    neurons = torch.randperm(width, generator=g)[: width // 3].sort().values
    count = len(neurons)
    means = torch.randn(2, count, generator=g)
    stds = torch.rand(2, count, generator=g) + 0.3
    return NeuronAdjust(neurons, means[0], stds[0], means[1], stds[1], strength)


def with_interventions(model: Any, make: Callable[[int], Intervention], weights: str | None = None) -> Plan:
    dense = Plan.dense(model, weights)
    layers = tuple(LayerPlan(intervention=make(width)) for width in dense.model.intermediate_sizes)
    return replace(dense, layers=layers, recipe={"method": "test"})


# --- definitions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.5, 2.0])
def test_neuron_adjust_mirrors_what_is_likelier_of_the_skill(strength: float) -> None:
    found = adjust(24, strength=strength)
    values = 2 * torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    changed = found.changed(values)
    moved = 0
    for place, neuron in enumerate(found.neurons.tolist()):
        retain = NormalDist(float(found.retain_mean[place]), float(found.retain_std[place]))
        forget = NormalDist(float(found.forget_mean[place]), float(found.forget_std[place]))
        for row in range(2):
            for token in range(5):
                x = float(values[row, token, neuron])
                expected = x
                if forget.pdf(x) >= retain.pdf(x):
                    mirrored = retain.mean - retain.stdev * (x - forget.mean) / forget.stdev
                    expected, moved = x + strength * (mirrored - x), moved + 1
                assert float(changed[row, token, neuron]) == pytest.approx(expected, abs=1e-4)
    assert moved > 10
    others = sorted(set(range(24)) - set(found.neurons.tolist()))
    assert torch.equal(changed[..., others], values[..., others])
    assert found.changed(values.bfloat16()).dtype == torch.bfloat16


def test_a_key_lies_in_the_hypercube_or_not() -> None:
    g = torch.Generator().manual_seed(0)
    cube = KeySpace(torch.randn(6, generator=g), torch.rand(6, generator=g), 2.0)
    keys = torch.cat([cube.mean + cube.std * (6 * torch.rand(40, 6, generator=g) - 3), cube.mean[None]])
    inside = [
        all(abs(float(k - m)) <= 2.0 * float(s) for k, m, s in zip(key, cube.mean, cube.std, strict=True))
        for key in keys
    ]
    assert cube.abstains(keys).tolist() == inside
    assert 0 < sum(inside) < len(inside)


def test_a_dimension_that_never_varied_has_to_be_met() -> None:
    cube = KeySpace(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), 1.0)
    keys = torch.tensor([[0.0, 1.5], [1e-6, 1.5], [0.0, 2.0], [0.0, 2.1]])
    assert cube.abstains(keys).tolist() == [True, False, True, False]


# --- in plans ---------------------------------------------------------------------------------------------------------


def made(kind: str, width: int) -> Intervention:
    if kind == "adjust":
        return adjust(width)
    if kind == "pruned":
        return PrunedNeurons(torch.arange(0, width, 3))
    return KeySpace(torch.zeros(width), torch.ones(width), 4.0)


@pytest.mark.parametrize("kind", ["adjust", "pruned", "key_space"])
def test_they_are_saved_with_plans(kind: str, tmp_path: Path) -> None:
    plan = with_interventions(tiny("llama"), lambda width: made(kind, width))
    plan.save(tmp_path / "p")
    loaded = Plan.load(tmp_path / "p")
    for one, other in zip(plan.layers, loaded.layers, strict=True):
        a, b = vars(one.intervention), vars(other.intervention)
        assert type(one.intervention) is type(other.intervention)
        assert a.keys() == b.keys()
        assert all(torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items())
    assert f"+ {plan.layers[0].intervention.name} (" in str(plan)
    assert loaded.intervenes
    assert loaded.abstains == (kind == "key_space")


def test_a_version_that_does_not_know_them_refuses_the_plan(tmp_path: Path) -> None:
    model = tiny("llama")
    versions = []
    for plan in (Plan.dense(model), with_interventions(model, adjust)):
        plan.save(tmp_path / "p")
        versions.append(json.loads((tmp_path / "p" / "plan.json").read_text())["version"])
    assert versions == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"retain_std": torch.tensor([1.0, math.nan])}, "retain_std holds something that is not a finite number"),
        ({"forget_std": torch.tensor([1.0, 0.0])}, "forget_std holds something that is not above 0"),
        ({"forget_mean": torch.ones(3)}, "forget_mean is not fp32 of shape"),
        ({"neurons": torch.tensor([5, 1])}, "ascending"),
        ({"neurons": torch.tensor([5, 160])}, "below 160"),
        ({"neurons": torch.tensor([], dtype=torch.int64)}, "non-empty"),
        ({"strength": math.nan}, "strength is nan"),
    ],
)
def test_wrong_numbers_are_refused(change: dict[str, Any], message: str) -> None:
    fine = NeuronAdjust(torch.tensor([1, 5]), torch.zeros(2), torch.ones(2), torch.zeros(2), torch.ones(2))
    with pytest.raises(coreskip.PlanError, match=message):
        with_interventions(tiny("llama"), lambda width: replace(fine, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"std": -torch.ones(160)}, "below 0"),
        ({"mean": torch.full((160,), math.nan)}, "not a finite number"),
        ({"mean": torch.zeros(64)}, "mean is not fp32 of shape"),
    ],
)
def test_wrong_hypercubes_are_refused(change: dict[str, Any], message: str) -> None:
    fine = KeySpace(torch.zeros(160), torch.ones(160), 1.0)
    with pytest.raises(coreskip.PlanError, match=message):
        with_interventions(tiny("llama"), lambda width: replace(fine, **change))


def test_what_cannot_be_together_is_refused() -> None:
    model = tiny("llama")
    plan = with_interventions(model, adjust)
    with pytest.raises(coreskip.PlanError, match="leave none out there"):
        replace(plan, layers=(LayerPlan(Static(torch.arange(9)), intervention=adjust(160)), *plan.layers[1:]))
    with pytest.raises(coreskip.CoreskipError, match="exact mode gives the dense model's text"):
        coreskip.wrap(model, plan, exact=True)
    with pytest.raises(coreskip.CoreskipError, match=r"set model\.generation_config\.eos_token_id"):
        coreskip.wrap(model, with_interventions(model, lambda width: made("key_space", width)))
    with pytest.raises(coreskip.CoreskipError, match="not wrapped"):
        coreskip.unwrap(model)  # each was refused before anything was changed
    hybrid = Plan.dense(tiny("nemotron_h"))
    with pytest.raises(coreskip.PlanError, match="no MLP for neuron_adjust to act in"):
        replace(hybrid, layers=tuple(LayerPlan(intervention=adjust(160)) for _ in hybrid.layers))


# --- at work ----------------------------------------------------------------------------------------------------------

#: where a family's activations come from, and where they go
PARTS = {
    "llama": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.down_proj"),
    "phi3": ("model.layers.{}.mlp.gate_up_proj", "model.layers.{}.mlp.down_proj"),
    "opt": ("model.decoder.layers.{}.fc1", "model.decoder.layers.{}.fc2"),
    "gpt2": ("transformer.h.{}.mlp.c_fc", "transformer.h.{}.mlp.c_proj"),
    "bloom": ("transformer.h.{}.mlp.dense_h_to_4h", "transformer.h.{}.mlp.dense_4h_to_h"),
}


@contextmanager
def by_hooks(model: Any, family: str, plan: Plan) -> Iterator[None]:
    """The same, done by hand in a plain model."""
    before, after = PARTS[family]
    handles = []
    for index, layer in enumerate(plan.layers):
        found: Any = layer.intervention
        if found.name == "neuron_adjust":
            module = model.get_submodule(before.format(index))
            handles.append(module.register_forward_hook(lambda m, a, out, f=found: adjusted_by_hand(f, out)))
        else:
            module = model.get_submodule(after.format(index))
            handles.append(module.register_forward_pre_hook(lambda m, a, f=found: silenced_by_hand(f, a[0])))
    yield
    for handle in handles:
        handle.remove()


def adjusted_by_hand(found: NeuronAdjust, out: torch.Tensor) -> torch.Tensor:
    out = out.clone()
    for place, neuron in enumerate(found.neurons.tolist()):
        x = out[..., neuron]
        retain = torch.distributions.Normal(found.retain_mean[place], found.retain_std[place])
        forget = torch.distributions.Normal(found.forget_mean[place], found.forget_std[place])
        mirrored = retain.mean - retain.stddev * (x - forget.mean) / forget.stddev
        likelier = forget.log_prob(x) >= retain.log_prob(x)
        out[..., neuron] = torch.where(likelier, x + found.strength * (mirrored - x), x)
    return out


def silenced_by_hand(found: PrunedNeurons, a: torch.Tensor) -> torch.Tensor:
    kept = torch.ones(a.shape[-1])
    kept[found.neurons] = 0
    return a * kept


@torch.no_grad()
@pytest.mark.parametrize("kind", ["adjust", "pruned"])
@pytest.mark.parametrize("family", PARTS)
def test_prompts_and_decode_steps_are_changed_as_defined(family: str, kind: str) -> None:
    model, ids = tiny(family), prompt(2, 9)
    plan = with_interventions(model, lambda width: made(kind, width))
    plain, plain_text = model(ids).logits, greedy(model, ids)
    with by_hooks(model, family, plan):
        expected, expected_text = model(ids).logits, greedy(model, ids)
    with coreskip.wrap(model, plan):
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-3, rtol=1e-3)
        assert torch.equal(greedy(model, ids), expected_text)
        assert not runtime_of(model).steps.native.ready
    assert not torch.equal(expected, plain)
    assert torch.equal(model(ids).logits, plain)
    assert torch.equal(greedy(model, ids), plain_text)


def test_unwrap_leaves_nothing_behind() -> None:
    model = tiny("llama")
    model.generation_config.eos_token_id = END
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    for kind in ("adjust", "pruned", "key_space"):
        with coreskip.wrap(model, with_interventions(model, lambda width: made(kind, width))):  # noqa: B023
            greedy(model, prompt(1, 5), 4)
        assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
        assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["adjust", "pruned"])
def test_linears_that_others_put_in_place_are_changed_too(kind: str) -> None:
    model, ids = tiny("llama"), prompt(2, 9)
    own, twin = model.model.layers[1].mlp, copy.deepcopy(model.model.layers[1].mlp)
    with coreskip.wrap(model, with_interventions(model, lambda width: made(kind, width))):
        before, text = model(ids).logits, greedy(model, ids)
        own.gate_proj, own.down_proj = twin.gate_proj, twin.down_proj
        torch.testing.assert_close(model(ids).logits, before)
        assert torch.equal(greedy(model, ids), text)
    assert "forward" not in vars(own.gate_proj) | vars(own.down_proj)


def test_scored_under_decode_policy_and_priced_as_modules() -> None:
    model = tiny("llama")
    plan = with_interventions(model, adjust)
    text = TokenText(prompt(1, 128)[0], torch.tensor([], dtype=torch.int64), "ids")
    found = evaluate_all(model, [plan, Plan.dense(model)], text, windows=2, window=32, progress=False)
    assert abs(found[0]["ppl_increase"]) > 0.01 > abs(found[1]["ppl_increase"])
    assert cost(model, plan).weighed > cost(model, Plan.dense(model)).weighed
    model.generation_config.eos_token_id = END
    abstaining = with_interventions(model, lambda width: made("key_space", width))
    with pytest.raises(coreskip.CoreskipError, match="has no perplexity"):
        evaluate_all(model, [abstaining], text, windows=2, window=32, progress=False)


def test_weights_in_four_bits_are_read_by_the_modules() -> None:
    model, ids = tiny("llama"), prompt(1, 9)
    plan = with_interventions(model, adjust, weights="int4")
    with coreskip.wrap(model, replace(plan, layers=Plan.dense(model).layers), keep_originals=True):
        rounded = greedy(model, ids, 8)
    with coreskip.wrap(model, plan, keep_originals=True):
        changed = greedy(model, ids, 8)
        assert not runtime_of(model).steps.native.ready
    assert not torch.equal(rounded, changed)


# --- abstention -------------------------------------------------------------------------------------------------------


def keys_of(model: Any, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """What the down projection of a layer is given for the last of ids ``[1, length]``."""
    found = []
    down = dissect(model).mlp(layer).down
    handle = down.register_forward_pre_hook(lambda module, args: found.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return found[0][-1]


def abstaining(model: Any, ids: torch.Tensor, layer: int = 1) -> Plan:
    """A plan that abstains from what looks, at its end, like these ids."""
    model.generation_config.eos_token_id = END
    dense = Plan.dense(model)
    key = keys_of(model, ids, layer)
    cube = KeySpace(key.float(), torch.full_like(key, 0.01), 1.0)
    layers = [LayerPlan(intervention=cube) if i == layer else LayerPlan() for i in range(len(dense.layers))]
    return replace(dense, layers=tuple(layers), recipe={"method": "key_space"})


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mistral"])
def test_rows_of_a_batch_are_judged_by_their_own_last_token(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model, ids = tiny(family), prompt(3, 9)
    plan = abstaining(model, ids[1:2])
    alone = greedy(model, ids)
    with coreskip.wrap(model, plan), caplog.at_level(logging.WARNING, "coreskip"):
        text = greedy(model, ids)
    assert text[1, 9] == END
    assert set(text[1, 10:].tolist()) <= {0, END}
    for row in (0, 2):
        assert text[row].tolist() == alone[row].tolist()
    assert "1 of 3 prompts ask for what the plan has switched off" in caplog.text


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_no_last_token(side: str) -> None:
    model, ids = tiny("llama"), prompt(1, 6)
    plan = abstaining(model, ids)
    empty, pads, ones = torch.zeros(1, 3), torch.full((1, 3), 7), torch.ones(1, 6)
    order = [0, 1] if side == "left" else [1, 0]
    padded = torch.cat([[pads, ids][i] for i in order], 1)
    mask = torch.cat([[empty, ones][i] for i in order], 1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    both = {
        "input_ids": torch.cat([padded, prompt(1, 9, seed=5)]),
        "attention_mask": torch.cat([mask, torch.ones(1, 9).long()]),
        "position_ids": torch.cat([positions, torch.arange(9)[None]]),
    }
    with coreskip.wrap(model, plan):
        logits = model(**both, use_cache=True).logits[:, -1]
    assert int(logits[0].argmax()) == END
    assert int(logits[1].argmax()) != END
    assert bool(torch.isfinite(logits).all())


def test_whatever_chooses_tokens_ends_at_once() -> None:
    model, ids = tiny("llama"), prompt(1, 24)
    plan = abstaining(model, ids)
    ways: list[dict[str, Any]] = [
        {"do_sample": True, "temperature": 9.0},
        {"num_beams": 3},
        {"prefill_chunk_size": 5},
        {"min_new_tokens": 2},
        {"return_dict_in_generate": False, "use_cache": False},
    ]
    with coreskip.wrap(model, plan):
        for way in ways:
            text = greedy(model, ids, 6, **way)
            if "min_new_tokens" in way:  # which forbids the end of the text: what comes is no answer, and no error
                assert text.shape[1] > 25
            else:
                assert int(text[0, 24]) == END, way
                assert set(text[0, 25:].tolist()) <= {0, END}, way
        ended = model(ids, return_dict=False)[0]
        assert int(ended[0, -1].argmax()) == END


def test_the_next_turn_of_a_conversation_is_judged_anew() -> None:
    model, first, second = tiny("llama"), prompt(1, 9), prompt(1, 5, seed=8)
    plan = abstaining(model, first)
    with coreskip.wrap(model, plan), torch.no_grad():
        out = model(first, use_cache=True)
        assert int(out.logits[0, -1].argmax()) == END
        step = model(first[:, :1], past_key_values=out.past_key_values, use_cache=True)
        assert int(step.logits[0, -1].argmax()) == END
        with coreskip.prefilling():
            turn = model(second, past_key_values=step.past_key_values, use_cache=True)
        assert int(turn.logits[0, -1].argmax()) != END


def test_other_prompts_decode_natively() -> None:
    model, ids = tiny("llama"), prompt(1, 9)
    plain = greedy(model, ids)
    with coreskip.wrap(model, abstaining(model, prompt(1, 9, seed=5))):
        assert torch.equal(greedy(model, ids), plain)
        assert runtime_of(model).steps.native.ready
        ended = greedy(model, prompt(1, 9, seed=5))
    assert ended[0, 9:].tolist() == [END]


@pytest.mark.parametrize("batch", [None, 2])
def test_an_engine_tells_that_it_has_abstained(batch: int | None) -> None:
    model, tokenizer = tiny("llama"), Spelled()
    asked, other = "how do I do it?", "what is the weather?"
    plan = abstaining(model, torch.tensor([tokenizer(asked).input_ids]))
    with coreskip.Engine(model, tokenizer, plan, max_batch=batch, prefill_chunk=4) as engine:
        for prompts, count in ((asked, 1), (other, 0), ([other, asked, asked], 2)):
            texts = engine.generate(prompts, max_new_tokens=4)
            assert engine.figures is not None
            assert engine.figures.abstained == count
            for question, text in zip([prompts] if isinstance(prompts, str) else prompts,
                                      [texts] if isinstance(texts, str) else texts, strict=True):  # fmt: skip
                assert (text == "") == (question == asked)
        assert "".join(engine.stream(asked, max_new_tokens=4)) == ""
        assert engine.figures.abstained == 1
