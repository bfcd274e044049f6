"""What a collector of OpenTelemetry gets: metrics and spans, over gRPC."""

from __future__ import annotations

import asyncio
import queue
import threading
from concurrent import futures
from contextlib import contextmanager

import grpc
import pytest
from helpers.callers import caller
from motet.runtime import errors
from motet.runtime.api.request import GenerateRequest
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.serve import metrics, otlp
from motet.runtime.serve.calls import Call
from motet.runtime.serve.metrics import CallMetrics, engine_registry
from motet.runtime.serve.otlp import NAMES, MetricsExport
from motet.runtime.serve.service import Service
from motet.runtime.serve.tracing import Tracer, server_resource
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc

ASK = GenerateRequest("hello", sampling=SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))


@contextmanager
def collecting(monkeypatch):
    """A collector; yields the requests that it gets."""
    got = queue.Queue()

    class Metrics(metrics_grpc.MetricsServiceServicer):
        def Export(self, request, context):
            got.put(request)
            return metrics_pb.ExportMetricsServiceResponse()

    class Traces(trace_grpc.TraceServiceServicer):
        def Export(self, request, context):
            got.put(request)
            return trace_pb.ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(2))
    metrics_grpc.add_MetricsServiceServicer_to_server(Metrics(), server)
    trace_grpc.add_TraceServiceServicer_to_server(Traces(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    try:
        yield got
    finally:
        server.stop(None).wait()


def attributes_of(point):
    return {one.key: one.value.string_value for one in point.attributes}


def by_name(request):
    """name → metric."""
    [resource] = request.resource_metrics
    assert {one.key: one.value.string_value for one in resource.resource.attributes}["service.name"] == "motet"
    [scope] = resource.scope_metrics
    return {metric.name: metric for metric in scope.metrics}


def test_metrics_reach_a_collector_as_prometheus_reads_them(engine, monkeypatch):
    registry = engine_registry(engine)

    async def run():
        service = Service(engine, sinks=[CallMetrics(registry)])
        await service.complete(ASK, caller("acme"))
        with pytest.raises(errors.ContextLengthError):
            await service.complete(GenerateRequest("x" * 500), caller("other"))

    with collecting(monkeypatch) as got:
        with MetricsExport(registry, "tiny"):
            asyncio.run(run())
        found = by_name(got.get(timeout=30))  # at the end
    common = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "motet",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
    }
    duration = found["gen_ai.server.request.duration"]
    good, bad = sorted(duration.histogram.data_points, key=lambda point: "error.type" in attributes_of(point))
    assert duration.unit == "s" and duration.histogram.aggregation_temporality == 2  # cumulative
    assert attributes_of(good) == common and good.count == sum(good.bucket_counts) == 1
    assert attributes_of(bad) == common | {"error.type": "ContextLengthError"} and bad.count == 1
    assert tuple(good.explicit_bounds) == metrics.CALL_SECONDS and len(good.bucket_counts) == 15
    assert good.start_time_unix_nano < good.time_unix_nano and not good.HasField("min")
    [first] = found["gen_ai.server.time_to_first_token"].histogram.data_points
    [token] = found["gen_ai.server.time_per_output_token"].histogram.data_points
    assert (first.count, token.count) == (1, 1) and tuple(first.explicit_bounds) == metrics.FIRST_SECONDS
    usage = found["gen_ai.client.token.usage"]
    sums = {attributes_of(point)["gen_ai.token.type"]: point.sum for point in usage.histogram.data_points}
    assert sums == {"input": 5, "output": 4} and usage.unit == "{token}"
    assert {bounds for point in usage.histogram.data_points for bounds in point.explicit_bounds} >= {1, 4, 67108864}
    assert not set(NAMES) & set(found)  # once each
    # everything else is there under its own name, with Prometheus' values
    families = {NAMES.get(family.name, (family.name,))[0]: family for family in registry.collect()}
    assert set(found) == set(families)
    steps = found["motet_steps"]
    assert steps.sum.is_monotonic and steps.sum.data_points[0].as_double == engine.stats().steps
    assert found["motet_blocks"].gauge.data_points[0].as_double == 32
    tokens = {
        (attributes_of(point)["tenant"], attributes_of(point)["kind"]): point.as_double
        for point in found["motet_tenant_tokens"].sum.data_points
    }
    assert tokens["acme", "completion"] == 4
    assert found["motet_step_seconds"].histogram.data_points[0].count == engine.stats().steps


def test_buckets_are_not_cumulative(engine, monkeypatch):
    registry = engine_registry(engine)
    sink = CallMetrics(registry)
    for seconds in (0.005, 0.015, 0.015, 1000.0):
        call = Call("complete", caller("a"), "tiny")
        call.duration_s = seconds
        sink.on_call(call)
    with collecting(monkeypatch) as got:
        with MetricsExport(registry, "tiny"):
            pass
        [point] = by_name(got.get(timeout=30))["gen_ai.server.request.duration"].histogram.data_points
    assert list(point.bucket_counts) == [1, 2, *[0] * 12, 1] and point.sum == pytest.approx(1000.035)


def test_metrics_are_sent_again_and_again(engine, monkeypatch):
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "5")
    with collecting(monkeypatch) as got, MetricsExport(engine_registry(engine), "tiny"):
        assert [by_name(got.get(timeout=30)).keys() for _ in range(3)]


def test_a_collector_that_fails_disturbs_nothing(engine, caplog):
    class Broken:
        def export(self, data):
            raise OSError("no route")

        def shutdown(self, timeout_millis):
            pass

    with MetricsExport(engine_registry(engine), "tiny", Broken()):
        pass
    assert "could not be exported" in caplog.text


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_METRIC_EXPORT_INTERVAL", "soon"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "0"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "nan"),
        ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "delta"),
    ],
)
def test_what_the_environment_asks_in_vain(engine, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(errors.ConfigError, match=variable):
        MetricsExport(engine_registry(engine), "tiny")


def test_spans_reach_a_collector(engine, monkeypatch):
    async def run():
        with Tracer() as tracer:
            await Service(engine, sinks=[tracer]).complete(ASK, caller("acme"))

    with collecting(monkeypatch) as got:
        asyncio.run(run())
        [resource] = got.get(timeout=30).resource_spans
    [span] = resource.scope_spans[0].spans
    assert span.name == f"text_completion {engine.model.name}"
    assert {one.key for one in span.attributes} >= {"gen_ai.usage.input_tokens", "motet.tenant"}


def test_the_environment_names_the_server(monkeypatch):
    """Two processes are two instances; what the environment says counts."""
    plain = server_resource().attributes
    assert plain["service.name"] == "motet" and len(plain["service.instance.id"]) == 36
    assert server_resource().attributes["service.instance.id"] == plain["service.instance.id"]
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=one,team=a")
    found = server_resource().attributes
    assert (found["service.name"], found["service.instance.id"], found["team"]) == ("mine", "one", "a")


def test_an_end_does_not_wait_for_a_collector_that_does_not_answer(engine, monkeypatch):
    """An export that is tried again and again ends when the exporter is shut down."""
    ended = threading.Event()

    class Stuck:
        def export(self, _data):
            assert ended.wait(60)

        def shutdown(self, timeout_millis):
            assert timeout_millis <= 5000
            ended.set()

    monkeypatch.setattr(otlp, "_PATIENCE_S", 0.1)
    export = MetricsExport(engine_registry(engine), "tiny", Stuck())
    with export:
        pass
    assert not export._thread.is_alive()
