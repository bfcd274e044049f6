"""`motet bench serve`: latency and throughput over gRPC and HTTP, as clients see them.

Open loop: requests arrive as those of users do, whether or not earlier ones are done; the gaps between them have a gamma
distribution. Closed loop: C clients, each with one request at a time. Measured per request, by the client's clock:

    TTFT  submission → first token                              ICL   gap between two messages with tokens (inter-chunk latency)
    TPOT  (last token − first token) / (tokens − 1)             E2E   submission → end

Goodput counts the requests whose TTFT and TPOT are within the given limits. Failures are counted by error class. Loads take
turns; figures are medians over the repeats, with the lowest and the highest.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..pages import Bars, Lines, Part, Table
from ..runtime.client.client import Client
from .lib import aiperf, load
from .lib.load import Measured, Objective
from .lib.report import machine, write
from .lib.servers import server_process

_QUANTILES = [0.0, *(step / 50 for step in range(1, 50)), 0.99, 1.0]
_UNITS = {"open": "req/s", "closed": "clients"}
_NAMES = {"ttft": "TTFT", "icl": "ICL", "tpot": "TPOT", "e2e": "E2E"}


def run(
    bundle: Path,
    out: Path,
    *,
    doors: Sequence[str] = ("grpc",),
    rates: Sequence[float] = (1.0, 2.0),
    burstiness: float = 1.0,
    clients: Sequence[int] = (1, 8),
    duration_s: float = 15.0,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    objective: Objective | None = None,
    repeats: int = 3,
    seed: int = 0,
    threads: int = 0,
    aiperf_program: Path | None = None,
) -> dict[str, Any]:
    """Serve the bundle in its own process on 127.0.0.1, and measure it under each load; write `out/serve.json`, `.html`, and
    `serve.jsonl`, which has every request. `doors`: of grpc, http.

    With `aiperf_program`, AIPerf runs the closed loops over HTTP too, and its figures stand beside ours.

    A load lasts `duration_s` and until its last request is done. Raises `UnavailableError` if the server does not start.
    """
    objective = objective or Objective()
    out.mkdir(parents=True, exist_ok=True)
    loads = [(kind, value) for kind, values in (("open", rates), ("closed", clients)) for value in values]
    keys = [(door, kind, value) for kind, value in loads for door in doors]
    measured: dict[tuple[str, str, float], list[tuple[list[Measured], float]]] = {key: [] for key in keys}
    options = ["--http-port", "0"] if "http" in doors else []
    with server_process(bundle, threads, options) as address, (out / "serve.jsonl").open("w") as records:
        addresses = dict(zip(("grpc", "http"), address.split(", HTTP on "), strict=False))
        with Client(addresses["grpc"]) as client:
            [served] = client.models()
            model, vocab = served.name, served.vocab_size
            client.complete(load.random_prompt(random.Random(seed), prompt_tokens, vocab), max_tokens=2)  # warm
        for repeat in range(repeats):
            for door, kind, value in keys:
                rng = random.Random(f"{seed} {repeat} {door} {kind} {value}")  # no load finds another's prompts cached
                times = load.arrival_times(value, duration_s, seed + repeat, burstiness) if kind == "open" else None
                started = time.perf_counter()
                found = asyncio.run(
                    _load(door, addresses[door], times, int(value), duration_s, prompt_tokens, new_tokens, vocab, rng)
                )
                measured[door, kind, value].append((found, time.perf_counter() - started))
                for request in found:
                    records.write(json.dumps(_record(door, kind, value, repeat, request)) + "\n")
        checks = list[dict[str, Any]]()
        if aiperf_program is not None:
            lengths = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "seed": seed}
            ask = partial(
                aiperf.measure, aiperf_program, addresses["http"], model, bundle, duration_s=duration_s, **lengths
            )
            checks = [{"clients": value} | ask(clients=value) for value in clients]
    result = {
        "bundle": bundle.name,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "burstiness": burstiness,
        "repeats": repeats,
        "goodput_limits_ms": {"ttft": objective.ttft_ms, "tpot": objective.tpot_ms},
        "machine": machine(),
        "loads": [
            {"door": door, "load": kind, "rate_or_clients": value, **_figures(measured[door, kind, value], objective)}
            for door, kind, value in keys
        ],
        "aiperf": checks,
    }
    write("serve", result, _parts(result), out)
    return result


async def _load(
    door: str,
    address: str,
    times: Sequence[float] | None,
    clients: int,
    duration_s: float,
    prompt_tokens: int,
    new_tokens: int,
    vocab_size: int,
    rng: random.Random,
) -> list[Measured]:
    def prompts() -> list[int]:
        return load.random_prompt(rng, prompt_tokens, vocab_size)

    async with load.door(door, address) as send:
        if times is not None:
            return await load.open_loop(send, times, prompts, new_tokens)
        return await load.closed_loop(send, clients, duration_s, prompts, new_tokens)


def _record(door: str, kind: str, value: float, repeat: int, request: Measured) -> dict[str, Any]:
    """A request as a line of `serve.jsonl`; times are in milliseconds."""
    return {
        "door": door,
        "load": kind,
        "rate_or_clients": value,
        "repeat": repeat,
        "submitted_ms": round(1e3 * request.submitted, 3),
        "arrivals_ms": [round(1e3 * at, 3) for at in request.arrivals],
        "end_ms": round(1e3 * request.end, 3),
        "tokens": request.num_tokens,
        "error": request.error,
    }


def _figures(repeats: Sequence[tuple[list[Measured], float]], objective: Objective) -> dict[str, Any]:
    """Medians over the repeats, every repeat's own figures, and the distributions over all of them, in milliseconds."""
    single = [load.summary(requests, seconds, objective) for requests, seconds in repeats]
    pooled = load.series([request for requests, _ in repeats for request in requests])
    return {
        **_median(single),
        "requests": sum(found["requests"] for found in single),
        "failures": load.summary([r for requests, _ in repeats for r in requests], 1.0, objective)["failures"],
        "repeats": single,
        "quantiles_ms": {
            name: [[1e3 * load.percentile(pooled[name], share), share] for share in _QUANTILES] if pooled[name] else []
            for name in ("ttft", "icl")
        },
    }


def _median(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median of each number, also inside of mappings."""
    return {
        name: _median([other[name] for other in values])
        if isinstance(value, Mapping)
        else statistics.median(other[name] for other in values)
        for name, value in values[0].items()
        if name != "failures"
    }


def _parts(result: dict[str, Any]) -> list[Part]:
    loads = result["loads"]
    labels = [
        f"{found['door']}, {found['load']}, {found['rate_or_clients']:g} {_UNITS[found['load']]}" for found in loads
    ]
    header = ["load", "done", "failed", "tok/s", "goodput/s", "within"]
    header += [f"{name} {p}" for name in ("TTFT", "ICL", "E2E") for p in ("p50", "p99")]
    rows = []
    for label, found in zip(labels, loads, strict=True):
        failed = sum(found["failures"].values())
        row = [label, str(found["requests"] - failed), str(failed), f"{found['tokens_s']:.0f}"]
        row += [f"{found['goodput_s']:.2f}", f"{found['within_objective']:.0%}"]
        row += [f"{found[f'{name}_ms'][p]:.0f}" for name in ("ttft", "icl", "e2e") for p in ("p50", "p99")]
        rows.append(row)
    limits = result["goodput_limits_ms"]
    title = (
        f"{result['bundle']}: {result['prompt_tokens']} tokens in, {result['new_tokens']} out; times in ms, medians of "
        f"{result['repeats']}\ngoodput: TTFT ≤ {limits['ttft']:g} ms and TPOT ≤ {limits['tpot']:g} ms; arrivals: gamma, "
        f"shape {result['burstiness']:g}"
    )
    parts: list[Part] = [Table(title, header, rows), *_beside_aiperf(result)]
    for name, unit, text in (("tokens_s", "tok/s", "Throughput"), ("goodput_s", "req/s", "Goodput")):
        spans = {"median": [_span([one[name] for one in found["repeats"]]) for found in loads]}
        parts.append(Bars(text, unit, labels, {"median": [found[name] for found in loads]}, spans))
    for name in ("ttft", "tpot"):
        values = {p: [found[f"{name}_ms"][p] for found in loads] for p in ("p50", "p99")}
        spans = {
            p: [_span([one[f"{name}_ms"][p] for one in found["repeats"]]) for found in loads] for p in ("p50", "p99")
        }
        parts.append(Bars(_NAMES[name], "ms", labels, values, spans))
    for name in ("ttft", "icl"):
        lines = {label: found["quantiles_ms"][name] for label, found in zip(labels, loads, strict=True)}
        what = "requests" if name == "ttft" else "gaps"
        parts.append(Lines(f"{_NAMES[name]}: share of {what} within", ("ms", "share"), lines, is_log=True))
    return parts


def _beside_aiperf(result: dict[str, Any]) -> list[Table]:
    """Our figures and AIPerf's of the same closed loops over HTTP."""
    rows = []
    for check in result["aiperf"]:
        own = next(
            found
            for found in result["loads"]
            if (found["door"], found["load"], found["rate_or_clients"]) == ("http", "closed", check["clients"])
        )
        for name, found in (("Motet", own), (f"AIPerf {check['version']}", check)):
            cells = [f"{found[f'{kind}_ms'][p]:.1f}" for kind in _NAMES for p in ("p50", "p99")]
            rows.append([f"{check['clients']} clients, {name}", f"{found['tokens_s']:.0f}", *cells])
    header = ["HTTP, closed", "tok/s", *(f"{name} {p}" for name in _NAMES.values() for p in ("p50", "p99"))]
    return [Table("The same load by another load generator; times in ms", header, rows)] if rows else []


def _span(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)
