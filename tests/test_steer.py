"""Control vectors: found as defined, kept in a file, added to the residual stream, taken off without a trace."""

from __future__ import annotations

import copy
import math
import struct
from pathlib import Path
from typing import Any

import packed_models
import pytest
import torch
from tiny_models import EXPERTS, FAMILIES, Spelled, greedy, plan_of, prompt, tiny

import coreskip
from coreskip.predictors.control_vectors import ControlVector, direction
from coreskip.predictors.fingerprint import Fingerprint
from coreskip.runtime.wrap import runtime_of

GOOD = ["it was wonderful", "they were great", "a lovely day", "how nice of her"]
BAD = ["it was terrible", "they were awful", "a horrid day", "how mean of her"]


def vector_of(model: Any, **options: Any) -> ControlVector:
    return coreskip.control_vector(model, Spelled(), positive=GOOD, negative=BAD, progress=False, **options)


def some_vector(model: Any, seed: int = 0, size: float = 3.0) -> ControlVector:
    g, fingerprint = torch.Generator().manual_seed(seed), Fingerprint.of(model)
    layers = range(len(fingerprint.intermediate_sizes))
    return ControlVector({i: size * torch.randn(fingerprint.hidden_size, generator=g) for i in layers}, fingerprint)


# --- finding them -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_mean_is_the_difference_of_last_hidden_states() -> None:
    model = tiny("llama")
    vector = vector_of(model, method="mean")
    means = []
    for texts in (GOOD, BAD):
        ids = [torch.tensor([Spelled()(text).input_ids]) for text in texts]
        found = [model(row, output_hidden_states=True).hidden_states for row in ids]
        # transformers' last one is behind the final norm
        means.append([torch.stack([h[layer + 1][0, -1] for h in found]).mean(0) for layer in range(2)])
    for layer in range(2):
        torch.testing.assert_close(vector.directions[layer], means[0][layer] - means[1][layer], atol=1e-4, rtol=1e-4)
    assert sorted(vector.directions) == [0, 1, 2]


def test_pca_is_the_first_component_of_differences_in_both_orders() -> None:
    g = torch.Generator().manual_seed(0)
    negative = torch.randn(12, 7, generator=g)
    positive = negative + torch.tensor([0.0, 3.0, 0, 0, -2.0, 0, 0]) + 0.3 * torch.randn(12, 7, generator=g)
    found = direction(positive, negative, "pca")
    differences = torch.cat([positive - negative, negative - positive]).double()
    values, vectors = torch.linalg.eigh(differences.T @ differences / len(differences))
    component = vectors[:, values.argmax()]
    unit = (found / found.norm()).double()
    assert abs(float(unit @ component)) == pytest.approx(1.0, abs=1e-6)
    along = (positive - negative).double() @ unit
    assert float(along.mean()) > 0
    assert float(found.norm()) == pytest.approx(float(along.abs().mean()), rel=1e-5)
    assert float(direction(negative, positive, "pca") @ found) < 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ica"}, "method is 'ica'; choose from pca, mean"),
        ({"positive": []}, "positive is empty"),
        ({"negative": None}, "negative is None"),
        ({"negative": BAD[:2]}, "pca compares pairs, and there are 4 positive and 2 negative texts"),
        ({"negative": GOOD}, "positive and negative are the same texts"),
        ({"layers": [3]}, "there is no layer 3: the model has 3, from 0 to 2"),
        ({"layers": [0.5]}, "give a list of their numbers"),
        ({"positive": [""]}, "positive: the text (text) is empty"),
        ({"strength": 1.0}, "control_vector has no option 'strength'"),
    ],
)
def test_mistakes_are_told_in_one_line(options: dict[str, Any], message: str) -> None:
    given = {"positive": GOOD, "negative": BAD, "progress": False, **options}
    with pytest.raises(coreskip.CoreskipError) as error:
        coreskip.control_vector(tiny("llama"), Spelled(), **given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize(
    ("number", "message"), [(0.0, "do not tell positive from negative"), (math.nan, "are not finite numbers")]
)
def test_hidden_states_that_tell_nothing(number: float, message: str) -> None:
    model = tiny("llama")
    model.model.embed_tokens.weight.fill_(number)
    with pytest.raises(coreskip.CoreskipError, match=message):
        vector_of(model)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_vector_is_kept_in_one_file(tmp_path: Path) -> None:
    model, file = tiny("llama"), tmp_path / "tone.safetensors"
    vector = vector_of(model, layers=[0, 2])
    vector.save(file)
    loaded = coreskip.ControlVector.load(file)
    assert loaded.recipe == {"method": "pca"}
    assert loaded.calibration["positive"]["texts"] == 4
    assert sorted(loaded.directions) == [0, 2]
    assert all(torch.equal(tensor, loaded.directions[layer]) for layer, tensor in vector.directions.items())
    with coreskip.steer(model, loaded, layers=[2]):
        pass
    with pytest.raises(
        coreskip.CoreskipError, match="the control vector was made for a model of this shape with other"
    ):
        coreskip.steer(tiny("llama", seed=1), loaded)
    with pytest.raises(coreskip.CoreskipError, match="the control vector was made for a model with model_type llama"):
        coreskip.steer(tiny("gpt2"), loaded)


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "v"
    some_vector(tiny("llama")).save(file)
    whole = file.read_bytes()
    broken = {
        "truncated": whole[:-7],
        "no safetensors": b"hello" * 9,
        "empty": b"",
        "edited numbers": whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:],
        "edited document": whole.replace(b"llama", b"lamas", 1),
        "other tensors": struct.pack("<Q", 2) + b"{}",
    }
    for what, data in broken.items():
        file.write_bytes(data)
        with pytest.raises(coreskip.CoreskipError) as error:
            coreskip.ControlVector.load(file)
        assert str(file) in str(error.value), what
        assert "\n" not in str(error.value), what
    with pytest.raises(coreskip.CoreskipError, match="cannot read the control vector"):
        coreskip.ControlVector.load(tmp_path / "none")
    with pytest.raises(coreskip.CoreskipError, match="is a folder"):
        some_vector(tiny("llama")).save(tmp_path)
    with pytest.raises(coreskip.CoreskipError, match="cannot write"):
        some_vector(tiny("llama")).save(tmp_path / "nowhere" / "v")


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ({}, "for one layer at least"),
        ({3: torch.zeros(64)}, "is for layer 3, its model has 3"),
        ({0: torch.zeros(32)}, "is not fp32 of shape"),
        ({0: torch.zeros(64).double()}, "is not fp32 of shape"),
        ({0: torch.full((64,), math.nan)}, "not a finite number"),
    ],
)
def test_vectors_that_make_no_sense(directions: dict[int, torch.Tensor], message: str) -> None:
    with pytest.raises(coreskip.CoreskipError, match=message):
        ControlVector(directions, Fingerprint.of(tiny("llama")))


# --- at work ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "gpt_oss"])
def test_prompts_and_decode_steps_are_steered(family: str) -> None:
    assert family in FAMILIES | EXPERTS
    model, ids = tiny(family), prompt(2, 9)
    vector, plain, text = some_vector(model), model(ids).logits, greedy(model, ids)
    layers = coreskip.predictors.anatomy.dissect(model).layers

    def added(module: Any, args: Any, output: Any) -> Any:
        more = -0.5 * vector.directions[1]
        return output + more if isinstance(output, torch.Tensor) else (output[0] + more, *output[1:])

    handle = layers[1].register_forward_hook(added)
    expected, logits = greedy(model, ids), model(ids).logits
    handle.remove()
    with coreskip.steer(model, vector, -0.5):  # after the middle one of three layers
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(greedy(model, ids), expected)
        with coreskip.wrap(model):
            assert torch.equal(greedy(model, ids), expected)
    assert not torch.equal(logits, plain)
    assert torch.equal(model(ids).logits, plain)
    assert torch.equal(greedy(model, ids), text)


@pytest.mark.parametrize("first", ["wrap", "steer"])
@pytest.mark.parametrize("kind", ["static", "griffin"])
def test_plans_and_vectors_come_in_either_order_and_go_in_either(first: str, kind: str) -> None:
    model, ids = tiny("llama"), prompt(1, 9)
    vector, plan, plain = some_vector(model), plan_of(model, kind), greedy(model, ids)
    with coreskip.wrap(model, plan):
        planned = greedy(model, ids)
        steering = coreskip.steer(model, vector)
        both = greedy(model, ids)
        steering.close()
        assert torch.equal(greedy(model, ids), planned)
        assert runtime_of(model).notice() is None  # native steps are back
    assert len({tuple(text[0].tolist()) for text in (plain, planned, both)}) == 3
    if first == "wrap":
        coreskip.wrap(model, plan)
        coreskip.steer(model, vector)
    else:
        coreskip.steer(model, vector)
        coreskip.wrap(model, plan)
    assert torch.equal(greedy(model, ids), both)
    coreskip.unwrap(model)
    assert torch.equal(greedy(model, ids), plain)
    with pytest.raises(coreskip.CoreskipError, match="not wrapped"):
        coreskip.unwrap(model)


def test_taking_a_plan_off_by_its_block_leaves_the_vector() -> None:
    model, ids = tiny("llama"), prompt(1, 9)
    with coreskip.steer(model, some_vector(model)):
        steered = greedy(model, ids)
        with coreskip.wrap(model):
            assert torch.equal(greedy(model, ids), steered)
        assert torch.equal(greedy(model, ids), steered)
        with coreskip.Engine(model, Spelled()) as engine:  # which wraps, and gives way to others
            engine.generate("abc", max_new_tokens=2)
        assert torch.equal(greedy(model, ids), steered)


def test_unwrap_leaves_nothing_behind() -> None:
    model, ids = tiny("llama"), prompt(1, 9)
    plain = model(ids).logits
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    coreskip.steer(model, some_vector(model))
    second = coreskip.steer(model, some_vector(model, seed=1), layers=[0, 2])
    coreskip.unwrap(model)
    second.close()  # of no effect any more
    assert torch.equal(model(ids).logits, plain)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_several_vectors_add_up_and_strength_multiplies() -> None:
    model, ids = tiny("llama"), prompt(1, 9)
    vector = some_vector(model, size=0.3)
    doubled = ControlVector({i: 2 * v for i, v in vector.directions.items()}, vector.model)
    texts = []
    with coreskip.steer(model, vector, layers=[1]), coreskip.steer(model, vector, layers=[1]):
        texts.append(model(ids).logits)
    with coreskip.steer(model, vector, 2.0):
        texts.append(model(ids).logits)
    with coreskip.steer(model, doubled, 1, layers=(1,)):
        texts.append(model(ids).logits)
    for other in texts[1:]:
        torch.testing.assert_close(texts[0], other, atol=1e-4, rtol=1e-4)
    with coreskip.steer(model, vector, 0.0):
        zero = model(ids).logits
    assert torch.equal(zero, model(ids).logits)


def test_prompts_that_were_read_with_a_vector_are_read_again_without() -> None:
    """An engine keeps prompts that it has read; a hook changes what comes of them."""
    model = tiny("llama")
    vector = some_vector(model)
    with coreskip.Engine(model, packed_models.tokenizer(), coreskip.Plan.dense(model), max_batch=4) as engine:

        def text() -> str:
            return engine.generate("w5 w6 w7 w8 w9", max_new_tokens=8)

        plain = text()
        for _ in range(2):
            with coreskip.steer(model, vector, 4.0):
                steered = text()
            assert text() == plain
            assert steered != plain
    with coreskip.Engine(model, packed_models.tokenizer(), coreskip.Plan.dense(model)) as alone:
        assert alone.generate("w5 w6 w7 w8 w9", max_new_tokens=8) == plain
        with coreskip.steer(model, vector, 4.0):
            assert alone.generate("w5 w6 w7 w8 w9", max_new_tokens=8) == steered


def test_other_dtypes_exact_mode_and_four_bits() -> None:
    model, ids = tiny("llama").bfloat16(), prompt(1, 9)
    with coreskip.steer(model, some_vector(model)):
        assert model(ids).logits.dtype == torch.bfloat16
    model = tiny("llama")
    vector = some_vector(model)
    with coreskip.steer(model, vector):
        expected = greedy(model, ids)
        with coreskip.wrap(model, plan_of(model, "static"), exact=True):
            assert torch.equal(greedy(model, ids), expected)
        rounded = coreskip.wrap(model, coreskip.Plan.dense(model, "int4"))
        text = greedy(rounded, ids)
        coreskip.unwrap(model)
    with coreskip.wrap(model, coreskip.Plan.dense(model, "int4"), keep_originals=True):
        coreskip.steer(model, vector)
        assert torch.equal(greedy(model, ids), text)


def test_a_copy_of_a_steered_model_is_steered_by_itself() -> None:
    model, ids = tiny("llama"), prompt(1, 9)
    plain = model(ids).logits
    coreskip.steer(model, some_vector(model))
    twin = copy.deepcopy(model)
    steered = model(ids).logits
    coreskip.unwrap(model)
    assert torch.equal(model(ids).logits, plain)
    assert torch.equal(twin(ids).logits, steered)
    coreskip.unwrap(twin)
    assert torch.equal(twin(ids).logits, plain)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((math.nan,), {}, "strength is nan; it must be a finite number"),
        (("2",), {}, "strength is '2'"),
        ((True,), {}, "strength is True"),
        ((1.0,), {"layers": [3]}, "the control vector has no layer 3: it has 0 to 2"),
        ((1.0,), {"layers": []}, "give a list of numbers of layers"),
        ((1.0,), {"layers": 1}, "layers is 1"),
        ((1.0,), {"layer": 1}, "steer has no option 'layer': did you mean layers?"),
    ],
)
def test_steering_refuses_in_one_line(arguments: Any, options: Any, message: str) -> None:
    model, ids = tiny("llama"), prompt(1, 9)
    plain = model(ids).logits
    with pytest.raises(coreskip.CoreskipError) as error:
        coreskip.steer(model, some_vector(model), *arguments, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert torch.equal(model(ids).logits, plain)
    with pytest.raises(coreskip.CoreskipError, match="the control vector is a dict"):
        coreskip.steer(model, {}, 1.0)  # type: ignore[arg-type]
    with coreskip.steer(model, some_vector(model)), pytest.raises(coreskip.CoreskipError, match="steered already"):
        vector_of(model)
