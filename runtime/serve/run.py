"""`serve`: from settings to a running server, and to its end."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from ..api.config import EngineConfig
from ..engine.engine import Engine
from ..engine.interface import ServedEngine
from ..errors import MotetError
from ..trust.access import Access
from ..trust.audit.writer import AuditLog, Entry
from .audited import AuditSink
from .calls import CallLog, CallSink, JsonFormatter
from .grpc.server import Server
from .metrics import CallMetrics, engine_registry
from .monitor import Monitor
from .otlp import MetricsExport
from .service import Service
from .settings import ServerSettings, Settings
from .tracing import Tracer

if TYPE_CHECKING:
    from .http.app import App

log = logging.getLogger("motet.server")
OpenEngine = Callable[[Path, EngineConfig], AbstractContextManager[ServedEngine]]


def serve(bundle: Path, settings: Settings, open_engine: OpenEngine = Engine.from_bundle) -> None:
    """Load a bundle and serve it. Prints one line when it is ready. After Admin.Drain, SIGINT or SIGTERM running requests have
    `drain_timeout` seconds; a second signal ends them at once. Raises what `open_engine`, `Access` and `TlsFiles` raise,
    `PortInUseError`, and `MotetError` if the engine or the audit log ended it."""
    server = settings.server
    access, tls = server.access(), server.tls()  # a mistake there is told before the bundle is loaded
    with ExitStack() as stack:
        audit = None
        if server.audit is not None:
            audit = stack.enter_context(AuditLog(server.audit, with_content=server.audit_content))
        tracer = stack.enter_context(Tracer()) if server.traces else None
        engine = stack.enter_context(open_engine(bundle, settings.engine))
        registry = engine_registry(engine)
        sinks: list[CallSink] = [CallLog(), CallMetrics(registry)]
        if audit is not None:
            audit.append(Entry("start", {"model": engine.model.name, "bundle": engine.model.digest}))
            stack.callback(_record_stop, audit, engine.model.name)
            sinks.append(AuditSink(audit, engine.model.digest))
        if tracer is not None:
            sinks.append(tracer)
        if server.otlp_metrics:
            stack.enter_context(MetricsExport(registry, engine.model.name))
        service = Service(
            engine,
            limits=settings.tenants,
            sinks=sinks,
            send_timeout_s=server.send_timeout,
            stream_interval=server.stream_interval,
        )
        stack.callback(service.close)
        if server.monitor_port is not None:
            monitor = Monitor(service, registry, access, server.host, server.monitor_port, tls)
            stack.callback(monitor.close)
            log.info("metrics and health over HTTP on %s:%d", server.host, monitor.port)
        app = _http_app(service, access, server, registry)
        door = Server(
            service,
            access,
            server.host,
            server.port,
            tls=tls,
            with_reflection=server.reflection,
            with_gateways=server.gateways,
            lame_duck_s=server.lame_duck,
        )
        asyncio.run(_serve(door, app, engine, server))
        if service.failure is not None:  # exit code 1: it may be started again
            raise MotetError(str(service.failure))


def _record_stop(audit: AuditLog, model: str) -> None:
    if audit.failure is None:  # else it is why the server ends, and must stay the error that is raised
        audit.append(Entry("stop", {"model": model}))


def _http_app(service: Service, access: Access, settings: ServerSettings, registry: CollectorRegistry) -> App | None:
    """What answers HTTP, and the records of batch jobs, which are requests of HTTP."""
    if settings.http_port is None and settings.state_dir is None:
        return None
    from .http.app import App  # its packages are optional

    return App(service, access, registry)


async def _serve(door: Server, app: App | None, engine: ServedEngine, settings: ServerSettings) -> None:
    jobs = http = None
    if app is not None and settings.state_dir is not None:
        from .batch.runner import Jobs

        jobs = app.door.jobs = door.jobs = Jobs(door.service, settings.state_dir, app.answer)
    await door.start()
    if app is not None and settings.http_port is not None:
        from .http.server import HttpServer

        http = HttpServer(app, settings.host, settings.http_port, tls=door.tls)
        await http.start()
    if jobs is not None:
        jobs.start()
    loop, service = asyncio.get_running_loop(), door.service

    num_signals = 0

    def on_signal() -> None:
        nonlocal num_signals
        num_signals += 1
        service.leave()
        if num_signals > 1:  # it shall end now
            service.shut_down()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    members = ", ".join(engine.model.members)
    places = f"{door.host}:{door.port}" + (f", HTTP on {http.host}:{http.port}" if http is not None else "")
    print(f"motet serves '{engine.model.name}' ({members}) on {places}", flush=True)
    await service.wait_out_of_service()
    log.info("out of service; running requests have %g s", settings.drain_timeout)
    if jobs is not None:
        await jobs.stop()  # what it answers now is answered after the next start
    await door.stop(settings.drain_timeout)  # which drains the service
    if http is not None:
        await http.stop()


@contextmanager
def logging_as(settings: ServerSettings) -> Iterator[None]:
    """Log Motet's records as the settings say, in this process."""
    root, motet = logging.getLogger(), logging.getLogger("motet")
    formatters = [handler.formatter for handler in root.handlers]
    motet.setLevel(settings.log_level.upper())
    if settings.log_format == "json":
        for handler in root.handlers:
            handler.setFormatter(JsonFormatter())
    try:
        yield
    finally:
        for handler, formatter in zip(root.handlers, formatters):
            handler.setFormatter(formatter)
