"""What a message holds beside text, as a prompt needs it: a text of placeholders, and the rows that stand for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import InvalidRequestError

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class MediaFile:
    """What a part of a message brings. `medium`: what it is, such as image; `media_type`: what its sender says that its file is,
    or ""."""

    medium: str
    content: bytes
    media_type: str = ""


class Medium(Protocol):
    """One of them, of which the header is read; its content is not yet decoded or encoded."""

    @property
    def token(self) -> str:
        """Its placeholder: what a chat template writes where it stands."""
        ...

    @property
    def token_id(self) -> int:
        """The placeholder's id."""
        ...

    @property
    def text(self) -> str:
        """What the prompt has in its place, placeholders among it."""
        ...

    @property
    def runs(self) -> Sequence[int]:
        """Lengths of its runs of placeholders, in order."""
        ...

    @property
    def digest(self) -> bytes:
        """Of its content, and of what it is made into rows with."""
        ...

    def encode(self, salt: bytes) -> Sequence[F32]:
        """The rows of each run, [placeholders, hidden]. `salt`: only callers with the same one share what is kept. Raises
        `InvalidRequestError` for content that cannot be decoded, and `UnavailableError`."""
        ...


class MediaReader(Protocol):
    """Thread-safe."""

    @property
    def placeholders(self) -> Mapping[str, int]:
        """Those of all media that the model knows, and their ids."""
        ...

    @property
    def media(self) -> Sequence[str]:
        """What a request may have, such as image."""
        ...

    @property
    def most_bytes(self) -> int:
        """Of all media of a request; 0: it may have none."""
        ...

    def read(self, files: Sequence[MediaFile]) -> Sequence[Medium]:
        """The media of all prompts of a request; equal ones are read once, their headers alone. Raises `InvalidRequestError`,
        also for more or larger ones than are allowed, which is asked before anything is read, and `UnavailableError`."""
        ...

    def close(self) -> None: ...


class NoMedia:
    """A `MediaReader` for a server that takes text only, for this reason."""

    placeholders: Mapping[str, int] = MappingProxyType({})
    media = ()
    most_bytes = 0

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def read(self, files: Sequence[MediaFile]) -> Sequence[Medium]:
        """Raises `InvalidRequestError` for anything."""
        if files:
            raise InvalidRequestError(f"messages may hold text only here: {self._reason}", field="messages.content")
        return []

    def close(self) -> None:
        """There is nothing to free."""
