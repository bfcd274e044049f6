"""`FileStore`: files of requests that clients upload before they make a job of them."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from ...errors import DataError, InvalidRequestError, NotFoundError, UnavailableError, shown

MAX_FILE_BYTES = 200 * 2**20
MAX_TENANT_BYTES = 2**30
MAX_TENANT_FILES = 1000
MAX_LINE_BYTES = 2 * 2**20
_COPIED = 2**20  # bytes at once


@dataclass(frozen=True, slots=True)
class StoredFile:
    id: str
    tenant: str
    name: str
    size: int  # bytes
    created: float  # seconds since 1970


class FileStore:
    """Each file is its content and a JSON file of what it is. Its methods block."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._adding = Lock()  # so that two together do not exceed what one may
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in directory.iterdir():  # what a killed process has begun
            if path.suffix != ".json" and not path.with_suffix(".json").is_file():
                path.unlink(missing_ok=True)

    def add(self, tenant: str, name: str, content: BinaryIO) -> StoredFile:
        """Raises `InvalidRequestError` (too large), `UnavailableError` (the disk)."""
        with self._adding:
            return self._add(tenant, name, content)

    def _add(self, tenant: str, name: str, content: BinaryIO) -> StoredFile:
        files = self.files(tenant)
        if len(files) >= MAX_TENANT_FILES:
            raise InvalidRequestError(f"{len(files)} files are kept, the limit of a tenant; delete some", field="file")
        held = sum(file.size for file in files)
        id, size = f"file-{uuid.uuid4().hex}", 0
        path = self._directory / id
        try:
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as target:
                while piece := content.read(_COPIED):
                    size += len(piece)
                    if size > MAX_FILE_BYTES or held + size > MAX_TENANT_BYTES:
                        raise InvalidRequestError(
                            f"a file has at most {MAX_FILE_BYTES} bytes, and all of a tenant {MAX_TENANT_BYTES}; divide it, or "
                            "delete others",
                            field="file",
                        )
                    target.write(piece)
            found = StoredFile(id, tenant, name[:200], size, time.time())
            beside = path.with_suffix(".tmp")  # a torn description must not be read
            beside.write_text(json.dumps(asdict(found)))
            os.replace(beside, path.with_suffix(".json"))
            return found
        except OSError as error:
            path.unlink(missing_ok=True)
            raise UnavailableError(f"the file cannot be kept: {error.strerror}") from None
        except InvalidRequestError:
            path.unlink(missing_ok=True)
            raise

    def get(self, id: str, tenant: str) -> StoredFile:
        """Raises `NotFoundError`, also for another tenant's."""
        if id.startswith("file-") and id[5:].isalnum() and id.isascii():
            found = _read(self._directory / f"{id}.json")
            if found is not None and found.tenant == tenant:
                return found
        raise NotFoundError(f"there is no file {shown(id)}")

    def files(self, tenant: str) -> list[StoredFile]:
        """The newest first."""
        found = map(_read, self._directory.glob("file-*.json"))
        mine = [file for file in found if file is not None and file.tenant == tenant]
        return sorted(mine, key=lambda file: -file.created)

    def delete(self, id: str, tenant: str) -> None:
        """Raises `NotFoundError`."""
        path = self._directory / self.get(id, tenant).id
        path.with_suffix(".json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def lines(self, id: str, tenant: str) -> Iterator[bytes]:
        """Raises `NotFoundError`, `DataError` (a line that is too long)."""
        with (self._directory / self.get(id, tenant).id).open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(f"a line of the file has more than {MAX_LINE_BYTES} bytes; requests are smaller")
                yield line

    def content(self, id: str, tenant: str) -> Iterator[bytes]:
        """Its bytes, in pieces. Raises `NotFoundError`."""
        with (self._directory / self.get(id, tenant).id).open("rb") as file:
            while piece := file.read(_COPIED):
                yield piece


def _read(path: Path) -> StoredFile | None:
    """None for what is not there, or no such file."""
    try:
        return StoredFile(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
