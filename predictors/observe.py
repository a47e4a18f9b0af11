"""One calibration pass over a text: streaming statistics per layer and neuron, in bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .anatomy import Anatomy, FeedForward, dissect
from .importance import SCORES, Score, token_contributions

HISTOGRAM_BINS = 512
_LOG2_LOW, _LOG2_HIGH = -32.0, 16.0  # |values| below 2**-32 share the first bin, above 2**16 the last


@dataclass
class LayerStats:
    """What one layer's MLP did over the text. `width` neurons, `hidden` inputs.

    Attributes:
        tokens: tokens seen.
        active: tokens on which each neuron's activation was positive, int64 ``[width]``.
        total, squares: sums of a and of a**2, fp64 ``[width]`` (first and second moments).
        core: per score, the summed token contributions, fp64 ``[width]`` (see `token_contributions`).
        input_squares: sum of x**2 per input channel of the MLP, fp64 ``[hidden]``.
        input_norm: sum over tokens of ||x||.
        input_histogram, activation_histogram: counts of log2|x| and log2|a| in `HISTOGRAM_BINS` equal bins.
        down_norm: norms of the down projection's columns, fp32 ``[width]``.
    """

    tokens: int
    active: Tensor
    total: Tensor
    squares: Tensor
    core: dict[Score, Tensor]
    input_squares: Tensor
    input_norm: float
    input_histogram: Tensor
    activation_histogram: Tensor
    down_norm: Tensor

    @classmethod
    def empty(cls, down_norm: Tensor, hidden: int, scores: Iterable[Score]) -> LayerStats:
        width, device = down_norm.shape[0], down_norm.device

        def zeros(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return cls(
            tokens=0,
            active=zeros(width, torch.int64),
            total=zeros(width),
            squares=zeros(width),
            core={score: zeros(width) for score in scores},
            input_squares=zeros(hidden),
            input_norm=0.0,
            input_histogram=zeros(HISTOGRAM_BINS, torch.int64),
            activation_histogram=zeros(HISTOGRAM_BINS, torch.int64),
            down_norm=down_norm,
        )

    def see_input(self, x: Tensor) -> None:
        """Add MLP inputs ``[tokens, hidden]``."""
        x = x.float()
        self.input_squares += x.square().sum(0, dtype=torch.float64)
        self.input_norm += float(x.norm(dim=-1).sum())
        self.input_histogram += log_histogram(x)

    def see_activations(self, a: Tensor, alpha: float) -> None:
        """Add activations ``[tokens, width]``."""
        a = a.float()
        self.tokens += a.shape[0]
        self.active += (a > 0).sum(0)
        self.total += a.sum(0, dtype=torch.float64)
        self.squares += a.square().sum(0, dtype=torch.float64)
        self.activation_histogram += log_histogram(a)
        for score, sums in self.core.items():
            sums += token_contributions(a, score, alpha, self.down_norm).sum(0, dtype=torch.float64)


def log_histogram(values: Tensor) -> Tensor:
    """Counts of log2|values|, int64 ``[HISTOGRAM_BINS]``: relative resolution is the same at every magnitude."""
    scaled = (values.abs().clamp_min(2.0**_LOG2_LOW).log2() - _LOG2_LOW) / (_LOG2_HIGH - _LOG2_LOW)
    bins = (scaled * HISTOGRAM_BINS).long().clamp(0, HISTOGRAM_BINS - 1)
    return torch.bincount(bins.flatten(), minlength=HISTOGRAM_BINS)


def histogram_quantile(histogram: Tensor, share: float) -> float:
    """The magnitude below which `share` of the counted values lie, to within one bin (6.7 %)."""
    cumulative = histogram.cumsum(0)
    target = share * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, torch.tensor(target, dtype=torch.float64).ceil().to(cumulative)))
    width = (_LOG2_HIGH - _LOG2_LOW) / HISTOGRAM_BINS
    return float(2.0 ** (_LOG2_LOW + (min(index, HISTOGRAM_BINS - 1) + 1) * width))


def down_norms(anatomy: Anatomy) -> list[Tensor]:
    """Per layer, the norms of the down projection's columns, fp32 ``[intermediate]``."""
    return [down_norm(mlp) for mlp in anatomy.mlps]


def down_norm(mlp: FeedForward) -> Tensor:
    """The norms of one down projection's columns, fp32 ``[intermediate]``."""
    norms: Tensor = torch.linalg.vector_norm(mlp.matrices().down.float(), dim=1)
    return norms


Tap = Callable[[int, Tensor], None]


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that acts in passes of the calling thread alone: others may use the model meanwhile."""
    mine = threading.get_ident()

    def only(*arguments: Any) -> Any:
        return hook(*arguments) if threading.get_ident() == mine else None

    return only


@contextmanager
def taps(anatomy: Anatomy, on_activations: Tap, on_input: Tap | None = None) -> Iterator[None]:
    """Call `on_activations(layer, a)` with every down projection's input, `on_input(layer, x)` with every up
    projection's, both flattened to ``[tokens, features]``; the hooks come off however the block ends."""
    handles = []

    def hook(index: int, tap: Tap) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            tensor = cast(Tensor, args[0])
            tap(index, tensor.reshape(-1, tensor.shape[-1]))

        return of_this_thread(before)

    try:
        for index, mlp in anatomy.present:
            handles.append(mlp.down.register_forward_pre_hook(hook(index, on_activations)))
            if on_input is not None:
                handles.append(mlp.up.register_forward_pre_hook(hook(index, on_input)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def observe(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    alpha: float,
    scores: Iterable[Score] = SCORES,
    total: int | None = None,
    progress: bool = True,
    tap: Tap | None = None,
) -> list[LayerStats]:
    """Run the dense model over `batches` and return each layer's statistics.

    Args:
        model: an unwrapped causal LM.
        batches: token ids ``[rows, length]`` without padding; consumed one at a time, so memory does not grow
            with the text.
        alpha: share of a token's neurons that counts as its core (CoreInfer's alpha).
        scores: which to sum up; finding each token's core costs as much as the model's own pass over it.
        total: number of batches, for the progress bar.
        tap: also called as ``tap(layer, a)`` with every batch's activations ``[tokens, intermediate]``.
    """
    anatomy = dissect(model)
    stats = [
        LayerStats.empty(norms, mlp.hidden_size, scores)
        for norms, mlp in zip(down_norms(anatomy), anatomy.mlps, strict=True)
    ]

    def on_activations(index: int, a: Tensor) -> None:
        stats[index].see_activations(a, alpha)
        if tap is not None:
            tap(index, a)

    device = next(model.parameters()).device
    with (
        inference(model),
        taps(anatomy, on_activations, lambda index, x: stats[index].see_input(x)),
        tqdm(batches, total=total, desc="observing", unit="batch", disable=not progress, leave=False) as bar,
    ):
        for ids in bar:
            # the decoder stack is enough: the LM head's logits would be computed and thrown away
            anatomy.stack(input_ids=ids.to(device), use_cache=False)
    return stats
