"""The HTML report of a search: one self-contained page with history, importance, parallel coordinates and all trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna

from ...pages import COLOURS, Bars, Part, Table, figure, page, svg
from .space import Trial, as_study

_COLOURS = {"complete": COLOURS[0], "pruned": "#b8b8b8", "diverged": COLOURS[3]}


def write_report(path: Path, name: str, trials: Sequence[Trial], space: Mapping[str, Any]) -> None:
    """Write the page. The search calls this after each trial, so the page is there while it runs."""
    best = min(trials, key=lambda t: t.value)
    counts = {state: sum(t.state == state for t in trials) for state in _COLOURS}
    shares = importance(trials, space)
    bars = Bars("Importance of each dimension", "share", list(shares), {"share": list(shares.values())})
    parts: list[Part | str] = [
        f"<p>{len(trials)} trials ({', '.join(f'{n} {state}' for state, n in counts.items())}), "
        f"{sum(t.seconds for t in trials):.0f} s of training. Best: trial {best.number}, "
        f"validation loss {best.value:.4f} nats per token.</p>",
        '<div class="charts">',
        _history(trials),
        _parallel(trials, space),
        "</div>",
        bars if shares else "<p>There are too few trials for the importance of each dimension.</p>",
        _table(trials, space),
    ]
    path.write_text(page(f"Search {name}", parts))


def importance(trials: Sequence[Trial], space: Mapping[str, Any]) -> dict[str, float]:
    """Dimension → its importance (PED-ANOVA, Watanabe et al. 2023). Empty below 4 trials, or if all are equal."""
    if len(trials) < 4 or len({trial.value for trial in trials}) < 2:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return dict(optuna.importance.get_param_importances(as_study(trials, space), evaluator=evaluator))


def _history(trials: Sequence[Trial]) -> str:
    ordered = sorted(t.value for t in trials)
    # Up to the 90th percentile: a diverged trial would flatten the others.
    low, high = ordered[0], ordered[min(len(ordered) - 1, math.ceil(0.9 * len(ordered)))]
    margin = 0.05 * (high - low) or 0.01
    drawn = figure()
    axes = drawn.subplots()
    for state, colour in _COLOURS.items():
        found = [t for t in trials if t.state == state]
        values = [min(t.value, high + margin) for t in found]
        axes.scatter([t.number for t in found], values, s=18, color=colour, label=state, zorder=3)
    best = [min(t.value for t in trials[: i + 1]) for i in range(len(trials))]
    axes.plot([t.number for t in trials], best, color="#222", linestyle="--", linewidth=1, label="best so far")
    axes.set_ylim(low - margin, high + 2 * margin)
    axes.set(xlabel="trial", ylabel="validation loss, nats per token")
    axes.set_title("History", loc="left", fontsize=11)
    axes.legend(fontsize=8, frameon=False)
    return svg(drawn, "Validation loss of each trial, and the best so far")


def _parallel(trials: Sequence[Trial], space: Mapping[str, Any]) -> str:
    names = [*space, "loss"]
    columns = [_column(name, trials, space) for name in names]
    drawn = figure()
    axes = drawn.subplots()
    for rank, trial in enumerate(sorted(trials, key=lambda t: -t.value)):
        share = rank / max(1, len(trials) - 1)
        heights = [column[trial.number] for column in columns]
        axes.plot(heights, color=COLOURS[0], alpha=0.12 + 0.88 * share**2, linewidth=0.6 + 1.4 * share)
    for place in range(len(names)):
        axes.axvline(place, color="#999", linewidth=0.6)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axes.set_yticks([])
    axes.set_title("Each line is a trial; the darker, the better", loc="left", fontsize=11)
    return svg(drawn, "Parallel coordinates of the trials")


def _column(name: str, trials: Sequence[Trial], space: Mapping[str, Any]) -> dict[int, float]:
    """Trial number → height (0…1) on the axis of one dimension."""
    choices = getattr(space.get(name), "choices", None)
    if choices is not None:
        values = {t.number: float(choices.index(t.params[name])) for t in trials}
    else:
        values = {t.number: t.value if name == "loss" else float(t.params[name]) for t in trials}
    if getattr(space.get(name), "log", False):
        values = {n: math.log(v) for n, v in values.items()}
    low, high = min(values.values()), max(values.values())
    return {n: (v - low) / ((high - low) or 1.0) for n, v in values.items()}


def _table(trials: Sequence[Trial], space: Mapping[str, Any]) -> Table:
    rows = []
    for trial in sorted(trials, key=lambda t: t.value):
        values = [trial.params[name] for name in space]
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
        rows.append([str(trial.number), f"{trial.value:.4f}", trial.state, f"{trial.seconds:.1f}", *cells])
    return Table("Trials, the best first", ["trial", "loss", "state", "seconds", *space], rows)
