"""`OutputQueue`: deltas on their way from the engine's thread to one reader on the event loop; `Delivery`: to all readers."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress

from ..api.output import Output, join


class Delivery:
    """Hands what the engine's thread has put to an event loop, all at once: to wake the loop costs the engine's thread more than
    anything else here, because both need the interpreter then."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._items: deque[tuple[OutputQueue, Output]] = deque()

    def here(self) -> Delivery:
        """From now on to the loop that runs."""
        self._loop = asyncio.get_running_loop()
        return self

    def put(self, queue: OutputQueue, output: Output) -> None:
        """Any thread. It arrives after the next `wake`."""
        self._items.append((queue, output))

    def wake(self) -> None:
        """Any thread."""
        assert self._loop is not None
        with suppress(RuntimeError):  # it has ended, and with it whoever would read
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._items:
            queue, output = self._items.popleft()
            queue.add(output)


class OutputQueue:
    """`put` never waits for the reader. Deltas of a choice that the reader has not taken yet are joined, so the queue
    holds at most one per choice, and no more than the answer. After its first token a choice is ready when it has
    `interval` tokens, or has ended."""

    def __init__(self, delivery: Delivery, interval: int = 1) -> None:
        self._delivery, self._interval = delivery, interval
        self._begun: set[int] = set()  # choices whose first token was sent
        self._pending: dict[int, Output] = {}
        self._ready = asyncio.Event()
        self._sending_since: float | None = None

    def put(self, output: Output) -> None:
        """Add a delta, which the reader gets after the delivery's next `wake`. May be called from any thread."""
        self._delivery.put(self, output)

    def add(self, output: Output) -> None:
        """Add a delta, on the event loop."""
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
