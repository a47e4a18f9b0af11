"""The very numbers of float32 matrices, read in fewer bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import greedy, plan_of, prompt, tiny
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import DynamicCache

import coreskip
from coreskip import Plan
from coreskip.kernels import cpu, ops, reference
from coreskip.kernels.groups import GROUPED
from coreskip.kernels.packed import EXACT_BYTES, PackedLinear
from coreskip.predictors.plan import LayerPlan
from coreskip.predictors.policies import Sketch
from coreskip.runtime.cost import bytes_per_token, cost
from coreskip.runtime.wrap import runtime_of

NO_LIBRARY = ops.available("cpu")
pytestmark = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))
SHAPES = [(1, 1), (16, 32), (17, 33), (100, 70), (45, 288)]
FORMS = ["int4 from below", "int4 from above", "int4 in few steps", "int8_groups", "bfloat16", "float16"]


def made_of(form: str, rows: int, width: int, seed: int = 0) -> Tensor:
    """Numbers that were made in a form, as who packs models makes them: one end of a group counts nothing."""
    rng = torch.Generator().manual_seed(seed)
    if form in ("bfloat16", "float16"):
        return torch.randn(rows, width, generator=rng).to(getattr(torch, form)).float()
    groups = -(-width // 32)
    scale = torch.rand(rows, groups, 1, generator=rng).add(0.01).mul(0.05).half().float()
    least = torch.randn(rows, groups, 1, generator=rng).half().float()
    if form == "int8_groups":
        q = torch.randint(-127, 128, (rows, groups, 32), generator=rng)
        q[..., 0] = 127
        return (q * scale).flatten(1)[:, :width].contiguous()
    q = torch.randint(0, 6 if "few" in form else 16, (rows, groups, 32), generator=rng)
    q[..., 0] = 0
    w = least + q * scale if form == "int4 from below" else -8 * scale + q * scale
    return (-w if form == "int4 from above" else w).flatten(1)[:, :width].contiguous()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_packed_are_the_very_numbers(isa: str, form: str, shape: tuple[int, int]) -> None:
    weight = made_of(form, *shape)
    packed = cpu.pack_exactly(weight, torch.ones(shape[0]))
    assert packed is not None
    if shape[1] > 1:  # one number alone has any form
        assert (packed.fmt or str(packed.weight.dtype).removeprefix("torch.")) == form.split()[0]
    if packed.grouped:
        assert packed.whole
        assert torch.equal(cpu.untile(packed, torch.empty_like(weight)), weight)
    else:
        assert torch.equal(packed.weight[:, : shape[1]].float(), weight)


def test_wide_rows_of_a_larger_matrix_are_read_where_they_lie(isa: str) -> None:
    whole = made_of("int4 from below", 40, 128)
    part = cpu.pack_exactly(whole[8:30, :96])
    assert part is not None
    assert torch.equal(cpu.untile(part, torch.empty(22, 96)), whole[8:30, :96])


@pytest.mark.parametrize("form", FORMS)
def test_other_numbers_have_no_such_form(isa: str, form: str) -> None:
    weight = made_of(form, 40, 100)
    size = EXACT_BYTES[form.split()[0]] / 4
    assert cpu.pack_exactly(weight, most=size) is not None
    assert cpu.pack_exactly(weight, most=0.99 * size) is None
    assert cpu.pack_exactly(weight.bfloat16()) is None
    assert cpu.pack_exactly(weight.t()) is None  # a view whose rows are columns
    for odd in (0.123456789, float("nan")) if form in ("bfloat16", "float16") else (0.123456789, float("inf")):
        spoilt = weight.clone()
        spoilt[39, 99] = odd  # the first groups do not tell
        assert cpu.pack_exactly(spoilt) is None
    assert cpu.pack_exactly(torch.randn(40, 100)) is None


@pytest.mark.parametrize("form", ["int4 from below", "int4 from above", "int8_groups"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_products_are_as_exact_as_torchs(isa: str, form: str, shape: tuple[int, int], rows: int) -> None:
    weight, bias = made_of(form, *shape), torch.randn(shape[0])
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)) * 10
    packed = cpu.pack_exactly(weight, bias)
    assert packed is not None
    y, exact = ops.linear(x, packed, backend="cpu"), linear(x.double(), weight.double(), bias.double())
    own = (linear(x, weight, bias) - exact).abs().max()
    assert (y - exact).abs().max() <= 2 * own + 1e-6 * exact.abs().max()
    of_torch = ops.linear(x, packed, backend="torch")
    torch.testing.assert_close(of_torch, y, rtol=1e-5, atol=1e-4 + 1e-6 * float(exact.abs().max()))
    for row in range(rows):  # alone as among others
        assert torch.equal(ops.linear(x[row], packed, backend="cpu"), y[row])


def test_infinities_and_nans_do_what_they_do_in_torch(isa: str) -> None:
    for form in GROUPED:
        weight = made_of("int4 from below" if form == "int4" else form, 33, 64)
        packed = cpu.pack_exactly(weight)
        assert packed is not None
        for odd in (float("inf"), float("-inf"), float("nan")):
            x = torch.randn(2, 64)
            x[1, 40] = odd
            expected = linear(x, weight)
            torch.testing.assert_close(ops.linear(x, packed), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_the_op_keeps_what_it_was_told_through_the_dispatcher() -> None:
    packed = cpu.pack_exactly(made_of("int4 from below", 32, 64))
    assert packed is not None
    x = torch.randn(3, 64)
    compiled = torch.compile(lambda x: ops.linear(x, packed), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), reference.linear(x, packed), rtol=1e-5, atol=1e-4)
    rounded = PackedLinear(packed.weight, packed.in_features, rows=packed.rows)
    assert (ops.linear(x, rounded) - ops.linear(x, packed)).abs().max() > 1e-4


# ---- models --------------------------------------------------------------------------------------------------------


def model_of(form: str, family: str = "llama") -> Any:
    """A tiny model whose linears, with all that read their matrices, are of such numbers."""
    model = tiny(family)
    with torch.no_grad():
        for seed, module in enumerate(m for m in model.modules() if isinstance(m, nn.Linear)):
            module.weight.copy_(made_of(form, *module.weight.shape, seed) * (0.25 if form in ("bfloat16",) else 1))
    return model


def tokens_alone(model: Any) -> Tensor:
    """Greedy tokens of a ragged batch, then of one sequence."""
    ids = prompt(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    return torch.cat([greedy(model, ids, 12, attention_mask=mask).flatten(), greedy(model, prompt(1, 7), 12)[0]])


@pytest.mark.parametrize("family", ["llama", "llama_bias", "phi3", "gemma2", "qwen3", "starcoder2", "phi"])
def test_dense_steps_read_fewer_bytes_and_give_the_same(family: str) -> None:
    model, more = model_of("int4 from below", family), prompt(2, 3, seed=4)
    expected, cache = tokens_alone(model), DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(2, 9), past_key_values=cache)
        twin = DynamicCache(config=model.config)
        model(prompt(2, 9), past_key_values=twin)
        logits = model(more, past_key_values=twin).logits
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    plan = Plan.dense(model)
    predicted = bytes_per_token(model, plan)
    with coreskip.wrap(model, plan):
        assert torch.equal(tokens_alone(model), expected)
        assert runtime_of(model).steps.native.ready
        total, _ = runtime_of(model).steps.native.packed_bytes()
        assert total <= 0.25 * sum(w.nbytes for w in matrices)
        assert predicted == pytest.approx(total, rel=0.25)  # norms and embeddings count for much in a tiny model
        with torch.no_grad():
            torch.testing.assert_close(model(more, past_key_values=cache).logits, logits, rtol=1e-4, atol=1e-3)
        assert not any(w.is_meta for w in matrices)
    assert torch.equal(tokens_alone(model), expected)


def test_halves_in_float32_are_halved_where_the_originals_may_go() -> None:
    model = model_of("bfloat16")
    expected, linears = tokens_alone(model), [m for m in model.modules() if isinstance(m, nn.Linear)]
    before = [m.weight.detach().clone() for m in linears]
    in_place = sum(m.weight.nbytes for m in linears)
    with torch.no_grad():
        prefilled = model(prompt(2, 30)).logits
    with coreskip.wrap(model, Plan.dense(model)):  # half as much again would be a surprise
        assert torch.equal(tokens_alone(model), expected)
        assert runtime_of(model).steps.native.packed_bytes()[0] == in_place
    for keep in (True, False):
        with coreskip.wrap(model, Plan.dense(model), keep_originals=keep):
            assert torch.equal(tokens_alone(model), expected)
            assert runtime_of(model).steps.native.packed_bytes()[0] < 0.53 * in_place  # rows of 160 are padded
            assert linears[0].weight.is_meta != keep
            with torch.no_grad():
                torch.testing.assert_close(model(prompt(2, 30)).logits, prefilled, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(m.weight, w) for m, w in zip(linears, before, strict=True))


def test_a_matrix_that_would_not_come_back_bit_for_bit_stays() -> None:
    model = model_of("int8_groups")
    up = model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        up.weight[3, 5] = -0.0
    before = up.weight.detach().clone()
    with coreskip.wrap(model, Plan.dense(model), keep_originals=False):
        assert not up.weight.is_meta
        assert model.model.layers[0].mlp.up_proj.weight.is_meta
        greedy(model, prompt(1, 7), 4)
    assert torch.equal(up.weight.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("kind", ["static", "griffin", "sketch"])
def test_sparse_plans_read_their_other_matrices_in_fewer_bytes(kind: str) -> None:
    """Neurons are bundled as they are by default: the tokens are those of a model without such forms."""
    model = model_of("int4 from below")
    if kind == "sketch":
        dense = Plan.dense(model)
        plan = Plan(tuple(LayerPlan(Sketch(bits=4, keep=0.5)) for _ in dense.layers), dense.model, {"method": kind})
    else:
        plan = plan_of(model, kind)
    in_place = runtime_of(coreskip.wrap(model, plan))
    native = in_place.steps.native
    native._packing = replace(native._packing, narrow=0.0)
    expected = tokens_alone(model)
    assert in_place.steps.native.ready
    coreskip.unwrap(model)
    with coreskip.wrap(model, plan):
        assert torch.equal(tokens_alone(model), expected)
        linears = runtime_of(model).steps.native.described.model.base.layers[0]
        assert linears.attention.q.grouped
        assert linears.mlp.up.grouped == (kind == "griffin")  # which decodes densely where nothing was chosen


def test_exact_mode_verifies_with_the_same_numbers() -> None:
    model = model_of("int4 from below")
    expected = greedy(model, prompt(1, 20), 40)
    with coreskip.wrap(model, plan_of(model, "static"), exact=True):
        assert torch.equal(greedy(model, prompt(1, 20), 40), expected)
        assert runtime_of(model).steps.native.packed_bytes()[0] < 0.2 * sum(
            m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear)
        )


def test_the_embedded_model_in_float32_reads_its_own_four_bits(embedded: tuple[Any, Any]) -> None:
    model, _ = embedded
    expected = greedy(model, prompt(1, 20), 12)
    plan = Plan.dense(model)
    with coreskip.wrap(model, plan):
        assert torch.equal(greedy(model, prompt(1, 20), 12), expected)
        assert runtime_of(model).steps.native.packed_bytes()[0] == pytest.approx(
            bytes_per_token(model, plan), rel=0.002
        )
        assert runtime_of(model).steps.native.packed_bytes()[0] < 100e6


def test_matrices_can_be_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("int4 from below")
    narrow, plan = bytes_per_token(model, Plan.dense(model)), Plan.dense(model)
    assert narrow < cost(model, plan).weighed < 1.1 * narrow  # a little slower than inputs in 8 bits
    monkeypatch.setenv("CORESKIP_NARROW", "0")
    assert cost(model, plan).weighed == bytes_per_token(model, plan) > 3 * narrow
    with coreskip.wrap(model, plan):
        greedy(model, prompt(1, 7), 4)
        assert not runtime_of(model).steps.native.described.model.base.head.grouped


def test_a_model_without_native_steps_keeps_its_matrices_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("gpt2")
    with coreskip.wrap(model, Plan.dense(model), keep_originals=False):
        greedy(model, prompt(1, 7), 4)
        assert not any(p.is_meta for p in model.parameters())
    assert not caplog.records
