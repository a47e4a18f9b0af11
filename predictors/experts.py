"""A layer's mixture of experts: its router, its experts' matrices and what stands beside them, found by structure.

transformers keeps the experts of a layer in a few 3-D parameters of one module, whose forward is given the chosen
experts and their weights. How these matrices lie (rows or columns, gates first or in turns with the up rows), what is
computed of gate and up, what the router does and whether a shared expert is added is read from the model, and every
reading is proved: by the experts' own output for random inputs, by what a copy of the block does (routing.py).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .feed_forward import Activation, FeedForward, is_packed
from .routing import Probe, Router, read_router

_TOKENS = 4  # that every reading of the experts is tried with


@dataclass(frozen=True)
class Gating:
    """What an expert's down projection is given: act(gate) * (up + shift), or act(up) where there is no gate.

    alpha: None, or act is gate * sigmoid(alpha * gate). limit: None, or gate counts as at most that, and up as within
    it, before anything else.
    """

    act: Activation
    alpha: float | None = None
    shift: float = 0.0
    limit: float | None = None

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        if gate is None:
            return self.act(up)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        opened = self.act(gate) if self.alpha is None else gate * torch.sigmoid(self.alpha * gate)
        return opened * (up + self.shift if self.shift else up)


@dataclass(frozen=True)
class Layout:
    """How a module keeps the matrices of its experts, by name.

    up: of all up rows, after all gate rows where `stacked`, or each after its gate row where `interleaved`.
    transposed: whether a parameter is ``[experts, inputs, outputs]`` rather than ``[experts, outputs, inputs]``.
    """

    gate: str | None
    up: str
    down: str
    gate_bias: str | None = None
    up_bias: str | None = None
    down_bias: str | None = None
    stacked: bool = False
    interleaved: bool = False
    transposed: bool = False


@dataclass(frozen=True, eq=False)
class Experts:
    """One decoder layer's mixture of experts.

    Attributes:
        block: maps hidden states to the mixture's output: router, experts and shared expert. The experts' own module
            where the decoder layer itself holds them.
        module: has the experts' matrices as 3-D parameters.
        gating: None: what the module itself makes of gate and up (`_apply_gate`).
        router: None: it is not understood, and the block goes on choosing.
        shared: an MLP that every token goes through, whose output is added. shared_gate: a linear with one output, by
            whose sigmoid that is multiplied first.
        scaled_inputs: whether a router's weight multiplies the expert's input, not its output (Llama 4).
        routed_scale, shared_scale: what the block multiplies the experts' output, and the shared expert's, by.
        whole: whether router, experts and shared expert are all that the block computes.
        norm: of the sum of all that, in the block: its output; None: that sum is.
        top_k: experts of a token; 0: not known.
        outputs: how many things the block returns, the mixture's output first; 0: not known.
    """

    block: nn.Module
    module: nn.Module
    layout: Layout
    gating: Gating | None
    router: Router | None = None
    shared: FeedForward | None = None
    shared_gate: nn.Module | None = None
    scaled_inputs: bool = False
    routed_scale: float = 1.0
    shared_scale: float = 1.0
    whole: bool = False
    norm: nn.Module | None = None
    top_k: int = 0
    outputs: int = 0

    @property
    def down(self) -> Tensor:
        return self.parameter(self.layout.down)

    @property
    def count(self) -> int:
        return int(self.down.shape[0])

    @property
    def hidden_size(self) -> int:
        return int(self.down.shape[2 if self.layout.transposed else 1])

    @property
    def intermediate_size(self) -> int:
        """Neurons of one expert."""
        return int(self.down.shape[1 if self.layout.transposed else 2])

    @property
    def gated(self) -> bool:
        return self.layout.stacked or self.layout.interleaved or self.layout.gate is not None

    @property
    def entrance(self) -> nn.Module:
        """The module whose call tells what the experts are given; see `routed`."""
        return self.block if self.scaled_inputs else self.module

    def routed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """From the arguments of a call of `entrance`: inputs ``[tokens, hidden]``, chosen experts and their weights,
        ``[tokens, top_k]``."""
        if self.scaled_inputs:
            assert self.router is not None  # its weights cannot be seen otherwise, and such experts are not read
            x = cast(Tensor, args[0]).reshape(-1, self.hidden_size)
            return x, *self.router.route(x)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        index = next(value for value in given if not value.is_floating_point())
        x, weights = (value for value in given if value.is_floating_point())
        return x, index, weights

    def parameter(self, name: str) -> Tensor:
        return cast(Tensor, getattr(self.module, name)).detach()

    def formula(self, x: Tensor, expert: int) -> Tensor:
        """The output of one expert for x ``[tokens, hidden]``, unweighted."""
        at = self.layout
        if self.gating is None:
            h = cast(Any, self.module)._apply_gate(self._linear(x, at.up, at.up_bias, expert))
        else:
            h = self.gating(*self._gate_and_up(x, expert))
        return self._linear(h, at.down, at.down_bias, expert)

    def opened(self, x: Tensor, expert: int) -> tuple[Tensor, Tensor]:
        """What the neurons of a gated expert make of x ``[tokens, hidden]``: how far their gates are open, and what the
        down projection is given, each ``[tokens, neurons]``."""
        gating, (gate, up) = cast(Gating, self.gating), self._gate_and_up(x, expert)
        return gating(gate, torch.ones_like(up) - gating.shift), gating(gate, up)

    def _gate_and_up(self, x: Tensor, expert: int) -> tuple[Tensor | None, Tensor]:
        at = self.layout
        up = self._linear(x, at.up, at.up_bias, expert)
        if at.stacked:
            gate, up = up.chunk(2, -1)
            return gate, up
        if at.interleaved:
            return up[..., ::2], up[..., 1::2]
        return None if at.gate is None else self._linear(x, at.gate, at.gate_bias, expert), up

    def thinned(self, x: Tensor, index: Tensor, weights: Tensor, least: Tensor) -> tuple[Tensor, int]:
        """`mixture` without neurons whose gate is open by less than their expert's `least` ``[experts]``, and how many
        that were."""
        left_out = 0

        def output(given: Tensor, expert: int) -> Tensor:
            nonlocal left_out
            gates, h = self.opened(given, expert)
            thin = gates.abs() < float(least[expert])
            left_out += int(thin.sum())
            return self._linear(h.masked_fill(thin, 0.0), self.layout.down, self.layout.down_bias, expert)

        return self.summed(x, index, weights, output), left_out

    def mixture(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The sum of the chosen experts' outputs for x ``[tokens, hidden]``, in the dtype of x, added up in float32.

        index: int64 ``[tokens, top_k]``. weights: the same shape; nothing is computed where one is 0.
        """
        return self.summed(x, index, weights, self.formula)

    def summed(self, x: Tensor, index: Tensor, weights: Tensor, output: Callable[[Tensor, int], Tensor]) -> Tensor:
        """`mixture` of what `output` makes of its tokens ``[tokens, hidden]`` and an expert."""
        total = torch.zeros_like(x, dtype=torch.float32)
        for expert in index[weights != 0].unique().tolist():
            token, place = torch.where((index == expert) & (weights != 0))
            factor = weights[token, place, None]
            given = x[token] * factor.to(x.dtype) if self.scaled_inputs else x[token]
            found = output(given, expert).float()
            total.index_add_(0, token, found if self.scaled_inputs else found * factor.float())
        return total.to(x.dtype)

    def _linear(self, x: Tensor, name: str, bias: str | None, expert: int) -> Tensor:
        packed = is_packed(self.module)
        weight = cast(Any, self.module).unpacked(name, expert) if packed else self.parameter(name)[expert]
        offset = None if bias is None else self.parameter(bias)[expert]
        return F.linear(x, weight.t() if self.layout.transposed else weight, offset)


def find_experts(layer: nn.Module, shared: Callable[[nn.Module], FeedForward | None], empty: bool) -> Experts | None:
    """The mixture of experts of a decoder layer; None where it has none, or none that is read.

    shared: finds the MLP in a block, experts apart. empty: the model may be on a meta device, where nothing can be
    computed: how matrices lie is taken from what their module says of itself.
    """
    for parent in layer.modules():
        for module in parent.children():
            if not _matrices(module):
                continue
            said = empty or is_packed(module)  # where there are no numbers, what the module says of itself counts
            found = next((e for e in _readings(module) if (said and e.down.is_meta) or _reproduces(e)), None)
            if found is not None:
                return found if parent is layer else _in_block(parent, found, shared(parent))
    return None


def _matrices(module: nn.Module) -> dict[str, Tensor]:
    """The 3-D parameters of a module that may be experts' matrices; none if it is something else."""
    found: dict[str, Tensor] = {n: p for n, p in module._parameters.items() if p is not None and p.ndim == 3}
    counts = {p.shape[0] for p in found.values()}
    fitting = len(found) in (2, 3) and len(counts) == 1 and all(p.is_floating_point() for p in found.values())
    return found if fitting else {}


# ---- matrices ----


def _readings(module: nn.Module) -> list[Experts]:
    """Every way to read a module's parameters as experts, those first that say what is made of gate and up: the caller
    keeps the first that reproduces its output."""
    alone = len(inspect.signature(module.forward).parameters) == 1  # nothing but inputs, already multiplied
    pairs = [(layout, gating) for layout in _layouts(module) for gating in _gatings(module, layout)]
    found = [Experts(module, module, layout, gating, scaled_inputs=alone) for layout, gating in pairs]
    return sorted(found, key=lambda experts: experts.gating is None)


def _layouts(module: nn.Module) -> Iterator[Layout]:
    found = _matrices(module)
    declared = getattr(module, "is_transposed", None)
    for down in found:
        others = [name for name in found if name != down]
        for transposed in (False, True) if declared is None else (bool(declared),):
            hidden, width = found[down].shape[1:] if not transposed else found[down].shape[1:][::-1]
            shapes = {name: (p.shape[1], p.shape[2]) for name, p in found.items()}
            shapes = {name: shape[::-1] if transposed else shape for name, shape in shapes.items()}
            biases = {name: _bias(module, name) for name in found}
            if len(others) == 2 and all(shapes[name] == (width, hidden) for name in others):
                for gate, up in itertools.permutations(others):
                    yield Layout(gate, up, down, biases[gate], biases[up], biases[down], transposed=transposed)
            elif len(others) == 1 and shapes[others[0]] in ((width, hidden), (2 * width, hidden)):
                up, double = others[0], shapes[others[0]][0] == 2 * width
                for turns in _in_turns(module) if double else (False,):
                    stacked = double and not turns
                    yield Layout(None, up, down, None, biases[up], biases[down], stacked, turns, transposed)


def _in_turns(module: nn.Module) -> tuple[bool, ...]:
    """Whether gate and up rows take turns: what the module says of itself comes first."""
    said = not getattr(module, "is_concatenated", True)
    return said, not said


def _bias(module: nn.Module, name: str) -> str | None:
    """The parameter ``[experts, outputs]`` that is added to what a matrix gives."""
    names = (f"{name}_bias", f"{name.removesuffix('_proj')}_bias", f"{name}_b")
    return next((n for n in names if isinstance(getattr(module, n, None), Tensor)), None)


def _gatings(module: nn.Module, layout: Layout) -> Iterator[Gating | None]:
    own = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "forward"}
    own |= {name: child for name, child in module.named_children() if not list(child.parameters())}
    acts: list[Activation] = [cast(Activation, value) for value in own.values() if callable(value)]
    numbers = {name: float(v) for name, v in own.items() if type(v) in (int, float)}
    limits = [None, *(value for name, value in numbers.items() if "limit" in name)]
    alphas = [value for name, value in numbers.items() if "alpha" in name]
    combine = getattr(module, "_apply_gate", None) if layout.stacked or layout.interleaved else None
    candidates = [Gating(act, limit=limit) for act in (*acts, F.silu) for limit in limits]
    candidates += [Gating(F.silu, alpha, shift, limit) for alpha in alphas for shift in (0.0, 1.0) for limit in limits]
    if combine is None:
        yield from candidates
        return
    # two samples: the second is beyond every limit
    largest = max([3.0, *(2.0 * limit for limit in limits if limit is not None)])
    sample = torch.randn(2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    sample = sample * torch.tensor([[1.0], [largest]], dtype=torch.float32, device="cpu")
    gate, up = (sample[..., ::2], sample[..., 1::2]) if layout.interleaved else sample.chunk(2, -1)
    try:
        wanted = combine(sample)
        yield next((g for g in candidates if torch.allclose(g(gate, up), wanted, rtol=1e-5, atol=1e-6)), None)
    except (RuntimeError, TypeError, ValueError):  # an activation of something else than one tensor, say
        yield None  # gate and up are the module's own affair


def _reproduces(experts: Experts) -> bool:
    """Whether the experts' module computes what they claim, for tokens that go to experts at random."""
    like, generator = experts.down, torch.Generator().manual_seed(0)
    x = torch.randn(_TOKENS, experts.hidden_size, generator=generator, dtype=torch.float32, device="cpu")
    chosen = [torch.randperm(experts.count, generator=generator)[: min(2, experts.count)] for _ in range(_TOKENS)]
    index = torch.stack(chosen).to(like.device)
    weights = torch.rand(index.shape, generator=generator, dtype=torch.float32, device="cpu") + 0.5
    x, weights = x.to(like.device, like.dtype), weights.to(like.device, like.dtype)
    try:
        with torch.no_grad():
            if experts.scaled_inputs:
                expected = experts.module(x.repeat(experts.count, 1))
                got = torch.cat([experts.formula(x, expert) for expert in range(experts.count)])
            else:
                expected = experts.module(x, index, weights)
                got = experts.mixture(x, index, weights)
    except (TypeError, RuntimeError, ValueError, AttributeError, IndexError):
        return False
    if not isinstance(expected, Tensor) or expected.shape != got.shape:
        return False
    error = (expected.float() - got.float()).norm()
    return bool(error <= 1e-2 * expected.float().norm())


# ---- the block around them ----


def _in_block(block: nn.Module, found: Experts, shared: FeedForward | None) -> Experts | None:
    """The experts with what their block does besides: router, shared expert, or that it is not understood. None where
    experts are given their inputs by a router that is not."""
    read: dict[str, Any] = {"block": block, "shared": shared}
    try:
        probe = Probe.of(block, found.module, None if shared is None else shared.owner, found.count, found.hidden_size)
        output = probe.run(probe.samples)
        read |= {"top_k": probe.seen.top_k, "outputs": probe.returned[0]}
        norm, output = _without_norm(block, probe, output)
        gate = _shared_gate(block, probe, output, shared)
        if probe.seen.is_given(probe.samples):
            read |= {"router": read_router(block, probe, found.down.dtype)}
            read |= {} if gate is None else {"shared_gate": gate.module, "whole": True, "norm": norm}
            read |= {} if gate is None else {"routed_scale": gate.routed, "shared_scale": gate.shared}
    except (TypeError, RuntimeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError):
        pass  # a block that wants more than hidden states, or does not hand its experts what others do
    if found.scaled_inputs and read.get("router") is None:
        return None
    return Experts(**{**vars(found), **read})


def _without_norm(block: nn.Module, probe: Probe, output: Tensor) -> tuple[nn.Module | None, Tensor]:
    """A module, maybe a norm, whose output is the block's, and what it was given there; or none, and the output."""
    hidden, given = output.shape[-1], dict[str, Tensor]()
    for name, child in probe.block.named_children():
        if {p.shape for p in child.parameters()} == {(hidden,)}:

            def see(_: nn.Module, args: tuple[Any, ...], gave: Any, name: str = name) -> None:
                if isinstance(gave, Tensor) and torch.equal(gave.reshape(output.shape), output):
                    given[name] = args[0].reshape(output.shape)

            handle = child.register_forward_hook(see)
            probe.run(probe.samples)
            handle.remove()
    found = next(iter(given), None)
    return (None, output) if found is None else (cast(nn.Module, getattr(block, found)), given[found])


@dataclass(frozen=True, eq=False)
class _Gate:
    module: nn.Module | None
    routed: float = 1.0
    shared: float = 1.0


def _shared_gate(block: nn.Module, probe: Probe, output: Tensor, shared: FeedForward | None) -> _Gate | None:
    """By what a shared expert's output is multiplied; None where the block's output is not experts + shared expert."""
    x, routed = probe.samples, probe.seen.output
    rest = output - (routed.sum(0) if probe.seen.scaled_inputs else routed)
    if shared is None:
        return _Gate(None) if torch.allclose(rest, torch.zeros_like(rest), atol=1e-5) else None
    added = 3.0 - x.roll(1, -1)
    if torch.allclose(rest, added, rtol=1e-4, atol=1e-4):
        return _Gate(None)
    found = _scales(routed.sum(0) if probe.seen.scaled_inputs else routed, added, output)
    if found is not None:
        return _Gate(None, *found)
    for name, child in probe.block.named_children():
        one_output = isinstance(child, nn.Linear) and child.weight.shape == (1, x.shape[1])
        if one_output and torch.allclose(rest, torch.sigmoid(child(x)) * added, rtol=1e-4, atol=1e-4):
            return _Gate(cast(nn.Module, getattr(block, name)))
    return None


def _scales(routed: Tensor, shared: Tensor, output: Tensor) -> tuple[float, float] | None:
    """The two numbers by which these are multiplied where their sum is the output, if it is: Cohere takes the mean."""
    parts = torch.stack([routed.flatten(), shared.flatten()], 1).double()
    solved = torch.linalg.lstsq(parts, output.double().flatten()[:, None]).solution
    fits = torch.allclose((parts @ solved)[:, 0], output.double().flatten(), rtol=1e-4, atol=1e-4)
    a, b = (round(value, 6) for value in solved[:, 0].tolist())
    return (a, b) if fits else None
