"""Prometheus metrics of an engine: its own counters, read at each scrape, and those that an observer keeps."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..api.output import Output
from ..api.request import FinishReason, Request
from ..engine.engine import Engine
from ..engine.observer import Observer, StepReport
from ..errors import MotetError, PortInUseError

STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
WAIT_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class EngineCollector:
    """`motet_*` gauges and counters, read from `Engine.stats` at each scrape."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        is_up = self._engine.failure is None
        yield GaugeMetricFamily("motet_engine_up", "1 while the engine's loop runs, 0 after it failed", is_up)
        yield GaugeMetricFamily("motet_waiting_choices", "Choices in the queue", stats.waiting)
        yield GaugeMetricFamily("motet_running_choices", "Choices that hold KV cache", stats.running)
        yield GaugeMetricFamily("motet_free_blocks", "Free blocks of the KV cache", stats.free_blocks)
        yield GaugeMetricFamily("motet_blocks", "Blocks of the KV cache", stats.num_blocks)
        yield CounterMetricFamily("motet_steps", "Engine steps", stats.steps)
        yield CounterMetricFamily("motet_tokens", "Tokens sampled", stats.tokens)
        yield CounterMetricFamily("motet_prompt_tokens", "Prompt tokens of answers begun", stats.prompt_tokens)
        yield CounterMetricFamily("motet_cached_tokens", "Prompt tokens found in the prefix cache", stats.cached_tokens)
        yield CounterMetricFamily("motet_drafted_tokens", "Drafted tokens verified", stats.drafted_tokens)
        yield CounterMetricFamily("motet_accepted_tokens", "Drafted tokens that were right", stats.accepted_tokens)


class EngineMetrics(Observer):
    """`motet_*` counters of ended choices and refused requests, and histograms of times in seconds."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._finished = Counter("motet_finished_choices", "Choices that ended", ["reason"], registry=registry)
        self._rejected = Counter(
            "motet_rejected_requests", "Requests that the engine refused", ["error"], registry=registry
        )
        self._step = Histogram("motet_step_seconds", "Seconds of a step", buckets=STEP_SECONDS, registry=registry)
        self._queue = Histogram(
            "motet_queue_seconds", "Seconds from arrival to admission", buckets=WAIT_SECONDS, registry=registry
        )
        self._first_token = Histogram(
            "motet_first_token_seconds", "Seconds from arrival to first token", buckets=WAIT_SECONDS, registry=registry
        )
        for reason in FinishReason:
            self._finished.labels(reason.value)  # exported from the start, as 0

    def on_step(self, step: StepReport) -> None:
        self._step.observe(step.seconds)

    def on_finish(self, request: Request, last: Output) -> None:
        assert last.finish_reason is not None and last.usage is not None and last.timings is not None
        self._finished.labels(last.finish_reason.value).inc()
        if last.usage.completion_tokens:
            self._queue.observe(last.timings.queue_s)
            self._first_token.observe(last.timings.queue_s + last.timings.prefill_s)

    def on_reject(self, request: Request, error: MotetError) -> None:
        self._rejected.labels(type(error).__name__).inc()


def engine_registry(engine: Engine) -> CollectorRegistry:
    """A registry with all metrics of an engine, counted from now on."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine))
    engine.subscribe(EngineMetrics(registry))
    return registry


def serve_metrics(engine: Engine, host: str, port: int) -> None:
    """Answer GET /metrics on its own thread. Raises `PortInUseError` if the port is taken."""
    registry = engine_registry(engine)
    try:
        start_http_server(port, host, registry)
    except OSError as error:
        raise PortInUseError(f"cannot listen on {host}:{port} for metrics: {error}; choose another port") from error
