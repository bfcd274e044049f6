"""`search`: Bayesian optimisation of hyper-parameters over one cached trunk. Each trial can become a member.

    search.json         the settings; a call with other settings is refused
    trials.jsonl        finished trials, one per line, appended and flushed
    trials/NNN/         each trial's tail or adapter
    losses/NNN.npy      its loss at each validation token
    report.html         history, importance, parallel coordinates
    privacy.json        what the trials of a private search spend together

The same call resumes a search that was killed. Finished trials are read back, the running one continues from its last
segment (`loop`), and the suggestions are those of an uninterrupted search.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...runtime.checkpoints.members.registry import format_at
from ...runtime.errors import BundleError, ConfigError, MotetError, NumericalError
from ...runtime.model.files import append_line, read_lines
from ..data.example import Split
from ..params import TuneParams
from ..training.loop import Watch
from ..training.methods import Learner
from ..training.progress import Progress
from ..training.provenance import environment
from ..training.train import RunData, Workbench, note_duplicates, privacy_record, run, token_losses, work_dir
from .mixfit import F64
from .objective import chosen_members, mixed_loss, trial_values
from .params import SearchParams
from .report import write_report
from .space import Trial, as_params, distributions, fixed, is_hopeless, suggest

SETTINGS, TRIALS, REPORT, PRIVACY = "search.json", "trials.jsonl", "report.html", "privacy.json"


class _Pruned(Exception):
    pass


@dataclass(frozen=True, slots=True)
class SearchResult:
    trials: tuple[Trial, ...]
    best: Trial
    directory: Path
    ensemble: float  # validation loss of the ensemble of complete trials that greedy selection takes, in probs space

    def members(self) -> list[Path]:
        """The directories of the complete trials, best first."""
        done = sorted((t for t in self.trials if t.state == "complete"), key=lambda t: t.value)
        return [trial_dir(self.directory, trial.number) for trial in done]


def _losses_file(directory: Path, number: int) -> Path:
    return directory / "losses" / f"{number:03d}.npy"


def _read_losses(directory: Path, trials: Sequence[Trial]) -> dict[int, F64]:
    """[T] losses at the validation tokens of each complete trial. Raises `BundleError` if one is missing or damaged."""
    found = {}
    for number in (trial.number for trial in trials if trial.state == "complete"):
        path = _losses_file(directory, number)
        try:
            found[number] = np.load(path).astype(np.float64)
        except (OSError, ValueError) as error:
            raise BundleError(f"'{path}' is damaged ({error!r}); remove the search and run it again") from error
    return found


def trial_dir(directory: Path, number: int) -> Path:
    """Directory of a trial's tail or adapter, in the search at `directory`."""
    return directory / "trials" / f"{number:03d}"


def search(
    bench: Workbench,
    out: Path,
    params: SearchParams,
    *,
    on_trial: Callable[[Trial, Trial], None] = lambda _trial, _best: None,
    progress: Progress | None = None,
) -> SearchResult:
    """Run or resume a search. `on_trial(trial, best so far)` is called after each trial.

    Raises `ConfigError` (another search is at `out`), `BundleError` (its files are damaged), and what `tune` raises.
    """
    params.base.fitted(bench.config.max_position_embeddings)  # fail early: before anything is written
    _open(bench, out, params)
    space = distributions(params.space, params.base.method, bench.config.num_layers)
    if params.base.epsilon is not None:  # DP-SGD cannot be used with these
        space = {name: d for name, d in space.items() if name not in ("l1", "label_smoothing", "augmentation")}
    trials = read_trials(out)
    progress = progress or Progress(False)
    note_duplicates(bench, progress)
    data = _Data(bench, params, progress)
    while len(trials) < params.trials:
        trial = _one(bench, out, params, trials, space, data, progress)
        append_line(out / TRIALS, json.dumps(asdict(trial)))
        trials.append(trial)
        shutil.rmtree(work_dir(trial_dir(out, trial.number)), ignore_errors=True)  # of a trial that was stopped
        if trial.privacy is not None:
            (out / PRIVACY).write_text(json.dumps(private_budget(trials), indent=1) + "\n")
        on_trial(trial, min(trials, key=lambda t: t.value))
        write_report(out / REPORT, out.name, trials, space)
    best = min(trials, key=lambda t: t.value)
    losses = _read_losses(out, trials)
    rows = np.stack(list(losses.values())) if losses else None
    ensemble = best.value if rows is None else mixed_loss(rows[chosen_members(rows, params.members)])
    return SearchResult(tuple(trials), best, out, ensemble)


def _open(bench: Workbench, out: Path, params: SearchParams) -> None:
    values = asdict(params)
    del values["trials"]  # a finished search may be made longer
    settings = {
        "search": {**values, "base": params.base.to_dict(), "space": params.space.to_dict()},
        "model": bench.model_dir.name,
        "model_digest": bench.digest,
        "data": bench.data,
        "data_digest": bench.dataset.digest,
        "encoded": bench.encode(params.base, _counts(params.base))[1].encoded,  # also changes with the tokenizer
        "near_duplicates": bench.dataset.near_duplicates,
        "selection": {"chosen": "hyper-parameters and checkpoints", "by": "validation loss"},
    }
    text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
    path = out / SETTINGS
    if path.is_file() and path.read_text() != text:
        raise ConfigError(
            f"'{out}' holds a search with other settings, model, tokenizer or data ({SETTINGS}); choose another directory"
        )
    if out.exists() and not path.is_file() and any(out.iterdir()):
        raise ConfigError(f"'{out}' exists and is not a search; choose another directory")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    (out / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")


def _counts(params: TuneParams) -> dict[Split, int]:
    return {"train": params.examples, "validation": params.validation_examples}


def read_trials(out: Path) -> list[Trial]:
    """The finished trials of a search. Raises `BundleError` for a damaged file."""
    path = out / TRIALS
    try:
        return [Trial.from_dict(json.loads(line)) for line in read_lines(path)]
    except (ValueError, TypeError, KeyError) as error:
        raise BundleError(f"'{path}' is damaged ({error!r}); remove the search and run it again") from error


class _Data:
    """The items for each (layers, augmentation), loaded when a trial first needs them.

    The split with the most trained layers is loaded first: the trunk caches of the other splits are computed from it.
    """

    def __init__(self, bench: Workbench, params: SearchParams, progress: Progress) -> None:
        self._bench, self._params, self._progress = bench, params, progress
        self._loaded: dict[tuple[int, str], RunData] = {}

    def get(self, params: TuneParams) -> RunData:
        deepest = max(self._params.space.layers_of(params.method, self._bench.config.num_layers))
        self._load(as_params(params, {"layers": deepest}, params.seed))
        return self._load(params)

    def _load(self, params: TuneParams) -> RunData:
        key = params.num_layers(self._bench.config.num_layers), params.augmentation
        if key not in self._loaded:
            self._loaded[key] = self._bench.load(params, _counts(params), self._progress.advance)
        return self._loaded[key]


def _one(
    bench: Workbench,
    out: Path,
    params: SearchParams,
    trials: list[Trial],
    space: dict[str, Any],
    data: _Data,
    progress: Progress,
) -> Trial:
    number = len(trials)
    objective = trial_values(
        trials,
        _read_losses(out, trials) if params.objective == "ensemble" else {},
        objective=params.objective,
        members=params.members,
        cost=params.cost,
    )
    values = suggest(trials, space, sampler=params.sampler, seed=params.seed, startup=params.startup, values=objective)
    single = fixed(params.space, params.base.method, bench.config.num_layers)
    if params.base.epsilon is not None:
        single.pop("augmentation", None)
    settings = as_params(params.base, {**single, **values}, params.seed * 1000 + number)
    curve: list[tuple[int, float]] = []

    def validated(_step: int, loss: float) -> None:
        curve.append((len(curve), loss))
        last = len(curve) == params.base.evaluations
        if params.prunes and not last and is_hopeless(trials, len(curve) - 1, loss):
            raise _Pruned

    loaded = data.get(settings)
    started = time.monotonic()
    state: Literal["complete", "pruned", "diverged"] = "complete"
    path, name = trial_dir(out, number), f"{out.name}-{number:03d}"
    privacy = privacy_record(
        settings, len(loaded.parts["train"])
    )  # a trial that is stopped early counts as a whole one

    def keep_losses(learner: Learner) -> dict[str, Any]:
        file = _losses_file(out, number)
        file.parent.mkdir(exist_ok=True)
        np.save(file, token_losses(learner, loaded.parts["validation"]))
        return {}

    try:
        manifest = _finished(path, settings.fitted(bench.config.max_position_embeddings))
        if manifest is None:
            watch = Watch(validated=validated)
            manifest = run(
                bench, path, settings, name=name, progress=progress, watch=watch, loaded=loaded, finish=keep_losses
            )
        metrics = manifest["metrics"]
        value = float(metrics["validation_loss_after"])
        curve = [(i, float(loss)) for i, (_, loss) in enumerate(metrics["validation_curve"])]
    except _Pruned:
        state, value = "pruned", curve[-1][1]
    except NumericalError:
        worst = max((trial.value for trial in trials), default=10.0)
        state, value = "diverged", max([worst, *(loss for _, loss in curve)])
    return Trial(number, values, value, tuple(curve), state, time.monotonic() - started, privacy)


def _finished(path: Path, settings: TuneParams) -> dict[str, Any] | None:
    """The manifest of a trial that ended just before the search was killed. To run it again would spend ε again."""
    if not path.is_dir():
        return None
    manifest = dict(format_at(path).read_manifest(path))
    return manifest if manifest["hyper_parameters"] == settings.to_dict() else None


def private_budget(trials: Sequence[Trial]) -> dict[str, Any]:
    """What a private search spends (see `privacy.composed`). All trials trained on the data, so all of them compose.

    Raises `MotetError` if the search is not private.
    """
    from ..training.privacy import composed

    records = [trial.privacy for trial in trials if trial.privacy is not None]
    if not records:
        raise MotetError("this search is not private; its trials have no privacy budget")
    return composed(records)
