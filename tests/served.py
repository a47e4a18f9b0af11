"""A small server for tests: a tiny random llama with the embedded model's tokenizer behind OpenAI's routes."""

from __future__ import annotations

import copy
import json
from typing import Any

import httpx
from tiny_models import tiny

from coreskip import Engine
from coreskip.runtime.serve import Limits, Server, served_models

#: How Qwen's and Hermes' templates write tools and calls.
TOOLS_TEMPLATE = """{%- if tools %}<|im_start|>system
Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

MESSAGES = [{"role": "user", "content": "Name a river."}]


def with_template(tokenizer: Any, template: str | None) -> Any:
    """A copy of the tokenizer with another chat template, or with none."""
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = template
    return copied


def small_model(tokenizer: Any) -> Any:
    return tiny("llama", vocab_size=len(tokenizer), eos_token_id=2, max_position_embeddings=512)


def server_of(engine: Engine, names: list[tuple[str, str | None]] | None = None, **limits: Any) -> Server:
    return Server(served_models(engine, names or [("tiny", None), ("exact", "dense")], None), Limits(**limits))


def client_of(server: Server, **options: Any) -> httpx.AsyncClient:
    """A client of the application in this process; what the server fails on is a response, too."""
    transport = httpx.ASGITransport(app=server.app(), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60, **options)


def events(text: str) -> list[Any]:
    """What the events of a stream hold; ``[DONE]`` is None."""
    found = []
    for event in text.split("\n\n"):
        if event:
            assert event.startswith("data: "), event
            data = event.removeprefix("data: ")
            found.append(None if data == "[DONE]" else json.loads(data))
    return found
