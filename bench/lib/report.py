"""Reports: tables in the terminal, a JSON file, a self-contained HTML page with plots, and one JSON line at the end."""

from __future__ import annotations

import html
import io
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...tables import table as table


@dataclass(frozen=True, slots=True)
class Plot:
    """A bar chart: one cluster of bars per label, one bar per series. `values[series]` has one value per label."""

    title: str
    unit: str
    labels: Sequence[str]
    values: Mapping[str, Sequence[float]]


def machine() -> dict[str, Any]:
    """The machine that the figures are measured on: CPU, its relevant flags, cores, versions."""
    info: dict[str, Any] = {"machine": platform.machine(), "python": platform.python_version()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        values = {key.strip(): value.strip() for key, value in fields.items()}
        info["cpu"] = (
            f"{values.get('model name', '')} family {values.get('cpu family', '')} model {values.get('model', '')}"
        )
        info["cores"] = sum(line.startswith("processor") for line in lines)
        flags = values.get("flags", "").split()
        info["flags"] = [
            flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if flag in flags
        ]
    info["versions"] = {name: metadata.version(name) for name in ("motet", "onnxruntime", "numpy")}
    return info


def write(name: str, result: dict[str, Any], tables: Sequence[Table], plots: Sequence[Plot], out: Path) -> None:
    """Write `out/name.json` and `out/name.html`, print the tables, then print the result as one line of JSON."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / f"{name}.html").write_text(_page(name, result, tables, plots))
    # A pipe has no width, and rich's default of 80 columns would cut figures off.
    console = Console(width=None if sys.stdout.isatty() else 120)
    for item in tables:
        console.print(item)
    print(json.dumps({"bench": name, **result}), flush=True)


def _page(name: str, result: dict[str, Any], tables: Sequence[Table], plots: Sequence[Plot]) -> str:
    captured = []
    for item in tables:
        console = Console(record=True, width=120, file=io.StringIO())
        console.print(item)
        captured.append(f"<pre>{html.escape(console.export_text())}</pre>")
    style = "body{font-family:sans-serif;max-width:60em;margin:2em auto}pre{overflow-x:auto}svg{max-width:100%}"
    figures = "\n".join(_svg(plot) for plot in plots)
    data = html.escape(json.dumps(result, indent=1))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>motet bench {name}</title><style>{style}</style>'
        f"<h1>motet bench {name}</h1>{''.join(captured)}{figures}<h2>Data</h2><pre>{data}</pre></html>\n"
    )


_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#9c6b4e", "#97bbf5")


def _svg(plot: Plot) -> str:
    """The plot as horizontal bars with their values. It is too small to need a library."""
    largest = max((value for values in plot.values.values() for value in values), default=0.0) or 1.0
    rows: list[str] = []
    y = 40
    for index, label in enumerate(plot.labels):
        rows.append(f'<text x="0" y="{y + 12}" font-weight="bold">{html.escape(label)}</text>')
        y += 20
        for number, (series, values) in enumerate(plot.values.items()):
            width = 420 * values[index] / largest
            colour = _COLOURS[number % len(_COLOURS)]
            rows.append(f'<text x="150" y="{y + 12}" text-anchor="end">{html.escape(series)}</text>')
            rows.append(f'<rect x="160" y="{y}" width="{width:.1f}" height="15" fill="{colour}"/>')
            rows.append(f'<text x="{166 + width:.1f}" y="{y + 12}">{values[index]:,.4g}</text>')
            y += 18
        y += 8
    title = html.escape(f"{plot.title} ({plot.unit})")
    return (
        f'<svg viewBox="0 0 700 {y}" font-family="sans-serif" font-size="12" role="img" aria-label="{title}">'
        f'<text x="0" y="18" font-size="15">{title}</text>{"".join(rows)}</svg>'
    )
