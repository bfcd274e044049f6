"""`Example`: one conversation and its answer, whatever it was read from; `MediaPath`: what a message holds beside text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...runtime.api.prompt import Message

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class MediaPath:
    """A file of a message: its kind, a name of `runtime.model.encoders` such as "image", and the SHA-256 of its content. Files
    with the same content are equal."""

    kind: str
    digest: str
    path: Path = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Example:
    """`messages` is the conversation (empty for plain text), `completion` the answer, `source` the document's name. A message's
    content is a text, or parts: {"type": "text", "text"}, or {"type": kind, kind: MediaPath}."""

    messages: tuple[Message, ...]
    completion: str
    source: str

    @property
    def prompt(self) -> str:
        """All that the messages say in words."""
        return "\n\n".join(text_of(message) for message in self.messages)

    @property
    def media(self) -> list[MediaPath]:
        """In the order of the messages and their parts."""
        return [file for message in self.messages for part in parts_of(message) if (file := file_of(part)) is not None]


def user(text: str) -> tuple[Message, ...]:
    """A conversation of one user message."""
    return ({"role": "user", "content": text},)


def parts_of(message: Message) -> list[Mapping[str, Any]]:
    """The content of a message as parts."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def file_of(part: Mapping[str, Any]) -> MediaPath | None:
    """None for a text."""
    return None if part["type"] == "text" else part[part["type"]]


def text_of(message: Message) -> str:
    """What a message says in words."""
    return "\n".join(part["text"] for part in parts_of(message) if part["type"] == "text")
