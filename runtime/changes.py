"""What others change about a wrapped model between two steps: weights, modules, hooks, settings.

Packed weights and the native step's description are made once and would go on as if nothing had happened. Before every
step `Changes` is asked; what it answers costs little as long as nothing has changed: parts note what is done to them
(runtime/parts.py), writes to tensors are counted by torch (kernels/watch.py), and a few settings are compared.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels.packed import DTYPES
from ..kernels.watch import Watch
from ..predictors.anatomy import Anatomy, FeedForward
from .parts import Notes, plain_items, unwatch, unwatched_class, watch
from .spec import is_plain_linear

_SIMPLE = (bool, int, float, str, torch.dtype, type(None))
#: Settings that do not change what a step computes, or that the step itself looks at.
_WITHOUT_EFFECT = frozenset(
    (
        "use_cache", "output_attentions", "output_hidden_states", "return_dict", "dtype", "torch_dtype",
        "num_hidden_layers",  # the native step looks at it: `assistant_early_exit` changes it twice a round
        "name_or_path", "architectures", "pad_token_id", "bos_token_id", "eos_token_id", "transformers_version",
    )
)  # fmt: skip
#: Attributes that are no state of a module's own, whoever assigns them.
_OF_MODULES = frozenset(("forward", "training", "__class__", "config"))
#: Those that models read at every pass.
_READ = (
    "_attn_implementation_internal", "final_logit_softcapping", "logit_scale", "logits_scaling",
)  # fmt: skip


@dataclass
class _Module:
    """What of a module, apart from the contents of its tensors, is compared."""

    cls: type
    children: tuple[nn.Module, ...]
    tensors: tuple[int, ...]  # identities
    values: dict[str, Any]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Module)
            and self.cls is other.cls
            and self.tensors == other.tensors
            and len(self.children) == len(other.children)
            and all(a is b for a, b in zip(self.children, other.children, strict=True))
            and _alike(self.values, other.values)
        )


def _alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        v is b[k] or (type(v) is type(b[k]) and isinstance(v, _SIMPLE) and v == b[k]) for k, v in a.items()
    )


class Changes:
    """The changes to one wrapped model.

    forward: by module, the `forward` that wrapping gave it or left it; None where there is none but its class's.
    plain: of a part, its attributes without patches; may raise where it must not be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[nn.Module], Any],
        plain: Callable[[nn.Module, dict[str, Any]], dict[str, Any]],
    ) -> None:
        self._model, self._forward = model, forward
        self._notes = Notes(lambda module: plain(module, dict(plain_items(module))))
        self._lock = threading.Lock()
        self._obstacle: str | None = None
        self._obstacle_in: nn.Module = model
        self._rewritten: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # whose buffers every pass writes
        self._started = False
        self._modules: dict[nn.Module, _Module] = {}
        self._configs: list[dict[str, Any]] = []
        self._classes: list[Any] = []

    def start(self) -> None:
        """The model is as it should be: from now on changes count."""
        with self._lock:
            self._settle()
            self._started = True

    def stop(self) -> None:
        """The model goes back to its owner."""
        with self._lock:
            for module in self._modules:
                unwatch(module)
            self._modules, self._started = {}, False

    def _is_started(self) -> bool:
        return self._started

    def since(self, every_setting: bool) -> frozenset[nn.Module] | None:
        """The modules that are not as they were when this was last asked, those included that are new or gone; none
        where only settings are not. None where nothing has changed.

        every_setting: compare all, which takes 20 microseconds, not only those that models read at every pass.
        """
        if not self._started or not (self._notes.changed or self._watch.changed() or self._set_anew(every_setting)):
            return None
        with self._lock:
            if not self._is_started():  # another thread has unwrapped the model meanwhile
                return None
            before, settings, written = self._modules, self._set, set(map(id, self._watch.which()))
            self._settle()
            now = self._modules
            changed = {module for module in before.keys() | now.keys() if before.get(module) != now.get(module)}
            changed |= {module for module, state in now.items() if not written.isdisjoint(state.tensors)}
            for module in before.keys() - now.keys():
                unwatch(module)
            return frozenset(changed) if changed or settings != self._set else None

    def absorb(self) -> frozenset[nn.Module] | None:
        """What has changed since `since` was asked, right after a pass of the model's own modules, but for what parts
        do to themselves in a pass: rotary embeddings that grow with the text write their frequencies, others count or
        remember. The attributes and buffers concerned are not looked at any more; all else of these parts is.
        """
        if not self._started or not (self._notes.changed or self._watch.changed()):
            return None
        with self._lock:
            written = set(map(id, self._watch.which()))
            for module, before in self._modules.items():
                names = {name for part, name in self._notes.names if part == id(module)} - _OF_MODULES
                names -= {*module._modules, *module._parameters}
                self._notes.own |= {(id(module), name) for name in names}
                for name in names:
                    before.values.pop(name, None)
                buffers = [id(t) for t in module._buffers.values() if t is not None]
                if not written.isdisjoint(buffers) or not set(buffers) <= set(before.tensors):
                    self._rewritten.add(module)
                    before.tensors = tuple(map(id, self._tensors(module)))
        return self.since(every_setting=False)

    def expect(self, module: nn.Module) -> None:
        """Wrapping has given `module` another forward: that is no change."""
        with self._lock:
            state = self._modules.get(module)
            if state is not None:
                state.values["forward"] = vars(module)["forward"]

    def obstacle(self) -> str | None:
        """Why decode steps have to run on the model's modules: hooks, or a `forward` of somebody else's."""
        if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
            return "hooks of all modules are set, which this step would not call"
        if self._obstacle is not None or not self._started:  # it can be taken away without a note
            self._obstacle = self._obstacle_of(self._obstacle_in) or self._find_obstacle()
        return self._obstacle

    def _settle(self) -> None:
        self._notes.changed = False
        self._notes.names.clear()
        modules = list(self._model.modules())
        for module in modules:
            watch(module, self._notes)
        self._modules = {module: self._state(module) for module in modules}
        self._classes = list(dict.fromkeys(unwatched_class(type(module)) for module in modules))
        tensors = {id(t): t for module in modules for t in self._tensors(module)}
        self._watch = Watch(list(tensors.values()))
        config: Any = self._model.config
        self._configs = list({id(c): vars(c) for c in (config, config.get_text_config())}.values())
        self._set, self._read_before = self._settings(), self._read()
        self._obstacle = self._find_obstacle()

    def _state(self, module: nn.Module) -> _Module:
        values = {
            name: value
            for name, value in vars(module).items()
            if not (name.startswith("_") or isinstance(value, (Tensor, nn.Module)))
            if (id(module), name) not in self._notes.own
        }
        if module is self._model:  # what else is set on it, generation's doing included, has nothing to do with steps
            values = {name: value for name, value in values.items() if name in ("forward", "training", "config")}
        children = tuple(child for child in module._modules.values() if child is not None)
        return _Module(unwatched_class(type(module)), children, tuple(map(id, self._tensors(module))), values)

    def _set_anew(self, every: bool) -> bool:
        if every:
            return self._settings() != self._set
        return self._read() != self._read_before

    def _settings(self) -> list[Any]:
        values = [value for config in self._configs for name, value in config.items() if name not in _WITHOUT_EFFECT]
        # a function that was registered under the same name anew counts from the next prompt on
        values += [ALL_ATTENTION_FUNCTIONS.get(config.get(_READ[0])) for config in self._configs]
        return values + [cls.forward for cls in self._classes]  # and so does code put into a class

    def _read(self) -> list[Any]:
        """The settings that a model's own modules read at every pass."""
        return [config.get(name) for config in self._configs for name in _READ]

    def _find_obstacle(self) -> str | None:
        for module in self._model.modules():
            reason = self._obstacle_of(module)
            if reason is not None:
                self._obstacle_in = module  # to walk all of them at every step takes a third of it
                return reason
        return None

    def _obstacle_of(self, module: nn.Module) -> str | None:
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        if any(not of_capturing(hook) for of_kind in hooks if of_kind for hook in list(of_kind.values())):
            return "a module has hooks, which this step would not call"
        if vars(module).get("forward") is not self._forward(module):
            return f"a {type(module).__name__} was given another forward"
        return None

    def _tensors(self, module: nn.Module) -> Iterator[Tensor]:
        yield from (t for t in module._parameters.values() if t is not None)
        if module not in self._rewritten:
            yield from (t for t in module._buffers.values() if t is not None)


def of_capturing(hook: Any) -> bool:
    """Whether a hook is one of those that transformers leaves behind after collecting hidden states."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


class Places:
    """Where a model had the parts that were wrapped, by name."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        parts = {anatomy.stack, *anatomy.layers, *(mlp.owner for _, mlp in anatomy.present)}
        parts |= {attention.module for attention in anatomy.attentions if attention is not None}
        parts |= {part for found in anatomy.experts if found is not None for part in (found.block, found.module)}
        # by the dictionary that has it: to walk the tree for every step takes too long
        self._parts = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent.named_children()
            if child in parts
        ]
        self._list = next(m for m in anatomy.stack.modules() if anatomy.layers[0] in set(m.children()))
        self._mlp_of = {part: i for i, mlp in anatomy.present for part in mlp.owner.modules()}
        self._holding: bool | None = None

    def hold(self) -> bool:
        """Whether they are still there."""
        if self._holding is None:
            self._holding = len(self._list._modules) == len(self._anatomy) and all(
                parent._modules.get(name) is child for parent, name, child in self._parts
            )
        return self._holding

    def layers_of(self, changed: Iterable[nn.Module]) -> set[int]:
        """The layers with one of these modules, past or present, in their MLP; to be called after every change."""
        self._holding = None
        present = {part: i for i, mlp in self._anatomy.present for part in mlp.owner.modules()}
        self._mlp_of.update(present)
        return {self._mlp_of[module] for module in changed if module in self._mlp_of}

    def altered(self) -> frozenset[int]:
        """The layers whose MLP has something else than plain linears in their place."""
        return frozenset(i for i, mlp in self._anatomy.present if not all(map(_plain, _linears(mlp))))


def _linears(mlp: FeedForward) -> list[nn.Module]:
    names = (mlp.gate_name, mlp.up_name, mlp.down_name)
    return [getattr(mlp.owner, name) for name in names if name is not None]


def _plain(module: nn.Module) -> bool:
    hooked = any(not of_capturing(hook) for hook in module._forward_pre_hooks.values())
    return is_plain_linear(module) and not hooked and cast(Tensor, module.weight).dtype in DTYPES
