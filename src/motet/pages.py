"""HTML pages of results: real tables and charts that matplotlib draws as SVG, in one file without scripts."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .runtime.errors import MissingPackageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2f6fde", "#e08a00", "#2c9c69", "#c2483d", "#8a5cc7", "#7a6a5a", "#3aa6b9", "#a0a0a0")
_OURS, _OTHERS = COLOURS[0], "#b9c2cc"
_WIDTH_IN = 6.2

_STYLE = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;max-width:78rem;margin:2rem auto;padding:0 1rem;color:#1c2733}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2rem}a{color:#1d56b8}
.scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
caption{text-align:left;white-space:pre-line;padding-bottom:.5rem;color:#4a5866}
th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #dde3ea;white-space:nowrap}
th.text,td.text{text-align:left}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:#fff}
thead th{border-bottom:2px solid #8593a1}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr));gap:1rem}
figure{margin:0;overflow-x:auto}svg{width:100%;height:auto;min-width:24rem;max-width:46rem}
pre{overflow:auto;max-height:30rem;background:#f5f7f9;padding:1rem;font-size:.8rem}
"""


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are texts. The first column names its row; the others hold figures."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Bars:
    """A bar chart: a cluster of bars per label, a bar per series. `values[series]` has one value per label.

    `spans[series]` has the lowest and highest value of each bar's repeats, which become error bars. If `ours` is not empty, the
    chart has one series, its bars are sorted, and those whose labels begin with `ours` stand out.
    """

    title: str
    unit: str
    labels: Sequence[str]
    values: Mapping[str, Sequence[float]]
    spans: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    ours: str = ""


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines through points (x, y). `units`: of the two axes. `is_log`: x is drawn on a logarithmic scale."""

    title: str
    units: tuple[str, str]
    lines: Mapping[str, Sequence[Sequence[float]]]
    is_log: bool = False


Part = Table | Bars | Lines
_KINDS: dict[str, type[Part]] = {"table": Table, "bars": Bars, "lines": Lines}


def as_json(part: Part) -> dict[str, Any]:
    """The part as values of JSON, for `from_json`."""
    kind = next(name for name, kind in _KINDS.items() if isinstance(part, kind))
    return {"kind": kind, **{name: getattr(part, name) for name in part.__dataclass_fields__}}


def from_json(values: Mapping[str, Any]) -> Part:
    """The part that `as_json` wrote."""
    return _KINDS[values["kind"]](**{name: value for name, value in values.items() if name != "kind"})


def page(title: str, parts: Iterable[Part | str]) -> str:
    """A whole page. Texts among the parts are HTML. Charts that follow each other stand side by side where there is room.

    Raises `MissingPackageError` if there are charts and matplotlib is not installed.
    """
    body, charts = list[str](), list[str]()
    for part in parts:
        if isinstance(part, Bars | Lines):
            charts.append(_chart(part))
            continue
        body += [f'<div class="charts">{"".join(charts)}</div>'] if charts else []
        charts = []
        body.append(_table(part) if isinstance(part, Table) else part)
    body += [f'<div class="charts">{"".join(charts)}</div>'] if charts else []
    name = html.escape(title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name}</title><style>{_STYLE}</style></head><body><h1>{name}</h1>{''.join(body)}</body></html>\n"
    )


def figure(width_in: float = _WIDTH_IN, height_in: float = 3.2) -> Figure:
    """An empty matplotlib figure. Raises `MissingPackageError` if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingPackageError("charts need matplotlib; install it with `pip install 'motet[bench]'`") from error
    return Figure(figsize=(width_in, height_in), layout="constrained")


def svg(drawn: Figure, label: str) -> str:
    """The figure as an element of a page; the same figure gives the same text. `label`: for readers who do not see it."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    content = text[text.index("<svg") :].strip()
    content = re.sub(r' (?:width|height)="[^"]*pt"', "", content, count=2)  # the page's style gives the size
    content = content.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
    return f"<figure>{content}</figure>"


def _table(part: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in part.header)
    rows = []
    for first, *others in part.rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in others)
        rows.append(f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table><caption>{html.escape(part.title)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _chart(part: Bars | Lines) -> str:
    if isinstance(part, Bars):
        count = len(part.labels) * (len(part.values) + 0.6)
        drawn = figure(height_in=1.0 + 0.2 * count)
        _draw_bars(drawn.subplots(), part)
        return svg(drawn, f"{part.title} ({part.unit})")
    drawn = figure()
    _draw_lines(drawn.subplots(), part)
    return svg(drawn, part.title)


def _draw_bars(axes: Axes, part: Bars) -> None:
    order = list(range(len(part.labels)))
    if part.ours:
        (values,) = part.values.values()
        order.sort(key=lambda index: -values[index])
    height = 0.8 / max(1, len(part.values))
    ends = [*part.values.values(), *([high for _, high in spans] for spans in part.spans.values())]
    largest = max((value for values in ends for value in values), default=0.0) or 1.0
    for number, (series, values) in enumerate(part.values.items()):
        at = [place + height * (number - (len(part.values) - 1) / 2) for place in range(len(order))]
        ordered = [values[index] for index in order]
        colours = [COLOURS[number % len(COLOURS)]] * len(order)
        if part.ours:
            colours = [_OURS if part.labels[index].startswith(part.ours) else _OTHERS for index in order]
        stops = list(ordered)
        axes.barh(at, ordered, height * 0.92, color=colours, label=series)
        if series in part.spans:
            spans = [part.spans[series][index] for index in order]
            below = [max(0.0, value - low) for value, (low, _) in zip(ordered, spans, strict=True)]
            above = [max(0.0, high - value) for value, (_, high) in zip(ordered, spans, strict=True)]
            axes.errorbar(ordered, at, xerr=[below, above], fmt="none", ecolor="#333", elinewidth=1, capsize=2)
            stops = [max(value, high) for value, (_, high) in zip(ordered, spans, strict=True)]
        for place, value, end in zip(at, ordered, stops, strict=True):
            axes.text(end + 0.012 * largest, place, f"{value:,.4g}", va="center", fontsize=8)
    axes.set_yticks(range(len(order)), [part.labels[index] for index in order], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * largest)
    _frame(axes, part.title, part.unit, "x")
    if len(part.values) > 1:
        axes.figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=4)


def _draw_lines(axes: Axes, part: Lines) -> None:
    for number, (name, points) in enumerate(part.lines.items()):
        marker = "o" if len(points) <= 20 else ""
        colour = COLOURS[number % len(COLOURS)]
        axes.plot([p[0] for p in points], [p[1] for p in points], label=name, color=colour, marker=marker, markersize=4)
    if part.is_log:
        axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_ylabel(part.units[1], fontsize=9)
    _frame(axes, part.title, part.units[0], "both")
    if len(part.lines) > 1:
        axes.legend(fontsize=8, frameon=False)


def _frame(axes: Axes, title: str, unit: str, grid: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e6eaee")  # type: ignore[arg-type]
    axes.set_axisbelow(True)
