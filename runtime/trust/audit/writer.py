"""`AuditLog`: appends to the audit log of a directory."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

from ...errors import MotetError, UnavailableError
from .chain import canonical, cipher, connect, digest_of, files_of, locked, private, time_text, verify

log = logging.getLogger("motet.audit")
_POLL_S = 0.5  # how soon a running server writes the record of an erasure


@dataclass(frozen=True, slots=True)
class Entry:
    """What is to be recorded. `texts`: name → secret content, of which HMACs are kept. `subject`: whose texts they are."""

    event: str
    fields: Mapping[str, Any]
    subject: str = ""
    texts: Mapping[str, bytes] | None = None


class AuditLog:
    """The writer; one process at a time. `append` returns at once, a thread writes and syncs to the disk.

    Raises `UnavailableError` at construction if another process writes there or the directory cannot be used,
    `MissingPackageError` if content is to be kept and the package `cryptography` is missing, `BundleError` if what is
    there is no whole chain.
    """

    def __init__(self, directory: Path, *, with_content: bool = False) -> None:
        self._cipher = cipher() if with_content else None
        self._directory = directory
        self.failure: MotetError | None = None  # why nothing more is recorded
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = locked(directory)
        except OSError as error:
            raise UnavailableError(f"the audit log in '{directory}' cannot be written: {error}") from None
        if self._lock is None:
            raise UnavailableError(f"another process writes the audit log in '{directory}'; give each server its own")
        self._entries: SimpleQueue[Entry | None] = SimpleQueue()
        self._closing = False
        self._file: IO[bytes] | None = None
        self._day = ""
        self._keys: dict[str, bytes] = {}
        found = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(found,), name="motet-audit", daemon=True)
        self._thread.start()
        found.wait()
        if self.failure is not None:
            self.close()
            raise self.failure

    def __enter__(self) -> AuditLog:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def append(self, entry: Entry) -> None:
        """Record something. Raises `UnavailableError` if the log cannot be written any more."""
        if self.failure is not None:
            raise self.failure
        self._entries.put(entry)

    def flush(self) -> None:
        """Wait until everything that was appended is on the disk, or the log has failed."""
        done = threading.Event()
        self._entries.put(Entry("", {"flush": done}))
        while not done.wait(0.05) and self.failure is None and self._thread.is_alive():
            continue

    def close(self) -> None:
        """Write what is left and release the directory."""
        if not self._closing:
            self._closing = True
            self._entries.put(None)
            self._thread.join()
            if self._lock is not None:
                self._lock.close()

    # ---- the writer's thread -------------------------------------------------------------------------------------

    def _run(self, found: threading.Event) -> None:
        try:
            with closing(connect(self._directory)) as self._database:
                self._seq, self._hash = self._recover()
                self._version = -1  # so that it looks for erasures at once
                found.set()
                while self._write_batch():
                    pass
        except MotetError as error:
            self.failure = error
        except Exception as error:
            log.exception("the audit log has stopped")
            self.failure = UnavailableError(
                f"the audit log cannot be written ({error}); nothing is answered unrecorded"
            )
        finally:
            found.set()
            if self._file is not None:
                self._file.close()

    def _write_batch(self) -> bool:
        """Wait for entries and write all that are there. False when the log is closed."""
        batch: list[Entry | None] = []
        try:
            batch.append(self._entries.get(timeout=_POLL_S))
            while True:
                batch.append(self._entries.get_nowait())
        except Empty:
            pass
        self._write_erasures()
        flushed: list[threading.Event] = []
        for entry in batch:
            if entry is not None and "flush" in entry.fields:
                flushed.append(entry.fields["flush"])
            elif entry is not None:
                self._write(entry)
        self._sync()
        for event in flushed:
            event.set()
        return None not in batch

    def _write_erasures(self) -> None:
        """Record what `erase` did in another process since the last look."""
        version = self._data_version()
        if version == self._version:
            return
        self._version = version
        self._keys.clear()
        for subject, when in self._database.execute("SELECT subject, time FROM erasures ORDER BY time").fetchall():
            self._write(Entry("erase", {"subject": subject, "requested": time_text(when)}))
            self._database.execute("DELETE FROM erasures WHERE subject = ? AND time = ?", (subject, when))

    def _write(self, entry: Entry) -> None:
        now = time.time()
        record: dict[str, Any] = {"seq": self._seq + 1, "time": time_text(now), "event": entry.event, **entry.fields}
        if entry.texts is not None:
            key = self._key(entry.subject)
            for name, text in entry.texts.items():
                record[f"{name}_hmac"] = hmac.new(key, text, hashlib.sha256).hexdigest()
                if self._cipher is not None:
                    nonce = secrets.token_bytes(12)
                    sealed = self._cipher(key).encrypt(nonce, text, f"{record['seq']}:{name}".encode())
                    record[f"{name}_sealed"] = (nonce + sealed).hex()
        record["prev"] = self._hash
        record["hash"] = self._hash = digest_of(record)
        self._seq += 1
        day = datetime.fromtimestamp(now, UTC).strftime("%Y%m%d")
        if self._file is None or day > self._day:  # a clock that goes back begins no new file
            if self._file is not None:
                self._sync()
                self._file.close()
            self._day = max(day, self._day)
            name = f"audit-{self._day}.jsonl"
            self._file = open(self._directory / name, "ab", opener=private)  # noqa: SIM115 - `_run` closes it
        self._file.write(canonical(record) + b"\n")

    def _sync(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._database.execute("INSERT OR REPLACE INTO marks VALUES ('head', ?, ?)", (self._seq, self._hash))
        self._database.commit()

    def _key(self, subject: str) -> bytes:
        if subject not in self._keys:
            row = self._database.execute("SELECT key FROM subjects WHERE subject = ?", (subject,)).fetchone()
            if row is None:
                row = (secrets.token_bytes(32),)
                self._database.execute("INSERT INTO subjects VALUES (?, ?)", (subject, row[0]))
                self._database.commit()  # before any text that it seals
            if len(self._keys) > 10_000:
                self._keys.clear()
            self._keys[subject] = row[0]
        return self._keys[subject]

    def _recover(self) -> tuple[int, str]:
        """The last record's number and hash. A line that a crash has cut off was never confirmed: it is removed."""
        files = files_of(self._directory)
        if files:
            self._day = files[-1].stem.removeprefix("audit-")
            content = files[-1].read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                log.warning("%s ended in the middle of a record; the rest is removed", files[-1])
                os.truncate(files[-1], whole)
        report = verify(self._directory)
        return report.last, report.head

    def _data_version(self) -> int:
        return int(self._database.execute("PRAGMA data_version").fetchone()[0])
