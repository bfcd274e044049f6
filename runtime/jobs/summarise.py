"""Offline summarisation: JSONL or a folder of text files in, JSONL out, through the same engine as the server.

A document that is too long is cut into chunks. Each is summarised, and groups of summaries are summarised again until
one is left. Records are written whole, in the order in which they are finished. A rerun keeps finished records (same
id, text and settings), and tries failed ones again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock, Semaphore
from typing import Any, TextIO

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


@dataclass(slots=True)
class _Job:
    """A running job, shared by its worker threads. `lock` guards `output` and `report`."""

    engine: Engine
    ensemble: Ensemble
    params: SummariseParams  # fitted
    output: TextIO
    concurrency: int
    confidence: bool  # whether summaries have one
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
    "source", "error": {"type", "message"}} for a record that failed; the job goes on. If the bundle is calibrated, and it
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
    params = (params or SummariseParams()).fitted(engine.tokenizer, engine.model.max_model_len)
    if params.drafts:  # fail early
        sampling = SamplingParams(temperature=params.temperature, seed=params.seed)
        draft_requests(Request("", ((0,),), ensemble or engine.model.default_ensemble, sampling, drafts=params.drafts))
    is_own = ensemble is None or ensemble == engine.model.default_ensemble
    confidence = engine.model.calibration is not None and is_own and not params.drafts
    if params.abstain_below is not None and engine.model.calibration is None:
        raise ConfigError(f"'{engine.model.name}' is not calibrated (motet calibrate); leave abstain_below out")
    if params.abstain_below is not None and not confidence:
        raise ConfigError("abstain_below is for the bundle's own mix without drafts; leave it out, or these")
    concurrency = params.concurrency or min(engine.config.max_num_seqs, engine.config.max_waiting)
    if params.drafts and concurrency * params.drafts > engine.config.max_waiting:
        if params.concurrency:
            raise ConfigError(
                f"concurrency times drafts must be at most max_waiting ({engine.config.max_waiting}), got {concurrency} and "
                f"{params.drafts}"
            )
        concurrency = max(1, engine.config.max_waiting // params.drafts)
    if concurrency > engine.config.max_waiting:
        raise ConfigError(f"concurrency must be at most max_waiting ({engine.config.max_waiting}), got {concurrency}")
    started = time.monotonic()
    try:
        total = count_records(in_path)
        finished = keep_finished(out_path)
        with out_path.open("a", encoding="utf-8") as output:
            mix = ensemble or engine.model.default_ensemble
            job = _Job(engine, mix, params, output, concurrency, confidence)
            _run(job, read_records(in_path), finished, _Progress(total, on_progress))
    except OSError as error:
        raise UnavailableError(f"the job cannot read its input or write '{out_path}': {error}") from error
    job.report.seconds = time.monotonic() - started
    return job.report


def _run(job: _Job, records: Iterator[Record], finished: set[str], progress: _Progress) -> None:
    """Keep a bounded number of records in flight, so that a large input is never wholly in memory."""
    room = Semaphore(2 * job.concurrency)
    futures: set[Future[None]] = set()

    def done(future: Future[None]) -> None:
        room.release()
        progress.advance()

    with ThreadPoolExecutor(job.concurrency) as pool:
        for record in records:
            if record.error is None and _key(job, record) in finished:
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
    base: dict[str, Any] = {"id": record.id, "source": record.source}
    try:
        if record.error is not None:
            raise record.error
        summary, usage = _reduce(job, record)
    except MotetError as error:
        line = {**base, "error": {"type": type(error).__name__, "message": str(error)}}
        with job.lock:
            job.report.failed += 1
            _write(job, line)
        return
    line = {**base, "summary": summary.text.strip(), "key": _key(job, record), "mix": _mix(job.ensemble), **usage}
    line["finish_reason"] = str(summary.finish_reason)
    if summary.answer_confidence is not None:
        line["confidence"] = round(summary.answer_confidence, 4)
    if job.params.abstain_below is not None:
        line["abstained"] = summary.abstained
    with job.lock:
        job.report.done += 1
        job.report.prompt_tokens += usage["prompt_tokens"]
        job.report.completion_tokens += usage["completion_tokens"]
        _write(job, line)


def _reduce(job: _Job, record: Record) -> tuple[Completion, dict[str, int]]:
    """Summarise the chunks of a text, then groups of their summaries, until one summary is left."""
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "chunks": 0}
    assert job.params.chunk_tokens is not None
    texts = split_document(job.engine.tokenizer, record.text, job.params.chunk_tokens)
    while True:
        summaries = _summarise_texts(job, record, texts)
        usage["chunks"] += len(texts)
        for summary in summaries:
            assert summary.usage is not None
            usage["prompt_tokens"] += summary.usage.prompt_tokens
            usage["completion_tokens"] += summary.usage.completion_tokens
        told = [summary for summary in summaries if summary.text.strip()] or summaries[:1]
        if len(told) == 1:
            return told[0], usage
        texts = joined(job.engine.tokenizer, job.params, [summary.text.strip() for summary in told])


def _summarise_texts(job: _Job, record: Record, texts: list[str]) -> list[Completion]:
    each = job.concurrency * max(1, job.params.drafts)
    window = max(1, min(_WINDOW, job.engine.config.max_waiting // each))
    summaries: list[Completion] = []
    for start in range(0, len(texts), window):
        requests = [_request(job, record, text, start + i) for i, text in enumerate(texts[start : start + window])]
        groups = [draft_requests(request) if request.drafts else [request] for request in requests]
        found = iter([choices[0] for choices in job.engine.complete([r for group in groups for r in group])])
        for group in groups:
            drafts = [next(found) for _ in group]
            summaries.append(drafts[most_agreed(drafts)])
    return summaries


def _request(job: _Job, record: Record, text: str, index: int) -> Request:
    params = job.params
    sampling = SamplingParams(
        max_tokens=params.max_summary_tokens,
        temperature=params.temperature,
        repetition_penalty=params.repetition_penalty,
        seed=params.seed,
        speculative_tokens=params.speculative_tokens,
    )
    prompt = summary_prompt(job.engine.tokenizer, params.instruction, text)
    return Request(
        f"{record.number}/{index}",
        (prompt,),
        job.ensemble,
        sampling,
        return_confidence=job.confidence,
        abstain_below=params.abstain_below,
        drafts=params.drafts,
    )


def _write(job: _Job, line: dict[str, Any]) -> None:
    job.output.write(json.dumps(line, ensure_ascii=False) + "\n")
    job.output.flush()


def _mix(ensemble: Ensemble) -> dict[str, float]:
    return {member.name: member.mix for member in ensemble.members}


def _key(job: _Job, record: Record) -> str:
    """The key by which a rerun recognises a finished record: a digest of its id and text, the bundle, ensemble and
    settings."""
    settings = asdict(job.params) | {"concurrency": None}
    del settings["speculative_tokens"]  # summaries do not depend on it
    settings["calibration"] = repr(job.engine.model.calibration)  # confidences do
    parts = (record.id, record.text, job.engine.model.digest, repr(job.ensemble), json.dumps(settings, sort_keys=True))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
