"""What a server tells Prometheus: its requests, their latencies, and what its engines do."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from .sequence import Load, Timings

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
#: Seconds that the rate of tokens is taken over.
_WINDOW = 10.0

#: Of an engine: name, what it is, whether it only grows, and where it is found.
_LOAD: tuple[tuple[str, str, bool, Callable[[Load], float]], ...] = (
    ("running", "Texts that are being generated.", False, lambda load: load.running),
    ("waiting", "Texts that wait for a place.", False, lambda load: load.waiting),
    ("kv_bytes", "Bytes reserved for keys and values of running texts.", False, lambda load: load.kv_bytes),
    ("kv_limit_bytes", "The most of them.", False, lambda load: load.kv_limit),
    ("decode_tokens", "Tokens generated.", True, lambda load: load.decode_tokens),
    ("prefill_tokens", "Tokens of prompts computed.", True, lambda load: load.prefill_tokens),
    ("cached_tokens", "Tokens of prompts that were not computed again.", True, lambda load: load.cached_tokens),
    ("steps", "Decode steps.", True, lambda load: load.steps),
    (
        "step_rows", "Texts in all decode steps together: by steps, the mean batch.", True,
        lambda load: sum(rows * steps for rows, steps in load.batch_sizes.items()),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class EngineFigures:
    """Where the figures of one engine come from. skipped: the share of MLP neurons that decode steps have skipped."""

    load: Callable[[], Load]
    skipped: Callable[[], float]


class _Engines(Collector):
    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        loads = {name: engine.load() for name, engine in self._meter.engines.items()}
        for name, meaning, grows, find in _LOAD:
            kind = CounterMetricFamily if grows else GaugeMetricFamily
            yield _by_engine(kind, name, meaning, {engine: find(load) for engine, load in loads.items()})
        shares = {name: engine.skipped() for name, engine in self._meter.engines.items()}
        meaning = "Share of MLP neurons that decode steps skipped."
        yield _by_engine(GaugeMetricFamily, "neurons_skipped_ratio", meaning, shares)
        meaning = f"Generated tokens a second, over the last {_WINDOW:.0f}."
        yield GaugeMetricFamily("coreskip_tokens_per_second", meaning, self._meter.tokens_per_second())
        yield GaugeMetricFamily("coreskip_memory_bytes", "Resident memory of the process.", self._meter.memory())


def _by_engine(
    kind: type[GaugeMetricFamily | CounterMetricFamily], name: str, meaning: str, values: dict[str, float]
) -> GaugeMetricFamily | CounterMetricFamily:
    family = kind(f"coreskip_{name}", meaning, labels=["engine"])
    for engine, value in values.items():
        family.add_metric([engine], value)
    return family


class Meter:
    """A server's measurements, in a registry of its own.

    engines: by name. clock: seconds, as of ``time.perf_counter``. memory: bytes of the process.
    """

    def __init__(
        self, engines: dict[str, EngineFigures], clock: Callable[[], float], memory: Callable[[], float]
    ) -> None:
        self.engines, self._clock, self.memory = engines, clock, memory
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "coreskip_requests", "HTTP requests by route and status.", ["route", "status"], registry=self._registry
        )
        self._first = Histogram(
            "coreskip_time_to_first_token_seconds",
            "From a text's submission to its first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._between = Histogram(
            "coreskip_inter_token_seconds",
            "Between tokens of a text, as they reach the server's event loop.",
            buckets=_BETWEEN,
            registry=self._registry,
        )
        self._duration = Histogram(
            "coreskip_request_seconds", "HTTP requests, to the end of the answer.", ["route"], registry=self._registry
        )
        self._recent: deque[tuple[float, int]] = deque()
        self._registry.register(_Engines(self))

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._duration.labels(route).observe(seconds)

    def tokens(self, count: int, now: float, last: float | None, timings: Timings) -> None:
        """`count` tokens of a text came.

        last: when tokens of the same text came before; None: never.
        """
        if last is None:
            self._first.observe(max(0.0, (timings.first_token or now) - timings.queued))
        else:
            for _ in range(count):
                self._between.observe((now - last) / count)
        self._recent.append((now, count))
        self._forget(now)

    def tokens_per_second(self) -> float:
        self._forget(self._clock())
        return sum(count for _, count in self._recent) / _WINDOW

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0][0] < now - _WINDOW:
            self._recent.popleft()

    def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
