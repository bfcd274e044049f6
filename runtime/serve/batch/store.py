"""`JobStore`: jobs, their records and results, in SQLite. What was committed survives a killed process."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest
from pathlib import Path

from ...errors import BundleError, DataError, NotFoundError, OverloadedError, UnavailableError

_SCHEMA = """
create table if not exists jobs (
    id text primary key, tenant text not null, subject text not null, endpoint text not null, metadata text not null,
    state text not null, created real not null, ended real, total integer not null default 0, done integer not null default 0,
    failed integer not null default 0, bytes integer not null default 0
) strict;
create table if not exists records (
    job text not null references jobs (id) on delete cascade, place integer not null, id text not null,
    request blob not null, state text not null, attempts integer not null default 0, waits integer not null default 0,
    crashes integer not null default 0,
    finished integer, status integer, response blob,
    primary key (job, place), unique (job, id)
) strict, without rowid;
create index if not exists waiting on records (job, place) where state = 'waiting';
create index if not exists finished on records (job, finished) where finished is not null;
"""
_VERSION = 1
_MOST_CRASHES = 20  # that a record may be running in
_ROW_BYTES = 300  # that the database needs for a record beside its request, its result and twice its id
MAX_TENANT_JOBS = 1000
MAX_TENANT_BYTES = 8 * 2**30  # of all jobs, for more records; four times as much with their results
MAX_RESULT_BYTES = 3 * 2**20  # a message of gRPC has 4 MiB


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"  # every record has a result
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Job:
    """`done` and `failed` count records with a result; times are in seconds since 1970."""

    id: str
    tenant: str
    subject: str
    endpoint: str  # the path of the HTTP API that answers the records
    metadata: Mapping[str, str]  # the client's
    state: JobState
    created: float
    ended: float | None
    total: int
    done: int
    failed: int

    @property
    def has_ended(self) -> bool:
        return self.state in (JobState.DONE, JobState.CANCELLED)


@dataclass(frozen=True, slots=True)
class Record:
    job: str
    tenant: str
    place: int
    id: str  # the client's, unique in the job
    request: bytes  # JSON
    attempts: int  # that ended with a fault of the server
    waits: int  # for room


@dataclass(frozen=True, slots=True)
class Result:
    """`number`: in the order in which the job's records were finished, from 1 on."""

    number: int
    id: str
    status: int  # of HTTP
    response: bytes  # JSON


class JobStore:
    """Not thread-safe. One process at a time has it open. Raises `UnavailableError` (another has it, or the disk fails),
    `BundleError` (it is of another version)."""

    def __init__(self, directory: Path) -> None:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(directory / "lock", os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnavailableError(f"another server has the jobs in '{directory}' open; give each its own") from None
        except OSError as error:
            raise UnavailableError(f"'{directory}' cannot hold batch jobs: {error.strerror}") from None
        self._database = sqlite3.connect(directory / "jobs.sqlite", check_same_thread=False, isolation_level=None)
        os.chmod(directory / "jobs.sqlite", 0o600)
        version = self._database.execute("pragma user_version").fetchone()[0]
        if version not in (0, _VERSION):
            raise BundleError(
                f"'{directory}' holds jobs of version {version}, this Motet reads {_VERSION}; use another one"
            )
        self._database.executescript(f"pragma journal_mode = wal; pragma foreign_keys = on; {_SCHEMA}")
        self._database.execute(f"pragma user_version = {_VERSION}")
        # What a killed process had begun is begun again; what it had not taken whole was never accepted.
        self._database.execute("delete from jobs where state = 'loading'")
        self._database.execute("update records set state = 'waiting', crashes = crashes + 1 where state = 'running'")
        for record in self._crashing():
            self.finish(record, 500, b'{"error": {"message": "the server ended each time that it began this record"}}')

    def _crashing(self) -> list[Record]:
        """What the process has died with so often that it may be why."""
        rows = self._database.execute(
            "select job, tenant, place, records.id, request, attempts, waits from records join jobs on jobs.id = job"
            " where records.state = 'waiting' and crashes >= ?",
            (_MOST_CRASHES,),
        ).fetchall()
        return [Record(*row) for row in rows]

    def close(self) -> None:
        self._database.close()
        os.close(self._lock)

    # ---- jobs ----------------------------------------------------------------------------------------------------

    def begin(self, tenant: str, subject: str, endpoint: str, metadata: str) -> str:
        """A job that takes records until `complete`; nobody sees it before. Returns its id. Raises `OverloadedError`."""
        held = self._database.execute("select count(*) from jobs where tenant = ?", (tenant,)).fetchone()[0]
        if held >= MAX_TENANT_JOBS:
            raise OverloadedError(f"{held} batch jobs are kept, the limit of a tenant; delete some")
        job = f"batch_{uuid.uuid4().hex}"
        self._database.execute(
            "insert into jobs (id, tenant, subject, endpoint, metadata, state, created) values (?, ?, ?, ?, ?, 'loading', ?)",
            (job, tenant, subject, endpoint, metadata, time.time()),
        )
        return job

    def extend(self, job: str, records: Iterable[tuple[str, bytes]]) -> None:
        """Add (id, request) pairs to a job that takes records. Raises `DataError` if an id occurs twice, `OverloadedError`."""
        total = self._database.execute("select total from jobs where id = ?", (job,)).fetchone()[0]
        rows = [(job, total + at, id, request, "waiting") for at, (id, request) in enumerate(records)]
        with self._transaction():
            try:
                self._database.executemany(
                    "insert into records (job, place, id, request, state) values (?, ?, ?, ?, ?)", rows
                )
            except sqlite3.IntegrityError:
                raise DataError("two records of the job have the same id; give each its own") from None
            self._database.execute(
                "update jobs set total = ?, bytes = bytes + ? where id = ?",
                (total + len(rows), sum(len(row[3]) + 2 * len(row[2].encode()) + _ROW_BYTES for row in rows), job),
            )
            if self._held(job) > MAX_TENANT_BYTES:
                raise OverloadedError(f"the jobs of a tenant hold at most {MAX_TENANT_BYTES} bytes; delete some")

    def _held(self, job: str) -> int:
        """Bytes of all jobs of this job's tenant."""
        found = self._database.execute(
            "select sum(bytes) from jobs where tenant = (select tenant from jobs where id = ?)", (job,)
        ).fetchone()
        return int(found[0] or 0)

    def complete(self, job: str) -> None:
        """The job has all of its records: it may run."""
        self._database.execute("update jobs set state = ? where id = ?", (JobState.QUEUED, job))

    def discard(self, job: str) -> None:
        """Remove a job with all it has."""
        self._database.execute("delete from jobs where id = ?", (job,))

    def job(self, id: str, tenant: str | None = None) -> Job:
        """Raises `NotFoundError`, also for another tenant's."""
        found = list(self._jobs("id = ? and tenant = coalesce(?, tenant)", (id, tenant)))
        if not found:
            raise NotFoundError(f"there is no job '{id[:80]}'")
        return found[0]

    def jobs(self, tenant: str, limit: int, after: str = "") -> list[Job]:
        """A tenant's, the newest first; `after`: those older than this one."""
        before = self.job(after, tenant).created if after else float("inf")
        return list(self._jobs("tenant = ? and created < ? order by created desc limit ?", (tenant, before, limit)))

    def _jobs(self, where: str, values: tuple[object, ...]) -> Iterator[Job]:
        for row in self._database.execute(
            "select id, tenant, subject, endpoint, metadata, state, created, ended, total, done, failed"
            f" from jobs where state != 'loading' and {where}",
            values,
        ).fetchall():
            id, tenant, subject, endpoint, metadata, state, created, ended, total, done, failed = row
            yield Job(
                id,
                tenant,
                subject,
                endpoint,
                json.loads(metadata),
                JobState(state),
                created,
                ended,
                total,
                done,
                failed,
            )

    def cancel(self, job: str) -> None:
        """Its records that have no result get none. Nothing happens to a job that has ended."""
        self._database.execute(
            "update jobs set state = ?, ended = ? where id = ? and state in (?, ?)",
            (JobState.CANCELLED, time.time(), job, JobState.QUEUED, JobState.RUNNING),
        )

    # ---- records -------------------------------------------------------------------------------------------------

    def take(self, count: int, most: Mapping[str, int] | None = None) -> list[Record]:
        """The next records to answer, of each tenant's oldest jobs first, and of all tenants alike; they are running from now
        on. `most`: of a tenant, where that is less."""
        most = most or {}
        of_tenant: dict[str, list[tuple[str, int]]] = {}  # (job, place) of each
        states = (JobState.QUEUED, JobState.RUNNING)
        for job, tenant in self._database.execute(
            "select id, tenant from jobs where state in (?, ?) order by created", states
        ).fetchall():
            found = of_tenant.setdefault(tenant, [])
            if (room := min(count, most.get(tenant, count)) - len(found)) > 0:
                found += self._database.execute(
                    "select job, place from records indexed by waiting where job = ? and state = 'waiting'"
                    " order by place limit ?",
                    (job, room),
                ).fetchall()
        in_turn = zip_longest(*of_tenant.values())
        rows = [row for turn in in_turn for row in turn if row is not None][:count]
        with self._transaction():
            self._database.executemany(
                "update records set state = 'running' where job = ? and place = ?",
                rows,
            )
            self._database.executemany(
                "update jobs set state = ? where id = ? and state = ?",
                [(JobState.RUNNING, job, JobState.QUEUED) for job in {row[0] for row in rows}],
            )
        read = "select job, tenant, place, records.id, request, attempts, waits from records join jobs on jobs.id = job"
        return [Record(*self._database.execute(f"{read} where job = ? and place = ?", row).fetchone()) for row in rows]

    def put_back(self, record: Record, *, attempts: int = 0, waits: int = 0) -> None:
        """It waits again, after so many attempts and waits more."""
        self._database.execute(
            "update records set state = 'waiting', attempts = attempts + ?, waits = waits + ?"
            " where job = ? and place = ? and state = 'running'",
            (attempts, waits, record.job, record.place),
        )

    def finish(self, record: Record, status: int, response: bytes) -> None:
        """Its result, unless it has one or its job was cancelled. The last one ends the job."""
        if self._held(record.job) > 4 * MAX_TENANT_BYTES:
            status, response = 413, b'{"error": {"message": "the jobs of this tenant hold too much; delete some"}}'
        if len(response) > MAX_RESULT_BYTES:
            text = f"the answer has {len(response)} bytes, and a job keeps at most {MAX_RESULT_BYTES}; ask for less"
            status, response = 413, json.dumps({"error": {"message": text, "type": "invalid_request_error"}}).encode()
        with self._transaction():
            changed = self._database.execute(
                "update records set state = 'finished', status = ?, response = ?,"
                " finished = (select done + failed + 1 from jobs where id = ?)"
                " where job = ? and place = ? and finished is null"
                " and exists (select 1 from jobs where id = ? and state = ?)",
                (status, response, record.job, record.job, record.place, record.job, JobState.RUNNING),
            ).rowcount
            self._database.execute(
                "update jobs set done = done + ?, failed = failed + ?, bytes = bytes + ? where id = ?",
                (changed * (status < 400), changed * (status >= 400), changed * len(response), record.job),
            )
            self._database.execute(
                "update jobs set state = ?, ended = ? where id = ? and state = ? and done + failed = total",
                (JobState.DONE, time.time(), record.job, JobState.RUNNING),
            )

    def end_empty(self, job: str) -> None:
        """A job without records has ended."""
        self._database.execute(
            "update jobs set state = ?, ended = ? where id = ? and total = 0", (JobState.DONE, time.time(), job)
        )

    def results(self, job: str, after: int, limit: int) -> list[Result]:
        """Results with a number above `after`: at most `limit`, and together not much larger than a message."""
        found: list[Result] = []
        size = 0
        for row in self._database.execute(
            "select finished, id, status, response from records where job = ? and finished > ? order by finished limit ?",
            (job, after, limit),
        ):
            size += len(row[3])
            if found and size > MAX_RESULT_BYTES:
                break
            found.append(Result(*row))
        return found

    def _transaction(self) -> _Transaction:
        return _Transaction(self._database)


class _Transaction:
    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def __enter__(self) -> None:
        self._database.execute("begin immediate")

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is None:
            self._database.execute("commit")
        elif self._database.in_transaction:  # a full disk has ended it already
            self._database.execute("rollback")
