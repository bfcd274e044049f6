"""`Answerer`: answers the records of a batch job on an engine of this process, as a server's batch service does."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Mapping
from typing import Any

from ..engine.engine import Engine
from ..errors import DataError, InvalidRequestError, MotetError, UnavailableError, shown
from ..serve.batch.runner import AGAIN, ENDPOINTS, as_request, kept_request
from ..serve.calls import Caller
from ..serve.http.app import App
from ..serve.service import Service
from ..trust.access import Access
from ..trust.identity import Identity, Role
from .records import Record

_CALLER = Caller(Identity("", "job", frozenset({Role.INFER})))
_AGAIN_S = 0.2  # after "later": other records have the engine's queue
_LONGEST_S = 600.0  # that a record waits for room


class Answerer:
    """`endpoint`: the path of the HTTP API whose requests the records are; `defaults`: fields of those that do not have them.
    `line` may be called from `concurrency` threads at once. Raises `InvalidRequestError`."""

    def __init__(self, engine: Engine, endpoint: str, defaults: Mapping[str, Any] | None = None) -> None:
        if endpoint not in ENDPOINTS:
            raise InvalidRequestError(
                f"endpoint must be one of {list(ENDPOINTS)}, got {shown(endpoint)}", field="endpoint"
            )
        self._endpoint, self._defaults = endpoint, defaults
        self._engine, self._digest = engine, engine.model.digest
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
            return _refusal(record, 400, str(error))
        answer = asyncio.run_coroutine_threadsafe(self._answer(request), self._loop)
        status, content = answer.result()
        line = {"custom_id": record.id, "response": {"status_code": status, "body": json.loads(content)}}
        return line | ({"key": self.key(record)} if status < 400 else {})

    def failed(self, record: Record) -> dict[str, Any]:
        """The line of a record at which the program failed; the log says why."""
        return _refusal(record, 500, "the program failed at this record; its log has the error")

    def key(self, record: Record) -> str:
        """A digest of all that the answer depends on."""
        parts = (record.id, record.text, self._endpoint, json.dumps(self._defaults, sort_keys=True), self._digest)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

    def _request(self, record: Record) -> bytes:
        if record.endpoint not in ("", self._endpoint):
            raise DataError(f"record '{record.id}' is for {shown(record.endpoint)}, and the job for {self._endpoint}")
        return record.text.encode() if record.endpoint else as_request(record.text, self._endpoint)

    async def _answer(self, request: bytes) -> tuple[int, bytes]:
        until = time.monotonic() + _LONGEST_S
        while True:
            status, content = await self._app.answer(self._endpoint, request, _CALLER)
            if status not in AGAIN or time.monotonic() > until:
                return status, content
            if self._engine.failure is not None:
                raise UnavailableError(str(self._engine.failure))
            await asyncio.sleep(_AGAIN_S)


def _refusal(record: Record, status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind}}
    return {"custom_id": record.id, "response": {"status_code": status, "body": body}}


async def _app(engine: Engine) -> App:
    return App(Service(engine), Access.open_to_all())
