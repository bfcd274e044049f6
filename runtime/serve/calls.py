"""`Call`: one call of a caller from its arrival to its end, and who is told of it: logs, metrics, traces, the audit log."""

from __future__ import annotations

import itertools
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from ..api.output import Output
from ..api.request import Request
from ..errors import MotetError
from ..trust.identity import Identity

log = logging.getLogger("motet.calls")
GENERATIONS = ("generate", "complete")  # the methods whose calls are answered by the engine's tokens
_RUN, _NUMBERS = secrets.token_hex(8), itertools.count(1)
_SHOWN = 100  # characters of a method's name that a stranger has sent


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, as a door knows it. `traceparent`: the W3C trace context of the call, empty if there is none."""

    identity: Identity
    traceparent: str = ""
    peer: str = ""  # the address
    end_user: str = ""  # for whom, in the caller's own words


@dataclass(slots=True, eq=False)
class Call:
    """Times are in seconds; `started` since 1970, the others are durations. Counts are over all choices."""

    method: str
    caller: Caller
    model: str
    id: str = ""  # the server's, new for each call
    request_id: str = ""  # the client's
    started: float = field(default_factory=time.time)
    duration_s: float = 0.0
    status: str = "ok"  # else the class of the error, or "cancelled"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    queue_s: float | None = None  # of choice 0
    first_token_s: float | None = None  # from arrival
    mix: dict[str, float] = field(default_factory=dict)  # member → coefficient
    temperatures: dict[str, float] = field(default_factory=dict)  # member → its temperature, where it is not 1
    request: Request | None = None  # as the engine got it, if it got one
    text: list[str] = field(default_factory=list)  # the answer's pieces, in the order in which they were sent
    key: str = field(
        default_factory=lambda: f"{_RUN}-{next(_NUMBERS)}"
    )  # no other call has it, of no other process either
    _began: float = field(default_factory=time.monotonic)

    @property
    def error(self) -> str:
        """The class of the error; empty if there is none. That a client went away is none."""
        return "" if self.status in ("ok", "cancelled") else self.status

    def submitted(self, request: Request) -> None:
        self.id, self.request = request.request_id, request
        last = {
            member.name: member for member in request.ensemble.members
        }  # of one that sees several views the last entry
        self.mix = {name: member.mix for name, member in last.items()}
        self.temperatures = {name: member.temperature for name, member in last.items() if member.temperature != 1}
        self.prompt_tokens += sum(map(len, request.prompts))

    def add(self, output: Output) -> None:
        """A delta that the caller is sent."""
        self.completion_tokens += len(output.token_ids)
        self.text.append(output.text)
        if output.token_ids and self.first_token_s is None:
            self.first_token_s = time.monotonic() - self._began
        if output.finish_reason is not None:
            self.finish_reasons.append(output.finish_reason.value)
        if output.usage is not None:
            self.cached_tokens += output.usage.cached_tokens
        if output.timings is not None and output.choice == 0:
            self.queue_s = output.timings.queue_s

    def end(self, status: str) -> None:
        self.duration_s = time.monotonic() - self._began
        self.status = status


class CallSink(Protocol):
    """Is told of every call. It is called on the event loop and must not block."""

    def check(self) -> None:
        """Raises `UnavailableError` if a call that begins now cannot be recorded; it is then refused."""

    def on_begin(self, call: Call) -> None:
        """The call has come: nothing is known but method, caller and the client's id, and nothing was done for it."""

    def on_call(self, call: Call) -> None:
        """The call has ended, however that was."""

    def on_refusal(self, method: str, peer: str, error: Exception, who: Identity | None) -> None:
        """A call was refused before it was known what is asked: the caller is unknown (`who` None), or has no right."""


class Calls:
    """Records calls and tells the sinks. A sink that fails is logged and changes nothing."""

    def __init__(self, sinks: Iterable[CallSink], model: str) -> None:
        self._sinks, self._model = tuple(sinks), model

    @contextmanager
    def call(self, method: str, caller: Caller, request_id: str = "") -> Iterator[Call]:
        """Record what happens in the `with` block, and how it ends."""
        for sink in self._sinks:
            sink.check()
        call = Call(method, caller, self._model, request_id=request_id)
        self._tell(lambda sink: sink.on_begin(call))
        status = "cancelled"  # by what is no exception of ours: the client went away, or the task was ended
        try:
            yield call
            status = "ok"
        except MotetError as error:
            status = type(error).__name__
            raise
        except Exception:
            status = "internal"
            raise
        finally:
            call.end(status)
            self._tell(lambda sink: sink.on_call(call))
        for sink in self._sinks:  # an answer that could not be recorded is no answer
            sink.check()

    @property
    def failure(self) -> MotetError | None:
        """Why calls cannot be recorded any more."""
        for sink in self._sinks:
            try:
                sink.check()
            except MotetError as error:
                return error
        return None

    def refused(self, method: str, peer: str, error: Exception, who: Identity | None = None) -> None:
        self._tell(lambda sink: sink.on_refusal(method, peer, error, who))

    def _tell(self, tell: Callable[[CallSink], None]) -> None:
        for sink in self._sinks:
            try:
                tell(sink)
            except Exception:
                log.exception("%r failed", sink)


class CallLog:
    """A line in the log for each call. No prompt and no answer is in it."""

    def check(self) -> None:
        """The log takes everything."""

    def on_begin(self, call: Call) -> None:
        """A line says how a call ended."""

    def on_call(self, call: Call) -> None:
        who = call.caller.identity
        log.info(
            "%s %s tenant=%s %d+%d tokens %.0f ms",
            call.method,
            call.status,
            who.tenant or "-",
            call.prompt_tokens,
            call.completion_tokens,
            1000 * call.duration_s,
            extra={
                "fields": {
                    "method": call.method,
                    "status": call.status,
                    "tenant": who.tenant,
                    "subject": who.subject,
                    "peer": call.caller.peer,
                    "end_user": call.caller.end_user,
                    "call_id": call.id,
                    "request_id": call.request_id,
                    "traceparent": call.caller.traceparent,
                    "prompt_tokens": call.prompt_tokens,
                    "cached_tokens": call.cached_tokens,
                    "completion_tokens": call.completion_tokens,
                    "finish_reasons": call.finish_reasons,
                    "duration_s": round(call.duration_s, 6),
                    "queue_s": call.queue_s,
                    "first_token_s": call.first_token_s,
                }
            },
        )

    def on_refusal(self, method: str, peer: str, error: Exception, who: Identity | None) -> None:
        fields = {"method": method[:_SHOWN], "peer": peer, "status": type(error).__name__}
        if who is not None:
            fields |= {"tenant": who.tenant, "subject": who.subject}
        log.warning("%s refused: %s", method[:_SHOWN], type(error).__name__, extra={"fields": fields})


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, the fields of a call, the traceback of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        found = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, ensure_ascii=False)
