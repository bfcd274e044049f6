"""`Example`: one conversation and its answer. Everything that reads data makes these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...runtime.api.prompt import Message

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation without its answer (none for plain text), the answer, and the document that it comes from."""

    messages: tuple[Message, ...]
    completion: str
    source: str

    @property
    def prompt(self) -> str:
        return "\n\n".join(message["content"] for message in self.messages)


def user(text: str) -> tuple[Message, ...]:
    """A conversation of one message."""
    return ({"role": "user", "content": text},)
