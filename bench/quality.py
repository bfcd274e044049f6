"""`motet bench quality`: bundles as they are served (KV cache included), and llama.cpp with the same weights, against
fp32.

Measured per token of held-out text: the change of the negative log-likelihood (ΔNLL), the divergence of the
distributions (KL), and how often the most probable token is the same. All of them score the same chunks in one run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from ..export.parity import Agreement, reference_logits
from ..finetune.data.dataset import heldout_token_ids
from ..pages import Bars, Table
from ..runtime.api.config import EngineConfig
from ..runtime.backends.base import F32
from ..runtime.backends.open import open_backend
from ..runtime.checkpoints.decoder import Decoder
from ..runtime.checkpoints.huggingface import read_config, read_weights
from ..runtime.checkpoints.store import resolve_model
from ..runtime.errors import ConfigError, MotetError
from ..runtime.model.bundle import Bundle
from ..runtime.model.members import MemberKind
from ..runtime.text.tokenizer import Tokenizer
from .lib.report import machine, write
from .peers.worker import Worker, peer_paths, peer_python

LLAMA_VARIANTS = ("Q8_0", "Q4_1")
Score = Callable[[Sequence[int]], F32]  # token ids [S] → logits [S, vocab]


def run(
    bundle_paths: Sequence[Path],
    model: str,
    out: Path,
    *,
    num_tokens: int = 4096,
    backend: str = "auto",
    kv_dtype: str = "auto",
    peers: bool = True,
    python: Path | None = None,
    threads: int = 0,
) -> dict[str, Any]:
    """Measure each bundle's base member, write `out/quality.json` and `.html`, print the table and one JSON line.
    Raises `ConfigError` for a bundle without such a member, or two bundles of one name."""
    directory = resolve_model(model)
    decoder = Decoder.from_weights(read_config(directory), read_weights(directory)).eval()
    context = decoder.config.max_position_embeddings
    chunks = heldout_token_ids(Tokenizer.from_dir(directory), num_tokens, context=context)
    config = EngineConfig.from_dict(
        {
            "backend": backend,
            "kv_dtype": kv_dtype,
            "max_num_seqs": 1,
            "max_model_len": max(map(len, chunks)),
            "threads": threads,
        }
    )
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        scores = {name: score for path in bundle_paths for name, score in [_bundle_score(path, config, stack)]}
        if len(scores) < len(bundle_paths):
            raise ConfigError("two bundles have the same name; give each another directory name")
        if peers:
            scores |= _llama_scores(model, python, config, failed, stack)
        rows = _compare(decoder, scores, chunks, failed)
    result = {
        "model": model,
        "tokens": sum(len(chunk) - 1 for chunk in chunks),
        "kv_dtype": kv_dtype,
        "machine": machine(),
        "rows": rows,
        "failed": failed,
    }
    write("quality", result, [_table(result), *_plots(result)], out)
    return result


def _bundle_score(path: Path, config: EngineConfig, stack: ExitStack) -> tuple[str, Score]:
    bundle = Bundle.load(path)
    if MemberKind.BASE not in bundle.kinds:
        raise ConfigError(
            f"'{path}' has no member that is the base, which is what is compared; export one with --tail base"
        )
    backend = open_backend(bundle, config)
    stack.callback(backend.close)
    member = bundle.kinds.index(MemberKind.BASE)
    return f"motet {bundle.name}", lambda token_ids: backend.score(token_ids, member)


def _llama_scores(
    model: str, python: Path | None, config: EngineConfig, failed: dict[str, str], stack: ExitStack
) -> dict[str, Score]:
    paths = peer_paths(model)
    if "gguf" not in paths:
        failed["llama.cpp"] = f"'{model}' was not pulled from a GGUF file"
        return {}
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    job = {"threads": config.num_threads, "lengths": {1: config.max_model_len}, "paths": paths, "score": True}
    scores: dict[str, Score] = {}
    for variant in LLAMA_VARIANTS:
        worker = Worker("llama.cpp", variant, str(python or peer_python()), job)
        stack.callback(worker.close)
        if worker.error is None:
            scores[worker.name] = _worker_score(worker, folder / f"{variant}.npy")
        else:
            failed[worker.name] = worker.error
    return scores


def _worker_score(worker: Worker, file: Path) -> Score:
    def score(token_ids: Sequence[int]) -> F32:
        worker.score(list(token_ids), file)
        logits: F32 = np.load(file)
        return logits

    return score


def _compare(
    decoder: Decoder, scores: dict[str, Score], chunks: Sequence[Sequence[int]], failed: dict[str, str]
) -> list[dict[str, Any]]:
    sums = {name: Agreement() for name in scores}
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        task = progress.add_task("quality", total=len(chunks) * len(scores))
        for chunk in chunks:
            reference = reference_logits(decoder, chunk)
            for name, score in scores.items():
                progress.advance(task)
                if name not in failed:
                    try:
                        sums[name].add(chunk, reference, score(chunk))
                    except MotetError as error:  # one failed; the others go on
                        failed[name] = str(error)
    return [asdict(total.result(name)) for name, total in sums.items() if name not in failed]


def _table(result: dict[str, Any]) -> Table:
    rows = [
        [row["name"], f"{row['nll']:.3f}", f"{row['nll_change']:+.2%}", f"{row['kl']:.4f}", f"{row['top1']:.1%}"]
        for row in result["rows"]
    ]
    title = f"{result['model']}, {result['tokens']:,} held-out tokens, against fp32; KV cache {result['kv_dtype']}"
    notes = [f"{name}: {reason}" for name, reason in result["failed"].items()]
    return Table("\n".join([title, *notes]), ["", "NLL fp32", "ΔNLL", "KL", "top-1 equal"], rows)


def _plots(result: dict[str, Any]) -> list[Bars]:
    return [
        Bars(
            "KL(fp32 ‖ served)", "nats", [r["name"] for r in result["rows"]], {"KL": [r["kl"] for r in result["rows"]]}
        )
    ]
