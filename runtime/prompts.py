"""What `Engine` takes: prompts and chats, told apart and checked, and the options of generation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import nn
from transformers import GenerationConfig

from ..predictors.checks import check_above_zero, check_count, check_encodable, check_flag, check_seed, kind_of
from ..predictors.errors import CoreskipError

Message = Mapping[str, Any]
Prompt = str | Message | Sequence[Message]

#: Options of ``model.generate`` that an engine makes of the prompt.
_ITS_OWN = ("input_ids", "inputs", "inputs_embeds", "attention_mask")


def as_batch(prompt: Any) -> tuple[list[str | list[Message]], bool]:
    """The prompts as texts or lists of messages, and whether there was just one. A single message is a chat of one.

    Raises:
        CoreskipError: something else, nothing, or texts beside chats.
    """
    if isinstance(prompt, str) or _is_message(prompt):
        return [_one(prompt)], True
    items = _items(prompt)
    if not items:
        raise CoreskipError("there is no prompt: give a text, a chat, or a list of them")
    messages = [_is_message(item) for item in items]
    if all(messages):
        return [_one(items)], True
    found = [_one(item) for item in items]
    if len({isinstance(item, str) for item in found}) > 1:
        raise CoreskipError("a batch holds texts or chats, not both")
    return found, False


def _one(prompt: Any) -> str | list[Message]:
    if isinstance(prompt, str):
        if not prompt:
            raise CoreskipError("a prompt is empty: give some text")
        check_encodable("the prompt", prompt)
        return prompt
    messages = [prompt] if _is_message(prompt) else _items(prompt)
    if not messages:
        raise CoreskipError("a chat is empty: give it at least one message")
    for message in messages:
        _check_message(message)
    return messages


def _is_message(prompt: Any) -> bool:
    return isinstance(prompt, Mapping)


def _items(prompt: Any) -> list[Any]:
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, (Sequence, Iterator)):
        hint = "; token ids are for model.generate" if hasattr(prompt, "dtype") else ""
        raise CoreskipError(
            f'the prompt is {kind_of(prompt)}: give a text, a chat ([{{"role": "user", "content": "..."}}]), or a list '
            f"of them{hint}"
        )
    return list(prompt)


def _check_message(message: Any) -> None:
    """Role and content, as chats have them everywhere; what else a message holds is for the template."""
    if not (_is_message(message) and "role" in message and "content" in message):
        raise CoreskipError(f'every chat message needs a "role" and a "content"; this one is {kind_of(message)}')
    role, content = message["role"], message["content"]
    if not isinstance(role, str):
        raise CoreskipError(f'the "role" of a chat message is {role!r}: give a word, such as "user"')
    if content is None and message.get("tool_calls"):
        return
    if isinstance(content, str):
        check_encodable('the "content" of a chat message', content)
    elif not (isinstance(content, list) and content and all(isinstance(part, Mapping) for part in content)):
        raise CoreskipError(f'the "content" of a chat message is {kind_of(content)}: give a text')


def render(tokenizer: Any, messages: list[Message]) -> str:
    """The text that the tokenizer's chat template makes of `messages`, up to where the answer begins.

    Raises:
        CoreskipError: there is no template, or it refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise CoreskipError("this tokenizer has no chat template: pass a text instead of messages")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of its own, and raises whatever it likes
        reason = " ".join(str(error).split()) or type(error).__name__
        parts = " (it may want each content as one text)" if any(_has_parts(m) for m in messages) else ""
        raise CoreskipError(f"the tokenizer's chat template refuses these messages: {reason}{parts}") from error
    if any(_has_parts(message) and str(message["content"]) in text for message in messages):
        raise CoreskipError("the tokenizer's chat template does not read lists of parts: give each content as one text")
    if not text:
        raise CoreskipError("the tokenizer's chat template makes nothing of these messages")
    return cast(str, text)


def _has_parts(message: Message) -> bool:
    return isinstance(message["content"], list)


def own_options(model: Any, options: dict[str, Any]) -> tuple[int | None, list[str], dict[str, Any]]:
    """The seed, the stop strings, and what is left for ``model.generate``, with what it would trip over checked.

    Raises:
        CoreskipError: a value that makes no sense, a seed where nothing is sampled.
    """
    options = {name: value for name, value in options.items() if (name, value) != ("generation_config", None)}
    seed, stops = options.pop("seed", None), options.pop("stop_strings", None)
    own = [name for name in _ITS_OWN if name in options]
    if own:
        raise CoreskipError(f"an engine makes {own[0]} of the prompt: leave it out")
    config = options.get("generation_config", model.generation_config)
    if not isinstance(config, GenerationConfig):
        raise CoreskipError(f"generation_config is {kind_of(config)}: give a transformers.GenerationConfig")
    _check_values(options)
    beams = options.get("num_beams") or config.num_beams or 1
    if (options.get("num_return_sequences") or 1) > beams and not samples(model, options):
        raise CoreskipError("greedy text comes once: for several add do_sample=True, or as many num_beams")
    if seed is not None:
        check_seed(seed)
        if not samples(model, options):
            raise CoreskipError("a seed is of sampling: add do_sample=True, or leave it out")
    return seed, _stop_strings(stops), options


def samples(model: Any, options: dict[str, Any]) -> bool:
    """Whether ``model.generate`` with these options draws tokens at random."""
    config = options.get("generation_config") or model.generation_config
    chosen = options.get("do_sample")
    return bool(config.do_sample if chosen is None else chosen)


def _check_values(options: dict[str, Any]) -> None:
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("max_new_tokens", "max_length", "num_beams", "num_return_sequences"):
        if name in given:
            check_count(name, given[name])
    for name in ("min_new_tokens", "min_length", "top_k"):
        if name in given:
            check_count(name, given[name], 0)
    for name in ("temperature", "repetition_penalty"):
        if name in given:
            check_above_zero(name, given[name])
    if "top_p" in given and not (isinstance(given["top_p"], (int, float)) and 0 <= given["top_p"] <= 1):
        raise CoreskipError(f"top_p is {given['top_p']!r}; it must be a share from 0 to 1")
    if "do_sample" in given:
        check_flag("do_sample", given["do_sample"])
    if "streamer" in given and not (hasattr(given["streamer"], "put") and hasattr(given["streamer"], "end")):
        raise CoreskipError(f"streamer is {kind_of(given['streamer'])}: give one of transformers' streamers")


def _stop_strings(stops: Any) -> list[str]:
    if stops is None:
        return []
    found = [stops] if isinstance(stops, str) else list(stops) if isinstance(stops, (list, tuple, set)) else None
    if found is None or not all(isinstance(stop, str) for stop in found):
        raise CoreskipError(f"stop_strings is {stops!r}: give a text, or a list of them")
    if stops != "" and not all(found):
        raise CoreskipError("a stop string is empty")
    for stop in found:
        check_encodable("a stop string", stop)
    return [stop for stop in found if stop]


def check_length(model: Any, most: int | None, tokens: int, options: dict[str, Any]) -> None:
    """Raise `CoreskipError` where a prompt of so many tokens and its continuation have more positions than `most`, the
    model's `learned_positions`: looking up the next one would fail in the midst of the text."""
    if most is None:
        return
    new = _new_tokens(model, tokens, options)
    if tokens + new - 1 <= most:  # the last token is not looked up
        return
    kind = model.config.get_text_config().model_type
    if tokens > most:
        raise CoreskipError(f"the prompt has {tokens} tokens, and this {kind!r} model {most} positions: shorten it")
    raise CoreskipError(
        f"the prompt has {tokens} tokens, {new} more are asked for, and this {kind!r} model has {most} positions: give "
        f"max_new_tokens={most - tokens + 1} or less, or a shorter prompt"
    )


def _new_tokens(model: Any, tokens: int, options: dict[str, Any]) -> int:
    """How many are generated at most; 1 where that is left open."""
    config = options.get("generation_config") or model.generation_config
    for source in (options, vars(config)):
        new, length = source.get("max_new_tokens"), source.get("max_length")
        if new is not None:
            return int(new)
        if length is not None:
            return max(1, int(length) - tokens)
    return 1


def learned_positions(model: Any) -> int | None:
    """How many positions a model has a vector for, which it looks up (GPT-2, OPT); None where positions are
    computed. Found by its table: an embedding of positions, by name and size."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    for name, module in model.named_modules():
        called = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("pos" in called or called == "wpe"):
            extra = module.num_embeddings - most  # OPT's begins with two for padding
            return most if 0 <= extra <= 2 else None
        table: Any = getattr(module, "embed_positions", None)  # GPT-J and CodeGen look up rotary angles
        if not isinstance(table, nn.Module) and getattr(table, "ndim", 0) == 2 and len(table) == most:
            return most
    return None
