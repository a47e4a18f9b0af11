"""Calls of tools: how a model's chat template writes them, found out by rendering one, and read from answers again.

A template that knows tools shows it: it renders a chat with tools otherwise than without. How it writes a call is seen
in what it makes of an assistant's message that has one: a JSON object that holds the function's name and arguments
under some keys, between some words. A template whose calls are no JSON objects is refused, rather than read wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .serve_protocol import Tool

_PROBE, _ARGUMENT, _VALUE, _CONTENT = "zqprobe", "zqargument", "zqvalue", "zqcontent"
_TOOL = {
    "type": "function",
    "function": {
        "name": _PROBE,
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {_ARGUMENT: {"type": "string", "description": "A value."}},
            "required": [_ARGUMENT],
        },
    },
}
_JSON = json.JSONDecoder()


@dataclass(frozen=True)
class CallFormat:
    """How calls stand in an answer: `before`, then a JSON object, or a list of them, then `after`.

    name, arguments: the object's keys.
    """

    before: str
    after: str
    name: str
    arguments: str
    listed: bool

    def schema(self, tool: Tool) -> dict[str, Any]:
        """Of the object that calls `tool`."""
        function = tool.function
        return {
            "type": "object",
            "properties": {self.name: {"const": function.name}, self.arguments: function.parameters},
            "required": [self.name, self.arguments],
            "additionalProperties": False,
        }

    @property
    def around(self) -> tuple[str, str]:
        """What stands before and after an object, the brackets of a list included."""
        return (self.before + "[", "]" + self.after) if self.listed else (self.before, self.after)


def call_format(tokenizer: Any) -> CallFormat | str:
    """The format of a tokenizer's chat template, or why it has none that can be read."""
    user = {"role": "user", "content": "Hello"}
    plain, told = _render(tokenizer, [user], None), _render(tokenizer, [user], [_TOOL])
    if told is None or plain is None or _PROBE not in told:
        return "the model's chat template knows no tools"
    call = {"id": "zqcall123", "type": "function", "function": {"name": _PROBE, "arguments": {_ARGUMENT: _VALUE}}}
    text = _render(tokenizer, [user, {"role": "assistant", "content": "", "tool_calls": [call]}], [_TOOL], False)
    spoken = _render(tokenizer, [user, {"role": "assistant", "content": _CONTENT}], [_TOOL], False)
    if text is None or spoken is None or _CONTENT not in spoken:
        return "the model's chat template cannot write calls of tools"
    start, turn_end = spoken.split(_CONTENT, 1)
    # what the two have in common is the beginning of the turn, and no part of the call
    found = _call_in(text[_in_common(text, start) :])
    if found is None:
        return "the model's chat template writes calls of tools in a form of its own, which is not read here"
    before, call_keys, listed, after = found
    return CallFormat(before.strip(), after.removesuffix(turn_end).strip(), *call_keys, listed)


def _render(tokenizer: Any, messages: list[Any], tools: list[Any] | None, prompt: bool = True) -> str | None:
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt))
    except Exception:  # a template is a program of its own, and raises whatever it likes
        return None


def _in_common(a: str, b: str) -> int:
    """How many characters the beginnings of two texts have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _call_in(text: str) -> tuple[str, tuple[str, str], bool, str] | None:
    """What stands before the JSON of the call, its keys, whether it is in a list, and what stands after it."""
    for place, letter in enumerate(text):
        if letter not in "{[":
            continue
        try:
            value, end = _JSON.raw_decode(text, place)
        except ValueError:
            continue
        listed = isinstance(value, list)
        first = value[0] if listed and value else value
        keys = _keys(first) if isinstance(first, dict) else None
        if keys is not None:
            return text[:place], keys, listed, text[end:]
    return None


def _keys(value: dict[str, Any]) -> tuple[str, str] | None:
    names = [key for key, each in value.items() if each == _PROBE]
    arguments = [key for key, each in value.items() if each == {_ARGUMENT: _VALUE}]
    return (names[0], arguments[0]) if names and arguments else None


@dataclass(frozen=True)
class Call:
    """arguments: as the text of a JSON object."""

    name: str
    arguments: str


class CallReader:
    """Tells calls from the rest of an answer while it comes.

    Text that may be the beginning of a call is held back; what turns out to be none is text like the rest.

    names: of the functions that there are; another name is no call.
    """

    def __init__(self, form: CallFormat, names: list[str]) -> None:
        self._form, self._names = form, names
        self._held = ""
        self._state = self._in_text
        self._said = False  # anything but space, or a call

    def feed(self, text: str) -> Iterator[str | Call]:
        """Pieces of text, and calls, in the order of the answer."""
        self._held += text
        going_on = True
        while going_on:
            found, going_on = self._state()
            yield from found

    def end(self) -> Iterator[str]:
        """What was held back at the end of the answer."""
        if self._state == self._in_call:
            yield self._form.before + self._held
        elif self._state == self._in_text and (self._held.strip() or not self._said):
            yield self._held

    def _in_text(self) -> tuple[list[str | Call], bool]:
        """Up to where a call begins. Like the other states: what was found, and whether there may be more."""
        place = self._beginning()
        if place is None:
            return self._text(len(self._held) - self._may_begin()), False
        found = self._text(place) if self._held[:place].strip() else []
        self._held = self._held[place if not found else 0 :][len(self._form.before) :]
        self._state = self._in_call
        return found, True

    def _text(self, length: int) -> list[str | Call]:
        text, self._held = self._held[:length], self._held[length:]
        self._said = self._said or bool(text.strip())
        return [text] if text else []

    def _beginning(self) -> int | None:
        if self._form.before:
            place = self._held.find(self._form.before)
            return place if place >= 0 else None
        start = len(self._held) - len(self._held.lstrip())
        begins = not self._said and self._held[start:].startswith("[" if self._form.listed else "{")
        return start if begins else None

    def _may_begin(self) -> int:
        """How many of the last characters may be the beginning of a call, or the space before it."""
        before, rest = self._form.before, self._held
        if not before:
            return 0 if rest.strip() else len(rest)
        partial = next((n for n in range(min(len(before) - 1, len(rest)), 0, -1) if rest.endswith(before[:n])), 0)
        rest = rest[: len(rest) - partial]
        return partial + len(rest) - len(rest.rstrip())

    def _in_call(self) -> tuple[list[str | Call], bool]:
        start = len(self._held) - len(self._held.lstrip())
        try:
            value, end = _JSON.raw_decode(self._held, start)
        except (ValueError, RecursionError):
            return [], False
        calls = [self._call(each) for each in (value if isinstance(value, list) else [value])]
        if not calls or None in calls:
            self._held = self._form.before + self._held
            self._state = self._in_text
            return self._text(len(self._form.before) + end), True
        self._held, self._said, self._state = self._held[end:], True, self._after_call
        return [call for call in calls if call is not None], True

    def _after_call(self) -> tuple[list[str | Call], bool]:
        after, rest = self._form.after, self._held.lstrip()
        if after.startswith(rest) and rest != after:
            return [], False
        self._held, self._state = rest.removeprefix(after), self._in_text
        return [], True

    def _call(self, value: Any) -> Call | None:
        name = value.get(self._form.name) if isinstance(value, dict) else None
        arguments = value.get(self._form.arguments) if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        return Call(name, json.dumps(arguments, ensure_ascii=False))
