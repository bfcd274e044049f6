"""`Answerer`: answers the records of a batch job on an engine of this process, as a server's batch service does."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Mapping
from typing import Any

from ..engine.engine import Engine
from ..errors import DataError, InvalidRequestError, MotetError, shown
from ..serve.batch.runner import ENDPOINTS, as_request, kept_request
from ..serve.calls import Caller
from ..serve.http.app import App
from ..serve.service import Service
from ..trust.access import Access
from ..trust.identity import Identity, Role
from .records import Record

_CALLER = Caller(Identity("", "job", frozenset({Role.INFER})))
_AGAIN_S = 0.2  # after "later": other records have the engine's queue
_MOST_WAITS = 3000
_AGAIN = 429, 503


class Answerer:
    """`endpoint`: the path of the HTTP API whose requests the records are; `defaults`: fields of those that do not have them.
    `line` may be called from `concurrency` threads at once. Raises `InvalidRequestError`."""

    def __init__(self, engine: Engine, endpoint: str, defaults: Mapping[str, Any] | None = None) -> None:
        if endpoint not in ENDPOINTS:
            raise InvalidRequestError(
                f"endpoint must be one of {list(ENDPOINTS)}, got {shown(endpoint)}", field="endpoint"
            )
        self._endpoint, self._defaults = endpoint, defaults
        self._digest = engine.model.digest
        self.concurrency = engine.config.max_num_seqs
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="motet-answerer", daemon=True)
        self._thread.start()
        self._app = asyncio.run_coroutine_threadsafe(_app(engine), self._loop).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def line(self, record: Record) -> dict[str, Any]:
        """A result as OpenAI's batch API writes it, with the key by which a rerun recognises it."""
        try:
            if record.error is not None:
                raise record.error
            _, request = kept_request(record.id, self._request(record), self._endpoint, self._defaults)
        except MotetError as error:
            body = {"error": {"message": str(error), "type": "invalid_request_error"}}
            return {"custom_id": record.id, "response": {"status_code": 400, "body": body}}
        answer = asyncio.run_coroutine_threadsafe(self._answer(request), self._loop)
        status, content = answer.result()
        line = {"custom_id": record.id, "response": {"status_code": status, "body": json.loads(content)}}
        return line | ({"key": self.key(record)} if status < 400 else {})

    def key(self, record: Record) -> str:
        """A digest of all that the answer depends on."""
        parts = (record.id, record.text, self._endpoint, json.dumps(self._defaults, sort_keys=True), self._digest)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

    def _request(self, record: Record) -> bytes:
        if record.endpoint not in ("", self._endpoint):
            raise DataError(f"record '{record.id}' is for {shown(record.endpoint)}, and the job for {self._endpoint}")
        return record.text.encode() if record.endpoint else as_request(record.text, self._endpoint)

    async def _answer(self, request: bytes) -> tuple[int, bytes]:
        for wait in range(_MOST_WAITS):
            if wait:
                await asyncio.sleep(_AGAIN_S)
            status, content = await self._app.answer(self._endpoint, request, _CALLER)
            if status not in _AGAIN:
                break
        return status, content


async def _app(engine: Engine) -> App:
    return App(Service(engine), Access.open_to_all())
