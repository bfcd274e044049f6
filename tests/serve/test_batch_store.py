"""What is kept of batch jobs and their files, and what of it a killed process leaves."""

from __future__ import annotations

import io
import os
import time

import pytest
from motet.runtime.errors import DataError, NotFoundError, UnavailableError
from motet.runtime.serve.batch.files import MAX_LINE_BYTES, FileStore
from motet.runtime.serve.batch.store import JobStore


def test_a_record_that_ends_the_server_each_time_has_an_end(tmp_path):
    """Else one record would keep a server from ever running."""
    store = JobStore(tmp_path)
    job = store.begin("", "me", "/v1/completions", "{}")
    store.extend(job, [("bad", b"{}"), ("good", b"{}")])
    store.complete(job)
    for _ in range(20):
        assert [record.id for record in store.take(1)] == ["bad"]
        store._database.close()  # as a kill does
        os.close(store._lock)
        store = JobStore(tmp_path)
    [result] = store.results(job, 0, 10)
    assert (result.id, result.status) == ("bad", 500)
    assert [record.id for record in store.take(5)] == ["good"]
    store.close()


def test_answers_that_fit_no_message_are_errors(tmp_path):
    store = JobStore(tmp_path)
    job = store.begin("", "me", "/v1/embeddings", "{}")
    store.extend(job, ((f"r{i}", b"{}") for i in range(4)))
    store.complete(job)
    for record, size in zip(store.take(4), (2**22, 2**21, 2**21, 10), strict=True):
        store.finish(record, 200, b'"' + b"x" * size + b'"')
    assert [result.status for result in store.results(job, 0, 10)] == [413, 200]
    assert [result.number for result in store.results(job, 2, 10)] == [3, 4]
    store.close()


def test_files_that_are_torn_are_nobodys(tmp_path):
    files = FileStore(tmp_path)
    kept = files.add("a", "x.jsonl", io.BytesIO(b"{}\n"))
    (tmp_path / "file-torn").write_bytes(b"half")
    (tmp_path / "file-empty.json").write_bytes(b"")
    files = FileStore(tmp_path)
    assert [file.id for file in files.files("a")] == [kept.id]
    assert not (tmp_path / "file-torn").exists()
    for other in ("b", ""):
        with pytest.raises(NotFoundError):
            files.get(kept.id, other)
    big = files.add("a", "y", io.BytesIO(b"x" * (MAX_LINE_BYTES + 2)))
    with pytest.raises(DataError, match="a line of the file"):
        list(files.lines(big.id, "a"))


def test_one_server_has_the_state(tmp_path):
    store = JobStore(tmp_path)
    with pytest.raises(UnavailableError, match="another server"):
        JobStore(tmp_path)
    store.close()
    JobStore(tmp_path).close()


def test_many_records_are_never_in_memory_together(tmp_path):
    """A hundred thousand are taken in pieces."""
    store = JobStore(tmp_path)
    job = store.begin("", "me", "/v1/completions", "{}")
    for first in range(0, 100_000, 5000):
        store.extend(job, ((f"r{i}", b"{}") for i in range(first, first + 5000)))
    assert store.jobs("", 10) == []
    store.complete(job)
    assert store.job(job).total == 100_000
    began = time.monotonic()
    taken = store.take(16)
    for record in taken:
        store.finish(record, 200, b"{}")
        store.finish(record, 500, b"{}")  # a second time changes nothing
    assert time.monotonic() - began < 2
    assert [record.id for record in taken] == [f"r{i}" for i in range(16)]
    assert (store.job(job).done, store.job(job).failed) == (16, 0)
    store.close()


def test_tenants_take_turns(tmp_path):
    """A large job of one does not hold up another's."""
    store = JobStore(tmp_path)
    for tenant, count in (("a", 100), ("b", 2)):
        job = store.begin(tenant, "me", "/v1/completions", "{}")
        store.extend(job, ((f"{tenant}{i}", b"{}") for i in range(count)))
        store.complete(job)
    assert [record.id for record in store.take(6)] == ["a0", "b0", "a1", "b1", "a2", "a3"]
    assert [record.id for record in store.take(2)] == ["a4", "a5"]
    store.close()


def test_a_tenant_gets_no_more_than_it_may_have(tmp_path):
    store = JobStore(tmp_path)
    for tenant in ("a", "b"):
        job = store.begin(tenant, "me", "/v1/completions", "{}")
        store.extend(job, ((f"{tenant}{i}", b"{}") for i in range(5)))
        store.complete(job)
    assert [record.id for record in store.take(6, {"a": 1, "b": 0})] == ["a0"]
    assert [(record.id, record.tenant) for record in store.take(2)] == [("a1", "a"), ("b0", "b")]
    store.close()


def test_what_is_kept_is_counted_and_nothing_else(tmp_path):
    """Small records count what the database needs for them; results of a job that was cancelled are not kept."""
    store = JobStore(tmp_path)
    job = store.begin("", "me", "/v1/completions", "{}")
    store.extend(job, ((f"r{i:05}", b"{}") for i in range(20_000)))
    store.complete(job)
    counted = store._held(job)
    store._database.execute("pragma wal_checkpoint(truncate)")
    assert 0.5 < counted / (tmp_path / "jobs.sqlite").stat().st_size < 2
    [record] = store.take(1)
    store.cancel(job)
    store.finish(record, 200, b"x" * 1000)
    assert store._held(job) == counted
    store.close()
