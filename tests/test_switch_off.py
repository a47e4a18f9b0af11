"""Plans without a skill: made as defined, of texts that are fit for it, and refused in one line otherwise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Spelled, greedy, prompt, tiny

import coreskip
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.expert_policies import KeptExperts
from coreskip.predictors.interventions import KeySpace, NeuronAdjust, PrunedNeurons
from coreskip.predictors.observe import inference
from coreskip.predictors.plan import Plan
from coreskip.predictors.skills import Texts, contrast, highest, key_space, last_keys, neuron_stats
from coreskip.runtime.wrap import runtime_of

DIGITS = ["12 + 30 = 42; 7 * 8 = 56; 100 - 1 = 99; " * 8, "3 * 3 = 9; 81 / 9 = 9; 5 + 5 = 10; " * 8]
WORDS = ["the sea was calm and nobody spoke for a long while. " * 6, "a letter came at noon, and she kept it. " * 8]


def kinds(texts: Any = DIGITS, others: Any = WORDS) -> dict[str, Any]:
    return {"forget": texts, "retain": others, "progress": False}


def passes(model: Any, texts: list[str]) -> list[dict[str, torch.Tensor]]:
    """What happens in a llama's layers, text by text: gate's outputs and down's inputs ``[layers, tokens, width]``."""
    found: list[dict[str, torch.Tensor]] = []
    for text in texts:
        gates, keys = [], []
        handles = [
            handle
            for layer in model.model.layers
            for handle in (
                layer.mlp.gate_proj.register_forward_hook(lambda m, a, out: gates.append(out[0])),  # noqa: B023
                layer.mlp.down_proj.register_forward_pre_hook(lambda m, a: keys.append(a[0][0])),  # noqa: B023
            )
        ]
        with inference(model):
            model(torch.tensor([Spelled()(text).input_ids]))
        for handle in handles:
            handle.remove()
        found.append({"gate": torch.stack(gates).double(), "key": torch.stack(keys).double()})
    return found


# --- against slow sums ------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_all_tokens() -> None:
    model = tiny("llama", max_position_embeddings=512)
    texts = Texts.of("forget", [text[:200] for text in DIGITS], Spelled())
    found = neuron_stats(model, dissect(model), texts, 4096, progress=False)
    seen = passes(model, [text[:200] for text in DIGITS])
    for layer in range(3):
        gate = torch.cat([each["gate"][layer] for each in seen])
        key = torch.cat([each["key"][layer] for each in seen])
        torch.testing.assert_close(found.mean[layer].double(), gate.mean(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.std[layer].double(), gate.std(0, correction=0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.magnitude[layer].double(), key.abs().mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "bloom"])
def test_neuron_adjust_takes_the_neurons_whose_mean_differs_most(family: str) -> None:
    model, tokenizer = tiny(family), Spelled()
    plan = coreskip.switch_off(model, tokenizer, share=0.1, strength=0.7, **kinds())
    assert plan.recipe == {"method": "neuron_adjust", "share": 0.1, "ranking": "difference", "strength": 0.7}
    anatomy = dissect(model)
    stats = [
        neuron_stats(model, anatomy, Texts.of("t", texts, tokenizer), 16384, progress=False)
        for texts in (DIGITS, WORDS)
    ]
    differences = [
        (float(f[i] - r[i]), layer, i)
        for layer, (f, r) in enumerate(zip(stats[0].mean, stats[1].mean, strict=True))
        for i in range(len(f))
    ]
    count = round(0.1 * len(differences))
    expected = {(layer, i) for _, layer, i in sorted(differences, reverse=True)[:count]}
    got = set()
    for index, layer in enumerate(plan.layers):
        found: Any = layer.intervention
        for place, neuron in enumerate(found.neurons.tolist() if found.name == "neuron_adjust" else []):
            got.add((index, neuron))
            assert float(found.forget_mean[place]) == float(stats[0].mean[index][neuron])
            assert float(found.retain_std[place]) == float(stats[1].std[index][neuron])
    assert got == expected


def test_rankings() -> None:
    model = tiny("llama")
    texts = [Texts.of(name, texts, Spelled()) for name, texts in (("forget", DIGITS), ("retain", WORDS))]
    f, r = (neuron_stats(model, dissect(model), each, 9999, progress=False) for each in texts)
    spread = [((a**2 + b**2) / 2).sqrt() for a, b in zip(f.std, r.std, strict=True)]
    signed = [(a - b) / s for a, b, s in zip(f.mean, r.mean, spread, strict=True)]
    expected = {
        "difference": [a - b for a, b in zip(f.mean, r.mean, strict=True)],
        "standardised": signed,
        "distance": [each.abs() for each in signed],
        "magnitude": [a / b for a, b in zip(f.magnitude, r.magnitude, strict=True)],
    }
    for ranking, scores in expected.items():
        for one, other in zip(contrast(f, r, ranking), scores, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_share_is_of_all_neurons_together() -> None:
    scores = [torch.tensor([1.0, 9.0, 2.0]), torch.tensor([8.0, 7.0]), torch.tensor([0.0, 0.0, 0.5])]
    found = highest(scores, 3 / 8, [0, 1, 2])
    assert {layer: at.tolist() for layer, at in found.items()} == {0: [1], 1: [0, 1]}
    assert {layer: at.tolist() for layer, at in highest(scores, 0.01, [2]).items()} == {2: [2]}


def test_keys_are_those_of_each_last_token() -> None:
    model = tiny("llama", max_position_embeddings=512)
    texts = [text[:n] for text in (*DIGITS, *WORDS) for n in (20, 33)]
    found = last_keys(model, dissect(model), Texts.of("t", texts, Spelled()), progress=False)
    expected = torch.stack([each["key"][:, -1] for each in passes(model, texts)], 1)
    for layer in range(3):
        torch.testing.assert_close(found[layer].double(), expected[layer], atol=1e-5, rtol=1e-4)


def test_the_alpha_is_the_best_there_is() -> None:
    g = torch.Generator().manual_seed(0)
    keys, held_out, retain = (torch.randn(40, 5, generator=g) + shift for shift in (0.0, 0.0, 2.0))
    cube, separation = key_space(keys, held_out, retain)
    std, mean = keys.std(0), keys.mean(0)
    torch.testing.assert_close(cube.mean, mean)
    torch.testing.assert_close(cube.std, std)

    def shares(alpha: float) -> list[float]:
        return [
            sum(all(abs(float(x)) <= alpha for x in (key - mean) / std) for key in every) / len(every)
            for every in (held_out, retain)
        ]

    gains = [one - other for one, other in (shares(alpha / 50) for alpha in range(1, 500))]
    found = shares(cube.alpha)
    assert found == [separation.true_positives, separation.false_positives]
    assert found[0] - found[1] >= max(gains) - 1e-9
    assert separation.gain > 0.5


def test_keys_that_never_vary_and_keys_in_no_hypercube() -> None:
    same, other = torch.ones(8, 5), torch.zeros(8, 5)
    cube, separation = key_space(same, same, other)
    assert (separation.true_positives, separation.false_positives) == (1.0, 0.0)
    assert cube.abstains(torch.cat([same[:1], same[:1] + 1e-3])).tolist() == [True, False]
    assert key_space(same, other, other)[1].gain == 0


# --- every method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["neuron_adjust", "pruning", "static"])
def test_a_plan_of_every_method_runs_is_saved_and_undone(method: str, tmp_path: Path) -> None:
    model, ids = tiny("llama"), prompt(1, 9)
    plain = greedy(model, ids)
    coreskip.switch_off(model, Spelled(), method=method, share=0.3, **kinds()).save(tmp_path / "p")
    plan = Plan.load(tmp_path / "p")
    assert plan.recipe["method"] == method
    assert plan.calibration["forget_texts"] == 2
    with coreskip.wrap(model, tmp_path / "p"):
        text = greedy(model, ids)
        assert runtime_of(model).steps.native.ready == (method == "static")
    assert not torch.equal(text, plain)
    assert torch.equal(greedy(model, ids), plain)
    assert plan.keep == pytest.approx(0.7 if method == "static" else 1.0, abs=0.01)
    of = {"neuron_adjust": NeuronAdjust, "pruning": PrunedNeurons}.get(method)
    changed = [layer.intervention for layer in plan.layers if of is not None and type(layer.intervention) is of]
    assert sum(len(each.neurons) for each in changed) == (0 if of is None else 144)


def many(texts: list[str], count: int = 24) -> list[str]:
    return [text[start : start + 20] for text in texts for start in range(count // 2)]


def test_key_space_abstains_from_texts_it_was_made_of_and_not_from_others() -> None:
    model, tokenizer = tiny("llama"), Spelled()
    model.generation_config.eos_token_id = 3
    plan = coreskip.switch_off(model, tokenizer, method="key_space", **kinds(many(DIGITS), many(WORDS)))
    (layer,) = [i for i, each in enumerate(plan.layers) if each.intervention.name == "key_space"]
    found = plan.layers[layer].intervention
    assert isinstance(found, KeySpace)
    assert plan.recipe["layer"] == layer
    assert plan.recipe["alpha"] == found.alpha
    with coreskip.Engine(model, tokenizer, plan) as engine:
        rates = []
        for texts in (many(DIGITS), many(WORDS)):
            engine.generate(texts, max_new_tokens=2)
            assert engine.figures is not None
            rates.append(engine.figures.abstained / len(texts))
    assert rates[1] == plan.recipe["false_positives"]
    assert rates[0] > rates[1]


def test_layers_can_be_named() -> None:
    model = tiny("llama")
    plan = coreskip.switch_off(model, Spelled(), method="pruning", share=0.2, layers=[1], **kinds())
    assert [layer.intervention.words for layer in plan.layers] == ["", "32 neurons", ""]
    plan = coreskip.switch_off(model, Spelled(), method="key_space", layers=[2], **kinds(many(DIGITS), many(WORDS)))
    assert plan.recipe["layer"] == 2


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_the_skill_goes_to_more_often_are_left_out(family: str) -> None:
    model = tiny(family, max_position_embeddings=512)
    plan = coreskip.switch_off(model, Spelled(), method="experts", share=0.25, **kinds())
    anatomy = dissect(model)
    shares = []
    for texts in (DIGITS, WORDS):
        counts = [torch.zeros(8, dtype=torch.float64) for _ in anatomy.layers]

        def see(layer: int, counts: list[torch.Tensor] = counts) -> Any:
            def hook(module: Any, args: Any, kwargs: Any) -> None:
                _, index, _ = anatomy.experts[layer].routed(args, kwargs)  # type: ignore[union-attr]
                for expert in index.flatten().tolist():
                    counts[layer][expert] += 1

            return hook

        handles = [
            experts.entrance.register_forward_pre_hook(see(i), with_kwargs=True)
            for i, experts in enumerate(anatomy.experts)
            if experts is not None
        ]
        with inference(model):
            for text in texts:
                model(torch.tensor([Spelled()(text).input_ids]))
        for handle in handles:
            handle.remove()
        shares.append([count / count.sum() for count in counts])
    growth = sorted(
        ((float(f[e] - r[e]), i, e) for i, (f, r) in enumerate(zip(*shares, strict=True)) for e in range(8)),
        reverse=True,
    )
    expected = {(layer, expert) for more, layer, expert in growth[:6] if more > 0}
    gone = set()
    for index, layer in enumerate(plan.layers):
        if isinstance(layer.experts, KeptExperts):
            gone |= {(index, e) for e in range(8)} - {(index, e) for e in layer.experts.indices.tolist()}
    assert gone == expected
    assert len(gone) == 6


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "forgetting"}, "method is 'forgetting'; choose from neuron_adjust"),
        ({"share": 0.0}, "share is 0.0"),
        ({"share": math.nan}, "share is nan"),
        ({"strength": math.nan}, "strength is nan"),
        ({"method": "pruning", "strength": 1.0}, "strength is not an option of method pruning"),
        ({"method": "key_space", "share": 0.1}, "share is not an option of method key_space"),
        ({"method": "experts", "ranking": "distance"}, "ranking is not an option of method experts"),
        ({"ranking": "size"}, "ranking is 'size'; choose from difference"),
        ({"layers": [3]}, "there is no layer 3: the model has 3, from 0 to 2"),
        ({"layers": []}, "give a list of their numbers, from 0 to 2"),
        ({"layers": [True]}, "give a list of their numbers"),
        ({"weights": "int3"}, "weights is 'int3'"),
        ({"tokens": 0}, "tokens is 0"),
        ({"forget": []}, "forget is empty: give a list of texts"),
        ({"retain": None}, "retain is None: give a list of texts"),
        ({"forget": ["  "]}, "forget: the text (text) is empty"),
        ({"forget": [7]}, "forget: the text is given as an int"),
        ({"forget": ["2 + 2"]}, "the texts of forget have 5 tokens, at least 256 are needed"),
        ({"retain": DIGITS}, "forget and retain are the same texts"),
        ({"method": "key_space"}, "forget has 2 texts, each of which gives one key: at least 16 are needed"),
        ({"method": "experts"}, "models have no experts"),
        ({"method": "static", "share": 1.0}, "no neuron of layer 0 would be left: give a smaller share"),
        ({"strenght": 1.0}, "switch_off has no option 'strenght': did you mean strength?"),
    ],
)
def test_mistakes_are_told_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(coreskip.CoreskipError) as error:
        coreskip.switch_off(tiny("llama"), Spelled(), **{**kinds(), **options})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_whose_numbers_are_broken() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = math.nan
    with pytest.raises(coreskip.CoreskipError, match="activations on forget are not finite"):
        coreskip.switch_off(model, Spelled(), **kinds())


def test_texts_of_one_kind_with_themselves_in_other_words() -> None:
    same = many(DIGITS)
    with pytest.raises(coreskip.CoreskipError, match="the same texts"):
        coreskip.switch_off(tiny("llama"), Spelled(), method="key_space", **kinds(same, same[::-1]))


def test_another_models_plan_is_refused() -> None:
    plan = coreskip.switch_off(tiny("llama"), Spelled(), **kinds())
    with pytest.raises(coreskip.PlanError, match="other weights"):
        coreskip.wrap(tiny("llama", seed=1), plan)


def test_a_wrapped_model_is_refused_and_files_and_ids_are_texts(tmp_path: Path) -> None:
    model, tokenizer = tiny("llama"), Spelled()
    with coreskip.wrap(model), pytest.raises(coreskip.CoreskipError, match="wrapped already"):
        coreskip.switch_off(model, tokenizer, **kinds())
    file = tmp_path / "digits.txt"
    file.write_text(DIGITS[0])
    ids = TokenText(torch.tensor(tokenizer(DIGITS[0]).input_ids), torch.tensor([], dtype=torch.int64), "ids")
    found = [
        json.dumps(dict(coreskip.switch_off(model, tokenizer, **kinds(texts)).calibration), sort_keys=True)
        for texts in ([DIGITS[0]], DIGITS[0], file, [file], ids)
    ]
    assert len(set(found)) == 1
