"""The records of a job: what is read (a folder of text files, or JSONL) and what an earlier run has written.

A record that cannot be read is one with an `error`; the others are read all the same.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, InvalidRequestError, MotetError
from ..text.documents import decode_text

TEXT_FILES = (".txt", ".md", ".rst", ".py")
_FIRST_BYTES = b'{"id": "'  # of every line that a job writes


@dataclass(frozen=True, slots=True)
class Record:
    """A document of the input, or a request in JSON, which `endpoint` answers. `number` is its place there, from 1; `source`
    says where it stands."""

    number: int
    id: str
    source: str
    text: str = ""
    error: MotetError | None = None
    endpoint: str = ""


# ---- input -----------------------------------------------------------------------------------------------------------


def count_records(in_path: Path) -> int:
    """The number of records that `read_records` yields. Raises `OSError`."""
    if in_path.is_dir():
        return sum(1 for _ in _files(in_path))
    with in_path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def read_records(in_path: Path, *, with_requests: bool = False) -> Iterator[Record]:
    """The records of a folder, in the order of their paths, or of a JSONL file; `with_requests`: its lines may be those of
    OpenAI's batch API. Raises `OSError` if the input itself cannot be read."""
    if in_path.is_dir():
        for number, (path, error) in enumerate(_files(in_path), 1):
            yield _path_record(number, path, in_path, error)
        return
    with in_path.open("rb") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for count, (number, line) in enumerate(lines, 1):
            place = f"line {number}", f"line-{number}", f"{_shown(in_path.name)}:{number}"
            yield line_record(count, line, *place, with_requests=with_requests)


def _files(folder: Path) -> Iterator[tuple[Path, OSError | None]]:
    """The text files below a folder, and the folders there that cannot be listed."""
    failed: list[OSError] = []
    found: list[tuple[Path, OSError | None]] = []
    for place, _, names in os.walk(folder, onerror=failed.append):
        found += [(Path(place, name), None) for name in names if name.endswith(TEXT_FILES)]
    found += [(Path(error.filename), error) for error in failed]
    yield from sorted(found, key=lambda item: item[0])


def _path_record(number: int, path: Path, folder: Path, error: OSError | None) -> Record:
    name, source = _shown(path.relative_to(folder)), _shown(path)
    try:
        if error is not None:
            raise error
        if not path.is_file():  # reading a pipe would wait for its writer
            raise DataError(f"'{name}' is not a file, or a link to nothing")
        return file_record(number, name, source, path.read_bytes())
    except DataError as reason:
        return Record(number, name, source, error=reason)
    except OSError as reason:
        return Record(number, name, source, error=DataError(f"'{name}' cannot be read: {reason.strerror}"))


def file_record(number: int, name: str, source: str, content: bytes) -> Record:
    """A whole file as a record."""
    try:
        return text_record(number, name, source, decode_text(content, f"'{name}'"))
    except DataError as reason:
        return Record(number, name, source, error=reason)


def line_record(number: int, line: bytes, what: str, name: str, source: str, *, with_requests: bool = False) -> Record:
    """A line of JSONL as a record. `what` is the line in an error's words; `name`: its id if it has none."""
    try:
        text = decode_text(line, what)
        try:
            values: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{what} is not JSON: {error}") from error
        if with_requests and isinstance(values, dict) and "custom_id" in values:
            return _request_record(number, values, what, name, source)
        if not isinstance(values, dict) or not isinstance(values.get("text"), str):
            raise DataError(f'{what} must be an object with a "text" string')
        given = values.get("id", name)
        if not isinstance(given, str | int) or isinstance(given, bool) or not _is_unicode(str(given)):
            raise DataError(f"the id in {what} must be an integer or valid Unicode text, got {given!a:.80}")
    except DataError as error:
        return Record(number, name, source, error=error)
    return text_record(number, str(given), source, values["text"])


def _request_record(number: int, values: dict[str, Any], what: str, name: str, source: str) -> Record:
    kinds = {"custom_id": str, "url": str, "body": dict}
    if not all(isinstance(values.get(field), kind) for field, kind in kinds.items()):
        raise DataError(f"{what} must have custom_id and url, which are strings, and body, an object")
    if not _is_unicode(values["custom_id"]):
        raise DataError(f"the custom_id in {what} is not valid Unicode")
    return Record(number, values["custom_id"], source, json.dumps(values["body"]), endpoint=values["url"])


def text_record(number: int, name: str, source: str, text: str) -> Record:
    """A text as a record, which has an error if it is empty or no Unicode."""
    error = None
    if not _is_unicode(text):
        error = DataError(f"the text of '{name}' is not valid Unicode: it has half of a surrogate pair")
    elif not text.strip():
        error = DataError(f"the text of '{name}' is empty")
    return Record(number, name, source, "" if error else text, error)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(path: Path | str) -> str:
    """A path as text; bytes of a name that are not UTF-8 are written as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


# ---- output ----------------------------------------------------------------------------------------------------------


def check_output(in_path: Path, out_path: Path) -> None:
    """Raises `InvalidRequestError` if `out_path` is the input, would be read as part of it, or is no file."""
    out, source = out_path.resolve(), in_path.resolve()
    if out_path.exists() and not out_path.is_file():
        raise InvalidRequestError(f"the output '{_shown(out_path)}' exists and is not a file; choose another")
    if out == source or (out_path.exists() and out_path.samefile(in_path)):
        raise InvalidRequestError(f"the output '{_shown(out_path)}' must be a file other than the input")
    if source in out.parents and out.name.endswith(TEXT_FILES):
        raise InvalidRequestError(
            f"the output '{_shown(out_path)}' would be read as a text of the input folder; choose a name such as out.jsonl"
        )


def keep_finished(out_path: Path) -> set[str]:
    """The keys of the finished records of an earlier run. Failed records, which are tried again, and a last line that
    a killed run left incomplete are removed from the file.

    Raises `InvalidRequestError`, and leaves the file as it is, if a line was not written by a job; `OSError`.
    """
    if not out_path.exists():
        out_path.parent.mkdir(parents=True, exist_ok=True)
        return set()
    out_path = out_path.resolve()  # a link stays a link
    keys: set[str] = set()
    with tempfile.NamedTemporaryFile(dir=out_path.parent, prefix=f".{out_path.name}-", delete=False) as kept:
        try:
            with out_path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    key = _key_of(line, number, out_path)
                    if key is not None:
                        keys.add(key)
                        kept.write(line)
            kept.flush()
            os.chmod(kept.name, out_path.stat().st_mode)
            os.replace(kept.name, out_path)
        except BaseException:
            os.unlink(kept.name)
            raise
    return keys


def _key_of(line: bytes, number: int, path: Path) -> str | None:
    """The key of a finished record; None for a failed one and for an incomplete line."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
        if not line.endswith(b"\n") and line[: len(_FIRST_BYTES)] == _FIRST_BYTES[: len(line)]:
            return None
    if isinstance(values, dict) and {"id", "source"} <= values.keys():
        if isinstance(values.get("error"), dict):
            return None
        if isinstance(values.get("key"), str) and isinstance(values.get("summary"), str):
            return values["key"] if line.endswith(b"\n") else None
    raise InvalidRequestError(
        f"line {number} of '{_shown(path)}' was not written by a job, so the file is left as it is; "
        "choose another output"
    )
