"""Rules for the values of a request's fields. A rule describes in words what is allowed, and checks and converts a
value.

`check` accepts what a caller may pass, numpy scalars included, and returns plain Python values. It raises
`InvalidRequestError`, naming the field, the limit and the value.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping, Sized
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol, SupportsIndex

from ..errors import InvalidRequestError, shown

MAX_INT32 = 2**31 - 1  # the largest integer that the protos and the kernels hold


class Rule(Protocol):
    """The condition that the values of one field must meet."""

    @property
    def limit(self) -> str:
        """The condition in words that follow "must be"."""

    def check(self, name: str, value: Any) -> Any:
        """The value, converted to the field's type. Raises `InvalidRequestError`."""


def _refusal(name: str, rule: Rule, value: object, label: str = "") -> InvalidRequestError:
    """`label`: what was refused, in words, if it is not the field itself."""
    return InvalidRequestError(f"{label or name} must be {rule.limit}, got {shown(value)}", field=name)


@dataclass(frozen=True, slots=True)
class Integer:
    """A whole number in low…high. Any type with `__index__` is accepted, except bool."""

    low: int = 0
    high: int = MAX_INT32

    @property
    def limit(self) -> str:
        return f"an integer in {self.low}…{self.high}"

    def check(self, name: str, value: object, label: str = "") -> int:
        if isinstance(value, SupportsIndex) and not isinstance(value, bool):
            try:
                number = operator.index(value)
            except TypeError:  # an array of several numbers has the method, but raises
                raise _refusal(name, self, value, label) from None
            if self.low <= number <= self.high:
                return number
        raise _refusal(name, self, value, label)


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number in [low, high], or in (low, high] if `is_above`. Any real type is accepted, except bool."""

    low: float = -math.inf
    high: float = math.inf
    is_above: bool = False

    @property
    def limit(self) -> str:
        if math.isinf(self.low):
            return "a finite number"
        if math.isinf(self.high):
            return f"a finite number {'above' if self.is_above else 'of at least'} {self.low:g}"
        return f"a number in {'(' if self.is_above else '['}{self.low:g}, {self.high:g}]"

    def check(self, name: str, value: object, label: str = "") -> float:
        if isinstance(value, Real) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                raise _refusal(name, self, value, label) from None
            above = number > self.low if self.is_above else number >= self.low
            if math.isfinite(number) and above and number <= self.high:
                return number
        raise _refusal(name, self, value, label)


@dataclass(frozen=True, slots=True)
class Flag:
    """True or False."""

    limit: str = "true or false"

    def check(self, name: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise _refusal(name, self, value)
        return value


@dataclass(frozen=True, slots=True)
class Text:
    """Text of `min_bytes` to `max_bytes` bytes of UTF-8."""

    max_bytes: int
    min_bytes: int = 0

    @property
    def limit(self) -> str:
        return f"text of {self.min_bytes} to {self.max_bytes} bytes of UTF-8"

    def check(self, name: str, value: object, label: str = "") -> str:
        # A character has at least one byte: a long text is refused before it is encoded.
        if isinstance(value, str) and len(value) <= self.max_bytes:
            size = num_bytes(value)
            if size is not None and self.min_bytes <= size <= self.max_bytes:
                return value
        raise _refusal(name, self, value, label)


@dataclass(frozen=True, slots=True)
class Strings:
    """Up to `max_items` strings of 1 to `max_bytes` bytes of UTF-8. A single string counts as a list of one."""

    noun: str  # plural, for messages
    max_items: int
    max_bytes: int

    @property
    def limit(self) -> str:
        return f"at most {self.max_items} {self.noun} of 1 to {self.max_bytes} bytes of UTF-8"

    def check(self, name: str, value: object) -> tuple[str, ...]:
        items = _items(name, self, (value,) if isinstance(value, str) else value, self.noun, self.max_items)
        rule = Text(self.max_bytes, min_bytes=1)
        return tuple(rule.check(name, item, f"every one of the {self.noun}") for item in items)


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Up to `max_items` token ids. That they are in the vocabulary is checked later, against the model."""

    noun: str  # plural, for messages
    max_items: int

    @property
    def limit(self) -> str:
        return f"a list of at most {self.max_items} {self.noun}"

    def check(self, name: str, value: object) -> tuple[int, ...]:
        items = _items(name, self, value, self.noun, self.max_items)
        return tuple(_TOKEN_ID.check(name, item, f"every id in {name}") for item in items)


@dataclass(frozen=True, slots=True)
class Biases:
    """Up to `max_items` pairs of a token id and a finite number."""

    max_items: int

    @property
    def limit(self) -> str:
        return f"a mapping of at most {self.max_items} token ids to finite numbers"

    def check(self, name: str, value: object) -> dict[int, float]:
        if not isinstance(value, Mapping):
            raise _refusal(name, self, value)
        _check_count(name, value, "token ids", self.max_items)
        return {
            _TOKEN_ID.check(name, token_id, f"every id in {name}"): _BIAS.check(name, bias, f"every {name}")
            for token_id, bias in value.items()
        }


_TOKEN_ID = Integer()
_BIAS = Number()


def _items(name: str, rule: Rule, value: object, noun: str, max_items: int) -> Collection[Any]:
    """The items of a list-like value. They are counted before any of them is checked or copied."""
    if not isinstance(value, Collection) or isinstance(value, str | bytes | Mapping):
        raise _refusal(name, rule, value)
    _check_count(name, value, noun, max_items)
    return value


def _check_count(name: str, value: Sized, noun: str, max_items: int) -> None:
    if len(value) > max_items:
        raise InvalidRequestError(f"{len(value)} {noun}; at most {max_items} are allowed", field=name)


def num_bytes(text: str) -> int | None:
    """Bytes of the text in UTF-8; None for text that cannot be encoded, such as half of a surrogate pair."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return None
