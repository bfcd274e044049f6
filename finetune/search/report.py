"""The HTML report of a search: one self-contained page with history, importance and parallel coordinates, as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna

from .space import Trial, as_study

_COLOURS = {"complete": "#4269d0", "pruned": "#b8b8b8", "diverged": "#ff725c"}
_STYLE = "body{font-family:sans-serif;max-width:70em;margin:2em auto}svg{max-width:100%}td,th{padding:.2em .6em;text-align:right}"
_WIDTH, _HEIGHT = 900, 300


def write_report(path: Path, name: str, trials: Sequence[Trial], space: Mapping[str, Any]) -> None:
    """Write the page. The search calls this after each trial, so the page is there while it runs."""
    best = min(trials, key=lambda t: t.value)
    counts = {state: sum(t.state == state for t in trials) for state in _COLOURS}
    parts = [
        f"<h1>Search {html.escape(name)}</h1>",
        f"<p>{len(trials)} trials ({', '.join(f'{n} {state}' for state, n in counts.items())}), "
        f"{sum(t.seconds for t in trials):.0f} s of training. Best: trial {best.number}, "
        f"validation loss {best.value:.4f} nats per token.</p>",
        "<h2>History</h2>",
        _history(trials),
        "<h2>Importance</h2>",
        _importance(trials, space),
        "<h2>Parallel coordinates</h2>",
        _parallel(trials, space),
        "<h2>Trials</h2>",
        _table(trials, space),
    ]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(name)}</title><style>{_STYLE}</style>'
    path.write_text(page + "".join(parts) + "\n")


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
    x = _scale(0, max(1, len(trials) - 1), 60, _WIDTH - 20)
    y = _scale(low, high, _HEIGHT - 30, 20)
    dots, path, best = [], [], math.inf
    for trial in trials:
        best = min(best, trial.value)
        path.append(f"{x(trial.number):.1f},{y(best):.1f}")
        title = f"<title>trial {trial.number}: {trial.value:.4f} ({trial.state})</title>"
        dots.append(
            f'<circle cx="{x(trial.number):.1f}" cy="{max(8.0, y(trial.value)):.1f}" r="5" '
            f'fill="{_COLOURS[trial.state]}">{title}</circle>'
        )
    line = f'<polyline points="{" ".join(path)}" fill="none" stroke="#222" stroke-dasharray="4 3"/>'
    labels = "".join(f'<text x="2" y="{y(v):.0f}" font-size="12">{v:.3f}</text>' for v in (low, high))
    return _svg(line + "".join(dots) + labels, "Validation loss of each trial; dashed: the best so far")


def _importance(trials: Sequence[Trial], space: Mapping[str, Any]) -> str:
    shares = importance(trials, space)
    if not shares:
        return "<p>There are too few trials.</p>"
    bars = []
    for row, (name, share) in enumerate(shares.items()):
        top = 10 + row * 26
        bars.append(
            f'<text x="150" y="{top + 14}" text-anchor="end" font-size="13">{name}</text>'
            f'<rect x="160" y="{top}" width="{share * 600:.1f}" height="18" fill="#4269d0"/>'
            f'<text x="{166 + share * 600:.1f}" y="{top + 14}" font-size="12">{share:.2f}</text>'
        )
    return _svg("".join(bars), "Importance of each dimension", 20 + 26 * len(shares))


def _parallel(trials: Sequence[Trial], space: Mapping[str, Any]) -> str:
    names = [*space, "loss"]
    columns = {name: _column(name, trials, space) for name in names}
    x = _scale(0, max(1, len(names) - 1), 60, _WIDTH - 60)
    worst_first = sorted(trials, key=lambda t: -t.value)
    lines = []
    for rank, trial in enumerate(worst_first):
        points = " ".join(f"{x(i):.1f},{columns[name][trial.number]:.1f}" for i, name in enumerate(names))
        share = rank / max(1, len(trials) - 1)
        colour = f"rgb({int(200 - 134 * share)},{int(200 - 95 * share)},{int(200 + 8 * share)})"
        lines.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{1 + 1.5 * share:.1f}">'
            f"<title>trial {trial.number}: {trial.value:.4f}</title></polyline>"
        )
    axes = "".join(
        f'<line x1="{x(i):.1f}" x2="{x(i):.1f}" y1="30" y2="{_HEIGHT - 30}" stroke="#999"/>'
        f'<text x="{x(i):.1f}" y="18" font-size="11" text-anchor="middle">{name}</text>'
        for i, name in enumerate(names)
    )
    return _svg(axes + "".join(lines), "Each line is a trial; the darker, the better")


def _column(name: str, trials: Sequence[Trial], space: Mapping[str, Any]) -> dict[int, float]:
    """Trial number → height on the axis of one dimension."""
    choices = getattr(space.get(name), "choices", None)
    if choices is not None:
        y = _scale(0, max(1, len(choices) - 1), _HEIGHT - 30, 30)
        return {t.number: y(choices.index(t.params[name])) for t in trials}
    values = {t.number: t.value if name == "loss" else float(t.params[name]) for t in trials}
    if getattr(space.get(name), "log", False):
        values = {n: math.log(v) for n, v in values.items()}
    y = _scale(min(values.values()), max(values.values()), _HEIGHT - 30, 30)
    return {n: y(v) for n, v in values.items()}


def _table(trials: Sequence[Trial], space: Mapping[str, Any]) -> str:
    header = "".join(f"<th>{name}</th>" for name in ("trial", "loss", "state", "seconds", *space))
    rows = []
    for trial in sorted(trials, key=lambda t: t.value):
        cells = [trial.number, f"{trial.value:.4f}", trial.state, f"{trial.seconds:.1f}"]
        cells += [f"{v:.3g}" if isinstance(v, float) else v for v in (trial.params[name] for name in space)]
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{header}</tr>{''.join(rows)}</table>"


def _scale(low: float, high: float, start: float, stop: float) -> Any:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (stop - start)


def _svg(content: str, label: str, height: int = _HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" role="img" aria-label="{label}">{content}</svg>'
        f"<p>{label}.</p>"
    )
