"""`Observer`: is called for every step and every answer. Metrics and benches subscribe to an engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..api.output import Output
from ..api.request import Request
from ..errors import MotetError
from ..schedule.batch import Batch, StepOutput

log = logging.getLogger("motet.engine")


@dataclass(frozen=True, slots=True)
class StepReport:
    """One successful step of the backend. Batch and output belong to the engine: read them, do not change them."""

    batch: Batch
    output: StepOutput
    seconds: float  # wall clock, of `Backend.step`
    parts: dict[str, float]  # seconds of the backend's parts since the last report; empty if it does not measure them


class Observer:
    """Base of observers. A subclass defines the methods that it needs; the others do nothing.

    They are called on the engine's thread (`on_reject` on the submitting one), before the client gets the same
    output. The engine waits for them, so they must not block. An exception is logged and changes nothing.
    """

    def on_step(self, step: StepReport) -> None:
        """A step has run; its tokens are not yet appended to the answers."""

    def on_finish(self, request: Request, last: Output) -> None:
        """A choice ended: `last` is its last delta, with finish reason, usage, timings and perhaps an error."""

    def on_reject(self, request: Request, error: MotetError) -> None:
        """A request was not accepted; `submit` raises `error`."""


def notify(observers: Iterable[Observer], call: Callable[[Observer], None]) -> None:
    """Call every observer. An exception is logged and affects neither the engine nor the other observers."""
    for observer in observers:
        try:
            call(observer)
        except Exception:
            log.exception("an observer failed: %r", observer)
