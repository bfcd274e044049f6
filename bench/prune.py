"""`motet bench prune`: what pruning costs in quality and brings in size and speed, and how much of it healing gives back.

The model, the same without some layers, that one healed, and the healed one with a smaller vocabulary. The losses are of held-out
texts, in bits per byte, so that models of other vocabularies compare. Each is exported to 8 bits, and the
bundles take turns at decoding. Beside them: the loss of the model with weights set to zero, which makes nothing faster here.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from ..export.base_model import BaseModel
from ..export.bundle_writer import export_bundle
from ..export.members import read_member
from ..export.prune.masks import masked
from ..export.prune.params import PruneParams
from ..export.prune.prune import num_parameters, prune
from ..export.quantisation.calibration import Calibration
from ..export.quantisation.statistics import Statistics, gather
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
from ..runtime.api.request import Request
from ..runtime.api.sampling import SamplingParams
from ..runtime.checkpoints.decoder import Decoder
from ..runtime.checkpoints.huggingface import open_weights
from ..runtime.checkpoints.overlay import Overlay
from ..runtime.checkpoints.rewrite import copy_texts, plain_places, write_weights
from ..runtime.checkpoints.store import resolve_model
from ..runtime.checkpoints.weight_files import read_json
from ..runtime.engine.open import open_engine
from ..runtime.model.bundle import WEIGHTS, Bundle
from ..runtime.model.files import directory_digest, new_directory
from ..runtime.model.layout import decoder_layout
from ..runtime.model.members import MemberKind
from ..runtime.text.tokenizer import Tokenizer
from .lib.parts import part
from .lib.report import machine, write
from .lib.timed import random_request, run_together, timed_engine

CALIBRATION = 4096  # tokens
_PROMPT, _NEW = 64, 48  # tokens of a decoded request
_ANSWER = 16  # tokens that are compared
_MASKS: dict[
    str, tuple[bool, int, int]
] = {  # whether inputs count, how many weights are kept of how many; 0: half of a row
    "half of each row, by size": (False, 0, 0),
    "half of each row, by size and input": (True, 0, 0),
    "2 of 4, by size and input": (True, 2, 4),
}
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def run_bench(
    model: str,
    data: str,
    work: Path,
    out: Path,
    *,
    lora: Path | None = None,
    share: float = 0.25,
    examples: int = 1000,
    test_examples: int = 128,
    epochs: int = 2,
    prompts: int = 200,
    repeats: int = 5,
    threads: int = 0,
) -> dict[str, Any]:
    """Write `out/prune.json` and `.html`. `work` keeps models, bundles and parts that are done. `lora`: an adapter, which is
    added to the weights first. `examples`: that heal. `prompts`: of training, that the models with and without the vocabulary's
    rest answer."""
    base = resolve_model(model) if lora is None else _merged(resolve_model(model), lora, work / "merged")
    splits = load_dataset(data).splits
    texts = [_text(example) for example in splits["test"][:test_examples]]
    settings: dict[str, Any] = {"model": BaseModel(base).digest, "data": data, "share": share}
    settings |= {"examples": examples, "epochs": epochs, "lora": None if lora is None else directory_digest(lora)}

    def made(name: str, make: Callable[[Path], dict[str, Any]]) -> Path:
        """The model `name`, made once for these settings."""
        part(work / f"{name}.json", settings, lambda: make(work / name))
        return work / name

    def layers(path: Path) -> dict[str, Any]:
        model_base = BaseModel(base)
        context = model_base.config.max_position_embeddings
        chunks = heldout_token_ids(model_base.tokenizer, CALIBRATION, context=context, split="train")
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
        corpus.write_text("\n\n".join(_text(example) for example in splits["train"]))
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
    asked = [example.prompt for example in splits["train"][:prompts]]
    trimmed, made_from = models["fewer tokens"], settings | {"prompts": prompts}
    equal = part(work / "equal.json", made_from, lambda: equal_answers(healed, trimmed, asked))
    masks = part(work / "masks.json", settings | {"texts": len(texts)}, lambda: {"rows": _masks(base, texts, work)})
    result = {
        **settings,
        "model": model,
        "texts": len(texts),
        "rows": rows,
        "masks": masks["rows"],
        "equal_answers": {key: equal[key] for key in ("prompts", "equal")},
        "machine": machine(),
    }
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


def _merged(model_dir: Path, lora: Path, out: Path) -> Path:
    """A model's directory with an adapter added to its weights."""
    member = read_member("merged", lora, MemberKind.ADAPTER, BaseModel(model_dir), merge=True)
    own = {name: torch.from_numpy(weight) for name, weight in member.weights.items()}
    values = read_json(model_dir / "config.json")
    with open_weights(model_dir) as weights, new_directory(out, "config.json", "a model") as work:
        write_weights(work / "model.safetensors", weights.config, Overlay(own, weights), plain_places(weights, values))
        copy_texts(model_dir, work)
        (work / "config.json").write_text(json.dumps(values))
    return out


def equal_answers(one: Path, other: Path, prompts: Sequence[str]) -> dict[str, Any]:
    """To how many prompts two models give the same greedy text of 16 tokens, in 32 bits."""
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        for name, path in (("one", one), ("other", other)):
            bundle = export_bundle(path, Path(folder) / name, bits=32, graphs=False)
            with open_engine(bundle, EngineConfig(backend="cpu"), verify=False) as engine:
                sampling = SamplingParams(max_tokens=_ANSWER, temperature=0.0)
                mix, most = engine.model.default_ensemble, engine.model.max_model_len - _ANSWER
                ids = [tuple(engine.tokenizer.encode(text))[:most] for text in prompts]
                asked = [Request(f"{index}", (own,), mix, sampling) for index, own in enumerate(ids)]
                answers.append([choices[0].text for choices in engine.complete(asked)])
    return {"prompts": len(prompts), "equal": sum(a == b for a, b in zip(*answers, strict=True))}


def _masks(model_dir: Path, texts: Sequence[str], work: Path) -> list[dict[str, Any]]:
    """The losses of the model with half of each linear layer's weights set to zero, chosen in several ways."""
    model = BaseModel(model_dir)
    chunks = heldout_token_ids(
        model.tokenizer, CALIBRATION, context=model.config.max_position_embeddings, split="train"
    )
    path = work / "statistics.safetensors"
    gather(model.config, model.weights, chunks, path)
    tokenizer, found = Tokenizer.from_dir(model_dir), []
    with closing(Statistics(path)) as statistics:
        for name, (is_weighed, kept, of) in _MASKS.items():
            weights = dict(model.weights)
            for linear in decoder_layout(model.config).linears:
                rms = torch.from_numpy(statistics.rms(f"{linear.name}.weight"))
                group = of or linear.columns
                for one in (f"{part.name}.weight" for part in linear.parts):
                    inputs = rms if is_weighed else torch.ones_like(rms)
                    weights[one] = masked(weights[one], inputs, kept or group // 2, group)
            decoder = Decoder.from_weights(model.config, weights).eval()
            found.append({"name": name, "bits_per_byte": _loss(tokenizer, decoder, texts)})
    path.unlink()
    return found


def _bits_per_byte(model_dir: Path, texts: Sequence[str]) -> float:
    return _loss(Tokenizer.from_dir(model_dir), Decoder.from_dir(model_dir).eval(), texts)


@torch.no_grad()
def _loss(tokenizer: Tokenizer, decoder: Decoder, texts: Sequence[str]) -> float:
    """Bits per byte of the whole texts, fp32. The first token of a text is given, and its bytes are not counted."""
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
    tuned = " with an adapter" if result["lora"] else ""
    title = f"{result['model']}{tuned}, {removed}, healed with {result['examples']} examples"
    header = ["", "layers", "tokens", "M parameters", "MB, 8 bits", "bits per byte", "tokens/s", "speed"]
    masks = [[row["name"], f"{row['bits_per_byte']:.3f}"] for row in result["masks"]]
    same = "{equal} of {prompts} prompts have the same answer without the vocabulary's rest".format(
        **result["equal_answers"]
    )
    names = [row["name"] for row in result["rows"]]
    spans = {"decode": [[min(row["tokens_per_s"]), max(row["tokens_per_s"])] for row in result["rows"]]}
    return [
        Table(f"{title}\n{same}", header, rows),
        Table("Half of the layers' weights set to zero, not healed", ["", "bits per byte"], masks),
        Bars("Decode, one sequence", "tokens/s", names, {"decode": [speeds[name] for name in names]}, spans),
        Bars("Held-out text", "bits per byte", names, {"loss": [row["bits_per_byte"] for row in result["rows"]]}),
    ]
