"""`motet bench ensemble`: what an ensemble gains over what a user would do instead, at equal training time.

Every way of `WAYS` searches for the same number of seconds on the same examples. What a user would do instead is `single`: a
low-rank update of all layers, with a small search of its own, early stopping and the best checkpoint. Each way's trials are
then fused on the validation set, and measured on test examples that decided nothing:

test NLL of the best single trial, the uniform and the fitted mix, against `single`'s, paired bootstrap over documents
the curve of the test NLL against the number of members, and the asymptote of a power law through it
the student of the best ensemble, which costs what one member costs

Finished parts are kept, so a killed run can be resumed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from scipy.optimize import curve_fit

from ..finetune.params import TuneParams
from ..finetune.search.answers import answers_of, head_of
from ..finetune.search.distil import distil
from ..finetune.search.fuse import change, fuse
from ..finetune.search.mixfit import F64, Pool, paired_bootstrap, select_and_fit
from ..finetune.search.params import DistilParams, FuseParams, SearchParams, SearchSpace
from ..finetune.search.search import SearchResult, search
from ..finetune.training.progress import Progress
from ..finetune.training.train import Workbench
from ..finetune.training.trunk_cache import TrunkCache
from ..pages import Table
from ..runtime.api.request import Space
from ..runtime.checkpoints.store import resolve_model
from ..runtime.model.layout import decoder_layout
from .lib import report
from .lib.parts import part

LARGEST = 8  # members of the curve


@dataclass(frozen=True, slots=True)
class Way:
    """What is searched: `layers` of the last layers, 0 is all."""

    method: str
    layers: tuple[int, ...]
    objective: Literal["trial", "ensemble"]


WAYS = {
    "single": Way("lora", (0,), "trial"),
    "adapters": Way("lora", (10, 15), "ensemble"),
    "tails": Way("tail", (1, 2), "ensemble"),
}


@dataclass(frozen=True, slots=True)
class Budget:
    """Sizes. Lengths are in tokens."""

    seconds: float = 900.0  # of training, of each way
    examples: int = 300
    validation: int = 64
    fusion_validation: int = 128
    test: int = 400
    max_length: int = 160
    epochs: int = 2
    members: int = 4
    student_epochs: int = 2


class Bench:
    """One task, one seed."""

    def __init__(self, model: str, data: str, seed: int, work: Path, budget: Budget) -> None:
        self.work, self.budget, self.seed = work / f"{Path(data).stem}-{seed}", budget, seed
        self.bench = Workbench(resolve_model(model), data, TrunkCache(work / "trunk-cache"))
        self.console = Console(stderr=True)

    def part(self, name: str, compute: Any) -> dict[str, Any]:
        made_from = {"model": self.bench.digest, "data": self.bench.dataset.digest, "budget": asdict(self.budget)}
        made_from["ways"] = {name: asdict(way) for name, way in WAYS.items()}
        started = time.monotonic()
        found = part(self.work / f"{name}.json", made_from, compute)
        self.console.print(f"{self.work.name}, {name}: {time.monotonic() - started:.0f} s")
        return found

    def run(self) -> dict[str, Any]:
        ways = {name: self.part(name, partial(self.one, name)) for name in WAYS}
        test = self.part("test", partial(self.test, ways))
        student = self.part("student", partial(self.student, test))
        return {"seed": self.seed, "ways": ways, "test": test, "student": student}

    def one(self, name: str) -> dict[str, Any]:
        """Search until the seconds are spent."""
        way, config = WAYS[name], self.bench.config
        base = TuneParams(
            method=way.method,
            examples=self.budget.examples,
            validation_examples=self.budget.validation,
            max_length=self.budget.max_length,
            epochs=self.budget.epochs,
            evaluations=4,
            bag=0.9,
            precision="bf16",
        )
        layers = tuple(min(n, config.num_layers) if n else config.num_layers for n in way.layers)
        space = SearchSpace(layers=layers, learning_rate=(1e-4, 2e-3))
        if way.method == "lora":
            base = dataclasses.replace(base, targets=decoder_layout(config).targets, alpha=32.0)
            space = dataclasses.replace(space, rank=(16,))
        params = SearchParams(base, space, seed=self.seed, objective=way.objective, trials=1)
        result, spent = self._search(name, params), 0.0
        while (spent := sum(trial.seconds for trial in result.trials)) < self.budget.seconds:
            params = dataclasses.replace(params, trials=params.trials + 1)
            result = self._search(name, params)
        return {
            "training_s": spent,
            "values": [trial.value for trial in result.trials],
            "layers": [trial.params.get("layers", layers[0]) for trial in result.trials],
            "members": [str(path.relative_to(self.work)) for path in result.members()[: 2 * LARGEST]],
        }

    def _search(self, name: str, params: SearchParams) -> SearchResult:
        def on_trial(trial: Any, best: Any) -> None:
            self.console.print(
                f"{name} trial {trial.number}: {trial.value:.4f}, {trial.seconds:.0f} s; {best.value:.4f}"
            )

        return search(self.bench, self.work / name, params, on_trial=on_trial)

    def test(self, ways: Mapping[str, Any]) -> dict[str, Any]:
        """The figures of every way on the test set, mixed in `probs` space."""
        head, counts = head_of(self.bench), {"validation": self.budget.fusion_validation, "test": self.budget.test}
        found: dict[str, Any] = {}
        reference: F64 | None = None
        for name, way in ways.items():
            paths = {f"{name}-{Path(path).name}": self.work / path for path in way["members"]}
            answers = answers_of(self.bench, paths, self.budget.max_length, counts, Progress(False))  # type: ignore[arg-type]
            validation, test = answers["validation"], answers["test"]
            pools = [Pool(Space.PROBS, a.states, head, a.targets) for a in (validation, test)]
            everything, one = np.ones(len(validation.targets), np.bool_), np.eye(len(paths))
            best = int(pools[0].single.mean(axis=1).argmin())
            single = pools[1].single[best]
            reference = single if reference is None else reference
            curve, mix = [], one[best]
            for size in range(1, min(LARGEST, len(paths)) + 1):
                fitted, _ = select_and_fit(pools[0], everything, validation.documents, max_members=size)
                uniform = (fitted != 0) / np.count_nonzero(fitted)
                curve.append([size, float(pools[1].nll(uniform).mean()), float(pools[1].nll(fitted).mean())])
                mix = fitted if size <= self.budget.members else mix
            chosen = mix != 0
            losses = {"best": single, "uniform": pools[1].nll(chosen / chosen.sum()), "fitted": pools[1].nll(mix)}
            found[name] = {
                "mix": {member: float(m) for member, m in zip(paths, mix) if m},
                "test": {key: float(loss.mean()) for key, loss in losses.items()},
                "validation": float(pools[0].nll(mix).mean()),
                "against_single": {
                    key: asdict(paired_bootstrap(reference, loss, test.documents)) for key, loss in losses.items()
                },
                "curve": curve,
                "asymptote": _asymptote(curve),
                "examples": len(np.unique(test.examples)),
                "documents": len(np.unique(test.documents)),
            }
        return {"ways": found, "best": min(found, key=lambda name: float(found[name]["validation"]))}

    def student(self, test: Mapping[str, Any]) -> dict[str, Any]:
        """The best way's ensemble into one low-rank update of as many layers."""
        name = test["best"]
        members = {
            member: self.work / name / "trials" / member.removeprefix(f"{name}-")
            for member in test["ways"][name]["mix"]
        }
        if len(members) < 2:
            return {"way": name, "distilled": None}
        budget = self.budget
        fused = FuseParams(
            Space.PROBS, budget.members, budget.fusion_validation, budget.test, budget.max_length, with_base=False
        )
        fuse(self.bench, members, self.work / "fused", fused)
        way, config = WAYS[name], self.bench.config
        layers = config.num_layers if 0 in way.layers else max(way.layers)
        tuned = TuneParams(
            method=way.method,
            layers=layers,
            examples=budget.examples,
            validation_examples=budget.validation,
            max_length=budget.max_length,
            epochs=budget.student_epochs,
            learning_rate=1e-3,
            evaluations=4,
            precision="bf16",
        )
        if way.method == "lora":
            tuned = dataclasses.replace(tuned, targets=decoder_layout(config).targets, rank=16, alpha=32.0)
        params = DistilParams(base=tuned, test_examples=budget.test)
        manifest = distil(self.bench, self.work / "fused", self.work / "student", params)
        return {"way": name, "distilled": manifest["distilled"]}


def _asymptote(curve: Sequence[Sequence[float]]) -> float | None:
    """L of the power law L + a · K^-b through the fitted mixes' losses; None with fewer than four sizes, or no fit."""
    sizes, losses = np.array([row[0] for row in curve]), np.array([row[2] for row in curve])
    if len(sizes) < 4:
        return None
    start = (losses.min(), max(losses[0] - losses.min(), 1e-3), 1.0)
    try:
        (limit, _, _), _ = curve_fit(lambda k, c, a, b: c + a * k**-b, sizes, losses, p0=start, maxfev=10_000)
    except RuntimeError:
        return None
    return float(limit)


def run_bench(model: str, tasks: Sequence[str], seeds: int, work: Path, out: Path, budget: Budget) -> dict[str, Any]:
    """Measure what is not measured yet; write `out/ensemble.json` and `.html`."""
    found = {task: [Bench(model, task, seed, work, budget).run() for seed in range(seeds)] for task in tasks}
    result = {"model": model, "budget": asdict(budget), "machine": report.machine(), "tasks": found}
    report.write("ensemble", result, [_table(task, runs) for task, runs in found.items()], out)
    return result


def _table(task: str, runs: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for run in runs:
        for name, way in run["test"]["ways"].items():
            trained = run["ways"][name]
            for key, loss in way["test"].items():
                rows.append(
                    [
                        str(run["seed"]),
                        f"{name}: {key}",
                        f"{len(way['mix'])} of {len(trained['values'])}" if key != "best" else "1",
                        f"{trained['training_s'] / 60:.0f}",
                        f"{loss:.4f}",
                        change(way["against_single"][key]),
                    ]
                )
        student = run["student"]["distilled"]
        if student is not None:
            share, loss = student["share_kept"], f"{student['test']['student']:.4f}"
            kept = "no gain to keep" if share is None else f"{share:.0%} of the gain kept"
            rows.append([str(run["seed"]), f"student of {run['student']['way']}", "1", "", loss, kept])
    header = ["seed", "", "members", "minutes", "test NLL", "against the single's best, 95 % over documents"]
    return Table(task, header, rows)
