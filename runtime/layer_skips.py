"""Layer policies carried out: what a decode step skips is not computed.

A skipped sublayer, attention or MLP, adds nothing to the residual stream. **The KV rule**: a skipped attention still
computes its keys and values for the token, from the same input as if it ran, and writes them to the cache; queries,
attention and output projection are left out. Every layer's cache thus has one entry per token, and whoever attends
there later (a row of the batch that runs the layer, the next prompt, a dense verification) finds what the definition
says. That costs the key and value projections: 6 % of a layer of the embedded model.

Prefill runs every layer. In a batch whose rows disagree about an adaptive layer, it runs for all of them, and adds
nothing to the rows that skip it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from ..predictors.anatomy import Anatomy, Attention, Experts, FeedForward
from ..predictors.errors import CoreskipError
from ..predictors.layers import void
from ..predictors.plan import Plan
from .attention import can_redirect
from .phases import Pass, Phase, current_pass
from .selections import Selections

Replace = Callable[[object, str, object], None]
Skipping = tuple["Pass | None", "Tensor | bool"]


class LayerSkips:
    """The layers of one wrapped model that do not always run.

    Raises:
        CoreskipError: attention is to be skipped in a model whose attention cannot be told to write entries alone.
    """

    def __init__(self, anatomy: Anatomy, plan: Plan) -> None:
        self._anatomy = anatomy
        every = {index: layer.layer for index, layer in enumerate(plan.layers)}
        self.policies = {index: p for index, p in every.items() if p.may_skip_attention or p.may_skip_mlp}
        self.adaptive: dict[int, float] = {i: cast(Any, p).alpha for i, p in self.policies.items() if p.by_prompt}
        if not can_redirect(anatomy) and self.redirects:
            raise CoreskipError(
                f"{anatomy.model_type!r} models have attention of their own that coreskip cannot skip; "
                "a plan for them may skip MLPs (SkipMLP), not attention or whole layers"
            )
        for index, policy in self.policies.items():
            if policy.may_skip_mlp:
                anatomy.half(index)  # raises where that is not known

    @property
    def redirects(self) -> bool:
        """Whether an attention may have to write its entries alone."""
        return any(policy.may_skip_attention for policy in self.policies.values())

    def skipped(self, selections: Selections | None) -> tuple[frozenset[int], frozenset[int]]:
        """The layers whose attention, and whose MLP, no row of these sequences runs while decoding."""
        adaptive = {i for i in self.adaptive if selections is not None and selections.void_rows(i) is True}
        fixed = {i: p for i, p in self.policies.items() if i not in self.adaptive}
        attention = {i for i, p in fixed.items() if not p.attention} | adaptive
        mlp = {i for i, p in fixed.items() if not p.mlp} | adaptive
        return frozenset(attention), frozenset(mlp)

    def disputed(self, selections: Selections) -> bool:
        """Whether rows disagree about an adaptive layer."""
        return any(isinstance(selections.void_rows(i), Tensor) for i in self.adaptive)

    def install(self, replace: Replace, passthrough: Callable[[FeedForward], None]) -> None:
        """To be called after everything else is patched: what is skipped is not reached."""
        for index, policy in self.policies.items():
            if policy.may_skip_attention:
                self._patch_attention(index, cast(Attention, self._anatomy.attentions[index]), replace)
            if policy.may_skip_mlp:
                experts = self._anatomy.experts[index]
                if experts is not None:
                    self._patch_experts(index, experts, replace)
                else:
                    self._patch_mlp(index, self._anatomy.mlp(index), replace, passthrough)
        if self.adaptive:
            for index, layer in enumerate(self._anatomy.layers):
                self._patch_observer(index, layer, replace)

    def _skipping(self, index: int) -> Skipping:
        """The pass, if it decodes under the plan, and whether it skips layer `index`: all rows, none, or those that
        are True in a bool ``[rows, 1, 1]``."""
        step = current_pass()
        if step is None or step.phase is not Phase.DECODE:
            return None, False
        if index not in self.adaptive:
            return step, True
        return step, step.selections is not None and step.selections.void_rows(index)

    def _patch_attention(self, index: int, attention: Attention, replace: Replace) -> None:
        original = attention.module.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            step, skipping = self._skipping(index)
            if step is None or skipping is False:
                return original(*args, **kwargs)
            if skipping is True:
                step.entries_only = True
                try:
                    return original(*args, **kwargs)
                finally:
                    step.entries_only = False
            output = original(*args, **kwargs)
            return (output[0].masked_fill(skipping, 0.0), *output[1:])

        replace(attention.module, "forward", forward)
        # a fused projection cannot leave its queries out
        names = [attention.inputs[0], attention.output] if len(attention.inputs) == 3 else [attention.output]
        for name in names:
            _patch_projection(attention.part(name), replace)

    def _patch_mlp(
        self, index: int, layer: FeedForward, replace: Replace, passthrough: Callable[[FeedForward], None]
    ) -> None:
        if not layer.whole:
            passthrough(layer)
            _patch_output(layer.down, lambda: self._skipping(index), replace)
        target = layer.owner if layer.whole else layer.up
        original = target.forward

        @functools.wraps(original)
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            step, skipping = self._skipping(index)
            if step is not None and skipping is True:
                step.skipped += layer.intermediate_size * step.rows * step.length
                step.bypass = not layer.whole
                return x.new_zeros(x.shape)
            output = original(x, *args, **kwargs)
            return output.masked_fill(skipping, 0.0) if layer.whole and isinstance(skipping, Tensor) else output

        replace(target, "forward", forward)

    def _patch_experts(self, index: int, experts: Experts, replace: Replace) -> None:
        original, shared = experts.block.forward, experts.shared
        neurons = experts.top_k * experts.intermediate_size + (0 if shared is None else shared.intermediate_size)

        @functools.wraps(original)
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            step, skipping = self._skipping(index)
            if step is not None and skipping is True:
                step.skipped += neurons * step.rows * step.length
                nothing = x.new_zeros(x.shape)
                return nothing if experts.outputs == 1 else (nothing, *[None] * (experts.outputs - 1))
            output = original(x, *args, **kwargs)
            if not isinstance(skipping, Tensor):
                return output
            if experts.outputs == 1:
                return output.masked_fill(skipping, 0.0)
            return (output[0].masked_fill(skipping, 0.0), *output[1:])

        replace(experts.block, "forward", forward)

    def _patch_observer(self, index: int, layer: nn.Module, replace: Replace) -> None:
        """Prefill follows the norm of the residual stream from layer to layer."""
        original = layer.forward

        @functools.wraps(original)
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            output = original(hidden_states, *args, **kwargs)
            step = current_pass()
            if step is not None and step.phase is Phase.PREFILL and step.selections is not None:
                if index == 0:
                    step.norms = [hidden_states.float().norm(dim=-1)]
                out = output if isinstance(output, Tensor) else output[0]
                step.norms.append(out.float().norm(dim=-1))
                if index == len(self._anatomy) - 1:
                    self._observe(step)
            return output

        replace(layer, "forward", forward)

    def _observe(self, step: Pass) -> None:
        by_alpha = {alpha: void(step.norms, alpha) for alpha in set(self.adaptive.values())}
        for index, alpha in self.adaptive.items():
            cast(Any, step.selections).observe_void(index, by_alpha[alpha][index], step.valid)


def _patch_projection(module: nn.Module, replace: Replace) -> None:
    """Not computed while the attention only writes its entries."""
    original, bias = module.forward, getattr(module, "bias", None)
    width = int(bias.shape[0]) if isinstance(bias, Tensor) else int(cast(Any, module).out_features)

    @functools.wraps(original)
    def forward(x: Tensor) -> Any:
        step = current_pass()
        if step is not None and step.entries_only:
            return x.new_zeros((*x.shape[:-1], width))
        return original(x)

    replace(module, "forward", forward)


def _patch_output(module: nn.Module, skipping: Callable[[], Skipping], replace: Replace) -> None:
    """Where an MLP has no module of its own, its output is its down projection's."""
    original = module.forward

    @functools.wraps(original)
    def forward(x: Tensor) -> Any:
        step, rows = skipping()
        output = original(x)
        if step is None or not isinstance(rows, Tensor):
            return output
        by_row = output.view(step.rows, -1, output.shape[-1])
        return by_row.masked_fill(rows, 0.0).view_as(output)

    replace(module, "forward", forward)
