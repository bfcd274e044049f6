"""Images and sounds in records: paths of files, relative to the file of records, become parts of messages."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...runtime.api.prompt import Message
from ...runtime.errors import DataError, shown
from ...runtime.model.files import file_digest
from .example import MediaPath, parts_of

KINDS = ("image", "audio")  # in the order in which they come before a message's text


def with_media(messages: Sequence[Message], record: Mapping[str, Any], folder: Path, where: str) -> list[Message]:
    """The messages with the record's `image` and `audio` before the text of the first user message, images first. Raises
    `DataError`."""
    files = [file for kind in KINDS if kind in record for file in _files(record[kind], kind, folder, where)]
    if not files:
        return list(messages)
    index = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if index is None:
        raise DataError(
            f"{where}: media come before the text of the first user message, and the record has none; add one"
        )
    parts = [*map(_part, files), *parts_of(messages[index])]
    return [*messages[:index], {**messages[index], "content": parts}, *messages[index + 1 :]]


def read_parts(content: Sequence[Any], role: str, folder: Path, where: str) -> str | list[Mapping[str, Any]]:
    """The content of a message that is given as parts: {"type": "text", "text"}, {"type": "image", "image": path} or the same
    for audio. Parts of text alone are one text; a user's
    must be one part. Raises `DataError`."""
    parts: list[Mapping[str, Any]] = []
    for part in content:
        given = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {}
        kind = given.get("type")
        if kind == "text" and set(given) == {"type", "text"} and isinstance(given["text"], str):
            parts.append(given)
        elif kind in KINDS and set(given) == {"type", kind} and isinstance(given[kind], str):
            if role != "user":
                raise DataError(f"{where}: the message of role {role} holds an {kind}; only a user's may")
            parts.append(_part(_file(given[kind], kind, folder, where)))
        else:
            found = {key: type(value).__name__ for key, value in given.items()} if given else type(part).__name__
            raise DataError(
                f'{where}: a part of a content is {{"type": "text", "text": text}}, {{"type": "image", "image": path}} or '
                f'{{"type": "audio", "audio": path}}, got {shown(found)}'
            )
    if not parts:
        raise DataError(f"{where}: the content has no parts; give it a text")
    if any(part["type"] != "text" for part in parts):
        return parts
    if len(parts) > 1 and role == "user":  # a server joins these as the model's template would
        raise DataError(f"{where}: the content is {len(parts)} texts and no media; join them to one text")
    return "".join(part["text"] for part in parts)


def _part(file: MediaPath) -> Mapping[str, Any]:
    return {"type": file.kind, file.kind: file}


def _files(value: Any, kind: str, folder: Path, where: str) -> list[MediaPath]:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        raise DataError(f"{where}: {kind} is the path of a file or a list of paths, got {shown(value)}")
    return [_file(path, kind, folder, where) for path in paths]


def _file(text: str, kind: str, folder: Path, where: str) -> MediaPath:
    path = folder / text
    try:
        if not path.is_file():
            raise DataError(
                f"{where}: there is no file '{path}' for the {kind}; paths are relative to the file of records"
            )
        status = path.stat()
        return MediaPath(kind, _digest(path, status.st_mtime_ns, status.st_size), path)
    except (OSError, ValueError) as error:  # a path may hold a zero byte, or be too long
        raise DataError(f"{where}: the {kind} {shown(text)} cannot be read: {error}") from error


@functools.lru_cache(2**16)
def _digest(path: Path, _changed: int, _size: int) -> str:
    return file_digest(path)
