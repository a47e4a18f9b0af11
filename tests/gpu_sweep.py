"""Every family under every policy through a GPU's decode step: ``python tests/gpu_sweep.py [--families A,B] ...``.

Each case is a tiny model under a plan, whose steps are lowered as a whole, captured (`test_graph.Recorded` refuses to
read anything back), and compared token by token with the definitions in float64 (policy_definitions.py), which the
model's own patched modules are compared with, too. All three go on from the same keys and values after every token, so
that no difference grows. A step counts as right if it is at most twice as far from the definition as the modules ever
are, or as the definition is from itself when what it starts from, and what each layer gives, is rounded once. Where a
choice or a rounding was so near to another that float32 may turn it, a step may differ: such tokens are counted, and
those that did differ. What is written to the cache is compared as logits are, and the bits of two runs.

The kernels are their definitions in torch; with TRITON_INTERPRET=1 in the environment they are the Triton kernels, a
thousand times slower: ask for fewer --steps then.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import torch
from policy_definitions import Margins, by_definition, in_groups
from test_decode import prefilled, ragged, some_tokens
from test_experts_native import with_experts
from test_graph import Recorded, captured, policy_plan
from test_policies import NAMES
from tiny_models import EXPERTS, FAMILIES, plan_of, tiny
from torch import Tensor

import coreskip
from coreskip.kernels import ops
from coreskip.kernels.gpu_launch import INTERPRETED
from coreskip.predictors.anatomy import dissect
from coreskip.predictors.errors import CoreskipError
from coreskip.predictors.expert_policies import CoreExperts, KeptExperts, SkipExperts
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import Static
from coreskip.runtime import bundles, gpu_matrices
from coreskip.runtime.selections import selections_of
from coreskip.runtime.wrap import runtime_of

#: policies, and weight formats of dense plans
CASES = ("dense", "static", "signed", "griffin", *NAMES, "int4", "int8")
OF_EXPERTS = {
    "kept_experts": KeptExperts(torch.tensor([0, 2, 3, 5])),
    "skip_experts": SkipExperts(0.6),
    "core_experts": CoreExperts(4),
}
MIXTURES = tuple(name for name in EXPERTS if name not in ("lfm2_moe", "minimax", "jamba"))  # have caches of their own
#: of a comparison, or of a rounding: the distance, as a share of the largest number, that float32 may cross
NEAR = 2e-6

Entries = list[tuple[Tensor, Tensor]]  # keys and values by layer


class Followed(NamedTuple):
    """What a model made of some tokens: logits ``[rows, tokens, vocabulary]``, and what it wrote to the cache, ``[rows,
    tokens, numbers]``; and the keys and values that it went on from, of the prompts and of each token."""

    logits: Tensor
    written: Tensor
    past: list[Entries]


@dataclass
class Verdict:
    """What one case came to.

    Attributes:
        way: "step": lowered as a whole; else why not.
        tokens: all. near: of these, that had a choice near to another; flipped: of these, that differed.
        error: of the others, the largest, as a share of the largest logit (or number written). limit: what it may be.
        same: whether two runs had the same bits.
    """

    way: str
    tokens: int = 0
    near: int = 0
    flipped: int = 0
    error: float = 0.0
    limit: float = 0.0
    same: bool = True

    @property
    def ok(self) -> bool:
        return self.error <= self.limit and self.same and (not self.tokens or self.near <= 0.7 * self.tokens)

    def __str__(self) -> str:
        if not self.tokens:
            return self.way
        found = f"{self.error:.1e} of {self.limit:.1e}, {self.near} of {self.tokens} near, {self.flipped} turned"
        return f"{'ok ' if self.ok else 'BAD'} {found}{'' if self.same else ', TWO RUNS DIFFER'} ({self.way})"


@torch.no_grad()
def follow(
    model: Any,
    prompts: tuple[Tensor, Tensor],
    tokens: Tensor,
    past: list[Entries] | None = None,
    after: Callable[[], None] = lambda: None,
) -> Followed:
    """One token after the other; each replaces its keys and values by those of `past`, or by themselves in float32.

    after: called after each token.
    """
    ids, mask = prompts
    cache, logits, written, used = prefilled(model, ids, mask), [], [], []
    _go_on(cache, slice(None), used, past)
    mask = torch.cat([mask, torch.ones_like(tokens)], 1)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    for at in range(ids.shape[1], mask.shape[1]):
        given = {"attention_mask": mask[:, : at + 1], "position_ids": places[:, at : at + 1]}
        logits.append(model(tokens[:, at - ids.shape[1], None], past_key_values=cache, **given).logits.double())
        written.append(_go_on(cache, slice(-1, None), used, past))
        after()
    return Followed(torch.cat(logits, 1), torch.stack(written, 1), used)


def _go_on(cache: Any, some: slice, used: list[Entries], past: list[Entries] | None) -> Tensor:
    """Float64 ``[rows, numbers]``: the keys and values that were there before."""
    found = [(layer.keys[:, :, some].clone(), layer.values[:, :, some].clone()) for layer in cache.layers]
    # in float64 transformers' BLOOM makes NaNs of padding, which nobody sees
    new = past[len(used)] if past is not None else [(k.float().nan_to_num(), v.float().nan_to_num()) for k, v in found]
    for layer, (keys, values) in zip(cache.layers, new, strict=True):
        layer.keys[:, :, some], layer.values[:, :, some] = keys, values
    used.append(new)
    return torch.cat([t.flatten(1) for pair in found for t in pair], 1).double()


def apart(found: Followed, exact: Followed) -> Tensor:
    """``[rows, tokens]``: the largest difference, as a share of the largest number."""
    logits = (found.logits - exact.logits).abs().amax(-1) / exact.logits.abs().max()
    return torch.maximum(logits, (found.written - exact.written).abs().amax(-1) / exact.written.abs().max())


def conditioned(
    twin: Any, rounds: list[Any], prompts: tuple[Tensor, Tensor], tokens: Tensor, exact: Followed
) -> Tensor:
    """``[rows, tokens]``: by how much the definition moves when keys and values, and what modules give, are rounded to
    float32, the most of eight times.

    rounds: the embeddings and the layers.
    """
    rng, moved = torch.Generator().manual_seed(0), list[Tensor]()

    def rounded(x: Tensor) -> Tensor:
        return x * (1 + 2**-24 * torch.randn(x.shape, generator=rng, dtype=torch.float64))

    def rounding(module: Any, given: Any, output: Any) -> Any:
        return rounded(output) if isinstance(output, Tensor) else (rounded(output[0]), *output[1:])

    hooks = [module.register_forward_hook(rounding) for module in rounds]
    for _ in range(8):
        past = [[(rounded(keys), rounded(values)) for keys, values in layers] for layers in exact.past]
        moved.append(apart(follow(twin, prompts, tokens, past), exact))
    for hook in hooks:
        hook.remove()
    return torch.stack(moved).amax(0)


@contextmanager
def _as_on_a_gpu(weights: str | None) -> Iterator[None]:
    """Kernels as operations of a graph, no ways of a CPU, and where there are `weights` a GPU's formats."""
    with (
        patch.object(ops, "_is_plain", lambda x: False),
        patch.object(bundles, "slimmed", lambda *arguments: None),
        patch.object(gpu_matrices, "packs_for", lambda model: weights is not None),
    ):
        yield


def case_of(model: Any, name: str) -> Plan:
    if name in ("dense", "int4", "int8"):
        return Plan.dense(model, None if name == "dense" else name)
    if name in OF_EXPERTS:
        return with_experts(model, OF_EXPERTS[name])
    return plan_of(model, name) if name == "griffin" else policy_plan(model, name)


def judge(family: str, name: str, steps: int = 200, layers: int | None = None) -> Verdict:
    """One family under one policy."""
    model = tiny(family, **({} if layers is None else {"num_hidden_layers": layers}))
    try:
        plan = case_of(model, name)
        coreskip.wrap(model, plan)
        coreskip.unwrap(model)
    except (CoreskipError, AssertionError) as reason:  # a policy for MLPs with gates, say
        return Verdict(f"no such plan: {str(reason)[:60]}")
    with _as_on_a_gpu(plan.weights):
        return _judged(model, plan, name, steps)


def _judged(model: Any, plan: Plan, name: str, steps: int) -> Verdict:
    rows = (
        1 if name in ("signed", "griffin", "core_experts") else 2
    )  # sequences that chose differently have no step together
    ids, mask = (t[:rows] for t in ragged())
    tokens, margins, least = some_tokens(rows, steps), Margins(), list[Tensor]()
    layers = plan.layers if rows == 2 else _chosen(model, plan, (ids, mask))
    twin = copy.deepcopy(model).double()
    names = {module: name for name, module in model.named_modules()}
    rounds = [twin.get_input_embeddings(), *(twin.get_submodule(names[layer]) for layer in dissect(model).layers)]
    if any(plan.model.experts):
        twin.set_experts_implementation("eager")  # others know no float64
    rounding = nullcontext(margins) if plan.weights is None else in_groups(twin, plan.weights)
    of_layers = [at.neurons for at in layers], [at.experts for at in layers]
    with rounding as of_inputs, by_definition(twin, *of_layers[0], experts=of_layers[1]) as of_choices:

        def note() -> None:
            found = [m.least for m in (of_inputs, of_choices) if m.least is not None]
            least.append(torch.stack([torch.full((rows,), torch.inf, dtype=torch.float64), *found]).amin(0))

        exact = follow(twin, (ids, mask), tokens, None, note)
    with coreskip.wrap(model, plan):
        runtime_of(model).steps.native._state.refusal = "the native step is left out here"
        usual = apart(follow(model, (ids, mask), tokens, exact.past), exact)
    with captured(model, plan, lowered=True) as graphs:
        found = list[Followed]()
        for capture in (lambda step, device: step, None if INTERPRETED else Recorded):
            graphs.capture = capture or graphs.capture  # Triton's interpreter makes no operations of torch
            found.append(follow(model, (ids, mask), tokens, exact.past))
            graphs._places.held.clear()
        way = _way_of(graphs)
    near = torch.stack(least, 1) < NEAR
    error, far = apart(found[0], exact), ~near
    limit = 2 * float(usual[far].max()) + 2e-6 if bool(far.any()) else 0.0
    worst = float(error[far].max()) if bool(far.any()) else 0.0
    if worst > limit and plan.weights is None:  # a token for which a rounding more or less counts as much?
        with by_definition(twin, *of_layers[0], experts=of_layers[1]):
            limit = max(limit, 2 * float(conditioned(twin, rounds, (ids, mask), tokens, exact)[far].max()) + 2e-6)
    same = torch.equal(found[0].logits, found[1].logits) and torch.equal(found[0].written, found[1].written)
    return Verdict(way, error.numel(), int(near.sum()), int((near & (error > limit)).sum()), worst, limit, same)


def _chosen(model: Any, plan: Plan, prompts: tuple[Tensor, Tensor]) -> list[LayerPlan]:
    """The plan with what prompts choose, by the modules, as if calibration had."""
    with torch.no_grad(), coreskip.wrap(model, plan):
        runtime = runtime_of(model)
        selections = selections_of(prefilled(model, *prompts), runtime)
        if selections is None:  # a prompt that may have all experts chooses none
            return list(plan.layers)
        mlps, found = runtime.prepared.selected(selections).mlps, []
        for index, layer in enumerate(plan.layers):
            allowed = selections.allowed_experts(index)
            if allowed is not None:
                layer = replace(layer, experts=KeptExperts(allowed[0].nonzero()[:, 0]))
            if index in mlps:
                layer = replace(layer, neurons=Static(cast(Any, mlps[index]).lists.listed))
            found.append(layer)
        return found


def _way_of(graphs: Any) -> str:
    lowering = graphs.lowering
    reason = lowering.refusal or next((why for why, _ in lowering._known.values() if why), None)
    if reason is None and lowering.ready:
        return "step"
    return f"modules: {reason}; captured: {graphs.refusal or 'yes'}"


def table(verdicts: dict[tuple[str, str], Verdict]) -> str:
    """A line for each family: what each policy came to."""
    families, names = (list(dict.fromkeys(key[i] for key in verdicts)) for i in (0, 1))
    wide = max(map(len, families))
    lines = [" " * wide + "  " + "  ".join(names)]
    for family in families:
        cells = [_cell(verdicts.get((family, name))).ljust(len(name)) for name in names]
        lines.append(family.ljust(wide) + "  " + "  ".join(cells))
    return "\n".join(lines)


def _cell(verdict: Verdict | None) -> str:
    if verdict is None or not verdict.tokens:
        return "-"
    return "BAD" if not verdict.ok else "ok" if verdict.way == "step" else "mod"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join([*FAMILIES, *MIXTURES]), help="of tests/tiny_models.py")
    parser.add_argument("--cases", help="policies, and formats of dense plans; by default all of a family's kind")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, help="of each model; by default what it has in the tests")
    options = parser.parse_args(arguments)
    print("by the Triton kernels, interpreted" if INTERPRETED else "by the definitions of the kernels", flush=True)
    verdicts = dict[tuple[str, str], Verdict]()
    for family in options.families.split(","):
        every = CASES if family in FAMILIES else ("dense", *OF_EXPERTS)
        for name in options.cases.split(",") if options.cases else every:
            start = time.perf_counter()
            try:
                verdict = judge(family, name, options.steps, options.layers)
            except Exception as error:
                verdict = Verdict(repr(error)[:200], 1, error=1.0)
            verdicts[family, name] = verdict
            print(f"{family:16} {name:17} {verdict} [{time.perf_counter() - start:.1f} s]", flush=True)
    for some in (FAMILIES, MIXTURES):
        found = {key: verdict for key, verdict in verdicts.items() if key[0] in some}
        print(table(found) if found else "")
    judged = [verdict for verdict in verdicts.values() if verdict.tokens]
    bad, steps = (sum(chosen) for chosen in ((not v.ok for v in judged), (v.way == "step" for v in judged)))
    print(f"{len(judged)} cases of {options.steps} steps, {steps} lowered as a whole, {bad} wrong")
    return bad


if __name__ == "__main__":
    sys.exit(min(main(), 1))
