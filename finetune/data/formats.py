"""Reading examples from files: JSONL, Parquet and plain text.

A JSONL or Parquet record has `prompt` and `completion`, or chat `messages` of which the last is the assistant's. It may
have an `id`, which must be unique, and a `source`, the document that it comes from (default: the id, else the record's
number). Plain text (.txt, .md, .rst, or a folder of them) is cut between paragraphs; it is all answer, without a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...runtime.errors import DataError, NotFoundError
from .built_in import BUILT_IN
from .example import Example, user

EXPECTED = '{"prompt": text, "completion": text} or {"messages": [{"role", "content"}, …, the answer]}'
TEXT_SUFFIXES = (".txt", ".md", ".rst")
_TEXT_CHARACTERS = 1000  # a piece of plain text ends with the paragraph that reaches this length


def read_examples(path: Path) -> Iterator[Example]:
    """The examples of a file or folder; the suffix tells the format.

    Raises `NotFoundError`, and `DataError`, which names the record.
    """
    if path.suffix == ".parquet" and path.is_file():
        yield from _parquet_examples(path)
    elif path.suffix in TEXT_SUFFIXES and path.is_file():
        yield from _text_examples(path, path.name)
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
        if not files:
            raise NotFoundError(f"the folder '{path}' has no text file ({', '.join(TEXT_SUFFIXES)})")
        for file in files:
            yield from _text_examples(file, str(file.relative_to(path)))
    elif path.is_file():
        yield from _jsonl_examples(path)
    else:
        raise NotFoundError(f"there is no file '{path}'; data is JSONL, Parquet, text, or one of {', '.join(BUILT_IN)}")


def _jsonl_examples(path: Path) -> Iterator[Example]:
    seen: dict[str, str] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _line_example(line, f"{path}, line {number}", str(number), seen)


def _line_example(line: bytes, where: str, source: str, seen: dict[str, str]) -> Example:
    try:
        record: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}; expected {EXPECTED}") from error
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); expected {EXPECTED}") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a {type(record).__name__}; expected {EXPECTED}")
    return _example(record, where, source, seen)


def _example(record: dict[str, Any], where: str, source: str, seen: dict[str, str]) -> Example:
    """Check a record and make its example. `seen`: id → where it was read; the record's id is added."""
    if record.get("id") is not None:
        identity = str(record["id"])
        if identity in seen:
            raise DataError(f"{where}: the id '{identity}' is also at {seen[identity]}; ids must be unique")
        seen[identity] = where
    source = str(record.get("source") or record.get("id") or source)
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        if not record["completion"].strip():
            raise DataError(f"{where}: the completion is empty; expected {EXPECTED}")
        return Example(user(record["prompt"]), record["completion"], source)
    messages = record.get("messages")
    if isinstance(messages, list) and len(messages) >= 2 and all(_is_message(message) for message in messages):
        if messages[-1]["role"] != "assistant":
            raise DataError(f"{where}: the last message must be the assistant's; expected {EXPECTED}")
        pairs = ({"role": message["role"], "content": message["content"]} for message in messages)
        *conversation, answer = pairs
        return Example(tuple(conversation), answer["content"], source)
    raise DataError(f"{where}: has the keys {sorted(record)}; expected {EXPECTED}")


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _parquet_examples(path: Path) -> Iterator[Example]:
    import pyarrow
    import pyarrow.parquet

    seen: dict[str, str] = {}
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    present = {key: value for key, value in record.items() if value is not None}
                    yield _example(present, f"{path}, row {number}", str(number), seen)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"'{path}' is no Parquet file, or damaged after row {number}: {error}") from error


def _text_examples(path: Path, name: str) -> Iterator[Example]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}': not UTF-8 at byte {error.start}") from error
    piece: list[str] = []
    for paragraph in (part.strip() for part in text.split("\n\n")):
        if paragraph:
            piece.append(paragraph)
        if sum(map(len, piece)) >= _TEXT_CHARACTERS:
            yield Example((), "\n\n".join(piece), name)
            piece = []
    if piece:
        yield Example((), "\n\n".join(piece), name)
