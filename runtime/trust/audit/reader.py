"""What is done with an audit log besides writing it: show it, erase a subject, remove old files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

from ...errors import NotFoundError, UnavailableError
from .chain import cipher, connect, files_of, lines_of, locked, subject_of, verify
from .writer import AuditLog, Entry

_ATTEMPTS = 10


def records(directory: Path) -> Iterator[dict[str, Any]]:
    """All records in order, texts unsealed where the subject's key is still there: `prompt` beside `prompt_sealed`."""
    with closing(connect(directory)) as database:
        keys = dict(database.execute("SELECT subject, key FROM subjects").fetchall())
    for _, _, line in lines_of(directory):
        record: dict[str, Any] = json.loads(line)
        key = keys.get(subject_of(record))
        for name in [name.removesuffix("_sealed") for name in record if name.endswith("_sealed")]:
            sealed = bytes.fromhex(record[f"{name}_sealed"])
            text = _unseal(key, sealed, f"{record['seq']}:{name}".encode()) if key is not None else None
            record[name] = None if text is None else text.decode(errors="replace")
        yield record


def erase(directory: Path, subject: str) -> None:
    """Destroy a subject's key, so that its sealed texts cannot be read any more, and have that recorded; also while a
    server writes. Raises `NotFoundError`."""
    with closing(connect(directory)) as database:
        if database.execute("DELETE FROM subjects WHERE subject = ?", (subject,)).rowcount == 0:
            raise NotFoundError(f"the audit log in '{directory}' has no texts of subject '{subject}'")
        database.execute("INSERT INTO erasures VALUES (?, ?)", (subject, time.time()))
        database.commit()
        for _ in range(_ATTEMPTS):  # the key must not survive in the journal; a reader may hold it for a while
            if database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0:
                break
            time.sleep(0.5)
        else:
            raise UnavailableError(
                f"the key of '{subject}' is destroyed, but something holds '{directory}' open, so a copy may be left in its "
                "journal; close it, and restart the server, which clears the journal"
            )
    _settle(directory)


def prune(directory: Path, before: date) -> int:
    """Remove the files of days before `before`; the chain is checked from its new start on. Returns the number of records
    removed. Raises what `verify` raises, and `UnavailableError` while a server writes."""
    report = verify(directory)
    lock = locked(directory)
    if lock is None:
        raise UnavailableError(f"a server writes the audit log in '{directory}'; stop it first")
    with lock, closing(connect(directory)) as database:
        old = [file for file in files_of(directory) if file.stem.removeprefix("audit-") < before.strftime("%Y%m%d")]
        lines = [line for file in old for line in file.read_bytes().splitlines()]
        if not lines:
            return 0
        last = json.loads(lines[-1])
        database.execute("INSERT OR REPLACE INTO marks VALUES ('head', ?, ?)", (report.last, report.head))
        database.execute("INSERT OR REPLACE INTO marks VALUES ('start', ?, ?)", (last["seq"], last["hash"]))
        database.commit()
        for file in old:
            file.unlink()
    with AuditLog(directory) as audit:
        audit.append(Entry("prune", {"before": before.isoformat(), "records": len(lines)}))
    return len(lines)


def _settle(directory: Path) -> None:
    """If no server writes, write the record of an erasure now."""
    lock = locked(directory)
    if lock is None:
        return
    lock.close()
    with AuditLog(directory) as audit:
        audit.flush()


def _unseal(key: bytes, sealed: bytes, context: bytes) -> bytes | None:
    from cryptography.exceptions import InvalidTag

    try:
        return bytes(cipher()(key).decrypt(sealed[:12], sealed[12:], context))
    except InvalidTag:
        return None  # sealed under a key that was erased; the subject came back and has a new one
