"""`OutputQueue`: deltas on their way from the engine's thread to one reader on the event loop."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from ..api.output import Output, join


class OutputQueue:
    """`put` never waits for the reader. Deltas of a choice that the reader has not taken yet are joined, so the queue
    holds at most one per choice, and no more than the answer. After its first token a choice is ready when it has
    `interval` tokens, or has ended."""

    def __init__(self, loop: asyncio.AbstractEventLoop, interval: int = 1) -> None:
        self._loop, self._interval = loop, interval
        self._begun: set[int] = set()  # choices whose first token was sent
        self._pending: dict[int, Output] = {}
        self._ready = asyncio.Event()
        self._sending_since: float | None = None

    def put(self, output: Output) -> None:
        """Add a delta. May be called from any thread."""
        with suppress(RuntimeError):  # the loop has ended, and with it whoever would read
            self._loop.call_soon_threadsafe(self._add, output)

    def _add(self, output: Output) -> None:
        join(self._pending, output)
        choice = self._pending[output.choice]
        is_due = self._interval == 1 or output.choice not in self._begun or len(choice.token_ids) >= self._interval
        if is_due or choice.finish_reason is not None or choice.error is not None:
            self._begun.update([output.choice] if choice.token_ids else [])
            self._ready.set()

    async def take(self) -> list[Output]:
        """All deltas that are ready; waits until there is one. Until the next call they are on their way to the reader."""
        self._sending_since = None
        await self._ready.wait()
        self._ready.clear()
        pending, self._pending = list(self._pending.values()), {}
        self._sending_since = time.monotonic()
        return pending

    @property
    def unread_s(self) -> float:
        """Seconds that the deltas which were taken last have been on their way."""
        return 0.0 if self._sending_since is None else time.monotonic() - self._sending_since
