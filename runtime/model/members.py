"""`MemberKind`: what a member of an ensemble has of its own. Bundle, export, command, backends and training ask here."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import TypeVar

K = TypeVar("K", bound="MemberKind")


class MemberKind(StrEnum):
    """A kind of member; the value is its name in manifests. How one lies on disk: `checkpoints/members/registry.py`."""

    article: str
    own_layers: bool  # the last layers and the final norm
    own_sequence: bool  # other keys and values from the first layer on: a KV cache of its own
    flag: str  # `motet export --<flag> name=DIR`
    methods: tuple[str, ...]  # of `motet tune` that make one

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
        """What a method of `motet tune` makes."""
        return next(kind for kind in cls if method in kind.methods)


def have_tails(kinds: Iterable[MemberKind]) -> bool:
    """Whether members run layers (perhaps none) and a final norm each, after a trunk that they share.

    Base and adapter members share one set of layers. If there are several members and no adapters, each gets a tail,
    even one equal to the base.
    """
    kinds = list(kinds)
    return len(kinds) > 1 and (any(k.own_layers for k in kinds) or not any(k.own_sequence for k in kinds))
