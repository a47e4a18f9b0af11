"""Exact mode gives the dense model's own text, token for token, whatever drafts; and draws from its distribution."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import NoTokenizer, greedy, plan_of, prompt, tiny
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import coreskip
from coreskip import CoreskipError, Engine
from coreskip.bench.exactness import places_off
from coreskip.kernels.ops import available
from coreskip.kernels.step import likeliest
from coreskip.predictors.plan import LayerPlan, Plan, Sketch
from coreskip.runtime import exact as exact_module
from coreskip.runtime.decode import NativeSequence
from coreskip.runtime.exact import Choices, Exact, Lookup, Pace, Source, Statistics, Text
from coreskip.runtime.wrap import runtime_of

needs_kernels = pytest.mark.skipif(available("cpu") is not None, reason="drafts are verified by the CPU kernels")
ROWS_APART = ["llama", "llama_bias", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "olmo2"]
ROWS_APART += ["stablelm", "starcoder2", "opt", "gpt_neox", "olmo", "cohere", "granite", "phi", "smollm3"]


class Eager(Pace):
    """Drafts as much as it can, from the plan as long as that holds better than the text."""

    pass_s, row_s, step_s = 1.0, 0.0, 0.0  # type: ignore[assignment]
    settling_s = 0.0  # type: ignore[assignment]
    ready = True  # type: ignore[assignment]


def tokens_and_statistics(model: Any, plan: Plan, ids: torch.Tensor, **options: Any) -> tuple[Any, Statistics]:
    with coreskip.wrap(model, plan, exact=True):
        runtime_of(model).exact.pace = Eager()
        output = greedy(model, ids, **options)
        return output, runtime_of(model).exact.last


def dense(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    with coreskip.wrap(model, Plan.dense(model)):
        return greedy(model, ids, **options)


@needs_kernels
@pytest.mark.parametrize("keep", [0.05, 0.8])
@pytest.mark.parametrize("family", ROWS_APART)
def test_greedy_text_is_the_dense_models(family: str, keep: float) -> None:
    model, ids = tiny(family), prompt(1, 9)
    output, done = tokens_and_statistics(model, plan_of(model, "griffin", keep), ids, new=40)
    assert torch.equal(output, dense(model, ids, new=40))
    assert done.note is None
    assert sum(done.drafted.values()) > 0
    assert done.tokens == 40 == 1 + done.passes + sum(done.accepted.values())


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["griffin", "static", "similar"])
def test_in_half_precision_too(kind: str, dtype: torch.dtype) -> None:
    """There near-ties are common: one pass over several tokens must round as passes over one do."""
    model = tiny("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=2).to(dtype)
    plan = plan_of(model, kind, 0.7)
    for seed in range(4):
        ids = prompt(1, 30 + 30 * seed, seed=seed)  # over the 128 positions that one attention task reads
        output, done = tokens_and_statistics(model, plan, ids, new=60)
        assert done.note is None
        assert sum(done.drafted.values()) > 0
        assert torch.equal(output, dense(model, ids, new=60))


@needs_kernels
def test_a_good_draft_is_accepted_and_saves_passes(llama: Any) -> None:
    ids = prompt(1, 9)
    static = plan_of(llama, "static", 1.0)
    with coreskip.wrap(llama, static, exact=True):
        exact = runtime_of(llama).exact
        exact._has_draft, exact.pace = True, Eager()
        for options in ({}, {"do_sample": True, "temperature": 1.7, "top_k": 20}):
            greedy(llama, ids, 33, **options)
            assert exact.last.acceptance == 1.0, options
            assert exact.last.passes == 4  # 32 tokens after the first, 8 a pass
            assert exact.last.tokens_per_pass == 8.0


@needs_kernels
@pytest.mark.parametrize("new", [1, 2, 3, 7, 8, 9, 17])
def test_max_new_tokens_is_reached_exactly(llama: Any, new: int) -> None:
    output, done = tokens_and_statistics(llama, plan_of(llama, "griffin", 0.9), prompt(1, 9), new=new)
    assert output.shape[1] == 9 + new
    assert done.tokens == new


OPTIONS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2, "min_new_tokens": 12},
    {"do_sample": True, "temperature": 0.7},
    {"do_sample": True, "top_k": 5, "top_p": 0.8},
    {"do_sample": True, "top_k": 0, "min_p": 0.02, "repetition_penalty": 1.2},
    {"prefill_chunk_size": 4},
]


@needs_kernels
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o))
def test_every_option_acts_as_in_plain_generation(options: dict[str, Any]) -> None:
    """Sampling draws the same noise for the same token, so that one seed gives one text, drafted or not."""
    model = tiny("llama", vocab_size=24)
    ids = prompt(1, 9) % 24
    for seed in range(3):
        torch.manual_seed(seed)
        expected = dense(model, ids, new=40, **options)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        output, done = tokens_and_statistics(model, plan_of(model, "griffin", 0.6), ids, new=40, **options)
        assert sum(done.drafted.values()) > 0
        assert torch.equal(output, expected)
        assert torch.equal(torch.get_rng_state(), state)  # noise drawn ahead was given back


@needs_kernels
def test_end_of_sequence_ends_in_the_middle_of_a_draft(llama: Any) -> None:
    ids = prompt(1, 9)
    whole = dense(llama, ids, new=30)[0, 9:].tolist()
    for eos in dict.fromkeys(whole[3:12]):
        output, _ = tokens_and_statistics(llama, plan_of(llama, "griffin", 0.9), ids, new=30, eos_token_id=eos)
        assert output[0, 9:].tolist() == whole[: whole.index(eos) + 1]


class Puts(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@needs_kernels
def test_a_streamer_sees_token_after_token(llama: Any) -> None:
    ids = prompt(1, 9)
    mine, theirs = Puts(), Puts()
    tokens_and_statistics(llama, plan_of(llama, "griffin", 0.9), ids, new=20, streamer=mine)
    dense(llama, ids, new=20, streamer=theirs)
    assert mine.values == theirs.values
    assert mine.ended


class Remembers(LogitsProcessor):
    """A user's processor with a memory: it must see every position once, in order."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        return scores.roll(len(self.lengths) % 3, dims=-1)


@needs_kernels
def test_processors_with_a_memory_see_each_position_once(llama: Any) -> None:
    ids, mine, theirs = prompt(1, 9), Remembers(), Remembers()
    plan = plan_of(llama, "griffin", 0.9)
    output, _ = tokens_and_statistics(llama, plan, ids, new=20, logits_processor=LogitsProcessorList([mine]))
    assert torch.equal(output, dense(llama, ids, new=20, logits_processor=LogitsProcessorList([theirs])))
    assert mine.lengths == list(range(9, 29)) == theirs.lengths


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_scores_and_cache_are_those_of_plain_generation(family: str) -> None:
    """What the next turn of a conversation goes on from holds no trace of rejected drafts."""
    model, ids = tiny(family), prompt(1, 9)
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    mine, _ = tokens_and_statistics(model, plan_of(model, "griffin", 0.5), ids, new=21, **options)
    theirs = dense(model, ids, new=21, **options)
    for name in ("scores", "logits"):
        assert torch.equal(torch.cat(getattr(mine, name)), torch.cat(getattr(theirs, name)))
    for left, right in zip(mine.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        assert torch.equal(left.keys, right.keys)
        assert torch.equal(left.values, right.values)
    turn = torch.cat([theirs.sequences, prompt(1, 4, seed=5)], dim=1)
    again, _ = tokens_and_statistics(
        model, plan_of(model, "griffin", 0.5), turn, new=12, past_key_values=mine.past_key_values
    )
    assert torch.equal(again, dense(model, turn, new=12, past_key_values=theirs.past_key_values))


@needs_kernels
def test_a_cache_made_by_hand_keeps_all_of_a_sliding_models_past() -> None:
    model, ids = tiny("mistral"), prompt(1, 9)
    plan = plan_of(model, "griffin", 0.7)
    output, done = tokens_and_statistics(model, plan, ids, new=20, past_key_values=DynamicCache())
    assert done.note is None
    assert torch.equal(output, dense(model, ids, new=20, past_key_values=DynamicCache()))


# --- where nothing is drafted


@pytest.mark.parametrize(
    ("options", "rows", "note"),
    [
        ({}, 2, "a batch of 2"),
        ({"num_return_sequences": 3, "do_sample": True}, 1, "a batch of 3"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, 1, "hidden states"),
        ({"use_cache": False}, 1, "not a DynamicCache"),
        ({"cache_implementation": "static"}, 1, "not a DynamicCache"),
    ],
)
def test_what_is_not_covered_runs_densely_with_a_note(
    llama: Any, options: dict[str, Any], rows: int, note: str, caplog: pytest.LogCaptureFixture
) -> None:
    ids = prompt(rows, 9)
    caplog.set_level(logging.INFO, logger="coreskip")
    torch.manual_seed(0)
    output, done = tokens_and_statistics(llama, plan_of(llama, "griffin", 0.05), ids, new=8, **options)
    assert note in done.note
    assert note in caplog.text
    torch.manual_seed(0)
    expected = dense(llama, ids, new=8, **options)
    assert torch.equal(getattr(output, "sequences", output), getattr(expected, "sequences", expected))


def test_padding_and_beams_run_densely(llama: Any) -> None:
    ids, plan = prompt(1, 9), plan_of(llama, "griffin", 0.05)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    output, done = tokens_and_statistics(llama, plan, ids, new=8, attention_mask=mask)
    assert "padded" in done.note
    assert torch.equal(output, dense(llama, ids, new=8, attention_mask=mask))
    output, done = tokens_and_statistics(llama, plan, ids, new=8, num_beams=3)
    assert done is None  # beam search is another loop, and dense
    assert torch.equal(output, dense(llama, ids, new=8, num_beams=3))


@pytest.mark.parametrize("family", ["gpt2", "bloom", "falcon", "falcon_new", "nemotron_relu2"])
def test_models_whose_rows_are_not_apart_draft_in_float32_alone(family: str) -> None:
    model, ids = tiny(family), prompt(1, 9)
    plan = plan_of(model, "griffin", 0.8)
    for options in ({}, {"do_sample": True, "temperature": 0.7}):
        torch.manual_seed(1)
        output, done = tokens_and_statistics(model, plan, ids, new=40, **options)
        assert sum(done.drafted.values()) > 0
        torch.manual_seed(1)
        assert torch.equal(output, dense(model, ids, new=40, **options))
    model.to(torch.bfloat16)
    plan = plan_of(model, "griffin", 0.8)
    output, done = tokens_and_statistics(model, plan, ids, new=12)
    assert "rounds otherwise" in done.note
    assert torch.equal(output, dense(model, ids, new=12))


def test_what_rounding_could_decide_gets_a_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens whose logits differ by less than a pass over several is off: only the lone pass tells them apart."""

    class Rounding(Chain):
        alone = 0

        def verify(self, tokens: list[int]) -> torch.Tensor:
            logits = super().verify(tokens).clone()
            self.alone += len(tokens) == 1
            if len(tokens) > 1:
                logits[:, 0] += 2e-4
            return logits

    logits = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(2))
    logits[:, 0] = logits.max(1).values - 1e-4  # token 0 is always a close second
    logits[2] = torch.arange(VOCABULARY)  # but after token 2
    config = SimpleNamespace(do_sample=False, return_dict_in_generate=False)

    def run(margin: float) -> tuple[list[int], Rounding]:
        exact = Exact(has_draft=True)
        exact.pace, exact._margin = Eager(), margin
        criteria = StoppingCriteriaList([MaxLengthCriteria(42)])
        text = Text(torch.zeros(1, 2, dtype=torch.int64), LogitsProcessorList(), criteria, config, None, 6)
        passes = Rounding(logits, logits, 2)
        exact._decode(Choices(passes, text), logits[0], 40, Statistics())  # type: ignore[arg-type]
        return text.ids[0].tolist(), passes

    expected = [0, 0]
    while len(expected) < 42:
        expected.append(int(logits[expected[-1]].argmax()))
    text, passes = run(margin=1e-3)
    assert text == expected
    assert passes.alone > 10
    assert run(margin=0.0)[0] != expected


def test_a_rounding_model_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", hidden_size=128, intermediate_size=256).to(torch.bfloat16)
    monkeypatch.setattr("coreskip.runtime.wrap.redirect_attention", lambda *a: None)
    monkeypatch.setattr("coreskip.runtime.wrap.Decoder.refusal", "switched off")  # which attends row by row
    _, done = tokens_and_statistics(model, plan_of(model, "griffin", 0.5), prompt(1, 40), new=4)
    assert "rounds otherwise" in done.note


def test_unwrap_restores_attention_and_verification_is_dense(llama: Any) -> None:
    configs = [layer.self_attn.config for layer in llama.model.layers]
    ids, more = prompt(1, 9), prompt(1, 3, seed=4)

    def logits() -> torch.Tensor:
        cache = DynamicCache(config=llama.config)
        llama(ids, past_key_values=cache)
        return torch.cat([llama(t, past_key_values=cache).logits for t in more.split(1, dim=1)])

    with torch.no_grad():
        with coreskip.wrap(llama, Plan.dense(llama)):
            expected = logits()
        with coreskip.wrap(llama, plan_of(llama, "griffin", 0.05), exact=True):
            assert torch.equal(logits(), expected)
            llama.to(torch.float64).to(torch.float32)
            assert torch.equal(logits(), expected)
    assert [layer.self_attn.config for layer in llama.model.layers] == configs
    assert all(layer.self_attn.config is llama.config for layer in llama.model.layers)


# --- the distribution, on a chain of few tokens


class Chain:
    """`Passes` over a Markov chain: the next token's logits depend on the last token alone."""

    widest = 8

    def __init__(self, logits: torch.Tensor, drafts: torch.Tensor, length: int) -> None:
        self._logits, self._drafts, self.length = logits, drafts, length

    def draft(self, tokens: list[int]) -> torch.Tensor:
        self.length += len(tokens)
        return self._drafts[list(tokens)]

    def verify(self, tokens: list[int]) -> torch.Tensor:
        self.length += len(tokens)
        return self._logits[list(tokens)]

    def rollback(self, length: int) -> None:
        assert length <= self.length
        self.length = length


VOCABULARY = 6


class Warpers(list[Any]):
    """A LogitsProcessorList that does not look at each processor's signature each time, which takes most of a draw."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for warper in self:
            scores = warper(ids, scores)
        return scores


def transitions(draws: int) -> tuple[torch.Tensor, torch.Tensor, Exact]:
    """Counts ``[6, 6]`` of exact mode's next tokens by last token, and the probabilities they should have."""
    generator = torch.Generator().manual_seed(2)
    logits = 1.5 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    drafts = logits + 1.5 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    processors = Warpers([TemperatureLogitsWarper(0.8), TopKLogitsWarper(4)])
    config = SimpleNamespace(do_sample=True, return_dict_in_generate=False)
    exact = Exact(has_draft=True)
    exact.pace = Eager()
    exact.pace.step_s = 0.1  # type: ignore[misc]
    torch.manual_seed(11)
    counts = torch.zeros(VOCABULARY, VOCABULARY)
    for _ in range(draws // 500):
        ids = torch.zeros(1, 2, dtype=torch.int64)
        criteria = StoppingCriteriaList([MaxLengthCriteria(502)])
        text = Text(ids, processors, criteria, config, None, VOCABULARY)
        exact._decode(Choices(Chain(logits, drafts, 2), text), logits[0], 500, done := Statistics())  # type: ignore[arg-type]
        assert done.tokens == 500
        pairs = text.ids[0, 1:].unfold(0, 2, 1)
        counts += torch.bincount(pairs[:, 0] * VOCABULARY + pairs[:, 1], minlength=VOCABULARY**2).view_as(counts)
    return counts, processors(ids, logits.clone()).softmax(-1), exact


def surprise(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Chi-square of each row's counts, in standard deviations from what chance gives."""
    expected = counts.sum(1, keepdim=True) * probabilities
    possible = expected > 0
    if bool((counts[~possible] > 0).any()):
        return float("inf")
    statistic = float(((counts - expected)[possible].square() / expected[possible]).sum())
    freedom = int(possible.sum()) - VOCABULARY
    return (statistic - freedom) / (2 * freedom) ** 0.5


def test_sampling_follows_the_dense_distribution_over_100_000_draws() -> None:
    counts, probabilities, exact = transitions(100_000)
    assert int(counts.sum()) == 100_000
    assert abs(surprise(counts, probabilities)) < 4
    assert exact.pace.plan.overall.value < 0.9  # there was something to reject
    plain = torch.stack([torch.multinomial(p, 16_000, replacement=True).bincount(minlength=6) for p in probabilities])
    assert abs(surprise(plain.float(), probabilities)) < 4


def test_a_broken_acceptance_rule_shows_in_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_module, "accepted", lambda guess, token: True)
    counts, probabilities, _ = transitions(5_000)
    assert surprise(counts, probabilities) > 10


# --- what to draft


def test_lookup_takes_the_longest_match_and_its_latest_occurrence() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 9, 3, 4, 6, 7, 1, 3, 4])
    assert lookup.find(3) == (2, [6, 7, 1])
    lookup = Lookup([1, 2, 3, 4, 5, 9, 3, 4, 6, 7, 1, 2, 3, 4])
    assert lookup.find(2) == (4, [5, 9])
    assert Lookup([1, 2, 3]).find(4) == (0, [])
    assert Lookup([7, 8, 7, 8, 7, 8]).find(5) == (4, [7, 8, 7, 8, 7])  # a repetition is carried on
    assert Lookup([]).find(5) == (0, [])


def test_lookup_goes_on_after_drafts() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 9, 6, 7, 1])
    assert lookup.find(2, [2]) == (2, [3, 4])
    assert lookup.find(3, [2, 3, 4]) == (4, [5, 9, 6])
    assert lookup.find(2, [8]) == (0, [])
    assert Lookup([7, 8, 7, 8]).find(4, [7]) == (3, [8, 7, 8, 7])


def test_the_pace_weighs_acceptance_against_measured_cost() -> None:
    pace = Pace()
    assert not pace.ready
    for _ in range(2):
        pace.verified(1, 0.040)
    assert pace.ready
    for count in (4, 4, 8):
        pace.verified(count, 0.040 + 0.002 * (count - 1))
    assert pace.row_s == pytest.approx(0.002)
    assert pace.extent(0.01, 0.0, 7)[0] == 0  # one more row costs more than it brings
    assert pace.extent(0.95, 0.0, 7)[0] == 7
    assert 1 <= pace.extent(0.4, 0.0, 7)[0] <= 3
    assert pace.extent(0.95, 0.038, 7)[0] == 0  # a draft step at the price of a dense one never pays
    assert pace.extent(0.95, 0.010, 7)[0] >= 3
    length, rate = pace.extent(0.8, 0.010, 7)
    rates = [sum(0.8**i for i in range(n + 1)) / (0.040 + n * 0.012) for n in range(8)]
    assert length == max(range(8), key=rates.__getitem__)
    assert rate == pytest.approx(max(rates))


def test_a_look_is_as_wide_as_it_saves_draft_steps() -> None:
    pace = Pace()
    for _ in range(2):
        pace.verified(1, 0.040)
    pace.stepped(1, 2, 0.010, first=False)
    pace.stepped(5, 1, 0.009, first=False)
    assert pace.step_s == pytest.approx(0.005)
    assert pace.step_row_s == pytest.approx(0.001)
    assert pace.look(0.1, 7) == (0, pytest.approx(0.005))  # a row that rarely holds costs more than it saves
    assert pace.look(0.9, 7)[0] >= 5
    assert pace.look(0.9, 2)[0] == 2
    width, each = pace.look(0.6, 7)
    costs = [(0.005 + 0.001 * n) / sum(0.6**i for i in range(n + 1)) for n in range(8)]
    assert width == min(range(8), key=costs.__getitem__)
    assert each == pytest.approx(min(costs))


class Looking(Eager):
    """Drafts from the plan alone, and lets it look at what the text offers."""

    step_s, step_row_s = 0.1, 0.01  # type: ignore[assignment]

    def extent(self, acceptance: float, step: float, most: int) -> tuple[int, float]:
        return (most, 2.0) if step else (0, 1.0)


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 1}, {"repetition_penalty": 1.0001}])
def test_the_plan_looks_at_what_the_text_offers(llama: Any, options: dict[str, Any], monkeypatch: Any) -> None:
    """A text that repeats itself is drafted in fewer draft passes than tokens, by native choices and by Python's."""
    widths: list[int] = []

    def spied(native: Any, tokens: Any) -> torch.Tensor:
        widths.append(len(tokens))
        return native._native.step(tokens, native._draft)

    monkeypatch.setattr(exact_module.NativePasses, "draft", spied)
    ids = prompt(1, 9).repeat(1, 4)
    torch.manual_seed(0)
    expected = dense(llama, ids, new=60, **options)
    with coreskip.wrap(llama, plan_of(llama, "static", 1.0), exact=True):
        exact = runtime_of(llama).exact
        exact._has_draft, exact.pace = True, Looking()
        torch.manual_seed(0)
        assert torch.equal(greedy(llama, ids, 60, **options), expected)
        assert exact.last.drafted["plan"] > 40
        assert exact.last.acceptance == 1.0
        assert max(widths) > 1


@needs_kernels
def test_native_drafts_stop_at_the_first_doubt(llama: Any) -> None:
    with coreskip.wrap(llama, Plan.dense(llama)), torch.no_grad():
        runtime, cache = runtime_of(llama), DynamicCache(config=llama.config)
        for tokens in (prompt(1, 9), torch.tensor([[5]])):
            llama(tokens, past_key_values=cache)
        sequence, chosen = NativeSequence(runtime.decoder, cache), runtime.chosen_for(cache)
        start, made, chances = sequence.length, [5], list[float]()
        for _ in range(6):
            logits = sequence.step(made[-1:], chosen)[0].float()
            made.append(int(logits.argmax()))
            chances.append(float(logits.softmax(0).max()))
        sequence.rollback(start)
        tokens, found = sequence.draft(5, 6, 0.0, chosen)
        assert (tokens, sequence.length) == (made[1:], start + 6)
        assert found == pytest.approx(chances, rel=1e-4)
        for least in (sorted(chances)[2], 2.0):
            sequence.rollback(start)
            count = next(i for i, chance in enumerate(chances, 1) if chance < least * 1.001)
            assert sequence.draft(5, 6, least * 1.001, chosen)[0] == made[1 : 1 + count]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_likeliest_tokens_are_the_first_of_the_greatest(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 9001, generator=torch.Generator().manual_seed(3)).to(dtype)
    logits[1, [400, 8000]] = 9.0
    logits[2, 5000] = float("inf")
    logits[3, 7000] = float("nan")
    tokens, chances = likeliest(logits)
    assert tokens == logits.float().argmax(1).tolist()
    assert tokens[1:4] == [400, 5000, 7000]
    expected = logits.float().softmax(1).max(1).values
    assert [chances[i] for i in (0, 1, 4)] == pytest.approx(expected[[0, 1, 4]].tolist(), rel=1e-4)
    assert likeliest(logits, chances=False) == (tokens, [])


def test_the_bench_notices_a_token_that_is_not_hugging_faces(llama: Any) -> None:
    ids = prompt(1, 9)
    text = greedy(llama, ids, 12)
    assert places_off(llama, ids, text) == []
    text[0, 14] = (text[0, 14] + 1) % 128
    assert places_off(llama, ids, text)[0]["at"] == 5
    assert places_off(llama, ids, text)[0]["gap"] > 0


def test_a_source_that_does_not_pay_is_tried_ever_more_rarely() -> None:
    source = Source({1: 0.5})
    tries = [i for i in range(400) if source.due(pays=False)]
    assert tries == [31, 95, 223]
    assert source.due(pays=True)
    assert [i for i in range(40) if source.due(pays=False)] == [31]


@needs_kernels
def test_drafting_that_does_not_pay_switches_itself_off(llama: Any) -> None:
    """Random text and a draft that costs as much as the dense pass: a few looks, then plain passes."""
    plan, ids = plan_of(llama, "griffin", 0.05), prompt(1, 9)

    class Costly(Pace):
        pass_s, row_s, step_s, ready = 1.0, 0.3, 0.9, True  # type: ignore[assignment]

    with coreskip.wrap(llama, plan, exact=True):
        exact = runtime_of(llama).exact
        exact.pace = Costly()
        greedy(llama, ids, 200, do_sample=True, temperature=5.0)
        assert sum(exact.last.drafted.values()) < 30
        assert exact.last.passes > 180


@needs_kernels
def test_a_draft_that_could_never_pay_is_not_looked_at_again(llama: Any) -> None:
    """Choosing core neurons costs more than the rest of this text could save, however well they drafted."""

    class Settling(Pace):
        pass_s, row_s, step_s, settling_s, ready = 1.0, 0.1, 0.8, 50.0, True  # type: ignore[assignment]

    with coreskip.wrap(llama, plan_of(llama, "griffin", 0.8), exact=True):
        exact = runtime_of(llama).exact
        exact.pace = Settling()
        greedy(llama, prompt(1, 9), 120, do_sample=True, temperature=5.0)
        assert exact.last.drafted["plan"] == 0


# --- engine


def test_the_engine_in_exact_mode(embedded: tuple[Any, Any]) -> None:
    model, tokenizer = embedded
    text = "red green blue, " * 4 + "red"
    with Engine(model, tokenizer, Plan.dense(model)) as engine:
        assert engine.statistics is None
        expected = engine.generate(text, max_new_tokens=24, do_sample=False)
        sampled = engine.generate(text, max_new_tokens=12, do_sample=True, seed=3)
        batch = engine.generate([text, "Hello"], max_new_tokens=4, do_sample=False)
    stop = expected.split()[2]
    with Engine(model, tokenizer, exact=True) as engine:
        for _ in range(2):
            assert engine.generate(text, max_new_tokens=24, do_sample=False) == expected
        if available("cpu") is None:
            assert engine.statistics.accepted["lookup"] > 5
            assert engine.statistics.tokens_per_pass > 1.2
        assert engine.generate(text, max_new_tokens=12, do_sample=True, seed=3) == sampled
        assert engine.generate([text, "Hello"], max_new_tokens=4, do_sample=False) == batch
        cut = engine.generate(text, max_new_tokens=24, do_sample=False, stop_strings=stop)
        assert cut == expected[: expected.index(stop)]
        assert "".join(engine.stream(text, max_new_tokens=24, do_sample=False, stop_strings=stop)) == cut
        texts = ["", ""]

        def work(i: int) -> None:
            texts[i] = engine.generate(text, max_new_tokens=24, do_sample=False)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert texts == [expected, expected]
        with pytest.raises(CoreskipError, match="wrapped already"):
            Engine(model, tokenizer, exact=True)


def test_statistics_say_what_happened() -> None:
    done = Statistics(tokens=9, passes=4, drafted={"lookup": 6, "plan": 2}, accepted={"lookup": 4, "plan": 0})
    assert done.acceptance == 0.5
    assert done.tokens_per_pass == 2.0
    assert "4 of 6 from the lookup" in str(done)
    assert "a batch" in str(Statistics(tokens=3, note="a batch of 2"))
    assert Statistics().acceptance == Statistics().tokens_per_pass == 0.0


@needs_kernels
def test_rows_are_apart_where_a_pass_reaches_over_128_positions(embedded: tuple[Any, Any]) -> None:
    """The native step reads the cache in parts of 128; a token before the border must not notice the part after."""
    model, _ = embedded
    ids = torch.arange(100, 237).unsqueeze(0)
    with torch.no_grad(), coreskip.wrap(model, Plan.dense(model)):
        one, many = DynamicCache(config=model.config), DynamicCache(config=model.config)
        for cache in (one, many):
            model(ids[:, :120], past_key_values=cache)
        single = torch.cat([model(t, past_key_values=one).logits for t in ids[:, 120:136].split(1, dim=1)], dim=1)
        several = torch.cat([model(t, past_key_values=many).logits for t in ids[:, 120:136].split(5, dim=1)], dim=1)
        assert torch.equal(several, single)


# ---- drafts from the text alone, verified by the plan ----------------------------------------------------------------


def repeating(rows: int = 1) -> torch.Tensor:
    return prompt(rows, 7).repeat(1, 4)


@needs_kernels
@pytest.mark.parametrize("kind", ["dense", "int8", "int4", "static", "griffin"])
@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "gemma2"])
def test_with_lookup_the_text_is_the_plans_own(family: str, kind: str) -> None:
    model, options = tiny(family), {"new": 120}  # random models come to repeat themselves
    plan = Plan.dense(model, kind if "int" in kind else None)
    plan = plan if kind in ("dense", "int8", "int4") else plan_of(model, kind)
    sampled = {"do_sample": True, "temperature": 0.3, **options}

    def texts() -> list[torch.Tensor]:
        found = [greedy(model, repeating(), **options), greedy(model, repeating(2), **options)]
        torch.manual_seed(3)
        return [*found, greedy(model, repeating(), **sampled), torch.rand(3)]

    with coreskip.wrap(model, plan, keep_originals=True):
        greedy(model, repeating(), 3)
        expected = texts()
    with coreskip.wrap(model, plan, keep_originals=True, lookup=True):
        greedy(model, repeating(), 3)
        runtime_of(model).lookup.pace = Eager()
        assert all(torch.equal(a, b) for a, b in zip(texts(), expected, strict=True))
        greedy(model, repeating(), **options)
        done = runtime_of(model).lookup.last
        assert done.note is None
        assert done.drafted["plan"] == 0
        assert done.drafted["lookup"] > 0 or family != "llama"  # not every text repeats itself
        assert done.passes + done.accepted["lookup"] == 119


@needs_kernels
def test_lookup_by_the_engine(llama: Any) -> None:
    ids, plan = repeating(), Plan.dense(llama)
    expected = dense(llama, ids, new=30)
    with Engine(llama, NoTokenizer(), plan, lookup=True) as engine:
        assert torch.equal(greedy(llama, ids, new=30), expected)
        assert engine.statistics is not None
        assert engine.statistics.tokens == 30
    with pytest.raises(CoreskipError, match="wrapped already"), coreskip.wrap(llama, plan):
        Engine(llama, NoTokenizer(), lookup=True)


@needs_kernels
def test_a_rule_that_rounding_turns_is_not_drafted_for_or_gives_its_own_text(llama: Any) -> None:
    plain = Plan.dense(llama)
    plan = Plan(tuple(LayerPlan(Sketch(bits=4, keep=0.5)) for _ in plain.layers), plain.model, {"method": "sketch"})
    with coreskip.wrap(llama, plan):
        greedy(llama, repeating(), 3)
        expected = greedy(llama, repeating(), new=40)
    with coreskip.wrap(llama, plan, lookup=True):
        assert torch.equal(greedy(llama, repeating(), new=40), expected)
        assert runtime_of(llama).lookup.last.tokens == 40
