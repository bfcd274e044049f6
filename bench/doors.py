"""`motet bench doors`: what the doors and forms of answers cost, and what a stream notices of a batch job.

doors       streams of equal requests through each door of one server, in turns
structures  a batch of answers, free and with a form, on the engine, in turns
job         the time between the tokens of one stream, alone and beside a batch job, in turns
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..pages import Bars, Part, Table
from ..runtime.api.config import EngineConfig
from ..runtime.api.request import Request
from ..runtime.api.sampling import SamplingParams
from ..runtime.api.structure import Structure
from ..runtime.client.batch import BatchClient
from ..runtime.client.client import AsyncClient
from ..runtime.engine.engine import Engine
from ..runtime.errors import UnavailableError
from .lib import load
from .lib.load import percentile
from .lib.report import machine, write
from .lib.servers import server_process

PROMPT = 64  # tokens
STREAMS, TOKENS = 8, 96
FORMS = {
    "JSON": Structure.json_schema({"type": "array", "items": {"type": "string"}, "minItems": 1000}),
    "JSON, strings of 40": Structure.json_schema(
        {"type": "array", "items": {"type": "string", "maxLength": 40}, "minItems": 1000}
    ),
    "any text, as a regular expression": Structure.regex("(.|\n)*"),
}
SCHEMA = {
    "type": "object",
    "properties": {
        "full_name": {"type": "string", "maxLength": 12},
        "age_in_years": {"type": "integer", "maximum": 99},
    },
    "required": ["full_name", "age_in_years"],
    "additionalProperties": False,
}


def run(bundle: Path, out: Path, *, repeats: int = 7, threads: int = 0) -> dict[str, Any]:
    """Write `out/doors.json` and `.html`. Raises `UnavailableError` if the server does not start."""
    streams, tokens = STREAMS, TOKENS
    with tempfile.TemporaryDirectory() as directory:
        options = ["--http-port", "0", "--gateways", "--state-dir", directory, "--log-level", "warning"]
        with server_process(bundle, threads, options) as address:
            grpc_address, http_address = address.split(", HTTP on ")
            doors = asyncio.run(_doors(grpc_address, http_address, streams, tokens, repeats))
            job = asyncio.run(_job(grpc_address, tokens, repeats))
    with Engine.from_bundle(bundle, EngineConfig(threads=threads)) as engine:
        forms = _forms(engine, streams, tokens, repeats)
    result: dict[str, Any] = {
        "bundle": bundle.name,
        "streams": streams,
        "tokens": tokens,
        "doors": doors,
        "structures": forms,
        "job": job,
        "machine": machine(),
    }
    write("doors", result, _parts(result), out)
    return result


def _parts(result: dict[str, Any]) -> list[Part]:
    tables = [
        Table(
            f"{result['bundle']}: {result['streams']} streams of {result['tokens']} tokens",
            ["door", "tok/s", "× gRPC"],
            [
                [name, f"{found['tokens_per_s']:.0f}", f"{found['share']:.2f}"]
                for name, found in result["doors"].items()
            ],
        ),
        Table(
            f"{result['streams']} answers at once",
            ["form", "tok/s", "× free"],
            [
                [name, f"{found['tokens_per_s']:.0f}", f"{found['share']:.2f}"]
                for name, found in result["structures"].items()
            ],
        ),
        Table(
            "between the tokens of one stream, ms",
            ["", "p50", "p99"],
            [[name, *(f"{result['job'][name][p]:.2f}" for p in ("p50", "p99"))] for name in ("alone", "beside a job")]
            + [["×", *(f"{result['job']['ratio'][p]:.2f}" for p in ("p50", "p99"))]],
        ),
    ]
    plots = [
        Bars(
            title,
            "tok/s",
            list(result[name]),
            {"median": [found["tokens_per_s"] for found in result[name].values()]},
        )
        for name, title in (("doors", "Doors"), ("structures", "Forms of answers"))
    ]
    return [*tables, *plots]


def _prompt(seed: int) -> list[int]:
    return [10 + (seed * 7919 + place * 31) % 10_000 for place in range(PROMPT)]


def _shares(rates: dict[str, list[float]], first: str) -> dict[str, dict[str, float]]:
    return {
        name: {
            "tokens_per_s": statistics.median(found),
            "share": statistics.median(one / other for one, other in zip(found, rates[first])),
        }
        for name, found in rates.items()
    }


# ---- doors -----------------------------------------------------------------------------------------------------------


async def _doors(
    grpc_address: str, http_address: str, streams: int, tokens: int, repeats: int
) -> dict[str, dict[str, float]]:
    async with load.door("grpc", grpc_address) as grpc, load.door("http", http_address) as http:
        ways = {"gRPC": grpc, "HTTP": http}
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(-1, repeats):  # the first warms up
            for name, way in ways.items():
                started = time.perf_counter()
                found = await asyncio.gather(*(way(_prompt(1000 * repeat + index), tokens) for index in range(streams)))
                if failed := [request.error for request in found if request.error is not None]:
                    raise UnavailableError(f"a stream over {name} failed: {failed[0]}")
                if repeat >= 0:
                    rates[name].append(streams * tokens / (time.perf_counter() - started))
        return _shares(rates, "gRPC")


# ---- forms of answers ------------------------------------------------------------------------------------------------


def _forms(engine: Engine, streams: int, tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    rates: dict[str, list[float]] = {}
    eos = dict.fromkeys(engine.model.eos_token_ids, -100.0)  # no answer shall end before the others

    def rate(structure: Structure | None, seed: int, **more: Any) -> float:
        sampling: dict[str, Any] = {
            "max_tokens": tokens,
            "temperature": 1.0,
            "logit_bias": eos,
            "speculative_tokens": 0,
        } | more
        requests = [
            Request(
                str(index),
                (tuple(_prompt(seed + index)),),
                engine.model.default_ensemble,
                SamplingParams(seed=index, **sampling),
                structure=structure,
            )
            for index in range(streams)
        ]
        started = time.perf_counter()
        found = engine.complete(requests)
        return sum(len(answer.token_ids) for [answer] in found) / (time.perf_counter() - started)

    small = Structure.json_schema(SCHEMA)
    for repeat in range(-1, repeats):
        found = {"free": rate(None, 1000 * repeat)}
        found |= {name: rate(form, 1000 * repeat) for name, form in FORMS.items()}
        found["a small object"] = rate(small, 1000 * repeat)
        found["a small object, drafted where it is forced"] = rate(small, 1000 * repeat, speculative_tokens=None)
        for name, value in found.items() if repeat >= 0 else ():
            rates.setdefault(name, []).append(value)
    return _shares(rates, "free")


# ---- a stream beside a job -------------------------------------------------------------------------------------------


async def _job(address: str, tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds between the tokens of one stream: alone, and while a job of many records runs."""
    gaps: dict[str, list[float]] = {"alone": [], "beside a job": []}
    records = [(str(index), {"prompt": _prompt(index), "max_tokens": 200, "ignore_eos": True}) for index in range(400)]
    async with AsyncClient(address) as client:
        await _gaps(client, tokens, 0)
        for repeat in range(repeats):
            for turn in range(4):
                gaps["alone"] += await _gaps(client, tokens, 100 * repeat + turn)
            with BatchClient(address) as batch:
                job = await asyncio.to_thread(batch.submit, "/v1/completions", records)
                await asyncio.sleep(1.0)
                for turn in range(4):
                    gaps["beside a job"] += await _gaps(client, tokens, 100 * repeat + 50 + turn)
                    await asyncio.sleep(0.2)  # in which the job has the machine
                await asyncio.to_thread(batch.delete, job.id)
            await asyncio.sleep(0.3)
    found = {name: {f"p{p}": 1e3 * percentile(values, p / 100) for p in (50, 99)} for name, values in gaps.items()}
    ratio = {p: found["beside a job"][p] / found["alone"][p] for p in ("p50", "p99")}
    return found | {"ratio": ratio}


async def _gaps(client: AsyncClient, tokens: int, seed: int) -> list[float]:
    times = []
    async for delta in client.generate(_prompt(seed), max_tokens=tokens, temperature=0.0, ignore_eos=True):
        if delta.token_ids:
            times.append(time.perf_counter())
    return [later - earlier for earlier, later in pairwise(times[1:])]
