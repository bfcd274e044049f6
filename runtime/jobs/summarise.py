"""Offline summarisation: JSONL or a folder of text files in, JSONL out, through the same engine as the server.

A document that is too long is cut into chunks. Each is summarised, and groups of summaries are summarised again until
one is left. Records are written whole, in the order in which they are finished. A rerun keeps finished records (same
id, text and settings), and tries failed ones again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock, Semaphore
from typing import Any, TextIO

from ..api.config import EngineConfig
from ..api.output import Completion
from ..api.request import Ensemble, Request
from ..api.sampling import SamplingParams
from ..engine.consensus import draft_requests, most_agreed
from ..engine.engine import Engine
from ..errors import ConfigError, MotetError, NotFoundError, UnavailableError
from ..text.documents import split_document
from ..text.summary import SummariseParams, joined, summary_prompt
from .records import Record, check_output, count_records, keep_finished, read_records

_WINDOW = 8  # most chunks of one document in flight

OnProgress = Callable[[int, int], None]  # (records ended, all records)


@dataclass(slots=True)
class SummariseReport:
    """Counts of records (done, skipped, failed) and tokens, and wall-clock seconds."""

    done: int = 0
    skipped: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


class Summariser:
    """Summarises texts on an engine. `line` may be called from `concurrency` threads at once.

    Raises `ConfigError` (see `SummariseParams.fitted`), and what a request with these settings would.
    """

    def __init__(self, engine: Engine, ensemble: Ensemble | None = None, params: SummariseParams | None = None) -> None:
        self.engine = engine
        self.ensemble = ensemble or engine.model.default_ensemble
        self.params = params = (params or SummariseParams()).fitted(engine.tokenizer, engine.model.max_model_len)
        if params.drafts:  # fail early
            sampling = SamplingParams(temperature=params.temperature, seed=params.seed)
            draft_requests(Request("", ((0,),), self.ensemble, sampling, drafts=params.drafts))
        is_own = self.ensemble == engine.model.default_ensemble
        self.has_confidence = engine.model.calibration is not None and is_own and not params.drafts
        if params.abstain_below is not None and engine.model.calibration is None:
            raise ConfigError(f"'{engine.model.name}' is not calibrated (motet calibrate); leave abstain_below out")
        if params.abstain_below is not None and not self.has_confidence:
            raise ConfigError("abstain_below is for the bundle's own mix without drafts; leave it out, or these")
        self.concurrency = _concurrency(params, engine.config)
        self._number = itertools.count()  # of requests

    def line(self, record: Record) -> dict[str, Any]:
        """What a job writes of a record: its summary, or why it has none."""
        base: dict[str, Any] = {"id": record.id, "source": record.source}
        try:
            if record.error is not None:
                raise record.error
            summary, usage = self._reduce(record)
        except MotetError as error:
            return {**base, "error": {"type": type(error).__name__, "message": str(error)}}
        mix = {member.name: member.mix for member in self.ensemble.members}
        line = {**base, "summary": summary.text.strip(), "key": self.key(record), "mix": mix, **usage}
        temperatures = {member.name: member.temperature for member in self.ensemble.members if member.temperature != 1}
        if temperatures:
            line["temperatures"] = temperatures
        line["finish_reason"] = str(summary.finish_reason)
        if summary.answer_confidence is not None:
            line["confidence"] = round(summary.answer_confidence, 4)
        if self.params.abstain_below is not None:
            line["abstained"] = summary.abstained
        return line

    def failed(self, record: Record) -> dict[str, Any]:
        """The line of a record at which the program failed; the log says why."""
        error = {"type": "MotetError", "message": "the program failed at this record; its log has the error"}
        return {"id": record.id, "source": record.source, "error": error}

    def key(self, record: Record) -> str:
        """By it a rerun recognises a finished record: a digest of its id and text, the bundle, ensemble and settings."""
        settings = asdict(self.params) | {"concurrency": None}
        del settings["speculative_tokens"]  # summaries do not depend on it
        settings["calibration"] = repr(self.engine.model.calibration)  # confidences do
        parts = (
            record.id,
            record.text,
            self.engine.model.digest,
            repr(self.ensemble),
            json.dumps(settings, sort_keys=True),
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

    def close(self) -> None:
        """It holds nothing: the engine is the caller's."""

    def _reduce(self, record: Record) -> tuple[Completion, dict[str, int]]:
        """Summarise the chunks of a text, then groups of their summaries, until one summary is left."""
        usage = {"prompt_tokens": 0, "completion_tokens": 0, "chunks": 0}
        assert self.params.chunk_tokens is not None
        texts = split_document(self.engine.tokenizer, record.text, self.params.chunk_tokens)
        while True:
            summaries = self._summarise(texts)
            usage["chunks"] += len(texts)
            for summary in summaries:
                assert summary.usage is not None
                usage["prompt_tokens"] += summary.usage.prompt_tokens
                usage["completion_tokens"] += summary.usage.completion_tokens
            told = [summary for summary in summaries if summary.text.strip()] or summaries[:1]
            if len(told) == 1:
                return told[0], usage
            texts = joined(self.engine.tokenizer, self.params, [summary.text.strip() for summary in told])

    def _summarise(self, texts: list[str]) -> list[Completion]:
        each = self.concurrency * max(1, self.params.drafts)
        window = max(1, min(_WINDOW, self.engine.config.max_waiting // each))
        summaries: list[Completion] = []
        for start in range(0, len(texts), window):
            requests = [self._request(text) for text in texts[start : start + window]]
            groups = [draft_requests(request) if request.drafts else [request] for request in requests]
            found = iter([choices[0] for choices in self.engine.complete([r for group in groups for r in group])])
            for group in groups:
                drafts = [next(found) for _ in group]
                summaries.append(drafts[most_agreed(drafts)])
        return summaries

    def _request(self, text: str) -> Request:
        params = self.params
        sampling = SamplingParams(
            max_tokens=params.max_summary_tokens,
            temperature=params.temperature,
            repetition_penalty=params.repetition_penalty,
            seed=params.seed,
            speculative_tokens=params.speculative_tokens,
        )
        prompt = summary_prompt(self.engine.tokenizer, params.instruction, text)
        return Request(
            str(next(self._number)),
            (prompt,),
            self.ensemble,
            sampling,
            return_confidence=self.has_confidence,
            abstain_below=params.abstain_below,
            drafts=params.drafts,
        )


def _concurrency(params: SummariseParams, config: EngineConfig) -> int:
    """Records at once. Raises `ConfigError` if more are asked for than may wait."""
    concurrency = params.concurrency or min(config.max_num_seqs, config.max_waiting)
    if params.drafts and concurrency * params.drafts > config.max_waiting:
        if params.concurrency:
            raise ConfigError(
                f"concurrency times drafts must be at most max_waiting ({config.max_waiting}), got {concurrency} and "
                f"{params.drafts}"
            )
        concurrency = max(1, config.max_waiting // params.drafts)
    if concurrency > config.max_waiting:
        raise ConfigError(f"concurrency must be at most max_waiting ({config.max_waiting}), got {concurrency}")
    return concurrency


@dataclass(slots=True)
class _Job:
    """A running job, shared by its worker threads. `lock` guards `output` and `report`."""

    summariser: Summariser
    output: TextIO
    report: SummariseReport = field(default_factory=SummariseReport)
    lock: Lock = field(default_factory=Lock)


class _Progress:
    """Counts ended records and reports the count, one call at a time."""

    def __init__(self, total: int, report: OnProgress | None) -> None:
        self._ended = 0
        self._total = total
        self._report = report or (lambda ended, total: None)
        self._lock = Lock()
        self._report(0, total)

    def advance(self) -> None:
        with self._lock:
            self._ended += 1
            self._report(self._ended, self._total)


def summarise(
    engine: Engine,
    in_path: Path,
    out_path: Path,
    *,
    ensemble: Ensemble | None = None,
    params: SummariseParams | None = None,
    on_progress: OnProgress | None = None,
) -> SummariseReport:
    """Summarise every record of `in_path` into `out_path`.

    In: JSONL records {"id" (optional), "text"}, or a folder with .txt, .md, .rst and .py files, in UTF-8. Out: {"id",
    "source", "summary", "key", "mix", "prompt_tokens", "completion_tokens", "chunks", "finish_reason"}, or {"id",
    "source", "error": {"type", "message"}} for a record that failed; the job goes on. Where members' temperatures are not 1,
    "temperatures" has them by name. If the bundle is calibrated, and it
    answers with its own mix and without drafts, a record has "confidence" too, of the last summary, and with
    `abstain_below` "abstained". `on_progress` is called before
    the first record and after each, one call at a time, from any thread.

    Before any work, raises `NotFoundError`, `InvalidRequestError` (the output is the input, a folder, or a file that
    no job has written), `ConfigError` (see `SummariseParams.fitted`) or `UnavailableError` (a file cannot be read or
    written); later the latter, if the disk is full.
    """
    if not in_path.exists():
        raise NotFoundError(f"there is no file or folder '{in_path}'")
    check_output(in_path, out_path)
    summariser = Summariser(engine, ensemble, params)
    started = time.monotonic()
    try:
        total = count_records(in_path)
        finished = keep_finished(out_path)
        with out_path.open("a", encoding="utf-8") as output:
            job = _Job(summariser, output)
            _run(job, read_records(in_path), finished, _Progress(total, on_progress))
    except OSError as error:
        raise UnavailableError(f"the job cannot read its input or write '{out_path}': {error}") from error
    job.report.seconds = time.monotonic() - started
    return job.report


def _run(job: _Job, records: Iterator[Record], finished: set[str], progress: _Progress) -> None:
    """Keep a bounded number of records in flight, so that a large input is never wholly in memory."""
    room = Semaphore(2 * job.summariser.concurrency)
    futures: set[Future[None]] = set()

    def done(future: Future[None]) -> None:
        room.release()
        progress.advance()

    with ThreadPoolExecutor(job.summariser.concurrency) as pool:
        for record in records:
            if record.error is None and job.summariser.key(record) in finished:
                job.report.skipped += 1
                progress.advance()
                continue
            room.acquire()
            futures = {future for future in futures if not future.done() or future.exception() is not None}
            future = pool.submit(_summarise_record, job, record)
            future.add_done_callback(done)
            futures.add(future)
    for future in futures:
        future.result()  # raises: a full disk or a bug ends the job


def _summarise_record(job: _Job, record: Record) -> None:
    line = job.summariser.line(record)
    with job.lock:
        if "error" in line:
            job.report.failed += 1
        else:
            job.report.done += 1
            job.report.prompt_tokens += line["prompt_tokens"]
            job.report.completion_tokens += line["completion_tokens"]
        job.output.write(json.dumps(line, ensure_ascii=False) + "\n")
        job.output.flush()
