"""`motet bench peers`: the same prompts on Motet and on other runtimes, interleaved in one run, same thread count.

Each runtime has its own process. All but the one being measured are stopped (SIGSTOP), so that spinning threads of others do
not disturb it. There are four columns: a prompt of 512 tokens up to its first token; decoding one sequence, and 16 sequences,
at a context of 256; decoding one sequence at a context of 4,096. A generation computes its prompt once and then waits between
chunks of steps (`peer_worker.Pacer`). So all runtimes take turns in decoding, once per repeat.

onnxruntime-genai runs the graph and weights of a bundle's first member, as one standard decoder graph, so the runtimes are
compared at equal precision. llama.cpp and OpenVINO read the GGUF that the model was pulled from (Q4_1), and the same file
requantised to Q8_0. CTranslate2 converts to int8. transformers runs bfloat16.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...export.flavours import Flavour
from ...export.onnx_directory import write_onnx
from ...runtime.errors import ConfigError, MotetError
from ...runtime.model.bundle import Bundle
from ..lib import probes
from ..lib.report import machine, write
from . import peer_worker
from .report import add_ratios, plots, tables
from .worker import Worker, peer_paths, peer_python

OWN = "motet"
# runtime → its variants; onnxruntime-genai has one variant per bundle
VARIANTS: dict[str, tuple[str, ...]] = {
    "onnxruntime-genai": ("int8", "int4"),
    "llama.cpp": ("Q8_0", "Q4_1"),
    "CTranslate2": ("int8",),
    "OpenVINO GenAI": ("int8", "int4"),
    "transformers": ("bf16",),
}


@dataclass(frozen=True, slots=True)
class Case:
    """A column: `sequences` prompts of `length` tokens, then `chunks` times `steps` decode steps. 0 steps measure the prompt."""

    name: str
    title: str
    sequences: int
    length: int
    steps: int
    chunks: int


def run(
    bundle_paths: Sequence[Path],
    model: str,
    out: Path,
    *,
    names: Sequence[str] | None = None,
    python: Path | None = None,
    prompt_tokens: int = 512,
    context: int = 256,
    long_context: int = 4096,
    steps: int = 16,
    concurrency: int = 16,
    repeats: int = 5,
    threads: int = 0,
) -> dict[str, Any]:
    """Measure, write `out/peers.json` and `.html`, print the tables and one JSON line.

    A runtime that is not installed, or fails, is listed with its error. `names`: runtimes, or runtimes with a variant
    ("llama.cpp Q4_1"). `python`: the interpreter that has the peers; default: the one that `make peers` made, else this one.
    `long_context` 0 leaves that column out. Raises `ConfigError` for an unknown name, or two bundles with the same bits.
    """
    bundles = {f"int{b.quantisation['bits']}": b for b in map(Bundle.load, bundle_paths)}
    if len(bundles) < len(bundle_paths):
        raise ConfigError("two bundles have the same bits; give one of each")
    chosen = _chosen(names, bundles)
    threads = threads or len(os.sched_getaffinity(0))
    cases = _cases(prompt_tokens, context, long_context, concurrency, steps, repeats)
    lengths = {size: max(_room(c) for c in cases if c.sequences == size) for size in {c.sequences for c in cases}}
    job = {"threads": threads, "lengths": lengths, "paths": _paths(bundles, model)}
    before = probes.measure(threads)
    with _workers(bundles, chosen, str(python or peer_python()), job) as workers:
        vocab_size = next(iter(bundles.values())).config.vocab_size
        times = {case.name: _measure(case, workers, vocab_size, repeats) for case in cases}
        rows = [_row(worker, times, cases) for worker in workers]
    add_ratios(rows, [case.name for case in cases])
    result = {
        "bundles": {bundle.name: bundle.quantisation for bundle in bundles.values()},
        "columns": {case.name: case.title for case in cases},
        "repeats": repeats,
        "steps": steps,
        "machine": machine(),
        "threads": threads,
        "limits": before,
        "limits_after": probes.measure(threads),
        "runtimes": rows,
    }
    write("peers", result, [*tables(result), *plots(result)], out)
    return result


def _chosen(names: Sequence[str] | None, bundles: Mapping[str, Bundle]) -> list[tuple[str, str]]:
    """(runtime, variant) of the peers to run."""
    known = [(runtime, variant) for runtime, variants in VARIANTS.items() for variant in variants]
    labels = {runtime for runtime, _ in known} | {f"{runtime} {variant}" for runtime, variant in known}
    unknown = sorted(set(names or ()) - labels)
    if unknown:
        raise ConfigError(f"unknown peers {unknown}; known are {sorted(labels)}")
    wanted = set(labels if names is None else names)
    return [
        (runtime, variant)
        for runtime, variant in known
        if wanted & {runtime, f"{runtime} {variant}"} and (runtime != "onnxruntime-genai" or variant in bundles)
    ]


def _cases(prompt: int, context: int, long_context: int, concurrency: int, steps: int, repeats: int) -> list[Case]:
    chunks = repeats + 1  # the first is a warm-up and is not counted
    cases = [
        Case("prefill", f"prefill {prompt:,}", 1, prompt, 0, 0),
        Case("one", f"1 at {context:,}", 1, context, steps, chunks),
        Case("many", f"{concurrency} at {context:,}", concurrency, context, steps, chunks),
    ]
    if long_context:
        cases.append(Case("long", f"1 at {long_context:,}", 1, long_context, steps, chunks))
    return cases


def _room(case: Case) -> int:
    """Most tokens that a sequence of a case may have. A runtime's first sequences run ahead of its last one."""
    return case.length + case.chunks * (case.steps + peer_worker.UNMEASURED) + 2 * case.sequences + 8


def _paths(bundles: Mapping[str, Bundle], model: str) -> dict[str, str]:
    paths = peer_paths(model)
    scratch = Path(paths["scratch"])
    for variant, bundle in bundles.items():
        graph = scratch / f"onnx-genai-{bundle.manifest['files']['model.safetensors'][:12]}"
        write_onnx(bundle, graph, bundle.members[0], flavour=Flavour.GENAI)
        paths[f"genai-{variant}"] = str(graph)
    return paths


@contextmanager
def _workers(
    bundles: Mapping[str, Bundle], chosen: Sequence[tuple[str, str]], python: str, job: dict[str, Any]
) -> Iterator[list[Worker]]:
    workers: list[Worker] = []
    try:
        for variant, bundle in bundles.items():
            own = {**job, "paths": {**job["paths"], "bundle": str(bundle.path)}}
            workers.append(Worker(OWN, variant, sys.executable, own))
        for runtime, variant in chosen:
            workers.append(Worker(runtime, variant, python, job))
        yield workers
    finally:
        for worker in workers:
            worker.close()


Samples = dict[str, list[dict[str, float]]]  # worker → one sample per repeat


def _measure(case: Case, workers: Sequence[Worker], vocab_size: int, repeats: int) -> Samples:
    """Every runtime's samples of a case, taken in turns. The first round is a warm-up and is not counted."""
    rng = np.random.default_rng((case.sequences, case.length))  # cases share no prefix
    samples: Samples = {worker.name: [] for worker in workers}

    def prompts() -> list[list[int]]:
        drawn: list[list[int]] = rng.integers(10, vocab_size - 10, (case.sequences, case.length)).tolist()
        return drawn

    def prefill(worker: Worker, drawn: list[list[int]]) -> None:
        seconds = worker.begin(drawn, 0, 0)
        worker.end(1)
        samples[worker.name].append({"seconds": seconds, "tokens": case.sequences * case.length})

    def decode(worker: Worker, _drawn: list[list[int]]) -> None:
        samples[worker.name].append(worker.chunk())

    if case.chunks:
        drawn = prompts()
        _each(case, workers, lambda worker: worker.begin(drawn, case.steps, case.chunks))
    for _ in range(repeats + 1):
        drawn = [] if case.chunks else prompts()
        _each(case, workers, lambda worker, d=drawn: (decode if case.chunks else prefill)(worker, d))
    if case.chunks:
        last = 1 + case.chunks * (case.steps + peer_worker.UNMEASURED)
        _each(case, workers, lambda worker: worker.end(last))
    return {name: values[1:] for name, values in samples.items()}


def _each(case: Case, workers: Sequence[Worker], act: Any) -> None:
    """Call `act` for every runtime that has not failed. One that fails now has no figure for this case."""
    for worker in workers:
        if worker.error is None and case.name not in worker.errors:
            try:
                act(worker)
            except MotetError as error:
                worker.errors[case.name] = str(error)


def _row(worker: Worker, times: Mapping[str, Samples], cases: Sequence[Case]) -> dict[str, Any]:
    """Median tok/s, and median number of CPUs in use, per column."""
    row: dict[str, Any] = {
        "name": worker.name,
        "version": worker.version,
        "error": worker.error,
        "errors": worker.errors,
        "tok_s": {},
        "all_tok_s": {},
        "cpus": {},
    }
    for case in cases:
        found = times[case.name][worker.name]
        if found and worker.error is None and case.name not in worker.errors:
            rates = [sample["tokens"] / sample["seconds"] for sample in found]
            row["tok_s"][case.name] = statistics.median(rates)
            row["all_tok_s"][case.name] = rates
            cpus = [sample["cpu_seconds"] / sample["seconds"] for sample in found if "cpu_seconds" in sample]
            row["cpus"][case.name] = statistics.median(cpus) if cpus else None
    return row
