"""The gRPC server: `motet.v1` over one engine. It tokenises, submits, streams; it knows no blocks."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import socket
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from ....proto import admin_pb2, admin_pb2_grpc, batch_pb2, batch_pb2_grpc, inference_pb2, inference_pb2_grpc
from ...api.config import EngineConfig
from ...api.output import Output
from ...api.request import FinishReason, Request
from ...engine.engine import Engine
from ...errors import MotetError, NotFoundError, UnavailableError, UnsupportedModelError
from ..metrics import serve_metrics
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


class OutputQueue:
    """Deltas on their way from the engine's thread to one stream. A slow reader holds up nobody: deltas of a choice
    that are not taken yet are coalesced into one, so the queue holds at most one a choice."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pending: dict[int, Output] = {}
        self._ready = asyncio.Event()

    def put(self, output: Output) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._add, output)

    def _add(self, output: Output) -> None:
        if output.choice in self._pending:
            self._pending[output.choice].extend(output)
        else:
            self._pending[output.choice] = output
        self._ready.set()

    async def take(self) -> list[Output]:
        """All deltas that are ready; waits for one."""
        await self._ready.wait()
        self._ready.clear()
        pending, self._pending = list(self._pending.values()), {}
        return pending


class Inference(inference_pb2_grpc.InferenceServicer):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Generate(
        self, message: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        try:
            request = await self._request(message)
            async for output in self._outputs(request):
                yield response_from_output(output)
        except MotetError as error:
            await context.abort_with_status(status_of(error))

    async def Complete(
        self, message: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.CompleteResponse | None:
        try:
            request = await self._request(message)
            choices: dict[int, Output] = {}
            async for output in self._outputs(request):
                if output.choice in choices:
                    choices[output.choice].extend(output)
                else:
                    choices[output.choice] = output
        except MotetError as error:
            await context.abort_with_status(status_of(error))
            return None
        whole = [response_from_output(choices[choice]) for choice in sorted(choices)]
        return inference_pb2.CompleteResponse(choices=whole)

    async def Tokenize(
        self, message: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse | None:
        try:
            token_ids = await asyncio.to_thread(prompt_from_proto, message.prompt, self._engine.tokenizer)
        except MotetError as error:
            await context.abort_with_status(status_of(error))
            return None
        return inference_pb2.TokenizeResponse(token_ids=token_ids)

    async def _request(self, message: inference_pb2.GenerateRequest) -> Request:
        """Tokenising a long prompt takes a while: not on the event loop."""
        return await asyncio.to_thread(request_from_proto, message, self._engine.tokenizer, self._engine.model)

    async def _outputs(self, request: Request) -> AsyncIterator[Output]:
        """The deltas of all choices until each has finished. When the stream is dropped, cancelled, or its deadline
        passes, gRPC cancels this coroutine, and the group ends."""
        queue = OutputQueue(asyncio.get_running_loop())
        # The client's id is echoed, not used: two clients may choose the same one, and must not cancel each other.
        own = dataclasses.replace(request, request_id=uuid.uuid4().hex)
        self._engine.submit(own, queue.put)
        unfinished = request.sampling.n
        try:
            while unfinished:
                for output in await queue.take():
                    if output.error is not None:
                        raise output.error
                    unfinished -= output.finish_reason is not None
                    output.request_id = request.request_id
                    yield output
        finally:
            if unfinished:
                self._engine.abort(own.request_id, FinishReason.CANCELLED)


class Admin(admin_pb2_grpc.AdminServicer):
    def __init__(self, engine: Engine, on_drain: asyncio.Event) -> None:
        self._engine = engine
        self._on_drain = on_drain

    async def ListModels(
        self, _message: admin_pb2.ListModelsRequest, _context: Context
    ) -> admin_pb2.ListModelsResponse:
        return admin_pb2.ListModelsResponse(models=[model_to_proto(self._engine.model)])

    async def GetModel(self, message: admin_pb2.GetModelRequest, context: Context) -> admin_pb2.GetModelResponse | None:
        model, stats = self._engine.model, self._engine.stats()
        if message.name not in ("", model.name):
            error = NotFoundError(f"there is no model '{message.name}' here; this server serves '{model.name}'")
            await context.abort_with_status(status_of(error))
            return None
        return admin_pb2.GetModelResponse(model=model_to_proto(model), waiting=stats.waiting, running=stats.running)

    async def Drain(self, _message: admin_pb2.DrainRequest, _context: Context) -> admin_pb2.DrainResponse:
        self._on_drain.set()
        return admin_pb2.DrainResponse()


class BatchJobs(batch_pb2_grpc.BatchServicer):
    """Not served yet: `motet summarise` runs jobs offline."""

    async def Submit(self, _message: batch_pb2.SubmitRequest, context: Context) -> None:
        await self._refuse(context)

    async def Watch(self, _message: batch_pb2.WatchRequest, context: Context) -> AsyncIterator[batch_pb2.WatchResponse]:
        await self._refuse(context)
        yield batch_pb2.WatchResponse()

    async def Cancel(self, _message: batch_pb2.CancelRequest, context: Context) -> None:
        await self._refuse(context)

    async def _refuse(self, context: Context) -> None:
        error = UnsupportedModelError("this server runs no batch jobs; run them offline with `motet summarise`")
        await context.abort_with_status(status_of(error))


class Server:
    """A gRPC server over an engine. `start` binds, `stop` drains for `grace_s` seconds and then ends what is left."""

    def __init__(
        self, engine: Engine, host: str = "127.0.0.1", port: int = 0, *, with_reflection: bool = False
    ) -> None:
        self._engine = engine
        self._host = host
        self._wanted_port = port
        self._with_reflection = with_reflection
        self.port = 0
        self.draining = asyncio.Event()

    async def start(self) -> None:
        """Raises `UnavailableError` if the port is taken."""
        options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        self._server = grpc.aio.server(options=options)
        self._health = HealthServicer()
        inference_pb2_grpc.add_InferenceServicer_to_server(Inference(self._engine), self._server)  # type: ignore[no-untyped-call]
        admin_pb2_grpc.add_AdminServicer_to_server(Admin(self._engine, self.draining), self._server)  # type: ignore[no-untyped-call]
        batch_pb2_grpc.add_BatchServicer_to_server(BatchJobs(), self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._with_reflection:
            reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        address = f"{self._host}:{self._wanted_port}"
        try:
            # Asked first, because gRPC writes a log line of its own when it cannot bind.
            socket.create_server((self._host, self._wanted_port)).close()
            self.port = self._server.add_insecure_port(address)
        except (OSError, RuntimeError) as error:
            raise UnavailableError(f"cannot listen on {address} ({error}); choose another --port") from error
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float = 10.0) -> None:
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._engine.drain()
        await self._server.stop(grace_s)

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
    """Load a bundle and serve it until SIGINT, SIGTERM or Admin.Drain. Prints one line when it is ready."""
    with Engine.from_bundle(bundle, config) as engine:
        if metrics_port is not None:
            serve_metrics(engine, host, metrics_port)
        asyncio.run(_serve(engine, host, port, with_reflection))


async def _serve(engine: Engine, host: str, port: int, with_reflection: bool) -> None:
    server = Server(engine, host, port, with_reflection=with_reflection)
    await server.start()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.draining.set)
    members = ", ".join(engine.model.members)
    print(f"motet serves '{engine.model.name}' ({members}) on {host}:{server.port}", flush=True)
    await server.draining.wait()
    await server.stop()
