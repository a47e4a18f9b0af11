"""`wrap` puts a Plan to work on a Hugging Face model, in place; `unwrap` is its exact inverse.

Parameters, module names, signatures and the state_dict stay as they are, but for matrices that packed ones replace
(release.py). What changes is in wrapping.py.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from torch import nn

from ..kernels.packed import DTYPES
from ..predictors.anatomy import Anatomy, check_model, dissect
from ..predictors.checks import check_flag
from ..predictors.errors import CoreskipError
from ..predictors.plan import Plan
from ..predictors.policies import Chooser
from .bundles import Weights
from .delegates import check_generates, generator_of
from .generation import outer_class, wrapped_class
from .generation import runtime_of as runtime_of
from .memory import cap_of
from .memory_size import bytes_of
from .steer import is_steered, stop_steering
from .wrapping import ATTRIBUTE, Options, Runtime

Model = TypeVar("Model", bound=nn.Module)

#: held while a model is wrapped or unwrapped: an engine without settings gives way to others, and wraps anew from a
#: thread of its own. Reentrant: the garbage collector may close a dropped engine while another is being made.
changing = threading.RLock()


def wrap(
    model: Model,
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    exact: bool = False,
    keep_originals: bool | None = None,
    lookup: bool = False,
    memory: int | str | None = None,
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
        memory: what the model may take at most, its weights, KV caches and what computing takes: bytes, "4GB", "512MiB"
            or "60%" of what is free here. Of a packed model on a CPU: as many of its matrices as there is room for stay
            in memory, the others are read from its folder at every token, ahead of what is computed
            (runtime/memory.py). The text is the same. None: what `load` was told.

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
    cap = None if memory is None else bytes_of(memory)
    check_model(model)
    with changing:
        make_way(model)
        if exact and keep_originals is False:
            raise CoreskipError(
                "exact mode verifies with the weights as they were loaded: leave out keep_originals=False"
            )
        inner = _wrappable(model)
        options = Options(exact, keep_originals, lookup, cap_of(inner) if cap is None else cap)
        _put_to_work(model, inner, Plan.of(plan, inner), options)
    return model


def _wrappable(model: nn.Module) -> nn.Module:
    """The model that generates, for `model`.

    Raises:
        CoreskipError: it is spread over devices, compiled, or does not generate.
    """
    _refuse_hooks(model)
    check_generates(model)
    return generator_of(model)


def _put_to_work(model: nn.Module, inner: nn.Module, plan: Plan, options: Options) -> None:
    anatomy = dissect(inner)
    plan.check(inner, anatomy)
    _check_dtypes(plan, anatomy)
    runtime = Runtime(inner, anatomy, plan, options)
    runtime.install(wrapped_class(cast(Any, type(inner))))
    if inner is not model:
        runtime.stand_for(model, outer_class(cast(Any, type(model))))
    runtime.replace_originals()
    runtime.memory.settle()


def unwrap(model: Model) -> Model:
    """Undo `wrap` and `steer`: the model is bit for bit what it was before.

    Raises:
        CoreskipError: the model is neither wrapped nor steered, or its weights are gone (``keep_originals=False``);
            nothing changed.
    """
    check_model(model)
    with changing:
        if is_wrapped(model) or not is_steered(model):
            runtime_of(model).remove()
        stop_steering(model)
    return model


@contextmanager
def wrapped(model: Model, plan: Plan, weights: Weights) -> Iterator[Model]:
    """`wrap` for a while, with matrices that were packed before: for searches, which try many plans on one model."""
    anatomy, inner = weights.anatomy, generator_of(model)
    plan.check(inner, anatomy)
    runtime = Runtime(inner, anatomy, plan, Options(memory=cap_of(inner)), weights)
    runtime.install(wrapped_class(cast(Any, type(inner))))
    runtime.changes.start()
    runtime.memory.settle()
    try:
        yield model
    finally:
        runtime_of(model).remove()


def make_way(model: nn.Module) -> None:
    """Take off a wrapping that nobody asked for: that of an Engine without settings, which wraps anew when it is used.

    Raises:
        CoreskipError: the model is wrapped because somebody asked for it.
    """
    if not is_wrapped(model):
        return
    if not runtime_of(model).gives_way:
        raise CoreskipError("the model is wrapped already: call coreskip.unwrap(model) first")
    runtime_of(model).remove()


def is_wrapped(model: nn.Module) -> bool:
    return ATTRIBUTE in getattr(generator_of(model), "__dict__", {})  # a name, given by mistake, has none


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
    for index, found in anatomy.present:
        neurons = plan.layers[index].neurons
        dtypes = {m.dtype for m in vars(found.matrices()).values() if m is not None}
        if neurons.chooser is not Chooser.NOTHING and not (len(dtypes) == 1 and dtypes <= set(DTYPES)):
            names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise CoreskipError(
                f"the plan leaves out neurons of layer {index}, whose MLP's weights are {names}: "
                "cast the model to float32, bfloat16 or float16, e.g. model.float()"
            )
