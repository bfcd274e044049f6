"""Control tokens that a caller's texts spell: found, and marked as plain text, so that only a template writes commands."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from ..errors import InvalidRequestError

Marks = tuple[str, str]  # characters before and after a control token that is plain text
_Json = Mapping[str, Any]


class ControlTokens:
    """Texts that are commands to a model. Safe to share between threads."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = sorted(filter(None, names), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, self._names)) or "(?!)")

    def mark(self, messages: Sequence[_Json]) -> tuple[Sequence[_Json], Marks | None]:
        """The messages with marks around the control tokens that their texts spell, and the marks; the same messages
        and None if there are no such."""
        if not any(map(self.pattern.search, _texts(list(messages)))):
            return messages, None
        marks = unused_characters(messages)
        marked = rf"{marks[0]}\g<0>{marks[1]}"
        found: list[_Json] = _replaced(list(messages), lambda text: self.pattern.sub(marked, text))
        return found, marks

    def may_join(self, messages: Sequence[_Json]) -> bool:
        """Whether a text begins or ends as a part of a control token does: a template that writes it beside another text
        might make the whole token of both."""
        return any(self._opens(text) or self._closes(text) for text in _texts(list(messages)))

    def parted(self, messages: Sequence[_Json], mark: str) -> list[_Json]:
        """The messages with `mark`, which divides a text for the tokenizer, where `may_join` finds an end. Roles and kinds of
        parts, which templates compare, stay what they are: a caller does not write them."""

        def change(text: str) -> str:
            return (mark if self._closes(text) else "") + text + (mark if self._opens(text) else "")

        def message(values: _Json) -> _Json:
            return {key: value if key == "role" else field(key, value) for key, value in values.items()}

        def field(key: str, value: Any) -> Any:
            if key == "content" and not isinstance(value, str):
                return [part | {"text": change(part["text"])} if "text" in part else part for part in value]
            return _replaced(value, change)

        return list(map(message, messages))

    def written(self, text: str, marks: Marks) -> list[str]:
        """The control tokens of a rendered conversation that are no plain text, in order."""
        found = re.finditer(f"{marks[0]}(?:{self.pattern.pattern}){marks[1]}|{self.pattern.pattern}", text)
        return [match[0] for match in found if not match[0].startswith(marks[0])]

    def _opens(self, text: str) -> bool:
        """Also behind white space, which a template may take away."""
        return any(end[-size:] in self._begins for end in {text, text.rstrip()} for size in self._sizes(end))

    def _closes(self, text: str) -> bool:
        return any(start[:size] in self._ends for start in {text, text.lstrip()} for size in self._sizes(start))

    def _sizes(self, text: str) -> range:
        return range(1, min(len(text) + 1, len(self._names[0]) if self._names else 0))

    @cached_property
    def _begins(self) -> frozenset[str]:
        return frozenset(name[:i] for name in self._names for i in range(1, len(name)))

    @cached_property
    def _ends(self) -> frozenset[str]:
        return frozenset(name[i:] for name in self._names for i in range(1, len(name)))


def filled(text: str, marks: Marks | None, placeholders: Collection[str], media: Sequence[tuple[str, str]]) -> str:
    """A rendered conversation with what `media` have (each its placeholder, and the text for it) in the places of placeholders
    that the template wrote: those without marks. Raises `InvalidRequestError` if these are others."""
    pattern, written = _pattern(marks, placeholders), written_placeholders(text, marks, placeholders)
    if written != [placeholder for placeholder, _ in media]:
        raise InvalidRequestError(
            f"the model's chat template writes {len(written)} placeholders of media, and the messages have {len(media)} media, "
            "or these stand in another order",
            field="messages.content",
        )
    left = iter(media)
    return re.sub(pattern, lambda found: next(left)[1] if found[0] in placeholders else found[0], text)


def written_placeholders(text: str, marks: Marks | None, placeholders: Collection[str]) -> list[str]:
    """Those that the template wrote in a rendered conversation or a part of it, in order."""
    found = re.finditer(_pattern(marks, placeholders), text)
    return [match[0] for match in found if match[0] in placeholders]


def _pattern(marks: Marks | None, placeholders: Collection[str]) -> str:
    own = "|".join(map(re.escape, sorted(placeholders, key=len, reverse=True)))
    return own if marks is None else f"{marks[0]}(?:{own}){marks[1]}|{own}"


def unused_characters(messages: Sequence[_Json]) -> Marks:
    """Two characters that no text of the messages has. Unicode reserves these for use inside a program."""
    used = set().union(*_texts(list(messages)))
    candidates = map(chr, (*range(0xFDD0, 0xFDF0), *range(0xF0000, 0xFFFFE)))
    free = (character for character in candidates if character not in used)
    return next(free), next(free)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, but for the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _replaced(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every such text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _replaced(item, change) for key, item in value.items()}
    return [_replaced(item, change) for item in value] if isinstance(value, list | tuple) else value
