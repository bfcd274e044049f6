"""`motet bench fine-tunes`: many fine-tunes of one base in one process, against the base alone under the same traffic.

Each request names one member. Half of the prompts begin with one document that requests of all members share, the others
with one of their own. The members are random low-rank updates of the last layers: what they say does not matter here. Each
measurement has a process of its own, so that its memory can be told. The two bundles take turns.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..export.bundle_writer import export_bundle
from ..runtime.api.config import EngineConfig
from ..runtime.api.request import Ensemble, Member, Request
from ..runtime.api.sampling import SamplingParams
from ..runtime.checkpoints.decoder import Decoder
from ..runtime.checkpoints.huggingface import checkpoint_digest
from ..runtime.checkpoints.members.adapter import random_adapter, write_adapter
from ..runtime.checkpoints.members.files import first_layer
from ..runtime.checkpoints.store import resolve_model
from ..runtime.engine.engine import Engine
from ..runtime.engine.open import open_engine
from .lib import probes
from .lib.report import Plot, machine, table, write

BASE, MEMBERS = "one model", "fine-tunes"


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests that are all there from the start; `streams` of them run at once. Lengths are in tokens."""

    members: int = 8
    streams: int = 16
    requests: int = 64
    document: int = 1000
    question: int = 32
    answer: int = 64


def run(
    model: str,
    out: Path,
    *,
    traffic: Traffic,
    layers: int = 10,
    rank: int = 16,
    bits: int = 8,
    repeats: int = 3,
    threads: int = 0,
) -> dict[str, Any]:
    """Measure, write `out/fine-tunes.json` and `.html`, print the table and one JSON line."""
    directory = resolve_model(model)
    before = probes.measure(EngineConfig(threads=threads).num_threads)
    with TemporaryDirectory() as root:
        names = [f"member-{index}" for index in range(traffic.members)]
        loras = _random_adapters(directory, Path(root), names, layers, rank)
        bundles = {
            BASE: export_bundle(directory, Path(root) / "base", tails={"base": None}, bits=bits, graphs=False),
            MEMBERS: export_bundle(directory, Path(root) / "members", loras=loras, bits=bits, graphs=False),
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in bundles}
        context = multiprocessing.get_context("spawn")
        for _ in range(repeats):
            for name, bundle in bundles.items():
                with context.Pool(1) as process:
                    found[name].append(process.apply(_measure, (bundle, traffic, threads)))
    rows = {name: {key: statistics.median(r[key] for r in all_) for key in all_[0]} for name, all_ in found.items()}
    base, members = rows[BASE], rows[MEMBERS]
    result = {
        "model": model,
        "bits": bits,
        "layers": layers,
        "rank": rank,
        "traffic": asdict(traffic),
        "repeats": repeats,
        "machine": machine(),
        "limits": before,
        "limits_after": probes.measure(before["threads"]),
        "rows": rows,
        "throughput_ratio": members["tok_s"] / base["tok_s"],
        "memory_ratio": members["peak_bytes"] / base["peak_bytes"],
        "shared_ttft_ratio": members["ttft_shared_s"] / members["ttft_own_s"],
    }
    write("fine-tunes", result, [_table(result)], _plots(result), out)
    return result


def _random_adapters(directory: Path, root: Path, names: Sequence[str], layers: int, rank: int) -> dict[str, Path]:
    decoder = Decoder.from_dir(directory)
    base = {"name": directory.name, "digest": checkpoint_digest(directory)}
    last = decoder.config.num_layers
    for seed, name in enumerate(names):
        pairs = random_adapter(decoder, None, rank, seed=seed, scale=0.01)
        own = {key: tensor for key, tensor in pairs.items() if first_layer([key], last) >= last - layers}
        write_adapter(root / name, decoder.config, own, {"base": base})
    return {name: root / name for name in names}


def _measure(bundle: Path, traffic: Traffic, threads: int) -> dict[str, float]:
    """Tokens per second of the traffic, seconds to the first token of a single request, and the process's memory."""
    length = traffic.document + traffic.question + traffic.answer
    config = EngineConfig(max_num_seqs=traffic.streams, max_model_len=length, threads=threads)
    rng = np.random.default_rng(0)
    with open_engine(bundle, config, verify=False) as engine:
        vocab = engine.model.vocab_size

        def text(tokens: int) -> tuple[int, ...]:
            return tuple(rng.integers(0, vocab, tokens).tolist())

        shared = text(traffic.document)
        requests = []
        for index in range(traffic.requests):
            document = shared if index % 2 else text(traffic.document)
            requests.append(_request(engine, index, document + text(traffic.question), traffic.answer))
        engine.complete([_request(engine, 0, text(traffic.document), 2)])  # a warm-up
        started = time.monotonic()
        engine.complete(requests)
        seconds = time.monotonic() - started
        own, others = [], []
        for _ in range(3):
            document = text(traffic.document)
            own.append(_first_token(engine, 0, document + text(traffic.question)))
            for member in range(1, min(3, len(engine.model.members)) if len(engine.model.members) > 1 else 2):
                others.append(_first_token(engine, member, document + text(traffic.question)))
    return {
        "tok_s": traffic.requests * traffic.answer / seconds,
        "ttft_own_s": statistics.median(own),
        "ttft_shared_s": statistics.median(others),
        "peak_bytes": _peak_bytes(),
    }


def _peak_bytes() -> int:
    """The most memory that this process had, in bytes. (`getrusage` says that of the process before `exec` too.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _request(engine: Engine, index: int, prompt: tuple[int, ...], answer: int) -> Request:
    member = engine.model.members[index // 2 % len(engine.model.members)]
    sampling = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
    return Request(f"r{index}", (prompt,), Ensemble((Member(member, 1.0),)), sampling)


def _first_token(engine: Engine, index: int, prompt: tuple[int, ...]) -> float:
    """Seconds of a request of one token, alone; `index`: of the member."""
    request = _request(engine, 2 * index, prompt, 1)
    started = time.monotonic()
    engine.complete([request])
    return time.monotonic() - started


def _table(result: dict[str, Any]) -> Any:
    traffic = result["traffic"]
    title = (
        f"{traffic['members']} fine-tunes of {result['model']} ({result['bits']} bits; rank {result['rank']}, last "
        f"{result['layers']} layers), {traffic['streams']} streams; half of the prompts share a document of "
        f"{traffic['document']} tokens"
    )
    rows = [
        [
            name,
            f"{row['tok_s']:,.0f}",
            f"{row['ttft_own_s'] * 1e3:.0f}",
            f"{row['ttft_shared_s'] * 1e3:.0f}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
        ]
        for name, row in result["rows"].items()
    ]
    ratios = ["ratio", f"{result['throughput_ratio']:.2f}", "", "", f"{result['memory_ratio']:.2f}"]
    header = ["", "tok/s", "first token, own document, ms", "shared by another member, ms", "peak memory, MB"]
    return table(title, header, [*rows, ratios])


def _plots(result: dict[str, Any]) -> list[Plot]:
    labels = list(result["rows"])
    speeds = {"tok/s": [row["tok_s"] for row in result["rows"].values()]}
    waits = {
        "own document": [row["ttft_own_s"] * 1e3 for row in result["rows"].values()],
        "shared document": [row["ttft_shared_s"] * 1e3 for row in result["rows"].values()],
    }
    return [Plot("Throughput", "tok/s", labels, speeds), Plot("Time to the first token", "ms", labels, waits)]
