"""The format of the audit log: who did what when, as a chain of records that cannot be changed, removed or reordered unseen.

A directory holds `audit-YYYYMMDD.jsonl`, one file per UTC day, and `audit.sqlite`. Each record has the hash of the one
before it and its own (SHA-256 of its canonical JSON without `hash`). The number and hash of the last record stand in the
database too, so a cut end is seen; to see that both were rewritten, keep heads elsewhere (`verify` returns it).

A call has two records: one before anything is done for it, one when it has ended. The first without the second is of a call that
still runs, or that ran when the server was killed.

Prompts and answers are not in the log, only HMACs of them under a key of the subject: a plain hash of a short prompt could be
guessed. With content, they are, encrypted with AES-GCM under the same key. To erase a subject is to destroy its key: the
chain stays whole, and what it says of the subject's texts can no longer be read or checked.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from ...errors import BundleError, MissingPackageError, NotFoundError, UnavailableError

GENESIS = "0" * 64
BEGIN, END, KEY = "begin", "call", "key"  # the two events of a call, and the field that both have
_DATABASE, _LOCK = "audit.sqlite", "lock"
_TABLES = """
CREATE TABLE IF NOT EXISTS subjects (subject TEXT PRIMARY KEY, key BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS erasures (subject TEXT NOT NULL, time REAL NOT NULL);
CREATE TABLE IF NOT EXISTS marks (name TEXT PRIMARY KEY, seq INTEGER NOT NULL, hash TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class AuditReport:
    """A chain that is whole: numbers of its first and last record (last < first: there is none), the hash of the last.
    `unended`: the records of calls that have begun and not ended, in order."""

    first: int
    last: int
    head: str
    unended: tuple[Mapping[str, Any], ...] = ()


def verify(directory: Path) -> AuditReport:
    """Check every record of an audit log. Raises `BundleError`, naming the place, if one was changed, removed or moved,
    `NotFoundError` if there is no log."""
    with closing(connect(directory)) as database:
        start = mark(database, "start") or (0, GENESIS)
        head = mark(database, "head") or (0, GENESIS)
    seq, last = start
    head_seen = head == start
    unended: dict[str, Mapping[str, Any]] = {}
    for file, line_number, line in lines_of(directory):
        where = f"{file.name}, line {line_number}"
        try:
            record = json.loads(line)
            number, before, claimed, found = record["seq"], record["prev"], record["hash"], digest_of(record)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BundleError(f"the audit log is damaged at {where}: it is no record") from None
        if seq == start[0] and isinstance(number, int) and number <= start[0]:
            continue  # of a file that `prune` was to remove
        if number != seq + 1 or before != last:
            raise BundleError(f"the audit log is damaged at {where}: record {seq + 1} should be here, not {number}")
        if claimed != found or canonical(record) + b"\n" != line:
            raise BundleError(f"the audit log is damaged at {where}: record {number} was changed")
        seq, last = seq + 1, claimed
        head_seen = head_seen or (seq, last) == head
        if record.get("event") == BEGIN:
            unended[str(record.get(KEY))] = record
        elif record.get("event") == END:
            unended.pop(str(record.get(KEY)), None)
    if not head_seen:
        raise BundleError(f"the audit log is damaged: it ends at record {seq}, and record {head[0]} was its last one")
    return AuditReport(start[0] + 1, seq, last, tuple(unended.values()))


def subject_of(record: Mapping[str, Any]) -> str:
    """The subject whose key sealed a record's texts."""
    return f"{record.get('tenant', '')}/{record.get('subject', '')}"


def digest_of(record: Mapping[str, Any]) -> str:
    """The hash of a record: of all its fields but `hash`."""
    return hashlib.sha256(canonical({name: value for name, value in record.items() if name != "hash"})).hexdigest()


def canonical(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(
        errors="backslashreplace"
    )


def files_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("audit-*.jsonl"))


def lines_of(directory: Path) -> Iterator[tuple[Path, int, bytes]]:
    for file in files_of(directory):
        with open(file, "rb") as content:
            for number, line in enumerate(content, 1):
                yield file, number, line


def connect(directory: Path) -> sqlite3.Connection:
    if not directory.is_dir():
        raise NotFoundError(f"there is no audit log '{directory}'")
    path = directory / _DATABASE
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        database = sqlite3.connect(path, timeout=10)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("PRAGMA secure_delete=ON")  # an erased key is overwritten
        database.executescript(_TABLES)
    except (OSError, sqlite3.Error) as error:
        raise UnavailableError(f"the audit log in '{directory}' cannot be opened: {error}") from None
    return database


def mark(database: sqlite3.Connection, name: str) -> tuple[int, str] | None:
    row = database.execute("SELECT seq, hash FROM marks WHERE name = ?", (name,)).fetchone()
    return None if row is None else (int(row[0]), str(row[1]))


def locked(directory: Path) -> IO[bytes] | None:
    """The directory's lock, until it is closed; None if another process has it."""
    file = open(directory / _LOCK, "ab", opener=private)  # noqa: SIM115 - the caller closes it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def time_text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")


def cipher() -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise MissingPackageError(
            f"keeping content needs the package cryptography ({error}); install it with `pip install 'motet[auth]'`"
        ) from error
    return AESGCM
