"""`motet bench context`: how the time of a decode step of one sequence grows with its context.

A longer context costs at least the reading of its keys and values, so the time is a line:

    ms = fixed + slope · positions,      slope ≥ bytes of keys and values per position / read bandwidth

Contexts take turns within each repeat. All prompts are beginnings of one text, and the prefix cache keeps their blocks. So
each position is computed once, and only decoding is repeated.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..pages import Bars, Table
from ..runtime.api.config import EngineConfig
from ..runtime.errors import ConfigError
from ..runtime.model.bundle import Bundle
from .lib import probes
from .lib.report import machine, write
from .lib.timed import cached_layers, kv_position_bytes, random_request, run_together, timed_engine


def run(
    bundle_path: Path,
    out: Path,
    *,
    contexts: Sequence[int] = (256, 512, 1024, 2048, 4096),
    new_tokens: int = 16,
    repeats: int = 5,
    threads: int = 0,
) -> dict[str, Any]:
    """Measure, write `out/context.json` and `.html`, print the table and one JSON line. Contexts are in positions."""
    bundle = Bundle.load(bundle_path)
    if len(set(contexts)) < 2 or min(contexts) <= new_tokens:
        raise ConfigError(f"give two contexts or more, each above new_tokens ({new_tokens}), got {list(contexts)}")
    config = EngineConfig(max_num_seqs=2, max_model_len=max(contexts) + new_tokens, threads=threads)
    before = probes.measure(config.num_threads)
    times: dict[int, list[float]] = {context: [] for context in sorted(contexts)}
    with timed_engine(bundle_path, config) as (engine, timed):
        growing = [layer for layer in cached_layers(bundle) if layer.window is None or layer.window >= max(contexts)]
        position_bytes = len(growing) * kv_position_bytes(bundle, config, native=timed.is_native)
        for repeat in range(repeats + 1):
            for context in reversed(times):  # the longest first: the others reuse its blocks
                request = random_request(bundle, 0, context - new_tokens // 2, new_tokens)
                steps = run_together(engine, timed, [request])
                if repeat:
                    times[context].append(statistics.median(step.seconds for step in steps))
    rows = [{"context": context, "ms": 1e3 * statistics.median(values)} for context, values in times.items()]
    after = probes.measure(config.num_threads)
    result = {
        "bundle": bundle.name,
        "bits": bundle.quantisation["bits"],
        "repeats": repeats,
        "machine": machine(),
        "limits": before,
        "limits_after": after,
        "contexts": rows,
        **fit(list(times), [row["ms"] for row in rows], position_bytes),
    }
    result["share_of_bandwidth"] = result["slope_gb_s"] / max(before["read_gb_s"], after["read_gb_s"])
    write("context", result, [_table(result), *_plots(result)], out)
    return result


def fit(contexts: Sequence[int], ms: Sequence[float], position_bytes: int) -> dict[str, Any]:
    """The least-squares line through the times, the deviations from it, and the bandwidth in GB/s that its slope means.

    contexts: positions. ms: time per step at each context. position_bytes: keys and values per position.
    """
    slope, fixed = np.polyfit(contexts, ms, 1)
    line = fixed + slope * np.asarray(contexts)
    off = np.asarray(ms) / line - 1
    spread = float(np.sum((np.asarray(ms) - np.mean(ms)) ** 2))
    return {
        "fixed_ms": float(fixed),
        "slope_us": float(1e3 * slope),
        "r2": 1 - float(np.sum((np.asarray(ms) - line) ** 2)) / spread if spread else 1.0,
        "largest_deviation": float(np.max(np.abs(off))),
        "position_bytes": position_bytes,
        "slope_gb_s": float(position_bytes / (slope * 1e6)),
    }


def _table(result: dict[str, Any]) -> Table:
    title = (
        f"{result['bundle']}, {result['bits']} bits, one sequence: {result['fixed_ms']:.2f} ms + {result['slope_us']:.3f} µs "
        f"per position (R² {result['r2']:.4f}, off by {result['largest_deviation']:.1%} at most)\n"
        f"{result['position_bytes']:,} bytes per position: {result['slope_gb_s']:.1f} GB/s, "
        f"{result['share_of_bandwidth']:.0%} of the read bandwidth "
        f"({result['limits']['read_gb_s']:.0f} GB/s before, {result['limits_after']['read_gb_s']:.0f} after)"
    )
    rows = [
        [
            f"{row['context']:,}",
            f"{row['ms']:.2f}",
            f"{1e3 / row['ms']:,.0f}",
            f"{result['fixed_ms'] + 1e-3 * result['slope_us'] * row['context']:.2f}",
        ]
        for row in result["contexts"]
    ]
    return Table(title, ["context", "ms", "tok/s", "line ms"], rows)


def _plots(result: dict[str, Any]) -> list[Bars]:
    labels = [f"{row['context']:,} positions" for row in result["contexts"]]
    return [Bars("Decode step, 1 sequence", "ms", labels, {"ms": [row["ms"] for row in result["contexts"]]})]
