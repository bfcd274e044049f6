"""`motet bench decode`: prefill and decode speed of a bundle in the engine, and the share of the machine's limits.

A decode figure is the median time of an engine step that samples one token, greedily, for each of B sequences at a
context of C positions. Ensemble sizes are interleaved in one run, so that their ratios to a single member are
measured in the same state of the machine. The least that a step must do:

    bytes  = weights of the trunk, the head and each tail of the ensemble once (members that run the base's layers have one
             tail), each low-rank update once, keys and values of B sequences
    MACs   = B × parameters of the trunk, the tails of the ensemble and the head; attention is not counted
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from ..pages import Bars, Table
from ..runtime.api.config import EngineConfig
from ..runtime.engine.engine import Engine
from ..runtime.errors import ConfigError
from ..runtime.model.bundle import WEIGHTS, Bundle
from ..runtime.model.layout import EMBEDDING, POSITIONS, ROTARY, WINDOW_ROTARY, Layer, decoder_layout
from ..runtime.model.stored import StoredTensor, own_name, stored_tensors
from .lib import probes
from .lib.report import machine, write
from .lib.timed import (
    StepTimer,
    attended_positions,
    cached_layers,
    kv_position_bytes,
    random_request,
    run_together,
    timed_engine,
)


def run(
    bundle_path: Path,
    out: Path,
    *,
    batch_sizes: Sequence[int] = (1, 4, 8, 16),
    ensemble_sizes: Sequence[int] | None = None,
    prompt_tokens: int = 512,
    context: int = 256,
    new_tokens: int = 32,
    repeats: int = 5,
    threads: int = 0,
    name: str = "decode",
) -> dict[str, Any]:
    """Measure, write `out/<name>.json` and `.html`, print tables and one JSON line. Lengths are in tokens."""
    bundle = Bundle.load(bundle_path)
    sizes = sorted({1, *(ensemble_sizes or (len(bundle.members),))})  # the others are compared with one member
    if not 1 <= sizes[0] <= sizes[-1] <= len(bundle.members):
        raise ConfigError(f"ensemble sizes must be in 1…{len(bundle.members)} (the bundle's members), got {sizes}")
    config = EngineConfig(
        max_num_seqs=max(batch_sizes),
        max_model_len=max(prompt_tokens, context) + new_tokens + 8,
        threads=threads,
        prefix_cache=False,  # repetitions have the same prompts, and must compute them
    )
    limits = probes.measure(config.num_threads)
    with timed_engine(bundle_path, config) as (engine, timed):
        kv_bytes = kv_position_bytes(bundle, config, native=timed.is_native)
        prefill = _prefill(engine, timed, bundle, prompt_tokens, repeats)
        decode = [
            row
            for batch_size in batch_sizes
            for row in _decode(engine, timed, bundle, batch_size, sizes, context, new_tokens, repeats, limits, kv_bytes)
        ]
    result = {
        "bundle": bundle.name,
        "bits": bundle.quantisation["bits"],
        "members": len(bundle.members),
        "prompt_tokens": prompt_tokens,
        "context": context,
        "machine": machine(),
        "limits": limits,
        "limits_after": probes.measure(config.num_threads),
        "prefill_tok_s": prefill,
        "decode": decode,
    }
    write(name, result, [*_tables(result), *_plots(result)], out)
    return result


def _prefill(engine: Engine, timed: StepTimer, bundle: Bundle, prompt_tokens: int, repeats: int) -> float:
    rates = []
    for index in range(repeats + 1):
        timed.steps.clear()
        engine.complete([random_request(bundle, index, prompt_tokens, 1)])
        rates.append(prompt_tokens / sum(step.seconds for step in timed.steps))
    return statistics.median(rates[1:])


def _decode(
    engine: Engine,
    timed: StepTimer,
    bundle: Bundle,
    batch_size: int,
    sizes: Sequence[int],
    context: int,
    new_tokens: int,
    repeats: int,
    limits: dict[str, Any],
    kv_bytes: int,
) -> list[dict[str, Any]]:
    """One row per ensemble size; the sizes take turns within each repeat."""
    times: dict[int, list[float]] = {size: [] for size in sizes}
    parts: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    length = context - new_tokens // 2
    for _ in range(repeats):
        for size in sizes:
            requests = [random_request(bundle, i, length, new_tokens, members=size) for i in range(batch_size)]
            full = run_together(engine, timed, requests)
            if not full:
                raise ConfigError(f"no step decoded {batch_size} sequences at once; raise new_tokens ({new_tokens})")
            times[size].append(statistics.median(step.seconds for step in full))
            parts[size] += [step.parts for step in full if step.parts]
    rows = []
    for size in sizes:
        seconds = statistics.median(times[size])
        moved, macs = step_work(bundle, batch_size, size, context, kv_bytes, native=timed.is_native)
        rows.append(
            {
                "batch_size": batch_size,
                "ensemble_size": size,
                "step_ms": 1e3 * seconds,
                "parts_ms": _parts_ms(parts[size], 1e3 * seconds),
                "tok_s": batch_size / seconds,
                "ratio_to_one_member": seconds / statistics.median(times[sizes[0]]),
                "bytes": moved,
                "macs": macs,
                "share_of_bandwidth": moved / seconds / (1e9 * limits["read_gb_s"]),
                "share_of_int8": macs / seconds / (1e9 * limits["int8_gmac_s"]) if limits["int8_gmac_s"] else None,
            }
        )
    return rows


def _parts_ms(parts: Sequence[dict[str, float]], step_ms: float) -> dict[str, float]:
    """Medians of the native parts in ms, and "outside": the time of a step that is in none of them."""
    if not parts:
        return {}
    medians = {name: 1e3 * statistics.median(part[name] for part in parts) for name in parts[0]}
    return {**medians, "outside": max(0.0, step_ms - sum(medians.values()))}


def step_work(
    bundle: Bundle, batch_size: int, ensemble_size: int, context: int, kv_bytes: int, *, native: bool
) -> tuple[int, int]:
    """The least (bytes, multiply-accumulates) that a decode step must read and compute. `kv_bytes`: see
    `kv_position_bytes`. `native`: count weights as the native kernels pack them, otherwise as they are stored."""
    config, layout = bundle.config, decoder_layout(bundle.config)
    tensors = stored_tensors(bundle.path / WEIGHTS)
    chosen = bundle.members[:ensemble_size]
    gathered = (*ROTARY, *WINDOW_ROTARY, POSITIONS, *(() if layout.head == EMBEDDING else (EMBEDDING,)))

    def is_read(name: str) -> bool:
        if name.startswith("members."):
            return any(name.startswith(own_name(member, "model.")) for member in chosen)
        needed = any(own_name(member, name) not in tensors for member in chosen)  # False if every member has its own
        return needed and not name.startswith(gathered)

    size = _packed_bytes if native else _stored_bytes
    updates = _update_bytes(bundle, [n for n in tensors if ".lora_" in n and is_read(n)]) if native else {}
    moved = sum(
        updates[n] if n in updates else size(n, tensors) for n in tensors if is_read(n) and ".experts." not in n
    )
    expert_bytes = sum(size(n, tensors) for n in tensors if is_read(n) and ".experts." in n)
    # Which experts the rows choose is not known: as if at random, each row its own.
    share = 1 - (1 - config.experts_per_token / config.num_experts) ** batch_size if config.num_experts else 0.0
    moved += round(share * expert_bytes)
    layers = cached_layers(bundle, ensemble_size)
    moved += batch_size * attended_positions(layers, context) * kv_bytes
    macs = sum(_layer_macs(layer, config.experts_per_token) for layer in layers)
    return moved, batch_size * (macs + config.hidden_size * config.vocab_size)


def _layer_macs(layer: Layer, experts_per_token: int) -> int:
    """Of one row."""
    runs = (
        layer.linears if layer.router is None else (*layer.linears[:2], *layer.linears[2 : 2 + 2 * experts_per_token])
    )
    return sum(linear.rows * linear.columns for linear in runs)


def _stored_bytes(name: str, tensors: Mapping[str, StoredTensor]) -> int:
    return tensors[name].length


def _update_bytes(bundle: Bundle, names: Sequence[str]) -> dict[str, int]:
    """Of low-rank updates as the native kernels pack them: one byte a value, without the zeros of a fused layer's B."""
    with safe_open(bundle.path / WEIGHTS, framework="numpy") as file:
        return {name: int(np.count_nonzero(file.get_tensor(name))) for name in names}


def _packed_bytes(name: str, tensors: Mapping[str, StoredTensor]) -> int:
    """Packed scales and minima have 2 bytes each."""
    if name.endswith((".scales", ".minima")):
        return 2 * math.prod(tensors[name].shape)
    return tensors[name].length


def _tables(result: dict[str, Any]) -> list[Any]:
    limits = result["limits"]
    title = (
        f"{result['bundle']}, {result['bits']} bits, {limits['threads']} threads; prefill {result['prefill_tok_s']:,.0f} tok/s; "
        f"context {result['context']}; read {limits['read_gb_s']:.0f} GB/s, int8 {limits['int8_gmac_s']:.0f} GMAC/s"
    )
    header = ["sequences", "members", "step ms", "tok/s", "× one member", "of bandwidth", "of int8"]
    rows = [
        [
            *_sizes(row),
            f"{row['step_ms']:.2f}",
            f"{row['tok_s']:,.0f}",
            f"{row['ratio_to_one_member']:.2f}",
            f"{row['share_of_bandwidth']:.0%}",
            "–" if row["share_of_int8"] is None else f"{row['share_of_int8']:.0%}",
        ]
        for row in result["decode"]
    ]
    names = list(result["decode"][0]["parts_ms"]) if result["decode"] else []
    if not names:
        return [Table(title, header, rows)]
    parts = [[*_sizes(row), *(f"{row['parts_ms'][name]:.2f}" for name in names)] for row in result["decode"]]
    return [Table(title, header, rows), Table("Parts of a step, ms", ["sequences", "members", *names], parts)]


def _sizes(row: dict[str, Any]) -> list[str]:
    return [str(row["batch_size"]), str(row["ensemble_size"])]


def _plots(result: dict[str, Any]) -> list[Bars]:
    batch_sizes = sorted({row["batch_size"] for row in result["decode"]})
    sizes = sorted({row["ensemble_size"] for row in result["decode"]})
    found = {(row["batch_size"], row["ensemble_size"]): row for row in result["decode"]}
    labels = [f"{size} sequences" for size in batch_sizes]

    def bars(field: str) -> dict[str, Sequence[float]]:
        return {f"{k} members": [found[b, k][field] for b in batch_sizes] for k in sizes}

    return [Bars("Decode", "tok/s", labels, bars("tok_s")), Bars("Step", "ms", labels, bars("step_ms"))]
