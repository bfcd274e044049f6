"""`motet bench flood`: what other clients notice of prompts that are far too long.

A server streams one answer after another to one client, and another asks for its health ten times a second; first alone,
then while further clients send prompts of megabytes without a pause, each of which is refused. Measured are the largest gap
between two messages of a stream, and the slowest answer of the health service. The flooding clients run at the lowest
priority, because in a real network their own work is done on other machines.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from ..pages import Bars, Part, Table
from ..proto import inference_pb2, inference_pb2_grpc
from ..runtime.client.client import Client
from ..runtime.errors import UnavailableError
from .lib.load import percentile
from .lib.report import machine, write
from .lib.servers import server_process

HEALTH_EVERY_S = 0.1


@dataclass(slots=True)
class Watched:
    """Seconds between two messages of a stream, and per answer of the health service."""

    gaps: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """In milliseconds."""
        return {
            "messages": len(self.gaps),
            "gap_ms_p50": 1e3 * percentile(self.gaps, 0.5),
            "gap_ms_p99": 1e3 * percentile(self.gaps, 0.99),
            "gap_ms_max": 1e3 * max(self.gaps),
            "health_ms_p50": 1e3 * percentile(self.health, 0.5),
            "health_ms_max": 1e3 * max(self.health),
        }


def run(
    bundle: Path,
    out: Path,
    *,
    clients: int = 12,
    prompt_bytes: int = 4_000_000,
    duration_s: float = 20.0,
    threads: int = 0,
) -> dict[str, Any]:
    """Write `out/flood.json` and `.html`. Raises `UnavailableError` if the server does not start, or if no client of the
    flood was refused."""
    with server_process(bundle, threads) as address:
        _watch(address, 2.0)  # warm
        quiet = _watch(address, duration_s)
        with _flood(address, clients, prompt_bytes) as refused:
            time.sleep(1.0)  # until all of them send
            flooded = _watch(address, duration_s)
    rows = {"quiet": quiet.figures(), "flooded": flooded.figures()}
    if not refused or refused[0] < clients:
        raise UnavailableError(f"the flood was refused {refused} times; it must be at least once per client")
    result = {
        "bundle": bundle.name,
        "clients": clients,
        "prompt_bytes": prompt_bytes,
        "duration_s": duration_s,
        "refused": refused[0],
        "gap_ratio": rows["flooded"]["gap_ms_max"] / rows["quiet"]["gap_ms_max"],
        "loads": rows,
        "machine": machine(),
    }
    write("flood", result, _parts(result), out)
    return result


def _parts(result: dict[str, Any]) -> list[Part]:
    rows = result["loads"]
    names = list(rows["quiet"])
    sent = f"{result['clients']} clients send {result['prompt_bytes'] / 1e6:g} MB"
    title = f"{result['bundle']}: {sent}; largest gap × {result['gap_ratio']:.2f}"
    lines = [[load, *(f"{figures[name]:.1f}" for name in names)] for load, figures in rows.items()]
    plots = [
        Bars(name.replace("_ms_", ", "), "ms", list(rows), {"largest": [figures[name] for figures in rows.values()]})
        for name in ("gap_ms_max", "health_ms_max")
    ]
    return [Table(title, ["load", *names], lines), *plots]


def _watch(address: str, duration_s: float) -> Watched:
    """Stream answers for so long, and ask for the health beside them."""
    watched, end = Watched(), time.perf_counter() + duration_s
    asking = threading.Thread(target=_ask_health, args=(address, watched, end))
    asking.start()
    with Client(address) as client:
        while time.perf_counter() < end:
            last = None
            for delta in client.generate([5, 6, 7, 8], temperature=0.0, ignore_eos=True, max_tokens=256):
                now = time.perf_counter()
                if last is not None and delta.token_ids:
                    watched.gaps.append(now - last)
                last = now
    asking.join()
    return watched


def _ask_health(address: str, watched: Watched, end: float) -> None:
    with Client(address) as client:
        while time.perf_counter() < end:
            start = time.perf_counter()
            if not client.is_serving():
                raise UnavailableError("the health service does not report SERVING")
            watched.health.append(time.perf_counter() - start)
            time.sleep(HEALTH_EVERY_S)


@contextmanager
def _flood(address: str, clients: int, prompt_bytes: int) -> Iterator[list[int]]:
    """Clients in a process of their own, until the block ends; then the list has the number of refusals."""
    command = [sys.executable, "-m", __name__, address, str(clients), str(prompt_bytes)]
    refused: list[int] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield refused
            told, _ = process.communicate("end\n", timeout=60)
            refused += map(int, told.split())
        finally:
            process.kill()


def main(arguments: Sequence[str]) -> None:
    """Send prompts until a line comes on stdin, and print how many were refused."""
    address, clients, prompt_bytes = arguments[0], int(arguments[1]), int(arguments[2])
    os.nice(19)
    prompt = inference_pb2.Prompt(text="lorem ipsum " * (prompt_bytes // 12))
    message, ended, counts = inference_pb2.GenerateRequest(prompt=prompt), threading.Event(), [0] * clients

    def send(index: int) -> None:
        # Not our client: it refuses such a prompt itself.
        with grpc.insecure_channel(address, options=[("grpc.max_send_message_length", -1)]) as channel:
            complete = inference_pb2_grpc.InferenceStub(channel).Complete  # type: ignore[no-untyped-call]
            while not ended.is_set():
                try:
                    complete(message)
                except grpc.RpcError as error:
                    refused = error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT)
                    counts[index] += refused
                    if not refused:
                        print(error, file=sys.stderr)

    threads = [threading.Thread(target=send, args=(index,)) for index in range(clients)]
    for thread in threads:
        thread.start()
    sys.stdin.readline()
    ended.set()
    for thread in threads:
        thread.join()
    print(sum(counts))


if __name__ == "__main__":
    main(sys.argv[1:])
