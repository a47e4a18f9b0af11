"""Mistakes over both faces: one line that says what to do, nothing patched, nothing written. And what looks like a
mistake and works: paths and None for plans, paths for texts, one message for a chat."""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_models import plan_of, tiny
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

import coreskip
from coreskip import CoreskipError, Engine, Plan, analyze, evaluate, load, pareto, ppl_sparsity, unwrap, wrap
from coreskip.bench.processes import serve
from coreskip.bench.runner import Job
from coreskip.cli import main
from coreskip.predictors.layer_selection import LayerSelection
from coreskip.predictors.layers import skipped_layers
from coreskip.runtime.options import Budget, check_options
from coreskip.runtime.wrap import is_wrapped

ROOT = Path(__file__).parent.parent
STORY = "The old ferry crossed the river twice a day, and nobody ever asked why it came back empty. " * 120
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
PRINTS = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # the parts of a list appear as Python writes them
CHAT = [{"role": "user", "content": "x"}]


def characters(template: str | None = TEMPLATE, **special: str) -> Any:
    """A tokenizer of one token per character."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *map(chr, range(32, 127))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    named = special or {"pad_token": "<pad>", "eos_token": "<eos>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, unk_token="<unk>", **named
    )


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model, its tokenizer and a plan, and all three on disk beside a text."""
    folder = tmp_path_factory.mktemp("mistakes")
    here = SimpleNamespace(model=tiny("llama"), tokenizer=characters(), folder=folder)
    here.plan = plan_of(here.model, "griffin")
    here.gpt2 = tiny("gpt2", n_positions=64)
    for name, model in (("llama", here.model), ("gpt2", here.gpt2)):
        model.save_pretrained(folder / name)
        here.tokenizer.save_pretrained(folder / name)
    here.plan.save(folder / "my.plan")
    (folder / "story.txt").write_text(STORY)
    (folder / "bad.jsonl").write_text('"a"\n{"text": "b"}\n')
    here.bare = characters(None)
    return here


def generated(at: Any, prompt: Any, tokenizer: Any = None, model: Any = None, plan: Any = None, **options: Any) -> Any:
    with Engine(model or at.model, tokenizer or at.tokenizer, plan) as engine:
        return engine.generate(prompt, **{"max_new_tokens": 4, "do_sample": False, **options})


def streamed(at: Any, prompt: Any, **options: Any) -> str:
    with Engine(at.model, at.tokenizer) as engine:
        return "".join(engine.stream(prompt, **{"max_new_tokens": 4, "do_sample": False, **options}))


def analyzed(at: Any, **options: Any) -> Plan:
    quick = {"text": STORY, "progress": False, "windows": 2, "tokens": 256, "method": "core"}
    return analyze(options.pop("model", at.model), options.pop("tokenizer", at.tokenizer), **{**quick, **options})


def scored(at: Any, plan: Any, text: Any = STORY, **options: Any) -> float:
    quality = evaluate(at.model, at.tokenizer, plan, text, **{"windows": 2, "window": 32, "progress": False, **options})
    return float(quality["kl"])


Call = Callable[[Any], Any]
MISTAKES: dict[str, tuple[Call, str]] = {
    # plans
    "a plan that is not there": (lambda at: wrap(at.model, "none.plan"), "there is no plan at none.plan"),
    "a number as a plan": (lambda at: wrap(at.model, 5), "a plan is a coreskip.Plan, the path of one, or None"),
    "a model as a plan": (lambda at: Engine(at.model, at.tokenizer, at.model), "not a LlamaForCausalLM"),
    "no name of a plan": (lambda at: Plan.load(None), "a plan is given as None: give its path"),
    "an empty name of a plan": (lambda at: Plan.load(""), "cannot name a plan"),
    "bytes as a name": (lambda at: at.plan.save(b"x"), "given as bytes: give its path"),
    "a null character in a name": (lambda at: at.plan.save("a\0b"), "cannot name a plan"),
    "evaluating a number": (lambda at: scored(at, 0.5), "a plan is a coreskip.Plan"),
    # models and tokenizers
    "a name as a model, wrapped": (lambda at: wrap("some/model", at.plan), "coreskip.load('some/model')"),
    "a path as a model, in an engine": (lambda at: Engine(Path("m"), at.tokenizer), "'m' is a name, not a model"),
    "a name as a model, analysed": (lambda at: analyzed(at, model="some/model"), "coreskip.load('some/model')"),
    "a name as a model, evaluated": (lambda at: evaluate("m", None, None, STORY), "coreskip.load('m')"),
    "a name as a model, unwrapped": (lambda at: unwrap("m"), "coreskip.load('m')"),
    "a name as a model, in pareto": (lambda at: pareto("m", at.tokenizer, text=STORY), "coreskip.load('m')"),
    "a name as a model, by the law": (lambda at: ppl_sparsity("m", at.tokenizer, STORY), "coreskip.load('m')"),
    "a dense plan of a name": (lambda at: Plan.dense("m"), "coreskip.load('m')"),
    "what load returns as a model": (lambda at: wrap((at.model, at.tokenizer), at.plan), "returns two things"),
    "None as a model": (lambda at: wrap(None, at.plan), "the model is None: give one that coreskip.load() returned"),
    "a class as a model": (lambda at: Engine(type(at.model), at.tokenizer), "the class LlamaForCausalLM"),
    "a layer as a model": (lambda at: Engine(torch.nn.Linear(2, 2), at.tokenizer), "not a Hugging Face model"),
    "None as a tokenizer": (lambda at: Engine(at.model, None), "the tokenizer is None"),
    "a name as a tokenizer": (lambda at: Engine(at.model, "gpt2"), "the tokenizer is a str"),
    "a processor as a tokenizer": (
        lambda at: Engine(at.model, type("Processor", (), {"tokenizer": 1, "__call__": print})()),
        "pass its .tokenizer",
    ),
    "no tokenizer to analyse with": (lambda at: analyzed(at, tokenizer=None), "the tokenizer is None"),
    "no tokenizer for the model's own text": (
        lambda at: analyzed(at, tokenizer=None, text=None),
        "the tokenizer is None",
    ),
    "a number to load": (lambda at: load(5), "the model is given as an int"),
    "a list as a device": (lambda at: load(at.folder / "llama", device=[]), "there is no device"),
    # flags
    "a word as a flag": (lambda at: wrap(at.model, at.plan, keep_originals="no"), "keep_originals is 'no'"),
    "a number as a flag": (lambda at: Engine(at.model, at.tokenizer, exact=2), "exact is 2"),
    # prompts
    "no prompt": (lambda at: generated(at, []), "there is no prompt"),
    "None as a prompt": (lambda at: generated(at, None), "the prompt is None"),
    "an empty chat": (lambda at: generated(at, [[]]), "a chat is empty"),
    "an empty text": (lambda at: generated(at, ""), "a prompt is empty"),
    "a number as a prompt": (lambda at: streamed(at, 5), "the prompt is an int"),
    "token ids": (lambda at: generated(at, torch.tensor([[5, 6]])), "token ids are for model.generate"),
    "an array of ids": (lambda at: generated(at, np.array([5, 6])), "token ids are for model.generate"),
    "a list of ids": (lambda at: generated(at, [5, 6]), "the prompt is an int"),
    "lists of ids": (lambda at: generated(at, [[5, 6], [7]]), 'needs a "role" and a "content"; this one is an int'),
    "bytes as a prompt": (lambda at: generated(at, b"abc"), "the prompt is bytes"),
    "a set of prompts": (lambda at: generated(at, {"a", "b"}), "the prompt is a set"),
    "half a character": (lambda at: generated(at, "\ud800x"), "is not valid text"),
    "a text and a message": (lambda at: generated(at, ["a", CHAT[0]]), "texts or chats, not both"),
    "a message and a text": (lambda at: generated(at, [CHAT[0], "a"]), "texts or chats, not both"),
    "a message without a role": (lambda at: generated(at, {"text": "x"}), 'needs a "role" and a "content"'),
    "a request instead of a chat": (lambda at: generated(at, {"messages": CHAT}), 'needs a "role" and a "content"'),
    "a role that is a number": (lambda at: generated(at, {"role": 5, "content": "x"}), 'the "role" of a chat message'),
    "content that is None": (lambda at: generated(at, {"role": "user", "content": None}), "is None: give a text"),
    "content that is a number": (lambda at: generated(at, {"role": "user", "content": 5}), "is an int: give a text"),
    "a role that the template refuses": (
        lambda at: generated(at, [{"role": "system", "content": "Be brief."}, *CHAT]),
        "chat template refuses these messages: System role not supported",
    ),
    "parts that the template trips over": (
        lambda at: generated(at, {"role": "user", "content": [{"type": "text", "text": "x"}]}),
        "it may want each content as one text",
    ),
    "parts that the template prints": (
        lambda at: generated(
            at, {"role": "user", "content": [{"type": "text", "text": "x"}]}, characters(PRINTS, eos_token="<eos>")
        ),
        "does not read lists of parts",
    ),
    "a template that is no template": (
        lambda at: generated(at, CHAT, characters("{% if %}")),
        "refuses these messages",
    ),
    "a chat without a template": (lambda at: generated(at, CHAT, at.bare), "has no chat template"),
    # options of generation
    "a seed of 65 bits": (lambda at: generated(at, "a", do_sample=True, seed=2**64), "seed is 18446744073709551616"),
    "a negative seed": (lambda at: generated(at, "a", do_sample=True, seed=-1), "seed is -1"),
    "a word as a seed": (lambda at: streamed(at, "a", do_sample=True, seed="x"), "seed is 'x'"),
    "a seed of nothing": (lambda at: generated(at, "a", seed=3), "a seed is of sampling: add do_sample=True"),
    "a temperature of nan": (lambda at: generated(at, "a", do_sample=True, temperature=math.nan), "temperature is nan"),
    "no tokens at all": (lambda at: generated(at, "a", max_new_tokens=0), "max_new_tokens is 0"),
    "half a token": (lambda at: generated(at, "a", max_new_tokens=2.5), "max_new_tokens is 2.5"),
    "no beams": (lambda at: generated(at, "a", num_beams=0), "num_beams is 0"),
    "several greedy texts": (lambda at: generated(at, "a", num_return_sequences=3), "greedy text comes once"),
    "a number to stop at": (lambda at: generated(at, "a", stop_strings=5), "stop_strings is 5"),
    "a word as a configuration": (lambda at: generated(at, "a", generation_config="x"), "generation_config is a str"),
    "ids beside the prompt": (lambda at: generated(at, "a", input_ids=torch.tensor([[1]])), "makes input_ids of the"),
    "a temperature of next to nothing": (
        lambda at: generated(at, "a", do_sample=True, temperature=1e-300),
        "temperature is 1e-300, by which scores cannot be divided",
    ),
    "a number as a cache": (lambda at: generated(at, "a", past_key_values=3), "past_key_values is an int: give a KV"),
    "a word as an assistant": (lambda at: generated(at, "a", assistant_model="x"), "assistant_model is a str: give a"),
    "a number as processors": (lambda at: generated(at, "a", logits_processor=3), "logits_processor is an int"),
    "a number as criteria": (lambda at: streamed(at, "a", stopping_criteria=3), "stopping_criteria is an int"),
    "a word as a token's id": (lambda at: generated(at, "a", eos_token_id="x"), "eos_token_id is 'x': give a token's"),
    "a cache of no kind": (lambda at: generated(at, "a", cache_implementation="nope"), "`cache_implementation` (nope)"),
    "a share above one": (lambda at: generated(at, "a", do_sample=True, min_p=3), "min_p is 3; it must be a share"),
    "a share that is a word": (lambda at: streamed(at, "a", do_sample=True, top_p="x"), "top_p is 'x'"),
    "a length that is a word": (lambda at: generated(at, "a", length_penalty="x"), "length_penalty is 'x'"),
    "a word as use_cache": (lambda at: generated(at, "a", use_cache="no"), "use_cache is 'no'"),
    "early stopping at will": (lambda at: generated(at, "a", early_stopping="maybe"), "`early_stopping` must be"),
    "a number as a tokenizer": (lambda at: generated(at, "a", tokenizer=3), "tokenizer is an int"),
    "a number as a prefix function": (lambda at: generated(at, "a", prefix_allowed_tokens_fn=3), "give a function"),
    "a misspelt option": (lambda at: generated(at, "a", max_new_token=3), "'max_new_token': did you mean max_new_tok"),
    "a misspelt seed": (
        lambda at: streamed(at, "a", sed=3),
        "generation 'sed': did you mean seed",
    ),
    "no option at all": (lambda at: generated(at, "a", qqqq=3), "'qqqq': see transformers.GenerationConfig"),
    "a misspelt setting": (
        lambda at: Engine(at.model, at.tokenizer, exakt=True),
        "'exakt': did you mean exact",
    ),
    "an unknown format": (lambda at: Engine(at.model, at.tokenizer, weights="int3"), "weights is 'int3'; choose from"),
    "plain under a plan": (lambda at: Engine(at.model, at.tokenizer, at.plan, plain=True), "leave out plan, exact"),
    # learned positions
    "a prompt beyond the positions": (lambda at: generated(at, "a" * 90, model=at.gpt2), "90 tokens, and this 'gpt2'"),
    "a text beyond the positions": (
        lambda at: generated(at, "a" * 60, model=at.gpt2, max_new_tokens=6),
        "give max_new_tokens=5 or less",
    ),
    "the same under a plan": (
        lambda at: generated(at, "a" * 90, model=at.gpt2, plan=plan_of(at.gpt2, "griffin")),
        "model 64 positions",
    ),
    # texts
    "the name of a text": (lambda at: analyzed(at, text=str(at.folder / "story.txt")), "give Path("),
    "the name of no text": (lambda at: scored(at, None, "nofile.txt"), "'nofile.txt' is the name of a file"),
    "a text that is not there": (lambda at: analyzed(at, text=Path("none.txt")), "cannot read the text"),
    "a number as a text": (lambda at: scored(at, None, 5), "the text is given as an int"),
    "a text of one word": (lambda at: ppl_sparsity(at.model, at.tokenizer, "abc"), "give a longer one"),
    "half a character in a text": (lambda at: analyzed(at, text=STORY + "\ud800"), "is not valid text"),
    # options of analyze
    "a budget of a number": (lambda at: analyzed(at, budget=5), "the budget is 5"),
    "windows of none": (lambda at: analyzed(at, windows=0), "windows is 0"),
    "a word of tokens": (lambda at: analyzed(at, tokens="5"), "tokens is '5'"),
    "True as a share": (lambda at: analyzed(at, keep=True), "keep is True"),
    "a rule of no use": (
        lambda at: analyzed(at, rule="wina"),
        "rule is of the method threshold, and the method is core",
    ),
    "a search without a budget": (lambda at: analyzed(at, fast=True), "fast is of the search for a budget"),
    "pareto of a method": (lambda at: pareto(at.model, at.tokenizer, method="core"), "leave out method"),
    "pareto of a number": (lambda at: pareto(at.model, at.tokenizer, keeps=0.5), "give a list of shares"),
    "pareto of an unknown option": (lambda at: pareto(at.model, at.tokenizer, nonsense=1), "no option 'nonsense'"),
    "half a window": (lambda at: scored(at, None, windows=1.5), "windows is 1.5"),
    "an odd window": (lambda at: scored(at, None, window=5), "window is 5; it must be even"),
    "a law of nan": (lambda at: ppl_sparsity(at.model, at.tokenizer, STORY, percent=math.nan), "percent is nan"),
    "steps of a law": (lambda at: ppl_sparsity(at.model, at.tokenizer, STORY, steps=0), "steps is 0"),
    "a number as a mask": (lambda at: coreskip.prefilling(5).__enter__(), "attention_mask is an int"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(at: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, words = MISTAKES[name]
    with pytest.raises(CoreskipError) as caught:
        call(at)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not is_wrapped(at.model)
    assert not list(tmp_path.iterdir())


def test_paths_and_none_are_plans(at: Any) -> None:
    path = at.folder / "my.plan"
    expected = generated(at, "abc", plan=at.plan)
    assert generated(at, "abc", plan=path) == generated(at, "abc", plan=str(path)) == expected
    assert expected != generated(at, "abc")
    for plan in (None, path, str(path)):
        with wrap(at.model, plan) as wrapped:
            assert is_wrapped(wrapped)
    assert scored(at, None) == pytest.approx(0, abs=1e-6)
    assert scored(at, path) == scored(at, str(path), at.folder / "story.txt") == scored(at, at.plan) > 0


def test_paths_are_texts(at: Any) -> None:
    plan = analyzed(at, text=at.folder / "story.txt", method="static")
    assert plan.calibration["source"] == "story.txt"
    assert plan.calibration["sha256"] == analyzed(at, method="static").calibration["sha256"]


def test_one_message_is_a_chat(at: Any) -> None:
    with Engine(at.model, at.tokenizer) as engine:
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
        expected = engine.generate("user: x\nassistant: ", **options)
        assert engine.generate(CHAT[0], **options) == engine.generate(CHAT, **options) == expected
        assert "".join(engine.stream(CHAT[0], **options)) == expected
        assert engine.generate([CHAT, CHAT], **options) == [expected, expected]
        assert engine.generate("abc", generation_config=None, stop_strings=None, **options)


def test_a_batch_needs_no_padding_token(at: Any) -> None:
    """Rows give what they give alone, whatever the tokenizer would pad with."""
    plain = characters(bos_token="<bos>")
    assert plain.pad_token is plain.eos_token is None
    texts = ["ab", "abcdef", "The ferry"]
    assert generated(at, texts, plain) == [generated(at, text, plain) for text in texts]
    assert plain.pad_token is None


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_positions_are_used_to_the_last(at: Any, family: str) -> None:
    """The last token is never looked up: one more than there are positions can be had, as from plain transformers."""
    model = tiny(family, **{"n_positions" if family == "gpt2" else "max_position_embeddings": 64})
    ids = at.tokenizer("a" * 60, return_tensors="pt").input_ids
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    expected = at.tokenizer.decode(plain[0, 60:], skip_special_tokens=True)
    assert generated(at, "a" * 60, model=model, max_new_tokens=5) == expected
    with pytest.raises(CoreskipError, match="max_new_tokens=5 or less"):
        generated(at, "a" * 60, model=model, max_new_tokens=6)


@pytest.mark.parametrize("method", ["static", "similar", "core"])
def test_a_model_of_few_positions_is_analysed(at: Any, method: str) -> None:
    plan = analyzed(at, model=at.gpt2, method=method)
    assert plan.quality is not None
    assert plan.quality["window"] <= 64
    assert analyzed(at, model=at.gpt2, method=method, text=None, tokens=256).quality is not None


@pytest.mark.parametrize(
    ("text", "measure", "limit"),
    [
        ("kl<.05", "kl", 0.05),
        ("kl<1e-3", "kl", 0.001),
        ("agreement>95%", "agreement", 0.95),
        ("Agreement > 0.95", "agreement", 0.95),
        ("PPL+1%", "ppl", 0.01),
        (" ppl +\t.5 % ", "ppl", 0.005),
    ],
)
def test_budgets_as_people_write_them(text: str, measure: str, limit: float) -> None:
    budget = Budget.parse(text)
    assert (budget.measure, budget.limit) == (measure, pytest.approx(limit))


NO_BUDGETS = ["kl<0", "kl<0.0", "ppl+0%", "ppl+1e-400%", "kl<1e400", "kl<inf", "kl<nan", "kl<-1", "ppl+1", "ppl<1%"]
NO_BUDGETS += ["agreement>1", "agreement>1.5", "agreement>100%", "agreement>0"]


@pytest.mark.parametrize("text", [*NO_BUDGETS, "", "5", 5, None, b"kl<1"])
def test_budgets_that_are_none(text: Any) -> None:
    with pytest.raises(CoreskipError, match="budget"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "wina"}, "rule is of the method threshold, and the method is auto (a sketch)"),
        ({"method": "core", "all_linears": True}, "all_linears is of the method threshold"),
        ({"method": "core", "rank": 64}, "rank is of the method learned"),
        ({"method": "static", "bits": 4}, "bits is of the method sketch"),
        ({"method": "learned", "refine": True}, "refine is of the method sketch"),
        ({"method": "core", "allocation": "greedy"}, "allocation is of the method sketch, topk"),
        ({"method": "sketch", "score": "signed"}, "score is of the method core, similar, static"),
        ({"method": "threshold", "alpha": 0.4}, "alpha is of the method core, similar, static"),
        ({"method": "core", "alpha": 0.4}, "alpha is of the scores magnitude, magnitude_down and signed"),
        ({"method": "sketch", "bits": 1, "allocation": "greedy"}, "a sketch of signs"),
        ({"budget": "ppl+1%", "rule": "teal"}, "tries every rule itself"),
        ({"budget": "ppl+1%", "fast": True, "rank": 8}, "auto (a fast search)"),
        ({"resume": "x"}, "resume is of the search for a budget"),
        ({"layers": "skip:1", "first_layer": 1}, "first_layer is of choosing neurons"),
    ],
)
def test_options_that_nothing_takes(options: dict[str, Any], words: str) -> None:
    with pytest.raises(CoreskipError) as caught:
        check_options(**options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "core", "score": "signed", "alpha": 0.2, "first_layer": 4},
        {"budget": "kl<.05", "rank": 8, "bits": 1, "score": "signed", "alpha": 0.3},
        {"budget": "kl<.05", "method": "topk", "allocation": "cett"},
        {"method": "core", "refine": False, "all_linears": False},
        {"refine": True, "allocation": "fisher", "seed": 2**64 - 1},
        {"method": "layers", "first_layer": 1},
    ],
)
def test_options_that_belong_together(options: dict[str, Any]) -> None:
    check_options(**options)


def test_some_layer_stays() -> None:
    assert [skipped_layers(keep, 3) for keep in (0.01, 0.3, 0.5, 1.0)] == [2, 2, 2, 0]
    for text, words in (("skip:3", "all of the model's 3"), ("skip:4", "more layers"), ("every:4", "none of the")):
        with pytest.raises(CoreskipError, match=words):
            LayerSelection.parse(text).check(3)
    for text in ("skip:2", "skip-mlp:3", "every:3", "adaptive:0.8"):
        LayerSelection.parse(text).check(3)


def test_an_adapter_is_called_one() -> None:
    """As PEFT wraps a linear layer: around the original, under its name."""
    for family in ("llama", "olmo"):  # found by name, and by structure
        model = tiny(family)
        for layer in model.model.layers:
            adapted = torch.nn.Module()
            adapted.base_layer, adapted.weight = layer.mlp.up_proj, layer.mlp.up_proj.weight
            layer.mlp.up_proj = adapted
        with pytest.raises(CoreskipError, match=r"up_proj carries an adapter .*merge_and_unload\(\)"):
            wrap(model, None)
        assert not is_wrapped(model)


def test_a_model_that_sees_images_is_loaded(at: Any, tmp_path: Path) -> None:
    text = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "eos_token_id": 2, "bos_token_id": 1,
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(tmp_path / "vlm")
    at.tokenizer.save_pretrained(tmp_path / "vlm")
    loaded, _ = load(tmp_path / "vlm")
    assert type(loaded) is type(model)
    assert generated(at, "abc", model=loaded) == generated(at, "abc", model=model)


# --- the command line -------------------------------------------------------------------------------------------------

ANALYZE = ("analyze", "llama", "-o", "new.plan", "--text", "story.txt")
GENERATE = ("generate", "llama", "--max-new-tokens", "4")
EVAL = ("eval", "llama", "--plan", "my.plan", "--text", "story.txt", "--json", "new.json")
REFUSED: list[tuple[tuple[str, ...], str]] = [
    ((*ANALYZE, "--seed", str(2**64)), "seed is 18446744073709551616; it must be a whole number from 0 to 2**64 - 1"),
    ((*ANALYZE, "--seed", "-1"), "seed is -1"),
    ((*ANALYZE, "--budget", "agreement>1.5"), "not between 0 and 1: write 0.95 or 95%"),
    ((*ANALYZE, "--budget", "kl<0"), "allows no loss at all"),
    ((*ANALYZE, "--rule", "teal"), "rule is of the method threshold"),
    ((*ANALYZE, "--method", "core", "--rank", "64"), "rank is of the method learned"),
    ((*ANALYZE, "--method", "core", "--all-linears"), "all_linears is of the method threshold"),
    ((*ANALYZE, "--method", "core", "--bits", "4"), "bits is of the method sketch"),
    ((*ANALYZE, "--method", "core", "--refine"), "refine is of the method sketch"),
    ((*ANALYZE, "--method", "core", "--allocation", "greedy"), "allocation is of the method sketch"),
    ((*ANALYZE, "--method", "core", "--alpha", "0.4"), "alpha is of the scores"),
    ((*ANALYZE, "--score", "signed"), "score is of the method core"),
    ((*ANALYZE, "--fast"), "fast is of the search for a budget"),
    ((*ANALYZE, "--resume", "j"), "resume is of the search for a budget"),
    ((*ANALYZE, "--layers", "skip:3"), "all of the model's 3 layers"),
    ((*ANALYZE, "--layers", "every:4"), "none of the model's 3 layers"),
    ((*ANALYZE, "--layers", "skip:1", "--first-layer", "1"), "first_layer is of choosing neurons"),
    ((*ANALYZE, "--layers", "skip:1", "--rule", "wina"), "rule is of choosing neurons"),
    ((*ANALYZE[:2], "-o", "-"), "a plan is a folder, which stdout cannot hold"),
    ((*ANALYZE, "--layers", "skip"), "cannot read the layers 'skip'"),
    ((*ANALYZE, "--weights", "int3"), "'int3' is not one of 'int4', 'int8'"),
    ((*ANALYZE, "--method", "learned", "--rank", "65"), "rank is 65: more than the model's hidden size, 64"),
    ((*GENERATE, "-p", "a", "--seed", "3"), "--seed is of sampling: add a --temperature"),
    ((*GENERATE, "-p", "a", "--temperature", "0", "--seed", "3"), "--seed is of sampling: add a --temperature"),
    ((*GENERATE, "-p", "a", "--temperature", "1e-300"), "--temperature is 1e-300, by which scores cannot be divided"),
    ((*GENERATE, "-p", "a", "--temperature", "1", "--top-p", "2"), "--top-p is 2.0; it must be at most 1"),
    ((*GENERATE, "-p", "a", "--top-k", "3"), "--top-k is of sampling"),
    ((*GENERATE, "-p", "a", "-n", "3"), "--num-samples is of sampling"),
    ((*GENERATE, "-p", "a", "--plain", "--plan", "my.plan"), "--plain is plain transformers: leave out --plan"),
    ((*GENERATE, "-p", "a", "--prompt-file", "story.txt"), "give one of --prompt and --prompt-file"),
    (GENERATE, "give one of --prompt and --prompt-file"),
    ((*GENERATE, "--prompt-file", "none.txt"), "cannot read the prompts none.txt"),
    ((*GENERATE, "--prompt-file", "bad.jsonl"), "line 2 of bad.jsonl holds no prompt"),
    (("chat", "llama", "--system", "\udcff"), "--system is not valid text"),
    (("chat", "llama", "--temperature", "nan"), "--temperature is nan"),
    (("bench", "llama", "--weights", "int3"), "weights is 'int3'"),
    ((*GENERATE, "-p", "a", "--temperature", "1", "--seed", str(2**64)), "seed is 18446744073709551616"),
    ((*GENERATE, "-p", "a", "--temperature", "nan"), "--temperature is nan"),
    ((*GENERATE, "-p", "a", "--temperature", "inf"), "--temperature is inf"),
    ((*GENERATE, "-p", ""), "--prompt is empty"),
    ((*GENERATE, "-p", "\udcff"), "--prompt is not valid text"),
    ((*GENERATE, "-p", "a", "--stop", "\udcff"), "a stop string is not valid text"),
    ((*GENERATE, "-p", "a", "--plan", "none.plan"), "there is no plan at none.plan"),
    (("generate", "gpt2", "-p", "a" * 90), "90 tokens, and this 'gpt2' model 64 positions"),
    (("generate", "gpt2", "-p", "a" * 60, "--max-new-tokens", "6"), "give max_new_tokens=5 or less"),
    ((*EVAL, "--ppl-sparsity", "nan"), "--ppl-sparsity is nan"),
    ((*EVAL, "--window", "5"), "window is 5; it must be even"),
    (("bench", "llama", "--device", "abacus"), "there is no device 'abacus' here"),
    (("bench", "llama", "--minutes", "nan"), "--minutes is nan"),
    (("bench", "llama", "--text", "story.txt", "--windows", "0"), "--windows 0 scores none"),
    (("bench", "llama", "--gguf", "story.txt", "--against", "hf"), "--gguf is for llama.cpp"),
    (("bench", "--shape", "llama-3.2-1b", "--sparsity", "0.5"), "has no ReLU"),
    (("bench", "kernels", "--rows", "x"), "'--rows'"),
    (("bench", "kernels", "--keeps", "1,much"), "--keeps holds 'much'"),
    (("bench", "kernels", "--keeps", "2"), "keep is 2.0"),
    (("bench", "kernels", "--shapes", "big"), "--shapes holds 'big'"),
    (("bench", "kernels", "--formats", "int3"), "unknown format 'int3'"),
    (("-v",), "Missing command"),
]


@pytest.mark.parametrize(("words", "line"), REFUSED, ids=lambda value: "-".join(value)[-40:] if value else "")
def test_a_mistake_on_the_command_line(
    at: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], line: str
) -> None:
    monkeypatch.chdir(at.folder)
    before = sorted(at.folder.iterdir())
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    out, err = capsys.readouterr()
    told = [text for text in err.splitlines() if text.startswith("coreskip: ")]
    assert (caught.value.code, out) == (2, "")
    assert [line in text for text in told] == [True], err
    assert sorted(at.folder.iterdir()) == before


def test_no_command_is_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    out, err = capsys.readouterr()
    assert (caught.value.code, err) == (0, "")
    assert out.startswith("Usage: coreskip")
    assert len(out.splitlines()) > 10


def test_windows_count_for_layers_too(at: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(at.folder)
    target = str(tmp_path / "new.plan")
    words = ("analyze", "llama", "-o", target, "--text", "story.txt", "--layers", "skip:1", "--windows", "3")
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    quality = Plan.load(target).quality
    assert caught.value.code == 0
    assert quality is not None
    assert quality["windows"] == 3


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`command` in a shell where $COMMAND is the command line; its files are loaded from this checkout."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "COMMAND": f"{sys.executable} -m coreskip", **environment}
    variables.pop("PYTHONIOENCODING", None) if "PYTHONIOENCODING" not in environment else None
    return subprocess.run(["bash", "-c", command], capture_output=True, env=variables, check=False, timeout=300)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_stdout_is_full() -> None:
    ran = shell("$COMMAND --help >/dev/full")
    assert (ran.returncode, ran.stderr) == (2, b"coreskip: cannot write to stdout: No space left on device\n")


def test_stdout_is_closed() -> None:
    ran = shell("$COMMAND --help >&-")
    assert (ran.returncode, ran.stderr.startswith(b"coreskip: stdout is closed")) == (2, True)
    ran = shell("$COMMAND nonsense 2>&-")
    assert (ran.returncode, ran.stdout) == (2, b"")


def test_nobody_reads_stdout() -> None:
    ran = shell("$COMMAND --help | true; exit ${PIPESTATUS[0]}")
    assert (ran.returncode, ran.stderr) in ((0, b""), (1, b""))
    code = "import sys; from coreskip.cli import main; sys.stdin.read(); main(['--help'])"
    started = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert started.stdout is not None
    started.stdout.close()
    started.stdout = None
    _, err = started.communicate(timeout=300)
    assert (started.returncode, err) == (1, b"")


def test_a_terminal_without_the_characters() -> None:
    code = "from coreskip import streams; streams.prepare(); import click; click.echo('caf\\u00e9 \\u2019 \\udcff')"
    ran = shell(f'{sys.executable} -c "{code}"', PYTHONIOENCODING="latin-1")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"caf\xe9 \\u2019 \\udcff\n", b"")


def test_a_prompt_of_undecodable_bytes() -> None:
    ran = shell(r"$COMMAND generate /none -p $'\xff'")
    assert (ran.returncode, ran.stdout, ran.stderr.count(b"\n")) == (2, b"", 1)
    assert b"--prompt is not valid text" in ran.stderr


def test_a_worker_whose_bench_is_gone_ends_quietly() -> None:
    """After Ctrl-C in a round there is an answer that nobody reads: the pipe then breaks with an error of its own."""
    ours, theirs = multiprocessing.Pipe()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            serve(theirs, Job("nonsense", "float32"))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    ours.send(("load", ()))
    assert ours.poll(60)
    ours.close()
    thread.join(60)
    assert not failures
