"""`Gate`: nobody calls a method without a right to it. A method that is in no table here is refused, whoever calls it."""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import Any

import grpc

from ...api.limits import MAX_BEGUN_CALLS
from ...errors import InvalidRequestError, OverloadedError, PermissionDeniedError
from ...trust.access import Access
from ...trust.identity import Identity, Role
from ..calls import Caller, Calls
from .statuses import abort

_ANY = frozenset(Role)
_WORK = frozenset({Role.INFER, Role.BATCH})
ROLES: Mapping[str, frozenset[Role]] = {
    "/motet.v1.Inference/Generate": _WORK,
    "/motet.v1.Inference/Complete": _WORK,
    "/motet.v1.Inference/Abort": _WORK,
    "/motet.v1.Inference/Embed": _WORK,
    "/motet.v1.Inference/Tokenize": _WORK,
    "/motet.v1.Inference/Detokenize": _WORK,
    "/motet.v1.Admin/ListModels": _ANY,
    "/motet.v1.Admin/GetModel": _ANY,
    "/motet.v1.Admin/GetLoad": frozenset({Role.MONITOR}),
    "/motet.v1.Admin/Drain": frozenset({Role.ADMIN}),
    **{
        f"/motet.v1.Batch/{name}": frozenset({Role.BATCH})
        for name in ("Submit", "Get", "List", "Watch", "Results", "Cancel", "Delete")
    },
    **{f"/vllm.grpc.engine.VllmEngine/{name}": _WORK for name in ("Generate", "Embed", "Abort", "GetTokenizer")},
    "/vllm.grpc.engine.VllmEngine/GetModelInfo": _ANY,
    **{
        f"/vllm.grpc.engine.VllmEngine/{name}": frozenset({Role.MONITOR})
        for name in ("GetServerInfo", "GetLoads", "SubscribeKvEvents")
    },
    **{
        f"/vllm.grpc.engine.VllmEngine/{name}": frozenset({Role.ADMIN})
        for name in ("FlushCache", "StartProfile", "StopProfile")
    },
    **{f"/inference.GRPCInferenceService/{name}": _WORK for name in ("ModelInfer", "ModelStreamInfer")},
    **{f"/inference.GRPCInferenceService/{name}": _ANY for name in ("ModelReady", "ServerMetadata", "ModelMetadata")},
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _ANY,
}
_MESSAGE_S = 10.0  # for a call's message to come
# Health, and no more: load balancers have no keys.
OPEN_TO_ALL = (
    "/grpc.health.v1.Health/",
    "/vllm.grpc.engine.VllmEngine/HealthCheck",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
)

_IDENTITY: ContextVar[tuple[Identity, str]] = ContextVar("motet_identity")


def caller_of(context: Any) -> Caller:
    """Who made the call that is being answered."""
    identity, traceparent = _IDENTITY.get()
    return Caller(identity, traceparent, context.peer())


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses a call before its message is read."""

    def __init__(self, access: Access, calls: Calls) -> None:
        self._access, self._calls = access, calls
        self._streams: Counter[str] = Counter()  # host → its open calls that send any number of messages
        self._begun: Counter[str] = Counter()  # host → its calls whose message has not come

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        method = details.method
        if method.startswith(OPEN_TO_ALL):
            return self._with_deadline(await continuation(details), method)
        metadata, identity = details.invocation_metadata or (), None
        try:
            identity = self._access.identify([value for key, value in metadata if key == "authorization"])
            handler = await continuation(details)
            if handler is None:
                return None  # there is no such method: UNIMPLEMENTED, which a known caller may know
            if method not in ROLES:
                raise PermissionDeniedError("this method is open to nobody")
            identity.require(ROLES[method])
        except Exception as error:  # a fault of ours closes the method too
            return self._refusal(method, error, identity)
        _IDENTITY.set((identity, next((value for key, value in metadata if key == "traceparent"), "")))
        return self._with_deadline(handler, method)

    def _refusal(self, method: str, error: Exception, identity: Identity | None) -> Any:
        async def refuse(_messages: Any, context: Any) -> None:  # of a stream: it does not wait for a message
            self._calls.refused(method, context.peer(), error, identity)
            await abort(context, method, error)

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _with_deadline(self, handler: Any, method: str) -> Any:
        """The handler of one message, as one that ends the call if the message does not come: a call that was only begun must
        not keep its place, and one host must not begin so many that others find none."""
        if handler is None:
            return handler
        if handler.request_streaming:
            return self._counted(handler, method)

        async def first(messages: Any, context: Any) -> Any:
            host = context.peer().rpartition(":")[0]
            if self._begun[host] >= MAX_BEGUN_CALLS:
                text = f"{MAX_BEGUN_CALLS} calls of this host are waiting for their messages; send those first"
                await abort(context, method, OverloadedError(text))
            self._begun[host] += 1
            try:
                return await asyncio.wait_for(anext(messages), _MESSAGE_S)
            except (TimeoutError, StopAsyncIteration):
                await abort(context, method, InvalidRequestError(f"no message came within {_MESSAGE_S:g} seconds"))
            finally:
                self._begun[host] -= 1
                if not self._begun[host]:
                    del self._begun[host]

        if not handler.response_streaming:

            async def answer(messages: Any, context: Any) -> Any:
                return await handler.unary_unary(await first(messages, context), context)

            return grpc.stream_unary_rpc_method_handler(
                answer, handler.request_deserializer, handler.response_serializer
            )

        async def answer_stream(messages: Any, context: Any) -> Any:
            async with aclosing(handler.unary_stream(await first(messages, context), context)) as responses:
                async for response in responses:
                    yield response

        async def answer_by_writing(messages: Any, context: Any) -> None:
            await handler.unary_stream(await first(messages, context), context)

        chosen = answer_stream if inspect.isasyncgenfunction(handler.unary_stream) else answer_by_writing
        return grpc.stream_stream_rpc_method_handler(chosen, handler.request_deserializer, handler.response_serializer)

    def _counted(self, handler: Any, method: str) -> Any:
        """The handler of a stream of messages, of which one host has a limited number open."""

        @contextmanager
        def counted(context: Any) -> Iterator[bool]:
            host = context.peer().rpartition(":")[0]
            if self._streams[host] >= MAX_BEGUN_CALLS:
                yield False
                return
            self._streams[host] += 1
            try:
                yield True
            finally:
                self._streams[host] -= 1
                if not self._streams[host]:
                    del self._streams[host]

        full = OverloadedError(f"{MAX_BEGUN_CALLS} streams of this host are open; end some first")

        if not handler.response_streaming:

            async def answer(messages: Any, context: Any) -> Any:
                with counted(context) as has_place:
                    if not has_place:
                        await abort(context, method, full)
                    return await handler.stream_unary(messages, context)

            return grpc.stream_unary_rpc_method_handler(
                answer, handler.request_deserializer, handler.response_serializer
            )

        async def converse(messages: Any, context: Any) -> Any:
            with counted(context) as has_place:
                if not has_place:
                    await abort(context, method, full)
                async with aclosing(handler.stream_stream(messages, context)) as responses:
                    async for response in responses:
                        yield response

        async def converse_by_writing(messages: Any, context: Any) -> None:
            with counted(context) as has_place:
                if not has_place:
                    await abort(context, method, full)
                await handler.stream_stream(messages, context)

        chosen = converse if inspect.isasyncgenfunction(handler.stream_stream) else converse_by_writing
        return grpc.stream_stream_rpc_method_handler(chosen, handler.request_deserializer, handler.response_serializer)
