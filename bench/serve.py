"""`motet bench serve`: latency and throughput over gRPC, as clients see them.

Open loop: requests arrive as a Poisson process, as those of users do, whether or not earlier ones are done. Closed loop: C
clients, each with one request at a time. Measured per request, by the client's clock:

    TTFT  submission → first token         ITL   gap between two messages with tokens
    TPOT  (last token − first token) / (tokens − 1)         E2E   submission → end

Goodput counts the requests whose TTFT and TPOT are within the given limits. Failures are counted by error class.
"""

from __future__ import annotations

import asyncio
import collections
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runtime.client.client import AsyncClient, Client
from ..runtime.errors import MotetError, UnavailableError
from .lib.report import Plot, machine, table, write


@dataclass(slots=True)
class Measured:
    """One request. Times are in seconds since its submission."""

    num_tokens: int = 0
    arrivals: list[float] = field(default_factory=list)  # of messages with tokens
    end: float = 0.0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.arrivals[0]

    @property
    def tpot(self) -> float:
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, self.num_tokens - 1)


def percentile(values: Sequence[float], share: float) -> float:
    """The percentile at `share` (0…1), with linear interpolation between ranks; 0 if there are no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def poisson_arrivals(rate: float, duration_s: float, seed: int) -> list[float]:
    """Arrival times in seconds, in [0, duration_s), with exponential gaps. `rate`: requests per second."""
    rng, now, times = random.Random(seed), 0.0, []
    while (now := now + rng.expovariate(rate)) < duration_s:
        times.append(now)
    return times


def summary(requests: Sequence[Measured], seconds: float, ttft_ms: float, tpot_ms: float) -> dict[str, Any]:
    """Percentiles in milliseconds, and rates per second. `seconds`: how long the load lasted."""
    good = [request for request in requests if request.error is None and request.arrivals]
    gaps = [b - a for request in good for a, b in zip(request.arrivals, request.arrivals[1:], strict=False)]
    within = [r for r in good if 1e3 * r.ttft <= ttft_ms and 1e3 * r.tpot <= tpot_ms]
    series = {
        "ttft": [r.ttft for r in good],
        "itl": gaps,
        "tpot": [r.tpot for r in good if r.num_tokens > 1],
        "e2e": [r.end for r in good],
    }
    return {
        "requests": len(requests),
        "failures": dict(collections.Counter(r.error for r in requests if r.error is not None)),
        "seconds": seconds,
        "requests_s": len(good) / seconds,
        "tokens_s": sum(r.num_tokens for r in good) / seconds,
        "goodput_s": len(within) / seconds,
        **{
            f"{name}_ms": {f"p{round(100 * p)}": 1e3 * percentile(values, p) for p in (0.5, 0.9, 0.99)}
            for name, values in series.items()
        },
    }


def run(
    bundle: Path,
    out: Path,
    *,
    rates: Sequence[float] = (1.0, 2.0),
    clients: Sequence[int] = (1, 8),
    duration_s: float = 15.0,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    ttft_ms: float = 1000.0,
    tpot_ms: float = 100.0,
    seed: int = 0,
    threads: int = 0,
) -> dict[str, Any]:
    """Serve the bundle in its own process on 127.0.0.1, and measure it under each load; write `out/serve.json` and `.html`.

    A load lasts `duration_s` and until its last request is done. Raises `UnavailableError` if the server does not start.
    """
    with server_process(bundle, threads) as address:
        with Client(address) as client:
            vocab = client.models()[0].vocab_size
            client.complete(_prompt(random.Random(seed), prompt_tokens, vocab), max_tokens=2)  # warm
        loads = []
        for load, values in (("open", rates), ("closed", clients)):
            for value in values:
                times = poisson_arrivals(float(value), duration_s, seed) if load == "open" else None
                started = time.perf_counter()
                measured = asyncio.run(
                    _load(address, times, int(value), duration_s, prompt_tokens, new_tokens, vocab, seed)
                )
                figures = summary(measured, time.perf_counter() - started, ttft_ms, tpot_ms)
                loads.append({"load": load, "rate_or_clients": value, **figures})
    result = {
        "bundle": bundle.name,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "goodput_limits_ms": {"ttft": ttft_ms, "tpot": tpot_ms},
        "machine": machine(),
        "loads": loads,
    }
    write("serve", result, [_table(result)], _plots(result), out)
    return result


@contextmanager
def server_process(bundle: Path, threads: int = 0, options: Sequence[str] = ()) -> Iterator[str]:
    """Run `motet serve` on a free port, with more `options`, yield its address, and end it.

    Raises `UnavailableError` if it does not start.
    """
    command = [sys.executable, "-m", "motet.cli", "serve", str(bundle), "--port", "0"]
    command += ["--threads", str(threads), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if " on " not in line:
                raise UnavailableError(f"the server did not start (exit code {process.wait()}); its message is above")
            yield line.rsplit(") on ", 1)[1].strip()
        finally:
            process.terminate()
            process.wait(timeout=30)


def _prompt(rng: random.Random, size: int, vocab_size: int) -> list[int]:
    return [rng.randrange(10, vocab_size - 10) for _ in range(size)]


async def _load(
    address: str,
    times: Sequence[float] | None,
    clients: int,
    duration_s: float,
    prompt_tokens: int,
    new_tokens: int,
    vocab_size: int,
    seed: int,
) -> list[Measured]:
    rng = random.Random(seed)
    async with AsyncClient(address) as client:

        async def one(delay: float = 0.0) -> Measured:
            prompt = _prompt(rng, prompt_tokens, vocab_size)
            await asyncio.sleep(delay)
            return await _measure(client, prompt, new_tokens)

        async def one_client(until: float) -> list[Measured]:
            done = []
            while time.perf_counter() < until:
                done.append(await one())
            return done

        if times is not None:
            return list(await asyncio.gather(*(one(at) for at in times)))
        until = time.perf_counter() + duration_s
        per_client = await asyncio.gather(*(one_client(until) for _ in range(clients)))
        return [measured for done in per_client for measured in done]


async def _measure(client: AsyncClient, prompt: list[int], new_tokens: int) -> Measured:
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


def _label(load: dict[str, Any]) -> str:
    unit = "req/s" if load["load"] == "open" else "clients"
    return f"{load['load']}, {load['rate_or_clients']:g} {unit}"


def _table(result: dict[str, Any]) -> Any:
    header = ["load", "done", "failed", "tok/s", "goodput/s", "TTFT p50", "p99", "ITL p50", "p99", "E2E p50", "p99"]
    rows = []
    for load in result["loads"]:
        failed = sum(load["failures"].values())
        row = [
            _label(load),
            str(load["requests"] - failed),
            str(failed),
            f"{load['tokens_s']:.0f}",
            f"{load['goodput_s']:.2f}",
        ]
        for name in ("ttft_ms", "itl_ms", "e2e_ms"):
            row += [f"{load[name]['p50']:.0f}", f"{load[name]['p99']:.0f}"]
        rows.append(row)
    title = (
        f"{result['bundle']} over gRPC: {result['prompt_tokens']} tokens in, {result['new_tokens']} out; times in ms"
    )
    return table(title, header, rows)


def _plots(result: dict[str, Any]) -> list[Plot]:
    labels = [_label(load) for load in result["loads"]]
    plots = [Plot("Throughput", "tok/s", labels, {"output": [load["tokens_s"] for load in result["loads"]]})]
    for name, title in (("ttft_ms", "Time to first token"), ("tpot_ms", "Time per output token")):
        series = {p: [load[name][p] for load in result["loads"]] for p in ("p50", "p90", "p99")}
        plots.append(Plot(title, "ms", labels, series))
    return plots
