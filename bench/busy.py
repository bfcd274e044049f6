"""`motet bench busy`: decoding while another process burns one core, against decoding alone.

Threads that wait for each other at barriers lose far more than one core's share: the thread that has no core holds up all
others until the operating system schedules it. Quiet and busy phases alternate within one run.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..pages import Bars, Table
from ..runtime.api.config import EngineConfig
from ..runtime.engine.observer import StepReport
from ..runtime.errors import ConfigError
from ..runtime.model.bundle import Bundle
from .lib import probes
from .lib.report import machine, write
from .lib.timed import random_request, run_together, timed_engine


def run(
    bundle_path: Path,
    out: Path,
    *,
    batch_sizes: Sequence[int] = (1, 16),
    context: int = 256,
    new_tokens: int = 128,
    repeats: int = 3,
    threads: int = 0,
) -> dict[str, Any]:
    """Measure, write `out/busy.json` and `.html`, print the table and one JSON line."""
    bundle = Bundle.load(bundle_path)
    if context <= new_tokens // 2:
        raise ConfigError(f"context ({context}) must be above half of new_tokens ({new_tokens})")
    config = EngineConfig(
        max_num_seqs=max(batch_sizes), max_model_len=context + new_tokens, threads=threads, prefix_cache=False
    )
    before = probes.measure(config.num_threads)
    phases: dict[int, dict[str, list[list[StepReport]]]] = {size: {"quiet": [], "busy": []} for size in batch_sizes}
    with timed_engine(bundle_path, config) as (engine, timed):
        for repeat in range(repeats + 1):  # the first is a warm-up and is not counted
            for size in batch_sizes:
                requests = [random_request(bundle, i, context - new_tokens // 2, new_tokens) for i in range(size)]
                quiet = run_together(engine, timed, requests)
                with burner():
                    busy = run_together(engine, timed, requests)
                if repeat:
                    phases[size]["quiet"].append(quiet)
                    phases[size]["busy"].append(busy)
    result = {
        "bundle": bundle.name,
        "bits": bundle.quantisation["bits"],
        "context": context,
        "repeats": repeats,
        "machine": machine(),
        "limits": before,
        "limits_after": probes.measure(config.num_threads),
        "rows": [_row(size, phases[size]) for size in batch_sizes],
    }
    write("busy", result, [_table(result), *_plots(result)], out)
    return result


@contextmanager
def burner() -> Iterator[None]:
    """Run a process that keeps one core busy."""
    process = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


def _row(size: int, phases: dict[str, list[list[StepReport]]]) -> dict[str, Any]:
    """Tokens per second (median over the repeats), the longest step of all repeats, and the number of steps."""
    row: dict[str, Any] = {"batch_size": size}
    for name, repeats in phases.items():
        row[f"{name}_tok_s"] = statistics.median(
            size * len(steps) / sum(step.seconds for step in steps) for steps in repeats
        )
        row[f"{name}_worst_ms"] = 1e3 * max(step.seconds for steps in repeats for step in steps)
        row[f"{name}_steps"] = sum(map(len, repeats))
    return {**row, "share": row["busy_tok_s"] / row["quiet_tok_s"]}


def _table(result: dict[str, Any]) -> Table:
    limits = result["limits"]
    title = (
        f"{result['bundle']}, {result['bits']} bits, {limits['threads']} threads, context {result['context']}; "
        f"read {limits['read_gb_s']:.0f} GB/s before, {result['limits_after']['read_gb_s']:.0f} after"
    )
    header = ["sequences", "quiet tok/s", "busy tok/s", "share", "quiet worst ms", "busy worst ms", "steps"]
    rows = [
        [
            str(row["batch_size"]),
            f"{row['quiet_tok_s']:,.0f}",
            f"{row['busy_tok_s']:,.0f}",
            f"{row['share']:.0%}",
            f"{row['quiet_worst_ms']:.1f}",
            f"{row['busy_worst_ms']:.1f}",
            str(row["busy_steps"]),
        ]
        for row in result["rows"]
    ]
    return Table(title, header, rows)


def _plots(result: dict[str, Any]) -> list[Bars]:
    labels = [f"{row['batch_size']} sequences" for row in result["rows"]]
    speeds = {name: [row[f"{name}_tok_s"] for row in result["rows"]] for name in ("quiet", "busy")}
    worst = {name: [row[f"{name}_worst_ms"] for row in result["rows"]] for name in ("quiet", "busy")}
    return [Bars("Decode", "tok/s", labels, speeds), Bars("Longest step", "ms", labels, worst)]
