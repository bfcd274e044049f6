"""`motet bench fine-tunes`: many fine-tunes of one base in one process, against the base alone under the same traffic.

Each request names one member. Half of the prompts begin with one document that requests of all members share, the others
with one of their own. The members are random low-rank updates of the last layers: what they say does not matter here. Each
bundle has a process of its own, so that its memory can be told. They take turns, a round of as many requests as there are
streams each, and the ratios are medians over the rounds: machines change their speed from one minute to the next.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..export.bundle_writer import export_bundle
from ..pages import Bars, Table
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
from .lib.report import machine, write

BASE, MEMBERS = "one model", "fine-tunes"


@dataclass(frozen=True, slots=True)
class Traffic:
    """Rounds of `streams` requests that are all there from the start. Lengths are in tokens."""

    members: int = 8
    streams: int = 16
    rounds: int = 6
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
        rounds = _take_turns(bundles, traffic, threads)
    rows = {name: {key: statistics.median(r[key] for r in all_) for key in all_[0]} for name, all_ in rounds.items()}
    pairs = list(zip(rounds[BASE], rounds[MEMBERS], strict=True))
    result = {
        "model": model,
        "bits": bits,
        "layers": layers,
        "rank": rank,
        "traffic": asdict(traffic),
        "machine": machine(),
        "limits": before,
        "limits_after": probes.measure(before["threads"]),
        "rows": rows,
        "rounds": rounds,
        "throughput_ratio": statistics.median(members["tok_s"] / base["tok_s"] for base, members in pairs),
        "memory_ratio": rows[MEMBERS]["peak_bytes"] / rows[BASE]["peak_bytes"],
        "shared_ttft_ratio": statistics.median(r["ttft_shared_s"] / r["ttft_own_s"] for r in rounds[MEMBERS]),
    }
    write("fine-tunes", result, [_table(result), *_plots(result)], out)
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


def _take_turns(bundles: Mapping[str, Path], traffic: Traffic, threads: int) -> dict[str, list[dict[str, float]]]:
    """The figures of every round of each bundle. The first round, in which shared documents are new, counts too."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(context.Pool(1, _open, (bundle, traffic, threads)))
            for name, bundle in bundles.items()
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in bundles}
        for index in range(traffic.rounds):
            for name, worker in workers.items():
                found[name].append(worker.apply(_round, (index, traffic)))
    return found


_engine: Engine  # of a worker's process


def _open(bundle: Path, traffic: Traffic, threads: int) -> None:
    global _engine
    length = traffic.document + traffic.question + traffic.answer
    config = EngineConfig(max_num_seqs=traffic.streams, max_model_len=length, threads=threads)
    _engine = open_engine(bundle, config, verify=False)
    _engine.complete([_request(0, _text(np.random.default_rng(1), traffic.document), 2)])  # a warm-up


def _text(rng: np.random.Generator, tokens: int) -> tuple[int, ...]:
    return tuple(rng.integers(0, _engine.model.vocab_size, tokens).tolist())


def _round(index: int, traffic: Traffic) -> dict[str, float]:
    """Tokens per second of a round's requests; then seconds to the first token of single requests: one with a document of
    its own, and one with that document by another member; and the process's peak memory."""
    shared, rng = _text(np.random.default_rng(0), traffic.document), np.random.default_rng(2 + index)
    requests = []
    for number in range(index * traffic.streams, (index + 1) * traffic.streams):
        document = shared if number % 2 else _text(rng, traffic.document)
        requests.append(_request(number, document + _text(rng, traffic.question), traffic.answer))
    started = time.monotonic()
    _engine.complete(requests)
    seconds = time.monotonic() - started
    document = _text(rng, traffic.document)
    own = _first_token(0, document + _text(rng, traffic.question))
    return {
        "tok_s": len(requests) * traffic.answer / seconds,
        "ttft_own_s": own,
        "ttft_shared_s": _first_token(1, document + _text(rng, traffic.question)),
        "peak_bytes": _peak_bytes(),
    }


def _peak_bytes() -> int:
    """The most memory that this process had, in bytes. (`getrusage` says that of the process before `exec` too.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _request(index: int, prompt: tuple[int, ...], answer: int) -> Request:
    member = _engine.model.members[index // 2 % len(_engine.model.members)]
    sampling = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
    return Request(f"r{index}", (prompt,), Ensemble((Member(member, 1.0),)), sampling)


def _first_token(member: int, prompt: tuple[int, ...]) -> float:
    """Seconds of a request of one token, alone."""
    request = _request(2 * member, prompt, 1)
    started = time.monotonic()
    _engine.complete([request])
    return time.monotonic() - started


def _table(result: dict[str, Any]) -> Table:
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
    return Table(title, header, [*rows, ratios])


def _plots(result: dict[str, Any]) -> list[Bars]:
    labels = list(result["rows"])
    speeds = {"tok/s": [row["tok_s"] for row in result["rows"].values()]}
    waits = {
        "own document": [row["ttft_own_s"] * 1e3 for row in result["rows"].values()],
        "shared document": [row["ttft_shared_s"] * 1e3 for row in result["rows"].values()],
    }
    return [Bars("Throughput", "tok/s", labels, speeds), Bars("Time to the first token", "ms", labels, waits)]
