"""What requests say and how calls of tools are told: no model runs here."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import torch
from served import MESSAGES, TOOLS_TEMPLATE, with_template
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from coreskip.runtime.serve_errors import ApiError
from coreskip.runtime.serve_protocol import ChatRequest, CompletionRequest, Tool, parse, rendered
from coreskip.runtime.serve_tools import Call, CallFormat, CallReader, call_format
from coreskip.runtime.serve_vocabulary import Unfollowable, Vocabulary

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "other"}}
FORMAT, MISSING = "response_format", "missing_required_parameter"


def called(arguments: str) -> Any:
    return {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "weather", "arguments": arguments}}]}


CALLED = called('{"at": "sea"}')


def chat(**fields: Any) -> Any:
    return {"messages": MESSAGES, **fields}


def refused(kind: Any, body: Any) -> ApiError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as caught:
        parse(kind, raw)
    assert caught.value.status == 400
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "Hi"}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "invalid_value"),
        (
            {"messages": [*MESSAGES, {"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[1].content[0].type", "invalid_value",
        ),
        ({"messages": [{"role": "user", "content": "", "shouted": True}]}, "messages[0].shouted", "unknown_parameter"),
        ({"messages": [{**CALLED, "role": "user"}]}, "messages[0].tool_calls", "invalid_value"),
        *((chat(**{name: value}), name, "invalid_value") for name, value in (
            ("temperature", "hot"), ("temperature", 2.5), ("temperature", -1), ("top_p", 0), ("top_p", 1.1),
            ("top_k", -2), ("min_p", 2), ("n", 0), ("n", 129), ("n", True), ("n", 1.0), ("max_tokens", 0),
            ("max_completion_tokens", -1), ("presence_penalty", 3), ("frequency_penalty", -3), ("seed", 0.5),
            ("seed", 2**64), ("stop", ""), ("stop", ["a"] * 17), ("stop", [1]), ("logit_bias", []),
            ("logit_bias", {"a": 1}), ("logit_bias", {"1": 101}), ("logit_bias", {"-1": 1}),
            ("logit_bias", {"1": True}),
            ("top_logprobs", 2), ("logprobs", 3), ("stream", "yes"), ("stream_options", {"include_usage": True}),
            ("store", True), ("service_tier", "flex"), ("tool_choice", "auto"),
            ("metadata", "x"), ("user", 5), ("model", 5),
        )),
        *((chat(**{name: value}), name, "unsupported_parameter") for name, value in (
            ("audio", {}), ("functions", []), ("function_call", "auto"), ("prediction", {}),
            ("reasoning_effort", "low"),
            ("verbosity", "low"), ("web_search_options", {}),
        )),
        (chat(modalities=["audio"]), "modalities[0]", "invalid_value"),
        (chat(guided_json={}), "guided_json", "unknown_parameter"),
        (chat(prompt="a"), "prompt", "unknown_parameter"),
        (chat(logprobs=True, top_logprobs=21), "top_logprobs", "invalid_value"),
        (chat(max_tokens=5, max_completion_tokens=6), "max_tokens", "invalid_value"),
        (chat(stream=True, stream_options={"often": True}), "stream_options.often", "unknown_parameter"),
        (chat(response_format={"type": "xml"}), "response_format.type", "invalid_value"),
        (chat(response_format={"type": "json_schema"}), "response_format", "invalid_value"),
        (chat(response_format={"type": "regex"}), "response_format", "invalid_value"),
        (chat(response_format={"type": "json_object", "pattern": "a"}), "response_format", "invalid_value"),
        (chat(response_format={"type": "json_schema", "json_schema": {}}), f"{FORMAT}.json_schema.name", MISSING),
        (chat(response_format={"type": "json_object"}, tools=[TOOL]), "response_format", "invalid_value"),
        (chat(tools=[TOOL, TOOL]), "tools", "invalid_value"),
        (chat(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name", "invalid_value"),
        (chat(tools=[{"type": "function"}]), "tools[0].function", MISSING),
        (chat(tools=[TOOL], tool_choice=NAMED), "tool_choice", "invalid_value"),
        (chat(tools=[TOOL], tool_choice="maybe"), "tool_choice", "invalid_value"),
    ],
)  # fmt: skip
def test_chats_are_refused_by_field(body: Any, param: str, code: str) -> None:
    error = refused(ChatRequest, body)
    assert (error.param, error.code) == (param, code), error.message
    assert param.rpartition(".")[2] in error.message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        *(({"prompt": prompt}, "prompt") for prompt in (
            3, [], [[]], [1, "a"], [1, 2.5], [True], [["a"]], {}, [[1], [[2]]],
        )),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a", "b"], "n": 65}, "prompt"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "n": 2, "best_of": 1}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "messages": MESSAGES}, "messages"),
    ],
)  # fmt: skip
def test_completions_are_refused_by_field(body: Any, param: str) -> None:
    assert refused(CompletionRequest, body).param == param


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b"null", b'"text"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 10_000, b'{"top_p": NaN}',
     b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", b'{"prompt": "a"} x'],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    assert refused(CompletionRequest, body).code == "invalid_json"


def test_what_asks_for_nothing_is_taken() -> None:
    benign = {
        "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "x",
        "prompt_cache_key": "y", "audio": None, "functions": None, "whatever": None, "modalities": ["text"], "n": None,
        "seed": -1, "top_k": -1, "parallel_tool_calls": True,
    }  # fmt: skip
    assert parse(ChatRequest, json.dumps({"messages": MESSAGES, **benign}).encode()).n == 1
    asked = parse(CompletionRequest, b'{"prompt": [[1, 2], "a"], "suffix": "", "best_of": 2, "n": 2, "stop": "."}')
    assert (asked.prompts, asked.stop, asked.max_tokens) == ([[1, 2], "a"], ["."], 16)


def test_messages_as_templates_read_them() -> None:
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "one."}]
    messages = [{"role": "developer", "content": parts}, CALLED, {"role": "tool", "content": "", "tool_call_id": "a"}]
    asked = parse(ChatRequest, json.dumps({"messages": messages}).encode())
    system, assistant, answered = rendered(asked.messages)
    assert system == {"role": "system", "content": "Name one."}
    assert assistant["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"at": "sea"}}
    assert answered["tool_call_id"] == "a"
    for arguments in ("[1]", "nonsense", '"text"'):
        messages[1] = called(arguments)
        with pytest.raises(ApiError, match="no JSON object") as caught:
            rendered(parse(ChatRequest, json.dumps({"messages": messages}).encode()).messages)
        assert caught.value.param == "messages[1].tool_calls"


# --- how templates write calls

HERMES = CallFormat("<tool_call>", "</tool_call>", "name", "arguments", listed=False)
LLAMA = CallFormat("", "", "name", "parameters", listed=False)
MISTRAL = CallFormat("[TOOL_CALLS]", "", "name", "arguments", listed=True)

LLAMA_TEMPLATE = """{% for message in messages %}<|{{ message.role }}|>
{% if tools and loop.first %}{{ tools | tojson }}
{% endif %}{% if message.tool_calls %}{"name": "{{ message.tool_calls[0].function.name }}", "parameters": {{
message.tool_calls[0].function.arguments | tojson }}}{% else %}{{ message.content }}{% endif %}<|eot|>{% endfor %}{%
if add_generation_prompt %}<|assistant|>
{% endif %}"""
MISTRAL_TEMPLATE = """{% for message in messages %}{% if message.role == "user" %}{% if tools %}[TOOLS]{{ tools |
tojson }}{% endif %}[INST]{{ message.content }}[/INST]{% elif message.tool_calls %}[TOOL_CALLS][{% for call in
message.tool_calls %}{ "name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }},
"id": "{{ call.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]</s>{% else %} {{ message.content }}</s>{% endif
%}{% endfor %}"""
XML_TEMPLATE = """{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}<|{{ message.role }}|>{{
message.content }}{% for call in message.tool_calls or [] %}<function={{ call.function.name }}></function>{% endfor %}{%
endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.mark.parametrize(
    ("template", "expected"),
    [(TOOLS_TEMPLATE, HERMES), (LLAMA_TEMPLATE, LLAMA), (MISTRAL_TEMPLATE, MISTRAL), (XML_TEMPLATE, "form of its own"),
     (None, "no tools"), ("{{ tools | tojson }}{{ raise_exception('no') }}", "no tools")],
)  # fmt: skip
def test_the_format_of_calls_is_the_templates(embedded: tuple[Any, Any], template: str | None, expected: Any) -> None:
    found = call_format(with_template(embedded[1], template))
    assert found == expected if isinstance(expected, CallFormat) else expected in str(found)


def test_the_embedded_models_template_knows_no_tools(embedded: tuple[Any, Any]) -> None:
    assert "no tools" in str(call_format(embedded[1]))


def read(form: CallFormat, text: str, size: int) -> tuple[str, list[Call]]:
    """The text and the calls of an answer that comes in pieces of `size` characters."""
    reader, found = CallReader(form, ["weather", "time"]), list[Any]()
    for place in range(0, len(text), size):
        found += reader.feed(text[place : place + size])
    found += reader.end()
    return "".join(x for x in found if isinstance(x, str)), [x for x in found if isinstance(x, Call)]


SEA, RIVER = Call("weather", '{"at": "sea"}'), Call("time", '{"at": "<tool_call>"}')
BODY, OTHER = '{"name": "weather", "arguments": {"at": "sea"}}', '{"name": "time", "arguments": {"at": "<tool_call>"}}'
TWO = f"<tool_call>{BODY}</tool_call>\n<tool_call>\n{OTHER}</tool_call>"
UNKNOWN = '<tool_call>\n{"name": "none", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("form", "text", "said", "calls"),
    [
        (HERMES, f"<tool_call>\n{BODY}\n</tool_call>", "", [SEA]),
        (HERMES, f"Let me see.\n{TWO}", "Let me see.", [SEA, RIVER]),
        (HERMES, "No calls, a < b and <tool.", "No calls, a < b and <tool.", []),
        (HERMES, f"<tool_call>\n{BODY[:-9]}", f"<tool_call>\n{BODY[:-9]}", []),
        (HERMES, UNKNOWN, UNKNOWN, []),
        (HERMES, "", "", []),
        (LLAMA, BODY.replace("arguments", "parameters"), "", [SEA]),
        (LLAMA, '{"river": "Elbe"}', '{"river": "Elbe"}', []),
        (LLAMA, "The set {a}.", "The set {a}.", []),
        (MISTRAL, f"[TOOL_CALLS][{BODY}, {OTHER}]", "", [SEA, RIVER]),
        (MISTRAL, f"[TOOL_CALLS] {BODY}", "", [SEA]),
    ],
)  # fmt: skip
def test_calls_are_read_however_they_are_cut(
    form: CallFormat, text: str, said: str, calls: list[Call], size: int
) -> None:
    found, made = read(form, text, size)
    assert (found.strip(), made) == (said.strip(), calls)


# --- tokens and grammars


@pytest.fixture(scope="module")
def vocabulary(embedded: tuple[Any, Any]) -> Vocabulary:
    return Vocabulary(embedded[1], len(embedded[1]) + 64, [2])


def test_tokens_as_text_bytes_and_places(vocabulary: Vocabulary) -> None:
    text = "Größe: 3 € 🙂 ∮ ok"
    ids = vocabulary.tokenizer(text)["input_ids"]
    assert b"".join(vocabulary.bytes(id) for id in ids) == text.encode()
    parts = [vocabulary.text(id) for id in ids]
    assert any(part.startswith("bytes:\\x") for part in parts)  # of the integral sign, which is no token by itself
    offsets = vocabulary.offsets()
    found = offsets.of([1, *ids[:3]]) + offsets.of(ids[3:])
    assert found[:2] == [0, 0]
    for id, place in zip(ids, found[1:], strict=True):
        part = vocabulary.text(id)
        assert part.startswith("bytes:") or text[place:].startswith(part)
    assert isinstance(vocabulary.bytes(vocabulary.size - 1), bytes)  # a row of the model's that is no token
    assert vocabulary.shows("<tool_call>")
    assert not vocabulary.shows("<|im_start|>")


def follow(vocabulary: Vocabulary, grammar: Any, seed: int, most: int = 400) -> str | None:
    """A random text that the grammar allows, ended as soon as that is allowed; None where it never was."""
    generator, matcher, made = torch.Generator().manual_seed(seed), grammar.matcher(), list[int]()
    for _ in range(most):
        logits = matcher.mask(torch.rand(vocabulary.size, generator=generator))
        token = 2 if logits[2] > -torch.inf else int(logits.argmax())
        matcher.accept(token)
        if token == 2:
            return vocabulary.tokenizer.decode(made)
        made.append(token)
    return None


AGES = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3}
PLACE = {
    "type": "object",
    "properties": {"at": {"enum": ["sea", "river"]}},
    "required": ["at"],
    "additionalProperties": False,
}


def test_texts_that_follow_a_grammar(vocabulary: Vocabulary) -> None:
    schema: Any = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "ages": AGES},
        "required": ["name", "ages"], "additionalProperties": False,
    }  # fmt: skip
    grammar = vocabulary.of_schema(schema, "response_format")
    texts = [text for seed in range(8) if (text := follow(vocabulary, grammar, seed)) is not None]
    assert len(texts) >= 6
    for text in texts:
        jsonschema.validate(json.loads(text), schema)
    assert follow(vocabulary, vocabulary.of_regex("[ab]{3}-(x|y)", "response_format.pattern"), 0)[3:4] == "-"


def test_forced_calls_are_calls(vocabulary: Vocabulary) -> None:
    tools = [
        Tool.model_validate({"type": "function", "function": {"name": name, "parameters": PLACE}})
        for name in ("weather", "time")
    ]  # fmt: skip
    for form in (HERMES, LLAMA, MISTRAL):
        grammar = vocabulary.of_calls(*form.around, [form.schema(tool) for tool in tools])
        said, calls = read(form, follow(vocabulary, grammar, 3) or "", 3)
        assert not said.strip()
        assert len(calls) == 1
        assert json.loads(calls[0].arguments)["at"] in ("sea", "river")


@pytest.mark.parametrize(
    "schema",
    [{"type": "nonsense"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "(a"}, {"not": {"type": "string"}},
     {"anyOf": []}, {"type": "string", "pattern": "(?=a)b"}],
)  # fmt: skip
def test_schemas_that_cannot_be_generated_are_refused(vocabulary: Vocabulary, schema: Any) -> None:
    with pytest.raises(ApiError, match="cannot be generated") as caught:
        vocabulary.of_schema(schema, "response_format.json_schema.schema")
    assert caught.value.param == "response_format.json_schema.schema"
    assert "\n" not in caught.value.message


def test_a_token_that_was_not_allowed_ends_the_text(vocabulary: Vocabulary) -> None:
    matcher = vocabulary.of_regex("a", "pattern").matcher()
    with pytest.raises(Unfollowable):
        matcher.accept(vocabulary.tokenizer("b")["input_ids"][0])


def test_a_tokenizer_that_llguidance_does_not_read() -> None:
    """Its tokens are still told; what needs a grammar is refused."""
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>"), 3, [2])
    assert vocabulary.bytes(1) == b"b"
    with pytest.raises(ApiError, match="this model's is none") as caught:
        vocabulary.of_regex("a", "response_format.pattern")
    assert (caught.value.param, caught.value.code) == ("response_format.pattern", "unsupported_parameter")
