"""An engine's calls as sequences of its scheduler: requests, and what ``model.generate`` prepares of its options."""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.cache_utils import DynamicCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from ..predictors.errors import CoreskipError
from .choosing import TokenChooser, as_transformers_draws
from .delegates import generator_of
from .figures import Figures
from .generation_options import check_length, learned_positions
from .length_dependence import length_dependence
from .pieces import Pieces
from .running import Running, end_ids
from .scheduler import Limits, Scheduler
from .sequence import Event, Load, Request, Ticket
from .text import uncovered_call

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_NAMED = ("logits_processor", "stopping_criteria", "generation_config")
_OF_A_STEP = {"attention_mask", "position_ids", "logits_to_keep"}  # which an unpadded sequence does not need


@dataclass(frozen=True)
class Call:
    """One sequence of a call of ``model.generate``.

    inputs: ids and mask of one prompt without padding. options: the others, checked. seed, stops: an engine's own.
    """

    inputs: dict[str, Any]
    options: dict[str, Any]
    seed: int | None
    stops: list[str]


def check_batches(model: Any) -> None:
    """
    Raises:
        CoreskipError: sequences of this model cannot be told apart, or stepped one by one.
    """
    if generator_of(model) is not model:
        raise CoreskipError("max_batch is for a model that generates by itself: give the one inside")
    if not cast(Any, model)._supports_default_dynamic_cache():
        kind = cast(Any, model).config.model_type
        raise CoreskipError(f"a {kind!r} model keeps more than keys and values of a text: leave out max_batch")


class Batching:
    """A model whose sequences decode together. `check_batches` has accepted it."""

    def __init__(self, model: Any, tokenizer: Any, limits: Limits, acquire: Callable[[], None]) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._ends, self._positions = end_ids(model), learned_positions(model)
        self._vocabulary = int(model.get_input_embeddings().num_embeddings)
        self._scheduler = Scheduler(model, limits, acquire)

    def submit(self, request: Request) -> Ticket:
        """
        Raises:
            CoreskipError: a field that makes no sense, or more tokens than there is memory for. Busy: the queue is
                full.
        """
        request.check(self._vocabulary)
        length, most = len(request.ids), request.max_new_tokens
        check_length(self._model, self._positions, length, {"max_new_tokens": max(1, most)})
        reason = length_dependence(self._model, torch.empty((1, length)), _of_length(length + most))
        if reason is not None:
            raise CoreskipError(f"this request cannot be stepped beside others: {reason}")
        self._scheduler.check(length, most)
        ticket = Ticket(length, request, self._scheduler.wake)
        ends = frozenset(request.stop_ids) | (frozenset() if request.ignore_eos else self._ends)
        self._scheduler.submit(
            Running(
                ticket,
                request.ids,
                most,
                ends,
                TokenChooser.of(request),
                Pieces(self._tokenizer, request.stop),
                dense=request.lane == "dense",
                echo=request.prompt_logprobs,
            )
        )
        return ticket

    def start(self, call: Call) -> Ticket | None:
        """Queue the sequence that ``model.generate`` would make of a call; None where it does more than choose one
        token after the other."""
        options = call.options
        if any(options.get(name) is not None for name in ("streamer", "assistant_model", "custom_generate")):
            return None
        prepared: list[Running] = []

        def prepare(model: Any, input_ids: Tensor, **arguments: Any) -> Tensor:
            kwargs = {k: v for k, v in arguments.items() if k not in _NAMED and k not in _OF_A_STEP}
            asked = {name: arguments[name] for name in _NAMED} | {"model_kwargs": kwargs, "synced_gpus": False}
            if self._covers(input_ids, asked):
                prepared.append(self._prepared(input_ids, asked, call))
            return input_ids

        self._model.generate(**call.inputs, **options, custom_generate=prepare)
        if not prepared:
            return None
        self._scheduler.submit(prepared[0])
        return prepared[0].ticket

    def _covers(self, ids: Tensor, asked: dict[str, Any]) -> bool:
        config: GenerationConfig = asked["generation_config"]
        if config.get_generation_mode() not in _MODES or config.prefill_chunk_size is not None:
            return False
        cache = asked["model_kwargs"].get("past_key_values")
        fresh = isinstance(cache, DynamicCache) and cache.get_seq_length() == 0
        known = asked["stopping_criteria"].max_length is not None
        return fresh and known and not (uncovered_call(ids, asked) or length_dependence(self._model, ids, asked))

    def _prepared(self, ids: Tensor, asked: dict[str, Any], call: Call) -> Running:
        draw = None
        if asked["generation_config"].do_sample:  # without a seed: by torch's own generator, as ever
            seed = int(torch.randint(2**62, ())) if call.seed is None else call.seed
            draw = as_transformers_draws(torch.Generator().manual_seed(seed))
        criteria = asked["stopping_criteria"]
        ends = {int(t) for c in criteria if isinstance(c, EosTokenCriteria) for t in c.eos_token_id.flatten()}
        others = [c for c in criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)]
        length = ids.shape[1]
        most = max(1, criteria.max_length - length)
        self._scheduler.check(length, most)
        return Running(
            Ticket(length, None, self._scheduler.wake),
            ids[0].tolist(),
            most,
            frozenset(ends),
            TokenChooser(asked["logits_processor"], draw),
            Pieces(self._tokenizer, call.stops),
            criteria=StoppingCriteriaList(others),
        )

    def start_all(self, calls: Sequence[Call]) -> list[Ticket] | None:
        """`start` of several calls; None, and nothing goes on, where one is not covered."""
        tickets: list[Ticket] = []
        try:
            for call in calls:
                ticket = self.start(call)
                if ticket is None:
                    break
                tickets.append(ticket)
        finally:
            if len(tickets) < len(calls):
                for ticket in tickets:
                    ticket.cancel()
        return tickets if len(tickets) == len(calls) else None

    def load(self) -> Load:
        return self._scheduler.load()

    def close(self) -> None:
        self._scheduler.close()


def _of_length(longest: int) -> dict[str, Any]:
    """As the arguments of a generation up to this length."""
    limit = types.SimpleNamespace(max_length=longest)
    return {"generation_config": limit, "stopping_criteria": limit}


def collected(tickets: Sequence[Ticket]) -> list[Event]:
    """What became of each; an interrupt cancels all."""
    try:
        return [ticket.collect() for ticket in tickets]
    finally:
        for ticket in tickets:
            ticket.cancel()


async def acollected(tickets: Sequence[Ticket]) -> list[Event]:
    try:
        return [await ticket.acollect() for ticket in tickets]
    finally:
        for ticket in tickets:
            ticket.cancel()


def texts_of(ticket: Ticket) -> Generator[str, None, None]:
    """Its text piece by piece. Whoever stops reading cancels it."""
    try:
        for event in ticket:
            if event.text:
                yield event.text
        finished(ticket, event)
    finally:
        ticket.cancel()


async def atexts_of(ticket: Ticket) -> AsyncGenerator[str, None]:
    try:
        async for event in ticket:
            if event.text:
                yield event.text
        finished(ticket, event)
    finally:
        ticket.cancel()


async def in_threads(pieces: Generator[str, None, None]) -> AsyncGenerator[str, None]:
    """What a generator makes, without the event loop waiting for it."""
    try:
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece
    finally:
        await asyncio.to_thread(pieces.close)


def finished(ticket: Ticket, event: Event) -> Event:
    """The last event, or all of them as one, of a ticket that has ended.

    Raises:
        The exception that ended it; CoreskipError where the engine was closed meanwhile.
    """
    if ticket.failure is not None:
        raise ticket.failure
    if event.finish == "cancelled":
        raise CoreskipError("the engine was closed while it generated")
    return event


def figures_of(tickets: Sequence[Ticket]) -> Figures:
    """Of calls that have ended. The first token's time is known where there is one."""
    begin = min(ticket.timings.queued for ticket in tickets)
    end = max(ticket.timings.done or begin for ticket in tickets)
    prompt = sum(ticket.usage.prompt_tokens for ticket in tickets)
    new = sum(ticket.usage.completion_tokens for ticket in tickets)
    first = tickets[0].timings.first_token if len(tickets) == 1 else None
    abstained = sum(ticket.usage.abstained for ticket in tickets)
    return Figures(prompt, new, end - begin, None if first is None else first - begin, abstained)
