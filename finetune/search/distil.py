"""`distil`: the ensemble of a fusion into one student, a tail or an adapter, which costs what one member costs.

The student learns the ensemble's whole distribution at each answer token (Hinton et al. 2015), through the trunk cache:

    loss = (1 - share) · cross-entropy + share · KL(ensemble ‖ student)

The ensemble's distributions are not stored. What is kept are its members' final hidden states: the head is linear and shared, so
they give the logits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.api.request import Space
from ...runtime.errors import BundleError
from ..data.batches import Item, TrainBatch
from ..data.example import Split
from ..training.methods import Learner
from ..training.progress import Progress
from ..training.train import RunData, Workbench, run
from .answers import Answers, answers_of, head_of
from .fusion import FUSION, Fusion, read_fusion
from .mixfit import F64, Pool, paired_bootstrap
from .params import DistilParams


class Student(Learner):
    """A learner whose loss has the divergence from the ensemble. In evaluation it is the data's alone."""

    share = 0.0
    mix: Tensor  # [K]
    space = Space.LOGITS
    teacher_head: Tensor  # [vocab, hidden]

    def loss(self, batch: TrainBatch, smoothing: float = 0.0) -> Tensor:
        if not self.training:
            return super().loss(batch, smoothing)
        targets = batch.targets.to(self.device)
        wanted = targets >= 0
        logits = self.decoder.head(self._states(batch)[wanted]).float()
        data = F.cross_entropy(logits, targets[wanted], label_smoothing=smoothing)
        taught = [item.teacher for item in batch.items if item.teacher is not None]
        assert len(taught) == len(batch.items), "an example has no teacher"
        with torch.no_grad():
            states, mix, head = (x.to(self.device) for x in (torch.cat(taught, 1), self.mix, self.teacher_head))
            teacher = log_distribution(states, mix, self.space, head)
        divergence = F.kl_div(F.log_softmax(logits, -1), teacher, reduction="batchmean", log_target=True)
        return (1 - self.share) * data + self.share * divergence


def log_distribution(states: Tensor, mix: Tensor, space: Space, head: Tensor) -> Tensor:
    """[T, vocab] log-probabilities of the mix [K] of members with final states [K, T, hidden]."""
    if space is Space.LOGITS:
        return F.log_softmax(torch.einsum("k,kth->th", mix, states.float()) @ head.T, -1)
    members = [torch.log(m) + F.log_softmax(s.float() @ head.T, -1) for m, s in zip(mix, states)]
    return torch.logsumexp(torch.stack(members), 0)


def distil(
    bench: Workbench,
    fusion: Path,
    out: Path,
    params: DistilParams | None = None,
    *,
    name: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a student of the ensemble that `fuse` wrote to the directory `fusion`, write it to `out`, and return its
    manifest. The same call resumes a run that was killed.

    `manifest["distilled"]` has the losses of ensemble, best single member, student and base on the test set, which decided
    nothing, and `share_kept`: the share of the ensemble's gain over the best single member. Raises what `tune` and
    `read_fusion` raise, `BundleError` if the fusion is of another base or data set.
    """
    params, progress = params or DistilParams(), progress or Progress(False)
    found, text = read_fusion(fusion), (fusion / FUSION).read_text()
    values = json.loads(text)
    if found.base_digest != bench.digest or values["data"]["digest"] != bench.dataset.digest:
        raise BundleError(f"the fusion at '{fusion}' is of another base or data set; fuse again, or give those")
    tuned = params.base.fitted(bench.config.max_position_embeddings)
    counts: dict[Split, int] = {"train": tuned.examples, "test": params.test_examples}
    paths = {**found.members, **_others(values)}
    answers = answers_of(bench, paths, tuned.max_length, counts, progress)
    loaded = bench.load(tuned, {**counts, "validation": tuned.validation_examples}, progress.advance)
    members = [list(paths).index(member) for member in found.mix]
    divisors = torch.tensor([found.temperatures.get(member, 1.0) for member in found.mix])
    taught = (
        answers["train"].states[members] / divisors[:, None, None]
    )  # the head is linear, so the logits are divided too
    loaded.parts["train"] = _taught(loaded.parts["train"], taught)
    head = head_of(bench)

    def student(*arguments: Any) -> Student:
        learner = Student(*arguments)
        learner.share, learner.space = params.share, found.space
        learner.mix, learner.teacher_head = torch.tensor(list(found.mix.values())), head
        return learner

    def finish(learner: Learner) -> dict[str, Any]:
        progress.note("testing")
        states = _states_of(learner, loaded)
        return {"distilled": _report(found, list(paths), answers["test"], states, head, values, params)}

    key = {"fusion": hashlib.sha256(text.encode()).hexdigest(), "share": params.share}
    return run(
        bench,
        out,
        tuned,
        name=name or out.name,
        progress=progress,
        loaded=RunData({part: loaded.parts[part] for part in ("train", "validation")}, loaded.report),
        make_learner=student,
        key=key,
        finish=finish,
    )


def _others(fusion: Mapping[str, Any]) -> dict[str, Path | None]:
    """The base and the best single member, which the student is compared with, if they are not in the mix."""
    best = fusion["report"]["best_single"]
    chosen = fusion["members"]
    others: dict[str, Path | None] = {} if "base" in chosen else {"base": None}
    return others if best in chosen else {**others, best: Path(fusion["candidates"][best])}


def _taught(items: list[Item], states: Tensor) -> list[Item]:
    """The items with the members' states [K, T, hidden] at their answers, in bfloat16."""
    pieces = torch.split(states.to(torch.bfloat16), [item.encoded.num_targets for item in items], dim=1)
    return [replace(item, teacher=piece) for item, piece in zip(items, pieces, strict=True)]


@torch.no_grad()
def _states_of(learner: Learner, loaded: RunData) -> Tensor:
    """[T, hidden]: the student's states at the answers of the test set."""
    learner.eval()
    return torch.cat([learner.states_of(item) for item in loaded.parts["test"]])


def _report(
    fusion: Fusion,
    names: list[str],
    test: Answers,
    student: Tensor,
    head: Tensor,
    values: Mapping[str, Any],
    params: DistilParams,
) -> dict[str, Any]:
    pool = Pool(fusion.space, torch.cat([test.states, student[None].to(test.states)]), head, test.targets)
    one = np.eye(len(names) + 1)
    mix = sum((m * one[names.index(member)] for member, m in fusion.mix.items()), np.zeros(len(names) + 1))
    temperatures = np.array([fusion.temperatures.get(name, 1.0) for name in [*names, "student"]])
    best = values["report"]["best_single"]
    losses: dict[str, F64] = {
        "base": pool.nll(one[names.index("base")]),
        "best_single": pool.nll(one[names.index(best)]),
        "ensemble": pool.nll(np.asarray(mix), temperatures),
        "student": pool.nll(one[-1]),
    }
    gain = losses["best_single"] - losses["ensemble"]
    return {
        "fusion": {
            "mix": dict(fusion.mix),
            "temperatures": dict(fusion.temperatures),
            "space": str(fusion.space),
            "best_single": best,
        },
        "share": params.share,
        "test": {name: float(loss.mean()) for name, loss in losses.items()},
        # None if the ensemble gained nothing that could be kept
        "share_kept": float((losses["best_single"] - losses["student"]).mean() / gain.mean())
        if gain.mean() > 0
        else None,
        "student_against_best_single": asdict(
            paired_bootstrap(losses["best_single"], losses["student"], test.documents)
        ),
        "ensemble_against_best_single": asdict(
            paired_bootstrap(losses["best_single"], losses["ensemble"], test.documents)
        ),
        "tokens": len(test.targets),
    }
