"""The gRPC door: `motet.v1` over a `Service`. It translates messages, calls and errors, and nothing else."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from ....proto import admin_pb2, admin_pb2_grpc, batch_pb2, batch_pb2_grpc, inference_pb2, inference_pb2_grpc
from ...api.config import EngineConfig
from ...api.limits import MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES
from ...engine.engine import Engine
from ...errors import PermissionDeniedError, PortInUseError, UnimplementedError
from ..metrics import serve_metrics
from ..service import Service
from .statuses import Statuses
from .wire import (
    model_to_proto,
    prompt_from_proto,
    request_from_proto,
    response_from_output,
    responses_from_output,
)

log = logging.getLogger("motet.server")

Context = Any  # grpc.aio.ServicerContext: grpc ships no types
SERVICES = ("motet.v1.Inference", "motet.v1.Batch", "motet.v1.Admin")
# A client may ping every 5 s, also while its request waits and without any (the usual is 10 to 30 s; gRPC's own limit of
# 5 minutes ends such connections). A connection that does not answer the server's own pings is closed, and its requests end.
KEEPALIVE_OPTIONS = [
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]
_LAST_WORDS_S = 5.0  # for the last messages of answers that a shutdown ends to reach their clients


class Inference(inference_pb2_grpc.InferenceServicer):
    """The `Inference` service. If the client drops or cancels a call, or its deadline passes, gRPC cancels the call's
    task and the service ends the request."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Generate(
        self, message: inference_pb2.GenerateRequest, _context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        request = await self._service.in_thread(lambda: request_from_proto(message))
        async with aclosing(self._service.generate(request)) as outputs:
            async for output in outputs:
                for response in responses_from_output(output):
                    yield response

    async def Complete(
        self, message: inference_pb2.GenerateRequest, _context: Context
    ) -> inference_pb2.CompleteResponse:
        request = await self._service.in_thread(lambda: request_from_proto(message))
        choices = await self._service.complete(request)
        return await self._service.in_thread(
            lambda: inference_pb2.CompleteResponse(choices=map(response_from_output, choices))
        )

    async def Tokenize(
        self, message: inference_pb2.TokenizeRequest, _context: Context
    ) -> inference_pb2.TokenizeResponse:
        prompt = await self._service.in_thread(lambda: prompt_from_proto(message.prompt))
        return inference_pb2.TokenizeResponse(token_ids=await self._service.tokenize(prompt))

    async def Detokenize(
        self, message: inference_pb2.DetokenizeRequest, _context: Context
    ) -> inference_pb2.DetokenizeResponse:
        skip = message.skip_special_tokens if message.HasField("skip_special_tokens") else True
        return inference_pb2.DetokenizeResponse(text=await self._service.detokenize(message.token_ids, skip))


class Admin(admin_pb2_grpc.AdminServicer):
    """The `Admin` service. Whoever reaches the port may ask what is served; `Drain` must have been allowed."""

    def __init__(self, service: Service, *, allow_drain: bool) -> None:
        self._service = service
        self._allow_drain = allow_drain

    async def ListModels(
        self, _message: admin_pb2.ListModelsRequest, _context: Context
    ) -> admin_pb2.ListModelsResponse:
        return admin_pb2.ListModelsResponse(models=map(model_to_proto, self._service.models()))

    async def GetModel(self, message: admin_pb2.GetModelRequest, _context: Context) -> admin_pb2.GetModelResponse:
        model, stats = self._service.model(message.name), self._service.stats()
        return admin_pb2.GetModelResponse(model=model_to_proto(model), waiting=stats.waiting, running=stats.running)

    async def Drain(self, _message: admin_pb2.DrainRequest, _context: Context) -> admin_pb2.DrainResponse:
        if not self._allow_drain:
            raise PermissionDeniedError(
                "this server is not drained by its clients; start it with --allow-drain, or send it SIGTERM"
            )
        self._service.drain()
        return admin_pb2.DrainResponse()


class BatchJobs(batch_pb2_grpc.BatchServicer):
    """The `Batch` service, which is not implemented: every call is refused. `motet summarise` runs jobs offline."""

    async def Submit(self, _message: batch_pb2.SubmitRequest, _context: Context) -> None:
        raise _NO_JOBS

    async def Watch(
        self, _message: batch_pb2.WatchRequest, _context: Context
    ) -> AsyncIterator[batch_pb2.WatchResponse]:
        raise _NO_JOBS
        yield  # makes it a stream

    async def Cancel(self, _message: batch_pb2.CancelRequest, _context: Context) -> None:
        raise _NO_JOBS


_NO_JOBS = UnimplementedError("this server runs no batch jobs; run them offline with `motet summarise`")


class Server:
    """A gRPC server over an engine. `start` binds the port, `stop` drains. `port` is the bound port once started."""

    def __init__(
        self,
        engine: Engine,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        with_reflection: bool = False,
        allow_drain: bool = False,
    ) -> None:
        self.service = Service(engine)
        self.host = host
        self._wanted_port = port
        self._with_reflection = with_reflection
        self._allow_drain = allow_drain
        self.port = 0

    async def start(self) -> None:
        """Raises `PortInUseError` if the port is taken."""
        options = [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            *KEEPALIVE_OPTIONS,
        ]
        self._server = grpc.aio.server(options=options, interceptors=[Statuses()])
        self._health = HealthServicer()
        inference_pb2_grpc.add_InferenceServicer_to_server(Inference(self.service), self._server)  # type: ignore[no-untyped-call]
        admin_pb2_grpc.add_AdminServicer_to_server(Admin(self.service, allow_drain=self._allow_drain), self._server)  # type: ignore[no-untyped-call]
        batch_pb2_grpc.add_BatchServicer_to_server(BatchJobs(), self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._with_reflection:
            reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        address = f"{self.host}:{self._wanted_port}"
        try:
            # Tried first, because gRPC writes a log line of its own when it cannot bind.
            socket.create_server((self.host, self._wanted_port)).close()
            self.port = self._server.add_insecure_port(address)
        except (OSError, RuntimeError) as error:
            raise PortInUseError(f"cannot listen on {address} ({error}); choose another --port") from error
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        self._unhealthy = asyncio.create_task(self._end_health())

    async def stop(self, drain_timeout_s: float = 10.0) -> None:
        """Drain, let accepted requests go on for so many seconds, and end those that are left with what they have."""
        self.service.drain()
        await self._unhealthy
        if not await self.service.wait_idle(drain_timeout_s):
            self.service.shut_down()
            await self.service.wait_idle(_LAST_WORDS_S)
        await self._server.stop(0.2)  # for the last bytes of answers; what still runs then are watchers of health

    async def _end_health(self) -> None:
        """Report NOT_SERVING as soon as the service drains, for whatever reason, or its engine has failed."""
        await self.service.wait_out_of_service()
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
    allow_drain: bool = False,
    drain_timeout_s: float = 300.0,
) -> None:
    """Load a bundle and serve it. Prints one line when it is ready. After Admin.Drain (`allow_drain`), SIGINT or SIGTERM
    the accepted requests have `drain_timeout_s` seconds; a second signal ends them at once. Raises what `open_engine`
    raises, `PortInUseError`, and the error that ended the engine, if one did."""
    with Engine.from_bundle(bundle, config) as engine:
        if metrics_port is not None:
            serve_metrics(engine, host, metrics_port)
        server = Server(engine, host, port, with_reflection=with_reflection, allow_drain=allow_drain)
        asyncio.run(_serve(server, engine, drain_timeout_s))
        if engine.failure is not None:
            raise engine.failure


async def _serve(server: Server, engine: Engine, drain_timeout_s: float) -> None:
    await server.start()
    loop, ended = asyncio.get_running_loop(), asyncio.create_task(_ended(server, drain_timeout_s))

    def on_signal() -> None:
        if not server.service.is_draining:
            server.service.drain()
        else:  # the second one: somebody wants it to end now
            server.service.shut_down()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    members = ", ".join(engine.model.members)
    print(f"motet serves '{engine.model.name}' ({members}) on {server.host}:{server.port}", flush=True)
    await ended


async def _ended(server: Server, drain_timeout_s: float) -> None:
    """Stop the server when it goes out of service."""
    await server.service.wait_out_of_service()
    log.info("out of service; open requests have %g s", drain_timeout_s)
    await server.stop(drain_timeout_s)
