"""Names of models that a door gets: the bundle's, one member's, or a mix."""

from __future__ import annotations

from ..api.limits import MAX_MEMBERS
from ..api.model_info import ModelInfo
from ..api.request import Ensemble, Member
from ..errors import InvalidEnsembleError, NotFoundError, shown


def ensemble_of(name: str, model: ModelInfo) -> Ensemble | None:
    """The ensemble that a model's name asks for: `demo` is the bundle's own, `demo:code` one member, `demo:code=0.3,docs=0.7`
    a mix. Raises `NotFoundError`, `InvalidEnsembleError`."""
    if name in ("", model.name):
        return None
    mix = name.removeprefix(f"{model.name}:")
    if mix == name or not mix:
        raise NotFoundError(f"there is no model {shown(name)} here; this server serves '{model.name}'")
    members = []
    for part in mix.split(",", MAX_MEMBERS):
        member, is_mixed, coefficient = part.partition("=")
        try:
            members.append(Member(member, float(coefficient) if is_mixed else 1.0))
        except ValueError:
            raise InvalidEnsembleError(
                f"a model's name is NAME, NAME:member or NAME:member=coefficient,…; {shown(part)} is none",
                field="model",
            ) from None
    return Ensemble(tuple(members))
