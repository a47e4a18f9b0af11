"""Which layers matter: LAC's void layers, block influence, the rank of attention maps.

- **Void layers** (L2 adaptive computation; Shemiranifar, "Void in Language Models", 2025; after Shemiranifar and
  Dehghani, ICLR 2023 Tiny Papers), as the authors' code computes them: see `void`. It deletes nothing; it counts.
- **Block influence** (ShortGPT; Men et al. 2024, section 3): 1 - E[cos(x_in, x_out)] of a layer, here also of its
  attention and MLP apart.
- **ARank** (gamma-MoD; Luo et al. 2024, section 3.2): the mean rank of a layer's attention maps over heads and texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from .anatomy import Anatomy, dissect
from .calibration import TokenText, most_positions
from .errors import CoreskipError
from .layer_selection import LayerSelection, Leave
from .observe import inference
from .plan import Plan
from .policies import Adaptive, LayerPolicy, Run, Skip, SkipAttention, SkipMLP
from .token_samples import output_gradients


def void(norms: Sequence[Tensor], alpha: float) -> Tensor:
    """Which layers are void for which tokens.

    Layer l changes the norm of the residual stream by d_l = n_l - n_(l-1), with its sign. It is void where
    d_l < alpha * (max d - min d), over the layers before it: a threshold of 0 for the first two.

    Args:
        norms: fp32 ``[...]`` before the first layer and after each.

    Returns:
        bool ``[layers, ...]``.
    """
    stacked = torch.stack(list(norms))
    change = stacked.diff(dim=0)
    spread = change.cummax(dim=0).values - change.cummin(dim=0).values
    threshold = alpha * torch.cat([torch.zeros_like(spread[:1]), spread[:-1]])
    return change < threshold


@contextmanager
def residuals(anatomy: Anatomy, see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `see(layer, x_in, x_out)` with the residual stream before and after every decoder layer, both
    ``[rows, tokens, hidden]``; the hooks come off however the block ends."""

    def hook(index: int) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            see(index, before, output if isinstance(output, Tensor) else output[0])

        return after

    handles = [layer.register_forward_hook(hook(index), with_kwargs=True) for index, layer in enumerate(anatomy.layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class VoidMaps:
    """LAC's void layers in its two phases. `prompt`, `response`: bool ``[layers, tokens]``, tokens of all texts one
    after another; `alpha`: the threshold's factor."""

    alpha: float
    prompt: Tensor
    response: Tensor

    def shares(self) -> dict[str, list[float]]:
        """Per phase and layer, the share of tokens for which it is void."""
        return {
            "void_prompt": self.prompt.float().mean(1).tolist(),
            "void_response": self.response.float().mean(1).tolist(),
        }


def void_maps(
    model: Any, prompts: Sequence[Tensor], *, alpha: float = 0.8, new_tokens: int = 50, **options: Any
) -> VoidMaps:
    """Run the dense model over `prompts` (token ids ``[1, length]``) and let it answer each with `new_tokens`.

    Prompt processing is one pass per prompt; response generation one per token, each judged by itself. `options` go to
    ``model.generate`` (the authors sample at temperature 0.6 and top-p 0.9; the default here is greedy).

    Raises:
        CoreskipError: no prompt.
    """
    if not prompts:
        raise CoreskipError("void maps need at least one prompt")
    anatomy = dissect(model)
    norms: list[Tensor] = []
    found: dict[bool, list[Tensor]] = {True: [], False: []}

    def see(index: int, before: Tensor, after: Tensor) -> None:
        if index == 0:
            norms[:] = [before.float().norm(dim=-1)]
        norms.append(after.float().norm(dim=-1))
        if index == len(anatomy) - 1:
            found[passes[0] == 0].append(void(norms, alpha)[:, 0].cpu())
            passes[0] += 1

    with inference(model), residuals(anatomy, see):
        for ids in prompts:
            passes = [0]
            model.generate(
                ids.to(model.device),
                attention_mask=torch.ones_like(ids).to(model.device),
                max_new_tokens=new_tokens + 1,  # the first comes from the prompt's pass
                **{"do_sample": False, **options},
            )
    return VoidMaps(alpha, torch.cat(found[True], dim=1), torch.cat(found[False], dim=1))


@dataclass(frozen=True)
class Influence:
    """Block influence of one layer and of its two halves, each in [0, 2]; 0 leaves the residual stream's direction."""

    layer: float
    attention: float
    mlp: float


def block_influence(model: nn.Module, batches: Sequence[Tensor]) -> list[Influence]:
    """Per layer, over token ids ``[rows, length]`` without padding. Half a layer's influence is 1 - E[cos(x, x + y)]
    for its output y added to its layer's input (attention) or taken from its layer's output (MLP), in models that add
    an MLP's output as it is."""
    anatomy = dissect(model)
    sums = torch.zeros(len(anatomy), 3, dtype=torch.float64, device="cpu")
    outputs: dict[int, Tensor] = {}
    tokens = 0

    def see(index: int, before: Tensor, after: Tensor) -> None:
        x, y, mlp = before.float(), after.float(), outputs.pop(index).float().view(before.shape)
        for column, (left, right) in enumerate([(x, y), (x, y - mlp), (y - mlp, y)]):
            sums[index, column] += (1 - torch.cosine_similarity(left, right, dim=-1)).sum(dtype=torch.float64).cpu()

    with inference(model), residuals(anatomy, see), _mlp_outputs(anatomy, outputs):
        for ids in batches:
            anatomy.stack(input_ids=ids.to(cast(Any, model).device), use_cache=False)
            tokens += ids.numel()
    return [Influence(*(row / tokens).tolist()) for row in sums]


@contextmanager
def _mlp_outputs(anatomy: Anatomy, found: dict[int, Tensor]) -> Iterator[None]:
    def keep(index: int) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found[index] = output[0] if isinstance(output, tuple) else output

        return after

    halves = [anatomy.half(index) for index in range(len(anatomy))]
    handles = [half.register_forward_hook(keep(index)) for index, half in enumerate(halves)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def half_losses(model: Any, windows: Tensor, *, seed: int = 0, progress: bool = True) -> Tensor:
    """What leaving out each layer's attention and MLP costs, as far as gradients tell: nats (KL divergence) a token,
    float64 ``[layers, 2]``.

    The argument is `fisher_information`'s, with all that a half adds to the residual stream for the error. On the
    embedded model these choose halves as well as their losses measured one by one do, in an eighth of the time: 3 MLPs
    left out cost +25 % of perplexity, by block influence +59 %; 6 attentions +25 and +54 %. Of whole layers, whose
    changes are far from small, block influence chooses better: 3 of them cost +34 %, by the sums of these losses +64 %.

    Args:
        windows: token ids ``[rows, length]``; one forward and one backward pass each.
        seed: of drawing predictions.
    """
    anatomy = dissect(model)
    modules = [module for index in range(len(anatomy)) for module in _added(anatomy, index)]
    total, tokens = torch.zeros(len(modules), dtype=torch.float64, device="cpu"), 0
    for found in output_gradients(model, windows, modules, seed=seed, progress=progress):
        changes = torch.stack([(output * gradient).sum(-1).cpu() for output, gradient in found]).double()
        total += changes.square().sum(1) / 2
        tokens += changes.shape[1]
    return (total / tokens).view(-1, 2)


def _added(anatomy: Anatomy, index: int) -> tuple[nn.Module, nn.Module]:
    """The modules whose outputs a layer's attention and MLP add to the residual stream."""
    layer, attention = cast(Any, anatomy.layers[index]), anatomy.attentions[index]
    if isinstance(getattr(layer, "post_feedforward_layernorm", None), nn.Module):  # norms come after both (Gemma, OLMo)
        return layer.post_attention_layernorm, layer.post_feedforward_layernorm
    if attention is None:
        raise CoreskipError(f"{anatomy.model_type!r} models have attention that is not known: no losses of layers")
    return getattr(attention.module, attention.output), anatomy.half(index)


_LEFT: dict[Leave, type[Run]] = {"layers": Skip, "attentions": SkipAttention, "mlps": SkipMLP}


def skipped_layers(keep: float, depth: int) -> int:
    """Of `depth` layers, how many are left out where a share `keep` stays: never all."""
    return min(round((1 - keep) * depth), depth - 1)


def skip_policies(leave: Leave, layers: Sequence[int], depth: int) -> list[LayerPolicy]:
    """One policy per layer: these `layers`, or halves of them, are left out."""
    policy = _LEFT[leave]
    return [policy() if index in layers else Run() for index in range(depth)]


def attention_ranks(model: Any, batches: Sequence[Tensor]) -> list[float]:
    """Per layer, the mean numerical rank of the attention maps ``[length, length]`` over heads and rows, as a share of
    the length. A singular value counts from the largest times length times fp32's epsilon on.

    Raises:
        CoreskipError: the model cannot give its attention maps.
    """
    anatomy = dissect(model)
    sums, maps = torch.zeros(len(anatomy), dtype=torch.float64, device="cpu"), 0
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with inference(model):
            for ids in batches:
                output = anatomy.stack(input_ids=ids.to(model.device), use_cache=False, output_attentions=True)
                found = output.attentions
                if not found or any(attention is None for attention in found):
                    raise CoreskipError(f"{anatomy.model_type!r} models do not return attention maps: no ranks")
                for index, attention in enumerate(found):
                    ranks = torch.linalg.matrix_rank(attention.float())
                    sums[index] += (ranks.double() / ids.shape[1]).mean(1).sum().cpu()
                maps += ids.shape[0]
    finally:
        model.set_attn_implementation(before)
    return (sums / maps).tolist()


# --- layer policies for a plan


_FEWEST: dict[str, tuple[type[Run], str]] = {
    "skip": (Skip, "layer"),
    "skip-attention": (SkipAttention, "attention"),
    "skip-mlp": (SkipMLP, "mlp"),
}


def layer_policies(selection: LayerSelection, influence: Sequence[Influence]) -> list[LayerPolicy]:
    """One policy per layer.

    Raises:
        CoreskipError: as `LayerSelection.check`.
    """
    depth = len(influence)
    selection.check(depth)
    if selection.kind == "adaptive":
        return [Adaptive(selection.amount)] * depth
    if selection.kind == "every":
        step = int(selection.amount)
        return [Skip() if index % step == step - 1 else Run() for index in range(depth)]
    policy, half = _FEWEST[selection.kind]
    least = sorted(range(depth), key=lambda index: getattr(influence[index], half))[: int(selection.amount)]
    return [policy() if index in least else Run() for index in range(depth)]


def with_skipped_layers(
    plan: Plan, model: Any, text: TokenText, selection: LayerSelection, *, window: int = 256
) -> Plan:
    """`plan` with the layers of `selection` left out, and what was measured on `text` to choose them in its recipe:
    ``{"measures": {"influence", "void_prompt", "void_response"}}``, one number per layer each. Its quality is not
    measured yet."""
    rows = text.windows(min(window, most_positions(model, window) // 2, len(text.ids)), 8)
    influence = block_influence(model, rows.split(1))
    maps = void_maps(model, rows[:4, : rows.shape[1] // 2].split(1), new_tokens=16)
    layers = tuple(
        replace(layer, layer=_fewer(layer.layer, policy))
        for layer, policy in zip(plan.layers, layer_policies(selection, influence), strict=True)
    )
    measures = {"influence": [each.layer for each in influence], **maps.shares()}
    recipe = {**plan.recipe, "layers": str(selection), "measures": measures}
    return replace(plan, layers=layers, recipe=recipe, quality=None)


def _fewer(one: LayerPolicy, other: LayerPolicy) -> LayerPolicy:
    """What leaves out all that both do, or may do."""
    for policy, rest in ((one, other), (other, one)):
        if policy.by_prompt:
            return policy if rest.attention or rest.mlp else rest
    kinds = {(True, True): Run, (False, True): SkipAttention, (True, False): SkipMLP, (False, False): Skip}
    return kinds[one.attention and other.attention, one.mlp and other.mlp]()
