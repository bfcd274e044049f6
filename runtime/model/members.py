"""`MemberKind`: the kinds of members, and what each has of its own. No other file lists them."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import TypeVar

K = TypeVar("K", bound="MemberKind")


class MemberKind(StrEnum):
    """A kind of member. Its value is its name in manifests. Its format on disk is in
    `checkpoints/members/registry.py`."""

    article: str
    own_layers: bool  # has its own last layers and final norm
    own_sequence: bool  # has other keys and values from the first layer on, so it needs a sequence of its own
    flag: str  # `motet export --<flag> name=DIR`
    methods: tuple[str, ...]  # the methods of `motet tune` that make one

    def __new__(
        cls: type[K],
        value: str,
        article: str,
        own_layers: bool,
        own_sequence: bool,
        flag: str,
        methods: tuple[str, ...],
    ) -> K:
        kind = str.__new__(cls, value)
        kind._value_ = value
        kind.article = article
        kind.own_layers = own_layers
        kind.own_sequence = own_sequence
        kind.flag = flag
        kind.methods = methods
        return kind

    # value, article, own_layers, own_sequence, flag, methods
    BASE = "base", "a", False, False, "tail", ()
    TAIL = "tail", "a", True, False, "tail", ("tail", "full")
    ADAPTER = "adapter", "an", False, True, "lora", ("lora", "qlora")

    @classmethod
    def of_method(cls, method: str) -> MemberKind:
        """The kind of member that a method of `motet tune` makes."""
        return next(kind for kind in cls if method in kind.methods)


def have_tails(kinds: Iterable[MemberKind]) -> bool:
    """Whether each member runs some layers (perhaps none) and a final norm separately, after a shared trunk.

    Base and adapter members share one set of layers. If there are several members and no adapters, each gets a tail,
    even one equal to the base.
    """
    kinds = list(kinds)
    return len(kinds) > 1 and (any(k.own_layers for k in kinds) or not any(k.own_sequence for k in kinds))
