"""Decoding of one sequence without drafts, by native or captured steps, with as little Python as its options allow.

transformers' own loop costs 0.5 ms a token where its code is in the CPU's caches, and 2 ms after a step over 100 MB of
weights has cleared these: half the time of a step of the embedded model in 4 bits. Here greedy decoding up to a length
or an end-of-text token stays in the native code for several tokens at once; whatever else is asked for (sampling,
processors, criteria, streamers) is done token by token, as in exact mode. A GPU likewise makes several tokens before
they are read.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .calls import NotCovered
from .length_dependence import length_dependence
from .steps import Lowering, Steps
from .text import Text, end_tokens, uncovered_call

# Tokens made in one native call at most, and how long one may take: a streamer should not stutter, and an interrupt
# from the keyboard waits for the call's end.
AT_ONCE = 16
AHEAD = 8  # tokens that a GPU makes before they are read: those after an end-of-text token are made in vain
STREAMING_S, ALONE_S = 0.025, 0.5


def generate(steps: Steps, model: Any, ids: Tensor, arguments: dict[str, Any]) -> Any:
    """What ``model._sample`` returns, or None where this loop does not cover the call; nothing has happened then.

    ids: int64 [rows, length]; arguments: the call's other arguments by name.
    """
    captured, in_part = steps.lowering is Lowering.CAPTURED, steps.lowering is Lowering.SPANS
    if not steps.ready or in_part or (captured and end_tokens(arguments) is None):
        return None
    if uncovered_call(ids, arguments, goes_back=False) or length_dependence(model, ids, arguments):
        return None
    config, kwargs = arguments["generation_config"], arguments["model_kwargs"]
    outputs = model._prefill(ids, config, kwargs)
    cache, first = outputs.past_key_values, outputs.logits[0, -1]
    text = Text(
        ids,
        arguments["logits_processor"],
        arguments["stopping_criteria"],
        config,
        arguments["streamer"],
        first.shape[0],
    )
    try:
        (_replay if captured else _decode)(steps, model, cache, text, first, arguments)
    finally:
        text.close()
    if arguments["streamer"] is not None:
        arguments["streamer"].end()
    return text.result(config, cache)


def _decode(steps: Steps, model: Any, cache: Cache, text: Text, first: Tensor, arguments: dict[str, Any]) -> None:
    last = text.append(first)
    while not text.finished:
        try:
            _decode_natively(steps, cache, text, last, arguments)
        except NotCovered:  # the model's own pass covers it, or describes the model anew where somebody changed it
            ids = text.ids[:, -1:]
            last = text.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1])


def _decode_natively(steps: Steps, cache: Cache, text: Text, last: int, arguments: dict[str, Any]) -> None:
    """Up to the end of the text.

    Raises:
        NotCovered: a step is not covered, or not any more; the text has what came before.
    """
    passes = steps.native_passes(cache)
    if passes is None:
        raise NotCovered("native steps do not cover the model")
    ends = end_tokens(arguments)
    longest = ALONE_S if arguments["streamer"] is None else STREAMING_S
    at_once = 1
    while not text.finished:
        if ends is None:
            last = text.append(passes.verify([last])[0])
            continue
        room = arguments["stopping_criteria"].max_length - text.ids.shape[1]
        start = time.perf_counter()
        made = passes.greedy(last, min(room, at_once), ends)
        each = (time.perf_counter() - start) / len(made)
        at_once = max(1, min(AT_ONCE, int(longest / each)))
        text.extend(made)
        last = made[-1]


def _replay(steps: Steps, model: Any, cache: Cache, text: Text, first: Tensor, arguments: dict[str, Any]) -> None:
    last, ends = text.append(first), end_tokens(arguments) or []
    while not text.finished:
        room = arguments["stopping_criteria"].max_length - text.ids.shape[1]
        made = steps.greedy(cache, last, min(room, AHEAD), ends)
        if made:
            text.extend(made)
            last = made[-1]
        else:  # the first token, and wherever the step has to be captured anew
            ids = torch.tensor([[last]], device=text.ids.device)
            last = text.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1])
