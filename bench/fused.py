"""A fused ensemble as it is served, exported in 8 bits.

It compares the ensemble's tokens with a mix of its members run as separate models, and measures the cost of a step and how
similar the summaries are to the references (ROUGE-L, `rouge-score`).
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rouge_score import rouge_scorer

from ..export.bundle_writer import export_bundle
from ..export.quantisation.calibration import Calibration
from ..finetune.data.dataset import encode_prompt, heldout_token_ids
from ..finetune.data.example import Example
from ..finetune.training.train import Workbench
from ..runtime.api.config import EngineConfig
from ..runtime.api.request import Ensemble, Member, Request, Space
from ..runtime.api.sampling import SamplingParams
from ..runtime.backends.cpu.backend import CpuBackend
from ..runtime.engine.engine import Engine
from ..runtime.model.bundle import Bundle
from . import decode

Tokens = list[tuple[int, ...]]
F64 = npt.NDArray[np.float64]
NEW_TOKENS = 32


def served(
    bench: Workbench, fused: Mapping[str, Any], best: tuple[str, Path], work: Path, *, examples: int, max_length: int
) -> dict[str, Any]:
    """Measure the ensemble that `fuse` returned.

    `best`: name and directory of the best single member. `examples`: test examples for ROUGE-L; a quarter of them is compared
    with separate models. `max_length`: most tokens of a prompt.
    """
    shutil.rmtree(work, ignore_errors=True)
    calibration = Calibration(
        heldout_token_ids(bench.tokenizer, 1024, context=bench.config.max_position_embeddings, split="train")
    )
    space, mix = Space(fused["space"]), dict(fused["mix"])
    temperatures: dict[str, float] = fused["temperatures"]
    members = {name: Path(path) if path else None for name, path in fused["members"].items()}

    def export(name: str, tails: dict[str, Path | None], **options: Any) -> Path:
        export_bundle(bench.model_dir, work / name, tails=tails, calibration=calibration, **options)
        return work / name

    together = export("fused", members, mix=mix, temperatures=temperatures, space=space)
    separate = [export(f"member-{name}", {name: path}) for name, path in members.items()]
    single = export("best", {best[0]: best[1], "base": None})
    chosen = _examples(bench, examples, max_length)
    prompts = [tuple(encode_prompt(bench.tokenizer, example)) for example in chosen]
    answers = {
        "base": _generate(single, Ensemble((Member("base", 1.0),)), prompts),
        "best single": _generate(single, Ensemble((Member(best[0], 1.0),)), prompts),
        "fused": _generate(together, None, prompts),
    }
    few = examples // 4
    parts = [(c, temperatures.get(name, 1.0)) for name, c in mix.items()]
    same = _mixed_outside(separate, parts, space, prompts[:few], answers["fused"][:few])
    cost = decode.run(together, work, batch_sizes=(1, 4, 16))
    return {
        "mix": mix,
        "space": str(space),
        "tokens_compared": sum(map(len, answers["fused"][:few])),
        "tokens_same": same,
        "cost": {row["batch_size"]: row["ratio_to_one_member"] for row in cost["decode"] if row["ensemble_size"] > 1},
        "rouge_l": {name: _rouge(bench, found, chosen) for name, found in answers.items()},
        "examples": len(chosen),
    }


def _examples(bench: Workbench, count: int, max_length: int) -> list[Example]:
    fits = (e for e in bench.dataset.splits["test"] if len(encode_prompt(bench.tokenizer, e)) <= max_length)
    return [example for example, _ in zip(fits, range(count))]


def _generate(bundle: Path, ensemble: Ensemble | None, prompts: Sequence[tuple[int, ...]]) -> Tokens:
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
    with Engine.from_bundle(bundle, EngineConfig(backend="cpu")) as engine:
        mix = ensemble or engine.model.default_ensemble
        found = engine.complete([Request(str(i), (prompt,), mix, params) for i, prompt in enumerate(prompts)])
    return [tuple(choices[0].token_ids) for choices in found]


def _mixed_outside(
    bundles: Sequence[Path],
    mix: Sequence[tuple[float, float]],
    space: Space,
    prompts: Sequence[tuple[int, ...]],
    answers: Tokens,
) -> int:
    """How many tokens of the answers are the argmax of the members' mixed logits or probabilities; `mix`: (coefficient,
    temperature) of each.

    Each member is a whole model with its own trunk, cache and head. It is fed the prompt and the answer (teacher forcing).
    """
    config = EngineConfig(backend="cpu", max_num_seqs=1)
    models = [CpuBackend(Bundle.load(path), config) for path in bundles]
    same = 0
    for prompt, answer in zip(prompts, answers):
        rows = [np.asarray(model.score([*prompt, *answer[:-1]], 0)[len(prompt) - 1 :], np.float64) for model in models]
        rows = [row / temperature for row, (_, temperature) in zip(rows, mix, strict=True)]
        if space is Space.PROBS:
            rows = [_probabilities(row) for row in rows]
        mixed = sum((c * row for (c, _), row in zip(mix, rows)), np.zeros_like(rows[0]))
        same += int((mixed.argmax(1) == np.array(answer)).sum())
    for model in models:
        model.close()
    return same


def _probabilities(logits: F64) -> F64:
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(raised / raised.sum(1, keepdims=True))


def _rouge(bench: Workbench, answers: Tokens, examples: Sequence[Example]) -> float:
    """Mean ROUGE-L (F1) of the answers against the references."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    scores = [
        scorer.score(example.completion, bench.tokenizer.decode(list(answer)))["rougeL"].fmeasure
        for example, answer in zip(examples, answers, strict=True)
    ]
    return float(statistics.mean(scores))
