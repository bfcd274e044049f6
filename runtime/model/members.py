"""`MemberKind`: the kinds of members, and what each has of its own. No other file lists them."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

K = TypeVar("K", bound="MemberKind")


class MemberKind(StrEnum):
    """A kind of member. Its value is its name in manifests. Its format on disk is in
    `checkpoints/members/registry.py`."""

    article: str
    own_layers: bool  # has whole layers and a final norm of its own; otherwise it uses the base's
    flag: str  # `motet export --<flag> name=DIR`
    methods: tuple[str, ...]  # the methods of `motet tune` that make one

    def __new__(cls: type[K], value: str, article: str, own_layers: bool, flag: str, methods: tuple[str, ...]) -> K:
        kind = str.__new__(cls, value)
        kind._value_ = value
        kind.article = article
        kind.own_layers = own_layers
        kind.flag = flag
        kind.methods = methods
        return kind

    # value, article, own_layers, flag, methods
    BASE = "base", "a", False, "tail", ()
    TAIL = "tail", "a", True, "tail", ("tail", "full")
    ADAPTER = "adapter", "an", False, "lora", ("lora", "qlora")

    @classmethod
    def of_method(cls, method: str) -> MemberKind:
        """The kind of member that a method of `motet tune` makes."""
        return next(kind for kind in cls if method in kind.methods)
