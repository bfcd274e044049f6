"""The gRPC door: `motet.v1` over a `Service`. It translates messages, calls and errors, and nothing else."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from ....proto import admin_pb2, admin_pb2_grpc, batch_pb2_grpc, inference_pb2, inference_pb2_grpc
from ...api.limits import (
    MAX_CONCURRENT_CALLS,
    MAX_CONNECTIONS,
    MAX_MESSAGE_BYTES,
    MAX_METADATA_BYTES,
    MAX_REQUEST_BYTES,
    MAX_STREAMS_PER_CONNECTION,
    MAX_WATCHERS,
)
from ...errors import PortInUseError
from ...trust.access import Access
from ...trust.identity import Role
from ...trust.tls import TlsContent, TlsFiles
from ..batch.runner import Jobs
from ..service import Service
from .answers import (
    check_embeddings_size,
    embeddings_to_proto,
    model_to_proto,
    response_from_output,
    responses_from_output,
)
from .batch import BatchJobs
from .gate import Gate, caller_of
from .statuses import Statuses
from .wire import embed_from_proto, prompt_from_proto, request_from_proto

Context = Any  # grpc.aio.ServicerContext: grpc ships no types
SERVICES = ("motet.v1.Inference", "motet.v1.Batch", "motet.v1.Admin")
# A client may ping every 5 s, also while its request waits and without any (the usual is 10 to 30 s; gRPC's own limit of
# 5 minutes ends such connections). A connection that does not answer the server's own pings is closed, and its requests end.
KEEPALIVE_OPTIONS = [
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]
OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a small message must not become a large one
    *KEEPALIVE_OPTIONS,
]
LIVENESS = "motet.liveness"  # a name of the health service: NOT_SERVING only if the process should be replaced
_LAST_WORDS_S = 5.0  # for the last messages of answers that a shutdown ends to reach their clients


class Inference(inference_pb2_grpc.InferenceServicer):
    """The `Inference` service. If the client drops or cancels a call, or its deadline passes, gRPC cancels the call's
    task and the service ends the request."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Generate(
        self, message: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        caller = caller_of(context)
        request = await self._service.read("generate", lambda: request_from_proto(message), caller)
        async with aclosing(self._service.generate(request, caller)) as outputs:
            async for output in outputs:
                for response in responses_from_output(output):
                    yield response

    async def Complete(
        self, message: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.CompleteResponse:
        caller = caller_of(context)
        request = await self._service.read("complete", lambda: request_from_proto(message), caller)
        choices = await self._service.complete(request, caller)
        return await self._service.encode(
            lambda: inference_pb2.CompleteResponse(choices=map(response_from_output, choices))
        )

    async def Abort(self, message: inference_pb2.AbortRequest, context: Context) -> inference_pb2.AbortResponse:
        return inference_pb2.AbortResponse(aborted=self._service.abort(message.request_id, caller_of(context)))

    async def Embed(self, message: inference_pb2.EmbedRequest, context: Context) -> inference_pb2.EmbedResponse:
        caller = caller_of(context)
        prompts, ensemble = await self._service.read("embed", lambda: embed_from_proto(message), caller)
        found = await self._service.embed(prompts, ensemble, caller)
        check_embeddings_size(found)
        return await self._service.encode(lambda: embeddings_to_proto(found))

    async def Tokenize(
        self, message: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        caller = caller_of(context)
        prompt = await self._service.read("tokenize", lambda: prompt_from_proto(message.prompt), caller)
        return inference_pb2.TokenizeResponse(token_ids=await self._service.tokenize(prompt, caller))

    async def Detokenize(
        self, message: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        skip = message.skip_special_tokens if message.HasField("skip_special_tokens") else True
        text = await self._service.detokenize(message.token_ids, caller_of(context), skip)
        return inference_pb2.DetokenizeResponse(text=text)


class Admin(admin_pb2_grpc.AdminServicer):
    """The `Admin` service. `Gate` has the roles that its methods need."""

    def __init__(self, service: Service, *, lame_duck_s: float = 0.0) -> None:
        self._service = service
        self._lame_duck_s = lame_duck_s

    async def ListModels(self, _message: admin_pb2.ListModelsRequest, context: Context) -> admin_pb2.ListModelsResponse:
        models = self._service.models(caller_of(context))
        return admin_pb2.ListModelsResponse(models=map(model_to_proto, models))

    async def GetModel(self, message: admin_pb2.GetModelRequest, context: Context) -> admin_pb2.GetModelResponse:
        caller = caller_of(context)
        found = admin_pb2.GetModelResponse(model=model_to_proto(self._service.model(message.name, caller)))
        if Role.MONITOR in caller.identity.roles:  # the load is of all tenants
            stats = self._service.stats()
            found.waiting, found.running = stats.waiting, stats.running
        return found

    async def GetLoad(self, _message: admin_pb2.GetLoadRequest, _context: Context) -> admin_pb2.GetLoadResponse:
        stats = self._service.stats()
        return admin_pb2.GetLoadResponse(
            waiting=stats.waiting,
            running=stats.running,
            max_running=self._service.places_for_jobs,
            num_blocks=stats.num_blocks,
            free_blocks=stats.free_blocks,
            prompt_tokens=stats.prompt_tokens,
            cached_tokens=stats.cached_tokens,
            tokens=stats.tokens,
            is_leaving=self._service.is_leaving,
        )

    async def Drain(self, _message: admin_pb2.DrainRequest, context: Context) -> admin_pb2.DrainResponse:
        if self._lame_duck_s:
            self._service.leave(caller_of(context))  # `Server.stop` drains when it is over
        else:
            self._service.drain(caller_of(context))
        return admin_pb2.DrainResponse()


class Health(HealthServicer):  # type: ignore[misc]
    """The standard health service, which is open to all; so those who watch are counted."""

    _num_watchers = 0

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        if self._num_watchers >= MAX_WATCHERS:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{MAX_WATCHERS} clients watch already; ask with Check, or try again later",
            )
        self._num_watchers += 1
        try:
            await super().Watch(request, context)
        finally:
            self._num_watchers -= 1


class Server:
    """A gRPC server over a service. `start` binds the port, `stop` drains. `port` is the bound port once started."""

    def __init__(
        self,
        service: Service,
        access: Access,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        tls: TlsFiles | None = None,
        with_reflection: bool = False,
        with_gateways: bool = False,
        lame_duck_s: float = 0.0,
    ) -> None:
        """`with_gateways`: answer what gateways speak too (`vllm.py`, `kserve.py`). `lame_duck_s`: seconds between NOT_SERVING
        and the refusal of new requests, in which load balancers turn away."""
        self.service = service
        self.host = host
        self._access = access
        self._wanted_port = port
        self.tls = tls
        self._with_reflection, self._with_gateways = with_reflection, with_gateways
        self._lame_duck_s = lame_duck_s
        self.jobs: Jobs | None = None  # to be set before `start`
        self.port = 0

    async def start(self) -> None:
        """Raises `PortInUseError` if the port is taken."""
        interceptors = [
            Gate(self._access, self.service.calls),
            Statuses(self.service.calls, self.service.send_timeout_s),
        ]
        self._server = grpc.aio.server(
            options=[*OPTIONS, ("grpc.max_receive_message_length", MAX_REQUEST_BYTES + self.service.most_media_bytes)],
            interceptors=interceptors,
            maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS,
        )
        self._health = Health()
        inference_pb2_grpc.add_InferenceServicer_to_server(Inference(self.service), self._server)  # type: ignore[no-untyped-call]
        admin_pb2_grpc.add_AdminServicer_to_server(Admin(self.service, lame_duck_s=self._lame_duck_s), self._server)  # type: ignore[no-untyped-call]
        batch_pb2_grpc.add_BatchServicer_to_server(BatchJobs(self.service, self.jobs), self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        services = list(SERVICES)
        if self._with_gateways:
            services += _add_gateways(self.service, self._server)
        if self._with_reflection:
            reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        address = f"{self.host}:{self._wanted_port}"
        try:
            # Tried first, because gRPC writes a log line of its own when it cannot bind.
            socket.create_server((self.host, self._wanted_port)).close()
            if self.tls is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, _credentials(self.tls))
        except (OSError, RuntimeError) as error:
            raise PortInUseError(f"cannot listen on {address} ({error}); choose another --port") from error
        await self._server.start()
        await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        self._unhealthy = asyncio.create_task(self._end_health())

    async def stop(self, drain_timeout_s: float = 10.0) -> None:
        """Say NOT_SERVING, wait while clients turn away, refuse new requests, let those that run go on for so many seconds,
        and end those that are left with what they have."""
        self.service.leave()
        await self._unhealthy
        if self._lame_duck_s and self.service.failure is None:
            await self.service.wait_lame_duck(self._lame_duck_s)
        self.service.drain()
        if not await self.service.wait_idle(drain_timeout_s):
            self.service.shut_down()
            await self.service.wait_idle(_LAST_WORDS_S)
        await self._server.stop(0.2)  # for the last bytes of answers; what still runs then are watchers of health

    async def _end_health(self) -> None:
        """Report NOT_SERVING as soon as the service is to end, for whatever reason, or its engine has failed."""
        await self.service.wait_out_of_service()
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        if self.service.failure is not None:
            await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.NOT_SERVING)

    async def _set_health(self, status: int) -> None:
        for service in ("", *SERVICES):
            await self._health.set(service, status)


def _add_gateways(service: Service, server: Any) -> list[str]:
    """Raises `MissingPackageError`."""
    from . import kserve, vllm  # their packages are optional

    vllm.add(service, server)
    kserve.add(service, server)
    return [vllm.SERVICE, kserve.SERVICE]


def _credentials(tls: TlsFiles) -> Any:
    """gRPC asks for the certificate at each handshake, so a changed one is used from the next connection on."""
    used = tls.content.value

    def configuration(content: TlsContent) -> Any:
        return grpc.ssl_server_certificate_configuration([(content.key, content.certificate)], content.client_ca)

    def fetch() -> Any:
        nonlocal used
        content = tls.content.value
        if content is used:
            return None
        used = content
        return configuration(content)

    return grpc.dynamic_ssl_server_credentials(configuration(used), fetch, tls.asks_clients)
