"""The serving API on the embedded model: texts, chats, batches, streams, stop strings, seeds, threads."""

from __future__ import annotations

import gc
import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import NoTokenizer, plan_of, prompt, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LogitsProcessorList, PreTrainedTokenizerFast

import coreskip
from coreskip import CoreskipError, Engine
from coreskip.kernels.ops import available
from coreskip.predictors.calibration import TokenText
from coreskip.runtime.alone import _Streamer
from coreskip.runtime.stop_strings import overlap, stop_before
from coreskip.runtime.wrap import is_wrapped, runtime_of

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
    assert "".join(stop_before(iter(pieces), stops)) == expected


def testoverlap() -> None:
    assert overlap("abc", "cd") == 1
    assert overlap("abc", "bcd") == 2
    assert overlap("abc", "x") == 0


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
    put = _Streamer.put
    monkeypatch.setattr(_Streamer, "put", lambda self, tokens: (put(self, tokens), made.append(tokens.numel()))[0])
    stream = engine.stream(PROMPTS[0], max_new_tokens=2000, do_sample=False)
    next(stream)
    stream.close()
    assert not [t for t in threading.enumerate() if t.name == "coreskip-stream"]
    assert sum(made) < 1000


def test_a_failure_in_the_stream_is_raised_to_its_consumer(engine: Engine) -> None:
    def fails(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("of the user's own")

    with pytest.raises(ArithmeticError, match="own"):
        list(engine.stream(PROMPTS[0], max_new_tokens=4, logits_processor=LogitsProcessorList([fails])))


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


# --- what wraps the model, and for how long


def test_an_engine_without_a_plan_runs_the_fast_dense_path(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = NoTokenizer()
    engine = Engine(llama, tokenizer)
    assert runtime_of(llama).plan.keep == 1.0
    engine.generate("a", max_new_tokens=3)
    assert runtime_of(llama).steps.native.ready == (available("cpu") is None)
    engine.close()
    assert not is_wrapped(llama)
    plain = Engine(llama, tokenizer, plain=True)
    plain.generate("a", max_new_tokens=3)
    assert not is_wrapped(llama)
    llama.model.layers[0].mlp._hf_hook = object()  # as accelerate leaves it: `wrap` refuses
    with caplog.at_level(logging.INFO, "coreskip"):
        Engine(llama, tokenizer).generate("a", max_new_tokens=3)
    assert "runs on plain transformers: the model is spread over devices" in caplog.text
    assert not is_wrapped(llama)
    with pytest.raises(CoreskipError, match="spread over devices"):
        Engine(llama, tokenizer, weights="int8")


def test_an_engine_that_nobody_holds_unwraps(llama: Any) -> None:
    tokenizer, plan = NoTokenizer(), plan_of(llama, "static")
    for settings in ((), (plan,)):
        engine = Engine(llama, tokenizer, *settings)
        engine.generate("a", max_new_tokens=3)
        assert is_wrapped(llama)
        del engine
        gc.collect()
        assert not is_wrapped(llama)


def test_engines_with_the_same_settings_share_a_wrapping(llama: Any, tmp_path: Path) -> None:
    tokenizer, plan = NoTokenizer(), plan_of(llama, "static")
    plan.save(tmp_path / "my.plan")
    one = Engine(llama, tokenizer, plan)
    runtime = runtime_of(llama)
    two, three = Engine(llama, tokenizer, tmp_path / "my.plan"), Engine(llama, tokenizer)
    assert runtime_of(llama) is runtime
    with pytest.raises(CoreskipError, match=r"with other settings: close that one first \(engine.close\(\)"):
        Engine(llama, tokenizer, plan, weights="int8")
    for engine in (one, two, three):
        assert is_wrapped(llama)
        engine.close()
        engine.close()
    assert not is_wrapped(llama)
    first = Engine(llama, tokenizer, plan)
    coreskip.unwrap(llama)
    with coreskip.wrap(llama, plan):
        first.close()
        assert is_wrapped(llama), "the caller's own"


def test_weights_that_are_gone_are_taken_over(llama: Any) -> None:
    settings: dict[str, Any] = {"weights": "int8", "keep_originals": False}
    with Engine(llama, NoTokenizer(), **settings):
        runtime = runtime_of(llama)
    assert is_wrapped(llama) == (not runtime.removable)
    with Engine(llama, NoTokenizer(), **settings) as engine:
        engine.generate("a", max_new_tokens=2)


def test_an_engine_without_settings_gives_way(llama: Any) -> None:
    """To whoever wraps, analyses or evaluates the model; its next call wraps again."""
    tokenizer, plan = NoTokenizer(), plan_of(llama, "static")
    engine = Engine(llama, tokenizer)
    with coreskip.wrap(llama, plan):
        engine.generate("a", max_new_tokens=2)
        assert runtime_of(llama).plan is plan
    assert not is_wrapped(llama)
    engine.generate("a", max_new_tokens=2)
    assert runtime_of(llama).plan.keep == 1.0
    with Engine(llama, tokenizer, plan):
        assert runtime_of(llama).plan is plan
    engine.generate("a", max_new_tokens=2)
    text = TokenText(prompt(1, 300)[0], torch.tensor([], dtype=torch.int64), "letters")
    coreskip.evaluate(llama, tokenizer, plan, text, windows=1, window=32, progress=False)
    assert not is_wrapped(llama)
    engine.generate("a", max_new_tokens=2)
    assert is_wrapped(llama)


@pytest.mark.skipif(available("cpu") is not None, reason="no kernel reads int8")
def test_weights_on_top_of_a_plan(embedded: tuple[Any, Any]) -> None:
    model, tokenizer = embedded
    for plan in (None, plan_of(model, "static")):
        with Engine(model, tokenizer, plan, weights="int8") as engine:
            assert runtime_of(model).plan.weights == "int8"
            text = engine.generate(PROMPTS[0], max_new_tokens=8, do_sample=False)
        with coreskip.wrap(model, replace(plan or coreskip.Plan.dense(model), weights="int8")):
            assert Engine(model, tokenizer).generate(PROMPTS[0], max_new_tokens=8, do_sample=False) == text


def test_figures(engine: Engine) -> None:
    list(engine.stream(PROMPTS[0], max_new_tokens=6, do_sample=False))
    found = engine.figures
    assert found is not None
    assert found.prompt_tokens == len(engine.tokenizer(PROMPTS[0]).input_ids)
    assert found.new_tokens == 6
    assert found.first_token_s is not None
    assert 0 < found.first_token_s < found.seconds
    assert found.tokens_per_second == pytest.approx(5 / (found.seconds - found.first_token_s))
    engine.generate(PROMPTS[0], max_new_tokens=6, do_sample=True, num_return_sequences=2)
    assert engine.figures is not None
    assert (engine.figures.new_tokens, engine.figures.first_token_s) == (12, None)


def test_a_temperature_of_zero_is_greedy(engine: Engine) -> None:
    greedy = engine.generate(PROMPTS[0], max_new_tokens=6, do_sample=False)
    assert engine.generate(PROMPTS[0], max_new_tokens=6, temperature=0) == greedy
    assert engine.generate(PROMPTS[0], max_new_tokens=6, temperature=0.0, do_sample=True) == greedy


def test_stop_strings_of_a_vocabulary_of_whole_words() -> None:
    words = ["<unk>", "the", "sea", "was", "calm", "that", "day", "and", "ships", "lay", "still"]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    model = tiny("llama", vocab_size=len(words), pad_token_id=None, bos_token_id=None)
    with Engine(model, tokenizer) as made:
        options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
        whole = made.generate("the sea was", **options)
        stop = whole.split()[2]
        expected = whole[: whole.index(stop)]
        assert made.generate("the sea was", stop_strings=stop, **options) == expected
        assert made.figures is not None
        assert made.figures.new_tokens < 20
        assert "".join(made.stream("the sea was", stop_strings=stop, **options)) == expected
