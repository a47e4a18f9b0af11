"""Generating in less memory than the weights: ours, the same weights mapped, and accelerate's disk offload of them.

    python -m coreskip.bench.memory FOLDER --cap 0.5 --cap 0.25 --rows bench/rows/memory.jsonl
    python -m coreskip.bench.memory --shape llama-3.2-1b --weights bfloat16 --work /tmp/shapes --cap 0.5

FOLDER is a packed model; --shape makes one with random weights, and the bfloat16 checkpoint of it that accelerate
offloads, and keeps both in --work. A cap is a share of the file of weights, or bytes ("1GB").

Each way is a process of its own in a memory control group of its own, version 1 or 2, with the cap as its limit and
without swap; the page cache is dropped before. What the libraries take is loaded before the process joins the group:
the limit is on the model, its texts and its reads, the page cache's pages among them. Without the right to make such
a group, nothing limits the ways but what they are told, and the rows say so. All ways make greedy text from the same
tokens; `same_text` compares it with that of the same weights without a cap.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import transformers

from coreskip.bench.method_quality import undo_wikitext
from coreskip.bench.provenance import model_name, provenance, write_rows
from coreskip.bench.workloads import Shape
from coreskip.kernels import slots
from coreskip.kernels.files import DirectFile
from coreskip.predictors.calibration import read_text, tokenize
from coreskip.predictors.checks import PACKINGS
from coreskip.predictors.errors import CoreskipError
from coreskip.predictors.files import check_file
from coreskip.predictors.plan import LayerPlan, Plan, default_weights
from coreskip.predictors.policies import NeuronPolicy, Sketch, Static
from coreskip.runtime.analyze import analyze
from coreskip.runtime.load import load
from coreskip.runtime.memory import Capped
from coreskip.runtime.memory_size import bytes_of, share_of, text_of
from coreskip.runtime.options import Budget
from coreskip.runtime.pack import pack
from coreskip.runtime.packed_folder import WEIGHTS
from coreskip.runtime.wrap import is_wrapped, runtime_of, wrap

Row = dict[str, Any]
BESIDE = 64  # MB of a group beside its cap: page tables, threads, modules that the libraries load late
_SHARES = (0.75, 0.5, 0.35, 0.2)  # of the cap that accelerate may fill: the largest that survives counts
_PROMPT = 32  # tokens
_WARM = 4  # tokens before those that are timed
#: ways to use slots: what is added to a way's name, whether they read ahead, and the half-life of a use
_SETTINGS = (("", True, slots.HALF_LIFE), (", not ahead", False, slots.HALF_LIFE), (", least recent", True, 0.0))


# ---- a way, in its own process ----


class _Clock(transformers.generation.streamers.BaseStreamer):
    """When each token came, and what had been read by then."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen += [_used()] * value.numel()

    def end(self) -> None:
        pass


def _used() -> dict[str, float]:
    """The time, bytes that this process had read from disks, and its faults that waited for one."""
    io = Path("/proc/self/io")
    lines = dict(line.split(": ") for line in io.read_text().splitlines()) if io.is_file() else {}
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    return {"s": time.perf_counter(), "bytes": int(lines.get("read_bytes", 0)), "faults": faults}


def _ours(folder: Path, cap: int | None, plan: str | None) -> Any:
    model, _ = load(folder, memory=cap)
    return wrap(model, plan)


def _accelerated(folder: Path, cap: int | None, plan: str | None) -> Any:
    """From a checkpoint of transformers, with at most `cap` bytes of it in memory."""
    options: dict[str, Any] = {"device_map": "auto", "max_memory": {"cpu": cap}, "offload_folder": folder / "offload"}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()


_LOADERS: dict[str, Callable[[Path, int | None, str | None], Any]] = {"ours": _ours, "accelerate": _accelerated}


def warm_up(folder: Path) -> None:
    """What the libraries import late, they import now; a tokenizer takes 45 MB whatever model it is for."""
    with contextlib.suppress(OSError, ValueError):
        transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model: Any = transformers.LlamaForCausalLM(config)
    with wrap(model), torch.no_grad():
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False, pad_token_id=0)


def join(group: str | None) -> None:
    """This process is in the group from now on."""
    if group is not None:
        (Path(group) / "cgroup.procs").write_text(str(os.getpid()))


def _serve(
    group: str | None, way: str, folder: str, cap: int | None, plan: str | None, tokens: int, text: str | None,
    windows: int, ahead: bool, half_life: float,
) -> None:  # fmt: skip
    """Runs a way and prints its figures."""
    slots.AHEAD, slots.HALF_LIFE = ahead, half_life
    warm_up(Path(folder))
    join(group)
    begin = time.perf_counter()
    model = _LOADERS[way](Path(folder), cap, plan)
    ready = time.perf_counter()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(5, vocabulary, (1, _PROMPT), generator=torch.Generator().manual_seed(0))
    words = None if text is None else _windows_of(Path(folder), text, tokens, windows)

    def generate(count: int) -> _Generated:
        if words is not None:
            return _read_along(model, words[:1, : _PROMPT + count] if count < tokens else words, count)
        clock, mask = _Clock(), torch.ones_like(ids)
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        # random weights repeat a token for ever, whose neurons and experts would always be there
        options["no_repeat_ngram_size"] = 1
        with torch.no_grad():
            output = model.generate(ids, attention_mask=mask, streamer=clock, **options)
        return _Generated(output[0, _PROMPT:].tolist(), [clock.seen[_PROMPT:]])

    generate(_WARM)
    before = _chosen_by(model) if way == "ours" else {}
    start = time.perf_counter()
    made = generate(tokens)
    steps = sum(len(seen) - 1 for seen in made.seen)
    taken = {name: sum(seen[-1][name] - seen[0][name] for seen in made.seen) / steps for name in made.seen[0][0]}
    figures = {
        "load_s": ready - begin,
        "first_token_s": made.seen[0][0]["s"] - start,
        "tokens_per_second": 1 / taken["s"],
        "bytes_read_per_token": taken["bytes"],
        "major_faults_per_token": taken["faults"],
        "text": made.text,
        **({"loss": made.loss} if made.loss is not None else {}),
    }
    memory = runtime_of(model).memory if way == "ours" else None
    if isinstance(memory, Capped):
        figures |= {"kept_bytes": memory.kept_bytes, "streamed_bytes": memory.streamed_bytes}
        figures |= _told_of_slots({name: now - before[name] for name, now in _chosen_by(model).items()}, len(made.text))
    print(json.dumps(figures))


@dataclass
class _Generated:
    """text: the tokens. seen: of each stretch, what was used up when each of its tokens had come. loss: nats a token of
    a text that was there."""

    text: list[int]
    seen: list[list[dict[str, float]]]
    loss: float | None = None


def _windows_of(folder: Path, text: str, tokens: int, count: int) -> torch.Tensor:
    """Of the second half of a text, which nothing was trained or calibrated on, int64 ``[count, prompt + tokens]``: its
    beginning behind a short prompt, or windows from all of it behind prompts as long as what is decoded."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    unseen = tokenize(tokenizer, undo_wikitext(read_text(text)), text).split(0.5, 0.5)[1]
    return unseen.ids[None, : _PROMPT + tokens] if count == 1 else unseen.windows(2 * tokens, count)


def _read_along(model: Any, windows: torch.Tensor, tokens: int) -> _Generated:
    """Decodes texts that are there, token by token behind their prompts: what the model would have said after each."""
    found, losses = _Generated([], []), list[float]()
    with torch.no_grad():
        for ids in windows[:, None]:
            prompt = ids.shape[1] - tokens
            cache, seen = transformers.DynamicCache(config=model.config), list[dict[str, float]]()
            with _room_for(model, prompt, ids.shape[1]):
                output = model(ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
                for index in range(prompt, ids.shape[1]):
                    # what comes next was foretold by the token before
                    losses.append(float(-output.logits[0, -1].float().log_softmax(-1)[ids[0, index]]))
                    output = model(ids[:, index : index + 1], past_key_values=cache, use_cache=True)
                    found.text.append(int(output.logits[0, -1].argmax()))
                    seen.append(_used())
            found.seen.append(seen)
    found.loss = sum(losses) / len(losses)
    return found


def _room_for(model: Any, prompt: int, length: int) -> AbstractContextManager[None]:
    """What `generate` sees to itself: that memory is kept for a text's keys and values."""
    return runtime_of(model).memory.holding(1, prompt, length) if is_wrapped(model) else nullcontext()


def _chosen_by(model: Any) -> dict[str, int]:
    """What slots have done so far; nothing where there are none."""
    memory = runtime_of(model).memory
    found = memory.residency.slots if isinstance(memory, Capped) else None
    return {} if found is None else {**found.figures(), "bytes": 0}


def _told_of_slots(made: dict[str, int], tokens: int) -> Row:
    """hits: of the units that tokens chose the share that was there, or on its way, when they were; waits: seconds a
    token."""
    if not made or not made["wanted"]:
        return {}
    return {
        "hits": 1 - made["missed"] / made["wanted"],
        "read_early": made["expected"] / made["wanted"],
        "waits": made["waited"] / 1e9 / tokens,
        "bytes_a_read": made["read_bytes"] / max(1, made["reads"]),
        "slot_bytes_read_per_token": made["read_bytes"] / tokens,
    }


# ---- groups ----


class Group:
    """A memory control group with a limit, or none where it may not be made: `path` is None then."""

    def __init__(self, limit: int) -> None:
        self.path, self._old = self._make(), True
        if self.path is None:
            return
        self._old = (self.path / "memory.limit_in_bytes").exists()
        limits = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"] if self._old else ["memory.max"]
        (self.path / limits[0]).write_text(str(limit))
        with contextlib.suppress(OSError):  # where there is no swap, there is none to forbid
            (self.path / limits[1] if self._old else self.path / "memory.swap.max").write_text(
                str(limit) if self._old else "0"
            )

    @staticmethod
    def _make() -> Path | None:
        mount = Path("/sys/fs/cgroup")
        for line in Path("/proc/self/cgroup").read_text().splitlines() if mount.is_dir() else ():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            place = (mount / "memory" if controllers else mount) / path.strip("/") / f"coreskip-{os.getpid()}"
            with contextlib.suppress(OSError):
                place.mkdir()
                if (place / "memory.limit_in_bytes").exists() or (place / "memory.max").exists():
                    return place
                place.rmdir()
        return None

    def peak(self) -> int | None:
        """Bytes that it has taken at most."""
        name = "memory.max_usage_in_bytes" if self._old else "memory.peak"
        with contextlib.suppress(OSError):
            return None if self.path is None else int((self.path / name).read_text())
        return None

    def close(self) -> None:
        for _ in range(50 if self.path is not None else 0):
            with contextlib.suppress(OSError):
                self.path.rmdir()  # type: ignore[union-attr]
                return
            time.sleep(0.1)


def drop_page_cache() -> bool:
    """Whether it could be done."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


# ---- all ways ----


def run_way(
    way: str, folder: Path, cap: int | None, plan: Path | None, tokens: int, limit: int | None,
    text: Path | None = None, windows: int = 1, ahead: bool = True, half_life: float = slots.HALF_LIFE,
) -> Row | None:  # fmt: skip
    """A way's figures; None where it was killed for its memory. limit: of the group that it runs in. text: what is
    decoded, in so many windows; None: what the model makes. ahead, half_life: of slots."""
    asked = (way, folder, cap, plan, tokens, text, windows, ahead, half_life)
    return in_a_group("coreskip.bench.memory", asked, limit)


def in_a_group(module: str, asked: Iterable[Any], limit: int | None) -> Row | None:
    """The figures that ``python -m module --serve GROUP ...`` prints, in a process and a group of its own with this
    limit, behind an empty page cache; None where it was killed for its memory."""
    group = None if limit is None else Group(limit)
    place = None if group is None or group.path is None else group.path
    drop_page_cache()
    words = [json.dumps(str(value) if isinstance(value, Path) else value) for value in (place, *asked)]
    done = subprocess.run([sys.executable, "-m", module, "--serve", *words], capture_output=True, text=True)
    peak = None if group is None else group.peak()
    if group is not None:
        group.close()
    if done.returncode < 0:
        return None
    if done.returncode:
        raise CoreskipError(f"{module} failed: {done.stderr.strip().splitlines()[-1:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "peak_bytes": peak, "grouped": place is not None}


def _accelerate_at_best(checkpoint: Path, cap: int, tokens: int, limit: int) -> Row | None:
    for share in _SHARES:
        found = run_way("accelerate", checkpoint, int(share * cap), None, tokens, limit)
        if found is not None:
            return {**found, "kept_bytes": int(share * cap)}
    return None


def measure(
    folder: Path, caps: tuple[str, ...], tokens: int, plans: tuple[Path, ...], checkpoint: Path | None,
    slow_tokens: int, slots_too: bool = False, text: Path | None = None, windows: int = 1, only: tuple[str, ...] = (),
    beside: int = BESIDE << 20,
) -> Iterator[Row]:  # fmt: skip
    """One row a way and a cap. text, windows: see `run_way`; all ways decode the same then. slots_too: other ways to
    use slots, too. only: ways under a cap whose names begin so; none: all."""
    file = folder / WEIGHTS
    size, bandwidth = file.stat().st_size, DirectFile(os.open(file, os.O_RDONLY)).bandwidth
    about = {"kind": "capped", "model": model_name(str(folder)), "weight_bytes": size, "disk_bandwidth": bandwidth}
    slow_tokens = slow_tokens if windows == 1 else tokens

    def ours(cap: int | None, plan: Path | None, limit: int | None, count: int = tokens, **of_slots: Any) -> Row | None:
        return run_way("ours", folder, cap, plan, count, limit, text, windows, **of_slots)

    free = ours(None, None, None)
    assert free is not None
    expected = free["text"]
    yield {**about, "way": "no cap", **_told(free, expected)}
    own = {plan: ours(None, plan, None) for plan in plans}
    texts = {plan: expected if found is None else found["text"] for plan, found in own.items()}
    for asked in caps:
        cap = cap_in(asked, size)
        limit = cap + beside
        ways: dict[str, Callable[[], Row | None]] = {
            "memory": partial(ours, cap, None, limit),
            "mapped": partial(ours, None, None, limit, slow_tokens),
        }
        for plan in plans if plans or not slots_too else (None,):
            for others, ahead, half_life in _SETTINGS if slots_too else _SETTINGS[:1]:
                name = f"memory, {plan.name}{others}" if plan is not None else f"memory{others}"
                ways[name] = partial(ours, cap, plan, limit, ahead=ahead, half_life=half_life)
        if checkpoint is not None:
            ways["accelerate"] = partial(_accelerate_at_best, checkpoint, cap, slow_tokens, limit)
        for name, run in ways.items():
            if only and not name.startswith(only):
                continue
            found = run()
            row = {**about, "way": name, "cap": cap, "limit_bytes": limit}
            plan = next((plan for plan in plans if name.startswith(f"memory, {plan.name}")), None)
            row |= {} if plan is None else {"recipe": Plan.load(plan).recipe}
            own_text = expected if plan is None else texts[plan]
            yield row | ({"killed": True} if found is None else _told(found, own_text, free.get("loss")))


def _told(found: Row, expected: list[int], dense_loss: float | None = None) -> Row:
    """ppl_increase: beside the dense model without a cap, on the same text."""
    text = found.pop("text")
    if dense_loss is not None and "loss" in found:
        found["ppl_increase"] = math.expm1(found["loss"] - dense_loss)
    return {**found, "tokens": len(text), "same_text": text == expected[: len(text)]}


def cap_in(text: str, size: int) -> int:
    share = share_of(text)
    return bytes_of(text) if share is None else int(share * size)


def make_shape(name: str, weights: str, work: Path) -> tuple[Path, Path]:
    """A packed model of random weights, and the checkpoint of the same in bfloat16."""
    checkpoint, folder = work / name, work / f"{name}.{weights}"
    if not (checkpoint / "config.json").is_file():
        Shape(name).build(torch.bfloat16, torch.device("cpu")).save_pretrained(checkpoint)
    if not folder.is_dir():
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
        pack(model, load()[1], folder, weights=weights)
    return folder, checkpoint


def plan_for_budget(folder: Path, budget: str, cap: int, text: Path, target: Path) -> Path:
    """The fastest plan found that holds a budget on the first half of a text, and the cap."""
    model, tokenizer = load(folder)
    seen = tokenize(tokenizer, undo_wikitext(read_text(text)), text.name).split(0.5, 0.5)[0]
    analyze(model, tokenizer, budget=budget, memory=cap, text=seen, fast=True, progress=False).save(target)
    del model
    gc.collect()
    return target


def _at_random(width: int, keep: float, generator: torch.Generator) -> NeuronPolicy:
    return Static(torch.randperm(width, generator=generator)[: round(keep * width)].sort().values)


def _by_sketch(width: int, keep: float, generator: torch.Generator) -> NeuronPolicy:
    return Sketch(keep=keep)


def plan_for_speed(folder: Path, method: str, make: Callable[..., NeuronPolicy], keep: float, target: Path) -> Path:
    """A plan that keeps so many neurons of every layer, not calibrated: for speed, not for quality."""
    model, _ = load(folder)
    dense, generator = Plan.dense(model), torch.Generator().manual_seed(0)
    layers = tuple(LayerPlan(make(width, keep, generator)) for width in dense.model.intermediate_sizes)
    replace(dense, layers=layers, weights=default_weights(model), recipe={"method": method}).save(target)
    del model, dense, layers
    gc.collect()  # pages of a file that is still mapped are not dropped, and are free memory to whoever maps it
    return target


@click.command(help=__doc__)
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--shape", help="Random weights of a real shape.")
@click.option("--weights", type=click.Choice(PACKINGS), default="bfloat16", show_default=True, help="Of the shape.")
@click.option("--work", type=click.Path(path_type=Path), help="Where the shape's files are kept.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="FOLDER's model for accelerate, of transformers.")
@click.option("--cap", "caps", multiple=True, default=("0.5", "0.25"), show_default=True)
@click.option("--plan", "plans", multiple=True, type=click.Path(path_type=Path), help="Under the caps, too.")
@click.option("--keep", "keeps", multiple=True, type=float, help="Under the caps, too: so many neurons, fixed.")
@click.option("--sketch", "sketches", multiple=True, type=float, help="Under the caps, too: so many, token by token.")
@click.option(
    "--slots", "slots_too", is_flag=True, help="What tokens choose without reading ahead, and by other rules."
)
@click.option(
    "--budget", "budgets", multiple=True, help="Under the caps, too: what is found for it on --text's first half."
)
@click.option("--text", type=click.Path(path_type=Path), help="Decode this file's second half, not what models make.")
@click.option("--windows", default=1, show_default=True, help="Of --text: so many, behind prompts as long as --tokens.")
@click.option("--only", multiple=True, help="Ways under the caps whose names begin so: mapped, 'memory, sketch'.")
@click.option("--tokens", default=32, show_default=True, help="Of our ways.")
@click.option("--slow-tokens", default=8, show_default=True, help="Of mapping and accelerate.")
@click.option("--beside", default=BESIDE, show_default=True, help="MB of a group beside the cap.")
@click.option("--rows", type=click.Path(path_type=Path), help="Where the rows go.")
def main(
    folder: Path | None, shape: str | None, weights: str, work: Path | None, checkpoint: Path | None,
    caps: tuple[str, ...], plans: tuple[Path, ...], keeps: tuple[float, ...], sketches: tuple[float, ...],
    slots_too: bool, budgets: tuple[str, ...], text: Path | None, windows: int, only: tuple[str, ...], tokens: int,
    slow_tokens: int, beside: int, rows: Path | None,
) -> None:  # fmt: skip
    if (folder is None) == (shape is None) or (shape is not None and work is None):
        raise click.UsageError("give the folder of a packed model, or a --shape and where to --work")
    if budgets and text is None:
        raise click.UsageError("a --budget is searched for on the first half of a text: give --text")
    for budget in budgets:
        Budget.parse(budget)
    if rows is not None:
        check_file(rows)
    if shape is not None:
        assert work is not None
        folder, checkpoint = make_shape(shape, weights, work)
    assert folder is not None
    found, about = [], provenance("python -m coreskip.bench.memory " + " ".join(sys.argv[1:]))
    with tempfile.TemporaryDirectory() as place:
        kinds = (("static, at random", _at_random, "keep", keeps), ("sketch", _by_sketch, "sketch", sketches))
        for method, make, name, shares in kinds:
            targets = {keep: Path(place) / f"{name} {keep:g}" for keep in shares}
            plans += tuple(plan_for_speed(folder, method, make, keep, to) for keep, to in targets.items())
        size = (folder / WEIGHTS).stat().st_size
        # a budget's plan is made for a cap, others are the same under all
        for some in ((cap,) for cap in caps) if budgets else (caps,):
            searched = tuple(
                plan_for_budget(folder, budget, cap_in(some[0], size), text, Path(place) / f"{budget} at {some[0]}")
                for budget in budgets
                if text is not None
            )
            asked = (folder, some, tokens, plans + searched, checkpoint, slow_tokens, slots_too, text, windows, only)
            for row in measure(*asked, beside=beside << 20):
                found.append(row | about)
                click.echo(_line(row))
                if rows is not None:
                    write_rows(rows, found)


def _line(row: Row) -> str:
    cap = "no cap" if "cap" not in row else text_of(row["cap"])
    if row.get("killed"):
        return f"{cap:>9}  {row['way']:24} killed for its memory"
    peak = "-" if row["peak_bytes"] is None else text_of(row["peak_bytes"])
    return (
        f"{cap:>9}  {row['way']:24} {row['tokens_per_second']:7.2f} tok/s, first {row['first_token_s']:5.2f} s, "
        f"{text_of(row['bytes_read_per_token'])} read and {row['major_faults_per_token']:.0f} faults a token, "
        f"peak {peak}, {'the same text' if row['same_text'] else 'another text'}"
        + (f", perplexity {row['ppl_increase']:+.2%}" if "ppl_increase" in row else "")
        + (f", hits {row['hits']:.3f}, waits {row['waits']:.3f} s" if "hits" in row else "")
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _serve(*map(json.loads, sys.argv[2:]))
    else:
        main()
