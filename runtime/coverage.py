"""What of a model the native step's description accounts for.

The description knows linear layers, norms, rotations, an activation and plain attention. A module that holds anything
else, or whose code is not its class's own, may compute what nobody compared yet: its first step may agree by chance, or
because a parameter is still zero.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..predictors.anatomy import Anatomy, Attention, Experts, FeedForward
from .parts import unwatched_class
from .recurrence_reading import parts_of
from .spec import is_plain_linear

_HERE = str(Path(__file__).parent)
_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
#: without effect when a model is not being trained
INERT = (nn.Identity, nn.Dropout, nn.ModuleList)
_CROSS = ("encoder_attn", "cross_attn", "crossattention", "ln_cross_attn")
_TABLES = ("masked_bias", "embed_positions")
#: one number that multiplies the residual stream: what it is shows in what a layer gives
_SCALARS = ("layer_scalar",)


def uncovered(
    anatomy: Anatomy,
    norms: Sequence[Iterable[nn.Module]] | None = None,
    called: Container[nn.Module] | None = None,
    beside: Container[int] = (),
    more: Sequence[Tensor | None] | None = None,
    idle: Container[int] = (),
) -> str | None:
    """What of the decoder layers the description leaves out or cannot know; None where it accounts for everything.

    norms: by layer, those that are described; None: by the names that many architectures share. called: the modules
    that a pass calls, where that is known. beside: the layers whose MLP stands beside their experts. more: by layer, a
    parameter that is described besides. idle: layers that no pass of text alone calls.
    """
    parts = zip(anatomy.layers, anatomy.feed_forwards, anatomy.experts, anatomy.attentions, strict=True)
    for index, (layer, mlp, experts, attention) in enumerate(parts):
        if index in idle:
            continue
        if attention is None:
            return "a layer's attention was not recognised"
        if mlp is None and experts is None:
            return "a layer has no MLP that was recognised"
        of_layer = [getattr(layer, name, None) for name in _NORMS] if norms is None else norms[index]
        extra = None if more is None else more[index]
        reason = uncovered_part(layer, mlp, experts, attention, of_layer, called, index in beside, extra)
        if reason is not None:
            return reason
    return None


def uncovered_part(
    part: nn.Module,
    mlp: FeedForward | None,
    experts: Experts | None,
    attention: Attention | None,
    norms: Iterable[nn.Module | None],
    called: Container[nn.Module] | None,
    beside: bool = False,
    more: Tensor | None = None,
) -> str | None:
    """What of a decoder layer, or of a module in it, its MLP or experts, its attention and these norms leave out; None
    where they account for everything. The rest: see `uncovered`."""
    if experts is not None and not (experts.whole and (experts.shared is mlp or beside)):
        return "a layer computes something beside its experts"
    owner = None if mlp is None else mlp.owner
    attending = None if attention is None else attention.module
    reason = _foreign_code(part, owner if experts is None else experts.block, experts, attending)
    if reason is None and attending is not None:
        reason = _foreign_attention(attending)
    if reason is not None:
        return reason
    known = set(_described(part, mlp, experts, attention, norms, called))
    idle = set() if called is None else set(_idle(part, called))
    for name, module in part.named_modules():
        if module not in known and module not in idle and not isinstance(module, INERT):
            return f"{name} of its decoder layers, a {type(module).__name__}, is not a part that is described"
        own = [name for name in module._parameters if module is not attending or name != "sinks"]
        if attending is not None and module is attending and parts_of(attending) is not None:
            own = []  # how numbers of a recurrence act shows in a pass
        own = [name for name in own if more is None or module._parameters[name] is not more]
        own += [name for name, value in module._buffers.items() if not _is_table(module, name, value)]
        if own and module in (part, owner, attending) and not _is_of(module, experts):
            return f"its decoder layers have {', '.join(own)} in a {type(module).__name__}"
    return None


def _is_of(module: nn.Module, experts: Experts | None) -> bool:
    """Whether a module is a mixture's own: what else it might do, a copy of it would have shown."""
    return experts is not None and module in set(_beside_shared(experts))


def _idle(layer: nn.Module, called: Container[nn.Module]) -> Iterator[nn.Module]:
    """What a decoder has to attend to an encoder with, and no pass calls that has none."""
    for name, module in layer.named_children():
        if name.startswith(_CROSS) and not any(part in called for part in module.modules()):
            yield from module.modules()


def _is_table(module: nn.Module, name: str, buffer: Tensor | None) -> bool:
    """Whether a buffer is a mask, of positions, or such a number: what is made of these shows in what is given."""
    number = buffer is not None and buffer.numel() == 1 and name in _SCALARS and _reads(module, name)
    return buffer is None or buffer.dtype is torch.bool or name in _TABLES or number


def _reads(module: nn.Module, name: str) -> bool:
    """Whether the forward of a module's class reads an attribute: one that it does not might be anybody's."""
    forward: Any = cast(Any, unwatched_class(type(module))).forward
    return name in getattr(getattr(forward, "__wrapped__", forward), "__code__", _reads.__code__).co_names


def _described(
    layer: nn.Module,
    mlp: FeedForward | None,
    experts: Experts | None,
    attention: Attention | None,
    of_layer: Iterable[nn.Module | None],
    called: Container[nn.Module] | None,
) -> Iterator[nn.Module]:
    """The modules of a layer whose work the native step does; of norms and activations, all that they consist of."""
    yield layer
    of_heads: list[nn.Module] = []
    if attention is not None:
        yield attention.module
        recurrent = parts_of(attention.module)
        yield from () if recurrent is None else recurrent.modules
        yield from (module for module in layer.modules() if attention.module in module.children())
        for name in (*attention.inputs, attention.output):
            yield attention.part(name)
            yield attention.module.get_submodule(name.rpartition(".")[0])
        rotary = getattr(attention.module, "rotary_emb", None)  # its own (Moshi): how it turns shows in the keys
        yield from () if rotary is None else rotary.modules()
        named = list(attention.module.named_children())
        # what others do shows in a pass, if they are called
        seen = [name for name, m in named if called is not None and m in called]
        plain = [name for name, _ in named if name.startswith(("q", "k"))]
        of_heads = [module for name, module in named if "norm" in name and name in (*plain, *seen)]
        if attention.gate is not None and attention.gate in seen:
            yield attention.part(attention.gate)
    if experts is not None:  # what else the block might do, a copy of it would have shown
        yield from _beside_shared(experts)
    acts = []
    if mlp is not None:
        yield from (mlp.owner, mlp.up, mlp.down)
        acts.append(mlp.act)
        if mlp.norm_name is not None:
            acts.append(getattr(mlp.owner, mlp.norm_name))
        if mlp.gate_name is not None:
            yield getattr(mlp.owner, mlp.gate_name)
    for found in (*of_layer, *of_heads, *acts):
        if isinstance(found, nn.Module):
            yield from found.modules()


def _beside_shared(experts: Experts) -> Iterator[nn.Module]:
    """The modules of a mixture's block, but for its shared expert's."""
    shared = set() if experts.shared is None else set(experts.shared.owner.modules())
    return (module for module in experts.block.modules() if module not in shared)


def _foreign_code(
    layer: nn.Module, owner: nn.Module | None, experts: Experts | None, attention: nn.Module | None
) -> str | None:
    probed = set() if experts is None else set(_beside_shared(experts))
    linears = [m for m in layer.modules() if isinstance(m, nn.Linear) and m not in probed]
    linears = [module for module in linears if not is_plain_linear(module)]
    if linears:
        return f"a {type(linears[0]).__name__} computes more than a linear layer"
    shared = None if experts is None or experts.shared is None else experts.shared.owner
    for module in filter(None, (layer, owner, attention, shared, *probed)):
        if not computes_as_its_class(module):
            return f"the forward of a {type(module).__name__} is not its class's own"
    return None


def computes_as_its_class(module: nn.Module) -> bool:
    """Whether nobody has given a module, or its class, another forward."""
    own = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return vars(own)["forward"].__module__ == own.__module__ and _has_own_forward(module)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a module, wrapped by coreskip or not, calls the forward of its class."""
    forward: Any = vars(module).get("forward")
    while forward is not None and _is_ours(forward):
        forward = forward.__wrapped__
    watched: Any = type(module)  # whose forward transformers may have wrapped anew when it was derived
    own = (cast(Any, unwatched_class(watched)).forward, watched.forward)
    return forward is None or any(getattr(forward, "__func__", None) is function for function in own)


def _is_ours(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(_HERE) and hasattr(function, "__wrapped__")


def _foreign_attention(module: nn.Module) -> str | None:
    """Why an attention module's attention function is not one of transformers' own, if it is not."""
    config: Any = getattr(module, "config", None)
    config = getattr(config, "original", config)  # as it is where runtime/attention.py redirects it
    name = getattr(config, "_attn_implementation", None)
    code = sys.modules[type(module).__module__]
    functions: Any = getattr(code, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    function = functions.get(name) if name in functions else getattr(code, "eager_attention_forward", None)
    if function is None:  # the class attends by itself
        return None
    home = cast(str, getattr(function, "__module__", ""))
    if home.partition(".")[0] == "transformers" or home == type(module).__module__:
        return None
    return f"its attention function {name!r} is not one of transformers' own"
