"""`Example`: one conversation and its answer, whatever it was read from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...runtime.api.prompt import Message

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Example:
    """`messages` is the conversation (empty for plain text), `completion` the answer, `source` the document's name."""

    messages: tuple[Message, ...]
    completion: str
    source: str

    @property
    def prompt(self) -> str:
        return "\n\n".join(message["content"] for message in self.messages)


def user(text: str) -> tuple[Message, ...]:
    """A conversation of one user message."""
    return ({"role": "user", "content": text},)
