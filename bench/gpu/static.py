"""`motet bench kernels --static`: what the compiler makes of every GPU kernel, and the times that a simple model
predicts. It needs Triton and no GPU.

The cases are those of `motet bench kernels`, so a prediction and a measurement stand under the same name. Each distinct
kernel is compiled for each capability. A decode step is recorded from the backend's own forward pass on tensors without
memory, so its launches are those that a graph would capture. The model, for an H200 (docs/gpu.md gives its reasons and
limits):

    a launch    max(bytes / (`COPY` · `STREAM`), instructions of the main loop / (rate of issue · `ISSUE`),
                    operations / (`TENSOR` · `ISSUE`)) + `BOUNDARY`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.nvidia.compiler import get_ptxas

from ...pages import Table
from ...runtime.backends.torch.paged_cache import FP8_CAPABILITY
from ..lib.report import write
from . import kernels, step_launches
from .compiled import Launch, recording
from .machine_code import MachineCode, read, tensor_instructions

CAPABILITIES = (80, 90, 100)
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a program can have
PREDICTED = 90  # the capability of the model's GPU

# The H200 of the model.
COPY = 4.3e12  # bytes a second, of a copy, read and written together
STREAM = 0.85  # share of it that a kernel reaches
MULTIPROCESSORS = 132
WARPS_A_SECOND = 4 * 1.755e9  # instructions of warps that a multiprocessor issues
TENSOR = 989e12  # floating-point operations a second of the tensor cores, in bfloat16
ISSUE = 0.70  # share of these two rates that a busy kernel reaches
BOUNDARY = 2.5e-6  # seconds from a kernel to the next one, in a captured graph


@dataclass(frozen=True, slots=True)
class Loop:
    """The main loop of a launch. `elements`: weights, or positions of a KV head, that an iteration of a program works
    on. `iterations`: of all programs together. `instructions`: of all warps of a program, in an iteration."""

    elements: int
    iterations: int
    instructions: int

    @property
    def per_element(self) -> float:
        """Instructions of threads for an element."""
        return 32 * self.instructions / self.elements


def main_loop(launch: Launch, code: MachineCode, lengths: tuple[int, int]) -> Loop | None:
    """The main loop, if its iterations follow from the launch and the compiler did not unroll it: the body has just as
    many instructions for Hopper's tensor cores as one iteration needs. None otherwise, also for kernels without such a
    loop.

    `lengths`: positions that each decode row, and the chunk, attend to.
    """
    a, found = launch.arguments, tensor_instructions(code.loop)
    shape = launch.kernel
    if shape in ("weight_matmul.small", "weight_matmul.large", "mix_head_sample.head"):
        needed = a["BLOCK_K"] // 16 * (2 if a.get("ROUNDED") else 1)
        columns = a.get("split_k", a["num_k"])
        elements, iterations = a["BLOCK_N"] * a["BLOCK_K"], -(-columns // a["BLOCK_K"]) * launch.programs
    elif shape == "paged_attention.decode":
        needed = 2 * a["HEADS"] * a["TILE"] * a["COLUMNS"] // (16 * 8 * 16) // launch.warps
        elements, iterations = a["TILE"], launch.grid[0] * a["kv_heads"] * -(-lengths[0] // a["TILE"])
    elif shape == "prefill_attention.prefill":
        needed = (a["COLUMNS"] + a["TILE"]) // 16
        first = lengths[1] - launch.grid[2] * a["ROWS"]
        tiles = sum(-(-(first + (tile + 1) * a["ROWS"]) // a["TILE"]) for tile in range(launch.grid[2]))
        elements, iterations = a["TILE"], launch.grid[0] * a["kv_heads"] * tiles
    else:
        return None
    return Loop(elements, iterations, code.loop.total() * launch.warps) if found == needed else None


def issue_seconds(loop: Loop | None, launch: Launch) -> float:
    """Seconds of issuing the main loop's instructions, on as many multiprocessors as there are programs."""
    if loop is None:
        return 0.0
    rate = WARPS_A_SECOND * ISSUE * min(launch.programs, MULTIPROCESSORS)
    return loop.instructions * loop.iterations / rate


def seconds(moved: int, issue: float, launches: int = 1, flops: int = 0) -> float:
    """What the model predicts for `launches` kernels that together move `moved` bytes, issue for `issue` seconds and compute
    `flops` operations."""
    return max(moved / (COPY * STREAM), issue, flops / (TENSOR * ISSUE)) + BOUNDARY * launches


def compiler() -> dict[str, str]:
    """The versions that all figures depend on."""
    return {"triton": triton.__version__} | {
        f"ptxas for sm_{capability}": get_ptxas(capability).version for capability in CAPABILITIES
    }


def _key(launch: Launch) -> tuple[str, str]:
    return launch.kernel, launch.compiled.hash


def _described(launch: Launch, capability: int) -> dict[str, Any]:
    code = read(launch.compiled)
    return {
        "cases": [],
        "kernel": launch.kernel,
        "capability": capability,
        "warps": launch.warps,
        "registers": code.registers,
        "spilled_bytes": code.spilled,
        "shared_bytes": code.shared,
        "fits": code.shared <= SHARED_LIMITS[capability],
        "instructions": code.instructions.total(),
        "classes": code.classes(),
        "loop_instructions": code.loop.total() or None,
    }


def compiled_kernels(
    capability: int, sizes: kernels.Sizes, only: Collection[str] | None = None
) -> Iterator[tuple[kernels.Case, list[Launch]]]:
    """Each case that is a kernel of Motet, with its launches, compiled. `only`: names of cases. Without those that the
    backend refuses on such a GPU: an fp8 cache below sm_89."""
    with recording(capability) as found:
        for case in kernels.cases(sizes):
            refused = "float8" in case.name and capability < FP8_CAPABILITY
            if not case.versus and not refused and (only is None or case.name in only):
                start = len(found)
                case.run()
                yield case, found[start:]


def describe(capability: int, sizes: kernels.Sizes, only: Collection[str] | None = None) -> list[dict[str, Any]]:
    """What the compiler made of every distinct kernel, with the names of the cases that launch it."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for case, launches in compiled_kernels(capability, sizes, only):
        for launch in launches:
            if _key(launch) not in rows:
                rows[_key(launch)] = _described(launch, capability)
            rows[_key(launch)]["cases"].append(case.name)
    return list(rows.values())


def predict_cases(sizes: kernels.Sizes) -> list[dict[str, Any]]:
    """Each case with its bytes, its launches, and the time that the model predicts."""
    lengths = (sizes.context, sizes.context + sizes.chunk // 2)
    rows = []
    for case, launches in compiled_kernels(PREDICTED, sizes):
        loops = [(launch, main_loop(launch, read(launch.compiled), lengths)) for launch in launches]
        issue = sum(issue_seconds(loop, launch) for launch, loop in loops)
        derived = next((loop for _, loop in loops if loop is not None), None)
        predicted = seconds(case.bytes, issue, len(launches), case.flops)
        rows.append(
            {
                "case": case.name,
                "launches": [[launch.kernel, list(launch.grid)] for launch in launches],
                "bytes": case.bytes,
                "instructions_per_element": derived and derived.per_element,
                "memory_us": 1e6 * case.bytes / (COPY * STREAM),
                "issue_us": 1e6 * issue if derived else None,
                "tensor_us": 1e6 * case.flops / (TENSOR * ISSUE) or None,
                "predicted_us": 1e6 * predicted,
                "predicted_share_of_copy_bandwidth": case.bytes / predicted / COPY,
            }
        )
    return rows


def predict_step(bits: int, batch_size: int, context: int) -> dict[str, Any]:
    """A decode step of the 8B shape: its launches by kernel, torch's own kernels, and the time that the model
    predicts."""
    with recording(PREDICTED) as found:
        others = step_launches.run("llama-8b", bits, batch_size, context)
    moved, issue, total = 0, 0.0, 0.0
    codes: dict[tuple[str, str], MachineCode] = {}
    for launch in found:
        if _key(launch) not in codes:
            codes[_key(launch)] = read(launch.compiled)
        own = step_launches.moved_bytes(launch)
        busy = issue_seconds(main_loop(launch, codes[_key(launch)], (context, 0)), launch)
        moved, issue, total = moved + own, issue + busy, total + seconds(own, busy)
    total += BOUNDARY * sum(others.values())
    return {
        "bits": bits,
        "batch_size": batch_size,
        "context": context,
        "launches": len(found) + sum(others.values()),
        "launches_by_kernel": dict(sorted(Counter(launch.kernel for launch in found).items())),
        "torch_kernels": dict(sorted(others.items())),
        "bytes": moved,
        "boundaries_ms": 1e3 * BOUNDARY * (len(found) + sum(others.values())),
        "predicted_ms": 1e3 * total,
        "predicted_tok_s": batch_size / total,
    }


def run(out: Path, sizes: kernels.Sizes | None = None, capabilities: Sequence[int] = CAPABILITIES) -> dict[str, Any]:
    """Compile, predict, write `out/kernels-static.json` and `.html`, print the tables and one JSON line.

    Raises `UnavailableError` if Triton interprets its kernels, or came without NVIDIA's tools.
    """
    sizes = sizes or kernels.Sizes()
    versions = compiler()
    names = ", ".join(f"sm_{capability}" for capability in capabilities)
    with torch.inference_mode():
        result = {
            "machine": {"device": f"none: compiled for {names} by Triton {versions['triton']}", **versions},
            "model": {
                "copy_bytes_a_second": COPY,
                "stream_share": STREAM,
                "multiprocessors": MULTIPROCESSORS,
                "warp_instructions_a_second_and_multiprocessor": WARPS_A_SECOND,
                "issue_share": ISSUE,
                "tensor_flops": TENSOR,
                "boundary_us": 1e6 * BOUNDARY,
            },
            "kernels": [row for capability in capabilities for row in describe(capability, sizes)],
            "cases": predict_cases(sizes),
            "steps": [predict_step(bits, size, sizes.context) for bits in (16, 8, 4) for size in (1, 64)],
        }
    write("kernels-static", result, _tables(result), out)
    return result


def _tables(result: dict[str, Any]) -> list[Table]:
    kernel_rows = [
        [
            f"{row['kernel']} ({row['cases'][0]})",
            f"sm_{row['capability']}",
            *(str(row[name]) for name in ("registers", "spilled_bytes")),
            f"{row['shared_bytes'] / 1024:.1f}" + ("" if row["fits"] else " (too much)"),
            *(str(row[name] or "–") for name in ("instructions", "loop_instructions")),
        ]
        for row in result["kernels"]
    ]
    case_rows = [
        [
            row["case"],
            f"{row['bytes'] / 1e6:.2f}",
            "–" if row["instructions_per_element"] is None else f"{row['instructions_per_element']:.1f}",
            f"{row['memory_us']:.1f}",
            "–" if row["issue_us"] is None else f"{row['issue_us']:.1f}",
            "–" if row["tensor_us"] is None else f"{row['tensor_us']:.1f}",
            f"{row['predicted_us']:.1f}",
            f"{row['predicted_share_of_copy_bandwidth']:.0%}",
        ]
        for row in result["cases"]
    ]
    step_rows = [
        [
            f"{row['bits']} bits, {row['batch_size']} sequences",
            str(row["launches"]),
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['boundaries_ms']:.2f}",
            f"{row['predicted_ms']:.2f}",
            f"{row['predicted_tok_s']:,.0f}",
        ]
        for row in result["steps"]
    ]
    versions = f"Triton {result['machine']['triton']}; nothing was run"
    of_thread = "instructions of threads for a weight, or for a position of a KV head"
    return [
        Table(
            f"Decode steps of the 8B shape at a context of {result['steps'][0]['context']}, predicted for an H200",
            ["step", "launches", "GB", "boundaries ms", "ms", "tok/s"],
            step_rows,
        ),
        Table(
            f"Cases, predicted for an H200 ({of_thread}; –: not derived)",
            ["case", "MB", "instructions", "memory µs", "issue µs", "tensor µs", "µs", "of bandwidth"],
            case_rows,
        ),
        Table(
            f"Kernels as compiled, {versions}",
            [
                "kernel (first case)",
                "for",
                "registers",
                "spilled bytes",
                "shared KiB",
                "instructions",
                "in the main loop",
            ],
            kernel_rows,
        ),
    ]
