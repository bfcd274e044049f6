"""What a search minimises: the loss of each trial alone, or of the ensemble that it would complete.

A good ensemble wants members that differ: a trial that is a little worse alone may add more than the best one's twin. So
with the objective `ensemble` a trial is judged by the mix of it and the others that are chosen, in `probs` space, where
a member's loss at each validation token is all that is needed. The judgement of a trial changes as others come; it is
made anew before each suggestion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .mixfit import F64, em, greedy
from .space import Trial

ROUNDS = 12


def trial_values(
    trials: Sequence[Trial], losses: Mapping[int, F64], *, objective: str, members: int, cost: float
) -> list[float]:
    """What the sampler is told of each trial, in nats per token; lower is better.

    `losses`: number of each complete trial → [T] its loss at each validation token. `members`: of an ensemble, at most.
    `cost`: added for each layer that the trial trains, if that varies. A trial that is not complete has its own loss,
    with the objective `ensemble` the worst value.
    """
    values = [trial.value for trial in trials]
    if objective == "ensemble" and losses:
        alone = completed(losses, members)
        worst = max(alone.values())
        values = [alone.get(trial.number, worst) for trial in trials]
    return [value + cost * int(trial.params.get("layers", 0)) for trial, value in zip(trials, values)]


def completed(losses: Mapping[int, F64], members: int) -> dict[int, float]:
    """Trial → the loss of the ensemble of it and the best `members` - 1 others."""
    numbers = list(losses)
    rows = np.stack([losses[number] for number in numbers])
    chosen = chosen_members(rows, members)
    found = {}
    for index, number in enumerate(numbers):
        others = [k for k in chosen if k != index]
        if len(others) == members:
            kept = chosen_members(rows[others], members - 1) if members > 1 else []
            others = [others[k] for k in kept]
        found[number] = mixed_loss(rows[[*others, index]])
    return found


def chosen_members(rows: F64, members: int) -> list[int]:
    """Indices of the rows [K, T] that greedy selection takes, at most `members` of them."""
    mix = greedy(
        len(rows),
        lambda m: float(_mixed(rows[m > 0], m[m > 0]).mean()),
        max_members=members,
        rounds=ROUNDS,
        candidates=range(len(rows)),
    )
    return np.flatnonzero(mix).tolist()


def mixed_loss(rows: F64) -> float:
    """The mean loss of the fitted mix of these rows [K, T]."""
    return float(_mixed(rows, em(rows, np.full(len(rows), 1.0))).mean())


def _mixed(rows: F64, mix: F64) -> F64:
    with np.errstate(divide="ignore"):
        return np.asarray(-np.logaddexp.reduce(np.log(mix)[:, None] - rows, axis=0))
