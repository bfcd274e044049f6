"""fusion.json: the members, mix and space that `fuse` has chosen, and what they were chosen on. `motet export` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.api.request import Space
from ...runtime.checkpoints.members.registry import format_at
from ...runtime.errors import BundleError, NotFoundError
from ...runtime.model.files import read_object

FUSION = "fusion.json"


@dataclass(frozen=True, slots=True)
class Fusion:
    """`members`: name → directory, None for the base. `mix`: name → coefficient. `temperatures`: name → what divides the
    member's logits, for those where it is not 1. `chosen_by`: see `provenance.chosen_by`."""

    members: Mapping[str, Path | None]
    mix: Mapping[str, float]
    temperatures: Mapping[str, float]
    space: Space
    base_digest: str
    chosen_by: Mapping[str, Any]


def read_fusion(directory: Path) -> Fusion:
    """What `fuse` wrote to a directory. Raises `NotFoundError`, and `BundleError` if it is damaged, or a member is not
    the one that the mix was fitted for."""
    path = directory / FUSION
    if not path.is_file():
        raise NotFoundError(f"there is no fusion at '{directory}' ({FUSION} is missing); `motet fuse` makes one")
    try:
        values = read_object(path, "run `motet fuse` again")
        members = {name: Path(place) if place else None for name, place in values["members"].items()}
        weights, base = values["weights"], values["base"]["digest"]
        temperatures = {name: float(value) for name, value in values["temperatures"].items()}
        fusion = Fusion(members, values["mix"], temperatures, Space(values["space"]), base, values["chosen_by"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"'{path}' is damaged ({error!r}); run `motet fuse` again") from error
    for name, place in members.items():
        if place is not None and weights_digest(place) != weights.get(name):
            raise BundleError(f"the member '{name}' at '{place}' has changed since the mix was fitted; fuse again")
    return fusion


def weights_digest(member: Path) -> str:
    """SHA-256 of a member's weights. Raises `NotFoundError`, `BundleError` (damaged)."""
    digest: str = format_at(member).read_manifest(member)["sha256"]
    return digest
