"""What a job does with its records: summarise them, or answer them as requests. And jobs that write a folder of parts."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from ..api.config import EngineConfig
from ..api.request import Ensemble
from ..engine.engine import Engine
from ..errors import MotetError
from ..text.summary import SummariseParams
from .parts import Parts, check_places
from .records import Record, count_records, read_records
from .summarise import OnProgress, Summariser

log = logging.getLogger("motet.jobs")
_PART = 16  # records of a part, for each that is answered at once


class Worker(Protocol):
    """`line` may be called from `concurrency` threads at once."""

    concurrency: int

    def line(self, record: Record) -> dict[str, Any]: ...

    def key(self, record: Record) -> str: ...

    def failed(self, record: Record) -> dict[str, Any]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class SummariseWork:
    """Lines of `motet summarise`."""

    ensemble: Ensemble | None = None
    params: SummariseParams = field(default_factory=SummariseParams)
    with_requests = False

    def open(self, engine: Engine) -> Worker:
        return Summariser(engine, self.ensemble, self.params)


@dataclass(frozen=True)
class RequestWork:
    """Lines of OpenAI's batch API. See `Answerer`."""

    endpoint: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    with_requests = True

    def open(self, engine: Engine) -> Worker:
        from .answerer import Answerer  # the HTTP API's packages are optional

        return Answerer(engine, self.endpoint, self.defaults)


Work = SummariseWork | RequestWork


@dataclass(slots=True)
class JobReport:
    """Counts of records."""

    done: int = 0
    failed: int = 0
    skipped: int = 0  # finished by an earlier run

    def add(self, other: JobReport) -> None:
        self.done += other.done
        self.failed += other.failed
        self.skipped += other.skipped


class Lines:
    """The lines of pieces of records, on an engine of its own, without those that an earlier run has finished."""

    def __init__(self, work: Work, bundle: Path, config: EngineConfig, finished: set[str]) -> None:
        self._engine = Engine.from_bundle(bundle, config)
        try:
            self._worker = work.open(self._engine)
        except BaseException:
            self._engine.close()
            raise
        self._finished = finished
        self._pool = ThreadPoolExecutor(self._worker.concurrency)
        self.piece = _PART * self._worker.concurrency

    def of(self, records: Iterable[Record]) -> tuple[list[dict[str, Any]], JobReport]:
        """In the order of the records."""
        report, chosen = JobReport(), list[Record]()
        for record in records:
            if record.error is None and self._worker.key(record) in self._finished:
                report.skipped += 1
            else:
                chosen.append(record)
        lines = list(self._pool.map(self._line, chosen))
        report.done = sum("key" in line for line in lines)
        report.failed = len(lines) - report.done
        return lines, report

    def _line(self, record: Record) -> dict[str, Any]:
        try:
            return self._worker.line(record)
        except MotetError:
            raise
        except Exception:  # a fault of ours at one record does not end the others
            log.exception("record '%s' could not be answered", record.id)
            return self._worker.failed(record)

    def close(self) -> None:
        self._pool.shutdown()
        self._worker.close()
        self._engine.close()


@contextmanager
def open_lines(work: Work, bundle: Path, config: EngineConfig, finished: set[str]) -> Iterator[Lines]:
    lines = Lines(work, bundle, config, finished)
    try:
        yield lines
    finally:
        lines.close()


def run(
    work: Work, bundle: Path, config: EngineConfig, in_path: Path, parts: Parts, on_progress: OnProgress | None = None
) -> JobReport:
    """Answer every record of a folder or JSONL file into `parts`, in this process. A run that was ended goes on: finished
    records are kept, failed ones are tried again. Raises `OSError` if the input cannot be read, and what `Engine.from_bundle`,
    `Work.open` and `Parts` raise."""
    check_places(str(in_path), parts.out)
    report, tell = JobReport(), on_progress or _nothing
    total = count_records(in_path)
    tell(0, total)
    with open_lines(work, bundle, config, parts.keep_finished()) as lines:
        for number, records in enumerate(_pieces(read_records(in_path, with_requests=work.with_requests), lines.piece)):
            found, counts = lines.of(records)
            if found:
                parts.write(f"{uuid.uuid4().hex[:8]}-{number:06}", found)
            report.add(counts)
            tell(report.done + report.failed + report.skipped, total)
    return report


def _pieces(records: Iterator[Record], size: int) -> Iterator[Sequence[Record]]:
    while piece := list(islice(records, size)):
        yield piece


def _nothing(_ended: int, _total: int) -> None: ...
