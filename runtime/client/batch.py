"""`BatchClient`: batch jobs of a server over gRPC."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc

from ...proto import batch_pb2, batch_pb2_grpc
from ..errors import DataError, shown
from ..serve.grpc.statuses import error_of
from .connection import Connection

_PIECE_BYTES = 256 * 2**10  # of records in a message
_STATES = {
    batch_pb2.QUEUED: "queued",
    batch_pb2.RUNNING: "running",
    batch_pb2.DONE: "done",
    batch_pb2.JOB_CANCELLED: "cancelled",
}


@dataclass(frozen=True, slots=True)
class JobInfo:
    """`state`: queued, running, done or cancelled. Times are in seconds since 1970."""

    id: str
    endpoint: str
    state: str
    total: int
    done: int
    failed: int
    created: float
    ended: float | None
    metadata: Mapping[str, str]

    @property
    def has_ended(self) -> bool:
        return self.state in ("done", "cancelled")


@dataclass(frozen=True, slots=True)
class RecordResult:
    """`status` is HTTP's: below 400 `response` is an answer, else an error. `number`: in the order of the results."""

    id: str
    number: int
    status: int
    response: dict[str, Any]


class BatchClient:
    """Raises the errors of the server, and `UnavailableError` if there is no answer from it.

    >>> with BatchClient("127.0.0.1:50051") as client:
    ...     job = client.submit("/v1/summarise", [("a", {"text": "…"})])
    ...     for job, results in client.watch(job.id): ...
    """

    def __init__(self, address: str | Connection = "127.0.0.1:50051") -> None:
        connection = Connection(address) if isinstance(address, str) else address
        self._channel, self._metadata = connection.channel(), connection.metadata
        self._batch = batch_pb2_grpc.BatchStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> BatchClient:
        return self

    def __exit__(self, _t: type[BaseException] | None, _e: BaseException | None, _tb: TracebackType | None) -> None:
        self._channel.close()

    def submit(
        self,
        endpoint: str,
        records: Iterable[tuple[str, Mapping[str, Any] | str]],
        *,
        defaults: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> JobInfo:
        """Records are (id, body of a request, or its text) pairs; they are sent as they are read, so any number fits.
        `defaults`: fields of every request that does not have them. An exception of `records` cancels the submission."""
        settings = batch_pb2.JobSettings(
            endpoint=endpoint, defaults=json.dumps(dict(defaults)) if defaults else "", metadata=dict(metadata or {})
        )
        failed: list[BaseException] = []

        def messages() -> Iterator[batch_pb2.SubmitRequest]:
            yield batch_pb2.SubmitRequest(settings=settings)
            try:
                yield from _pieces(records)
                yield batch_pb2.SubmitRequest(is_last=True)
            except BaseException as error:
                failed.append(error)
                raise

        try:
            return _job(self._batch.Submit(messages(), metadata=self._metadata))
        except grpc.RpcError as error:
            if failed:
                raise failed[0] from None
            raise error_of(error) from error

    def get(self, job_id: str) -> JobInfo:
        return _job(self._call(self._batch.Get, batch_pb2.JobRequest(job_id=job_id)))

    def jobs(self, limit: int = 100, after: str = "") -> list[JobInfo]:
        """Of the caller's tenant, the newest first; `after`: those older than this one."""
        found = self._call(self._batch.List, batch_pb2.ListRequest(limit=limit, after=after))
        return list(map(_job, found.jobs))

    def watch(self, job_id: str, after: int = 0) -> Iterator[tuple[JobInfo, list[RecordResult]]]:
        """The job and its new results, as they come to be, until it has ended. `after`: the number of a result to go on from."""
        for message in self._stream(self._batch.Watch, job_id, after):
            yield _job(message.job), list(map(_result, message.results))

    def results(self, job_id: str, after: int = 0) -> Iterator[RecordResult]:
        """The results that there are."""
        yield from map(_result, self._stream(self._batch.Results, job_id, after))

    def cancel(self, job_id: str) -> JobInfo:
        """End a job; the results that it has stay."""
        return _job(self._call(self._batch.Cancel, batch_pb2.JobRequest(job_id=job_id)))

    def delete(self, job_id: str) -> None:
        """Remove a job with its records and results."""
        self._call(self._batch.Delete, batch_pb2.JobRequest(job_id=job_id))

    def _call(self, method: Any, message: Any) -> Any:
        try:
            return method(message, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from error

    def _stream(self, method: Any, job_id: str, after: int) -> Iterator[Any]:
        call = method(batch_pb2.ResultsRequest(job_id=job_id, after=after), metadata=self._metadata)
        try:
            yield from call
        except grpc.RpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()


def _pieces(records: Iterable[tuple[str, Mapping[str, Any] | str]]) -> Iterator[batch_pb2.SubmitRequest]:
    piece, size = batch_pb2.SubmitRequest(), 0
    for id, task in records:
        if not isinstance(id, str):
            raise DataError(f"the id of a record must be a string, got {shown(id)}")
        try:
            record = batch_pb2.Record(id=id)
            if isinstance(task, str):
                record.text = task
            else:
                record.request = json.dumps(task, ensure_ascii=False)
        except UnicodeEncodeError:
            raise DataError(f"record {id!a} holds half of a character (a lone surrogate)") from None
        size += record.ByteSize()
        if size > _PIECE_BYTES and piece.records:
            yield piece
            piece, size = batch_pb2.SubmitRequest(), record.ByteSize()
        piece.records.append(record)
    if piece.records:
        yield piece


def _job(message: batch_pb2.Job) -> JobInfo:
    return JobInfo(
        message.id,
        message.endpoint,
        _STATES.get(message.state, "unknown"),
        message.total,
        message.done,
        message.failed,
        message.created,
        message.ended or None,
        dict(message.metadata),
    )


def _result(message: batch_pb2.RecordResult) -> RecordResult:
    return RecordResult(message.id, message.number, message.status, json.loads(message.response))
