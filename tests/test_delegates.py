"""Models that generate by a model inside them: wrapped is the one inside, and the outer one stands for it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from exact_mode import Eager
from tiny_models import VOCABULARY, NoTokenizer, greedy, plan_of, prompt, tiny
from torch import nn
from transformers import LlamaForCausalLM

import coreskip
from coreskip import CoreskipError, Engine
from coreskip.predictors.plan import Plan
from coreskip.runtime.wrap import is_wrapped, runtime_of


class Tuner(nn.Module):
    """As PEFT's: holds the model, and lends it its own attributes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class Adapted(nn.Module):
    """As PEFT's outermost: holds the tuner, and hands `generate` on."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model, self.config = Tuner(model), model.config

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)


class WithValues(nn.Module):
    """As TRL's: a model and a value head, of which `generate` needs the model alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pretrained_model, self.v_head = model, nn.Linear(64, 1)
        self.config = model.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.pretrained_model(*args, **kwargs, output_hidden_states=True)
        return output.logits, self.v_head(output.hidden_states[-1])

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.pretrained_model.generate(*args, **kwargs)


OUTERS = [Adapted, WithValues]


@pytest.mark.parametrize("outer", OUTERS)
@pytest.mark.parametrize("kind", ["griffin", "static"])
def test_two_turns_are_those_of_the_model_inside(outer: Any, kind: str) -> None:
    ids, more, model = prompt(1, 9), prompt(1, 5, seed=2), tiny("llama")
    plan = plan_of(model, kind)

    def turns(model: Any) -> list[torch.Tensor]:
        first = greedy(model, ids, 8, return_dict_in_generate=True)
        whole = torch.cat([first.sequences, more], dim=1)
        return [whole, greedy(model, whole, 8, past_key_values=first.past_key_values)]

    with coreskip.wrap(model, plan):
        expected = turns(model)
    around = outer(model)
    with coreskip.wrap(around, plan) as wrapped:
        assert wrapped is around
        for text, right in zip(turns(around), expected, strict=True):
            assert torch.equal(text, right)


@pytest.mark.parametrize("outer", OUTERS)
def test_exact_mode_drafts(outer: Any) -> None:
    model, ids = tiny("llama"), prompt(1, 9)
    around = outer(model)
    plain = greedy(around, ids, 40)
    with coreskip.wrap(around, plan_of(model, "griffin", 0.8), exact=True):
        exact = runtime_of(around).exact
        assert exact is runtime_of(model).exact
        for _ in range(2):
            exact.costs = Eager()
            assert torch.equal(greedy(around, ids, 40), plain)
            assert exact.last.note is None
            assert sum(exact.last.drafted.values()) > 0


@pytest.mark.parametrize("outer", OUTERS)
def test_the_outer_model_is_wrapped_as_the_inner_one_is(outer: Any) -> None:
    model = tiny("llama")
    around, plan, ids = outer(model), plan_of(model, "static"), prompt(1, 9)
    plain, attributes = greedy(around, ids, 8), set(vars(around))
    assert coreskip.wrap(around, plan) is around
    for wrapped in (around, model):
        assert is_wrapped(wrapped)
        with pytest.raises(CoreskipError, match="wrapped already"):
            coreskip.wrap(wrapped, plan)
        with pytest.raises(CoreskipError, match="unwrap"):
            copy.deepcopy(wrapped)
    assert not torch.equal(greedy(around, ids, 8), plain)
    coreskip.unwrap(around)
    assert type(around) is outer
    assert type(model) is LlamaForCausalLM
    assert set(vars(around)) == attributes
    assert torch.equal(greedy(around, ids, 8), plain)
    coreskip.unwrap(coreskip.wrap(around, plan).train().eval())
    coreskip.wrap(around, plan)
    coreskip.unwrap(model)  # by the inner one
    assert type(around) is outer
    with coreskip.wrap(around, plan):
        assert is_wrapped(model)
    with pytest.raises(CoreskipError, match="not wrapped"):
        coreskip.unwrap(around)


@pytest.mark.parametrize("outer", OUTERS)
def test_new_weights_and_another_dtype(outer: Any) -> None:
    model = tiny("llama")
    around, ids = outer(model), prompt(1, 9)
    other = outer(tiny("llama", seed=3))
    with coreskip.wrap(around, Plan.dense(model)):
        greedy(around, ids, 8)
        around.load_state_dict(other.state_dict())
        assert torch.equal(greedy(around, ids, 8), greedy(other, ids, 8))
        around.to(torch.bfloat16)
        greedy(around, ids, 8)


def test_the_engine_and_measurements_take_it(llama: Any) -> None:
    around = Adapted(llama)
    with coreskip.wrap(llama, Plan.dense(around)):  # one plan fits both
        pass
    engine = Engine(around, NoTokenizer(), plan_of(llama, "static"))
    assert runtime_of(llama).plan.layers
    engine.close()
    assert type(around) is Adapted


class Chooses(LlamaForCausalLM):
    """May generate by itself or by the model that it holds."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.inner = LlamaForCausalLM(config)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.generate(*args, **kwargs)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = tiny("llama"), tiny("llama")
        self.config = self.first.config

    def get_output_embeddings(self) -> Any:
        return self.first.get_output_embeddings()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.second.generate(*args, **kwargs)


def test_who_generates_must_be_clear() -> None:
    config = tiny("llama").config
    for model in (Chooses(config).eval(), Two()):
        with pytest.raises(CoreskipError, match="wrap the LlamaForCausalLM that it holds"):
            coreskip.wrap(model, plan_of(tiny("llama"), "static"))
    assert config.vocab_size == VOCABULARY


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    around, ids = peft.get_peft_model(tiny("llama"), config).eval(), prompt(1, 9)
    plain = greedy(around, ids, 40)
    plan = plan_of(around.get_base_model(), "griffin", 0.7)
    with coreskip.wrap(around, plan, exact=True):
        for _ in range(2):
            assert torch.equal(greedy(around, ids, 40), plain)
        assert runtime_of(around).exact.last.note is None
    assert torch.equal(greedy(around, ids, 40), plain)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_peft_with_virtual_tokens(kind: str) -> None:
    """The KV cache is longer than the text."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = getattr(peft, kind)(num_virtual_tokens=4, task_type="CAUSAL_LM")
    around, ids = peft.get_peft_model(tiny("llama"), config).eval(), prompt(1, 9)
    plain = greedy(around, ids, 20)
    for options in ({"exact": True}, {"lookup": True}, {}):
        with coreskip.wrap(around, Plan.dense(around.get_base_model()), **options):
            for _ in range(2):
                assert torch.equal(greedy(around, ids, 20), plain), options
