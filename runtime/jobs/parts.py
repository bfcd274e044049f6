"""`Parts`: the results of a job as files of a folder, which may be of an object store. A part is there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet

from ..errors import DataError, InvalidRequestError, UnavailableError

Format = Literal["jsonl", "parquet"]

# Columns of Parquet. What is an object in JSON is a text of JSON there.
_COLUMNS: Mapping[str, pa.DataType] = {
    "id": pa.string(),
    "source": pa.string(),
    "summary": pa.string(),
    "mix": pa.string(),
    "temperatures": pa.string(),
    "prompt_tokens": pa.int64(),
    "completion_tokens": pa.int64(),
    "chunks": pa.int64(),
    "finish_reason": pa.string(),
    "confidence": pa.float64(),
    "abstained": pa.bool_(),
    "error": pa.string(),
    "custom_id": pa.string(),
    "response": pa.string(),
    "key": pa.string(),
}


class Parts:
    """A folder of `part-….jsonl` or `part-….parquet`. `out`: a path, or a URI such as s3://bucket/folder.

    A line is a result; one with a `key` is finished, and one without is tried again. Raises `UnavailableError`, if the folder
    cannot be read or written, and `DataError`, if a part was not written by a job.
    """

    def __init__(self, out: str, format: Format = "jsonl") -> None:
        self.out, self._format = out, format
        try:
            uri = out if "://" in out else Path(out).resolve().as_uri()
            self._files, self._root = pa.fs.FileSystem.from_uri(uri)
            self._files.create_dir(self._root, recursive=True)
        except (OSError, ValueError) as error:
            raise UnavailableError(f"'{out}' cannot be written: {error}") from None

    def write(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add a part, or replace the one of this name."""
        path = f"{self._root}/part-{name}.{self._format}"
        is_local = isinstance(self._files, pa.fs.LocalFileSystem)
        beside = f"{self._root}/.part-{name}.new" if is_local else path  # a store's object appears whole
        try:
            with self._files.open_output_stream(beside) as file:
                if self._format == "parquet":
                    pa.parquet.write_table(_table(lines), file)
                else:
                    file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
            if is_local:
                self._files.move(beside, path)
        except OSError as error:
            raise UnavailableError(f"'{self.out}' cannot be written: {error}") from None

    def lines(self) -> Iterator[dict[str, Any]]:
        """The results of all parts."""
        for path in self._paths():
            yield from self._read(path)

    def keep_finished(self) -> set[str]:
        """The keys of the finished results. Results that are to be tried again are removed. Nothing is touched if any part was
        not written by a job."""
        keys: set[str] = set()
        parts = {path: list(self._read(path)) for path in self._paths()}
        for path, lines in parts.items():
            finished = [line for line in lines if line.get("key")]
            keys.update(line["key"] for line in finished)
            if not finished:
                self._files.delete_file(path)
            elif len(finished) < len(lines):
                name, _, ending = path.rpartition("/")[2].removeprefix("part-").rpartition(".")
                Parts(self.out, "parquet" if ending == "parquet" else "jsonl").write(name, finished)
        return keys

    def _paths(self) -> list[str]:
        try:
            found = self._files.get_file_info(pa.fs.FileSelector(self._root))
        except OSError as error:
            raise UnavailableError(f"'{self.out}' cannot be read: {error}") from None
        names = [info.path for info in found if info.is_file]
        return sorted(
            p for p in names if p.rpartition("/")[2].startswith("part-") and p.endswith((".jsonl", ".parquet"))
        )

    def _read(self, path: str) -> Iterator[dict[str, Any]]:
        try:
            if path.endswith(".parquet"):
                for row in pa.parquet.read_table(path, filesystem=self._files).to_pylist():
                    yield _checked({name: _from_cell(name, value) for name, value in row.items() if value is not None})
                return
            with self._files.open_input_stream(path) as file:
                for line in file.read().splitlines():
                    yield _checked(json.loads(line))
        except OSError as error:
            raise UnavailableError(f"'{path}' cannot be read: {error}") from None
        except (ValueError, pa.ArrowException) as error:
            raise DataError(f"'{path}' was not written by a job: {error}; choose another folder") from None


def check_places(source: str, out: str) -> None:
    """Raises `InvalidRequestError` if a job would write into what it reads, or take what it reads for its results."""
    if "://" in source or "://" in out:
        is_wrong = source.rstrip("/") == out.rstrip("/") or source.startswith(out.rstrip("/") + "/")
    else:
        read, written = Path(source).resolve(), Path(out).resolve()
        is_wrong = read == written or written in read.parents or (read.is_dir() and read in written.parents)
    if is_wrong:
        raise InvalidRequestError(
            f"the input '{source}' and the output '{out}' must not lie in each other; choose another output"
        )


def _checked(line: Any) -> dict[str, Any]:
    """Raises `ValueError` unless a job has written it."""
    has = line.keys() if isinstance(line, dict) else set()
    if ({"id", "source"} <= has and has & {"summary", "error"}) or {"custom_id", "response"} <= has:
        return dict(line)
    raise ValueError("it holds a line that is no result")


def _table(lines: Sequence[Mapping[str, Any]]) -> pa.Table:
    names = [name for name in _COLUMNS if any(name in line for line in lines)]
    rows = [
        {
            name: json.dumps(value, ensure_ascii=False) if isinstance(value := line.get(name), dict) else value
            for name in names
        }
        for line in lines
    ]
    return pa.Table.from_pylist(rows, pa.schema([(name, _COLUMNS[name]) for name in names]))


def _from_cell(name: str, value: Any) -> Any:
    return json.loads(value) if name in ("mix", "temperatures", "error", "response") else value
