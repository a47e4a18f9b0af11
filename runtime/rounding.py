"""Rounds the linears of a model to 4 or 8 bits one layer after the other, each with compensation for what rounding
loses: see `predictors/compensation.py` for what is done to a matrix.

Only the hidden states of the calibration tokens pass from layer to layer, twice: as the rounded layers before have left
them, and as the original ones would have. A layer's linears are rounded in the order in which it calls them, on inputs
as its rounded ones before give them; linears with the same input are rounded together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..kernels.groups import TILE, tiles_from_groups, ungroup, untile
from ..kernels.memory import allocate
from ..kernels.packed import PackedLinear
from ..predictors.anatomy import Anatomy, dissect, rows_of
from ..predictors.calibration import TokenText, most_positions
from ..predictors.checks import WEIGHT_FORMATS, check_count
from ..predictors.compensation import Compensation, Groups
from ..predictors.errors import CoreskipError
from ..predictors.observe import inference
from .formats import takes_format
from .lower_cpu import HEAD_FORMAT, KERNEL_FORMATS
from .wrap import make_way

TOKENS, WINDOW = 8192, 512
# Share of the error of the layers before that a linear is to make up for. With the first six layers of the embedded
# model rounded, rescaled off its grid: a KL divergence of 0.0110 with none, 0.0106 with half, 0.0106 with the whole.
SHIFT = 0.5

Widths = str | Mapping[str, str]
Hook = Callable[[nn.Module, tuple[Any, ...]], None]


@dataclass(frozen=True, eq=False)
class Rounded:
    """One linear: its name in the model, itself with its own weights, and these in 4 or 8 bits.

    error: what rounding does to each output, the mean square over tokens, float32 ``[rows]``: as measured on the
        calibration tokens, times what they make it seem too small by (`Compensation.optimism`).
    """

    name: str
    module: nn.Module
    packed: PackedLinear
    error: Tensor

    def values(self) -> Tensor:
        """The rounded numbers, float32, in the shape of the module's weight."""
        rows = _values(self.packed)
        return rows.t().contiguous() if isinstance(self.module, Conv1D) else rows


def compensate(
    model: Any,
    text: TokenText | Tensor,
    *,
    widths: Widths = "int4",
    tokens: int = TOKENS,
    window: int = WINDOW,
    progress: bool = True,
) -> Iterator[Rounded]:
    """Every linear of the decoder layers in 4 or 8 bits, in the order in which the model calls them; then the LM head,
    in 8 bits and plainly rounded: there is nothing to compensate.

    While a layer is rounded its own weights are exchanged, and put back before it is returned or an error raised: at
    every moment in which the caller runs, the model is bit for bit what it was. Memory: two hidden states of every
    token, and of one layer the inputs of its linears, float32, and a second copy of its weights.

    Args:
        model: an unwrapped causal LM, of any dtype; computed with in its own.
        text: what calibrates, tokens as `calibration.tokenize` gives them, or int64 ids of any shape.
        widths: "int4" or "int8", or one of them by the name of the linear; linears without one get "int4".
        tokens, window: so many tokens at most, in windows of so many.

    Raises:
        CoreskipError: less than one window of text, unknown names or widths, a wrapped model.
    """
    make_way(model)
    anatomy = dissect(model)
    formats = _formats(model, anatomy, widths)
    return _rounded(model, anatomy, windows_of(model, text, tokens, window), formats, progress)


def windows_of(model: Any, text: TokenText | Tensor, tokens: int, window: int) -> Tensor:
    """At most so many tokens of a text, in windows of so many, int64 ``[windows, window]`` on the model's device."""
    check_count("tokens", tokens)
    check_count("window", window, 2)
    if isinstance(text, Tensor):
        text = TokenText(text.flatten().cpu(), torch.empty(0, dtype=torch.int64, device="cpu"), "token ids")
    length = min(window, most_positions(model, window))
    return text.windows(length, max(1, tokens // length)).to(model.device)


def plainly(model: Any, *, widths: Widths = "int4") -> Iterator[Rounded]:
    """What `compensate` yields, each linear rounded for itself, to the nearest numbers: what it has to be better than.

    The errors are zeros: nothing was calibrated.
    """
    make_way(model)
    names = _names(model)
    for module, fmt in _formats(model, dissect(model), widths).items():
        yield Rounded(names[module], module, *_plain(module, fmt))


@contextmanager
def replaced(found: Sequence[Rounded]) -> Iterator[None]:
    """Inside, the modules compute with the rounded numbers, dequantised to their own dtype; the inputs of the products
    stay as they are, which the kernels round to 8 bits. A head that is tied to the embedding takes that along."""
    with _exchanged({each.module: each.values() for each in found}):
        yield


def _formats(model: Any, anatomy: Anatomy, widths: Widths) -> dict[nn.Module, str]:
    """The format of every linear of the layers in their order, and last that of the head."""
    names, head = _names(model), model.get_output_embeddings()
    linears = [m for layer in anatomy.layers for m in layer.modules() if takes_format(m)]
    by_name = widths if isinstance(widths, Mapping) else {names[module]: widths for module in linears}
    unknown = sorted(set(by_name) - {names[module] for module in linears})
    if unknown:
        raise CoreskipError(f"{unknown[0]!r} is no linear of a decoder layer of this model")
    for width in by_name.values():
        if width not in WEIGHT_FORMATS:
            raise CoreskipError(f"a width is {width!r}; choose from {', '.join(WEIGHT_FORMATS)}")
    found = {module: cast(str, KERNEL_FORMATS[by_name.get(names[module], "int4")]) for module in linears}
    return {**found, head: HEAD_FORMAT}


def _names(model: nn.Module) -> dict[nn.Module, str]:
    return {module: name for name, module in model.named_modules()}


def _rounded(
    model: Any, anatomy: Anatomy, rows: Tensor, formats: dict[nn.Module, str], progress: bool
) -> Iterator[Rounded]:
    names, head = _names(model), model.get_output_embeddings()
    with inference(model):
        states, calls = _entered(anatomy, rows)
    original = list(states)
    bar = tqdm(anatomy.layers, desc="rounding", unit="layer", disable=not progress, leave=False)
    for layer, call in zip(bar, calls, strict=True):
        # not around the yield: the caller would run without gradients
        with inference(model):
            work = _Layer(layer, call, formats)
            found, states, original = work.round(states, original)
        # the order of the module tree, whatever the order of calls
        for module in (m for m in layer.modules() if m in formats):
            packed, error = found[module]
            yield Rounded(names[module], module, packed, error)
    yield Rounded(names[head], head, *_plain(head, formats[head]))


class _Call:
    """What a layer is called with beside the hidden states: masks and positions, the same for windows of one length."""

    def __init__(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._arguments, self._options = arguments, options

    def __call__(self, layer: nn.Module, states: Tensor) -> Tensor:
        out = layer(states, *self._arguments, **self._options)
        return out if isinstance(out, Tensor) else cast(Tensor, out[0])


class _Reached(Exception):
    """Ends a pass where what it was for is known."""


def _entered(anatomy: Anatomy, rows: Tensor) -> tuple[list[Tensor], list[_Call]]:
    """The hidden states that enter the first layer, ``[1, length, hidden]`` per window, and each layer's call."""
    states: list[Tensor] = []
    calls: list[_Call] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        options = dict(options)
        first = arguments[0] if arguments else options.pop("hidden_states")
        if module is anatomy.layers[0]:
            states.append(first)
        if len(calls) < len(anatomy):
            calls.append(_Call(arguments[1:], options))
        elif module is anatomy.layers[0]:
            raise _Reached

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in anatomy.layers]
    try:
        for ids in rows.split(1):
            _until_reached(lambda ids=ids: anatomy.stack(input_ids=ids, use_cache=False))  # type: ignore[misc]
    finally:
        for handle in handles:
            handle.remove()
    return states, calls


def _until_reached(run: Callable[[], object]) -> None:
    with suppress(_Reached):
        run()


@contextmanager
def _before(modules: Sequence[nn.Module], hook: Hook) -> Iterator[None]:
    """`hook` is called before each of the modules; it comes off however the block ends."""
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _exchanged(values: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Inside, modules have these weights, cast to their own dtype; more may be put in by `_put`. Afterwards each has
    its own memory back."""
    own = {module: cast(Any, module).weight.data for module in values}
    try:
        for module, value in values.items():
            cast(Any, module).weight.data = value.to(own[module])
        yield
    finally:
        for module, weight in own.items():
            cast(Any, module).weight.data = weight


class _Layer:
    """One decoder layer while it is rounded."""

    def __init__(self, layer: nn.Module, call: _Call, formats: dict[nn.Module, str]) -> None:
        self._layer, self._call, self._formats = layer, call, formats
        self._linears = [module for module in layer.modules() if module in formats]
        self._found: dict[nn.Module, tuple[PackedLinear, Tensor]] = {}

    def round(
        self, states: list[Tensor], original: list[Tensor]
    ) -> tuple[dict[nn.Module, tuple[PackedLinear, Tensor]], list[Tensor], list[Tensor]]:
        """Packed linears with their errors, and both kinds of hidden states behind the layer."""
        stages = self._stages(states[0])
        inputs: dict[nn.Module, list[Tensor]] = {stage[0]: [] for stage in stages}
        with _before(list(inputs), lambda module, arguments: inputs[module].append(_flat(arguments[0]))):
            original = [self._call(self._layer, x) for x in original]
        with _exchanged({module: cast(Any, module).weight.data for module in self._linears}):
            for stage in stages:
                self._round_stage(stage, states, inputs.pop(stage[0]))
            states = [self._call(self._layer, x) for x in states]
        for module in self._linears:
            if module not in self._found:  # one that the layer does not call
                self._found[module] = _plain(module, self._formats[module])
        return self._found, states, original

    def _stages(self, states: Tensor) -> list[list[nn.Module]]:
        """The layer's linears in the order of their calls, those with the same input together."""
        stages: list[tuple[Tensor, list[nn.Module]]] = []

        def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            for x, stage in stages:
                if x is arguments[0]:
                    stage.append(module)
                    return
            stages.append((arguments[0], [module]))

        with _before(self._linears, note):
            self._call(self._layer, states)
        return [stage for _, stage in stages]

    def _round_stage(self, stage: list[nn.Module], states: list[Tensor], original: list[Tensor]) -> None:
        """Rounds linears with the same input, and puts the rounded numbers in.

        original: the input as the original layers give it, ``[tokens, inputs]`` per window.
        """
        todo = [module for module in stage if not self._keep_exact(module)]
        if not todo:
            return
        gram, cross, tokens = self._moments(stage[0], states, original)
        compensation = Compensation(gram)
        for fmt in dict.fromkeys(self._formats[module] for module in todo):
            modules = [module for module in todo if self._formats[module] == fmt]
            weights = [rows_of(module)[0].float() for module in modules]
            target = torch.cat(weights)
            if SHIFT:
                target = compensation.shifted(target, SHIFT * cross)
            groups = compensation.round(target, fmt)
            off = groups.values(target.shape[1]) - target
            error = ((off @ gram) * off).sum(1) * (compensation.optimism(tokens) / tokens)
            sizes = [len(weight) for weight in weights]
            for module, part, its_error in zip(modules, groups.split(sizes), error.split(sizes), strict=True):
                packed = _packed(part, module, fmt)
                self._found[module] = packed, its_error
                _put(module, packed)

    def _keep_exact(self, module: nn.Module) -> bool:
        """Numbers that are on the grid already stay what they are."""
        weight, _ = rows_of(module)
        # a few rows tell most matrices that are not
        if not _on_grid(weight[:TILE], self._formats[module]) or not _on_grid(weight, self._formats[module]):
            return False
        self._found[module] = _plain(module, self._formats[module])
        return True

    def _moments(self, module: nn.Module, states: list[Tensor], original: list[Tensor]) -> tuple[Tensor, Tensor, int]:
        """X'X and X'(Y - X) for the module's inputs X and original inputs Y, and the number of tokens."""
        seen: list[Tensor] = []

        def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(_flat(arguments[0]))
            raise _Reached

        gram = cross = torch.zeros(())
        tokens = 0
        with _before([module], note):
            for state, y in zip(states, original, strict=True):
                seen.clear()
                _until_reached(lambda state=state: self._call(self._layer, state))  # type: ignore[misc]
                x = seen[0]
                gram = x.t() @ x + gram
                cross = x.t() @ (y - x) + cross
                tokens += len(x)
        return gram, cross, tokens


def _plain(module: nn.Module, fmt: str) -> tuple[PackedLinear, Tensor]:
    """The nearest numbers of this format, and errors of zero."""
    packed = PackedLinear.pack(*rows_of(module), fmt=fmt)
    return packed, torch.zeros(packed.out_features, device=packed.weight.device)


def _on_grid(weight: Tensor, fmt: str) -> bool:
    return torch.equal(_values(PackedLinear.pack(weight, fmt=fmt)), weight.float())


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).float()


def _put(module: nn.Module, packed: PackedLinear) -> None:
    weight, _ = rows_of(module)
    rows = _values(packed).to(weight)
    cast(Any, module).weight.data = rows.t().contiguous() if isinstance(module, Conv1D) else rows


def _packed(groups: Groups, module: nn.Module, fmt: str) -> PackedLinear:
    weight, bias = rows_of(module)
    scale = groups.scale.half()
    tiles = tiles_from_groups(groups.q, scale, groups.least.half() if fmt == "int4" else scale, fmt)
    aligned = allocate(tuple(tiles.shape), tiles.dtype, tiles.device).copy_(tiles)
    bias = None if bias is None else bias.float().clone()
    return PackedLinear(aligned, weight.shape[1], bias=bias, rows=weight.shape[0])


def _values(packed: PackedLinear) -> Tensor:
    """The numbers of a packed linear, float32 ``[rows, inputs]``."""
    return ungroup(*untile(packed)).flatten(1)[:, : packed.in_features].contiguous()
