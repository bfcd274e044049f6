"""`Tracer`: a span per generation, with the `gen_ai.*` names of OpenTelemetry's semantic conventions.

The names are constants here, because the conventions moved and the packages that held them call them deprecated. The span
is a child of the caller's, by the W3C trace context of the call's metadata. Prompts and answers are not exported.
"""

from __future__ import annotations

import uuid
from typing import Any

from ..errors import MissingPackageError
from ..trust.identity import Identity
from .calls import GENERATIONS, Call

_INSTANCE = str(uuid.uuid4())


def server_resource() -> Any:
    """What traces and metrics say of this process: OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES, and what these leave out of a
    name ("motet") and an id of the process, without which a collector would add up two servers."""
    from opentelemetry.sdk.resources import Resource

    given = Resource.create()
    own = {"service.instance.id": _INSTANCE}
    if str(given.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
        own["service.name"] = "motet"
        given = Resource({key: value for key, value in given.attributes.items() if key != "service.name"})
    return Resource(own).merge(given)  # what is given counts


class Tracer:
    """Spans go to `exporter`; None: by OTLP over gRPC, to where OTEL_EXPORTER_OTLP_ENDPOINT says. Raises
    `MissingPackageError` at construction."""

    def __init__(self, exporter: Any = None) -> None:
        try:
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter()
        except ImportError as error:
            raise MissingPackageError(
                f"traces need OpenTelemetry ({error}); install it with `pip install 'motet[otel]'`"
            ) from error
        self._provider = TracerProvider(resource=server_resource())
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("motet")
        self._context_of = TraceContextTextMapPropagator().extract

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._provider.shutdown()

    def check(self) -> None:
        """A span that cannot be exported is lost, and stops nothing."""

    def on_begin(self, call: Call) -> None:
        """A span is made when the call has ended."""

    def on_call(self, call: Call) -> None:
        if call.method not in GENERATIONS:
            return
        from opentelemetry.trace import SpanKind, Status, StatusCode

        start = int(call.started * 1e9)
        span = self._tracer.start_span(
            f"text_completion {call.model}",
            context=self._context_of({"traceparent": call.caller.traceparent}),
            kind=SpanKind.SERVER,
            start_time=start,
            attributes={
                "gen_ai.operation.name": "text_completion",
                "gen_ai.provider.name": "motet",
                "gen_ai.request.model": call.model,
                "gen_ai.response.model": call.model,
                "gen_ai.response.id": call.id,
                "gen_ai.response.finish_reasons": call.finish_reasons,
                "gen_ai.usage.input_tokens": call.prompt_tokens,
                "gen_ai.usage.output_tokens": call.completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": call.cached_tokens,
                "motet.tenant": call.caller.identity.tenant,
                "motet.mix": [_part(name, value, call.temperatures.get(name)) for name, value in call.mix.items()],
            },
        )
        if call.request is not None:
            sampling = call.request.sampling
            span.set_attribute("gen_ai.request.temperature", sampling.temperature)
            span.set_attribute("gen_ai.request.top_p", sampling.top_p)
            if sampling.max_tokens is not None:
                span.set_attribute("gen_ai.request.max_tokens", sampling.max_tokens)
        for name, seconds in (("admitted", call.queue_s), ("first_token", call.first_token_s)):
            if seconds is not None:
                span.add_event(name, timestamp=start + int(seconds * 1e9))
        if call.error:
            span.set_attribute("error.type", call.error)
            span.set_status(Status(StatusCode.ERROR, call.error))
        span.end(start + int(call.duration_s * 1e9))

    def on_refusal(self, method: str, peer: str, error: Exception, who: Identity | None) -> None:
        """A caller who is not known has no trace."""


def _part(name: str, mix: float, temperature: float | None) -> str:
    """As `--mix` takes it."""
    return f"{name}={mix:g}" + ("" if temperature is None else f"@{temperature:g}")
