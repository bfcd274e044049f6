"""`motet bench quantisation`: methods and targets of `motet export` beside each other, in size, quality and time.

The model, or it with an adapter added to its weights, is exported in each way; each bundle is measured on held-out text as it is
served, against fp32. Calibration never sees that text. Bundles are kept, so that they can be served or compared further.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..export.base_model import BaseModel
from ..export.bundle_writer import export_bundle
from ..export.members import read_member
from ..export.parity import Agreement, HeldOut, read_parity, reference_logits
from ..export.quantisation.calibration import Calibration
from ..export.quantisation.method import Method, Target
from ..finetune.data.dataset import heldout_token_ids
from ..finetune.search.fusion import weights_digest
from ..pages import Lines, Part, Table
from ..runtime.api.config import EngineConfig
from ..runtime.checkpoints.decoder import Decoder
from ..runtime.checkpoints.sources import SMOLLM2
from ..runtime.checkpoints.store import resolve_model
from ..runtime.errors import ConfigError, UnavailableError
from ..runtime.model.bundle import WEIGHTS, Bundle
from ..runtime.model.members import MemberKind
from .lib.parts import part
from .lib.report import machine, write
from .peers.merged_gguf import write_merged_gguf
from .peers.worker import Worker, peer_paths, peer_python

SEEDS = 3  # of the targets that are drawn while statistics are gathered


@dataclass(frozen=True, slots=True)
class _Way:
    """How a bundle is exported."""

    name: str
    method: Method = Method.ROUND
    bits: int | None = None
    target_bits: float | None = None
    seed: int = 0


def _ways(targets: tuple[float, ...]) -> list[_Way]:
    ways = [_Way("8 bits", bits=8), _Way("4 bits", bits=4), _Way("4 bits, gptq", Method.GPTQ, bits=4)]
    ways += [
        _Way(f"{bits:g} bits a weight, {method}", method, target_bits=bits) for bits in targets for method in Method
    ]
    best = Method.GPTQ
    return ways + [
        _Way(f"{bits:g} bits a weight, {best}, seed {seed}", best, target_bits=bits, seed=seed)
        for bits in targets
        for seed in range(1, SEEDS)
    ]


def run(
    model: str,
    work: Path,
    out: Path,
    *,
    lora: Path | None = None,
    targets: tuple[float, ...] = (4.55,),
    num_tokens: int = 4096,
    calibration_tokens: int = 16384,
    peers: bool = False,
    python: Path | None = None,
) -> dict[str, Any]:
    """Write `out/quantisation.json` and `.html`. `work` keeps the bundles, the statistics and the parts that are done. `lora`:
    an adapter, which is added to the weights. `peers`: llama.cpp too, which quantises the same weights from float32;
    `python`: the interpreter that has it (see `peer_python`)."""
    if peers:
        _check_peers(model)
    base = BaseModel(resolve_model(model))
    context = base.config.max_position_embeddings
    held_out = HeldOut(heldout_token_ids(base.tokenizer, num_tokens, context=context))
    chunks = heldout_token_ids(base.tokenizer, calibration_tokens, context=context, split="train")
    loras = {} if lora is None else {"merged": lora}
    settings = {
        "model": base.digest,
        "lora": None if lora is None else weights_digest(lora),
        "tokens": num_tokens,
        "calibration": calibration_tokens,
    }

    def measured(way: _Way) -> dict[str, Any]:
        path, start = work / way.name.replace(" ", "-").replace(",", ""), time.monotonic()
        is_light = way.method is Method.ROUND and way.target_bits is None
        text = heldout_token_ids(base.tokenizer, 1024, context=context, split="train") if is_light else chunks
        calibration = Calibration(text, work / "statistics", seed=way.seed) if way.bits != 4 or not is_light else None
        export_bundle(
            base,
            path,
            loras=loras,
            merge=bool(loras),
            bits=way.bits,
            method=way.method,
            target=None if way.target_bits is None else Target(bits=way.target_bits),
            calibration=calibration,
            held_out=held_out,
        )
        (member,) = read_parity(path).members
        quantisation = Bundle.load(path).quantisation
        return {
            "name": way.name,
            "average_bits": quantisation["average_bits"],
            "bytes": (path / WEIGHTS).stat().st_size,
            "expected_kl": None if quantisation["expected_kl"] is None else sum(quantisation["expected_kl"].values()),
            "seconds": time.monotonic() - start,
            **asdict(member),
        } | {"name": way.name}

    ways = _ways(targets)
    rows = [part(work / "parts" / f"{index}.json", settings | asdict(way), lambda way=way: measured(way))  # type: ignore[misc]
            for index, way in enumerate(ways)]  # fmt: skip
    for variant in ("Q8_0", "Q4_K_M") if peers else ():
        made_from = settings | {"llama.cpp": variant}
        whole = work / f"merged-{base.digest[:12]}-{str(settings['lora'])[:12]}.gguf"
        scored = partial(_llama_cpp, variant, model, base, lora, held_out.chunks, whole, python)
        rows.append(part(work / "parts" / f"{variant}.json", made_from, scored))
    result = {"machine": machine(), **settings, "model": model, "rows": rows}
    write("quantisation", result, _parts(result), out)
    return result


def _check_peers(model: str) -> None:
    """Raises `ConfigError` for a model that llama.cpp cannot be given."""
    if "gguf" not in peer_paths(model):
        raise ConfigError(
            f"llama.cpp is compared on '{SMOLLM2}' alone, whose GGUF file has the tokenizer that it needs, and '{model}' was "
            "asked for; leave out --peers"
        )


def _llama_cpp(
    variant: str,
    model: str,
    base: BaseModel,
    lora: Path | None,
    chunks: Sequence[Sequence[int]],
    whole: Path,
    python: Path | None,
) -> dict[str, Any]:
    """llama.cpp with the same weights, which it quantises itself (without an importance matrix), on the same text. `whole`: the
    file of these weights in float32. Bytes are those of tensors, as ours are. Raises `UnavailableError` if llama.cpp fails."""
    from gguf import GGUFReader

    paths, work = peer_paths(model), whole.parent
    start, weights = time.monotonic(), dict(base.weights)
    if lora is not None:
        member = read_member("merged", lora, MemberKind.ADAPTER, base, merge=True)
        weights |= {name: torch.from_numpy(weight) for name, weight in member.weights.items()}
    write_merged_gguf(Path(paths["gguf"]), weights, base.config, whole)
    job = {
        "threads": EngineConfig().num_threads,
        "lengths": {1: max(map(len, chunks))},
        "paths": paths | {"gguf": str(whole), "scratch": str(work)},
        "score": True,
    }
    decoder, agreement = Decoder.from_weights(base.config, weights).eval(), Agreement()
    with closing(Worker("llama.cpp", variant, str(python or peer_python()), job)) as worker:
        if worker.error is not None:
            raise UnavailableError(f"llama.cpp {variant} cannot be measured: {worker.error}")
        for chunk in chunks:
            worker.score(list(chunk), work / "scores.npy")
            agreement.add(chunk, reference_logits(decoder, chunk), np.load(work / "scores.npy"))
    tensors = GGUFReader(work / f"{whole.stem}-to-{variant.lower()}.gguf").tensors
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    return {
        "average_bits": 8 * sum(int(one.n_bytes) for one in matrices) / sum(int(one.n_elements) for one in matrices),
        "bytes": sum(int(tensor.n_bytes) for tensor in tensors),
        "expected_kl": None,
        "seconds": time.monotonic() - start,
        **asdict(agreement.result(variant)),
    } | {"name": f"llama.cpp {variant}"}


def _parts(result: dict[str, Any]) -> list[Part]:
    rows = [
        [
            row["name"],
            f"{row['average_bits']:.2f}",
            f"{row['bytes'] / 1e6:.0f} MB",
            f"{row['nll_change']:+.2%}",
            f"{row['kl']:.4f}",
            "–" if row["expected_kl"] is None else f"{row['expected_kl']:.4f}",
            f"{row['top1']:.1%}",
            f"{row['seconds']:.0f} s",
        ]
        for row in result["rows"]
    ]
    header = ["", "bits a weight", "weights", "ΔNLL", "KL", "KL expected of the weights", "top-1 equal", "export"]
    lines = {
        str(method): sorted(
            [row["average_bits"], row["kl"]] for row in result["rows"] if row["name"].endswith(f", {method}")
        )
        for method in Method
    }
    title = f"{result['model']}, {result['rows'][0]['num_tokens']:,} held-out tokens, against fp32"
    return [
        Table(title, header, rows),
        Lines("KL by size", ("bits a weight", "nats"), {k: v for k, v in lines.items() if v}),
    ]
