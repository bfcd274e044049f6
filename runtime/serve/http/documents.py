"""`/v1/summarise` and `/v1/classify`, which OpenAI's API has not."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from ...api.request import Ensemble
from ...errors import InvalidRequestError
from ...text.summary import INSTRUCTION, SummariseParams
from ..documents import classify as classify_text
from ..documents import summarise as summarise_text
from .app import Door, Work, send_whole
from .wire import EnsembleFields, read_ensemble


class _Document(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    text: str
    model: str = ""
    ensemble: EnsembleFields | None = None
    user: str | None = None


class SummariseRequest(_Document, kw_only=True, forbid_unknown_fields=True):
    """Fields that are absent have the defaults of `SummariseParams`."""

    instruction: str = INSTRUCTION
    method: Literal["map_reduce", "refine"] = "map_reduce"
    title: bool = False
    max_summary_tokens: int | None = None
    chunk_tokens: int | None = None
    temperature: float = 0.0
    repetition_penalty: float = 1.05
    seed: int = 0
    speculative_tokens: int = 8
    abstain_below: float | None = None
    drafts: int = 0


class ClassifyRequest(_Document, kw_only=True, forbid_unknown_fields=True):
    labels: list[str]
    instruction: str = ""  # before the text


async def summarise(door: Door, request: Request) -> Response:
    fields = await door.body(request, SummariseRequest, "summarise")
    caller = door.caller(request, fields.user)
    ensemble, allow_negative = _ensemble(fields, door)
    names = [field.name for field in dataclasses.fields(SummariseParams) if field.name != "concurrency"]
    params = SummariseParams(**{name: getattr(fields, name) for name in names})

    async def run(send: Send) -> None:
        found = await summarise_text(
            door.service,
            fields.text,
            params,
            ensemble,
            caller,
            method=fields.method,
            with_title=fields.title,
            allow_negative=allow_negative,
        )
        body = {
            "object": "summary",
            "model": fields.model or door.service.served.name,
            "summary": found.text,
            "title": found.title,
            "finish_reason": str(found.finish_reason),
            "chunks": found.chunks,
            **(
                {}
                if found.confidence is None
                else {"answer_confidence": found.confidence, "abstained": found.abstained}
            ),
            "usage": _usage(found.prompt_tokens, found.completion_tokens),
        }
        await send_whole(send, msgspec.json.encode(body))

    return Work(run)


async def classify(door: Door, request: Request) -> Response:
    fields = await door.body(request, ClassifyRequest, "classify")
    caller = door.caller(request, fields.user)
    ensemble, allow_negative = _ensemble(fields, door)

    async def run(send: Send) -> None:
        prompt = fields.instruction + fields.text
        found, tokens = await classify_text(
            door.service, prompt, fields.labels, ensemble, caller, allow_negative=allow_negative
        )
        body = {
            "object": "classification",
            "model": fields.model or door.service.served.name,
            "label": found[0].label,
            "labels": [dataclasses.asdict(one) for one in found],
            "usage": _usage(tokens, 0),
        }
        await send_whole(send, msgspec.json.encode(body))

    return Work(run)


def _ensemble(fields: _Document, door: Door) -> tuple[Ensemble | None, bool]:
    """And whether its coefficients may be negative."""
    ensemble, views, allow_negative = read_ensemble(fields.ensemble, fields.model, door.service.served)
    if views:
        raise InvalidRequestError("a document has no views; leave them out", field="ensemble.members.view")
    return ensemble, allow_negative


def _usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
