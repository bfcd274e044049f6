"""`motet bench prune`: what pruning costs in quality and brings in size and speed, and how much of it healing gives back.

The model, the same without some layers, that one healed, and the healed one with a smaller vocabulary. The losses are of held-out
documentation, in bits per byte of text, so that models of other vocabularies compare. Each is exported to 8 bits, and the
bundles take turns at decoding.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..export.base_model import BaseModel
from ..export.bundle_writer import export_bundle
from ..export.prune.params import PruneParams
from ..export.prune.prune import num_parameters, prune
from ..export.quantisation.calibration import Calibration
from ..finetune.data.dataset import heldout_token_ids, load_dataset
from ..finetune.data.example import Example
from ..finetune.heal_params import HealParams
from ..finetune.params import TuneParams
from ..finetune.training.heal import heal
from ..finetune.training.progress import Progress
from ..finetune.training.train import Workbench
from ..finetune.training.trunk_cache import TrunkCache
from ..pages import Bars, Part, Table
from ..runtime.api.config import EngineConfig
from ..runtime.checkpoints.decoder import Decoder
from ..runtime.checkpoints.store import resolve_model
from ..runtime.model.bundle import WEIGHTS, Bundle
from ..runtime.text.tokenizer import Tokenizer
from .lib.parts import part
from .lib.report import machine, write
from .lib.timed import random_request, run_together, timed_engine

_CALIBRATION = 4096  # tokens
_PROMPT, _NEW = 64, 48  # tokens of a decoded request
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def run_bench(
    model: str,
    data: str,
    work: Path,
    out: Path,
    *,
    share: float = 0.25,
    examples: int = 1000,
    test_examples: int = 128,
    epochs: int = 2,
    repeats: int = 5,
    threads: int = 0,
) -> dict[str, Any]:
    """Write `out/prune.json` and `.html`. `work` keeps models, bundles and parts that are done. `examples`: that heal."""
    base = resolve_model(model)
    texts = [_text(example) for example in load_dataset(data).splits["test"][:test_examples]]
    settings = {"model": BaseModel(base).digest, "data": data, "share": share, "examples": examples, "epochs": epochs}

    def made(name: str, make: Callable[[Path], dict[str, Any]]) -> Path:
        """The model `name`, made once for these settings."""
        part(work / f"{name}.json", settings, lambda: make(work / name))
        return work / name

    def layers(path: Path) -> dict[str, Any]:
        model_base = BaseModel(base)
        context = model_base.config.max_position_embeddings
        chunks = heldout_token_ids(model_base.tokenizer, _CALIBRATION, context=context, split="train")
        return _figures(prune(base, path, PruneParams(share=share), chunks=chunks, calibration="built-in"))

    pruned = made("pruned", layers)

    def healing(path: Path) -> dict[str, Any]:
        tuned = TuneParams(
            method="lora", rank=16, alpha=32, targets=_TARGETS, learning_rate=1e-3, examples=examples, epochs=epochs
        )
        bench = Workbench(pruned, data, TrunkCache(work / "cache"))
        with Progress() as progress:
            return {"healed": heal(bench, base, path, HealParams(base=tuned), progress=progress)["healed"]}

    healed = made("healed", healing)

    def vocabulary(path: Path) -> dict[str, Any]:
        corpus = work / "corpus.txt"
        corpus.write_text("\n\n".join(_text(example) for example in load_dataset(data).splits["train"]))
        return _figures(prune(healed, path, PruneParams(), vocabulary=[corpus]))

    models = {"original": base, "pruned": pruned, "healed": healed, "fewer tokens": made("trimmed", vocabulary)}
    bundles = {name: _bundle(path, work / "bundles" / name.replace(" ", "-")) for name, path in models.items()}
    losses = {name: _bits_per_byte(path, texts) for name, path in models.items()}
    speeds = _speeds(bundles, repeats, threads)
    rows = [
        {
            "name": name,
            "layers": BaseModel(path).config.num_layers,
            "vocabulary": BaseModel(path).config.vocab_size,
            "parameters": num_parameters(BaseModel(path).config),
            "bundle_bytes": (bundles[name] / WEIGHTS).stat().st_size,
            "bits_per_byte": losses[name],
            "tokens_per_s": speeds[name],
        }
        for name, path in models.items()
    ]
    result = {"model": model, **settings, "texts": len(texts), "rows": rows, "machine": machine()}
    write("prune", result, _parts(result), out)
    return result


def _text(example: Example) -> str:
    return f"{example.prompt}\n\n{example.completion}"


def _figures(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of a record, what a reader wants; the rest is in the model's directory."""
    return {key: record[key] for key in ("parameters", "layers", "vocabulary", "calibration") if key in record}


def _bundle(model_dir: Path, out: Path) -> Path:
    model = BaseModel(model_dir)
    context = model.config.max_position_embeddings
    chunks = heldout_token_ids(model.tokenizer, 1024, context=context, split="train")
    export_bundle(model, out, calibration=Calibration(chunks), graphs=False)
    return out


@torch.no_grad()
def _bits_per_byte(model_dir: Path, texts: Sequence[str]) -> float:
    """Of the whole texts, fp32. The first token of a text is given, and its bytes are not counted."""
    tokenizer, decoder = Tokenizer.from_dir(model_dir), Decoder.from_dir(model_dir).eval()
    nats, size = 0.0, 0
    for text in texts:
        ids = tokenizer.encode(text)[: decoder.config.max_position_embeddings]
        targets = torch.tensor(ids[1:])
        nats += float(torch.nn.functional.cross_entropy(decoder(torch.tensor([ids[:-1]]))[0], targets, reduction="sum"))
        size += sum(len(tokenizer.token_bytes(token_id)) for token_id in ids[1:])
    return nats / math.log(2) / size


def _speeds(bundles: Mapping[str, Path], repeats: int, threads: int) -> dict[str, list[float]]:
    """Bundle → tokens per second of one sequence, of each repeat; the bundles take turns."""
    config = EngineConfig(threads=threads, max_num_seqs=1, max_model_len=_PROMPT + _NEW)
    found: dict[str, list[float]] = {name: [] for name in bundles}
    for repeat in range(repeats):
        for name, path in bundles.items():
            with timed_engine(path, config) as (engine, timer):
                request = random_request(Bundle.load(path, verify=False), repeat, _PROMPT, _NEW)
                steps = run_together(engine, timer, [request])
                found[name].append(1 / statistics.median(step.seconds for step in steps))
    return found


def _parts(result: Mapping[str, Any]) -> list[Part]:
    first = result["rows"][0]
    speeds = {row["name"]: statistics.median(row["tokens_per_s"]) for row in result["rows"]}
    rows = [
        [
            row["name"],
            str(row["layers"]),
            f"{row['vocabulary']:,}",
            f"{row['parameters'] / 1e6:.1f}",
            f"{row['bundle_bytes'] / 1e6:.0f}",
            f"{row['bits_per_byte']:.3f}",
            f"{speeds[row['name']]:.1f}",
            f"× {speeds[row['name']] / speeds[first['name']]:.2f}",
        ]
        for row in result["rows"]
    ]
    removed = f"{result['share']:.0%} of the layers' parameters removed"
    title = f"{result['model']}, {removed}, healed with {result['examples']} examples"
    header = ["", "layers", "tokens", "M parameters", "MB, 8 bits", "bits per byte", "tokens/s", "speed"]
    names = [row["name"] for row in result["rows"]]
    spans = {"decode": [[min(row["tokens_per_s"]), max(row["tokens_per_s"])] for row in result["rows"]]}
    return [
        Table(title, header, rows),
        Bars("Decode, one sequence", "tokens/s", names, {"decode": [speeds[name] for name in names]}, spans),
        Bars("Held-out text", "bits per byte", names, {"loss": [row["bits_per_byte"] for row in result["rows"]]}),
    ]
