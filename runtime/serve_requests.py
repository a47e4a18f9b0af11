"""From the API's requests to the scheduler's: chats rendered, texts tokenized, lengths checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..predictors.errors import CoreskipError
from .engine import Engine
from .prompts import render
from .sequence import Request
from .serve_errors import ApiError, bad_request
from .serve_protocol import ChatRequest, CompletionRequest, NamedTool, Sampling, rendered
from .serve_tools import CallFormat, call_format
from .serve_vocabulary import Grammar, Vocabulary


@dataclass
class Served:
    """A model under a name that requests may send.

    Attributes:
        engine: with a ``max_batch``; names may share one.
        lane: of `Request`.
        context: tokens of prompt and answer together.
        about: what else ``/v1/models`` says of it.
    """

    name: str
    engine: Engine
    vocabulary: Vocabulary
    context: int
    lane: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def calls(self) -> CallFormat | str:
        """How the chat template writes calls of tools, or why they cannot be read."""
        return call_format(self.engine.tokenizer)


@dataclass
class Prepared:
    """What a request is to the scheduler.

    Attributes:
        requests: of each prompt `n`, one after the other.
        prompts: as the answer echoes them. ids: their tokens.
        tools: how calls are written; None where none are asked for.
    """

    requests: list[Request]
    prompts: list[str]
    ids: list[list[int]]
    tools: CallFormat | None = None


def prepare_chat(served: Served, asked: ChatRequest) -> Prepared:
    """
    Raises:
        ApiError: 400; it names the field that makes no sense for this model.
    """
    tools = _tools(served, asked)
    messages = rendered(asked.messages)
    told = None if tools is None else [tool.model_dump(exclude_none=True) for tool in asked.tools]
    try:
        text = render(served.engine.tokenizer, messages, told)
        ids = served.engine.tokenize([text], special=False)[0]
    except CoreskipError as error:
        raise bad_request(str(error), "messages") from None
    room = served.context - len(ids)
    _check_length(served, len(ids), asked.most_tokens or 1, "messages")
    grammar = _grammar(served, asked) if tools is None else _forced_call(served, asked, tools)
    most = room if asked.most_tokens is None else asked.most_tokens
    logprobs = asked.top_logprobs if asked.logprobs else None
    requests = _requests(served, asked, ids, most, grammar, logprobs=logprobs)
    return Prepared(requests, [text], [ids], tools)


def _tools(served: Served, asked: ChatRequest) -> CallFormat | None:
    called = next((i for i, message in enumerate(asked.messages) if message.tool_calls), None)
    wanted = bool(asked.tools) and asked.tool_choice != "none"
    if not wanted and called is None:
        return None
    form = served.calls
    if isinstance(form, str):
        raise bad_request(form, "tools" if wanted else f"messages[{called}].tool_calls", "unsupported_parameter")
    if not wanted:
        return None
    if asked.stop and not served.vocabulary.shows(form.before + form.after):
        raise bad_request("calls of tools stand between special tokens here: leave stop out", "stop")
    return form


def _forced_call(served: Served, asked: ChatRequest, form: CallFormat) -> Grammar | None:
    """Where the request says that a tool has to be called, or which one."""
    if asked.tool_choice in (None, "auto"):
        return None
    named = asked.tool_choice.function.name if isinstance(asked.tool_choice, NamedTool) else None
    wanted = [tool for tool in asked.tools if named in (None, tool.function.name)]
    return served.vocabulary.of_calls(*form.around, [form.schema(tool) for tool in wanted])


def _grammar(served: Served, asked: Sampling) -> Grammar | None:
    wanted = asked.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.pattern is not None:
        return served.vocabulary.of_regex(wanted.pattern, "response_format.pattern")
    if wanted.json_schema is not None:
        return served.vocabulary.of_schema(wanted.json_schema.schema_, "response_format.json_schema.schema")
    return served.vocabulary.of_schema({"type": "object"}, "response_format")


def prepare_completion(served: Served, asked: CompletionRequest) -> Prepared:
    """As `prepare_chat`, for prompts that are texts or token ids."""
    prompts, requests = asked.prompts, list[Request]()
    ids, grammar, logprobs = _tokens(served, prompts), _grammar(served, asked), asked.logprobs
    for each in ids:
        _check_length(served, len(each), asked.max_tokens, "prompt")
        requests += _requests(
            served, asked, each, asked.max_tokens, grammar,
            logprobs=logprobs, prompt_logprobs=logprobs if asked.echo else None,
        )  # fmt: skip
    decode = served.engine.tokenizer.decode
    texts = [p if isinstance(p, str) else str(decode(p)) if asked.echo else "" for p in prompts]
    return Prepared(requests, texts, ids)


def _tokens(served: Served, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    size = served.vocabulary.size
    for prompt in prompts:
        if isinstance(prompt, list) and not all(0 <= token < size for token in prompt):
            raise bad_request(f"prompt holds a token that there is not: ids are from 0 to {size - 1}", "prompt")
    try:
        return [p if isinstance(p, list) else served.engine.tokenize([p], special=True)[0] for p in prompts]
    except CoreskipError as error:
        raise bad_request(str(error), "prompt") from None


def _check_length(served: Served, prompt: int, new: int, param: str) -> None:
    if prompt + new > served.context:
        raise ApiError(
            400,
            f"the context has {served.context} tokens at most, and this request wants {prompt + new}: {prompt} of its "
            f"prompt and {new} new ones; shorten it, or ask for fewer",
            param=param,
            code="context_length_exceeded",
        )


def _requests(
    served: Served,
    asked: Sampling,
    ids: list[int],
    most: int,
    grammar: Grammar | None,
    *,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> list[Request]:
    ends = served.vocabulary.ends
    return [
        Request(
            ids,
            most,
            temperature=asked.temperature,
            top_p=asked.top_p if asked.top_p < 1 else None,
            top_k=asked.top_k if asked.top_k > 0 else None,
            min_p=asked.min_p or None,
            # texts of one request differ, and the first is the one that n = 1 gives
            seed=None if asked.seed is None else (asked.seed + index) % 2**64,
            stop=tuple(asked.stop),
            stop_ids=() if asked.ignore_eos and grammar is None else ends,
            logit_bias=asked.logit_bias,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            repetition_penalty=asked.repetition_penalty,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            ignore_eos=asked.ignore_eos,
            constraint=None if grammar is None else grammar.matcher(),
            lane=served.lane,
        )
        for index in range(asked.n)
    ]
