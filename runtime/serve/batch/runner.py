"""`Jobs`: what doors call for batch jobs, and the task that answers their records behind all other requests."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from ...api.limits import MAX_REQUEST_BYTES, MAX_REQUEST_ID_BYTES
from ...api.rules import Text
from ...errors import DataError, InvalidRequestError, MotetError, UnavailableError, shown
from ...trust.identity import Identity, Role
from ..calls import Caller
from ..service import Service
from .files import FileStore
from .store import Job, JobStore, Record, Result

log = logging.getLogger("motet.jobs")
T = TypeVar("T")
Execute = Callable[[str, bytes, Caller], Any]  # path, JSON, caller → awaitable of (HTTP status, JSON)

# Paths of the HTTP API whose requests a record may hold → the field that a text becomes.
ENDPOINTS: Mapping[str, str] = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/v1/responses": "input",
    "/v1/embeddings": "input",
    "/v1/summarise": "text",
    "/v1/classify": "text",
}
_SEEDED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_ID = Text(MAX_REQUEST_ID_BYTES, min_bytes=1)
_POLL_S = 0.25
MAX_DEFAULTS_BYTES = 16 * 2**10
_PIECE = 64  # records that are added at once
_LONGEST_WAIT_S = 30.0  # of a tenant whose quota is spent
_MOST_WAITS = 200  # of a record for room while no other of its tenant runs; then its result says that there was none
_MOST_ATTEMPTS = 3  # of a record that ends with a fault of the server
AGAIN = 429, 503  # no answer, but "later"


class Jobs:
    """Use it on the event loop of its service, between `start` and `stop`. `directory` is the state of the jobs; `execute`
    answers a request of the HTTP API in this process. Raises what `JobStore` raises."""

    def __init__(self, service: Service, directory: Path, execute: Execute) -> None:
        self._service, self._execute = service, execute
        self._store = JobStore(directory)
        self.files = FileStore(directory / "files")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="motet-jobs")
        self._changed = asyncio.Event()
        self._running: dict[asyncio.Task[None], Record] = {}
        self._loop: asyncio.Task[None] | None = None
        self._later: dict[
            str, tuple[float, float]
        ] = {}  # tenant → (when it has its turn again, seconds of the last wait)
        self._most: dict[str, float] = {}  # tenant that was refused → records that it may have running
        self._cleaning: set[asyncio.Task[None]] = set()
        self._is_stopped = False

    # ---- calls of doors ------------------------------------------------------------------------------------------

    async def submit(
        self,
        endpoint: str,
        records: AsyncIterator[list[tuple[str, bytes]]] | Iterable[list[tuple[str, bytes]]],
        caller: Caller,
        *,
        defaults: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Job:
        """Take a job: pieces of (id, JSON of a request) pairs, which may come as slowly as they like and are in memory a piece
        at a time. `defaults`: fields of every request that does not have them. All or nothing. Raises
        `InvalidRequestError`, `DataError`, `OverloadedError`."""
        if endpoint not in ENDPOINTS:
            raise InvalidRequestError(
                f"endpoint must be one of {list(ENDPOINTS)}, got {shown(endpoint)}", field="endpoint"
            )
        if len(json.dumps(dict(defaults or {}))) > MAX_DEFAULTS_BYTES:
            raise InvalidRequestError(f"defaults have at most {MAX_DEFAULTS_BYTES} bytes of JSON", field="defaults")
        _check_metadata(metadata or {})
        with self._service.calls.call("submit", caller), self._service.place(caller):
            who = caller.identity
            text = json.dumps(dict(metadata or {}))
            job = await self._run(lambda: self._store.begin(who.tenant, who.subject, endpoint, text))
            try:
                async for piece in _each(records):
                    await self._run(partial(self._extend, job, piece, endpoint, defaults))
                await self._run(lambda: self._complete(job))
            except BaseException:
                await asyncio.shield(self._run(lambda: self._store.discard(job)))
                raise
            self._wake()
            return await self._run(lambda: self._store.job(job))

    def _extend(
        self, job: str, piece: list[tuple[str, bytes]], endpoint: str, defaults: Mapping[str, Any] | None
    ) -> None:
        for first in range(0, len(piece), _PIECE):  # with the defaults they may be much larger
            part = piece[first : first + _PIECE]
            self._store.extend(job, [kept_request(id, request, endpoint, defaults) for id, request in part])

    def _complete(self, job: str) -> None:
        self._store.complete(job)
        self._store.end_empty(job)

    async def job(self, id: str, caller: Caller) -> Job:
        """Raises `NotFoundError`, also for a job of another tenant."""
        return await self._run(lambda: self._store.job(id, caller.identity.tenant))

    async def jobs(self, caller: Caller, limit: int = 100, after: str = "") -> list[Job]:
        """The tenant's, the newest first."""
        return await self._run(lambda: self._store.jobs(caller.identity.tenant, limit, after))

    async def results(self, id: str, caller: Caller, after: int = 0, limit: int = 100) -> list[Result]:
        """In the order in which they came to be. Raises `NotFoundError`."""
        await self.job(id, caller)
        return await self._run(lambda: self._store.results(id, after, limit))

    async def cancel(self, id: str, caller: Caller) -> Job:
        """End a job; the results that it has stay. Raises `NotFoundError`."""
        await self.job(id, caller)
        with self._service.calls.call("cancel", caller):
            await self._run(lambda: self._store.cancel(id))
            self._stop_records(id)
            return await self.job(id, caller)

    async def delete(self, id: str, caller: Caller) -> None:
        """Remove a job with its records and results, running or not. Raises `NotFoundError`."""
        await self.cancel(id, caller)
        await self._run(lambda: self._store.discard(id))

    async def wait_for_change(self, seconds: float = 1.0) -> None:
        """Until something has happened to some job, or so long."""
        changed = self._changed
        try:
            await asyncio.wait_for(changed.wait(), seconds)
        except TimeoutError:
            return

    # ---- the task ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._loop = asyncio.create_task(self._answer_all())

    async def stop(self) -> None:
        """What runs waits again; it is answered after the next start. Calls that come later are refused."""
        if self._is_stopped:
            return
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.wait({self._loop})
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(set(self._running))
        self._is_stopped = True
        await asyncio.get_running_loop().run_in_executor(self._thread, self._store.close)
        self._thread.shutdown()
        self._wake()

    async def _answer_all(self) -> None:
        while True:
            try:
                await self._begin_records(self._service.places_for_jobs - len(self._running))
            except Exception:  # such as a full disk: later there may be room
                log.exception("no record of a batch job could be begun")
                await asyncio.sleep(1)
            await self.wait_for_change(_POLL_S)

    async def _begin_records(self, room: int) -> None:
        if room <= 0 or self._service.is_leaving:
            return
        now = time.monotonic()
        running = Counter(record.tenant for record in self._running.values())
        most = {tenant: max(0, int(value) - running[tenant]) for tenant, value in self._most.items()}
        most |= {tenant: 0 for tenant, (until, _) in self._later.items() if until > now}
        for record in await self._run(partial(self._store.take, room, most)):
            task = asyncio.create_task(self._answer(record))
            self._running[task] = record
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        record = self._running.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a record could not be answered; its job waits until the next start", exc_info=error)
            await_later = asyncio.get_running_loop().create_task(self._put_back_later(record))
            self._cleaning.add(await_later)
            await_later.add_done_callback(self._cleaning.discard)
        self._wake()

    def _wake(self) -> None:
        """Tell all who wait, now and later."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _stop_records(self, job: str) -> None:
        for task, record in list(self._running.items()):
            if record.job == job:
                task.cancel()
        self._wake()

    async def _answer(self, record: Record) -> None:
        try:
            job = await self._run(lambda: self._store.job(record.job))
            identity = Identity(job.tenant, job.subject, frozenset({Role.BATCH}))
            status, body = await self._execute(job.endpoint, record.request, Caller(identity))
            is_alone = self._note(job.tenant, is_refused=status in AGAIN)
        except asyncio.CancelledError:
            await asyncio.shield(self._run(lambda: self._store.put_back(record)))
            raise
        except MotetError:  # the job is gone
            return
        if self._service.is_leaving:  # it may be cut: it is answered after the next start
            await self._run(lambda: self._store.put_back(record))
            return
        if status in AGAIN and record.waits + 1 < _MOST_WAITS:
            await self._run(lambda: self._store.put_back(record, waits=int(is_alone)))
            return
        if status >= 500 and status not in AGAIN and record.attempts + 1 < _MOST_ATTEMPTS:
            await self._run(lambda: self._store.put_back(record, attempts=1))
            return
        await self._run(lambda: self._store.finish(record, status, body))

    def _note(self, tenant: str, *, is_refused: bool) -> bool:
        """Fit the number of a tenant's records that run at once to what it is given: fewer than now after a refusal, then slowly
        more. After a refusal of its only one it waits. Returns whether it is its only one."""
        running = sum(record.tenant == tenant for record in self._running.values())
        if is_refused:
            self._most[tenant] = max(1, running - 1)
            self._wait_longer(tenant)
            return running == 1
        self._later.pop(tenant, None)
        if tenant in self._most:
            self._most[tenant] += 1 / self._most[tenant]
            if self._most[tenant] > self._service.places_for_jobs:
                del self._most[tenant]
        return running == 1

    def _wait_longer(self, tenant: str) -> None:
        """Its quota is spent, or the server is full: twice as long as the last time."""
        until, seconds = self._later.get(tenant, (0.0, _POLL_S / 2))
        if until > time.monotonic():
            return  # others of the same turn have told already
        self._later[tenant] = (time.monotonic() + 2 * seconds, min(2 * seconds, _LONGEST_WAIT_S / 2))

    async def _put_back_later(self, record: Record) -> None:
        """After a failure of the store, such as a full disk."""
        while not self._is_stopped:
            await asyncio.sleep(_LONGEST_WAIT_S)
            try:
                await self._run(lambda: self._store.put_back(record, attempts=1))
                return
            except Exception:
                log.exception("a record still cannot be kept")

    async def _run(self, work: Callable[[], T]) -> T:
        """In the one thread that the store belongs to. Raises `UnavailableError` after `stop`."""
        if self._is_stopped:
            raise UnavailableError("the server goes out of service; its batch jobs go on after its next start")
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _check_metadata(metadata: Mapping[str, str]) -> None:
    """As OpenAI bounds it. Raises `InvalidRequestError`."""
    if len(metadata) > 17 or any(len(key) > 64 or len(value) > 512 for key, value in metadata.items()):
        raise InvalidRequestError(
            "metadata has at most 16 entries, with keys of 64 and values of 512 characters", field="metadata"
        )


async def _each(
    records: AsyncIterator[list[tuple[str, bytes]]] | Iterable[list[tuple[str, bytes]]],
) -> AsyncIterator[list[tuple[str, bytes]]]:
    if isinstance(records, Iterable):
        for piece in records:
            yield piece
    else:
        async for piece in records:
            yield piece


def kept_request(id: str, request: bytes, endpoint: str, defaults: Mapping[str, Any] | None) -> tuple[str, bytes]:
    """A record as it is kept: with the job's defaults, and a seed, so that it has one answer however often it is begun."""
    _ID.check("records", id, "the id of a record")
    try:
        body = json.loads(request)
    except (ValueError, RecursionError) as error:
        raise DataError(f"record '{id}' is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise DataError(f"record '{id}' must be a JSON object, the body of a request")
    body = dict(defaults or {}) | body
    if "request_id" in body:
        raise DataError(f"record '{id}' has a request_id, by which it could be ended; its own id is enough")
    if body.get("stream"):
        raise DataError(f"record '{id}' asks for a stream, and a job has whole answers; leave stream out")
    if endpoint in _SEEDED and body.get("seed") is None:
        body["seed"] = int.from_bytes(blake2b(id.encode(), digest_size=7).digest())
    try:
        content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise DataError(f"record '{id}' holds half of a character (a lone surrogate)") from None
    if len(content) > MAX_REQUEST_BYTES:
        raise DataError(
            f"record '{id}' has {len(content)} bytes with the defaults; at most {MAX_REQUEST_BYTES} are allowed"
        )
    return id, content


def as_request(text: str, endpoint: str) -> bytes:
    """A text as the request of an endpoint."""
    field = ENDPOINTS.get(endpoint, "text")
    value: Any = [{"role": "user", "content": text}] if field == "messages" else text
    return json.dumps({field: value}, ensure_ascii=False).encode()
