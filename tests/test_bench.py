"""The measuring protocol: on runners whose figures are known, and once on real ones in their own processes."""

from __future__ import annotations

import dataclasses
import json
import math
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny_models import greedy, prompt, tiny

from coreskip.bench import batches, curve, endurance, method_plot, speed_plot, throughput
from coreskip.bench.clock import Generation, Stopwatch
from coreskip.bench.exactness import against_hf
from coreskip.bench.processes import MACHINE, Local, RunnerFailed, Worker
from coreskip.bench.provenance import write_rows
from coreskip.bench.report import page, pareto
from coreskip.bench.row_schema import FORMAT, Row, read, write
from coreskip.bench.runner import Job
from coreskip.bench.runners import RUNNERS
from coreskip.bench.settings import Settings, settings_of
from coreskip.bench.tables import fill_tables, terminal_table
from coreskip.bench.torch_runners import HuggingFace
from coreskip.bench.workloads import PROMPTS, Prompt, Shape, byte_ids, prompts
from coreskip.cli import cli
from coreskip.predictors.calibration import TokenText
from coreskip.predictors.errors import CoreskipError
from coreskip.runtime.cost import loaded_bytes

ROOT = Path(__file__).parents[1]
HF = Job("hf", "float32")
OTHER = Job("hf", "bfloat16")


class Pretender:
    """A runner that generates 0, 1, 2, ... at a set speed without waiting for it."""

    def __init__(self, job: Job, gap: float = 0.01, worse: float = 0.0, fails_at: int | None = None) -> None:
        self.job, self.gap, self.worse, self.fails_at = job, gap, worse, fails_at
        self.timed = 0
        self.closed = False

    def __call__(self, method: str, *arguments: Any) -> Any:
        return getattr(self, method)(*arguments)

    def load(self) -> None:
        pass

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[1, 2, 3] for _ in texts]

    def scored_text(self, text: str, source: str) -> None:
        return None

    def generate(self, ids: list[int], new: int) -> Generation:
        self.timed += 1
        if self.fails_at is not None and self.timed >= self.fails_at:
            raise RunnerFailed("it fell over")
        return Generation(list(range(new)), 0.1, [self.gap] * (new - 1))

    def regrets(self, ids: list[int], tokens: list[int]) -> list[float]:
        return [self.worse] * len(tokens)

    def read_gb_s(self) -> float:
        return 20.0

    def weight_bytes(self) -> int:
        return 10**8

    def memory(self) -> int:
        return 1

    def traits(self) -> dict[str, Any]:
        return {"dtype": self.job.dtype, "method": "dense", "keep": 1.0, "neurons_skipped": 0.0}

    def versions(self) -> dict[str, str]:
        return {"coreskip": "0"}

    def close(self) -> None:
        self.closed = True


def settings(*jobs: Job, **options: Any) -> Settings:
    chosen = [Prompt("one", "a"), Prompt("two", "b")]
    return Settings(**{"jobs": jobs, "prompts": chosen, "rounds": 2, "tokens": 20, "windows": 0} | options)


def speeds(outcome: throughput.Outcome) -> dict[str, float]:
    return {row.dtype: row.tok_s["p50"] for row in outcome.rows}


def test_rows_hold_what_the_clock_said() -> None:
    outcome = throughput.run(settings(HF, OTHER), lambda job: Pretender(job, 0.01 if job.dtype == "float32" else 0.005))
    assert speeds(outcome) == pytest.approx({"float32": 100.0, "bfloat16": 200.0})
    slow, fast = outcome.rows
    assert slow.samples == 4
    assert slow.tokens == 20
    assert slow.speedup == pytest.approx({"p20": 0.5, "p50": 0.5, "p80": 0.5})  # over the better HF
    assert fast.gb_s == pytest.approx(20.0)
    assert fast.bandwidth_share == pytest.approx(1.0)
    assert fast.ttft_ms["p50"] == pytest.approx(100)
    assert fast.end_to_end_tok_s == pytest.approx(20 / (0.1 + 19 * 0.005))
    assert set(fast.tok_s_by_workload) == {"one", "two"}
    assert fast.noise == pytest.approx(0)


def test_runners_take_turns() -> None:
    order: list[str] = []

    class Noted(Pretender):
        def generate(self, ids: list[int], new: int) -> Generation:
            if new == 20:  # the timed ones
                order.append(self.job.dtype)
            return super().generate(ids, new)

        def read_gb_s(self) -> float:
            order.append("machine")
            return 20.0

    throughput.run(settings(HF, OTHER), Noted)
    assert order == ["machine", "float32", "bfloat16"] * 4


def test_wrong_output_is_refused_before_it_is_timed() -> None:
    started: list[Pretender] = []

    def start(job: Job) -> Pretender:
        # the reference is the second client: it finds one token in the first runner's output badly chosen
        started.append(Pretender(job, worse=5.0 if len(started) == 1 else 0.0))
        return started[-1]

    outcome = throughput.run(settings(HF), start)
    assert outcome.rows == []
    assert "its output is wrong: worst token 5 nats" in outcome.left_out["hf float32"]
    assert started[2].timed == 2  # each prompt once, to verify
    assert all(client.closed for client in started)


def test_a_real_model_broken_on_purpose_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(HuggingFace):
        def load(self) -> None:
            super().load()
            torch.nn.init.zeros_(self.model.model.layers[1].mlp.down_proj.weight)

    monkeypatch.setattr(HuggingFace, "load", _load_tiny)
    monkeypatch.setitem(RUNNERS, "hf-compile", Broken)
    outcome = throughput.run(settings(HF, Job("hf-compile", "float32")), Local)
    assert [row.runner for row in outcome.rows] == ["hf"]
    assert "its output is wrong" in outcome.left_out["hf-compile float32"]


def _load_tiny(self: HuggingFace) -> None:
    self.model, self.tokenizer = tiny("llama"), None


def test_coreskip_is_verified_by_its_own_plan_and_counts_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HuggingFace, "load", _load_tiny)
    text = TokenText(torch.randint(5, 128, (600,)), torch.tensor([], dtype=torch.int64), "noise")
    monkeypatch.setattr(HuggingFace, "scored_text", lambda self, content, source: text)
    sparse = Job("coreskip", "float32", plan=0.5)
    asked = settings(HF, Job("coreskip-dense", "float32"), sparse, windows=2, text=("", "noise"))
    outcome = throughput.run(asked, Local)
    hf, dense, half = outcome.rows
    assert "its own plan" in half.verified
    assert "HF eager" in dense.verified
    assert half.neurons_skipped == pytest.approx(0.5)
    model = tiny("llama")
    mlps = sum(p.nbytes for name, p in model.named_parameters() if ".mlp." in name)
    assert hf.weight_bytes_per_token == dense.weight_bytes_per_token == loaded_bytes(model)
    assert half.weight_bytes_per_token == hf.weight_bytes_per_token - mlps // 2
    assert hf.ppl == pytest.approx(dense.ppl, rel=1e-5)  # by other kernels
    assert hf.ppl != pytest.approx(half.ppl, rel=1e-5)
    assert (half.ppl_tokens, half.ppl_text) == (256, "noise")  # this model's context holds 256


def test_the_engine_runner_clocks_the_dense_plans_tokens(
    monkeypatch: pytest.MonkeyPatch, embedded: tuple[Any, Any]
) -> None:
    def load_tiny_with_tokenizer(self: HuggingFace) -> None:
        self.model, self.tokenizer = tiny("llama", vocab_size=len(embedded[1])), embedded[1]

    monkeypatch.setattr(HuggingFace, "load", load_tiny_with_tokenizer)
    ids = embedded[1](PROMPTS["qa"]).input_ids
    made = []
    for name in ("coreskip-dense", "coreskip-lookup", "coreskip-engine"):
        runner = Local(Job(name, "float32"))
        runner("load")
        made.append(runner("generate", ids, 12))
        if name == "coreskip-engine":
            with pytest.raises(RunnerFailed, match="not those of its text"):
                runner("generate", [*ids[:-1], *embedded[1]("An swer").input_ids, *embedded[1]("ing").input_ids], 2)
        runner.close()
    assert made[0].tokens == made[1].tokens == made[2].tokens
    assert len(made[1].gaps) == len(made[2].gaps) == 11


def test_a_runner_that_fails_while_timed_leaves_the_others() -> None:
    outcome = throughput.run(
        settings(HF, OTHER), lambda job: Pretender(job, fails_at=5 if job.dtype == "bfloat16" else None)
    )
    assert [row.dtype for row in outcome.rows] == ["float32"]
    assert "it fell over" in outcome.left_out["hf bfloat16"]


def test_short_output_is_refused() -> None:
    class Short(Pretender):
        def generate(self, ids: list[int], new: int) -> Generation:
            return super().generate(ids, new - 1)

    outcome = throughput.run(settings(HF), Short)
    assert "it generated 31 tokens, 32 were asked for" in outcome.left_out["hf float32"]


def test_ctrl_c_keeps_whole_rounds() -> None:
    class Interrupted(Pretender):
        def generate(self, ids: list[int], new: int) -> Generation:
            generation = super().generate(ids, new)
            if self.job.dtype == "bfloat16" and self.timed == 6:  # two to verify, one to plan, and the third round
                raise KeyboardInterrupt
            return generation

    outcome = throughput.run(settings(HF, OTHER), Interrupted)
    assert outcome.interrupted
    assert [row.samples for row in outcome.rows] == [2, 2]
    assert outcome.rows[0].noise is None  # two rounds do not tell


def test_minutes_measure_less(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: clock[0])

    class Slow(Pretender):
        def generate(self, ids: list[int], new: int) -> Generation:
            generation = super().generate(ids, new)
            clock[0] += generation.ttft + sum(generation.gaps)
            return generation

    # one generation takes 20.1 s at 1 s a token; two prompts are verified with 32
    whole = throughput.run(settings(HF, rounds=3, tokens=21, minutes=60), lambda job: Slow(job, gap=1.0))
    assert [(row.samples, row.tokens) for row in whole.rows] == [(6, 21)]
    clock[0] = 0.0
    less = throughput.run(settings(HF, rounds=3, tokens=60, minutes=2.6), lambda job: Slow(job, gap=1.0))
    assert [(row.samples, row.tokens) for row in less.rows] == [(2, 32)]
    assert clock[0] < 2.6 * 60
    clock[0] = 0.0
    none = throughput.run(settings(HF, OTHER, minutes=1.5), lambda job: Slow(job, gap=1.0))
    assert "no time left to load it" in none.left_out["hf bfloat16"]
    assert [row.tokens for row in none.rows] == [16]


def test_a_worker_is_a_process_of_its_own() -> None:
    machine = Worker(Job(MACHINE, "float32"))
    try:
        assert machine("read_gb_s") > 0
        assert machine("memory") > 1 << 29  # at least its buffer
        with pytest.raises(RunnerFailed, match="no_such"):
            machine("no_such")
        machine._process.kill()
        with pytest.raises(RunnerFailed, match="died with exit code -9"):
            machine("read_gb_s")
    finally:
        machine.close()


def test_stopwatch_counts_from_the_prompt() -> None:
    watch = Stopwatch()
    watch.put(torch.tensor([[1, 2, 3]]))
    for token in (7, 8, 9):
        watch.put(torch.tensor([token]))
    generation = watch.generation()
    assert generation.tokens == [7, 8, 9]
    assert len(generation.gaps) == 2
    assert generation.ttft > 0


def load_small(dtype: str, **options: Any) -> tuple[Any, Any]:
    """In the place of `load`: a tiny model, and a tokenizer of one token for a letter."""

    def tokenizer(text: str, **options: Any) -> Any:
        return SimpleNamespace(input_ids=torch.tensor([byte_ids(text[:500] * 4, 128)]))

    return tiny("llama").to(getattr(torch, dtype)), tokenizer


def test_endurance_measures_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(endurance, "load", load_small)
    # of one round, for the median of ratios of several is not the ratio of medians, on a machine that is busy at times
    asked = ["--context", "100", "--tokens", "5", "--rounds", "1", "--run", "30", "--each", "10"]
    result = CliRunner().invoke(
        endurance.main, ["--rows", str(tmp_path / "long.jsonl"), *asked], catch_exceptions=False
    )
    assert result.exit_code == 0
    memory, single, half = (json.loads(line) for line in (tmp_path / "long.jsonl").read_text().splitlines())
    assert list(memory["rss_mb_by_tokens"]) == ["10", "20", "30"]
    assert min(memory["rss_mb_by_tokens"].values()) > 100
    assert [(row["dtype"], row["prompt_tokens"]) for row in (single, half)] == [("float32", 100), ("bfloat16", 100)]
    assert single["same_tokens"] == 5
    assert single["speedup"] == pytest.approx(single["hf_ms_per_token"] / single["dense_ms_per_token"], rel=0.01)
    assert str(tmp_path) not in single["command"]


def test_batches_are_measured_against_the_unwrapped_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(batches, "load", load_small)
    output = tmp_path / "batches.jsonl"
    asked = ["--batches", "1,9", "--formats", "loaded,int4", "--fallbacks", "2", "--prefill", "20", "--rounds", "1"]
    words = ["--rows", str(output), *asked, "--dtypes", "float32,bfloat16", "--tokens", "4"]
    assert CliRunner().invoke(batches.main, words, catch_exceptions=False).exit_code == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    found = [(row["format"], row["plan"], row["rows"]) for row in rows if row["kind"] == "batch"]
    plans = ("dense", "static", "core", "sketch")
    assert found == [(fmt, plan, count) for fmt in ("loaded", "int4") for plan in plans for count in (1, 9)]
    assert {row["alone"] for row in rows if row["kind"] == "batch"} == {1.0}
    assert [row["case"] for row in rows if row["kind"] == "fallback"] == [*batches.FALLBACKS] * 2
    assert [row["prompt_tokens"] for row in rows if row["kind"] == "prefill"] == [20, 20]
    for row in rows:
        best = min(row["ms"]["float32"], row["ms"]["bfloat16"])
        assert row["times"] == pytest.approx(best / row["ms"]["coreskip"], rel=0.01)
    assert str(tmp_path) not in rows[0]["command"]
    table = fill_tables("<!-- table: batches --><!-- end table -->", tmp_path)
    assert "| int4 | sketch 0.50 |" in table
    assert "--batches 1,9" in table


@pytest.mark.parametrize("words", [["--formats", "int3"], ["--batches", "0"], ["--prefill", "many"]])
def test_batches_refuse_what_they_do_not_know(words: list[str]) -> None:
    result = CliRunner().invoke(batches.main, ["--rows", "no.jsonl", *words])
    assert result.exit_code == 2
    assert "is not a list of" in result.output


def test_agreement_with_hugging_face_is_counted_by_token() -> None:
    model, prompts = tiny("llama"), [prompt(1, 9), prompt(1, 9, seed=2)]
    made = [greedy(model, ids, 12) for ids in prompts]
    assert against_hf(model, prompts, made)["agreement"] == 1
    with torch.no_grad():
        logits = model(made[1][:, :-1]).logits[0, -1]
    made[1][0, -1] = logits.argmin()
    found = against_hf(model, prompts, made)
    assert found["identical"] == 1
    assert found["agreement"] == pytest.approx(23 / 24, abs=1e-5)
    assert found["largest_gap"] == pytest.approx(float(logits.max() - logits.min()), rel=1e-4)
    assert [(place["prompt"], place["at"]) for place in found["differing"]] == [(1, 11)]
    assert found["near_ties"] == 0


# --- rows, tables, report ---------------------------------------------------------------------------------------------


@pytest.fixture
def rows() -> list[Row]:
    measured = throughput.run(settings(HF, OTHER, command="coreskip bench"), lambda job: Pretender(job)).rows
    return [dataclasses.replace(row, ppl=20.0 + i, ppl_tokens=9, ppl_text="text") for i, row in enumerate(measured)]


def test_rows_survive_their_file(tmp_path: Path, rows: list[Row]) -> None:
    write(tmp_path / "rows.jsonl", rows)
    assert read([tmp_path / "rows.jsonl"]) == rows
    assert all(row.format == FORMAT for row in rows)
    assert "coreskip bench" in rows[0].command
    assert "hf" in terminal_table(rows)


@pytest.mark.parametrize(
    "change",
    [
        {"threads": "2"},
        {"ppl": math.nan},
        {"tok_s": {"p20": 3.0, "p50": 2.0, "p80": 1.0}},
        {"format": "coreskip.bench/9"},
        {"synthetic": True},
        {"surprise": 1},
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, rows: list[Row], change: dict[str, Any]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(dataclasses.asdict(rows[0]) | change))
    with pytest.raises(CoreskipError, match=r"rows\.jsonl, line 1 is not a benchmark row"):
        read([path])


def test_the_report_has_its_plots(tmp_path: Path, rows: list[Row]) -> None:
    pytest.importorskip("matplotlib")
    write(tmp_path / "rows.jsonl", rows)
    output = tmp_path / "report.html"
    result = CliRunner().invoke(cli, ["bench", "report", str(tmp_path / "rows.jsonl"), "-o", str(output)])
    assert result.exit_code == 0, result.output
    html = output.read_text()
    assert html.count("<svg") == 3
    for label in (
        "decode speed (tokens per second)",
        "perplexity (lower is better)",
        "Pareto front",
        "(percent)",
        "(ms)",
    ):
        assert label in html
    assert "src=" not in html
    assert 'href="http' not in html
    assert "<script" not in html
    assert page(rows) == html  # nothing in it depends on when it was drawn


def test_notes_of_a_runner_stand_below_its_table(tmp_path: Path) -> None:
    class Noted(Pretender):
        def traits(self) -> dict[str, Any]:
            return {**super().traits(), "notes": "KV cache in 8 bits"}

    measured = throughput.run(settings(HF, OTHER), Noted).rows
    write(tmp_path / "rows.jsonl", measured)
    table = fill_tables("<!-- table: rows -->\n<!-- end table -->", tmp_path)
    assert table.count("hf: KV cache in 8 bits\n") == 1
    assert "| TTFT ms |" in table
    older = [json.dumps({k: v for k, v in dataclasses.asdict(row).items() if k != "notes"}) for row in measured]
    (tmp_path / "rows.jsonl").write_text("\n".join(older))
    assert [row.notes for row in read([tmp_path / "rows.jsonl"])] == ["", ""]


def test_the_headline_takes_speed_and_perplexity_from_two_kinds_of_rows(tmp_path: Path, rows: list[Row]) -> None:
    fast = dict.fromkeys(("p20", "p50", "p80"), 999)
    half = dataclasses.replace(rows[0], runner="coreskip", dtype="int4", method="sketch", keep=0.6, tok_s=fast)
    write(tmp_path / "headline.jsonl", [*rows, half])
    name = "4-bit sketch, greedy, the rest int4"
    write_rows(tmp_path / "methods.jsonl", [quality_row(name, keep) for keep in (0.5, 0.6)])
    lines = fill_tables("<!-- table: short of headline+methods -->\n<!-- end table -->", tmp_path).splitlines()
    assert "| transformers; float32 | 0 % | 100 | 1.0 | 100 ms | +0 % |" in lines
    assert "| transformers; bfloat16 | 0 % | 100 | 1.0 | 100 ms |  |" in lines
    assert (
        "| coreskip, neurons chosen at every token; 4-bit weights | 40 % | 999 | 1.0 | 100 ms | +8.33 ± 0.40 % |"
        in lines
    )
    assert sum(line.startswith(f"Perplexity of {name}: weights in float32, 64 tokens of t.txt") for line in lines) == 1


def test_pareto_front() -> None:
    assert pareto([(10, 20), (30, 25), (20, 22), (15, 30), (5, 20)]) == [(30, 25), (20, 22), (10, 20)]


@pytest.mark.parametrize("document", ["README.md", "bench/RESULTS.md"])
def test_tables_of_the_documents_are_up_to_date(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert fill_tables(text, ROOT / "bench" / "rows") == text, "run `make tables`"


def test_committed_rows_are_rows() -> None:
    paths = [ROOT / "bench" / "rows" / f"{name}.jsonl" for name in ("peers", "core", "static")]
    assert all(read([path]) for path in paths)


def test_tables_are_made_from_rows(tmp_path: Path, rows: list[Row]) -> None:
    write(tmp_path / "mine.jsonl", rows)
    text = "before\n<!-- table: mine -->\nold\n<!-- end table -->\nafter"
    filled = fill_tables(text, tmp_path)
    assert "| hf | float32 |" in filled
    assert "old" not in filled
    assert filled.startswith("before\n")
    assert filled.endswith("\nafter")
    assert fill_tables(filled, tmp_path) == filled
    with pytest.raises(CoreskipError, match="no `<!-- end table"):
        fill_tables("<!-- table: mine -->", tmp_path)


def quality_row(name: str, keep: float, **more: Any) -> dict[str, Any]:
    about = {"model": "tiny", "dtype": "float32", "device": "cpu", "tokens": 64, "text": "t.txt", "windows": 2}
    figures = {"ppl_increase": 0.05 / keep, "ppl_increase_stderr": 0.004, "kl": 0.02, "top1_agreement": 0.9}
    figures |= {"dense": {"ppl": 20.0}, "sparse": {"ppl": 20.5}, "neuron_sparsity": 1 - keep}
    return {"name": name, "keep": keep, **about, **figures, "time": "2026", "commit": None, "command": name, **more}


def test_quality_rows_of_two_files_are_one_table(tmp_path: Path) -> None:
    speed = {"tok_s": {"p20": 90.0, "p50": 100.0, "p80": 110.0}, "speedup": 2.0, "megabytes": 12.3}
    timed = {"timed": {"threads": 2, "commit": "abc", "command": "time it"}}
    for name, more in (("one", {}), ("two", {**speed, **timed})):
        write_rows(tmp_path / f"{name}.jsonl", [quality_row(name, keep, **more) for keep in (0.7, 0.5)])
    filled = fill_tables("<!-- table: one+two -->\n<!-- end table -->", tmp_path)
    assert "| one | 0.7 | 30 % | 20.50 | +7.14 ± 0.40 % | 0.020 | 90 % |  |  |  |" in filled
    assert "| two | 0.5 | 50 % | 20.50 | +10 ± 0 % | 0.020 | 90 % | 12 | 100 (90-110) | 2.00 |" in filled
    assert "commit abc: `time it`" in filled
    one = fill_tables("<!-- table: one -->\n<!-- end table -->", tmp_path)
    assert "tok/s" not in one, "no column without a figure"


def test_the_plot_of_quality_has_every_method(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    speed = {"tok_s": {"p20": 90.0, "p50": 100.0, "p80": 110.0}}
    write_rows(tmp_path / "r.jsonl", [quality_row("untimed", 0.7), quality_row("timed", 0.5, **speed)])
    output = tmp_path / "plot.svg"
    result = CliRunner().invoke(method_plot.main, [str(tmp_path / "r.jsonl"), "-o", str(output)])
    assert result.exit_code == 0, result.output
    drawn = output.read_text()
    for label in ("untimed", "timed", "MLP neurons skipped (percent)", "decode speed (tokens per second)"):
        assert label in drawn
    before = drawn
    CliRunner().invoke(method_plot.main, [str(tmp_path / "r.jsonl"), "-o", str(output)])
    assert output.read_text() == before


def test_the_plot_of_the_methods_is_up_to_date() -> None:
    """Its methods are those of the rows; matplotlib's versions draw them a little differently."""
    pytest.importorskip("matplotlib")
    folder = ROOT / "bench"
    rows = [folder / "rows" / f"{name}.jsonl" for name in ("core_neurons", "token_choice")]
    lines = [json.loads(line) for path in rows for line in path.read_text(encoding="utf-8").splitlines()]
    names = {row["name"] for row in lines}
    drawn = (folder / "quality.svg").read_text(encoding="utf-8")
    assert all(escape(name, quote=False) in drawn for name in names), "run `make tables`"


def test_the_plot_of_speeds_has_every_runner(tmp_path: Path, rows: list[Row]) -> None:
    pytest.importorskip("matplotlib")
    sparse = dataclasses.replace(rows[0], runner="coreskip", keep=0.5, method="core")
    write(tmp_path / "rows.jsonl", [*rows, sparse])
    output = tmp_path / "plot.svg"
    result = CliRunner().invoke(speed_plot.main, [str(tmp_path / "rows.jsonl"), "-o", str(output)])
    assert result.exit_code == 0, result.output
    drawn = output.read_text()
    assert all(f">{row.label}<" in drawn for row in [*rows, sparse])
    committed = (ROOT / "bench" / "speed.svg").read_text(encoding="utf-8")
    peers = read([ROOT / "bench" / "rows" / "peers.jsonl"])
    assert all(f">{row.label}<" in committed for row in peers), "run `make tables`"


def test_the_curve_beyond_dense_int4_is_up_to_date() -> None:
    """Every way of choosing that was timed is drawn, beside the point to beat."""
    pytest.importorskip("matplotlib")
    rows = [json.loads(line) for line in (ROOT / "bench" / "rows" / "curve.jsonl").read_text().splitlines()]
    timed = [row for row in rows if "of_dense" in row]
    assert {row["name"] for row in timed} == {curve.DENSE, *curve.CURVES}
    committed = (ROOT / "bench" / "curve.svg").read_text(encoding="utf-8")
    for drawn in (curve.drawn(rows), committed):
        assert all(f">{name}" in drawn for name in (row["name"] for row in timed)), "run `make tables`"


# --- workloads and options --------------------------------------------------------------------------------------------


def test_prompts(tmp_path: Path) -> None:
    assert [prompt.name for prompt in prompts()] == list(PROMPTS)
    file = tmp_path / "mine.txt"
    file.write_text("first\nprompt\n---\nsecond\n")
    assert [(p.name, p.text) for p in prompts(file=file)] == [("mine-1", "first\nprompt"), ("mine-2", "second")]
    with pytest.raises(CoreskipError, match="unknown workload 'poetry'"):
        prompts(("poetry",))


def test_shapes_have_the_sparsity_that_they_state() -> None:
    shape = Shape("opt-1.3b", layers=1, sparsity=0.8)
    model = shape.build(torch.float32, torch.device("cpu"))
    zero: list[float] = []
    hook = model.model.decoder.layers[0].fc2.register_forward_pre_hook(
        lambda module, inputs: zero.append(float((inputs[0] == 0).float().mean()))
    )
    with torch.no_grad():
        logits = model(torch.tensor([byte_ids(PROMPTS["prose"], shape.vocabulary)])).logits
    hook.remove()
    assert zero[0] == pytest.approx(0.8, abs=0.02)
    assert float(logits.std()) == pytest.approx(3, rel=0.1)
    assert "80% of neurons zero" in str(shape)


def test_the_engine_is_timed_where_steps_are_short() -> None:
    assert [str(job) for job in settings_of(model=None, against="none", dtypes="float32,int4").jobs] == [
        *("coreskip-dense float32", "coreskip-dense int4", "coreskip-engine int4", "coreskip-lookup int4"),
        "coreskip-exact float32",
    ]


def test_a_shape_has_no_perplexity(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings_of(model=None, shape="opt-1.3b", layers=1, against="hf", keeps=(0.5,), windows=4)
    assert [str(job) for job in chosen.jobs] == [
        *("hf float32", "hf bfloat16", "coreskip-dense float32", "coreskip-dense bfloat16", "coreskip-dense int4"),
        *("coreskip float32 0.5", "coreskip bfloat16 0.5", "coreskip int4 0.5"),
    ]
    outcome = throughput.run(dataclasses.replace(chosen, rounds=1), lambda job: Pretender(job))
    assert all(row.synthetic and row.ppl is None for row in outcome.rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "vllm"], "unknown runner 'vllm'"),
        (["--dtype", "int3"], "unknown dtype 'int3'"),
        (["--layers", "2"], "are for a --shape"),
        (["--shape", "gpt-5"], "unknown shape 'gpt-5'"),
        (["--shape", "opt-1.3b", "--against", "llama.cpp"], "takes no --shape"),
        (["--plan", "nowhere.plan"], "there is no plan at nowhere.plan"),
        (["--keep", "1.5"], "keep"),
        (["--prompts", "nowhere.txt"], "cannot read the prompts"),
    ],
)
def test_mistakes_are_refused_before_anything_is_loaded(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["bench", *arguments])
    assert isinstance(result.exception, CoreskipError)
    assert message in str(result.exception)
