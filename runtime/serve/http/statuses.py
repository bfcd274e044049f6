"""Typed errors → HTTP statuses, with bodies in OpenAI's form."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse

from ... import errors
from ...errors import InvalidRequestError, MotetError, NotFoundError, OverloadedError, shown

log = logging.getLogger("motet.server")


class MethodNotAllowedError(NotFoundError):
    """The path is there, with other methods (`allowed`)."""

    def __init__(self, method: str, path: str, allowed: Sequence[str]) -> None:
        self.allowed = allowed
        super().__init__(f"there is no {shown(method)} {path} here; it has {', '.join(allowed)}")


# Class → (status, type, code). A class that is not listed has the row of the class that it derives from.
_ROWS: Mapping[type, tuple[int, str, str | None]] = {
    errors.MotetError: (500, "server_error", None),
    errors.InvalidRequestError: (400, "invalid_request_error", None),
    errors.ContextLengthError: (400, "invalid_request_error", "context_length_exceeded"),
    errors.DataError: (400, "invalid_request_error", None),
    errors.ConfigError: (400, "invalid_request_error", None),
    MethodNotAllowedError: (405, "invalid_request_error", "method_not_allowed"),
    errors.NotFoundError: (404, "invalid_request_error", "not_found"),
    errors.BundleError: (500, "server_error", None),
    errors.UnsupportedModelError: (400, "invalid_request_error", None),
    errors.MissingPackageError: (501, "server_error", None),
    errors.UnauthenticatedError: (401, "authentication_error", "invalid_api_key"),
    errors.PermissionDeniedError: (403, "permission_error", None),
    errors.UnimplementedError: (501, "server_error", None),
    errors.OverloadedError: (429, "rate_limit_error", "rate_limit_exceeded"),
    errors.UnavailableError: (503, "server_error", None),
}


def as_motet_error(error: Exception, what: str) -> MotetError:
    """The error itself if it is typed. Any other is a fault of ours: it is logged under a number, which is all that the
    client gets."""
    if isinstance(error, MotetError):
        return error
    number = uuid.uuid4().hex[:12]
    log.error("%s failed (%s)", what, number, exc_info=error)
    return MotetError(f"internal error {number}; the server's log has it under this number")


def error_body(error: MotetError) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`."""
    _, kind, code = _row(error)
    param = error.field or None if isinstance(error, InvalidRequestError) else None
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


def error_response(error: MotetError) -> JSONResponse:
    status = _row(error)[0]
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, MethodNotAllowedError):
        headers["Allow"] = ", ".join(error.allowed)
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["Retry-After-Ms"] = str(math.ceil(1000 * error.retry_after_s))
    return JSONResponse(error_body(error), status, headers)


def _row(error: MotetError) -> tuple[int, str, str | None]:
    return next(_ROWS[cls] for cls in type(error).__mro__ if cls in _ROWS)
