"""Other ways of running than a float32 text model without gradients: axes of positions, recurrent layers, other types,
default types and devices, inference mode, gradients, autocast."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from tiny_models import greedy, plan_of, prompt, tiny
from transformers import DynamicCache

import coreskip
from coreskip.kernels.ops import available
from coreskip.predictors.plan import Plan
from coreskip.runtime.wrap import is_wrapped, runtime_of

MODES: list[dict[str, Any]] = [{}, {"exact": True}, {"lookup": True}]
KERNELS = pytest.mark.skipif(available("cpu") is not None, reason="needs the compiled kernels")
SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def vision_language(kind: str) -> Any:
    whole = transformers.AutoConfig.for_model(kind)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = type(whole.text_config)(**{**SMALL, "rope_parameters": rope})
    tiny_vision = {
        "depth": 1, "hidden_size": 32, "embed_dim": 32, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 32,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    vision = whole.vision_config
    for name, value in tiny_vision.items():
        if hasattr(vision, name):
            setattr(vision, name, value)
    config = type(whole)(text_config=text.to_dict(), vision_config=vision.to_dict(), pad_token_id=0)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.25 if "embed" not in name else 0.5)
    return model


@KERNELS
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_text_on_a_vision_language_model(kind: str, mode: dict[str, Any]) -> None:
    model, padded = vision_language(kind), prompt(2)
    padded[1, :4] = 0
    calls = [(prompt(1), {}), (padded, {"attention_mask": (padded > 0).long()}), (prompt(1), {"num_beams": 2})]
    expected = [greedy(model, ids, 20, **options) for ids, options in calls]
    with coreskip.wrap(model, Plan.dense(model), **mode):
        for _ in range(2):
            for (ids, options), text in zip(calls, expected, strict=True):
                assert torch.equal(greedy(model, ids, 20, **options), text)
        assert runtime_of(model).steps.native.ready


@KERNELS
def test_positions_that_differ_between_axes() -> None:
    """As they do after a picture."""
    model, ids = vision_language("qwen2_vl"), prompt(1, 9)
    places = torch.arange(9).expand(4, 1, 9).clone()
    places[2:, :, 3:] -= 2

    def steps() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        model(ids, position_ids=places, past_key_values=cache)
        at = torch.tensor([9, 9, 7, 7])[:, None, None]
        return torch.cat([model(ids[:, :1], position_ids=at + i, past_key_values=cache).logits for i in range(4)])

    with torch.no_grad():
        expected = steps()
        with coreskip.wrap(model, Plan.dense(model)):
            assert torch.allclose(steps(), expected, rtol=1e-5, atol=1e-5)
            greedy(model, ids, 4)
            assert runtime_of(model).steps.native.ready
            assert torch.allclose(steps(), expected, rtol=1e-5, atol=1e-5)


def hybrid(kind: str) -> Any:
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, "num_hidden_layers": 4})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kind", ["qwen3_5_text", "olmo_hybrid", "recurrent_gemma"])
def test_recurrent_layers_beside_attention(kind: str, mode: dict[str, Any]) -> None:
    model, ids = hybrid(kind), prompt(1)
    expected = greedy(model, ids, 20)
    with coreskip.wrap(model, Plan.dense(model), **mode):
        for _ in range(2):
            assert torch.equal(greedy(model, ids, 20), expected)
        exact = runtime_of(model).exact
        if exact is not None:
            assert exact.last is not None
            assert "more than keys and values" in str(exact.last.note)


@pytest.mark.parametrize("kind", ["static", "griffin", "similar"])
def test_a_type_that_no_kernel_reads_is_refused_at_once(kind: str) -> None:
    model = tiny("llama").double()
    plan = plan_of(model, kind)
    with pytest.raises(coreskip.CoreskipError, match="weights are float64: cast the model"):
        coreskip.wrap(model, plan)
    assert not is_wrapped(model)
    mixed = tiny("llama")
    mixed.model.layers[2].mlp.double()
    with pytest.raises(coreskip.CoreskipError, match="layer 2, whose MLP's weights are float64"):
        coreskip.wrap(mixed, plan_of(tiny("llama"), kind))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_float64_without_a_plan(mode: dict[str, Any]) -> None:
    model, ids = tiny("llama").double(), prompt(1)
    expected = greedy(model, ids, 20)
    with coreskip.wrap(model, Plan.dense(model), **mode):
        for _ in range(2):
            assert torch.equal(greedy(model, ids, 20), expected)


@pytest.fixture(params=[torch.bfloat16, torch.float64, torch.float16], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


@KERNELS
@pytest.mark.parametrize("family", ["llama", "gemma2", "starcoder2"])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_another_default_type(weights: str | None, family: str, default_dtype: torch.dtype) -> None:
    """Native steps give the same text as where they were described under the usual one."""
    model, ids = tiny(family), prompt(1)
    plan = Plan.dense(model, weights=weights)

    def text() -> torch.Tensor:
        with coreskip.wrap(model, plan):
            greedy(model, ids, 3)
            made = greedy(model, ids, 30)
            assert runtime_of(model).steps.native.ready, runtime_of(model).steps.native.refusal
        return made

    expected = text()
    torch.set_default_dtype(default_dtype)
    assert torch.equal(text(), expected)


@KERNELS
def test_plans_under_another_default_type(default_dtype: torch.dtype) -> None:
    for kind in ("griffin", "static", "similar"):
        model, ids = tiny("llama"), prompt(1)
        plan = plan_of(model, kind)
        with coreskip.wrap(model, plan):
            greedy(model, ids, 3)
            expected = greedy(model, ids, 20)
        torch.set_default_dtype(default_dtype)
        with coreskip.wrap(model, plan):
            greedy(model, ids, 3)
            assert torch.equal(greedy(model, ids, 20), expected)
            assert runtime_of(model).steps.native.ready
        torch.set_default_dtype(torch.float32)


@KERNELS
@pytest.mark.parametrize("weights", [None, "int8"])
def test_another_default_device(weights: str | None) -> None:
    """transformers itself makes tensors there, so steps are given all they need."""
    model, ids = tiny("llama"), prompt(1)

    def steps() -> torch.Tensor:
        cache, logits = DynamicCache(config=model.config), []
        places = torch.arange(9, device="cpu")[None]
        model(ids, past_key_values=cache, position_ids=places, attention_mask=torch.ones_like(ids))
        for at in range(9, 13):
            given = {"position_ids": torch.tensor([[at]], device="cpu")}
            given["attention_mask"] = torch.ones((1, at + 1), dtype=torch.int64, device="cpu")
            logits.append(model(ids[:, :1], past_key_values=cache, **given).logits)
        return torch.cat(logits, 1)

    with torch.no_grad():
        with coreskip.wrap(model, Plan.dense(model, weights=weights)):
            steps()
            expected = steps()
        with torch.device("meta"), coreskip.wrap(model, Plan.dense(model, weights=weights)):
            with torch.device("cpu"):
                steps()
            assert runtime_of(model).steps.native.ready
            cache = DynamicCache(config=model.config)
            with torch.device("cpu"):
                model(ids, past_key_values=cache)
            logits = torch.cat([model(ids[:, :1], past_key_values=cache).logits for _ in range(4)], 1)
    assert logits.device.type == "cpu"
    assert torch.equal(logits, expected)


def of_bfloat16_numbers(model: Any) -> Any:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(module.weight.bfloat16())
    return model


@KERNELS
@pytest.mark.parametrize("unwrapping", [False, True])
@pytest.mark.parametrize("wrapping", [False, True])
def test_a_model_wrapped_in_inference_mode_can_be_trained_later(wrapping: bool, unwrapping: bool) -> None:
    model, ids = of_bfloat16_numbers(tiny("llama")), prompt(1)
    before, expected = copy.deepcopy(model.state_dict()), greedy(model, ids, 12)
    with torch.inference_mode(wrapping):
        coreskip.wrap(model, Plan.dense(model), keep_originals=False)
        replaced = runtime_of(model).replaced
        assert replaced is not None
        assert len(replaced)
        greedy(model, ids, 4)
    assert torch.equal(greedy(model, ids, 12), expected)
    embeddings = torch.randn(1, 5, 64, requires_grad=True)
    model(inputs_embeds=embeddings).logits.sum().backward()
    with torch.inference_mode(unwrapping):
        coreskip.unwrap(model)
    assert not any(p.is_inference() for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])


def decode_with_gradients(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    model.zero_grad()
    cache = DynamicCache(config=model.config)
    logits = [model(ids, past_key_values=cache).logits[:, -1:]]
    for _ in range(4):
        logits.append(model(logits[-1].argmax(-1), past_key_values=cache).logits)
    together = torch.cat(logits, 1)
    together.square().sum().backward()
    return together.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_decode_loop_with_gradients(family: str, weights: str | None, mode: dict[str, Any]) -> None:
    model, ids = tiny(family), prompt(1)
    logits, gradients = decode_with_gradients(model, ids)
    with coreskip.wrap(model, Plan.dense(model, weights=weights), **mode):
        greedy(model, ids, 3)
        for _ in range(2):
            got, found = decode_with_gradients(model, ids)
            assert torch.equal(got, logits)
            assert all(
                a is not None and b is not None and torch.equal(a, b) for a, b in zip(found, gradients, strict=True)
            )


@pytest.mark.parametrize("kind", ["static", "griffin"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_gradients_of_weights_that_a_plan_has_copied_are_refused(family: str, kind: str) -> None:
    model, ids = tiny(family), prompt(1)
    with coreskip.wrap(model, plan_of(model, kind)):
        with pytest.raises(coreskip.CoreskipError, match="no gradients of their weights"):
            decode_with_gradients(model, ids)
        for layer in runtime_of(model).anatomy.mlps:
            layer.up.requires_grad_(False)
            layer.down.requires_grad_(False)
        assert decode_with_gradients(model, ids)[1][0] is not None, "those of the rest flow"


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("keep_originals", [None, False])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}], ids=str)
def test_autocast_is_the_models_own(options: dict[str, Any], keep_originals: bool | None, mode: dict[str, Any]) -> None:
    """Warm or not, whatever is under way: what plain transformers makes of it."""
    if keep_originals is False and "exact" in mode:
        pytest.skip("exact mode keeps them")
    model, ids = of_bfloat16_numbers(tiny("llama")), prompt(1, 12)

    def text() -> torch.Tensor:
        torch.manual_seed(3)
        return greedy(model, ids, 40, **options)

    with torch.autocast("cpu", torch.bfloat16):
        expected = text()
    usual = text()
    with coreskip.wrap(model, Plan.dense(model), keep_originals=keep_originals, **mode):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(text(), expected)
            assert torch.equal(text(), usual)
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(text(), usual)


def test_steps_by_hand_under_autocast() -> None:
    model, ids = tiny("llama"), prompt(2)

    def steps() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        return torch.cat([model(ids[:, :3], past_key_values=cache).logits for _ in range(3)], 1)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = steps()
        with coreskip.wrap(model, Plan.dense(model)):
            with torch.autocast("cpu", enabled=False):
                greedy(model, ids, 3)
            assert torch.equal(steps(), expected)


@pytest.mark.parametrize("kind", ["static", "griffin", "similar"])
def test_plans_run_under_autocast(kind: str) -> None:
    model, ids = tiny("llama"), prompt(1)
    with torch.autocast("cpu", torch.bfloat16), coreskip.wrap(model, plan_of(model, kind)):
        assert greedy(model, ids, 8).shape == (1, 17)
        assert runtime_of(model).usage.neuron_sparsity() > 0


@KERNELS
@pytest.mark.parametrize("weights", [None, "int4"])
def test_a_real_model_in_bfloat16_runs_natively(embedded: tuple[Any, Any], weights: str | None) -> None:
    """Compared with modules whose own rounding to bfloat16 is larger than that of native steps."""
    model, tokenizer = copy.deepcopy(embedded[0]).to(torch.bfloat16), embedded[1]
    for text in ("The lighthouse stood at the end of a long spit of rock, and", "2 + 2 =", "Once"):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad(), coreskip.wrap(model, Plan.dense(model, weights)):
            greedy(model, ids, 8)
            assert runtime_of(model).steps.native.refusal is None, text
            assert runtime_of(model).steps.native.ready, text
