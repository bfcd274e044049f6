"""`/v1/files` and `/v1/batches`: OpenAI's batch API over `Jobs`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

import msgspec
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Send

from ...api.limits import MAX_REQUEST_BYTES
from ...api.rules import Integer
from ...errors import DataError, InvalidRequestError, OverloadedError, UnimplementedError
from ..batch.files import MAX_FILE_BYTES, FileStore, StoredFile
from ..batch.runner import Jobs
from ..batch.store import Job, JobState, Result
from .app import MAX_UPLOADS, Door, Work

T = TypeVar("T")
_STATUS = {
    JobState.QUEUED: "in_progress",
    JobState.RUNNING: "in_progress",
    JobState.DONE: "completed",
    JobState.CANCELLED: "cancelled",
}
_OUTPUT, _ERRORS = "-output", "-errors"  # a job's id with this is the id of a file
_PAGE = 64
_UPLOAD_S = 600.0
_LIMIT = Integer(1, 100)


class BatchRequest(msgspec.Struct, forbid_unknown_fields=True):
    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"] = "24h"  # taken, and nothing promised: a job has what room others leave
    metadata: dict[str, str] | None = None


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    custom_id: str
    url: str
    body: msgspec.Raw
    method: Literal["POST"] = "POST"


# ---- files -----------------------------------------------------------------------------------------------------------


async def upload_file(door: Door, request: Request) -> Response:
    files, tenant = _files(door), _tenant(request)
    announced = request.headers.get("content-length", "")
    if not announced.isdigit() or len(announced) > 12 or int(announced) > MAX_FILE_BYTES + 2**16:
        raise InvalidRequestError(
            f"a file has at most {MAX_FILE_BYTES} bytes, and its length is announced", field="file"
        )
    with _transfer(door, tenant):
        try:
            async with asyncio.timeout(_UPLOAD_S):
                form = await request.form(max_files=1, max_fields=8, max_part_size=2**16)
        except TimeoutError:
            raise InvalidRequestError(f"the file did not come within {_UPLOAD_S:g} seconds", field="file") from None
        except MultiPartException as error:
            raise InvalidRequestError(f"the form cannot be read: {error.message}", field="file") from None
        try:
            unknown = sorted(set(form) - {"file", "purpose"})
            file = form.get("file")
            if unknown or not isinstance(file, UploadFile) or form.get("purpose") != "batch":
                raise InvalidRequestError("a file is a form with `file` and `purpose`, which is batch", field="purpose")
            kept = file.file
            return JSONResponse(_file(await _thread(lambda: files.add(tenant, file.filename or "", kept))))
        finally:
            await form.close()


@contextmanager
def _transfer(door: Door, tenant: str) -> Iterator[None]:
    """One of few at once: each holds much of a file. Raises `OverloadedError`."""
    if door.uploads.total() >= MAX_UPLOADS or door.uploads[tenant] >= max(1, MAX_UPLOADS // 2):
        raise OverloadedError("too many files are being sent to this server; try again later")
    door.uploads[tenant] += 1
    try:
        yield
    finally:
        door.uploads[tenant] -= 1


async def list_files(door: Door, request: Request) -> Response:
    found = await _thread(lambda: _files(door).files(_tenant(request)))
    return JSONResponse({"object": "list", "data": list(map(_file, found)), "has_more": False})


async def get_file(door: Door, request: Request) -> Response:
    id = request.path_params["id"]
    if (job := await _job_of(door, request, id)) is not None:
        return JSONResponse(_file(StoredFile(id, job.tenant, f"{id}.jsonl", 0, job.created), "batch_output"))
    return JSONResponse(_file(await _thread(lambda: _files(door).get(id, _tenant(request)))))


async def delete_file(door: Door, request: Request) -> Response:
    """Of the output or the errors of a batch that has ended: the batch goes with them."""
    id = request.path_params["id"]
    if (job := await _job_of(door, request, id)) is not None:
        if not job.has_ended:
            raise InvalidRequestError("the batch has not ended; cancel it first", field="id")
        await _jobs(door).delete(job.id, door.caller(request))
        return JSONResponse({"id": id, "object": "file", "deleted": True})
    await _thread(lambda: _files(door).delete(id, _tenant(request)))
    return JSONResponse({"id": id, "object": "file", "deleted": True})


async def file_content(door: Door, request: Request) -> Response:
    id, tenant = request.path_params["id"], _tenant(request)
    job = await _job_of(door, request, id)
    if job is None:
        await _thread(lambda: _files(door).get(id, tenant))

    async def run(send: Send) -> None:
        headers = [(b"content-type", b"application/octet-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        pieces = _pieces(_files(door).content(id, tenant)) if job is None else _results(door, request, job, id)
        async for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return Work(run)


async def _pieces(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    while piece := await _thread(lambda: next(pieces, b"")):
        yield piece


async def _results(door: Door, request: Request, job: Job, id: str) -> AsyncIterator[bytes]:
    """The lines of an output or error file."""
    jobs, after, wants_errors = _jobs(door), 0, id.endswith(_ERRORS)
    while results := await jobs.results(job.id, door.caller(request), after, _PAGE):
        after = results[-1].number
        yield b"".join(_line(job, result) for result in results if (result.status >= 400) == wants_errors)


def _line(job: Job, result: Result) -> bytes:
    request_id = f"{job.id}-{result.number}"
    body = msgspec.Raw(result.response)
    response = {"status_code": result.status, "request_id": request_id, "body": body}
    line = {"id": request_id, "custom_id": result.id, "response": response, "error": None}
    return msgspec.json.encode(line) + b"\n"


async def _job_of(door: Door, request: Request, id: str) -> Job | None:
    """The job whose output or errors a file is."""
    for ending in (_OUTPUT, _ERRORS):
        if id.endswith(ending):
            return await _jobs(door).job(id.removesuffix(ending), door.caller(request))
    return None


def _file(file: StoredFile, purpose: str = "batch") -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size,
        "created_at": int(file.created),
        "filename": file.name,
        "purpose": purpose,
        "status": "processed",
    }


# ---- batches ---------------------------------------------------------------------------------------------------------


async def create_batch(door: Door, request: Request) -> Response:
    fields = await door.body(request, BatchRequest, "submit")
    caller = door.caller(request)
    await _thread(lambda: _files(door).get(fields.input_file_id, caller.identity.tenant))
    lines = _files(door).lines(fields.input_file_id, caller.identity.tenant)

    async def records() -> AsyncIterator[list[tuple[str, bytes]]]:
        number = 0
        while piece := await _thread(lambda: _piece(lines)):
            yield await _thread(partial(_records, piece, number, fields.endpoint))
            number += len(piece)

    metadata = {**(fields.metadata or {}), "input_file_id": fields.input_file_id}
    with _transfer(door, caller.identity.tenant):
        job = await _jobs(door).submit(fields.endpoint, records(), caller, metadata=metadata)
    return JSONResponse(_batch(job))


def _piece(lines: Iterator[bytes]) -> list[bytes]:
    """The next lines: some, and together not much more than a message."""
    found, size = list[bytes](), 0
    for line in lines:
        found.append(line)
        size += len(line)
        if len(found) == _PAGE or size > MAX_REQUEST_BYTES:
            break
    return found


def _records(lines: list[bytes], number: int, endpoint: str) -> list[tuple[str, bytes]]:
    """`number`: of lines before these."""
    return [_record(line, number + at, endpoint) for at, line in enumerate(lines, 1) if line.strip()]


def _record(line: bytes, number: int, endpoint: str) -> tuple[str, bytes]:
    try:
        found = msgspec.json.decode(line, type=_Line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"line {number} of the file is no request of a batch: {error}") from None
    if found.url != endpoint:
        raise DataError(f"line {number} of the file is for {found.url[:80]}, and the batch for {endpoint}")
    return found.custom_id, bytes(found.body)


async def list_batches(door: Door, request: Request) -> Response:
    text, after = request.query_params.get("limit", "20"), request.query_params.get("after", "")
    limit = _LIMIT.check("limit", int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text)
    found = await _jobs(door).jobs(door.caller(request), limit, after)
    data = list(map(_batch, found))
    ids = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return JSONResponse({"object": "list", "data": data, "has_more": len(data) == limit, **ids})


async def get_batch(door: Door, request: Request) -> Response:
    return JSONResponse(_batch(await _jobs(door).job(request.path_params["id"], door.caller(request))))


async def cancel_batch(door: Door, request: Request) -> Response:
    return JSONResponse(_batch(await _jobs(door).cancel(request.path_params["id"], door.caller(request))))


def _batch(job: Job) -> dict[str, Any]:
    metadata = dict(job.metadata)
    ended = None if job.ended is None else int(job.ended)
    return {
        "id": job.id,
        "object": "batch",
        "endpoint": job.endpoint,
        "input_file_id": metadata.pop("input_file_id", ""),
        "completion_window": "24h",
        "status": _STATUS[job.state],
        "output_file_id": f"{job.id}{_OUTPUT}" if job.done else None,
        "error_file_id": f"{job.id}{_ERRORS}" if job.failed else None,
        "errors": None,
        "created_at": int(job.created),
        "in_progress_at": int(job.created),
        "completed_at": ended if job.state is JobState.DONE else None,
        "cancelled_at": ended if job.state is JobState.CANCELLED else None,
        "request_counts": {"total": job.total, "completed": job.done, "failed": job.failed},
        "metadata": metadata,
    }


def _tenant(request: Request) -> str:
    return Door.caller(request).identity.tenant


def _jobs(door: Door) -> Jobs:
    if door.jobs is None:
        raise UnimplementedError("this server keeps no batch jobs; start it with --state-dir")
    return door.jobs


def _files(door: Door) -> FileStore:
    return _jobs(door).files


async def _thread(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(None, work)
