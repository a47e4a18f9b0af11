"""A GPU's lowered step compared with the model's own modules where no text has come to yet: at positions far apart, and
behind many keys. Queries may be scaled, or masks cut in chunks, from some position on (selfcheck.py)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from ..kernels.gpu_launch import INTERPRETED
from ..kernels.gpu_step import definitions
from .calls import NotCovered, close
from .gpu_lowering import GpuLowering
from .gpu_place import Place
from .kv_cache import Entries, passing_twin
from .lower_cpu import StepProgram
from .phases import densely, drafting, tallied
from .program import Program
from .selfcheck import FEW, KEYS, agree, far_positions, made_up

_LEAST = 256  # positions, as other places have: other kernels than theirs would have to be compiled


class Host(Protocol):
    """A wrapped model, as a comparison needs it."""

    model: nn.Module
    program: Program

    def program_for(self, cache: Cache, native: bool = True) -> StepProgram | str: ...


def check_elsewhere(
    lowering: GpuLowering, program: StepProgram, forward: Callable[..., Any], host: Host, like: Any, entries: Entries
) -> bool:
    """Raises NotCovered where steps at other positions than that of a first one do not give what modules give.

    program: of the first one. forward: the model's own. like: the cache of a text. False: nothing could be compared.
    """
    with definitions() if INTERPRETED else nullcontext():  # the kernels take the interpreter seconds
        return _checked(lowering, program, forward, host, like, entries)


def _checked(
    lowering: GpuLowering, first: StepProgram, forward: Callable[..., Any], host: Host, like: Any, entries: Entries
) -> bool:
    spec, config = lowering.spec, cast(Any, host.model).config
    rounded = host.program.weights is not None and not first.as_loaded
    program: StepProgram | str = StepProgram.dense(len(spec.layers), as_loaded=first.as_loaded)
    if rounded:  # modules do not compute densely in a plan's format: of sequences that chose nothing they follow it
        program = host.program_for(DynamicCache(), native=False)
    if isinstance(program, str) or lowering.covers(program) is not None:
        return False
    far, keys = far_positions(config.get_text_config()), KEYS
    if spec.end is not None:
        far, keys = far[far < spec.end], min(keys, spec.end - 1)
    if spec.places is not None and not spec.places.given:  # no text could be at these behind few keys
        far = far[:0]

    def modules(**named: Any) -> Tensor:
        with drafting() if rounded else densely(), tallied(lambda step: None):
            return cast(Tensor, forward(**named, use_cache=True).logits)

    for positions, behind in ((far.tolist(), FEW), ([keys], keys)):
        cache = made_up(config, like, 1, behind)
        if positions and not _agrees(lowering, program, modules, cache, entries, positions, rounded):
            raise NotCovered("at other positions its logits differ from the model's own")
    return True


def _agrees(
    lowering: GpuLowering,
    program: StepProgram,
    modules: Callable[..., Tensor],
    cache: Any,
    entries: Entries,
    positions: list[int],
    rounded: bool,
) -> bool:
    """Whether a token at each of some positions, behind the cache's keys, has logits close to the modules'."""
    keys = int(cache.get_seq_length())
    place = Place(cache.layers, max(_LEAST, 1 << keys.bit_length()), entries)
    place.adopt(cache)
    step = lowering.step(program, place, 1)

    def at(position: int) -> bool:
        places = torch.full((1, 1), position, device=place.device)

        def run(ids: Tensor) -> tuple[Tensor, Tensor]:
            ids = ids.to(place.device)
            place.load(ids, keys, 1, None, places)
            return step(), modules(input_ids=ids, position_ids=places, past_key_values=passing_twin(cache))

        return agree(run, lambda got, expected: close(got, expected, rounded), (1, 1), lowering.vocabulary)

    return all(map(at, positions))
