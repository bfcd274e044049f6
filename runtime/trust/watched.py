"""`Watched`: a value that is read from files, and read again when they have changed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from ..errors import MotetError

log = logging.getLogger("motet.trust")
T = TypeVar("T")


class Watched(Generic[T]):
    """Thread-safe. The files are looked at whenever the value is asked for, which costs some microseconds.

    What `read` raises at construction is raised. Later a change that cannot be read leaves the value as it is, and is logged:
    a server goes on with the keys that it has.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T], what: str) -> None:
        self._paths, self._read, self._what = tuple(paths), read, what
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._value = read()

    @property
    def value(self) -> T:
        self.refresh()
        return self._value

    def refresh(self) -> bool:
        """Read the files again if they have changed; whether there is a new value."""
        with self._lock:
            stamp = self._stamp()
            if stamp == self._seen:
                return False
            self._seen = stamp
            try:
                self._value = self._read()
            except (MotetError, OSError, ValueError) as error:
                log.error("%s: the changed files are not used: %s", self._what, error)
                return False
            log.info("%s: read again", self._what)
            return True

    def _stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        stamps: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                found = path.stat()
                stamps.append((found.st_mtime_ns, found.st_size, found.st_ino))
            except OSError:
                stamps.append(None)
        return tuple(stamps)
