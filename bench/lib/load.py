"""Load on a server: when requests arrive, what a client measures of each, and the figures of all."""

from __future__ import annotations

import asyncio
import collections
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...runtime.client.client import AsyncClient
from ...runtime.errors import MotetError

Send = Callable[[list[int], int], Awaitable["Measured"]]  # (prompt, new tokens) → what the client measured


@dataclass(slots=True)
class Measured:
    """One request. Times are in seconds since its submission."""

    num_tokens: int = 0
    arrivals: list[float] = field(default_factory=list)  # of messages with tokens
    end: float = 0.0
    error: str | None = None
    submitted: float = 0.0  # seconds since the load began

    @property
    def ttft(self) -> float:
        return self.arrivals[0]

    @property
    def tpot(self) -> float:
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, self.num_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Between two messages."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Objective:
    """The service level that a request must keep to count for goodput. In milliseconds."""

    ttft_ms: float = 1000.0
    tpot_ms: float = 100.0

    def is_met(self, request: Measured) -> bool:
        return 1e3 * request.ttft <= self.ttft_ms and 1e3 * request.tpot <= self.tpot_ms


def percentile(values: Sequence[float], share: float) -> float:
    """The percentile at `share` (0…1), with linear interpolation between ranks; 0 if there are no values."""
    return float(np.quantile(values, share)) if values else 0.0


def arrival_times(rate: float, duration_s: float, seed: int, burstiness: float = 1.0) -> list[float]:
    """Arrival times in seconds, in [0, duration_s). `rate`: requests per second, on average.

    The gaps have a gamma distribution with the shape `burstiness`: 1 is a Poisson process, less comes in bursts, more is
    more even.
    """
    rng, now, times = random.Random(seed), 0.0, []
    while (now := now + rng.gammavariate(burstiness, 1 / (rate * burstiness))) < duration_s:
        times.append(now)
    return times


def random_prompt(rng: random.Random, size: int, vocab_size: int) -> list[int]:
    return [rng.randrange(10, vocab_size - 10) for _ in range(size)]


# ---- doors -----------------------------------------------------------------------------------------------------------


def door(name: str, address: str) -> AbstractAsyncContextManager[Send]:
    """What sends greedy requests for exactly so many tokens. `name`: grpc or http."""
    return {"grpc": _grpc, "http": _http}[name](address)


@asynccontextmanager
async def _grpc(address: str) -> AsyncIterator[Send]:
    async with AsyncClient(address) as client:

        async def send(prompt: list[int], new_tokens: int) -> Measured:
            measured, start = Measured(), time.perf_counter()
            try:
                async for output in client.generate(prompt, max_tokens=new_tokens, temperature=0.0, ignore_eos=True):
                    if output.token_ids:
                        measured.arrivals.append(time.perf_counter() - start)
                        measured.num_tokens += len(output.token_ids)
            except MotetError as error:
                measured.error = type(error).__name__
            measured.end = time.perf_counter() - start
            return measured

        yield send


@asynccontextmanager
async def _http(address: str) -> AsyncIterator[Send]:
    """A connection per request, without a library: its cost in Python would be the bench's, not the server's."""
    host, _, port = address.partition(":")

    async def send(prompt: list[int], new_tokens: int) -> Measured:
        measured, start = Measured(), time.perf_counter()
        body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        content = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nContent-Length: {len(content)}\r\n\r\n"
            writer.write(head.encode() + content)
            status = (await reader.readline()).split(b" ")
            if len(status) < 2 or status[1] != b"200":
                measured.error = f"HTTP {status[1].decode()}" if len(status) > 1 else "no answer"
            while measured.error is None:
                line = await reader.readline()
                if line.startswith(b"data: [DONE]"):
                    break
                if not line:
                    measured.error = "the stream was cut"
                elif line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        measured.error = event["error"]["type"]
                    elif event["choices"]:
                        measured.arrivals.append(time.perf_counter() - start)
                    elif event.get("usage"):
                        measured.num_tokens = event["usage"]["completion_tokens"]
        except OSError as error:
            measured.error = type(error).__name__
        finally:
            writer.close()
        measured.end = time.perf_counter() - start
        return measured

    yield send


# ---- loads -----------------------------------------------------------------------------------------------------------


async def open_loop(
    send: Send, times: Sequence[float], prompts: Callable[[], list[int]], new_tokens: int
) -> list[Measured]:
    """A request at each of `times`, in seconds from now, whether or not earlier ones are done."""

    async def one(at: float) -> Measured:
        prompt = prompts()
        await asyncio.sleep(at)
        measured = await send(prompt, new_tokens)
        measured.submitted = at
        return measured

    return list(await asyncio.gather(*(one(at) for at in times)))


async def closed_loop(
    send: Send, clients: int, duration_s: float, prompts: Callable[[], list[int]], new_tokens: int
) -> list[Measured]:
    """`clients` that have one request at a time each. The last begin before `duration_s`."""
    start = time.perf_counter()

    async def one_client() -> list[Measured]:
        done = []
        while (at := time.perf_counter() - start) < duration_s:
            measured = await send(prompts(), new_tokens)
            measured.submitted = at
            done.append(measured)
        return done

    return [measured for done in await asyncio.gather(*(one_client() for _ in range(clients))) for measured in done]


# ---- figures ---------------------------------------------------------------------------------------------------------


def summary(requests: Sequence[Measured], seconds: float, objective: Objective) -> dict[str, Any]:
    """Percentiles in milliseconds, and rates per second. `seconds`: how long the load lasted."""
    good = [request for request in requests if request.error is None and request.arrivals]
    within = [request for request in good if objective.is_met(request)]
    return {
        "requests": len(requests),
        "failures": dict(collections.Counter(r.error for r in requests if r.error is not None)),
        "seconds": seconds,
        "requests_s": len(good) / seconds,
        "tokens_s": sum(r.num_tokens for r in good) / seconds,
        "goodput_s": len(within) / seconds,
        "within_objective": len(within) / len(requests) if requests else 0.0,
        **{
            f"{name}_ms": {f"p{round(100 * p)}": 1e3 * percentile(values, p) for p in (0.5, 0.9, 0.99)}
            for name, values in series(requests).items()
        },
    }


def series(requests: Sequence[Measured]) -> dict[str, list[float]]:
    """The values of each kind of time over the requests that did not fail, in seconds."""
    good = [request for request in requests if request.error is None and request.arrivals]
    return {
        "ttft": [r.ttft for r in good],
        "icl": [gap for r in good for gap in r.gaps],
        "tpot": [r.tpot for r in good if r.num_tokens > 1],
        "e2e": [r.end for r in good],
    }
