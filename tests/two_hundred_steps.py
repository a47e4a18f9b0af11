"""Every policy that leaves neurons or inputs out, on every family that is native, over 200 steps of two ragged prompts
in float32, against its definition in torch: ``python tests/two_hundred_steps.py [family ..]``. It takes minutes; the
suite runs a part of it (test_decode.py, test_policies.py).

Steps run natively where kernels make the choice, else on the modules; `lacks`: they should be native and are not. An
error is that of a step's logits, as a share of what the policy changes of them; printed are the median and the largest
of both rows' steps, and `off` where the median is above what the policy may differ by: sketches round their inputs to 8
bits, and a step of that, turned by the last bit of a float, may turn a choice.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from test_decode import COVERED, cut_neurons, ragged, refusal, some_tokens, teacher_forced
from test_policies import NAMES, by_definition, plan_with, some_policy
from tiny_models import plan_of, tiny
from torch import Tensor
from transformers import DynamicCache

import coreskip
from coreskip.predictors.policies import Static
from coreskip.runtime.selections import selections_of
from coreskip.runtime.wrap import runtime_of

_STEPS = 200
_OF_PROMPTS = ("static", "griffin", "similar")


def expected_of_prompt(model: Any, plan: Any, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """Each row alone, unpadded: prompts by the whole model, steps by one without what the row has not chosen."""
    lists = None
    if not isinstance(plan.layers[0].neurons, Static):
        with coreskip.wrap(model, plan):
            cache = DynamicCache(config=model.config)
            with coreskip.prefilling():
                places = (mask.cumsum(1) - 1).clamp_min(0)
                model(ids, attention_mask=mask, position_ids=places, past_key_values=cache)
            runtime = runtime_of(model)
            selections = selections_of(cache, runtime)
            assert selections is not None
            chosen = runtime.prepared.selected(selections).mlps
            lists = [chosen[layer].lists.lists for layer in range(len(plan.layers))]
    logits = []
    for row in range(len(ids)):
        one = plan
        if lists is not None:
            one = plan_with(model, *(Static(of[row if len(of) > 1 else 0].clone()) for of in lists))
        first, cache = int((mask[row] == 0).sum()), DynamicCache(config=model.config)
        copy.deepcopy(model).double()(ids[row : row + 1, first:], past_key_values=cache)
        logits.append(cut_neurons(model, one).double()(tokens[row : row + 1], past_key_values=cache).logits)
    return torch.cat(logits)


@torch.no_grad()
def errors(family: str, name: str) -> tuple[float, float, str]:
    """The median and the largest error, and how steps ran."""
    model, (ids, mask), tokens = tiny(family), ragged(), some_tokens(2, _STEPS)
    dense = teacher_forced(model, ids, mask, tokens, each=_STEPS)
    if name in _OF_PROMPTS:
        plan = plan_of(model, name)
        expected = expected_of_prompt(model, plan, ids, mask, tokens)
    else:
        plan = plan_with(model, some_policy(model, name))
        with by_definition(model, some_policy(model, name)):
            expected = teacher_forced(model, ids, mask, tokens, each=_STEPS)
    with coreskip.wrap(model, plan):
        found = teacher_forced(model, ids, mask, tokens, each=1)
        native, runtime = refusal(model) is None and runtime_of(model).steps.native.ready, runtime_of(model)
        how = "native" if native else "lacks" if runtime.program.native and name != "sketch_smooth" else "modules"
    off = (found - expected).norm(dim=-1) / (dense - expected).norm(dim=-1)
    return float(off.median()), float(off.max()), how


def main(families: list[str]) -> int:
    wrong = 0
    for name in (*_OF_PROMPTS, *NAMES):
        for family in families or COVERED:
            if name == "wina" and family == "phi3":  # its gate and up are one matrix, whose columns have other norms
                continue
            median, most, how = errors(family, name)
            off = not median < (1 if "sketch" in name or name == "signs" else 1e-3)
            wrong += off or how == "lacks"
            print(f"{name:17} {family:15} {how:8} {median:.1e} {most:.1e}{' off' * off}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
