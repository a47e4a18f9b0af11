"""What single tokens do to the linears of a model: samples of their inputs, and what an error at an MLP's output costs.

Methods that choose token by token are calibrated on these: thresholds are quantiles of the samples themselves, not of
a distribution fitted to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .anatomy import Anatomy, dissect
from .observe import inference

MOST_BYTES = 1 << 30  # of samples; fewer tokens are kept of larger models
_SETTLED = 64  # tokens at the start of a window that are left out: the first ones attend to little, or are sinks
_STRIDE = 4  # every so manieth position's prediction is asked for its gradient


@dataclass
class TokenSamples:
    """Inputs of linears at the same tokens, spread over the text.

    Attributes:
        hidden: per layer, inputs of the MLP, ``[tokens, hidden]`` in the model's dtype.
        activations: per layer, inputs of the down projection, ``[tokens, intermediate]``.
        attention: per layer, inputs of the attention and of its output projection, where asked for.
        residual: per layer, the mean norm of the residual stream that the layer adds to.
    """

    hidden: list[Tensor]
    activations: list[Tensor]
    attention: list[tuple[Tensor, Tensor]]
    residual: list[float]


def sample_tokens(
    model: nn.Module, windows: Tensor, *, most: int = 4096, attention: bool = False, progress: bool = True
) -> TokenSamples:
    """Run the dense model over `windows`, token ids ``[rows, length]``, and keep about `most` tokens' inputs."""
    anatomy = dissect(model)
    sites = _sites(anatomy, attention)
    features = sum(width for _, width in sites.values())
    size = next(model.parameters()).element_size()
    most = min(most, MOST_BYTES // (features * size))
    rows, length = windows.shape
    skipped = min(_SETTLED, length // 2)
    places = torch.arange(skipped, length, device="cpu")
    if rows * len(places) > most:
        places = (
            torch.linspace(skipped, length - 1, max(1, most // rows), dtype=torch.float32, device="cpu").long().unique()
        )
    found: dict[tuple[int, str], list[Tensor]] = {site: [] for site in sites}
    norms = [0.0] * len(anatomy)

    def keep(site: tuple[int, str]) -> Callable[..., None]:
        def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            found[site].append(arguments[0].detach().reshape(length, -1)[places.to(arguments[0].device)])

        return before

    def measure(layer: int) -> Callable[..., None]:
        def before(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            stream = arguments[0] if arguments else named["hidden_states"]
            norms[layer] += float(stream.reshape(length, -1)[skipped:].float().norm(dim=-1).mean())

        return before

    handles = [module.register_forward_pre_hook(keep(site)) for site, (module, _) in sites.items()]
    handles += [
        layer.register_forward_pre_hook(measure(index), with_kwargs=True) for index, layer in enumerate(anatomy.layers)
    ]
    try:
        with inference(model):
            for ids in tqdm(windows.split(1), desc="sampling", unit="window", disable=not progress, leave=False):
                anatomy.stack(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    joined = {site: torch.cat(pieces) for site, pieces in found.items()}
    depth = range(len(anatomy))
    return TokenSamples(
        hidden=[joined[i, "hidden"] for i in depth],
        activations=[joined[i, "activations"] for i in depth],
        attention=[(joined[i, "attention"], joined[i, "output"]) for i in depth] if attention else [],
        residual=[norm / rows for norm in norms],
    )


def _sites(anatomy: Anatomy, attention: bool) -> dict[tuple[int, str], tuple[nn.Module, int]]:
    """(layer, what) -> the module whose inputs are kept, and their number."""
    sites: dict[tuple[int, str], tuple[nn.Module, int]] = {}
    for index, mlp in anatomy.present:
        sites[index, "hidden"] = (mlp.up, mlp.hidden_size)
        sites[index, "activations"] = (mlp.down, mlp.intermediate_size)
        found = anatomy.attentions[index]
        if attention and found is not None:
            for name, linear in (("attention", found.inputs[0]), ("output", found.output)):
                sites[index, name] = (getattr(found.module, linear), mlp.hidden_size)
    return sites


# ---- what errors cost ----


def fisher_information(model: Any, windows: Tensor, *, seed: int = 0, progress: bool = True) -> list[Tensor]:
    """What errors at the MLPs' outputs cost, fp32 ``[hidden, hidden]`` per layer.

    An error e changes the predicted distribution by about e' F e / 2 nats (KL divergence), F being the Fisher
    information E[g g'] of the gradients g of log p(y) at that output, y drawn from the model's own predictions. (The
    argument is that of Optimal Brain Surgeon, Hassibi and Stork 1993, applied to activations.)

    Args:
        windows: token ids ``[rows, length]``; one forward and one backward pass each.
        seed: of drawing y.
    """
    anatomy = dissect(model)
    sums = [
        torch.zeros(mlp.hidden_size, mlp.hidden_size, dtype=torch.float32, device=mlp.matrices().down.device)
        for mlp in anatomy.mlps
    ]
    tokens = 0
    for found in output_gradients(model, windows, [mlp.down for mlp in anatomy.mlps], seed=seed, progress=progress):
        for total, (_, g) in zip(sums, found, strict=True):
            total += g.t() @ g
        tokens += len(found[0][1])
    return [total / tokens for total in sums]


def output_gradients(
    model: Any, windows: Tensor, modules: Sequence[nn.Module], *, seed: int = 0, progress: bool = True
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Per window, the outputs of `modules` and the gradients of log p(y) there, y drawn from the model's own
    predictions: a pair of fp32 ``[tokens, width]`` each, without the first tokens of the window. The gradients are of a
    part of the positions, scaled so that the mean of their squares is that of all.

    Args: as in `fisher_information`.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    length = windows.shape[1]
    skipped = min(_SETTLED, length // 2)
    few = bool(model._supports_logits_to_keep())
    bar = tqdm(windows.split(1), desc="sensitivities", unit="window", disable=not progress, leave=False)
    with _gradients_at(model, modules) as probes:
        for row, ids in enumerate(bar):
            # gradients of independent draws do not correlate: a part of the positions gives that part of the sum, and
            # the LM head, half of the work at all positions, is spared
            places = torch.arange(row % _STRIDE, length, _STRIDE, device=model.device)
            options = {"logits_to_keep": places} if few else {}
            logits = model(input_ids=ids.to(model.device), use_cache=False, **options).logits[0].float()
            logits = logits if few else logits[places]
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            logits.log_softmax(-1).gather(1, drawn).sum().backward()
            yield [_at_positions(output, zero.grad, places, length, skipped) for output, zero in probes]


def _at_positions(
    output: Tensor, gradient: Tensor | None, places: Tensor, length: int, skipped: int
) -> tuple[Tensor, Tensor]:
    if output.dim() > 2 and output.shape[-2] == len(places) != length:  # an LM head that was asked for these alone
        skipped, scale = int((places < skipped).sum()), 1.0
    else:
        scale = _STRIDE**0.5
    return _settled(output, skipped), scale * _settled(gradient, skipped)


def _settled(values: Tensor | None, skipped: int) -> Tensor:
    return cast(Tensor, values).reshape(-1, cast(Tensor, values).shape[-1])[skipped:].float()


def fisher_norms(anatomy: Anatomy, information: Sequence[Tensor]) -> list[Tensor]:
    """What a unit of each neuron's activation costs where it is left out, fp32 ``[intermediate]`` per layer.

    A neuron left out is an error of a_i times its down row d_i: it costs |a_i| * sqrt(d_i' F d_i), in the same unit in
    every layer, so that one threshold serves the whole model. `information`: see `fisher_information`.
    """
    norms = []
    for mlp, matrix in zip(anatomy.mlps, information, strict=True):
        down = mlp.matrices().down.float()
        norms.append(((down @ matrix) * down).sum(1).clamp_min(0).sqrt())
    return norms


@contextmanager
def _gradients_at(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside, every forward pass leaves, per module, its output and a zero added to it, which gets its gradient."""
    probes = [(torch.empty(0), torch.empty(0)) for _ in modules]

    def probe(index: int) -> Callable[..., Tensor]:
        def after(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
            zero = torch.zeros_like(output, requires_grad=True)
            probes[index] = output.detach(), zero
            return output + zero

        return after

    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    was_training = model.training
    handles = [module.register_forward_hook(probe(index)) for index, module in enumerate(modules)]
    try:
        model.eval().requires_grad_(False)
        with torch.enable_grad():
            yield probes
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
        model.train(was_training)


# ---- thresholds from samples ----


def quantile(scores: Tensor, share: float) -> float:
    """The non-negative score below which `share` of all values lie, exactly; where that is zero the least above it,
    so that the zeros of a ReLU are always left out."""
    flat = scores.flatten().float()
    if share <= 0:
        return 0.0
    found = float(flat.kthvalue(min(flat.numel(), max(1, round(share * flat.numel())))).values)
    return max(found, torch.finfo(torch.float32).tiny)


def relative_error(activations: Tensor, down: Tensor, wanted: Tensor) -> Tensor:
    """CETT's ratio per token: the norm of the sum of the outputs left out, over the norm of the whole output.

    (Sparsing Law, arXiv 2411.02335, section 3.) activations, wanted: ``[tokens, neurons]``; down: ``[neurons,
    hidden]``. Returns ``[tokens]``.
    """
    a = activations.float()
    out = torch.where(wanted, 0, a) @ down.float()
    size: Tensor = (a @ down.float()).norm(dim=-1)
    return cast(Tensor, out.norm(dim=-1)) / size.clamp_min(torch.finfo(torch.float32).tiny)


def cett_threshold(activations: Tensor, down: Tensor, cett: float, steps: int = 20) -> float:
    """The largest threshold on |a_i| * ||down_i|| whose mean relative error over the tokens stays within `cett`.

    Found by bisection over the values of the samples, to within one part in 2**steps.
    """
    score = activations.float().abs() * down.float().norm(dim=1)
    ordered = score.flatten().sort().values
    low, high = 0, ordered.numel() - 1
    for _ in range(steps):
        if low >= high:
            break
        middle = (low + high + 1) // 2
        if float(relative_error(activations, down, score >= ordered[middle]).mean()) <= cett:
            low = middle
        else:
            high = middle - 1
    return float(ordered[low])


def means_when_left_out(activations: Tensor, wanted: Tensor) -> Tensor:
    """Each neuron's mean activation over the tokens that leave it out, 0 where there are none; fp32 ``[neurons]``."""
    left = ~wanted
    count = left.sum(0)
    return torch.where(left, activations.float(), 0).sum(0) / count.clamp_min(1)
