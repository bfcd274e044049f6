"""Server-sent events."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.types import Send

from .statuses import as_motet_error, error_body, error_response

log = logging.getLogger("motet.server")
Events = list[dict[str, Any]]  # that are ready together: they are sent as one piece
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_encode = msgspec.json.Encoder().encode


async def stream_events(send: Send, events: AsyncIterator[Events], what: str, *, named: bool = False) -> None:
    """Send events until there are no more, then `[DONE]`. What fails before the first is an answer with its status; after
    that, an event with the error ends the stream. `named`: each has its `type` as the event's name, and there is no `[DONE]`."""
    is_started = False
    try:
        async for batch in events:
            if not is_started:
                await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                is_started = True
            await _send(send, batch, named)
    except Exception as error:
        told = as_motet_error(error, what)
        if not is_started:
            await _plain(send, error_response(told))
            return
        await _send(send, [{"type": "error"} | error_body(told) if named else error_body(told)], named)
        await send({"type": "http.response.body", "body": b""})
        return
    if not named:
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _send(send: Send, batch: Events, named: bool) -> None:
    pieces = []
    for event in batch:
        if named:
            pieces.append(f"event: {event['type']}\n".encode())
        pieces += [b"data: ", _encode(event), b"\n\n"]
    await send({"type": "http.response.body", "body": b"".join(pieces), "more_body": True})


async def _plain(send: Send, response: Any) -> None:
    headers = response.raw_headers
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})
