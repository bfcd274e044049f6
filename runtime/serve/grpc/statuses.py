"""Typed errors ↔ gRPC statuses, and `Statuses`: whatever ends a call of `motet.v1` is answered with a status."""

from __future__ import annotations

import asyncio
import inspect
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from ... import errors
from ...api.limits import MAX_ERROR_BYTES, MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES
from ...errors import InvalidRequestError, MotetError, OverloadedError, UnavailableError
from ..calls import Calls
from .wire import media_bytes

log = logging.getLogger("motet.server")

# ---- errors ----------------------------------------------------------------------------------------------------------

# A class that is not listed has the status of the class that it derives from.
_CODES: Mapping[type, grpc.StatusCode] = {
    errors.MotetError: grpc.StatusCode.INTERNAL,
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.DataError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.BundleError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.UnsupportedModelError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.MissingPackageError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.UnimplementedError: grpc.StatusCode.UNIMPLEMENTED,
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
}
_DOMAIN = "motet"
MEDIA_METHODS = frozenset(f"/motet.v1.Inference/{name}" for name in ("Generate", "Complete", "Tokenize"))
OWN = ("/motet.v1.", "/vllm.grpc.engine.", "/inference.")  # packages of our services


def status_of(error: MotetError) -> grpc.Status:
    """The gRPC status of an error, with google.rpc details: ErrorInfo, BadRequest, RetryInfo."""
    code = next(_CODES[cls] for cls in type(error).__mro__ if cls in _CODES)
    text = str(error).encode()
    message = str(error) if len(text) <= MAX_ERROR_BYTES else text[:MAX_ERROR_BYTES].decode(errors="ignore") + "…"
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=_DOMAIN)]
    if isinstance(error, InvalidRequestError) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, OverloadedError):
        delay = Duration()
        delay.FromMilliseconds(int(1000 * error.retry_after_s))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return rpc_status.to_status(status)


def error_of(call_error: Any) -> MotetError:
    """The typed error behind a failed call, for clients: the same class that the server raised, with its details."""
    message = call_error.details() or str(call_error.code())
    status = rpc_status.from_call(call_error) if call_error.trailing_metadata() is not None else None
    info, violated, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for packed in status.details if status is not None else ():
        any(packed.Unpack(detail) for detail in (info, violated, retry))
    cls = getattr(errors, info.reason, None) if info.domain == _DOMAIN else None
    if isinstance(cls, type) and issubclass(cls, InvalidRequestError):
        return cls(message, field=next((violation.field for violation in violated.field_violations), ""))
    if isinstance(cls, type) and issubclass(cls, OverloadedError):
        return cls(message, retry_after_s=retry.retry_delay.ToMilliseconds() / 1000)
    if isinstance(cls, type) and issubclass(cls, MotetError):
        return cls(message)
    code = call_error.code()
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return errors.UnimplementedError(f"the server does not offer this call: {message}")
    if code is grpc.StatusCode.UNAVAILABLE and "failed to connect" in message.lower():
        return errors.UnavailableError(f"nothing answers at this address: {message}; is `motet serve` running there?")
    if code is grpc.StatusCode.UNAVAILABLE:
        return errors.UnavailableError(f"the connection to the server broke: {message}; send the request again")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return InvalidRequestError(
            f"a request has at most {MAX_REQUEST_BYTES} bytes beside the media that a server permits, an answer "
            f"{MAX_MESSAGE_BYTES}: {message}"
        )
    return MotetError(f"{code.name}: {message}")


# ---- calls -----------------------------------------------------------------------------------------------------------


class Statuses(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Typed errors end a call with their status. Any other exception is a fault of ours: it is logged under a number, and
    the client gets the number and not its text. Bytes that are no message of the method are INVALID_ARGUMENT. A stream that
    its client does not read for `send_timeout_s` seconds ends."""

    def __init__(self, calls: Calls, send_timeout_s: float) -> None:
        self._calls, self._send_timeout_s = calls, send_timeout_s

    async def _send(self, context: Any, responses: AsyncIterator[Any]) -> None:
        """One timer for a whole stream: one for each message would cost as much as a third of sending it."""
        loop, task, limit = asyncio.get_running_loop(), asyncio.current_task(), self._send_timeout_s
        assert task is not None
        since: float | None = None  # when the message that is being sent was given to gRPC
        is_over = False
        timer: asyncio.TimerHandle | None = None

        def check() -> None:
            nonlocal timer, is_over
            left = limit if since is None else since + limit - loop.time()
            if left > 0:
                timer = loop.call_later(left, check)
            else:
                is_over = True
                task.cancel()

        timer = loop.call_later(limit, check)
        try:
            async for response in responses:
                since = loop.time()
                await context.write(response)
                since = None
        except asyncio.CancelledError:
            if is_over and task.uncancel() == 0:  # else something else has cancelled it too
                raise UnavailableError(f"the answer was not read for {limit:g} seconds") from None
            raise
        finally:
            if timer is not None:
                timer.cancel()

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or not details.method.startswith(OWN):
            return handler
        decode = handler.request_deserializer

        def deserialize(data: bytes) -> Any:
            """The message, or the error: an exception here would end the call as UNKNOWN."""
            try:
                message = decode(data) if len(data) <= MAX_REQUEST_BYTES or details.method in MEDIA_METHODS else None
            except DecodeError:
                return InvalidRequestError(f"the request's {len(data)} bytes are no message of {details.method}")
            if len(data) <= MAX_REQUEST_BYTES:
                return message
            try:
                beside = len(data) - (0 if message is None else media_bytes(message))
            except InvalidRequestError as error:
                return error
            if beside > MAX_REQUEST_BYTES:
                return InvalidRequestError(
                    f"the request has {len(data)} bytes, at most {MAX_REQUEST_BYTES} beside media are read; send less"
                )
            return message

        async def checked(messages: Any) -> AsyncGenerator[Any, None]:
            async for message in messages:
                if isinstance(message, MotetError):
                    raise message
                yield message

        if handler.request_streaming and handler.response_streaming:
            converse = handler.stream_stream

            async def answer_stream_to_stream(messages: Any, context: Any) -> None:
                try:
                    async with aclosing(checked(messages)) as own, aclosing(converse(own, context)) as responses:
                        await self._send(context, responses)
                except Exception as error:
                    await abort(context, details.method, error)

            return grpc.stream_stream_rpc_method_handler(
                answer_stream_to_stream, deserialize, handler.response_serializer
            )
        if handler.request_streaming:
            take = handler.stream_unary

            async def answer_to_stream(messages: Any, context: Any) -> Any:
                try:
                    async with aclosing(checked(messages)) as own:
                        return await take(own, context)
                except Exception as error:
                    await abort(context, details.method, error)

            return grpc.stream_unary_rpc_method_handler(answer_to_stream, deserialize, handler.response_serializer)
        if handler.response_streaming:
            stream = handler.unary_stream
            assert inspect.isasyncgenfunction(stream)

            async def answer_stream(message: Any, context: Any) -> None:
                try:
                    if isinstance(message, MotetError):
                        self._calls.refused(details.method, context.peer(), message)
                        raise message
                    async with aclosing(stream(message, context)) as responses:
                        await self._send(context, responses)
                except Exception as error:
                    await abort(context, details.method, error)

            return grpc.unary_stream_rpc_method_handler(answer_stream, deserialize, handler.response_serializer)
        unary = handler.unary_unary

        async def answer(message: Any, context: Any) -> Any:
            try:
                if isinstance(message, MotetError):
                    self._calls.refused(details.method, context.peer(), message)
                    raise message
                return await unary(message, context)
            except Exception as error:
                await abort(context, details.method, error)

        return grpc.unary_unary_rpc_method_handler(answer, deserialize, handler.response_serializer)


async def abort(context: Any, method: str, error: Exception) -> None:
    """End a call with the status of an error."""
    if not isinstance(error, MotetError):
        number = uuid.uuid4().hex[:12]
        log.error("%s failed (%s)", method, number, exc_info=error)
        error = MotetError(f"internal error {number}; the server's log has it under this number")
    await context.abort_with_status(status_of(error))
