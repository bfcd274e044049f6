"""`motet bench decode --backend torch`: decode speed of the torch backend on random weights of a known shape.

A figure is the median wall time of `step()` for B sequences at a context of C positions, each drawing one token. It includes
the check of the batch, the upload, the replayed graph, mix and draw, and the read of the tokens. `replay_ms` is the graph
alone; the difference is the cost of host and sampling. A step must move at least:

    bytes = every weight once (trunk, the tails of the ensemble, the head) + keys and values of B sequences

The outputs of a slice of three layers are compared with the eager oracle in float32, on the same weights.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...pages import Table
from ...runtime.api.config import EngineConfig
from ...runtime.api.request import Space
from ...runtime.backends.torch.backend import TorchBackend
from ...runtime.backends.torch.options import TorchOptions
from ...runtime.errors import MotetError
from ...runtime.model.config import DecoderConfig
from ...runtime.schedule.batch import Batch, ResolvedSampling, SampleRow
from ..lib.report import write
from .random_model import RandomModel, shape

SLICE_ERROR = 0.03  # largest ‖kernels in bfloat16 − oracle in float32‖ / ‖oracle‖ of a slice's logits


def machine(options: TorchOptions) -> dict[str, Any]:
    """The device, kernels and versions that the figures are measured on."""
    found: dict[str, Any] = {"torch": torch.__version__, "device": str(options.device), "kernels": options.kernels}
    if options.device.type == "cuda":
        import triton

        found |= {"device": torch.cuda.get_device_name(), "triton": triton.__version__}
    return found


def limits(device: torch.device) -> dict[str, float]:
    """Copy bandwidth (GB/s, read + written) and matmul rate (TFLOP/s) of the device, measured now."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    source = torch.randn(2**30 if cuda else 2**25, device=device, dtype=dtype)
    target, size = torch.empty_like(source), 8192 if cuda else 1024
    x, y = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    copy = _median_seconds(lambda: target.copy_(source), 10, device)
    product = _median_seconds(lambda: torch.mm(x, y), 10, device)
    moved = 2 * source.numel() * source.element_size()
    return {"copy_gb_s": moved / copy / 1e9, "matmul_tflop_s": 2 * size**3 / product / 1e12}


def _median_seconds(run: Any, repeats: int, device: torch.device) -> float:
    """Median time of `run` after three warm-up runs; on a GPU it is measured with events."""
    times: list[float] = []
    for index in range(repeats + 3):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            run()
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) / 1e3
        else:
            begin = time.perf_counter()
            run()
            seconds = time.perf_counter() - begin
        if index >= 3:
            times.append(seconds)
    return statistics.median(times)


def run(
    name: str,
    out: Path,
    *,
    bits: int = 16,
    batch_sizes: Sequence[int] = (1, 64),
    ensemble_sizes: Sequence[int] = (1,),
    tail_layers: int = 2,
    context: int = 1024,
    repeats: int = 30,
    kv_dtype: str = "auto",
    threads: int = 0,
) -> dict[str, Any]:
    """Measure, write `out/torch-decode.json` and `.html`, print a table and one JSON line."""
    options = TorchOptions.of_machine()
    config = shape(name)
    result: dict[str, Any] = {
        "shape": name,
        "bits": bits,
        "context": context,
        "tail_layers": tail_layers,
        "kv_dtype": kv_dtype,
        "machine": machine(options),
        "limits": limits(options.device),
        "slice_error": check_slice(config, bits, options),
        "decode": [],
    }
    for size in sorted(set(ensemble_sizes)):
        result["decode"] += measure(
            config,
            options,
            result["limits"]["copy_gb_s"],
            bits=bits,
            batch_sizes=batch_sizes,
            members=size,
            tail_layers=tail_layers if max(ensemble_sizes) > 1 else 0,
            context=context,
            repeats=repeats,
            kv_dtype=kv_dtype,
            threads=threads,
        )
    write("torch-decode", result, [_table(result)], out)
    return result


def measure(
    config: DecoderConfig,
    options: TorchOptions,
    copy_gb_s: float,
    *,
    bits: int,
    batch_sizes: Sequence[int],
    members: int,
    tail_layers: int,
    context: int,
    repeats: int,
    kv_dtype: str = "auto",
    threads: int = 0,
) -> list[dict[str, Any]]:
    """Measure one model: one row of figures per batch size. `copy_gb_s`: the device's copy bandwidth."""
    weights = RandomModel(config, bits, options.device, options.dtype).weights(members, tail_layers)
    values = {"max_num_seqs": max(batch_sizes), "max_model_len": context + 16, "threads": threads, "kv_dtype": kv_dtype}
    backend = TorchBackend.from_weights(
        config, weights, EngineConfig.from_dict({"backend": "torch", **values}), options
    )
    rows = []
    for size in batch_sizes:
        batch = decode_batch(config, backend, size, context, members)
        seconds = _step_seconds(backend, batch, repeats)
        layers = len(weights.trunk) + members * tail_layers
        cached = size * context * layers * 2 * config.kv_size * backend._cache.trunk[0].keys.element_size()
        moved = weights.num_bytes + cached
        rows.append(
            {
                "batch_size": size,
                "ensemble_size": members,
                "step_ms": 1e3 * seconds,
                "replay_ms": _replay_ms(backend, size, options, repeats),
                "tok_s": size / seconds,
                "bytes": moved,
                "share_of_copy_bandwidth": moved / seconds / 1e9 / copy_gb_s,
                "profile_us": _profile(backend, batch, options),
            }
        )
    del backend, weights
    gc.collect()
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def decode_batch(config: DecoderConfig, backend: TorchBackend, size: int, context: int, members: int) -> Batch:
    """A decode step of `size` sequences, each with `context` positions after it. Each draws from a uniform mix of all members
    with the default sampling parameters."""
    rng = np.random.default_rng(0)
    width = -(-context // backend.block_size)
    tables = (np.arange(size * width, dtype=np.int32) % backend.num_blocks).reshape(size, width)
    last = context - 1
    samples = [
        SampleRow(
            terms=tuple((row, member, 1 / members) for member in range(members)),
            space=Space.LOGITS,
            sampling=ResolvedSampling(seed=row),
            position=context,
        )
        for row in range(size)
    ]
    return Batch(
        token_ids=rng.integers(0, config.vocab_size, size),
        positions=np.full(size, last, np.int32),
        slot_mapping=tables[:, last // backend.block_size].astype(np.int64) * backend.block_size
        + last % backend.block_size,
        cu_seqlens_q=np.arange(size + 1, dtype=np.int32),
        context_lens=np.full(size, context, np.int32),
        block_tables=tables,
        members=[tuple(range(members))] * size,
        trunk_cached=np.zeros(size, np.bool_),
        samples=samples,
        freed_blocks=np.empty(0, np.int32),
    )


def _step_seconds(backend: TorchBackend, batch: Batch, repeats: int) -> float:
    times = []
    for index in range(repeats + 3):
        start = time.perf_counter()
        output = backend.step(batch)  # ends with the read of the tokens, so the device has finished
        if index >= 3:
            times.append(time.perf_counter() - start)
    if output.errors:
        raise MotetError(f"the measured step has errors: {output.errors}")
    return statistics.median(times)


def _replay_ms(backend: TorchBackend, size: int, options: TorchOptions, repeats: int) -> float | None:
    if backend._graphs is None or options.device.type != "cuda":
        return None
    rung = backend._graphs.rung(size)
    found = next((r for key, r in backend._graphs._rungs.items() if key[0] == rung), None)
    return None if found is None else 1e3 * _median_seconds(found.graph.replay, repeats, options.device)


def _profile(backend: TorchBackend, batch: Batch, options: TorchOptions) -> dict[str, float]:
    """Kernel → microseconds per step, for the 12 kernels that take most of it. It shows where a slow step loses time."""
    if options.device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    steps = 5
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(steps):
                backend.step(batch)
        events = sorted(found.key_averages(), key=lambda event: -event.device_time_total)
    except Exception as error:  # the figure is valid without a profile
        return {f"no profile: {error}": 0.0}
    return {event.key[:80]: event.device_time_total / steps for event in events[:12]}


@torch.inference_mode()
def check_slice(config: DecoderConfig, bits: int, options: TorchOptions) -> float:
    """Relative error of the logits of 20 positions against the eager oracle in float32, on two trunk layers and a tail layer.

    Raises `MotetError` if the error is above `SLICE_ERROR`, which is more than rounding explains.
    """
    part = replace(config, num_layers=3)
    weights = RandomModel(part, bits, options.device, options.dtype).weights(2, 1)
    settings = EngineConfig.from_dict({"backend": "torch", "max_num_seqs": 2, "max_model_len": 64})
    oracle = TorchOptions(options.device, torch.float32, "eager", keep_quantised=True, graphs=False)
    tokens = np.random.default_rng(0).integers(0, part.vocab_size, 20).tolist()
    scores = []
    for how in (options, oracle):
        backend = TorchBackend.from_weights(part, weights, settings, replace(how, graphs=False))
        scores.append(backend.score(tokens, 1))
        del backend
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    error = float(np.linalg.norm(scores[0] - scores[1]) / np.linalg.norm(scores[1]))
    if not error <= SLICE_ERROR:
        raise MotetError(
            f"the logits differ from the oracle's by {error:.3g} of their norm; rounding explains {SLICE_ERROR} at most"
        )
    return error


def _table(result: dict[str, Any]) -> Table:
    limits = result["limits"]
    title = (
        f"{result['shape']}, random, {result['bits']} bits on {result['machine']['device']}; context {result['context']}; copy "
        f"{limits['copy_gb_s']:,.0f} GB/s, matmul {limits['matmul_tflop_s']:.3g} TFLOP/s"
    )
    header = ["sequences", "members", "step ms", "graph ms", "tok/s", "of bandwidth"]
    rows = [
        [
            str(row["batch_size"]),
            str(row["ensemble_size"]),
            f"{row['step_ms']:.3f}",
            "–" if row["replay_ms"] is None else f"{row['replay_ms']:.3f}",
            f"{row['tok_s']:,.0f}",
            f"{row['share_of_copy_bandwidth']:.0%}",
        ]
        for row in result["decode"]
    ]
    return Table(title, header, rows)
