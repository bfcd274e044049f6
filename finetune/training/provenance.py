"""Where a member comes from: versions, code and machine of its run, and its model card."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ... import __version__, finetune, runtime
from ..data.dataset import Dataset
from ..params import PROJECTOR

CARD = "README.md"
_PACKAGES = ("torch", "pytorch-lightning", "peft", "optuna", "opacus", "tokenizers", "numpy", "bitsandbytes")


def versions() -> dict[str, str]:
    """Name → version of Motet, Python and the installed libraries that a run depends on."""
    found = {"motet": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_digest() -> str:
    """SHA-256 of the source of `finetune` and `runtime`. It tells code versions apart without tags."""
    digest = hashlib.sha256()
    for package in (finetune, runtime):
        root = Path(next(iter(package.__path__)))
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """Code digest, versions, thread count and device of this process, for a manifest."""
    return {
        "code": code_digest(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.machine(),
    }


def chosen_by(dataset: Dataset, examples: int, digest: str) -> dict[str, Any]:
    """What chose a checkpoint, or members and their mix: validation examples of a data set, for a manifest. `digest`:
    of the examples as the model sees them. A privacy budget covers training examples alone, so none covers these."""
    return {
        "data": dataset.name,
        "data_digest": dataset.digest,
        "split": "validation",
        "examples": examples,
        "examples_digest": digest,
        "private": False,
    }


def choice_line(what: str, choice: Mapping[str, Any]) -> str:
    """The same as a sentence that begins with `what`."""
    return (
        f"{what} on {choice['examples']} validation examples of `{choice['data']}` (data {choice['data_digest'][:16]}…, "
        f"examples {choice['examples_digest'][:16]}…). No privacy budget covers them."
    )


def model_card(manifest: Mapping[str, Any]) -> str:
    """The model card in Markdown: losses, data, regularisation, privacy, settings and versions."""
    metrics, settings, data = manifest["metrics"], manifest["hyper_parameters"], manifest["data"]
    lines = [
        f"# {manifest['name']}",
        "",
        f"A {settings['method']} fine-tune of `{manifest['base']['name']}` on `{data['name']}`, made by Motet.",
        "",
        *_table(("nats per token", "before", "after"), _losses(metrics)),
        "",
        *_gap(metrics),
        f"Best of {len(metrics['validation_curve'])} validations, after batch {metrics['best_step']} of {metrics['steps']}"
        + (", stopped early." if metrics["stopped_early"] else ".")
        + " Its validation loss is a little too good, because it was chosen by it.",
        "",
        choice_line("The checkpoint was chosen", manifest["chosen_by"]),
        "",
        "## Data",
        "",
        *_table(
            ("split", "examples", "documents", "tokens", "answer tokens", "longest", "left out, too long"),
            [
                (n, p["examples"], p["documents"], p["tokens"], p["answer_tokens"], p["longest"], p["too_long"])
                for n, p in data["parts"].items()
            ],
        ),
        "",
        f"Near-duplicates of held-out examples: {data['num_duplicates']} ({data['near_duplicates']}).",
        "",
        "## Regularisation",
        "",
        *_table(
            ("what", "strength"),
            [
                (n, settings[n])
                for n in ("weight_decay", "l1", "label_smoothing", "dropout", "patience", "augmentation", "bag")
            ],
        ),
        "",
        *_privacy_lines(manifest),
        "## How it was made",
        "",
        *_table(("setting", "value"), sorted(settings.items())),
        "",
        f"Base {manifest['base']['digest'][:16]}…, data {data['digest'][:16]}…, code {manifest['environment']['code'][:16]}…; "
        + ", ".join(f"{n} {v}" for n, v in manifest["environment"]["versions"].items())
        + ".",
        "",
        *([] if settings["method"] == PROJECTOR else ["`motet repro DIR` runs it again and compares the figures.", ""]),
    ]
    return "\n".join(lines)


def _gap(metrics: Mapping[str, Any]) -> list[str]:
    """A private run has no train loss."""
    if "gap" not in metrics:
        return []
    return [f"Train/validation gap: {metrics['gap']:+.4f} nats (train in evaluation mode, on as many examples)."]


def _losses(metrics: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    rows = [("validation", metrics["validation_loss_before"], metrics["validation_loss_after"])]
    if "train_loss_after" in metrics:
        rows.append(("train", "", metrics["train_loss_after"]))
    return [tuple(f"{v:.4f}" if isinstance(v, float) else v for v in row) for row in rows]


def _privacy_lines(manifest: Mapping[str, Any]) -> list[str]:
    spent = manifest.get("privacy")
    if spent is None:
        return []
    return [
        "## Privacy",
        "",
        f"(ε = {spent['epsilon']:.3f}, δ = {spent['delta']:.3g}) for each training example: noise multiplier "
        f"{spent['noise_multiplier']:.3f}, sampling rate {spent['sample_rate']:.4f}, {spent['steps']} steps, gradients "
        f"clipped at {spent['clip']:g}; {spent['accountant']}. ε covers {spent['covers']}. Other runs on the same data add "
        "to ε.",
        "",
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    return lines + [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
