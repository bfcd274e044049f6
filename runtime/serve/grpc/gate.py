"""`Gate`: nobody calls a method without a right to it. A method that is in no table here is refused, whoever calls it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import Any

import grpc

from ...errors import PermissionDeniedError
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
    "/motet.v1.Inference/Tokenize": _WORK,
    "/motet.v1.Inference/Detokenize": _WORK,
    "/motet.v1.Admin/ListModels": _ANY,
    "/motet.v1.Admin/GetModel": _ANY,
    "/motet.v1.Admin/Drain": frozenset({Role.ADMIN}),
    "/motet.v1.Batch/Submit": frozenset({Role.BATCH}),
    "/motet.v1.Batch/Watch": frozenset({Role.BATCH}),
    "/motet.v1.Batch/Cancel": frozenset({Role.BATCH}),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _ANY,
}
OPEN_TO_ALL = "/grpc.health.v1.Health/"  # load balancers have no keys

_IDENTITY: ContextVar[tuple[Identity, str]] = ContextVar("motet_identity")


def caller_of(context: Any) -> Caller:
    """Who made the call that is being answered."""
    identity, traceparent = _IDENTITY.get()
    return Caller(identity, traceparent, context.peer())


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses a call before its message is read."""

    def __init__(self, access: Access, calls: Calls) -> None:
        self._access, self._calls = access, calls

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        method = details.method
        if method.startswith(OPEN_TO_ALL):
            return await continuation(details)
        metadata = details.invocation_metadata or ()
        try:
            identity = self._access.identify([value for key, value in metadata if key == "authorization"])
            handler = await continuation(details)
            if (
                handler is None
            ):  # there is no such method; that it is UNIMPLEMENTED may be known to callers who are known
                return None
            if method not in ROLES:
                raise PermissionDeniedError("this method is open to nobody")
            identity.require(ROLES[method])
        except Exception as error:  # a fault of ours closes the method too
            return self._refusal(method, error)
        _IDENTITY.set((identity, next((value for key, value in metadata if key == "traceparent"), "")))
        return handler

    def _refusal(self, method: str, error: Exception) -> Any:
        async def refuse(_message: Any, context: Any) -> None:
            self._calls.refused(method, context.peer(), error)
            await abort(context, method, error)

        return grpc.unary_unary_rpc_method_handler(refuse)
