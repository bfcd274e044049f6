"""`motet bench isa`: every instruction set of this CPU beside the others: its dot products, its speed, its bits.

Each path of the native kernels has its own engine on the same bundle. They take turns within each repeat. Paths whose answers
to the same requests have the same bits, log-probabilities included, have the same letter.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.native import library
from ..pages import Bars, Table
from ..runtime.api.config import EngineConfig
from ..runtime.engine.engine import Engine
from ..runtime.errors import ConfigError
from ..runtime.model.bundle import Bundle
from .lib import probes
from .lib.report import machine, write
from .lib.timed import StepTimer, random_request, run_together, timed_engine


def run(
    bundle_path: Path,
    out: Path,
    *,
    paths: Sequence[str] = (),
    batch_sizes: Sequence[int] = (1, 16),
    prompt_tokens: int = 512,
    context: int = 256,
    new_tokens: int = 16,
    repeats: int = 5,
    threads: int = 0,
) -> dict[str, Any]:
    """Measure, write `out/isa.json` and `.html`, print a table and one JSON line. Lengths are in tokens.

    `paths`: names of instruction sets (default: all but the one that is for tests). Raises `ConfigError` for a name that this
    CPU does not run, `UnavailableError` if the kernels were not built.
    """
    known = library.isa_names()
    names = list(paths) or [name for name in known if name != library.EMULATED]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"this CPU does not run the paths {unknown}; it runs {list(known)}")
    bundle = Bundle.load(bundle_path)
    config = EngineConfig(
        max_num_seqs=max(batch_sizes),
        max_model_len=max(prompt_tokens, context) + new_tokens + 8,
        threads=threads,
        prefix_cache=False,  # repetitions have the same prompts, and must compute them
        backend="cpu",
    )
    limits = probes.measure(config.num_threads)
    rates = {name: library.probe_dot(config.num_threads, name) for name in names}
    with ExitStack() as stack:
        engines = {name: stack.enter_context(timed_engine(bundle_path, config, isa=name)) for name in names}
        bits = {name: _digest(engine, bundle, min(prompt_tokens, 200)) for name, (engine, _) in engines.items()}
        prefill: dict[str, list[float]] = {name: [] for name in names}
        decode: dict[tuple[str, int], list[float]] = {(name, size): [] for name in names for size in batch_sizes}
        for index in range(repeats):
            for name, (engine, timed) in engines.items():
                prefill[name].append(_prefill(engine, timed, bundle, index, prompt_tokens))
                for size in batch_sizes:
                    decode[name, size].append(_decode(engine, timed, bundle, size, context, new_tokens))
    letters = {digest: chr(ord("A") + index) for index, digest in enumerate(dict.fromkeys(bits.values()))}
    rows = [
        {
            "path": name,
            "int8_gmac_s": rates[name],
            "prefill_tok_s": statistics.median(prefill[name]),
            "decode_tok_s": {str(size): statistics.median(decode[name, size]) for size in batch_sizes},
            "bits": letters[bits[name]],
        }
        for name in names
    ]
    result = {
        "bundle": bundle.name,
        "quantisation": bundle.quantisation,
        "prompt_tokens": prompt_tokens,
        "context": context,
        "repeats": repeats,
        "machine": machine(),
        "limits": limits,
        "paths": rows,
    }
    write("isa", result, [_table(result, batch_sizes), _bars(rows, batch_sizes)], out)
    return result


def _prefill(engine: Engine, timed: StepTimer, bundle: Bundle, index: int, tokens: int) -> float:
    """Tokens per second of one prompt."""
    timed.steps.clear()
    engine.complete([random_request(bundle, index, tokens, 1)])
    return tokens / sum(step.seconds for step in timed.steps)


def _decode(engine: Engine, timed: StepTimer, bundle: Bundle, size: int, context: int, new_tokens: int) -> float:
    """Tokens per second of `size` sequences at `context`."""
    requests = [random_request(bundle, i, context - new_tokens // 2, new_tokens) for i in range(size)]
    full = run_together(engine, timed, requests)
    if not full:
        raise ConfigError(f"no step decoded {size} sequences at once; raise new_tokens ({new_tokens})")
    return size / statistics.median(step.seconds for step in full)


def _digest(engine: Engine, bundle: Bundle, tokens: int) -> str:
    """Of the tokens of nine requests of different lengths, and of the log-probabilities of prompts and answers."""
    digest = hashlib.sha256()
    requests = []
    for index in range(9):
        request = random_request(bundle, index, max(1, tokens * (index + 1) // 9), 4)
        requests.append(replace(request, sampling=replace(request.sampling, logprobs=0, prompt_logprobs=0)))
    for outputs in engine.complete(requests):
        for output in outputs:
            digest.update(np.array(output.token_ids, np.int64).tobytes())
            digest.update(np.array([*output.prompt_logprobs, *output.logprobs], np.float64).tobytes())
    return digest.hexdigest()


def _table(result: dict[str, Any], batch_sizes: Sequence[int]) -> Table:
    limits = result["limits"]
    title = (
        f"{result['bundle']}, {result['quantisation']['bits']} bits, {limits['threads']} threads; context {result['context']}; "
        f"read {limits['read_gb_s']:.0f} GB/s"
    )
    header = ["path", "int8 GMAC/s", f"prefill {result['prompt_tokens']}, tok/s", "× the next"]
    header += [f"{size} at once, tok/s" for size in batch_sizes]
    rows = []
    for row, following in zip(result["paths"], [*result["paths"][1:], None], strict=True):
        ratio = "–" if following is None else f"{row['prefill_tok_s'] / following['prefill_tok_s']:.2f}"
        speeds = [f"{row['decode_tok_s'][str(size)]:,.0f}" for size in batch_sizes]
        rows.append(
            [row["path"], f"{row['int8_gmac_s']:,.0f}", f"{row['prefill_tok_s']:,.0f}", ratio, *speeds, row["bits"]]
        )
    return Table(title, [*header, "same bits"], rows)


def _bars(rows: Sequence[dict[str, Any]], batch_sizes: Sequence[int]) -> Bars:
    speeds: dict[str, Sequence[float]] = {"prefill": [row["prefill_tok_s"] for row in rows]}
    speeds |= {f"{size} at once": [row["decode_tok_s"][str(size)] for row in rows] for size in batch_sizes}
    return Bars("Paths", "tok/s", [row["path"] for row in rows], speeds)
