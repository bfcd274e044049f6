"""`motet bench scale`: a job over a Ray cluster of this machine, against what its engines do alone; what routing by prefix is
worth; and the capacity model of docs/scale.md, checked against a simulation."""

from __future__ import annotations

import heapq
import json
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..pages import Bars, Lines, Part, Table
from ..runtime.api.config import EngineConfig
from ..runtime.client.client import Client
from ..runtime.cluster import jobs
from ..runtime.cluster.engine import ClusterEngine
from ..runtime.cluster.settings import ClusterSettings
from ..runtime.jobs.records import read_records
from ..runtime.jobs.work import RequestWork, open_lines
from ..runtime.serve.local import serve_engine
from .lib.report import machine, write

_WORK = RequestWork("/v1/completions", {"max_tokens": 48, "temperature": 0.0, "ignore_eos": True})
_DAY = 86_400.0


def run(
    bundle: Path,
    out: Path,
    *,
    actors: int = 0,
    records: int = 600,
    conversations: int = 12,
    turns: int = 5,
    repeats: int = 3,
) -> dict[str, Any]:
    """Write `out/scale.json` and `.html`. `actors`: engines of one thread; 0: as many as there are cores."""
    actors = actors or len(os.sched_getaffinity(0))
    job = _job(bundle, actors, records, repeats)
    rate = job["alone_records_s"] / actors
    result = {
        "bundle": bundle.name,
        "actors": actors,
        "records": records,
        "job": job,
        "routing": _routing(bundle, conversations, turns),
        "capacity": [_planned(rate, days_documents) for days_documents in (100_000, 1_000_000, 10_000_000)],
        "machine": machine(),
    }
    write("scale", result, _parts(result), out)
    return result


# ---- a job -----------------------------------------------------------------------------------------------------------


def _job(bundle: Path, actors: int, records: int, repeats: int) -> dict[str, Any]:
    """Records a second of `actors` engines alone at the same time, each in its process, and of a job over them. The rates are
    those between the first and the last eighth of the records: neither counts the start of processes and engines."""
    config = EngineConfig(threads=1)
    with tempfile.TemporaryDirectory(prefix="motet-scale-") as folder:
        alone, together = [], []
        with jobs.cluster("local", actors):
            for repeat in range(repeats):
                source = _write(Path(folder) / f"in-{repeat}.jsonl", records, repeat)
                alone.append(_alone(bundle, source, actors))
                parts = Path(folder) / f"out-{repeat}"
                with _watched(parts) as times:
                    report = jobs.run(_WORK, bundle, config, str(source), str(parts), actors=actors)
                assert report.done == records
                together.append(_rate(times))
    return {
        "alone_records_s": statistics.median(alone),
        "ray_records_s": statistics.median(together),
        "share": statistics.median(one / other for one, other in zip(together, alone, strict=True)),
    }


def _write(path: Path, records: int, seed: int) -> Path:
    rng = random.Random(seed)
    lines = [
        {"id": f"r{i}", "text": f"Report {rng.randrange(10**6)} of {rng.randrange(10**6)}: the meeting began with"}
        for i in range(records)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _alone(bundle: Path, source: Path, actors: int) -> float:
    """Records a second of all engines, each of which answers a part of the records."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(actors), context.Queue()
    processes = [context.Process(target=_part, args=(bundle, source, i, actors, barrier, queue)) for i in range(actors)]
    for process in processes:
        process.start()
    rates: list[float] = [queue.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return sum(rates)


def _part(bundle: Path, source: Path, index: int, actors: int, barrier: Any, queue: Any) -> None:
    with open_lines(_WORK, bundle, EngineConfig(threads=1), set()) as lines:
        own = list(read_records(source, with_requests=True))[index::actors]
        barrier.wait()
        started = time.perf_counter()
        lines.of(own)
        queue.put(len(own) / (time.perf_counter() - started))


@contextmanager
def _watched(parts: Path) -> Iterator[list[tuple[float, int]]]:
    """(time, records in parts) whenever a part appears, while the block runs."""
    found, stop = list[tuple[float, int]](), threading.Event()

    def watch() -> None:
        sizes: dict[Path, int] = {}
        while not stop.wait(0.02):
            new = [path for path in parts.glob("part-*.jsonl") if path not in sizes]
            for path in new:
                sizes[path] = path.read_bytes().count(b"\n")
            if new:
                found.append((time.perf_counter(), sum(sizes.values())))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        time.sleep(0.05)
        stop.set()
        thread.join()


def _rate(times: list[tuple[float, int]]) -> float:
    """Records a second between the first part and the last."""
    (first, before), (last, after) = times[0], times[-1]
    return (after - before) / (last - first)


# ---- routing ---------------------------------------------------------------------------------------------------------


def _routing(bundle: Path, conversations: int, turns: int) -> dict[str, dict[str, float]]:
    """The share of the earlier turns' tokens that a conversation finds in the cache, and the time to the first token."""
    found = {}
    for name, by_prefix in (("by prefix", True), ("by load alone", False)):
        settings = ClusterSettings("local", 2, by_prefix=by_prefix)
        with (
            ClusterEngine(bundle, EngineConfig(threads=1), settings) as engine,
            serve_engine(engine) as address,
            Client(address) as client,
        ):
            found[name] = _talk(client, conversations, turns)
    return found


def _talk(client: Client, conversations: int, turns: int) -> dict[str, float]:
    rng = random.Random(0)
    texts = [[rng.randrange(10, 40_000) for _ in range(200)] for _ in range(conversations)]
    cached = earlier = 0
    waits = []
    for turn in range(turns):
        for number in rng.sample(range(conversations), conversations):
            before, started = len(texts[number]), time.perf_counter()
            stream = client.generate(texts[number], max_tokens=8, temperature=0.0, ignore_eos=True)
            outputs = [next(stream)]
            waits.append(time.perf_counter() - started)
            outputs += stream
            usage = outputs[-1].usage
            assert usage is not None
            if turn:
                cached, earlier = cached + usage.cached_tokens, earlier + before - 100
            texts[number] += [token for output in outputs for token in output.token_ids]
            texts[number] += [rng.randrange(10, 40_000) for _ in range(92)]
    return {"cached_share": cached / earlier, "first_token_ms": 1e3 * statistics.median(waits[conversations:])}


# ---- capacity --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """`engines` of `rate` documents a second each, which fail once in `mtbf_s` seconds each and are back after `repair_s`; a
    failure repeats the documents of `lost_s` seconds. `spare`: the share of the capacity that is not planned for."""

    documents: int  # a day
    rate: float
    spare: float = 0.15
    mtbf_s: float = 7 * _DAY
    repair_s: float = 300.0
    lost_s: float = 20.0

    @property
    def share_up(self) -> float:
        """Of an engine's time that makes documents which last."""
        return 1 / (1 + (self.repair_s + self.lost_s) / self.mtbf_s)

    @property
    def engines(self) -> int:
        return math.ceil(self.documents / (_DAY * self.rate * self.share_up * (1 - self.spare)))

    @property
    def hours(self) -> float:
        """Until a day's documents are done."""
        return self.documents / (self.engines * self.rate * self.share_up) / 3600


def simulate(plan: Plan, seed: int) -> float:
    """Hours until all documents are done, when engines take pieces of them, fail at random times and lose their piece."""
    rng, piece = random.Random(seed), max(1, round(plan.rate * plan.lost_s * 2))
    fails = [rng.expovariate(1 / plan.mtbf_s) for _ in range(plan.engines)]
    free = [(0.0, engine) for engine in range(plan.engines)]
    heapq.heapify(free)
    left, now = plan.documents, 0.0
    running: list[float] = []
    while left > 0:
        now, engine = heapq.heappop(free)
        count = min(piece, left)
        end = now + count / plan.rate
        if fails[engine] < end:  # the piece is answered again by whoever is free
            back = max(fails[engine], now) + plan.repair_s
            fails[engine] = back + rng.expovariate(1 / plan.mtbf_s)
            heapq.heappush(free, (back, engine))
            continue
        left -= count
        running.append(end)
        heapq.heappush(free, (end, engine))
    return max(running) / 3600


def _planned(rate: float, documents: int) -> dict[str, Any]:
    """At the measured rate, and on machines that fail a hundred times as often."""
    plan, bad = Plan(documents, rate), Plan(documents, rate, mtbf_s=7 * _DAY / 100)
    return {
        "documents": documents,
        "engines": plan.engines,
        "hours": plan.hours,
        "simulated_hours": statistics.median(simulate(plan, seed) for seed in range(3)),
        "engines_often_failing": bad.engines,
        "hours_often_failing": bad.hours,
        "simulated_hours_often_failing": statistics.median(simulate(bad, seed) for seed in range(3)),
    }


def _parts(result: dict[str, Any]) -> list[Part]:
    job, routing = result["job"], result["routing"]
    rates = {"engines alone": job["alone_records_s"], "job over Ray": job["ray_records_s"]}
    capacity = [
        [
            f"{row['documents']:,}",
            str(row["engines"]),
            f"{row['hours']:.1f}",
            f"{row['simulated_hours']:.1f}",
            str(row["engines_often_failing"]),
            f"{row['hours_often_failing']:.1f}",
            f"{row['simulated_hours_often_failing']:.1f}",
        ]
        for row in result["capacity"]
    ]
    return [
        Table(
            f"{result['bundle']}: {result['records']} records, {result['actors']} engines of one thread",
            ["", "records/s", "share"],
            [[name, f"{rate:.1f}", f"{rate / job['alone_records_s']:.2f}"] for name, rate in rates.items()],
        ),
        Table(
            "Conversations of several turns on two replicas",
            ["routing", "earlier tokens cached", "first token, ms"],
            [[name, f"{row['cached_share']:.0%}", f"{row['first_token_ms']:.0f}"] for name, row in routing.items()],
        ),
        Table(
            "Engines for so many documents a day, by the model and by simulation",
            ["documents", "engines", "hours", "simulated", "engines, failing often", "hours", "simulated"],
            capacity,
        ),
        Bars("A job", "records/s", list(rates), {"median": list(rates.values())}),
        Lines(
            "Engines for a number of documents a day",
            ("documents a day", "engines"),
            {"failing once a week": [(row["documents"], row["engines"]) for row in result["capacity"]]},
            is_log=True,
        ),
    ]
