"""`Observer`: what hears of every step and every answer. Metrics, measurements, tracing and audit subscribe to an engine."""

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
    """One step of the backend that did not fail. Batch and output are the engine's own: to be read, not changed."""

    batch: Batch
    output: StepOutput
    seconds: float  # wall clock, of `Backend.step`
    parts: dict[str, float]  # seconds of the backend's parts since the last report; empty where it does not measure


class Observer:
    """Hears of an engine. A subclass defines the calls that it needs; the others do nothing.

    They come from the engine's thread (`on_reject` from the submitting one), before the client hears of the same, and the
    engine waits for them: they must not block. An exception is logged and changes nothing.
    """

    def on_step(self, step: StepReport) -> None:
        """A step has run; its tokens are not yet taken."""

    def on_finish(self, request: Request, last: Output) -> None:
        """A choice ended: `last` is its last delta, with finish reason, usage, timings and perhaps an error."""

    def on_reject(self, request: Request, error: MotetError) -> None:
        """A request was not accepted; `submit` raises `error`."""


def notify(observers: Iterable[Observer], call: Callable[[Observer], None]) -> None:
    """Make one call of every observer. A failure is logged and disturbs neither the engine nor the other observers."""
    for observer in observers:
        try:
            call(observer)
        except Exception:
            log.exception("an observer failed: %r", observer)
