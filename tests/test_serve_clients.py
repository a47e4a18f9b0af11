"""Clients from the registry, unmodified, on the embedded model. `make test-clients` installs them and runs this; where
they are absent it is skipped."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from served import MESSAGES, Served, serving

QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "a small fish", "unknown"], "answer": 0},
    {"question": "Water boils at one hundred degrees", "choices": ["Celsius", "of freedom"], "answer": 0},
    {"question": "Ein Baum hat viele", "choices": ["Blätter", "Räder 🙂", "€ ∮"], "answer": 0},
]
TASK = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(library) is None, reason=f"{library} is not installed")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving("", "--name", "smol", folder=tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, embedded: tuple[Any, Any]) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    embedded[1].save_pretrained(path)
    return path


@needs("lm_eval")
def test_lm_eval(
    served: Served, tokenizer_folder: Path, embedded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`local-completions` on a task in a file: the log-likelihoods are plain transformers'."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "choices.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    options = f"model=smol,base_url={served.url}/v1/completions,tokenizer={tokenizer_folder},batch_size=4"
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=options,
        tasks=["choices"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    assert found["results"]["choices"]["acc,none"] == 1
    model, tokenizer = embedded
    compared = 0
    for sample in found["samples"]["choices"]:
        for (context, ending), ((loglikelihood, greedy),) in zip(sample["arguments"], sample["resps"], strict=True):
            ids, start = tokenizer(context + ending)["input_ids"], len(tokenizer(context)["input_ids"])
            rows = model(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
            places = range(start, len(ids))
            assert loglikelihood == pytest.approx(sum(float(rows[i - 1, ids[i]]) for i in places), abs=1e-3)
            assert bool(greedy) == all(int(rows[i - 1].argmax()) == ids[i] for i in places)
            compared += 1
    assert compared == 8


@needs("litellm")
def test_litellm(served: Served) -> None:
    import litellm

    asked: Any = {"model": "openai/smol", "api_base": f"{served.url}/v1", "api_key": "none", "messages": MESSAGES}
    asked |= {"max_tokens": 10, "temperature": 0}
    whole = litellm.completion(**asked, logprobs=True, top_logprobs=2)
    assert len(whole.choices[0].logprobs.content) == 10
    chunks = litellm.completion(**asked, stream=True, stream_options={"include_usage": True})
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    again = [*MESSAGES, whole.choices[0].message.model_dump(), {"role": "user", "content": "Another."}]
    assert litellm.completion(**{**asked, "messages": again}).choices[0].message.content
    with pytest.raises(litellm.BadRequestError, match="knows no tools"):
        litellm.completion(**asked, tools=[{"type": "function", "function": {"name": "find"}}])


@needs("guidellm")
def test_guidellm(served: Served, tokenizer_folder: Path, tmp_path: Path) -> None:
    """A load generator: streams that ask for usage, beside each other."""
    program = Path(sys.executable).with_name("guidellm")
    words = [
        "--backend", f"kind=openai_http,target={served.url},model=smol", "--profile", "kind=concurrent,streams=3",
        "--constraint", "kind=max_requests,count=6", "--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=8",
        "--tokenizer", f"kind=hf_auto,model={tokenizer_folder}", "--disable-console-interactive",
        "--output", f"kind=json,path={tmp_path / 'report.json'}",
    ]  # fmt: skip
    done = subprocess.run([program, "run", *words], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (6, 0)
