"""`Statuses`: whatever ends a call of `motet.v1` is answered with a status that a client can act on."""

from __future__ import annotations

import inspect
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from ...errors import InvalidRequestError, MotetError
from .wire import status_of

log = logging.getLogger("motet.server")


class Statuses(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Typed errors end a call with their status. Any other exception is a fault of ours: it is logged under a number, and
    the client gets the number and not its text. Bytes that are no message of the method are INVALID_ARGUMENT."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or not details.method.startswith("/motet.v1."):
            return handler
        decode = handler.request_deserializer

        def deserialize(data: bytes) -> Any:
            """The message, or the error: an exception here would end the call as UNKNOWN."""
            try:
                return decode(data)
            except DecodeError:
                return InvalidRequestError(f"the request's {len(data)} bytes are no message of {details.method}")

        if handler.response_streaming:
            stream = handler.unary_stream
            assert inspect.isasyncgenfunction(stream)

            async def answer_stream(message: Any, context: Any) -> AsyncIterator[Any]:
                try:
                    if isinstance(message, MotetError):
                        raise message
                    async with aclosing(stream(message, context)) as responses:
                        async for response in responses:
                            yield response
                except Exception as error:
                    await _abort(context, details.method, error)

            return grpc.unary_stream_rpc_method_handler(answer_stream, deserialize, handler.response_serializer)
        unary = handler.unary_unary

        async def answer(message: Any, context: Any) -> Any:
            try:
                if isinstance(message, MotetError):
                    raise message
                return await unary(message, context)
            except Exception as error:
                await _abort(context, details.method, error)

        return grpc.unary_unary_rpc_method_handler(answer, deserialize, handler.response_serializer)


async def _abort(context: Any, method: str, error: Exception) -> None:
    if not isinstance(error, MotetError):
        number = uuid.uuid4().hex[:12]
        log.error("%s failed (%s)", method, number, exc_info=error)
        error = MotetError(f"internal error {number}; the server's log has it under this number")
    await context.abort_with_status(status_of(error))
