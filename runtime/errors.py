"""Typed errors: each says what was wrong, the limit, the actual value and what to change.

Every error a user can cause derives from `MotetError`. `exit_code` is what the CLI exits with (2: the input was wrong,
1: something else failed); `runtime.wire` maps the classes to gRPC status codes, in one table.
"""

from __future__ import annotations


class MotetError(Exception):
    """Base of all errors that Motet raises on purpose. The message is one line, fit to be shown as it is."""

    exit_code = 1


class InvalidRequestError(MotetError, ValueError):
    """A request field is out of its range (gRPC INVALID_ARGUMENT)."""

    exit_code = 2

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class InvalidEnsembleError(InvalidRequestError):
    """A mix, member or space is not usable (gRPC INVALID_ARGUMENT)."""


class ContextLengthError(InvalidRequestError):
    """A prompt and its answer do not fit the context (gRPC INVALID_ARGUMENT)."""


class NotFoundError(MotetError, LookupError):
    """A file, model, member or job does not exist (gRPC NOT_FOUND)."""

    exit_code = 2


class BundleError(MotetError):
    """A bundle or checkpoint is damaged, of an unknown version, or inconsistent (gRPC FAILED_PRECONDITION)."""

    exit_code = 2


class UnsupportedModelError(MotetError):
    """A model family or option that no `DecoderConfig` describes (gRPC UNIMPLEMENTED)."""

    exit_code = 2


class DataError(MotetError):
    """An input record or file is malformed: not UTF-8, not JSON, a field missing or of the wrong type."""

    exit_code = 2


class ConfigError(MotetError, ValueError):
    """A configuration key is unknown or its value out of range."""

    exit_code = 2


class OverloadedError(MotetError):
    """The waiting queue is full (gRPC RESOURCE_EXHAUSTED with RetryInfo)."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(MotetError):
    """The engine is draining or closed, a port is in use, or an optional dependency is missing (gRPC UNAVAILABLE)."""

    exit_code = 2


class NumericalError(MotetError):
    """A row's logits hold NaN: that request alone ends (gRPC INTERNAL)."""
