"""`motet bench peers`: the same prompts on Motet and on other runtimes, interleaved in one run, same thread count.

Each runtime is a process of its own; all but the one being measured are stopped (SIGSTOP), so that nobody's spinning
threads disturb. Everything is timed the same way, by whole calls that generate exactly n tokens for B prompts:

    prefill tok/s = prompt tokens / T(1)        decode tok/s = B · (n − 1) / (T(n) − T(1))

onnxruntime-genai runs the very graph and weights of the bundle's first member (one standard decoder graph), so the
comparison is of the runtimes at equal precision. llama.cpp and OpenVINO read the GGUF that the model was pulled from,
CTranslate2 converts to int8, transformers runs bfloat16.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..export.bundle_writer import write_standard_graph
from ..export.pull import SMOLLM2, fetch_gguf, models_dir, resolve_model
from ..runtime.bundle import Bundle
from ..runtime.errors import ConfigError, MotetError
from . import peer_worker, probes
from .report import Plot, machine, table, write

WORKER = Path(peer_worker.__file__)
PEERS = tuple(peer_worker.RUNTIMES)


class Worker:
    """A runtime's process. `call` lets it run and stops it again."""

    def __init__(self, name: str, python: str, job: dict[str, Any]) -> None:
        self.name = name
        self.error: str | None = None
        self.version = ""
        log = None if os.environ.get("MOTET_BENCH_VERBOSE") else subprocess.DEVNULL
        self._process = subprocess.Popen(
            [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        answer = self._ask({"runtime": name, **job})
        self.error, self.version = answer.get("error"), answer.get("version", "")
        if self.error is None:
            self._process.send_signal(signal.SIGSTOP)

    def call(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Seconds. Raises `MotetError` if the runtime fails."""
        self._process.send_signal(signal.SIGCONT)
        answer = self._ask({"prompts": prompts, "new_tokens": new_tokens})
        self._process.send_signal(signal.SIGSTOP)
        if "error" in answer or len(answer["tokens"]) != new_tokens:
            raise MotetError(f"{self.name}: {answer.get('error', 'generated another number of tokens than asked for')}")
        return float(answer["seconds"])

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        result: dict[str, Any] = (
            json.loads(line) if line else {"error": f"the process ended with {self._process.wait()}"}
        )
        return result

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def run(
    bundle_path: Path,
    model: str,
    out: Path,
    *,
    names: Sequence[str] | None = None,
    python: Path | None = None,
    prompt_tokens: int = 512,
    context: int = 256,
    new_tokens: int = 64,
    concurrency: int = 16,
    repeats: int = 5,
    threads: int = 0,
) -> dict[str, Any]:
    """Measure, write `out/peers.json` and `.html`, print the table and one JSON line. A runtime that is not installed
    is listed as such. `python`: the interpreter that has the peers; Motet itself always runs in this one."""
    unknown = sorted(set(names or ()) - set(PEERS))
    if unknown:
        raise ConfigError(f"unknown peers {unknown}; known are {list(PEERS)}")
    bundle = Bundle.load(bundle_path)
    threads = threads or len(os.sched_getaffinity(0))
    job = {
        "threads": threads,
        "max_tokens": max(prompt_tokens, context) + new_tokens + 8,
        "max_sequences": concurrency,
        "paths": _paths(bundle, model),
    }
    limits = probes.measure(threads)
    cases = {
        "prefill": (1, prompt_tokens, 1),
        "one": (1, context, new_tokens),
        "many": (concurrency, context, new_tokens),
    }
    with _workers(names or PEERS, str(python or sys.executable), job) as workers:
        times = _measure([w for w in workers if w.error is None], bundle, cases, repeats)
        rows = [_row(worker, times.get(worker.name), cases) for worker in workers]
    result = {
        "bundle": bundle.name,
        "bits": bundle.quantisation["bits"],
        "prompt_tokens": prompt_tokens,
        "context": context,
        "concurrency": concurrency,
        "machine": machine(),
        "limits": limits,
        "peers": rows,
    }
    _add_ratios(rows)
    write("peers", result, [_table(result)], _plots(result), out)
    return result


def _paths(bundle: Bundle, model: str) -> dict[str, str]:
    scratch = models_dir().parent / "peers"
    scratch.mkdir(parents=True, exist_ok=True)
    genai = scratch / f"genai-{bundle.manifest['files']['model.safetensors'][:12]}"
    write_standard_graph(bundle, 0, genai)
    paths = {
        "bundle": str(bundle.path),
        "model": str(resolve_model(model)),
        "scratch": str(scratch),
        "genai": str(genai),
    }
    if model == SMOLLM2:
        paths["gguf"] = str(fetch_gguf(scratch))
    return paths


@contextmanager
def _workers(names: Sequence[str], python: str, job: dict[str, Any]) -> Iterator[list[Worker]]:
    workers: list[Worker] = []
    try:
        for name in dict.fromkeys(["motet", *names]):
            workers.append(Worker(name, sys.executable if name == "motet" else python, job))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def _measure(
    workers: list[Worker], bundle: Bundle, cases: dict[str, tuple[int, int, int]], repeats: int
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """name → case → (T(1), T(n)) of every repeat. The first round warms up and does not count."""
    times: dict[str, dict[str, list[tuple[float, float]]]] = {w.name: {case: [] for case in cases} for w in workers}
    for repeat in range(repeats + 1):
        for case, (sequences, length, new_tokens) in cases.items():
            rng = np.random.default_rng((repeat, sequences, length))  # cases share no prefix
            prompts = rng.integers(10, bundle.config.vocab_size - 10, (sequences, length)).tolist()
            for worker in workers:
                if worker.error is not None:
                    continue
                try:
                    one = worker.call(prompts, 1)
                    pair = (one, worker.call(prompts, new_tokens) if new_tokens > 1 else one)
                except MotetError as error:
                    worker.error = str(error)
                    continue
                if repeat:
                    times[worker.name][case].append(pair)
    return times


def _row(
    worker: Worker, times: dict[str, list[tuple[float, float]]] | None, cases: dict[str, tuple[int, int, int]]
) -> dict[str, Any]:
    row: dict[str, Any] = {"name": worker.name, "version": worker.version, "error": worker.error}
    if worker.error is None and times is not None:
        row["prefill_tok_s"] = cases["prefill"][1] / statistics.median(one for one, _ in times["prefill"])
        for case in ("one", "many"):
            sequences, _, new_tokens = cases[case]
            row[f"{case}_tok_s"] = sequences * (new_tokens - 1) / statistics.median(t - one for one, t in times[case])
    return row


FIGURES = ("prefill_tok_s", "one_tok_s", "many_tok_s")


def _add_ratios(rows: list[dict[str, Any]]) -> None:
    """Motet's figure over the runtime's."""
    own = rows[0]
    for row in rows:
        if row["error"] is None and own["error"] is None:
            row["motet_ratio"] = {figure: own[figure] / row[figure] for figure in FIGURES}


def _table(result: dict[str, Any]) -> Any:
    header = [
        "runtime",
        "prefill tok/s",
        "1 sequence",
        f"{result['concurrency']} sequences",
        "Motet ×: prefill",
        "1",
        "many",
    ]
    rows, errors = [], []
    for row in result["peers"]:
        label = f"{row['name']} {row['version']}".strip()
        if row["error"] is not None:
            rows.append([label, *["–"] * 6])
            errors.append(f"{label}: {row['error']}")
            continue
        ratios = row.get("motet_ratio", {})
        rows.append(
            [label, *(f"{row[f]:,.0f}" for f in FIGURES), *(f"{ratios[f]:.2f}" for f in FIGURES if f in ratios)]
        )
    title = (
        f"{result['bundle']}, {result['bits']} bits, {result['limits']['threads']} threads, context {result['context']}"
    )
    return table("\n".join([title, *errors]), header, rows)


def _plots(result: dict[str, Any]) -> list[Plot]:
    rows = [row for row in result["peers"] if row["error"] is None]
    labels = [row["name"] for row in rows]
    titles = ("Prefill", "Decode, 1 sequence", f"Decode, {result['concurrency']} sequences")
    return [
        Plot(title, "tok/s", labels, {"tok/s": [row[figure] for row in rows]})
        for title, figure in zip(titles, FIGURES, strict=True)
    ]
