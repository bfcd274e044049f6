"""Models of the Hugging Face hub: which files a model has, and fetching them so that a fetch that breaks off is continued.

The hub's own client says what there is and who may have it. The bytes are fetched here: the client starts a file again
if a process ended in the middle of it. What its cache has already is taken from there.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BundleError, MotetError, NotFoundError, PermissionDeniedError, UnavailableError, shown

_BUFFER = 2**20
_TRIES, _WAIT_S = 3, 1.0  # of a file, without a byte that came; the wait before another one
_TIMEOUT_S = 10.0  # without an answer, or a byte


@dataclass(frozen=True, slots=True)
class HubFile:
    """`size` in bytes; `sha256` and `git_sha1` (of a small file: the digest of git's blob) as far as the hub says them."""

    name: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on the hub: its revision, and all files of its folder."""

    source: str
    revision: str
    files: tuple[HubFile, ...]


def find_model(source: str) -> HubModel:
    """What the hub has now under `owner/name`. Raises what `translated` makes of the client's errors."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(source, files_metadata=True, timeout=_TIMEOUT_S)
    except Exception as error:  # the hub's client raises many kinds
        raise translated(source, error) from error
    files = []
    for file in info.siblings or ():
        name, digest = file.rfilename, file.lfs.sha256 if file.lfs else None
        if file.size is None:
            raise UnavailableError(f"the hub does not say how large '{name}' of '{source}' is; pull a local directory")
        if re.fullmatch(r"[\w-][\w.-]*", name):  # folders hold other formats
            files.append(HubFile(name, file.size, digest, None if digest else file.blob_id))
    if not info.sha or not re.fullmatch(r"[\w-][\w.-]*", info.sha):
        raise UnavailableError(
            f"the hub names no revision of '{source}', got {shown(info.sha)}; pull a local directory"
        )
    return HubModel(source, info.sha, tuple(files))


def translated(source: str, error: Exception) -> MotetError:
    """The typed error for one of the hub's client."""
    from huggingface_hub import errors

    if isinstance(error, MotetError):
        return error
    if isinstance(error, errors.GatedRepoError):
        return PermissionDeniedError(
            f"'{source}' is gated: accept its terms on the hub's page, and give a token that may read it (HF_TOKEN, or "
            "`hf auth login`)"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return NotFoundError(
            f"the hub has no model '{source}', or it is private: check the name, or give a token that may read it (HF_TOKEN)"
        )
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UnavailableError(f"cannot get '{source}' from the hub: {reason}; pull a local directory instead")


def cached_snapshot(source: str, names: Sequence[str]) -> Path | None:
    """The files of a model that the client's cache has, for a hub that does not answer; None if there is no such."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(names), local_files_only=True))
    except Exception:  # whatever it is, there is none
        return None


def held(model: HubModel, file: HubFile, folder: Path) -> tuple[int, Path | None]:
    """How many bytes of the file are here already, in `folder` or in the client's cache, and where in the cache it is."""
    from huggingface_hub import try_to_load_from_cache

    whole, part = folder / file.name, _part(folder, file)
    if whole.is_file() and whole.stat().st_size == file.size:
        return file.size, None
    cached = try_to_load_from_cache(model.source, file.name, revision=model.revision)
    if isinstance(cached, str) and Path(cached).stat().st_size == file.size:
        return file.size, Path(cached)
    size = part.stat().st_size if part.is_file() else 0
    return (size if size <= file.size else 0), None


def _part(folder: Path, file: HubFile) -> Path:
    return folder / f".{file.name}.part"


def fetch_file(model: HubModel, file: HubFile, folder: Path, on_bytes: Callable[[int], None]) -> Path:
    """Bring one file into `folder`, checked by size and digest. Bytes that an earlier call has left there are not fetched
    again. `on_bytes` gets the number of bytes of each piece, those that were here included.

    Raises `BundleError` if the file is not what the hub has announced: then nothing of it is kept.
    """
    target, part = folder / file.name, _part(folder, file)
    if target.is_file():
        if _is_whole(model, file, target):
            on_bytes(file.size)
            return target
        target.unlink()  # torn, by a machine that went down
    size, cached = held(model, file, folder)
    if cached is not None:
        shutil.copyfile(cached, part)
        if _is_whole(model, file, part):
            on_bytes(file.size)
            return _kept(part, target)
        size = 0  # the cache of the hub's client is torn: fetch it
        part.unlink()
    on_bytes(size)
    if size < file.size or not part.is_file():
        _download(model, file, part, size, on_bytes)
    try:
        _check(model, file, part)
    except BundleError:
        part.unlink()
        raise
    return _kept(part, target)


def _is_whole(model: HubModel, file: HubFile, path: Path) -> bool:
    try:
        _check(model, file, path)
    except BundleError:
        return False
    return True


def _kept(part: Path, target: Path) -> Path:
    """Give a checked file its final name, so that it stays whole if the machine goes down."""
    with part.open("rb") as written:
        os.fsync(written.fileno())
    return part.replace(target)


def _download(model: HubModel, file: HubFile, part: Path, start: int, on_bytes: Callable[[int], None]) -> None:
    """Append to the first `start` bytes of `part` what it lacks. A connection that ends is opened again where it ended."""
    failures = 0
    while True:
        try:
            _append(model, file, part, start, on_bytes)
        except MotetError:
            raise
        except Exception as error:
            after = part.stat().st_size if part.is_file() else 0
            failures = 0 if after > start else failures + 1
            if failures >= _TRIES or not _may_pass(error):
                raise translated(model.source, error) from error
            time.sleep(_WAIT_S * failures)
            start = after
        else:
            return


def _may_pass(error: Exception) -> bool:
    """Whether to try again: a broken connection or a fault of the server, not an answer that says no."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return bool(status >= 500)
    return isinstance(error, ConnectionError | TimeoutError) or not isinstance(error, OSError | ValueError)


def _append(model: HubModel, file: HubFile, part: Path, start: int, on_bytes: Callable[[int], None]) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(model.source, file.name, revision=model.revision)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT_S) as answer:
        hf_raise_for_status(answer)
        if answer.status_code != 206 and start:  # it sends the whole file again
            on_bytes(-start)
            start = 0
        with part.open("r+b" if part.is_file() else "wb") as out:
            out.truncate(start)
            out.seek(start)
            for piece in answer.iter_bytes():  # as they come: what has come is kept when the rest does not
                if out.tell() + len(piece) > file.size:
                    break  # more than announced: the check of the size says so
                out.write(piece)
                on_bytes(len(piece))
            else:
                return
    part.unlink()
    raise BundleError(
        f"the hub sends more than the {file.size} bytes that it announced of '{file.name}'; try again later"
    )


def _check(model: HubModel, file: HubFile, path: Path) -> None:
    size = path.stat().st_size
    digests: list[tuple[str, Any, str | None]] = [
        ("SHA-256", hashlib.sha256(), file.sha256),
        ("git SHA-1", hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), file.git_sha1),
    ]
    if size != file.size:
        raise BundleError(
            f"'{file.name}' of '{model.source}' has {size} bytes, not {file.size}; it is torn; pull it again"
        )
    for name, digest, expected in digests:
        if expected is None:
            continue
        with path.open("rb") as opened:
            while piece := opened.read(_BUFFER):
                digest.update(piece)
        if digest.hexdigest() != expected:
            raise BundleError(
                f"'{file.name}' of '{model.source}' has the {name} {digest.hexdigest()[:12]}…, the hub says {expected[:12]}…; "
                "it is torn or not genuine; pull it again"
            )
