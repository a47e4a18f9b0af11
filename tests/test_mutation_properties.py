"""What somebody changes about a wrapped model, at whatever moment, acts as it does on a plain one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import greedy, prompt, tiny
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import DynamicCache

import coreskip
from coreskip import Plan
from coreskip.kernels.ops import available
from coreskip.runtime.wrap import runtime_of

pytestmark = pytest.mark.skipif(available("cpu") is not None, reason="needs the compiled kernels")


class LowRank(nn.Module):
    """An adapter: a module and a low-rank addition to it."""

    def __init__(self, base: nn.Module, seed: int) -> None:
        super().__init__()
        self.base = base
        outputs, inputs = (base.weight.shape[1], base.weight.shape[0]) if is_transposed(base) else base.weight.shape
        self.a = nn.Parameter(noise(inputs, 2, seed=seed))
        self.b = nn.Parameter(noise(2, outputs, seed=seed + 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 0.3 * (x @ self.a @ self.b)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 1.5


def noise(*shape: int, seed: int) -> torch.Tensor:
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def linear_of(model: Any, seed: int) -> tuple[nn.Module, str]:
    """The owner and the name of one of the linears of the decoder layers."""
    layers = model.get_decoder() if model.config.model_type == "gpt2" else model.model.layers
    found = [
        (owner, name)
        for owner in layers.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.Linear) or is_transposed(child)
    ]
    return found[seed % len(found)]


def norm_of(model: Any, seed: int) -> nn.Module:
    norms = [m for m in model.modules() if "Norm" in type(m).__name__]
    return norms[seed % len(norms)]


def weight_of(model: Any, seed: int) -> nn.Parameter:
    owner, name = linear_of(model, seed)
    return getattr(owner, name).weight


def matrix_written(model: Any, seed: int) -> None:
    weight_of(model, seed).mul_(0.5)


def element_written(model: Any, seed: int) -> None:
    weight_of(model, seed)[3, 5] = 4.0


def data_written(model: Any, seed: int) -> None:
    weight_of(model, seed).data.mul_(0.5)


def data_replaced(model: Any, seed: int) -> None:
    weight = weight_of(model, seed)
    weight.data = weight.data * 0.7


def weight_replaced(model: Any, seed: int) -> None:
    owner, name = linear_of(model, seed)
    module = getattr(owner, name)
    module.weight = nn.Parameter(noise(*module.weight.shape, seed=seed))


def norm_written(model: Any, seed: int) -> None:
    norm_of(model, seed).weight.mul_(1.4)


def norm_data_written(model: Any, seed: int) -> None:
    norm_of(model, seed).weight.data.add_(0.5)


def embedding_written(model: Any, seed: int) -> None:
    model.get_input_embeddings().weight.mul_(0.8)


def head_replaced(model: Any, seed: int) -> None:
    rows, columns = model.get_output_embeddings().weight.shape
    head = nn.Linear(columns, rows, bias=False)
    head.weight = nn.Parameter(noise(rows, columns, seed=seed))
    model.set_output_embeddings(head)


def optimizer_stepped(model: Any, seed: int, fused: bool = False) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=fused)
    with torch.enable_grad():
        model(prompt(1, 6, seed), use_cache=False).logits.square().mean().backward()
    optimizer.step()
    model.zero_grad()


def fused_optimizer_stepped(model: Any, seed: int) -> None:
    optimizer_stepped(model, seed, fused=True)


def adapter_put(model: Any, seed: int) -> None:
    owner, name = linear_of(model, seed)
    setattr(owner, name, LowRank(getattr(owner, name), seed))


def adapter_put_by_dictionary(model: Any, seed: int) -> None:
    owner, name = linear_of(model, seed)
    owner._modules[name] = LowRank(getattr(owner, name), seed)


def adapter_put_on_all(model: Any, seed: int) -> None:
    for index in range(3):
        adapter_put(model, seed + 5 * index)


def linear_replaced(model: Any, seed: int) -> None:
    owner, name = linear_of(model, seed)
    new = copy.deepcopy(getattr(owner, name))
    new.weight = nn.Parameter(noise(*new.weight.shape, seed=seed))
    setattr(owner, name, new)


def forward_replaced(model: Any, seed: int) -> None:
    owner, name = linear_of(model, seed)
    module = getattr(owner, name)
    before = module.forward
    module.forward = lambda *args: 0.5 * before(*args)


def norm_forward_replaced(model: Any, seed: int) -> None:
    module = norm_of(model, seed)
    before = module.forward
    module.forward = lambda x: 0.5 * before(x)


def hooked(model: Any, seed: int) -> None:
    owner, name = linear_of(model, seed)
    getattr(owner, name).register_forward_hook(lambda module, args, output: output * 0.7)


def hooked_before(model: Any, seed: int) -> None:
    norm_of(model, seed).register_forward_pre_hook(lambda module, args: (args[0] * 2 + 0.1,))


def pruned(model: Any, seed: int) -> None:
    owner, name = linear_of(model, seed)
    prune.l1_unstructured(getattr(owner, name), "weight", amount=0.5)


def parametrised(model: Any, seed: int) -> None:
    owner, name = linear_of(model, seed)
    if not parametrize.is_parametrized(getattr(owner, name)):
        parametrize.register_parametrization(getattr(owner, name), "weight", Doubled())


def resized(model: Any, seed: int) -> None:
    torch.manual_seed(seed)
    model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + 8, mean_resizing=False)


def attention_changed(model: Any, seed: int) -> None:
    model.set_attn_implementation("eager")


def layer_dropped(model: Any, seed: int) -> None:
    model.config.num_hidden_layers = 2
    if model.config.model_type == "gpt2":
        model.transformer.h = model.transformer.h[:2]


def scaled_otherwise(model: Any, seed: int) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), float):
            module.scaling = module.scaling * 0.5


def activation_replaced(model: Any, seed: int) -> None:
    for module in model.modules():
        for name in ("act_fn", "act"):
            if isinstance(getattr(module, name, None), nn.Module):
                setattr(module, name, nn.Tanh())


MUTATIONS: dict[str, Callable[[Any, int], None]] = {
    f.__name__: f
    for f in (
        matrix_written, element_written, data_written, data_replaced, weight_replaced, norm_written, norm_data_written,
        embedding_written, head_replaced, optimizer_stepped, fused_optimizer_stepped, adapter_put,
        adapter_put_by_dictionary, adapter_put_on_all, linear_replaced, forward_replaced, norm_forward_replaced, hooked,
        hooked_before, pruned, parametrised, resized, attention_changed, layer_dropped, scaled_otherwise,
        activation_replaced,
    )
}  # fmt: skip
FAMILIES = ("llama", "qwen2", "gemma2", "gpt2")
WRITES_NO_MATRIX = ("norm_written", "norm_data_written", "embedding_written", "head_replaced", "adapter_put")
WRITES_NO_MATRIX += ("forward_replaced", "norm_forward_replaced", "hooked", "attention_changed", "scaled_otherwise")


class Pair:
    """A wrapped model and a plain one that are used alike."""

    def __init__(self, family: str, **options: Any) -> None:
        self.plain = tiny(family)
        if options:  # numbers that packing does not round
            for parameter in self.plain.parameters():
                parameter.data = parameter.data.bfloat16().float()
        self.models = (coreskip.wrap(copy.deepcopy(self.plain), Plan.dense(self.plain), **options), self.plain)
        self.caches: list[Any] = []

    def change(self, name: str, seed: int) -> None:
        for model in self.models:
            MUTATIONS[name](model, seed)

    def prefill(self) -> None:
        self.caches = [DynamicCache(config=model.config) for model in self.models]
        self.compare(prompt(1, 7))

    def step(self, token: int = 11) -> None:
        if not self.caches:
            self.prefill()
        self.compare(torch.tensor([[token]]))

    def compare(self, ids: torch.Tensor) -> None:
        ours, theirs = (
            model(ids, past_key_values=cache, use_cache=True).logits
            for model, cache in zip(self.models, self.caches, strict=True)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.std()))

    def generate(self) -> None:
        ours, theirs = (
            greedy(model, prompt(1, 6), 5, output_scores=True, return_dict_in_generate=True) for model in self.models
        )
        assert torch.equal(ours.sequences, theirs.sequences)
        assert torch.equal(greedy(self.models[0], prompt(1, 6), 5), ours.sequences)

    @property
    def native(self) -> bool:
        return runtime_of(self.models[0]).steps.native.ready


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_change_between_two_steps_of_one_cache(name: str) -> None:
    pair = Pair("llama")
    with torch.no_grad():
        pair.step()
        pair.step(12)
        assert pair.native
        pair.change(name, 4)
        if name in ("layer_dropped",):  # the cache is another model's
            pair.caches = []
        pair.step(13)
        pair.step(14)
        pair.generate()
    coreskip.unwrap(pair.models[0])
    with torch.no_grad():
        pair.caches = []
        pair.step(15)


ACTIONS = st.one_of(
    st.just(("step", 0)),
    st.just(("generate", 0)),
    st.just(("prefill", 0)),
    st.tuples(st.sampled_from(sorted(set(MUTATIONS) - {"layer_dropped", "resized"})), st.integers(0, 40)),
)


def play(pair: Pair, actions: list[tuple[str, int]]) -> None:
    with torch.no_grad():
        for name, seed in actions:
            if name in MUTATIONS:
                pair.change(name, seed)
            else:
                getattr(pair, name)()
        pair.step()


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(FAMILIES), st.lists(ACTIONS, min_size=1, max_size=7))
def test_changes_at_any_moment(family: str, actions: list[tuple[str, int]]) -> None:
    play(Pair(family), actions)


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.one_of(
            ACTIONS.filter(lambda a: a[0] not in MUTATIONS),
            st.tuples(st.sampled_from(WRITES_NO_MATRIX), st.integers(0, 40)),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_changes_where_packed_weights_have_replaced_the_originals(actions: list[tuple[str, int]]) -> None:
    play(Pair("qwen2", keep_originals=False), actions)


@pytest.mark.parametrize("name", WRITES_NO_MATRIX)
def test_a_change_beside_packed_weights(name: str) -> None:
    pair = Pair("qwen2", keep_originals=False)
    with torch.no_grad():
        pair.step()
        pair.change(name, 4)
        pair.step(12)
        pair.step(13)
        pair.generate()
    coreskip.unwrap(pair.models[0])
    with torch.no_grad():
        pair.caches = []
        pair.step(14)
