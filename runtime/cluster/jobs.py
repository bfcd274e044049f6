"""Jobs over a Ray cluster: Ray Data reads the records, actors with an engine each answer them, and the parts are written where
they are made. A killed actor, task or node loses nothing and doubles nothing: its records are answered again, and a part has the
name of its task."""

from __future__ import annotations

import hashlib
import io
import json
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, Datasink
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import FileBasedDatasource, WriteResult

from .. import errors
from ..api.config import EngineConfig
from ..errors import MotetError, NotFoundError, UnavailableError
from ..jobs.parts import Format, Parts, check_places
from ..jobs.records import TEXT_FILES, Record, file_record, line_record, text_record
from ..jobs.work import JobReport, Lines, Work
from .connection import connect

InputFormat = Literal["jsonl", "parquet", "text"]
_PIECE = 64  # records that an actor takes at once: enough to keep its engine busy, and few to do again
_OURS = re.compile(r"motet\.runtime\.errors\.(\w+): (.*)")
_IO_CPUS = 0.25  # of a task that reads or writes: beside actors that have all cores
_HALF = 2  # pieces that an actor has at once: the second fills the places that the first no longer needs


@contextmanager
def cluster(address: str, cpus: int) -> Iterator[None]:
    """A connection to a cluster (see `connect`)."""
    connect(address, cpus)
    try:
        yield
    finally:
        ray.shutdown()


def format_of(source: str) -> InputFormat:
    """By the name: .jsonl, .parquet, else a folder of texts."""
    ending = source.rstrip("/").rpartition(".")[2]
    return "jsonl" if ending in ("jsonl", "json") else "parquet" if ending == "parquet" else "text"


def run(
    work: Work,
    bundle: Path,
    config: EngineConfig,
    source: str,
    out: str,
    *,
    actors: int,
    out_format: Format = "jsonl",
) -> JobReport:
    """Answer every record of `source` into parts in `out`, with `actors` engines of `config.threads` threads each.

    `source` and `out` are paths that every node has, or URIs of an object store. JSONL and Parquet have the columns `id` and
    `text`, JSONL may have OpenAI's requests; of a folder each text file is a record. A record without an id gets a digest of its
    content, because lines have no numbers here. Call it inside of `cluster`. Finished records of an earlier run are kept.

    Raises `NotFoundError`, `UnavailableError`, and the `MotetError` that an actor ended with.
    """
    check_places(source, out)
    rows = _read(source)
    finished = ray.put(Parts(out, out_format).keep_finished())
    threads = config.threads or 1
    context = DataContext.get_current()
    context.enable_progress_bars = False
    sink = _Sink(out, out_format, uuid.uuid4().hex[:8])
    try:
        rows.repartition(target_num_rows_per_block=_PIECE).map_batches(
            _Actor,
            fn_constructor_args=(
                work,
                str(bundle.resolve()),
                replace(config, threads=threads),
                finished,
                format_of(source),
            ),
            batch_format="pyarrow",
            batch_size=_PIECE,
            compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2 * _HALF),
            num_cpus=threads,
            ray_remote_args_fn=lambda: {"max_concurrency": _HALF},
        ).write_datasink(sink, ray_remote_args={"num_cpus": _IO_CPUS})
    except ray.exceptions.RayError as error:
        raise _cause(error) from error
    return sink.report


def _read(source: str) -> Dataset:
    """Rows with `path`, and `line`, `text` or `bytes`."""
    kind = format_of(source)
    try:
        if kind == "jsonl":
            lines: Dataset = ray.data.read_datasource(_LineSource(source, include_paths=True), num_cpus=_IO_CPUS)
            return lines
        if kind == "parquet":
            return ray.data.read_parquet(source, include_paths=True, num_cpus=_IO_CPUS)
        endings = [ending[1:] for ending in TEXT_FILES]
        return ray.data.read_binary_files(source, include_paths=True, file_extensions=endings, num_cpus=_IO_CPUS)
    except (FileNotFoundError, ValueError) as error:
        raise NotFoundError(f"'{source}' cannot be read: {error}") from None


class _Actor:
    """An engine, which answers pieces of records. `__call__` may run in several threads."""

    def __init__(
        self, work: Work, bundle: str, config: EngineConfig, finished: ray.ObjectRef[set[str]], format: InputFormat
    ) -> None:
        self._lines = Lines(work, Path(bundle), config, ray.get(finished))
        self._with_requests, self._format = work.with_requests, format

    def __call__(self, rows: pa.Table) -> pa.Table:
        records = [_record(row, self._format, self._with_requests) for row in rows.to_pylist()]
        lines, report = self._lines.of(records)
        texts = [json.dumps(line, ensure_ascii=False) for line in lines]
        counts = [json.dumps([report.done, report.failed, report.skipped])]
        return pa.table({"line": [*texts, *counts], "is_counts": [False] * len(texts) + [True]})


def _record(row: dict[str, Any], format: InputFormat, with_requests: bool) -> Record:
    path = str(row.get("path", ""))
    if format == "text":
        return file_record(0, path, path, row["bytes"])
    if format == "jsonl":
        name = _digest(row["line"])
        return line_record(0, row["line"], f"record {name}", name, path, with_requests=with_requests)
    text = row.get("text")
    given = row.get("id")
    if not isinstance(text, str):
        name = _digest(repr(row).encode())
        return Record(0, name, path, error=MotetError(f"row {name} of '{path}' has no column 'text' of strings"))
    return text_record(0, _digest(text.encode(errors="replace")) if given is None else str(given), path, text)


def _digest(content: bytes) -> str:
    return "text-" + hashlib.sha256(content).hexdigest()[:16]


class _LineSource(FileBasedDatasource):
    """The lines of files, as bytes: Ray's own reader of text cuts at every line end of Unicode, and fails at what is no UTF-8."""

    def _read_stream(self, f: Any, path: str) -> Iterator[Block]:
        lines = (line for line in io.BufferedReader(f) if line.strip())
        while piece := list(islice(lines, 1024)):
            yield pa.table({"line": pa.array([line.rstrip(b"\n") for line in piece], pa.large_binary())})


class _Sink(Datasink[JobReport]):
    """Writes a part for each task."""

    def __init__(self, out: str, format: Format, run: str) -> None:
        self._out, self._format, self._run = out, format, run
        self.report = JobReport()

    def write(self, blocks: Iterable[Block], ctx: Any) -> JobReport:
        report, lines = JobReport(), list[dict[str, Any]]()
        for block in blocks:
            for row in BlockAccessor.for_block(block).to_arrow().to_pylist():
                content = json.loads(row["line"])
                report.add(JobReport(*content)) if row["is_counts"] else lines.append(content)
        if lines:
            Parts(self._out, self._format).write(f"{self._run}-{ctx.task_idx:06}", lines)
        return report

    def on_write_complete(self, write_result: WriteResult[JobReport]) -> None:
        for report in write_result.write_returns:
            self.report.add(report)


def _cause(error: BaseException) -> MotetError:
    """Our error below Ray's, which has it as text."""
    text = str(error).strip()
    found = _OURS.findall(text)
    kind = getattr(errors, found[-1][0], None) if found else None
    if isinstance(kind, type) and issubclass(kind, MotetError):
        return kind(found[-1][1])
    return UnavailableError(f"the job could not go on: {text.splitlines()[-1]}")
