"""`/v1/embeddings`: the mean of the mixed final hidden states, of length 1."""

from __future__ import annotations

import base64
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from ...api.prompt import Prompt
from ...api.request import Ensemble, check_embedding
from ...errors import InvalidRequestError
from ..embeddings import Embeddings
from .app import Door, Work, send_whole
from .wire import EnsembleFields, prompts_of, read_ensemble


class EmbeddingRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    input: str | list[Any]  # a text, token ids, or a list of these
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None
    ensemble: EnsembleFields | None = None


async def embeddings(door: Door, request: Request) -> Response:
    fields = await door.body(request, EmbeddingRequest, "embed")
    caller = door.caller(request, fields.user)
    prompts, ensemble = await door.service.read("embed", lambda: _read(fields, door), caller)

    async def run(send: Send) -> None:
        service = door.service
        found = await service.embed(prompts, ensemble, caller)
        body = await service.encode(lambda: _body(found, fields, door))
        await send_whole(send, body)

    return Work(run)


def _read(fields: EmbeddingRequest, door: Door) -> tuple[list[Prompt], Ensemble | None]:
    size = door.service.served.hidden_size
    if size and fields.dimensions is not None and fields.dimensions != size:  # without any, the service refuses
        raise InvalidRequestError(
            f"embeddings have {size} dimensions here, got {fields.dimensions}; leave dimensions out", field="dimensions"
        )
    ensemble, views, allow_negative = read_ensemble(fields.ensemble, fields.model, door.service.served)
    if ensemble is not None:
        check_embedding(ensemble, allow_negative)
    assert not views
    return prompts_of(fields.input, "input"), ensemble


def _body(found: Embeddings, fields: EmbeddingRequest, door: Door) -> bytes:
    data = []
    for index, vector in enumerate(found.vectors):
        value: Any = vector.tolist()
        if fields.encoding_format == "base64":
            value = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": value})
    usage = {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens}
    model = fields.model or door.service.served.name
    return msgspec.json.encode({"object": "list", "data": data, "model": model, "usage": usage})
