"""The gRPC door: `motet.v1` over a `Service`. It translates messages, calls and errors, and nothing else."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from ....proto import admin_pb2, admin_pb2_grpc, batch_pb2, batch_pb2_grpc, inference_pb2, inference_pb2_grpc
from ...api.config import EngineConfig
from ...engine.engine import Engine
from ...errors import MotetError, PortInUseError, UnimplementedError
from ..metrics import serve_metrics
from ..service import Service
from .wire import (
    MAX_MESSAGE_BYTES,
    model_to_proto,
    prompt_from_proto,
    request_from_proto,
    response_from_output,
    status_of,
)

Context = Any  # grpc.aio.ServicerContext: grpc ships no types
SERVICES = ("motet.v1.Inference", "motet.v1.Batch", "motet.v1.Admin")


class _Statuses:
    """A context manager: a typed error in its block ends the call with the error's status."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, _t: type[BaseException] | None, error: BaseException | None, _tb: object) -> None:
        if isinstance(error, MotetError):
            await self._context.abort_with_status(status_of(error))


class Inference(inference_pb2_grpc.InferenceServicer):
    """The `Inference` service. If the client drops or cancels a call, or its deadline passes, gRPC cancels the call's
    task and the service ends the request."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Generate(
        self, message: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        async with _Statuses(context):
            request = await asyncio.to_thread(request_from_proto, message)
            async with aclosing(self._service.generate(request)) as outputs:
                async for output in outputs:
                    yield response_from_output(output)

    async def Complete(
        self, message: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.CompleteResponse:
        async with _Statuses(context):
            request = await asyncio.to_thread(request_from_proto, message)
            choices = await self._service.complete(request)
            return inference_pb2.CompleteResponse(choices=map(response_from_output, choices))

    async def Tokenize(
        self, message: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        async with _Statuses(context):
            token_ids = await self._service.tokenize(prompt_from_proto(message.prompt))
            return inference_pb2.TokenizeResponse(token_ids=token_ids)


class Admin(admin_pb2_grpc.AdminServicer):
    """The `Admin` service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def ListModels(
        self, _message: admin_pb2.ListModelsRequest, _context: Context
    ) -> admin_pb2.ListModelsResponse:
        return admin_pb2.ListModelsResponse(models=map(model_to_proto, self._service.models()))

    async def GetModel(self, message: admin_pb2.GetModelRequest, context: Context) -> admin_pb2.GetModelResponse:
        async with _Statuses(context):
            model, stats = self._service.model(message.name), self._service.stats()
            return admin_pb2.GetModelResponse(model=model_to_proto(model), waiting=stats.waiting, running=stats.running)

    async def Drain(self, _message: admin_pb2.DrainRequest, _context: Context) -> admin_pb2.DrainResponse:
        self._service.drain()
        return admin_pb2.DrainResponse()


class BatchJobs(batch_pb2_grpc.BatchServicer):
    """The `Batch` service, which is not implemented: every call is refused. `motet summarise` runs jobs offline."""

    async def Submit(self, _message: batch_pb2.SubmitRequest, context: Context) -> None:
        await self._refuse(context)

    async def Watch(self, _message: batch_pb2.WatchRequest, context: Context) -> AsyncIterator[batch_pb2.WatchResponse]:
        await self._refuse(context)
        yield batch_pb2.WatchResponse()

    async def Cancel(self, _message: batch_pb2.CancelRequest, context: Context) -> None:
        await self._refuse(context)

    async def _refuse(self, context: Context) -> None:
        error = UnimplementedError("this server runs no batch jobs; run them offline with `motet summarise`")
        await context.abort_with_status(status_of(error))


class Server:
    """A gRPC server over an engine. `start` binds the port, `stop` drains. `port` is the bound port once started."""

    def __init__(
        self, engine: Engine, host: str = "127.0.0.1", port: int = 0, *, with_reflection: bool = False
    ) -> None:
        self.service = Service(engine)
        self._host = host
        self._wanted_port = port
        self._with_reflection = with_reflection
        self.port = 0

    async def start(self) -> None:
        """Raises `PortInUseError` if the port is taken."""
        options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        self._server = grpc.aio.server(options=options)
        self._health = HealthServicer()
        inference_pb2_grpc.add_InferenceServicer_to_server(Inference(self.service), self._server)  # type: ignore[no-untyped-call]
        admin_pb2_grpc.add_AdminServicer_to_server(Admin(self.service), self._server)  # type: ignore[no-untyped-call]
        batch_pb2_grpc.add_BatchServicer_to_server(BatchJobs(), self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._with_reflection:
            reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        address = f"{self._host}:{self._wanted_port}"
        try:
            # Tried first, because gRPC writes a log line of its own when it cannot bind.
            socket.create_server((self._host, self._wanted_port)).close()
            self.port = self._server.add_insecure_port(address)
        except (OSError, RuntimeError) as error:
            raise PortInUseError(f"cannot listen on {address} ({error}); choose another --port") from error
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        self._unhealthy = asyncio.create_task(self._end_health())

    async def stop(self, grace_s: float = 10.0) -> None:
        """Drain, let running requests go on for `grace_s` seconds, and end those that are left."""
        self.service.drain()
        await self._unhealthy
        await self._server.stop(grace_s)

    async def _end_health(self) -> None:
        """Report NOT_SERVING as soon as the service drains, for whatever reason."""
        await self.service.wait_draining()
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def _set_health(self, status: int) -> None:
        for service in ("", *SERVICES):
            await self._health.set(service, status)


def serve(
    bundle: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 50051,
    config: EngineConfig | None = None,
    metrics_port: int | None = None,
    with_reflection: bool = False,
) -> None:
    """Load a bundle and serve it. Prints one line when it is ready. After Admin.Drain the accepted requests run to
    their end; after SIGINT or SIGTERM they have ten seconds. Raises what `open_engine` raises, and
    `PortInUseError`."""
    with Engine.from_bundle(bundle, config) as engine:
        if metrics_port is not None:
            serve_metrics(engine, host, metrics_port)
        asyncio.run(_serve(engine, host, port, with_reflection))


async def _serve(engine: Engine, host: str, port: int, with_reflection: bool) -> None:
    server = Server(engine, host, port, with_reflection=with_reflection)
    await server.start()
    loop = asyncio.get_running_loop()
    drained = asyncio.create_task(_drained(server.service))
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, drained.cancel)
    members = ", ".join(engine.model.members)
    print(f"motet serves '{engine.model.name}' ({members}) on {host}:{server.port}", flush=True)
    with suppress(asyncio.CancelledError):
        await drained
    await server.stop()


async def _drained(service: Service) -> None:
    """Wait until the service drains and its last request has ended."""
    await service.wait_draining()
    await service.wait_idle()
