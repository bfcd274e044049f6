"""`motet bench finetune`: what the trunk cache saves, and what search and fusion gain. Finished parts are kept, so a killed run
can be resumed.

cache           one trial (n = 2) with and without the cache: times, and loss curves side by side
search          searches with several seeds on one cached trunk, each fused: times; base, best single and fused on the test set
served          the ensemble of the first seed, exported and served: tokens, the cost of a step, ROUGE-L
random          the GP sampler against random search with the same budget
regularisation  the effect of each regulariser on the gap between train and validation loss
private         DP-SGD at ε = 8 against the same run without privacy

Without the cache, a trial runs all layers forward for every batch, and the last n backward. With it, a trial runs only the
last n layers, and the last of them only at the answers' positions (see `finetune.training.answers`).
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ..finetune.params import TuneParams
from ..finetune.search.fuse import change, fuse
from ..finetune.search.params import FuseParams, SearchParams, SearchSpace
from ..finetune.search.search import SearchResult, search, trial_dir
from ..finetune.search.space import Trial
from ..finetune.training.train import RunData, Workbench, run
from ..finetune.training.trunk_cache import TrunkCache
from ..pages import Table
from ..runtime.api.request import Space
from ..runtime.checkpoints.store import resolve_model
from .fused import served
from .lib import report
from .lib.parts import part

PARTS = ("cache", "search", "served", "random", "regularisation", "private")


@dataclass(frozen=True, slots=True)
class Budget:
    """Sizes. Larger ones take longer and give more reliable figures. Lengths are in tokens."""

    examples: int = 200
    validation: int = 64
    fusion_validation: int = 160  # more than `validation`: fitting a mix needs more than comparing trials
    test: int = 400
    max_length: int = 128
    trials: int = 16
    seeds: int = 3
    layers: tuple[int, ...] = (1, 2)  # choices for a trial; every further tail adds to the cost of an ensemble's step
    bag: float = 0.8
    spaces: tuple[str, ...] = ("probs",)  # where members are mixed
    random_trials: int = 12
    random_seeds: int = 5
    random_examples: int = 64

    def params(self, **changes: Any) -> TuneParams:
        base = TuneParams(
            examples=self.examples,
            validation_examples=self.validation,
            max_length=self.max_length,
            bag=self.bag,
            evaluations=2,
        )
        return dataclasses.replace(base, **changes)


class Bench:
    """Runs the parts on one workbench. Each part writes its figures to `work/<part>.json` when it is done."""

    def __init__(self, model: str, data: str, work: Path, budget: Budget) -> None:
        self.work = work
        self.budget = budget
        self.console = Console()
        work.mkdir(parents=True, exist_ok=True)
        self.cache = TrunkCache(work / "trunk-cache")
        self.bench = Workbench(resolve_model(model), data, self.cache)

    def part(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures of a part: those of an earlier run with the same budget, model and data, or new ones."""
        made_from = {
            "model": self.bench.digest,
            "data": self.bench.dataset.digest,
            "budget": dataclasses.asdict(self.budget),
        }
        started = time.monotonic()
        found = part(self.work / f"{name}.json", made_from, compute)
        self.console.print(f"{name}: {time.monotonic() - started:.0f} s")
        return found

    def load(self, bench: Workbench, params: TuneParams) -> RunData:
        return bench.load(params, {"train": params.examples, "validation": params.validation_examples})

    def timed(self, bench: Workbench, params: TuneParams, name: str, data: RunData) -> tuple[dict[str, Any], float]:
        """(metrics, seconds) of one run. Its weights are deleted."""
        out = self.work / "runs" / name
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name(f".{name}.run"), ignore_errors=True)
        started = time.monotonic()
        metrics = run(bench, out, params, name=name, loaded=data)["metrics"]
        seconds = time.monotonic() - started
        shutil.rmtree(out)
        return metrics, seconds

    # ---- the parts ---------------------------------------------------------------------------------------------------

    def trunk_cache(self) -> dict[str, Any]:
        params = self.budget.params(layers=2, bag=1.0)
        shutil.rmtree(self.work / "fill-cache", ignore_errors=True)
        filling = Workbench(self.bench.model_dir, self.bench.data, TrunkCache(self.work / "fill-cache"))
        started = time.monotonic()
        data = self.load(filling, params)
        fill = time.monotonic() - started
        bare = Workbench(self.bench.model_dir, self.bench.data, None)
        cached, cached_s = self.timed(filling, params, "cached", data)
        plain, plain_s = self.timed(bare, params, "uncached", self.load(bare, params))
        repeated, repeated_s = self.timed(filling, params, "cached", data)
        assert repeated["loss_curve"] == cached["loss_curve"]
        shutil.rmtree(self.work / "fill-cache")
        return {
            "fill_s": fill,
            "cached_s": [cached_s, repeated_s],
            "uncached_s": plain_s,
            "speedup": plain_s / statistics.mean([cached_s, repeated_s]),
            "largest_difference": max(
                abs(a - b) for a, b in zip(cached["loss_curve"], plain["loss_curve"], strict=True)
            ),
            "loss_cached": cached["loss_curve"],
            "loss_uncached": plain["loss_curve"],
        }

    def searches(self) -> dict[str, Any]:
        seeds = range(self.budget.seeds)
        return {"seeds": [self.part(f"search-{seed}", partial(self.one_search, seed)) for seed in seeds]}

    def one_search(self, seed: int) -> dict[str, Any]:
        params = SearchParams(
            base=self.budget.params(),
            space=SearchSpace(layers=self.budget.layers),
            trials=self.budget.trials,
            seed=seed,
        )
        result = search(self.bench, self.work / f"seed-{seed}", params, on_trial=self._on_trial)
        members = {f"t{path.name}": path for path in result.members()}
        fused = {}
        for space in map(Space, self.budget.spaces):
            settings = FuseParams(
                space=space,
                validation_examples=self.budget.fusion_validation,
                test_examples=self.budget.test,
                max_length=self.budget.max_length,
            )
            found = fuse(self.bench, members, self.work / f"fused-{seed}-{space}", settings)
            inside = {name: path and str(Path(path).relative_to(self.work)) for name, path in found["members"].items()}
            fused[str(space)] = {**found, "members": inside}
        return {
            "seed": seed,
            "training_s": sum(trial.seconds for trial in result.trials),
            "trials_s": [trial.seconds for trial in result.trials],
            "states": [trial.state for trial in result.trials],
            "values": [trial.value for trial in result.trials],
            "fused": fused,
        }

    def served(self) -> dict[str, Any]:
        found = self.part("search-0", partial(self.one_search, 0))
        fused = found["fused"][self.budget.spaces[0]]
        fused = {**fused, "members": {n: path and str(self.work / path) for n, path in fused["members"].items()}}
        best = fused["report"]["best_single"]
        path = trial_dir(self.work / "seed-0", int(best.removeprefix("t")))
        length = self.budget.max_length
        return served(self.bench, fused, (best, path), self.work / "served", examples=64, max_length=length)

    def _on_trial(self, trial: Trial, best: Trial) -> None:
        self.console.print(
            f"trial {trial.number}: {trial.value:.4f} ({trial.state}, {trial.seconds:.0f} s); best {best.value:.4f}"
        )

    def against_random(self) -> dict[str, Any]:
        base = self.budget.params(examples=self.budget.random_examples, epochs=1, evaluations=1, bag=0.4)
        space = SearchSpace(layers=(1, 2))
        curves: dict[Literal["gp", "random"], list[list[float]]] = {"gp": [], "random": []}
        for seed in range(self.budget.random_seeds):
            for sampler, found in curves.items():
                params = SearchParams(
                    base=base, space=space, trials=self.budget.random_trials, seed=seed, sampler=sampler, prune=False
                )
                out = self.work / f"{sampler}-{seed}"
                result = search(self.bench, out, params)
                found.append(_best_so_far(result))
                for path in result.members():
                    for file in path.glob("*.safetensors"):
                        file.unlink()  # only the figures are needed
        wins = sum(gp[-1] < other[-1] for gp, other in zip(curves["gp"], curves["random"]))
        return {"best_so_far": curves, "wins": wins}

    def regularisation(self) -> dict[str, Any]:
        base = self.budget.params(layers=2, bag=1.0, epochs=4, weight_decay=0.0, learning_rate=1e-3)
        data = self.load(self.bench, base)
        changes: dict[str, dict[str, Any]] = {
            "none": {},
            "L2 (weight decay 0.3)": {"weight_decay": 0.3},
            "L1 (1e-6)": {"l1": 1e-6},
            "label smoothing 0.1": {"label_smoothing": 0.1},
            "dropout 0.2": {"dropout": 0.2},
            "early stopping (patience 1 of 8)": {"evaluations": 8, "patience": 1},
        }
        rows = {}
        for number, (name, change_) in enumerate(changes.items()):
            metrics, _ = self.timed(self.bench, dataclasses.replace(base, **change_), f"regularised-{number}", data)
            rows[name] = {
                "train": metrics["train_loss_after"],
                "validation": metrics["validation_loss_after"],
                "gap": metrics["gap"],
            }
        return {"rows": rows}

    def private(self) -> dict[str, Any]:
        base = self.budget.params(layers=2, bag=1.0)
        data = self.load(self.bench, base)
        private = dataclasses.replace(base, epsilon=8.0, clip=0.5, learning_rate=1e-3, batch_examples=32, epochs=4)
        out = self.work / "runs" / "private"
        shutil.rmtree(out, ignore_errors=True)
        manifest = run(self.bench, out, private, name="private", loaded=data)
        plain, _ = self.timed(self.bench, base, "not-private", data)
        return {
            "privacy": manifest["privacy"],
            "before": plain["validation_loss_before"],
            "private": manifest["metrics"]["validation_loss_after"],
            "not_private": plain["validation_loss_after"],
        }


def _best_so_far(result: SearchResult) -> list[float]:
    values = [trial.value for trial in result.trials]
    return [min(values[: i + 1]) for i in range(len(values))]


def run_bench(model: str, data: str, work: Path, out: Path, parts: list[str], budget: Budget) -> None:
    """Run the parts that are not done yet, and report all `parts`."""
    bench = Bench(model, data, work, budget)
    compute: Mapping[str, Callable[[], dict[str, Any]]] = {
        "cache": bench.trunk_cache,
        "search": bench.searches,
        "served": bench.served,
        "random": bench.against_random,
        "regularisation": bench.regularisation,
        "private": bench.private,
    }
    results = {name: bench.part(name, compute[name]) for name in parts}
    report.write("finetune", results, [table for name in results for table in _tables(name, results[name])], out)


def _tables(name: str, result: Mapping[str, Any]) -> list[Any]:
    if name == "cache":
        rows = [
            ["filling the cache, once", f"{result['fill_s']:.1f}", ""],
            ["trial from the cache", f"{statistics.mean(result['cached_s']):.1f}", f"{result['speedup']:.2f} ×"],
            ["the same trial without it", f"{result['uncached_s']:.1f}", "1 ×"],
        ]
        title = f"One trial, n = 2; loss curves differ by at most {result['largest_difference']:.1e}"
        return [Table(title, ["", "seconds", "speed"], rows)]
    if name == "search":
        return [_search_table(seed) for seed in result["seeds"]]
    if name == "served":
        title = (
            f"Fused in {result['space']} space, served in 8 bits: {result['tokens_same']} of {result['tokens_compared']} "
            "tokens equal the mix of separate models; cost of a step × one member's: "
            + ", ".join(f"{ratio:.2f} at {size}" for size, ratio in result["cost"].items())
        )
        rows = [[name, f"{value:.4f}"] for name, value in result["rouge_l"].items()]
        return [Table(title, ["", "ROUGE-L"], rows)]
    if name == "random":
        curves = result["best_so_far"]
        rows = [
            [str(i), f"{a[-1]:.4f}", f"{b[-1]:.4f}"] for i, (a, b) in enumerate(zip(curves["gp"], curves["random"]))
        ]
        title = (
            f"Best validation loss of {len(curves['gp'][0])} trials: the GP wins {result['wins']} of {len(rows)} seeds"
        )
        return [Table(title, ["seed", "GP", "random"], rows)]
    if name == "regularisation":
        rows = [[n, *(f"{r[k]:.4f}" for k in ("train", "validation", "gap"))] for n, r in result["rows"].items()]
        return [Table("Regularisation", ["", "train", "validation", "gap"], rows)]
    spent = result["privacy"]
    rows = [
        ["base", f"{result['before']:.4f}"],
        ["private", f"{result['private']:.4f}"],
        ["not private", f"{result['not_private']:.4f}"],
    ]
    title = f"DP-SGD, ε = {spent['epsilon']:.2f}, δ = {spent['delta']:.1e}, noise {spent['noise_multiplier']:.2f}"
    return [Table(title, ["", "validation loss"], rows)]


def _search_table(result: Mapping[str, Any]) -> Table:
    rows: list[list[str]] = []
    for space, fused in result["fused"].items():
        figures = fused["report"]
        base, single = figures["members"]["base"], figures["members"][figures["best_single"]]
        if not rows:
            rows += [["base", f"{base['validation']:.4f}", f"{base['test']:.4f}", ""]]
            rows += [["best single", f"{single['validation']:.4f}", f"{single['test']:.4f}", ""]]
        uniform, fitted = figures["uniform"], figures["fitted"]
        rows.append([f"{space}: uniform", f"{uniform['validation']:.4f}", f"{uniform['test']:.4f}", ""])
        gain = change(figures["against_best_single"]["examples"])
        rows.append(
            [
                f"{space}: fitted, {len(fused['mix'])}",
                f"{fitted['validation_nested']:.4f} (nested)",
                f"{fitted['test']:.4f}",
                gain,
            ]
        )
    title = f"Search seed {result['seed']}: {len(result['values'])} trials in {result['training_s']:.0f} s"
    return Table(title, ["", "validation NLL", "test NLL", "against best single"], rows)
