"""Prometheus metrics of an engine, read from its counters when they are scraped."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..engine.engine import Engine
from ..errors import PortInUseError


class EngineCollector:
    """`motet_*` gauges and counters; nothing is counted twice, the engine's own numbers are the truth."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        yield GaugeMetricFamily("motet_waiting_choices", "Choices in the queue", stats.waiting)
        yield GaugeMetricFamily("motet_running_choices", "Choices that hold KV cache", stats.running)
        yield GaugeMetricFamily("motet_free_blocks", "Free blocks of the KV cache", stats.free_blocks)
        yield GaugeMetricFamily("motet_blocks", "Blocks of the KV cache", stats.num_blocks)
        yield CounterMetricFamily("motet_steps", "Engine steps", stats.steps)
        yield CounterMetricFamily("motet_tokens", "Tokens sampled", stats.tokens)
        yield CounterMetricFamily("motet_prompt_tokens", "Prompt tokens of answers begun", stats.prompt_tokens)
        yield CounterMetricFamily("motet_cached_tokens", "Of them, found in the prefix cache", stats.cached_tokens)
        yield CounterMetricFamily("motet_drafted_tokens", "Drafted tokens verified", stats.drafted_tokens)
        yield CounterMetricFamily("motet_accepted_tokens", "Drafted tokens that were right", stats.accepted_tokens)


def serve_metrics(engine: Engine, host: str, port: int) -> None:
    """Answer GET /metrics on its own thread. Raises `PortInUseError` if the port is taken."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine))
    try:
        start_http_server(port, host, registry)
    except OSError as error:
        raise PortInUseError(f"cannot listen on {host}:{port} for metrics: {error}; choose another port") from error
