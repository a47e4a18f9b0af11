"""What `Engine` takes as prompts: texts and chats, told apart, checked and rendered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from ..predictors.checks import check_encodable, kind_of
from ..predictors.errors import CoreskipError

Message = Mapping[str, Any]
Prompt = str | Message | Sequence[Message]


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


def render(tokenizer: Any, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> str:
    """The text that the tokenizer's chat template makes of `messages`, up to where the answer begins.

    tools: that the answer may call, as the template describes them.

    Raises:
        CoreskipError: there is no template, or it refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise CoreskipError("this tokenizer has no chat template: pass a text instead of messages")
    try:
        text = tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=True)
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
