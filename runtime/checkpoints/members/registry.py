"""The formats of member checkpoints, by kind. `MemberKind` says what each kind has of its own."""

from __future__ import annotations

from pathlib import Path

from ...errors import ConfigError, NotFoundError
from ...model.members import MemberKind
from .adapter import ADAPTER
from .files import MemberFormat
from .peft_format import CONFIG
from .tail import TAIL

FORMATS: dict[MemberKind, MemberFormat] = {form.kind: form for form in (TAIL, ADAPTER)}


def format_at(path: Path) -> MemberFormat:
    """The format of the member in a directory. Raises `NotFoundError` if there is none."""
    for form in FORMATS.values():
        if form.is_at(path):
            return form
    raise NotFoundError(
        f"there is no member at '{path}' ({TAIL.manifest} or {CONFIG} is missing); `motet tune` makes one"
    )


def format_of(path: Path, kind: MemberKind) -> MemberFormat:
    """The format of the member of this kind in a directory. Raises `NotFoundError`, `ConfigError` if it is of another
    kind."""
    form = format_at(path)
    if form.kind is not kind:
        raise ConfigError(f"'{path}' is {form.kind.article} {form.kind}; give it with --{form.kind.flag}")
    return form
