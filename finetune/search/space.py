"""The dimensions of a search, and the sampler that suggests the next point: a Gaussian process over the trials so far.

It is Optuna's GP sampler (expected improvement, Matérn kernel). Each trial makes a new sampler, seeded by the search's
seed and the trial's number. So a suggestion depends only on the finished trials, not on whether the search was
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

from ...runtime.model.members import MemberKind
from ..params import TuneParams
from .params import SearchSpace

optuna.logging.set_verbosity(optuna.logging.ERROR)


def distributions(space: SearchSpace, method: str, num_layers: int) -> dict[str, BaseDistribution]:
    """The dimensions of a search: name → distribution. Raises `ConfigError` if no choice of layers fits the model."""
    result: dict[str, BaseDistribution] = {
        name: FloatDistribution(*getattr(space, name), log=True) for name in ("learning_rate", "weight_decay", "l1")
    }
    result |= {name: FloatDistribution(*getattr(space, name)) for name in ("dropout", "label_smoothing")}
    choices = _choices(space, method, num_layers)
    return result | {name: CategoricalDistribution(c) for name, c in choices.items() if len(c) > 1}


def fixed(space: SearchSpace, method: str, num_layers: int) -> dict[str, Any]:
    """The hyper-parameters that have a single choice."""
    return {name: c[0] for name, c in _choices(space, method, num_layers).items() if len(c) == 1}


def _choices(space: SearchSpace, method: str, num_layers: int) -> dict[str, tuple[Any, ...]]:
    names = ["batch_tokens", "schedule", "augmentation"]
    if not MemberKind.of_method(method).own_layers:
        names.append("rank")
    return {"layers": space.layers_of(method, num_layers)} | {name: getattr(space, name) for name in names}


@dataclass(frozen=True, slots=True)
class Trial:
    """A finished trial.

    `value` is a validation loss in nats per token: the best one of a complete trial, the last one of a pruned trial. A
    diverged trial gets the worst loss seen so far, or 10 if it is the first.
    """

    number: int
    params: Mapping[str, Any]  # dimension → value
    value: float
    curve: tuple[tuple[int, float], ...]  # (index of the validation, loss)
    state: Literal["complete", "pruned", "diverged"]
    seconds: float
    privacy: Mapping[str, Any] | None = None  # of a private trial, `PrivacyBudget.to_dict`

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trial:
        return cls(**{**values, "curve": tuple((int(i), float(v)) for i, v in values["curve"])})


def suggest(
    trials: Sequence[Trial],
    space: Mapping[str, BaseDistribution],
    *,
    sampler: str,
    seed: int,
    startup: int,
    values: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The next point: dimension → value. `sampler` is gp or random; the first `startup` points are random with both.
    `values`: what is minimised, of each trial; default: its loss."""
    number = len(trials)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        chosen: Any
        if sampler == "gp":
            chosen = optuna.samplers.GPSampler(seed=seed * 10_007 + number, n_startup_trials=startup)
        else:
            chosen = optuna.samplers.RandomSampler(seed=seed * 10_007 + number)
        study = as_study(trials, space, chosen, values)
        return dict(study.ask(dict(space)).params)


def as_study(
    trials: Sequence[Trial],
    space: Mapping[str, BaseDistribution],
    sampler: Any = None,
    values: Sequence[float] | None = None,
) -> Any:
    """The trials as an Optuna study. Pruned and diverged trials are included with their bad values, so that the Gaussian
    process learns to avoid their region."""
    study = optuna.create_study(sampler=sampler)
    for trial, value in zip(trials, values or [trial.value for trial in trials], strict=True):
        study.add_trial(
            optuna.trial.create_trial(
                params=dict(trial.params),
                distributions=dict(space),
                value=value,
                intermediate_values=dict(trial.curve),
            )
        )
    return study


def is_hopeless(trials: Sequence[Trial], index: int, loss: float, *, after: int = 4) -> bool:
    """Whether `loss` at validation `index` is worse than the median of the earlier trials at the same validation.

    This is Google Vizier's median stopping rule. False while fewer than `after` trials have that validation.
    """
    others = sorted(value for trial in trials for i, value in trial.curve if i == index)
    return len(others) >= after and loss > others[len(others) // 2]


def as_params(base: TuneParams, values: Mapping[str, Any], seed: int) -> TuneParams:
    """`base` with a point's values and its own seed."""
    return dataclasses.replace(base, **values, seed=seed)
