"""Offline summarisation: JSONL or a folder of text files in, JSONL out, through the same engine as the server.

A document that is too long is cut into chunks. Each is summarised, and the joined summaries are summarised again
until one is left. Records are written whole, in the order in which they are finished. A rerun keeps finished records
(same id, text and settings), repeats failed ones, and removes a line that a killed run left incomplete.
"""

from __future__ import annotations

import hashlib
import json
import os
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
from ..engine.engine import Engine
from ..errors import ConfigError, DataError, InvalidRequestError, MotetError, NotFoundError
from ..text.documents import split_document
from ..text.prompt import build_prompt

INSTRUCTION = "Summarise the following text in a few sentences.\n\n"
TEXT_FILES = (".txt", ".md", ".rst", ".py")
_TEMPLATE_TOKENS = 64  # room for the chat template and the instruction
_WINDOW = 8  # most chunks of one document in flight

OnProgress = Callable[[int, int], None]  # (records ended, all records)


@dataclass(frozen=True, slots=True)
class SummariseParams:
    """Settings of a job. Lengths are in tokens. `chunk_tokens` None: as long as the context allows, at most 1,024.
    Raises `ConfigError`."""

    instruction: str = INSTRUCTION
    max_summary_tokens: int = 96
    chunk_tokens: int | None = None
    temperature: float = 0.0
    repetition_penalty: float = 1.05
    seed: int = 0
    speculative_tokens: int = 8  # most per draft; summaries copy from their source. 0: no drafts
    concurrency: int | None = None  # records in flight; None: the engine's max_num_seqs

    def __post_init__(self) -> None:
        for name in ("max_summary_tokens", "chunk_tokens", "concurrency"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")


@dataclass(slots=True)
class SummariseReport:
    """Counts of records (done, skipped, failed) and tokens, and wall-clock seconds."""

    done: int = 0
    skipped: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Record:
    id: str
    source: str
    text: str = ""
    error: MotetError | None = None


@dataclass(slots=True)
class _Job:
    """A running job, shared by its worker threads. `lock` guards `output` and `report`."""

    engine: Engine
    ensemble: Ensemble
    params: SummariseParams
    chunk_tokens: int
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

    In: JSONL records {"id" (optional), "text"}, or a folder with .txt, .md, .rst and .py files. Out: {"id", "source",
    "summary", "key", "mix", "prompt_tokens", "completion_tokens", "chunks", "finish_reason"}, or {"id", "source",
    "error": {"type", "message"}} for a record that failed; the job goes on. `on_progress` is called before the first record
    and after each, one call at a time, from any thread. Before any work, raises `NotFoundError`,
    `InvalidRequestError` (the output is the input or a folder) or `ConfigError`.
    """
    params = params or SummariseParams()
    if not in_path.exists():
        raise NotFoundError(f"there is no file or folder '{in_path}'")
    if out_path.resolve() == in_path.resolve() or out_path.is_dir():
        raise InvalidRequestError(f"the output '{out_path}' must be a file other than the input")
    room = engine.model.max_model_len - params.max_summary_tokens - _TEMPLATE_TOKENS
    chunk_tokens = params.chunk_tokens or min(1024, room)
    if not 2 * params.max_summary_tokens <= chunk_tokens <= room:
        raise ConfigError(
            f"chunk_tokens must be in {2 * params.max_summary_tokens}…{room} (two summaries, the context), got {chunk_tokens}"
        )
    started = time.monotonic()
    finished = _finished_keys(out_path)
    progress = _Progress(_count_records(in_path), on_progress)
    with out_path.open("a", encoding="utf-8") as output:
        job = _Job(engine, ensemble or engine.model.default_ensemble, params, chunk_tokens, output)
        _run(job, _records(in_path), finished, progress)
    job.report.seconds = time.monotonic() - started
    return job.report


def _run(job: _Job, records: Iterator[_Record], finished: set[str], progress: _Progress) -> None:
    """Keep a bounded number of records in flight, so that a large input is never wholly in memory."""
    concurrency = job.params.concurrency or job.engine.config.max_num_seqs
    room = Semaphore(2 * concurrency)
    futures: set[Future[None]] = set()

    def done(future: Future[None]) -> None:
        room.release()
        progress.advance()

    with ThreadPoolExecutor(concurrency) as pool:
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


def _summarise_record(job: _Job, record: _Record) -> None:
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
    with job.lock:
        job.report.done += 1
        job.report.prompt_tokens += usage["prompt_tokens"]
        job.report.completion_tokens += usage["completion_tokens"]
        _write(job, line)


def _reduce(job: _Job, record: _Record) -> tuple[Completion, dict[str, int]]:
    """Summarise the chunks of a text; the joined summaries are the next text, until there is only one chunk."""
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "chunks": 0}
    text = record.text
    while True:
        chunks = split_document(job.engine.tokenizer, text, job.chunk_tokens)
        summaries: list[Completion] = []
        for start in range(0, len(chunks), _WINDOW):
            requests = [
                _request(job, record, chunk, start + i) for i, chunk in enumerate(chunks[start : start + _WINDOW])
            ]
            summaries += [choices[0] for choices in job.engine.complete(requests)]
        usage["chunks"] += len(chunks)
        for summary in summaries:
            assert summary.usage is not None
            usage["prompt_tokens"] += summary.usage.prompt_tokens
            usage["completion_tokens"] += summary.usage.completion_tokens
        if len(summaries) == 1:
            return summaries[0], usage
        text = "\n\n".join(summary.text.strip() for summary in summaries)


def _request(job: _Job, record: _Record, text: str, index: int) -> Request:
    tokenizer, params = job.engine.tokenizer, job.params
    content = params.instruction + text
    prompt = build_prompt(tokenizer, [{"role": "user", "content": content}] if tokenizer.has_chat_template else content)
    sampling = SamplingParams(
        max_tokens=params.max_summary_tokens,
        temperature=params.temperature,
        repetition_penalty=params.repetition_penalty,
        seed=params.seed,
        speculative_tokens=params.speculative_tokens,
    )
    return Request(f"{record.id}/{index}", (prompt,), job.ensemble, sampling)


def _write(job: _Job, line: dict[str, Any]) -> None:
    job.output.write(json.dumps(line, ensure_ascii=False) + "\n")
    job.output.flush()


def _mix(ensemble: Ensemble) -> dict[str, float]:
    return {member.name: member.mix for member in ensemble.members}


def _key(job: _Job, record: _Record) -> str:
    """The key by which a rerun recognises a finished record: a digest of its id and text, the bundle, ensemble and
    settings."""
    settings = asdict(job.params) | {"concurrency": None, "chunk_tokens": job.chunk_tokens}
    del settings["speculative_tokens"]  # summaries do not depend on it
    parts = (record.id, record.text, job.engine.model.digest, repr(job.ensemble), json.dumps(settings, sort_keys=True))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _finished_keys(out_path: Path) -> set[str]:
    """Keys of the finished records of an earlier run. Removes failed records and an incomplete last line from the
    file."""
    if not out_path.exists():
        out_path.parent.mkdir(parents=True, exist_ok=True)
        return set()
    keys, kept = set(), []
    for line in out_path.read_bytes().splitlines(keepends=True):
        try:
            key = json.loads(line)["key"] if line.endswith(b"\n") else None
        except (ValueError, KeyError, TypeError):
            key = None
        if key is not None:
            keys.add(key)
            kept.append(line)
    temporary = out_path.with_name(out_path.name + ".tmp")
    temporary.write_bytes(b"".join(kept))
    os.replace(temporary, out_path)
    return keys


# ---- input -----------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in TEXT_FILES and path.is_file())


def _count_records(in_path: Path) -> int:
    if in_path.is_dir():
        return len(_files(in_path))
    with in_path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _records(in_path: Path) -> Iterator[_Record]:
    if in_path.is_dir():
        for path in _files(in_path):
            name = str(path.relative_to(in_path))
            yield _checked(name, str(path), path.read_bytes())
        return
    with in_path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _jsonl_record(line, number, f"{in_path.name}:{number}")


def _jsonl_record(line: bytes, number: int, source: str) -> _Record:
    name = f"line-{number}"
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _Record(name, source, error=DataError(f"line {number} is not UTF-8 at byte {error.start}"))
    except ValueError as error:
        return _Record(name, source, error=DataError(f"line {number} is not JSON: {error}"))
    if not isinstance(values, dict) or not isinstance(values.get("text"), str):
        return _Record(name, source, error=DataError(f'line {number} must be an object with a "text" string'))
    return _checked(str(values.get("id", name)), source, values["text"].encode())


def _checked(name: str, source: str, data: bytes) -> _Record:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return _Record(name, source, error=DataError(f"'{name}' is not UTF-8 at byte {error.start}"))
    if not text.strip():
        return _Record(name, source, error=DataError(f"the text of '{name}' is empty"))
    return _Record(name, source, text)
