"""`motet bench trust`: what it costs to know one's callers, and what one tenant notices of another's flood.

throughput   16 streams: the engine alone, a server, with TLS and keys, with fewer messages, with an audit log; in turns
first token  of one request at a time, the same way
slow readers the server's memory and the gaps of 8 streams, beside 8 others that are read, and beside 8 that are read no further
audit        the tokens per second of 8 streams beside 10,000 short requests a minute, with an audit log and without, in turns
flood        a tenant's wait for the first token, alone and while another tenant has 64 streams open, with long and short steps
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..pages import Bars, Part, Table
from ..runtime.api.config import EngineConfig
from ..runtime.api.output import Output
from ..runtime.api.request import Request
from ..runtime.api.sampling import SamplingParams
from ..runtime.client.client import AsyncClient
from ..runtime.client.connection import Connection
from ..runtime.engine.engine import Engine
from ..runtime.trust.identity import Role
from ..runtime.trust.keys import add_key
from .lib.beside import RATE, STREAMS, beside_many_requests, slow_readers
from .lib.certificates import Authority
from .lib.load import percentile
from .lib.report import machine, write
from .lib.servers import running_server, server_process

FLOOD_STREAMS = 64
SHORT_STEP = 128  # rows: what waits for a step to end waits for less
PROMPT = 64  # tokens


def run(
    bundle: Path,
    out: Path,
    *,
    streams: int = 16,
    tokens: int = 96,
    repeats: int = 7,
    seconds: float = 20.0,
    threads: int = 0,
) -> dict[str, Any]:
    """Write `out/trust.json` and `.html`. `seconds`: of each load beside slow readers and beside many requests. Raises
    `UnavailableError` if a server does not start."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        authority = Authority(directory)
        pair = authority.issue("server")
        keys = {tenant: add_key(directory / "keys.json", tenant, [Role.INFER]) for tenant in ("a", "b")}
        secure = [
            "--tls-cert",
            str(pair.certificate),
            "--tls-key",
            str(pair.key),
            "--keys",
            str(directory / "keys.json"),
        ]
        secure += ["--max-num-seqs", str(streams), "--log-level", "warning"]
        audited = [*secure, "--audit", str(directory / "audit"), "--log-level", "info"]
        plain = stack.enter_context(server_process(bundle, threads, ["--max-num-seqs", str(streams)]))
        coalesced = stack.enter_context(server_process(bundle, threads, [*secure, "--stream-interval", "8"]))
        with_tls = stack.enter_context(server_process(bundle, threads, secure))
        with_audit = stack.enter_context(server_process(bundle, threads, audited))
        engine = stack.enter_context(Engine.from_bundle(bundle, EngineConfig(max_num_seqs=streams, threads=threads)))
        ways: dict[str, Callable[[int, int, int], list[float]]] = {
            "engine": lambda n, count, seed: _direct(engine, n, count, seed),
            "server": lambda n, count, seed: _served(Connection(plain), n, count, seed),
            "TLS and keys": lambda n, count, seed: _served(
                Connection(with_tls, keys["a"], ca=authority.path), n, count, seed
            ),
            "8 tokens per message": lambda n, count, seed: _served(
                Connection(coalesced, keys["a"], ca=authority.path), n, count, seed
            ),
            "and audit": lambda n, count, seed: _served(
                Connection(with_audit, keys["a"], ca=authority.path), n, count, seed
            ),
        }
        for way in ways.values():  # warm
            way(2, 8, 0)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        firsts: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(repeats):
            for name, way in ways.items():
                started = time.perf_counter()
                way(streams, tokens, 100 * repeat)
                rates[name].append(streams * tokens / (time.perf_counter() - started))
                firsts[name] += [way(1, 1, 1000 * repeat + i)[0] for i in range(10)]
        short_steps = stack.enter_context(
            server_process(bundle, threads, [*secure, "--max-num-batched-tokens", str(SHORT_STEP)])
        )
        floods = {}
        for num_rows, address in ((512, with_tls), (SHORT_STEP, short_steps)):
            flooding, other = (Connection(address, keys[tenant], ca=authority.path) for tenant in ("a", "b"))
            floods[f"{num_rows} rows per step"] = asyncio.run(_flood(flooding, other))
        reading = stack.enter_context(running_server(bundle, threads, secure))
        slow = slow_readers(reading, Connection(reading.address, keys["a"], ca=authority.path), seconds)
        recording = stack.enter_context(
            server_process(bundle, threads, [*secure, "--audit", str(directory / "many")])
        )  # and no log, which the other ones do not write either
        many = beside_many_requests(
            {
                "TLS and keys": Connection(with_tls, keys["a"], ca=authority.path),
                "and audit": Connection(recording, keys["a"], ca=authority.path),
            },
            seconds,
            repeats,
        )
    shares = {
        name: statistics.median(one / alone for one, alone in zip(found, rates["engine"]))
        for name, found in rates.items()
    }
    audit = statistics.median(one / other for one, other in zip(rates["and audit"], rates["TLS and keys"]))
    result: dict[str, Any] = {
        "bundle": bundle.name,
        "streams": streams,
        "prompt_tokens": PROMPT,
        "tokens": tokens,
        "tokens_per_s": {name: statistics.median(found) for name, found in rates.items()},
        "share_of_engine": shares,
        "share_with_audit": audit,
        "first_token_ms": {name: 1e3 * statistics.median(found) for name, found in firsts.items()},
        "flood": {name: _percentiles(*found) for name, found in floods.items()},
        "flood_streams": FLOOD_STREAMS,
        "slow_readers": slow,
        "many_requests": many,
        "machine": machine(),
    }
    write("trust", result, _parts(result), out)
    return result


def _parts(result: dict[str, Any]) -> list[Part]:
    ways, shares = list(result["tokens_per_s"]), result["share_of_engine"]
    rows = [
        [name, f"{result['tokens_per_s'][name]:.0f}", f"{shares[name]:.1%}", f"{result['first_token_ms'][name]:.1f}"]
        for name in ways
    ]
    lines = [[name, *(f"{figure:.1f}" for figure in figures.values())] for name, figures in result["flood"].items()]
    tables = [
        Table(
            f"{result['bundle']}: {result['streams']} streams of {result['tokens']} tokens",
            ["", "tok/s", "of the engine", "first token, ms"],
            rows,
        ),
        Table("a tenant's first token beside another's flood, ms", ["", *_NAMES], lines),
    ]
    many = result["many_requests"]
    tables += [
        Table(
            f"{STREAMS} streams that are read, beside {STREAMS} others",
            ["the others are", *next(iter(result["slow_readers"].values()))],
            [[name, *(f"{figure:.1f}" for figure in found.values())] for name, found in result["slow_readers"].items()],
        ),
        Table(
            f"{STREAMS} streams beside {RATE:.0f} short requests a second; with the audit log {many['share']:.1%}",
            ["", "tok/s of the streams", "short requests per second"],
            [[name, *(f"{figure:.1f}" for figure in found)] for name, found in many["ways"].items()],
        ),
    ]
    plots = [
        Bars("Throughput", "tok/s", ways, {"median": list(result["tokens_per_s"].values())}),
        Bars("First token", "ms", ways, {"median": list(result["first_token_ms"].values())}),
    ]
    return [*tables, *plots]


_NAMES = ("quiet p50", "quiet p99", "flooded p50", "flooded p99", "p99 ×")


def _percentiles(quiet: list[float], flooded: list[float]) -> dict[str, float]:
    """In milliseconds, and the ratio of the last percentiles."""
    found = [1e3 * percentile(times, share) for times in (quiet, flooded) for share in (0.5, 0.99)]
    return dict(zip(_NAMES, (*found, found[3] / found[1]), strict=True))


def _prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    """Prompts that share nothing."""
    return [tuple(10 + (seed * 7919 + i * 104729 + j * 31) % 10_000 for j in range(PROMPT)) for i in range(count)]


def _sampling(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def _direct(engine: Engine, streams: int, tokens: int, seed: int) -> list[float]:
    """Run so many requests at once; the seconds until the first token of each."""
    started, firsts = time.perf_counter(), dict[str, float]()
    requests = [
        Request(str(index), (prompt,), engine.model.default_ensemble, _sampling(tokens))
        for index, prompt in enumerate(_prompts(streams, seed))
    ]

    def note(delta: Output) -> None:
        firsts.setdefault(delta.request_id, time.perf_counter() - started)

    engine.complete(requests, note)
    return list(firsts.values())


def _served(connection: Connection, streams: int, tokens: int, seed: int) -> list[float]:
    async def all_of_them() -> list[float]:
        async with AsyncClient(connection) as client:
            await client.is_serving()  # connected
            return await asyncio.gather(*(_stream(client, prompt, tokens) for prompt in _prompts(streams, seed)))

    return asyncio.run(all_of_them())


async def _stream(client: AsyncClient, prompt: tuple[int, ...], tokens: int) -> float:
    """Seconds until the first token."""
    started, first = time.perf_counter(), 0.0
    async for delta in client.generate(prompt, sampling=_sampling(tokens)):
        if delta.token_ids and not first:
            first = time.perf_counter() - started
    return first


async def _flood(flooding: Connection, other: Connection) -> tuple[list[float], list[float]]:
    """Seconds until the first token of one tenant's requests, one after another: alone, and beside the flood."""
    async with AsyncClient(flooding) as flood, AsyncClient(other) as client:

        async def measure(seed: int) -> list[float]:
            return [await _stream(client, prompt, 8) for prompt in _prompts(200, seed)]

        async def stream(index: int) -> None:
            for turn in range(1_000):
                await _stream(flood, _prompts(1, 50_000 + 100 * index + turn)[0], 256)

        quiet = await measure(20_000)
        tasks = [asyncio.create_task(stream(index)) for index in range(FLOOD_STREAMS)]
        await asyncio.sleep(3.0)
        flooded = await measure(30_000)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return quiet, flooded
