"""Every source of scores, against a direct, slow computation of what it says it is."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import FAMILIES, NoTokenizer, greedy, prompt, tiny

import coreskip
from coreskip import CoreskipError, NeuronScores
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.checks import STATIC_SCORES
from coreskip.predictors.features import factorise, winners
from coreskip.predictors.importance import token_contributions
from coreskip.predictors.lm_head import LMHead
from coreskip.predictors.observe import taps
from coreskip.predictors.sources import SOURCES, Wants
from coreskip.predictors.sources_contrast import average_precision
from coreskip.predictors.sources_gradient import perturbation_hessian
from coreskip.runtime import scoring

LAYER = 1


def text(tokens: int = 64, seed: int = 2) -> TokenText:
    return TokenText(prompt(1, tokens, seed)[0], torch.tensor([], dtype=torch.int64), f"letters {seed}")


def scores(model: Any, given: Any = None, **options: Any) -> NeuronScores:
    return coreskip.scores(model, NoTokenizer(), given, progress=False, **options)


def double() -> Any:
    return tiny("llama").double()


def activations(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """By layer ``[tokens, width]``, from the MLP's own parts."""
    found: list[torch.Tensor] = []
    states = model.model(ids, output_hidden_states=True)
    inner = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda m, args: inner.append(args[0])) for layer in model.model.layers
    ]
    model.model(ids)
    for handle in handles:
        handle.remove()
    assert len(states.hidden_states) == len(inner) + 1
    for layer, x in zip(model.model.layers, inner, strict=True):
        mlp = layer.mlp
        found.append((F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)).flatten(0, 1).detach())
    return found


def test_activation_sources_are_their_sums(llama: Any) -> None:
    ids = text().ids[None]
    down = [layer.mlp.down_proj.weight.detach() for layer in llama.model.layers]
    with torch.no_grad():
        a = activations(llama, ids)
    for name in ("griffin", "signed", "magnitude", "magnitude_down"):
        found = scores(llama, text(), method=name)
        for layer, values in enumerate(found.layers):
            expected = torch.zeros(values.shape)
            for token in a[layer]:  # one at a time
                expected += token_contributions(token[None], name, 0.4, down[layer].norm(dim=0))[0]  # type: ignore[arg-type]
            torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    found = scores(llama, text(), method="wanda")
    for layer, values in enumerate(found.layers):
        norm = a[layer].norm(dim=0)
        slow = torch.stack([sum(abs(w) * norm[j] for w in down[layer][:, j]) for j in range(len(norm))])  # type: ignore[misc]
        torch.testing.assert_close(values, slow, rtol=1e-4, atol=1e-5)


def loss_with(
    model: Any, ids: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor], part: str = "before"
) -> float:
    """The next tokens' loss where the MLP of `LAYER` has its activations, or its output, changed."""
    down = model.model.layers[LAYER].mlp.down_proj
    if part == "before":
        handle = down.register_forward_pre_hook(lambda m, args: (change(args[0].clone()),))
    else:
        handle = down.register_forward_hook(lambda m, args, out: change(out.clone()))
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    handle.remove()
    return float(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))


def test_taylor_is_the_slope_of_the_loss() -> None:
    model, given = double(), text(8)
    ids, h = given.ids[None], 1e-2  # smaller steps are lost in the norms, which compute in float32
    found = scores(model, given, method="taylor").layers[LAYER]
    for neuron in (0, 17, 101):
        total = 0.0
        for token in range(8):

            def scaled(a: torch.Tensor, by: float, token: int = token, neuron: int = neuron) -> torch.Tensor:
                a[0, token, neuron] *= by
                return a

            up, down = (loss_with(model, ids, lambda a, s=s: scaled(a, 1 + s * h)) for s in (1, -1))  # type: ignore[misc]
            total += abs((up - down) / (2 * h))
        assert float(found[neuron]) == pytest.approx(total, rel=5e-3)


def test_smooth_gradients_are_means_over_disturbed_inputs() -> None:
    model, given = double(), text(8)
    ids = given.ids[None]
    found = scores(model, given, method="smooth_gradient", samples=3, noise=0.2, seed=5).layers[LAYER]
    generator = torch.Generator().manual_seed(5)
    embeddings = model.model.embed_tokens(ids).detach()
    gradients = []
    for _ in range(3):
        spread = 0.2 * (embeddings.max() - embeddings.min())
        x = embeddings + (spread * torch.randn(embeddings.shape, generator=generator)).double()
        held: list[torch.Tensor] = []

        def hold(module: Any, args: Any, held: list[torch.Tensor] = held) -> Any:
            held.append(args[0].detach().requires_grad_(True))
            return (held[0],)

        handle = model.model.layers[LAYER].mlp.down_proj.register_forward_pre_hook(hold)
        logits = model(inputs_embeds=x, use_cache=False).logits
        handle.remove()
        F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").backward()
        gradients.append(held[0].grad)
    slow = sum(g[0] for g in gradients) / 3  # type: ignore[index]
    torch.testing.assert_close(found, slow.abs().sum(0).float(), rtol=1e-4, atol=1e-6)


def test_the_perturbation_hessian_is_a_difference_of_slopes() -> None:
    model, ids = double(), text(6).ids[None]
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits.log_softmax(-1)
    down = model.model.layers[LAYER].mlp.down_proj
    found = perturbation_hessian(model, down, ids, plain.float(), 0.05)
    h = 1e-4

    def divergence(shift: float, token: int, channel: int, by: float) -> float:
        def change(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            moved = out + shift * out.square().mean().sqrt()
            moved[0, token, channel] += by
            return moved

        handle = down.register_forward_hook(change)
        with torch.no_grad():
            other = model(ids, use_cache=False).logits.log_softmax(-1)
        handle.remove()
        return float(F.kl_div(other, plain, log_target=True, reduction="sum"))

    for channel in (3, 40):
        slopes = [
            [(divergence(s, t, channel, h) - divergence(s, t, channel, -h)) / (2 * h) for t in range(6)]
            for s in (0.05, -0.05)
        ]
        slow = sum(abs(up - lower) for up, lower in zip(*slopes, strict=True)) / 6
        assert float(found[channel]) == pytest.approx(slow, rel=2e-3, abs=1e-4)
    values = scores(model, text(6).__class__(text(8).ids, text().prefix, "letters"), method="hessian", epsilon=0.05)
    ids = text(8).ids[None]
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits.float().log_softmax(-1)
        a = activations(model, ids)[LAYER]
    curve = perturbation_hessian(model, down, ids, plain, 0.05)
    for neuron in (2, 77):
        cost = [float((curve.double() * (a[t, neuron] * down.weight.detach()[:, neuron]) ** 2).sum()) for t in range(8)]
        assert float(values.layers[LAYER][neuron]) == pytest.approx(sum(cost) / 8, rel=1e-3)


def test_bigrams_are_contexts_of_one_token() -> None:
    model, given = (
        double(),
        TokenText(torch.tensor([7, 9, 7, 9, 7, 11, 9, 7]), torch.tensor([], dtype=torch.int64), "x"),
    )
    found = scores(model, given, method="bigram", contexts=2).layers[LAYER]
    slow = torch.zeros(160, dtype=torch.float64)
    for token, following in ((7, {9: 2, 11: 1}), (9, {7: 3})):
        held: list[torch.Tensor] = []

        def hold(module: Any, args: Any, held: list[torch.Tensor] = held) -> Any:
            held.append(args[0].detach().requires_grad_(True))
            return (held[0],)

        handle = model.model.layers[LAYER].mlp.down_proj.register_forward_pre_hook(hold)
        logits = model(torch.tensor([[token]]), use_cache=False).logits[0, -1].log_softmax(-1)
        handle.remove()
        (-sum(count * logits[other] for other, count in following.items())).backward()  # type: ignore[union-attr]
        slow += (held[0] * held[0].grad)[0, 0].abs().detach()  # type: ignore[operator]
    torch.testing.assert_close(found, slow.float(), rtol=1e-4, atol=1e-6)


def test_contrasts_are_differences_and_rankings(llama: Any) -> None:
    mine, other = text(128, 2), text(128, 3)
    with torch.no_grad():
        a, b = (activations(llama, each.ids[None])[LAYER] for each in (mine, other))
    found = scores(llama, mine, against=other, method="mean_difference").layers[LAYER]
    torch.testing.assert_close(found, a.mean(0) - b.mean(0), rtol=1e-4, atol=1e-5)
    found = scores(llama, mine, against=other, method="relation").layers[LAYER]
    with torch.no_grad():
        pieces = [
            activations(llama, piece[None])[LAYER].mean(0) for each in (mine, other) for piece in each.ids.split(64)
        ]
    for neuron in range(0, 160, 40):
        order = sorted(range(4), key=lambda i: -float(pieces[i][neuron]))
        hits, precision = 0, []
        for place, piece in enumerate(order, 1):
            if piece < 2:
                hits += 1
                precision.append(hits / place)
        assert float(found[neuron]) == pytest.approx(sum(precision) / 2)


def test_average_precision_of_known_orders() -> None:
    values = torch.tensor([[4.0, 1.0], [3.0, 2.0], [2.0, 3.0], [1.0, 4.0]])
    found = average_precision(values, torch.tensor([True, True, False, False]))
    torch.testing.assert_close(found, torch.tensor([1.0, (1 / 3 + 2 / 4) / 2], dtype=torch.float64))


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])  # a gate, one stacked on the up rows, none
def test_lape_is_the_entropy_of_firing(family: str) -> None:
    model = tiny(family)
    texts = {name: text(96, seed) for name, seed in (("en", 2), ("fr", 3), ("de", 4))}
    anatomy = dissect(model)
    shares = []
    for each in texts.values():
        x: list[torch.Tensor] = [torch.empty(0)] * 3
        with taps(anatomy, lambda layer, a: None, x.__setitem__), torch.no_grad():
            model(each.ids[None])
        weights = [mlp.matrices() for mlp in anatomy.mlps]
        gates = [
            F.linear(x[i], w.up if w.gate is None else w.gate, w.up_bias if w.gate is None else w.gate_bias)
            for i, w in enumerate(weights)
        ]
        shares.append([(gate > 0).double().mean(0).numpy() for gate in gates])
    least = np.sort(np.concatenate([each for one in shares for each in one]))
    threshold = least[math.ceil(0.9 * len(least)) - 1]
    for of in (None, "fr"):
        found = scores(model, texts, method="lape", quantile=0.9, of=of)
        for layer, values in enumerate(found.layers):
            p = np.stack([one[layer] for one in shares])
            for neuron in range(0, values.numel(), 7):
                q = p[:, neuron] / max(p[:, neuron].sum(), 1e-30)
                entropy = -sum(v * math.log(v) for v in q if v > 0)
                fires = p[:, neuron].max() if of is None else p[1, neuron]
                expected = math.log(3) - entropy if fires >= threshold else 0.0
                assert float(values[neuron]) == pytest.approx(max(0.0, expected), abs=1e-5)
        assert any(float(values.max()) > 0 for values in found.layers)


@pytest.mark.parametrize("what", ["heads", "mlps"])
def test_ablation_is_the_loss_without(llama: Any, what: str) -> None:
    given = text(32)
    ids = given.ids[None]
    found = scores(llama, given, method="ablation", what=what)
    assert found.unit == what
    assert [len(layer) for layer in found.layers] == [4 if what == "heads" else 1] * 3

    def loss(model: Any) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]))

    for unit in range(4 if what == "heads" else 1):
        other = copy.deepcopy(llama)
        with torch.no_grad():
            if what == "heads":
                other.model.layers[2].self_attn.o_proj.weight[:, unit * 16 : unit * 16 + 16] = 0
            else:
                other.model.layers[2].mlp.down_proj.weight.zero_()
        assert float(found.layers[2][unit]) == pytest.approx(loss(other) - loss(llama), abs=1e-5)
    with pytest.raises(CoreskipError, match=f"and this is a set of {what}"):
        found.top(0.5).plan(llama)


@pytest.mark.parametrize("family", ["llama", "gemma", "opt", "gpt2"])
def test_the_lm_head_reads_what_a_neuron_adds(family: str) -> None:
    """Against the model's own norm and head: how its logits change with a neuron's activation, up to the norm's scale
    and, in a LayerNorm, its mean."""
    model = tiny(family).double()
    anatomy = dissect(model)
    head = LMHead.of(model)
    norms = [m for n, m in anatomy.stack.named_children() if n in ("norm", "final_layer_norm", "ln_f")]
    direction = anatomy.mlps[LAYER].matrices().down[33].double()
    x = torch.randn(anatomy.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, h = 1e3 * (x - x.mean()) / x.std(), 10.0  # so long that the neuron hardly changes its length
    with torch.no_grad():
        output = model.get_output_embeddings()
        slope = (output(norms[0](x + h * direction)) - output(norms[0](x - h * direction))) / (2 * h) * 1e3
    along = direction - (direction @ x) / (x @ x) * x
    if family in ("opt", "gpt2"):
        along = along - along.mean()
    found = head.rows.double() @ along
    torch.testing.assert_close(slope, found, rtol=2e-2, atol=2e-2 * float(found.abs().max()))
    logits = head.logits(LAYER, torch.tensor([33]))[0]
    clear = scores(model, method="lm_head").layers[LAYER][33]
    assert float(clear) == pytest.approx(float((logits.max() - logits.mean()) / logits.std(correction=0)), rel=1e-4)
    token, z = head.promoted(LAYER, 33, 1)[0]
    assert (token, z) == (int(logits.argmax()), pytest.approx(float(clear), rel=1e-4))
    best = head.promoters(token, 1)[0]
    each = [(head.logits(layer) - head.logits(layer).mean(1, True)) for layer in range(3)]
    every = torch.cat([e[:, token] / e.square().mean(1).sqrt() for e in each])
    assert best[0] * 160 + best[1] == int(every.argmax()) or family == "gpt2"


def test_features_are_found_again() -> None:
    """Activations made of four features of eight neurons each."""
    generator = torch.Generator().manual_seed(0)
    planted = torch.zeros(64, 4)
    for k in range(4):
        planted[k * 8 : k * 8 + 8, k] = torch.randn(8, generator=generator).sign() * (
            1 + torch.rand(8, generator=generator)
        )
    shown = torch.rand(200, 4, generator=generator) * (torch.rand(200, 4, generator=generator) < 0.3)
    ids = torch.arange(200)
    options = {"features": 4, "sparsity": 8 / 64, "steps": 200}
    starts = [factorise(shown @ planted.t(), ids, seed=seed, **options) for seed in range(8)]  # type: ignore[arg-type]
    assert sum(each.error < 1e-6 for each in starts) >= 5  # some starts end in a local optimum
    found = starts[0]
    supports = {tuple(sorted(column.nonzero().flatten().tolist())) for column in found.neurons.t()}
    assert supports == {tuple(range(k * 8, k * 8 + 8)) for k in range(4)}
    assert bool((found.tokens >= 0).all())
    feature = int(found.neurons[0].abs().argmax())
    token, strength = found.top_tokens(feature, 1)[0]
    assert strength == float(found.tokens[:, feature].max())
    assert token == int(found.tokens[:, feature].argmax())


def test_factorisation_follows_its_updates() -> None:
    """Three steps, in numpy, neuron by neuron."""
    a = torch.randn(12, 10, generator=torch.Generator().manual_seed(3)).double().numpy()
    g = torch.rand(12, 3, generator=torch.Generator().manual_seed(4)).clamp_min(1e-6).double().numpy()
    best = (np.inf, None)
    for _ in range(3):
        f = a.T @ g @ np.linalg.inv(g.T @ g + 1e-6 * np.eye(3))
        for k in range(3):
            f[np.argsort(-np.abs(f[:, k]))[3:], k] = 0
        length = np.linalg.norm(g, axis=0)
        f, g = f * length, g / length
        error = ((a.T - f @ g.T) ** 2).sum() / (a**2).sum()
        best = min(best, (error, f), key=lambda pair: pair[0])
        p, q = a @ f, f.T @ f
        g = g * np.sqrt((p.clip(0) + g @ (-q).clip(0)) / np.maximum((-p).clip(0) + g @ q.clip(0), 1e-12))
    found = factorise(torch.tensor(a).float(), torch.arange(12), features=3, sparsity=0.3, steps=3, seed=4)
    assert found.error == pytest.approx(best[0], rel=1e-3)
    torch.testing.assert_close(found.neurons, torch.tensor(best[1]).float(), rtol=1e-2, atol=1e-3)
    assert int((winners(torch.randn(20, 3), 0.25) != 0).sum()) == 15


def test_a_feature_scores_its_neurons(llama: Any) -> None:
    options = {"features": 4, "steps": 5, "sparsity": 0.1}
    whole = scores(llama, text(200), method="snmf", **options)
    single = [scores(llama, text(200), method="snmf", feature=k, **options) for k in range(4)]
    slow = torch.stack([each.layers[0] for each in single]).square().sum(0).sqrt()
    torch.testing.assert_close(whole.layers[0], slow, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_source_reads_every_family(family: str) -> None:
    model = tiny(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for name, kind in SOURCES.items():
        if name in ("reap", "frequency"):
            continue
        given: dict[str, Any] = {"given": text(48)}
        if kind.wants is Wants.CONTRAST:
            given["against"] = text(48, 3)
        elif kind.wants is Wants.TEXTS:
            given = {"given": {"a": text(48), "b": text(48, 3)}}
        elif kind.wants is Wants.NOTHING:
            given = {}
        found = scores(model, given.pop("given", None), method=name, **given)
        if found.unit == "neurons":
            assert [len(layer) for layer in found.layers] == list(found.model.intermediate_sizes)
        assert any(float(layer.abs().max()) > 0 for layer in found.layers), name
    assert all(torch.equal(before[name], p) and p.requires_grad for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_static_plans_take_every_source_of_one_text() -> None:
    fitting = {n for n, kind in SOURCES.items() if kind.wants is Wants.TEXT and kind().unit == "neurons"}
    assert set(STATIC_SCORES) == fitting


@pytest.mark.parametrize("score", ["taylor", "wanda", "hessian"])
def test_a_static_plan_by_a_source(llama: Any, score: str) -> None:
    given = text(2000)
    plan = coreskip.analyze(llama, NoTokenizer(), text=given, method="static", keep=0.5, score=score, progress=False)
    assert plan.recipe["score"] == score
    assert plan.quality is not None
    best = scores(llama, TokenText(given.ids[:1200], given.prefix, "letters"), method=score, tokens=16384).top(0.5)
    assert all(torch.equal(layer.neurons.indices, kept) for layer, kept in zip(plan.layers, best, strict=True))  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["griffin", "taylor", "ablation"])
def test_others_may_use_the_model_meanwhile(llama: Any, method: str) -> None:
    expected, stop = scores(llama, text(400), method=method), threading.Event()

    def generate() -> None:
        while not stop.is_set():
            greedy(llama, prompt(1, 7, 9), 4)

    other = threading.Thread(target=generate)
    other.start()
    try:
        found = scores(llama, text(400), method=method)
    finally:
        stop.set()
        other.join()
    for mine, wanted in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


def test_every_module_keeps_its_mode(llama: Any) -> None:
    llama.train()
    llama.model.layers[0].eval()
    before = [module.training for module in llama.modules()]
    scores(llama, text(), method="taylor")
    assert [module.training for module in llama.modules()] == before
    assert before.count(False) > 1


def test_gradients_are_not_followed_in_inference_mode(llama: Any) -> None:
    with torch.inference_mode(), pytest.raises(CoreskipError, match="outside of it"):
        scores(llama, text(), method="taylor")


def test_mistakes(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_work(*args: Any, **options: Any) -> Any:
        raise AssertionError("work was done before the mistake was seen")

    monkeypatch.setattr(scoring, "scored", no_work)
    some = text()
    for options, line in (
        ({"method": "tailor"}, "did you mean taylor"),
        ({"method": "griffin", "samples": 3}, "griffin has no option 'samples'"),
        ({"method": "wanda", "alpha": 0.3}, "wanda has no option 'alpha'"),
        ({"method": "smooth_gradient", "samples": 0}, "samples is 0"),
        ({"method": "hessian", "epsilon": float("nan")}, "epsilon"),
        ({"method": "hessian", "epsilon": 1e-30}, "lost in rounding"),
        ({"method": ["griffin"]}, "unknown method"),
        ({"method": "lape", "of": ["en"]}, "name of one text"),
        ({"method": "ablation", "what": "head"}, "choose from heads, mlps"),
        ({"method": "snmf", "features": 4, "feature": 4}, "no feature 4 of 4"),
        ({"method": "griffin", "against": some}, "leave out against"),
        ({"method": "relation"}, "give text and against"),
        ({"method": "mean_difference", "against": some}, "the same text"),
        ({"method": "lape"}, "takes several texts"),
        ({"method": "griffin", "tokens": 0}, "tokens is 0"),
        ({"method": "griffin", "seed": -1}, "seed"),
    ):
        with pytest.raises(CoreskipError, match=line):
            scores(llama, some, **options)
    for given, line in (
        ({"en": some}, "two of them at least"),
        ({"en": some, "fr": some}, "en and fr are the same text"),
    ):
        with pytest.raises(CoreskipError, match=line):
            scores(llama, given, method="lape")
    with pytest.raises(CoreskipError, match="reads the weights alone"):
        scores(llama, some, method="lm_head")
    with pytest.raises(CoreskipError, match="one text"):
        scores(llama, {"en": some, "fr": text(64, 3)}, method="griffin")
    monkeypatch.undo()
    with pytest.raises(CoreskipError, match="3 tokens, 8 are needed"):
        scores(llama, text(3))
    with pytest.raises(CoreskipError, match="there is no text 'it'"):
        scores(llama, {"en": some, "fr": text(64, 3)}, method="lape", of="it")
    with pytest.raises(CoreskipError, match="have no experts"):
        scores(llama, some, method="reap")
    with pytest.raises(CoreskipError, match="experts alone"):
        scores(tiny("olmoe"), some, method="taylor")
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(CoreskipError, match="NaN"):
        scores(llama, some, method="wanda")
