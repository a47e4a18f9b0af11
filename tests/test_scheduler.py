"""Many requests on one model: each gets what it gets alone, whoever comes, goes or fails beside it."""

from __future__ import annotations

import _thread
import gc
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from byte_texts import Bytes, alone, bytes_model, ids, in_threads, settles
from tiny_models import plan_of, tiny
from transformers import DynamicCache, LogitsProcessorList

import coreskip
from coreskip import CoreskipError, Engine
from coreskip.kernels.ops import available
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import Sketch
from coreskip.runtime.pieces import Pieces
from coreskip.runtime.sequence import Busy, Event, Request
from coreskip.runtime.wrap import is_wrapped, runtime_of

needs_kernels = pytest.mark.skipif(available("cpu") is not None, reason="needs the compiled kernels")


def plan(model: Any, kind: str) -> Plan | None:
    dense = Plan.dense(model)
    if kind == "sketch":
        return Plan(tuple(LayerPlan(Sketch(bits=4, keep=0.5)) for _ in dense.layers), dense.model, {"method": kind})
    if kind in ("int4", "int8"):
        return Plan.dense(model, kind)
    return None if kind in ("dense", "plain") else plan_of(model, kind)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(bytes_model(), Bytes(), max_batch=4, prefill_chunk=64, prompt_bytes=0) as made:
        yield made


# --- beside others as alone


@pytest.mark.parametrize("kind", ["dense", "int4", "static", "griffin", "sketch", "plain"])
def test_random_arrivals_and_cancels_change_no_text(kind: str) -> None:
    """Prompts within one chunk: their texts are those of generate without a scheduler, too."""
    model, generator = bytes_model(), random.Random(kind)
    with Engine(model, Bytes(), plan(model, kind), plain=kind == "plain", max_batch=5) as made:
        requests = [
            Request(
                ids(generator.choice((1, 7, 40, 130)), seed),
                generator.randint(1, 24),
                stop_ids=tuple(generator.sample(range(256), generator.choice((0, 0, 8)))),
            )
            for seed in range(24)
        ]
        expected = [alone(model, request) for request in requests]
        found, cancelled = _all_at_once(made, requests, generator)
    for request, event, whole, gone in zip(requests, found, expected, cancelled, strict=True):
        if event.finish == "cancelled":
            assert gone
            assert event.tokens == whole[: len(event.tokens)]
        else:
            assert event.tokens == whole
            assert event.finish == ("stop" if whole[-1] in request.stop_ids else "length")
            assert event.text == Bytes().decode(whole[:-1] if whole[-1] in request.stop_ids else whole)


def _all_at_once(made: Engine, requests: list[Request], generator: random.Random) -> tuple[list[Event], list[bool]]:
    found: list[Any] = [None] * len(requests)
    cancelled = [generator.random() < 0.2 for _ in requests]
    delays = [generator.uniform(0, 0.4) for _ in requests]

    def run(i: int) -> None:
        time.sleep(delays[i])
        ticket = made.submit(requests[i])
        if cancelled[i]:
            time.sleep(delays[-i] / 10)
            ticket.cancel()
        found[i] = ticket.collect()

    in_threads(run, len(requests))
    return found, cancelled


@needs_kernels
def test_long_prompts_are_read_in_chunks_between_steps() -> None:
    model = bytes_model()
    request, long = Request(ids(5, 1), 200), Request(ids(400, 2), 12)
    with Engine(model, Bytes(), max_batch=4, prefill_chunk=32, prompt_bytes=0) as made:
        expected = [made.submit(r).collect().tokens for r in (request, long)]
        first = made.submit(request)
        next(first)
        seen = _sizes_of_steps(made)
        second = made.submit(long)
        assert [first.collect().tokens, second.collect().tokens] == [expected[0][1:], expected[1]]
        assert first.timings.done is not None
        # 13 chunks, and a step of the other sequence after each but the last
        assert seen.count(1) >= 12
        assert alone(model, long) == expected[1]


@needs_kernels
def test_native_steps_are_shared(engine: Engine) -> None:
    engine.submit(Request(ids(5, 0), 4)).collect()  # proves the native step
    seen = _sizes_of_steps(engine)
    tickets = [engine.submit(Request(ids(5 + i, i), 30)) for i in range(4)]
    for ticket in tickets:
        ticket.collect()
    assert any(size % 4 == 0 for size in seen)
    settles(lambda: engine.load().decode_tokens == 3 + 4 * 29)  # a step is counted when its tokens are out
    load = engine.load()
    assert load.batch_sizes[4] > 5
    assert load.prefill_tokens == 5 + 5 + 6 + 7 + 8
    assert (load.running, load.waiting, load.kv_bytes) == (0, 0, 0)


def _sizes_of_steps(engine: Engine) -> list[int]:
    native, seen = runtime_of(engine.model).steps.native, list[int]()
    count = native._count
    native._count = lambda tokens, skipped: (count(tokens, skipped), seen.append(tokens))[0]
    return seen


@needs_kernels
def test_a_sequence_alone_makes_several_tokens_a_call(engine: Engine) -> None:
    engine.submit(Request(ids(5, 0), 8)).collect()
    seen = _sizes_of_steps(engine)
    engine.submit(Request(ids(5, 0), 64)).collect()
    assert sum(seen) == 63
    assert max(seen) > 4


@needs_kernels
def test_sequences_together_make_several_tokens_a_call(engine: Engine) -> None:
    """Where all take the likeliest tokens and no prompt waits to be read; who ends first ends the call."""
    requests = [Request(ids(5 + i, i), most) for i, most in enumerate((64, 41, 64))]
    expected = [engine.submit(request).collect().tokens for request in requests]
    seen = _sizes_of_steps(engine)
    found = [ticket.collect().tokens for ticket in [engine.submit(request) for request in requests]]
    assert found == expected
    assert max(seen) > 2 * len(requests)
    assert sum(seen) == sum(request.max_new_tokens for request in requests) - len(requests)


@needs_kernels
def test_one_that_draws_keeps_others_at_single_tokens(engine: Engine) -> None:
    greedy, drawn = Request(ids(5, 0), 40), Request(ids(6, 1), 40, temperature=1.0, seed=3)
    expected = [engine.submit(request).collect().tokens for request in (greedy, drawn)]
    assert [t.collect().tokens for t in [engine.submit(greedy), engine.submit(drawn)]] == expected


@pytest.mark.parametrize("family", ["apertus", "bitnet"])
def test_models_that_native_steps_do_not_cover_take_turns(family: str) -> None:
    model = tiny(family, vocab_size=256)
    requests = [Request(ids(4 + i, i), 10) for i in range(5)]
    with Engine(model, Bytes(), max_batch=3) as made:
        tickets = [made.submit(request) for request in requests]
        found = [ticket.collect().tokens for ticket in tickets]
        assert found == [alone(model, request) for request in requests]


@needs_kernels
@pytest.mark.parametrize("kind", ["static", "int4"])
def test_the_dense_lane_leaves_nothing_out(kind: str) -> None:
    model = bytes_model()
    request = Request(ids(30, 3), 20)
    dense = alone(model, request)
    chosen = plan_of(model, kind, keep=0.3) if kind == "static" else plan(model, kind)
    with Engine(model, Bytes(), chosen, keep_originals=True, max_batch=4) as made:
        sparse = alone(model, request)
        assert sparse != dense
        lanes = [made.submit(Request(ids(30, 3), 20, lane=lane)) for lane in (None, "dense", None, "dense")]
        assert [ticket.collect().tokens for ticket in lanes] == [sparse, dense, sparse, dense]


@needs_kernels
def test_exact_mode_gives_the_dense_models_text_without_drafts() -> None:
    model = bytes_model()
    requests = [Request(ids(20, i), 16) for i in range(3)]
    expected = [alone(model, request) for request in requests]
    with Engine(model, Bytes(), plan_of(model, "static", keep=0.3), exact=True, max_batch=3) as made:
        tickets = [made.submit(request) for request in requests]
        assert [ticket.collect().tokens for ticket in tickets] == expected


@needs_kernels
def test_the_model_may_be_changed_meanwhile() -> None:
    model = bytes_model()
    with Engine(model, Bytes(), max_batch=2) as made:
        tickets = [made.submit(Request(ids(9, i), 400)) for i in range(2)]
        next(tickets[0])
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        assert [len(ticket.collect().tokens) for ticket in tickets] == [399, 400]
        request = Request(ids(9, 5), 12)
        assert made.submit(request).collect().tokens == alone(model, request)


# --- who may run, and who waits


def test_first_come_first_served() -> None:
    with Engine(bytes_model(), Bytes(), max_batch=1) as made:
        tickets = [made.submit(Request(ids(5, i), 6)) for i in range(6)]
        for ticket in tickets:
            ticket.collect()
        starts = [ticket.timings.started for ticket in tickets]
        assert None not in starts
        assert starts == sorted(starts)  # type: ignore[type-var]


def test_a_full_queue_is_busy() -> None:
    with Engine(bytes_model(), Bytes(), max_batch=1, max_waiting=2) as made:
        tickets = [made.submit(Request(ids(5, 0), 900))]
        next(tickets[0])
        tickets += [made.submit(Request(ids(5, i), 5)) for i in range(2)]
        with pytest.raises(Busy, match="2 requests are waiting") as busy:
            made.submit(Request(ids(5, 3), 5))
        assert 1 <= busy.value.retry_after <= 60
        tickets[1].cancel()  # its place in the queue is free at once
        assert tickets[1].collect().finish == "cancelled"
        made.submit(Request(ids(5, 3), 5))
        tickets[0].cancel()
        assert tickets[0].collect().finish == "cancelled"
        assert tickets[2].collect().finish == "length"


def test_nobody_waits_where_there_are_places() -> None:
    with Engine(bytes_model(), Bytes(), max_batch=3, max_waiting=0) as made:
        tickets = [made.submit(Request(ids(5, i), 900)) for i in range(3)]
        with pytest.raises(Busy, match="0 requests are waiting"):
            made.submit(Request(ids(5, 3), 5))
        for ticket in tickets:
            ticket.cancel()


def test_keys_and_values_of_all_that_run_fit_the_memory() -> None:
    model = bytes_model()
    each = 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, their size, bytes
    with Engine(model, Bytes(), max_batch=8, kv_bytes=3 * 128 * each) as made:
        tickets = [made.submit(Request(ids(10, i), 100)) for i in range(6)]
        most = 0
        while not all(ticket.done for ticket in tickets):
            load = made.load()
            most = max(most, load.running)
            assert load.kv_bytes <= load.kv_limit == 3 * 128 * each
        assert most == 3
        assert {ticket.collect().finish for ticket in tickets} == {"length"}
        for most in (500, 10**15):
            with pytest.raises(CoreskipError, match="MB that there are for all"):
                made.submit(Request(ids(10, 0), most))


def test_memory_is_flat() -> None:
    with Engine(bytes_model(), Bytes(), max_batch=4) as made:
        for round_ in range(3):
            assert all(t.collect() for t in [made.submit(Request(ids(20, i), 6)) for i in range(12)])
            while made._batched()._scheduler._running:  # the thread that decodes may be in its last turn
                time.sleep(0.001)
            gc.collect()
            assert not [o for o in gc.get_objects() if isinstance(o, DynamicCache)], round_


# --- what goes wrong stays with whom it went wrong for


class Failing:
    def mask(self, logits: torch.Tensor) -> None:
        pass

    def accept(self, token: int) -> None:
        raise ArithmeticError("of the user's own")


def test_an_error_ends_one_sequence_alone(engine: Engine) -> None:
    good = Request(ids(6, 1), 20)
    expected = engine.submit(good).collect().tokens
    tickets = [engine.submit(good), engine.submit(Request(ids(6, 2), 20, constraint=Failing())), engine.submit(good)]
    events = [ticket.collect() for ticket in tickets]
    assert [event.tokens for event in events] == [expected, [], expected]
    assert (events[1].finish, events[1].error) == ("error", "of the user's own")
    assert isinstance(tickets[1].failure, ArithmeticError)

    def fails(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("another")

    with pytest.raises(ArithmeticError, match="another"):
        engine.generate("abc", max_new_tokens=4, do_sample=False, logits_processor=LogitsProcessorList([fails]))
    with pytest.raises(ArithmeticError, match="another"):
        list(engine.stream("abc", max_new_tokens=4, do_sample=False, logits_processor=LogitsProcessorList([fails])))


def test_closing_ends_everything() -> None:
    model = bytes_model()
    made = Engine(model, Bytes(), max_batch=1)
    tickets = [made.submit(Request(ids(5, i), 900)) for i in range(3)]
    next(tickets[0])
    made.close()
    assert {ticket.collect().finish for ticket in tickets} == {"cancelled"}
    assert not [thread for thread in threading.enumerate() if thread.name == "coreskip-scheduler"]
    with pytest.raises(CoreskipError, match="is closed"):
        made.submit(Request(ids(5, 0), 5))
    assert not is_wrapped(model)


def test_an_interrupt_ends_what_it_waits_for() -> None:
    with Engine(bytes_model(), Bytes(), max_batch=2) as made:
        made.generate("abc", max_new_tokens=3, do_sample=False)
        threading.Timer(0.2, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            made.generate(["abc", "def"], max_new_tokens=3000, do_sample=False)
        settles(lambda: made.load().running == 0)
        assert made.generate("abc", max_new_tokens=3, do_sample=False)


@needs_kernels
def test_an_engine_without_a_plan_gives_way_between_steps() -> None:
    model = bytes_model()
    with Engine(model, Bytes(), max_batch=2) as made:
        tickets = [made.submit(Request(ids(9, i), 600)) for i in range(2)]
        next(tickets[0])
        with coreskip.wrap(model, plan_of(model, "static")):
            for _ in range(10):  # events, of several tokens
                next(tickets[0])
        assert [ticket.collect().finish for ticket in tickets] == ["length", "length"]
        request = Request(ids(9, 5), 12)
        assert made.submit(request).collect().tokens == alone(model, request)


def test_an_engine_that_nobody_holds_ends() -> None:
    model = bytes_model()
    made = Engine(model, Bytes(), max_batch=2)
    made.generate("abc", max_new_tokens=3, do_sample=False)
    del made
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name == "coreskip-scheduler"]
    assert not is_wrapped(model)


# --- what a request asks for


def test_log_probabilities_are_those_of_a_plain_pass(engine: Engine) -> None:
    request = Request(ids(150, 4), 6, logprobs=3, prompt_logprobs=2)
    ticket = engine.submit(request)
    event = ticket.collect()
    text = torch.tensor([[*request.ids, *event.tokens]])
    with torch.no_grad(), coreskip.prefilling():
        expected = engine.model(text).logits[0].float().log_softmax(-1)
    assert ticket.prompt_logprobs is not None
    assert event.logprobs is not None
    assert ticket.prompt_logprobs[0] is None
    found = [*ticket.prompt_logprobs[1:], *event.logprobs]
    assert len(found) == text.shape[1] - 1
    for place, (entry, token) in enumerate(zip(found, text[0, 1:].tolist(), strict=True)):
        assert entry is not None
        assert entry.token == token
        assert entry.logprob == pytest.approx(float(expected[place, token]), abs=1e-3)
        values, tokens = expected[place].topk(len(entry.top))
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-3)
        assert entry.top[0][0] == int(tokens[0])
    assert {len(entry.top) for entry in event.logprobs} == {3}


def test_a_prompts_log_probabilities_alone(engine: Engine) -> None:
    ticket = engine.submit(Request(ids(5, 4), 0, prompt_logprobs=0))
    assert ticket.collect() == Event("", [], None, "length")
    assert [entry is None or entry.top == () for entry in ticket.prompt_logprobs or ()] == [True] * 5
    assert (ticket.usage.prompt_tokens, ticket.usage.completion_tokens) == (5, 0)


def test_seeds(engine: Engine) -> None:
    def run(seed: int, beside: int = 0) -> list[int]:
        others = [engine.submit(Request(ids(9, i), 30, temperature=1.0)) for i in range(beside)]
        found = engine.submit(Request(ids(9, 3), 16, temperature=1.3, top_p=0.9, top_k=50, min_p=0.01, seed=seed))
        tokens = found.collect().tokens
        for other in others:
            other.cancel()
        return tokens

    first = run(1)
    assert first == run(1) == run(1, beside=3) != run(2)
    fresh = [tuple(engine.submit(Request(ids(9, 3), 16, temperature=1.3)).collect().tokens) for _ in range(3)]
    assert len(set(fresh)) == 3


def test_penalties_and_bias(engine: Engine) -> None:
    def run(**options: Any) -> list[int]:
        return engine.submit(Request(ids(9, 3), 24, **options)).collect().tokens

    plain = run()
    assert len(set(run(frequency_penalty=1e4))) == 24
    assert len(set(run(presence_penalty=1e4))) == 24
    assert not set(run(repetition_penalty=1e6)) & set(ids(9, 3))
    assert set(run(logit_bias={65: 1e4})) == {65}
    assert plain[0] not in run(logit_bias={plain[0]: -1e4})
    assert run(repetition_penalty=1.0, presence_penalty=0.0, logit_bias={}) == plain


class Digits:
    """Digits alone, with all that was chosen so far."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        allowed = torch.full_like(logits, float("-inf"))
        allowed[48:58] = 0
        return logits + allowed

    def accept(self, token: int) -> None:
        self.accepted.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_constraints(engine: Engine, temperature: float) -> None:
    constraint = Digits()
    request = Request(ids(9, 3), 12, temperature=temperature, top_p=0.5, constraint=constraint, seed=1)
    event = engine.submit(request).collect()
    assert event.text.isdigit()
    assert constraint.accepted == event.tokens


def test_stop_strings_do_not_leak(engine: Engine) -> None:
    whole = engine.submit(Request(ids(9, 3), 40, logit_bias=dict.fromkeys(range(128, 256), -10000.0))).collect().text
    stop = whole[17:20]
    request = Request(ids(9, 3), 40, logit_bias=dict.fromkeys(range(128, 256), -10000.0), stop=("never there", stop))
    ticket = engine.submit(request)
    events = list(ticket)
    assert "".join(event.text for event in events) == whole[: whole.index(stop)]
    assert events[-1].finish == "stop"
    assert ticket.usage.completion_tokens == whole.index(stop) + len(stop)


def test_text_comes_in_whole_characters() -> None:
    text = "aé€😀́z" * 3
    for stops in ((), ("€😀",), ("z",)):
        pieces = Pieces(Bytes(), stops)
        found = [pieces.add(byte) for byte in text.encode()]
        assert "\ufffd" not in "".join(found)
        expected = text[: text.index(stops[0])] if stops else text
        assert "".join(found) + pieces.end() == expected
    half = Pieces(Bytes())
    assert [half.add(byte) for byte in "é".encode()[:1]] == [""]
    assert half.end() == "\ufffd"


def test_several_tokens_at_once_are_the_same_text() -> None:
    text = "aé€😀́z" * 3
    for size in (2, 3, 5):
        pieces, found = Pieces(Bytes()), ""
        encoded = list(text.encode())
        for at in range(0, len(encoded), size):
            some = encoded[at : at + size]
            whole = pieces.add_all(some)
            found += "".join(map(pieces.add, some)) if whole is None else whole
            assert "\ufffd" not in found
            assert text.startswith(found)
        assert found + pieces.end() == text
    assert Pieces(Bytes(), ["z"]).add_all([97, 98]) is None
    broken = Pieces(Bytes())
    assert broken.add_all(list("aé".encode()[:2])) is None
    assert broken.add(98) == "b"  # nothing was added


def test_end_of_text() -> None:
    model = bytes_model()
    request = Request(ids(9, 3), 20)
    whole = alone(model, request)
    model.generation_config.eos_token_id = whole[5]
    with Engine(model, Bytes(), max_batch=2) as made:
        cut = whole[: whole.index(whole[5]) + 1]
        event = made.submit(request).collect()
        assert (event.tokens, event.finish) == (cut, "stop")
        assert event.text == Bytes().decode(cut[:-1])
        assert made.submit(Request(ids(9, 3), 20, ignore_eos=True)).collect().tokens == whole


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"ids": []}, "ids is empty"),
        ({"ids": [256]}, "ids holds 256"),
        ({"ids": [True]}, "ids holds True"),
        ({"ids": "abc"}, "ids is a str"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"seed": -1}, "seed"),
        ({"stop": ("",)}, "stop"),
        ({"stop": "abc"}, "stop"),
        ({"stop_ids": (999,)}, "stop_ids"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 257}, "prompt_logprobs"),
        ({"lane": "fast"}, "lane"),
        ({"ignore_eos": 1}, "ignore_eos"),
    ],
)
def test_mistakes(engine: Engine, fields: dict[str, Any], match: str) -> None:
    with pytest.raises(CoreskipError, match=match):
        engine.submit(Request(**{"ids": [1, 2], "max_new_tokens": 3, **fields}))


def test_mistakes_of_engines() -> None:
    model = bytes_model()
    for options, match in (
        ({"max_batch": 0}, "max_batch"),
        ({"max_batch": 2, "max_waiting": -1}, "max_waiting"),
        ({"max_batch": 2, "kv_bytes": 0}, "kv_bytes"),
        ({"max_batch": 2, "prefill_chunk": 0}, "prefill_chunk"),
        ({"max_waiting": 2}, "add it, or leave"),
        ({"max_batch": 2, "prompt_bytes": -1}, "prompt_bytes"),
    ):
        with pytest.raises(CoreskipError, match=match):
            Engine(model, Bytes(), **options)  # type: ignore[arg-type]
        assert not is_wrapped(model)
    with Engine(model, Bytes()) as made, pytest.raises(CoreskipError, match="make it with max_batch"):
        made.submit(Request([1], 2))
    learned = tiny("gpt2", vocab_size=256)
    with Engine(learned, Bytes(), max_batch=2) as made, pytest.raises(CoreskipError, match="256 positions"):
        made.submit(Request(ids(200, 1), 100))


# --- prompts that were read before


def test_what_a_prompt_begins_with_is_not_read_again() -> None:
    model = bytes_model()
    system = ids(100, 1)
    requests = [Request([*system, *ids(30 + i, i)], 12) for i in range(3)]
    with Engine(model, Bytes(), max_batch=4, prefill_chunk=32, prompt_bytes=0) as made:
        expected = [made.submit(request).collect().tokens for request in requests]
        assert made.load().cached_tokens == 0
    with Engine(model, Bytes(), max_batch=4, prefill_chunk=32) as made:
        for request, tokens in zip(requests, expected, strict=True):
            assert made.submit(request).collect().tokens == tokens
        assert made.load().cached_tokens == 2 * 96
        again = made.submit(requests[0])
        assert again.collect().tokens == expected[0]
        assert again.usage.cached_tokens == 130
        assert made.load().prefill_tokens == 130 + (131 - 96) + (132 - 96)
        sampled = [made.submit(Request(requests[0].ids, 8, temperature=1.0, seed=4)).collect().tokens for _ in "ab"]
        assert sampled[0] == sampled[1]
        echoed = made.submit(Request(requests[0].ids, 1, prompt_logprobs=0))
        echoed.collect()
        assert len(echoed.prompt_logprobs or ()) == 130
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        changed = made.submit(requests[0])
        assert changed.collect().tokens == alone(model, requests[0])
        assert changed.usage.cached_tokens == 0


def test_kept_prompts_stay_within_their_memory() -> None:
    model = bytes_model()
    each = 2 * 3 * 2 * 16 * 4 * 32  # of a chunk: keys and values, layers, heads, their size, bytes, tokens
    with Engine(model, Bytes(), max_batch=2, prefill_chunk=32, prompt_bytes=4 * each) as made:
        prompts = made._batched()._scheduler._decoder._prompts
        for seed in range(12):
            made.submit(Request(ids(70, seed), 3)).collect()
            assert 0 < prompts.nbytes <= 4 * each
            assert prompts.nbytes == sum(block.nbytes for block in prompts._blocks.values())


@pytest.mark.parametrize(("family", "kind"), [("llama", "griffin"), ("mistral", "dense")])
def test_prompts_that_decide_more_or_are_forgotten_are_read_again(family: str, kind: str) -> None:
    model = bytes_model(family)
    request = Request(ids(60, 1), 12)
    with Engine(model, Bytes(), plan(model, kind), max_batch=2) as made:
        expected = alone(model, request)
        assert [made.submit(request).collect().tokens for _ in range(2)] == [expected, expected]
        assert made.load().cached_tokens == 0


class Words:
    """Words with spaces between, and tokens of which nothing is shown."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return " ".join(f"w{token}" for token in tokens if token >= 5)


def test_words_keep_their_spaces_behind_tokens_that_show_nothing() -> None:
    tokens = [9, 1, 12, 1, 1, 7, 8, 2]
    one_by_one, at_once = Pieces(Words()), Pieces(Words())
    assert "".join(map(one_by_one.add, tokens)) + one_by_one.end() == "w9 w12 w7 w8"
    found = [at_once.add_all(tokens[:2]), at_once.add_all(tokens[2:5]), at_once.add_all(tokens[5:])]
    assert "".join(map(str, found)) + at_once.end() == "w9 w12 w7 w8"
