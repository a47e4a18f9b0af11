"""A plan on a model's own modules: decode steps of its patched linears, MLPs and decoder stack.

Only the ``forward`` of instances changes. It runs whatever no faster lowering covers (a hook, a static cache, another
architecture), and a GPU's captured steps record it.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..kernels.experts import Expert
from ..kernels.ops import MAX_ROWS, PackedLinear, available
from ..kernels.packed import DTYPES
from ..predictors.anatomy import Activation, Anatomy, Experts, FeedForward, shape_of
from ..predictors.errors import CoreskipError
from ..predictors.policies import Chooser
from ..predictors.routing import Router
from .bundles import FewerNeurons
from .formats import Formats, routing_modules, takes_format
from .linear_names import linear_of
from .packed_experts import HeldExperts, can_be_held, few_rows, few_tokens
from .packed_layer import PackedLayer
from .patches import Patches, Usage
from .phases import Pass, Phase, current_pass, current_prompt, last_pass, mode, passing, tokens_in
from .prepared import Prepared
from .program import BrickProgram, Program
from .program_experts import ExpertsProgram
from .release import Replaced
from .selections import Observed, Selections, attach, selections_of
from .spec import is_plain_linear
from .unpacking import streamed
from .width import product

logger = logging.getLogger("coreskip")


class Host(Protocol):
    """A wrapped model, as its patched modules need it."""

    model: nn.Module
    anatomy: Anatomy
    program: Program
    patches: Patches
    usage: Usage
    formats: Formats
    replaced: Replaced | None
    prepared: Prepared
    observed: dict[int, Observed]
    altered: frozenset[int]

    @property
    def verifies(self) -> bool: ...

    def notice(self, every_setting: bool = False) -> str | None: ...

    def noticed_in_pass(self) -> None: ...

    def new_selections(self, rows: int) -> Selections | None: ...


class ModulePatches:
    """Puts a plan into the modules of one wrapped model."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._sparse = host.program.chosen_by(Chooser.CALIBRATION, Chooser.PROMPT, Chooser.TOKEN)

    def patch_stack(self, stack: nn.Module) -> None:
        """Every pass through the decoder stack is told from the others: prefill, decode, verification."""
        host, original = self._host, stack.forward
        signature = inspect.signature(original)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            host.notice()
            step = None
            if not host.model.training:
                # positional arguments are rare (a caller of the bare decoder stack) and cost a binding
                step = self.begin(signature.bind_partial(*args, **kwargs).arguments if args else kwargs)
            with passing(step):
                output = original(*args, **kwargs)
            host.noticed_in_pass()
            if step is None:
                return output
            if step.phase is not Phase.PREFILL:
                (mode().tally or host.usage.add)(step)
            elif step.selections is not None:
                cache = getattr(output, "past_key_values", None)  # made inside the pass where none was given
                if isinstance(cache, Cache):
                    attach(cache, step.selections)
            return output

        host.patches.set(stack, "forward", forward)

    def patch_linears(self) -> bool:
        """Decode steps run every linear of the decoder layers, but for routers, and the LM head, on the decode kernel.
        Returns whether that is all of their matrices."""
        host = self._host
        if available("cpu") is not None and not host.formats.of_gpu:
            return False
        choose = routing_modules(host.anatomy)
        inner = [m for layer in host.anatomy.layers for m in layer.modules() if _has_matrix(m) and m not in choose]
        patched = [self._patch_linear(module) for module in inner]
        return self._patch_linear(cast(Any, host.model).get_output_embeddings()) and all(patched) and not choose

    def patch_inputs(self) -> None:
        """Decode steps leave small inputs of linears out, where the plan says so."""
        for index, brick in self._host.program.chosen_by(Chooser.INPUTS).items():
            for name, threshold in brick.thresholds.items():
                module, in_mlp = linear_of(self._host.anatomy, index, name)
                self._patch_inputs(index, brick, module, threshold, in_mlp)

    def patch_mlps(self) -> None:
        """Decode steps compute the MLPs' neurons that the plan or the prompt chose; prefill observes them."""
        for index in sorted({*self._sparse, *self._host.observed}):
            layer = self._host.anatomy.mlp(index)
            if index in self._host.observed:
                self._patch_observer(index, layer.down)
            if index in self._sparse:
                self._patch_mlp(index, layer)

    # --- linears

    def _patch_linear(self, module: nn.Module) -> bool:
        """Few rows go to the decode kernel, which reads the module's own weight in place; others to the module, or to
        what has replaced its weight. Under a plan with a weight format, prompts and decode steps read that."""
        host = self._host
        replaced, shareable = host.replaced, isinstance(module, nn.Linear) and _shareable(module.weight)
        packed = isinstance(module, PackedLayer)
        sharing = packed or shareable or (replaced is not None and module in replaced.candidates)
        formats = host.formats if host.program.weights is not None and takes_format(module) else None
        if not sharing and formats is None:
            return False
        original, most = cast(Any, module).forward, MAX_ROWS * shape_of(module)[1]
        is_head, of_class = module is cast(Any, host.model).get_output_embeddings(), "forward" not in vars(module)

        @functools.wraps(original)
        def forward(input: Tensor) -> Tensor:
            # the head runs after the stack's pass is over
            step, plain = last_pass() if is_head else current_pass(), is_plain_linear(module)
            decodes = step is not None and step.phase is not Phase.PREFILL
            wanted = not host.model.training if is_head else decodes
            wanted = wanted and plain and not _computes_otherwise(input)
            few = input.numel() <= most
            in_format = formats is not None and plain and formats.apply(step, host.verifies)
            if replaced is not None and module in replaced:
                # in prefill, too, the head sees one token of each sequence
                each = not is_head or few or input.shape[-2] == 1
                return replaced.product(module, input) if in_format else replaced.run(module, input, wanted and each)
            found = host.formats.product(module, input) if in_format else None
            if found is not None:
                return found
            if isinstance(module, PackedLayer) and plain:
                each = not is_head or few or input.shape[-2] == 1
                return module.multiply(input, wanted and each)
            if not (few and wanted and shareable and module.weight.dtype in DTYPES):
                far = streamed(input, *_plain(module)) if plain and shareable else None
                if far is not None:
                    return far
                # somebody may have given it another class meanwhile
                return cast(Tensor, cast(Any, type(module)).forward(module, input) if of_class else original(input))
            return product(input, [host.prepared.linear(module)])

        host.patches.set(module, "forward", forward)
        return sharing

    def _patch_inputs(self, index: int, brick: BrickProgram, module: nn.Module, threshold: float, in_mlp: bool) -> None:
        """Decode steps leave out this linear's small inputs."""
        host, original = self._host, cast(Any, module).forward
        outputs, inputs = shape_of(module)
        layer = host.anatomy.mlp(index)
        # a neuron's worth of weights: what an unread column adds to the neurons skipped
        column = outputs / ((3 if layer.gated else 2) * layer.hidden_size) if in_mlp else 0.0

        @functools.wraps(original)
        def forward(input: Tensor) -> Tensor:
            step = current_pass()
            plain = is_plain_linear(module)
            if step is None or step.phase is not Phase.DECODE or torch.is_grad_enabled() or not plain:
                return cast(Tensor, original(input))
            sparse = host.prepared.sparse_linear(module, threshold, brick.by_norm)
            rows = input.numel() // inputs
            kept = sparse.kept(input) if host.usage.counting and column else brick.share * inputs * rows
            step.skipped += (inputs * rows - kept) * column
            return sparse.run(input)

        host.patches.set(module, "forward", forward)

    # --- MLPs

    def _patch_mlp(self, index: int, layer: FeedForward) -> None:
        target = layer.owner if layer.whole else layer.up
        original = target.forward

        @functools.wraps(original)
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            step = current_pass()
            if step is not None and step.phase is Phase.DECODE:
                y = self._decode(index, step, x)
                if y is not None:
                    step.bypass = not layer.whole
                    return _without_gradients(y, layer) if torch.is_grad_enabled() else y
            return original(x, *args, **kwargs)

        self._host.patches.set(target, "forward", forward)
        if not layer.whole:
            self.patch_passthrough(layer)

    def _decode(self, index: int, step: Pass, x: Tensor) -> Tensor | None:
        """The sparse MLP's output for x ``[rows, length, hidden]`` or flattened; None: run dense."""
        host, brick = self._host, self._sparse[index]
        if index in host.altered:
            return None
        if brick.chooser is Chooser.PROMPT:
            selected = None if step.selections is None else host.prepared.selected(step.selections)
            if selected is None or index not in selected.mlps:  # which no prompt went through
                return None
            sparse: FewerNeurons = selected.mlps[index]
        else:
            sparse = host.prepared.mlp(index)
        tokens = step.rows * step.length
        y, kept = sparse.run(x, host.usage.counting)
        step.skipped += brick.width * tokens - (brick.kept * tokens if kept is None else kept)
        return y

    def _patch_observer(self, index: int, down: nn.Module) -> None:
        original = down.forward

        @functools.wraps(original)
        def forward(a: Tensor) -> Any:
            step = current_pass()
            if step is not None and step.phase is Phase.PREFILL and step.selections is not None:
                step.selections.observe(index, a, step.valid)
            return original(a)

        self._host.patches.set(down, "forward", forward)

    def patch_passthrough(self, layer: FeedForward) -> None:
        """Where the MLP has no module of its own (OPT) or one that does more (BLOOM), the up projection returns the
        whole MLP's output, which activation and down projection then let pass."""
        act, down = cast(Any, layer.act), layer.down
        original_act: Activation = act.forward if isinstance(act, nn.Module) else act
        original_down = down.forward

        @functools.wraps(original_act)
        def activation(x: Tensor) -> Any:
            step = current_pass()
            return x if step is not None and step.bypass else original_act(x)

        @functools.wraps(original_down)
        def down_forward(x: Tensor) -> Any:
            step = current_pass()
            if step is not None and step.bypass:
                step.bypass = False
                return x
            return original_down(x)

        patches = self._host.patches
        if isinstance(act, nn.Module):
            patches.set(act, "forward", activation)
        else:
            patches.set(layer.owner, layer.act_name, activation)
        patches.set(down, "forward", down_forward)

    # --- experts

    def patch_experts(self) -> None:
        """Decode steps compute the experts that the plan leaves of those that the router chose, and with the numbers of
        packed matrices where there are any."""
        host = self._host
        for index, experts in enumerate(host.anatomy.experts):
            program = host.program.chosen_experts.get(index)
            packed = experts is not None and (host.program.weights or isinstance(experts.module, HeldExperts))
            if experts is not None and (program is not None or (packed and can_be_held(experts))):
                self._patch_experts(index, experts, program)

    def _patch_experts(self, layer: int, experts: Experts, program: ExpertsProgram | None) -> None:
        module = experts.module
        original, packs = module.forward, available("cpu") is None and can_be_held(experts)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            step = current_pass()
            if step is None or step.phase is Phase.PREFILL or torch.is_grad_enabled():
                if program is not None and program.by_prompt is not None and step is not None and step.selections:
                    _, index, weights = experts.routed(args, kwargs)
                    step.selections.observe_experts(layer, index, weights, experts.count, step.valid)
                return original(*args, **kwargs)
            decides = program is not None and step.phase is Phase.DECODE
            packed = self._experts_as_packed(experts, step) if packs else []
            if not (decides or packed):
                return original(*args, **kwargs)
            if experts.scaled_inputs:  # plans leave none of these out
                return few_rows(experts, packed, args[0])
            x, index, weights = experts.routed(args, kwargs)
            if decides:
                index, weights = self._left_experts(layer, experts, cast(Any, program), x, index, weights, step)
            if decides and program is not None and program.least is not None:
                y, left_out = experts.thinned(x, index, weights, program.least)
                step.skipped += left_out
                return y
            return few_tokens(experts, packed, x, index, weights) if packed else experts.mixture(x, index, weights)

        self._host.patches.set(module, "forward", forward)

    @staticmethod
    def _left_experts(
        layer: int, experts: Experts, program: ExpertsProgram, x: Tensor, index: Tensor, given: Tensor, step: Pass
    ) -> tuple[Tensor, Tensor]:
        """What a plan leaves of a router's choice."""
        allowed = program.allowed
        if program.by_prompt is not None and step.selections is not None:
            rows = step.selections.allowed_experts(layer)
            allowed = None if rows is None else rows.repeat_interleave(step.length, 0)
        if allowed is not None:
            index, given = cast(Router, experts.router).route(x, allowed.to(x.device))
        weights = program.weights(given)
        step.skipped += program.width * int((weights == 0).sum())
        return index, weights

    def _experts_as_packed(self, experts: Experts, step: Pass) -> list[Expert]:
        """A mixture's matrices as a pass that is no prefill reads them; none where these are the module's own."""
        formats, module = self._host.formats, experts.module
        if self._host.program.weights is not None and formats.apply(step, self._host.verifies):
            return formats.experts(experts)
        return module.experts() if isinstance(module, HeldExperts) else []

    # --- passes

    def begin(self, named: dict[str, Any]) -> Pass:
        """Tell prefill from decode, and find or make the sequences' selections."""
        host = self._host
        cache = named.get("past_key_values")
        if not isinstance(cache, Cache):
            cache = None
        ids = named.get("input_ids")
        shape = (ids if ids is not None else named["inputs_embeds"]).shape
        rows, length = int(shape[0]), int(shape[1])
        selections = selections_of(cache, host)
        prompt = current_prompt()
        if selections is not None and selections.rows != rows:
            logger.warning("the KV cache was cut to %d rows by hand: its neuron selections are dropped", rows)
            selections = None
        if prompt is None and cache is not None and (selections is not None or tokens_in(cache) > 0):
            if selections is None and host.observed:
                logger.debug("nothing was selected for this KV cache: layers that choose from the prompt run dense")
            verifying = mode().densely or (host.verifies and not mode().drafting)
            return Pass(Phase.VERIFY if verifying else Phase.DECODE, rows, length, None, selections)
        past = 0 if cache is None else tokens_in(cache)
        if selections is None or past == 0:
            selections = host.new_selections(rows)
            if past and selections is not None:
                logger.debug("%d tokens of this KV cache came before wrap: only the new ones choose neurons", past)
        if selections is None:
            return Pass(Phase.PREFILL, rows, length, None, None, cached=cache is not None)
        mask = named.get("attention_mask")
        if not (isinstance(mask, Tensor) and mask.ndim == 2):
            mask = None if prompt is None else prompt.attention_mask
        return Pass(Phase.PREFILL, rows, length, _valid(mask, past, length), selections, cached=cache is not None)


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


def _plain(module: Any) -> tuple[Tensor, Tensor | None]:
    return module.weight, module.bias


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
