"""Reading examples from files: JSONL, a JSON array, Parquet and plain text.

A record of JSONL, JSON or Parquet has one of these, the first that it has:

    messages                chat messages, {"role", "content"}, of which the last is the assistant's
    conversations           the same as ShareGPT writes it: {"from", "value"}, and perhaps `system`
    prompt, completion      texts, or both lists of messages
    instruction, output     Alpaca's, and perhaps `input`, `system`, `history` (pairs of instruction and output)
    text                    plain text: all of it is the answer

It may have an `id`, which must be unique, and a `source`, the document that it comes from (default: the id, else its media,
else the record's number). It may have `image` and `audio`, paths of files (see `media_parts`). An answer must have text.
Plain text files (.txt, .md, .rst, or a folder of them) are cut between paragraphs. A byte order mark at the start of a file
is left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...runtime.api.prompt import Message
from ...runtime.errors import DataError, NotFoundError
from .built_in import BUILT_IN
from .example import Example, user
from .media_parts import KINDS, read_parts, with_media

EXPECTED = (
    '{"prompt": text, "completion": text}, {"messages": [{"role", "content"}, …, the answer]}, '
    '{"conversations": [{"from", "value"}, …]}, {"instruction", "input", "output"} or {"text": text}'
)
TEXT_SUFFIXES = (".txt", ".md", ".rst")
_TEXT_CHARACTERS = 1000  # a piece of plain text ends with the paragraph that reaches this length
_ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool", **{role: role for role in _ROLES}
}  # fmt: skip


def read_examples(path: Path) -> Iterator[Example]:
    """The examples of a file or folder; the suffix tells the format.

    Raises `NotFoundError`, and `DataError`, which names the record.
    """
    try:
        if path.is_dir():
            yield from _folder_examples(path)
        elif not path.is_file():
            raise NotFoundError(
                f"there is no file '{path}'; data is JSONL, JSON, Parquet, text, or one of {', '.join(BUILT_IN)}"
            )
        elif path.suffix in TEXT_SUFFIXES:
            yield from _text_examples(path, path.name)
        else:
            records = _parquet_records(path) if path.suffix == ".parquet" else _json_records(path)
            yield from _record_examples(records, path.parent)
    except OSError as error:
        raise DataError(f"'{error.filename or path}' cannot be read: {error.strerror or error}") from error


def _folder_examples(path: Path) -> Iterator[Example]:
    files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
    if not files:
        raise NotFoundError(f"the folder '{path}' has no text file ({', '.join(TEXT_SUFFIXES)})")
    for file in files:
        name = os.fsencode(file.relative_to(path)).decode("utf-8", "backslashreplace")  # a name may be any bytes
        yield from _text_examples(file, name)


def _record_examples(records: Iterator[tuple[str, dict[str, Any]]], folder: Path) -> Iterator[Example]:
    seen: dict[str, str] = {}
    for number, (where, record) in enumerate(records, 1):
        yield _example(record, where, str(number), seen, folder)


def _json_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of each line, or of each element if the file is one JSON array."""
    with path.open("rb") as file:
        is_array = path.suffix == ".json" and file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        file.seek(0)
        if is_array:
            for number, record in enumerate(_parsed(file.read(), str(path)), 1):
                yield f"{path}, record {number}", _object(record, f"{path}, record {number}")
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _object(_parsed(line, where), where)


def _parsed(text: bytes, where: str) -> Any:
    try:
        value = json.loads(text.decode("utf-8-sig"))
        if b"\\u" in text:  # JSON can write half of a surrogate pair, which is no text
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}; expected {EXPECTED}") from error
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {error.object[error.start]!a} is half of a surrogate pair and no character; write the whole "
            "pair, or leave it out"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); expected {EXPECTED}") from error
    return value


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f"{where}: a {type(record).__name__}; expected {EXPECTED}")
    return {key: value for key, value in record.items() if value is not None}


def _parquet_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    yield f"{path}, row {number}", _object(record, f"{path}, row {number}")
                    number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' is no Parquet file, or damaged after row {number}: {error}") from error


def _example(record: dict[str, Any], where: str, number: str, seen: dict[str, str], folder: Path) -> Example:
    """Check a record and make its example. `seen`: id → where it was read; the record's id is added. `folder`: that of the
    records' file, to which paths are relative."""
    if "id" in record:
        identity = str(record["id"])
        if identity in seen:
            raise DataError(f"{where}: the id '{identity}' is also at {seen[identity]}; ids must be unique")
        seen[identity] = where
    source = next((str(record[key]) for key in ("source", "id") if str(record.get(key, "")) != ""), "")
    if record.keys() >= {"text"} and not _conversation_keys(record):
        if record.keys() & set(KINDS):
            raise DataError(f"{where}: a plain text has no message for an image or audio; write a conversation")
        source = source or number
        return Example((), _answer(_text(record, "text", where), where), source)
    if record.get("tools"):
        raise DataError(f"{where}: 'tools' is not supported; describe them in the system message, or leave them out")
    *conversation, last = _conversation(record, where, folder)
    if last["role"] != "assistant":
        raise DataError(f"{where}: the last message must be the assistant's; expected {EXPECTED}")
    if not conversation:
        raise DataError(f"{where}: there is an answer, but no message before it; expected {EXPECTED}")
    conversation = with_media(conversation, record, folder, where)
    example = Example(tuple(conversation), _answer(last["content"], where), source)
    by_media = " ".join(file.digest for file in example.media)  # records about the same files are one document
    return example if source else replace(example, source=by_media or number)


def _conversation_keys(record: dict[str, Any]) -> str:
    """The keys by which a record says which format it has; empty if it has none of a conversation."""
    for keys in ("messages", "conversations", "prompt completion", "instruction output"):
        if record.keys() >= set(keys.split()):
            return keys
    return ""


def _conversation(record: dict[str, Any], where: str, folder: Path) -> list[Message]:
    keys = _conversation_keys(record)
    if keys == "messages":
        return _messages(record, "messages", where, folder)
    if keys == "conversations":
        return [*_system(record, where), *_messages(record, "conversations", where, folder)]
    if keys == "prompt completion":
        if isinstance(record["prompt"], list):
            return _messages(record, "prompt", where, folder) + _messages(record, "completion", where, folder)
        return [*user(_text(record, "prompt", where)), _assistant(_text(record, "completion", where))]
    if keys == "instruction output":
        return _alpaca(record, where)
    raise DataError(f"{where}: has the keys {sorted(record)}; expected {EXPECTED}")


def _alpaca(record: dict[str, Any], where: str) -> list[Message]:
    messages = list(_system(record, where))
    history = record.get("history", [])
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    ):
        raise DataError(f"{where}: history must be a list of [instruction, output]")
    for instruction, output in history:
        messages += [*user(instruction), _assistant(output)]
    parts = [_text(record, "instruction", where), _text({"input": "", **record}, "input", where)]
    return [*messages, *user("\n\n".join(part for part in parts if part)), _assistant(_text(record, "output", where))]


def _system(record: dict[str, Any], where: str) -> list[Message]:
    text = _text({"system": "", **record}, "system", where)
    return [{"role": "system", "content": text}] if text else []


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _messages(record: dict[str, Any], key: str, where: str, folder: Path) -> list[Message]:
    found = record[key]
    if not isinstance(found, list) or not found:
        raise DataError(f"{where}: {key} must be a list of messages; expected {EXPECTED}")
    return [_message(message, f"{where}, {key} {number}", folder) for number, message in enumerate(found, 1)]


def _message(message: Any, where: str, folder: Path) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{where}: a {type(message).__name__}; a message is an object with role and content")
    given = {key: value for key, value in message.items() if value is not None}
    role = given.pop("role", None) or _SHAREGPT_ROLES.get(str(given.get("from")))
    content = given.pop("content", given.get("value"))
    if role not in _ROLES or not isinstance(content, str | list):
        raise DataError(
            f"{where}: a message has a role (one of {', '.join(_ROLES)}) and a content, a text or parts; ShareGPT's have from "
            f"(one of {', '.join(_SHAREGPT_ROLES)}) and value; got {sorted(map(str, message))}, role "
            f"{message.get('role', message.get('from'))!r}"
        )
    for key in ("tool_calls", "weight"):
        if key in given:
            raise DataError(
                f"{where}: '{key}' of a message is not supported; write calls as the content, or leave it out"
            )
    return {"role": role, "content": content if isinstance(content, str) else read_parts(content, role, folder, where)}


def _text(record: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(record[key], str):
        raise DataError(f"{where}: {key} must be a text, got a {type(record[key]).__name__}; expected {EXPECTED}")
    return str(record[key])


def _answer(text: str, where: str) -> str:
    if not text.strip():
        raise DataError(f"{where}: the answer is empty; remove the record, or give it an answer")
    return text


def _text_examples(path: Path, name: str) -> Iterator[Example]:
    try:
        text = path.read_text(encoding="utf-8-sig")
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
