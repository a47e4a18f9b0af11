"""A chat over one KV cache: later turns prefill what is new, and say what encoding everything anew would say."""

from __future__ import annotations

from typing import Any

import pytest
from test_mistakes import characters
from tiny_models import plan_of, tiny

from coreskip import CoreskipError, Engine
from coreskip.runtime.conversation import Conversation

PLAIN = (
    "{% for m in messages %}{{ m['role'][0] + m['content'] + '~' }}{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
#: Rewrites the past, as templates do that drop earlier thoughts: of answers before the last message nothing stays.
FORGETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'u' + m['content'] + '~' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
#: Without what has no text, such as special tokens: a template could not give it back.
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [0, 1, 2, 3]}


def talkative(family: str, **overrides: Any) -> Any:
    """A model whose vocabulary is the tokenizer's."""
    return tiny(family, vocab_size=99, **overrides)


@pytest.mark.parametrize("family", ["llama", "opt", "mistral"])
@pytest.mark.parametrize("kind", [None, "static", "griffin"])
def test_later_turns_reuse_the_cache(family: str, kind: str | None) -> None:
    """Mistral's layers see 8 tokens far: what they have let go of cannot be cut, but can be gone on from."""
    model = talkative(family)
    with Engine(model, characters(PLAIN), None if kind is None else plan_of(model, kind)) as engine:
        talk = Conversation(engine, system="be", **GREEDY)
        turns = []
        for text in ("abc", "why", "so it is"):
            answer = "".join(talk.send(text))
            assert engine.figures is not None
            turns.append((talk.reused, engine.figures.prompt_tokens))
            if kind is None:  # else what a plan has made of the past is not what a dense prefill makes of it
                assert answer == engine.generate(talk.messages[:-1], **GREEDY)
        # all of the turn before but its last token, which was made and not run
        assert [reused for reused, _ in turns] == [0, turns[0][1] + 6 - 1, turns[1][1] + 6 - 1]
        assert [m["role"] for m in talk.messages] == ["system", *["user", "assistant"] * 3]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_template_that_rewrites_the_past(family: str) -> None:
    with Engine(talkative(family), characters(FORGETS)) as engine:
        talk = Conversation(engine, **GREEDY)
        "".join(talk.send("a long first message"))
        answer = "".join(talk.send("why"))
        common = len("ua long first message~")
        assert talk.reused == (common if family == "llama" else 0)
        assert answer == engine.generate(talk.messages[:-1], **GREEDY)


def test_neurons_that_were_chosen_by_what_is_gone_are_chosen_anew() -> None:
    model = talkative("llama")
    with Engine(model, characters(FORGETS), plan_of(model, "griffin")) as engine:
        talk = Conversation(engine, **GREEDY)
        "".join(talk.send("first"))
        answer = "".join(talk.send("why"))
        assert talk.reused == 0
        assert answer == engine.generate(talk.messages[:-1], **GREEDY)


def test_an_answer_that_is_stopped() -> None:
    with Engine(talkative("llama"), characters(PLAIN)) as engine:
        long = {**GREEDY, "max_new_tokens": 60, "suppress_tokens": [*range(4), *range(9, 99)]}  # spaces end pieces
        talk = Conversation(engine, **long)
        answer = talk.send("abc")
        first = next(answer) + next(answer)
        answer.close()
        assert talk.messages[-1] == {"role": "assistant", "content": first}
        again = "".join(talk.send("go on"))
        assert talk.reused >= len("uabc~a")
        assert again == engine.generate(talk.messages[:-1], **long)
        unread = talk.send("never read")
        del unread
        assert talk.messages[-1]["content"] == again


def test_mistakes_leave_the_conversation_as_it_was() -> None:
    model = talkative("gpt2", n_positions=32)
    with Engine(model, characters(PLAIN)) as engine:
        talk = Conversation(engine, **GREEDY)
        first = "".join(talk.send("abc"))
        for text, words in (("a" * 40, "model 32 positions"), (" ", "is empty"), ("\udcff", "is not valid text")):
            with pytest.raises(CoreskipError, match=words):
                talk.send(text)
        assert [m["content"] for m in talk.messages] == ["abc", first]
        with pytest.raises(CoreskipError, match="did you mean max_new_tokens"):
            Conversation(engine, max_new_token=3)
    with (
        Engine(talkative("llama"), characters()) as engine,
        pytest.raises(CoreskipError, match="System role not supported"),
    ):
        Conversation(engine, system="be brief")
