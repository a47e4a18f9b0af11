"""Scores many plans on the same windows, whose prompts are prefilled and scored densely once: token by token through
the kernels or, as an estimate for searches, as masks over whole passes. Rounding differs between the two, and where a
rule chooses neurons from rounded inputs, some of its choices: figures of masks are marked as estimated.

Only plans that choose token by token, or not at all, can be scored this way: others choose in prefill.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers.cache_utils import Cache

from ..kernels import reference
from ..kernels.neuron_groups import PackedNeurons
from ..kernels.ops import MAX_ROWS, PackedMLP
from ..kernels.packed import ACTS, quantize, spread
from ..kernels.sparse import SlimMLP, SparseMLP
from ..predictors.anatomy import dissect
from ..predictors.calibration import TokenText
from ..predictors.observe import inference
from ..predictors.plan import Plan
from .bundles import Bundles, FewerNeurons, Weights
from .generation import runtime_of
from .quality import WINDOW, Tally, takes_several
from .wrap import wrapped

_LOGITS = 1 << 28  # of windows side by side are kept at most, 4 bytes each
_FLOAT_BYTES = 4 << 30  # of dequantised weights are kept at most; beyond it each pass makes them anew


@dataclass(frozen=True)
class _Window:
    """A window after its prompt: the filled cache, the ids that follow, and what the dense model says of them."""

    ids: Tensor  # all of it, [1, window]
    cache: Cache
    first: Tensor  # logits of the first scored token, which come from prefill
    rest: Tensor
    targets: Tensor
    dense: Tensor  # log-probabilities in half precision: a KL divergence from them is off by some 1e-5
    loss: float


class Emulation:
    """Windows of `text`, prefilled densely once.

    Args:
        model: an unwrapped causal LM.
        windows, window: as in `evaluate_all`.
        weights: another emulation's of the same model: what it packed is not packed again.
    """

    def __init__(
        self,
        model: Any,
        text: TokenText,
        *,
        windows: int,
        window: int = WINDOW,
        weights: Weights | None = None,
        progress: bool = True,
    ) -> None:
        self._model, self._source, self._window, self._progress = model, text.source, window, progress
        self.weights = weights or _FloatWeights(dissect(model))
        rows = text.windows(window, windows)
        with inference(model):
            bar = tqdm(rows.split(1), desc="prefilling", unit="window", disable=not progress, leave=False)
            self._windows = [self._fill(ids.to(model.device)) for ids in bar]

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def dense_ppl(self) -> float:
        return math.exp(sum(window.loss for window in self._windows) / len(self._windows))

    def _fill(self, ids: Tensor) -> _Window:
        prompt, rest = ids.tensor_split(2, dim=1)
        keep_last = {"logits_to_keep": 1} if self._model._supports_logits_to_keep() else {}
        out = self._model(input_ids=prompt, use_cache=True, **keep_last)
        cache, first = out.past_key_values, out.logits[0, -1:].float()
        log_p = self._continue(cache, first, rest[:, :-1]).log_softmax(-1)
        loss = -float(log_p.gather(1, rest[0].unsqueeze(1)).mean())
        return _Window(ids, cache, first, rest[:, :-1], rest[0], log_p.half(), loss)

    def _continue(self, cache: Cache, first: Tensor, ids: Tensor) -> Tensor:
        cache, logits = copy.deepcopy(cache), [first]
        for piece in ids.split(ids.shape[1] if takes_several(cache) else 1, dim=1):
            logits.append(self._model(input_ids=piece, past_key_values=cache, use_cache=True).logits[0].float())
        return torch.cat(logits)

    def score(self, plan: Plan, windows: int | None = None, *, token_by_token: bool = False) -> dict[str, Any]:
        """`evaluate_all`'s figures for one plan, on the first `windows` windows or on all.

        token_by_token: decode for real, up to eight windows side by side and a token of each in a step; always so where
            the plan's weights have a format of their own. Else the figures carry ``"estimated": True``.
        """
        assert not any(layer.by_prompt for layer in plan.layers), "chosen in prefill"
        tally, scored = Tally(), self._windows[:windows]
        real = token_by_token or plan.weights is not None
        with inference(self._model), wrapped(self._model, plan, self.weights):
            usage = runtime_of(self._model).usage
            usage.counting = True
            bar = tqdm(total=len(scored), desc="scoring", unit="window", disable=not self._progress, leave=False)
            together = max(1, min(MAX_ROWS, _LOGITS // scored[0].dense.numel())) if real else 1
            if not takes_several(scored[0].cache):
                together = 1  # what recurrent layers remember has a form of its own
            for at in range(0, len(scored), together):
                group = scored[at : at + together]
                usage.reset()
                found = self._decoded(group) if real else self._masked(group[0])
                for window, logits in zip(group, found, strict=True):
                    log_q = logits.log_softmax(-1)
                    tally.add(window.dense.float(), log_q, window.targets, usage.neuron_sparsity(), window.loss)
                bar.update(len(group))
            bar.close()
        about = {"windows": len(scored), "window": self._window, "text": self._source}
        return {**tally.result(), **about, **({} if real else {"estimated": True})}

    def judged(self, logits_of: Callable[[Tensor], Tensor], windows: int | None = None) -> dict[str, Any]:
        """`evaluate_all`'s figures of logits that come from elsewhere, another form of the model: `logits_of` gives
        those of the second half of ids ``[1, window]``, fp32 ``[tokens, vocabulary]``."""
        tally, scored = Tally(), self._windows[:windows]
        with inference(self._model):
            for window in tqdm(scored, desc="scoring", unit="window", disable=not self._progress, leave=False):
                log_q = logits_of(window.ids).log_softmax(-1)
                tally.add(window.dense.float(), log_q, window.targets, 0.0, window.loss)
        return {**tally.result(), "windows": len(scored), "window": self._window, "text": self._source}

    def _masked(self, window: _Window) -> Tensor:
        return self._continue(window.cache, window.first, window.rest)[None]

    def _decoded(self, windows: Sequence[_Window]) -> Tensor:
        """fp32 logits ``[windows, tokens, vocabulary]``; a native step takes eight tokens in about twice the time of
        one."""
        cache = _side_by_side([window.cache for window in windows])
        logits = [torch.stack([window.first for window in windows])]
        for ids in torch.cat([window.rest for window in windows]).split(1, dim=1):
            logits.append(self._model(input_ids=ids, past_key_values=cache, use_cache=True).logits)
        return torch.cat(logits, 1).float()


def _side_by_side(caches: Sequence[Any]) -> Cache:
    """One cache of a batch, from caches of one sequence each that are equally full, of keys and values alone where
    there are several."""
    together = copy.deepcopy(caches[0])
    for index, layer in enumerate(together.layers if len(caches) > 1 else ()):
        for name in ("keys", "values"):
            setattr(layer, name, torch.cat([getattr(cache.layers[index], name) for cache in caches]))
    return cast(Cache, together)


@dataclass(frozen=True, eq=False)
class _Floats:
    """A sliced MLP's integers as float32: the high nibbles' estimates and the whole bytes of gate and up, down."""

    high: Tensor
    whole: Tensor
    down: Tensor


class _FloatWeights(Weights):
    """Sketches that keep their weights dequantised, so that a pass of many rows is three matrix products."""

    def __init__(self, anatomy: Any) -> None:
        super().__init__(anatomy)
        self._floats: dict[int, tuple[_Floats, Tensor]] = {}

    def clear(self) -> None:
        super().clear()
        self._floats.clear()

    def alone(self, layer: int, fmt: str | None, kept: Tensor) -> FewerNeurons:
        """Lists, where many rows meet floats: matrices would be packed for every plan that is scored."""
        return self.listed(layer, fmt, kept) if fmt is None else super().alone(layer, fmt, kept)

    def sparse(self, layer: int, pack: Callable[[Bundles], FewerNeurons], fmt: str | None = None) -> FewerNeurons:
        sparse = super().sparse(layer, pack, fmt)
        if isinstance(sparse, SlimMLP):
            return sparse
        packed = sparse.packed
        if sparse.rule != "sketch" or isinstance(packed, PackedNeurons):
            return sparse
        found = self._floats.get(layer)
        if found is None or found[1] is not packed.weight:
            found = _floats(packed), packed.weight
            if found[0].high.nbytes * 3 * len(self.anatomy) <= _FLOAT_BYTES:
                self._floats[layer] = found
        return _ManyRows(**vars(sparse), floats=found[0])


def _floats(packed: PackedMLP) -> _Floats:
    assert packed.low is not None
    half, hidden = packed.weight.shape[2], packed.hidden_size
    high, whole = [], []
    for part in range(packed.weight.shape[1]):
        nibbles = 16.0 * spread(packed.weight[:, part])
        high.append((nibbles + (7.5 - 128))[:, :hidden])
        whole.append((nibbles + spread(packed.low[:, part * half : (part + 1) * half]) - 128)[:, :hidden])
    down = packed.low[:, -2 * half :][:, :hidden].float() - 128
    return _Floats(torch.cat(high).contiguous(), torch.cat(whole).contiguous(), down.contiguous())


@dataclass(frozen=True, eq=False)
class _ManyRows(SparseMLP):
    """`SparseMLP` by the rule "sketch" for passes of many rows: the kernels' integers in floats, exact up to 2**24."""

    floats: _Floats | None = None

    def _compute(self, x: Tensor, counting: bool) -> tuple[Tensor, int | None]:
        if x.numel() <= MAX_ROWS * x.shape[-1]:
            return super()._compute(x, counting)
        assert self.floats is not None
        packed, floats = self._bundles, self.floats
        assert packed.scale is not None
        assert packed.norm is not None
        rows, factor = quantize(x.reshape(-1, x.shape[-1]).float())
        wanted = self._wanted(self._activations(rows, floats.high, factor).abs_() * packed.norm)
        a = self._activations(rows, floats.whole, factor)
        if packed.mean is not None:
            a -= packed.mean
        if self.refine > 0:
            wanted &= a.abs() * packed.norm >= self.refine
        a *= wanted
        y = (a * packed.scale[:, -1]) @ floats.down
        if packed.down_bias is not None:
            y += packed.down_bias
        return y.to(x.dtype).view_as(x), int(wanted.sum())

    @property
    def _bundles(self) -> PackedMLP:
        return cast(PackedMLP, self.packed)

    def _wanted(self, score: Tensor) -> Tensor:
        """Which neurons each row keeps, bool ``[rows, neurons]``; a sort is ten times slower than topk, which breaks
        ties (ReLU's zeros) in no order."""
        if self.threshold is not None:
            return score >= self.threshold
        assert self.keep is not None
        wanted = score >= score.topk(self.keep, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        if int(wanted.sum()) == self.keep * score.shape[0]:
            return wanted
        listed = reference.pick(score, self.keep, 0.0)
        return torch.zeros_like(wanted).scatter_(1, listed, True)

    def _activations(self, rows: Tensor, integers: Tensor, factor: Tensor) -> Tensor:
        packed = self._bundles
        assert packed.scale is not None
        act = ACTS[packed.act] if isinstance(packed.act, str) else packed.act
        products = F.linear(rows, integers).view(rows.shape[0], -1, packed.intermediate_size)
        products *= factor[:, None, None] * packed.scale[:, :-1].t()
        if packed.up_bias is not None:
            products[:, -1] += packed.up_bias
        if not packed.gated:
            return act(products[:, 0])
        if packed.gate_bias is not None:
            products[:, 0] += packed.gate_bias
        return act(products[:, 0]) * products[:, 1]
