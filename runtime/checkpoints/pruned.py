"""The record of a pruned model, `motet-prune.json`: what was removed, and from which models it comes.

A model that was pruned twice has two origins. For each, the record has its digest and, if rows of the vocabulary were removed
since, the ids that the tokens had there: a teacher's logits are restricted to them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BundleError, ConfigError, NotFoundError
from ..model.files import check_replaceable, read_object

RECORD = "motet-prune.json"
MEMBERS = "members"  # the folder of what is left of an ensemble's members
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Origin:
    """A model that a pruned one comes from. `tokens`: token id → the id there; None if they are the same."""

    name: str
    digest: str
    tokens: tuple[int, ...] | None = None

    def after(self, kept: tuple[int, ...] | None) -> Origin:
        """The same origin of a model that has only these of the tokens. None: all."""
        if kept is None:
            return self
        return Origin(self.name, self.digest, kept if self.tokens is None else tuple(self.tokens[i] for i in kept))

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "digest": self.digest,
            "tokens": None if self.tokens is None else list(self.tokens),
        }


def check_output(out: Path, *, healed: bool) -> None:
    """Raises `ConfigError` unless `out` is new or a pruned model, or a healed one, that can be made again: without members, which
    would be lost."""
    check_replaceable(out, RECORD, "a pruned model")
    if not out.exists():
        return
    if healed != ("healed" in read_object(out / RECORD, "delete that directory")):
        raise ConfigError(
            f"'{out}' is {'a pruned model that is not healed' if healed else 'a healed model'}; choose another directory"
        )
    if (out / MEMBERS).is_dir():
        raise ConfigError(f"'{out / MEMBERS}' has members, which would be lost; choose another directory")


def is_pruned(model_dir: Path) -> bool:
    return (Path(model_dir) / RECORD).is_file()


def read_record(model_dir: Path) -> dict[str, Any]:
    """The record. Raises `NotFoundError` if the model was not pruned, `BundleError` if it is damaged."""
    path = Path(model_dir) / RECORD
    if not path.is_file():
        raise NotFoundError(f"'{model_dir}' has no {RECORD}; `motet prune` makes a pruned model")
    try:
        values = json.loads(path.read_bytes())
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']!r}; this version reads {FORMAT}")
        origins_of(values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"'{path}' is damaged ({error!r}); prune the model again") from error
    assert isinstance(values, dict)
    return values


def origins_of(record: dict[str, Any]) -> list[Origin]:
    """The models that a pruned one comes from, the latest first. Raises what a record that is none raises."""
    found = []
    for values in record["origins"]:
        tokens = values["tokens"]
        if tokens is not None and not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
            raise ValueError(f"the origin '{values['name']}' has token ids that are none")
        found.append(Origin(str(values["name"]), str(values["digest"]), None if tokens is None else tuple(tokens)))
    return found


def earlier_origins(model_dir: Path) -> list[Origin]:
    """Those of a model that may not have been pruned: none then."""
    return origins_of(read_record(model_dir)) if is_pruned(model_dir) else []
