"""Files and directories on disk: digests, JSON objects, and replacing a directory as a whole."""

from __future__ import annotations

import ctypes
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import BundleError, ConfigError, MotetError, NotFoundError, UnavailableError

_END = 8  # digits that end the name of a directory beside another
_ANY_END = "[0-9a-f]" * _END
_PATIENCE_S = 30.0
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def directory_digest(path: Path) -> str:
    """SHA-256 over the names and digests of the files in a directory, hexadecimal. Raises `NotFoundError` if there is none."""
    if not path.is_dir():
        raise NotFoundError(f"no directory at '{path}'")
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path)}\0{file_digest(file)}\0".encode())
    return digest.hexdigest()


def read_object(path: Path, remedy: str, error: type[MotetError] = BundleError) -> dict[str, Any]:
    """The JSON object in a file. Raises `error`, which says the `remedy`, for a file that holds something else, however deep."""
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as problem:
        raise error(f"'{path}' is not JSON ({problem}); {remedy}") from problem
    if not isinstance(values, dict):
        raise error(f"'{path}' must hold a JSON object, it holds a {type(values).__name__}; {remedy}")
    return values


def replace_file(path: Path, text: str) -> None:
    """Write a text file in the place of another one, if there is one, as a whole."""
    work = _beside(path, "new")
    try:
        work.write_text(text)
        _sync(work)
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def append_line(path: Path, text: str) -> None:
    """Add a line to a journal, and wait until it is on the disk."""
    with path.open("a") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[bytes]:
    """The whole lines of a journal; none if it is not there. A last line that a kill has left incomplete is cut off the file."""
    if not path.is_file():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    if rest:
        os.truncate(path, path.stat().st_size - len(rest))
    return lines


def check_replaceable(out: Path, marker: str, what: str) -> None:
    """Raises `ConfigError` if `out` exists but lacks the file `marker`, so it is not `what` ("a bundle")."""
    if out.exists() and not (out / marker).is_file():
        raise ConfigError(f"'{out}' exists and is not {what}; choose another directory")


@contextmanager
def new_directory(out: Path, marker: str, what: str) -> Iterator[Path]:
    """An empty directory to write into. When the `with` block ends, it replaces `out` as a whole. If the block
    raises, it is removed and `out` stays as it was. Raises `ConfigError` (see `check_replaceable`, which is asked again at the
    end), and `UnavailableError` if another process, or thread, is writing `out`."""
    out = out.resolve()  # if it is a link, the directory that it points to is replaced
    check_replaceable(out, marker, what)
    out.parent.mkdir(parents=True, exist_ok=True)
    work, lock = _claim(out)
    try:
        yield work
        check_replaceable(out, marker, what)
        put_in_place(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _claim(out: Path) -> tuple[Path, int]:
    """A new directory beside `out`, and the descriptor whose lock says that its writer lives. What a kill left has no lock, and
    is removed. Raises `UnavailableError` if `out` has such a writer already."""
    parent = os.open(out.parent, os.O_RDONLY)
    try:
        until = time.monotonic() + _PATIENCE_S  # the next lines are for one writer after the other, and take a moment
        while _lock(parent) is False:
            if time.monotonic() > until:
                raise UnavailableError(
                    f"another program keeps '{out.parent}' locked; wait for it, or choose another directory"
                )
            time.sleep(0.01)
        for other in out.parent.glob(f".{glob.escape(out.name)}-new-{_ANY_END}"):
            has_writer = _has_writer(other)
            if has_writer:
                raise UnavailableError(
                    f"another process is writing '{out}'; wait until it has ended, or choose another directory"
                )
            if has_writer is False:
                shutil.rmtree(other, ignore_errors=True)
        work = _beside(out, "new")
        work.mkdir()
        descriptor = os.open(work, os.O_RDONLY)
        _lock(descriptor)
        return work, descriptor
    finally:
        os.close(parent)


def _has_writer(directory: Path) -> bool | None:
    """None: that is not known."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:  # it was put in place, or removed
        return None
    try:
        is_locked_now = _lock(descriptor)
        return None if is_locked_now is None else not is_locked_now
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Lock an open directory until it is closed; False: another has locked it; None: the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def put_in_place(work: Path, out: Path) -> None:
    """Replace `out` by the finished directory `work` on the same file system, and wait until it is on the disk.

    A reader sees the old directory or the new one, and a kill at any moment leaves one of them whole at `out`. If two
    directories cannot be exchanged in one step (not Linux, some network file systems), `out` is missing between two
    renames; a kill at that moment leaves the old directory whole beside it, as `.<name>-old-…`.
    """
    for path in (*sorted(work.rglob("*")), work):
        _sync(path)
    if not out.exists():
        os.rename(work, out)
    elif _exchange(work, out):
        shutil.rmtree(work, ignore_errors=True)  # it is the old directory now
    else:
        old = _beside(out, "old")
        os.rename(out, old)
        try:
            os.rename(work, out)
        except BaseException:
            os.rename(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(out.parent)


def remove_directory(path: Path) -> None:
    """Remove a directory. Its name disappears in one step; a kill may leave the rest of it beside, as
    `.<name>-old-…`."""
    old = _beside(path, "old")
    os.rename(path, old)
    shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}-{what}-{secrets.token_hex(_END // 2)}")


def _sync(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two directories in one step (renameat2(2)); False if the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises `UnavailableError` if the file system of `folder` has fewer than `needed` bytes free for `what`. The folder need
    not exist yet."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UnavailableError(
            f"{what} needs {size_text(needed)} in '{folder}', and {size_text(free)} are free; make room, or choose another disk "
            "(MOTET_HOME)"
        )


def size_text(size: int) -> str:
    """A number of bytes as people read it: 1 kB is 1000 bytes."""
    value, unit = float(size), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{size} bytes" if unit == "bytes" else f"{value:.3g} {unit}"
