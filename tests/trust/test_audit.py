"""The audit log: a chain that shows every change, texts that can be erased, a crash, a full disk."""

from __future__ import annotations

import json
import os
import sqlite3
from datetime import UTC, date, datetime

import pytest
from motet.runtime import errors
from motet.runtime.trust.audit import writer as writer_module
from motet.runtime.trust.audit.chain import verify
from motet.runtime.trust.audit.reader import erase, prune, records
from motet.runtime.trust.audit.writer import AuditLog, Entry


def entry(number, tenant="acme", text=b"secret prompt"):
    fields = {"number": number, "tenant": tenant, "subject": "key:1"}
    return Entry("call", fields, f"{tenant}/key:1", {"prompt": text})


def fill(path, count=5, **options):
    with AuditLog(path, **options) as audit:
        for number in range(count):
            audit.append(entry(number, f"t{number % 2}"))
    return path


def lines(path):
    [file] = path.glob("audit-*.jsonl")
    return file, file.read_text().splitlines()


def test_a_whole_chain(tmp_path):
    fill(tmp_path / "a")
    fill(tmp_path / "a", 3)  # a server that starts again goes on with it
    report = verify(tmp_path / "a")
    assert (report.first, report.last) == (1, 8)
    file, found = lines(tmp_path / "a")
    assert json.loads(found[-1])["hash"] == report.head
    assert "secret" not in file.read_text()
    assert {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "a").iterdir()} == {"0o600"}


def removed(found):
    return found[:2] + found[3:]


def moved(found):
    return [found[0], found[2], found[1], *found[3:]]


def changed(found):
    return [line.replace('"number":2', '"number":7') for line in found]


def rewritten(found):
    """The changed record has a hash that fits; the next one does not."""
    from motet.runtime.trust.audit.chain import canonical, digest_of

    record = json.loads(found[2])
    record["number"] = 7
    record["hash"] = digest_of(record)
    return [*found[:2], canonical(record).decode(), *found[3:]]


def cut(found):
    return found[:-1]


def garbage(found):
    return [*found[:3], "{", *found[4:]]


@pytest.mark.parametrize("change", [removed, moved, changed, rewritten, cut, garbage])
def test_a_change_is_found(tmp_path, change):
    file, found = lines(fill(tmp_path / "a"))
    file.write_text("\n".join(change(found)) + "\n")
    with pytest.raises(errors.BundleError, match="the audit log is damaged"):
        verify(tmp_path / "a")
    with pytest.raises(errors.BundleError, match="the audit log is damaged"):
        AuditLog(tmp_path / "a")


def test_every_single_bit_counts(tmp_path):
    """Any changed byte of the file is found, wherever it is."""
    file, _ = lines(fill(tmp_path / "a", 2))
    content = file.read_bytes()
    for at in range(0, len(content), 7):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(errors.BundleError):
            verify(tmp_path / "a")


def test_a_crash_in_the_middle_of_a_record(tmp_path, caplog):
    file, _ = lines(fill(tmp_path / "a"))
    with open(file, "ab") as content:
        content.write(b'{"seq":6,"ti')
    fill(tmp_path / "a", 1)
    assert verify(tmp_path / "a").last == 6
    assert "in the middle of a record" in caplog.text


def test_a_crash_before_the_head_was_noted(tmp_path):
    """The file may be ahead of the database, never behind it."""
    path = fill(tmp_path / "a")
    with sqlite3.connect(path / "audit.sqlite") as database:
        record = json.loads(lines(path)[1][2])
        database.execute("UPDATE marks SET seq = ?, hash = ? WHERE name = 'head'", (record["seq"], record["hash"]))
    assert verify(path).last == 5


def test_erasing_a_subject(tmp_path):
    path = fill(tmp_path / "a", with_content=True)
    assert {record["prompt"] for record in records(path)} == {"secret prompt"}
    erase(path, "t1/key:1")
    found = list(records(path))
    assert [r.get("prompt") for r in found if r.get("tenant") == "t1"] == [None, None]
    assert [r.get("prompt") for r in found if r.get("tenant") == "t0"] == ["secret prompt"] * 3
    assert found[-1]["event"] == "erase" and found[-1]["subject"] == "t1/key:1"
    assert verify(path).last == 6
    with pytest.raises(errors.NotFoundError, match="no texts of subject"):
        erase(path, "t1/key:1")
    fill(path, 2, with_content=True)  # the subject comes back, under a new key
    prompts = [r["prompt"] for r in records(path) if r.get("tenant") == "t1"]
    assert prompts == [None, None, "secret prompt"]


def test_an_erased_key_is_nowhere(tmp_path):
    path = fill(tmp_path / "a", with_content=True)
    with sqlite3.connect(path / "audit.sqlite") as database:
        [(key,)] = database.execute("SELECT key FROM subjects WHERE subject = 't1/key:1'")
    erase(path, "t1/key:1")
    assert not any(key in file.read_bytes() for file in path.iterdir())


def test_erasing_while_a_server_writes(tmp_path):
    path = tmp_path / "a"
    with AuditLog(path, with_content=True) as audit:
        audit.append(entry(1))
        audit.flush()
        erase(path, "acme/key:1")
        audit.append(entry(2))
        audit.flush()
        assert [(r["event"], r.get("prompt")) for r in records(path)] == [
            ("call", None),
            ("erase", None),
            ("call", "secret prompt"),
        ]
    verify(path)


def test_one_writer(tmp_path):
    with AuditLog(tmp_path / "a"), pytest.raises(errors.UnavailableError, match="another process writes"):
        AuditLog(tmp_path / "a")
    with AuditLog(tmp_path / "a"), pytest.raises(errors.UnavailableError, match="a server writes"):
        prune(tmp_path / "a", date(2030, 1, 1))
    with pytest.raises(errors.NotFoundError, match="no audit log"):
        verify(tmp_path / "b")


def test_old_days_can_go(tmp_path, monkeypatch):
    path = tmp_path / "a"
    for day in (1, 2, 3):
        moment = datetime(2026, 5, day, 12, tzinfo=UTC).timestamp()
        monkeypatch.setattr(writer_module.time, "time", lambda moment=moment: moment)
        fill(path, day)
    assert sorted(f.name for f in path.glob("*.jsonl")) == [f"audit-2026050{day}.jsonl" for day in (1, 2, 3)]
    assert prune(path, date(2026, 5, 3)) == 3
    report = verify(path)
    assert (report.first, report.last) == (4, 7)
    assert list(records(path))[-1]["event"] == "prune"
    assert prune(path, date(2026, 5, 3)) == 0
    os.unlink(path / "audit-20260503.jsonl")
    with pytest.raises(errors.BundleError):
        verify(path)


def test_a_crash_while_old_days_go(tmp_path, monkeypatch):
    """The start is noted and the files are still there."""
    path = tmp_path / "a"
    with monkeypatch.context() as patch:
        for day in (1, 2):
            moment = datetime(2026, 5, day, 12, tzinfo=UTC).timestamp()
            patch.setattr(writer_module.time, "time", lambda moment=moment: moment)
            fill(path, 2)
        patch.setattr("pathlib.Path.unlink", lambda *_a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prune(path, date(2026, 5, 2))
    assert verify(path).first == 3
    assert prune(path, date(2026, 5, 2)) == 2
    assert verify(path).last == 5


def test_text_that_is_none(tmp_path):
    with AuditLog(tmp_path / "a") as audit:
        audit.append(Entry("call", {"request_id": "\ud800"}))
    assert verify(tmp_path / "a").last == 1


def test_a_log_that_cannot_be_written(tmp_path, monkeypatch):
    """Nothing is answered unrecorded."""
    with AuditLog(tmp_path / "a") as audit:

        def full(_fd):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(writer_module.os, "fsync", full)
        audit.append(entry(1))
        audit.flush()
        with pytest.raises(errors.UnavailableError, match="No space left"):
            audit.append(entry(2))
