"""`wrap` puts a Plan to work on a Hugging Face model, in place; `unwrap` is its exact inverse.

Only instance attributes change: the ``forward`` of the decoder stack (which tells prefill from decode), of the MLPs,
and of what an MLP is made of where it has no module of its own. The model's class becomes a subclass of the same
name, which adds the context manager. Parameters, module names, signatures and the state_dict stay as they are, but for
matrices that packed ones replace (runtime/release.py).
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from ..kernels.ops import MAX_ROWS, PackedLinear, PackedMLP, available, linear, mlp
from ..kernels.packed import DTYPES
from ..kernels.step import BundledMLP, RowLists
from ..predictors.anatomy import Activation, Anatomy, FeedForward, check_model, dissect, rows_of
from ..predictors.checks import check_flag
from ..predictors.errors import CoreskipError
from ..predictors.observe import down_norms, inference
from ..predictors.plan import CoreNeurons, Dense, NeuronPolicy, Plan, Similar, Static, Threshold
from . import assisted, loop
from .attention import can_redirect, redirect_attention
from .changes import Changes, Places
from .cost import LITTLE
from .decode import Chosen, Decoder, NativeSequence, NotCovered, is_plain_linear, refusal
from .delegates import check_generates, generator_of
from .exact import Exact, NativePasses
from .formats import Formats, check_format, takes_format
from .graph import Graphs, Settled
from .layers import LayerSkips
from .parts import Watched
from .release import Replaced, trim
from .selections import (
    DENSELY,
    DRAFTING,
    LAST,
    STEP,
    TALLY,
    Choice,
    Phase,
    Selections,
    Step,
    Watch,
    attach,
    current_prompt,
    prefilling,
    selections_of,
)
from .sparse_mlp import (
    TOKEN_POLICIES,
    LowRankScores,
    SparseColumns,
    SparseMLP,
    Weights,
    column_linears,
    native_rule,
)
from .width import product

logger = logging.getLogger("coreskip")

Model = TypeVar("Model", bound=nn.Module)

_RUNTIME = "_coreskip_runtime"


def wrap(
    model: Model,
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    exact: bool = False,
    keep_originals: bool | None = None,
    lookup: bool = False,
) -> Model:
    """Run `model` under `plan` from now on: ``model.generate`` and everything built on it decode sparsely.

    Args:
        model: a causal LM, or a model that generates by one inside it (PEFT); changed in place and returned. Use it as
            a context manager to unwrap at the end: ``with wrap(model, plan): ...``.
        plan: made for this model by `analyze` or `Plan.dense`; or the path of one; None is the dense plan.
        exact: use the plan only to draft tokens that the dense model verifies (runtime/exact.py): the text is the
            dense model's own, token for token, greedy or sampled. One sequence at a time; batches decode densely.
        keep_originals: of matrices that are packed anew, whether the originals stay in memory. Plans with weights in
            int4 or int8 pack all. None: those stay that packing rounds; what it does not, `unwrap` restores bit for
            bit. False: none, and where one was rounded, `unwrap` raises. True: all, so that prefill runs on them, too.
            Other plans pack float32 matrices of numbers that fewer bytes hold just as well: a model that was made of
            4-bit or 8-bit groups, bfloat16 or float16. None: groups alone, which take little, beside the originals.
            False: any of these forms, and the originals go, to be restored by `unwrap`. True: any, beside them.
            Embeddings, and an LM head that shares their matrix, stay in any case, and so do the MLPs of layers whose
            neurons each prompt chooses; exact mode keeps all.
        lookup: draft the tokens that followed the text's last few before (prompt lookup decoding), to be verified under
            the plan itself: the plan's own text, sooner where it repeats itself or its prompt. For one sequence by
            native steps; exact mode does that anyway.

    What is changed about the model afterwards acts at its next step, as on a plain one: weights written to, replaced,
    cast or trained, modules and ``forward``s replaced, adapters, hooks, settings. Not noticed are writes past torch's
    own counter (through ``p.data``, numpy or fused optimizers) that leave the first and the last of a tensor's numbers
    as they were, and attributes set around ``nn.Module`` (``object.__setattr__``, ``vars(module)[...] = ...``): call
    `unwrap` and `wrap` around these. What a streamer changes acts from the end of the native call under way on, which
    makes 16 tokens at most. Copies of the model's parts are plain; the model itself refuses to be copied.

    Raises:
        CoreskipError: wrapped already, not supported, or the plan is another model's; nothing was changed.
    """
    check_flag("exact", exact)
    check_flag("lookup", lookup)
    check_flag("keep_originals", keep_originals, none=True)
    check_model(model)
    make_way(model)
    if exact and keep_originals is False:
        raise CoreskipError("exact mode verifies with the weights as they were loaded: leave out keep_originals=False")
    _refuse_hooks(model)
    check_generates(model)
    inner = generator_of(model)
    plan = Plan.of(plan, inner)
    anatomy = dissect(inner)
    plan.check(inner, anatomy)
    _check_dtypes(plan, anatomy)
    runtime = Runtime(inner, anatomy, plan, exact, keep_originals=keep_originals, lookup=lookup)
    runtime.install()
    if inner is not model:
        runtime.stand_for(model)
    runtime.replace_originals()
    return model


def unwrap(model: Model) -> Model:
    """Undo `wrap`: the model is bit for bit what it was before.

    Raises:
        CoreskipError: the model is not wrapped, or its weights are gone (``keep_originals=False``); nothing changed.
    """
    check_model(model)
    runtime_of(model).remove()
    return model


@contextmanager
def wrapped(model: Model, plan: Plan, weights: Weights) -> Iterator[Model]:
    """`wrap` for a while, with matrices that were packed before: for searches, which try many plans on one model."""
    anatomy, inner = weights.anatomy, generator_of(model)
    plan.check(inner, anatomy)
    runtime = Runtime(inner, anatomy, plan, weights=weights)
    runtime.install()
    runtime.changes.start()
    try:
        yield model
    finally:
        unwrap(model)


def make_way(model: nn.Module) -> None:
    """Take off a wrapping that nobody asked for: that of an Engine without settings, which wraps anew when it is used.

    Raises:
        CoreskipError: the model is wrapped because somebody asked for it.
    """
    if not is_wrapped(model):
        return
    if not runtime_of(model).gives_way:
        raise CoreskipError("the model is wrapped already: call coreskip.unwrap(model) first")
    unwrap(model)


def is_wrapped(model: nn.Module) -> bool:
    return _RUNTIME in getattr(generator_of(model), "__dict__", {})  # a name, given by mistake, has none


def runtime_of(model: nn.Module) -> Runtime:
    """The runtime that `wrap` installed on `model`."""
    runtime = vars(generator_of(model)).get(_RUNTIME)
    if not isinstance(runtime, Runtime):
        raise CoreskipError("the model is not wrapped: call coreskip.wrap(model, plan) first")
    return runtime


def _refuse_hooks(model: nn.Module) -> None:
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise CoreskipError(
            "the model is spread over devices by accelerate hooks (device_map); load it on one device, "
            "for example device_map={'': 0}"
        )
    if hasattr(model, "_orig_mod"):
        raise CoreskipError("the model is compiled; wrap the model that was passed to torch.compile")


def _check_dtypes(plan: Plan, anatomy: Anatomy) -> None:
    """Raises CoreskipError where the plan leaves out neurons of an MLP whose weights no kernel reads."""
    for index, (policies, found) in enumerate(zip(plan.layers, anatomy.mlps, strict=True)):
        dtypes = {m.dtype for m in vars(found.matrices()).values() if m is not None}
        if not isinstance(policies.neurons, Dense) and not (len(dtypes) == 1 and dtypes <= set(DTYPES)):
            names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise CoreskipError(
                f"the plan leaves out neurons of layer {index}, whose MLP's weights are {names}: "
                "cast the model to float32, bfloat16 or float16, e.g. model.float()"
            )


class Patches:
    """Instance attributes replaced, and how they were. What somebody else puts in their place stays."""

    _ABSENT = object()

    def __init__(self) -> None:
        self._undo: list[tuple[object, str, object, object]] = []
        self._now: dict[tuple[int, str], object] = {}

    def set(self, target: object, name: str, value: object) -> None:
        self._undo.append((target, name, vars(target).get(name, self._ABSENT), value))
        self._now[id(target), name] = value
        object.__setattr__(target, name, value)

    def current(self, target: object, name: str) -> object:
        """What was last put there; None where nothing was."""
        return self._now.get((id(target), name))

    def undo(self) -> None:
        for target, name, before, value in reversed(self._undo):
            if vars(target).get(name) is not value:
                continue
            if before is self._ABSENT:
                object.__delattr__(target, name)
            else:
                object.__setattr__(target, name, before)
        self._undo.clear()
        self._now.clear()

    def undone(self, target: object, attributes: dict[str, Any]) -> dict[str, Any]:
        """A target's `attributes` as they would be without patches."""
        for owner, name, before, value in reversed(self._undo):
            if owner is target and attributes.get(name) is value:
                if before is self._ABSENT:
                    del attributes[name]
                else:
                    attributes[name] = before
        return attributes


class Usage:
    """MLP neurons that decode steps could have computed and those they skipped, over all threads.

    `counting`: whether modules are to count what thresholds keep, which takes time; else the share that they kept in
    calibration is taken for it. Native steps count it in any case.
    """

    def __init__(self, neurons_per_token: int) -> None:
        self.counting = False
        self._per_token, self._lock = neurons_per_token, threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self._possible, self._skipped = 0, 0.0

    def add(self, step: Step) -> None:
        with self._lock:
            self._possible += self._per_token * step.rows * step.length
            self._skipped += step.skipped

    def count(self, tokens: int, skipped: float) -> None:
        with self._lock:
            self._possible += self._per_token * tokens
            self._skipped += skipped

    def neuron_sparsity(self) -> float:
        """Share of neurons skipped so far; 0 before the first decode step."""
        return self._skipped / self._possible if self._possible else 0.0


class Runtime:
    """One wrapped model: its plan, its patches, and the weights packed for it."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        plan: Plan,
        exact: bool = False,
        weights: Weights | None = None,
        keep_originals: bool | None = True,
        lookup: bool = False,
    ) -> None:
        self.model, self.anatomy, self.plan = model, anatomy, plan
        self.gives_way = False  # to whoever wraps or reads the model: see `make_way`
        check_format(model, anatomy, plan)
        self._class = type(model)
        self._outer: tuple[nn.Module, type] | None = None  # who generates by this model, and its class
        self._patches = Patches()
        self.usage = Usage(sum(mlp.intermediate_size for mlp in anatomy.mlps))
        policies = {index: layer.neurons for index, layer in enumerate(plan.layers)}
        self._chosen: dict[int, CoreNeurons | Similar] = {
            index: policy
            for index, policy in policies.items()
            # keeping every neuron is the dense MLP, which the model's own module computes to the last bit
            if isinstance(policy, (CoreNeurons, Similar)) and policy.kept(self._width(index)) < self._width(index)
        }
        self._static = {
            index: policy.indices
            for index, policy in policies.items()
            if isinstance(policy, Static) and policy.kept(self._width(index)) < self._width(index)
        }
        assert all(isinstance(p, (Dense, Static, CoreNeurons, Similar, *TOKEN_POLICIES)) for p in policies.values())
        self._column_policies = {i: p for i, p in policies.items() if isinstance(p, Threshold) and p.rule != "cats"}
        self._token_policies: dict[int, NeuronPolicy] = {
            index: policy
            for index, policy in policies.items()
            if isinstance(policy, TOKEN_POLICIES) and index not in self._column_policies
        }
        self._column_linears = [
            (index, *found) for index, p in self._column_policies.items() for found in column_linears(anatomy, index, p)
        ]
        self._modules_only = self._reason_for_modules()
        self._watched = self._watches()
        self._weights = weights or Weights(anatomy)
        self._token_mlps: dict[int, SparseMLP] = {}
        self._static_packed: dict[int, PackedMLP] = {}
        self._spare: dict[int, deque[Tensor]] = {}  # memory of sequences that are over, by layer
        self._linear_packed: dict[nn.Module, PackedLinear] = {}
        narrow = LITTLE if keep_originals is None or weights is not None else 1.0
        bundled = frozenset() if exact else frozenset({*self._static, *self._token_policies})
        keeps = exact or keep_originals is True  # whatever is packed
        before = self._weights.linears
        self.formats = Formats(plan.weights, cast(Any, model).get_output_embeddings(), before if keeps else None)
        me: Runtime = weakref.proxy(self)  # who has these: a cycle would outlive `unwrap`
        self.changes = Changes(
            model, lambda module: me.own_forward(module), lambda module, state: me.plain_state(module, state)
        )
        self.decoder = Decoder(
            model,
            anatomy,
            plan.weights,
            self.usage.count,
            before,
            narrow,
            bundled,
            self.formats.take if keeps else None,
            gone=lambda module: me.packed_alone(module),
            notice=lambda: me.notice(),
        )
        self._places = Places(model, anatomy)
        self._altered: frozenset[int] = frozenset()  # layers whose MLP is not what was wrapped
        self._written_in_vain = False
        self._epoch = object()  # changes whenever weights do
        self._dense = Chosen([None] * len(anatomy), 0, plain=True)  # what exact mode verifies with
        self._chosen_once: Chosen | None = None
        self._chosen_by: weakref.WeakKeyDictionary[Selections, tuple[Choice, Chosen]] = weakref.WeakKeyDictionary()
        self._skips = LayerSkips(anatomy, plan)
        self.graphs = Graphs(self)
        sparse = self._chosen or self._static or self._token_policies or self._column_policies
        self.decodes_otherwise = bool(sparse or self._skips.policies or plan.weights)  # than it prefills
        self.exact = Exact(has_draft=self.decodes_otherwise) if exact else None
        self.lookup = Exact(has_draft=False) if lookup and not exact else None
        # neurons that prompts choose are packed again and again
        kept = [module for index in self._chosen for module in anatomy.mlps[index].owner.modules()]
        self._demanded = keep_originals is False
        keeps = keeps or not (plan.weights or self._demanded)
        self.replaced = None if keeps else Replaced(model, lossy=self._demanded and bool(plan.weights), kept=kept)

    def _width(self, layer: int) -> int:
        return self.anatomy.mlps[layer].intermediate_size

    def _watches(self) -> dict[int, Watch]:
        norms = down_norms(self.anatomy) if self._chosen else []
        watches = {
            index: Watch(policy.score, policy.alpha, norms[index])
            for index, policy in self._chosen.items()
            if isinstance(policy, CoreNeurons)
        }
        clusters = self.plan.clusters
        if clusters is not None and any(isinstance(p, Similar) for p in self._chosen.values()):
            watches[clusters.anchor] = Watch(clusters.score, clusters.alpha, norms[clusters.anchor])
        return watches

    # --- patching

    def install(self) -> None:
        """Everything was checked; from here on nothing can fail but for lack of memory."""
        try:
            self._patch_model()
            everything = self._patch_linears()
            redirects = can_redirect(self.anatomy) and (self.exact is not None or self._skips.redirects)
            if redirects:
                redirect_attention(self.anatomy, self._patches.set)
            if self.exact is not None:
                self.exact.by_rows = everything and redirects
            self._patch_stack(self.anatomy.stack)
            for index, module, least, in_mlp in self._column_linears:
                self._patch_columns(index, module, least, in_mlp)
            for index in sorted({*self._chosen, *self._static, *self._token_policies, *self._watched}):
                self._patch_mlp(index, self.anatomy.mlps[index])
            self._skips.install(self._patches.set, self._patch_passthrough)
            self._patches.set(self.model, _RUNTIME, self)
        except BaseException:
            self._patches.undo()
            raise
        self.model.__class__ = _wrapped_class(cast(Any, self._class))

    def stand_for(self, outer: nn.Module) -> None:
        """Lets a model that generates by the wrapped one do, and refuse, what that one does."""
        self._outer = (outer, type(outer))
        outer.__class__ = _outer_class(cast(Any, type(outer)))

    def replace_originals(self) -> None:
        """Packs the weights now, where the originals may go: every prefill, the first too, shall read the same."""
        if self.replaced is None:
            self.changes.start()
            return
        reason = refusal(self.model, self.anatomy)
        model, generator = cast(Any, self.model), torch.Generator().manual_seed(0)
        while reason is None and not self.decoder.ready:
            vocabulary = model.get_input_embeddings().weight.shape[0]
            ids = torch.randint(0, vocabulary, (1, 9), generator=generator, device="cpu")
            cache = DynamicCache(config=model.config)
            with inference(model):
                model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
                named = {"input_ids": ids[:, -1:], "past_key_values": cache}
                reason = self.decoder.replace(self._forward, self.chosen_for(cache), named, self._replace)
            self.usage.reset()
        trim()
        self.changes.start()
        if reason is not None and self._demanded and self.plan.weights is not None:  # else nothing was to be packed
            logger.warning("the original weights are kept: %s", reason)

    def _replace(self, module: nn.Module, parts: list[PackedLinear]) -> None:
        self._linear_packed.pop(module, None)  # which holds the matrix
        if not cast(Replaced, self.replaced).replace(module, parts) and self.plan.weights is not None:
            self.formats.take(module, parts)

    def remove(self) -> None:
        """
        Raises:
            CoreskipError: the weights are gone; nothing was changed.
        """
        self.check_removable()
        self.changes.stop()
        self.model.__class__ = self._class
        if self._outer is not None:
            outer, cls = self._outer
            outer.__class__ = cls
        self._patches.undo()
        if self.replaced is not None:
            self.replaced.put_back()

    def check_removable(self) -> None:
        """Raises CoreskipError where `remove` would."""
        if not self.removable:
            self.refuse("unwrap the model")

    @property
    def removable(self) -> bool:
        """Whether the model's own weights are there, or can be had back bit for bit."""
        return self.replaced is None or self.replaced.reversible

    def refuse(self, what: str) -> None:
        """Raises CoreskipError where packed weights have replaced the model's own."""
        if self.replaced is not None:
            self.replaced.refuse(what)

    def repack(self) -> None:
        """Forget packed weights: the model's own were moved, cast or loaded anew."""
        self._forget(frozenset(self.model.modules()))
        self.changes.start()
        check_format(self.model, self.anatomy, self.plan)

    def notice(self, every_setting: bool = False) -> str | None:
        """Takes note of what others have changed about the model; and why decode steps have to run on its modules.

        Raises:
            CoreskipError: somebody wrote to a matrix that packed ones have replaced.
        """
        changed = self.changes.since(every_setting)
        if changed is not None:
            logger.debug("%d modules of the model were changed: they are packed and described anew", len(changed))
            self._forget(changed)
            self._written_in_vain = self.replaced is not None and self.replaced.written_to
        if self._written_in_vain:
            self.refuse("write to its weights")
        return self.changes.obstacle()

    def _forget(self, changed: frozenset[nn.Module]) -> None:
        layers = self._places.layers_of(changed)
        gone = {i for i in layers if any(m in (self.replaced or ()) for m in self.anatomy.mlps[i].owner.modules())}
        self._altered = self._places.altered() | (self._altered & gone) | (gone & self._packing_layers)
        for drop in (self._token_mlps, self._static_packed, self._spare):
            for index in layers:
                cast(dict[int, Any], drop).pop(index, None)
        self._weights.forget(changed, layers)
        self.formats.clear()
        for module in changed:
            self._linear_packed.pop(module, None)
            self.packed_alone(module)  # a bias may be another
        self._chosen_once, self._epoch = None, object()
        self._chosen_by.clear()
        self.decoder.forget()
        self.graphs.forget()
        if self._watched and not self._altered:
            self._watched = self._watches()
        for drafter in (self.exact, self.lookup):
            if drafter is not None:
                drafter.forget()

    @property
    def _packing_layers(self) -> frozenset[int]:
        """Layers whose MLP is packed apart from what a dense step reads."""
        return frozenset({*self._chosen, *self._static, *self._token_policies})

    def own_forward(self, module: nn.Module) -> Any:
        """The `forward` among a module's own attributes that wrapping put there."""
        return self._patches.current(module, "forward")

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
        return self._patches.undone(module, attributes)

    def packed_bytes(self) -> tuple[int, int] | None:
        """Bytes of all matrices that a native decode step reads, and of the MLPs' share of them; None where steps are
        not native, or read the model's own."""
        return self.decoder.packed_bytes()

    def _patch_model(self) -> None:
        """Decode steps go to the native step, where it covers the model and the call."""
        original = self._forward = self.model.forward
        signature = inspect.signature(original)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            named = {**signature.bind_partial(*args).arguments, **kwargs} if args else kwargs
            cache = named.get("past_key_values")
            reason = self.notice(every_setting=not isinstance(cache, Cache) or int(cache.get_seq_length()) == 0)
            if self.model.training or torch.compiler.is_compiling() or current_prompt() is not None:
                return original(*args, **kwargs)
            if not isinstance(cache, Cache) or int(cache.get_seq_length()) == 0:
                return original(*args, **kwargs)
            verifying = self.exact is not None and not DRAFTING.get()
            output = None
            if self.graphs.capture is not None:  # a GPU's captured steps are what native ones are to a CPU
                # verification's tokens are the dense model's own to the last bit: so are its steps
                output = None if verifying or reason is not None else self.graphs.forward(original, named)
            elif self.decoder.refusal is None:
                chosen = reason or (self._dense if verifying else self.chosen_for(cache))
                output = self.decoder.forward(original, chosen, named)
            return original(*args, **kwargs) if output is None else output

        self._patches.set(self.model, "forward", forward)

    def native_passes(self, cache: Cache) -> NativePasses | None:
        """Passes over one sequence's cache by native steps, where they cover model and plan: in exact mode the plan
        drafts and the dense model verifies, else the plan does both."""
        self.notice()
        draft = self.chosen_for(cache)
        if not self.decoder.ready or isinstance(draft, str):
            return None
        try:
            dense = draft if self.exact is None else self._dense
            return NativePasses(NativeSequence(self.decoder, cache), draft, dense)
        except NotCovered:
            return None

    def chosen_for(self, cache: Cache) -> Chosen | str:
        """What the native step runs for the sequences of a cache, or why it cannot."""
        selections = selections_of(cache, self)
        if self._modules_only is not None:
            return self._modules_only
        if not self._places.hold() or self._altered & self._packing_layers:
            return "parts of the model were replaced by others"
        if not (self._chosen or self._skips.adaptive) or selections is None:
            if self._chosen_once is None:
                self._chosen_once = self._described(Choice({}, {}), None)
            return self._chosen_once
        if self._skips.disputed(selections):
            return "its sequences skip different layers"
        choice = self._choice(selections)
        settled, chosen = self._chosen_by.get(selections, (None, None))
        if chosen is None or settled is not choice:
            chosen = self._described(choice, selections)
            self._chosen_by[selections] = (choice, chosen)
        return chosen

    def settled(self, cache: Cache) -> Settled | str:
        """What a captured step for the sequences of a cache has fixed, or why there can be none."""
        selections = selections_of(cache, self)
        if selections is None or not (self._chosen or self._skips.adaptive):
            return self._skips.skipped(None), []
        choice = self._choice(selections)
        if choice.lists or self._skips.disputed(selections):
            return "its sequences chose differently"
        tensors = [t for packed in choice.packed.values() for t in vars(packed).values() if isinstance(t, Tensor)]
        return self._skips.skipped(selections), tensors

    def _choice(self, selections: Selections) -> Choice:
        if selections.packed_of is not self._epoch:
            selections.forget_packed()
            selections.packed_of = self._epoch
        return selections.choice(self._pack_chosen, lambda layer: self._weights.mlp(layer, self._bundle_format))

    @property
    def chooses_by_token(self) -> bool:
        return bool(self._token_policies or self._column_policies)

    def _reason_for_modules(self) -> str | None:
        """Why policies that choose token by token need the modules' own pass, if they do."""
        chosen = {**self._token_policies, **self._column_policies}
        if any(not native_rule(policy, self.anatomy, index) for index, policy in chosen.items()):
            return "no kernel of the native step makes its choice"
        return None

    def _described(self, choice: Choice, selections: Selections | None) -> Chosen:
        packed = {**{i: self._packed_static(i) for i in self._static}, **choice.packed}
        attention, mlp = self._skips.skipped(selections)
        mlps = {i: BundledMLP(p) for i, p in packed.items()}
        kept = {i: p.intermediate_size for i, p in packed.items()}
        for index, lists in choice.lists.items():
            of_rows = RowLists.of(lists, kept[index])
            mlps[index], kept[index] = BundledMLP(packed[index], lists=of_rows), lists.shape[1]
        for index in self._token_policies:
            mlps[index] = _bundled(self.token_mlp(index))  # what its rule leaves out the native step counts itself
        columns = {i: self._weights.native_columns(i, policy) for i, policy in self._column_policies.items()}
        skipped = sum(self._width(i) for i in mlp)
        skipped += sum(self._width(i) - n for i, n in kept.items() if i not in mlp)
        return Chosen([mlps.get(i) for i in range(len(self.anatomy))], skipped, attention, mlp, columns=columns)

    def _patch_stack(self, stack: nn.Module) -> None:
        original = stack.forward
        signature = inspect.signature(original)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.notice()
            if self.model.training:
                step = None
            else:
                # positional arguments are rare (a caller of the bare decoder stack) and cost a binding
                named = signature.bind_partial(*args, **kwargs).arguments if args else kwargs
                step = self._begin(named)
            token = STEP.set(step)
            try:
                output = original(*args, **kwargs)
            finally:
                STEP.reset(token)
                LAST.set(None if step is None else step.phase)
            changed = self.changes.absorb()
            if changed is not None:
                self._forget(changed)
            if step is None:
                return output
            if step.phase is not Phase.PREFILL:
                (TALLY.get() or self.usage.add)(step)
            elif step.selections is not None:
                cache = getattr(output, "past_key_values", None)  # made inside the pass where none was given
                if isinstance(cache, Cache):
                    attach(cache, step.selections)
            return output

        self._patches.set(stack, "forward", forward)

    def _patch_linears(self) -> bool:
        """Decode steps run every linear of the decoder layers, and the LM head, on the native kernel. Returns whether
        that is all of their matrices."""
        if available("cpu") is not None:
            return False
        inner = [module for layer in self.anatomy.layers for module in layer.modules() if _has_matrix(module)]
        patched = [self._patch_linear(module) for module in inner]
        return self._patch_linear(cast(Any, self.model).get_output_embeddings()) and all(patched)

    def _patch_linear(self, module: nn.Module) -> bool:
        """Few rows go to the decode kernel, which reads the module's own weight in place; others to the module, or to
        what has replaced its weight. Under a plan with a weight format, decode steps read that."""
        replaced, shareable = self.replaced, isinstance(module, nn.Linear) and _shareable(module.weight)
        sharing = shareable or (replaced is not None and module in replaced.candidates)
        formats = self.formats if self.plan.weights is not None and takes_format(module) else None
        if not sharing and formats is None:
            return False
        original, most = cast(Any, module).forward, MAX_ROWS * rows_of(module)[0].shape[1]
        is_head, of_class = module is cast(Any, self.model).get_output_embeddings(), "forward" not in vars(module)

        @functools.wraps(original)
        def forward(input: Tensor) -> Tensor:
            # the head runs after the stack's pass is over
            phase, plain = LAST.get() if is_head else _phase(), is_plain_linear(module)
            wanted = not self.model.training if is_head else phase not in (None, Phase.PREFILL)
            wanted = wanted and plain and not _computes_otherwise(input)
            few = input.numel() <= most
            in_format = formats is not None and plain and formats.apply(phase)
            if replaced is not None and module in replaced:
                # in prefill, too, the head sees one token of each sequence
                each = not is_head or few or input.shape[-2] == 1
                parts = replaced.parts(module)
                return product(input, parts) if in_format else replaced.run(module, input, wanted and each)
            parts = self.formats.parts(module) if in_format else []
            if parts:
                return product(input, parts)
            if not (few and wanted and shareable and module.weight.dtype in DTYPES):
                # somebody may have given it another class meanwhile
                return cast(Tensor, cast(Any, type(module)).forward(module, input) if of_class else original(input))
            packed = self._linear_packed.get(module)
            if packed is None:
                packed = self._linear_packed[module] = PackedLinear.pack(*rows_of(module))
            return linear(input, packed)

        self._patches.set(module, "forward", forward)
        return sharing

    def _patch_columns(self, index: int, module: nn.Module, least: float, in_mlp: bool) -> None:
        """Decode steps leave out this linear's small inputs."""
        policy = self._column_policies[index]
        original = cast(Any, module).forward
        outputs, inputs = rows_of(module)[0].shape
        layer = self.anatomy.mlps[index]
        # a neuron's worth of weights: what an unread column adds to the neurons skipped
        column = outputs / ((3 if layer.gated else 2) * layer.hidden_size) if in_mlp else 0.0

        @functools.wraps(original)
        def forward(input: Tensor) -> Tensor:
            step = STEP.get()
            plain = is_plain_linear(module)
            if step is None or step.phase is not Phase.DECODE or torch.is_grad_enabled() or not plain:
                return cast(Tensor, original(input))
            sparse = SparseColumns(self._weights.columns(module), least, policy.rule == "wina")
            rows = input.numel() // inputs
            kept = sparse.kept(input) if self.usage.counting and column else policy.keep * inputs * rows
            step.skipped += (inputs * rows - kept) * column
            return sparse.run(input)

        self._patches.set(module, "forward", forward)

    def _patch_mlp(self, index: int, layer: FeedForward) -> None:
        if index in self._watched:
            self._patch_observer(index, layer.down)
        if not any(index in policies for policies in (self._chosen, self._static, self._token_policies)):
            return
        target = layer.owner if layer.whole else layer.up
        original = target.forward

        @functools.wraps(original)
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            step = STEP.get()
            if step is not None and step.phase is Phase.DECODE:
                y = self._decode(index, step, x)
                if y is not None:
                    step.bypass = not layer.whole
                    return _without_gradients(y, layer) if torch.is_grad_enabled() else y
            return original(x, *args, **kwargs)

        self._patches.set(target, "forward", forward)
        if not layer.whole:
            self._patch_passthrough(layer)

    def _patch_observer(self, index: int, down: nn.Module) -> None:
        original = down.forward

        @functools.wraps(original)
        def forward(a: Tensor) -> Any:
            step = STEP.get()
            if step is not None and step.phase is Phase.PREFILL and step.selections is not None:
                step.selections.observe(index, a, step.valid)
            return original(a)

        self._patches.set(down, "forward", forward)

    def _patch_passthrough(self, layer: FeedForward) -> None:
        """Where the MLP has no module of its own (OPT) or one that does more (BLOOM), the up projection returns the
        whole MLP's output, which activation and down projection then let pass."""
        act, down = cast(Any, layer.act), layer.down
        original_act: Activation = act.forward if isinstance(act, nn.Module) else act
        original_down = down.forward

        @functools.wraps(original_act)
        def activation(x: Tensor) -> Any:
            step = STEP.get()
            return x if step is not None and step.bypass else original_act(x)

        @functools.wraps(original_down)
        def down_forward(x: Tensor) -> Any:
            step = STEP.get()
            if step is not None and step.bypass:
                step.bypass = False
                return x
            return original_down(x)

        if isinstance(act, nn.Module):
            self._patches.set(act, "forward", activation)
        else:
            self._patches.set(layer.owner, layer.act_name, activation)
        self._patches.set(down, "forward", down_forward)

    # --- running

    def _begin(self, named: dict[str, Any]) -> Step:
        """Tell prefill from decode, and find or make the sequences' selections."""
        cache = named.get("past_key_values")
        if not isinstance(cache, Cache):
            cache = None
        ids = named.get("input_ids")
        shape = (ids if ids is not None else named["inputs_embeds"]).shape
        rows, length = int(shape[0]), int(shape[1])
        selections = selections_of(cache, self)
        prompt = current_prompt()
        if selections is not None and selections.rows != rows:
            logger.warning("the KV cache was cut to %d rows by hand: its neuron selections are dropped", rows)
            selections = None
        if prompt is None and cache is not None and (selections is not None or int(cache.get_seq_length()) > 0):
            if selections is None and self._watched:
                logger.debug("nothing was selected for this KV cache: layers that choose from the prompt run dense")
            verifying = DENSELY.get() or (self.exact is not None and not DRAFTING.get())
            return Step(Phase.VERIFY if verifying else Phase.DECODE, rows, length, None, selections)
        if not (self._watched or self._skips.adaptive):
            return Step(Phase.PREFILL, rows, length, None, None)
        past = 0 if cache is None else int(cache.get_seq_length())
        if selections is None or past == 0:
            selections = Selections(self, rows, self._watched, self._chosen, self.plan.clusters)
            if past:
                logger.debug("%d tokens of this KV cache came before wrap: only the new ones choose neurons", past)
        mask = named.get("attention_mask")
        if not (isinstance(mask, Tensor) and mask.ndim == 2):
            mask = None if prompt is None else prompt.attention_mask
        return Step(Phase.PREFILL, rows, length, _valid(mask, past, length), selections)

    def _decode(self, index: int, step: Step, x: Tensor) -> Tensor | None:
        """The sparse MLP's output for x ``[rows, length, hidden]`` or flattened; None: run dense."""
        if index in self._altered:
            return None
        if index in self._token_policies:
            return self._decode_by_token(index, step, x)
        lists = None
        if index in self._static:
            packed = self._packed_static(index)
        elif step.selections is None:
            return None
        else:
            choice = self._choice(step.selections)
            if index not in choice.packed:  # which no prompt went through
                return None
            packed, lists = choice.packed[index], choice.lists.get(index)
        kept = packed.intermediate_size if lists is None else lists.shape[1]
        step.skipped += (self._width(index) - kept) * step.rows * step.length
        if lists is None:
            return mlp(x, packed)
        by_token = x.view(-1, x.shape[-1])
        lists = lists.repeat_interleave(step.length, 0)
        parts = zip(by_token.split(MAX_ROWS), lists.split(MAX_ROWS), strict=True)
        return torch.cat([mlp(some, packed, wanted) for some, wanted in parts]).view_as(x)

    def _decode_by_token(self, index: int, step: Step, x: Tensor) -> Tensor:
        y, kept = self.token_mlp(index).run(x, self.usage.counting)
        tokens, width = step.rows * step.length, self._width(index)
        step.skipped += width * tokens - (self._token_policies[index].kept(width) * tokens if kept is None else kept)
        return y

    def token_mlp(self, index: int) -> SparseMLP:
        """What a layer whose policy chooses token by token computes at a decode step."""
        sparse = self._token_mlps.get(index)
        if sparse is None:
            sparse = self._token_mlps[index] = self._weights.describe(index, self._token_policies[index])
        return sparse

    def _packed_static(self, index: int) -> PackedMLP:
        packed = self._static_packed.get(index)
        if packed is None:
            packed = self._static_packed[index] = self._pack(index, self._static[index])
        return packed

    @property
    def _bundle_format(self) -> str | None:
        return None if self.plan.weights is None else "int8"

    def _pack(self, index: int, indices: Tensor, memory: Tensor | None = None) -> PackedMLP:
        return self._weights.pack(index, indices=indices, fmt=self._bundle_format, memory=memory)

    def _pack_chosen(self, index: int, indices: Tensor) -> PackedMLP:
        """The neurons that a sequence chose, in the memory of one that is over, where there is one."""
        spare = self._spare.setdefault(index, deque())
        try:
            memory = spare.pop()
        except IndexError:
            memory = None
        packed = self._pack(index, indices, memory)
        if self.plan.weights is None:
            weakref.finalize(packed, spare.append, packed.weight).atexit = False
        return packed


def _bundled(sparse: SparseMLP) -> BundledMLP:
    scorer = sparse.scorer if isinstance(sparse.scorer, LowRankScores) else None
    return BundledMLP(
        sparse.packed,
        sparse.rule if scorer is None else "learned",
        sparse.keep,
        sparse.threshold,
        sparse.smooth,
        sparse.refine,
        predictor=None if scorer is None else (scorer.reduce, scorer.expand),
    )


def _phase() -> Phase | None:
    step = STEP.get()
    return None if step is None else step.phase


class _NoGradients(torch.autograd.Function):
    """Lets its first argument pass, and raises where gradients would go back to the others."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *weights: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise CoreskipError(
            "decode steps that leave neurons out have no gradients of their weights: "
            "call coreskip.unwrap(model) before training, or freeze the weights (requires_grad_(False))"
        )


def _without_gradients(y: Tensor, layer: FeedForward) -> Tensor:
    weights = [p for module in (layer.up, layer.down) for p in module.parameters() if p.requires_grad]
    return cast(Tensor, cast(Any, _NoGradients).apply(y, *weights)) if weights else y


def _computes_otherwise(x: Tensor) -> bool:
    """Whether torch's own linear layers do what the decode kernels do not: keep gradients, or cast their inputs."""
    return torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)


def _has_matrix(module: nn.Module) -> bool:
    weight = vars(module).get("_parameters", {}).get("weight")
    return isinstance(weight, Tensor) and weight.ndim == 2


def _shareable(weight: Tensor) -> bool:
    """Whether the decode kernel can read this weight where it lies: it must be on the CPU, with rows that need no
    padding. Other weights would have to be copied, which doubles their memory."""
    if weight.device.type != "cpu" or weight.dtype not in DTYPES:
        return False
    return PackedLinear.pack(weight).weight.data_ptr() == weight.data_ptr()


def _valid(mask: Tensor | None, past: int, length: int) -> Tensor | None:
    """Which of a pass's tokens are not padding: the columns of a 2-D attention mask that belong to them."""
    if mask is None:
        return None
    columns = mask[:, past : past + length] if mask.shape[1] >= past + length else mask[:, -length:]
    if columns.shape[1] != length or bool(columns.all()):
        return None
    return columns.bool()


class _Outer:
    """What a wrapped model, and one that generates by it, can do besides (be a context manager) or not."""

    def __enter__(self) -> Any:
        runtime_of(cast(nn.Module, self)).check_removable()  # else the block's end would raise, whatever came before
        return self

    def __exit__(self, *exception: object) -> None:
        unwrap(cast(nn.Module, self))

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        runtime_of(cast(nn.Module, self)).refuse("load weights")
        result = super().load_state_dict(*args, **kwargs)  # type: ignore[misc]
        runtime_of(cast(nn.Module, self)).repack()
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise CoreskipError("a wrapped model cannot be copied: call coreskip.unwrap(model) first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CoreskipError("a wrapped model cannot be pickled: call coreskip.unwrap(model) first")


class _Wrapped(_Outer, Watched):
    """What a wrapped model does itself: mark ``generate``'s prefill, draft, decode natively."""

    def _prefill(
        self, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], is_first_iteration: bool = True
    ) -> Any:
        arguments = (input_ids, generation_config, model_kwargs, is_first_iteration)
        if not is_first_iteration:  # an assistant goes on drafting: its cache's state tells
            return super()._prefill(*arguments)  # type: ignore[misc]
        with prefilling(model_kwargs.get("attention_mask")):
            return super()._prefill(*arguments)  # type: ignore[misc]

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy search and sampling, which transformers send here alike."""
        arguments = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "generation_config": generation_config,
            "synced_gpus": synced_gpus,
            "streamer": streamer,
        }
        plain = functools.partial(super()._sample, input_ids, **arguments, **model_kwargs)  # type: ignore[misc]
        runtime = runtime_of(cast(nn.Module, self))
        exact = runtime.exact
        if runtime.decoder.exits_early:  # it drafts for itself by its first layers: what is measured is of all of them
            return plain()
        arguments["model_kwargs"] = model_kwargs
        if exact is not None:
            return exact.generate(self, plain, input_ids, arguments, runtime.native_passes)

        def undrafted() -> Any:
            output = loop.generate(runtime, self, input_ids, arguments)
            return plain() if output is None else output

        lookup = runtime.lookup
        hooked = lookup is not None and runtime.notice() is not None  # it would be measured on the modules
        if lookup is None or hooked or runtime.graphs.capture is not None or runtime.decoder.refusal is not None:
            return undrafted()
        lookup.by_rows = lookup.native_only = True
        return lookup.generate(self, undrafted, input_ids, arguments, runtime.native_passes)

    def _assisted_decoding(
        self, input_ids: Tensor, *, generation_config: Any, inputs_tensor: Any = None, **options: Any
    ) -> Any:
        options = {"generation_config": generation_config, "inputs_tensor": inputs_tensor, **options}
        plain = super()._assisted_decoding  # type: ignore[misc]
        if not runtime_of(cast(nn.Module, self)).decodes_otherwise:
            return plain(input_ids, **options)
        return assisted.decode(plain.__func__, self, input_ids, options)

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        return False  # the patched forward keeps state between steps that a captured graph would freeze

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        runtime_of(cast(nn.Module, self)).refuse("move or cast the model")
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        runtime_of(cast(nn.Module, self)).repack()
        return result

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        runtime = runtime_of(cast(nn.Module, self))
        if runtime.packed_alone(cast(Any, self).get_output_embeddings()) is not None:
            runtime.refuse("resize its embeddings")
        return super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]


@functools.cache
def _wrapped_class(cls: type) -> type:
    return _with(_Wrapped, cls)


@functools.cache
def _outer_class(cls: type) -> type:
    return _with(_Outer, cls)


def _with(more: type, cls: type) -> type:
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (more, cls), names)
