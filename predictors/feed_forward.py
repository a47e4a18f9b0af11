"""An MLP as coreskip works on it: which linears are its gate, up and down, proved on the model's own module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..kernels.packed import ACTS

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
    """One decoder layer's MLP, by the names under which its owner keeps it."""

    owner: nn.Module
    gate_name: str | None
    up_name: str
    down_name: str
    act_name: str
    stacked: bool
    whole: bool

    @property
    def up(self) -> nn.Module:
        return cast(nn.Module, getattr(self.owner, self.up_name))

    @property
    def down(self) -> nn.Module:
        return cast(nn.Module, getattr(self.owner, self.down_name))

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
        return F.linear(h, w.down.t(), w.down_bias)

    def _of_modules(self, x: Tensor) -> Tensor:
        """The formula by the linears themselves, which hold their matrices packed."""
        h = self.up(x)
        if self.gate_name is not None:
            return cast(Tensor, self.down(self.act(getattr(self.owner, self.gate_name)(x)) * h))
        if self.stacked:
            gate, h = h.chunk(2, -1)
            return cast(Tensor, self.down(self.act(gate) * h))
        return cast(Tensor, self.down(self.act(h)))


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


def readings(layer: nn.Module) -> Iterator[FeedForward]:
    """Every reading of the layer's submodules as an MLP: the caller keeps the one that reproduces the module."""
    for owner in layer.modules():
        linears = {n: m for n, m in owner.named_children() if is_linear(m)}
        acts = [n for n, m in owner.named_children() if n not in linears and not list(m.parameters())]
        acts += [n for n, v in vars(owner).items() if callable(v) and not n.startswith("_") and n != "forward"]
        acts += FUNCTIONS
        for down in linears:
            width, hidden = _shape(linears[down])
            ups = [n for n in linears if n != down and _shape(linears[n])[0] == hidden]
            for act in acts:
                if len(linears) == 3:
                    for gate in ups:
                        for up in ups:
                            if gate != up and _shape(linears[up])[1] == width == _shape(linears[gate])[1]:
                                yield FeedForward(owner, gate, up, down, act, False, True)
                elif len(linears) == 2:
                    for up in ups:
                        if _shape(linears[up])[1] in (width, 2 * width):
                            stacked = _shape(linears[up])[1] == 2 * width
                            yield FeedForward(owner, None, up, down, act, stacked, True)


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
