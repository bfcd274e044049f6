"""The search space, and the sampler that looks for the best point in it: a Gaussian process over the trials so far.

Optuna's GP sampler (expected improvement over a Matérn kernel). A fresh one is seeded for every trial, by the search's seed
and the trial's number, so that its suggestion depends on the finished trials alone and not on whether the search was
interrupted.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from ...runtime.errors import ConfigError
from ...runtime.model.members import MemberKind
from ..params import TuneParams

optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """Ranges; `layers`, `rank`, `batch_tokens`, `schedule` and `augmentation` are choices. One choice is no dimension."""

    learning_rate: tuple[float, float] = (1e-4, 5e-3)
    weight_decay: tuple[float, float] = (1e-3, 0.3)
    l1: tuple[float, float] = (1e-9, 1e-6)
    dropout: tuple[float, float] = (0.0, 0.3)
    label_smoothing: tuple[float, float] = (0.0, 0.15)
    layers: tuple[int, ...] = (1, 2, 4)
    rank: tuple[int, ...] = (4, 8, 16)
    batch_tokens: tuple[int, ...] = (512, 1024, 2048)
    schedule: tuple[str, ...] = ("cosine", "linear", "constant")
    augmentation: tuple[str, ...] = ("none",)

    def distributions(self, method: str, num_layers: int) -> dict[str, BaseDistribution]:
        """Raises `ConfigError` if no choice of layers fits the model."""
        layers = tuple(n for n in self.layers if n <= num_layers)
        if not layers:
            raise ConfigError(f"layers {self.layers} are more than the model's {num_layers}")
        result: dict[str, BaseDistribution] = {
            name: FloatDistribution(*getattr(self, name), log=True) for name in ("learning_rate", "weight_decay", "l1")
        }
        result |= {name: FloatDistribution(*getattr(self, name)) for name in ("dropout", "label_smoothing")}
        choices: dict[str, Sequence[Any]] = {"layers": layers} if _makes_layers(method) else {"rank": self.rank}
        choices |= {name: getattr(self, name) for name in ("batch_tokens", "schedule", "augmentation")}
        return result | {name: CategoricalDistribution(tuple(c)) for name, c in choices.items() if len(c) > 1}

    def fixed(self, method: str) -> dict[str, Any]:
        """What has one choice only."""
        names = ["batch_tokens", "schedule", "augmentation", "layers" if _makes_layers(method) else "rank"]
        return {name: getattr(self, name)[0] for name in names if len(getattr(self, name)) == 1}

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) for name, value in dataclasses.asdict(self).items()}


def _makes_layers(method: str) -> bool:
    return MemberKind.of_method(method).own_layers


@dataclass(frozen=True, slots=True)
class Trial:
    """A finished trial. `value`: its best validation loss; of a pruned one the last, of a diverged one a bad one."""

    number: int
    params: Mapping[str, Any]  # the dimensions' values
    value: float
    curve: tuple[tuple[int, float], ...]  # (validation's number, loss)
    state: Literal["complete", "pruned", "diverged"]
    seconds: float

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trial:
        return cls(**{**values, "curve": tuple((int(i), float(v)) for i, v in values["curve"])})


def suggest(
    trials: Sequence[Trial], space: Mapping[str, BaseDistribution], *, sampler: str, seed: int, startup: int
) -> dict[str, Any]:
    """The next point. `sampler`: gp or random. The first `startup` points are random with both."""
    number = len(trials)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        chosen: Any
        if sampler == "gp":
            chosen = optuna.samplers.GPSampler(seed=seed * 10_007 + number, n_startup_trials=startup)
        else:
            chosen = optuna.samplers.RandomSampler(seed=seed * 10_007 + number)
        study = as_study(trials, space, chosen)
        return dict(study.ask(dict(space)).params)


def as_study(trials: Sequence[Trial], space: Mapping[str, BaseDistribution], sampler: Any = None) -> Any:
    """The trials as an Optuna study. Pruned and diverged ones count with their (bad) values: the model of the
    objective has to know where not to look."""
    study = optuna.create_study(sampler=sampler)
    for trial in trials:
        study.add_trial(
            optuna.trial.create_trial(
                params=dict(trial.params),
                distributions=dict(space),
                value=trial.value,
                intermediate_values=dict(trial.curve),
            )
        )
    return study


def is_hopeless(trials: Sequence[Trial], index: int, loss: float, *, after: int = 4) -> bool:
    """Whether `loss` at validation `index` is worse than the median of the trials that got there (Google Vizier's rule)."""
    others = sorted(value for trial in trials for i, value in trial.curve if i == index)
    return len(others) >= after and loss > others[len(others) // 2]


def as_params(base: TuneParams, values: Mapping[str, Any], seed: int) -> TuneParams:
    return dataclasses.replace(base, **values, seed=seed)
