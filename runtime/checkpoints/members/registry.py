"""The formats of member checkpoints, by kind. `MemberKind` says what each kind has of its own."""

from __future__ import annotations

from pathlib import Path

from ...errors import NotFoundError
from ...model.members import MemberKind
from .adapter import ADAPTER
from .files import MemberFormat
from .tail import TAIL

FORMATS: dict[MemberKind, MemberFormat] = {form.kind: form for form in (TAIL, ADAPTER)}


def format_at(path: Path) -> MemberFormat:
    """The format of the member in a directory. Raises `NotFoundError` if there is none."""
    for form in FORMATS.values():
        if form.is_at(path):
            return form
    names = " or ".join(form.manifest for form in FORMATS.values())
    raise NotFoundError(f"there is no member at '{path}' ({names} is missing); `motet tune` makes one")
