"""`heal`: a pruned model learns again what the unpruned one says, by distillation (Hinton et al. 2015; Muralidharan et al. 2024).

    loss = (1 - share) · cross-entropy + share · KL(teacher ‖ student) + hidden · |h - hₜ|² / |hₜ|²

It trains what the methods of tuning train: the last layers and the norm, low-rank updates, or everything, and asked for the
norms of all layers. The result is an ordinary checkpoint again, or a member of the pruned model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...runtime.checkpoints.huggingface import Weights, checkpoint_digest, open_weights
from ...runtime.checkpoints.overlay import Overlay
from ...runtime.checkpoints.pruned import RECORD, Origin, check_output, read_record
from ...runtime.checkpoints.rewrite import copy_texts, plain_places, write_weights
from ...runtime.checkpoints.weight_files import read_json
from ...runtime.errors import ConfigError
from ...runtime.model.files import new_directory
from ...runtime.model.layout import decoder_layout
from ..data.batches import Item, TrainBatch, make_batch
from ..data.example import Split
from ..heal_params import HealParams
from .methods import Learner
from .progress import Progress
from .teacher import Teacher
from .train import RunData, Workbench, run, token_losses

_WHAT = "a pruned model"


class Healer(Learner):
    """A learner whose loss has the divergence from a teacher. In evaluation it is the data's alone."""

    heal: HealParams
    teacher: Teacher

    def prepare(self, heal: HealParams, teacher: Teacher) -> Healer:
        """Set what it learns from; with `norms`, free those of all layers."""
        self.heal, self.teacher = heal, teacher
        if heal.norms:
            self.split = 0
            for name in decoder_layout(self.config).norm_tensors:
                module, _, kind = name.rpartition(".")
                origin = self.decoder.get_parameter(name)  # a copy: runs share the base
                setattr(self.decoder.get_submodule(module), kind, nn.Parameter(origin.detach().clone()))
        return self

    def loss(self, batch: TrainBatch, smoothing: float = 0.0) -> Tensor:
        if not self.training:
            return super().loss(batch, smoothing)
        if self.heal.every_token:
            whole = (replace(item, encoded=replace(item.encoded, answer=1, earlier=())) for item in batch.items)
            batch = make_batch(list(whole))
        wanted = batch.targets >= 0
        targets = batch.targets[wanted].to(self.device)
        last = self._last(batch)[wanted.to(self.device)]
        logits = self.decoder.head(self.decoder.norm(last)).float()
        taught = self._taught(batch).to(self.device)
        divergence = F.kl_div(
            F.log_softmax(logits, -1), self.teacher.log_probs(taught), reduction="batchmean", log_target=True
        )
        loss = (1 - self.heal.share) * F.cross_entropy(logits, targets, label_smoothing=smoothing)
        loss = loss + self.heal.share * divergence
        if self.heal.hidden:
            loss = loss + self.heal.hidden * (last.float() - taught).square().sum() / taught.square().sum()
        return loss

    def _taught(self, batch: TrainBatch) -> Tensor:
        """[T, hidden] float32: the teacher's states at the positions that predict the targets."""
        known = [item.teacher for item in batch.items if item.teacher is not None]
        if len(known) < len(batch.items):
            known = self.teacher.states_now([item.encoded for item in batch.items])
        rows = [states[[i - 1 for i in item.encoded.targets]] for states, item in zip(known, batch.items, strict=True)]
        return torch.cat(rows).float()


class _Merged(Healer):
    """Writes the pruned model with what was trained, instead of a member."""

    pruned: Path
    out: Path

    def write(self, _out: Path, manifest: Mapping[str, Any], files: Mapping[str, str]) -> None:
        values = read_json(self.pruned / "config.json")
        record = read_record(self.pruned)
        origin = Origin(self.pruned.name, checkpoint_digest(self.pruned))
        record = {**record, "origins": [origin.to_dict(), *record["origins"]], "healed": dict(manifest)}
        with open_weights(self.pruned) as weights, new_directory(self.out, RECORD, _WHAT) as work:
            _write(work, weights, self.merged(), values)
            copy_texts(self.pruned, work)
            (work / "config.json").write_text(json.dumps(values, indent=2) + "\n")
            (work / RECORD).write_text(json.dumps(record) + "\n")
            for name, text in files.items():
                (work / name).write_text(text)
            open_weights(work).close()


def _write(work: Path, weights: Weights, changed: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    places = plain_places(weights, values)
    write_weights(work / "model.safetensors", weights.config, Overlay(changed, weights), places)


def heal(
    bench: Workbench,
    teacher_dir: Path,
    out: Path,
    params: HealParams | None = None,
    *,
    as_member: bool = False,
    name: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Heal the pruned model of `bench` on its data, and return the manifest. The same call resumes a run that was killed.

    `out` becomes an ordinary model directory, with the record of the pruned one and what was done (`healed`); or `as_member` a
    tail or adapter of the pruned model, which then stays the base of other members. `manifest["healed"]["test"]` has the losses
    of teacher (among the tokens that are left), pruned model and healed one on test examples, which decided nothing.

    The teacher's states are in the trunk cache, on disk; without a cache it runs for every batch. Raises what `tune` raises,
    `BundleError` for a teacher that the model does not come from, `ConfigError` for norms in a member and for an `out` that is
    something else.
    """
    params, progress = params or HealParams(), progress or Progress(False)
    if as_member and params.norms:
        raise ConfigError(
            "a member shares the layers below its own, so it cannot train their norms; leave out --norms or --member"
        )
    for source in (bench.model_dir, teacher_dir):
        if source.resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"'{out}' holds '{source}', and would replace it; choose another directory")
    if not as_member:
        check_output(out, healed=True)
    teacher = Teacher(teacher_dir, bench.model_dir, bench.cache)
    tuned = params.base.fitted(bench.config.max_position_embeddings)
    parts, report = _load(bench, replace(params, base=tuned), teacher, progress)
    before: list[float] = []

    def learner(*arguments: Any) -> Learner:
        made = (Healer if as_member else _Merged)(*arguments).prepare(params, teacher)
        if isinstance(made, _Merged):
            made.pruned, made.out = bench.model_dir, out
        before.append(float(token_losses(made, parts["test"]).mean()))
        return made

    def finish(made: Learner) -> dict[str, Any]:
        progress.note("testing")
        losses = {
            "teacher": _teacher_loss(teacher, parts["test"]),
            "pruned": before[-1],
            "healed": float(token_losses(made, parts["test"]).mean()),
        }
        tokens = sum(item.encoded.num_targets for item in parts["test"])
        settings = {key: getattr(params, key) for key in ("share", "hidden", "norms", "every_token")}
        own = {"name": teacher.name, "digest": teacher.digest}
        return {"healed": {"teacher": own, **settings, "test": losses, "tokens": tokens}}

    key = {"teacher": teacher.digest, "share": params.share, "hidden": params.hidden, "norms": params.norms}
    return run(
        bench,
        out if as_member else out.parent / f".{out.name}.heal",  # a run writes a member, and this one a model beside it
        tuned,
        name=name or out.name,
        progress=progress,
        loaded=RunData({part: parts[part] for part in ("train", "validation")}, report),
        make_learner=learner,
        key={**key, "every_token": params.every_token, "member": as_member},
        finish=finish,
    )


def _load(
    bench: Workbench, params: HealParams, teacher: Teacher, progress: Progress
) -> tuple[dict[Split, list[Item]], Any]:
    """(items of the three splits, the report). Those that teach have the teacher's states, if there is a cache."""
    tuned = params.base
    counts: dict[Split, int] = {
        "train": tuned.examples,
        "validation": tuned.validation_examples,
        "test": params.test_examples,
    }
    if params.norms:  # all layers run
        encoded, report = bench.encode(tuned, counts)
        parts = {part: [Item(item) for item in items] for part, items in encoded.items()}
    else:
        loaded = bench.load(tuned, counts, progress.advance)
        parts, report = loaded.parts, loaded.report
    if bench.cache is not None:
        train = parts["train"]
        shown = lambda count: progress.advance("teacher, train", count, len(train))  # noqa: E731
        states = teacher.states([item.encoded for item in train], shown)
        parts["train"] = [replace(item, teacher=rows) for item, rows in zip(train, states, strict=True)]
    return parts, report


def _teacher_loss(teacher: Teacher, items: list[Item]) -> float:
    """Mean negative log-likelihood of the answers' tokens."""
    total, count = 0.0, 0
    for item in items:
        rows = teacher.states_now([item.encoded])[0][[i - 1 for i in item.encoded.targets]]
        targets = torch.tensor([item.encoded.token_ids[i] for i in item.encoded.targets])
        total -= float(teacher.log_probs(rows).gather(1, targets[:, None]).sum())
        count += len(targets)
    return total / count
