"""The `Batch` service of `motet.v1`, over `Jobs`."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from ....proto import batch_pb2, batch_pb2_grpc
from ...api.limits import MAX_WATCHERS
from ...api.rules import Integer
from ...errors import InvalidRequestError, OverloadedError, UnimplementedError
from ..batch.runner import Jobs, as_request
from ..batch.store import Job, JobState, Result
from ..calls import Caller
from ..service import Service
from .gate import caller_of

Context = Any  # grpc.aio.ServicerContext: grpc ships no types
_STATES = {
    JobState.QUEUED: batch_pb2.QUEUED,
    JobState.RUNNING: batch_pb2.RUNNING,
    JobState.DONE: batch_pb2.DONE,
    JobState.CANCELLED: batch_pb2.JOB_CANCELLED,
}
_NEXT_S = 60.0  # for the next message of a submission
_PAGE = 64  # results that are read at once
_LIMIT = Integer(0, 1000)
_AFTER = Integer(0, 2**63 - 1)


class BatchJobs(batch_pb2_grpc.BatchServicer):
    """`jobs` None: the server keeps none, and every call is refused."""

    def __init__(self, service: Service, jobs: Jobs | None) -> None:
        self._service, self._given = service, jobs
        self._watchers: Counter[str] = Counter()  # by tenant

    @property
    def _jobs(self) -> Jobs:
        if self._given is None:
            raise UnimplementedError("this server keeps no batch jobs; start it with --state-dir")
        return self._given

    async def Submit(self, messages: AsyncIterator[batch_pb2.SubmitRequest], context: Context) -> batch_pb2.Job:
        jobs = self._jobs
        rest = _in_time(messages)
        first = await anext(rest, None)
        if first is None or not first.HasField("settings"):
            raise InvalidRequestError("the first message of a submission has the settings of the job", field="settings")
        settings = first.settings

        async def pieces() -> AsyncIterator[list[tuple[str, bytes]]]:
            yield [_record(record, settings.endpoint) for record in first.records]
            is_whole = first.is_last
            async for message in rest:
                if is_whole or message.HasField("settings"):
                    raise InvalidRequestError(
                        "the first message alone has settings, and none comes after the last", field="settings"
                    )
                yield [_record(record, settings.endpoint) for record in message.records]
                is_whole = message.is_last
            if not is_whole:  # a client that breaks off looks like one that has ended
                raise InvalidRequestError(
                    "the submission was cut: its last message must say is_last; nothing of it is kept", field="is_last"
                )

        job = await jobs.submit(
            settings.endpoint,
            pieces(),
            caller_of(context),
            defaults=_defaults(settings.defaults),
            metadata=dict(settings.metadata),
        )
        return job_to_proto(job)

    async def Get(self, message: batch_pb2.JobRequest, context: Context) -> batch_pb2.Job:
        return job_to_proto(await self._jobs.job(message.job_id, caller_of(context)))

    async def List(self, message: batch_pb2.ListRequest, context: Context) -> batch_pb2.ListResponse:
        limit = _LIMIT.check("limit", message.limit) or 100
        found = await self._jobs.jobs(caller_of(context), limit, message.after)
        return batch_pb2.ListResponse(jobs=map(job_to_proto, found))

    async def Watch(
        self, message: batch_pb2.ResultsRequest, context: Context
    ) -> AsyncIterator[batch_pb2.WatchResponse]:
        jobs, caller = self._jobs, caller_of(context)
        tenant = caller.identity.tenant
        if self._watchers.total() >= MAX_WATCHERS or self._watchers[tenant] >= MAX_WATCHERS // 2:
            raise OverloadedError(f"{MAX_WATCHERS} clients watch jobs already; ask with Get, or try again later")
        self._watchers[tenant] += 1
        try:
            async with aclosing(self._watch(message, jobs, caller)) as responses:
                async for response in responses:
                    yield response
        finally:
            self._watchers[tenant] -= 1

    async def _watch(
        self, message: batch_pb2.ResultsRequest, jobs: Jobs, caller: Caller
    ) -> AsyncGenerator[batch_pb2.WatchResponse, None]:
        after, last = _AFTER.check("after", message.after), None
        while True:
            job = await jobs.job(message.job_id, caller)
            results = await jobs.results(message.job_id, caller, after, _PAGE)
            if results or job != last:
                after, last = max([after, *(result.number for result in results)]), job
                yield batch_pb2.WatchResponse(job=job_to_proto(job), results=map(_result_to_proto, results))
            if results:
                continue  # a page may be short because its results are large
            if job.has_ended:
                return
            await jobs.wait_for_change()

    async def Results(
        self, message: batch_pb2.ResultsRequest, context: Context
    ) -> AsyncIterator[batch_pb2.RecordResult]:
        jobs, caller, after = self._jobs, caller_of(context), _AFTER.check("after", message.after)
        with self._service.place(caller):
            while results := await jobs.results(message.job_id, caller, after, _PAGE):
                for result in results:
                    yield _result_to_proto(result)
                after = results[-1].number

    async def Cancel(self, message: batch_pb2.JobRequest, context: Context) -> batch_pb2.Job:
        return job_to_proto(await self._jobs.cancel(message.job_id, caller_of(context)))

    async def Delete(self, message: batch_pb2.JobRequest, context: Context) -> batch_pb2.DeleteResponse:
        await self._jobs.delete(message.job_id, caller_of(context))
        return batch_pb2.DeleteResponse()


async def _in_time(messages: AsyncIterator[batch_pb2.SubmitRequest]) -> AsyncIterator[batch_pb2.SubmitRequest]:
    while True:
        try:
            yield await asyncio.wait_for(anext(messages), _NEXT_S)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise InvalidRequestError(
                f"no message came within {_NEXT_S:g} seconds; nothing of the job is kept"
            ) from None


def _record(record: batch_pb2.Record, endpoint: str) -> tuple[str, bytes]:
    if record.WhichOneof("task") is None:
        raise InvalidRequestError("a record has a request or a text", field="records")
    if record.HasField("request"):
        return record.id, record.request.encode()
    return record.id, as_request(record.text, endpoint)


def _defaults(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"defaults is not JSON: {error}", field="defaults") from None
    if not isinstance(found, dict):
        raise InvalidRequestError("defaults must be a JSON object", field="defaults")
    return found


def job_to_proto(job: Job) -> batch_pb2.Job:
    return batch_pb2.Job(
        id=job.id,
        endpoint=job.endpoint,
        state=_STATES[job.state],
        total=job.total,
        done=job.done,
        failed=job.failed,
        created=job.created,
        ended=job.ended or 0.0,
        metadata=job.metadata,
    )


def _result_to_proto(result: Result) -> batch_pb2.RecordResult:
    return batch_pb2.RecordResult(
        id=result.id, number=result.number, status=result.status, response=result.response.decode()
    )
