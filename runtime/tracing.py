"""One pass of a few tokens through a decoder, and what went into its modules and came out of them.

What a model's parts do to each other is read off this: which norm stands where, what is added to what, how heads lie in
a projection. Names differ from family to family; values do not.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..predictors.anatomy import Anatomy
from .calls import NotCovered
from .phases import densely, unprompted
from .recurrent_states import is_recurrent, states_of

TOKENS = 5  # of the pass
_FIRST = 5  # ids before it are often special


@dataclass(eq=False)
class Call:
    """One call of a module: what it was given as its first argument, and gave, each float32 ``[tokens, size]``, or
    ``[heads, tokens, size]`` and the like; None where that is no tensor. outputs: how many things it gave, the tensor
    first; 0: nothing but that."""

    given: Tensor | None
    named: dict[str, Any]
    gave: Tensor | None
    outputs: int = 0

    def made(self, given: Tensor, gave: Tensor) -> bool:
        """Whether this call made the one of the other."""
        return all(x is not None and torch.equal(x, y) for x, y in ((self.given, given), (self.gave, gave)))


@dataclass(eq=False)
class Trace:
    """What happened in a pass.

    Attributes:
        ids: int64 ``[1, tokens]``.
        dtype: the model's.
        calls: by module, in the order in which they were made.
        before: the modules that were called before the first layer.
        keys, values: by layer, as the cache has them, ``[kv_heads, tokens, size]``; ``[0]`` where it has none.
        states: by layer, what a recurrence has left there, ``[channels, count]`` and, if its heads hold any,
            ``[heads, keys, values]``; none where there is no such.
        last: what the decoder gave.
    """

    ids: Tensor
    dtype: torch.dtype
    calls: dict[nn.Module, list[Call]] = field(default_factory=dict)
    before: list[nn.Module] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    states: list[tuple[Tensor, ...]] = field(default_factory=list)
    last: Tensor | None = None

    @property
    def _halves(self) -> bool:
        return self.dtype in (torch.bfloat16, torch.float16)

    def near(self, got: Tensor, expected: Tensor) -> bool:
        """Whether these are the same but for rounding, all in all."""
        most = 2e-2 if self._halves else 1e-3
        return got.shape == expected.shape and bool((got - expected).norm() <= most * expected.norm().clamp_min(1e-9))

    def sums(self, x: Tensor, more: Tensor, total: Tensor) -> bool:
        """Whether `total` is the sum of the others, number by number: a residual stream has a few channels that are
        hundreds of times as large as the rest."""
        error, size = (x + more - total).abs(), x.abs() + more.abs() + total.abs()
        return bool((error <= (2**-6 if self._halves else 1e-5) * size + 1e-9).float().mean() >= 0.99)

    def given(self, module: nn.Module) -> Tensor:
        """What a module's only call was given.

        Raises:
            NotCovered: it was not called, or more than once, or not with a tensor first.
        """
        return self._of(module, self._one(module).given)

    def gave(self, module: nn.Module) -> Tensor:
        """What a module's only call gave; raises as `given` does."""
        return self._of(module, self._one(module).gave)

    def outputs(self, module: nn.Module) -> int:
        """See `Call`; of a module's only call, and raises as `given` does."""
        return self._one(module).outputs

    def named(self, module: nn.Module) -> dict[str, Any]:
        """The named arguments of a module's only call; raises as `given` does."""
        return self._one(module).named

    def _one(self, module: nn.Module) -> Call:
        calls = self.calls.get(module, [])
        if len(calls) != 1:
            raise NotCovered(f"a {type(module).__name__} is called {len(calls)} times in a pass, not once")
        return calls[0]

    @staticmethod
    def _of(module: nn.Module, found: Tensor | None) -> Tensor:
        if found is None:
            raise NotCovered(f"a {type(module).__name__} does not take and give a tensor")
        return found


def trace(model: Any, anatomy: Anatomy, partly: bool = False) -> Trace:
    """Takes a few tokens through the decoder of `model`, densely.

    Raises:
        NotCovered: a pass is not possible so, or, unless `partly`, leaves no keys and values of every layer.
    """
    table = model.get_input_embeddings()
    ids = torch.arange(_FIRST, _FIRST + TOKENS, device=_device(anatomy))[None] % table.num_embeddings
    found, cache = Trace(ids, table.weight.dtype), DynamicCache(config=model.config)
    output = _pass(anatomy, found, input_ids=ids, past_key_values=cache, use_cache=True)
    found.last = _plain(output[0])
    if found.last is None:
        raise NotCovered("its decoder gives no hidden states")
    for layer in cast(Any, cache.layers):
        entries = getattr(layer, "keys", None), getattr(layer, "values", None)
        if all(isinstance(part, Tensor) and part.ndim == 4 for part in entries):
            keys, values = map(_own, cast(Any, entries))
        elif partly:
            keys = values = torch.empty(0, dtype=torch.float32, device="cpu")
        else:
            raise NotCovered("a layer keeps no keys and values in its cache")
        found.keys.append(keys)
        found.values.append(values)
        found.states.append(tuple(map(_own, states_of(layer))) if is_recurrent(layer) else ())
    return found


def _device(anatomy: Anatomy) -> torch.device:
    return next((p.device for p in anatomy.stack.parameters() if not p.is_meta), torch.device("cpu"))


def first_input(anatomy: Anatomy, ids: Tensor, **call: Any) -> Tensor:
    """What the first layer is given in a pass of these tokens, ``[tokens, hidden]``.

    Raises:
        NotCovered: the decoder does not take such a call.
    """
    found = Trace(ids, torch.float32)
    _pass(anatomy, found, input_ids=ids, use_cache=False, **call)
    return found.given(anatomy.layers[0])


def _pass(anatomy: Anatomy, found: Trace, **call: Any) -> Any:
    stack = anatomy.stack
    try:
        with torch.no_grad(), densely(), unprompted(), _watching(anatomy, found):
            return type(stack).forward(stack, **call)  # past what wrap has patched
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        raise NotCovered(f"a pass through its decoder alone fails: {type(error).__name__}") from None


@contextmanager
def _watching(anatomy: Anatomy, found: Trace) -> Iterator[None]:
    """Notes every call of a module inside, by this thread."""
    mine = threading.get_ident()

    def enter(module: nn.Module, args: Any, named: Any) -> None:
        if threading.get_ident() != mine:
            return
        given = args[0] if args else next(iter(named.values()), None)
        call = Call(_plain(named.get("hidden_states", given)), dict(named), None)
        if not found.calls.keys() & set(anatomy.layers[:1]):
            found.before.append(module)
        found.calls.setdefault(module, []).append(call)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == mine and module in found.calls:
            several = isinstance(output, (tuple, list)) and len(output) > 0
            call = found.calls[module][-1]
            call.gave, call.outputs = _plain(output[0] if several else output), len(output) if several else 0

    modules = [module for module in anatomy.stack.modules() if module is not anatomy.stack]
    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in modules]
    handles += [module.register_forward_hook(leave) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _plain(value: Any) -> Tensor | None:
    """A copy, for modules may write into what they are given."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    return _own(value) if value.ndim > 1 and value.shape[0] == 1 else value.detach().float().clone()


def _own(value: Tensor) -> Tensor:
    return value[0].detach().float().clone()
