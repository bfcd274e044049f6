"""What the streams of a server notice of other clients: of readers that stop reading, and of many short requests."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from ...runtime.client.client import AsyncClient
from ...runtime.client.connection import Connection
from .load import percentile, random_prompt
from .servers import RunningServer

STREAMS = 8
RATE = 10_000 / 60  # short requests per second
_TOKENS = 256  # of an answer
_PROMPT = 16
_IDS = 256  # prompts are of smaller token ids, which every model has
_LOGPROBS = 20  # what is left unread is large


@dataclass(slots=True)
class _Seen:
    """What the streams that are measured got, from the beginning of the measurement on."""

    tokens: int = 0
    gaps: list[float] = field(default_factory=list)  # seconds between two messages of an answer
    is_counting: bool = False


@asynccontextmanager
async def _streams(connection: Connection) -> AsyncIterator[_Seen]:
    """STREAMS clients that have an answer each, one after another, until the block ends."""
    seen = _Seen()

    async def one(index: int) -> None:
        rng = random.Random(index)
        async with AsyncClient(connection) as client:
            while True:
                last = None
                async for delta in client.generate(random_prompt(rng, _PROMPT, _IDS), **_options(_TOKENS)):
                    now = time.perf_counter()
                    if seen.is_counting:
                        seen.tokens += len(delta.token_ids)
                        seen.gaps += [now - last] if last is not None else []
                    last = now

    async with _until_the_end([one(index) for index in range(STREAMS)]):
        yield seen


@asynccontextmanager
async def _until_the_end(work: list[Any]) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """Run these beside the block. What one of them raises, the block's end raises."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        yield tasks
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _options(tokens: int) -> dict[str, Any]:
    return {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}


# ---- readers that stop -----------------------------------------------------------------------------------------------


def slow_readers(server: RunningServer, connection: Connection, seconds: float) -> dict[str, dict[str, float]]:
    """Gaps of the measured streams in milliseconds and the server's memory in megabytes, while STREAMS other clients ask for
    answers at the same pace that they read to their ends, and that they stop reading after the first message."""
    return {
        name: asyncio.run(_beside_readers(server, connection, seconds, stop=stop))
        for name, stop in (("read", False), ("not read on", True))
    }


async def _beside_readers(
    server: RunningServer, connection: Connection, seconds: float, *, stop: bool
) -> dict[str, float]:
    async def other(index: int) -> None:
        rng, unread, pace = random.Random(1000 + index), [], 0.0
        async with AsyncClient(connection) as client:
            while True:
                started = time.perf_counter()
                prompt = random_prompt(rng, _PROMPT, _IDS)
                answer = client.generate(prompt, logprobs=_LOGPROBS, **_options(_TOKENS))
                await anext(answer)
                if stop and pace:
                    unread.append(answer)
                    await asyncio.sleep(pace)
                else:  # the first answer shows how long one takes
                    async for _ in answer:
                        pass
                    pace = time.perf_counter() - started

    before, most = server.resident_mb(), 0.0
    async with _streams(connection) as seen, _until_the_end([other(index) for index in range(STREAMS)]):
        await asyncio.sleep(seconds / 4)  # until all of them have begun
        seen.is_counting, end = True, time.perf_counter() + seconds
        while time.perf_counter() < end:
            most = max(most, server.resident_mb())
            await asyncio.sleep(0.1)
    return {
        "gap p50, ms": 1e3 * percentile(seen.gaps, 0.5),
        "gap p99, ms": 1e3 * percentile(seen.gaps, 0.99),
        "tok/s": seen.tokens / seconds,
        "memory before, MB": before,
        "memory at most, MB": most,
    }


# ---- many requests ---------------------------------------------------------------------------------------------------


def beside_many_requests(ways: Mapping[str, Connection], seconds: float, repeats: int) -> dict[str, Any]:
    """{"ways": name → (tokens per second of the streams, short requests that ended per second), "share": what the second way's
    streams have of the first's}, medians of `repeats` turns."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, connection in ways.items():
            found[name].append(asyncio.run(_beside_requests(connection, seconds / repeats)))
    first, second = found.values()
    return {
        "ways": {name: [statistics.median(column) for column in zip(*rows)] for name, rows in found.items()},
        "share": statistics.median(b[0] / a[0] for a, b in zip(first, second)),
    }


async def _beside_requests(connection: Connection, seconds: float) -> tuple[float, float]:
    rng, ended = random.Random(7), 0

    async def ask(client: AsyncClient) -> None:
        nonlocal ended
        await client.complete(random_prompt(rng, _PROMPT, _IDS), **_options(1))
        ended += 1

    async def asking(client: AsyncClient) -> None:
        start, sent, open_ones = time.perf_counter(), 0, set[asyncio.Task[None]]()
        while True:
            due = int(RATE * (time.perf_counter() - start))
            for _ in range(due - sent if len(open_ones) < 100 else 0):  # what cannot be kept up with is not sent
                task = asyncio.create_task(ask(client))
                open_ones.add(task)
                task.add_done_callback(open_ones.discard)
            sent = due
            await asyncio.sleep(0.01)

    async with (
        AsyncClient(connection) as client,
        _streams(connection) as seen,
        _until_the_end([asking(client)]),
    ):
        await asyncio.sleep(1.0)
        seen.is_counting, before = True, ended
        await asyncio.sleep(seconds)
        return seen.tokens / seconds, (ended - before) / seconds
