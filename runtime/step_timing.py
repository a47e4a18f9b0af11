"""How long decode steps take here, under several plans in turn: where bytes do not tell which of two is faster."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..predictors.anatomy import dissect
from ..predictors.four_bits import Form, FourBitMLP, product
from ..predictors.plan import LayerPlan, Plan
from ..predictors.policies import NeuronPolicy, Sketch, TopK
from ..predictors.token_samples import quantile
from .bundles import Weights
from .wrap import wrapped

_TOKENS = 24  # a turn
_ROUNDS = 7
_SAMPLE = 64  # tokens from which a trial takes its thresholds
#: Shares of candidates and of neurons kept by which a trial finds out whether a form can pay at all: fewer than any
#: plan kept that lost 3 % of perplexity, on the models that were measured.
_TRIAL = {Form.GATES: (0.6, 0.4), Form.PLANES: (0.45, 0.38), Form.ROWS: (1.0, 0.35)}


class StepClock:
    """Times decode steps of one unwrapped model after a prompt, int64 ``[1, length]``."""

    def __init__(self, model: Any, prompt: Tensor) -> None:
        self._model, self._prompt = model, prompt.to(model.device)
        self._weights = Weights(dissect(model))

    def seconds(self, plans: Sequence[Plan]) -> list[float]:
        """Of a token under each plan: the median of turns that take each other's place, as the speed of shared machines
        drifts."""
        turns: list[list[float]] = [[] for _ in plans]
        for turn in range(_ROUNDS + 1):
            for plan, found in zip(plans, turns, strict=True):
                taken = self._turn(plan)
                if turn:  # the first one packs and compares
                    found.append(taken)
        return [statistics.median(found) for found in turns]

    def _turn(self, plan: Plan) -> float:
        options = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=_TOKENS)
        mask = torch.ones_like(self._prompt)
        with wrapped(self._model, plan, self._weights), torch.inference_mode():
            # a first generation settles which way steps run: of what is wrapped anew, the first step is compared
            self._model.generate(self._prompt, attention_mask=mask, generation_config=_few(options))
            start = time.perf_counter()
            self._model.generate(self._prompt, attention_mask=mask, generation_config=_few(options))
            first = time.perf_counter() - start
            start = time.perf_counter()
            self._model.generate(self._prompt, attention_mask=mask, generation_config=options)
            return (time.perf_counter() - start - first) / (_TOKENS - 2)


def _few(options: GenerationConfig) -> GenerationConfig:
    return GenerationConfig(**{**options.to_diff_dict(), "max_new_tokens": 2})


def trial(
    dense: Plan,
    mlps: Sequence[Any],
    hidden: Sequence[Tensor],
    form: Form,
    shares: tuple[float, float] | None = None,
) -> Plan:
    """A plan that leaves out more than a useful one would, by thresholds of a few tokens: good for being timed alone.

    dense: the plan in 4-bit weights. hidden: per layer, inputs of the MLP ``[tokens, hidden]``. shares: of candidates
    and of neurons kept.
    """
    candidates, kept = shares or _TRIAL[form]
    pairs = zip(mlps, hidden, strict=True)
    policies = [_tried(FourBitMLP.of(mlp), x[:_SAMPLE], form, candidates, kept) for mlp, x in pairs]
    return replace(dense, layers=tuple(map(LayerPlan, policies)))


def _tried(mlp: FourBitMLP, x: Tensor, form: Form, candidates: float, kept: float) -> NeuronPolicy:
    parts = mlp.parts(x, mlp.whole)
    a = product(parts).abs()
    ones = torch.ones(a.shape[1], dtype=torch.float32, device="cpu")
    if form is Form.PLANES:
        first, refine = quantile(mlp.estimates(x).abs(), 1 - candidates), quantile(a, 1 - kept)
        return Sketch(bits=3, keep=kept, threshold=first, candidates=candidates, refine=refine, norm=ones)
    if form is Form.ROWS:
        return TopK(keep=kept, threshold=quantile(a, 1 - kept), norm=ones)
    gates = parts[0].abs()
    first = quantile(gates, 1 - candidates)
    least = quantile(a[gates >= first], 1 - kept / candidates)
    return TopK(keep=kept, threshold=least, norm=ones, gate=first, reach=ones, candidates=candidates)
