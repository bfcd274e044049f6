"""Places of media in a conversation whose template has none for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from ..api.prompt import Message
from .marks import unused_characters

Placeholders = Sequence[tuple[str, str]]  # of each medium, in order: its placeholder, and what comes in its place
Placed = tuple[Sequence[Message], frozenset[str], Placeholders]


def placed(
    messages: Sequence[Message],
    placeholders: Collection[str],
    media: Placeholders,
    has_place: Callable[[str, Collection[str]], bool],
    tools: Sequence[Mapping[str, Any]] = (),
) -> Placed:
    """The messages with texts in the places of those media for whose kind of part the template writes none of the placeholders:
    a character that is nowhere else, which is their placeholder from here on. Returns the messages, the placeholders that are
    new, and the media with them. `has_place(kind, placeholders)`: whether the template writes one of them."""
    kinds = [part["type"] for part in _media_parts(messages)]
    kept = [has_place(kind, placeholders) for kind in kinds]
    if all(kept) or len(kept) != len(media):
        return messages, frozenset(), media
    place, _ = unused_characters([*messages, {"tools": list(tools)}])
    left = iter(kept)

    def changed(part: Mapping[str, Any]) -> Mapping[str, Any]:
        return part if part["type"] == "text" or next(left) else {"type": "text", "text": place}

    shown = [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [changed(part) for part in message["content"]]}
        for message in messages
    ]
    return shown, frozenset({place}), [(own if is_kept else place, text) for is_kept, (own, text) in zip(kept, media)]


def _media_parts(messages: Sequence[Message]) -> Iterator[Mapping[str, Any]]:
    """Those that are no text, in order."""
    for message in messages:
        if isinstance(message.get("content"), list | tuple):
            yield from (part for part in message["content"] if part["type"] != "text")
