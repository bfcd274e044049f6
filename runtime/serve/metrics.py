"""Prometheus metrics of an engine: its own counters, read at each scrape, and those that an observer keeps."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..api.output import Output
from ..api.request import FinishReason, Request
from ..engine.interface import ServedEngine
from ..engine.observer import Observer, StepReport
from ..errors import MotetError
from ..trust.identity import Identity
from .calls import GENERATIONS, Call

STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
MOST_TENANTS = 1000  # with time series of their own
# Those of OpenTelemetry's conventions (`otlp`), whose series these are too; TOKEN_SECONDS has smaller ones for small models.
CALL_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
CALL_TOKENS = tuple(4**power for power in range(14))
WAIT_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class EngineCollector:
    """`motet_*` gauges and counters, read from `Engine.stats` at each scrape."""

    def __init__(self, engine: ServedEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        is_up = self._engine.failure is None
        yield GaugeMetricFamily("motet_engine_up", "1 while the engine's loop runs, 0 after it failed", is_up)
        yield GaugeMetricFamily("motet_waiting_choices", "Choices in the queue", stats.waiting)
        yield GaugeMetricFamily("motet_running_choices", "Choices that hold KV cache", stats.running)
        yield GaugeMetricFamily("motet_free_blocks", "Free blocks of the KV cache", stats.free_blocks)
        yield GaugeMetricFamily("motet_blocks", "Blocks of the KV cache", stats.num_blocks)
        yield CounterMetricFamily("motet_preemptions", "Choices that gave up their place", stats.preemptions)
        yield CounterMetricFamily("motet_restarts", "Restarts of the engine's loop after a fault", stats.restarts)
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
        self._token = Histogram(
            "motet_inter_token_seconds",
            "Mean seconds between the tokens of a choice that did not fail",
            buckets=TOKEN_SECONDS,
            registry=registry,
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
        if last.usage.completion_tokens > 1 and last.finish_reason is not FinishReason.ERROR:
            self._token.observe(last.timings.decode_s / (last.usage.completion_tokens - 1))

    def on_reject(self, request: Request, error: MotetError) -> None:
        self._rejected.labels(type(error).__name__).inc()


def engine_registry(engine: ServedEngine) -> CollectorRegistry:
    """A registry with all metrics of an engine, counted from now on."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine))
    engine.subscribe(EngineMetrics(registry))
    return registry


class CallMetrics:
    """`motet_calls`, tokens by tenant, and what callers wait for."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._tenants: set[str] = set()
        self._calls = Counter("motet_calls", "Calls that ended", ["method", "status", "tenant"], registry=registry)
        self._refusals = Counter("motet_refused_calls", "Calls without a right", ["error"], registry=registry)
        self._tokens = Counter("motet_tenant_tokens", "Tokens of answered calls", ["tenant", "kind"], registry=registry)
        self._members = Counter("motet_member_calls", "Calls whose mix has the member", ["member"], registry=registry)
        self._seconds = Histogram(
            "motet_call_seconds",
            "Seconds from arrival to end of a generation",
            ["error"],
            buckets=CALL_SECONDS,
            registry=registry,
        )
        self._call_tokens = Histogram(
            "motet_call_tokens",
            "Tokens of a generation",
            ["token_type"],
            buckets=CALL_TOKENS,
            registry=registry,
        )
        self._first = Histogram(
            "motet_call_first_token_seconds",
            "Seconds from arrival to the first token that the caller is sent, if the call did not fail",
            buckets=FIRST_SECONDS,
            registry=registry,
        )

    def check(self) -> None:
        """Counting cannot fail."""

    def on_begin(self, call: Call) -> None:
        """Calls are counted when they end."""

    def on_call(self, call: Call) -> None:
        tenant = self._label(call.caller.identity.tenant)
        self._calls.labels(call.method, call.status, tenant).inc()
        kinds = {"prompt": call.prompt_tokens, "cached": call.cached_tokens, "completion": call.completion_tokens}
        for kind, tokens in kinds.items() if call.completion_tokens or call.status == "ok" else ():
            self._tokens.labels(tenant, kind).inc(tokens)
        for member in call.mix if call.completion_tokens else ():  # names of a call that was refused may be invented
            self._members.labels(member).inc()
        if call.method in GENERATIONS:
            self._seconds.labels(call.error).observe(call.duration_s)
            if not call.error:
                self._call_tokens.labels("input").observe(call.prompt_tokens)
                self._call_tokens.labels("output").observe(call.completion_tokens)
        if call.first_token_s is not None and not call.error:
            self._first.observe(call.first_token_s)

    def on_refusal(self, method: str, peer: str, error: Exception, who: Identity | None) -> None:
        self._refusals.labels(type(error).__name__).inc()

    def _label(self, tenant: str) -> str:
        """Each tenant is a time series; beyond some number they are one."""
        if tenant not in self._tenants and len(self._tenants) >= MOST_TENANTS:
            return "(others)"
        self._tenants.add(tenant)
        return tenant
