"""`MetricsExport`: the metrics that Prometheus reads, by OTLP too. They are counted once, in the registry; this only translates.

What OpenTelemetry's conventions for generative AI name has their names (`NAMES`), everything else its own. The names are
constants here for the reason that `tracing` gives. Counts are cumulative.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.samples import Sample

from ..errors import ConfigError, MissingPackageError
from .tracing import server_resource

log = logging.getLogger("motet.otlp")
NAMES = {
    "motet_call_seconds": ("gen_ai.server.request.duration", "s"),
    "motet_call_first_token_seconds": ("gen_ai.server.time_to_first_token", "s"),
    "motet_inter_token_seconds": ("gen_ai.server.time_per_output_token", "s"),
    "motet_call_tokens": ("gen_ai.client.token.usage", "{token}"),
}
ATTRIBUTES = {
    "error": "error.type",
    "token_type": "gen_ai.token.type",
}  # of the metrics in NAMES; empty values are left out
_INTERVAL, _TEMPORALITY = "OTEL_METRIC_EXPORT_INTERVAL", "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"


_PATIENCE_S = 2.0  # with a collector that does not answer, at the end


class MetricsExport:
    """Sends the registry's metrics from a thread of its own, at an interval (OTEL_METRIC_EXPORT_INTERVAL, in milliseconds; a
    minute by default) and once more at the end. `model`: what is served. `exporter`: None: by OTLP over gRPC, to where
    OTEL_EXPORTER_OTLP_ENDPOINT says. An export that fails is logged and stops nothing.

    Raises `MissingPackageError`, and `ConfigError` if the environment asks for what is not here.
    """

    def __init__(self, registry: CollectorRegistry, model: str, exporter: Any = None) -> None:
        self._interval_s = _interval_s(os.environ.get(_INTERVAL, "60000"))
        if (asked := os.environ.get(_TEMPORALITY, "cumulative").lower()) != "cumulative":
            raise ConfigError(f"{_TEMPORALITY} must be cumulative, which is what Motet's counters are, got {asked!r}")
        try:
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

                exporter = OTLPMetricExporter()
        except ImportError as error:
            raise MissingPackageError(
                f"exporting metrics needs OpenTelemetry ({error}); install it with `pip install 'motet[otel]'`"
            ) from error
        self._registry, self._exporter = registry, exporter
        self._resource, self._scope = server_resource(), InstrumentationScope("motet")
        self._common = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "motet",
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
        }
        self._started_ns = time.time_ns()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="motet-otlp", daemon=True)
        self._thread.start()

    def __enter__(self) -> MetricsExport:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._end.set()
        self._thread.join(_PATIENCE_S)
        self._exporter.shutdown(timeout_millis=1000 * _PATIENCE_S)  # ends an export that tries again and again
        self._thread.join(_PATIENCE_S)

    def _run(self) -> None:
        ended = False
        while not ended:
            ended = self._end.wait(self._interval_s)
            try:
                self._exporter.export(self._data())
            except Exception:
                log.exception("the metrics could not be exported")

    def _data(self) -> Any:
        from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics

        now = time.time_ns()
        metrics = [self._translated(family, now) for family in self._registry.collect()]
        scope = ScopeMetrics(self._scope, metrics, schema_url="")
        return MetricsData([ResourceMetrics(self._resource, [scope], schema_url="")])

    def _translated(self, family: Metric, now: int) -> Any:
        from opentelemetry.sdk.metrics import export

        name, unit = NAMES.get(family.name, (family.name, "s" if family.name.endswith("_seconds") else "1"))
        is_common = family.name in NAMES
        cumulative = export.AggregationTemporality.CUMULATIVE
        points: list[Any] = []
        if family.type == "histogram":
            for labels, samples in _series(family.samples).items():
                points.append(self._histogram(self._attributes(labels, is_common), samples, now))
            data: Any = export.Histogram(points, cumulative)
        else:
            ends = (family.name, f"{family.name}_total")
            for sample in family.samples:
                if sample.name in ends:
                    attributes = self._attributes(tuple(sample.labels.items()), is_common)
                    points.append(export.NumberDataPoint(attributes, self._started_ns, now, float(sample.value)))
            is_counter = family.type == "counter"
            data = export.Sum(points, cumulative, is_monotonic=True) if is_counter else export.Gauge(points)
        return export.Metric(name, family.documentation, unit, data)

    def _histogram(self, attributes: Mapping[str, str], samples: list[Sample], now: int) -> Any:
        from opentelemetry.sdk.metrics.export import HistogramDataPoint

        below = [(float(sample.labels["le"]), int(sample.value)) for sample in samples if "le" in sample.labels]
        bounds, counts = [bound for bound, _ in below], [count for _, count in below]
        total = next((sample.value for sample in samples if sample.name.endswith("_sum")), 0.0)
        return HistogramDataPoint(
            attributes=attributes,
            start_time_unix_nano=self._started_ns,
            time_unix_nano=now,
            count=counts[-1],
            sum=total,
            bucket_counts=[count - before for before, count in zip([0, *counts], counts)],
            explicit_bounds=bounds[:-1],  # the last is infinite
            min=None,  # Prometheus keeps neither
            max=None,
        )

    def _attributes(self, labels: Iterable[tuple[str, str]], is_common: bool) -> dict[str, str]:
        if not is_common:
            return dict(labels)
        return self._common | {ATTRIBUTES[name]: value for name, value in labels if value}


def _series(samples: Iterable[Sample]) -> dict[tuple[tuple[str, str], ...], list[Sample]]:
    """Labels without `le` → the samples of one histogram, in the order of their bounds."""
    found: dict[tuple[tuple[str, str], ...], list[Sample]] = {}
    for sample in samples:
        if not sample.name.endswith("_created"):
            key = tuple((name, value) for name, value in sample.labels.items() if name != "le")
            found.setdefault(key, []).append(sample)
    return found


def _interval_s(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 86_400_000:
        raise ConfigError(f"{_INTERVAL} must be a number of milliseconds in 1…86400000, got {text!r}")
    return value / 1000
