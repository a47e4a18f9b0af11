"""Timing on a GPU: sequences of launches in a CUDA graph; where there is none, the interpreter, to see that it runs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coreskip.bench.provenance import commit, device_name

FORMAT = "coreskip.bench.gpu/1"


@dataclass
class GpuRow:
    """One line of results. Figures that a part could not have are null.

    Attributes:
        part: machine, check, kernel, small, launches, step or prediction. name: of what was run. shape: hidden x
            intermediate, or a model's. fmt: of its weights. rows: of x, or sequences. keep: share of the neurons, or
            inputs.
        us: per call, or per token of a step: p20, p50, p80. nbytes: of weights read by one. gb_s: bytes over p50.
        share: of the copy bandwidth that the run measured. against: times as fast as the baseline that notes name.
        tok_s: of all sequences together. error, limit: largest difference over the definition's largest value.
        small, products: launches of a layer. ok: whether it agrees with its definition, or ran at all. notes: what else
        has to be known.
    """

    part: str
    name: str
    shape: str = ""
    fmt: str = ""
    rows: int = 1
    keep: float = 1.0
    us: dict[str, float] | None = None
    nbytes: int | None = None
    gb_s: float | None = None
    share: float | None = None
    against: float | None = None
    tok_s: float | None = None
    error: float | None = None
    limit: float | None = None
    small: int | None = None
    products: int | None = None
    ok: bool = True
    notes: str = ""
    kind: str = field(default="gpu")  # of table
    format: str = field(default=FORMAT)

    def line(self) -> str:
        """For people."""
        figures = [f"{self.part:10} {self.name:34} {self.shape:12} {self.fmt:9} x{self.rows:<2} keep {self.keep:<4g}"]
        figures.append("      -" if self.us is None else f"{self.us['p50']:9.1f} us")
        figures += [] if self.gb_s is None else [f"{self.gb_s:6.0f} GB/s"]
        figures += [] if self.share is None else [f"{self.share:5.2f} of copy"]
        figures += [] if self.tok_s is None else [f"{self.tok_s:7.1f} tok/s"]
        figures += [] if self.against is None else [f"{self.against:5.2f} x"]
        figures += [] if self.error is None else [f"error {self.error:.1e} of {self.limit:.1e}"]
        return "  ".join([*figures, *([] if self.ok else ["FAILED"]), self.notes])


class Results:
    """Prints rows and appends them to a file as they come, for what comes later may fail."""

    def __init__(self, path: Path | None, seconds: float, command: str) -> None:
        self._path, self._end = path, time.monotonic() + seconds
        cuda = torch.cuda.is_available()
        self._about = {
            "model": "A decode step" if cuda else "Launches counted and times reasoned: nothing ran on a GPU, but",
            "device": device_name("cuda" if cuda else "cpu"),
            "interpreted": not cuda,
            "torch": torch.__version__,
            "commit": commit(),
            "command": command,
        }
        self.copy_gb_s = 0.0
        self.rows: list[GpuRow] = []

    @property
    def left(self) -> float:
        """Seconds until all has to be done."""
        return self._end - time.monotonic()

    def add(self, row: GpuRow) -> None:
        self.rows.append(row)
        print(row.line(), flush=True)
        if self._path is not None:
            with self._path.open("a") as file:
                now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                file.write(json.dumps({**asdict(row), **self._about, "time": now}) + "\n")

    def attempt(self, row: GpuRow, work: Callable[..., None]) -> bool:
        """Fills a row in by `work` and adds it; what goes wrong is noted there, and the others go on."""
        try:
            work(row)
        except Exception as error:  # a kernel fails in as many ways as there are GPUs
            row.ok, row.notes = False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]} {row.notes}"
        self.add(row)
        return row.ok

    def speed(self, row: GpuRow, times: Sequence[float], nbytes: int) -> None:
        """times: seconds of one call each."""
        ordered = sorted(times)
        row.us = {
            name: round(ordered[round(q * (len(ordered) - 1))] * 1e6, 2)
            for name, q in (("p20", 0.2), ("p50", 0.5), ("p80", 0.8))
        }
        row.nbytes = nbytes
        if nbytes:
            row.gb_s = round(nbytes / row.us["p50"] / 1e3, 1)
            row.share = round(row.gb_s / self.copy_gb_s, 3) if self.copy_gb_s else None

    def measure_copy(self, device: torch.device) -> None:
        """What the memory gives: bytes read and written by a copy that no cache holds."""
        row = GpuRow("machine", "copy, bytes read and written")

        def work(row: GpuRow) -> None:
            source = torch.ones((1 << 30 if device.type == "cuda" else 1 << 22) // 4, device=device)
            target = torch.empty_like(source)
            self.speed(row, seconds_of([lambda: target.copy_(source)], device), 2 * source.nbytes)
            self.copy_gb_s, row.share = row.gb_s or 0.0, 1.0

        self.attempt(row, work)


def seconds_of(calls: Sequence[Callable[..., Any]], device: torch.device, rounds: int = 15) -> list[float]:
    """Seconds of one of the calls, which are made one after the other, in each round; on a GPU in a captured graph."""
    with torch.no_grad():
        for call in calls[:2]:
            call()  # compiles
        if device.type != "cuda":
            start = time.perf_counter()
            for call in calls:
                call()
            return [(time.perf_counter() - start) / len(calls)]
        torch.cuda.synchronize()
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(side):
            for call in calls[:2]:
                call()
        side.synchronize()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        graph.replay()
        times = []
        for _ in range(rounds):
            start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start_event.record()
            graph.replay()
            end_event.record()
            end_event.synchronize()
            times.append(start_event.elapsed_time(end_event) / 1e3 / len(calls))
        return times


def layers_for(nbytes: int, device: torch.device) -> int:
    """How many layers of so many bytes no cache holds."""
    if device.type != "cuda":
        return 1
    cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20
    return min(64, max(2, math.ceil(4 * cache / max(1, nbytes))))


def difference(result: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value."""
    scale = float(expected.double().abs().max()) or 1.0
    error = float((result.double() - expected.double()).abs().max()) / scale
    return error if math.isfinite(error) else math.inf
