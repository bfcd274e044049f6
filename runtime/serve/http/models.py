"""`/v1/models`: the bundle, and each of its members as a model of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ...api.model_info import ModelInfo
from ...api.request import Ensemble
from ...errors import NotFoundError, shown
from ..model_names import ensemble_of
from .app import Door


async def list_models(door: Door, request: Request) -> Response:
    """The bundle with its own mix, then its members, if there are several."""
    found = []
    for model in door.service.models(door.caller(request)):
        found.append(_model(model, model.name, model.default_ensemble))
        if len(model.members) > 1:
            names = [f"{model.name}:{member}" for member in model.members]
            found += [_model(model, name, ensemble_of(name, model)) for name in names]
    return JSONResponse({"object": "list", "data": found})


async def get_model(door: Door, request: Request) -> Response:
    """Of a name, which may have a mix."""
    name = request.path_params["name"]
    model = door.service.model("", door.caller(request))
    ensemble = ensemble_of(name, model) or model.default_ensemble
    for member in ensemble.members:
        if member.name not in model.members:
            raise NotFoundError(f"{shown(member.name)} is not a member of '{model.name}'")
    return JSONResponse(_model(model, name, ensemble))


def _model(model: ModelInfo, name: str, ensemble: Ensemble | None) -> dict[str, Any]:
    assert ensemble is not None
    members = [
        {"name": member.name, "mix": member.mix}
        | ({} if member.temperature == 1 else {"temperature": member.temperature})
        for member in ensemble.members
    ]
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "motet",
        "max_model_len": model.max_model_len,
        "ensemble": {"members": members, "space": str(ensemble.space)},
        "digest": model.digest,
        "origins": [dataclasses.asdict(origin) for origin in model.origins],
    }
