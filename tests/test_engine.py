"""The serving API on the embedded model: texts, chats, batches, streams, stop strings, seeds, threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tiny_models import plan_of

import coreskip
from coreskip import CoreskipError, Engine
from coreskip.runtime.engine import _overlap, _Pieces, _stop_before
from coreskip.runtime.wrap import is_wrapped

PROMPTS = [
    "The sea was calm that morning, and the boats lay still beside the pier while",
    "A recipe for bread needs flour, water, salt and",
    "Water boils at one hundred degrees because",
]


@pytest.fixture
def engine(embedded: tuple[Any, Any]) -> Any:
    model, tokenizer = embedded
    with Engine(model, tokenizer, plan_of(model, "griffin", keep=0.7)) as made:
        yield made


def test_generate_equals_the_wrapped_models_own(engine: Engine) -> None:
    inputs = engine.tokenizer(PROMPTS[0], return_tensors="pt")
    output = engine.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    expected = engine.tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert engine.generate(PROMPTS[0], max_new_tokens=12, do_sample=False) == expected
    assert "".join(engine.stream(PROMPTS[0], max_new_tokens=12, do_sample=False)) == expected


def test_batches(engine: Engine) -> None:
    """Rows of a left-padded batch give what they give alone, up to a near-tie that padding may turn."""
    texts = engine.generate(PROMPTS, max_new_tokens=8, do_sample=False)
    alone = [engine.generate(prompt, max_new_tokens=8, do_sample=False) for prompt in PROMPTS]
    assert texts == alone
    two = engine.generate(PROMPTS[:2], max_new_tokens=4, do_sample=True, num_return_sequences=3, seed=1)
    assert [len(group) for group in two] == [3, 3]
    assert len(engine.generate(PROMPTS[0], max_new_tokens=4, num_beams=2, num_return_sequences=2)) == 2
    assert engine.tokenizer.padding_side == "right"


def test_chat(engine: Engine) -> None:
    chat = [{"role": "user", "content": "Name a colour."}]
    rendered = engine.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert engine.generate(chat, max_new_tokens=6, do_sample=False) == engine.generate(
        rendered, max_new_tokens=6, do_sample=False
    )
    assert len(engine.generate([chat, chat], max_new_tokens=3, do_sample=False)) == 2


def test_stop_strings_end_text_and_stream_alike(engine: Engine) -> None:
    whole = engine.generate(PROMPTS[0], max_new_tokens=16, do_sample=False)
    stop = whole.split()[3]
    expected = whole[: whole.index(stop)]
    assert engine.generate(PROMPTS[0], max_new_tokens=16, do_sample=False, stop_strings=stop) == expected
    assert "".join(engine.stream(PROMPTS[0], max_new_tokens=16, do_sample=False, stop_strings=[stop])) == expected


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["ab", "cd", "ef"], ["de"], "abc"),
        (["ab", "cd"], [], "abcd"),
        (["a", "a", "b"], ["aab"], ""),
        (["a", "a", "a", "c"], ["aab"], "aaac"),
        (["xy", "END", "z"], ["END", "y"], "x"),
    ],
)
def test_streams_hold_back_what_may_be_a_stop_string(pieces: list[str], stops: list[str], expected: str) -> None:
    assert "".join(_stop_before(iter(pieces), stops)) == expected


def test_overlap() -> None:
    assert _overlap("abc", "cd") == 1
    assert _overlap("abc", "bcd") == 2
    assert _overlap("abc", "x") == 0


def test_seeds(engine: Engine) -> None:
    def sample(seed: int) -> str:
        return engine.generate(PROMPTS[1], max_new_tokens=8, do_sample=True, temperature=1.5, seed=seed)

    state = torch.get_rng_state()
    assert sample(1) == sample(1) != sample(2)
    assert torch.equal(torch.get_rng_state(), state)
    streamed = engine.stream(PROMPTS[1], max_new_tokens=8, do_sample=True, temperature=1.5, seed=1)
    assert "".join(streamed) == sample(1)


def test_two_threads_get_what_they_would_get_alone(engine: Engine) -> None:
    def run(i: int) -> str:
        if i == 2:
            return "".join(engine.stream(PROMPTS[2], max_new_tokens=10, do_sample=True, seed=7))
        return engine.generate(PROMPTS[i], max_new_tokens=10, do_sample=False)

    alone = [run(i) for i in range(3)]
    together = ["", "", ""]
    threads = [threading.Thread(target=lambda i=i: together.__setitem__(i, run(i))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_an_abandoned_stream_stops_generating(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    put = _Pieces.put
    monkeypatch.setattr(_Pieces, "put", lambda self, tokens: (put(self, tokens), made.append(tokens.numel()))[0])
    stream = engine.stream(PROMPTS[0], max_new_tokens=2000, do_sample=False)
    next(stream)
    stream.close()
    assert not [t for t in threading.enumerate() if t.name == "coreskip-stream"]
    assert sum(made) < 1000


def test_a_failure_in_the_stream_is_raised_to_its_consumer(engine: Engine) -> None:
    with pytest.raises(ValueError, match="nonsense"):
        list(engine.stream(PROMPTS[0], max_new_tokens=4, nonsense=1))


def test_mistakes(engine: Engine, embedded: tuple[Any, Any]) -> None:
    model, tokenizer = embedded
    for call, match in (
        (lambda: engine.generate(""), "empty"),
        (lambda: engine.generate([]), "no prompt"),
        (lambda: engine.generate([{"role": "user"}]), '"content"'),
        (lambda: engine.generate(["text", [{"role": "user", "content": "x"}]]), "not both"),
        (lambda: engine.stream(PROMPTS), "one prompt"),
        (lambda: engine.stream(PROMPTS[0], num_beams=2), "one sequence"),
        (lambda: engine.stream(PROMPTS[0], streamer=object()), "streamer of its own"),
        (lambda: engine.generate("x", stop_strings=""), None),
        (lambda: engine.generate("x", stop_strings=["a", ""]), "stop string is empty"),
        (lambda: Engine(model, tokenizer, plan_of(model, "static")), "wrapped already"),
    ):
        if match is None:
            assert isinstance(call(), str)
        else:
            with pytest.raises(CoreskipError, match=match):
                call()


def test_close_unwraps_only_what_it_wrapped(embedded: tuple[Any, Any]) -> None:
    model, tokenizer = embedded
    plan = plan_of(model, "static")
    with coreskip.wrap(model, plan):
        Engine(model, tokenizer).close()
        assert is_wrapped(model)
    with Engine(model, tokenizer, plan):
        assert is_wrapped(model)
    assert not is_wrapped(model)
