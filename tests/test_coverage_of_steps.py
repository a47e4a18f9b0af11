"""One step that agrees is no proof for all: positions, lengths and parts that the native step does not describe."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from tiny_models import greedy, prompt, tiny
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import LlamaAttention

import coreskip
from coreskip.kernels.ops import available
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.plan import Plan
from coreskip.runtime import native, selfcheck
from coreskip.runtime.coverage import uncovered
from coreskip.runtime.kv_cache import twin_of
from coreskip.runtime.selfcheck import KEYS, Checkpoints, agree, far_positions, named_positions
from coreskip.runtime.wrap import runtime_of

pytestmark = pytest.mark.skipif(available("cpu") is not None, reason="needs the compiled kernels")

MODES: list[dict[str, Any]] = [{}, {"exact": True}, {"lookup": True}]


def same_text(model: Any, ids: torch.Tensor, new: int, expected: torch.Tensor, **mode: Any) -> str | None:
    """Wraps a dense plan, compares three texts with `expected`, and returns why steps were not native."""
    with coreskip.wrap(model, Plan.dense(model), **mode):
        for _ in range(3):
            assert torch.equal(greedy(model, ids, new), expected)
        return runtime_of(model).steps.native.refusal


def ministral3(**overrides: Any) -> Any:
    """Queries grow with the logarithm of how often their position exceeds 16."""
    rope = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 16,
        "llama_4_scaling_beta": 0.5, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    model = tiny("mistral", sliding_window=None)
    config = transformers.Ministral3Config(**{**settings_of(model.config), "rope_parameters": rope, **overrides})
    twin = transformers.AutoModelForCausalLM.from_config(config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def settings_of(config: Any) -> dict[str, Any]:
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "head_dim", "pad_token_id", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_scaled_by_position(dtype: torch.dtype, mode: dict[str, Any]) -> None:
    model, ids = ministral3().to(dtype), prompt(1)
    reason = same_text(model, ids, 40, greedy(model, ids, 40), **mode)
    assert reason is not None
    assert "other positions" in reason


@pytest.mark.parametrize("keep_originals", [True, False])
def test_queries_scaled_by_position_with_weights_packed_at_once(keep_originals: bool) -> None:
    """Nothing is given away for steps that would be wrong."""
    model, ids = ministral3(), prompt(1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with coreskip.wrap(model, Plan.dense(model, weights="int4"), keep_originals=keep_originals):
        text = greedy(model, ids, 40)  # whose numbers the modules read in the plan's format
        assert torch.equal(greedy(model, ids, 40), text)
        assert runtime_of(model).steps.native.refusal
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_same_model_without_that_scale_is_native() -> None:
    model, ids = ministral3(), prompt(1)
    model.config.rope_parameters["llama_4_scaling_beta"] = 0.0
    assert same_text(model, ids, 40, greedy(model, ids, 40)) is None


def last_keys(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
    """Attention that sees the last 16 keys."""
    mask = None if mask is None else mask[..., -16:]
    return sdpa_attention_forward(module, q, k[:, :, -16:], v[:, :, -16:], mask, **options)


@pytest.fixture
def registered() -> Iterator[str]:
    AttentionInterface.register("last_keys", last_keys)
    AttentionMaskInterface.register("last_keys", sdpa_mask)
    yield "last_keys"
    del AttentionInterface._global_mapping["last_keys"], AttentionMaskInterface._global_mapping["last_keys"]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_registered_attention_function(registered: str, mode: dict[str, Any]) -> None:
    model, ids = tiny("llama"), prompt(1, 5)
    plain = greedy(model, ids, 40)
    model.set_attn_implementation(registered)
    expected = greedy(model, ids, 40)
    assert not torch.equal(expected, plain), "or else nothing is tested"
    reason = same_text(model, ids, 40, expected, **mode)
    assert reason is not None
    assert "last_keys" in reason


def test_a_stock_function_replaced_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama"), prompt(1, 5)
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", last_keys)
    assert same_text(model, ids, 40, greedy(model, ids, 40)) is not None


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_stock_attention_is_covered(implementation: str) -> None:
    model, ids = tiny("llama"), prompt(1, 5)
    model.set_attn_implementation(implementation)
    for mode in MODES:
        assert same_text(model, ids, 40, greedy(model, ids, 40), **mode) is None


class Switching(LlamaAttention):
    """Attention of a class of its own, which does otherwise from some length on."""

    at = 20

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, weights = super().forward(hidden_states, *args, **kwargs)
        seen = kwargs["past_key_values"].get_seq_length(self.layer_idx) if kwargs.get("past_key_values") else 0
        # the tokens of this pass are in the cache by now
        places = torch.arange(seen - hidden_states.shape[1], seen)
        return output * torch.where(places < self.at, 1.0, -1.0)[:, None].to(output.dtype), weights


def switching(at: int, **overrides: Any) -> Any:
    model = tiny("llama", **overrides)
    for layer in model.model.layers:
        layer.self_attn.__class__ = Switching
        layer.self_attn.at = at
    return model


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_switch_at_a_length_that_nothing_names(mode: dict[str, Any]) -> None:
    """Seen in advance behind made-up keys."""
    model, ids = switching(20), prompt(1)
    assert same_text(model, ids, 40, greedy(model, ids, 40), **mode) is not None


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("sampled", [False, True])
def test_a_switch_that_the_configuration_names(
    sampled: bool, mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a text; up to there steps are native."""
    model, ids = switching(600), prompt(1, 570)
    model.config.switch_position = 600

    def text() -> torch.Tensor:
        torch.manual_seed(2)
        return greedy(model, ids, 60, do_sample=sampled)

    expected, drafts = text(), []
    with coreskip.wrap(model, Plan.dense(model), **mode):
        runtime = runtime_of(model)
        greedy(model, ids[:, :9], 3)
        assert runtime.steps.native.ready
        count = runtime.steps.native._count
        monkeypatch.setattr(runtime.steps.native, "_count", lambda *given: (drafts.append(given), count(*given)))
        for _ in range(2):
            assert torch.equal(text(), expected)
        assert drafts
        reason = str(runtime.steps.native.refusal)
        assert "tokens on its logits differ from the model's own" in reason
        assert 600 - 7 <= int(reason.split()[1]) <= 600, "at the token, or before a draft that reaches it"


def test_a_switch_where_the_length_has_doubled() -> None:
    model, ids = switching(1024, max_position_embeddings=2048), prompt(1, 1010)
    assert same_text(model, ids, 40, greedy(model, ids, 40)) is not None


def test_a_batch_is_compared_too() -> None:
    model, ids = switching(600), prompt(3, 590)
    model.config.switch_position = 600
    mask = torch.ones_like(ids)
    mask[1, :50] = 0
    expected = greedy(model, ids, 30, attention_mask=mask)
    with coreskip.wrap(model, Plan.dense(model)):
        greedy(model, ids[:, :9], 3)
        for _ in range(2):
            assert torch.equal(greedy(model, ids, 30, attention_mask=mask), expected)
        assert runtime_of(model).steps.native.refusal is not None


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
@pytest.mark.parametrize("keep_originals", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_steps_pass_and_are_compared_once_a_model(
    dtype: torch.dtype, keep_originals: bool, weights: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny("mistral", sliding_window=540, max_position_embeddings=2048).to(dtype), prompt(1, 530)
    compared = []
    plain = native.NativeSteps.compare
    monkeypatch.setattr(native.NativeSteps, "compare", lambda self, named: (compared.append(named), plain(self, named)))
    coreskip.wrap(model, Plan.dense(model, weights=weights), keep_originals=keep_originals)
    for _ in range(5):
        greedy(model, ids[:, :9], 3)  # in bfloat16 a first step may disagree
    assert runtime_of(model).steps.native.ready
    texts = []
    for _ in range(2):
        texts.append(greedy(model, ids, 30))
        assert len(compared) == 1
    assert torch.equal(*texts), "a comparison leaves nothing behind"
    assert runtime_of(model).steps.native.ready


def test_ranges_of_lengths() -> None:
    config = tiny("mistral", sliding_window=700, max_position_embeddings=4096).config
    assert {700, 4096} <= named_positions(config)
    points = Checkpoints(config)
    assert not points.due(0, 8)
    assert not points.due(KEYS, 100)
    assert points.room(10) == 690
    assert not points.due(699, 1), "its token sees 700"
    assert points.due(700, 1)
    assert points.due(698, 4)
    points.passed(700, 1)
    assert not points.due(700, 1)
    assert points.room(700) == 1024 - 700
    assert not points.due(1016, 8)
    assert points.due(1017, 8)
    points.passed(1017, 8)
    assert not points.due(1024, 1)
    assert points.due(5000, 1), "far behind the one before"
    assert points.room(1 << 25) > 1 << 40


def test_positions_to_look_at_first() -> None:
    config = tiny("llama", max_position_embeddings=131072).config
    far = far_positions(config).tolist()
    assert far[:2] == [8, 131071]
    assert len(far) <= 8
    assert {8192, 2048} & set(far)
    config.rope_parameters["original_max_position_embeddings"] = 8192
    assert 8192 in far_positions(config).tolist()


def test_who_agrees_for_one_of_several_tokens() -> None:
    tried: list[torch.Tensor] = []

    def run(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tried.append(ids)
        return torch.zeros(2, 1, 4), torch.full((2, 1, 4), float(len(tried) < 3))

    assert agree(run, lambda a, b: torch.equal(a, b), (2, 1), 50)
    assert len(tried) == 3
    assert not agree(run, lambda a, b: False, (2, 1), 50)
    assert len(tried) == 3 + selfcheck._TRIES


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_twin_of_a_cache(family: str) -> None:
    model, ids = tiny(family), prompt(1, 12)
    with torch.no_grad(), coreskip.wrap(model, Plan.dense(model)):
        greedy(model, ids, 3)
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)  # into rooms
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        twin, expected = twin_of(cache), copy.deepcopy(cache)
        logits = [runtime_of(model)._forward(ids[:, :4], past_key_values=c).logits for c in (twin, expected)]
        assert torch.equal(*logits)
        assert (twin.get_seq_length(), cache.get_seq_length()) == (17, 13)
        for layer, (keys, values) in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)


def zero_parameter(layer: Any) -> None:
    layer.self_attn.register_parameter("lambda_q1", torch.nn.Parameter(torch.zeros(4)))


def buffer(layer: Any) -> None:
    layer.register_buffer("layer_scalar", torch.ones(1))


def child(layer: Any) -> None:
    layer.mlp.adapter = torch.nn.Linear(64, 64)


def norm(layer: Any) -> None:
    layer.self_attn.v_norm = copy.deepcopy(layer.input_layernorm)


def linear(layer: Any) -> None:
    class LowRank(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input)

    layer.self_attn.q_proj.__class__ = LowRank


def own_forward(layer: Any) -> None:
    plain = layer.self_attn.forward
    layer.self_attn.forward = lambda *args, **kwargs: plain(*args, **kwargs)


@pytest.mark.parametrize("change", [zero_parameter, buffer, child, norm, linear, own_forward])
def test_parts_that_are_not_described(change: Callable[[Any], None]) -> None:
    """Even where they change nothing yet."""
    model, ids = tiny("llama"), prompt(1)
    assert uncovered(dissect(model)) is None
    change(model.model.layers[1])
    assert uncovered(dissect(model)) is not None
    expected = greedy(model, ids, 12)
    with coreskip.wrap(model, Plan.dense(model)):
        for _ in range(2):
            assert torch.equal(greedy(model, ids, 12), expected)
        assert not runtime_of(model).steps.native.ready


def test_a_forward_put_into_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    plain = LlamaAttention.forward
    monkeypatch.setattr(LlamaAttention, "forward", lambda self, *args, **kwargs: plain(self, *args, **kwargs))
    assert uncovered(dissect(model)) == "the forward of a LlamaAttention is not its class's own"


def test_a_wrapped_model_is_covered_as_it_was() -> None:
    """The description is made again later: our own patches do not count."""
    model = tiny("llama")
    for mode in MODES:
        with coreskip.wrap(model, Plan.dense(model), **mode):
            assert uncovered(runtime_of(model).anatomy) is None
