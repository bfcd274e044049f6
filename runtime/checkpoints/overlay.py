"""`Overlay`: tensors in front of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


class Overlay(Mapping[str, T]):
    """The entries of `own`, then those of `base`. Neither is copied, so those of `base` may be read when they are asked for."""

    def __init__(self, own: Mapping[str, T], base: Mapping[str, T]) -> None:
        self._own, self._base = own, base

    def __getitem__(self, name: str) -> T:
        return self._own[name] if name in self._own else self._base[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from (name for name in self._base if name not in self._own)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._base
