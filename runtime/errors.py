"""Typed errors: each says what was wrong, the limit, the actual value and what to change.

Every error a user can cause derives from `MotetError`. `exit_code` is what the CLI exits with (2: the input was wrong,
1: something else failed). Each door maps the classes to its own statuses, in one table. A class is what a caller can act
upon: two mistakes that call for the same act share one.
"""

from __future__ import annotations


class MotetError(Exception):
    """Base of all errors that Motet raises on purpose. The message is one line, fit to be shown as it is."""

    exit_code = 1


class InvalidRequestError(MotetError, ValueError):
    """A request field is out of its range."""

    exit_code = 2

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class InvalidEnsembleError(InvalidRequestError):
    """A mix, member or space is not usable."""


class ContextLengthError(InvalidRequestError):
    """A prompt and its answer do not fit the context."""


class NotFoundError(MotetError, LookupError):
    """A file, model, member or job does not exist."""

    exit_code = 2


class BundleError(MotetError):
    """A bundle or checkpoint is damaged, of an unknown version, or inconsistent."""

    exit_code = 2


class UnsupportedModelError(MotetError):
    """A model family or option that no `DecoderConfig` describes."""

    exit_code = 2


class UnimplementedError(MotetError):
    """This server does not offer the call; another one may."""


class DataError(MotetError):
    """An input record or file is malformed: not UTF-8, not JSON, a field missing or of the wrong type."""

    exit_code = 2


class ConfigError(MotetError, ValueError):
    """A configuration key is unknown or its value out of range."""

    exit_code = 2


class OverloadedError(MotetError):
    """The waiting queue is full."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(MotetError):
    """Not to be had here and now: a server that drains or does not answer, a source that cannot be reached, a disk or a
    memory without room, a machine without what is asked for. Try later, elsewhere, or ask for something else."""

    exit_code = 2


class PortInUseError(UnavailableError):
    """Another program listens on the port: choose another port."""


class MissingPackageError(MotetError):
    """An optional package is not installed: the message names the command that installs it."""

    exit_code = 2


class NumericalError(MotetError):
    """A row's logits hold NaN: that request alone ends."""
