"""One wrapped model: its plan, what is patched and packed for it, and what becomes of these when the model is changed.

Only instance attributes change. The ``forward`` of the model sends decode steps to the lowering that carries them out
(steps.py); those of the decoder stack, the linears and the MLPs carry the plan out on the modules (modules.py). The
model's class becomes a subclass of the same name (generation.py).
"""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from ..kernels.ops import PackedLinear
from ..predictors.anatomy import Anatomy
from ..predictors.errors import CoreskipError
from ..predictors.observe import down_norm, inference
from ..predictors.plan import Plan
from ..predictors.policies import Chooser, PromptNeurons
from . import gpu_matrices
from .attention import can_redirect, redirect_attention
from .behaviour import Behaviour
from .bundles import Weights
from .changes import Changes, Places
from .cost import LITTLE
from .exact import SpeculativeDecoder
from .formats import Formats
from .gpu_lowering import GpuLowering
from .gpu_model import packing_of
from .layer_skips import LayerSkips
from .linear_names import linear_of
from .lower_cpu import Packing, StepProgram, refusal
from .lower_gpu import CapturedSteps, Settled, settled_by
from .memory import memory_of
from .modules import ModulePatches
from .native import NativeSteps
from .native_prompts import NativePrompts
from .patches import Patches, Usage
from .phases import as_loaded, calling, current_prompt, tokens_in
from .prepared import Prepared
from .program import Program
from .release import Replaced, trim
from .selections import Observed, Selections, selections_of
from .spans import SpanSteps
from .steps import Steps

logger = logging.getLogger("coreskip")

ATTRIBUTE = "_coreskip_runtime"


@dataclass(frozen=True)
class Options:
    """How a model is wrapped; see `wrap`."""

    exact: bool = False
    keep_originals: bool | None = None
    lookup: bool = False
    memory: int | None = None


class Runtime:
    """One wrapped model.

    Args:
        weights: matrices that were packed before, for searches, which try many plans on one model; None: none.

    Raises:
        CoreskipError: the plan cannot be carried out on this model; nothing was changed.
    """

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, plan: Plan, options: Options, weights: Weights | None = None
    ) -> None:
        gpu_matrices.check_any_format(model, anatomy, plan)
        self.model, self.anatomy, self.plan = model, anatomy, plan
        self.program = Program.of(anatomy, plan)
        self.steps: Steps
        for layer, brick in self.program.chosen_by(Chooser.INPUTS).items():
            for name in brick.thresholds:
                linear_of(anatomy, layer, name)  # raises where the plan names a linear that is not there
        self.skips = LayerSkips(anatomy, plan)
        self.behaviour = Behaviour(model, anatomy, plan, options.exact)
        self.patches = Patches()
        self.usage = Usage(sum(layer.width for layer in self.program.layers))
        by_prompt = self.program.chosen_by(Chooser.PROMPT)
        self._by_prompt = {layer: cast(PromptNeurons, brick.policy) for layer, brick in by_prompt.items()}
        self.observed = _observed(self.anatomy, self.plan, self._by_prompt)
        self._packed_apart = self.program.chosen_by(Chooser.CALIBRATION, Chooser.PROMPT, Chooser.TOKEN).keys()
        self.altered: frozenset[int] = frozenset()  # layers whose MLP is not what was wrapped
        self._places = Places(model, anatomy)
        self._written_in_vain = False
        self._weights = weights or Weights(anatomy)
        self._prepare(options, searching=weights is not None)
        self.memory = memory_of(self, options.memory, reads_all=options.exact)
        self.exact = SpeculativeDecoder(self.program.decodes_otherwise, self.steps) if options.exact else None
        self.lookup = SpeculativeDecoder(False, self.steps) if options.lookup and not options.exact else None
        self.gives_way = False  # to whoever wraps or reads the model: see `make_way`
        self._class, self._outer = type(model), cast("tuple[nn.Module, type] | None", None)

    def _prepare(self, options: Options, searching: bool) -> None:
        """What holds packed weights, and what carries steps out."""
        model, weights = cast(Any, self.model), self.plan.weights
        keep_all = searching or options.keep_originals is True
        keeps = options.exact or keep_all  # whatever is packed
        before = self._weights.linears if keeps else None
        head, on_gpu = model.get_output_embeddings(), weights is not None and gpu_matrices.packs_for(model)
        self.formats = gpu_matrices.GpuFormats(weights, head) if on_gpu else Formats(weights, head, before)
        me: Runtime = weakref.proxy(self)  # who has these: a cycle would outlive `unwrap`
        self.changes = Changes(
            model, lambda module: me.patches.current(module, "forward"), lambda part, state: me.plain_state(part, state)
        )
        bundled = self.program.chosen_by(Chooser.CALIBRATION, Chooser.TOKEN)
        packing = Packing(
            weights,
            narrow=LITTLE if options.keep_originals is None or searching else 1.0,
            bundled=frozenset() if options.exact else frozenset(bundled),
            packed=self.formats.take if keeps else None,
            packed_alone=lambda module: me.packed_alone(module),
            before=self._weights.linears,
        )
        native = NativeSteps(model, self.anatomy, packing, self.usage.count, lambda: me.notice())
        self.prepared = Prepared(self.anatomy, self.program, self._weights, self.skips, self.altered, self.formats)
        prompts = NativePrompts(me, native, self.anatomy, narrow=packing.narrow > 0)
        spans = SpanSteps(me, native, packing, self.formats.take)
        captured = CapturedSteps(self, GpuLowering(me, packing_of(me, self.formats, self._weights)))
        self.steps = Steps(self, native, prompts, captured, spans)
        self._demanded = options.keep_originals is False
        keeps = keeps or not (weights or self._demanded)
        # neurons that prompts choose are packed again and again, but on a GPU
        by_prompt = [] if on_gpu else [self.anatomy.mlp(index).owner for index in self._by_prompt]
        kind = gpu_matrices.GpuReplaced if on_gpu else Replaced
        self.replaced = None if keeps else kind(model, lossy=self._demanded and bool(weights), kept=by_prompt)

    @property
    def verifies(self) -> bool:
        """Whether decode steps are the dense model's own, but for drafts."""
        return self.exact is not None

    @property
    def chooses_by_token(self) -> bool:
        return bool(self.program.chosen_by(Chooser.TOKEN, Chooser.INPUTS) or self.program.chosen_experts)

    @property
    def exits_early(self) -> bool:
        return self.steps.native.exits_early

    def check_modules(self) -> None:
        """Raises NotCovered where something wants to see what happens inside the model's modules."""
        self.steps.native.check_modules()

    # --- putting it in and taking it out

    def install(self, cls: type) -> None:
        """Everything was checked; from here on nothing can fail but for lack of memory. cls: the model's afterwards."""
        modules = self.modules = ModulePatches(self)
        self.memory.start()
        try:
            self._patch_model()
            everything = modules.patch_linears()
            redirects = can_redirect(self.anatomy) and (self.exact is not None or self.skips.redirects)
            if redirects:
                redirect_attention(self.anatomy, self.patches.set)
            if self.exact is not None:
                self.exact.by_rows = everything and redirects
            modules.patch_stack(self.anatomy.stack)
            modules.patch_inputs()
            modules.patch_mlps()
            modules.patch_experts()
            self.behaviour.install(self.patches.set)
            self.skips.install(self.patches.set, modules.patch_passthrough)
            self.patches.set(self.model, ATTRIBUTE, self)
        except BaseException:
            self.patches.undo()
            self.memory.stop()
            raise
        self.model.__class__ = cls

    def stand_for(self, outer: nn.Module, cls: type) -> None:
        """Lets a model that generates by the wrapped one do, and refuse, what that one does; cls: its class then."""
        self._outer = (outer, type(outer))
        outer.__class__ = cls

    def _patch_model(self) -> None:
        """Decode steps go to the lowering that carries them out, where it covers the call."""
        original = self._forward = self.model.forward
        signature, behaviour = inspect.signature(original), self.behaviour

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            named = {**signature.bind_partial(*args).arguments, **kwargs} if args else kwargs
            cache = named.get("past_key_values")
            decodes = isinstance(cache, Cache) and tokens_in(cache) > 0
            reason = self.notice(every_setting=not decodes)
            if not (self.model.training or torch.compiler.is_compiling()):
                carry_out = self.steps.forward if decodes and current_prompt() is None else self.steps.prompt
                output = carry_out(original_in_call, named, reason)
                if output is not None:
                    return output
            return original_in_call(*args, **kwargs)

        def original_in_call(*args: Any, **kwargs: Any) -> Any:
            with calling():
                return behaviour.withheld(original(*args, **kwargs))

        self.patches.set(self.model, "forward", forward)

    def replace_originals(self) -> None:
        """Packs the weights now, where the originals may go: every prefill, the first too, shall read the same."""
        of_gpu = self.formats.of_gpu
        if self.replaced is None and not of_gpu:
            self.changes.start()
            return
        reason = self.behaviour.obstacle(decodes=True)
        reason = reason or (self.steps.pack_on_gpu() if of_gpu else refusal(self.model, self.anatomy))
        model, generator = cast(Any, self.model), torch.Generator().manual_seed(0)
        native = self.steps.native
        while reason is None and not (native.ready or of_gpu):
            vocabulary = model.get_input_embeddings().weight.shape[0]
            ids = torch.randint(0, vocabulary, (1, 9), generator=generator, device="cpu")
            cache = DynamicCache(config=model.config)
            with inference(model):
                with as_loaded():  # a native prompt would have the model described before its matrices may go
                    model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
                named = {"input_ids": ids[:, -1:], "past_key_values": cache}
                reason = native.replace(self._forward, self.program_for(cache), named, self._replace)
            self.usage.reset()
        trim()
        self.changes.start()
        if reason is not None and self._demanded and self.plan.weights is not None:  # else nothing was to be packed
            logger.warning("the original weights are kept: %s", reason)

    def _replace(self, module: nn.Module, parts: list[PackedLinear]) -> None:
        self.prepared.let_go(module)  # which holds the matrix
        if not cast(Replaced, self.replaced).replace(module, parts) and self.plan.weights is not None:
            self.formats.take(module, parts)

    def remove(self) -> None:
        """
        Raises:
            CoreskipError: the weights are gone; nothing was changed.
        """
        self.check_removable()
        self.changes.stop()
        del self.modules  # which hold the runtime
        self.model.__class__ = self._class
        if self._outer is not None:
            outer, cls = self._outer
            outer.__class__ = cls
        self.patches.undo()
        if self.replaced is not None:
            self.replaced.put_back()
        self.memory.stop()

    def check_removable(self) -> None:
        if not self.removable:
            self.refuse("unwrap the model")

    @property
    def removable(self) -> bool:
        return self.replaced is None or self.replaced.reversible

    def refuse(self, what: str) -> None:
        """Raises CoreskipError where packed weights have replaced the model's own, or are read from its folder."""
        self.memory.refuse(what)
        if self.replaced is not None:
            self.replaced.refuse(what)

    # --- changes to the model

    def repack(self) -> None:
        """Forget packed weights: the model's own were moved, cast or loaded anew."""
        self._forget(frozenset(self.model.modules()))
        self.changes.start()
        gpu_matrices.check_any_format(self.model, self.anatomy, self.plan)

    def notice(self, every_setting: bool = False) -> str | None:
        """Takes note of what others have changed about the model; and why decode steps have to run on its modules.

        Raises:
            CoreskipError: somebody wrote to a matrix that packed ones have replaced, or the packed model's file was
                truncated.
        """
        self.memory.check()
        changed = self.changes.since(every_setting)
        if changed is not None:
            logger.debug("%d modules of the model were changed: they are packed and described anew", len(changed))
            self._forget(changed)
            in_vain = self.replaced is not None and self.replaced.written_to
            self._written_in_vain = in_vain or self.memory.covers(changed)
        if self._written_in_vain:
            self.refuse("write to its weights")
        return self.changes.obstacle() or self.behaviour.obstacle(decodes=True)

    def noticed_in_pass(self) -> None:
        """Takes note of what has changed in a pass of the model's modules, but for what parts do to themselves."""
        changed = self.changes.absorb()
        if changed is not None:
            self._forget(changed)

    def _forget(self, changed: frozenset[nn.Module]) -> None:
        layers = self._places.layers_of(changed)
        gone = {i for i in layers if any(m in (self.replaced or ()) for m in self.anatomy.mlp(i).owner.modules())}
        self.altered = self._places.altered() | (self.altered & gone) | (gone & self._packed_apart)
        self._weights.forget(changed, layers)
        self.formats.clear()
        for module in changed:
            self.packed_alone(module)  # a bias may be another
        self.prepared = Prepared(self.anatomy, self.program, self._weights, self.skips, self.altered, self.formats)
        self.steps.forget()
        self.behaviour.install(self.patches.set)
        if self.observed and not self.altered:
            self.observed = _observed(self.anatomy, self.plan, self._by_prompt)
        for drafter in filter(None, (self.exact, self.lookup)):
            drafter.forget()

    def packed_alone(self, module: nn.Module) -> list[PackedLinear] | None:
        """A linear's packed form where its matrix is gone; None where that is there."""
        return None if self.replaced is None else self.replaced.renewed(module)

    def plain_state(self, module: nn.Module, attributes: dict[str, Any]) -> dict[str, Any]:
        """A part's `attributes` without patches.

        Raises:
            CoreskipError: packed weights have replaced its own.
        """
        if any(part in (self.replaced or ()) for part in module.modules()):
            self.refuse("copy or pickle a part of the model")
        return self.patches.undone(module, attributes)

    # --- what steps compute

    def new_selections(self, rows: int) -> Selections | None:
        """For sequences that begin; None where their prompts decide nothing."""
        if not (self.observed or self.skips.adaptive or self.behaviour.abstains or self.program.core_experts):
            return None
        return Selections(self, rows, self.observed, self._by_prompt, self.plan.clusters, self.program.core_experts)

    def program_for(self, cache: Cache, native: bool = True) -> StepProgram | str:
        """What a step, or a native one, computes for the sequences of a cache, or why none can."""
        if native and not self.program.native:
            return "no kernel of the native step makes its choice"
        if not self._places.hold() or self.altered & self._packed_apart:
            return "parts of the model were replaced by others"
        selections = self._own_selections(cache)
        if selections is not None and (self.skips.disputed(selections) or selections.experts_differ):
            return "its sequences skip different layers, or keep different experts"
        return self.prepared.step_program(selections)

    def settled(self, cache: Cache) -> Settled | str:
        """What a captured step for the sequences of a cache has fixed, or why there can be none."""
        if self.behaviour.withholds(cache):
            return "nothing is to be said after a prompt"
        if self.program.chosen_experts:
            return "its tokens leave experts out, each its own"
        return settled_by(self.prepared, self.skips, self._own_selections(cache))

    def _own_selections(self, cache: Cache) -> Selections | None:
        """Of a cache whose sequences decide something."""
        chooses = self._by_prompt or self.skips.adaptive or self.program.core_experts
        return selections_of(cache, self) if chooses else None


def _observed(anatomy: Anatomy, plan: Plan, by_prompt: dict[int, PromptNeurons]) -> dict[int, Observed]:
    """What prefill adds up, by layer."""
    found = [policy.observes(layer, plan.clusters) for layer, policy in by_prompt.items()]
    return {what.layer: Observed(what, down_norm(anatomy.mlp(what.layer))) for what in found}


def runtime_of(model: nn.Module) -> Runtime:
    """The runtime that `wrap` installed on `model`, the one that generates.

    Raises:
        CoreskipError: the model is not wrapped.
    """
    runtime = vars(model).get(ATTRIBUTE)
    if not isinstance(runtime, Runtime):
        raise CoreskipError("the model is not wrapped: call coreskip.wrap(model, plan) first")
    return runtime
