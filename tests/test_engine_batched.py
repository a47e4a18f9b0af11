"""An engine's calls through its scheduler: texts, streams, asyncio; as without one, and beside each other."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from byte_texts import Bytes, bytes_model, ids, in_threads, settles

from coreskip import Engine
from coreskip.kernels.ops import available
from coreskip.runtime.native import NativeSequence
from coreskip.runtime.sequence import Request, Ticket

OPTIONS: tuple[dict[str, Any], ...] = (
    {"do_sample": False},
    {"do_sample": False, "repetition_penalty": 1.7, "min_new_tokens": 5},
    {"do_sample": False, "no_repeat_ngram_size": 2},
    {"do_sample": True, "seed": 7, "temperature": 1.4, "top_k": 20},
    {"do_sample": False, "num_beams": 2},
    {"do_sample": False, "stop_strings": "e"},
    {"do_sample": False, "bad_words_ids": [[101], [102, 103]]},
)


def test_calls_give_what_they_give_without_a_scheduler() -> None:
    model, texts = bytes_model(), ["hello there", "a", "something longer than the others"]
    with Engine(model, Bytes()) as made:
        expected = [[made.generate(t, max_new_tokens=10, **options) for t in texts] for options in OPTIONS]
    with Engine(model, Bytes(), max_batch=3) as made:
        found: list[Any] = [None] * len(OPTIONS)

        def run(i: int) -> None:
            found[i] = [made.generate(text, max_new_tokens=10, **OPTIONS[i]) for text in texts]

        in_threads(run, len(OPTIONS))
        assert found == expected
        assert ["".join(made.stream(t, max_new_tokens=10, **OPTIONS[0])) for t in texts] == expected[0]
        assert made.generate(texts, max_new_tokens=10, do_sample=False) == expected[0]
        two = made.generate(texts[:2], max_new_tokens=4, do_sample=True, num_return_sequences=3, seed=1)
        assert [len(group) for group in two] == [3, 3]
        assert two == made.generate(texts[:2], max_new_tokens=4, do_sample=True, num_return_sequences=3, seed=1)
        assert made.figures is not None
        assert made.figures.new_tokens == 24


@pytest.mark.parametrize("batch", [None, 3])
def test_asyncio(batch: int | None) -> None:
    texts = ["hello there", "a", "something longer than the others"]
    with Engine(bytes_model(), Bytes(), max_batch=batch) as made:
        expected = [made.generate(text, max_new_tokens=12, do_sample=False) for text in texts]

        async def stream(text: str) -> str:
            return "".join([piece async for piece in made.astream(text, max_new_tokens=12, do_sample=False)])

        async def run() -> tuple[list[str], Any]:
            streams = await asyncio.gather(*map(stream, texts))
            return streams, await made.agenerate(texts, max_new_tokens=12, do_sample=False)

        assert asyncio.run(run()) == (expected, expected)


def test_what_nobody_waits_for_any_more_stops() -> None:
    with Engine(bytes_model(), Bytes(), max_batch=2) as made:

        async def cancelled() -> None:
            task = asyncio.create_task(made.agenerate("abc", max_new_tokens=900, do_sample=False))
            await asyncio.sleep(0.3)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        async def closed() -> None:
            stream = made.astream("abc", max_new_tokens=900, do_sample=False)
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]

        asyncio.run(cancelled())
        asyncio.run(closed())
        stream = made.stream("abc", max_new_tokens=900, do_sample=False)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        settles(lambda: made.load().running == 0)
        assert made.load().decode_tokens < 3 * 890


def test_a_reader_that_is_gone_blocks_nobody() -> None:
    with Engine(bytes_model(), Bytes(), max_batch=2) as engine:
        _leave(engine)


def _leave(engine: Engine) -> None:
    async def ask() -> Ticket:
        ticket = engine.submit(Request(ids(5, 1), 30))
        await anext(ticket)
        return ticket

    left = asyncio.run(ask())  # its loop is closed, and it is not read any more
    assert engine.submit(Request(ids(5, 2), 40)).collect().finish == "length"
    assert left.collect().finish == "length"


@pytest.mark.skipif(available("cpu") is not None, reason="needs the compiled kernels")
def test_who_comes_ends_a_call_of_several_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(bytes_model(), Bytes(), max_batch=4, prefill_chunk=64, prompt_bytes=0) as engine:
        first, second = Request(ids(5, 0), 64), Request(ids(6, 1), 8)
        expected = [engine.submit(request).collect().tokens for request in (first, second)]
        together, came, sizes = NativeSequence.greedy_together, list[Any](), list[int]()

        def visited(*arguments: Any) -> list[list[int]]:
            if not came:
                came.append(engine.submit(second))
            found = together(*arguments)
            sizes.append(len(found[0]))
            return found

        monkeypatch.setattr(NativeSequence, "greedy_together", visited)
        assert engine.submit(first).collect().tokens == expected[0]
        assert came[0].collect().tokens == expected[1]
        assert sizes[0] == 1
        assert max(sizes) > 4
