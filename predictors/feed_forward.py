"""An MLP as coreskip works on it: which linears are its gate, up and down, proved on the model's own module."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..kernels.packed import ACTS, Curve

Activation = Callable[[Tensor], Tensor]

#: activations that an MLP's own code may call without having them as a part, by what stands for their name then
FUNCTIONS: dict[str, Activation] = {"F.silu": F.silu, "F.relu": F.relu}  # others are too close to one another


@dataclass(frozen=True)
class Matrices:
    """Views of one MLP's weights, one row per neuron: gate, up, down ``[intermediate, hidden]``; gate is None
    in a plain MLP. Biases: gate and up ``[intermediate]``, down ``[hidden]``, or None."""

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None


@dataclass(frozen=True, eq=False)
class FeedForward:
    """One decoder layer's MLP, by the names under which its owner keeps it.

    norm_name: of a norm over all activations, before the down projection: such an MLP needs every neuron.
    """

    owner: nn.Module
    gate_name: str | None
    up_name: str
    down_name: str
    act_name: str
    stacked: bool
    whole: bool
    norm_name: str | None = None

    @property
    def up(self) -> nn.Module:
        return cast(nn.Module, getattr(self.owner, self.up_name))

    @property
    def down(self) -> nn.Module:
        return cast(nn.Module, getattr(self.owner, self.down_name))

    @property
    def pre_activation(self) -> nn.Module:
        """The linear whose output, or its first half where gate and up are stacked, the activation is given."""
        return self.up if self.gate_name is None else cast(nn.Module, getattr(self.owner, self.gate_name))

    @property
    def act(self) -> Activation:
        written_out = FUNCTIONS.get(self.act_name)
        return written_out or cast(Activation, getattr(self.owner, self.act_name))

    @property
    def gated(self) -> bool:
        return self.stacked or self.gate_name is not None

    @property
    def hidden_size(self) -> int:
        return _shape(self.down)[1]

    @property
    def intermediate_size(self) -> int:
        return _shape(self.down)[0]

    def matrices(self) -> Matrices:
        """The weights as they are now, as views: nothing is copied."""
        up, up_bias = rows_of(self.up)
        down, down_bias = rows_of(self.down)
        gate: Tensor | None = None
        gate_bias: Tensor | None = None
        if self.gate_name is not None:
            gate, gate_bias = rows_of(getattr(self.owner, self.gate_name))
        elif self.stacked:
            gate, up = up.chunk(2)
            if up_bias is not None:
                gate_bias, up_bias = up_bias.chunk(2)
        return Matrices(gate, up, down.t(), gate_bias, up_bias, down_bias)

    def formula(self, x: Tensor) -> Tensor:
        """``down(act(gate(x)) * up(x))`` for x ``[..., hidden]``: what the table claims this MLP computes."""
        if is_packed(self.up):
            return self._of_modules(x)
        w = self.matrices()
        h = F.linear(x, w.up, w.up_bias)
        h = self.act(h) if w.gate is None else self.act(F.linear(x, w.gate, w.gate_bias)) * h
        return F.linear(self._normed(h), w.down.t(), w.down_bias)

    def _of_modules(self, x: Tensor) -> Tensor:
        """The formula by the linears themselves, which hold their matrices packed."""
        h = self.up(x)
        if self.gate_name is not None:
            return cast(Tensor, self.down(self._normed(self.act(getattr(self.owner, self.gate_name)(x)) * h)))
        if self.stacked:
            gate, h = h.chunk(2, -1)
            return cast(Tensor, self.down(self._normed(self.act(gate) * h)))
        return cast(Tensor, self.down(self._normed(self.act(h))))

    def _normed(self, h: Tensor) -> Tensor:
        return h if self.norm_name is None else cast(Tensor, getattr(self.owner, self.norm_name)(h))


def canonical_activation(act: Activation) -> str | Activation:
    """The name of an activation as the kernels know it, found by comparing values; itself if none matches.

    Comparing values rather than classes is what lets BLOOM's, GPT-2's and PyTorch's tanh-GELU, three classes
    with the same curve, share one kernel.
    """
    x = torch.linspace(-8.0, 8.0, 257, dtype=torch.float32, device="cpu")
    try:
        y = act(x)
    except Exception:  # an activation with needs of its own (parameters on a GPU, say) stays a callable
        return act
    for name, reference in ACTS.items():
        if isinstance(y, Tensor) and torch.allclose(y, reference(x), rtol=1e-5, atol=1e-6):
            return name
    return act


def curve_of(act: Activation) -> Curve | None:
    """An activation as a curve of four numbers, found by comparing values; None where it is none."""
    x = torch.linspace(-8.0, 8.0, 257, dtype=torch.float32, device="cpu")
    try:
        y = act(x).detach()
    except Exception:  # see above
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    above, below = x > 0, x < 0
    numbers = [
        torch.linalg.lstsq(torch.stack(basis, 1).double(), y[side].double()[:, None]).solution[:, 0]
        for side, basis in ((above, (x[above].square(), x[above])), (below, (torch.expm1(x[below]), x[below])))
    ]
    found = Curve(torch.cat(numbers).float())
    return found if torch.allclose(found(x), y, rtol=1e-5, atol=2e-6) else None


def readings(layer: nn.Module) -> Iterator[FeedForward]:
    """Every reading of the layer's submodules as an MLP: the caller keeps the one that reproduces the module."""
    for owner in layer.modules():
        linears = {n: m for n, m in owner.named_children() if is_linear(m)}
        acts = _acts(owner)
        acts += [n for n, v in vars(owner).items() if callable(v) and not n.startswith("_") and n != "forward"]
        acts += FUNCTIONS
        for down in linears:
            width, hidden = _shape(linears[down])
            ups = [n for n in linears if n != down and _shape(linears[n])[0] == hidden]
            for act, norm in itertools.product(acts, (None, *_norms(owner, width))):
                if len(linears) == 3:
                    for gate in ups:
                        for up in ups:
                            if gate != up and _shape(linears[up])[1] == width == _shape(linears[gate])[1]:
                                yield FeedForward(owner, gate, up, down, act, False, True, norm)
                elif len(linears) == 2:
                    for up in ups:
                        if _shape(linears[up])[1] in (width, 2 * width):
                            stacked = _shape(linears[up])[1] == 2 * width
                            yield FeedForward(owner, None, up, down, act, stacked, True, norm)


def _acts(owner: nn.Module) -> list[str]:
    """The children that may be activations: with a learned number or two at most (xIELU)."""
    children = ((name, child) for name, child in owner.named_children() if not is_linear(child))
    return [name for name, child in children if all(p.numel() == 1 for p in child.parameters())]


def _norms(owner: nn.Module, width: int) -> list[str]:
    return [n for n, m in owner.named_children() if [tuple(p.shape) for p in m.parameters()] == [(width,)]]


def written_out(stack: nn.Module, layers: Sequence[nn.Module]) -> list[FeedForward | None]:
    """By layer, a plain MLP that has no module of its own (BioGPT), or one that does more (MPT): two linears between
    which a pass of the whole stack has nothing but an activation."""
    found = [list(_plain_readings(layer)) for layer in layers]
    parts = {part for mlps in found for mlp in mlps for part in (mlp.up, mlp.down, cast(nn.Module, mlp.act))}
    given, gave = dict[nn.Module, Any](), dict[nn.Module, Any]()

    def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given[module], gave[module] = args[0] if args else None, output

    was_training = stack.training
    handles = [part.register_forward_hook(see) for part in parts]
    try:
        stack.eval()
        with torch.no_grad():
            stack(input_ids=torch.arange(4, device=next(stack.parameters()).device)[None], use_cache=False)
    except (TypeError, RuntimeError, ValueError, NotImplementedError):
        return [None] * len(layers)
    finally:
        stack.train(was_training)
        for handle in handles:
            handle.remove()

    def follows(mlp: FeedForward) -> bool:
        act = cast(nn.Module, mlp.act)
        if not all(isinstance(x, Tensor) for x in (gave.get(mlp.up), given.get(act), given.get(mlp.down))):
            return False
        return torch.equal(gave[mlp.up], given[act]) and torch.equal(gave[act], given[mlp.down])

    return [next(filter(follows, mlps), None) for mlps in found]


def _plain_readings(layer: nn.Module) -> Iterator[FeedForward]:
    for owner in layer.modules():
        linears = {n: m for n, m in owner.named_children() if is_linear(m)}
        for up, down, act in itertools.product(linears, linears, _acts(owner)):
            if _shape(linears[up]) == _shape(linears[down])[::-1] and up != down:
                yield FeedForward(owner, None, up, down, act, False, False)


def proved(mlp: FeedForward, empty: bool) -> bool:
    """Whether an MLP computes what its names claim; `empty`: or has no weights to compute with."""
    weight = getattr(mlp.up, "weight", None)
    return (empty and isinstance(weight, Tensor) and weight.is_meta) or _reproduces(mlp)


def _reproduces(mlp: FeedForward) -> bool:
    weight = cast(Tensor, mlp.up.weight)
    device = torch.device("cpu") if is_packed(mlp.up) else weight.device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, mlp.hidden_size, generator=generator, dtype=torch.float32, device="cpu")
    x = x.to(device, weight.dtype)
    was_training = mlp.owner.training
    mlp.owner.eval()  # an MLP with dropout inside would differ from run to run
    try:
        with torch.no_grad():
            expected = mlp.owner(x)
            got = mlp.formula(x)
    except (TypeError, RuntimeError, ValueError, AttributeError):
        return False  # not an MLP of this form: the caller says what that means
    finally:
        mlp.owner.train(was_training)
    if not isinstance(expected, Tensor) or expected.shape != got.shape:
        return False
    error = (expected.float() - got.float()).norm()
    return bool(error <= 1e-2 * expected.float().norm())


def is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, (nn.Linear, Conv1D)) and isinstance(weight, Tensor) and weight.ndim == 2


def rows_of(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight of an nn.Linear or a Conv1D as ``[outputs, inputs]``, and its bias or None, as views; of a linear that
    holds its weight packed, a copy."""
    bias = cast("Tensor | None", linear.bias)
    weight = cast(Any, linear).unpacked() if is_packed(linear) else cast(Tensor, linear.weight).detach()
    return (weight.t() if isinstance(linear, Conv1D) else weight), (None if bias is None else bias.detach())


def is_packed(linear: nn.Module) -> bool:
    """Whether a linear holds its weight in packed form alone (runtime/packed_layer.py): `weight` has no numbers."""
    return hasattr(linear, "unpacked")


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of an nn.Linear or a Conv1D."""
    inputs, outputs = _shape(linear)
    return outputs, inputs


def _shape(linear: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of an nn.Linear or a Conv1D, which stores its weight transposed."""
    rows, columns = cast(Tensor, linear.weight).shape
    return (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)
