"""Rounds the linears of a model to 4, 5 or 8 bits one layer after the other, each with compensation for what rounding
loses: see `predictors/compensation.py` for what is done to a matrix.

Only the hidden states of the calibration tokens pass from layer to layer, twice: as the rounded layers before have left
them, and as the original ones would have. A layer's linears are rounded in the order in which it calls them, on inputs
as its rounded ones before give them; linears with the same input are rounded together. The LM head comes last.

Mixed widths take every matrix as it is rounded behind matrices of 4 bits, whatever these become: a model is gone
through once for all mixtures (`alternatives`), and once more for the one that is packed (`round_by`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..kernels.groups import GROUPED, TILE, tile_up, tiles_from_groups, ungroup, untile
from ..kernels.memory import allocate
from ..kernels.packed import PackedLinear, finite
from ..predictors.anatomy import Anatomy, dissect, rows_of
from ..predictors.calibration import TokenText, most_positions
from ..predictors.checks import WIDTHS, check_count
from ..predictors.compensation import Compensation, Groups, nearest_bytes
from ..predictors.errors import CoreskipError
from ..predictors.observe import inference
from ..predictors.rounding_recipe import RoundingRecipe
from .formats import FORMAT_OF, takes_format
from .rounding_kept import Kept
from .wrap import make_way

TOKENS, WINDOW = 8192, 512
# Share of the error of the layers before that a linear in 4 bits is to make up for. With the first six layers of the
# embedded model rounded, rescaled off its grid: a KL divergence of 0.0110 with none, 0.0106 with half, 0.0106 with the
# whole. Of the fine-tuned one, whose layers all lose what they were tuned by, and so err in one direction: 0.089 with
# none, 0.041 with half. None for wider ones, which stand among others that lose as little: a tiny model nearly all in 8
# bits had a divergence of 0.1075 with half, and all in 8 bits 0.006.
SHIFT = 0.5

_ROWS = 8192  # of a matrix that are rounded at once: an LM head would take memory for several more copies of it

Widths = str | Mapping[str, str]
Hook = Callable[[nn.Module, tuple[Any, ...]], None]
#: of a linear, what it became in each of the formats asked for, with its errors
Found = dict[str, tuple[PackedLinear, Tensor]]
#: which formats are asked for; hidden states are those of the first
Formats = Mapping[nn.Module, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Rounded:
    """One linear: its name in the model, itself with its own weights, and these in 4, 5 or 8 bits.

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
    head: str = "int8",
    tokens: int = TOKENS,
    window: int = WINDOW,
    resume: bool = False,
    progress: bool = True,
) -> Iterator[Rounded]:
    """Every linear of the decoder layers in few bits, in the order in which the model calls them; then the LM head.

    While a layer is rounded its own weights are exchanged, and put back before it is returned or an error raised: at
    every moment in which the caller runs, the model is bit for bit what it was. Memory: two hidden states of every
    token, and of one layer the inputs of its linears, float32, and a second copy of its weights.

    Args:
        model: an unwrapped causal LM, of any dtype; computed with in its own.
        text: what calibrates, tokens as `calibration.tokenize` gives them, or int64 ids of any shape.
        widths: "int4", "int5" or "int8", or one of them by the name of the linear; linears without one get "int4".
        head: of the LM head; 8 bits are rounded plainly, for there is nothing to compensate.
        tokens, window: so many tokens at most, in windows of so many.
        resume: keep each layer in the cache folder until all are done: a rounding that is killed goes on there.

    Raises:
        CoreskipError: less than one window of text, unknown names or widths, a wrapped model.
    """
    make_way(model)
    anatomy = dissect(model)
    formats = {module: (fmt,) for module, fmt in _formats(model, anatomy, widths, head).items()}
    rows = windows_of(model, text, tokens, window)
    kept = _kept(model, rows, formats) if resume else None
    return (only for (only,) in _rounded(model, anatomy, rows, formats, progress, kept))


def alternatives(
    model: Any, rows: Tensor, *, resume: bool = False, progress: bool = True
) -> Iterator[dict[str, Rounded]]:
    """Every linear of the layers, and then the LM head, in each of `WIDTHS`, by the width: one pass for all of what may
    be mixed of them. Hidden states are those of 4 bits. rows: as `windows_of` gives them; resume: see `compensate`."""
    make_way(model)
    anatomy = dissect(model)
    each = tuple(FORMAT_OF[width] for width in WIDTHS)
    formats = dict.fromkeys(_formats(model, anatomy, "int4", "int4"), each)
    kept = _kept(model, rows, formats) if resume else None
    for found in _rounded(model, anatomy, rows, formats, progress, kept):
        yield dict(zip(WIDTHS, found, strict=True))


def round_by(model: Any, recipe: RoundingRecipe, *, resume: bool = False, progress: bool = True) -> Iterator[Rounded]:
    """The linears as a recipe has them, and as `alternatives` gave them: the same numbers again. resume: see
    `compensate`.

    Raises:
        CoreskipError: the recipe is of another model.
    """
    make_way(model)
    anatomy, vocabulary = dissect(model), model.get_input_embeddings().weight.shape[0]
    if int(recipe.ids.max()) >= vocabulary:
        raise CoreskipError(f"the plan's rounding has the token {int(recipe.ids.max())}, beyond the model's vocabulary")
    head = model.get_output_embeddings()
    name_of_head = _names(model)[head]
    widths = {name: width for name, width in recipe.widths.items() if name != name_of_head}
    chosen = _formats(model, anatomy, widths, recipe.widths.get(name_of_head, "int8"))
    formats = {module: tuple(dict.fromkeys((FORMAT_OF["int4"], fmt))) for module, fmt in chosen.items()}
    formats[head] = (chosen[head],)  # nothing comes behind it
    rows = recipe.ids.to(model.device, torch.int64)
    kept = _kept(model, rows, formats) if resume else None
    return (found[-1] for found in _rounded(model, anatomy, rows, formats, progress, kept))


def windows_of(model: Any, text: TokenText | Tensor, tokens: int, window: int) -> Tensor:
    """At most so many tokens of a text, in windows of so many, int64 ``[windows, window]`` on the model's device."""
    check_count("tokens", tokens)
    check_count("window", window, 2)
    if isinstance(text, Tensor):
        text = TokenText(text.flatten().cpu(), torch.empty(0, dtype=torch.int64, device="cpu"), "token ids")
    length = min(window, most_positions(model, window))
    return text.windows(length, max(1, tokens // length)).to(model.device)


def plainly(model: Any, *, widths: Widths = "int4", head: str = "int8") -> Iterator[Rounded]:
    """What `compensate` yields, each linear rounded for itself, to the nearest numbers: what it has to be better than.

    The errors are zeros: nothing was calibrated.
    """
    make_way(model)
    names = _names(model)
    for module, fmt in _formats(model, dissect(model), widths, head).items():
        yield Rounded(names[module], module, *_plain(module, fmt))


@contextmanager
def replaced(found: Sequence[Rounded]) -> Iterator[None]:
    """Inside, the modules compute with the rounded numbers, dequantised to their own dtype; the inputs of the products
    stay as they are, which the kernels round to 8 bits. A head that is tied to the embedding takes that along."""
    with _exchanged({each.module: each.values() for each in found}):
        yield


def _formats(model: Any, anatomy: Anatomy, widths: Widths, head: str) -> dict[nn.Module, str]:
    """The format of every linear of the layers in their order, and last that of the head."""
    names = _names(model)
    linears = [m for layer in anatomy.layers for m in layer.modules() if takes_format(m)]
    by_name = widths if isinstance(widths, Mapping) else {names[module]: widths for module in linears}
    unknown = sorted(set(by_name) - {names[module] for module in linears})
    if unknown:
        raise CoreskipError(f"{unknown[0]!r} is no linear of a decoder layer of this model")
    for width in (*by_name.values(), head):
        if width not in WIDTHS:
            raise CoreskipError(f"a width is {width!r}; choose from {', '.join(WIDTHS)}")
    found = {module: FORMAT_OF[by_name.get(names[module], "int4")] for module in linears}
    return {**found, model.get_output_embeddings(): FORMAT_OF[head]}


def _names(model: nn.Module) -> dict[nn.Module, str]:
    return {module: name for name, module in model.named_modules()}


def _kept(model: Any, rows: Tensor, formats: Formats) -> Kept | None:
    if model.device.type != "cpu":
        return None
    names = _names(model)
    text = hashlib.sha256(rows.cpu().numpy().tobytes()).hexdigest()
    return Kept(model, [text, list(rows.shape), {names[m]: fmts for m, fmts in formats.items()}, SHIFT])


def _rounded(
    model: Any, anatomy: Anatomy, rows: Tensor, formats: Formats, progress: bool, kept: Kept | None
) -> Iterator[list[Rounded]]:
    """Of every linear what it became, in the order of its formats."""
    names, head = _names(model), model.get_output_embeddings()
    with inference(model):
        states, calls = _entered(anatomy, rows)
    original = list(states)
    reached = None if kept is None else kept.reached()
    bar = tqdm(anatomy.layers, desc="rounding", unit="layer", disable=not progress, leave=False)
    for index, (layer, call) in enumerate(zip(bar, calls, strict=True)):
        # the order of the module tree, whatever the order of calls
        modules = [m for m in layer.modules() if m in formats]
        if kept is not None and reached is not None and index < reached.layers:
            found = kept.layer(index, modules, formats)
            call.bare, states, original = reached.bare[index], reached.states, reached.original
        else:
            # not around the yield: the caller would run without gradients
            with inference(model):
                found, states, original = _Layer(layer, call, formats).round(states, original)
            if kept is not None:
                kept.add({module: found[module] for module in modules}, call.bare, states, original)
        for module in modules:
            yield _named(names[module], module, found[module])
    with inference(model):
        inputs = partial(_head_inputs, model, anatomy, calls)
        of_head = _round_head(head, formats[head], map(inputs, states), map(inputs, original))
    if kept is not None:
        kept.remove()
    yield _named(names[head], head, of_head)


def _named(name: str, module: nn.Module, found: Found) -> list[Rounded]:
    return [Rounded(name, module, packed, error) for packed, error in found.values()]


def _round_head(head: nn.Module, formats: Sequence[str], inputs: Iterator[Tensor], original: Iterator[Tensor]) -> Found:
    """The LM head: 8 bits lose next to nothing, so that without fewer its inputs are not even asked for."""
    found = {fmt: _plain(head, fmt) for fmt in formats if fmt == FORMAT_OF["int8"]} | _kept_exact(head, formats)
    left = tuple(fmt for fmt in formats if fmt not in found)
    if left:
        found |= _round_together([head], {head: left}, _moments(inputs, original))[head]
    return {fmt: found[fmt] for fmt in formats}


def _head_inputs(model: Any, anatomy: Anatomy, calls: Sequence[_Call], state: Tensor) -> Tensor:
    """Inputs of the LM head, ``[tokens, inputs]``, where the layers end with these hidden states. What lies between, a
    norm at least, is the model's own: it runs with layers that do nothing."""
    seen: list[Tensor] = []

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(_flat(arguments[0]))
        raise _Reached

    def stands_for(layer: nn.Module, call: _Call) -> Callable[..., Any]:
        def forward(*arguments: Any, **options: Any) -> Any:
            given = arguments[0] if arguments else options["hidden_states"]
            out = state if layer is anatomy.layers[-1] else given
            return out if call.bare else (out,)

        return forward

    ids = torch.zeros(state.shape[:2], dtype=torch.int64, device=state.device)
    try:
        for layer, call in zip(anatomy.layers, calls, strict=True):
            cast(Any, layer).forward = stands_for(layer, call)
        with _before([model.get_output_embeddings()], note):
            _until_reached(lambda: model(input_ids=ids, use_cache=False))
    finally:
        for layer in anatomy.layers:
            vars(layer).pop("forward", None)
    return seen[0]


class _Call:
    """What a layer is called with beside the hidden states: masks and positions, the same for windows of one length.

    bare: whether it returns hidden states alone, or a tuple with them; known after a call.
    """

    def __init__(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._arguments, self._options, self.bare = arguments, options, True

    def __call__(self, layer: nn.Module, states: Tensor) -> Tensor:
        out = layer(states, *self._arguments, **self._options)
        self.bare = isinstance(out, Tensor)
        return cast(Tensor, out if self.bare else out[0])


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

    def __init__(self, layer: nn.Module, call: _Call, formats: Formats) -> None:
        self._layer, self._call, self._formats = layer, call, formats
        self._linears = [module for module in layer.modules() if module in formats]
        self._found: dict[nn.Module, Found] = {}

    def round(
        self, states: list[Tensor], original: list[Tensor]
    ) -> tuple[dict[nn.Module, Found], list[Tensor], list[Tensor]]:
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
                self._found[module] = {fmt: _plain(module, fmt) for fmt in self._formats[module]}
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
        exact = {module: _kept_exact(module, self._formats[module]) for module in stage}
        left = {module: tuple(f for f in self._formats[module] if f not in exact[module]) for module in stage}
        todo = [module for module in stage if left[module]]
        rounded: dict[nn.Module, Found] = {}
        if todo:
            inputs = (self._inputs(stage[0], state) for state in states)
            rounded = _round_together(todo, left, _moments(inputs, iter(original)))
        for module in stage:
            found = exact[module] | rounded.get(module, {})
            self._found[module] = {fmt: found[fmt] for fmt in self._formats[module]}
            if module in todo:
                _put(module, found[self._formats[module][0]][0])

    def _inputs(self, module: nn.Module, state: Tensor) -> Tensor:
        """The module's inputs in a window, ``[tokens, inputs]``."""
        seen: list[Tensor] = []

        def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(_flat(arguments[0]))
            raise _Reached

        with _before([module], note):
            _until_reached(lambda: self._call(self._layer, state))
        return seen[0]


@dataclass(frozen=True, eq=False)
class _Moments:
    """X'X and X'(Y - X) of inputs X and original inputs Y, and the number of tokens."""

    gram: Tensor
    cross: Tensor
    tokens: int


def _moments(inputs: Iterator[Tensor], original: Iterator[Tensor]) -> _Moments:
    gram = cross = torch.zeros(())
    tokens = 0
    for x, y in zip(inputs, original, strict=True):
        gram = x.t() @ x + gram
        cross = x.t() @ (y - x) + cross
        tokens += len(x)
    return _Moments(gram, cross, tokens)


def _round_together(modules: Sequence[nn.Module], formats: Formats, moments: _Moments) -> dict[nn.Module, Found]:
    """Linears with the same input, each in its formats."""
    compensation = Compensation(moments.gram)
    found: dict[nn.Module, Found] = {module: {} for module in modules}
    for fmt in dict.fromkeys(fmt for module in modules for fmt in formats[module]):
        some = [module for module in modules if fmt in formats[module]]
        target = torch.cat([rows_of(module)[0].float() for module in some])
        if fmt == FORMAT_OF["int4"]:
            target = compensation.shifted(target, SHIFT * moments.cross)
        pairs = [_round_rows(compensation, moments, rows, fmt) for rows in target.split(_ROWS)]
        groups, error = Groups.joined([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
        sizes = [rows_of(module)[0].shape[0] for module in some]
        for module, part, its_error in zip(some, groups.split(sizes), error.split(sizes), strict=True):
            found[module][fmt] = _packed(part, module, fmt), its_error
    return found


def _round_rows(compensation: Compensation, moments: _Moments, target: Tensor, fmt: str) -> tuple[Groups, Tensor]:
    # 8 bits lose so little that pushing it around gains nothing that can be measured
    groups = nearest_bytes(target) if fmt == FORMAT_OF["int8"] else compensation.round(target, fmt)
    off = groups.values(target.shape[1]) - target
    return groups, ((off @ moments.gram) * off).sum(1) * (compensation.optimism(moments.tokens) / moments.tokens)


def _kept_exact(module: nn.Module, formats: Sequence[str]) -> Found:
    """The module as it is, in formats on whose grid its numbers are already; in all, where that is the first one's."""
    weight, _ = rows_of(module)
    # a few rows tell most matrices that are not
    exact = [fmt for fmt in formats if _on_grid(weight[:TILE], fmt) and _on_grid(weight, fmt)]
    return {fmt: _plain(module, fmt) for fmt in (formats if formats[0] in exact else exact)}


def _plain(module: nn.Module, fmt: str) -> tuple[PackedLinear, Tensor]:
    """The nearest numbers of this format, and errors of zero."""
    packed = _nearest(*rows_of(module), fmt)
    return packed, torch.zeros(packed.out_features, device=packed.weight.device)


def _nearest(weight: Tensor, bias: Tensor | None, fmt: str) -> PackedLinear:
    if fmt in GROUPED:
        return PackedLinear.pack(weight, bias, fmt=fmt)
    if not finite(weight):
        raise CoreskipError("weights with infinities or NaNs have no form of 4 or 8 bits")
    bias = None if bias is None else bias.detach().float().clone()
    return PackedLinear(tile_up(weight.detach(), fmt), weight.shape[1], bias=bias, rows=weight.shape[0])


def _on_grid(weight: Tensor, fmt: str) -> bool:
    return torch.equal(_values(_nearest(weight, None, fmt)), weight.float())


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).float()


def _put(module: nn.Module, packed: PackedLinear) -> None:
    weight, _ = rows_of(module)
    rows = _values(packed).to(weight)
    cast(Any, module).weight.data = rows.t().contiguous() if isinstance(module, Conv1D) else rows


def _packed(groups: Groups, module: nn.Module, fmt: str) -> PackedLinear:
    weight, bias = rows_of(module)
    scale = groups.scale.half()
    tiles = tiles_from_groups(groups.q, scale, groups.least.half() if fmt != FORMAT_OF["int8"] else scale, fmt)
    aligned = allocate(tuple(tiles.shape), tiles.dtype, tiles.device).copy_(tiles)
    bias = None if bias is None else bias.float().clone()
    return PackedLinear(aligned, weight.shape[1], bias=bias, rows=weight.shape[0])


def _values(packed: PackedLinear) -> Tensor:
    """The numbers of a packed linear, float32 ``[rows, inputs]``."""
    return ungroup(*untile(packed)).flatten(1)[:, : packed.in_features].contiguous()
