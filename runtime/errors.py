"""Typed errors: each says what was wrong, the limit, the actual value and what to change.

Every error that a user can cause derives from `MotetError`. The command exits with `exit_code` (2: the input was
wrong, 1: something else failed). Each door maps the classes to its own statuses, in one table. Two mistakes have
different classes only if a caller would handle them differently.
"""

from __future__ import annotations

_SHOWN = 80  # characters of a refused value that a message shows


def shown(value: object) -> str:
    """A value as an error's text shows it: its `repr`, cut after 80 characters."""
    text = repr(value[: _SHOWN + 1] if isinstance(value, str | bytes | list | tuple) else value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


class MotetError(Exception):
    """Base of all errors that Motet raises on purpose. The message is one line that can be shown to a user."""

    exit_code = 1


class InvalidRequestError(MotetError, ValueError):
    """A field of a request has a value that is not allowed; `field` names it."""

    exit_code = 2

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class InvalidEnsembleError(InvalidRequestError):
    """A mix, a member or a space is invalid."""


class ContextLengthError(InvalidRequestError):
    """A prompt and its answer do not fit the context."""


class NotFoundError(MotetError, LookupError):
    """A file, model, member or job does not exist."""

    exit_code = 2


class BundleError(MotetError):
    """A bundle or checkpoint is damaged, of an unknown version, or inconsistent."""

    exit_code = 2


class UnsupportedModelError(MotetError):
    """A model family or option that Motet cannot compute."""

    exit_code = 2


class UnauthenticatedError(MotetError):
    """The caller has not shown who it is: no key or token, or one that is wrong, expired or revoked."""


class PermissionDeniedError(MotetError):
    """The caller is known and may not do this."""


class UnimplementedError(MotetError):
    """The server does not offer this call."""


class DataError(MotetError):
    """An input record or file is malformed: not UTF-8, not JSON, a field missing or of the wrong type."""

    exit_code = 2


class ConfigError(MotetError, ValueError):
    """A configuration key is unknown or its value out of range."""

    exit_code = 2


class OverloadedError(MotetError):
    """A queue is full or a quota is spent: try again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(MotetError):
    """Something is not available here and now: a server that drains or does not answer, a source that cannot be
    reached, room on a disk or in memory, a capability of the machine. Try later, elsewhere, or with other options."""

    exit_code = 2


class PortInUseError(UnavailableError):
    """The port is in use: choose another."""


class MissingPackageError(MotetError):
    """An optional package is not installed: the message names the command that installs it."""

    exit_code = 2


class NumericalError(MotetError):
    """The logits of a row hold NaN or infinity, or leave no token to choose. Only that request ends."""
